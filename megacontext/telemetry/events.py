"""
Tables of everything that is exported, spans and metrics; what takes it; and the functions that turn an update of a
session, or a record of the training log, into spans.

Documentation, dashboards and tests read these tables.
"""

import math
import re

from megacontext.focus_allocator import lod_counts

EVENTS = {  # span → attribute → what it is. In spans a slash is a dot; {lod} is a level
    "mc_tree_snapshot": {
        "step": "optimization step; none while answering",
        "num_tokens": "tokens in the tree",
        "bytes": "memory of the tree",
    },
    "working_context_snapshot": {
        "step": "as above",
        "entries": "entries of the working context",
        "budget": "entries it may have",
        "lod_count/{lod}": "entries of a level",
    },
    "focus_allocator": {
        "step": "as above",
        "refocuses": "refocuses so far",
        "expansions": "entries that the last refocus replaced by finer ones",
        "collapses": "groups of entries that it replaced by a coarser one",
        "swap_rate": "edits over entries, of all refocuses so far",
        "residency": "refocuses that a block keeps its level for, on average",
        "score_mean": "mean score of LensNet over the blocks",
        "score_max": "highest score of a block",
        "score_min": "lowest score of a block",
    },
    "mc_timing": {
        "step": "as above",
        "milliseconds": "of one micro-batch's forward pass: all that is in megacontext/objective.py",
    },
    "inference_update": {
        "entries_read": "entries that the model read anew",
        "entries_kept": "entries whose keys and values were kept",
        "cache_bytes": "memory of the keys and values",
        "milliseconds": "that it took",
    },
    "chat": {  # OpenTelemetry's conventions for generative AI; the span's name is "chat <model>"
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nanochat",
        "gen_ai.request.model": "model that was asked",
        "gen_ai.request.temperature": "as sampled with",
        "gen_ai.request.top_k": "as sampled with",
        "gen_ai.request.max_tokens": "tokens that the answer may have",
        "gen_ai.usage.input_tokens": "tokens of the prompt",
        "gen_ai.usage.output_tokens": "tokens of the answer, a tool's output included",
        "gen_ai.response.time_to_first_chunk": "seconds from the request to the first text",
        "gen_ai.response.finish_reasons": "stop, length, cancelled or error",
        "gen_ai.conversation.compacted": "whether MegaContext stood in for older tokens",
        "error.type": "what failed, if something did",
        "gen_ai.input.messages": "the prompt as the model reads it; only if asked for",
        "gen_ai.output.messages": "the answer; only if asked for",
    },
}

METRICS = {  # key in the log → what it is. As a metric, a slash is a dot, and a number at the end an attribute
    "step": "optimization step",
    "total_training_tokens": "tokens trained on",
    "total_training_flops": "floating-point operations of training",
    "total_training_time": "seconds of training, the first ten steps left out",
    "train/loss": "training loss, nats per token",
    "train/lrm": "multiplier of the learning rates",
    "train/grad_norm": "norm of the gradients before clipping",
    "train/dt": "seconds of a step",
    "train/tok_per_sec": "tokens trained on per second",
    "train/mfu": "part of the GPU's peak FLOP/s that is used",
    "train/reward": "mean reward of the samples (RL)",
    "train/answer_tokens": "mean length of the samples (RL)",
    "val/bpb": "validation, bits per byte",
    "val/loss": "validation loss, nats per token",
    "val/mc_bpb": "bits per byte of the newest tokens after a working context",
    "val/mc_full_bpb": "the same after all tokens",
    "val/mc_truncated_bpb": "the same after the last tokens only",
    "val/mc_context_gain": "part of what all tokens gain over the last that the working context keeps",
    "core_metric": "CORE",
    "mc/token_loss": "loss over the variants, nats per token",
    "mc/base_loss": "loss with all tokens, nats per token",
    "mc/lod_loss/{lod}": "loss of what follows an entry of a level",
    "mc/lens_loss": "divergence of what LensNet wants from where the model looks, in nats",
    "mc/lod_count/{lod}": "entries of a level in a working context",
    "mc/variants_total": "working contexts in a micro-batch",
    "mc/tree_tokens": "tokens in a tree",
    "mc/wc_entries": "entries of a working context",
    "mc/time_controller_ms": "milliseconds of a micro-batch's forward pass",
}

# Metrics of events: name → (event, attribute, what it is). Attribute "seconds" is the duration of the span; one of each
# level becomes a metric with a label.
EVENT_GAUGES = {
    "mc.tree_tokens": ("mc_tree_snapshot", "num_tokens", "tokens in a tree"),
    "mc.tree_bytes": ("mc_tree_snapshot", "bytes", "memory of the tree"),
    "mc.wc_entries": ("working_context_snapshot", "entries", "entries of a working context"),
    "mc.wc_lod_count": ("working_context_snapshot", "lod_count.{lod}", "entries of a level in it"),
    "mc.swap_rate": ("focus_allocator", "swap_rate", "edits over entries, of all refocuses so far"),
    "mc.residency": ("focus_allocator", "residency", "refocuses that a block keeps its level for"),
    "mc.inference_ms": ("inference_update", "milliseconds", "milliseconds of an update of the working context"),
}
EVENT_HISTOGRAMS = [  # the same with labels; a name may have several rows
    ("gen_ai.server.request.duration", "chat", "seconds", {}, "seconds of a request"),
    (
        *("gen_ai.server.time_to_first_token", "chat", "gen_ai.response.time_to_first_chunk", {}),
        "seconds from the request to the first text",
    ),
    ("gen_ai.client.token.usage", "chat", "gen_ai.usage.input_tokens", {"gen_ai.token.type": "input"}, "tokens"),
    ("gen_ai.client.token.usage", "chat", "gen_ai.usage.output_tokens", {"gen_ai.token.type": "output"}, "tokens"),
]


def metric_of(key: str) -> tuple[str, dict]:
    """("mc.lod_count", {"lod": 2}) for the key "mc/lod_count/2" of the log; the RL stage's pass@8 likewise."""
    match = re.fullmatch(r"(.+)([/@])(\d+)", key)
    name, labels = (match[1], {"lod" if match[2] == "/" else "k": int(match[3])}) if match else (key, {})
    return re.sub(r"[^\w.]+", "_", name.replace("/", ".")), labels


def as_exported(attributes: dict) -> dict:
    """Attributes as spans have them: dots for slashes, without what is None or not finite."""
    kept = {
        k: v for k, v in attributes.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))
    }
    return {name.replace("/", "."): value for name, value in kept.items()}


class Telemetry:
    """Where events and records of the log go. The base class drops them: what a run without an endpoint has."""

    listens = False  # whether events are kept or sent, so that making them is worth the time

    def event(self, name: str, attributes: dict, seconds: float | None = None):
        """
        Something of EVENTS that ended just now. Returns at once.

        attributes: str, bool, int, float, or a list of one of these. seconds: what it took, else its "milliseconds".
        Raises KeyError for what is not in the table: that is our mistake, and shows in any test.
        """
        known = EVENTS[name]
        for key in attributes:
            if re.sub(r"/\d+$", "/{lod}", key) not in known:
                raise KeyError(f"{name} has no attribute {key!r}")
        seconds = attributes.get("milliseconds", 0.0) / 1000 if seconds is None else seconds
        self._event(name, as_exported(attributes), seconds)

    def metrics(self, record: dict):
        """A record of the log, and the events it tells of; what is no finite number is left out. Returns at once."""
        finite = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._metrics(finite)
        for name, attributes in events_of_step(finite).items():
            self.event(name, attributes)

    def close(self):
        """Send what is still there, for a few seconds at most. May be called again."""

    def _event(self, name, attributes, seconds):
        pass

    def _metrics(self, record):
        pass


# ---------------------------------------------------------------------------------------------------------
# Where the events come from


def tell_session(telemetry, session, entries_read, watch):
    """The events of one prefill or refocus of an MCSession: an `on_update` of it, with the telemetry bound."""
    context, memory = session.context, session.memory()
    telemetry.event("mc_tree_snapshot", {"num_tokens": context.num_tokens, "bytes": memory["tree"]})
    counts = {f"lod_count/{lod}": count for lod, count in lod_counts(context).items()}
    entries = int(context.lengths())
    telemetry.event("working_context_snapshot", {"entries": entries, "budget": session.budget, **counts})
    telemetry.event("focus_allocator", session.focus.records[0].summary())
    read = {"entries_read": entries_read, "entries_kept": entries - entries_read}
    update = {**read, "cache_bytes": memory["cache"], "milliseconds": float(watch)}
    telemetry.event("inference_update", update)


def events_of_step(record: dict) -> dict:
    """name → attributes of the events that a record of the training log tells of; none without --mc."""
    if "mc/tree_tokens" not in record:
        return {}
    step = {"step": record["step"]}
    counts = {key.removeprefix("mc/"): value for key, value in record.items() if key.startswith("mc/lod_count/")}
    return {
        "mc_tree_snapshot": {**step, "num_tokens": record["mc/tree_tokens"]},
        "working_context_snapshot": {**step, "entries": record["mc/wc_entries"], **counts},
        "mc_timing": {**step, "milliseconds": record["mc/time_controller_ms"]},
    }
