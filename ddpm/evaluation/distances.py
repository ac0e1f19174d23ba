"""Distances between samples and data by the features of both, [n, d], to float64.

Fréchet distance, kernel distance, precision and recall, density and coverage; the Inception score
by class probabilities.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from ddpm.evaluation import pairs


class Moments(NamedTuple):
    """The moments of n feature vectors: their number, mean [d] and sum of squares about the mean
    [d, d]."""

    size: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """[d, d], by n - 1."""
        return self.scatter / (self.size - 1)


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    standard_error: float


def roc_area(own: np.ndarray, other: np.ndarray) -> float:
    """Returns the probability that a value of `other` [m] is above one of `own` [n], ties by half:
    the area under the ROC curve, Mann and Whitney's U over n m."""
    ordered = np.sort(own)
    below, up_to = (np.searchsorted(ordered, other, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(own)))


class Overlap(NamedTuple):
    """Fractions of two sets that lie within one another."""

    precision: float  # of samples within the data
    recall: float  # of data within the samples
    density: float  # precision that counts every ball: above 1 where data are dense
    coverage: float  # of data that have a sample nearby


def moments(batches: Iterable[np.ndarray]) -> Moments:
    """Returns the moments of features that come in batches [n, d], in one pass, whatever their
    mean.

    By Chan, Golub & LeVeque's update. Raises ValueError for fewer than two vectors, or any that is
    not finite.
    """
    total: Moments | None = None
    for batch in batches:
        x = _checked(batch)
        if not len(x):
            continue
        mean = x.mean(axis=0)
        centred = x - mean
        part = Moments(len(x), mean, centred.T @ centred)
        total = part if total is None else _merge(total, part)
    if total is None or total.size < 2:
        raise ValueError(f"moments of {total.size if total else 0} features: at least 2 needed")
    return total


def _merge(a: Moments, b: Moments) -> Moments:
    size = a.size + b.size
    delta = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.size * b.size / size)
    return Moments(size, a.mean + delta * (b.size / size), scatter)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2): squared, as FID is reported.

    (Heusel et al. 2017.) By symmetric eigenvalues, which stay real where n < d leaves the
    covariances singular.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    distance = np.sum((a.mean - b.mean) ** 2) + trace - 2 * np.sqrt(product.clip(min=0)).sum()
    return float(max(distance, 0.0))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Returns KID (Bińkowski et al. 2018): the unbiased squared MMD under (x.y / d + 1)^3.

    The mean over random subsets of both sets (of all there are, if fewer), and the standard
    error of that mean as if subsets were independent. May be negative: it is unbiased.
    """
    a, b = _pair(a, b)
    rng = np.random.default_rng(seed)
    n = min(subset_size, len(a), len(b))
    if n < 2:
        raise ValueError("a kernel distance needs at least 2 features of each set")

    def one() -> float:
        x, y = (z[rng.choice(len(z), n, replace=False)] for z in (a, b))
        k_xx, k_yy, k_xy = (_kernel(p, q) for p, q in ((x, x), (y, y), (x, y)))
        within = (k_xx.sum() - np.trace(k_xx) + k_yy.sum() - np.trace(k_yy)) / (n * (n - 1))
        return float(within - 2 * k_xy.mean())

    values = np.array([one() for _ in range(subsets)])
    error = values.std(ddof=1) / np.sqrt(subsets) if subsets > 1 else float("nan")
    return Estimate(float(values.mean()), float(error))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def overlap(data: np.ndarray, samples: np.ndarray, *, k: int = 3) -> Overlap:
    """Returns precision, recall (Kynkäänniemi et al. 2019); density, coverage (Naeem et al. 2020).

    A set is the union of balls around its members, each reaching its k-th nearest neighbour
    in the set. (The papers take k = 3 for the first pair and 5 for the second.) As in the authors'
    definitions a ball has its surface for the first pair, and for the second it has not.
    """
    data, samples = _pair(data, samples)
    if min(len(data), len(samples)) <= k:
        raise ValueError(f"k = {k} neighbours: more than {k} features of each set needed")
    radii = [pairs.kth_nearest(x, k=k)[1] for x in (data, samples)]
    found = pairs.members(data, radii[0], samples, radii[1])
    return Overlap(
        precision=float(found.precise.mean()),
        recall=float(found.recalled.mean()),
        density=float(found.balls.mean() / k),
        coverage=float(found.covered.mean()),
    )


def two_sample_accuracy(a: np.ndarray, b: np.ndarray) -> float:
    """Returns how often the nearest other feature, of both sets together, is of one's own set.

    The 1-nearest-neighbour two-sample test, leave one out (Lopez-Paz & Oquab 2017): 0.5 for two
    sets of one distribution, 1 for two that are apart, 0 for copies. Sets of one size: more of one
    would be nearer by number alone. Raises ValueError for other sizes.
    """
    a, b = _pair(a, b)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} features: equally many needed, at least 2")
    own = np.repeat([0, 1], len(a))
    place, _ = pairs.kth_nearest(np.concatenate([a, b]))
    return float((own[place] == own).mean())


def energy_test(a: np.ndarray, b: np.ndarray, *, permutations: int = 500, seed: int = 0) -> float:
    """Returns the p-value of the two-sample test by the energy distance 2 E|x - y| - E|x - x'| -
    E|y - y'| and permutations (Székely & Rizzo 2013): the part of them that are as far apart.

    Uniform in [0, 1] for two sets of one distribution, at least 1 / (permutations + 1). It holds
    all distances at once, 8 (n + m)^2 bytes.
    """
    a, b = _pair(a, b)
    both, n = np.concatenate([a, b]), len(a)
    apart = cdist(both, both)
    rng = np.random.default_rng(seed)
    order = [np.arange(len(both))] + [rng.permutation(len(both)) for _ in range(permutations)]
    sign = np.full((len(both), len(order)), -1 / len(b))
    for column, places in enumerate(order):
        sign[places[:n], column] = 1 / n
    # With weights 1/n and -1/m the sum over all pairs is the distance with its sign turned.
    found = -(sign * (apart @ sign)).sum(axis=0)
    return float((found >= found[0] * (1 - 1e-9)).mean())


def nearest(queries: np.ndarray, batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each query the nearest among all batches: (its place in their order, Euclidean
    distance).

    queries [m, d] and batches [n, d], in one pass; the first of equals.
    """
    queries = _checked(queries)
    place, best = np.zeros(len(queries), int), np.full(len(queries), np.inf)
    start = 0
    for batch in batches:
        if len(batch) and len(queries):
            x = np.asarray(batch, np.float64)
            found, squared = pairs.kth_nearest(queries, x, below=best)
            nearer = squared < best
            place[nearer] = start + found[nearer]
            best[nearer] = squared[nearer]
        start += len(batch)
    return place, np.sqrt(best)


def inception_score(probabilities: np.ndarray, *, splits: int = 10) -> Estimate:
    """Returns exp E KL(p(y|x) || p(y)) of class probabilities [n, classes] (Salimans et al. 2016).

    The mean over equal parts of the samples in their order, and its standard error.
    """
    p = _checked(probabilities)
    if len(p) < splits:
        raise ValueError(f"{len(p)} samples in {splits} splits")
    scores = []
    for part in np.array_split(p, splits):
        marginal = part.mean(axis=0)
        log_ratio = np.log(np.where(part > 0, part, 1)) - np.log(
            np.where(marginal > 0, marginal, 1)
        )
        scores.append(np.exp((part * log_ratio).sum(axis=1).mean()))
    error = np.std(scores, ddof=1) / np.sqrt(splits) if splits > 1 else float("nan")
    return Estimate(float(np.mean(scores)), float(error))


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions")
    return a, b


def _checked(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, np.float64)
    if x.ndim != 2:
        raise ValueError(f"expected features [n, d], got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("features that are not finite")
    return x
