"""Decode replies: the options with their bounds, the choice of a token, search and sampling over whole batches.

The chat, evaluation, the web server and learning from preferences all decode by what stands here. Knows token ids; of
text it knows only how to show a reply to a person.
"""

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import takewhile

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from cli import InputError, Number, printable
from inputs import Segment, Specials, build_context, build_reply, fit_context
from model import HALF, DoubleHeadsModel, add_special_tokens_, half_dtype, load_model
from utils import OpenAIGPTTokenizer, get_tokenizer

LENGTH_PENALTY = 0.65  # ParlAI's


# ------------------------------------------------------------------------------------------------------ options


def _option(default: float, allowed: Number, help: str, metavar: str | None = None):
    """A field of `Decoding`, with the numbers that it allows and the help text of its flag."""
    return field(default=default, metadata={"allowed": allowed, "help": help, "metavar": metavar})


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
        """The decoding options among the attributes of ``options``, such as parsed flags; defaults for the rest."""
        if isinstance(options, cls):
            return options
        return cls(**{name: getattr(options, name) for name in OPTIONS if hasattr(options, name)})

    def over(self, **options) -> "Decoding":
        """A copy with other ``options``, of which None means unchanged.

        A ``temperature`` of 0 means greedy decoding, as in OpenAI's interface; any other one means sampling.
        """
        options = {name: value for name, value in options.items() if value is not None}
        if options.get("temperature") == 0:
            options |= {"no_sample": True, "temperature": self.temperature}
        elif "temperature" in options:
            options.setdefault("no_sample", False)
        return replace(self, **options)


OPTIONS = {option.name: option for option in fields(Decoding)}


def _temperature(text: str) -> float:
    """Read ``--temperature``. Whoever asks for 0 learns which flag to use."""
    try:
        return OPTIONS["temperature"].metadata["allowed"](text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}; for the likeliest token always, use --no_sample") from None


def add_decoding_flags(parser: ArgumentParser) -> None:
    """Add a flag for each option of `Decoding`, and ``--fp16``."""
    for name, option in OPTIONS.items():
        if option.type is bool:
            parser.add_argument(f"--{name}", action="store_true", help=option.metadata["help"])
        else:
            read = _temperature if name == "temperature" else option.metadata["allowed"]
            parser.add_argument(f"--{name}", type=read, default=option.default, metavar=option.metadata["metavar"],
                                help=f"{option.metadata['help']} (default: %(default)s)")
    parser.add_argument("--fp16", default="", choices=["", "O0", *HALF],
                        help="compute in half precision: bf16, or apex's names as in train.py (default: none)")


def add_family_flag(parser: ArgumentParser) -> None:
    """Add ``--model``, which 2019 scripts pass."""
    parser.add_argument("--model", default="",
                        help="openai-gpt or gpt2; not needed, the checkpoint's config.json decides")


# -------------------------------------------------------------------------------------------- the choice of a token


def top_filtering(logits: torch.Tensor, top_k: float = 0.0, top_p: float = 0.9, threshold: float = -float("Inf"),
                  filter_value: float = -float("Inf")) -> torch.Tensor:
    """Set the logits of unlikely tokens to ``filter_value``, under the name of 2019.

    ``logits`` (…, vocabulary), of any number of rows. Of each row are kept the ``top_k`` largest (≤ 0: all); of these
    the smallest set whose probability exceeds ``top_p`` (nucleus, Holtzman et al. 2020; ≤ 0: all), at least one token;
    and of these the logits of at least ``threshold``. On ties at the nucleus's edge, the first tokens stay.
    """
    top_k = min(int(top_k), logits.shape[-1])
    if top_k > 0:
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, filter_value)
    if top_p > 0.0:
        probabilities = F.softmax(logits, dim=-1)
        largest = _descending(probabilities)
        # One less than the number kept: the token that crosses top_p stays, so the set is never empty.
        size = (largest.cumsum(-1) <= top_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        smallest_kept = largest.gather(-1, size)
        ties = probabilities == smallest_kept
        room = size + 1 - (probabilities > smallest_kept).sum(-1, keepdim=True)
        if bool((ties.sum(-1, keepdim=True) > room).any()):
            ties &= ties.cumsum(-1) <= room
        logits = logits.masked_fill(~ties & (probabilities <= smallest_kept), filter_value)
    return logits.masked_fill(logits < threshold, filter_value)


def _descending(rows: torch.Tensor) -> torch.Tensor:
    """Each row sorted, the largest first. On CPUs by numpy, whose vectorised sort takes a thirtieth of torch's time."""
    if rows.device.type == "cpu" and rows.dtype.itemsize >= 4:  # numpy has no bfloat16
        return torch.from_numpy(np.sort(rows.detach().numpy())).flip(-1)
    return rows.sort(descending=True).values


def repeating(said: Sequence[int], size: int) -> list[int]:
    """The tokens after which the last ``size`` tokens of ``said`` would be there a second time; ``size`` 0: none."""
    last = tuple(said[len(said) - size + 1:])
    return [said[start + size - 1] for start in range(len(said) - size + 1) if size
            and tuple(said[start:start + size - 1]) == last]


def allowed_scores(logits: torch.Tensor, options: Sequence[Decoding], said: Sequence[Sequence[int]],
                   special: Specials, new: Sequence[int] | None = None) -> torch.Tensor:
    """The logits (rows, vocabulary) in float32, with -inf where a row's options forbid the token.

    Control tokens are forbidden before ``min_length``, then tokens that would repeat an n-gram, and where a row samples
    its logits are divided by the temperature and filtered. ``options``: of each row; ``said``: the reply so far,
    with whatever words it was given to begin with; ``new``: how many tokens of it count for ``min_length`` (default:
    all). Each row is computed by itself, and one whose logits are not numbers disturbs no other.
    """
    scores = logits.to(torch.float32, copy=True)
    sampled: dict[tuple, list[int]] = {}
    for row, (decoding, tokens) in enumerate(zip(options, said, strict=True)):
        if (len(tokens) if new is None else new[row]) < min(decoding.min_length, decoding.max_length):
            scores[row, list(special)] = -math.inf
        if banned := repeating(tokens, decoding.no_repeat_ngram_size):
            scores[row, banned] = -math.inf
        if not decoding.no_sample and decoding.num_beams == 1:
            sampled.setdefault((decoding.temperature, decoding.top_k, decoding.top_p), []).append(row)
    for (temperature, top_k, top_p), rows in sampled.items():
        scores[rows] = top_filtering(scores[rows] / temperature, top_k, top_p)
    return scores


def choose_tokens(scores: torch.Tensor, options: Sequence[Decoding],
                  generators: Sequence[torch.Generator | None] | None = None) -> list[int | None]:
    """The next token of each row of `allowed_scores`: the likeliest, or one drawn by its probability.

    ``generators``: of random numbers, one for each row (default: torch's global one). None stands for a row that has no
    choice, because its logits are not numbers or every token is forbidden; its neighbours do not notice.
    """
    usable, likeliest = scores.amax(-1).isfinite().tolist(), scores.argmax(-1).tolist()
    tokens: list[int | None] = []
    for row, decoding in enumerate(options):
        if not usable[row]:
            tokens.append(None)
        elif decoding.no_sample:
            tokens.append(likeliest[row])
        else:
            generator = generators[row] if generators else None
            tokens.append(int(torch.multinomial(scores[row].softmax(-1), 1, generator=generator)))
    return tokens


# ------------------------------------------------------------------------------------------------ whole replies


class Filtered(LogitsProcessor):
    """`top_filtering` at a temperature, as a step of transformers' ``generate``."""

    def __init__(self, temperature: float, top_k: int, top_p: float):
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return top_filtering(scores.float() / self.temperature, self.top_k, self.top_p)


class NoRepeats(LogitsProcessor):
    """Forbids what `repeating` finds in each reply, the words that it was given to begin with included."""

    def __init__(self, size: int, beginnings: list[list[int]], width: int):
        self.size, self.beginnings, self.width = size, beginnings, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        per_context = len(input_ids) // len(self.beginnings)
        for row, new in enumerate(input_ids[:, self.width:].tolist()):
            scores[row, repeating([*self.beginnings[row // per_context], *new], self.size)] = -math.inf
        return scores


@torch.inference_mode()
def generate_replies(
    model: DoubleHeadsModel,
    contexts: list[Segment],
    special: Specials,
    decoding: Decoding,
    beginnings: list[list[int]] | None = None,
    streamer: TextStreamer | None = None,
    samples: int = 1,
) -> list[list[int]]:
    """Decode replies to each context, all in one batch with the key-value cache.

    ``decoding``: `Decoding`, or whatever `Decoding.of` takes, such as parsed flags. ``beginnings``: token ids that each
    reply starts with. ``samples``: replies per context, which is computed once for all of them; with beams, the best
    ``samples`` (at most ``num_beams``) of the search.
    Returns (contexts · samples) lists of the token ids after the beginning, a context's replies side by side, without
    control tokens; any control token ends a reply, and none can come before ``min_length``. Draws from torch's global
    random state.
    """
    decoding, beginnings = Decoding.of(decoding), beginnings or [[]] * len(contexts)
    prompts = [context.ids + build_reply(beginning, special, with_eos=False).ids
               for context, beginning in zip(contexts, beginnings, strict=True)]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), special.pad)  # padded on the left, so that all go on at the same place
    types = torch.full_like(ids, special.speaker1)
    for row, (prompt, context) in enumerate(zip(prompts, contexts, strict=True)):
        ids[row, width - len(prompt):] = torch.tensor(prompt)
        types[row, width - len(prompt):width - len(prompt) + len(context.types)] = torch.tensor(context.types)
    lengths = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    starts = torch.tensor([context.start for context in contexts])[:, None]
    seen = torch.arange(width) >= width - lengths
    inputs = {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": seen.long(),
        "position_ids": (starts + seen.long().cumsum(-1) - 1).clamp(min=0),
    }
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    beams, ngram, penalty = decoding.num_beams, decoding.no_repeat_ngram_size, decoding.length_penalty
    ending = {"max_new_tokens": decoding.max_length, "min_new_tokens": min(decoding.min_length, decoding.max_length),
              "eos_token_id": list(special), "pad_token_id": special.pad}
    processors = [NoRepeats(ngram, beginnings, width)] if ngram else []

    if beams == 1:
        if not decoding.no_sample:
            processors.append(Filtered(decoding.temperature, decoding.top_k, decoding.top_p))
        # top_k=0 turns the library's filter off; `Filtered` replaces it.
        how = GenerationConfig(**ending, do_sample=not decoding.no_sample, top_k=None if decoding.no_sample else 0)
        output = model.generate(
            **(_computed_once(model, inputs, samples) if samples > 1 else inputs), generation_config=how,
            logits_processor=LogitsProcessorList(processors), streamer=streamer)
        return _replies(output[:, width:], special)

    def search(width_of_beam: int) -> tuple[list[list[int]], list[float]]:
        """Replies and their log-likelihoods over length to the power of the penalty."""
        how = GenerationConfig(**ending, do_sample=False, return_dict_in_generate=True, output_logits=True)
        if width_of_beam > 1:  # stopping "never": not before the best is certain
            how.update(num_beams=width_of_beam, num_return_sequences=samples, length_penalty=penalty,
                       early_stopping="never")
        output = model.generate(**_computed_once(model, inputs, 1, width_of_beam), generation_config=how,
                                logits_processor=LogitsProcessorList(processors))
        steps = model.compute_transition_scores(output.sequences, output.logits, output.get("beam_indices"), True)
        ids = output.sequences[:, width:]
        ended = torch.isin(ids, torch.tensor(special, device=ids.device))
        length = torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1])  # with what ended it
        steps = steps.masked_fill(torch.arange(ids.shape[1], device=ids.device) >= length[:, None], 0.0)
        return _replies(ids, special), (steps.double().sum(1) / length ** penalty).tolist()

    # A beam can lose the greedy reply on the way and end with a worse one; then the greedy one is the answer.
    (replies, scores), (greedy, greedy_scores) = search(beams), search(1)
    for context, (reply, score) in enumerate(zip(greedy, greedy_scores, strict=True)):
        best = context * samples
        if score > scores[best] and reply not in replies[best:best + samples]:
            replies[best:best + samples] = [reply, *replies[best:best + samples - 1]]
    return replies


def _computed_once(model: DoubleHeadsModel, inputs: dict[str, torch.Tensor], samples: int, beams: int = 1) -> dict:
    """Inputs of ``generate`` for ``samples`` or ``beams`` of each row, with all but the rows' last token computed."""
    prompt = {name: tensor[:, :-1] for name, tensor in inputs.items()}
    cache = model(**prompt, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(samples * beams)
    repeated = {name: tensor.repeat_interleave(samples, 0) for name, tensor in inputs.items()}
    return repeated | {"past_key_values": cache}  # generate() repeats the tensors for its beams itself


def _replies(ids: torch.Tensor, special: Specials) -> list[list[int]]:
    """Each row up to its first control token."""
    return [list(takewhile(lambda token: token not in special, row)) for row in ids.tolist()]


def sample_sequence(personality, history, tokenizer, model, args, current_output=None) -> list[int]:
    """Decode one reply, under the name of 2019.

    ``personality``, ``history``: lists of token-id lists; ``args``: options as `Decoding.of` takes them;
    ``current_output``: token ids that the reply begins with. Returns the reply's token ids, that beginning included.
    """
    decoding, beginning, special = Decoding.of(args), list(current_output or []), Specials.of(tokenizer)
    context = fitted_context(model, personality, history, special, decoding.max_length + len(beginning))
    return beginning + generate_replies(model, [context], special, decoding, [beginning])[0]


def fitted_context(model: DoubleHeadsModel, persona, history, special: Specials, reply_length: int) -> Segment:
    """`build_context`, its oldest part left out where a reply of ``reply_length`` tokens would not fit behind it."""
    room, history_start = model.max_positions - reply_length - 1, model.history_start
    if room < max(2, history_start + 1):
        raise InputError(f"--max_length {reply_length}: the model has {room + reply_length + 1} positions for context "
                         "and reply together; ask for a shorter reply")
    return build_context(*fit_context(persona, history, room, history_start), special, history_start)


# ------------------------------------------------------------------------------------------- models for use, texts


def load_checkpoint(model_checkpoint: str, device: str = "cpu", max_len: int = 0,
                    fp16: str = "") -> tuple[DoubleHeadsModel, object]:
    """The model of a checkpoint, on its device, and the tokenizer.

    ``max_len``: how many positions a row may take (default 0: as in the checkpoint's training). ``fp16``: the precision
    of the weights, for decoding alone, which reads all of them for each token: half the bytes take half the time.
    Raises `InputError` as `model.load_model` does.
    """
    tokenizer = get_tokenizer(model_checkpoint)
    with torch.random.fork_rng(devices=[]):  # what the checkpoint lacks is the same each time, and nothing else is
        torch.default_generator.manual_seed(0)
        model = load_model(model_checkpoint)
        add_special_tokens_(model, tokenizer)
    if max_len:
        model.config.max_len = max_len
    return model.to(device, half_dtype(device, fp16)), tokenizer


def readable(tokenizer, reply: list[int]) -> str:
    """A whole reply for a person to read."""
    return printable(tokenizer.decode(reply, clean_up_tokenization_spaces=joins(tokenizer))).strip()


def joins(tokenizer) -> bool:
    """Whether decoding must join tokens: GPT-1's stand apart as its training text did ("do n't")."""
    return isinstance(tokenizer, OpenAIGPTTokenizer)
