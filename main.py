"""Trains, samples and evaluates diffusion models: python main.py --config=configs/cifar10.py

The same command resumes where it was stopped. Every key of the config can be overridden:
--config.training.batch_size=64. Modes: --mode=train, sample, edit, compare, evaluate, sweep,
reference, export. `python -m ddpm` is the same; the command itself is `ddpm.cli.run`.
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    # Run as a file: importing it as a module would import JAX before the process starts again.
    runpy.run_path(str(Path(__file__).parent / "ddpm" / "__main__.py"), run_name="__main__")
