"""Share fixtures for learning from preferences: a small run, pairs of its replies, answers and a reward model."""

import json
import random
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

from dialogs import Dialog, Utterance, make_entries
from feedback import policy, reward
from feedback.collect import collect_pairs
from feedback.collect import parse_args as parse_collecting
from feedback.pairs import read_pairs
from inputs import TurnDataset, collate
from tokenization import get_tokenizer
from utils import get_dataset
from weights import add_special_tokens_, load_model, save_model

WORDS = ["hello there .", "how are you ?", "i like tea .", "that is sad .", "my dog is old .", "what happened ?"]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Make a folder with a data set, ``data.json``, and a run that has learnt to say the data's sentences, ``run``."""
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
    """Parse collect's command line with small values; ``changed`` replaces arguments by name."""
    args = parse_collecting([str(word) for word in (
        "--model_checkpoint", world / "run", "--dataset_path", world / "data.json", "--dataset_cache", world / "cache",
        "--max_history", 1, "--device", "cpu", "--max_length", 6, "--temperature", 1.0, "--top_p", 0, "--seed", 7,
        "--pairs", world / "pairs.jsonl", "--contexts", 30, "--batch_size", 8)])
    return Namespace(**vars(args) | changed)


@pytest.fixture(scope="session")
def pairs(world) -> dict[str, dict]:
    collect_pairs(flags(world))
    return read_pairs(world / "pairs.jsonl")


def answered(folder: Path, *records: dict) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answer(pair: str, choice, annotator: str = "anna", **more) -> dict:
    return {"pair": pair, "annotator": annotator, "choice": choice, **more}


@pytest.fixture(scope="session")
def two_sided(world, tmp_path_factory) -> Path:
    """Make a folder with two-sided dialogs, ``data.json``, and ``pairs.jsonl`` from half of the validation turns.

    Half of the dialogs open with the same two utterances; the later utterances contain the number of their dialog.
    """
    folder = tmp_path_factory.mktemp("two-sided")
    corpus = {}
    for split, first, count in (("train", 0, 10), ("valid", 100, 40)):
        dialogs = [Dialog("", [Utterance(place % 2, text) for place, text in enumerate(
            ["hello there .", "how are you ?" if n % 2 else f"i am {n} .", f"my dog is {n} .", f"i like {n} .",
             f"that is sad , {n} ."][:4 + n % 3 // 2])]) for n in range(first, first + count)]
        corpus[split] = list(make_entries(dialogs, "dialogs"))
    (folder / "data.json").write_text(json.dumps(corpus))
    collect_pairs(flags(world, dataset_path=str(folder / "data.json"), dataset_cache=str(folder / "cache"),
                        pairs=str(folder / "pairs.jsonl"), contexts=60))
    return folder


def numbers(folder: Path) -> list[str]:
    """Return the dialog number of each validation entry."""
    valid = json.loads((folder / "data.json").read_text())["valid"]
    return [re.search(r"[0-9]+", str(entry["utterances"][-1]))[0] for entry in valid]


def reward_flags(world: Path, folder: Path, **changed) -> Namespace:
    """Parse feedback.reward's command line with small values; ``changed`` replaces arguments by name."""
    args = reward.parse_args([str(word) for word in (
        "--model_checkpoint", world / "run", "--pairs", world / "pairs.jsonl", "--answers", folder / "answers.jsonl",
        "--reward", folder / "reward", "--held_out", 0.3, "--n_epochs", 16, "--train_batch_size", 4, "--lr", 3e-3,
        "--save_every", 1000, "--device", "cpu", "--seed", 1)])
    return Namespace(**vars(args) | changed)


@pytest.fixture(scope="session")
def judged(world, pairs, tmp_path_factory) -> Path:
    """Make a folder with answers that prefer the longer text, and a reward model trained on them."""
    folder = tmp_path_factory.mktemp("judged")
    answered(folder, *(answer(name, int(len(pair["replies"][1]["text"]) > len(pair["replies"][0]["text"])))
                       for name, pair in pairs.items()))
    arguments = reward_flags(world, folder)
    reward.train_reward(arguments)
    return folder


class Killed(Exception):
    pass


def killed_after(monkeypatch, module, count: int) -> None:
    """Raise `Killed` when ``module`` has written its ``count``-th snapshot."""
    save, saved = module.save_snapshot, []

    def save_and_die(*args) -> None:
        save(*args)
        saved.append(None)
        if len(saved) == count:
            raise Killed

    monkeypatch.setattr(module, "save_snapshot", save_and_die)


def policy_flags(world: Path, folder: Path, judged: Path, *more) -> Namespace:
    """Parse feedback.policy's command line with small values; ``more`` adds flags."""
    return policy.parse_args(list(map(str, [
        "--model_checkpoint", world / "run", "--dataset_path", world / "data.json", "--dataset_cache", world / "cache",
        "--keep_repeated",  # with so few sentences, dialogs repeat
        "--max_history", 1, "--device", "cpu", "--policy", folder, "--max_length", 6, "--batch_size", 16, "--steps", 6,
        "--lr", 3e-3, "--evaluate_every", 3, "--evaluation_contexts", 20, "--save_every", 2, "--rule",
        "--reward_model", judged / "reward", "--pairs", world / "pairs.jsonl", "--answers", judged / "answers.jsonl",
        *more])))
