"""The section `upstream` of a namespace."""

from __future__ import annotations

from typing import Annotated

import msgspec

from proxy.config.fields import File, Flag, Host, Section, Size, Timeout
from proxy.config.hosts import parse_proxy, parse_urls
from proxy.config.quantities import Reserve, parse_reserve
from proxy.config.registry_hosts import HostPattern, find_pattern, parse_pattern_of_hosts
from proxy.config.values import Secret, parse_count, parse_helper, parse_label, parse_secret, parse_username


class Login(Section, frozen=True):
    """The source of a user name and a password; an empty one is anonymous."""

    username: Annotated[str, parse_username] | None = None
    password: Annotated[Secret, parse_secret] | None = None
    password_file: File | None = None
    docker_config: File | None = None
    credential_helper: Annotated[str, parse_helper] | None = None
    credential_provider: Annotated[str, parse_label] | None = None

    def __post_init__(self) -> None:
        sources = self.sources()
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} exclude each other: keep one source of the password")
        if self.username is None and sources and sources[0] in ("password", "password_file"):
            raise ValueError(f"{sources[0]} needs username")
        if self.username is not None and (not sources or sources[0] not in ("password", "password_file")):
            raise ValueError("username needs password or password_file")

    def sources(self) -> list[str]:
        """The given keys that are a source of the password."""
        keys = ("password", "password_file", "docker_config", "credential_helper", "credential_provider")
        return [each for each in keys if getattr(self, each) is not None]


class UpstreamConfig(Login, frozen=True, kw_only=True):
    """How to reach a registry.  All other keys apply to each `url`.

    An `extension` has the content itself, in place of a registry at a URL.

    In the namespace `*`, in place of URLs: `hosts`, of registries that clients may ask for, and `max_hosts`,
    the number of those in use at a time.
    """

    url: Annotated[tuple[str, ...], parse_urls] = ()
    extension: Annotated[str, parse_label] | None = None
    hosts: tuple[Annotated[HostPattern, parse_pattern_of_hosts], ...] = ()
    max_hosts: Annotated[int, parse_count] = 100
    credentials: tuple[Login, ...] = ()
    reserve: Annotated[Reserve, parse_reserve] = Reserve(percent=10)
    token_realms: tuple[Host, ...] = ()
    ca_file: File | None = None
    client_certificate: File | None = None
    client_key: File | None = None
    proxy: Annotated[Secret, parse_proxy] | None = None
    plain_http: Flag = False
    private_redirects: Flag = False
    insecure_skip_verify: Flag = False
    trace: Flag = False
    connect_timeout: Timeout = 3.0
    header_timeout: Timeout = 10.0
    progress_timeout: Timeout = 60.0
    max_fills: Annotated[int, parse_count] = 32
    bandwidth: Size | None = None

    def __post_init__(self) -> None:
        if self.extension is not None:
            given = [each for each in _OF_REMOTES if getattr(self, each) != _DEFAULTS[each]]
            if given:
                raise ValueError(f"{given[0]} is for a registry at a url, and this upstream is an extension")
            return
        if not self.url and not self.hosts:
            raise ValueError("needs url, such as https://registry.example")
        super().__post_init__()
        if self.url and self.hosts:
            raise ValueError("has both url and hosts: keep one")
        patterns = [each.text for each in self.hosts if not each.literal]
        if patterns and any(login.username is not None for login in self.logins()):
            raise ValueError(
                f"would send its password to every host that matches {patterns[0]}: list full names, or use"
                " docker_config or credential_helper, which have a password for each host"
            )
        if self.credentials and (sources := self.sources()):
            raise ValueError(f"{sources[0]} and credentials exclude each other: keep one of them")
        for number, login in enumerate(self.credentials):
            if not login.sources():
                raise ValueError(
                    f"credentials[{number}] is empty: give a password, docker_config, credential_helper or"
                    " credential_provider"
                )
        if self.client_key and not self.client_certificate:
            raise ValueError("client_key needs client_certificate")

    def allows_http(self, url: str) -> bool:
        """Whether the upstream at `url`, one of `self.url`, may redirect to plain http."""
        return self.plain_http or url.startswith("http://")

    def of_host(self, host: str, url: str | None) -> UpstreamConfig | None:
        """How to reach a host of `hosts`, at its well-known `url` if it has one; None if it is not listed."""
        pattern = find_pattern(self.hosts, host)
        if pattern is None:
            return None
        return msgspec.structs.replace(self, url=(url or pattern.url(host),), hosts=())

    def lists(self, host: str) -> bool:
        """Whether `hosts` has it by its full name: it may have a private address, and always has a place."""
        pattern = find_pattern(self.hosts, host)
        return pattern is not None and pattern.literal

    def logins(self) -> tuple[Login, ...]:
        """The accounts to use, at least one."""
        return self.credentials or (self,)


# Keys that apply only to a registry at a URL: all but those of fills.
_OF_REMOTES = [each for each in UpstreamConfig.__struct_fields__ if each not in ("extension", "max_fills")]
_DEFAULTS = {each.name: each.default for each in msgspec.structs.fields(UpstreamConfig)}
