"""Weights of the squared error, on the digits; the network predicts v.

    python main.py --config=configs/ablations/weights.py:min_snr

`likelihood` and `sigmoid` are integrals over log-SNR; `l1` and `huber` are errors of v itself.
`likelihood` is the bound up to a factor and, as in bounds.py, its gradient is not clipped.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import variant

_V = {"diffusion.prediction": "v"}
VARIANTS: dict[str, dict[str, Any]] = {
    name: _V | {"training.loss_weight": name}
    for name in (
        "none",
        "simple",
        "x_0",
        "min_snr",
        "truncated_snr",
        "p2",
        "sigmoid",
        "edm",
        "likelihood",
    )
}
VARIANTS["edm"]["diffusion.sigma_data"] = 0.85  # the digits' standard deviation about 0
VARIANTS["likelihood"]["training.grad_clip"] = 1000.0
VARIANTS |= {name: _V | {"training.loss": name} for name in ("l1", "huber")}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
