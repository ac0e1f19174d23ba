"""The Bayes floor of denoising score matching at each noise level, and how near networks come.

    python -m examples.score_matching

The data are a mixture of three Gaussians in 2, 16 and 64 dimensions, so that the exact score is
known. The floor is what that pays, L_simple on the same draws, which no network can beat on
average: it does not know eps either. Printed are the floor and how much more a trained network
pays, in percent of it: a perceptron that is conditioned on the noise, with EDM's preconditioning,
and one of the same size without an input for it, NCSNv2's, which has to see by y = x_t/alpha_t
alone how much noise is in it.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddpm
from ddpm import loss_weights, losses, predictions
from ddpm.diffusion.predictions import Denoiser, Network

Params = list[jax.Array]
# The denoiser of a network, and the weight that its loss has: EDM's, and L_simple's.
NETWORKS: dict[str, tuple[Callable[[Any, Network], Denoiser], loss_weights.Weight]] = {
    "conditioned": (predictions.preconditioned, loss_weights.edm()),
    "unconditional": (
        lambda schedule, network: ddpm.denoiser(
            schedule, predictions.noise_unconditional(schedule, network)
        ),
        loss_weights.simple,
    ),
}


class Mixture(NamedTuple):
    """A mixture of N(means[k], variance I) with these weights, [K]; means are [K, D]."""

    weights: jax.Array
    means: jax.Array
    variance: float

    def draw(self, key: jax.Array, n: int) -> jax.Array:
        """Draws [n, D]."""
        of_component, of_noise = jax.random.split(key)
        k = jax.random.categorical(of_component, jnp.log(self.weights), shape=(n,))
        noise = jax.random.normal(of_noise, (n, self.means.shape[1]))
        return self.means[k] + self.variance**0.5 * noise

    def denoiser(self, schedule: ddpm.NoiseSchedule) -> Denoiser:
        """Returns the exact denoiser: the mean of x_0 given x_t."""

        def denoise(x_t: jax.Array, t: jax.Array) -> ddpm.Prediction:
            level = schedule.at(t)
            alpha, noise = level.alpha[:, None], level.sigma_squared[:, None]
            spread = alpha**2 * self.variance + noise
            apart = x_t[:, None] - alpha[..., None] * self.means
            share = jax.nn.softmax(jnp.log(self.weights) - 0.5 * (apart**2).sum(-1) / spread)
            gain = (alpha * self.variance / spread)[..., None]
            x_0 = (share[..., None] * (self.means + gain * apart)).sum(1)
            return predictions.from_x_0(schedule, x_t, t, x_0)

        return denoise


def mixture(dimensions: int) -> Mixture:
    """Returns a mixture of three, whose standard deviation about 0 is about 0.5 as that of
    images is."""
    means = 0.5 * np.random.default_rng(dimensions).normal(size=(3, dimensions))
    return Mixture(jnp.array([0.2, 0.3, 0.5]), jnp.asarray(means, jnp.float32), 0.02)


def perceptron(params: Params, x: jax.Array, c_noise: jax.Array) -> jax.Array:
    """Computes x [B, D] and log(sigma)/4 [B], or zeros, -> [B, D]: x times a factor that the
    network puts out too, plus a vector."""
    one = jnp.ones_like(x[:, :1])
    h = jnp.concatenate([x, 4 * c_noise[:, None], one], axis=1)
    for weights in params[:-1]:
        h = jnp.concatenate([jax.nn.swish(h @ weights), one], axis=1)
    factor, rest = jnp.split(h @ params[-1], [1], axis=1)
    return factor * x + rest


def init(key: jax.Array, dimensions: int, width: int = 64) -> Params:
    """Returns random weights of three hidden layers."""
    into, out = [dimensions + 2, *[width + 1] * 3], [*[width] * 3, dimensions + 1]
    sizes = list(zip(into, out, strict=True))
    keys = jax.random.split(key, len(sizes))
    return [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, sizes, strict=True)]


def trained(
    key: jax.Array, schedule: ddpm.NoiseSchedule, data: Mixture, name: str, *, steps: int
) -> Denoiser:
    """Returns the denoiser of one of NETWORKS after so many steps of Adam, with 512 draws each."""
    make, weight = NETWORKS[name]
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    criterion = losses.weighted(weight)

    def denoiser(params: Params) -> Denoiser:
        return make(schedule, lambda x, c: perceptron(params, x, c))

    def loss(params: Params, key: jax.Array) -> jax.Array:
        of_t, of_x_0, of_eps = jax.random.split(key, 3)
        t, x_0 = ddpm.timesteps.uniform(schedule, of_t, 512), data.draw(of_x_0, 512)
        eps = jax.random.normal(of_eps, x_0.shape)
        return losses.regression(schedule, denoiser(params), x_0, t, eps, criterion).mean()

    def step(now: tuple[Params, Any], key: jax.Array) -> tuple[tuple[Params, Any], None]:
        params, state = now
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(key: jax.Array) -> Params:
        of_weights, of_steps = jax.random.split(key)
        params = init(of_weights, data.means.shape[1])
        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, jax.random.split(of_steps, steps))[0][0]

    return denoiser(run(key))


def paid(
    key: jax.Array, schedule: ddpm.NoiseSchedule, data: Mixture, denoiser: Denoiser, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns L_simple of the exact denoiser at t = 1..T, the floor, and how much more the denoiser
    pays on the same n draws, over the floor.

    That is the same for any weight lambda of denoising score matching, a factor at each level.
    """
    exact = data.denoiser(schedule)

    @jax.jit
    def at(t: jax.Array) -> list[jax.Array]:
        of_x_0, of_eps = jax.random.split(jax.random.fold_in(key, t))
        x_0 = data.draw(of_x_0, n)
        eps, times = jax.random.normal(of_eps, x_0.shape), jnp.full(n, t)
        return [losses.simple(schedule, d, x_0, times, eps).mean() for d in (exact, denoiser)]

    floor, found = np.array([at(t) for t in jnp.arange(1, schedule.num_steps + 1)]).T
    return floor, found / floor - 1


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and prints the table: the mean over seeds and, after ±, the standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=40_000, help="at each level, to measure")
    a = parser.parse_args(argv)
    schedule = ddpm.schedules.geometric(8, 0.02, 10.0)
    sigmas = np.exp(-0.5 * np.asarray(schedule.log_snr[1:]))
    columns = [["sigma", *(f"{sigma:.3f}" for sigma in sigmas)]]
    for dimensions in a.dimensions:
        data, of = mixture(dimensions), {}
        for name in NETWORKS:
            found = []
            for seed in range(a.seeds):
                denoiser = trained(jax.random.key(seed), schedule, data, name, steps=a.steps)
                floor, more = paid(jax.random.key(100), schedule, data, denoiser, a.draws)
                found.append(100 * more)
            spread = zip(np.mean(found, axis=0), np.std(found, axis=0), strict=True)
            of[name] = [f"{mean:.2f} ± {std:.2f}" for mean, std in spread]
        columns.append([f"D = {dimensions}: floor", *(f"{x:.4g}" for x in floor)])
        columns += [[name, *cells] for name, cells in of.items()]
    header, *rows = zip(*columns, strict=True)
    for row in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
