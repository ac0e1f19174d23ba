"""Config -> what the network is given besides x_t, t and a label; what does not go together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm.build import conditioning, experiment
from ddpm.build.checks import validate
from ddpm.build.network import check_model
from ddpm.config import default, to_json
from ddpm.config.same_run import check_same_run
from ddpm.diffusion.network_inputs import SelfConditioned, averaged, enlarged
from ddpm.errors import InputError
from ddpm.interop.settings import check_written
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step
from tests.exact import close
from tests.runs import command, run

SHAPE = (8, 8, 1)


def of(**values):
    config = default()
    config.data.name = "digits"
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), num_res_blocks=1)
    config.model.update(attention_resolutions=(), dropout=0.0)
    config.diffusion.num_steps = 20
    with config.ignore_type():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


ALL = {"training__self_conditioning": True, "training__augmentation": 0.5,
       "model__low_resolution": 4, "training__low_resolution_noise": 0.4}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "channels", "features"),
    [
        ({}, 0, 0),
        ({"training__self_conditioning": True}, 1, 0),
        ({"training__augmentation": 0.1}, 0, 9),
        ({"model__low_resolution": 4}, 1, 1),
        (ALL, 2, 10),
    ],
)
def test_network_takes_what_it_is_given(changes, channels, features):
    built = experiment.build(of(**changes), SHAPE)
    assert (built.model.condition_channels, built.model.num_features) == (channels, features)
    assert (built.prepare is None) == (features == 0)


def test_what_a_step_prepares():
    """The small image is that of the augmented one; the features tell both; levels are uniform."""
    built = experiment.build(of(**ALL), SHAPE)
    x_0 = np.random.default_rng(0).uniform(-1, 1, (4000, *SHAPE)).astype(np.float32)
    augmented, conditions = jax.jit(built.prepare)(jax.random.key(0), x_0)
    assert conditions.features.shape == (4000, 10)
    untouched = (np.asarray(conditions.features[:, :9]) == 0).all(axis=1)
    assert 0 < untouched.sum() < 4000
    assert (augmented[untouched] == x_0[untouched]).all()
    level = np.asarray(conditions.features[:, 9], np.float64)
    assert 0 <= level.min() < level.max() <= 0.4
    assert abs(level.mean() - 0.2) < 4 * 0.4 / np.sqrt(12 * 4000)
    small = averaged(augmented, (4, 4))
    # Of the noise that was added, enlarged again, the corner is the small image's.
    corner = np.float64(conditions.image[:, 0, 0, 0] - np.sqrt(1 - level**2) * small[:, 0, 0, 0])
    assert abs((corner / level).std() - 1) < 0.05
    config = of(**ALL | {"training__low_resolution_noise": 0.0})
    augmented, conditions = jax.jit(conditioning.prepare(config, SHAPE))(jax.random.key(0), x_0)
    close(conditions.image, enlarged(averaged(augmented, (4, 4)), (8, 8)), atol=1e-5)


def test_samples_and_bounds_are_given_alike():
    """The denoiser of the bound, of x_0's own small image, is that of a sample made from it."""
    built = experiment.build(of(**ALL, sampling__low_resolution_noise=0.2), SHAPE)
    rng = np.random.default_rng(1)
    shapes = check_model(built.model, SHAPE)
    params = jax.tree.map(lambda p: np.float32(0.2 * rng.normal(size=p.shape)), shapes)
    x_0, x_t = (np.float32(rng.uniform(-1, 1, (3, *SHAPE))) for _ in range(2))
    t, small = np.array([3, 10, 20]), averaged(x_0, (4, 4))
    steered = built.steered_denoiser(params, None, small)
    assert isinstance(steered, SelfConditioned)
    bound = jax.jit(built.denoiser(params, x_0))(x_t, t).x_0
    close(jax.jit(steered)(x_t, t).x_0, bound, atol=1e-5)
    first = jax.jit(steered.from_estimate(jnp.zeros_like(x_t)))(x_t, t).x_0
    assert np.abs(first - bound).max() > 1e-3  # the guess is seen
    features = conditioning.given(built.config, SHAPE[:2], small, np.arange(3)).features
    close(features, np.tile([0.0] * 9 + [0.2], (3, 1)))  # nothing augmented, and the noise's level
    # With numbers there is noise in the small image, each sample's own, in whatever batch.
    noised = lambda i: jax.jit(built.steered_denoiser(params, i, small[i]))(x_t[i], t[i]).x_0  # noqa: E731
    whole = noised(np.arange(3))
    assert np.abs(whole - bound).max() > 1e-3
    close(noised(np.array([2])), whole[2:], atol=1e-5)


def test_a_step_trains_all_that_is_given():
    built = experiment.build(of(**ALL, training__warmup_steps=0), SHAPE)
    step = jax.jit(make_train_step(
        built.model, built.objective, built.optimizer, ema_decay=0.9, seed=0,
        prepare=built.prepare,
    ))  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, *SHAPE), dtype=np.uint8)
    shapes = jax.eval_shape(lambda: init(built.model, built.optimizer, SHAPE, 0))
    start = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    start = start._replace(
        params=jax.tree.map(lambda x: np.float32(0.1 * rng.normal(size=x.shape)), start.params)
    )
    state, metrics = step(start, Metrics.zero(), images)
    assert np.isfinite(metrics.loss)
    for layer, axis in (("conv_in", 2), ("features", 0)):
        moved = state.params[layer]["kernel"] != start.params[layer]["kernel"]
        others = tuple(i for i in range(moved.ndim) if i != axis)
        assert np.asarray(moved).any(axis=others).all(), layer  # each channel, each feature


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training__augmentation": 1.5}, "must be a probability"),
        ({"training__low_resolution_noise": 0.2}, "goes with config.model.low_resolution"),
        ({"sampling__low_resolution_images": "x.npz"}, "goes with config.model.low_resolution"),
        ({"model__low_resolution": 4, "sampling__low_resolution_noise": 0.2}, "not learned"),
        ({"training__augmentation": 0.1, "training__loss": "bound"}, "not the 8-bit data"),
        ({"training__augmentation": 0.1, "training__loss": "hybrid"}, "not the 8-bit data"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        validate(of(**changes))


@pytest.mark.parametrize("size", [3, 8, 16])
def test_a_small_size_must_divide_the_images(size):
    with pytest.raises(InputError, match=f"low_resolution = {size}: must be a smaller part"):
        experiment.build(of(model__low_resolution=size), SHAPE)
    assert conditioning.small_size(of(model__low_resolution=4), (8, 16, 1)) == (4, 8)
    with pytest.raises(InputError, match="images of 8x9"):
        conditioning.small_size(of(model__low_resolution=4), (8, 9, 1))


@pytest.mark.parametrize("key", list(ALL))
def test_a_run_keeps_its_conditioning(key):
    saved = to_json(of(**ALL))
    before = check_same_run(of(**ALL, sampling__low_resolution_noise=0.1), saved, "run")
    assert before == []
    with pytest.raises(InputError, match="holds a run with config." + key.replace("__", ".")):
        check_same_run(of(**ALL | {key: type(ALL[key])(0)}), saved, "run")


@pytest.mark.parametrize("key", list(ALL)[:3])
def test_such_networks_are_not_exported(key):
    with pytest.raises(InputError, match="cannot be exported"):
        check_written(of(**{key: ALL[key]}))


def test_self_conditioned_and_augmented_by_the_real_commands(tmp_path):
    how = {"training__self_conditioning": True, "training__augmentation": 0.2}
    small = {"evaluation__parts": "('bound',)", "evaluation__bound_images": 8,
             "evaluation__bound_times": 2}  # fmt: skip
    for mode, said in (
        ("train", "done: step 8"),
        ("sample", "step_00000008_ancestral20_fixed_large_seed0_n5.npz"),
        ("evaluate", "its own estimate by a second call"),
    ):
        done = run(command(tmp_path, f"--mode={mode}", **how, **small))
        assert done.returncode == 0, done.stderr
        assert said in done.stdout + done.stderr
