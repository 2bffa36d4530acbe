"""Progress as plain lines: of a path per alpha, of a search per step."""

from __future__ import annotations

import time

from estimators.group_lasso.result import PathPoint


class PathProgress:
    """Print where a path stands after every alpha, with the rate and the time left.

    Parameters
    ----------
    n_alphas : int
    label : str
        What the lines begin with, such as ``"fold 2/5, "``.
    """

    def __init__(self, n_alphas: int, label: str = "") -> None:
        self._n_alphas, self._label = n_alphas, label
        self._began = time.perf_counter()

    def __call__(self, point: PathPoint) -> None:
        done = point.index + 1
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        print(
            f"{self._label}alpha {done}/{self._n_alphas} = {point.alpha:.4g}: {point.n_active} active, objective "
            f"{point.objective:.6g}, gap {point.relative_gap:.1e}, {point.n_iter} steps, {point.n_passes} passes; "
            f"{done / elapsed:.2g} alphas/s, {duration(elapsed / done * (self._n_alphas - done))} left",
            flush=True,
        )


class SearchProgress:
    """Print what a part of a search has done, and how long it took.

    Parameters
    ----------
    label : str
        What the lines begin with, such as ``"fold 2/5, "``.
    verbose : int
        0 prints nothing.
    """

    def __init__(self, label: str, verbose: int) -> None:
        self._label, self._verbose = label, verbose
        self._began = time.perf_counter()

    def __call__(self, done: str) -> None:
        if self._verbose:
            print(f"{self._label}{done}, {duration(time.perf_counter() - self._began)}", flush=True)


def duration(seconds: float) -> str:
    """Seconds as people read them: ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
