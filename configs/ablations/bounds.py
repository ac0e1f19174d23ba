"""The variational bound as the loss, on the digits.

    python main.py --config=configs/ablations/bounds.py:continuous

`whole` and `learned` are Eq. 5, the second with a learned reverse variance; `important` draws t by
importance sampling; `continuous` is the limit as T grows, `even` the same with t evenly spread over
a batch. `learned_schedule` starts as `linear_log_snr` and is trained: the ends minimise the bound,
the shape minimises the variance of its estimate.
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
_TOLD = _EVEN | {"model.noise_input": "log_snr"}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": _BOUND | {"diffusion.variance": "fixed_small", "sampling.variance": "fixed_small"},
    "learned": _BOUND | {"diffusion.variance": "learned_range"},
    "important": _BOUND | {"diffusion.variance": "learned_range", "training.times": "importance"},
    "continuous": _CONTINUOUS,
    "even": _EVEN,
    "linear_log_snr": _TOLD | {"diffusion.schedule": "linear_log_snr"},
    "learned_schedule": _TOLD | {"diffusion.schedule": "learned"},
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
