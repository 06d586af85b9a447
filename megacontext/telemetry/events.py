"""
Tables of all exported spans and metrics; the base class of exporters; and the functions that turn an update of a
session, or a record of the training log, into spans.

Documentation, dashboards and tests read these tables.
"""

import math
import re

from megacontext.focus_allocator import lod_counts

EVENTS = {  # span → attribute → what it is. In spans a slash is a dot; {lod} is a level
    "mc_tree_snapshot": {
        "step": "optimization step; only in training",
        "num_tokens": "tokens in the tree",
        "bytes": "memory of the tree",
    },
    "working_context_snapshot": {
        "step": "as above",
        "entries": "entries of the working context",
        "budget": "maximum number of entries",
        "lod_count/{lod}": "entries of a level",
    },
    "focus_allocator": {
        "step": "as above",
        "refocuses": "refocuses so far",
        "expansions": "nodes that the last refocus replaced by finer ones",
        "collapses": "groups of siblings that it replaced by their parent",
        "swap_rate": "edits per refocus, divided by the number of entries; mean of all refocuses so far",
        "residency": "mean number of refocuses for which a block keeps its level",
        "score_mean": "mean score of LensNet over the blocks",
        "score_max": "highest score of a block",
        "score_min": "lowest score of a block",
    },
    "mc_timing": {
        "step": "as above",
        "milliseconds": "duration of a micro-batch's forward pass with all losses",
    },
    "inference_update": {
        "entries_read": "entries that the model read",
        "entries_kept": "entries whose keys and values were kept",
        "cache_bytes": "memory of the KV cache",
        "milliseconds": "duration of the update",
    },
    "chat": {  # OpenTelemetry's conventions for generative AI; the span's name is "chat <model>"
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nanochat",
        "gen_ai.request.model": "model that answered",
        "gen_ai.request.temperature": "sampling temperature",
        "gen_ai.request.top_k": "sampling top-k",
        "gen_ai.request.max_tokens": "maximum number of tokens in the answer",
        "gen_ai.usage.input_tokens": "tokens of the prompt",
        "gen_ai.usage.output_tokens": "tokens of the answer, a tool's output included",
        "gen_ai.response.time_to_first_chunk": "seconds from the request to the first text",
        "gen_ai.response.finish_reasons": "stop, length, cancelled or error",
        "gen_ai.conversation.compacted": "whether gists replaced older tokens",
        "error.type": "kind of failure, if there was one",
        "gen_ai.input.messages": "the prompt as the model reads it; off by default",
        "gen_ai.output.messages": "the answer; off by default",
    },
}

METRICS = {  # key in the log → what it is. In the metric's name a slash becomes a dot, and a final number a label
    "step": "optimization step",
    "total_training_tokens": "tokens trained on",
    "total_training_flops": "floating-point operations of training",
    "total_training_time": "seconds of training, the first ten steps left out",
    "train/loss": "training loss, nats per token",
    "train/lrm": "multiplier of the learning rates",
    "train/grad_norm": "norm of the gradients before clipping",
    "train/dt": "seconds of a step",
    "train/tok_per_sec": "tokens trained on per second",
    "train/mfu": "model FLOPs utilization: fraction of the GPU's peak FLOP/s",
    "train/reward": "mean reward of the samples (RL)",
    "train/answer_tokens": "mean length of the samples (RL)",
    "val/bpb": "validation, bits per byte",
    "val/loss": "validation loss, nats per token",
    "val/mc_bpb": "bits per byte of the newest tokens, given a working context",
    "val/mc_full_bpb": "the same, given all tokens",
    "val/mc_truncated_bpb": "the same, given only the last tokens, as many as the budget",
    "val/mc_context_gain": "fraction of the gain of all tokens over the last ones that the working context keeps",
    "core_metric": "CORE",
    "mc/token_loss": "loss of the variants, nats per token; with a frozen model its divergence from the full context",
    "mc/base_loss": "loss of the sequences read in full, nats per token",
    "mc/lod_loss/{lod}": "the variants' loss at targets that follow an entry of this level, nats per token",
    "mc/lens_loss": "divergence of LensNet's scores from the model's attention, in nats",
    "mc/lod_count/{lod}": "entries of a level in a working context",
    "mc/variants_total": "working contexts in a micro-batch",
    "mc/tree_tokens": "tokens in a tree",
    "mc/wc_entries": "entries of a working context",
    "mc/time_controller_ms": "milliseconds of a micro-batch's forward pass",
}

# Metrics of events: name → (event, attribute, what it is). The attribute "seconds" is the duration of the span; an
# attribute per level becomes a metric with a label.
EVENT_GAUGES = {
    "mc.tree_tokens": ("mc_tree_snapshot", "num_tokens", "tokens in a tree"),
    "mc.tree_bytes": ("mc_tree_snapshot", "bytes", "memory of the tree"),
    "mc.wc_entries": ("working_context_snapshot", "entries", "entries of a working context"),
    "mc.wc_lod_count": ("working_context_snapshot", "lod_count.{lod}", "entries of a level in it"),
    "mc.swap_rate": ("focus_allocator", "swap_rate", "edits per refocus, divided by the number of entries"),
    "mc.residency": ("focus_allocator", "residency", "mean number of refocuses for which a block keeps its level"),
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
    """Attributes in the form of spans: dots for slashes, without values that are None or not finite."""
    kept = {
        k: v for k, v in attributes.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))
    }
    return {name.replace("/", "."): value for name, value in kept.items()}


class Telemetry:
    """Receives events and log records. The base class drops them: it serves runs without an endpoint."""

    listens = False  # whether events are written or sent; if not, callers need not make them

    def event(self, name: str, attributes: dict, seconds: float | None = None):
        """
        Export an event in EVENTS that ended just now. Returns at once.

        attributes: str, bool, int, float, or a list of one of these. seconds: its duration, by default that in
        "milliseconds". Raises KeyError for attributes that are not in the table.
        """
        known = EVENTS[name]
        for key in attributes:
            if re.sub(r"/\d+$", "/{lod}", key) not in known:
                raise KeyError(f"{name} has no attribute {key!r}")
        seconds = attributes.get("milliseconds", 0.0) / 1000 if seconds is None else seconds
        self._event(name, as_exported(attributes), seconds)

    def metrics(self, record: dict):
        """Export the finite numbers of a log record, and the events that it implies. Returns at once."""
        finite = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._metrics(finite)
        for name, attributes in events_of_step(finite).items():
            self.event(name, attributes)

    def close(self):
        """Send what is queued, for a few seconds at most. May be called again."""

    def _event(self, name, attributes, seconds):
        pass

    def _metrics(self, record):
        pass


# ---------------------------------------------------------------------------------------------------------
# Where the events come from


def tell_session(telemetry, session, entries_read, watch):
    """Export the events of one prefill or refocus of an MCSession; an `on_update` once telemetry is bound."""
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
    """name → attributes of the events that a record of the training log implies; none without --mc."""
    if "mc/tree_tokens" not in record:
        return {}
    step = {"step": record["step"]}
    counts = {key.removeprefix("mc/"): value for key, value in record.items() if key.startswith("mc/lod_count/")}
    return {
        "mc_tree_snapshot": {**step, "num_tokens": record["mc/tree_tokens"]},
        "working_context_snapshot": {**step, "entries": record["mc/wc_entries"], **counts},
        "mc_timing": {**step, "milliseconds": record["mc/time_controller_ms"]},
    }
