"""Learning from preferences: pairs, answers, utterance metrics, reward models and policies."""

import json
import math
import os
import pty
import random
import select
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import requests
import torch
from conftest import ROOT, make_checkpoint

from corpora import InputError
from feedback import annotate, collect, metrics
from feedback.pairs import read_pairs
from inputs import Specials
from interact import fitted_context, generate_replies
from model import add_special_tokens_, load_model, save_model
from utils import get_tokenizer

WORDS = ["hello there .", "how are you ?", "i like tea .", "that is sad .", "my dog is old .", "what happened ?"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a run of random weights, ``run``, and a data set of 40 validation turns, ``data.json``."""
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)

    def entry(n: int) -> dict:
        said = draw.choices(WORDS, k=4)
        return {"personality": [f"i am number {n} ."] if n % 2 else [], "utterances": [
            {"history": said[:1], "candidates": draw.choices(WORDS, k=2)},
            {"history": said[:3], "candidates": draw.choices(WORDS, k=2)}]}

    (folder / "data.json").write_text(json.dumps({"train": [entry(n) for n in range(30)],
                                                  "valid": [entry(n) for n in range(20)]}))
    bare = make_checkpoint(folder / "bare", n_layer=1, n_embd=32, n_head=2, n_positions=96)
    torch.manual_seed(0)
    tokenizer, model = get_tokenizer(str(bare)), load_model(str(bare))
    add_special_tokens_(model, tokenizer)
    tokenizer.save_pretrained(folder / "run")
    save_model(model, folder / "run")
    return folder


def flags(world: Path, **changed) -> Namespace:
    """collect's command line."""
    return Namespace(**{
        "model_checkpoint": str(world / "run"), "dataset_path": str(world / "data.json"),
        "dataset_cache": str(world / "cache"), "max_history": 1, "device": "cpu", "no_sample": False, "max_length": 6,
        "min_length": 1, "temperature": 1.0, "top_k": 0, "top_p": 0.0, "num_beams": 1, "length_penalty": 0.65,
        "no_repeat_ngram_size": 0, "fp16": "", "seed": 7, "pairs": str(world / "pairs.jsonl"), "split": "valid",
        "contexts": 30, "replies": 2, "decoder": None, "batch_size": 8} | changed)


@pytest.fixture(scope="module")
def pairs(world) -> dict[str, dict]:
    collect.collect(flags(world))
    return read_pairs(world / "pairs.jsonl")


def answered(folder: Path, *records: dict) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answer(pair: str, choice, annotator: str = "anna", **more) -> dict:
    return {"pair": pair, "annotator": annotator, "choice": choice, **more}


# --------------------------------------------------------------------------------------------------- collecting


def test_a_pair_can_be_made_again_from_its_line(world, pairs):
    """From nothing but the line, the data and the model: both replies of a context, token by token."""
    pair = list(pairs.values())[-1]
    corpus = json.loads((world / "data.json").read_text())
    turns = [(entry["personality"], turn["history"]) for entry in corpus["valid"] for turn in entry["utterances"]]
    tokenizer, model = get_tokenizer(pair["checkpoint"]), load_model(pair["checkpoint"])
    assert collect.model_hash(model) == pair["model"]
    special = Specials.of(tokenizer)
    seen = [([tokenizer.encode(text) for text in persona],
             [tokenizer.encode(text) for text in history[-(2 * pair["max_history"] + 1):]])
            for persona, history in turns]
    decoding = pair["decoders"][0]
    contexts = [fitted_context(model, *seen[turn], special, decoding["max_length"]) for turn in pair["batch"]]
    torch.manual_seed(pair["seed"])
    replies = generate_replies(model, contexts, special, Namespace(**decoding), samples=2)
    place = pair["batch"].index(pair["turn"])
    assert [reply["ids"] for reply in pair["replies"]] == replies[2 * place:2 * place + 2]
    assert pair["history"] == turns[pair["turn"]][1][-3:] and pair["persona"] == turns[pair["turn"]][0]
    for reply in pair["replies"]:
        assert reply["ended"] == (len(reply["ids"]) < 6)


@pytest.mark.parametrize("cut", [0.3, 0.62, 0.999])
def test_collecting_goes_on_where_it_was_killed(world, pairs, tmp_path, cut):
    whole = (world / "pairs.jsonl").read_bytes()
    part = tmp_path / "part.jsonl"
    part.write_bytes(whole[:int(cut * len(whole))])
    collect.collect(flags(world, pairs=str(part)))
    assert part.read_bytes() == whole
    collect.collect(flags(world, pairs=str(part)))  # and a finished file stays
    assert part.read_bytes() == whole


def test_collecting_does_not_mix_what_was_made_differently(world, pairs, tmp_path):
    part = tmp_path / "part.jsonl"
    whole = (world / "pairs.jsonl").read_bytes()
    part.write_bytes(whole)
    other_contexts = "of another choice of contexts"
    for changed, complaint in [({"temperature": 0.5}, "made with another decoders"), ({"contexts": 29}, other_contexts),
                               ({"seed": 8}, other_contexts), ({"max_history": 2}, "made with another max_history")]:
        with pytest.raises(InputError, match=rf"line \d+ (is|was) {complaint}"):
            collect.collect(flags(world, pairs=str(part), **changed))
    part.write_bytes(b"what is this?\n" + whole)
    with pytest.raises(InputError, match="line 1 is no pair"):
        collect.collect(flags(world, pairs=str(part)))
    assert part.read_bytes() == b"what is this?\n" + whole


def test_decoders_compete(world, tmp_path):
    """Two decoders, one reply each: greedy against sampled, and the greedy one is the model's greedy reply."""
    path = tmp_path / "pairs.jsonl"
    collect.collect(flags(world, pairs=str(path), contexts=6, replies=1, decoder=["--no_sample", "--temperature 3"]))
    found = read_pairs(path)
    assert found
    tokenizer, model = get_tokenizer(str(world / "run")), load_model(str(world / "run"))
    for pair in found.values():
        assert [way["no_sample"] for way in pair["decoders"]] == [True, False]
        assert [reply["decoder"] for reply in pair["replies"]] == [0, 1]
        persona, history = ([tokenizer.encode(text) for text in pair[field]] for field in ("persona", "history"))
        special = Specials.of(tokenizer)
        context = fitted_context(model, persona, history, special, 6)
        greedy = flags(world, no_sample=True)
        assert generate_replies(model, [context], special, greedy)[0] == pair["replies"][0]["ids"]


def test_pairs_edited_by_hand_are_named_and_left_out(world, pairs, tmp_path, caplog):
    lines = (world / "pairs.jsonl").read_text().splitlines()
    edited = json.loads(lines[1])
    edited["replies"][0]["text"] += " or not"
    path = tmp_path / "pairs.jsonl"
    text = "\n".join([lines[0], json.dumps(edited), lines[2][:50], '{"pair": "x"}', *lines[3:]]) + "\n"
    path.write_text(text)
    assert list(read_pairs(path)) == list(pairs)[:1] + list(pairs)[3:]
    assert "1 line edited since they were collected (line 2)" in caplog.text
    assert "2 lines that are no pair (line 3, 4)" in caplog.text
    assert path.read_text() == text
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no pair"):
        read_pairs(path)


# --------------------------------------------------------------------------------------------------- annotating


def test_answers_that_cannot_be_used_are_named_counted_and_kept(pairs, tmp_path, caplog):
    names = list(pairs)
    path = answered(tmp_path, answer(names[0], 1), answer(names[1], 0), answer(names[1], "tie"), answer("0" * 16, 0),
                    answer(names[2], 3), answer(names[3], True), answer(names[4], 0, questions={"style": 1}),
                    answer(names[5], 0), answer(names[5], 0), {"choice": 0})
    with open(path, "a") as file:
        file.write('{"pair": "half')
    before = path.read_text()
    answers = annotate.read_answers([path], pairs)
    assert set(answers) == {("anna", names[0]), ("anna", names[5])}
    assert "5 lines that are no whole answer (line 5, 6, 7, 10, 11)" in caplog.text
    assert "1 line about pairs that the file of pairs has not (another model's, or edited) (line 4)" in caplog.text
    assert "2 lines that contradict each other, of one person about one pair (line 2, 3)" in caplog.text
    assert path.read_text() == before


def test_the_half_answer_of_a_kill_does_not_swallow_the_next(pairs, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"pair": "half')
    session = annotate.Session(pairs, path, seed=0, questions=False)
    assert session.answer("anna", list(pairs)[0], "t", {})
    assert path.read_text().splitlines()[0] == '{"pair": "half'
    assert list(annotate.read_answers([path], pairs)) == [("anna", list(pairs)[0])]


def test_what_most_people_prefer(pairs, tmp_path):
    names = list(pairs)
    votes = {0: [0], 1: [1, 1, 0], 2: [0, 1], 3: ["tie"], 4: ["bad"], 5: ["tie", 1]}
    answers = {(f"person {n}", names[pair]): answer(names[pair], choice)
               for pair, choices in votes.items() for n, choice in enumerate(choices)}
    better, without = annotate.preferences(pairs, answers)
    assert [(pair["pair"], best) for pair, best in better] == [(names[0], 0), (names[1], 1), (names[5], 1)]
    assert without == {"not answered": len(names) - 6, "people who disagree": 1, "a tie": 1, "both bad": 1}


def test_kappa_by_hand():
    """50 pairs, the textbook's table: both yes 20, only the first 5, only the second 10, both no 15."""
    first = [0] * 25 + [1] * 25
    second = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert annotate.cohen_kappa(first, second) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert annotate.cohen_kappa(first, first) == 1
    assert math.isnan(annotate.cohen_kappa([0, 0], [0, 0]))
    assert annotate.cohen_kappa([0, 1], [1, 0]) == -1


def test_agreement_counts_common_pairs_only(pairs):
    names = list(pairs)[:5]
    answers = {("anna", name): answer(name, n % 2, questions={"empathy": 0}) for n, name in enumerate(names)}
    answers |= {("ben", name): answer(name, n % 2, "ben") for n, name in enumerate(names[:4])}
    assert annotate.agreement(answers) == ["anna and ben, choice: 4 pairs, kappa 1.00"]


def test_sides_are_blind_and_the_answer_is_about_the_reply(pairs, tmp_path):
    """Whoever always presses A chooses the first reply about half of the time; what they saw is what they chose."""
    session = annotate.Session(pairs, tmp_path / "answers.jsonl", seed=0, questions=False)
    chosen = []
    while (question := session.question("anna"))["pair"]:
        name = question["pair"]
        assert sorted(question["replies"]) == sorted(reply["text"] for reply in pairs[name]["replies"])
        assert session.answer("anna", name, "a", {})
        record = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[-1])
        assert pairs[name]["replies"][record["choice"]]["text"] == question["replies"][0]
        chosen.append(record["choice"])
    assert len(chosen) == len(pairs) and 0.2 < sum(chosen) / len(chosen) < 0.8
    again = annotate.Session(pairs, tmp_path / "other.jsonl", seed=0, questions=False)
    assert again.order == session.order and again.sides("anna", again.order[0]) == session.sides("anna", again.order[0])
    assert {tuple(session.sides(f"person {n}", again.order[0])) for n in range(20)} == {(0, 1), (1, 0)}


def in_terminal(pairs_path: Path, answers: Path, typed: str, *more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "feedback.annotate", "--pairs", pairs_path, "--answers", answers,
                           "--annotator", "anna", *more], cwd=ROOT, input=typed.encode(), capture_output=True,
                          timeout=300)


def test_answering_through_a_pipe_and_going_on(world, pairs, tmp_path):
    path = tmp_path / "answers.jsonl"
    done = in_terminal(world / "pairs.jsonl", path, "a\nz\nb\na\nt\n", "--questions")
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode()
    assert f"0 of {len(pairs)} answered" in out and "empathy: a, b, t?" in out and "'z' is none of a b t" in out
    first = json.loads(path.read_text())
    sides = first["shown"]
    assert first["choice"] == sides[0]
    assert first["questions"] == {"empathy": sides[1], "relevance": sides[0], "fluency": "tie"}
    done = in_terminal(world / "pairs.jsonl", path, "x\nq\n")
    assert f"2 of {len(pairs)} answered; the answers are in {path}" in done.stdout.decode()
    assert [json.loads(line)["choice"] for line in path.read_text().splitlines()] == [sides[0], "bad"]


def test_single_keys_and_each_answer_on_the_disk_before_the_next_question(world, pairs, tmp_path):
    """In a real terminal, without Enter; when the second question is there, the first answer can be read."""
    path = tmp_path / "answers.jsonl"
    terminal, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "feedback.annotate", "--pairs", world / "pairs.jsonl",
                                "--answers", path, "--annotator", "anna"], cwd=ROOT, stdin=theirs, stdout=theirs,
                               stderr=subprocess.DEVNULL)
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 120)[0], seen
            seen += os.read(terminal, 4096).decode(errors="replace")

    try:
        until("q stop?")
        os.write(terminal, b"b")
        until(f"1 of {len(pairs)} answered")
        assert len(path.read_text().splitlines()) == 1
        seen = seen.split(f"1 of {len(pairs)} answered")[1]
        until("q stop?")
        os.write(terminal, b"q")
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.fixture
def served(pairs, tmp_path):
    """A page about the pairs: its session and address."""
    session = annotate.Session(pairs, tmp_path / "answers.jsonl", seed=0, questions=False)
    with annotate.web_server(session, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield session, f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_the_page_asks_saves_and_refuses(served, tmp_path):
    session, address = served

    def post(**body) -> requests.Response:
        return requests.post(address, json=body, timeout=120)

    assert "Which reply is better?" in requests.get(address, timeout=120).text
    question = post(annotator="anna").json()
    assert question["replies"] and question["progress"].startswith("0 of")
    sent = {"annotator": "anna", "pair": question["pair"], "key": "b", "questions": {}}
    following = post(**sent)
    assert following.status_code == 200 and following.json()["pair"] != question["pair"]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    assert post(**sent).status_code == 409  # answered already: two clicks make one answer
    assert post(**sent | {"pair": following.json()["pair"], "key": "z"}).status_code == 409
    assert post(**sent | {"annotator": " ", "pair": following.json()["pair"]}).status_code == 409
    assert post(**sent | {"pair": ["?"]}).status_code == 400
    assert requests.post(address, data=json.dumps(sent), timeout=120).status_code == 404  # a stranger's form
    broken = requests.post(address, data="{", headers={"Content-Type": "application/json"}, timeout=120)
    assert broken.status_code == 400
    assert post(annotator="ben").json()["progress"].startswith("0 of")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_the_page_in_a_browser_by_keyboard(served, tmp_path):
    """Name, Enter, then single keys; the page shows what is asked and how far one is."""
    from playwright.sync_api import sync_playwright

    if not os.path.exists("/usr/bin/chromium"):
        pytest.skip("needs Chromium at /usr/bin/chromium")
    session, address = served
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.fill("#name", "anna")
        page.keyboard.press("Enter")
        for count, key in enumerate("atx"):
            page.wait_for_function("n => $('progress').textContent.startsWith(n + ' of') && !waiting", arg=str(count))
            page.keyboard.press(key)
        page.wait_for_function("$('progress').textContent.startsWith('3 of')")
        browser.close()
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["choice"] for record in records] == [records[0]["shown"][0], "tie", "bad"]
    assert [record["pair"] for record in records] == session.order[:3]


def test_simulated_annotators(pairs, tmp_path):
    """The rule prefers the higher score in all but the noise; the coin does not; both are the same a second time."""

    def simulated(how: str, noise: float, seed: int = 0) -> list[tuple[str, object]]:
        path = tmp_path / f"{how}-{noise}-{seed}-{time.monotonic_ns()}.jsonl"
        session = annotate.Session(pairs, path, seed, questions=False)
        annotate.simulate(session, how, how, noise)
        return [(record["pair"], record["choice"]) for record in map(json.loads, path.read_text().splitlines())]

    def right(choices) -> list[bool]:
        score = {name: [annotate.rule_score(reply["text"]) for reply in pair["replies"]]
                 for name, pair in pairs.items()}
        return [score[name][choice] > score[name][1 - choice] for name, choice in choices if choice != "tie"]

    assert all(right(simulated("rule", 0.0))) and not any(right(simulated("rule", 1.0)))
    assert simulated("rule", 0.1) == simulated("rule", 0.1)
    assert simulated("coin", 0.0, seed=0) != simulated("coin", 0.0, seed=1)
    chosen = [choice for seed in range(20) for _, choice in simulated("coin", 0.0, seed)]
    assert abs(sum(chosen) / len(chosen) - 0.5) < 0.1
    flips = [one for seed in range(20) for one in right(simulated("rule", 0.1, seed))]
    assert 0.85 < sum(flips) / len(flips) < 0.95


def test_the_rule():
    assert annotate.rule_score("what happened to you ?") == 5 + 10
    assert annotate.rule_score("tell me more about it") == 5
    assert annotate.rule_score("really ?") == 2  # a mark, no word that asks
    assert annotate.rule_score("") == 0


# ------------------------------------------------------------------------------------------------------ metrics


def test_utterance_metrics():
    assert metrics.sentiment("I love this, it is wonderful!") > 0.5 > -0.5 > metrics.sentiment("I hate it, how awful.")
    assert metrics.sentiment("It is a table.") == 0
    assert [metrics.question(text) for text in ("What did you do?", "Isn’t it late?", "Really?", "What a day.", "")] \
        == [1, 1, 0, 0, 0]
    history = ["I have a puppy called Rex", "Puppy owners love their puppy", "yes they do"]
    # of puppy, cats, cats: puppy was in our own turn before, the second cats is in the utterance before
    assert metrics.repetition("puppy or cats and cats", history) == pytest.approx(-2 / 3)
    assert metrics.repetition("Rex called yes they do", history) == 0  # the other person's words are no repetition
    assert metrics.repetition("", history) == 0
    assert metrics.similarity("yes they do", history) == pytest.approx(1)
    assert metrics.similarity("my car", history) == 0 and metrics.similarity("yes", []) == 0
    # words: yes they do, yes they, they do, so five features against one, "do": cosine 1 / sqrt(5)
    assert metrics.similarity("do", history) == pytest.approx(1 / math.sqrt(5))
    assert metrics.toxicity("you stupid idiot") < -0.8 < -0.3 < metrics.toxicity("what a lovely day") <= 0
    assert metrics.toxicity(" ") == 0


def test_the_metrics_as_one_reward():
    history, text = ["I have a dog.", "What is its name?", "Rex."], "What a lovely name! How old is he?"
    by_hand = (0.15 * metrics.sentiment(text) + 0.25 * 1 + 0.5 * metrics.repetition(text, history)
               + 0.05 * metrics.similarity(text, history) + 0.05 * metrics.toxicity(text))
    assert metrics.weighted(text, history) == pytest.approx(by_hand)
    assert metrics.repetition(text, history) == pytest.approx(-2 / 3)  # of what, lovely, name: what and name
    assert metrics.weighted(text, history, dict.fromkeys(metrics.METRICS, 0.0) | {"question": 2.0}) == 2.0


def test_dyme_expects_what_usually_follows():
    """Dialogs in which a question is always answered without one, and an answer followed by a question."""
    draw = random.Random(0)
    things = ["tea", "dogs", "rain", "music", "trains", "cheese", "maps", "snow"]
    dialogs = []
    for _ in range(60):
        one, other = draw.sample(things, 2)
        dialogs.append([f"do you like {one} ?", f"i prefer {other} .", f"why do you prefer {other} ?",
                        f"{one} is dull ."])
    dyme = metrics.Dyme(dialogs)
    asked, told = ["do you like tea ?"], ["do you like tea ?", "i prefer maps ."]
    question = list(metrics.METRICS).index("question")
    assert dyme.expected(asked)[question] * dyme.spread[question] == pytest.approx(0, abs=0.1)
    assert dyme.expected(told)[question] * dyme.spread[question] == pytest.approx(1, abs=0.1)
    assert dyme.deviation("i prefer snow .", asked) < dyme.deviation("why do you ask ?", asked)
    assert dyme.deviation("why do you prefer maps ?", told) < dyme.deviation("i prefer snow .", told)
