"""Score replies in their contexts, and measure how well each scorer agrees with people's ratings.

    python -m feedback.judge --data usr_personachat.jsonl persona_zhao.jsonl --model_checkpoint RUN

``--data`` are files of ratings (`feedback.ratings`). A scorer gives each reply a number; higher is better. Scorers are
the model's two heads, a reward model, utterance metrics, similarities of sentence embeddings, the length, and a learnt
combination of all of these, which is never tested on its own training data. For each data set and quality, a line per
scorer gives its correlation with people's mean rating.

Read from `judge` downwards.
"""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from cli import command, positive_number, whole_number
from decoding import load_checkpoint
from embeddings import embed
from feedback.actions import ReplyTokens, label_replies
from feedback.pairs import append_json_lines
from feedback.ratings import Rated, overall, read_ratings
from feedback.reward import RewardModel, pack_texts, scoring_batches
from feedback.utterance_metrics import METRICS, check_libraries, lowercase_words
from inputs import collate, max_reply
from model import HALF, DoubleHeadsModel, autocast
from tables import tokenize
from tokenization import Tokenizer
from utils import add_device_flag

LEARNT = "learnt combination"
PARTS = 5  # a single data set is cut into parts; each is scored by a combination learnt from the others
logger = logging.getLogger("feedback.judge")


# ------------------------------------------------------------------------------------------------------- scorers
# Each function takes rated replies and returns columns of scores by name, (replies,) float64; higher is better.


def group_by_context(rated: Sequence[Rated]) -> tuple[list[tuple], list[list[int]]]:
    """Group replies by context: return turns (persona, history, replies) and the places of replies in ``rated``."""
    places: dict[tuple, list[int]] = {}
    for place, one in enumerate(rated):
        places.setdefault(one.context, []).append(place)
    turns = [(list(persona), list(history), [rated[place].reply for place in group])
             for (persona, history), group in places.items()]
    return turns, list(places.values())


@torch.inference_mode()
def head_outputs(model: DoubleHeadsModel, tokenizer: Tokenizer, turns: Sequence[tuple], fp16: str = "",
                 batch_size: int = 8) -> list[list[tuple[np.ndarray, float]]]:
    """Return, for each reply of each turn, the log-probabilities of its tokens and end, and the choice head's score."""
    rows, ranges = [], []
    for persona, history, replies in tqdm(turns, desc="Packing", unit=" contexts", delay=1):
        row = pack_texts(persona, history, replies, tokenizer, model)
        longest = max_reply(model.max_positions, model.history_start)  # longer replies lose their end
        row, where = label_replies(row, [ReplyTokens(ids[:longest], True) for ids in tokenize(tokenizer, replies)])
        rows.append(row)
        ranges.append(where)
    found: list[list] = [[]] * len(rows)
    batches = scoring_batches([len(row.input_ids) for row in rows], batch_size)
    for places in tqdm(batches, desc="Judging", unit=" batches"):
        batch = {name: tensor.to(model.device)
                 for name, tensor in collate([rows[place] for place in places], tokenizer.pad_token_id).items()}
        with autocast(str(model.device), fp16):
            out = model(**batch)
        gold = batch["labels"][:, 1:][batch["labels"][:, 1:] >= 0]
        logprobs = -torch.nn.functional.cross_entropy(out.logits.float(), gold, reduction="none").double().cpu().numpy()
        for place, scores in zip(places.tolist(), out.mc_logits.tolist(), strict=True):
            found[place] = [(logprobs[where.start:where.stop], score)
                            for where, score in zip(ranges[place], scores, strict=False)]
            logprobs = logprobs[sum(label >= 0 for label in rows[place].labels):]
    return found


def head_scores(rated: Sequence[Rated], model: DoubleHeadsModel, tokenizer: Tokenizer,
                fp16: str = "") -> dict[str, np.ndarray]:
    """Score replies with the language-model head and the choice head.

    - ``likelihood``: mean log-probability of a reply's tokens and its end, in nats
    - ``gain``: the likelihood minus the likelihood without any context
    - ``whole gain``: the gain summed over the reply: the pointwise mutual information of context and reply
    - ``choice head``: the score of the choice head
    """
    turns, places = group_by_context(rated)
    seen = head_outputs(model, tokenizer, turns, fp16)
    alone = head_outputs(model, tokenizer, [([], [], [one.reply]) for one in rated], fp16)
    columns = {name: np.zeros(len(rated)) for name in ("likelihood", "gain", "whole gain", "choice head")}
    for group, replies in zip(places, seen, strict=True):
        for place, (logprobs, score) in zip(group, replies, strict=True):
            gain = logprobs.sum() - alone[place][0][0].sum()
            for name, value in zip(columns, (logprobs.mean(), gain / len(logprobs), gain, score), strict=True):
                columns[name][place] = value
    return columns


def reward_model_scores(rated: Sequence[Rated], model: Callable[[list[tuple]], list[list[float]]]
                        ) -> dict[str, np.ndarray]:
    """Score replies with a `RewardModel`, or with another function of turns: persona, history and replies."""
    turns, places = group_by_context(rated)
    column = np.zeros(len(rated))
    for group, scores in zip(places, model(turns), strict=True):
        column[group] = scores
    return {"reward model": column}


def text_scores(rated: Sequence[Rated]) -> dict[str, np.ndarray]:
    """Compute the utterance metrics, the ``length`` (log of the word count) and the ``variety`` of words.

    ``variety`` is minus the share of repeated words.
    """
    columns = {name: [metric(one.reply, one.history) for one in rated] for name, metric in METRICS.items()}
    said = [lowercase_words(one.reply) or [""] for one in rated]
    columns["length"] = [np.log(len(one)) for one in said]
    columns["variety"] = [len(set(one)) / len(one) - 1 for one in said]
    return {name: np.array(column, float) for name, column in columns.items()}


def embedding_scores(rated: Sequence[Rated]) -> dict[str, np.ndarray]:
    """Compute cosine similarities between the sentence embeddings of a reply and of its context.

    The reply is compared with the last utterance, the last five utterances together, the nearest of the bot's own
    utterances and the nearest persona sentence. The similarity is 0 if there is no such text.
    """
    def dialog(one: Rated) -> str:
        return " ".join(one.history[-5:])

    vectors = embed([text for one in rated for text in (one.reply, dialog(one), *one.history, *one.persona)])

    def nearest(one: Rated, texts: Sequence[str]) -> float:
        return max((float(vectors[one.reply] @ vectors[text]) for text in texts), default=0.0)

    return {name: np.array(column) for name, column in {
        "near what was said last": [nearest(one, one.history[-1:]) for one in rated],
        "near the dialog": [nearest(one, [dialog(one)] * bool(one.history)) for one in rated],
        "near own utterances": [nearest(one, one.history[-2::-2]) for one in rated],
        "near the persona": [nearest(one, one.persona) for one in rated]}.items()}


def all_scores(rated: Sequence[Rated], model: DoubleHeadsModel, tokenizer: Tokenizer,
               reward: RewardModel | None = None, fp16: str = "") -> dict[str, np.ndarray]:
    """Compute the columns of all scorers."""
    columns = head_scores(rated, model, tokenizer, fp16)
    if reward:
        columns |= reward_model_scores(rated, reward)
    return columns | text_scores(rated) | embedding_scores(rated)


# ----------------------------------------------------------------------------------------------- a combination


class DataSet:
    """The rated replies of a file, their scores (replies, scorers), and the targets of the learnt combination."""

    def __init__(self, path: str, rated: list[Rated], columns: dict[str, np.ndarray]):
        self.name, self.rated, self.columns = Path(path).stem, rated, columns
        self.matrix = np.stack(list(columns.values()), 1)
        numbers: dict[tuple, int] = {}
        self.contexts = np.array([numbers.setdefault(one.context, len(numbers)) for one in rated])
        wanted = [overall(one) for one in rated]
        if None in wanted:  # no overall quality: use the mean of all qualities
            wanted = [fmean(fmean(values) for values in one.ratings.values()) for one in rated]
        self.wanted = stats.zscore(np.array(wanted)) if np.std(wanted) else np.zeros(len(wanted))


def combination():
    """Return a ridge regression over standardised columns."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 4, 9)))


def combination_scores(data: DataSet, others: Sequence[DataSet]) -> np.ndarray:
    """Score each reply, (replies,), by a combination learnt from the ``others``.

    Ratings are standardised within each data set. Without others, each part of the contexts is scored by a combination
    learnt from the other parts.
    """
    if others:
        model = combination().fit(np.concatenate([other.matrix for other in others]),
                                  np.concatenate([other.wanted for other in others]))
        return model.predict(data.matrix)
    said, parts = np.zeros(len(data.rated)), data.contexts % PARTS
    for part in range(PARTS):
        teaching, judged = parts != part, parts == part
        if judged.any() and teaching.sum() > 1:
            said[judged] = combination().fit(data.matrix[teaching], data.wanted[teaching]).predict(data.matrix[judged])
    return said


# -------------------------------------------------------------------------------------------- agreement with people


def correlations(columns: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Return Spearman's and Pearson's correlations of columns with ratings: (columns, replies) → (2, columns).

    ``ratings`` may also be (replies,). The correlation is NaN if either side is constant, as a single reply is.
    """
    if columns.shape[1] < 2:
        return np.full((2, len(columns)), np.nan)
    ratings = np.broadcast_to(ratings, columns.shape)
    return np.stack([_pearson(stats.rankdata(columns, axis=1), stats.rankdata(ratings, axis=1)),
                     _pearson(columns, ratings)])


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    varies = (np.ptp(first, 1) > 0) & (np.ptp(second, 1) > 0)
    return np.where(varies, stats.pearsonr(np.where(varies[:, None], first, np.arange(first.shape[1])),
                                           np.where(varies[:, None], second, np.arange(first.shape[1])), axis=1)[0],
                    np.nan)


class Agreement:
    """Correlations with people's ratings, (2, columns), and their 95 % intervals by a bootstrap over contexts."""

    def __init__(self, columns: np.ndarray, ratings: np.ndarray, contexts: np.ndarray, resamples: int, seed: int):
        self.value = correlations(columns, ratings)
        draw, places = np.random.default_rng(seed), [np.flatnonzero(contexts == one) for one in np.unique(contexts)]
        drawn = []
        for _ in range(resamples):
            chosen = np.concatenate([places[one] for one in draw.integers(len(places), size=len(places))])
            drawn.append(correlations(columns[:, chosen], ratings[..., chosen]))
        with catch_warnings():
            simplefilter("ignore", RuntimeWarning)  # some columns may be constant
            self.low, self.high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)


def raters_and_others(rated: Sequence[Rated], quality: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return each rater's ratings and the mean of the other raters, both (raters, replies); None for fewer than two."""
    ratings = [one.ratings[quality] for one in rated]
    if min(map(len, ratings)) < 2 or len(set(map(len, ratings))) > 1:
        return None
    each = np.array(ratings).T
    return each, (each.sum(0) - each) / (len(each) - 1)


def agreement_lines(data: DataSet, quality: str, said: np.ndarray, resamples: int, seed: int) -> list[tuple]:
    """Return (name, correlations, low, high), each of shape (2,), for the raters, each scorer and the combination."""
    kept = np.array([quality in one.ratings for one in data.rated])
    rated = [one for one, keep in zip(data.rated, kept, strict=True) if keep]
    contexts, lines = data.contexts[kept], []
    if both := raters_and_others(rated, quality):
        among = Agreement(*both, contexts, resamples, seed)
        with catch_warnings():
            simplefilter("ignore", RuntimeWarning)  # raters who always give the same rating have no correlation
            lines.append(("people", *(np.nanmean(values, -1) for values in (among.value, among.low, among.high))))
    columns = np.vstack([data.matrix.T[:, kept], said[kept]])
    found = Agreement(columns, np.array([fmean(one.ratings[quality]) for one in rated]), contexts, resamples, seed)
    return lines + [(name, found.value[:, number], found.low[:, number], found.high[:, number])
                    for number, name in enumerate([*data.columns, LEARNT])]


# ----------------------------------------------------------------------------------------------------- the command


def judge(args: Namespace) -> list[dict]:
    """Print and return the agreement of each scorer with people, for each data set and quality."""
    check_libraries()
    files = [(path, read_ratings(path)) for path in dict.fromkeys([*args.data, *args.learn_from])]
    model, tokenizer = load_checkpoint(args.model_checkpoint, args.device)
    reward = RewardModel(args.reward_model, args.device, args.fp16) if args.reward_model else None
    sets = []
    for path, rated in files:
        logger.info("%s: %s replies", path, f"{len(rated):,}")
        sets.append(DataSet(path, rated, all_scores(rated, model, tokenizer, reward, args.fp16)))
    records = []
    for data in sets[:len(dict.fromkeys(args.data))]:
        others = [other for other in sets if other is not data]
        said = combination_scores(data, others)
        teachers = ", ".join(other.name for other in others) or f"{PARTS} parts of it, each scored by the others"
        for quality in dict.fromkeys(quality for one in data.rated for quality in one.ratings):
            lines = agreement_lines(data, quality, said, args.resamples, args.seed)
            print(f"\n{data.name}, {quality}: {sum(quality in one.ratings for one in data.rated):,} replies to "
                  f"{data.contexts.max() + 1:,} contexts; the combination is learnt from {teachers}\n"
                  f"{'':24}  Spearman  95 % interval     Pearson  95 % interval")
            if len({fmean(one.ratings[quality]) for one in data.rated if quality in one.ratings}) == 1:
                print("all replies have the same rating, so nothing correlates with it (nan)")
            for name, value, low, high in lines:
                print(f"{name:24}  " + "   ".join(f"{value[n]:8.3f}  {low[n]:6.3f} to {high[n]:6.3f}" for n in (0, 1)))
                records.append({"data": data.name, "quality": quality, "scorer": name} | {
                    f"{kind}{part}": float(values[n]) for n, kind in enumerate(("spearman", "pearson"))
                    for part, values in (("", value), ("_low", low), ("_high", high))})
        if args.scores:
            columns = data.columns | {LEARNT: said}
            append_json_lines(Path(args.scores), [
                {"data": data.name, "persona": one.persona, "history": one.history, "reply": one.reply,
                 "scores": {name: float(column[place]) for name, column in columns.items()}}
                for place, one in enumerate(data.rated)])
    return records


def parse_args(arguments: Sequence[str] | None = None) -> Namespace:
    """Parse the command line (default: that of ``sys.argv``)."""
    parser = ArgumentParser(prog="python -m feedback.judge", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="files of ratings, with a JSON line per reply; see "
        "feedback.ratings")
    add("--learn_from", nargs="+", default=[], metavar="FILE",
        help="more files of ratings from which the combination learns, without a report. It always learns from all "
             "other files; a single file is cut into parts")
    add("--model_checkpoint", default="", metavar="CHECKPOINT",
        help="model whose heads score replies (default: the published fine-tuned model)")
    add("--reward_model", default="", metavar="DIR", help="reward model, as another scorer (default: none)")
    add("--scores", default="", metavar="FILE", help="file to add all scores to, a JSON line per reply (default: none)")
    add("--resamples", type=positive_number, default=1000, metavar="N",
        help="number of bootstrap samples for the intervals (default: %(default)s)")
    add("--fp16", default="", choices=["", "O0", *HALF], help="half precision, as in train.py (default: none)")
    add_device_flag(parser.add_argument)
    add("--seed", type=whole_number, default=42, help="seed of the bootstrap (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(lambda: judge(parse_args()) and None)
