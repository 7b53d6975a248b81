"""Heads for targets of routed experts: ordinary dense ones, learnt from a Llama 4 as from any other target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fill_randomly
from test_training import LENGTH, documents, recipe
from test_unroll import DEPTH, chain_drafter, make_head, one_document, run_student

from jeagle.checkpoint import load_eagle
from jeagle.llama4 import Llama4
from jeagle.llama4_config import Llama4Config
from jeagle.training.initial import new_head
from jeagle.training.packing import Rows, pack
from jeagle.training.trainer import Trainer
from jeagle.training.vocabulary import choose_vocabulary

FORMS = {
    "meta": {"kind": "meta", "draft_vocab_size": None, "tap_norm": "none", "norm_output": None, "num_layers": 2},
    "eagle3": {"kind": "eagle3"},
}


@pytest.fixture(scope="module")
def target() -> Llama4:
    config = Llama4Config.tiny(attention_chunk=64)
    return fill_randomly(nnx.eval_shape(lambda: Llama4(config, dtype=jnp.float32, rngs=nnx.Rngs(0))), 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_learns_from_routed_experts(target, tmp_path, form):
    """Begun from the target's last block, whose experts no dense head has, it learns, and is what its config says."""
    r = recipe(head=FORMS[form], run={"steps": 30, "save_every": 30})
    config, rows, ids = r.head.config(target.config), pack(documents(), LENGTH), None
    if config.reduced_vocabulary:
        ids = jnp.asarray(choose_vocabulary(documents(), vocab_size=97, size=config.draft_vocab_size, always=[2]))
    head = new_head(config, target, ids, seed=0, sample=Rows(*(x[:1] for x in rows)))
    held_out = {"0": pack(documents(12, seed=1), LENGTH)}
    t = Trainer(r, tmp_path / "run", target, head, rows, held_out, identity={}, devices=jax.devices()[:1])
    before = t.evaluate()
    t.train()
    assert t.evaluate()["loss_by_depth"][0] < 0.9 * before["loss_by_depth"][0]
    back = load_eagle(t.export(tmp_path / "head", source={"source": "a test"}))
    assert back.config == config and back.blocks[0].down.kernel.shape == (config.mlp_width, config.width)


@pytest.mark.parametrize("kind", ["meta", "eagle3"])
def test_unrolled_steps_draft_what_decoding_drafts(target, kind):
    head = make_head(target, kind=kind)
    prompt = np.random.default_rng(3).integers(0, 97, 9).tolist()
    drafts = chain_drafter(target, head)(prompt)
    rows, index = one_document(prompt + drafts, before=5, after=7), 5 + len(prompt) - 2
    _, steps = run_student(head, target, rows, DEPTH)
    assert [int(np.argmax(head.logits(hidden, target)[0, index])) for hidden in steps] == drafts
