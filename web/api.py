"""Offer a `Bot` through OpenAI's interface: chat completions, completions, models.

docs/programs.md lists all parameters. This file knows HTTP and OpenAI's fields; the `Bot` knows texts and bounds.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing, suppress
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from starlette.requests import HTTPConnection

from cli import InputError
from web.batching import Busy, Reply, ReplyOptions
from web.bot import Bot
from web.clients import Client
from web.guard import error
from web.page import split_sentences

DECODING = ("temperature", "top_k", "top_p", "num_beams", "frequency_penalty", "presence_penalty")
MOST_REPLIES = 8  # per request: the share of a batch that one client gets besides others
MOST_STOPS, LONGEST_STOP = 4, 256
MOST_LOGPROBS = 20  # per token
LEAST_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot express
SEEDS = 2 ** 63
# Parameters of OpenAI's service that this server lacks, each with the values that request nothing.
REFUSED: dict[str, tuple] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
    "verbosity": (), "store": (False,), "moderation": (), "suffix": ("",), "echo": (False,), "best_of": (1,)}
IGNORED_HEADER, SHOWN_NAMES, SHOWN_LETTERS = "X-Ignored-Parameters", 20, 40


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | None = Field(None, validate_default=True)

    @field_validator("content", mode="before")
    @classmethod
    def only_text(cls, content: object, about: ValidationInfo) -> object:
        if isinstance(content, list):
            for number, part in enumerate(content):
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                    raise ValueError(f"part {number} is {str(kind)[:40]!r}; send only text")
            return "".join(part["text"] for part in content)
        if content is None:
            if about.data.get("role") != "assistant":
                raise ValueError("is null; send text")
            return ""
        return content


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class ResponseFormat(BaseModel):
    type: str

    @field_validator("type")
    @classmethod
    def only_text(cls, kind: str) -> str:
        if kind != "text":
            raise ValueError(f"{kind[:40]!r} is not supported, only 'text' is")
        return kind


class CompletionRequest(BaseModel):
    """The parameters that chat completions and completions share; ``top_k`` and ``num_beams`` are additions.

    This class checks only the types of decoding options; `Bot.options` checks their ranges.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # the newer name of max_tokens
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] | None = None
    stop: list[str] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def few_and_short(cls, stop: object) -> object:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and len(stops) > MOST_STOPS:
            raise ValueError(f"has {len(stops):,} texts; send at most {MOST_STOPS}")
        for text in stops if isinstance(stops, list) else []:
            if isinstance(text, str) and not 0 < len(text) <= LONGEST_STOP:
                raise ValueError(f"has a text of {len(text):,} characters; send 1 to {LONGEST_STOP}")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def of_tokens(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for token in biases or {}:
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ValueError(f"{token[:40]!r} is not the number of a token")
        return biases

    def options(self, bot: Bot):
        """Return the decoding options. Raises `InputError` if one is out of range."""
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        return bot.options(**{name: getattr(self, name) for name in DECODING}, logit_bias=tuple(biases.items()) or None,
                           max_length=self.max_completion_tokens or self.max_tokens)

    def seeds(self) -> list[int | None]:
        """Return the seed of each reply: the requested one, and the numbers after it for further replies."""
        return [None if self.seed is None else (self.seed + number) % SEEDS or SEEDS - 1  # 0 means no seed
                for number in range(self.n or 1)]

    def ignored(self) -> list[str]:
        """Return the names of unknown parameters, which change nothing. Raises `InputError` for unsupported ones."""
        names = []
        for name, value in (self.model_extra or {}).items():
            neutral = REFUSED.get(name)
            if neutral is None:
                names.append(name)
            elif value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                raise InputError(f"{name}: not supported; leave it out")
        if self.stream_options and not self.stream:
            raise InputError("stream_options: needs stream")
        return names


class ChatRequest(CompletionRequest):
    """A request to the chat interface."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    def conversation(self) -> tuple[list[str], list[str]]:
        """Return the personality, from the system messages, and the other messages, the user's first.

        Successive messages of one side are joined. Raises `InputError` unless the last message is the user's.
        """
        personality, said, speaker = [], [""], "user"
        for message in self.messages:
            if message.role in ("system", "developer"):
                personality += split_sentences(message.content)
            elif message.role == speaker:
                said[-1] = f"{said[-1]} {message.content}".strip()
            else:
                said.append(message.content)
                speaker = message.role
        if speaker != "user" or not said[-1].strip():
            raise InputError("messages: the last message must be the user's and must not be empty")
        return personality, said if said[0] else said[1:]

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs: needs logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def replies(self, bot: Bot, client: Client, extra: ReplyOptions) -> list[AsyncGenerator[Reply, None]]:
        personality, said = self.conversation()
        options = self.options(bot)
        return [bot.reply(personality, said, options.over(seed=seed), client, extra) for seed in self.seeds()]


class TextRequest(CompletionRequest):
    """A request to the older interface: continue a text."""

    prompt: list[str]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def only_text(cls, prompt: object) -> object:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError("is neither a text nor a list of texts; token ids are not supported")
        return prompts

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def replies(self, bot: Bot, client: Client, extra: ReplyOptions) -> list[AsyncGenerator[Reply, None]]:
        if (count := len(self.prompt) * (self.n or 1)) > MOST_REPLIES:
            raise InputError(f"prompt: {len(self.prompt):,} texts with n={self.n or 1} need {count:,} replies; ask for "
                             f"at most {MOST_REPLIES}")
        options = self.options(bot)
        return [bot.continuation(text, options.over(seed=seed), client, extra)
                for text in self.prompt for seed in self.seeds()]


PARAMETERS = {*ChatRequest.model_fields, *TextRequest.model_fields, *REFUSED}


def client_of(request: HTTPConnection) -> Client:
    """Return the client of a request: the address, and the key if the request has one."""
    return Client.at(request.client and request.client.host, request.headers.get("authorization", ""))


def openai_routes(app: FastAPI, bot: Bot) -> None:
    """Add ``/v1/models``, ``/v1/chat/completions`` and ``/v1/completions`` to the app."""
    model = {"id": bot.name, "object": "model", "created": int(time.time()), "owned_by": "transfertransfo",
             "version": bot.version}

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", response_model=None)
    def one_model(name: str) -> dict | JSONResponse:
        return model if name == bot.name else no_such_model(name)

    def no_such_model(name: str) -> JSONResponse:
        return error(404, f"There is no model {name!r} here, only {bot.name!r}.", "model_not_found", "model")

    async def answer(parameters: ChatRequest | TextRequest, request: Request) -> Response:
        if parameters.model not in ("", bot.name):
            return no_such_model(parameters.model)
        chat, num_logprobs = isinstance(parameters, ChatRequest), parameters.num_logprobs
        headers = ignored_header(parameters.ignored())
        if num_logprobs is not None and parameters.options(bot).num_beams > 1:
            raise InputError("logprobs: not supported with num_beams, which scores whole replies")
        replies = parameters.replies(bot, client_of(request),
                                     ReplyOptions(stops=tuple(parameters.stop or ()), num_logprobs=num_logprobs,
                                                  whole=not parameters.stream))
        grown, count = merge(replies), len(replies)
        frame = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                 "model": bot.name, "system_fingerprint": bot.version,
                 "object": "text_completion" if not chat else f"chat.completion{'.chunk' * bool(parameters.stream)}"}
        if (first := await unless_disconnected(request, anext(grown))) is None:
            await grown.aclose()
            return Response()
        if parameters.stream:
            return StreamingResponse(stream(bot, first, grown, count, frame, parameters),
                                     media_type="text/event-stream", headers=headers)
        async with aclosing(grown):
            if (done := await unless_disconnected(request, whole_replies(first, grown))) is None:
                return Response()
        choices = []
        for number, reply in sorted(done.items()):
            text, kept = bot.text(reply), reply.stopped.kept if reply.stopped else len(reply.tokens)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
            logprobs = None if num_logprobs is None else LogProbs(bot, reply, chat).until(kept)
            choices.append({"index": number, **said, "logprobs": logprobs, "finish_reason": reply.ended})
        return JSONResponse(frame | {"choices": choices, "usage": usage(done.values(), parameters.n or 1)},
                            headers=headers)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(parameters: ChatRequest, request: Request) -> Response:
        return await answer(parameters, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(parameters: TextRequest, request: Request) -> Response:
        return await answer(parameters, request)

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    def anything_else(rest: str) -> JSONResponse:
        return error(404, f"/v1/{rest} is not supported; use /v1/chat/completions, /v1/completions or /v1/models.")


def ignored_header(names: list[str]) -> dict[str, str]:
    """Return the header that names the parameters which change nothing."""
    shown = [ascii(name)[1:-1][:SHOWN_LETTERS] for name in names[:SHOWN_NAMES]] + ["..."] * (len(names) > SHOWN_NAMES)
    return {IGNORED_HEADER: ", ".join(shown)} if names else {}


async def unless_disconnected(request: Request, step: Coroutine) -> Any:
    """Return the result of ``step``, or cancel it and return None if the client closes the connection first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(step), asyncio.ensure_future(disconnected())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    return None if tasks[0].cancelled() else tasks[0].result()


async def merge(streams: list[AsyncGenerator[Reply, None]]) -> AsyncGenerator[tuple[int, Reply], None]:
    """Yield (number of the stream, reply) from several streams as the replies grow. An error in one ends all."""
    steps = {asyncio.ensure_future(anext(one, None)): number for number, one in enumerate(streams)}
    try:
        while steps:
            done, _ = await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
            grown = [(steps.pop(task), task.result()) for task in done]
            for number, reply in grown:
                if reply is not None:
                    yield number, reply
                    steps[asyncio.ensure_future(anext(streams[number], None))] = number
    finally:
        for task in steps:
            task.cancel()
        await asyncio.gather(*steps, return_exceptions=True)
        for one in streams:
            await one.aclose()


async def whole_replies(first: tuple[int, Reply], grown: AsyncGenerator[tuple[int, Reply], None]) -> dict[int, Reply]:
    """Return the last reply of each stream of `merge`. ``first``: the first item that it yielded."""
    done = dict([first])
    async for number, reply in grown:
        done[number] = reply
    return done


class LogProbs:
    """The log-probabilities of a reply's tokens in OpenAI's formats, in instalments."""

    def __init__(self, bot: Bot, reply: Reply, chat: bool):
        self.bot, self.reply, self.chat = bot, reply, chat
        self.sent = self.offset = 0  # tokens, characters

    def until(self, count: int) -> dict:
        """Return the log-probabilities from the first token not returned yet up to the ``count``-th."""
        start, self.sent = self.sent, max(count, self.sent)
        steps = []
        for place in range(start, self.sent):
            own, best = self.reply.logprobs[place]
            steps.append((self.token_text(self.reply.tokens[place], place), own,
                          [(self.token_text(token, place), value) for token, value in best]))
        if self.chat:
            return {"content": [logprob_entry(text, own) | {"top_logprobs": [logprob_entry(*one) for one in best]}
                                for text, own, best in steps], "refusal": None}
        offsets = []
        for text, _, _ in steps:
            offsets.append(self.offset)
            self.offset += len(text)
        return {"tokens": [text for text, _, _ in steps],
                "token_logprobs": [max(own, LEAST_LOGPROB) for _, own, _ in steps],
                "top_logprobs": [{text: max(value, LEAST_LOGPROB) for text, value in reversed(best)}
                                 for _, _, best in steps], "text_offset": offsets}

    def token_text(self, token: int, place: int) -> str:
        text = self.bot.token_text(token)
        return text.lstrip() if self.chat and place == 0 else text


def logprob_entry(text: str, value: float) -> dict:
    """Return a log-probability in the chat format; ``bytes`` is None for a token that is part of a character."""
    return {"token": text, "logprob": max(value, LEAST_LOGPROB),
            "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else [*text.encode()]}


async def stream(bot: Bot, first: tuple[int, Reply], grown: AsyncGenerator[tuple[int, Reply], None], count: int,
                 frame: dict, parameters: ChatRequest | TextRequest) -> AsyncGenerator[str, None]:
    """Yield ``count`` replies as server-sent events. ``first``, ``grown``: the first item of `merge`, and the rest."""
    chat = isinstance(parameters, ChatRequest)

    def event(number: int, said: dict | str, finish: str | None = None, logprobs: dict | None = None) -> str:
        choice = {"index": number, "delta" if chat else "text": said, "logprobs": logprobs, "finish_reason": finish}
        return f"data: {json.dumps(frame | {'choices': [choice]})}\n\n"

    sent, sent_logprobs, done = [""] * count, {}, {}
    async with aclosing(grown):
        if chat:
            for number in range(count):
                yield event(number, {"role": "assistant", "content": ""})
        try:
            number, reply = first
            while True:
                finish, text = reply.ended, bot.settled(reply)  # in this order: the last token may come in between
                new, sent[number], done[number] = text[len(sent[number]):], text, reply
                logprobs = None
                if reply.extra.num_logprobs is not None and (new or finish):
                    kept = reply.stopped.kept if reply.stopped else len(reply.tokens) if finish else \
                        bot.tokens_of(reply, len(text))
                    logprobs = sent_logprobs.setdefault(number, LogProbs(bot, reply, chat)).until(kept)
                if new or logprobs and finish:
                    yield event(number, {"content": new} if chat else new, None, logprobs)
                if finish:
                    yield event(number, {} if chat else "", finish)
                if (grew := await anext(grown, None)) is None:
                    break
                number, reply = grew
        except (RuntimeError, Busy) as problem:
            yield f"data: {error(500, str(problem)).body.decode()}\n\n"
            return
    if parameters.stream_options and parameters.stream_options.include_usage:
        yield f"data: {json.dumps(frame | {'choices': [], 'usage': usage(done.values(), parameters.n or 1)})}\n\n"
    yield "data: [DONE]\n\n"


def usage(replies: Iterable[Reply], n: int) -> dict[str, int]:
    """Count the tokens read and written, including control tokens. A prompt with ``n`` replies counts once."""
    replies = list(replies)
    read = sum(len(reply.prompt.ids) for reply in replies) // n
    written = sum(reply.stopped.tokens if reply.stopped else len(reply.tokens) + (reply.finish == "stop")
                  for reply in replies)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
