"""Talk to a model in the terminal; and the decoding that chat and evaluation share.

Reads lines from a person or a pipe, keeps the last exchanges as history, and answers as the persona.
"""

import logging
import random
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from corpora import InputError, command
from inputs import Segment, Specials, build_context, build_reply, fit_context
from model import DoubleHeadsModel, add_special_tokens_, load_model
from utils import (
    OpenAIGPTTokenizer,
    add_common_flags,
    get_dataset,
    get_tokenizer,
    positive_number,
    whole_number,
)

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
        probabilities, vocabulary, size = F.softmax(logits, dim=-1), logits.shape[-1], 128
        while True:  # the nucleus is mostly small: sorting the whole vocabulary for it would take longer than the model
            largest, tokens = probabilities.topk(min(size, vocabulary))
            exceeds = largest.cumsum(-1) > top_p
            if size >= vocabulary or bool(exceeds[..., -1].all()):
                break
            size *= 8
        kept = F.pad(~exceeds[..., :-1], (1, 0), value=True)  # the token that crosses the line stays: never none
        logits = logits.masked_fill(~torch.zeros_like(logits, dtype=torch.bool).scatter(-1, tokens, kept), filter_value)
    return logits.masked_fill(logits < threshold, filter_value)


class Filtered(LogitsProcessor):
    """`top_filtering` at a temperature, as a step of transformers' ``generate``."""

    def __init__(self, temperature: float, top_k: int, top_p: float):
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return top_filtering(scores.float() / self.temperature, self.top_k, self.top_p)


@torch.inference_mode()
def generate_replies(
    model: DoubleHeadsModel,
    contexts: list[Segment],
    special: Specials,
    args: Namespace,
    beginnings: list[list[int]] | None = None,
    streamer: TextStreamer | None = None,
) -> list[list[int]]:
    """Decode a reply to each context, all in one batch with the key-value cache.

    ``args``: ``no_sample`` (greedy), ``temperature``, ``top_k``, ``top_p``, ``min_length``, ``max_length`` in tokens.
    ``beginnings``: token ids each reply starts with. Returns the token ids after it, without control tokens; any
    control token ends a reply, and none can come before ``min_length``. Draws from torch's global random state.
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
    seen = torch.arange(width) >= width - lengths
    output = model.generate(
        ids.to(model.device),
        token_type_ids=types.to(model.device),
        attention_mask=seen.to(model.device, torch.long),
        position_ids=(seen.long().cumsum(-1) - 1).clamp(min=0).to(model.device),
        generation_config=GenerationConfig(
            do_sample=not args.no_sample, top_k=None if args.no_sample else 0,  # the filter below does what there is
            max_new_tokens=args.max_length, min_new_tokens=min(args.min_length, args.max_length),
            eos_token_id=list(special), pad_token_id=special.pad,
        ),
        logits_processor=LogitsProcessorList(
            [] if args.no_sample else [Filtered(args.temperature, args.top_k, args.top_p)]),
        streamer=streamer,
    )
    replies = []
    for row in output[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in special), len(row))
        replies.append(row[:end])
    return replies


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
    room = model.config.max_position_embeddings - reply_length - 1
    if room < 2:
        raise InputError(f"--max_length {reply_length}: the model has {room + reply_length + 1} positions for context "
                         "and reply together; ask for a shorter reply")
    return build_context(*fit_context(persona, history, room), special)


# --------------------------------------------------------------------------------------------------------- chat


class ReplyStreamer(TextStreamer):
    """Prints a reply's words as they are decided."""

    def __init__(self, tokenizer):
        # GPT-1's tokens stand apart as its training text did ("do n't"): for a person's eyes they are joined again.
        joined = isinstance(tokenizer, OpenAIGPTTokenizer)
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=joined)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = "".join(letter if letter.isprintable() else " " for letter in text)  # no terminal escapes
        super().on_finalized_text(text, stream_end)


def chat(model: DoubleHeadsModel, tokenizer, personality: list[str], args: Namespace) -> None:
    """Read utterances from standard input until it ends, or says ``--end_command``, and print a reply to each."""
    special = Specials.of(tokenizer)
    persona, history = [tokenizer.encode(sentence) for sentence in personality], []
    prompt = ">>> " if sys.stdin.isatty() else ""
    while True:
        text = input(prompt)
        if text.strip() == args.end_command:
            return
        said = tokenizer.encode(text)
        if not said:
            print("Please say something: the line is empty.")
            continue
        history = [*history, said][-(2 * args.max_history + 1):]
        context = fitted_context(model, persona, history, special, args.max_length)
        history += generate_replies(model, [context], special, args, streamer=ReplyStreamer(tokenizer))


def choose_personality(args: Namespace, tokenizer) -> list[str]:
    """``--personality``'s sentences, or those of a random dialog of the data set."""
    if args.personality is None:
        table = get_dataset(tokenizer, args.dataset_path, args.dataset_cache)
        split, dialog = random.choice([(split, dialog) for split in table.values() for dialog in range(len(split))])
        return split.texts("persona", dialog)
    text, path = args.personality, Path(args.personality)
    if text and not any(map(str.isspace, text)) and ("/" in text or path.suffix):  # no sentence: a file's name
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"--personality {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
        except OSError as error:
            raise InputError(f"--personality {path}: cannot be read ({error.strerror}); "
                             "name a file with a sentence a line, or write the sentences themselves") from None
    elif text and len(text) < 256 and path.is_file():
        text = path.read_text("utf-8-sig", errors="replace")
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
    add("--seed", type=whole_number, default=0, help="makes sampling repeatable (default: 0, not seeded)")
    add("--model", default="", help="openai-gpt or gpt2; not needed, the checkpoint's config.json decides")


def _above_zero(text: str) -> float:
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not a number above 0; for the likeliest token always, use --no_sample")


def load_for_decoding(args: Namespace) -> tuple[DoubleHeadsModel, object]:
    """Model, on its device, and tokenizer of ``--model_checkpoint``."""
    tokenizer = get_tokenizer(args.model_checkpoint)
    model = load_model(args.model_checkpoint)
    add_special_tokens_(model, tokenizer)
    return model.to(args.device), tokenizer


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    parser.add_argument("--personality", metavar="TEXT_OR_FILE",
                        help="who the bot is, a sentence a line; \"\" for nobody (default: somebody of the data set)")
    parser.add_argument("--end_command", default="Abort!", help="what ends the chat (default: %(default)s)")
    args = parser.parse_args()
    if args.seed:
        random.seed(args.seed)
        torch.manual_seed(args.seed)
    sys.stdin.reconfigure(errors="replace")
    try:
        model, tokenizer = load_for_decoding(args)
        personality = choose_personality(args, tokenizer)
        print("Personality:", *(personality or ["(none)"]), sep="\n  ")
        if sys.stdin.isatty():
            import readline  # noqa: F401  arrow keys and history in input()

            print(f"Say something; {args.end_command} or Ctrl-D ends the chat.")
        chat(model, tokenizer, personality, args)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
