"""
Models and tokenizers in Hugging Face's format: a folder, a name on the hub, or a .gguf file.

Needs `uv sync --extra frozen`. The weights are not copied; networks that MegaContext trains for them are saved in
$NANOCHAT_BASE_DIR/hf_networks/<tag>, with the checksum of the weights they belong to.
"""

import hashlib
import logging
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nanochat import checkpoint_manager, training
from nanochat.common import UserError, encodable, print0, resolve_dtype
from nanochat.llama import Llama
from nanochat.options import ModelOptions
from nanochat.tokenizer import SPECIAL_TOKENS, ChatTokenizer, byte_letters

SOURCE = "hf"  # in place of a stage
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@dataclass
class PretrainedOptions(ModelOptions):
    """The model of a stage, or one of transformers."""

    hf_path: str = ""
    """use this Llama-like model of transformers: a folder, a name on the hub, or a .gguf file; model_tag and step then
    select the networks that scripts.mc_train trained for it"""


def load(config: PretrainedOptions, device, companion=False):
    """
    (source, model in eval mode, tokenizer, meta) that a script's options select; see checkpoint_manager.load_model.

    companion: whether the networks beside the model will be used. Raises UserError if they are for another model.
    """
    if not config.hf_path:
        options = config.source, device, "eval", config.model_tag, config.step, companion
        return config.source, *checkpoint_manager.load_model(*options)
    model, tokenizer, weights = load_pretrained(config.hf_path, device, getattr(config, "dtype", "auto"))
    tag = config.model_tag or name_of(config.hf_path)
    folder, meta, step = checkpoint_manager.model_folder(SOURCE, tag), {}, None
    if companion:
        step = checkpoint_manager.find_last_step(folder, print0) if config.step is None else config.step
    if step is not None:
        meta = checkpoint_manager.load_meta(folder, step)
        if meta["parent"]["weights"] != weights:
            raise UserError(f"the networks in {folder} were made for another model than {config.hf_path}")
        model.config.sequence_len = meta["model_config"]["sequence_len"]
    facts = {"model_tag": tag, "step": step or 0, "model_config": asdict(model.config), "weights": weights}
    return SOURCE, model.eval(), tokenizer, {**meta, **facts}


def parent(config: PretrainedOptions, device):
    """(source, model, tokenizer, facts, networks) of the model to train networks for; see training.parent_model."""
    if not config.hf_path:
        options = config.source, device, config.model_tag, config.step
        return config.source, *training.parent_model(*options)
    model, tokenizer, weights = load_pretrained(config.hf_path, device, config.dtype)
    tag = config.model_tag or name_of(config.hf_path)
    return SOURCE, model, tokenizer, {"source": SOURCE, "model_tag": tag, "step": 0, "weights": weights}, None


def name_of(path) -> str:
    """The tag, a folder's name, for a model's networks."""
    return re.sub(r"[^\w.+=@-]+", "-", Path(path).expanduser().name.removesuffix(".gguf")).strip("-.") or "model"


def from_transformers(path, dtype):
    """
    (a …ForCausalLM in eval mode, its tokenizer, SHA-256 of the weights), in the precision dtype, of a folder, a hub
    name or a .gguf file.

    Raises UserError if it cannot be found, or transformers cannot load it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as of_transformers
    except ImportError as error:
        raise UserError(f"--hf-path needs more packages ({error}): run `uv sync --extra frozen`") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)
    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()  # it warns of what is as we want it
    place, gguf = Path(path).expanduser(), {}
    if place.suffix == ".gguf":
        place, gguf = place.parent, {"gguf_file": place.name}
    try:
        if not place.is_dir():
            from huggingface_hub import snapshot_download

            place = Path(snapshot_download(path, allow_patterns=FILES))
        weights = [place / gguf["gguf_file"]] if gguf else sorted(place.glob("*.safetensors"))
        if not weights:
            raise UserError(f"expected *.safetensors in {place}, found none")
        digest = hashlib.sha256()
        for file in weights:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        tokenizer = AutoTokenizer.from_pretrained(place, **gguf)
        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **gguf), tokenizer, digest.hexdigest()
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:  # not found, not reachable, unknown, or gguf is not installed
        raise UserError(f"--hf-path: cannot load {path!r}: {error}") from error


def load_pretrained(path, device, dtype="auto"):
    """
    (model, tokenizer, SHA-256 of the weights) of what `from_transformers` loads. dtype: see resolve_dtype.

    Raises UserError, as it does, and for a model that Llama cannot be.
    """
    model, tokenizer, weights = from_transformers(path, resolve_dtype(dtype, device.type))
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return Llama(model.to(device)), PretrainedTokenizer(tokenizer, ends), weights


class PretrainedTokenizer(ChatTokenizer):
    """
    A fast tokenizer of transformers, with its chat template, in place of ours. ends: ids that end an answer.

    Of our special tokens it has <|bos|>, with which it begins a document, and <|assistant_end|>; the others have the
    id −1, which no token has.
    """

    def __init__(self, tokenizer, ends=()):
        self.hf, self.with_special = tokenizer, tokenizer.backend_tokenizer
        self.tokenizer = Tokenizer.from_str(self.with_special.to_str())
        self.tokenizer.encode_special_tokens = True  # their names in a text are text
        self.ends = [end for end in (tokenizer.eos_token_id, *ends) if end is not None]
        if not self.ends:
            raise UserError("expected a tokenizer with an eos token, got one without")

    def get_bos_token_id(self) -> int:
        begins = [*self.with_special.encode("").ids, self.tokenizer.token_to_id("<|endoftext|>"), *self.ends]
        return next(id for id in begins if id is not None)

    def encode_special(self, token) -> int:
        ours = {"<|bos|>": self.get_bos_token_id, "<|assistant_end|>": lambda: self.ends[0]}
        if token in ours:
            return ours[token]()
        id = -1 if token in SPECIAL_TOKENS else self.tokenizer.token_to_id(token)
        if id is None:
            raise KeyError(token)
        return id

    def get_vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def _encode(self, text):
        return self.tokenizer.encode(encodable(text), add_special_tokens=False).ids

    def _encode_batch(self, texts, num_threads):
        texts = list(map(encodable, texts))
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode_to_numpy(self, texts, num_threads=8) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.uint32) for ids in self._encode_batch(texts, num_threads)]

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def get_special_tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]

    @property
    def turn_ends(self) -> frozenset[int]:
        return frozenset((*self.ends, self.get_bos_token_id()))

    def checksum(self) -> str:
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = self.tokenizer.get_added_tokens_decoder()
        byte_of_char = {char: byte for byte, char in byte_letters().items()}
        byte_level = "ByteLevel" in str(self.tokenizer.decoder)
        found = []
        for id in range(self.get_vocab_size()):
            token = self.tokenizer.id_to_token(id) or ""
            if id in added:
                found.append(token.encode())
            elif byte_level:
                found.append(bytes(byte_of_char[char] for char in token))
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                found.append(bytes.fromhex(token[3:5]))
            else:
                found.append(token.replace("▁", " ").encode())
        return found

    def id_to_bytes(self, token_id) -> bytes:
        return self._bytes[token_id] if token_id < len(self._bytes) else b""  # the head may have more rows

    def encode_rendered(self, text) -> list[int]:
        return self.with_special.encode(encodable(text), add_special_tokens=False).ids

    # -----------------------------------------------------------------------------------------------------
    # Chats

    def _render(self, messages, **options) -> list[int]:
        from jinja2 import TemplateError

        if not self.hf.chat_template:
            raise UserError("this model has no chat template, it was not made for chats: take one that was")
        names = [name for name in self.get_special_tokens() if name]
        chat = []
        for message in messages:
            content = message["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            for name in names:  # in a message they are text
                text = text.replace(name, f"{name[0]}\u200b{name[1:]}")
            chat.append({"role": message["role"], "content": text})
        try:
            return self.encode_rendered(self.hf.apply_chat_template(chat, tokenize=False, **options))
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses this conversation: {error}") from error

    def render_conversation(self, conversation, max_tokens=2048):
        """(ids, None) of a chat up to the end of its last turn; these models are not trained on chats here."""
        ids = self._render(conversation["messages"], continue_final_message=True)
        return [*ids, self.ends[0]][:max_tokens], None

    def _with_turn_begun(self, messages):
        return self._render(messages, add_generation_prompt=True)
