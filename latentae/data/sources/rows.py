"""Images in the rows of tables, as the Hugging Face hub and the ``datasets`` library hold them: which column has them,
and what their names are."""

from collections.abc import Collection

import pyarrow
import pyarrow.compute as pc

from latentae.data.sources.base import LABEL_COLUMNS
from latentae.errors import RequestError

TEXT = pyarrow.large_string()


def bytes_leaves(schema: pyarrow.Schema) -> dict[str, str]:
    """The columns that may hold images or clips, and in the schema the paths of their bytes: bytes, or a struct of
    ``bytes`` and ``path``."""
    return {field.name: leaf for field in schema if (leaf := _bytes_leaf(field)) is not None}


def _bytes_leaf(field: pyarrow.Field) -> str | None:
    types = pyarrow.types
    kind = field.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return field.name
    if types.is_struct(kind) and any(inner.name == "bytes" and _bytes_leaf(inner) for inner in kind):
        return f"{field.name}.bytes"
    return None


def image_column(where: str, schema: pyarrow.Schema, wanted: str | None, usual: str = "image") -> str:
    """The column that holds the images: the wanted one, or that with the usual name, or the only one.

    Raises:
        RequestError: there is none, or more than one to choose from.
    """
    leaves = bytes_leaves(schema)
    if wanted is not None and wanted not in leaves:
        raise RequestError(f"{where} has no column {wanted!r} of {usual}s: {_described(schema)}.")
    if not leaves:
        raise RequestError(
            f"{where} has no column of {usual}s (bytes, or a struct that holds them): {_described(schema)}."
        )
    if wanted is None and len(leaves) > 1 and usual not in leaves:
        raise RequestError(
            f"{where} has several columns of {usual}s, {', '.join(leaves)}: name one, "
            f"ParquetSource(path, column={next(iter(leaves))!r}), or call it {usual}."
        )
    return wanted or (usual if usual in leaves else next(iter(leaves)))


def _described(schema: pyarrow.Schema) -> str:
    return "it has " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def label_column(names: Collection[str]) -> str | None:
    """The column of labels, if there is one."""
    return next((name for name in LABEL_COLUMNS if name in names), None)


def path_leaf(schema: pyarrow.Schema, column: str) -> str | None:
    """The path in the schema of the images' names, if they have any."""
    kind = schema.field(column).type
    if not pyarrow.types.is_struct(kind):
        return None
    text = (field.name == "path" and is_text(field.type) for field in kind)
    return f"{column}.path" if any(text) else None


def is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def leaf_column(table: pyarrow.Table, leaf: str) -> pyarrow.ChunkedArray:
    """The column at a path such as ``image.bytes``."""
    if leaf in table.column_names:
        return table.column(leaf)
    name, _, inner = leaf.rpartition(".")
    return pc.struct_field(table.column(name), inner)


def row_keys(prefix: str, first: int, count: int, paths: pyarrow.ChunkedArray | None) -> pyarrow.Array:
    """Keys of rows: the number of each, and the name in its path, which may come from anywhere and say anything:
    ``00000012-dog.jpg``."""
    numbers = pyarrow.array(range(first, first + count), pyarrow.int64()).cast(TEXT)
    keys = joined(prefix, pc.utf8_lpad(numbers, 8, "0"))
    if paths is None:
        return keys
    names = pc.utf8_trim_whitespace(pc.fill_null(paths.cast(TEXT).combine_chunks(), ""))
    names = pc.replace_substring_regex(names, r"(?s)^.*[/\\]", "")
    names = pc.utf8_slice_codeunits(pc.replace_substring(names, "\0", ""), -100)
    blank = pc.match_substring_regex(names, r"^\s*\.*\s*$")
    return joined(keys, pc.if_else(blank, pyarrow.scalar("", TEXT), joined("-", names)))


def row_uris(file_uri: str, first: int, count: int, suffix: str = "") -> pyarrow.Array:
    """The addresses of the rows of a file, from ``first`` on."""
    numbers = pyarrow.array(range(first, first + count), pyarrow.int64()).cast(TEXT)
    return joined(f"{file_uri}#row=", numbers, suffix)


def joined(*parts: str | pyarrow.Array | pyarrow.Scalar) -> pyarrow.Array:
    """Texts and columns of texts, one behind the other."""
    columns = [pyarrow.scalar(part, TEXT) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*columns, pyarrow.scalar("", TEXT))
