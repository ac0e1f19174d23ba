"""Preparing a set of tensorflow-datasets, once: `python -m ddpm.data.prepare cifar10`.

cifar10, cifar100, mnist and fashion_mnist are prepared without TensorFlow, as the very sets that
tfds would make: same name, version, order and place. Any other needs TensorFlow for this, once.
"""

import argparse
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddpm.data import catalogue
from ddpm.data.originals import file_name, without_tensorflow
from ddpm.errors import InputError, first_line
from ddpm.files.progress import on_terminal


def prepare(
    name: str, data_dir: str | Path | None = None, *, manual_dir: str | Path | None = None
) -> Any:
    """Makes a set ready to be read from data_dir, and gives its tfds builder.

    Files that the user has downloaded are looked for in manual_dir, by default
    <data_dir>/downloads/manual/<name> and then <data_dir>/downloads/manual; the others are
    downloaded. Either way tfds compares their checksums. Where the set is already prepared
    nothing happens. Raises InputError, within 10 seconds if there is no network.
    """
    builder = catalogue.find(name, data_dir)
    started = Path(builder.data_dir).exists()
    if catalogue.is_prepared(builder):
        return builder
    if started:
        raise InputError(
            f"{builder.data_dir} is not complete (it has no dataset_info.json): remove that folder"
        )
    downloads = Path(builder.data_dir_root) / "downloads"
    manual = _manual_folder(builder, downloads, manual_dir)
    free = without_tensorflow(type(builder))
    if free is not None:
        builder = free(data_dir=str(builder.data_dir_root), file_format="array_record")
        urls = free.urls(builder)
    else:
        _check_requirements(builder, name, manual)
        urls = list(builder.url_infos or {})[:1]  # which of them it needs only tfds' code knows
    missing = [u for u in urls if not _is_here(builder, u, downloads, manual)]
    if missing:
        _check_network(missing, builder, name, downloads)
    try:
        _run(builder, manual)
    except Exception as error:  # tfds raises, and passes on, many kinds
        mendable = _explained(error, name, builder.data_dir, manual)
        builder = catalogue.find(name, data_dir)
        if catalogue.is_prepared(builder):  # another process has been faster
            return builder
        if mendable is None:
            raise
        raise mendable from error
    return catalogue.find(name, data_dir)


def _run(builder: Any, manual: Path) -> None:
    library = catalogue.import_tfds()
    if not on_terminal():
        library.disable_progress_bar()
    with catalogue.quiet():
        builder.download_and_prepare(
            file_format="array_record",
            # Google's copies are tfrecord; asking for one would be a wait for the network.
            download_config=library.download.DownloadConfig(
                manual_dir=manual, try_download_gcs=False
            ),
        )


def _manual_folder(builder: Any, downloads: Path, manual_dir: str | Path | None) -> Path:
    if manual_dir is not None:
        return Path(manual_dir).expanduser()
    own = downloads / "manual" / builder.name  # MNIST and Fashion-MNIST have the same file names
    return own if own.is_dir() else downloads / "manual"


def _is_here(builder: Any, url: str, downloads: Path, manual: Path) -> bool:
    """Returns whether tfds will find the file, given by the user or downloaded before."""
    from tensorflow_datasets.core.download import resource

    known = (builder.url_infos or {}).get(url)
    file = resource.get_dl_fname(url, known.checksum if known else None)
    places = [manual / file_name(url), downloads / file, downloads / builder.name / file]
    return any(p.exists() for p in places)


def _check_requirements(builder: Any, name: str, manual: Path) -> None:
    """Raises InputError for a set that only tfds' own code can prepare, without its packages."""
    instructions = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    if instructions and not (manual.is_dir() and any(manual.iterdir())):
        raise InputError(
            f"tfds set {name!r} has to be downloaded by hand, to {manual} (tfds says: "
            f"{instructions}); then run `{catalogue.command(name)}`",
            longest=500,
        )
    needed = {"tensorflow": "tensorflow-cpu"}
    if builder.name == "lsun":  # its files are databases, which only this one reads
        needed["tensorflow_io"] = "tensorflow-io"
    missing = [package for module, package in needed.items() if not find_spec(module)]
    if missing:
        raise InputError(
            f"tfds set {name!r} is not in {builder.data_dir_root}, and to prepare it, once, needs "
            f"TensorFlow: pip install {' '.join(missing)}, or run `{catalogue.command(name)}` "
            f"where that is and copy FOLDER/{builder.name}"
        )


def _check_network(urls: list[str], builder: Any, name: str, downloads: Path) -> None:
    """Raises InputError where there is no network: tfds itself would try for minutes."""
    why = _unreachable(urls[0])
    if why:
        own, place = downloads / "manual" / builder.name, builder.data_dir_root
        files = ", ".join(file_name(u) for u in urls)
        raise InputError(
            f"tfds set {name!r} is not in {place}, and {urlsplit(urls[0]).netloc} cannot be "
            f"reached to download it ({why}): where there is a network run "
            f"`{catalogue.command(name)}` and copy FOLDER/{builder.name} to {place}, or download "
            f"{files} from {urls[0].rpartition('/')[0]} to {own}",
            longest=600,
        )


def _unreachable(url: str, seconds: float = 4.0) -> str:
    """Returns why a server does not answer, or ''. In a thread, since looking a name up has no
    time-out."""
    answer = [f"no answer in {seconds:g} seconds"]

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
            answer[0] = ""
        except urllib.error.HTTPError:
            answer[0] = ""  # it answered: the download itself will tell
        except (OSError, ValueError) as error:
            answer[0] = first_line(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return answer[0]


def _explained(error: Exception, name: str, place: str, manual: Path) -> InputError | None:
    """Returns what the user can mend; None for what looks like a fault of ours or of tfds."""
    from tensorflow_datasets.core.download import download_manager, util

    line = first_line(error).rstrip(":")
    if isinstance(error, download_manager.NonMatchingChecksumError):
        return InputError(f"{line}; it is not the file that tfds expects: download it again")
    if isinstance(error, AssertionError):  # tfds' own way to miss files
        return InputError(f"tfds set {name!r}: {line} (files of yours belong in {manual})")
    kinds = (util.DownloadError, OSError, EOFError, ImportError, tarfile.TarError)
    if isinstance(error, kinds):
        return InputError(f"tfds set {name!r} could not be prepared in {place}: {line}")
    return None


def main() -> int:
    """Runs the command line: 0, or 2 with one line of error."""
    parser = argparse.ArgumentParser(prog="python -m ddpm.data.prepare", description=__doc__)
    parser.add_argument("name", help="of the tfds set, such as cifar10 or celeb_a_hq/256")
    parser.add_argument("--data_dir", help="where to put it; by default where tfds does")
    parser.add_argument("--manual_dir", help="a folder of original files, already downloaded")
    args = parser.parse_args()
    try:
        builder = prepare(args.name, args.data_dir, manual_dir=args.manual_dir)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.name} is ready in {builder.data_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
