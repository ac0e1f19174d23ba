"""CelebA-HQ at 256x256 (Appendix B).

    python main.py --config=configs/celebahq256.py

The paper's figures: 0.5M steps at 2.2 steps/s on a TPU v3-8.
Not yet run here to the end. tfds requires preparing the images by hand first; its error says how.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.update(name="celeb_a_hq/256", image_size=(256, 256))
    config.model.update(channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config.training.update(
        steps=500_000,
        batch_size=64,
        learning_rate=2e-5,
        sample_every=100_000,
    )
    config.sampling.update(variance="fixed_small", num_samples=16, batch_size=16)
    config.evaluation.split = ""  # tfds has only the training split
    return config
