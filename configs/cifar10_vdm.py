"""CIFAR-10 as Kingma et al. (2021) train it for likelihood: a learned schedule, continuous time.

    python main.py --config=configs/cifar10_vdm.py

Their network, at one resolution throughout, with Fourier features of x as extra input and x added
to the output. Their code has a schedule linear in log-SNR and learns its ends; here its shape is
learned too, as in the paper, without weight decay. Their figure, after 10 million steps:
2.65 bits/dim. Not yet trained here.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.flip = False
    config.model.update(
        channel_multipliers=(1,),
        num_res_blocks=32,
        attention_resolutions=(),
        noise_input="log_snr",
        input_features=(7, 8),
        add_input=True,
    )
    config.diffusion.update(schedule="learned", log_snr_0=13.3, log_snr_1=-5.0)
    config.training.update(
        loss="continuous_bound",
        times="low_discrepancy",
        steps=10_000_000,
        warmup_steps=100,
        adam_b2=0.99,
        weight_decay=0.01,
        grad_clip=0.0,
    )
    config.sampling.variance = "fixed_small"  # the continuous bound is its limit
    return config
