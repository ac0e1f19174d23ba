"""Any image set of tensorflow-datasets as a source, read without TensorFlow."""

from pathlib import Path
from typing import Any

import numpy as np

from ddpm.data import catalogue
from ddpm.data.images import MAX_PIXELS, Transparency, checked_size, read_image
from ddpm.data.sources import MEMORY_BUDGET, EncodedSource, Source, decoded_once
from ddpm.errors import InputError


def tfds(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    *,
    background: str = "white",
    max_pixels: int = MAX_PIXELS,
    memory_budget: int = MEMORY_BUDGET,
) -> Source:
    """Returns a set by its name, 'cifar10' or 'celeb_a_hq/256', prepared first where it is not yet
    there.

    split is one of the set's, or what tfds makes of them: 'train[:10%]', 'train+test'. data_dir is
    the folder that holds (or will hold) <name>/<version>; by default tfds' own. The feature 'image'
    is read, grey or (whatever else it has) in three channels, and 'label' where it is a class.
    Transparency is composited on the background, which the log says once; images of more than
    max_pixels are refused. Images are cropped and resized only to an image_size (height, width)
    that is not their own.
    Decoded images are cached on disk if they fit the budget (bytes), else decoded at each use.
    Raises InputError.
    """
    image_size = checked_size(image_size)
    builder = catalogue.find(name, data_dir)
    if not catalogue.is_prepared(builder):
        from ddpm.data.prepare import prepare  # it is also a command, so not imported by others

        builder = prepare(name, data_dir)
    how = {"background": background, "max_pixels": max_pixels}
    with catalogue.quiet():
        return _read(builder, name, split, image_size, memory_budget, how)


def _read(
    builder: Any,
    name: str,
    split: str,
    image_size: tuple[int, int] | None,
    memory_budget: int,
    how: dict[str, Any],
) -> Source:
    library = catalogue.import_tfds()
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(f"tfds set {name!r} has no split {split!r}; there is {splits}") from error
    shape, features = _features(builder, name, image_size)
    _check_files(builder, instructions)
    records = builder.as_data_source(
        split, deserialize_method=library.decode.DeserializeMethod.RAW_BYTES
    )
    if not len(records):
        raise InputError(f"tfds set {name!r}: the split {split!r} has no examples")
    raw = {"image": library.decode.SkipDecoding()}
    how = {"channels": shape[2], "image_size": image_size, **how}
    transparency = Transparency(f"{name}, {split}", how["background"])

    def fetch(indices: np.ndarray) -> tuple[list[Any], np.ndarray | None]:
        found = [
            features.deserialize_example_np(record, decoders=raw)
            for record in records.__getitems__(indices.tolist())
        ]
        label = np.array([f["label"] for f in found], np.int32) if "label" in features else None
        return [(i, f["image"]) for i, f in zip(indices, found, strict=True)], label

    def decode(encoded: tuple[int, bytes]) -> np.ndarray:
        index, file = encoded
        where = f"example {index} of {builder.data_dir}, {split}"
        image = read_image(file, name=where, transparent=transparency, **how)
        if image.shape != shape:
            raise InputError(
                f"{where}: is {list(image.shape)}, others {list(shape)}: set image_size"
            )
        return image

    source = EncodedSource(
        image_shape=shape,
        num_classes=features["label"].num_classes if "label" in features else None,
        length=len(records),
        fetch=fetch,
        decode=decode,
    )
    files = sorted({str(i.filename) for i in instructions})
    stats = [(f, Path(f).stat().st_size, Path(f).stat().st_mtime_ns) for f in files]
    key = {"tfds": builder.info.full_name, "split": split, "shape": shape, "files": stats}
    key |= {"background": how["background"]}
    return decoded_once(source, f"{name}-{split}", key, memory_budget, transparency)


def _features(
    builder: Any, name: str, image_size: tuple[int, int] | None
) -> tuple[tuple[int, int, int], Any]:
    """Returns the images' shape, and tfds' features cut down to 'image' and, where it is one,
    'label'."""
    kinds = catalogue.import_tfds().features
    whole = builder.info.features
    features = dict(whole.items()) if isinstance(whole, kinds.FeaturesDict) else {}
    image = features.get("image")
    if not isinstance(image, kinds.Image) or np.dtype(image.np_dtype).kind != "u":
        raise InputError(
            f"tfds set {name!r} has no image to learn from: a feature 'image' of 8 or 16 bits; "
            f"it has {', '.join(features)}"
        )
    height, width, depth = image.shape
    if image_size is not None:
        height, width = image_size
    if height is None or width is None:
        raise InputError(f"the images of tfds set {name!r} are of various sizes: set image_size")
    used = {"image": image}
    if "label" in features and isinstance(features["label"], kinds.ClassLabel):
        used["label"] = features["label"]
    return (height, width, 1 if depth == 1 else 3), kinds.FeaturesDict(used)


def _check_files(builder: Any, instructions: Any) -> None:
    """Raises InputError for a copy that was broken off: tfds looks at dataset_info.json only."""
    for instruction in instructions:
        if not Path(instruction.filename).is_file():
            raise InputError(
                f"{builder.data_dir}: {Path(instruction.filename).name} is missing; copy the "
                "folder again, or remove it to prepare the set anew"
            )
