"""What was lost or guessed in pictures while they were decoded: counted by kind, with an example of each."""

import logging
from collections.abc import Iterable, Mapping

__all__ = ["Remarks"]

_log = logging.getLogger("h2t_store")


class Remarks(dict[str, tuple[int, str]]):
    """How many pictures each remark is about, and which was the first; see `h2t_store.images.pictures.Picture`."""

    @classmethod
    def of(cls, pictures: Iterable[tuple[str, Iterable[str]]]) -> "Remarks":
        """Count the remarks on pictures, by their names."""
        remarks = cls()
        for name, about in pictures:
            remarks.add(dict.fromkeys(about, (1, name)))
        return remarks

    def add(self, others: Mapping[str, tuple[int, str]]) -> None:
        """Count those of other pictures, too."""
        for remark, (n, example) in others.items():
            known, first = self.get(remark, (0, example))
            self[remark] = known + n, first

    def log(self) -> None:
        """Warn once of each kind."""
        for remark, (n, example) in self.items():
            _log.warning("%d images %s: such as %s", n, remark, example)
