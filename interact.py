"""Talk to a model in the terminal.

Reads lines from a person or a pipe, keeps the last exchanges as history, and answers as the persona.
"""

import io
import logging
import os
import random
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from transformers import TextStreamer

from cli import InputError, command, printable
from corpora import LONGEST_SENTENCE, read_pieces
from decoding import (  # noqa: F401  some for 2019 code, which imports them from here
    Decoding,
    add_decoding_flags,
    add_family_flag,
    fitted_context,
    generate_replies,
    joins,
    load_checkpoint,
    readable,
    sample_sequence,
    top_filtering,
)
from inputs import Specials
from model import DoubleHeadsModel
from pretrained import published_or_persona
from shapes import read_persona
from tokenization import Tokenizer
from utils import add_common_flags, open_dataset

LARGEST_PERSONALITY = 1 << 20  # bytes of a file; no model has positions for a tenth of it
logger = logging.getLogger("interact")


class ReplyStreamer(TextStreamer):
    """Prints a reply's words as they are decided, without the blank before the first one."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True,
                         clean_up_tokenization_spaces=joins(tokenizer))
        self.begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = printable(text) if self.begun else printable(text).lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


def chat(model: DoubleHeadsModel, tokenizer: Tokenizer, personality: list[str], decoding: Decoding,
         end_command: str) -> None:
    """Read utterances from standard input until it ends, or says ``end_command``, and print a reply to each."""
    special = Specials.of(tokenizer)
    persona, history = tokenizer.encode_persona(personality), []
    while True:
        text = _line()
        if text.strip() == end_command:
            return
        if len(text) > LONGEST_SENTENCE:
            print(f"Please say less: the line has more than {LONGEST_SENTENCE:,} letters.")
            continue
        said = tokenizer.encode(text)
        if not said:
            print("Please say something: the line is empty.")
            continue
        history = [*history, said][-(2 * model.max_history + 1):]
        context = fitted_context(model, persona, history, special, decoding.max_length)
        streamer = ReplyStreamer(tokenizer) if decoding.num_beams == 1 else None
        reply = generate_replies(model, [context], special, decoding, streamer=streamer)[0]
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


def choose_personality(args: Namespace, model: DoubleHeadsModel, tokenizer: Tokenizer) -> list[str]:
    """``--personality``'s sentences, or those of a random dialog of the data set, or none if the model knows none."""
    if args.personality is None and model.no_persona:
        return []
    if args.personality is None:
        table = open_dataset(args, tokenizer)
        split, dialog = random.choice([(split, dialog) for split in table.values() for dialog in range(len(split))])
        return split.texts("persona", dialog)
    text, name = args.personality, "--personality"
    one_word = text and not any(map(str.isspace, text))
    if one_word and ("/" in text or Path(text).suffix) or os.path.isfile(text):  # no sentence: a file's name
        try:
            name, text = f"--personality {text}", "".join(read_pieces(text, largest=LARGEST_PERSONALITY))
        except InputError as error:
            cure = "save the file as UTF-8" if "UTF-8" in str(error) else \
                "name a file with a sentence per line, or write the sentences themselves"
            raise InputError(f"--personality {str(error).partition(';')[0]}; {cure}") from None
        if "\0" in text:
            raise InputError(f"{name}: has zero bytes, as UTF-16 has; save the file as UTF-8")
    return read_persona(text, name)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add_family_flag(parser)
    parser.add_argument("--personality", metavar="TEXT_OR_FILE",
                        help="who the bot is: a sentence per line, or JSON, a list of sentences or an entry; \"\" for "
                             "nobody (default: somebody of the data that the run was trained on; nobody for a model "
                             "trained without personas)")
    parser.add_argument("--end_command", default="Abort!", help="what ends the chat (default: %(default)s)")
    args = parser.parse_args()
    if args.seed:
        random.seed(args.seed)
        torch.manual_seed(args.seed)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    try:
        args.model_checkpoint = published_or_persona(args.model_checkpoint)
        model, tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len, args.fp16,
                                           args.max_history)
        personality = choose_personality(args, model, tokenizer)
        print("Personality:", *map(printable, personality or ["(none)"]), sep="\n  ")
        if sys.stdin.isatty():
            import readline  # noqa: F401  arrow keys and history in input()

            print(f"Say something; {args.end_command} or Ctrl-D ends the chat.")
        chat(model, tokenizer, personality, Decoding.of(args), args.end_command)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
