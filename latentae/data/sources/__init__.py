"""Where images come from: folders, tars, parquet files and manifests, all seen as one list of items with bytes.

A source lists its items in an order that depends on nothing but their names, and reads their bytes. Training and
encoding share sources, so that both see the same keys.
"""

from latentae.data.sources.arrow import ArrowSource, DatasetSource
from latentae.data.sources.base import IMAGE_EXTENSIONS, Item
from latentae.data.sources.folder import FileSource, FolderSource
from latentae.data.sources.manifest import ManifestSource
from latentae.data.sources.opening import open_source, refuse_output_in_input
from latentae.data.sources.parquet import ParquetSource
from latentae.data.sources.reading import UriReader
from latentae.data.sources.table import ItemTable, ItemTableBuilder, Source
from latentae.data.sources.tar import TarSource

__all__ = [
    "IMAGE_EXTENSIONS",
    "ArrowSource",
    "DatasetSource",
    "FileSource",
    "FolderSource",
    "Item",
    "ItemTable",
    "ItemTableBuilder",
    "ManifestSource",
    "ParquetSource",
    "Source",
    "TarSource",
    "UriReader",
    "open_source",
    "refuse_output_in_input",
]
