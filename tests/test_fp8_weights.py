"""FP8 weights: what is kept, what products make of it, and that nothing but the weights differs from other models.

Models compute in float32 here, so a model of FP8 weights must be the float32 model of the same numbers.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import make_hf, make_tensors
from flax import nnx
from helpers import fill_randomly, tiny_llama
from test_convert_llama4 import QUANTIZED, TEXT, E, F, make_source
from test_convert_llama4 import make_tensors as llama4_tensors
from test_parity import full_logits

import convert
from jeagle import LLM, SamplingParams
from jeagle.checkpoint import CheckpointError, abstract, load_eagle, load_head, load_llama, read_source
from jeagle.checkpoint_writer import save
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.eagle import EagleHead
from jeagle.footprint import FORMATS, Split, head_weights, num_bytes, target_weights
from jeagle.llama import Llama
from jeagle.llama4 import Llama4
from jeagle.llama4_config import Llama4Config
from jeagle.placement import filled, place, placements, repeat_kv_heads, variables
from jeagle.sharding import Layout, Rules, make_mesh
from jeagle.weights import FP8, Fp8, Matrix, dtype_of, product, quantize, scale_of

PROMPTS = [[5, 6, 7], [8], [9, 10] * 10, [3] * 5]
PARAMS = [SamplingParams(max_tokens=12, temperature=t, seed=i) for i, t in enumerate((0.0, 0.8, 0.0, 1.0))]


def tiny_llama4(**overrides) -> Llama4:
    config = Llama4Config.tiny(num_layers=2, moe_layers=(1,), nope_layers=(1,), **overrides)
    return fill_randomly(nnx.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))), 0)


TARGETS = {
    "untied": lambda: tiny_llama(vocab_size=97, attention_bias=True, mlp_bias=True),
    "tied": lambda: tiny_llama(vocab_size=97, num_layers=1, tie_embeddings=True),
    "llama4": tiny_llama4,
}


def tiny_head(target: Llama) -> EagleHead:
    config = EagleConfig.for_target(target.config, "eagle3", draft_vocab_size=61, taps=(0, 1))
    return fill_randomly(EagleHead(config, rngs=nnx.Rngs(0)), 1)


def scaled(path: str, variable: nnx.Variable, weights: dict[str, nnx.Variable]) -> np.ndarray:
    """What a weight stands for, float64 for an FP8 one."""
    value = np.asarray(variable.get_value())
    if value.dtype != FP8:
        return value
    contracted = variable.get_metadata()["contracted"]
    return value.astype(np.float64) * np.expand_dims(np.asarray(weights[scale_of(path)].get_value()), contracted)


def quantized(module, compute=None):
    """A float32 or bfloat16 model with FP8 matrices, which computes in ``compute`` (None: as before)."""
    dtype = Fp8(dtype_of(module) if compute is None else compute)
    abstract = nnx.eval_shape(lambda: type(module)(module.config, dtype=dtype, rngs=nnx.Rngs(0)))
    weights, arrays = variables(module), {}
    for path, variable in variables(abstract).items():
        if path not in weights:
            continue  # scales, made with their matrices
        value = weights[path].get_value()
        if variable.dtype == FP8:
            number, scale = quantize(np.asarray(value), variable.get_metadata()["contracted"])
            arrays[path], arrays[scale_of(path)] = jnp.asarray(number), jnp.asarray(scale)
        else:
            arrays[path] = value.astype(variable.dtype)
    return filled(abstract, arrays)


def dequantized(module):
    """The float32 model of the same numbers."""
    plain, weights = abstract(module.config), variables(module)
    arrays = {path: jnp.asarray(scaled(path, weights[path], weights), jnp.float32) for path in variables(plain)}
    return filled(plain, arrays)


def generate(target, head=None, *, speculative=True, **kwargs) -> list:
    llm = LLM(target, head, tree="auto" if head is None else "chain-2", prefill_chunk=8, page_size=8, **kwargs)
    return [out.outputs[0] for out in llm.generate(PROMPTS, PARAMS, speculative=speculative, use_tqdm=False)]


def tokens(outputs: list) -> list[list[int]]:
    return [list(out.token_ids) for out in outputs]


# One matrix.


@pytest.mark.parametrize(("shape", "contracted"), [((48, 3, 5), (0,)), ((4, 6, 7), (0, 1)), ((3, 40, 2, 8), (1,))])
def test_quantised_numbers_are_near(shape, contracted, monkeypatch):
    """Half a step of 3 bits behind the point, or of the least step; in one piece and in many."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[-1] = 0
    number, scale = quantize(x, contracted)
    assert number.dtype == FP8 and scale.dtype == np.float32
    wide = np.expand_dims(scale, contracted)
    steps = np.maximum(np.abs(x) * 2.0**-4, wide * 2.0**-10)
    assert (np.abs(number.astype(np.float32) * wide - x) <= 1.01 * steps).all()
    largest = np.abs(number.astype(np.float32)).max(axis=contracted)
    assert set(np.unique(largest)) <= {0.0, 448.0} and np.isfinite(scale).all() and (scale > 0).all()
    monkeypatch.setattr("jeagle.weights.PIECE", 20)
    for whole, pieces in zip((number, scale), quantize(x, contracted), strict=True):
        np.testing.assert_array_equal(whole, pieces)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_rounded_once(dtype):
    rng = np.random.default_rng(1)
    number, scale = quantize(rng.standard_normal((96, 40)).astype(np.float32), (0,))
    x = jnp.asarray(rng.standard_normal((5, 96)), dtype)
    exact = np.asarray(x, np.float64) @ (number.astype(np.float64) * scale)
    y = product(x, Matrix(jnp.asarray(number), jnp.asarray(scale)))
    assert y.dtype == dtype
    sums = 96 * 2.0**-24 * (np.abs(np.asarray(x, np.float64)) @ np.abs(number.astype(np.float64) * scale))
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - exact), sums + np.abs(exact) * jnp.finfo(dtype).eps)


# Models.


@pytest.mark.parametrize("name", TARGETS)
def test_logits_are_those_of_the_same_numbers(name):
    model = quantized(TARGETS[name]())
    assert model.compute_dtype == jnp.float32 and model.embed[...].dtype == FP8
    wide = dequantized(model)
    for ours, theirs in zip(full_logits(model, PROMPTS), full_logits(wide, PROMPTS), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_logits_in_bfloat16():
    model = quantized(TARGETS["untied"](), jnp.bfloat16)
    wide = dequantized(quantized(TARGETS["untied"]()))
    for ours, theirs in zip(full_logits(model, PROMPTS), full_logits(wide, PROMPTS), strict=True):
        assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


@pytest.mark.parametrize(("name", "fp8_head"), [("tied", True), ("llama4", False)])
def test_speculation_emits_the_tokens_of_the_plain_program(name, fp8_head):
    """Greedy and sampled rows."""
    target = quantized(TARGETS[name]())
    head = tiny_head(target)
    outputs = [generate(target, quantized(head) if fp8_head else head, speculative=s) for s in (False, True)]
    assert tokens(outputs[0]) == tokens(outputs[1])


def repeated_kv_heads() -> Llama:
    return tiny_llama(num_heads=8, num_kv_heads=2, vocab_size=97, num_layers=1, attention_bias=True)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("make", "data", "tensor"), [(repeated_kv_heads, 1, 8), (lambda: tiny_llama4(num_heads=8, vocab_size=97), 2, 4)]
)
def test_tokens_over_a_mesh(tmp_path, make, data, tensor):
    """Laid out in memory, and the parts that are read of a checkpoint. With a head where all devices share a row."""
    target = quantized(make())
    head = tiny_head(target) if data == 1 else None
    sizes = dict(data_parallel_size=data, tensor_parallel_size=tensor)
    assert tokens(generate(target, head, **sizes)) == tokens(generate(target, head))
    layout = Layout(make_mesh(data, tensor))
    restored = variables(load_llama(save(target, tmp_path / "target", dtype="fp8"), layout=layout))
    placed = variables(place(quantized(make(), jnp.bfloat16), layout))
    assert restored.keys() == placed.keys()
    for path, variable in placed.items():
        assert restored[path][...].sharding == variable[...].sharding
        np.testing.assert_array_equal(restored[path][...], variable[...], err_msg=path)


@pytest.mark.parametrize(
    ("tensor", "draft", "experts"), [(1, "tensor", "mlp"), (2, "tensor", "mlp"), (4, "replicated", "experts")]
)
def test_a_plan_counts_these_bytes(tensor, draft, experts):
    layout = Layout(
        jax.sharding.AbstractMesh((1, tensor), ("data", "tensor")), Rules.choose(draft=draft, experts=experts)
    )
    split = Split(tensor=tensor, draft=draft, experts=experts)
    dense = LlamaConfig.tiny(num_heads=8, vocab_size=97, attention_bias=True, mlp_bias=True)
    tied = LlamaConfig.tiny(tie_embeddings=True)
    for kind, config in ((Llama, dense), (Llama, tied), (Llama4, Llama4Config.tiny(mlp_width=96))):
        assert num_bytes(target_weights(config, split), FORMATS["fp8"]) == laid_out_bytes(kind, config, layout)
    for head in ("eagle1", "eagle3"):
        config = EagleConfig.for_target(dense, head, own_embedding=True)
        assert num_bytes(head_weights(config, split), FORMATS["fp8"]) == laid_out_bytes(EagleHead, config, layout)


def laid_out_bytes(kind, config, layout) -> int:
    stored, laid_out = (
        nnx.eval_shape(lambda c=c: kind(c, dtype=Fp8(), rngs=nnx.Rngs(0)))
        for c in (config, repeat_kv_heads(config, layout))
    )
    return sum(
        math.prod(p.shape) * p.dtype.itemsize // math.prod(layout.parts(axis) for axis in p.axes)
        for p in placements(stored, laid_out, layout).values()
    )


# Checkpoints.


def same_weights(ours, theirs) -> None:
    ours, theirs = variables(ours), variables(theirs)
    assert ours.keys() == theirs.keys()
    for path, variable in theirs.items():
        assert ours[path].get_value().dtype == variable.get_value().dtype, path
        np.testing.assert_array_equal(ours[path][...], variable[...], err_msg=path)


@pytest.mark.parametrize("name", TARGETS)
def test_checkpoints_hold_numbers_and_scales(tmp_path, name):
    target = TARGETS[name]()
    expected = quantized(target, jnp.bfloat16)
    for source, path in ((target, tmp_path / "a"), (expected, tmp_path / "b")):
        loaded = load_llama(save(source, path, dtype="fp8"))
        assert read_source(path)["dtype"] == "fp8" and loaded.compute_dtype == jnp.bfloat16
        same_weights(loaded, expected)


def test_a_head_in_fp8(tmp_path):
    target = tiny_llama(vocab_size=97, dtype=jnp.bfloat16)
    head = tiny_head(target)
    same_weights(load_eagle(save(head, tmp_path / "head", dtype="fp8")), quantized(head, jnp.bfloat16))
    path = save(target, tmp_path / "target", dtype="fp8")
    assert all(map(len, tokens(generate(path, tmp_path / "head"))))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_in_another_dtype_numbers_come_times_their_scales(tmp_path, dtype, devices):
    if jax.device_count() < devices:
        pytest.skip("needs eight devices")
    layout = None if devices == 1 else Layout(make_mesh(1, devices))
    target = repeated_kv_heads()
    loaded = variables(load_llama(save(target, tmp_path / "target", dtype="fp8"), dtype, layout=layout))
    plain = dequantized(quantized(target, jnp.bfloat16))
    arrays = {path: variable[...].astype(dtype) for path, variable in variables(plain).items()}
    plain = filled(abstract(target.config, dtype), arrays)
    placed = variables(plain if layout is None else place(plain, layout))
    assert loaded.keys() == placed.keys()
    for path, variable in placed.items():
        assert loaded[path][...].sharding == variable[...].sharding and loaded[path][...].dtype == variable[...].dtype
        np.testing.assert_array_equal(loaded[path][...], variable[...], err_msg=path)


def test_a_head_takes_the_dtype_of_its_target(tmp_path):
    """FP8 stays FP8 beside a target in FP8 alone."""
    target = tiny_llama(vocab_size=97)
    path = save(tiny_head(target), tmp_path / "head", dtype="fp8")
    assert dtype_of(load_head(path, target)) == jnp.float32
    assert dtype_of(load_head(path, quantized(target))) == Fp8(jnp.bfloat16)
    wide = save(tiny_head(target), tmp_path / "wide")
    assert dtype_of(load_head(wide, quantized(target))) == jnp.float32
    assert tokens(generate(target, load_head(path, target))) == tokens(generate(target, None))


def test_conversion_quantises(tmp_path):
    source = make_hf(tmp_path / "hf", make_tensors(bias=True), attention_bias=True, mlp_bias=True)
    wide = load_llama(convert.convert(source, tmp_path / "float32"))
    ours = convert.convert(source, tmp_path / "fp8", dtype="fp8")
    same_weights(load_llama(ours), quantized(wide, jnp.bfloat16))
    assert LLM(source, dtype="fp8", cache_dir=tmp_path / "cache").dtype == jnp.bfloat16
    assert LLM(source, cache_dir=tmp_path / "cache").dtype == jnp.float32  # another conversion of the same source


def test_fp8_numbers_of_a_source_stay_as_they_are(tmp_path):
    """Experts that a source keeps in FP8, whatever its scales: per row, and one for a whole tensor."""
    tensors = llama4_tensors("", fp8=True)
    at = "model.layers.1.feed_forward.experts"
    for e in range(E):
        tensors[f"{at}.{e}.gate_proj.weight_scale"] = np.full(1, 0.3 + e, np.float32)
        tensors[f"{at}.{e}.up_proj.weight_scale"] = (0.1 + np.arange(F, dtype=np.float32)[:, None]) / 7
    source = make_source(tmp_path / "hf", tensors, TEXT | QUANTIZED)
    experts = load_llama(convert.convert(source, tmp_path / "ours", dtype="fp8")).blocks[1].experts
    for e in range(E):
        for c, name in enumerate(("gate", "up")):
            number, scale = (tensors[f"{at}.{e}.{name}_proj.weight{x}"] for x in ("", "_scale"))
            np.testing.assert_array_equal(experts.gate_up[...][e, :, c].T, number)
            np.testing.assert_array_equal(experts.gate_up_scale[...][e, c], np.broadcast_to(scale.reshape(-1), F))
        np.testing.assert_array_equal(experts.down[...][e].T, tensors[f"{at}.{e}.down_proj.weight"])
        np.testing.assert_array_equal(
            experts.down_scale[...][e], tensors[f"{at}.{e}.down_proj.weight_scale"].reshape(-1)
        )
    assert experts.router[...].dtype == ml_dtypes.bfloat16


def test_errors_are_one_sentence(tmp_path):
    target = tiny_llama()
    wide = save(target, tmp_path / "wide")
    for make, said in (
        (lambda: load_llama(wide, "int4"), "dtype must be one of auto, float32, bfloat16, fp8, got 'int4'"),
        (
            lambda: LLM(wide, dtype="fp8"),
            "holds float32 weights, which are not loaded as fp8; convert its source again",
        ),
        (lambda: save(quantized(target), tmp_path / "none", dtype="bfloat16"), "save them with dtype fp8"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)) as raised:
            make()
        assert "\n" not in str(raised.value)
