"""Chunked reverse channel coding: the other way to send a sample of a Gaussian, as a baseline.

Encoder and decoder share candidates z_1, z_2, .. of the prior N(0, I). The encoder chooses the one
with the least S_k / w_k, where w_k is the ratio of the target's density to the prior's at z_k and
S_1 < S_2 < .. are the times of a Poisson process: of endless candidates it is an exact draw from
the target (the Poisson functional representation, Li & El Gamal 2018), and its number k is small
enough to cost little more than the KL by a Zipf code. As the candidates needed are 2^KL, the
dimensions are cut into chunks of at most 14 bits of KL, each with 2^(KL + 2) candidates (Theis &
Ahmed 2022; DiffC, Vonderfecht & Liu 2025).

The bits that each chunk costs more, about log2(KL + 1), and the bias of finitely many candidates
are what `trellis` saves, whose functions these resemble.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.codec import randomness, trellis
from ddpm.codec.trellis import Target

_MOST_BITS = 14  # of KL in a chunk
_MORE_BITS = 2  # log2 of the candidates over 2^KL
_ARRIVALS = np.uint32(1 << 31)  # blocks of random words from here on are no candidates


def encode(key: jax.Array, target: Target, num_bits: float) -> jax.Array:
    """Returns the number of the chosen candidate of each chunk, int32[B, chunks], from 0.

    num_bits: the expected KL(target || prior), which gives the chunks and their candidates. Takes
    time in proportion to 2^14 D. Raises ValueError unless 0 < num_bits <= 14 D.
    """
    chunks, each = _chunks(num_bits)
    dimensions = target.mean.shape[-1]
    if chunks > dimensions:
        raise ValueError(
            f"{num_bits:g} bits for {dimensions} dimensions: must be at most {_MOST_BITS} for each"
        )
    weights = trellis.in_blocks(trellis.score_weights(target), chunks)  # [chunks, B, 2, width]
    candidates = jnp.arange(_num_candidates(each), dtype=jnp.uint32)

    def choose(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        chunk, weight = given
        z = randomness.normals(key, chunk, candidates, weight.shape[-1])
        log_ratio = weight[:, 0] @ z.T + weight[:, 1] @ (z**2).T  # [B, candidates]
        return (jnp.log(_arrivals(key, chunk, candidates)) - log_ratio).argmin(axis=1)

    return jax.lax.map(choose, (jnp.arange(chunks, dtype=jnp.uint32), weights)).T


def decode(key: jax.Array, indices: jax.Array, dimensions: int) -> jax.Array:
    """Returns z, float32[B, dimensions], of the chosen candidates: the same on every machine.

    Raises ValueError for more chunks than dimensions.
    """
    chunks = indices.shape[-1]
    if not 1 <= chunks <= dimensions:
        raise ValueError(f"{chunks} chunks of {dimensions} dimensions: must be 1..{dimensions}")
    places = trellis.block_places(dimensions, chunks)
    numbers = jnp.arange(chunks, dtype=jnp.uint32)
    width, rows = places.shape[1], indices.astype(jnp.uint32)
    z = jax.vmap(lambda k, row: randomness.normals(key, k, row, width), (0, 1), 1)(numbers, rows)
    flat = jnp.zeros((len(indices), dimensions + 1)).at[:, places].set(z)
    return flat[:, :dimensions]


def code_length(indices: jax.Array, num_bits: float) -> jax.Array:
    """Returns the bits of the chunks' numbers by a Zipf code, float32[B].

    P(k) ~ k^-(1 + 1/(KL + log2(e + 1)/e)) for the k-th candidate of a chunk with that many bits of
    KL (Theis & Ahmed 2022), over as many candidates as there are. An ideal entropy coder's length.
    """
    _, each = _chunks(num_bits)
    exponent = 1 + 1 / (each + math.log2(math.e + 1) / math.e)
    total = (np.arange(1.0, _num_candidates(each) + 1) ** -exponent).sum()
    bits = exponent * jnp.log2(jnp.asarray(indices + 1, jnp.float32)) + math.log2(total)
    return bits.sum(axis=-1)


def _chunks(num_bits: float) -> tuple[int, float]:
    """Returns the number of chunks, and the bits of KL of each."""
    if not 0 < num_bits < math.inf:
        raise ValueError(f"num_bits = {num_bits}: must be a number > 0")
    chunks = math.ceil(num_bits / _MOST_BITS)
    return chunks, num_bits / chunks


def _num_candidates(bits: float) -> int:
    return math.ceil(2 ** (bits + _MORE_BITS))


def _arrivals(key: jax.Array, chunk: jax.Array, candidates: jax.Array) -> jax.Array:
    """Returns the times of a Poisson process of rate 1, float32: only the encoder's concern, which
    may be another in its last bit on another machine."""
    high = jnp.broadcast_to(_ARRIVALS + chunk, candidates.shape)
    words, _ = randomness.threefry(key, (high, candidates))
    return jnp.cumsum(-jnp.log((words.astype(jnp.float32) + 0.5) * 2.0**-32))
