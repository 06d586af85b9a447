"""Plots of MegaContext's evaluation for the report. Drawn without a display."""

from itertools import pairwise

from nanochat.plots import BLUE, GREEN, GREY, ORANGE, new_figure, png, tidy

LINES = {  # context → colour, marker, label
    "focus": (GREEN, "s", "gists, detail where LensNet wants it"),
    "gists": (BLUE, "o", "gists, newest tokens in detail"),
    "mean": (ORANGE, "^", "means in GistNet's place"),
    "shuffled": (GREY, "x", "gists of another text"),
    "truncated": ("black", "D", "a window of as many entries"),
    "bm25": ("#CC79A7", "v", "a window and blocks found by BM25"),
}


def plot_context_gain(by_ratio, by_distance, by_level) -> bytes:
    """A PNG: the share of the context gain that is recovered, by ratio and by distance; the loss by level."""
    figure, (ratios, distances, levels) = new_figure("What compression keeps of the context", 3)
    _shares(ratios, [f"{row['ratio']}×" for row in by_ratio], by_ratio, "kept", "no context at all")
    ratios.set(title="By compression of the history", ylabel="context kept")
    labels = [f"{row['nearest']}–{row['farthest']}" for row in by_distance]
    _shares(distances, labels, by_distance, "recovered", "cut out")
    distances.set(title="By distance of what is compressed", xlabel="tokens ago", ylabel="gain recovered")

    names = {"full": "black", "gists": BLUE, "mean": ORANGE, "shuffled": GREY, "none": "#BBBBBB"}
    for i, (name, color) in enumerate(names.items()):
        places = [place + 0.16 * (i - 2) for place in range(len(by_level))]
        levels.bar(places, [row[name] for row in by_level], 0.16, color=color, label=name)
    losses = [row[name] for row in by_level for name in names]
    margin = 0.2 * (max(losses) - min(losses)) or 0.1
    levels.set(title="The whole history at one level", ylabel="nats per token", ylim=(min(losses) - margin, None))
    levels.set_xticks(range(len(by_level)), [f"LOD {row['level']}" for row in by_level])
    for axes in (ratios, distances, levels):
        tidy(axes)
        axes.legend(fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below: lines go anywhere
    return png(figure)


def _shares(axes, labels, rows, measure, worst):
    for name, (color, marker, label) in LINES.items():
        points = [
            (i, row[f"{name}_{measure}"], row[f"{name}_{measure}_error"])
            for i, row in enumerate(rows)
            if row.get(f"{name}_{measure}") is not None
        ]
        if points:
            axes.errorbar(*zip(*points, strict=True), color=color, marker=marker, capsize=3, label=label)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="full context")
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":", label=worst)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.4, len(labels) - 0.6)
    axes.set_ylim(bottom=max(-1, axes.get_ylim()[0]))  # the gists of another text may be far below


POLICIES = {  # policy → colour
    "gists": "#BBBBBB",
    "random": GREY,
    "recency": ORANGE,
    "bm25": "#CC79A7",
    "lens": GREEN,
    "oracle": BLUE,
    "full": "black",
}


def plot_focus(by_length, depths, right) -> bytes:
    """A PNG: answers found by policy and length; of the lens, by length and where the fact stands."""
    figure, (bars, heat) = new_figure("Does focus find the fact?", 2)
    for i, (name, color) in enumerate(POLICIES.items()):
        places = [place + 0.12 * (i - 3) for place in range(len(by_length))]
        bars.bar(places, [row[name] for row in by_length], 0.12, color=color, label=name)
    lengths = [f"{row['tokens']:,}" for row in by_length]
    bars.set_xticks(range(len(lengths)), lengths)
    bars.set(title="Answers found, equal budget", xlabel="tokens", ylabel="share", ylim=(0, 1.02))
    bars.legend(
        fontsize=7.5, ncols=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), columnspacing=0.8, handlelength=1
    )
    tidy(bars)
    values = [[float("nan") if value is None else value for value in row] for row in right]
    image = heat.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                heat.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    heat.set_yticks(range(len(lengths)), lengths)
    heat.set_xticks(
        range(len(depths) - 1), [f"{100 * low:.0f}–{high:.0%}" for low, high in pairwise(depths)], fontsize=9
    )
    heat.set(title="LensNet, by where the fact stands", xlabel="of the history, oldest → newest", ylabel="tokens")
    figure.colorbar(image, ax=heat, label="share found")
    return png(figure)


def plot_stream(rows) -> bytes:
    """A PNG: milliseconds per token, seconds to the first token, and memory, by the tokens in the tree."""
    figure, (each, first, memory) = new_figure("What a stream costs as it grows", 3)
    tokens = [row["tokens"] for row in rows]
    each.plot(tokens, [row["token_ms"] for row in rows], color=BLUE, marker="o", label="a token, refocuses included")
    each.set(title="Time per token", ylabel="milliseconds", ylim=(0, 1.25 * max(row["token_ms"] for row in rows)))
    first.plot(tokens, [row["first_token_s"] for row in rows], color=ORANGE, marker="o", label="from nothing")
    turns = [row["next_turn_ms"] / 1000 for row in rows]
    first.plot(tokens, turns, color=GREEN, marker="s", label="next turn, 64 tokens")
    first.set(title="Time to the first token", ylabel="seconds", yscale="log")
    memory.plot(tokens, [row["tree_mb"] for row in rows], color=GREY, marker="o", label="tree")
    memory.plot(tokens, [row["cache_mb"] for row in rows], color=BLUE, marker="s", label="keys and values")
    memory.set(title="Memory", ylabel="MiB", yscale="log")
    for axes in (each, first, memory):
        axes.set(xscale="log", xlabel="tokens in the tree")
        axes.legend(fontsize=7.5)
        tidy(axes)
    return png(figure)
