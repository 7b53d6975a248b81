"""GGUF files to ours: names, the row order of Q and K, dequantisation, rotary scaling, tokenizers."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import D, F, H, K, L, N, V, check, make_tensors

import convert
import convert.gguf_file
from convert import ConversionError
from convert.gguf_tokenizer import tokenizer_files
from jeagle.checkpoint import load_config
from jeagle.config import RopeScaling

gguf = pytest.importorskip("gguf", reason="GGUF files are read through the gguf package")

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_gguf(
    path: Path, tensors, *, architecture: str = "llama", quantised=(), extra=None, scaling=None, fields=None
) -> Path:
    """What llama.cpp's converter writes: Q and K rows interleaved, float32 metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_rope_dimension_count(H)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(2.0)
    add = {list: writer.add_array, float: writer.add_float32, int: writer.add_int32, str: writer.add_string}
    for name, value in (fields or {}).items():
        writer.kv_data[0].pop(name, None)
        add[type(value)](name, value)
    for name, tensor in tensors.items():
        stem, leaf = name.rsplit(".", 1)
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        theirs = f"blk.{match[1]}.{GGUF_NAMES[match[2]]}" if match else GGUF_NAMES[stem]
        for projection, heads in (("q_proj", N), ("k_proj", K)):
            if stem.endswith(projection):
                halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if name in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{theirs}.{leaf}", gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{theirs}.{leaf}", np.ascontiguousarray(tensor))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path, tied, capsys):
    tensors = make_tensors(tied=tied)
    made = convert.convert(make_gguf(tmp_path / "m.gguf", tensors), tmp_path / "ours")
    check(made, tensors)
    config = load_config(made)
    assert (config.norm_eps, config.rope_theta, config.tie_embeddings) == (1e-5, 5000.0, tied)
    assert config.eos_token_ids == (2, 3)
    assert "no tokenizer" in capsys.readouterr().out


def test_gguf_is_dequantised(tmp_path, monkeypatch):
    """Q8_0 comes in blocks of 32, which no row here holds: one wide tensor, in pieces of one row."""
    monkeypatch.setattr(convert.gguf_file, "PIECE", 1)
    wide = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    path = make_gguf(tmp_path / "m.gguf", {"lm_head.weight": wide}, quantised=("lm_head.weight",))
    source = convert.gguf_file.GGUFSource(gguf.GGUFReader(path), "m.gguf", num_heads=N, num_kv_heads=K)
    np.testing.assert_allclose(source.read("lm_head.weight"), wide, atol=0.02)


def test_gguf_rope_scaling(tmp_path):
    head_dim = H
    frequency = 5000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    wavelength = 2 * np.pi / frequency
    blend = np.clip((8192 / wavelength - 1) / 3, 0, 1)  # llama.cpp's formula for rope_freqs
    factors = (1 / ((1 - blend) / 32 + blend)).astype(np.float32)
    for name, divisors, wanted in (
        ("none", np.ones(2), None),
        ("llama3", factors, RopeScaling(kind="llama3", factor=32.0) if np.any(factors != 1) else None),
    ):
        path = make_gguf(tmp_path / f"{name}.gguf", make_tensors(), extra={"rope_freqs.weight": np.float32(divisors)})
        assert load_config(convert.convert(path, tmp_path / name)).rope_scaling == wanted
    path = make_gguf(tmp_path / "odd.gguf", make_tensors(), extra={"rope_freqs.weight": np.float32([1, 5])})
    with pytest.raises(ConversionError, match=r"rope_freqs.weight in odd.gguf is not"):
        convert.convert(path, tmp_path / "odd")
    path = make_gguf(tmp_path / "linear.gguf", make_tensors(), scaling=gguf.RopeScalingType.LINEAR)
    assert load_config(convert.convert(path, tmp_path / "linear")).rope_scaling == RopeScaling(kind="linear", factor=2)
    path = make_gguf(tmp_path / "old.gguf", make_tensors(), fields={"llama.rope.scale_linear": 4.0})
    assert load_config(convert.convert(path, tmp_path / "old")).rope_scaling == RopeScaling(kind="linear", factor=4)


def test_gguf_end_of_turn_by_its_text(tmp_path):
    tokens = [f"t{i}" for i in range(V - 1)] + ["<|eot_id|>"]
    path = make_gguf(tmp_path / "m.gguf", make_tensors(), fields={"tokenizer.ggml.tokens": tokens})
    assert load_config(convert.convert(path, tmp_path / "ours")).eos_token_ids == (2, 3, V - 1)


def test_bad_gguf(tmp_path, monkeypatch):
    good = make_gguf(tmp_path / "good.gguf", make_tensors())
    (tmp_path / "short.gguf").write_bytes(good.read_bytes()[:200])
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "text.gguf").write_text("not a model")
    make_gguf(tmp_path / "qwen.gguf", make_tensors(), architecture="qwen2")
    make_gguf(tmp_path / "odd.gguf", make_tensors(), extra={"blk.0.surprise.weight": np.zeros(3, np.float32)})
    for name, said in (
        ("short", "damaged"),
        ("cut", "damaged"),
        ("text", "not a GGUF file"),
        ("qwen", "'qwen2'"),
        ("odd", "blk.0.surprise.weight"),
    ):
        with pytest.raises(ConversionError, match=said) as caught:
            convert.convert(tmp_path / f"{name}.gguf", tmp_path / "ours")
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install 'jeagle\[gguf\]'"):
        convert.convert(good, tmp_path / "ours")


TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(V)],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1] * V,
}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tokenizer.ggml.token_type", [1] * (V - 1), f"has {V} tokens, {V - 1} types"),
        ("tokenizer.ggml.bos_token_id", V, f"bos_token_id {V}, which do not fit"),
        ("tokenizer.ggml.bos_token_id", -1, "bos_token_id -1, which do not fit"),
        ("tokenizer.ggml.bos_token_id", "<s>", "field tokenizer.ggml.bos_token_id is .*, which it cannot be"),
        ("tokenizer.ggml.tokens", "abc", "field tokenizer.ggml.tokens is .*, which it cannot be"),
        ("tokenizer.ggml.tokens", list(range(V)), "field tokenizer.ggml.tokens is .*, which it cannot be"),
        ("tokenizer.chat_template", 5, "field tokenizer.chat_template is .*, which it cannot be"),
        ("llama.embedding_length", "x", "field llama.embedding_length is .*, which it cannot be"),
        ("llama.attention.layer_norm_rms_epsilon", "x", "layer_norm_rms_epsilon is .*, which it cannot be"),
        ("llama.rope.freq_base", [1, 2], "freq_base is .*, which it cannot be"),
        ("llama.rope.scaling.factor", "x", "factor is .*, which it cannot be"),
    ],
)
def test_damaged_fields_are_named(tmp_path, field, value, said):
    path = make_gguf(tmp_path / "m.gguf", make_tensors(), fields={**TOKENS, field: value})
    with pytest.raises(ConversionError, match=rf"^m\.gguf.*{said}"):
        convert.convert(path, tmp_path / "ours")


def test_a_field_that_is_not_utf8(tmp_path):
    path = make_gguf(tmp_path / "m.gguf", make_tensors(), fields=TOKENS)
    path.write_bytes(path.read_bytes().replace(b"smollm", b"smol\xff\xff"))
    with pytest.raises(ConversionError, match=r"m\.gguf: field tokenizer\.ggml\.pre is not UTF-8"):
        convert.convert(path, tmp_path / "ours")


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "ab 12", ["ab", "Ġ", "1", "2"]),
        ("llama-bpe", "ab 12", ["<s>", "ab", "Ġ", "12"]),
        ("gpt-2", "ab 12", ["ab", "Ġ12"]),
    ],
)
def test_gguf_tokenizer(tmp_path, pre, text, pieces):
    from transformers import AutoTokenizer

    tokens = ["<unk>", "<s>", "</s>", "a", "b", "Ġ", "1", "2", "ab", "12", "Ġ12"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 8,
        "tokenizer.ggml.merges": ["a b", "1 2", "Ġ 12"],
        "tokenizer.chat_template": "{{ messages[0].content }}!",
    }
    config = {"bos_token_id": 1, "eos_token_id": [2], "max_position_embeddings": 64}
    files, notes = tokenizer_files(fields, config)
    assert notes == ()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab!"
    _, notes = tokenizer_files({**fields, "tokenizer.ggml.pre": "qwen2"}, config)
    assert "gpt2/qwen2" in notes[0]
    _, notes = tokenizer_files({k: v for k, v in fields.items() if k != "tokenizer.ggml.pre"}, config)
    assert "default's way" in notes[0]
    fields["tokenizer.ggml.tokens"][0] = "<|begin_of_text|>"
    _, notes = tokenizer_files({k: v for k, v in fields.items() if k != "tokenizer.ggml.pre"}, config)
    assert "llama-bpe's way" in notes[0]
