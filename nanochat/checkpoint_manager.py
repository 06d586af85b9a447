"""
Checkpoints: a kill or a full disk costs at most the checkpoint being written; damaged ones are detected by checksums.

A step's files are model_%06d.pt, mc_%06d.pt if networks go with the model, optim_%06d.pt and state_%06d.pt (one of
the latter two for each rank, the first rank's without a suffix), meta_%06d.json, and last manifest_%06d.json with
the size and SHA-256 of all but the meta data, which learns of evaluations later.
Without its manifest a step does not exist. Steps saved by nanochat, which knew no manifest, are read too.
"""

import hashlib
import json
import random
import re
import shutil
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nanochat.common import UserError, atomic_write, get_base_dir, get_dist_info, print0
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import get_tokenizer

SOURCES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
MAX_SIZE = 2**20  # of what a model is described by, such as its vocabulary and its context
FOLDERS = SOURCES | {"hf": "hf_networks"}  # and of networks for models of transformers, whose weights lie elsewhere


def checkpoint_root(source: str) -> Path:
    """The folder that holds all checkpoints of a stage, or of "hf"."""
    if source not in FOLDERS:
        raise UserError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    return get_base_dir() / FOLDERS[source]


def model_folder(source: str, model_tag: str) -> Path:
    """The folder of a model's checkpoints. UserError unless the tag can be a folder's name."""
    if not re.fullmatch(r"\w[\w.+=@-]*", model_tag):
        raise UserError(f"a model_tag is a name of letters, digits and _ . + = @ -, such as d20, got {model_tag!r}")
    return checkpoint_root(source) / model_tag


# ---------------------------------------------------------------------------------------------------------
# One step's files


def _file(folder, kind, step, rank=0):
    suffix = f"_rank{rank}" if rank else ""
    return Path(folder) / f"{kind}_{step:06d}{suffix}.{'json' if kind in ('meta', 'manifest') else 'pt'}"


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(folder, step) -> dict | None:
    """File name → its size and checksum, of a step; None for one of nanochat's."""
    path = _file(folder, "manifest", step)
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _write_json(path, data):
    with atomic_write(path, "w") as file:
        json.dump(data, file, indent=2)


def _write_tensors(path, data):
    with atomic_write(path) as file:
        try:
            torch.save(data, file)
        except RuntimeError as error:  # a full disk: torch hides the OSError behind a complaint of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def read_tensors(path, device):
    """torch.load without code execution; UserError when the file is not what it should be."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: choose another --step, or train again") from error
    except Exception as error:  # torch.load raises a dozen kinds for damaged files; none is passed over
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error})") from error


def rng_state():
    """The state of every random generator of this process, in types that torch.load admits."""
    _, key, pos, *_ = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (key.tolist(), pos),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of this process's device
    }


def set_rng_state(state):
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key, pos = state["numpy"]
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), pos))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())


def save_checkpoint(
    folder, step, model_data, optimizer_data=None, meta_data=None, loader_state=None, companion_data=None
):
    """
    Write one step. Every rank must call this: each writes its optimizer and loader state, the first the rest.

    model_data: None where the model's weights lie elsewhere. optimizer_data: the state dicts of the optimizers.
    meta_data: what JSON can hold. companion_data: state dict of networks that go with the model, as MegaContext's do.
    Raises UserError when the disk refuses; steps written before are untouched.
    """
    is_dist, rank, _, world_size = get_dist_info()
    folder = Path(folder)
    try:
        written = []
        if rank == 0:
            for kind, data in (("model", model_data), ("mc", companion_data)):
                if data is not None:
                    written.append(_file(folder, kind, step))
                    _write_tensors(written[-1], data)
        if optimizer_data is not None:
            written.append(_file(folder, "optim", step, rank))
            _write_tensors(written[-1], optimizer_data)
            written.append(_file(folder, "state", step, rank))
            _write_tensors(written[-1], {"loader": loader_state, "rng": rng_state()})
        entries = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in written}
        if is_dist:
            of_all_ranks = [None] * world_size
            dist.all_gather_object(of_all_ranks, entries)
            entries = {name: entry for part in of_all_ranks for name, entry in part.items()}
        if rank == 0:
            meta_data = {**(meta_data or {}), "world_size": world_size, "manifest": True}
            _write_json(_file(folder, "meta", step), meta_data)
            _write_json(_file(folder, "manifest", step), entries)
        if is_dist:
            dist.barrier()
    except OSError as error:
        raise UserError(
            f"cannot write the checkpoint of step {step} to {folder} ({error.strerror or error}): "
            "free some space or fix the folder and start again; earlier checkpoints are whole"
        ) from error


def amend_meta(folder, step, **facts):
    """Add results that came after a step was saved, such as evaluations, to its metadata (on the first rank)."""
    if get_dist_info()[1] == 0:
        path = _file(folder, "meta", step)
        _write_json(path, {**json.loads(path.read_text("utf-8")), **facts})


def why_incomplete(folder, step) -> str | None:
    """What keeps a step from being used: a file that is missing or cut (contents are checked when loaded), or None."""
    folder, path = Path(folder), _file(folder, "meta", step)
    try:
        meta = json.loads(path.read_text("utf-8"))
        sizes = {_file(folder, "model", step).name: None}  # of nanochat's checkpoints, whose last file is the meta data
        if meta.get("manifest"):
            path = _file(folder, "manifest", step)
            sizes = {name: entry["bytes"] for name, entry in json.loads(path.read_text("utf-8")).items()}
        for name, size in sizes.items():
            path = folder / name
            there = path.stat().st_size
            if there != size and not (size is None and there) and not name.startswith("meta"):
                return f"{name} has {there:,} bytes" + (f" of {size:,}" if size else "")
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"{path.name} is damaged ({error})"
    return None


def _verify(folder, step, names):
    """Compare checksums of these files with the manifest, where the step has one."""
    manifest = _manifest(folder, step) or {}
    for name in names:
        if name in manifest and _sha256(Path(folder) / name) != manifest[name]["sha256"]:
            raise UserError(
                f"{Path(folder) / name} is damaged (its checksum differs from the manifest): "
                "delete this step's files and use another --step, or train again"
            )


def load_meta(folder, step) -> dict:
    """The meta data of a complete step."""
    reason = why_incomplete(folder, step)
    if reason:
        raise UserError(f"there is no complete checkpoint of step {step} in {folder} ({reason}): choose another --step")
    return json.loads(_file(folder, "meta", step).read_text("utf-8"))


def has_optimizer_state(folder, step) -> bool:
    """Whether training can resume from this step exactly: not from nanochat's, which lack most ranks' optimizers."""
    return _file(folder, "state", step).exists()


def weights_checksum(folder, step, kind="model") -> str:
    """SHA-256 of a step's model file, or of another kind of file: it identifies the weights."""
    path, manifest = _file(folder, kind, step), _manifest(folder, step)
    return _sha256(path) if manifest is None else manifest[path.name]["sha256"]


def load_checkpoint(folder, step, device="cpu", load_optimizer=False):
    """
    (model_data, optimizer_data, meta_data, state) of a step; the second and fourth None unless asked for, the first
    where the model's weights lie elsewhere.

    state is {"loader": …, "rng": …} of this rank. UserError for files that are missing or damaged, and for
    optimizer state written by another number of processes.
    """
    folder = Path(folder)
    _, rank, _, world_size = get_dist_info()
    meta_data = load_meta(folder, step)
    model, paths = _file(folder, "model", step), []
    if load_optimizer:
        if meta_data.get("world_size", world_size) != world_size:
            raise UserError(
                f"the checkpoint of step {step} in {folder} was written by {meta_data['world_size']} processes "
                f"and only as many can resume from it exactly; got {world_size}. Launch with "
                f"--nproc_per_node={meta_data['world_size']}, or start anew with --resume=0"
            )
        paths = [_file(folder, "optim", step, rank), _file(folder, "state", step, rank)]
    _verify(folder, step, [path.name for path in (model, *paths) if path.exists()])
    model_data = read_tensors(model, device) if model.exists() else None
    if not load_optimizer:
        return model_data, None, meta_data, None
    return model_data, read_tensors(paths[0], device), meta_data, read_tensors(paths[1], "cpu")


def load_companion(folder, step, device="cpu"):
    """State dict of the networks saved beside the model of a step; None if it has none."""
    path = _file(folder, "mc", step)
    if not path.exists():
        return None
    _verify(folder, step, [path.name])
    return read_tensors(path, device)


# ---------------------------------------------------------------------------------------------------------
# Finding


def _steps(folder) -> list[int]:
    """The steps for which there is a model file or a companion file, the newest first."""
    matches = (re.fullmatch(r"(?:model|mc)_(\d{6,})\.pt", path.name) for path in Path(folder).glob("m*.pt"))
    return sorted({int(match[1]) for match in matches if match}, reverse=True)


def complete_steps(folder) -> list[int]:
    """The steps that can be used, the newest first."""
    return [step for step in _steps(folder) if why_incomplete(folder, step) is None]


def find_last_step(folder, report=None) -> int | None:
    """The newest complete step in a folder, or None. report(line) is called for each newer, incomplete one."""
    for step in _steps(folder):
        reason = why_incomplete(folder, step)
        if reason is None:
            return step
        if report:
            report(f"step {step} in {folder} is passed over: {reason}")
    return None


def prune(folder, keep: int):
    """Delete all complete steps but the newest `keep`; the manifest goes first, so that none is ever there in part."""
    folder = Path(folder)
    ours = [(step, files) for step in complete_steps(folder) if (files := _manifest(folder, step)) is not None]
    for step, files in ours[keep:]:
        _file(folder, "manifest", step).unlink()
        for name in [*files, _file(folder, "meta", step).name]:
            (folder / name).unlink(missing_ok=True)


def no_checkpoint(where, folders) -> UserError:
    """The UserError for folders without a complete checkpoint; it names the damaged ones."""
    damaged = []
    for folder in folders:
        find_last_step(folder, damaged.append)
    hint = f"; {'; '.join(damaged)}" if damaged else ""
    return UserError(f"no complete checkpoint in {where}{hint}: train one first, or name another --model_tag")


def find_largest_model(root, companion=False) -> str:
    """
    The model to take when none is named: the deepest d<depth> with a checkpoint, else the newest folder. companion:
    among those whose newest checkpoint has one, if there are any.
    """
    steps = {path: find_last_step(path) for path in Path(root).glob("*") if path.is_dir() and ".old-" not in path.name}
    folders = [path for path, step in steps.items() if step is not None]
    if not folders:
        raise no_checkpoint(root, list(steps))
    if companion:
        folders = [path for path in folders if _file(path, "mc", steps[path]).is_file()] or folders
    deep = [path for path in folders if re.fullmatch(r"d\d+", path.name)]
    if deep:
        return max(deep, key=lambda path: int(path.name[1:])).name
    return max(folders, key=lambda path: path.stat().st_mtime).name


def check_room(folder, needed):
    """UserError when the folder cannot be written to, or has no room for `needed` bytes."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"checkpoints cannot be written to {folder} ({error.strerror}): have that changed") from error
    if free < needed:
        raise UserError(
            f"a checkpoint takes {needed / 1e6:,.1f} MB or more, but {folder} has {free / 1e6:,.1f} MB free: make room"
        )


def set_aside(folder):
    """Rename a folder of checkpoints so that a run can start anew in its place; returns the new path."""
    folder = Path(folder)
    aside = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    shutil.move(folder, aside)
    return aside


# ---------------------------------------------------------------------------------------------------------
# Models


def refuse_newer(model_config: dict):
    """UserError for settings of a model that only later versions of nanochat have."""
    newer = sorted(model_config.keys() - {field.name for field in fields(GPTConfig)})
    if newer:
        raise UserError(
            f"the checkpoint's model_config has {', '.join(f'{key}={model_config[key]!r}' for key in newer)}, which "
            "this architecture has not: a newer nanochat wrote it, for weights that would compute something else here"
        )


def build_model(model_data, model_config: dict, device) -> GPT:
    """A GPT on `device` holding the weights of a state dict, also of one saved by nanochat."""
    if not isinstance(model_data, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in model_data.values()):
        raise UserError("the checkpoint's model is not a state dict of tensors")
    refuse_newer(model_config or {})
    try:
        if not all(type(n) is int and 0 < n <= MAX_SIZE for n in model_config.values()):
            raise ValueError(f"expected whole numbers from 1 to {MAX_SIZE:,}, got {model_config}")
        config = GPTConfig(**model_config)
        if config.n_layer > len(model_data):
            raise ValueError(f"expected weights of {config.n_layer:,} layers, got {len(model_data)} tensors")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's model_config makes no model: {error}") from error
    model_data = {key.removeprefix("_orig_mod."): tensor for key, tensor in model_data.items()}
    if torch.device(device).type != "cuda":  # bf16 embeddings are for GPUs
        model_data = {key: t.float() if t.dtype == torch.bfloat16 else t for key, t in model_data.items()}
    for key in ("transformer.wte.weight", "lm_head.weight"):  # nanochat did not pad the vocabulary
        tensor = model_data.get(key)
        if tensor is not None and tensor.size(0) == config.vocab_size < config.padded_vocab_size:
            padding = tensor.new_zeros(config.padded_vocab_size - config.vocab_size, tensor.size(1))
            model_data[key] = torch.cat((tensor, padding))
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.load_state_dict(model_data, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its model_config: {error}") from error
    model.init_rotary()
    return model


def check_tokenizer(folder, meta_data, tokenizer):
    """UserError when the model in the folder was trained with another tokenizer, if it is known with which."""
    trained_with = meta_data.get("tokenizer")
    if trained_with not in (None, tokenizer.checksum()):
        raise UserError(
            f"{folder} was trained with another tokenizer than the one in {get_base_dir() / 'tokenizer'}: put its own "
            "back, or choose another NANOCHAT_BASE_DIR"
        )


def find_model(source, model_tag=None, step=None, companion=False, report=None):
    """(folder, step) of the checkpoint that load_model takes, or UserError. report: as of find_last_step."""
    folder = model_folder(source, model_tag or find_largest_model(checkpoint_root(source), companion))
    step = find_last_step(folder, report) if step is None else step
    if step is None:
        raise no_checkpoint(folder, [folder])
    return folder, step


def load_model(source, device, phase="eval", model_tag=None, step=None, companion=False):
    """
    (model, tokenizer, meta_data) of a stage: by default its deepest model at its newest complete step.

    phase: "train" or "eval", the mode the model is put in. companion: the default is the deepest that has one.
    """
    if phase not in ("train", "eval"):
        raise ValueError(f"phase must be train or eval, got {phase!r}")
    folder, step = find_model(source, model_tag, step, companion, print0)
    model_data, _, meta_data, _ = load_checkpoint(folder, step, device)
    if model_data is None:
        raise UserError(f"{folder} has networks for a model of transformers: name that model with --hf-path")
    model = build_model(model_data, meta_data.get("model_config"), device)
    tokenizer = get_tokenizer()
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size():,} tokens but {folder} was trained with "
            f"{model.config.vocab_size:,}: put its tokenizer back into {get_base_dir() / 'tokenizer'}"
        )
    check_tokenizer(folder, meta_data, tokenizer)
    model.train(phase == "train")
    return model, tokenizer, {**meta_data, "model_tag": folder.name, "step": step}
