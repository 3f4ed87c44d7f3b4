"""Test policies that learn from rewards and pairs: PPO, RLOO, DPO."""

import json
import math
from argparse import Namespace

import pytest
import torch
from conftest import make_checkpoint
from feedback_world import Killed, answer, answered, flags, killed_after, numbers, policy_flags, reward_flags
from torch.nn import functional as F
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from cli import InputError
from feedback import answers as answers_of
from feedback import policy, reward
from feedback.collect import collect_pairs
from feedback.pairs import held_out, read_pairs
from feedback.utterance_metrics import WEIGHTS, weighted
from inputs import Specials, build_context
from interact import readable
from tokenization import get_tokenizer
from weights import load_model


def test_advantages_by_hand():
    """Use three steps with γ = 0.9 and λ = 0.5, beside a reply of one step."""
    rewards = torch.tensor([[1.0, -2.0, 3.0], [5.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 1.0, 2.0], [1.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    deltas = [1 + 0.9 * 1.0 - 0.5, -2 + 0.9 * 2.0 - 1.0, 3 - 2.0]
    third = deltas[2]
    second = deltas[1] + 0.45 * third
    first = deltas[0] + 0.45 * second
    got = policy.advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    assert torch.allclose(got, torch.tensor([[first, second, third], [4.0, 0.0, 0.0]]))
    # with λ = γ = 1 the advantage is the sum of the rewards to come, minus the value
    got = policy.advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(got[0], torch.tensor([2.0 - 0.5, 1.0 - 1.0, 3.0 - 2.0]))


def test_leave_one_out_by_hand():
    got = policy.leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert torch.allclose(got, torch.tensor([[1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5], [0.0, 0.0, 0.0]]))


def test_ppo_gradient_by_hand():
    """Differentiate -min(ratio·A, clipped·A): -ratio·A inside the clip, 0 where the clipped term is the minimum."""
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
    """Move a value by more than 0.2: the larger of both errors counts."""
    values = torch.tensor([[1.0, 0.1, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss = policy.value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), mask, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * ((0.2 - 1) ** 2 + (0.1 - 1) ** 2) / 2)
    loss.backward()
    assert torch.allclose(values.grad, torch.tensor([[0.0, (0.1 - 1) / 2, 0.0]]))


def test_dpo_loss_equals_trls():
    """Compare with what `_compute_loss` of TRL 1.16.0's DPOTrainer gave for these log-probabilities of two pairs."""
    ours = torch.tensor([[-1.0, -2.0, -0.5, 0.0], [-0.3, -0.7, 0.0, 0.0],
                         [-2.0, -1.5, -1.0, -0.25], [-1.1, -0.4, -0.9, 0.0]]).sum(1).requires_grad_()
    reference = torch.tensor([[-1.5, -2.1, -0.4, 0.0], [-0.2, -0.9, 0.0, 0.0],
                              [-1.0, -1.5, -1.3, -0.5], [-1.4, -0.3, -0.8, 0.0]]).sum(1)
    for beta, recorded in {0.1: 0.66996104, 0.5: 0.58836812}.items():
        loss = policy.dpo_loss(ours[:2], ours[2:], reference[:2], reference[2:], beta)
        assert loss.item() == pytest.approx(recorded, abs=1e-6)
    # dloss/dbetter = -β σ(-β margin) per pair, averaged over two pairs with the margins 0.5 + 0.45 and 0.1 - 0.1
    loss.backward()
    by_hand = [-0.5 / (1 + math.exp(0.5 * margin)) / 2 for margin in (0.95, 0.0)]
    assert torch.allclose(ours.grad, torch.tensor([*by_hand, *(-one for one in by_hand)]))


def test_the_kl_price_adapts():
    kl = policy.AdaptiveKL(price=0.2, target=6.0, horizon=1000)
    kl.update(kl=6.3, replies=100)  # 5 % above the target
    assert kl.price == pytest.approx(0.2 * (1 + 0.05 * 0.1))
    kl.update(kl=60.0, replies=100)  # the error is clipped to 20 %
    assert kl.price == pytest.approx(0.2 * 1.005 * 1.02)
    kl = policy.AdaptiveKL(price=0.2, target=0.0, horizon=1000)
    kl.update(kl=60.0, replies=100)
    assert kl.price == 0.2


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Make a policy and a reference that know 3 words and the control tokens, and a context."""
    folder = tmp_path_factory.mktemp("small")
    special = Specials(3, 4, 5, 6, 7)
    models = []
    for seed in (0, 1):
        bare = make_checkpoint(folder / f"bare{seed}", n_layer=1, n_embd=8, n_head=2, n_positions=32, vocab_size=8,
                               initializer_range=0.7)
        torch.manual_seed(seed)
        models.append(policy.PolicyNetwork(load_model(str(bare))))
    return *models, special, policy.Context([[0, 1]], [[2], [1, 1], [0]], ([], []), [])


def likelihood(model, turn, reply: policy.ReplyTokens, special: Specials) -> float:
    """Return a reply's log-probability, token by token as the decoder computes it; any control token ends a reply."""
    context = build_context(turn.persona, turn.history, special)
    ids, types, total = context.ids + [special.speaker1], context.types + [special.speaker1], 0.0
    for token in [*reply.ids, None][:len(reply.ids) + reply.ended]:
        with torch.no_grad():
            out = model.model(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        probabilities = out.logits[0, -1].double().softmax(-1)
        total += math.log(probabilities[list(special)].sum() if token is None else probabilities[token])
        ids, types = [*ids, token], [*types, special.speaker1]
    return total


def every_reply() -> list[policy.ReplyTokens]:
    """Return all replies of at most 2 of 3 words."""
    cut = [policy.ReplyTokens([one, other], False) for one in range(3) for other in range(3)]
    return [policy.ReplyTokens([], True), *(policy.ReplyTokens([one], True) for one in range(3)), *cut]


def measured(small, replies: list[policy.ReplyTokens]) -> tuple:
    ours, reference, special, turn = small
    actions = policy.pack_actions([turn._replace(replies=replies)], special, ours.model)
    with torch.no_grad():
        both = [policy.action_logprobs(network(actions.batch)[0], special) for network in (ours, reference)]
    return actions, *both


def test_log_probabilities_equal_the_decoders(small):
    """Compare all replies in one packed row with each token by token; their probabilities add up to 1."""
    replies = every_reply()
    actions, ours, reference = measured(small, replies)
    for network, logprobs in ((small[0], ours), (small[1], reference)):
        got = policy.chosen_logprobs(logprobs, actions).sum(1)
        want = torch.tensor([likelihood(network, small[3], reply, small[2]) for reply in replies])
        assert torch.allclose(got, want.float(), atol=1e-5)
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_divergence_is_unbiased_and_never_negative(small):
    """Weight the replies' divergence by their probabilities: the sum is the KL divergence between the distributions."""
    replies = every_reply()
    actions, ours, reference = measured(small, replies)
    log_p, log_q = (policy.chosen_logprobs(one, actions).sum(1).double() for one in (ours, reference))
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    per_reply = (policy.divergence(ours, reference)[actions.place] * actions.mask).sum(1).double()
    assert float((log_p.exp() * per_reply).sum()) == pytest.approx(exact, rel=1e-5)
    assert (per_reply >= 0).all() and (log_p - log_q).min() < 0  # the plain log-ratio is negative for some
    torch.manual_seed(0)
    for scale in (1e-4, 1e-2, 1.0, 30.0):
        logits = torch.randn(200, 50)
        near = (logits + scale * torch.randn(200, 50)).log_softmax(-1)
        kl = policy.divergence(logits.log_softmax(-1), near)
        exact = F.kl_div(near.double(), logits.double().log_softmax(-1), log_target=True, reduction="none").sum(-1)
        assert (kl >= 0).all() and torch.allclose(kl.double(), exact, rtol=1e-2, atol=2e-6)
        assert (policy.divergence(near, near) == 0).all()


def test_samples_follow_the_policys_distribution(small):
    """Compare how often each reply occurs among 4,000 samples with its probability."""
    ours, reference, special, turn = small
    torch.manual_seed(0)
    said = policy.sample_replies(ours, [turn], special, max_length=2, samples=4000)[0].replies
    replies = every_reply()
    for reply in replies:
        probability = math.exp(likelihood(ours, turn, reply, special))
        share = said.count(reply) / len(said)
        assert abs(share - probability) < 4.5 * math.sqrt(probability * (1 - probability) / len(said)) + 1e-9
    assert set(map(tuple, (reply.ids for reply in said))) <= set(map(tuple, (reply.ids for reply in replies)))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "dpo"])
def test_a_killed_policy_training_resumes_exactly(algorithm, world, judged, tmp_path, monkeypatch):
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
    """Open the policy in plain transformers; its weights have moved, but the choice head has not."""
    run = policy.train_policy(policy_flags(world, tmp_path / "run", judged, "--algorithm", "rloo", "--steps", 2))
    before, after = load_model(str(world / "run")), load_model(str(run))
    assert torch.equal(before.multiple_choice_head.summary.weight, after.multiple_choice_head.summary.weight)
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    from transformers import OpenAIGPTDoubleHeadsModel

    plain = OpenAIGPTDoubleHeadsModel.from_pretrained(run)
    assert torch.equal(plain.transformer.tokens_embed.weight, after.get_input_embeddings().weight)
    collect_pairs(flags(world, model_checkpoint=str(run), pairs=str(tmp_path / "pairs.jsonl"), contexts=4))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_policy_follows_its_reward(algorithm, world, judged, tmp_path):
    """Reward only questions: the mean reward is higher at the end than at the start."""
    policy.train_policy(policy_flags(
        world, tmp_path / "run", judged, "--algorithm", algorithm, "--reward_model", "", "--utterance_metrics", 4,
        "--sentiment", 0, "--repetition", 0, "--similarity", 0, "--toxicity", 0, "--question", 1, "--steps", 15,
        "--batch_size", 32, "--kl_coef", 0.01, "--lr", 1e-2, "--evaluate_every", 15, "--save_every", 100,
        "--evaluation_contexts", 40))
    first, last = map(json.loads, (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    assert last["reward"] > first["reward"] + 0.2, (first, last)


def test_dpo_counts_unusable_pairs(world, pairs, judged, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    trainer = policy.Trainer(policy_flags(world, tmp_path / "run", judged, "--algorithm", "dpo"))
    better, _ = answers_of.majority_preferences(pairs, answers_of.read_answers([judged / "answers.jsonl"], pairs))
    apart = held_out(pairs.values(), 0.15, 42)
    kept = [(pair, best) for pair, best in better if pair["pair"] not in apart]
    ended = [(pair, best) for pair, best in kept if pair["replies"][best]["ended"]]
    assert 0 < len(trainer.pairs) == len(ended) < len(kept) < len(better)
    assert f"{len(kept) - len(ended)} (better reply cut: the policy would learn never to end)" in caplog.text
    assert f"{len(better) - len(kept)} (held out)" in caplog.text
    first = trainer.pairs[0].replies
    assert [reply.ids for reply in first] == [ended[0][0]["replies"][n]["ids"] for n in (1 - ended[0][1], ended[0][1])]
    with pytest.raises(InputError, match="no pair is left to learn from"):
        policy.Trainer(policy_flags(world, tmp_path / "other", judged, "--algorithm", "dpo", "--model_checkpoint",
                                    judged / "reward"))
    assert f"{len(kept)} (written by another model than --model_checkpoint)" in caplog.text


def test_policies_are_evaluated_on_unseen_dialogs(world, two_sided, tmp_path, caplog):
    """Check that evaluation leaves out all dialogs with pairs for the reward model or DPO, with both sides."""
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
        assert evaluated | learnt == set(number)  # no other dialog is left out
        assert len(trainer.evaluated) == sum(number[dialog] in evaluated for dialog in turn_dialog)
    assert "in dialogs without pairs" in caplog.text and "fewer than --evaluation_contexts 200" in caplog.text

    every = tmp_path / "every.jsonl"
    collect_pairs(flags(world, dataset_path=str(two_sided / "data.json"), dataset_cache=str(two_sided / "cache"),
                        pairs=str(every), contexts=1000, replies=4))
    answered(tmp_path, *(answer(name, int(pair["replies"][1]["ended"])) for name, pair in read_pairs(every).items()))
    with pytest.raises(InputError, match="0 of .* collect pairs of fewer contexts, or of another split"):
        policy.train_policy(policy_flags(world, tmp_path / "none", tmp_path, *data, "--algorithm", "dpo",
                                         "--reward_model", "", "--pairs", every))


def test_a_policy_begins_as_its_reference(world, tmp_path):
    """Start from a language model without choice head and control tokens: KL is 0, and DPO accepts its pairs."""
    bare = make_checkpoint(tmp_path / "bare", n_layer=1, n_embd=32, n_head=2, n_positions=96)
    config = OpenAIGPTConfig.from_pretrained(bare)
    torch.manual_seed(5)
    OpenAIGPTLMHeadModel(config).save_pretrained(bare)
    assert len(get_tokenizer(str(bare))) > config.vocab_size  # the control tokens' rows are missing
    pairs_path = str(tmp_path / "pairs.jsonl")
    torch.manual_seed(6)
    collect_pairs(flags(world, model_checkpoint=str(bare), pairs=pairs_path, dataset_cache=str(tmp_path / "cache"),
                        max_length=60))  # random weights seldom end a reply
    found = read_pairs(pairs_path)
    answered(tmp_path, *(answer(name, int(pair["replies"][1]["ended"])) for name, pair in found.items()))
    torch.manual_seed(7)
    run = policy.train_policy(policy_flags(
        world, tmp_path / "run", tmp_path, "--model_checkpoint", bare, "--algorithm", "dpo", "--reward_model", "",
        "--pairs", pairs_path, "--steps", 1, "--dataset_cache", tmp_path / "cache", "--max_length", 60))
    first, last = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    assert first["kl"] == 0 < last["kl"]


@pytest.mark.parametrize("algorithm", ["rloo", "dpo"])
def test_a_policy_of_low_rank_in_half_precision(algorithm, world, judged, tmp_path, monkeypatch):
    """Train only an adapter, killed once: the policy begins as the reference, is saved alone, and loads as it ended."""
    arguments = policy_flags(world, tmp_path / "run", judged, "--algorithm", algorithm, "--lora", 4, "--fp16", "bf16",
                             "--save_every", 3, "--lr", 3e-2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, policy, 1)
        policy.train_policy(arguments)
    run = policy.train_policy(arguments)
    first, *_, last = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    assert first["kl"] == 0 < last["kl"] and last["reward"] > first["reward"]
    assert not (run / "model.safetensors").exists() and policy.train_policy(arguments) == run  # it is finished
    changed = {"model_checkpoint": str(run), "algorithm": "rloo", "lora": 0}
    again = policy.Trainer(Namespace(**vars(arguments) | changed))
    assert again.evaluate()["reward"] == pytest.approx(last["reward"], abs=0.3)


def test_rewards_read_their_own_history(world, judged, tmp_path):
    """Train a policy that sees one utterance; DYME reads the whole history, the reward model what its pairs had."""
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


def test_dyme_is_scaled_on_human_replies(world, judged, tmp_path):
    """Scale DYME like the reward model: fresh human replies get 0 on average, and most more than a cut reply."""
    arguments = policy_flags(world, tmp_path / "run", judged, "--reward_model", "", "--dyme", 5, "--dyme_dialogs", 30)
    trainer = policy.Trainer(arguments)
    said = policy.draw_dialogs(trainer.table["train"], 30)[9::10]  # the dialogs that DYME reserves
    paid = torch.tensor([trainer.reward([([], dialog[:place], [dialog[place]])])[0][0]
                         for dialog in said for place in range(1, len(dialog))])
    assert paid.mean() == pytest.approx(0, abs=1e-5) and paid.std(unbiased=False) == pytest.approx(5, abs=1e-4)
    turn = trainer.turn(trainer.contexts, 0)._replace(replies=[policy.ReplyTokens([1], False)])
    assert trainer.rewards([turn]).tolist() == [-5]
    assert (paid > -5).float().mean() > 0.75


def test_cut_replies_get_the_unfinished_reward(world, judged, tmp_path):
    trainer = policy.Trainer(policy_flags(world, tmp_path / "run", judged, "--unfinished_reward", -3.5))
    turn = trainer.turn(trainer.contexts, 0)
    ids = trainer.tokenizer.encode("hello there .")
    turn = turn._replace(replies=[policy.ReplyTokens(ids, True), policy.ReplyTokens(ids, False)])
    model = reward.RewardModel(str(judged / "reward"))
    text = readable(trainer.tokenizer, ids)
    assert trainer.rewards([turn]).tolist() == pytest.approx([model([(*turn.texts, [text])])[0][0], -3.5])


def test_reward_terms_add_up(world, judged, tmp_path):
    arguments = policy_flags(world, tmp_path / "run", judged, "--utterance_metrics", 2, "--dyme", 0.5, "--question", 1,
                             "--dyme_dialogs", 20)
    trainer = policy.Trainer(arguments)
    turn = ([], ["hello there ."], ["what happened to you ?", "i like tea ."])
    model = reward.RewardModel(str(judged / "reward"))([turn])[0]
    weights = WEIGHTS | {"question": 1.0}
    by_hand = [score + 2 * weighted([(text, turn[1])], weights)[0] + 0.5 * trainer.reward.dyme.reward(text, turn[1])
               for score, text in zip(model, turn[2], strict=True)]
    assert trainer.reward([turn])[0] == pytest.approx(by_hand)


def test_missing_policy_settings_are_named(world, judged, tmp_path):
    for more, complaint in [(["--reward_model", ""], "--algorithm ppo: needs a reward"),
                            (["--algorithm", "rloo", "--samples", 1], "--samples 1: rloo compares"),
                            (["--batch_size", 10], "--batch_size 10: is not a multiple of --samples 4")]:
        with pytest.raises(InputError, match=complaint):
            policy_flags(world, tmp_path, judged, *more)
    with pytest.raises(InputError, match="--max_length 95: the model has 96 positions"):
        policy.train_policy(policy_flags(world, tmp_path / "run", judged, "--max_length", 95))
    with pytest.raises(InputError, match="is not a finished reward model, because reward.json is missing or damaged"):
        policy.train_policy(policy_flags(world, tmp_path / "other", judged, "--reward_model", world / "run"))
