"""Meshes of eight virtual devices: the tokens of one device, by programs that move little and read their parts."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx
from helpers import PeakBytes, fill_randomly, no_compilation, tiny_llama

from jeagle import LLM, SamplingParams, checkpoint, sharding
from jeagle.checkpoint import abstract, load_eagle, load_llama
from jeagle.checkpoint_writer import save
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.decode import Program
from jeagle.decoder import Batch, Decoder
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.llama4_config import Llama4Config
from jeagle.placement import place, repeat_kv_heads, variables
from jeagle.sampling import Filters, RowSampling, choose, logprobs, seed_keys
from jeagle.sharding import Layout, Rules, make_mesh
from jeagle.tree import OFF, parse_tree

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

EVERY_FILTER = Filters(sample=True, top_k=True, top_p=True, min_p=True)
PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=20, temperature=0.9, top_k=20, top_p=0.9),
    SamplingParams(max_tokens=24, temperature=1.0, min_p=0.02),
    SamplingParams(max_tokens=24, temperature=0.7),
]


def head_for(target: LlamaConfig, **form) -> EagleHead:
    """A random head of a smaller vocabulary, odd too."""
    config = EagleConfig.for_target(target, "eagle3", **dict(draft_vocab_size=61, taps=(0, 1)) | form)
    return fill_randomly(EagleHead(config, rngs=nnx.Rngs(0)), 1)


def pair(num_heads: int = 8, num_kv_heads: int = 8) -> tuple[Llama, EagleHead]:
    """A target of an odd vocabulary, and a head."""
    target = tiny_llama(num_heads=num_heads, num_kv_heads=num_kv_heads, vocab_size=97, num_layers=1)
    return target, head_for(target.config)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 97, n).astype(np.int32) for n in (5, 17, 1, 9)]
    sampling = RowSampling.stack(PARAMS, seed_keys(7, len(PARAMS)))
    limits = np.array([p.max_tokens for p in PARAMS], np.int32)
    return Batch(prompts, sampling, np.full((4, 4), -1, np.int32), limits)


def decode(target, head, layout: Layout | None, plan, filters: Filters = EVERY_FILTER):
    """The final state, and the compiled loop."""
    if layout is not None:
        target, head = place(target, layout), place(head, layout)
    decoder = Decoder(target, head, page_size=8, layout=layout)
    program = Program(plan, filters, 2)
    state = decoder.launch(decoder.start(batch(), program, capacity=64, chunk=16), program, 100)
    (compiled,) = [p.executable for p in decoder.programs if p.name == "decode"]
    return state, compiled


def collectives(compiled) -> list[tuple[str, int]]:
    """(operation, largest number of elements it hands out) of every collective in a compiled program."""
    found = []
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for result, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", compiled.as_text()):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        found.append((name, max(int(np.prod([int(n) for n in s.split(",") if n], initial=1)) for s in shapes)))
    return found


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "data", "tensor", "trees"),
    [
        (8, 8, 1, 8, ("off", "chain-2")),
        (8, 4, 1, 8, ("chain-2",)),
        (24, 3, 1, 8, ("chain-2",)),
        (8, 2, 2, 4, ("off", "chain-2+lookup-4")),
        (8, 1, 1, 8, ("chain-2",)),
        (8, 8, 4, 2, ("chain-2",)),
    ],
)
def test_tokens_of_one_device(num_heads, num_kv_heads, data, tensor, trees):
    """Greedy and sampled rows side by side; plain and speculative."""
    target, head = pair(num_heads, num_kv_heads)
    layout = Layout(make_mesh(data, tensor))
    filters = EVERY_FILTER if "off" in trees else Filters(sample=True)  # fewer filters compile faster
    alone, _ = decode(target, head, None, OFF, filters)
    for tree in trees:
        state, _ = decode(target, head, layout, parse_tree(tree), filters)
        np.testing.assert_array_equal(state.text_BS, alone.text_BS)
        np.testing.assert_array_equal(state.logprobs.top_id_BOn, alone.logprobs.top_id_BOn)
        np.testing.assert_allclose(state.logprobs.chosen_BO, alone.logprobs.chosen_BO, atol=1e-5)


@pytest.mark.parametrize("experts", ["mlp", "experts"])
def test_llama4_over_a_mesh(experts):
    """Each expert split, and whole experts dealt out; contexts that cross chunks of 16."""
    config = Llama4Config.tiny(num_heads=4, num_kv_heads=2, num_layers=2, moe_layers=(1,), nope_layers=(1,))
    target = fill_randomly(abstract(config), 0)
    head = head_for(config)
    layout = Layout(make_mesh(2, 4), Rules.choose(experts=experts))
    alone, _ = decode(target, head, None, OFF)
    state, compiled = decode(target, head, layout, parse_tree("chain-2"))
    np.testing.assert_array_equal(state.text_BS, alone.text_BS)
    assert {name for name, _ in collectives(compiled)} == {"all-reduce", "all-gather"}


def test_communication_of_the_loop():
    """Two all-reduces per layer, and of a vocabulary only winners; rows over data meet in the loop condition alone."""

    def decode_shapes(num_layers: int, plan, data: int = 1, **rules) -> list[tuple[str, int]]:
        config = dataclasses.replace(LlamaConfig.tiny(), num_layers=num_layers, num_heads=8, num_kv_heads=8)
        target = fill_randomly(abstract(config), 0)
        layout = Layout(make_mesh(data, 8 // data), Rules.choose(**rules))
        return collectives(decode(target, head_for(config, taps=(0,)), layout, plan, Filters())[1])

    one, two = decode_shapes(1, OFF), decode_shapes(2, OFF)
    assert len(two) - len(one) == 2
    assert {name for name, _ in two} == {"all-reduce", "all-gather"}
    rows, width, shards = len(PARAMS), 32, 8
    assert max(size for name, size in two if name == "all-reduce") == rows * width  # a layer's output
    assert max(size for name, size in two if name == "all-gather") <= rows * 2 * shards  # winners
    whole_head = decode_shapes(1, parse_tree("chain-1"), draft="replicated")
    split_head = decode_shapes(1, parse_tree("chain-1"))
    assert len(split_head) > len(whole_head)
    assert len(decode_shapes(1, OFF, data=4)) == len(one) + 1


def test_the_loop_updates_caches_in_place():
    target, head = pair()
    _, compiled = decode(target, head, Layout(make_mesh(1, 8)), parse_tree("chain-3"))
    memory = compiled.memory_analysis()
    cache = 64 * 4 * (target.config.num_layers + 1) * 2 * target.config.head_dim * 4  # positions x rows, one kv head
    assert memory.alias_size_in_bytes >= cache


@pytest.mark.parametrize("tensor", [2, 8])
def test_choices_over_a_split_vocabulary(tensor):
    """97 tokens, padded: chosen tokens and log-probabilities are those of the whole vocabulary, ties and all."""
    rng = np.random.default_rng(3)
    rows = 64
    logits = np.round(rng.normal(0, 3, (rows, 2, 97)), 1).astype(np.float32)  # rounded: there are ties
    params = [PARAMS[i % 4] for i in range(rows)]
    sampling = RowSampling.stack(params, seed_keys(0, rows))
    position_BT = jnp.asarray(rng.integers(0, 99, (rows, 2)), jnp.int32)
    whole = choose(logits, position_BT, sampling, EVERY_FILTER), logprobs(logits, jnp.zeros((rows, 2), jnp.int32), 3)
    layout = Layout(make_mesh(1, tensor))
    padded = np.pad(logits, ((0, 0), (0, 0), (0, -97 % tensor)), constant_values=-np.inf)

    @jax.jit
    def of_shards(padded):
        with sharding.use(layout):
            return choose(padded, position_BT, sampling, EVERY_FILTER), logprobs(padded, jnp.zeros((rows, 2), int), 3)

    split = of_shards(layout.put(padded, (None, None, "vocab")))
    np.testing.assert_array_equal(split[0], whole[0])
    np.testing.assert_allclose(split[1][0], whole[1][0], atol=1e-5)
    np.testing.assert_array_equal(split[1][2], whole[1][2])


@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_restored_parts_are_those_of_the_module(tmp_path, num_kv_heads):
    target, head = pair(8, num_kv_heads)
    for module, load in ((target, load_llama), (head, load_eagle)):
        path = save(module, tmp_path / type(module).__name__)
        layout = Layout(make_mesh(2, 4))
        restored, placed = variables(load(path, layout=layout)), variables(place(module, layout))
        assert restored.keys() == placed.keys()
        for name, variable in placed.items():
            assert restored[name][...].sharding == variable[...].sharding
            np.testing.assert_array_equal(restored[name][...], variable[...])


def bytes_read() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_every_part_is_read_once(tmp_path):
    """Chunks are cut where meshes cut: eight devices that read their parts read the checkpoint, not eight of it."""
    config = LlamaConfig.tiny(width=512, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=64, mlp_width=2048)
    path = save(fill_randomly(abstract(config), 0), tmp_path / "c")
    stored = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    before = bytes_read()
    load_llama(path, layout=Layout(make_mesh(1, 8)))
    assert 0.9 * stored < bytes_read() - before < 1.1 * stored


@pytest.mark.skipif(not PeakBytes.can_be_read(), reason="reads Linux's /proc")
def test_restoring_holds_little_beside_the_devices_parts(tmp_path, monkeypatch):
    """Devices' memory is the host's here: 134 MB of parts, and no second copy of them that waits to be placed."""
    config = LlamaConfig.tiny(width=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, mlp_width=2048)
    path = save(fill_randomly(abstract(config), 0), tmp_path / "c")
    stored = 4 * config.num_parameters
    monkeypatch.setattr(checkpoint, "READ_BYTES", 8 << 20)
    with PeakBytes() as peak:
        model = load_llama(path, layout=Layout(make_mesh(1, 8)))
    assert variables(model) and 0.8 * stored < peak.bytes < 1.55 * stored  # some of it was free before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_mesh(2, 8), "needs 16 devices, and JAX sees 8"),
        (lambda: make_mesh(1, 0), "tensor axis of a mesh must be a whole number of at least 1, got 0"),
        (lambda: Rules.choose(draft="half"), "must be 'tensor' or 'replicated'"),
        (lambda: repeat_kv_heads(LlamaConfig.tiny(), Layout(make_mesh(1, 8))), "does not divide 4 query heads on 2"),
        (lambda: place(tiny_llama(mlp_width=36), Layout(make_mesh(1, 8))), "does not divide"),
        (lambda: place(tiny_llama(num_heads=8, mlp_width=36), Layout(make_mesh(1, 8))), "divide the 36 of 'mlp'"),
        (lambda: LLM(tiny_llama(), tensor_parallel_size=8), "does not divide 4 query heads on 2 kv heads"),
        (lambda: LLM(tiny_llama(), data_parallel_size=99), "needs 99 devices"),
        (lambda: LLM(tiny_llama(), tensor_parallel_size=2, sampler="pallas"), "use 'xla'"),
    ],
)
def test_wrong_meshes_are_one_sentence(make, said):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_generate_over_a_mesh(tmp_path):
    """A checkpoint, rows that are no multiple of the mesh and more than there are places, FP8 caches."""
    target, head = (save(module, tmp_path / type(module).__name__) for module in pair())
    prompts = [[5, 6, 7], [8], [9] * 20, [10, 11], [12] * 17, [13], [14]]
    params = [PARAMS[i % 4] for i in (0, 1, 3, 3, 1, 2, 2)]
    params = [dataclasses.replace(p, seed=i, logprobs=1, max_tokens=24 - 3 * i) for i, p in enumerate(params)]
    kwargs = dict(tree="chain-2", page_size=8, kv_cache_dtype="fp8", max_batch_size=4, prefill_chunk=16)
    llms = [LLM(target, head, **kwargs, **sizes) for sizes in ({}, dict(tensor_parallel_size=4, data_parallel_size=2))]
    alone, mesh = (llm.generate(prompts, params, use_tqdm=False) for llm in llms)
    with no_compilation():
        llms[1].generate(prompts, params, use_tqdm=False)
    assert [out.outputs[0].token_ids for out in mesh] == [out.outputs[0].token_ids for out in alone]
    assert [out.metrics.acceptance_histogram for out in mesh] == [out.metrics.acceptance_histogram for out in alone]
