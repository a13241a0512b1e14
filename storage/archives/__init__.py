"""Images as files: bundles, OCI layouts and the archives of docker save."""
