"""Noise schedules on the digits, with the same network size and training.

    python main.py --config=configs/ablations/schedules.py:sigmoid

`zero_terminal` is the linear schedule rescaled to end without signal; it predicts v and is
evaluated without the flow, which would have no end. `linear_v` is the same without rescaling.
`cosine_shifted` adds 2 log 4 to the log-SNR, the shift from 32x32 to 8x8 images. For a learned
schedule see bounds.py.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import WITHOUT_FLOW, variant

VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {"diffusion.schedule": "linear"},
    "quadratic": {"diffusion.schedule": "quadratic"},
    "cosine": {"diffusion.schedule": "cosine"},
    "cosine_shifted": {"diffusion.schedule": "cosine", "diffusion.reference_resolution": 32},
    "sigmoid": {"diffusion.schedule": "sigmoid"},
    "linear_log_snr": {"diffusion.schedule": "linear_log_snr"},
    "linear_v": {"diffusion.schedule": "linear", "diffusion.prediction": "v"},
    "zero_terminal": {
        "diffusion.schedule": "linear",
        "diffusion.prediction": "v",
        "diffusion.zero_terminal_snr": True,
        "evaluation.parts": WITHOUT_FLOW,
    },
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
