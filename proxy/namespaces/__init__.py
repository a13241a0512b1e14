"""Which registry serves which name, and how a configuration becomes registries."""
