// Snyk's client: gets the manifest, the config and the layers of IMAGE, with the credentials in LOGIN and PASSWORD.
const { getManifest, getImageConfig, getLayer } = require("@snyk/docker-registry-v2-client");

async function main(image) {
  const [, registry, repository, tag] = image.match(/^([^/]+)\/(.+):([^:]+)$/);
  const more = [process.env.LOGIN, process.env.PASSWORD, { protocol: "http:" }];
  const manifest = await getManifest(registry, repository, tag, ...more);
  await getImageConfig(registry, repository, manifest.config.digest, ...more);
  for (const { digest, size } of manifest.layers) {
    const layer = await getLayer(registry, repository, digest, ...more);
    if (layer.length !== size) throw new Error(`${digest} has ${layer.length} bytes, not ${size}`);
  }
}

main(process.argv[2]).catch((error) => {
  console.error(`error: ${error.message}`);
  process.exit(1);
});
