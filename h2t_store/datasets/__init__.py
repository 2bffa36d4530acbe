"""What to read: a source gives images by row, their labels, and identifiers that stay the same on every run."""

from h2t_store.datasets.arranging import arrange
from h2t_store.datasets.arrays import ArraySource
from h2t_store.datasets.folder import FolderSource
from h2t_store.datasets.opening import open_source
from h2t_store.datasets.pictures import IMAGE_EXTENSIONS
from h2t_store.datasets.source import Source

__all__ = ["IMAGE_EXTENSIONS", "ArraySource", "FolderSource", "Source", "arrange", "open_source"]
