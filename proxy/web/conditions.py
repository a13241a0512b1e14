"""The headers If-Match and If-None-Match: RFC 9110 §13.1."""

from __future__ import annotations

import re

from aiohttp import web

from storage.conditions import Conditions

_MEMBER = re.compile(r'(?:"[^"]*+"|[^,"]++|")++')  # an opaque tag may have commas


def parse_conditions(request: web.BaseRequest) -> Conditions:
    """The preconditions of a request."""
    return Conditions(_members(request, "If-Match"), _members(request, "If-None-Match"))


def _members(request: web.BaseRequest, header: str) -> frozenset[str] | None:
    """The members of a list, in one line or several: RFC 9110 §5.6.1.  None without the header."""
    if (lines := request.headers.getall(header, None)) is None:
        return None
    return frozenset(each.strip() for line in lines for each in _MEMBER.findall(line))
