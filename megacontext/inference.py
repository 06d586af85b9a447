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
    """The options of MCConfig that matter in inference. -1 or empty: the value in the checkpoint."""

    allocator: Literal["", "greedy", "stochastic_greedy"] = ""
    """open the best blocks, or draw them at random from the best"""
    allocator_sample_top_k: Count = -1
    """stochastic_greedy: number of best blocks from which one is drawn"""
    allocator_sample_temperature: Annotated[float, Range(1e-6, 1e30)] = -1.0
    """stochastic_greedy: temperature of the draw"""
    allocator_soft_max: Count = -1
    """budget: maximum number of entries in the working context"""
    allocator_recent_tokens: CountOr0 = -1
    """number of newest tokens that are never compressed"""
    allocator_expand_threshold: Fraction = -1.0
    """minimum score for opening a block, 0 to 1"""
    allocator_collapse_threshold: Fraction = -1.0
    """while generating, siblings collapse to make room for a block only if its score exceeds theirs by at least
    allocator_expand_threshold plus this, 0 to 1; after a prompt, any higher score suffices"""
    mc_infer_allocator_max_replacements: Count = -1
    """maximum number of blocks opened per round"""
    mc_infer_allocator_iterations: Count = -1
    """maximum rounds of scoring and editing after a prompt"""
    mc_infer_refocus_interval: Count = -1
    """maximum number of generated tokens between refocuses; a token that wants a hidden block causes one at once"""
    mc_gist_limit: CountOr0 = -1
    """number of gists above which each gets less attention and several share a position; 0 for no limit"""
    mc_beside: Fraction = -1.0
    """fraction of a wanted block's logit that its two neighbours get at least"""
    mc_tree: Literal["", "ram", "disk"] = ""
    """where sessions keep their trees: in memory, or on disk, from which chat_web resumes chats after a restart"""
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
    """A function () -> MCSession. The sessions share weights that are converted to autocast's precision here, once."""
    return partial(MCSession, model, networks, config, decoder=Decoder(model), **options)


def about_stream(make_session, name, gist_key, device):
    """
    A function () -> MCSession that begins behind the named stream, as stored at the time of the call. It never writes
    to the stream.

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
    """Scores rows for evaluate_core in a session: the shared beginning is a prompt, each end is fed token by token."""

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
