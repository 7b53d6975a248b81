"""vLLM's offline engine, plain. Run by bench_peers.py; drafts by prompt lookup are its ngram method, set when it loads,
so there they would need a second engine and are not asked for."""

from protocol import serve


def load(request):
    import os

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; else half of the machine's memory
    import vllm

    engine = vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=request["positions"],
        max_num_seqs=request["batch"],
        enable_prefix_caching=False,  # the same prompts come again, and are to be read again
        disable_log_stats=True,
    )

    def generate(prompts, max_tokens, lookup):
        params = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(asked, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, {"vllm": vllm.__version__}


if __name__ == "__main__":
    serve(load)
