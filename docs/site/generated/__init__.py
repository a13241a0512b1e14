"""Pages of the site that are made of the code, each time that the site is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from generated import admin_api, commands, configuration, distribution_api, events, metrics, python_api

# Their paths in the site.
PAGES: Mapping[str, Callable[[], str]] = {
    "reference/configuration.md": configuration.page,
    "reference/commands.md": commands.page,
    "reference/events.md": events.page,
    "reference/metrics.md": metrics.page,
    "reference/admin-api.md": admin_api.page,
    "reference/distribution-api.md": distribution_api.page,
    "reference/python-api.md": python_api.page,
}
