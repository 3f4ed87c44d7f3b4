"""OpenAI's interface to a `Bot`: chat completions, completions, models; docs/programs.md lists all parameters.

Knows HTTP and the names of OpenAI's fields; the texts and their bounds are the bot's.
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
from web.batching import Busy, Client, Reply, Wish
from web.bot import Bot
from web.guard import error
from web.page import sentences

OPTIONS = ("temperature", "top_k", "top_p", "num_beams", "frequency_penalty", "presence_penalty")  # of decoding
MOST_REPLIES = 8  # to one request: the share of a batch that one client has beside others
MOST_STOPS, LONGEST_STOP = 4, 256
MOST_LIKELY = 20  # tokens whose log-probabilities are told
LEAST_CHANCE = -9999.0  # in the place of an infinite log-probability, which JSON cannot say
SEEDS = 2 ** 63
# What OpenAI's own service has and this server has not, with the values that ask for nothing.
REFUSED: dict[str, tuple] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
    "verbosity": (), "store": (False,), "moderation": (), "suffix": ("",), "echo": (False,), "best_of": (1,)}
TELL_OF_IGNORED, SHOWN_NAMES, SHOWN_LETTERS = "X-Ignored-Parameters", 20, 40


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
                    raise ValueError(f"part {number} is {str(kind)[:40]!r}; only text is read here")
            return "".join(part["text"] for part in content)
        if content is None:
            if about.data.get("role") != "assistant":
                raise ValueError("is null; write text")
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
            raise ValueError(f"{kind[:40]!r} is not offered here, only 'text' is")
        return kind


class Asked(BaseModel):
    """What chat completions and completions have in common; ``top_k`` and ``num_beams`` are our own.

    Of the options of decoding only the kind is checked here; `Bot.options` knows their ranges.
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
    max_completion_tokens: int | None = None  # its newer name
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] | None = None
    stop: list[str] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def few_and_short(cls, stop: object) -> object:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and len(stops) > MOST_STOPS:
            raise ValueError(f"has {len(stops):,} texts; at most {MOST_STOPS} are looked for")
        for text in stops if isinstance(stops, list) else []:
            if isinstance(text, str) and not 0 < len(text) <= LONGEST_STOP:
                raise ValueError(f"has a text of {len(text):,} characters; write 1 to {LONGEST_STOP}")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def of_tokens(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for token in biases or {}:
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ValueError(f"{token[:40]!r} is no token's number")
        return biases

    def options(self, bot: Bot):
        """The options of decoding. Raises `InputError`."""
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        return bot.options(**{name: getattr(self, name) for name in OPTIONS}, logit_bias=tuple(biases.items()) or None,
                           max_length=self.max_completion_tokens or self.max_tokens)

    def seeds(self) -> list[int | None]:
        """The seed of each reply: the one that was asked for, and those behind it."""
        return [None if self.seed is None else (self.seed + number) % SEEDS or SEEDS - 1  # 0 would be none
                for number in range(self.n or 1)]

    def ignored(self) -> list[str]:
        """The names of what was asked for and changes nothing. Raises `InputError` for what is not offered."""
        names = []
        for name, value in (self.model_extra or {}).items():
            neutral = REFUSED.get(name)
            if neutral is None:
                names.append(name)
            elif value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                raise InputError(f"{name}: not offered here, leave it out")
        if self.stream_options and not self.stream:
            raise InputError("stream_options: only together with stream")
        return names


class ChatRequest(Asked):
    """A request of the chat interface."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    response_format: ResponseFormat | None = None

    def conversation(self) -> tuple[list[str], list[str]]:
        """The personality, from the system messages, and what was said, the user's first: several messages of one side
        are one. Raises `InputError` unless the user spoke last."""
        personality, said, speaker = [], [""], "user"
        for message in self.messages:
            if message.role in ("system", "developer"):
                personality += sentences(message.content)
            elif message.role == speaker:
                said[-1] = f"{said[-1]} {message.content}".strip()
            else:
                said.append(message.content)
                speaker = message.role
        if speaker != "user" or not said[-1].strip():
            raise InputError("messages: the last one must be the user's, and say something")
        return personality, said if said[0] else said[1:]

    @property
    def likely(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs: only together with logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def replies(self, bot: Bot, client: Client, wish: Wish) -> list[AsyncGenerator[Reply, None]]:
        personality, said = self.conversation()
        options = self.options(bot)
        return [bot.reply(personality, said, options.over(seed=seed), client, wish) for seed in self.seeds()]


class TextRequest(Asked):
    """A request of the older interface: go on with a text."""

    prompt: list[str]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def only_text(cls, prompt: object) -> object:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError("is neither a text nor a list of texts; numbers of tokens are not read here")
        return prompts

    @property
    def likely(self) -> int | None:
        return self.logprobs

    def replies(self, bot: Bot, client: Client, wish: Wish) -> list[AsyncGenerator[Reply, None]]:
        if (count := len(self.prompt) * (self.n or 1)) > MOST_REPLIES:
            raise InputError(f"prompt: asks for {count:,} replies, n to each text; at most {MOST_REPLIES} are given")
        options = self.options(bot)
        return [bot.continuation(text, options.over(seed=seed), client, wish)
                for text in self.prompt for seed in self.seeds()]


PARAMETERS = {*ChatRequest.model_fields, *TextRequest.model_fields, *REFUSED}


def client_of(request: HTTPConnection) -> Client:
    """Return the client of a request: its address, and its key if it gives one."""
    return Client.at(request.client and request.client.host, request.headers.get("authorization", ""))


def openai_routes(app: FastAPI, bot: Bot) -> None:
    """``/v1/models``, ``/v1/chat/completions`` and ``/v1/completions``."""
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

    async def answer(asked: ChatRequest | TextRequest, request: Request) -> Response:
        if asked.model not in ("", bot.name):
            return no_such_model(asked.model)
        chat, likely = isinstance(asked, ChatRequest), asked.likely
        headers = ignored_header(asked.ignored())
        if likely is not None and asked.options(bot).num_beams > 1:
            raise InputError("logprobs: not offered with num_beams, which weighs whole replies")
        replies = asked.replies(bot, client_of(request), Wish(stops=tuple(asked.stop or ()), likely=likely))
        grown, count = together(replies), len(replies)
        frame = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                 "model": bot.name, "system_fingerprint": bot.version,
                 "object": "text_completion" if not chat else f"chat.completion{'.chunk' * bool(asked.stream)}"}
        if (first := await unless_gone(request, anext(grown))) is None:
            await grown.aclose()
            return Response()
        if asked.stream:
            return StreamingResponse(stream(bot, first, grown, count, frame, asked), media_type="text/event-stream",
                                     headers=headers)
        async with aclosing(grown):
            if (done := await unless_gone(request, last_of_each(first, grown))) is None:
                return Response()
        choices = []
        for number, reply in sorted(done.items()):
            text, kept = bot.text(reply), reply.stopped.kept if reply.stopped else len(reply.tokens)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
            chances = None if likely is None else Chances(bot, reply, chat).until(kept)
            choices.append({"index": number, **said, "logprobs": chances, "finish_reason": reply.ended})
        return JSONResponse(frame | {"choices": choices, "usage": usage(done.values(), asked.n or 1)}, headers=headers)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await answer(asked, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: TextRequest, request: Request) -> Response:
        return await answer(asked, request)

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    def anything_else(rest: str) -> JSONResponse:
        return error(404, f"/v1/{rest} is not offered here; /v1/chat/completions, /v1/completions and /v1/models are.")


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that tells which parameters change nothing."""
    shown = [ascii(name)[1:-1][:SHOWN_LETTERS] for name in names[:SHOWN_NAMES]] + ["..."] * (len(names) > SHOWN_NAMES)
    return {TELL_OF_IGNORED: ", ".join(shown)} if names else {}


async def unless_gone(request: Request, step: Coroutine) -> Any:
    """What ``step`` returns; None, and it is cancelled, when the client closes the connection before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(step), asyncio.ensure_future(gone())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    return None if tasks[0].cancelled() else tasks[0].result()


async def together(replies: list[AsyncGenerator[Reply, None]]) -> AsyncGenerator[tuple[int, Reply], None]:
    """The replies of several streams as they grow, each with the number of its stream. An error of one ends all."""
    steps = {asyncio.ensure_future(anext(one, None)): number for number, one in enumerate(replies)}
    try:
        while steps:
            done, _ = await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
            grown = [(steps.pop(task), task.result()) for task in done]
            for number, reply in grown:
                if reply is not None:
                    yield number, reply
                    steps[asyncio.ensure_future(anext(replies[number], None))] = number
    finally:
        for task in steps:
            task.cancel()
        await asyncio.gather(*steps, return_exceptions=True)
        for one in replies:
            await one.aclose()


async def last_of_each(first: tuple[int, Reply], grown: AsyncGenerator[tuple[int, Reply], None]) -> dict[int, Reply]:
    """What `together` yields last of each stream, its ``first`` included."""
    done = dict([first])
    async for number, reply in grown:
        done[number] = reply
    return done


class Chances:
    """The log-probabilities of a reply's tokens in the form of either interface, as far as they were not told yet."""

    def __init__(self, bot: Bot, reply: Reply, chat: bool):
        self.bot, self.reply, self.chat = bot, reply, chat
        self.told = self.offset = 0  # tokens, letters

    def until(self, count: int) -> dict:
        """Of the tokens up to the ``count``-th."""
        start, self.told = self.told, max(count, self.told)
        steps = []
        for place in range(start, self.told):
            own, best = self.reply.likely[place]
            steps.append((self.word(self.reply.tokens[place], place), own,
                          [(self.word(token, place), value) for token, value in best]))
        if self.chat:
            return {"content": [chance(word, own) | {"top_logprobs": [chance(*one) for one in best]}
                                for word, own, best in steps], "refusal": None}
        offsets = []
        for word, _, _ in steps:
            offsets.append(self.offset)
            self.offset += len(word)
        return {"tokens": [word for word, _, _ in steps],
                "token_logprobs": [max(own, LEAST_CHANCE) for _, own, _ in steps],
                "top_logprobs": [{word: max(value, LEAST_CHANCE) for word, value in reversed(best)}
                                 for _, _, best in steps], "text_offset": offsets}

    def word(self, token: int, place: int) -> str:
        word = self.bot.word(token)
        return word.lstrip() if self.chat and place == 0 else word


def chance(word: str, value: float) -> dict:
    """A token's log-probability as the chat interface has it; ``bytes``: None of a part of a letter."""
    return {"token": word, "logprob": max(value, LEAST_CHANCE),
            "bytes": None if "\N{REPLACEMENT CHARACTER}" in word else [*word.encode()]}


async def stream(bot: Bot, first: tuple[int, Reply], grown: AsyncGenerator[tuple[int, Reply], None], count: int,
                 frame: dict, asked: ChatRequest | TextRequest) -> AsyncGenerator[str, None]:
    """``count`` replies as server-sent events. ``grown`` is what `together` yields behind its ``first``."""
    chat = isinstance(asked, ChatRequest)

    def event(number: int, said: dict | str, finish: str | None = None, chances: dict | None = None) -> str:
        choice = {"index": number, "delta" if chat else "text": said, "logprobs": chances, "finish_reason": finish}
        return f"data: {json.dumps(frame | {'choices': [choice]})}\n\n"

    sent, told, done = [""] * count, {}, {}
    async with aclosing(grown):
        if chat:
            for number in range(count):
                yield event(number, {"role": "assistant", "content": ""})
        try:
            number, reply = first
            while True:
                finish, text = reply.ended, bot.settled(reply)  # in this order: the last token may come in between
                new, sent[number], done[number] = text[len(sent[number]):], text, reply
                chances = None
                if reply.wish.likely is not None and (new or finish):
                    kept = reply.stopped.kept if reply.stopped else len(reply.tokens) if finish else \
                        bot.tokens_of(reply, len(text))
                    chances = told.setdefault(number, Chances(bot, reply, chat)).until(kept)
                if new or chances and finish:
                    yield event(number, {"content": new} if chat else new, None, chances)
                if finish:
                    yield event(number, {} if chat else "", finish)
                if (grew := await anext(grown, None)) is None:
                    break
                number, reply = grew
        except (RuntimeError, Busy) as problem:
            yield f"data: {error(500, str(problem)).body.decode()}\n\n"
            return
    if asked.stream_options and asked.stream_options.include_usage:
        yield f"data: {json.dumps(frame | {'choices': [], 'usage': usage(done.values(), asked.n or 1)})}\n\n"
    yield "data: [DONE]\n\n"


def usage(replies: Iterable[Reply], n: int) -> dict[str, int]:
    """Tokens read and written, control tokens included. What ``n`` replies answer is counted once."""
    replies = list(replies)
    read = sum(len(reply.prompt.ids) for reply in replies) // n
    written = sum(reply.stopped.tokens if reply.stopped else len(reply.tokens) + (reply.finish == "stop")
                  for reply in replies)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
