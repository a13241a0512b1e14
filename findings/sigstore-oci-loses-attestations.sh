#!/usr/bin/env bash
# Expected: @sigstore/oci, which reads the tag of an image's referrers with its ETag and writes it with `If-Match`, adds
#   all of several attestations that are pushed at the same time, or fails for those that came too late: RFC 9110,
#   13.1.1, forbids a server to act if `If-Match` is false.
# Actual: Distribution ignores `If-Match`. A stale one is answered 201, the last writer wins, and all calls succeed, while
#   the index has fewer attestations than were pushed. Their manifests are stored, but nothing refers to them.
# Versions: @sigstore/oci 0.7.2 (npm), which also needs promise-retry 2.0.1, without naming it; Node 20;
#   docker-registry 2.8.2+ds1-1 (Debian 12).
# Why a registry cache must care: of an upstream without a referrers API, the index under `sha256-…` may lack what was
#   pushed. That is no reason to fetch it anew, nor may a registry take it for complete, and delete what it does not name.
#   The referrers API has no such race, since nobody writes an index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download docker-registry=2.8.2+ds1-1
dpkg -x ./*.deb root
npm init -y > /dev/null
npm install --silent --no-audit --no-fund --ignore-scripts @sigstore/oci@0.7.2 promise-retry@2.0.1
root/usr/bin/docker-registry --version
echo "@sigstore/oci $(node -p "require('@sigstore/oci/package.json').version"), Node $(node --version)"
# shellcheck disable=SC2016  # bcrypt of "password"
echo 'user:$2b$05$UTy65SAtmVpQXHRL1QmmQeoDvUGLkWhe/gw6dj18U.s5kfaRD5Lv.' > users
cat > attach.js <<'JAVASCRIPT'
const { spawn } = require("child_process");
const { createHash } = require("crypto");
const { writeFileSync } = require("fs");
const http = require("http");
const net = require("net");
const { attachArtifactToImage } = require("@sigstore/oci");

const MANIFEST = "application/vnd.oci.image.manifest.v1+json";
const INDEX = "application/vnd.oci.image.index.v1+json";
const BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json";
const credentials = { username: "user", password: "password" };
const headers = { Authorization: `Basic ${Buffer.from("user:password").toString("base64")}` };
const sha256 = (data) => `sha256:${createHash("sha256").update(data).digest("hex")}`;

function freePort() {
  return new Promise((resolve) => {
    const server = net.createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

// In front of the registry: the writes of an index wait until `together` of them are there, and then go one by one.
function front(port) {
  const proxy = { together: 1, held: [], conditions: 0 };
  const forward = (request, body, response) =>
    new Promise((resolve) => {
      const { url, method, headers } = request;
      const onward = http.request({ host: "127.0.0.1", port, path: url, method, headers }, (answer) => {
        response.writeHead(answer.statusCode, answer.headers);
        answer.pipe(response);
        response.on("close", resolve);
      });
      onward.end(body);
    });
  proxy.server = http.createServer(async (request, response) => {
    const parts = [];
    for await (const part of request) parts.push(part);
    const send = () => forward(request, Buffer.concat(parts), response);
    if (request.method !== "PUT" || !request.url.includes("/manifests/sha256-")) return send();
    if (request.headers["if-match"]) proxy.conditions++;
    proxy.held.push(send);
    if (proxy.held.length < proxy.together) return;
    for (const each of proxy.held.splice(0)) await each();
  });
  return proxy;
}

async function ready(base) {
  for (let tries = 0; tries < 200; tries++) {
    const answered = await fetch(base).then(() => true, () => false);
    if (answered) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error("the registry does not start");
}

async function put(url, type, body, more = {}) {
  const response = await fetch(url, { method: "PUT", body, headers: { ...headers, "Content-Type": type, ...more } });
  return response.status;
}

async function main(host, proxy) {
  const base = `http://${host}/v2/app`;
  const config = Buffer.from("{}");
  const started = await fetch(`${base}/blobs/uploads/`, { method: "POST", headers });
  await put(`${started.headers.get("Location")}&digest=${sha256(config)}`, "application/octet-stream", config);
  const described = { mediaType: "application/vnd.oci.image.config.v1+json", digest: sha256(config), size: 2 };
  const image = JSON.stringify({ schemaVersion: 2, mediaType: MANIFEST, config: described, layers: [] });
  await put(`${base}/manifests/1`, MANIFEST, image);

  const stale = await put(`${base}/manifests/1`, MANIFEST, image, { "If-Match": `"${sha256("other")}"` });
  console.log(`a PUT with an If-Match that does not match: ${stale}`);
  const attach = (number) =>
    attachArtifactToImage({
      imageName: `${host}/app`,
      imageDigest: sha256(image),
      artifact: Buffer.from(JSON.stringify({ number })),
      mediaType: BUNDLE,
      credentials,
    });
  await attach(0);
  proxy.together = 2;
  await Promise.all([attach(1), attach(2)]);
  const tag = sha256(image).replace(":", "-");
  const found = await fetch(`${base}/manifests/${tag}`, { headers: { ...headers, Accept: INDEX } });
  const { manifests } = await found.json();
  console.log(`3 attestations were pushed without an error, 2 of them at once, with ${proxy.conditions} times If-Match;`);
  console.log(`the index has ${manifests.length}`);
  return stale === 201 && proxy.conditions === 2 && manifests.length === 2;
}

(async () => {
  const port = await freePort();
  const proxy = front(port);
  await new Promise((resolve) => proxy.server.listen(0, "127.0.0.1", resolve));
  writeFileSync(
    "config.yml",
    JSON.stringify({
      version: "0.1",
      log: { level: "error" },
      storage: { filesystem: { rootdirectory: `${process.cwd()}/data` } },
      http: { addr: `127.0.0.1:${port}` },
      auth: { htpasswd: { realm: "registry", path: `${process.cwd()}/users` } },
    }),
  );
  const registry = spawn("root/usr/bin/docker-registry", ["serve", "config.yml"], { stdio: "ignore" });
  try {
    await ready(`http://127.0.0.1:${port}/`);
    const holds = await main(`127.0.0.1:${proxy.server.address().port}`, proxy);
    console.log(holds ? "as stated" : "CHANGED");
    process.exitCode = holds ? 0 : 1;
  } finally {
    registry.kill();
    proxy.server.close();
    proxy.server.closeAllConnections();
  }
})();
JAVASCRIPT
timeout 120 node attach.js
