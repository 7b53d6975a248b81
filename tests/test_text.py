"""``Detokenizer``: whole characters only, and text that ends exactly before the first stop string."""

from __future__ import annotations

import json
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import tiny_tokenizer
import tokenizers
from hypothesis import example, given
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from jeagle.text import Detokenizer, encode, load_tokenizer, render_chat

REPLACEMENT = "\ufffd"


class ByteTokenizer:
    """Ids below 256 are bytes; ``more`` are tokens of several bytes, with ids from 256 on; -1 is a special token."""

    def __init__(self, *more: str | bytes):
        self.more = [m.encode() if isinstance(m, str) else m for m in more]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        pieces = []
        for token in token_ids:
            if token == -1:
                pieces.append(b"" if skip_special_tokens else b"<end>")
            else:
                pieces.append(bytes([token]) if token < 256 else self.more[token - 256])
        return b"".join(pieces).decode("utf-8", errors="replace")


class WordTokenizer:
    """As SentencePiece does it: every word brings its own space, which is left out at the start of a text."""

    words = ("▁Hello", "▁big", "▁world", "s", "!", "▁")

    def decode(self, token_ids: list[int], **kwargs) -> str:
        return "".join(self.words[t] for t in token_ids).replace("▁", " ").removeprefix(" ")


def stream(tokenizer, blocks, stop=()) -> tuple[list[str], Detokenizer]:
    """Push the blocks and finish; returns the pieces and the detokenizer, after checking that they agree."""
    detokenizer = Detokenizer(tokenizer, tuple(stop))
    pieces = []
    for block in blocks:
        pieces.append(detokenizer.push(list(block)))
        assert detokenizer.text == "".join(pieces)
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.finish() == ""
    return pieces, detokenizer


def test_a_text_that_brings_the_begin_of_text_token_gets_no_second_one(tmp_path):
    for name, content in tiny_tokenizer.tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    plain = encode(tokenizer, "hello")
    assert plain[0] == tiny_tokenizer.BOS and encode(tokenizer, "<s>hello") == plain
    assert encode(tokenizer, "<s><s>hello") == [tiny_tokenizer.BOS] * 2 + plain  # asked for
    assert encode(tokenizer, "<s>hello", add_special_tokens=False) == plain


def one_by_one(tokens) -> list[list[int]]:
    return [[t] for t in tokens]


def of_bytes(text: str) -> list[int]:
    return list(text.encode())


# Characters


def test_a_character_comes_out_whole():
    pieces, _ = stream(ByteTokenizer(), one_by_one(of_bytes("aé😀b")))
    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_dropped():
    pieces, _ = stream(ByteTokenizer(), one_by_one(of_bytes("a😀")[:-1]))
    assert pieces == ["a", "", "", "", ""]


def test_bytes_that_are_no_character_do_not_block_what_follows():
    pieces, _ = stream(ByteTokenizer(), [[0xFF], *one_by_one(of_bytes("ab")), [0xF0, 0x9F], *one_by_one(of_bytes("c"))])
    assert "".join(pieces) == f"{REPLACEMENT}ab{REPLACEMENT}c"


def test_a_token_may_end_one_character_and_begin_another():
    emoji = "😀".encode()
    tokenizer = ByteTokenizer(b"a" + emoji[:2], emoji[2:] + emoji[:1], emoji[1:] + b"z")
    pieces, _ = stream(tokenizer, one_by_one([256, 257, 258]))
    # The second token ends inside a character, so nothing of it is decided yet.
    assert pieces == ["", "", "a😀😀z", ""]


def test_spaces_before_words_survive_the_start_of_a_window():
    tokens = [0, 1, 2, 3, 4, 0, 5, 2]
    pieces, _ = stream(WordTokenizer(), one_by_one(tokens))
    assert pieces[:4] == ["Hello", " big", " world", "s"]
    assert "".join(pieces) == WordTokenizer().decode(tokens)


@pytest.mark.parametrize("length", [1, 2, 20])
def test_prompt_and_text_joined_are_one_text(length):
    """SentencePiece leaves a text's first space out: not the answer's, which follows a prompt."""
    prompt = [0, 1, 3] * length
    detokenizer = Detokenizer(WordTokenizer(), ("!",), prompt)
    assert [detokenizer.push([token]) for token in (2, 3, 4)] == [" world", "s", ""]
    assert detokenizer.token_ids == [2, 3, 4]
    assert WordTokenizer().decode(prompt) + detokenizer.text == WordTokenizer().decode([*prompt, 2, 3])


def test_a_prompt_that_ends_inside_a_character():
    detokenizer = Detokenizer(ByteTokenizer(), prompt_ids=of_bytes("a😀")[:-1])
    assert [detokenizer.push([byte]) for byte in of_bytes("😀")[-1:] + of_bytes("bc")] == ["", f"{REPLACEMENT}b", "c"]


@pytest.mark.parametrize("prompt", ["a🙂🙂", "🙂🙂🙂", "é中é", "ab", "a"])
def test_a_prompt_whose_last_ids_begin_inside_a_character(prompt):
    """One byte without its others breaks the whole run of them, where a tokenizer falls back on bytes (Llama 2)."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581the", "\u2581word", "a", "b"]
    bpe = models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    model = tokenizers.Tokenizer(bpe)
    steps = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    model.decoder = decoders.Sequence(list(steps))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", clean_up_tokenization_spaces=False)
    detokenizer = Detokenizer(tokenizer, prompt_ids=tokenizer(prompt).input_ids)
    assert detokenizer.push([257, 258]) == " the word"
    # A last byte that is missing, or one that is wrong, costs no whole character before it.
    cut, broken = (tokenizer(" word中文很好").input_ids[:-1], [*tokenizer("🙂🙂").input_ids[:-1], 259])
    for ids in (cut, broken):
        texts = []
        for pieces in ([ids], [[i] for i in ids], [ids[:4], ids[4:]]):
            detokenizer = Detokenizer(tokenizer, prompt_ids=tokenizer("a").input_ids)
            texts.append("".join(map(detokenizer.push, pieces)) + detokenizer.finish())
        assert texts[0] == texts[1] == texts[2] and texts[0].rstrip("a").rstrip("\ufffd").endswith(("很", "🙂"))


def test_special_tokens_are_not_text():
    pieces, detokenizer = stream(ByteTokenizer(), one_by_one([*of_bytes("ab"), -1, *of_bytes("c"), -1]))
    assert "".join(pieces) == "abc"
    assert detokenizer.token_ids == [97, 98, -1, 99, -1]


def test_nothing_at_all():
    pieces, detokenizer = stream(ByteTokenizer(), [[], []], stop=["x"])
    assert pieces == ["", "", ""] and detokenizer.text == "" and detokenizer.stop_reason is None


# Stop strings


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_string_across_tokens_and_inside_a_block(size):
    tokens = of_bytes("one two STOP three")
    blocks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    pieces, detokenizer = stream(ByteTokenizer(), blocks, stop=["STOP"])
    assert "".join(pieces) == "one two "
    assert detokenizer.stop_reason == "STOP"
    # The ids end with the token that completed the match.
    assert detokenizer.token_ids == of_bytes("one two STOP")


def test_stop_string_in_the_middle_of_a_token():
    pieces, detokenizer = stream(ByteTokenizer("abENDcd"), [[120, 256, 121]], stop=["END"])
    assert "".join(pieces) == "xab" and detokenizer.token_ids == [120, 256]


def test_stop_at_the_first_character():
    pieces, detokenizer = stream(ByteTokenizer(), one_by_one(of_bytes("\nrest")), stop=["\n"])
    assert set(pieces) == {""} and detokenizer.stop_reason == "\n" and detokenizer.token_ids == [10]


def test_stop_at_the_last_character():
    pieces, detokenizer = stream(ByteTokenizer(), one_by_one(of_bytes("ab.")), stop=["."])
    assert "".join(pieces) == "ab" and detokenizer.stop_reason == "."


def test_nothing_comes_after_a_stop():
    detokenizer = Detokenizer(ByteTokenizer(), (".",))
    assert detokenizer.push(of_bytes("ab.cd")) == "ab"
    assert detokenizer.push(of_bytes("ef")) == "" and detokenizer.finish() == ""
    assert detokenizer.text == "ab" and detokenizer.token_ids == of_bytes("ab.")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["wor", "lo w"], "hel", "lo w"),  # completed by different letters, the earlier one wins although it came first
        (["lo world", "o w"], "hell", "o w"),  # the longer one would begin earlier, but is not complete yet
        (["world", "wo"], "hello ", "wo"),
        (["d", "l"], "he", "l"),
        (["xyz"], "hello world", None),
    ],
)
def test_overlapping_stop_strings_letter_by_letter(stop, text, reason):
    pieces, detokenizer = stream(ByteTokenizer(), one_by_one(of_bytes("hello world")), stop=stop)
    assert ("".join(pieces), detokenizer.stop_reason) == (text, reason)


def test_of_several_stop_strings_in_one_token_the_earliest_wins():
    tokenizer = ByteTokenizer("hello world")
    for stop in (["world", "lo"], ["lo", "world"], ["o w", "lo world"]):
        pieces, detokenizer = stream(tokenizer, [[256]], stop=stop)
        assert "".join(pieces) == "hel"
        assert detokenizer.stop_reason in ("lo", "lo world")


def test_a_beginning_of_a_stop_string_is_held_and_then_released():
    pieces, _ = stream(ByteTokenizer(), one_by_one(of_bytes("a<end<endx")), stop=["<end>"])
    assert pieces == ["a", "", "", "", "", "<end", "", "", "", "<endx", ""]


def test_what_was_held_is_released_at_the_end():
    pieces, detokenizer = stream(ByteTokenizer(), one_by_one(of_bytes("ab<en")), stop=["<end>"])
    assert pieces == ["a", "b", "", "", "", "<en"] and detokenizer.stop_reason is None


def test_a_stop_string_that_repeats_itself():
    """After "aab" fails at the third "a", the last two letters are a new beginning."""
    pieces, detokenizer = stream(ByteTokenizer(), one_by_one(of_bytes("xaaab")), stop=["aab"])
    assert pieces[:4] == ["x", "", "", "a"] and "".join(pieces) == "xa" and detokenizer.stop_reason == "aab"


def test_stop_string_of_multi_byte_characters():
    pieces, _ = stream(ByteTokenizer(), one_by_one(of_bytes("né😀🎉😀!")), stop=["😀!"])
    assert "".join(pieces) == "né😀🎉"


# Any text in any blocks

MORE = ("ab", "b", "aba", "é", "é".encode()[:1], "é".encode()[1:], "😀".encode()[:2], "😀".encode()[2:], " ab")
TOKENIZER = ByteTokenizer(*MORE)
TOKENS = st.lists(st.integers(256, 255 + len(MORE)), max_size=12)
STOPS = st.lists(st.sampled_from(["a", "ab", "aba", "ba", "bb", "é", "éa", "😀", " "]), max_size=3, unique=True)


def expected(tokens: list[int], stop: list[str]) -> tuple[str, int]:
    """The text, and how many ids make it: the first id whose decided text holds a stop string ends everything.

    Of an ending that is no character the last id decides: it is left out.
    """
    text = ""
    for count in range(1, len(tokens) + 1):
        whole = TOKENIZER.decode(tokens[:count])
        if whole.endswith(REPLACEMENT) and count < len(tokens):
            continue
        text = whole.rstrip(REPLACEMENT)
        found = [text.find(s) for s in stop if s in text]
        if found:
            return text[: min(found)], count
    return text, len(tokens)


@given(TOKENS, STOPS, st.data())
@example([256, 256], ["ba"], None)
@example([260, 263], [], None)  # the second completes a character and goes on with half of one
def test_any_split_gives_the_same_text(tokens, stop, data):
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=5)) if data else [1]
    edges = [0, *sorted(cuts), len(tokens)]
    blocks = [tokens[a:b] for a, b in pairwise(edges)]
    text, count = expected(tokens, stop)
    for split in (blocks, one_by_one(tokens), [tokens]):
        pieces, detokenizer = stream(TOKENIZER, split, stop)
        assert "".join(pieces) == text
        assert detokenizer.token_ids == tokens[:count]
        # Nothing that was released had to be taken back, and no stop string got out.
        assert not any(s in text for s in stop) and (detokenizer.stop_reason in stop or detokenizer.stop_reason is None)


@given(st.text(max_size=20).filter(lambda text: REPLACEMENT not in text))
def test_any_text_comes_back_byte_by_byte(text):
    for blocks in (one_by_one(of_bytes(text)), [of_bytes(text)]):
        pieces, _ = stream(ByteTokenizer(), blocks)
        assert "".join(pieces) == text


# Tokenizers


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_what_its_file_says(tmp_path, name):
    """Some byte-level checkpoints say that they are Llama's SentencePiece, and ask for BOS in their config."""
    for file, data in tiny_tokenizer.tokenizer_files().items():
        if file == "tokenizer_config.json":
            data = json.dumps(json.loads(data) | dict(tokenizer_class=name, add_bos_token=True)).encode()
        (tmp_path / file).write_bytes(data)
    tokenizer, text = load_tokenizer(tmp_path), "hello w, 1 + 1"
    ids = encode(tokenizer, text)
    assert ids[0] == tiny_tokenizer.BOS and ids[1:] != tiny_tokenizer.byte_ids(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[3].content.x }}", "has no element 3"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(9999999) %}x{% endfor %}", "Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "maximum recursion depth"),
    ],
)
def test_what_a_chat_template_raises_is_one_sentence(tmp_path, template, said):
    for name, content in tiny_tokenizer.tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"^the chat template cannot render \[.*\]: [^\n]*{said}"):
        render_chat(tokenizer, [{"role": "user", "content": "hi"}])
