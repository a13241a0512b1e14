"""Connection options and credentials of an upstream, made from its configuration."""

from __future__ import annotations

from proxy.config.upstream import Login, UpstreamConfig
from proxy.extensions.extension import Extensions
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials, DockerConfig, Helper, Inline, PasswordFile
from proxy.upstream.provided import ProvidedCredentials


def connect_of(upstream: UpstreamConfig) -> Connect:
    return Connect(
        ca_file=upstream.ca_file,
        client_certificate=upstream.client_certificate,
        client_key=upstream.client_key,
        proxy=upstream.proxy,
        private_redirects=upstream.private_redirects,
        insecure_skip_verify=upstream.insecure_skip_verify,
        trace=upstream.trace,
        connect_timeout=upstream.connect_timeout,
        header_timeout=upstream.header_timeout,
        progress_timeout=upstream.progress_timeout,
    )


def credentials_of(login: Login, extensions: Extensions) -> Credentials:
    """`extensions` has the credential providers."""
    if login.username is not None and login.password is not None:
        return Inline(login.username, login.password)
    if login.username is not None and login.password_file is not None:
        return PasswordFile(login.username, login.password_file)
    if login.docker_config is not None:
        return DockerConfig(login.docker_config)
    if login.credential_helper is not None:
        return Helper(login.credential_helper)
    if login.credential_provider is not None:
        return ProvidedCredentials(extensions.get(login.credential_provider))
    return Credentials()
