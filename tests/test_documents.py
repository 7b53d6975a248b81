"""Documents: which answers of a conversation are learnt, and directories of shards."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_tokenizer
from helpers import tiny_llama
from test_training import recipe
from tiny_tokenizer import EOS, SPECIALS, VOCAB_SIZE

from jeagle.text import load_tokenizer
from jeagle.training.documents import DataError, read_documents
from jeagle.training.prompts import end_of_turn
from jeagle.training.recipe import DataRecipe
from jeagle.training.run import load_documents
from jeagle.training.shards import MANIFEST

END = SPECIALS.index("<|end|>")


@pytest.fixture
def tokenizer(tmp_path):
    for name, content in tiny_tokenizer.tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    return load_tokenizer(tmp_path)


def test_every_answer_of_a_conversation_is_learnt(tokenizer, tmp_path, monkeypatch):
    """Where the template ends it with another id than the target's first, as Llama 3's does."""
    system = {"role": "system", "content": "Be brief."}
    talk = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": [system, *talk]}))

    def read(*eos_token_ids: int) -> tuple[list[str], int]:
        end = end_of_turn(tokenizer, eos_token_ids)
        (document,) = read_documents([file], tokenizer, vocab_size=VOCAB_SIZE, end_of_turn=end)
        text = tokenizer.decode(document.token_n[document.response_n].tolist())
        return text.split(SPECIALS[end])[:-1], document.rewritten

    said = [f"assistant {i}" for i in range(3)]
    assert read(EOS, END) == read(END) == (said, 0)
    # Generation ended with what the template does not write: of all answers but the last, all but the end is learnt.
    assert read(EOS) == (["".join(said)], 2)
    # Of one that it rewrites in later turns what came before stays, as do all others.
    rewriting = tokenizer.chat_template.replace("m['content']", "(m['content'] | replace('assistant 1', 'assisted'))")
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    assert read(EOS, END) == ([said[0], "assist" + said[2]], 1)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    assert end_of_turn(tokenizer, (EOS, END)) == end_of_turn(None, (EOS, END)) == EOS


def test_a_recipe_names_a_directory_of_shards(tmp_path):
    """They are one file in parts: what is measured comes from all of them."""
    lines = [json.dumps(dict(token_ids=[i, 1, 2], response=[[1, 3]])) + "\n" for i in range(3, 13)]
    joined, shards = tmp_path / "joined.jsonl", tmp_path / "shards"
    joined.write_text("".join(lines))
    shards.mkdir()
    for name, part in (("b.jsonl", lines[:4]), ("a.jsonl", lines[4:]), ("unlisted.jsonl", lines)):
        (shards / name).write_text("".join(part))

    def load(*files: Path) -> list[list[list[int]]]:
        data = DataRecipe(files=tuple(map(str, files)), held_out=7)  # more than a shard has
        r = dataclasses.replace(recipe(), data=data)
        return [[d.token_n.tolist() for d in part] for part in load_documents(r, tiny_llama().config, tokenizer=None)]

    with pytest.raises(DataError, match=r"manifest.json cannot be read \(No such file or directory\); give files"):
        load(shards)
    for text, said in (("{", r"cannot be read \(Exp"), ('{"shards": []}', "has no complete shard yet")):
        (shards / MANIFEST).write_text(text)
        with pytest.raises(DataError, match=said):
            load(shards)
    (shards / MANIFEST).write_text(json.dumps({"shards": [{"file": "b.jsonl"}, {"file": "a.jsonl"}]}))
    assert load(shards) == load(joined) and load(shards, joined) == load(joined, shards)
