"""Products of densities by diffusion: reverse diffusion alone, with MCMC, and with weights.

python examples/composition.py [--picture=composition.png]

The parts are Gaussians and mixtures in the plane, whose denoisers are exact and whose product is
known in closed form, so that what is wrong is the method. Reverse diffusion with the sum of scores
is; MALA or HMC at each noise level (Du et al. 2023), or weights and resampling (Skreta et al.
2025), make it right. Prints for each method, over seeds: the mean negative log-likelihood of the
samples under the true product, less its entropy, in nats; the p-value of a two-sample test against
exact draws; and the acceptance, or the least effective sample size.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ddpm
from ddpm.diffusion.gaussian import expand_like
from ddpm.energy import composition, feynman_kac
from ddpm.evaluation import distances

schedule = ddpm.schedules.linear(1000)
LEVELS = ddpm.grids.log_snr(schedule, 40, sigma_max=None)
STEPS = ddpm.grids.log_snr(schedule, 400, sigma_max=None)  # of Feynman-Kac correctors
POPULATION = 8000  # theirs, of which n are taken: they are relatives
PILOT = 100  # steps at each level to find step sizes
EXACT = 200_000  # draws that measure the entropy
TESTED = 2000  # samples of each set in the two-sample test


class Mixture(NamedTuple):
    """A mixture of Gaussians: weights [K], means [K, D], covariances [K, D, D]."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    def log_density(self, x_t: jax.Array, t: jax.typing.ArrayLike) -> jax.Array:
        """Returns log q(x_t), noised: components are N(alpha m, alpha^2 C + sigma^2 I)."""
        level = schedule.at(jnp.broadcast_to(t, x_t.shape[:1]))
        alpha = expand_like(level.alpha, x_t)[..., None]
        values, vectors = np.linalg.eigh(self.covariances)
        spread = alpha**2 * values.astype(np.float32)  # [B, K, D]
        spread += expand_like(level.sigma_squared, x_t)[..., None]
        # Along the axes of each component.
        axes = vectors.transpose(1, 0, 2).reshape(len(vectors[0]), -1).astype(np.float32)
        middle = np.einsum("kd,kde->ke", self.means, vectors).astype(np.float32)
        along = jnp.matmul(x_t, axes, precision="highest").reshape(spread.shape) - alpha * middle
        logs = -0.5 * (along**2 / spread + jnp.log(2 * np.pi * spread)).sum(-1)
        return jax.nn.logsumexp(logs + np.log(self.weights).astype(np.float32), axis=-1)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draws [n, D]."""
        which = rng.choice(len(self.weights), n, p=self.weights)
        z = rng.normal(size=(n, self.means.shape[1]))
        return self.means[which] + np.einsum(
            "nij,nj->ni", np.linalg.cholesky(self.covariances)[which], z
        )


def gaussian(mean: Any, covariance: Any) -> Mixture:
    """Returns a mixture of one."""
    return Mixture(np.ones(1), np.array([mean]), np.array([covariance]))


def product(a: Mixture, b: Mixture) -> Mixture:
    """Returns the normalised product, again a mixture: N(m, C) N(n, D) = N(m; n, C + D) N(.., E),
    E = (C^-1 + D^-1)^-1."""
    inverse = np.linalg.inv
    logs, means, covariances = [], [], []
    for w, m, c in zip(*a, strict=True):
        for v, n, d in zip(*b, strict=True):
            e = inverse(inverse(c) + inverse(d))
            means.append(e @ (inverse(c) @ m + inverse(d) @ n))
            covariances.append(e)
            away, total = m - n, c + d
            quadratic = away @ inverse(total) @ away + np.linalg.slogdet(total)[1]
            logs.append(np.log(w * v) - 0.5 * quadratic)
    weights = np.exp(np.array(logs) - max(logs))
    return Mixture(weights / weights.sum(), np.array(means), np.array(covariances))


PAIRS = {
    "two Gaussians": (
        gaussian([-0.3, 0.2], [[1.0, 0.75], [0.75, 0.7]]),
        gaussian([0.4, 0.0], [[0.15, -0.1], [-0.1, 0.8]]),
    ),
    "mixture x Gaussian": (
        Mixture(
            np.array([0.4, 0.35, 0.25]),
            np.array([[-0.8, -0.4], [0.6, 0.6], [0.7, -0.5]]),
            np.array([[[0.1, 0.05], [0.05, 0.15]], [[0.2, -0.1], [-0.1, 0.1]], 0.1 * np.eye(2)]),
        ),
        gaussian([0.1, 0.1], [[1.5, 0.6], [0.6, 0.5]]),
    ),
}


class Drawn(NamedTuple):
    """Samples, and the acceptance or the least effective sample size, as a fraction."""

    x_0: jax.Array
    kept: jax.Array


Method = Callable[[jax.Array, tuple[Mixture, Mixture], int], Drawn]


def reverse(key: jax.Array, parts: tuple[Mixture, Mixture], n: int) -> Drawn:
    """Draws by reverse diffusion with the sum of scores, all T steps."""
    denoiser = composition.product(schedule, denoisers(parts))
    start = composition.start(key, schedule, (n, 2), [1, 1])
    return Drawn(ddpm.sample(key, schedule, denoiser, (n, 2), x_t=start), jnp.ones(()))


def corrected(kernel: ddpm.mcmc.Kernel, steps: int) -> Method:
    """Returns the method of so many MCMC steps at each of 40 levels, and DDIM between them."""

    def draw(key: jax.Array, parts: tuple[Mixture, Mixture], n: int) -> Drawn:
        log_density = composition.log_product([part.log_density for part in parts])
        denoiser = composition.product(schedule, denoisers(parts))
        how: dict[str, Any] = {"times": LEVELS}
        pilot = jax.random.fold_in(key, n)  # no sample's
        tuned = ddpm.langevin.tune(
            pilot,
            schedule,
            denoiser,
            (64, 2),
            kernel,
            log_density,
            predictor=ddpm.ddim(),
            burn_in=PILOT,
            **how,
        )
        sampler = ddpm.predictor_corrector(
            ddpm.ddim(),
            corrector_steps=steps,
            kernel=kernel,
            log_density=log_density,
            snr=tuned.snr,
        )
        start = composition.start(key, schedule, (n, 2), [1, 1])
        chain = ddpm.sample_chain(
            key, schedule, denoiser, (n, 2), sampler=sampler, x_t=start, snapshots=0, **how
        )
        return Drawn(chain.x_0, chain.reports.mean())

    return draw


def weighted(key: jax.Array, parts: tuple[Mixture, Mixture], n: int) -> Drawn:
    """Draws by Feynman-Kac correctors, 400 steps."""
    shape = POPULATION, 2
    found = feynman_kac.sample(
        key, schedule, denoisers(parts), [1.0, 1.0], shape, times=STEPS, churn=4.0
    )
    return Drawn(found.x_0[:n], found.effective_sizes.min() / POPULATION)


def denoisers(parts: tuple[Mixture, Mixture]) -> list[ddpm.Denoiser]:
    """Returns the parts' exact denoisers."""
    return [composition.of_log_density(schedule, part.log_density) for part in parts]


METHODS: dict[str, Method] = {
    "reverse diffusion": reverse,
    "MALA": corrected(ddpm.mcmc.mala, 40),
    "HMC": corrected(ddpm.mcmc.hmc(5), 10),
    "Feynman-Kac": weighted,
}


class Judged(NamedTuple):
    """Nats by which samples are less likely than exact draws, and the p-value of the test."""

    excess: float
    p_value: float


def judge(x_0: Any, truth: Mixture, seed: int) -> Judged:
    """Compares samples [n, 2] with the true product, and the first 2000 with exact draws."""
    rng = np.random.default_rng((seed, 1))
    log_p = jax.jit(lambda x: truth.log_density(x, 0).mean())
    entropy = -log_p(jnp.float32(truth.draw(rng, EXACT)))
    p = distances.energy_test(np.asarray(x_0)[:TESTED], truth.draw(rng, TESTED))
    return Judged(float(-log_p(x_0) - entropy), p)


def main() -> None:
    """Prints the table, and draws the picture if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=4000, help="samples of each method and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", default="", help="where to write a figure (matplotlib)")
    options = parser.parse_args()
    shown: dict[str, dict[str, np.ndarray]] = {}
    for title, parts in PAIRS.items():
        truth = product(*parts)
        shown[title] = {"exact": truth.draw(np.random.default_rng(0), TESTED)}
        print(f"{title}\n{'':18}  nats above the entropy     p-value                 kept")
        for name, method in METHODS.items():
            run = jax.jit(lambda key, method=method, parts=parts: method(key, parts, options.n))
            rows, kept = [], []
            for seed in range(options.seeds):
                drawn = run(jax.random.key(seed))
                rows.append(judge(drawn.x_0, truth, seed))
                kept.append(float(drawn.kept))
                shown[title].setdefault(name, np.asarray(drawn.x_0)[:TESTED])
            excess = "  ".join(f"{row.excess:+.4f}" for row in rows)
            p = "  ".join(f"{row.p_value:.3f}" for row in rows)
            print(f"{name:18}  {excess:25}  {p:22}  {np.mean(kept):.2f}", flush=True)
    if options.picture:
        picture(shown, options.picture)


def picture(shown: dict[str, dict[str, np.ndarray]], path: str) -> None:
    """Writes the samples of each product (rows) and method (columns)."""
    import matplotlib.pyplot as plt

    columns = len(METHODS) + 1
    figure, axes = plt.subplots(len(shown), columns, figsize=(2.2 * columns, 2.3 * len(shown)))
    for row, (title, sets) in zip(axes, shown.items(), strict=True):
        limits = [(x.min() - 0.3, x.max() + 0.3) for x in sets["exact"].T]
        for axis, (name, x) in zip(row, sets.items(), strict=True):
            axis.scatter(*x.T, s=1, linewidths=0, color="black")
            axis.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[], title=name)
        row[0].set_ylabel(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
