"""A folder of your own images, of any size and format, cropped and resized to 64x64.

    python main.py --config=configs/folder.py --config.data.path=PICTURES --workdir=runs/pictures

The paper's network, for a GPU: a batch of 64 takes about 26 GB. For a few hundred images, or on a
CPU: configs/folder_small.py. For another size: --config.data.image_size='(128, 128)', each side
divisible by 8 for these four levels. An unreadable picture stops the run and is named;
data.broken_images='skip' skips it.
"""

from ml_collections import ConfigDict

from ddpm.config import default


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default()
    config.data.update(name="folder", image_size=(64, 64))
    config.training.update(steps=200_000, batch_size=64, learning_rate=1e-4, sample_every=10_000)
    config.evaluation.split = ""  # a folder has no splits; evaluation.path names another folder
    # Without those that need FID's Inception: see README.
    config.evaluation.parts = ("bound", "flow", "pictures")
    return config
