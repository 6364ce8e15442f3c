"""Available memory, to compare a plan with before anything is allocated, and peak memory.

On a CPU, available is the smaller of the machine's available memory (psutil) and what the process's control groups
still allow, because batch systems limit jobs through those (Linux kernel documentation, cgroup v2: memory.max,
memory.current; file pages that can be dropped, inactive_file of memory.stat, count as free).
"""

import resource
import sys
from pathlib import Path

import psutil
import torch


def available_memory(device: torch.device) -> int:
    """Return the bytes that a process on `device` can still allocate, shared with other processes.

    On a GPU what torch holds and does not use counts as free, and is given back: other libraries cannot take it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left_in_control_groups()])


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes.

    On Linux from VmHWM, because getrusage's ru_maxrss starts at the parent's peak.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_bytes(count: float) -> str:
    """Format a byte count with a binary unit: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _left_in_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """List what each control group of this process still allows; empty without groups or limits."""
    left = []
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        hierarchy, _, path = line.split(":", 2)
        if hierarchy != "0":  # version 1
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                limit = (group / "memory.max").read_text(encoding="utf-8").strip()
                used = int((group / "memory.current").read_text(encoding="utf-8"))
                statistics = dict(
                    entry.split() for entry in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
                )
            except OSError:
                continue
            if limit != "max":
                left.append(int(limit) - used + int(statistics["inactive_file"]))
    return left
