"""Where a store lies: on a disk, or in a bucket of an object store."""

from h2t_store.storage.places.address import in_one_process, open_place
from h2t_store.storage.places.interface import LockedError, Lost, Place

__all__ = ["LockedError", "Lost", "Place", "in_one_process", "open_place"]
