"""What ps shows of a forked process."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.server.fork import Parent, fork
from proxy.server.process_name import show_as


async def shown(*words: str) -> tuple[str, str]:
    """The name and the command line."""

    def work(parent: Parent) -> int:
        show_as(*words)
        line = Path("/proc/self/cmdline").read_text().rstrip("\0").replace("\0", " ")
        parent.report(f"{Path('/proc/self/comm').read_text().strip()}|{line}")
        return 0

    process = fork(work, ())
    name, _, line = (await process.message()).partition("|")
    # Reading the arguments of the parent shows that its memory is its own.
    assert await process.wait() == 0
    return name, line


@pytest.mark.parametrize("role", ["worker", "keeper"])
async def test_name_and_command_line(role: str) -> None:
    before = Path("/proc/self/cmdline").read_bytes()
    assert await shown("entrepot", role) == (f"entrepot-{role}", f"entrepot {role}")
    assert Path("/proc/self/cmdline").read_bytes() == before


async def test_what_does_not_fit_leaves_the_command_line() -> None:
    before = Path("/proc/self/cmdline").read_text().rstrip("\0").replace("\0", " ")
    assert (await shown("entrepot", "x" * 5000))[1] == before
