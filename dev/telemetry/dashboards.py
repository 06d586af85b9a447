"""
What Grafana's dashboards show.

    python -m dev.telemetry.dashboards      # write Grafana's dashboards and start compose.yaml: http://localhost:3000

A metric of the log has the name it has there ("mc/lod_count/{lod}"), a metric of an event the name under which it is
exported ("mc.swap_rate"); both come from the tables in megacontext/telemetry/events.py. tests/test_dashboards.py checks
that Grafana's schema accepts the dashboards and that each query names what the program emits.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megacontext.telemetry.events import EVENT_GAUGES, metric_of
from nanochat.common import UserError, atomic_write, fail

FOLDER = Path(__file__).parent / "grafana"
PROMETHEUS = {"type": "prometheus", "uid": "prometheus"}
TEMPO = {"type": "tempo", "uid": "tempo"}
COLUMNS, WIDE, HEIGHT = 24, 8, 8  # in units of Grafana's grid


@dataclass(frozen=True)
class Panel:
    """
    Curves over time, of metrics or, in PromQL, of expressions ((expression, name), …); or a table of the spans of a
    query in TraceQL. unit: its name in Grafana. stacked: show shares of their sum.
    """

    title: str
    metrics: tuple = ()
    unit: str = "short"
    stacked: bool = False
    expressions: tuple = ()
    query: str = ""


TRAINING = {
    "Training": [
        Panel("Loss", ("train/loss",)),
        Panel("Validation, bits per byte", ("val/bpb",)),
        Panel("Tokens per second", ("train/tok_per_sec",)),
        Panel("MFU", ("train/mfu",), "percentunit"),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel("Learning rate", ("train/lrm",), "percentunit"),
        Panel("Seconds per step", ("train/dt",), "s"),
        Panel("Tokens trained on", ("total_training_tokens",)),
        Panel("FLOPs of training", ("total_training_flops",)),
    ],
    "MegaContext: losses": [
        Panel("Loss with working contexts and with all tokens", ("mc/token_loss", "mc/base_loss")),
        Panel("By level of what stands before", ("mc/lod_loss/{lod}",)),
        Panel("Context gain", ("val/mc_context_gain",), "percentunit"),
        Panel("Bits per byte by context", ("val/mc_bpb", "val/mc_full_bpb", "val/mc_truncated_bpb")),
        Panel("LensNet", ("mc/lens_loss",)),
    ],
    "MegaContext: contexts and cost": [
        Panel("LOD mix", ("mc/lod_count/{lod}",), stacked=True),
        Panel("Tokens in a tree, entries of a working context", ("mc/tree_tokens", "mc/wc_entries")),
        Panel("Working contexts per micro-batch", ("mc/variants_total",)),
        Panel("Forward pass of a micro-batch", ("mc/time_controller_ms",), "ms"),
        Panel("Slowest micro-batches", query='{ name = "mc_timing" } | select(span.step, span.milliseconds)'),
    ],
}


def _rate(metric, by, where=""):
    return f'sum by ({by}) (rate({metric}{{instance=~"$run"{where}}}[$__rate_interval]))'


def _rates(title, metric, by, unit="short", where=""):
    """A panel of a counter's rates, one for each value of a label."""
    return Panel(title, (), unit, expressions=((_rate(metric, by, where), f"{{{{{by}}}}}"),))


def _quantiles(title, metric):
    rate = _rate(f"{metric}_bucket", "le")
    quantiles = ((f"histogram_quantile({q}, {rate})", f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99))
    return Panel(title, (), "s", expressions=tuple(quantiles))


CHAT = {
    "Requests": [
        _rates("Requests per second", "gen_ai_server_request_duration_count", "gen_ai_request_model", "reqps"),
        _quantiles("Time of a request", "gen_ai_server_request_duration"),
        _quantiles("Time to the first text", "gen_ai_server_time_to_first_token"),
        _rates("Tokens per second", "gen_ai_client_token_usage_sum", "gen_ai_token_type"),
        _rates(
            *("Failures per second", "gen_ai_server_request_duration_count", "error_type", "reqps"),
            where=', error_type!=""',
        ),
        Panel(
            "Requests",
            query='{ span.gen_ai.operation.name = "chat" } | select(span.gen_ai.request.model, '
            "span.gen_ai.usage.input_tokens, span.gen_ai.usage.output_tokens, "
            "span.gen_ai.response.time_to_first_chunk, span.gen_ai.response.finish_reasons, "
            "span.gen_ai.conversation.compacted)",
        ),
    ],
    "MegaContext": [
        Panel("Entries of the working context", ("mc.wc_entries",)),
        Panel("LOD mix", ("mc.wc_lod_count",), stacked=True),
        Panel("Tokens in the tree", ("mc.tree_tokens",)),
        Panel("Memory of the tree", ("mc.tree_bytes",), "bytes"),
        Panel("Swap rate", ("mc.swap_rate",), "percentunit"),
        Panel("Residency, refocuses", ("mc.residency",)),
        Panel("Time of an update", ("mc.inference_ms",), "ms"),
        Panel(
            "Refocuses",
            query='{ name = "focus_allocator" } | select(span.expansions, span.collapses, span.swap_rate, '
            "span.score_min, span.score_mean, span.score_max)",
        ),
    ],
}


def prometheus_name(metric: str) -> tuple[str, bool]:
    """("mc_lod_count", True) for "mc/lod_count/{lod}": (name in Prometheus, whether there is one per level)."""
    name, labels = metric_of(metric.replace("{lod}", "0"))
    by_level = "{lod}" in EVENT_GAUGES.get(metric, ("", "", ""))[1]
    return name.replace(".", "_"), bool(labels) or by_level


def _targets(panel):
    if panel.query:
        options = {"queryType": "traceql", "query": panel.query, "tableType": "spans", "limit": 50}
        return [{"refId": "A", "datasource": TEMPO, **options}]
    pairs = list(panel.expressions)
    for metric in panel.metrics:
        name, by_level = prometheus_name(metric)
        legend = "{{instance}}" + (" LOD {{lod}}" if by_level else "") + (f" {name}" if len(panel.metrics) > 1 else "")
        pairs.append((f'{name}{{instance=~"$run"}}', legend))
    return [
        {"refId": chr(ord("A") + i), "datasource": PROMETHEUS, "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(pairs)
    ]


def _panel(panel, number, x, y):
    head = {"id": number, "title": panel.title, "gridPos": {"h": HEIGHT, "w": WIDE, "x": x, "y": y}}
    if panel.query:
        return {**head, "type": "table", "datasource": TEMPO, "targets": _targets(panel)}
    custom = {"lineWidth": 2, "fillOpacity": 70 if panel.stacked else 0, "showPoints": "auto", "spanNulls": True}
    custom["stacking"] = {"mode": "percent" if panel.stacked else "none", "group": "A"}
    return {
        **head,
        "type": "timeseries",
        "datasource": PROMETHEUS,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": _targets(panel),
    }


def dashboard(uid, title, sections, runs_of) -> dict:
    """A Grafana dashboard. runs_of: the metric whose instances are offered as runs."""
    panels, y, number = [], 0, 1
    for section, parts in sections.items():
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        panels.append(
            {"id": number, "type": "row", "title": section, "collapsed": False, "gridPos": place, "panels": []}
        )
        y, number = y + 1, number + 1
        for i, part in enumerate(parts):
            x, row = i % (COLUMNS // WIDE) * WIDE, i // (COLUMNS // WIDE)
            panels.append(_panel(part, number, x, y + row * HEIGHT))
            number += 1
        y += -(-len(parts) // (COLUMNS // WIDE)) * HEIGHT
    run = {
        **{"type": "query", "name": "run", "label": "Run", "datasource": PROMETHEUS, "refresh": 2, "sort": 1},
        **{"query": f"label_values({runs_of}, instance)", "multi": True, "includeAll": True, "hide": 0},
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        **{"uid": uid, "title": title, "tags": ["megacontext"], "timezone": "browser", "schemaVersion": 41},
        **{"editable": True, "refresh": "5s", "time": {"from": "now-1h", "to": "now"}, "graphTooltip": 1},
        "templating": {"list": [run]},
        "panels": panels,
    }


def dashboards() -> dict[str, dict]:
    """File name → dashboard."""
    return {
        "training.json": dashboard("megacontext-training", "MegaContext: training", TRAINING, "step"),
        "chat.json": dashboard("megacontext-chat", "MegaContext: chat", CHAT, "gen_ai_server_request_duration_count"),
    }


def main():
    """Write the dashboards to the folder that Grafana's container mounts, and start the containers."""
    for file_name, content in dashboards().items():
        with atomic_write(FOLDER / file_name, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
    if shutil.which("docker") is None:
        raise UserError(
            f"docker is not installed; the dashboards are in {FOLDER}: import them into a Grafana of your own"
        )
    command = ["docker", "compose", "-f", str(FOLDER.parent / "compose.yaml"), "up", "--detach"]
    if status := subprocess.run(command).returncode:
        raise UserError(f"{' '.join(command)} failed with status {status}, see its message above")
    print("Grafana: http://localhost:3000. Runs report to it with MC_OTEL_ENDPOINT=http://localhost:4318")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(error)
