"""
Write a model for Hugging Face's transformers: safetensors, configuration, tokenizer with chat template.

    python -m scripts.export_hf -i sft --output my_model
    python -m scripts.export_hf -i base -g d20 -s 21400 --output d20-base --dtype=bf16

The folder loads with AutoModelForCausalLM and AutoTokenizer of transformers 5 and newer, as a NanoChatForCausalLM.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, resolve_dtype, sync
from nanochat.configurator import run, short
from nanochat.gpt import LOGIT_SOFTCAP, GPTConfig
from nanochat.options import ModelOptions
from nanochat.tokenizer import PART_TOKENS, RustBPETokenizer, byte_letters

BOS, END = "<|bos|>", "<|assistant_end|>"

# our name → transformers' name, within a block
BLOCK_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass
class Config(ModelOptions):
    output: Path = field(kw_only=True)
    """the folder to write"""
    source: Annotated[str, short("-i")] = "sft"
    """stage of the model: base, mid, sft or rl"""
    dtype: str = "fp32"
    """bf16 or fp32, precision of the weights; fp32 is what was trained, bf16 is half as large"""


def to_hf_state(model, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The weights of a GPT under the names of NanoChatForCausalLM, without the rows that pad the vocabulary."""
    V = model.config.vocab_size
    names = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for layer in range(model.config.n_layer):
        for ours, theirs in BLOCK_NAMES.items():
            names[f"transformer.h.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    state = model.state_dict()
    if state.keys() != names.keys():
        raise ValueError(f"no names for {sorted(state.keys() ^ names.keys())}")
    # Copies, because safetensors needs contiguous tensors that share no memory
    hf = {names[key]: tensor.to("cpu", dtype, copy=True) for key, tensor in state.items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        hf[key] = hf[key][:V].clone()
    return hf


def hf_config(config: GPTConfig, tokenizer, dtype=torch.float32) -> dict:
    """config.json: what NanoChatConfig reads."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "rms_norm_eps": torch.finfo(torch.float32).eps,  # the default of F.rms_norm
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "final_logit_softcapping": LOGIT_SOFTCAP,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": tokenizer.encode_special(BOS),
        "eos_token_id": tokenizer.encode_special(END),
        "pad_token_id": tokenizer.encode_special(END),
    }


def hf_generation_config(tokenizer) -> dict:
    """generation_config.json: greedy, with the stop tokens of our Engine."""
    bos, end = tokenizer.encode_special(BOS), tokenizer.encode_special(END)
    return {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": end, "do_sample": False}


def to_hf_tokenizer(tokenizer: RustBPETokenizer) -> Tokenizer:
    """
    The same tokenizer, with the same ids, for `tokenizers`. It puts <|bos|> before each text unless
    add_special_tokens=False, and reads the names of special tokens in a text as special tokens.

    tiktoken joins any pair that gives the token of the lowest rank, so each way to split a token in two is a merge
    here; a word that is a token needs none.
    """
    letters = byte_letters()
    ranks = tokenizer.enc._mergeable_ranks
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.get)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    hf = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tokenizer.enc._pat_str), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    hf.decoder = decoders.ByteLevel()
    specials = sorted(tokenizer.enc._special_tokens.items(), key=lambda item: item[1])
    hf.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, _ in specials])
    wrong = [token for token, token_id in specials if hf.token_to_id(token) != token_id]
    if wrong:
        raise UserError(f"the ids of {', '.join(wrong)} do not follow those of the merges: this cannot be exported")
    bos = (BOS, tokenizer.encode_special(BOS))
    hf.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    return hf


def chat_template() -> str:
    """The chat format of `ChatTokenizer` in Jinja; what the assistant must produce is marked as generated."""

    def part(kind):
        before, after, trained = PART_TOKENS[kind]
        quoted = "{{ '" + (before or "") + "' + part['text'] + '" + (after or "") + "' }}"
        return "{% generation %}" + quoted + "{% endgeneration %}" if trained else quoted

    branches = "".join(
        "{%% %s part['type'] == '%s' %%}%s" % ("elif" if i else "if", kind, part(kind))  # noqa: UP031 (braces)
        for i, kind in enumerate(PART_TOKENS)
    )
    return (
        "{% set system = namespace(text='') %}"
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system.text = messages[0]['content'] + '\\n\\n' %}"
        "{% set messages = messages[1:] %}"
        "{% endif %}"
        "{% if not messages %}{{ raise_exception('expected at least one user message') }}{% endif %}"
        "<|bos|>"
        "{% for message in messages %}"
        "{% set expected = 'user' if loop.index0 % 2 == 0 else 'assistant' %}"
        "{% if message['role'] != expected %}"
        "{{ raise_exception('expected role ' + expected + ', got ' + message['role']) }}"
        "{% endif %}"
        "{% if expected == 'user' %}"
        "{{ '<|user_start|>' + (system.text if loop.first else '') + message['content'] + '<|user_end|>' }}"
        "{% else %}"
        "<|assistant_start|>"
        "{% if message['content'] is string %}"
        "{% set parts = [{'type': 'text', 'text': message['content']}] %}"
        "{% else %}{% set parts = message['content'] %}{% endif %}"
        "{% for part in parts %}" + branches + "{% else %}"
        "{{ raise_exception('unknown part type ' + part['type']) }}{% endif %}{% endfor %}"
        "{% generation %}<|assistant_end|>{% endgeneration %}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant_start|>{% endif %}"
    )


def hf_tokenizer_config(tokenizer, sequence_len) -> dict:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "extra_special_tokens": sorted(tokenizer.get_special_tokens() - {BOS, END}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_len,
        "chat_template": chat_template(),
    }


def export_hf(path, model, tokenizer, dtype=torch.float32):
    """
    Write a GPT and its tokenizer to the folder `path`: to a temporary one, which is flushed and then takes its name.

    Raises UserError if there is something at `path` already, or the disk refuses.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists: choose another --output, or move it away")
    parts = {
        "config.json": hf_config(model.config, tokenizer, dtype),
        "generation_config.json": hf_generation_config(tokenizer),
        "tokenizer_config.json": hf_tokenizer_config(tokenizer, model.config.sequence_len),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            folder = Path(temporary, "model")
            folder.mkdir()
            save_torch_state_dict(to_hf_state(model, dtype), folder, max_shard_size="5GB")
            for name, data in parts.items():
                (folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
            (folder / "tokenizer.json").write_text(to_hf_tokenizer(tokenizer).to_str(pretty=True), "utf-8")
            for file in folder.iterdir():
                shutil.copymode(folder / "config.json", file)  # safetensors' are readable for the owner only
                sync(file)
            sync(folder)
            folder.rename(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path} ({error}): free some space, or choose another --output") from error


def main(config: Config):
    model, tokenizer, meta = load_model(config.source, "cpu", "eval", config.model_tag, config.step)
    export_hf(config.output, model, tokenizer, resolve_dtype(config.dtype, "cpu"))
    print(f"{config.source} {meta['model_tag']}, step {meta['step']}, written to {config.output}")
    if "megacontext" in meta:
        print("it is the language model alone: MegaContext's networks beside the checkpoint are not exported")


if __name__ == "__main__":
    run(main, Config)
