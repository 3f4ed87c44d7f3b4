"""The replies of many conversations, decoded together: whoever asks joins the batch between two tokens.

A reply does not depend on its neighbours: every request has its own decoding options and its own random generator, and
is answered as `decoding.generate_replies` would answer it alone; what goes wrong with one ends that one. Nobody's
request holds up another's for long: long contexts are computed in pieces, and each client has a share of what there is.
Nothing here knows texts, pages or HTTP.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network
from typing import NamedTuple

import torch

from cli import InputError
from decoding import BeamSearch, Decoding, allowed_scores, choose_tokens
from inputs import Segment, Specials, begin_reply
from model import DoubleHeadsModel
from web.keyvalues import KeyValues, Place, Row, Work, let_attend_by_row_

MOST_READ = 256  # tokens of contexts computed in one step
LEAST_READ = 8
SHARE = 4  # a client that is not alone has this part of the batch: a fourth
MEMORY = 2048  # MiB of keys and values
LONGEST_PAUSE = 1.0  # s between two looks at a reply that grows
logger = logging.getLogger("batching")


class Busy(Exception):
    """As many requests are waiting as may wait."""

    def __str__(self) -> str:
        return "Too many people are talking to this model; try again in a moment."


class Stopping(Busy):
    """The server is about to end."""

    def __str__(self) -> str:
        return "The server is stopping; try again when it is back."


class Client(NamedTuple):
    """A client: an address and a key. All clients at one address share what one address gets, whatever their keys."""

    address: str = ""
    key: str = ""

    @classmethod
    def at(cls, address: str | None, key: str = "") -> "Client":
        """``address``: of the connection. An IPv6 address counts with all of its network, which one machine has."""
        with suppress(ValueError):
            if isinstance(place := ip_address(address or ""), IPv6Address) and not place.ipv4_mapped:
                address = str(ip_network((place, 64), strict=False))
        return cls(address or "", key[:200])


NOBODY = Client()


class Wish(NamedTuple):
    """What is wanted of a reply besides the options of decoding."""

    beginning: tuple[int, ...] = ()  # tokens that the reply begins with
    stops: tuple[str, ...] = ()  # texts before which it ends
    likely: int | None = None  # of each token, keep log-probabilities: its own, and those of so many likeliest ones


PLAIN = Wish()


class Stopped(NamedTuple):
    """Where a reply ends because one of the stops has come."""

    letters: int  # of the text, before the stop
    kept: int  # tokens that have these letters
    tokens: int  # tokens until the stop was whole


# ---------------------------------------------------------------------------------------------------------- tokens


class Reply:
    """A request, from the queue to its last token.

    ``tokens``: the reply so far, without control tokens; beams decide only at the end. ``finish``: None until then,
    and then "stop" (the model ended it), "length", "cancelled", "error", "busy" (others had more right to its place in
    the queue) or "stopping". ``stopped``: set when one of the wished stops has come, whatever comes behind it.
    ``last_step``, of finished replies but those of beams: the logits that the last token was chosen from, (vocabulary,)
    each, as they were and as bans and filter left them. ``likely``, where it is wished for: of each of `tokens` its
    log-probability by the model, and the likeliest tokens with theirs.
    """

    def __init__(self, context: Segment, args: Decoding, special: Specials, device: torch.device, client: Client,
                 notify: Callable[[], None], wish: Wish):
        self.context, self.args, self.special, self.client, self.notify = context, args, special, client, notify
        self.wish, self.prompt = wish, begin_reply(context, special, wish.beginning)
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.stopped: Stopped | None = None
        self.likely: list[tuple[float, list[tuple[int, float]]]] = []
        self.last_step: tuple[torch.Tensor, torch.Tensor] | None = None
        self.cancelled = False
        self.computed = 0  # the step that computed it last
        self.places: list[Place] = []
        self.rows: list[Row] = []
        self.logits: dict[Row, torch.Tensor] = {}  # of rows that are computed while others of them are not
        self.beams = BeamSearch(args, special) if args.num_beams > 1 else None
        self.random = torch.Generator(device)
        if args.seed:
            self.random.manual_seed(args.seed)
        else:
            self.random.seed()

    @property
    def width(self) -> int:
        """Rows of the batch that it may need."""
        return self.args.num_beams + 1 if self.beams else 1

    @property
    def longest(self) -> int:
        """Tokens that a row of it may come to."""
        return len(self.prompt.ids) + self.args.max_length

    @property
    def ended(self) -> str | None:
        """`finish`, or "stop" where a stop has come before."""
        return "stop" if self.stopped else self.finish

    @property
    def reading(self) -> bool:
        """Whether its context is not computed yet, but for the last token."""
        return len(self.rows) == 1 and len(self.rows[0].ids) > 1

    def bytes(self, token_bytes: int) -> int:
        """What keys and values of all its rows may come to."""
        return KeyValues.columns_for(self.longest) * self.width * token_bytes

    def begin(self, places: list[Place]) -> None:
        self.places = places
        self.rows = [Row(places[0], self.prompt.start, 0, self.prompt.ids, self.prompt.types)]

    def end(self, finish: str) -> None:
        self.rows, self.finish = [], self.finish or finish  # a reply that has its end keeps it when all is closed

    def go_on(self, token: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take the next token, which may be the end, chosen from the logits ``after`` the filter."""
        if token not in self.special:
            if self.wish.likely is not None:  # first: who sees the token may ask for it
                chances = before.float().log_softmax(-1)
                best = chances.topk(min(self.wish.likely, len(chances)))
                self.likely.append((chances[token].item(), list(zip(best.indices.tolist(), best.values.tolist(),
                                                                    strict=True))))
            self.tokens.append(token)
            self.rows[0].ids, self.rows[0].types = [token], [self.special.speaker1]
        if token in self.special or len(self.tokens) == self.args.max_length:
            self.last_step = before.float().clone(), after.clone()  # first: who sees the end may ask for it
            self.end("stop" if token in self.special else "length")

    def go_on_with_beams(self, scores: torch.Tensor, cache: KeyValues) -> None:
        """Take a step of the search from the log-probabilities of `rows`, (rows, vocabulary).

        A hypothesis goes on in the place of the one it continues; where several continue one, the others get a copy of
        what follows the context, which lies in all places.
        """
        best, tokens = scores.topk(self.beams.candidates(scores.shape[1]))
        parents = self.beams.step(best.tolist(), tokens.tolist())
        if not parents:
            _, self.tokens, finish = self.beams.results()[0]
            return self.end(finish)
        free = [place for place in self.places if all(place is not self.rows[parent].place for parent in parents)]
        rows, kept = [], set()
        for parent, tokens in zip(parents, self.beams.hypotheses, strict=True):
            row = self.rows[parent]
            place = row.place
            if parent in kept:
                place = free.pop()
                cache.copy(row.place, place, slice(len(self.prompt.ids), row.length))
            kept.add(parent)
            rows.append(Row(place, row.start, row.length, tokens[-1:], [self.special.speaker1]))
        self.rows = rows


class Pace:
    """How many tokens of contexts a step may compute so that it takes at most twice as long as one without."""

    def __init__(self):
        self.tokens, self.usual = 32.0, None  # s of a step that only decodes

    def took(self, seconds: float, read: int, decoded: int) -> None:
        """A step has read so many tokens of contexts while so many replies got a token."""
        if not decoded:
            return
        if not read:
            self.usual = seconds if self.usual is None else 0.7 * self.usual + 0.3 * seconds
        elif self.usual is not None:
            if seconds > 2 * self.usual:
                self.tokens = max(LEAST_READ, min(self.tokens, read) / 2)
            elif read >= self.tokens - 1:
                self.tokens = min(MOST_READ, 1.2 * self.tokens)


class Decoder:
    """A thread that decodes what is asked of it, at most ``max_batch`` rows in a step.

    Another ``max_waiting`` requests may wait; beyond, `submit` raises `Busy`. ``memory``: MiB of keys and values that
    may be set aside; a request that needs more than is left waits.

    The client with the fewest rows in the batch goes first, by address, then by key, then by time. A client that is
    not alone has a share, a `SHARE`-th of the rows of each step, with which it enters even a full batch; memory is
    shared out so that something is left for others, see `_fits`. The queue is shared likewise: when it is full, a
    newcomer takes the place of the last request of the client with the most.
    """

    def __init__(self, model: DoubleHeadsModel, special: Specials, max_batch: int = 32, max_waiting: int = 64,
                 memory: int = MEMORY):
        self.model, self.special = model, special
        self.max_batch, self.max_waiting, self.memory = max_batch, max_waiting, memory << 20
        self.waiting: list[Reply] = []
        self.decoding: list[Reply] = []
        let_attend_by_row_(model)
        self.cache = KeyValues.of(model)
        self.pace, self.steps, self.stepped = Pace(), 0, time.monotonic()
        self.wake, self.closed, self.draining = threading.Condition(), False, False
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self.thread.start()

    # --------------------------------------------------------------------------------------- asked from elsewhere

    def refuses(self, client: Client = NOBODY) -> Busy | None:
        """Why a request of that client would be refused now; None when it would not."""
        if self.closed or self.draining:
            return Stopping()
        return Busy() if len(self.waiting) >= self.max_waiting and not self._loser(client) else None

    def _loser(self, client: Client) -> Reply | None:
        """The request that gives up its place in the full queue for one of ``client``'s, if any does."""
        waiting = list(self.waiting)
        for of in (lambda one: one.address, lambda one: one):
            counts = Counter(of(reply.client) for reply in waiting)
            greediest, most = counts.most_common(1)[0]
            if most > counts[of(client)] + 1:
                return next(reply for reply in reversed(waiting) if of(reply.client) == greediest)
            waiting = [reply for reply in waiting if of(reply.client) == of(client)] or waiting
        return None

    def submit(self, context: Segment, args: Decoding, client: Client = NOBODY,
               notify: Callable[[], None] = lambda: None, wish: Wish = PLAIN) -> Reply:
        """Queue a request. Raises `Busy`, and `InputError` when it needs more memory than there may be or names tokens
        that the model has not.

        A ``seed`` of 0 is none. ``notify`` is called from the decoding thread each time the reply has changed.
        """
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if unknown := [token for token, _ in args.logit_bias if token >= vocabulary]:
            raise InputError(f"logit_bias: there is no token {unknown[0]}; the model knows {vocabulary:,}, from 0 on")
        reply = Reply(context, args, self.special, self.model.device, client, notify, wish)
        needed = KeyValues.bytes_for(self.cache.token_bytes, reply.longest, reply.width)
        if needed > self.memory:
            raise InputError(f"a reply of up to {args.max_length:,} tokens to these messages needs {needed >> 20:,} "
                             f"MiB of memory, and --memory allows {self.memory >> 20:,}; ask for fewer tokens, or "
                             "fewer beams")
        with self.wake:
            if self.closed or self.draining:
                raise Stopping
            if len(self.waiting) >= self.max_waiting:
                if not (loser := self._loser(client)):
                    raise Busy
                self.waiting.remove(loser)
                self._end([loser], "busy")
            self.waiting.append(reply)
            self.wake.notify()
        return reply

    async def reply(self, context: Segment, args: Decoding, client: Client = NOBODY, wish: Wish = PLAIN
                    ) -> AsyncGenerator[Reply, None]:
        """`submit`, and the same `Reply` when it has grown, the last time with its ``finish``.

        It is looked at after each token, or less often when that takes long: to show all replies takes a fifth of the
        time, and the rest is for decoding them. Leaving the loop early, or closing the generator, ends the decoding.
        Raises `Busy`, at the first step.
        """
        loop, changed, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        reply: Reply | None = None

        def notify() -> None:  # which may be called before `submit` has returned
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                if reply is None or reply.finish:
                    loop.call_soon_threadsafe(ended.set)
                if not changed.is_set():  # else what is there is looked at, too, when the loop comes to it
                    loop.call_soon_threadsafe(changed.set)

        reply = self.submit(context, args, client, notify, wish)
        try:
            finish, took = None, 0.0
            while not finish:
                await changed.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(4 * took * len(self.decoding), LONGEST_PAUSE)):
                        await ended.wait()
                changed.clear()
                ended.clear()
                finish, start = reply.finish, time.monotonic()  # first, so that the last step is shown, too
                yield reply
                took = time.monotonic() - start
        finally:
            reply.cancelled = True

    def drain(self) -> None:
        """Refuse what comes from now on and what waits; go on with what is being decoded."""
        with self.wake:
            self.draining = True
            waiting, self.waiting = self.waiting, []
        self._end(waiting, "stopping")

    def close(self) -> None:
        """End everything and the thread."""
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join()

    # ------------------------------------------------------------------------------------------- in its own thread

    def _run(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.waiting or self.decoding or self.closed)
            if self.closed:
                break
            try:
                self._step()
            except Exception:  # whatever it was, those who come later are not to suffer from it
                logger.exception("A step failed; its %d replies are given up", len(self.decoding))
                self._end(self.decoding, "error")
        self._end([*self.decoding, *self.waiting], "stopping")

    def _end(self, replies: Iterable[Reply], finish: str) -> None:
        for reply in replies:
            reply.end(finish)
            reply.notify()

    @torch.inference_mode()
    def _step(self) -> None:
        """Let the finished go and newcomers in, read on in contexts, and give replies their next token."""
        start = time.monotonic()
        self._end([reply for reply in self.decoding if reply.cancelled and not reply.finish], "cancelled")
        for reply in self.decoding:
            if reply.finish:
                self.cache.give_back(reply.places, spoilt=reply.finish == "error")
        self.decoding = [reply for reply in self.decoding if not reply.finish]
        self._admit()
        self.cache.tidy()
        self.steps += 1
        decoding, reading = self._whose_turn(), self._what_to_read()
        work = [Work(row, 1) for rows in decoding.values() for row in rows] + [
            Work(reply.rows[0], tokens) for reply, tokens in reading]
        if work:
            self._choose(self._compute(work, [*decoding, *(reply for reply, _ in reading)]))
        self.stepped = time.monotonic()
        self.pace.took(self.stepped - start, sum(tokens for _, tokens in reading), len(decoding))

    def _admit(self) -> None:
        """Take in those who wait, as far as there is room."""
        while True:
            with self.wake:
                self.waiting = [reply for reply in self.waiting if not reply.cancelled]
                rows, memory = Counter(), Counter()
                for reply in self.decoding:
                    for whose in (reply.client, reply.client.address):
                        rows[whose] += reply.width
                        memory[whose] += reply.bytes(self.cache.token_bytes)
                order = sorted(self.waiting, key=lambda reply: (rows[reply.client.address], rows[reply.client]))
                reply = next((reply for reply in order if self._fits(reply, rows, memory)), None)
                if reply is None:
                    return
                self.waiting.remove(reply)
                self.decoding.append(reply)
            try:
                reply.begin(self.cache.take(reply.longest, reply.width))
            except Exception:
                logger.exception("There is no memory for a reply")
                self._end([reply], "error")

    def _fits(self, reply: Reply, rows: Counter, memory: Counter) -> bool:
        """Whether there is room in the batch and in memory, of which ``rows`` and ``memory`` say what clients and
        addresses have.

        A full batch still takes in what is within an address's share, up to twice its size, and what is within a
        client's, up to one and a half times, so that no address fills it up with clients. Of the memory, an address
        that has some gets at most twice as much as is then left, and a client as much as is left: whoever comes next
        finds room.
        """
        if not self.decoding:
            return True
        client, address, share = reply.client, reply.client.address, max(1, self.max_batch // SHARE)
        most = 2 * self.max_batch if rows[address] + reply.width <= share else (
            3 * self.max_batch // 2 if rows[client] + reply.width <= share else self.max_batch)
        left = self.memory - self.cache.bytes_with(reply.longest, reply.width)
        needed = reply.bytes(self.cache.token_bytes)
        return sum(other.width for other in self.decoding) + reply.width <= most and left >= 0 and (
            not memory[address] or memory[address] + needed <= 2 * left) and (
            not memory[client] or memory[client] + needed <= left)

    def _whose_turn(self) -> dict[Reply, list[Row]]:
        """The rows that are computed in this step, by reply: all, or of each client a share.

        Whose reply has waited longest comes first. A search wider than the share goes on when all its rows had a turn.
        """
        ready = [reply for reply in self.decoding if reply.rows and not reply.reading]
        several = len({reply.client.address for reply in ready}) > 1
        shares: dict[object, list[Reply]] = defaultdict(list)
        for reply in sorted(ready, key=lambda reply: reply.computed):
            shares[reply.client.address if several else reply.client].append(reply)
        most = self.max_batch if len(shares) < 2 else max(1, self.max_batch // max(SHARE, len(shares)))
        turn = {}
        for replies in shares.values():
            left = most
            for reply in replies:
                if rows := [row for row in reply.rows if row not in reply.logits][:left]:
                    left -= len(rows)
                    reply.computed = self.steps
                    turn[reply] = rows
        return turn

    def _what_to_read(self) -> list[tuple[Reply, int]]:
        """Replies whose contexts are read on in this step, and how many tokens of each.

        A quarter is for whoever came first; the rest for clients with few contexts to read, the shortest first.
        """
        readers = [reply for reply in self.decoding if reply.reading]
        alone = all(reply.reading for reply in self.decoding)
        if not readers or not alone and self.steps % 8 == 0:  # now and then a step without, to know what that takes
            return []
        budget = MOST_READ if alone else int(self.pace.tokens)
        crowd = Counter(reply.client.address for reply in readers)
        order = sorted(readers[1:], key=lambda reply: (crowd[reply.client.address], len(reply.rows[0].ids)))
        first = min(len(readers[0].rows[0].ids), max(1, budget // 4) if order else budget)
        reading, budget = [(readers[0], first)], budget - first
        for reply in order:
            if budget <= 0:
                break
            tokens = min(budget, len(reply.rows[0].ids))
            reading.append((reply, tokens))
            budget -= tokens
        return reading

    def _compute(self, work: list[Work], replies: list[Reply]) -> list[tuple[Reply, torch.Tensor]]:
        """Do the work of ``replies``; of those all of whose rows are computed now: the logits of these.

        When that fails, the work of each is done by itself, so that only those end with whom it fails again.
        """
        try:
            rows, logits = self.cache.compute(self.model, work)
        except Exception as problem:
            if len(replies) == 1:
                logger.error("A reply could not be decoded: %s", str(problem).split("\n")[0])
                self._end(replies, "error")
                return []
            own = [[one for one in work if any(one.row is row for row in reply.rows)] for reply in replies]
            return [done for reply, part in zip(replies, own, strict=True) for done in self._compute(part, [reply])]
        for reply in replies:  # what is read of a context is copied at once to where beams will want it
            if reply.beams and reply.rows[0].length <= len(reply.prompt.ids):
                read = sum(one.tokens for one in work if one.row is reply.rows[0])
                for place in reply.places[1:]:
                    self.cache.copy(reply.places[0], place, slice(reply.rows[0].length - read, reply.rows[0].length))
        new = dict(zip(rows, logits, strict=True))
        done = []
        for reply in replies:
            reply.logits |= {row: new[row] for row in reply.rows if row in new}
            if len(reply.logits) == len(reply.rows):
                done.append((reply, torch.stack([reply.logits[row] for row in reply.rows])))
                reply.logits = {}
        return done

    def _choose(self, computed: list[tuple[Reply, torch.Tensor]]) -> None:
        """Let each reply go on by a token, or end, by the logits of its rows, (rows, vocabulary)."""
        if not computed:
            return
        logits = torch.cat([rows for _, rows in computed])
        options = [reply.args for reply, rows in computed for _ in rows]
        said = [tokens for reply, _ in computed
                for tokens in (reply.beams.hypotheses if reply.beams else [reply.tokens])]
        beams = torch.tensor([bool(reply.beams) for reply, rows in computed for _ in rows], device=logits.device)
        likely = torch.where(beams[:, None], logits.float().log_softmax(-1), logits.float()) if beams.any() else logits
        scores = allowed_scores(likely, options, said, self.special)
        usable = scores.amax(-1).isfinite() & ~logits.isnan().any(-1)
        tokens = choose_tokens(scores, options, [reply.random for reply, rows in computed for _ in rows])
        place = 0
        for reply, rows in computed:
            own = slice(place, place + len(rows))
            place += len(rows)
            try:
                if not usable[own].all():
                    logger.error("A reply ends in its %d. token, where the model's numbers are none, or all tokens are "
                                 "forbidden", len(said[own.start]) + 1)
                    reply.end("error")
                elif reply.beams:
                    reply.go_on_with_beams(scores[own], self.cache)
                else:
                    reply.go_on(tokens[own.start], logits[own.start], scores[own.start])
            except Exception as problem:
                logger.error("A reply could not be decoded: %s", str(problem).split("\n")[0])
                reply.end("error")
            reply.notify()
