"""Weights of others: each network beside diffusers' own at the same random weights."""

import os
import pickle
import shutil
import sys
import types

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_of_torch

from ddpm import experiment
from ddpm.config import default
from ddpm.diffusion.keys import sample_keys
from ddpm.errors import InputError
from ddpm.interop import settings, weights
from ddpm.objectives import FIXED
from ddpm.sampling.sample import sample
from ddpm.sampling.samplers import ancestral, ddim, times
from tests.interop.theirs import (
    SCALE_SHIFT,
    UNETS,
    authors_names,
    change_json,
    forward,
    give_noise,
    make,
    old_names,
    save,
)

BIN, SAFE = "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"
FULL_SIZE = os.environ.get("DDPM_FULL_SIZE")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(the network, its folder)."""
    net = make(UNETS["small"])
    return net, save(net, tmp_path_factory.mktemp("small") / "pipeline")


def built_of(found):
    return experiment.build(found.config, found.image_shape)


def ours(found, x, t):
    apply = jax.jit(built_of(found).model.apply)
    return np.asarray(apply({"params": found.params}, x, np.asarray(t)))


@pytest.mark.parametrize("name", UNETS)
def test_forward_equals_that_of_diffusers(name, tmp_path):
    net = make(UNETS[name])
    found = weights.load(save(net, tmp_path / "pipeline"))
    rng = np.random.default_rng(1)
    for t in ([1], [520], [1000]):
        x = rng.normal(size=(1, *found.image_shape)).astype(np.float32)
        expected = forward(net, x, t)
        assert expected.std() > 0.05
        np.testing.assert_allclose(ours(found, x, t), expected, rtol=0, atol=2e-5)
    if name == "cifar10":
        model = built_of(found).model.clone(norm_epsilon=1e-5)
        wrong = model.apply({"params": found.params}, x, np.asarray(t))
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


def of_full_size(*arguments):
    skip = pytest.mark.skipif(not FULL_SIZE, reason="minutes to hours on a CPU: DDPM_FULL_SIZE=1")
    return pytest.param(*arguments, marks=skip)


@pytest.mark.parametrize(
    ("name", "eta"),
    [
        ("small", 0.0),
        ("small_theirs", 0.7),
        ("cifar10", 0.0),
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
    ("name", "variance"),
    [
        ("small", "fixed_large"),
        ("small_theirs", "fixed_small"),
        of_full_size("cifar10", "fixed_large"),
        of_full_size("train_unconditional", "fixed_small"),
        of_full_size("256", "fixed_large"),
    ],
)
def test_a_thousand_ancestral_steps_equal_those_of_diffusers(name, variance, tmp_path, monkeypatch):
    net = make(UNETS[name])
    found = weights.load(save(net, tmp_path / "pipeline", variance_type=variance))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    keys = sample_keys(jax.random.key(3), np.arange(2))
    give_noise(monkeypatch, keys, times(1000), found.image_shape)
    expected = pipeline(2, output_type="np").images
    x_0 = drawn(found, keys, ancestral(FIXED[variance]))
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
    config, _ = experiment.with_settings(default(), diffusion=found.diffusion)
    alpha_bar = experiment.noise_schedule(config).alpha_bar[1:]
    np.testing.assert_allclose(alpha_bar, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)


# --- Formats and layouts


def same(found, expected):
    assert found.sha256 == expected.sha256
    assert found.image_shape == expected.image_shape
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_the_same_weights_in_every_format_and_layout(small, tmp_path):
    net, folder = small
    expected = weights.load(folder)
    same(weights.load(folder / "unet"), expected)
    same(weights.load(folder / "unet" / "diffusion_pytorch_model.safetensors"), expected)
    # As the published ones: all in one folder, by the old names, pickled.
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copy(folder / file, flat)
    state = net.state_dict()
    torch.save(old_names(state), flat / "diffusion_pytorch_model.bin")
    found = weights.load(flat)
    same(found, expected)
    assert found.config == expected.config
    save_file(
        {k: np.ascontiguousarray(v.numpy()) for k, v in old_names(state).items()},
        flat / "diffusion_pytorch_model.safetensors",
    )
    same(weights.load(flat), expected)
    # The authors': without settings, so by those of the config.
    torch.save(authors_names(state, levels=4), tmp_path / "model-790000.ckpt")
    config = expected.config.copy_and_resolve_references()
    same(weights.load(tmp_path / "model-790000.ckpt", config), expected)
    config.data.image_size = (8, 16)
    assert weights.load(tmp_path / "model-790000.ckpt", config).image_shape == (8, 16, 3)


def test_half_precision_is_read_as_float32(small, tmp_path):
    shutil.copytree(small[1], tmp_path / "half")
    path = tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors"
    half = {k: v.astype(np.float16) for k, v in load_file(path).items()}
    save_file(half, path)
    leaves = jax.tree.leaves(weights.load(tmp_path / "half").params)
    assert all(x.dtype == np.float32 for x in leaves)
    # NumPy has no bfloat16; and a pickle may hold trainable parameters.
    brief = {k: torch.nn.Parameter(v.bfloat16()) for k, v in small[0].state_dict().items()}
    torch.save(brief, path.with_name(BIN))
    save_of_torch({k: v.detach() for k, v in brief.items()}, path)
    found = weights.load(path)
    path.unlink()
    same(weights.load(tmp_path / "half"), found)
    np.testing.assert_array_equal(
        found.params["conv_in"]["bias"], brief["conv_in.bias"].detach().float()
    )


def test_a_checkpoint_of_the_training_script(small, tmp_path):
    """unet/ and unet_ema/, without a scheduler."""
    folder = small[1]
    shutil.copytree(folder / "unet", tmp_path / "unet")
    averaged = make(UNETS["small"], seed=1)
    averaged.register_to_config(decay=0.9999, optimization_step=500, power=0.75)
    averaged.save_pretrained(tmp_path / "unet_ema")
    config = default()
    found = {}
    for config.sampling.ema in (True, False):
        found[config.sampling.ema] = weights.load(tmp_path, config)
    same(found[False], weights.load(folder))
    assert found[True].sha256 != found[False].sha256
    assert found[True].config.diffusion == default().diffusion
    # Within the folder of the training, whose scheduler it is.
    (tmp_path / "scheduler").mkdir()
    shutil.copy(folder / "scheduler" / "scheduler_config.json", tmp_path / "scheduler")
    change_json(tmp_path / "scheduler" / "scheduler_config.json", beta_end=0.1)
    checkpoint = tmp_path / "checkpoint-500"
    checkpoint.mkdir()
    (tmp_path / "unet_ema").rename(checkpoint / "unet_ema")
    for given in (checkpoint, checkpoint / "unet_ema"):
        inside = weights.load(given)
        assert inside.sha256 == found[True].sha256
        assert inside.config.diffusion.beta_end == 0.1


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


# --- What is refused

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
    ("unet/config.json", {"sample_size": 10**6, "norm_num_groups": 5}, "do not divide"),
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


def refused(where, said, config=None):
    with pytest.raises(InputError, match=said) as error:
        weights.load(where, config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("file", "changes", "said"), REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(small, tmp_path, file, changes, said):
    folder = shutil.copytree(small[1], tmp_path / "changed")
    change_json(folder / file, **changes)
    refused(folder, said)


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def torn(path, state):
    write = torch.save if path.suffix == ".bin" else save_file
    write({k: v if write is torch.save else v.numpy() for k, v in state.items()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_nan(path, state):
    changed = {k: v.numpy().copy() for k, v in state.items()}
    changed["conv_in.bias"][3] = np.nan
    save_file(changed, path)


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        (BIN, torn, r"cannot be read as \.bin"),
        (SAFE, torn, r"cannot be read as \.safetensors"),
        (SAFE, lambda p, s: torch.save(s, p), r"cannot be read as \.safetensors"),
        (BIN, lambda p, _: save_file({"x": np.ones(1)}, p), r"cannot be read as \.bin"),
        (BIN, lambda p, s: torch.save(s | {"x": Evil()}, p), r"as \.bin .*or has code in it"),
        (BIN, lambda p, _: p.write_bytes(pickle.dumps(Evil())), r"as \.bin .*has code in it"),
        (SAFE, lambda p, _: p.write_bytes(pickle.dumps(Evil())), r"cannot be read as \.safet"),
        (SAFE, lambda p, _: p.write_text("version https://git-lfs.github.com/s"), "git lfs pull"),
        (BIN, lambda p, _: torch.save([1], p), "does not hold tensors by name"),
        (BIN, lambda p, s: torch.save({"state_dict": s}, p), "does not hold tensors by name"),
        (SAFE, lambda p, _: save_file({"x": np.ones(1)}, p), "tensors are missing"),
        (SAFE, lambda p, _: p.write_bytes(b"\xff" * 99), r"cannot be read as \.safetensors"),
        (SAFE, with_nan, "conv_in.bias holds values that are not finite"),
        ("other.txt", lambda p, _: p.write_text(""), "there is none of diffusion_pytorch_model"),
    ],
)
def test_files_that_are_not_the_weights(small, tmp_path, capsys, name, write, said):
    folder = shutil.copytree(small[1], tmp_path / "changed")
    (folder / "unet" / SAFE).unlink()
    write(folder / "unet" / name, small[0].state_dict())
    refused(folder, said)
    assert "code was run" not in capsys.readouterr().out


def test_files_without_their_settings(small, tmp_path):
    net, folder = small
    alone = shutil.copy(folder / "unet" / SAFE, tmp_path / "alone.safetensors")
    refused(alone, "no settings in it")
    refused(tmp_path / "none.safetensors", "there is no such file or folder")
    refused(tmp_path, r"neither config.json nor unet/config.json")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(tmp_path / "run", "a run folder of this library.*--mode=export")
    torch.save(authors_names(net.state_dict(), 4), tmp_path / "a.ckpt")
    config = default()
    config.model.attention_resolutions = ()
    refused(tmp_path / "a.ckpt", "its attention is at levels", config)
    refused(tmp_path / "a.ckpt", "must be of", default())
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, "there is none of|its JSON")
        shutil.copy(alone, tmp_path / SAFE)


def test_without_pytorch_a_pickle_says_what_to_do(small, tmp_path, monkeypatch):
    folder = shutil.copytree(small[1], tmp_path / "pickled")
    (folder / "unet" / SAFE).unlink()
    torch.save(small[0].state_dict(), folder / "unet" / BIN)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(folder, "pip install torch")


# --- The hub


def test_the_hub_gives_a_folder(small, monkeypatch, capsys):
    import huggingface_hub

    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(small[1])

    files = ["config.json", f"unet/{SAFE}", f"unet/{BIN}"]
    info = types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=f) for f in files])
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    same(weights.load("google/ddpm-cifar10-32"), weights.load(small[1]))
    assert asked == [("google/ddpm-cifar10-32", {"allow_patterns": ["*.json", "*.safetensors"]})]
    warned = [line for line in capsys.readouterr().err.splitlines() if "not averaged" in line]
    assert len(warned) == 1
    assert "FID about 12" in warned[0]
    assert "google/ddpm-ema-cifar10-32" in warned[0]
    weights.load("google/ddpm-ema-cifar10-32")
    assert "not averaged" not in capsys.readouterr().err


class NoNetwork(Exception):
    """No OSError: those of the hub's HTTP client are not."""


def test_without_the_hub(small, monkeypatch, tmp_path):
    import huggingface_hub

    def offline(name, **_):
        raise NoNetwork("no network\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("google/ddpm-cifar10-32", r"it cannot be had from the hub \(no network\)")

    def fetched_before(name, *, local_files_only):
        assert local_files_only
        return str(small[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched_before)
    same(weights.load("google/ddpm-cifar10-32"), weights.load(small[1]))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("google/ddpm-cifar10-32", "pip install huggingface_hub")


def test_settings_are_told(small, capsys):
    weights.load(small[1])
    text = capsys.readouterr().err
    assert "config.model.channels = 16" in text
    assert "its scheduler has variance = 'fixed_small'" in text
