"""Talk to a model in the terminal; and the decoding that chat and evaluation share.

Reads lines from a person or a pipe, keeps the last exchanges as history, and answers as the persona.
"""

import logging
import os
import random
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    TextStreamer,
)

from cli import InputError, command, positive_number, printable, whole_number
from corpora import LONGEST_SENTENCE, read_pieces
from inputs import Segment, Specials, build_context, build_reply, fit_context
from model import HALF, DoubleHeadsModel, add_special_tokens_, half_dtype, load_model
from utils import OpenAIGPTTokenizer, add_common_flags, dataset_of, get_tokenizer

LENGTH_PENALTY = 0.65  # ParlAI's
LARGEST_PERSONALITY = 1 << 20  # bytes of a file; no model has positions for a tenth of it
logger = logging.getLogger("interact")


# ----------------------------------------------------------------------------------------------------- decoding


def top_filtering(logits: torch.Tensor, top_k: float = 0.0, top_p: float = 0.9, threshold: float = -float("Inf"),
                  filter_value: float = -float("Inf")) -> torch.Tensor:
    """Set the logits of unlikely tokens to ``filter_value``.

    ``logits`` (…, vocabulary), of any number of rows. Kept are, of each row, the ``top_k`` largest (≤ 0: all); of these
    the smallest set whose probability exceeds ``top_p`` (nucleus, Holtzman et al. 2020; ≤ 0: all), never less than
    one token; and of these what is at least ``threshold``.
    """
    top_k = min(int(top_k), logits.shape[-1])
    if top_k > 0:
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, filter_value)
    if top_p > 0.0:
        probabilities = F.softmax(logits, dim=-1)
        largest = _descending(probabilities)
        size = (largest.cumsum(-1) <= top_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)  # less one: the last
        smallest_kept = largest.gather(-1, size)  # is the token that crosses the line, so that it is never none
        ties = probabilities == smallest_kept
        room = size + 1 - (probabilities > smallest_kept).sum(-1, keepdim=True)
        if bool((ties.sum(-1, keepdim=True) > room).any()):  # of equals the first
            ties &= ties.cumsum(-1) <= room
        logits = logits.masked_fill(~ties & (probabilities <= smallest_kept), filter_value)
    return logits.masked_fill(logits < threshold, filter_value)


def _descending(rows: torch.Tensor) -> torch.Tensor:
    """Each row sorted, the largest first. On CPUs by numpy, whose vectorised sort takes a thirtieth of torch's time."""
    if rows.device.type == "cpu" and rows.dtype.itemsize >= 4:  # numpy has no bfloat16
        return torch.from_numpy(np.sort(rows.detach().numpy())).flip(-1)
    return rows.sort(descending=True).values


class Filtered(LogitsProcessor):
    """`top_filtering` at a temperature, as a step of transformers' ``generate``."""

    def __init__(self, temperature: float, top_k: int, top_p: float):
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return top_filtering(scores.float() / self.temperature, self.top_k, self.top_p)


class WithinReply(LogitsProcessor):
    """Shows another processor the reply alone, not the ``width`` tokens of prompt before it."""

    def __init__(self, processor: LogitsProcessor, width: int):
        self.processor, self.width = processor, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(input_ids[:, self.width:], scores)


@torch.inference_mode()
def generate_replies(
    model: DoubleHeadsModel,
    contexts: list[Segment],
    special: Specials,
    args: Namespace,
    beginnings: list[list[int]] | None = None,
    streamer: TextStreamer | None = None,
    samples: int = 1,
) -> list[list[int]]:
    """Decode replies to each context, all in one batch with the key-value cache.

    ``args``: what `add_decoding_flags` adds; of these ``num_beams``, ``length_penalty`` and ``no_repeat_ngram_size``
    may be missing. ``beginnings``: token ids each reply starts with. ``samples``: replies a context, which is computed
    once for all of them; with beams, the best ``samples`` (at most ``num_beams``) of the search.
    Returns (contexts · samples) lists of the token ids after the beginning, a context's replies side by side, without
    control tokens; any control token ends a reply, and none can come before ``min_length``. Draws from torch's global
    random state.
    """
    prompts = [context.ids + build_reply(beginning, special, with_eos=False).ids
               for context, beginning in zip(contexts, beginnings or [[]] * len(contexts), strict=True)]
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
    beams, ngram = getattr(args, "num_beams", 1), getattr(args, "no_repeat_ngram_size", 0)
    penalty = getattr(args, "length_penalty", LENGTH_PENALTY)
    ending = {"max_new_tokens": args.max_length, "min_new_tokens": min(args.min_length, args.max_length),
              "eos_token_id": list(special), "pad_token_id": special.pad}
    processors = [WithinReply(NoRepeatNGramLogitsProcessor(ngram), width)] if ngram else []

    if beams == 1:
        if not args.no_sample:
            processors.append(Filtered(args.temperature, args.top_k, args.top_p))
        # top_k: the library's own filter is off, ours above does what there is to do
        how = GenerationConfig(**ending, do_sample=not args.no_sample, top_k=None if args.no_sample else 0)
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

    ``personality``, ``history``: lists of token-id lists; ``args`` as in `generate_replies`; ``current_output``: token
    ids the reply begins with. Returns the reply's token ids, that beginning included.
    """
    beginning = list(current_output or [])
    special = Specials.of(tokenizer)
    context = fitted_context(model, personality, history, special, args.max_length + len(beginning))
    return beginning + generate_replies(model, [context], special, args, [beginning])[0]


def fitted_context(model: DoubleHeadsModel, persona, history, special: Specials, reply_length: int) -> Segment:
    """`build_context`, its oldest part left out where a reply of ``reply_length`` tokens would not fit behind it."""
    room, history_start = model.max_positions - reply_length - 1, model.history_start
    if room < max(2, history_start + 1):
        raise InputError(f"--max_length {reply_length}: the model has {room + reply_length + 1} positions for context "
                         "and reply together; ask for a shorter reply")
    return build_context(*fit_context(persona, history, room, history_start), special, history_start)


# --------------------------------------------------------------------------------------------------------- chat


class ReplyStreamer(TextStreamer):
    """Prints a reply's words as they are decided."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True,
                         clean_up_tokenization_spaces=_joins(tokenizer))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def readable(tokenizer, reply: list[int]) -> str:
    """A whole reply for a person's eyes, as `ReplyStreamer` prints it."""
    return printable(tokenizer.decode(reply, clean_up_tokenization_spaces=_joins(tokenizer))).strip()


def _joins(tokenizer) -> bool:
    """GPT-1's tokens stand apart as its training text did ("do n't"): for a person's eyes they are joined again."""
    return isinstance(tokenizer, OpenAIGPTTokenizer)


def chat(model: DoubleHeadsModel, tokenizer, personality: list[str], args: Namespace) -> None:
    """Read utterances from standard input until it ends, or says ``--end_command``, and print a reply to each."""
    special = Specials.of(tokenizer)
    persona, history = [tokenizer.encode(sentence) for sentence in personality], []
    while True:
        text = _line()
        if text.strip() == args.end_command:
            return
        if len(text) > LONGEST_SENTENCE:
            print(f"Please say less: the line has more than {LONGEST_SENTENCE:,} letters.")
            continue
        said = tokenizer.encode(text)
        if not said:
            print("Please say something: the line is empty.")
            continue
        history = [*history, said][-(2 * args.max_history + 1):]
        context = fitted_context(model, persona, history, special, args.max_length)
        streamer = ReplyStreamer(tokenizer) if args.num_beams == 1 else None
        reply = generate_replies(model, [context], special, args, streamer=streamer)[0]
        if not streamer:
            print(readable(tokenizer, reply))
        history.append(reply)


def _line() -> str:
    """The next line of standard input; of an endless one no more than shows that it is too long."""
    if sys.stdin.isatty():
        return input(">>> ")
    text = piece = sys.stdin.readline(LONGEST_SENTENCE + 2)
    if not text:
        raise EOFError
    while piece and not piece.endswith("\n"):
        piece = sys.stdin.readline(LONGEST_SENTENCE)
    return text.removesuffix("\n")


def choose_personality(args: Namespace, model: DoubleHeadsModel, tokenizer) -> list[str]:
    """``--personality``'s sentences, or those of a random dialog of the data set, or none if the model knows none."""
    if args.personality is None and model.no_persona:
        return []
    if args.personality is None:
        table = dataset_of(args, tokenizer)
        split, dialog = random.choice([(split, dialog) for split in table.values() for dialog in range(len(split))])
        return split.texts("persona", dialog)
    text = args.personality
    one_word = text and not any(map(str.isspace, text))
    if one_word and ("/" in text or Path(text).suffix) or os.path.isfile(text):  # no sentence: a file's name
        try:
            text = "".join(read_pieces(text, largest=LARGEST_PERSONALITY))
        except InputError as error:
            raise InputError(f"--personality {str(error).partition(';')[0]}; name a file with a sentence a line, or "
                             "write the sentences themselves") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def add_decoding_flags(parser: ArgumentParser) -> None:
    """Flags of `generate_replies`."""
    add = parser.add_argument
    add("--no_sample", action="store_true", help="greedy decoding: always the likeliest token")
    add("--max_length", type=positive_number, default=20, help="of a reply, in tokens (default: %(default)s)")
    add("--min_length", type=whole_number, default=1, help="of a reply, in tokens (default: %(default)s)")
    add("--temperature", type=_above_zero, default=0.7, help="below 1: surer, above: bolder (default: %(default)s)")
    add("--top_k", type=int, default=0, help="sample from the K likeliest tokens (default: 0, off)")
    add("--top_p", type=float, default=0.9, metavar="P",
        help="sample from the likeliest tokens of total probability P; 0 or less: off (default: %(default)s)")
    add("--num_beams", type=positive_number, default=1, metavar="N",
        help="beam search of that width, instead of sampling (default: 1, off)")
    add("--length_penalty", type=float, default=LENGTH_PENALTY, metavar="A",
        help="beams compete by log-likelihood / length^A; 0 favours short replies (default: %(default)s)")
    add("--no_repeat_ngram_size", type=whole_number, default=0, metavar="N",
        help="never the same N tokens twice in a reply (default: 0, off)")
    add("--fp16", default="", choices=["", "O0", *HALF],
        help="compute in half precision: bf16, or apex's names as in train.py (default: none)")
    add("--seed", type=whole_number, default=0, help="makes sampling repeatable (default: 0, not seeded)")


def add_family_flag(parser: ArgumentParser) -> None:
    """``--model``, which 2019 scripts pass."""
    parser.add_argument("--model", default="",
                        help="openai-gpt or gpt2; not needed, the checkpoint's config.json decides")


def _above_zero(text: str) -> float:
    try:
        if 1e-6 <= (value := float(text)) <= 1e6:  # beyond, what it divides is no number any more
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not a number above 0, or none to sample with; for the likeliest token "
                            "always, use --no_sample")


def load_checkpoint(args: Namespace) -> tuple[DoubleHeadsModel, object]:
    """Model, on its device, and tokenizer of ``--model_checkpoint``."""
    tokenizer = get_tokenizer(args.model_checkpoint)
    model = load_model(args.model_checkpoint)
    add_special_tokens_(model, tokenizer)
    if args.max_len:
        model.config.max_len = args.max_len
    return model.to(args.device), tokenizer


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add_family_flag(parser)
    parser.add_argument("--personality", metavar="TEXT_OR_FILE",
                        help="who the bot is, a sentence a line; \"\" for nobody (default: somebody of the data set; "
                             "nobody for a model trained without personas)")
    parser.add_argument("--end_command", default="Abort!", help="what ends the chat (default: %(default)s)")
    args = parser.parse_args()
    if args.seed:
        random.seed(args.seed)
        torch.manual_seed(args.seed)
    sys.stdin.reconfigure(errors="replace")
    try:
        model, tokenizer = load_checkpoint(args)
        model.to(half_dtype(args.device, args.fp16))  # each token reads all weights: half the bytes, half the time
        personality = choose_personality(args, model, tokenizer)
        print("Personality:", *map(printable, personality or ["(none)"]), sep="\n  ")
        if sys.stdin.isatty():
            import readline  # noqa: F401  arrow keys and history in input()

            print(f"Say something; {args.end_command} or Ctrl-D ends the chat.")
        chat(model, tokenizer, personality, args)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
