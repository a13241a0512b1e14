"""The HTTP API of the admin listener, and its client."""
