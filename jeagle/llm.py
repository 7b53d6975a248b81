"""``LLM``: strings in, strings out. With serving.py and results.py the only room that knows text, chat templates and
requests as users see them.

llm = LLM("models/smollm2-135m", draft="path/to/head")
for out in llm.generate(["Hello", "What is JAX?"], SamplingParams(max_tokens=64)):
    print(out.outputs[0].text, out.metrics.tokens_per_call)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jeagle import attention as attention_registry
from jeagle.checkpoint import DTYPES, load_config, load_head, load_llama
from jeagle.course import Course, Look
from jeagle.decode import Program
from jeagle.decoder import Decoder
from jeagle.dispatch import Dispatch, asked_tree, plans_of
from jeagle.distributed import explained, of_first_process
from jeagle.eagle import EagleHead
from jeagle.fp8 import FP8
from jeagle.host import keep_compiled_programs, take_memory
from jeagle.inputs import Message, Prompt, as_list, is_conversation, one_each, plain_ids
from jeagle.llama import Llama
from jeagle.locate import cache_directory, check_vocabulary, locate
from jeagle.outputs import RequestOutput
from jeagle.placement import copied, place
from jeagle.programs import CompiledProgram
from jeagle.requests import FULL_FORWARD, Row, bucket, check_prompt, chunk_sizes, make_batch, make_rows, queues, wanted
from jeagle.results import request_output
from jeagle.sampling import SamplingParams, resolve_sampler
from jeagle.serving import Finished, emitted, serve, spoken
from jeagle.sharding import Layout, Rules, fetch, make_mesh, worker_meshes
from jeagle.text import Detokenizer, encode, encode_chat, load_tokenizer
from jeagle.tree import OFF, TreePlan, parse_tree, tree_name
from jeagle.tree_table import Plans
from jeagle.verify import check_profile

__all__ = ["LLM"]

KV_CACHE_DTYPES = {"auto": None, "fp8": FP8, "fp8_e4m3": FP8}  # vLLM's names


class LLM:
    """A target, perhaps with an EAGLE head, ready to generate.

    Args:
      model: a converted checkpoint, an HF directory, a hub name or a .gguf file (the last three are converted once,
        into the cache directory), or a ``Llama`` module.
      draft: the same for the head, the name of one that comes with the package (``jeagle.heads.names()``), or an
        ``EagleHead`` module; None decodes plainly.
      tree: "auto" (at each batch size, greedy or sampled, the tree that its ``trees.json`` has for the head on such
        devices; else a chain of 3, the paper's choice at every batch size but the smallest, of 1 on a CPU), a name
        ("chain-5", "eagle-26", "dynamic", "dynamic-DEPTH-TOPK-TOTAL"), a list of paths of child ranks, a plan, or
        "dispatch", which measures several and uses the fastest; ``Dispatch`` says which and how. "+lookup" after a
        name: rows whose text repeats itself are drafted from it (``jeagle/lookup.py``), as with "auto"; "lookup-4"
        does that alone, for which no head is needed.
      dtype: "auto" (as stored), "float32", "bfloat16", or "fp8": matrices of 8 bits (``jeagle/weights.py``), of a
        checkpoint converted so. Heads are FP8 where converted so, else of the dtype the target computes in.
      max_model_len: most positions of prompt and output together; None takes the model's own limit.
      max_batch_size: rows decoded side by side; more prompts wait, and take the places of those that finish.
      rounds_per_launch: rounds the device runs before the host looks (progress, Ctrl-C).
      prefill_chunk: most prompt positions per forward; where it pads less a half or a quarter, 64 at least.
      page_size: cache positions per page.
      kv_cache_dtype: "auto" (the model's) or "fp8" (float8_e4m3fn with a scale per position and kv head; also called
        "fp8_e4m3"), for the target's cache and the head's.
      tensor_parallel_size: devices that share every layer. data_parallel_size: groups of them that share the rows.
      prefill_workers: further groups of tensor_parallel_size devices, with weights of their own, that fill prompts into
        caches while the others decode (``jeagle/disaggregated.py``).
      draft_sharding: "tensor" splits the head as it does the target, "replicated" gives it to every device whole.
      expert_sharding: of Llama 4's routed experts, "mlp" splits each, "experts" deals whole ones out.
      attention: implementation, see ``jeagle.attention``. sampler: likewise, see ``jeagle.sampling.choose``.
      synthetic_acceptance: for measuring only: the text is not the target's. Probabilities that a draft of depth 1, 2,
        .. is kept given that the one before it was; see ``verify.force`` and ``verify.constant_profile``.
      cache_dir: where conversions and compiled programs are kept; None takes $JEAGLE_CACHE or ~/.cache/jeagle.

    Raises ValueError (CheckpointError, ConversionError among them) with one sentence that says what to mend.
    """

    @explained("take dtype='fp8', or split the model with tensor_parallel_size: `jeagle plan` says what fits")
    def __init__(
        self,
        model: str | Path | Llama,
        draft: str | Path | EagleHead | None = None,
        *,
        tree: str | TreePlan | Sequence[Sequence[int]] | Dispatch = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_batch_size: int = 8,
        rounds_per_launch: int = 64,
        prefill_chunk: int = 256,
        page_size: int = 64,
        kv_cache_dtype: str = "auto",
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        prefill_workers: int = 0,
        draft_sharding: str = "tensor",
        expert_sharding: str = "mlp",
        attention: str = "auto",
        sampler: str = "auto",
        synthetic_acceptance: Sequence[float] | None = None,
        cache_dir: str | Path | None = None,
    ):
        for name, given, module in (("model", model, Llama), ("draft", draft, EagleHead)):
            if not isinstance(given, (str, Path, module)) and not (name == "draft" and given is None):
                kinds = f"a path, a hub name or of type {module.__name__}"
                raise ValueError(f"{name} must be {kinds}, got {type(given).__name__}")
        for name, value in dict(
            max_batch_size=max_batch_size,
            rounds_per_launch=rounds_per_launch,
            prefill_chunk=prefill_chunk,
            page_size=page_size,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            prefill_workers=prefill_workers,
            **({} if max_model_len is None else {"max_model_len": max_model_len}),
        ).items():
            least = 0 if name == "prefill_workers" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if dtype not in ("auto", *DTYPES):  # asked before anything is converted
            raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
        if kv_cache_dtype not in tuple(KV_CACHE_DTYPES):
            raise ValueError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {kv_cache_dtype!r}")
        profile = None if synthetic_acceptance is None else check_profile(synthetic_acceptance)
        take_memory()
        attention_registry.resolve(attention)
        if resolve_sampler(sampler, whole=tensor_parallel_size == 1) == "pallas" and tensor_parallel_size > 1:
            raise ValueError("sampler 'pallas' reads whole vocabularies; with tensor_parallel_size > 1 use 'xla'")
        rules = Rules.choose(draft=draft_sharding, experts=expert_sharding)
        devices = data_parallel_size, tensor_parallel_size
        layout = None if devices == (1, 1) and not prefill_workers else Layout(make_mesh(*devices), rules)
        workers = [] if layout is None else [Layout(m, rules) for m in worker_meshes(layout.mesh, prefill_workers)]
        cache = cache_directory(cache_dir)
        asked = asked_tree(tree)
        keep_compiled_programs(cache / "xla")

        self._checkpoint: Path | None = None
        head_directory: Path | None = None
        if isinstance(model, Llama):
            limit = model.config.max_position
        else:
            # FP8 is made when a model is converted, all else when it is loaded.
            self._checkpoint = locate(model, cache, kind="llama", dtype="fp8" if dtype == "fp8" else "auto")
            limit = load_config(self._checkpoint).max_position
        if draft is not None and not isinstance(draft, EagleHead):
            head_directory = locate(draft, cache, kind="eagle", target=self._checkpoint)
            check_vocabulary(head_directory, self._checkpoint)
        if draft is None:
            plan = _served(asked, draft) if isinstance(asked, TreePlan) else OFF
            self._plans, self.dispatcher = Plans.always(plan), None
        else:
            self._plans, self.dispatcher = plans_of(asked, head_directory, devices, cache / "costs")
        if profile is not None and not (self._plans.largest.levels or self.dispatcher):
            raise ValueError("synthetic_acceptance forces what a head drafts: give a draft, and a tree that drafts")
        self.synthetic_acceptance = profile
        if max_model_len is not None and max_model_len > limit:
            raise ValueError(f"max_model_len must lie in 1..{limit}, the model's positions, got {max_model_len}")
        self.max_model_len = max_model_len or limit

        if isinstance(model, Llama):
            target = model if layout is None else place(model, layout)
        else:
            assert self._checkpoint is not None
            target = load_llama(self._checkpoint, dtype=dtype, layout=layout)
        target.check_chunk(prefill_chunk)
        head = draft if isinstance(draft, EagleHead) else None
        if head_directory is not None:
            head = load_head(head_directory, target, layout=layout)
        elif head is not None and layout is not None:
            head = place(head, layout)
        self.config = target.config
        self._max_batch_size = max_batch_size
        self._rounds_per_launch = rounds_per_launch
        self._chunks = [size for size in chunk_sizes(prefill_chunk) if _fits(target, size)]
        self._attention, self._sampler = attention, sampler
        caches = dict(page_size=page_size, kv_cache_dtype=KV_CACHE_DTYPES[kv_cache_dtype])
        self._decoder = Decoder(target, head, **caches, layout=layout)
        self._workers = [
            Decoder(copied(target, there), None if head is None else copied(head, there), **caches, layout=there)
            for there in workers
        ]
        self.dtype = self._decoder.dtype
        self._tokenizer: Any = None

    @property
    def plan(self) -> TreePlan:
        """The tree that is drafted; of several, for different batch sizes, the largest, and of those that a dispatcher
        chooses from the largest that drafts."""
        return self._plans.largest

    @plan.setter
    def plan(self, plan: TreePlan) -> None:
        self._plans, self.dispatcher = Plans.always(_served(parse_tree(plan), self._decoder.head_config)), None

    def plan_for(self, batch: int, *, sampled: bool = False) -> TreePlan:
        """The tree for so many rows; sampled: whether any of them has a temperature."""
        return self._plans.at(batch, sampled)

    @property
    def checkpoint(self) -> Path | None:
        """The target's converted directory; None for one given as a module."""
        return self._checkpoint

    @property
    def max_batch_size(self) -> int:
        return self._max_batch_size

    @property
    def has_tokenizer(self) -> bool:
        """Whether strings can be given and are returned; else prompts are token ids and texts empty."""
        names = ("tokenizer.json", "tokenizer.model")
        return self._checkpoint is not None and any((self._checkpoint / name).exists() for name in names)

    @property
    def tokenizer(self):
        """The checkpoint's transformers tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._with_tokenizer("give prompts as lists of token ids"))
        return self._tokenizer

    def _with_tokenizer(self, instead: str) -> Path:
        if self._checkpoint is not None and self.has_tokenizer:
            return self._checkpoint
        raise ValueError(f"{self._checkpoint or 'a module'} has no tokenizer: {instead}, or add tokenizer files")

    @property
    def compiled_programs(self) -> list[CompiledProgram]:
        """Every compiled bucket so far, with its shapes and the seconds it took."""
        return [program for decoder in (self._decoder, *self._workers) for program in decoder.programs]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculative: bool = True,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for any number of prompts: strings, lists of token ids, or one of either.

        ``speculative=False`` runs the plain program; the tokens are the same (in float32: see the README's guarantee).
        """
        listed = as_list(prompts)
        params = one_each(sampling_params, len(listed))
        # A tokenizer that is damaged, or missing where stop strings need it, is said before anything runs.
        if any(p.stop for p in params):
            self._with_tokenizer("give stop_token_ids instead of stop strings")
        tokenizer = self.tokenizer if self.has_tokenizer else None
        ids = [self._encode(prompt, p, index) for index, (prompt, p) in enumerate(zip(listed, params, strict=True))]
        rows = make_rows(ids, params, self.config.eos_token_ids)
        done: dict[tuple[int, int], Finished] = {}
        shown = use_tqdm and jax.process_index() == 0
        with explained(), tqdm(total=len(rows), desc="generate", unit="row", disable=None if shown else True) as bar:
            for queue in queues(rows, self._max_batch_size):
                for finished in self._serve(queue, speculative, bar):
                    done[finished.row.request, finished.row.sample] = finished
        return [
            request_output(
                prompt if isinstance(prompt, str) else None,
                prompt_ids,
                [done[i, sample] for sample in range(p.n)],
                tokenizer,
            )
            for i, (prompt, prompt_ids, p) in enumerate(zip(listed, ids, params, strict=True))
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculative: bool = True,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """``generate`` for one conversation or several, through the checkpoint's chat template."""
        listed = [messages] if is_conversation(messages) or not isinstance(messages, (list, tuple)) else messages
        prompts = [self.apply_chat_template(m) for m in listed]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, speculative=speculative, use_tqdm=use_tqdm)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        speculative: bool = True,
    ) -> Iterator[str]:
        """Yield text as it is decided, round by round: whole characters only, nothing of a stop string.

        A list of messages goes through the chat template. Joined, the pieces are ``generate``'s text.
        """
        if is_conversation(prompt):
            prompt = self.apply_chat_template(prompt)  # type: ignore[arg-type]
        (params,) = one_each(sampling_params, 1)
        if params.n != 1:
            raise ValueError(f"stream gives one text; n must be 1, got {params.n}")
        self._with_tokenizer("use generate, as a stream is of text")
        row = make_rows([self._encode(plain_ids(prompt), params, 0)], [params], self.config.eos_token_ids)[0]
        return self._stream(row, self.tokenizer, speculative)

    def _stream(self, row: Row, tokenizer, speculative: bool) -> Iterator[str]:
        text = Detokenizer(tokenizer, row.params.stop, row.prompt)
        with explained():
            course = self._course([row], speculative)
            course.seat(make_batch({0: row}, course.bucket), np.arange(1))
        sent = 0
        while True:
            with explained():
                look = course.advance(1)
                # Read whole and cut here: slices of device arrays would be compiled, one program per length.
                text_BS = fetch(course.state.text_BS)
            count, finished = int(look.num_output_B[0]), bool(look.finish_B[0])
            piece = text.push(spoken(row, emitted(text_BS[0], row, count, sent), look.finish_B[0]))
            sent = count
            finished = finished or text.stop_reason is not None
            if finished:
                piece += text.finish()
            if piece:
                yield piece
            if finished:
                course.log()
                return

    def apply_chat_template(self, messages: Sequence[Message], *, today: date | None = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins to speak. today: for templates that print the
        date; None: this day's, process 0's where there are several."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self._checkpoint} has no chat template; use generate() with a formatted prompt")
        if not is_conversation(messages):
            raise ValueError(f'a conversation is a list of {{"role": ..., "content": ...}} messages, got {messages!r}')
        if today is None and jax.process_count() > 1:  # clocks differ, and then so do prompts
            today = date.fromordinal(int(of_first_process(np.int32(date.today().toordinal()))))
        return encode_chat(self.tokenizer, list(messages), today=today)

    def _encode(self, prompt: Prompt, params: SamplingParams, index: int) -> list[int]:
        """A prompt's ids, checked."""
        ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        bounds = dict(vocab_size=self.config.vocab_size, positions=self.config.max_position)
        return check_prompt(ids, params, index=index, limit=self.max_model_len, **bounds)

    def _course(self, rows: Sequence[Row], speculative: bool) -> Course:
        """What serves rows of one queue."""
        decoder = self._decoder
        full = FULL_FORWARD.get(jax.default_backend(), FULL_FORWARD["gpu"])
        sizes = dict(page_size=decoder.page_size, limit=self.max_model_len, full=full, shards=decoder.row_shards)
        prefill_shards = 1 if self._workers else decoder.row_shards
        shapes = bucket(rows, self._max_batch_size, chunks=self._chunks, prefill_shards=prefill_shards, **sizes)
        filters, num_logprobs = wanted(rows, self.config.vocab_size)
        plan = self.plan_for(shapes.batch, sampled=filters.sample) if speculative else OFF
        dispatcher = self.dispatcher if speculative else None
        may_draft = any(p.levels for p in ((plan,) if dispatcher is None else dispatcher.plans))
        profile = self.synthetic_acceptance if may_draft else None
        program = Program(plan, filters, num_logprobs, self._attention, self._sampler, profile)
        return Course(decoder, program, shapes, dispatcher, self._workers)

    def _serve(self, queue: list[Row], speculative: bool, bar: tqdm) -> Iterator[Finished]:
        """Generate for rows that take turns in one batch."""
        course, began = self._course(queue, speculative), time.perf_counter()
        tokens = rounds = 0  # of rows that have finished

        def watch(look: Look) -> None:
            running = look.finish_B == 0
            all_tokens, all_rounds = (n + x[running].sum() for n, x in zip((tokens, rounds), look[1:], strict=True))
            rate = all_tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{rate:.1f} tok/s, {all_tokens / max(1, all_rounds):.2f} tok/call")

        def detokenizer(row: Row) -> Detokenizer | None:
            return Detokenizer(self.tokenizer, row.params.stop, row.prompt) if row.params.stop else None

        places = min(course.bucket.batch, self._max_batch_size)
        for finished in serve(course, queue, places, self._rounds_per_launch, detokenizer, watch):
            tokens, rounds = tokens + finished.num_emitted, rounds + finished.num_rounds
            bar.update()
            yield finished


def _fits(target: Llama, chunk: int) -> bool:
    """Whether prompts may be filled in such chunks."""
    try:
        target.check_chunk(chunk)
    except ValueError:
        return False
    return True


def _served(plan: TreePlan, head: Any) -> TreePlan:
    """``plan``, if that can be drafted: by a head, or without one by lookups alone."""
    if head is None and plan.levels:
        raise ValueError(f"tree {tree_name(plan)!r} needs a head: give a draft, or take 'lookup-K'")
    return plan
