"""What ``LLM`` refuses, in one sentence and before anything runs: prompts, parameters, options, models, tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import pytest
from reciter import MAX_LEN, make_head, save_pairs
from tiny_tokenizer import VOCAB_SIZE

from jeagle import LLM, EagleConfig, LlamaConfig, SamplingParams
from jeagle.distributed import DeviceMemoryError

QUIET = dict(use_tqdm=False)
HEAD = make_head(EagleConfig.for_target(LlamaConfig.tiny(), "eagle3"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Path]:
    return save_pairs(tmp_path_factory.mktemp("refused"))


@pytest.fixture(scope="module")
def reciter(pairs) -> LLM:
    return LLM(pairs["reciter"], pairs["reciter-head"], tree="chain-2")


def test_full_device_memory_is_one_sentence(reciter, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")

    monkeypatch.setattr(reciter._decoder, "start", full)
    with pytest.raises(DeviceMemoryError) as refused:
        reciter.generate([5], **QUIET)
    said = "memory is full (Out of memory allocating 8 bytes.); lower max_batch_size or max_model_len"
    assert said in str(refused.value) and "\n" not in str(refused.value)

    def too_large(*args, **kwargs):  # a kernel, for which no smaller batch helps
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 9, available 8"
        )

    monkeypatch.setattr(reciter._decoder, "start", too_large)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory"):
        reciter.generate([5], **QUIET)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (5, "prompts must be a string, a list of token ids, or a list of these, got 5"),
        (None, "got None"),
        ({"text": "a"}, "a prompt given as a mapping must have prompt_token_ids or prompt, got ['text']"),
        ([{"role": "user", "content": "a"}], "must have prompt_token_ids or prompt, got ['content', 'role']"),
        ({"prompt_token_ids": [5, -1]}, "prompt 0 holds token id -1"),
        (b"abc", "got b'abc'"),
        ([[]], "prompt 0 is empty"),
        ([[5], []], "prompt 1 is empty"),
        ([[5], None], "prompt 1 must be a string or a list of token ids, got None"),
        ([5, "a"], "prompt 0 must be a string or a list of token ids, got 'a'"),
        ([[5], [True]], "prompt 1 must be a string or a list of token ids, got True"),
        ([[1.5]], "prompt 0 must be a string or a list of token ids, got 1.5"),
        ([5, VOCAB_SIZE], f"prompt 0 holds token id {VOCAB_SIZE}, outside the vocabulary of {VOCAB_SIZE}"),
        ([[5], [-1]], "prompt 1 holds token id -1"),
        (["a", "b" * 300], "prompt 1 has 301 tokens"),
        ("\ud800", "not valid Unicode: surrogates not allowed at character 0"),
    ],
)
def test_refused_prompts(reciter, prompts, message):
    before = len(reciter.compiled_programs)
    with pytest.raises(ValueError) as refused:
        reciter.generate(prompts, **QUIET)
    assert message in str(refused.value)
    assert len(reciter.compiled_programs) == before


def test_refused_parameters_and_conversations(reciter):
    with pytest.raises(ValueError, match="1 prompts came with 2 SamplingParams"):
        reciter.generate("a", [SamplingParams()] * 2)
    for wrong in ({"max_tokens": 3}, [{}], SamplingParams):
        with pytest.raises(ValueError, match="sampling_params must be a SamplingParams, or a list of one per prompt"):
            reciter.generate("a", wrong)
    with pytest.raises(ValueError, match=f"stop_token_ids holds {VOCAB_SIZE}, outside the vocabulary"):
        reciter.generate("a", SamplingParams(stop_token_ids=[VOCAB_SIZE]))
    with pytest.raises(ValueError, match="n must be 1, got 2"):
        reciter.stream("a", SamplingParams(n=2))
    for wrong in ("hi", ["hi"], {"role": "user", "content": "hi"}, [[]], 5, None):
        with pytest.raises(ValueError, match="a conversation is a list of"):
            reciter.chat(wrong)
    for wrong in ({"rol": "user"}, {"role": "user", "content": None}):
        with pytest.raises(ValueError, match="the chat template cannot render"):
            reciter.chat([wrong])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(dtype="fp16"), "dtype must be one of auto, float32, bfloat16, fp8, got 'fp16'"),
        (dict(kv_cache_dtype="int8"), "kv_cache_dtype must be one of auto, fp8, fp8_e4m3, got 'int8'"),
        (dict(tree="oak", model="nowhere/at/all"), "tree 'oak' is unknown"),  # before a model is fetched or converted
        (dict(tree=[[0, 0]]), "has no parent: add the path"),
        (dict(tree="dynamic-0-1-2"), "a dynamic tree needs depth >= 1"),
        (dict(max_model_len=MAX_LEN + 1), "max_model_len must lie in 1..256"),
        (dict(max_model_len="long"), "max_model_len must be a whole number of at least 1, got 'long'"),
        (dict(max_batch_size=0), "max_batch_size must be a whole number of at least 1, got 0"),
        (dict(attention="magic"), "attention implementation 'magic' is unknown"),
        (dict(sampler="magic"), "sampler 'magic' is unknown"),
        (dict(sampler=["xla"]), "sampler ['xla'] is unknown"),
        (dict(model=5), "model must be a path, a hub name or of type Llama, got int"),
        (dict(model=HEAD), "model must be a path, a hub name or of type Llama, got EagleHead"),
        (dict(draft=b"x"), "draft must be a path, a hub name or of type EagleHead, got bytes"),
        (dict(kv_cache_dtype=["fp8"]), "kv_cache_dtype must be one of"),
        (dict(attention=["xla"]), "attention implementation ['xla'] is unknown"),
        (dict(tree="chain-99999999999"), "tree 'chain-99999999999' is too large; its numbers may go up to 1024"),
        (dict(tree="dynamic-2-3-5000+lookup"), "is too large"),
        (dict(synthetic_acceptance=[0.5], draft=None), "synthetic_acceptance forces what a head drafts: give a draft"),
        (dict(synthetic_acceptance=[0.5], tree="lookup-4"), "and a tree that drafts"),
        (dict(model="nowhere/at/all"), "nowhere/at/all does not exist"),
        (dict(model=__file__), "is a file"),
    ],
)
def test_refused_construction(pairs, changed, message):
    with pytest.raises(ValueError) as refused:
        LLM(**{"model": pairs["random"], "draft": pairs["random-head"], **changed})
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_model_and_draft_must_fit(pairs):
    with pytest.raises(ValueError, match="made for a target of width 64; this one has 32"):
        LLM(pairs["random"], pairs["reciter-head"])
    with pytest.raises(ValueError, match="holds a target model, not an EAGLE head"):
        LLM(pairs["random"], pairs["random"])
    with pytest.raises(ValueError, match="holds an EAGLE head, not a target model"):
        LLM(pairs["random-head"])
    other = make_head(EagleConfig.for_target(LlamaConfig.tiny(), "eagle3"))
    with pytest.raises(ValueError, match=f"vocabulary is 97; the target's is {VOCAB_SIZE}"):
        LLM(pairs["random"], other)


def test_damaged_tokenizer(pairs, tmp_path):
    """Said in one sentence before anything runs, for ids too: their text could not be given back."""
    directory = shutil.copytree(pairs["random"], tmp_path / "damaged")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot load the tokenizer in .*damaged") as refused:
        LLM(directory).generate([5], **QUIET)
    assert "\n" not in str(refused.value)
