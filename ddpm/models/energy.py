"""Energies: a network's scalar E(x, t), whose gradient by x takes the place of its output.

    model = ddpm.EnergyNetwork(ddpm.UNet(...), energy.denoising)
    eps = model.apply({"params": params}, x, t)  # grad E, in the shape of x
    e = model.apply({"params": params}, x, t, method="energy")  # E, float32[B]

A network f alone is a vector field that need not be the gradient of anything. Here it is, of one
scalar that f gives in one of three **forms** (Salimans & Ho 2021; Du et al. 2023), all sums over
the dimensions of an example:

    denoising       |x - f|^2 / 2     gradient (I - J^T)(x - f)     at f = 0: x
    inner_product   <x, f>            gradient f + J^T x            at f = 0: 0
    norm            |1 + f|^2 / 2     gradient J^T (1 + f)          at f = 0: 0

J is the Jacobian of f by x. Our networks begin at f = 0. `denoising` is then eps = x, which is
right at t = T already. The other two begin at eps = 0; of |f|^2 / 2 itself the derivative by every
parameter would be zero there, and training would never begin, hence the 1: it is that energy of a
network whose last bias begins at one.

All are energies of a density that falls off, log q(x_t) = -E(x_t, t) / sigma_t + c(t) where eps is
predicted: `ddpm.energy.density` has that.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# (x [B, ...], f(x, t) [B, ...]) -> E [B]
Form = Callable[[jax.Array, jax.Array], jax.Array]


def denoising(x: jax.Array, f: jax.Array) -> jax.Array:
    """Returns |x - f|^2 / 2 of each example, [B]: the error of f as an autoencoder."""
    return _sum(jnp.square(x - f)) / 2


def inner_product(x: jax.Array, f: jax.Array) -> jax.Array:
    """Returns <x, f> of each example, [B]."""
    return _sum(x * f)


def norm(x: jax.Array, f: jax.Array) -> jax.Array:
    """Returns |1 + f|^2 / 2 of each example, [B]: of f alone, and not dead at f = 0."""
    return _sum(jnp.square(1 + f)) / 2


def _sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=tuple(range(1, x.ndim)))


class EnergyNetwork(nn.Module):
    """A network in whose output's place is the gradient by x of an energy.

    It is called as the network is, and its parameters are the network's, by name and shape. Labels
    and other inputs condition the energy, E(x, t | label, ..). With dropout, a call's energy is
    that of one draw of it. It costs a forward and a backward pass, and training their derivative.

    Attributes:
      network: (x, t, label, ..) -> array of x's shape; float32, for the gradient by x passes
        through all layers.
      form: (x, f) -> E [B], one of those above.
    """

    network: nn.Module
    form: Form

    def setup(self) -> None:
        nn.share_scope(self, self.network)

    def energy(self, x: jax.Array, t: jax.Array, *args: Any, **how: Any) -> jax.Array:
        """Computes E(x, t): x [B, ...], t [B] (or one for all) -> float32[B].

        Raises ValueError for a network whose output is not of x's shape.
        """
        return self._function(t, *args, **how)(x)

    def __call__(self, x: jax.Array, t: jax.Array, *args: Any, **how: Any) -> jax.Array:
        """Computes grad E(x, t) by x, in the shape of x; all else as the network."""
        energy = self._function(t, *args, **how)
        if self.is_initializing():
            energy(x)
            return x
        return jax.grad(lambda x: energy(x).sum())(x)

    def _function(self, *args: Any, **how: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns x -> E, which JAX may differentiate: outside of Flax's scopes."""
        if self.is_initializing():
            network: Any = self.network
        else:
            module, variables = self.network.unbind()
            rngs = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else None
            network = functools.partial(module.apply, variables, rngs=rngs)

        def energy(x: jax.Array) -> jax.Array:
            f = network(x, *args, **how)
            if f.shape != x.shape:
                raise ValueError(
                    f"the network's output, {f.shape}, is not of the shape of x, {x.shape}: an "
                    "energy has no place for a learned variance"
                )
            return self.form(x, f)

        return energy
