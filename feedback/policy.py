"""Train a model to say what people prefer, without letting it drift from what it was.

    python -m feedback.policy --algorithm ppo --model_checkpoint RUN --reward_model reward --policy policy
    python -m feedback.policy --algorithm dpo --model_checkpoint RUN --pairs pairs.jsonl --answers answers.jsonl …

The fine-tuned model is the policy, and a frozen copy of it the reference from which it must not stray far. ``ppo`` and
``rloo`` sample replies and follow a reward; ``dpo`` learns from the pairs themselves. A reply is a sequence of
actions: its tokens, and its end. What comes out, ``--policy``, is an ordinary run folder. Started again after a kill,
it goes on.

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
from typing import NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from torch import nn
from torch.nn.utils import clip_grad_norm_

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
from decoding import Decoding, generate_replies, load_checkpoint, readable
from feedback.collect import model_hash
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
from feedback.utterance_metrics import WEIGHTS, Dyme, check_libraries, rule_score, weighted
from inputs import IGNORED, Row, Specials, TurnDataset, build_context, collate, fit_context, max_reply, pack_turn
from model import DoubleHeadsModel
from tables import Split, tokenize
from tokenization import save_tokenizer
from utils import add_common_flags, open_dataset
from weights import save_model

EVALUATIONS = "evaluations.jsonl"
NEVER = -1e9  # log-probability of what cannot be done; finite, so that 0 · NEVER is 0
logger = logging.getLogger("feedback.policy")


# ------------------------------------------------------------------------------------------------------ replies


class ReplyTokens(NamedTuple):
    """What was said to a context: token ids, and whether it ended by itself or was cut at the greatest length."""

    ids: list[int]
    ended: bool


class Context(NamedTuple):
    """A context, as token ids that leave room for a reply; as texts, with the whole history; the replies to it."""

    persona: list[list[int]]
    history: list[list[int]]
    texts: tuple[list[str], list[str]]
    replies: list[ReplyTokens]


class Actions(NamedTuple):
    """The actions of a batch of replies, (replies, steps), padded on the right; a context's replies side by side."""

    tokens: torch.Tensor  # the token said; at the end, <eos>
    mask: torch.Tensor  # True where there is one
    place: torch.Tensor  # its line in the logits that `PolicyNetwork` gives of `batch`
    batch: dict[str, torch.Tensor]  # of `inputs.collate`


def label_replies(row: Row, replies: Sequence[ReplyTokens]) -> tuple[Row, list[range]]:
    """The row of `pack_turn` with every reply's actions as labels, and at which of them each reply's are.

    A reply that was cut has no end to label: nobody chose it. Equal replies share their segment of the row, and so
    their labels.
    """
    labels, ranges = [IGNORED] * len(row.labels), []
    for reply, last in zip(replies, row.mc_token_ids[0], strict=True):
        first = last - len(reply.ids)
        stop = last + reply.ended
        labels[first:stop] = row.input_ids[first:stop]
        ranges.append(range(first, stop))
    labelled = np.cumsum([label != IGNORED for label in labels])
    return row._replace(labels=labels), [range(labelled[where.start] - 1, labelled[where.start] - 1 + len(where))
                                         if len(where) else range(0) for where in ranges]


def pack_actions(turns: Sequence[Context], special: Specials, model: DoubleHeadsModel) -> Actions:
    """The actions of all replies of ``turns``, each row holding a context once and all replies to it."""
    rows, places, tokens, offset = [], [], [], 0
    for turn in turns:
        row = pack_turn(turn.persona, turn.history, [reply.ids for reply in turn.replies], special,
                        model.max_positions, model.history_start)
        row, ranges = label_replies(row, turn.replies)
        rows.append(row)
        for reply, where in zip(turn.replies, ranges, strict=True):
            places.append([offset + place for place in where])
            tokens.append(reply.ids + [special.eos] * reply.ended)
        offset += sum(label != IGNORED for label in row.labels)
    steps = max(map(len, tokens))

    def padded(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor([row + [0] * (steps - len(row)) for row in values], device=model.device)

    mask = padded([[1] * len(row) for row in tokens]).bool()
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows, special.pad).items()
             if not name.startswith("mc_")}  # no choice is asked for
    return Actions(padded(tokens), mask, padded(places), batch)


class PolicyNetwork(nn.Module):
    """A policy, and how much reward it expects yet: a value head on the states that the language-model head reads.

    The value head begins at 0 and is not part of the result. There is no dropout: a policy is one distribution.
    """

    def __init__(self, model: DoubleHeadsModel):
        super().__init__()
        self.model = model.eval()
        self.value = nn.Linear(model.get_output_embeddings().weight.shape[1], 1, device=model.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a packed batch, for each label in its order: logits (labels, vocabulary) and values (labels,)."""
        states = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
        try:
            logits = self.model(**batch).logits
        finally:
            hook.remove()
        return logits, self.value(states[0])[:, 0]


def action_logprobs(logits: torch.Tensor, special: Specials) -> torch.Tensor:
    """Logits (…, vocabulary) → log-probabilities of the actions, as many.

    Any control token ends a reply, so they are one action, which stands in the place of ``<eos>``.
    """
    logprobs = logits.log_softmax(-1)
    ends = logprobs[..., list(special)].logsumexp(-1, keepdim=True)
    control = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    control[list(special)] = True
    logprobs = logprobs.masked_fill(control, NEVER)
    return torch.cat([logprobs[..., :special.eos], ends, logprobs[..., special.eos + 1:]], -1)


def chosen_logprobs(logprobs: torch.Tensor, actions: Actions) -> torch.Tensor:
    """(labels, vocabulary) → the log-probability of each action that was taken, (replies, steps); 0 in the padding."""
    return logprobs[actions.place, actions.tokens] * actions.mask


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy ‖ reference) in nats of action log-probabilities (…, vocabulary) → (…).

    The sum over the whole vocabulary, not an estimate from the one token said. Summed over the states of a reply that
    the policy has sampled, its mean is that of the log-ratio of whole replies, with less variance. Written as
    Σ p (q/p - 1 - log q/p), whose every term is at least 0, so that rounding cannot make it negative.
    """
    ratio = (reference - policy).clamp(max=80.0)  # beyond, p is 0 in float32 anyway
    return (policy.exp() * (ratio.expm1() - ratio)).sum(-1)


@torch.no_grad()
def sample_replies(model: DoubleHeadsModel, turns: Sequence[Context], special: Specials, max_length: int,
                   samples: int) -> list[Context]:
    """``turns`` with ``samples`` replies each, drawn from the model's own distribution: no filter, no temperature."""
    how = Decoding(temperature=1.0, top_p=0.0, max_length=max_length, min_length=0)
    contexts = [build_context(turn.persona, turn.history, special, model.history_start) for turn in turns]
    ids = generate_replies(model, contexts, special, how, samples=samples)
    replies = [ReplyTokens(one, len(one) < max_length) for one in ids]
    return [turn._replace(replies=replies[place * samples:(place + 1) * samples]) for place, turn in enumerate(turns)]


# ----------------------------------------------------------------------------------------------------- rewards


class Reward:
    """What replies are worth: the reward model's word, utterance metrics, DYME, as the arguments ask for them."""

    def __init__(self, args: Namespace, table):
        self.args, self.model, self.dyme = args, None, None
        self.unfinished = args.unfinished_reward * (bool(args.reward_model) + abs(args.utterance_metrics)
                                                    + abs(args.dyme))
        if args.utterance_metrics or args.dyme:
            check_libraries()
        if args.reward_model:
            self.model = RewardModel(args.reward_model, args.device)
            if self.model.scale["accuracy_interval"][0] <= 0.5:
                logger.warning("%s", NO_BETTER_THAN_CHANCE.format(args.reward_model))
        if args.dyme:
            split = require_split(table, "train", args.dataset or args.dataset_path)
            self.dyme = Dyme(draw_dialogs(split, args.dyme_dialogs))

    def __call__(self, turns: Sequence[tuple]) -> list[list[float]]:
        """Rewards of the replies of each turn (persona, history, replies), all texts."""
        args = self.args
        model = self.model(turns) if self.model else [[0.0] * len(replies) for _, _, replies in turns]
        rewards = []
        for (_, history, replies), scores in zip(turns, model, strict=True):
            rewards.append([
                score + (args.utterance_metrics and args.utterance_metrics * weighted(reply, history, args.weights))
                + (args.dyme and args.dyme * self.dyme.reward(reply, history))
                for reply, score in zip(replies, scores, strict=True)])
        return rewards


def draw_dialogs(split: Split, count: int) -> list[list[str]]:
    """``count`` whole dialogs of a split as lists of utterances."""
    drawn = random.Random(0).sample(range(len(split)), min(count, len(split)))
    return [whole_dialog(split, dialog) for dialog in drawn]


# ----------------------------------------------------------------------------------------------------- training


class Trainer:
    """The policy, its reference, and the three ways to make a step."""

    def __init__(self, args: Namespace):
        self.args, self.noted = args, {}
        model, self.tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len,
                                                max_history=args.max_history)
        self.special = Specials.of(self.tokenizer)
        self.network = PolicyNetwork(model)
        self.reference = copy.deepcopy(self.network).requires_grad_(False)
        # Of each reply at least one action, and of that the logits of policy and reference and their logarithms.
        require_memory(4 * 4 * args.batch_size * len(self.tokenizer), f"--batch_size {args.batch_size}")
        self.table = open_dataset(args, self.tokenizer)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0)
        self.kl = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        self.reward: Reward | None = None
        if args.reward_model or args.utterance_metrics or args.dyme:
            self.reward = Reward(args, self.table)
        self.seen = self.reward.model.dialogs() if args.reward_model else []  # by who judges or teaches the policy
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
        """A context of the data, without replies."""
        texts = (dataset.split.texts("persona", dataset.split.turn_dialog[number]),
                 dataset.split.texts("history", number))
        return self.fitted(*dataset.context(number), texts, [])

    def fitted(self, persona: list, history: list, texts: tuple, replies: list[ReplyTokens]) -> Context:
        positions, start = self.network.model.max_positions, self.network.model.history_start
        room = positions - self.args.max_length - 2
        if room < max(2, start + 1):
            raise InputError(f"--max_length {self.args.max_length}: the model has {positions} "
                             "positions for context and reply together; ask for shorter replies")
        return Context(*fit_context(persona, history, room, start), texts, replies)

    def preference_pairs(self) -> list[Context]:
        """What DPO learns from, the worse reply first: pairs of this very model, or preferences made elsewhere.

        What is left out is counted.
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
                left_out["said by another model than --model_checkpoint"] += 1
            elif not replies[best].ended:
                left_out["better reply cut: from these it would learn never to end"] += 1
            else:
                turns.append(self.fitted(self.tokenizer.encode_persona(pair["persona"]),
                                         tokenize(self.tokenizer, pair["history"]), (pair["persona"], pair["history"]),
                                         [replies[1 - best], replies[best]]))
        logger.info("%s pairs to learn from; left out: %s", f"{len(turns):,}",
                    "; ".join(f"{count:,} ({reason})" for reason, count in left_out.items()) or "none")
        if not turns:
            raise InputError(f"{args.pairs}: no pair is left to learn from; annotate more pairs that "
                             "--model_checkpoint has said")
        return turns

    def evaluation_turns(self) -> list[int]:
        """``--evaluation_contexts`` turns of validation, of dialogs that neither reward model nor DPO has pairs of."""
        args, dataset = self.args, self.dataset("valid")
        free = unseen_turns(dataset.split, self.seen)
        found = (f"{args.dataset or args.dataset_path}: {len(free):,} of {len(dataset):,} turns of the 'valid' split "
                 "are of dialogs that no pair is from, which the policy is evaluated on")
        cure = "collect pairs of fewer contexts, or of another split (feedback.collect --split test)"
        if not len(free):
            raise InputError(f"{found}; {cure}")
        if len(free) < min(args.evaluation_contexts, len(dataset)):
            logger.warning("%s, fewer than --evaluation_contexts %s; %s", found, args.evaluation_contexts, cure)
        return np.random.default_rng(0).permutation(free)[:args.evaluation_contexts].tolist()

    # Each of the following makes one step and returns figures of it.

    def step(self, number: int) -> dict[str, float]:
        torch.manual_seed(self.args.seed * 1_000_003 + number)  # so that a place in the training is a number
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * (1 - number / self.args.steps)
        return {"ppo": self.ppo, "rloo": self.rloo, "dpo": self.dpo}[self.args.algorithm](number)

    def minimise(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.network.parameters(), self.args.max_norm)
        self.optimizer.step()

    def sample_step(self, number: int) -> tuple[Actions, torch.Tensor, torch.Tensor]:
        """Sampled replies of this step: actions, rewards (replies,), and the reference's log-probabilities, all."""
        count = self.args.batch_size // self.args.samples
        order = np.random.default_rng([self.args.seed, number]).integers(len(self.contexts), size=count)
        turns = sample_replies(self.network.model, [self.turn(self.contexts, place) for place in order.tolist()],
                               self.special, self.args.max_length, self.args.samples)
        actions = pack_actions(turns, self.special, self.network.model)
        with torch.no_grad():
            reference = action_logprobs(self.reference(actions.batch)[0], self.special)
        return actions, self.rewards(turns).to(actions.mask.device), reference

    def rewards(self, turns: Sequence[Context]) -> torch.Tensor:
        """Of all replies, (replies,); one that was cut is worth `Reward.unfinished`, whatever it says."""
        texts = [[readable(self.tokenizer, reply.ids) for reply in turn.replies] for turn in turns]
        scores = self.reward([(*turn.texts, said) for turn, said in zip(turns, texts, strict=True)])
        return torch.tensor([score if reply.ended else self.reward.unfinished
                             for turn, row in zip(turns, scores, strict=True)
                             for reply, score in zip(turn.replies, row, strict=True)])

    def ppo(self, number: int) -> dict[str, float]:
        """Proximal policy optimisation of reward less the price of the divergence, as Ziegler et al. (2019) do it."""
        args = self.args
        actions, score, reference = self.sample_step(number)
        mask = actions.mask
        with torch.no_grad():
            logits, values = self.network(actions.batch)
            policy = action_logprobs(logits, self.special)
            old, old_values = chosen_logprobs(policy, actions), values[actions.place] * mask
            # Each action pays for its log-ratio; the reply's score comes with its last one.
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
        """REINFORCE with the other replies' mean as baseline, of whole replies (Ahmadian et al. 2024)."""
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
        """Direct preference optimisation of the pairs, each epoch in an order of its own."""
        size, total = self.args.batch_size, len(self.pairs)
        places = []
        for place in range(number * size, (number + 1) * size):
            order = np.random.default_rng([self.args.seed, place // total]).permutation(total)
            places.append(order[place % total])
        actions = pack_actions([self.pairs[place] for place in places], self.special, self.network.model)
        with torch.no_grad():
            reference = chosen_logprobs(action_logprobs(self.reference(actions.batch)[0], self.special), actions).sum(1)
        policy = chosen_logprobs(action_logprobs(self.network(actions.batch)[0], self.special), actions).sum(1)
        loss = dpo_loss(policy[1::2], policy[::2], reference[1::2], reference[::2], self.args.beta)
        self.minimise(loss)
        return {"loss": float(loss.detach())}

    def kl_per_reply(self, policy: torch.Tensor, reference: torch.Tensor, actions: Actions) -> float:
        """Mean over sampled replies of the divergence summed over their states, in nats."""
        return float((divergence(policy, reference)[actions.place] * actions.mask).sum(1).mean())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Figures of replies to the contexts of `evaluation_turns`, the same each time, sampled under one seed."""
        torch.manual_seed(self.args.seed)
        dataset, order = self.dataset("valid"), self.evaluated
        kls, scores, rules, replies = [], [], [], []
        for start in range(0, len(order), 64):
            turns = [self.turn(dataset, place) for place in order[start:start + 64]]
            turns = sample_replies(self.network.model, turns, self.special, self.args.max_length, 1)
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
    """The whole training; returns the run folder."""
    run = Path(args.policy)
    noted = check_arguments(run, args, may_change={"policy", "device", "save_every", "dataset_cache"})
    if (run / "model.safetensors").exists():  # which is the last that is written
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
            raise InputError(f"{run}: step {step}: {engine.state.output}, not finite; lower --lr")
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
    """Those after the snapshot that training goes on from come again."""
    path = run / EVALUATIONS
    if path.exists():
        kept = [record for _, record in read_json_lines(path) if record and record["step"] <= done and done]
        path.unlink()
        append_json_lines(path, kept)


# --------------------------------------------------------------------------------------------- the command line


def parse_args(arguments: Sequence[str] | None = None) -> Namespace:
    """The command line, ``sys.argv``'s unless given."""
    parser = ArgumentParser(prog="python -m feedback.policy", description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="")
    add = parser.add_argument
    add("--algorithm", choices=["ppo", "rloo", "dpo"], default="ppo", help="(default: %(default)s)")
    add("--policy", default="policy", metavar="DIR", help="folder of the result (default: %(default)s)")
    add("--steps", type=positive_number, default=200, help="batches (default: %(default)s)")
    add("--batch_size", type=positive_number, default=64, help="replies a step; of dpo, pairs (default: %(default)s)")
    add("--lr", type=learning_rate, default=1e-5, help="learning rate; falls linearly to 0 (default: %(default)s)")
    add("--max_norm", type=positive_real, default=1.0, help="gradients are clipped to this norm (default: %(default)s)")
    add("--max_length", type=positive_number, default=30, help="of a reply, in tokens (default: %(default)s)")
    add("--seed", type=whole_number, default=42, help="of contexts, replies and order (default: %(default)s)")

    rewards = parser.add_argument_group("what ppo and rloo follow").add_argument
    rewards("--reward_model", default="", metavar="DIR", help="of feedback.reward; counts once. dpo only measures it")
    rewards("--utterance_metrics", type=real_number, default=0.0, metavar="W",
            help="count the utterance metrics W times (default: not at all)")
    for name, weight in WEIGHTS.items():
        rewards(f"--{name}", type=real_number, default=weight, metavar="W",
                help=f"weight of {name} among the utterance metrics (default: %(default)s)")
    rewards("--dyme", type=real_number, default=0.0, metavar="W",
            help="count W times how far a reply's metrics are what people's are at its place, scaled as the reward "
                 "model is (default: not at all)")
    rewards("--dyme_dialogs", type=positive_number, default=2000, metavar="N",
            help="training dialogs that DYME learns from (default: %(default)s)")
    rewards("--unfinished_reward", type=real_number, default=-1.0, metavar="R",
            help="of a reply that was cut at --max_length, instead of all others, times what these count together: 1 "
                 "for the reward model, and each W (default: %(default)s)")

    add = parser.add_argument_group("ppo and rloo").add_argument
    add("--kl_coef", type=coefficient, default=0.2, help="price of a nat at first (default: %(default)s)")
    add("--kl_target", type=coefficient, default=6.0, metavar="NATS",
        help="a reply, for which the price is steered; 0: it stays (default: %(default)s)")
    add("--kl_horizon", type=positive_number, default=10_000, metavar="N",
        help="replies over which it is steered (default: %(default)s)")
    add("--samples", type=positive_number, default=4, help="replies a context (default: %(default)s)")

    add = parser.add_argument_group("ppo").add_argument
    add("--ppo_epochs", type=positive_number, default=4, help="over each batch (default: %(default)s)")
    add("--clip", type=positive_real, default=0.2, help="of ratio and value (default: %(default)s)")
    add("--gamma", type=share, default=1.0, help="discount (default: %(default)s)")
    add("--lam", type=share, default=0.95, help="λ of the advantages (default: %(default)s)")
    add("--value_coef", type=coefficient, default=0.1, help="weight of the value loss (default: %(default)s)")

    add = parser.add_argument_group("dpo").add_argument
    add("--pairs", default="pairs.jsonl", metavar="FILE",
        help="of feedback.collect, or preferences made elsewhere: lines with prompt, chosen and rejected (default: "
             "%(default)s)")
    add("--answers", default=["answers.jsonl"], nargs="+", metavar="FILE",
        help="of feedback.annotate (default: answers.jsonl)")
    add("--beta", type=positive_real, default=0.1,
        help="the less, the further from the reference (default: %(default)s)")
    add("--held_out", type=share, default=0.15, help="as in feedback.reward (default: %(default)s)")
    add("--held_out_seed", type=whole_number, default=42, help="feedback.reward's --seed (default: %(default)s)")

    add = parser.add_argument_group("evaluation and kills").add_argument
    add("--evaluate_every", type=positive_number, default=50, metavar="N", help="steps (default: %(default)s)")
    add("--evaluation_contexts", type=positive_number, default=256, metavar="N",
        help="of validation, in dialogs that no pair is from (default: %(default)s)")
    add("--save_every", type=positive_number, default=50, metavar="N",
        help="steps after which a killed training can go on (default: %(default)s)")
    add("--rule", action="store_true", help="also measure what the simulated annotator would say of the replies")
    args = parser.parse_args(arguments)
    args.weights = {name: getattr(args, name) for name in WEIGHTS}
    follows = args.reward_model or args.utterance_metrics or args.dyme
    if args.algorithm != "dpo" and not follows:
        raise InputError(f"--algorithm {args.algorithm}: follows a reward; give --reward_model, --utterance_metrics or "
                         "--dyme")
    if args.algorithm == "rloo" and args.samples < 2:
        raise InputError("--samples 1: rloo compares the replies to a context; ask for 2 or more")
    if args.algorithm != "dpo" and args.batch_size % args.samples:
        raise InputError(f"--batch_size {args.batch_size}: is no multiple of --samples {args.samples}")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("ignite").setLevel(logging.WARNING)
    command(lambda: train_policy(parse_args()) and None)
