"""The compiled programs of a target and its head, by bucket: prefill and the decode loop.

Two programs, not one: a donated buffer that is updated and read in the same program may be copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle import sharding
from jeagle.cache import KVCache
from jeagle.config import BlockConfig
from jeagle.decode import FINISH_REASONS, DecodeState, Logprobs, Program, grown, launch
from jeagle.draft import DraftState, settle
from jeagle.eagle import EagleHead, check_pair
from jeagle.llama import Llama
from jeagle.prefill import Caches, inserted, prefill_chunk
from jeagle.programs import CompiledProgram, Programs
from jeagle.sampling import RowSampling
from jeagle.sharding import Axes, Layout

__all__ = ["Batch", "Decoder", "Fill", "precision_of", "state_axes"]

Fill = Callable[[Caches, Sequence[np.ndarray], np.ndarray], Caches]  # prompts, by place, into caches, at places


@dataclass(frozen=True)
class Batch:
    """Requests of one batch, on the host. Rows beyond the prompts are padding, with ``max_tokens`` 0."""

    prompts: list[np.ndarray]  # int32 ids, each at least one
    sampling: RowSampling
    stop_id_BI: np.ndarray
    max_tokens_B: np.ndarray

    @property
    def num_prompt_B(self) -> np.ndarray:
        """int32: tokens of each prompt; 1 in rows of padding."""
        padding = len(self.max_tokens_B) - len(self.prompts)
        return np.array([len(p) for p in self.prompts] + [1] * padding, np.int32)


class Decoder:
    """A target, perhaps a head, and their compiled programs.

    layout: over which devices everything is laid out, weights (see ``placement.place``) as well as caches and states;
    None is one device.
    """

    def __init__(
        self,
        target: Llama,
        head: EagleHead | None = None,
        *,
        page_size: int = 64,
        kv_cache_dtype: jnp.dtype | None = None,  # of both caches; None is the target's
        layout: Layout | None = None,
        platform: str | None = None,  # to compile for; None is where this runs
    ):
        if head is not None:
            check_pair(target, head)
        self.target_config = target.config
        self.head_config = None if head is None else head.config
        self.page_size = page_size
        self.layout = layout
        self.dtype = target.compute_dtype
        self.kv_cache_dtype = self.dtype if kv_cache_dtype is None else jnp.dtype(kv_cache_dtype)
        split = [(None, None) if m is None else nnx.split(m) for m in (target, head)]
        definitions = tuple(d for d, _ in split)
        # Weights are arguments, not constants baked into the program; states are donated so that caches are updated in
        # place; graph definitions are closed over, as hashing them on every call costs milliseconds.
        self.params = tuple(p for _, p in split)
        jit = partial(jax.jit, donate_argnums=(1,))
        laid_out = partial(_laid_out, layout=layout)
        on_modules = partial(
            _on_modules, definitions=definitions, layout=layout, precision=precision_of(self.dtype, platform)
        )
        self._prefill = jit(on_modules(prefill_chunk), static_argnames=("attention",))
        self.jitted_launch = jit(on_modules(launch), static_argnames=("program",))
        self._settle = jit(on_modules(_settled), static_argnames=("attention",))
        self._insert = jit(on_modules(inserted))
        self._fit = jax.jit(laid_out(_fitted), static_argnames=("num_path",))
        self._replace = jax.jit(laid_out(_replaced), donate_argnums=(0,))
        self._grow = jax.jit(grown, static_argnames=("more_pages",))
        self._compiled = Programs(self.params, page_size)
        self._creators: dict[tuple, Callable] = {}

    @property
    def programs(self) -> list[CompiledProgram]:
        """Every bucket compiled so far, in order; on a CPU the last used ones, see ``Programs``."""
        return self._compiled.listed

    def start(
        self,
        batch: Batch,
        program: Program,
        *,
        capacity: int,
        chunk: int,
        rows: int | None = None,
        fill: Fill | None = None,
    ) -> DecodeState:
        """Prefill a batch into fresh caches of ``capacity`` positions per row, in chunks of ``chunk``.

        ``rows`` at a time run side by side, as far as the longest of them; None is all. fill: does that elsewhere (see
        ``disaggregated.py``), None does it here. Returns the state before the first round.
        """
        B = len(batch.max_tokens_B)
        fill = fill or partial(self.fill, attention=program.attention, chunk=chunk, rows=rows or B)
        caches = fill(self.empty_caches(B, program, capacity), batch.prompts, np.arange(B))
        return self.first_state(caches, batch, program, capacity)

    def refill(
        self,
        state: DecodeState,
        program: Program,
        batch: Batch,
        places: np.ndarray,
        *,
        chunk: int,
        rows: int,
        fill: Fill | None = None,
    ) -> DecodeState:
        """The rows of ``batch`` that have ``places`` (int [n], ascending), prefilled as by ``start``, in place of
        ``state``'s; all others go on. ``program``, and the shapes of ``batch``, are those that ``state`` has been
        running under."""
        B, draft, head = len(state.finish_B), state.draft, self.head_config
        feature_BX = None
        if draft is not None and head is not None:
            feature_BX = self._created(("feature", B), partial(jnp.zeros, (B, head.feature_width), self.dtype))
        caches = Caches(state.cache, None if draft is None else draft.cache, feature_BX, state.page_table_BM)
        fill = fill or partial(self.fill, attention=program.attention, chunk=chunk, rows=rows)
        caches = fill(caches, batch.prompts, places)
        new = self.first_state(caches, batch, program, state.text_BS.shape[1] - 1)
        fresh_B = np.zeros(B, bool)
        fresh_B[places] = True
        both = state.without_caches(), new.without_caches()
        return self._replace(*both, self.put(fresh_B)).with_caches_of(new)

    def first_state(self, caches: Caches, batch: Batch, program: Program, capacity: int) -> DecodeState:
        """The state before the first round, of caches that hold the prompts but for their last tokens."""
        B, P = len(batch.max_tokens_B), program.num_path
        prompt_B = batch.num_prompt_B
        root_B = np.array([p[-1] for p in batch.prompts] + [0] * (B - len(batch.prompts)), np.int32)
        text_BS = np.zeros((B, capacity + 1), np.int32)  # the last emitted token stands one position after the cache's
        for text, prompt in zip(text_BS, batch.prompts):
            text[: len(prompt)] = prompt
        draft = None
        if caches.head is not None and caches.feature_BX is not None:
            token_BP = np.zeros((B, P), np.int32)
            token_BP[:, 0] = root_B
            draft = DraftState(
                caches.head,
                jnp.pad(caches.feature_BX[:, None], ((0, 0), (0, P - 1), (0, 0))),
                self.put(token_BP),
                self.put((prompt_B > 1).astype(np.int32)),
                self.put(np.zeros(B, np.int32)),
            )

        def zeros(*shape: int, dtype: type = np.int32) -> jax.Array:
            return self.put(np.zeros((B, *shape), dtype))

        logprobs = None
        if program.num_logprobs is not None:
            best = (capacity, program.num_logprobs)
            logprobs = Logprobs(zeros(capacity, dtype=np.float32), zeros(*best, dtype=np.float32), zeros(*best))
        return DecodeState(
            cache=caches.target,
            draft=draft,
            page_table_BM=caches.page_table_BM,
            length_B=self.put(prompt_B - 1),
            root_B=self.put(root_B),
            sampling=jax.tree.map(self.put, batch.sampling),
            stop_id_BI=self.put(batch.stop_id_BI),
            max_tokens_B=self.put(batch.max_tokens_B),
            text_BS=self.put(text_BS),
            num_output_B=zeros(),
            logprobs=logprobs,
            finish_B=self.put((batch.max_tokens_B <= 0).astype(np.int32) * FINISH_REASONS.index("length")),
            num_rounds_B=zeros(),
            acceptance_BP=zeros(P),
            looked_BP=zeros(P),
            tried_BN=zeros(program.num_counted),
            kept_BN=zeros(program.num_counted),
            lookup_B=self.put(np.ones(B, bool)),
        )

    def switch(self, state: DecodeState, old: Program, new: Program) -> DecodeState:
        """The same rows, to go on under another tree. No text depends on it; what ``old`` was differs in its plan only.

        Acceptance is counted from zero again: read it first. Without a tree the head's state is dropped, so that a
        plain round is exactly that, and a head that comes back remembers nothing before ``start_B``, and has no feature
        to guess from in its first round. Both can cost acceptance only, and memory is there for those who draft.

        It takes a small part of a round (scripts/results/bench_decode_cpu_smollm2.json), once in eight at most: a
        switch inside the loop would save little, and every program would hold every tree.
        """
        draft = state.draft if new.drafts else None
        if draft is not None and new.num_path != old.num_path:
            if new.num_path < old.num_path:
                settled = self._compiled(
                    "settle", self._settle, (state,), positions=old.num_path, attention=new.attention
                )
                state = settled(self.params, state)
                draft = state.draft
                assert draft is not None
            pending = self._fit(draft.feature_BPX, draft.token_BP, num_path=new.num_path)
            draft = dataclasses.replace(draft, feature_BPX=pending[0], token_BP=pending[1])
        elif new.drafts and draft is None:
            draft = self._fresh_draft(state, new)
        B, P, N = len(state.finish_B), new.num_path, new.num_counted
        acceptance_BP, looked_BP, tried_BN, kept_BN = (
            self.put(np.zeros((B, width), np.int32)) for width in (P, P, N, N)
        )
        return dataclasses.replace(
            state, draft=draft, acceptance_BP=acceptance_BP, looked_BP=looked_BP, tried_BN=tried_BN, kept_BN=kept_BN
        )

    @property
    def grows(self) -> bool:
        """Whether caches begin small and grow, see ``course.capacities``."""
        return self.layout is None and jax.default_backend() == "cpu"

    def grow(self, state: DecodeState, capacity: int) -> DecodeState:
        """The same rows, with room for ``capacity`` positions each, whole pages."""
        return self._grow(state, more_pages=capacity // self.page_size - state.page_table_BM.shape[1])

    def _fresh_draft(self, state: DecodeState, program: Program) -> DraftState:
        """Of a head that has seen nothing: no pending position, an empty cache."""
        if (head := self.head_config) is None:
            raise ValueError("this decoder has no draft head to switch to")
        B, P, num_pages = len(state.finish_B), program.num_path, state.page_table_BM.size  # not the state: it is kept

        def create(length_B: jax.Array) -> DraftState:
            return DraftState(
                self._empty_cache(head, num_pages),
                jnp.zeros((B, P, head.feature_width), self.dtype),
                jnp.zeros((B, P), jnp.int32),
                jnp.zeros(B, jnp.int32),
                jnp.copy(length_B),  # a buffer of its own: both are donated
            )

        return self._created(("draft", B, P, num_pages), create, state.length_B)

    @property
    def row_shards(self) -> int:
        """What batches must be a multiple of."""
        return 1 if self.layout is None else self.layout.parts("rows")

    def put(self, value: np.ndarray | np.generic | jax.Array) -> jax.Array:
        """A copy of rows [B, ...] on the devices: states are donated, and a batch may be started twice."""
        return jnp.array(value) if self.layout is None else self.layout.put(value, sharding.rows_first(value))

    def empty_caches(self, B: int, program: Program, capacity: int) -> Caches:
        M = -(-capacity // self.page_size)
        head = self.head_config if program.drafts else None

        def create() -> Caches:
            return Caches(
                self._empty_cache(self.target_config, B * M),
                None if head is None else self._empty_cache(head, B * M),
                None if head is None else jnp.zeros((B, head.feature_width), self.dtype),
                jnp.arange(B * M, dtype=jnp.int32).reshape(B, M) % (B * M // self.row_shards),  # of the row's own shard
            )

        return self._created(("caches", B, M, program.drafts), create)

    def _empty_cache(self, config: BlockConfig, num_pages: int) -> KVCache:
        return KVCache.create(config, num_pages=num_pages, page_size=self.page_size, dtype=self.kv_cache_dtype)

    def _created[T](self, what: tuple, create: Callable[..., T], *args: jax.Array) -> T:
        """What ``create`` makes of ``args``, laid out; compiled once for all that are called ``what``."""
        if self.layout is not None and what not in self._creators:
            made = state_axes(jax.eval_shape(create, *args))
            shardings = jax.tree.map(self.layout.sharding, made, is_leaf=sharding.is_axes)
            self._creators[what] = jax.jit(create, out_shardings=shardings)
        return self._creators.get(what, create)(*args)

    def fill(
        self,
        caches: Caches,
        prompts: Sequence[np.ndarray],
        places: np.ndarray,
        *,
        attention: str,
        chunk: int,
        rows: int,
    ) -> Caches:
        """``caches`` with the prompts that have ``places`` in them, ``rows`` at a time. prompts: by place; where there
        is none it is as if it had one token."""
        B = len(caches.page_table_BM)
        if rows >= B:
            places = np.arange(B)  # as they lie, for rows may lie on several devices
        for first in range(0, len(places), rows):
            some = places[first : first + rows]
            row_R = np.pad(some, (0, min(rows, B) - len(some)), constant_values=B)  # there is no row B
            group = [prompts[i] if i < len(prompts) else np.zeros(1, np.int32) for i in row_R]
            length_R = np.array([len(p) for p in group], np.int32)
            num_chunks = -(-(int(length_R.max()) - 1) // chunk)
            token_RT = np.zeros((len(row_R), num_chunks * chunk + 1), np.int32)
            for row, prompt in zip(token_RT, group):
                row[: len(prompt)] = prompt
            for offset in range(0, num_chunks * chunk, chunk):
                args = (
                    caches,
                    self.put(token_RT[:, offset : offset + chunk + 1]),
                    self.put(row_R.astype(np.int32)),
                    self.put(np.int32(offset)),
                    self.put(length_R),
                )
                compiled = self._compiled("prefill", self._prefill, args, positions=chunk, attention=attention)
                caches = compiled(self.params, *args)
        return caches

    def insert(self, caches: Caches, rows: Caches, place_R: np.ndarray) -> Caches:
        """``caches`` with ``rows`` (see ``receive``) in the places [R] that they are given; those of no place fall."""
        args = caches, rows, self._everywhere(place_R.astype(np.int32), (None,))
        positions = rows.page_table_BM.shape[1] * self.page_size
        return self._compiled("insert", self._insert, args, positions=positions)(self.params, *args)

    def receive(self, rows: Caches) -> Caches:
        """Filled caches of a few rows, from other devices: on all of these, heads split as they are in caches."""
        return jax.tree.map(self._everywhere, rows, rows.whole_axes())

    def _everywhere(self, value: np.ndarray | jax.Array, axes: Axes) -> jax.Array:
        assert self.layout is not None, "who has workers is laid out"
        return jax.device_put(value, self.layout.sharding(axes))

    def launch(self, state: DecodeState, program: Program, most_rounds: int, least_running: int = 1) -> DecodeState:
        """Up to ``most_rounds`` rounds on the device, as long as ``least_running`` rows have not finished; returns at
        once, the state is a promise."""
        args = (state, self.put(np.int32(most_rounds)), self.put(np.int32(least_running)))
        compiled = self._compiled("decode", self.jitted_launch, args, positions=program.plan.num_nodes, program=program)
        return compiled(self.params, *args)


def precision_of(dtype: jnp.dtype, platform: str | None = None) -> str | None:
    """The precision, by JAX's name, that products need on a platform (the default one if None); None: as it stands.

    A GPU multiplies float32 in TF32 unless told otherwise, good to 5e-4, and errs otherwise for one node than for
    several: on an H100 3 of 10 texts of 256 tokens parted at near-ties (scripts/results/h100/smollm2.json). Decoding
    waits for weights, not for products. What the user has set stays.
    """
    wanted = jax.config.jax_default_matmul_precision is None and dtype == jnp.float32
    return "highest" if wanted and (platform or jax.default_backend()) != "cpu" else None


def _on_modules(function, *, definitions, layout: Layout | None, precision: str | None):
    """``function(target, head, ...)`` as a function of their parameters, for jit, traced for ``layout``."""

    def run(params, *args, **static):
        modules = (None if d is None else nnx.merge(d, p) for d, p in zip(definitions, params))
        exactly = contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)
        with exactly:
            return _laid_out(function, layout=layout)(*modules, *args, **static)

    return run


def _laid_out(function, *, layout: Layout | None):
    """``function``, of arrays that are laid out, as one whose results are; traced for ``layout``."""

    def run(*args, **static):
        with sharding.use(layout):
            result = function(*args, **static)
            return sharding.constrain(result, state_axes(result))  # as it came in: it is donated, and comes in again

    return run


def _settled(target: Llama, head: EagleHead, state: DecodeState, *, attention: str) -> DecodeState:
    assert state.draft is not None
    return dataclasses.replace(state, draft=settle(head, target, state.draft, state.prefix, attention=attention))


def _fitted(feature_BPX: jax.Array, token_BP: jax.Array, *, num_path: int) -> tuple[jax.Array, jax.Array]:
    """Pending rows padded with zeros or cut to P = ``num_path``."""
    more = (0, num_path - (kept := min(num_path, token_BP.shape[1])))
    return jnp.pad(feature_BPX[:, :kept], ((0, 0), more, (0, 0))), jnp.pad(token_BP[:, :kept], ((0, 0), more))


def _replaced(old, new, fresh_B: jax.Array):
    """``old``'s arrays [B, ...], where ``fresh_B`` those of ``new``."""
    return jax.tree.map(lambda a, b: jnp.where(fresh_B.reshape(-1, *[1] * (a.ndim - 1)), b, a), old, new)


def state_axes(state):
    """The logical axes of every array in caches or states: a cache knows its own, all else has rows first."""
    is_cache = lambda x: isinstance(x, KVCache)  # noqa: E731
    return jax.tree.map(lambda x: x.axes() if is_cache(x) else sharding.rows_first(x), state, is_leaf=is_cache)
