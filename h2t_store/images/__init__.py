"""What to read: a source gives images by row, their labels, and identifiers that stay the same on every run."""

from h2t_store.images.arranging import arrange
from h2t_store.images.arrays import ArraySource
from h2t_store.images.folder import FolderSource
from h2t_store.images.opening import open_source
from h2t_store.images.pictures import IMAGE_EXTENSIONS
from h2t_store.images.source import Source

__all__ = ["IMAGE_EXTENSIONS", "ArraySource", "FolderSource", "Source", "arrange", "open_source"]
