"""Plots of training logs for the report: loss, validation, throughput. Needs no display."""

import io
import json
from pathlib import Path

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


def _focus(axes, values):
    """Limit the y axis to the values after the first steps, which are much larger than the rest."""
    low, high = values.min(), values[len(values) // 50 :].max()
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _loss(axes, steps, values):
    trend = smoothed(values, span=len(values) / 100)
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.8, label="logged")
    axes.plot(steps, trend, color=BLUE, linewidth=2, label=f"moving average, last {trend[-1]:.3f}")
    _focus(axes, values)
    axes.set(title="Training loss", ylabel="nats per token")
    axes.legend(loc="upper right")


def _bpb(axes, steps, values, yardsticks):
    label = f"model, last {values[-1]:.3f}"
    axes.plot(steps, values, color=ORANGE, linewidth=1.8, marker="o", markersize=3.5, label=label)
    for (name, value), style in zip(yardsticks.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color=GREY, linewidth=1.4, linestyle=style, label=f"{name}: {value:.3f}")
    _focus(axes, np.array([*values, *yardsticks.values()]))  # the compressors' lines are always visible
    axes.set(title="Validation", ylabel="bits per byte")
    axes.legend(loc="upper right")


def _validation_loss(axes, steps, values):
    label = f"last {values[-1]:.3f}"
    axes.plot(steps, values, color=ORANGE, linewidth=1.8, marker="o", markersize=3.5, label=label)
    _focus(axes, values)
    axes.set(title="Validation loss", ylabel="nats per token")
    axes.legend(loc="upper right")


def _share(title, color):
    """A panel for a share of problems between 0 and 1."""

    def draw(axes, steps, values):
        trend = smoothed(values, span=len(values) / 20)
        axes.plot(steps, values, color=color, alpha=0.4, linewidth=1, marker="o" if len(values) < 30 else None)
        axes.plot(steps, trend, color=color, linewidth=2, label=f"first {values[0]:.3f}, last {values[-1]:.3f}")
        axes.set(title=title, ylim=(-0.03, 1.03))
        axes.legend(loc="lower right")

    return draw


def _throughput(axes, steps, values):
    human = EngFormatter(sep="")
    median = float(f"{np.median(values):.3g}")
    axes.plot(steps, values, color=GREEN, linewidth=1, label=f"median {human(median)}")
    axes.set_ylim(0, 1.15 * np.percentile(values, 99))
    axes.yaxis.set_major_formatter(human)
    axes.set(title="Throughput", ylabel="tokens per second")
    axes.legend(loc="lower right")


def plot_log(records, title, yardsticks=None) -> bytes | None:
    """
    A PNG of a training log: loss or reward, validation, tokens per second, whichever were logged.

    yardsticks: name → bits per byte, drawn as lines in the validation panel. Returns None if there is no curve.
    """
    panels = [
        ("train/loss", _loss),
        ("train/reward", _share("Mean reward of the samples", BLUE)),
        ("val/bpb", lambda *args: _bpb(*args, yardsticks or {})),
        ("val/loss", _validation_loss),
        ("pass@1", _share("Problems solved, pass@1", ORANGE)),
        ("train/tok_per_sec", _throughput),
    ]
    curves = [(draw, *series(records, key)) for key, draw in panels]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    figure, panels = new_figure(title, len(curves))
    for axes, (draw, steps, values) in zip(panels, curves, strict=True):
        draw(axes, steps, values)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        tidy(axes)
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
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
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
