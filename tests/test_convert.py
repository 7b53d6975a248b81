"""Foreign checkpoints to ours: every tensor where it belongs, every mistake one sentence.

Checkpoints are made here, tiny and random, in the forms that the wild has. GGUF files and EAGLE heads have tests of
their own, and so has what may happen on the way (test_convert_disk.py).
"""

import json
import os
import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, D, H, K, N, V, arrays, check, make_hf, make_tensors, reconfig, with_header
from reference_eagle import FORMS, TARGET_LAYERS, VOCAB, WIDTH
from reference_eagle import checkpoint as eagle_checkpoint
from safetensors.numpy import save_file

import convert
from convert import ConversionError
from convert.__main__ import main
from jeagle.checkpoint import CheckpointError, load, load_config, load_eagle
from jeagle.config import RopeScaling


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_arrives(tmp_path, tied, bias, shards):
    tensors = make_tensors(bias=bias, tied=tied)
    flags = {"attention_bias": bias, "mlp_bias": bias, "tie_word_embeddings": tied}
    source = make_hf(tmp_path / "hf", tensors, shards=shards, **flags)
    made = convert.convert(source, tmp_path / "ours")
    check(made, tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]
    about = json.loads((made / "source.json").read_text())
    assert about["format_version"] == 1
    assert about["source"] == "hf"
    assert len(about["sha256"]) == (2 if shards == 1 else 2 + shards)


@pytest.mark.parametrize("lacking", ["mlp", "self_attn"])
def test_biases_of_one_kind_alone(tmp_path, lacking):
    tensors = {n: x for n, x in make_tensors(bias=True).items() if not (lacking in n and n.endswith("bias"))}
    flags = {"attention_bias": lacking == "mlp", "mlp_bias": lacking != "mlp"}
    made = convert.convert(make_hf(tmp_path / "hf", tensors, **flags), tmp_path / "ours")
    config = load_config(made)
    assert (config.attention_bias, config.mlp_bias) == (lacking == "mlp", lacking != "mlp")


@pytest.mark.parametrize(
    ("stored", "asked", "made"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float32"),
        ("float32", "bf16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtypes(tmp_path, stored, asked, made):
    tensors = make_tensors(dtype=np.dtype(getattr(ml_dtypes, stored, stored)))
    source = make_hf(tmp_path / "hf", tensors, torch_dtype=stored)
    check(convert.convert(source, tmp_path / "ours", dtype=asked), tensors, np.dtype(getattr(ml_dtypes, made, made)))


@pytest.mark.parametrize("method", ["compressed-tensors", "fbgemm_fp8"])
def test_fp8_checkpoints(tmp_path, method):
    """One scale per weight, or one per row: in bfloat16 the products, in FP8 the source's own numbers."""
    rng, plain, stored = np.random.default_rng(0), {}, {}
    for name, x in make_tensors(dtype=ml_dtypes.bfloat16).items():
        plain[name] = stored[name] = x
        if "_proj" in name:
            stored[name] = x.astype(ml_dtypes.float8_e4m3fn)
            shape = (len(x), 1) if method == "fbgemm_fp8" else ()
            scale = np.asarray(2.0 ** rng.integers(-3, 3, shape), np.float32)
            stored[f"{name}_scale"] = scale
            plain[name] = (stored[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    source = make_hf(tmp_path / "hf", stored, quantization_config={"quant_method": method}, torch_dtype="bfloat16")
    check(convert.convert(source, tmp_path / "wide", dtype="bfloat16"), plain, np.dtype(ml_dtypes.bfloat16))
    wide = arrays(load(tmp_path / "wide"))
    kept = arrays(load(convert.convert(source, tmp_path / "fp8", dtype="fp8"), "bfloat16"))
    for name in (n for n in wide if n.endswith(".kernel")):
        np.testing.assert_array_equal(kept[name], wide[name])


HALF = np.float32([0.5])


def fp8_source(directory: Path, *, scale=HALF, extra=None, **quantization) -> Path:
    tensors = {**make_tensors(dtype=ml_dtypes.bfloat16), **(extra or {})}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors |= {name: tensors[name].astype(ml_dtypes.float8_e4m3fn), f"{name}_scale": scale}
    return make_hf(directory, tensors, quantization_config={"quant_method": "compressed-tensors", **quantization})


@pytest.mark.parametrize("dtype", ["auto", "fp8", "float32"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": np.float32([np.nan])}, "q_proj.weight_scale holds NaN, inf"),
        ({"scale": np.float32([np.inf])}, "q_proj.weight_scale holds NaN, inf"),
        ({"scale": np.float32([3e38])}, "a scale too large"),
        ({"scale": np.int32([1])}, "proj.weight_scale has dtype int32, expected floats"),
        ({"format": "int-quantized"}, "format 'int-quantized'; of quantised models only FP8"),
    ],
)
def test_bad_fp8_checkpoints(tmp_path, changes, said, dtype):
    source = fp8_source(tmp_path / "hf", **changes)
    with pytest.raises(ConversionError, match=said):
        convert.convert(source, tmp_path / "ours", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_scales_of_an_fp8_cache_are_unused(tmp_path):
    scales = ("self_attn.k_scale", "self_attn.v_scale", "self_attn.k_proj.k_scale", "self_attn.v_proj.output_scale")
    extra = {f"model.layers.{i}.{name}": np.ones(1, np.float32) for i in range(2) for name in scales}
    convert.convert(fp8_source(tmp_path / "hf", extra=extra, format="float-quantized"), tmp_path / "ours")


def test_names_of_the_bare_model(tmp_path):
    """HF loads them into LlamaForCausalLM as well."""
    tensors = make_tensors()
    source = make_hf(tmp_path / "hf", {name.removeprefix("model."): x for name, x in tensors.items()})
    check(convert.convert(source, tmp_path / "ours"), tensors)


def test_tied_embeddings_stored_as_the_lm_head_alone(tmp_path):
    tensors = make_tensors(tied=True)
    stored = {n.replace("model.embed_tokens", "lm_head"): x for n, x in tensors.items()}
    check(convert.convert(make_hf(tmp_path / "hf", stored, tie_word_embeddings=True), tmp_path / "ours"), tensors)


def test_unused_leftovers_of_hf_are_ignored(tmp_path):
    """A stored lm_head beside tied embeddings and rotary tables: HF reads neither."""
    tensors = make_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    source = make_hf(tmp_path / "hf", tensors, tie_word_embeddings=True)
    assert load_config(convert.convert(source, tmp_path / "ours")).tie_embeddings


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("changes", "drop", "wanted"),
    [
        ({}, (), {"rope_theta": 5000.0, "rope_scaling": None, "eos_token_ids": (2,)}),
        ({}, ("rope_theta", "tie_word_embeddings"), {"rope_theta": 10000.0, "tie_embeddings": False}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "dtype": "float32"},
            ("rope_theta", "torch_dtype"),
            {"rope_theta": 7.0, "rope_scaling": None},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}},
            ("rope_theta",),
            {"rope_theta": 7.0, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, (), {"rope_scaling": RopeScaling(kind="linear", factor=2)}),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            (),
            {"rope_scaling": RopeScaling(kind="llama3", factor=8)},
        ),
        ({"eos_token_id": [3, 5], "bos_token_id": None}, (), {"eos_token_ids": (3, 5), "bos_token_id": None}),
        ({"head_dim": None}, ("model_type",), {"head_dim": H}),
        ({}, ("architectures",), {"num_kv_heads": K}),
    ],
)
def test_config_forms(tmp_path, changes, drop, wanted):
    config = load_config(convert.convert(make_hf(tmp_path / "hf", drop=drop, **changes), tmp_path / "ours"))
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_explicit_head_dim_and_absent_kv_heads(tmp_path):
    wide = {n: np.repeat(x, 2, axis=0) for n, x in make_tensors().items() if "q_proj" in n}
    wide |= {n.replace("q_proj", kv): x for n, x in wide.items() for kv in ("k_proj", "v_proj")}
    wide |= {n: np.repeat(x, 2, axis=1) for n, x in make_tensors().items() if "o_proj" in n}
    source = make_hf(tmp_path / "hf", make_tensors() | wide, drop=("num_key_value_heads",), head_dim=2 * H)
    config = load_config(convert.convert(source, tmp_path / "ours"))
    assert (config.head_dim, config.num_kv_heads) == (2 * H, N)


def test_tokenizer_and_generation_config_come_along(tmp_path):
    source = make_hf(tmp_path / "hf")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(f'{{"{name}": 1}}')
    (source / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    made = convert.convert(source, tmp_path / "ours")
    assert load_config(made).eos_token_ids == (2, 4)
    alone = make_hf(tmp_path / "alone", drop=("eos_token_id",))
    (alone / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert load_config(convert.convert(alone, tmp_path / "of one")).eos_token_ids == (4,)  # and not HF's default too
    assert (made / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    assert not (made / "README.md").exists()


@pytest.mark.parametrize("form", FORMS)
def test_eagle_heads_from_directory_to_module(tmp_path, form, capsys):
    """The forms themselves have their own tests; here the whole way, and the target they are checked against."""
    config, weights = eagle_checkpoint(form)
    head, target = tmp_path / "head", tmp_path / "target"
    head.mkdir()
    (head / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(x) for name, x in weights.items()}, head / "model.safetensors")
    target.mkdir()  # a target is only asked for its config
    width = config.get("target_hidden_size") or WIDTH
    fits = {**CONFIG, "hidden_size": width, "vocab_size": VOCAB, "num_hidden_layers": TARGET_LAYERS}
    (target / "config.json").write_text(json.dumps(fits))
    loaded = load_eagle(convert.convert(head, tmp_path / "ours", target=target))
    assert loaded.config.target_layers == TARGET_LAYERS
    assert "taps: " in capsys.readouterr().out
    if loaded.config.reduced_vocabulary:
        assert loaded.draft_to_target[...].dtype == np.int32
    (target / "config.json").write_text(json.dumps({**fits, "vocab_size": VOCAB + 1}))
    with pytest.raises(ConversionError, match="vocab_size"):
        convert.convert(head, tmp_path / "other", target=target)


# ---------------------------------------------------------------------------------------------------------- bad input


def _truncate(source: Path) -> None:
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 10)


def _reheader(edit):
    """The header's text, edited, and the same data."""

    def apply(source: Path) -> None:
        data = (source / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = edit(data[8:end].decode()).encode()
        (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return apply


def _overlap(header: str) -> str:
    tensors = json.loads(header)
    tensors["model.norm.weight"] = tensors["model.layers.0.input_layernorm.weight"]
    return json.dumps(tensors)


def _index(source: Path, **weight_map: str) -> None:
    (source / "model.safetensors").rename(source / "one.safetensors")
    names = dict.fromkeys(make_tensors(), "one.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | weight_map}))


def _retensor(**changes: np.ndarray | None):
    def apply(source: Path) -> None:
        tensors = {**make_tensors(), **{n.replace("__", "."): x for n, x in changes.items()}}
        save_file({n: x for n, x in tensors.items() if x is not None}, source / "model.safetensors")

    return apply


NAN, INF = np.zeros(D, np.float32), np.zeros((V, D), ml_dtypes.bfloat16)
NAN[3], INF[5, 5] = np.nan, np.inf
BAD = {
    "truncated": (_truncate, "model.safetensors is truncated"),
    "empty file": (lambda s: (s / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "header length": (lambda s: (s / "model.safetensors").write_bytes(b"\xff" * 64), "not a safetensors file"),
    "header text": (with_header(b"{nonsense}"), "header is not JSON"),
    "header list": (with_header(b"[1, 2, 3]"), "not a JSON object"),
    "header entry": (with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'), "entry for a"),
    "header dtype": (with_header(b'{"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}'), "entry for a"),
    "header twice": (_reheader(lambda text: text.replace("lm_head", "model.norm", 1)), "names model.norm.weight twice"),
    "header overlap": (_reheader(_overlap), "and model.norm.weight in one place"),
    "float8": (with_header(b'{"a": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}}'), "stored as F8_E4M3"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda s: (s / "config.json").unlink(), "no config.json"),
    "config text": (lambda s: (s / "config.json").write_text("{,}"), "not valid JSON"),
    "config nesting": (lambda s: (s / "config.json").write_text("[" * 100000), "not valid JSON"),
    "config list": (lambda s: (s / "config.json").write_text("[]"), "must hold a JSON object"),
    "missing field": (reconfig(hidden_size=None), "hidden_size must be a positive integer but is missing"),
    "wrong type": (reconfig(num_hidden_layers="two"), "num_hidden_layers"),
    "wrong float": (reconfig(rms_norm_eps="tiny"), "rms_norm_eps"),
    "wrong flag": (reconfig(tie_word_embeddings="yes"), "tie_word_embeddings"),
    "wrong eos": (reconfig(eos_token_id="</s>"), "eos_token_id"),
    "eos outside": (reconfig(eos_token_id=V), "outside the vocabulary"),
    "heads": (reconfig(num_key_value_heads=3), "multiple of num_kv_heads"),
    "layers of billions": (reconfig(num_hidden_layers=10**400), "num_hidden_layers must be a positive integer"),
    "architectures": (reconfig(architectures=5), "architectures must be a list of strings but is 5"),
    "architecture": (reconfig(architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
    "activation": (reconfig(hidden_act="gelu"), "gelu"),
    "quantised": (reconfig(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "yarn": (reconfig(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    # Before the disk is asked for room for it, or a module of so many layers made.
    "vocabulary of billions": (reconfig(vocab_size=10**10), "model.embed_tokens.weight has shape (40, 16), the config"),
    "too many layers": (reconfig(num_hidden_layers=10**9), "but the tensors have 2 layers"),
    "missing tensor": (_retensor(model__norm__weight=None), "missing ['model.norm.weight']"),
    "extra tensor": (_retensor(model__surprise=NAN), "not used ['model.surprise']"),
    "misshaped tensor": (_retensor(model__norm__weight=np.zeros(D + 1, np.float32)), "model.norm.weight has shape"),
    "integer tensor": (_retensor(model__norm__weight=np.zeros(D, np.int32)), "has dtype int32"),
    "nan": (_retensor(model__norm__weight=NAN), "model.norm.weight holds NaN"),
    "inf": (_retensor(lm_head__weight=INF), "lm_head.weight holds NaN or inf"),
    "index up": (lambda s: _index(s, x="../one.safetensors"), "'../one.safetensors'"),
    "index absolute": (lambda s: _index(s, x="/etc/passwd.safetensors"), "'/etc/passwd.safetensors'"),
    "index folder": (lambda s: _index(s, x="a/one.safetensors"), "'a/one.safetensors'"),
    "index other kind": (lambda s: _index(s, x="config.json"), "'config.json'"),
    "index file missing": (lambda s: _index(s, x="two.safetensors"), "two.safetensors, which is missing"),
    "index tensor missing": (lambda s: _index(s, x="one.safetensors"), "holds tensor x"),
    "index empty": (lambda s: (_index(s), (s / "model.safetensors.index.json").write_text("{}")), "no weight_map"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_one_sentence(tmp_path, capsys, case):
    damage, said = BAD[case]
    source = make_hf(tmp_path / "hf")
    damage(source)
    assert main([str(source), str(tmp_path / "new" / "ours")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", error)
    assert said in error
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_wrong_arguments(tmp_path, monkeypatch):
    source = make_hf(tmp_path / "hf")
    made = convert.convert(source, tmp_path / "ours")
    for kwargs, error, said in (
        ({"dtype": "float8"}, ConversionError, "dtype must be one of"),
        ({"kind": "bert"}, ConversionError, "kind must be one of"),
        ({"taps": "both"}, ConversionError, "taps must be one of"),
        ({"target": made}, ConversionError, "drop them"),
        ({"destination": made}, CheckpointError, "already exists"),
        ({"source": made}, ConversionError, "converted checkpoint already"),
        ({"source": tmp_path / "nowhere"}, ConversionError, "does not exist"),
        ({"source": source / "config.json"}, ConversionError, "is a file"),
    ):
        with pytest.raises(error, match=said):
            convert.convert(**{"source": source, "destination": tmp_path / "other", **kwargs})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


def test_hub_names(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    source, asked = make_hf(tmp_path / "hf"), []

    def download(name, **kwargs):
        asked.append(kwargs)
        if name == "org/model":
            return str(source)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    made = convert.convert("org/model", tmp_path / "ours")
    assert json.loads((made / "source.json").read_text())["source"] == "org/model"
    assert not any("*.bin" in call["allow_patterns"] for call in asked)
    with pytest.raises(ConversionError, match="cannot be fetched from the hub"):
        convert.convert("org/other", tmp_path / "other")


def test_pickles_need_torch(tmp_path, monkeypatch):
    source = make_hf(tmp_path / "hf")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"only torch reads; pip install torch"):
        convert.convert(source, tmp_path / "ours")


def test_pickles_through_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="pickles are read through torch")
    source, tensors = make_hf(tmp_path / "hf"), make_tensors(dtype=ml_dtypes.bfloat16)
    (source / "model.safetensors").unlink()
    state = {n: torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16) for n, x in tensors.items()}
    state["model.norm.weight"] = torch._neg_view(-state["model.norm.weight"])
    torch.save(state, source / "pytorch_model.bin")
    check(convert.convert(source, tmp_path / "ours"), tensors, ml_dtypes.bfloat16)
    for odd in (state["lm_head.weight"].to_sparse(), state["lm_head.weight"].to("meta")):
        torch.save({**state, "lm_head.weight": odd}, source / "pytorch_model.bin")
        with pytest.raises(ConversionError, match=r"lm_head.weight is stored as torch\.\w+ on \w+, which does not"):
            convert.convert(source, tmp_path / "other")
