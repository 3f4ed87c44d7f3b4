"""Test the tutorial: its numbers are computed, the Korean version is complete, and exercises have solutions.

`make tutorial` runs the notebook itself, whose cells check what the text claims.
"""

import ast
import inspect
import re
import sys
from collections import Counter

import jupytext
import pytest
import torch
from conftest import ROOT, script

from decoding import Decoding, fitted_context, generate_replies, load_checkpoint
from inputs import Specials, TurnDataset
from outputs import replies
from utils import get_dataset

sys.path.insert(0, str(ROOT / "docs"))

import solutions

SOURCES = {"en": ROOT / "docs" / "tutorial.py", "ko": ROOT / "docs" / "tutorial.ko.md"}
NAMES = r"`[^`]*`|\]\([^)]*\)|hits@1|F1|ConvAI2|\b(19|20)\d\d\b"  # has digits, but is not a figure
WORDS = ("four five six seven eight nine ten eleven twelve thirteen fifteen sixteen twenty thirty forty fifty hundred "
         "thousand million")
KOREAN = "네 다섯 여섯 일곱 여덟 아홉 열 스무 스물 서른 마흔 쉰 십 이십 삼십 사십 오십 백 천 만"
COUNTED = "개 명 가지 번 문장 토큰 후보 단어 턴 배 시간 분 초"  # counters, which follow a number


def cells(language: str, kind: str) -> list[str]:
    return [cell.source for cell in jupytext.read(SOURCES[language]).cells if cell.cell_type == kind]


def said(code: str) -> list[ast.expr]:
    """Return the arguments of the calls of ``say`` in a cell."""
    return [node.args[0] for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name) and node.func.id == "say"]


def literals(expression: ast.expr) -> list[str]:
    """Return the texts that an expression spells out, outside of the braces of f-strings."""
    if isinstance(expression, ast.JoinedStr):
        return [part.value for part in expression.values if isinstance(part, ast.Constant)]
    return [node.value for node in ast.walk(expression)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def numbers(text: str) -> list[str]:
    """Return the numbers in prose, as digits or as words."""
    english, korean, counted = ("|".join(words.split()) for words in (WORDS, KOREAN, COUNTED))
    return re.findall(rf"\d[\d.,]*|\b(?:{english})\b|(?<!\w)(?:{korean}) ?(?:{counted})(?!\w)",
                      re.sub(NAMES, " ", text))


@pytest.mark.parametrize("language", SOURCES)
def test_every_number_in_the_prose_is_computed(language):
    prose = cells(language, "markdown")
    spoken = [text for code in cells(language, "code") for expression in said(code) for text in literals(expression)]
    assert len(prose) > 10 and len(spoken) > 20
    assert [found for text in [*prose, *spoken] if (found := numbers(text))] == []
    assert numbers("20 turns, twenty of F1 `0.7`, 열 개") == ["20", "twenty", "열 개"]  # the check itself can fail


def interpolated(code: str) -> list[str]:
    """Return what stands between the braces of everything that a cell says, as code."""
    return sorted(ast.unparse(node.value) for expression in said(code) for node in ast.walk(expression)
                  if isinstance(node, ast.FormattedValue))


def without_words(code: str) -> str:
    """Return the code of a cell, and only the numbers in what it says."""
    tree, numbers_ = ast.parse(code), interpolated(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say":
            node.args = []
    return ast.dump(tree) + str(numbers_)


def test_the_korean_tutorial_is_complete():
    ours, theirs = ([without_words(code) for code in cells(language, "code")] for language in ("en", "ko"))
    assert theirs == ours
    english, korean = ("\n".join(cells(language, "markdown")) for language in SOURCES)
    assert re.findall(r"^#+ ", korean, re.M) == re.findall(r"^#+ ", english, re.M)
    english, korean = (" ".join(text.split()) for text in (english, korean))
    for pattern in (r"\]\((.*?)\)", r"`([^`]*)`"):
        assert not Counter(re.findall(pattern, english)) - Counter(re.findall(pattern, korean))
    hangul = len(re.findall("[가-힣]", korean))
    assert hangul > len(english) / 4


def test_the_tutorial_has_few_figures():
    figures = re.findall(r"^pictures\.\w+\(", "\n".join(cells("en", "code")), re.M)
    assert 10 <= len(figures) <= 15


# ---------------------------------------------------------------------------------------------------- exercises


@pytest.fixture(scope="module")
def bot(trained, small_corpus, tmp_path_factory):
    """Return a small trained model, its tokenizer, and validation turns."""
    model, tokenizer = load_checkpoint(str(trained))
    table = get_dataset(tokenizer, str(small_corpus), str(tmp_path_factory.mktemp("cache") / "table"))
    return model, tokenizer, TurnDataset(table["valid"], tokenizer, model.max_positions, num_candidates=1)


@pytest.mark.parametrize("solution", [solutions.min_p_reply, solutions.ask, solutions.persona_words,
                                      solutions.read_log])
def test_solutions_are_short(solution):
    assert len(inspect.getsource(inspect.unwrap(solution)).splitlines()) <= 20


def test_min_p_lies_between_greedy_and_sampling(bot):
    model, tokenizer, data = bot
    special = Specials.of(tokenizer)
    context = fitted_context(model, *data.context(0), special, 20)
    everything, greedy = Decoding(temperature=2.0, top_p=0), Decoding(no_sample=True)
    assert solutions.min_p_reply(model, context, special, 1.0, everything) == \
        generate_replies(model, [context], special, greedy)[0]
    for seed in range(3):
        torch.manual_seed(seed)
        expected = generate_replies(model, [context], special, everything)[0]
        torch.manual_seed(seed)
        assert solutions.min_p_reply(model, context, special, 0.0, everything) == expected
    drawn = [tuple(solutions.min_p_reply(model, context, special, 0.05, everything)) for _ in range(8)]
    assert len(set(drawn)) > 1


def test_a_persona_file_answers_as_the_chat_does(bot, trained, tmp_path):
    model, tokenizer, _ = bot
    persona = tmp_path / "me.txt"
    persona.write_text("i am a baker .\ni have two dogs .\n")
    said = script("interact.py", "--model_checkpoint", trained, "--personality", persona, "--no_sample", cwd=tmp_path,
                  stdin="what do you do ?\n")
    reply = solutions.ask(persona, "what do you do ?", model, tokenizer, Decoding(no_sample=True))
    assert reply and reply in said.splitlines()


def test_the_metric_counts_new_words_of_the_persona(bot, tmp_path):
    log = tmp_path / "data.jsonl"
    log.write_text('{"personas": [[], ["I keep bees.", "I live in Wales."]], '
                   '"turns": ["Hi! Any bees?", "Yes.", "So?", "Sure."]}\n'
                   '{"personas": [[], ["I am a baker."]], "turns": ["Hello!", "Hi."]}\n')
    table = get_dataset(bot[1], str(log), str(tmp_path / "cache"), target="second", train_frac=0.5)
    splits = {split: table[split] for split in table}
    bees = next(split for split in splits.values() if split.num_turns == 2)
    records = [{"reply": "bees, many"}, {"reply": "from Wales!"}]  # the user mentioned bees; only Wales is new
    assert solutions.persona_words(records, bees) == 0.5
    assert solutions.persona_words([{"reply": "i am in"}] * 2, bees) == 0
    real = [record for _, record in sorted(replies(bot[0], bot[2], bot[1], Decoding(no_sample=True), 8))]
    assert 0 <= solutions.persona_words(real, bot[2].split) <= 1


def test_the_log_reader(bot, tmp_path):
    log = tmp_path / "chat.log"
    log.write_text("".join(f"[21:0{n}] <anna> hi {n} !\n[21:0{n}] <bob> hello {n} .\n[21:0{n}] <bob> and you ?\n"
                           f"[21:0{n}] <anna> fine {n} .\n\n" for n in range(8)))
    table = get_dataset(bot[1], str(log), str(tmp_path / "cache"), layout="log")
    turns = {(tuple(split.texts("history", turn)), split.texts("candidates", turn)[-1])
             for split in table.values() for turn in range(split.num_turns)}
    assert turns == {turn for n in range(8) for turn in [
        ((f"hi {n} !",), f"hello {n} . and you ?"), ((f"hi {n} !", f"hello {n} . and you ?"), f"fine {n} .")]}
