"""What is wrong with a configuration, or keeps the server from starting."""

from __future__ import annotations


class ConfigError(Exception):
    """What is wrong with a configuration, in one line for whoever wrote it."""


class StartError(Exception):
    """Why the server cannot start, in one line."""
