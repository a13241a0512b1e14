#!/usr/bin/env bash
# Expected: what `--import-cache` names can only make a build faster. If the registry has lost it, or a part of it, BuildKit runs
#   the steps itself.
# Actual: that holds for the manifest of the cache. The layers are fetched later, when a step or the output needs them: if one of
#   them is answered 404 or 502 then, the build ends with an error, although its steps could be run. Whether it
#   ends depends on what has changed in it.
# Versions: github.com/moby/buildkit v0.34.2 (Go module), Go 1.26; runc 1.1.5+ds1-1+deb12u1 (Debian 12). It needs root, and
#   builds for some minutes.
# Why a registry cache must care: half a cache is worse than none. While it cannot fetch a layer, it has to refuse the manifest too;
#   a rule that cleans up repositories of caches must not take a layer before the manifest.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=2" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download runc=1.1.5+ds1-1+deb12u1 libseccomp2
for package in *.deb; do dpkg -x "$package" root; done
go mod init finding 2> build.log
go get github.com/moby/buildkit@v0.34.2 2>> build.log || { cat build.log; exit 1; }
for program in buildkitd buildctl; do
    go build -o "$program" "github.com/moby/buildkit/cmd/$program" 2>> build.log || { cat build.log; exit 1; }
done
go list -m github.com/moby/buildkit
export PATH="$work/root/usr/sbin:$PATH" LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
export HOME="$work" # its mounts end with it
timeout 240 unshare --mount python3 - <<'PYTHON'
import hashlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HERE = os.getcwd()
stored: dict[str, tuple[bytes, str]] = {}  # by digest or tag
layers: set[str] = set()  # the digests of blobs
refused: dict[str, int] = {}  # "manifest" or "layers", with what status
asked: list[str] = []


class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        last = self.path.partition("?")[0].rpartition("/")[2]
        what = "layers" if "/blobs/" in self.path else "manifest"
        content, kind = stored.get(last, (b"", ""))
        status = refused.get(what, 200 if kind else 404)
        if refused and what == "layers" and b"cacheconfig" not in content and content[:1] == b"{":
            status = 200  # the configuration of the cache
        if refused and self.command == "GET":
            asked.append(f"{what} {status}")
        self.answer(status, content if status == 200 else b"{}", kind or "application/json")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(202, b"", "text/plain", Location=f"{self.path}session")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"sha256:{hashlib.sha256(content).hexdigest()}"
        kind = self.headers["Content-Type"] if "/manifests/" in self.path else "application/octet-stream"
        stored[name] = stored[self.path.rpartition("/")[2]] = (content, kind)
        self.answer(201, b"", "text/plain", Location="/", Docker_Content_Digest=name)

    def answer(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        if kind.startswith("application/vnd"):
            self.send_header("Docker-Content-Digest", f"sha256:{hashlib.sha256(body).hexdigest()}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
registry = f"127.0.0.1:{server.server_port}"
with open("buildkitd.toml", "w") as file:
    file.write(f'[registry."{registry}"]\n  http = true\n')
os.mkdir("context")
for name in ("first", "second"):
    with open(f"context/{name}", "w") as file:
        file.write(f"{name}\n")
address = f"unix://{HERE}/socket"
options = ["--oci-worker-net=host", "--oci-worker-snapshotter=native", "--containerd-worker=false"]
log = open("buildkitd.log", "w+")
daemon = subprocess.Popen(
    ["./buildkitd", "--root", f"{HERE}/state", "--addr", address, "--config", "buildkitd.toml", *options], stderr=log, stdout=log
)


def build(steps: str, *more: str) -> str:
    """What a build that starts with nothing comes to."""
    with open("context/Dockerfile", "w") as file:
        file.write(steps)
    buildctl = ["./buildctl", "--addr", address]
    subprocess.run([*buildctl, "prune", "--all"], capture_output=True, timeout=60, check=True)
    command = ["build", "--frontend", "dockerfile.v0", "--local", "context=context", "--local", "dockerfile=context"]
    done = subprocess.run([*buildctl, *command, *more], capture_output=True, text=True, timeout=100)
    return "goes well" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


FIRST = "FROM scratch\nCOPY first /\n"
SECOND = f"{FIRST}COPY second /\n"
cache = f"type=registry,ref={registry}/cache:1"
found = {}
try:
    for _ in range(200):
        if os.path.exists("socket"):
            break
        time.sleep(0.1)
    assert build(FIRST, "--export-cache", f"{cache},mode=max") == "goes well"
    output = ("--output", "type=oci,dest=/dev/null", "--import-cache", cache)
    for refused in ({}, {"manifest": 404}, {"manifest": 502}, {"layers": 404}, {"layers": 502}):
        asked.clear()
        what = " ".join(f"{name} {status}" for name, status in refused.items()) or "all is there"
        found[what] = build(SECOND, *output)
        print(f"{what}: {found[what]}")
finally:
    daemon.terminate()
    daemon.wait(30)
holds = all(
    (outcome == "goes well") == (not what.startswith("layers")) for what, outcome in found.items()
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
