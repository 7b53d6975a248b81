"""``scripts/report.py``: README.md says what the committed results give, and a change of either is noticed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import report

HALF = dict(min=0.4, quartile_1=0.45, median=0.5, quartile_3=0.55, max=0.6)
ABOUT = dict(model="dir/m", dtype="float32", device="cpu", jax="1", command="python scripts/x.py m --out o.json --a 1")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        code = report.main()
        printed, errors = capsys.readouterr()
        assert printed == ""
        return code, errors

    return run


def test_the_readme_says_what_the_results_give(run):
    assert run("--check") == (0, "")


def test_a_changed_number_is_noticed_and_mended(run, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    where = ["--readme", str(readme), "--results", str(results)]
    readme.write_text("no numbers")
    assert run("--check", *where)[0] == 1
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    phases = {name: dict(HALF) for name in ("import", "run")}
    start = dict(ABOUT, script="bench_start", draft="head", phases=phases, seconds=HALF)
    (results / "start.json").write_text(json.dumps(start))
    (results / "other.json").write_text(json.dumps(dict(script="no script of these")))
    code, errors = run("--check", *where)
    assert code == 1 and errors.count("\n") == 1 and "run scripts/report.py" in errors
    assert run(*where) == (0, "")
    written = readme.read_text()
    assert "| 0.5 s (import 0.5, run 0.5) |" in written and "`python scripts/x.py m --a 1`" in written
    assert written.startswith("before\n") and written.endswith("\nafter\n")
    assert run("--check", *where) == (0, "")
    (results / "start.json").write_text(json.dumps(start | dict(seconds=HALF | dict(median=0.6))))
    assert run("--check", *where)[0] == 1


def test_synthetic_and_missing_are_said():
    """Both must be read in the table itself."""
    rate = {name: 10 * value for name, value in HALF.items()}
    contenders = [
        dict(name="jeagle", status="measured", tokens_per_second=rate),
        dict(name="jeagle, speculative", status="measured", tokens_per_second=rate),
        dict(name="vllm", status="not installed: vllm"),
        dict(name="transformers", status="measured", tokens_per_second=rate, jeagle_over_it=HALF),
    ]
    result = dict(ABOUT, script="bench_peers", draft=None, max_tokens=8, synthetic_acceptance=[0.5, 0.5])
    said = report.section({"peers.json": result | dict(runs=[dict(batch=2, contenders=contenders)])})
    assert "| jeagle, speculative, batch 2, synthetic acceptance of 1.8 tokens per call | 5.0 tokens/s |" in said
    assert "| vllm, batch 2 | not installed: vllm |" in said
    assert "| transformers, batch 2 | 5.0 tokens/s; jeagle is 0.50x (0.45 to 0.55) as fast |" in said
    run = dict(batch=1, temperature=0.0, tree="chain-3", tokens_per_second=5.0, tokens_per_call=2.8, speedup=HALF)
    generate = dict(result, script="bench_generate", runs=[run | dict(share_of_floor=0.25)])
    said = report.section({"generate.json": generate})
    assert "chain-3, synthetic acceptance of 1.8 tokens per call | 5.0 tokens/s, 2.80" in said
