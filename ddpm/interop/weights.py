"""Trained UNets of others, from a file, a folder or the hub; and ours for others.

found = weights.load("google/ddpm-ema-cifar10-32")
built = build(found.config, found.image_shape)
samples = built.generator(mesh, 64).samples(found.params, 64, seed=0)
"""

import contextlib
import json
import os
import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm.build.experiment import Experiment, build
from ddpm.build.network import check_model
from ddpm.config import default, with_settings
from ddpm.errors import InputError, first_line, path_error
from ddpm.files.atomic import write_atomically
from ddpm.files.progress import say
from ddpm.files.reading import parse_json, read_json
from ddpm.files.tensors import READERS, Tensors, read_sharded, read_tensors, sha256
from ddpm.interop import settings
from ddpm.interop.tensor_names import is_authors, to_params, to_tensors

# As diffusers names them, in the order of preference: full precision before half, a file before
# the index of several.
_STEM = "diffusion_pytorch_model"
_WEIGHTS = tuple(
    _STEM + name.format(kind)
    for names in (("{}", "{}.index.json"), (".fp16{}", "{}.index.fp16.json", ".fp16{}.index.json"))
    for kind in (".safetensors", ".bin")
    for name in names
)
_SHIPPED = Path(__file__).with_name("pretrained")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Published twice: at the end of training, and the average that the papers' figures are of.
_NOT_AVERAGED = re.compile(r"ddpm-(cifar10-32|celebahq-256|church-256|bedroom-256|cat-256)")


class Imported(NamedTuple):
    """config: the one given, with the settings that came with the weights; params of its UNet;
    sha256 of the weights, the same whatever file they come in."""

    config: ConfigDict
    image_shape: tuple[int, int, int]
    params: Any
    sha256: str


class _Settings(NamedTuple):
    path: Path
    given: Any


class _Found(NamedTuple):
    tensors: Tensors
    path: Path
    unet: _Settings | None
    scheduler: _Settings | None


def load(where: str | Path, config: ConfigDict | None = None) -> Imported:
    """Loads weights from any of:

    - a folder of `diffusers`: a pipeline's, with unet/ and scheduler/, a UNet's, or a checkpoint's
      of its training script (config.sampling.ema chooses between unet_ema/ and unet/);
    - a .safetensors that `export` wrote;
    - a file in the authors' layout, as converted by pesser/pytorch_diffusion: its settings are
      those of `config` (by default the paper's for CIFAR-10);
    - the name of a repository on the hub, with huggingface_hub installed.

    Settings that come with the weights take the place of those in config.model (all but dtype and
    dropout) and config.diffusion. Raises InputError for whatever cannot be read or represented.
    """
    config = default() if config is None else config
    if config.diffusion.schedule == "learned":
        raise InputError(
            "config.diffusion.schedule = 'learned': the weights of others come without a schedule "
            f"that was learned, and are not trained for one: {where} needs another"
        )
    found = _find(where, config)
    if found.unet is None:
        settings.check_network(config)
        image_shape = _image_shape(found, config)
    else:
        dropout = config.training.label_dropout
        model = _settled(found.unet, partial(settings.model_settings, label_dropout=dropout))
        image_shape = model.image_shape
        config = _with_settings(found, model, config)
    try:
        built = build(config, image_shape)
    except InputError as error:
        raise InputError(f"{found.path}, by its settings: {error}") from error
    params = _params(found, built)
    name = str(where).removesuffix("/")
    if match := _NOT_AVERAGED.search(name):
        averaged = f"google/ddpm-ema-{match[1]}"
        worse = ", FID about 12 in place of 3.2" if "cifar" in name else ""
        say(f"warning: {name}: these weights are not averaged{worse}; {averaged} are")
    return Imported(config, image_shape, params, sha256(to_tensors(params)))


def _params(found: _Found, built: Experiment) -> Any:
    """Returns the parameters, a vector of zeros for 'no label' where the weights have none."""
    shapes, classes = check_model(built.model, built.image_shape), built.config.model.num_classes
    if not classes or built.config.training.label_dropout:
        return to_params(found.tensors, shapes, found.path)
    table = shapes["label"]["embedding"]
    rows = {"embedding": jax.ShapeDtypeStruct((classes, table.shape[1]), table.dtype)}
    params = to_params(found.tensors, {**shapes, "label": rows}, found.path)
    params["label"]["embedding"] = np.pad(params["label"]["embedding"], ((0, 1), (0, 0)))
    return params


def export(out: Path, built: Experiment, params: Any) -> None:
    """Writes a folder that `diffusers`' DDPMPipeline and DDIMPipeline load, or one .safetensors.

    The .safetensors has the tensors' names of `diffusers` and its settings as metadata. Raises
    InputError if `out` is there already, or cannot be written.
    """
    from safetensors.numpy import save

    check_out(out)
    settings.check_written(built.config)
    unet = settings.to_unet_config(built.config, built.image_shape)
    scheduler = settings.to_scheduler_config(built.config, built.schedule)
    tensors = to_tensors(params)
    if built.config.model.num_classes and not built.config.training.label_dropout:
        table = "class_embedding.weight"
        tensors[table] = np.ascontiguousarray(tensors[table][:-1])  # 'no label' was not learned
    try:
        if out.suffix == ".safetensors":
            parts = {"unet": unet, "scheduler": scheduler}
            about = {"ddpm": json.dumps(parts, sort_keys=True)}
            write_atomically(out, lambda path: path.write_bytes(save(tensors, about)))
            return
        pipeline = {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": unet["_diffusers_version"],
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
        _write_json(out / "unet" / "config.json", unet)
        _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
        metadata = {"format": "pt"}  # asked for by diffusers: of the axes' order
        write_atomically(
            out / "unet" / _WEIGHTS[0], lambda path: path.write_bytes(save(tensors, metadata))
        )
        _write_json(out / "model_index.json", pipeline)
    except OSError as error:
        raise path_error(error) from error


def check_out(out: Path) -> None:
    """Raises InputError for a file of another format, or where there is something already."""
    if out.suffix in READERS.keys() - {".safetensors"}:
        raise InputError(f"{out}: must be a folder, or end in .safetensors")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out}: there is something already; choose another --out")


def shipped() -> dict[str, Path]:
    """Returns the weights that come with the library, by name."""
    return {file.stem: file for file in sorted(_SHIPPED.glob("*.safetensors"))}


def _find(where: str | Path, config: ConfigDict) -> _Found:
    path = Path(where).expanduser()
    if not os.path.exists(path):
        path = shipped().get(str(where), path)
    if not os.path.exists(path) and _HUB_ID.fullmatch(str(where)) and path.suffix not in READERS:
        path = _from_hub(str(where))
    if path.is_dir():
        return _folder(path, config)
    if not os.path.exists(path):
        raise InputError(
            f"{path}: there is no such file or folder; the library's own weights are "
            f"{', '.join(shipped())}"
        )
    if (path.parent / "config.json").is_file() and path.name.startswith(_STEM):
        return _folder(path.parent, config, path.name)
    tensors = read_tensors(path)
    about = _metadata(path) if path.suffix == ".safetensors" else {}
    if not about and not is_authors(tensors):
        raise InputError(
            f"{path}: no settings in it, or next to it in config.json: name the folder that has "
            "both, or a file in the authors' layout"
        )
    if isinstance(about.get("unet"), dict):  # what was written before this was said
        about["unet"].setdefault(settings.LABEL_DROPOUT, 0.1)
    unet, scheduler = (
        _Settings(path, about[part]) if part in about else None for part in ("unet", "scheduler")
    )
    return _Found(tensors, path, unet, scheduler)


def _folder(path: Path, config: ConfigDict, name: str = "") -> _Found:
    if (path / "checkpoints").is_dir():
        raise InputError(
            f"{path}: a run folder of this library: make weights of it first, with --mode=export "
            f"--workdir={path} --out=FOLDER"
        )
    averaged = config.sampling.ema and (path / "unet_ema").is_dir()
    inner = path / ("unet_ema" if averaged else "unet")
    here = inner if inner.is_dir() else path
    if not (here / "config.json").is_file():
        raise InputError(f"{path}: neither config.json nor unet/config.json is there")
    names = [n for n in _WEIGHTS if os.path.exists(here / n) and name in ("", n)]
    if not names and name:
        raise InputError(f"{here / name}: one file of several, or of another use: name the folder")
    if not names:
        raise InputError(
            f"{here}: there is none of {_STEM}.safetensors and .bin, .fp16.safetensors and "
            ".fp16.bin, or the .index.json of several"
        )
    unet = _Settings(here / "config.json", read_json(here / "config.json"))
    above = path.absolute().parents  # a checkpoint's scheduler is that of the whole training
    places = (path / "scheduler", path, *(folder / "scheduler" for folder in above[:2]))
    schedulers = [p for f in places if (p := f / "scheduler_config.json").is_file()]
    scheduler = _Settings(schedulers[0], read_json(schedulers[0])) if schedulers else None
    read = read_sharded if names[0].endswith(".json") else read_tensors
    return _Found(read(here / names[0]), here / names[0], unet, scheduler)


def _with_settings(found: _Found, model: settings.ModelSettings, config: ConfigDict) -> ConfigDict:
    """Returns the config with what came with the weights, saying what that changed."""
    sections: dict[str, dict[str, Any]] = {"model": model.model}
    if classes := model.model["num_classes"]:
        sections["training"] = {"label_dropout": model.label_dropout}
        if not model.said:
            what = (
                "then 'no label'; if all of its rows are classes: --config.training.label_dropout=0"
                if model.label_dropout
                else "and none for 'no label' (config.training.label_dropout = 0)"
            )
            say(f"{found.path}: its num_class_embeds: classes 0..{classes - 1}, {what}")
    if found.scheduler is None:
        say(f"{found.path}: no scheduler_config.json with it: config.diffusion is as it was")
    else:
        noise = _settled(found.scheduler, settings.noise_settings)
        sections["diffusion"] = noise.diffusion
        for key, value in noise.sampling.items():
            if config.sampling[key] != value:
                say(
                    f"{found.path}: its scheduler has {key} = {value!r}, this samples with "
                    f"config.sampling.{key} = {config.sampling[key]!r}"
                )
    config, changed = with_settings(config, **sections)
    if changed:
        say(f"settings of {found.path}: {', '.join(changed)}")
    return config


def _settled(found: _Settings, read: Any) -> Any:
    if not isinstance(found.given, dict):
        raise InputError(f"{found.path}: its settings are not a JSON object")
    try:
        return read(found.given, found.path)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, MemoryError) as error:
        raise InputError(
            f"{found.path}: its settings cannot be read ({first_line(error)})"
        ) from error


def _image_shape(found: _Found, config: ConfigDict) -> tuple[int, int, int]:
    """Returns the images' shape for weights without settings: the side at which the config's
    attention is at the level where the file has it."""
    kernel = found.tensors.get("conv_in.weight")
    if kernel is None or kernel.ndim != 4:
        raise InputError(f"{found.path}: no conv_in.weight: another network")
    if size := tuple(config.data.image_size):
        return (size[0], size[1], kernel.shape[1])
    levels = {m[1] for n in found.tensors if (m := re.match(r"down\.(\d+)\.attn\.", n))}
    resolutions = sorted(config.model.attention_resolutions)
    if not levels or len(levels) != len(resolutions):
        raise InputError(
            f"{found.path}: its attention is at levels {sorted(levels)}, "
            f"config.model.attention_resolutions = {tuple(resolutions)}: choose the --config of "
            "these weights, and set config.data.image_size"
        )
    side = resolutions[-1] * 2 ** min(int(level) for level in levels)
    return (side, side, kernel.shape[1])


def _from_hub(name: str) -> Path:
    """Returns the local copy of a repository, fetched if need be."""
    try:
        from huggingface_hub import model_info, snapshot_download
    except ImportError as error:
        raise InputError(
            f"{name}: there is no such file or folder; if it is the name of a repository on the "
            "hub: pip install huggingface_hub"
        ) from error
    try:
        here = [file.rfilename for file in model_info(name, timeout=10).siblings or ()]
        names = {PurePosixPath(file).name for file in here}
        found = next((weights for weights in _WEIGHTS if weights in names), _STEM + ".bin")
        kind = ".safetensors" if ".safetensors" in found else ".bin"
        options: dict[str, Any] = {"allow_patterns": ["*.json", f"*{kind}"]}
        if ".fp16" not in found and any(".fp16" in file for file in names):
            options["ignore_patterns"] = ["*.fp16*"]
        return Path(snapshot_download(name, **options))
    except Exception as error:  # no such repository, no network, no permission
        with contextlib.suppress(Exception):  # perhaps it was fetched before
            return Path(snapshot_download(name, local_files_only=True))
        raise InputError(
            f"{name}: there is no such file or folder, and it cannot be had from the hub "
            f"({first_line(error)})"
        ) from error


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get("ddpm", "{}")
    return parse_json(text, path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
