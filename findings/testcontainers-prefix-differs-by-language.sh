#!/usr/bin/env bash
# Expected: `TESTCONTAINERS_HUB_IMAGE_NAME_PREFIX`, which the documentation of Testcontainers has for a mirror of Docker Hub, is put
#   before the images of Docker Hub and no others, in each of its languages, with or without a slash at its end.
# Actual: Java and Python put it before the name as it is: `cache.example/docker.io` makes `docker.iopostgres` of `postgres`. Go and Node add
#   the slash. Python puts it before each image, those of other registries too. `docker.io/library/postgres` stays as it is in Java and
#   Node, which so go past the mirror, and becomes `cache.example/docker.io/docker.io/library/postgres` in Go and Python, though
#   Go's own comment says that it stays. Nothing is reported: the daemon is asked for another image.
# Versions: org.testcontainers:testcontainers 1.21.4 (Maven Central, Java 17), testcontainers 4.15.0 (PyPI), testcontainers 11.14.0 (npm, Node
#   20), github.com/testcontainers/testcontainers-go v0.45.0 (Go module, Go 1.26).
# Why a registry cache must care: tests are what pulls most from Docker Hub, and this variable is how they find the cache. One value
#   is right in all languages: with the namespace and a slash at its end, for images that are named without a registry. Names
#   of other registries, and with `docker.io/`, need the mirrors of the engine.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-modcacherw -p=2 -mod=mod" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip -q install --disable-pip-version-check testcontainers==4.15.0
npm --silent --no-fund --no-audit install testcontainers@11.14.0 > /dev/null
cat > pom.xml <<'POM'
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>finding</groupId>
  <artifactId>finding</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.testcontainers</groupId>
      <artifactId>testcontainers</artifactId>
      <version>1.21.4</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-nop</artifactId>
      <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
POM
mvn -q -B dependency:copy-dependencies -DoutputDirectory=lib > build.log || { cat build.log; exit 1; }
cat > Finding.java <<'JAVA'
import org.testcontainers.utility.DockerImageName;
import org.testcontainers.utility.ImageNameSubstitutor;

public class Finding {
    public static void main(String[] images) {
        for (var image : images) {
            var found = ImageNameSubstitutor.instance().apply(DockerImageName.parse(image));
            System.out.println(found.asCanonicalNameString());
        }
    }
}
JAVA
cat > finding.js <<'JS'
const { GenericContainer } = require("testcontainers");
(async () => {
  for (const image of process.argv.slice(2)) await new GenericContainer(image).start().catch(() => {});
  process.exit(0);
})();
JS
cat > finding.py <<'PYTHON'
import sys
from contextlib import suppress

from docker.errors import ImageNotFound
from testcontainers.core.container import DockerContainer

for image in sys.argv[1:]:
    with suppress(ImageNotFound):
        DockerContainer(image).start()
PYTHON
mkdir go
cat > go/main.go <<'GO'
package main

import (
	"context"
	"os"

	"github.com/testcontainers/testcontainers-go"
)

func main() {
	for _, image := range os.Args[1:] {
		_, _ = testcontainers.Run(context.Background(), image)
	}
}
GO
(
    cd go
    go mod init finding
    go get github.com/testcontainers/testcontainers-go@v0.45.0
    go build -o ../finding .
) 2> /dev/null
timeout 200 python3 - <<'PYTHON'
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

IMAGES = ["postgres:16", "docker.io/library/postgres:16", "ghcr.io/owner/app:1"]
COMMANDS = {
    "Java": ["java", "-cp", "lib/*", "Finding.java"],
    "Python": ["venv/bin/python", "finding.py"],
    "Node": ["node", "finding.js"],
    "Go": ["./finding"],
}
INFORMATION = {"OSType": "linux", "OperatingSystem": "Debian", "ServerVersion": "28.0.0", "MemTotal": 1 << 33, "NCPU": 2, "Labels": []}
VERSION = {"Version": "28.0.0", "ApiVersion": "1.48", "MinAPIVersion": "1.24", "Os": "linux", "Arch": "amd64"}
asked: list[str] = []


class Daemon(BaseHTTPRequestHandler):
    """A Docker daemon that has no image, and can pull none."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        at = urlsplit(self.path)
        known = {"_ping": "OK", "info": INFORMATION, "version": VERSION, "networks": [{"Name": "bridge", "Id": "b"}]}
        name = at.path.split("/")[-1]
        if at.path.endswith("/images/create"):
            query = parse_qs(at.query)
            asked.append(":".join(query["fromImage"] + query.get("tag", [])))
        body = json.dumps(known.get(name, [] if at.path.endswith("s/json") else {"message": "no such image"})).encode()
        self.send_response(200 if name in known or body == b"[]" else 404)
        self.send_header("Api-Version", "1.48")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *arguments: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Daemon)
threading.Thread(target=server.serve_forever, daemon=True).start()
environment = {
    **os.environ,
    "DOCKER_HOST": f"tcp://127.0.0.1:{server.server_port}",
    "TESTCONTAINERS_RYUK_DISABLED": "true",
    "HOME": os.getcwd(),
}


def names(language: str, prefix: str) -> list[str]:
    asked.clear()
    own = {**environment, "TESTCONTAINERS_HUB_IMAGE_NAME_PREFIX": prefix}
    done = subprocess.run([*COMMANDS[language], *IMAGES], env=own, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.split() if language == "Java" else list(asked)


C = "cache.example/docker.io"
POSTGRES, HUB, OTHER = IMAGES
EXPECTED = {
    ("Java", C): [f"{C}postgres:16", HUB, OTHER],
    ("Python", C): [f"{C}postgres:16", f"{C}{HUB}", f"{C}{OTHER}"],
    ("Node", C): [f"{C}/postgres:16", HUB, OTHER],
    ("Go", C): [f"{C}/postgres:16", f"{C}/{HUB}", OTHER],
    ("Java", f"{C}/"): [f"{C}/postgres:16", HUB, OTHER],
    ("Python", f"{C}/"): [f"{C}/postgres:16", f"{C}/{HUB}", f"{C}/{OTHER}"],
    ("Node", f"{C}/"): [f"{C}/postgres:16", HUB, OTHER],
    ("Go", f"{C}/"): [f"{C}/postgres:16", f"{C}/{HUB}", OTHER],
}
seen = {each: names(*each) for each in EXPECTED}
for (language, prefix), found in seen.items():
    print(f"{language}, {prefix}", *(f"  {image} becomes {name}" for image, name in zip(IMAGES, found)), sep="\n")
print("as stated" if seen == EXPECTED else "CHANGED")
sys.exit(seen != EXPECTED)
PYTHON
