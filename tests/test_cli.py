"""The ``jeagle`` command: what it prints, its exit codes, one sentence per error, Ctrl-C, and two processes at once."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reciter import TEXT, reciting_pair
from tiny_tokenizer import tokenizer_files

from jeagle import LLM, cli
from jeagle.checkpoint_writer import save

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "jeagle.cli"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save(reciting_pair()[0], tmp_path_factory.mktemp("cli") / "reciter", extra_files=tokenizer_files()))


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """For processes of their own: a fresh cache."""
    return {**os.environ, "JEAGLE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}


def test_help():
    done = subprocess.run([*COMMAND, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("generate", "chat", "demo", "plan")) and not done.stderr


def test_generate(checkpoint, capsys, monkeypatch):
    def run(*options):
        assert cli.main(["generate", *options, "--model", checkpoint, "--max-tokens", "40"]) == 0
        out, err = capsys.readouterr()
        assert not err
        return out

    assert run("--raw", "a") == TEXT[1:] + "\n"
    assert run("--raw", "a", "--kv-cache-dtype", "fp8") == TEXT[1:] + "\n"
    assert run("hi") == TEXT + "\n"  # the chat template ends in <|assistant|>
    assert run("--raw", "a", "--stop", "STOP", "--stop", "never") == TEXT[1 : TEXT.index("STOP")] + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    assert run("--raw", "-") == TEXT[3:] + "\n"


def test_verbose(checkpoint, caplog, request):
    request.addfinalizer(lambda: logging.getLogger("jeagle").setLevel(logging.NOTSET))
    assert cli.main(["generate", "--raw", "a", "--model", checkpoint, "--max-tokens", "4", "--verbose"]) == 0
    assert "batch 1: rounds by tree: 4 off" in caplog.text


def test_chat(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand again\n"))  # two turns, then Ctrl-D
    assert cli.main(["chat", "--model", checkpoint, "--system", "recite", "--max-tokens", "40"]) == 0
    assert capsys.readouterr() == (f"> {TEXT}\n" * 2 + "> \n", "")


def test_ctrl_c_ends_the_answer_but_not_the_chat(checkpoint, capsys, monkeypatch):
    conversations = []

    def stream(self, messages, params):
        conversations.append([m["content"] for m in messages])
        if len(conversations) == 1:
            raise KeyboardInterrupt
        yield "fine"

    monkeypatch.setattr(LLM, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\n\n"))  # an empty line ends it, too
    assert cli.main(["chat", "--model", checkpoint]) == 0
    assert conversations == [["one"], ["two"], ["two", "fine", "three"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/where/at/all"], "no/where/at/all does not exist"),
        (["--temperature", "-1"], "temperature must be 0 (greedy) or a positive number, got -1.0"),
        (["--stop", ""], "stop must be non-empty strings"),
        (["--tree", "oak"], "tree 'oak' is unknown"),
        (["--max-model-len", "9999"], "max_model_len must lie in 1..256"),
        (["--max-tokens", "300"], "together they exceed the limit of 256"),
    ],
)
def test_errors_are_one_sentence(checkpoint, capsys, options, message):
    assert cli.main(["generate", "a", "--model", checkpoint, *options]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and not out


def test_the_default_model_may_be_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a"]) == 1
    assert "`jeagle demo` fetches it" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["sing"], ["generate"], ["generate", "a", "--dtype", "int4"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage: jeagle" in capsys.readouterr().err


def test_two_processes_at_once_and_a_third_that_is_cut_off(checkpoint, environment, tmp_path):
    """Both fill the empty cache of compiled programs. The third only reads it, and its own reader goes away early."""
    command = [*COMMAND, "generate", "--raw", "a", "--model", checkpoint, "--max-tokens", "40"]
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # else a fast machine keeps nothing
    pipes = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for process in [subprocess.Popen(command, **pipes) for _ in range(2)]:
        assert process.communicate(timeout=300) == (TEXT[1:] + "\n", "")
        assert process.returncode == 0

    def compiled():
        return {p.name for p in (tmp_path / "cache" / "xla").iterdir() if p.name.endswith("-cache")}

    before = compiled()
    assert before
    third = subprocess.Popen(command, **pipes)
    assert third.stdout.read(1) == "b"
    third.stdout.close()
    assert third.stderr.read() == ""
    third.stderr.close()
    assert third.wait(timeout=300) == 0
    assert compiled() == before


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="begun in the background, where shells ignore Ctrl-C"
)
def test_ctrl_c_during_a_real_answer(smollm2_dir, environment):
    environment["JEAGLE_CACHE"] = os.environ["JEAGLE_CACHE"]  # compiling the real model takes a while
    options = ["generate", "Count to one thousand, in words.", "--model", str(smollm2_dir), "--max-tokens", "4000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([*COMMAND, *options], cwd=ROOT, env=environment, **pipes) as process:
        begun = process.stdout.read(8)
        since = time.monotonic()
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:  # Python ignores one that falls into a destructor, and says so
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=300)
    assert begun.strip() and time.monotonic() - since < 60
    assert process.returncode == 130
    assert err.decode().endswith("\ninterrupted\n"), out
