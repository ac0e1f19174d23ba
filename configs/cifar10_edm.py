"""CIFAR-10 as Karras et al. (2022) train it: preconditioned, conditioned on the augmentation.

    python main.py --config=configs/cifar10_edm.py

200 million images, and their sampler of 35 calls. Close to their DDPM++ network, except: attention
after every block at 16x16 on the way up, not only the last; shortcuts without convolution in blocks
that halve or double the resolution; our encoding of the noise. Images are warped bilinearly,
without their filter. Their figure: FID 1.97. Not yet trained here.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.flip = False  # the augmentation includes flips
    config.model.update(
        channel_multipliers=(2, 2, 2),
        num_res_blocks=4,
        up_down="resblock",
        skip_scale=0.5**0.5,
        dropout=0.13,
    )
    config.diffusion.update(schedule="edm", prediction="edm", sigma_data=0.5)
    config.training.update(
        times="log_normal",
        augmentation=0.12,
        ema="half_life",
        ema_images=500_000,
        steps=390_625,
        batch_size=512,
        learning_rate=1e-3,
        warmup_steps=19_531,
        grad_clip=0.0,
    )
    config.sampling.update(sampler="heun", grid="karras", steps=18, clip=False)
    return config
