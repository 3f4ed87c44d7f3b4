"""Test the default bot: it knows its persona, and predicts unseen dialogs as well as when it was made."""

import json

import pytest
import torch
from conftest import ROOT, SAMPLE, script, smollm2

from consistency import QUESTIONS, judge, read_questions
from decoding import Decoding, load_checkpoint
from inputs import TurnDataset, collate
from outputs import reply_to
from utils import get_dataset

PERPLEXITY = 11.81  # per token, over the gold replies in the sample's first ten validation turns


@pytest.fixture(scope="module")
def bot():
    smollm2()
    return load_checkpoint("persona")


def test_it_answers_five_questions_about_its_persona(bot):
    model, tokenizer = bot
    questions = read_questions(QUESTIONS)
    asked = [next(one for one in questions if one.kind == kind and not one.history)
             for kind in ("job", "pet", "food", "home", "music")]
    replies = reply_to(model, tokenizer, [(question.persona, [question.question]) for question in asked],
                       Decoding(no_sample=True))
    verdicts = [judge(reply, question) for reply, question in zip(replies, asked, strict=True)]
    assert verdicts == ["answered"] * 5


def test_perplexity_is_as_recorded(bot, tmp_path):
    model, tokenizer = bot
    split = get_dataset(tokenizer, str(SAMPLE), str(tmp_path / "cache"))["valid"]
    dataset = TurnDataset(split, tokenizer, model.max_positions, max_history=model.max_history, num_candidates=1)
    with torch.inference_mode():
        out = model(**collate([dataset[turn] for turn in range(10)], tokenizer.pad_token_id))
    assert (out.nll.sum() / out.tokens.sum()).exp().item() == pytest.approx(PERPLEXITY, rel=0.01)


def test_the_adapter_has_at_most_25_megabytes():
    folder = ROOT / "models" / "persona"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 25_000_000
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "smollm2"


def test_it_is_found_by_the_name_persona(bot, tmp_path):
    reply = script("interact.py", "--model_checkpoint", "persona", "--no_sample", "--personality", "i am a baker .",
                   cwd=tmp_path, stdin="what do you do for a living ?\n")
    assert "bake" in reply.splitlines()[-2] + reply.splitlines()[-1]
