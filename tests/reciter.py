"""A target whose every answer is known in advance, and an EAGLE head that is always right about it.

The next token depends on the last one alone: whatever is asked, the answer recites ``TEXT`` from there on.
"""

from __future__ import annotations

from pathlib import Path

import helpers
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_tokenizer import EOS, VOCAB_SIZE, byte_ids, tokenizer_files

from jeagle.checkpoint_writer import save
from jeagle.config import EagleConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama

__all__ = ["MAX_LEN", "RECITED", "TEXT", "make_head", "reciting_pair", "save_pairs"]

# No byte comes twice: each names what follows. After the last one comes EOS, after EOS and all else the first.
TEXT = "abcdé🙂fghijklm.STOP,nopqrs\n"
RECITED = [*byte_ids(TEXT), EOS]
MAX_LEN = 256


def make_head(config: EagleConfig, seed: int = 1) -> EagleHead:
    return helpers.fill_randomly(nnx.eval_shape(lambda: EagleHead(config, rngs=nnx.Rngs(0))), seed)


def silence(module: nnx.Module) -> None:
    """Let blocks add nothing to the residual stream."""
    for block in module.blocks:
        for linear in (block.out, block.down):
            linear.kernel.set_value(jnp.zeros_like(linear.kernel[...]))


def reciting_pair() -> tuple[Llama, EagleHead]:
    target = helpers.tiny_llama(width=64, vocab_size=VOCAB_SIZE, max_position=MAX_LEN, eos_token_ids=(EOS,))
    silence(target)
    embed_VD = np.array(target.embed[...])
    embed_VD[[t for t in range(VOCAB_SIZE) if t not in RECITED]] = embed_VD[EOS]  # all others speak as EOS does
    target.embed.set_value(jnp.asarray(embed_VD))
    hidden_VD = embed_VD / np.sqrt((embed_VD**2).mean(axis=1, keepdims=True)) * np.array(target.norm.scale[...])
    # Fewer tokens than dimensions, so these logits can be had exactly: 8 for what follows, 0 for all the rest.
    wanted_nV = 8.0 * np.eye(VOCAB_SIZE)[np.roll(RECITED, -1)]
    target.lm_head.set_value(jnp.asarray(np.linalg.lstsq(hidden_VD[RECITED], wanted_nV, rcond=None)[0], jnp.float32))

    head = make_head(EagleConfig.for_target(target.config, "meta"))
    silence(head)
    width = target.config.width
    head.fc.kernel.set_value(jnp.concatenate([jnp.eye(width), jnp.zeros((width, width))]))  # the embedding alone
    head.norm.scale.set_value(target.norm.scale[...])
    return target, head


def save_pairs(directory: Path) -> dict[str, Path]:
    """Checkpoints: reciter, reciter-head, random, random-head, and one without a tokenizer, ids. The random pair has
    attention, and its head is almost never right."""
    target, head = reciting_pair()
    plain = helpers.tiny_llama(vocab_size=VOCAB_SIZE, max_position=MAX_LEN, eos_token_ids=(EOS,))
    wrong = make_head(EagleConfig.for_target(plain.config, "eagle3"))
    tokenizer = tokenizer_files()
    return {
        "reciter": save(target, directory / "reciter", extra_files=tokenizer),
        "reciter-head": save(head, directory / "reciter-head"),
        "random": save(plain, directory / "random", extra_files=tokenizer),
        "random-head": save(wrong, directory / "random-head"),
        "ids": save(plain, directory / "ids"),
    }
