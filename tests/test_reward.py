"""Test reward models, which learn what people prefer."""

import json
import random
from argparse import Namespace
from itertools import combinations, product

import numpy as np
import pytest
import torch
from feedback_world import WORDS, Killed, answer, answered, killed_after, policy_flags, reward_flags
from torch.nn import functional as F

from cli import InputError
from decoding import load_checkpoint
from feedback import answers as answers_of
from feedback import policy, reward
from feedback.pairs import held_out
from feedback.snapshot import FILE
from inputs import collate


def test_scale_and_accuracy_on_held_out_pairs(world, pairs, judged):
    """Recompute scale and accuracy from the folder: score one reply per row, and divide the pairs again."""
    figures = json.loads((judged / "reward" / "reward.json").read_text())
    better, _ = answers_of.majority_preferences(pairs, answers_of.read_answers([judged / "answers.jsonl"], pairs))
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


def test_all_pairs_of_a_context_share_a_row(world):
    """Compare 30 replies to one context two by two, and a few to another: rows score them as each pair alone does."""
    model, tokenizer = load_checkpoint(str(world / "run"))
    texts = [" ".join(words) for words in product(WORDS[:2], WORDS, WORDS)][:30]

    def pair(history: list[str], replies: tuple[str, str]) -> dict:
        return {"persona": ["i am number 1 ."], "history": history, "replies": [{"text": text} for text in replies]}

    better = [(pair(["hello there ."], two), number % 2) for number, two in enumerate(combinations(texts, 2))]
    better[7:7] = [(pair(["i like tea ."], two), 1) for two in combinations(texts[:4], 2)]
    groups = reward.group_by_context(better)
    told = [(group.history, group.replies[worse], group.replies[best])
            for group in groups for worse, best in group.pairs]
    assert sorted(told) == sorted((one["history"], one["replies"][1 - best]["text"], one["replies"][best]["text"])
                                  for one, best in better)
    assert max(len(group.replies) for group in groups) == reward.MOST_REPLIES
    rows = [group.pack(tokenizer, model) for group in groups]
    with torch.no_grad():
        losses = model(**collate(rows, tokenizer.pad_token_id))
    alone = reward.raw_scores(model, tokenizer, [(["i am number 1 ."], history, two) for history, *two in told])
    loss = -F.logsigmoid(torch.tensor([best - worse for worse, best in alone]).double()).mean()
    assert losses.mc_loss.item() == pytest.approx(loss.item(), rel=1e-5) and losses.lm_loss == 0
    tokens = sum(len(row.input_ids) for row in rows)
    assert tokens < 0.5 * sum(len(reward.pack_texts([], history, two, tokenizer, model).input_ids)
                              for history, *two in told)


def test_the_interval_counts_contexts(world):
    """Let the model be right on all 28 pairs of one context and wrong on all of another: anything is possible."""
    model, tokenizer = load_checkpoint(str(world / "run"))
    texts = [" ".join(words) for words in product(WORDS[:2], WORDS)][:8]
    better = []
    for history, right in (["hello there ."], True), (["i like tea ."], False):
        scores = dict(zip(texts, reward.raw_scores(model, tokenizer, [([], history, texts)])[0], strict=True))
        for two in combinations(texts, 2):
            pair = {"persona": [], "history": history, "replies": [{"text": text} for text in two]}
            better.append((pair, int((scores[two[1]] > scores[two[0]]) == right)))
    figures = reward.measure_held_out(model, tokenizer, better, Namespace(fp16=""))
    assert figures["accuracy"] == 0.5 and figures["accuracy_interval"] == (0, 1)


def test_the_reward_model_learns_what_people_prefer(pairs, judged):
    """Score the training pairs: nearly always the longer reply wins, as people preferred."""
    model = reward.RewardModel(str(judged / "reward"))
    apart = held_out(pairs.values(), 0.3, 1)
    kept = [pair for pair in pairs.values() if pair["pair"] not in apart]
    scores = model([(pair["persona"], pair["history"], [reply["text"] for reply in pair["replies"]]) for pair in kept])
    longer = [int(len(pair["replies"][1]["text"]) > len(pair["replies"][0]["text"])) for pair in kept]
    assert sum(row[best] > row[1 - best] for row, best in zip(scores, longer, strict=True)) >= 0.9 * len(kept)


def test_a_reward_model_of_low_rank_in_half_precision(world, pairs, judged, tmp_path, monkeypatch):
    """Train only an adapter, killed once: it is saved alone, and loaded it scores as the figures say."""
    arguments = reward_flags(world, judged, reward=str(tmp_path / "reward"), lora=4, fp16="bf16", lr=3e-2, save_every=9)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, reward, 2)
        reward.train_reward(arguments)
    figures = reward.train_reward(arguments)
    assert sorted(path.name for path in (tmp_path / "reward").glob("*.safetensors")) == [
        "adapter_model.safetensors", FILE]
    model, apart = reward.RewardModel(str(tmp_path / "reward"), fp16="bf16"), held_out(pairs.values(), 0.3, 1)
    better, _ = answers_of.majority_preferences(pairs, answers_of.read_answers([judged / "answers.jsonl"], pairs))
    right = {True: [], False: []}
    for pair, best in better:
        scores, = model([(pair["persona"], pair["history"], [reply["text"] for reply in pair["replies"]])])
        right[pair["pair"] in apart].append(scores[best] > scores[1 - best])
    assert np.mean(right[True]) == pytest.approx(figures["accuracy"]) and np.mean(right[False]) > 0.8


def test_a_killed_reward_training_resumes_exactly(world, judged, tmp_path, monkeypatch):
    (tmp_path / "answers.jsonl").write_bytes((judged / "answers.jsonl").read_bytes())
    arguments = reward_flags(world, judged, reward=str(tmp_path / "reward"), save_every=5)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, reward, 3)
        reward.train_reward(arguments)
    assert not (tmp_path / "reward" / "reward.json").exists()
    with pytest.raises(InputError, match="is not a finished reward model"):
        reward.RewardModel(str(tmp_path / "reward"))
    with pytest.raises(InputError, match="--lr 0.1: .* was begun with 0.003"):
        reward.train_reward(Namespace(**vars(arguments) | {"lr": 0.1}))
    reward.train_reward(arguments)
    assert reward.train_reward(arguments) == json.loads((tmp_path / "reward" / "reward.json").read_text())
    for name in ("model.safetensors", "reward.json"):
        assert (tmp_path / "reward" / name).read_bytes() == (judged / "reward" / name).read_bytes()


def test_a_damaged_snapshot_is_skipped(world, judged, tmp_path, monkeypatch, caplog):
    arguments = reward_flags(world, judged, reward=str(tmp_path / "reward"), save_every=2, n_epochs=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, reward, 2)
        reward.train_reward(arguments)
    snapshot = tmp_path / "reward" / FILE
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    reward.train_reward(arguments)
    assert "is damaged, its hash differs; training starts from the beginning" in caplog.text
    reward.train_reward(Namespace(**vars(arguments) | {"reward": str(tmp_path / "other")}))
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("reward", "other")]
    assert models[0] == models[1]


def test_a_failed_command_leaves_nothing_behind(world, judged, tmp_path):
    """Fail with mistyped names, then run the corrected command in the same folder."""
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


def test_a_folder_with_another_model_is_refused(world, judged):
    with pytest.raises(InputError, match="run: contains a model that another program made; name another folder"):
        policy.train_policy(policy_flags(world, world / "run", judged))


def test_a_reward_model_of_coin_flips_warns(world, pairs, tmp_path, caplog):
    draw = random.Random(0)
    answered(tmp_path, *(answer(name, draw.randrange(2)) for name in pairs))
    arguments = reward_flags(world, tmp_path, n_epochs=1)
    figures = reward.train_reward(arguments)
    assert figures["accuracy_interval"][0] <= 0.5 and "may learn only noise" in caplog.text
    answered(tmp_path, answer(next(iter(pairs)), 0))
    with pytest.raises(InputError, match="was begun with other answers; name"):
        reward.train_reward(arguments)
    with pytest.raises(InputError, match="too few for training and testing"):
        reward.train_reward(Namespace(**vars(arguments) | {"reward": str(tmp_path / "other")}))
