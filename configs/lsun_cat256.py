"""LSUN Cat at 256x256 (Appendix B).

    python main.py --config=configs/lsun_cat256.py

The paper's figures: 1.8M steps, FID 19.75.
Not yet run here to the end. Flips as in the paper, which omits them only for Bedroom (the
authors' code differs).
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.update(name="lsun/cat", image_size=(256, 256))
    config.model.update(channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config.training.update(
        steps=1_800_000,
        batch_size=64,
        learning_rate=2e-5,
        sample_every=100_000,
    )
    config.sampling.update(variance="fixed_small", num_samples=16, batch_size=16)
    config.evaluation.split = "validation"
    return config
