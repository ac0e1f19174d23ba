"""Networks whose output is the gradient of an energy, and the derivatives that training takes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import DiT, EnergyNetwork, UNet
from ddpm.models import winograd
from ddpm.models.energy import denoising, inner_product, norm
from ddpm.models.layers import conv3x3, embed, time_embedding
from ddpm.models.remat import rematerialized, rematerialized_within
from ddpm.models.unet import AttentionBlock, ResBlock, doubled, halved
from tests.exact import close
from tests.models.numpy_unet import cheap_key

FORMS = {"denoising": denoising, "inner_product": inner_product, "norm": norm}


class Layers(nn.Module):
    """The UNet's layers, one of each kind, in a tenth of its operations.

    With `remat` the first block, and a part of the attention alone, are computed again.
    """

    remat: bool = False

    @nn.compact
    def __call__(self, x, t, train=False):
        again = self.remat and train
        embedding = embed(time_embedding(jnp.asarray(t), 4), None, None, size=4, num_classes=0,
                          num_features=0, dtype=x.dtype)  # fmt: skip
        attend = lambda h: AttentionBlock(2, head_channels=4, name="attention")(h)  # noqa: E731
        if again:
            attend = rematerialized_within(self, attend, lambda name: name == "attention")
        h = conv3x3(4, "conv_in", dtype=x.dtype)(x)
        of_blocks = rematerialized(ResBlock) if again else ResBlock
        block = of_blocks(8, 0.1, 2, scale_shift=True, resample=halved, name="block_0")
        h = attend(block(h, embedding, train=train))
        block = ResBlock(4, 0.1, 2, resample=doubled, name="block_1")
        h = block(h, embedding, train=train)
        return conv3x3(1, "conv_out", dtype=x.dtype)(h)


NETWORKS = {"layers": Layers(), "dit": DiT(channels=4, depth=1, head_channels=2, dropout=0.1)}
X = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
T = np.array([3, 40])


class Linear(nn.Module):
    """f(x) = A x, of x [B, D]; zero at first."""

    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(x.shape[-1], use_bias=False, kernel_init=nn.initializers.zeros)(x)


def test_gradients_are_those_of_the_forms():
    """(I - A^T)(x - A x), A x + A^T x and A^T (1 + A x), and what is trained from A = 0 on."""
    rng = np.random.default_rng(1)
    x, a = rng.normal(size=(3, 5)), rng.normal(size=(5, 5))
    f = x @ a.T
    expected = {
        "denoising": (((x - f) ** 2).sum(1) / 2, (x - f) @ (np.eye(5) - a)),
        "inner_product": ((x * f).sum(1), f + x @ a),
        "norm": (((1 + f) ** 2).sum(1) / 2, (1 + f) @ a),
    }
    start = {"denoising": x, "inner_product": 0 * x, "norm": 0 * x}
    for name, form in FORMS.items():
        model = EnergyNetwork(Linear(), form)

        def found(kernel, x, model=model):
            at = {"params": {"Dense_0": {"kernel": kernel}}}
            return model.apply(at, x, 1, method="energy"), model.apply(at, x, 1)

        @jax.jit
        def everything(kernel, x, model=model, found=found):
            loss = lambda kernel: jnp.square(found(kernel, x)[1] - 1).sum()  # noqa: E731
            zero = model.init(jax.random.key(0), x, 1)["params"]["Dense_0"]["kernel"]
            return found(kernel, x), zero, found(zero, x)[1], jax.grad(loss)(zero)

        (energy, eps), zero, begin, descent = everything(np.float32(a.T), np.float32(x))
        close(energy, expected[name][0], rtol=1e-5)
        close(eps, expected[name][1], rtol=1e-5, atol=1e-5)
        assert not zero.any()
        close(begin, start[name], rtol=1e-6)
        assert (np.abs(descent) > 1e-3).all()


def at_random(model):
    """Parameters that are not small, of the names and shapes of the model's."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X, T)
    return jax.tree.map(lambda s: np.float32(0.3 * rng.normal(size=s.shape)), shapes)


def test_parameters_are_those_of_the_network_alone():
    network = UNet(channels=4, num_groups=2, channel_multipliers=(1, 2), attention_resolutions=())
    plain, model = at_random(network), at_random(EnergyNetwork(network, denoising))
    assert jax.tree.structure(plain) == jax.tree.structure(model)
    network = NETWORKS["dit"]
    init = jax.jit(lambda model: model.init(cheap_key(0), X, T), static_argnums=0)
    plain, model = init(network), init(EnergyNetwork(network, denoising))
    jax.tree.map(np.testing.assert_array_equal, plain, model)


def test_only_an_energys_eps_has_a_symmetric_jacobian():
    """The Jacobian by x of a small UNet is the energy's Hessian."""
    network = UNet(channels=4, num_groups=2, dropout=0.0, channel_multipliers=(1,),
                   num_res_blocks=1, attention_resolutions=())  # fmt: skip
    params = at_random(network)

    @jax.jit
    def jacobians(x, share):
        # One program for all: a sum of the forms, with a share of 1 for one of them.
        form = lambda x, f: sum(s * e(x, f) for s, e in zip(share, FORMS.values(), strict=True))  # noqa: E731
        flat = lambda model: lambda v: model.apply(params, v.reshape(1, 4, 4, 1), T[:1]).ravel()  # noqa: E731
        return [jax.jacfwd(flat(model))(x) for model in (network, EnergyNetwork(network, form))]

    asymmetry = lambda j: np.abs(j - j.T).max() / np.abs(j).max()  # noqa: E731
    for share in np.eye(len(FORMS), dtype=np.float32):
        plain, of_energy = jacobians(X[0].ravel(), share)
        assert asymmetry(plain) > 0.1
        assert asymmetry(of_energy) < 1e-4


@functools.cache
def trained(network):
    """A loss of the energy's gradient with dropout, its gradient by the parameters, and the change
    of the loss along one direction of them: by that gradient, and by central differences."""
    model = EnergyNetwork(network, inner_product)
    params, rng = at_random(model), np.random.default_rng(3)
    along = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)
    how = {"train": True, "rngs": {"dropout": cheap_key(1)}}

    @jax.jit
    def everything(params, h):
        loss = lambda p: jnp.mean(X[::-1] * model.apply(p, X, T, **how))  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        near = jax.tree.map(lambda p, d: jnp.stack([p + h * d, p - h * d]), params, along)
        high, low = jax.lax.map(loss, near)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, along)))
        return value, grads, slope, (high - low) / (2 * h)

    return everything(params, np.float32(3e-4))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_by_parameters_of_the_gradient_by_x(name):
    _, _, slope, difference = trained(NETWORKS[name])
    assert abs(slope) > 0.01
    close(slope, difference, rtol=2e-2)


def test_it_is_the_same_when_computed_again():
    value, grads, slope, _ = trained(Layers())
    again, others, same, _ = trained(Layers(remat=True))
    close((again, same), (value, slope), rtol=1e-4)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-5 * largest), others, grads)


def test_second_derivatives_of_winograds_convolution_are_the_plain_ones():
    rng = np.random.default_rng(4)
    x, kernel, v = (
        np.float32(rng.normal(size=s)) for s in ((2, 5, 4, 3), (3, 3, 3, 2), (2, 5, 4, 3))
    )

    def plain(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def second(conv):
        along = lambda k: (jax.grad(lambda x: jnp.sin(conv(x, k)).sum())(x) * v).sum()  # noqa: E731
        return jax.grad(along)(kernel)

    found, expected = jax.jit(lambda: (second(winograd.conv3x3), second(plain)))()
    close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_output_of_another_shape_is_refused():
    model = EnergyNetwork(DiT(channels=4, depth=1, head_channels=2, out_channels=2), denoising)
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 2\), is not of the shape of x.*variance"):
        jax.eval_shape(model.init, jax.random.key(0), X, T)
