"""Test data files: which are accepted, how others are refused, and the token table made from them."""

import functools
import gzip
import json
import re

import pytest
from conftest import SAMPLE, TINY, error_line, script, shared
from hypothesis import given
from hypothesis import strategies as st

import utils
from cli import InputError
from corpora import check_corpus, read_corpus
from example_entry import EXAMPLE_ENTRY
from inputs import Specials
from tables import tokenize
from tokenization import get_tokenizer

TEXT = st.text(st.characters(), max_size=12)  # includes lone surrogates, which JSON can spell
SENTENCES = st.lists(TEXT, min_size=1, max_size=3)
TURNS = st.fixed_dictionaries({"history": SENTENCES, "candidates": SENTENCES})
ENTRIES = st.fixed_dictionaries(
    {"utterances": st.lists(TURNS, min_size=1, max_size=3)}, optional={"personality": st.lists(TEXT)})


def corpus_with(**turn) -> dict:
    good = {"history": ["hi ."], "candidates": ["hello ."]}
    return {"train": [{"personality": [], "utterances": [good, good]}],
            "valid": [{"utterances": [good]}, {"utterances": [good, {**good, **turn}]}]}


@pytest.mark.parametrize("corpus, complaint", [
    (corpus_with(candidates=[]), "valid[1].utterances[1].candidates is empty"),
    (corpus_with(history=[]), "valid[1].utterances[1].history is empty"),
    (corpus_with(history=None), "valid[1].utterances[1].history is missing, not a list"),
    (corpus_with(history="hi ."), "valid[1].utterances[1].history is text, not a list"),
    (corpus_with(candidates=["a", 7]), "valid[1].utterances[1].candidates[1] is a number, not text"),
    ({"train": [{"personality": ["a", None], "utterances": []}]}, "train[0].personality[1] is missing, not text"),
    ({"train": [{"personality": "i am ."}]}, "train[0].personality is text, not a list"),
    ({"train": [{"utterances": {}}]}, "train[0].utterances is an object, not a list"),
    ({"train": [{"utterances": []}]}, "train[0].utterances is empty"),
    ({"train": [[]]}, "train[0] is a list, not an entry"),
    ({"train": [{"utterances": [3]}]}, "train[0].utterances[0] is a number, not a turn"),
    ({"train": {}}, "train is an object, not a list"),
    ([], "the file holds a list"),
    ({}, "the file has no split"),
    (True, "the file holds true or false"),
])
def test_wrong_formats_are_refused_with_the_place(tmp_path, corpus, complaint):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(corpus))
    with pytest.raises(InputError) as refusal:
        read_corpus(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: {complaint}") and "; " in message and "\n" not in message


@pytest.mark.parametrize("content, complaint", [
    (b'{"train": [', "not JSON at line 1, column 12"),
    (b'{"train": [}\n]', "not JSON at line 1, column 12"),
    (b"", "not JSON at line 1, column 1"),
    (b'{"train": ["\xff"]}', "not UTF-8 at byte 12"),
    (gzip.compress(b'{"train": []}' * 100, mtime=0)[:20], "the gzip data is damaged or cut short"),
    (b"\x1f\x8b not gzip", "the gzip data is damaged or cut short"),
    (b"[" * 100_000, "nested too deeply"),
])
def test_damaged_files_are_refused(tmp_path, content, complaint):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    line = error_line("example_entry.py", path, cwd=tmp_path)
    assert complaint in line and str(path) in line


def test_missing_files_and_splits_are_refused(tmp_path):
    assert "nowhere.json: no such file" in error_line("example_entry.py", "nowhere.json", cwd=tmp_path)
    assert "cannot be read (Is a directory)" in error_line("example_entry.py", tmp_path, cwd=tmp_path)
    (tmp_path / "train_only.json").write_text(json.dumps({"train": corpus_with()["train"]}))
    assert "no 'valid' split, only 'train'" in error_line("example_entry.py", "train_only.json", cwd=tmp_path)
    for arguments in (["train.py", "--model_checkpoint", TINY], ["convai_evaluation.py", "--model_checkpoint", TINY]):
        line = error_line(*arguments, "--dataset_path", "train_only.json", cwd=tmp_path)
        assert "train_only.json: no 'valid' split" in line
    assert not (tmp_path / "runs").exists()


def test_the_example_entry_passes_the_check(tmp_path):
    entry = json.loads(script("example_entry.py", cwd=tmp_path))
    assert entry == EXAMPLE_ENTRY
    (tmp_path / "own.json").write_text(json.dumps({"train": [entry], "valid": [entry]}))
    said = script("example_entry.py", "own.json", cwd=tmp_path)
    assert "train: 1 entries (1 with a persona), 2 turns, 2 to 3 candidates per turn" in said
    assert "well-formed" in said


def test_real_personachat_passes_the_check(tmp_path):
    said = script("example_entry.py", shared("data/personachat/personachat_self_original.json"), cwd=tmp_path)
    assert "train: 2,356 entries (2,356 with a persona), 17,316 turns, 20 candidates per turn" in said
    assert "valid: 500 entries (500 with a persona), 3,907 turns, 20 candidates per turn" in said


def test_the_sample_is_as_documented():
    corpus = read_corpus(SAMPLE)
    personas = {split: {frozenset(entry["personality"]) for entry in entries} for split, entries in corpus.items()}
    assert len(personas["train"]) == len(corpus["train"]) and len(personas["valid"]) == len(corpus["valid"])
    assert not personas["train"] & personas["valid"]
    dialogs = {split: {tuple(entry["utterances"][-1]["history"]) for entry in entries}
               for split, entries in corpus.items()}
    assert not dialogs["train"] & dialogs["valid"]
    lines = [line for file in ("train", "valid") for line in (SAMPLE.parent / "sample" / f"{file}.jsonl").open()]
    said = {}
    for place, dialog in enumerate(map(json.loads, lines)):
        assert 8 <= len(dialog["turns"]) <= 14 and all(4 <= len(persona) <= 5 for persona in dialog["personas"])
        for text in dialog["turns"]:
            assert text == " ".join(text.split()).lower() and re.search(r" [.?!]$", text)
            said.setdefault(text, set()).add(place)
    assert len(lines) == 90 and sum(len(dialogs) > 1 for dialogs in said.values()) <= 3  # few utterances repeat
    for entry in corpus["valid"]:
        for turn in entry["utterances"]:
            assert len(set(turn["candidates"])) == 20


def test_the_script_writes_the_sample(tmp_path):
    script("data/make_sample.py", "--out", tmp_path / "again.json", cwd=tmp_path)
    assert (tmp_path / "again.json").read_bytes() == SAMPLE.read_bytes()


# Names of splits. "turns" is left out, because an object with that key is read as a dialog.
NAMES = st.text(min_size=1, max_size=5).filter(lambda name: name.isprintable() and name != "turns")


@given(st.dictionaries(NAMES, st.lists(ENTRIES, max_size=3), min_size=1))
def test_any_corpus_comes_back_from_the_table(tmp_path_factory, tokenizer, corpus):
    folder = tmp_path_factory.mktemp("table")
    path = folder / "data.json"
    path.write_text(json.dumps(corpus))  # escapes lone surrogates
    check_corpus(corpus)
    table = utils.get_dataset(tokenizer, str(path), str(folder / "cache"))
    assert list(table) == list(corpus)
    for split, entries in corpus.items():
        assert len(table[split]) == len(entries)
        turn = 0
        for dialog, entry in enumerate(entries):
            persona = entry.get("personality", [])
            assert [len(one) for one in table[split].texts("persona", dialog)] == [len(one) for one in persona]
            nested = table[split][dialog]  # nested lists, as in 2019
            assert nested["personality"] == [tokenizer.encode(one) for one in persona]
            for number, wanted in enumerate(entry["utterances"]):
                for field in ("history", "candidates"):
                    assert nested["utterances"][number][field] == [tokenizer.encode(one) for one in wanted[field]]
                    written = [one.encode("utf-8", "replace").decode() for one in wanted[field]]
                    assert table[split].texts(field, turn) == written
                turn += 1
        assert table[split].num_turns == turn


cached_tokenizer = functools.cache(get_tokenizer)


@given(st.one_of(TEXT, st.lists(st.sampled_from(
    ["<bos>", "<eos>", "<pad>", "<speaker1>", "<speaker2>", "<unk>", "</w>", "<|endoftext|>", " ", "\n", "é", "'s"]
)).map("".join)))
def test_no_text_becomes_a_control_token(text):
    for folder in (str(TINY), str(shared("golden/run-2019-openai-gpt")), str(shared("golden/run-2019-gpt2"))):
        tokenizer = cached_tokenizer(folder)
        control = set(Specials.of(tokenizer)) | ({50256} if "gpt2" in folder else set())
        assert not control & set(tokenizer.encode(text))
        assert tokenize(tokenizer, [text, "a"])[0] == tokenizer.encode(text)


def test_a_second_start_reads_the_cache(tmp_path, tokenizer):
    first = utils.get_dataset(tokenizer, str(SAMPLE), str(tmp_path / "cache"))
    file = next(tmp_path.glob("*.safetensors"))
    written = file.stat().st_mtime_ns
    second = utils.get_dataset(tokenizer, str(SAMPLE), str(tmp_path / "cache"))
    assert file.stat().st_mtime_ns == written
    assert second["valid"][3] == first["valid"][3]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_changed_file_or_tokenizer_misses_the_cache(tmp_path, tokenizer, small_corpus):
    utils.get_dataset(tokenizer, str(SAMPLE), str(tmp_path / "cache"))
    smaller = utils.get_dataset(tokenizer, str(small_corpus), str(tmp_path / "cache"))
    assert len(smaller["valid"]) == 4
    other = get_tokenizer(str(shared("golden/run-2019-gpt2")))
    table = utils.get_dataset(other, str(small_corpus), str(tmp_path / "cache"))
    text = table["valid"].texts("candidates", 0)[0]
    assert table["valid"].token_ids("candidates", 0)[0] == other.encode(text)


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty", "swapped"])
def test_a_damaged_or_foreign_cache_is_built_again(tmp_path, tokenizer, small_corpus, damage):
    good = utils.get_dataset(tokenizer, str(small_corpus), str(tmp_path / "cache"))["valid"][0]
    file = next(tmp_path.glob("*.safetensors"))
    if damage == "swapped":  # another data set's table under this one's name
        utils.get_dataset(tokenizer, str(SAMPLE), str(tmp_path / "other"))
        next(tmp_path.glob("other*.safetensors")).replace(file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"cut": whole[:len(whole) // 2], "foreign": b"PK\3\4" * 99, "empty": b""}[damage])
    assert utils.get_dataset(tokenizer, str(small_corpus), str(tmp_path / "cache"))["valid"][0] == good


def test_gzip_is_recognised_by_its_content(tmp_path):
    (tmp_path / "data.txt").write_bytes(gzip.compress(SAMPLE.read_bytes()))
    assert read_corpus(tmp_path / "data.txt") == read_corpus(SAMPLE)
