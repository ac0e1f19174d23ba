"""Shared random numbers against JAX's cipher; the trellis against all sequences, and its rate."""

import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm.codec import randomness, trellis

KEY = jnp.asarray([3, 7], jnp.uint32)


def target(variance, dimensions, batch=8, seed=0):
    """Means as data N(0, I) have them in a step that leaves this variance."""
    mean = np.random.default_rng(seed).normal(size=(batch, dimensions)) * np.sqrt(1 - variance)
    return trellis.Target(jnp.asarray(mean, jnp.float32), jnp.full(mean.shape, variance))


def test_the_cipher_is_threefry():
    counter = jnp.arange(8, dtype=jnp.uint32)
    ours = jnp.concatenate(randomness.threefry(KEY, (counter[:4], counter[4:])))
    np.testing.assert_array_equal(ours, jax.extend.random.threefry_2x32(KEY, counter))


def test_numbers_are_normal_and_do_not_depend_on_their_company():
    rows = jnp.arange(1000, dtype=jnp.uint32)
    z = randomness.normals(KEY, jnp.uint32(5), rows, 50)
    assert stats.kstest(np.asarray(z).ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(np.asarray(z)[:, :4].T) - np.eye(4)).max() < 0.1
    one = randomness.normals(KEY, jnp.uint32(5), rows[77:78], 50)
    np.testing.assert_array_equal(one[0], z[77])
    other = randomness.normals(KEY, jnp.uint32(6), rows[77:78], 50)
    assert (other != one).mean() > 0.99
    # Files are read by these very numbers: they may not change.
    digest = hashlib.sha256(np.asarray(z, "<f4").tobytes()).hexdigest()
    assert digest == "52b196325bbdb21d37691a09aae96ca0278949fa24a8cba9cadb3fa596944f78"
    with pytest.raises(ValueError, match="width = 0"):
        randomness.normals(KEY, jnp.uint32(5), rows, 0)


def test_a_permutation_has_each_place_once():
    order = np.asarray(randomness.permutation(KEY, 100))
    assert sorted(order) == list(range(100))
    assert abs(stats.spearmanr(order, range(100)).statistic) < 0.3


@pytest.mark.parametrize(("num_bits", "nu"), [(10, 3), (6, 6), (6, 14)])
def test_the_bits_are_the_best_of_all(num_bits, nu):
    """Viterbi's search from a state that it has estimated finds the best of the 2^n sequences, or
    one close to it; trying all finds it."""
    aim = target(0.5, 12, batch=4)
    every = jnp.asarray(list(itertools.product([False, True], repeat=num_bits)))
    z = trellis.decode(KEY, every, 12, nu)
    m, v = aim
    scores = (z[None] * (m / v)[:, None] + z[None] ** 2 * (0.5 - 0.5 / v)[:, None]).sum(-1)
    found = trellis.decode(KEY, trellis.encode(KEY, aim, num_bits, nu), 12, nu)
    score = (found * (m / v) + found**2 * (0.5 - 0.5 / v)).sum(-1)
    ranks = np.asarray((scores > score[:, None] + 1e-4).sum(axis=1))
    assert (ranks == 0).mean() >= (1.0 if num_bits <= nu else 0.75)
    assert ranks.max() <= 0.02 * len(every)


def test_what_is_sent_looks_like_a_draw_from_the_target():
    """The residual is N(0, v) to a few percent, with 1.15 bits for each of the KL."""
    aim = target(0.7, 512)
    bits = 1.15 * float(trellis.kl(aim).mean()) / np.log(2)
    sent = trellis.encode(KEY, aim, round(bits), nu=8)
    z = trellis.decode(KEY, sent, 512, nu=8)
    residual = np.asarray((z - aim.mean) / np.sqrt(0.7))
    assert abs(residual.var() - 1) < 0.05
    assert abs(residual.mean()) < 0.05
    assert abs((residual * aim.mean).mean() / aim.mean.std()) < 0.05
    assert stats.kstest(residual.ravel(), "norm").pvalue > 0.01
    # Of half of the bits it is not.
    few = trellis.encode(KEY, aim, round(bits / 2), nu=8)
    residual = (trellis.decode(KEY, few, 512, nu=8) - aim.mean) / np.sqrt(0.7)
    assert float(residual.var()) > 1.1


def test_the_oldest_and_the_newest_bit_flip_the_sign():
    """So the two ways on from a state are opposite, and the two that meet in the next."""
    nu, n = 5, 12
    bits = np.random.default_rng(0).integers(0, 2, (20, n)).astype(bool)
    flipped = bits.copy()
    flipped[:, 3] ^= True
    z, other = (np.asarray(trellis.decode(KEY, b, 2 * n, nu)).reshape(20, n, 2)
                for b in (jnp.asarray(bits), jnp.asarray(flipped)))  # fmt: skip
    newest, oldest = 3, 3 + nu - 1
    np.testing.assert_array_equal(other[:, [newest, oldest]], -z[:, [newest, oldest]])
    assert (abs(other[:, newest + 1 : oldest]) != abs(z[:, newest + 1 : oldest])).mean() > 0.9
    rest = [k for k in range(n) if not newest <= k <= oldest]
    np.testing.assert_array_equal(other[:, rest], z[:, rest])
    assert len(np.unique(abs(z[:, 0]), axis=0)) > 4  # signs are not all that differs


def test_short_packets_are_like_a_draw_too():
    """The search knows less where a trellis of 32 bits begins, here 1.05 for each of the KL; with a
    state of nearly as many bits it is worse, but no more than by a fifth."""
    for nu, most in ((7, 1.06), (12, 1.2)):
        aim = target(2 ** (-1 / 1.05), 64, batch=32)
        z = trellis.decode(KEY, trellis.encode(KEY, aim, 32, nu), 64, nu)
        residual = (z - aim.mean) / jnp.sqrt(aim.variance)
        assert 0.9 < residual.var() < most


def test_kl_is_the_closed_form():
    aim = target(0.7, 5, batch=2)
    m, v = (np.asarray(x, np.float64) for x in aim)
    expected = 0.5 * (m**2 + v - 1 - np.log(v)).sum(-1)
    np.testing.assert_allclose(trellis.kl(aim), expected, rtol=1e-5)


def test_what_cannot_be_sent_is_refused():
    aim = target(0.5, 12, batch=1)
    with pytest.raises(ValueError, match="13 bits for 12 dimensions"):
        trellis.encode(KEY, aim, 13)
    with pytest.raises(ValueError, match=r"nu = 17: must be a whole number in 3\.\.16"):
        trellis.decode(KEY, jnp.zeros((1, 4), bool), 12, nu=17)
