"""
Batches of conversations: packed into streams for midtraining, one row per conversation for finetuning.

`conversations` is anything with len() and [index] that gives {"messages": […]}, as the tasks do.
"""

import torch

from nanochat.common import UserError, get_dist_info


class PackedConversations:
    """
    Endless iterator of (x, y), each int64 [B, T] on `device`: conversations one after the other, every token to be
    predicted. Rank r takes conversations r, r + world_size, …, from the start again after the last.

    progress: the part of the first pass over the conversations that is done, up to 1. state: a `state_dict()` of
    the same rank, to go on from there.
    """

    def __init__(self, conversations, tokenizer, B, T, device="cpu", state=None):
        _, self.rank, _, self.world_size = get_dist_info()
        if len(conversations) < self.world_size:
            raise UserError(f"{len(conversations)} conversations are too few for {self.world_size} processes to share")
        self.conversations, self.tokenizer = conversations, tokenizer
        self.B, self.T, self.device = B, T, torch.device(device)
        state = state or {"taken": 0, "tokens": []}
        self.taken, self.tokens = state["taken"], list(state["tokens"])

    @property
    def progress(self) -> float:
        return min(1.0, self.taken * self.world_size / len(self.conversations))

    def __next__(self):
        needed = self.B * self.T + 1  # the last token of a batch is the first of the next
        while len(self.tokens) < needed:
            index = (self.taken * self.world_size + self.rank) % len(self.conversations)
            ids, _ = self.tokenizer.render_conversation(self.conversations[index], max_tokens=None)
            self.tokens.extend(ids)
            self.taken += 1
        block = torch.tensor(self.tokens[:needed])
        del self.tokens[: needed - 1]
        x, y = block[:-1].view(self.B, self.T), block[1:].view(self.B, self.T)
        return x.to(self.device), y.to(self.device)

    def state_dict(self):
        return {"taken": self.taken, "tokens": list(self.tokens)}


def pad_rows(rows, pad_id, device="cpu"):
    """
    (x, y) int64 [rows, T'] from (ids, mask) pairs: y is x one token later, −1 where the mask or the row says no.

    T' is the longest row less one.
    """
    T = max(max(len(ids) for ids, _ in rows) - 1, 1)
    x = torch.full((len(rows), T), pad_id)
    y = torch.full((len(rows), T), -1)
    for row, (ids, mask) in enumerate(rows):
        n = len(ids) - 1
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        x[row, :n] = ids[:-1]
        y[row, :n] = torch.where(mask[1:] == 1, ids[1:], -1)
    return x.to(device), y.to(device)


def padded_batches(conversations, tokenizer, B, T, device="cpu"):
    """
    The conversations, B at a time, as a list of (x, y) for which only the assistant's own tokens are predicted.

    Conversations beyond T tokens are cut; what is left may hold nothing to predict.
    """
    pad_id = tokenizer.encode_special("<|assistant_end|>")
    rows = [tokenizer.render_conversation(conversation, max_tokens=T + 1) for conversation in conversations]
    return [pad_rows(rows[i : i + B], pad_id, device) for i in range(0, len(rows), B)]
