"""Kernel TLS: records encrypted by Linux (net/tls), so that os.sendfile works on an encrypted connection.

It needs the kernel's module tls, OpenSSL built with it, a cipher that both support, and a handshake on the
socket itself.  OpenSSL then hands the key over at the end of the handshake (SSL_CTX_set_options(3)).
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

OP_ENABLE_KTLS = getattr(ssl, "OP_ENABLE_KTLS", 1 << 3)  # the name since Python 3.12
_PROTOCOLS = Path("/proc/sys/net/ipv4/tcp_available_ulp")
_SOL_TLS, _TLS_TX = 282, 1  # <linux/socket.h>, <linux/tls.h>
_INFO = 4  # bytes of struct tls_crypto_info: version and cipher


def is_offered() -> bool:
    """Whether the kernel has it now: it loads the module by itself for processes with CAP_NET_ADMIN alone."""
    try:
        return ssl.OPENSSL_VERSION_INFO >= (3,) and "tls" in _PROTOCOLS.read_text().split()
    except OSError:
        return False


def encrypts(connection: socket.socket) -> bool:
    """Whether the kernel encrypts what is sent."""
    try:
        return len(connection.getsockopt(_SOL_TLS, _TLS_TX, _INFO)) == _INFO
    except OSError:  # no such option without the module; EBUSY if OpenSSL encrypts
        return False
