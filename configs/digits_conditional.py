"""The digits with labels: a class-conditional model, with optional guidance.

python main.py --config=configs/digits_conditional.py
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits.long()
    config.model.num_classes = 10
    return config
