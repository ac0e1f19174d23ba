"""Inputs of the network in addition to x_t and t, on the digits.

    python main.py --config=configs/ablations/conditioning.py:self_conditioning

`augmentation` flips, rotates and shifts the digits and conditions the network on these changes.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import variant

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "labels": {"model.num_classes": 10},
    "self_conditioning": {"training.self_conditioning": True},
    "augmentation": {"training.augmentation": 0.12},
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
