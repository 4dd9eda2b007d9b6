"""Text as it comes: whole characters, stop strings wherever they fall, and no difference to decoding all at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4lib.serving.text import Bytes, TextStream


class Words:
    """A tokenizer whose pieces carry a space in front, except at the start of a text, as sentencepiece has it."""
    words = ["", " the", " cat", "s", " sat", "\n", "é"]

    def encode(self, text):
        raise NotImplementedError

    def decode(self, tokens):
        return "".join(self.words[t] for t in tokens).removeprefix(" ")


def shown(tokens, stop=(), tokenizer=Bytes()):
    """(text after every token, whether it stopped)."""
    stream, texts = TextStream(tokenizer, stop), []
    for token in tokens:
        done = stream.add(token)
        texts.append(stream.text)
        if done:
            return texts, True
    stream.flush()
    return [*texts, stream.text], False


@given(st.lists(st.sampled_from([0xff, 0x41, 0xc3, 0xa9, 0xe2, 0x82, 0xac, 0xf0, 0x9f, 0x98, 0x80]), max_size=24))
@settings(max_examples=1000, derandomize=True, deadline=None)
def test_any_bytes_at_all_give_what_they_give_at_once(tokens):
    assert shown(tokens)[0][-1] == bytes(tokens).decode(errors="replace")


@given(st.text(max_size=30))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_all_pieces_together_are_the_text(text):
    texts, _ = shown(Bytes().encode(text))
    assert texts[-1] == text and all(later.startswith(sooner) for sooner, later in zip(texts, texts[1:]))


@given(st.lists(st.integers(0, 6), max_size=12))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_a_tokenizer_that_looks_at_its_neighbours(tokens):
    assert shown(tokens, tokenizer=Words())[0][-1] == Words().decode(tokens)


@given(st.text("abé", max_size=20), st.lists(st.text("abé", min_size=1, max_size=4), max_size=2))
@settings(max_examples=500, derandomize=True, deadline=None)
def test_a_stop_string_ends_the_text_wherever_it_falls(text, stop):
    """Against the definition: the text up to the first token after which it holds a stop string, cut where that begins."""
    texts, stopped = shown(Bytes().encode(text), stop)
    prefixes = [text[:n] for n in range(len(text) + 1)]
    first = next((p for p in prefixes if any(s in p for s in stop)), None)
    assert stopped == (first is not None)
    assert texts[-1] == (text if first is None else first[:min(first.find(s) for s in stop if s in first)])
    assert all(texts[-1].startswith(t) for t in texts)              # nothing shown had to be taken back


def test_half_a_character_is_held_back_and_so_is_half_a_stop():
    assert shown("é!".encode())[0] == ["", "é", "é!", "é!"]
    assert shown(b"xEN.", ("END",))[0] == ["x", "x", "x", "xEN.", "xEN."]
    assert shown(b"xEND", ("END",)) == (["x", "x", "x", "x"], True)


@pytest.mark.parametrize("tokens, text", [([255, 65], "\ufffdA"), ([65, 195], "A\ufffd"), ([300, 66], "B")])
def test_what_is_no_text_does_not_hurt(tokens, text):
    assert shown(tokens)[0][-1] == text


def test_text_that_is_none_does_not_wait_for_ever():
    texts, _ = shown([0xff] * 10)
    assert [len(t) for t in texts] == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 10]
    assert shown([0xff] * 6 + list("é".encode()))[0][-1] == "\ufffd" * 6 + "é"
