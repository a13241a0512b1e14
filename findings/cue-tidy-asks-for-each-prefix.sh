#!/usr/bin/env bash
# Expected: `cue mod tidy` asks the registry for the modules that are imported: for `import "example.com/team/app"`, for
#   the tags of the repository example.com/team/app, which is there.
# Actual: it asks for the tags of each prefix too, example.com/team and example.com, which are no repositories. 404 and
#   403 say that there is no such module; 401 or 502 for one of the prefixes ends the command, though the module was
#   found. It does so for each import that has to be resolved.
# Versions: cuelang.org/go v0.17.1 (Go module), Go 1.26 or newer.
# Why a registry cache must care: most of what is asked for is not there, and each such name is asked of the upstream. A
#   cache must remember absences of repositories, and answer 404 for them also while the upstream is down, and
#   must not hide unknown names behind a challenge; else modules that it has cannot be used.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -trimpath" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > go.mod <<'MODULE'
module finding

go 1.26.0

require cuelang.org/go v0.17.1
MODULE
go get cuelang.org/go/cmd/cue@v0.17.1 2> build.log || { cat build.log; exit 1; }
go build -o cue cuelang.org/go/cmd/cue 2> build.log || { cat build.log; exit 1; }
timeout 120 python3 - <<'PYTHON'
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

stored: dict[str, tuple[str, bytes]] = {}  # by path: type and content
answer = 404  # for the tags of what is no repository
asked: list[str] = []


class Registry(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.reply(202, Location=self.path + "upload")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        path = self.path.partition("uploads/")[0] + digest if "uploads/" in self.path else self.path
        for each in {path, re.sub("/manifests/.*", f"/manifests/{digest}", path)}:
            stored[each] = self.headers["Content-Type"], content
        self.reply(201, Location=path, Docker_Content_Digest=digest)

    def do_GET(self) -> None:
        kind, content = stored.get(self.path, ("application/json", b""))
        if repository := re.fullmatch(r"/v2/(.*)/tags/list.*", self.path):
            asked.append(repository[1])
            start = f"/v2/{repository[1]}/manifests/v"
            if tags := [each.rpartition("/")[2] for each in stored if each.startswith(start)]:
                content = json.dumps({"name": repository[1], "tags": tags}).encode()
        error = json.dumps({"errors": [{"code": "UNKNOWN", "message": "not here"}]}).encode()
        self.reply(200 if content else answer, content or error, Content_Type=kind)

    do_HEAD = do_GET

    def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
here = Path.cwd()


def cue(directory: str, *words: str) -> str:
    """What goes wrong; empty if nothing does."""
    home = here / directory
    home.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "CUE_CACHE_DIR": str(home / "cache"),
        "CUE_REGISTRY": f"127.0.0.1:{server.server_port}+insecure",
    }
    done = subprocess.run([here / "cue", *words], cwd=home, env=environment, capture_output=True, text=True, timeout=60)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


assert not cue("app", "mod", "init", "--source=self", "example.com/team/app@v0")
(here / "app/app.cue").write_text("package app\nx: 1\n")
assert not (failed := cue("app", "mod", "publish", "v0.1.0")), failed
holds = True
for answer, ends in ((404, False), (403, False), (401, True), (502, True)):
    asked.clear()
    home = f"user{answer}"
    assert not cue(home, "mod", "init", "example.com/user@v0")
    (here / home / "user.cue").write_text('package user\nimport "example.com/team/app@v0"\ny: app.x\n')
    said = cue(home, "mod", "tidy")
    print(f"prefixes are answered {answer}: {said or 'ok'}; tags asked for of {', '.join(sorted(set(asked)))}")
    prefixes = {"example.com/team/app", "example.com/team", "example.com"}
    holds = holds and bool(said) == ends and (ends or set(asked) == prefixes)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
