"""The chosen candidates against trying all in float64; their statistics, and the length of their
code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm.codec import randomness, reverse_channel
from ddpm.codec.trellis import Target, kl
from tests.exact import close

KEY = jnp.asarray([5, 9], jnp.uint32)


def target(variance, dimensions, batch):
    mean = np.random.default_rng(0).normal(size=(batch, dimensions)) * np.sqrt(1 - variance)
    return Target(jnp.float32(mean), jnp.full(mean.shape, variance, jnp.float32))


def test_the_candidate_with_the_least_arrival_over_weight_is_sent():
    """Three chunks of 10 bits in 20 dimensions, by the densities of SciPy."""
    aim = target(0.4, 20, batch=3)
    indices = reverse_channel.encode(KEY, aim, 30)
    assert indices.shape == (3, 3)
    sent = reverse_channel.decode(KEY, indices, 20)
    rows = jnp.arange(4096, dtype=jnp.uint32)
    for chunk, (begin, end) in enumerate([(0, 6), (6, 13), (13, 20)]):
        z = np.asarray(randomness.normals(KEY, jnp.uint32(chunk), rows, 7))[:, : end - begin]
        arrivals = np.asarray(reverse_channel._arrivals(KEY, jnp.uint32(chunk), rows), np.float64)
        for b in range(3):
            m, v = (np.asarray(x, np.float64)[b, begin:end] for x in aim)
            weight = stats.norm.logpdf(z, m, np.sqrt(v)) - stats.norm.logpdf(z)
            rank = np.log(arrivals) - weight.sum(axis=1)
            chosen = int(indices[b, chunk])
            assert rank[chosen] <= rank.min() + 1e-4
            np.testing.assert_array_equal(sent[b, begin:end], z[chosen])
    assert len(np.unique(indices)) > 3


def test_arrivals_are_a_poisson_process():
    times = [
        reverse_channel._arrivals(KEY, jnp.uint32(k), jnp.arange(1000, dtype=jnp.uint32))
        for k in range(2)
    ]
    for found in times:
        assert stats.kstest(np.diff(found, prepend=0), "expon").pvalue > 0.01
    assert abs(times[0][-1] - times[1][-1]) > 1


def test_with_candidates_enough_what_is_sent_is_a_draw_from_the_target():
    """2^11 candidates for 3 bits of KL, by 2000 keys; of the candidates, the first are preferred,
    so that their code takes no more than the KL and what the theorem adds."""
    m, v = np.array([1.2, -0.4, 0.7]), 0.25
    aim = Target(jnp.float32(m[None]), jnp.full((1, 3), v, jnp.float32))
    bits = float(kl(aim)[0]) / np.log(2)
    keys = jnp.stack([jnp.full(2000, 3), jnp.arange(2000)], axis=1).astype(jnp.uint32)

    def send(key):
        index = reverse_channel.encode(key, aim, 9)
        return index[0], reverse_channel.decode(key, index, 3)[0]

    indices, z = jax.jit(lambda keys: jax.lax.map(send, keys, batch_size=40))(keys)
    residual = (np.asarray(z) - m) / np.sqrt(v)
    for i in range(3):
        assert stats.kstest(residual[:, i], "norm").pvalue > 0.01
    assert abs(np.corrcoef(residual.T) - np.eye(3)).max() < 0.07
    mean_log = np.log2(np.asarray(indices) + 1).mean()
    # E log2 k <= KL + log2(e + 1)/e for the Poisson functional representation.
    assert bits - 1 < mean_log < bits + np.log2(np.e + 1) / np.e


def test_the_code_is_of_all_candidates_and_none_more():
    every = jnp.arange(1 << 7)[:, None]
    lengths = np.asarray(reverse_channel.code_length(every, 5), np.float64)
    close((2.0**-lengths).sum(), 1, rtol=1e-5)
    assert (np.diff(lengths) > 0).all()
    # 30 bits are three chunks of 10; the lengths are summed.
    two = reverse_channel.code_length(jnp.asarray([[0, 3, 7]]), 30)
    each = [reverse_channel.code_length(jnp.asarray([[k]]), 10)[0] for k in (0, 3, 7)]
    close(two, [sum(each)], rtol=1e-5)


def test_the_code_costs_about_the_kl_and_the_residual_is_too_wide():
    """The bias that makes this coder worse than its code length says."""
    aim = target(0.6, 120, batch=16)
    bits = float(kl(aim).mean()) / np.log(2)
    indices = reverse_channel.encode(KEY, aim, bits)
    length = float(reverse_channel.code_length(indices, bits).mean())
    assert bits < length < 1.25 * bits
    z = reverse_channel.decode(KEY, indices, 120)
    assert 1.02 < float(((z - aim.mean) / np.sqrt(0.6)).var()) < 1.3


def test_what_cannot_be_sent_is_refused():
    aim = target(0.5, 2, batch=1)
    with pytest.raises(ValueError, match="29 bits for 2 dimensions: must be at most 14 for each"):
        reverse_channel.encode(KEY, aim, 29)
    for wrong in (0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"num_bits = .*: must be a number > 0"):
            reverse_channel.encode(KEY, aim, wrong)
        with pytest.raises(ValueError, match=r"num_bits = .*: must be a number > 0"):
            reverse_channel.code_length(jnp.zeros((1, 1), int), wrong)
    with pytest.raises(ValueError, match=r"3 chunks of 2 dimensions: must be 1\.\.2"):
        reverse_channel.decode(KEY, jnp.zeros((1, 3), int), 2)
