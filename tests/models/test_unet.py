"""The UNet against a plain NumPy forward pass, written from the description of the authors' one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import UNet
from tests.exact import close
from tests.models.numpy_unet import cheap_key, dtypes_used, forward, random_params

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
    model, params, x, t, apply = network("other_output")

    @jax.jit
    def train(params, seed):
        rngs = {"dropout": cheap_key(seed)}
        return model.apply({"params": params}, x, t, train=True, rngs=rngs)

    first, again, other = (train(params, seed) for seed in (0, 0, 1))
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
    plain, params, x, t, unlabelled = network("other_output")
    model = plain.copy(num_classes=4)
    apply = jax.jit(lambda p, label: model.apply({"params": p}, x, t, label))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    assert shapes.keys() - params.keys() == {"label"}
    table = np.float32(np.random.default_rng(1).normal(size=(5, 24)))
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
    model, params, x, t, _ = network("other_output")
    params = params | {"label": {"embedding": np.ones((5, 24), np.float32)}}
    apply = jax.jit(lambda p, y: model.copy(num_classes=4).apply({"params": p}, x, t, y))
    found = np.asarray(apply(params, np.array([-1, 4, 5])))
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
    x = np.float32(np.random.default_rng(0).normal(size=(2, 4, 4, 1)))
    params = {"params": random_params(model, x, np.array([3, 3]))}
    apply = jax.jit(model.apply)
    assert (apply(params, x, 3) == apply(params, x, np.full(2, 3))).all()
    with pytest.raises(ValueError, match=r"expected images \[B, H, W, C\], got \(4, 4, 1\)"):
        apply(params, x[0], 3)


# --- bfloat16


def test_bfloat16_computes_in_it_what_may_be_and_the_rest_in_float32():
    model, params, x, t, _ = network("grey_square")
    model = model.copy(dtype=jnp.bfloat16)
    used = dtypes_used(lambda p: model.apply({"params": p}, x, t), params)
    assert used["conv_general_dilated"] == {"bfloat16", "float32"}  # the last
    assert used["dot_general"] == {"bfloat16"}
    assert used["rsqrt"] == {"float32"}  # norms
    assert used["reduce_sum"] == {"float32"}  # norms and softmax
    assert used["reduce_max"] == {"float32"}
    assert jax.eval_shape(lambda: model.apply({"params": params}, x, t)).dtype == jnp.float32
    initial = jax.eval_shape(model.init, jax.random.key(0), x, t)
    assert {p.dtype for p in jax.tree.leaves(initial)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_near_float32(name):
    model, params, x, t, apply = network(name)
    found = jax.jit(model.copy(dtype=jnp.bfloat16).apply)({"params": params}, x, t)
    exact = apply(params, x, t)
    error = jnp.sqrt(jnp.mean(jnp.square(found - exact)) / jnp.mean(jnp.square(exact)))
    assert 1e-4 < error < 0.04  # eight bits a number, a dozen layers
    # But what comes out is not rounded to them.
    assert (found != found.astype(jnp.bfloat16)).mean() > 0.9
