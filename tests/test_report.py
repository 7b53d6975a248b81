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
    written, everything = readme.read_text(), results / "README.md"
    assert "| 0.5 s (import 0.5, run 0.5) | [cpu](scripts/results/start.json) |" in written
    assert written.startswith("before\n") and written.endswith("\nafter\n")
    assert "| 0.5 s (import 0.5, run 0.5) |" in everything.read_text()
    assert "`python scripts/x.py m --a 1`" in everything.read_text()
    assert run("--check", *where) == (0, "")
    everything.unlink()
    assert run("--check", *where)[0] == 1
    assert run(*where) == (0, "")
    (results / "start.json").write_text(json.dumps(start | dict(seconds=HALF | dict(median=0.6))))
    assert run("--check", *where)[0] == 1


def test_parts_of_the_gpu_suite():
    def part(name: str, *rows: dict) -> dict:
        measured = [dict(status="measured", **row) for row in rows]
        return dict(script="gpu_suite", part=name, device="H100", jax="1", command="python scripts/x.py", rows=measured)

    plain = dict(shape="1B", what="plain step", T=1, weight_floor_s=1e-3)
    steps = part(
        "steps",
        plain | dict(length=1024, seconds=2e-3),
        plain | dict(length=8192, seconds=4e-3),
        dict(shape="1B", what="verify step", T=32, length=1024, seconds=3e-3),
    )
    problem = dict(B=1, T=1, length=8, bytes=100)
    attention = part(
        "attention",
        dict(what="copy bandwidth", bytes_per_second=1e9),
        problem | dict(implementation="cuDNN", seconds=1e-6),
    )
    check = part("check", dict(operation="choose", implementation="xla", case="greedy", ok=True))
    check["rows"].append(dict(check["rows"][0], status="error", why="a reason", implementation="other"))
    results = {"s.json": steps, "a.json": attention, "c.json": check, "splits.json": part("splits", problem)}
    said = report.section(results)
    for line in (
        "| 1B shape, plain step, context 1,024 / 8,192 | 2.00 / 4.00 ms, of which reading the weights once at the copy "
        "bandwidth would take 50% / 25% |",
        "| 1B shape, verify step of 32 nodes, context 1,024 | 3.00 ms, 1.50 of a plain step |",
        "| attention of an 8B layer, batch 1, 1 new, 8 cached (of copy bandwidth) | cuDNN (no mask) 1.0 us (10%) |",
        "| choose by `xla` against float64 | 1 of 1 cases right |",
        "| choose by `other` against float64 | not run: a reason |",
    ):
        assert line in said
    assert "splits" not in said


def test_synthetic_missing_and_trees_are_said():
    """All must be read in the table itself: what was forced beside every number that it enters, also as a ratio."""
    rate = {name: 10 * value for name, value in HALF.items()}
    contenders = [
        dict(name="jeagle", status="measured", tokens_per_second=rate),
        dict(name="jeagle, speculative", status="measured", tokens_per_second=rate),
        dict(name="vllm", status="not installed: vllm"),
        dict(name="transformers", status="measured", tokens_per_second=rate, jeagle_over_it=HALF),
    ]
    contenders[-1]["speculative_over_it"] = {name: 4 * value for name, value in HALF.items()}
    result = dict(ABOUT, script="bench_peers", draft=None, max_tokens=8, synthetic_acceptance=[0.5, 0.5])
    said = report.section({"peers.json": result | dict(runs=[dict(batch=2, contenders=contenders)])})
    assert "| jeagle, speculative, batch 2, synthetic acceptance of 1.8 tokens per call | 5.0 tokens/s |" in said
    assert "| vllm, batch 2 | not installed: vllm |" in said
    assert (
        "| transformers, batch 2 | 5.0 tokens/s; jeagle is 0.50x (0.45 to 0.55) as fast, "
        "speculative 2.00x (1.80 to 2.20), synthetic acceptance of 1.8 tokens per call |"
    ) in said
    contenders[0] |= dict(tokens_per_call=1.0, rounds_by_tree={"off": 20})
    contenders[1] |= dict(tokens_per_call=2.48, rounds_by_tree={"chain-3": 50, "off": 45, "[[0],[1]]": 5})
    measured = result | dict(synthetic_acceptance=None, runs=[dict(batch=2, contenders=contenders)])
    said = report.section({"peers.json": measured})
    assert "| jeagle, batch 2 | 5.0 tokens/s, decoding plainly |" in said
    assert "| jeagle, speculative, batch 2 | 5.0 tokens/s, 2.48 tokens per call, `chain-3`, `off` |" in said
    assert "speculative 2.00x (1.80 to 2.20) |" in said
    run = dict(batch=1, temperature=0.0, tree="chain-3", tokens_per_second=5.0, tokens_per_call=2.8, speedup=HALF)
    generate = dict(result, script="bench_generate", runs=[run | dict(share_of_floor=0.25)])
    said = report.section({"generate.json": generate})
    assert "chain-3, synthetic acceptance of 1.8 tokens per call | 5.0 tokens/s, 2.80" in said


def test_the_headlines_show_long_answers_in_rounds_too():
    """Tokens/s depend on what a text repeats of itself; rounds/s say what length costs."""
    name = "bench_steady_cpu_smollm2.json"
    said = report.headlines({name: json.loads((report.RESULTS / name).read_text())})
    assert "| plain: tokens/s of 4096 tokens" in said and "| speculative: rounds/s of 4096 tokens" in said
