"""
The report of a run: each stage writes a section; at the end they are joined into one document with plots.

    python -m nanochat.report reset       delete the sections of the last run and describe this machine
    python -m nanochat.report generate    write report.md to the report folder and to the working directory
    python -m nanochat.report live        show the training logs in the browser, also during training

$NANOCHAT_BASE_DIR/report has <section>.md, and <section>.json with the same figures for the final table. Plots are
drawn from the training logs, $NANOCHAT_BASE_DIR/logs/<stage>_<tag>.jsonl.
"""

import gzip
import json
import lzma
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.common import UserError, atomic_write, get_base_dir, get_dist_info
from nanochat.configurator import run
from nanochat.ranges import Range
from nanochat.report_header import header_info

STAGES = [  # sections in the order of the pipeline; all others follow in alphabetical order
    "tokenizer-training",
    "tokenizer-evaluation",
    "base-model-training",
    "base-model-loss",
    "base-model-evaluation",
    "base-model-evaluation-with-megacontext",
    "megacontext-training",
    "megacontext-evaluation-base",
    "midtraining",
    "chat-evaluation-mid",
    "chat-sft",
    "chat-evaluation-sft",
    "chat-rl",
    "chat-evaluation-rl",
    "megacontext-evaluation-mid",
    "megacontext-evaluation-sft",
    "megacontext-evaluation-rl",
]
PLOTTED_IN = {"base": "base-model-training", "mid": "midtraining", "sft": "chat-sft", "rl": "chat-rl"}
COLUMNS = {  # of the final table: title → section with the figures
    "BASE": "base-model-evaluation",
    "MID": "chat-evaluation-mid",
    "SFT": "chat-evaluation-sft",
    "RL": "chat-evaluation-rl",
}
# Rows of the final table, and keys among the figures; those of the second line only if a model was evaluated on them
ROWS = ["CORE", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU"]
IF_THERE = ["Arithmetic", "SpellingBee", "Recall", "Recall without --mc"]
# report.md is written to two folders; each has its plots in a subfolder of this name
PLOT_FOLDER = "report"


def slugify(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def format_value(value) -> str:
    """A figure in readable form: 1,234 and 0.1235, but 0.004, 3.917e+19 and 1e-10."""
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if 1e-2 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value).replace("\n", "\\n")


def format_duration(seconds: float) -> str:
    """Like 3h51m, or 12m05s below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def format_facts(facts: dict) -> str:
    return "".join(f"- {key}: {format_value(value)}\n" for key, value in facts.items())


def compression_yardstick(text: bytes) -> dict[str, float]:
    """
    Bits per byte of general-purpose compressors on `text` as one stream: a baseline for language models.

    Raises ValueError on empty text.
    """
    if not text:
        raise ValueError("expected some text to compress, got none")
    return {
        "gzip -9 (bpb)": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9 (bpb)": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def _json_default(value):
    return value.item() if hasattr(value, "item") else str(value)


class Report:
    """The sections of the current run, stored as files in the base folder."""

    def __init__(self):
        self.folder = get_base_dir() / "report"

    def log(self, section: str, data: list, plots: dict | None = None) -> Path | None:
        """
        Write a section, replacing an older one of that name; returns the path of its Markdown file, or None with a
        warning where it cannot be written: what the section reports on is done, and must not fail for that. Only the
        first process writes.

        data: dicts become lists of figures and are saved in the JSON file too; strings are Markdown; None is skipped.
        plots: title → PNG, shown at the end of the section.
        """
        if get_dist_info()[1] != 0:
            return None
        figures, parts = {}, []
        for item in data:
            if isinstance(item, dict):
                figures.update(item)
                parts.append(format_facts(item))
            elif item is not None:
                parts.append(f"{str(item).rstrip()}\n")
        try:
            for title, png in (plots or {}).items():
                name = f"{slugify(section)}-{slugify(title)}.png"
                with atomic_write(self.folder / PLOT_FOLDER / name) as file:
                    file.write(png)
                parts.append(_image(title, name, png))
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            text = "\n".join([f"## {section}\n", f"timestamp: {stamp}\n", *parts])
            return self._write(slugify(section), section, text, figures)
        except OSError as error:
            print(f"the report has no section {section!r}: {error.filename}: {error.strerror}")

    def reset(self) -> Path:
        """Delete all sections and plots and write the header; the total wall clock time counts from here."""
        for pattern in ("*.md", "*.json", f"{PLOT_FOLDER}/*.png"):
            for path in self.folder.glob(pattern):
                if path.is_file():
                    path.unlink()
        parts = header_info()
        text = "# Report card\n\n" + "\n".join(
            f"### {title}\n\n{format_facts(facts)}" for title, facts in parts.items()
        )
        return self._write("header", "Header", text, parts)

    def _write(self, slug, section, text, figures):
        record = {"section": section, "time": time.time(), "data": figures}
        with atomic_write(self.folder / f"{slug}.json", "w") as file:
            json.dump(record, file, indent=2, ensure_ascii=False, default=_json_default)
        path = self.folder / f"{slug}.md"
        with atomic_write(path, "w") as file:
            file.write(text)
        return path

    def figures(self, slug: str) -> dict | None:
        """{"section", "time" (seconds since the epoch), "data"} of a section; None if there is no such file of ours."""
        path = self.folder / f"{slug}.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            if slug not in STAGES:
                return None
            raise UserError(f"{path} is not valid JSON ({error}): run that stage's script again") from error
        return record if isinstance(record, dict) and record.keys() >= {"section", "time", "data"} else None

    def slugs(self) -> list[str]:
        """Names of the existing sections, in the order of the report."""
        found = {path.stem for path in self.folder.glob("*.md") if path.is_file()} - {"header", "report"}
        return [slug for slug in STAGES if slug in found] + sorted(found - set(STAGES))

    def generate(self, copy_to=None) -> Path:
        """
        Write report.md from the sections, plots, final table and wall clock time; returns its path.

        A copy with its plots goes to the folder copy_to (default: the working directory).
        Raises UserError when no stage has logged anything, or a training log is damaged.
        """
        slugs = self.slugs()
        if not slugs:
            raise UserError(f"there are no sections in {self.folder}: run a stage of the pipeline first")
        plots = self._plots()
        text = [self._section("header")] if (self.folder / "header.md").is_file() else ["# Report card\n"]
        for slug in slugs:
            text.append(self._section(slug))
            text += [_image(*plot) for stage, *plot in plots if PLOTTED_IN.get(stage) == slug]
        rest = [_image(*plot) for stage, *plot in plots if PLOTTED_IN.get(stage) not in slugs]
        if rest:
            text += ["## Other training logs\n", *rest]
        text += ["## Summary\n", self._summary(slugs)]
        text = "\n".join(text)
        pngs = {path.name: path.read_bytes() for path in (self.folder / PLOT_FOLDER).glob("*.png")}
        pngs |= {name: png for _, _, name, png in plots}

        for folder in (self.folder, Path(copy_to or Path.cwd())):
            with atomic_write(folder / "report.md", "w") as file:
                file.write(text)
            for name, png in pngs.items():
                with atomic_write(folder / PLOT_FOLDER / name) as file:
                    file.write(png)
        return self.folder / "report.md"

    def _section(self, slug):
        return (self.folder / f"{slug}.md").read_text(encoding="utf-8", errors="replace")

    def _plots(self):
        """(stage, title, file name, PNG bytes) of each training log that has a curve."""
        from nanochat.plots import plot_logs  # imported here, so that training scripts do not load matplotlib

        loss = self.figures("base-model-loss") or {"data": {}}
        yardsticks = {
            key.removesuffix(" (bpb)"): loss["data"][key]
            for key in ("gzip -9 (bpb)", "xz -9 (bpb)")
            if key in loss["data"]
        }
        return plot_logs(get_base_dir() / "logs", {"base": yardsticks})

    def _summary(self, slugs):
        header = self.figures("header")
        lines = [format_facts(header["data"].get("Size of the project", {}))] if header else []
        lines.append(self._table())
        if header:
            ends = (record["time"] for slug in slugs if (record := self.figures(slug)))
            end = max(ends, default=header["time"])
            lines.append(f"Total wall clock time: {format_duration(end - header['time'])}\n")
        else:
            lines.append("Total wall clock time: unknown (no `python -m nanochat.report reset` at the start)\n")
        return "\n".join(lines)

    def _table(self):
        records = {column: (self.figures(slug) or {"data": {}})["data"] for column, slug in COLUMNS.items()}
        rows = [["Metric", *COLUMNS]]
        for title in [*ROWS, *IF_THERE, "ChatCORE"]:
            values = [records[column].get("CORE metric" if title == "CORE" else title) for column in COLUMNS]
            if title in IF_THERE and all(value is None for value in values):
                continue
            rows.append([title, *("-" if value is None else f"{value:.4f}" for value in values)])
        wide = max(15, *(len(row[0]) for row in rows))
        lines = [f"| {row[0]:<{wide}} | " + " | ".join(f"{cell:<8}" for cell in row[1:]) + " |\n" for row in rows]
        lines.insert(1, f"|{'-' * (wide + 2)}|" + f"{'-' * 10}|" * len(COLUMNS) + "\n")
        return "".join(lines)


def _image(title, name, png):
    return f"![{title}]({PLOT_FOLDER}/{name})\n"


def get_report() -> Report:
    """The report of the current run."""
    return Report()


def fenced(text) -> str:
    """A text as it is, in Markdown."""
    return f"```text\n{text.replace('```', '` ` `')}\n```"


@dataclass
class Config:
    command: tyro.conf.Positional[Literal["reset", "generate", "live"]] = "generate"
    """reset: start a new report; generate: write report.md; live: show the training logs in the browser"""
    port: Annotated[int, Range(0, 65535)] = 8080
    """live: port to listen on; 0 for any free one"""
    host: str = "127.0.0.1"
    """live: address to listen on; 0.0.0.0 accepts connections from other machines"""


def main(config):
    from nanochat import live  # imported here, so that training scripts do not load matplotlib

    report = Report()
    if config.command == "reset":
        print(f"started a new report: {report.reset()}")
    elif config.command == "live":
        live.show(config.host, config.port)
    else:
        path = report.generate()
        print(f"report written to {path} and, with its plots, to {Path.cwd() / 'report.md'}")


if __name__ == "__main__":
    run(main, Config)
