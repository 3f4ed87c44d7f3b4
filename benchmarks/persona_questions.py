"""Ask a model questions about its persona, and count the replies that agree with it, contradict it or evade.

    PYTHONPATH=. python benchmarks/persona_questions.py --model_checkpoint runs/<your run> [--by_kind]
    PYTHONPATH=. python benchmarks/persona_questions.py --model_checkpoint runs/<your run> --no_persona

The questions in persona_questions.jsonl were written for this project; consistency.py judges the replies. Decoding is
greedy unless --sample or --num_beams says otherwise. ``--no_persona`` is the control: it measures how often a model
without the persona is right by chance.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from cli import InputError, command, positive_number
from consistency import Question, judge, read_questions, shares
from decoding import Decoding, add_decoding_flags, fitted_context, generate_replies, load_checkpoint, readable
from inputs import Specials
from utils import add_device_flag

QUESTIONS = Path(__file__).with_suffix(".jsonl")


@torch.inference_mode()
def ask(model, tokenizer, questions: list[Question], decoding: Decoding, batch_size: int,
        no_persona: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the number of each question and the model's reply; contexts of similar length share a batch."""
    torch.manual_seed(decoding.seed)
    special = Specials.of(tokenizer)
    contexts = []
    for question in questions:
        persona = [] if no_persona else tokenizer.encode_persona(question.persona)
        history = [tokenizer.encode(text) for text in [*question.history, question.question]]
        contexts.append(fitted_context(model, persona, history, special, decoding.max_length))
    order = sorted(range(len(contexts)), key=lambda number: len(contexts[number].ids))
    for start in tqdm(range(0, len(order), batch_size), desc="Asking", delay=1, unit=" batches"):
        numbers = order[start:start + batch_size]
        replies = generate_replies(model, [contexts[number] for number in numbers], special, decoding)
        yield from zip(numbers, (readable(tokenizer, reply) for reply in replies), strict=True)


def line(name: str, verdicts: list[str]) -> str:
    """Return a line with the share of each verdict and its 95 % interval (Wilson)."""
    columns = (f"{verdict} {share:.3f} [{least:.3f}, {most:.3f}]"
               for verdict, (share, least, most) in shares(verdicts).items())
    return f"{name} ({len(verdicts)}): {', '.join(columns)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_checkpoint", required=True, metavar="MODEL", help="a run folder or a model's name")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, metavar="FILE",
                        help="JSON lines as consistency.py describes them (default: %(default)s)")
    parser.add_argument("--no_persona", action="store_true", help="hide the persona from the model, as a control")
    parser.add_argument("--by_kind", action="store_true", help="also print a line per kind of question")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write one JSON line per question there")
    parser.add_argument("--batch_size", type=positive_number, default=32, help="default: %(default)s")
    parser.add_argument("--sample", action="store_true", help="sample as the chat does; default: greedy")
    add_device_flag(parser.add_argument)
    add_decoding_flags(parser)
    args = parser.parse_args()
    args.no_sample = args.no_sample or not args.sample

    questions = read_questions(args.questions)
    model, tokenizer = load_checkpoint(args.model_checkpoint, args.device, fp16=args.fp16)
    replies = dict(ask(model, tokenizer, questions, Decoding.of(args), args.batch_size, args.no_persona))
    verdicts = [judge(replies[number], question) for number, question in enumerate(questions)]
    if args.predictions:
        try:
            args.predictions.write_text("".join(
                json.dumps({"question": question.question, "reply": replies[number], "verdict": verdicts[number],
                            "kind": question.kind, "persona": question.persona, "history": question.history}) + "\n"
                for number, question in enumerate(questions)), "utf-8")
        except OSError as error:
            raise InputError(f"--predictions {args.predictions}: cannot be written ({error.strerror}); "
                             "name a place you may write to") from None
    if args.by_kind:
        for kind in sorted({question.kind for question in questions}):
            print(line(kind, [verdict for verdict, question in zip(verdicts, questions, strict=True)
                              if question.kind == kind]))
    print(line("FINAL Persona questions" + " without persona" * args.no_persona, verdicts))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
