"""Digits of a class AND bold: two conditions that one energy model learned apart, composed.

python examples/compose_digits.py [--picture=compose_digits.png]

A small energy network learns the 8x8 digits given their class, or given how much ink they have
(thin, medium, bold), or given neither, and never both at once. The product

    p(x | class) p(x | bold) / p(x)

is what both say together, if class and ink are independent given the image (Liu et al. 2022; Du et
al. 2023). It is drawn by reverse diffusion with the sum of scores alone, and with MALA at each
noise level. The classifier included judges the class, and the ink is counted. Real bold digits of
the same classes are known, and are what the samples should look like.
"""

import argparse
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddpm
from ddpm.data import sources
from ddpm.diffusion.pixels import to_float, to_uint8
from ddpm.energy import composition
from ddpm.evaluation import distances
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.shipped import load_classifier
from ddpm.files import pictures

schedule = ddpm.schedules.cosine(250)
LEVELS = ddpm.grids.log_snr(schedule, 30)
CLASSES, BOLD, ANY = 10, 12, 13  # conditions: classes, then thin, medium and bold, then none
MALA_STEPS = 10
EXPONENTS = (1.0, 1.0, -1.0)


class Energy(nn.Module):
    """A network (x_t [B, D], t [B], condition int[B]) -> |x_t - f|^2 / 2, [B]."""

    width: int = 256

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
        """Computes the energy, of which log q(x_t) is -1 / sigma_t times."""
        log_snr = jnp.clip(schedule.at(t).high, -10, 10)[:, None]
        waves = log_snr * 2.0 ** jnp.arange(-4, 2)
        noise = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], axis=-1)
        said = nn.Dense(self.width)(noise) + nn.Embed(ANY + 1, self.width)(condition)
        h = nn.Dense(self.width)(x)
        for _ in range(3):
            h += nn.Dense(self.width)(nn.swish(nn.LayerNorm()(h) + nn.Dense(self.width)(said)))
        f = nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros)(nn.swish(nn.LayerNorm()(h)))
        return 0.5 * ((x - f) ** 2).sum(-1)


class Data(NamedTuple):
    """Digits in [-1, 1], [n, 64]; their classes, and their ink, 0 to 2, int[n]."""

    x_0: np.ndarray
    label: np.ndarray
    ink: np.ndarray


def ink_of(images: np.ndarray) -> np.ndarray:
    """Returns the bin of each image, uint8[n, ...]: 0 thin, 1 medium, 2 bold, by the quartiles of
    the training images' mean."""
    bounds = np.quantile(training_images().image.mean(axis=(1, 2, 3)), [0.25, 0.75])
    return np.digitize(images.reshape(len(images), -1).mean(axis=1), bounds)


def training_images() -> sources.Examples:
    """Returns the 1438 images of the training split, and their labels."""
    source = sources.digits("train")
    return source.read(np.arange(len(source)))


def data() -> Data:
    """Returns the training digits and their conditions."""
    images = training_images()
    assert images.label is not None
    return Data(
        to_float(images.image).reshape(len(images.image), -1), images.label, ink_of(images.image)
    )


def log_density(params: Any, condition: Any) -> Any:
    """Returns log q(x_t | condition) up to a function of t, the condition int[B] or one number."""

    def log_q(x_t: jax.Array, t: jax.Array) -> jax.Array:
        of = jnp.broadcast_to(condition, t.shape)
        energy: Any = Energy().apply({"params": params}, x_t, t, of)
        return -energy / schedule.at(t).sigma

    return log_q


def train(key: jax.Array, steps: int, batch_size: int = 64) -> Any:
    """Returns averaged parameters after so many steps of L_simple, eps being the energy's
    gradient; each image has its class, its ink or nothing as its condition."""
    x_0, label, ink = (jnp.asarray(z) for z in data())
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, steps))
    empty = jnp.zeros(1, jnp.int32)
    params = Energy().init(jax.random.fold_in(key, 0), x_0[:1], empty + 1, empty)["params"]

    def loss(params: Any, key: jax.Array) -> jax.Array:
        of_which, of_t, of_eps, of_condition = jax.random.split(key, 4)
        which = jax.random.randint(of_which, (batch_size,), 0, len(x_0))
        t = ddpm.timesteps.uniform(schedule, of_t, batch_size)
        eps = jax.random.normal(of_eps, (batch_size, x_0.shape[1]))
        kind = jax.random.choice(of_condition, 3, (batch_size,), p=jnp.asarray([0.45, 0.35, 0.2]))
        conditions = jnp.stack([label[which], CLASSES + ink[which], jnp.full(batch_size, ANY)])
        condition = jnp.take_along_axis(conditions, kind[None], axis=0)[0]
        denoiser = composition.of_log_density(schedule, log_density(params, condition))
        return ddpm.losses.simple(schedule, denoiser, x_0[which], t, eps).mean()

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state, average = carry
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        return (params, state, optax.incremental_update(params, average, 0.005)), value

    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params), params), keys))
    (_, _, average), losses = run(params)
    print(f"{steps} steps: loss {float(losses[-200:].mean()):.4f}", flush=True)
    return average


class Drawn(NamedTuple):
    """Samples [n, 64], and the mean acceptance at each noise level, or nothing."""

    x_0: jax.Array
    acceptance: Any = ()


def wanted(params: Any, label: jax.Array, both: bool) -> Any:
    """Returns the log-density to draw from: of the class alone, or of class and bold."""
    if not both:
        return log_density(params, label)
    parts = [log_density(params, condition) for condition in (label, BOLD, ANY)]
    return composition.log_product(parts, EXPONENTS)


def reverse(params: Any, key: jax.Array, label: jax.Array, both: bool) -> Drawn:
    """Draws by reverse diffusion: with the sum of scores, or those of the class alone."""
    denoiser = composition.of_log_density(schedule, wanted(params, label, both))
    sampler = ddpm.ancestral(ddpm.fixed_small, steps=100)
    return Drawn(ddpm.sample(key, schedule, denoiser, (len(label), 64), sampler=sampler))


def corrected(params: Any, key: jax.Array, label: jax.Array, both: bool) -> Drawn:
    """Draws with MALA at each of 30 levels, and DDIM between them."""
    few, whole = (wanted(params, of, both) for of in (label[:32], label))
    tuned = ddpm.langevin.tune(
        jax.random.fold_in(key, len(label)),  # no sample's
        schedule,
        composition.of_log_density(schedule, few),
        (32, 64),
        ddpm.mcmc.mala,
        few,
        predictor=ddpm.ddim(),
        times=LEVELS,
        burn_in=40,
    )
    sampler = ddpm.predictor_corrector(
        ddpm.ddim(),
        corrector_steps=MALA_STEPS,
        kernel=ddpm.mcmc.mala,
        log_density=whole,
        snr=tuned.snr,
    )
    chain = ddpm.sample_chain(
        key,
        schedule,
        composition.of_log_density(schedule, whole),
        (len(label), 64),
        sampler=sampler,
        times=LEVELS,
        snapshots=0,
    )
    return Drawn(chain.x_0, chain.reports.mean(axis=1))


METHODS = {
    "class alone": (reverse, False),
    "class, MALA": (corrected, False),
    "sum of scores": (reverse, True),
    "both, MALA": (corrected, True),
}


class Judged(NamedTuple):
    """Shares of images named as their class, bold, and both; and the Fréchet distance of the
    classifier's features to those of real bold digits."""

    named: float
    bold: float
    both: float
    distance: float


def judge(images: np.ndarray, label: np.ndarray, real: np.ndarray) -> Judged:
    """Judges images uint8[n, 8, 8, 1] by the classifier, their ink, and real ones, [m, 8, 8, 1]."""
    params = load_classifier("digits")
    classify: Any = jax.jit(lambda x: Classifier(CLASSES).apply({"params": params}, x))
    found, theirs = classify(to_float(images)), classify(to_float(real))
    named, bold = np.asarray(found.logits).argmax(-1) == label, ink_of(images) == 2
    moments = [distances.moments([np.asarray(z.features)]) for z in (found, theirs)]
    distance = distances.frechet_distance(*moments)
    return Judged(named.mean(), bold.mean(), (named & bold).mean(), distance)


def main() -> None:
    """Trains, draws, prints the table, and draws the picture if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--seeds", type=int, default=2, help="of sampling")
    parser.add_argument("--picture", default="", help="where to write a grid of samples")
    options = parser.parse_args()
    params = train(jax.random.key(0), options.steps)
    images, held_out = training_images(), sources.digits("test")
    bold = ink_of(images.image) == 2
    assert images.label is not None
    real, label = images.image[bold], images.label[bold]
    print(f"{len(label)} images with the classes of the real bold digits\n")
    print(f"{'':14} {'class':>7} {'bold':>7} {'both':>7} {'distance':>9}")
    unseen = held_out.read(np.arange(len(held_out)))
    assert unseen.label is not None
    theirs = ink_of(unseen.image) == 2
    show("held out", judge(unseen.image[theirs], unseen.label[theirs], real))
    rows = []
    for name, (method, both) in METHODS.items():
        draw = jax.jit(
            lambda key, method=method, both=both: method(params, key, jnp.asarray(label), both)
        )
        for seed in range(options.seeds):
            drawn = draw(jax.random.key(seed))
            samples = to_uint8(drawn.x_0.reshape(-1, 8, 8, 1))
            show(name, judge(np.asarray(samples), label, real))
            if seed == 0:
                first = [np.flatnonzero(label == y)[:2] for y in range(CLASSES)]
                rows.append(np.asarray(samples)[np.concatenate(first)])
    accepted = [f"{share:.2f}" for share in np.asarray(drawn.acceptance)[::8]]
    print("acceptance at every eighth level:", *accepted)
    if options.picture:
        whole = pictures.grid(np.concatenate(rows), columns=2 * CLASSES)
        pictures.to_picture(whole, least_side=1000).save(options.picture)


def show(name: str, judged: Judged) -> None:
    """Prints a row of the table."""
    shares = " ".join(f"{share:7.3f}" for share in judged[:3])
    print(f"{name:14} {shares} {judged.distance:9.3f}", flush=True)


if __name__ == "__main__":
    main()
