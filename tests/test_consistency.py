"""Test the judge of replies about the persona, and the questions in benchmarks/."""

import json

import pytest
from conftest import ROOT, script

from cli import InputError
from consistency import Question, canonical_words, judge, read_questions, shares
from metrics import wilson

QUESTIONS = ROOT / "benchmarks" / "persona_questions.jsonl"


def question(text: str, kind: str, answers: str, contradictions: str) -> Question:
    return Question([], [], text, kind, answers.split(", "), contradictions.split(", "))


DOGS = question("do you have any pets ?", "pet", "yes, dog", "no, cat, parrot, not have pet")
JOB = question("what do you do for a living ?", "job", "nurse, hospital", "teacher, doctor, chef, unemployed")
AGE = question("how old are you ?", "age", "34", "be #, # year old, | #")
MEAT = question("do you eat meat ?", "diet", "no, not eat meat, vegetarian", "yes, eat meat, love steak")
KIDS = question("how many kids do you have ?", "count", "3", "# kid, have #, | #, no kid, not have kid")
COLOR = question("what color is your car ?", "color", "blue", "red, black, green")
MUSIC = question("what music do you like ?", "music", "jazz", "rock, country, hip hop")
BEFORE = question("what did you do before you retired ?", "job", "firefighter, fire fighter", "teacher, nurse")
FATHER = question("what does your father do ?", "family", "barber", "teacher, doctor")
HATE = question("what food do you hate ?", "dislike", "mushroom, not stand mushroom, not like mushroom", "onion")
NAME = question("what is your cat's name ?", "name", "oscar", "name be *, call him *, bella")
ALONE = question("do you live alone ?", "family", "no, my wife", "yes, alone")


@pytest.mark.parametrize(("asked", "reply", "verdict"), [
    # the value itself, also inflected or in other spellings
    (DOGS, "i have two dogs .", "answered"),
    (DOGS, "yes .", "answered"),
    (DOGS, "oh yeah , they are so cute !", "answered"),
    (DOGS, "i do , do you ?", "answered"),
    (DOGS, "just a dog", "answered"),
    (JOB, "i'm a nurse , how about you ?", "answered"),
    (JOB, "nursing is my life , i work at the hospital", "answered"),
    (AGE, "i am thirty-four .", "answered"),
    (AGE, "34 , and you ?", "answered"),
    (AGE, "i am 34 , married for ten years", "answered"),
    (DOGS, "i sure do !", "answered"),
    (AGE, "i just turned thirty four last week", "answered"),
    (KIDS, "three . they are 4 , 6 and 9 .", "answered"),
    (KIDS, "i have 3 kids and two dogs", "answered"),
    (MEAT, "no , i do not .", "answered"),
    (MEAT, "i don't eat meat", "answered"),
    (MEAT, "i never eat meat .", "answered"),
    (MEAT, "nope , vegetarian", "answered"),
    (MUSIC, "i can't live without jazz .", "answered"),
    (MUSIC, "i can not get enough of jazz", "answered"),
    (MUSIC, "jazz and a bit of rock", "answered"),  # people can like both
    (HATE, "i can't stand mushrooms .", "answered"),
    (HATE, "mushrooms ! i do not like them", "answered"),
    (BEFORE, "i was a fire-fighter for years", "answered"),
    (FATHER, "my father is a barber .", "answered"),
    (FATHER, "he was a barber", "answered"),
    (ALONE, "no , with my wife", "answered"),
    (NAME, "his name is oscar .", "answered"),
    (NAME, "we call him oscar", "answered"),
    (NAME, "his name is whiskers .", "contradicted"),
    (NAME, "i call him whiskers", "contradicted"),
    (NAME, "i love cats .", "evaded"),
    (ALONE, "i live with my wife .", "answered"),
    # another value, or a denial
    (DOGS, "no .", "contradicted"),
    (DOGS, "i don't have a dog .", "contradicted"),
    (DOGS, "no , i have a cat .", "contradicted"),
    (DOGS, "yes , i have a cat .", "contradicted"),
    (DOGS, "i do not have any pets", "contradicted"),
    (DOGS, "i dont . do you ?", "contradicted"),
    (DOGS, "nope , too much work", "contradicted"),
    (JOB, "i am a teacher .", "contradicted"),
    (JOB, "i'm not a nurse .", "contradicted"),
    (JOB, "i am a nurse and a teacher", "contradicted"),  # the reply mixes two facts
    (AGE, "i am twenty five years old .", "contradicted"),
    (AGE, "forty .", "contradicted"),
    (KIDS, "i have 2 kids", "contradicted"),
    (KIDS, "i have no kids .", "contradicted"),
    (KIDS, "i don't have any children , do you ?", "contradicted"),
    (MEAT, "yes , i love steak .", "contradicted"),
    (MEAT, "sure , i eat meat every day", "contradicted"),
    (COLOR, "it's red .", "contradicted"),
    (COLOR, "it is not blue , it is red .", "contradicted"),
    (MUSIC, "i like hip-hop", "contradicted"),
    (MUSIC, "i do not like jazz .", "contradicted"),
    (BEFORE, "i was a teacher .", "contradicted"),
    (FATHER, "he is a doctor .", "contradicted"),
    (ALONE, "yes , i live alone .", "contradicted"),
    # neither an answer nor a contradiction
    (DOGS, "what about you ?", "evaded"),
    (DOGS, "do you have a dog ?", "evaded"),
    (DOGS, "i had a cat when i was a kid , he had a cat too .", "contradicted"),
    (JOB, "i love my job . are you a teacher ?", "evaded"),
    (JOB, "my husband is a doctor .", "evaded"),
    (JOB, "you are a nurse , that is nice", "evaded"),
    (JOB, "i want to be a chef one day", "evaded"),
    (JOB, "i used to be a teacher", "evaded"),
    (JOB, "i am not a doctor", "evaded"),
    (JOB, "i don't know .", "evaded"),
    (JOB, "i work a lot and my mom is a teacher", "evaded"),
    (AGE, "old enough !", "evaded"),
    (COLOR, "it is a nice car", "evaded"),
    (JOB, "i used to be a teacher , but now i am a nurse .", "answered"),
    (JOB, "", "evaded"),
    (JOB, "...", "evaded"),
])
def test_a_reply_is_judged_as_a_person_would(asked, reply, verdict):
    assert judge(reply, asked) == verdict


@pytest.mark.parametrize(("text", "words"), [
    ("I'm thirty-four .", "| i be 34 |"),
    ("we've 2,000 records", "| we have 2000 record |"),
    ("two thousand and one hundred", "| 2000 and 100 |"),
    ("i can't , i don't , i won't", "| i can not | i do not | i will not |"),
    ("that's one of my kids' wives", "| that be one of my child wife |"),
    ("he has a dog but never the two cats", "| he have dog | not 2 cat |"),
    ("the 10th grade", "| 10 grade |"),
])
def test_canonical_words(text, words):
    assert " ".join(canonical_words(text)) == words


def test_personas_answer_their_questions():
    questions = read_questions(QUESTIONS)
    assert len(questions) >= 500 and len({tuple(one.persona) for one in questions}) >= 100
    assert len({(tuple(one.persona), one.question) for one in questions}) == len(questions)
    assert sum(bool(one.history) for one in questions) >= 100 and len({one.kind for one in questions}) >= 20
    for one in questions:
        assert 3 <= len(one.persona) <= 5 and len(one.history) % 2 == 0
        verdicts = {judge(sentence, one) for sentence in one.persona}
        assert "answered" in verdicts and "contradicted" not in verdicts, one
        for verdict, patterns in (("answered", one.answers), ("contradicted", one.contradictions)):
            for pattern in patterns:
                reply = pattern.replace("#", "97").replace("*", "zork").strip("| ") + " ."
                assert judge(reply, one) == verdict, (pattern, one)


def test_another_persona_does_not_answer():
    """Judge sentences of other personas: hardly any is taken for an answer."""
    questions = read_questions(QUESTIONS)
    verdicts = [judge(sentence, one) for one, other in zip(questions, questions[20:], strict=False)
                for sentence in other.persona]
    assert shares(verdicts)["answered"][0] < 0.03


def test_intervals_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    for count, total in ((0, 5), (3, 7), (490, 516), (516, 516)):
        assert wilson(count, total) == pytest.approx(tuple(stats.binomtest(count, total).proportion_ci(
            method="wilson")), abs=1e-4)


@pytest.mark.parametrize("line", ["[]", "{", '{"persona": []}', json.dumps(DOGS._asdict() | {"answers": "dog"}),
                                  json.dumps(DOGS._asdict() | {"answers": []})])
def test_wrong_lines_are_named(line, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(DOGS._asdict()) + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        read_questions(tmp_path / "q.jsonl")


def test_replies_and_verdicts_are_written(trained, tmp_path):
    asked = read_questions(QUESTIONS)[:12]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one._asdict()) + "\n" for one in asked))
    flags = ["--model_checkpoint", trained, "--questions", "q.jsonl", "--batch_size", 5, "--predictions", "p.jsonl"]
    out = script("benchmarks/persona_questions.py", *flags, "--by_kind", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").open()]
    assert [one["question"] for one in written] == [one.question for one in asked]
    verdicts = [judge(record["reply"], one) for record, one in zip(written, asked, strict=True)]
    assert [record["verdict"] for record in written] == verdicts
    assert f"FINAL Persona questions (12): answered {verdicts.count('answered') / 12:.3f}" in out
    assert len(out.splitlines()) == 1 + len({one.kind for one in asked})
    out = script("benchmarks/persona_questions.py", *flags, "--no_persona", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert "FINAL Persona questions without persona (12)" in out
