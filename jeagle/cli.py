"""The ``jeagle`` command: generate, chat, demo, plan."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jeagle import __version__
from jeagle.plan_command import add_arguments

if TYPE_CHECKING:
    from jeagle.llm import LLM
    from jeagle.sampling import SamplingParams

DEMO_MODEL = Path("models/smollm2-135m")
DEMO_HEAD = "smollm2-135m-eagle3"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    if getattr(args, "verbose", False):
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("jeagle").setLevel(logging.INFO)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jeagle", description="EAGLE speculative decoding for Llama in JAX.")
    parser.add_argument("--version", action="version", version=f"jeagle {__version__}")
    commands = parser.add_subparsers(required=True, metavar="generate|chat|demo|plan")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--model", default=str(DEMO_MODEL), help="converted checkpoint, HF directory, hub name or .gguf"
    )
    shared.add_argument(
        "--draft", help=f"EAGLE head, in the same forms or by name ({DEMO_HEAD}); left out: plain decoding"
    )
    shared.add_argument(
        "--tree",
        default="auto",
        help="auto, chain-K, bush-8, eagle-26, dynamic[-D-K-N], any +lookup, lookup-K, off, dispatch",
    )
    shared.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "fp8"])
    shared.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"], help="fp8: caches of 8 bits")
    shared.add_argument("--tensor-parallel-size", type=int, default=1, help="devices that share every layer")
    shared.add_argument("--data-parallel-size", type=int, default=1, help="groups of them that share the rows")
    shared.add_argument("--max-model-len", type=int, help="most positions of prompt and output together")
    shared.add_argument("--max-tokens", type=int, default=256, help="of the text; 256 unless given")
    shared.add_argument("--temperature", type=float, help="0, unless given, is greedy")
    shared.add_argument("--top-k", type=int, default=0)
    shared.add_argument("--top-p", type=float, default=1.0)
    shared.add_argument("--min-p", type=float, default=0.0)
    shared.add_argument("--seed", type=int, help="the text depends on the seed and the model alone")
    shared.add_argument("--verbose", action="store_true", help="say which trees are chosen, and what each served")
    shared.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the text before TEXT")

    generate = commands.add_parser("generate", parents=[shared], help="continue a prompt")
    generate.add_argument("prompt", help="text, or - for standard input")
    generate.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    generate.add_argument(
        "--distributed", action="store_true", help="several processes, as SLURM, MPI or Kubernetes say"
    )
    generate.add_argument("--coordinator", metavar="HOST:PORT", help="the same without them: where process 0 listens")
    generate.add_argument("--num-processes", type=int, help="how many processes run this command")
    generate.add_argument("--process-id", type=int, help="which of them this is: 0, 1, ..; 0 prints")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", parents=[shared], help="talk; an empty line or Ctrl-D ends")
    chat.add_argument("--system", help="system message")
    chat.set_defaults(run=_chat)

    demo = commands.add_parser("demo", help="SmolLM2-135M-Instruct with and without speculation")
    demo.add_argument("--model", type=Path, default=DEMO_MODEL, help="where the model is, or is to be put")
    demo.add_argument("--draft", default=DEMO_HEAD, help=f"EAGLE head ({DEMO_HEAD}, which comes with the package)")
    demo.add_argument("--tree", default="auto")
    demo.add_argument("--max-tokens", type=int, default=64)
    demo.set_defaults(run=_demo)

    plan = commands.add_parser("plan", help="what a model needs and how fast it can be on GPUs not yet rented")
    add_arguments(plan)
    return parser


def _load(args: argparse.Namespace) -> LLM:
    if args.model == str(DEMO_MODEL) and not DEMO_MODEL.exists():
        raise ValueError(
            f"{DEMO_MODEL}, the default model, is not here; `jeagle demo` fetches it, --model names another"
        )
    from jeagle.llm import LLM

    return LLM(
        args.model,
        args.draft,
        tensor_parallel_size=args.tensor_parallel_size,
        data_parallel_size=args.data_parallel_size,
        tree=args.tree,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len,
    )


def _params(args: argparse.Namespace) -> SamplingParams:
    from jeagle.sampling import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        **({} if args.temperature is None else {"temperature": args.temperature}),
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
    )


def _print_stream(pieces) -> str:
    """Print pieces as they come; returns the whole."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _generate(args: argparse.Namespace) -> int:
    params = _params(args)  # wrong parameters are said before a model is loaded
    joining = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed or any(value is not None for value in joining):
        from jeagle import distributed

        distributed.connect(*joining)
    from jax import process_count, process_index

    if args.prompt == "-" and process_count() > 1:  # mpirun hands it to the first process alone
        raise ValueError("standard input reaches one process only; give the prompt as an argument")
    llm = _load(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    templated = not args.raw and llm.tokenizer.chat_template
    pieces = llm.stream([{"role": "user", "content": prompt}] if templated else prompt, params)
    if process_index():  # all compute, the first one prints
        for _ in pieces:
            pass
    else:
        _print_stream(pieces)
    return 0


def _chat(args: argparse.Namespace) -> int:
    params = _params(args)
    llm = _load(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return 0
        if not said:
            return 0
        messages.append({"role": "user", "content": said})
        try:
            answer = _print_stream(llm.stream(messages, params))
        except KeyboardInterrupt:  # Ctrl-C ends the answer, not the conversation
            print()
            messages.pop()
            continue
        except ValueError as error:  # outgrown the context: a shorter message may still fit
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _demo(args: argparse.Namespace) -> int:
    from jeagle.demo import demo

    return demo(args.model, args.draft, tree=args.tree, max_tokens=args.max_tokens)


if __name__ == "__main__":
    sys.exit(main())
