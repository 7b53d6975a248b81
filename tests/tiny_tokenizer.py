"""A tokenizer of 272 tokens made in code: all bytes, a few words, Llama's special tokens and a chat template."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["BOS", "EOS", "FIRST_BYTE", "VOCAB_SIZE", "byte_ids", "tokenizer_files"]

SPECIALS = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
BOS, EOS = 1, 2
FIRST_BYTE = len(SPECIALS)  # the id of byte 0
MERGES = (("t", "h"), ("th", "e"), ("l", "l"), ("e", "ll"), ("ell", "o"), ("Ġ", "w"), ("o", "r"), ("or", "d"))
VOCAB_SIZE = FIRST_BYTE + 256 + len(MERGES)
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_ids(text: str) -> list[int]:
    """The ids of the text's bytes, no word used."""
    return [FIRST_BYTE + b for b in text.encode()]


def tokenizer_files() -> dict[str, bytes]:
    """File names and contents, as ``CheckpointWriter.finish`` takes them."""
    vocab = {token: i for i, token in enumerate(SPECIALS)}
    vocab |= {char: FIRST_BYTE + byte for byte, char in _byte_characters().items()}
    vocab |= {left + right: FIRST_BYTE + 256 + i for i, (left, right) in enumerate(MERGES)}
    tokenizer = Tokenizer(models.BPE(vocab, list(MERGES)))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes: a byte that prints stands for itself, the others for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b if b in printable else 0x100 + others.index(b)) for b in range(256)}
