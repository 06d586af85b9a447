"""
Search by LensNet: where in a stream would the model look, if this were asked now?

Shapes: N tokens of the stream, Q of the question, K = block_size, W entries and P tiles of a working context.

From far to near: the stream in coarse nodes, with the question after it; the nodes that LensNet scores highest are
expanded, all is scored again with what that brought to light, and so on down to single blocks. Nothing of the session
changes. The cost is a few scorings of W entries, whatever N.
"""

from dataclasses import dataclass

import torch

from megacontext.session import MCSession
from megacontext.working_context import Edit, WorkingContext, smallest_length

MAX_QUESTION = 64  # tokens; of a longer question the last ones count


@dataclass
class Place:
    """Blocks [first, first + blocks) that are one tile of level lod, and LensNet's score of them, −1 to 1."""

    first: int
    blocks: int
    lod: int
    score: float


@torch.inference_mode()
def look(session: MCSession, question: list[int], most=20) -> list[Place]:
    """
    Blocks and nodes in which the answer to a question, token ids, may stand: at most `most`, the highest score first.

    Where the budget does not allow to go down to blocks everywhere, nodes of several blocks are among them. Empty for a
    stream of less than a block.
    """
    if session.num_tokens < session.config.block_size:
        return []
    tree, reader, config = session.tree, session.reader, session.config
    question, K, N = question[-MAX_QUESTION:], config.block_size, session.num_tokens
    query = reader.embed(torch.tensor([question], device=session.device))
    recent = len(question) + N % K
    room = max(session.room, smallest_length(N + len(question), K, recent))
    # Half of the room is for what is expanded on the way
    start = max(smallest_length(N + len(question), K, recent), room // 2)
    context = WorkingContext.initial(N + len(question), K, start, recent)

    def scored(context):
        x = tree.materialize(context.truncate(N))
        scores = reader.score(torch.cat((x, query.to(x.dtype)), dim=1), context)
        return context.per_tile(scores.float().cpu())[0].tolist()

    at_once = max(1, (room - start) // ((K - 1) * (context.coarsest + 1)))  # nodes to expand, at each level
    while True:
        tiles = (t[0].tolist() for t in (context.first_blocks, context.tile_blocks, context.tiles))
        places = [Place(*place) for place in zip(*tiles, scored(context), strict=True)]
        places = sorted((p for p in places if p.first < N // K), key=lambda p: -p.score)
        fit = max(0, room - int(context.lengths()[0])) // (K - 1)
        coarse = [p for p in places[: max(most, at_once)] if p.lod > 1][: min(at_once, fit)]
        if not coarse:
            return places[:most]
        context = context.apply(Edit(0, p.first, p.blocks, p.lod - 1) for p in coarse)
