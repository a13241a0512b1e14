"""Start `python -m proxy …` and PROGRAM quickly: as a fork of a process that has imported what they use.

Imports are most of what a short command does, and the tests start hundreds.  `install()` lets subprocess do
so, and with it asyncio; all else about a process is as they make it.  Where a test has set a variable that
Python or a library reads when it starts, a new Python is started as usual.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.pools import KEPT

COMMAND = [sys.executable, "-m", "proxy"]
PROGRAM = [sys.executable, "-m", "tests.program"]  # and its text
IMPORTED = ("proxy.cli.serve", "proxy.server.process", "proxy.admin.api.app")  # and what they import
READ_EARLY = ("PYTHON", "LANG", "LC_", "TZ", "SSL_", "MALLOC_", "LD_")  # prefixes of variables
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
LONGEST, MOST = 1 << 17, 64  # bytes of a request, and its descriptors
APART = 500  # descriptors on their way to their numbers have higher ones


class Template:
    """The process that is forked; it ends when this one does."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        KEPT.add(os.readlink(f"/proc/self/fd/{self._socket.fileno()}"))  # noqa: PTH115
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from tests.preloaded import serve; serve({number})"],
                env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # no terminal: Python writes to a pipe in the same way
            )

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """The pid of a child of this process.  Raises OSError where it cannot start."""
        prctl = ctypes.CDLL(None).prctl
        prctl(SUBREAPER, 1)  # the template's child ends at once, and this process inherits the child of that
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            pid = self._socket.recv(100)
        finally:
            prctl(SUBREAPER, 0)
        if not pid:
            raise OSError(f"the template has ended: {request['words']}")
        return int(pid)


class Starter:
    """Takes the place of the function by which subprocess starts a process."""

    def __init__(self) -> None:
        self._usual = subprocess._fork_exec  # type: ignore[attr-defined]
        self._templates: dict[frozenset[str], Template] = {}
        self._lock = threading.Lock()

    def __call__(self, words: Any, programs: Any, *more: Any) -> int:
        _, kept, place, given, *files, error, _, session, group, gid, gids, uid, umask, before, _ = more
        environment = dict(os.environ)
        if given is not None:
            environment = dict(os.fsdecode(each).split("=", 1) for each in given)
        early = {name: text for name, text in environment.items() if name.startswith(READ_EARLY)}
        others = not early.items() <= os.environ.items()  # than those of the tests
        if words[:3] not in (COMMAND, PROGRAM) or others:
            return self._usual(words, programs, *more)
        if (gid, gids, uid, umask, before) != (None, None, None, -1, None):
            return self._usual(words, programs, *more)
        streams = [files[0], files[3], files[5]]  # between them are this process's ends of pipes
        passed = [each for each in kept if each != error]
        request = {
            "module": words[2],
            "words": words[3:],
            "environment": environment,
            "directory": os.getcwd() if place is None else os.fspath(place),  # noqa: PTH109
            "session": session,
            "group": group,
            "numbers": [0, 1, 2, *passed],
        }
        sources = [number if each == -1 else each for number, each in enumerate(streams)]
        with self._lock:
            if (key := frozenset(early)) not in self._templates:
                self._templates[key] = Template(early)
            return self._templates[key].fork(request, [*sources, *passed])


def install() -> None:
    """Raises AttributeError where subprocess has no such function."""
    subprocess._fork_exec = Starter()  # type: ignore[attr-defined]


def serve(number: int) -> None:
    """Import what the commands use, then fork at each request; a fork runs the command."""
    atexit.register(_leave)  # the first, which is called last
    for name in IMPORTED:
        import_module(name)
    gc.freeze()
    requests = socket.socket(fileno=number)
    while (received := socket.recv_fds(requests, LONGEST, MOST))[0]:
        ours, theirs = os.pipe()
        if not (pid := os.fork()):
            if os.fork():
                os._exit(0)
            os.close(requests.detach())
            os.close(ours)
            _become(json.loads(received[0]), received[1], theirs)
            return
        for each in (theirs, *received[1]):
            os.close(each)
        os.waitpid(pid, 0)  # now the fork has its new parent
        requests.send(os.read(ours, 100))
        os.close(ours)


def _become(request: Mapping[str, Any], files: Sequence[int], answer: int) -> None:
    """Run the command in the place of a new Python.  Its pid goes to `answer` once all is prepared."""
    apart = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, APART) for each in (answer, *files)]
    for each in (answer, *files):
        os.close(each)
    answer, *apart = apart
    for each, number in zip(apart, request["numbers"], strict=True):
        os.dup2(each, number)
        os.close(each)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    if request["session"]:
        os.setsid()
    elif request["group"] != -1:
        os.setpgid(0, request["group"])
    os.write(answer, str(os.getpid()).encode())
    os.close(answer)
    sys.argv = ["", *request["words"]]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        _ended.append(error.code)
        raise


_ended: list[Any] = []  # the status of the command


def _leave() -> None:
    """End a command that has ended with a status, before Python frees all modules.

    It would write to each page of memory that the fork shares, for a fifth of the time of a server.
    """
    if _ended and isinstance(_ended[0], int):
        with suppress(OSError):  # as Python does it, which says so
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_ended[0])
