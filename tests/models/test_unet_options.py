"""The UNet's options, each alone and all together, against the same NumPy forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import UNet
from tests.exact import close
from tests.models.numpy_unet import cheap_key, dtypes_used, forward, random_params

PLAIN = UNet(4, (1, 2), 1, attention_resolutions=(2,), num_groups=2, dropout=0.5)
IMAGE = (4, 6, 2)
OPTIONS = {
    "scale_shift": {"scale_shift": True},
    "skip_scale": {"skip_scale": 0.5**0.5},
    "resblock": {"resample_in_blocks": True},
    "fourier": {"fourier_range": 1000.0},
    "waves": {"input_exponents": (0, 3)},
    "input": {"add_input": True},
    "heads": {"head_channels": 4},  # two of them
    "condition": {"condition_channels": 3},
    "features": {"num_features": 3},
    "classes": {"num_classes": 4},
}
OPTIONS["all"] = {k: v for option in list(OPTIONS.values()) for k, v in option.items()}
OPTIONS["all_three_levels"] = OPTIONS["all"] | {
    "channel_multipliers": (1, 1, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (8, 2),
    "out_channels": 5,
}


@functools.cache
def network(name):
    """A model, its weights, and the arguments and those by name of a call."""
    model = PLAIN.copy(**OPTIONS[name])
    rng = np.random.default_rng(31)
    image = (8, 12, 2) if name == "all_three_levels" else IMAGE
    x, t = np.float32(rng.normal(size=(3, *image))), np.array([1, 500, 1000])
    conditions = {}
    if model.condition_channels:
        shape = (*x.shape[:3], model.condition_channels)
        conditions["condition"] = np.float32(rng.normal(size=shape))
    if model.num_features:
        conditions["features"] = np.float32(rng.normal(size=(3, model.num_features)))
    if model.num_classes:
        conditions["label"] = np.array([3, 0, 4])
    apply = jax.jit(lambda p, x, t, conditions: model.apply({"params": p}, x, t, **conditions))
    return model, random_params(model, x, t), (x, t), conditions, apply


def expected_of(model, params, arguments, conditions):
    x, t = arguments
    exact = {k: v if k == "label" else np.float64(v) for k, v in conditions.items()}
    return forward(model, jax.tree.map(np.float64, params), np.float64(x), t, **exact)


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_pass(name):
    model, params, arguments, conditions, apply = network(name)
    expected = expected_of(model, params, arguments, conditions)
    found = apply(params, *arguments, conditions)
    assert found.dtype == jnp.float32
    assert found.shape == (*arguments[0].shape[:3], model.out_channels or 2)
    assert np.std(expected) > 0.1
    close(found, expected, rtol=0, atol=1e-4 * np.std(expected))


# --- What is not given


def test_no_condition_no_features_and_no_label_are_zeros_and_the_last_label():
    model, params, arguments, conditions, apply = network("all")
    nothing = {k: np.zeros_like(v) for k, v in conditions.items()}
    nothing["label"] = np.full(3, model.num_classes)
    zeros = np.asarray(apply(params, *arguments, nothing))
    close(apply(params, *arguments, {}), zeros, rtol=1e-5, atol=1e-5)
    # And each is seen, everywhere, where it is not.
    for key, value in conditions.items():
        found = np.asarray(apply(params, *arguments, nothing | {key: value}))
        changed = (found != zeros).all(axis=(1, 2, 3))
        assert changed.tolist() == [True, True, key != "label"]  # the third's label is none


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("condition", {"condition": (3, 4, 6, 2)}, r"\(3, 4, 6, 2\): must be \(3, 4, 6, 3\)"),
        ("condition", {"condition": (1, 4, 6, 3)}, r"\(1, 4, 6, 3\): must be \(3, 4, 6, 3\)"),
        ("condition", {"condition": (3, 6, 4, 3)}, r"\(3, 6, 4, 3\): must be \(3, 4, 6, 3\)"),
        ("heads", {"condition": (3, 4, 6, 1)}, r"\(3, 4, 6, 1\): must be \(3, 4, 6, 0\)"),
        ("features", {"features": (3, 2)}, r"features of shape \(3, 2\): must be \[B, 3\]"),
        ("features", {"features": (3,)}, r"features of shape \(3,\): must be \[B, 3\]"),
        ("heads", {"features": (3, 3)}, r"without features \(num_features = 0\) takes none"),
        ("heads", {"label": (3,)}, r"without classes \(num_classes = 0\) takes no label"),
    ],
)
def test_what_the_network_does_not_take_is_refused(name, wrong, said):
    model, params, arguments, _, _ = network(name)
    conditions = {k: jnp.zeros(shape, int if k == "label" else None) for k, shape in wrong.items()}
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda: model.apply({"params": params}, *arguments, **conditions))


@pytest.mark.parametrize(("channels", "refused"), [(8, 4), (3, 4), (4, 0), (2, 0)])
def test_heads_must_divide_the_channels_where_there_is_attention(channels, refused):
    """Of 4 and 8 channels, with attention at the second alone, or at both."""
    everywhere = PLAIN.copy(head_channels=channels, attention_resolutions=(4, 2))
    build = lambda model: jax.eval_shape(  # noqa: E731
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *IMAGE)), jnp.ones(1, int))
    )
    if refused:
        with pytest.raises(ValueError, match=f"channels do not divide .* = {channels}"):
            build(everywhere)
    else:
        build(everywhere)
    if channels == 8:
        build(everywhere.copy(attention_resolutions=(2,)))


# --- The shapes of parameters


def shapes_of(name):
    return {
        "/".join(key.key for key in path): p.shape
        for path, p in jax.tree_util.tree_flatten_with_path(network(name)[1])[0]
    }


@pytest.fixture(scope="module")
def plain():
    x, t = np.zeros((1, *IMAGE), np.float32), np.ones(1, int)
    params = random_params(PLAIN, x, t)
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(key.key for key in path): p.shape for path, p in flat}


def test_a_scale_and_a_shift_for_each_channel(plain):
    found = shapes_of("scale_shift")
    changed = {name for name in plain if plain[name] != found[name]}
    assert found.keys() == plain.keys()
    blocks = {name.split("/")[0] for name in plain if name.endswith("conv_2/kernel")}
    assert len(blocks) == 2 + 2 + 4
    assert changed == {f"{b}/time/{kind}" for b in blocks for kind in ("kernel", "bias")}
    for name in changed:
        assert found[name] == (*plain[name][:-1], 2 * plain[name][-1])
    added = sum(np.prod(found[n]) - np.prod(plain[n]) for n in plain)
    # Blocks of 4 channels: one down, two up; of 8: one down, two in the middle, two up.
    assert added == (16 + 1) * (3 * 4 + 5 * 8)


def test_blocks_in_the_place_of_the_convolutions_that_resample(plain):
    found = shapes_of("resblock")
    resampling = ("downsample_0/", "upsample_1/")
    rest = {n: s for n, s in plain.items() if not n.startswith(resampling)}
    assert rest == {n: s for n, s in found.items() if not n.startswith(resampling)}
    for name, channels in (("downsample_0", 4), ("upsample_1", 8)):
        block = {n.split("/", 1)[1]: s for n, s in found.items() if n.startswith(name)}
        square, vector = (3, 3, channels, channels), (channels,)
        assert block == {
            "norm_1/scale": vector,
            "norm_1/bias": vector,
            "conv_1/kernel": square,
            "conv_1/bias": vector,
            "time/kernel": (16, channels),
            "time/bias": vector,
            "norm_2/scale": vector,
            "norm_2/bias": vector,
            "conv_2/kernel": square,
            "conv_2/bias": vector,
        }


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("skip_scale", {}),
        ("fourier", {}),
        ("heads", {}),
        ("waves", {"conv_in/kernel": (3, 3, 2 * (1 + 4), 4)}),
        ("condition", {"conv_in/kernel": (3, 3, 2 + 3, 4)}),
        ("features", {"features/kernel": (3, 16)}),
        ("classes", {"label/embedding": (5, 16)}),
    ],
)
def test_all_else_changes_no_more_than_its_own_layer(plain, name, added):
    assert shapes_of(name) == plain | added


# --- What else holds of every network


def test_blocks_begin_as_their_skips():
    """The zero layers: of the whole network next to nothing comes out, but for x if it is added."""
    model, _, arguments, given, _ = network("all")

    @jax.jit
    def output(key, x, t, given):
        return model.init_with_output(key, x, t, **given)[0]

    assert 0 < abs(output(cheap_key(0), *arguments, given) - arguments[0]).max() < 1e-4


def test_dropout_only_in_training_and_in_the_blocks_that_resample_too():
    """At a rate of 1 nothing but its bias is left of each block's branch."""
    model, params, arguments, conditions, _ = network("all")
    model = model.copy(dropout=1.0)
    how = {"train": True, "rngs": {"dropout": cheap_key(0)}}
    found = jax.jit(lambda p: model.apply({"params": p}, *arguments, **conditions, **how))(params)
    x, t = arguments
    exact = jax.tree.map(np.float64, params)
    expected = forward(model, exact, np.float64(x), t, dropped=True, **conditions)
    close(found, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_is_near_float32():
    model, params, arguments, conditions, apply = network("all")
    brief = model.copy(dtype=jnp.bfloat16)
    found = jax.jit(lambda p: brief.apply({"params": p}, *arguments, **conditions))(params)
    exact = apply(params, *arguments, conditions)
    assert found.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(found - exact)) / jnp.mean(jnp.square(exact)))
    assert 1e-4 < error < 0.05
    used = dtypes_used(lambda p: brief.apply({"params": p}, *arguments, **conditions), params)
    assert used["conv_general_dilated"] == {"bfloat16", "float32"}  # the last
    assert used["dot_general"] == {"bfloat16"}
    assert used["rsqrt"] == used["sin"] == used["cos"] == {"float32"}
