"""Networks on the digits, with the same objective and training.

    python main.py --config=configs/ablations/networks.py:dit

`dit` is a transformer with about as many parameters as the UNet; the Fourier features of
`fourier_input` distinguish neighbouring values of the data's 17 grey levels.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import variant

VARIANTS: dict[str, dict[str, Any]] = {
    "unet": {},
    "scale_shift": {"model.scale_shift": True},
    "resblock": {"model.up_down": "resblock", "model.skip_scale": 0.5**0.5},
    "fourier_time": {"model.time_features": "fourier"},
    "fourier_input": {"model.input_features": (3, 4)},
    "attention": {"model.attention_resolutions": (8, 4)},
    "heads": {"model.attention_resolutions": (8, 4), "model.head_channels": 8},
    "dit": {
        "model.name": "dit",
        "model.channels": 96,
        "model.head_channels": 32,
        "model.depth": 4,
        "model.patch_size": 2,
        "training.learning_rate": 1e-3,
    },
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
