"""The vault obsidian/: links lead somewhere, names are those of the code, tables are up to date."""

import importlib
import re
import typing
from dataclasses import fields, is_dataclass
from urllib.parse import unquote

import pytest
import yaml

from dev.docs import BLOCK, TABLES, VAULT, option_helps, render
from dev.telemetry.dashboards import prometheus_name
from megacontext.config import MCConfig
from megacontext.inference import MCInference
from megacontext.telemetry.events import EVENT_GAUGES, EVENT_HISTOGRAMS, EVENTS, METRICS
from tests.helpers import ROOT

TEXTS = {path: path.read_text("utf-8") for path in sorted(VAULT.rglob("*.md"))}
OPERATIONS = TEXTS[VAULT / "ops" / "Training & Operations.md"]
TELEMETRY = TEXTS[VAULT / "ops" / "Telemetry.md"]
FOLDERS = ("nanochat", "megacontext", "scripts", "tasks", "tests", "dev", "rustbpe", "obsidian")
REPOSITORY = re.compile("https://github.com/brandf/MegaContext/(?:blob|tree)/main/")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
all_pages = pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.stem)


def anchors(text):
    """Of the headings of a page, as Python-Markdown makes them."""
    lines = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
    heads = [line.lstrip("#").replace("`", "").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head)) for head in heads}


def targets(text, page):
    """[(link, path, anchor)] of the links into the vault and the repository, which are plain Markdown."""
    found = []
    for match in LINK.finditer("".join(CODE.split(text)[::2])):
        address, _, anchor = unquote(match[1]).partition("#")
        if REPOSITORY.match(address):
            found.append((match[0], ROOT / REPOSITORY.sub("", address), anchor))
        elif not re.match(r"[a-z]+:", address):
            found.append((match[0], (page.parent / address).resolve() if address else page, anchor))
    return found


def problems(text, page):
    """Links of a page that lead nowhere, or that only one of Obsidian and the site could follow."""
    found = ["a wikilink" for _ in re.finditer(r"\[\[", "".join(CODE.split(text)[::2]))]
    for link, path, anchor in targets(text, page):
        if not path.exists() or (anchor and anchor not in anchors(path.read_text("utf-8"))):
            found.append(f"{link}: there is no {path} {anchor}")
        elif not path.is_relative_to(VAULT) and not REPOSITORY.search(link):
            found.append(f"{link}: not in the vault, and so not on the site")
    return found


@all_pages
def test_links_lead_somewhere(page):
    assert problems(TEXTS[page], page) == []


def test_a_dead_link_is_found():
    page, address = VAULT / "components" / "Tree.md", "https://github.com/brandf/MegaContext/blob/main"
    dead = f"[[Tree]] [x](../nowhere.md) [x]({address}/nowhere.py) [x](../TODO.md#none) [x](../../README.md) [x](#none)"
    assert len(problems(dead, page)) == 6
    good = (
        f"`[[Tree]]`\n```\n[x](no.md)\n```\n[x](../ops/Telemetry.md#spans) [x]({address}/dev) [y](https://example.org)"
    )
    assert problems(good, page) == []


def test_every_page_is_on_the_site_and_can_be_reached():
    named = {match for match in re.findall(r"^ +- (?:[\w ]+: )?(.+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)}
    assert named == {path.relative_to(VAULT).as_posix() for path in TEXTS}
    reached, new = set(), {VAULT / "index.md"}
    while new:
        reached |= new
        new = {path for page in new for _, path, _ in targets(TEXTS[page], page)} & set(TEXTS) - reached
    assert reached == set(TEXTS)


@all_pages
def test_tables_are_up_to_date(page):
    assert render(TEXTS[page]) == TEXTS[page], "run python -m dev.docs"


def test_tables_are_somewhere():
    assert {name for text in TEXTS.values() for _, name, _ in BLOCK.findall(text)} == set(TABLES)


# Flags, spans, metrics: read from the pages by other means than they are written


def test_flags_documented_are_flags_existing():
    rows = {row[1]: row[2] for row in re.finditer(r"^\| `--(\w+)` \| `([^`]*)` \|", OPERATIONS, re.M)}
    assert rows == {
        field.name: str(int(field.default) if isinstance(field.default, bool) else field.default)
        for field in fields(MCConfig)
    }
    assert set(option_helps(MCConfig)) == set(rows)
    again = set(re.findall(r"^\| `--(\w+)` .*\| yes \|$", OPERATIONS, re.M))
    assert again == {field.name for field in fields(MCInference)}


def section(text, heading):
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_spans_documented_are_spans_emitted():
    parts = re.split(r"^### `(\w+)`$", section(TELEMETRY, "Spans"), flags=re.M)[1:]
    documented = {
        name: set(re.findall(r"^\| `([^`]+)`", body, re.M)) for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
    assert documented == {name: {key.replace("/", ".") for key in attributes} for name, attributes in EVENTS.items()}
    assert "as above" not in TELEMETRY


def test_metrics_documented_are_metrics_emitted():
    assert set(re.findall(r"^\| `([^`]+)`", section(TELEMETRY, "Metrics of the log"), re.M)) == set(METRICS)
    of_events = set(re.findall(r"^\| `([^`]+)`", section(TELEMETRY, "Metrics of events"), re.M))
    assert of_events == {*EVENT_GAUGES, *(name for name, *_ in EVENT_HISTOGRAMS)}


def test_alerts_name_what_is_emitted():
    names = {prometheus_name(metric)[0] for metric in [*METRICS, *EVENT_GAUGES]}
    histograms = {name.replace(".", "_") for name, *_ in EVENT_HISTOGRAMS}
    names |= {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}
    table = section(OPERATIONS, "Targets and alerts")
    used = set(re.findall(r"\b(?:mc|train|val|gen_ai)_\w+", " ".join(re.findall(r"`([^`]+)` *[^`|]*\|$", table, re.M))))
    assert len(used) > 8
    assert used <= names


@all_pages
def test_log_keys_exist(page):
    keys = re.findall(r"`((?:mc|val|train)/[\w/]+)`", TEXTS[page])
    assert {re.sub(r"/\d+$", "/{lod}", key) for key in keys} <= set(METRICS)


# Files and commands


@all_pages
def test_files_named_exist(page):
    text = TEXTS[page]
    for name in re.findall(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]*\w", " ".join(CODE.findall(text))):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([\w/]+\.(?:py|sh|yml|toml))`", text):
        assert (ROOT / name).exists(), name


def options_of(config) -> set[str]:
    """Names of the options of a dataclass, and of the groups in it."""
    names = set()
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else [hint]
        renamed = [mark.name for mark in marks if getattr(mark, "name", None)]
        names |= options_of(kind) if is_dataclass(kind) else {*(renamed or [name])}
    return names


COMMAND = re.compile(r"python -m ((?:scripts|nanochat|dev)[\w.]*)([^\n`#|]*)")


@all_pages
@pytest.mark.filterwarnings("ignore")  # W&B's package, of one of the commands, is written for an older pydantic
def test_commands_exist(page):
    for module, rest in COMMAND.findall(" ".join(CODE.findall(TEXTS[page]))):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        options = {name.replace("-", "_") for name in re.findall(r"(?<=\s)--([a-z][\w-]*)", rest)}
        if options:
            assert options <= options_of(importlib.import_module(module).Config), f"{module} {rest}"


def test_the_example_prints_what_the_page_says(capsys):
    code, printed = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", TEXTS[VAULT / "index.md"], re.DOTALL
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_diagrams_are_ours_and_fetch_nothing():
    for path in VAULT.glob("images/*.svg"):
        text = path.read_text("utf-8")
        assert "<title>" in text
        assert set(re.findall(r"https?://[^\"]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_site_is_built_by_the_command_that_is_named():
    command = "uv run --only-group docs mkdocs build --strict"
    steps = yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text("utf-8"))["jobs"]["build"]["steps"]
    assert command in [step.get("run") for step in steps]
    assert command in (ROOT / "mkdocs.yml").read_text("utf-8")
    assert any(line == "/site/" for line in (ROOT / ".gitignore").read_text("utf-8").splitlines())
