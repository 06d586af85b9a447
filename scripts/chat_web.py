"""
Serve a model: a chat page for browsers, and an API for OpenAI's clients.

    python -m scripts.chat_web                     # the SFT model on one GPU, or on the CPU
    python -m scripts.chat_web -i rl -n 4          # the RL model on four GPUs
    python -m scripts.chat_web --host 127.0.0.1    # for this machine only

GET /                        the page
POST /chat/completions       {"messages": [{"role", "content"}], "temperature", "top_k", "max_tokens", "seed"}; answers
                             data: {"token": "…", "gpu": 0} …, data: {"done": true, "finish_reason": "stop"}
POST /v1/chat/completions    as OpenAI's, streaming or not; also GET /v1/models
POST /render                 {"texts": […]}: Markdown as safe HTML
GET /health, /stats, /config

SIGTERM and Ctrl-C let running answers finish first.
"""

import logging
import resource
import threading
import time
from dataclasses import dataclass
from typing import Annotated

import torch

from megacontext.telemetry import open_telemetry
from nanochat.checkpoint_manager import checkpoint_root, load_model
from nanochat.common import UserError, compute_init, resolve_dtype
from nanochat.configurator import run, short
from nanochat.engine import Engine
from nanochat.serving import schema
from nanochat.serving.app import create_app
from nanochat.serving.schema import Defaults, Limits
from nanochat.serving.transport import Server, open_socket
from nanochat.serving.worker_pool import ServedModel, WorkerPool

MAX_OPEN_FILES = 65536


@dataclass
class Config:
    num_gpus: Annotated[int, short("-n")] = 1
    """workers, each on a GPU of its own; without GPUs, threads that share the cores"""
    source: Annotated[str, short("-i")] = "sft"
    """stage of the model: sft, rl, mid or base"""
    temperature: Annotated[float, short("-t")] = 0.8
    """where a request names none"""
    top_k: Annotated[int, short("-k")] = 50
    """where a request names none"""
    max_tokens: Annotated[int, short("-m")] = 512
    """of one answer, where a request names none"""
    model_tag: Annotated[str, short("-g")] = ""
    """model to load; empty for the largest"""
    step: Annotated[int, short("-s")] = -1
    """checkpoint to load; -1 for the newest"""
    port: Annotated[int, short("-p")] = 8000
    """to listen on; 0 for any free one"""
    host: str = "0.0.0.0"
    """address to listen on; 127.0.0.1 for this machine only"""
    dtype: Annotated[str, short("-d")] = "auto"
    """auto, bf16 or fp32"""
    device_type: str = ""
    """cuda, cpu or mps; empty for the best there is"""
    queue_size: int = 64
    """requests that may wait for a worker; more get 503"""
    max_messages: int = 500
    """of one conversation"""
    max_message_chars: int = 8000
    """characters of one message"""
    max_conversation_chars: int = 32000
    """characters of one conversation"""
    drain_seconds: float = 30.0
    """for running answers to finish when the server is told to end"""


def check(config):
    """UserError when an option is out of bounds."""
    bounds = {
        "temperature": schema.TEMPERATURE,
        "top_k": schema.TOP_K,
        "max_tokens": schema.MAX_TOKENS,
        "num_gpus": (1, 1024),
        "queue_size": (0, 100_000),
        "max_messages": (1, 100_000),
        "max_message_chars": (1, 10_000_000),
        "max_conversation_chars": (1, 10_000_000),
        "drain_seconds": (0, 3600),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name} must be {low} to {high}, got {getattr(config, name)}")
    if config.dtype not in ("auto", "bf16", "fp32"):
        raise UserError(f"--dtype must be auto, bf16 or fp32, got {config.dtype!r}")
    checkpoint_root(config.source)


def devices(config):
    """One a worker."""
    device = compute_init(config.device_type)[-1]
    if device.type == "cuda":
        if config.num_gpus > torch.cuda.device_count():
            raise UserError(f"--num_gpus={config.num_gpus}, but this machine has {torch.cuda.device_count()}")
        return [torch.device("cuda", i) for i in range(config.num_gpus)]
    if device.type == "mps" and config.num_gpus > 1:
        raise UserError(f"--num_gpus must be 1 on mps, got {config.num_gpus}")
    return [device] * config.num_gpus


def load(config, device):
    """(Engine, ServedModel) of one worker."""
    step = None if config.step == -1 else config.step
    model, tokenizer, meta = load_model(config.source, device, "eval", config.model_tag or None, step)
    engine = Engine(model, tokenizer, dtype=resolve_dtype(config.dtype, device.type), fixed=True)
    return engine, ServedModel(config.source, meta["model_tag"], meta["step"])


def describe(config, pool, limits, port):
    """What a person who starts the server wants to know."""
    model = pool.workers[0].engine.model
    where = ", ".join(str(worker.device) for worker in pool.workers)
    everywhere = config.host in ("0.0.0.0", "::")
    name = "localhost" if everywhere else f"[{config.host}]" if ":" in config.host else config.host
    return (
        f"model   {pool.model.source}/{pool.model.model_tag}, step {pool.model.step}: "
        f"{model.num_params():,} parameters, context {pool.context_length} tokens, on {where}\n"
        f"limits  {limits.messages} messages, {limits.message_chars:,} characters a message, "
        f"{limits.conversation_chars:,} in all, {config.queue_size} waiting requests\n"
        f"API     http://{name}:{port}/v1, model {pool.model.id}\n"
        f"page    http://{name}:{port}/" + (" (open to the network; --host 127.0.0.1 closes it)" if everywhere else "")
    )


def chat_attributes(job, outcome, model) -> dict:
    """What a span tells of a request: counts and settings, never text."""
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nanochat",
        "gen_ai.request.model": model,
        "gen_ai.request.temperature": float(job.temperature),
        "gen_ai.request.top_k": job.top_k,
        "gen_ai.request.max_tokens": job.max_tokens,
        "gen_ai.usage.input_tokens": len(job.prompt),
        "gen_ai.usage.output_tokens": job.tokens,
        "gen_ai.response.time_to_first_chunk": None if job.first is None else job.first - job.created,
        "gen_ai.response.finish_reasons": ["error" if outcome == "failed" else outcome],
        "gen_ai.conversation.compacted": job.compacted,
        "error.type": "worker" if outcome == "failed" else None,
    }


def main(config: Config):
    check(config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))  # a connection is an open file
    limits = Limits(config.max_messages, config.max_message_chars, config.max_conversation_chars)
    telemetry = open_telemetry("chat_web", f"{config.source}_{config.model_tag or 'largest'}")

    def on_end(job, outcome):
        telemetry.event("chat", chat_attributes(job, outcome, pool.model.id), time.monotonic() - job.created)

    pool = WorkerPool(config.queue_size, on_end)
    app = create_app(pool, limits, Defaults(config.temperature, config.top_k, config.max_tokens))
    workers = devices(config)
    server = Server(app, pool, config.drain_seconds)
    failures = []

    with open_socket(config.host, config.port) as listener:
        port = listener.getsockname()[1]

        def start():  # beside the server, which answers 503 meanwhile
            engines = []
            try:
                for device in workers:
                    engine, served = load(config, device)
                    engines.append(engine)
                    if server.should_exit:
                        return
                pool.start(engines, served)
                print(describe(config, pool, limits, port), flush=True)
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
