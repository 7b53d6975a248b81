"""``jeagle plan``: sizes by name, configs that are found, the command and its one sentence per error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jeagle import cli, compile_only
from jeagle.config import ConfigError
from jeagle.devices import DEVICES
from jeagle.floor import Job
from jeagle.footprint import FORMATS, Split
from jeagle.plan import make_plan
from jeagle.sizes import DRAFTS, SIZES, draft_of, find_config, head_for, size
from jeagle.tree import parse_tree

ROOT = Path(__file__).resolve().parent.parent


def test_sizes():
    counted = {name: round(config.num_parameters / 1e9, 2) for name, config in SIZES.items()}
    assert counted == {
        "smollm2-135m": 0.13,
        "llama-3.1-8b": 8.03,
        "llama-3.1-70b": 70.55,
        "llama-3.1-405b": 405.85,
        "llama-3.2-1b": 1.24,
        "llama-3.2-3b": 3.21,
        "llama-3.3-70b": 70.55,
        "llama-4-scout": 107.77,
        "llama-4-maverick": 400.71,
    }
    for config in SIZES.values():
        assert type(config).from_json(config.to_json()) == config
        for kind in DRAFTS:
            assert head_for(config, kind)[0].target_width == config.width
    with pytest.raises(ConfigError, match="no model is named 'llama-5'; named are smollm2-135m"):
        size("llama-5")


def test_configs_are_found(tmp_path):
    config = SIZES["llama-3.2-1b"]
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(config.to_json()))
    (ours / "source.json").write_text(json.dumps(dict(format_version=1, family="llama", dtype="float32", source={})))
    assert find_config(ours) == find_config(ours / "config.json") == config

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    foreign = dict(
        architectures=["LlamaForCausalLM"],
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    )
    (theirs / "config.json").write_text(json.dumps(foreign))
    assert find_config(theirs) == config
    with pytest.raises(ConfigError, match="neither a directory with"):
        find_config(tmp_path)


def test_heads_are_found(tmp_path):
    target = SIZES["llama-3.2-1b"]
    head = head_for(target, "eagle3")[0]
    (tmp_path / "config.json").write_text(json.dumps(head.to_json()))
    (tmp_path / "source.json").write_text(
        json.dumps(dict(format_version=1, family="eagle", dtype="float32", source={}))
    )
    assert draft_of(str(tmp_path), target)[0] == head
    with pytest.raises(ConfigError, match="was made for a target of width 2048"):
        draft_of(str(tmp_path), SIZES["llama-3.1-8b"])
    with pytest.raises(ConfigError, match="neither eagle1, eagle3, meta or off, nor a converted head's directory"):
        draft_of("eagle4", target)


# The command.

MAVERICK = "plan --model llama-4-maverick --devices 8 --dtype fp8 --tokens-per-call 2.8".split()


def test_command(capsys, tmp_path):
    picture, figures = tmp_path / "plan.png", tmp_path / "plan.json"
    options = ["--gpu", "H100", "--tree", "chain-3", "--picture", str(picture), "--json", str(figures)]
    assert cli.main([*MAVERICK, *options]) == 0
    out, err = capsys.readouterr()
    assert not err and all(len(line) <= 100 for line in out.splitlines() if not line.startswith("- "))
    for said in (
        "llama-4-maverick, fp8, 8 x H100 (1 data x 8 tensor), batch 1, context 8,192, caches bfloat16",
        "verify 4",
        "x the weights' floor",
        "tensor is taken",
        "Meta (arXiv:2508.08192) reports 1.4 to 2x at large batches; this plan is",
        "assumed head: eagle3: one block, MLP 32,768 wide",
    ):
        assert said in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    plan = json.loads(figures.read_text())
    target = size("llama-4-maverick")
    expected = make_plan(
        Job(
            name="llama-4-maverick",
            target=target,
            head=head_for(target, "eagle3")[0],
            device=DEVICES["h100"],
            split=Split(tensor=8),
            format=FORMATS["fp8"],
            context=8192,
            tree=parse_tree("chain-3"),
            tokens_per_call=2.8,
        )
    )
    assert plan["speed_up"] == pytest.approx(expected.speed_up)
    assert plan["memory"]["total"] == expected.memory.total
    assert [row["batch"] for row in plan["by_batch"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_command_without_a_head(capsys, tmp_path):
    picture = tmp_path / "plain.png"
    options = f"--draft off --efficiency 0.7 --picture {picture}"
    assert cli.main([*"plan --model llama-3.1-8b --devices 1".split(), *options.split()]) == 0
    assert picture.exists()
    out = capsys.readouterr().out
    assert (
        "head: off" in out
        and "x of plain" not in out
        and "SGLang, plain" in out
        and "EAGLE-3" not in out
        and "at 70% of the peaks" in out
    )


def test_command_starts_without_jax():
    """Only a tree's name needs it."""
    code = "import sys; from jeagle import cli; cli.main(sys.argv[1:]); assert 'jax' not in sys.modules"
    command = [sys.executable, "-c", code, *"plan --model llama-3.1-8b --devices 1 --draft off".split()]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model", "--model is missing"),
        ("--devices", "--devices is missing: say how many GPUs there are to be"),
        ("--tokens-per-call", "--tokens-per-call is missing"),
        ("--devices 0", "--devices must be at least 1, got 0"),
        ("--devices 3", "a tensor axis of 3 devices does not divide the 40 query heads"),
        ("--data-parallel 3", "--data-parallel must divide the 8 devices, got 3"),
        ("--gpu tpu", "--gpu 'tpu' is unknown; use a100, h100, h200, b200"),
        ("--model llama-9", "llama-9 is neither a directory with a config.json nor a shape's name"),
        ("--dtype fp8,bf16", "dtype 'fp8,bf16' mixes several; a model has one"),
        ("--dtype bf16", "what fits: weights in fp8"),
        ("--kv-cache-dtype int4", "dtype 'int4' is unknown"),
        ("--draft eagle9", "draft 'eagle9' is neither eagle1, eagle3, meta or off"),
        ("--tree oak", "tree 'oak' is unknown"),
        ("--picture plan.nothing", "cannot write plan.nothing"),
        ("--picture no/plan.png", "no/plan.png cannot be written: no is no directory"),
    ],
)
def test_command_says_what_is_wrong(options, message, capsys, monkeypatch, tmp_path):
    """An option alone is left out."""
    monkeypatch.chdir(tmp_path)
    words = [*MAVERICK]
    name, *value = options.split()
    if not value:
        del words[words.index(name) : words.index(name) + 2]
    assert cli.main([*words, *([name, *value] if value else [])]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_an_extra_that_is_missing(module, capsys, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main([*MAVERICK, "--picture", str(tmp_path / "plan.png")]) == 1
    assert f"error: {module} is not installed; run: pip install 'jeagle[plan]'\n" == capsys.readouterr().err


def test_a_rounds_kernels_are_those_of_all_branches():
    """Which one a round takes, the compiled text does not say."""
    text = """
%head (x: f32[]) -> f32[] {
  ROOT %dot = f32[] custom-call(%x), custom_call_target="head"
}

%lookup (x: f32[]) -> f32[] {
  ROOT %copy = f32[] copy(%x)
}

%inside (x: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %x)
}

%body (x: f32[]) -> f32[] {
  %fused = f32[] fusion(%x), kind=kLoop, calls=%inside
  ROOT %r = f32[] conditional(%p, %x, %x), branch_computations={%lookup, %head}
}

%condition (x: f32[]) -> pred[] {
  ROOT %t = pred[] constant(true)
}

ENTRY %main (x: f32[]) -> f32[] {
  ROOT %loop = f32[] while(%x), condition=%condition, body=%body
}
"""
    other = text.replace("branch_computations={%lookup, %head}", "true_computation=%lookup, false_computation=%head")
    for compiled in (text, other):
        body = compile_only._loop_body(compiled)
        assert "%body (x" in body and "%lookup (x" in body and "%head (x" in body and "%inside (x" not in body
