"""Grafana's dashboards: in form, started by one command, and about what the program emits."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dev.telemetry.dashboards import FOLDER, TRAINING, dashboards, prometheus_name
from megacontext.telemetry.events import EVENT_GAUGES, EVENT_HISTOGRAMS, EVENTS, METRICS
from tests.helpers import ROOT

NEWER_THAN_THE_SCHEMA = {"tableType"}  # Grafana has it since 10.4, the SDK's model of Tempo's queries does not
HISTOGRAMS = {row[0].replace(".", "_") for row in EVENT_HISTOGRAMS}
SERIES = {prometheus_name(name)[0] for name in [*METRICS, *EVENT_GAUGES]}
SERIES |= {name + suffix for name in HISTOGRAMS for suffix in ("_bucket", "_count", "_sum")}
LABELS = {"instance", "job", "le", "lod", "k", "error_type", "gen_ai_request_model", "gen_ai_token_type"}
PROMQL = {"sum", "by", "rate", "histogram_quantile", "__rate_interval", "run"}
NAMES = sorted(dashboards())


def load(name):
    return json.loads(json.dumps(dashboards()[name]))  # as Grafana reads it


def compose(name):
    return yaml.safe_load((FOLDER.parent / name).read_text("utf-8"))


def targets(dashboard):
    return [target for panel in dashboard["panels"] for target in panel.get("targets", [])]


def lost(ours, theirs, path=""):
    """Places of `ours` that are not the same in `theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key not in NEWER_THAN_THE_SCHEMA:
                yield from lost(value, theirs.get(key), f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(a, b, f"{path}[{i}]")
    elif ours != theirs:
        yield path


def through_the_schema(dashboard):
    """Read and written by Grafana's own model, which drops what it does not know."""
    plugins.register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def test_one_command_writes_the_dashboards_and_starts_grafana(tmp_path):
    def start():
        command = [sys.executable, "-m", "dev.telemetry.dashboards"]
        return subprocess.run(command, env={"PATH": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True)

    result = start()
    assert result.returncode == 1
    assert "error: docker is not installed" in result.stderr
    assert "Traceback" not in result.stderr
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\n')
    docker.chmod(0o755)
    for name in NAMES:
        (FOLDER / name).unlink()
    assert "http://localhost:3000" in start().stdout
    assert (tmp_path / "asked").read_text() == f"compose -f {FOLDER.parent / 'compose.yaml'} up --detach\n"
    for name in NAMES:
        assert json.loads((FOLDER / name).read_text("utf-8")) == load(name)
        assert subprocess.run(["git", "check-ignore", "-q", FOLDER / name], cwd=ROOT).returncode == 0
    docker.write_text("#!/bin/sh\nexit 3\n")
    assert "failed with status 3" in start().stderr


@pytest.mark.parametrize("name", NAMES)
def test_grafana_knows_every_field(name):
    assert list(lost(load(name), through_the_schema(load(name)))) == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda panel: panel["fieldConfig"]["defaults"]["custom"].update(lineWidht=2),
        lambda panel: panel["targets"][0].update(expression="1"),
        lambda panel: panel["options"]["legend"].update(kind="list"),
        lambda panel: panel.update(titel="x"),
    ],
)
def test_the_schema_finds_misspellings(break_it):
    dashboard = load("training.json")
    break_it(next(panel for panel in dashboard["panels"] if panel["type"] == "timeseries"))
    assert len(list(lost(dashboard, through_the_schema(dashboard)))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_panels_lie_beside_each_other(name):
    taken, ids = set(), set()
    for panel in load(name)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        assert panel["id"] not in ids
        taken |= cells
        ids.add(panel["id"])


@pytest.mark.parametrize("name", NAMES)
def test_queries_name_what_is_emitted(name):
    dashboard = load(name)
    queries = [variable["query"] for variable in dashboard["templating"]["list"]]
    assert re.fullmatch(r"label_values\((\w+), instance\)", queries[0])[1] in SERIES
    kinds = set()
    for target in targets(dashboard):
        kinds.add(target["datasource"]["uid"])
        if "expr" in target:
            words = set(re.findall(r"[a-zA-Z_]\w*", re.sub(r'"[^"]*"', "", target["expr"])))
            assert words & SERIES, target["expr"]
            assert words <= SERIES | LABELS | PROMQL, target["expr"]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= LABELS
        else:
            event = re.search(r'name = "(\w+)"', target["query"])[1]  # of the span, or of the operation
            attributes = {key.replace("/", ".") for key in EVENTS[event]}
            asked = re.findall(r"span\.([\w.]+)", target["query"])
            assert asked
            assert set(asked) <= attributes, target["query"]
    assert kinds == {"prometheus", "tempo"}


def test_training_shows_what_matters():
    shown = {metric for parts in TRAINING.values() for part in parts for metric in part.metrics}
    mc = {key for key in METRICS if key.startswith("mc/")}
    assert shown >= mc | {"train/loss", "val/bpb", "train/tok_per_sec", "train/mfu", "val/mc_context_gain"}


def test_provisioning_fits_together():
    """Sources have the uids that dashboards name; hosts, ports and mounted files are those of the compose file."""
    services = compose("compose.yaml")["services"]
    sources = compose("grafana/datasources.yaml")["datasources"]
    named = {target["datasource"]["uid"] for name in NAMES for target in targets(load(name))}
    assert named == {source["uid"] for source in sources}
    urls = [source["url"] for source in sources]
    urls += [exporter["endpoint"] for exporter in compose("collector.yaml")["exporters"].values()]
    ports = {"prometheus": "9090", "tempo": {"3200", "4318"}}
    for url in urls:
        host, port = re.match(r"http://(\w+):(\d+)", url).groups()
        assert host in services
        assert port in ports[host]
    tempo = compose("tempo.yaml")
    assert tempo["server"]["http_listen_port"] == 3200
    assert tempo["distributor"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(":4318")
    pipelines = compose("collector.yaml")["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics"}
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose("compose.yaml")["volumes"] or (FOLDER.parent / source).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    folder = compose("grafana/provider.yaml")["providers"][0]["options"]["path"]
    assert f"./grafana:{folder}:ro" in services["grafana"]["volumes"]
