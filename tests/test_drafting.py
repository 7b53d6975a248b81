"""What trees are drafted: node by node against the head walked along the node's path, as training unrolls it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same_for_all_rows, tiny_llama
from test_unroll import make_head, one_document, run_student

from jeagle.decode import Program
from jeagle.decoder import Batch, Decoder
from jeagle.draft import propose
from jeagle.sampling import Filters, RowSampling, SamplingParams, seed_keys
from jeagle.tree import OFF, DynamicTree, StaticTree, TreePlan

PROMPTS = np.random.default_rng(3).integers(0, 97, (4, 9))
LENGTH = 24
# Expanded at every level: nodes that are not the first of their parent, and parents that are not the first of theirs.
WIDE = StaticTree(
    ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 0, 1))
)
DYNAMIC = DynamicTree(depth=3, top_k=3, total=10)


def guess(decoder, head, target, state, plan: TreePlan, filters: Filters):
    """The tree of the next round."""

    @jax.jit
    def run(s):
        remaining_B = s.max_tokens_B - s.num_output_B
        given = head, target, s.draft, s.prefix, s.root_B, remaining_B, s.sampling
        return propose(*given, plan=plan, filters=filters)[0]

    return jax.device_get(run(state))


class Walk:
    """The head's log-probabilities after a path of drafts, from a forward over prompt and path alone."""

    def __init__(self, target, head, prompt):
        self.target, self.head, self.prompt = target, head, prompt
        self.known: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, path: tuple[int, ...]) -> np.ndarray:
        if path not in self.known:
            text = [*self.prompt, *path]
            rows = one_document(text, before=0, after=LENGTH - len(text))
            hidden_BTD = run_student(self.head, self.target, rows, 4)[1][len(path)]
            logits_V = self.head.logits(hidden_BTD[0, len(self.prompt) - 2], self.target)
            self.known[path] = np.asarray(jax.nn.log_softmax(logits_V))
        return self.known[path]

    def best(self, path: tuple[int, ...], count: int) -> list[int]:
        return np.argsort(-self(path), kind="stable")[:count].tolist()

    def static(self, plan: StaticTree) -> list[tuple[int, ...]]:
        """The tokens of every node's path, in the plan's order."""
        paths: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
        for ranks in plan.paths:
            before = paths[ranks[:-1]]
            paths[ranks] = (*before, self.best(before, 8)[ranks[-1]])
        return [paths[ranks] for ranks in plan.paths]

    def dynamic(self, plan: DynamicTree) -> set[tuple[int, ...]]:
        """EAGLE-2 (arXiv:2406.16858): expand the best of each level, keep the best of all."""
        score: dict[tuple[int, ...], float] = {(): 0.0}
        frontier: list[tuple[int, ...]] = [()]
        for _ in range(plan.depth):
            made = {
                (*path, token): score[path] + float(self(path)[token])
                for path in frontier
                for token in self.best(path, plan.top_k)
            }
            score |= made
            frontier = sorted(made, key=lambda path: -made[path])[: plan.top_k]
        del score[()]
        return set(sorted(score, key=lambda path: -score[path])[: plan.total - 1])


@pytest.mark.parametrize("plan", [WIDE, DYNAMIC], ids=["static", "dynamic"])
def test_every_node_is_what_the_head_says_after_its_path(plan) -> None:
    target = tiny_llama()
    head = make_head(target, kind="eagle3", num_layers=2, tap_norm="each", norm_output=True)
    decoder, program, B = Decoder(target, head, page_size=16), Program(plan=plan), len(PROMPTS)
    rest = same_for_all_rows(SamplingParams(), B), np.full((B, 4), -1, np.int32), np.full(B, 20, np.int32)
    state = decoder.start(Batch([*PROMPTS.astype(np.int32)], *rest), program, capacity=32, chunk=16)
    tree = guess(decoder, head, target, state, plan, Filters())
    for b, prompt in enumerate(PROMPTS.tolist()):
        paths: list[tuple[int, ...]] = [()]
        for parent, token, depth in zip(tree.parent_BT[b, 1:], tree.token_BT[b, 1:], tree.depth_BT[b, 1:], strict=True):
            paths.append((*paths[parent], int(token)))
            assert len(paths[-1]) == depth
        walk = Walk(target, head, prompt)
        if isinstance(plan, StaticTree):
            assert paths[1:] == walk.static(plan)
        else:
            assert len(set(paths)) == plan.num_nodes and set(paths[1:]) == walk.dynamic(plan)


def test_rounds_that_kept_side_branches_leave_what_a_prefill_would() -> None:
    """With a vocabulary of eight they are kept on all branches; the next guess is that of a fresh start of the text."""
    target = tiny_llama(vocab_size=8)
    head = make_head(target, kind="eagle3", tap_norm="each", norm_output=True)
    decoder, filters = Decoder(target, head, page_size=16), Filters(sample=True)
    program = Program(plan=WIDE, filters=filters)
    B = 8
    params = [SamplingParams(temperature=1.0)] * B
    sampling = RowSampling.stack(params, seed_keys(0, B))
    rest = np.full((B, 4), -1, np.int32), np.full(B, 60, np.int32)
    prompts = [np.array([i, 5, i], np.int32) for i in range(B)]
    state = decoder.launch(decoder.start(Batch(prompts, sampling, *rest), program, capacity=96, chunk=16), program, 3)
    kept_BN = np.asarray(state.kept_BN)
    side = [n for n, path in enumerate(WIDE.paths, 1) if path[-1] or any(path[:-1])]
    assert kept_BN[:, side].sum() >= 5 and (np.asarray(state.draft.count_B) > 1).any()
    count_B = np.asarray(state.length_B) + 1
    texts = [np.asarray(state.text_BS)[b, : count_B[b]] for b in range(B)]
    left = rest[1] - np.asarray(state.num_output_B)
    fresh = decoder.start(Batch(texts, sampling, rest[0], left), program, capacity=96, chunk=16)
    went_on, begun = (guess(decoder, head, target, s, WIDE, filters) for s in (state, fresh))
    np.testing.assert_array_equal(went_on.token_BT, begun.token_BT)


def test_prompts_of_several_chunks_leave_what_one_chunk_does() -> None:
    target = tiny_llama()
    head = make_head(target, kind="eagle3", tap_norm="each", norm_output=True)
    decoder, program = Decoder(target, head, page_size=16), Program(plan=WIDE)
    rng = np.random.default_rng(0)
    lengths = (2, 8, 9, 10, 17, 40)
    prompts = [rng.integers(0, 97, n).astype(np.int32) for n in lengths]
    sampling = same_for_all_rows(SamplingParams(), len(lengths))
    shapes = np.full((len(lengths), 4), -1, np.int32), np.full(len(lengths), 20, np.int32)
    small, large = (
        decoder.start(Batch(prompts, sampling, *shapes), program, capacity=64, chunk=chunk).draft for chunk in (8, 64)
    )
    np.testing.assert_allclose(small.feature_BPX[:, 0], large.feature_BPX[:, 0], atol=1e-5)
    for one, other in zip(jax.tree.leaves(small.cache), jax.tree.leaves(large.cache), strict=True):
        for row, n in enumerate(lengths):  # [kv heads, pages, positions, head width]; the last position is pending
            a, b = (np.asarray(x).reshape(x.shape[0], len(lengths), 64, -1)[:, row, : n - 2] for x in (one, other))
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_head_that_comes_back_does_not_see_what_it_missed() -> None:
    target = tiny_llama()
    head = make_head(target, kind="eagle3", tap_norm="each", norm_output=True)
    decoder = Decoder(target, head, page_size=16)
    plain, program = Program(plan=OFF), Program(plan=WIDE)
    sampling = same_for_all_rows(SamplingParams(), 1)
    batch = Batch([PROMPTS[0].astype(np.int32)], sampling, np.full((1, 4), -1, np.int32), np.array([50], np.int32))
    state = decoder.launch(decoder.start(batch, plain, capacity=96, chunk=16), plain, 10)
    state = decoder.launch(decoder.switch(state, plain, program), program, 3)
    (start,) = np.asarray(state.draft.start_B).tolist()
    assert start == len(PROMPTS[0]) + 9
    before = guess(decoder, head, target, state, WIDE, Filters())

    def spoilt(pages: jax.Array) -> jax.Array:
        noise = 9.0 * jnp.asarray(np.random.default_rng(1).standard_normal(pages.shape), pages.dtype)
        missed = (jnp.arange(pages.shape[1] * pages.shape[2]) < start).reshape(1, *pages.shape[1:3], 1)
        return jnp.where(missed, noise, pages)

    draft = dataclasses.replace(state.draft, cache=jax.tree.map(spoilt, state.draft.cache))
    after = guess(decoder, head, target, dataclasses.replace(state, draft=draft), WIDE, Filters())
    np.testing.assert_array_equal(after.token_BT, before.token_BT)
