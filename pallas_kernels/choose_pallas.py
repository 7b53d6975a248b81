"""The target's token of each row as one Pallas kernel, lowered through Triton. Interpreted on a CPU.

Algorithm: one program per row. The first pass finds the row's best token, which settles greedy rows. The second lists
the tokens that can still win: Gumbel noise made of 32 bits lies between -2.9 and 22.9, so a token 26 below the best
cannot, and weighs nothing under top-p. Each lane of the program keeps a list of its own, so listing needs no prefix sum
and keeps the tokens' order. All else works on the lists. top-k and top-p search the largest threshold that keeps
enough (``jeagle.sampling._keep_largest``) by several trial values a pass, down to the one value that is left between
those that keep too little and those that keep enough, and every pass drops from the lists what fell below. The
noise (``noise.py``: threefry on (position, token) under the row's key) is computed for what is still listed.

Traffic per call: the logits once from memory, R * V * itemsize bytes, and once more from the second-level cache (64
rows of 128,256 in float32 are 33 MB, an H100 caches 50 MB), and 8 bytes for each listed token, once per pass. Floor: R
* V * itemsize over the memory bandwidth, on an H100 (3.35 TB/s) 9.8 us for those 64 rows. Rows whose lists stay long
(flat ones, without filters) are bound by the noise instead: about 75 integer instructions a token, of which a
multiprocessor does 64 a clock. The lists take 8 * R * V bytes of scratch, touched as far as they are filled.

JAX deprecated Pallas' Triton lowering in 0.11; see tree_attention_pallas.py.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.noise import gumbel_of_bits, threefry
from pallas_kernels.plan import power_of_two

if TYPE_CHECKING:
    from jeagle.sampling import Filters

__all__ = ["choose"]

LANES = 2048
WARPS = 16
AHEAD = 4  # blocks of logits in flight: what memory's latency needs
REACH = 26.0  # more than the noise can make up for, and than exp(-REACH) can weigh in units of 2**-31
TRIALS = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # down from the top of the range; thresholds lie near it


def choose(
    logits_RV: jax.Array,
    position_R: jax.Array,
    seed_B2: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    *,
    filters: Filters,
) -> jax.Array:
    """token_R, int32: ``jeagle.sampling.choose`` of R = B * T rows, each with its own position, and every T of them
    with one request's key and parameters.

    logits_RV: float32 or bfloat16, V below 2**18. The same token as the reference's wherever division, exp and log are
    the same (on a CPU they are); a GPU's last bits may differ from XLA's, which moves a choice only in a near-tie. A
    row with a NaN chooses the first, as jnp.argmax does; the reference's filters may drop it.
    """
    operands = (logits_RV, position_R, seed_B2, temperature_B, top_k_B, top_p_B, min_p_B)
    return lax.platform_dependent(
        *operands,
        cpu=partial(_launch, filters=filters, interpret=True),
        default=partial(_launch, filters=filters, interpret=False),
    )


def _launch(logits_RV: jax.Array, *row_operands: jax.Array, filters: Filters, interpret: bool) -> jax.Array:
    R, V = logits_RV.shape
    lanes = min(LANES, power_of_two(V))
    listed = (R, -(-V // lanes), lanes)
    lists = [jax.ShapeDtypeStruct(listed, dtype) for dtype in (jnp.float32, jnp.int32) if filters.sample]
    token_R, *_ = pl.pallas_call(
        partial(_kernel, filters=filters, lanes=lanes, interpret=interpret),
        grid=(R,),
        out_shape=(jax.ShapeDtypeStruct((R,), jnp.int32), *lists),
        compiler_params=pltriton.CompilerParams(num_warps=min(WARPS, max(1, lanes // 128)), num_stages=1),
        interpret=interpret,
        name="choose",
    )(logits_RV, *row_operands)
    return token_R


def _kernel(
    logits_ref,
    position_ref,
    seed_ref,
    temperature_ref,
    top_k_ref,
    top_p_ref,
    min_p_ref,
    token_ref,
    *list_refs,
    filters: Filters,
    lanes: int,
    interpret: bool,
):
    """One row. Refs are whole arrays. N: lanes, each of which sees every N-th token."""
    V = logits_ref.shape[1]
    row, lane_N = pl.program_id(0), jnp.arange(lanes)
    request = row // (logits_ref.shape[0] // temperature_ref.shape[0])
    steps, zero_N = jnp.int32(-(-V // lanes)), jnp.zeros((lanes,), jnp.int32)
    temperature = temperature_ref[request] if filters.sample else jnp.float32(0)
    greedy = temperature == 0
    coolness = 1 / jnp.where(greedy, 1.0, temperature)

    def scaled(i):
        token_N = i * lanes + lane_N
        logits_N = pltriton.load(logits_ref.at[row, token_N], mask=token_N < V, other=-jnp.inf).astype(jnp.float32)
        return logits_N * coolness if filters.sample else logits_N, token_N

    def sweep(f, initial, blocks):
        """f(carry, x_N, token_N) over the row."""

        def step(i, carry):
            for block in [scaled(i * ahead + j) for j in range(ahead)]:
                carry = f(carry, *block)
            return carry

        ahead = min(AHEAD, -(-V // lanes))
        return lax.fori_loop(jnp.int32(0), (blocks + ahead - 1) // ahead, step, initial)

    def better(best, x_N, token_N):
        value_N, holder_N = best
        wins_N = ~(x_N <= value_N) & (value_N == value_N)  # a NaN wins, and then stays
        return jnp.where(wins_N, x_N, value_N), jnp.where(wins_N, token_N, holder_N)

    none_yet = jnp.full((lanes,), -jnp.inf, jnp.float32), lane_N
    best, highest = _winner(*sweep(better, none_yet, steps))
    if not filters.sample:
        token_ref[row] = best
        return

    x_ref, id_ref = list_refs
    settled = greedy | (jnp.abs(highest) == jnp.inf)
    cut = highest - REACH

    def enlist(count_N, x_N, token_N):
        stays_N = x_N >= cut
        pltriton.store(x_ref.at[row, count_N, lane_N], x_N, mask=stays_N)
        pltriton.store(id_ref.at[row, count_N, lane_N], token_N, mask=stays_N)
        return count_N + stays_N.astype(jnp.int32)

    def written():  # threads may read what others wrote
        if not interpret:
            pltriton.debug_barrier()

    count_N = sweep(enlist, zero_N, jnp.where(settled, 0, steps))
    written()

    def fold(f, initial, count_N):
        """f(carry, i, x_N) over the lists' i-th entries, -inf where a list has ended."""

        def step(i, carry):
            return f(carry, i, pltriton.load(x_ref.at[row, i, lane_N], mask=i < count_N, other=-jnp.inf))

        return lax.fori_loop(jnp.int32(0), jnp.max(count_N), step, initial)

    def keep_largest(weigh, enough, used, cut, count_N):
        """(new cut, count_N): the largest value such that the entries from it on weigh ``enough``, at most all."""

        def narrow(state):
            count_N, low, high, most, _ = state  # the threshold is in [low, high), and most its largest entry, or was
            top = jnp.minimum(high, highest)
            trials = [top - (top - low) * f for f in TRIALS]
            # Between neighbours, and where a difference counts as 0 (below 1e-38), only an entry itself can be tried.
            trials = [jnp.where((trial > low) & (trial < high), trial, most) for trial in trials]

            def sift(carry, i, x_N):
                stay_N, least_N, most_N, *sums = carry
                stays_N = x_N >= low
                moves_N = stays_N & (stay_N < i)
                id_N = pltriton.load(id_ref.at[row, i, lane_N], mask=moves_N, other=0)
                pltriton.store(x_ref.at[row, stay_N, lane_N], x_N, mask=moves_N)
                pltriton.store(id_ref.at[row, stay_N, lane_N], id_N, mask=moves_N)
                open_N = stays_N & (x_N < high)
                weight_N = weigh(x_N)
                return (
                    stay_N + stays_N.astype(jnp.int32),
                    jnp.minimum(least_N, jnp.where(open_N, x_N, jnp.inf)),
                    jnp.maximum(most_N, jnp.where(open_N, x_N, -jnp.inf)),
                    *(s + jnp.where(x_N >= trial, weight_N, 0) for s, trial in zip(sums, trials)),
                )

            unseen = jnp.full((lanes,), jnp.inf, jnp.float32), jnp.full((lanes,), -jnp.inf, jnp.float32)
            count_N, least_N, most_N, *sums = fold(sift, (zero_N, *unseen, *[zero_N] * len(trials)), count_N)
            written()
            least, most = jnp.min(least_N), jnp.max(most_N)
            low = jnp.maximum(low, least)
            for trial, kept in zip(trials, map(jnp.sum, sums)):
                low = jnp.where(kept >= enough, jnp.maximum(low, trial), low)
                high = jnp.where(kept >= enough, high, jnp.minimum(high, trial))
            return count_N, low, high, most, least < most

        state = count_N, cut, jnp.float32(jnp.inf), highest, used
        count_N, cut, *_ = lax.while_loop(lambda state: state[4], narrow, state)
        return cut, count_N

    if filters.top_k:
        top_k = top_k_ref[request]
        enough = jnp.minimum(top_k, jnp.sum(count_N))
        cut, count_N = keep_largest(lambda x_N: zero_N + 1, enough, (top_k > 0) & ~settled, cut, count_N)

    if filters.top_p:
        top_p = top_p_ref[request]
        used = (top_p < 1) & ~settled

        def e(x_N):
            return jnp.where(x_N >= cut, jnp.exp(x_N - highest), 0.0)

        def limbs(sums, i, x_N):
            units_N = (e(x_N) * 2.0**26).astype(jnp.int32)
            return sums[0] + (units_N >> 13), sums[1] + (units_N & 8191)

        def weigh(x_N):
            return (e(x_N) * scale).astype(jnp.int32)

        high, low = map(jnp.sum, fold(limbs, (zero_N, zero_N), jnp.where(used, count_N, 0)))
        scale = 127 * 2.0**50 / (high * 2.0**13 + low)
        total = jnp.sum(fold(lambda s, i, x_N: s + weigh(x_N), zero_N, jnp.where(used, count_N, 0)))
        enough = jnp.maximum(total - ((1 - top_p) * total).astype(jnp.int32), 1)
        cut, count_N = keep_largest(weigh, enough, used, cut, count_N)

    if filters.min_p:
        cut = jnp.maximum(cut, highest + jnp.log(min_p_ref[request]))

    def draw(best, i, x_N):
        id_N = pltriton.load(id_ref.at[row, i, lane_N], mask=i < count_N, other=0)
        noise_N = gumbel_of_bits(threefry(seed_ref[request, 0], seed_ref[request, 1], position_ref[row], id_N))
        return better(best, jnp.where(x_N >= cut, x_N + noise_N, -jnp.inf), id_N)

    drawn, _ = _winner(*fold(draw, none_yet, count_N))
    token_ref[row] = jnp.where(settled, best, drawn)


def _winner(value_N, token_N):
    """(token, value) of the highest, the lowest token in a tie; of the first NaN where there is one, as infinity."""
    nan_N = value_N != value_N
    highest = jnp.max(jnp.where(nan_N, jnp.inf, value_N))
    first_N = jnp.where(jnp.max(nan_N.astype(jnp.int32)) > 0, nan_N, value_N == highest)
    return jnp.min(jnp.where(first_N, token_N, jnp.int32(2**31 - 1))), highest
