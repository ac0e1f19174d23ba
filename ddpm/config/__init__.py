"""The config: every key with the paper's value, and what is allowed.

config = ddpm.config.default()
config.training.batch_size = 64
"""

from ddpm.config.keys import DECODERS, PARTS, TASKS, WITHOUT_FLOW, default
from ddpm.config.tree import flatten, nearest, to_json, variant, with_settings

__all__ = [
    "DECODERS",
    "PARTS",
    "TASKS",
    "WITHOUT_FLOW",
    "default",
    "flatten",
    "nearest",
    "to_json",
    "variant",
    "with_settings",
]
