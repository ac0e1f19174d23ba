"""The digits by an energy: `configs/digits.py`, its network the gradient of a scalar.

python main.py --config=configs/digits_energy.py
python main.py --config=configs/digits_energy.py:inner_product
python main.py --config=configs/digits_energy.py:norm
"""

from ml_collections import ConfigDict

from configs import digits


def get_config(form: str = "denoising") -> ConfigDict:
    """Returns the config of a form of the energy; parameters, steps and all else are the same."""
    config = digits.get_config()
    config.model.energy = form
    return config
