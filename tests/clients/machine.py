"""A copy of this system that runs by itself: systemd, files, network and processes are its own.

Its files are those of /, and changes are kept in memory.  So a page about an installation can be followed in
it by its very words, as on a machine that is there for that alone.  Its network leads to another one, which
stands for the internet: there is what a test starts in it, and nothing else.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.clients.processes import GO, Process, require, run

# Of RFC 5737: those of the machine, and of what it reaches.
ADDRESS, INTERNET, ELSEWHERE = "192.0.2.2", "192.0.2.1", "192.0.2.3"
PATIENCE = 800.0  # seconds for a script, or a start, on a busy machine
# Directories that are empty at first: without what is no part of Debian, and without its servers, so that apt
# has no more than what is installed; what containers have cannot lie on an overlay.
OWN = ("tmp", "run", "dev", "dev/shm", "root", "home", "opt", "srv", "usr/local")
APT = ("etc/apt/sources.list.d", "var/lib/apt/lists")
CONTAINERS = ("var/lib/docker", "var/lib/containerd", "var/lib/containers")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
MASKED = (
    "systemd-sysctl",
    "systemd-timesyncd",
    "systemd-udevd",
    "systemd-udev-trigger",
)  # they change the kernel
VARIABLES = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

# Makes a copy of the whole system at $1/root, and starts it.  $2 is the socket to which systemd reports its
# start; $3 is the control group of all processes.
START = f"""
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir changes work root groups
mount -t cgroup2 cgroup2 groups
mkdir "groups/$3"
echo $$ >"groups/$3/cgroup.procs"
mount -t overlay overlay -o "lowerdir=/,upperdir=changes,workdir=work" root
cd root
for each in {" ".join((*OWN, *APT, *CONTAINERS))}; do
    mkdir -p $each
    mount -t tmpfs tmpfs $each -o mode=755
done
chmod 1777 tmp dev/shm; mkdir -p usr/local/bin usr/local/sbin
for each in {" ".join(DEVICES)}; do touch dev/$each; mount --bind /dev/$each dev/$each; done
mkdir dev/pts run/lock
: >etc/apt/sources.list
rm -f usr/sbin/policy-rc.d var/lib/man-db/auto-update
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for each in {" ".join(MASKED)}; do ln -sf /dev/null etc/systemd/system/$each.service; done
touch run/started
mount --bind "$2" run/started
exec unshare --net --pid --fork --kill-child --uts --ipc --cgroup --mount sh -ec '
    mount -t proc proc proc
    mount --bind proc/sys/net proc/sys/net
    mount --rbind proc/sys proc/sys
    mount -o remount,bind,ro proc/sys
    mount -t sysfs -o ro sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    ip link set lo up
    pivot_root . mnt
    cd /
    umount --lazy mnt
    exec env -i container=copy NOTIFY_SOCKET=/run/started \\
        setpriv --bounding-set=-sys_time,-sys_module /lib/systemd/systemd --unit=basic.target
'
"""
CLEAR = 'mount -t cgroup2 cgroup2 "$1" && find "$1/$2" -depth -type d -exec rmdir {} +'


class Machine:
    """Ends with `stop`.  `place` is an empty directory that does not lie deep: a socket's path is short.

    Skips the test where the kernel lets none be made.
    """

    def __init__(self, place: Path) -> None:
        require("unshare", "nsenter", "setpriv", "systemd-analyze", "ip")
        self._copy = place / "copy"
        self._copy.mkdir()
        self._group = f"entrepot-{place.name}"
        self._processes: list[Process] = []
        self._ended: int | None = None
        told = place / "started"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as started:
            started.bind(str(told))
            apart = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--net", "--fork", "--kill-child"]
            words = [*apart, "sh", "-c", START, "machine", self._copy, told, self._group]
            self._holder = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                self._wait_for(started)
            except BaseException:
                self.stop()
                raise
        self._init = _child(_child(self._holder.pid))
        self._internet = f"--net=/proc/{self._holder.pid}/ns/net"
        self._ended = os.pidfd_open(self._init)
        self._connect()

    def _connect(self) -> None:
        ends = ("internet", "type", "veth", "peer", "name", "eth0", "netns", str(self._init))
        addresses = "".join(f"ip address add {each}/24 dev internet; " for each in (INTERNET, ELSEWHERE))
        network = ["nsenter", self._internet, "--"]
        run([*network, "ip", "link", "add", *ends], os.environ)
        run([*network, "sh", "-ec", f"{addresses}ip link set lo up; ip link set internet up"], os.environ)
        self.run(
            f"ip address add {ADDRESS}/24 dev eth0; ip link set eth0 up; ip route add default via {INTERNET}"
        )

    def _wait_for(self, started: socket.socket) -> None:
        """Return once systemd tells that it has started."""
        assert self._holder.stderr
        deadline, told, said = time.monotonic() + PATIENCE, b"", b""
        while b"READY=1" not in told:
            ready, _, _ = select.select([started, self._holder.stderr], [], [], deadline - time.monotonic())
            if self._holder.stderr in ready:
                said += (line := self._holder.stderr.readline())
                if not line:
                    pytest.skip(f"no copy of this system can be started here: {said.decode()}")
            elif ready:
                told = started.recv(4096)
            else:
                pytest.fail(f"the copy of this system did not start: {said.decode()}")

    def path(self, name: str) -> Path:
        """Where a file of it is for this process; `name` is absolute."""
        return Path(f"/proc/{self._init}/root{name}")

    def command(self, *words: str, directory: str = "/root", user: str = "root") -> list[str]:
        """A command line that runs these words in it."""
        home = "/root" if user == "root" else f"/home/{user}"
        spaces = ("mount", "net", "pid", "uts", "ipc", "cgroup", "root")
        variables = {**VARIABLES, **GO, "HOME": home, "USER": user}
        return [
            *("nsenter", f"--target={self._init}", *(f"--{each}" for each in spaces), "--"),
            *("env", "--ignore-environment", f"--chdir={directory}"),
            *(f"{name}={value}" for name, value in variables.items()),
            *(() if user == "root" else ("runuser", f"--user={user}", "--")),
            *words,
        ]

    def run(self, script: str, **where: Any) -> str:
        """The output of a script, each of whose commands has to succeed; `where` as in command()."""
        print(script)  # shown with a test that failed
        begun = time.monotonic()
        done = subprocess.run(
            self.command("sh", "-e", "-c", script, **where),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        print(f"{done.stdout}\n# {time.monotonic() - begun:.1f} s")
        if done.returncode:
            pytest.fail(f"exit status {done.returncode}\n{script}\n{done.stdout}")
        return done.stdout

    def start(self, ready: str, *words: str, **where: Any) -> Process:
        """A process in it, once it has printed `ready`; ends with the machine at the latest."""
        self._processes.append(Process(self.command(*words, **where), ready=ready))
        return self._processes[-1]

    def serve(self, ready: str, *words: str, files: bool = False) -> Process:
        """A process in the network that stands for the internet; with `files` it has those of the machine."""
        place = [f"--mount=/proc/{self._init}/ns/mnt", f"--root=/proc/{self._init}/root"] if files else []
        self._processes.append(Process(["nsenter", self._internet, *place, "--", *words], ready=ready))
        return self._processes[-1]

    def stop(self) -> None:
        """End all that runs in it, and forget what it has written."""
        self._holder.kill()
        self._holder.wait()
        for each in self._processes:
            each.stop()
        assert self._holder.stderr
        self._holder.stderr.close()
        if self._ended is not None:
            select.select([self._ended], [], [], PATIENCE)  # the last of its processes
            os.close(self._ended)
        words = ["unshare", "--mount", "sh", "-c", CLEAR, "clear", self._copy, self._group]
        subprocess.run(words, check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self._copy)


def _child(pid: int) -> int:
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
