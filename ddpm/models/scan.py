"""A network's blocks one after another, and those of one shape compiled once by `lax.scan`.

The parameters stay those of the single blocks, of the same names, and are stacked where the network
is called: so checkpoints and exchanged weights know nothing of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.lift import pack
from flax.linen import transforms

Part = Callable[..., tuple[Any, Any]]  # (carry, x, name) -> (carry, y), as a body of `lax.scan`


def over_blocks(
    module: nn.Module,
    part: Part,
    names: Sequence[str],
    carry: Any,
    xs: Sequence[Any],
    *,
    scan: bool,
) -> tuple[Any, list[Any]]:
    """Returns what `part` makes of the carry and one x after another, and all ys.

    `part` is a function of a compact method, (carry, x, name) -> (carry, y), that makes the
    submodules of one block, whose names begin with the name that it is given. With scan=True blocks
    in a row of equal shapes are one `lax.scan`, in which dropout draws other random numbers.
    """
    ys: list[Any] = []
    for run in _runs(module, names, xs) if scan else [[i] for i in range(len(names))]:
        if len(run) == 1:
            carry, y = part(carry, xs[run[0]], names[run[0]])
            ys.append(y)
            continue
        first = names[run[0]]
        call = nn.compact(lambda _, carry, x, first=first: part(carry, x, first))
        lifted = transforms.lift_transform(_lifted, call, names=[names[i] for i in run])
        carry, outputs = lifted(module, carry, _stacked([xs[i] for i in run]))
        ys += [jax.tree.map(lambda y: y[i], outputs) for i in range(len(run))]  # noqa: B023
    return carry, ys


def _runs(module: nn.Module, names: Sequence[str], xs: Sequence[Any]) -> list[list[int]]:
    """Returns the numbers of blocks, those in a row together that are of the same shapes."""
    if module.is_initializing():
        return [[i] for i in range(len(names))]
    params = module.variables["params"]
    shapes = [
        jax.tree.map(jnp.shape, (_of_block(params, name), x))
        for name, x in zip(names, xs, strict=True)
    ]
    found: list[list[int]] = []
    for i in range(len(names)):
        if found and shapes[found[-1][0]] == shapes[i]:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _lifted(function: Callable[..., Any], names: Sequence[str]) -> Any:
    def inner(scope_of: Any, repack: Any, variables: Any, rngs: Any, carry: Any, xs: Any) -> Any:
        ((group,),) = variables
        blocks = _stacked([_of_block(group["params"], name) for name in names])

        def body(carry: Any, given: Any) -> Any:
            i, block, x = given
            renamed = {names[0] + rest: tree for rest, tree in block.items()}
            keys = jax.tree.map(lambda key: jax.random.fold_in(key, i), rngs)
            scope = scope_of((({**group, "params": renamed},),), keys)
            carry, y = function(scope, carry, x)
            return carry, (y, repack(scope))

        carry, (ys, changed) = jax.lax.scan(body, carry, (jnp.arange(len(names)), blocks, xs))
        return (carry, ys), changed

    return pack(inner, (True,), (True,), (True,), name="scan")


def _of_block(params: Any, name: str) -> dict[str, Any]:
    """Returns the parameters of a block's submodules, by what follows the block's name."""
    return {
        key.removeprefix(name): tree
        for key, tree in params.items()
        if key == name or key.startswith(f"{name}_")
    }


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
