"""Request middleware: refuses clients by their User-Agent, and says in each response which site answered."""

import re
from dataclasses import dataclass

from proxy.extensions.protocols import ClientRequest, RequestMiddleware, RequestRefusal, ResponseHeaders


@dataclass
class GateSettings:
    """`refuse`: a regular expression that is searched in the User-Agent; `site`: the value of X-Site."""

    refuse: str
    site: str
    message: str = "this client is too old: use a newer one"

    def __post_init__(self) -> None:
        try:
            re.compile(self.refuse)
        except re.error as error:
            raise ValueError(f"refuse: {error}") from None
        ResponseHeaders({"X-Site": self.site})


class ClientGate(RequestMiddleware):
    protocol = 1
    Settings = GateSettings

    def __init__(self, settings: GateSettings) -> None:
        self._refuse = re.compile(settings.refuse)
        self._refusal = RequestRefusal(settings.message)
        self._headers = ResponseHeaders({"X-Site": settings.site})

    async def handle(self, request: ClientRequest) -> RequestRefusal | ResponseHeaders | None:
        refused = self._refuse.search(request.headers.get("user-agent", ""))
        return self._refusal if refused else self._headers
