"""``scripts/bench_train.py``: products counted in a jaxpr and by hand, shares that are shares, and one sentence per
error."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny_llama
from test_training import LENGTH, recipe

from jeagle.checkpoint_writer import save
from jeagle.training import unroll
from jeagle.training.initial import new_head
from jeagle.training.recipe import RecipeError
from jeagle.training.step import Trainable, TrainState
from jeagle.training.trainer import make_optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_train

HEADS = {
    "eagle3, reduced vocabulary": (dict(), dict()),
    "eagle3, 2 layers, remat": (dict(num_layers=2, tap_norm="none"), dict(remat=True, depth=3)),
    "eagle3, more kv heads, top-k": (dict(num_kv_heads=4, draft_vocab_size=None), dict(top_k=5)),
    "eagle1": (dict(kind="eagle1", draft_vocab_size=None, norm_output=None), dict(depth=3, feature_weight=1.0)),
    "meta, own LM head": (dict(kind="meta", num_layers=2, norm_output=None), dict()),
}


def pair(r):
    target = tiny_llama()
    config = r.head.config(target.config)
    ids = jnp.arange(config.draft_vocab_size) if config.reduced_vocabulary else None
    return target, new_head(config, target, ids, seed=0, sample=None)


def test_products_of_a_known_program():
    """Two of 2*m*k*n FLOPs in a loop of five, their gradients, and a batched one."""
    w = jnp.ones((3, 4))

    def loop(w, x):
        return jax.lax.scan(lambda x, _: (x @ w @ w.T, None), x, None, length=5)[0].sum()

    def count(function, *arguments):
        return bench_train.count_products(jax.make_jaxpr(function)(*arguments).jaxpr)

    one = 2 * 7 * 3 * 4
    assert count(jax.jit(loop), w, jnp.ones((7, 3))) == (2 * 5 * one, 0)
    assert count(jax.jit(jax.grad(loop, argnums=(0, 1))), w, jnp.ones((7, 3))) == (6 * 5 * one, 0)
    assert count(jax.vmap(jnp.matmul), jnp.ones((6, 7, 3)), jnp.ones((6, 3, 4))) == (0, 6 * one)
    branches = [lambda x: x @ w, lambda x: x @ (2 * w)]
    with pytest.raises(ValueError, match="how often the products in a cond run"):
        count(lambda i, x: jax.lax.switch(i, branches, x), 0, jnp.ones((7, 3)))


def form_recipe(form):
    head, objective = HEADS[form]
    head |= {"taps": (0, 2)} if "3" in form else {"tap_norm": "none"}
    return recipe(run=dict(rows=2, updates=2, accumulate=3, echo=2), head=head, objective=objective)


@pytest.mark.parametrize("form", HEADS)
def test_products_by_hand_are_those_of_the_step(form):
    r = form_recipe(form)
    target, head = pair(r)
    parts, params = Trainable.split(target, head)
    state = TrainState(params, make_optimizer(r.optimizer, 1).init(params), jnp.int32(0))
    rows = bench_train.random_rows(97, (2, 3, 2, LENGTH), 0)
    step = bench_train.step_function(parts, r)
    jaxpr = jax.make_jaxpr(step)(state, parts.target_params, parts.head_tables, rows)
    by_hand = bench_train.products_by_hand(target.config, head.config, r)
    attention = by_hand["target attention"] + by_hand["head attention"]
    assert bench_train.count_products(jaxpr.jaxpr) == (sum(by_hand.values()) - attention, attention)


def test_shares(monkeypatch):
    """And the target's logits in chunks, where XLA would count one, are the same arithmetic."""
    r = form_recipe("eagle3, reduced vocabulary")
    monkeypatch.setattr(unroll, "CHUNK", 8)
    found = bench_train.measure(*pair(r), r, 1)
    assert 0 < found["matmul_share"] < found["matmul_share"] + found["attention_share"] < 1
    assert sum(found["products"].values()) == found["matmul_flops"] + found["attention_flops"]
    products = found["products"]
    assert found["piece_flops"]["teach"] > sum(products[f"target {name}"] for name in ("blocks", "LM head")) / 6
    assert found["runs_per_step"] == dict(teach=6, learn=12, update=4)
    shares = [found[f"{name}_share"] for name in ("target", "head", "update", "other")]
    assert sum(shares) == pytest.approx(1) and min(shares[:3]) > 0
    assert found["updated_tokens_per_second"] == 2 * found["tokens_per_second"] > 0
    assert found["tokens_per_second"] * found["seconds"]["step"] == pytest.approx(6 * 2 * LENGTH)
    assert found["memory_bytes"]["argument"] > 0 and found["memory_bytes"]["temp"] > 0


def test_products_that_a_library_hides_are_counted(monkeypatch):
    """As on a GPU in 16 bits, where attention is one call of cuDNN's."""
    r = form_recipe("eagle3, reduced vocabulary")
    plain = bench_train.measure(*pair(r), r, 1)
    attend, calls = jax.nn.dot_product_attention, []

    def hiding(q_BTNH, k_BTKH, v_BTKH, *, mask, implementation):
        calls.append(implementation)
        if implementation == "xla":
            return attend(q_BTNH, k_BTKH, v_BTKH, mask=mask, implementation=implementation)
        return jnp.tanh(q_BTNH)  # no product to be seen

    monkeypatch.setattr(jax.nn, "dot_product_attention", hiding)
    monkeypatch.setattr(unroll, "attended_by", lambda q_BTKGH: "cudnn")
    found = bench_train.measure(*pair(r), r, 1)
    assert {*calls} == {"cudnn", "xla"}
    for name in ("products", "flops", "piece_flops", "matmul_share"):
        assert found[name] == plain[name], name


def test_the_pair_is_what_training_begins_with(tmp_path):
    """Of a head to go on from, widened as the recipe asks; no data is read."""
    r = recipe()
    target, head = pair(r)
    start = save(head, tmp_path / "head")
    wider = dict(mlp_width=80, draft_vocab_size=70)
    r = dataclasses.replace(recipe(head=dict(start=str(start), **wider)), target=str(save(target, tmp_path / "target")))
    assert bench_train.load_pair(r, None)[1].config == dataclasses.replace(head.config, **wider)
    assert bench_train.load_pair(r, "tiny")[1].config == r.head.config(target.config)
    with pytest.raises(RecipeError, match=r"head\.mlp_width is 63, but"):
        bench_train.load_pair(dataclasses.replace(r, head=dataclasses.replace(r.head, mlp_width=63)), None)


RECIPE = """
target = "none"
[head]
kind = "eagle3"
[data]
files = ["not read"]
pack_length = 24
[objective]
depth = 1
[optimizer]
learning_rate = 1e-3
[run]
steps = 10
rows = 2
"""


def test_script(tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "recipe.toml", tmp_path / "result.json"
    path.write_text(RECIPE)
    monkeypatch.setattr(sys, "argv", ["bench_train.py"])
    command = [str(path), "--shape", "tiny", "--repeats", "1", "--out", str(out)]
    assert bench_train.main(command) == 0
    result = json.loads(out.read_text())
    assert result["matmul_share"] >= 0.6 and result["model"] == "tiny, random weights" and "device" in result
    assert f"{result['matmul_share']:.1%}" in capsys.readouterr().out
    monkeypatch.setattr(bench_train, "measure", lambda *arguments: result | {"matmul_share": 0.59})
    assert bench_train.main(command[:-2]) == 1
    assert "only 59.0% of the arithmetic is products with weights" in capsys.readouterr().err
    for wrong, said in (
        ([str(tmp_path / "no.toml")], "cannot read"),
        ([*command, "--repeats", "0"], "--repeats must be"),
    ):
        assert bench_train.main(wrong) == 1
        error = capsys.readouterr().err
        assert error.startswith("bench_train: ") and said in error and error.count("\n") == 1
