"""How replies of GPT-1 read: its tokenizer sets words apart, and what a person sees has them joined again."""

import json
import re

import pytest
from conftest import TINY, shared
from hypothesis import given
from hypothesis import strategies as st

from decoding import readable
from metrics import f1_score
from tokenization import get_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(str(TINY))


@pytest.mark.parametrize("text", [
    "i'll see if you'd come", "we're gonna win , you gotta see", "whats up ? hows it going", "i cannot , they can't",
    "my dogs' toys are the boys'", "she said 'hello' to me", "the dogs' 'toys'", "dont , wont , isnt , cant",
    "you'd've seen that i'm a cook", "c'mon y'all , gimme that", "it's 5pm or 10am", "well 'em all",
    "i m 20 , that s it", "cheers ! really ? wait . . . what", "'hi' , i said",
    "they couldve , i shouldn't've", "wouldn't've", "im",
])
def test_what_was_split_is_joined(tokenizer, text):
    """Full stops and commas stand at their word, as people write; two pronouns' spellings are one, "i m"."""
    wanted = re.sub(r" ([.,?!])", r"\1", text)
    assert readable(tokenizer, tokenizer.encode(text)) == {"im": "i m"}.get(text, wanted)


def test_the_gold_replies_read_as_they_are_written():
    """All 3,907 of the validation split, but for fifteen "can not" and "who s", which read as "cannot" and "whos"."""
    tokenizer = get_tokenizer(str(shared("golden/run-2019-openai-gpt")))
    corpus = json.loads(shared("data/personachat/personachat_self_original.json").read_text("utf-8"))
    gold = [turn["candidates"][-1] for entry in corpus["valid"] for turn in entry["utterances"]]
    replies = [readable(tokenizer, tokenizer.encode(text)) for text in gold]
    wrong = {text for text, reply in zip(gold, replies, strict=True)
             if reply != re.sub(r" ([.,?!]+)(?=[ .,?!]|$)", r"\1", " ".join(text.split()))}
    assert len(gold) == 3907 and len(wrong) == 15 and all("can not" in text or "who s" in text for text in wrong)
    assert {f1_score(reply, text) for reply, text in zip(replies, gold, strict=True)} == {1.0}


@given(st.lists(st.sampled_from(["'", "i", "'d", "dogs", "gon", "na", "can", "not", ".", ",", "n't", "do", "hi", "'s"]),
                max_size=12))
def test_a_reply_that_goes_on_changes_its_last_word_alone(tokenizer, words):
    """So that a reply can be printed while it is decoded."""
    printed = ""
    for number in range(1, len(words) + 1):
        text = tokenizer.clean_up_tokenization(" ".join(words[:number]))
        assert text.startswith(printed)
        assert text.replace(" ", "") == "".join(words[:number])
        printed = text[:text.rfind(" ") + 1]
