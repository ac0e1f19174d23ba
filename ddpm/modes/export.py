"""Export of weights, of a run or pretrained, for `diffusers`: a folder, or one .safetensors."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from ddpm.errors import InputError
from ddpm.interop import weights
from ddpm.modes.loading import load_run

FEW_STEPS = (
    "config.sampling.variance = 'fixed_large' is for all T steps: with fewer, diffusers' "
    "DDPMPipeline leaves its noise in the samples; use DDIMPipeline, or export again with "
    "--config.sampling.variance=fixed_small"
)


def export(config: ConfigDict, workdir: Path, out: str, init_from: str = "") -> None:
    """Writes the weights that config.sampling.ema selects, and the settings they need, to `out`;
    says so if a few steps of diffusers would leave noise in samples.

    Raises InputError if `out` is empty or exists already.
    """
    if not out:
        raise InputError("--mode=export needs --out: a new folder, or a file .safetensors")
    target = Path(out).expanduser()
    weights.check_out(target)
    if config.sampling.variance == "analytic":
        raise InputError(
            "config.sampling.variance = 'analytic': no file has a place for it: export with "
            "'fixed_small' or 'fixed_large'"
        )
    run = load_run(config, workdir, "export", init_from)
    weights.export(target, run.built, run.params)
    if run.built.config.sampling.variance == "fixed_large" and target.is_dir():
        print(FEW_STEPS, file=sys.stderr)
    print(target)
