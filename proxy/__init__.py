"""The server: a cache and a registry over HTTP, its configuration, its administration and its commands.

Where to begin: `proxy.cache.cache.Cache` answers from a store and fills it from `proxy.upstream.client`;
`proxy.web.server.DistributionAPI` serves a registry; `proxy.namespaces.composition` makes all of them of a
configuration, and `proxy.server.process` runs them.  docs/architecture.md describes the packages, and
docs/library.md how to use them without the server.
"""
