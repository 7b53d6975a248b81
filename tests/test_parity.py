"""The target computes what HF transformers computes: logits, greedy tokens and tokenisation, in float32.

Expected values come from scripts/make_goldens.py (torch), which also records how clear every greedy choice was: the
smallest distance of the two largest logits is far above the tolerance used here, so equal tokens are no accident.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer

import convert
from jeagle import LLM, SamplingParams
from jeagle.cache import KVCache, Prefix
from jeagle.checkpoint import load_llama
from jeagle.training.packing import Rows
from jeagle.training.unroll import packed_attention

TINY = ["llama2", "llama31", "linear", "biased", "tied", "sharded"]
TOLERANCE = 1e-4
SMOLLM2_TOLERANCE = 5e-4  # 30 layers, measured 5e-5; every golden margin is above 0.004


def full_logits(model, texts: list[list[int]], wanted: list[list[int]] | None = None) -> list[np.ndarray]:
    """Per text, float32 logits [len, V] from one forward of a right-padded batch over an empty cache.

    ``wanted`` names the positions whose logits are computed; None means all.
    """
    B, T = len(texts), max(map(len, texts))
    wanted = wanted or [list(range(len(text))) for text in texts]
    W = max(map(len, wanted))
    token_BT, index_BW = np.zeros((B, T), np.int32), np.zeros((B, W), np.int32)
    for row, (text, positions) in enumerate(zip(texts, wanted, strict=True)):
        token_BT[row, : len(text)] = text
        index_BW[row, : len(positions)] = positions
    cache = KVCache.create(model.config, num_pages=1, page_size=1, dtype=jnp.float32)
    prefix = Prefix.full(jnp.zeros((B, 1), jnp.int32), jnp.zeros((B,), jnp.int32))
    position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    causal = np.tril(np.ones((1, T, T), bool))  # padding comes last: no real position sees it
    graph, weights = nnx.split(model)

    @jax.jit
    def run(weights):
        model = nnx.merge(graph, weights)
        hidden_BTD = model(token_BT, position_BT, causal, cache, prefix).hidden_BTD
        return model.logits(jnp.take_along_axis(hidden_BTD, index_BW[..., None], axis=1))

    logits_BWV = np.asarray(run(weights))
    return [logits_WV[: len(positions)] for logits_WV, positions in zip(logits_BWV, wanted, strict=True)]


@dataclass(frozen=True)
class Tiny:
    source: Path
    converted: Path
    prompts: list[list[int]]
    logits: list[np.ndarray]
    greedy: list[list[int]]


@pytest.fixture(scope="module", params=TINY)
def tiny(request, golden, tmp_path_factory) -> Tiny:
    source = golden / request.param
    converted = tmp_path_factory.mktemp("parity") / request.param
    convert.convert(source, converted)
    with np.load(source / "expected.npz") as expected:
        assert expected["margin"] > 100 * TOLERANCE
        return Tiny(
            source,
            converted,
            [expected[f"prompt_{i}"].tolist() for i in range(3)],
            [expected[f"logits_{i}"] for i in range(3)],
            [expected[f"greedy_{i}"].tolist() for i in range(3)],
        )


def test_logits(tiny):
    for computed, expected in zip(full_logits(load_llama(tiny.converted), tiny.prompts), tiny.logits, strict=True):
        np.testing.assert_allclose(computed, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama31", "tied", "llama4_scout"])
def test_a_tap_is_what_its_block_reads(name, golden, tmp_path):
    """HF's hidden states: an id one off would cost a head most of its acceptance, and change no text."""
    convert.convert(golden / name, tmp_path / name)
    target = load_llama(tmp_path / name)
    with np.load(golden / name / "expected.npz") as expected:
        tokens, inputs_LTD = expected["prompt_2"][:16], expected["inputs"][:, :16]  # of Llama 4, one chunk
    L, T, D = inputs_LTD.shape
    assert len(target.blocks) == L and np.abs(inputs_LTD[1:] - inputs_LTD[:-1]).max(axis=(1, 2)).min() > 0.1
    one = np.ones((1, T), bool)
    rows = Rows(tokens[None], one.astype(np.int32), np.arange(T, dtype=np.int32)[None], one, one.astype(np.float32))
    taps = tuple(range(L))
    feature_BTX = nnx.jit(lambda target: target.run(*rows[:3:2], packed_attention(rows), taps=taps)[1])(target)
    computed_LTD = np.asarray(feature_BTX[0]).reshape(T, L, D).swapaxes(0, 1)
    np.testing.assert_allclose(computed_LTD, inputs_LTD, rtol=0, atol=TOLERANCE)


def test_greedy_tokens(tiny):
    outputs = LLM(str(tiny.converted)).generate(
        tiny.prompts, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    )
    assert [list(output.outputs[0].token_ids) for output in outputs] == tiny.greedy


def test_llama31_in_the_classic_config_form(golden, tmp_path):
    """Hub checkpoints of Llama 3.1 say ``rope_theta``, ``rope_scaling`` and ``torch_dtype``."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes((golden / "llama31" / "model.safetensors").read_bytes())
    config = json.loads((golden / "llama31" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope, torch_dtype=config.pop("dtype"))
    (source / "config.json").write_text(json.dumps(config))
    convert.convert(source, tmp_path / "converted")
    with np.load(golden / "llama31" / "expected.npz") as expected:
        prompt, logits_TV = expected["prompt_2"].tolist(), expected["logits_2"]
    (computed,) = full_logits(load_llama(tmp_path / "converted"), [prompt])
    np.testing.assert_allclose(computed, logits_TV, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def smollm2_cases(golden) -> list[dict]:
    cases = json.loads((golden / "smollm2.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) >= 8 and max(len(case["prompt"]) for case in cases) > 900
    return cases


def test_smollm2_tokenisation(smollm2_dir, smollm2_cases):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    for case in smollm2_cases:
        if case["form"] == "chat":
            messages = [{"role": "user", "content": case["text"]}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            text = case["text"]
        assert tokenizer(text)["input_ids"] == case["prompt"], case["kind"]
        assert tokenizer.decode(case["greedy"]) == case["text_out"], case["kind"]


def test_smollm2_logits(smollm2_dir, smollm2_cases):
    """The five largest logits where the first and the last token of every answer is chosen."""
    model = load_llama(smollm2_dir)
    short = [case for case in smollm2_cases if len(case["prompt"]) <= 200]
    long = [case for case in smollm2_cases if len(case["prompt"]) > 200]
    for cases in (short, long):
        texts = [case["prompt"] + case["greedy"] for case in cases]
        chosen_at = [[len(case["prompt"]) - 1, len(text) - 2] for case, text in zip(cases, texts, strict=True)]
        for case, logits_WV in zip(cases, full_logits(model, texts, chosen_at), strict=True):
            for logits_V, top5 in zip(logits_WV, (case["top5_first"], case["top5_last"]), strict=True):
                np.testing.assert_allclose(
                    logits_V[top5["ids"]], top5["logits"], rtol=0, atol=SMOLLM2_TOLERANCE, err_msg=case["kind"]
                )
                fifth = top5["logits"][-1]
                assert (logits_V > fifth + SMOLLM2_TOLERANCE).sum() <= 4, case["kind"]


def test_smollm2_greedy_tokens(smollm2_dir, smollm2_cases):
    # EOS is ignored so that every answer can be compared as far as it was recorded, EOS itself included.
    outputs = LLM(str(smollm2_dir), max_batch_size=11).generate(  # the short prompts together, the long one alone
        [case["prompt"] for case in smollm2_cases], SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    )
    for case, output in zip(smollm2_cases, outputs, strict=True):
        assert case["margin"] > 4 * SMOLLM2_TOLERANCE
        assert list(output.outputs[0].token_ids)[: len(case["greedy"])] == case["greedy"], case["kind"]
