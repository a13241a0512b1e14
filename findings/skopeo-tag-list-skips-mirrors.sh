#!/usr/bin/env bash
# Expected: with `[[registry.mirror]]` in registries.conf, skopeo reads everything of a repository from the
#   mirror, as it does manifests and blobs, and needs the registry itself only if the mirror fails.
# Actual: the list of tags never comes from a mirror. `skopeo list-tags` asks the registry alone, and so
#   does the second half of `skopeo inspect`, which lists all tags of the repository to print RepoTags:
#   with the registry unreachable it exits 1 although manifest and config came from the mirror.
#   `--no-tags` or `--raw` avoids it. Nor does it come from where a table says that the registry is, by `prefix` and
#   another `location`.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12).
# Why a registry cache must care: a node that reaches only the cache can pull, but not inspect or list by
#   the image's own name; an absence of `tags/list` in the cache's log does not mean that nobody lists.
#   To list through the cache, name it: `docker://CACHE/REGISTRY/REPOSITORY`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 libdevmapper1.02.1
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
export HOME="$work" SKOPEO="$work/root/usr/bin/skopeo"
"$SKOPEO" --version
timeout 120 python3 - <<'PYTHON'
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OCI = "application/vnd.oci.image"


def descriptor(kind: str, content: bytes) -> dict[str, object]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"mediaType": f"{OCI}.{kind}", "digest": digest, "size": len(content)}


CONFIG = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": descriptor("config.v1+json", CONFIG),
        "layers": [],
    }
).encode()


class Registry(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.paths.append(self.path.partition("?")[0])
        kind, body = "application/json", b"{}"
        if "/manifests/" in self.path:
            kind, body = f"{OCI}.manifest.v1+json", MANIFEST
        elif "/blobs/" in self.path:
            body = CONFIG
        elif self.path.endswith("/tags/list"):
            body = b'{"name":"app","tags":["v1","v2"]}'
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def start() -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    server.paths = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


origin, mirror = start(), start()
name = f"127.0.0.1:{origin.server_port}"
with open("registries.conf", "w") as conf:
    conf.write(
        f'[[registry]]\nprefix = "{name}"\nlocation = "{name}"\ninsecure = true\n'
        f'[[registry.mirror]]\nlocation = "127.0.0.1:{mirror.server_port}"\ninsecure = true\n'
    )


def skopeo(*args: str, conf: str = "registries.conf") -> tuple[int, list[str], list[str]]:
    """The exit code, and the paths that the registry and the mirror were asked for."""
    origin.paths.clear()
    mirror.paths.clear()
    done = subprocess.run(
        [os.environ["SKOPEO"], "--registries-conf", conf, *args],
        capture_output=True, text=True, timeout=30, check=False,
    )
    print(f"$ skopeo {' '.join(args)}: exit {done.returncode}")
    print("  registry:", *(origin.paths or ["not asked"]))
    print("  mirror:  ", *(mirror.paths or ["not asked"]))
    return done.returncode, list(origin.paths), list(mirror.paths)


with open("located.conf", "w") as conf:
    conf.write(f'[[registry]]\nprefix = "{name}"\nlocation = "127.0.0.1:{mirror.server_port}"\ninsecure = true\n')
repository = f"docker://{name}/app"
listed = skopeo("list-tags", repository)
inspected = skopeo("inspect", f"{repository}:v1")
untagged = skopeo("inspect", "--no-tags", f"{repository}:v1")
print("With another location in place of the mirror:")
located = skopeo("list-tags", repository, conf="located.conf")
located_untagged = skopeo("inspect", "--no-tags", f"{repository}:v1", conf="located.conf")
origin.shutdown()
origin.server_close()
print("The registry is stopped, the mirror is not:")
alone = skopeo("inspect", f"{repository}:v1")
alone_untagged = skopeo("inspect", "--no-tags", f"{repository}:v1")

holds = (
    listed == (0, ["/v2/", "/v2/app/tags/list"], [])
    and inspected[:2] == (0, ["/v2/", "/v2/app/tags/list"])
    and "/v2/app/manifests/v1" in inspected[2]
    and untagged[:2] == (0, [])
    and located == (0, ["/v2/", "/v2/app/tags/list"], [])
    and located_untagged[:2] == (0, [])
    and alone[0] == 1
    and "/v2/app/manifests/v1" in alone[2]
    and alone_untagged[0] == 0
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
