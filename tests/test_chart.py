"""The chart: what it makes of values is what Kubernetes takes, what the server takes, and hangs together."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from proxy.cli.main import main
from proxy.config.advice import advise
from proxy.config.loader import load
from proxy.testing.registry import LocalRegistry
from tests import chart
from tests.chart import CHART, KUSTOMIZE, ROOT, VALUES, Manifest, helm, kustomized, refusal, render
from tests.clients.processes import Process, free_port, require
from tests.test_config_schema import validator

pytestmark = pytest.mark.clients

VERSIONS = ("1.25", "1.37")  # the oldest that the chart is for, and the newest that is known
CRDS = {"ServiceMonitor", "PrometheusRule", "HTTPRoute"}  # with schemas of others
SECRETS = {"DB_PASSWORD": "p", "S3_SECRET": "s", "HUB_TOKEN": "t", "PEERS_SECRET": "0123456789abcdef"}

SHARED = {
    "records": "postgresql://entrepot:${DB_PASSWORD}@db.example/entrepot",
    "bucket": "s3://images/registry",
    "secret_key": "${S3_SECRET}",
    "access_key": "entrepot",
    "caches": {},
}
FLEET = {
    "mode": "Deployment",
    "replicas": 3,
    "secretEnv": {
        "DB_PASSWORD": {"secret": "database", "key": "password"},
        "S3_SECRET": {"secret": "bucket", "key": "secret"},
    },
    "config": {
        "shared": SHARED,
        "namespaces": {
            "docker.io": {"upstream": "https://registry-1.docker.io"},
            "local": {"store": {}, "listen": ":5002"},
        },
    },
    "extraPorts": [{"name": "local", "port": 5002}],
}
ALL_ON = {
    "ingress": {"enabled": True, "host": "cache.example", "className": "nginx", "tlsSecret": "cache-tls"},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["cache.example"]},
    "networkPolicy": {
        "enabled": True,
        "clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "egress": [{"ports": [{"port": 443}]}],
    },
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboards": {"enabled": True, "annotations": {"folder": "registries"}},
    "podDisruptionBudget": {"enabled": True, "maxUnavailable": "50%"},
    "imagePullSecrets": ["login"],
    "image": {"digest": f"sha256:{'0' * 64}"},
    "secretMounts": ["registry-users"],
    "extraEnv": [{"name": "SSL_CERT_DIR", "value": "/etc/ssl/certs"}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "registry", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "system-node-critical",
    "config": {
        "workers": 4,
        "limits": {"fills": 1000000},
        "access": {"htpasswd": "/etc/entrepot/secrets/registry-users/htpasswd"},
        "drain": "45s",
    },
}
TLS = {"tls": {"secretName": "entrepot-tls", "caKey": "ca.crt"}}
NODE_PORT = {"containerd": {"enabled": True}, "service": {"type": "NodePort", "nodePort": 30500}}
CASES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "fleet": FLEET,
    "nodes": {"mode": "DaemonSet"},
    "caches": {"replicas": 3},
    "deployment": {"mode": "Deployment", "storage": {"ephemeralClaim": True, "storageClass": "fast"}},
    "everything": ALL_ON,
    "everything-fleet": ALL_ON | FLEET | TLS,
    "everything-nodes": ALL_ON | {"mode": "DaemonSet", "peers": {"enabled": True}},
    "tls": TLS | NODE_PORT,
    "tls-nodes": TLS | {"mode": "DaemonSet", "containerd": {"url": "https://cache.example:5000"}},
    "node-port": NODE_PORT,
    "load-balancer": {
        "service": {
            "type": "LoadBalancer",
            "loadBalancerClass": "example/lb",
            "loadBalancerSourceRanges": ["10.0.0.0/8"],
            "externalTrafficPolicy": "Local",
        }
    },
    "k3s": {
        "mode": "DaemonSet",
        "hostNetwork": True,
        "containerd": {
            "directory": "/var/lib/rancher/k3s/agent/etc/containerd",
            "namespaces": ["docker.io", "ghcr.io"],
        },
        "storage": {"hostPath": "/var/lib/entrepot", "size": "2Ti"},
    },
    "nodes-alone": {"mode": "DaemonSet", "containerd": {"enabled": False}, "hostPort": 30500},
    "existing": {
        "replicas": 1,
        "storage": {"existingClaim": "registry"},
        "adminToken": {"existingSecret": "admin", "key": "token"},
        "peers": {"enabled": True, "existingSecret": "peers", "key": "secret"},
        "serviceAccount": {"create": False},
        "nameOverride": "cache",
        "topologySpreadConstraints": [],
        "tolerations": [],
    },
    "private": {"config": {"namespaces": {"local": {"store": {"immutable_tags": ["v*"]}}}}},
}


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    """Wheels bring them for the usual machines."""
    for name in ("helm", "kubectl"):
        if chart.tool(name) is None:
            require(name, root=False)


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[str, list[Manifest]]:
    """What the chart makes of values, and their name."""
    return request.param, render(CASES[request.param])


def named(manifests: Sequence[Manifest], kind: str, name: str = "entrepot") -> Manifest:
    [found] = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pods(manifests: Sequence[Manifest]) -> Iterator[Manifest]:
    """All pods and templates of pods."""
    for each in manifests:
        if each["kind"] == "Pod":
            yield each
        elif "template" in each.get("spec", {}):
            yield each["spec"]["template"]


def containers(manifests: Sequence[Manifest]) -> Iterator[Manifest]:
    for pod in pods(manifests):
        yield from pod["spec"]["containers"]


def configuration(manifests: Sequence[Manifest]) -> str:
    [found] = [each["data"]["entrepot.yml"] for each in manifests if "entrepot.yml" in each.get("data", {})]
    return str(found)


# What is made


def test_what_is_made_is_up_to_date() -> None:
    stale = [path for path, text in chart.written().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "python -m tests.chart writes them"


def test_helm_finds_no_fault() -> None:
    helm("lint", "--strict", CHART)


def test_the_chart_has_the_version_of_the_product() -> None:
    made = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert made["version"] == made["appVersion"] == version


def test_values_and_schema_have_the_same_keys() -> None:
    schema = json.loads(chart.SCHEMA.read_text())

    def keys(tree: Any, known: Any) -> Iterator[str]:
        for name in known.get("properties", {}).keys() | (tree or {}).keys():
            if name in ("config", "global"):
                continue
            if name not in (tree or {}) or name not in known["properties"]:
                if name not in ("initialDelaySeconds", "successThreshold"):
                    yield name
            elif "properties" in known["properties"][name]:
                yield from keys(tree[name], known["properties"][name])

    assert list(keys(yaml.safe_load(VALUES.read_text()), schema)) == []


def test_kubernetes_takes_it(case: tuple[str, list[Manifest]]) -> None:
    for each in case[1]:
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "entrepot"
        if each["kind"] not in CRDS:
            for version in VERSIONS[1:] if case[0].startswith("every") else VERSIONS:
                if version == "1.25" and "sleep" in json.dumps(each):
                    continue  # helm without a cluster takes a newer one for granted
                kubernetes_validate.validate(each, version, strict=True)
    names = [(each["kind"], each["metadata"]["name"]) for each in case[1]]
    assert len(set(names)) == len(names)


def test_old_clusters_get_no_hook_that_they_do_not_know() -> None:
    manifests = render({}, "--kube-version=1.29.0")
    assert "sleep" not in json.dumps(manifests)
    for each in manifests:
        kubernetes_validate.validate(each, "1.25", strict=True)


def test_the_server_takes_the_configuration(case: tuple[str, list[Manifest]], tmp_path: Path) -> None:
    text = configuration(case[1])
    assert list(validator().iter_errors(yaml.safe_load(text))) == []
    path = tmp_path / "entrepot.yml"
    path.write_text(text)
    environment = {**SECRETS, "ENTREPOT_ADMIN_TOKEN": "secret"}
    config = load(path, environment)
    assert str(config.disk.path) == "/var/lib/entrepot"
    assert [config.listen.port, config.admin and config.admin.port] == [5000, 5001]
    assert "admin" not in {each.path for each in advise(config)}
    given = CASES[case[0]].get("config", {})
    assert config.processes() == given.get("workers", 2)
    asked = {each["name"] for pod in containers(case[1]) for each in pod.get("env", [])}
    with_secrets = {name for name in SECRETS if f"${{{name}}}" in text}
    assert with_secrets <= asked


def test_everything_leads_somewhere(case: tuple[str, list[Manifest]]) -> None:
    """Names of config maps, secrets, accounts, volumes and ports, and what selects pods."""
    name, manifests = case
    values = json.dumps(CASES[name])
    made = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    templates = list(pods(manifests))
    for pod in templates:
        spec = pod["spec"]
        volumes = {each["name"] for each in spec.get("volumes", [])}
        for each in manifests:
            volumes |= {
                claim["metadata"]["name"]
                for claim in each.get("spec", {}).get("volumeClaimTemplates", [])
                if each["spec"]["template"] is pod
            }
        mounts = {each["name"] for part in spec["containers"] for each in part.get("volumeMounts", [])}
        assert mounts == volumes
        if "serviceAccountName" in spec and spec["serviceAccountName"] != "default":
            assert ("ServiceAccount", spec["serviceAccountName"]) in made
        for kind, text in named_in(spec):
            assert (kind, text) in made or f'"{text}"' in values, f"{kind} {text}"
    for each in manifests:
        if each["kind"] == "Service":
            chosen = [pod for pod in templates if selects(each["spec"]["selector"], pod)]
            assert len(chosen) == 1
            ports = {
                port["name"] for part in chosen[0]["spec"]["containers"] for port in part.get("ports", [])
            }
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports
        if each["kind"] in ("StatefulSet", "Deployment", "DaemonSet"):
            wanted = each["spec"]["selector"]["matchLabels"]
            assert [pod for pod in templates if selects(wanted, pod)] == [each["spec"]["template"]]


def selects(labels: Mapping[str, str], pod: Manifest) -> bool:
    return labels.items() <= pod["metadata"]["labels"].items()


def named_in(tree: Any) -> Iterator[tuple[str, str]]:
    """The config maps and secrets that a pod names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "configMap":
                yield "ConfigMap", value["name"]
            elif key == "secretKeyRef":
                yield "Secret", value["name"]
            elif key == "secret":
                yield "Secret", value["secretName"]
            else:
                yield from named_in(value)
    elif isinstance(tree, list):
        for each in tree:
            yield from named_in(each)


def test_commands_are_those_of_the_program(case: tuple[str, list[Manifest]]) -> None:
    for each in containers(case[1]):
        said = CliRunner().invoke(main, [*each["args"], "--help"])  # an option that there is not is refused
        assert said.exit_code == 0, f"{shlex.join(each['args'])}: {said.output}"


@pytest.mark.parametrize("name", ["default", "fleet", "caches", "deployment", "everything", "tls-server"])
def test_servers_pass_the_restricted_pod_security_standard(name: str) -> None:
    values = TLS if name == "tls-server" else CASES[name]
    allowed = {"configMap", "emptyDir", "secret", "persistentVolumeClaim", "ephemeral", "projected"}
    for pod in pods(render(values)):
        spec = pod["spec"]
        assert not any(spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC"))
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {key for each in spec.get("volumes", []) for key in each.keys() - {"name"}} <= allowed
        for part in spec["containers"]:
            assert part["securityContext"]["allowPrivilegeEscalation"] is False
            assert part["securityContext"]["readOnlyRootFilesystem"] is True
            assert part["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not any("hostPort" in each for each in part.get("ports", []))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mode": "Daemonset"}, "mode"),
        ({"replica": 2}, "replica"),
        ({"config": {"listen": ":80"}}, "listen"),
        ({"config": {"admin_token": "secret"}}, "admin_token"),
        ({"config": {"disk": {"path": "/data"}}}, "path"),
        ({"config": {"namespaces": {"docker.io": {"upstrem": "https://a.example"}}}}, "upstrem"),
        ({"config": {"drain": "30"}}, "drain"),
        ({"storage": {"size": "50GB"}}, "storage.size"),
        ({"image": {"digest": "sha256:1"}}, "image.digest"),
        ({"secretEnv": {"TOKEN": "secret"}}, "secretEnv.TOKEN"),
        ({"containerd": {"directory": "etc/containerd"}}, "containerd.directory"),
        ({"config": {"namespaces": {"a": {"store": {}, "listen": ":5002"}}}}, "nobody reaches port 5002"),
        ({"service": {"nodePort": 30500}}, "service.nodePort needs"),
        ({"containerd": {"enabled": True}}, "nodes cannot resolve"),
        ({"ingress": {"enabled": True}}, "ingress.host"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({"hostNetwork": True}, "hostNetwork is for"),
        ({"mode": "DaemonSet", "hostNetwork": True, "hostPort": 5050}, "leave hostPort"),
        ({"storage": {"hostPath": "/data"}}, "storage.hostPath is for"),
        ({"replicas": 2, "storage": {"existingClaim": "data"}}, "storage.existingClaim is for"),
        (
            FLEET | {"config": {"namespaces": {"local": {"store": {}}}}},
            "namespaces.local is a private registry",
        ),
        (
            {"replicas": 2, "config": {"namespaces": {"a": {"store": {}}}}},
            "namespaces.a is a private registry",
        ),
        ({"mode": "DaemonSet", "config": {"namespaces": {"a": {"store": {}}}}}, "a is a private registry"),
    ],
)
def test_mistakes_are_refused(values: Mapping[str, Any], said: str) -> None:
    assert said in refusal(values)


# Single things


def test_rules_and_dashboards_are_those_of_the_repository() -> None:
    manifests = render(ALL_ON)
    rules = named(manifests, "PrometheusRule")["spec"]["groups"]
    theirs = [
        yaml.safe_load((ROOT / f"deploy/prometheus/{each}.yml").read_text())
        for each in ("alerts", "recording")
    ]
    assert rules == [group for each in theirs for group in each["groups"]]
    found = {
        name: json.loads(text)
        for each in manifests
        if each["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in each["data"].items()
    }
    assert found == {
        f"entrepot-{path.name}": json.loads(path.read_text()) for path in ROOT.glob("deploy/grafana/*.json")
    }


def test_prometheus_finds_the_admin_listener() -> None:
    manifests = render(ALL_ON | TLS)
    monitor = named(manifests, "ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    [service] = [
        each
        for each in manifests
        if each["kind"] == "Service" and wanted <= each["metadata"]["labels"].items()
    ]
    [endpoint] = monitor["endpoints"]
    assert endpoint["port"] in {each["name"] for each in service["spec"]["ports"]}
    assert endpoint["scheme"] == "https"
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "entrepot"}]
    assert monitor["namespaceSelector"] == {"matchNames": ["registry"]}


@pytest.mark.parametrize(
    ("size", "limit"), [("50Gi", "46080MiB"), ("1Gi", "921MiB"), ("100Mi", "90MiB"), ("3Ti", "2831155MiB")]
)
def test_the_cache_leaves_room_in_its_volume(size: str, limit: str) -> None:
    disk = yaml.safe_load(configuration(render({"storage": {"size": size}})))["disk"]
    assert disk == {"path": "/var/lib/entrepot", "cache_limit": limit}


def test_a_cache_on_the_disk_of_a_node_leaves_room_for_others() -> None:
    for values in ({"mode": "DaemonSet"}, {"mode": "Deployment"}):
        assert yaml.safe_load(configuration(render(values)))["disk"]["min_free"] == "20%"
    own = {"mode": "DaemonSet", "config": {"disk": {"min_free": "5%", "cache_limit": "1GiB"}}}
    assert yaml.safe_load(configuration(render(own)))["disk"] == {
        "path": "/var/lib/entrepot",
        "cache_limit": "1GiB",
        "min_free": "5%",
    }


def test_a_change_of_the_configuration_restarts_pods_and_nothing_else_does() -> None:
    def checksum(values: Mapping[str, Any]) -> str:
        template = named(render(values), "StatefulSet")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    first = checksum({})
    assert checksum({"service": {"port": 80}}) == first
    assert checksum({"config": {"drain": "1m"}}) != first


def test_secrets_are_made_where_none_are_named() -> None:
    secret = named(render({"replicas": 2}), "Secret")["data"]
    assert secret.keys() == {"admin-token", "peers-secret"}
    values = [base64.b64decode(each) for each in secret.values()]
    assert len({*values}) == 2 and all(len(each) == 40 for each in values)
    assert not [each for each in render(CASES["existing"]) if each["kind"] == "Secret"]


def test_a_private_key_is_not_given_to_nodes_and_tests() -> None:
    manifests = render(CASES["tls"])
    pods = (("Pod", "entrepot-test-pull"), ("Pod", "entrepot-test-admin"))
    for kind, name in (("DaemonSet", "entrepot-nodes"), *pods):
        spec = named(manifests, kind, name)["spec"]
        spec = spec.get("template", {}).get("spec", spec)
        [authority] = [each["secret"] for each in spec["volumes"] if "secret" in each]
        assert authority["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


@pytest.mark.parametrize("name", ["default", "tls", "nodes"])
def test_helm_shows_the_logs_of_its_tests(name: str) -> None:
    """`helm test --logs` asks for the log of a pod, which is refused where there are two containers."""
    tests = [
        each for each in render(CASES[name]) if "helm.sh/hook" in each["metadata"].get("annotations", {})
    ]
    assert [each["metadata"]["name"] for each in tests] == ["entrepot-test-admin", "entrepot-test-pull"]
    [[admin], [pull]] = ([*containers([each])] for each in tests)
    assert admin["args"][0] == "stats" and "env" in admin
    assert pull["args"][0] == "doctor" and "env" not in pull


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("nodes", "http://$(NODE_IP):5000"),
        ("nodes-alone", None),
        ("node-port", "http://$(NODE_IP):30500"),
        ("tls", "https://$(NODE_IP):30500"),
        ("tls-nodes", "https://cache.example:5000"),
        ("default", None),
    ],
)
def test_the_address_that_nodes_are_given(name: str, url: str | None) -> None:
    found = [each for each in containers(render(CASES[name])) if each["name"] == "containerd"]
    assert [f"--url={url}" in each["args"] for each in found] == ([True] if url else [])
    for each in found:
        assert [mount["mountPath"] for mount in each["volumeMounts"] if not mount.get("readOnly")] == [
            "/host/etc/containerd/certs.d"
        ]


def test_the_notes_name_what_there_is(tmp_path: Path) -> None:
    place = shutil.copytree(CHART, tmp_path / "entrepot")
    (place / "templates" / "shown.yaml").write_text('notes: {{ include "entrepot.notes" . | quote }}\n')
    for name in ("default", "nodes", "node-port", "existing"):
        values = tmp_path / "values.yaml"
        values.write_text(json.dumps(CASES[name]))
        printed = helm("template", "entrepot", place, "-n", "registry", "--values", values)
        manifests = [each for each in yaml.load_all(printed, chart.FAST) if each]
        [notes] = [each["notes"] for each in manifests if "notes" in each]
        made = {
            f"{each['kind'].lower()}/{each['metadata']['name']}" for each in manifests if "metadata" in each
        }
        words = notes.replace("'", " ").split()
        objects = {
            word for word in words if word.partition("/")[0] in ("statefulset", "daemonset", "service")
        }
        assert {each for each in objects if "/" in each} <= made
        assert ("containerd on each node" in notes) == (name in ("nodes", "node-port"))


# Kustomize


def built(name: str) -> tuple[str, list[Manifest]]:
    """What kustomize makes of a directory: the configuration, and the rest without the hash of its name."""
    manifests = list(yaml.load_all(chart.run_tool("kubectl", "kustomize", KUSTOMIZE / name), chart.FAST))
    [config] = [each for each in manifests if each["kind"] == "ConfigMap"]
    text = json.dumps([each for each in manifests if each is not config])
    made = config["metadata"]["name"]
    assert made in text
    return config["data"]["entrepot.yml"], json.loads(text.replace(f'"{made}"', '"entrepot"'))


FLEET_OVERLAY = {"replicas": 3, "config": {"peers": {"dns": "entrepot-peers:5000"}}}


@pytest.mark.parametrize(
    ("name", "values"),
    [*chart.BASES.items(), ("overlays/fleet", FLEET_OVERLAY)],
    ids=lambda each: str(each)[:20],
)
def test_kustomize_makes_what_the_chart_makes(name: str, values: Mapping[str, Any]) -> None:
    def order(each: Manifest) -> tuple[str, str]:
        return each["kind"], each["metadata"]["name"]

    config, manifests = built(name)
    theirs, wanted = kustomized(render(values))
    for each in (*manifests, *wanted):
        for part in containers([each]):
            part.get("env", []).sort(key=lambda variable: variable["name"])
    assert sorted(manifests, key=order) == sorted(wanted, key=order)
    assert yaml.safe_load(config) == yaml.safe_load(theirs)


# The page


def on_the_page(language: str) -> list[Any]:
    """The blocks in a language that are a mapping, and what the text has of such."""
    text = chart.PAGE.read_text().partition(chart.TABLE)[0]
    blocks = re.findall(rf"(?s)```{language}\n(.*?)```", text) + re.findall(r"`(\w+: \{.*\})`", text)
    return [yaml.safe_load(each) for each in blocks]


def test_values_on_the_page_are_what_the_chart_takes() -> None:
    known = yaml.safe_load(VALUES.read_text()).keys()
    given = [each for each in on_the_page("yaml") if each.keys() <= known]
    assert len(given) > 10
    for each in given:
        whole = {"service": {"type": "NodePort", "nodePort": 30500}} | each
        assert named(render(whole), whole.get("mode", "StatefulSet"))
    configured = [each for each in on_the_page("yaml") if each.keys() == {"access"}]
    assert configured
    for each in configured:
        assert named(render({"config": each}), "ConfigMap")


def test_the_kustomization_on_the_page(tmp_path: Path) -> None:
    [found] = [each for each in on_the_page("yaml") if "resources" in each and "images" in each]
    [name] = found["resources"]
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    found["resources"] = [os.path.relpath(ROOT / name.removeprefix("../"), mirror)]
    (mirror / "kustomization.yaml").write_text(json.dumps(found))
    manifests = list(yaml.load_all(chart.run_tool("kubectl", "kustomize", mirror), chart.FAST))
    assert {each["image"] for each in containers(manifests)} == {"registry.acme.example/entrepot:0.1.0"}


# Real processes


def test_the_chart_is_pushed_to_the_server_and_pulled_from_it(
    entrepot_registry: LocalRegistry, tmp_path: Path
) -> None:
    helm("package", CHART, "--destination", tmp_path)
    [packed] = tmp_path.glob("entrepot-*.tgz")
    charts = f"oci://{entrepot_registry.address}/charts"
    version = packed.stem.removeprefix("entrepot-")
    helm("push", packed, charts, "--plain-http")
    pulled = tmp_path / "pulled"
    helm(
        "pull", f"{charts}/entrepot", "--version", version, "--plain-http", "--untar", "--destination", pulled
    )
    values = ["--namespace=registry", f"--values={tmp_path / 'values.yaml'}"]
    (tmp_path / "values.yaml").write_text(json.dumps(ALL_ON | CASES["existing"]))
    place = helm("template", "entrepot", pulled / "entrepot", *values)
    assert place == helm("template", "entrepot", CHART, *values)
    assert "entrepot:hit_ratio" in place


async def test_a_server_starts_by_it_and_answers_its_probes(tmp_path: Path) -> None:
    manifests = render({"config": {"workers": 1}})
    [server] = [each for each in containers(manifests) if each["name"] == "entrepot"]
    config = tmp_path / "entrepot.yml"
    config.write_text(configuration(manifests))
    ports = [free_port(), free_port()]
    moved = {"listen": ports[0], "admin": ports[1]}
    options = [f"--set={key}=127.0.0.1:{port}" for key, port in moved.items()]
    environment = {"ENTREPOT_CONFIG": str(config), "ENTREPOT_ADMIN_TOKEN": "secret", "PATH": "", "HOME": "/"}
    command = [sys.executable, "-m", "proxy", *server["args"], *options, f"--set=disk.path={tmp_path}/data"]
    process = await asyncio.to_thread(Process, command, environment, "listening")
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{ports[1]}") as session:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                async with session.get(server[probe]["httpGet"]["path"]) as response:
                    assert response.status == 200
            for token, status in (("secret", 200), ("wrong", 401)):
                headers = {"Authorization": f"Bearer {token}"}
                async with session.get("/api/v1/stats", headers=headers) as response:
                    assert response.status == status
    finally:
        await asyncio.to_thread(process.stop)
