"""Test Chinese, Finnish and Korean samples: converting, training, chatting and measuring."""

import json
import random
import re
from argparse import Namespace

import pytest
from conftest import ROOT, script, the_run
from tokenizers import ByteLevelBPETokenizer

from corpora import read_corpus
from example_entry import convert
from metrics import f1_score
from words import normalized

SAMPLES = {"chinese": ROOT / "data" / "sample_chinese.jsonl", "finnish": ROOT / "data" / "sample_finnish.txt",
           "korean": ROOT / "data" / "sample_korean.jsonl"}


@pytest.fixture(scope="module", params=["korean", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("chinese", "finnish"))])
def language(request, tmp_path_factory) -> Namespace:
    """Convert a sample, and make a small random GPT-2 with a byte-level BPE learnt from it."""
    folder = tmp_path_factory.mktemp(request.param)
    convert(SAMPLES[request.param], folder / "data.json", "both", "random", None, 0)
    corpus = read_corpus(folder / "data.json")
    sentences = [text for split in corpus.values() for entry in split for turn in entry["utterances"]
                 for text in [*turn["history"], *turn["candidates"]]]
    (folder / "model").mkdir()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sentences, vocab_size=500, show_progress=False,
                                  special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder / "model"))
    config = {"model_type": "gpt2", "vocab_size": tokenizer.get_vocab_size(), "n_positions": 256, "n_embd": 64,
              "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return Namespace(name=request.param, folder=folder, corpus=corpus)


def test_other_languages_train_chat_and_evaluate(language):
    folder, corpus = language.folder, language.corpus
    script("train.py", "--dataset_path", "data.json", "--model_checkpoint", "model", "--n_epochs", 40, "--lr", 1e-2,
           "--train_batch_size", 8, "--gradient_accumulation_steps", 1, "--mc_coef", 0, "--max_history", 0, cwd=folder)
    run = the_run(folder)
    entry = random.Random(0).choice([entry for entry in corpus["train"] if len(entry["utterances"]) > 1])
    turn = entry["utterances"][0]
    said = script("interact.py", "--model_checkpoint", run, "--no_sample", "--max_history", 0, "--max_length", 60,
                  "--personality", "\n".join(entry["personality"]), cwd=folder, stdin=turn["history"][-1] + "\n")
    assert said.split("\n")[-3] == turn["candidates"][-1]  # the model has memorised this small data set
    said = script("convai_evaluation.py", "--eval_type", "all", "--model_checkpoint", run, "--max_history", 0,
                  "--dataset_path", "data.json", "--max_length", 30, cwd=folder)
    assert all(figure in said for figure in ("Hits@1", "Token PPL", "F1"))
    assert ("compare models by Token PPL" in script.stderr) == (language.name == "chinese")


def test_f1_compares_letters_without_spaces():
    assert normalized("我喜欢吃苹果。") == list("我喜欢吃苹果")
    assert f1_score("我喜欢吃梨!", "我喜欢吃苹果。") == pytest.approx(2 * 4 / (5 + 6))
    assert f1_score("わたしはtea が好き", "わたしは tea が好き") == 1.0
    assert normalized("Minä juon teetä, en kahvia!") == ["minä", "juon", "teetä", "en", "kahvia"]
    assert normalized("저는 커피를 안 마셔요.") == ["저는", "커피를", "안", "마셔요"]
    assert normalized("It’s a dog — “the” one…") == ["it’s", "dog", "—", "“", "”", "one…"]  # as ParlAI does


def test_unknown_text_is_reported_with_its_share(tmp_path, trained):
    """Read Chinese with GPT-1's tokenizer: the scripts warn, and omit the word perplexity."""
    line = "你好 吗\n很 好\n\n"
    (tmp_path / "own.txt").write_text("".join(line.replace("好", letter) for letter in "甲乙丙丁戊己庚辛壬癸"))
    script("train.py", "--dataset_path", "own.txt", "--model_checkpoint", trained, "--n_epochs", 0, cwd=tmp_path)
    warning = next(line for line in script.stderr.splitlines() if "unknown to the tokenizer" in line)
    assert "100 % of the texts' tokens" in warning and "--model_checkpoint gpt2" in warning
    said = script("convai_evaluation.py", "--eval_type", "ppl", "--dataset_path", "own.txt", "--model_checkpoint",
                  trained, cwd=tmp_path)
    assert "FINAL Token PPL: " in said and "Word PPL" not in said and "Word PPL is left out" in script.stderr
    assert "100 % of the texts' tokens" in script.stderr  # also when read from the cache
    (tmp_path / "english.txt").write_text("hello ?\nhi .\n\nso ?\nyes .\n\nand you ?\n你 .\n")
    script("train.py", "--dataset_path", "english.txt", "--model_checkpoint", trained, "--n_epochs", 0, cwd=tmp_path)
    share = float(re.search(r"([\d.]+) % of the texts' tokens are unknown", script.stderr)[1])
    assert 0 < share < 12
