"""EAGLE heads of every public form to ours: one rule per tensor.

Names are first made canonical (``layers.N.*``, ``fc``, ``norm``, ``lm_head``, ``embed_tokens``, ``d2t``), so that one
table serves EAGLE-1/2, HASS, Meta's dense head, SafeAILab's EAGLE-3, speculators, Model-Optimizer and SpecForge; the
rules then carry the names the file has. ``convert/eagle_config.py`` reads the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from convert.eagle_config import Shapes, read_config
from convert.fields import listing
from convert.table import ConversionError, Description, Rule, Source, block_rules, norm, plain, transposed
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.llama4_config import Llama4EagleConfig

__all__ = ["check_token_maps", "describe", "head_rules", "is_eagle"]

_PREFIXES = {"midlayer.": "layers.0.", "transformer.": "layers.0."}  # EAGLE-3; speculators' EAGLE-1
_STEMS = {
    "fusion_fc": "fc",
    # vLLM's first EAGLE class and its speculators loader; the norms of HASS-like heads.
    "enorm": "embedding_layernorm",
    "embed_layernorm": "embedding_layernorm",
    "hnorm": "hidden_states_layernorm",
    # speculators' EagleSpeculator applies it after the block, before the LM head.
    "pre_lm_head_layernorm": "norm",
    "lm_head_layernorm": "norm",
}
# Copies of the target kept for training, and tables that are recomputed.
_UNUSED = ("verifier_lm_head.weight", "verifier_norm.weight", "rotary_emb.inv_freq")


def is_eagle(config: dict[str, Any], names: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a source is an EAGLE head: its config says so, or it has tensors that only heads have."""
    if "speculators_model_type" in config or config.get("eagle_config"):
        return True
    if any("eagle" in name.lower() for name in listing(config, "architectures", str)):
        return True
    marks = {"fc.weight", "d2t", "layers.0.hidden_norm.weight"}
    return any(_canonical(name) in marks for name in names)


def describe(
    config: dict[str, Any],
    names: Mapping[str, tuple[int, ...]],
    *,
    target: LlamaConfig | None = None,
    taps: Literal["input", "output"] | None = None,
) -> Description:
    """Our config, the table, and notes for the user.

    Args:
      config: the head's config.json. names: its tensors' shapes.
      target: the model it drafts for, when known: widths, vocabulary and depth are checked against it.
      taps: overrides whether tap ids name block inputs or block outputs.
    """
    actual: dict[str, str] = {}
    for name in names:
        twin = actual.setdefault(_canonical(name), name)
        if twin != name:
            raise ConversionError(f"tensors {twin} and {name} are one and the same part of a head; remove one")
    shapes = {canonical: tuple(names[name]) for canonical, name in actual.items()}
    head, notes = read_config(config, shapes, form=_form(config, names, shapes), target=target, taps=taps)
    if head.reduced_vocabulary and "d2t" not in shapes:
        raise ConversionError(
            f"tensor d2t is missing; a head with draft_vocab_size {head.draft_vocab_size} of {head.vocab_size} "
            "(config.json) needs it to name its tokens"
        )
    first = next((n for c, n in actual.items() if c == "layers.0.self_attn.q_proj.weight"), "layers.0.")
    first = first.removesuffix("self_attn.q_proj.weight")

    def in_file(name: str) -> str:  # a missing tensor is named as its neighbours are
        return actual.get(name) or (first + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name)

    rules = [dataclasses.replace(rule, sources=tuple(map(in_file, rule.sources))) for rule in head_rules(head)]
    unused = {"t2d"} | (set() if head.reduced_vocabulary else {"d2t"})
    ignore = frozenset(n for c, n in actual.items() if c in unused or c.endswith(_UNUSED))
    return Description(head, rules, ignore, notes)


def check_token_maps(source: Source, config: EagleConfig) -> None:
    """What no single rule sees: t2d must mark exactly d2t's targets, and a full vocabulary must not be permuted.

    Reads d2t and t2d where the source has them. Range and distinctness of d2t are checked when its rule is filled.
    """
    names = {_canonical(name): name for name in source.names()}
    if not config.reduced_vocabulary:
        if "d2t" in names and (shape := tuple(source.shape(names["d2t"]))) != (config.vocab_size,):
            raise ConversionError(
                f"tensor {names['d2t']} has shape {shape}, but config.json's draft vocabulary is the target's "
                f"{config.vocab_size} ids; set draft_vocab_size to what d2t has"
            )
        if "d2t" in names and np.any(source.read(names["d2t"])):
            raise ConversionError(
                f"tensor {names['d2t']} renumbers a draft vocabulary as large as the target's; only a head whose "
                "draft ids are the target's (d2t all zero) converts"
            )
        return
    if "t2d" in names and "d2t" in names:
        d2t = source.read(names["d2t"])
        if d2t.shape != (config.draft_vocab_size,) or not np.issubdtype(d2t.dtype, np.integer):
            return  # filling its rule says what is wrong
        marked = np.asarray(source.read(names["t2d"])).astype(bool)
        ids = _absolute_ids(d2t, config.vocab_size)
        if marked.shape != (config.vocab_size,) or not np.array_equal(np.flatnonzero(marked), np.sort(ids)):
            raise ConversionError(
                f"tensor {names['t2d']} does not mark the ids that {names['d2t']} maps to; d2t must hold offsets "
                "(target id minus draft id), and both must come from the same head"
            )


def _canonical(name: str) -> str:
    name = name.removeprefix("model.")
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    stem, _, leaf = name.rpartition(".")
    return f"{_STEMS.get(stem, stem)}.{leaf}" if stem else name


def _form(config: Mapping[str, Any], names: Mapping[str, Any], shapes: Shapes) -> str:
    """The writer's name, for the notes; nothing depends on it."""
    midlayer = any("midlayer." in name for name in names)
    if config.get("speculators_model_type"):
        return f"speculators' {config['speculators_model_type']} form"
    if config.get("eagle_config"):
        return "SpecForge's EAGLE-3 form" if midlayer else "Model-Optimizer's EAGLE-3 form"
    if midlayer or "layers.0.hidden_norm.weight" in shapes:
        return "EAGLE-3 (SafeAILab's form)" if midlayer else "EAGLE-3 (vLLM's names)"
    if "embedding_layernorm.weight" in shapes:
        return "EAGLE-1 with HASS's norms before fc"
    if "layers.0.feed_forward.gate_proj.weight" in shapes:
        return "Meta's dense form for Llama 4"
    return "Meta's dense form" if "norm.weight" in shapes else "EAGLE-1/2"


def head_rules(config: EagleConfig) -> Iterator[Rule]:
    """The table of a head, in canonical names. D wide, W of V ids, X target feature columns."""
    D, V, W, X = config.width, config.vocab_size, config.draft_vocab_size, config.feature_width
    attention = config.fusion == "attention"
    if config.own_embedding:
        yield plain("embed", "embed_tokens.weight", V, D)
    yield transposed("fc.kernel", "fc.weight", X if attention else 2 * D, D)
    if config.fc_bias:
        yield plain("fc.bias", "fc.bias", D)
    if config.tap_norm == "each":
        for i in range(len(config.taps)):
            yield norm(f"tap_norms.{i}", f"fc_norm.{i}", config.target_width)
    if config.tap_norm == "joint":
        yield norm("tap_norm", "input_norm", X)
    if attention:
        yield norm("embed_norm", "layers.0.input_layernorm", D)
        yield norm("hidden_norm", "layers.0.hidden_norm", D)
    elif config.input_norms:
        yield norm("embed_norm", "embedding_layernorm", D)
        yield norm("hidden_norm", "hidden_states_layernorm", D)
    rotary = None  # blocks whose rotary embedding turns interleaved pairs: those of Meta's heads for Llama 4
    if isinstance(config, Llama4EagleConfig):
        rotary = {*range(config.num_layers)} - {*config.nope_layers}
    for i in range(config.num_layers):
        normed = i > 0 or (not attention and config.first_block_norm)
        yield from block_rules(
            config,
            f"blocks.{i}",
            f"layers.{i}",
            input_width=2 * D if attention and i == 0 else D,
            attn_norm="input_layernorm" if normed else None,
            mlp="mlp" if rotary is None else "feed_forward",
            interleaved=rotary is not None and i in rotary,
        )
    if config.final_norm:
        yield norm("norm", "norm", D)
    if config.own_lm_head:
        yield transposed("lm_head", "lm_head.weight", D, W)
    if config.reduced_vocabulary:
        yield Rule(
            target="draft_to_target",
            sources=("d2t",),
            source_shapes=((W,),),
            make=lambda d2t: _absolute_ids(d2t, V),
            split=lambda ids: (ids.astype(np.int64) - np.arange(len(ids)),),
            integer=True,
        )


def _absolute_ids(d2t: np.ndarray, vocab_size: int) -> np.ndarray:
    """Offsets to target ids [W], int32: [0, 0, 3] -> [0, 1, 5]. In range and distinct, or ConversionError."""
    ids = np.asarray(d2t).astype(np.int64) + np.arange(len(d2t))
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        raise ConversionError(
            f"tensor d2t maps draft id {outside[0]} to {ids[outside[0]]}, outside the target's {vocab_size} ids; "
            "it must hold offsets (target id minus draft id)"
        )
    if len(np.unique(ids)) < len(ids):
        raise ConversionError("tensor d2t maps two draft ids to one target id; the checkpoint is damaged")
    return ids.astype(np.int32)
