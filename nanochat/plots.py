"""Plots of training logs for the report: loss, validation, throughput. Needs no display."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from nanochat.common import UserError

# Okabe and Ito's palette: distinct for every kind of colour vision
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
STAGE_TITLES = {
    "base": "Base model training",
    "mid": "Midtraining",
    "sft": "Supervised finetuning",
    "rl": "Reinforcement learning",
}


def read_log(path) -> list[dict]:
    """
    The records of a JSONL training log, one per step; where lines of a step have the same key, the last one counts.

    A last line cut short by a kill is ignored. Raises UserError for any other line that is not a record.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    steps = {}
    for number, line in enumerate(lines[:last], 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            steps.setdefault(int(record["step"]), {}).update(record)
        except (ValueError, TypeError, KeyError) as error:
            if number == last:
                break
            raise UserError(
                f"{path}, line {number}: expected a JSON object with a step, got {line[:80]!r}: remove it"
            ) from error
    return [steps[step] for step in sorted(steps)]


def series(records, key):
    """(steps, values) of the records that have a number under `key`."""
    pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def smoothed(values, span):
    """Exponential moving average over about `span` values, corrected for its bias toward the first value."""
    decay = 1 - 1 / max(1.0, span)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out[i] = total / weight
    return out


class Panel(NamedTuple):
    """How a curve is drawn. span: part of it over which a trend is averaged; 0 for its points alone."""

    title: str
    unit: str
    color: str
    span: float = 0.0


PANELS = {  # of what is logged
    "train/loss": Panel("Training loss", "nats per token", BLUE, 0.01),
    "mc/base_loss": Panel("Training loss of whole texts", "nats per token", BLUE, 0.01),
    "train/reward": Panel("Mean reward of the samples", "share", BLUE, 0.05),
    "val/bpb": Panel("Validation", "bits per byte", ORANGE),
    "val/loss": Panel("Validation loss", "nats per token", ORANGE),
    "pass@1": Panel("Problems solved, pass@1", "share", ORANGE, 0.05),
    "train/tok_per_sec": Panel("Throughput", "tokens per second", GREEN, 0.05),
}


def _draw(axes, panel, steps, values, yardsticks):
    """yardsticks: name → value, drawn as lines."""
    human, trend = EngFormatter(sep=""), smoothed(values, panel.span * len(values))
    last = human(float(f"{trend[-1]:.3g}")) if trend[-1] >= 1000 else f"{trend[-1]:.3f}"
    marker, label = ("", f"moving average, last {last}") if panel.span else ("o", f"last {last}")
    if panel.span:
        axes.plot(steps, values, color=panel.color, alpha=0.3, linewidth=0.8, label="logged")
    axes.plot(steps, trend, color=panel.color, linewidth=2, marker=marker, markersize=3.5, label=label)
    for (name, value), style in zip(yardsticks.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color=GREY, linewidth=1.4, linestyle=style, label=f"{name}: {value:.3f}")
    if panel.unit == "share":
        axes.set_ylim(-0.03, 1.03)
    elif panel.unit == "tokens per second":
        axes.set_ylim(0, 1.15 * np.percentile(values, 99))
        axes.yaxis.set_major_formatter(human)
    else:  # what comes after the first steps, which are much larger than the rest, and always the yardsticks
        shown = np.array([*values[len(values) // 50 :], *yardsticks.values()])
        low, high = min(values.min(), shown.min()), shown.max()
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.set(title=panel.title, ylabel=panel.unit, xlabel="step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.legend(loc="best")
    tidy(axes)


def plot_log(records, title, yardsticks=None) -> bytes | None:
    """
    A PNG of a training log: loss or reward, validation, tokens per second, whichever were logged.

    yardsticks: name → bits per byte, drawn as lines in the validation panel. Returns None if there is no curve.
    """
    curves = {key: series(records, key) for key in PANELS}
    if len(curves["mc/base_loss"][1]):
        del curves["train/loss"]  # with --mc it is a sum, most of which is no loss of the plain model
    curves = {key: curve for key, curve in curves.items() if len(curve[1])}
    if not curves:
        return None
    figure, panels = new_figure(title, len(curves))
    for axes, (key, curve) in zip(panels, curves.items(), strict=True):
        _draw(axes, PANELS[key], *curve, (yardsticks or {}) if key == "val/bpb" else {})
    return png(figure)


def new_figure(title, panels):
    """(figure, its axes): panels in a row under a title."""
    figure = Figure(figsize=(4.2 * panels, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def tidy(axes):
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", bbox_inches="tight")
    return buffer.getvalue()


def plot_logs(folder, yardsticks=None) -> list[tuple[str, str, str, bytes]]:
    """
    (stage, title, file name, PNG) for each log <stage>_<tag>.jsonl in a folder that has a curve.

    yardsticks: stage → (name → bits per byte). Raises UserError on a damaged log.
    """
    out = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        stage, _, tag = path.stem.partition("_")
        title = f"{STAGE_TITLES.get(stage, stage)} ({tag})"
        png = plot_log(read_log(path), title, (yardsticks or {}).get(stage))
        if png:
            out.append((stage, title, f"{path.stem}.png", png))
    return out
