"""Train a model towards people's preferences, without letting it drift far from the original.

    python -m feedback.policy --algorithm ppo --model_checkpoint RUN --reward_model reward --policy policy
    python -m feedback.policy --algorithm dpo --model_checkpoint RUN --pairs pairs.jsonl --answers answers.jsonl …

The policy begins as the fine-tuned model, and a frozen copy of this model is the reference. ``ppo`` and ``rloo`` sample
replies and maximise a reward; ``dpo`` learns from the pairs directly. A reply is a sequence of actions: its tokens and
its end. The result, ``--policy``, is an ordinary run folder. After an interruption, the same command continues.

Read from `train_policy` downwards.
"""

import copy
import logging
import math
import random
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from torch.nn.utils import clip_grad_norm_

import devices
from cli import (
    InputError,
    coefficient,
    command,
    learning_rate,
    positive_number,
    positive_real,
    real_number,
    require_memory,
    share,
    whole_number,
)
from corpora import require_split
from curves import BAR
from decoding import load_checkpoint, readable
from feedback.actions import (
    Actions,
    Context,
    PolicyNetwork,
    ReplyTokens,
    action_logprobs,
    chosen_logprobs,
    divergence,
    pack_actions,
    sample_replies,
)
from feedback.collect import model_hash
from feedback.dyme import Dyme, examples
from feedback.objectives import (
    AdaptiveKL,
    advantages,
    dpo_loss,
    leave_one_out,
    ppo_loss,
    value_loss,
    whitened,
)
from feedback.pairs import append_json_lines, dialog_names, held_out, read_json_lines, unseen_turns, whole_dialog
from feedback.preferences import read_preferences
from feedback.reward import NO_BETTER_THAN_CHANCE, RewardModel, fingerprint
from feedback.snapshot import check_arguments, check_origin, check_preferences, restore_snapshot, save_snapshot
from feedback.utterance_metrics import WEIGHTS, check_libraries, rule_score, weighted
from inputs import Specials, TurnDataset, fit_context, max_reply
from tables import Split, tokenize
from tokenization import save_tokenizer
from utils import add_common_flags, open_dataset
from weights import add_lora_, save_model

EVALUATIONS = "evaluations.jsonl"
logger = logging.getLogger("feedback.policy")


# ----------------------------------------------------------------------------------------------------- rewards


class Reward:
    """The reward of replies: a weighted sum of reward model, utterance metrics and DYME, as the arguments say."""

    def __init__(self, args: Namespace, table):
        self.args, self.model, self.dyme = args, None, None
        self.unfinished = args.unfinished_reward * (bool(args.reward_model) + abs(args.utterance_metrics)
                                                    + abs(args.dyme))
        if args.utterance_metrics or args.dyme:
            check_libraries()
        if args.reward_model:
            self.model = RewardModel(args.reward_model, args.device, args.fp16)
            if self.model.scale["accuracy_interval"][0] <= 0.5:
                logger.warning("%s", NO_BETTER_THAN_CHANCE.format(args.reward_model))
        if args.dyme:
            split = require_split(table, "train", args.dataset or args.dataset_path)
            self.dyme = Dyme(examples(draw_dialogs(split, args.dyme_dialogs)))

    def __call__(self, turns: Sequence[tuple]) -> list[list[float]]:
        """Compute the rewards of all replies of each turn: persona, history and replies as texts."""
        args, said = self.args, [(reply, history) for _, history, replies in turns for reply in replies]
        rewards = [score for scores in self.model(turns) for score in scores] if self.model else [0.0] * len(said)
        if args.utterance_metrics:
            sums = weighted(said, args.weights).tolist()
            rewards = [reward + args.utterance_metrics * one for reward, one in zip(rewards, sums, strict=True)]
        if args.dyme:
            rewards = [reward + args.dyme * self.dyme.reward(*one) for reward, one in zip(rewards, said, strict=True)]
        ready = iter(rewards)
        return [[next(ready) for _ in replies] for _, _, replies in turns]


def draw_dialogs(split: Split, count: int) -> list[list[str]]:
    """Draw ``count`` whole dialogs of a split, as lists of utterances."""
    drawn = random.Random(0).sample(range(len(split)), min(count, len(split)))
    return [whole_dialog(split, dialog) for dialog in drawn]


# ----------------------------------------------------------------------------------------------------- training


class Trainer:
    """The policy, its reference, and a training step of each of the three algorithms."""

    def __init__(self, args: Namespace):
        self.args, self.noted = args, {}
        model, self.tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len,
                                                max_history=args.max_history)
        self.special = Specials.of(self.tokenizer)
        self.network = PolicyNetwork(model, args.fp16)
        self.reference = copy.deepcopy(self.network).requires_grad_(False)
        if args.lora:
            add_lora_(model, self.tokenizer, args.lora, args.model_checkpoint)
            devices.prepare(model, args.device, args.fp16)  # casts the frozen weights once
        # Each reply has at least one action, with logits and log-probabilities of both policy and reference.
        require_memory(4 * 4 * args.batch_size * len(self.tokenizer), f"--batch_size {args.batch_size}")
        self.table = open_dataset(args, self.tokenizer)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0)
        self.kl = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        self.reward: Reward | None = None
        if args.reward_model or args.utterance_metrics or args.dyme:
            self.reward = Reward(args, self.table)
        self.seen = self.reward.model.dialogs() if args.reward_model else []  # by the reward model, later by DPO
        if args.algorithm == "dpo":
            self.pairs = self.preference_pairs()
        else:
            self.contexts = self.dataset("train")
        self.evaluated = self.evaluation_turns()

    def dataset(self, name: str) -> TurnDataset:
        split = require_split(self.table, name, self.args.dataset or self.args.dataset_path)
        model = self.network.model
        return TurnDataset.for_model(model, split, self.tokenizer)

    def turn(self, dataset: TurnDataset, number: int) -> Context:
        """Return a context of the data, without replies."""
        texts = (dataset.split.texts("persona", dataset.split.turn_dialog[number]),
                 dataset.split.texts("history", number))
        return self.fitted(*dataset.context(number), texts, [])

    def fitted(self, persona: list, history: list, texts: tuple, replies: list[ReplyTokens]) -> Context:
        positions, start = self.network.model.max_positions, self.network.model.history_start
        room = positions - self.args.max_length - 2
        if room < max(2, start + 1):
            raise InputError(f"--max_length {self.args.max_length}: the model has {positions} "
                             "positions for context and reply together; choose a smaller --max_length")
        return Context(*fit_context(persona, history, room, start), texts, replies)

    def preference_pairs(self) -> list[Context]:
        """Read the pairs for DPO, with the worse reply first; skipped pairs are counted in the log.

        Collected pairs must come from this model; preferences made elsewhere may come from anybody.
        """
        args, ours = self.args, model_hash(self.reference.model)
        longest = max_reply(self.reference.model.max_positions, self.reference.model.history_start)
        pairs, better, without = read_preferences(args.pairs, args.answers)
        self.noted = check_preferences(Path(args.policy), fingerprint(better))
        self.seen = self.seen + [dialog_names(pair) for pair in pairs.values()]
        apart = held_out(pairs.values(), args.held_out, args.held_out_seed)
        turns, left_out = [], Counter(without)
        for pair, best in better:
            replies = [ReplyTokens(reply["ids"] if pair["model"] else ids, reply["ended"]) for reply, ids in zip(
                pair["replies"], tokenize(self.tokenizer, [reply["text"] for reply in pair["replies"]]), strict=True)]
            if pair["pair"] in apart:
                left_out["held out"] += 1
            elif max(len(reply.ids) for reply in replies) > longest:
                left_out["longer than the model's positions"] += 1
            elif pair["model"] and pair["model"] != ours:
                left_out["written by another model than --model_checkpoint"] += 1
            elif not replies[best].ended:
                left_out["better reply cut: the policy would learn never to end"] += 1
            else:
                turns.append(self.fitted(self.tokenizer.encode_persona(pair["persona"]),
                                         tokenize(self.tokenizer, pair["history"]), (pair["persona"], pair["history"]),
                                         [replies[1 - best], replies[best]]))
        logger.info("%s pairs to learn from; left out: %s", f"{len(turns):,}",
                    "; ".join(f"{count:,} ({reason})" for reason, count in left_out.items()) or "none")
        if not turns:
            raise InputError(f"{args.pairs}: no pair is left to learn from; annotate more pairs from "
                             "--model_checkpoint")
        return turns

    def evaluation_turns(self) -> list[int]:
        """Draw validation turns from dialogs in which neither the reward model nor DPO has pairs."""
        args, dataset = self.args, self.dataset("valid")
        free = unseen_turns(dataset.split, self.seen)
        found = (f"{args.dataset or args.dataset_path}: {len(free):,} of {len(dataset):,} turns of the 'valid' split "
                 "are in dialogs without pairs, on which the policy is evaluated")
        cure = "collect pairs of fewer contexts, or of another split (feedback.collect --split test)"
        if not len(free):
            raise InputError(f"{found}; {cure}")
        if len(free) < min(args.evaluation_contexts, len(dataset)):
            logger.warning("%s, fewer than --evaluation_contexts %s; %s", found, args.evaluation_contexts, cure)
        return np.random.default_rng(0).permutation(free)[:args.evaluation_contexts].tolist()

    # Each of the following methods makes one training step and returns its metrics.

    def step(self, number: int) -> dict[str, float]:
        torch.manual_seed(self.args.seed * 1_000_003 + number)  # so that a training can be resumed at any step
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * (1 - number / self.args.steps)
        return {"ppo": self.ppo, "rloo": self.rloo, "dpo": self.dpo}[self.args.algorithm](number)

    def minimise(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.network.parameters(), self.args.max_norm)
        self.optimizer.step()

    def sample_step(self, number: int) -> tuple[Actions, torch.Tensor, torch.Tensor]:
        """Sample this step's replies; return actions, rewards (replies,) and the reference's log-probabilities."""
        count = self.args.batch_size // self.args.samples
        order = np.random.default_rng([self.args.seed, number]).integers(len(self.contexts), size=count)
        turns = sample_replies(self.network, [self.turn(self.contexts, place) for place in order.tolist()],
                               self.special, self.args.max_length, self.args.samples)
        actions = pack_actions(turns, self.special, self.network.model)
        with torch.no_grad():
            reference = action_logprobs(self.reference(actions.batch)[0], self.special)
        return actions, self.rewards(turns).to(actions.mask.device), reference

    def rewards(self, turns: Sequence[Context]) -> torch.Tensor:
        """Compute the rewards of all replies, (replies,); a reply that was cut gets `Reward.unfinished` instead."""
        texts = [[readable(self.tokenizer, reply.ids) for reply in turn.replies] for turn in turns]
        scores = self.reward([(*turn.texts, said) for turn, said in zip(turns, texts, strict=True)])
        return torch.tensor([score if reply.ended else self.reward.unfinished
                             for turn, row in zip(turns, scores, strict=True)
                             for reply, score in zip(turn.replies, row, strict=True)])

    def ppo(self, number: int) -> dict[str, float]:
        """Make a step of PPO with a penalty on the divergence, as in Ziegler et al. (2019)."""
        args = self.args
        actions, score, reference = self.sample_step(number)
        mask = actions.mask
        with torch.no_grad():
            logits, values = self.network(actions.batch)
            policy = action_logprobs(logits, self.special)
            old, old_values = chosen_logprobs(policy, actions), values[actions.place] * mask
            # Each action is penalised by its log-ratio; the last one also gets the reply's score.
            rewards = -self.kl.price * (old - chosen_logprobs(reference, actions))
            rewards[torch.arange(len(score), device=mask.device), mask.sum(1) - 1] += score
            advantage = advantages(rewards, old_values, mask, args.gamma, args.lam)
            returns = advantage + old_values
            advantage = whitened(advantage, mask)
            kl = self.kl_per_reply(policy, reference, actions)
        for _ in range(args.ppo_epochs):
            logits, values = self.network(actions.batch)
            logprobs = chosen_logprobs(action_logprobs(logits, self.special), actions)
            loss = ppo_loss(logprobs, old, advantage, mask, args.clip)
            error = value_loss(values[actions.place], old_values, returns, mask, args.clip)
            self.minimise(loss + args.value_coef * error)
        price = self.kl.price
        self.kl.update(kl, len(score))
        return {"reward": float(score.mean()), "kl": kl, "price": price, "value_loss": float(error.detach())}

    def rloo(self, number: int) -> dict[str, float]:
        """Make a step of REINFORCE on whole replies, with the mean of the other replies as baseline (RLOO)."""
        actions, score, reference = self.sample_step(number)
        policy = action_logprobs(self.network(actions.batch)[0], self.special)
        logprobs = chosen_logprobs(policy, actions).sum(1)
        with torch.no_grad():
            worth = score - self.kl.price * (logprobs - chosen_logprobs(reference, actions).sum(1))
            advantage = leave_one_out(worth.view(-1, self.args.samples)).flatten()
            kl = self.kl_per_reply(policy, reference, actions)
        self.minimise(-(advantage * logprobs).mean())
        price = self.kl.price
        self.kl.update(kl, len(score))
        return {"reward": float(score.mean()), "kl": kl, "price": price}

    def dpo(self, number: int) -> dict[str, float]:
        """Make a step of direct preference optimisation; each epoch has its own order of pairs."""
        size, total = self.args.batch_size, len(self.pairs)
        numbers = range(number * size, (number + 1) * size)
        orders = {epoch: np.random.default_rng([self.args.seed, epoch]).permutation(total)
                  for epoch in {one // total for one in numbers}}
        places = [orders[one // total][one % total] for one in numbers]
        actions = pack_actions([self.pairs[place] for place in places], self.special, self.network.model)
        with torch.no_grad():
            reference = chosen_logprobs(action_logprobs(self.reference(actions.batch)[0], self.special), actions).sum(1)
        policy = chosen_logprobs(action_logprobs(self.network(actions.batch)[0], self.special), actions).sum(1)
        loss = dpo_loss(policy[1::2], policy[::2], reference[1::2], reference[::2], self.args.beta)
        self.minimise(loss)
        return {"loss": float(loss.detach())}

    def kl_per_reply(self, policy: torch.Tensor, reference: torch.Tensor, actions: Actions) -> float:
        """Return the mean divergence per sampled reply, in nats."""
        return float((divergence(policy, reference)[actions.place] * actions.mask).sum(1).mean())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure replies to the `evaluation_turns`, always sampled with the same seed."""
        torch.manual_seed(self.args.seed)
        dataset, order = self.dataset("valid"), self.evaluated
        kls, scores, rules, replies = [], [], [], []
        for start in range(0, len(order), 64):
            turns = [self.turn(dataset, place) for place in order[start:start + 64]]
            turns = sample_replies(self.network, turns, self.special, self.args.max_length, 1)
            actions = pack_actions(turns, self.special, self.network.model)
            policy, reference = (action_logprobs(network(actions.batch)[0], self.special)
                                 for network in (self.network, self.reference))
            kls.append(self.kl_per_reply(policy, reference, actions) * len(turns))
            replies += [turn.replies[0] for turn in turns]
            if self.reward:
                scores += self.rewards(turns).tolist()
        figures = {"kl": sum(kls) / len(order), "ended": fmean(reply.ended for reply in replies),
                   "tokens": fmean(len(reply.ids) for reply in replies)}
        if self.reward:
            figures["reward"] = fmean(scores)
        if self.args.rule:
            rules = [rule_score(readable(self.tokenizer, reply.ids)) for reply in replies]
            figures |= {"rule": fmean(rules), "rule_deviation": pstdev(rules)}
        return figures


def train_policy(args: Namespace) -> Path:
    """Train a policy and return its run folder."""
    run = Path(args.policy)
    noted = check_arguments(run, args, may_change={"policy", "device", "save_every", "dataset_cache"})
    if (run / "config.json").exists():  # it is written last
        check_origin(run)
        logger.info("%s is finished", run)
        return run
    trainer = Trainer(args)
    state = restore_snapshot(run, trainer.network, trainer.optimizer) or {"step": 0, "price": args.kl_coef}
    done, trainer.kl.price = state["step"], state["price"]
    _forget_evaluations(run, done)

    def evaluate(step: int) -> None:
        figures = {"step": step} | trainer.evaluate()
        append_json_lines(run / EVALUATIONS, [figures])
        logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    engine = Engine(lambda engine, number: trainer.step(number))
    ProgressBar(persist=True, bar_format=BAR).attach(
        engine, output_transform=lambda figures: {name: f"{value:.3g}" for name, value in figures.items()})

    @engine.on(Events.ITERATION_COMPLETED)
    def evaluate_and_save(engine: Engine) -> None:
        step = done + engine.state.iteration
        if not all(math.isfinite(value) for value in engine.state.output.values()):
            raise InputError(f"{run}: step {step}: {engine.state.output} is not finite; lower --lr")
        if step % args.evaluate_every == 0 or step == args.steps:
            evaluate(step)
        if step % args.save_every == 0 or step == args.steps:
            save_snapshot(run, trainer.network, trainer.optimizer,
                          noted | trainer.noted | {"step": step, "price": trainer.kl.price})

    if not done:
        evaluate(0)
    if done < args.steps:
        engine.run(range(done, args.steps), max_epochs=1)
    save_tokenizer(trainer.tokenizer, run)
    save_model(trainer.network.model, run)
    logger.info("The run is in %s", run)
    return run


def _forget_evaluations(run: Path, done: int) -> None:
    """Delete the evaluations after step ``done``; they will be made again."""
    path = run / EVALUATIONS
    if path.exists():
        kept = [record for _, record in read_json_lines(path) if record and record["step"] <= done and done]
        path.unlink()
        append_json_lines(path, kept)


# --------------------------------------------------------------------------------------------- the command line


def parse_args(arguments: Sequence[str] | None = None) -> Namespace:
    """Parse the command line (default: that of ``sys.argv``). Raises `InputError` if flags contradict each other."""
    parser = ArgumentParser(prog="python -m feedback.policy", description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="")
    add = parser.add_argument
    add("--algorithm", choices=["ppo", "rloo", "dpo"], default="ppo", help="training algorithm (default: %(default)s)")
    add("--policy", default="policy", metavar="DIR", help="folder to write (default: %(default)s)")
    add("--steps", type=positive_number, default=200, help="number of training steps (default: %(default)s)")
    add("--batch_size", type=positive_number, default=64, help="replies (dpo: pairs) per step (default: %(default)s)")
    add("--lr", type=learning_rate, default=1e-5, help="learning rate; falls linearly to 0 (default: %(default)s)")
    add("--max_norm", type=positive_real, default=1.0, help="gradients are clipped to this norm (default: %(default)s)")
    add("--max_length", type=positive_number, default=30, help="maximum tokens per reply (default: %(default)s)")
    add("--lora", type=whole_number, default=0, metavar="RANK",
        help="train and save only low-rank updates of the model's weights; 0: off (default: %(default)s)")
    add("--fp16", default="", choices=["", "bf16"], help="compute in bfloat16 where it is safe (default: no)")
    add("--seed", type=whole_number, default=42, help="seed of contexts, replies and order (default: %(default)s)")

    rewards = parser.add_argument_group("rewards of ppo and rloo").add_argument
    rewards("--reward_model", default="", metavar="DIR", help="reward model, with weight 1; dpo only reports it")
    rewards("--utterance_metrics", type=real_number, default=0.0, metavar="W",
            help="weight of the utterance metrics (default: 0, off)")
    for name, weight in WEIGHTS.items():
        rewards(f"--{name}", type=real_number, default=weight, metavar="W",
                help=f"weight of {name} among the utterance metrics (default: %(default)s)")
    rewards("--dyme", type=real_number, default=0.0, metavar="W",
            help="weight of DYME: how near a reply's metrics are to people's at the same place (default: 0, off)")
    rewards("--dyme_dialogs", type=positive_number, default=2000, metavar="N",
            help="training dialogs that DYME learns from (default: %(default)s)")
    rewards("--unfinished_reward", type=real_number, default=-1.0, metavar="R",
            help="reward of a reply that was cut at --max_length, instead of all others; it is multiplied by the sum "
                 "of their weights (default: %(default)s)")

    add = parser.add_argument_group("ppo and rloo").add_argument
    add("--kl_coef", type=coefficient, default=0.2, help="initial weight of the KL penalty (default: %(default)s)")
    add("--kl_target", type=coefficient, default=6.0, metavar="NATS",
        help="KL per reply to which the weight is adapted; 0: constant weight (default: %(default)s)")
    add("--kl_horizon", type=positive_number, default=10_000, metavar="N",
        help="replies over which the weight adapts (default: %(default)s)")
    add("--samples", type=positive_number, default=4, help="replies per context (default: %(default)s)")

    add = parser.add_argument_group("ppo").add_argument
    add("--ppo_epochs", type=positive_number, default=4, help="passes over each batch (default: %(default)s)")
    add("--clip", type=positive_real, default=0.2, help="clipping range of ratios and values (default: %(default)s)")
    add("--gamma", type=share, default=1.0, help="discount factor (default: %(default)s)")
    add("--lam", type=share, default=0.95, help="λ of the advantages (default: %(default)s)")
    add("--value_coef", type=coefficient, default=0.1, help="weight of the value loss (default: %(default)s)")

    add = parser.add_argument_group("dpo").add_argument
    add("--pairs", default="pairs.jsonl", metavar="FILE",
        help="pairs from feedback.collect, or a data set with prompt, chosen and rejected (default: %(default)s)")
    add("--answers", default=["answers.jsonl"], nargs="+", metavar="FILE",
        help="answers from feedback.annotate (default: answers.jsonl)")
    add("--beta", type=positive_real, default=0.1,
        help="strength of the KL penalty; a smaller value allows more change (default: %(default)s)")
    add("--held_out", type=share, default=0.15,
        help="share of the dialogs to leave out, as in feedback.reward (default: %(default)s)")
    add("--held_out_seed", type=whole_number, default=42, help="the --seed of feedback.reward (default: %(default)s)")

    add = parser.add_argument_group("evaluation and snapshots").add_argument
    add("--evaluate_every", type=positive_number, default=50, metavar="N",
        help="evaluate every N steps (default: %(default)s)")
    add("--evaluation_contexts", type=positive_number, default=256, metavar="N",
        help="validation contexts, from dialogs without pairs (default: %(default)s)")
    add("--save_every", type=positive_number, default=50, metavar="N",
        help="save a snapshot every N steps (default: %(default)s)")
    add("--rule", action="store_true", help="also score replies by the simulated annotator's rule")
    args = parser.parse_args(arguments)
    args.weights = {name: getattr(args, name) for name in WEIGHTS}
    follows = args.reward_model or args.utterance_metrics or args.dyme
    if args.algorithm != "dpo" and not follows:
        raise InputError(f"--algorithm {args.algorithm}: needs a reward; give --reward_model, --utterance_metrics or "
                         "--dyme")
    if args.algorithm == "rloo" and args.samples < 2:
        raise InputError("--samples 1: rloo compares replies to the same context; use 2 or more")
    if args.algorithm != "dpo" and args.batch_size % args.samples:
        raise InputError(f"--batch_size {args.batch_size}: is not a multiple of --samples {args.samples}; choose one")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("ignite").setLevel(logging.WARNING)
    command(lambda: train_policy(parse_args()) and None)
