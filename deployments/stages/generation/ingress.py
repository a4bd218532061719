"""Stage 1 for language models: receives the request, calls the stages, and answers whole or in server-sent events.

``_generate`` is the path of every request, top to bottom. Tokens are taken from the model as they come, whatever the
reader does; what has come while the reader took the last chunk goes into the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import Request, Response

from deployments.errors import Cancelled, DeadlinePassed, InternalError
from deployments.http.bodies import Body
from deployments.http.server_timing import generation_timing
from deployments.messages import (
    Detokenized,
    DetokenizedItem,
    DetokenizeItem,
    Generated,
    GenerateRequest,
    Ids,
    Share,
    TextState,
    TokenDelta,
    TokenDeltas,
    Tokenized,
    TokenLogprobs,
)
from deployments.protocols.generation import Answer, ChoiceText, ParsedGeneration, max_tokens_of, usage_of
from deployments.protocols.routes import (
    GENERATION_INFER,
    GENERATION_MODEL_INFER,
    GENERATION_ROUTES,
    GenerationRoute,
    Route,
)
from deployments.stages.generation.detokenizer import Detokenizer
from deployments.stages.ingress import IngressStage
from deployments.telemetry.carrier import traceparent
from deployments.telemetry.generation.facts import GenerationFacts, StreamRecord
from deployments.telemetry.records import RequestRecord
from deployments.transport.stage_client import Progress

_logger = logging.getLogger("slowlens.ingress")


class _Choice:
    """One choice of the answer: the tokens that have come, and the text that they have given."""

    def __init__(self, context: tuple[int, ...]) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reason: str | None = None
        self.state = TextState(context)
        self.text = ChoiceText()

    def add(self, delta: TokenDelta) -> None:
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.reason = delta.finish_reason or self.reason

    @property
    def has_news(self) -> bool:
        return self.text.finish_reason is None and (bool(self.tokens) or self.reason is not None)

    def take(self, stop: tuple[str, ...]) -> DetokenizeItem:
        item = DetokenizeItem(self.state, tuple(self.tokens), stop, self.reason is not None, tuple(self.logprobs))
        self.tokens, self.logprobs = [], []
        return item

    def apply(self, item: DetokenizedItem, reason: str | None) -> None:
        self.state = item.state
        self.text.text += item.text
        self.text.tokens += item.used_tokens
        self.text.logprobs += item.logprobs
        self.text.finish_reason = "stop" if item.is_stopped else reason


class _Generation:
    """One generation in the ingress: what the model has sent, and whether there is more to come."""

    def __init__(self, parsed: ParsedGeneration, facts: GenerationFacts, prompt: Ids) -> None:
        self.parsed, self.facts = parsed, facts
        # A text goes on where its prompt ends; the answer of a chat begins anew.
        context = () if parsed.prompt.messages else tuple(prompt[-_CONTEXT:].tolist())
        self.choices = [_Choice(context) for _ in range(parsed.choices)]
        self.progress = Progress(TokenDeltas, self._take)
        self.changed = asyncio.Event()
        self.failure: BaseException | None = None
        """What to fail with if the answer is not complete: set when the call has ended."""
        self.has_hung_up = False

    def _take(self, deltas: TokenDeltas) -> None:
        now_ns = time.monotonic_ns()
        if not self.facts.first_token_ns:
            # If all tokens come at once, the first was there that much earlier.
            self.facts.first_token_ns = now_ns - deltas.decode_ns
            self.facts.cached_tokens = deltas.cached_tokens
            self.facts.queue_ns, self.facts.prefill_ns = deltas.queue_ns, deltas.prefill_ns
        self.facts.last_token_ns = now_ns
        for delta in deltas.deltas:
            self.choices[delta.choice].add(delta)
        self.changed.set()

    def ended(self, task: asyncio.Task[Generated]) -> None:
        """The call of the model has ended."""
        if task.cancelled():
            self.failure = asyncio.CancelledError()
        elif (error := task.exception()) is not None:
            self.failure = error
        else:
            self.failure = InternalError("the model replied before all choices had ended")
            self.facts.device = task.result().device
        self.changed.set()

    @property
    def is_over(self) -> bool:
        return all(choice.text.finish_reason is not None for choice in self.choices)


class GenerationIngressStage(IngressStage):
    """One replica of the ingress of a language model, see ``IngressStage``."""

    results: ClassVar[tuple[type[Any], ...]] = (Tokenized, Generated, Detokenized)
    _http_infer: ClassVar[Any] = GENERATION_INFER
    _model_infer: ClassVar[Any] = GENERATION_MODEL_INFER

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._detokenizer = Detokenizer(self._postprocessor)

    def routes(self) -> Sequence[GenerationRoute]:
        return GENERATION_ROUTES

    def serves(self, route: Any) -> bool:  # noqa: ARG002
        return True

    async def _serve(self, http: Request, route: Any, send: Any) -> Response | None:
        if isinstance(route, Route):
            return await super()._serve(http, route, send)
        with self._record(http, route.path) as record, self._bodies.body(http) as body:
            reply = _Reply(record, send)
            try:
                await self._generate(http, route, record, reply, body)
                record.status = 200
                self._advice.served(record.caller)
                return None
            except asyncio.CancelledError as error:
                self._telemetry.fail(record, error)
                raise
            except Exception as error:
                response = self._failed(record, error, body)
                response.headers["traceresponse"] = traceparent(record.context)
                response.headers["Server-Timing"] = self._timing(record)
                if not reply.has_begun:
                    return response
                # The status has been sent. What follows is an event, and the end of the stream.
                record.status = 200
                with contextlib.suppress(Exception):
                    await reply.fail(bytes(response.body))
                return None

    async def _generate(
        self, http: Request, route: GenerationRoute, record: RequestRecord, reply: _Reply, body: Body
    ) -> None:
        async def read() -> bytes:
            return await body.read(record.deadline_ns)

        parsed, share = await self._validated(route, record, http.headers, read)
        rendered: Tokenized = await self._tokenizer.call(record, parsed.prompt)
        answer = route.answer(
            uuid.uuid4().hex,
            int(time.time()),
            self._card.name,
            wants_logprobs=parsed.wants_logprobs,
            wants_usage=parsed.wants_usage,
        )
        generation, request = self._begun(record, parsed, rendered, share, answer.id)
        async with self._generating(http, record, request, generation):
            texts = self._texts(record, generation)
            if parsed.is_streamed:
                await self._stream(reply, answer, generation, texts)
            else:
                async for _ in texts:
                    pass
        record.device = generation.facts.device
        if not parsed.is_streamed:
            with self._telemetry.interval(record, "respond"):
                await reply.whole(answer.in_whole([one.text for one in generation.choices], _usage(record, generation)))

    async def _infer(
        self, route: Route, record: RequestRecord, headers: Mapping[str, str], read: Callable[[], Awaitable[Any]]
    ) -> Any:
        """The same for the Open Inference Protocol, which has whole answers only."""
        parsed, share = await self._validated(route, record, headers, read)
        rendered: Tokenized = await self._tokenizer.call(record, parsed.prompt)
        generation, request = self._begun(record, parsed, rendered, share, parsed.response_id or uuid.uuid4().hex)
        async with self._generating(None, record, request, generation):
            async for _ in self._texts(record, generation):
                pass
        record.device = generation.facts.device
        with self._telemetry.interval(record, "respond"):
            return route.frame(parsed, self._card, [one.text for one in generation.choices])

    async def _validated(
        self, route: Any, record: RequestRecord, headers: Mapping[str, str], read: Callable[[], Awaitable[Any]]
    ) -> tuple[ParsedGeneration, Share]:
        with self._telemetry.interval(record, "validate"):
            share = self._admitted(route, record, headers)
            parsed: ParsedGeneration = route.parse(await read(), self._card, self._limits)
            share = self._apply_fields(record, parsed, share, headers)
            record.requested_model = parsed.model
            record.input_count, record.input_length = 1, sum(map(len, parsed.texts))
            if self._config.telemetry.capture_text:
                record.texts = parsed.texts
            return parsed, share

    def _begun(
        self, record: RequestRecord, parsed: ParsedGeneration, rendered: Tokenized, share: Share, response_id: str
    ) -> tuple[_Generation, GenerateRequest]:
        """A generation, and the call of the model that it waits for."""
        record.tokens = sum(rendered.ids.lengths)
        most = max_tokens_of(parsed, record.tokens, self._card, self._config.generation)
        facts = _facts(parsed, response_id, most)
        facts.model_sent_ns = record.boundary_ns
        record.generation = facts
        request = GenerateRequest(
            ids=rendered.ids.values,
            max_tokens=most,
            sampling=parsed.sampling,
            choices=parsed.choices,
            # Stop strings are found in text, so tokens must come as they are made.
            is_streamed=parsed.is_streamed or bool(parsed.stop),
            param=parsed.prompt.param,
            share=share,
        )
        return _Generation(parsed, facts, rendered.ids.values), request

    def _timing(self, record: RequestRecord) -> str:
        return generation_timing(record, is_over=True)

    @contextlib.asynccontextmanager
    async def _generating(
        self, http: Request | None, record: RequestRecord, request: GenerateRequest, generation: _Generation
    ) -> AsyncIterator[None]:
        """While the model is called, and its client is there. Whatever happens inside, the call ends with it.

        Without ``http``, a client that leaves cancels the task.
        """
        call = asyncio.ensure_future(self._model.call(record, request, generation.progress))
        call.add_done_callback(generation.ended)
        leaving = asyncio.ensure_future(_leaves(http, generation)) if http is not None else None
        try:
            async with asyncio.timeout((record.deadline_ns - time.monotonic_ns()) / 1e9 + _GRACE_S):
                yield
                # Its reply follows its last tokens, and ends its span.
                await call
        except TimeoutError:
            raise DeadlinePassed("the deadline passed while the answer was sent") from None
        finally:
            if leaving is not None:
                leaving.cancel()
            if not call.done():
                call.cancel()
            with contextlib.suppress(BaseException):
                await call

    async def _texts(
        self, record: RequestRecord, generation: _Generation
    ) -> AsyncIterator[list[tuple[int, DetokenizedItem]]]:
        """Yield new texts, each with the number of its choice, until the answer is complete.

        Raises what the call of the model raised; Cancelled if the client is gone.
        """
        facts, stop = generation.facts, generation.parsed.stop
        while not generation.is_over:
            if generation.has_hung_up:
                raise Cancelled("the client hung up")
            news = [(index, one) for index, one in enumerate(generation.choices) if one.has_news]
            if not news:
                if generation.failure is not None:
                    raise generation.failure
                generation.changed.clear()
                await generation.changed.wait()
                continue
            reasons = [one.reason for _, one in news]
            began_ns = time.monotonic_ns()
            items = await self._detokenizer.convert(
                record.request_id, record.deadline_ns, [one.take(stop) for _, one in news]
            )
            if facts.stream is not None:
                facts.stream.detokenize_ns += time.monotonic_ns() - began_ns
            for (index, one), item, reason in zip(news, items, reasons, strict=True):
                one.apply(item, reason)
                if item.is_stopped and reason is None:
                    generation.progress.enough(index)
            facts.output_tokens = sum(one.text.tokens for one in generation.choices)
            yield [(index, item) for (index, _), item in zip(news, items, strict=True)]
        facts.finish_reasons = tuple(str(one.text.finish_reason) for one in generation.choices)

    async def _stream(
        self,
        reply: _Reply,
        answer: Answer,
        generation: _Generation,
        texts: AsyncIterator[list[tuple[int, DetokenizedItem]]],
    ) -> None:
        facts = generation.facts
        offsets = [0] * len(generation.choices)
        async for news in texts:
            events = []
            if not reply.has_begun:
                began_ns = time.monotonic_ns()
                facts.stream = StreamRecord(began_ns, began_ns)
                await reply.begin()
                events = [first for i in range(len(offsets)) if (first := answer.first(i)) is not None]
            for index, item in news:
                if item.text or item.logprobs:
                    events.append(answer.delta(index, item.text, item.logprobs, offsets[index]))
                    offsets[index] += len(item.text)
                reason = generation.choices[index].text.finish_reason
                if reason is not None:
                    events.append(answer.last(index, reason))
            if events:
                await reply.events(events, facts)
        last = [answer.usage(_usage(reply.record, generation))] if generation.parsed.wants_usage else []
        await reply.events([*last, b"[DONE]"], facts)
        await reply.end()


class _Reply:
    """The response, as it is sent: whole, or event by event."""

    def __init__(self, record: RequestRecord, send: Any) -> None:
        self.record, self._send = record, send
        self.has_begun = False

    async def begin(self) -> None:
        timing = generation_timing(self.record, is_over=False)
        await self._start("text/event-stream; charset=utf-8", timing, ((b"cache-control", b"no-cache"),))

    async def events(self, events: Sequence[bytes], facts: GenerationFacts) -> None:
        """Send these, and wait until the reader can take more."""
        began_ns = time.monotonic_ns()
        body = b"".join(b"data: %b\n\n" % event for event in events)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        assert facts.stream is not None
        facts.stream.ended_ns = time.monotonic_ns()
        facts.stream.blocked_ns += facts.stream.ended_ns - began_ns
        facts.stream.chunks += len(events)

    async def fail(self, error: bytes) -> None:
        """Tell the client in the stream."""
        await self._send({"type": "http.response.body", "body": b"data: %b\n\n" % error, "more_body": True})
        await self.end()

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, body: bytes) -> None:
        timing = generation_timing(self.record, is_over=True)
        await self._start("application/json", timing, ((b"content-length", str(len(body)).encode()),))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, content_type: str, timing: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.has_begun = True
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", content_type.encode()),
                    (b"traceresponse", traceparent(self.record.context).encode()),
                    (b"server-timing", timing.encode()),
                    *headers,
                ],
            }
        )


_CONTEXT = 6
"""Tokens at the end of a prompt that the text of the next ones may depend on."""
_GRACE_S = 0.2
"""The stages enforce the deadline themselves and say where the time went; this lets their replies arrive."""


async def _leaves(http: Request, generation: _Generation) -> None:
    """Wait until the client hangs up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    generation.has_hung_up = True
    generation.changed.set()


def _facts(parsed: ParsedGeneration, response_id: str, max_tokens: int) -> GenerationFacts:
    sampling = parsed.sampling
    return GenerationFacts(
        response_id=response_id,
        is_streamed=parsed.is_streamed,
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        choices=parsed.choices,
    )


def _usage(record: RequestRecord, generation: _Generation) -> dict[str, Any]:
    return usage_of(record.tokens, generation.facts.output_tokens, generation.facts.cached_tokens)
