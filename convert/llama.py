"""Llama targets: HF config to ``LlamaConfig``, and the table of their tensors.

Reads the classic config form (``rope_theta``, ``rope_scaling``) and that of transformers 5 (``rope_parameters``). What
would load but compute something else is refused: other activations, other rotary scalings, weights quantised otherwise
than to FP8 (``convert/fp8.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from convert.fields import flag, integer, number
from convert.fp8 import refuse_quantised
from convert.rope import parse_rope
from convert.table import ConversionError, Description, Rule, block_rules, check_depth, norm, plain, transposed
from jeagle.config import ConfigError, LlamaConfig

__all__ = ["describe", "eos_token_ids", "read_config"]

ARCHITECTURE = "LlamaForCausalLM"


def describe(
    config: Mapping[str, Any], names: Mapping[str, tuple[int, ...]], *, generation: Mapping[str, Any] | None = None
) -> Description:
    """Our config and one rule per tensor.

    Args:
      config: config.json. names: the source's tensors with their shapes; {}: as HF would name them.
      generation: generation_config.json, where instruct models list the end tokens that config.json lacks.
    """
    llama = read_config(config, generation=generation)
    # Of the bare model, as HF saves and loads it too, the names lack "model.".
    prefix = "" if any(name.startswith("layers.") for name in names) else "model."
    if names:
        check_depth(names, f"{prefix}layers.", llama.num_layers)
    # HF leaves a stored lm_head unread when the embeddings are tied, and old files carry rotary tables.
    ignore = {name for name in names if name.endswith("rotary_emb.inv_freq")}
    embedding = f"{prefix}embed_tokens.weight"
    if llama.tie_embeddings:
        if embedding in names or "lm_head.weight" not in names:
            ignore.add("lm_head.weight")
        else:  # and where it is all that is stored, HF takes it for both
            embedding = "lm_head.weight"
    return Description(llama, list(_rules(llama, prefix, embedding)), frozenset(ignore), (_summary(llama),))


def read_config(config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None) -> LlamaConfig:
    """``LlamaConfig`` of an HF config.json. Raises ConversionError naming the field."""
    _refuse_unsupported(config)
    width, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    theta, scaling = parse_rope(config)
    bos = config.get("bos_token_id", 1)  # HF's default where the key is absent; null means none
    if bos is not None and (not isinstance(bos, int) or isinstance(bos, bool)):
        raise ConversionError(f"config.json: bos_token_id must be a token id or null but is {bos!r}; set it")
    try:
        return LlamaConfig(
            width=width,
            num_layers=integer(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=integer(config, "num_key_value_heads", heads),
            head_dim=integer(config, "head_dim", width // heads),
            mlp_width=integer(config, "intermediate_size"),
            norm_eps=number(config, "rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            vocab_size=integer(config, "vocab_size"),
            max_position=integer(config, "max_position_embeddings"),
            tie_embeddings=flag(config, "tie_word_embeddings"),
            bos_token_id=bos,
            eos_token_ids=eos_token_ids(config, generation or {}),
        )
    except ConfigError as error:
        raise ConversionError(f"config.json: {error}") from error


def _rules(config: LlamaConfig, prefix: str, embedding: str) -> Iterator[Rule]:
    D, V = config.width, config.vocab_size
    yield plain("embed", embedding, V, D)
    for i in range(config.num_layers):
        yield from block_rules(config, f"blocks.{i}", f"{prefix}layers.{i}")
    yield norm("norm", f"{prefix}norm", D)
    if not config.tie_embeddings:
        yield transposed("lm_head", "lm_head.weight", D, V)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures") or ([ARCHITECTURE] if config.get("model_type") == "llama" else [])
    if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
        given = architectures or config.get("model_type")
        raise ConversionError(f"config.json has architecture {given!r}; only {ARCHITECTURE} converts")
    refuse_quantised(config)
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise ConversionError(f"config.json has hidden_act {activation!r}; only silu models convert")


def eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of both files, config.json's first; an int or a list, null for none. HF's default, 2, is for models
    of which neither file says anything: in other vocabularies it is any token."""
    ids: list[int] = []
    for file, value in (
        ("config.json", config.get("eos_token_id", None if "eos_token_id" in generation else 2)),
        ("generation_config.json", generation.get("eos_token_id")),
    ):
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) for i in listed):
            raise ConversionError(f"{file}: eos_token_id must be a token id or a list of them but is {value!r}; set it")
        ids += listed
    return tuple(dict.fromkeys(ids))


def _summary(config: LlamaConfig) -> str:
    embeddings = "tied" if config.tie_embeddings else "untied"
    return (
        f"Llama: {config.num_layers} layers of width {config.width}, vocabulary {config.vocab_size} ({embeddings}), "
        f"{config.num_parameters / 1e6:.1f} M parameters, end tokens {list(config.eos_token_ids)}"
    )
