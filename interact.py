"""Talk to a model in the terminal.

The script reads lines from a person or a pipe, keeps the last exchanges as history, and answers as the persona. A
person can also give commands, which begin with a slash; a pipe gets only replies.
"""

import io
import json
import logging
import os
import random
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from cli import say_start

if __name__ == "__main__":
    say_start()  # the following imports take seconds

import torch
from transformers import TextStreamer

from cli import InputError, command, printable
from corpora import LONGEST_SENTENCE, read_pieces
from decoding import (  # noqa: F401  2019 code imports some of these from here
    Decoding,
    Memory,
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
from model import DoubleHeadsModel
from pretrained import published_or_persona
from shapes import read_persona
from templates import tokens_for_chat
from tokenization import Tokenizer
from utils import add_common_flags, open_dataset

LARGEST_PERSONALITY = 1 << 20  # bytes of a file; no model has positions for a tenth of it
logger = logging.getLogger("interact")


HELP = """\
  /persona TEXT or FILE  give the bot another persona and begin a new conversation; without a text: show the persona
  /reset                 begin a new conversation
  /retry                 get another reply to your last message
  /save FILE             save the conversation as a data file for training and example_entry.py
  /help                  show this list
Ctrl-C stops a reply. At the prompt, Ctrl-C, Ctrl-D or {end_command} ends the chat."""


class ReplyStreamer(TextStreamer):
    """A streamer that prints the words of a reply as they are decoded, without a space before the first word.

    ``tokens``: the reply so far.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True,
                         clean_up_tokenization_spaces=joins(tokenizer))
        self.begun, self.tokens = False, list[int]()

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = printable(text) if self.begun else printable(text).lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


class Conversation:
    """A persona and the messages of both sides, as texts and as token ids."""

    def __init__(self, model: DoubleHeadsModel, tokenizer: Tokenizer, personality: list[str], decoding: Decoding):
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self.special, self.memory = tokens_for_chat(tokenizer), Memory()
        self.become(personality)

    def become(self, personality: list[str]) -> None:
        """Take a persona and begin a new conversation."""
        self.personality, self.persona = personality, self.tokenizer.encode_persona(personality)
        self.reset()

    def reset(self) -> None:
        self.said: list[str] = []  # messages of user and bot, alternating
        self.history: list[list[int]] = []  # the same as token ids

    def hear(self, text: str) -> bool:
        """Add a message of the user. Return False, and add nothing, if the text has no tokens."""
        if ids := self.tokenizer.encode(text):
            self.said.append(text.strip())
            self.history.append(ids)
        return bool(ids)

    def remove_last(self) -> bool:
        """Remove the last message. Return False if no message is left."""
        del self.said[-1:], self.history[-1:]
        return bool(self.said)

    def answer(self) -> None:
        """Print a reply to the last message, word by word except with beams, and remember it.

        Ctrl-C stops the reply and raises ``KeyboardInterrupt``. The printed part counts as the reply; if nothing has
        been printed, the user's message is removed.
        """
        history = self.history[-(2 * self.model.max_history + 1):]
        context = fitted_context(self.model, self.persona, history, self.special, self.decoding.max_length)
        streamer = ReplyStreamer(self.tokenizer) if self.decoding.num_beams == 1 else None
        try:
            reply = generate_replies(self.model, [context], self.special, self.decoding, streamer=streamer,
                                     memory=self.memory)[0]
        except KeyboardInterrupt:
            if streamer and streamer.tokens:
                streamer.end()  # prints the incomplete last word
                self._remember(streamer.tokens)
            else:
                self.remove_last()
            raise
        if not streamer:
            print(readable(self.tokenizer, reply))
        self._remember(reply)

    def _remember(self, reply: list[int]) -> None:
        self.said.append(readable(self.tokenizer, reply))
        self.history.append(reply)

    def save(self, name: str) -> None:
        """Save the conversation as a data file, in both splits. Raises `InputError` if this fails."""
        turns = [{"history": self.said[:place], "candidates": [self.said[place]]}
                 for place in range(1, len(self.said), 2)]
        if not turns:
            raise InputError("nothing to save yet; talk first")
        entry = {"personality": self.personality, "utterances": turns}
        try:
            with open(name, "x", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps({"train": [entry], "valid": [entry]}, indent=1, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise InputError(f"{name}: exists already; name another file") from None
        except OSError as error:
            raise InputError(f"{name}: cannot be written ({error.strerror}); name a place you may write to") from None


def chat(model: DoubleHeadsModel, tokenizer: Tokenizer, personality: list[str], decoding: Decoding,
         end_command: str) -> None:
    """Read messages from standard input until its end, or until ``end_command``, and print a reply to each."""
    talk, at_terminal = Conversation(model, tokenizer, personality, decoding), sys.stdin.isatty()
    label = paint("bot: ", 36) if at_terminal and sys.stdout.isatty() else ""
    while True:
        text = _line()
        if text.strip() == end_command:
            return
        if at_terminal and text.startswith("/"):
            if not obey(talk, *text[1:].partition(" ")[::2], end_command):
                continue
        elif len(text) > LONGEST_SENTENCE:
            print(f"Please say less: the line has more than {LONGEST_SENTENCE:,} characters.")
            continue
        elif not talk.hear(text):
            print("Please say something: the line is empty.")
            continue
        print(label, end="", flush=True)
        try:
            talk.answer()
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print("(stopped)")


def obey(talk: Conversation, command: str, about: str, end_command: str) -> bool:
    """Execute a command, given without the slash. Return whether a reply should follow."""
    about = about.strip()
    try:
        if command == "reset":
            talk.reset()
            print("This is a new conversation.")
        elif command == "retry":
            if talk.remove_last():
                return True
            print("There is no message yet.")
        elif command == "save" and about:
            talk.save(about)
            print(f"Saved as {printable(about)}.")
        elif command == "persona":
            if about:
                talk.become(read_personality(about, "/persona"))
            show(talk.personality)
        else:
            print(HELP.format(end_command=end_command))
    except InputError as error:
        print(printable(str(error)))
    return False


def show(personality: list[str]) -> None:
    print("Personality:", *map(printable, personality or ["(none)"]), sep="\n  ")


def paint(text: str, colour: int, before_input: bool = False) -> str:
    """Colour text for the terminal, unless the user wants no colours (https://no-color.org).

    ``before_input``: add the marks that tell readline which characters are invisible.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    start, end = f"\x1b[1;{colour}m", "\x1b[0m"
    return f"\1{start}\2{text}\1{end}\2" if before_input else f"{start}{text}{end}"


def _line() -> str:
    """Return the next line of standard input; of a line that is too long, only the beginning."""
    if sys.stdin.isatty():
        return input(paint("you: ", 32, before_input=True) if sys.stdout.isatty() else ">>> ")
    text = piece = sys.stdin.readline(LONGEST_SENTENCE + 2)
    if not text:
        raise EOFError
    while piece and not piece.endswith("\n"):
        piece = sys.stdin.readline(LONGEST_SENTENCE)
    return text.removesuffix("\n")


def choose_personality(args: Namespace, model: DoubleHeadsModel, tokenizer: Tokenizer) -> list[str]:
    """Return the sentences of ``--personality``, or by default of a random dialog; none if the model uses none."""
    if args.personality is None and model.no_persona:
        return []
    if args.personality is None:
        table = open_dataset(args, tokenizer)
        split, dialog = random.choice([(split, dialog) for split in table.values() for dialog in range(len(split))])
        return split.texts("persona", dialog)
    return read_personality(args.personality, "--personality")


def read_personality(text: str, name: str) -> list[str]:
    """Return the sentences in ``text``, or in the file that it names.

    Raises `InputError`; the message begins with ``name``, the flag or command that gave the text.
    """
    one_word = text and not any(map(str.isspace, text))
    if one_word and ("/" in text or Path(text).suffix) or os.path.isfile(text):  # the name of a file
        source = name
        try:
            name, text = f"{source} {text}", "".join(read_pieces(text, largest=LARGEST_PERSONALITY))
        except InputError as error:
            cure = "save the file as UTF-8" if "UTF-8" in str(error) else \
                "name a file with a sentence per line, or write the sentences themselves"
            raise InputError(f"{source} {str(error).partition(';')[0]}; {cure}") from None
        if "\0" in text:
            raise InputError(f"{name}: contains zero bytes, so it may be UTF-16; save the file as UTF-8")
    return read_persona(text, name)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add_family_flag(parser)
    parser.add_argument("--personality", metavar="TEXT_OR_FILE",
                        help="the bot's persona: one sentence per line, or JSON (a list of sentences, or an entry); "
                             "\"\" for no persona (default: a random persona of the data that the run was trained on; "
                             "none for a model trained without personas)")
    parser.add_argument("--end_command", default="Abort!", help="line that ends the chat (default: %(default)s)")
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
        show(personality)
        if sys.stdin.isatty():
            import readline  # noqa: F401  arrow keys and history in input()

            print(f"Ready. Say something; /help lists the commands, {args.end_command} or Ctrl-D ends the chat.")
        chat(model, tokenizer, personality, Decoding.of(args), args.end_command)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
