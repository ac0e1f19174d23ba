"""Fashion-MNIST, 12 epochs on two CPU cores: the network whose weights are shipped.

python main.py --config=configs/fashion_mnist_long.py
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """Returns the config: in float16 the weights take less than 2 MB."""
    config = fashion_mnist.get_config()
    config.model.update(channels=24, channel_multipliers=(1, 2, 3), attention_resolutions=())
    config.training.update(
        steps=22_500,
        learning_rate=1e-3,
        times="low_discrepancy",
        ema="power",
        ema_snapshot_every=1250,
        sample_every=5000,
        checkpoint_every=500,
    )
    return config
