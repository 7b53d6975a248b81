"""Heads of every public form: what is read out of their configs, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference_eagle import DRAFT_VOCAB, FORMS, LLAMA, TARGET_LAYERS, VOCAB, WIDTH, Tensors, checkpoint

from convert.eagle import check_token_maps, describe, is_eagle
from convert.rope import parse_rope
from convert.table import ConversionError, fill
from jeagle.config import LlamaConfig, RopeScaling
from jeagle.eagle import EagleHead

TARGET = LlamaConfig.tiny(width=WIDTH, num_layers=TARGET_LAYERS, vocab_size=VOCAB)
IDS = "eagle_aux_hidden_state_layer_ids"


def shapes_of(weights):
    return {name: array.shape for name, array in weights.items()}


def target_of(form):
    return dataclasses.replace(TARGET, width=48) if form == "eagle3_wider_target" else TARGET


def read(form, *, target=TARGET, taps=None, drop=(), **overrides):
    """describe() of a tiny checkpoint with some config fields replaced or dropped."""
    config, weights = checkpoint(form, **overrides)
    config = {name: value for name, value in config.items() if name not in drop}
    return describe(config, shapes_of(weights), target=target, taps=taps)


def filled(form, *, change, **overrides):
    """The arrays of a checkpoint whose weights ``change`` has edited."""
    config, weights = checkpoint(form, **overrides)
    change(weights)
    table = describe(config, shapes_of(weights), target=target_of(form))
    return dict(fill(table.rules, Tensors(weights), ignore=table.ignore))


@pytest.mark.parametrize("form", FORMS)
def test_rules_fill_the_head_exactly(form):
    config, weights = checkpoint(form)
    assert is_eagle(config, shapes_of(weights))
    table = describe(config, shapes_of(weights), target=target_of(form))
    abstract = nnx.eval_shape(lambda: EagleHead(table.config, rngs=nnx.Rngs(0)))
    state = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))}
    arrays = dict(fill(table.rules, Tensors(weights), ignore=table.ignore))
    assert len(table.rules) == len(arrays)
    assert {path: array.shape for path, array in arrays.items()} == state
    check_token_maps(Tensors(weights), table.config)


@pytest.mark.parametrize(("embedding", "feature"), [("enorm", "hnorm"), ("embed_layernorm", "hidden_states_layernorm")])
def test_norms_before_fc_by_their_other_names(embedding, feature):
    """Both are as wide: exchanged they would load, and draft badly."""

    def rename(weights):
        weights[f"{embedding}.weight"] = weights.pop("embedding_layernorm.weight")
        weights[f"{feature}.weight"] = weights.pop("hidden_states_layernorm.weight")

    plain, renamed = filled("hass", change=lambda weights: None), filled("hass", change=rename)
    assert plain.keys() == renamed.keys()
    assert all(np.array_equal(plain[path], renamed[path]) for path in plain)
    assert not np.array_equal(plain["embed_norm.scale"], plain["hidden_norm.scale"])


EXPECTED = {
    "eagle1": {"fusion": "concat", "taps": (), "own_embedding": True, "own_lm_head": False, "first_block_norm": False},
    "hass": {"fusion": "concat", "input_norms": True, "fc_bias": True, "final_norm": False},
    "eagle3": {"fusion": "attention", "taps": (2, 4, 5), "own_embedding": False, "draft_vocab_size": VOCAB},
    "eagle3_wider_target": {"target_width": 48, "width": WIDTH, "own_embedding": True, "num_layers": 2},
    "speculators": {"tap_norm": "joint", "norm_before_residual": True, "norm_output": False, "taps": (2, 4, 5)},
    "eagle31": {"tap_norm": "each", "norm_before_residual": False, "norm_output": True, "final_norm": True},
    "speculators_eagle1": {"fusion": "concat", "own_embedding": False, "final_norm": False, "norm_output": False},
    "modelopt": {"taps": (2, 4, 5), "draft_vocab_size": DRAFT_VOCAB, "own_lm_head": True, "final_norm": True},
    "specforge": {"taps": (2, 4, 5), "draft_vocab_size": DRAFT_VOCAB, "norm_before_residual": False},
    "meta": {"fusion": "concat", "num_layers": 2, "first_block_norm": True, "final_norm": True, "norm_output": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_read(form):
    table = read(form, target=target_of(form))
    assert {name: getattr(table.config, name) for name in EXPECTED[form]} == EXPECTED[form]
    assert table.config.target_layers == TARGET_LAYERS
    assert any(note.startswith("taps:") for note in table.notes)


def test_a_plain_llama_is_no_head():
    names = {f"model.{x}.weight": (4,) for x in ("embed_tokens", "layers.0.input_layernorm", "norm")}
    assert not is_eagle({**LLAMA, "architectures": ["LlamaForCausalLM"]}, names)
    assert is_eagle(LLAMA, {"model.midlayer.hidden_norm.weight": (4,)})
    assert is_eagle(LLAMA, {"fusion_fc.weight": (4, 8)})


@pytest.mark.parametrize(
    ("form", "overrides", "taps", "resolved"),
    [
        ("specforge", {}, None, (2, 4, 5)),  # nested: outputs
        ("specforge", {}, "input", (1, 3, 4)),
        ("speculators", {}, None, (2, 4, 5)),  # top-level: inputs
        ("speculators", {}, "output", (3, 5, 6)),
        ("eagle3", {IDS: [5, 0, 8]}, None, (5, 0, 8)),  # the file's order; 8 is the last block's output
        ("eagle3", {IDS: [1, 3, 4], "eagle_config": {IDS: [0, 2, 3]}}, None, (1, 3, 4)),  # both, and they agree
        ("eagle3", {IDS: [1, 3, 4], "eagle_config": {IDS: [1, 3, 4]}}, "output", (2, 4, 5)),
        ("eagle3", {IDS: [], "eagle_config": {IDS: None}}, None, (2, 4, 5)),  # templates
    ],
)
def test_taps(form, overrides, taps, resolved):
    table = read(form, taps=taps, **overrides)
    assert table.config.taps == resolved
    assert str(list(resolved)) in " ".join(table.notes)


def test_default_taps_need_the_targets_depth():
    with pytest.raises(ConversionError, match="give --target"):
        read("eagle3", target=None)
    assert read("eagle3", target=None, num_target_layers=32).config.taps == (2, 16, 29)
    assert read("speculators", target=None).config.target_layers is None


NESTED = {"use_aux_hidden_state": True}


@pytest.mark.parametrize(
    ("form", "overrides", "message"),
    [
        ("eagle3", {IDS: [1, 3, 4], "eagle_config": {IDS: [1, 3, 4]}}, "--taps input or --taps output"),
        ("speculators", {IDS: [2, 4, 5, 7]}, r"fc\.weight has shape \(32, 96\).*4 taps.*training-only"),
        ("eagle3", {IDS: [2, 4, 9]}, "must lie in the target's 8 blocks"),
        ("eagle3", {IDS: [-1, 4, 5]}, "must lie in"),
        ("eagle3", {IDS: "2,4,5"}, "list of integers"),
        ("eagle3", {"eagle_config": {IDS: [True]}}, rf"eagle_config\.{IDS} must be a list of integers"),
        ("eagle1", {"layer_types": 5}, "layer_types must be a list of strings but is 5"),
        ("eagle1", {"hidden_size": 10**400}, "hidden_size must be a positive integer"),
        ("eagle1", {"rms_norm_eps": 10**400}, r"rms_norm_eps must be a number but is 10+\.\.\.; set it"),
        ("eagle3_wider_target", {"target_hidden_size": 40}, "target_hidden_size 40"),
        ("eagle3", {"vocab_size": VOCAB + 1}, f"vocab_size {VOCAB + 1}, the target has {VOCAB}"),
        ("eagle3", {"draft_vocab_size": VOCAB + 1}, "draft_vocab_size"),
        ("eagle1", {"num_hidden_layers": 2}, r"num_hidden_layers 2.*\['0'\]"),
        ("eagle1", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("modelopt", {"quantization_config": {"quant_algo": "FP8"}}, "unquantised"),
        ("eagle1", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("eagle1", {"hidden_size": 24}, r"q_proj\.weight reads 32 columns"),
        ("eagle1", {"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ("eagle1", {"num_attention_heads": 3, "num_key_value_heads": 2}, "multiple of num_kv_heads"),
        ("eagle1", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("eagle1", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor must be a number"),
        ("eagle1", {"rope_scaling": 8}, "rope_scaling must be an object"),
        ("eagle1", {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ("modelopt", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state False"),
        ("modelopt", {"eagle_config": {**NESTED, "use_input_layernorm_in_first_layer": False}}, "first_layer False"),
        ("modelopt", {"eagle_config": {**NESTED, "use_mtp_layernorm": True}}, "use_mtp_layernorm True"),
        ("modelopt", {"eagle_config": [1]}, "eagle_config must be an object"),
        ("speculators", {"fc_norm": True}, "both norm_before_fc and fc_norm"),
        ("speculators", {"norm_output": "yes"}, "norm_output must be true or false"),
        ("speculators", {"norm_before_residual": None}, "no norm_before_residual"),
        ("speculators", {"speculators_model_type": "dflash"}, "'dflash'"),
        ("speculators", {"transformer_layer_config": None}, "no transformer_layer_config"),
    ],
)
def test_refused_configs(form, overrides, message):
    with pytest.raises(ConversionError, match=message):
        read(form, target=target_of(form), **overrides)


SIZES = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]


@pytest.mark.parametrize("field", [*SIZES, "max_position_embeddings", "rms_norm_eps"])
def test_missing_fields_are_named(field):
    with pytest.raises(ConversionError, match=rf"config\.json: {field} must be"):
        read("eagle1", drop=[field])


def test_target_must_fit():
    for wrong in ({"width": 64}, {"vocab_size": 97}):
        with pytest.raises(ConversionError, match="give --target the head's target"):
            read("speculators", target=dataclasses.replace(TARGET, **wrong))
    with pytest.raises(ConversionError, match="target's 4 blocks"):
        read("speculators", target=dataclasses.replace(TARGET, num_layers=4))


def test_nested_flags_of_nvidia_heads():
    ids = {IDS: [1, 3, 4], "norm_before_fc": True, "return_hidden_post_norm": True}
    config = read("modelopt", eagle_config=ids).config
    assert (config.tap_norm, config.norm_output) == ("joint", True)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ({0: -1}, "maps draft id 0 to -1, outside the target's 61 ids"),
        ({DRAFT_VOCAB - 1: VOCAB}, "outside the target's 61 ids"),
        ({0: 2**63 - 1}, "outside"),
        ({0: 5, 1: 4}, "two draft ids to one target id"),
    ],
)
def test_bad_d2t(offsets, message):
    def change(weights):
        weights["d2t"][list(offsets)] = list(offsets.values())

    with pytest.raises(ConversionError, match=message):
        filled("specforge", change=change)


def test_d2t_is_required_and_integer():
    with pytest.raises(ConversionError, match="d2t is missing"):
        filled("modelopt", change=lambda w: w.pop("d2t"))
    with pytest.raises(ConversionError, match="d2t has dtype float32, expected integers"):
        filled("modelopt", change=lambda w: w.update(d2t=w["d2t"].astype(np.float32)))
    arrays = filled("modelopt", change=lambda w: None)
    assert arrays["draft_to_target"].dtype == np.int32


def test_token_maps_must_agree():
    config, weights = checkpoint("modelopt")
    head = describe(config, shapes_of(weights), target=TARGET).config
    absolute = {**weights, "d2t": weights["d2t"] // 2 + 1}
    with pytest.raises(ConversionError, match="t2d does not mark the ids"):
        check_token_maps(Tensors(absolute), head)
    for odd in (np.int64(3), weights["d2t"].astype(np.float32), weights["d2t"][1:]):  # left to fill, which names it
        check_token_maps(Tensors({**weights, "d2t": np.asarray(odd)}), head)

    config, weights = checkpoint("eagle3", draft_vocab_size=VOCAB)
    weights |= {"d2t": np.zeros(VOCAB, np.int64), "t2d": np.ones(VOCAB, bool)}
    table = describe(config, shapes_of(weights), target=TARGET)
    assert table.ignore == {"d2t", "t2d"} and not table.config.reduced_vocabulary
    check_token_maps(Tensors(weights), table.config)
    weights["d2t"][:2] = 1, -1  # swaps ids 0 and 1
    with pytest.raises(ConversionError, match="renumbers a draft vocabulary"):
        check_token_maps(Tensors(weights), table.config)
    weights["d2t"] = weights["d2t"][:DRAFT_VOCAB]  # and a config that calls it otherwise: truncated_vocab_size
    with pytest.raises(ConversionError, match=rf"d2t has shape \({DRAFT_VOCAB},\).*; set draft_vocab_size"):
        check_token_maps(Tensors(weights), table.config)


@pytest.mark.parametrize(
    ("form", "lost", "named"),
    [
        ("eagle3", "midlayer.hidden_norm.weight", "midlayer.hidden_norm.weight"),
        ("specforge", "model.midlayer.mlp.up_proj.weight", "model.midlayer.mlp.up_proj.weight"),
        ("eagle3", "fc.weight", "fc.weight"),
        ("eagle3", "norm.weight", "norm.weight"),
        ("speculators", "input_norm.weight", "input_norm.weight"),
        ("eagle31", "fc_norm.2.weight", "fc_norm.2.weight"),
        ("modelopt", "lm_head.weight", "lm_head"),
        ("hass", "embedding_layernorm.weight", "hidden state alone"),
        ("eagle3_wider_target", "embed_tokens.weight", "its own embedding"),
        ("meta", "model.layers.1.input_layernorm.weight", "layers.1.input_layernorm.weight"),
    ],
)
def test_missing_tensors_are_named(form, lost, named):
    with pytest.raises(ConversionError, match=named.replace(".", r"\.")):
        filled(form, change=lambda w: w.pop(lost))


def test_extra_and_misshaped_tensors_are_named():
    with pytest.raises(ConversionError, match=r"not used \['surprise.weight'\]"):
        filled("eagle1", change=lambda w: w.update({"surprise.weight": w["fc.weight"]}))
    with pytest.raises(ConversionError, match=r"tensor norm\.weight has shape"):
        filled("eagle3", change=lambda w: w.update({"norm.weight": w["norm.weight"][1:]}))
    # A flag that says no beside a tensor that says yes: leaving the norm out would only draft badly.
    with pytest.raises(ConversionError, match=r"not used \['input_norm.weight'\]"):
        filled("speculators", change=lambda w: None, norm_before_fc=False)
    with pytest.raises(ConversionError, match="one and the same"):
        filled("eagle3", change=lambda w: w.update({"model.norm.weight": w["norm.weight"]}))


def test_recomputed_tables_are_left_unused():
    def add(weights):
        weights["midlayer.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    assert "norm.scale" in filled("eagle3", change=add)


def test_the_drafts_own_rope_is_kept():
    assert read("eagle3", drop=["rope_theta"]).config.rope_theta == 10000.0  # not the target's
    table = read("eagle1", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert (table.config.rope_theta, table.config.rope_scaling) == (5e5, RopeScaling(kind="linear", factor=2.0))
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    expected = RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
    )
    new = {"rope_parameters": {"rope_theta": 7e4, "rope_type": "llama3", **llama3}, "rope_theta": 1e4}
    assert parse_rope(new) == (7e4, expected)
    assert read("eagle1", rope_scaling={"rope_type": "llama3", **llama3}).config.rope_scaling == expected
    assert parse_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}) == (3.0, None)
    assert parse_rope({}) == (10000.0, None)
    assert parse_rope({"rope_theta": None}, 5e5) == (5e5, None)
    # Two that differ, as transformers 5 reads them.
    inside = {"rope_type": "llama3", "rope_theta": 5e5, **llama3}
    assert parse_rope({"rope_scaling": inside, "rope_theta": 1e4}, 3.0) == (5e5, expected)
    default = {"rope_type": "default", "rope_theta": 7e4}
    assert parse_rope({"rope_scaling": inside, "rope_parameters": default}) == (5e5, expected)
    assert parse_rope({"rope_scaling": default, "rope_parameters": inside}) == (7e4, None)
    theirs = {"rope_scaling": {"rope_type": "llama3", **llama3}, "rope_parameters": default, "rope_theta": 1e4}
    assert parse_rope(theirs) == (1e4, expected)
    del theirs["rope_theta"]  # where transformers would take its class's default
    assert parse_rope(theirs) == (7e4, expected)
    for length in (0, -1, 1e308, 8192.5):
        with pytest.raises(ConversionError, match="original_max_position_embeddings must be a positive integer"):
            parse_rope({"rope_scaling": {**inside, "original_max_position_embeddings": length}})


def test_weights_land_where_the_layout_says():
    """fc is transposed; q, k and v of a kv head lie together (spot check of one element each)."""
    _, weights = checkpoint("eagle1")
    arrays = filled("eagle1", change=lambda w: None)
    assert arrays["fc.kernel"][40, 3] == weights["fc.weight"][3, 40]
    q, k, v = (weights[f"layers.0.self_attn.{p}_proj.weight"] for p in "qkv")
    qkv = arrays["blocks.0.qkv.kernel"]  # [D, K, G+2, H], here K = 2, G = 2, H = 8
    assert qkv[5, 1, 0, 3] == q[2 * 8 + 3, 5]
    assert qkv[5, 1, 2, 3] == k[8 + 3, 5]
    assert qkv[5, 1, 3, 3] == v[8 + 3, 5]
    assert jnp.asarray(arrays["embed"]).shape == (VOCAB, WIDTH)
