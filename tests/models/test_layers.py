"""What the networks are made of, each by itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from ddpm import UNet
from ddpm.models import layers
from ddpm.models.layers import (
    GroupNorm,
    conv3x3,
    time_embedding,
)
from tests.exact import close
from tests.models.numpy_unet import cheap_key, norm, sinusoids


def test_time_embedding():
    t = np.arange(1, 1001)
    found = time_embedding(jnp.asarray(t), 128)
    # Float32 angles of up to 999 are good to some 1e-4, as in the authors' code.
    close(found, sinusoids(t, 128), atol=2e-4)
    close(found[0], np.repeat([0.0, 1.0], 64), atol=1e-7)
    close(found[1, [0, 63, 64, 127]], [np.sin(1), 1e-4, np.cos(1), 1], rtol=1e-5)


def test_time_embedding_of_odd_dimension_has_that_dimension():
    assert time_embedding(jnp.array([1, 2]), 5).shape == (2, 5)


def test_too_few_channels_for_a_time_embedding_are_refused():
    """Of one frequency the formula's step is 1/0: the output would be NaN."""
    x, t = jnp.zeros((1, 4, 4, 1)), jnp.ones(1, int)
    with pytest.raises(ValueError, match="channels"):
        jax.eval_shape(
            UNet(2, (1,), 1, attention_resolutions=(), num_groups=1).init, jax.random.key(0), x, t
        )


@pytest.mark.parametrize(("stride", "rows"), [(1, (0, 1, 2)), (2, (0, 1))])
def test_convolution_pads_with_stride_2_at_the_bottom_and_right_only(stride, rows):
    """Which outputs see pixel (1, 2), and by which tap."""
    x = np.zeros((1, 4, 6, 1), np.float32)
    x[0, 1, 2] = 1
    kernel = np.arange(1, 10, dtype=np.float32).reshape(3, 3, 1, 1)
    layer = conv3x3(1, "conv", dtype=jnp.float32, stride=stride)
    out = layer.apply({"params": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}, x)[0, ..., 0]
    if stride == 1:
        assert (out[0:3, 1:4] == kernel[::-1, ::-1, 0, 0]).all()
        assert out.sum() == 45
    else:
        expected = np.zeros((2, 3))
        expected[0, 0], expected[0, 1] = kernel[1, 2, 0, 0], kernel[1, 0, 0, 0]
        assert (out == expected).all()


@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (12, 4), (6, 1), (4, 4)])
def test_group_norm_is_that_of_flax(channels, groups):
    """Values and all gradients, of data off centre; the groups next to each other."""
    x, g = jax.random.normal(jax.random.key(0), (2, 3, 5, 4, channels)) * 2
    x += jnp.arange(channels)
    scale, bias = jax.random.normal(jax.random.key(1), (2, channels))
    results = []
    for layer in (GroupNorm(groups), nn.GroupNorm(groups, epsilon=1e-6)):
        params = {"scale": scale, "bias": bias}
        value, pull = jax.vjp(lambda p, x, f=layer: f.apply({"params": p}, x), params, x)
        of_params, of_x = pull(g)
        results.append((value, of_params["scale"], of_params["bias"], of_x))
    for found, expected in zip(*results, strict=True):
        close(found, expected, rtol=2e-5, atol=2e-5)


def test_group_norm_adds_its_epsilon_to_the_variance():
    x = jnp.array([1e-3, -1e-3]).reshape(1, 2, 1, 1)
    params = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
    found = GroupNorm(1).apply({"params": params}, x)
    close(found.ravel(), np.array([1e-3, -1e-3]) / np.sqrt(2e-6), rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_attention_is_that_of_jax_on_every_backend(size, monkeypatch):
    q, k, v, g = jax.random.normal(jax.random.key(0), (4, 2, 9, 6)) * size
    results = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        value, pull = jax.vjp(layers.attention, q, k, v)
        results.append((value, *pull(g)))
    weights = scipy.special.softmax(np.einsum("bqc,bkc->bqk", q, k) / 6**0.5, axis=-1)
    close(results[0][0], np.einsum("bqk,bkc->bqc", weights, v), rtol=1e-4, atol=1e-4 * size)
    # A gradient is a difference of products of three of the four.
    for cpu, other in zip(*results, strict=True):
        close(cpu, other, rtol=1e-4, atol=2e-6 * size**3)


def test_norm_of_bfloat16_far_from_zero():
    """Squares of 300 lose, in bfloat16, the variance of 1 beside them."""
    x = (300 + jax.random.normal(cheap_key(0), (1, 64, 64, 4))).astype(jnp.bfloat16)
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    found = GroupNorm(2).apply({"params": params}, x)
    assert found.dtype == jnp.bfloat16
    close(found.astype(jnp.float32), norm(params, np.float64(x), 2), rtol=0, atol=0.1)
