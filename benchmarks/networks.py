"""The networks that are compared, by name: image shape, batch size, and the UNet's settings."""

from typing import Any, NamedTuple


class Network(NamedTuple):
    """One line of the comparison; `unet` are the arguments of ddpm.UNet."""

    image_shape: tuple[int, int, int]
    batch_size: int
    unet: dict[str, Any]


NETWORKS = {
    "digits": Network(
        (8, 8, 1),
        64,
        {
            "channels": 32,
            "channel_multipliers": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (),
            "dropout": 0.0,
            "num_groups": 8,
        },
    ),
    "small": Network(
        (28, 28, 1),
        64,
        {
            "channels": 32,
            "channel_multipliers": (1, 2, 2),
            "num_res_blocks": 2,
            "attention_resolutions": (14,),
            "dropout": 0.0,
            "num_groups": 8,
        },
    ),
    "cifar10": Network((32, 32, 3), 16, {}),  # the paper's: ddpm.UNet's own defaults
    "celebahq256": Network(
        (256, 256, 3),
        2,
        {"channel_multipliers": (1, 1, 2, 2, 4, 4), "dropout": 0.0},
    ),
}

STEPS = 20  # of DDIM, where whole sampling is timed
LEARNING_RATE, EMA_DECAY, GRAD_CLIP = 2e-4, 0.9999, 1.0
