"""Where to compute, and how much memory that may take."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("kmgt", start=1)}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to compute on, which must do float64: ``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, dtype=torch.float64, device=resolved).item()
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={device!r} cannot be used here ({reason}); accepted: 'auto', 'cpu', or a CUDA device that exists."
        ) from error
    return resolved


def memory_limit(max_memory: int | str | None, device: torch.device) -> int:
    """Bytes that X may take on a device; None is 80 % of what is free there."""
    if max_memory is None:
        if device.type == "cuda":
            # What torch has taken from the card, but no tensor is in, is free as well.
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(0.8 * (torch.cuda.mem_get_info(device)[0] + kept))
        return int(0.8 * _free_memory())
    size = float("nan")
    if isinstance(max_memory, str):
        match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?i?)b?\s*", max_memory.lower())
        if match and match[2] in _UNITS:
            with suppress(ValueError):
                size = float(match[1]) * _UNITS[match[2]]
    elif isinstance(max_memory, (int, float, np.integer)) and not isinstance(max_memory, bool):
        size = float(max_memory)
    if not 0 < size < float("inf"):
        raise ValueError(
            f"max_memory={max_memory!r} is no amount of memory; accepted: None, a positive number of bytes, or a "
            "number with a unit such as '4GB' or '512MiB'."
        )
    return int(size)


def _free_memory() -> int:
    """Bytes that can be had without swapping, what the file cache would give up among them, where the system says."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**62
