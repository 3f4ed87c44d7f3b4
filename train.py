"""Fine-tune a double-heads GPT or GPT-2 on persona-grounded dialogue.

Two losses are learnt at once over each turn: language modelling of the gold reply, and the choice of the gold reply
among candidates (Wolf et al. 2019, "TransferTransfo"). Read this file from `training` downwards: data, model, trainer,
evaluator, and what happens when. What a turn looks like is in inputs.py, the network in model.py.
"""

import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.metrics import MetricsLambda, RunningAverage
from ignite.utils import convert_tensor, manual_seed
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

import devices
from checkpoints import Checkpoints, begin, parse_resumable
from cli import coefficient, command, positive_number, positive_real, process_number, whole_number, worker_count
from corpora import require_split
from curves import BAR, Samples, attach_curves, attach_record
from inputs import DialogDataset, TurnDataset, build_input_from_segments, get_loader, longest_persona
from model import HALF, DoubleHeadsModel, DoubleHeadsOutput
from schedule import AdamW, Decay, add_schedule_flags
from tables import TokenTable
from tokenization import ATTR_TO_SPECIAL_TOKEN, SPECIAL_TOKENS, get_tokenizer
from utils import add_common_flags, data_flags, dataset_of
from weights import add_lora_, add_special_tokens_, load_model

__all__ = ["ATTR_TO_SPECIAL_TOKEN", "SPECIAL_TOKENS", "add_special_tokens_", "build_input_from_segments", "training"]

logger = logging.getLogger("train")


def training(args: Namespace) -> Path | None:
    """The whole run. Returns the run folder, or None when ``--n_epochs`` asked for an evaluation only."""
    manual_seed(args.seed)
    with devices.first_of_each_machine():  # downloads and tokenises
        tokenizer = get_tokenizer(args.model_checkpoint)
        model = load_model(args.model_checkpoint, args.lora)
        table = dataset_of(args, tokenizer, of_run=False)
    add_special_tokens_(model, tokenizer)
    model.config.no_token_types = args.no_token_types or model.no_token_types
    if args.lora:
        add_lora_(model, tokenizer, args.lora, args.model_checkpoint)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    train_loader, valid_loader = get_dataflow(args, tokenizer, model, table)
    if args.compile:
        model.base_model.compile(dynamic=True)  # batches differ in length
    network = devices.prepare(model, args)

    optimizer = AdamW(model.parameters(), args.lr)
    scaler = devices.loss_scaler(args)
    trainer = create_trainer(network, optimizer, scaler, args)
    evaluator = create_evaluator(network, args)

    if args.n_epochs < 1 or args.eval_before_start and not args.resume:
        evaluator.run(valid_loader)
    if args.n_epochs < 1:
        return None

    @trainer.on(Events.EPOCH_STARTED)
    def shuffle_anew(engine: Engine) -> None:  # a resumed run begins within an epoch
        train_loader.batch_sampler.set_epoch(engine.state.epoch, start=engine.state.iteration % len(train_loader))

    decay = Decay(optimizer, args.n_epochs * len(train_loader), args)
    trainer.add_event_handler(Events.ITERATION_STARTED, decay)

    RunningAverage(output_transform=lambda out: out["loss"]).attach(trainer, "loss")
    ProgressBar(persist=True, bar_format=BAR, disable=not devices.is_first()).attach(trainer, metric_names=["loss"])

    run = begin(args, tokenizer)
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


def get_dataflow(args: Namespace, tokenizer, model: DoubleHeadsModel,
                 table: TokenTable) -> tuple[DataLoader, DataLoader]:
    """Loaders of training and validation batches; training sees ``--num_candidates``, validation all.

    A batch has ``--train_batch_size`` turns for each process that the run began with, whoever computes them now.
    """
    # What evaluation and chat find in the run's config:
    model.config.update({"max_history": args.max_history, "trained_on": data_flags(args)})
    if args.max_len:
        model.config.max_len = args.max_len
    longest = max(map(longest_persona, table.values()))
    model.config.no_persona = args.no_persona or longest == 1
    if args.history_first:
        model.config.history_start = min(longest, model.max_positions // 2)
    loaders, world = [], idist.get_world_size()
    for split in ("train", "valid"):
        require_split(table, split, args.dataset or args.dataset_path)
        training_only = {"num_candidates": args.num_candidates, "permutations": args.personality_permutations}
        otherwise = {"num_candidates": 0 if args.mc_coef else 1}
        rows = DialogDataset if args.pack_dialogs and split == "train" else TurnDataset
        dataset = rows(table[split], tokenizer, model.max_positions, max_history=args.max_history,
                              history_start=model.history_start, no_persona=model.no_persona,
                              **(training_only if split == "train" else otherwise))
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
            num_workers=args.num_workers, pin_memory=args.device.startswith("cuda"),
        ))
    return loaders[0], loaders[1]


def create_trainer(network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                   args: Namespace) -> Engine:
    """An engine whose iteration is one batch; every ``--gradient_accumulation_steps`` of them make one step."""
    every = args.gradient_accumulation_steps

    def update(engine: Engine, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        network.train()
        state = engine.state
        total = state.max_epochs * state.epoch_length
        group = every if state.iteration <= total // every * every else total % every  # the last one may be smaller
        last_of_step = state.iteration % every == 0 or state.iteration == total
        batch = convert_tensor(batch, device=args.device, non_blocking=True)
        with devices.exchanging(network, now=last_of_step):
            (lm_loss, mc_loss), (lm_of_all, mc_of_all) = devices.weigh(network(**batch))
            loss = args.lm_coef * lm_loss + args.mc_coef * mc_loss
            scaler.scale(loss / group).backward()
        if last_of_step:
            scaler.unscale_(optimizer)
            state.gradient_norm = clip_grad_norm_(network.parameters(), args.max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            state.step += 1
        return {"loss": args.lm_coef * lm_of_all + args.mc_coef * mc_of_all, "lm_loss": lm_of_all, "mc_loss": mc_of_all}

    trainer = Engine(devices.within_memory(update, args))
    trainer.state.step, trainer.state.gradient_norm = 0, 0.0
    return trainer


def create_evaluator(network: nn.Module, args: Namespace) -> Engine:
    """An engine that measures hits@1 and perplexity from totals over the whole split."""

    @torch.inference_mode()
    def score(engine: Engine, batch: dict[str, torch.Tensor]) -> DoubleHeadsOutput:
        network.eval()
        return network(**convert_tensor(batch, device=args.device, non_blocking=True))

    evaluator = Engine(devices.within_memory(score, args, training=False))
    mean, is_choice = devices.mean_over_turns, lambda out: (out.mc_logits != -torch.inf).sum(1) > 1
    nll, tokens, choices = mean(lambda out: out.nll), mean(lambda out: out.tokens), mean(is_choice)
    hits = mean(lambda out: is_choice(out) & (out.gold_rank == 1))
    metrics = {  # nan: there was nothing to choose
        **({"hits@1": MetricsLambda(lambda *of: of[0] / (of[1] or torch.nan), hits, choices)} if args.mc_coef else {}),
        "nll": nll / tokens,  # a token: total negative log-likelihood over total gold tokens
        "ppl": MetricsLambda(lambda mean: float(torch.tensor(mean).double().exp()), nll / tokens),  # inf, if it must
    }
    for name, metric in metrics.items():
        metric.attach(evaluator, name)
    ProgressBar(desc="Validation", bar_format=BAR, disable=not devices.is_first()).attach(evaluator)
    evaluator.add_event_handler(Events.COMPLETED, lambda: logger.info(
        "Validation: " + ", ".join(f"{name} {evaluator.state.metrics[name]:.4f}" for name in metrics).replace(
            "hits@1 nan", "hits@1: nothing to choose")))
    return evaluator


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="openai-gpt")
    add = parser.add_argument
    add("--num_candidates", type=positive_number, default=2, help="a turn, in training (default: %(default)s)")
    add("--history_first", action="store_true",
        help="begin the dialog history at the same position whatever the persona's length, as in the competition")
    add("--no_persona", action="store_true", help="leave personas out; evaluation and chat of the run then do, too")
    add("--no_token_types", action="store_true",
        help="tell speakers apart by their control tokens alone, as other software that serves the model has to")
    add("--pack_dialogs", action="store_true",
        help="compute a dialog's turns together, in one row: fewer tokens where --max_history keeps the whole history; "
             "--train_batch_size then counts rows")
    add("--personality_permutations", type=positive_number, default=1, metavar="N",
        help="see each training turn N times, the persona's sentences rotated (default: %(default)s)")
    add("--train_batch_size", type=positive_number, default=4, help="turns (default: %(default)s)")
    add("--valid_batch_size", type=positive_number, default=4, help="turns (default: %(default)s)")
    add("--gradient_accumulation_steps", type=positive_number, default=8, metavar="N",
        help="batches that make one optimizer step (default: %(default)s)")
    add_schedule_flags(parser)
    add("--lm_coef", type=coefficient, default=1.0, help="weight of the language-modelling loss (default: %(default)s)")
    add("--mc_coef", type=coefficient, default=1.0, help="of the choice loss; 0: no distractors (default: %(default)s)")
    add("--max_norm", type=positive_real, default=1.0, help="gradients are clipped to this norm (default: %(default)s)")
    add("--n_epochs", type=whole_number, default=3, help="0: only evaluate (default: %(default)s)")
    add("--epoch_batches", type=whole_number, default=0, metavar="N", help="an epoch (default: 0, every turn once)")
    add("--eval_before_start", action="store_true", help="evaluate before the first epoch, too")
    add("--fp16", default="", choices=["", "O0", *HALF],
        help="half precision: bf16, or apex's O1 (autocast), O2 (with master weights) or O3 (pure; default: none)")
    add("--lora", type=whole_number, default=0, metavar="RANK",
        help="train low-rank updates of the model instead of all of it, and save those alone (default: 0, off)")
    add("--gradient_checkpointing", action="store_true", help="compute states twice to save memory")
    add("--compile", action="store_true", help="compile the network first (gain not measured on GPUs)")
    add("--shard", action="store_true", help="each process keeps a part of every weight only (FSDP2)")
    add("--checkpoint_every", type=whole_number, default=0, metavar="N",
        help="optimizer steps; 0: at each epoch's end, where there is always one (default: %(default)s)")
    add("--keep_checkpoints", type=positive_number, default=3, metavar="K",
        help="the last K stay, and the one of the lowest validation loss (default: %(default)s)")
    add("--resume", default="", metavar="RUN", help="go on with a run, as it began, from its last checkpoint")
    add("--local_rank", "--local-rank", type=process_number, default=-1,
        help="this process's number, from a launcher of 2019")
    add("--num_workers", type=worker_count, default=0, help="processes that build batches (default: %(default)s)")
    add("--seed", type=whole_number, default=42, help="of weights, order and dropout (default: %(default)s)")
    parser.set_defaults(processes=None, max_history=2)
    args = parse_resumable(parser)
    if not args.mc_coef:
        args.num_candidates, args.distractors = 1, "none"
    return args


def main() -> None:
    """The command line, in this process, which may be one of many."""
    args = parse_args()
    with devices.processes(args):
        training(args)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for library in ("ignite", "tensorboardX"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what they have to say, we say
    command(main)
