"""diffusers' UNets with the settings of the published weights, at random weights."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm.diffusion.streams import normal
from ddpm.errors import InputError
from ddpm.interop import weights

_PAPERS = {
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
}


def blocks(attends):
    down = tuple(("Attn" if a else "") + "DownBlock2D" for a in attends)
    up = tuple(("Attn" if a else "") + "UpBlock2D" for a in attends[::-1])
    return {"down_block_types": down, "up_block_types": up}


UNETS = {
    # google/ddpm-cifar10-32
    "cifar10": _PAPERS
    | blocks((False, True, False, False))
    | {"sample_size": 32, "block_out_channels": (128, 256, 256, 256)},
    # google/ddpm-celebahq-256, -church-256, -bedroom-256
    "256": _PAPERS
    | blocks((False, False, False, False, True, False))
    | {"sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512)},
    # train_unconditional.py's own: all else is UNet2DModel's default
    "train_unconditional": blocks((False, False, False, False, True, False))
    | {
        "sample_size": 64,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "layers_per_block": 2,
    },
}
# Small ones of both kinds.
UNETS["small"] = UNETS["cifar10"] | {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32, 32),
    "norm_num_groups": 4,
}
UNETS["small_theirs"] = blocks((False, True)) | {
    "sample_size": (8, 16),
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
# Without groups of its own, the middle's attention would have no norm, unlike all other.
SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}
UNETS["small_scale_shift"] = UNETS["small"] | SCALE_SHIFT


def make(settings, seed=0):
    """The network, norms' scales and biases perturbed too."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = UNet2DModel(**settings).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if re.search(r"norm\d?\.", name):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def save(net, folder, **scheduler):
    """A pipeline's folder, as its training script writes it."""
    DDPMPipeline(net, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def forward(net, x, t, label=None):
    """x [B, H, W, C], t of the paper's index, label [B] or None -> [B, H, W, C]."""
    classes = None if label is None else torch.from_numpy(np.asarray(label))
    x = torch.from_numpy(np.array(x, np.float32).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        out = net(x, torch.from_numpy(np.asarray(t) - 1), classes).sample
    return out.numpy().transpose(0, 2, 3, 1)


def old_names(tensors):
    """Of before 2023, in which the published weights are."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, tensor in tensors.items():
        for now, before in new.items():
            name = name.replace(f".{now}.", f".{before}.")
        found[name] = tensor
    return found


def authors_names(tensors, levels):
    """Of pesser/pytorch_diffusion, by substitution, attention as 1x1 convolutions."""
    rules = [
        (r"^time_embedding\.linear_(\d)", lambda m: f"temb.dense.{int(m[1]) - 1}"),
        (r"^conv_norm_out", "norm_out"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"^mid_block\.attentions\.0", "mid.attn_1"),
        (r"^down_blocks\.(\d)", r"down.\1"),
        (r"^up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}"),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.time_emb_proj\.", ".temb_proj."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
    ]
    found = {}
    for name, tensor in tensors.items():
        attention = ".to_" in name
        for pattern, by in rules:
            name = re.sub(pattern, by, name)
        if attention and name.endswith("weight"):
            tensor = tensor[:, :, None, None]
        found[name] = tensor
    return found


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def give_noise(monkeypatch, keys, times, image_shape):
    """Lets diffusers draw this library's noise, that of each of `times` in their order."""
    stream = iter(times)

    def randn_tensor(shape, **_):
        noise = np.array(normal(keys, next(stream), image_shape)).transpose(0, 3, 1, 2)
        assert noise.shape == tuple(shape)
        return torch.from_numpy(noise.copy())

    for module in (
        "schedulers.scheduling_ddpm",
        "schedulers.scheduling_ddim",
        "pipelines.ddpm.pipeline_ddpm",
        "pipelines.ddim.pipeline_ddim",
    ):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", randn_tensor)


def refused(where, said, config=None):
    """The one line that these weights are refused with."""
    with pytest.raises(InputError, match=said) as error:
        weights.load(where, config)
    assert "\n" not in str(error.value)
    return str(error.value)
