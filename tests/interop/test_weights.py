"""Weights of others: each network against diffusers' own at the same random weights."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ddpm import fixed_large, fixed_small
from ddpm.build import experiment
from ddpm.build.schedule import noise_schedule
from ddpm.config import default, with_settings
from ddpm.diffusion.streams import sample_keys
from ddpm.errors import InputError
from ddpm.files.pictures import save_grid
from ddpm.interop import settings, weights
from ddpm.modes.edit import edit
from ddpm.sampling.sample import sample
from ddpm.sampling.samplers import ancestral, ddim, times
from tests.interop.theirs import (
    SCALE_SHIFT,
    UNETS,
    change_json,
    forward,
    give_noise,
    make,
    refused,
    save,
)

FULL_SIZE = os.environ.get("DDPM_FULL_SIZE")


def built_of(found):
    return experiment.build(found.config, found.image_shape)


def ours(found):
    apply = jax.jit(built_of(found).model.apply)
    return lambda x, t: np.asarray(apply({"params": found.params}, x, np.asarray(t)))


@pytest.mark.parametrize("name", UNETS)
def test_forward_equals_that_of_diffusers(name, tmp_path):
    # The networks of six levels a quarter as wide, on the smallest images that they take.
    smaller = {}
    if name in ("256", "train_unconditional") and not FULL_SIZE:
        smaller = {"sample_size": 32, "block_out_channels": (32, 32, 64, 64, 128, 128)}
    net = make(UNETS[name] | smaller)
    found = weights.load(save(net, tmp_path / "pipeline"))
    network, rng = ours(found), np.random.default_rng(1)
    for t in ([1], [520], [1000]):
        x = rng.normal(size=(1, *found.image_shape)).astype(np.float32)
        expected = forward(net, x, t)
        assert expected.std() > 0.05
        np.testing.assert_allclose(network(x, t), expected, rtol=0, atol=2e-5)
    if name == "cifar10":
        model = built_of(found).model.clone(norm_epsilon=1e-5)
        wrong = jax.jit(model.apply)({"params": found.params}, x, np.asarray(t))
        assert np.abs(wrong - expected).max() > 2e-5


def test_labels_are_those_of_diffusers(tmp_path):
    """Its last one is 'no label', and comes back from an export as it was."""
    net = make(UNETS["small_theirs"] | {"num_class_embeds": 4})
    found = weights.load(save(net, tmp_path / "pipeline"))
    assert found.config.model.num_classes == 3
    built = built_of(found)
    x = np.random.default_rng(1).normal(size=(2, *found.image_shape)).astype(np.float32)
    apply = jax.jit(built.model.apply)
    for label in ([0, 2], [3, 1]):
        expected = forward(net, x, [520, 7], label)
        assert np.abs(expected - forward(net, x, [520, 7], [1, 0])).max() > 1e-2
        got = apply({"params": found.params}, x, np.array([520, 7]), np.array(label))
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    weights.export(tmp_path / "back", built, found.params)
    back = UNet2DModel.from_pretrained(tmp_path / "back" / "unet")
    np.testing.assert_array_equal(forward(back, x, [520, 7], [0, 2]),
                                  forward(net, x, [520, 7], [0, 2]))  # fmt: skip
    assert weights.load(tmp_path / "back").sha256 == found.sha256


@pytest.mark.parametrize("rows", [10, 1])
def test_every_row_is_a_class_where_the_config_says_so(tmp_path, capsys, rows):
    """config.training.label_dropout = 0: there is no row for 'no label', and none is needed."""
    net = make(UNETS["small_theirs"] | {"num_class_embeds": rows})
    folder = save(net, tmp_path / "theirs")
    config = default()
    if rows == 1:
        refused(folder, r"num_class_embeds = 1: .*--config\.training\.label_dropout=0")
    else:
        assert weights.load(folder).config.model.num_classes == rows - 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "num_class_embeds" in x]
        assert "num_class_embeds: classes 0..8, then 'no label'; " in line
        assert line.endswith("--config.training.label_dropout=0")
        config.sampling.guidance_scale, config.training.label_dropout = 2.0, 0.0
        refused(folder, r"guidance_scale = 2.0: config.training.label_dropout = 0, so", config)
        capsys.readouterr()
    config.sampling.guidance_scale, config.training.label_dropout = 1.0, 0.0
    config.sampling.label = rows - 1
    found = weights.load(folder, config)
    assert found.config.model.num_classes == rows
    assert f"classes 0..{rows - 1}, and none for 'no label'" in capsys.readouterr().err
    built, last = built_of(found), [rows - 1]
    x = np.random.default_rng(1).normal(size=(1, *found.image_shape)).astype(np.float32)
    got = jax.jit(built.model.apply)({"params": found.params}, x, np.array([520]), np.array(last))
    np.testing.assert_allclose(got, forward(net, x, [520], last), rtol=0, atol=2e-5)
    # What is exported says it itself, whatever the config says that reads it.
    weights.export(tmp_path / "back", built, found.params)
    again = weights.load(tmp_path / "back")
    assert again.sha256 == found.sha256
    assert (again.config.model.num_classes, again.config.training.label_dropout) == (rows, 0)
    assert "num_class_embeds" not in capsys.readouterr().err
    back = UNet2DModel.from_pretrained(tmp_path / "back" / "unet").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in net.state_dict().items())
    # Without a label nothing can be drawn.
    config.sampling.label = -1
    save_grid(tmp_path / "a.png", np.zeros((1, 8, 16, 1), np.uint8))
    with pytest.raises(InputError, match="say of which class the pictures are"):
        edit(config, tmp_path / "run", str(tmp_path / "a.png"), str(folder))


def test_exported_labels_come_back_with_their_row_for_no_label(tmp_path, capsys):
    """Whatever the config says that reads them; as do files of before this was written."""
    net = make(UNETS["small_theirs"] | {"num_class_embeds": 4})
    found = weights.load(save(net, tmp_path / "theirs"))
    weights.export(tmp_path / "a.safetensors", built_of(found), found.params)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        about = json.loads(file.metadata()["ddpm"])
    assert about["unet"].pop("_label_dropout") == 0.1
    old = {"ddpm": json.dumps(about)}
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "old.safetensors", metadata=old)
    capsys.readouterr()
    config = default()
    config.training.label_dropout = 0.0
    for name in ("a.safetensors", "old.safetensors"):
        again = weights.load(tmp_path / name, config)
        assert again.config.model.num_classes == 3
        assert again.config.training.label_dropout == 0.1
        assert again.sha256 == found.sha256
    assert "num_class_embeds" not in capsys.readouterr().err


def of_full_size(*arguments):
    skip = pytest.mark.skipif(not FULL_SIZE, reason="minutes to hours on a CPU: DDPM_FULL_SIZE=1")
    return pytest.param(*arguments, marks=skip)


@pytest.mark.parametrize(
    ("name", "eta"),
    [
        ("small", 0.0),
        ("small_theirs", 0.7),
        of_full_size("cifar10", 0.0),
        of_full_size("cifar10", 0.7),
        of_full_size("train_unconditional", 0.7),
        of_full_size("256", 0.0),
    ],
)
def test_ten_steps_of_ddim_equal_those_of_diffusers(name, eta, tmp_path, monkeypatch):
    net = make(UNETS[name])
    found = weights.load(save(net, tmp_path / "pipeline"))
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    keys = sample_keys(jax.random.key(3), np.arange(2))
    give_noise(monkeypatch, keys, times(1000, 10), found.image_shape)
    expected = pipeline(
        2, num_inference_steps=10, eta=eta, use_clipped_model_output=True, output_type="np"
    ).images
    x_0 = drawn(found, keys, ddim(eta, steps=10))
    np.testing.assert_allclose(x_0, expected, rtol=0, atol=1e-3 / 2)  # of [0, 1]


@pytest.mark.parametrize(
    ("name", "variance", "num_steps"),
    [
        ("small", "fixed_large", 200),
        ("small_theirs", "fixed_small", 50),
        of_full_size("cifar10", "fixed_large", 1000),
        of_full_size("train_unconditional", "fixed_small", 1000),
        of_full_size("256", "fixed_large", 1000),
    ],
)
def test_ancestral_steps_equal_those_of_diffusers(name, variance, num_steps, tmp_path, monkeypatch):
    net = make(UNETS[name])
    folder = save(net, tmp_path / "pipeline", variance_type=variance, num_train_timesteps=num_steps)
    found = weights.load(folder)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    keys = sample_keys(jax.random.key(3), np.arange(2))
    give_noise(monkeypatch, keys, times(num_steps), found.image_shape)
    expected = pipeline(2, num_inference_steps=num_steps, output_type="np").images
    x_0 = drawn(
        found, keys, ancestral({"fixed_large": fixed_large, "fixed_small": fixed_small}[variance])
    )
    np.testing.assert_allclose(x_0, expected, rtol=0, atol=1e-3 / 2)


def drawn(found, keys, sampler):
    """Samples in [0, 1], as diffusers gives them."""
    built = built_of(found)
    shape = (len(keys), *found.image_shape)

    @jax.jit
    def draw(params):
        return sample(keys, built.schedule, built.denoiser(params), shape, sampler=sampler)

    return np.clip(np.asarray(draw(found.params)) / 2 + 0.5, 0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 50},
        {"trained_betas": [0.1, 0.2, 0.5]},
        {"num_train_timesteps": 100, "variance_type": "fixed_large"},
    ],
)
def test_schedules_equal_those_of_diffusers(options):
    scheduler = DDPMScheduler(**options)
    found = settings.noise_settings(scheduler.config, "here")
    config, _ = with_settings(default(), diffusion=found.diffusion)
    alpha_bar = noise_schedule(config).alpha_bar[1:]
    np.testing.assert_allclose(alpha_bar, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)


# --- Settings


def test_every_setting_is_read(tmp_path):
    odd = UNETS["small_theirs"] | {"attention_head_dim": 16, "freq_shift": 1, "norm_eps": 1e-4}
    odd |= SCALE_SHIFT
    folder = save(make(odd), tmp_path / "odd", num_train_timesteps=50, beta_end=0.1)
    found = weights.load(folder)
    assert found.image_shape == (8, 16, 1)
    assert dict(found.config.model) == dict(default().model) | {
        "channels": 16,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "num_groups": 4,
        "norm_epsilon": 1e-4,
        "head_channels": 16,
        "symmetric_downsampling": True,
        "cosines_first": True,
        "frequency_shift": 1,
        "scale_shift": True,
    }
    assert found.config.diffusion.num_steps == 50
    assert found.config.diffusion.beta_end == 0.1


def test_settings_are_reported(small, capsys):
    weights.load(small[1])
    text = capsys.readouterr().err
    assert "config.model.channels = 16" in text
    assert "its scheduler has variance = 'fixed_small'" in text


REFUSED = [
    ("unet/config.json", {"act_fn": "gelu"}, r"act_fn = 'gelu': must be 'silu' or 'swish'"),
    ("unet/config.json", {"center_input_sample": True}, "center_input_sample"),
    ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type"),
    ("unet/config.json", {"time_embedding_dim": 99}, "time_embedding_dim = 99"),
    ("unet/config.json", {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
    (
        "unet/config.json",
        {"resnet_time_scale_shift": "scale_shift"},
        r"attn_norm_num_groups = None: must be norm_num_groups, with scale_shift",
    ),
    ("unet/config.json", {"mid_block_type": None}, "mid_block_type = None"),
    ("unet/config.json", {"mid_block_scale_factor": 2}, "mid_block_scale_factor"),
    ("unet/config.json", {"add_attention": False}, "add_attention"),
    ("unet/config.json", {"attn_norm_num_groups": 8}, "attn_norm_num_groups"),
    ("unet/config.json", {"attention_head_dim": 5}, "attention_head_dim = 5"),
    ("unet/config.json", {"num_class_embeds": 10}, "1 tensors are missing, the first class_emb"),
    ("unet/config.json", {"num_class_embeds": 1}, "num_class_embeds = 1: must be null, or the num"),
    ("unet/config.json", {"_label_dropout": True}, "_label_dropout = True: must be in"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("unet/config.json", {"downsample_type": "resnet"}, "downsample_type"),
    ("unet/config.json", {"upsample_type": "resnet"}, "upsample_type"),
    ("unet/config.json", {"downsample_padding": 2}, "downsample_padding"),
    ("unet/config.json", {"freq_shift": 3}, "freq_shift"),
    ("unet/config.json", {"out_channels": 6}, "out_channels = 6: must be in_channels = 3"),
    ("unet/config.json", {"sample_size": None}, "sample_size"),
    ("unet/config.json", {"block_out_channels": [16, 24, 32, 32]}, "multiples of the first"),
    ("unet/config.json", {"block_out_channels": "x"}, "block_out_channels"),
    ("unet/config.json", {"norm_eps": "1e-6"}, "norm_eps = '1e-6': must be a number > 0"),
    ("unet/config.json", {"norm_eps": True}, "norm_eps = True: must be a number > 0"),
    ("unet/config.json", {"flip_sin_to_cos": "false"}, "flip_sin_to_cos = 'false': must be true"),
    ("unet/config.json", {"sample_size": 10**6, "norm_num_groups": 5}, "at most 16384"),
    ("unet/config.json", {"layers_per_block": 2.5}, "layers_per_block"),
    ("unet/config.json", {"down_block_types": ["ResnetDownsampleBlock2D"] * 4}, "down_block_types"),
    ("unet/config.json", {"up_block_types": ["UpBlock2D"] * 4}, "mirror image"),
    ("unet/config.json", {"new_thing": 1}, "new_thing = 1: there is no such setting here"),
    ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel"),
    ("unet/config.json", {"layers_per_block": 1}, "tensors are not of this network"),
    ("unet/config.json", {"layers_per_block": 3}, "tensors are missing"),
    ("unet/config.json", {"block_out_channels": [32, 64, 64, 64]}, "it must be of"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type"),
    (
        "scheduler/scheduler_config.json",
        {"variance_type": "learned_range"},
        r"scheduler/scheduler_config.json: variance_type",
    ),
    ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, "beta_schedule"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas"),
    ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
    ("scheduler/scheduler_config.json", {"clip_sample_range": 2.0}, "clip_sample_range"),
    ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "a PNDMScheduler"),
    ("scheduler/scheduler_config.json", {"trained_betas": [2.0]}, "by its settings: .*beta_1 = 2"),
    ("scheduler/scheduler_config.json", {"trained_betas": ["x"]}, "settings cannot be read"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, "num_steps = 'x'"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**14}, "by its settings"),
    ("scheduler/scheduler_config.json", {"clip_sample": "no"}, "clip_sample = 'no': must be"),
]


@pytest.mark.parametrize(("file", "changes", "said"), REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(small, tmp_path, file, changes, said):
    folder = shutil.copytree(small[1], tmp_path / "changed")
    change_json(folder / file, **changes)
    refused(folder, said)
