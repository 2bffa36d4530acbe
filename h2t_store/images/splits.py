"""Folders named like splits: one alone is read as that split, and several are never mixed.

Paths here have slashes and no leading one; folders end in none, and the top is ``""``.
"""

import posixpath
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from h2t_store.errors import DataError, did_you_mean
from h2t_store.images.names import shown

SYNONYMS = dict.fromkeys(("val", "valid", "validation", "eval", "evaluation", "dev"), "val")  # as in timm, and dev
SYNONYMS |= {"train": "train", "training": "train", "test": "test", "testing": "test"}
"""What names of splits mean: train, val or test."""

_LIKE_A_SPLIT = re.compile(
    rf"(?:(.+)[ _-])?({'|'.join(sorted(SYNONYMS, key=len, reverse=True))})"
    r"[ _-]?(?:set|data|dataset|images?|imgs?|split)?[ _-]?\d*",
    re.IGNORECASE,
)
_MOST_NAMED = 6


def find_split(split: str, folders_in: Callable[[str], Sequence[str]], where: str) -> str:
    """The folder of a split, at the top or below folders that are alone in theirs.

    It is the one of that very name, else in any case, else one of a like name: ``Training_set`` and ``train2017`` for
    ``train``.
    """
    above = ""
    while True:
        names = sorted(folders_in(above))
        same = [name for name in names if name.lower() == split.lower()]
        like = [name for name in names if _kind(name) is not None and _kind(name) == _kind(split)]
        found = [split] if split in names else same or like
        if len(found) > 1:
            raise DataError(f"split {split!r}: {where} has {_listed(found)}: name one of them")
        if found:
            return posixpath.join(above, found[0])
        if len(names) != 1 or _kind(names[0]) is not None:
            there = f"; it has {_listed(names)}" if names else ""
            raise DataError(f"split {split!r}: {where} has no such folder{did_you_mean(split, names) or there}")
        above = posixpath.join(above, names[0])


def choose_split(images: Iterable[str], where: str) -> tuple[str, list[str]]:
    """The folder of a split that all images lie in, ``""`` where there is none, and notes.

    `DataError` where images of several splits would be mixed, or those of a split with others.
    """
    folders_in: dict[str, set[str]] = defaultdict(set)
    with_images = {path.rpartition("/")[0] for path in images}
    for folder in with_images:
        while folder:
            above, _, name = folder.rpartition("/")
            folders_in[above].add(name)
            folder = above
    fork = chosen = ""
    while len(folders_in[fork]) == 1 and fork not in with_images:
        fork = posixpath.join(fork, next(iter(folders_in[fork])))
        prefix, kind = _prefix_and_kind(fork.rpartition("/")[2])
        if kind is not None and (not prefix or fork not in with_images):
            chosen = fork
    notes = [f"the folder {shown(chosen)} is read as a split"] if chosen else []
    for folder, names in sorted(folders_in.items()):
        by_prefix: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            prefix, kind = _prefix_and_kind(name)
            if kind is not None:
                by_prefix[prefix].append(name)
        for like in by_prefix.values():
            if len({_prefix_and_kind(name) for name in like}) > 1:
                there = where if folder == fork else f"{where}, {shown(folder)!r},"
                raise DataError(_choose(like, there, folder == fork))
    names_at_fork = [name for name in sorted(folders_in[fork]) if _kind(name) is not None]
    if any(folders_in.get(posixpath.join(fork, name)) for name in names_at_fork):
        raise DataError(_choose(names_at_fork, where, True))
    if names_at_fork:
        notes.append(f"{_listed(names_at_fork)} are read as classes: to read one alone, name it as split")
    return chosen, notes


def _choose(names: list[str], where: str, can_be_chosen: bool) -> str:
    choices = ", ".join(f"--split {shlex.quote(name)}" for name in names)
    return (
        f"{where} has folders named like splits, {_listed(names)}, which are not read together or with others: "
        f"{f'choose one ({choices})' if can_be_chosen else 'name a folder of one split'}; if they are classes, rename "
        "them or write a list file"
    )


def _kind(name: str) -> str | None:
    prefix, kind = _prefix_and_kind(name)
    return None if prefix else kind


def _prefix_and_kind(name: str) -> tuple[str, str | None]:
    """``("", "train")`` for ``training_set``, ``("seg", "train")`` for ``seg_train``; no kind where it is no split."""
    match = _LIKE_A_SPLIT.fullmatch(name)
    return ((match[1] or "").lower(), SYNONYMS[match[2].lower()]) if match else ("", None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:_MOST_NAMED])) + (", …" if len(names) > _MOST_NAMED else "")
