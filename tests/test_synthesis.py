"""Self-synthesis: what is written, what is dropped, that a killed run ends as one that was not, and what it refuses.

What is made of given prompts and texts is in ``test_synthesis_prompts.py``.
"""

# ruff: noqa: F811 - fixtures of synthesizing.py are imported, and arguments by the same names

from __future__ import annotations

import fcntl
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import small_disk  # noqa: F401
from reciter import reciting_pair
from synthesizing import SMALL, checkpoints, contents, lines_of, llm, run, write_lines  # noqa: F401
from tiny_tokenizer import BOS, EOS, SPECIALS, VOCAB_SIZE

from jeagle import LLM, SamplingParams
from jeagle.training.documents import DataError, read_documents
from jeagle.training.shards import MANIFEST
from jeagle.training.synthesis import Settings

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = sorted((ROOT / "scripts" / "prompts").glob("*.jsonl"))
USER, ASSISTANT, END = (SPECIALS.index(f"<|{name}|>") for name in ("user", "assistant", "end"))


@pytest.fixture(scope="module")
def whole(llm, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run(llm, out)
    return out


# what the target asks itself


def test_lines_are_what_the_target_saw_and_wrote(llm, whole):
    records = lines_of(whole)
    assert len(records) == SMALL["documents"]
    for record in records:
        asked, answer = record["messages"]
        assert (asked["role"], answer["role"]) == ("user", "assistant")
        prompt = llm.apply_chat_template([asked])
        params = SamplingParams(
            max_tokens=40, temperature=record["temperature"], top_p=record["top_p"], seed=record["seed"]
        )
        said = llm.generate(prompt, params, speculative=False, use_tqdm=False)[0].outputs[0]
        assert record["token_ids"] == prompt + said.token_ids
        assert record["response"] == [[len(prompt), len(record["token_ids"])]]
        assert (answer["content"], record["finish"]) == (said.text, said.finish_reason)
        assert record["finish"] == "length" or record["token_ids"][-1] == EOS
        assert record["temperature"] == (0.0, 0.7, 1.0)[record["index"] % 3]
    assert {record["finish"] for record in records} == {"stop", "length"}
    assert len({record["messages"][0]["content"].casefold()[:80] for record in records}) == len(records)
    assert len({record["seed"] for record in records}) == len(records)


def test_manifest(llm, whole):
    manifest = json.loads((whole / MANIFEST).read_bytes())
    records = lines_of(whole)
    assert [shard["documents"] for shard in manifest["shards"]] == [4, 4, 2]
    for shard in manifest["shards"]:
        data = (whole / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        inside = [json.loads(line) for line in gzip.decompress(data).splitlines()]
        assert shard["first_index"] <= inside[0]["index"] < shard["next_index"]
        assert shard["next_index"] - shard["first_index"] == shard["documents"] + sum(shard["dropped"].values())
        assert shard["tokens"] == sum(len(record["token_ids"]) for record in inside)
    assert manifest["tokens"] == sum(len(record["token_ids"]) for record in records)
    assert manifest["response_tokens"] == sum(b - a for record in records for a, b in record["response"])
    assert manifest["target"]["name"] == "reciter" and manifest["head"] == "head"
    assert {"config.json", "source.json", "tokenizer.json"} <= {f["file"] for f in manifest["target"]["files"]}
    assert manifest["settings"]["seed"] == 5 and manifest["engine"]["max_batch_size"] == 4
    assert str(whole.parent) not in (whole / MANIFEST).read_text()


def test_the_trainer_reads_it(llm, whole):
    files = sorted(whole.glob("shard-*"))
    documents = read_documents(files, llm.tokenizer, vocab_size=VOCAB_SIZE, end_of_turn=EOS)
    for document, record in zip(documents, lines_of(whole), strict=True):
        assert document.token_n.tolist() == record["token_ids"]
        assert document.response_n.sum() == len(record["token_ids"]) - record["response"][0][0]


def test_user_turns_follow_the_empty_header_and_end_with_the_turn(llm, tmp_path, monkeypatch):
    calls = []
    generate = llm.generate
    monkeypatch.setattr(llm, "generate", lambda *args, **kw: calls.append(args) or generate(*args, **kw))
    run(llm, tmp_path / "out", documents=2)
    prompts, params = calls[0]
    assert prompts == [[BOS, USER]] * 4  # whole batches
    assert {p.stop_token_ids for p in params} == {(END,)} and {p.temperature for p in params} == {1.0}
    prompts, params = calls[-1]
    assert all(prompt[-2:] == [END, ASSISTANT] for prompt in prompts)
    assert len(prompts) == 2


def test_the_head_changes_nothing(checkpoints, whole, tmp_path):
    run(LLM(checkpoints[0], max_batch_size=4, prefill_chunk=64), tmp_path / "plain", head=None)
    assert lines_of(tmp_path / "plain") == lines_of(whole)


def test_a_target_has_files_to_know_it_by(llm, checkpoints, tmp_path):
    assert (llm.checkpoint, llm.max_batch_size) == (checkpoints[0], 4)
    module = LLM(reciting_pair()[0])
    assert module.checkpoint is None
    with pytest.raises(DataError, match="given as a module"):
        run(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_asks_nothing(llm, tmp_path):
    with pytest.raises(
        DataError, match=r"the last 2\d\d user turns were of no use .*cut 2\d\d.*; raise max_user_tokens"
    ):
        run(llm, tmp_path / "out", max_user_tokens=2)


# resuming


@pytest.mark.parametrize("calls_before", [1, 3, 5])
def test_a_killed_run_ends_as_one_that_was_not(llm, whole, tmp_path, monkeypatch, calls_before):
    out, generate, calls = tmp_path / "out", llm.generate, []

    def interrupted(*args, **kwargs):
        if len(calls) == calls_before:
            raise KeyboardInterrupt
        calls.append(args)
        return generate(*args, **kwargs)

    monkeypatch.setattr(llm, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llm, out)
    monkeypatch.undo()
    assert (out / MANIFEST).exists() and len(list(out.glob("shard-*"))) < 3
    run(llm, out)
    assert contents(out) == contents(whole)


def test_killed_while_writing(llm, whole, tmp_path):
    """A half temporary file, and a shard that was renamed but is not yet in the manifest."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    manifest = json.loads((out / MANIFEST).read_bytes())
    full = contents(whole)
    manifest["shards"] = manifest["shards"][:1]
    (out / MANIFEST).write_text(json.dumps(manifest))
    (out / "shard-00002.jsonl.gz").unlink()
    (out / ".shard-00002.jsonl.gz.tmp").write_bytes(full["shard-00002.jsonl.gz"][:20])
    run(llm, out)
    assert contents(out) == full


def test_nothing_is_generated_twice(llm, whole, tmp_path, monkeypatch):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    monkeypatch.setattr(llm, "generate", None)
    assert run(llm, out) == json.loads((whole / MANIFEST).read_bytes())


def test_a_run_goes_on_to_more_documents(llm, whole, tmp_path):
    assert run(llm, tmp_path, documents=6)["documents"] == 6
    assert run(llm, tmp_path)["documents"] == 10
    assert lines_of(tmp_path) == lines_of(whole)


def test_a_missing_shard_is_made_again_and_a_damaged_one_refused(llm, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    shard = out / "shard-00001.jsonl.gz"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00001.jsonl.gz is not what manifest.json says; remove it"):
        run(llm, out)
    shard.unlink()
    run(llm, out)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(seed=6), "settings.seed = 5, not 6"),
        (dict(temperatures=(0.0,)), "settings.temperatures.1 = 0.7, not None"),
        (dict(max_answer_tokens=41), "settings.max_answer_tokens = 40, not 41"),
        (dict(head=None), "head = 'head', not None"),
        (dict(exclude=QUESTIONS[:1]), "exclude.files.0.file = None, not 'gsm8k.jsonl'"),
    ],
)
def test_other_settings_are_refused(llm, whole, changed, said):
    before = contents(whole)
    with pytest.raises(DataError) as error:
        run(llm, whole, **changed)
    assert said in str(error.value) and "another directory" in str(error.value)
    assert contents(whole) == before


def test_disk_full(llm, whole, small_disk):
    out, ballast = small_disk / "out", small_disk / "ballast"
    out.mkdir()
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - 3 * 4096))
    with pytest.raises(DataError, match=r"the disk is full; [12] complete shards are kept.*run the same command again"):
        run(llm, out)
    kept = sorted(out.glob("shard-*"))
    assert kept and all(path.read_bytes() == (whole / path.name).read_bytes() for path in kept)
    ballast.unlink()
    run(llm, out)
    assert contents(out) == contents(whole)


def test_one_writer_at_a_time(llm, tmp_path):
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is writing"):
        run(llm, tmp_path)
    os.close(lock)


# errors


def test_files_that_cannot_be_used(llm, tmp_path):
    bad = tmp_path / "bad.jsonl"
    cases = [
        (dict(prompts=bad), {"text": "x"}, 'line 1 is not {"messages"'),
        (dict(prompts=bad), {"messages": [{"role": "tool", "content": "x"}]}, "line 1 is not"),
        (dict(prompts=bad), {"messages": [{"role": "user", "content": None}]}, "line 1 is not"),
        (dict(prompts=bad), {"messages": [{"role": "system", "content": "x"}]}, "line 1 is not"),
        (dict(prompts=bad), {"turns": []}, "line 1 is not"),
        (dict(prompts=bad), {"turns": ["\ud800"]}, "line 1 is not valid Unicode"),
        (dict(texts=bad), {"turns": ["x"]}, 'line 1 is not {"text"'),
        (dict(exclude=[bad]), {"prompt": "x"}, '"turns" must be a list of texts'),
        (dict(texts=bad, prompts=bad), {}, "not both"),
        (dict(exclude=[tmp_path / "none.jsonl"]), {}, "cannot read"),
    ]
    for keywords, record, said in cases:
        write_lines(bad, record)
        with pytest.raises(DataError) as error:
            run(llm, tmp_path / "out", **keywords)
        assert said in str(error.value) and "\n" not in str(error.value)
    for keywords in (dict(prompts=bad), dict(texts=bad)):
        write_lines(bad)
        with pytest.raises(DataError, match=r"bad.jsonl is empty; give JSON lines of"):
            run(llm, tmp_path / "out", **keywords)
    assert not (tmp_path / "out").exists()


def test_directories_that_cannot_be_used(llm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make the directory"):
        run(llm, tmp_path / "file")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "shard-00000.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds shards but no manifest.json"):
        run(llm, foreign)
    (foreign / MANIFEST).write_text("{")
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        run(llm, foreign)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(documents=0), "documents must be"),
        (dict(shard_size=1.5), "shard_size must be"),
        (dict(temperatures=()), "temperatures must hold"),
        (dict(temperatures=(0.5, -1)), "temperature must be"),
        (dict(top_p=0), "top_p must be"),
        (dict(seed=-1), "seed must be"),
    ],
)
def test_settings_that_make_no_sense(changed, said):
    with pytest.raises(ValueError, match=said):
        Settings(**(SMALL | changed))


def test_script(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")  # as where it is run
    spec = importlib.util.spec_from_file_location("synthesize", ROOT / "scripts" / "synthesize.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    target, _ = map(str, checkpoints)
    out = tmp_path / "out"
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "hello"}, {"text": "word"})
    command = [target, str(out), "--documents", "2", "--batch", "4", "--max-answer-tokens", "40", "--continue"]
    assert script.main([*command, str(texts)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["documents"] == 2
    assert len(lines_of(out)) == 2
    assert script.main([*command, str(texts), "--seed", "1"]) == 1
    assert capsys.readouterr().err.endswith(
        f"error: {out} was made with settings.seed = 0, not 1; use the same settings or another directory\n"
    )
