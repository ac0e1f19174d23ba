"""What the networks are made of, each by itself."""

import functools
import types

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
    concatenate_inputs,
    conv3x3,
    embed,
    fourier_embedding,
    time_embedding,
)
from tests.exact import close
from tests.models.numpy_unet import (
    cheap_key,
    gaussian_features,
    linear,
    norm,
    random_params,
    sinusoids,
    swish,
)


def test_time_embedding():
    t = np.arange(1, 1001)
    found = time_embedding(jnp.asarray(t), 128)
    # Float32 angles of up to 999 are good to some 1e-4, as in the authors' code.
    close(found, sinusoids(t, 128), atol=2e-4)
    close(found[0], np.repeat([0.0, 1.0], 64), atol=1e-7)
    close(found[1, [0, 63, 64, 127]], [np.sin(1), 1e-4, np.cos(1), 1], rtol=1e-5)


def test_time_embedding_of_odd_dimension_has_that_dimension():
    assert time_embedding(jnp.array([1, 2]), 5).shape == (2, 5)


def test_random_features_of_the_time_are_drawn_once_and_for_all():
    """Trained weights rely on the very numbers: the first three of NumPy's oldest generator."""
    first = 16 * 2 * np.pi * np.array([1.764052345967664, 0.4001572083672233, 0.9787379841057392])
    expected = np.concatenate([np.sin(first / 100), np.cos(first / 100)])
    close(fourier_embedding(jnp.array([0.01]), 6)[0], expected, rtol=1e-5)
    # The times of any type, double or whole, without a warning.
    for t in (np.linspace(0, 1, 7), np.linspace(0, 1, 7, dtype=np.float32), np.array([0, 1])):
        found = jax.jit(lambda t: fourier_embedding(t, 128))(t)
        assert found.dtype == jnp.float32
        # Float32 angles of up to 2 pi 16 * 2.3 are good to some 1e-5.
        close(found, gaussian_features(t, 128), atol=1e-4)
        assert (fourier_embedding(t, 128) == fourier_embedding(jnp.asarray(t), 128)).all()


def test_random_features_of_odd_dimension_end_in_a_zero():
    t = jnp.array([0.0, 0.3])
    found = fourier_embedding(t, 7)
    assert (found[:, :6] == fourier_embedding(t, 6)).all()
    assert (found[:, 6] == 0).all()
    assert (found[0] == np.array([0, 0, 0, 1, 1, 1, 0])).all()


class Embedding(nn.Module):
    """`embed` within the compact method that it asks for."""

    num_classes: int = 0
    num_features: int = 0

    @nn.compact
    def __call__(self, time, label=None, features=None):
        sizes = {"num_classes": self.num_classes, "num_features": self.num_features}
        return embed(time, label, features, size=6, dtype=jnp.float32, **sizes)


def test_embedding_of_time_label_and_features_is_their_sum():
    rng = np.random.default_rng(3)
    time, features = (np.float32(rng.normal(size=(4, n))) for n in (5, 3))
    label = np.array([0, 2, 1, 1])
    model = Embedding(num_classes=2, num_features=3)
    params = random_params(model, time)
    assert jax.tree.map(np.shape, params) == {
        "time_1": {"kernel": (5, 6), "bias": (6,)},
        "time_2": {"kernel": (6, 6), "bias": (6,)},
        "label": {"embedding": (3, 6)},
        "features": {"kernel": (3, 6)},  # no bias: no features add nothing
    }
    apply = jax.jit(lambda *given: model.apply({"params": params}, *given))
    of_time = linear(params["time_2"], swish(linear(params["time_1"], time)))
    table, kernel = params["label"]["embedding"], params["features"]["kernel"]
    close(apply(time, label, features), of_time + table[label] + features @ kernel, rtol=1e-4)
    close(apply(time, None, features), of_time + table[2] + features @ kernel, rtol=1e-4)
    close(apply(time, label, None), of_time + table[label], rtol=1e-4)
    close(apply(time, np.array(1), None), of_time + table[1], rtol=1e-4)
    without = {k: params[k] for k in ("time_1", "time_2")}
    close(Embedding().apply({"params": without}, time), of_time, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "label", "features", "said"),
    [
        (Embedding(), 0, None, "takes no label"),
        (Embedding(num_features=3), 0, None, "takes no label"),
        (Embedding(num_classes=2), 0, np.zeros((4, 1)), r"\(num_features = 0\) takes none"),
        (Embedding(num_features=3), None, np.zeros((4, 1)), r"shape \(4, 1\): must be \[B, 3\]"),
    ],
)
def test_embedding_refuses_what_it_does_not_take(model, label, features, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((4, 5)), label, features))


def test_image_waves_and_condition_stand_side_by_side():
    """VDM's waves too, of all 8-bit values; in the order of the exponents."""
    x = np.float32(np.arange(256) / 127.5 - 1).reshape(1, 16, 8, 2)
    condition = np.float32(np.random.default_rng(0).normal(size=(1, 16, 8, 3)))
    exact = np.float64(x)
    waves = {n: [np.sin(2**n * np.pi * exact), np.cos(2**n * np.pi * exact)] for n in (0, 7, 8)}
    # Float32 angles of up to 2^8 pi are good to some 5e-5, and so is x at the slope 2^8 pi.
    for exponents in ((), (7, 8), (8, 0)):
        expected = [exact, *(wave for n in exponents for wave in waves[n])]
        found = concatenate_inputs(x, None, condition_channels=0, exponents=exponents)
        close(found, np.concatenate(expected, axis=-1), atol=2e-4)
        found = concatenate_inputs(x, condition, condition_channels=3, exponents=exponents)
        close(found, np.concatenate([*expected, condition], axis=-1), atol=2e-4)
        assert (found[..., :2] == x).all()
        found = concatenate_inputs(x, None, condition_channels=3, exponents=exponents)
        close(found, np.concatenate([*expected, 0 * condition], axis=-1), atol=2e-4)
    assert concatenate_inputs(x, None, condition_channels=0) is x


def test_waves_of_bfloat16_are_float32():
    """Angles of 2^8 pi have no digits after the point in bfloat16."""
    x = jnp.array([0.5, -0.75, 0.015625], jnp.bfloat16).reshape(1, 1, 1, 3)
    found = concatenate_inputs(x, None, condition_channels=0, exponents=(5, 8))
    expected = [0.5, -0.75, 2**-6, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    close(found.ravel(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((2, 4, 6), 0), ((2, 4, 6, 1), 0), ((2, 4, 6, 2), 1), ((1, 4, 6, 1), 1), ((2, 6, 4, 1), 1)],
)
def test_conditions_of_another_shape_are_refused(shape, channels):
    """Never broadcast: that of one image for all must be said."""
    with pytest.raises(ValueError, match=rf"must be \(2, 4, 6, {channels}\)"):
        concatenate_inputs(jnp.zeros((2, 4, 6, 3)), jnp.zeros(shape), condition_channels=channels)


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
    rng = np.random.default_rng(0)
    x, g = np.float32(2 * rng.normal(size=(2, 3, 5, 4, channels)))
    x += np.arange(channels, dtype=np.float32)
    scale, bias = np.float32(rng.normal(size=(2, channels)))

    @jax.jit
    def both(params, x, g):
        results = []
        for layer in (GroupNorm(groups), nn.GroupNorm(groups, epsilon=1e-6)):
            value, pull = jax.vjp(lambda p, x, f=layer: f.apply({"params": p}, x), params, x)
            of_params, of_x = pull(g)
            results.append((value, of_params["scale"], of_params["bias"], of_x))
        return results

    for found, expected in zip(*both({"scale": scale, "bias": bias}, x, g), strict=True):
        close(found, expected, rtol=2e-5, atol=2e-5)


def test_group_norm_adds_its_epsilon_to_the_variance():
    x = jnp.array([1e-3, -1e-3]).reshape(1, 2, 1, 1)
    params = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
    found = GroupNorm(1).apply({"params": params}, x)
    close(found.ravel(), np.array([1e-3, -1e-3]) / np.sqrt(2e-6), rtol=1e-5)


@pytest.mark.parametrize(("size", "heads"), [(1.0, 1), (30.0, 1), (1.0, 3)])
def test_attention_is_that_of_jax(size, heads):
    q, k, v, g = np.float32(np.random.default_rng(0).normal(size=(4, 2, 9, 6))) * np.float32(size)

    def theirs(q, k, v):
        apart = (x.reshape(2, 9, heads, -1) for x in (q, k, v))
        return jax.nn.dot_product_attention(*apart).reshape(q.shape)

    @jax.jit
    def value_and_gradients(q, k, v, g):
        ours = functools.partial(layers.attention, num_heads=heads)
        pulls = [jax.vjp(f, q, k, v) for f in (ours, theirs)]
        return [(value, *pull(g)) for value, pull in pulls]

    results = value_and_gradients(q, k, v, g)
    parts = []
    for i in range(0, 6, 6 // heads):
        of = slice(i, i + 6 // heads)  # the channels of a head stand next to each other
        logits = np.einsum("bqc,bkc->bqk", q[..., of], k[..., of]) / (6 / heads) ** 0.5
        parts.append(np.einsum("bqk,bkc->bqc", scipy.special.softmax(logits, axis=-1), v[..., of]))
    close(results[0][0], np.concatenate(parts, axis=-1), rtol=1e-4, atol=1e-4 * size)
    # A gradient is a difference of products of three of the four.
    for found, expected in zip(*results, strict=True):
        close(found, expected, rtol=1e-4, atol=2e-6 * size**3)


@pytest.mark.parametrize(
    ("dtype", "channels", "capability", "expected"),
    [
        ("bfloat16", 64, (8, 0), True),
        ("float16", 72, (8, 6), True),  # DiT-XL's heads
        ("bfloat16", 128, (8, 9), True),
        ("bfloat16", 136, (8, 9), False),
        ("bfloat16", 256, (9, 0), True),
        ("bfloat16", 256, (12, 0), True),
        ("bfloat16", 264, (9, 0), False),
        ("bfloat16", 512, (9, 0), False),  # one head of the 256x256 model
        ("bfloat16", 60, (9, 0), False),
        ("float32", 64, (9, 0), False),
        ("bfloat16", 64, (7, 5), False),
        ("bfloat16", 64, None, False),
    ],
)
def test_where_cudnn_has_attention(dtype, channels, capability, expected):
    assert layers.takes_cudnn(jnp.dtype(dtype), channels, capability) is expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["9.0"], (9, 0)), (["12.0", "8.6"], (8, 6)), (["gfx942"], None), ([None], None)],
)
def test_compute_capability_is_that_of_nvidia(names, expected, monkeypatch):
    devices = [types.SimpleNamespace(**({"compute_capability": n} if n else {})) for n in names]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert layers.compute_capability() == expected


def test_norm_of_bfloat16_far_from_zero():
    """Squares of 300 lose, in bfloat16, the variance of 1 next to them."""
    x = (300 + jax.random.normal(cheap_key(0), (1, 64, 64, 4))).astype(jnp.bfloat16)
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    found = GroupNorm(2).apply({"params": params}, x)
    assert found.dtype == jnp.bfloat16
    close(found.astype(jnp.float32), norm(params, np.float64(x), 2), rtol=0, atol=0.1)
