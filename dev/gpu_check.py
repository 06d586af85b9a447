"""
What a GPU must show: started by dev/gpu_check.sh.

Stages run one after the other, each in a process of its own with a time limit; one that fails or is too slow does not
stop the next. After each, $OUT (default dev/gpu) has gpu_check.json with all figures until then, and the stage's log.

1. tests        equal losses and gradients on CPU and GPU, compiled and eager; equal tokens of graphs
2. throughput   training at depth 12 and 20 with and without --mc
3. decoding     share of the memory bandwidth; --mc beside plain decoding at equal W, with 1M tokens in its tree
4. learning     three minutes of pretraining with --mc on the Python sources of this machine, a resume, then mc_eval
5. server       32 streams at once from that model
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dev import bench
from nanochat.common import UserError, atomic_write, get_base_dir
from nanochat.configurator import parse, run

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    rehearse: bool = False
    """the same in tiny sizes, on the CPU"""
    stages: str = ""
    """comma-separated names of stages; empty for all"""
    out: str = ""
    """folder for the results; empty for $OUT, or dev/gpu"""
    stage: str = ""
    """run this stage here and now: what the program calls itself with"""


def size(config, real, tiny):
    return tiny if config.rehearse else real


@contextmanager
def step(failures, name):
    """A part of a stage. What goes wrong in it is recorded, with its traceback in the log, and the stage goes on."""
    print(f"--- {name}", flush=True)
    started, result = time.time(), "ok"
    try:
        yield
    except (Exception, SystemExit) as error:
        sys.excepthook(type(error), error, error.__traceback__)
        result = f"{type(error).__name__}: {str(error)[:300]}"
        failures.append(name)
    print(json.dumps({"step": name, "result": result, "seconds": round(time.time() - started, 1)}), flush=True)


def call(script, *options):
    """What `python -m scripts.<script>` does, in this process."""
    module = import_module(script)
    module.main(parse(module.Config, list(options)))


def benchmark(config, name, *options):
    device = ["--device_type=cpu", "--dtype=fp32"] if config.rehearse else []
    return bench.main(parse(bench.Config, [name, *device, *options]))


# ---------------------------------------------------------------------------------------------------------
# 1. Tests


def tests(config, failures):
    from tests.on_device import checks

    device = torch.device(size(config, "cuda", "cpu"))
    for name, check in checks(device, compiled=not config.rehearse):  # tests/test_compile.py does it on the CPU
        with step(failures, name):
            check()


# ---------------------------------------------------------------------------------------------------------
# 2. Throughput, 3. decoding


def throughput(config, failures):
    real = ("--device_batch_size=32", "--max_seq_len=2048", "--vocab_size=65536", "--steps=8")
    tiny = ("--device_batch_size=4", "--max_seq_len=64", "--vocab_size=512", "--steps=1", "--block_size=8")
    for depth in size(config, (12, 20), (2,)):
        for mc in (0, 1):
            with step(failures, f"train, depth {depth}, mc {mc}"):
                benchmark(config, "train", f"--depth={depth}", f"--mc={mc}", *size(config, real, tiny))


def decoding(config, failures):
    for depth in size(config, (12, 20), (2,)):
        with step(failures, f"decode, depth {depth}"):
            real = ("--vocab_size=65536", "--repeat=2", "--prompt_tokens=512")
            tiny = ("--vocab_size=512", "--repeat=1", "--new_tokens=4")
            benchmark(config, "decode", f"--depth={depth}", *size(config, real, tiny))
        with step(failures, f"mc-infer, depth {depth}"):
            real = ("--vocab_size=65536", "--max_seq_len=2048", "--stream_tokens=1048576", "--new_tokens=128")
            tiny = ("--vocab_size=512", "--max_seq_len=512", "--stream_tokens=2048", "--new_tokens=32")
            benchmark(config, "mc-infer", f"--depth={depth}", *size(config, real, tiny))


# ---------------------------------------------------------------------------------------------------------
# 4. Learning, 5. the server


def learning(config, failures):
    seconds = size(config, 150, 1)  # of training
    text = size(config, Path(torch.__file__).parent.parent, ROOT / "nanochat")  # all that lies beside PyTorch
    vocab, T, B = size(config, (16384, 2048, 32), (300, 64, 4))
    model = [f"--depth={size(config, 8, 1)}", f"--max_seq_len={T}", f"--device_batch_size={B}"]
    model += ["--mc=1", "--mc_start=0"]
    model += [f"--total_batch_size={2 * B * T}", *size(config, (), ("--block_size=8", "--mc_num_random_variants=1"))]
    device = size(config, (), ("--device_type=cpu",))
    with step(failures, "text and tokenizer"):
        call("nanochat.dataset", f"--source={text}", "-n=1")
        call("scripts.tok_train", f"--vocab_size={vocab}", f"--max_chars={size(config, 60_000_000, 200_000)}")
    with step(failures, "speed"):
        speed = benchmark(config, "train", *model, f"--vocab_size={vocab}", f"--steps={size(config, 4, 1)}")
        steps = int(seconds * speed["tokens/s"] / (2 * B * T))
    with step(failures, "pretraining"):
        call(
            "scripts.base_train",
            *(*model, *device, f"--num_iterations={size(config, max(20, steps), 4)}", "--model_tag=check"),
            *("--core_metric_every=-1", f"--eval_every={size(config, 200, 4)}", f"--eval_tokens={8 * B * T}"),
            *(f"--streams={B}", "--save_every=100", "--keep_last=1", f"--sample_every={size(config, 1000, -1)}"),
        )
    with step(failures, "resuming gives the same weights"):
        never = ("--core_metric_every=-1", "--eval_every=-1", "--sample_every=-1")
        short = [*model, *device, *never, "--num_iterations=4"]
        for tag, every in (("whole", "-1"), ("parts", "2")):
            call("scripts.base_train", *short, f"--model_tag={tag}", f"--save_every={every}")
        from nanochat.checkpoint_manager import load_checkpoint

        folders = {tag: get_base_dir() / "base_checkpoints" / tag for tag in ("whole", "parts")}
        for path in folders["parts"].glob("*_000004*"):
            path.unlink()
        call("scripts.base_train", *short, "--model_tag=parts", "--save_every=2")
        whole, parts = (load_checkpoint(folder, 4, "cpu")[0] for folder in folders.values())
        far = max((whole[name].float() - parts[name].float()).abs().max().item() for name in whole)
        assert far <= size(config, 1e-2, 0.0), f"weights differ by up to {far}"  # a GPU adds in any order
    with step(failures, "what gists keep"):
        quick = (f"--sequences={size(config, 256, 8)}", f"--probe_steps={size(config, 100, 1)}", "--model_tag=check")
        call("scripts.mc_eval", *quick, *device, *size(config, (), ("--ratios=4", "--device_batch_size=4")))
        figures = max((get_base_dir() / "mc_eval").glob("*.json"), key=lambda path: path.stat().st_mtime)
        print(json.dumps({"mc_eval": json.loads(figures.read_text("utf-8"))}))


def server(config, failures):
    import httpx

    streams, length = size(config, 32, 4), size(config, 200, 8)
    device = size(config, (), ("--device_type=cpu",))
    for mc in size(config, (0, 1), (1,)):
        with step(failures, f"{streams} streams, mc {mc}"), chat_server(f"--mc={mc}", *device) as url:
            words = " ".join(path.name for path in sorted(ROOT.rglob("*.py")))[: size(config, 4000, 200)]

            def answer(number, url=url, words=words):
                """Seconds until the first token and until the last, and the number of tokens."""
                body = {
                    "messages": [{"role": "user", "content": f"{number} {words}"}],
                    "max_tokens": length,
                    "seed": number,
                }
                times = [time.perf_counter()]
                with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as response:
                    assert response.status_code == 200, f"status {response.status_code}: {response.read()[:200]}"
                    for line in response.iter_lines():
                        assert '"error"' not in line, line
                        if '"token"' in line:
                            times.append(time.perf_counter())
                return times[min(1, len(times) - 1)] - times[0], times[-1] - times[0], len(times) - 1

            answer(0)  # warms up
            started = time.perf_counter()
            with ThreadPoolExecutor(streams) as pool:
                first, _, counts = zip(*pool.map(answer, range(streams)), strict=True)
            seconds = time.perf_counter() - started
            assert min(counts) > 0, f"{counts.count(0)} of {streams} streams without a token"
            row = {"streams": streams, "mc": mc, "events": sum(counts), "events/s": sum(counts) / seconds}
            row |= {"median first token s": sorted(first)[streams // 2], "slowest first token s": max(first)}
            bench.show("server", [row])


@contextmanager
def chat_server(*options):
    """The address of a chat server on the model of the stage before."""
    command = [sys.executable, "-m", "scripts.chat_web", "-i=base", "-g=check", "-p=0", "--mc_sessions=32", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = None
        for line in process.stdout:
            print(line, end="")
            if line.startswith("page "):
                url = line.split()[1].rstrip("/")
                break
        if url is None:
            raise RuntimeError("the server ended before it listened")
        rest = threading.Thread(target=lambda: print(process.stdout.read()), daemon=True)  # else its pipe fills
        rest.start()
        yield url
    finally:
        process.terminate()
        process.wait(20)


# ---------------------------------------------------------------------------------------------------------

STAGES = {tests: 90, throughput: 150, decoding: 90, learning: 220, server: 50}  # limits in seconds


def machine(config) -> dict:
    """The card, and what ran on it."""
    cuda = torch.cuda.is_available() and not config.rehearse
    return {
        "date": datetime.now().isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "memory GiB": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "rehearsal": config.rehearse,
    }


def run_stage(name, limit, command, log) -> dict:
    """Run a command for at most `limit` seconds; returns what it printed as JSON, and how it ended."""
    started = time.time()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
        try:
            result = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            result = f"ended after {limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the server and the workers that it started
                process.wait()
    lines = log.read_text("utf-8", errors="replace").splitlines()
    figures = [json.loads(line) for line in lines if line.startswith('{"') and line.endswith("}")]
    print(f"{name}: {result}, {time.time() - started:.0f} s ({log})", flush=True)
    return {"stage": name, "result": result, "seconds": round(time.time() - started, 1), "figures": figures}


def main(config: Config):
    stages = {stage.__name__: (stage, limit) for stage, limit in STAGES.items()}
    chosen = config.stages.split(",") if config.stages else list(stages)
    if unknown := [name for name in [*chosen, config.stage or "tests"] if name not in stages]:
        raise UserError(f"--stages: expected some of {', '.join(stages)}, got {unknown[0]!r}")
    if not config.rehearse and not torch.cuda.is_available():
        raise UserError("there is no GPU that PyTorch can use; --rehearse runs the check on the CPU, in tiny sizes")
    if config.stage:
        failures = []
        stages[config.stage][0](config, failures)
        sys.exit(bool(failures))
    out = Path(config.out or os.environ.get("OUT") or ROOT / "dev" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"WANDB_MODE": "disabled", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    report = {**machine(config), "stages": []}
    with TemporaryDirectory() as base:  # of the stages' data and models
        os.environ["NANOCHAT_BASE_DIR"] = base
        for name in chosen:
            command = [sys.executable, "-m", "dev.gpu_check", f"--stage={name}", f"--rehearse={int(config.rehearse)}"]
            report["stages"].append(run_stage(name, stages[name][1], command, out / f"{name}.log"))
            with atomic_write(out / "gpu_check.json", "w") as file:
                json.dump(report, file, indent=1)
    print(out / "gpu_check.json")
    sys.exit(any(stage["result"] != "ok" for stage in report["stages"]))


if __name__ == "__main__":
    run(main, Config)
