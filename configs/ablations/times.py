"""Distributions of t in training, on the digits, with L_simple.

    python main.py --config=configs/ablations/times.py:low_discrepancy

`log_normal` and `logit_normal` also weight the loss: it is not corrected for the distribution.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import variant

VARIANTS: dict[str, dict[str, Any]] = {
    name: {"training.times": name}
    for name in ("uniform", "low_discrepancy", "importance", "log_normal", "logit_normal")
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
