"""The UNet's weights under the names that others give them, both ways.

Layouts: that of `diffusers`, with its attention's names of today or of before 2023, in which the
published weights still are; and the authors' own, as converted to PyTorch by pesser.
"""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm.errors import InputError
from ddpm.files.tensors import Tensors, finite_float32

Names = Callable[[str, int], str]  # of a layer of ours, "down_0_1/conv_1", and the number of levels

_ATTENTION = {
    "new": {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v",
            "out": "to_out.0"},
    "old": {"norm": "group_norm", "query": "query", "key": "key", "value": "value",
            "out": "proj_attn"},
    "authors": {"norm": "norm", "query": "q", "key": "k", "value": "v", "out": "proj_out"},
}  # fmt: skip


def diffusers_name(layer: str, levels: int, attention: str = "new") -> str:
    """Returns `down_blocks.0.resnets.1.conv1` for `down_0_1/conv_1`; levels count from the side
    that comes first, so on the way up from the smallest."""
    block, _, part = layer.partition("/")
    outside = {
        "time_1": "time_embedding.linear_1",
        "time_2": "time_embedding.linear_2",
        "label": "class_embedding",
        "norm_out": "conv_norm_out",
        "middle_0": "mid_block.resnets.0",
        "middle_attention": "mid_block.attentions.0",
        "middle_1": "mid_block.resnets.1",
    }
    parts = {"norm_1": "norm1", "conv_1": "conv1", "time": "time_emb_proj", "norm_2": "norm2",
             "conv_2": "conv2", "shortcut": "conv_shortcut"}  # fmt: skip
    if found := re.fullmatch(r"(down|up)_(\d+)_(\d+)(_attention)?", block):
        side, level, i, attends = found.groups()
        number = int(level) if side == "down" else levels - 1 - int(level)
        block = f"{side}_blocks.{number}.{'attentions' if attends else 'resnets'}.{i}"
    elif found := re.fullmatch(r"downsample_(\d+)", block):
        block = f"down_blocks.{found[1]}.downsamplers.0.conv"
    elif found := re.fullmatch(r"upsample_(\d+)", block):
        block = f"up_blocks.{levels - 1 - int(found[1])}.upsamplers.0.conv"
    else:
        block = outside.get(block, block)
    return f"{block}.{(parts | _ATTENTION[attention])[part]}" if part else block


def authors_name(layer: str, levels: int) -> str:
    """Returns `down.0.block.1.conv1` for `down_0_1/conv_1`; levels count from the largest on both
    sides."""
    block, _, part = layer.partition("/")
    outside = {"time_1": "temb.dense.0", "time_2": "temb.dense.1", "middle_0": "mid.block_1",
               "middle_attention": "mid.attn_1", "middle_1": "mid.block_2"}  # fmt: skip
    parts = {"norm_1": "norm1", "conv_1": "conv1", "time": "temb_proj", "norm_2": "norm2",
             "conv_2": "conv2", "shortcut": "nin_shortcut"}  # fmt: skip
    if found := re.fullmatch(r"(down|up)_(\d+)_(\d+)(_attention)?", block):
        side, level, i, attends = found.groups()
        block = f"{side}.{level}.{'attn' if attends else 'block'}.{i}"
    elif found := re.fullmatch(r"(down|up)sample_(\d+)", block):
        block = f"{found[1]}.{found[2]}.{found[1]}sample.conv"
    else:
        block = outside.get(block, block)
    return f"{block}.{(parts | _ATTENTION['authors'])[part]}" if part else block


def to_params(tensors: Tensors, shapes: Any, path: object) -> Any:
    """Returns the UNet's parameters, float32, in the shapes of the tree `shapes`, from either
    layout.

    Raises InputError, which names `path`, for tensors that are missing, too many, of another shape
    or type, or not finite.
    """
    places = _places(shapes, _layout(tensors))
    missing = [name for name in places if name not in tensors]
    extra = sorted(tensors.keys() - places.keys())
    for names, what in ((missing, "missing"), (extra, "not of this network")):
        if names:
            raise InputError(
                f"{path}: {len(names)} tensors are {what}, the first {names[0]}: it is the UNet of "
                "other settings, or another network"
            )
    flat = flatten_dict(shapes)
    found = {}
    for name, place in places.items():
        x, shape = tensors[name], flat[place].shape
        if not jnp.issubdtype(x.dtype, jnp.floating) or _taken(x, place, shape).shape != shape:
            wanted = list(_given(np.broadcast_to(np.float32(0), shape), place).shape)
            raise InputError(
                f"{path}: {name} is {x.dtype}{list(x.shape)}, for these settings it must be of "
                f"{wanted}"
            )
        values = finite_float32(_taken(x, place, shape))
        if values is None:
            raise InputError(f"{path}: {name} holds values that are not finite in float32")
        found[place] = values
    return unflatten_dict(found)


def to_tensors(params: Any) -> Tensors:
    """Returns the UNet's parameters as `diffusers` names and turns them, float32."""
    flat = flatten_dict(params)
    return {
        name: np.ascontiguousarray(_given(np.asarray(flat[place], np.float32), place))
        for name, place in _places(params, diffusers_name).items()
    }


def _layout(tensors: Tensors) -> Names:
    if is_authors(tensors):
        return authors_name
    if any(".query." in name for name in tensors):
        return lambda layer, levels: diffusers_name(layer, levels, "old")
    return diffusers_name


def is_authors(tensors: Tensors) -> bool:
    """Returns whether the tensors have the authors' names."""
    return any(name.startswith("temb.") for name in tensors)


def _places(params: Any, names: Names) -> dict[str, tuple[str, ...]]:
    """Returns where each tensor stands in our tree, in the order of their names."""
    flat = flatten_dict(params)
    levels = 1 + max(int(p[0].split("_")[1]) for p in flat if re.match(r"down_\d", p[0]))
    leaves = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    found = {f"{names('/'.join(p[:-1]), levels)}.{leaves[p[-1]]}": p for p in flat}
    return {name: found[name] for name in sorted(found)}


def _taken(x: np.ndarray, place: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Converts PyTorch's order of axes to ours: OIHW to HWIO, [out, in] and 1x1 to [in, out]; a
    table of labels as it is."""
    if place[-1] == "embedding":
        return x
    if x.ndim == 4 and len(shape) == 2 and x.shape[2:] == (1, 1):
        return x[:, :, 0, 0].T
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _given(x: np.ndarray, place: tuple[str, ...]) -> np.ndarray:
    """Converts back."""
    if place[-1] == "embedding":
        return x
    if place[-2:] == ("shortcut", "kernel"):  # a 1x1 convolution for `diffusers`
        return x.T[:, :, None, None]
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
