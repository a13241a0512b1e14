"""The other replicas of a configuration."""

from __future__ import annotations

from collections.abc import Callable

from proxy.config.errors import StartError
from proxy.config.schema import Config
from proxy.telemetry.metrics import PEERS, Metrics
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials
from proxy.upstream.membership import Membership
from proxy.upstream.peers import Peers
from proxy.upstream.requests import UpstreamSettings
from storage.shared import SharedState

# Seconds.  One that is down is to be left out at once.  One that has been asked may have to ask an upstream.
CONNECT, ANSWER, PROGRESS = 1.0, 15.0, 15.0
SILENCE = 1.0  # seconds after which one that sends nothing is asked whether it is there


def connect_to_peers(config: Config) -> Connect:
    """How to connect to another replica."""
    assert config.peers is not None
    return Connect(
        ca_file=config.peers.ca_file,
        server_name=config.peers.dns[0] if config.peers.dns and config.tls else None,
        trace=True,
        connect_timeout=CONNECT,
        header_timeout=ANSWER,
        progress_timeout=PROGRESS,
        silence=SILENCE,
    )


def membership_of(config: Config) -> Membership:
    assert config.peers is not None
    host = "" if config.listen.everywhere else config.listen.host
    return Membership(config.peers, config.listen.port, host=host, encrypted=config.tls is not None)


def fleet_of(
    config: Config, clock: Callable[[], float], metrics: Metrics, shared: SharedState
) -> Peers | None:
    """The other replicas, None without `peers:`.  Raises StartError."""
    if config.peers is None:
        return None
    connect = connect_to_peers(config)
    try:
        connect.ssl_context()
    except OSError as error:
        raise StartError(f"peers.ca_file: {config.peers.ca_file}: {error.strerror or error}") from error

    def make(url: str) -> UpstreamRegistry:
        settings = UpstreamSettings(url, connect, shared=shared)
        return UpstreamRegistry(PEERS, settings, [Credentials()], metrics, clock)

    return Peers(membership_of(config), config.peers.secret, make)
