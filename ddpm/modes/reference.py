"""Features of the data, computed once and cached, and their floor; no run is needed."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from ddpm.build.data import held_out as held_out_data
from ddpm.build.data import source
from ddpm.data.images import check_image_shape
from ddpm.errors import InputError
from ddpm.evaluation import comparison, report
from ddpm.modes.measures.fidelity import NAMES
from ddpm.modes.measures.job import features_of_data, make_extractor
from ddpm.training import sharding


def reference(config: ConfigDict, workdir: Path) -> None:
    """Computes the features that --mode=evaluate compares with; writes only to the cache."""
    del workdir
    if jax.process_count() > 1:
        raise InputError("--mode=reference runs in a single process: leave out --distributed")
    train, held_out = source(config), held_out_data(config)
    extractor = make_extractor(config, train.image_shape, sharding.data_mesh())
    if held_out is not None:
        check_image_shape(
            held_out.image_shape, train.image_shape, "the training images are", "those held out"
        )
    data = features_of_data(config, extractor, train, held_out=False)
    print(f"{len(data.vectors):,} training images, {data.vectors.shape[1]} features each")
    print("  ".join(f"{name}: {value}" for name, value in extractor.network.key.items()))
    other = None
    if held_out is not None:
        other = features_of_data(config, extractor, held_out, held_out=True)
    try:
        floor = comparison.floor(data, other, config.evaluation.num_samples)
    except ValueError as error:  # too few images
        raise InputError(f"the floor: {error}") from error
    of = f"{floor.images:,} {floor.of}"
    rows = [(NAMES[name], of, report.number(v)) for name, v in floor.values.items()]
    print(report.plain_table(("floor", "of", "value"), rows))
