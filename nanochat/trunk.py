"""
What reading, generating and MegaContext need of a model: a decoder-only Transformer with rotary positions.

GPT is one; Llama makes one of transformers' decoders. All that differs between them stays inside of them.

Shapes: B batch, T time, D = n_embd, H = n_head, H_kv = n_kv_head, d channels per head, V = vocab_size.
"""

from typing import Protocol, runtime_checkable

import torch

from nanochat.gpt import GPTConfig, Looks


@runtime_checkable
class Trunk(Protocol):
    config: GPTConfig
    """sequence_len, the tokens it was trained on at once, may be lowered; the rest is its shape"""
    transformer: torch.nn.ModuleDict
    """"wte", the table of embeddings [V or more, D], and "h", the layers, which may be compiled one by one"""
    lm_head: torch.nn.Linear
    """its weight has the precision in which the model computes where no autocast surrounds it"""
    frequencies: torch.Tensor
    """of the rotary positions: radians per token of each pair of channels, float64 [d/2]; negative where it turns them
    the other way"""
    cos: torch.Tensor
    """[1, max_seq_len, 1, d/2] with `sin`: of the angles of the first positions"""
    sin: torch.Tensor
    sink: bool
    """whether what comes first must be a token: there, models that were never taught otherwise break on a gist"""
    max_seq_len: int
    """tokens that can be read without positions given"""

    def embed(self, idx: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, D] of ids [B, T], with a root mean square of about 1: gists live among them."""

    def trunk(self, x, cos_sin=None, asking=None) -> tuple[torch.Tensor, Looks | None]:
        """See GPT.trunk: what the head reads, and where the tokens that are asked look."""

    def states(self, x, cos_sin=None) -> torch.Tensor:
        """What goes into the last layer, [B, T, D], of inputs x as of `trunk`; without a gradient."""

    def states_before(self, last, x, cos_sin=None) -> torch.Tensor:
        """The same of layer number `last`."""

    def forward(self, idx=None, targets=None, loss_reduction="mean", **options):
        """Logits [B, T, V] in float32, or the loss in nats, of ids or embeddings: see GPT.forward for the options."""

    def get_device(self) -> torch.device: ...

    def num_params(self) -> int: ...

    def flops_per_token(self) -> int:
        """Training FLOPs per token at sequence_len."""
