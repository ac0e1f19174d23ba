"""Moving averages of the weights (EMA), on the digits.

    python main.py --config=configs/ablations/averages.py:power

`half_life` has about the half-life, in images, of `constant`. Averages of other widths can be made
from the snapshots of `power` afterwards: --mode=sample --config.sampling.ema_relative_std=0.07.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import variant

VARIANTS: dict[str, dict[str, Any]] = {
    "constant": {"training.ema": "constant"},
    "warm_up": {"training.ema": "warm_up"},
    "half_life": {"training.ema": "half_life", "training.ema_images": 22_000},
    "power": {
        "training.ema": "power",
        "training.ema_relative_stds": (0.1, 0.05),
        "training.ema_snapshot_every": 200,
    },
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
