"""Fine-tune SmolLM2-135M as train.py does, and with TRL's SFTTrainer: turns per second, peak memory, perplexity.

Both sides train all weights, under bfloat16 autocast, on the same dialogs with their whole history, and learn the bot's
replies only. Our side puts a dialog into each row (``--pack_dialogs``). TRL gets what its users give it, a sequence per
turn, and for comparison a sequence per dialog. It has no choice head, so our four candidates stand beside four
sequences per turn. TRL's gradient checkpointing is off, because it costs time. TRL's optimizer is torch's AdamW, ours
that of train.py, whose first steps are shorter (`schedule.AdamW`); so the perplexities differ after a few steps.

Each training runs in its own process, and the sides alternate. The peak is the largest resident memory during the
training minus the resident memory before it, which includes the weights (540 MB).
"""

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from ignite.engine import Events
from memory import resident
from textbook import close, parse_args, report

import devices
import utils
from inputs import IGNORED, DialogDataset, Specials, TurnDataset, collate, get_loader
from schedule import AdamW, Decay
from tokenization import get_tokenizer, save_tokenizer
from train import create_trainer
from weights import add_special_tokens_, load_model, save_model

PER_TURN, PER_DIALOG, FOUR = "TRL, a sequence per turn", "TRL, a sequence per dialog", "TRL, 4 sequences per turn"
SIDES = {"1 candidate": 1, "4 candidates": 4, PER_TURN: 1, PER_DIALOG: 1, FOUR: 4}  # replies to each turn
LR = 1e-4


def write_inputs(args: Namespace, folder: Path) -> None:
    """Write what all trainings read: the model with its control tokens, and the dialogs that the seed draws."""
    corpus, rng = json.loads(Path(args.data).read_text("utf-8")), random.Random(args.seed)
    drawn = {"train": rng.sample(corpus["train"], args.dialogs), "valid": corpus["valid"][:args.valid_dialogs]}
    (folder / "data.json").write_text(json.dumps(drawn))
    torch.manual_seed(args.seed)
    model, tokenizer = load_model("smollm2"), get_tokenizer("smollm2")
    add_special_tokens_(model, tokenizer)
    model.config.no_token_types = True
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)


class Data:
    """The token table of the drawn dialogs, as our rows and as sequences of a plain language model."""

    def __init__(self, folder: Path):
        self.tokenizer = get_tokenizer(str(folder))
        self.special = Specials.of(self.tokenizer)
        self.table = utils.get_dataset(self.tokenizer, str(folder / "data.json"), str(folder / "cache"))

    def rows(self, split: str, candidates: int, kind: type[TurnDataset] = TurnDataset) -> TurnDataset:
        return kind(self.table[split], self.tokenizer, 2048, num_candidates=candidates, max_history=100)

    def sequences(self, split: str, side: str) -> list[dict[str, list[int]]]:
        """Return ``input_ids`` and ``labels``: a sequence for each reply to each turn, or one for each dialog."""
        dataset = self.rows(split, SIDES[side])
        if side == PER_DIALOG:
            lasts = {dialog: turn for turn, dialog in enumerate(dataset.split.turn_dialog.tolist())}
            return [self.dialog(dataset, turn) for turn in lasts.values()]
        rows = [dataset.pack(turn, [reply]) for turn in range(dataset.split.num_turns)
                for reply in dataset.split.token_ids("candidates", turn)[-SIDES[side]:]]
        return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]

    def dialog(self, dataset: TurnDataset, last: int) -> dict[str, list[int]]:
        """Build a dialog as one sequence, up to its turn ``last``; each reply ends with ``<eos>`` and is learnt."""
        persona, history = dataset.context(last)
        ids = [self.special.bos, *chain.from_iterable(persona)]
        labels = [IGNORED] * len(ids)
        utterances = [*history, dataset.split.token_ids("candidates", last)[-1]]
        for place, utterance in enumerate(utterances):
            bot = (len(utterances) - place) % 2
            said = [*utterance, self.special.eos] if bot else utterance
            ids += [self.special.speaker1 if bot else self.special.speaker2, *said]
            labels += [IGNORED, *(said if bot and place else [IGNORED] * len(said))]  # openings are not learnt
        return {"input_ids": ids, "labels": labels}


class Clock:
    """Note the time after each step, and the memory that training needs in addition.

    With one thread it is the processor's time, which other processes disturb less.
    """

    def __init__(self):
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.times: list[float] = []
        self.before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def step(self, *_, **__) -> None:
        self.times.append(self.now())

    def figures(self, turns: Sequence[int]) -> dict[str, float]:
        """Return the figures of a training, given the turns of each step; the first step is a warm-up."""
        return {"turns/s": sum(turns[1:]) / (self.times[-1] - self.times[0]),
                "memory": resident("VmHWM") - self.before}


def train_ours(folder: Path, data: Data, args: Namespace) -> tuple[dict[str, float], float]:
    """Train as train.py does; return the figures, and the validation perplexity per token."""
    candidates, model = SIDES[args.side], load_model(str(folder))
    dataset = data.rows("train", candidates, DialogDataset)
    loader = get_loader(dataset, dataset.lengths()[0], args.per_step, seed=args.seed)
    torch.manual_seed(args.seed)  # the choice head's dropout
    turns, clock = [], Clock()
    network = devices.prepare(model, "cpu", "bf16")
    optimizer = AdamW(model.parameters(), LR)
    trainer = create_trainer(network, optimizer, devices.loss_scaler("cpu", "bf16"), Namespace(
        device="cpu", gradient_accumulation_steps=1, lm_coef=1.0, mc_coef=float(candidates > 1), max_norm=1.0))
    trainer.add_event_handler(Events.ITERATION_STARTED, Decay(optimizer, len(loader), LR))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, clock.step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED,
                              lambda engine: turns.append(len(engine.state.batch["mc_rows"])))
    trainer.run(loader, max_epochs=1)
    figures, valid = clock.figures(turns), data.rows("valid", 1)
    model.eval()
    return figures, perplexity(lambda row: model(**collate([row], data.special.pad)).nll.sum(),
                               [valid[turn] for turn in range(len(valid))])


def train_with_trl(folder: Path, data: Data, args: Namespace) -> tuple[dict[str, float], float]:
    """Train with TRL; return the same as `train_ours`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    learnt = data.sequences("train", args.side)
    per_dialog = data.table["train"].num_turns / args.dialogs  # turns
    batch = args.per_step if args.side == PER_DIALOG else round(args.per_step * per_dialog)
    turns_per_step = batch * per_dialog if args.side == PER_DIALOG else batch / SIDES[args.side]
    steps = len(learnt) // batch if args.side != FOUR else args.dialogs // args.per_step  # a quarter of the turns
    trainer = SFTTrainer(
        model, train_dataset=Dataset.from_list(learnt), processing_class=data.tokenizer, args=SFTConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=batch, max_steps=steps, learning_rate=LR,
            lr_scheduler_type="linear", max_grad_norm=1.0, max_length=None, gradient_checkpointing=False, bf16=True,
            use_cpu=True, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_drop_last=True, seed=args.seed))
    clock = Clock()
    trainer.add_callback(type("Timing", (TrainerCallback,), {"on_step_end": clock.step})())
    trainer.train()
    figures = clock.figures([turns_per_step] * steps)
    valid = data.sequences("valid", PER_TURN if args.side == FOUR else args.side)
    model.eval()
    return figures, perplexity(lambda one: nll_of_sequence(model, one), valid)


def nll_of_sequence(model: torch.nn.Module, sequence: dict[str, list[int]]) -> torch.Tensor:
    """Return the negative log-likelihood of a sequence's labels, in nats, from a plain language model."""
    ids, labels = (torch.tensor([sequence[name]]) for name in ("input_ids", "labels"))
    return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), labels[0, 1:], reduction="sum")


@torch.no_grad()
def perplexity(nll: Callable, items: list) -> float:
    """Return the perplexity per learnt token of ``items``, of which ``nll`` computes the negative log-likelihood."""
    def labels(item) -> Sequence[int]:
        return item["labels"] if isinstance(item, dict) else item.labels
    tokens = sum(label != IGNORED for item in items for label in labels(item))
    with torch.autocast("cpu", torch.bfloat16):
        return math.exp(sum(float(nll(item)) for item in items) / tokens)


@torch.no_grad()
def check_equality(folder: Path) -> None:
    """Exit if a turn's loss differs between our row of a whole dialog and a plain model's sequence."""
    from transformers import AutoModelForCausalLM

    data, ours, plain = Data(folder), load_model(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    row = data.rows("train", 4, DialogDataset)[0]
    turns = len(row.mc_token_ids)
    packed = ours(**collate([row], data.special.pad)).nll.item()
    own = sum(nll_of_sequence(plain, one).item() for one in data.sequences("train", PER_TURN)[:turns])
    close(packed / own, 1.0, 1e-4, "the loss of a dialog")


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], repeats=1, dialogs=8, per_step=1, valid_dialogs=6, side="", folder="")
    if args.side:  # in its own process
        folder = Path(args.folder)
        run = train_with_trl if args.side.startswith("TRL") else train_ours
        figures, ppl = run(folder, Data(folder), args)
        print(json.dumps(figures | {"perplexity": ppl}))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(args, Path(folder))
        check_equality(Path(folder))
        for _ in range(args.repeats):
            for side, figures in found.items():
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder],
                                      check=True, stdout=subprocess.PIPE, text=True)
                figures.append(json.loads(done.stdout.splitlines()[-1]))
                print(side, figures[-1], flush=True)
    middle = {side: {name: statistics.median(one[name] for one in figures) for name in figures[0]}
              for side, figures in found.items()}
    rows = []
    for ours, other in (("1 candidate", PER_TURN), ("1 candidate", PER_DIALOG), ("4 candidates", FOUR)):
        us, them = middle[ours], middle[other]
        row = {"work": f"fine-tuning SmolLM2-135M, {ours}, bfloat16, beside {other}", "unit": "turns/s",
               "ours": us["turns/s"], "reference": them["turns/s"], "ratio": us["turns/s"] / them["turns/s"],
               "peak memory, GiB": us["memory"], "TRL's": them["memory"]}
        if other != FOUR:  # which saw a quarter of the turns
            row |= {"perplexity after the same turns": us["perplexity"], "of TRL's model": them["perplexity"]}
        rows.append(row)
    report("finetuning", args, rows)


if __name__ == "__main__":
    main()
