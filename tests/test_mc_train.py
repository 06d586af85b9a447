"""What mc_train gives LensNet to begin with: equal in all ranks, of the text of all; common is what all chats have."""

import types

import torch

from nanochat.common import compute_init, get_dist_info
from scripts import mc_train
from tests.helpers import in_ranks, make_model, tokens

V = 70
TOKENIZER = types.SimpleNamespace(
    get_vocab_size=lambda: V,
    special_ids={69},
    render_for_completion=lambda conversation: [69, 68, 67],
)


class Loader:
    """Batches of each rank's own text."""

    device = torch.device("cpu")

    def __init__(self, rank):
        self.batches = (tokens(B=4, seed=10 * rank + i) for i in range(3))

    def __next__(self):
        return next(self.batches)


def begin(folder):
    compute_init("cpu")
    rank = get_dist_info()[1]
    mc_train.COUNTED = 1
    torch.save(mc_train.start_of_lensnet(make_model(), TOKENIZER, Loader(rank)), folder / f"{rank}.pt")


def test_all_ranks_begin_alike(tmp_path):
    in_ranks(2, begin, tmp_path)
    start, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for one, same in zip(start, other, strict=True):
        assert torch.equal(one, same)
    text = torch.cat([tokens(B=4, seed=seed)[0].flatten() for seed in (0, 10)])
    expected = text.bincount(minlength=V).float()
    embeddings, counts, states, around = start
    assert torch.equal(counts, expected)
    assert set(around.tolist()) == set(range(67, V))
    model = make_model()
    with torch.no_grad():
        torch.testing.assert_close(embeddings, model.embed(torch.arange(V)[None])[0])
        torch.testing.assert_close(states, model.states(model.embed(tokens(B=4, seed=0)[0])).flatten(0, 1))
