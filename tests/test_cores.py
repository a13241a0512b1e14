"""The number of cores that a process may use, from files as Linux shows them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy.config.cores import count_cores

V2 = "0::/slice/pod1/app\n"
V1 = "5:devices:/\n4:cpu,cpuacct:/docker/5f\n1:name=systemd:/docker/5f\n0::/docker/5f\n"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))


@pytest.mark.parametrize(
    ("cgroups", "files", "cores"),
    [
        ("", {}, 12),
        ("0::/\n", {}, 12),
        ("0::/\n", {"cpu.max": "max 100000"}, 12),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000"}, 12),
        ("0::/\n", {"cpu.max": "no number"}, 12),
        # Of several, the tightest counts.
        (
            V2,
            {"slice/pod1/app/cpu.max": "max 100000", "slice/pod1/cpu.max": "300000 100000"},
            3,
        ),
        (
            V2,
            {"slice/pod1/app/cpu.max": "400000 50000", "slice/cpu.max": "900000 100000"},
            8,
        ),
        # A container without a namespace of cgroups sees its own cgroup as the root.
        (V2, {"cpu.max": "500000 100000"}, 5),
        (V1, {"cpu/docker/5f/cpu.cfs_quota_us": "250000", "cpu/docker/5f/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 12),
        (V1, {"cpu/cpu.cfs_quota_us": "40000", "cpu/cpu.cfs_period_us": "20000"}, 2),
    ],
)
def test_cores(tmp_path: Path, cgroups: str, files: dict[str, str], cores: int) -> None:
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": cgroups, **written}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert count_cores(tmp_path) == cores


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))
