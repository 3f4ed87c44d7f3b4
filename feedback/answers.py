"""Read people's answers about pairs of replies: which reply is preferred, and how far annotators agree.

An answer is a line of JSON: ``pair`` (the pair's name), ``annotator``, ``choice`` (one of `CHOICES`) and, if they were
asked, ``questions`` (a choice for each of `QUESTIONS`).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

from feedback.pairs import read_json_lines, report_left_out

QUESTIONS = ("empathy", "relevance", "fluency")
CHOICES = (0, 1, "tie", "bad")  # the first reply of the pair, the second, equally good, both bad


def is_answer(record: dict) -> bool:
    """Whether a line of JSON has an answer's fields with their types."""
    questions = record.get("questions", {})
    return (isinstance(record.get("pair"), str) and bool(record.get("annotator"))
            and isinstance(record["annotator"], str) and _is_choice(record.get("choice"))
            and isinstance(questions, dict) and all(name in QUESTIONS and _is_choice(value) and value != "bad"
                                                    for name, value in questions.items()))


def _is_choice(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool) and value in CHOICES


def read_answers(paths: Iterable[str | Path], pairs: dict[str, dict]) -> dict[tuple[str, str], dict]:
    """Answers by (annotator, pair name).

    Named, counted and left out are: lines that are no answer, such as half ones; answers to pairs that ``pairs`` has
    not, as of another model or an edited file; and those that contradict another one of the same person, both of them.
    Raises `InputError` when a file cannot be read.
    """
    answers: dict[tuple[str, str], dict] = {}
    for path in map(Path, paths):
        problems: dict[str, list[int]] = {}
        places: dict[tuple[str, str], list[int]] = {}
        contradicted = set()
        for number, record in read_json_lines(path):
            if record is None or not is_answer(record):
                problems.setdefault("that are no whole answer", []).append(number)
                continue
            if record["pair"] not in pairs:
                problems.setdefault("about pairs that the file of pairs has not (another model's, or edited)",
                                    []).append(number)
                continue
            key = record["annotator"], record["pair"]
            places.setdefault(key, []).append(number)
            if key in answers and answers[key]["choice"] != record["choice"]:
                contradicted.add(key)
            answers[key] = record
        for key in sorted(contradicted):
            problems.setdefault("that contradict each other, of one person about one pair", []).extend(places[key])
            del answers[key]
        report_left_out(path, problems)
    return answers


def majority_preferences(
        pairs: dict[str, dict], answers: dict[tuple[str, str], dict]) -> tuple[list[tuple[dict, int]], Counter]:
    """What more than half of those who answered prefer: (pair, number of its better reply), in the order of ``pairs``.

    And how many pairs have no better reply, by the reason.
    """
    votes: dict[str, Counter] = {}
    for (_, name), answer in answers.items():
        votes.setdefault(name, Counter())[answer["choice"]] += 1
    better, without = [], Counter({"not answered": len(pairs) - len(votes)})
    for name, pair in pairs.items():
        if name not in votes:
            continue
        (choice, count), = votes[name].most_common(1)
        if 2 * count <= votes[name].total():
            without["people who disagree"] += 1
        elif choice in (0, 1):
            better.append((pair, choice))
        else:
            without["a tie" if choice == "tie" else "both bad"] += 1
    return better, +without


def cohen_kappa(first: list, second: list) -> float:
    """Agreement of two people beyond chance (Cohen 1960): 1 always, 0 as by chance; NaN where chance is certain."""
    total = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][value] * counts[1][value] for value in counts[0]) / total ** 2
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def agreement(answers: dict[tuple[str, str], dict]) -> list[str]:
    """A line each two annotators, choices and questions: in how many pairs both answered, and their kappa."""
    lines = []
    people = list(dict.fromkeys(person for person, _ in answers))
    for one, other in combinations(people, 2):
        common = [(answers[one, name], answers[other, name]) for person, name in answers
                  if person == one and (other, name) in answers]
        for what in ("choice", *QUESTIONS):
            values = [tuple(answer["choice"] if what == "choice" else answer.get("questions", {}).get(what)
                            for answer in two) for two in common]
            values = [two for two in values if None not in two]
            if values:
                kappa = cohen_kappa(*map(list, zip(*values, strict=True)))
                lines.append(f"{one} and {other}, {what}: {len(values):,} pairs, kappa {kappa:.2f}")
    return lines
