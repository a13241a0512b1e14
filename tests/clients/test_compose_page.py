"""The files of deploy/compose are started as their page says, on a machine with Docker, each up to a pull.

The images beside ours are made of Debian's packages.  Grafana is in none.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.clients.debian_image import POSTGRES, SHELL, files, make_image
from tests.clients.image import Layout
from tests.clients.machine import ADDRESS, ELSEWHERE, Machine
from tests.clients.processes import require
from tests.clients.surroundings import (
    CLONE,
    Page,
    provide_clone,
    provide_docker,
    provide_hub,
    provide_names,
)

pytestmark = pytest.mark.timeout(900)
HOST, ACME = "registry.example.com", "acme-v02.api.letsencrypt.org"
# A server of certificates, where Caddy asks by itself.
ISSUER = """
{
    admin off
    auto_https off
    storage file_system /tmp/acme
    pki {
        ca local {
            root {
                cert /tmp/acme/ca.pem
                key /tmp/acme/ca.key
            }
        }
    }
}
https://%s {
    bind %s
    tls /tmp/acme/acme.crt /tmp/acme/acme.key
    rewrite /directory /acme/local/directory
    acme_server
}
"""


@pytest.fixture
def machine(home: Path, layout: Layout) -> Iterator[Machine]:
    """Which reaches Docker Hub and an issuer of certificates, and has all images but Grafana's."""
    require("caddy", "docker-compose", "docker-registry", "dnsmasq", "prometheus", "skopeo", "wget")
    authority = Authority(home)
    machine = Machine(home)
    try:
        provide_names(machine, home, **{HOST: ADDRESS, ACME: ELSEWHERE})
        provide_hub(machine, home, authority)
        provide_issuer(machine, home, authority)
        provide_docker(machine, layout)
        provide_images(machine)
        provide_clone(machine)
        yield machine
    finally:
        machine.stop()


def provide_issuer(machine: Machine, directory: Path, authority: Authority) -> None:
    """In the network that stands for the internet, by the name that Caddy knows."""
    authority.issue("acme", ACME)
    authority.write_key()
    place = machine.path("/tmp/acme")
    place.mkdir()
    for name in ("ca.pem", "ca.key", "acme.crt", "acme.key"):
        shutil.copy(directory / name, place / name)
    (place / "Caddyfile").write_text(ISSUER % (ACME, ELSEWHERE))
    words = ("run", "--config=/tmp/acme/Caddyfile", "--adapter=caddyfile")
    machine.serve("serving initial configuration", "caddy", *words, files=True)


def provide_images(machine: Machine) -> None:
    shell = files(SHELL)
    weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    for name, program in {"weed": Path(weed).read_bytes(), "postgres": POSTGRES.encode()}.items():
        machine.path(f"/usr/local/bin/{name}").write_bytes(program)
        machine.path(f"/usr/local/bin/{name}").chmod(0o755)
    make_image(
        machine,
        "caddy:2.10",
        shell | files(["caddy"]),
        "ENV XDG_DATA_HOME=/data XDG_CONFIG_HOME=/config",
        'CMD ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]',
    )
    make_image(
        machine,
        "postgres:17",
        shell | files(["postgresql-15", "postgresql-client-15", "util-linux"]) | {"/usr/local/bin/postgres"},
        "ENV PATH=/usr/lib/postgresql/15/bin:/usr/bin:/bin",
        'ENTRYPOINT ["/usr/local/bin/postgres"]',
    )
    make_image(machine, "chrislusf/seaweedfs:4.48", shell | {"/usr/local/bin/weed"}, 'ENTRYPOINT ["weed"]')
    make_image(
        machine,
        "prom/prometheus:v3.5.0",
        shell | files(["prometheus"]),
        'ENTRYPOINT ["prometheus"]',
        'CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]',
    )


def test_each_file_is_started(machine: Machine) -> None:
    page = Page("docs/install/compose.md")

    def follow(words: str, more: str = "") -> str:
        return machine.run(page.script(words).rstrip("\n") + more, directory=CLONE)

    said = follow("cache.yml")
    assert "docker.io/library/alpine " in said
    machine.run("docker rmi localhost:5000/docker.io/library/alpine:3")
    follow("tls.yml")
    machine.run("docker rmi registry.example.com/docker.io/library/alpine:3")
    said = follow("fleet.yml")
    assert "docker.io/library/alpine " in said
    follow("monitoring.yml", " prometheus")
    rules = json.loads(machine.run("curl --fail --silent http://127.0.0.1:9090/api/v1/rules"))
    assert len(rules["data"]["groups"]) > 1
    assert "entrepot:5001" in machine.run("curl --fail --silent http://127.0.0.1:9090/api/v1/status/config")
    machine.run("docker exec compose_entrepot_1 entrepot health --wait 60s")
    machine.run("docker exec compose_prometheus_1 wget --quiet -O- http://entrepot:5001/metrics")
    page.check_whole()
