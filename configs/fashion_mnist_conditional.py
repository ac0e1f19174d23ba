"""Fashion-MNIST with labels: a class-conditional model, with optional guidance.

    python main.py --config=configs/fashion_mnist_conditional.py

Not yet run to the end.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """Returns the config."""
    config = fashion_mnist.get_config()
    config.model.num_classes = 10
    return config
