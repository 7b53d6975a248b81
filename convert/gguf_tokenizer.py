"""The tokenizer inside a GGUF file as Hugging Face files: tokenizer.json, its config, the chat template.

GGUF names the pre-tokenizer and leaves its rules to the reader; the three here are byte-level BPEs whose tokenizer.json
is known: SmolLM, Llama 3 and GPT-2. For any other kind there are no files, and a note says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["tokenizer_files"]

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types of added tokens
# Meta's pattern for Llama 3 (as in its tokenizer.json), digits in groups of at most three.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Fields(Protocol):
    def get(self, key: str, default: Any = None) -> Any: ...


def tokenizer_files(metadata: Fields, config: Mapping[str, Any]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """({file name: content}, notes for the user)."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    notes: tuple[str, ...] = ()
    if pre is None:  # files from before May 2024
        pre = "llama-bpe" if "<|begin_of_text|>" in (tokens or ()) else "default"
        notes = (f"tokenizer: the file does not say how it splits text; {pre}'s way is taken",)
    template = metadata.get("tokenizer.chat_template")
    files: dict[str, bytes] = {}
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    pre_tokenizer = _pre_tokenizer(pre)
    if kind != "gpt2" or pre_tokenizer is None or not tokens or not merges:
        named = "no tokenizer" if kind is None else f"a tokenizer of kind {kind}/{pre}, which is not rebuilt here"
        note = f"tokenizer: the file has {named}; put the model's tokenizer.json beside params/, or prompt with ids"
        return files, (note,)
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        _added_token(i, token, special=type_ == CONTROL)
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (CONTROL, USER_DEFINED)
    ]
    bos = config["bos_token_id"]
    add_bos = bos is not None and bool(metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _prepend(tokens[bos], bos) if add_bos else None,
        "decoder": _byte_level(add_prefix_space=True, use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Llama 3's vocabulary has whole words that its merges never reach.
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    files["tokenizer.json"] = _json(tokenizer)
    files["tokenizer_config.json"] = _json(_tokenizer_config(metadata, config, tokens, template))
    return files, notes


def _pre_tokenizer(name: str) -> dict[str, Any] | None:
    if name == "llama-bpe":
        split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, _byte_level(add_prefix_space=False, use_regex=False)]}
    gpt2 = _byte_level(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, gpt2]}
    return gpt2 if name in ("gpt-2", "default") else None


def _tokenizer_config(
    metadata: Fields, config: Mapping[str, Any], tokens: list[str], template: str | None
) -> dict[str, Any]:
    ids = {
        "bos_token": config["bos_token_id"],
        "eos_token": next(iter(config["eos_token_id"]), None),
        "pad_token": metadata.get("tokenizer.ggml.padding_token_id"),
        "unk_token": metadata.get("tokenizer.ggml.unknown_token_id"),
    }
    return {
        # Not a class of its own name (GPT2Tokenizer): transformers would rebuild the pre-tokenizer from it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)},
        **({} if template is None else {"chat_template": template}),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }


def _added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": special}


def _byte_level(*, add_prefix_space: bool, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _prepend(token: str, index: int) -> dict[str, Any]:
    """A post-processor that puts ``token`` before every text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, *second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
