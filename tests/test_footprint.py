"""What a plan says that models, heads and caches take: the bytes of the arrays that the library really makes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jeagle.cache import KVCache
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.devices import DEVICES
from jeagle.eagle import EagleHead
from jeagle.footprint import (
    CACHE_FORMATS,
    FORMATS,
    PlanError,
    Split,
    cache_bytes,
    find_format,
    head_weights,
    num_bytes,
    repeated,
    target_weights,
    temp_bytes,
)
from jeagle.fp8 import FP8
from jeagle.llama import Llama
from jeagle.llama4 import Llama4
from jeagle.llama4_config import Llama4Config
from jeagle.placement import placements, repeat_kv_heads
from jeagle.sharding import Layout, Rules
from jeagle.sizes import SIZES

ROOT = Path(__file__).resolve().parent.parent
H100 = DEVICES["h100"]
BF16 = FORMATS["bfloat16"]


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("draft", "experts"), [("tensor", "mlp"), ("replicated", "experts")])
def test_weights_are_those_of_the_models(tensor, draft, experts):
    """Bytes per device of every array that sharding and placement lay out."""
    mesh = jax.sharding.AbstractMesh((1, tensor), ("data", "tensor"))
    layout = Layout(mesh, Rules.choose(draft=draft, experts=experts))
    split = Split(tensor=tensor, draft=draft, experts=experts)
    dense = LlamaConfig.tiny(num_heads=8, attention_bias=True, mlp_bias=True)
    heads = [EagleConfig.for_target(dense, "eagle3", draft_vocab_size=33)]
    heads += [EagleConfig.for_target(dense, kind, num_layers=2, fc_bias=True) for kind in ("eagle1", "meta")]
    heads += [EagleConfig.for_target(dense, "eagle3", own_embedding=True, tap_norm=norm) for norm in ("each", "joint")]
    for config in (dense, LlamaConfig.tiny(tie_embeddings=True)):
        assert num_bytes(target_weights(config, split), FORMATS["float32"]) == laid_out_bytes(Llama, config, layout)
    moe = Llama4Config.tiny(mlp_width=96)
    assert num_bytes(target_weights(moe, split), FORMATS["float32"]) == laid_out_bytes(Llama4, moe, layout)
    for head in heads:
        assert num_bytes(head_weights(head, split), FORMATS["float32"]) == laid_out_bytes(EagleHead, head, layout)


def laid_out_bytes(kind, config, layout) -> int:
    stored, laid_out = (
        nnx.eval_shape(lambda c=c: kind(c, rngs=nnx.Rngs(0))) for c in (config, repeat_kv_heads(config, layout))
    )
    return sum(
        math.prod(p.shape) * p.dtype.itemsize // math.prod(layout.parts(axis) for axis in p.axes)
        for p in placements(stored, laid_out, layout).values()
    )


@pytest.mark.parametrize("name", ["bfloat16", "float32", "fp8"])
def test_caches_are_those_of_the_decoder(name):
    config = LlamaConfig.tiny()
    dtype = FP8 if name == "fp8" else jnp.dtype(name)
    cache = jax.eval_shape(lambda: KVCache.create(config, num_pages=3 * math.ceil(100 / 64), page_size=64, dtype=dtype))
    made = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert cache_bytes(config, 1, CACHE_FORMATS[name], rows=3, context=100) == made
    assert cache_bytes(config, 2, CACHE_FORMATS[name], rows=3, context=100) == made // 2
    # Four devices share two kv heads: each is kept twice.
    assert cache_bytes(config, 4, CACHE_FORMATS[name], rows=3, context=100) == made // 2


def test_temporaries_are_near_those_of_compiled_loops():
    compiled = json.loads((ROOT / "scripts" / "results" / "compile_h100_32_layers.json").read_text())["programs"]
    loops = [program for program in compiled if "temp_bytes" in program]
    assert {program["nodes"] for program in loops} == {1, 64}
    for program in loops:
        estimate = temp_bytes(SIZES["llama-3.1-8b"], 1, BF16, program["nodes"])
        assert estimate == pytest.approx(program["temp_bytes"], rel=0.06)


@pytest.mark.parametrize(
    ("model", "split", "message"),
    [
        ("llama-3.1-8b", Split(tensor=3), "does not divide the 32 query heads"),
        ("llama-4-scout", Split(tensor=16), "does not divide the 40 query heads"),
        ("llama-3.2-3b", Split(tensor=12), "does not divide the MLP width of 8192"),
        ("llama-4-scout", Split(tensor=5), "does not divide the expert MLP width of 8192"),
    ],
)
def test_meshes_that_do_not_divide(model, split, message):
    with pytest.raises(PlanError) as error:
        target_weights(SIZES[model], split)
    assert message in str(error.value)


def test_experts_that_cannot_be_dealt_out():
    config = dataclasses.replace(SIZES["llama-4-scout"], num_experts=12)
    with pytest.raises(PlanError, match="does not divide the experts of 12"):
        target_weights(config, Split(tensor=8, experts="experts"))


def test_repeated_kv_heads():
    assert [repeated(SIZES["llama-3.3-70b"], n) for n in (1, 8, 16, 32, 64)] == [1, 1, 2, 4, 8]
    assert repeated(SIZES["llama-4-scout"], 40) == 5


def test_formats():
    assert find_format("bf16") is BF16 and find_format("fp8") is FORMATS["fp8"]
    for name, message in (("fp8,bf16", "mixes several"), ("int3", "dtype 'int3' is unknown; use float32, bfloat16")):
        with pytest.raises(PlanError, match=message):
            find_format(name)
    with pytest.raises(PlanError, match="use float32, bfloat16, fp8"):
        find_format("int4", CACHE_FORMATS)
    assert H100.peak(8) == 2 * 989.5e12 and DEVICES["a100"].peak(8) == DEVICES["a100"].peak(16)
    assert H100.peak(4) == H100.peak(16) == 2 * H100.peak(32)
