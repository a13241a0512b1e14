"""The files of deploy/compose: they are valid, what they name is there, and the cache alone runs."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from proxy.cli.main import main
from tests.clients.image import Layout, running_podman
from tests.clients.processes import environment, free_port, require, run
from tests.test_docs import ROOT

DIRECTORY = ROOT / "deploy" / "compose"
VARIABLES = {
    "ENTREPOT_ADMIN_TOKEN": "token",
    "ENTREPOT_HOST": "localhost",
    "PEERS_SECRET": "a-secret-of-the-peers",
    "DB_PASSWORD": "password",
    "S3_SECRET_KEY": "secret",
    "GRAFANA_PASSWORD": "password",
}
SERVICES = {
    "cache": {"entrepot"},
    "tls": {"entrepot", "caddy"},
    "fleet": {"entrepot", "balancer", "postgres", "s3", "bucket"},
    "monitoring": {"entrepot", "prometheus", "grafana"},
}


@pytest.mark.parametrize("name", SERVICES)
def test_files_are_valid(name: str, home: Path) -> None:
    """By the schema of compose files, with everything put in place that they extend."""
    require("docker-compose", root=False)
    command = ["docker-compose", "--file", DIRECTORY / f"{name}.yml", "config"]
    services = yaml.safe_load(run(command, environment(home, **VARIABLES)))["services"]
    assert services.keys() == SERVICES[name]
    ours = services.pop("entrepot")
    assert ours["read_only"] and ours["cap_drop"] == ["ALL"]
    for other in services.values():
        assert "." in other["image"].rpartition(":")[2] or other["image"].endswith("postgres:17")
    for service in (ours, *services.values()):
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith("/") or Path(source).exists(), source
        published = [each for each in map(str, service.get("ports", [])) if not each.startswith("127.0.0.1:")]
        assert published == [] or (name, len(published)) == ("tls", 2)  # 80 and 443 of Caddy


@pytest.mark.parametrize("name", [*SERVICES])
def test_a_variable_that_is_not_set_is_named(name: str, home: Path) -> None:
    require("docker-compose", root=False)
    words = DIRECTORY / f"{name}.yml"
    for each in VARIABLES:
        if f"${{{each}:?" in words.read_text():
            rest = {key: value for key, value in VARIABLES.items() if key != each}
            with pytest.raises(pytest.fail.Exception, match=each):
                run(["docker-compose", "--file", words, "config"], environment(home, **rest))


@pytest.mark.parametrize("name", ["Caddyfile", "fleet-Caddyfile"])
def test_caddyfiles_are_valid(name: str, home: Path) -> None:
    require("caddy", root=False)
    command = ["caddy", "validate", "--adapter=caddyfile", f"--config={DIRECTORY / name}"]
    run(command, environment(home, **VARIABLES))


def test_the_configuration_of_the_fleet_is_valid() -> None:
    words = ["check", "--no-files", str(DIRECTORY / "fleet-config.yml")]
    done = CliRunner().invoke(main, words, env=VARIABLES)
    assert done.exit_code == 0, done.output


def test_prometheus_has_our_rules(home: Path) -> None:
    """Put where monitoring.yml mounts them."""
    require("promtool", root=False)
    volumes = yaml.safe_load((DIRECTORY / "monitoring.yml").read_text())["services"]["prometheus"]["volumes"]
    for volume in volumes:
        source, target, *_ = volume.split(":")
        if source.startswith("."):
            place = home / target.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(DIRECTORY / source, place)
    said = run(["promtool", "check", "config", home / "etc/prometheus/prometheus.yml"], environment(home))
    assert said.count("rules found") == 2
    theirs = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    ours = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
    assert ours["rule_files"] == theirs["rule_files"]
    assert ours["scrape_configs"][0]["job_name"] == theirs["scrape_configs"][0]["job_name"]


@pytest.mark.timeout(900)
def test_the_cache_alone_runs(layout: Layout) -> None:
    """By podman-compose, in the network of this machine, which needs nothing of the kernel."""
    home = Path(tempfile.mkdtemp(prefix="entrepot-"))
    podman = running_podman(home)
    port, admin = free_port(), free_port()
    override = home / "override.yml"
    override.write_text(
        json.dumps(
            {
                "services": {
                    "entrepot": {
                        "network_mode": "host",
                        "environment": {
                            "ENTREPOT_LISTEN": f"127.0.0.1:{port}",
                            "ENTREPOT_ADMIN": f"127.0.0.1:{admin}",
                            "ENTREPOT_WORKERS": "1",
                        },
                    }
                }
            }
        )
    )
    files = ["--file", DIRECTORY / "cache.yml", "--file", override]
    compose = [Path(sys.executable).with_name("podman-compose"), "--in-pod=false", *files]
    path = f"{podman.program().parent}:{podman.environment['PATH']}"
    variables = {**podman.environment, **VARIABLES, "PATH": path}
    try:
        version = layout.top["annotations"]["org.opencontainers.image.ref.name"]
        image = podman.run("pull", "--quiet", f"oci:{layout.directory}:{version}")
        podman.run("tag", image.strip(), "localhost/entrepot")
        run([*compose, "up", "--detach", "--no-build"], variables)
        run([*compose, "exec", "-T", "entrepot", "python3.11", "-c", WAIT.format(port)], variables)
        assert run([*compose, "exec", "-T", "entrepot", "entrepot", "health"], variables) == "ready\n"
        listed = run([*compose, "exec", "-T", "entrepot", "entrepot", "ls", "--json"], variables)
        assert json.loads(listed)["repositories"] == []
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/") as answer:
            assert answer.status == 200
        run([*compose, "down", "--volumes"], variables)
    finally:
        podman.clear()
        shutil.rmtree(home)


# In the container: returns once the server listens, which podman-compose cannot wait for.
WAIT = """
import socket, time
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    try:
        socket.create_connection(("127.0.0.1", {})).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
"""
