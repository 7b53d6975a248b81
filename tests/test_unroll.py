"""The unrolled student is what decoding will run: the same drafts at every depth, from any head."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import fill_randomly, same_for_all_rows, tiny_llama

from jeagle.config import EagleConfig
from jeagle.decode import Program
from jeagle.decoder import Batch, Decoder
from jeagle.draft import propose
from jeagle.eagle import EagleHead
from jeagle.sampling import Filters, SamplingParams
from jeagle.sharding import data_mesh, replicated, split_rows
from jeagle.training import unroll as unrolling
from jeagle.training.losses import LOSSES, acceptance, lump
from jeagle.training.packing import Rows
from jeagle.training.unroll import Objective, begun, learn, num_learnt, teach, unroll
from jeagle.tree import StaticTree

DEPTH = 4
HEADS = {
    "eagle1": dict(kind="eagle1"),
    "meta, 3 layers": dict(kind="meta", num_layers=3),
    "eagle3": dict(kind="eagle3"),
    "eagle3, 2 layers, reduced vocabulary": dict(kind="eagle3", num_layers=2, draft_vocab_size=40),
    "eagle3.1": dict(kind="eagle3", tap_norm="each", norm_output=True, norm_before_residual=True, taps=(0, 2)),
}


def make_head(target, seed=1, **form) -> EagleHead:
    config = EagleConfig.for_target(target.config, form.pop("kind"), **form)
    head = fill_randomly(nnx.eval_shape(lambda: EagleHead(config, rngs=nnx.Rngs(0))), seed)
    if config.reduced_vocabulary:
        rng = np.random.default_rng(seed)
        ids = np.sort(rng.choice(config.vocab_size, config.draft_vocab_size, replace=False))
        head.draft_to_target.set_value(jnp.asarray(ids, jnp.int32))
    return head


def one_document(tokens: list[int], *, before: int = 0, after: int = 0) -> Rows:
    """A row of one document between two others of random tokens."""
    rng = np.random.default_rng(0)
    lengths = [before, len(tokens), after]
    parts = [rng.integers(0, 97, before), tokens, rng.integers(0, 97, after)]
    segment = np.repeat([1, 2, 3], lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    token, learnt, temperature = (
        np.concatenate(parts).astype(np.int32),
        position >= 0,
        np.ones(len(segment), np.float32),
    )
    return Rows(*(jnp.asarray(x)[None] for x in (token, segment, position, learnt, temperature)))


def chain_drafter(target, head):
    """prompt -> what decoding drafts after it; the prompt's last token is the root."""
    decoder = Decoder(target, head, page_size=16)
    program = Program(plan=StaticTree.chain(DEPTH))

    @jax.jit
    def propose_chain(s):
        options = dict(plan=program.plan, filters=Filters())
        return propose(head, target, s.draft, s.prefix, s.root_B, s.max_tokens_B, s.sampling, **options)[0]

    def draft(prompt: list[int]) -> list[int]:
        sampling = same_for_all_rows(SamplingParams(), 1)
        batch = Batch([np.array(prompt, np.int32)], sampling, np.full((1, 4), -1, np.int32), np.array([20], np.int32))
        tree = propose_chain(decoder.start(batch, program, capacity=32, chunk=16))
        return tree.token_BT[0, 1:].tolist()

    return draft


@nnx.jit(static_argnames=("depth",))
def run_student(head, target, rows, depth):
    """The teacher, and what the LM head reads at every depth."""
    teacher = teach(target, head, rows)
    return teacher, list(unroll(head, target, rows, teacher.feature_BTX, depth))


def loss_and_measures(head, target, rows, objective):
    teacher = teach(target, head, rows, **objective.asked_of_target())
    return learn(head, target, rows, teacher, num_learnt(rows, objective.depth), objective)


judge = nnx.jit(loss_and_measures, static_argnames=("objective",))


@pytest.mark.parametrize("form", HEADS)
def test_unrolled_steps_draft_what_decoding_drafts(form):
    target = tiny_llama()
    head = make_head(target, **HEADS[form])
    draft = chain_drafter(target, head)
    ids = np.arange(97) if head.draft_to_target is None else np.asarray(head.draft_to_target[...])
    rng = np.random.default_rng(3)
    for length in (2, 9, 14):
        prompt = rng.integers(0, 97, length).tolist()
        drafts = draft(prompt)
        rows = one_document(prompt + drafts, before=5, after=16 - length)
        index = 5 + length - 2  # the last verified position: the root is the token after it
        _, steps = run_student(head, target, rows, DEPTH)
        trained = [int(ids[np.argmax(head.logits(hidden, target)[0, index])]) for hidden in steps]
        assert trained == drafts


def test_documents_of_a_row_do_not_see_each_other():
    target = tiny_llama()
    head = make_head(target, kind="eagle3", tap_norm="each")
    tokens = np.random.default_rng(0).integers(0, 97, 12).tolist()
    objective = Objective(LOSSES["kl"], 3)

    def outputs(before, after):
        rows = one_document(tokens, before=before, after=after)
        teacher, steps = run_student(head, target, rows, 3)
        hidden = [h[:, before : before + 9] for h in steps]
        return [teacher.hidden_BTD[:, before : before + 12], *hidden]

    for alone, packed in zip(outputs(0, 0), outputs(7, 5), strict=True):
        np.testing.assert_allclose(alone, packed, atol=2e-5)

    # And no loss is taken across their borders: three documents of 12, 7 and 5 give (12-1) + (7-1) + (5-1) pairs.
    rows = one_document(tokens, before=7, after=5)
    rows = rows._replace(learn_BT=rows.learn_BT.at[:, [6, 18, 23]].set(False))  # no token follows the last of each
    assert num_learnt(rows, 3).tolist() == [24 - 3 * 2, 24 - 3 * 3, 24 - 3 * 4]
    loss, measures = judge(head, target, rows, objective)
    assert measures.num.tolist() == num_learnt(rows, 3).tolist() and np.isfinite(loss)


def test_devices_make_the_targets_logits_of_their_own_rows(monkeypatch):
    """Chunk by chunk, and no device gathers what another one has."""
    monkeypatch.setattr(unrolling, "CHUNK", 16)
    target = tiny_llama()
    head = make_head(target, kind="eagle3", draft_vocab_size=40)
    mesh = data_mesh()
    tokens = np.random.default_rng(0).integers(0, 97, 24).tolist()
    rows = Rows(*(np.repeat(x, mesh.size, axis=0) for x in one_document(tokens, before=0, after=0)))
    definition, params = nnx.split((target, head))

    def taught(params, rows):
        return teach(*nnx.merge(definition, params), rows)

    shardings = dict(in_shardings=(replicated(mesh), split_rows(mesh)), out_shardings=split_rows(mesh))
    program = jax.jit(taught, **shardings).lower(params, rows).compile()
    assert mesh.size == 8 and " while(" in program.as_text()
    assert "all-gather" not in program.as_text() and "all-reduce" not in program.as_text()


def test_padding_may_hold_anything():
    target = tiny_llama()
    head = make_head(target, kind="eagle3", draft_vocab_size=40)
    objective = Objective(LOSSES["lk"], 3)
    tokens = np.random.default_rng(0).integers(0, 97, 12).tolist()

    graph, params, rest = nnx.split(head, nnx.Param, ...)
    differentiate = jax.jit(
        jax.value_and_grad(lambda p, r: loss_and_measures(nnx.merge(graph, p, rest), target, r, objective)[0])
    )

    def loss_and_gradient(filler):
        rows = one_document(tokens, after=6)
        rows = rows._replace(
            token_BT=rows.token_BT.at[:, 12:].set(filler),
            segment_BT=rows.segment_BT.at[:, 12:].set(0),
            learn_BT=rows.learn_BT.at[:, 11:].set(False),
        )
        return differentiate(params, rows)

    (loss, gradient), (other, other_gradient) = loss_and_gradient(0), loss_and_gradient(55)
    assert loss == pytest.approx(float(other), rel=1e-6)
    assert optax.tree.norm(optax.tree.sub(gradient, other_gradient)) < 1e-5 * optax.tree.norm(gradient)


def test_measures_are_acceptance_and_agreement():
    """Against a plain count in numpy, position by position."""
    target = tiny_llama()
    head = make_head(target, kind="eagle3", draft_vocab_size=40)
    tokens = np.random.default_rng(5).integers(0, 97, 16).tolist()
    rows = one_document(tokens)
    K = 3
    loss, measures = judge(head, target, rows, Objective(LOSSES["tv"], K, decay=0.5, reach=2.0))
    teacher, steps = run_student(head, target, rows, K)
    p_TV = np.asarray(jax.nn.softmax(target.logits(teacher.hidden_BTD)[0], axis=-1))
    ids = np.asarray(head.draft_to_target[...])
    alpha, match, inside = np.zeros((3, K, 16))
    for k, hidden in enumerate(steps):
        q_TW = np.asarray(jax.nn.softmax(head.logits(hidden, target)[0], axis=-1))
        for i in range(16 - k - 1):
            alpha[k, i] = np.minimum(p_TV[i + 1 + k][ids], q_TW[i]).sum()
            match[k, i] = ids[q_TW[i].argmax()] == p_TV[i + 1 + k].argmax()
            inside[k, i] = p_TV[i + 1 + k].argmax() in ids
    # A depth weighs decay^k, by the chance that decoding gets there, where the target's choice can be drafted at all.
    reach = np.cumprod([np.ones(16), *np.maximum(alpha, 1e-3)[:-1] ** 2], axis=0)
    each = np.sum((1 - alpha) * inside * reach, axis=1) / (16 - 1 - np.arange(K))
    assert 0 < inside.sum() < 3 * 16 - 6
    assert loss == pytest.approx(np.average(each, weights=0.5 ** np.arange(K)), rel=1e-4)
    np.testing.assert_allclose(measures.alpha, alpha.sum(1), rtol=1e-4)
    assert measures.match.tolist() == match.sum(1).tolist()
    assert measures.chain_num.tolist() == [16 - K] * K
    np.testing.assert_allclose(measures.chain_alpha, np.cumprod(alpha[:, : 16 - K], 0).sum(1), rtol=1e-4)
    np.testing.assert_allclose(measures.chain_match, np.cumprod(match[:, : 16 - K], 0).sum(1), rtol=1e-6)


def test_top_k_targets_keep_the_rest_of_the_mass_and_become_dense_at_full_k():
    target = tiny_llama(num_layers=1)
    head = make_head(target, kind="eagle3", draft_vocab_size=40, taps=(0, 1))
    rows = one_document(np.random.default_rng(5).integers(0, 97, 16).tolist())

    def loss(name, k):
        return judge(head, target, rows, Objective(LOSSES[name], 2, top_k=k))

    for name in ("kl", "tv"):
        dense, measured = loss(name, None)
        full, all_measured = loss(name, 40)
        assert float(full) == pytest.approx(float(dense), rel=1e-3)
        np.testing.assert_allclose(measured.alpha, all_measured.alpha, rtol=1e-3)
        # Lumping classes can only make two distributions look more alike.
        fewer, fewer_measured = loss(name, 5)
        assert fewer_measured.alpha[0] >= measured.alpha[0] - 1e-4
        assert float(fewer) <= float(dense) + 1e-4
    log_q = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).standard_normal((3, 8))))
    assert np.exp(lump(log_q, jnp.array([[0, 1], [2, 3], [7, 5]]))).sum(-1) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("top_k", [None, 40])
def test_answers_are_judged_at_their_own_temperature(top_k):
    """Three documents, written at 0, 0.5 and 1: alpha by a plain count, and the gradient of a whole row is finite."""
    target = tiny_llama()
    head = make_head(target, kind="eagle3", draft_vocab_size=40)
    rows = one_document(np.random.default_rng(5).integers(0, 97, 8).tolist(), before=8, after=8)
    t_T = np.repeat([0.0, 0.5, 1.0], 8)
    rows = rows._replace(temperature_BT=jnp.asarray(t_T, jnp.float32)[None])
    objective = Objective(LOSSES["lk"], 1, top_k=top_k, own_temperature=True)
    _, measures = judge(head, target, rows, objective)
    teacher, (hidden,) = run_student(head, target, rows, 1)
    logits_TV = np.asarray(target.logits(teacher.hidden_BTD)[0])
    ids = np.asarray(head.draft_to_target[...])
    draft_TW = np.asarray(head.logits(hidden, target)[0])
    alpha = 0.0
    for i in (i for i in range(23) if i % 8 < 7):
        if t := t_T[i + 1]:
            p_V, q_W = (np.asarray(jax.nn.softmax(x / t)) for x in (logits_TV[i + 1], draft_TW[i]))
        else:
            p_V, q_W = np.eye(97)[logits_TV[i + 1].argmax()], np.asarray(jax.nn.softmax(draft_TW[i]))
        alpha += np.minimum(p_V[ids], q_W).sum()
    assert float(measures.alpha[0]) == pytest.approx(alpha, rel=1e-4)

    graph, params, rest = nnx.split(head, nnx.Param, ...)
    gradient = jax.grad(lambda p: loss_and_measures(nnx.merge(graph, p, rest), target, rows, objective)[0])(params)
    assert np.isfinite(optax.tree.norm(gradient))

    # Where all are of temperature 1, or unknown, it changes nothing.
    rows = rows._replace(temperature_BT=jnp.ones_like(rows.temperature_BT))
    (loss, _), (same, _) = (
        judge(head, target, rows, objective),
        judge(head, target, rows, objective._replace(own_temperature=False)),
    )
    assert float(loss) == pytest.approx(float(same), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_least_at_the_target_and_push_towards_it(name):
    rng = np.random.default_rng(0)
    p = jax.nn.softmax(jnp.asarray(rng.standard_normal(6)))
    loss = LOSSES[name]
    best = loss(p, jnp.log(p))
    logits = jnp.asarray(rng.standard_normal(6))
    assert loss(p, jax.nn.log_softmax(logits)) > best
    step = logits - 0.1 * jax.grad(lambda x: loss(p, jax.nn.log_softmax(x)))(logits)
    assert acceptance(p, jax.nn.log_softmax(step)) > acceptance(p, jax.nn.log_softmax(logits))
    if name in ("kl", "tv", "nla", "lk"):
        assert float(best) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("off", [0.1, 1.0, 6.0])
def test_lk_is_kl_while_the_head_is_poor_and_acceptance_as_it_improves(off):
    rng = np.random.default_rng(0)
    logits, noise = rng.standard_normal((2, 6))
    p_n = np.exp(logits) / np.exp(logits).sum() * 0.9  # a draft vocabulary that holds nine tenths
    x_n = logits + off * noise
    q_n = np.exp(x_n) / np.exp(x_n).sum()
    alpha = np.minimum(p_n, q_n).sum()
    share, kl = np.exp(-3 * alpha), np.sum(p_n / 0.9 * np.log(p_n / 0.9 / q_n))
    of = {
        name: lambda x, name=name: LOSSES[name](jnp.asarray(p_n), jax.nn.log_softmax(x)) for name in ("lk", "kl", "tv")
    }
    assert of["lk"](jnp.asarray(x_n)) == pytest.approx(share * kl + (1 - share) * (1 - alpha), rel=1e-4)
    lk, kl_n, tv_n = (np.asarray(jax.grad(of[name])(jnp.asarray(x_n))) for name in ("lk", "kl", "tv"))
    np.testing.assert_allclose(lk, share * kl_n + (1 - share) * tv_n, atol=1e-6)  # the share itself is not learnt


def test_eagle1_regresses_the_targets_features():
    target = tiny_llama()
    head = make_head(target, kind="eagle1")
    rows = one_document(np.random.default_rng(5).integers(0, 97, 16).tolist())
    _, measures = judge(head, target, rows, Objective(LOSSES["ce"], 1, token_weight=0.0, feature_weight=1.0))
    teacher, (hidden,) = run_student(head, target, rows, 1)  # EAGLE-1 has no norm: the feature is the hidden state
    error = np.abs(np.asarray(hidden[0, :-1] - teacher.hidden_BTD[0, 1:]))
    wanted = np.where(error < 1, 0.5 * error**2, error - 0.5).mean(-1).sum()
    assert float(measures.loss[0]) == pytest.approx(float(wanted), rel=1e-4)


def test_rounds_begin_after_what_was_kept():
    """As a walk over each run of judged positions, from its first one, finds them."""
    rng = np.random.default_rng(0)
    kept_BT = rng.integers(0, 5, (6, 33))
    judged_BT = rng.random((6, 33)) < 0.9
    judged_BT[0], judged_BT[1] = True, False
    wanted_BT = np.zeros_like(judged_BT)
    for kept, judged, wanted in zip(kept_BT, judged_BT, wanted_BT, strict=True):
        for first in np.flatnonzero(judged & ~np.append(False, judged[:-1])):
            position = first
            while position < len(kept) and judged[position]:
                wanted[position] = True
                position += kept[position] + 1
    np.testing.assert_array_equal(begun(jnp.asarray(kept_BT), jnp.asarray(judged_BT)), wanted_BT)
    example = begun(jnp.asarray([[2, 0, 1, 3, 0, 1, 0, 0]]), jnp.ones((1, 8), bool))
    assert np.flatnonzero(example[0]).tolist() == [0, 3, 7]
