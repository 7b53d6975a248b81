"""The compiled loop: caches updated in place, nothing recompiled, nothing fetched by the host on the way."""

from __future__ import annotations

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import no_compilation

from jeagle import LLM, SamplingParams
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.decode import Program
from jeagle.decoder import Batch, Decoder, precision_of
from jeagle.eagle import EagleHead
from jeagle.fp8 import FP8
from jeagle.llama import Llama
from jeagle.programs import CompiledProgram
from jeagle.sampling import Filters, RowSampling, seed_keys
from jeagle.tree import OFF, StaticTree, with_lookup

# A cache that outweighs all else: 3 layers x 8192 positions against a vocabulary of 64.
CONFIG = LlamaConfig.tiny(num_layers=3, head_dim=32, vocab_size=64, max_position=8192)
BATCH, CAPACITY = 2, 8192


def make_llm(**options) -> LLM:
    target = Llama(CONFIG, rngs=nnx.Rngs(0))
    return LLM(target, EagleHead(EagleConfig.for_target(CONFIG, "eagle3"), rngs=nnx.Rngs(1)), **options)


def make_batch(max_tokens: int) -> Batch:
    return Batch(
        [np.arange(1, 40, dtype=np.int32)] * BATCH,
        RowSampling.stack([SamplingParams()] * BATCH, seed_keys(0, BATCH)),
        np.full((BATCH, 4), -1, np.int32),
        np.full(BATCH, max_tokens, np.int32),
    )


def make_decoder(**options) -> Decoder:
    target = Llama(CONFIG, rngs=nnx.Rngs(0))
    return Decoder(target, EagleHead(EagleConfig.for_target(CONFIG, "eagle3"), rngs=nnx.Rngs(1)), **options)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def compiled(decoder: Decoder, plan: StaticTree, filters: Filters) -> CompiledProgram:
    program = Program(plan=plan, filters=filters)
    state = decoder.start(make_batch(8), program, capacity=CAPACITY, chunk=64)
    decoder.launch(state, program, 1)
    return next(p for p in decoder.programs if p.program == program)


@pytest.mark.parametrize(
    ("plan", "filters"),
    [
        (OFF, Filters()),
        (StaticTree.chain(3), Filters()),
        (StaticTree.chain(2), Filters(sample=True, top_p=True)),
        (with_lookup(StaticTree.chain(3)), Filters()),
    ],
    ids=["plain", "chain", "sampled chain", "lookup"],
)
def test_caches_are_updated_in_place(decoder: Decoder, plan: StaticTree, filters: Filters) -> None:
    memory = compiled(decoder, plan, filters).executable.memory_analysis()
    layer = 2 * BATCH * CAPACITY * CONFIG.num_kv_heads * CONFIG.head_dim * 4  # bytes of one layer's keys and values
    layers = CONFIG.num_layers + (1 if plan != OFF else 0)
    assert memory.alias_size_in_bytes >= layers * layer
    assert memory.temp_size_in_bytes < layer


def test_prefill_updates_its_caches_in_place(decoder: Decoder) -> None:
    compiled(decoder, StaticTree.chain(3), Filters())
    program = next(p for p in decoder.programs if p.name == "prefill")
    memory = program.executable.memory_analysis()
    layer = 2 * BATCH * CAPACITY * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert memory.alias_size_in_bytes >= CONFIG.num_layers * layer
    assert memory.temp_size_in_bytes < layer


def test_fp8_caches_and_their_scales_are_updated_in_place() -> None:
    """In prefill and in the loop. A layer of 8 bits is a quarter of one of float32, and so is the room for a copy."""
    decoder = make_decoder(kv_cache_dtype=FP8)
    compiled(decoder, StaticTree.chain(2), Filters())
    layer = 2 * BATCH * CAPACITY * CONFIG.num_kv_heads * (CONFIG.head_dim + 4)  # numbers and their scales
    for program in decoder.programs:
        memory = program.executable.memory_analysis()
        assert memory.alias_size_in_bytes >= (CONFIG.num_layers + 1) * layer
        assert memory.temp_size_in_bytes < layer


def test_a_process_holds_so_many_programs(monkeypatch) -> None:
    """The last used; what comes back is compiled again, and says the same."""
    monkeypatch.setattr("jeagle.programs.MOST_PROGRAMS", 3)
    llm, before = make_llm(tree="chain-2"), alive()  # held here, so that none of them goes meanwhile
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    def tokens(batch: int) -> list[list[int]]:
        outputs = llm.generate([[1, 2, 3]] * batch, params, use_tqdm=False)
        return [out.outputs[0].token_ids for out in outputs]

    first = tokens(1)
    assert [(p.name, p.batch) for p in llm.compiled_programs] == [("prefill", 1), ("decode", 1)]
    second = tokens(2)
    assert [(p.name, p.batch) for p in llm.compiled_programs] == [("decode", 1), ("prefill", 2), ("decode", 2)]
    assert tokens(1) == first and tokens(2) == second == first * 2
    assert len(llm.compiled_programs) == 3 == sum(each not in before for each in alive())


def alive() -> list:
    """The programs that this process holds, of any decoder."""
    gc.collect()
    held = jax.devices()[0].client.live_executables()
    return [each for each in held if each.hlo_modules()[0].name == "jit_run"]


def test_nothing_leaves_the_device_inside_the_loop(decoder: Decoder) -> None:
    hlo = compiled(decoder, StaticTree.chain(3), Filters(sample=True, top_p=True)).executable.as_text()
    assert " while(" in hlo
    for leak in ("infeed", "outfeed", "send(", "recv(", "callback", "host_transfer"):
        assert leak not in hlo, leak
    program = Program(plan=StaticTree.chain(3))
    state = decoder.start(make_batch(30), program, capacity=CAPACITY, chunk=64)
    decoder.launch(state, program, 1)
    state = decoder.start(make_batch(30), program, capacity=CAPACITY, chunk=64)
    with jax.transfer_guard_device_to_host("disallow"):
        state = decoder.launch(state, program, 1000)
    assert np.asarray(state.num_output_B).tolist() == [30, 30]


def test_a_bucket_is_compiled_once() -> None:
    llm = make_llm()
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    llm.generate([[1, 2, 3], [4, 5]], params, use_tqdm=False)
    before = len(llm.compiled_programs)
    assert [p.name for p in llm.compiled_programs] == ["prefill", "decode"]
    with no_compilation("jit(run)"):
        llm.generate([[7, 8, 9, 10], [11]], SamplingParams(max_tokens=17, ignore_eos=True), use_tqdm=False)
    assert len(llm.compiled_programs) == before


def test_one_launch_per_rounds_per_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(rounds_per_launch=10)
    launches = []
    launch = llm._decoder.launch
    monkeypatch.setattr(llm._decoder, "launch", lambda *args: launches.append(args[2]) or launch(*args))
    (out,) = llm.generate([1, 2, 3], SamplingParams(max_tokens=35, ignore_eos=True), speculative=False, use_tqdm=False)
    assert out.metrics.num_rounds == 35
    assert launches == [10] * 4


def test_float32_is_multiplied_as_such():
    """A GPU's default is TF32. Every product of a round and of prefill asks for more, and only there."""
    assert precision_of(jnp.dtype("float32"), "gpu") == "highest"
    assert precision_of(jnp.dtype("bfloat16"), "gpu") is None and precision_of(jnp.dtype("float32"), "cpu") is None
    with jax.default_matmul_precision("tensorfloat32"):  # the user's word
        assert precision_of(jnp.dtype("float32"), "gpu") is None

    for platform, asked in (("gpu", True), ("cpu", False)):
        decoder = make_decoder(platform=platform)
        program = Program(plan=StaticTree.chain(2))
        caches = decoder.empty_caches(BATCH, program, 128)
        state = decoder.first_state(caches, make_batch(8), program, 128)
        rows = np.zeros((BATCH, 65), np.int32), np.int32(0), np.int32(0), np.ones(BATCH, np.int32)
        for lowered in (
            decoder.jitted_launch.lower(decoder.params, state, np.int32(1), np.int32(1), program=program),
            decoder._prefill.lower(decoder.params, caches, *rows, attention="xla"),
        ):
            products = re.findall(r"stablehlo\.dot_general.*", lowered.as_text())
            assert len(products) > 10 and {"HIGHEST" in line for line in products} == {asked}
