"""Learning from preferences: pairs, answers, utterance metrics, reward models and policies."""

import json
import math
import os
import pty
import random
import re
import select
import socket
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
from torch.nn import functional as F
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from cli import InputError
from dialogs import Dialog, Turn, entries
from feedback import annotate, browser, collect, metrics, policy, reward
from feedback.pairs import held_out, read_pairs
from feedback.snapshot import FILE
from inputs import Specials, TurnDataset, build_context, collate
from interact import fitted_context, generate_replies, readable
from model import add_special_tokens_, load_model, save_model
from utils import get_dataset, get_tokenizer

WORDS = ["hello there .", "how are you ?", "i like tea .", "that is sad .", "my dog is old .", "what happened ?"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a data set, ``data.json``, and a run that has learnt to say its sentences, ``run``."""
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)

    def entry(n: int) -> dict:
        said = draw.choices(WORDS, k=4)
        return {"personality": [f"i am number {n} ."] if n % 2 else [], "utterances": [
            {"history": said[:1], "candidates": draw.choices(WORDS, k=2)},
            {"history": said[:3], "candidates": draw.choices(WORDS, k=2)}]}

    (folder / "data.json").write_text(json.dumps({"train": [entry(n) for n in range(30)],
                                                  "valid": [entry(n) for n in range(40)]}))
    bare = make_checkpoint(folder / "bare", n_layer=1, n_embd=32, n_head=2, n_positions=96)
    torch.manual_seed(0)
    tokenizer, model = get_tokenizer(str(bare)), load_model(str(bare))
    add_special_tokens_(model, tokenizer)
    table = get_dataset(tokenizer, str(folder / "data.json"), str(folder / "cache"))
    turns = TurnDataset(table["train"], tokenizer, 96, num_candidates=1)
    batch = collate([turns[n] for n in range(16)], tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        model(**batch).lm_loss.backward()
        optimizer.step()
    tokenizer.save_pretrained(folder / "run")
    save_model(model, folder / "run")
    return folder


def flags(world: Path, **changed) -> Namespace:
    """collect's command line."""
    return Namespace(**{
        "model_checkpoint": str(world / "run"), "dataset_path": str(world / "data.json"), "dataset": "",
        "data_dir": "data", "target": "both", "distractors": "random", "train_frac": None, "keep_repeated": False,
        "format": "", "columns": "", "dataset_cache": str(world / "cache"),
        "max_history": 1, "max_len": 0, "device": "cpu", "no_sample": False,
        "max_length": 6, "min_length": 1, "temperature": 1.0, "top_k": 0, "top_p": 0.0, "num_beams": 1,
        "length_penalty": 0.65, "no_repeat_ngram_size": 0, "fp16": "", "seed": 7,
        "pairs": str(world / "pairs.jsonl"), "split": "valid", "contexts": 30, "replies": 2, "decoder": None,
        "batch_size": 8} | changed)


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


@pytest.fixture(scope="module")
def two_sided(world, tmp_path_factory) -> Path:
    """A folder with dialogs of two sides, ``data.json``, and ``pairs.jsonl`` of half of the validation turns.

    Half of the dialogs open with the same two utterances; later ones name their dialog by a number.
    """
    folder = tmp_path_factory.mktemp("two-sided")
    corpus = {}
    for split, first, count in (("train", 0, 10), ("valid", 100, 40)):
        dialogs = [Dialog("", [Turn(place % 2, text) for place, text in enumerate(
            ["hello there .", "how are you ?" if n % 2 else f"i am {n} .", f"my dog is {n} .", f"i like {n} .",
             f"that is sad , {n} ."][:4 + n % 3 // 2])]) for n in range(first, first + count)]
        corpus[split] = list(entries(dialogs, "dialogs"))
    (folder / "data.json").write_text(json.dumps(corpus))
    collect.collect(flags(world, dataset_path=str(folder / "data.json"), dataset_cache=str(folder / "cache"),
                          pairs=str(folder / "pairs.jsonl"), contexts=60))
    return folder


def numbers(folder: Path) -> list[str]:
    """Of each validation entry, the number that its dialog has."""
    valid = json.loads((folder / "data.json").read_text())["valid"]
    return [re.search(r"[0-9]+", str(entry["utterances"][-1]))[0] for entry in valid]


@pytest.mark.parametrize("max_history", [0, 2])
def test_what_is_held_out_is_never_the_other_side_of_a_dialog_learnt_from(world, two_sided, tmp_path, max_history):
    path = tmp_path / "pairs.jsonl"
    collect.collect(flags(world, dataset_path=str(two_sided / "data.json"), dataset_cache=str(two_sided / "cache"),
                          pairs=str(path), contexts=120, replies=3, max_history=max_history))
    found, number = read_pairs(path), numbers(two_sided)
    apart = held_out(found.values(), 0.4, 1)
    kept, tests = ({number[pair["dialog"]] for name, pair in found.items() if (name in apart) == which}
                   for which in (False, True))
    assert len(kept) > 4 < len(tests) and not kept & tests
    sides = {(number[pair["dialog"]], pair["dialog"]) for pair in found.values()}
    assert len(sides) > 1.3 * len(dict(sides))  # many dialogs are there with both sides


def test_pairs_of_an_earlier_version_are_divided_by_the_dialog_they_note(pairs):
    old = [{name: value for name, value in pair.items() if name != "beginnings"} for pair in pairs.values()]
    apart = held_out(old, 0.4, 1)
    tests = {pair["dialog"] for pair in old if pair["pair"] in apart}
    assert tests and not tests & {pair["dialog"] for pair in old if pair["pair"] not in apart}


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
    """More than half of those who answered, whatever the others say; else there is no preference."""
    votes = {0: [0], 1: [1, 1, 0], 2: [0, 1], 3: ["tie"], 4: ["bad"], 5: ["tie", 1], 6: ["tie"] * 9 + [0],
             7: ["bad"] * 5 + [1], 8: [0, 0, 1, "tie"], 9: [0, 0, 0, "tie", "bad"], 10: ["tie", "bad"]}
    answers = {(f"person {n}", names[pair]): answer(names[pair], choice)
               for pair, choices in votes.items() for n, choice in enumerate(choices)}
    better, without = annotate.preferences(pairs, answers)
    assert [(pair["pair"], best) for pair, best in better] == [(names[0], 0), (names[1], 1), (names[9], 0)]
    assert without == {"not answered": len(names) - 11, "people who disagree": 4, "a tie": 2, "both bad": 2}


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
    server, listening = browser.web_server(session, 0)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield session, f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
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
    assert requests.post(address, data=json.dumps(sent), timeout=120).status_code == 415  # a stranger's form
    broken = requests.post(address, data="{", headers={"Content-Type": "application/json"}, timeout=120)
    assert broken.status_code == 400
    assert post(annotator="ben").json()["progress"].startswith("0 of")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_the_page_is_for_this_machine_and_for_answers_alone(served, tmp_path):
    """Other names, deep JSON, half letters, a closed tab, a body without end: an answer each, and nothing is kept."""
    session, address = served

    def post(body: bytes, kind: str = "application/json; charset=utf-8", **headers) -> requests.Response:
        return requests.post(address, data=body, headers={"Content-Type": kind, **headers}, timeout=120)

    name = post(b'{"annotator": "anna"}').json()["pair"]
    for host in ("evil.example", "127.0.0.1.evil.example"):
        assert post(b'{"annotator": "anna"}', Host=host).status_code == 400
        assert requests.get(address, headers={"Host": host}, timeout=120).status_code == 400
    sent = {"annotator": "anna", "pair": name, "key": "a", "questions": {}}
    for wrong in ([], "x", None, sent | {"annotator": "\ud800"}, sent | {"annotator": ["anna"]}, sent | {"key": ["a"]},
                  sent | {"key": None}, sent | {"questions": {"empathy": {}}}, sent | {"questions": 3},
                  sent | {"pair": {"a": 1}}, {"pair": name}):
        assert post(json.dumps(wrong).encode()).status_code == 400, wrong
    for body in (b"[" * 5000, b'{"a":' * 1000, b"\xff", b"", b'{"annotator": "' + b"a" * 20_000 + b'"}'):
        assert post(body).status_code == 400
    where = ("127.0.0.1", int(address.rstrip("/").rpartition(":")[2]))
    threads, closing = threading.active_count(), []
    for number in range(200):  # half open, and closed in the middle of an answer
        closing.append(socket.create_connection(where))
        closing[-1].sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"[:20 + number])
    assert post(json.dumps(sent).encode()).status_code == 200
    assert threading.active_count() <= threads + 2
    for one in closing:
        one.close()
    assert post(json.dumps(sent).encode()).status_code == 409
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_two_at_once_do_not_write_to_one_file(served, world, pairs, tmp_path):
    done = in_terminal(world / "pairs.jsonl", tmp_path / "answers.jsonl", "a\n")
    assert done.returncode == 2
    assert b"another feedback.annotate writes to it" in done.stderr and done.stderr.count(b"\n") == 1
    assert not (tmp_path / "answers.jsonl").read_text()


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


def test_questions_however_their_contractions_are_spelt():
    asked = ["What did you do?", "what's your name ?", "What’s your name?", "what 's your name ?", "who're they ?",
             "where'd you go ?", "how`ve you been ?", "Isn’t it late?", "isn ' t it late ?", "wo n't you come ?",
             "ca n't you ?", "whats up ?", "dont you like it ?", "must we go ?", "ain't it nice ?", "d'you like tea ?"]
    told = ["Really?", "What a day.", "", "it's the dog's ball ?", "they're here , ok ?", "that's what i 'd say .",
            "let's go , ok ?", "you like dogs' toys ?"]
    assert [text for text in asked + told if metrics.question(text)] == asked
    assert metrics.repetition("they can’t sing", ["we can't dance", "oh"]) == pytest.approx(-1 / 3)  # one word, not two


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


# ------------------------------------------------------------------------------------------------ reward models


def reward_flags(world: Path, folder: Path, **changed) -> Namespace:
    """feedback.reward's command line."""
    return Namespace(**{
        "model_checkpoint": str(world / "run"), "pairs": str(world / "pairs.jsonl"),
        "answers": [str(folder / "answers.jsonl")], "reward": str(folder / "reward"),
        "held_out": 0.3, "n_epochs": 16, "train_batch_size": 4, "lr": 3e-3,
        "max_norm": 1.0, "save_every": 1000, "fp16": "", "device": "cpu", "seed": 1, "lm_coef": 0.0, "mc_coef": 1.0,
        "gradient_accumulation_steps": 1, "max_len": 0, "shard": False} | changed)


@pytest.fixture(scope="module")
def judged(world, pairs, tmp_path_factory) -> Path:
    """A folder with answers that prefer the longer text, and the reward model learnt from them."""
    folder = tmp_path_factory.mktemp("judged")
    answered(folder, *(answer(name, int(len(pair["replies"][1]["text"]) > len(pair["replies"][0]["text"])))
                       for name, pair in pairs.items()))
    arguments = reward_flags(world, folder)
    reward.train_reward(arguments)
    return folder


def test_the_reward_is_scaled_on_held_out_replies_and_its_accuracy_is_theirs(world, pairs, judged):
    """From the folder alone, by another way: one reply a row, the division drawn again."""
    figures = json.loads((judged / "reward" / "reward.json").read_text())
    better, _ = annotate.preferences(pairs, annotate.read_answers([judged / "answers.jsonl"], pairs))
    apart = held_out(pairs.values(), 0.3, 1)
    tests = [(pair, best) for pair, best in better if pair["pair"] in apart]
    kept = [pair for pair, _ in better if pair["pair"] not in apart]
    assert (figures["training_pairs"], figures["held_out_pairs"]) == (len(kept), len(tests))
    assert not {pair["dialog"] for pair, _ in tests} & {pair["dialog"] for pair in kept}
    model = reward.RewardModel(str(judged / "reward"))
    scores = [[model([(pair["persona"], pair["history"], [reply["text"]])])[0][0] for reply in pair["replies"]]
              for pair, _ in tests]
    flat = torch.tensor(scores).flatten()
    assert flat.mean() == pytest.approx(0, abs=1e-4) and flat.std(unbiased=False) == pytest.approx(1, abs=1e-4)
    right = sum(two[best] > two[1 - best] for two, (_, best) in zip(scores, tests, strict=True))
    assert figures["accuracy"] == pytest.approx(right / len(tests))
    assert "Calibration" in (judged / "reward" / "reward.html").read_text()


def test_the_reward_model_learns_what_people_prefer(pairs, judged):
    """Of the pairs it has learnt from, it knows nearly all: the longer one."""
    model = reward.RewardModel(str(judged / "reward"))
    apart = held_out(pairs.values(), 0.3, 1)
    kept = [pair for pair in pairs.values() if pair["pair"] not in apart]
    scores = model([(pair["persona"], pair["history"], [reply["text"] for reply in pair["replies"]]) for pair in kept])
    longer = [int(len(pair["replies"][1]["text"]) > len(pair["replies"][0]["text"])) for pair in kept]
    assert sum(row[best] > row[1 - best] for row, best in zip(scores, longer, strict=True)) >= 0.9 * len(kept)


class Killed(Exception):
    pass


def killed_after(monkeypatch, module, count: int) -> None:
    """The ``count``-th snapshot that ``module`` writes is its last."""
    save, saved = module.save_snapshot, []

    def save_and_die(*args) -> None:
        save(*args)
        saved.append(None)
        if len(saved) == count:
            raise Killed

    monkeypatch.setattr(module, "save_snapshot", save_and_die)


def test_a_killed_reward_training_goes_on_to_the_same_weights(world, judged, tmp_path, monkeypatch):
    (tmp_path / "answers.jsonl").write_bytes((judged / "answers.jsonl").read_bytes())
    arguments = reward_flags(world, judged, reward=str(tmp_path / "reward"), save_every=5)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, reward, 3)
        reward.train_reward(arguments)
    assert not (tmp_path / "reward" / "reward.json").exists()
    with pytest.raises(InputError, match="no finished reward model"):
        reward.RewardModel(str(tmp_path / "reward"))
    with pytest.raises(InputError, match="--lr 0.1: .* was begun with 0.003"):
        reward.train_reward(Namespace(**vars(arguments) | {"lr": 0.1}))
    reward.train_reward(arguments)
    assert reward.train_reward(arguments) == json.loads((tmp_path / "reward" / "reward.json").read_text())
    for name in ("model.safetensors", "reward.json"):
        assert (tmp_path / "reward" / name).read_bytes() == (judged / "reward" / name).read_bytes()


def test_a_damaged_snapshot_is_passed_over(world, judged, tmp_path, monkeypatch, caplog):
    arguments = reward_flags(world, judged, reward=str(tmp_path / "reward"), save_every=2, n_epochs=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, reward, 2)
        reward.train_reward(arguments)
    snapshot = tmp_path / "reward" / FILE
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    reward.train_reward(arguments)
    assert "is damaged, it is not what was written; the training begins anew" in caplog.text
    reward.train_reward(Namespace(**vars(arguments) | {"reward": str(tmp_path / "other")}))
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("reward", "other")]
    assert models[0] == models[1]


def test_no_slip_is_final(world, judged, tmp_path):
    """A command that fails for a mistyped name leaves nothing behind that refuses the corrected one."""
    missing = str(tmp_path / "missing.jsonl")
    right = {"reward": str(tmp_path / "reward"), "n_epochs": 1}
    for wrong in ({"model_checkpoint": missing}, {"pairs": missing}, {"answers": [missing]}, {"held_out": 1.0}):
        with pytest.raises(InputError):
            reward.train_reward(reward_flags(world, judged, **right | wrong))
    assert reward.train_reward(reward_flags(world, judged, **right))["training_pairs"]

    for algorithm, slips in (("rloo", ("--model_checkpoint", "--dataset_path", "--reward_model")),
                             ("dpo", ("--model_checkpoint", "--pairs", "--answers", "--max_length"))):
        right = ["--algorithm", algorithm, "--steps", 1, "--evaluation_contexts", 2]
        for flag in slips:
            wrong = 10_000 if flag == "--max_length" else missing
            with pytest.raises(InputError):
                policy.train_policy(policy_flags(world, tmp_path / algorithm, judged, *right, flag, wrong))
        assert (policy.train_policy(policy_flags(world, tmp_path / algorithm, judged, *right)) / FILE).exists()


def test_a_folder_with_a_model_that_was_made_otherwise_is_not_called_finished(world, judged):
    with pytest.raises(InputError, match="run: holds a model that was made otherwise; name another folder"):
        policy.train_policy(policy_flags(world, world / "run", judged))


def test_a_reward_model_of_coin_flips_is_warned_of(world, pairs, tmp_path, caplog):
    draw = random.Random(0)
    answered(tmp_path, *(answer(name, draw.randrange(2)) for name in pairs))
    arguments = reward_flags(world, tmp_path, n_epochs=1)
    figures = reward.train_reward(arguments)
    assert figures["accuracy_interval"][0] <= 0.5 and "what follows it follows noise" in caplog.text
    answered(tmp_path, answer(next(iter(pairs)), 0))
    with pytest.raises(InputError, match="was begun with other answers than there are now"):
        reward.train_reward(arguments)
    with pytest.raises(InputError, match="too few to learn from some and test on others"):
        reward.train_reward(Namespace(**vars(arguments) | {"reward": str(tmp_path / "other")}))


def test_wilson_interval():
    """Against the definition: the shares at whose normal approximation the seen share is 1.96 deviations off."""
    for right, total in [(0, 10), (7, 10), (447, 513), (10, 10)]:
        low, high = reward.wilson_interval(right, total)
        for bound in (low, high):
            assert abs(right / total - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / total), abs=1e-9)
        assert -1e-12 <= low <= right / total <= high <= 1 + 1e-12


# ------------------------------------------------------------------------------------------------------ policies


def test_advantages_by_hand():
    """Three steps with γ = 0.9, λ = 0.5, and a reply of one step beside them."""
    rewards = torch.tensor([[1.0, -2.0, 3.0], [5.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 1.0, 2.0], [1.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    deltas = [1 + 0.9 * 1.0 - 0.5, -2 + 0.9 * 2.0 - 1.0, 3 - 2.0]
    third = deltas[2]
    second = deltas[1] + 0.45 * third
    first = deltas[0] + 0.45 * second
    got = policy.advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    assert torch.allclose(got, torch.tensor([[first, second, third], [4.0, 0.0, 0.0]]))
    # with λ = γ = 1 it is what is still to come, less the value
    got = policy.advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(got[0], torch.tensor([2.0 - 0.5, 1.0 - 1.0, 3.0 - 2.0]))


def test_leave_one_out_by_hand():
    got = policy.leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert torch.allclose(got, torch.tensor([[1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5], [0.0, 0.0, 0.0]]))


def test_ppo_gradient_by_hand():
    """d/dlogp of -min(ratio·A, clipped·A) is -ratio·A inside the clip, 0 where clipping gains nothing more."""
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.1, 0.5, 0.5, -0.5]], requires_grad=True)
    advantage = torch.tensor([[2.0, 2.0, -2.0, 2.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = policy.ppo_loss(new, old, advantage, mask, clip=0.2)
    e = math.exp
    assert loss.item() == pytest.approx(-(2 * e(0.1) + 2 * 1.2 - 2 * e(0.5) + 2 * e(-0.5)) / 4)
    loss.backward()
    assert torch.allclose(new.grad, torch.tensor([[-2 * e(0.1), 0.0, 2 * e(0.5), -2 * e(-0.5)]]) / 4)


def test_value_loss_by_hand():
    """A value that moved by more than 0.2 is held to the worse of both errors."""
    values = torch.tensor([[1.0, 0.1, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss = policy.value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), mask, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * ((0.2 - 1) ** 2 + (0.1 - 1) ** 2) / 2)
    loss.backward()
    assert torch.allclose(values.grad, torch.tensor([[0.0, (0.1 - 1) / 2, 0.0]]))


def test_dpo_loss_is_that_of_trl():
    """Numbers that `_compute_loss` of TRL 1.16.0's DPOTrainer gave for these log-probabilities of two pairs."""
    ours = torch.tensor([[-1.0, -2.0, -0.5, 0.0], [-0.3, -0.7, 0.0, 0.0],
                         [-2.0, -1.5, -1.0, -0.25], [-1.1, -0.4, -0.9, 0.0]]).sum(1).requires_grad_()
    reference = torch.tensor([[-1.5, -2.1, -0.4, 0.0], [-0.2, -0.9, 0.0, 0.0],
                              [-1.0, -1.5, -1.3, -0.5], [-1.4, -0.3, -0.8, 0.0]]).sum(1)
    for beta, recorded in {0.1: 0.66996104, 0.5: 0.58836812}.items():
        loss = policy.dpo_loss(ours[:2], ours[2:], reference[:2], reference[2:], beta)
        assert loss.item() == pytest.approx(recorded, abs=1e-6)
    # dloss/dbetter = -β σ(-β margin) a pair, over two pairs; margins by hand: 0.5 + 0.45 and 0.1 - 0.1
    loss.backward()
    by_hand = [-0.5 / (1 + math.exp(0.5 * margin)) / 2 for margin in (0.95, 0.0)]
    assert torch.allclose(ours.grad, torch.tensor([*by_hand, *(-one for one in by_hand)]))


def test_the_price_of_a_nat_is_steered():
    kl = policy.AdaptiveKL(price=0.2, target=6.0, horizon=1000)
    kl.update(kl=6.3, replies=100)  # 5 % too far
    assert kl.price == pytest.approx(0.2 * (1 + 0.05 * 0.1))
    kl.update(kl=60.0, replies=100)  # an error counts for 20 % at most
    assert kl.price == pytest.approx(0.2 * 1.005 * 1.02)
    kl = policy.AdaptiveKL(price=0.2, target=0.0, horizon=1000)
    kl.update(kl=60.0, replies=100)
    assert kl.price == 0.2


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A policy and a reference of 3 words and the control tokens, replies of at most 2 tokens, and a context."""
    folder = tmp_path_factory.mktemp("small")
    special = Specials(3, 4, 5, 6, 7)
    models = []
    for seed in (0, 1):
        bare = make_checkpoint(folder / f"bare{seed}", n_layer=1, n_embd=8, n_head=2, n_positions=32, vocab_size=8,
                               initializer_range=0.7)
        torch.manual_seed(seed)
        models.append(policy.PolicyNetwork(load_model(str(bare))))
    return *models, special, policy.Turn([[0, 1]], [[2], [1, 1], [0]], ([], []), [])


def likelihood(model, turn, reply: policy.Reply, special: Specials) -> float:
    """Log-probability of a reply, token by token, as the decoder computes it: any control token ends it."""
    context = build_context(turn.persona, turn.history, special)
    ids, types, total = context.ids + [special.speaker1], context.types + [special.speaker1], 0.0
    for token in [*reply.ids, None][:len(reply.ids) + reply.ended]:
        with torch.no_grad():
            out = model.model(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        probabilities = out.logits[0, -1].double().softmax(-1)
        total += math.log(probabilities[list(special)].sum() if token is None else probabilities[token])
        ids, types = [*ids, token], [*types, special.speaker1]
    return total


def every_reply() -> list[policy.Reply]:
    """All that can be said in at most 2 of 3 words."""
    cut = [policy.Reply([one, other], False) for one in range(3) for other in range(3)]
    return [policy.Reply([], True), *(policy.Reply([one], True) for one in range(3)), *cut]


def measured(small, replies: list[policy.Reply]) -> tuple:
    ours, reference, special, turn = small
    actions = policy.pack_actions([turn._replace(replies=replies)], special, ours.model)
    with torch.no_grad():
        both = [policy.action_logprobs(network(actions.batch)[0], special) for network in (ours, reference)]
    return actions, *both


def test_log_probabilities_are_those_of_the_decoder(small):
    """All replies in one packed row against each token by token; their probabilities add up to 1."""
    replies = every_reply()
    actions, ours, reference = measured(small, replies)
    for network, logprobs in ((small[0], ours), (small[1], reference)):
        got = policy.chosen(logprobs, actions).sum(1)
        want = torch.tensor([likelihood(network, small[3], reply, small[2]) for reply in replies])
        assert torch.allclose(got, want.float(), atol=1e-5)
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_divergence_is_never_negative_and_unbiased(small):
    """Its mean over all replies, weighted by their probability, is the KL of the two distributions over replies."""
    replies = every_reply()
    actions, ours, reference = measured(small, replies)
    log_p, log_q = (policy.chosen(one, actions).sum(1).double() for one in (ours, reference))
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    per_reply = (policy.divergence(ours, reference)[actions.place] * actions.mask).sum(1).double()
    assert float((log_p.exp() * per_reply).sum()) == pytest.approx(exact, rel=1e-5)
    assert (per_reply >= 0).all() and (log_p - log_q).min() < 0  # a mere log-ratio would be negative for some
    torch.manual_seed(0)
    for scale in (1e-4, 1e-2, 1.0, 30.0):
        logits = torch.randn(200, 50)
        near = (logits + scale * torch.randn(200, 50)).log_softmax(-1)
        kl = policy.divergence(logits.log_softmax(-1), near)
        exact = F.kl_div(near.double(), logits.double().log_softmax(-1), log_target=True, reduction="none").sum(-1)
        assert (kl >= 0).all() and torch.allclose(kl.double(), exact, rtol=1e-2, atol=2e-6)
        assert (policy.divergence(near, near) == 0).all()


def test_samples_are_the_models_own_distribution(small):
    """How often each reply is said, of 4,000, against its probability; and the sampled divergence against the exact."""
    ours, reference, special, turn = small
    torch.manual_seed(0)
    said = policy.sample_replies(ours.model, [turn], special, max_length=2, samples=4000)[0].replies
    replies = every_reply()
    for reply in replies:
        probability = math.exp(likelihood(ours, turn, reply, special))
        share = said.count(reply) / len(said)
        assert abs(share - probability) < 4.5 * math.sqrt(probability * (1 - probability) / len(said)) + 1e-9
    assert set(map(tuple, (reply.ids for reply in said))) <= set(map(tuple, (reply.ids for reply in replies)))


def policy_flags(world: Path, folder: Path, judged: Path, *more) -> Namespace:
    """feedback.policy's own command line, small."""
    return policy.parse_args(list(map(str, [
        "--model_checkpoint", world / "run", "--dataset_path", world / "data.json", "--dataset_cache", world / "cache",
        "--keep_repeated",  # few sentences make the same dialog twice
        "--max_history", 1, "--device", "cpu", "--policy", folder, "--max_length", 6, "--batch_size", 16, "--steps", 6,
        "--lr", 3e-3, "--evaluate_every", 3, "--evaluation_contexts", 20, "--save_every", 2, "--rule",
        "--reward_model", judged / "reward", "--pairs", world / "pairs.jsonl", "--answers", judged / "answers.jsonl",
        *more])))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "dpo"])
def test_a_killed_policy_goes_on_to_the_same_run_folder(algorithm, world, judged, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    policy.train_policy(policy_flags(world, whole, judged, "--algorithm", algorithm))
    arguments = policy_flags(world, part, judged, "--algorithm", algorithm)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, policy, 2)  # at step 4, one after an evaluation
        policy.train_policy(arguments)
    with open(part / "evaluations.jsonl", "a") as file:  # as if the kill had come after the next evaluation
        file.write('{"step": 6, "kl": 99}\n')
    policy.train_policy(arguments)
    for name in ("model.safetensors", "evaluations.jsonl"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    figures = [json.loads(line) for line in (whole / "evaluations.jsonl").read_text().splitlines()]
    assert [one["step"] for one in figures] == [0, 3, 6]
    assert figures[0]["kl"] == 0 and all(one["kl"] > 0 for one in figures[1:])
    with pytest.raises(InputError, match="--steps 7: .* was begun with 6"):
        policy.train_policy(Namespace(**vars(arguments) | {"steps": 7}))


def test_the_result_is_an_ordinary_run_folder(world, judged, tmp_path):
    """The choice head is the fine-tuned model's still, plain transformers opens it, and the policy has moved."""
    run = policy.train_policy(policy_flags(world, tmp_path / "run", judged, "--algorithm", "rloo", "--steps", 2))
    before, after = load_model(str(world / "run")), load_model(str(run))
    assert torch.equal(before.multiple_choice_head.summary.weight, after.multiple_choice_head.summary.weight)
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    from transformers import OpenAIGPTDoubleHeadsModel

    plain = OpenAIGPTDoubleHeadsModel.from_pretrained(run)
    assert torch.equal(plain.transformer.tokens_embed.weight, after.get_input_embeddings().weight)
    collect.collect(flags(world, model_checkpoint=str(run), pairs=str(tmp_path / "pairs.jsonl"), contexts=4))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_policy_follows_its_reward(algorithm, world, judged, tmp_path):
    """Paid by the question alone, it asks more: the reward at the end is above that at first."""
    policy.train_policy(policy_flags(
        world, tmp_path / "run", judged, "--algorithm", algorithm, "--reward_model", "", "--utterance_metrics", 4,
        "--sentiment", 0, "--repetition", 0, "--similarity", 0, "--toxicity", 0, "--question", 1, "--steps", 15,
        "--batch_size", 32, "--kl_coef", 0.01, "--lr", 1e-2, "--evaluate_every", 15, "--save_every", 100,
        "--evaluation_contexts", 40))
    first, last = map(json.loads, (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    assert last["reward"] > first["reward"] + 0.2, (first, last)


def test_dpo_names_and_counts_the_pairs_it_cannot_learn_from(world, pairs, judged, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    trainer = policy.Trainer(policy_flags(world, tmp_path / "run", judged, "--algorithm", "dpo"))
    better, _ = annotate.preferences(pairs, annotate.read_answers([judged / "answers.jsonl"], pairs))
    apart = held_out(pairs.values(), 0.15, 42)
    kept = [(pair, best) for pair, best in better if pair["pair"] not in apart]
    ended = [(pair, best) for pair, best in kept if pair["replies"][best]["ended"]]
    assert 0 < len(trainer.pairs) == len(ended) < len(kept) < len(better)
    assert f"{len(kept) - len(ended)} (better reply cut: from these it would learn never to end)" in caplog.text
    assert f"{len(better) - len(kept)} (held out)" in caplog.text
    first = trainer.pairs[0].replies
    assert [reply.ids for reply in first] == [ended[0][0]["replies"][n]["ids"] for n in (1 - ended[0][1], ended[0][1])]
    with pytest.raises(InputError, match="no pair is left to learn from"):
        policy.Trainer(policy_flags(world, tmp_path / "other", judged, "--algorithm", "dpo", "--model_checkpoint",
                                    judged / "reward"))
    assert f"{len(kept)} (said by another model than --model_checkpoint)" in caplog.text


def test_a_policy_is_evaluated_on_dialogs_that_nobody_who_teaches_it_has_seen(world, two_sided, tmp_path, caplog):
    """By the reward model's pairs and by DPO's: neither turn nor other side of a dialog that a pair is from."""
    found, number = read_pairs(two_sided / "pairs.jsonl"), numbers(two_sided)
    answered(tmp_path, *(answer(name, n % 2) for n, name in enumerate(found)))
    reward.train_reward(reward_flags(world, tmp_path, pairs=str(two_sided / "pairs.jsonl"), n_epochs=1))
    learnt = {number[pair["dialog"]] for pair in found.values()}
    data = ["--dataset_path", two_sided / "data.json", "--dataset_cache", two_sided / "cache",
            "--pairs", two_sided / "pairs.jsonl", "--evaluation_contexts", 200]
    for n, more in enumerate([["--algorithm", "rloo"], ["--algorithm", "dpo", "--reward_model", ""]]):
        (tmp_path / str(n)).mkdir()
        trainer = policy.Trainer(policy_flags(world, tmp_path / str(n), tmp_path, *data, *more))
        turn_dialog = trainer.dataset("valid").split.turn_dialog
        evaluated = {number[turn_dialog[turn]] for turn in trainer.evaluated}
        assert evaluated and not evaluated & learnt
        assert evaluated | learnt == set(number)  # nothing more is left out
        assert len(trainer.evaluated) == sum(number[dialog] in evaluated for dialog in turn_dialog)
    assert "of dialogs that no pair is from" in caplog.text and "fewer than --evaluation_contexts 200" in caplog.text

    every = tmp_path / "every.jsonl"
    collect.collect(flags(world, dataset_path=str(two_sided / "data.json"), dataset_cache=str(two_sided / "cache"),
                          pairs=str(every), contexts=1000, replies=4))
    answered(tmp_path, *(answer(name, int(pair["replies"][1]["ended"])) for name, pair in read_pairs(every).items()))
    with pytest.raises(InputError, match="0 of .* collect pairs of fewer contexts, or of another split"):
        policy.train_policy(policy_flags(world, tmp_path / "none", tmp_path, *data, "--algorithm", "dpo",
                                         "--reward_model", "", "--pairs", every))


def test_a_policy_begins_as_its_reference_whatever_the_checkpoint_lacks(world, tmp_path):
    """A language model as others publish it, without choice head and control tokens: KL 0, and its pairs are its."""
    bare = make_checkpoint(tmp_path / "bare", n_layer=1, n_embd=32, n_head=2, n_positions=96)
    config = OpenAIGPTConfig.from_pretrained(bare)
    torch.manual_seed(5)
    OpenAIGPTLMHeadModel(config).save_pretrained(bare)
    assert len(get_tokenizer(str(bare))) > config.vocab_size  # rows are missing
    pairs_path = str(tmp_path / "pairs.jsonl")
    torch.manual_seed(6)
    collect.collect(flags(world, model_checkpoint=str(bare), pairs=pairs_path, dataset_cache=str(tmp_path / "cache"),
                          max_length=60))  # at random it ends seldom
    found = read_pairs(pairs_path)
    answered(tmp_path, *(answer(name, int(pair["replies"][1]["ended"])) for name, pair in found.items()))
    torch.manual_seed(7)
    run = policy.train_policy(policy_flags(
        world, tmp_path / "run", tmp_path, "--model_checkpoint", bare, "--algorithm", "dpo", "--reward_model", "",
        "--pairs", pairs_path, "--steps", 1, "--dataset_cache", tmp_path / "cache", "--max_length", 60))
    first, last = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    assert first["kl"] == 0 < last["kl"]


def test_rewards_read_the_history_that_they_learnt_from(world, judged, tmp_path):
    """A policy that sees one utterance is paid by those who see more: DYME all, the reward model what its pairs had."""
    arguments = policy_flags(world, tmp_path / "run", judged, "--max_history", 0, "--dyme", 1, "--dyme_dialogs", 20)
    trainer = policy.Trainer(arguments)
    dialogs = [entry["utterances"] for entry in json.loads((world / "data.json").read_text())["train"]]
    turns = [trainer.turn(trainer.contexts, number) for number in range(len(trainer.contexts))]
    assert [turn.texts[1] for turn in turns] == [turn["history"] for dialog in dialogs for turn in dialog]
    assert all(len(turn.history) == 1 for turn in turns)
    long = next(turn for turn in turns if len(turn.texts[1]) == 3)
    model, longer = trainer.reward.model, ["i like tea .", "what happened ?", *long.texts[1]]
    assert model([(long.texts[0], longer, ["yes ."])]) == model([(long.texts[0], longer[-3:], ["yes ."])])
    assert model([(long.texts[0], longer, ["yes ."])]) != model([(long.texts[0], longer[-1:], ["yes ."])])


def test_dyme_pays_people_nothing_on_average_and_cut_replies_less(world, judged, tmp_path):
    """As the reward model is scaled: so what is charged for a cut reply is worse than what people's replies get."""
    arguments = policy_flags(world, tmp_path / "run", judged, "--reward_model", "", "--dyme", 5, "--dyme_dialogs", 30)
    trainer = policy.Trainer(arguments)
    said = [[*dialog[-1]["history"], dialog[-1]["candidates"][-1]] for dialog in (
        entry["utterances"] for entry in json.loads((world / "data.json").read_text())["train"])]
    paid = torch.tensor([trainer.reward([([], dialog[:place], [dialog[place]])])[0][0]
                         for dialog in said for place in range(1, len(dialog))])
    assert paid.mean() == pytest.approx(0, abs=1e-5) and paid.std(unbiased=False) == pytest.approx(5, abs=1e-4)
    turn = trainer.turn(trainer.contexts, 0)._replace(replies=[policy.Reply([1], False)])
    assert trainer.rewards([turn]).tolist() == [-5]
    assert (paid > -5).float().mean() > 0.75


def test_a_cut_reply_is_worth_what_is_charged_for_it(world, judged, tmp_path):
    trainer = policy.Trainer(policy_flags(world, tmp_path / "run", judged, "--unfinished_reward", -3.5))
    turn = trainer.turn(trainer.contexts, 0)
    ids = trainer.tokenizer.encode("hello there .")
    turn = turn._replace(replies=[policy.Reply(ids, True), policy.Reply(ids, False)])
    model = reward.RewardModel(str(judged / "reward"))
    text = readable(trainer.tokenizer, ids)
    assert trainer.rewards([turn]).tolist() == pytest.approx([model([(*turn.texts, [text])])[0][0], -3.5])


def test_reward_terms_add_up(world, judged, tmp_path):
    arguments = policy_flags(world, tmp_path / "run", judged, "--utterance_metrics", 2, "--dyme", 0.5, "--question", 1,
                             "--dyme_dialogs", 20)
    trainer = policy.Trainer(arguments)
    turn = ([], ["hello there ."], ["what happened to you ?", "i like tea ."])
    model = reward.RewardModel(str(judged / "reward"))([turn])[0]
    weights = metrics.WEIGHTS | {"question": 1.0}
    by_hand = [score + 2 * metrics.weighted(text, turn[1], weights) + 0.5 * trainer.reward.dyme.reward(text, turn[1])
               for score, text in zip(model, turn[2], strict=True)]
    assert trainer.reward([turn])[0] == pytest.approx(by_hand)


def test_policies_say_what_they_lack(world, judged, tmp_path):
    for more, complaint in [(["--reward_model", ""], "--algorithm ppo: follows a reward"),
                            (["--algorithm", "rloo", "--samples", 1], "--samples 1: rloo compares"),
                            (["--batch_size", 10], "--batch_size 10: is no multiple of --samples 4")]:
        with pytest.raises(InputError, match=complaint):
            policy_flags(world, tmp_path, judged, *more)
    with pytest.raises(InputError, match="--max_length 95: the model has 96 positions"):
        policy.train_policy(policy_flags(world, tmp_path / "run", judged, "--max_length", 95))
    with pytest.raises(InputError, match="no finished reward model, it has no whole reward.json"):
        policy.train_policy(policy_flags(world, tmp_path / "other", judged, "--reward_model", world / "run"))
