"""Looking a data set up in tensorflow-datasets: quietly, without TensorFlow, errors in a line."""

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import logging as absl_logging

from ddpm.errors import InputError, first_line

RANDOM_ACCESS = ("array_record", "parquet")  # tfds' formats whose examples are read by index
_OURS = ("digits", "folder", "npz")  # what a mistyped name may have meant, besides tfds' sets


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps absl's warnings back: tfds gives one for each folder that it does not find."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def import_tfds() -> ModuleType:
    """Imports tensorflow_datasets when it is first needed: it takes most of a second."""
    with quiet():
        try:
            import tensorflow_datasets
        except ImportError as error:
            raise InputError(
                f"tensorflow-datasets cannot be imported ({error}): "
                "pip install tensorflow-datasets importlib_resources"
            ) from error
    return tensorflow_datasets


def find(name: str, data_dir: str | Path | None = None) -> Any:
    """Returns tfds' builder of a data set, prepared or not; one that is not would write
    array_record.

    Raises InputError for an unknown name or config, with the nearest ones, and for a set that is
    there in a format without random access.
    """
    tfds = import_tfds()
    place = str(Path(data_dir).expanduser()) if data_dir else None
    with quiet():
        try:
            builder = tfds.builder(name, data_dir=place)
            if not builder.is_prepared():
                return tfds.builder(name, data_dir=place, file_format="array_record")
        except Exception as error:  # ValueError mostly, and what importing a builder may raise
            raise _explained(tfds, name, error) from error
    file_format = builder.info.file_format.value
    if file_format not in RANDOM_ACCESS:
        raise InputError(
            f"{builder.data_dir} was prepared in the format {file_format}, which has no random "
            f"access: prepare it again elsewhere with `{command(name)}`, and give that folder as "
            "data.path (or remove this one)"
        )
    return builder


def is_prepared(builder: Any) -> bool:
    """Returns whether the set is on disk, complete."""
    with quiet():
        return builder.is_prepared()


def command(name: str) -> str:
    """Returns the command line that prepares a data set."""
    return f"python -m ddpm.data.prepare {name} --data_dir=FOLDER"


def _explained(tfds: ModuleType, name: str, error: Exception) -> InputError:
    """Returns what tfds' many-lined complaint about a name comes down to."""
    names = tfds.list_builders(with_community_datasets=False)
    base, _, config = name.partition(":")[0].partition("/")
    if base in names:
        with contextlib.suppress(Exception):
            configs = list(tfds.builder_cls(base).builder_configs)
            if config and config not in configs:
                near = difflib.get_close_matches(config, configs, n=3) or configs[:10]
                said = ", ".join(f"{base}/{c}" for c in near) or f"{base}, without a config"
                return InputError(f"tfds set {base!r} has no config {config!r}; there is {said}")
        return InputError(f"tfds set {name!r} cannot be used: {first_line(error)}")
    near = difflib.get_close_matches(base, [*names, *_OURS], n=3)
    said = f"did you mean {' or '.join(near)}?" if near else "see tfds.list_builders()"
    return InputError(f"{name!r} is no data set of tensorflow-datasets or of ours; {said}")
