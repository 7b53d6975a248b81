"""EAGLE heads in plain float64 numpy, written from the papers, and tiny checkpoints named as the public ones are.

Nothing here knows jeagle. The reference keeps no cache: every drafting step runs the whole sequence again, which causal
attention makes equal to any cache. arXiv:2401.15077 (EAGLE-1), arXiv:2503.01840 (EAGLE-3), arXiv:2508.08192 (the
multi-layer dense head). ``weights`` have the checkpoint's names, ``config`` is its config.json.
"""

from __future__ import annotations

import numpy as np

VOCAB, DRAFT_VOCAB, WIDTH, TARGET_LAYERS = 61, 20, 32, 8


# The algorithms


def shift(tokens, features):
    """The first-token shift: feature i goes with token i+1. n features need n+1 tokens."""
    assert len(tokens) == len(features) + 1
    return list(tokens[1:]), list(features)


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x, theta):
    """x [T, N, H] at positions 0..T-1, the half-split layout of HF checkpoints."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] / theta ** (np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )


def block(w, c, layer, x, attn_input):
    """Causal grouped-query attention over ``attn_input`` and a gated MLP, both added to the residual stream x."""
    T, N, K = len(x), c["num_attention_heads"], c["num_key_value_heads"]
    name = f"layers.{layer}"
    q, k, v = ((attn_input @ w[f"{name}.self_attn.{p}_proj.weight"].T).reshape(T, -1, c["head_dim"]) for p in "qkv")
    q, k = rotate(q, c["rope_theta"]), rotate(k, c["rope_theta"])
    k, v = (np.repeat(a, N // K, axis=1) for a in (k, v))
    score = np.einsum("tnh,snh->nts", q, k) / np.sqrt(c["head_dim"])
    score = np.where(np.tril(np.ones((T, T), bool)), score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    x = x + np.einsum("nts,snh->tnh", weight, v).reshape(T, -1) @ w[f"{name}.self_attn.o_proj.weight"].T
    h = rms(x, w[f"{name}.post_attention_layernorm.weight"], c["rms_norm_eps"])
    gate, up = h @ w[f"{name}.mlp.gate_proj.weight"].T, h @ w[f"{name}.mlp.up_proj.weight"].T
    return x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T


def eagle1(w, c, embedding, tokens, features):
    """EAGLE-1/2; HASS's norms, Meta's input norm and final norm where the checkpoint has them."""
    e, f = embedding[tokens], np.stack(features)
    if "embedding_layernorm.weight" in w:
        e = rms(e, w["embedding_layernorm.weight"], c["rms_norm_eps"])
        f = rms(f, w["hidden_states_layernorm.weight"], c["rms_norm_eps"])
    x = np.concatenate([e, f], axis=-1) @ w["fc.weight"].T + w.get("fc.bias", 0)
    for layer in range(c["num_hidden_layers"]):
        scale = w.get(f"layers.{layer}.input_layernorm.weight")
        x = block(w, c, layer, x, x if scale is None else rms(x, scale, c["rms_norm_eps"]))
    if "norm.weight" in w:  # Meta: the normed output is what the LM head and the next step read
        x = rms(x, w["norm.weight"], c["rms_norm_eps"])
    return x, x


def fuse(w, c, taps):
    """EAGLE-3's g = fc [low; middle; high]; 3.1 norms each tap, gpt-oss heads norm all at once."""
    taps = np.stack(taps)
    if c.get("fc_norm"):
        parts = np.split(taps, 3, axis=-1)
        taps = np.concatenate(
            [rms(p, w[f"fc_norm.{i}.weight"], c["rms_norm_eps"]) for i, p in enumerate(parts)], axis=-1
        )
    if c.get("norm_before_fc"):
        taps = rms(taps, w["input_norm.weight"], c["rms_norm_eps"])
    return list(taps @ w["fc.weight"].T)


def eagle3(w, c, embedding, tokens, features):
    """``features`` are fused already, or the head's own."""
    g, eps = np.stack(features), c["rms_norm_eps"]
    e = rms(embedding[tokens], w["layers.0.input_layernorm.weight"], eps)
    h = rms(g, w["layers.0.hidden_norm.weight"], eps)
    x = block(w, c, 0, h if c.get("norm_before_residual") else g, np.concatenate([e, h], axis=-1))
    for layer in range(1, c["num_hidden_layers"]):
        x = block(w, c, layer, x, rms(x, w[f"layers.{layer}.input_layernorm.weight"], eps))
    out = rms(x, w["norm.weight"], eps)
    return out, (out if c.get("norm_output") else x)


def draft(config, weights, target_embedding, target_lm_head, tokens, features, steps):
    """Prompt logits [n, W], then ``steps`` greedy drafting steps: logits [steps, W] and the tokens fed [steps].

    ``tokens``: the prompt and the token the target chose after it, n+1 ids. ``features``: the target's, n rows.
    """
    c = {"norm_before_residual": False, **config, **config.get("transformer_layer_config", {})}
    w = {n.removeprefix("model.").replace("midlayer.", "layers.0."): a.astype(np.float64) for n, a in weights.items()}
    embedding = w.get("embed_tokens.weight", target_embedding)
    lm_head = w.get("lm_head.weight", target_lm_head)
    forward, fused = (eagle3, fuse(w, c, features)) if "layers.0.hidden_norm.weight" in w else (eagle1, features)
    row_tokens, row_features = shift(tokens, fused)
    hidden, feature = forward(w, c, embedding, row_tokens, row_features)
    prompt_logits, step_logits, fed = hidden @ lm_head.T, [], []
    logits = prompt_logits[-1]
    for _ in range(steps):
        token = int(np.argmax(logits))
        token += int(weights["d2t"][token]) if "d2t" in weights else 0
        row_tokens.append(token)
        row_features.append(feature[-1])  # drafted rows feed on the head's own feature
        hidden, feature = forward(w, c, embedding, row_tokens, row_features)
        logits = hidden[-1] @ lm_head.T
        step_logits.append(logits)
        fed.append(token)
    return prompt_logits, np.array(step_logits), fed


# Tiny checkpoints


class Tensors:
    """A checkpoint in memory, as the converter reads one."""

    def __init__(self, weights):
        self.weights = weights

    def names(self):
        return self.weights.keys()

    def shape(self, name):
        return self.weights[name].shape

    def read(self, name):
        return self.weights[name]


LLAMA = {
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "vocab_size": VOCAB,
}


def block_shapes(name, input_width=WIDTH, norms=("input_layernorm", "post_attention_layernorm")):
    shapes = {f"{name}.{n}.weight": (WIDTH,) for n in norms}
    for p, rows in (("q", 32), ("k", 16), ("v", 16)):
        shapes[f"{name}.self_attn.{p}_proj.weight"] = (rows, input_width)
    shapes[f"{name}.self_attn.o_proj.weight"] = (WIDTH, 32)
    shapes |= {f"{name}.mlp.{p}_proj.weight": (48, WIDTH) for p in ("gate", "up")}
    return shapes | {f"{name}.mlp.down_proj.weight": (WIDTH, 48)}


def first_shapes(name):
    """EAGLE-3's first block."""
    return block_shapes(name, 2 * WIDTH, ("hidden_norm", "input_layernorm", "post_attention_layernorm"))


def checkpoint(form, seed=0, **overrides):
    """(config.json, weights) of a head of the named form."""
    embed, head = {"embed_tokens.weight": (VOCAB, WIDTH)}, {"lm_head.weight": (DRAFT_VOCAB, WIDTH)}
    fc1, fc3, final = {"fc.weight": (WIDTH, 2 * WIDTH)}, {"fc.weight": (WIDTH, 3 * WIDTH)}, {"norm.weight": (WIDTH,)}
    no_norm = ("post_attention_layernorm",)
    eagle3_llama = {**LLAMA, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_VOCAB}
    speculators = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": DRAFT_VOCAB,
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "transformer_layer_config": LLAMA,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "tiny"}},
    }
    if form == "eagle1":
        config, shapes = {**LLAMA, "bias": False}, {**embed, **fc1, **block_shapes("layers.0", norms=no_norm)}
    elif form == "hass":
        config = {**LLAMA, "bias": True}
        shapes = {**embed, **fc1, "fc.bias": (WIDTH,), **block_shapes("layers.0", norms=no_norm)}
        shapes |= {"embedding_layernorm.weight": (WIDTH,), "hidden_states_layernorm.weight": (WIDTH,)}
    elif form == "eagle3":
        config = {k: v for k, v in eagle3_llama.items() if k != "draft_vocab_size"}
        shapes = {**fc3, **first_shapes("midlayer"), **final, "lm_head.weight": (VOCAB, WIDTH)}
    elif form == "eagle3_wider_target":
        config = {**eagle3_llama, "target_hidden_size": 48, "num_hidden_layers": 2}
        shapes = {**embed, "fc.weight": (WIDTH, 144), **first_shapes("midlayer"), **block_shapes("layers.1")}
        shapes |= {**final, **head}
    elif form == "speculators":
        config = {**speculators, "norm_before_fc": True}
        shapes = {**embed, **fc3, "input_norm.weight": (3 * WIDTH,), **first_shapes("layers.0"), **final, **head}
    elif form == "eagle31":
        config = {**speculators, "norm_before_residual": False, "fc_norm": True, "norm_output": True}
        shapes = {**fc3, **{f"fc_norm.{i}.weight": (WIDTH,) for i in range(3)}, **first_shapes("layers.0")}
        shapes |= {**final, **head}
    elif form == "speculators_eagle1":
        config = {"speculators_model_type": "eagle", "fusion_bias": False, "transformer_layer_config": LLAMA}
        shapes = {"fusion_fc.weight": (WIDTH, 2 * WIDTH), **block_shapes("transformer", norms=no_norm)}
    elif form == "modelopt":
        nested = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
        nested |= {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": None}
        config = {**eagle3_llama, "eagle_config": nested}
        shapes = {**fc3, **first_shapes("layers.0"), **final, **head}
    elif form == "specforge":
        nested = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
        config = {**eagle3_llama, "eagle_config": nested}
        shapes = {**fc3, **first_shapes("midlayer"), **final, **head}
        shapes = {f"model.{n}" if n != "lm_head.weight" else n: s for n, s in shapes.items()}
    elif form == "meta":
        config = {**LLAMA, "num_hidden_layers": 2}
        shapes = {**fc1, **block_shapes("layers.0"), **block_shapes("layers.1"), **final}
        shapes = {f"model.{n}": s for n, s in shapes.items()}
    else:
        raise ValueError(form)

    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape)
        weights[name] = (1 + 0.3 * noise if "norm.weight" in name else 0.18 * noise).astype(np.float32)
    if weights.get("lm_head.weight", np.zeros((0, 0))).shape[0] == DRAFT_VOCAB:
        ids = np.sort(rng.permutation(VOCAB)[:DRAFT_VOCAB])
        weights["d2t"] = ids - np.arange(DRAFT_VOCAB)
        weights["t2d"] = np.isin(np.arange(VOCAB), ids)
    return {**config, **overrides}, weights


FORMS = (
    "eagle1",
    "hass",
    "eagle3",
    "eagle3_wider_target",
    "speculators",
    "eagle31",
    "speculators_eagle1",
    "modelopt",
    "specforge",
    "meta",
)
