"""From what a user names to a source."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentae.console import say
from latentae.data.sources.arrow import ArrowSource, DatasetSource, is_saved_dataset
from latentae.data.sources.base import IMAGE_EXTENSIONS, extension_of, is_url, place_of_name
from latentae.data.sources.folder import ARCHIVE_EXTENSIONS, FileSource, FolderSource
from latentae.data.sources.manifest import MANIFEST_EXTENSIONS, ManifestSource, is_manifest
from latentae.data.sources.parquet import ParquetSource, open_parquet
from latentae.data.sources.remote import kind_of
from latentae.data.sources.rows import bytes_leaves
from latentae.data.sources.table import Source
from latentae.data.sources.tar import TarSource
from latentae.errors import RequestError

COMPRESSED_EXTENSIONS = frozenset({".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"})
BRACES = re.compile(r"\{([^{}]*)\}")
MOST_FILES = 100_000
LOOKING_THREADS = 16
WHAT_TO_GIVE = (
    "a folder of images, a tar or parquet file (or a folder of these), a csv, tsv or jsonl, an image, or a URL of one "
    "of these"
)


class NothingThere(RequestError):
    """No image, or clip, is in what was given."""


@dataclass(frozen=True)
class Wanted:
    """What is looked for in archives: images, or clips."""

    noun: str = "images"
    extensions: Set[str] = IMAGE_EXTENSIONS
    column: str = "image"


IMAGES = Wanted()


def open_source(path: Any, columns: Sequence[str] | None = None) -> Source:
    """The source for what a user names.

    | given                                       | becomes                                                    |
    |---------------------------------------------|------------------------------------------------------------|
    | a folder with images                        | `FolderSource`; tars and parquet files in it are left out  |
    | a folder with tars, or parquet files, alone | `TarSource`, `ParquetSource` of all, the folder their root |
    | a folder of ``Dataset.save_to_disk``        | `ArrowSource`                                              |
    | ``X.tar``, ``X.parquet``, ``X.arrow``       | `TarSource`, `ParquetSource`, `ArrowSource` of one         |
    | ``train-{000..012}.tar``, ``{a,b}.parquet`` | the same of several, all of which must exist               |
    | ``X.csv``, ``X.tsv``, ``X.jsonl``           | `ManifestSource`; also ``X.parquet`` with paths, no images |
    | an image file                               | `FileSource`                                               |
    | a ``datasets.Dataset``                      | `DatasetSource`                                            |

    Each of these may lie in an object store or on the web: ``s3://bucket/folder``, ``https://host/x.tar``. Tables
    beside tars that bear their names, as img2dataset writes them, do not count as parquet files of images.

    Args:
        columns: names of the columns, or fields, to carry along; None for all.

    Raises:
        RequestError: nothing is there, or no image is in it, or a source cannot be read as it is.
        DataError: a tar, parquet or Arrow file is cut short or damaged.
    """
    if is_dataset(path):
        return DatasetSource(path, columns=columns)
    name, place = os.fspath(path), place_of_name(path)
    kind, extension = _kind(place, name), extension_of(place)
    if kind == "folder" and not is_saved_dataset(place):
        return _open_folder(place, name, columns)
    if kind == "file" and extension in IMAGE_EXTENSIONS:
        _refuse_columns(columns, name)
        return FileSource(place)
    return open_archive(path, columns, IMAGES)


def open_archive(path: str | os.PathLike[str], columns: Sequence[str] | None, wanted: Wanted) -> Source:
    """The source for what holds images or clips in files or tables: all that `open_source` takes but folders and files
    of images.

    Raises:
        RequestError, DataError: as `open_source`.
    """
    name, place = os.fspath(path), place_of_name(path)
    kind, extension = _kind(place, name), extension_of(place)
    if kind is None:
        return _open_pattern(name, columns, wanted)
    if extension == ".arrow" or (kind == "folder" and is_saved_dataset(place)):
        return _not_empty(ArrowSource(place, columns=columns, usual=wanted.column), name, wanted)
    if kind == "folder":
        folder = FolderSource(place, wanted.extensions)
        if not folder.archives:
            return _not_empty(folder, name, wanted)
        return _open_archives(folder.archives, place, name, columns, wanted)
    if extension in ARCHIVE_EXTENSIONS:
        return _open_archives([place], None, name, columns, wanted)
    if extension in COMPRESSED_EXTENSIONS:
        raise RequestError(f"{name} is compressed, and {wanted.noun} in it cannot be read one by one: unpack it first.")
    if extension in MANIFEST_EXTENSIONS:
        return _not_empty(ManifestSource(place, columns), name, wanted)
    raise RequestError(f"{name} is not an image file by its name, nor a set of images: give {WHAT_TO_GIVE}.")


def is_dataset(given: Any) -> bool:
    """Whether this is a data set of the ``datasets`` library, or several by name; it is not imported for that."""
    return hasattr(given, "with_format") and not isinstance(given, str | os.PathLike)


def _kind(place: str, name: str) -> str | None:
    try:
        kind = kind_of(place)
    except OSError as error:
        raise RequestError(f"{name} cannot be read ({error.strerror or error}): check the address.") from error
    if kind is None and not BRACES.search(name):
        raise RequestError(f"{name} does not exist: give {WHAT_TO_GIVE}.")
    return kind


def _open_folder(place: str, name: str, columns: Sequence[str] | None) -> Source:
    source = FolderSource(place)
    if source.items():
        if source.archives:
            count = len(source.archives)
            say(
                f"{name}: {count} tar and parquet files beside the images are left out, {source.archives[0]} the first."
            )
        _refuse_columns(columns, name)
        return source
    if source.archives:
        return _open_archives(source.archives, place, name, columns, IMAGES)
    return _not_empty(source, name, IMAGES)


def _open_archives(
    files: list[str], root: str | None, name: str, columns: Sequence[str] | None, wanted: Wanted
) -> Source:
    tars = [file for file in files if file.lower().endswith(".tar")]
    stems = {os.path.splitext(file)[0] for file in tars}  # noqa: PTH122
    tables = [file for file in files if file not in tars and os.path.splitext(file)[0] not in stems]  # noqa: PTH122
    if tars and tables:
        raise RequestError(
            f"{name} holds {len(tars)} tar and {len(tables)} parquet files: give a folder or pattern of one kind."
        )
    if tars:
        return _not_empty(TarSource(*tars, root=root, columns=columns, extensions=wanted.extensions), name, wanted)
    if len(tables) == 1 and _lists_images(tables[0]):
        return _not_empty(ManifestSource(tables[0], columns), name, wanted)
    return _not_empty(ParquetSource(*tables, root=root, columns=columns, usual=wanted.column), name, wanted)


def _lists_images(place: str) -> bool:
    with open_parquet(place) as parquet:
        return not bytes_leaves(parquet.schema_arrow) and is_manifest(parquet.schema_arrow)


def _open_pattern(pattern: str, columns: Sequence[str] | None, wanted: Wanted) -> Source:
    files = [place_of_name(file) for file in expand_braces(pattern)]
    others = [file for file in files if extension_of(file) not in ARCHIVE_EXTENSIONS]
    if others:
        raise RequestError(f"{pattern} stands for {others[0]}: patterns are for tar and parquet files.")
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:
        kinds: list[Any] = list(pool.map(kind_of, files))
    missing = [file for file, kind in zip(files, kinds) if kind != "file"]
    if missing:
        raise RequestError(
            f"{len(missing)} of the {len(files)} files of {pattern} do not exist, {missing[0]} the first: correct the "
            "pattern or fetch them."
        )
    return _open_archives(files, _common_folder(files), pattern, columns, wanted)


def _common_folder(files: list[str]) -> str:
    parse: Callable[[str], str] = posixpath.dirname
    if not is_url(files[0]):
        return os.path.commonpath([parse(file) for file in files])
    scheme = files[0].partition("://")[0]
    return f"{scheme}://" + posixpath.commonpath([parse(file.partition("://")[2]) for file in files])


def _refuse_columns(columns: Sequence[str] | None, name: str) -> None:
    if columns:
        raise RequestError(f"{name} holds images and nothing beside them, no {columns[0]!r} to carry along.")


def expand_braces(pattern: str) -> list[str]:
    """Names for a pattern as of a shell: ``{000..012}`` counts, with the leading zeros given, and ``{a,b}`` lists.

    Raises:
        RequestError: the pattern is not closed, has one name twice, or stands for very many.
    """
    names, rest = [""], pattern
    while match := BRACES.search(rest):
        inner = match[1]
        if counted := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
            first, last = counted[1], counted[2]
            width = len(first) if first.startswith("0") else 0
            if abs(int(last) - int(first)) >= MOST_FILES:
                raise RequestError(f"{pattern} stands for more than {MOST_FILES} files: check the numbers.")
            parts = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        else:
            parts = inner.split(",")
        if len(parts) * len(names) > MOST_FILES:
            raise RequestError(f"{pattern} stands for more than {MOST_FILES} files: check the numbers.")
        names = [name + rest[: match.start()] + part for name in names for part in parts]
        rest = rest[match.end() :]
    names = [name + rest for name in names]
    if not names or len(set(names)) < len(names):
        raise RequestError(f"{pattern} stands for no files, or for one twice: write it as in train-{{000..012}}.tar.")
    return names


def refuse_output_in_input(src: object, dst: Path) -> None:
    """Refuse to write below a folder that is read: what is written would be an input of the next run.

    Raises:
        RequestError: ``dst`` is the folder ``src`` or lies in it.
    """
    if isinstance(src, str | Path) and Path(src).is_dir() and dst.resolve().is_relative_to(Path(src).resolve()):
        where = "is the input folder itself" if dst.resolve() == Path(src).resolve() else f"lies in the input {src}"
        raise RequestError(
            f"The output {dst} {where}, and its images would be inputs of the next run: choose another folder."
        )


def _not_empty(source: Any, name: str, wanted: Wanted) -> Source:
    if len(source.items()):
        return source
    other_files: Counter[str] = getattr(source, "other_files", None) or Counter()
    kinds = ", ".join(f"{count} {extension}" for extension, count in other_files.most_common(3))
    nothing = "no files" if isinstance(source, FolderSource) else f"no {wanted.noun}"
    found = f"no {wanted.noun} but other files ({kinds})" if kinds else nothing
    raise NothingThere(f"{name} holds {found}: {wanted.noun} end in {' '.join(sorted(wanted.extensions))}.")
