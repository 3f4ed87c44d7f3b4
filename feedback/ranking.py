"""Rank models by which of two dialogs people, or a judge, prefer.

    python -m feedback.ranking --pairs talk-pairs.jsonl --talks a.jsonl b.jsonl c.jsonl
    python -m feedback.annotate --pairs talk-pairs.jsonl --answers answers.jsonl --web
    python -m feedback.ranking --pairs talk-pairs.jsonl --answers answers.jsonl

The first command pairs dialogs of `feedback.selfplay` in which different models talk as the same people. Annotators see
both dialogs side by side, without the models' names, and choose the speaker that they would rather talk to (ACUTE-Eval,
Li et al. 2019). The last command prints each model's strength in the Bradley-Terry model. ``--judge`` asks a scorer of
`feedback.judge` instead of people.
"""

import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from itertools import combinations, cycle
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from cli import InputError, command, positive_number, whole_number
from decoding import load_checkpoint
from feedback.answers import read_answers
from feedback.judge import DataSet, combination, embedding_scores, head_scores, text_scores
from feedback.pairs import append_json_lines, pair_name, read_json_lines, read_pairs, report_left_out
from feedback.ratings import Rated, read_ratings
from files import replacing
from model import HALF
from utils import add_device_flag

QUESTION = "Which speaker marked = would you rather talk to?"
SCORERS = ("gain", "likelihood", "whole gain", "choice head")
logger = logging.getLogger("feedback.ranking")


# ------------------------------------------------------------------------------------------------ pairs of dialogs


def is_talk(record: dict | None) -> bool:
    """Return whether a JSON object is a dialog of `feedback.selfplay`, with the speaker's replies that are compared."""

    def texts(value: object, least: int) -> bool:
        return isinstance(value, list) and len(value) >= least and all(isinstance(one, str) for one in value)

    return (record is not None and texts(record.get("turns"), 2) and texts(record.get("models"), 2)
            and isinstance(record.get("personas"), list) and len(record["personas"]) == 2
            and all(texts(persona, 0) for persona in record["personas"]))


def read_talks(paths: Iterable[str | Path]) -> list[dict]:
    """Read dialogs. Other lines are skipped with a warning. Raises `InputError` if a file has no dialog."""
    talks = []
    for path in map(Path, paths):
        found, wrong = [], []
        for number, record in read_json_lines(path):
            found += [record] * is_talk(record)
            wrong += [number] * (not is_talk(record))
        report_left_out(path, {"that are no dialogs of feedback.selfplay": wrong} if wrong else {})
        if not found:
            raise InputError(f"{path}: holds no dialog of two models; write one with python -m feedback.selfplay")
        talks += found
    return talks


def talk_pairs(talks: Iterable[dict]) -> list[dict]:
    """Return all pairs of dialogs in which different models reply to the same opening, with the same two personas.

    The model that is compared is the one that answers the opening. A pair has the format of `feedback.collect`, in
    which a whole dialog after the opening takes the place of a reply. It also has ``models``, the models' names in the
    order of the replies.
    """
    situations: dict[str, dict[str, list[str]]] = {}
    for talk in talks:  # a model's first dialog counts
        situation = json.dumps([talk["personas"], talk["turns"][0]])
        situations.setdefault(situation, {}).setdefault(talk["models"][1], talk["turns"][1:])
    pairs = []
    for number, (situation, said) in enumerate(situations.items()):
        (_, persona), opening = json.loads(situation)
        for two in combinations(said, 2):
            if said[two[0]] == said[two[1]]:
                continue
            replies = [{"text": "\n".join(map("{} {}".format, cycle("=–"), said[model])), "turns": said[model],
                        "ids": [], "ended": True} for model in two]
            pair = {"model": "talks", "data": "talks", "split": "valid", "dialog": number, "turn": 0, "ask": QUESTION,
                    "persona": persona, "history": [opening], "replies": replies, "models": list(two)}
            pairs.append({"pair": pair_name(pair)} | pair)
    return pairs


# --------------------------------------------------------------------------------------------------------- judging


class Judge:
    """A scorer of whole dialogs: the mean score of the replies of the speaker who answers the opening.

    Without files of ratings the score is one of `SCORERS`, under the model. With files of ratings it is the learnt
    combination of `feedback.judge`, learnt from all of them. Its columns are the utterance metrics, the similarities of
    sentence embeddings and, if a model is given, the scores of the model's heads.
    """

    def __init__(self, checkpoint: str, scorer: str, ratings: Sequence[str], device: str, fp16: str):
        self.model, self.tokenizer = load_checkpoint(checkpoint, device) if checkpoint else (None, None)
        self.scorer, self.fp16, self.learnt = scorer, fp16, None
        self.name = f"{scorer} under {checkpoint}"
        if ratings:
            sets = [DataSet(path, rated, self.columns(rated)) for path in ratings for rated in [read_ratings(path)]]
            self.learnt = combination().fit(np.concatenate([one.matrix for one in sets]),
                                            np.concatenate([one.wanted for one in sets]))
            self.name = (f"the combination learnt from {', '.join(one.name for one in sets)}"
                         + f", with the heads of {checkpoint}" * bool(checkpoint))

    def columns(self, rated: Sequence[Rated], texts: bool = True) -> dict[str, np.ndarray]:
        heads = head_scores(rated, self.model, self.tokenizer, self.fp16) if self.model else {}
        return heads | (text_scores(rated) | embedding_scores(rated) if texts else {})

    def __call__(self, talks: Sequence[tuple[list[str], list[str]]]) -> list[float]:
        """Score dialogs: the persona of the speaker who answers, and all utterances from the opening on."""
        span = 2 * self.model.max_history + 1 if self.model else 5
        rated = [[Rated(persona, said[max(0, place - span):place], said[place], {})
                  for place in range(1, len(said), 2)] for persona, said in talks]
        replies = [one for of_talk in rated for one in of_talk]
        columns = self.columns(replies, texts=self.learnt is not None)
        scores = self.learnt.predict(np.stack([*columns.values()], 1)) if self.learnt else columns[self.scorer]
        return [float(one.mean()) for one in np.split(scores, np.cumsum([len(of_talk) for of_talk in rated])[:-1])]


def judged(pairs: dict[str, dict], judge: Judge) -> dict[tuple[str, str], dict]:
    """Return the judge's answers, in the form of `read_answers`: the dialog with the higher score is preferred."""
    talks = {(name, side): (pair["persona"], [*pair["history"], *pair["replies"][side]["turns"]])
             for name, pair in pairs.items() for side in (0, 1)}
    distinct = {json.dumps(talk): talk for talk in talks.values()}
    scores = dict(zip(distinct, judge(list(distinct.values())), strict=True))
    of = {key: scores[json.dumps(talk)] for key, talk in talks.items()}
    return {(judge.name, name): {"choice": "tie" if of[name, 0] == of[name, 1] else int(of[name, 1] > of[name, 0])}
            for name in pairs}


# --------------------------------------------------------------------------------------------------------- ranking


def count_wins(pairs: dict[str, dict], answers: dict[tuple[str, str], dict], models: Sequence[str]) -> np.ndarray:
    """Count preferences, (situations, models, models): in each situation, how often the first model was preferred.

    Dialogs with the same opening and personas share a situation. A tie, or two bad dialogs, is half a win for each.
    """
    numbers: dict[int, int] = {}
    for (_, name) in answers:
        numbers.setdefault(pairs[name]["dialog"], len(numbers))
    wins = np.zeros((len(numbers), len(models), len(models)))
    for (_, name), answer in answers.items():
        pair, choice = pairs[name], answer["choice"]
        one, other = (models.index(model) for model in pair["models"])
        share = 1.0 - choice if choice in (0, 1) and not isinstance(choice, str) else 0.5  # of the first
        wins[numbers[pair["dialog"]], [one, other], [other, one]] += share, 1 - share
    return wins


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Return the strengths of models, (models,), that make their wins likeliest (Bradley and Terry 1952).

    ``wins`` (models, models): how often the first model was preferred to the second. Strengths are log-odds with mean
    0: the first of two models is preferred with probability 1 / (1 + exp(second - first)). Each two models count as
    having met once more, with half a win for each, so that a model that always wins has a finite strength.
    """
    wins = wins + 0.5 * (1 - np.eye(len(wins)))

    def loss(strength: np.ndarray) -> tuple[float, np.ndarray]:
        behind = strength[None] - strength[:, None]
        surprise = wins * expit(behind)
        return float((wins * np.logaddexp(0, behind)).sum()), surprise.sum(0) - surprise.sum(1)

    found = minimize(loss, np.zeros(len(wins)), jac=True, method="BFGS", options={"gtol": 1e-6 * wins.sum()}).x
    return found - found.mean()


def rank(wins: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the strengths, (models,), and their 95 % intervals, (2, models), by a bootstrap over situations."""
    number = len(wins)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    strengths = [bradley_terry(sample) for sample in np.tensordot(drawn, wins, 1)]
    return bradley_terry(wins.sum(0)), np.quantile(strengths, [0.025, 0.975], axis=0)


# ----------------------------------------------------------------------------------------------- the command line


def write_pairs(args: Namespace) -> int:
    """Write ``--pairs`` and return the number of pairs."""
    pairs, path = talk_pairs(read_talks(args.talks)), Path(args.pairs)
    if not pairs:
        raise InputError(f"--talks {args.talks[0]}: no two models reply differently to the same opening with the same "
                         "personas; write dialogs of several models with the same --seed and data")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        append_json_lines(unfinished, pairs)
    names = dict.fromkeys(name for pair in pairs for name in pair["models"])
    print(f"{path}: {len(pairs):,} pairs of dialogs of {len(names)} models; next, python -m feedback.annotate --pairs "
          f"{path} --web")
    return len(pairs)


def print_ranking(args: Namespace) -> dict[str, tuple[float, float, float]]:
    """Print and return each model's strength and its interval (strength, low, high), the strongest first."""
    pairs = {name: pair for name, pair in read_pairs(args.pairs).items() if "models" in pair}
    if not pairs:
        raise InputError(f"--pairs {args.pairs}: holds pairs of replies, not of dialogs; write it with --talks")
    judge = None if args.answers else Judge(args.judge, args.scorer, args.ratings, args.device, args.fp16)
    answers = judged(pairs, judge) if judge else read_answers(args.answers, pairs)
    if not answers:
        raise InputError(f"--answers {args.answers[0]}: holds no answer about these pairs; ask people with "
                         f"python -m feedback.annotate --pairs {args.pairs}")
    models = list(dict.fromkeys(name for _, pair in answers for name in pairs[pair]["models"]))
    wins = count_wins(pairs, answers, models)
    strengths, bounds = rank(wins, args.resamples, args.seed)
    people = ", ".join(dict.fromkeys(person for person, _ in answers))
    print(f"{len(answers):,} comparisons of {len(models)} models in {len(wins):,} situations, by {people}")
    print(f"{'model':32}  strength  95 % interval      preferred")
    total, found = wins.sum(0), dict[str, tuple[float, float, float]]()
    for place in np.argsort(-strengths).tolist():
        found[models[place]] = float(strengths[place]), float(bounds[0, place]), float(bounds[1, place])
        print(f"{models[place]:32}  {strengths[place]:8.2f}  {bounds[0, place]:6.2f} to {bounds[1, place]:6.2f}   "
              f"{total[place].sum():g} of {total[place].sum() + total[:, place].sum():g}")
    return found


def parse_args(arguments: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(prog="python -m feedback.ranking", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", default="talk-pairs.jsonl", metavar="FILE",
        help="file of pairs of dialogs, for feedback.annotate (default: %(default)s)")
    add("--talks", nargs="+", default=[], metavar="FILE", help="dialogs of feedback.selfplay to write --pairs from")
    add("--answers", nargs="+", default=[], metavar="FILE", help="rank by the answers in these files")
    add("--judge", default="", metavar="CHECKPOINT", help="rank by the scores of this model; take a model that is not "
        "compared itself")
    add("--scorer", default=SCORERS[0], choices=SCORERS, help="score of --judge, as in feedback.judge "
        "(default: %(default)s)")
    add("--ratings", nargs="+", default=[], metavar="FILE", help="people's ratings of replies, to rank by a "
        "combination of scores that is learnt from them, as in feedback.judge; it needs no --judge")
    add("--resamples", type=positive_number, default=1000, metavar="N",
        help="number of bootstrap samples for the intervals (default: %(default)s)")
    add("--fp16", default="", choices=["", "O0", *HALF], help="half precision, as in train.py (default: none)")
    add_device_flag(add)
    add("--seed", type=whole_number, default=42, help="seed of the bootstrap (default: %(default)s)")
    args = parser.parse_args(arguments)
    if sum(map(bool, (args.talks, args.answers, args.judge or args.ratings))) != 1:
        raise InputError("give --talks to write pairs, or --answers, or --judge or --ratings to rank the models")
    return args


def main(arguments: Sequence[str] | None = None) -> int | dict:
    args = parse_args(arguments)
    return write_pairs(args) if args.talks else print_ranking(args)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(lambda: main() and None)
