#!/usr/bin/env bash
# Expected: Jib builds on each base image whose layers have a type of the image specification, which requires `…layer.v1.tar` and `+gzip` of
#   every implementation and defines `+zstd`; what it pushes has the layers of the base as they were described.
# Actual: a layer that is not compressed ends the build: "No Compressor found for the stream signature". One of zstd ends it unless the
#   library zstd-jni, which Jib does not bring, is on the class path. If it is, as the clients of Kafka bring it, the image is pushed, and
#   its manifest names the same bytes as gzip (`+gzip`, in Docker's format `.tar.gzip`).
# Versions: com.google.cloud.tools:jib-core 0.28.1, com.github.luben:zstd-jni 1.5.7-3 (Maven Central), Java 17.
# Why a registry cache must care: the first error looks like a damaged layer, but the digest is right, and no cache can convert it. A layer's
#   media type in a private registry is no proof of its compression: what unpacks layers looks at their first bytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > pom.xml <<'POM'
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>finding</groupId>
  <artifactId>finding</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>com.google.cloud.tools</groupId>
      <artifactId>jib-core</artifactId>
      <version>0.28.1</version>
    </dependency>
    <dependency>
      <groupId>com.github.luben</groupId>
      <artifactId>zstd-jni</artifactId>
      <version>1.5.7-3</version>
    </dependency>
  </dependencies>
</project>
POM
mvn -q -B dependency:copy-dependencies -DoutputDirectory=lib > build.log || { cat build.log; exit 1; }
mkdir zstd
mv lib/zstd-jni-* zstd
cat > Finding.java <<'JAVA'
import com.google.cloud.tools.jib.api.Containerizer;
import com.google.cloud.tools.jib.api.Jib;
import com.google.cloud.tools.jib.api.RegistryImage;
import com.google.cloud.tools.jib.api.buildplan.ImageFormat;
import java.nio.file.Files;
import java.util.concurrent.ExecutionException;

public class Finding {
    public static void main(String[] given) throws Exception {
        for (var compression : new String[] {"gzip", "tar", "zstd"}) {
            var to = Containerizer.to(RegistryImage.named(given[0] + "/built:" + compression));
            var cache = Files.createTempDirectory("cache");
            to.setAllowInsecureRegistries(true).setBaseImageLayersCache(cache).setApplicationLayersCache(cache);
            try {
                var base = RegistryImage.named(given[0] + "/base:" + compression);
                Jib.from(base).setFormat(ImageFormat.OCI).containerize(to);
                System.out.println("built");
            } catch (ExecutionException error) {
                var parts = error.getMessage().split("Exception: ");
                System.out.println(parts[parts.length - 1].split("\\. ")[0]);
            }
        }
        System.exit(0);
    }
}
JAVA
timeout 120 python3 - <<'PYTHON'
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OCI = "application/vnd.oci.image"
archive = bytes(10240)  # an empty one
raw = (len(archive) << 3 | 1).to_bytes(3, "little") + archive  # the last block, not compressed (RFC 8878, 3.1.1.2)
frame = bytes.fromhex("28b52ffda0") + len(archive).to_bytes(4, "little") + raw
LAYERS = {
    "gzip": (f"{OCI}.layer.v1.tar+gzip", gzip.compress(archive, mtime=0)),
    "tar": (f"{OCI}.layer.v1.tar", archive),
    "zstd": (f"{OCI}.layer.v1.tar+zstd", frame),
}
content: dict[str, tuple[str, bytes]] = {}  # type and bytes, by name
pushed: dict[str, str] = {}  # type of the layer, by tag


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def store(media_type: str, body: bytes, name: str = "") -> dict[str, object]:
    content[name or digest_of(body)] = (media_type, body)
    return {"mediaType": media_type, "digest": digest_of(body), "size": len(body)}


rootfs = {"type": "layers", "diff_ids": [digest_of(archive)]}
configuration = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs, "history": [{}]}
config = store(f"{OCI}.config.v1+json", json.dumps(configuration).encode())
for name, layer in LAYERS.items():
    manifest = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": config, "layers": [store(*layer)]}
    store(f"{OCI}.manifest.v1+json", json.dumps(manifest).encode(), name)


class Registry(BaseHTTPRequestHandler):
    default_request_version = "HTTP/1.0"  # for a handshake of TLS, which is answered with a status

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def read(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def do_GET(self) -> None:
        media_type, body = content.get(self.path.split("/")[-1], ("application/json", b"{}"))
        self.answer(200, body, Content_Type=media_type)

    def do_HEAD(self) -> None:
        self.answer(404)

    def do_POST(self) -> None:
        self.read()
        self.answer(202, Location="/v2/built/blobs/uploads/1")

    do_PATCH = do_POST

    def do_PUT(self) -> None:
        body = self.read()
        if "/manifests/" in self.path:
            layer = json.loads(body)["layers"][0]
            compression = self.path.split("/")[-1]
            same = layer["digest"] == digest_of(LAYERS[compression][1])
            pushed[compression] = layer["mediaType"] if same else "another layer"
        self.answer(201, Docker_Content_Digest=digest_of(body))

    def log_message(self, *arguments: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
environment = {**os.environ, "HOME": os.getcwd()}


def build(path: str) -> list[str]:
    pushed.clear()
    command = ["java", "-cp", path, f"-Djava.io.tmpdir={os.getcwd()}", "Finding.java", f"127.0.0.1:{server.server_port}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [pushed.get(name, said) for name, said in zip(LAYERS, done.stdout.splitlines())]


seen = {"jib-core": build("lib/*"), "jib-core with zstd-jni": build("lib/*:zstd/*")}
for what, found in seen.items():
    print(f"{what}:", *(f"  {LAYERS[name][0]}: {said}" for name, said in zip(LAYERS, found)), sep="\n")
refused = "No Compressor found for the stream signature."
labelled = f"{OCI}.layer.v1.tar+gzip"
holds = list(seen.values()) == [
    [labelled, refused, "Zstandard compression is not available"],
    [labelled, refused, labelled],
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
