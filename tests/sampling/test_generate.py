"""The Generator: any number of samples from one compiled program, each by its own seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm import ancestral, ddim, sample
from ddpm.errors import InputError
from ddpm.sampling.generate import Generator
from tests.exact import gaussian_denoiser, pair

IMAGE = (4, 3, 2)


def generator(batch_size, sampler=None, traced=None, **options):
    schedule, exact = pair("linear", 7)

    def make_denoiser(params, indices):
        if traced is not None:
            traced.append(params)
        return gaussian_denoiser(exact, params, 0.04)

    return Generator(
        schedule, make_denoiser, sampler or ancestral(), IMAGE, batch_size=batch_size, **options
    )


@pytest.fixture(scope="module")
def of_seven():
    return generator(7).samples(0.1, 7, seed=5)


def test_samples_are_8_bit_images_of_the_denoisers_data(of_seven):
    assert of_seven.shape == (7, *IMAGE)
    assert of_seven.dtype == np.uint8
    assert abs(of_seven.mean() - 127.5 * 1.1) < 15
    assert len({x.tobytes() for x in of_seven}) == 7


def test_batches_of_another_size_give_the_same_samples(of_seven):
    traced = []
    threes = generator(3, traced=traced)
    batches = list(threes.batches(0.1, 7, seed=5))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert (np.concatenate(batches) == of_seven).all()
    assert (threes.samples(0.1, 5, seed=5) == of_seven[:5]).all()
    assert len(traced) == 1  # compiled once, the partial batches included


def test_other_weights_and_seeds_need_no_compilation(of_seven):
    traced = []
    sevens = generator(7, traced=traced)
    assert (sevens.samples(0.1, 7, seed=5) == of_seven).all()
    assert (sevens.samples(0.1, 7, seed=6) != of_seven).any()
    assert sevens.samples(0.5, 7, seed=5).mean() > of_seven.mean() + 20
    assert len(traced) == 1


def test_the_denoiser_is_given_which_samples_it_is_of(of_seven):
    """Sample i is of class i mod 2, in whatever batch; those that share a latent of the first's."""
    schedule, exact = pair("linear", 7)

    def make_denoiser(params, indices):
        return gaussian_denoiser(exact, jnp.where(indices % 2, 0.7, 0.1)[:, None, None, None], 0.04)

    found = {
        size: Generator(schedule, make_denoiser, ancestral(), IMAGE, batch_size=size)
        for size in (7, 3)
    }
    images = found[3].samples(None, 7, seed=5)
    assert (images == found[7].samples(None, 7, seed=5)).all()
    assert (images[::2] == of_seven[::2]).all()
    assert (images[1::2].mean(axis=(1, 2, 3)) > of_seven[1::2].mean(axis=(1, 2, 3)) + 40).all()
    chain = found[7].chain(None, 4, seed=5, snapshots=2)
    assert (chain[-1] == images[:4]).all()
    predicted = found[7].progressive(None, 4, seed=5, snapshots=7)[-1]
    assert np.abs(predicted.astype(float) - images[:4]).max() <= 1
    shared = found[7].sharing(None, 4, seed=5, t=4)
    assert (shared == generator(7).sharing(0.1, 4, seed=5, t=4)).all()


def test_fewer_samples_than_a_batch(of_seven):
    assert (generator(7).samples(0.1, 2, seed=5) == of_seven[:2]).all()


def test_placed_on_devices_the_samples_are_the_same(of_seven):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    assert (generator(3, sharding=sharding).samples(0.1, 7, seed=5) == of_seven).all()


def test_samples_are_the_rounded_floats(of_seven):
    schedule, exact = pair("linear", 7)
    x_0 = sample(jax.random.key(5), schedule, gaussian_denoiser(exact, 0.1, 0.04), (7, *IMAGE))
    error = of_seven / 127.5 - 1 - np.clip(x_0, -1, 1)
    assert abs(error).max() < 0.501 / 127.5
    # Cut off instead of rounded, the mean would be half a level lower.
    assert abs(error.mean()) < 0.1 / 127.5


def test_chain_ends_in_the_samples(of_seven):
    frames = generator(7).chain(0.1, 4, seed=5, snapshots=3)
    assert frames.shape == (4, 4, *IMAGE)
    assert frames.dtype == np.uint8
    assert (frames[-1] == of_seven[:4]).all()
    noise = frames[0] / 127.5 - 1
    assert (abs(noise) == 1).mean() > 0.15  # standard noise is cut off at 1


def test_sampler_is_used():
    first, second = (
        generator(2, sampler).samples(0.1, 2, seed=0) for sampler in (ddim(steps=2), ancestral())
    )
    assert (first != second).any()


def test_values_beyond_the_range_do_not_wrap_round():
    for mean, level in ((5.0, 255), (-5.0, 0)):
        assert (generator(2).samples(mean, 2, seed=0) == level).all()


def test_progressive_generation_ends_near_the_samples(of_seven):
    """Seven steps, seven predictions: the first knows nothing, the last is the sample."""
    found = generator(7).progressive(0.1, 7, seed=5, snapshots=7)
    assert found.shape == (7, 7, *IMAGE)
    error = [np.abs(x.astype(float) - of_seven).mean() for x in found]
    assert error[-1] <= 0.5 < 5 < error[0]
    assert np.diff(error).max() < 1


@pytest.mark.parametrize("t", [7, 4, 1])
def test_chains_share_what_is_above_t(t, of_seven):
    """The first goes on as if alone; the others come the nearer to it the later they part."""
    found = generator(7).sharing(0.1, 7, seed=5, t=t)
    assert (found[0] == of_seven[0]).all()
    spread = np.abs(found[1:].astype(float) - found[0]).mean()
    assert {7: 10 < spread < 60, 4: 3 < spread < 40, 1: spread == 0}[t]
    assert (found[1:] != of_seven[1:]).any()


def test_nan_is_not_taken_for_black():
    with pytest.raises(InputError, match="not finite"):
        generator(3).samples(np.nan, 3, seed=0)
