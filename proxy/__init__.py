"""The server: a cache and a registry over HTTP, its configuration, its administration and its commands.

The public API is in __all__.  Where to begin: `Cache` answers from a store and fills it from an
`UpstreamRegistry`; `DistributionAPI` serves a registry; `compose` makes all of them of a configuration, and
`proxy.server.process` runs them.  docs/architecture.md describes the packages, and docs/library.md how to
use them without the server.
"""

from typing import TYPE_CHECKING

from storage.exports import PublicNames

if TYPE_CHECKING:
    from proxy.cache.cache import Cache
    from proxy.cache.fills import Fills
    from proxy.cache.policy import Policy
    from proxy.config.loader import load
    from proxy.namespaces.composition import compose
    from proxy.namespaces.hosted import Hosted
    from proxy.namespaces.routing import Member, Namespaces
    from proxy.telemetry.metrics import Metrics
    from proxy.upstream.client import UpstreamRegistry
    from proxy.upstream.connect import Connect
    from proxy.upstream.credentials import Credentials, Inline
    from proxy.upstream.failover import Failover
    from proxy.upstream.requests import UpstreamSettings
    from proxy.web.listener import ConnectionLimits, Listener
    from proxy.web.server import DistributionAPI
else:
    _names = PublicNames(
        __name__,
        {
            "proxy.cache.cache": "Cache",
            "proxy.cache.fills": "Fills",
            "proxy.cache.policy": "Policy",
            "proxy.config.loader": "load",
            "proxy.namespaces.composition": "compose",
            "proxy.namespaces.hosted": "Hosted",
            "proxy.namespaces.routing": "Member Namespaces",
            "proxy.telemetry.metrics": "Metrics",
            "proxy.upstream.client": "UpstreamRegistry",
            "proxy.upstream.connect": "Connect",
            "proxy.upstream.credentials": "Credentials Inline",
            "proxy.upstream.failover": "Failover",
            "proxy.upstream.requests": "UpstreamSettings",
            "proxy.web.listener": "ConnectionLimits Listener",
            "proxy.web.server": "DistributionAPI",
        },
    )
    __getattr__, __dir__ = _names.get, _names.listed

__all__ = [
    "Cache",
    "Connect",
    "ConnectionLimits",
    "Credentials",
    "DistributionAPI",
    "Failover",
    "Fills",
    "Hosted",
    "Inline",
    "Listener",
    "Member",
    "Metrics",
    "Namespaces",
    "Policy",
    "UpstreamRegistry",
    "UpstreamSettings",
    "compose",
    "load",
]
