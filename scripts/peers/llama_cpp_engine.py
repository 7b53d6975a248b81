"""llama.cpp through llama-cpp-python's C API: every prompt a sequence of one context. Run by bench_peers.py.

The high-level ``Llama`` decodes one sequence at a time; batches need ``llama_decode`` over several, as llama.cpp's own
``batched`` example has it. Greedy: the best logit, found by numpy.
"""

import ctypes

from protocol import serve


def load(request):
    import llama_cpp
    import numpy as np

    if not request["gguf"]:
        raise ValueError("llama.cpp reads GGUF files: give --gguf, made of the same weights")
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(request["gguf"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp cannot load {request['gguf']}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = request["positions"] * request["batch"]
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = request["batch"]
    params.n_threads = params.n_threads_batch = request["threads"]
    if request["dtype"] == "float32":
        params.type_k = params.type_v = 0  # GGML_TYPE_F32: caches of the weights' dtype, as the others have
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise ValueError("llama.cpp cannot make a context of this size")
    memory = llama_cpp.llama_get_memory(context)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def run(entries):
        """entries: (token, position, sequence, whether its logits are wanted); returns the best tokens, in order."""
        found = []
        for start in range(0, len(entries), params.n_batch):
            part = entries[start : start + params.n_batch]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
            if code := llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {code}")
            for i, (_, _, _, wanted) in enumerate(part):
                if wanted:
                    logits = llama_cpp.llama_get_logits_ith(context, i)
                    values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocab_size,))
                    found.append(int(values.argmax()))
        return found

    def generate(prompts, max_tokens, lookup):
        llama_cpp.llama_memory_clear(memory, True)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        best = run(entries)
        ids = [[token] for token in best]
        for step in range(1, max_tokens):
            best = run([(t, len(p) + step - 1, s, True) for s, (t, p) in enumerate(zip(best, prompts))])
            for answer, token in zip(ids, best):
                answer.append(token)
        return ids, None

    return generate, {"llama_cpp": llama_cpp.__version__}


if __name__ == "__main__":
    serve(load)
