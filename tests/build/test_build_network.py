"""Config -> network: each option arrives, is trained, and is refused where there is no place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits
from configs.ablations import networks as ablation
from ddpm import DiT, UNet
from ddpm.build import experiment
from ddpm.build.checks import validate
from ddpm.build.network import check_model
from ddpm.build.network import network as build_network
from ddpm.config import default, to_json, with_settings
from ddpm.data.sources import npz
from ddpm.errors import InputError
from ddpm.interop import settings, weights
from ddpm.training.checkpoints import parameter_count
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step
from tests.runs import command, final_state, run

SHAPE = (8, 8, 1)


def of(**values):
    """The digits' config with these changes, model__name='dit' for one."""
    config = digits.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def model_of(shape=SHAPE, **values):
    return build_network(of(**values), shape)


# --- What arrives


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"scale_shift": False, "skip_scale": 1.0, "resample_in_blocks": False}),
        ({}, {"fourier_range": 0.0, "input_exponents": (), "head_channels": 0}),
        ({"model__scale_shift": True}, {"scale_shift": True}),
        ({"model__skip_scale": 0.5}, {"skip_scale": 0.5}),
        ({"model__up_down": "resblock"}, {"resample_in_blocks": True}),
        ({"model__time_features": "fourier"}, {"fourier_range": 1000.0}),
        (
            {"model__time_features": "fourier", "diffusion__prediction": "edm"},
            {"fourier_range": 1.0},
        ),
        ({"diffusion__prediction": "edm"}, {"fourier_range": 0.0}),
        ({"model__input_features": (7, 8)}, {"input_exponents": (7, 8)}),
        ({"model__add_input": True}, {"add_input": True}),
        ({"model__head_channels": 8}, {"head_channels": 8}),
        ({"model__cosines_first": True}, {"cosines_first": True}),
        ({"model__frequency_shift": 0}, {"frequency_shift": 0}),
        ({"model__norm_epsilon": 1e-5}, {"norm_epsilon": 1e-5}),
        ({"model__dropout": 0.3}, {"dropout": 0.3}),
        ({"model__dtype": "bfloat16"}, {"dtype": jnp.bfloat16}),
        ({"model__num_classes": 10}, {"num_classes": 10}),
        ({"training__self_conditioning": True}, {"condition_channels": 1}),
        ({"training__augmentation": 0.1}, {"num_features": 9}),
        ({}, {"out_channels": 1}),
        ({"diffusion__variance": "learned_range"}, {"out_channels": 2}),
    ],
)
def test_each_setting_arrives_in_both_networks(changes, expected):
    found = model_of(**changes)
    assert isinstance(found, UNet)
    assert {key: getattr(found, key) for key in expected} == expected
    only_unet = ("scale_shift", "skip_scale", "resample_in_blocks")
    expected = {key: value for key, value in expected.items() if key not in only_unet}
    if not changes.keys() & {"model__scale_shift", "model__skip_scale", "model__up_down"}:
        found = model_of(**changes, model__name="dit", model__depth=1)
        assert isinstance(found, DiT)
        assert {key: getattr(found, key) for key in expected} == expected


def test_dit_of_the_paper():
    """DiT-XL/2 by the config, of latents: all that is the paper's is said."""
    config = default()
    config.model.update(name="dit", channels=1152, depth=28, head_channels=72, dropout=0.0)
    config.model.update(cosines_first=True, frequency_shift=0, num_classes=1000)
    config.diffusion.variance = "learned_range"
    found = build_network(config, (32, 32, 4))
    assert found == DiT(num_classes=1000, out_channels=8, dtype=jnp.dtype("float32"))


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_an_ablation_differs_in_the_network_alone(name):
    """It is built, and a step keeps all shapes; the variant is not what it is compared with."""
    config = ablation.get_config(name)
    built = experiment.build(config, SHAPE)
    base = experiment.build(ablation.get_config("unet"), SHAPE)
    assert (built.model == base.model) == (name == "unet")
    state = jax.eval_shape(lambda: init(built.model, built.optimizer, SHAPE, 0))
    images = jax.ShapeDtypeStruct((2, *SHAPE), np.uint8)
    new, metrics = jax.eval_shape(step_of(built), state, Metrics.zero(), images)
    assert jax.tree.map(lambda p: p.dtype, new) == jax.tree.map(lambda p: p.dtype, state)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert metrics.loss.shape == ()
    if name == "dit":  # "of about as many parameters as the UNet"
        unet = check_model(base.model, SHAPE)
        assert abs(parameter_count(state.params) / parameter_count(unet) - 1) < 0.15


def step_of(built):
    return make_train_step(
        built.model, built.objective, built.optimizer, ema_decay=0.9, seed=0,
        prepare=built.prepare,
    )  # fmt: skip


# --- What is trained

ALL_OF_UNET = {
    "model__scale_shift": True,
    "model__up_down": "resblock",
    "model__skip_scale": 0.5**0.5,
    "model__time_features": "fourier",
    "model__input_features": (3, 4),
    "model__attention_resolutions": (4,),
    "model__head_channels": 8,
}
DIT = {"model__name": "dit", "model__head_channels": 4, "model__depth": 2}


@pytest.mark.parametrize("changes", [ALL_OF_UNET, DIT], ids=["unet", "dit"])
def test_a_step_is_finite_and_trains_every_parameter(changes):
    small = {"model__channels": 8, "model__num_groups": 4, "training__warmup_steps": 0}
    built = experiment.build(of(**small | changes), SHAPE)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    shapes = jax.eval_shape(lambda: init(built.model, built.optimizer, SHAPE, 0))
    start = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    # Random, the layers too that begin at zero, which keep the gradient from those before.
    params = jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), start.params)
    state, metrics = jax.jit(step_of(built))(start._replace(params=params), Metrics.zero(), images)
    assert 0 < float(metrics.loss) < np.inf
    assert 0 < float(metrics.grad_norm) < np.inf
    assert int(metrics.first_bad_step) == -1
    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.asarray(a != b).mean(), params, state.params)
    ):
        # Those of a key's bias, which the softmax does not see, are rounding errors, or zeros.
        assert moved > 0.9 or path[-2].key == "key", path


# --- What there is no place for


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_shift", True),
        ("up_down", "resblock"),
        ("skip_scale", 0.5),
        ("symmetric_downsampling", True),
    ],
)
def test_dit_is_not_given_what_is_of_the_unet(key, value):
    config = of(model__name="dit", **{f"model__{key}": value})
    with pytest.raises(InputError, match=rf"config.model.{key} = {value!r}: is of the UNet alone"):
        experiment.build(config, SHAPE)
    experiment.build(of(**{f"model__{key}": value}), SHAPE)


@pytest.mark.parametrize(
    ("changes", "shape", "said"),
    [
        ({"model__patch_size": 3}, SHAPE, "8x8 do not divide into patches of patch_size = 3"),
        ({}, (8, 7, 1), "8x7 do not divide into patches of patch_size = 2"),
        ({"model__channels": 30}, SHAPE, "30 channels: a transformer's must be divisible by 4"),
        ({"model__head_channels": 5}, SHAPE, "do not divide into heads of head_channels = 5"),
    ],
)
def test_a_transformer_that_cannot_be_built_is_refused(changes, shape, said):
    with pytest.raises(InputError, match=f"config.model: .*{said}") as error:
        model_of(shape, **DIT | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__name": "DiT"}, r"config.model.name = 'DiT': must be one of unet, dit"),
        ({"model__up_down": "resblocks"}, r"one of conv, resblock; did you mean 'resblock'"),
        ({"model__time_features": "gauss"}, r"time_features = 'gauss': must be one of sinusoids"),
        ({"model__skip_scale": 0.0}, r"skip_scale = 0.0: must be in \(0, 1\]"),
        ({"model__skip_scale": 1.5}, r"skip_scale = 1.5: must be in \(0, 1\]"),
        ({"model__input_features": (7, 7)}, r"must be a tuple of different whole numbers in 0..15"),
        ({"model__input_features": (16,)}, r"\(16,\): must be a tuple of different whole numbers"),
        ({"model__patch_size": 0}, r"patch_size = 0: must be a whole number >= 1"),
        ({"model__depth": 0}, r"depth = 0: must be a whole number >= 1"),
        (
            {"model__up_down": "resblock", "model__symmetric_downsampling": True},
            r"symmetric_downsampling = True: has no effect with config.model.up_down = 'resblock': "
            "leave it at False",
        ),
        (
            {"model__time_features": "fourier", "model__cosines_first": True},
            r"cosines_first = True: has no effect with config.model.time_features = 'fourier'",
        ),
        (
            {"model__time_features": "fourier", "model__frequency_shift": 0},
            r"frequency_shift = 0: has no effect .*'fourier': leave it at 1",
        ),
    ],
)
def test_a_wrong_value_is_named(changes, said):
    with pytest.raises(InputError, match=said):
        validate(of(**changes))


# --- Import and export


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "dit"),
        ("up_down", "resblock"),
        ("skip_scale", 0.5),
        ("time_features", "fourier"),
        ("input_features", (7, 8)),
        ("add_input", True),
        ("noise_input", "log_snr"),
    ],
)
def test_what_diffusers_has_no_word_for_is_neither_exported_nor_imported(tmp_path, key, value):
    config = of(**{f"model__{key}": value}, diffusion__schedule="cosine")
    built = experiment.build(config, SHAPE)
    said = rf"config.model.{key} = .*: such a network can be neither exported nor imported"
    for out in (tmp_path / "folder", tmp_path / "one.safetensors"):
        with pytest.raises(InputError, match=said):
            weights.export(out, built, {})
        assert not out.exists()
    # A file in the authors' layout comes without settings: those of the config would be taken.
    np.savez(tmp_path / "theirs.npz", **{"temb.dense.0.weight": np.zeros((1, 1), np.float32)})
    with pytest.raises(InputError, match=said):
        weights.load(tmp_path / "theirs.npz", config)


def test_what_comes_without_these_options_is_read_without_them():
    """Settings that come with weights take the place of the config's own."""
    theirs = {"sample_size": 8, "block_out_channels": [16, 32], "attention_head_dim": None}
    theirs |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    found = settings.model_settings(theirs | {"norm_num_groups": 4}, "here").model
    changes = {"name": "dit", "up_down": "resblock", "skip_scale": 0.5, "scale_shift": True}
    changes |= {"time_features": "fourier", "input_features": (1,), "noise_input": "log_snr"}
    config, _ = with_settings(default(), model=changes)
    config, messages = with_settings(config, model=found)
    settings.check_network(config)
    assert build_network(config, (8, 8, 3)) == UNet(
        channels=16, channel_multipliers=(1, 2), attention_resolutions=(), num_groups=4,
        norm_epsilon=1e-5, symmetric_downsampling=True, cosines_first=True, frequency_shift=0,
        out_channels=3, dtype=jnp.dtype("float32"),
    )  # fmt: skip
    assert all(any(f"config.model.{key} = " in line for line in messages) for key in changes)


def test_a_run_read_from_its_json_is_exported_as_before():
    """There, tuples have become lists."""
    config = ConfigDict(to_json(default()))
    assert config.model.input_features == []
    settings.check_network(config)
    config.model.input_features = [7]
    with pytest.raises(InputError, match=r"input_features = \[7\]"):
        settings.check_network(config)


# --- The real commands

TINY_DIT = {  # over the transformer of `runs.TINY`
    "model__head_channels": 4,
    "model__time_features": "fourier",
    "model__input_features": "(3,)",
    "diffusion__num_steps": 5,
}


def test_a_transformer_by_the_real_commands(tmp_path):
    done = run(command(tmp_path / "run", **TINY_DIT))
    assert done.returncode == 0, done.stderr
    assert "done: step 8" in done.stdout + done.stderr
    step, arrays = final_state(tmp_path / "run")
    assert step == 8
    assert all(np.isfinite(x).all() for x in arrays)
    done = run(command(tmp_path / "run", "--mode=sample", **TINY_DIT))
    assert done.returncode == 0, done.stderr
    samples = npz(done.stdout.split()[0]).image
    assert samples.shape == (5, *SHAPE)
    assert samples.std() > 0


def test_images_that_do_not_divide_into_patches_stop_at_start(tmp_path):
    done = run(command(tmp_path / "run", **TINY_DIT | {"model__patch_size": 3}))
    assert done.returncode == 2
    assert "error: config.model: images of 8x8 do not divide into patches" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
