"""What a bucket says, in words: texts of the services, of their doubles, and of connections."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from storage.bucket import failures
from storage.bucket.failures import KEYS, REGION, RIGHTS, WAIT, BucketFailed, BucketFailure, explain
from storage.bucket.objects import Bucket, healthy
from storage.bucket.settings import BucketSettings
from tests.authority import Authority
from tests.azurite import Azurite, azurite_server
from tests.objects import FakeBucket, answer
from tests.seaweed import Seaweed, seaweed_server

SENTENCE = (
    "The operation lacked the necessary privileges to complete for path x/k: Error performing {} in 2ms"
)
S3 = "Generic S3 error: Error performing {} in 2.05ms, after 3 retries, max_retries: 3, retry_timeout: 30s  "
PUT = "PUT https://box.s3.eu-west-1.amazonaws.com/x/k"
PART = f"{PUT}?partNumber=3&uploadId=a"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"max_retries": 0, "retry_timeout": timedelta(seconds=9)}
    monkeypatch.setattr("storage.bucket.settings._RETRY", none)


def said(start: str, request: str, status: str, body: str, action: str = "put") -> BucketFailure:
    text = f"{start.format(request)} - Server returned non-2xx status code: {status}: {body}"
    return explain(Exception(f"{text}\n\nDebug source:\nGeneric {{ inner: Status }}"), action, "k")


def xml(code: str, message: str) -> str:
    head = '<?xml version="1.0" encoding="UTF-8"?>'
    return f"{head}\n<Error><Code>{code}</Code><Message>{message}</Message><HostId>aGk=</HostId></Error>"


@pytest.mark.parametrize(
    ("status", "code", "cause", "advice"),
    [
        ("403 Forbidden", "AccessDenied", "refuses access", RIGHTS["put"]),
        ("403 Forbidden", "InvalidAccessKeyId", "refuses access", KEYS),
        ("403 Forbidden", "SignatureDoesNotMatch", "refuses access", KEYS),
        ("400 Bad Request", "ExpiredToken", "answers 400 Bad Request", "renew the credentials"),
        ("403 Forbidden", "RequestTimeTooSkewed", "refuses access", "synchronize the clock"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "answers 400 Bad Request", REGION),
        ("503 Slow Down", "SlowDown", "answers 503 Slow Down", WAIT),
        ("400 Bad Request", "KMS.DisabledException", "answers 400 Bad Request", "correct encryption_key"),
        ("400 Bad Request", "InvalidStorageClass", "answers 400 Bad Request", "correct storage_class"),
        ("404 Not Found", "NoSuchBucket", "has no such bucket", "make the bucket"),
        ("500 Internal Server Error", "InternalError", "answers 500 Internal Server Error", failures.SERVICE),
        ("418 I", "Teapot", "answers 418 I", "compare the settings"),
    ],
)
def test_codes_of_s3(status: str, code: str, cause: str, advice: str) -> None:
    found = said(S3, PUT, status, xml(code, "Because of this."))
    assert (found.cause, found.detail) == (cause, f"put k: {status[:3]} {code}, Because of this.")
    assert found.advice.startswith(advice)
    assert found.right == (code == "AccessDenied")
    assert "Generic S3 error" in found.raw
    assert "Debug" not in found.raw


@pytest.mark.parametrize("action", ["put", "get", "look at", "delete"])
def test_the_permission_that_is_missing_is_that_of_the_request(action: str) -> None:
    # The answer to a HEAD has no body.
    body = "" if action == "look at" else xml("AccessDenied", "Access Denied")
    found = said(SENTENCE, PUT, "403 Forbidden", body, action)
    assert (found.right, found.advice) == (True, RIGHTS[action])
    told = "403 Forbidden" if action == "look at" else "403 AccessDenied, Access Denied"
    assert found.detail == f"{action} k: {told}"


@pytest.mark.parametrize(
    "request_", [PART, f"POST {PUT[4:]}?uploads", "PUT http://127.0.0.1:1/a/b/k?comp=block&blockid=YQ"]
)
def test_parts_need_a_permission_more(request_: str) -> None:
    found = said(SENTENCE, request_, "403 Forbidden", xml("AccessDenied", "No"))
    assert "s3:AbortMultipartUpload" in found.advice


def test_google_answers_in_json() -> None:
    body = '{"error": {"code": 403, "message": "no objects.create", "errors": [{"reason": "forbidden"}]}}'
    found = said("Generic GCS error: Error performing {} in 9ms", PUT, "403 Forbidden", body)
    assert found.detail == "put k: 403 forbidden, no objects.create"
    assert found.right


@pytest.mark.parametrize(
    ("url", "body", "says"),
    [
        ("http://169.254.169.254/latest/api/token", "denied", "403 Forbidden, denied"),
        ("https://oauth2.googleapis.com/token", '{"error":"invalid_grant","error_description":"Bad"}', "Bad"),
        ("http://metadata.google.internal/computeMetadata/v1/x", "", "403 Forbidden"),
    ],
)
def test_credentials_that_no_machine_gives(url: str, body: str, says: str) -> None:
    found = said(S3, f"PUT {url}", "403 Forbidden", body)
    assert (found.cause, found.advice) == ("cannot be asked without credentials", KEYS)
    assert found.detail.endswith(says)


def test_what_is_deleted_together_fails_by_key() -> None:
    text = "DeleteObjects request failed for key x/k: Access Denied (code: AccessDenied)"
    found = explain(Exception(f"Generic S3 error: {text}"), "delete", "k")
    assert (found.cause, found.detail) == ("refuses access", "delete k: AccessDenied, Access Denied")
    assert found.advice == RIGHTS["delete"]
    container = "Bulk delete request failed for key k: The specified container does not exist. (code: 404)"
    assert explain(FileNotFoundError(container), "delete", "k").cause == "has no such bucket"


def test_what_has_no_known_form_is_shown_in_one_short_line() -> None:
    found = explain(RuntimeError("a\n  panic " + "x" * 5000), "get", "k")
    assert found.detail.startswith("get k: a panic xxx")
    assert len(found.detail) < 330
    assert len(found.raw) == failures.RAW
    page = said(S3, PUT, "502 Bad Gateway", "<html><h1>Bad\n Gateway</h1><p>a proxy</p></html>")
    assert page.detail == "put k: 502 Bad Gateway, Bad Gateway a proxy"


@pytest.mark.parametrize(
    ("source", "cause", "says"),
    [
        ('ConnectError("dns error", Custom { error: "failed to lookup" })', "cannot be reached", "resolved"),
        (
            "inner: Http(HttpError { kind: Timeout, source: TimedOut })",
            "does not answer",
            "no answer in time",
        ),
        ("Os { code: 104, kind: ConnectionReset }", "cannot be reached", "the connection was cut"),
        ("Os { code: 101, kind: NetworkUnreachable }", "cannot be reached", "no way to it"),
        ("error: InvalidCertificate(Expired)", "cannot be reached", "has expired"),
        ("error: InvalidCertificate(BadSignature)", "cannot be reached", "not valid"),
        ("nothing that is known", "cannot be reached", "HTTP error: error sending request"),
    ],
)
def test_the_source_of_an_error_says_what_is_wrong_with_a_connection(
    source: str, cause: str, says: str
) -> None:
    text = f"{S3.format(PUT)}- HTTP error: error sending request\n\nDebug source:\n{source}"
    found = explain(Exception(text), "get", "k")
    assert (found.cause, says in found.detail) == (cause, True)
    assert found.advice


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "nothing listens there"),
        (ConnectionResetError("no whole answer"), "the connection was cut"),
        (socket.gaierror(-2, "Name or service not known"), "its name cannot be resolved"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]"), "it does not speak TLS"),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), "its certificate is not valid"),
    ],
)
def test_errors_of_python_are_told_as_those_of_the_client(error: OSError, says: str) -> None:
    found = explain(error, "abort", "k")
    assert (found.cause, found.detail.startswith(f"abort k: {says}")) == ("cannot be reached", True)


@pytest.mark.parametrize(
    "text",
    [
        "Generic S3 error: Got invalid multipart response: missing field `UploadId`",
        "Generic S3 error: Unable to extract metadata from headers: ETag Header missing from response",
    ],
)
def test_what_is_no_object_storage(text: str) -> None:
    found = explain(Exception(text), "put", "k")
    assert (found.cause, found.advice) == ("does not answer as object storage does", "correct endpoint")


# Real texts


def bucket(settings: BucketSettings) -> Bucket:
    return Bucket(settings.connect(), "box", healthy("box", Path()))


async def failing(settings: BucketSettings, content: Path | None = None) -> BucketFailure:
    """How an object cannot be put."""
    with pytest.raises(BucketFailed) as found:
        if content is None:
            await asyncio.to_thread(bucket(settings).create, "k", b"x")
        else:
            await bucket(settings).put("k", content, content.stat().st_size)
    assert str(found.value).startswith(f"box {found.value.failure.cause}: put k: ")
    assert found.value.public.endswith(found.value.failure.cause)
    return found.value.failure


@pytest.mark.errors("bucket.failed")
async def test_a_redirect_to_another_region() -> None:
    async with FakeBucket() as fake:
        fake.down = answer(301, "PermanentRedirect")
        found = await failing(fake.settings())
    assert (found.cause, found.advice) == ("is in another region", REGION)


@pytest.mark.errors("bucket.failed")
async def test_connections_that_fail(tmp_path: Path) -> None:
    own = Authority(tmp_path).issue("server", "127.0.0.1")
    other = Authority(tmp_path, "other").issue("other", "elsewhere.example")
    settings = BucketSettings(url="s3://box/x", access_key="a", secret_key="b")

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.close()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"SSH-2.0-server\r\n\r\n")
        writer.close()

    def context(files: dict[str, str]) -> ssl.SSLContext:
        made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        made.load_cert_chain(files["certificate"], files["key"])
        return made

    seen = []
    for scheme, serve, tls, ca in (
        ("https", cut, context(own), None),
        ("https", cut, context(other), tmp_path / "other.pem"),
        ("https", talk, None, None),
        ("http", talk, None, None),
        ("http", cut, None, None),
    ):
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        endpoint = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with closing(server):
            found = await failing(replace(settings, endpoint=endpoint, ca=ca))
        assert found.cause == "cannot be reached"
        seen.append(found.detail.removeprefix("put k: "))
    assert seen == [
        "its certificate is not trusted",
        "its certificate is for another name",
        "it does not speak TLS",
        "what answers does not speak HTTP",
        "the connection was cut before an answer",
    ]
    await server.wait_closed()
    assert "nothing listens" in (await failing(replace(settings, endpoint=endpoint))).detail


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with azurite_server(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.mark.clients
@pytest.mark.errors("bucket.failed")
async def test_azurite(azurite: Azurite, tmp_path: Path) -> None:
    right = azurite.settings("x")
    wrong = replace(right, secret_key=base64.b64encode(b"another").decode())
    found = await failing(wrong)
    assert (found.cause, found.advice) == ("refuses access", KEYS)
    assert found.detail.startswith("put k: 403 AuthorizationFailure, Server failed to authenticate")
    assert "RequestId" not in found.detail
    assert (await failing(replace(right, url="az://none/x"))).cause == "has no such bucket"
    (content := tmp_path / "content").write_bytes(bytes(6 << 20))
    assert (await failing(replace(right, url="az://none/x"), content)).cause == "has no such bucket"
    stranger = replace(right, access_key="who", endpoint=right.endpoint.replace("tests", "who"))
    assert "404 ResourceNotFound" in (await failing(stranger)).detail
    for missing in (replace(right, url="az://none/x"), wrong):
        with pytest.raises(BucketFailed, match="delete k"):
            await asyncio.to_thread(bucket(missing).delete, "k")


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed_server(tmp_path_factory.mktemp("seaweed") / "data") as server:
        yield server


@pytest.mark.clients
@pytest.mark.errors("bucket.failed")
async def test_seaweed(seaweed: Seaweed) -> None:
    right = seaweed.settings("tests")
    for wrong, code in (
        (replace(right, secret_key="another"), "SignatureDoesNotMatch"),
        (replace(right, access_key="who"), "InvalidAccessKeyId"),
    ):
        found = await failing(wrong)
        assert (found.cause, found.advice) == ("refuses access", KEYS)
        assert found.detail.startswith(f"put k: 403 {code}, ")
        with pytest.raises(BucketFailed, match=f"get k: 403 {code}"):
            await bucket(wrong).get("k")
