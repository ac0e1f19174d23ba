"""A small folder of your own images, some hundreds, at 32x32: minutes on two CPU cores.

python main.py --config=configs/folder_small.py --config.data.path=PICTURES --workdir=runs/pictures

1,113,955 parameters; 200 pictures of clothes, with compilation and 36 samples, took about 5 minutes
of processor time on an AMD EPYC (jax 0.10.2). Grey pictures: add --config.data.channels=1. With
more time, more steps (--config.training.steps); with a GPU, or tens of thousands of pictures,
configs/folder.py.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.update(name="folder", image_size=(32, 32))
    config.diffusion.schedule = "cosine"  # for small images, as in digits.py
    config.model.update(
        channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        dropout=0.1,  # a small set is soon learned by heart
        num_groups=8,
    )
    config.training.update(
        steps=1000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=100,
        ema="warm_up",
        ema_decay=0.995,
        log_every=50,
        sample_every=0,
        checkpoint_every=200,
    )
    config.sampling.update(num_samples=36, batch_size=36)
    # 20 steps in place of 1000, at nearly the quality (docs/results.md).
    config.sampling.update(sampler="dpm_solver", stochastic=True, grid="karras", steps=20)
    config.evaluation.split = ""  # a folder has no splits; evaluation.path names another folder
    # Without those that need FID's Inception, and the flow, which takes an hour of a CPU.
    config.evaluation.parts = ("bound", "pictures")
    return config
