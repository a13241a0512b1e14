"""Connections to other servers: whose certificates are accepted, and why a connection fails, in words."""
