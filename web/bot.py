"""Answer texts of many conversations at once: from a personality and messages to the text of a reply.

This file knows a `Decoder` and a tokenizer; it knows neither pages nor HTTP.
"""

from argparse import Namespace
from bisect import bisect_left
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import lru_cache
from pathlib import Path

from cli import InputError, printable
from decoding import Decoding, decoded, fitted_context, joins, load_checkpoint
from files import hash_tensors
from inputs import Segment, build_context
from packing import prepare_to_decode_
from pretrained import resolve_checkpoint
from templates import OwnTemplate, tokens_for_chat
from web.batching import NO_OPTIONS, Busy, Decoder, Reply, ReplyOptions, Stopped, Stopping
from web.clients import NOBODY, Client

MAX_TEXT = 2_000  # characters of a message, and of a personality
WIDEST = 16  # most beams of a search


class Bot:
    """A model with tokenizer and decoder that answers texts of many conversations at once.

    ``args``: the flags of `utils.add_common_flags` and `decoding.add_decoding_flags`, ``max_batch``, ``max_waiting``
    and ``memory``. ``decoding``: the options of a request that sets none.
    """

    def __init__(self, args: Namespace):
        self.args, self.decoding = args, Decoding.of(args)
        self.model, self.tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len,
                                                     max_history=args.max_history)
        self.weights = hash_tensors(sorted(self.model.state_dict().items()))[:16]  # the hash that feedback.collect uses
        prepare_to_decode_(self.model, args.device, args.fp16)
        self.special = tokens_for_chat(self.tokenizer)
        self.encode = lru_cache(1_000)(self.tokenizer.encode)  # each message comes with all earlier ones
        self.encode_persona = lru_cache(1_000)(self.tokenizer.encode_persona)
        self.name = Path(resolve_checkpoint(args.model_checkpoint)).name
        self.version = self.weights[:12]
        self.options()  # raises InputError if the flags exceed the server's bounds
        self.decoder = Decoder(self.model, self.special, args.max_batch, args.max_waiting, args.memory)

    def context(self, personality: list[str], said: list[str], options: Decoding) -> Segment:
        """Build the context in which the model answers the last message of ``said``; the oldest message comes first.

        Raises `InputError` if a text is too long or no room is left for a reply.
        """
        said = said[-(2 * self.model.max_history + 1):]
        for name, text in [("the personality", "\n".join(personality)), *(("a message", text) for text in said)]:
            if len(text) > MAX_TEXT:
                raise InputError(f"{name} has {len(text):,} characters; write at most {MAX_TEXT:,}")
        return fitted_context(self.model, self.encode_persona(tuple(personality)), [self.encode(text) for text in said],
                              self.special, options.max_length)

    def options(self, **changes) -> Decoding:
        """Return the server's decoding options with ``changes``; a value of None changes nothing. Raises `InputError`.

        A reply gets at most half of the model's positions, so that the context has the other half.
        """
        options = self.decoding.over(**changes)
        if options.num_beams > WIDEST:
            raise InputError(f"num_beams: the server searches with at most {WIDEST}, not {options.num_beams:,}")
        return options.over(max_length=min(options.max_length, self.model.max_positions // 2))

    async def reply(self, personality: list[str], said: list[str], options: Decoding, client: Client = NOBODY,
                    extra: ReplyOptions = NO_OPTIONS) -> AsyncGenerator[Reply, None]:
        """Answer the last message of ``said`` with the given ``personality``; yields like `Decoder.reply`.

        Raises `InputError` and `Busy` before the first token, and ``RuntimeError`` if decoding fails.
        """
        if reason := self.decoder.refuses(client):  # before any work is done
            raise reason
        context = self.context(personality, said, options)
        async with aclosing(self._replies(context, options, client, extra)) as replies:
            async for reply in replies:
                yield reply

    async def continuation(self, beginning: str, options: Decoding, client: Client = NOBODY,
                           extra: ReplyOptions = NO_OPTIONS) -> AsyncGenerator[Reply, None]:
        """Continue a text, without personality and messages; yields and raises like `reply`.

        `text` returns the continuation without its ``beginning``.
        """
        if reason := self.decoder.refuses(client):
            raise reason
        if len(beginning) > MAX_TEXT:
            raise InputError(f"prompt: has {len(beginning):,} characters; write at most {MAX_TEXT:,}")
        context = build_context([], [], self.special, self.model.history_start)
        if isinstance(self.special, OwnTemplate):  # a model with a chat template continues text outside the template
            begin = [] if self.encode(beginning) else [self.special.bos]
            context = Segment(begin, begin, opened=True)
        room = self.model.max_positions - self.model.history_start - len(context.ids) - 1 - options.max_length
        extra = extra._replace(beginning=tuple(self.encode(beginning)[-max(room, 1):]))
        async with aclosing(self._replies(context, options, client, extra)) as replies:
            async for reply in replies:
                yield reply

    async def _replies(self, context: Segment, options: Decoding, client: Client, extra: ReplyOptions
                       ) -> AsyncGenerator[Reply, None]:
        shown = 0
        async with aclosing(self.decoder.reply(context, options, client, extra)) as replies:
            async for reply in replies:
                if reply.finish == "busy":
                    raise Busy
                if reply.finish == "stopping" and not reply.tokens:
                    raise Stopping
                if reply.finish in ("error", "cancelled", "stopping"):
                    raise RuntimeError("the reply broke off; the server's log says why")
                if reply.finish or len(reply.tokens) >= shown + shown // 64:  # converting long texts is slow
                    shown = len(reply.tokens)
                    if extra.stops:
                        reply.stopped = self._stop(reply)
                    yield reply
                    if reply.stopped:
                        return

    def text(self, reply: Reply) -> str:
        """Return the reply so far as printable text, up to the stop text if one ended it."""
        text = self._text(reply, len(reply.tokens))
        return text[:reply.stopped.characters] if reply.stopped else text.rstrip()

    def settled(self, reply: Reply) -> str:
        """Return the part of `text` that later tokens cannot change.

        This leaves out the last word where GPT-1's tokenizer may still join it with the next ("do" becomes "don't"), a
        last character whose bytes are incomplete, and an end that may be the beginning of a stop text.
        """
        finish, text = reply.ended, self.text(reply)  # in this order: the last token may come in between
        if finish:
            return text
        text = text[:max(text.rfind(" "), 0)] if joins(self.tokenizer) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        stops = reply.extra.stops
        begun = (start for start in range(max(0, len(text) - max(map(len, stops), default=0)), len(text))
                 if any(stop.startswith(text[start:]) for stop in stops))
        return text[:next(begun, len(text))]

    def tokens_of(self, reply: Reply, characters: int) -> int:
        """Return the number of first tokens whose text has at least this many ``characters``."""
        return bisect_left(range(len(reply.tokens)), characters, key=lambda count: len(self._text(reply, count)))

    def _text(self, reply: Reply, count: int) -> str:
        """Return the text of the first ``count`` tokens, with its line breaks but without leading white space."""
        begun = reply.extra.beginning
        text = decoded(self.tokenizer, [*begun, *reply.tokens[:count]])
        text = text[len(decoded(self.tokenizer, begun)):] if begun else text.lstrip()
        return "\n".join(map(printable, text.split("\n")))

    def _stop(self, reply: Reply) -> Stopped | None:
        """Find the stop text that is complete first, in the part of the text that later tokens cannot change."""
        finish, text = reply.finish, self._text(reply, len(reply.tokens))
        if not finish and joins(self.tokenizer):
            text = text[:max(text.rfind(" "), 0)]
        found = [(place + len(stop), place) for stop in reply.extra.stops if (place := text.find(stop)) >= 0]
        if not found:
            return None
        end, place = min(found)
        return Stopped(place, self.tokens_of(reply, place), self.tokens_of(reply, end))

    @lru_cache(50_000)  # noqa: B019  there is one Bot per process
    def token_text(self, token: int) -> str:
        """Return the text of a token that follows others, including the space before it."""
        before = self.encode("a")
        return decoded(self.tokenizer, [*before, token])[len(decoded(self.tokenizer, before)):]
