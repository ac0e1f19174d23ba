"""The bound as the loss, on the digits.

    python main.py --config=configs/ablations/bounds.py:continuous

`whole` and `learned` are Eq. 5, the second with a learned reverse variance; `important` draws its t
by the losses; `continuous` is the limit as T grows, `even` the same with t evenly spread in a
batch, `log_snr` that with the noise told by its log-SNR, and `learned_schedule` learns that too.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import variant

_BOUND = {"training.loss": "bound", "training.grad_clip": 1000.0}
_CONTINUOUS = {
    "training.loss": "continuous_bound",
    "training.grad_clip": 1000.0,
    "sampling.variance": "fixed_small",
}
_EVEN = _CONTINUOUS | {"training.times": "low_discrepancy"}
# From where a cosine schedule of 1000 steps begins to where little is left of the digits.
_LOG_SNR = _EVEN | {
    "model.noise_input": "log_snr",
    "diffusion.schedule": "linear_log_snr",
    "diffusion.log_snr_0": 10.0,
    "diffusion.log_snr_1": -10.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": _BOUND | {"diffusion.variance": "fixed_small", "sampling.variance": "fixed_small"},
    "learned": _BOUND | {"diffusion.variance": "learned_range"},
    "important": _BOUND | {"diffusion.variance": "learned_range", "training.times": "importance"},
    "continuous": _CONTINUOUS,
    "even": _EVEN,
    "log_snr": _LOG_SNR,
    "learned_schedule": _LOG_SNR | {"diffusion.schedule": "learned"},
}


def get_config(name: str = "") -> ConfigDict:
    """The config of that name."""
    return variant(digits.get_config(), VARIANTS, name)
