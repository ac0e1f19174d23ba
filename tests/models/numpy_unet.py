"""The UNet in float64 NumPy, from descriptions of the authors' and of those with its options."""

import jax
import jax.extend
import numpy as np


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


def res_block(model, p, x, embedding, dropped, way=None):
    """`way`: "down" or "up" of BigGAN's blocks."""
    h = swish(norm(p["norm_1"], x, model.num_groups))
    if way:
        x, h = (pooled(a) if way == "down" else repeated(a) for a in (x, h))
    h = conv(p["conv_1"], h)
    time = linear(p["time"], swish(embedding))[:, None, None]
    if model.scale_shift:
        half = time.shape[-1] // 2
        h = norm(p["norm_2"], h, model.num_groups) * (1 + time[..., :half]) + time[..., half:]
    else:
        h = norm(p["norm_2"], h + time, model.num_groups)
    h = swish(h)
    h = conv(p["conv_2"], 0 * h if dropped else h)
    return (h + (linear(p["shortcut"], x) if "shortcut" in p else x)) * model.skip_scale


def pooled(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def repeated(x):
    return np.kron(x, np.ones((1, 2, 2, 1)))


def attention(model, p, x):
    out = np.empty_like(x)
    size = model.head_channels or x.shape[-1]
    for b, h in enumerate(norm(p["norm"], x, model.num_groups)):
        h = h.reshape(-1, h.shape[-1])
        q, k, v = (linear(p[name], h) for name in ("query", "key", "value"))
        heads = []
        for i in range(0, x.shape[-1], size):
            weights = np.exp(q[:, i : i + size] @ k[:, i : i + size].T / np.sqrt(size))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, i : i + size])
        out[b] = linear(p["out"], np.concatenate(heads, axis=1)).reshape(x.shape[1:])
    return (x + out) * model.skip_scale


def sinusoids(t, dimension):
    """Of the authors' t, which begins at 0."""
    half = dimension // 2
    frequencies = 10_000.0 ** (-np.arange(half) / (half - 1))
    angles = (np.float64(t) - 1)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def gaussian_features(t, dimension):
    """Of t in [0, 1]; the frequencies are as many draws of N(0, 16^2)."""
    frequencies = 16 * np.random.RandomState(0).randn(dimension // 2)
    angles = 2 * np.pi * np.float64(t)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def forward(model, p, x, t, dropped=False, label=None, condition=None, features=None):
    levels = len(model.channel_multipliers)
    if model.fourier_range:
        time = gaussian_features(t / model.fourier_range, model.channels)
    else:
        time = sinusoids(t, model.channels)
    embedding = linear(p["time_2"], swish(linear(p["time_1"], time)))
    if label is not None:
        embedding = embedding + p["label"]["embedding"][label]
    if features is not None:
        embedding = embedding + features @ p["features"]["kernel"]

    def block(name, h):
        h = res_block(model, p[name], h, embedding, dropped)
        here = f"{name}_attention" in p
        assert here == (min(h.shape[1:3]) in model.attention_resolutions)
        return attention(model, p[f"{name}_attention"], h) if here else h

    seen = [x]
    for n in model.input_exponents:
        seen += [np.sin(2**n * np.pi * x), np.cos(2**n * np.pi * x)]
    if condition is not None:
        seen.append(condition)
    h = conv(p["conv_in"], np.concatenate(seen, axis=3))
    stack = [h]
    for level in range(levels):
        for i in range(model.num_res_blocks):
            h = block(f"down_{level}_{i}", h)
            stack.append(h)
        if level < levels - 1:
            how = p[f"downsample_{level}"]
            if model.resample_in_blocks:
                h = res_block(model, how, h, embedding, dropped, "down")
            else:
                h = conv(how, h, stride=2)
            stack.append(h)
    h = res_block(model, p["middle_0"], h, embedding, dropped)
    h = attention(model, p["middle_attention"], h)
    h = res_block(model, p["middle_1"], h, embedding, dropped)
    for level in range(levels - 1, -1, -1):
        for i in range(model.num_res_blocks + 1):
            h = block(f"up_{level}_{i}", np.concatenate([h, stack.pop()], axis=3))
        if level:
            how = p[f"upsample_{level}"]
            if model.resample_in_blocks:
                h = res_block(model, how, h, embedding, dropped, "up")
            else:
                h = conv(how, repeated(h))
    assert not stack
    out = conv(p["conv_out"], swish(norm(p["norm_out"], h, model.num_groups)))
    if model.add_input:
        out[..., : x.shape[-1]] += x
    return out


def cheap_key(seed):
    """Of the generator that compiles fastest."""
    return jax.random.key(seed, impl="rbg")


def random_params(model, *inputs, seed=30, **more):
    """For every parameter, those of the zero layers too, random numbers that are not small."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **more))["params"]
    return jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape) * 0.4), shapes)


def dtypes_used(function, *arguments):
    """Of the first operand, by the operation's name, in all that the function computes."""
    used = {}
    for equation in _operations(jax.make_jaxpr(function)(*arguments).jaxpr):
        for operand in equation.invars[:1]:
            used.setdefault(equation.primitive.name, set()).add(operand.aval.dtype.name)
    return used


def _operations(jaxpr):
    """All equations, those of nested functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                    yield from _operations(getattr(inner, "jaxpr", inner))
