"""The head that comes with the package: found by name, small, described, and as good in decoding as in training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.export import export
from jeagle import LLM, SamplingParams, heads
from jeagle.checkpoint import load_config, load_eagle, load_llama, read_source
from jeagle.locate import locate
from jeagle.text import vocabulary_hash
from jeagle.training.packing import Rows
from jeagle.training.unroll import packed_attention, unroll

NAME = "smollm2-135m-eagle3"
DEPTH = 3


def test_it_is_found_by_name(tmp_path):
    assert heads.names() == [NAME]
    directory = heads.find(NAME)
    assert locate(NAME, tmp_path, kind="eagle") == directory
    assert heads.find("no-such-head") is None


def test_it_is_small_and_says_where_it_comes_from():
    directory = heads.find(NAME)
    size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
    assert size <= 20e6
    card = (directory / "README.md").read_text()
    for word in ("Data", "Steps", "Device", "train_head.py", "MT-Bench", "HumanEval", "GSM8K", "temperature"):
        assert word.lower() in card.lower()
    config = load_config(directory)
    assert (config.tap_norm, config.norm_output) == ("each", True)  # EAGLE-3.1
    assert 4096 <= config.draft_vocab_size <= 16384


@pytest.mark.parametrize("form", ["speculators", "eagle"])
def test_it_goes_out_and_comes_back_bit_equal(tmp_path, form, smollm2_dir):
    from convert import convert

    export(heads.find(NAME), tmp_path / "hf", verifier="HuggingFaceTB/SmolLM2-135M-Instruct", form=form)
    convert(tmp_path / "hf", tmp_path / "back", kind="eagle", target=smollm2_dir)
    first, second = load_eagle(heads.find(NAME), "bfloat16"), load_eagle(tmp_path / "back")
    assert first.config == second.config
    for a, b in zip(jax.tree.leaves(nnx.state(first)), jax.tree.leaves(nnx.state(second)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_belongs_to_its_tokenizer(tmp_path, smollm2_dir):
    made_with = read_source(heads.find(NAME))["target_vocabulary"]
    assert made_with == vocabulary_hash(smollm2_dir)
    other = tmp_path / "other"
    other.mkdir()
    for file in smollm2_dir.iterdir():
        if file.name != "tokenizer.json":
            (other / file.name).symlink_to(file)
    tokenizer = json.loads((smollm2_dir / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"trained with another tokenizer .* train one for this target"):
        LLM(other, NAME)


def test_decoding_accepts_what_training_says_it_will(smollm2_dir):
    """Rounds replayed from the training forward's agreement give decoding's own histogram, count by count."""
    llm = LLM(smollm2_dir, NAME, tree=f"chain-{DEPTH}", max_batch_size=2)
    asked = ["What is the capital of France?", "Write a haiku about the sea."]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    outs = llm.chat([[{"role": "user", "content": text}] for text in asked], params, use_tqdm=False)
    models = load_llama(smollm2_dir), load_eagle(heads.find(NAME), dtype="float32")
    id_W = np.asarray(models[1].draft_to_target[...])

    @nnx.jit  # weights as arguments: as constants of the program they would take a minute to compile
    def best_drafts(models, rows):
        target, head = models
        feature_BTX = target.run(rows.token_BT, rows.position_BT, packed_attention(rows), taps=head.config.taps)[1]
        hidden = list(unroll(head, target, rows, feature_BTX, DEPTH))
        return [jnp.argmax(head.logits(h, target), axis=-1) for h in hidden]

    found = np.zeros(DEPTH + 1, int)
    for out in outs:
        tokens = [*out.prompt_token_ids, *out.outputs[0].token_ids]
        token_T = np.zeros(96, np.int32)
        token_T[: len(tokens)] = tokens
        here_T = np.arange(96) < len(tokens)
        segment_T, position_T = here_T.astype(np.int32), np.arange(96, dtype=np.int32)
        rows = Rows(*(x[None] for x in (token_T, segment_T, position_T, here_T, np.ones(96, np.float32))))
        draft_kT = [id_W[np.asarray(x[0])] for x in best_drafts(models, rows)]
        emitted, index = 0, len(out.prompt_token_ids) - 2  # the root is the prompt's last token, after this position
        while emitted < params.max_tokens:
            kept = 0
            most = min(DEPTH, params.max_tokens - emitted - 1)
            while kept < most and draft_kT[kept][index] == tokens[index + 2 + kept]:
                kept += 1
            found[kept] += 1
            emitted, index = emitted + kept + 1, index + kept + 1
    assert found.tolist() == np.sum([out.metrics.acceptance_histogram for out in outs], axis=0).tolist()
    # A floor under the head itself, which has 1.86 tokens a call here: what it is fed wrongly costs acceptance alone.
    assert 2 * params.max_tokens / found.sum() > 1.6
