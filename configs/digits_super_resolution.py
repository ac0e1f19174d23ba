"""The digits from 4x4 to 8x8: super-resolution, by a model conditioned on the small image.

python main.py --config=configs/digits_super_resolution.py

Samples enlarge held-out digits, or the images of a file:
--mode=sample --config.sampling.low_resolution_images=small.npz
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits.long()
    config.model.low_resolution = 4
    # A base model's samples differ a little from data: noise hides the difference.
    config.training.low_resolution_noise = 0.3
    return config
