"""Training in less memory, by parts of a batch and by computing again, is the same training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits, digits_conditional
from ddpm.build import experiment
from ddpm.models.dit import DiT
from ddpm.models.unet import UNet
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step

STEPS, BATCH = 20, 8
LEARNED = {
    "diffusion.schedule": "learned",
    "training.loss": "continuous_bound",
    "training.times": "low_discrepancy",
    "training.grad_clip": 0.0,
    "model.noise_input": "log_snr",
}
NETWORKS = {
    "unet": UNet(
        channels=8,
        num_groups=4,
        dropout=0.1,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        resample_in_blocks=True,
    ),
    "dit": DiT(channels=8, depth=3, head_channels=4, dropout=0.1),
}


@functools.cache
def gradient(name, remat, dropout=0.1, **more):
    """The loss and gradient of a network at weights that are not small, as compiled, the memory
    that XLA takes for them, and how many convolutions and products its program has."""
    model = NETWORKS[name].clone(remat=remat, dropout=dropout, **more)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)
    t = jnp.asarray([1, 5, 50, 500])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, t))
    params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype), shapes)

    def loss(params):
        out = model.apply(params, x, t, train=True, rngs={"dropout": jax.random.key(1)})
        return (out**2).mean()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
    compiled, text = lowered.compile(), lowered.as_text()
    operations = text.count("stablehlo.convolution") + text.count("stablehlo.dot_general")
    return compiled(params), compiled.memory_analysis().temp_size_in_bytes, operations


@pytest.mark.parametrize("remat", ["blocks", "full"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_computed_again_is_the_same(name, remat):
    """Dropout too; and the parameters have the same names, or the trees would differ."""
    plain, memory, _ = gradient(name, "none")
    again, less, _ = gradient(name, remat)
    same(again, plain)
    assert less < memory


def same(found, expected):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    greatest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected_grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * greatest)


@pytest.mark.parametrize(("name", "remat"), [("unet", "none"), ("dit", "none"), ("dit", "full")])
def test_blocks_in_a_scan_are_the_same(name, remat):
    """Without dropout, whose draws differ; and the program has fewer blocks."""
    one_level = {"channel_multipliers": (1,), "num_res_blocks": 3, "attention_resolutions": ()}
    deeper = one_level if name == "unet" else {}
    plain, _, blocks = gradient(name, remat, 0.0, **deeper)
    scanned, _, fewer = gradient(name, remat, 0.0, scan_blocks=True, **deeper)
    same(scanned, plain)
    assert fewer < 0.8 * blocks


def trained(config, accumulation):
    """The parameters after STEPS steps of plain descent, which unlike Adam's grow no rounding where
    a gradient is zero, and the metrics' sums."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05))
    config.model.update(name="dit", channels=8, depth=1, head_channels=4, dropout=0.0)
    built = experiment.build(config, (8, 8, 1))
    step = make_train_step(
        built.model,
        built.objective,
        optimizer,
        ema_decay=0.9,
        seed=0,
        num_classes=config.model.num_classes,
        label_dropout=config.training.label_dropout,
        prepare=built.prepare,
        accumulation=accumulation,
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS, BATCH, 8, 8, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, (STEPS, BATCH)) if config.model.num_classes else None

    @jax.jit
    def train():
        state = init(built.model, optimizer, (8, 8, 1), 0, built.objective)
        carried = lambda carry, batch: (step(*carry, *batch), None)  # noqa: E731
        (state, metrics), _ = jax.lax.scan(carried, (state, Metrics.zero()), (images, labels))
        return state.params, metrics

    return train()


@pytest.mark.parametrize(
    ("of", "changes"),
    [
        (digits_conditional, {"training.self_conditioning": True}),
        (digits, LEARNED),
    ],
    ids=["labels and self-conditioning", "learned schedule"],
)
def test_parts_of_a_batch_train_as_the_whole(of, changes):
    config = of.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    (params, metrics), (in_parts, sums) = (trained(config, n) for n in (1, 4))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(in_parts), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for a, b in zip(metrics, sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert metrics.bucket_count.sum() == STEPS * BATCH
