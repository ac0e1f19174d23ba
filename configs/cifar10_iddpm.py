"""CIFAR-10 as Nichol & Dhariwal (2021) train it: cosine, T = 4000, learned variance, hybrid loss.

    python main.py --config=configs/cifar10_iddpm.py

Their network, with 52,546,438 parameters; their code divides its input t by four, this one does
not.
Their figures, 500k steps: FID 3.19, 3.17 bits/dim. Not yet run here.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.flip = False
    config.model.update(
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        head_channels=64,
        dropout=0.3,
        scale_shift=True,
        norm_epsilon=1e-5,
        symmetric_downsampling=True,
        cosines_first=True,
        frequency_shift=0,
    )
    config.diffusion.update(schedule="cosine", num_steps=4000, variance="learned_range")
    config.training.update(
        loss="hybrid", steps=500_000, learning_rate=1e-4, warmup_steps=0, grad_clip=0.0
    )
    return config
