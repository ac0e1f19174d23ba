"""scikit-learn's 8x8 digits, included: a small DDPM for a laptop's CPU.

python main.py --config=configs/digits.py
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config: two thirds of the work of `long`, and samples as good."""
    config = long()
    config.model.channels = 24
    # On images this small 250 steps lose nothing; the samples are even better than by 1000.
    config.diffusion.num_steps = 250
    config.training.update(
        times="low_discrepancy",
        learning_rate=3e-3,
        warmup_steps=100,
        ema="warm_up",  # forgets the first weights before the first samples
        sample_every=800,
    )
    return config


def long() -> ConfigDict:
    """Returns the config that the ablations and the conditional models vary, of T = 1000."""
    config = default()
    config.data.update(name="digits", flip=False)
    # Small images are hidden by less noise than large ones: the linear schedule would spend half of
    # its times where no signal is left to see.
    config.diffusion.schedule = "cosine"
    config.model.update(
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        dropout=0.0,
        num_groups=8,
    )
    config.training.update(
        steps=2400,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=200,
        ema_decay=0.998,
        log_every=100,
        sample_every=0,
        checkpoint_every=500,
    )
    config.evaluation.update(num_samples=359)  # as many as are held out, for a comparable floor
    return config
