"""Test how GPT-1's replies read: its tokenizer separates parts of words, and `readable` joins them again."""

import json
import re

import pytest
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st

from decoding import readable
from metrics import f1_score
from tokenization import get_tokenizer


@pytest.mark.parametrize("text", [
    "i'll see if you'd come", "we're gonna win , you gotta see", "whats up ? hows it going", "i cannot , they can't",
    "my dogs' toys are the boys'", "she said 'hello' to me", "the dogs' 'toys'", "dont , wont , isnt , cant",
    "you'd've seen that i'm a cook", "c'mon y'all , gimme that", "it's 5pm or 10am", "well 'em all",
    "i m 20 , that s it", "cheers ! really ? wait . . . what", "'hi' , i said",
    "they couldve , i shouldn't've", "wouldn't've", "im",
])
def test_split_words_are_joined(tokenizer, text):
    """Join the words, and attach full stops and commas. "im" and "i m" have the same tokens, and both read as "i m"."""
    wanted = re.sub(r" ([.,?!])", r"\1", text)
    assert readable(tokenizer, tokenizer.encode(text)) == {"im": "i m"}.get(text, wanted)


def test_gold_replies_read_as_written():
    """Read all 3,907 validation replies; only fifteen differ, in which "can not" or "who s" loses its space."""
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
def test_a_growing_reply_changes_only_its_last_word(tokenizer, words):
    """Extend a reply word by word, as when it is printed while it is decoded: earlier words stay the same."""
    printed = ""
    for number in range(1, len(words) + 1):
        text = tokenizer.clean_up_tokenization(" ".join(words[:number]))
        assert text.startswith(printed)
        assert text.replace(" ", "") == "".join(words[:number])
        printed = text[:text.rfind(" ") + 1]
