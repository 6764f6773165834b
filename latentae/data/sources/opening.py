"""From what a user names to a source."""

import os
import re
from collections import Counter
from pathlib import Path

from latentae.console import say
from latentae.data.sources.base import IMAGE_EXTENSIONS
from latentae.data.sources.folder import ARCHIVE_EXTENSIONS, FileSource, FolderSource
from latentae.data.sources.manifest import MANIFEST_EXTENSIONS, ManifestSource
from latentae.data.sources.parquet import ParquetSource
from latentae.data.sources.table import Source
from latentae.data.sources.tar import TarSource
from latentae.errors import RequestError

COMPRESSED_EXTENSIONS = frozenset({".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"})
BRACES = re.compile(r"\{([^{}]*)\}")
MOST_FILES = 100_000
WHAT_TO_GIVE = "a folder of images, a tar or parquet file (or a folder of these), a csv, tsv or jsonl, or an image"


def open_source(path: str | os.PathLike[str]) -> Source:
    """The source for what a user names.

    | given                                       | becomes                                                    |
    |---------------------------------------------|------------------------------------------------------------|
    | a folder with images                        | `FolderSource`; tars and parquet files in it are left out  |
    | a folder with tars, or parquet files, alone | `TarSource`, `ParquetSource` of all, the folder their root |
    | ``X.tar``, ``X.parquet``                    | `TarSource`, `ParquetSource` of one                        |
    | ``train-{000..012}.tar``, ``{a,b}.parquet`` | the same of several, all of which must exist               |
    | ``X.csv``, ``X.tsv``, ``X.jsonl``           | `ManifestSource`                                           |
    | an image file                               | `FileSource`                                               |

    Tables beside tars that bear their names, as img2dataset writes them, do not count as parquet files of images.

    Raises:
        RequestError: nothing is there, or no image is in it, or a source cannot be read as it is.
        DataError: a tar or parquet file is cut short or damaged.
    """
    name = os.fspath(path)
    path = Path(path)
    if not path.exists():
        if BRACES.search(name):
            return _open_pattern(name)
        raise RequestError(f"{path} does not exist: give {WHAT_TO_GIVE}.")
    if path.is_dir():
        return _open_folder(path)
    extension = path.suffix.lower()
    if extension in ARCHIVE_EXTENSIONS:
        return _open_archives([name], None, name)
    if extension in COMPRESSED_EXTENSIONS:
        raise RequestError(f"{path} is compressed, and images in it cannot be read one by one: unpack it first.")
    if extension in MANIFEST_EXTENSIONS:
        return _not_empty(ManifestSource(path), name, Counter())
    if extension in IMAGE_EXTENSIONS:
        return FileSource(path)
    raise RequestError(f"{path} is not an image file by its name, nor a set of images: give {WHAT_TO_GIVE}.")


def _open_folder(path: Path) -> Source:
    source = FolderSource(path)
    if source.items():
        if source.archives:
            count = len(source.archives)
            say(
                f"{path}: {count} tar and parquet files beside the images are left out, {source.archives[0]} the first."
            )
        return source
    if source.archives:
        return _open_archives(source.archives, path, str(path))
    return _not_empty(source, str(path), source.other_files)


def _open_archives(files: list[str], root: str | os.PathLike[str] | None, name: str) -> Source:
    tars = [file for file in files if file.lower().endswith(".tar")]
    stems = {os.path.splitext(file)[0] for file in tars}  # noqa: PTH122
    tables = [file for file in files if file not in tars and os.path.splitext(file)[0] not in stems]  # noqa: PTH122
    if tars and tables:
        raise RequestError(
            f"{name} holds {len(tars)} tar and {len(tables)} parquet files: give a folder or pattern of one kind."
        )
    if tars:
        source = TarSource(*tars, root=root)
        return _not_empty(source, name, source.other_files)
    return _not_empty(ParquetSource(*tables, root=root), name, Counter())


def _open_pattern(pattern: str) -> Source:
    files = expand_braces(pattern)
    others = [file for file in files if Path(file).suffix.lower() not in ARCHIVE_EXTENSIONS]
    if others:
        raise RequestError(f"{pattern} stands for {others[0]}: patterns are for tar and parquet files.")
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise RequestError(
            f"{len(missing)} of the {len(files)} files of {pattern} do not exist, {missing[0]} the first: correct the "
            "pattern or fetch them."
        )
    root = os.path.commonpath([Path(file).absolute().parent for file in files])
    return _open_archives(files, root, pattern)


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


def _not_empty(source: Source, name: str, other_files: Counter[str]) -> Source:
    if source.items():
        return source
    kinds = ", ".join(f"{count} {extension}" for extension, count in other_files.most_common(3))
    found = f"no images but other files ({kinds})" if kinds else "no files" if Path(name).is_dir() else "no images"
    raise RequestError(f"{name} holds {found}: images end in {' '.join(sorted(IMAGE_EXTENSIONS))}.")
