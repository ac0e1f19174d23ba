"""Parameterizations of the network's output, on the digits, all trained with L_simple.

    python main.py --config=configs/ablations/predictions.py:v

All have the same weight, the squared error of eps, and differ only in what the network predicts.
`edm` is preconditioned; `v_of_its_own` and `x_0_of_its_own` are unweighted errors of v and x_0.
`posterior_mean` is defined at whole times only, so that its evaluation has no flow.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from ddpm.config import WITHOUT_FLOW, variant

_SAME = {"training.loss_weight": "simple"}
VARIANTS: dict[str, dict[str, Any]] = {
    "eps": _SAME,
    "x_0": _SAME | {"diffusion.prediction": "x_0"},
    "v": _SAME | {"diffusion.prediction": "v"},
    "score": _SAME | {"diffusion.prediction": "score"},
    "posterior_mean": _SAME
    | {"diffusion.prediction": "posterior_mean", "evaluation.parts": WITHOUT_FLOW},
    # 0.85: the digits' standard deviation about 0.
    "edm": _SAME | {"diffusion.prediction": "edm", "diffusion.sigma_data": 0.85},
    "x_0_of_its_own": {"diffusion.prediction": "x_0"},
    "v_of_its_own": {"diffusion.prediction": "v"},
}


def get_config(name: str = "") -> ConfigDict:
    """Returns the config of that name."""
    return variant(digits.long(), VARIANTS, name)
