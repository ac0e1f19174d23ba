"""Fashion-MNIST, 28x28 grey, sized for two CPU cores: about half an hour.

python main.py --config=configs/fashion_mnist.py
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.update(name="fashion_mnist", flip=False)
    config.diffusion.schedule = "cosine"
    config.model.update(
        channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(7,),
        dropout=0.0,
        num_groups=8,
    )
    config.training.update(
        steps=2500,
        batch_size=32,
        learning_rate=1.5e-3,
        warmup_steps=200,
        ema_decay=0.998,
        log_every=50,
        sample_every=1250,
        checkpoint_every=250,
    )
    config.evaluation.update(num_samples=2048, bound_times=4, flow_images=64)
    return config
