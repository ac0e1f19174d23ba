"""Tiles of a picture: cut and joined it is the same, of whatever sizes."""

import numpy as np
import pytest

from ddpm.codec import tiles


@pytest.mark.parametrize("seed", range(40))
def test_joined_tiles_are_the_picture(seed):
    rng = np.random.default_rng(seed)
    height, width, h, w = (int(x) for x in rng.integers(1, 30, 4))
    channels = int(rng.choice([1, 3]))
    picture = rng.integers(0, 256, (height, width, channels), np.uint8)
    cut = tiles.cut(picture, (h, w))
    assert cut.shape == (tiles.count_tiles((height, width), (h, w)), h, w, channels)
    assert cut.dtype == np.uint8
    np.testing.assert_array_equal(tiles.joined(cut, (height, width)), picture)
    np.testing.assert_array_equal(cut[0][:height, :width], picture[:h, :w])
    # As many as cover it: one less in either direction would not.
    rows = len({*range(0, height, h)})
    assert len(cut) == rows * len({*range(0, width, w)})


def test_the_last_tiles_are_filled_from_the_edge():
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    cut = tiles.cut(picture, (2, 2))
    np.testing.assert_array_equal(cut[..., 0], [[[0, 1], [3, 4]], [[2, 2], [5, 5]]])
