"""
Generation: prefill once, then decode all rows together, one token per row and step.

The Engine samples, runs tools and streams. What a token attends to is the business of a *session*, which has
two methods: `prefill(tokens) -> logits [rows, V]` and `read(ids [rows]) -> logits [rows, V]`, or None when there
is no room for more. After `read`, `wish` is None or [rows], on the device; its values, once known, are for `follow`,
which may have better logits. CacheSession is the plain one: all tokens so far, in a KV cache.
"""

import torch

from nanochat.batch import Batch, CacheSession, Row, wait_for
from nanochat.decode import Decoder, compute_dtype, weights_version
from nanochat.sampling import Sampler, Sampling, row_seed


class Engine:
    """
    Generates from a model and a tokenizer; runs the calculator when the model calls it.

    dtype: precision of generation; None for that of a surrounding autocast, or else of the weights. graph: CUDA
    graphs; None for "where there is CUDA". Each `generate` uses the weights as they are when it starts, and they must
    not change until it ends. Changes that `decode.weights_version` does not notice need another Engine.
    """

    def __init__(self, model, tokenizer, dtype=None, graph=None):
        self.model, self.tokenizer, self.dtype, self.graph = model, tokenizer, dtype, graph
        self._decoder = self._version = None

    @property
    def decoder(self) -> Decoder:
        """The model as it is now, laid out for generation; kept until its weights change."""
        dtype, version = self.dtype or compute_dtype(self.model), weights_version(self.model)
        if self._decoder is None or (self._decoder.dtype, self._version) != (dtype, version):
            self._decoder = None  # frees its memory first
            self._decoder, self._version = Decoder(self.model, dtype, self.graph), version
        return self._decoder

    @torch.inference_mode()
    def generate(
        self,
        tokens,
        num_samples=1,
        max_tokens=None,
        temperature=1.0,
        top_k=None,
        seed=42,
        session=None,
        **settings,
    ):
        """
        Yield (ids, mask) per step: one id per row, and 1 where it was sampled, 0 where a tool's answer forced it.

        tokens: the prompt, a list of ids. session: what the tokens attend to (default: all of them, at full detail).
        settings: others of Sampling.
        Ends after max_tokens steps, or when every row has ended its turn (a row that is done goes on in its column, to
        be ignored), or when the session has no room for more: by default, after model.max_seq_len tokens and the one
        that these predict.
        """
        if not tokens:
            raise ValueError("expected at least one token as the prompt, got none")
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, or None for no limit, got {max_tokens}")
        if max_tokens == 0:
            return
        session = session or CacheSession(self.decoder, num_samples, max_tokens)
        sampler = Sampler(self.model.config.vocab_size, self.model.get_device())
        for row in range(num_samples):
            sampler.add(Sampling(temperature, top_k, seed=row_seed(seed, row), **settings), tokens)
        rows = [Row(self.tokenizer) for _ in range(num_samples)]
        logits = session.prefill(tokens)
        if len(logits) != num_samples:
            raise ValueError(f"the session has {len(logits)} rows, num_samples is {num_samples}")
        produced = 0
        while logits is not None:
            ids = sampler(logits)
            sampled, [wish] = wait_for(ids, [session.wish])
            if wish and (better := session.follow(wish)) is not None:
                logits, ids = better, sampler(better)
                sampled = ids.tolist()
            column, mask = map(list, zip(*(row.take(id) for row, id in zip(rows, sampled, strict=True)), strict=True))
            if column != sampled:
                ids = torch.tensor(column, device=ids.device)
            yield column, mask
            produced += 1
            if all(row.done for row in rows) or produced == max_tokens:
                return
            sampler.observe(ids)
            logits = session.read(ids)

    def batch(self) -> Batch:
        """For prompts that come one by one and share their steps."""
        return Batch(self)

    def generate_batch(self, tokens, num_samples=1, keep_end=False, **kwargs):
        """
        All rows at once: (ids, masks), lists of num_samples lists that begin with the prompt (mask 0).

        keep_end: with the token that ended a row's turn, if one did.
        """
        ends = self.tokenizer.turn_ends
        results = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        done = [False] * num_samples
        for column, mask in self.generate(tokens, num_samples, **kwargs):
            for i, token in enumerate(column):
                if done[i]:
                    continue
                done[i] = token in ends
                if not done[i] or keep_end:
                    results[i].append(token)
                    masks[i].append(mask[i])
        return results, masks
