"""TLS 1.2 and later, no end without notice, the same certificates, whatever Python it is: storage/tls.py."""

from __future__ import annotations

import ast
import ssl

import pytest

from storage.tls import secure
from tests.test_layers import ROOT

CHECKED = "proxy/setup/site.py"  # it connects nowhere, but reads certificates
MAKERS = ("SSLContext", "create_default_context")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("protocol", [ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER])
@pytest.mark.parametrize("before", [ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_1])
def test_defaults_that_are_too_lax(protocol: int, before: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(protocol)
    context.minimum_version = before
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    ignored = ssl.OP_IGNORE_UNEXPECTED_EOF if protocol == ssl.PROTOCOL_TLS_SERVER else 0
    others = context.options & ~ssl.OP_IGNORE_UNEXPECTED_EOF
    assert secure(context) is context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.options == others | ignored


@pytest.mark.parametrize("protocol", [ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER])
@pytest.mark.parametrize("of_python", [0, ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN])
def test_every_python_accepts_the_same_certificates(protocol: int, of_python: int) -> None:
    context = ssl.SSLContext(protocol)
    context.verify_flags |= of_python | ssl.VERIFY_CRL_CHECK_LEAF
    others = ssl.SSLContext(protocol).verify_flags | ssl.VERIFY_CRL_CHECK_LEAF
    assert secure(context).verify_flags == others | ssl.VERIFY_X509_PARTIAL_CHAIN


def test_what_an_operator_has_demanded_of_all_programs() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    assert secure(context).minimum_version == ssl.TLSVersion.TLSv1_3


def test_every_context_is_secure() -> None:
    found = []
    for path in [*ROOT.glob("proxy/**/*.py"), *ROOT.glob("storage/**/*.py")]:
        text = path.read_text()
        if path == ROOT / CHECKED or not any(each in text for each in MAKERS):
            continue
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        made = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS]
        passed = [argument for node in calls if ast.unparse(node.func) == "secure" for argument in node.args]
        found += [f"{path}: {ast.unparse(each)}" for each in made if each not in passed]
    assert found == []
