"""Heads that copy: they find what followed a token before, and leave the other heads alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fill_randomly, tiny_llama

from jeagle.config import EagleConfig
from jeagle.eagle import EagleHead
from jeagle.training import copying
from jeagle.training.copying import graft_copying
from jeagle.training.packing import Rows
from jeagle.training.unroll import teach, unroll

V, HALF = 97, 40


def repeated(number: int, seed: int) -> Rows:
    """Rows of tokens in random order, said twice."""
    rng = np.random.default_rng(seed)
    once = np.stack([rng.permutation(V)[:HALF] for _ in range(number)])
    token = np.concatenate([once, once], axis=1).astype(np.int32)
    ones = np.ones_like(token)
    position = np.broadcast_to(np.arange(2 * HALF, dtype=np.int32), token.shape)
    return Rows(token, ones, position, ones > 0, ones.astype(np.float32))


def eagle_head(target, **changes) -> EagleHead:
    config = EagleConfig.for_target(
        target.config, "eagle3", **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "tap_norm": "each", **changes}
    )
    return fill_randomly(EagleHead(config, rngs=nnx.Rngs(0)), 1)


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_heads_that_copy_draft_what_followed_before(norm_before_residual, monkeypatch):
    monkeypatch.setattr(copying, "LIFT", 5.0)  # louder than a head of random weights
    target = tiny_llama()
    head = eagle_head(target, norm_before_residual=norm_before_residual)
    head.draft_to_target = None
    head.blocks[0].down.kernel.set_value(jnp.zeros_like(head.blocks[0].down.kernel[...]))
    rows = repeated(4, seed=5)

    def drafted() -> np.ndarray:
        teacher = teach(target, head, rows)
        hidden_BTD = next(iter(unroll(head, target, rows, teacher.feature_BTX, 1)))
        return np.asarray(jnp.argmax(head.logits(hidden_BTD, target), axis=-1))[:, HALF : 2 * HALF - 2]

    wanted = rows.token_BT[:, HALF + 2 :]
    assert np.mean(drafted() == wanted) < 0.1
    untouched = head.blocks[0].qkv.kernel[...]
    (chosen,) = graft_copying(head, target, repeated(60, seed=6), 1)
    assert np.mean(drafted() == wanted) > 0.6
    other = 1 - chosen
    np.testing.assert_array_equal(head.blocks[0].qkv.kernel[:, other], untouched[:, other])


def test_heads_that_do_least_give_way_and_each_copies_a_part():
    target = tiny_llama()
    head = eagle_head(target, num_heads=8, num_kv_heads=4)
    for k in (1, 2):
        out = head.blocks[0].out.kernel
        out.set_value(out[...].at[k].multiply(10.0))
    before = head.blocks[0].qkv.kernel[...]
    assert sorted(graft_copying(head, target, repeated(60, seed=6), 2)) == [0, 3]
    after = head.blocks[0].qkv.kernel[...]
    np.testing.assert_array_equal(after[:, 1:3], before[:, 1:3])
    assert np.abs(after[:, 0, -1] - after[:, 3, -1]).max() > 0.01  # one reads one half of what is copied, one the other


def test_only_attention_that_tells_feature_from_embedding_can_copy():
    target = tiny_llama()
    rows = repeated(2, seed=0)
    with pytest.raises(ValueError, match="3 heads that copy need"):
        graft_copying(eagle_head(target), target, rows, 3)
    concat = EagleHead(EagleConfig.for_target(target.config, "meta"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'concat'"):
        graft_copying(concat, target, rows, 1)
