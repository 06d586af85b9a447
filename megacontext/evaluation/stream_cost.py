"""What a stream costs as it grows: time to the first token, time per token, memory, and how often the focus changes."""

import time

import torch

from megacontext.session import MCSession

STEPS_IN_INTERVALS = 4  # at each length, so that the refocuses count as often as they come


def stream_cost(session: MCSession, tokens, lengths) -> list[dict]:
    """
    A row for each of the `lengths` (rising) to which the session, fresh and of one row, is grown with `tokens`, ids:

    tokens; entries (of the budget); first_token_s: seconds to read so many tokens from nothing, and the logits after
    them; next_turn_ms: to read another 64; token_ms: mean milliseconds per token of the following, refocuses included;
    tree_mb and cache_mb; swap_rate and residency so far (see Record).
    """
    rows, reading = [], 0.0
    for N in lengths:
        reading += _seconds(session, lambda N=N: session.prefill(tokens[:N]))
        turn = _seconds(session, lambda N=N: session.prefill(tokens[: N + 64]))
        steps = STEPS_IN_INTERVALS * session.interval
        ids = torch.tensor(tokens[N + 64 : N + 64 + steps], device=session.device)
        token_seconds = _seconds(session, lambda ids=ids: [session.step(token[None]) for token in ids])
        state, memory = session.focus_state(), session.memory()
        rows.append(
            {
                "tokens": N,
                "entries": state["entries"],
                "budget": session.budget,
                "first_token_s": reading,
                "next_turn_ms": 1000 * turn,
                "token_ms": 1000 * token_seconds / steps,
                "tree_mb": memory["tree"] / 2**20,
                "cache_mb": memory["cache"] / 2**20,
                "swap_rate": state["swap_rate"],
                "residency": state["residency"],
            }
        )
    return rows


def _seconds(session, function) -> float:
    started = time.perf_counter()
    function()
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    return time.perf_counter() - started
