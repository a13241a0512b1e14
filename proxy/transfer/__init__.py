"""Images moved between registries and bundles: copy, export, import."""
