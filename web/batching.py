"""The replies of many conversations, decoded together: whoever asks joins the batch between two tokens.

A reply does not depend on its neighbours: every request has its own decoding options and its own random generator, and
is answered as `decoding.generate_replies` would answer it alone. From below: `Decoder` and its parts, which know token
ids, and `Bot`, which knows texts. Nothing here knows pages or HTTP.
"""

import asyncio
import hashlib
import logging
import sys
import threading
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, suppress
from functools import lru_cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, NoRepeatNGramLogitsProcessor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cli import InputError
from decoding import Filtered, fitted_context, load_checkpoint, readable
from inputs import Segment, Specials, build_reply
from model import DoubleHeadsModel
from utils import resolve_checkpoint

MAX_TEXT = 2_000  # characters of a message, and of a personality
PREFILL = 256  # tokens of newcomers' contexts computed in one step, so that they hold up nobody for long
BY_ROW = "_by_row"  # in the name of an attention, behind that of what computes it
logger = logging.getLogger("batching")


class Busy(Exception):
    """As many requests are waiting as may wait."""

    def __str__(self) -> str:
        return "Too many people are talking to this model; try again in a moment."


# ---------------------------------------------------------------------------------------------------------- tokens


class Row:
    """One sequence of the batch."""

    def __init__(self, slot: int, start: int, length: int, ids: list[int], types: list[int]):
        self.slot = slot  # where its keys and values lie
        self.start = start  # the position of its first token
        self.length = length  # tokens computed
        self.ids, self.types = ids, types  # what comes next, not computed yet: a context, and then token by token


class Reply:
    """A request, from the queue to its last token.

    ``tokens``: the reply so far, without control tokens; beams decide only at the end. ``finish``: None until then,
    and then "stop" (the model ended it), "length", "cancelled" or "error". ``last_step``, of finished replies but those
    of beams: the logits that the last token was chosen from, (vocabulary,) each, as they were and as bans and filter
    left them.
    """

    def __init__(self, context: Segment, args: Namespace, special: Specials, device: torch.device,
                 notify: Callable[[], None]):
        self.context, self.args, self.special, self.notify = context, args, special, notify
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.last_step: tuple[torch.Tensor, torch.Tensor] | None = None
        self.cancelled = False
        self.rows: list[Row] = []
        self.beams = BeamSearch(args, special) if args.num_beams > 1 else None
        self.random = torch.Generator(device)
        if args.seed:
            self.random.manual_seed(args.seed)
        else:
            self.random.seed()

    @property
    def places(self) -> int:
        """Rows of the batch that it may need."""
        return self.args.num_beams + 1 if self.beams else 1

    def end(self, finish: str) -> None:
        self.rows, self.finish = [], finish

    def go_on(self, token: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take the next token, which may be the end, chosen from the logits ``after`` the filter."""
        if token not in self.special:
            self.tokens.append(token)
            self.rows[0].ids, self.rows[0].types = [token], [self.special.speaker1]
        if token in self.special or len(self.tokens) == self.args.max_length:
            self.last_step = before.float().clone(), after.clone()  # first: who sees the end may ask for it
            self.end("stop" if token in self.special else "length")

    def go_on_with_beams(self, scores: torch.Tensor) -> None:
        parents = self.beams.step(scores)
        if not parents:
            self.tokens, finish = self.beams.result()
            return self.end(finish)
        self.rows = [Row(self.rows[parent].slot, self.rows[parent].start, self.rows[parent].length, tokens[-1:],
                         [self.special.speaker1])
                     for parent, tokens in zip(parents, self.beams.hypotheses, strict=True)]


class BeamSearch:
    """The beam search of `decoding.generate_replies`, a step at a time, and beside it the greedy reply.

    Hypotheses compete by log-likelihood over length to the power of ``length_penalty``. The search ends when none that
    is left can overtake the best.
    """

    def __init__(self, args: Namespace, special: Specials):
        self.args, self.special = args, special
        self.live: list[tuple[float, list[int]]] = [(0.0, [])]  # log-likelihood and tokens, the best first
        self.greedy: tuple[float, list[int]] | None = (0.0, [])
        self.best, self.best_greedy = (-torch.inf, [], ""), (-torch.inf, [], "")  # score, tokens, finish

    @property
    def hypotheses(self) -> list[list[int]]:
        """Tokens of each row to compute: the beams, then the greedy reply. At first they are all one."""
        return [tokens for _, tokens in self.live] + ([self.greedy[1]] if self.greedy and self.greedy[1] else [])

    def step(self, scores: torch.Tensor) -> list[int]:
        """Choose from the log-probabilities of `hypotheses`, (rows, vocabulary); banned tokens have -inf.

        Returns the row that each of the new `hypotheses` continues; none when the search is over.
        """
        width, length = self.args.num_beams, len(self.hypotheses[0]) + 1
        parents = []
        if self.live:
            sums = scores[:len(self.live)] + torch.tensor([score for score, _ in self.live]).to(scores)[:, None]
            most = min(width * (1 + len(self.special)), sums.numel())  # so many, because some end
            candidates = zip(*(part.tolist() for part in sums.flatten().topk(most)), strict=True)
            before, self.live = self.live, []
            for rank, (score, place) in enumerate(candidates):
                parent, token = divmod(place, scores.shape[1])
                tokens = [*before[parent][1], token]
                if score == -torch.inf:
                    break
                if token in self.special or length == self.args.max_length:
                    if rank < width:
                        self.best = max(self.best, self._ended(score, tokens), key=lambda ended: ended[0])
                elif len(self.live) < width:
                    self.live.append((score, tokens))
                    parents.append(parent)
            longest = self.args.max_length if self.args.length_penalty > 0 else length
            if self.live and self.best[0] >= self.live[0][0] / longest ** self.args.length_penalty:
                self.live, parents = [], []
        if self.greedy:
            likeliest = int(scores[-1].argmax())
            score, tokens = self.greedy[0] + scores[-1, likeliest].item(), [*self.greedy[1], likeliest]
            if likeliest in self.special or length == self.args.max_length:
                self.greedy, self.best_greedy = None, self._ended(score, tokens)
            else:
                self.greedy = (score, tokens)
                parents.append(len(scores) - 1)
        return parents

    def _ended(self, score: float, tokens: list[int]) -> tuple[float, list[int], str]:
        score /= len(tokens) ** self.args.length_penalty
        return (score, tokens[:-1], "stop") if tokens[-1] in self.special else (score, tokens, "length")

    def result(self) -> tuple[list[int], str]:
        return max(self.best, self.best_greedy, key=lambda ended: ended[0])[1:]


class Block(NamedTuple):
    """Neighbours in a step's one row of tokens: sequences that have equally many of them."""

    tokens: slice  # their places in that row
    slots: slice
    width: int  # the longest sequence, with its new tokens


class KeyValues:
    """Keys and values of the batch's rows, written in place, each row's from column 0.

    In the place of transformers' caches, which pad all rows on the left to one length and are copied at each token.
    """

    def __init__(self):
        self.states: dict[tuple[int, int], torch.Tensor] = {}  # layer, and 0 for keys, 1 for values
        self.room = 0, 0  # rows, columns

    def make_room(self, rows: int, width: int) -> None:
        """For so many rows of so many tokens, at least."""
        room = max(rows, self.room[0]), max(-(-width // 64) * 64, self.room[1])
        if room != self.room:
            for which, states in self.states.items():
                self.states[which] = F.pad(states, (0, 0, 0, room[1] - self.room[1], 0, 0, 0, room[0] - self.room[0]))
            self.room = room

    def copy(self, source: Row, slot: int) -> None:
        for states in self.states.values():
            states[slot, :, :source.length] = states[source.slot, :, :source.length]

    def place(self, slots: torch.Tensor, columns: torch.Tensor, blocks: list[Block]) -> None:
        """Where the next forward pass is to write its tokens, (tokens,) each, and how they belong together."""
        self.slots, self.columns, self.blocks = slots, columns, blocks

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention calls: (1, heads, tokens, size) each → all there is, (rows, heads, columns, size)."""
        for which, new in enumerate((keys, values)):
            if (layer, which) not in self.states:  # on a CPU in float32, see `attend_by_row`
                like = new.float() if new.device.type == "cpu" else new
                self.states[layer, which] = like.new_zeros(self.room[0], new.shape[1], self.room[1], new.shape[3])
            states = self.states[layer, which]
            states[self.slots, :, self.columns] = new[0].transpose(0, 1).to(states.dtype)
        self.states[layer, 0].blocks = self.blocks  # for `attend_by_row`: not all families hand it further arguments
        return self.states[layer, 0], self.states[layer, 1]

    def get_seq_length(self, *_) -> int:
        """Some families ask, to number positions; they get ours."""
        return 0


def attend_by_row(attention: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  attention_mask: torch.Tensor, **how) -> tuple[torch.Tensor, None]:
    """Attention, in the interface of transformers, of the new tokens of many sequences, which lie in one row.

    So the linear layers, most of the work, see them as one matrix without padding. ``query`` (1, heads, tokens, size);
    ``key`` and ``value`` as `KeyValues` returns them; ``attention_mask`` (1, 1, tokens, columns), each token's over its
    own sequence. ``attention``: what computes each block, and the whole in a forward pass without `KeyValues`. On a CPU
    it computes in float32, where torch's kernel takes a quarter of the time that it takes in bfloat16.
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager)
    if not hasattr(key, "blocks"):
        return attend(module, query, key, value, attention_mask, **how)
    states, attended = query[0].to(key.dtype), []
    for tokens, slots, width in key.blocks:
        rows = slots.stop - slots.start
        states_of_rows = states[:, tokens].unflatten(1, (rows, -1)).transpose(0, 1)
        mask = attention_mask[0, 0, tokens, :width].unflatten(0, (rows, -1))[:, None]
        out, _ = attend(module, states_of_rows, key[slots, :, :width], value[slots, :, :width], mask, **how)
        attended.append(out.flatten(0, 1))
    return torch.cat(attended)[None].to(query.dtype), None


def let_attend_by_row_(model: DoubleHeadsModel) -> None:
    """Make `attend_by_row` the model's attention, in place. Raises `InputError` where the family's code allows none."""
    attention = model.config._attn_implementation
    if attention.endswith(BY_ROW):
        return
    family = next(known for known in type(model).__mro__ if known.__module__.startswith("transformers."))
    if not family._can_set_attn_implementation():
        raise InputError(f"--model_checkpoint: transformers' '{model.config.model_type}' has an attention of its own, "
                         "which cannot answer many conversations at once; talk to this model with interact.py")
    AttentionInterface.register(attention + BY_ROW, partial(attend_by_row, attention))
    AttentionMaskInterface.register(attention + BY_ROW, ALL_MASK_ATTENTION_FUNCTIONS[attention])
    model.set_attn_implementation(attention + BY_ROW)


class Decoder:
    """A thread that decodes what is asked of it, at most ``max_batch`` rows at once.

    Another ``max_waiting`` requests may wait; beyond, `submit` raises `Busy`. Whoever waits longest goes first.
    """

    def __init__(self, model: DoubleHeadsModel, special: Specials, max_batch: int = 32, max_waiting: int = 64):
        self.model, self.special = model, special
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.waiting: deque[Reply] = deque()
        self.decoding: list[Reply] = []
        self.cache = KeyValues()
        let_attend_by_row_(model)
        self.wake, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self.thread.start()

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self.max_waiting

    def submit(self, context: Segment, args: Namespace, notify: Callable[[], None] = lambda: None) -> Reply:
        """Queue a request. Raises `Busy`.

        ``args``: what `decoding.add_decoding_flags` adds; a ``seed`` of 0 is none. ``notify`` is called from the
        decoding thread each time the reply has changed.
        """
        reply = Reply(context, args, self.special, self.model.device, notify)
        with self.wake:
            if self.full or self.closed:
                raise Busy
            self.waiting.append(reply)
            self.wake.notify()
        return reply

    async def reply(self, context: Segment, args: Namespace) -> AsyncIterator[Reply]:
        """`submit`, and the same `Reply` each time it has grown, the last time with its ``finish``.

        Who leaves the loop early, or closes the generator, ends the decoding. Raises `Busy`, at the first step.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(changed.set)

        reply = self.submit(context, args, notify)
        try:
            finish = None
            while not finish:
                await changed.wait()
                changed.clear()
                finish = reply.finish  # looked at first, so that the last step is shown, too
                yield reply
        finally:
            reply.cancelled = True

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join()

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
        self._end([*self.decoding, *self.waiting], "cancelled")

    def _end(self, replies: Iterable[Reply], finish: str) -> None:
        for reply in replies:
            reply.end(finish)
            reply.notify()

    @torch.inference_mode()
    def _step(self) -> None:
        """Let the finished go and newcomers in, and give every reply its next token."""
        self._end([reply for reply in self.decoding if reply.cancelled], "cancelled")
        self._settle()
        self._admit()
        if rows := self._rows():
            self._choose(self._compute(rows))

    def _rows(self) -> list[Row]:
        """All rows of the batch, by slot."""
        return sorted((row for reply in self.decoding for row in reply.rows), key=lambda row: row.slot)

    def _settle(self) -> None:
        """Forget finished replies and move rows so that they fill the first slots, one each, and nothing lies between.

        A row in its place stays; the others have kept, in ``slot``, the one they continue, which nobody overwrites.
        """
        self.decoding = [reply for reply in self.decoding if not reply.finish]
        rows, settled, homeless = self._rows(), set(), []
        for row in rows:
            if row.slot < len(rows) and row.slot not in settled:
                settled.add(row.slot)
            else:
                homeless.append(row)
        self.cache.make_room(len(rows), 0)
        for slot, row in zip(sorted(set(range(len(rows))) - settled), homeless, strict=True):
            self.cache.copy(row, slot)
            row.slot = slot

    def _admit(self) -> None:
        """Take in those who have waited longest, as far as there is room."""
        budget = PREFILL
        while budget > 0:
            with self.wake:
                self.waiting = deque(reply for reply in self.waiting if not reply.cancelled)
                taken = sum(reply.places for reply in self.decoding)
                if not self.waiting or taken and taken + self.waiting[0].places > self.max_batch:
                    return
                reply = self.waiting.popleft()
                self.decoding.append(reply)
            context, begun = reply.context, build_reply([], self.special, with_eos=False)
            ids, types = context.ids + begun.ids, context.types + begun.types
            reply.rows = [Row(len(self._rows()), context.start, 0, ids, types)]
            budget -= len(ids)

    def _compute(self, rows: list[Row]) -> torch.Tensor:
        """Logits (rows, vocabulary) after the last of the new tokens of each of ``rows``, all of the batch."""
        blocks, done = [], 0
        for new, group in groupby(rows, lambda row: len(row.ids)):
            group = list(group)
            blocks.append(Block(slice(done, done + new * len(group)), slice(group[0].slot, group[-1].slot + 1),
                                max(row.length for row in group) + new))
            done += new * len(group)
        width = max(block.width for block in blocks)
        self.cache.make_room(len(rows), width)

        def flat(values: Iterable[Iterable[int]]) -> torch.Tensor:
            return torch.tensor(list(chain.from_iterable(values)), device=self.model.device)

        columns = flat(range(row.length, row.length + len(row.ids)) for row in rows)
        self.cache.place(flat([row.slot] * len(row.ids) for row in rows), columns, blocks)
        seen = torch.arange(width, device=columns.device)
        body = self.model.read(
            flat(row.ids for row in rows)[None], token_type_ids=flat(row.types for row in rows)[None],
            position_ids=(columns + flat([row.start] * len(row.ids) for row in rows))[None],
            attention_mask=self.model.layer_masks((seen <= columns[:, None])[None, None], columns[None], seen[None]),
            past_key_values=self.cache, use_cache=True)
        for row in rows:
            row.length += len(row.ids)
        last = flat([len(row.ids)] for row in rows).cumsum(0) - 1
        return self.model.vocabulary_logits(body.last_hidden_state[0, last])

    def _choose(self, logits: torch.Tensor) -> None:
        """Let each reply go on by a token, or end. ``logits``: (rows, vocabulary)."""
        scores = logits.to(torch.float32, copy=True)
        filters = defaultdict(list)
        for reply in self.decoding:
            args, rows = reply.args, [row.slot for row in reply.rows]
            if reply.beams:
                scores[rows] = scores[rows].log_softmax(-1)
            elif not args.no_sample:
                filters[args.temperature, args.top_k, args.top_p] += rows
            said = reply.beams.hypotheses if reply.beams else [reply.tokens]
            if len(said[0]) < min(args.min_length, args.max_length):
                scores[torch.tensor(rows)[:, None], list(self.special)] = -torch.inf
            if args.no_repeat_ngram_size:
                ban = NoRepeatNGramLogitsProcessor(args.no_repeat_ngram_size)
                scores[rows] = ban(torch.tensor(said, device=scores.device), scores[rows])
        for options, rows in filters.items():
            scores[rows] = Filtered(*options)(None, scores[rows])

        for reply in self.decoding:
            rows = [row.slot for row in reply.rows]
            if reply.beams:
                reply.go_on_with_beams(scores[rows])
            else:
                after = scores[rows[0]]
                token = after.argmax() if reply.args.no_sample else \
                    torch.multinomial(after.softmax(-1), 1, generator=reply.random)
                reply.go_on(int(token), logits[rows[0]], after)
            reply.notify()


# ----------------------------------------------------------------------------------------------------------- texts


class Decoding(BaseModel):
    """What may be asked of the decoding of one reply; None: as the flags say."""

    temperature: float | None = Field(None, ge=0, le=5)  # 0: always the likeliest token
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    top_p: float | None = Field(None, ge=0, le=1)
    num_beams: int | None = Field(None, ge=1, le=16)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    seed: int | None = Field(None, ge=0, lt=2**63)  # 0: none

    def over(self, flags: Namespace, most: int) -> Namespace:
        """The flags of `decoding.add_decoding_flags` with these options over them; at most ``most`` tokens a reply."""
        asked = {name: value for name, value in self if value is not None}
        if self.temperature is not None:
            asked["no_sample"] = self.temperature == 0
        length = self.max_tokens if self.max_tokens is not None else flags.max_length
        return Namespace(**{**vars(flags), **asked, "max_length": min(length, most)})


class Bot:
    """A model that answers texts, those of many conversations together.

    ``args``: the flags of `utils.add_common_flags` and `decoding.add_decoding_flags`, ``max_batch``, ``max_waiting``.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.model, self.tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len, args.fp16,
                                                     args.max_history)
        self.special = Specials.of(self.tokenizer)
        self.encode = lru_cache(10_000)(self.tokenizer.encode)  # the same texts come again with each message
        self.encode_persona = lru_cache(1_000)(self.tokenizer.encode_persona)
        self.name = Path(resolve_checkpoint(args.model_checkpoint)).name
        digest = hashlib.sha256()
        for weights in self.model.state_dict().values():
            digest.update(weights.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        self.version = digest.hexdigest()[:12]
        self.decoder = Decoder(self.model, self.special, args.max_batch, args.max_waiting)

    def context(self, personality: list[str], said: list[str], decoding: Namespace) -> Segment:
        """What the model reads before it answers the last of ``said``, the conversation's messages, the oldest first.

        Raises `InputError` when a text is too long or there is no room for a reply.
        """
        said = said[-(2 * self.model.max_history + 1):]
        for name, text in [("the personality", "\n".join(personality)), *(("a message", text) for text in said)]:
            if len(text) > MAX_TEXT:
                raise InputError(f"{name} has {len(text):,} characters; write at most {MAX_TEXT:,}")
        return fitted_context(self.model, self.encode_persona(tuple(personality)), [self.encode(text) for text in said],
                              self.special, decoding.max_length)

    async def reply(self, personality: list[str], said: list[str], decoding: Decoding) -> AsyncIterator[Reply]:
        """`Decoder.reply` to the last of ``said``, as somebody of that ``personality``.

        Raises `InputError` and `Busy` before the first token, and ``RuntimeError`` when decoding broke down.
        """
        if self.decoder.full:  # before any work is done
            raise Busy
        args = decoding.over(self.args, self.model.max_positions // 2)
        async with aclosing(self.decoder.reply(self.context(personality, said, args), args)) as replies:
            async for reply in replies:
                if reply.finish in ("error", "cancelled"):
                    raise RuntimeError("the reply could not be decoded; the server's log says why")
                yield reply

    def text(self, reply: Reply) -> str:
        """The reply so far, for a person's eyes."""
        return readable(self.tokenizer, reply.tokens)
