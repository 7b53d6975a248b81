"""The trainer: learning, resuming bit for bit, devices and micro-batches that change nothing."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_llama

from jeagle.checkpoint import load_eagle
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.llama4_config import Llama4Config
from jeagle.training.documents import Document
from jeagle.training.initial import new_head
from jeagle.training.packing import Rows, pack
from jeagle.training.recipe import (
    DataRecipe,
    HeadRecipe,
    ObjectiveRecipe,
    OptimizerRecipe,
    Recipe,
    RecipeError,
    RunRecipe,
    load_recipe,
)
from jeagle.training.run import check_length, load_documents
from jeagle.training.trainer import Trainer, TrainingError, make_optimizer
from jeagle.training.unroll import packed_attention
from jeagle.training.vocabulary import choose_vocabulary, coverage

LENGTH = 24


def documents(number=60, seed=0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        n = int(rng.integers(4, LENGTH + 1))
        made.append(Document(rng.integers(3, 60, n).astype(np.int32), np.arange(n) >= 2))
    return made


def recipe(*, run=None, objective=None, head=None, **optimizer) -> Recipe:
    return Recipe(
        target="tiny",
        head=HeadRecipe(
            **{"kind": "eagle3", "draft_vocab_size": 60, "tap_norm": "each", "norm_output": True, **(head or {})}
        ),
        data=DataRecipe(files=("made in code",), pack_length=LENGTH),
        objective=ObjectiveRecipe(**{"depth": 2, **(objective or {})}),
        optimizer=OptimizerRecipe(**{"learning_rate": 1e-2, "warmup": 0.1, **optimizer}),
        run=RunRecipe(
            **{"steps": 6, "rows": 4, "save_every": 2, "evaluate_every": 100, "save_dtype": "float32", **(run or {})}
        ),
    )


def trainer(directory, r: Recipe, *, devices=1, **kwargs) -> Trainer:
    target = tiny_llama()
    rows = pack(documents(), LENGTH)
    ids = None
    config = r.head.config(target.config)
    if config.reduced_vocabulary:
        ids = jnp.asarray(choose_vocabulary(documents(), vocab_size=97, size=config.draft_vocab_size, always=[2]))
    head = new_head(config, target, ids, seed=0, sample=Rows(*(x[:1] for x in rows)))
    held_out = {"0": pack(documents(12, seed=1), LENGTH), "1": pack(documents(5, seed=2), LENGTH)}
    return Trainer(
        r, directory, target, head, rows, held_out, identity={"data": "d"}, devices=jax.devices()[:devices], **kwargs
    )


def losses(directory) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_head_learns_and_comes_back_as_a_checkpoint(tmp_path):
    r = recipe(run={"steps": 40, "echo": 2, "updates": 2, "rows": 2, "save_every": 40})
    t = trainer(tmp_path / "run", r)
    before = t.evaluate()
    t.train()
    after = t.evaluate()
    cold, hot = (after["by_temperature"][name]["loss_by_depth"][0] for name in ("0", "1"))
    assert min(cold, hot) < after["loss_by_depth"][0] < max(cold, hot)
    assert after["loss_by_depth"][0] < 0.8 * before["loss_by_depth"][0]
    assert after["alpha"][0] > before["alpha"][0] + 0.05
    assert after["tau_sampled"] > before["tau_sampled"]
    head = load_eagle(t.export(tmp_path / "head", source={"source": "a test"}))
    for path, value in (("fc", head.fc.kernel), ("lm_head", head.lm_head)):
        trained = t.state.params[path]["kernel"] if path == "fc" else t.state.params[path]
        np.testing.assert_array_equal(value[...], trained[...])
    assert head.config == r.head.config(tiny_llama().config)


@pytest.mark.parametrize("kind", ["eagle1", "meta"])
def test_concat_heads_learn(tmp_path, kind):
    objective = {"depth": 1, "loss": "ce", "token_weight": 0.1, "feature_weight": 1.0, "feature_noise": 0.05}
    form = {"kind": kind, "draft_vocab_size": None, "tap_norm": "none", "norm_output": None, "num_layers": 2}
    t = trainer(tmp_path / "run", recipe(run={"steps": 20}, objective=objective, head=form))
    before = t.evaluate()
    t.train()
    assert t.evaluate()["loss_by_depth"][0] < before["loss_by_depth"][0]


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, method):
    r = recipe(objective={"feature_noise": 0.1}, run={"echo": 2, "updates": 2, "rows": 2}, method=method)
    whole = trainer(tmp_path / "whole", r)
    whole.train()
    killed = trainer(tmp_path / "killed", r)
    killed.train(until=3)  # saves step 3, then runs one more that is lost
    killed._step, step = None, killed._step
    killed.state, _ = step(killed.state, killed.loader[3])
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.0}) + '\n{"step": 5, "lo')
    again = trainer(tmp_path / "killed", r)
    assert again.step == 3
    again.train()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_muon_turns_matrices_between_states_and_leaves_the_rest_to_adamw():
    head = new_head(recipe().head.config(tiny_llama().config), tiny_llama(), jnp.arange(60), seed=0, sample=None)
    params = nnx.state(head, nnx.Param)
    optimizer = make_optimizer(recipe(method="muon", warmup=0.0, clip=1e9).optimizer, 10)
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    change, _ = optimizer.update(gradient, optimizer.init(params), params)
    block = change["blocks"][0]
    turned = {
        "qkv": block["qkv"]["kernel"][...].reshape(2 * 32, -1),
        "out": block["out"]["kernel"][...].reshape(-1, 32),
        "gate_up": block["gate_up"]["kernel"][...].reshape(32, -1),
        "fc": change["fc"]["kernel"][...],
    }
    for name, matrix in turned.items():
        size = np.linalg.svd(matrix, compute_uv=False)
        assert size.max() < 2 * np.quantile(size, 0.2), name  # of a random square one it would be six times
        np.testing.assert_allclose(np.sqrt(np.mean(matrix**2)), 0.2 * 1e-2, rtol=0.2)
    for table in (change["lm_head"], change["norm"]["scale"]):  # AdamW's first step is a multiple of the sign
        np.testing.assert_allclose(np.abs(table[...]), np.abs(table[...]).max(), rtol=1e-3)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_biases_of_several_axes_are_no_matrices(method):
    """Neither decayed nor turned: AdamW's first step is a multiple of the sign, whatever the bias was."""
    target = tiny_llama(attention_bias=True, mlp_bias=True)
    head = new_head(recipe().head.config(target.config), target, jnp.arange(60), seed=0, sample=None)
    params = jax.tree.map(jnp.ones_like, nnx.state(head, nnx.Param))
    optimizer = make_optimizer(recipe(method=method, weight_decay=0.5, warmup=0.0, clip=1e9).optimizer, 10)
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    change, _ = optimizer.update(gradient, optimizer.init(params), params)
    block, steepest = change["blocks"][0], gradient["blocks"][0]
    for name in ("qkv", "out", "gate_up", "down"):
        moved = block[name]["bias"][...]
        size = np.abs(moved).max()
        np.testing.assert_allclose(moved, -size * np.sign(steepest[name]["bias"][...]), rtol=1e-3, err_msg=name)
        assert np.ptp(np.abs(block[name]["kernel"][...])) > 1e-3


def test_a_run_directory_belongs_to_one_recipe(tmp_path):
    trainer(tmp_path, recipe()).train(until=2)
    with pytest.raises(TrainingError, match=r"another recipe\.optimizer\.weight_decay"):
        trainer(tmp_path, recipe(weight_decay=0.1))
    longer = trainer(tmp_path, recipe(run={"steps": 8}))  # how long it is may change
    longer.train()
    assert longer.step == 8
    with pytest.raises(TrainingError, match=r"run\.steps is 7, but .* holds a run of 8 steps already; give as many or"):
        trainer(tmp_path, recipe(run={"steps": 7}))


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_run_goes_on_with_another_learning_rate_and_clip(tmp_path, method):
    """As the sentence about a diverged run says; both count from the next step on."""
    trainer(tmp_path, recipe(method=method)).train(until=2)
    said: list[dict[str, float]] = []

    def moved(**changes) -> float:
        t = trainer(tmp_path, recipe(method=method, **changes))
        assert t.step == 2
        said.append({field: now for field, (_, now) in t.changed.items()})
        before = [np.array(x) for x in jax.tree.leaves(t.state.params)]
        state, _ = t._step(t.state, t.loader[2])
        return max(np.abs(a - b).max() for a, b in zip(before, jax.tree.leaves(state.params), strict=True))

    assert moved(learning_rate=1e-5) < 1e-2 * moved()
    assert moved(clip=1e-12) < 0.9 * moved()
    assert said[0] == {"optimizer.learning_rate": 1e-5} and [*said[2]] == ["optimizer.clip"]


def test_micro_batches_and_remat_change_nothing(tmp_path):
    plain = trainer(tmp_path / "a", recipe(run={"rows": 4}))
    plain.train(until=3)
    split = trainer(tmp_path / "b", recipe(run={"rows": 1, "accumulate": 4}, objective={"remat": True}))
    split.train(until=3)
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-4)


def test_bfloat16_computes_with_float32_masters(tmp_path):
    t = trainer(tmp_path, recipe(run={"dtype": "bfloat16"}))
    t.train(until=3)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(t.state.params))
    reference = trainer(tmp_path / "f32", recipe())
    reference.train(until=3)
    np.testing.assert_allclose(losses(tmp_path), losses(tmp_path / "f32"), rtol=0.05)


EIGHT = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
sys.path[:0] = {path!r}
from pathlib import Path
from test_training import losses, recipe, trainer
r = recipe(run={{"rows": 8, "steps": 3}})
for name, devices in (("one", 1), ("eight", 8)):
    trainer(Path({out!r}) / name, r, devices=devices).train()
"""


def test_eight_devices_give_the_losses_of_one(tmp_path):
    code = EIGHT.format(path=sys.path, out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert len(one) == 3
    np.testing.assert_allclose(one, eight, rtol=1e-4)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its recipe knows nothing of fields that came later."""
    trainer(tmp_path, recipe()).train(until=2)
    path = tmp_path / "run.json"
    old = json.loads(path.read_text())
    del old["recipe"]["objective"]["own_temperature"], old["recipe"]["head"]["copy_heads"]
    path.write_text(json.dumps(old))
    assert trainer(tmp_path, recipe()).step == 2
    path.write_text(json.dumps(old))
    with pytest.raises(TrainingError, match=r"a run with another recipe\.objective\.own_temperature"):
        trainer(tmp_path, recipe(objective={"own_temperature": True}))


def test_what_is_measured_was_never_learnt(tmp_path):
    """Neither another seed nor more text moves a document from one side to the other."""
    files = []
    for first in (3, 43):
        files.append(str(tmp_path / f"{first}.jsonl"))
        lines = [json.dumps(dict(token_ids=[i, 1, 2], response=[[1, 3]])) for i in range(first, first + 40)]
        (tmp_path / f"{first}.jsonl").write_text("\n".join(lines))

    def load(*files: str, seed: int) -> list[set[int]]:
        r = recipe(run=dict(seed=seed))
        r = dataclasses.replace(r, data=DataRecipe(files=files, held_out=10))
        return [{int(d.token_n[0]) for d in part} for part in load_documents(r, tiny_llama().config, tokenizer=None)]

    learnt, measured = load(files[0], seed=0)
    assert len(measured) == 10 and learnt == {*range(3, 43)} - measured
    assert load(*files, seed=1) == [learnt | {*range(43, 83)}, measured]


def test_the_vocabulary_holds_the_most_frequent_answers_and_the_end_of_turn():
    made = [Document(np.array([5, 9, 9, 7, 7, 7, 4], np.int32), np.array([0, 1, 1, 1, 1, 1, 1], bool))]
    assert choose_vocabulary(made, vocab_size=20, size=3, always=[2]).tolist() == [2, 7, 9]
    assert choose_vocabulary(made, vocab_size=20, size=5, always=[2]).tolist() == [0, 2, 4, 7, 9]
    assert coverage(made, np.array([2, 7, 9]), vocab_size=20) == pytest.approx(5 / 6)


RECIPE = """
target = "tiny"
[head]
kind = "eagle3"
[data]
files = ["a.jsonl"]
[optimizer]
learning_rate = 1e-3
[run]
steps = 10
"""


def test_recipes_are_read_and_wrong_ones_named(tmp_path):
    path = tmp_path / "r.toml"

    def load(text):
        path.write_text(text)
        return load_recipe(path)

    assert load(RECIPE).optimizer.learning_rate == 1e-3
    for text, message in (
        (RECIPE + "stesp = 3", "run.stesp is not a field; the fields here are steps, rows"),
        (RECIPE.replace("steps = 10", ""), "run.steps is missing"),
        (RECIPE.replace("steps = 10", 'steps = "ten"'), "run.steps must be a whole number, got 'ten'"),
        (RECIPE.replace('"eagle3"', '"eagle9"'), "head.kind must be one of 'eagle1', 'eagle3', 'meta', got 'eagle9'"),
        (RECIPE.replace("1e-3", "-1.0"), "optimizer.learning_rate must be above 0, got -1.0"),
        (RECIPE + '[objective]\nloss = "mse"', "objective.loss must be one of ce, kl"),
        (RECIPE.replace('["a.jsonl"]', "[]"), "data.files must be a list of at least one file"),
        (RECIPE + "[", "is not TOML"),
    ):
        with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
            load(text)
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.toml")


def test_documents_stay_within_an_attention_chunk():
    check_length(recipe(), LlamaConfig.tiny())
    check_length(recipe(), Llama4Config.tiny(attention_chunk=LENGTH))
    with pytest.raises(RecipeError, match=f"pack_length is {LENGTH}, but tiny attends in chunks of 16 positions"):
        check_length(recipe(), Llama4Config.tiny(attention_chunk=16))


def test_documents_stay_within_the_targets_positions():
    check_length(recipe(), LlamaConfig.tiny(max_position=LENGTH))
    with pytest.raises(
        RecipeError, match=f"pack_length is {LENGTH}, but tiny has 16 positions; choose at most as many"
    ):
        check_length(recipe(), LlamaConfig.tiny(max_position=16))


def test_initial_heads_take_the_targets_weights():
    target = tiny_llama()
    config = EagleConfig.for_target(target.config, "eagle3", num_kv_heads=4, draft_vocab_size=10, tap_norm="each")
    rows = Rows(*(x[:1] for x in pack(documents(), LENGTH)))
    head = new_head(config, target, jnp.arange(5, 15), seed=0, sample=rows)
    last = target.blocks[-1]
    np.testing.assert_array_equal(head.lm_head[...], target.lm_head[...][:, 5:15])
    np.testing.assert_array_equal(head.blocks[0].gate_up.kernel[...], last.gate_up.kernel[...])
    # Queries keep their order; each of the 2 key heads serves two of the 4.
    mine, theirs = head.blocks[0].qkv.kernel[...][32:], last.qkv.kernel[...]
    np.testing.assert_array_equal(mine[:, :, 0].reshape(32, 4, 8), theirs[:, :, :2].reshape(32, 4, 8))
    np.testing.assert_array_equal(mine[:, :, 1], jnp.repeat(theirs[:, :, 2], 2, axis=1))
    np.testing.assert_array_equal(mine[:, :, 2], jnp.repeat(theirs[:, :, 3], 2, axis=1))
    # What it adds means as much to a stream of size one as the last block's to its own.
    stream_BTD = target.run(rows.token_BT, rows.position_BT, packed_attention(rows), taps=(len(target.blocks),))[1]
    size = np.median(np.sqrt(np.mean(np.asarray(stream_BTD) ** 2, axis=-1))[np.asarray(rows.segment_BT) > 0])
    np.testing.assert_allclose(head.blocks[0].down.kernel[...] * size, last.down.kernel[...], rtol=1e-4)
    out, theirs = head.blocks[0].out.kernel[...], last.out.kernel[...]
    np.testing.assert_allclose(out.reshape(theirs.shape) * size, theirs, rtol=1e-4)
    # The last tap passes, the others whisper.
    fresh = new_head(config, target, jnp.arange(5, 15), seed=0, sample=None)
    passed = head.fc.kernel[...] - fresh.fc.kernel[...]
    np.testing.assert_allclose(passed, np.eye(len(passed), 32, 32 - len(passed)), atol=1e-6)
