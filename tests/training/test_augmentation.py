"""Augmentation against NumPy's flips and turns, SciPy's warp, and what its features should say."""

import jax
import numpy as np
import pytest
from scipy import ndimage, stats

from ddpm.training import augmentation
from ddpm.training.augmentation import NUM_FEATURES, SCALE, SHIFT
from tests.exact import close

X = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 2)).astype(np.float32)
TURN = {0: [0, 0], 90: [-1, 1], 180: [-2, 0]}


def warped(x=X, **changes):
    """x by features that are zero but for these, by their number: f3=1.0."""
    features = np.zeros((len(x), NUM_FEATURES), np.float32)
    for name, value in changes.items():
        features[:, int(name[1:])] = value
    return np.asarray(by_features(x, features))


by_features = jax.jit(
    lambda x, features: augmentation.warp(x, augmentation.matrices(features, x.shape[1:3]))
)


def test_nothing_drawn_is_the_image_bit_for_bit():
    assert (warped() == X).all()
    oblong = np.float32(np.random.default_rng(1).normal(size=(2, 5, 8, 1)))
    assert (warped(oblong) == oblong).all()
    found, features = jax.jit(augmentation.augment)(jax.random.key(0), X, 0.0)
    assert (found == X).all()
    assert (features == 0).all()


def test_flips_and_turns_are_numpys():
    assert (warped(f0=1) == X[:, :, ::-1]).all()
    assert (warped(f1=1) == X[:, ::-1]).all()
    close(warped(f3=-2), np.rot90(X, 2, (1, 2)), atol=1e-5)
    right, left = np.rot90(X, -1, (1, 2)), np.rot90(X, 1, (1, 2))
    close(warped(f3=-1, f4=1), right, atol=1e-5)
    close(warped(f3=-1, f4=-1), left, atol=1e-5)
    # One after the other: the flip first, then the turn.
    close(warped(f0=1, f3=-1, f4=1), np.rot90(X[:, :, ::-1], -1, (1, 2)), atol=1e-5)


def test_translation_by_whole_pixels_mirrors_at_the_borders():
    """By 1/8 of the side, a pixel each: right and down."""
    assert SHIFT * 8 == 1
    padded = np.pad(X, ((0, 0), (2, 2), (3, 3), (0, 0)), mode="symmetric")
    close(warped(f7=1), padded[:, 2:10, 2:10], atol=1e-6)
    close(warped(f7=-3, f8=2), padded[:, 0:8, 6:14], atol=1e-6)
    # After a flip and a turn, it is still to the right.
    turned = np.rot90(X[:, :, ::-1], -1, (1, 2))
    padded = np.pad(turned, ((0, 0), (0, 0), (2, 0), (0, 0)), mode="symmetric")[:, :, :8]
    close(warped(f0=1, f3=-1, f4=1, f7=2), padded, atol=1e-5)


def test_scale_enlarges_about_the_middle():
    """By an octave twice as large: the middle half, whose pixels lie at odd quarters."""
    found = warped(f2=1 / SCALE)
    rows = (np.arange(8) - 3.5) / 2 + 3.5
    at = np.stack(np.meshgrid(rows, rows, indexing="ij"))
    expected = ndimage.map_coordinates(X[0, :, :, 1], at, order=1, mode="reflect")
    close(found[0, :, :, 1], expected, atol=1e-5)


def test_stretching_is_along_its_direction():
    """An octave along x: twice as wide, half as high; along the opposite of x it is the same."""
    found = warped(f5=1 / SCALE)
    y, x = (np.arange(8) - 3.5) * 2 + 3.5, (np.arange(8) - 3.5) / 2 + 3.5
    at = np.stack(np.meshgrid(y, x, indexing="ij"))
    expected = ndimage.map_coordinates(X[0, :, :, 0], at, order=1, mode="reflect")
    close(found[0, :, :, 0], expected, atol=1e-5)
    close(warped(f5=-1 / SCALE), found, atol=1e-5)
    close(warped(f6=1 / SCALE), warped(X.swapaxes(1, 2), f5=1 / SCALE).swapaxes(1, 2), atol=1e-5)


def test_any_draw_is_scipys_warp_by_the_same_matrix():
    features = augmentation.draw(jax.random.key(3), 5, 1.0)
    found = by_features(X, features)
    matrices = np.float64(augmentation.matrices(features, (8, 8)))
    middle = np.full(2, 3.5)
    for image, matrix, result in zip(X, matrices, np.asarray(found), strict=True):
        turn, moved = matrix[:, :2], matrix[:, 2]
        offset = middle + moved - turn @ middle
        for c in range(2):
            expected = ndimage.affine_transform(
                image[..., c], turn, offset, order=1, mode="reflect"
            )
            close(result[..., c], expected, atol=2e-4)


def test_changes_are_drawn_as_karras_et_al_do():
    n, p = 20_000, 0.3
    f = np.asarray(jax.jit(augmentation.draw, static_argnums=(1, 2))(jax.random.key(0), n, p))
    made = np.stack([f[:, 0], f[:, 1], f[:, 2], f[:, 4], f[:, 5], f[:, 7]]) != 0
    often = np.array([0.5, p / 2, p, p, p, p])
    assert (np.abs(made.mean(axis=1) - often) < 4 * np.sqrt(often * (1 - often) / n)).all()
    assert np.abs(np.corrcoef(made) - np.eye(6)).max() < 4 / np.sqrt(n)
    assert (np.isin(f[:, :2], (0, 1))).all()
    for column in (2, 7, 8):
        normal = f[f[:, column] != 0, column]
        assert stats.kstest(normal, stats.norm.cdf).pvalue > 1e-3
    cos, sin = f[made[3], 3] + 1, f[made[3], 4]
    close(cos**2 + sin**2, 1.0, rtol=1e-5)
    angles = np.arctan2(sin, cos) / (2 * np.pi) + 0.5
    assert stats.kstest(angles, stats.uniform.cdf).pvalue > 1e-3
    size = np.hypot(f[made[4], 5], f[made[4], 6])
    assert stats.kstest(size, stats.halfnorm.cdf).pvalue > 1e-3
    turned = f[made[4], 6] != 0
    assert abs(turned.mean() - 0.5) < 4 * 0.5 / np.sqrt(turned.size)
    # Modulo a half turn, for the size has a sign.
    angles = np.arctan(f[made[4], 6] / f[made[4], 5])[turned] / np.pi + 0.5
    assert stats.kstest(angles, stats.uniform.cdf).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.12])
def test_augmented_images_are_those_of_their_features(probability):
    found, features = jax.jit(augmentation.augment)(jax.random.key(0), X, probability)
    assert (np.asarray(features) != 0).any()
    close(found, by_features(X, features), atol=1e-5)
