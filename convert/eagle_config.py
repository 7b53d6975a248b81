"""What a foreign EAGLE head is: its config.json and tensor shapes to our ``EagleConfig``, with lines for the user.

Six writers of heads put the same facts in different places. Shapes decide what they can (how the head fuses, biases,
whose embedding and LM head); the config decides the rest; where two of them contradict each other the head is refused,
because a head read wrongly still runs and only drafts badly. Tensor names here are canonical (``convert/eagle.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from convert.fields import flag, integer, listing, number
from convert.llama4 import DEFAULT_THETA as LLAMA4_THETA
from convert.llama4 import irope_fields, is_llama4
from convert.rope import DEFAULT_THETA, parse_rope
from convert.table import ConversionError
from jeagle.config import ConfigError, EagleConfig, LlamaConfig, default_taps
from jeagle.llama4_config import Llama4EagleConfig

__all__ = ["Shapes", "read_config"]

Shapes = Mapping[str, tuple[int, ...]]  # by canonical name
Meaning = Literal["input", "output"]
TAP_IDS = "eagle_aux_hidden_state_layer_ids"


def read_config(
    config: dict[str, Any], shapes: Shapes, *, form: str, target: LlamaConfig | None, taps: Meaning | None
) -> tuple[EagleConfig, tuple[str, ...]]:
    """The head's complete description, and notes to print. ``form`` is the recognised writer's name."""
    speculators = config.get("speculators_model_type")
    if speculators not in (None, "eagle", "eagle3"):
        raise ConversionError(f"config.json has speculators_model_type {speculators!r}; only eagle and eagle3 convert")
    body = config if speculators is None else config.get("transformer_layer_config")
    if not isinstance(body, dict):
        raise ConversionError("config.json has no transformer_layer_config, which speculators heads need; restore it")
    nested = config.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise ConversionError(f"config.json: eagle_config must be an object, got {nested!r}")
    _refuse_unsupported({**config, **body})

    width, heads = integer(body, "hidden_size"), integer(body, "num_attention_heads")
    vocab = integer(body, "vocab_size")
    head_dim = integer(body, "head_dim", width // heads)
    layers = integer(body, "num_hidden_layers")
    found = sorted({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    if len(found) != layers or found != sorted(map(str, range(layers))):  # counted first: the config may say billions
        raise ConversionError(f"config.json has num_hidden_layers {layers}, but the tensors have layers {found}")
    attention = _fuses_in_attention(shapes, width)
    # EAGLE-3 heads for Llama 4 have Llama's blocks, whatever they call themselves.
    llama4 = not attention and is_llama4(body)
    theta, scaling = parse_rope(body, LLAMA4_THETA if llama4 else DEFAULT_THETA)
    target_width = integer(config, "target_hidden_size", width)
    target_layers = _target_layers(config, target)
    notes = [f"EAGLE head: {form}; {layers} layer{'s' * (layers > 1)} of width {width}"]
    values: dict[str, Any]
    if attention:
        _refuse_variants(nested)
        tapped, note = _taps(config, nested, target_layers, meaning=taps)
        notes.append(note)
        _check_fc(shapes, width, target_width, tapped)
        post_norm = flag(nested, "return_hidden_post_norm")
        values = {
            "fusion": "attention",
            "taps": tapped,
            "input_norms": False,
            "first_block_norm": True,
            "tap_norm": _tap_norm(config, nested, shapes),
            "norm_before_residual": _norm_before_residual(config, nested, speculators),
            "final_norm": flag(nested, "use_last_layernorm", True),
            "norm_output": _flag("norm_output", nested, config, default=False) or post_norm,
        }
    else:
        notes.append("taps: none, the target's final normed hidden state")
        final_norm = "norm.weight" in shapes
        values = {
            "fusion": "concat",
            "taps": (),
            "input_norms": _input_norms(shapes),
            "first_block_norm": "layers.0.input_layernorm.weight" in shapes,
            "tap_norm": "none",
            "norm_before_residual": False,
            "final_norm": final_norm,
            # Meta's rule, and vLLM's for the speculators form: a head with a final norm feeds the normed output back.
            "norm_output": final_norm,
        }
    kind: type[EagleConfig] = EagleConfig
    if llama4:
        if body.get("moe_layers"):
            raise ConversionError("config.json: moe_layers must be [] in a draft head, whose blocks are dense")
        kind, values = Llama4EagleConfig, values | irope_fields(body, layers)
    draft_vocab = integer(config, "draft_vocab_size", vocab)
    try:
        head = kind(
            width=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=integer(body, "num_key_value_heads", heads),
            head_dim=head_dim,
            mlp_width=integer(body, "intermediate_size_mlp" if llama4 else "intermediate_size"),
            norm_eps=number(body, "rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=flag(body, "attention_bias"),
            mlp_bias=flag(body, "mlp_bias"),
            vocab_size=vocab,
            max_position=integer(body, "max_position_embeddings"),
            target_width=target_width,
            target_layers=target_layers,
            draft_vocab_size=draft_vocab,
            own_embedding="embed_tokens.weight" in shapes,
            own_lm_head="lm_head.weight" in shapes,
            fc_bias="fc.bias" in shapes or flag(config, "bias") or flag(config, "fusion_bias"),
            **values,
        )
    except ConfigError as error:
        raise ConversionError(f"config.json: {error}") from error
    if target is not None:
        _check_target(head, target)
    notes.append(
        f"vocabulary: {draft_vocab} of the target's {vocab} ids, through d2t"
        if head.reduced_vocabulary
        else f"vocabulary: all {vocab} ids of the target"
    )
    owner = {True: "its own", False: "the target's"}
    notes.append(f"embedding: {owner[head.own_embedding]}; LM head: {owner[head.own_lm_head]}; rope_theta {theta:g}")
    return head, tuple(notes)


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    """What would convert without complaint and compute something else."""
    if body.get("quantization_config"):
        raise ConversionError("config.json has a quantization_config; convert the unquantised head instead")
    activation = body.get("hidden_act") or "silu"
    if activation != "silu":
        raise ConversionError(f"config.json has hidden_act {activation!r}; only silu heads convert")
    if set(listing(body, "layer_types", str)) - {"full_attention"}:
        raise ConversionError(f"config.json has layer_types {body['layer_types']}; only full_attention heads convert")


def _refuse_variants(nested: Mapping[str, Any]) -> None:
    """Model-Optimizer's switches that change what an EAGLE-3 head computes."""
    for name, wanted in (
        ("use_aux_hidden_state", True),
        ("use_input_layernorm_in_first_layer", True),
        ("use_mtp_layernorm", False),
        ("eh_proj_before_attn", False),
    ):
        if nested.get(name) not in (None, wanted):
            raise ConversionError(f"config.json has eagle_config.{name} {nested[name]}; only {wanted} converts")


def _fuses_in_attention(shapes: Shapes, width: int) -> bool:
    """EAGLE-3's first block reads [embedding ; feature]; EAGLE-1's reads fc's output."""
    name = "layers.0.self_attn.q_proj.weight"
    inputs = shapes[name][-1] if shapes.get(name) else None
    if inputs not in (width, 2 * width):
        raise ConversionError(
            f"tensor {name} reads {inputs} columns; a head of hidden_size {width} (config.json) reads {width} "
            f"(EAGLE-1) or {2 * width} (EAGLE-3)"
        )
    return inputs == 2 * width


def _taps(
    config: Mapping[str, Any], nested: Mapping[str, Any], target_layers: int | None, *, meaning: Meaning | None
) -> tuple[tuple[int, ...], str]:
    """Taps as "residual stream entering block i", and the note that says so."""
    top, inner = _ids(config, TAP_IDS), _ids(nested, f"eagle_config.{TAP_IDS}")
    if top is None and inner is None:
        if target_layers is None:
            raise ConversionError(
                f"config.json has no {TAP_IDS}, and the default taps depend on the target's depth; give --target"
            )
        default = default_taps(target_layers)
        return default, f"taps: residual stream entering blocks {list(default)} of {target_layers}, EAGLE-3's default"
    # A top-level list is EAGLE's, vLLM's and speculators' (block inputs), a nested one SpecForge's, SGLang's and
    # Model-Optimizer's (block outputs). Both at once must agree unless the user says what the ids are.
    ids, place = (top, "top-level") if top is not None else (inner or (), "eagle_config's")
    if top is not None and inner is not None and meaning is None and top != tuple(i + 1 for i in inner):
        raise ConversionError(
            f"config.json has {TAP_IDS} {list(top)} at the top (block inputs) and {list(inner)} under eagle_config "
            "(block outputs), which differ; say what the top-level ids are with --taps input or --taps output"
        )
    read_as = meaning or ("input" if top is not None else "output")
    tapped = tuple(i + (read_as == "output") for i in ids)
    if any(t < 0 or (target_layers is not None and t > target_layers) for t in tapped):
        raise ConversionError(
            f"config.json has {TAP_IDS} {list(ids)}, read as block {read_as}s, which must lie in the target's "
            f"{target_layers or 'known'} blocks; check --target and --taps"
        )
    why = "as --taps says" if meaning else "as such a list is meant"
    return tapped, (
        f"taps: residual stream entering blocks {list(tapped)} of the target ({place} {TAP_IDS} {list(ids)} read as "
        f"block {read_as}s, {why})"
    )


def _ids(data: Mapping[str, Any], label: str) -> tuple[int, ...] | None:
    return tuple(listing(data, TAP_IDS, int, label)) or None  # absent, null, or the empty list of a template


def _check_fc(shapes: Shapes, width: int, target_width: int, taps: tuple[int, ...]) -> None:
    shape = shapes.get("fc.weight")
    if shape is None:
        raise ConversionError("tensor fc.weight is missing; an EAGLE-3 head needs it to fuse its taps")
    if tuple(shape) != (width, target_width * len(taps)):
        raise ConversionError(
            f"tensor fc.weight has shape {tuple(shape)}, but config.json's {len(taps)} taps of target_hidden_size "
            f"{target_width} and hidden_size {width} need ({width}, {target_width * len(taps)}); a training-only tap "
            f"listed in {TAP_IDS} must be removed, a wider target named in target_hidden_size"
        )


def _tap_norm(config: Mapping[str, Any], nested: Mapping[str, Any], shapes: Shapes) -> Literal["none", "joint", "each"]:
    # Some writers leave the flag out, so its absence is decided by the tensors; a flag that is there is believed.
    joint = _flag("norm_before_fc", nested, config, default="input_norm.weight" in shapes)
    each = _flag("fc_norm", nested, config, default="fc_norm.0.weight" in shapes)
    if joint and each:
        raise ConversionError("config.json asks for both norm_before_fc and fc_norm; a head has one of them")
    return "joint" if joint else "each" if each else "none"


def _norm_before_residual(config: Mapping[str, Any], nested: Mapping[str, Any], speculators: str | None) -> bool:
    if speculators is not None and config.get("norm_before_residual") is None:
        # speculators defaults to false, vLLM's reader of its configs to true: nothing here can know.
        raise ConversionError("config.json has no norm_before_residual; add the value the head was trained with")
    return _flag("norm_before_residual", nested, config, default=False)


def _input_norms(shapes: Shapes) -> bool:
    embedding, hidden = (f"{x}_layernorm.weight" in shapes for x in ("embedding", "hidden_states"))
    if embedding != hidden:
        raise ConversionError(
            f"the head norms its {'embedding' if embedding else 'hidden state'} alone before fc; only heads with both "
            "embedding_layernorm and hidden_states_layernorm, or neither, convert"
        )
    return embedding


def _target_layers(config: Mapping[str, Any], target: LlamaConfig | None) -> int | None:
    if target is not None:
        return target.num_layers
    names = ("target_layer_count", "num_target_layers")
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _check_target(head: EagleConfig, target: LlamaConfig) -> None:
    for field, ours, theirs in (
        ("target_hidden_size", head.target_width, target.width),
        ("vocab_size", head.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise ConversionError(
                f"the head's config.json has {field} {ours}, the target has {theirs}; give --target the head's target"
            )


def _flag(name: str, *places: Mapping[str, Any], default: bool) -> bool:
    """The first place that says something; null says nothing (Model-Optimizer writes templates with nulls)."""
    return flag(next((place for place in places if place.get(name) is not None), {}), name, default)
