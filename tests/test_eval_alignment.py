"""``scripts/eval_alignment.py``: training and decoding look at the same drafts, and a shift between them is seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizer
from reciter import reciting_pair

from jeagle.checkpoint_writer import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import eval_alignment


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The reciting pair, with noise on the head's way in, so that some drafts are right and some are not."""
    directory = tmp_path_factory.mktemp("alignment")
    target, head = reciting_pair()
    kernel = head.fc.kernel[...]
    head.fc.kernel.set_value(kernel + 0.3 * np.random.default_rng(0).standard_normal(kernel.shape, np.float32))
    prompts = directory / "questions.jsonl"
    prompts.write_text("\n".join(json.dumps({"turns": [text]}) for text in ("ab", "the world", "hello")) + "\n")
    return {
        "target": str(save(target, directory / "target", extra_files=tiny_tokenizer.tokenizer_files())),
        "head": str(save(head, directory / "head")),
        "prompts": str(prompts),
    }


@pytest.fixture
def run(files, monkeypatch, tmp_path, capsys):
    def run() -> tuple[int, dict, str]:
        out = tmp_path / "result.json"
        arguments = [files["target"], files["head"], "--prompts", files["prompts"], "--every", "1"]
        arguments += ["--max-tokens", "24", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["eval_alignment.py", *arguments])
        code = eval_alignment.main()
        return code, json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_training_and_decoding_agree(run):
    code, found, said = run()
    assert (code, found["positions_that_differ"], found["answers"]) == (0, 0, 3)
    assert found["positions"] > 20 and 0.1 < found["agreement_in_training"] == found["agreement_in_decoding"] < 0.9
    assert f"{found['positions']} positions" in said and "differ at 0 positions" in said


def test_another_alignment_is_noticed(run, monkeypatch):
    """Training would count every draft as right."""
    unrolled = eval_alignment.unrolled
    monkeypatch.setattr(eval_alignment, "unrolled", lambda *given: jnp.ones_like(unrolled(*given)))
    code, found, _ = run()
    assert code == 1 and found["agreement_in_training"] == 1 > found["agreement_in_decoding"]
