"""Heads out and in again: bit-equal through our own converter, and named as their readers name them."""

import dataclasses
import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import arrays
from flax import nnx
from helpers import fill_randomly
from transformers import LlamaConfig as HFLlamaConfig

from convert import ConversionError, convert, export_target
from convert.export import export, main
from convert.tensors import SafetensorsSource
from jeagle.checkpoint import CheckpointError, abstract, load_eagle, load_llama
from jeagle.checkpoint_writer import save
from jeagle.config import EagleConfig, LlamaConfig, RopeScaling
from jeagle.eagle import EagleHead
from jeagle.llama4_config import Llama4Config

TARGET = LlamaConfig.tiny(num_layers=8)
V, W = TARGET.vocab_size, 20
IDS = "eagle_aux_hidden_state_layer_ids"
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, high_freq_factor=3.0, original_max_position=64)

HEADS = {
    "eagle1": ("eagle1", {}),
    "hass": ("eagle1", {"input_norms": True, "fc_bias": True, "own_embedding": True, "num_layers": 2}),
    "eagle1_reduced": ("eagle1", {"own_lm_head": True, "draft_vocab_size": W, "attention_bias": True}),
    "meta": ("meta", {"num_layers": 3, "rope_scaling": RopeScaling(kind="linear", factor=2.0)}),
    "full": ("eagle3", {}),
    "reduced": ("eagle3", {"draft_vocab_size": W}),
    "target_head": ("eagle3", {"own_lm_head": False}),
    "own_embedding": ("eagle3", {"own_embedding": True, "rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "narrow": ("eagle3", {"width": 16, "own_embedding": True, "draft_vocab_size": W}),
    "four_taps": ("eagle3", {"taps": (0, 3, 4, 7), "tap_norm": "joint"}),
    "eagle31": ("eagle3", {"tap_norm": "each", "norm_output": True, "draft_vocab_size": W}),
    "biased": ("eagle3", {"attention_bias": True, "mlp_bias": True, "num_layers": 2, "norm_before_residual": True}),
    "last_tap": ("eagle3", {"taps": (2, 4, 8), "tap_norm": "joint"}),
}
SPECULATORS_ONLY = {"biased": "num_layers 2", "last_tap": "last block"}  # and why the eagle form refuses them


def head_of(name, dtype=jnp.float32, **overrides) -> EagleHead:
    kind, values = HEADS[name]
    config = EagleConfig.for_target(TARGET, kind, **{**values, **overrides})
    head = nnx.eval_shape(lambda: EagleHead(config, dtype=dtype, rngs=nnx.Rngs(0)))
    head = fill_randomly(head, 3, dtype=dtype)
    if head.draft_to_target is not None:
        ids = np.sort(np.random.default_rng(5).permutation(V)[:W])
        head.draft_to_target.set_value(jnp.asarray(ids, jnp.int32))
    return head


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    """config.json is all the converter asks of a target."""
    directory = tmp_path_factory.mktemp("target")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": TARGET.width,
        "num_hidden_layers": TARGET.num_layers,
        "num_attention_heads": TARGET.num_heads,
        "intermediate_size": TARGET.mlp_width,
        "vocab_size": V,
        "max_position_embeddings": TARGET.max_position,
        "rms_norm_eps": TARGET.norm_eps,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read(directory):
    """(config.json, {name: array}) of what was exported."""
    source = SafetensorsSource([directory / "model.safetensors"])
    return json.loads((directory / "config.json").read_text()), {name: source.read(name) for name in source.names()}


def assert_same(got: EagleHead, wanted: EagleHead) -> None:
    assert got.config == wanted.config
    ours, theirs = arrays(got), arrays(wanted)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert ours[path].dtype == array.dtype, path
        assert ours[path].tobytes() == array.tobytes(), path


@pytest.mark.parametrize("form", ["auto", "eagle"])
@pytest.mark.parametrize("name", HEADS)
def test_round_trip(name, form, target_dir, tmp_path):
    dtype = jnp.bfloat16 if name in ("eagle1", "eagle31", "reduced") else jnp.float32
    head = head_of(name, dtype)
    if form == "eagle" and name in SPECULATORS_ONLY:
        with pytest.raises(ConversionError, match=SPECULATORS_ONLY[name]):
            export(head, tmp_path / "out", form=form)
        assert not list(tmp_path.iterdir())
        return
    out = export(head, tmp_path / "out", verifier="org/target", form=form)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    back = convert(out, tmp_path / "back", kind="eagle", target=target_dir, progress=False)
    assert_same(load_eagle(back), head)
    # The directory is exported as the module was.
    again = export(back, tmp_path / "again", verifier="org/target", form=form)
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_reads_back_without_its_target(tmp_path):
    head = head_of("reduced")
    out = export(head, tmp_path / "out", verifier="org/target")
    assert_same(load_eagle(convert(out, tmp_path / "back", progress=False)), head)


def test_speculators_names(tmp_path):
    head = head_of("eagle31", jnp.bfloat16, num_layers=2)
    config, weights = read(export(head, tmp_path / "out", verifier="org/target", speculative_tokens=5))
    expected = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": W,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "target_hidden_size": None,
        IDS: [2, 4, 5],
        "torch_dtype": "bfloat16",
    }
    assert {field: config[field] for field in expected} == expected
    assert "speculators_version" in config
    about = config["speculators_config"]
    assert about["algorithm"] == "eagle3" and about["default_proposal_method"] == "greedy"
    assert about["proposal_methods"][0]["speculative_tokens"] == 5
    assert about["verifier"] == {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]}
    layer = config["transformer_layer_config"]
    assert (layer["hidden_size"], layer["num_hidden_layers"], layer["vocab_size"]) == (TARGET.width, 2, V)
    assert layer["num_aux_hidden_states"] == 3

    block = {"post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")}
    block |= {"input_layernorm", *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))}
    names = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", "layers.0.hidden_norm.weight"}
    names |= {f"layers.{i}.{x}.weight" for i in range(2) for x in block} | {f"fc_norm.{i}.weight" for i in range(3)}
    assert weights.keys() == names
    assert weights["layers.0.self_attn.q_proj.weight"].shape == (TARGET.width, 2 * TARGET.width)
    assert weights["fc.weight"].shape == (TARGET.width, 3 * TARGET.width)
    kinds = {name: array.dtype for name, array in weights.items() if name not in ("d2t", "t2d")}
    assert set(kinds.values()) == {np.dtype(ml_dtypes.bfloat16)}


def test_eagle_names(tmp_path):
    """SafeAILab's names, and tap ids in both senses: block inputs at the top, block outputs under eagle_config."""
    config, weights = read(export(head_of("narrow"), tmp_path / "out", form="eagle"))
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["draft_vocab_size"], config["target_hidden_size"], config["bias"]) == (W, TARGET.width, False)
    assert config[IDS] == [2, 4, 5]
    assert config["eagle_config"] == {IDS: [1, 3, 4], "use_aux_hidden_state": True}
    assert {"midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight", "embed_tokens.weight"} <= weights.keys()
    assert not any(name.startswith("layers.") for name in weights)
    config, weights = read(export(head_of("target_head"), tmp_path / "shared", form="eagle"))
    assert config["draft_vocab_size"] is None and "target_hidden_size" not in config
    assert "lm_head.weight" not in weights and "d2t" not in weights and "t2d" not in weights


def test_eagle1_and_meta_names(tmp_path):
    config, weights = read(export(head_of("eagle1"), tmp_path / "eagle1"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["bias"] is False
    assert "fc.weight" in weights and "norm.weight" not in weights and "layers.0.input_layernorm.weight" not in weights
    config, weights = read(export(head_of("meta"), tmp_path / "meta"))
    assert config["num_hidden_layers"] == 3
    # vLLM's EAGLE-1 skips tensors that it does not know, here the norms: it must not know the architecture either.
    assert config["architectures"] == ["JeagleEagleForCausalLM"]
    assert {"norm.weight", "layers.0.input_layernorm.weight", "layers.2.input_layernorm.weight"} <= weights.keys()


@pytest.mark.parametrize(("name", "changes"), [("hass", {}), ("eagle1_reduced", {}), ("eagle1", {"fc_bias": True})])
def test_what_eagle1_readers_would_leave_out_is_not_called_a_llama(tmp_path, name, changes):
    config, _ = read(export(head_of(name, **changes), tmp_path / "out"))
    assert config["architectures"] == ["JeagleEagleForCausalLM"]


def test_the_norms_of_hass_are_switched_on_for_vllm(tmp_path):
    config, weights = read(export(head_of("hass", fc_bias=False), tmp_path / "out"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["add_para_norm"] is True
    assert {"embedding_layernorm.weight", "hidden_states_layernorm.weight"} <= weights.keys()


def test_token_maps(tmp_path):
    head = head_of("reduced")
    _, weights = read(export(head, tmp_path / "out", verifier="org/target"))
    ids = np.asarray(head.draft_to_target[...])
    assert weights["d2t"].dtype == np.int64 and weights["t2d"].dtype == bool
    np.testing.assert_array_equal(weights["d2t"] + np.arange(W), ids)
    np.testing.assert_array_equal(np.flatnonzero(weights["t2d"]), ids)
    assert weights["t2d"].shape == (V,)


def test_dtype(tmp_path):
    head = head_of("full")
    config, weights = read(export(head, tmp_path / "out", form="eagle", dtype="bfloat16"))
    assert config["torch_dtype"] == "bfloat16"
    np.testing.assert_array_equal(weights["fc.weight"].T, head.fc.kernel[...].astype(jnp.bfloat16))
    assert weights["fc.weight"].dtype == ml_dtypes.bfloat16
    head.fc.kernel.set_value(head.fc.kernel[...].astype(jnp.bfloat16))
    with pytest.raises(ConversionError, match="weights of bfloat16, float32; say which"):
        export(head, tmp_path / "mixed", form="eagle")


def test_a_head_in_fp8_is_multiplied_out(tmp_path):
    path = save(head_of("full"), tmp_path / "fp8", dtype="fp8")
    config, weights = read(export(path, tmp_path / "out", form="eagle"))
    assert config["torch_dtype"] == "bfloat16"
    np.testing.assert_array_equal(weights["fc.weight"].T, load_eagle(path, "bfloat16").fc.kernel[...])


def test_a_head_of_the_package_by_its_name(tmp_path):
    assert read(export("smollm2-135m-eagle3", tmp_path / "out", form="eagle"))[0]["draft_vocab_size"] == 16384


def test_transformers_understands_the_blocks(tmp_path):
    """The rope above all, which transformers 5 stores elsewhere."""
    config, _ = read(export(head_of("own_embedding"), tmp_path / "out", verifier="org/target"))
    llama = HFLlamaConfig(**config["transformer_layer_config"])
    assert llama.rope_parameters["rope_theta"] == 5e5
    assert llama.rope_parameters["rope_type"] == "llama3" and llama.rope_parameters["high_freq_factor"] == 3.0
    assert (llama.head_dim, llama.num_key_value_heads) == (TARGET.head_dim, TARGET.num_kv_heads)


@pytest.mark.parametrize(
    ("name", "overrides", "arguments", "message"),
    [
        ("full", {}, {}, "give its hub name or path with --verifier"),
        ("full", {}, {"verifier": "t", "speculative_tokens": 0}, "speculative_tokens must be at least 1"),
        ("full", {"fc_bias": True}, {"verifier": "t"}, "has fc_bias True.*train it with fc_bias False"),
        ("full", {"final_norm": False}, {"verifier": "t"}, "final_norm False"),
        ("full", {"taps": (5, 0, 2)}, {"verifier": "t"}, "ascending taps"),
        ("full", {"norm_before_residual": True}, {"form": "eagle"}, "norm_before_residual.*in the speculators form"),
        ("meta", {"norm_output": False}, {}, "norm_output False, which its published form cannot say"),
        ("eagle1", {}, {"form": "speculators"}, "is no EAGLE-3 head"),
        ("full", {}, {"form": "gguf"}, "form must be one of"),
        ("full", {}, {"form": "eagle", "dtype": "float16"}, "dtype must be one of"),
    ],
)
def test_refused(name, overrides, arguments, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        export(head_of(name, **overrides), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_damaged_heads_are_refused(tmp_path):
    head = head_of("reduced")
    head.fc.kernel.set_value(head.fc.kernel[...].at[0, 0].set(jnp.nan))
    with pytest.raises(ConversionError, match=r"fc\.kernel holds NaN"):
        export(head, tmp_path / "out", form="eagle")
    head = head_of("reduced")
    head.draft_to_target.set_value(jnp.zeros(W, jnp.int32))
    with pytest.raises(ConversionError, match="two draft ids to one target id"):
        export(head, tmp_path / "out", form="eagle")
    head = head_of("reduced")
    head.config = dataclasses.replace(head.config, tap_norm="joint")
    with pytest.raises(ConversionError, match=r"missing \['tap_norm.scale'\]"):
        export(head, tmp_path / "out", form="eagle")
    assert not list(tmp_path.iterdir())


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_destination(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    stale = tmp_path / ".out.tmp-00000000"  # of an export that was killed
    stale.mkdir()
    for name, said in (
        ("there", "there already exists; remove it or choose another"),
        ("there/new/parents/" + 300 * "x", "cannot write .*File name too long"),
        ("a\0b", r"a\\x00b' is no name in UTF-8"),
        (os.fsdecode(b"\xff"), "is no name in UTF-8"),
    ):
        with pytest.raises(CheckpointError, match=said):
            export(head_of("eagle1"), tmp_path / name)
    monkeypatch.setattr("convert.export.save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: its disk is full; make room"):
        export(head_of("eagle1"), tmp_path / "out")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["there"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    directory = tmp_path_factory.mktemp("targets")
    for name, config, dtype in (
        ("plain", LlamaConfig.tiny(), "float32"),
        ("biased", LlamaConfig.tiny(mlp_bias=True), "float32"),
        ("fp8", LlamaConfig.tiny(), "fp8"),
        ("llama4", Llama4Config.tiny(), "float32"),
    ):
        module = fill_randomly(abstract(config), 3)
        save(module, directory / name, dtype=dtype)
    return directory


@pytest.mark.parametrize(
    ("target", "gguf", "said"),
    [
        ("fp8", None, "has FP8 weights, for which no form is written; convert its source with another --dtype"),
        ("llama4", None, "is a Llama 4, for which no form is written; keep the original model"),
        ("biased", "out.gguf", "of Llamas without rope_scaling and biases alone"),
        ("plain", "there.gguf", "there.gguf already exists"),
        ("plain", "out", "cannot be both"),
        ("plain", "out/model.gguf", "out is not a directory"),
    ],
)
def test_refused_targets(target, gguf, said, targets, tmp_path, capsys):
    (tmp_path / "there.gguf").write_text("precious")
    asked = [] if gguf is None else ["--gguf", str(tmp_path / gguf)]
    assert export_target.main([str(targets / target), str(tmp_path / "out"), *asked]) == 1
    assert said in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("there.gguf", "precious")]


def test_a_target_and_its_gguf_file_are_both_written_or_neither(targets, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="GGUF files are written through the gguf package")
    paths = targets / "plain", tmp_path / "out", tmp_path / "out.gguf"
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFWriter.write_tensors_to_file", full_disk)
        with pytest.raises(CheckpointError, match=r"cannot write .*out\.gguf: its disk is full; make room"):
            export_target.write(*paths)
    assert not list(tmp_path.iterdir())
    export_target.write(*paths)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.gguf"]
    for path in paths[1:]:
        back = load_llama(convert(path, tmp_path / f"from {path.name}", progress=False))
        assert arrays(back).keys() == arrays(load_llama(paths[0])).keys()


def test_command_line(tmp_path, target_dir, capsys):
    first = export(head_of("reduced"), tmp_path / "first", form="eagle")
    head = convert(first, tmp_path / "head", kind="eagle", target=target_dir, progress=False)
    assert main([str(head), str(tmp_path / "out"), "--verifier", "org/target", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert read(tmp_path / "out")[0]["speculators_model_type"] == "eagle3"
    assert main([str(head), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(CheckpointError, match="not a jeagle checkpoint"):
        export(first, tmp_path / "foreign")
