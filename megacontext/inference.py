"""MegaContext in scripts that generate: the networks of a checkpoint, and options for inference."""

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Annotated, Literal

import torch

from megacontext import streams
from megacontext.networks import load_networks
from megacontext.session import MCSession
from nanochat.common import UserError
from nanochat.configurator import group
from nanochat.decode import Decoder
from nanochat.ranges import Count, CountOr0, Fraction, Range


@dataclass
class MCInference:
    """The options of MCConfig that answering heeds. -1 or empty: the value that the checkpoint was trained with."""

    allocator: Literal["", "greedy", "stochastic_greedy"] = ""
    """take the best edits, or draw at random among the best"""
    allocator_sample_top_k: Count = -1
    """stochastic_greedy: number of candidates from which an edit is drawn"""
    allocator_sample_temperature: Annotated[float, Range(1e-6, 1e30)] = -1.0
    """stochastic_greedy: temperature of the draw"""
    allocator_soft_max: Count = -1
    """budget: most entries of the working context"""
    allocator_recent_tokens: CountOr0 = -1
    """newest tokens that are never compressed"""
    allocator_expand_threshold: Fraction = -1.0
    """minimum score for opening a block, 0 to 1"""
    allocator_collapse_threshold: Fraction = -1.0
    """siblings collapse to make room if a score is higher than theirs by this and the other threshold, 0 to 1"""
    mc_infer_allocator_max_replacements: Count = -1
    """blocks that are opened per round, at most"""
    mc_infer_allocator_iterations: Count = -1
    """rounds of scoring and editing when a prompt was read, at most"""
    mc_infer_refocus_interval: Count = -1
    """generated tokens between two refocuses, at most: one comes at once when a token wants a hidden block"""
    mc_gist_limit: CountOr0 = -1
    """gists beyond which each draws less attention and several share a position; 0 for no limit"""
    mc_beside: Fraction = -1.0
    """how much the blocks beside a wanted one are wanted, as a part of what it is"""
    mc_tree: Literal["", "ram", "disk"] = ""
    """where a session's tree is kept: in memory, or in a folder, which chat_web keeps for each conversation"""
    mc_aux_dtype: Literal["", "auto", "fp32", "bf16"] = ""
    """precision of GistNet and LensNet"""

    def apply(self, config):
        """A checkpoint's MCConfig with the options given here. Raises UserError for values out of range."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        config = replace(config, **{name: value for name, value in given.items() if value not in (-1, "")})
        return replace(config, mc_eval_soft_max_length=max(1, config.budget_of_a_refocus))


@dataclass
class InferenceOptions:
    """Whether a script reads with MegaContext, and with which settings."""

    mc: bool = False
    """MegaContext: read prompts of any length, through a working context"""
    megacontext: Annotated[MCInference, group] = field(default_factory=MCInference)
    """these options have an effect with --mc only"""


def load_for_inference(source, meta, device, options: MCInference, model=None):
    """
    (networks in eval mode, resolved config) of a checkpoint; model, meta: from `load_model(source, …)`.

    Raises UserError if the checkpoint has no networks.
    """
    networks, config = load_networks(source, meta, device, model)
    if networks is None:
        raise UserError(
            f"--mc: the checkpoint {meta['model_tag']}, step {meta['step']} ({source}) has no GistNet and LensNet. "
            f"Train with --mc, or add them to a trained model with scripts.mc_train"
        )
    return networks.eval(), options.apply(config)


def session_maker(model, networks, config, **options):
    """A function () -> MCSession; the weights are converted once, to the precision of the surrounding autocast."""
    return partial(MCSession, model, networks, config, decoder=Decoder(model), **options)


def about_stream(make_session, name, gist_key, device):
    """
    A function () -> MCSession whose past is the stream of this name, as it is then; it does not change the stream.

    gist_key: see streams.gist_key_of. Raises UserError if there is no such stream, or gists are missing.
    """
    folder = streams.stream_folder(name)
    if not folder.is_dir():
        raise UserError(f"--stream: there is none called {name!r}: see python -m scripts.mc_stream list")
    new = f"python -m scripts.mc_stream append {name}"

    def make(**options):
        store = streams.open_store(folder, gist_key, device)
        missing = store.count(0) // gist_key["block_size"] - store.count(1)
        if missing > streams.SPILL_TOKENS // gist_key["block_size"]:
            raise UserError(f"--stream: {missing:,} blocks of {name} have no gists of this model yet: run {new}")
        return make_session(store=store, past=store.count(0), **options)

    return make


class SessionScorer:
    """Scores rows for evaluate_core in a session: their common beginning as a prompt, their ends token by token."""

    def __init__(self, make_session):
        self.make_session = make_session

    def logits_of_ends(self, rows) -> list[torch.Tensor]:
        """
        For each row (tokens, start) the logits about tokens[start:], [n, V]. Rows with equal beginnings that follow one
        another share them. Raises UserError when the budget is too small for a row.
        """
        ends, beginning, session = [], None, None
        for tokens, start in rows:
            if tokens[:start] != beginning:
                if session:
                    session.close()
                beginning, session = tokens[:start], self.make_session()
                logits = session.prefill(beginning)
                after_beginning = session.snapshot()
            session.restore(after_beginning)
            end = [logits]
            for token in tokens[start:-1]:
                end.append(session.step(torch.tensor([token], device=session.device)))
                if end[-1] is None:
                    raise UserError(f"no room for {len(tokens):,} tokens: raise --allocator_soft_max")
            ends.append(torch.cat(end))
        return ends
