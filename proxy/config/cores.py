"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def count_cores(root: Path = Path("/")) -> int:
    """The cores of this process's affinity, or what its cgroups allow if less; a part of a core counts whole.

    Control Group v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`), mounted below `root` where they usually are.
    """
    return min(len(os.sched_getaffinity(0)), *_limits(root))


def _limits(root: Path) -> Iterator[int]:
    """What each cgroup of this process allows.  An inner one may allow more than an outer one."""
    yield os.cpu_count() or 1
    for directory in _cgroups(root):
        quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
        for limit in (_read(directory / "cpu.max"), quota + period):
            if len(limit) == 2 and all(number.isdecimal() and int(number) for number in limit):
                yield math.ceil(int(limit[0]) / int(limit[1]))


def _cgroups(root: Path) -> Iterator[Path]:
    """The directories of this process's cgroups for CPU time, with their ancestors: some may not be there.

    A container may see its own cgroup at the place of the outermost one.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        inner = PurePosixPath(path.lstrip("/"))
        if not controllers or "cpu" in controllers.split(","):
            yield from (mounts / ("cpu" if controllers else "") / each for each in (inner, *inner.parents))


def _read(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
