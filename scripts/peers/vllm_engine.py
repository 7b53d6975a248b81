"""vLLM's offline engine, plain or drafting with an EAGLE-3 head. Run by bench_peers.py; how it drafts is set when it
loads, so each way takes an engine of its own. Prompt lookup, its ngram method, is not asked for."""

from protocol import serve


def load(request):
    import os

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; else half of the machine's memory
    import vllm

    head = request["head"]
    drafting = {"model": head, "method": "eagle3", "num_speculative_tokens": request["drafts"]} if head else None
    engine = vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=request["positions"],
        max_num_seqs=request["batch"],
        enable_prefix_caching=False,  # the same prompts come again, and are to be read again
        speculative_config=drafting,
        disable_log_stats=head is None,  # rounds are counted among them
    )

    def rounds():
        found = [m.value for m in engine.get_metrics() if m.name == "vllm:spec_decode_num_drafts"]
        return sum(found)

    def generate(prompts, max_tokens, lookup):
        params = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        before = rounds() if head else 0
        outputs = engine.generate(asked, params, use_tqdm=False)
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        return ids, rounds() - before if head else None

    return generate, {"vllm": vllm.__version__}


if __name__ == "__main__":
    serve(load)
