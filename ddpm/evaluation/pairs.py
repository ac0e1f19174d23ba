"""All pairs of two sets of feature vectors, [n, d], compared on the device in blocks.

Squared distances are |x|^2 + |y|^2 - 2 x.y in float32, about a common centre. What lies within
their rounding error of a decision is decided again on the host in float64, by the sum of squared
differences, which is 0 for copies and the same for a pair wherever it is met. So neighbours, balls
and ties are those of float64.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 2**25  # pairs at once: 128 MiB of float32
SPARE = 3  # candidates beyond those asked for, to see that no other can be nearer
MOST_TIED = 64  # candidates of a row that float64's own error leaves equal
_CACHED = 2**17  # numbers at once on the host


class Members(NamedTuple):
    """The members of two sets, x [n, d] and y [m, d], that lie in balls around those of the other.

    The surface of a ball counts for `precise` and `recalled` alone.
    """

    precise: np.ndarray  # bool[m]: y is in a ball of x
    balls: np.ndarray  # int[m]: how many balls of x it is in
    covered: np.ndarray  # bool[n]: the ball of x holds some y
    recalled: np.ndarray  # bool[n]: x is in a ball of y


class _Set(NamedTuple):
    """Vectors in float32, [n, d], and their squared lengths, [n]."""

    vectors: Any
    squares: Any


def kth_nearest(
    x: np.ndarray, y: np.ndarray | None = None, *, k: int = 1, below: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k-th nearest of y to each of x, or without y the k-th nearest other of x: its
    index, int[n], and its squared distance, float64[n].

    With k = 1 the first of equals. Where that is not less than `below`, float64[n], the distance is
    inf, which saves work.
    """
    own, others = y is None, x if y is None else y
    most = len(others) - own
    count = min(k + SPARE, most)
    (x_32, y_32), unit = _scaled(x, others)
    place, squared = np.zeros(len(x), int), np.full(len(x), np.inf)
    open_rows = []

    def lowest(part: _Set, start: int) -> Any:
        return _lowest(part, y_32, start, count=count, own=own)

    for block, (lower, found) in _blocks(lowest, x_32, len(others)):
        rows = np.arange(block.start, block.stop)
        lower, found = lower[: len(rows)] * unit, found[: len(rows)]
        if below is not None:
            near = lower[:, 0] < below[rows]
            rows, lower, found = rows[near], lower[near], found[near]
        place[rows], squared[rows] = _choose(x, rows, others, found, k)
        # All that were not found are at least as far as the last lower bound.
        sure = squared[rows] < lower[:, -1] if count < most else np.ones(len(rows), bool)
        open_rows.append(rows[~(sure | ((squared[rows] == 0) & (k > 1)))])
    rest = np.concatenate(open_rows)
    for first in range(0, len(rest), 1024):
        part = rest[first : first + 1024]
        found = _near_in_float64(x, part, others, k, own)
        place[part], squared[part] = _choose(x, part, others, found, k)
    if below is not None:
        squared[squared >= below] = np.inf
    return place, squared


def members(x: np.ndarray, x_radius: np.ndarray, y: np.ndarray, y_radius: np.ndarray) -> Members:
    """Returns which of x [n, d] and y [m, d] lie in balls of the other, of these squared radii,
    float64[n] and float64[m]."""
    (x_32, y_32), unit = _scaled(x, y)
    radii = [(radius / unit).astype(np.float32) for radius in (x_radius, y_radius)]
    found = Members(
        np.zeros(len(y), bool),
        np.zeros(len(y), int),
        np.zeros(len(x), bool),
        np.zeros(len(x), bool),
    )

    def sure(part: _Set, start: int) -> Any:
        of_part = np.full(len(part.squares), -1, np.float32)  # of rows beyond the last: no ball
        own = radii[0][start : start + len(of_part)]
        of_part[: len(own)] = own
        return _sure_members(part, of_part, y_32, radii[1])

    for rows, (covered, recalled, unsure, balls) in _blocks(sure, x_32, len(y)):
        n = rows.stop - rows.start
        found.covered[rows], found.recalled[rows] = covered[:n], recalled[:n]
        found.balls[:] += balls
        i, j = np.nonzero(unsure[:n])
        i += rows.start
        square = _exact(x, i, y, j)
        inside = square < x_radius[i]
        np.add.at(found.balls, j, inside)
        found.covered[i[inside]] = True
        found.precise[j[square <= x_radius[i]]] = True
        found.recalled[i[square <= y_radius[j]]] = True
    np.logical_or(found.precise, found.balls > 0, out=found.precise)
    return found


def _scaled(x: np.ndarray, y: np.ndarray) -> tuple[tuple[_Set, _Set], float]:
    """Returns both sets about the mean of the first, the longest vector of length 1, the second on
    the device; and the square of that length before."""
    centre = x.mean(axis=0)
    centred = [x - centre] if x is y else [x - centre, y - centre]
    squares = [np.einsum("nd,nd->n", z, z) for z in centred]
    unit = max(float(square.max()) for square in squares) or 1.0
    sets = [
        _Set(np.float32(z / np.sqrt(unit)), np.float32(square / unit))
        for z, square in zip(centred, squares, strict=True)
    ]
    return (sets[0], _Set(*map(jnp.asarray, sets[-1]))), unit


def _blocks(
    compare: Callable[[_Set, int], Any], x: _Set, others: int
) -> Iterator[tuple[slice, Any]]:
    """Yields (rows of x, what `compare` returns of these rows and the number of the first), in
    blocks of one shape: the last ends in rows of zeros. The device works one block ahead."""
    n = len(x.squares)
    size = -(-n // -(-n * others // BLOCK))
    before: tuple[slice, Any] | None = None
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        rest = size - (rows.stop - start)
        vectors = np.pad(x.vectors[rows], ((0, rest), (0, 0))) if rest else x.vectors[rows]
        block = _Set(vectors, np.pad(x.squares[rows], (0, rest)))
        now = rows, compare(block, start)
        if before is not None:
            yield before[0], jax.device_get(before[1])
        before = now
    if before is not None:
        yield before[0], jax.device_get(before[1])


def _error(dimension: int) -> float:
    """Returns a bound on the error of a squared distance in float32, over |x|^2 + |y|^2.

    Rounding accumulates over d products at most to 2^-24 d, in fact to about its square root.
    """
    return float((16 + min(dimension, 4096)) * 2.0**-23)


def _squares(x: _Set, y: _Set) -> tuple[jax.Array, jax.Array]:
    """Returns |x|^2 + |y|^2 and -2 x.y of all pairs, [n, m]."""
    # Squared lengths are given: on CPUs XLA would compute them again for each pair.
    norms = x.squares[:, None] + y.squares
    return norms, -2 * jnp.matmul(x.vectors, y.vectors.T, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("count", "own"))
def _lowest(
    x: _Set, y: _Set, start: jax.Array, *, count: int, own: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the `count` lowest lower bounds of squared distances in each row, and their places;
    the first row of x is number `start` of y if they are its own."""
    norms, products = _squares(x, y)
    lower = (1 - _error(x.vectors.shape[1])) * norms + products
    if own:
        rows, columns = map(jnp.arange, norms.shape)
        same = start + rows[:, None] == columns
        lower = jnp.where(same, jnp.inf, lower)
    values, places = jax.lax.top_k(-lower, count)
    return -values, places


@jax.jit
def _sure_members(
    x: _Set, x_radius: jax.Array, y: _Set, y_radius: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns covered, recalled, the pairs that float32 cannot tell, and the balls of x around each
    of y, the first three in rows of x; without those pairs."""
    norms, products = _squares(x, y)
    distance = norms + products
    error = _error(x.vectors.shape[1]) * norms
    far = [distance - radius for radius in (x_radius[:, None], y_radius)]
    slack = [error + 2.0**-22 * radius for radius in (x_radius[:, None], y_radius)]
    unsure = (jnp.abs(far[0]) <= slack[0]) | (jnp.abs(far[1]) <= slack[1])
    in_x, in_y = ((f < 0) & ~unsure for f in far)
    return in_x.any(axis=1), in_y.any(axis=1), unsure, in_x.sum(axis=0, dtype=jnp.int32)


def _choose(
    x: np.ndarray, rows: np.ndarray, y: np.ndarray, found: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k-th nearest of the candidates `found`, int[rows, c], of each row."""
    i = np.repeat(rows, found.shape[1])
    square = _exact(x, i, y, found.ravel()).reshape(found.shape)
    kth = np.lexsort((found, square), axis=-1)[:, k - 1 : k]
    place, nearest = (np.take_along_axis(z, kth, axis=1)[:, 0] for z in (found, square))
    return place, nearest


def _near_in_float64(
    x: np.ndarray, rows: np.ndarray, y: np.ndarray, k: int, own: bool
) -> np.ndarray:
    """Returns candidates for the k nearest of each row, int[rows, c]: all that float64 does not
    tell from the k-th, up to `MOST_TIED`, and those before it."""
    centre = x.mean(axis=0)
    part, y = x[rows] - centre, y - centre
    norms = np.square(part).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    square = norms - 2 * part @ y.T
    if own:
        square[np.arange(len(rows)), rows] = np.inf
    kth = np.partition(square, k - 1, axis=1)[:, k - 1 : k]
    near = square <= kth + (16 + x.shape[1]) * 2.0**-52 * norms
    count = min(int(near.sum(axis=1).max()), MOST_TIED + k)
    # Those that are not near come last, by their distance.
    return np.argsort(np.where(near, -1.0, square), axis=1, kind="stable")[:, :count]


def _exact(x: np.ndarray, i: np.ndarray, y: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Returns the squared distances of the pairs x[i], y[j], float64[pairs]."""
    square = np.empty(len(i))
    step = max(1, _CACHED // x.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        difference = x[i[part]] - y[j[part]]
        square[part] = np.einsum("pd,pd->p", difference, difference)
    return square
