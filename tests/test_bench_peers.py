"""``scripts/bench_peers.py`` with workers made here, and the files that peers read: the same weights, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import tiny_tokenizer
from checkpoints import arrays
from reciter import make_head
from tiny_tokenizer import EOS, VOCAB_SIZE

from convert import convert, export_target
from jeagle import EagleConfig
from jeagle.checkpoint import load_llama
from jeagle.checkpoint_writer import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_peers

# Says 7, 7, 7 .. whatever is asked, with a head in 4 rounds; refuses to look up; "gone" is a package that is not there.
FAKE = """
import sys
sys.path.insert(0, {protocol!r})
from protocol import serve

def load(request):
    print("noise on standard output")
    if request["dtype"] == "bfloat16":
        import gone
    def generate(prompts, max_tokens, lookup):
        if lookup:
            raise ValueError("cannot look up\\nat all")
        return [[7] * max_tokens for _ in prompts], 4 if request["head"] else None
    return generate, {{"fake": "1.0", "rows": request["batch"]}}

serve(load)
"""


@pytest.fixture(scope="module")
def target():
    return helpers.tiny_llama(
        vocab_size=VOCAB_SIZE, num_layers=1, max_position=256, eos_token_ids=(EOS,), tie_embeddings=True
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory, target) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("peers")
    checkpoint = save(target, directory / "target", extra_files=tiny_tokenizer.tokenizer_files())
    head = save(make_head(EagleConfig.for_target(target.config, "meta")), directory / "head")
    (directory / "questions.jsonl").write_text("\n".join(json.dumps({"turns": [t]}) for t in ("ab", "again", "c")))
    (directory / "fake.py").write_text(FAKE.format(protocol=str(Path(bench_peers.__file__).parent / "peers")))
    paths = dict(hf=directory / "hf", gguf=directory / "all.gguf", checkpoint=checkpoint, head=head)
    export_target.write(checkpoint, paths["hf"], paths["gguf"])
    return paths | dict(prompts=directory / "questions.jsonl", fake=directory / "fake.py")


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_peers_read_the_same_weights(files, target, tmp_path, form):
    back = load_llama(convert(files[form], tmp_path / form))
    wanted, found = arrays(target), arrays(back)
    assert set(wanted) == set(found)
    for name, array in wanted.items():
        np.testing.assert_array_equal(array, found[name])
    if form == "hf":
        assert back.config == target.config and (files["hf"] / "tokenizer.json").exists()


def run(files, monkeypatch, capsys, *options: str) -> dict:
    arguments = [str(files["hf"]), "--draft", str(files["head"]), "--tree", "chain-2", "--prompts"]
    arguments += [str(files["prompts"]), "--max-tokens", "6", "--repeats", "2", *options]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *arguments])
    monkeypatch.setattr(bench_peers, "PAUSE", 0)
    assert bench_peers.main() == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_turns_ratios_and_what_is_missing(files, monkeypatch, capsys):
    """A fake transformers takes part, its lookup fails, vLLM is not installed; the table and the JSON say so."""
    monkeypatch.setitem(bench_peers.PEERS, "transformers", str(files["fake"]))
    options = ("--peers", "transformers", "vllm")
    result = run(files, monkeypatch, capsys, *options)
    assert result["peer_versions"] == {"transformers": {"fake": "1.0", "rows": 1}}
    assert [r["batch"] for r in result["runs"]] == [1]
    for one in result["runs"]:
        rows = {row["name"]: row for row in one["contenders"]}
        assert list(rows) == ["jeagle", "jeagle, speculative", "transformers", bench_peers.LOOKUP, "vllm"]
        assert rows["vllm"]["status"] == "not installed: vllm"
        assert rows[bench_peers.LOOKUP]["status"] == "failed: ValueError: cannot look up"
        assert rows["jeagle, speculative"]["equal_tokens"] == rows["jeagle"]["equal_tokens"] == 1
        assert rows["transformers"]["equal_tokens"] < 0.5
        ratio = rows["transformers"]["jeagle_over_it"]
        assert 0 < ratio["min"] <= ratio["quartile_1"] <= ratio["median"]
        assert rows["jeagle"]["jeagle_over_it"]["min"] == rows["jeagle"]["jeagle_over_it"]["max"] == 1
        # The rounds of two turns of 6 tokens; those of the warm-up are not among them.
        assert (rows["jeagle"]["rounds_by_tree"], rows["jeagle"]["tokens_per_call"]) == ({"off": 12}, 1)
        ((tree, rounds),) = rows["jeagle, speculative"]["rounds_by_tree"].items()
        assert tree == "chain-2" and rows["jeagle, speculative"]["tokens_per_call"] == 12 / rounds
        assert "rounds_by_tree" not in rows["transformers"]


def test_an_engine_that_drafts_with_the_same_head(files, monkeypatch, capsys):
    monkeypatch.setitem(bench_peers.PEERS, "vllm", str(files["fake"]))
    result = run(files, monkeypatch, capsys, "--peers", "vllm", "--vllm-head", str(files["head"]))
    rows = {row["name"]: row for row in result["runs"][0]["contenders"]}
    assert "tokens_per_call" not in rows["vllm"]
    assert rows[bench_peers.VLLM_HEAD]["tokens_per_call"] == 5 / 4  # the first of 6 tokens is the prompt's


def test_a_package_that_is_missing_and_a_process_that_dies(files, tmp_path):
    worker = bench_peers.Worker(sys.executable, files["fake"])
    with pytest.raises(bench_peers.Missing, match="not installed: gone"):
        worker.ask(do="load", model="", gguf=None, dtype="bfloat16", threads=1, positions=8, batch=1)
    worker.close()
    dead = tmp_path / "dead.py"
    dead.write_text("raise SystemExit(3)")
    worker = bench_peers.Worker(sys.executable, dead)
    with pytest.raises(bench_peers.Missing, match="failed: the process ended with exit code 3"):
        worker.ask(do="load")
    worker.close()


def test_who_takes_one_prompt_at_a_time_says_so():
    contender = bench_peers.Contender("one", lambda prompts: bench_peers.Turn([[1, 2] for _ in prompts], 0.5), 1)
    for rows, status, rates in ((2, "takes 1 prompt at a time", []), (1, "measured", [4.0])):
        contender.reset(rows)
        for counts in (False, True):
            contender.take_turn([[5]] * rows, counts=counts)
        assert (contender.status, contender.rates) == (status, rates)


def test_interpreters_and_equal_tokens():
    assert bench_peers.pythons(["a", "vllm=b/c"]) == {"transformers": "a", "llama.cpp": "a", "vllm": "b/c"}
    assert bench_peers.pythons(["vllm=b"])["transformers"] == sys.executable
    assert bench_peers.equal_share([[[1, 2, 3, 4]]], [[[1, 2, 9, 4]]]) == 0.75


def test_refused(files, monkeypatch, capsys):
    for changed, message in (
        (["nowhere", "--prompts", str(files["prompts"])], "nowhere is not a directory"),
        ([str(files["hf"]), "--prompts", "x", "--vllm-head", "none"], "none is not a directory"),
        ([str(files["hf"]), "--prompts", "none.jsonl"], "none.jsonl does not exist"),
        ([str(files["hf"]), "--prompts", str(files["prompts"]), "--repeats", "0"], "must be at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench_peers.py", *changed])
        assert bench_peers.main() == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert (
        export_target.main([str(files["checkpoint"]), str(files["hf"])]) == 1
        and "already exists" in capsys.readouterr().err
    )
