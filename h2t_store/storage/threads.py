"""The same thing done to many files at once: reading, writing and checksums run side by side."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_threads(work: Callable[[Job], Result], jobs: Sequence[Job], n_threads: int) -> list[Result]:
    """Do one thing to each job, up to so many at once; results in order."""
    n_threads = min(n_threads, len(jobs))
    if n_threads < 2:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, jobs))
