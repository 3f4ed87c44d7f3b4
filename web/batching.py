"""Decode the replies of many conversations in one batch, which a new request joins between two tokens.

A reply does not depend on the other replies in the batch: every request has its own decoding options and its own random
generator, and gets the reply that `decoding.generate_replies` would give it alone. An error in one reply ends only that
reply. No request delays the others for long: long contexts are computed in pieces, and each client gets a share of the
batch and of the memory. This file knows no texts, pages or HTTP.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import torch

from cli import InputError
from decoding import BeamSearch, Decoding, allowed_scores, choose_tokens
from drafts import Ahead, NGrams
from inputs import Segment, Specials, begin_reply
from model import DoubleHeadsModel
from web.clients import NOBODY, Client
from web.keyvalues import MEMORY, BatchRow, KeyValues, Place, Work, let_attend_by_row_

LEAST_READ, MOST_READ = 8, 256  # context tokens computed in one step
LEAST_ON_GPU, MOST_ON_GPU = 512, 4096  # a GPU takes hardly longer for so many than for one
SHARE = 4  # with other clients present, a client gets 1 / SHARE of the batch
LARGEST = 2  # a request may take 1 / LARGEST of the memory, so that others find some beside it
KEPT = 4  # 1 / KEPT of the memory may hold what conversations have computed, until their next message
KEPT_FOR = 600.0  # s
LONGER = 1.5  # times as long as other steps: what a step that also computes contexts may take
CROWDED = 3.0  # the same for the short contexts of many clients, or of one that is alone
LONGEST_PAUSE = 1.0  # s between two updates of a growing reply
logger = logging.getLogger("batching")


async def apart(work: Callable, *args):
    """Run ``work(*args)`` in a thread that ends afterwards, and return its result.

    libgomp, which divides torch's work among processors, lets its threads sleep between two pieces of work as soon as
    all teams together have more threads than the machine has processors; on two processors, decoding then takes 1.7
    times as long. Each thread that has used torch keeps its team until it ends. So only the decoding thread, which
    needs one all the time, lives on.
    """
    pool = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *args)
    finally:
        pool.shutdown(wait=False)


class Busy(Exception):
    """The queue of waiting requests is full."""

    def __str__(self) -> str:
        return "Too many people are talking to this model; try again in a moment."


class Stopping(Busy):
    """The server is shutting down."""

    def __str__(self) -> str:
        return "The server is stopping; try again when it is back."


class ReplyOptions(NamedTuple):
    """Options of a reply besides those of decoding."""

    beginning: tuple[int, ...] = ()  # tokens that the reply begins with
    stops: tuple[str, ...] = ()  # texts before which the reply ends
    num_logprobs: int | None = None  # keep each token's log-probability and those of this many likeliest tokens
    whole: bool = False  # only the whole reply is wanted: do not wake the event loop for each token


NO_OPTIONS = ReplyOptions()


class Stopped(NamedTuple):
    """The place where a stop text ends a reply."""

    characters: int  # number of characters before the stop
    kept: int  # tokens that contain these characters
    tokens: int  # tokens up to the end of the stop


# ---------------------------------------------------------------------------------------------------------- tokens


class Reply:
    """A request and its reply, from the queue to the last token.

    ``tokens``: the reply so far, without control tokens; a beam search fills them only at the end. ``finish``: None
    while the reply grows, then "stop" (the model ended it), "length", "cancelled", "error", "busy" (another client's
    request took its place in the queue) or "stopping". ``stopped``: set once the text contains a stop. ``last_step``,
    after sampling: the logits of the last token, (vocabulary,) each, before and after bans and filter. ``logprobs``, if
    asked for: per token of the reply, its log-probability by the model, and the likeliest tokens with theirs.
    """

    def __init__(self, context: Segment, args: Decoding, special: Specials, device: torch.device, client: Client,
                 notify: Callable[[], None], extra: ReplyOptions):
        self.context, self.args, self.special, self.client, self.notify = context, args, special, client, notify
        self.extra, self.prompt = extra, begin_reply(context, special, extra.beginning)
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.stopped: Stopped | None = None
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []
        self.last_step: tuple[torch.Tensor, torch.Tensor] | None = None
        self.cancelled = False
        self.known = 0  # number of first tokens whose keys and values are in the first place, at the end
        self.computed = 0  # number of the last step that computed this reply
        self.places: list[Place] = []
        self.rows: list[BatchRow] = []
        self.logits: dict[BatchRow, torch.Tensor] = {}  # rows computed so far, until all beams are
        self.beams = BeamSearch(args, special) if args.num_beams > 1 else None
        self.random = torch.Generator(device)
        if args.seed:
            self.random.manual_seed(args.seed)
        else:
            self.random.seed()

    @property
    def width(self) -> int:
        """Number of rows of the batch that the reply may need."""
        return self.args.num_beams + 1 if self.beams else 1

    @property
    def longest(self) -> int:
        """Largest number of tokens that a row of the reply may reach."""
        return len(self.prompt.ids) + self.args.max_length

    @property
    def ended(self) -> str | None:
        """`finish`, or "stop" if a stop text ended the reply."""
        return "stop" if self.stopped else self.finish

    @property
    def reading(self) -> bool:
        """Whether more of the context is left to compute than its last token."""
        return len(self.rows) == 1 and len(self.rows[0].ids) > 1

    def bytes(self, cache: KeyValues) -> int:
        """Return the largest size of the keys and values of all rows."""
        return cache.columns_for(self.longest) * self.width * cache.token_bytes

    @property
    def sequence(self) -> list[tuple[int, int]]:
        """The tokens of context and reply, as ids with types."""
        ids, types = self.prompt.ids + self.tokens, self.prompt.types + [self.special.speaker1] * len(self.tokens)
        return list(zip(ids, types, strict=True))

    def begin(self, places: list[Place], ngrams: NGrams, known: int = 0) -> None:
        """Enter the batch with ``places``, in which the first ``known`` tokens of the context are computed already.

        ``ngrams``: what tokens are guessed from, see `drafts.Ahead`.
        """
        self.places = places
        self.rows = [BatchRow(places[0], self.prompt.start, known, self.prompt.ids[known:], self.prompt.types[known:],
                              None if self.beams else Ahead(ngrams, self.prompt.ids, self.longest))]

    def end(self, finish: str) -> None:
        if self.rows and not self.finish:
            self.known = self.rows[0].length if not self.beams else min(self.rows[0].length, len(self.prompt.ids))
        self.rows, self.finish = [], self.finish or finish  # a finished reply keeps its reason at shutdown

    def append(self, token: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Append the next token, or end the reply at a control token.

        ``before`` and ``after``, (vocabulary,) each: the logits before and after bans and filter.
        """
        if token not in self.special:
            if self.extra.num_logprobs is not None:  # before `tokens`: another thread reads both
                logprobs = before.float().log_softmax(-1)
                best = logprobs.topk(min(self.extra.num_logprobs, len(logprobs)))
                self.logprobs.append((logprobs[token].item(), list(zip(best.indices.tolist(), best.values.tolist(),
                                                                       strict=True))))
            self.tokens.append(token)
            row = self.rows[0]
            row.ids, row.types = [token], [self.special.speaker1]
            row.ahead.ids.append(token)
        if token in self.special or len(self.tokens) == self.args.max_length:
            self.last_step = before.float().clone(), after.clone()  # before `finish`: another thread reads both
            self.end("stop" if token in self.special else "length")

    def extend_beams(self, scores: torch.Tensor, cache: KeyValues) -> None:
        """Do one step of the beam search from the log-probabilities of `rows`, (rows, vocabulary).

        A hypothesis takes the cache place of its parent. If a parent has several children, the further ones get copies
        of the columns behind the context; all places have the context already.
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
            rows.append(BatchRow(place, row.start, row.length, tokens[-1:], [self.special.speaker1]))
        self.rows = rows


class Pace:
    """The number of context tokens per step, such that a step takes little longer than one that only decodes.

    It stays between ``least`` and ``largest``, whatever a step takes.
    """

    def __init__(self, least: int = LEAST_READ, largest: int = MOST_READ):
        self.least, self.largest = least, largest
        self.tokens = max(32.0, least)  # of a step that takes at most `LONGER` times as long
        self.usual: float | None = None  # seconds of a step that only decodes

    def most(self, longer: float) -> int:
        """Return the number for a step that may take ``longer`` times as long."""
        return min(self.largest, int(self.tokens * (longer - 1) / (LONGER - 1)))

    def took(self, seconds: float, read: int, decoded: int, longer: float = LONGER) -> None:
        """Adapt to the seconds of a step that computed ``read`` context tokens and continued ``decoded`` replies."""
        if not decoded:
            return
        if not read:
            self.usual = seconds if self.usual is None else 0.7 * self.usual + 0.3 * seconds
        elif self.usual is not None:
            if seconds > longer * self.usual:
                self.tokens = max(self.least, self.tokens * min(1, read / self.most(longer)) / 2)
            elif read >= self.most(longer):
                self.tokens = min(self.largest, 1.2 * self.tokens)


class Decoder:
    """A thread that decodes replies, at most ``max_batch`` rows per step.

    Another ``max_waiting`` requests may wait; `submit` refuses further ones with `Busy`. ``memory``: MiB that may be
    allocated for keys and values; a request that needs more than is free waits.

    The address with the fewest rows in the batch goes first, then the client with the fewest, then the oldest request.
    With other clients present, a client gets 1 / `SHARE` of the rows of each step and may enter even a full batch with
    them; `_fits` divides the memory so that some is left for others. A full queue is shared as well: a new request
    replaces the last one of the client with the most.

    What a client with a key has computed is kept for its next requests, which often begin in the same way. Kept
    sequences use memory that no request wants; requests never wait for it.
    """

    def __init__(self, model: DoubleHeadsModel, special: Specials, max_batch: int = 32, max_waiting: int = 64,
                 memory: int = MEMORY):
        self.model, self.special = model, special
        self.max_batch, self.max_waiting, self.memory = max_batch, max_waiting, memory << 20
        self.waiting: list[Reply] = []
        self.decoding: list[Reply] = []
        let_attend_by_row_(model)
        self.cache = KeyValues.of(model, self.memory)
        self.pace = Pace(LEAST_ON_GPU, MOST_ON_GPU) if self.cache.in_rooms else Pace()
        self.longer, self.steps, self.stepped = LONGER, 0, time.monotonic()
        self.wake, self.closed, self.draining = threading.Condition(), False, False
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self.thread.start()

    # ----------------------------------------------------------------------------------- called by other threads

    def refuses(self, client: Client = NOBODY) -> Busy | None:
        """Return the error with which a request of the client would be refused now, or None."""
        if self.closed or self.draining:
            return Stopping()
        return Busy() if len(self.waiting) >= self.max_waiting and not self._replaceable(client) else None

    def _replaceable(self, client: Client) -> Reply | None:
        """Return the waiting request that a new one of ``client`` may replace in a full queue, or None."""
        waiting = list(self.waiting)
        for group in (lambda one: one.address, lambda one: one):
            counts = Counter(group(reply.client) for reply in waiting)
            greediest, most = counts.most_common(1)[0]
            if most > counts[group(client)] + 1:
                return next(reply for reply in reversed(waiting) if group(reply.client) == greediest)
            waiting = [reply for reply in waiting if group(reply.client) == group(client)] or waiting
        return None

    def submit(self, context: Segment, args: Decoding, client: Client = NOBODY,
               notify: Callable[[], None] = lambda: None, extra: ReplyOptions = NO_OPTIONS) -> Reply:
        """Queue a request. Raises `Busy`, and `InputError` if the request needs more memory than is allowed or names
        tokens that the model lacks.

        A ``seed`` of 0 means no seed. The decoding thread calls ``notify`` each time the reply has changed.
        """
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if unknown := [token for token, _ in args.logit_bias if token >= vocabulary]:
            raise InputError(f"logit_bias: there is no token {unknown[0]}; use ids from 0 to {vocabulary - 1:,}")
        reply = Reply(context, args, self.special, self.model.device, client, notify, extra)
        needed = self.cache.bytes_for(reply.longest, reply.width)
        if needed > self.memory // LARGEST:
            raise InputError(f"a reply of up to {args.max_length:,} tokens to these messages needs {needed >> 20:,} "
                             "MiB of memory, and one reply may take half of --memory, "
                             f"{self.memory // LARGEST >> 20:,}; ask for fewer tokens, or fewer beams")
        with self.wake:
            if self.closed or self.draining:
                raise Stopping
            if len(self.waiting) >= self.max_waiting:
                if not (replaced := self._replaceable(client)):
                    raise Busy
                self.waiting.remove(replaced)
                self._end([replaced], "busy")
            self.waiting.append(reply)
            self.wake.notify()
        return reply

    async def reply(self, context: Segment, args: Decoding, client: Client = NOBODY,
                    extra: ReplyOptions = NO_OPTIONS) -> AsyncGenerator[Reply, None]:
        """Submit a request and yield its `Reply`, always the same object, each time it has grown.

        Yields after each token, or less often if the caller is slow, so that showing replies takes at most a fifth of
        the time. ``finish`` is set when the last one is yielded. Closing the generator ends the decoding. Raises what
        `submit` raises, at the first step.
        """
        loop, changed, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        reply: Reply | None = None

        def notify() -> None:  # the decoding thread may call this before `submit` has returned
            if extra.whole and not extra.stops and reply and not reply.finish:
                return
            with suppress(RuntimeError):  # the event loop is closed
                if reply is None or reply.finish:
                    loop.call_soon_threadsafe(ended.set)
                if not changed.is_set():  # otherwise a wake-up is pending, which will see this token as well
                    loop.call_soon_threadsafe(changed.set)

        reply = self.submit(context, args, client, notify, extra)
        try:
            finish, took = None, 0.0
            while not finish:
                await changed.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(4 * took * len(self.decoding), LONGEST_PAUSE)):
                        await ended.wait()
                changed.clear()
                ended.clear()
                finish, start = reply.finish, time.monotonic()  # before the yield, so that the last step is yielded too
                yield reply
                took = time.monotonic() - start
        finally:
            reply.cancelled = True

    def drain(self) -> None:
        """Refuse new and waiting requests; let the replies that are being decoded continue."""
        with self.wake:
            self.draining = True
            waiting, self.waiting = self.waiting, []
        self._end(waiting, "stopping")

    def close(self) -> None:
        """End all replies and the thread."""
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join()

    # ------------------------------------------------------------------------------------------- in its own thread

    def _run(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.waiting or self.decoding or self.closed,
                                   KEPT_FOR / 10 if self.cache.kept else None)
            if self.closed:
                break
            self.cache.shrink(self.memory, time.monotonic() - KEPT_FOR)
            if not self.waiting and not self.decoding:
                continue
            try:
                self._step()
            except Exception:  # later requests must still be answered, whatever failed
                logger.exception("A step failed; its %d replies end with an error", len(self.decoding))
                self._end(self.decoding, "error")
        self._end([*self.decoding, *self.waiting], "stopping")

    def _end(self, replies: Iterable[Reply], finish: str) -> None:
        for reply in replies:
            reply.end(finish)
            reply.notify()

    @torch.inference_mode()
    def _step(self) -> None:
        """Remove finished replies, admit waiting ones, compute parts of contexts, and add a token to each reply."""
        start, passes = time.monotonic(), self.cache.passes
        self._end([reply for reply in self.decoding if reply.cancelled and not reply.finish], "cancelled")
        for reply in self.decoding:
            if reply.finish:
                self._keep(reply)
                self.cache.release(reply.places, clear=reply.finish == "error")
        self.decoding = [reply for reply in self.decoding if not reply.finish]
        self._admit()
        self.cache.compact()
        self.steps += 1
        decoding, reading = self._rows_to_decode(), self._contexts_to_read()
        work = [Work(row, 1) for rows in decoding.values() for row in rows] + [
            Work(reply.rows[0], tokens) for reply, tokens in reading]
        if work:
            self._choose(self._compute(work, [*decoding, *(reply for reply, _ in reading)]))
        self.stepped = time.monotonic()
        if self.cache.passes > passes:  # otherwise the only token was guessed before, which takes no time
            self.pace.took(self.stepped - start, sum(tokens for _, tokens in reading), len(decoding), self.longer)

    def _keep(self, reply: Reply) -> None:
        """Keep what a reply has computed for the next request of its client.

        This is done only for a client with a key. Otherwise, people behind one address could find out what others there
        have said, from how soon their own replies begin.
        """
        if reply.client.key and reply.known and reply.finish != "error":
            try:
                self.cache.keep(reply.client, reply.prompt.start, reply.sequence[:reply.known], reply.places[0],
                                min(self.memory // KEPT, self.memory - self.cache.bytes))
            except Exception:
                logger.exception("No memory could be allocated to keep a conversation")

    def _admit(self) -> None:
        """Move waiting requests into the batch while they fit."""
        while True:
            with self.wake:
                self.waiting = [reply for reply in self.waiting if not reply.cancelled]
                rows, memory = Counter(), Counter()
                for reply in self.decoding:
                    for owner in (reply.client, reply.client.address):
                        rows[owner] += reply.width
                        memory[owner] += reply.bytes(self.cache)
                order = sorted(self.waiting, key=lambda reply: (rows[reply.client.address], rows[reply.client]))
                total = sum(reply.width for reply in self.decoding)
                reply = next((reply for reply in order if self._fits(reply, total, rows, memory)), None)
                if reply is None:
                    return
                self.waiting.remove(reply)
                self.decoding.append(reply)
            try:
                self.cache.shrink(self.memory - self.cache.bytes_with(reply.longest, reply.width))
                places = self.cache.allocate(reply.longest, reply.width)
                known = self.cache.recall(reply.client, reply.prompt.start, reply.sequence[:-1],
                                          places) if self.cache.kept else 0
                reply.begin(places, self.model.drafts, known)
            except Exception:
                logger.exception("No memory could be allocated for a reply")
                self._end([reply], "error")

    def _fits(self, reply: Reply, total: int, rows: Counter, memory: Counter) -> bool:
        """Tell whether the reply fits into the batch and the memory.

        ``total``: rows of the batch now; ``rows`` and ``memory`` (bytes): what each client and each address has of
        them. A full batch still admits requests within an address's share, up to twice its size, and within a client's
        share, up to one and a half times, so that no address fills the batch with clients. An address that has memory
        already may reach twice as much as then remains free, a client as much as remains free, so that the next client
        finds some.
        """
        if not self.decoding:
            return True
        client, address, share = reply.client, reply.client.address, max(1, self.max_batch // SHARE)
        most = 2 * self.max_batch if rows[address] + reply.width <= share else (
            3 * self.max_batch // 2 if rows[client] + reply.width <= share else self.max_batch)
        if total + reply.width > most:
            return False
        left = self.memory - self.cache.bytes_with(reply.longest, reply.width)
        needed = reply.bytes(self.cache)
        return left >= 0 and (not memory[address] or memory[address] + needed <= 2 * left) and (
            not memory[client] or memory[client] + needed <= left)

    def _rows_to_decode(self) -> dict[Reply, list[BatchRow]]:
        """Choose the rows that this step computes, by reply: all rows, or a share for each client.

        The reply that was not computed for the longest time comes first. A beam search that is wider than the share
        continues once all its rows have been computed.
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

    def _contexts_to_read(self) -> list[tuple[Reply, int]]:
        """Choose the replies whose contexts this step computes further, and the number of tokens of each.

        A quarter of the tokens goes to the oldest request, the rest to clients with few contexts, the shortest first.
        Short contexts may have more tokens if many clients wait with one, because their replies are then decoded
        together.
        """
        readers = [reply for reply in self.decoding if reply.reading]
        alone = all(reply.reading for reply in self.decoding)
        if not readers or not alone and self.steps % 8 == 0:  # `Pace` must also time steps that only decode
            return []
        self.longer = self._allowed(readers)
        usual, crowded = (self.pace.largest, self.pace.largest) if alone else map(self.pace.most, (LONGER, self.longer))
        crowd = Counter(reply.client.address for reply in readers)
        order = sorted(readers[1:], key=lambda reply: (crowd[reply.client.address], len(reply.rows[0].ids)))
        reading, done = [], 0
        for reply in (readers[0], *order):
            left = len(reply.rows[0].ids)
            most = crowded if left <= self.pace.largest else usual
            if reply is readers[0] and order:
                most = max(1, most // 4)
            if (tokens := min(most - done, left)) > 0:
                reading.append((reply, tokens))
                done += tokens
        return reading

    def _allowed(self, readers: list[Reply]) -> float:
        """Return the factor by which contexts may lengthen a step.

        It grows with the number of clients that wait with a short context, per client whose reply is being decoded. As
        soon as there are several addresses, they count as the clients, so that none becomes a crowd on its own. A
        client that is alone delays only itself.
        """
        short = [reply for reply in readers if len(reply.rows[0].ids) <= self.pace.largest]
        if not short:
            return LONGER
        if len({reply.client for reply in self.decoding}) == 1:
            return CROWDED
        several = len({reply.client.address for reply in self.decoding}) > 1

        def clients(replies: Iterable[Reply]) -> int:
            return len({reply.client.address if several else reply.client for reply in replies})

        crowd = clients(short) / max(1, clients(reply for reply in self.decoding if not reply.reading))
        return min(CROWDED, max(LONGER, 1 + crowd / 2))

    def _compute(self, work: list[Work], replies: list[Reply]) -> list[tuple[Reply, list[torch.Tensor]]]:
        """Compute ``work``, which belongs to ``replies``; return the replies whose rows are all computed, with logits.

        The logits are (vocabulary,) for each row. If this fails, the work of each reply is computed alone, so that only
        the replies end for which it fails again.
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
        for reply in replies:  # the new part of a context is copied at once to the places of all beams
            if reply.beams and reply.rows[0].length <= len(reply.prompt.ids):
                read = sum(one.tokens for one in work if one.row is reply.rows[0])
                for place in reply.places[1:]:
                    self.cache.copy(reply.places[0], place, slice(reply.rows[0].length - read, reply.rows[0].length))
        new = dict(zip(rows, logits, strict=True))
        done = []
        for reply in replies:
            reply.logits |= {row: new[row] for row in reply.rows if row in new}
            if len(reply.logits) == len(reply.rows):
                done.append((reply, [reply.logits[row] for row in reply.rows]))
                reply.logits = {}
        return done

    def _choose(self, computed: list[tuple[Reply, list[torch.Tensor]]]) -> None:
        """Extend each reply by a token, or end it, from the logits of its rows."""
        if not computed:
            return
        logits = torch.stack([row for _, rows in computed for row in rows])  # (rows, vocabulary)
        options = [reply.args for reply, rows in computed for _ in rows]
        said = [tokens for reply, _ in computed
                for tokens in (reply.beams.hypotheses if reply.beams else [reply.tokens])]
        beams = [bool(reply.beams) for reply, rows in computed for _ in rows]
        wanted = torch.where(torch.tensor(beams, device=logits.device)[:, None], logits.float().log_softmax(-1),
                             logits.float()) if any(beams) else logits
        scores = allowed_scores(wanted, options, said, self.special)
        usable = (scores.amax(-1).isfinite() & ~logits.isnan().any(-1)).tolist()  # read once, not once per reply
        tokens = choose_tokens(scores, options, [reply.random for reply, rows in computed for _ in rows])
        place = 0
        for reply, rows in computed:
            own = slice(place, place + len(rows))
            place += len(rows)
            try:
                if not all(usable[own]):
                    logger.error("A reply ends at token %d: the model's logits are NaN, or all tokens are forbidden",
                                 len(said[own.start]) + 1)
                    reply.end("error")
                elif reply.beams:
                    reply.extend_beams(scores[own], self.cache)
                else:
                    reply.append(tokens[own.start], logits[own.start], scores[own.start])
            except Exception as problem:
                logger.error("A reply could not be decoded: %s", str(problem).split("\n")[0])
                reply.end("error")
            reply.notify()
