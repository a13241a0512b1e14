"""Errors that keep the server from starting."""

from __future__ import annotations


class ConfigError(Exception):
    """The configuration is invalid.  The message has one line for each error, with the file and the key."""


class StartError(Exception):
    """The server cannot start.  The message is one line."""
