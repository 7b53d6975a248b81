"""Does a head draft in decoding what training saw it draft?

    python scripts/eval_alignment.py models/smollm2-135m smollm2-135m-eagle3 --prompts scripts/prompts/mt_bench.jsonl

Training unrolls the head over whole texts, decoding runs it on caches and on features that verification left behind. If
the two differed by a position, or by what a feature is, training would improve a number that decoding never sees. The
target answers questions greedily; then, at every few positions of the answers, the head's first draft is held against
the target's choice twice: out of ``jeagle.training.unroll`` over the whole text, and out of a round of decoding that
begins there. In float32 the two must agree but for near-ties; the exit code is 1 where their rates differ by more than
a point. (``tests/test_unroll.py`` holds the drafts of all depths against each other, on tiny models.)

Every position counts alike here. Rounds of decoding begin after rejections, where text is harder: what
``eval_acceptance.py`` says of position 1 is lower, or higher where greedy text goes in circles, without any error.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import chat, environment, load_questions, write_result
from flax import nnx
from reporting import check_outputs

from jeagle import LLM, SamplingParams
from jeagle.checkpoint import load_eagle, load_llama
from jeagle.locate import cache_directory, locate
from jeagle.training.packing import Rows
from jeagle.training.unroll import teach, unroll

MOST = 0.01  # that the two rates may differ by


@partial(jax.jit, static_argnames="definitions")
def unrolled(definitions, params, rows: Rows) -> jax.Array:
    """bool [T]: at i, whether the draft of the token at i + 2, made of the feature at i, is the target's choice."""
    target, head = (nnx.merge(d, p) for d, p in zip(definitions, params, strict=True))
    teacher = teach(target, head, rows)
    (hidden_1TD,) = unroll(head, target, rows, teacher.feature_BTX, 1)
    draft_T = jnp.argmax(head.logits(hidden_1TD[0], target), axis=-1)
    if head.draft_to_target is not None:
        draft_T = head.draft_to_target[...][draft_T]
    return draft_T == jnp.roll(teacher.best_BT[0], -1)


def one_row(ids: list[int], length: int) -> Rows:
    """A text alone in a row of ``length``."""
    index = np.arange(length, dtype=np.int32)
    token, inside = np.zeros(length, np.int32), index < len(ids)
    token[: len(ids)] = ids
    return Rows(*(x[None] for x in (token, inside.astype(np.int32), index, inside, np.ones(length, np.float32))))


def compare(args: argparse.Namespace) -> dict:
    cache = cache_directory()
    llm = LLM(args.model, args.head, tree="chain-1", dtype="float32", max_batch_size=args.batch)
    assert llm.checkpoint is not None
    target = load_llama(llm.checkpoint, dtype="float32")
    head = load_eagle(locate(args.head, cache, kind="eagle", target=llm.checkpoint), dtype="float32")
    split = [nnx.split(module) for module in (target, head)]
    definitions, params = tuple(d for d, _ in split), tuple(p for _, p in split)

    talks = [q.opening for q in load_questions(args.prompts, args.limit)]
    answers = chat(llm, talks, SamplingParams(max_tokens=args.max_tokens), speculative=False)
    texts = [[*a.prompt_token_ids, *a.outputs[0].token_ids] for a in answers]
    length = max(map(len, texts))
    in_training: list[bool] = []
    begun: list[list[int]] = []  # texts up to the token that is a round's root
    for answer, text in zip(answers, texts, strict=True):
        right_T = np.asarray(unrolled(definitions, params, one_row(text, length)))
        for i in range(len(answer.prompt_token_ids) - 1, len(text) - 2, args.every):
            in_training.append(bool(right_T[i]))
            begun.append(text[: i + 2])
    order = sorted(range(len(begun)), key=lambda n: len(begun[n]))  # batches of like lengths
    outs = llm.generate([begun[n] for n in order], SamplingParams(max_tokens=2, ignore_eos=True))
    in_decoding = np.zeros(len(begun), bool)
    in_decoding[order] = [out.metrics.num_rounds == 1 for out in outs]  # both tokens at once: the draft was kept
    return dict(
        answers=len(texts),
        positions=len(begun),
        agreement_in_training=float(np.mean(in_training)),
        agreement_in_decoding=float(np.mean(in_decoding)),
        positions_that_differ=int(np.sum(in_decoding != in_training)),
    )


def main() -> int:
    """Exit codes: 0, 1 for rates that differ or an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="the target: converted checkpoint, HF directory, hub name or .gguf")
    parser.add_argument("head", help="an EAGLE head for it, in any of the same forms, or by name")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSON lines, as EAGLE has them")
    parser.add_argument("--limit", type=int, default=24, help="questions, spread evenly over the file")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--every", type=int, default=8, metavar="N", help="one position in N is looked at")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures")
    args = parser.parse_args()
    try:
        if args.every < 1:
            raise ValueError(f"--every must be at least 1, got {args.every}")
        check_outputs(args.out, None)
        here = environment()
        found = compare(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{found['answers']} answers, {found['positions']} positions: the first draft is the target's choice at "
        f"{found['agreement_in_training']:.1%} in training, {found['agreement_in_decoding']:.1%} in decoding; they "
        f"differ at {found['positions_that_differ']} positions"
    )
    if args.out:
        about = dict(model=args.model, head=args.head, dtype="float32", prompts=str(args.prompts))
        write_result(args.out, dict(script="eval_alignment", **here, **about, **found))
    return int(abs(found["agreement_in_training"] - found["agreement_in_decoding"]) > MOST)


if __name__ == "__main__":
    sys.exit(main())
