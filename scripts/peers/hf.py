"""HF transformers: ``generate`` with its dynamic cache, plainly or with prompt lookup. Run by bench_peers.py."""

from protocol import serve


def load(request):
    import torch
    import transformers

    torch.set_num_threads(request["threads"])
    transformers.utils.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, request["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype, local_files_only=True)
    model = model.to(device).eval()
    # EOS is a token like any other. Asked of generate, None would mean the model's own.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def generate(prompts, max_tokens, lookup):
        # Padding on the left, as generate wants it; masked, so the texts do not see it.
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        options = {"prompt_lookup_num_tokens": lookup} if lookup else {}
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=0,
                **options,
            )
        return out[:, width:].tolist(), None

    return generate, versions


if __name__ == "__main__":
    serve(load)
