"""The server: a cache and a registry over HTTP, its configuration, its administration and its commands."""
