"""What a stream costs as it grows: time to the first token, time per token, memory, and how often the focus changes."""

import time

import torch

from megacontext.session import MCSession

STEPS_IN_INTERVALS = 4  # measured steps at each length, in refocus intervals: whole ones weight refocuses correctly


def stream_cost(session: MCSession, tokens, lengths) -> list[dict]:
    """
    Grow a new session through the ascending `lengths` with `tokens`, a list of ids; returns a row of figures for each:

    tokens; entries; budget; first_token_s: seconds to read that many tokens in a new session, up to the logits;
    next_turn_ms: milliseconds to read 64 more; token_ms: mean milliseconds per generated token, refocuses included;
    tree_mb and cache_mb: MiB; swap_rate and residency so far (see Record).
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
