"""
Serve a model: a chat page for browsers, and an API for OpenAI's clients.

    python -m scripts.chat_web                     # the SFT model on one GPU, or on the CPU
    python -m scripts.chat_web -i rl -n 4          # the RL model on four GPUs
    python -m scripts.chat_web --host 0.0.0.0 --api_key @key.txt    # open to the network, for those with the key
    python -m scripts.chat_web --mc                # chats of any length, with a view of where the model looks
    python -m scripts.chat_web --mc --mc_tree disk # … that continue after a restart
    python -m scripts.chat_web --mc --stream library    # … about a stream made by scripts.mc_stream

GET /                        the page
POST /chat/completions       {"messages": [{"role", "content"}], "temperature", "top_k", "max_tokens", "seed"}; answers
                             data: {"token": "…", "gpu": 0} …, data: {"done": true, "finish_reason": "stop"}
                             with {"conversation": "name", "focus": true} and --mc also, at each refocus,
                             event: focus, data: {"focus": {…}}; the name is a secret of 22 characters or more, by
                             which the following requests refer to the conversation
POST /focus                  {"conversation"}: the last focus of the conversation
POST /focus/text             {"conversation", "spans": [[start, end], …]}: the tokens of each span, as text
POST /focus/edits            {"conversation"}: the edits of the newest refocuses, with their times
POST /focus/find             {"conversation", "text", "start"}: where a text occurs, from token start on, in pages
POST /focus/look             {"conversation", "text"}: where LensNet would look for it
POST /forget                 {"conversation"}: delete it
POST /render                 {"texts": […]}: Markdown as safe HTML
GET /health, /stats, /config
POST /v1/chat/completions, /v1/completions, /v1/responses; GET /v1/models: OpenAI's API
GET /openapi.json            a description of these endpoints

SIGTERM and Ctrl-C let running answers finish first.
"""

import json
import logging
import os
import re
import resource
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from megacontext.arrays import Arrays
from megacontext.chat_sessions import ChatSessions
from megacontext.inference import InferenceOptions, about_stream, load_for_inference
from megacontext.kept_chats import KeptChats
from megacontext.reader import Reader
from megacontext.session import MCSession
from megacontext.streams import gist_key_of, make_gists, missing_gists, stream_folder
from megacontext.telemetry.endpoint import open_telemetry
from megacontext.telemetry.events import tell_session
from nanochat import pretrained
from nanochat.checkpoint_manager import checkpoint_root
from nanochat.common import UserError, compute_init, get_base_dir, resolve_dtype
from nanochat.configurator import run, short
from nanochat.engine import Engine
from nanochat.options import DeviceOptions
from nanochat.pretrained import PretrainedOptions
from nanochat.ranges import Range
from nanochat.serving import schema
from nanochat.serving.app import create_app
from nanochat.serving.schema import Defaults, Limits
from nanochat.serving.transport import Server, open_socket
from nanochat.serving.worker_pool import ServedModel, WorkerPool

MAX_OPEN_FILES = 65536
CAPTURE_TEXT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"  # OpenTelemetry's name for it


@dataclass
class Config(PretrainedOptions, DeviceOptions, InferenceOptions):
    num_gpus: Annotated[int, Range(1, 1024), short("-n")] = 1
    """workers, each on a GPU of its own; without GPUs, threads that share the cores"""
    source: Annotated[str, short("-i")] = "sft"
    """stage of the model: sft, rl, mid or base"""
    temperature: Annotated[float, Range(*schema.TEMPERATURE), short("-t")] = 0.8
    """sampling temperature of requests that name none"""
    top_k: Annotated[int, Range(*schema.TOP_K), short("-k")] = 50
    """sample from this many of the likeliest tokens, in requests without top_k"""
    max_tokens: Annotated[int, Range(*schema.MAX_TOKENS), short("-m")] = 512
    """tokens per answer, at most, in requests that name no number"""
    port: Annotated[int, Range(0, 65535), short("-p")] = 8000
    """port to listen on; 0 for any free one"""
    host: str = "127.0.0.1"
    """address to listen on; the default is this machine only, 0.0.0.0 is all networks (the default in nanochat)"""
    api_key: str = ""
    """key that clients must send, or @FILE that contains it; empty for $NANOCHAT_API_KEY, or none if that is not set"""
    allow_origin: str = ""
    """comma-separated origins of other web pages that may send requests (CORS); * for all"""
    batch_size: Annotated[int, Range(1, 1024)] = 32
    """answers that a worker generates at once; with --mc, at most --mc_sessions"""
    queue_size: Annotated[int, Range(0, 100_000)] = 64
    """requests that may wait for a worker; more get 503"""
    max_conversation_chars: Annotated[int, Range(1, 10_000_000)] = -1
    """maximum characters per conversation; -1 for 32,000 and 8,000 per message, or 2,000,000 with --mc"""
    drain_seconds: Annotated[float, Range(0, 3600)] = 30.0
    """seconds that running answers have to finish after SIGTERM or Ctrl-C"""
    mc_sessions: Annotated[int, Range(1, 10_000)] = 8
    """with --mc, maximum conversations that a worker keeps in memory; others are read again at their next turn"""
    stream: str = ""
    """with --mc, name of a stream made by scripts.mc_stream that all conversations are about"""
    mc_keep_chats: Annotated[int, Range(1, 10_000_000)] = 1000
    """with --mc_tree disk, maximum conversations kept on disk; the least recently used are deleted first"""
    mc_keep_gigabytes: Annotated[float, Range(0.001, 1e9)] = 10.0
    """with --mc_tree disk, maximum gigabytes for all conversations on disk"""
    mc_keep_days: Annotated[float, Range(0.001, 1e6)] = 30.0
    """with --mc_tree disk, days that a conversation is kept after its last answer; deleted when a new one begins"""


def check(config):
    """UserError when an option is out of bounds."""
    if config.stream and not config.mc:
        raise UserError("--stream: expected --mc with it, the model alone cannot read so much")
    resolve_dtype(config.dtype, "cpu")
    checkpoint_root(config.source)


def read_key(option):
    """The API key from --api_key or the environment; empty for none. Raises UserError."""
    key = option or os.environ.get("NANOCHAT_API_KEY", "")
    if key.startswith("@"):
        try:
            key = Path(key[1:]).read_text("utf-8").strip() or " "
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the key from {key[1:]} ({error}): expected a file with one line") from error
    if key and not re.fullmatch("[!-~]+", key):
        raise UserError("the API key must be ASCII without spaces, as it goes into a header of HTTP")
    return key


def read_origins(option):
    """The origins in --allow_origin. Raises UserError."""
    origins = [origin.strip() for origin in option.split(",") if origin.strip()]
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise UserError(f"--allow_origin takes origins such as https://chat.example.org, got {origin!r}")
    return origins


def devices(config):
    """The devices, one per worker."""
    device = compute_init(config.device_type)[-1]
    if device.type == "cuda":
        if config.num_gpus > torch.cuda.device_count():
            raise UserError(f"--num_gpus={config.num_gpus}, but this machine has {torch.cuda.device_count()}")
        return [torch.device("cuda", i) for i in range(config.num_gpus)]
    if device.type == "mps" and config.num_gpus > 1:
        raise UserError(f"--num_gpus must be 1 on mps, got {config.num_gpus}")
    return [device] * config.num_gpus


def limits_of(config):
    """The limits of a conversation; by default far higher with --mc."""
    usual, chars = Limits(20_000, 2_000_000, 2_000_000) if config.mc else Limits(), config.max_conversation_chars
    return usual if chars == -1 else Limits(usual.messages, chars, chars)


def load(config, device, on_update=None):
    """(Engine, ServedModel, ChatSessions or None) of one worker. on_update: called by its sessions, see MCSession."""
    source, model, tokenizer, meta = pretrained.load(config, device, companion=config.mc)
    engine = Engine(model, tokenizer, dtype=resolve_dtype(config.dtype, device.type))
    sessions = None
    if config.mc:
        networks, settings = load_for_inference(source, meta, device, config.megacontext, model)
        make_session = partial(MCSession, model, networks, settings, decoder=engine.decoder)
        make_session().close()  # complains now of a budget that is too small
        gist_key, kept, past = gist_key_of(source, meta, tokenizer, settings), None, None
        if config.stream:
            if settings.mc_tree == "disk":
                raise UserError("--stream: expected --mc_tree=ram with it, conversations about a stream are not kept")
            make_session = about_stream(make_session, config.stream, gist_key, device)
            make_session().close()  # complains now of gists that are missing
            past = Arrays(stream_folder(config.stream))
        elif settings.mc_tree == "disk":
            bounds = config.mc_keep_chats, config.mc_keep_gigabytes, config.mc_keep_days
            kept = KeptChats(get_base_dir() / "kept_chats", gist_key, device, *bounds)
        sessions = ChatSessions(make_session, settings, config.mc_sessions, on_update, kept, past)
        folders = kept.folders() if kept else [stream_folder(config.stream)] if config.stream else []
        renew_gists(folders, gist_key, Reader(model, networks, settings))
    return engine, ServedModel(source, meta["model_tag"], meta["step"]), sessions


def renew_gists(folders, gist_key, reader):
    """Compute this model's gists for streams of another model, in the background; sessions use the old ones so far."""

    def work():
        for folder in folders:
            try:
                if missing_gists(folder, gist_key):
                    for _ in make_gists(folder, gist_key, reader.node, reader.embed_for_decoding, reader.device):
                        time.sleep(0.01)  # answers come first
            except UserError as error:  # another worker or process does it, or damage, which readers will report
                logging.info("gists of %s are not renewed: %s", folder.name, error)

    threading.Thread(target=work, name="gists", daemon=True).start()


def describe(config, pool, limits, port, key=""):
    """The banner printed at the start."""
    model = pool.workers[0].engine.model
    where = ", ".join(str(worker.device) for worker in pool.workers)
    everywhere = config.host in ("0.0.0.0", "::")
    name = "localhost" if everywhere else f"[{config.host}]" if ":" in config.host else config.host
    focus = ""
    if pool.sessions:
        mc = pool.sessions[0].describe()
        focus = (
            f"focus   a working context of {mc['budget']:,} entries, blocks of {mc['block_size']} tokens, "
            f"{mc['sessions']} conversations in memory per worker\n"
        )
    return (
        f"model   {pool.model.source}/{pool.model.model_tag}, step {pool.model.step}: "
        f"{model.num_params():,} parameters, context {pool.context_length} tokens, on {where}\n"
        f"{focus}"
        f"limits  {limits.messages:,} messages, {limits.message_chars:,} characters per message, "
        f"{limits.conversation_chars:,} in all, {config.queue_size} waiting requests\n"
        f"API     http://{name}:{port}/v1, model {pool.model.id}\n"
        f"page    http://{name}:{port}/\n"
        + (
            "key     required"
            if key
            else "key     none (--api_key): anyone who can reach this address can use the model"
        )
    )


def chat_attributes(job, outcome, model) -> dict:
    """The attributes of a request's span: counts and settings, no text."""
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nanochat",
        "gen_ai.request.model": model,
        "gen_ai.request.temperature": float(job.sampling.temperature),
        "gen_ai.request.top_k": job.sampling.top_k,
        "gen_ai.request.max_tokens": job.max_tokens,
        "gen_ai.usage.input_tokens": len(job.prompt),
        "gen_ai.usage.output_tokens": len(job.ids),
        "gen_ai.response.time_to_first_chunk": None if job.first is None else job.first - job.created,
        "gen_ai.response.finish_reasons": ["error" if outcome == "failed" else outcome],
        "gen_ai.conversation.compacted": job.compacted,
        "error.type": "worker" if outcome == "failed" else None,
    }


def chat_text(job, tokenizer) -> dict:
    """Prompt and answer as attributes of a span, by OpenTelemetry's conventions."""

    def message(role, ids):
        return json.dumps([{"role": role, "parts": [{"type": "text", "content": tokenizer.decode(ids)}]}])

    return {
        "gen_ai.input.messages": message("user", job.prompt),
        "gen_ai.output.messages": message("assistant", job.ids),
    }


def main(config: Config):
    check(config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))  # a connection is an open file
    limits, key, origins = limits_of(config), read_key(config.api_key), read_origins(config.allow_origin)
    telemetry = open_telemetry("chat_web", f"{config.source}_{config.model_tag or 'largest'}")

    with_text = os.environ.get(CAPTURE_TEXT, "").lower() in ("1", "true", "yes")

    def on_end(job, outcome):
        attributes = chat_attributes(job, outcome, pool.model.id) | (
            chat_text(job, pool.tokenizer) if with_text else {}
        )
        telemetry.event("chat", attributes, time.monotonic() - job.created)

    pool = WorkerPool(config.queue_size, on_end, config.batch_size)
    defaults = Defaults(config.temperature, config.top_k, config.max_tokens)
    app = create_app(pool, limits, defaults, key, origins)
    workers = devices(config)
    server = Server(app, pool, config.drain_seconds)
    failures = []

    with open_socket(config.host, config.port) as listener:
        port = listener.getsockname()[1]

        def start():  # beside the server, which answers 503 meanwhile
            engines, sessions = [], []
            try:
                for device in workers:
                    engine, served, kept = load(
                        config, device, partial(tell_session, telemetry) if telemetry.listens else None
                    )
                    engines.append(engine)
                    sessions.append(kept)
                    if server.should_exit:
                        return
                pool.start(engines, served, sessions)
                print(describe(config, pool, limits, port, key), flush=True)
            except BaseException as error:  # passed on below
                failures.append(error)
                server.should_exit = True

        threading.Thread(target=start).start()
        server.run(sockets=[listener])
    telemetry.close()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    run(main, Config)
