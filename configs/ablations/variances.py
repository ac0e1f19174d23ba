"""The reverse variance, on the digits: fixed, or learned by the hybrid loss.

    python main.py --config=configs/ablations/variances.py:learned_range

The two fixed ones share one training and differ in sampling and evaluation.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import variant

VARIANTS: dict[str, dict[str, Any]] = {
    "fixed_large": {"sampling.variance": "fixed_large"},
    "fixed_small": {"sampling.variance": "fixed_small"},
    "learned_range": {"training.loss": "hybrid", "diffusion.variance": "learned_range"},
    "learned": {"training.loss": "hybrid", "diffusion.variance": "learned"},
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
