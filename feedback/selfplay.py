"""Let two models, or a model and itself, talk to each other, and describe how each of them talks.

    python -m feedback.selfplay --model_checkpoint RUN --other RUN --dataset_path DATA.json --talks talks.jsonl

Both speakers get personas of the validation split. The dialogs are written in the data format, so that every script can
read them, and `feedback.ranking` compares them.
"""

import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cli import InputError, command, positive_number
from corpora import require_split
from decoding import Decoding, add_decoding_flags, load_checkpoint
from embeddings import embed
from feedback.utterance_metrics import asks_question
from files import write_text
from metrics import interval, split_words, variety
from outputs import reply_to
from pretrained import published_or_persona
from tables import Split
from utils import add_common_flags, open_dataset
from words import separate_letters

OPENING = "hi !"
logger = logging.getLogger("feedback.selfplay")


# -------------------------------------------------------------------------------------------------------- talking


class Player:
    """A model that takes part in dialogs."""

    def __init__(self, checkpoint: str, args: Namespace):
        self.model, self.tokenizer = load_checkpoint(checkpoint, args.device, args.max_len, args.fp16, args.max_history)

    def reply(self, situations: Sequence[tuple[list[str], list[str]]], decoding: Decoding) -> list[str]:
        """Reply in each situation, as `outputs.reply_to` does, but never with an empty text."""
        replies = reply_to(self.model, self.tokenizer, situations, decoding)
        return [reply or "..." for reply in replies]  # readers drop empty utterances


def draw_personas(split: Split, dialogs: int, seed: int) -> list[list[list[str]]]:
    """Draw two personas per dialog; a persona is used again only after all others.

    A larger number of ``dialogs`` begins with the same dialogs.
    """
    draw = np.random.default_rng(seed)
    rounds = -(-2 * dialogs // len(split))
    order = np.concatenate([draw.permutation(len(split)) for _ in range(rounds)])[:2 * dialogs].reshape(-1, 2)
    return [[split.texts("persona", entry) for entry in two] for two in order.tolist()]


def play(players: dict[str, Player], roles: Sequence[tuple[str, str]], personas: Sequence[list[list[str]]],
         decoding: Decoding, turns: int, opening: str, batch_size: int) -> list[dict]:
    """Let the models talk, all dialogs at the same time, and return the dialogs.

    ``roles``: per dialog, the names in ``players`` of the model that opens and of the model that answers; ``personas``:
    their personas, in this order. Everybody opens with ``opening``, as in Adiwardana et al. (2020), because the opening
    of a dialog is not learnt. Then each of the two says ``turns`` utterances. A dialog has the fields ``personas`` and
    ``turns`` of the data format, and ``models``.
    """
    torch.manual_seed(decoding.seed)
    dialogs: list[dict] = [{"personas": two, "turns": [opening], "models": list(models)}
                           for two, models in zip(personas, roles, strict=True)]
    for place in tqdm(range(1, 2 * turns + 1), desc="Talking", unit=" utterances", delay=1):
        side = place % 2
        for name, player in players.items():
            speaking = [dialog for dialog in dialogs if dialog["models"][side] == name]
            for start in range(0, len(speaking), batch_size):
                batch = speaking[start:start + batch_size]
                replies = player.reply([(dialog["personas"][side], dialog["turns"]) for dialog in batch], decoding)
                for dialog, reply in zip(batch, replies, strict=True):
                    dialog["turns"].append(reply)
    return dialogs


# ---------------------------------------------------------------------------------------------------- description


class Said(NamedTuple):
    """A reply of a model, and the texts that it is compared with."""

    dialog: int
    turn: int  # number among the speaker's replies, from 0
    text: str
    earlier: list[str]  # the speaker's earlier replies
    own: list[str]  # the speaker's persona
    other: list[str]  # the other speaker's persona


def replies_of(dialogs: Sequence[dict], model: str) -> Iterator[Said]:
    """Yield the replies of a model; the opening of a dialog is not one of them."""
    for number, dialog in enumerate(dialogs):
        for side in (0, 1):
            if dialog["models"][side] == model:
                said, personas = dialog["turns"][1:][1 - side::2], dialog["personas"]
                for turn, text in enumerate(said):
                    yield Said(number, turn, text, said[:turn], personas[side], personas[1 - side])


def word_pairs(text: str) -> list[tuple[str, str]]:
    words = split_words(separate_letters(text.lower()))
    return list(zip(words, words[1:], strict=False))


def persona_margins(replies: Sequence[Said]) -> np.ndarray:
    """Compute how much nearer each reply is to its speaker's persona than to the other's: (replies,).

    A persona is as near as its nearest sentence, by the cosine of sentence embeddings. NaN if one of the two has no
    persona. Raises `InputError` if the embeddings are not installed.
    """
    vectors = embed([text for one in replies for text in (one.text, *one.own, *one.other)])

    def nearest(one: Said, persona: list[str]) -> float:
        return max((float(vectors[one.text] @ vectors[sentence]) for sentence in persona), default=np.nan)

    return np.array([nearest(one, one.own) - nearest(one, one.other) for one in replies])


def describe(dialogs: Sequence[dict], model: str) -> dict[str, tuple[float, ...]]:
    """Describe a model's replies: figures by name, most of them with a 95 % interval (value, low, high).

    - ``Words per reply``, ``Distinct-1``, ``Distinct-2``, ``Stutters``: see `metrics.variety`
    - ``Questions``: the share of replies that ask a question, in English
    - ``Repeated within a turn``, ``Repeated from earlier turns``: the share of pairs of adjacent words that occurred
      before in the same reply, or in an earlier reply of the same speaker (See et al. 2019)
    - ``Own persona``: the share of replies that are nearer to the speaker's own persona than to the other speaker's
      (`persona_margins`). Chance is 0.5. ``Own persona, turn 1`` and so on: the same by turn.

    Intervals come from a bootstrap over dialogs.
    """
    replies = list(replies_of(dialogs, model))
    groups = np.array([one.dialog for one in replies])
    pairs = [word_pairs(one.text) for one in replies]
    earlier = [{pair for text in one.earlier for pair in word_pairs(text)} for one in replies]
    ones, total = np.ones(len(replies)), np.array([len(of_reply) for of_reply in pairs], float)
    ratios = {
        "Words per reply": ([len(split_words(separate_letters(one.text))) for one in replies], ones),
        "Questions": ([asks_question(one.text) for one in replies], ones),
        "Repeated within a turn": (total - [len(set(of_reply)) for of_reply in pairs], total),
        "Repeated from earlier turns": ([sum(pair in before for pair in of_reply) for of_reply, before in
                                         zip(pairs, earlier, strict=True)], total)}
    try:
        margins = persona_margins(replies)
        nearer, known = np.where(margins == 0, 0.5, margins > 0), np.isfinite(margins)
        ratios["Own persona"] = nearer * known, known
        turns = np.array([one.turn for one in replies])
        for turn in range(turns.max() + 1):
            ratios[f"Own persona, turn {turn + 1}"] = nearer * (known & (turns == turn)), known & (turns == turn)
    except InputError as error:
        logger.warning("Own persona is left out: %s", error)
    figures: dict[str, tuple[float, ...]] = {name: (value,) for name, value in
                                             variety([one.text for one in replies]).items()}
    for name, (values, weights) in ratios.items():
        values, weights = np.asarray(values, float), np.asarray(weights, float)
        if weights.sum():
            figures[name] = values.sum() / weights.sum(), *interval(values, weights, groups)
    return figures


# ----------------------------------------------------------------------------------------------- the command line


def selfplay(args: Namespace) -> dict[str, dict[str, tuple[float, ...]]]:
    """Write the dialogs, and print and return the description of each model, by its name.

    Two models talk twice about the same personas, with exchanged roles.
    """
    args.model_checkpoint = published_or_persona(args.model_checkpoint)
    names = list(dict.fromkeys([args.model_checkpoint, args.other or args.model_checkpoint]))
    players = {name: Player(name, args) for name in names}
    split = require_split(open_dataset(args, players[names[0]].tokenizer), "valid", args.dataset or args.dataset_path)
    personas = draw_personas(split, args.dialogs, args.seed)
    roles = list(dict.fromkeys([(names[-1], names[0]), (names[0], names[-1])]))
    dialogs = play(players, roles * len(personas), [two for two in personas for _ in roles], Decoding.of(args),
                   args.turns, args.opening, args.batch_size)
    try:
        write_text(Path(args.talks), "".join(json.dumps(dialog | {"seed": args.seed}, ensure_ascii=False) + "\n"
                                             for dialog in dialogs))
    except OSError as error:
        raise InputError(f"--talks {args.talks}: cannot be written ({error.strerror}); name a file in a folder that "
                         "exists and that you may write to") from None
    found = {}
    for name in names:
        found[name] = describe(dialogs, name)
        print(f"\n{name}: {sum(1 for _ in replies_of(dialogs, name)):,} replies in {len(dialogs):,} dialogs")
        for figure, (value, *bounds) in found[name].items():
            print(f"  {figure:28} {value:8.3f}" + (f"  {bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""))
    return found


def parse_args(arguments: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(prog="python -m feedback.selfplay", description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add = parser.add_argument_group("dialogs").add_argument
    add("--other", default="", metavar="CHECKPOINT", help="the model that it talks to (default: itself)")
    add("--dialogs", type=positive_number, default=50, metavar="N",
        help="number of dialogs; two different models hold each of them twice, with exchanged roles "
             "(default: %(default)s)")
    add("--turns", type=positive_number, default=6, metavar="N",
        help="utterances of each speaker per dialog, besides the opening (default: %(default)s)")
    add("--opening", default=OPENING, metavar="TEXT", help="the first utterance of every dialog (default: %(default)s)")
    add("--talks", default="talks.jsonl", metavar="FILE", help="file to write the dialogs to (default: %(default)s)")
    add("--batch_size", type=positive_number, default=32, help="dialogs to advance at once (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not args.opening.strip():
        raise InputError("--opening: is empty, and a model replies to something; give a greeting")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(lambda: selfplay(parse_args()) and None)
