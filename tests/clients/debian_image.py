"""Images for Docker, made of what is installed here, under the names of public ones."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.clients.machine import Machine

SHELL = ("base-files", "coreutils", "dash", "grep", "sed", "tzdata", "wget")
# Links to directories of /usr, and what is written when packages are installed.
WRITTEN = (
    *("bin", "sbin", "lib", "lib64", "tmp", "etc/alternatives", "etc/passwd", "etc/group", "etc/ld.so.cache"),
    *("etc/ssl/certs/ca-certificates.crt", "usr/bin/awk"),
)
LEFT_OUT = re.compile(r"/usr/share/(doc|man|locale|info)/|/(promtool|llvmjit\S*)$|/bitcode/")

POSTGRES = """#!/bin/sh
set -e
cd /var/lib/postgresql
install -d -o postgres -m 700 data
if [ ! -e data/PG_VERSION ]; then
    echo "$POSTGRES_PASSWORD" >/tmp/password
    setpriv --reuid=postgres --regid=postgres --clear-groups initdb --no-sync --auth=scram-sha-256 \\
        --username="$POSTGRES_USER" --pwfile=/tmp/password data
    echo 'host all all all scram-sha-256' >>data/pg_hba.conf
    echo "CREATE DATABASE $POSTGRES_USER" |
        setpriv --reuid=postgres --regid=postgres --clear-groups postgres --single -D data template1
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups postgres -D data -c listen_addresses='*' \\
    -c unix_socket_directories=/tmp
"""


def files(packages: Iterable[str]) -> set[str]:
    """What these packages of Debian have installed, and the libraries that their programs need."""
    listed = _lines("dpkg", "--listfiles", *packages)
    # Debian's lists are of a time before these became links.
    found = {re.sub("^/(bin|sbin|lib|lib64)/", r"/usr/\1/", each) for each in listed if each[:2] > "/."}
    found = {each for each in found if not LEFT_OUT.search(each)}
    programs = [each for each in found if "/bin/" in each and _is_program(Path(each))]
    done = subprocess.run(["ldd", *programs], check=False, capture_output=True, text=True)
    needed = {
        re.sub("^/(lib|lib64)/", r"/usr/\1/", each) for each in re.findall(r"/\S+(?= \(0x)", done.stdout)
    }
    return found | needed | {str(Path(each).resolve()) for each in needed}


def closure(*names: str) -> list[str]:
    """The essential packages, these, and those that they depend on, as they are installed."""
    known = _lines("dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status} ${Essential}\n")
    installed = {name: essential for name, state, *essential in map(str.split, known) if state == "installed"}
    wanted = [*names, *(name for name, essential in installed.items() if essential == ["yes"])]
    only = (
        f"--no-{each}" for each in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    )
    listed = _lines("apt-cache", "depends", "--recurse", "--installed", *only, *wanted)
    return sorted(installed.keys() & {line for line in listed if line[0].isalnum()})


def status(packages: Iterable[str]) -> str:
    """What dpkg is to know of these packages."""
    wanted = {f"Package: {each}" for each in packages}
    paragraphs = Path("/var/lib/dpkg/status").read_text().split("\n\n")
    return "".join(f"{each}\n\n" for each in paragraphs if each.partition("\n")[0] in wanted)


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _is_program(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def make_image(machine: Machine, name: str, names: Iterable[str], *changes: str) -> None:
    """An image of these files of the machine; `changes` are lines of a Dockerfile."""
    listed = sorted({each.strip("/") for each in names} | {*WRITTEN})
    there = [
        each
        for each in listed
        if (each and machine.path(f"/{each}").is_symlink()) or machine.path(f"/{each}").exists()
    ]
    machine.path("/tmp/files").write_text("".join(f"{each}\n" for each in there))
    options = " ".join(f"--change {json.dumps(each)}" for each in changes)
    tar = "tar --create --directory=/ --no-recursion --files-from=/tmp/files"
    machine.run(f"{tar} | docker import {options} - {name}")
