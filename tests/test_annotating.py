"""Test collecting pairs of replies, asking people to compare them, and reading their answers."""

import json
import math
import os
import pty
import select
import shutil
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
from conftest import ROOT
from feedback_world import answer, answered, flags, numbers

from cli import InputError
from feedback import annotate, browser
from feedback import answers as answers_of
from feedback.collect import collect_pairs, model_hash
from feedback.pairs import held_out, read_pairs
from feedback.reward import RewardModel
from feedback.utterance_metrics import rule_score
from inputs import Specials
from interact import fitted_context, generate_replies
from tokenization import get_tokenizer
from weights import load_model


def test_a_pair_can_be_recomputed_from_its_line(world, pairs):
    """Recompute both replies token by token from the line, the data and the model alone."""
    pair = list(pairs.values())[-1]
    corpus = json.loads((world / "data.json").read_text())
    turns = [(entry["personality"], turn["history"]) for entry in corpus["valid"] for turn in entry["utterances"]]
    tokenizer, model = get_tokenizer(pair["checkpoint"]), load_model(pair["checkpoint"])
    assert model_hash(model) == pair["model"]
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
def test_killed_collecting_continues(world, pairs, tmp_path, cut):
    whole = (world / "pairs.jsonl").read_bytes()
    part = tmp_path / "part.jsonl"
    part.write_bytes(whole[:int(cut * len(whole))])
    collect_pairs(flags(world, pairs=str(part)))
    assert part.read_bytes() == whole
    collect_pairs(flags(world, pairs=str(part)))  # a finished file does not change
    assert part.read_bytes() == whole


def test_collecting_refuses_a_file_with_other_settings(world, pairs, tmp_path):
    part = tmp_path / "part.jsonl"
    whole = (world / "pairs.jsonl").read_bytes()
    part.write_bytes(whole)
    other_contexts = "belongs to another choice of contexts"
    for changed, complaint in [
            ({"temperature": 0.5}, "was made with another decoders"), ({"contexts": 29}, other_contexts),
            ({"seed": 8}, other_contexts), ({"max_history": 2}, "was made with another max_history")]:
        with pytest.raises(InputError, match=rf"line \d+ {complaint}"):
            collect_pairs(flags(world, pairs=str(part), **changed))
    part.write_bytes(b"what is this?\n" + whole)
    with pytest.raises(InputError, match="line 1 is not a pair"):
        collect_pairs(flags(world, pairs=str(part)))
    assert part.read_bytes() == b"what is this?\n" + whole


def test_decoders_compete(world, tmp_path):
    """Let two decoders write one reply each; the greedy one is the model's own greedy reply."""
    path = tmp_path / "pairs.jsonl"
    collect_pairs(flags(world, pairs=str(path), contexts=6, replies=1, decoder=["--no_sample", "--temperature 3"]))
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


@pytest.mark.parametrize("max_history", [0, 2])
def test_both_sides_of_a_dialog_are_held_out_together(world, two_sided, tmp_path, max_history):
    path = tmp_path / "pairs.jsonl"
    collect_pairs(flags(world, dataset_path=str(two_sided / "data.json"), dataset_cache=str(two_sided / "cache"),
                        pairs=str(path), contexts=120, replies=3, max_history=max_history))
    found, number = read_pairs(path), numbers(two_sided)
    apart = held_out(found.values(), 0.4, 1)
    kept, tests = ({number[pair["dialog"]] for name, pair in found.items() if (name in apart) == which}
                   for which in (False, True))
    assert len(kept) > 4 < len(tests) and not kept & tests
    sides = {(number[pair["dialog"]], pair["dialog"]) for pair in found.values()}
    assert len(sides) > 1.3 * len(dict(sides))  # both sides of many dialogs are present


def test_pairs_without_beginnings_are_divided_by_dialog(pairs):
    old = [{name: value for name, value in pair.items() if name != "beginnings"} for pair in pairs.values()]
    apart = held_out(old, 0.4, 1)
    tests = {pair["dialog"] for pair in old if pair["pair"] in apart}
    assert tests and not tests & {pair["dialog"] for pair in old if pair["pair"] not in apart}


def test_edited_pairs_are_named_and_skipped(world, pairs, tmp_path, caplog):
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


def test_unusable_answers_are_named_and_kept(pairs, tmp_path, caplog):
    names = list(pairs)
    path = answered(tmp_path, answer(names[0], 1), answer(names[1], 0), answer(names[1], "tie"), answer("0" * 16, 0),
                    answer(names[2], 3), answer(names[3], True), answer(names[4], 0, questions={"style": 1}),
                    answer(names[5], 0), answer(names[5], 0), {"choice": 0})
    with open(path, "a") as file:
        file.write('{"pair": "half')
    before = path.read_text()
    answers = answers_of.read_answers([path], pairs)
    assert set(answers) == {("anna", names[0]), ("anna", names[5])}
    assert "5 lines that are not complete answers (line 5, 6, 7, 10, 11)" in caplog.text
    assert "1 line about pairs that are not in the file of pairs (another model's, or edited) (line 4)" in caplog.text
    assert "2 lines that contradict each other, of one person about one pair (line 2, 3)" in caplog.text
    assert path.read_text() == before


def test_an_answer_after_a_half_written_line_is_read(pairs, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"pair": "half')
    session = annotate.Session(pairs, path, seed=0, questions=False)
    assert session.answer("anna", list(pairs)[0], "t", {})
    assert path.read_text().splitlines()[0] == '{"pair": "half'
    assert list(answers_of.read_answers([path], pairs)) == [("anna", list(pairs)[0])]


def test_majority_preferences(pairs, tmp_path):
    """Count votes: more than half of those who answered must prefer a reply, or there is no preference."""
    names = list(pairs)
    votes = {0: [0], 1: [1, 1, 0], 2: [0, 1], 3: ["tie"], 4: ["bad"], 5: ["tie", 1], 6: ["tie"] * 9 + [0],
             7: ["bad"] * 5 + [1], 8: [0, 0, 1, "tie"], 9: [0, 0, 0, "tie", "bad"], 10: ["tie", "bad"]}
    answers = {(f"person {n}", names[pair]): answer(names[pair], choice)
               for pair, choices in votes.items() for n, choice in enumerate(choices)}
    better, without = answers_of.majority_preferences(pairs, answers)
    assert [(pair["pair"], best) for pair, best in better] == [(names[0], 0), (names[1], 1), (names[9], 0)]
    assert without == {"not answered": len(names) - 11, "people who disagree": 4, "a tie": 2, "both bad": 2}


def test_kappa_by_hand():
    """Check a table of 50 pairs: both say yes to 20, only the first to 5, only the second to 10, and neither to 15."""
    first = [0] * 25 + [1] * 25
    second = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert answers_of.cohen_kappa(first, second) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert answers_of.cohen_kappa(first, first) == 1
    assert math.isnan(answers_of.cohen_kappa([0, 0], [0, 0]))
    assert answers_of.cohen_kappa([0, 1], [1, 0]) == -1


def test_agreement_counts_common_pairs_only(pairs):
    names = list(pairs)[:5]
    answers = {("anna", name): answer(name, n % 2, questions={"empathy": 0}) for n, name in enumerate(names)}
    answers |= {("ben", name): answer(name, n % 2, "ben") for n, name in enumerate(names[:4])}
    assert answers_of.agreement(answers) == ["anna and ben, choice: 4 pairs, kappa 1.00"]


def test_sides_are_random_and_answers_name_the_reply(pairs, tmp_path):
    """Press A every time: about half of the answers choose the first reply, and each names the reply shown as A."""
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


@pytest.mark.parametrize("both", [("--web", "--simulate", "coin"), ("--simulate", "rule", "--reward_model", "reward"),
                                  ("--reward_model", "reward", "--web")])
def test_only_one_way_of_answering_is_accepted(world, tmp_path, both):
    done = in_terminal(world / "pairs.jsonl", tmp_path / "answers.jsonl", "", *both)
    assert done.returncode == 2 and b"not allowed with argument" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "answers.jsonl").exists()


def test_answering_through_a_pipe_continues(world, pairs, tmp_path):
    path = tmp_path / "answers.jsonl"
    done = in_terminal(world / "pairs.jsonl", path, "a\nz\nb\na\nt\n", "--questions")
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode()
    assert f"0 of {len(pairs)} answered" in out and "empathy: a, b, t?" in out and "'z' is not one of a b t" in out
    first = json.loads(path.read_text())
    sides = first["shown"]
    assert first["choice"] == sides[0]
    assert first["questions"] == {"empathy": sides[1], "relevance": sides[0], "fluency": "tie"}
    with open(path, "a") as file:  # a name that would clear the terminal
        file.write(json.dumps(first | {"annotator": "\x1b[2J"}) + "\n")
    done = in_terminal(world / "pairs.jsonl", path, "x\nq\n")
    assert b"[2J: 1 of" in done.stdout and b"\x1b" not in done.stdout
    assert f"2 of {len(pairs)} answered; the answers are in {path}" in done.stdout.decode()
    assert [json.loads(line)["choice"] for line in path.read_text().splitlines()] == [sides[0], sides[0], "bad"]


def test_single_keys_in_a_terminal(world, pairs, tmp_path):
    """Press keys without Enter; when the second question appears, the first answer is already on the disk."""
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
    """Serve the annotation page for these pairs; yield its session and address."""
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
    assert requests.post(address, data=json.dumps(sent), timeout=120).status_code == 415  # a form on another website
    broken = requests.post(address, data="{", headers={"Content-Type": "application/json"}, timeout=120)
    assert broken.status_code == 400
    assert post(annotator="ben").json()["progress"].startswith("0 of")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_hostile_requests_to_the_page(served, tmp_path):
    """Send wrong hosts, deep JSON, lone surrogates and half-open requests; the page survives and keeps none of them."""
    session, address = served

    def post(body: bytes, kind: str = "application/json; charset=utf-8", **headers) -> requests.Response:
        return requests.post(address, data=body, headers={"Content-Type": kind, **headers}, timeout=120)

    name = post(b'{"annotator": "anna"}').json()["pair"]
    page = requests.get(address, headers={"X-Forwarded-Host": "evil.example"}, timeout=120)
    assert page.ok and "evil.example" not in page.text + str(page.headers)
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    for host in ("evil.example", "127.0.0.1.evil.example"):
        assert post(b'{"annotator": "anna"}', Host=host).status_code == 400
        assert requests.get(address, headers={"Host": host}, timeout=120).status_code == 400
    sent = {"annotator": "anna", "pair": name, "key": "a", "questions": {}}
    for wrong in ([], "x", None, sent | {"annotator": "\ud800"}, sent | {"annotator": ["anna"]}, sent | {"key": ["a"]},
                  sent | {"key": None}, sent | {"questions": {"empathy": {}}}, sent | {"questions": 3},
                  sent | {"pair": {"a": 1}}, {"pair": name}):
        assert post(json.dumps(wrong).encode()).status_code == 400, wrong
    for body in (b"[" * 5000, b'{"a":' * 1000, b"\xff", b"", b"1" * 5000):
        assert post(body).status_code == 400
    assert post(b'{"annotator": "' + b"a" * 20_000 + b'"}').status_code == 413
    where = ("127.0.0.1", int(address.rstrip("/").rpartition(":")[2]))
    threads, closing = threading.active_count(), []
    for number in range(200):  # half-open requests, which are closed below
        closing.append(socket.create_connection(where))
        closing[-1].sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"[:20 + number])
    assert post(json.dumps(sent).encode()).status_code == 200
    assert threading.active_count() <= threads + 2
    for one in closing:
        one.close()
    assert post(json.dumps(sent).encode()).status_code == 409
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_a_second_annotating_process_is_refused(served, world, pairs, tmp_path):
    done = in_terminal(world / "pairs.jsonl", tmp_path / "answers.jsonl", "a\n")
    assert done.returncode == 2
    assert b"another feedback.annotate is writing to it" in done.stderr and done.stderr.count(b"\n") == 1
    assert not (tmp_path / "answers.jsonl").read_text()


@pytest.fixture(scope="module")
def browse():
    """Open a page in Chromium: ``browse(address, viewport=…)``."""
    from playwright.sync_api import sync_playwright

    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])

        def open_page(address: str, **settings):
            page = browser.new_context(**settings).new_page()
            page.set_default_timeout(120_000)
            page.goto(address)
            return page

        yield open_page
        browser.close()


def recorded(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


def test_the_page_works_by_keyboard(served, browse, tmp_path):
    """Enter a name, then press single keys; the page shows the progress."""
    session, address = served
    page = browse(address)
    page.fill("#name", "anna")
    page.keyboard.press("Enter")
    for count, key in enumerate("atx"):
        page.locator("#progress", has_text=f"{count} of").wait_for()
        page.keyboard.press(key)
    page.locator("#progress", has_text="3 of").wait_for()
    records = recorded(tmp_path)
    assert [record["choice"] for record in records] == [records[0]["shown"][0], "tie", "bad"]
    assert [record["pair"] for record in records] == session.order[:3]


def test_the_page_works_on_a_phone_by_touch(served, browse, tmp_path):
    """Answer all questions by touch, changing one answer before the last; nothing is too small or too wide."""
    session, address = served
    session.questions = True
    page = browse(address, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.fill("#name", "anna")
    page.get_by_role("button", name="Begin").tap()
    page.locator("#replies button").nth(1).tap()
    for row, column in ((0, 0), (2, 2), (0, 1), (1, 0)):
        page.locator("#rows div").nth(row).locator("button").nth(column).tap()
    page.locator("#progress", has_text="1 of").wait_for()
    record, = recorded(tmp_path)
    sides = record["shown"]
    assert record["choice"] == sides[1]
    assert record["questions"] == {"empathy": sides[1], "relevance": sides[0], "fluency": "tie"}
    sizes = page.locator("button:visible").evaluate_all("all => all.map(one => one.getBoundingClientRect())")
    assert len(sizes) == 13 and all(size["width"] >= 44 and size["height"] >= 44 for size in sizes)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for colours in ("light", "dark"):
        page.emulate_media(color_scheme=colours)
        found = axe.run(page).response["violations"]
        assert not [one["id"] for one in found if one["impact"] in ("serious", "critical")], colours


def test_the_page_says_what_it_cannot_save_and_tries_again(served, browse, tmp_path):
    session, address = served
    page = browse(address)
    page.fill("#name", "anna")
    page.keyboard.press("Enter")
    page.locator("#progress", has_text="0 of").wait_for()
    (tmp_path / "answers.jsonl").unlink()
    (tmp_path / "answers.jsonl").mkdir()
    page.keyboard.press("a")
    page.locator("#progress", has_text="Not saved").filter(has_text="cannot be written").wait_for()
    (tmp_path / "answers.jsonl").rmdir()
    page.keyboard.press("b")
    page.locator("#progress", has_text="1 of").wait_for()
    record, = recorded(tmp_path)
    assert record["choice"] == record["shown"][1]


def test_a_reward_model_answers_by_its_rewards(pairs, judged, tmp_path):
    """Score each reply alone: the reward model's answers name the better one, and the margin makes ties."""
    model = RewardModel(str(judged / "reward"))

    def answers(margin: float) -> dict[str, object]:
        path = tmp_path / f"{margin}.jsonl"
        session = annotate.Session(pairs, path, seed=0, questions=False)
        annotate.answer_by_reward(session, "reward", str(judged / "reward"), margin)
        return {record["pair"]: record["choice"] for record in map(json.loads, path.read_text().splitlines())}

    gaps = {}
    for name, pair in pairs.items():
        alone = [(pair["persona"], pair["history"], [reply["text"]]) for reply in pair["replies"]]
        (first,), (second,) = model(alone)
        gaps[name] = second - first
    assert answers(0.0) == {name: int(gap > 0) for name, gap in gaps.items()}
    margin = sorted(map(abs, gaps.values()))[len(gaps) // 2] + 1e-4
    assert answers(margin) == {name: "tie" if abs(gap) < margin else int(gap > 0) for name, gap in gaps.items()}


def test_simulated_annotators(pairs, tmp_path):
    """Check that the rule follows the score except for the noise, that the coin does not, and that both are seeded."""

    def simulated(how: str, noise: float, seed: int = 0) -> list[tuple[str, object]]:
        path = tmp_path / f"{how}-{noise}-{seed}-{time.monotonic_ns()}.jsonl"
        session = annotate.Session(pairs, path, seed, questions=False)
        annotate.simulate(session, how, how, noise)
        return [(record["pair"], record["choice"]) for record in map(json.loads, path.read_text().splitlines())]

    def right(choices) -> list[bool]:
        score = {name: [rule_score(reply["text"]) for reply in pair["replies"]]
                 for name, pair in pairs.items()}
        return [score[name][choice] > score[name][1 - choice] for name, choice in choices if choice != "tie"]

    assert all(right(simulated("rule", 0.0))) and not any(right(simulated("rule", 1.0)))
    assert simulated("rule", 0.1) == simulated("rule", 0.1)
    assert simulated("coin", 0.0, seed=0) != simulated("coin", 0.0, seed=1)
    chosen = [choice for seed in range(20) for _, choice in simulated("coin", 0.0, seed)]
    assert abs(sum(chosen) / len(chosen) - 0.5) < 0.1
    flips = [one for seed in range(20) for one in right(simulated("rule", 0.1, seed))]
    assert 0.85 < sum(flips) / len(flips) < 0.95
