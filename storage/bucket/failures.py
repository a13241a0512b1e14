"""What a bucket's failure is in words: what failed, what the service said, and what to do.

obstore's errors have a text for developers: a sentence with the URL and the body of the answer, which is XML
or JSON, and below it the source of the error, which alone says what is wrong with a connection.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from socket import gaierror

from storage.errors import Unavailable

AGAIN = 5.0  # seconds after which a client may try again
SHORT = 300  # characters of what a service says
RAW = 1000  # characters of what obstore says
_SOURCE = "\n\nDebug source:"
_STATUS = re.compile(r"status code: (?P<status>\d{3})(?P<phrase>[A-Za-z -]*)(?:: (?P<body>.*))?", re.DOTALL)
_DELETED = re.compile(r"failed for key (?P<key>\S+): (?P<message>.*) \(code: (?P<code>\w+)\)", re.DOTALL)
_CODE = re.compile(r'<Code>\s*([^<]+?)\s*</Code>|"(?:reason|error|code)"\s*:\s*"([^"]+)"')
_MESSAGE = re.compile(r'<Message>\s*([^<]+?)\s*</Message>|"(?:message|error_description)"\s*:\s*"([^"]+)"')
_TAGS = re.compile(r"<[^>]*>")
_REQUEST = re.compile(r"\s*RequestId:.*", re.DOTALL)  # what Azure adds to its messages
_PARTS = re.compile(r"[?&](uploads\b|uploadId=|partNumber=|comp=block)")
# Who is asked for credentials where none are set.
_IDENTITY = re.compile(
    r"https?://(169\.254\.|metadata\.google\.|login\.microsoftonline\.|oauth2\.googleapis\.|sts\.)"
)
# A missing bucket is a 404 as a missing object is; only the text tells them apart: S3 and GCS, Azure.
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted", "container does not exist")

KEYS = "check access_key and secret_key, or what gives credentials where they are not set"
REGION = "set region, and endpoint, to those of the bucket"
WAIT = "the service is overloaded; if that lasts, look at its limits"
SERVICE = "look at the state and the log of the service"
RIGHTS = {
    "put": "give the permission to put objects (s3:PutObject)",
    "put in parts": "give the permission to put, and to abort uploads of parts"
    " (s3:PutObject, s3:AbortMultipartUpload)",
    "get": "give the permission to get objects (s3:GetObject)",
    "look at": "give the permission to get objects and to list the bucket (s3:GetObject, s3:ListBucket)",
    "delete": "give the permission to delete objects (s3:DeleteObject)",
    "abort": "give the permissions to list, and to abort, uploads of parts"
    " (s3:ListBucketMultipartUploads, s3:AbortMultipartUpload)",
}
# What to do, by the code of the service; codes that start alike are of one kind.
_CODES = {
    "InvalidAccessKeyId": KEYS,
    "SignatureDoesNotMatch": KEYS,
    "AuthenticationFailed": KEYS,
    "InvalidToken": KEYS,
    "invalid_grant": KEYS,
    "ExpiredToken": "renew the credentials: the session_token has expired",
    "RequestTimeTooSkewed": "synchronize the clock of this machine, and of the service, by NTP",
    "AuthorizationHeaderMalformed": REGION,
    "PermanentRedirect": REGION,
    "IllegalLocationConstraint": REGION,
    "SlowDown": WAIT,
    "ServerBusy": WAIT,
    "TooManyRequests": WAIT,
    "QuotaExceeded": "make room in the bucket, or raise its quota",
    "XMinioStorageFull": "make room on the disks of the service",
    "InvalidStorageClass": "correct storage_class",
    "KMS": "correct encryption_key, and give the permission to use that key",
}
# What is wrong with a connection, by a word in the source of the error: and what to do.
_CONNECTIONS = {
    "UnknownIssuer": ("its certificate is not trusted", "set ca to the certificate that has issued it"),
    "NotValidForName": ("its certificate is for another name", "use a name of its certificate as endpoint"),
    "Expired": ("its certificate has expired", "renew it, or set the clock of this machine"),
    "InvalidCertificate": ("its certificate is not valid", "renew it, or set ca"),
    "InvalidMessage": ("it does not speak TLS", "correct endpoint: http://, or another port"),
    "Parse(": ("what answers does not speak HTTP", "correct endpoint"),
    "dns error": ("its name cannot be resolved", "check endpoint and region, and the DNS of this machine"),
    "ConnectionRefused": ("nothing listens there (connection refused)", "check endpoint, and that it runs"),
    "NetworkUnreachable": ("there is no way to it", "check the network of this machine, and proxy"),
    "HostUnreachable": ("there is no way to it", "check the network of this machine, and proxy"),
    "ConnectionReset": ("the connection was cut", SERVICE),
    "IncompleteMessage": (
        "the connection was cut before an answer",
        "look at the log of the service; a port for TLS needs https:// in endpoint",
    ),
}


# The words above for the errors of Python.
_CLASSES = {
    gaierror: "dns error",
    ssl.SSLCertVerificationError: "InvalidCertificate",
    ssl.SSLError: "InvalidMessage",
    ConnectionRefusedError: "ConnectionRefused",
    ConnectionResetError: "ConnectionReset",
}
# What an answer has not that any object storage gives.
_STRANGE = re.compile(r"Got invalid \w+ response|Header missing from response")


@dataclass(frozen=True, slots=True)
class BucketFailure:
    """One failure of a bucket.

    cause: what is wrong, as the rest of a sentence; the same for all objects and times
    detail: what failed, and what the service said of it
    advice: what to do; `right` is whether it is to give a permission
    raw: what obstore said, shortened
    """

    cause: str
    detail: str
    advice: str
    raw: str
    right: bool = False


class BucketFailed(Unavailable):
    """A request to the bucket `name` has failed, as `failure` says."""

    def __init__(self, name: str, failure: BucketFailure) -> None:
        public = f"the object storage of this registry {failure.cause}"
        message = f"{name} {failure.cause}: {failure.detail}; {failure.advice}"
        super().__init__(message, retry_after=AGAIN, public=public)
        self.failure = failure


def explain(error: BaseException, action: str = "", key: str = "") -> BucketFailure:
    """What `error` means, which ended an attempt to `put`, `get`, `look at`, `delete` or `abort` `key`."""
    text, _, source = str(error).partition(_SOURCE)
    source += next((word for kind, word in _CLASSES.items() if isinstance(error, kind)), "")
    what = f"{action} {key}: " if action else ""
    raw = shortened(text, RAW)
    if isinstance(error, TimeoutError):
        advice = "check the network, and that the service works"
        return BucketFailure("does not answer", f"{what}no answer in time", advice, raw)
    if "redirect without LOCATION" in text:
        return BucketFailure("is in another region", f"{what}it redirects elsewhere", REGION, raw)
    if _IDENTITY.search(text) is not None:
        detail = f"{what}{_said(text) or shortened(text)}"
        return BucketFailure("cannot be asked without credentials", detail, KEYS, raw)
    if is_of_bucket(error):
        advice = "make the bucket, or correct its name"
        return BucketFailure("has no such bucket", f"{what}{_said(text) or shortened(text)}", advice, raw)
    if (said := _said(text)) is not None:
        return _refusal(text, f"{what}{said}", action, raw)
    if _STRANGE.search(text) is not None:
        detail = f"{what}{shortened(text)}"
        return BucketFailure("does not answer as object storage does", detail, "correct endpoint", raw)
    if "kind: Timeout" in source or "TimedOut" in source:
        return BucketFailure("does not answer", f"{what}no answer in time", SERVICE, raw)
    for word, (wrong, advice) in _CONNECTIONS.items():
        if word in source:
            return BucketFailure("cannot be reached", f"{what}{wrong}", advice, raw)
    return BucketFailure("cannot be reached", f"{what}{shortened(text)}", SERVICE, raw)


def is_of_bucket(error: BaseException) -> bool:
    """Whether it is the bucket that is missing."""
    return any(each in str(error) for each in _NO_BUCKET)


def shortened(text: str, most: int = SHORT) -> str:
    """In one line, of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _said(text: str) -> str | None:
    """The status, the code and the message of an answer; None if there was none."""
    if (deleted := _DELETED.search(text)) is not None:
        return f"{deleted['code']}, {shortened(deleted['message'])}"
    if (answer := _STATUS.search(text)) is None:
        return None
    body = answer["body"] or ""
    code, message = _found(_CODE, body), _REQUEST.sub("", _found(_MESSAGE, body))
    if not code and not message:
        message = _TAGS.sub(" ", body)
    status = f"{answer['status']} {code or answer['phrase'].strip()}".strip()
    return f"{status}, {shortened(message)}" if message.strip() else status


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return "" if match is None else match[1] or match[2] or ""


def _refusal(text: str, detail: str, action: str, raw: str) -> BucketFailure:
    """The failure of which an answer tells."""
    answer, code = _STATUS.search(text), _found(_CODE, text)
    status = answer["status"] if answer is not None else ""
    if (deleted := _DELETED.search(text)) is not None:
        code = deleted["code"]
    refused = status in ("401", "403") or code in ("AccessDenied", "403")
    advice = next((advice for each, advice in _CODES.items() if code.startswith(each)), "")
    if not advice and (status == "401" or "failed to authenticate" in text):
        advice = KEYS
    right = refused and not advice
    if right:
        advice = RIGHTS.get("put in parts" if _PARTS.search(text) else action, KEYS)
    if refused:
        return BucketFailure("refuses access", detail, advice, raw, right)
    advice = advice or (WAIT if status in ("429", "503") else SERVICE if status >= "5" else "")
    cause = f"answers {status}{answer['phrase'].rstrip()}" if answer is not None else "fails"
    return BucketFailure(cause, detail, advice or "compare the settings with docs/fleet.md", raw)
