"""What several test modules share: models, tokens, comparisons, files, processes. Fixtures are in conftest.py."""

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from megacontext.config import MCConfig
from megacontext.networks import MCNetworks
from megacontext.objective import MCObjective
from megacontext.telemetry.events import Telemetry
from nanochat import checkpoint_manager as cm
from nanochat.common import atomic_write
from nanochat.configurator import parse
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import BYTES_FILE, count_token_bytes

ROOT = Path(__file__).parent.parent
CORE_BUNDLE = ROOT / "tests" / "core_bundle"
TEXT = [
    "def double(x):\n    return x + x\n",
    "for i in range(10):\n    print(i, double(i))\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n",
    "The quick brown fox jumps over the lazy dog. 3 + 4 = 7, 12 * 12 = 144.\n",
]


# ---------------------------------------------------------------------------------------------------------
# Models and what they read

BOS = 0
T, K, RECENT = 64, 4, 8  # of the models with MegaContext: tokens per sequence, per block, and kept as tokens at the end
SMALL = GPTConfig(sequence_len=T, vocab_size=70, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def make_model(config=SMALL, seed=0, spread=0.3):
    """A model whose zero-initialized matrices are filled too, so that every path matters."""
    torch.manual_seed(seed)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=spread)
    return model


@torch.inference_mode()
def likeliest(model, tokens, max_tokens):
    """Yield the likeliest id after the list `tokens`, again and again, everything computed anew: a slow reference."""
    ids = list(tokens)
    for _ in range(max_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        yield ids[-1]


# Of sessions: a model of 300 tokens, and room for 48 entries
SESSION_GPT = GPTConfig(sequence_len=T, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


SIMPLE = {"gistnet_deep": 0}  # the slow references read gists at the input alone; see tests/test_mc_deep_gists.py


def session_settings(**options) -> MCConfig:
    usual = {"allocator_soft_max": 48, "mc_infer_refocus_interval": 6, "mc_infer_allocator_iterations": 2}
    usual |= {"block_size": K, "allocator_recent_tokens": RECENT, **SIMPLE}
    return MCConfig(**usual | options).resolve(T)


def disturbed_networks(settings, trunk=None):
    """Networks that are not as they begin: gists differ from means."""
    torch.manual_seed(3)
    networks = MCNetworks(SESSION_GPT.n_embd, SESSION_GPT.n_layer, settings, trunk).eval()
    with torch.no_grad():
        for p in networks.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return networks


def make_objective(model, **options):
    options = {"block_size": K, "allocator_recent_tokens": RECENT, "mc_num_random_variants": 3, **SIMPLE, **options}
    config = MCConfig(**options).resolve(model.config.sequence_len)
    torch.manual_seed(1)
    return MCObjective(model, MCNetworks(model.config.n_embd, model.config.n_layer, config, model), config, BOS)


def tokens(B=2, seed=0, vocab=SMALL.vocab_size):
    """Inputs and targets [B, T]."""
    stream = torch.randint(0, vocab, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return stream[:, :-1], stream[:, 1:]


CLOSE = {"atol": 1e-4, "rtol": 1e-4}
"""
Of logits of these small models in float32, whatever the order of sums that a processor prefers: up to 15 (the softcap),
ε = 1.2e-7, and about 3,000 roundings on the way, which add up like a random walk: 15 · ε · √3000 = 1e-4. 4 to 16 times
what was seen with SSE, AVX2 and AVX-512. A wrong mask, position or cache is off by 0.01 and more.
"""


def root_mean_square(x):
    return x.square().mean().sqrt().item()


def assert_equal(a, b):
    """Equal in types, structure and every bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


class Told(Telemetry):
    """Keeps what it is told, [(name, attributes)]."""

    def __init__(self):
        self.events = []

    def _event(self, name, attributes, seconds):
        self.events.append((name, attributes))


# ---------------------------------------------------------------------------------------------------------
# The base folder


def write_tokenizer(tokenizer, base_dir):
    tokenizer.save(base_dir / "tokenizer")
    with atomic_write(base_dir / "tokenizer" / BYTES_FILE) as file:
        torch.save(count_token_bytes(tokenizer), file)


def log_of(base_dir, stage, tag="d1"):
    """The records that a training logged."""
    return [json.loads(line) for line in (base_dir / "logs" / f"{stage}_{tag}.jsonl").read_text().splitlines()]


def weights(base_dir, tag, step):
    return cm.load_checkpoint(base_dir / "base_checkpoints" / tag, step)[0]


# ---------------------------------------------------------------------------------------------------------
# Trainings and other processes

TRAIN = [
    *("--depth=2", "--max_seq_len=64", "--device_batch_size=2", "--total_batch_size=256", "--num_iterations=12"),
    *("--eval_every=6", "--eval_tokens=512", "--core_metric_every=-1", "--sample_every=12", "--save_every=4"),
    *("--device_type=cpu", "--dtype=fp32"),
]
# Of a model of one layer
QUICK = ["--device_type=cpu", "--dtype=fp32", "--device_batch_size=4", "--total_batch_size=256", "--eval_tokens=256"]
QUICK_BASE = [*QUICK, "--depth=1", "--max_seq_len=64", "--core_metric_every=-1", "--sample_every=6", "--eval_every=4"]
WITH_MC = ["--mc", "--mc_start=0", "--block_size=4", "--mc_num_random_variants=2", "--allocator_recent_tokens=8"]


def call_script(script, options):
    """What python -m scripts.<script> does, within this process."""
    module = importlib.import_module(f"scripts.{script}")
    module.main(parse(module.Config, options))


FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.helpers", "scripts.base_train", "scripts.chat_rl"])  # imported once, not by each


def start(function, *args, **environment):
    """A process that calls a function of a module; forked, so that it need not import PyTorch first."""
    process = FORK.Process(target=_call, args=({**os.environ, **environment}, function, args))
    process.start()
    return process


def _call(environment, function, args):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process when they are taken down; not what is tested


def in_ranks(world, function, *args):
    """Call a function in `world` processes, with the environment that torchrun gives them; 1: a process without it."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    environments = [{**group, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)] if world > 1 else [{}]
    ranks = [start(function, *args, **environment) for environment in environments]
    for rank in ranks:
        rank.join(120)
    for rank in ranks:
        rank.kill()  # one that waits for another that failed
    assert [rank.exitcode for rank in ranks] == [0] * world


def run(base_dir, *command, check=True, **env):
    """python -m command, as a user would, in a process of its own."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-m", *map(str, command)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def dry_run(script, *args):
    """What a recipe prints that it would do."""
    result = subprocess.run(["bash", script, "--dry-run", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    return result.stdout


def until(condition, seconds=10.0):
    """Wait for a condition; fail if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
