"""Weights of others in every format and layout, of the hub too, and files that are none."""

import copy
import json
import pickle
import shutil
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_of_torch

from ddpm.config import default
from ddpm.files.tensors import sha256
from ddpm.interop import weights
from tests.interop.theirs import UNETS, authors_names, change_json, make, old_names, refused

BIN, SAFE = "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"
FIRST = "diffusion_pytorch_model-00001-of-00002.safetensors"


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


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"variant": "fp16", "safe_serialization": False},
        {"max_shard_size": "200KB"},
        {"max_shard_size": "200KB", "safe_serialization": False},
        {"max_shard_size": "200KB", "variant": "fp16"},
    ],
    ids=str,
)
def test_variants_and_shards_as_diffusers_writes_them(small, tmp_path, options):
    net, folder = small
    if "variant" in options:
        net = copy.deepcopy(net).half().float()
    net.save_pretrained(tmp_path / "unet", **options)
    state = {name: x.numpy() for name, x in net.state_dict().items()}
    found = weights.load(tmp_path / "unet")
    assert found.sha256 == sha256(state)
    (named, *others) = sorted((tmp_path / "unet").glob("diffusion*"))
    if others:
        assert len(list((tmp_path / "unet").glob("*-of-*"))) > 1
        refused(named, "one file of several, or of another use: name the folder")
        (named,) = (tmp_path / "unet").glob("*.index.*")
    assert weights.load(named).sha256 == found.sha256
    # Full precision is taken where both are.
    if "variant" in options:
        shutil.copy(folder / "unet" / SAFE, tmp_path / "unet")
        assert weights.load(tmp_path / "unet").sha256 == weights.load(folder).sha256


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda f, m: (f / FIRST).unlink(),
            r"1 of its \d files are not next to it, the first",
        ),
        (lambda f, m: m.update({"conv_in.bias": f"../unet/{FIRST}"}), "names '../unet/diffusion"),
        (lambda f, m: m.update({"conv_in.bias": "/etc/passwd"}), "names '/etc/passwd', which is"),
        (lambda f, m: m.update({"conv_in.bias": ".."}), "files are not next to it, the first .."),
        (lambda f, m: m.update({"conv_in.bias": 3}), "there is no weight_map, of tensors to files"),
        (lambda f, m: m.clear(), "tensors are missing"),
        (lambda f, m: m.pop("conv_in.bias"), "its tensors are not those that .* the first conv_in"),
        (lambda f, m: m.update({"extra": FIRST}), "its tensors are not those that .* first extra"),
        (lambda f, m: (f / FIRST).write_bytes(b""), FIRST + ": cannot be read as .safetensors"),
    ],
)
def test_shards_that_do_not_fit_their_index(sharded, tmp_path, break_it, said):
    folder = shutil.copytree(sharded, tmp_path / "unet")
    index = folder / f"{SAFE}.index.json"
    places = json.loads(index.read_text())["weight_map"]
    break_it(folder, places)
    index.write_text(json.dumps({"weight_map": places}))
    refused(folder, said)


@pytest.fixture(scope="module")
def sharded(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "unet"
    small[0].save_pretrained(folder, max_shard_size="1500KB")
    assert (folder / FIRST).exists()
    return folder


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


# --- What is refused


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def torn(path, state):
    write = torch.save if path.suffix == ".bin" else save_file
    write({k: v if write is torch.save else v.numpy() for k, v in state.items()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path, state):
    """A small file that PyTorch would unpack to more than there is memory."""
    torch.save(state, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/zeros", bytes(2**20))
        archive.filelist[-1].file_size = 2**50


def with_great(path, state):
    """Finite in float64, infinite in float32."""
    changed = {k: v.numpy().astype(np.float64) for k, v in state.items()}
    changed["conv_in.bias"][3] = 1e39
    save_file(changed, path)


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
        (SAFE, with_great, "conv_in.bias holds values that are not finite in float32"),
        (BIN, lambda p, s: torch.save({1: s["conv_in.bias"]}, p), "does not hold tensors by name"),
        (BIN, lambda p, s: torch.save({"x": torch.ones(1).expand(2**30, 2**30)}, p), "unpacked, i"),
        (BIN, bomb, "unpacked, it takes .* GB of memory"),
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

    def model_info(name, **_):
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=f) for f in files])

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    same(weights.load("google/ddpm-cifar10-32"), weights.load(small[1]))
    assert asked == [("google/ddpm-cifar10-32", {"allow_patterns": ["*.json", "*.safetensors"]})]
    warned = [line for line in capsys.readouterr().err.splitlines() if "not averaged" in line]
    assert len(warned) == 1
    assert "FID about 12" in warned[0]
    assert "google/ddpm-ema-cifar10-32" in warned[0]
    # What will be read is fetched, and no more: variants, and weights in several files.
    safe, pickled = (["*.json", f"*{kind}"] for kind in (".safetensors", ".bin"))
    for files[1:], patterns in (
        (["unet/diffusion_pytorch_model.fp16.safetensors"], {"allow_patterns": safe}),
        ([f"unet/{SAFE}.index.json", f"unet/{FIRST}"], {"allow_patterns": safe}),
        ([f"{BIN}.index.json", "diffusion_pytorch_model.fp16.safetensors"],
         {"allow_patterns": pickled, "ignore_patterns": ["*.fp16*"]}),
    ):  # fmt: skip
        weights.load("google/ddpm-ema-cifar10-32")
        assert asked[-1][1] == patterns
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
