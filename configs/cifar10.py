"""The paper's CIFAR-10 experiment (Section 4, Appendix B), hyper-parameter by hyper-parameter.

    python main.py --config=configs/cifar10.py

The paper's figures: 800k steps in 10.6 hours on a TPU v3-8, FID 3.17, 3.75 bits/dim.
Not yet run here to the end: this library's own figures come with the first full run.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config: the defaults are this experiment."""
    return default()
