"""Tokens to text as they come, compared with the text of all of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.generation.text import detokenize
from deployments.messages import ChatMessage, DetokenizeItem, Ids, TextState, TokenLogprobs


class Bytes:
    """A tokenizer whose tokens are the bytes of the text."""

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def render(self, messages: Sequence[ChatMessage]) -> Ids:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def in_pieces(
    tokens: Sequence[int], cuts: Sequence[int], stop: tuple[str, ...] = ()
) -> tuple[str, bool, int, list[str]]:
    """Return the text, whether it was stopped, the tokens that it used, and the pieces."""
    bounds = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    state, pieces, used = TextState(), [], 0
    for begin, end in itertools.pairwise(bounds):
        item = DetokenizeItem(state, tuple(tokens[begin:end]), stop, end == len(tokens))
        result = detokenize(item, Bytes())
        pieces.append(result.text)
        used += result.used_tokens
        state = result.state
        if result.is_stopped:
            return "".join(pieces), True, used, pieces
        if end == len(tokens):
            break
    return "".join(pieces), False, used, pieces


CUTS = st.lists(st.integers(0, 1000), max_size=8)


@given(st.text(max_size=30), CUTS)
def test_the_pieces_are_the_text(text: str, cuts: list[int]) -> None:
    tokens = Bytes().encode(text).tolist()
    got, is_stopped, used, pieces = in_pieces(tokens, cuts)
    assert (got, is_stopped, used) == (text, False, len(tokens))
    # No half characters: whatever is passed on can be encoded, and none is a replacement.
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.text("abc ", max_size=40), st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=4), CUTS)
def test_nothing_from_a_stop_string_on_is_passed_on(text: str, stop: list[str], cuts: list[int]) -> None:
    tokens = Bytes().encode(text).tolist()
    got, is_stopped, used, _ = in_pieces(tokens, cuts, tuple(stop))
    # As soon as one of them is complete, the text ends before it.
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    if not ends:
        assert (got, is_stopped, used) == (text, False, len(tokens))
        return
    complete = min(end for end, _ in ends)
    assert is_stopped
    assert used == complete
    assert got == text[: min(text[:complete].find(one) for one in stop if one in text[:complete])]


def test_bytes_that_are_no_character_come_at_the_end() -> None:
    assert in_pieces([ord("a"), 0xE2, 0x82], [1, 2])[0] == "a\ufffd"


def test_tokens_have_their_own_text_and_log_probability() -> None:
    logprobs = (TokenLogprobs(-0.1, ((97, -0.1), (98, -2.0))), TokenLogprobs(-0.2, ()))
    result = detokenize(DetokenizeItem(TextState(), (97, 99), (), False, logprobs), Bytes())
    assert [(one.text, one.logprob, one.top) for one in result.logprobs] == [
        ("a", -0.1, (("a", -0.1), ("b", -2.0))),
        ("c", -0.2, ()),
    ]


def test_log_probabilities_come_with_their_text_and_none_of_a_stop_string() -> None:
    tokens, state, found = b"xabyabc!", TextState(), []
    for token in tokens:
        logprobs = (TokenLogprobs(-token / 100),)
        result = detokenize(DetokenizeItem(state, (token,), ("abc",), False, logprobs), Bytes())
        found.append((result.text, "".join(one.text for one in result.logprobs)))
        state = result.state
        if result.is_stopped:
            break
    # "ab" may begin the stop string, and is held until that is known.
    assert found == [("x", "x"), ("", ""), ("", ""), ("aby", "aby"), ("", ""), ("", ""), ("", "")]
    assert result.is_stopped


def test_the_text_goes_on_where_its_context_ends() -> None:
    state = TextState(context=tuple("é".encode()[:1]))
    result = detokenize(DetokenizeItem(state, tuple("é".encode()[1:]), (), True), Bytes())
    assert result.text == ""
