"""Normalised energies of a mixture in the plane by dual score matching, against its own density.

python examples/dual_energies.py          # two minutes on two cores; writes docs/dual_energies.png

For each weight of the error in the noise level's derivative and three seeds: the mean absolute
error and the bias of log p in nats on held-out data, and log of the integral of p over the plane,
at the first noise level and in the middle. The weight 0 is denoising score matching alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddpm
from ddpm.energy import dual

FIGURE = Path(__file__).parents[1] / "docs" / "dual_energies.png"
WEIGHTS = 0.0, 0.1, 1.0, 10.0
SEEDS, STEPS, BATCH, WIDTH, HELD_OUT = 3, 6000, 256, 64, 4000
SHARES = jnp.float32([0.2, 0.3, 0.5])
MEANS = jnp.float32([[-0.9, -0.3], [0.6, 0.8], [0.5, -0.7]])
VARIANCE = 0.09

schedule = ddpm.continuous.linear(6.0, -6.0)
base = dual.gaussian(0.5)


def exact(x_t: jax.Array, log_snr: jax.Array) -> jax.Array:
    """Returns -log q(x_t) of the mixture, [B]."""
    alpha, spread = jnp.sqrt(jax.nn.sigmoid(log_snr)), jax.nn.sigmoid(-log_snr)
    spread += alpha**2 * VARIANCE
    squares = ((x_t[:, None] - alpha[:, None, None] * MEANS) ** 2).sum(-1)
    logs = jnp.log(SHARES) - squares / (2 * spread[:, None])
    return jnp.log(2 * jnp.pi * spread) - jax.nn.logsumexp(logs, axis=1)


def draw(key: jax.Array, n: int) -> jax.Array:
    """Draws x_0 [n, 2]."""
    a, b = jax.random.split(key)
    means = MEANS[jax.random.choice(a, 3, (n,), p=SHARES)]
    return means + VARIANCE**0.5 * jax.random.normal(b, (n, 2))


def network(params: Any) -> dual.Energy:
    """Returns a Gaussian's energy plus a perceptron of x_t and four waves of the log-SNR."""

    def energy(x_t: jax.Array, log_snr: jax.Array) -> jax.Array:
        angles = log_snr[:, None] * jnp.arange(1, 5) * (jnp.pi / 24)
        h = jnp.concatenate([2 * x_t, jnp.sin(angles), jnp.cos(angles)], axis=1)
        for weight, bias in params[:-1]:
            h = jax.nn.swish(h @ weight + bias)
        return base(x_t, log_snr) + (h @ params[-1][0] + params[-1][1])[:, 0]

    return energy


def train(key: jax.Array, time_weight: float) -> Any:
    """Returns the parameters after training."""
    sizes = (10, WIDTH, WIDTH, 1)
    params = [
        (jax.random.normal(k, (m, n)) * (2 / m) ** 0.5 * (n > 1), jnp.zeros(n))
        for k, m, n in zip(jax.random.split(key, 3), sizes, sizes[1:], strict=False)
    ]
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS), b2=0.99)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        a, b, c = jax.random.split(key, 3)
        t, eps = ddpm.timesteps.low_discrepancy(b, BATCH), jax.random.normal(c, (BATCH, 2))
        x_0 = draw(a, BATCH)
        return dual.loss(schedule, network(params), x_0, t, eps, time_weight=time_weight).mean()

    def step(carried: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carried
        updates, state = adam.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    begun = params, adam.init(params)
    (params, _), _ = jax.lax.scan(step, begun, jax.random.split(key, STEPS))
    return params


def plane(n: int = 201) -> jax.Array:
    """Returns the points of a grid over [-4, 4]^2, [n^2, 2]."""
    axis = jnp.linspace(-4, 4, n)
    return jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def measure(params: Any, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the mean absolute error of log p, its bias, and log of the integral of p, in nats."""
    energy = dual.normalized(schedule, network(params), (2,), jax.random.key(7))
    a, b = jax.random.split(jax.random.key(5))
    x_t = ddpm.q_sample(schedule, draw(a, HELD_OUT), t, jax.random.normal(b, (HELD_OUT, 2)))
    log_snr = schedule.at(t).high
    levels, grid = jnp.full(HELD_OUT, log_snr), plane()
    error = exact(x_t, levels) - energy(x_t, levels)
    total = jax.nn.logsumexp(-energy(grid, jnp.full(len(grid), log_snr))) + 2 * np.log(8 / 200)
    return jnp.abs(error).mean(), error.mean(), total


def draw_figure(found: dict[float, Any], times: np.ndarray, params: Any) -> None:
    """Draws both densities at the first noise level, and the errors over log-SNR."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    grid, levels = plane(), jnp.full(201**2, schedule.at(0.0).high)
    learned = dual.normalized(schedule, network(params), (2,), jax.random.key(7))
    pairs: list[tuple[Any, str, Callable[..., Any]]] = [
        (left, "exact", exact), (middle, "learned, weight 1, seed 0", learned)
    ]  # fmt: skip
    for axes, title, energy in pairs:
        density = -np.asarray(energy(grid, levels)).reshape(201, 201)
        shown = axes.contourf(*np.meshgrid(*2 * [np.linspace(-4, 4, 201)]), density,
                              levels=np.arange(-20, 1), extend="min")  # fmt: skip
        axes.set(title=f"log p, {title}", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
    figure.colorbar(shown, ax=middle)
    for weight, values in found.items():
        right.semilogy(schedule.at(times).high, values[0].mean(0), label=f"weight {weight:g}")
    right.set(title="mean |error| of log p, nats", xlabel="log-SNR")
    right.legend()
    figure.savefig(FIGURE, dpi=80)


def main() -> None:
    """Trains and measures all, prints a table and draws the figure."""
    times, found, kept = np.linspace(0, 1, 13, dtype=np.float32), {}, None
    for weight in WEIGHTS:
        params = jax.jit(jax.vmap(lambda key, w=weight: train(key, w)))(
            jax.random.split(jax.random.key(0), SEEDS)
        )
        of_times = jax.vmap(measure, (None, 0))
        values = [np.asarray(x) for x in jax.jit(jax.vmap(of_times, (0, None)))(params, times)]
        found[weight] = values
        kept = jax.tree.map(lambda x: x[0], params) if weight == 1 else kept
        for i in (0, 6):
            mean = ", ".join(f"{x[:, i].mean():.4f} ± {x[:, i].std(ddof=1):.4f}" for x in values)
            print(f"weight {weight:g}, log-SNR {6 - 12 * times[i]:g}: |error|, bias, log Z: {mean}")
    draw_figure(found, times, kept)


if __name__ == "__main__":
    main()
