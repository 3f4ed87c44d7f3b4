"""Train a reward model on people's preferences.

    python -m feedback.reward --model_checkpoint RUN --pairs pairs.jsonl --answers answers.jsonl --reward reward

The choice head scores both replies of a pair; cross-entropy with the better one as gold is the Bradley-Terry model,
log σ(r(better) - r(worse)). The result, ``--reward``, is an ordinary run folder with the scale of the rewards in
reward.json and a report, reward.html. After an interruption, the same command continues.
"""

import hashlib
import json
import logging
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.metrics import RunningAverage
from ignite.utils import manual_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

import devices
from cli import InputError, command, learning_rate, positive_number, positive_real, require_memory, share, whole_number
from curves import BAR
from decoding import load_checkpoint
from feedback.pairs import dialog_names, held_out
from feedback.preferences import read_preferences
from feedback.snapshot import check_arguments, check_origin, check_preferences, restore_snapshot, save_snapshot
from files import write_text
from inputs import IGNORED, LengthBatches, Row, Specials, collate, pack_turn
from metrics import calibration, calibration_error, interval, wilson
from model import HALF, DoubleHeadsModel, autocast
from report import bars, calibration_table, html
from tables import tokenize
from tokenization import Tokenizer, save_tokenizer
from train import create_trainer
from utils import add_device_flag
from weights import add_lora_, save_model

LONG = 512  # tokens of a row, from which on batches become smaller
MOST_REPLIES = 16  # to one context in a row; the attention of a row takes memory in the square of its length
SCALE = "reward.json"
DIALOGS = "dialogs.json"  # the `beginnings` of the dialogs of all its pairs
logger = logging.getLogger("feedback.reward")


# ----------------------------------------------------------------------------------------------------- scoring


def pack_texts(persona: Sequence[str], history: Sequence[str], replies: Sequence[str], tokenizer: Tokenizer,
               model: DoubleHeadsModel) -> Row:
    """Pack texts into one row: a context and replies to it (`inputs.pack_turn`)."""
    persona = [] if model.no_persona else persona
    ids = tokenize(tokenizer, [*history, *replies])
    return pack_turn(tokenizer.encode_persona(persona), ids[:len(history)], ids[len(history):],
                     Specials.of(tokenizer), model.max_positions, model.history_start)


def scoring_batches(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Return batches of the numbers of rows with these lengths, the longest rows first.

    The attention of a row takes memory in the square of its length, so batches of very long rows are smaller.
    """
    order, batches = np.argsort([-length for length in lengths], kind="stable"), []
    while len(order):
        rows = max(1, batch_size * LONG ** 2 // max(LONG, lengths[order[0]]) ** 2)
        batches.append(order[:rows])
        order = order[rows:]
    return batches


@torch.inference_mode()
def raw_scores(model: DoubleHeadsModel, tokenizer: Tokenizer, turns: Sequence[tuple], fp16: str = "",
               batch_size: int = 32) -> list[list[float]]:
    """Compute the choice head's scores of all replies; a turn consists of persona, history and replies as texts."""
    rows = [pack_texts(persona, history, replies, tokenizer, model) for persona, history, replies in turns]
    scores: list[list[float]] = [[]] * len(rows)
    for places in scoring_batches([len(row.input_ids) for row in rows], batch_size):
        batch = collate([rows[place] for place in places], tokenizer.pad_token_id)
        del batch["labels"]  # there are no gold replies here
        with autocast(str(model.device), fp16):
            out = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        for place, row in zip(places.tolist(), out.mc_logits.tolist(), strict=True):
            scores[place] = row[:len(rows[place].mc_token_ids[0])]
    return scores


class RewardModel:
    """A trained reward model; its rewards have mean 0 and standard deviation 1 over its held-out replies."""

    def __init__(self, folder: str, device: str = "cpu", fp16: str = ""):
        """Load the model. Raises `InputError` if the folder is not a finished reward model."""
        try:
            self.scale = json.loads(Path(folder, SCALE).read_text("utf-8"))
            self.mean, self.deviation = float(self.scale["mean"]), float(self.scale["deviation"])
            self.utterances = int(self.scale.get("utterances", 0))  # missing in models of earlier versions
            if not math.isfinite(self.mean) or not 0 < self.deviation < math.inf or self.utterances < 0:
                raise ValueError("numbers that no training has written")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise InputError(f"{folder}: is not a finished reward model, because {SCALE} is missing or damaged; make "
                             "one with python -m feedback.reward") from None
        self.model, self.tokenizer = load_checkpoint(folder, device)
        self.folder, self.fp16 = folder, fp16

    def __call__(self, turns: Sequence[tuple]) -> list[list[float]]:
        """Compute the rewards of all replies of each turn (persona, history, replies).

        The model reads as much of the history as its training pairs had.
        """
        turns = [(persona, history[-self.utterances:], replies) for persona, history, replies in turns]
        return [[(score - self.mean) / self.deviation for score in row]
                for row in raw_scores(self.model, self.tokenizer, turns, self.fp16)]

    def dialogs(self) -> list[list[str]]:
        """Return the `beginnings` of the dialogs that the model was trained and tested on."""
        try:
            return json.loads(Path(self.folder, DIALOGS).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            logger.warning("%s: %s is missing or damaged, so its training dialogs are unknown; policies may be tested "
                           "on some of them", self.folder, DIALOGS)
            return []


# ---------------------------------------------------------------------------------------------- pairs of a context


class Comparisons(NamedTuple):
    """The distinct replies to a context, and pairs of their places: the worse reply and the better one."""

    persona: list[str]
    history: list[str]
    replies: list[str]
    pairs: list[tuple[int, int]]

    def pack(self, tokenizer: Tokenizer, model: DoubleHeadsModel) -> Row:
        """Pack all replies into one row, in which each pair is a turn of two candidates, the better one last."""
        row = pack_texts(self.persona, self.history, self.replies, tokenizer, model)
        last, = row.mc_token_ids
        return row._replace(mc_token_ids=[[last[worse], last[better]] for worse, better in self.pairs],
                            labels=[IGNORED] * len(row.labels))  # the language-model head learns nothing


def group_by_context(better: Sequence[tuple[dict, int]]) -> list[Comparisons]:
    """Group pairs, given as (pair, number of the better reply), by their contexts, in the order of the pairs.

    All comparisons of a context then cost little more than one, because its tokens are computed once, and they belong
    to one training step (Ouyang et al. 2022). A context with more than ``MOST_REPLIES`` replies makes several groups.
    """
    groups: dict[tuple, list[Comparisons]] = {}
    for pair, best in better:
        made = groups.setdefault((tuple(pair["persona"]), tuple(pair["history"])), [])
        texts = [pair["replies"][number]["text"] for number in (1 - best, best)]
        if not made or len({*made[-1].replies, *texts}) > MOST_REPLIES:
            made.append(Comparisons(pair["persona"], pair["history"], [], []))
        replies = made[-1].replies
        replies += [text for text in dict.fromkeys(texts) if text not in replies]
        made[-1].pairs.append((replies.index(texts[0]), replies.index(texts[1])))
    return [group for made in groups.values() for group in made]


# ------------------------------------------------------------------------------------------------------ figures


def measure_held_out(model: DoubleHeadsModel, tokenizer: Tokenizer, pairs: list[tuple[dict, int]],
                     args: Namespace) -> dict:
    """Measure accuracy, calibration and scale of the scores on pairs, given as (pair, number of the better reply).

    The accuracy's interval is the wider one of Wilson's and of a bootstrap over contexts, because pairs with the same
    context are not independent.
    """
    groups = group_by_context(pairs)
    model.eval()
    scores = raw_scores(model, tokenizer, [group[:3] for group in groups], args.fp16)
    values = np.array([[row[worse], row[better]] for row, group in zip(scores, groups, strict=True)
                       for worse, better in group.pairs])
    right = values[:, 1] > values[:, 0]
    contexts = np.repeat(np.arange(len(groups)), [len(group.pairs) for group in groups])
    low, high = zip(wilson(int(right.sum()), len(pairs)), interval(right, np.ones(len(pairs)), contexts), strict=True)
    bins = calibration(values, right)
    return {"held_out_pairs": len(pairs), "held_out_contexts": len(groups), "accuracy": float(right.mean()),
            "accuracy_interval": (min(low), max(high)), "mean": float(values.mean()),
            "deviation": float(values.std()) or 1.0, "calibration": bins, "calibration_error": calibration_error(bins)}


def fingerprint(better: list[tuple[dict, int]]) -> str:
    """Return a hash of the preferences."""
    return hashlib.sha256(json.dumps([[pair["pair"], best] for pair, best in better]).encode()).hexdigest()[:16]


def write_page(figures: dict, path: Path) -> None:
    low, high = figures["accuracy_interval"]
    left_out = "".join(f"<dt>pairs left out: {escape(reason)}</dt><dd>{count:,}</dd>"
                       for reason, count in figures["left_out"].items())
    counts = [([f"{one['from']:.1f} to {one['to']:.1f}"], one["turns"]) for one in figures["calibration"]]
    write_text(path, html("Reward model", [
        "<h1>Reward model</h1>"
        f"<p>Agrees with people in <b>{figures['accuracy']:.3f}</b> of {figures['held_out_pairs']:,} pairs of "
        f"dialogs that it was not trained on (95 % interval {low:.3f} to {high:.3f}); chance is 0.5.</p>"
        f"<dl><dt>pairs learnt from</dt><dd>{figures['training_pairs']:,}</dd>{left_out}</dl>",
        "<h2>Calibration</h2><p>How often the reply with the higher score was the better one, by the probability "
        f"σ(difference of scores). Expected calibration error: {figures['calibration_error']:.3f}.</p>"
        + calibration_table(figures["calibration"], "pairs", "was better"),
        "<h2>How sure it is</h2>" + bars(["given"], counts),
    ]))


# ----------------------------------------------------------------------------------------------------- training


def training_batches(lengths: np.ndarray, pairs: int, args: Namespace) -> list[list[int]]:
    """Return, for each step of all epochs, the numbers of the rows to train on, with all ``pairs`` in ``lengths`` rows.

    A step has ``--train_batch_size`` pairs on average.
    """
    require_memory(8 * len(lengths) * args.n_epochs, f"--n_epochs {args.n_epochs}", "give fewer")
    batches = LengthBatches(lengths, max(1, round(args.train_batch_size * len(lengths) / pairs)), args.seed)
    steps = []
    for epoch in range(1, args.n_epochs + 1):
        batches.set_epoch(epoch)
        steps += [batch.tolist() for batch in batches]
    return steps


def train_reward(args: Namespace) -> dict:
    """Train a reward model and return the contents of reward.json. Raises `InputError` if there are too few pairs."""
    run = Path(args.reward)
    noted = check_arguments(run, args, may_change={"reward", "device", "save_every"})
    manual_seed(args.seed)
    pairs, better, left_out = read_preferences(args.pairs, args.answers)
    noted |= check_preferences(run, fingerprint(better))
    if (run / SCALE).exists():
        check_origin(run)
        try:
            figures = json.loads((run / SCALE).read_text("utf-8"))
            _report_accuracy(figures, run)
        except (ValueError, LookupError, TypeError, RecursionError):
            raise InputError(f"{run / SCALE}: is damaged; delete it, and the last steps are trained again") from None
        logger.info("%s is finished", run)
        return figures
    apart = held_out(pairs.values(), args.held_out, args.seed)
    kept = [one for one in better if one[0]["pair"] not in apart]
    tests = [one for one in better if one[0]["pair"] in apart]
    logger.info("%s pairs to learn from, %s held out; without a better reply: %s", f"{len(kept):,}", f"{len(tests):,}",
                ", ".join(f"{count:,} ({reason})" for reason, count in left_out.items()) or "none")
    if not kept or not tests:
        raise InputError(f"{args.pairs}: {len(better)} pairs with a better reply are too few for training and testing; "
                         "annotate more pairs")
    model, tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len)
    if args.lora:
        add_lora_(model, tokenizer, args.lora, args.model_checkpoint)
    rows = [group.pack(tokenizer, model) for group in tqdm(group_by_context(kept), desc="Packing", unit=" contexts")]
    steps = training_batches(np.array([len(row.input_ids) for row in rows]), len(kept), args)

    network = devices.prepare(model, args.device, args.fp16, seed=args.seed)
    scaler = devices.loss_scaler(args.device, args.fp16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-6, weight_decay=0.0, fused=True)
    trainer = create_trainer(network, optimizer, scaler, args)
    done = (restore_snapshot(run, model, optimizer) or {"step": 0})["step"]

    @trainer.on(Events.ITERATION_STARTED)
    def prepare_step(engine: Engine) -> None:
        step = done + engine.state.iteration - 1
        manual_seed(args.seed + step)  # for dropout; repeated steps get the same numbers
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / len(steps))

    @trainer.on(Events.ITERATION_COMPLETED(every=args.save_every))
    def save(engine: Engine) -> None:
        save_snapshot(run, model, optimizer, noted | {"step": done + engine.state.iteration})

    RunningAverage(output_transform=lambda out: out["mc_loss"]).attach(trainer, "mc_loss")
    ProgressBar(persist=True, bar_format=BAR).attach(trainer, metric_names=["mc_loss"])
    loader = DataLoader(rows, batch_sampler=steps[done:], collate_fn=partial(collate, pad=tokenizer.pad_token_id))
    if done < len(steps):
        trainer.run(loader)
        save_snapshot(run, model, optimizer, noted | {"step": len(steps)})

    figures = {"training_pairs": len(kept), "left_out": left_out,
               "utterances": max(len(pair["history"]) for pair, _ in kept)}
    figures |= measure_held_out(model, tokenizer, tests, args)
    save_tokenizer(tokenizer, run)
    save_model(model, run)
    write_page(figures, run / "reward.html")
    seen = dict.fromkeys(tuple(dialog_names(pair)) for pair, _ in better)
    write_text(run / DIALOGS, json.dumps(list(seen)) + "\n")
    write_text(run / SCALE, json.dumps(figures, indent=1) + "\n")  # written last: it marks the folder as complete
    _report_accuracy(figures, run)
    return figures


def _report_accuracy(figures: dict, run: Path) -> None:
    low, high = figures["accuracy_interval"]
    print(f"Accuracy on {figures['held_out_pairs']:,} held-out pairs: {figures['accuracy']:.3f} "
          f"(95 % interval {low:.3f} to {high:.3f})")
    if low <= 0.5:
        logger.warning("%s", NO_BETTER_THAN_CHANCE.format(run))


NO_BETTER_THAN_CHANCE = ("{}: on held-out pairs it may be no better than chance, so a policy may learn only noise. "
                         "Collect more answers, or check how far the annotators agree")


def parse_args(command_line: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(prog="python -m feedback.reward", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_checkpoint", default="", metavar="CHECKPOINT",
        help="model to start from (default: the published fine-tuned model)")
    add("--pairs", default="pairs.jsonl", metavar="FILE",
        help="pairs from feedback.collect, or a data set with prompt, chosen and rejected (default: %(default)s)")
    add("--answers", default=["answers.jsonl"], nargs="+", metavar="FILE",
        help="answers from feedback.annotate (default: answers.jsonl)")
    add("--reward", default="reward", metavar="DIR", help="folder to write (default: %(default)s)")
    add("--held_out", type=share, default=0.15, help="share of the dialogs for testing (default: %(default)s)")
    add("--n_epochs", type=positive_number, default=3, help="passes over the pairs (default: %(default)s)")
    add("--train_batch_size", type=positive_number, default=16,
        help="pairs per step, on average: all pairs of a context are in the same step (default: %(default)s)")
    add("--lr", type=learning_rate, default=6.25e-5, help="learning rate; falls linearly to 0 (default: %(default)s)")
    add("--max_norm", type=positive_real, default=1.0, help="gradients are clipped to this norm (default: %(default)s)")
    add("--save_every", type=positive_number, default=200, metavar="N",
        help="save a snapshot every N steps (default: %(default)s)")
    add("--lora", type=whole_number, default=0, metavar="RANK",
        help="train and save only low-rank updates of the model's weights; 0: off (default: %(default)s)")
    add("--fp16", default="", choices=["", "O0", *HALF], help="half precision, as in train.py (default: none)")
    add_device_flag(parser.add_argument)
    add("--seed", type=whole_number, default=42, help="seed of held-out dialogs and of dropout (default: %(default)s)")
    # Further arguments that the trainer of train.py and the loading of checkpoints need:
    parser.set_defaults(lm_coef=0.0, mc_coef=1.0, gradient_accumulation_steps=1, max_len=0)
    return parser.parse_args(command_line)


def main() -> None:
    train_reward(parse_args())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
