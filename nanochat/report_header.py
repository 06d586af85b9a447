"""The head of a report: code version, machine, estimated price, size of the project."""

import platform
import subprocess
import time
import tomllib
from collections import Counter
from pathlib import Path

import psutil
import torch

from nanochat.gpus import gpu_of

PROJECT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = {".py", ".rs", ".html", ".toml", ".sh", ".md"}


def _git(*arguments, folder=PROJECT) -> str | None:
    """Output of a git command in the project; None without git, repository or commit."""
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def git_info() -> dict:
    commit = _git("rev-parse", "--short", "HEAD")
    if commit is None:
        return {"Git": "no commit"}
    return {
        "Branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "Commit": f"{commit} ({'with' if _git('status', '--porcelain') else 'no'} uncommitted changes)",
        "Message": _git("log", "-1", "--format=%s")[:80],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def gpus() -> list[tuple[str, float]]:
    """(name, memory in GiB) of every CUDA device."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(device.name, device.total_memory / 2**30) for device in devices]


def price_per_hour(names) -> float | None:
    """Estimate in US dollars for these GPUs together; None if there are none or one is not in the table."""
    prices = [gpu_of(name).price for name in names]
    return None if not prices or None in prices else sum(prices)


def hardware_info() -> dict:
    cores, threads = psutil.cpu_count(logical=False), psutil.cpu_count()
    found = gpus()
    kinds = Counter(f"{name} ({memory:.0f} GiB)" for name, memory in found)
    price = price_per_hour([name for name, _ in found])
    return {
        "Platform": platform.platform(terse=True),
        "CPU": f"{_cpu_model()} ({cores or 'unknown number of'} cores, {threads} threads)",
        "Memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPUs": ", ".join(f"{count} × {kind}" for kind, count in kinds.items()) or "none",
        "Cost estimate": f"${price:.2f} per hour" if price else "unknown for this machine",
    }


def software_info() -> dict:
    return {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda if torch.cuda.is_available() else "not in use",
    }


def size_info(folder=PROJECT) -> dict:
    """Characters, lines and files of the sources under version control, and the number of packages they depend on."""
    listed = (_git("ls-files", "-z", folder=folder) or "").split("\0")
    paths = [folder / name for name in listed if Path(name).suffix in SOURCE_SUFFIXES]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]
    characters = sum(map(len, texts))
    info = {
        "Characters": characters,
        "Lines": sum(text.count("\n") for text in texts),
        "Files": len(texts),
        "Tokens (approx)": characters // 4,
    }
    lock = folder / "uv.lock"
    if lock.is_file():
        packages = tomllib.loads(lock.read_text(encoding="utf-8")).get("package", [])
        info["Dependencies (uv.lock packages)"] = sum("virtual" not in p.get("source", {}) for p in packages)
    return info


def header_info() -> dict[str, dict]:
    """Title → facts of each part of the header."""
    return {
        "Run": {"Started": time.strftime("%Y-%m-%d %H:%M:%S")},
        "Code": git_info(),
        "Hardware": hardware_info(),
        "Software": software_info(),
        "Size of the project": size_info(),
    }
