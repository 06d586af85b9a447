"""
Search by LensNet: where in a stream would the model look if this question were asked now?

The question is read after the session's working context, and its tokens query LensNet. The session does not change.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megacontext.lensnet import NEWEST
from megacontext.reader import score
from megacontext.session import MCSession

MAX_QUESTION = 64  # tokens; a longer question loses its beginning


@dataclass
class Found:
    """A block, the level of the tile that contains it, and its LensNet score, −1 to 1."""

    block: int
    lod: int
    score: float


@torch.inference_mode()
def look(session: MCSession, question: list[int], most=20) -> list[Found]:
    """
    Blocks that may contain the answer to a question, given as token ids: at most `most`, highest score first.

    Empty for a stream shorter than a block. Only the blocks that the session scores count: see lensnet.MOST_BLOCKS.
    """
    if session.num_tokens < session.config.block_size:
        return []
    question, reader, demand = question[-MAX_QUESTION:], session.reader, session.demand
    context = session.context.append(len(question))
    x = session.tree.materialize(session.context)
    query = reader.embed(torch.tensor([question], device=session.device)).to(x.dtype)
    at = int(context.lengths()) + torch.arange(-len(question), 0)[None]
    keys = demand.keys()
    states = reader.states(torch.cat((x, F.pad(query, (0, reader.deep))), dim=1), context, at)
    words = torch.cat((session.tree.newest(NEWEST), query), dim=1)
    last = words.size(1) + torch.arange(-len(question), 0, device=session.device)[None]
    (asked,) = reader.asking(states, words, last)
    scores, blocks = score(reader.wanted(asked[None], keys[None])[0]).sort(descending=True, stable=True)
    blocks = demand.first + blocks[:most]
    lods = context.tiles[0, context.tile_of(blocks[None])[0]]
    found = zip(blocks.tolist(), lods.tolist(), scores.tolist(), strict=False)
    return [Found(block, lod, value) for block, lod, value in found]
