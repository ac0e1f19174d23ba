"""The convolution of wide layers on CPUs, against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm.models import layers, unet, winograd


def direct(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def arrays(height, width, batch=2):
    rng = np.random.default_rng(0)
    shapes = (batch, height, width, 6), (3, 3, 6, 5), (batch, height, width, 5)
    return [np.float32(rng.normal(size=shape)) for shape in shapes]


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


SIZES = [(8, 8), (4, 6), (7, 7), (5, 8), (1, 1), (2, 1)]


@functools.cache
def by_both(height, width):
    """The convolution and its gradients, by Winograd's way and by XLA's."""

    @jax.jit
    def both(x, kernel, g):
        results = []
        for conv in (winograd.conv3x3, direct):
            value, pull = jax.vjp(conv, x, kernel)
            results.append((value, pull(g)))
        return results

    return both(*arrays(height, width))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_is_the_convolution(height, width):
    actual, expected = by_both(height, width)
    assert_close(actual[0], expected[0])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_has_its_gradients(height, width):
    actual, expected = by_both(height, width)
    assert_close(actual[1], expected[1])


def test_forward_mode_and_vmap():
    # For Jacobians and gradients per example.
    x, kernel, _ = arrays(6, 6)
    tangents = (np.cos(x), np.sin(kernel))

    @jax.jit
    def both(x, kernel, tangents):
        results = []
        for conv in (winograd.conv3x3, direct):
            loss = lambda x, kernel, conv=conv: jnp.square(conv(x[None], kernel)).sum()  # noqa: E731
            per_example = jax.vmap(jax.grad(loss, argnums=1), (0, None))(x, kernel)
            results.append((jax.jvp(conv, (x, kernel), tangents), per_example))
        return results

    assert_close(*both(x, kernel, tangents))


def test_the_gradient_of_a_gradient():
    x, kernel, _ = arrays(4, 4, batch=1)

    def penalty(conv, x):
        inner = lambda x: jnp.sin(0.1 * conv(x, kernel)).sum()  # noqa: E731
        return jax.grad(lambda x: jnp.square(jax.grad(inner)(x)).sum())(x)

    assert_close(*jax.jit(lambda x: [penalty(conv, x) for conv in (winograd.conv3x3, direct)])(x))


def test_the_gradient_keeps_the_input_only():
    x, kernel, _ = arrays(16, 16)
    kept = jax.tree.leaves(jax.vjp(lambda x: winograd.conv3x3(x, kernel), x)[1])
    assert max(k.size for k in kept) <= x.size


@pytest.mark.parametrize("shape", [(16, 16, 3), (14, 14, 3)])
def test_the_network_is_the_same_by_either(shape, monkeypatch):
    model = unet.UNet(channels=128, channel_multipliers=(1, 1), num_res_blocks=1,
                      attention_resolutions=(), dropout=0.0)  # fmt: skip
    rng = np.random.default_rng(0)
    x, t = np.float32(rng.normal(size=(2, *shape))), np.array([1, 1000])
    # About as large as they are initialised.
    params = jax.tree.map(
        lambda p: np.float32(rng.normal(size=p.shape) * np.prod(p.shape[:-1]) ** -0.5),
        jax.eval_shape(model.init, jax.random.key(1), x, t),
    )
    called = []
    monkeypatch.setattr(
        winograd, "conv3x3", lambda x, k, f=winograd.conv3x3: called.append(k.shape) or f(x, k)
    )
    actual = jax.jit(lambda p: model.apply(p, x, t))(params)
    assert (len(called) > 0) == (jax.default_backend() == "cpu")
    monkeypatch.setattr(layers, "convolution", jax.lax.conv_general_dilated)
    expected = jax.jit(lambda p: model.apply(p, x, t))(params)
    scale = float(jnp.std(expected))
    assert scale > 0.1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(scale, 1.0))
