"""oras-py as a command: `pull IMAGE`, `push IMAGE`; with the credentials in LOGIN and PASSWORD for a push."""

import os
import sys
from pathlib import Path

from oras.client import OrasClient

command, image = sys.argv[1:]
client = OrasClient(insecure=True, auth_backend="basic")
if command == "pull":
    assert client.pull(target=image, outdir="pulled")
else:
    client.login(
        username=os.environ["LOGIN"],
        password=os.environ["PASSWORD"],
        hostname=image.partition("/")[0],
    )
    Path("some.txt").write_text("some\n")
    client.push(target=image, files=["some.txt"])
