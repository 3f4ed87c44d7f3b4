"""Print how well a reward model of people and its policies do, from the runs of recipes/people.sh.

    PYTHONPATH=. python benchmarks/people.py WORK HUMAN PERSONA_CHAT.json

The first table has the accuracy of the reward model, and of other scorers, on pairs of contexts that the reward model
has not learnt from. The second compares the policies' replies with those of the default bot, to the same contexts of
PERSONA-CHAT's validation split, by the reward model and by judges that have learnt nothing from these ratings.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from scipy import stats

from decoding import Decoding, generate_replies, load_checkpoint, readable
from dialogs import clean
from feedback.judge import combination, head_scores, reward_model_scores
from feedback.pairs import held_out, whole_dialog
from feedback.preferences import read_preferences
from feedback.ranking import Judge
from feedback.ratings import Rated, overall, read_ratings
from feedback.reward import RewardModel, raw_scores
from inputs import Specials, TurnDataset, build_context
from metrics import interval
from tables import Split
from utils import get_dataset

SETS = ("persona_zhao", "dailydialog_zhao", "usr_personachat", "convai2_grade")  # the reward model learns from these
OTHERS = ("dailydialog_grade", "convai2_wild")  # a judge learns from these
POLICIES = {algorithm: [f"{algorithm}_{seed}" for seed in (1, 2, 3)] for algorithm in ("rloo", "dpo", "dpo_own")}
FP16 = "bf16"
CONTEXTS, SEED = 192, 42


class Judges:
    """The scorers that learn nothing from the ratings in ``SETS``."""

    def __init__(self, human: Path):
        self.model, self.tokenizer = load_checkpoint("smollm2")
        self.learnt = Judge("", "", [str(human / f"{name}.jsonl") for name in OTHERS], "cpu", FP16)

    def __call__(self, rated: Sequence[Rated]) -> dict[str, np.ndarray]:
        columns = np.stack([*self.learnt.columns(rated).values()], 1)
        return {"gain under smollm2": head_scores(rated, self.model, self.tokenizer, FP16)["gain"],
                "combination learnt from other ratings": self.learnt.learnt.predict(columns)}


# --------------------------------------------------------------------------------------------------- the reward model


def key(persona: Sequence[str], history: Sequence[str]) -> tuple:
    return tuple(map(clean, persona)), tuple(map(clean, history))


def accuracies(work: Path, human: Path, reward: RewardModel, judges: Judges) -> None:
    """Print the first table. A tie counts as half right; intervals come from a bootstrap over contexts."""
    pairs, better, _ = read_preferences(work / "pairs.jsonl", [])
    apart = held_out(pairs.values(), 0.15, 42)  # as in feedback.reward
    tests = [(pair, best) for pair, best in better if pair["pair"] in apart]
    names = {name: read_preferences(work / f"{name}.jsonl", []).pairs for name in SETS}
    kept = {
        (*key(record["persona"], record["history"]), clean(record["reply"])): record["scores"]
        for record in map(json.loads, (work / "scores.jsonl").read_text().splitlines())}

    def columns(persona, history, reply) -> list[float]:
        return [value for name, value in kept[(*key(persona, history), clean(reply))].items()
                if name != "learnt combination"]

    scorers = [name for name in next(iter(kept.values())) if name != "learnt combination"]
    tested = {key(pair["persona"], pair["history"]) for pair, _ in tests}
    taught, wanted = [], []
    for name in SETS:
        rated = [one for one in read_ratings(human / f"{name}.jsonl") if key(*one.context) not in tested]
        taught += [columns(*one.context, one.reply) for one in rated]
        wanted += stats.zscore([overall(one) for one in rated]).tolist()
    learnt = combination().fit(np.array(taught), wanted)

    rated = list(dict.fromkeys((tuple(pair["persona"]), tuple(pair["history"]), reply["text"])
                               for pair, _ in tests for reply in pair["replies"]))
    replies = [Rated(list(persona), list(history), reply, {}) for persona, history, reply in rated]
    matrix = np.array([columns(*one) for one in rated])
    scores = {"reward model": reward_model_scores(replies, reward)["reward model"],
              "combination learnt from the same ratings": learnt.predict(matrix)} | judges(replies) | dict(
        zip(scorers, matrix.T, strict=True))
    place = {one: number for number, one in enumerate(rated)}
    two = np.array([[place[tuple(pair["persona"]), tuple(pair["history"]), pair["replies"][number]["text"]]
                     for number in (1 - best, best)] for pair, best in tests])
    contexts = np.unique([str((pair["persona"], pair["history"])) for pair, _ in tests], return_inverse=True)[1]
    parts = {"all": np.ones(len(tests), bool)} | {
        name: np.array([pair["pair"] in of for pair, _ in tests]) for name, of in names.items()}
    print("| scorer | " + " | ".join(f"{name}, {part.sum()} pairs of {len(set(contexts[part]))} contexts"
                                     for name, part in parts.items()) + " | the reward model is better by |\n|"
          + "---|" * (2 + len(parts)))
    right = {name: (np.diff(column[two])[:, 0] > 0) + 0.5 * (np.diff(column[two])[:, 0] == 0)
             for name, column in scores.items()}
    for name, of in right.items():
        cells = []
        for values, part in [*((of, part) for part in parts.values()), (right["reward model"] - of, parts["all"])]:
            low, high = interval(values[part], np.ones(part.sum()), contexts[part])
            cells.append(f"{values[part].mean():.3f} ({low:.3f} to {high:.3f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


# -------------------------------------------------------------------------------------------------------- the policies


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def fresh_turns(split: Split, human: Path) -> list[int]:
    """Draw turns of dialogs of which no rated context has two utterances that follow each other."""
    rated = {tuple(map(letters, one.history[-2:])) for name in SETS for one in read_ratings(human / f"{name}.jsonl")}

    def is_fresh(dialog: int) -> bool:
        said = list(map(letters, whole_dialog(split, dialog)))
        return not rated.intersection(zip(said, said[1:], strict=False))

    fresh = np.array([is_fresh(dialog) for dialog in range(len(split))])
    turns = np.flatnonzero(fresh[split.turn_dialog])
    print(f"\n{fresh.sum():,} of {len(split):,} validation dialogs have no rated context")
    return np.random.default_rng(SEED).permutation(turns)[:CONTEXTS].tolist()


def replies_of(checkpoint: str, path: Path, data: Path, cache: Path, human: Path) -> list[Rated]:
    """Decode a reply to each of the turns, as in the chat, and keep them in a file."""
    if not path.exists():
        model, tokenizer = load_checkpoint(checkpoint, fp16=FP16)
        split, special = get_dataset(tokenizer, str(data), str(cache))["valid"], Specials.of(tokenizer)
        dataset = TurnDataset.for_model(model, split, tokenizer)
        torch.manual_seed(SEED)
        turns, said = fresh_turns(split, human), []
        for start in range(0, len(turns), 32):
            contexts = [build_context(*dataset.context(turn), special, model.history_start)
                        for turn in turns[start:start + 32]]
            said += generate_replies(model, contexts, special, Decoding())
        path.write_text(json.dumps([
            [split.texts("persona", split.turn_dialog[turn]), split.texts("history", turn), readable(tokenizer, reply)]
            for turn, reply in zip(turns, said, strict=True)]))
    return [Rated(*one, {}) for one in json.loads(path.read_text())]


def compare(first: np.ndarray, second: np.ndarray) -> str:
    """Return the mean of ``second - first``, its interval, and how often the second is preferred: (seeds, contexts)."""
    difference, contexts = (second - first) / first.std(), np.tile(np.arange(second.shape[1]), len(second))
    low, high = interval(difference.ravel(), np.ones(difference.size), contexts)
    preferred = (difference > 0) + 0.5 * (difference == 0)
    return f"{difference.mean():+.2f} ({low:+.2f} to {high:+.2f}), {preferred.mean():.2f}"


def policies(work: Path, human: Path, data: Path, reward: RewardModel, judges: Judges) -> None:
    """Print the second table. Differences are in standard deviations of the default bot's scores."""
    checkpoints = {"persona": "persona"} | {name: str(work / name) for names in POLICIES.values() for name in names}
    said = {name: replies_of(checkpoint, work / f"{name}.json", data, work / "cache", human)
            for name, checkpoint in checkpoints.items()}
    rated = [one for replies in said.values() for one in replies]
    default_bot = load_checkpoint("persona")
    scores = {"reward model": reward_model_scores(rated, reward)["reward model"]} | judges(rated) | {
        "choice head of the default bot": reward_model_scores(
            rated, lambda turns: raw_scores(*default_bot, turns, FP16, 8))["reward model"]}
    scores = {name: column.reshape(len(said), -1) for name, column in scores.items()}
    place = {name: number for number, name in enumerate(said)}
    print(f"\n| policy | {' | '.join(scores)} | words per reply | KL, nats per reply |\n|" + "---|" * (3 + len(scores)))
    for algorithm, names in POLICIES.items():
        for row in [*([name] for name in names), names]:
            last = [json.loads((work / name / "evaluations.jsonl").read_text().splitlines()[-1]) for name in row]
            words = fmean(len(one.reply.split()) for name in row for one in said[name])
            print(f"| {row[0] if len(row) == 1 else f'{algorithm}, all seeds'} | " + " | ".join(
                compare(column[:1], column[[place[name] for name in row]]) for column in scores.values())
                + f" | {words:.1f} | {fmean(one['kl'] for one in last):.2f} |")
    print(f"\nwords per reply of persona: {fmean(len(one.reply.split()) for one in said['persona']):.1f}")


def main() -> None:
    work, human, data = map(Path, sys.argv[1:])
    reward, judges = RewardModel(str(work / "reward"), fp16=FP16), Judges(human)
    accuracies(work, human, reward, judges)
    policies(work, human, data, reward, judges)


if __name__ == "__main__":
    main()
