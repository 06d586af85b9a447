"""
Generation: prefill once, then decode all rows together, a token a row at a time.

The Engine samples, runs tools and streams. What a token attends to is the business of a *session*, which has
two methods: `prefill(tokens) -> logits [rows, V]` and `step(ids [rows]) -> logits [rows, V]`, or None when there
is no room for more. CacheSession, here, is the plain one: all tokens so far, in a KV cache.
"""

from collections import deque

import torch

from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.decode import Decoder, KVCache, compute_dtype, weights_version
from nanochat.sampling import Sampler, Sampling, row_seed


class CacheSession:
    """The plain context: every token, at full detail, as far as the model's positions go."""

    def __init__(self, decoder, rows=1, max_tokens=None):
        self.decoder, self.rows, self.max_tokens = decoder, rows, max_tokens or 0
        self.cache = self._step = None

    def prefill(self, tokens):
        """
        Logits [rows, V] after the prompt (a list of ids), read once and shared by all rows.

        Raises UserError when the prompt has more tokens than the model has positions.
        """
        decoder, limit = self.decoder, self.decoder.max_seq_len
        if len(tokens) > limit:
            raise UserError(
                f"the prompt has {len(tokens):,} tokens, more than the {limit:,} positions of this model "
                f"(10 × sequence_len {decoder.config.sequence_len:,}): shorten it"
            )
        self._step = None  # it holds the cache of an earlier prompt
        self.cache = KVCache(decoder.config.n_layer, min(len(tokens) + self.max_tokens, limit))
        logits = decoder.extend(torch.tensor([tokens], device=decoder.device), self.cache)
        if self.rows > 1:
            self.cache.repeat(self.rows)
        self._step = decoder.stepper(self.cache)
        return logits.expand(self.rows, -1)

    def step(self, ids):
        """Logits [rows, V] after one more token a row, ids [rows]; None when the model's positions are used up."""
        return self._step(ids) if self.cache.pos < self.decoder.max_seq_len else None


class _Row:
    """What is known of one row while it is generated."""

    def __init__(self):
        self.done = False
        self.forced = deque()  # ids that must come next: what a tool answered
        self.call = None  # ids of the tool call being written, None outside of one


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
        on_logits=None,
        **settings,
    ):
        """
        Yield (ids, mask) a step: one id a row, and 1 where it was sampled, 0 where a tool's answer forced it.

        tokens: the prompt, a list of ids. session: what the tokens attend to (default: all of them, at full detail).
        settings: others of Sampling. on_logits(logits [B, V], ids [B]): called with what each step came from.
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
        special = self.tokenizer.encode_special
        ends = self.tokenizer.turn_ends
        call_start, call_end = special("<|python_start|>"), special("<|python_end|>")
        rows = [_Row() for _ in range(num_samples)]
        logits = session.prefill(tokens)
        if len(logits) != num_samples:
            raise ValueError(f"the session has {len(logits)} rows, num_samples is {num_samples}")
        produced = 0
        while logits is not None:
            ids = sampler(logits)
            sampled = ids.tolist()  # the one time a step that the host waits for the device
            column, mask = [], []
            for row, token in zip(rows, sampled, strict=True):
                mask.append(0 if row.forced else 1)
                token = row.forced.popleft() if row.forced else token
                column.append(token)
                if token in ends:
                    row.done = True
                elif token == call_start:
                    row.call = []
                elif token == call_end and row.call is not None:
                    row.forced.extend(self._tool_answer(row.call))
                    row.call = None
                elif row.call is not None:
                    row.call.append(token)
            if column != sampled:
                ids = torch.tensor(column, device=ids.device)
            if on_logits:
                on_logits(logits, ids)
            yield column, mask
            produced += 1
            if all(row.done for row in rows) or produced == max_tokens:
                return
            sampler.observe(ids)
            logits = session.step(ids)

    def _tool_answer(self, call):
        """The ids that the calculator puts after a tool call; none when the call is not for it."""
        answer = calculate(self.tokenizer.decode(call))
        if answer is None:
            return []
        return self.tokenizer.encode(answer, prepend="<|output_start|>", append="<|output_end|>")

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
