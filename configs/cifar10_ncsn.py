"""CIFAR-10 by a score network with NCSNv2's settings (Song & Ermon 2020), on the paper's UNet.

    python main.py --config=configs/cifar10_ncsn.py

Their levels, training and sampler: sigma from 0.01 to 50 for data in [0, 1], which is 0.02 to 100
for these in [-1, 1], and epsilon = 6.2e-6, which is 0.062 sigma_min^2 in either. A sample takes
1161 calls. Their network is a RefineNet with instance norms, not a UNet; their figure: FID 10.87.
Not run here.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.diffusion.update(schedule="geometric", num_steps=232, sigma_min=0.02, sigma_max=100.0)
    config.model.update(noise_input="none", dropout=0.0)
    config.training.update(
        steps=300_000,
        batch_size=128,
        learning_rate=1e-4,
        warmup_steps=0,
        grad_clip=0.0,
        ema_decay=0.999,
    )
    config.sampling.update(
        sampler="langevin", langevin_steps=5, langevin_step_size=0.062, clip=False
    )
    return config
