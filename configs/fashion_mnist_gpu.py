"""Fashion-MNIST, 28x28 grey, sized for one GPU: the CIFAR-10 network with three levels.

    python main.py --config=configs/fashion_mnist_gpu.py

Not yet run to the end.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.update(name="fashion_mnist", flip=False)
    config.model.update(channel_multipliers=(1, 2, 2), attention_resolutions=(14,))
    config.training.update(steps=100_000, warmup_steps=1000, ema_decay=0.999, sample_every=10_000)
    return config
