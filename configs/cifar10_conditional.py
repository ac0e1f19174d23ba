r"""CIFAR-10 with its ten labels, a tenth of them dropped: class-conditional, with guidance.

    python main.py --config=configs/cifar10_conditional.py
    python main.py --config=configs/cifar10_conditional.py --mode=sample \
        --config.sampling.guidance_scale=1.5

Not yet run here to the end.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config: the paper's, with labels."""
    config = default()
    config.model.num_classes = 10
    return config
