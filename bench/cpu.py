"""CPU time and memory of processes, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
MEGABYTE_IN_KB = 1024


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, of these processes and all their descendants, those that have ended included."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # proc(5): ppid is field 4; utime, stime, and both of the children waited for are fields 14 to 17
            parents[int(entry.name)] = int(fields[1])
            used[int(entry.name)] = sum(map(int, fields[11:15]))
    family = {pid for pid in pids if pid in used}
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    return sum(used[pid] for pid in family) * TICK


def machine_seconds() -> float:
    """CPU seconds that this machine has been busy for since its start."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq))) * TICK


def peak_megabytes(pid: int) -> float:
    """The most memory that a process has ever held (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / MEGABYTE_IN_KB


def memory_megabytes() -> float:
    """The memory of this machine (proc(5), meminfo)."""
    return int(Path("/proc/meminfo").read_text().split()[1]) / MEGABYTE_IN_KB
