"""The files of deploy/ are what they say: valid, closed by default, and true to the names that Baton uses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.config import load_config
from cluster import cli
from tests.support.system import eventually, generate, serve

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
RAY_FILES = sorted((DEPLOY / "ray").glob("*.yaml"))
DASHBOARD = DEPLOY / "monitoring/grafana/dashboards/baton.json"


def commands(file: Path) -> list[str]:
    cluster = yaml.safe_load(file.read_text())
    return [command for key, value in cluster.items() if key.endswith("_commands") for command in value]


@pytest.mark.parametrize("file", RAY_FILES, ids=lambda file: file.stem)
def test_ray_itself_accepts_the_cluster_files(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(file.read_text())))
    for command in commands(file):
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("file", RAY_FILES, ids=lambda file: file.stem)
def test_every_cluster_asks_for_a_token_and_shows_no_dashboard(file: Path) -> None:
    text = " ".join(commands(file))
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_USAGE_STATS_ENABLED=0" in text
    assert "~/.ray/auth_token" in yaml.safe_load(file.read_text())["file_mounts"]
    starts = [command for command in commands(file) if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "--disable-usage-stats" in command
        assert ("--include-dashboard=false" in command) == ("--head" in command)


def test_all_cluster_files_give_ray_the_same_settings() -> None:
    settings = [set(re.findall(r"\bRAY_\w+=\S+", " ".join(commands(file)))) for file in RAY_FILES]
    assert len(settings) == 3
    assert settings[0] == settings[1] == settings[2]
    assert "RAY_worker_niceness=0" in settings[0]


def test_nothing_listens_on_all_interfaces_by_default() -> None:
    for file in DEPLOY.rglob("*"):
        if file.is_file() and file.suffix != ".md":
            lines = [line.partition("#")[0] for line in file.read_text().splitlines()]
            assert not [line for line in lines if "0.0.0.0" in line or "::/0" in line], file


def serve_commands() -> Iterator[str]:
    for file in [*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.md"), ROOT / "README.md"]:
        text = re.sub(r"\s+\\?\n?\s*", " ", file.read_text())
        yield from re.findall(r"baton serve ((?:--?[\w-]+(?: [\w./:-]+)? ?)+)", text)


def test_the_commands_that_are_shown_can_be_typed() -> None:
    found = [flags for flags in serve_commands() if "--help" not in flags]
    assert len(found) >= 3
    for flags in found:
        arguments = cli.parser().parse_args(["serve", *flags.split()])
        load_config(settings=cli.settings_of(arguments))


def test_the_manifest_for_kubernetes_keeps_to_its_shape() -> None:
    cluster, service, policy = yaml.safe_load_all((DEPLOY / "kubernetes/raycluster.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(cluster["spec"]) == {"authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    assert set(workers) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for group in (cluster["spec"]["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert {entry["name"]: entry["value"] for entry in container["env"]}["RAY_worker_niceness"] == "0"
        for script in container["args"]:
            assert "$KUBERAY_GEN_RAY_START_CMD" in script
            subprocess.run(["bash", "-n", "-c", script], check=True)
    assert service["spec"]["selector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert policy["spec"]["podSelector"]["matchLabels"]["ray.io/cluster"] == cluster["metadata"]["name"]


def test_the_image_has_every_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    text = (DEPLOY / "docker/Dockerfile").read_text()
    assert sorted(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE)) == sorted(packages)
    ignored = (DEPLOY / "docker/Dockerfile.dockerignore").read_text()
    assert set(packages) <= set(re.findall(r"^!(\w+)$", ignored, re.MULTILINE))
    assert "USER baton" in text


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    for group in yaml.safe_load((DEPLOY / "monitoring/alerts.yml").read_text())["groups"]:
        found += [rule["expr"] for rule in group["rules"]]
    return found


def names_of(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:baton|vllm)[_:]\w+", expression))


def test_every_metric_of_the_dashboard_and_the_alerts_exists() -> None:
    with serve("--engine", "sim") as system:
        generate(system, list(range(3, 40)), 8)
        eventually(system.finished_requests, "the log line of the request")
        found = {sample.partition("{")[0] for sample in system.metrics()}
    wanted = set().union(*map(names_of, expressions()))
    assert len(wanted) > 15
    assert wanted - found == set()


def test_dashboard_panels_can_be_told_apart() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    source = yaml.safe_load((DEPLOY / "monitoring/grafana/provisioning/datasources/prometheus.yml").read_text())
    (uid,) = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel.get("targets", ())}
    assert uid == source["datasources"][0]["uid"]
    provider = yaml.safe_load((DEPLOY / "monitoring/grafana/provisioning/dashboards/baton.yml").read_text())
    assert provider["providers"][0]["type"] == "file"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_itself_accepts_its_configuration() -> None:
    for kind, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        subprocess.run(["promtool", "check", kind, name], cwd=DEPLOY / "monitoring", check=True)
