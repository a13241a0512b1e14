#!/usr/bin/env bash
# Expected: Python's tarfile raises ReadError where an archive is damaged or cut off, as GNU tar ends with status 2 where a header is damaged.
# Actual: only for the first header, and within the content of a member. A further header whose checksum is wrong ends the
#   archive, as its end mark does: the members before it are returned, and there is no error, in all modes of reading. An
#   archive that is cut off between two members, or within a header, has no end mark, and is read to its end without an error by both.
# Version: the Python that runs this (seen with 3.11.2 of Debian 12 and 3.11.7), and the tar that is there (1.34).
# Why a registry cache must care: a bundle of images that a disk or a copy has damaged is imported in part, and the command succeeds; so is
#   one whose transfer broke off. What reads archives by tarfile has to look for the end mark, two blocks of zeros, itself, and
#   must know from a list in the archive what has to be there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
tar --version | head -n 1
timeout 60 python3 - <<'PYTHON'
import io
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

MEMBER = 1024  # bytes of a member: its header, and a block of content


def archive() -> bytes:
    """An archive of the members a, b and c."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name in "abc":
            member = tarfile.TarInfo(name)
            member.size = 512
            tar.addfile(member, io.BytesIO(name.encode() * 512))
    return target.getvalue()


def by_tarfile(content: bytes, mode: str) -> str:
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode=mode) as tar:
            return "".join(member.name for member in tar)
    except tarfile.ReadError as error:
        return f"ReadError: {error}"


def by_gnu(content: bytes) -> tuple[str, int]:
    Path("archive.tar").write_bytes(content)
    done = subprocess.run(["tar", "-tf", "archive.tar"], capture_output=True, text=True)
    return "".join(done.stdout.split()), done.returncode


whole = archive()
damaged = bytearray(whole)
damaged[MEMBER + 1] ^= 1  # in the name of b, which the checksum covers
first = bytearray(whole)
first[1] ^= 1
cases = {
    "whole": (whole, "abc", ("abc", 0)),
    "the header of a damaged": (bytes(first), "ReadError: bad checksum", None),
    "the header of b damaged": (bytes(damaged), "a", ("ac", 2)),
    "cut before c": (whole[: 2 * MEMBER], "ab", ("ab", 0)),
    "cut in the header of c": (whole[: 2 * MEMBER + 100], "ab", ("ab", 0)),
    "cut in the content of c": (whole[: 2 * MEMBER + 700], "ReadError: unexpected end of data", ("abc", 2)),
}
print("Python", platform.python_version())
holds = True
for what, (content, expected, gnu) in cases.items():
    found, streamed, other = by_tarfile(content, "r:"), by_tarfile(content, "r|"), by_gnu(content)
    print(f"{what}: tarfile {found}, as a stream {streamed}; tar {other[0]}, status {other[1]}")
    fails = expected.startswith("ReadError")
    holds = holds and (found.startswith("ReadError") and streamed.startswith("ReadError") if fails else found == streamed == expected)
    holds = holds and (gnu is None or other == gnu)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
