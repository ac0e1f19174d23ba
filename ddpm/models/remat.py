"""Rematerialization: parts of a network whose activations the backward pass computes again.

(Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".) `flax.linen.remat` keeps apart
what is computed again by an optimization barrier, which XLA removes on CPUs before it orders
operations: there it computes all of it early and holds it, and memory stays as it was. So the
backward pass of a part is written out here, with what each kind of device needs to do it late.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.lift import pack
from flax.linen import transforms

REMAT = ("none", "blocks", "full")


def rematerialized(module: type[nn.Module]) -> Callable[..., nn.Module]:
    """Returns the class of modules that keep only their inputs for the backward pass.

    Of the inputs arrays are given by place, all else by name. Outputs, parameters, their names and
    random numbers are the same. In reverse mode only, of parameters that exist already.
    """
    lifted: Callable[..., nn.Module] = transforms.lift_transform(_lifted, module, uses=None)
    return lifted


def rematerialized_within(
    module: nn.Module, part: Callable[..., Any], uses: Callable[[str], bool]
) -> Callable[..., Any]:
    """Returns the part of a compact method, as `rematerialized` of a module.

    `part` is a function that makes those submodules of the module whose names `uses` is True of.
    """

    @nn.compact
    def call(module: nn.Module, *arrays: Any, **static: Any) -> Any:
        return part(*arrays, **static)

    lifted = transforms.lift_transform(_lifted, call, uses=uses)
    return functools.partial(lifted, module)


def _lifted(function: Callable[..., Any], uses: Callable[[str], bool] | None) -> Any:
    def inner(
        scope_of: Any, repack: Any, variables: Any, rngs: Any, *arrays: Any, **static: Any
    ) -> Any:
        # Not the other parameters, whose zero gradients would be added up part by part.
        used = jax.tree_util.tree_map_with_path(
            lambda path, x: x if uses is None or uses(path[3].key) else None, variables
        )

        def compute(variables: Any, rngs: Any, arrays: Any) -> Any:
            scope = scope_of(variables, rngs)
            return function(scope, *arrays, **static), repack(scope)

        # Traced once: a second trace would count on in flax's numbers of dropouts.
        compute, outer = jax.closure_convert(compute, used, rngs, arrays)

        def within(rngs: Any, variables: Any, arrays: Any, outer: Any) -> Any:
            return compute(variables, rngs, arrays, *outer)

        return keeping_inputs(within)(rngs, used, arrays, outer)

    return pack(inner, (True,), (True,), (True,), name="remat", enable_kwargs=True)


def keeping_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns function(rngs, *inputs) that keeps no more than its arguments for the backward pass.

    The backward pass itself is such a function too, so that derivatives of every order, as those of
    an energy's gradient, take as little memory.
    """

    @jax.custom_vjp
    def kept(rngs: Any, *inputs: Any) -> Any:
        return function(rngs, *inputs)

    def forward(rngs: Any, *inputs: Any) -> Any:
        return kept(rngs, *inputs), (rngs, inputs)

    def backward(given: Any, cotangent: Any) -> Any:
        def gradient(rngs: Any, *inputs: Any) -> Any:
            *at, cotangent = inputs
            return jax.vjp(functools.partial(function, rngs), *at)[1](cotangent)

        rngs, inputs = given
        return None, *late(keeping_inputs(gradient), rngs, *inputs, cotangent)

    kept.defvjp(forward, backward)
    return kept


def late(gradient: Callable[..., Any], *given: Any) -> Any:
    """Computes gradient(*given), of which the last is the cotangent, no earlier than it is there.

    On a CPU in a branch that is taken if the cotangent's first number is finite; else all is NaN,
    as gradients of such a cotangent are in any case.
    """
    if jax.default_backend() != "cpu":
        return gradient(*jax.lax.optimization_barrier(given))
    first = jax.tree.leaves(given[-1])[0].ravel()[0]
    shapes = jax.eval_shape(gradient, *given)
    nan = lambda *_: jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)  # noqa: E731
    return jax.lax.cond(jnp.isfinite(first), gradient, nan, *given)
