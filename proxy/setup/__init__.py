"""Configuration that makes container engines, builders and clusters use this server."""
