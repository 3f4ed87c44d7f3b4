"""Read annotators' answers about pairs of replies, and compute the majority's preferences and the agreement.

An answer is a line of JSON: ``pair`` (the pair's name), ``annotator``, ``choice`` (one of `CHOICES`) and, with
``--questions``, ``questions`` (a choice for each of `QUESTIONS`).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

from feedback.pairs import read_json_lines, report_left_out

QUESTIONS = ("empathy", "relevance", "fluency")
CHOICES = (0, 1, "tie", "bad")  # the first reply of the pair, the second, equally good, both bad


def is_answer(record: dict) -> bool:
    """Return whether a JSON object has all fields of an answer, with the right types."""
    questions = record.get("questions", {})
    return (isinstance(record.get("pair"), str) and bool(record.get("annotator"))
            and isinstance(record["annotator"], str) and _is_choice(record.get("choice"))
            and isinstance(questions, dict) and all(name in QUESTIONS and _is_choice(value) and value != "bad"
                                                    for name, value in questions.items()))


def _is_choice(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool) and value in CHOICES


def read_answers(paths: Iterable[str | Path], pairs: dict[str, dict]) -> dict[tuple[str, str], dict]:
    """Read answers by (annotator, pair name).

    Three kinds of lines are skipped with a warning: lines that are not complete answers; answers to pairs that are not
    in ``pairs``, for example another model's; and answers of one person that contradict each other. Raises `InputError`
    if a file cannot be read.
    """
    answers: dict[tuple[str, str], dict] = {}
    for path in map(Path, paths):
        problems: dict[str, list[int]] = {}
        places: dict[tuple[str, str], list[int]] = {}
        contradicted = set()
        for number, record in read_json_lines(path):
            if record is None or not is_answer(record):
                problems.setdefault("that are not complete answers", []).append(number)
                continue
            if record["pair"] not in pairs:
                problems.setdefault("about pairs that are not in the file of pairs (another model's, or edited)",
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
    """Return the preferences of more than half of the annotators of each pair, and the number of other pairs by reason.

    A preference is (pair, number of its better reply); they are in the order of ``pairs``.
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
    """Return Cohen's kappa (1960): 1 for full agreement, 0 for agreement by chance; NaN if both always say the same."""
    total = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][value] * counts[1][value] for value in counts[0]) / total ** 2
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def agreement(answers: dict[tuple[str, str], dict]) -> list[str]:
    """Return a line per two annotators and question: the number of pairs that both answered, and their kappa."""
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
