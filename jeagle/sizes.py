"""The models we know by name, as data, and the published shapes of their EAGLE heads.

Sources: the config.json files of Meta's releases on the Hugging Face hub (Llama 3.1, 3.2, 3.3, 4: Scout 17B-16E and
Maverick 17B-128E) and of SmolLM2; for heads see ``head_for``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jeagle import heads
from jeagle.config import BlockConfig, ConfigError, EagleConfig, LlamaConfig, RopeScaling
from jeagle.llama4_config import Llama4Config, TemperatureTuning

__all__ = ["DRAFTS", "SIZES", "Draft", "draft_of", "find_config", "head_for", "size"]

Draft = Literal["eagle1", "eagle3", "meta"]
DRAFTS: tuple[Draft, ...] = ("eagle1", "eagle3", "meta")
DRAFT_VOCABULARY = 32_000  # of every published EAGLE-3 head

_SMOLLM2_135M = LlamaConfig(
    width=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_width=1536,
    norm_eps=1e-5,
    rope_theta=100000.0,
    rope_scaling=None,
    attention_bias=False,
    mlp_bias=False,
    vocab_size=49152,
    max_position=8192,
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)
_LLAMA_31_8B = LlamaConfig(
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    attention_bias=False,
    mlp_bias=False,
    vocab_size=128256,
    max_position=131072,
    tie_embeddings=False,
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
)
_LLAMA_31_70B = dataclasses.replace(_LLAMA_31_8B, width=8192, num_layers=80, num_heads=64, mlp_width=28672)
_LLAMA_31_405B = dataclasses.replace(_LLAMA_31_8B, width=16384, num_layers=126, num_heads=128, mlp_width=53248)
_LLAMA_32 = dataclasses.replace(
    _LLAMA_31_8B, rope_scaling=RopeScaling(kind="llama3", factor=32.0), mlp_width=8192, tie_embeddings=True
)
_LLAMA_32_1B = dataclasses.replace(_LLAMA_32, width=2048, num_layers=16, head_dim=64)
_LLAMA_32_3B = dataclasses.replace(_LLAMA_32, width=3072, num_layers=28, num_heads=24)
_LLAMA_4_SCOUT = Llama4Config(
    width=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=16384,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
    attention_bias=False,
    mlp_bias=False,
    vocab_size=202048,
    max_position=10485760,
    tie_embeddings=False,
    bos_token_id=200000,
    eos_token_ids=(200001, 200007, 200008),
    num_experts=16,
    moe_layers=tuple(range(48)),
    expert_mlp_width=8192,
    experts_per_token=1,
    nope_layers=tuple(range(3, 48, 4)),
    attention_chunk=8192,
    qk_norm=True,
    temperature_tuning=TemperatureTuning(floor_scale=8192, attn_scale=0.1),
)
_LLAMA_4_MAVERICK = dataclasses.replace(
    _LLAMA_4_SCOUT,
    rope_scaling=None,
    max_position=1048576,
    num_experts=128,
    moe_layers=tuple(range(1, 48, 2)),
    qk_norm=False,
)

SIZES: dict[str, LlamaConfig] = {
    "smollm2-135m": _SMOLLM2_135M,
    "llama-3.1-8b": _LLAMA_31_8B,
    "llama-3.1-70b": _LLAMA_31_70B,
    "llama-3.1-405b": _LLAMA_31_405B,
    "llama-3.2-1b": _LLAMA_32_1B,
    "llama-3.2-3b": _LLAMA_32_3B,
    "llama-3.3-70b": _LLAMA_31_70B,
    "llama-4-scout": _LLAMA_4_SCOUT,
    "llama-4-maverick": _LLAMA_4_MAVERICK,
}


def size(name: str) -> LlamaConfig:
    """The model of that name. Raises ConfigError, which lists the names."""
    if name not in SIZES:
        raise ConfigError(f"no model is named {name!r}; named are {', '.join(SIZES)}")
    return SIZES[name]


def find_config(source: str | Path) -> LlamaConfig | EagleConfig:
    """What a user names, without its weights: a name of ``SIZES``, a converted checkpoint, or a directory (or file)
    with Hugging Face's config.json of a target.

    Raises ConfigError, CheckpointError or ConversionError, each one sentence.
    """
    if str(source) in SIZES:
        return SIZES[str(source)]
    path = Path(source).expanduser()
    path = path.parent if path.name == "config.json" else path
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{source} is neither a directory with a config.json nor a shape's name; named are {', '.join(SIZES)}"
        )
    from jeagle.checkpoint import is_checkpoint, load_config

    if is_checkpoint(path):
        return load_config(path)
    from convert import read_target  # as in locate.py: foreign formats are imported only where one has to be read

    return read_target(path)


def draft_of(source: str, target: LlamaConfig) -> tuple[EagleConfig, str]:
    """A head for ``target`` and where its shape comes from: a kind of ``DRAFTS``, or a converted head's directory.

    Raises ConfigError when it is neither, or was made for another target.
    """
    if source in DRAFTS:
        return head_for(target, source)
    source = str(heads.find(source) or source)
    if not (Path(source).expanduser() / "config.json").is_file():
        raise ConfigError(
            f"draft {source!r} is neither {', '.join(DRAFTS)} or off, nor a converted head's directory, nor one of "
            f"jeagle's own heads ({', '.join(heads.names())})"
        )
    head = find_config(source)
    if not isinstance(head, EagleConfig):
        raise ConfigError(f"{source} holds a target model, not an EAGLE head; give it as the model")
    if (head.target_width, head.vocab_size) != (target.width, target.vocab_size):
        raise ConfigError(
            f"the head {source} was made for a target of width {head.target_width} and {head.vocab_size} tokens; this "
            f"one has width {target.width} and {target.vocab_size} tokens"
        )
    return head, source


def head_for(target: LlamaConfig, kind: Draft) -> tuple[EagleConfig, str]:
    """A head of published shape for ``target``, and one line that says whose shape it is.

    EAGLE-3 heads have one dense block and 32,000 draft tokens. Of Llama 4 that is SpecForge's (MLP 32,768 wide, which
    makes the 846 M parameters of its card; NVIDIA's heads differ), of Llama 3 70B the head that is narrower than its
    target and brings its own embedding (6,144 wide, MLP 16,384; the width is from hearsay, see its config.json), of the
    others the target's own block, as in yuhuili/EAGLE3-LLaMA3.1-Instruct-8B. Meta's heads have three blocks like the
    target's dense ones (arXiv:2508.08192).
    """
    values: dict[str, Any] = {}
    said = "one block of the target's shape"
    if kind == "eagle3":
        values["draft_vocab_size"] = min(DRAFT_VOCABULARY, target.vocab_size)
        if isinstance(target, Llama4Config):
            values["mlp_width"] = 32768
            said = "one block, MLP 32,768 wide, as in SpecForge's heads for Llama 4 (NVIDIA's differ)"
        elif _same_block(target, _LLAMA_31_70B):
            values |= dict(width=6144, num_heads=48, mlp_width=16384, own_embedding=True)
            said = "one block 6,144 wide with its own embedding, as assumed of the published head for Llama 3 70B"
        said += f"; {values['draft_vocab_size']:,} draft tokens"
    elif kind == "meta":
        values["num_layers"] = 3
        said = "three blocks of the target's dense shape; embedding and LM head are the target's"
    else:
        said += "; embedding and LM head are the target's"
    return EagleConfig.for_target(target, kind, **values), f"{kind}: {said}"


def _same_block(a: BlockConfig, b: BlockConfig) -> bool:
    return (a.width, a.num_layers, a.num_heads, a.mlp_width) == (b.width, b.num_layers, b.num_heads, b.mlp_width)
