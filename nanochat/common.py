"""Basics for all modules: folders, atomic files, processes, devices, errors for users."""

import contextlib
import fcntl
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nanochat.gpus import gpu_of

SEED = 42  # of a process, before a script draws anything


class UserError(ValueError):
    """An error that the user can fix. The message says what was expected, what was found, and what to do."""


def encodable(text: str) -> str:
    """The text with U+FFFD for each unpaired surrogate, which JSON can encode and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def get_base_dir() -> Path:
    """$NANOCHAT_BASE_DIR (default ~/.cache/nanochat): the folder of all data, checkpoints and reports."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")
    try:
        path = path.expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: neither HOME nor an entry of this user in passwd
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot create {path} ({reason}): set NANOCHAT_BASE_DIR to a writable folder") from error
    return path


def sync(path):
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """
    Open a temporary file beside `path` and, if the block ends well, flush it to disk and rename it to `path`.

    Readers see the old file or the complete new one, even if the process is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)  # the rename itself must reach the disk too
    except OSError as error:
        if error.errno and not error.filename:  # the error of a full disk does not name the file
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # in a folder without write permission there is nothing to remove
            temporary.unlink()


@contextlib.contextmanager
def locked(folder, refusal=""):
    """
    Lock a folder, created if necessary, against other processes. The kernel releases the lock when the process ends.

    If another process holds it: raises UserError with the text `refusal`, or without one waits for it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if refusal:
                raise UserError(refusal) from None
            print(f"waiting for another process that fills {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class JSONLines:
    """A file to which each record is appended as a line of JSON. Failing to write it never ends a run."""

    def __init__(self, path):
        """Raises OSError."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (lives as long as the run)

    def write(self, record: dict):
        """Add a record. The first failure is reported; records from then on are lost."""
        if self.file.closed:
            return
        try:
            self.file.write(json.dumps(record) + "\n")
        except OSError as error:
            print0(f"the run continues without {self.file.name}: {error.strerror}")
            self.close()

    def close(self):
        with contextlib.suppress(OSError):  # what could not be written before cannot be written now
            self.file.close()


# ---------------------------------------------------------------------------------------------------------
# Processes and devices


def get_dist_info():
    """(is_distributed, rank, local_rank, world_size); torchrun sets the environment variables read here."""
    values = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if not any(values.values()):
        return False, 0, 0, 1
    try:
        return True, *map(int, values.values())
    except (TypeError, ValueError):
        got = ", ".join(f"{name}={'unset' if value is None else value}" for name, value in values.items())
        raise UserError(
            f"expected RANK, LOCAL_RANK and WORLD_SIZE all set, as torchrun does, or none of them, got {got}: "
            "launch with torchrun, or unset them for a single process"
        ) from None


def print0(*args, **kwargs):
    """Print on the first process only."""
    if get_dist_info()[1] == 0:
        print(*args, **kwargs, flush=True)


def compute_init(device_type: str = ""):
    """
    Choose the device ("" for the best available), seed all random generators, join the process group under torchrun.

    Returns (is_distributed, rank, local_rank, world_size, device).
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, there in available.items() if there]
    device_type = device_type or available[0]
    if device_type not in available:
        raise UserError(f"device_type {device_type!r} is not available here; available: {', '.join(available)}")
    is_dist, rank, local_rank, world_size = get_dist_info()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if is_dist and not os.environ.get(name)]
    if missing:
        raise UserError(f"RANK is set but {' and '.join(missing)} not: launch with torchrun, or unset RANK")
    if device_type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine needs a GPU of its own, and there are "
            f"{torch.cuda.device_count()}: lower --nproc_per_node"
        )
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # tf32 for the products that autocast leaves in float32
        # On Hopper PyTorch asks cuDNN first, which plans for up to a second whenever a sequence has a new length
        torch.backends.cuda.enable_cudnn_sdp(False)
    if is_dist and not dist.is_initialized():
        if device_type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        dist.barrier()
    return is_dist, rank, local_rank, world_size, device


def compute_cleanup():
    if dist.is_initialized():
        dist.barrier()  # end the process group at exit
        dist.destroy_process_group()


def has_fast_bf16(device_type: str) -> bool:
    """Whether matrix products in bf16 are faster than in float32 on this device: older GPUs only emulate them."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        with contextlib.suppress(OSError):  # no such file: not Linux, so take the safe answer
            flags = Path("/proc/cpuinfo").read_text()
            return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def resolve_dtype(name: str, device_type: str) -> torch.dtype:
    """--dtype auto|bf16|fp32 (or nanochat's bfloat16|float32) as a torch dtype; auto is bf16 where that is faster."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device_type) else "fp32"
    if name in ("bf16", "bfloat16"):
        return torch.bfloat16
    if name in ("fp32", "float32"):
        return torch.float32
    raise UserError(f"--dtype must be auto, bf16 or fp32, got {name!r}")


class Stopwatch:
    """
    Milliseconds of a device's work between `Stopwatch(device)` and `stop()`, as `float(watch)`.

    On CUDA that is the time of the work and not of its launch, and only `float` waits for it.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.began = self._now()

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self):
        self.ended = self._now()

    def __float__(self):
        if not self.cuda:
            return 1000 * (self.ended - self.began)
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype for long sums on a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_over_ranks(tensor):
    """The tensor, now holding the sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def autocast(device: torch.device, dtype: torch.dtype):
    """Context in which matrix products run in `dtype`, bfloat16 or float32, regardless of an outer autocast."""
    assert dtype in (torch.float32, torch.bfloat16), dtype
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def autocast_dtype(device_type: str, otherwise: torch.dtype) -> torch.dtype:
    """The precision of a surrounding autocast on this type of device; `otherwise` where there is no autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else otherwise


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of this GPU in FLOP/s; None for a device that is not in the table: it has no MFU."""
    return gpu_of(torch.cuda.get_device_name(device)).flops if device.type == "cuda" else None


def fail(error: UserError):
    """End the program with the message of a UserError, shown once, and a non-zero exit code."""
    rank = os.environ.get("RANK", "0")  # read directly, since this variable may be the error
    who = f"rank {rank}: " if rank != "0" else ""  # an error may concern one rank only, such as a damaged file
    print(f"\n{who}error: {error}", file=sys.stderr, flush=True)
    sys.exit(1)
