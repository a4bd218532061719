"""Tokens to text as they come: whole characters only, and nothing from a stop string on. Pure.

The text of a token depends on those before it (spaces, characters of several tokens), so that new tokens are decoded
together with the last known ones, whose text is then taken off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from deployments.engine.protocol import TextTokenizer
from deployments.messages import DetokenizedItem, DetokenizeItem, HeldToken, TextState, TokenLogprobs, TokenText

_INCOMPLETE = "\ufffd"


class _Held:
    """Text that has not been passed on, and the tokens that have given it."""

    def __init__(self, state: TextState) -> None:
        self.text, self.tokens = state.held, deque(state.held_tokens)
        self.passed_on: list[str] = []
        self.logprobs: list[TokenText] = []

    def pass_on(self, chars: int) -> None:
        self.passed_on.append(self.text[:chars])
        self.text = self.text[chars:]
        while self.tokens and self.tokens[0].chars <= chars:
            chars -= self.tokens[0].chars
            self.logprobs.append(self.tokens.popleft().token)
        if chars and self.tokens:
            self.tokens[0] = HeldToken(self.tokens[0].token, self.tokens[0].chars - chars)


def detokenize(item: DetokenizeItem, tokenizer: TextTokenizer) -> DetokenizedItem:
    """Continue the text of ``item.state`` with its new tokens."""
    state, held, used = item.state, _Held(item.state), 0
    logprobs = iter(item.logprobs)
    for token in item.tokens:
        used += 1
        state, text = _advance(state, token, tokenizer)
        held.text += text
        if (of_token := next(logprobs, None)) is not None:
            held.tokens.append(HeldToken(_token_text(token, of_token, tokenizer), len(text)))
        if (stop := _first(held.text, item.stop)) >= 0:
            return _stopped(held, stop, used)
        held.pass_on(len(held.text) - _possible_beginning(held.text, item.stop))
    if item.is_last:
        # What could still have become a stop string or a character will not.
        rest = _text_after(state.context, state.pending, tokenizer) if state.pending else ""
        held.text += rest
        if held.tokens and rest:
            last = held.tokens.pop()
            held.tokens.append(HeldToken(last.token, last.chars + len(rest)))
        if (stop := _first(held.text, item.stop)) >= 0:
            return _stopped(held, stop, used)
        held.pass_on(len(held.text))
        state = TextState()
    kept_state = TextState(state.context, state.pending, held.text, tuple(held.tokens))
    return DetokenizedItem(kept_state, "".join(held.passed_on), False, used, tuple(held.logprobs))


def _stopped(held: _Held, at: int, used: int) -> DetokenizedItem:
    held.pass_on(at)
    return DetokenizedItem(TextState(), "".join(held.passed_on), True, used, tuple(held.logprobs))


def _advance(state: TextState, token: int, tokenizer: TextTokenizer) -> tuple[TextState, str]:
    pending = (*state.pending, token)
    text = _text_after(state.context, pending, tokenizer)
    if text.endswith(_INCOMPLETE) and len(pending) < 8:
        return TextState(state.context, pending), ""
    return TextState(pending if text else (*state.context, *pending)[-8:]), text


def _text_after(context: tuple[int, ...], tokens: tuple[int, ...], tokenizer: TextTokenizer) -> str:
    known = tokenizer.decode(context) if context else ""
    return tokenizer.decode((*context, *tokens))[len(known) :]


def _first(text: str, stop: Sequence[str]) -> int:
    """Return where the first stop string begins; -1 if there is none."""
    return min((at for one in stop if (at := text.find(one)) >= 0), default=-1)


def _possible_beginning(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop string."""
    longest = max(map(len, stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in stop):
            return length
    return 0


def _token_text(token: int, logprobs: TokenLogprobs, tokenizer: TextTokenizer) -> TokenText:
    top = tuple((tokenizer.decode((other,)), logprob) for other, logprob in logprobs.top)
    return TokenText(tokenizer.decode((token,)), logprobs.chosen, top)
