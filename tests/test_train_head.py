"""scripts/train_head.py from a recipe to a head that generates, and every way a recipe can disagree with its files."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizer
from helpers import tiny_llama
from reciter import TEXT, reciting_pair
from test_training import LENGTH, documents, recipe

from jeagle import LLM, SamplingParams
from jeagle.checkpoint import load_config, load_eagle
from jeagle.checkpoint_writer import save
from jeagle.config import EagleConfig
from jeagle.placement import variables
from jeagle.training.initial import new_head, with_more_tokens, with_wider_mlp
from jeagle.training.packing import Rows, pack
from jeagle.training.step import Trainable
from jeagle.training.unroll import learn, num_learnt, teach

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

RECIPE = """
target = "{target}"
[head]
kind = "{kind}"
start = "{start}"
draft_vocab_size = {draft}
{form}
tap_norm = "each"
norm_output = true
[data]
files = ["{data}"]
pack_length = 64
held_out = {held}
{long}
[objective]
depth = 2
[optimizer]
learning_rate = 5e-3
[run]
steps = {steps}
rows = {rows}
save_every = 2
evaluate_every = 2
save_dtype = "float32"
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("train")
    target, _ = reciting_pair()
    conversation = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": TEXT}]
    # Of these the 10th and the 12th are held out.
    lines: list[dict] = [{"messages": conversation, "temperature": 0.7 * (i == 10)} for i in range(14)]
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines += [{"messages": short + conversation, "finish": "length"}, {"text": TEXT}]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "target": save(target, directory / "target", extra_files=tiny_tokenizer.tokenizer_files()),
        "data": data,
    }


@pytest.fixture
def call(files, tmp_path, monkeypatch, capsys):
    """(exit code, what was printed) of a script given the recipe, which ``changes`` fill, and further arguments."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])

    def run(name: str, *arguments: object, **changes) -> tuple[int, str]:
        recipe = tmp_path / "recipe.toml"
        defaults = {"start": "target", "draft": 120, "steps": 4, "long": "", "kind": "eagle3", "form": ""}
        defaults |= {"held": 2, "rows": 2}
        recipe.write_text(RECIPE.format(**defaults | files | changes))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(recipe), *map(str, arguments)])
        code = importlib.import_module(name).main()
        captured = capsys.readouterr()
        return code, " ".join((captured.out + captured.err).split())

    return run


@pytest.fixture
def train(call, tmp_path):
    """train_head.py into tmp_path/run."""
    return lambda *arguments, **changes: call("train_head", tmp_path / "run", *arguments, **changes)


def test_from_recipe_to_text(train, files, tmp_path):
    code, said = train("--until", "2")
    assert "answers cut or left out, as the chat template writes them otherwise in later turns: 1; 1 of: cpu" in said
    assert code == 0 and not (tmp_path / "run" / "head").exists()
    code, said = train()
    assert code == 0 and "going on after step 2" in said and "held out: match" in said
    assert "answers at temperature 0: match" in said and "answers at temperature 0.7: match" in said
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert (run / "curves.png").stat().st_size > 10_000
    llm = LLM(files["target"], run / "head", tree="chain-2")
    (out,) = llm.generate(["Hello"], SamplingParams(max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert out.metrics.num_emitted == 12

    # Once more, there is nothing to do; a longer run has another head.
    trees = run / "head" / "trees.json"
    trees.write_text("{}")
    code, said = train()
    assert code == 0 and "the head is in" in said and trees.exists()
    assert train(steps=5)[0] == 0 and not trees.exists()
    shutil.copytree(run / "head", tmp_path / "shorter")
    assert train(steps=6)[0] == 0
    shutil.rmtree(run / "head")
    (tmp_path / "shorter").rename(run / "head")  # as a kill between the last step and its export leaves it
    assert train(steps=6)[0] == 0
    assert json.loads((run / "head" / "source.json").read_text())["steps"] == 6

    # On from the finished head, in another directory: its form is the head's own.
    (tmp_path / "run").rename(tmp_path / "first")
    code, _ = train(start=tmp_path / "first" / "head", steps=2)
    assert code == 0
    assert load_config(tmp_path / "run" / "head") == load_config(tmp_path / "first" / "head")


def test_on_with_a_larger_draft_vocabulary():
    """What the head knows of its own ids stays; new rows are an affine map of the target's, as the trained ones are."""
    target = tiny_llama(vocab_size=512)
    config = EagleConfig.for_target(target.config, "eagle3", draft_vocab_size=300)
    known = np.sort(np.random.default_rng(0).choice(config.vocab_size, 300, replace=False)).astype(np.int32)
    head = new_head(config, target, jnp.asarray(known), seed=0, sample=None)
    turned = np.random.default_rng(1).normal(size=(config.width + 1, config.width)).astype(np.float32)
    rows_VD = np.asarray(target.embed[...] if target.lm_head is None else target.lm_head[...].T)
    all_VD = np.concatenate([rows_VD, np.ones_like(rows_VD[:, :1])], axis=1) @ turned
    head.lm_head.set_value(jnp.asarray(all_VD[known].T))
    ids = np.union1d(known, np.arange(0, config.vocab_size, 3)).astype(np.int32)
    wider = with_more_tokens(head, target, ids)
    assert wider.config == dataclasses.replace(config, draft_vocab_size=len(ids))
    np.testing.assert_array_equal(wider.draft_to_target[...], ids)
    np.testing.assert_array_equal(wider.lm_head[...][:, np.isin(ids, known)], head.lm_head[...])
    np.testing.assert_allclose(wider.lm_head[...].T, all_VD[ids], rtol=1e-2, atol=1e-3)
    same = variables(head)
    for path, variable in variables(wider).items():
        if path not in ("lm_head", "draft_to_target"):
            np.testing.assert_array_equal(variable[...], same[path][...], err_msg=path)


def test_a_recipe_with_a_larger_draft_vocabulary(train, tmp_path):
    assert train(steps=1)[0] == 0
    (tmp_path / "run").rename(tmp_path / "first")
    head = tmp_path / "first" / "head"
    code, said = train(start=head, draft=119)
    assert code == 1 and "head.draft_vocab_size is 119, but" in said and "has 120; give as many to" in said
    code, said = train(start=head, draft=140, steps=1, form="mlp_width = 80")
    assert code == 0 and "draft vocabulary 140" in said
    larger = dict(draft_vocab_size=140, mlp_width=80)
    assert load_config(tmp_path / "run" / "head") == dataclasses.replace(load_config(head), **larger)


def test_on_with_a_wider_mlp(tmp_path):
    """It puts out what it did, also where it was stored in FP8; what is new is learnt."""
    target = tiny_llama()
    config = EagleConfig.for_target(target.config, "eagle3", num_layers=2, mlp_bias=True, draft_vocab_size=60)
    stored = save(new_head(config, target, jnp.arange(60), seed=0, sample=None), tmp_path / "head", dtype="fp8")
    head = load_eagle(stored, dtype="float32")
    wider = with_wider_mlp(head, 90, seed=1)
    assert wider.config == dataclasses.replace(config, mlp_width=90)
    for before, after in zip(head.blocks, wider.blocks, strict=True):
        np.testing.assert_array_equal(after.gate_up.kernel[..., :64], before.gate_up.kernel[...])
        np.testing.assert_array_equal(after.down.kernel[:64], before.down.kernel[...])
        np.testing.assert_array_equal(after.down.bias[...], before.down.bias[...])
        assert np.std(after.gate_up.kernel[..., 64:]) == pytest.approx(0.02, rel=0.1)
    rows = Rows(*map(jnp.asarray, pack(documents(4), LENGTH)))
    teacher, count_K = teach(target, head, rows), num_learnt(rows, 2)
    objective = recipe().objective.objective()

    def loss_of(head):
        parts, params = Trainable.split(target, head)

        def loss(params):
            return learn(parts.head(params, parts.head_tables, jnp.float32), target, rows, teacher, count_K, objective)

        return jax.value_and_grad(lambda params: loss(params)[0]), params

    (of_head, params), (of_wider, wide_params) = loss_of(head), loss_of(wider)
    value, gradient = of_wider(wide_params)
    np.testing.assert_allclose(value, of_head(params)[0], rtol=1e-6)
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, wide_params, gradient)
    _, second = of_wider(moved)
    for i in range(2):
        assert (gradient["blocks"][i]["down"]["kernel"][64:] != 0).any(axis=1).all()
        assert (second["blocks"][i]["gate_up"]["kernel"][..., 64:] != 0).any(axis=0).all()


def test_a_run_notices_that_its_start_has_other_draft_ids(train, tmp_path):
    """As its checkpoints hold the weights alone."""
    assert train(steps=1)[0] == 0
    (tmp_path / "run").rename(tmp_path / "first")
    start = tmp_path / "first" / "head"
    assert train("--until", "1", start=start)[0] == 0
    head = load_eagle(start)
    ids = np.array(head.draft_to_target[...])
    spare = np.setdiff1d(np.arange(head.config.vocab_size), ids)
    head.draft_to_target.set_value(jnp.asarray(np.sort(np.append(ids[1:], spare[0])), jnp.int32))
    shutil.rmtree(start)
    save(head, start)
    code, said = train(start=start)
    assert code == 1 and f"run with another draft_vocabulary, as {start} has changed since it began; train into" in said


def test_a_run_notices_that_its_target_has_other_weights(train, files, tmp_path):
    target = Path(shutil.copytree(files["target"], tmp_path / "target"))
    assert train("--until", "1", target=target)[0] == 0
    about = json.loads((target / "source.json").read_text())
    (target / "source.json").write_text(json.dumps({**about, "sha256": {"model.safetensors": "0" * 64}}))
    code, said = train(target=target)
    assert code == 1 and f"run with another target, as {target} has changed since it began; train into" in said


def test_a_recipe_states_the_form_of_the_head_it_goes_on_from(train, tmp_path):
    """What it leaves out is as that head has it; what it states must be."""
    assert train(steps=1, form="num_layers = 2\ntaps = [0, 1]")[0] == 0
    (tmp_path / "run").rename(tmp_path / "first")
    head = tmp_path / "first" / "head"
    for form, sentence in (
        ("num_layers = 1", f"head.num_layers is 1, but {head} has 2; leave the field out to go on from that head"),
        ("taps = [1, 2]", f"head.taps is (1, 2), but {head} has (0, 1); leave the field out"),
        ("norm_before_residual = true", "head.norm_before_residual is True, but"),
        ("mlp_width = 63", f"has {load_config(head).mlp_width}; give as many or more, or leave the field out"),
    ):
        code, said = train(start=head, form=form)
        assert code == 1 and f"error: {tmp_path / 'recipe.toml'}: head." in said and sentence in said, said
    code, said = train(start=head, kind="meta")
    assert code == 1 and f"head.kind is 'meta', but {head} has 'eagle3'; state that to go on from that head" in said
    assert train(start=head, steps=1, form="num_layers = 2\nnorm_before_residual = false")[0] == 0
    assert load_config(tmp_path / "run" / "head") == load_config(head)


def test_what_does_not_fit_together_is_said(train, files, tmp_path):
    other_words = tiny_tokenizer.tokenizer_files()
    swapped = json.loads(other_words["tokenizer.json"])
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other_words["tokenizer.json"] = json.dumps(swapped).encode()
    assert train(steps=1)[0] == 0
    head = tmp_path / "run" / "head"
    (tmp_path / "run").rename(tmp_path / "first")
    head = tmp_path / "first" / "head"
    vocab = dict(vocab_size=tiny_tokenizer.VOCAB_SIZE)
    wide = save(tiny_llama(width=48, **vocab), tmp_path / "wide", extra_files=tiny_tokenizer.tokenizer_files())
    short = save(tiny_llama(vocab_size=97), tmp_path / "short", extra_files=tiny_tokenizer.tokenizer_files())
    words = save(tiny_llama(**vocab), tmp_path / "words", extra_files=other_words)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [')
    for changes, sentence in (
        (dict(target=wide, start=head), "the draft head was made for a target of width"),
        (dict(target=words, start=head), "was trained with another tokenizer than that of"),
        (dict(target=short), "has token ids outside the target's 0..96"),
        (dict(data=empty), f"there is nothing to learn from in {empty}"),
        (dict(data=wrong), f"{wrong}, line 1: no message has the role 'assistant'; remove the line or mend it"),
        (dict(data=broken), f"{broken} is not JSON lines"),
        (dict(data=tmp_path / "none.jsonl"), "(No such file or directory); check the path"),
        (dict(long="held_out_rows = 3"), "data.held_out_rows is not a field"),
    ):
        code, said = train(**changes)
        assert code == 1 and sentence in said, said
        assert not (tmp_path / "run" / "head").exists()


def test_variants_side_by_side(call, tmp_path):
    out = tmp_path / "compared.json"
    variants = ("head.taps = [0, 1]", "head.taps = [1, 2]\nobjective.loss = 'lk'")
    code, said = call("compare_heads", *variants, "--updates", "3", "--out", out)
    assert code == 0 and "tau, greedy" in said
    results = json.loads(out.read_text())["results"]
    assert [r["variant"] for r in results] == list(variants)
    assert results[0]["loss_by_depth"] != results[1]["loss_by_depth"]
    for wrong, sentence in (
        ("run.steps = 3", "changes run; it may change head, objective, optimizer"),
        ("head.tops = [0]", "head.tops is not a field"),
        ("head.taps = ", "is not TOML"),
        ("head.kind = 'meta'", "variant \"head.kind = 'meta'\": head.kind is 'meta', but all variants are taught with"),
    ):
        code, said = call("compare_heads", wrong)
        assert code == 1 and sentence in said


def test_every_field_of_the_objective_counts(call, tmp_path):
    out = tmp_path / "compared.json"
    changes = ("decay = 0.8", "feature_noise = 2.0", "top_k = 2", "top_k = 120")  # 120: all draft ids, as without
    variants = [f"objective.{change}" for change in changes]
    assert call("compare_heads", *variants, "--updates", "3", "--out", out)[0] == 0
    plain, noisy, two, every = (r["loss_by_depth"] for r in json.loads(out.read_text())["results"])
    np.testing.assert_allclose(every, plain, rtol=1e-4)
    for other in (noisy, two):
        assert np.abs(np.subtract(other, plain)).max() > 1e-2 * max(plain)


def test_variants_are_measured_on_fewer_rows_than_an_update_has(call, tmp_path):
    """Padding counts for nothing."""
    out, found = tmp_path / "compared.json", []
    still = "optimizer.learning_rate = 1e-30"
    for rows in (2, 32):
        code, said = call("compare_heads", still, "--updates", "1", "--out", out, rows=rows)
        assert code == 0, said
        found.append(json.loads(out.read_text())["results"][0])
    few, many = found
    np.testing.assert_allclose(few["loss_by_depth"], many["loss_by_depth"], rtol=1e-5)
    assert few["tau_greedy"] == pytest.approx(many["tau_greedy"])
    for arguments, changes, said in (
        ((), dict(held=0), "data.held_out is 0 in"),
        (("--measured-rows", "0"), {}, "--measured-rows 0; there must be 1 or more of both"),
    ):
        code, printed = call("compare_heads", still, *arguments, **changes)
        assert code == 1 and said in printed


def test_variants_begin_with_the_head_that_training_begins_with(call, train, tmp_path):
    assert train(steps=6, form="taps = [0, 1]")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    start, still = tmp_path / "run" / "head", "optimizer.learning_rate = 1e-30"
    out, variants = tmp_path / "compared.json", (still, f"{still}\nhead.mlp_width = 200")
    code, _ = call("compare_heads", *variants, "--updates", "1", "--out", out, start=start)
    assert code == 0
    for result in json.loads(out.read_text())["results"]:
        np.testing.assert_allclose(result["loss_by_depth"], lines[-1]["held_out"]["loss_by_depth"], rtol=1e-5)
    code, said = call("compare_heads", "head.taps = [1, 2]", start=start)
    assert code == 1 and f"compare_heads: variant 'head.taps = [1, 2]': head.taps is (1, 2), but {start} has" in said
