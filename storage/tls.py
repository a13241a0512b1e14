"""What TLS contexts have in common, whatever the defaults of Python are."""

from __future__ import annotations

import ssl


def secure(context: ssl.SSLContext) -> ssl.SSLContext:
    """Have a context speak TLS 1.2 and later; a client's takes an end without close_notify for an error.

    It is returned.  Debian builds Python without the first (RFC 8996), and Python 3.11.2 sets an option
    against the second: a body that ends with its connection would seem whole (RFC 8446 §6.1).  Requests have
    a length, so that a server need not care.

    A trusted certificate ends a chain, also that of an intermediate authority, which Python before 3.13
    refuses.  An authority without a key usage, as `openssl req -x509` makes it, is accepted; Python 3.13
    refuses it.  Go accepts both.
    """
    if context.minimum_version < ssl.TLSVersion.TLSv1_2:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    if context.protocol == ssl.PROTOCOL_TLS_CLIENT:
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.verify_flags = context.verify_flags & ~ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
