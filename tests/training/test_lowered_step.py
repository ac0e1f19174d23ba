"""The training step in bfloat16 as it is lowered for NVIDIA GPUs, read without one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from ddpm import DiT, UNet, schedules
from ddpm.models import layers
from ddpm.training import objectives
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step

BATCH = 5  # no other size is 5, by which activations are known
UNET = UNet(
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    num_groups=4,
    dtype=jnp.bfloat16,
)
NETWORKS = {
    "unet": UNET,
    "unet of other options": UNET.clone(
        resample_in_blocks=True, scale_shift=True, head_channels=4, dropout=0.1
    ),
    "dit": DiT(channels=16, depth=1, head_channels=8, dropout=0.1, dtype=jnp.bfloat16),
}
# As docs/performance.md names them.
OUTPUT_LAYER = r"\(UNet\)+/conv_out/|\(DiT\)+/out/"
TO_FLOAT32 = (
    r"/norm(_1|_2|_out)?/|attention/convert_element_type$|/mean/"
    r"|\((UNet|DiT)\)+/convert_element_type$"  # the output layer's input
)
ATTENTION = "dot_product_attention"
TRANSPOSES = r"attention|\(DiT\)+/transpose$"  # of heads; of pixels to patches and back


def operations(module):
    """Each operation's name, the place in the code, types of operands and of results."""
    found = []

    def walk(operation):
        for block in (block for region in operation.regions for block in region.blocks):
            for inner in (o.operation for o in block.operations):
                place = re.search(r'"([^"]*)"', str(inner.location))
                types = ([v.type for v in values] for values in (inner.operands, inner.results))
                found.append((inner.name, place[1] if place else "", *types))
                walk(inner)

    walk(module.operation)
    return found


def shape_of(kind):
    return tuple(getattr(kind, "shape", ()))


@pytest.fixture(params=NETWORKS)
def lowered(request, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(layers, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    model, optimizer = NETWORKS[request.param], optax.adam(1e-3)
    objective = objectives.simple(schedules.linear(10))
    step = make_train_step(model, objective, optimizer, ema_decay=0.9, seed=0)
    state = jax.eval_shape(lambda: init(model, optimizer, (8, 8, 3), 0, objective))
    images = jax.ShapeDtypeStruct((BATCH, 8, 8, 3), np.uint8)
    traced = jax.jit(step).trace(state, jax.eval_shape(Metrics.zero), images)
    module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    return request.param, operations(module)


def test_bfloat16_step_for_gpus(lowered):
    """Nothing large is computed in float32 or moved without need, and attention is fused."""
    name, found = lowered
    products = [o for o in found if o[0] in ("stablehlo.convolution", "stablehlo.dot_general")]
    in_float32 = {place for _, place, operands, _ in products if "f32" in str(operands)}
    assert len(products) > 3 * len(in_float32) > 0
    assert not [p for p in in_float32 if not re.search(OUTPUT_LAYER, p)]

    of_activations = [
        o for o in found if o[3] and len(shape_of(o[3][0])) > 2 and BATCH in shape_of(o[3][0])
    ]
    converted = [
        place
        for n, place, *types in of_activations
        if n == "stablehlo.convert" and ["bf16" in str(t) for t in types] == [True, False]
    ]
    assert converted
    assert not [p for p in converted if not re.search(TO_FLOAT32, p)]

    moved = [place for n, place, *_ in of_activations if n == "stablehlo.transpose"]
    assert not [place for place in moved if not re.search(TRANSPOSES, place)]

    fused = [place for n, place, *_ in found if n == "stablehlo.custom_call" and ATTENTION in place]
    assert len(fused) == (0 if name == "unet of other options" else 2)  # there and back
