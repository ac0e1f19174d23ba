"""The UNet against a plain NumPy forward pass, written from the description of the authors' one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from ddpm import UNet
from ddpm.models import unet
from ddpm.models.unet import GroupNorm, conv3x3, time_embedding
from tests.exact import close

# --- The oracle, in float64


def swish(x):
    return x / (1 + np.exp(-x))


def conv(p, x, stride=1):
    """3x3 cross-correlation; pads one pixel all round, or below and right for stride 2."""
    before = 1 if stride == 1 else 0
    x = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    rows, columns = ((n - 3) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), rows, columns, p["kernel"].shape[-1])) + p["bias"]
    for i in range(rows):
        for j in range(columns):
            patch = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[:, i, j] += np.tensordot(patch, p["kernel"], 3)
    return out


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x, groups):
    out = np.empty_like(x)
    size = x.shape[-1] // groups
    for g in range(groups):
        part = x[..., g * size : (g + 1) * size]
        mean, variance = (f(part, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
        out[..., g * size : (g + 1) * size] = (part - mean) / np.sqrt(variance + 1e-6)
    return out * p["scale"] + p["bias"]


def res_block(p, x, embedding, groups, dropped):
    h = conv(p["conv_1"], swish(norm(p["norm_1"], x, groups)))
    h = h + linear(p["time"], swish(embedding))[:, None, None]
    h = swish(norm(p["norm_2"], h, groups))
    h = conv(p["conv_2"], 0 * h if dropped else h)
    return h + (linear(p["shortcut"], x) if "shortcut" in p else x)


def attention(p, x, groups):
    out = np.empty_like(x)
    for b, h in enumerate(norm(p["norm"], x, groups)):
        h = h.reshape(-1, h.shape[-1])
        q, k, v = (linear(p[name], h) for name in ("query", "key", "value"))
        weights = np.exp(q @ k.T / np.sqrt(h.shape[-1]))
        weights /= weights.sum(1, keepdims=True)
        out[b] = linear(p["out"], weights @ v).reshape(x.shape[1:])
    return x + out


def sinusoids(t, dimension):
    """Of the authors' t, which begins at 0."""
    half = dimension // 2
    frequencies = 10_000.0 ** (-np.arange(half) / (half - 1))
    angles = (np.float64(t) - 1)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def forward(model, p, x, t, dropped=False, label=None):
    levels, groups = len(model.channel_multipliers), model.num_groups
    embedding = linear(p["time_1"], sinusoids(t, model.channels))
    embedding = linear(p["time_2"], swish(embedding))
    if label is not None:
        embedding = embedding + p["label"]["embedding"][label]

    def block(name, h):
        h = res_block(p[name], h, embedding, groups, dropped)
        here = f"{name}_attention" in p
        assert here == (min(h.shape[1:3]) in model.attention_resolutions)
        return attention(p[f"{name}_attention"], h, groups) if here else h

    h = conv(p["conv_in"], x)
    stack = [h]
    for level in range(levels):
        for i in range(model.num_res_blocks):
            h = block(f"down_{level}_{i}", h)
            stack.append(h)
        if level < levels - 1:
            h = conv(p[f"downsample_{level}"], h, stride=2)
            stack.append(h)
    h = res_block(p["middle_0"], h, embedding, groups, dropped)
    h = attention(p["middle_attention"], h, groups)
    h = res_block(p["middle_1"], h, embedding, groups, dropped)
    for level in range(levels - 1, -1, -1):
        for i in range(model.num_res_blocks + 1):
            h = block(f"up_{level}_{i}", np.concatenate([h, stack.pop()], axis=3))
        if level:
            h = conv(p[f"upsample_{level}"], np.kron(h, np.ones((1, 2, 2, 1))))
    assert not stack
    return conv(p["conv_out"], swish(norm(p["norm_out"], h, groups)))


def cheap_key(seed):
    """Of the generator that compiles fastest."""
    return jax.random.key(seed, impl="rbg")


# --- Tiny networks with all weights random, those of the zero layers too

TINY = {
    "grey_square": (
        UNet(4, (1, 2), 1, attention_resolutions=(4,), num_groups=2, dropout=0.5),
        (4, 4, 1),
    ),
    "colour_oblong": (
        UNet(4, (1, 1, 3), 2, attention_resolutions=(4, 1), num_groups=4, dropout=0.5),
        (8, 4, 3),
    ),
    "other_output": (
        UNet(6, (2,), 1, attention_resolutions=(), num_groups=3, dropout=0.5, out_channels=5),
        (3, 5, 2),
    ),
}


@functools.cache
def network(name):
    """A model, its weights and a batch."""
    model, image = TINY[name]
    rng = np.random.default_rng(30)
    x, t = np.float32(rng.normal(size=(3, *image))), np.array([1, 500, 1000])
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    params = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape) * 0.4), shapes)
    apply = jax.jit(lambda p, x, t: model.apply({"params": p}, x, t))
    return model, params, x, t, apply


@pytest.mark.parametrize("name", TINY)
def test_forward_pass(name):
    model, params, x, t, apply = network(name)
    expected = forward(model, jax.tree.map(np.float64, params), np.float64(x), t)
    found = apply(params, x, t)
    assert found.dtype == jnp.float32
    assert np.std(expected) > 0.1
    close(found, expected, rtol=1e-3, atol=1e-3 * np.std(expected))


def test_dropout_acts_before_the_second_convolution():
    """At a rate of 1 nothing but its bias is left of each block's branch."""
    model, params, x, t, _ = network("grey_square")
    model = model.copy(dropout=1.0)
    rngs = {"dropout": cheap_key(0)}
    found = jax.jit(lambda p: model.apply({"params": p}, x, t, train=True, rngs=rngs))(params)
    exact = jax.tree.map(np.float64, params)
    close(found, forward(model, exact, np.float64(x), t, dropped=True), rtol=1e-3, atol=1e-3)


def test_dropout_only_in_training():
    model, params, x, t, apply = network("grey_square")

    @jax.jit
    def train(seed):
        rngs = {"dropout": cheap_key(seed)}
        return model.apply({"params": params}, x, t, train=True, rngs=rngs)

    first, again, other = train(0), train(0), train(1)
    assert (first == again).all()
    assert (first != other).any()
    assert (first != apply(params, x, t)).any()


@pytest.mark.parametrize("name", TINY)
def test_examples_do_not_see_each_other(name):
    _, params, x, t, apply = network(name)
    plain = apply(params, x, t)
    others = np.concatenate([x[:1], 5 * x[1:] + 1]), np.array([1, 3, 70])
    assert (apply(params, *others)[0] == plain[0]).all()
    assert (apply(params, *others)[1:] != plain[1:]).all()
    order = np.array([2, 0, 1])
    close(apply(params, x[order], t[order]), plain[order], rtol=1e-5, atol=1e-5)


def test_time_and_every_pixel_matter_everywhere():
    """A skip or an attention left out would cut the middle off from the far corner."""
    _, params, x, t, apply = network("colour_oblong")
    plain = apply(params, x, t)
    corner = x.copy()
    corner[:, -1, -1] += 1
    assert (apply(params, corner, t) != plain).all()
    assert (apply(params, x, t - np.array([0, 1, 1]))[1:] != plain[1:]).all()


def test_label_is_a_vector_added_to_the_time_embedding():
    """One for each class, and the last for 'no label', which is what no label means."""
    plain, params, x, t, unlabelled = network("grey_square")
    model = plain.copy(num_classes=4)
    apply = jax.jit(lambda p, label: model.apply({"params": p}, x, t, label))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    assert shapes.keys() - params.keys() == {"label"}
    table = np.float32(np.random.default_rng(1).normal(size=(5, 16)))
    assert shapes["label"]["embedding"].shape == table.shape
    params = params | {"label": {"embedding": table}}
    label = np.array([3, 0, 4])
    expected = forward(model, jax.tree.map(np.float64, params), np.float64(x), t, label=label)
    found = apply(params, label)
    close(found, expected, rtol=1e-3, atol=1e-3 * np.std(expected))
    without = apply(params, np.array([4, 4, 4]))
    assert (apply(params, None) == without).all()
    assert (apply(params, np.array(4)) == without).all()  # one for all
    assert (without[2] == found[2]).all()
    assert (without[:2] != found[:2]).any(axis=(1, 2, 3)).all()
    # The rest is the network without labels.
    zero = params | {"label": {"embedding": 0 * table}}
    close(apply(zero, label), unlabelled(zero, x, t), rtol=1e-5, atol=1e-5)


def test_a_label_that_is_none_of_them_is_nan_and_never_another():
    model, params, x, t, _ = network("grey_square")
    params = params | {"label": {"embedding": np.ones((5, 16), np.float32)}}
    apply = jax.jit(lambda y: model.copy(num_classes=4).apply({"params": params}, x, t, y))
    found = np.asarray(apply(np.array([-1, 4, 5])))
    assert np.isnan(found[[0, 2]]).all()
    assert np.isfinite(found[1]).all()
    with pytest.raises(ValueError, match=r"without classes \(num_classes = 0\) takes no label"):
        model.apply({"params": params}, x, t, np.array([0, 1, 2]))


# --- The paper's networks


@pytest.mark.parametrize(
    ("model", "size", "parameters"),
    [
        (UNet(), 32, 35_746_307),
        (UNet(128, (1, 1, 2, 2, 4, 4), 2, dropout=0.0), 256, 113_673_219),
    ],
    ids=["cifar10", "lsun256"],
)
def test_number_of_parameters_of_the_paper(model, size, parameters):
    x, t = jnp.zeros((1, size, size, 3)), jnp.ones(1, int)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    assert sum(p.size for p in jax.tree.leaves(shapes)) == parameters


def test_initial_weights():
    """Uniform with variance scale/fan_avg, the scale of zero layers 1e-10; biases 0."""
    model = UNet(32, (1,), 1, attention_resolutions=(), num_groups=8)
    x, t = jnp.ones((2, 4, 4, 3)), jnp.array([1, 1000])
    out, params = jax.jit(model.init_with_output)(cheap_key(0), x, t)
    params = params["params"]
    zero_layers = 0
    for path, p in jax.tree_util.tree_flatten_with_path(params)[0]:
        *_, layer, kind = (key.key for key in path)
        if kind != "kernel":
            assert (p == (kind == "scale")).all()
            continue
        zero = layer in ("conv_2", "conv_out") or (layer == "out" and "attention" in path[-3].key)
        zero_layers += zero
        fans = np.prod(p.shape[:-2]) * np.array(p.shape[-2:])
        std = np.sqrt((1e-10 if zero else 1) / fans.mean())
        assert abs(p).max() <= std * np.sqrt(3) * 1.0001
        close(p.std(), std, rtol=4 / np.sqrt(p.size))
    assert zero_layers == 1 + 2 + 2 + 1 + 1  # down, middle, up; attention; out
    # Next to nothing comes out at first.
    assert 0 < abs(out).max() < 1e-4


# --- Parts


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


# --- What cannot be built


def build(model, height=8, width=8, channels=3):
    x, t = jnp.zeros((2, height, width, channels)), jnp.ones(2, int)
    return jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x, t)[0])


SMALL = UNet(8, (1, 2), 1, attention_resolutions=(4,), num_groups=4)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (8, 12), (14, 8)])
def test_any_channels_and_oblong_sizes(height, width, channels):
    assert build(SMALL, height, width, channels).shape == (2, height, width, channels)


@pytest.mark.parametrize(("height", "width"), [(8, 7), (9, 8), (5, 5)])
def test_size_that_cannot_be_halved_is_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} cannot be halved 1 times"):
        build(SMALL, height, width)


@pytest.mark.parametrize("resolutions", [(16,), (4, 2), (3,)])
def test_attention_never_reached_is_refused(resolutions):
    with pytest.raises(ValueError, match=r"never reached: the levels of 8x8 images are \[8, 4\]"):
        build(SMALL.copy(attention_resolutions=resolutions))


@pytest.mark.parametrize(("channels", "groups", "named"), [(8, 3, 8), (8, 16, 8), (12, 8, 12)])
def test_channels_that_do_not_divide_into_groups_are_refused(channels, groups, named):
    with pytest.raises(ValueError, match=f"{named} channels do not divide"):
        build(SMALL.copy(channels=channels, num_groups=groups, channel_multipliers=(1, 1)))


def test_one_time_for_all_and_nothing_but_batches_of_images():
    model = UNet(channels=8, channel_multipliers=(1,), attention_resolutions=(), num_groups=4)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    params = model.init(jax.random.key(1), x, 3)
    params = jax.tree.map(lambda p: p + 0.1, params)
    assert (model.apply(params, x, 3) == model.apply(params, x, jnp.full(2, 3))).all()
    with pytest.raises(ValueError, match=r"expected images \[B, H, W, C\], got \(4, 4, 1\)"):
        model.apply(params, x[0], 3)


@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (12, 4), (6, 1), (4, 4)])
def test_group_norm_is_that_of_flax(channels, groups):
    """Values and all gradients, of data off centre; the groups next to each other."""
    x, g = jax.random.normal(jax.random.key(0), (2, 3, 5, 4, channels)) * 2
    x += jnp.arange(channels)
    scale, bias = jax.random.normal(jax.random.key(1), (2, channels))
    results = []
    for norm in (GroupNorm(groups), nn.GroupNorm(groups, epsilon=1e-6)):
        params = {"scale": scale, "bias": bias}
        value, pull = jax.vjp(lambda p, x, norm=norm: norm.apply({"params": p}, x), params, x)
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
        value, pull = jax.vjp(unet.attention, q, k, v)
        results.append((value, *pull(g)))
    weights = scipy.special.softmax(np.einsum("bqc,bkc->bqk", q, k) / 6**0.5, axis=-1)
    close(results[0][0], np.einsum("bqk,bkc->bqc", weights, v), rtol=1e-4, atol=1e-4 * size)
    # A gradient is a difference of products of three of the four.
    for cpu, other in zip(*results, strict=True):
        close(cpu, other, rtol=1e-4, atol=2e-6 * size**3)


# --- bfloat16


def operations(jaxpr):
    """All equations, those of nested functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                    yield from operations(getattr(inner, "jaxpr", inner))


def test_bfloat16_computes_in_it_what_may_be_and_the_rest_in_float32():
    model, params, x, t, _ = network("grey_square")
    model = model.copy(dtype=jnp.bfloat16)
    trace = jax.make_jaxpr(lambda p: model.apply({"params": p}, x, t))(params)
    used = {}
    for equation in operations(trace.jaxpr):
        for x_in in equation.invars[:1]:
            used.setdefault(equation.primitive.name, set()).add(x_in.aval.dtype.name)
    assert used["conv_general_dilated"] == {"bfloat16"}
    assert used["dot_general"] == {"bfloat16"}
    assert used["rsqrt"] == {"float32"}  # norms
    assert used["reduce_sum"] == {"float32"}  # norms and softmax
    assert used["reduce_max"] == {"float32"}
    assert trace.out_avals[0].dtype == jnp.float32
    initial = jax.eval_shape(model.init, jax.random.key(0), x, t)
    assert {p.dtype for p in jax.tree.leaves(initial)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_near_float32(name):
    model, params, x, t, apply = network(name)
    found = model.copy(dtype=jnp.bfloat16).apply({"params": params}, x, t)
    exact = apply(params, x, t)
    error = jnp.sqrt(jnp.mean(jnp.square(found - exact)) / jnp.mean(jnp.square(exact)))
    assert 1e-4 < error < 0.04  # eight bits a number, a dozen layers


def test_norm_of_bfloat16_far_from_zero():
    """Squares of 300 lose, in bfloat16, the variance of 1 beside them."""
    x = (300 + jax.random.normal(cheap_key(0), (1, 64, 64, 4))).astype(jnp.bfloat16)
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    found = GroupNorm(2).apply({"params": params}, x)
    assert found.dtype == jnp.bfloat16
    close(found.astype(jnp.float32), norm(params, np.float64(x), 2), rtol=0, atol=0.1)
