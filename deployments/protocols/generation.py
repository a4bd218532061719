"""OpenAI's chat completions and completions: validation of their bodies, and the bodies of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from deployments.config import GenerationConfig, LimitsConfig
from deployments.engine.card import ModelCard
from deployments.errors import InvalidField
from deployments.messages import ChatMessage, RenderRequest, Sampling, TensorOption, TokenText
from deployments.protocols.fields import Body, check_model, parse, shown

_COMPLETION_TOKENS = 16
"""As OpenAI has it."""
MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS = 8, 4, 20
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = Field(False, description="Send a last chunk with the usage, and no choices.")


class _GenerationBody(Body):
    """Fields that both routes have. Values that change nothing are accepted for fields that are not supported."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0, None),
        "presence_penalty": (0, None),
        "logit_bias": ({}, None),
    }
    ignored: ClassVar[tuple[str, ...]] = ("user", "metadata", "store", "service_tier", "safety_identifier")

    model: str | None = Field(None, description="The served model; optional.")
    stream: bool | None = Field(False, description="Send the answer in server-sent events, as it is generated.")
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(1.0, description="0: the most probable token.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(0, description="0: all tokens.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, description="Up to 4 strings that end the text; they are not part of it."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {
            key: value
            for key, value in body.items()
            if key in cls.model_fields or not (key in cls.ignored or (key in cls.neutral and value in cls.neutral[key]))
        }


class ChatBody(_GenerationBody):
    """OpenAI's chat completion request."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_GenerationBody.neutral,
        "response_format": ({"type": "text"}, None),
        "tools": ([], None),
        "tool_choice": ("none", "auto", None),
        "parallel_tool_calls": (True, False, None),
        "modalities": (["text"], None),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "prediction": (None,),
        "audio": (None,),
        "functions": ([], None),
        "function_call": ("none", "auto", None),
    }
    ignored: ClassVar[tuple[str, ...]] = (*_GenerationBody.ignored, "prompt_cache_key", "prompt_cache_retention")

    messages: list[dict[str, Any]] = Field(min_length=1, description="`role` and `content` of each, text only.")
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Maximum tokens of the answer; default: generation.default_max_tokens."
    )
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class CompletionBody(_GenerationBody):
    """OpenAI's completion request."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_GenerationBody.neutral,
        "echo": (False, None),
        "best_of": (1, None),
        "suffix": ("", None),
    }

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text or a list of token ids; or a list of one of these."
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="Default: 16.")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


@dataclass(frozen=True, slots=True)
class ParsedGeneration:
    """What the stages need from a valid request."""

    prompt: RenderRequest
    sampling: Sampling
    max_tokens: int | None
    max_tokens_param: str
    """The field that it came from."""
    default_max_tokens: int | None
    """If the route has one of its own."""
    choices: int
    stop: tuple[str, ...]
    is_streamed: bool
    wants_usage: bool
    wants_logprobs: bool
    model: str
    timeout_ms: float | None = None
    priority: str | None = None
    """As in X-Priority. Both are fields of the body in some APIs."""
    response_id: str = ""
    tensors: tuple[TensorOption, ...] = ()
    """Output tensors to return, for ``/v2``."""

    @property
    def texts(self) -> tuple[str, ...]:
        if self.prompt.messages:
            return tuple(one.content for one in self.prompt.messages)
        return (self.prompt.text,) if self.prompt.text is not None else ()


def parse_chat(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedGeneration:
    """Raises InvalidJson, InvalidField or ModelNotFound."""
    parsed = parse(ChatBody, body)
    both = parsed.max_tokens is not None and parsed.max_completion_tokens is not None
    if both and parsed.max_tokens != parsed.max_completion_tokens:
        raise InvalidField(
            f"max_tokens ({parsed.max_tokens}) and max_completion_tokens ({parsed.max_completion_tokens}) mean the "
            "same; set one",
            param="max_tokens",
        )
    if parsed.top_logprobs is not None and not parsed.logprobs:
        raise InvalidField("top_logprobs needs logprobs: true", param="top_logprobs")
    messages = tuple(_message(one, f"messages[{i}]") for i, one in enumerate(parsed.messages))
    _check_size(sum(len(one.content) for one in messages), "messages", limits)
    prompt = RenderRequest("messages", messages=messages)
    logprobs = (parsed.top_logprobs or 0) if parsed.logprobs else None
    if parsed.max_completion_tokens is None:
        return _parsed(parsed, card, prompt, ("max_tokens", parsed.max_tokens), None, logprobs)
    return _parsed(parsed, card, prompt, ("max_completion_tokens", parsed.max_completion_tokens), None, logprobs)


def parse_completion(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedGeneration:
    """Raises InvalidJson, InvalidField or ModelNotFound."""
    parsed = parse(CompletionBody, body)
    prompt: Any = parsed.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise InvalidField(f"prompt: one prompt a request is supported; got {len(prompt)}", param="prompt")
        prompt = prompt[0]
    if not prompt:
        raise InvalidField("prompt must not be empty", param="prompt")
    _check_size(len(prompt), "prompt", limits)
    if isinstance(prompt, str):
        rendered = RenderRequest("prompt", text=prompt)
    else:
        wrong = next((token for token in prompt if not 0 <= token < card.vocab_size), None)
        if wrong is not None:
            raise InvalidField(
                f"prompt must consist of token ids from 0 to {card.vocab_size - 1}; got {wrong}", param="prompt"
            )
        rendered = RenderRequest("prompt", ids=tuple(prompt))
    return _parsed(parsed, card, rendered, ("max_tokens", parsed.max_tokens), _COMPLETION_TOKENS, parsed.logprobs)


def _parsed(
    body: _GenerationBody,
    card: ModelCard,
    prompt: RenderRequest,
    max_tokens: tuple[str, int | None],
    default_max_tokens: int | None,
    logprobs: int | None,
) -> ParsedGeneration:
    check_model(body.model, card)
    if body.stream_options is not None and not body.stream:
        raise InvalidField("stream_options needs stream: true", param="stream_options")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > MAX_STOPS:
        raise InvalidField(f"stop: at most {MAX_STOPS} strings are allowed; got {len(stop)}", param="stop")
    sampling = Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=body.seed,
        logprobs=logprobs,
    )
    return ParsedGeneration(
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens[1],
        max_tokens_param=max_tokens[0],
        default_max_tokens=default_max_tokens,
        choices=body.n or 1,
        stop=stop,
        is_streamed=bool(body.stream),
        wants_usage=body.stream_options is not None and body.stream_options.include_usage,
        wants_logprobs=logprobs is not None,
        model=card.name,
    )


def _message(message: dict[str, Any], where: str) -> ChatMessage:
    unknown = next((key for key in message if key not in ("role", "content", "name") and message[key]), None)
    if unknown is not None:
        raise InvalidField(
            f"{where}.{unknown[:80]} is not supported; known: role, content, name", param=f"{where}.{unknown[:80]}"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidField(f"{where}.role must be one of {', '.join(_ROLES)}; got {shown(role)}", param=f"{where}.role")
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        raise InvalidField(f"{where}.name must be a string; got {shown(name)}", param=f"{where}.name")
    return ChatMessage(_ROLES[role], _content(message.get("content"), f"{where}.content"), name or "")


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidField(f"{where} must be a string or a list of parts of type text", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidField(f"{where}[{i}] must be a part of type text; got {shown(kind)}", param=where)
        texts.append(part["text"])
    return "\n".join(texts)


def _check_size(size: int, param: str, limits: LimitsConfig) -> None:
    if size > limits.max_input_chars:
        raise InvalidField(
            f"{param} has {size} characters or token ids; at most {limits.max_input_chars} are allowed", param=param
        )


def max_tokens_of(parsed: ParsedGeneration, prompt: int, card: ModelCard, config: GenerationConfig) -> int:
    """How many tokens the answer may have. Raises InvalidField if more are wanted than the model can take."""
    left = card.max_length - prompt
    if parsed.max_tokens is None:
        return min(parsed.default_max_tokens or config.default_max_tokens, left)
    if parsed.max_tokens > left:
        raise InvalidField(
            f"the prompt has {prompt} tokens and {parsed.max_tokens} are wanted, together more than the "
            f"{card.max_length} that the model takes; at most {left} can be generated",
            param=parsed.max_tokens_param,
        )
    return parsed.max_tokens


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ChoiceText:
    """One choice, as far as it is."""

    text: str = ""
    logprobs: list[TokenText] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0


class Answer:
    """The JSON of one answer: whole, or in chunks. One subclass a route."""

    prefix: str
    whole: str
    chunk: str

    def __init__(self, response_id: str, created: int, model: str, *, wants_logprobs: bool, wants_usage: bool) -> None:
        self.id, self._created, self._model = f"{self.prefix}{response_id}", created, model
        self._wants_logprobs, self._wants_usage = wants_logprobs, wants_usage

    def in_whole(self, choices: Sequence[ChoiceText], usage: dict[str, Any]) -> bytes:
        listed = [
            {
                "index": index,
                **self.content(choice.text),
                "logprobs": self._logprobs(choice.logprobs, 0),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return to_json({**self._head(self.whole), "choices": listed, "usage": usage})

    def first(self, index: int) -> bytes | None:
        """The chunk before all others of a choice, if there is one."""
        raise NotImplementedError

    def delta(self, index: int, text: str, logprobs: Sequence[TokenText], offset: int) -> bytes:
        """New text of a choice, which follows ``offset`` characters."""
        return self._chunk(index, self.new_content(text), self._logprobs(logprobs, offset), None)

    def last(self, index: int, finish_reason: str) -> bytes:
        return self._chunk(index, self.new_content(""), None, finish_reason)

    def usage(self, usage: dict[str, Any]) -> bytes:
        return to_json({**self._head(self.chunk), "choices": [], "usage": usage})

    def content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def new_content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[TokenText], offset: int) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[TokenText], offset: int) -> dict[str, Any] | None:
        return self.logprobs(tokens, offset) if self._wants_logprobs else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, index: int, content: dict[str, Any], logprobs: Any, finish_reason: str | None) -> bytes:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._wants_usage else {}
        return to_json({**self._head(self.chunk), "choices": [choice], **usage})


class ChatAnswer(Answer):
    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> bytes | None:
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def new_content(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, tokens: Sequence[TokenText], offset: int) -> dict[str, Any]:  # noqa: ARG002
        content = [
            {**_one(one.text, one.logprob), "top_logprobs": [_one(text, logprob) for text, logprob in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def first(self, index: int) -> bytes | None:  # noqa: ARG002
        return None

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    new_content = content

    def logprobs(self, tokens: Sequence[TokenText], offset: int) -> dict[str, Any]:
        offsets = []
        for one in tokens:
            offsets.append(offset)
            offset += len(one.text)
        return {
            "tokens": [one.text for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [dict(one.top) for one in tokens],
            "text_offset": offsets,
        }


def _one(text: str, logprob: float) -> dict[str, Any]:
    # A token may end within a character; then it has no text of its own.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def usage_of(prompt: int, output: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
