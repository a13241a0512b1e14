"""Whether a client accepts the server's certificate, as far as that is known without asking the server.

The certificate is that of the configuration.  A handshake in memory shows whether it is accepted: by the
authorities of this machine, or by the one that the client is given.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path

from yarl import URL

from proxy.config.schema import TLS
from proxy.connections.failures import explain
from proxy.connections.trust import shared_context
from proxy.setup.site import Setup, Site
from storage.tls import secure

OPTION = "--ca-file"


def trust_warnings(setup: Setup, site: Site, tls: TLS | None, authority: Path | None = None) -> list[str]:
    """What keeps the client from accepting the server's certificate, and what to do.

    `tls` is the certificate, `authority` the file with that of its authority, which the client gets.
    """
    if site.plain:
        return []
    found = []
    error = _refusal(tls, site.url, authority) if tls else None
    if isinstance(error, ssl.SSLCertVerificationError):
        found.append(f"{setup.client} will refuse {site.base}: {explain(error, site.url, OPTION)}")
    elif authority is None and (tls is None or error):
        found.append(
            f"unless the certificate of {site.host} is from a public authority, {setup.client} refuses it;"
            f" give {OPTION} with the certificate of its authority"
        )
    if authority is not None and setup.trust:
        found.append(f"{setup.client} must get the authority: {setup.trust.replace('FILE', str(authority))}")
    return found


def _refusal(tls: TLS, url: URL, authority: Path | None) -> OSError | None:
    """The error of a handshake, or of reading the files, which may be on another machine."""
    server = secure(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    sent, received = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        # With a password, Python asks nobody for one.
        server.load_cert_chain(tls.certificate, tls.key, password="")
        near = shared_context(authority).wrap_bio(received, sent, server_hostname=url.host)
        far = server.wrap_bio(sent, received, server_side=True)
        for _ in range(4):  # more than a handshake has flights
            for each in (near, far):
                with suppress(ssl.SSLWantReadError):
                    each.do_handshake()
    except OSError as error:
        return error
    return None
