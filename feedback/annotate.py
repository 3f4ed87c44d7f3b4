"""Ask people which of two replies is better, in the terminal or, with --web, in the browser.

    python -m feedback.annotate --pairs pairs.jsonl --answers answers.jsonl --annotator anna [--questions] [--web]

Each answer is on the disk before the next question appears; after an interruption, the command continues with the open
questions. Several people can share a file of answers, and their agreement is shown at the end. ``--reward_model``
answers all questions by a reward model, ``--simulate`` by a rule.
"""

import logging
import random
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout
from tqdm import tqdm

from cli import InputError, coefficient, command, port_number, printable, share, whole_number
from feedback.answers import QUESTIONS, agreement, read_answers
from feedback.pairs import append_json_lines, read_pairs
from feedback.utterance_metrics import rule_score

ASK = "Which reply is better?"
KEYS = {"a": 0, "b": 1, "t": "tie", "x": "bad"}  # a: the reply that is shown first, b: second
logger = logging.getLogger("feedback.annotate")


# ---------------------------------------------------------------------------------------------------- questions


class Session:
    """The open questions of a file of answers, and writing to this file.

    All annotators get the pairs in the same order, so that their answers overlap from the beginning; the order of the
    two replies is shuffled per annotator. Both orders depend on ``seed``.
    """

    def __init__(self, pairs: dict[str, dict], path: Path, seed: int, questions: bool):
        self.pairs, self.path, self.seed, self.questions = pairs, path, seed, questions
        self.order = sorted(pairs, key=lambda name: random.Random(f"{seed} {name}").random())
        append_json_lines(path, [])  # fails at once if it cannot be written
        self.file = FileLock(f"{path}.lock")
        try:
            self.file.acquire(timeout=0)  # two sessions would ask the same questions
        except Timeout:
            raise InputError(f"--answers {path}: another feedback.annotate is writing to it; let several people use "
                             "one page (--web), or give them files of their own") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); name a file on a disk with room "
                             "where you may write") from None
        self.answered = {key: answer["choice"] for key, answer in read_answers([path], pairs).items()}
        self.lock = Lock()

    def sides(self, annotator: str, name: str) -> list[int]:
        """Return the order in which this annotator sees the replies: [0, 1] or [1, 0]."""
        return random.Random(f"{self.seed} {annotator} {name}").sample([0, 1], 2)

    def done(self, annotator: str) -> int:
        return sum(person == annotator for person, _ in self.answered)

    def next(self, annotator: str) -> str | None:
        """Return the name of the next pair; None if all are answered."""
        return next((name for name in self.order if (annotator, name) not in self.answered), None)

    def question(self, annotator: str) -> dict:
        """Return what to show: ``pair``, ``context`` (speakers, texts), ``replies``, ``questions``, ``progress``.

        ``ask`` is what to choose by. A reply may be a whole dialog of several lines (`feedback.ranking`).
        """
        done = self.done(annotator)
        progress = f"{done:,} of {len(self.order):,} answered"
        if (name := self.next(annotator)) is None:
            return {"pair": None, "progress": progress}
        pair = self.pairs[name]
        context = [["persona", text] for text in pair["persona"]]
        for back, text in zip(range(len(pair["history"]), 0, -1), pair["history"], strict=True):
            context.append(["person" if back % 2 else "bot", text])
        return {"ask": str(pair.get("ask", ASK)), "pair": name, "progress": progress, "context": context,
                "replies": [pair["replies"][number]["text"] for number in self.sides(annotator, name)],
                "questions": list(QUESTIONS) if self.questions else []}

    def answer(self, annotator: str, name: str, key: str, questions: dict[str, str]) -> bool:
        """Write an answer, one of `KEYS`, to the disk.

        Return False, and write nothing, if the pair is unknown or already answered, or a key is unknown.
        """
        with self.lock:
            asked = QUESTIONS if self.questions else ()
            if (not annotator or name not in self.pairs or (annotator, name) in self.answered or key not in KEYS
                    or set(questions) != set(asked) or not all(value in KEYS and value != "x"
                                                               for value in questions.values())):
                return False
            sides = self.sides(annotator, name)

            def choice(key: str):
                value = KEYS[key]
                return sides[value] if isinstance(value, int) else value

            record = {"pair": name, "annotator": annotator, "choice": choice(key), "shown": sides}
            if asked:
                record["questions"] = {question: choice(value) for question, value in questions.items()}
            append_json_lines(self.path, [record])
            self.answered[annotator, name] = record["choice"]
            return True


# ----------------------------------------------------------------------------------------------------- terminal


@contextmanager
def single_keys() -> Iterator[None]:
    """Let the terminal deliver each key immediately, without Enter, and without showing it."""
    if not sys.stdin.isatty():
        yield
        return
    import termios  # not on Windows, where only pipes and --web work
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSANOW)  # keys that were pressed already stay
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def read_key() -> str:
    """Read a key, in lower case; from a pipe, the first letter of the next line. Raises ``EOFError`` at the end."""
    key = sys.stdin.read(1) if sys.stdin.isatty() else sys.stdin.readline()
    if key in ("", "\x04"):
        raise EOFError
    return key.strip()[:1].lower()


def ask(prompt: str, keys: Iterable[str]) -> str:
    """Ask until the answer is one of ``keys``."""
    while True:
        print(prompt, end=" ", flush=True)
        key = read_key()
        print(key if key.isprintable() else "")
        if key in keys:
            return key
        print(f"  {key!r} is not one of {' '.join(keys)}")


def in_terminal(session: Session, annotator: str) -> None:
    """Ask in the terminal until all pairs are answered, ``q`` is pressed, or the input ends."""
    names = {"persona": "   ", "person": "  –", "bot": "  ="}
    with suppress(EOFError), single_keys():
        while (question := session.question(annotator))["pair"]:
            print(f"\n{question['progress']}")
            for who, text in question["context"]:
                print(textwrap.fill(printable(text), 100, initial_indent=f"{names[who]} ", subsequent_indent="    "))
            for letter, text in zip("AB", question["replies"], strict=True):
                marks = chain([f"\n  {letter}  "], repeat("     "))
                for mark, line in zip(marks, text.splitlines(), strict=False):  # a dialog has several
                    print(textwrap.fill(printable(line), 100, initial_indent=mark, subsequent_indent="     "))
            key = ask(f"\n{question['ask']} a, b, t tie, x both bad, q stop?", (*KEYS, "q"))
            if key == "q":
                break
            details = {name: ask(f"  {name}: a, b, t?", "abt") for name in question["questions"]}
            session.answer(annotator, question["pair"], key, details)
    print(f"\n{session.question(annotator)['progress']}; the answers are in {session.path}")


def in_browser(session: Session, port: int) -> None:
    """Ask on a web page, served to this machine only, until Ctrl-C."""
    try:
        from feedback.browser import web_server
    except ModuleNotFoundError as missing:  # the terminal does not need it
        raise InputError(f"--web: {missing.name} is missing; pip install -r requirements/web.txt") from None
    server, listening = web_server(session, port)
    with listening:
        print(f"Open http://127.0.0.1:{listening.getsockname()[1]}/ ; stop with Ctrl-C.", flush=True)
        server.run([listening])
    print()


# ------------------------------------------------------------------------------------------- simulated annotators


def by_rule(pair: dict, draw: random.Random, noise: float) -> int | str:
    """Choose the reply with the higher `rule_score`; with probability ``noise``, the other one."""
    first, second = (rule_score(reply["text"]) for reply in pair["replies"])
    if first == second:
        return "tie"
    return int((second > first) != (draw.random() < noise))


def by_coin(pair: dict, draw: random.Random, noise: float) -> int:
    """Choose a reply at random: the control, from which nothing can be learnt."""
    return draw.randrange(2)


SIMULATED: dict[str, Callable] = {"rule": by_rule, "coin": by_coin}


def simulate(session: Session, annotator: str, how: str, noise: float) -> None:
    """Answer all open questions by ``how``, one of `SIMULATED`; the seed depends on session and pair."""

    def answers() -> Iterator[dict]:
        for name in session.order:
            if (annotator, name) not in session.answered:
                draw = random.Random(f"{session.seed} {how} {name}")
                yield {"pair": name, "annotator": annotator, "choice": SIMULATED[how](session.pairs[name], draw, noise)}

    append_json_lines(session.path, list(answers()))


def answer_by_reward(session: Session, annotator: str, folder: str, margin: float, fp16: str = "") -> None:
    """Answer all open questions by a reward model; replies whose rewards differ by less than ``margin`` are a tie.

    All replies to a context are scored together.
    """
    import torch  # loaded here, because people's answers do not need it

    from feedback.reward import RewardModel

    model = RewardModel(folder, "cuda" if torch.cuda.is_available() else "cpu", fp16)
    replies: dict[tuple, dict[str, None]] = {}  # different replies by context
    names = [name for name in session.order if (annotator, name) not in session.answered]

    def context(name: str) -> tuple:
        return tuple(session.pairs[name]["persona"]), tuple(session.pairs[name]["history"])

    for name in names:
        replies.setdefault(context(name), {}).update(
            dict.fromkeys(reply["text"] for reply in session.pairs[name]["replies"]))
    contexts = list(replies)
    rewards: dict[tuple, dict[str, float]] = {}
    for start in tqdm(range(0, len(contexts), 32), desc="Scoring", unit="batches of 32 contexts"):
        some = contexts[start:start + 32]
        for one, row in zip(some, model([(*one, list(replies[one])) for one in some]), strict=True):
            rewards[one] = dict(zip(replies[one], row, strict=True))

    def choice(name: str) -> int | str:
        first, second = (rewards[context(name)][reply["text"]] for reply in session.pairs[name]["replies"])
        return "tie" if first == second or abs(second - first) < margin else int(second > first)

    append_json_lines(session.path, [{"pair": name, "annotator": annotator, "choice": choice(name)} for name in names])


# --------------------------------------------------------------------------------------------- the command line


def annotate(args: Namespace) -> None:
    session = Session(read_pairs(args.pairs), Path(args.answers), args.seed, args.questions)
    if args.reward_model:
        answer_by_reward(session, args.annotator or "reward model", args.reward_model, args.margin, args.fp16)
    elif args.simulate:
        simulate(session, args.annotator or args.simulate, args.simulate, args.noise)
    elif args.web:
        in_browser(session, args.port)
    elif not args.annotator:
        raise InputError("--annotator: give the name of the person who answers; only the page (--web) asks for it")
    else:
        in_terminal(session, args.annotator)
    answers = read_answers([args.answers], session.pairs)
    people = Counter(person for person, _ in answers)
    lines = [f"{person}: {count:,} of {len(session.pairs):,} pairs" for person, count in people.items()]
    print(*map(printable, [*lines, *agreement(answers)]), sep="\n")


def main() -> None:
    parser = ArgumentParser(prog="python -m feedback.annotate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", default="pairs.jsonl", metavar="FILE", help="pairs from feedback.collect (default: %(default)s)")
    add("--answers", default="answers.jsonl", metavar="FILE", help="file to add the answers to (default: %(default)s)")
    add("--annotator", default="", metavar="NAME", help="name of the person who answers")
    add("--questions", action="store_true", help=f"also ask which reply is better in {', '.join(QUESTIONS)}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--web", action="store_true", help="ask in the browser; each visitor enters a name")
    add("--port", type=port_number, default=8000, help="port of the page; 0: any free port (default: %(default)s)")
    how.add_argument("--reward_model", metavar="DIR",
                     help="answer all questions by a reward model from feedback.reward")
    add("--margin", type=coefficient, default=0.0, metavar="DEVIATIONS",
        help="replies whose rewards differ by less are a tie; rewards have standard deviation 1 (default: %(default)s)")
    add("--fp16", default="", choices=["", "bf16"], help="the reward model's half precision (default: none)")
    how.add_argument("--simulate", choices=SIMULATED, metavar="METHOD",
                     help="answer automatically: rule (longer replies and questions win) or coin (at random)")
    add("--noise", type=share, default=0.1, help="share of the rule's answers that are reversed (default: %(default)s)")
    add("--seed", type=whole_number, default=0, help="seed of order, sides and simulation (default: %(default)s)")
    annotate(parser.parse_args())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
