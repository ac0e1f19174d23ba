"""Rules for the noise levels and steps of score networks (Song & Ermon 2020, NCSNv2).

Noise is measured by its standard deviation in y = x_0 + sigma z, the variance-exploding view. A
sigma is in units of the data: for data in [-1, 1] it is twice the paper's, whose data are in
[0, 1]. Ratios of sigmas, numbers of levels and Langevin steps in units of sigma^2 have none.

    sigma_max = ncsn.largest_distance(images)                    # Technique 1
    ratio = ncsn.level_ratio(images[0].size)                     # Technique 2
    num_steps = ncsn.num_levels(0.02, sigma_max, ratio)
    schedule = schedules.geometric(num_steps, 0.02, sigma_max)
    step_size = ncsn.langevin_step_size(ratio, 5)                # Technique 4, of 5 steps a level

Technique 3 is `predictions.noise_unconditional`, and Technique 5 an average of the weights.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.pixels import check_scaled
from ddpm.diffusion.times import whole_number


def largest_distance(images: Any, *, block: int = 2048) -> float:
    """Returns the largest Euclidean distance between two of `images` [N, ...], in their units: the
    sigma_max of Technique 1, with which a chain passes from any image to any other.

    Pairs are compared in blocks of `block` x `block`, N^2/2 of them in all, in float32. Raises
    ValueError for integers, which are not scaled yet, and for fewer than two images.
    """
    x = np.asarray(check_scaled(images, "images"))
    if len(x) < 2:
        raise ValueError(f"{len(x)} images: a distance is between two")
    x = x.reshape(len(x), -1)
    x = x - x.mean(axis=0)  # the squares below are then no larger than need be

    @jax.jit
    def largest(a: jax.Array, b: jax.Array) -> jax.Array:
        products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.max((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * products)

    starts = range(0, len(x), block)
    found = [
        float(largest(x[i : i + block], x[j : j + block])) for i in starts for j in starts if i <= j
    ]
    return math.sqrt(max(0.0, *found))


def level_overlap(ratio: float, dimensions: int) -> float:
    """Returns Phi(sqrt(2 D) (ratio - 1) + 3 ratio) - Phi(sqrt(2 D) (ratio - 1) - 3 ratio).

    It is the share of the radii |y| at one level, N(sqrt(D) sigma, sigma^2/2) for many dimensions
    D, that lie within three standard deviations of those at the next larger one, ratio sigma
    (Technique 2).
    """
    away = math.sqrt(2 * dimensions) * (ratio - 1)
    return _normal_cdf(away + 3 * ratio) - _normal_cdf(away - 3 * ratio)


def level_ratio(dimensions: int, *, overlap: float = 0.5) -> float:
    """Returns the ratio of neighbouring sigmas in D dimensions whose `level_overlap` is `overlap`,
    about 1 + 3/sqrt(2 D) (Technique 2).

        ddpm.ncsn.level_ratio(3072)  # 1.0398 for CIFAR-10

    The authors take 'about 0.5'; the levels of their experiments have 0.57, a ratio of 1.0376 for
    CIFAR-10. Raises ValueError below D = 5, where levels overlap more than that at any ratio, and
    unless 0 < overlap < 0.99.
    """
    whole_number("dimensions", dimensions, 5)
    if not 0 < overlap < 0.99:
        raise ValueError(f"overlap = {overlap}: must be in (0, 0.99), 0.5 as in the paper")
    scale = math.sqrt(2 * dimensions)
    # The overlap rises a little, then falls from above 0.99 to less than 1e-9.
    low, high = 1.0, (scale + 6) / (scale - 3)
    for _ in range(60):
        middle = (low + high) / 2
        if level_overlap(middle, dimensions) > overlap:
            low = middle
        else:
            high = middle
    return high


def num_levels(sigma_min: float, sigma_max: float, ratio: float) -> int:
    """Returns the least number of levels from sigma_min to sigma_max, both included, of which each
    is at most `ratio` times the one before.

    Raises ValueError unless 0 < sigma_min < sigma_max and ratio > 1.
    """
    if not (0 < sigma_min < sigma_max < math.inf and ratio > 1):
        raise ValueError(
            f"sigma from {sigma_min} to {sigma_max} by a ratio of {ratio}: must rise from above 0"
        )
    return 1 + math.ceil(math.log(sigma_max / sigma_min) / math.log(ratio) - 1e-9)


def langevin_variance(ratio: float, steps_per_level: int, step_size: Any) -> Any:
    """Returns s_T^2 / sigma^2 after T = steps_per_level Langevin steps of size step_size sigma^2,
    of y from N(0, (ratio sigma)^2), the level before, at data that are one point (Eq. 4).

    1 would be the variance of the level. It is more for any step size: the next level begins a
    little too wide.
    """
    kept, stationary = (1 - step_size) ** (2 * steps_per_level), 1 / (1 - step_size / 2)
    return kept * (ratio**2 - stationary) + stationary


def langevin_step_size(ratio: float, steps_per_level: int) -> float:
    """Returns the step size, in units of sigma^2, whose `langevin_variance` is nearest 1 (Technique
    4): that of `annealed_langevin`.

        ddpm.ncsn.langevin_step_size(5000 ** (1 / 231), 5)  # 0.0618, CIFAR-10's 6.2e-6 / 0.01^2

    The authors' epsilon is this times sigma_min^2. Raises ValueError unless ratio > 1.
    """
    whole_number("steps_per_level", steps_per_level)
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio = {ratio}: must be a number > 1, of a level's sigma to the next")
    sizes = np.geomspace(1e-6, 1, 500_001)
    return float(sizes[np.argmin(langevin_variance(ratio, steps_per_level, sizes))])


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
