"""Distances of feature sets, against scipy, scikit-learn and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from ddpm.evaluation import distances, pairs
from tests.evaluation import by_numpy


def features(seed, n=400, d=6, shift=0.0, mean=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mixing + mean + shift


def batches(x, sizes):
    return np.split(x, np.cumsum(sizes))


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [(), (1, 1, 200), (0, 399)])
def test_moments_in_batches_are_numpys(mean, sizes):
    x = features(0, mean=mean)
    found = distances.moments(batches(x, sizes))
    assert found.size == len(x)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-7 if mean else 1e-11)


def frechet(x, y):
    return distances.frechet_distance(distances.moments([x]), distances.moments([y]))


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_frechet_distance_by_the_matrix_root(shift):
    x, y = features(1), features(2, n=300, shift=shift) * 1.3
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * np.real(root))
    np.testing.assert_allclose(frechet(x, y), expected, rtol=1e-9)


def test_frechet_distance_of_one_dimension():
    x, y = features(3, d=1), features(4, d=1, shift=2.0)
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    np.testing.assert_allclose(frechet(x, y), expected, rtol=1e-10)


def test_frechet_distance_of_fewer_samples_than_dimensions():
    """Rotated into the few dimensions where there is anything, nothing changes."""
    x, y = features(5, n=9, d=4), features(6, n=8, d=4)
    basis = scipy.stats.ortho_group.rvs(40, random_state=0)[:4]
    np.testing.assert_allclose(frechet(x @ basis, y @ basis), frechet(x, y), rtol=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_0():
    x = features(8, n=10, d=30)
    assert 0 <= frechet(x, x) < 1e-6 * np.trace(np.cov(x.T))


def test_kernel_distance_by_definition():
    x, y = features(9, n=60), features(10, n=60, shift=0.3)
    k = {
        n: polynomial_kernel(p, q, degree=3) for n, p, q in (("x", x, x), ("y", y, y), ("xy", x, y))
    }
    off = ~np.eye(60, dtype=bool)
    expected = k["x"][off].mean() + k["y"][off].mean() - 2 * k["xy"].mean()
    found = distances.kernel_distance(x, y, subsets=2, subset_size=1000)
    np.testing.assert_allclose(found.value, expected, rtol=1e-9)
    assert found.standard_error < 1e-9 * abs(expected)


def test_kernel_distance_is_unbiased():
    """Of two sets of one distribution it is 0 in the mean; its own error says how near."""
    values = [
        distances.kernel_distance(features(2 * i, n=50), features(2 * i + 1, n=50), subsets=1).value
        for i in range(400)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


def test_overlap_by_nearest_neighbours():
    x, y, k = features(11, n=150), features(12, n=130, shift=0.5), 4
    radius = {}
    for name, z in (("x", x), ("y", y)):
        radius[name] = NearestNeighbors(n_neighbors=k + 1).fit(z).kneighbors(z)[0][:, -1]
    between = np.linalg.norm(x[:, None] - y[None], axis=-1)
    in_data = between <= radius["x"][:, None]
    found = distances.overlap(x, y, k=k)
    assert found.precision == in_data.any(axis=0).mean()
    assert found.recall == (between <= radius["y"]).any(axis=1).mean()
    np.testing.assert_allclose(found.density, in_data.sum() / (k * len(y)))
    assert found.coverage == in_data.any(axis=1).mean()
    assert 0 < found.recall < 1
    assert 0 < found.coverage < 1


def test_pairs_in_blocks_of_rows_are_the_same(monkeypatch):
    x, y = features(13, n=90), features(14, n=90)
    whole = distances.overlap(x, y), distances.two_sample_accuracy(x, y), distances.nearest(x, [y])
    monkeypatch.setattr(pairs, "BLOCK", 1500)
    assert distances.overlap(x, y) == whole[0]
    assert distances.two_sample_accuracy(x, y) == whole[1]
    np.testing.assert_array_equal(distances.nearest(x, [y]), whole[2])


def tied(case, n=96):
    """Two sets of which many pairs are as far as another, or farther by less than float32 tells."""
    rng = np.random.default_rng(17)
    x, y = rng.normal(size=(2, n, 5))
    if case == "grid":
        return np.round(x) / 10 + 1e3, np.round(y) / 10 + 1e3
    if case == "copies of the other":
        return x, rng.permutation(x)
    if case == "clusters":
        return np.round(x[:4]).repeat(n // 4, axis=0) + 1e-7 * x, np.round(x) + 1e-7 * y
    if case == "one image":
        return x, y[:1].repeat(n, axis=0)
    if case == "nearly one image":
        return x, y[0] * (1 + 1e-7 * np.round(y))
    assert case == "float32 apart from the mean"
    return x + 1e6 * (x > 0), y + 1e6 * (y > 0)


CASES = ["grid", "copies of the other", "clusters", "one image", "nearly one image",
         "float32 apart from the mean"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_float32_cannot_tell_is_as_in_float64(case):
    x, y = tied(case)
    for a, b in ((x, y), (y, x), (x, x)):
        for k in (1, 3):
            np.testing.assert_allclose(distances.overlap(a, b, k=k), by_numpy.overlap(a, b, k))
        assert distances.two_sample_accuracy(a, b) == by_numpy.two_sample_accuracy(a, b)
        place, distance = by_numpy.nearest(a[:20], b)
        found = distances.nearest(a[:20], (b[:50], b[50:50], b[50:]))
        assert (found[0] == place).all()
        np.testing.assert_allclose(found[1], distance, rtol=1e-12)


def test_overlap_of_a_set_far_away_is_none_and_of_the_same_all():
    x = features(15)
    assert distances.overlap(x, x + 1e3) == (0, 0, 0, 0)
    same = distances.overlap(x, x)
    assert same == (1, 1, 1, 1)


def test_inception_score():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=40)
    scores = []
    for part in (p[:20], p[20:]):
        scores.append(np.exp(np.mean([scipy.stats.entropy(row, part.mean(0)) for row in part])))
    found = distances.inception_score(p, splits=2)
    np.testing.assert_allclose(found.value, np.mean(scores), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, abs(scores[0] - scores[1]) / 2, rtol=1e-9)
    certain = np.eye(5)[np.arange(40) % 5]  # of all classes alike, each for sure
    np.testing.assert_allclose(distances.inception_score(certain, splits=2).value, 5, rtol=1e-12)
    same = np.full((40, 5), 0.2)
    np.testing.assert_allclose(distances.inception_score(same, splits=2).value, 1, rtol=1e-12)


def test_what_is_wrong_is_said():
    x = features(16, n=5)
    bad = x.copy()
    bad[2, 1] = np.nan
    for wrong, words in [
        (lambda: distances.moments([bad]), "not finite"),
        (lambda: distances.moments([x[:1]]), "at least 2"),
        (lambda: distances.moments([]), "moments of 0"),
        (lambda: distances.moments([x[0]]), "expected features"),
        (lambda: distances.kernel_distance(x, x[:, :3]), "6 and of 3"),
        (lambda: distances.kernel_distance(x, x[:1]), "at least 2"),
        (lambda: distances.overlap(x, x[:3]), "more than 3"),
        (lambda: distances.inception_score(x), "5 samples in 10 splits"),
        (lambda: frechet(x, x[:, :3]), "6 and of 3"),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()


@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
def test_two_sample_accuracy_is_scikit_learns(shift):
    x, y = features(8, n=150), features(9, n=150, shift=shift)
    both, own = np.concatenate([x, y]), np.repeat([0, 1], 150)
    expected = cross_val_score(KNeighborsClassifier(1), both, own, cv=LeaveOneOut()).mean()
    found = distances.two_sample_accuracy(x, y)
    assert found == pytest.approx(expected)
    assert (found > 0.99) if shift > 10 else (0.3 < found < 0.95)
    assert distances.two_sample_accuracy(x, x) == 0.0
    with pytest.raises(ValueError, match="equally many"):
        distances.two_sample_accuracy(x, y[:-1])


def test_nearest_is_scikit_learns_in_any_batches():
    x, queries = features(10, n=2500), features(11, n=40)
    distance, place = NearestNeighbors(n_neighbors=1).fit(x).kneighbors(queries)
    found = distances.nearest(queries, batches(x, (700, 1, 1500)))
    assert (found[0] == place[:, 0]).all()
    np.testing.assert_allclose(found[1], distance[:, 0], rtol=1e-9)
    assert (distances.nearest(x[:5], [x])[1] == 0).all()  # of copies


@pytest.mark.parametrize("levels", [1000, 4, 1])  # few: with ties
def test_roc_area_is_mann_and_whitneys(levels):
    rng = np.random.default_rng(levels)
    own, other = rng.integers(0, levels, 37), rng.integers(0, levels, 53) + levels // 4
    statistic = scipy.stats.mannwhitneyu(other, own).statistic
    np.testing.assert_allclose(distances.roc_area(own, other), statistic / (37 * 53), rtol=1e-12)
    area = roc_auc_score(np.repeat([0, 1], [37, 53]), np.concatenate([own, other]))
    np.testing.assert_allclose(distances.roc_area(own, other), area, rtol=1e-12)


def test_energy_test_tells_two_sets_apart_and_no_more():
    """Its p-value is uniform for sets of one distribution, and small for others."""
    rng = np.random.default_rng(0)
    p = [
        distances.energy_test(*rng.normal(size=(2, 30, 2)), permutations=99, seed=seed)
        for seed in range(60)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    a, b = rng.normal(size=(2, 150, 2))
    assert distances.energy_test(a, b * 1.6, permutations=199) < 0.01
    assert distances.energy_test(a, b[:70] + 0.7, permutations=199) == 1 / 200
    with pytest.raises(ValueError, match="2 and of 3 dimensions"):
        distances.energy_test(a, rng.normal(size=(5, 3)))
