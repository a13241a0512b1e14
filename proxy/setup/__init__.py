"""Configuration for container engines and clusters that are to use this server."""
