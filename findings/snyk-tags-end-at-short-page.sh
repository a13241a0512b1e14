#!/usr/bin/env bash
# Expected: both functions of @snyk/docker-registry-v2-client that list tags return all of them from a registry
#   that gives fewer than `n` a page with `Link` to the next (the specification lets it), and the second,
#   `getTagsPaginated`, which its documentation calls the more robust one, at least as many as the first.
# Actual: `getTagsPaginated` does not look at `Link`. It goes on only while a page has exactly `n` names, so
#   with its own n=1000 against pages of 10 it returns 10 of 25 tags, without an error. `getTags` follows
#   `Link`, but takes its query alone. With n=5 or n=10 both return 25; with n=5 it asks once more for nothing.
# Versions: @snyk/docker-registry-v2-client 4.0.5 (npm), Node 20.
# Why a registry cache must care: a limit below the `n` that a client asks for is a limit on what such a client
#   sees. A cache should answer `n` names whenever it has them, also if its upstream's pages are shorter,
#   and never end a page early at the seam between stored and fetched names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm init -y > /dev/null
npm install --silent --no-audit --no-fund --ignore-scripts @snyk/docker-registry-v2-client@4.0.5
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem -days 2 \
  -subj /CN=localhost -addext subjectAltName=DNS:localhost 2> /dev/null
echo "@snyk/docker-registry-v2-client $(node -p "require('@snyk/docker-registry-v2-client/package.json').version")," \
  "Node $(node --version)"
cat > list.js <<'JAVASCRIPT'
const { readFileSync } = require("fs");
const https = require("https");
const client = require("@snyk/docker-registry-v2-client");

const LIMIT = 10; // names a page, whatever the client asks for
const TAGS = Array.from({ length: 25 }, (_, number) => `v${String(number).padStart(2, "0")}`);
let asked = [];

const server = https.createServer({ key: readFileSync("key.pem"), cert: readFileSync("cert.pem") }, (request, response) => {
  asked.push(request.url);
  const query = new URL(request.url, "https://localhost").searchParams;
  const size = Math.min(Number(query.get("n") || LIMIT), LIMIT);
  const left = TAGS.filter((tag) => tag > (query.get("last") || ""));
  const page = left.slice(0, size);
  response.setHeader("Content-Type", "application/json");
  if (left.length > size) {
    response.setHeader("Link", `</v2/app/tags/list?n=${size}&last=${page.at(-1)}>; rel="next"`);
  }
  response.end(JSON.stringify({ name: "app", tags: page }));
});

server.listen(0, "127.0.0.1", async () => {
  const seen = {};
  for (const list of ["getTags", "getTagsPaginated"]) {
    for (const n of [5, 10, 1000]) {
      asked = [];
      const tags = await client[list](`localhost:${server.address().port}`, "app", "", "", n);
      seen[`${list} ${n}`] = tags.length;
      console.log(`${list}, n=${n}: ${tags.length} of ${TAGS.length} tags in ${asked.length} requests`);
    }
  }
  server.close();
  server.closeAllConnections();
  const all = ["getTags 5", "getTags 10", "getTags 1000", "getTagsPaginated 5", "getTagsPaginated 10"];
  const holds = all.every((each) => seen[each] === TAGS.length) && seen["getTagsPaginated 1000"] === LIMIT;
  console.log(holds ? "as stated" : "CHANGED");
  process.exitCode = holds ? 0 : 1;
});
JAVASCRIPT
NODE_EXTRA_CA_CERTS=cert.pem timeout 60 node list.js
