"""Llama 4 to ours: both layouts of its experts, the text model of a multimodal checkpoint, and Meta's draft heads."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import arrays
from safetensors.numpy import save_file

import convert
from convert import ConversionError
from convert.llama4 import describe, read_config
from convert.table import fill, unfill
from jeagle.checkpoint import load, load_config, load_eagle
from jeagle.config import EagleConfig, RopeScaling
from jeagle.llama4 import Llama4EagleHead
from jeagle.llama4_config import Llama4Config, Llama4EagleConfig, TemperatureTuning

D, H, N, K, F, E, V, WIDE = 16, 8, 4, 2, 12, 3, 40, 24
G = N // K
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
TEXT = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_size": D,
    "intermediate_size": F,
    "intermediate_size_mlp": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "num_local_experts": E,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
MULTIMODAL = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": {k: v for k, v in TEXT.items() if k != "architectures"},
    "vision_config": {},
}
QUANTIZED = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
# What the two published config.json files say (text_config, of 48 layers).
PUBLISHED = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "vocab_size": 202048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "tie_word_embeddings": False,
}
SCOUT = PUBLISHED | {
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "moe_layers": list(range(48)),
    "use_qk_norm": True,
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "attn_temperature_tuning": True,
    "max_position_embeddings": 10485760,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
MAVERICK = PUBLISHED | {
    "num_local_experts": 128,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "no_rope_layers": [],
    "attn_temperature_tuning": 4,
    "max_position_embeddings": 1048576,
    "rope_scaling": None,
}


UP = "model.layers.1.feed_forward.experts.1.up_proj"


def attention_tensors(rng, at: str) -> dict[str, np.ndarray]:
    shapes = {f"{n}layernorm.weight": (D,) for n in ("input_", "post_attention_")}
    rows = {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}
    shapes |= {f"self_attn.{n}_proj.weight": shape for n, shape in rows.items()}
    return {f"{at}.{n}": rng.standard_normal(s).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}


def mlp_tensors(rng, at: str, width: int) -> dict[str, np.ndarray]:
    shapes = {"gate": (width, D), "up": (width, D), "down": (D, width)}
    return {f"{at}.{n}_proj.weight": rng.standard_normal(s).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}


def make_tensors(prefix: str, *, fp8: bool) -> dict[str, np.ndarray]:
    """One dense block and one of experts, whose weights are FP8 numbers times powers of two in either layout."""
    rng = np.random.default_rng(3)
    top = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    tensors = {n: rng.standard_normal(s).astype(ml_dtypes.bfloat16) for n, s in top.items()}
    for i in range(2):
        tensors |= attention_tensors(rng, f"model.layers.{i}")
    tensors |= mlp_tensors(rng, "model.layers.0.feed_forward", WIDE)
    moe = "model.layers.1.feed_forward"
    tensors |= mlp_tensors(rng, f"{moe}.shared_expert", F)
    tensors[f"{moe}.router.weight"] = rng.standard_normal((E, D)).astype(ml_dtypes.bfloat16)
    fused = {n: np.empty(s, ml_dtypes.bfloat16) for n, s in (("gate_up_proj", (E, D, 2 * F)), ("down_proj", (E, F, D)))}
    for e in range(E):
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            weight = rng.standard_normal(shape).astype(FP8)
            scale = (2.0 ** rng.integers(-8, 2, (shape[0], 1))).astype(ml_dtypes.bfloat16)
            at = f"{moe}.experts.{e}.{name}_proj"
            if fp8:
                tensors |= {f"{at}.weight": weight, f"{at}.weight_scale": scale, f"{at}.input_scale": np.ones(1, "f4")}
                continue
            plain = (weight.astype(np.float32) * scale.astype(np.float32)).T
            where = {"gate": np.s_[e, :, :F], "up": np.s_[e, :, F:], "down": np.s_[e]}[name]
            fused["down_proj" if name == "down" else "gate_up_proj"][where] = plain
    if not fp8:
        tensors |= {f"{moe}.experts.{n}": x for n, x in fused.items()}
    return {prefix + n: x for n, x in tensors.items()}


def make_source(directory: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, directory / "model.safetensors")
    return directory


def check_rotated(kernel: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, interleaved: bool) -> None:
    """Index by index: our kernel [D, K, G+2, H] against torch's rows."""
    place = [2 * j if j < H // 2 else 2 * j - H + 1 for j in range(H)] if interleaved else list(range(H))
    for head in range(K):
        for g in range(G):
            rows = [(head * G + g) * H + j for j in place]
            np.testing.assert_array_equal(kernel[:, head, g].T, q[rows])
        np.testing.assert_array_equal(kernel[:, head, G].T, k[[head * H + j for j in place]])
        np.testing.assert_array_equal(kernel[:, head, G + 1].T, v[head * H : (head + 1) * H])


def test_both_layouts_become_the_same_checkpoint(tmp_path, capsys):
    """Text alone and fused; multimodal, FP8 and one set per expert."""
    fused = make_source(tmp_path / "fused", make_tensors("", fp8=False), TEXT)
    tensors = make_tensors("language_model.", fp8=True)
    tensors |= {n: np.zeros(3, "f4") for n in ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight")}
    single = make_source(tmp_path / "single", tensors, MULTIMODAL | QUANTIZED)
    converted = [convert.convert(source, tmp_path / f"ours-{source.name}") for source in (fused, single)]
    assert "vision: the 2 tensors of the vision tower and its projector are skipped" in capsys.readouterr().out
    assert load_config(converted[0]) == load_config(converted[1])
    first, second = (arrays(load(path)) for path in converted)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, second[name], err_msg=name)

    source = make_tensors("", fp8=False)
    moe = "model.layers.1.feed_forward"
    np.testing.assert_array_equal(first["blocks.1.experts.router"].T, source[f"{moe}.router.weight"])
    np.testing.assert_array_equal(first["blocks.1.experts.down"], source[f"{moe}.experts.down_proj"])
    np.testing.assert_array_equal(
        first["blocks.1.experts.gate_up"][:, :, 1], source[f"{moe}.experts.gate_up_proj"][..., F:]
    )
    np.testing.assert_array_equal(
        first["blocks.1.gate_up.kernel"][:, 0].T, source[f"{moe}.shared_expert.gate_proj.weight"]
    )
    for i in range(2):
        q, k, v = (source[f"model.layers.{i}.self_attn.{n}_proj.weight"] for n in "qkv")
        check_rotated(first[f"blocks.{i}.qkv.kernel"], q, k, v, interleaved=i == 0)  # block 1 has no rotary embedding


@pytest.mark.parametrize("fp8", [False, True])
def test_the_table_goes_both_ways(fp8):
    class Tensors(dict):
        names = dict.keys
        read = dict.__getitem__

        def shape(self, name):
            return self[name].shape

    source = Tensors({n: x.astype(np.float32) for n, x in make_tensors("", fp8=fp8).items() if "scale" not in n})
    rules = describe(TEXT, {n: x.shape for n, x in source.items()}).rules
    back = dict(unfill(rules, dict(fill(rules, source))))
    assert back.keys() == source.keys()
    for name, array in source.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_published_configs():
    scout, maverick = read_config(SCOUT), read_config({"model_type": "llama4", "text_config": MAVERICK})
    assert scout.num_parameters / 1e9 == pytest.approx(107.77, abs=0.01)
    assert maverick.num_parameters / 1e9 == pytest.approx(400.71, abs=0.01)
    assert scout.rope_scaling == RopeScaling(kind="llama3", factor=16, low_freq_factor=1, high_freq_factor=1)
    assert scout.nope_layers == maverick.nope_layers == tuple(range(3, 48, 4))
    assert (scout.qk_norm, maverick.qk_norm) == (True, False)
    assert (len(scout.moe_layers), maverick.moe_layers[:3]) == (48, (1, 3, 5))
    assert (
        scout.temperature_tuning == maverick.temperature_tuning == TemperatureTuning(floor_scale=8192, attn_scale=0.1)
    )
    assert scout.attention_chunk == 8192 and scout.eos_token_ids == (200001, 200007, 200008)
    bare = read_config({k: v for k, v in TEXT.items() if k != "rope_theta"} | {"attention_chunk_size": None})
    assert bare.rope_theta == 500000.0 and bare.attention_chunk is None
    assert read_config(TEXT | {"rope_theta": None}).rope_theta == 500000.0
    inside = {k: v for k, v in TEXT.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 1e6}}
    assert read_config(inside).rope_theta == 1e6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "only silu"),
        ({"layer_types": ["full_attention", "full_attention"]}, "layer_types must be"),
        ({"layer_types": 5}, "layer_types must be a list of strings"),
        ({"attn_scale": 10**400}, "attn_scale must be a number"),
        ({"no_rope_layers": [1]}, "no_rope_layers must be 2 numbers"),
        ({"no_rope_layers": [1, "x"]}, "no_rope_layers must be a list of integers"),
        ({"moe_layers": [5]}, "moe_layers must list blocks"),
        ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning must be"),
        ({"num_experts_per_tok": 9}, "exceeds num_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "method 'gptq'"),
        ({"model_type": "llama4"}, "no text_config"),
        ({"intermediate_size_mlp": None}, "intermediate_size_mlp must be"),
    ],
)
def test_configs_that_do_not_convert(changes, said):
    with pytest.raises(ConversionError, match=said):
        read_config(TEXT | changes)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda t: t.pop("model.layers.1.feed_forward.experts.1.up_proj.weight_scale"),
            "without a .*up_proj.weight_scale",
        ),
        (
            lambda t: t.update({"model.layers.1.feed_forward.experts.1.up_proj.weight_scale": np.ones(2, "f4")}),
            r"\(2,\)",
        ),
        (lambda t: t.pop("model.layers.1.feed_forward.experts.2.up_proj.weight"), "missing"),
        (lambda t: t.update({"model.layers.1.feed_forward.strange": np.ones(2, "f4")}), "not used .*strange"),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, said):
    tensors = make_tensors("", fp8=True)
    damage(tensors)
    with pytest.raises(ConversionError, match=said):
        convert.convert(make_source(tmp_path / "hf", tensors, TEXT | QUANTIZED), tmp_path / "ours")


def meta_head() -> tuple[dict, dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    tensors = {"fc.weight": rng.standard_normal((D, 2 * D)), "norm.weight": np.ones(D)}
    for i in range(2):
        tensors |= attention_tensors(rng, f"layers.{i}") | mlp_tensors(rng, f"layers.{i}.feed_forward", WIDE)
    config = TEXT | {"architectures": ["EagleLlama4ForCausalLM"], "moe_layers": [], "no_rope_layers": [1, 0]}
    return config, {f"model.{n}": x.astype(np.float32) for n, x in tensors.items()}


def test_meta_heads(tmp_path, capsys):
    config, tensors = meta_head()
    target = make_source(tmp_path / "target", {}, MULTIMODAL)
    made = convert.convert(make_source(tmp_path / "head", tensors, config), tmp_path / "ours", target=target)
    assert "Meta's dense form for Llama 4" in capsys.readouterr().out
    head = load_eagle(made)
    assert isinstance(head, Llama4EagleHead) and isinstance(head.config, Llama4EagleConfig)
    assert (head.config.nope_layers, head.config.mlp_width, head.config.norm_output) == ((1,), WIDE, True)
    for i in range(2):
        q, k, v = (tensors[f"model.layers.{i}.self_attn.{n}_proj.weight"] for n in "qkv")
        check_rotated(np.asarray(head.blocks[i].qkv.kernel[...]), q, k, v, interleaved=i == 0)
        gate = tensors[f"model.layers.{i}.feed_forward.gate_proj.weight"]
        np.testing.assert_array_equal(head.blocks[i].gate_up.kernel[:, 0].T, gate)
    with pytest.raises(ConversionError, match=r"moe_layers must be \[\]"):
        convert.convert(make_source(tmp_path / "moe", tensors, config | {"moe_layers": [1]}), tmp_path / "none")


def test_eagle3_heads_have_llama_blocks(tmp_path):
    """As SpecForge and Model-Optimizer write them for Scout and Maverick; only the target is a Llama 4."""
    rng = np.random.default_rng(6)
    tensors = {"fc.weight": rng.standard_normal((D, 3 * D)), "norm.weight": np.ones(D)}
    tensors["lm_head.weight"] = np.ones((V, D))
    tensors |= mlp_tensors(rng, "midlayer.mlp", WIDE) | attention_tensors(rng, "midlayer")
    tensors |= {
        f"midlayer.self_attn.{n}_proj.weight": rng.standard_normal((w * H, 2 * D)) for n, w in zip("qkv", (N, K, K))
    }
    tensors["midlayer.hidden_norm.weight"] = np.ones(D)
    config = {k: v for k, v in TEXT.items() if k != "intermediate_size_mlp"} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "intermediate_size": WIDE,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 1]},
    }
    source = make_source(tmp_path / "head", {n: x.astype(np.float32) for n, x in tensors.items()}, config)
    target = make_source(tmp_path / "target", {}, MULTIMODAL)
    head = load_eagle(convert.convert(source, tmp_path / "ours", target=target))
    assert type(head.config) is EagleConfig and head.config.taps == (1, 2, 2)
    assert head.config.target_layers == 2
    q, k, v = (tensors[f"midlayer.self_attn.{n}_proj.weight"].astype(np.float32) for n in "qkv")
    check_rotated(np.asarray(head.blocks[0].qkv.kernel[...]), q, k, v, interleaved=False)
    with pytest.raises(ConversionError, match="vocab_size"):
        wider = MULTIMODAL | {"text_config": MULTIMODAL["text_config"] | {"vocab_size": V + 1}}
        convert.convert(source, tmp_path / "none", target=make_source(tmp_path / "wider", {}, wider))


def test_a_llama4_checkpoint_is_a_target(tmp_path):
    made = convert.convert(make_source(tmp_path / "hf", make_tensors("", fp8=False), TEXT), tmp_path / "ours")
    config = load_config(made)
    assert isinstance(config, Llama4Config)
    assert (config.moe_layers, config.nope_layers, config.eos_token_ids) == ((1,), (1,), (2, 3))
