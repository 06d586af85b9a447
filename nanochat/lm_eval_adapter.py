"""
Adapter for EleutherAI's lm-evaluation-harness: the three kinds of requests that it makes to a language model.

Needs the package lm-eval (`uv sync --extra lm-eval`); only scripts.lm_eval imports this.
"""

import sys
from contextlib import closing, nullcontext

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nanochat.common import UserError
from nanochat.core_eval import logits_of_ends
from nanochat.engine import Engine

BOS = "<|bos|>"


class HarnessLM(TemplateLM):
    """
    A model and its tokenizer as one of the harness. Texts begin with <|bos|>, as in training.

    batch_size: rows scored at once. Contexts longer than the model was trained on lose their beginning, unless they are
    read in sessions: `sessions` has make_session() and logits_of_ends(rows), as SessionScorer in megacontext.
    Run it under autocast for a precision other than that of the weights.
    """

    def __init__(self, model, tokenizer, name="", batch_size=8, sessions=None):
        super().__init__()
        self.model, self.bpe, self.batch_size, self.sessions = model, tokenizer, batch_size, sessions
        self.name = name
        self.max_length = sys.maxsize if sessions else model.config.sequence_len
        self.engine = Engine(model, tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """A name by which the harness distinguishes requests in different chat formats."""
        return self.name

    @property
    def eot_token_id(self) -> int:
        return self.bpe.get_bos_token_id()

    def tok_encode(self, string, add_special_tokens=None, **_kwargs) -> list[int]:
        """Ids with <|bos|> before them, unless add_special_tokens is False; special tokens only in a rendered chat."""
        if string.startswith(tuple(self.bpe.get_special_tokens())):  # by apply_chat_template
            return self.bpe.encode_rendered(string)
        return self.bpe.encode(string, prepend=None if add_special_tokens is False else BOS)

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        """A chat in our format with the names of special tokens; add_generation_prompt opens the assistant's turn."""
        chat = {"messages": chat_history}
        render = self.bpe.render_for_completion if add_generation_prompt else self.bpe.render_conversation
        ids = render(chat) if add_generation_prompt else render(chat, max_tokens=None)[0]
        return self.bpe.decode(ids)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_kwargs) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy one) of each (texts, context ids, continuation ids)."""
        rows = []  # (ids, where those begin that are scored)
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation):,} tokens is longer than the model's context of "
                    f"{self.max_length:,}: leave the task out"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            rows.append((ids, len(ids) - len(continuation)))

        def similar(i):
            """Sort key that groups rows of similar length, and of the same context, which a session can share."""
            context = requests[i][1]
            return (-len(context), context) if self.sessions else -len(rows[i][0])

        order = sorted(range(len(rows)), key=similar)
        answers = [None] * len(rows)
        for start in tqdm(range(0, len(order), self.batch_size), desc="loglikelihood", disable=disable_tqdm):
            chosen = order[start : start + self.batch_size]
            for i, scores in zip(chosen, self._logits_of_ends([rows[i] for i in chosen]), strict=True):
                continuation = requests[i][2]
                targets = torch.tensor(continuation, device=scores.device)
                nats = F.cross_entropy(scores.float(), targets, reduction="sum").item()
                answers[i] = (-nats, bool((scores.argmax(dim=-1) == targets).all()))
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def _logits_of_ends(self, rows) -> list[torch.Tensor]:
        """For each row (ids, start) the logits about ids[start:], [n, V]."""
        if self.sessions:
            return self.sessions.logits_of_ends(rows)
        return logits_of_ends(self.model, rows, self.eot_token_id, self.model.get_device())

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Log-likelihood in nats of whole texts, each token once, in windows as long as the model's context."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            own = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            own = [(None, *make_disjoint_window(window)) for window in own]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """The model's continuation, up to the first of the task's stop strings, without special tokens."""
        return [self._generate(*request.args) for request in tqdm(requests, desc="generate", disable=disable_tqdm)]

    def _generate(self, context, gen_kwargs):
        kwargs = normalize_gen_kwargs(gen_kwargs)
        room = self.max_length - kwargs["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"the task wants {kwargs['max_gen_toks']:,} new tokens, the model's context has {self.max_length:,}: "
                "ask for less with --gen_kwargs=max_gen_toks=64"
            )
        prompt = self.tok_encode(context)[-room:]
        temperature = kwargs.get("temperature", 1.0 if kwargs.get("do_sample") else 0.0)
        text, said = "", []
        options = {"max_tokens": kwargs["max_gen_toks"], "temperature": temperature, "top_k": kwargs.get("top_k")}
        with closing(self.sessions.make_session()) if self.sessions else nullcontext() as session:
            for (token,), _ in self.engine.generate(prompt, session=session, **options):
                said += [token] if token not in self.bpe.special_ids else []
                text = self.bpe.decode(said)
                ends = [text.find(stop) for stop in kwargs["until"] if stop and stop in text]
                if ends:
                    text = text[: min(ends)]
                    break
        self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
        return text
