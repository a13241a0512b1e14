"""Where clients push and log in: what an error says to those who tried it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.config.hosts import Address, is_host

SHOWN = 3  # private registries that an error names
LONGEST = 200  # characters of a name that an error repeats


@dataclass(frozen=True, slots=True)
class Directions:
    """The private registries of a server by namespace, each with the address of its own listener, if any.

    A `host` is the Host header of a request, by which the client reached the server.
    """

    stores: Mapping[str, Address | None]

    def push(self, host: str, name: str) -> str:
        """What to push to instead of `name`, which no private registry takes."""
        if not self.stores:
            return "no namespace of this server takes pushes (store: {})"
        first, _, rest = name.partition("/")
        relative = (rest if rest and is_host(first) else name)[:LONGEST]
        found = [self._name(host, store, relative) for store in self.stores]
        return f"push to {' or '.join(found[:SHOWN])}"

    def login(self, host: str, namespace: str, asks: bool) -> str:
        """How docker logs in to the namespace; `asks` is whether it can at this host."""
        if asks:
            return f"docker login {host}"
        if (address := self.stores.get(namespace)) is not None:
            return f"docker login {_at(host, address)}, since docker cannot log in at {host}"
        return f"podman login {host}; docker cannot log in there"

    def _name(self, host: str, store: str, relative: str) -> str:
        address = self.stores[store]
        return f"{host}/{store}/{relative}" if address is None else f"{_at(host, address)}/{relative}"


def _at(host: str, address: Address) -> str:
    """The host by which a client reaches a listener on the machine that it knows by `host`."""
    if not address.everywhere:
        return str(address)
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return f"{name}:{address.port}"
