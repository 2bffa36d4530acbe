"""Progress as plain lines: of a path per alpha, of a search per tenth of its candidates."""

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
    """Print how many candidates are fitted at every tenth of them, with the rate and the time left.

    Parameters
    ----------
    n_candidates : int
    label : str
        What the lines begin with.
    """

    def __init__(self, n_candidates: int, label: str = "") -> None:
        self._n_candidates, self._label, self._done = n_candidates, label, 0
        self._began = time.perf_counter()

    def __call__(self) -> None:
        self._done += 1
        done, n_candidates = self._done, self._n_candidates
        if 10 * done // n_candidates == 10 * (done - 1) // n_candidates:
            return
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        print(
            f"{self._label}{done}/{n_candidates} candidates: {done / elapsed:.2g} candidates/s, "
            f"{duration(elapsed / done * (n_candidates - done))} left",
            flush=True,
        )


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
