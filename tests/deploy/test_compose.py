"""compose.yaml, as the real `docker compose config` reads it (make images)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import ROOT, compose, tool

pytestmark = pytest.mark.images
FOLDER = ROOT / "deploy/docker"
SECRETS = ("serve_token", "webhook_token", "grafana_password")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "model").mkdir()
    for name in SECRETS:
        (tmp_path / name).write_text("not to be seen\n")
    return {"IC_MODEL": str(tmp_path / "model"), "IC_SECRETS": str(tmp_path)}


def config(files: tuple[str, ...], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    named = [argument for name in files for argument in ("-f", str(FOLDER / name))]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **settings}
    command = [compose(), *named, "config", "--format", "json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def services(files: tuple[str, ...], settings: dict[str, str]) -> dict[str, Any]:
    done = config(files, settings)
    assert done.returncode == 0, done.stderr
    assert "not to be seen" not in done.stdout
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_every_service_is_locked(settings: dict[str, str]) -> None:
    found = services(("compose.yaml",), settings)
    assert set(found) == {"server", "prometheus", "alertmanager", "grafana"}
    for name, service in found.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory", "pids"}
        assert [port["host_ip"] for port in service["ports"]] == ["127.0.0.1"]
        assert not re.search(r"(?i)(token|password)=", json.dumps(service.get("environment", {})))
        for volume in service["volumes"]:
            if volume["type"] == "bind":
                assert volume["read_only"] is True
                assert not volume["bind"].get("create_host_path")
        if name != "server":  # whose user and check of health are the image's
            assert re.fullmatch(r"docker\.io/\S+:v?[\d.]+@sha256:[0-9a-f]{64}", service["image"])
            assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
            assert service["healthcheck"]["test"][0] == "CMD"


def test_the_gpu_is_the_servers_and_can_be_left_out(settings: dict[str, str]) -> None:
    server = services(("compose.yaml",), settings)["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", -1, ["gpu"])
    assert server["build"]["args"] == {"DEVICE": "gpu"}
    server = services(("compose.yaml", "compose.cpu.yaml"), settings)["server"]
    assert "reservations" not in server["deploy"]["resources"]
    assert server["deploy"]["resources"]["limits"]["pids"] == 4096
    assert server["build"]["args"] == {"DEVICE": "cpu"}


def test_without_a_model_it_says_what_to_set(settings: dict[str, str]) -> None:
    del settings["IC_MODEL"]
    done = config(("compose.yaml",), settings)
    assert done.returncode != 0
    assert "set IC_MODEL to the folder of the model" in done.stderr


def test_what_is_mounted_is_there(settings: dict[str, str]) -> None:
    """Rules, dashboards and the settings of the others, where their containers look for them."""
    mounted = {
        volume["target"]: Path(volume["source"])
        for service in services(("compose.yaml",), settings).values()
        for volume in service["volumes"]
        if volume["type"] == "bind" and volume["target"] != "/model"
    }
    missing = [str(source) for source in mounted.values() if not source.exists()]
    assert missing == []
    rules = mounted["/etc/prometheus/rules"]
    scraped = yaml.safe_load(mounted["/etc/prometheus/prometheus.yml"].read_text())
    (pattern,) = scraped["rule_files"]
    assert list(rules.glob(Path(pattern).name))
    provisioning = mounted["/etc/grafana/provisioning"]
    (provider,) = (provisioning / "dashboards").glob("*.yml")
    path = yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"]
    assert list(mounted[path].glob("*.json"))


def test_prometheus_takes_its_settings(tmp_path: Path) -> None:
    """promtool reads them with our rules; the jobs have the names that the rules know."""
    promtool = tool("promtool")
    text = (FOLDER / "prometheus.yml").read_text()
    shutil.copytree(ROOT / "deploy/monitoring/rules", tmp_path / "rules")
    (tmp_path / "token").write_text("x")
    text = text.replace("/etc/prometheus/rules", str(tmp_path / "rules"))
    text = text.replace("/run/secrets/serve_token", str(tmp_path / "token"))
    (tmp_path / "prometheus.yml").write_text(text)
    done = subprocess.run(
        [promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout
    here = {job["job_name"] for job in yaml.safe_load(text)["scrape_configs"]}
    theirs = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yml").read_text())
    assert here <= {job["job_name"] for job in theirs["scrape_configs"]}
