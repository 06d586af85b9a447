"""The focus of a session as three lines of a terminal."""

from rich.text import Text

COLOURS = ("bright_yellow", "dark_orange3", "medium_purple3", "grey42")  # of LOD 0, 1, 2, and 3 or more
EXPANDED, COLLAPSED = "▲", "▼"


def focus_strip(state: dict, width=80) -> Text:
    """
    Three lines: the stream in at most `width` cells, oldest first; a legend; the figures. state: MCSession.focus_state.

    A cell is one block or several, in the colour of the finest level among them; ▲ marks what the last refocus
    expanded, ▼ what it collapsed.
    """
    group, blocks, finest = -(-sum(blocks for _, blocks in state["lod"]) // width), 0, {}
    for lod, count in state["lod"]:
        cells = range(blocks // group, (blocks + count - 1) // group + 1)
        finest |= {cell: min(lod, finest.get(cell, lod)) for cell in cells}
        blocks += count
    marks = {}
    for mark, edits in ((COLLAPSED, state["collapsed"]), (EXPANDED, state["expanded"])):
        for first, blocks, _ in edits:
            marks |= dict.fromkeys(range(first // group, (first + blocks - 1) // group + 1), mark)
    strip = Text()
    for cell, lod in finest.items():
        colour = _colour(lod)
        if cell in marks:
            strip.append(marks[cell], style=f"black on {colour}")
        else:
            strip.append("█", style=colour)
    strip.append("\n")
    for lod, count in state["lod_counts"].items():
        strip.append("█", style=_colour(lod))
        strip.append(f" LOD {lod}: {count:,}  ", style="dim")
    strip.append("\n")
    cell = f"{group:,} × {state['block_size']} tokens"
    figures = (
        f"{state['entries']:,} of {state['budget']:,} entries ({state['entries'] / state['budget']:.0%})",
        f"{state['num_tokens']:,} tokens",
        f"swap rate {state['swap_rate']:.1%}",
        f"1 cell = {cell}",
    )
    return strip.append(" · ".join(figures), style="dim")


def _colour(lod):
    return COLOURS[min(lod, len(COLOURS) - 1)]
