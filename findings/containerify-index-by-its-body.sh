#!/usr/bin/env bash
# Expected: a client that accepts indexes knows one by the Content-Type of the response, as the distribution
#   specification has it, and so also an index of OCI whose body has no `mediaType`: the image specification
#   says that it should be there, and readers of both specifications cope without it.
# Actual: containerify looks at `mediaType` in the body alone. It takes such an index for an image, and fails
#   at `undefined`: the error names neither the index nor the field. With the field, the same index is pulled.
# Versions: containerify 4.1.0 (npm), Node 20.
# Why a registry cache must care: it serves the bytes of its upstream, so it cannot add the field. A cache that
#   makes or rewrites indexes has to write `mediaType` into them, beside the header.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm init -y > /dev/null
npm install --silent --no-audit --no-fund --ignore-scripts containerify@4.1.0
echo "containerify $(node -p "require('containerify/package.json').version"), Node $(node --version)"
mkdir app
echo '{"name": "app", "version": "1.0.0"}' > app/package.json
echo "" > app/index.js
cat > pull.js <<'JAVASCRIPT'
const { spawn } = require("child_process");
const { createHash } = require("crypto");
const http = require("http");
const zlib = require("zlib");

const INDEX = "application/vnd.oci.image.index.v1+json";
const MANIFEST = "application/vnd.oci.image.manifest.v1+json";
const blobs = {};

function add(mediaType, data) {
  const digest = `sha256:${createHash("sha256").update(data).digest("hex")}`;
  blobs[digest] = { mediaType, data };
  return { mediaType, digest, size: data.length };
}

const tar = Buffer.alloc(1024); // an empty layer
const diff = `sha256:${createHash("sha256").update(tar).digest("hex")}`;
const layer = add("application/vnd.oci.image.layer.v1.tar+gzip", zlib.gzipSync(tar));
const config = { architecture: "amd64", os: "linux", rootfs: { type: "layers", diff_ids: [diff] }, history: [{}], config: {} };
const described = add("application/vnd.oci.image.config.v1+json", Buffer.from(JSON.stringify(config)));
const image = { schemaVersion: 2, mediaType: MANIFEST, config: described, layers: [layer] };
const child = { ...add(MANIFEST, Buffer.from(JSON.stringify(image))), platform: { architecture: "amd64", os: "linux" } };
const tags = {
  with: { schemaVersion: 2, mediaType: INDEX, manifests: [child] },
  without: { schemaVersion: 2, manifests: [child] },
};

const server = http.createServer((request, response) => {
  const name = request.url.split("/").at(-1);
  const found = tags[name] ? { mediaType: INDEX, data: Buffer.from(JSON.stringify(tags[name])) } : blobs[name];
  response.writeHead(found ? 200 : 404, found ? { "Content-Type": found.mediaType, "Content-Length": found.data.length } : {});
  response.end(found?.data);
});

function pull(tag) {
  const registry = `http://127.0.0.1:${server.address().port}/v2/`;
  const words = ["--fromRegistry", registry, "--fromImage", `team/app:${tag}`, "--toImage", "out:1", "--toTar", `${tag}.tar`];
  const process = spawn("npx", ["containerify", ...words, "--folder", "app"]);
  let said = "";
  process.stdout.on("data", (data) => (said += data));
  process.stderr.on("data", (data) => (said += data));
  return new Promise((resolve) => process.on("close", (status) => resolve({ status, said })));
}

server.listen(0, "127.0.0.1", async () => {
  const [one, other] = [await pull("with"), await pull("without")];
  server.close();
  server.closeAllConnections();
  const last = other.said.split("\n").find((line) => line.includes("undefined")) || other.said.slice(-200);
  console.log(`with mediaType: exit status ${one.status}`);
  console.log(`without: exit status ${other.status}: ${last.trim()}`);
  const holds = one.status === 0 && other.status !== 0 && other.said.includes("undefined");
  console.log(holds ? "as stated" : "CHANGED");
  process.exitCode = holds ? 0 : 1;
});
JAVASCRIPT
timeout 120 node pull.js
