"""Judge a reply to a question about the bot's persona: it answers from the persona, contradicts it, or evades.

A file of questions has one JSON object per line, as data/persona_questions.jsonl (`QUESTIONS`), which was written for
this project:

    {"persona": ["i have two dogs .", …],
     "history": ["hi !", "hello , how are you ?"],          the dialog before the question; may be empty
     "question": "do you have any pets ?", "kind": "pet",
     "answers": ["yes", "dog"], "contradictions": ["no", "cat", "rabbit", …]}

Answers and contradictions are patterns. A pattern is a sequence of words that the reply contains in any inflection
that `canonical_words` and `_matches` recognise. In it ``#`` stands for any number, ``*`` for any word and ``|`` for the
beginning or the end of a clause. The patterns ``yes`` and ``no`` mean that the reply affirms or denies.

This file knows words, but neither models nor tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cli import InputError
from corpora import read_lines
from metrics import wilson

QUESTIONS = Path(__file__).with_name("data") / "persona_questions.jsonl"
VERDICTS = ("answered", "contradicted", "evaded")
# Kinds of which one person may have several values: "pizza and pasta" does not contradict a persona that likes pizza.
OPEN_KINDS = {"allergy", "animal", "dislike", "drink", "fear", "food", "health", "hobby", "instrument", "language",
              "music", "pet", "sport", "travel"}
UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
NUMBERS = {word: number for number, word in enumerate(UNITS)} | TENS
IRREGULAR = {"children": "child", "kid": "child", "kids": "child", "men": "man", "women": "woman", "wives": "wife",
             "feet": "foot", "teeth": "tooth", "mice": "mouse", "people": "person", "geese": "goose", "knives": "knife",
             "is": "be", "am": "be", "are": "be", "has": "have", "does": "do", "goes": "go", "never": "not",
             "yeah": "yes", "yep": "yes", "yup": "yes", "nope": "no", "nah": "no", "mum": "mom", "grey": "gray"}
SKIPPED = {"a", "an", "the", "any", "some", "really", "actually", "very", "also", "even", "own", "currently", "quite"}
OPENINGS = {"oh", "well", "haha", "ha", "hmm", "um", "uh", "ah", "lol", "and", "so", "honestly", "hey", "hi", "hello"}
AGREEING = [phrase.split() for phrase in ("yes", "i sure do", "of course", "sure", "absolutely", "definitely",
                                          "certainly", "indeed", "i do |", "i be |", "i have |", "i can |", "we do |",
                                          "we be |")]
REFUSING = [phrase.split() for phrase in ("no |", "no i", "no not", "no we", "no just", "no only", "no my", "not |",
                                          "i do not |", "i be not |", "i have not |", "i can not |", "not at all",
                                          "none", "not yet", "we do not |", "we be not |", "unfortunately not")]
NEGATIONS = {"not", "no", "without", "neither", "nor", "none", "nothing"}
# A claim after these words is not about the present: it neither contradicts the persona nor denies it.
UNREAL = {"want", "wish", "hope", "if", "might", "maybe", "would", "prefer"}
PAST = {"used", "was", "were", "did", "had", "before"}
# Negative phrases that deny nothing.
EMPHATIC = ("can not get enough", "can not wait", "can not stop", "can not live without", "not only", "not get tired",
            "no doubt", "do not mind", "no problem", "can not go wrong", "not just")
ASKING = (r"(?:what|how|where|who|which|why|when|you|yours?)\b|"
          r"(?:do|does|did|are|is|was|were|have|has|can|could|would|will) "
          r"(?:you|your|he|she|it|they|we|that|this|there|the|a|anyone|anybody)\b")
PEOPLE = set("mother mom father dad parent brother sister sibling twin wife husband son daughter kid child baby girl "
             "boy family uncle aunt cousin grandmother grandma grandfather grandpa grandchild friend girlfriend "
             "boyfriend partner roommate neighbor boss coach dog cat pet animal horse bird he she they".split())


class Question(NamedTuple):
    """One line of a file of questions; the module's docstring explains the fields."""

    persona: list[str]
    history: list[str]
    question: str
    kind: str
    answers: list[str]
    contradictions: list[str]


# ------------------------------------------------------------------------------------------------------- the words


def canonical_words(text: str) -> list[str]:
    """Return the words of a text in a canonical spelling, with ``|`` wherever a clause begins or ends.

    Contractions are expanded ("don't" → "do not"), numbers become digits, hyphens become spaces, nouns become singular,
    all forms of "to be" become "be", and "never" becomes "not". Articles and words of emphasis are left out.
    """
    text = text.lower().replace("’", "'").replace("-", " ")
    text = re.sub(r"(?<=\d) ?,(?=\d{3}\b)", "", text)
    text = re.sub(r"\b(?:won't|wont)\b", "will not", re.sub(r"\b(?:can't|cant|cannot)\b", "can not", text))
    text = re.sub(r"\b(do|does|did|is|are|was|were|have|has|had|would|could|should|ai) ?n'?t\b", r"\1 not", text)
    for short, long in (("'m", " am"), ("'re", " are"), ("'ve", " have"), ("'ll", " will"), ("'d", " would")):
        text = text.replace(short, long)
    text = re.sub(r"\b(?:im|i m)\b", "i am", re.sub(r"\b(it|that|he|she|there|here|name|who|what)'?s\b", r"\1 is", text)
                  if "'" in text else text).replace("'s", "")
    text = re.sub(r"\b(?:but|because|however|although|though|while|since)\b", " | ", text)
    text = re.sub(r"\band (?=(?:i|my|we|our|he|she|they|it)\b)", " | ", text)
    words = re.findall(r"[|.,!?;:()…]|[^\W_]+", text)
    out = ["|"]
    for place, word in enumerate(words):
        before, after = (words[place - 1] if place else ""), (words[place + 1] if place + 1 < len(words) else "")
        if not word[0].isalnum():
            out += ["|"] * (out[-1] != "|")
        elif word in ("hundred", "thousand") and out[-1].isdigit():
            out[-1] = str(int(out[-1]) * (100 if word == "hundred" else 1000))
        elif word in NUMBERS and before in TENS and NUMBERS[word] < 10:
            out[-1] = str(int(out[-1]) + NUMBERS[word])
        elif word in NUMBERS and not (word == "one" and (
                before in ("this", "that", "the", "no", "which", "another", "a") or after in ("of", "day", "who"))):
            out.append(str(NUMBERS[word]))
        elif match := re.fullmatch(r"(\d+)(?:st|nd|rd|th)?", word):
            out.append(match[1])
        elif word not in SKIPPED:
            out.append(_singular(word))
    return out + ["|"] * (out[-1] != "|")


def _singular(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(?:ss|sh|ch|x|zz)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and re.search(r"[^sui]s$", word) else word


def _matches(word: str, pattern: str) -> bool:
    """Return whether ``word`` is the pattern's word, or that word with the ending -ing, -ed or -er."""
    if word == pattern or pattern == "#" and word.isdigit() or pattern == "*" and word != "|":
        return True
    if len(pattern) < 3 or not word.startswith(pattern[:-1]):
        return False
    stems = {pattern + pattern[-1]} if len(pattern) < 5 else set()  # swim, swimming
    if len(pattern) > 3:
        stems |= {pattern, pattern.removesuffix("e")}
    return any(word == stem + end for stem in stems for end in ("ing", "ed", "er"))


def _spans(pattern: list[str], words: list[str]) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of each place in a clause that matches the pattern."""
    for start in range(len(words) - len(pattern) + 1 if pattern else 0):
        if all(map(_matches, words[start:start + len(pattern)], pattern)):
            yield start, start + len(pattern)


# ---------------------------------------------------------------------------------------------------- the judgement


def judge(reply: str, question: Question) -> str:
    """Return the one of `VERDICTS` that fits ``reply``, which follows ``question``.

    Three parts of a reply are ignored: questions, statements about the other person, and statements about third persons
    unless the question is about them. A denied answer counts as a contradiction; a denied contradiction counts as
    nothing. A reply that contains both an answer and a contradiction contradicts, except in `OPEN_KINDS`.
    """
    answers = [_pattern(text) for text in question.answers if text not in ("yes", "no")]
    contradictions = [_pattern(text) for text in question.contradictions if text not in ("yes", "no")]
    asked = canonical_words(question.question)
    about_others = bool(PEOPLE & set(sum([*answers, *contradictions], asked)))
    about_past = bool(PAST & set(asked))
    right = wrong = denied = False
    for clause in _clauses(reply):
        if clause[1] in ("you", "your") or not about_others and _is_about_others(clause):
            continue
        said = [span for pattern in answers for span in _spans(pattern, clause)]
        asserted = [span for span in said if not _is_negated(clause, span[0])]
        right |= bool(asserted)
        denied |= any(not _overlaps(span, asserted) and not _is_unreal(clause, span[0], about_past)
                      for span in said if span not in asserted)
        wrong |= any(not (_overlaps(span, said) or _is_negated(clause, span[0])
                          or _is_unreal(clause, span[0], about_past))
                     for pattern in contradictions
                     if not (right and set(pattern) == {"|", "#"})  # "three , they are 4 , 6 and 9"
                     for span in _spans(pattern, clause))
    polarity = _polarity(reply)
    if right and not denied and (not wrong or question.kind in OPEN_KINDS):
        return "answered"
    if wrong or denied or polarity in question.contradictions:
        return "contradicted"
    return "answered" if polarity in question.answers else "evaded"


def _pattern(text: str) -> list[str]:
    """Return a pattern's `canonical_words`, with the ends of clauses only where the pattern itself has ``|``."""
    words = canonical_words(text.replace("#", " anynumber ").replace("*", " anyword "))
    return [{"anynumber": "#", "anyword": "*"}.get(word, word)
            for word in words[not text.startswith("|"):len(words) - (not text.endswith("|"))]]


def _clauses(reply: str) -> Iterator[list[str]]:
    """Yield the non-empty clauses of a reply, each with ``|`` at both ends; questions are left out."""
    for sentence in re.findall(r"[^.!?]+[.!?]*", reply.lower()):
        if "?" in sentence:
            sentence = re.split(rf"(?:^|(?<=[\s,]))(?:{ASKING})", sentence, maxsplit=1)[0]
        clause = ["|"]
        for word in canonical_words(sentence)[1:]:
            clause.append(word)
            if word == "|":
                while len(clause) > 2 and clause[1] in OPENINGS:
                    del clause[1]
                if len(clause) > 2:
                    yield clause
                clause = ["|"]


def _polarity(reply: str) -> str:
    """Return "yes" or "no", whichever the reply says first, or "" if it says neither."""
    for clause in _clauses(reply):
        if any(clause[1:1 + len(phrase)] == phrase for phrase in REFUSING) or clause[1] == "no":
            return "no"
        if any(clause[1:1 + len(phrase)] == phrase for phrase in AGREEING):
            return "yes"
    return ""


def _is_negated(clause: list[str], place: int) -> bool:
    """Return whether an odd number of negations stands before ``place``."""
    before = " ".join(clause[1:place])
    for phrase in EMPHATIC:
        before = before.replace(phrase, "")
    return sum(word in NEGATIONS for word in before.split()) % 2 == 1


def _is_unreal(clause: list[str], place: int, about_past: bool) -> bool:
    """Return whether the words before ``place`` make it a wish, a guess or, unless ``about_past``, a memory."""
    before = set(clause[:place])
    return bool(before & UNREAL) or not about_past and bool(before & {"used", "was", "were"})


def _is_about_others(clause: list[str]) -> bool:
    return clause[1] in ("he", "she", "they") or clause[1] == "my" and clause[2] in PEOPLE


def _overlaps(span: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Return whether a span of words shares a word with any of ``spans``."""
    return any(span[0] < end and start < span[1] for start, end in spans)


# ------------------------------------------------------------------------------------------------ files and figures


def read_questions(path: str | Path) -> list[Question]:
    """Read the questions of a file of JSON lines. Raises `InputError` that names the line of the first error."""
    questions = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            question = Question(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: line {number} is not a question ({error}); write an object with persona, "
                             "history, question, kind, answers and contradictions, as in consistency.py") from None
        for field in ("persona", "history", "answers", "contradictions"):
            value = getattr(question, field)
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise InputError(f"{path}: line {number}: {field} is not a list of strings; write one")
        if not isinstance(question.question, str) or not isinstance(question.kind, str) or not question.answers:
            raise InputError(f"{path}: line {number} lacks a question, a kind or an answer; add it")
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: contains no question; write one per line")
    return questions


def shares(verdicts: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Return the share of each of `VERDICTS` with its `metrics.wilson` interval: (share, lower bound, upper bound)."""
    count = Counter(verdicts)
    return {verdict: (count[verdict] / len(verdicts), *wilson(count[verdict], len(verdicts))) for verdict in VERDICTS}
