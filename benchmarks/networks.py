"""The networks that are compared, by name: image shape, batch size, and the network's settings."""

from typing import Any, NamedTuple


class Network(NamedTuple):
    """One line of the comparison; `settings` are the arguments of ddpm.UNet, or ddpm.DiT."""

    image_shape: tuple[int, int, int]
    batch_size: int
    settings: dict[str, Any]
    kind: str = "unet"
    ddim_steps: int = 20  # where whole sampling is timed
    forward_flops: float | None = None  # an image, counted by hand; a training step is three


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
    # The paper's: ddpm.UNet's own defaults.
    "cifar10": Network((32, 32, 3), 16, {}, forward_flops=12.44e9),
    "celebahq256": Network(
        (256, 256, 3),
        2,
        {"channel_multipliers": (1, 1, 2, 2, 4, 4), "dropout": 0.0},
        forward_flops=497e9,
    ),
    "fashion_mnist_gpu": Network(
        (28, 28, 1), 16, {"channel_multipliers": (1, 2, 2), "attention_resolutions": (14,)}
    ),
    # DiT-B/2 on CIFAR-10's images: 256 tokens.
    "dit": Network(
        (32, 32, 3),
        16,
        {"channels": 768, "depth": 12, "head_channels": 64, "dropout": 0.0},
        kind="dit",
    ),
}
_TINY = {
    "unet": {
        "channels": 8,
        "channel_multipliers": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "num_groups": 4,
    },
    "dit": {"channels": 8, "depth": 2, "head_channels": 4},
}

WHAT = ("train", "forward", "step", "sample")  # is timed
LEARNING_RATE, EMA_DECAY, GRAD_CLIP = 2e-4, 0.9999, 1.0


def tiny(network: Network) -> Network:
    """Returns a network of the same kind that compiles in seconds, to rehearse with."""
    shape = (8, 8, network.image_shape[-1])
    return network._replace(image_shape=shape, settings=_TINY[network.kind], forward_flops=None)
