#!/usr/bin/env bash
# Expected: the registry of go-containerregistry (`crane registry serve`, and Go package `registry` in tests of many projects) answers
#   `Range: bytes=5-` with the blob from its sixth byte on, as it answers `bytes=5-9`, or it ignores the header. A list of tags that
#   `n` has cut off has a `Link` to the next page, as the distribution specification requires. A manifest that is deleted by its
#   digest is gone.
# Actual: a range without an end is 416, with the code BLOB_UNKNOWN, and so is one that ends past the blob, or a suffix. A page of
#   `n` tags has no `Link`, so who pages by it sees no more. After a deletion by digest, the tags still stand for
#   the manifest.
# Versions: github.com/google/go-containerregistry v0.22.1 (Go module), Go 1.26.
# Why a registry cache must care: clients and caches resume by `bytes=<offset>-`, and 416 tells them that the blob is shorter: a
#   transfer that breaks off can only begin anew, or ask for a range with an end. Lists are asked for without `n`. What a test by this
#   registry shows of deletions, ranges and pages does not hold for others.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOBIN="$work" GOFLAGS="-modcacherw -p=2" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
go install github.com/google/go-containerregistry/cmd/crane@v0.22.1 2> /dev/null
timeout 60 python3 - <<'PYTHON'
import hashlib
import http.client
import json
import subprocess
import sys
import threading

OCI = "application/vnd.oci.image"
CONTENT = b"0123456789"


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


server = subprocess.Popen(
    ["./crane", "registry", "serve", "--address=127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
)
assert server.stdout is not None
line = next((line for line in server.stdout if "serving on port" in line), "")
if not line:
    raise SystemExit("crane ended")
host = f"127.0.0.1:{line.split()[-1]}"
threading.Thread(target=server.stdout.read, daemon=True).start()


def ask(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection(host)
    connection.request(method, path if path.startswith("/v2/") else f"/v2/app/{path}", body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers.get("Location") or answer.headers.get("Link") or ""


def run() -> dict[str, object]:
    location = ask("POST", "blobs/uploads/")[2]
    assert ask("PUT", f"{location}?digest={digest_of(CONTENT)}", CONTENT)[0] == 201
    blob = {"mediaType": f"{OCI}.config.v1+json", "digest": digest_of(CONTENT), "size": len(CONTENT)}
    kind = f"{OCI}.manifest.v1+json"
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": blob, "layers": []}).encode()
    for tag in "abcd":
        assert ask("PUT", f"manifests/{tag}", manifest, **{"Content-Type": kind})[0] == 201
    seen: dict[str, object] = {}
    for asked in ("5-9", "5-", "0-", "5-99", "-5"):
        status, content, _ = ask("GET", f"blobs/{digest_of(CONTENT)}", Range=f"bytes={asked}")
        seen[f"bytes={asked}"] = f"{status} {content.decode() if status == 206 else json.loads(content)['errors'][0]['code']}"
    _, content, link = ask("GET", "tags/list?n=2")
    seen["two tags"] = (json.loads(content)["tags"], link)
    deleted = ask("DELETE", f"manifests/{digest_of(manifest)}")[0]
    seen["a deletion by digest, then its tag"] = (deleted, ask("HEAD", "manifests/a")[0])
    return seen


try:
    seen = run()
finally:
    server.terminate()
    server.wait(20)
print(*(f"{what}: {answer}" for what, answer in seen.items()), sep="\n")
refused = "416 BLOB_UNKNOWN"
holds = list(seen.values()) == ["206 56789", refused, refused, refused, refused, (["a", "b"], ""), (202, 200)]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
