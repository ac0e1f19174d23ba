"""CIFAR-10 as Karras et al. (2022) train it, preconditioned, with the network of Ho et al. (2020).

    python main.py --config=configs/cifar10_edm.py

200 million images. Their networks (DDPM++, NCSN++) and augmentation are not here; the sampler is
Euler's, which is DDIM. Their figure, with those and Heun's sampler: FID 1.97. Not yet run here.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """The config."""
    config = default()
    config.model.dropout = 0.13
    config.diffusion.update(schedule="edm", prediction="edm", sigma_data=0.5)
    config.training.update(
        times="log_normal",
        ema="half_life",
        ema_images=500_000,
        steps=390_625,
        batch_size=512,
        learning_rate=1e-3,
        warmup_steps=19_531,
        grad_clip=0.0,
    )
    config.sampling.update(sampler="ddim", steps=50, clip=False)
    return config
