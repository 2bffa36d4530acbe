"""What was lost or guessed when pictures were decoded: counted by kind, with an example of each."""

import logging
from collections.abc import Mapping

__all__ = ["Remarks"]

_log = logging.getLogger("h2t_store")


class Remarks(dict[str, tuple[int, str]]):
    """How many pictures each remark is about, and which was the first; see `h2t_store.images.pictures.Picture`."""

    def add(self, others: Mapping[str, tuple[int, str]]) -> None:
        """Count those of other pictures, too."""
        for remark, (n, example) in others.items():
            known, first = self.get(remark, (0, example))
            self[remark] = known + n, first

    def log(self) -> None:
        """Warn once of each kind."""
        for remark, (n, example) in self.items():
            _log.warning("%d images %s: such as %s", n, remark, example)
