"""Llama 4 targets: HF config to ``Llama4Config``, and the table of their tensors.

The text model alone or inside a multimodal checkpoint, whose vision tower is left where it is. Routed experts come in
two layouts: all of a block fused into two tensors, or three tensors per expert (FP8 checkpoints: ``convert/fp8.py``).
Rotary embedding turns interleaved pairs here and halves in ours, so query and key rows are permuted; the QK norm has no
weights and does not mind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.fields import flag, integer, listing, number
from convert.fp8 import refuse_quantised
from convert.llama import eos_token_ids
from convert.rope import parse_rope
from convert.table import ConversionError, Description, Rule, block_rules, check_depth, norm, plain, transposed
from jeagle.config import ConfigError
from jeagle.llama4_config import Llama4Config, TemperatureTuning

__all__ = ["DEFAULT_THETA", "describe", "irope_fields", "is_llama4", "read_config"]

DEFAULT_THETA = 500000.0  # HF's own of this family
VISION = ("vision_model.", "multi_modal_projector.")  # perhaps under "model."


def is_llama4(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in ("llama4", "llama4_text")


def describe(
    config: Mapping[str, Any], names: Mapping[str, tuple[int, ...]], *, generation: Mapping[str, Any] | None = None
) -> Description:
    """Our config and one rule per tensor.

    Args:
      config: config.json. names: the source's tensors with their shapes, FP8 ones already without their scales.
      generation: generation_config.json, where instruct models list the end tokens that config.json lacks.
    """
    llama4 = read_config(config, generation=generation)
    embedding = "model.embed_tokens.weight"
    prefix = next((name.removesuffix(embedding) for name in names if name.endswith(embedding)), "")
    check_depth(names, f"{prefix}model.layers.", llama4.num_layers)
    vision = {name for name in names if name.removeprefix("model.").startswith(VISION)}
    notes = [_summary(llama4)]
    if vision:
        notes.append(f"vision: the {len(vision)} tensors of the vision tower and its projector are skipped")
    ignore = vision | ({f"{prefix}lm_head.weight"} if llama4.tie_embeddings else set())
    return Description(llama4, list(_rules(llama4, prefix, names)), frozenset(ignore), tuple(notes))


def read_config(config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None) -> Llama4Config:
    """``Llama4Config`` of an HF config.json, multimodal or text. Raises ConversionError naming the field."""
    text = config.get("text_config") if config.get("model_type") == "llama4" else config
    if not isinstance(text, Mapping):
        raise ConversionError("config.json has no text_config, which Llama4ForConditionalGeneration needs; restore it")
    _refuse_unsupported(config)
    _refuse_unsupported(text)
    width, heads, layers = (integer(text, f) for f in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    theta, scaling = parse_rope(text, DEFAULT_THETA)
    bos = text.get("bos_token_id", config.get("bos_token_id"))
    if bos is not None and (not isinstance(bos, int) or isinstance(bos, bool)):
        raise ConversionError(f"config.json: bos_token_id must be a token id or null but is {bos!r}; set it")
    try:
        return Llama4Config(
            width=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=integer(text, "num_key_value_heads", heads),
            head_dim=integer(text, "head_dim", width // heads),
            mlp_width=integer(text, "intermediate_size_mlp"),
            norm_eps=number(text, "rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=flag(text, "attention_bias"),
            mlp_bias=False,
            vocab_size=integer(text, "vocab_size"),
            max_position=integer(text, "max_position_embeddings"),
            tie_embeddings=flag(text, "tie_word_embeddings", flag(config, "tie_word_embeddings")),
            bos_token_id=bos,
            eos_token_ids=eos_token_ids(text, generation or {}),
            num_experts=integer(text, "num_local_experts"),
            moe_layers=_moe_layers(text, layers),
            expert_mlp_width=integer(text, "intermediate_size"),
            experts_per_token=integer(text, "num_experts_per_tok", 1),
            **irope_fields(text, layers),
        )
    except ConfigError as error:
        raise ConversionError(f"config.json: {error}") from error


def irope_fields(text: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """What a Llama 4 text config says of attention: the fields that ``Llama4Config`` has beyond ``LlamaConfig``'s.

    Absent fields are HF's defaults, which is how the first published configs leave them out.
    """
    nope = _nope_layers(text, layers)
    chunked = text.get("attention_chunk_size", ...) is not None  # null means no chunks, absence HF's default
    chunk = integer(text, "attention_chunk_size", 8192) if chunked else None
    types = listing(text, "layer_types", str)
    wanted = ["full_attention" if i in nope else "chunked_attention" for i in range(layers)]
    if text.get("layer_types") is not None and types != wanted:
        raise ConversionError(
            "config.json: layer_types must be chunked_attention where no_rope_layers is 1 and full_attention where it "
            "is 0; other mixtures do not convert"
        )
    tuned = text.get("attn_temperature_tuning", True)
    if not isinstance(tuned, int) or tuned < 0:  # a flag, or 4 in the first published configs
        raise ConversionError(f"config.json: attn_temperature_tuning must be true or false but is {tuned!r}; set it")
    tuning = None
    if tuned:
        floor_scale = integer(text, "floor_scale", 8192)
        tuning = TemperatureTuning(
            floor_scale=floor_scale, attn_scale=number({"attn_scale": 0.1, **text}, "attn_scale")
        )
    return {
        "nope_layers": nope,
        "attention_chunk": chunk,
        "qk_norm": flag(text, "use_qk_norm", True),
        "temperature_tuning": tuning,
    }


def _moe_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    if text.get("moe_layers") is None:
        step = integer(text, "interleave_moe_layer_step", 1)
        return tuple(range(step - 1, layers, step))
    return tuple(sorted(set(listing(text, "moe_layers", int))))


def _nope_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """HF's ``no_rope_layers`` has a 1 where a block *has* rotary embedding; empty, it leaves out every fourth."""
    if not text.get("no_rope_layers"):
        interval = integer(text, "no_rope_layer_interval", 4)
        return tuple(range(interval - 1, layers, interval))
    rotary = listing(text, "no_rope_layers", int)
    if len(rotary) < layers or set(rotary) - {0, 1}:
        raise ConversionError(f"config.json: no_rope_layers must be {layers} numbers, 0 or 1, but is {rotary}; set it")
    return tuple(i for i in range(layers) if not rotary[i])


def _rules(config: Llama4Config, prefix: str, names: Mapping[str, tuple[int, ...]]) -> Iterator[Rule]:
    D, V = config.width, config.vocab_size
    shared = dataclasses.replace(config, mlp_width=config.expert_mlp_width)
    yield plain("embed", f"{prefix}model.embed_tokens.weight", V, D)
    for i in range(config.num_layers):
        source, target, routed = f"{prefix}model.layers.{i}", f"blocks.{i}", i in config.moe_layers
        yield from block_rules(
            shared if routed else config,
            target,
            source,
            mlp="feed_forward.shared_expert" if routed else "feed_forward",
            interleaved=i not in config.nope_layers,
        )
        if routed:
            yield from _expert_rules(config, f"{target}.experts", f"{source}.feed_forward", names)
    yield norm("norm", f"{prefix}model.norm", D)
    if not config.tie_embeddings:
        yield transposed("lm_head", f"{prefix}lm_head.weight", D, V)


def _expert_rules(
    config: Llama4Config, target: str, source: str, names: Mapping[str, tuple[int, ...]]
) -> Iterator[Rule]:
    D, E, F = config.width, config.num_experts, config.expert_mlp_width
    yield transposed(f"{target}.router", f"{source}.router.weight", D, E)
    if f"{source}.experts.0.gate_proj.weight" not in names:
        yield Rule(
            target=f"{target}.gate_up",
            sources=(f"{source}.experts.gate_up_proj",),
            source_shapes=((E, D, 2 * F),),
            make=lambda x: x.reshape(E, D, 2, F),
            split=lambda x: (x.reshape(E, D, 2 * F),),
        )
        yield plain(f"{target}.down", f"{source}.experts.down_proj", E, F, D)
        return

    def fuse(*gates_and_ups: np.ndarray) -> np.ndarray:  # E gates and then E ups, each [F, D] -> [E, D, 2, F]
        fused = np.empty((E, gates_and_ups[0].shape[1], 2, F), gates_and_ups[0].dtype)
        for place, array in enumerate(gates_and_ups):
            fused[place % E, :, place // E] = array.T
        return fused

    gates, ups, downs = (
        tuple(f"{source}.experts.{e}.{x}_proj.weight" for e in range(E)) for x in ("gate", "up", "down")
    )
    yield Rule(
        target=f"{target}.gate_up",
        sources=(*gates, *ups),
        source_shapes=((F, D),) * (2 * E),
        make=fuse,
        split=lambda x: tuple(x[e, :, c].T for c in range(2) for e in range(E)),
        narrow=True,
    )
    yield Rule(
        target=f"{target}.down",
        sources=downs,
        source_shapes=((D, F),) * E,
        make=lambda *each: np.stack([x.T for x in each]),
        split=lambda x: tuple(one.T for one in x),
        narrow=True,
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    refuse_quantised(config)
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise ConversionError(f"config.json has hidden_act {activation!r}; only silu models convert")


def _summary(config: Llama4Config) -> str:
    return (
        f"Llama 4: {config.num_layers} layers of width {config.width}, {len(config.moe_layers)} of them with "
        f"{config.num_experts} experts, vocabulary {config.vocab_size}, {config.num_parameters / 1e6:.1f} M parameters"
        f", end tokens {list(config.eos_token_ids)}"
    )
