"""The fixtures `entrepot_registry` and `entrepot_mirror` of pytest.

What they need is imported when a test asks for one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from proxy.testing.mirror import LocalMirror
    from proxy.testing.registry import LocalRegistry

MARKERS = (
    "entrepot_registry(layout, name=None): load an OCI image layout into entrepot_registry;"
    " its path is relative to the file of the test",
    "entrepot_mirror(upstream=None, recording=None, **keys): the upstream of entrepot_mirror, the directory"
    " of its recording relative to the file of the test, and keys of the namespace",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("entrepot_upstream", "the upstream of entrepot_mirror: a URL, or a name such as docker.io")
    parser.addini("entrepot_hosts", "further registries that entrepot_registry stands for", type="args")
    parser.getgroup("entrepot").addoption(
        "--entrepot-record",
        choices=("once", "none", "all"),
        default="once",
        help="how entrepot_mirror uses a recording: once makes it where there is none, none only reads it,"
        " all makes it anew (default: once)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for each in MARKERS:
        config.addinivalue_line("markers", each)


@pytest.fixture
def entrepot_events() -> Iterator[None]:
    """Events go to `logging`, unless the program has configured structlog."""
    import structlog

    if structlog.is_configured():
        yield
        return
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    yield
    structlog.reset_defaults()


@pytest.fixture
def entrepot_registry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, entrepot_events: None
) -> Iterator[LocalRegistry]:
    """An empty private registry at `url`, or with the layouts of the marker `entrepot_registry`."""
    from proxy.testing.registry import LocalRegistry

    directory, hosts = tmp_path_factory.mktemp("entrepot-registry"), request.config.getini("entrepot_hosts")
    with LocalRegistry(directory, hosts) as registry:
        for marker in request.node.iter_markers("entrepot_registry"):
            layout, *name = marker.args
            registry.load(_beside(request, layout), *name, **marker.kwargs)
        yield registry


@pytest.fixture
def entrepot_mirror(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, entrepot_events: None
) -> Iterator[LocalMirror]:
    """An empty pull-through cache at `url`.

    Its upstream is that of the marker `entrepot_mirror`, or of the ini option `entrepot_upstream`, or
    `entrepot_registry`.
    """
    from proxy.testing.mirror import LocalMirror

    marker = request.node.get_closest_marker("entrepot_mirror")
    keys = dict(marker.kwargs) if marker else {}
    given, mode = keys.pop("recording", None), request.config.getoption("entrepot_record")
    upstream = (marker.args[0] if marker and marker.args else keys.pop("upstream", None)) or str(
        request.config.getini("entrepot_upstream")
    )
    if not upstream:
        upstream = request.getfixturevalue("entrepot_registry").url
    if given is None:  # nothing is kept, and nothing can be replayed
        recording, mode = tmp_path_factory.mktemp("entrepot-recording"), "all"
    else:
        recording = _beside(request, given)
    directory = tmp_path_factory.mktemp("entrepot-mirror")
    with LocalMirror(directory, upstream, recording, mode, **keys) as mirror:
        yield mirror
        lacking = mirror.lacking
    if lacking:
        pytest.fail("\n".join(lacking), pytrace=False)


def _beside(request: pytest.FixtureRequest, path: str | Path) -> Path:
    return Path(request.path.parent, path)
