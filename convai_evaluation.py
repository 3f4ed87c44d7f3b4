"""Compute ConvAI2's metrics on the validation split: hits@1, perplexity and F1; also consistency with the persona.

    python convai_evaluation.py --eval_type hits@1 --model_checkpoint RUN
    python convai_evaluation.py --eval_type consistency --no_sample --model_checkpoint RUN
    parlai eval_model -m convai_evaluation:TransformerAgent -t convai2 --model_checkpoint RUN

The last command runs the model as a ParlAI agent.
"""

import json
import logging
import math
import re
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

from cli import InputError, command, positive_number
from consistency import QUESTIONS, VERDICTS, Question, judge, read_questions, shares
from corpora import read_lines, require_split
from decoding import (
    Decoding,
    add_decoding_flags,
    add_family_flag,
    fitted_context,
    generate_replies,
    load_checkpoint,
    readable,
)
from embeddings import FEWEST_OTHERS, encoder, persona_use
from inputs import TurnDataset, build_reply, collate, pack_turn
from metrics import choice_metrics, count_words, intervals, perplexities, reply_metrics, turn_values
from model import DoubleHeadsModel, autocast
from outputs import answers, choice_scores, gold_likelihoods, replies, word_shares
from packing import prepare_to_decode_
from report import compare_models, figure, write_report
from tables import Split, tokenize
from templates import tokens_for_chat
from tokenization import Tokenizer
from utils import add_common_flags, open_dataset
from words import normalized

try:
    from parlai.core.agents import Agent
except ImportError:  # only `TransformerAgent` needs ParlAI, which `make parlai` installs separately
    Agent = object

ASKED = ("persona", "history", "question", "kind")  # the fields of a question that its record keeps
logger = logging.getLogger("convai_evaluation")


# -------------------------------------------------------------------------------------------------- all of them


def require_training(args: Namespace, tokenizer: Tokenizer) -> None:
    """Raise `InputError` for hits@1 or perplexity of a model without trained heads and control tokens."""
    if tokenizer.own_names and args.eval_type not in ("f1", "consistency"):
        raise InputError(f"--eval_type {args.eval_type}: {args.model_checkpoint} has never been trained with the "
                         "control tokens and the choice head of this project; train it (train.py --model_checkpoint), "
                         "or use --eval_type f1 or consistency, which use the model's own chat template")


def read_predictions(path: str, split: Split, kinds: list[str],
                     questions: Sequence[Question]) -> tuple[dict[str, list[dict]], list[dict]]:
    """Read a file of ``--predictions``: the records of the turns for each of the ``kinds``, and of the ``questions``.

    Without consistency among the kinds, no question is read. Raises `InputError` if the file is about other turns or
    questions, or was made by another ``--eval_type``.
    """
    records: list[dict] = []
    asked: list[dict] = []
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
            if isinstance(record, dict) and "question" in record:
                asked.append(record)
                continue
            gold = split.texts("candidates", len(records)) if len(records) < split.num_turns else [None]
            if record["gold"] != gold[-1] or record["context"] != split.texts("history", len(records)) or \
                    len(record.get("scores", gold)) != len(gold):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise InputError(f"--compare {path}: line {number} is not about turn {len(records)} of these data; write "
                             "the file with --predictions on the same data") from None
        records.append(record)
    needed = {"hits@1": {"scores"}, "ppl": {"nll", "tokens", "word_nll", "words"}, "f1": {"reply"},
              "consistency": {"reply", "use_of_persona"}}
    for kind in kinds:
        chosen = kind == "f1" and any("scores" in record and "nll" not in record for record in records)
        if len(records) < split.num_turns or chosen or not all(needed[kind] <= record.keys() for record in records):
            raise InputError(f"--compare {path}: lacks the {kind} of some of the {split.num_turns:,} turns; write it "
                             f"with --predictions and --eval_type {kind}" + " or all" * (kind != "consistency"))
    if "consistency" not in kinds:
        return {kind: records for kind in kinds}, []
    if not (len(asked) == len(questions) and all(
            one.get("verdict") in VERDICTS and "reply" in one and
            all(one.get(field) == getattr(other, field) for field in ASKED)
            for one, other in zip(asked, questions, strict=True))):
        raise InputError(f"--compare {path}: has other questions; write it with --predictions and the same --questions")
    return {kind: records for kind in kinds}, asked


def question_records(model: DoubleHeadsModel, tokenizer: Tokenizer, questions: Sequence[Question], decoding: Decoding,
                     batch_size: int) -> list[dict]:
    """Ask the model the questions about its persona, and return a record per question with ``reply``, ``verdict``."""
    said = dict(tqdm(answers(model, tokenizer, questions, decoding, batch_size), total=len(questions),
                     desc="consistency, questions", unit=" questions"))
    return [{field: getattr(question, field) for field in ASKED} |
            {"reply": said[number], "verdict": judge(said[number], question)}
            for number, question in enumerate(questions)]


def add_persona_use(records: list[dict], split: Split) -> None:
    """Add to each turn's record `persona_use` of the reply and of the gold reply, and the nearest persona sentence."""
    personas = [split.texts("persona", dialog) for dialog in split.turn_dialog.tolist()]
    if (distinct := len(set(map(tuple, filter(None, personas))))) <= FEWEST_OTHERS:
        logger.warning("Use of persona is a poor measure where a split has %s or fewer different personas; this one "
                       "has %s", FEWEST_OTHERS, distinct)
    gold = [split.texts("candidates", turn)[-1] for turn in range(split.num_turns)]
    found = persona_use([*(record["reply"] for record in records), *gold], personas * 2)
    for record, (use, sentence), (of_gold, _) in zip(records, found, found[len(records):], strict=False):
        record |= {"use_of_persona": None if math.isnan(use) else use, "nearest_sentence": sentence,
                   "gold_use_of_persona": None if math.isnan(of_gold) else of_gold}


def evaluate(args: Namespace) -> dict[str, float]:
    """Evaluate the model on the validation split, as ``--eval_type`` says, and return the figures by name."""
    if args.predictions:  # fail before the work if the file cannot be written
        with _writing(f"--predictions {args.predictions}"):
            open(args.predictions, "a").close()
    if args.report:
        with _writing(f"--report {args.report}"):
            Path(args.report).mkdir(parents=True, exist_ok=True)
    kinds = ["hits@1", "ppl", "f1"] if args.eval_type == "all" else [args.eval_type]
    questions = read_questions(args.questions) if "consistency" in kinds else []
    if questions:
        encoder()  # fails before the work if it is not installed
    model, tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len,
                                       None if args.fp16 else "", args.max_history)
    model.config.no_persona = model.no_persona or args.no_persona
    require_training(args, tokenizer)
    table = open_dataset(args, tokenizer)
    split = require_split(table, "valid", args.dataset or args.dataset_path)
    others, asked_others = read_predictions(args.compare, split, kinds, questions) if args.compare else ({}, [])
    records: dict[str, list[dict]] = {}
    asked: list[dict] = []
    figures: dict[str, float] = {}

    def dataset(num_candidates: int) -> TurnDataset:
        return TurnDataset.for_model(model, split, tokenizer, num_candidates=num_candidates)

    def collect(stream: Iterator[tuple[int, dict]], name: str) -> list[dict]:
        """Return the records in the order of the turns."""
        collected: list[dict] = [{}] * split.num_turns
        for turn, record in tqdm(stream, total=split.num_turns, desc=name, unit=" turns"):
            collected[turn] = record
        return collected

    all_candidates, gold_only = dataset(0), dataset(1)  # only hits@1 needs distractors
    if too_long := (all_candidates if "hits@1" in kinds else gold_only).lengths()[1]:
        logger.warning("%s turns exceed the model's positions and lose some of their context", f"{too_long:,}")
    if "hits@1" in kinds:
        records["hits@1"] = collect(choice_scores(model, all_candidates, args.batch_size, args.fp16), "hits@1")
        figures |= choice_metrics(records["hits@1"], split)
    if "ppl" in kinds:
        likelihoods = gold_likelihoods(model, gold_only, tokenizer, count_words(table), args.batch_size,
                                       args.fp16, args.legacy_gpt2_words)
        records["ppl"] = collect(likelihoods, "ppl")
        figures |= perplexities(records["ppl"])
    if args.fp16 and ("f1" in kinds or "consistency" in kinds):
        prepare_to_decode_(model, args.device, args.fp16)  # each token reads all weights; above, autocast reads float32
    if "f1" in kinds:
        runs = []
        for seed in range(args.seed, args.seed + args.seeds):
            decoding = Decoding.of(args).over(seed=seed)
            name = f"f1, seed {seed}" if args.seeds > 1 else "f1"
            records["f1"] = collect(replies(model, gold_only, tokenizer, decoding, args.batch_size), name)
            runs.append(reply_metrics(records["f1"], split, model.max_history))
        figures |= {name: fmean(run[name] for run in runs) for name in runs[0]}  # replaces the F1 of the choices
        if args.seeds > 1:
            figures["F1 spread"] = stdev(run["F1"] for run in runs)
    if "consistency" in kinds:
        asked = question_records(model, tokenizer, questions, Decoding.of(args), args.batch_size)
        found = shares([one["verdict"] for one in asked])
        figures |= {f"Questions {verdict}": share for verdict, (share, _, _) in found.items()}
        logger.info("95 %% intervals of the %s questions (Wilson): %s", f"{len(asked):,}",
                    ", ".join(f"{verdict} {low:.3f} to {high:.3f}" for verdict, (_, low, high) in found.items()))
        records["consistency"] = collect(replies(model, gold_only, tokenizer, Decoding.of(args), args.batch_size),
                                         "consistency, turns")
        add_persona_use(records["consistency"], split)
        figures |= {name: float(values.sum() / weights.sum()) for name, (values, weights) in
                    turn_values({"consistency": records["consistency"]}, split).items()}
    if ranges := intervals(records, split):
        logger.info("95 %% intervals (bootstrap with 1,000 samples of dialogs): %s",
                    ", ".join(f"{name} {figure(low)} to {figure(high)}" for name, (low, high) in ranges.items()))
    comparison = compare_models(records, others, split, args.compare, (asked, asked_others)) if others else None
    if comparison:
        for name, one in comparison["metrics"].items():
            logger.info("%s: %s, %s in %s; difference %+.4g (95 %% interval %+.4g to %+.4g), p = %.4f", name,
                        figure(one["first"]), figure(one["second"]), args.compare, one["difference"], one["low"],
                        one["high"], one["p"])
    if args.predictions:
        lines = [{"context": split.texts("history", turn), "gold": split.texts("candidates", turn)[-1]} |
                 {name: value for record in of_turn for name, value in record.items()}
                 for turn, of_turn in enumerate(zip(*records.values(), strict=True))] + asked
        with _writing(f"--predictions {args.predictions}"), open(args.predictions, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if args.report:
        with _writing(f"--report {args.report}"):
            write_report(Path(args.report), figures, vars(args), split, model.max_history,
                         records.get("hits@1"), records.get("f1", records.get("consistency")), comparison, asked)
    return figures


@contextmanager
def _writing(flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag}: cannot be written ({error.strerror}); "
                         "name a place in a folder you may write to") from None


# ------------------------------------------------------------------------------------------------------- ParlAI


class TransformerAgent(Agent):
    """A ParlAI agent, for ParlAI's evaluation loop and interactive chat.

    With ``--eval_type hits@1`` the agent ranks the candidates of an observation (``text_candidates``, the best first;
    on ties, the earlier one first). Otherwise, or without candidates, it generates a reply. The history has the gold
    replies of earlier turns if the task gives them, otherwise the agent's own replies. ParlAI's convai2 task sends the
    persona as lines of the first text; unlike the published JSON, it omits the space before a final full stop, so the
    agent inserts this space.
    """

    @classmethod
    def add_cmdline_args(cls, parser, partial_opt=None):
        add_common_flags(parser, model_checkpoint="")
        add_agent_flags(parser)
        return parser

    def __init__(self, opt, shared=None):
        super().__init__(opt, shared)
        self.id = "TransferTransfo"
        if shared:
            self.args, self.model, self.tokenizer, self.counted = (
                shared[name] for name in ("args", "model", "tokenizer", "counted"))
        else:
            parser = ArgumentParser()
            add_common_flags(parser, model_checkpoint="")
            add_agent_flags(parser)
            self.args = parser.parse_args([])
            for name, default in vars(self.args).items():
                setattr(self.args, name, opt.get(name, default))
            half = self.args.fp16 if self.args.eval_type == "f1" or not self.args.fp16 else None  # None: autocast
            self.model, self.tokenizer = load_checkpoint(self.args.model_checkpoint, self.args.device,
                                                         self.args.max_len, half, self.args.max_history)
            torch.manual_seed(self.args.seed)
            self.counted = Counter()  # observations that cannot be scored properly, by reason
        require_training(self.args, self.tokenizer)
        self.special, self.decoding = tokens_for_chat(self.tokenizer), Decoding.of(self.args)
        self.reset()

    def share(self):
        names = ("args", "model", "tokenizer", "counted")
        return super().share() | {name: getattr(self, name) for name in names}

    def reset(self):
        """Forget persona and history."""
        self.persona, self.history = [], []  # texts
        self.answer = None  # the last turn's reply for the history: the gold reply, or the agent's own
        self.ended = False
        self.observation = None

    def observe(self, observation):
        """Receive a turn and return it with ``persona`` and ``history``, the texts that the model will read."""
        if self.ended:
            self.reset()
        self.ended = bool(observation.get("episode_done"))
        self.observation = dict(observation)
        if not observation.get("text"):
            return self.observation
        said = []
        for line in observation["text"].split("\n"):
            who, persona, sentence = line.partition("persona: ")
            if persona and who == "your ":
                self.persona.append(re.sub(r"(?<=[^\s.])\.$", " .", sentence))
            elif not persona or who != "partner's ":
                said.append(line)
        if self.answer is not None:
            self.history.append(self.answer)
        self.history.append(" ".join(said))
        labels = observation.get("eval_labels") or observation.get("labels")
        candidates = observation.get("label_candidates")
        self.answer = labels[0] if labels else None
        if labels and not any(map(str.strip, labels)):
            self.counted["turns whose gold reply is empty"] += 1
        if labels and self.args.eval_type == "hits@1":
            if not candidates:
                self.counted["turns without candidates: a reply is generated instead"] += 1
            elif not any(normalized(text) in list(map(normalized, labels)) for text in candidates):
                self.counted["turns whose candidates lack the gold reply: never a hit"] += 1
        self.observation |= {"persona": list(self.persona),
                             "history": self.history[-(2 * self.model.max_history + 1):]}
        return self.observation

    def act(self):
        reply = self.batch_act([self.observation])[0]
        self.self_observe(reply)
        return reply

    def self_observe(self, reply):
        """Remember the agent's own reply for the history, unless there is a gold reply."""
        if self.answer is None and reply.get("text"):
            self.answer = reply["text"]

    def batch_act(self, observations):
        """Answer the observations of several copies of the agent: rank in one batch, generate in another."""
        acts = [{"id": self.id} for _ in observations]
        turns = [(act, one) for act, one in zip(acts, observations, strict=True) if "history" in one]
        ranking = [turn for turn in turns if self.args.eval_type == "hits@1" and turn[1].get("label_candidates")]
        replying = [turn for turn in turns if not any(turn is other for other in ranking)]
        if ranking:
            self._rank(*zip(*ranking, strict=True))
        if replying:
            self._reply(*zip(*replying, strict=True))
        return acts

    def _ids(self, observation) -> tuple[list[list[int]], list[list[int]]]:
        """Return persona and history as token ids."""
        persona = [] if self.model.no_persona else observation["persona"]
        return self.tokenizer.encode_persona(persona), tokenize(self.tokenizer, observation["history"])

    @torch.inference_mode()
    def _rank(self, acts, observations) -> None:
        rows = [pack_turn(*self._ids(one), tokenize(self.tokenizer, list(one["label_candidates"])), self.special,
                          self.model.max_positions, self.model.history_start) for one in observations]
        with autocast(self.args.device, self.args.fp16):
            batch = collate(rows, self.special.pad)
            out = self.model(**{name: tensor.to(self.args.device) for name, tensor in batch.items()})
        for act, one, scores in zip(acts, observations, out.mc_logits.tolist(), strict=True):
            ranked = sorted(zip(one["label_candidates"], scores, strict=False), key=lambda pair: -pair[1])
            act["text_candidates"] = [text for text, _ in ranked]
            act["text"] = ranked[0][0]

    def _reply(self, acts, observations) -> None:
        contexts = [fitted_context(self.model, *self._ids(one), self.special, self.decoding.max_length)
                    for one in observations]
        for act, reply in zip(acts, generate_replies(self.model, contexts, self.special, self.decoding), strict=True):
            act["text"] = readable(self.tokenizer, reply)

    @torch.inference_mode()
    def next_word_probability(self, partial_out: list[str]) -> dict[str, float]:
        """Return the probability of each dictionary word after the first words of a reply to the last observation.

        The dictionary has the words of ``--dataset_path``.
        """
        if not hasattr(self, "shares"):
            table = open_dataset(self.args, self.tokenizer)
            self.shares = word_shares(count_words(table), self.tokenizer, self.args.legacy_gpt2_words)
        beginning = tokenize(self.tokenizer, [" ".join(partial_out)])[0] if partial_out else []
        context = fitted_context(self.model, *self._ids(self.observation), self.special, len(beginning) + 1)
        reply = build_reply(beginning, self.special, with_eos=False)
        ids, types = torch.tensor([context.ids + reply.ids]), torch.tensor([context.types + reply.types])
        positions = context.start + torch.arange(ids.shape[1])[None]
        out = self.model(ids.to(self.model.device), token_type_ids=types.to(self.model.device),
                         position_ids=positions.to(self.model.device), logits_to_keep=1)
        return self.shares[bool(partial_out)].probabilities(out.logits[0, -1])

    def shutdown(self):
        for what, count in self.counted.items():
            logger.warning("%s %s", f"{count:,}", what)
        super().shutdown()


def evaluate_in_parlai(batch_size: int, flags: list[str]) -> None:
    """Evaluate the agent with ParlAI's own loop on ParlAI's convai2 task (``--parlai``)."""
    try:
        from parlai.scripts.eval_model import EvalModel
    except ImportError:
        raise InputError("--parlai: ParlAI is not installed here; `make parlai` builds an environment with it, then "
                         "`.venv-parlai/bin/python convai_evaluation.py --parlai …`") from None
    report = EvalModel.main("-m", "convai_evaluation:TransformerAgent", "-t", "convai2", "-dt", "valid",
                            "-bs", str(batch_size), *flags)
    for name in ("Hits@1", "Hits@5", "Hits@10", "F1", "Accuracy"):
        if name.lower() in report:
            print(f"FINAL {name}: {float(report[name.lower()]):.4g}")


# --------------------------------------------------------------------------------------------- the command line


def add_agent_flags(parser) -> None:
    """Add the flags that this script and the ParlAI agent share, besides the common flags."""
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_type", default="hits@1", choices=["hits@1", "ppl", "f1", "all", "consistency"],
        help="what to measure; all: ConvAI2's three metrics; consistency: whether replies agree with the persona and "
             "use it (default: %(default)s)")
    add("--legacy_gpt2_words", action="store_true",
        help="ppl: look words up without their leading space, as the 2019 code did by mistake with GPT-2")
    add_decoding_flags(parser)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_agent_flags(parser)
    add_common_flags(parser, model_checkpoint="")
    add_family_flag(parser)
    add = parser.add_argument_group("output").add_argument
    add("--seeds", type=positive_number, default=1, metavar="N",
        help="f1: decode N times, with --seed, --seed + 1, …; report mean and standard deviation (default: 1)")
    add("--batch_size", type=positive_number, default=16, help="turns per batch (default: %(default)s)")
    add("--questions", default=str(QUESTIONS), metavar="FILE",
        help="consistency: questions about personas, with known answers (default: the project's 516 questions)")
    add("--no_persona", action="store_true", help="hide the persona from the model, as a control")
    add("--predictions", metavar="FILE",
        help="write each turn's scores, likelihoods and reply, a JSON line per turn; consistency: and per question")
    add("--compare", metavar="FILE",
        help="compare with the --predictions of another model on the same turns: differences, their significance and, "
             "with --report, the turns that differ most")
    add("--report", metavar="DIR",
        help="write report.html and report.json: figures, ranks, calibration, worst turns, replies, questions")
    add("--parlai", action="store_true", help="let ParlAI evaluate; also accept ParlAI's flags, such as --datapath")
    if "--parlai" in sys.argv:  # with it, ParlAI parses the other flags
        ours = ArgumentParser(add_help=False, allow_abbrev=False)
        ours.add_argument("--parlai", action="store_true")
        ours.add_argument("--batch_size", type=positive_number, default=16)
        ours.add_argument("--eval_type", default="hits@1", choices=["hits@1", "f1"])  # ParlAI's loop computes these
        args, flags = ours.parse_known_args()
        evaluate_in_parlai(args.batch_size, ["--eval_type", args.eval_type, *flags])
        return
    args = parser.parse_args()
    for name, value in evaluate(args).items():
        print(f"FINAL {name}: {figure(value)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
