"""The name and the command line under which ps, top and pgrep show a forked process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def show_as(*words: str) -> None:
    """Show this process as the command `words`; it stays as it is where there is no room for them.

    A forked process has the command line of its parent otherwise: proc(5), /proc/pid/cmdline.
    """
    with suppress(OSError, ValueError, IndexError):  # another system than Linux
        Path("/proc/self/comm").write_text("-".join(words))
        # proc(5), /proc/pid/stat: fields 48 and 49 are the bounds of the arguments; two end with the name.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        line = "".join(f"{word}\0" for word in words).encode()
        if 0 < len(line) <= end - start:
            with open("/proc/self/mem", "r+b", buffering=0) as memory:
                memory.seek(start)
                memory.write(line.ljust(end - start, b"\0"))
