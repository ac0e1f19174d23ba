"""The six rows of the paper's Table 2, on the digits.

    python main.py --config=configs/ablations/table2.py:eps_mse

The rows differ in prediction, loss and reverse variance, in the paper's order; all else is as in
`long` of configs/digits.py. The authors' bound is the mean of its T terms, ours their sum:
clipping the gradient at T times the norm makes the training equal (Adam ignores the scale). The
evaluation omits the flow, which mean prediction does not have.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import WITHOUT_FLOW, variant

_BOUND = {"training.loss": "bound", "training.grad_clip": 1000.0}
_MEAN = {"diffusion.prediction": "posterior_mean"}
_LEARNED = {"diffusion.variance": "learned"}
VARIANTS: dict[str, dict[str, Any]] = {
    "mean_bound_learned": _MEAN | _BOUND | _LEARNED,
    "mean_bound_fixed": _MEAN | _BOUND,
    "mean_mse": _MEAN,
    "eps_bound_learned": _BOUND | _LEARNED,
    "eps_bound_fixed": _BOUND,
    "eps_mse": {},
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    config = variant(digits.long(), VARIANTS, name)
    config.evaluation.parts = WITHOUT_FLOW
    return config
