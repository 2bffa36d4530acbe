"""What commands print: progress, sizes, tables, JSON."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Meter", "facts", "json_text", "progress", "short", "table"]

_PLAIN_SECONDS = 10.0


class Meter:
    """Units done, and how fast; the first call says where this run begins."""

    def __init__(self, unit: str, show: Callable[["Meter"], None]) -> None:
        self._unit, self._show = unit, show
        self.total = self.done = self.computed = self.bytes = 0
        self.began: float | None = None

    def __call__(self, done: int, total: int, n_bytes: int = 0) -> None:
        if self.began is None:
            self.began, self._first = time.perf_counter(), done
        self.done, self.total, self.bytes, self.computed = done, total, n_bytes, done - self._first
        self._show(self)

    def __str__(self) -> str:
        parts = [f"{self.done}/{self.total} {self._unit}"]
        if self.bytes:
            parts.append(f"{decimal(self.bytes)} computed")
        if self.began and self.computed:
            rate = self.computed / (time.perf_counter() - self.began)
            left = timedelta(seconds=round((self.total - self.done) / rate))
            parts += [f"{rate:.1f}/s", f"{left} left"]
        return ", ".join(parts)


@contextmanager
def progress(unit: str) -> Iterator[Meter]:
    """Show a bar on a terminal, a line every ten seconds elsewhere; both on stderr."""
    if sys.stderr.isatty():
        columns = BarColumn(), TextColumn("{task.description}")
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield Meter(unit, lambda m: bar.update(task, completed=m.done, total=m.total, description=str(m)))
        return
    printed = time.perf_counter()

    def line(meter: Meter) -> None:
        nonlocal printed
        if meter.computed and meter.done < meter.total and time.perf_counter() - printed >= _PLAIN_SECONDS:
            printed = time.perf_counter()
            print(meter, file=sys.stderr, flush=True)

    yield Meter(unit, line)


def short(value: Any) -> str:
    """A value in one line: long lists cut, shapes as ``4 x 8 x 8``."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        shown = [str(item) for item in value]
        return ", ".join(shown) if len(shown) <= 6 else f"{', '.join(shown[:3])}, … {shown[-1]} ({len(shown)})"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return "none" if value is None else str(value)


def facts(of: Mapping[str, Any]) -> None:
    """Print names and values, one per line."""
    width = max(map(len, of))
    for key, value in of.items():
        print(f"{key:<{width}}  {short(value)}")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; lines are not broken in a file."""
    shown = Table(*header, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*(Text(str(cell)) for cell in row))
    (Console() if sys.stdout.isatty() else Console(width=10_000)).print(shown)


def json_text(value: Any) -> str:
    """JSON for machines."""
    return json.dumps(value, ensure_ascii=False, indent=1)
