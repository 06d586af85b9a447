"""
Generate the tables of the vault that describe the code, so that the two cannot differ:

    python -m dev.docs      # writes them into the pages of obsidian/

Everything between <!-- dev.docs: NAME --> and <!-- /dev.docs --> in a page is replaced; NAME is a key of TABLES.
tests/test_docs.py checks that the pages are up to date.
"""

import ast
import inspect
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

from megacontext.config import MCConfig
from megacontext.inference import MCInference
from megacontext.telemetry.events import EVENT_GAUGES, EVENT_HISTOGRAMS, EVENTS, METRICS, metric_of
from nanochat.common import atomic_write
from nanochat.ranges import Range, rules

VAULT = Path(__file__).resolve().parent.parent / "obsidian"
BLOCK = re.compile(r"(<!-- dev\.docs: (\w+) -->\n).*?(<!-- /dev\.docs -->)", re.DOTALL)


def option_helps(cls) -> dict[str, tuple[str, str]]:
    """Field → (comment above its group, help string), read from the source of a dataclass."""
    source = inspect.getsource(cls)
    body = ast.parse(source).body[0].body
    helps = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            comments = re.findall(r"^    # (.+)$", "\n".join(source.splitlines()[: field.lineno]), re.MULTILINE)
            helps[field.target.id] = comments[-1] if comments else "", " ".join(text.value.value.split())
    return helps


def table(heads, rows) -> str:
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def flags() -> str:
    """Tables of MCConfig's fields, one per group."""
    again = {field.name for field in fields(MCInference)}
    helps, groups, allowed = option_helps(MCConfig), {}, rules(MCConfig)
    for field in fields(MCConfig):
        group, text = helps[field.name]
        values = (0, 1) if field.type is bool else allowed[field.name]
        values = str(values) if isinstance(values, Range) else ", ".join(f"`{v}`" for v in values)
        default = int(field.default) if field.type is bool else field.default
        row = [f"`--{field.name}`", f"`{default}`", values, text, "yes" if field.name in again else ""]
        groups.setdefault(group, []).append(row)
    heads = ["Flag", "Default", "Values", "Meaning", "In inference"]
    return "\n".join(f"**{group}**\n\n{table(heads, rows)}" for group, rows in groups.items())


def spans() -> str:
    """Tables of the attributes of each event."""
    parts, known = [], {}
    for event, attributes in EVENTS.items():
        known |= {name: text for name, text in attributes.items() if text != "as above"}
        rows = [[f"`{name.replace('/', '.')}`", known[name]] for name in attributes]
        parts.append(f"### `{event}`\n\n{table(['Attribute', 'What it is'], rows)}")
    return "\n".join(parts)


def metrics() -> str:
    """Table of the logged values with their names as metrics."""
    rows = []
    for key, text in METRICS.items():
        name, labels = metric_of(key.replace("{lod}", "0"))
        rows.append([f"`{key}`", f"`{name}`{' by `lod`' if labels else ''}", text])
    return table(["In the log and in W&B", "As a metric", "What it is"], rows)


def event_metrics() -> str:
    """Table of the metrics that are derived from events."""
    rows = []
    for name, (event, attribute, text) in EVENT_GAUGES.items():
        by = " by `lod`" if "{lod}" in attribute else ""
        rows.append([f"`{name}`{by}", "gauge", f"`{event}`, `{attribute}`", text])
    for name, event, attribute, labels, text in EVENT_HISTOGRAMS:
        which = "".join(f", `{label}` = {value}" for label, value in labels.items())
        source = "its duration" if attribute == "seconds" else f"`{attribute}`"
        rows.append([f"`{name}`{which}", "histogram", f"`{event}`, {source}", text])
    return table(["Metric", "Kind", "From", "What it is"], rows)


TABLES = {"flags": flags, "spans": spans, "metrics": metrics, "event_metrics": event_metrics}


def render(text) -> str:
    """The text of a page with its tables generated anew."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", text)


if __name__ == "__main__":
    for path in sorted(VAULT.rglob("*.md")):
        before = path.read_text("utf-8")
        if (after := render(before)) != before:
            with atomic_write(path, "w") as file:
                file.write(after)
            print(f"wrote {path}")
