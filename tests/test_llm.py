"""``LLM`` as its users meet it: prompts of every form, parameters, texts, streams, metrics, and what is cached.

Two pairs of target and head: the *reciter* of ``reciter.py``, whose answers are known in advance and whose head is
always right, and a *random* pair with attention, whose head is almost never right.
"""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_llama
from reciter import MAX_LEN, RECITED, TEXT, save_pairs
from tiny_tokenizer import BOS, EOS, VOCAB_SIZE, byte_ids

from jeagle import LLM, RequestOutput, SamplingParams
from jeagle.cache import KVCache, Prefix
from jeagle.checkpoint import load_llama
from jeagle.decode import Program
from jeagle.locate import locate

QUIET = dict(use_tqdm=False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Path]:
    return save_pairs(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def reciter(pairs) -> LLM:
    return LLM(pairs["reciter"], pairs["reciter-head"], tree="chain-2", max_batch_size=4, prefill_chunk=64)


@pytest.fixture(scope="module")
def random_llm(pairs) -> LLM:
    return LLM(pairs["random"], pairs["random-head"], tree="chain-2", max_batch_size=4, prefill_chunk=64)


def answers(outputs: list[RequestOutput]) -> list[list[tuple]]:
    """All that must not depend on speculation or on company."""
    return [[(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs] for output in outputs]


# prompts


def test_every_form_of_prompt(reciter):
    ids = [BOS, *byte_ids("ab")]
    params = SamplingParams(max_tokens=5)
    forms = ["ab", ["ab"], ids, [ids], tuple(ids), np.array(ids), [np.array(ids)], np.array([ids]), jnp.array(ids)]
    for i, form in enumerate(forms):
        (output,) = reciter.generate(form, params, **QUIET)
        assert output.prompt_token_ids == ids
        assert output.prompt == ("ab" if i < 2 else None)
        assert output.outputs[0].token_ids == byte_ids("cdé🙂")[:5]
    assert reciter.generate([], params, **QUIET) == []
    assert reciter.chat([], params, **QUIET) == []


SAMPLED = dict(temperature=1.5, top_p=0.95)


def test_order_and_company(random_llm):
    """More prompts than rows, ragged, each with its own parameters: what each gets without drafts, and alone."""
    rng = np.random.default_rng(0)
    lengths = [3, 1, 70, 2, 9, 200, 64]
    prompts = [rng.integers(8, VOCAB_SIZE, length).tolist() for length in lengths]
    params = [
        SamplingParams(
            max_tokens=3 + 5 * i,
            ignore_eos=True,
            logprobs=20 if i in (0, 2) else None,  # in both batches: one compiled program serves all of this file
            **(SAMPLED | {"seed": i} if i % 2 else {}),
        )
        for i in range(len(prompts))
    ]
    together = random_llm.generate(prompts, params, **QUIET)
    assert [o.prompt_token_ids for o in together] == prompts
    assert [len(o.outputs[0].token_ids) for o in together] == [p.max_tokens for p in params]
    assert answers(random_llm.generate(prompts, params, speculative=False, **QUIET)) == answers(together)
    for i in (4, 5):
        assert answers(random_llm.generate(prompts[i], params[i], speculative=False, **QUIET)) == [answers(together)[i]]
    for output, p in zip(together, params):
        check_metrics(output, p.max_tokens, tree="chain-2")


def test_samples_and_seeds(random_llm):
    def sample(seed, n=1, **kwargs):
        params = SamplingParams(
            max_tokens=32, ignore_eos=True, seed=seed, n=n, logprobs=20 if n > 1 else None, **SAMPLED
        )
        return [c.token_ids for c in random_llm.generate([[5, 6]], params, **QUIET, **kwargs)[0].outputs]

    three = sample(7, n=3)
    assert len({tuple(ids) for ids in three}) == 3
    assert sample(7, speculative=False) == three[:1]  # the first sample is that of n=1
    assert sample(8, speculative=False) != three[:1]
    assert sample(None, speculative=False) != sample(None, speculative=False)


# where texts end


@pytest.mark.parametrize("speculative", [True, False])
def test_where_texts_end(reciter, speculative):
    def ids(text):
        return byte_ids(text)

    cases = [  # prompt, parameters, text, token ids, finish reason, stop reason
        ("r", dict(), "s\n", [*ids("s\n"), EOS], "stop", None),
        ("r", dict(max_tokens=3), "s\n", [*ids("s\n"), EOS], "stop", None),  # stop wins over length
        ("r", dict(max_tokens=2), "s\n", ids("s\n"), "length", None),
        ("r", dict(max_tokens=1), "s", ids("s"), "length", None),
        ("r", dict(max_tokens=7, ignore_eos=True), "s\nabcd", [*ids("s\n"), EOS, *ids("abcd")], "length", None),
        ("r", dict(stop_token_ids=[EOS]), "s\n", [*ids("s\n"), EOS], "stop", EOS),
        ("g", dict(stop_token_ids=ids("kl")), "hij", ids("hijk"), "stop", ids("k")[0]),  # no text, as in vLLM
        (
            "g",
            dict(stop_token_ids=ids("k"), stop="jk"),
            "hij",
            ids("hijk"),
            "stop",
            ids("k")[0],
        ),  # nor part of a string
        ("g", dict(stop_token_ids=ids("l"), stop="ij"), "h", ids("hij"), "stop", "ij"),  # the earlier of the two
        ("c", dict(stop="STOP"), "dé🙂fghijklm.", ids("dé🙂fghijklm.STOP"), "stop", "STOP"),
        ("c", dict(stop=["hi", "é🙂"]), "d", ids("dé🙂"), "stop", "é🙂"),
        ("c", dict(stop="🙂f", max_tokens=8), "dé", ids("dé🙂f"), "stop", "🙂f"),  # at the very limit
        ("c", dict(stop="🙂f", max_tokens=7), "dé🙂", ids("dé🙂"), "length", None),
        ("c", dict(stop="🙂f", max_tokens=5), "dé", ids("dé🙂")[:5], "length", None),  # half a character is dropped
        ("r", dict(stop="\nX"), "s\n", [*ids("s\n"), EOS], "stop", None),  # held back, then released
        ("r", dict(stop="</s>"), "s\n", [*ids("s\n"), EOS], "stop", None),  # special tokens are no text
    ]
    # Stop strings at every place of a round's block.
    cases += [
        ("a", dict(stop=TEXT[i : i + 2]), TEXT[1:i], ids(TEXT[1 : i + 2]), "stop", TEXT[i : i + 2])
        for i in range(2, 12)
    ]
    outputs = reciter.generate(
        [byte_ids(prompt) for prompt, *_ in cases],
        [SamplingParams(**params) for _, params, *_ in cases],
        speculative=speculative,
        **QUIET,
    )
    for (_, _, *expected), (answer,) in zip(cases, answers(outputs), strict=True):
        assert list(answer) == expected


def test_a_full_context(reciter):
    prompt = [*byte_ids("b" * 199), *byte_ids("a")]
    fits = SamplingParams(max_tokens=MAX_LEN - len(prompt), ignore_eos=True)
    outputs = [reciter.generate(prompt, fits, speculative=s, **QUIET) for s in (True, False)]
    assert answers(outputs[0]) == answers(outputs[1])
    assert outputs[0][0].outputs[0].token_ids == (RECITED[1:] + RECITED)[: fits.max_tokens]
    over = SamplingParams(max_tokens=fits.max_tokens + 1)
    with pytest.raises(ValueError, match=r"prompt 1 has 200 tokens and max_tokens is 57.*limit of 256"):
        reciter.generate([[5], prompt], [fits, over], **QUIET)


# log-probabilities and metrics


def target_logprobs(llm_dir: Path, ids: list[int]) -> np.ndarray:
    """log-softmax [len, V] of one forward of the whole text."""
    model = load_llama(llm_dir)
    T = len(ids)
    cache = KVCache.create(model.config, num_pages=1, page_size=1, dtype=jnp.float32)
    prefix = Prefix.full(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32))
    hidden = model(jnp.array([ids]), jnp.arange(T)[None], jnp.tril(jnp.ones((1, T, T), bool)), cache, prefix).hidden_BTD
    return np.asarray(jax.nn.log_softmax(model.logits(hidden), axis=-1)[0])


def test_logprobs(random_llm, pairs):
    prompts = [[5, 6], [9, 9], [10, 11], [12, 13]]
    params = [
        SamplingParams(max_tokens=6, logprobs=20),
        SamplingParams(max_tokens=6, logprobs=2, seed=3, **SAMPLED),
        SamplingParams(max_tokens=6, logprobs=0),
        SamplingParams(max_tokens=6),
    ]
    speculative, plain = (random_llm.generate(prompts, params, speculative=s, **QUIET) for s in (True, False))
    assert answers(speculative) == answers(plain)
    assert speculative[3].outputs[0].logprobs is None
    for prompt, p, *both in zip(prompts[:3], params, speculative, plain):
        (first,), (second,) = (output.outputs for output in both)
        expected_TV = target_logprobs(pairs["random"], [*prompt, *first.token_ids])[len(prompt) - 1 :]
        assert len(first.logprobs) == len(first.token_ids)
        for token, got, other, expected_V in zip(first.token_ids, first.logprobs, second.logprobs, expected_TV):
            order = np.argsort(-expected_V)
            ranks = {int(t): r for r, t in enumerate(order[: p.logprobs], 1)}
            # The chosen token comes first, the best n follow in order; a rank is that among the best n.
            assert list(got) == list(other) == list(dict.fromkeys([token, *ranks]))
            assert {t: entry.rank for t, entry in got.items()} == {token: None} | ranks
            for t, entry in got.items():
                assert entry.logprob == pytest.approx(expected_V[t], abs=1e-4)
                assert entry.logprob == pytest.approx(other[t].logprob, abs=1e-4)


def check_metrics(output: RequestOutput, num_tokens: int, tree: str) -> None:
    metrics = output.metrics
    histogram, rates = metrics.acceptance_histogram, metrics.acceptance_per_position
    assert metrics.tree == tree
    assert sum(histogram) == metrics.num_rounds
    assert sum(n * (i + 1) for i, n in enumerate(histogram)) == metrics.num_emitted == num_tokens
    assert metrics.tokens_per_call == metrics.num_emitted / metrics.num_rounds
    assert len(rates) == len(histogram) - 1
    assert 1 >= rates[0] >= rates[-1] >= 0
    assert metrics.prefill_seconds > 0 and metrics.decode_seconds > 0


def test_metrics(reciter):
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    (output,) = reciter.generate([9, 20], params, **QUIET)
    check_metrics(output, 24, tree="chain-2")
    assert output.metrics.acceptance_histogram == [0, 0, 8]  # the head is always right
    (output,) = reciter.generate([9, 20], params, speculative=False, **QUIET)
    metrics = output.metrics
    assert (metrics.tree, metrics.tokens_per_call, metrics.num_rounds) == ("off", 1.0, 24)
    assert metrics.acceptance_histogram == [24] and metrics.acceptance_per_position == []


# text


@pytest.mark.parametrize("stop", [(), "STOP", "STOP!", "é🙂", "\nX"])
def test_stream_is_generate_in_pieces(reciter, stop):
    params = SamplingParams(max_tokens=60, stop=stop)
    pieces = list(reciter.stream("a", params))
    (output,) = reciter.generate("a", params, **QUIET)
    assert (
        "".join(pieces)
        == output.outputs[0].text
        == TEXT[1:].split("STOP" if stop == "STOP" else stop or None)[0] + ("\n" if not stop else "")
    )
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    params = SamplingParams(stop_token_ids=byte_ids("k"))
    assert "".join(reciter.stream("g", params)) == "hij"
    assert stop in ("é🙂",) or len(pieces) > 2


def test_prompts_as_mappings(reciter):
    """As vLLM's: TextPrompt and TokensPrompt."""
    params = SamplingParams(max_tokens=5)
    wanted = answers(reciter.generate(["a", "g"], params, **QUIET))
    given = [{"prompt": "a", "prompt_token_ids": None}, {"prompt_token_ids": np.array(byte_ids("g"))}]
    assert answers(reciter.generate(given, params, **QUIET)) == wanted
    assert answers(reciter.generate(given[0], params, **QUIET)) == wanted[:1]
    assert "".join(reciter.stream(given[1], params)) == wanted[1][0][0]


def test_more_logprobs_than_tokens():
    llm = LLM(tiny_llama(vocab_size=4), page_size=8)
    (out,) = llm.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True, logprobs=7), **QUIET)
    assert [len(step) for step in out.outputs[0].logprobs] == [4] * 3
    llm.plan = "lookup-2"  # as LLM's argument
    assert llm.generate([1, 2], SamplingParams(max_tokens=3), **QUIET)[0].metrics.tree == "lookup-2"
    with pytest.raises(ValueError, match="tree 'chain-1' needs a head"):
        llm.plan = "chain-1"


def test_chat(reciter):
    messages = [{"role": "system", "content": "recite"}, {"role": "user", "content": "now"}]
    params = SamplingParams(max_tokens=40)
    ids = reciter.apply_chat_template(messages)
    assert ids == [BOS, 3, *byte_ids("recite"), 6, 4, *byte_ids("now"), 6, 5]
    (one,) = reciter.chat(messages, params, **QUIET)
    assert one.prompt_token_ids == ids and one.outputs[0].text == TEXT
    several = reciter.chat([messages, messages[1:], messages[:1]], params, **QUIET)
    assert [o.prompt_token_ids for o in several] == [
        reciter.apply_chat_template(m) for m in (messages, messages[1:], messages[:1])
    ]
    assert "".join(reciter.stream(messages, params)) == TEXT


def test_a_checkpoint_without_tokenizer(pairs, random_llm):
    llm = LLM(pairs["ids"])
    params = SamplingParams(max_tokens=6)
    (bare,), (full,) = (x.generate([5], params, speculative=False, **QUIET) for x in (llm, random_llm))
    assert bare.outputs[0].token_ids == full.outputs[0].token_ids
    assert bare.outputs[0].text == "" != full.outputs[0].text
    messages = [{"role": "user", "content": "hi"}]
    ids = "give prompts as lists of token ids"
    for call, mend in (
        (lambda: llm.generate("text"), ids),
        (lambda: llm.chat(messages), ids),
        (lambda: llm.generate([5], SamplingParams(stop="x")), "give stop_token_ids instead of stop strings"),
        (lambda: llm.stream([5]), "use generate, as a stream is of text"),
    ):
        with pytest.raises(ValueError, match=f"ids has no tokenizer: {mend}, or add tokenizer files"):
            call()


# what is kept


def test_a_foreign_checkpoint_is_converted_once(golden, tmp_path, monkeypatch):
    source = shutil.copytree(golden / "llama2", tmp_path / "llama2")
    cache = tmp_path / "cache"
    first = LLM(source, cache_dir=cache)
    (made,) = (cache / "converted").iterdir()
    stamp = (made / "config.json").stat().st_mtime_ns
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LLM("~/llama2", cache_dir=cache).config == first.config
    assert [*(cache / "converted").iterdir()] == [made] and (made / "config.json").stat().st_mtime_ns == stamp
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert LLM(source, cache_dir=cache).config.eos_token_ids == (2, 7)
    assert len([*(cache / "converted").iterdir()]) == 2
    # From nothing: the name is expanded for the converter, too.
    shutil.rmtree(cache)
    assert LLM("~/llama2", cache_dir=cache).config.eos_token_ids == (2, 7)


def test_two_conversions_at_once(golden, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        made = [*pool.map(lambda _: locate(golden / "sharded", tmp_path, kind="llama"), range(4))]
    assert set(made) == {*(tmp_path / "converted").iterdir()} and len(set(made)) == 1


def test_a_bucket_is_compiled_once(reciter, capfd):
    params = SamplingParams(max_tokens=5)
    reciter.generate("ab", params, **QUIET)
    before = reciter.compiled_programs
    reciter.generate("abcdef", SamplingParams(max_tokens=9, stop="xyz", stop_token_ids=[9]), **QUIET)
    list(reciter.stream("abc", params))
    assert reciter.compiled_programs == before
    decode = next(p for p in before if p.name == "decode" and p.batch == 1 and p.program.drafts)
    assert (decode.capacity, decode.positions) == (256, 3) and decode.seconds > 0
    assert any(Path(jax.config.jax_compilation_cache_dir).iterdir())
    assert capfd.readouterr() == ("", "")


def test_bfloat16(pairs):
    llm = LLM(pairs["reciter"], dtype="bfloat16")
    assert llm.dtype == jnp.bfloat16
    assert llm.generate("a", SamplingParams(max_tokens=40), **QUIET)[0].outputs[0].text == TEXT[1:]


def test_fp8_caches(pairs):
    for name in ("fp8", "fp8_e4m3"):
        llm = LLM(pairs["reciter"], pairs["reciter-head"], kv_cache_dtype=name)
        assert llm.dtype == jnp.float32
        caches = llm._decoder.empty_caches(1, Program(plan=llm.plan), 64)
        assert {x.dtype.name for x in jax.tree.leaves((caches.target, caches.head))} == {"uint8", "float32"}
    (out,) = llm.generate("a", SamplingParams(max_tokens=40), **QUIET)
    assert out.outputs[0].text == TEXT[1:] and out.metrics.num_rounds < 30
    with pytest.raises(NotImplementedError, match="'mosaic'"):
        LLM(pairs["reciter"], kv_cache_dtype="fp8", attention="mosaic").generate("a", **QUIET)


# interrupts and threads


def test_reuse_after_an_interrupt(reciter, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reciter._decoder, "launch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reciter.generate("a", **QUIET)
    stream = reciter.stream("a")
    next(stream)
    stream.close()
    assert reciter.generate("a", **QUIET)[0].outputs[0].text == TEXT[1:]


def test_threads_share_an_llm(reciter):
    texts: dict[str, list[str]] = {}

    def serve(prompt: str) -> None:
        texts[prompt] = [reciter.generate(prompt, **QUIET)[0].outputs[0].text for _ in range(5)]

    threads = [threading.Thread(target=serve, args=(letter,)) for letter in "abfgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {letter: [TEXT.split(letter)[1]] * 5 for letter in "abfgh"}
