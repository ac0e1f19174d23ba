"""Times and numbers of steps as they are given: of what type, and within which bounds."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_times(
    ends: tuple[float, float],
    t: jax.typing.ArrayLike,
    *,
    name: str = "t",
    noisy: bool = False,
) -> jax.Array:
    """Returns times as int32, or float32 where they are of a floating type, in the shape of t.

    A smaller type would wrap in t + 1 or 2 t. Raises ValueError for other types and, unless the
    values are traced, for a time outside the schedule's `ends`; 0, the data, is allowed too, but
    not with `noisy`.
    """
    known = not isinstance(t, jax.core.Tracer) and getattr(t, "is_fully_addressable", True)
    given: Any = np.asarray(t) if known else t  # by NumPy: int64 that int32 cannot hold is seen
    whole = jnp.issubdtype(given.dtype, jnp.integer)
    if not whole and not jnp.issubdtype(given.dtype, jnp.floating):
        raise ValueError(f"{name} is of {given.dtype}: must be integers or floats")
    first, last = ends
    if known:
        values = given.astype(np.float64)
        within = (values >= first) & (values <= last) | ((values == 0) & (not noisy))
        for wrong in values[~within].flat[:1]:
            or_data = "" if noisy or first == 0 else ", or 0 for the data"
            hint = "; whole steps are meant, not t/T" if 0 < wrong < first else ""
            raise ValueError(f"{name} = {wrong:g}: must be in {first:g}..{last:g}{or_data}{hint}")
    return jnp.asarray(given, jnp.int32 if whole else jnp.float32)


def step_times(
    ends: tuple[float, float], t: jax.typing.ArrayLike, s: jax.typing.ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the times t and s of a step down, as `as_times` does; s is t - 1 if None."""
    t = as_times(ends, t, noisy=True)
    return t, as_times(ends, t - 1 if s is None else s, name="s")


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Returns the value as an int. Raises ValueError for other types, and less than `least`."""
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if found < least:
        raise ValueError(f"{name} = {value}: must be a whole number >= {least}, of type int")
    return found
