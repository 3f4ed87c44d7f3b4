"""Fine-tune a double-heads GPT or GPT-2 on persona-grounded dialogue.

Each turn teaches two tasks at once: language modelling of the gold reply, and choosing the gold reply among candidates
(Wolf et al. 2019, "TransferTransfo"). Read this file from `training` downwards: data, model, trainer, evaluator, and
the events that connect them. inputs.py shows what a turn looks like, model.py the network.

    python train.py --model_checkpoint gpt2 --dataset_path data/sample_personachat.json --n_epochs 1
"""

import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.metrics import MetricsLambda
from ignite.utils import convert_tensor, manual_seed
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

import devices
from checkpoints import Checkpoints, open_run_folder, parse_resumable
from cli import coefficient, command, positive_number, positive_real, whole_number, worker_count
from corpora import require_split
from curves import BAR, Samples, attach_curves, attach_record, show_progress
from inputs import DialogDataset, TurnDataset, build_input_from_segments, get_loader, longest_persona
from model import DoubleHeadsModel, DoubleHeadsOutput
from schedule import AdamW, Decay, add_schedule_flags
from tables import TokenTable
from tokenization import ATTR_TO_SPECIAL_TOKEN, SPECIAL_TOKENS, Tokenizer, get_tokenizer
from utils import add_common_flags, data_flags, open_dataset
from weights import add_lora_, add_special_tokens_, load_model

__all__ = ["ATTR_TO_SPECIAL_TOKEN", "SPECIAL_TOKENS", "add_special_tokens_", "build_input_from_segments", "training"]

logger = logging.getLogger("train")


def training(args: Namespace) -> Path | None:
    """Train a model and return the run folder; with ``--n_epochs 0`` only evaluate it and return None."""
    manual_seed(args.seed)
    with devices.first_of_each_machine():  # the first process downloads and tokenises
        tokenizer = get_tokenizer(args.model_checkpoint)
        model = load_model(args.model_checkpoint, args.lora)
        table = open_dataset(args, tokenizer, from_run=False)
    add_special_tokens_(model, tokenizer)
    note_training(model, table, args)
    if args.lora:
        add_lora_(model, tokenizer, args.lora, args.model_checkpoint)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    train_loader, valid_loader = get_dataflow(args, tokenizer, model, table)
    if args.compile:
        devices.compile_(model)
    network = devices.prepare(model, args.device, args.fp16, args.shard, args.seed)

    optimizer = AdamW(model.parameters(), args.lr)
    scaler = devices.loss_scaler(args.device, args.fp16)
    trainer = create_trainer(network, optimizer, scaler, args)
    evaluator = create_evaluator(network, args)

    if args.n_epochs < 1 or args.eval_before_start and not args.resume:
        evaluator.run(valid_loader)
    if args.n_epochs < 1:
        return None

    @trainer.on(Events.EPOCH_STARTED)
    def shuffle_anew(engine: Engine) -> None:  # a resumed run may begin within an epoch
        train_loader.batch_sampler.set_epoch(engine.state.epoch, start=engine.state.iteration % len(train_loader))

    decay = Decay(optimizer, args.n_epochs * len(train_loader), args.lr, args.warmup_ratio, args.lr_decay)
    trainer.add_event_handler(Events.ITERATION_STARTED, decay)

    show_progress(trainer, args.device)
    run = open_run_folder(args, tokenizer)
    checkpoints = Checkpoints(run, model, optimizer, scaler, decay, args)

    @trainer.on(Events.EPOCH_COMPLETED)
    def save_and_evaluate() -> None:
        checkpoints.save_model()
        checkpoints.save(nll=evaluator.run(valid_loader).metrics["nll"])

    attach_record(run, trainer, evaluator)
    with attach_curves(run, trainer, evaluator, optimizer, args, Samples(model, tokenizer, valid_loader.dataset)):
        checkpoints.run(trainer, evaluator, train_loader)
    logger.info("The run is in %s", run)
    return run


def note_training(model: DoubleHeadsModel, table: TokenTable, args: Namespace) -> None:
    """Store in the model's config how this run reads a turn, so that evaluation and chat read it the same way."""
    config = model.config
    config.update({"max_history": args.max_history, "trained_on": data_flags(args)})
    config.no_token_types = args.no_token_types or model.no_token_types
    if args.max_len:
        config.max_len = args.max_len
    longest = max(map(longest_persona, table.values()))
    config.no_persona = args.no_persona or longest == 1
    if args.history_first:
        config.history_start = min(longest, model.max_positions // 2)


def get_dataflow(args: Namespace, tokenizer: Tokenizer, model: DoubleHeadsModel,
                 table: TokenTable) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of training and validation; training uses ``--num_candidates``, validation all candidates.

    A batch has ``--train_batch_size`` turns for each process that the run began with, even if the number of processes
    changes when the run is resumed.
    """
    loaders, world, on_gpu = [], idist.get_world_size(), args.device.startswith("cuda")
    for split in ("train", "valid"):
        require_split(table, split, args.dataset or args.dataset_path)
        training_only = {"num_candidates": args.num_candidates, "permutations": args.personality_permutations}
        validation_only = {"num_candidates": 0 if args.mc_coef else 1}
        rows = DialogDataset if args.pack_dialogs and split == "train" else TurnDataset
        dataset = rows.for_model(model, table[split], tokenizer,
                                 **(training_only if split == "train" else validation_only))
        lengths, too_long = dataset.lengths()
        logger.info("%s: %s rows, %.0f tokens each", split, f"{len(dataset):,}", lengths.mean())
        if too_long:
            logger.warning("%s: %s turns exceed the model's %s positions and lose their oldest context",
                           split, f"{too_long:,}", model.max_positions)
        loaders.append(get_loader(
            dataset, lengths,
            batch_size=args.train_batch_size * args.processes if split == "train" else args.valid_batch_size * world,
            seed=args.seed if split == "train" else None, epoch_batches=args.epoch_batches if split == "train" else 0,
            rank=idist.get_rank(), world=world,
            num_workers=2 * on_gpu if args.num_workers is None else args.num_workers, pin_memory=on_gpu,
        ))
    return loaders[0], loaders[1]


def create_trainer(network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                   args: Namespace) -> Engine:
    """Return an engine with one batch per iteration and ``--gradient_accumulation_steps`` iterations per step."""
    every = args.gradient_accumulation_steps

    @devices.recorded(network, args.device)
    def add_gradients(batch: dict[str, torch.Tensor], group: int) -> torch.Tensor:
        (lm_loss, mc_loss), logged = devices.scale_losses(network(**batch))
        scaler.scale((args.lm_coef * lm_loss + args.mc_coef * mc_loss) / group).backward()
        return logged

    def update(engine: Engine, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        network.train()
        state = engine.state
        total = state.max_epochs * state.epoch_length
        group = every if state.iteration <= total // every * every else total % every  # the last group may be smaller
        last_of_step = state.iteration % every == 0 or state.iteration == total
        batch = convert_tensor(batch, device=args.device, non_blocking=True)
        with devices.exchanging(network, now=last_of_step):
            lm_loss, mc_loss = add_gradients(batch, group)
        if last_of_step:
            scaler.unscale_(optimizer)
            state.gradient_norm = clip_grad_norm_(network.parameters(), args.max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            state.step += 1
        return {"loss": args.lm_coef * lm_loss + args.mc_coef * mc_loss, "lm_loss": lm_loss, "mc_loss": mc_loss}

    trainer = Engine(devices.within_memory(update, args))
    trainer.state.step, trainer.state.gradient_norm = 0, 0.0
    return trainer


def create_evaluator(network: nn.Module, args: Namespace) -> Engine:
    """Return an engine that computes hits@1 and perplexity over the whole split, from the totals of all processes."""

    @torch.inference_mode()
    def score(engine: Engine, batch: dict[str, torch.Tensor]) -> DoubleHeadsOutput:
        network.eval()
        return network(**convert_tensor(batch, device=args.device, non_blocking=True))

    evaluator = Engine(devices.within_memory(score, args, training=False))
    mean, is_choice = devices.mean_over_turns, lambda out: (out.mc_logits != -torch.inf).sum(1) > 1
    nll, tokens, choices = mean(lambda out: out.nll), mean(lambda out: out.tokens), mean(is_choice)
    hits = mean(lambda out: is_choice(out) & (out.gold_rank == 1))
    metrics = {  # hits@1 is NaN if no turn has a second candidate
        **({"hits@1": MetricsLambda(lambda *of: of[0] / (of[1] or torch.nan), hits, choices)} if args.mc_coef else {}),
        "nll": nll / tokens,  # per token: total negative log-likelihood over total gold tokens
        "ppl": MetricsLambda(lambda mean: float(torch.tensor(mean).double().exp()), nll / tokens),
    }
    for name, metric in metrics.items():
        metric.attach(evaluator, name)
    ProgressBar(desc="Validation", bar_format=BAR, disable=not devices.is_first()).attach(evaluator)
    evaluator.add_event_handler(Events.COMPLETED, lambda: logger.info(
        "Validation: " + ", ".join(f"{name} {evaluator.state.metrics[name]:.4f}" for name in metrics).replace(
            "hits@1 nan", "hits@1: nothing to choose")))
    return evaluator


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Read the flags of ``argv``, by default those of the command line. Raises `InputError` as `parse_resumable`."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="openai-gpt")
    add = parser.add_argument_group("turns and losses").add_argument
    add("--num_candidates", type=positive_number, default=2, help="candidates per training turn (default: %(default)s)")
    add("--personality_permutations", type=positive_number, default=1, metavar="N",
        help="see each training turn N times, with the persona's sentences rotated (default: %(default)s)")
    add("--lm_coef", type=coefficient, default=1.0, help="weight of the language-modelling loss (default: %(default)s)")
    add("--mc_coef", type=coefficient, default=1.0,
        help="weight of the choice loss; 0 also leaves the wrong candidates out (default: %(default)s)")
    add("--history_first", action="store_true",
        help="begin the dialog history at the same position whatever the persona's length, as in the competition")
    add("--no_persona", action="store_true", help="leave personas out, here and when the run is evaluated or talked to")
    add("--no_token_types", action="store_true",
        help="tell speakers apart by their control tokens alone, as software of others that serves the model has to")
    add("--pack_dialogs", action="store_true",
        help="put a whole dialog into each row, which saves tokens where --max_history keeps the whole history; "
             "--train_batch_size then counts dialogs")
    add = parser.add_argument_group("training").add_argument
    add("--n_epochs", type=whole_number, default=3, help="epochs; 0: only evaluate (default: %(default)s)")
    add("--train_batch_size", type=positive_number, default=4, help="turns per training batch (default: %(default)s)")
    add("--valid_batch_size", type=positive_number, default=4, help="turns per validation batch (default: %(default)s)")
    add("--gradient_accumulation_steps", type=positive_number, default=8, metavar="N",
        help="batches per optimizer step (default: %(default)s)")
    add_schedule_flags(add)
    add("--max_norm", type=positive_real, default=1.0, help="clip gradients to this norm (default: %(default)s)")
    add("--epoch_batches", type=whole_number, default=0, metavar="N",
        help="batches per epoch; 0: each turn once (default: %(default)s)")
    add("--eval_before_start", action="store_true", help="evaluate before the first epoch as well")
    add("--seed", type=whole_number, default=42, help="seed of weights, order and dropout (default: %(default)s)")
    add = parser.add_argument_group("memory and speed").add_argument
    devices.add_flags(add)
    add("--lora", type=whole_number, default=0, metavar="RANK",
        help="train and save only low-rank updates of the model's weights; 0: off (default: %(default)s)")
    add("--num_workers", type=worker_count, help="processes that build batches (default: 2 for a GPU, none for CPUs)")
    parser.set_defaults(processes=None, max_history=2)
    args = parse_resumable(parser, argv)
    if not args.mc_coef:
        args.num_candidates, args.distractors = 1, "none"
    return args


def main() -> None:
    """Run the command line in this process, which may be one of several."""
    args = parse_args()
    with devices.processes(args):
        training(args)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for library in ("ignite", "tensorboardX"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # this script logs the same
    command(main)
