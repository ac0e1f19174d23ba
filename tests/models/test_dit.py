"""DiT against a plain NumPy forward pass, written from the paper (Peebles & Xie 2023)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import DiT
from ddpm.models.dit import DiTBlock, positions
from tests.exact import close
from tests.models.numpy_unet import (
    cheap_key,
    dtypes_used,
    gaussian_features,
    linear,
    random_params,
    swish,
)

# --- The paper's network in float64, one example and one token at a time


def of_place(place, size):
    """Sines, then cosines, of a place; frequencies 1, .., just above 1e-4."""
    angles = [place / 10_000 ** (2 * i / size) for i in range(size // 2)]
    return [*map(np.sin, angles), *map(np.cos, angles)]


def of_time(model, t):
    """256 sinusoids, of the index that begins at 0; or random features."""
    if model.fourier_range:
        return gaussian_features([t / model.fourier_range], 256)[0]
    angles = (t - 1) * np.exp(-np.log(10_000) * np.arange(128) / 128)
    return np.concatenate([np.cos(angles), np.sin(angles)])


def normal(token):
    """A layer norm without parameters."""
    return (token - token.mean()) / np.sqrt(token.var() + 1e-6)


def gelu(x):
    """By the hyperbolic tangent, as the paper's code has it."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attend(p, tokens, size):
    q, k, v = (linear(p[name], tokens) for name in ("query", "key", "value"))
    out = np.zeros_like(tokens)
    for head in range(0, tokens.shape[1], size):
        part = slice(head, head + size)
        for n in range(len(tokens)):
            weights = np.exp(k[:, part] @ q[n, part] / np.sqrt(size))
            out[n, part] = weights @ v[:, part] / weights.sum()
    return linear(p["out"], out)


def forward_one(model, p, x, t, label=None, condition=None, features=None, dropped=False):
    """x [H, W, C] -> [H, W, out_channels]."""
    embedding = linear(p["time_2"], swish(linear(p["time_1"], of_time(model, t))))
    if label is not None:
        embedding = embedding + p["label"]["embedding"][label]
    if features is not None:
        embedding = embedding + features @ p["features"]["kernel"]
    embedding = swish(embedding)

    seen = [x]
    for n in model.input_exponents:
        seen += [np.sin(2**n * np.pi * x), np.cos(2**n * np.pi * x)]
    seen = np.concatenate(seen if condition is None else [*seen, condition], axis=2)
    side, half = model.patch_size, model.channels // 2
    tokens, corners = [], []
    for row in range(0, x.shape[0], side):
        for column in range(0, x.shape[1], side):
            patch = seen[row : row + side, column : column + side]
            place = of_place(column // side, half) + of_place(row // side, half)
            tokens.append(linear(p["patches"], patch.ravel()) + place)
            corners.append((row, column))
    tokens = np.array(tokens)

    for i in range(model.depth):
        block = p[f"block_{i}"]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = np.split(
            linear(block["modulation"], embedding), 6
        )
        h = np.array([normal(token) * (1 + scale) + shift for token in tokens])
        tokens = tokens + gate * attend(block, h, model.head_channels or model.channels)
        h = np.array([normal(token) * (1 + scale_mlp) + shift_mlp for token in tokens])
        h = gelu(linear(block["mlp_1"], h))
        tokens = tokens + gate_mlp * linear(block["mlp_2"], 0 * h if dropped else h)

    shift, scale = np.split(linear(p["modulation_out"], embedding), 2)
    channels = model.out_channels or x.shape[2]
    out = np.full((*x.shape[:2], channels), np.nan)
    for (row, column), token in zip(corners, tokens, strict=True):
        found = linear(p["out"], normal(token) * (1 + scale) + shift)
        out[row : row + side, column : column + side] = found.reshape(side, side, channels)
    if model.add_input:
        out[..., : x.shape[2]] += x
    return out


def forward(model, params, x, t, conditions, dropped=False):
    exact = jax.tree.map(np.float64, params)
    each = [{k: v[i] for k, v in conditions.items()} for i in range(len(x))]
    return np.array([
        forward_one(model, exact, np.float64(x[i]), t[i], dropped=dropped, **each[i])
        for i in range(len(x))
    ])  # fmt: skip


# --- Tiny networks with all weights random, those that begin at zero too

TINY = {
    "plain": (DiT(patch_size=2, channels=8, depth=1, head_channels=0, dropout=0.5), (4, 6, 1)),
    "heads": (DiT(patch_size=3, channels=12, depth=2, head_channels=4), (9, 6, 3)),
    "all": (
        DiT(
            patch_size=2,
            channels=8,
            depth=2,
            head_channels=4,
            out_channels=5,
            num_classes=4,
            condition_channels=3,
            num_features=2,
            fourier_range=1000.0,
            input_exponents=(0, 3),
            add_input=True,
            dropout=0.5,
        ),
        (4, 6, 2),
    ),
}


@functools.cache
def network(name):
    """A model, its weights, and the arguments and those by name of a call."""
    model, image = TINY[name]
    rng = np.random.default_rng(32)
    x, t = np.float32(rng.normal(size=(3, *image))), np.array([1, 500, 1000])
    conditions = {}
    if name == "all":
        conditions["condition"] = np.float32(rng.normal(size=(3, *image[:2], 3)))
        conditions["features"] = np.float32(rng.normal(size=(3, 2)))
        conditions["label"] = np.array([3, 0, 4])
    apply = jax.jit(lambda p, x, t, conditions: model.apply({"params": p}, x, t, **conditions))
    return model, random_params(model, x, t), (x, t), conditions, apply


@pytest.mark.parametrize("name", TINY)
def test_forward_pass(name):
    model, params, arguments, conditions, apply = network(name)
    expected = forward(model, params, *arguments, conditions)
    found = apply(params, *arguments, conditions)
    assert found.dtype == jnp.float32
    assert np.std(expected) > 0.1
    # Nearer than GELU and its approximation are to each other.
    close(found, expected, rtol=0, atol=2e-4 * np.std(expected))


def test_no_condition_no_features_and_no_label_are_zeros_and_the_last_label():
    _, params, arguments, conditions, apply = network("all")
    nothing = {k: np.zeros_like(v) for k, v in conditions.items()} | {"label": np.full(3, 4)}
    zeros = np.asarray(apply(params, *arguments, nothing))
    close(apply(params, *arguments, {}), zeros, rtol=1e-5, atol=1e-5)
    for key, value in conditions.items():
        found = np.asarray(apply(params, *arguments, nothing | {key: value}))
        changed = (found != zeros).all(axis=(1, 2, 3))
        assert changed.tolist() == [True, True, key != "label"]  # the third's label is none


@pytest.mark.parametrize("name", TINY)
def test_examples_do_not_see_each_other(name):
    _, params, (x, t), conditions, apply = network(name)
    plain = np.asarray(apply(params, x, t, conditions))
    others = np.concatenate([x[:1], 5 * x[1:] + 1]), np.array([1, 3, 70])
    found = np.asarray(apply(params, *others, conditions))
    assert (found[0] == plain[0]).all()
    assert (found[1:] != plain[1:]).all()
    order = np.array([2, 0, 1])
    moved = apply(params, x[order], t[order], {k: v[order] for k, v in conditions.items()})
    close(moved, plain[order], rtol=1e-5, atol=1e-5)


def test_time_and_every_pixel_matter_everywhere_and_places_differ():
    _, params, (x, t), conditions, apply = network("heads")
    plain = apply(params, x, t, conditions)
    corner = x.copy()
    corner[:, -1, -1] += 1
    assert (apply(params, corner, t, conditions) != plain).all()
    assert (apply(params, x, t - np.array([0, 1, 1]), conditions)[1:] != plain[1:]).all()
    # Of equal patches, without positions, all tokens would be the same.
    same = np.asarray(apply(params, np.tile(x[:, :3, :3], (1, 3, 2, 1)), t, conditions))
    patches = same.reshape(3, 3, 3, 2, 3, 3).swapaxes(2, 3).reshape(3, 6, -1)
    for i in range(6):
        for j in range(i):
            assert (patches[:, i] != patches[:, j]).any(axis=1).all()


def test_positions():
    """Half of the column, half of the row, the sines before the cosines; row by row."""
    found = positions(3, 5, 8)
    assert found.dtype == np.float32
    for row in range(3):
        for column in range(5):
            expected = [
                np.sin(column), np.sin(column / 100), np.cos(column), np.cos(column / 100),
                np.sin(row), np.sin(row / 100), np.cos(row), np.cos(row / 100),
            ]  # fmt: skip
            close(found[5 * row + column], expected, rtol=1e-6, atol=1e-7)


def test_one_time_and_one_label_for_all():
    _, params, (x, _), conditions, apply = network("all")
    found = apply(params, x, np.array(7), conditions | {"label": np.array(2)})
    expected = apply(params, x, np.full(3, 7), conditions | {"label": np.full(3, 2)})
    close(found, expected, rtol=1e-6, atol=1e-6)


# --- As it begins


def test_the_network_begins_at_zero_and_each_block_as_the_identity():
    model, _, arguments, conditions, _ = network("all")
    begin = jax.jit(lambda key, x, t, conditions: model.init_with_output(key, x, t, **conditions))
    out, params = begin(cheap_key(0), *arguments, conditions)
    assert out.shape == (3, 4, 6, 5)
    x = arguments[0]
    assert (out[..., :2] == x).all()  # which is added
    assert (out[..., 2:] == 0).all()
    params = params["params"]
    for path, p in jax.tree_util.tree_flatten_with_path(params)[0]:
        *above, layer, kind = (key.key for key in path)
        if kind == "kernel" and layer not in ("modulation", "modulation_out", "features"):
            if layer == "out" and not above:  # the last
                assert (p == 0).all()
                continue
            # Uniform, with variance 2/(fan-in + fan-out).
            std = np.sqrt(2 / sum(p.shape))
            assert abs(p).max() <= std * np.sqrt(3) * 1.0001
            close(p.std(), std, rtol=6 / np.sqrt(p.size))
        elif kind != "embedding" and layer != "features":
            assert (p == 0).all(), path
    x, embedding = jax.random.normal(cheap_key(1), (2, 6, 8)), jnp.ones((2, 8))
    block = DiTBlock(2, 0.0)
    found, _ = jax.jit(lambda *xs: block.init_with_output(*xs, False))(cheap_key(2), x, embedding)
    assert (found == x).all()


PAPER = {
    "S": ({"depth": 12, "channels": 384, "head_channels": 64}, "33M"),
    "B": ({"depth": 12, "channels": 768, "head_channels": 64}, "130M"),
    "L": ({"depth": 24, "channels": 1024, "head_channels": 64}, "458M"),
    "XL": ({}, "675M"),
}


@pytest.mark.parametrize("name", PAPER)
def test_number_of_parameters_of_the_paper(name):
    """Those of DiT-S/2 to DiT-XL/2 at latents of 32x32x4, 1000 classes, a learned variance."""
    size, parameters = PAPER[name]
    model = DiT(**size, num_classes=1000, out_channels=8)
    x, t = jnp.zeros((1, 32, 32, 4)), jnp.ones(1, int)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    found = sum(p.size for p in jax.tree.leaves(shapes))
    assert f"{found / 1e6:.0f}M" == parameters
    if name == "XL":  # that of the authors' own, which counts the fixed positions too
        assert found + positions(16, 16, model.channels).size == 675_129_632


# --- In training, and in bfloat16


def test_dropout_acts_within_the_perceptrons_and_in_training_only():
    model, params, arguments, conditions, apply = network("all")

    @functools.partial(jax.jit, static_argnums=2)
    def train(params, seed, rate):
        how = {"train": True, "rngs": {"dropout": cheap_key(seed)}}
        return model.copy(dropout=rate).apply({"params": params}, *arguments, **conditions, **how)

    # At a rate of 1 nothing but the second layer's bias is left of each perceptron.
    expected = forward(model, params, *arguments, conditions, dropped=True)
    close(train(params, 0, 1.0), expected, rtol=1e-3, atol=1e-3 * np.std(expected))
    first, again, other = (train(params, seed, 0.5) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert (first != apply(params, *arguments, conditions)).any()


def test_bfloat16_is_near_float32():
    model, params, arguments, conditions, apply = network("all")
    model = model.copy(dtype=jnp.bfloat16)
    found = jax.jit(lambda p: model.apply({"params": p}, *arguments, **conditions))(params)
    exact = apply(params, *arguments, conditions)
    assert found.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(found - exact)) / jnp.mean(jnp.square(exact)))
    assert 1e-4 < error < 0.05
    used = dtypes_used(lambda p: model.apply({"params": p}, *arguments, **conditions), params)
    assert used["dot_general"] == {"bfloat16", "float32"}  # the last layer
    assert used["tanh"] == {"bfloat16"}
    # Norms, the softmax, and the waves of time and input.
    for operation in ("rsqrt", "reduce_sum", "reduce_max", "sin", "cos"):
        assert used[operation] == {"float32"}, operation
    initial = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    assert {p.dtype for p in jax.tree.leaves(initial)} == {jnp.dtype("float32")}


# --- What cannot be built, or is not taken


def build(model, height=8, width=8, **conditions):
    x, t = jnp.zeros((2, height, width, 3)), jnp.ones(2, int)
    init = lambda: model.init_with_output(jax.random.key(0), x, t, **conditions)[0]  # noqa: E731
    return jax.eval_shape(init)


SMALL = DiT(patch_size=2, channels=8, depth=1, head_channels=4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 8), (10, 4)])
def test_oblong_sizes(height, width):
    assert build(SMALL, height, width).shape == (2, height, width, 3)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 7, 2), (9, 8, 2), (8, 8, 3), (2, 2, 4)])
def test_sides_that_do_not_divide_into_patches_are_refused(height, width, size):
    said = f"images of {height}x{width} do not divide into patches of patch_size = {size}"
    with pytest.raises(ValueError, match=said):
        build(SMALL.copy(patch_size=size), height, width)


def test_channels_are_refused_that_do_not_divide_by_four_or_into_heads():
    with pytest.raises(ValueError, match="10 channels: a transformer's must be divisible by 4"):
        build(SMALL.copy(channels=10, head_channels=5))
    with pytest.raises(ValueError, match=r"8 channels do not divide into heads .* = 3"):
        build(SMALL.copy(head_channels=3))


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"label": np.zeros(2, int)}, r"without classes \(num_classes = 0\) takes no label"),
        ({"features": np.zeros((2, 3))}, r"without features \(num_features = 0\) takes none"),
        ({"condition": np.zeros((2, 8, 8, 1))}, r"\(2, 8, 8, 1\): must be \(2, 8, 8, 0\)"),
    ],
)
def test_what_the_network_does_not_take_is_refused(conditions, said):
    with pytest.raises(ValueError, match=said):
        build(SMALL, **conditions)


def test_nothing_but_batches_of_images():
    _, params, (x, _), conditions, apply = network("plain")
    with pytest.raises(ValueError, match=r"expected images \[B, H, W, C\], got \(4, 6, 1\)"):
        apply(params, x[0], 3, conditions)
