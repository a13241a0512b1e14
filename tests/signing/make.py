"""Makes tests/data/signatures: `python -m tests.signing.make DIRECTORY`.

It needs `cosign` 3, its version 2 as `cosign2`, `notation` and Distribution's `registry` in PATH, and takes
some minutes, as signatures and a certificate have to expire.  Each case is a repository with one image, and
what signs it or pretends to; tools write it, and what no tool would write is made of that.  The commands of
each case are kept, and the verdict of the tool that verifies such signatures.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.signing.classic_keyless_cases import make_classic_keyless
from tests.signing.key_cases import (
    make_attestations,
    make_bundles,
    make_classic,
    make_former,
    make_index,
    make_keys,
    make_referring,
)
from tests.signing.keyless_cases import make_keyless, make_timestamped
from tests.signing.maker import (
    Maker,
)
from tests.signing.notary_cases import make_notary
from tests.signing.tools import HTTPRegistry, Tools, free_port, process

ENTREPOT = """
listen: 127.0.0.1:{port}
admin: "off"
disk: {{path: {path}}}
namespaces: {{local: {{store: {{}}}}}}
"""


def main(target: Path, *only: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, ExitStack() as stack:
        ports = free_port(), free_port()
        directory = Path(home)
        (directory / "registry.yml").write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {home}/registry}}}}\n"
            f"http: {{addr: '127.0.0.1:{ports[0]}'}}\n"
        )
        stack.enter_context(process("registry", "serve", f"{home}/registry.yml", port=ports[0]))
        (directory / "entrepot.yml").write_text(ENTREPOT.format(port=ports[1], path=f"{home}/entrepot"))
        command = (sys.executable, "-m", "proxy", "serve", "--config", f"{home}/entrepot.yml")
        stack.enter_context(process(*command, port=ports[1]))
        registries = [HTTPRegistry(f"127.0.0.1:{each}") for each in ports]
        tools = Tools(directory / "tools")
        tools.home.mkdir()
        maker = Maker(target, tools, *registries)
        make_keys(maker)
        for make in (
            make_classic,
            make_former,
            make_referring,
            make_bundles,
            make_attestations,
            make_index,
            make_keyless,
            make_timestamped,
            make_classic_keyless,
            make_notary,
        ):
            if make.__name__ in only or not only:
                make(maker)
        maker.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
