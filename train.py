"""Fine-tune a double-heads GPT or GPT-2 on persona-grounded dialogue.

Two losses are learnt at once over each turn: language modelling of the gold reply, and the choice of the gold reply
among candidates (Wolf et al. 2019, "TransferTransfo"). Read this file from `training` downwards: data, model, trainer,
evaluator, and what happens when. What a turn looks like is in inputs.py, the network in model.py.
"""

import json
import logging
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar, global_step_from_engine
from ignite.handlers.tensorboard_logger import TensorboardLogger
from ignite.metrics import Average, Metric, MetricsLambda, RunningAverage
from ignite.utils import convert_tensor, manual_seed
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from corpora import command, require_split
from inputs import TurnDataset, build_input_from_segments, get_loader, longest_persona
from model import (
    HALF,
    DoubleHeadsModel,
    DoubleHeadsOutput,
    add_lora_,
    add_special_tokens_,
    autocast,
    load_model,
    save_model,
)
from schedule import Decay, add_schedule_flags
from utils import (
    ATTR_TO_SPECIAL_TOKEN,
    SPECIAL_TOKENS,
    add_common_flags,
    dataset_of,
    get_tokenizer,
    make_logdir,
    positive_number,
    whole_number,
)

__all__ = ["ATTR_TO_SPECIAL_TOKEN", "SPECIAL_TOKENS", "add_special_tokens_", "build_input_from_segments", "training"]

BAR = "{desc}[{n_fmt}/{total_fmt}] {percentage:3.0f}%|{bar}{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
logger = logging.getLogger("train")


def training(args: Namespace) -> Path | None:
    """The whole run. Returns the run folder, or None when ``--n_epochs`` asked for an evaluation only."""
    manual_seed(args.seed)
    tokenizer = get_tokenizer(args.model_checkpoint)
    model = load_model(args.model_checkpoint)
    add_special_tokens_(model, tokenizer)
    if args.lora:
        add_lora_(model, tokenizer, args.lora, args.model_checkpoint)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.to(args.device)
    if args.compile:
        model.base_model.compile(dynamic=True)  # batches differ in length
    train_loader, valid_loader = get_dataflow(args, tokenizer, model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-6, weight_decay=0.0, fused=True)
    trainer = create_trainer(model, optimizer, args)
    evaluator = create_evaluator(model, args)

    if args.n_epochs < 1 or args.eval_before_start:
        evaluator.run(valid_loader)
    if args.n_epochs < 1:
        return None

    @trainer.on(Events.EPOCH_STARTED)
    def shuffle_anew(engine: Engine) -> None:
        train_loader.batch_sampler.set_epoch(engine.state.epoch)

    decay = Decay(optimizer, args.n_epochs * len(train_loader), args)
    trainer.add_event_handler(Events.ITERATION_STARTED, decay)

    RunningAverage(output_transform=lambda out: out["loss"]).attach(trainer, "loss")
    ProgressBar(persist=True, bar_format=BAR).attach(trainer, metric_names=["loss"])

    run = Path(make_logdir(args.model_checkpoint))
    tokenizer.save_pretrained(run)
    (run / "training_args.json").write_text(json.dumps(vars(args), indent=2) + "\n")

    @trainer.on(Events.EPOCH_COMPLETED)
    def save_and_evaluate() -> None:
        save_model(model, run)
        evaluator.run(valid_loader)

    curves = TensorboardLogger(log_dir=run)  # writes through tensorboardX
    curves.attach_output_handler(trainer, Events.ITERATION_COMPLETED, tag="training", output_transform=lambda out: out)
    curves.attach_opt_params_handler(trainer, Events.ITERATION_STARTED, optimizer, param_name="lr")
    curves.attach_output_handler(evaluator, Events.COMPLETED, tag="validation", metric_names="all",
                                 global_step_transform=global_step_from_engine(trainer))
    with curves:
        trainer.run(train_loader, max_epochs=args.n_epochs)
    logger.info("The run is in %s", run)
    return run


def get_dataflow(args: Namespace, tokenizer, model: DoubleHeadsModel) -> tuple[DataLoader, DataLoader]:
    """Loaders of training and validation batches; training sees ``--num_candidates``, validation all."""
    table = dataset_of(args, tokenizer)
    # What evaluation and chat find in the run's config:
    if args.max_len:
        model.config.max_len = args.max_len
    longest = max(map(longest_persona, table.values()))
    model.config.no_persona = args.no_persona or longest == 1
    if args.history_first:
        model.config.history_start = min(longest, model.max_positions // 2)
    loaders = []
    for split in ("train", "valid"):
        require_split(table, split, args.dataset or args.dataset_path)
        training_only = {"num_candidates": args.num_candidates, "permutations": args.personality_permutations}
        otherwise = {"num_candidates": 0 if args.mc_coef else 1}
        dataset = TurnDataset(table[split], tokenizer, model.max_positions, max_history=args.max_history,
                              history_start=model.history_start, no_persona=model.no_persona,
                              **(training_only if split == "train" else otherwise))
        lengths, too_long = dataset.lengths()
        logger.info("%s: %s turns, %.0f tokens each", split, f"{len(dataset):,}", lengths.mean())
        if too_long:
            logger.warning("%s: %s turns exceed the model's %s positions and lose their oldest context",
                           split, f"{too_long:,}", model.max_positions)
        loaders.append(get_loader(
            dataset, lengths,
            batch_size=args.train_batch_size if split == "train" else args.valid_batch_size,
            seed=args.seed if split == "train" else None, epoch_batches=args.epoch_batches if split == "train" else 0,
            num_workers=args.num_workers, pin_memory=args.device.startswith("cuda"),
        ))
    return loaders[0], loaders[1]


def create_trainer(model: DoubleHeadsModel, optimizer: torch.optim.Optimizer, args: Namespace) -> Engine:
    """An engine whose iteration is one batch; every ``--gradient_accumulation_steps`` of them make one step."""
    every = args.gradient_accumulation_steps
    kind = torch.device(args.device).type
    scaler = torch.amp.GradScaler(kind, enabled=args.fp16 in ("O1", "O2") and kind != "cpu")  # there, half is bfloat16

    def update(engine: Engine, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model.train()
        batch = convert_tensor(batch, device=args.device, non_blocking=True)
        with autocast(args.device, args.fp16):
            out = model(**batch)
        loss = args.lm_coef * out.lm_loss + args.mc_coef * out.mc_loss
        scaler.scale(loss / every).backward()
        state = engine.state
        if state.iteration % every == 0 or state.iteration == state.max_epochs * state.epoch_length:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), args.max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return {"loss": loss.detach(), "lm_loss": out.lm_loss.detach(), "mc_loss": out.mc_loss.detach()}

    return Engine(update)


def create_evaluator(model: DoubleHeadsModel, args: Namespace) -> Engine:
    """An engine that measures hits@1 and perplexity from totals over the whole split."""

    @torch.inference_mode()
    def score(engine: Engine, batch: dict[str, torch.Tensor]) -> DoubleHeadsOutput:
        model.eval()
        with autocast(args.device, args.fp16):
            return model(**convert_tensor(batch, device=args.device, non_blocking=True))

    evaluator = Engine(score)
    nll, tokens = mean_over_turns(lambda out: out.nll), mean_over_turns(lambda out: out.tokens)
    metrics = {
        **({"hits@1": mean_over_turns(lambda out: out.gold_rank == 0)} if args.mc_coef else {}),
        "nll": nll / tokens,  # a token: total negative log-likelihood over total gold tokens
        "ppl": MetricsLambda(math.exp, nll / tokens),
    }
    for name, metric in metrics.items():
        metric.attach(evaluator, name)
    ProgressBar(desc="Validation", bar_format=BAR).attach(evaluator)
    evaluator.add_event_handler(Events.COMPLETED, lambda: logger.info(
        "Validation: " + ", ".join(f"{name} {evaluator.state.metrics[name]:.4f}" for name in metrics)))
    return evaluator


def mean_over_turns(of: Callable[[DoubleHeadsOutput], torch.Tensor]) -> Metric:
    """The mean over all turns of ``of(output)``, which is (batch,)."""
    return MetricsLambda(float, Average(lambda out: of(out)[:, None].double()))


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="openai-gpt")
    add = parser.add_argument
    add("--num_candidates", type=positive_number, default=2, help="a turn, in training (default: %(default)s)")
    add("--history_first", action="store_true",
        help="begin the dialog history at the same position whatever the persona's length, as in the competition")
    add("--no_persona", action="store_true", help="leave personas out; evaluation and chat of the run then do, too")
    add("--personality_permutations", type=positive_number, default=1, metavar="N",
        help="see each training turn N times, the persona's sentences rotated (default: %(default)s)")
    add("--train_batch_size", type=positive_number, default=4, help="turns (default: %(default)s)")
    add("--valid_batch_size", type=positive_number, default=4, help="turns (default: %(default)s)")
    add("--gradient_accumulation_steps", type=positive_number, default=8, metavar="N",
        help="batches that make one optimizer step (default: %(default)s)")
    add_schedule_flags(parser)
    add("--lm_coef", type=float, default=1.0, help="weight of the language-modelling loss (default: %(default)s)")
    add("--mc_coef", type=float, default=1.0, help="of the choice loss; 0: no distractors (default: %(default)s)")
    add("--max_norm", type=float, default=1.0, help="gradients are clipped to this norm (default: %(default)s)")
    add("--n_epochs", type=whole_number, default=3, help="0: only evaluate (default: %(default)s)")
    add("--epoch_batches", type=whole_number, default=0, metavar="N", help="an epoch (default: 0, every turn once)")
    add("--eval_before_start", action="store_true", help="evaluate before the first epoch, too")
    add("--fp16", default="", choices=["", "O0", *HALF], help="half precision: apex's names, or bf16 (default: none)")
    add("--lora", type=whole_number, default=0, metavar="RANK",
        help="train low-rank updates of the model instead of all of it, and save those alone (default: 0, off)")
    add("--gradient_checkpointing", action="store_true", help="compute states twice to save memory")
    add("--compile", action="store_true", help="compile the network first (gain not measured on GPUs)")
    add("--local_rank", type=int, default=-1, help="set by the 2019 launcher, which one process does without")
    add("--num_workers", type=whole_number, default=0, help="processes that build batches (default: %(default)s)")
    add("--seed", type=whole_number, default=42, help="of weights, order and dropout (default: %(default)s)")
    args = parser.parse_args()
    if not args.mc_coef:
        args.num_candidates, args.distractors = 1, "none"
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for library in ("ignite", "tensorboardX"):
        logging.getLogger(library).setLevel(logging.WARNING)
    command(lambda: training(parse_args()) and None)
