"""Read people's ratings of replies, and make preference pairs from them.

    python -m feedback.ratings --data persona_zhao.jsonl dailydialog_zhao.jsonl --margin 1 --pairs people.jsonl

Each line of a file has a ``history``, a ``reply``, optionally the bot's ``persona`` or a ``fact`` to use, and either
``rating`` or ``ratings`` (one per quality). A rating is a number or a list with a number per rater. A line with
``turns`` is a whole chat (`read_chats`), in which each reply may have a score.
"""

import logging
import os
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from cli import InputError, command, positive_real
from dialogs import Utterance, merge_utterances
from feedback.pairs import append_json_lines, read_json_lines, report_left_out

LARGEST_RATING = 1e9  # sums of larger squares would round differences away
OVERALL = ("overall", "rating", "score")  # names of the overall quality; the first that exists is used
logger = logging.getLogger("feedback.ratings")


class Rated(NamedTuple):
    """A reply, its context, and its ratings: for each quality, a number per rater."""

    persona: list[str]
    history: list[str]
    reply: str
    ratings: dict[str, list[float]]

    @property
    def context(self) -> tuple:
        return tuple(self.persona), tuple(self.history)


class Chat(NamedTuple):
    """A whole chat: the bot's persona, who said what, and the score that the person gave the chat."""

    persona: list[str]
    turns: list[Utterance]
    score: float


# ------------------------------------------------------------------------------------------------------- reading


def read_ratings(path: str | Path) -> list[Rated]:
    """Read the rated replies of a file, in its order; from whole chats, the replies with a score.

    Other lines are skipped with a warning. Raises `InputError` if the file cannot be read or has no rated reply.
    """
    path, rated, problems = Path(path), [], {}
    for number, record in read_json_lines(path):
        try:
            if record is None:
                raise ValueError("that are no JSON object")
            rated += _replies_of_chat(record) if "turns" in record else [_rated(record)]
        except ValueError as error:
            problems.setdefault(str(error), []).append(number)
    report_left_out(path, problems)
    if not rated:
        raise InputError(f"{path}: holds no rated reply; write lines of "
                         '{"history": ["…"], "reply": "…", "rating": 3}')
    return rated


def read_chats(path: str | Path) -> list[Chat]:
    """Read the whole chats of a file that have a score, such as those with the finalists of ConvAI2."""
    chats = []
    for _, record in read_json_lines(Path(path)):
        if record and "turns" in record and _is_number(record.get("score")):
            chats.append(Chat(_sentences(record, "bot_persona"), [
                Utterance(turn["who"], turn["text"]) for turn in _turns(record)], float(record["score"])))
    return chats


def _rated(record: dict) -> Rated:
    """Convert a record to a rated reply. Raises ``ValueError`` with the reason if this is impossible."""
    if not isinstance(record.get("reply"), str) or not record["reply"].strip():
        raise ValueError("without a reply")
    fact = record.get("fact")
    persona = _sentences(record, "persona") + [fact] * (isinstance(fact, str) and bool(fact.strip()))
    ratings = record.get("ratings", record.get("rating"))
    qualities = ratings if isinstance(ratings, dict) else {"rating": ratings}
    ratings = {str(quality): [float(one) for one in (value if isinstance(value, list) else [value]) if _is_number(one)]
               for quality, value in qualities.items()}
    if not any(ratings.values()):
        raise ValueError("without a rating that is a number")
    return Rated(persona, _sentences(record, "history"), record["reply"],
                 {quality: values for quality, values in ratings.items() if values})


def _replies_of_chat(record: dict) -> Iterator[Rated]:
    turns, persona = _turns(record), _sentences(record, "bot_persona")
    for place, turn in enumerate(turns):
        if turn["who"] == "bot" and _is_number(turn.get("score")) and turn["text"].strip():
            before = merge_utterances(Utterance(one["who"], one["text"]) for one in turns[:place])
            yield Rated(persona, [one.text for one in before], turn["text"], {"score": [float(turn["score"])]})


def _turns(record: dict) -> list[dict]:
    turns = record["turns"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and isinstance(turn.get("text"), str)
                                              and isinstance(turn.get("who"), str) for turn in turns):
        raise ValueError("whose turns have no speakers")
    return turns


def _sentences(record: dict, field: str) -> list[str]:
    value = record.get(field) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"whose {field} is not a list of texts")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_RATING


# ---------------------------------------------------------------------------------------------------------- pairs


def overall(rated: Rated) -> float | None:
    """Return the mean rating of the overall quality (`OVERALL`); None if there is no such quality."""
    names = {quality.lower(): quality for quality in rated.ratings}
    quality = next((names[name] for name in OVERALL if name in names), None)
    return fmean(rated.ratings[quality]) if quality else None


def rated_pairs(rated: Iterable[Rated], margin: float) -> Iterator[tuple[Rated, Rated]]:
    """Yield pairs (worse, better) of replies to the same context, with ratings that differ by ``margin`` or more."""
    contexts: dict[tuple, list[Rated]] = defaultdict(list)
    for one in rated:
        if overall(one) is not None:
            contexts[one.context].append(one)
    for replies in contexts.values():
        for worse, better in combinations(sorted(replies, key=overall), 2):
            if overall(better) - overall(worse) >= margin and better.reply.split() != worse.reply.split():
                yield worse, better


def as_preference(worse: Rated, better: Rated) -> dict:
    """Convert a pair to the format of `feedback.preferences`: messages, with the persona as the system message."""
    back = len(better.history)
    prompt = [{"role": "user" if (back - place) % 2 else "assistant", "content": text}
              for place, text in enumerate(better.history)]
    system = [{"role": "system", "content": "\n".join(better.persona)}] * bool(better.persona)
    return {"prompt": system + prompt, "chosen": [{"role": "assistant", "content": better.reply}],
            "rejected": [{"role": "assistant", "content": worse.reply}],
            "score_chosen": overall(better), "score_rejected": overall(worse)}


def write_pairs(args: Namespace) -> int:
    """Write the file ``--pairs`` and return the number of pairs."""
    path, records = Path(args.pairs), []
    for data in args.data:
        rated = read_ratings(data)
        made = [as_preference(*pair) for pair in rated_pairs(rated, args.margin)]
        logger.info("%s: %s pairs of %s replies to %s contexts", data, f"{len(made):,}", f"{len(rated):,}",
                    f"{len({one.context for one in rated}):,}")
        records += made
    if not records:
        raise InputError(f"--margin {args.margin}: the ratings of no two replies to a context differ so much; lower it")
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    append_json_lines(unfinished, records)
    os.replace(unfinished, path)
    print(f"{path}: {len(records):,} pairs")
    return len(records)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m feedback.ratings", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="files of ratings, with a JSON line per reply")
    add("--margin", type=positive_real, default=1.0, metavar="M",
        help="smallest difference between the ratings of a pair (default: %(default)s)")
    add("--pairs", default="people.jsonl", metavar="FILE", help="file to write, for feedback.reward and dpo "
        "(default: %(default)s)")
    write_pairs(parser.parse_args(arguments))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(lambda: main())
