"""Decode replies: the options with their bounds, the choice of a token, search and sampling over whole batches.

The chat, evaluation, the web server and learning from preferences all use these functions. They work on token ids; only
`readable` makes text of a reply.
"""

import logging
import math
from argparse import ArgumentParser, ArgumentTypeError
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import TextStreamer

from cli import InputError, Number, printable
from drafts import read_drafts
from inputs import Segment, Specials, begin_reply, build_context, fit_context
from model import HALF, DoubleHeadsModel
from packing import prepare_to_decode_
from pretrained import resolve_checkpoint
from sequences import sequences_for
from templates import OwnTemplate
from tokenization import OpenAIGPTTokenizer, Tokenizer, get_tokenizer
from weights import add_special_tokens_, load_model

LENGTH_PENALTY = 0.65  # ParlAI's
MOST_BEAMS = 256  # hypotheses computed at once
MOST_BIASES = 1024  # tokens
logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------ options


def _option(default: float, allowed: Number, help: str, metavar: str | None = None):
    """Return a field of `Decoding` with the allowed numbers and the help text of the flag."""
    return field(default=default, metadata={"allowed": allowed, "help": help, "metavar": metavar})


class Biases:
    """The values that `Decoding.logit_bias` may have."""

    token, bias = Number(int, 0, 2 ** 31 - 1), Number(float, -100, 100)

    def __contains__(self, value: object) -> bool:
        return type(value) is tuple and len(value) <= MOST_BIASES and all(
            token in self.token and bias in self.bias for token, bias in value)

    def __str__(self) -> str:
        return f"at most {MOST_BIASES:,} token numbers with {self.bias} for each"


@dataclass(frozen=True)
class Decoding:
    """All options of decoding, each with its default and its range.

    The command-line flags, the page, the ``/v1`` interface, the ParlAI agent and feedback take names, defaults and
    ranges from here. Within the ranges, logits in float32 stay numbers. Raises `InputError`, which names the option
    and its range, for a value that lies outside.
    """

    no_sample: bool = field(default=False, metadata={"help": "decode greedily: always take the likeliest token"})
    max_length: int = _option(20, Number(int, 1, 1_000_000), "maximum length of a reply, in tokens")
    min_length: int = _option(1, Number(int, 0, 1_000_000), "minimum length of a reply, in tokens")
    temperature: float = _option(0.7, Number(float, 0.0001, 5), "divide the logits by T before sampling: below 1 "
                                 "replies are more predictable, above 1 more varied", "T")
    top_k: int = _option(0, Number(int, -1, 1_000_000), "sample from the K likeliest tokens; 0 or less: off", "K")
    top_p: float = _option(0.9, Number(float, -1, 1), "sample from the likeliest tokens of total probability P "
                           "(nucleus); 0 or less: off", "P")
    num_beams: int = _option(1, Number(int, 1, 1000), "search with N beams instead of sampling; 1: off", "N")
    length_penalty: float = _option(LENGTH_PENALTY, Number(float, -5, 5), "beams compete by log-likelihood / length^A; "
                                    "0 favours short replies", "A")
    no_repeat_ngram_size: int = _option(0, Number(int, 0, 1_000_000), "let no N tokens occur twice in a reply; 0: off",
                                        "N")
    frequency_penalty: float = _option(0, Number(float, -2, 2), "lower a token's logit by A each time that it has come "
                                       "in the reply; 0: off", "A")
    presence_penalty: float = _option(0, Number(float, -2, 2), "lower a token's logit by A once it has come in the "
                                      "reply; 0: off", "A")
    logit_bias: tuple[tuple[int, float], ...] = field(default=(), metadata={"allowed": Biases()})  # tokens; no flag
    seed: int = _option(0, Number(int, 0, 2 ** 63 - 1), "make sampling repeatable; 0: not seeded")

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type is bool:
                if not isinstance(value, bool):
                    raise InputError(f"{option.name}: {value!r} is neither true nor false")
            elif value not in option.metadata["allowed"]:
                raise InputError(f"{option.name}: {value!r} is not {option.metadata['allowed']}")

    @classmethod
    def of(cls, options) -> "Decoding":
        """Take the decoding options from the attributes of ``options``, such as parsed flags; defaults for the rest."""
        if isinstance(options, cls):
            return options
        return cls(**{name: getattr(options, name) for name in OPTIONS if hasattr(options, name)})

    def over(self, **options) -> "Decoding":
        """Return a copy with changed ``options``; a value of None changes nothing.

        A ``temperature`` of 0 means greedy decoding, as in OpenAI's interface; any other temperature means sampling.
        """
        options = {name: value for name, value in options.items() if value is not None}
        if options.get("temperature") == 0:
            options |= {"no_sample": True, "temperature": self.temperature}
        elif "temperature" in options:
            options.setdefault("no_sample", False)
        return replace(self, **options)


OPTIONS = {option.name: option for option in fields(Decoding)}


def _temperature(text: str) -> float:
    """Convert the value of ``--temperature``; for 0, the error message names the flag to use."""
    try:
        return OPTIONS["temperature"].metadata["allowed"](text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}; for the likeliest token always, use --no_sample") from None


def add_decoding_flags(parser: ArgumentParser) -> None:
    """Add a flag for each option of `Decoding`, and ``--fp16``."""
    add = parser.add_argument_group("replies").add_argument
    for name, option in OPTIONS.items():
        if "help" not in option.metadata:
            continue
        if option.type is bool:
            add(f"--{name}", action="store_true", help=option.metadata["help"])
        else:
            read = _temperature if name == "temperature" else option.metadata["allowed"]
            add(f"--{name}", type=read, default=option.default, metavar=option.metadata["metavar"],
                help=f"{option.metadata['help']} (default: %(default)s)")
    add("--fp16", default="", choices=["", "O0", *HALF],
        help="compute in half precision: bf16, or apex's names as in train.py (default: none)")


def add_family_flag(parser: ArgumentParser) -> None:
    """Add ``--model``, which 2019 scripts pass."""
    parser.add_argument("--model", default="",
                        help="openai-gpt or gpt2; not needed, the checkpoint's config.json decides")


# -------------------------------------------------------------------------------------------- the choice of a token


def top_filtering(logits: torch.Tensor, top_k: float = 0.0, top_p: float = 0.9, threshold: float = -float("Inf"),
                  filter_value: float = -float("Inf")) -> torch.Tensor:
    """Set the logits of unlikely tokens to ``filter_value``, under the name of 2019.

    Three filters are applied to each row of ``logits`` (…, vocabulary), one after the other. ``top_k`` keeps the K
    largest logits (0 or less: all). ``top_p`` keeps the smallest set of tokens with a total probability above P, at
    least one token (nucleus, Holtzman et al. 2020; 0 or less: all); on ties, it keeps the earliest tokens.
    ``threshold`` keeps the logits that are not below it.

    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> top_filtering(logits, top_p=0.6).exp()  # 0.5 alone is too little
    tensor([0.5000, 0.3000, 0.0000])
    >>> top_filtering(logits, top_k=1, top_p=0.0).exp()
    tensor([0.5000, 0.0000, 0.0000])
    """
    top_k = min(int(top_k), logits.shape[-1])
    if top_k > 0:
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, filter_value)
    if top_p > 0.0:
        find = _nucleus if logits.device.type == "cpu" else nucleus_at_once
        logits = logits.masked_fill(~find(F.softmax(logits, dim=-1), top_p), filter_value)
    return logits.masked_fill(logits < threshold, filter_value) if threshold > -math.inf else logits


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return which tokens ``top_p`` keeps, (…, vocabulary), and sort only those that may be among them."""
    # Tokens below this probability have less than 1 - top_p together, so the set is complete without them.
    least = 0.99 * (1 - top_p) / probabilities.shape[-1]
    largest = _descending(probabilities)[..., :int((probabilities >= least).sum(-1).max())]
    # One less than the number kept: the token that crosses top_p stays, so the set is never empty.
    size = (largest.cumsum(-1) <= top_p).sum(-1, keepdim=True).clamp(max=max(largest.shape[-1] - 1, 0))
    smallest_kept = largest.gather(-1, size) if largest.shape[-1] else probabilities.new_tensor(0.0)
    kept = probabilities >= smallest_kept
    if bool((kept.sum(-1, keepdim=True) > size + 1).any()):
        ties = probabilities == smallest_kept
        kept &= ~ties | (ties.cumsum(-1) <= size + 1 - (probabilities > smallest_kept).sum(-1, keepdim=True))
    return kept


def nucleus_at_once(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Do the same as `_nucleus` without reading a number: the CPU waits for a GPU each time it reads from it."""
    largest, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = F.pad(largest.cumsum(-1)[..., :-1], (1, 0))  # the total of all likelier tokens
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, tokens, before <= top_p)


def _descending(rows: torch.Tensor) -> torch.Tensor:
    """Sort each row on a CPU, the largest value first; numpy does it in a thirtieth of torch's time."""
    if rows.dtype.itemsize >= 4:  # numpy has no bfloat16
        return torch.from_numpy(np.sort(rows.detach().numpy())).flip(-1)
    return rows.sort(descending=True).values


def repeating(said: Sequence[int], size: int) -> list[int]:
    """Return the next tokens that would repeat an n-gram of ``said``, where n is ``size``; none if ``size`` is 0."""
    last = tuple(said[len(said) - size + 1:])
    return [said[start + size - 1] for start in range(len(said) - size + 1) if size
            and tuple(said[start:start + size - 1]) == last]


def allowed_scores(logits: torch.Tensor, options: Sequence[Decoding], said: Sequence[Sequence[int]],
                   special: Specials, new: Sequence[int] | None = None) -> torch.Tensor:
    """Apply each row's options to its logits (rows, vocabulary); return them in float32, -inf for forbidden tokens.

    Penalties and biases are added first. Then control tokens before ``min_length`` and tokens that would repeat an
    n-gram are forbidden. If a row samples, its logits are divided by the temperature and filtered. ``options``: the
    options of each row; ``said``: each reply so far, including the given words that it begins with; ``new``: how many
    of its last tokens count for ``min_length`` and penalties (default: all). Rows are independent: one with logits
    that are not numbers does not disturb the others.
    """
    scores = logits.to(torch.float32, copy=True)
    sampled: dict[tuple, list[int]] = {}
    changes: dict[tuple[int, int], float] = {}  # row and token → what is added
    forbidden: list[tuple[int, int]] = []
    for row, (decoding, tokens) in enumerate(zip(options, said, strict=True)):
        own = len(tokens) if new is None else new[row]
        changes |= {(row, token): bias for token, bias in decoding.logit_bias}
        if decoding.frequency_penalty or decoding.presence_penalty:
            for token, times in Counter(tokens[len(tokens) - own:]).items():
                penalty = times * decoding.frequency_penalty + decoding.presence_penalty
                changes[row, token] = changes.get((row, token), 0.0) - penalty
        if own < min(decoding.min_length, decoding.max_length):
            forbidden += [(row, token) for token in special]
        forbidden += [(row, token) for token in repeating(tokens, decoding.no_repeat_ngram_size)]
        if not decoding.no_sample and decoding.num_beams == 1:
            sampled.setdefault((decoding.temperature, decoding.top_k, decoding.top_p), []).append(row)
    if changes:  # one operation for all rows, because each takes a GPU some time to start
        scores[tuple(zip(*changes, strict=True))] += torch.tensor([*changes.values()], device=scores.device)
    if forbidden:
        scores[tuple(zip(*forbidden, strict=True))] = -math.inf
    for (temperature, top_k, top_p), rows in sampled.items():
        if len(rows) == len(scores):
            return top_filtering(scores / temperature, top_k, top_p)
        scores[rows] = top_filtering(scores[rows] / temperature, top_k, top_p)
    return scores


def choose_tokens(scores: torch.Tensor, options: Sequence[Decoding],
                  generators: Sequence[torch.Generator | None] | None = None) -> list[int | None]:
    """Choose the next token of each row of `allowed_scores`: the likeliest, or one drawn by its probability.

    ``generators``: a random generator per row (default: torch's global one). The result has None for a row without a
    choice, because its logits are not numbers or all tokens are forbidden.
    """
    if scores.device.type != "cpu":
        return choose_at_once(scores, options, generators)
    usable, likeliest = scores.amax(-1).isfinite().tolist(), scores.argmax(-1).tolist()
    tokens: list[int | None] = []
    for row, decoding in enumerate(options):
        if not usable[row]:
            tokens.append(None)
        elif decoding.no_sample:
            tokens.append(likeliest[row])
        else:
            generator = generators[row] if generators else None
            allowed = (scores[row] > -math.inf).nonzero()[:, 0]  # usually few; each costs a random number
            drawn = torch.multinomial(scores[row, allowed].softmax(-1), 1, generator=generator)
            tokens.append(int(allowed[drawn]))
    return tokens


def choose_at_once(scores: torch.Tensor, options: Sequence[Decoding],
                   generators: Sequence[torch.Generator | None] | None = None) -> list[int | None]:
    """Do the same as `choose_tokens` for all rows at once: the CPU waits for a GPU each time it reads from it.

    A drawn token is the one with the largest sum of its score and a number from the Gumbel distribution (Gumbel 1954),
    which is the negative logarithm of an exponentially distributed number. The random numbers are others than those of
    `choose_tokens`.
    """
    if generators:
        noise = torch.stack([torch.empty_like(row).exponential_(generator=generator)
                             for row, generator in zip(scores, generators, strict=True)])
    else:
        noise = torch.empty_like(scores).exponential_()
    drawn = torch.tensor([not decoding.no_sample for decoding in options], device=scores.device)
    tokens = (scores - noise.log_() * drawn[:, None]).argmax(-1)
    return [None if token < 0 else token for token in tokens.where(scores.amax(-1).isfinite(), -1).tolist()]


# ------------------------------------------------------------------------------------------------ whole replies


@dataclass
class Memory:
    """The keys and values of a conversation: those of the last reply and its context."""

    sequences: object = None


@torch.inference_mode()
def generate_replies(
    model: DoubleHeadsModel,
    contexts: Sequence[Segment],
    special: Specials,
    decoding: Decoding,
    beginnings: Sequence[list[int]] | None = None,
    streamer: TextStreamer | None = None,
    samples: int = 1,
    memory: Memory | None = None,
) -> list[list[int]]:
    """Decode replies to each context, all in one batch.

    ``decoding``: a `Decoding` or anything that `Decoding.of` takes, such as parsed flags. ``beginnings``: the token ids
    that each reply must start with. ``streamer``: receives the prompt and then each token; it works for a single reply
    without beams. ``samples``: the number of replies per context, which share its computation; with beams, the best
    ``samples`` (at most ``num_beams``) hypotheses of the search. ``memory``: what earlier replies in the same
    conversation have computed; of a single context, only what is new is computed.

    Return contexts · samples lists of token ids, without the beginnings and without control tokens; the replies to one
    context are adjacent. Any control token ends a reply, but none can occur before ``min_length``. A reply ends early,
    with a warning, if its logits are not numbers. Random numbers come from torch's global generator.
    """
    decoding, beginnings = Decoding.of(decoding), beginnings or [[]] * len(contexts)
    prompts = [begin_reply(context, special, beginning)
               for context, beginning in zip(contexts, beginnings, strict=True)]
    if decoding.num_beams == 1:
        return _sampled(model, prompts, special, decoding, beginnings, streamer, samples, memory or Memory())
    at_once = max(1, MOST_BEAMS // (decoding.num_beams + 1))
    return [reply for start in range(0, len(prompts), at_once)
            for reply in _searched(model, prompts[start:start + at_once], special, decoding,
                                   beginnings[start:start + at_once], samples, memory or Memory())]


def _sampled(model: DoubleHeadsModel, prompts: list[Segment], special: Specials, decoding: Decoding,
             beginnings: Sequence[list[int]], streamer: TextStreamer | None, samples: int, memory: Memory
             ) -> list[list[int]]:
    """Decode replies greedily or by sampling; contexts with all replies ended leave the batch."""
    replies: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    rows = list(range(len(replies)))  # number of the reply of each row of the batch
    going, broken = set(rows), 0
    memory.sequences = sequences = sequences_for(model, prompts, samples, decoding.max_length, memory.sequences)
    logits = sequences.logits.repeat_interleave(samples, 0)
    if streamer:
        streamer.put(torch.tensor(prompts[0].ids))
    while going:
        choosing = [row for row, reply in enumerate(rows) if reply in going]
        options, said = [decoding] * len(choosing), [replies[rows[row]] for row in choosing]
        scores = allowed_scores(logits if len(choosing) == len(rows) else logits[choosing], options,
                                [[*beginnings[rows[row] // samples], *tokens]
                                 for row, tokens in zip(choosing, said, strict=True)], special, [*map(len, said)])
        for row, reply, token in zip(choosing, said, choose_tokens(scores, options), strict=True):
            if token is not None and token not in special:
                reply.append(token)
                if streamer:
                    streamer.put(torch.tensor([token]))
                if len(reply) < decoding.max_length:
                    continue
            broken += token is None
            going.remove(rows[row])
        staying = [context for context in range(len(rows) // samples)
                   if going.intersection(rows[context * samples:(context + 1) * samples])]
        if sequences.may_leave and 0 < len(staying) < len(rows) // samples:
            staying = _close_ranks(staying)
            sequences.keep(staying)
            rows = [rows[context * samples + sample] for context in staying for sample in range(samples)]
        if going:
            last = [replies[reply][-1] if reply in going else special.pad for reply in rows]
            logits = sequences.step(last, special.speaker1)
    if streamer:
        streamer.end()
    _warn_of_broken(broken, len(replies))
    return replies


def _close_ranks(staying: list[int]) -> list[int]:
    """Reorder context numbers so that each one below ``len(staying)`` keeps its place, and few have to be copied."""
    kept, movers = set(staying), [place for place in staying if place >= len(staying)]
    return [place if place in kept else movers.pop() for place in range(len(staying))]


def _warn_of_broken(broken: int, replies: int) -> None:
    if broken:
        logger.warning("%s of %s replies end early, because the model's logits are not numbers there; try float32",
                       f"{broken:,}", f"{replies:,}")


class BeamSearch:
    """Beam search for one context, step by step, together with greedy decoding.

    Hypotheses are scored by log-likelihood / length^``length_penalty``. The search ends when no remaining hypothesis
    can beat the best ``replies`` (Freitag and Al-Onaizan 2017). Beam search may drop the greedy reply and end with a
    worse one; in this case the greedy reply is returned.
    """

    def __init__(self, decoding: Decoding, special: Specials, replies: int = 1):
        self.decoding, self.special, self.replies = decoding, special, replies
        self.live: list[tuple[float, list[int]]] = [(0.0, [])]  # log-likelihood and tokens, the best first
        self.greedy: tuple[float, list[int]] | None = (0.0, [])
        self.ended: list[tuple[float, list[int], str]] = []  # score, tokens and "stop" or "length", the best first
        self.greedy_ended: tuple[float, list[int], str] | None = None

    @property
    def hypotheses(self) -> list[list[int]]:
        """The tokens of each row to compute: the beams, then the greedy reply. At first there is one empty row."""
        return [tokens for _, tokens in self.live] + ([self.greedy[1]] if self.greedy and self.greedy[1] else [])

    def candidates(self, vocabulary: int) -> int:
        """Return how many of the likeliest tokens of each row a step needs, since some of them may end a reply."""
        return min(self.decoding.num_beams * (1 + len(self.special)), vocabulary)

    def step(self, best: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]) -> list[int]:
        """Extend the hypotheses by one token.

        ``best`` and ``tokens``: for each of `hypotheses`, the log-probabilities and ids of its likeliest next tokens,
        the best first. Return, for each of the new `hypotheses`, the row that it continues; an empty list ends the
        search.
        """
        width, length = self.decoding.num_beams, len(self.hypotheses[0]) + 1
        last, parents = length == self.decoding.max_length, []
        if self.live:
            ranked = sorted(((score + more, -row, -place) for row, (score, _) in enumerate(self.live)
                             for place, more in enumerate(best[row]) if more > -math.inf), reverse=True)
            before, self.live = self.live, []
            for rank, (score, row, place) in enumerate(ranked):
                if len(self.live) == width or last and rank >= width:
                    break
                said = [*before[-row][1], tokens[-row][-place]]
                if not last and said[-1] not in self.special:
                    self.live.append((score, said))
                    parents.append(-row)
                elif rank < width:
                    self.ended.append(self._end(score, said))
            self.ended = sorted(self.ended, key=lambda one: -one[0])[:self.replies]
            longest = self.decoding.max_length if self.decoding.length_penalty > 0 else length
            if len(self.ended) == self.replies and self.live and \
                    self.ended[-1][0] >= self.live[0][0] / longest ** self.decoding.length_penalty:
                self.live, parents = [], []
        if self.greedy:
            if best[-1][0] == -math.inf:
                self.greedy = None
                return parents
            score, said = self.greedy[0] + best[-1][0], [*self.greedy[1], tokens[-1][0]]
            if last or said[-1] in self.special:
                self.greedy, self.greedy_ended = None, self._end(score, said)
            else:
                self.greedy = (score, said)
                parents.append(len(best) - 1)
        return parents

    def _end(self, score: float, tokens: list[int]) -> tuple[float, list[int], str]:
        score /= len(tokens) ** self.decoding.length_penalty
        return (score, tokens[:-1], "stop") if tokens[-1] in self.special else (score, tokens, "length")

    def results(self) -> list[tuple[float, list[int], str]]:
        """Return the best replies: score, tokens, and "stop" or "length". Empty if the logits were never numbers."""
        greedy = self.greedy_ended
        if greedy and (not self.ended or greedy[0] > self.ended[0][0] and
                       greedy[1] not in [tokens for _, tokens, _ in self.ended]):
            return [greedy, *self.ended][:self.replies]
        return self.ended


def likeliest(logits: torch.Tensor, scores: torch.Tensor, most: int) -> tuple[list[list[float]], list[list[int]]]:
    """Return log-probabilities and ids of the ``most`` likeliest tokens of each row, as `BeamSearch.step` takes them.

    ``scores`` (from `allowed_scores`) decide which tokens are likeliest, ``logits`` give the probabilities; both are
    (rows, vocabulary). If a row's logits are not numbers, its log-probabilities are -inf.
    """
    best, tokens = scores.topk(most)
    best = best - logits.float().logsumexp(-1, keepdim=True)
    return best.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf).tolist(), tokens.tolist()


def _searched(model: DoubleHeadsModel, prompts: list[Segment], special: Specials, decoding: Decoding,
              beginnings: Sequence[list[int]], samples: int, memory: Memory) -> list[list[int]]:
    """Run a beam search per prompt, all in one batch, and return the best replies.

    Finished searches leave the batch.
    """
    copies = decoding.num_beams + 1  # the beams and the greedy reply
    searches = [BeamSearch(decoding, special, samples) for _ in prompts]
    memory.sequences = sequences = sequences_for(model, prompts, copies, decoding.max_length, memory.sequences)
    searching, logits = list(range(len(prompts))), sequences.logits
    rows_each = [1] * len(prompts)
    while True:
        hypotheses = [[*beginnings[number], *tokens] for number in searching for tokens in searches[number].hypotheses]
        new = [len(tokens) for number in searching for tokens in searches[number].hypotheses]
        scores = allowed_scores(logits, [decoding] * len(hypotheses), hypotheses, special, new)
        best, tokens = likeliest(logits, scores, searches[0].candidates(logits.shape[1]))
        done, steps = 0, []
        for number, rows in zip(searching, rows_each, strict=True):
            steps.append(searches[number].step(best[done:done + rows], tokens[done:done + rows]))
            done += rows
        staying = [place for place, parents in enumerate(steps) if parents]
        if not staying:
            break
        if len(staying) < len(searching):
            staying = _close_ranks(staying)
            sequences.keep(staying)
            searching, steps = [searching[place] for place in staying], [steps[place] for place in staying]
        last, parents, used = [], [], []  # unused rows copy the first row of their context
        for place, (number, followed) in enumerate(zip(searching, steps, strict=True)):
            spare = copies - len(followed)
            used += range(place * copies, place * copies + len(followed))
            parents += [place * copies + parent for parent in followed + [0] * spare]
            last += [tokens[-1] for tokens in searches[number].hypotheses] + [special.pad] * spare
        sequences.follow(parents)
        logits = sequences.step(last, special.speaker1)[used]
        rows_each = list(map(len, steps))
    found = [[tokens for _, tokens, _ in search.results()] for search in searches]
    _warn_of_broken(sum(not replies for replies in found), len(found))
    return [(replies + [replies[-1] if replies else []] * samples)[place] for replies in found
            for place in range(samples)]


def sample_sequence(personality, history, tokenizer: Tokenizer, model, args, current_output=None) -> list[int]:
    """Decode one reply, under the name of 2019.

    ``personality``, ``history``: lists of token-id lists; ``args``: options as `Decoding.of` takes them;
    ``current_output``: token ids that the reply begins with. Return the reply's token ids, including these.
    """
    decoding, beginning, special = Decoding.of(args), list(current_output or []), Specials.of(tokenizer)
    context = fitted_context(model, personality, history, special, decoding.max_length + len(beginning))
    return beginning + generate_replies(model, [context], special, decoding, [beginning])[0]


def fitted_context(model: DoubleHeadsModel, persona, history, special: Specials, reply_length: int) -> Segment:
    """Build a context that leaves room for a reply of ``reply_length`` tokens; its oldest part is cut if necessary."""
    room, history_start = model.max_positions - reply_length - 1, model.history_start
    if isinstance(special, OwnTemplate) and room > 0:
        return special.context(persona, history, room)
    if room < max(2, history_start + 1):
        raise InputError(f"--max_length {reply_length}: the model has {room + reply_length + 1} positions for context "
                         "and reply together; choose a smaller --max_length")
    return build_context(*fit_context(persona, history, room, history_start), special, history_start)


# ------------------------------------------------------------------------------------------- models for use, texts


def load_checkpoint(model_checkpoint: str, device: str = "cpu", max_len: int = 0, fp16: str | None = None,
                    max_history: int | None = None) -> tuple[DoubleHeadsModel, Tokenizer]:
    """Load a model, in evaluation mode, on its device, and its tokenizer.

    ``max_len``: the number of positions that a row may use (default 0: as in training). ``max_history``: the number of
    exchanges that the model sees (default None: as in training). ``fp16``: prepare the model for decoding only, in
    this precision ("": float32), see `packing.prepare_to_decode_`; by default, it can also be trained and saved. Raises
    `InputError` as `weights.load_model` and `drafts.read_drafts` do.
    """
    tokenizer = get_tokenizer(model_checkpoint)
    with torch.random.fork_rng(devices=[]):  # weights that the checkpoint lacks get the same random values each time
        torch.default_generator.manual_seed(0)
        model = load_model(model_checkpoint)
        add_special_tokens_(model, tokenizer)
    if tokenizer.own_names:
        logger.info("%s has never been trained with the control tokens of this project, so replies use its own chat "
                    "template, with the personality as the system message", model_checkpoint)
    model.drafts = read_drafts(Path(resolve_checkpoint(model_checkpoint)), len(tokenizer))
    if max_len:
        model.config.max_len = max_len
    if max_history is not None:
        model.config.max_history = max_history
    return model.to(device) if fp16 is None else prepare_to_decode_(model, device, fp16), tokenizer


def readable(tokenizer: Tokenizer, reply: list[int]) -> str:
    """Decode a whole reply to text for a person, on one line."""
    return printable(decoded(tokenizer, reply)).strip()


def decoded(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Decode tokens to text, without control tokens."""
    words = [token for token in tokens if token not in tokenizer.control]
    return tokenizer.decode(words, clean_up_tokenization_spaces=joins(tokenizer))


def joins(tokenizer: Tokenizer) -> bool:
    """Return whether decoding must join tokens: GPT-1's tokenizer splits words that people write as one ("do n't")."""
    return isinstance(tokenizer, OpenAIGPTTokenizer)
