"""Runs a command with a registry of its own, which ends with it.

    python examples/in_process_registry.py LAYOUT REPOSITORY COMMAND...

LAYOUT is an OCI image layout, a directory or an archive, whose images are loaded into REPOSITORY.  COMMAND
finds the registry's address in the variable REGISTRY.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from proxy.testing.registry import LocalRegistry


def main(layout: str, repository: str, command: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as directory, LocalRegistry(Path(directory)) as registry:
        for name in registry.load(layout, repository):
            print(f"{registry.address}/{name}", file=sys.stderr)
        status = subprocess.run(command, env={**os.environ, "REGISTRY": registry.address}).returncode
        print(f"{len(registry.requests)} requests", file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
