"""
What a run tells a collector: spans of what MegaContext does, and the figures of the log.

    MC_OTEL_ENDPOINT=http://localhost:4318     OTLP over HTTP; over gRPC with port 4317 or as grpc://host:port
    MC_OTEL_ENDPOINT=file:events.jsonl         a line of JSON for each event and each record
    MC_OTEL_INSECURE=1                         grpc:// without TLS; https:// without a look at the certificate
    OTEL_EXPORTER_OTLP_HEADERS=k=v,…           sent along, such as a token (read by OpenTelemetry itself)

Without an endpoint nothing is exported and nothing is imported for it. An endpoint that refuses, hangs or goes away
costs a run neither time nor its end: what cannot be sent is dropped, with one warning. Text never leaves: spans hold
counts, times and names. The tables below are all that is told; documentation, dashboards and tests read them.
"""

import atexit
import contextlib
import json
import math
import os
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nanochat.common import UserError, get_dist_info

EVENTS = {  # span → attribute → what it is. In spans a slash is a dot; {lod} is a level
    "mc_tree_snapshot": {
        "step": "optimization step; none while answering",
        "num_tokens": "tokens in the tree",
        "nodes/{lod}": "nodes of a level",
        "bytes": "memory of the tree",
    },
    "working_context_snapshot": {
        "step": "as above",
        "row": "which of the streams that are answered together",
        "entries": "entries of the working context",
        "budget": "entries it may have",
        "lod_count/{lod}": "entries of a level",
    },
    "focus_allocator": {
        "step": "as above",
        "row": "as above",
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
        "build_ms": "milliseconds for embeddings, tree and variants",
        "positional_ms": "for positions as cosines and sines",
        "model_ms": "for the model's passes over working contexts and tokens",
        "lens_forward_ms": "for LensNet, and the gists it teaches",
        "lens_loss_ms": "for what it learns from: the dense model's attention",
        "milliseconds": "for all of the controller, the model's own passes included",
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
    "mc/lens_loss": "mean squared error of LensNet's scores",
    "mc/adv_delta_mean": "mean difference in loss between two variants",
    "mc/adv_delta_p95": "95th percentile of the same",
    "mc/preference_agreement": "part of the pairs, by weight, that LensNet foretells",
    "mc/lod_count/{lod}": "entries of a level in a working context",
    "mc/variants_total": "working contexts in a batch",
    "mc/time_controller_ms": "milliseconds that the controller takes for a batch",
}

# Metrics of events: name → (event, attribute, what it is). Attribute "seconds" is the duration of the span; one of each
# level becomes a metric with a label.
EVENT_GAUGES = {
    "mc.tree_tokens": ("mc_tree_snapshot", "num_tokens", "tokens in the tree"),
    "mc.tree_bytes": ("mc_tree_snapshot", "bytes", "memory of the tree"),
    "mc.wc_entries": ("working_context_snapshot", "entries", "entries of the working context"),
    "mc.wc_lod_count": ("working_context_snapshot", "lod_count.{lod}", "entries of a level in it"),
    "mc.swap_rate": ("focus_allocator", "swap_rate", "edits over entries, of all refocuses so far"),
    "mc.residency": ("focus_allocator", "residency", "refocuses that a block keeps its level for"),
    "mc.build_ms": ("mc_timing", "build_ms", "milliseconds for embeddings, tree and variants"),
    "mc.positional_ms": ("mc_timing", "positional_ms", "milliseconds for positions"),
    "mc.lens_forward_ms": (
        "mc_timing",
        "lens_forward_ms",
        "milliseconds for LensNet, and the gists it teaches",
    ),
    "mc.lens_loss_ms": ("mc_timing", "lens_loss_ms", "milliseconds for its loss"),
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


@dataclass(frozen=True)
class Endpoint:
    """Where to send. protocol: "http", "grpc" or "file"; target: a URL, host:port or path; tls: encrypted."""

    protocol: str
    target: str
    tls: bool = False
    verify: bool = True


def parse_endpoint(text: str, insecure: bool = False) -> Endpoint:
    """What MC_OTEL_ENDPOINT and MC_OTEL_INSECURE say. Raises UserError."""
    complaint = UserError(
        f"MC_OTEL_ENDPOINT must be like http://localhost:4318, grpc://localhost:4317 or file:events.jsonl, got {text!r}"
    )
    scheme, _, rest = text.partition(":")
    if scheme == "file" and rest.removeprefix("//"):
        return Endpoint("file", rest.removeprefix("//"))
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise complaint from None
    if scheme not in ("http", "https", "grpc") or not url.hostname:
        raise complaint
    if scheme == "grpc" or port == 4317:
        tls = scheme == "https" or (scheme == "grpc" and not insecure)
        return Endpoint("grpc", url.netloc if port else f"{url.netloc}:4317", tls)
    return Endpoint("http", text.rstrip("/"), scheme == "https", verify=not insecure)


class Telemetry:
    """Goes nowhere: what a run without an endpoint has, and what the others are kinds of."""

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
        """A record of the log; what is no finite number is left out. Returns at once."""
        self._metrics({k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)})

    def close(self):
        """Send what is still there, for a few seconds at most. May be called again."""

    def _event(self, name, attributes, seconds):
        pass

    def _metrics(self, record):
        pass


class JSONLines(Telemetry):
    """A line {"time", "service", "run", "event", "seconds", …attributes} or {"time", …, "metrics": {…}} each."""

    def __init__(self, path, head):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (lives as long as the run)
        except OSError as error:
            raise UserError(f"MC_OTEL_ENDPOINT: cannot write to {path} ({error.strerror})") from error
        self.head, self.path = head, path

    def _event(self, name, attributes, seconds):
        self._write({"event": name, "seconds": seconds, **attributes})

    def _metrics(self, record):
        self._write({"metrics": record})

    def _write(self, record):
        if self.file is None:
            return
        try:
            self.file.write(json.dumps({"time": time.time(), **self.head, **record}) + "\n")
        except OSError as error:  # a full disk, most likely: the run goes on without
            warnings.warn(f"MC_OTEL_ENDPOINT: no more telemetry, {self.path}: {error.strerror}", stacklevel=2)
            self.close()

    def close(self):
        file, self.file = self.file, None
        if file:
            with contextlib.suppress(OSError):  # what could not be written before cannot be flushed now
                file.close()


def open_telemetry(service: str, run: str, attributes: dict | None = None) -> Telemetry:
    """
    What the environment asks for; on ranks other than the first, nothing.

    service: the script, "base_train"; run: which of its runs, "d4"; attributes: more that tells the run, such as
    {"device": "cpu"}. Raises UserError for an endpoint that makes no sense.
    """
    text = os.environ.get("MC_OTEL_ENDPOINT", "").strip()
    if not text or get_dist_info()[1] != 0:
        return Telemetry()
    endpoint = parse_endpoint(text, os.environ.get("MC_OTEL_INSECURE", "0").lower() in ("1", "true", "yes"))
    if endpoint.protocol == "file":
        telemetry = JSONLines(endpoint.target, {"service": service, "run": run, **(attributes or {})})
    else:
        from megacontext.otlp import OTLP  # here: about a second and 40 MB that others are spared

        resource = {"service.name": service, "service.instance.id": run, **(attributes or {})}
        telemetry = OTLP(endpoint, resource)
    atexit.register(telemetry.close)  # for runs that end by an error
    return telemetry
