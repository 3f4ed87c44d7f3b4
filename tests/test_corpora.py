"""Test the readers of published corpora, the conversion to our format, splits and distractors."""

import csv
import gzip
import json
import logging
from collections import Counter

import numpy as np
import pytest
from conftest import error_line, script, shared
from hypothesis import given
from hypothesis import strategies as st

import corpora
from cli import InputError
from corpora import check_corpus, read_corpus
from dialogs import (
    MOST_HISTORY,
    Dialog,
    DialogNumbers,
    Utterance,
    combine_corpora,
    divide_dialogs,
    keep_target,
    make_entries,
)
from distractors import draw_distractors
from example_entry import convert
from readers import read_any
from words import normalized, text_key, words


def entries_of(path, content: str, target: str = "both") -> list[dict]:
    """Return the entries that `read_any` makes of a file without splits."""
    path.write_text(content)
    return list(keep_target(read_any(path)[None], target))


def pairs(found: list[dict]) -> list[tuple]:
    """Return (personality, history, gold reply) of each turn."""
    return [(entry["personality"], turn["history"], turn["candidates"][-1])
            for entry in found for turn in entry["utterances"]]


# -------------------------------------------------------------------------------------------------- one file per layout


def test_both_sides_become_entries_with_their_personas(tmp_path):
    dialog = {"personas": [["i open ."], ["i answer ."]], "turns": ["hi !", "hello .", "tea ?", "yes ."]}
    found = entries_of(tmp_path / "own.jsonl", json.dumps(dialog))
    assert found == [
        {"personality": ["i answer ."], "utterances": [
            {"history": ["hi !"], "candidates": ["hello ."]},
            {"history": ["hi !", "hello .", "tea ?"], "candidates": ["yes ."]}]},
        {"personality": ["i open ."], "utterances": [{"history": ["hi !", "hello ."], "candidates": ["tea ?"]}]}]
    assert pairs(entries_of(tmp_path / "own.jsonl", json.dumps(dialog), "second")) == pairs(found[:1])
    assert pairs(entries_of(tmp_path / "own.jsonl", json.dumps(dialog), "first")) == pairs(found[1:])


def test_utterances_merge_and_silence_is_dropped(tmp_path):
    dialog = {"turns": ["__SILENCE__", "hi_comma_ you !", "still\there ?", "yes .", " ", "go on ."],
              "speakers": [0, 1, 1, 0, 1, 0]}
    assert pairs(entries_of(tmp_path / "own.jsonl", json.dumps(dialog))) == [
        ([], ["hi, you ! still here ?"], "yes . go on .")]


def test_plain_text(tmp_path):
    found = entries_of(tmp_path / "own.txt", "\n\nhi !\nhello .\r\n \n\n1 plum or 2 ?\ntwo .\nno plum is left .\n")
    assert pairs(found) == [([], ["hi !"], "hello ."), ([], ["1 plum or 2 ?"], "two ."),
                            ([], ["1 plum or 2 ?", "two ."], "no plum is left .")]


def test_dailydialog(tmp_path):
    found = entries_of(tmp_path / "dialogues_train.txt",
                       "Say , Jim ! __eou__ Yes ? __eou__ A beer ? __eou__\n"
                       "Hi . __eou__ __eou__ Anybody ? __eou__ No . __eou__\n")
    assert pairs(found) == [([], ["Say , Jim !"], "Yes ?"), ([], ["Say , Jim !", "Yes ?"], "A beer ?"),
                            ([], ["Hi . Anybody ?"], "No .")]


ED = ("conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"
      "hit:1_conv:2,1,afraid,A bang.,31,I heard a bang.,5|5|5_2|2|5,\n"
      'hit:1_conv:2,2,afraid,A bang.,7,Oh_comma_ a "gun"?,5|5|5_2|2|5,\n'
      "hit:1_conv:2,3,afraid,A bang.,7,Or a car?,5|5|5_2|2|5,\n"
      "hit:1_conv:3,1,proud,My cat.,31,My cat won.,5|5|5_2|2|5,\n"
      "hit:1_conv:3,2,proud,My cat.,7,Well done cat,5|5|5_2|2|5,,one|two\n")


def test_empathetic_dialogues(tmp_path):
    assert pairs(entries_of(tmp_path / "train.csv", ED)) == [
        ([], ["I heard a bang."], 'Oh, a "gun"? Or a car?'), ([], ["My cat won."], "Well done cat")]


BST = {"personas": [["i mend bikes ."], ["i bake ."]], "free_turker_utterance": "bikes ?",
       "guided_turker_utterance": "no , bread .", "dialog": [[0, "rye ?"], [1, "wheat ."]]}


def test_blended_skill_talk(tmp_path):
    assert pairs(entries_of(tmp_path / "train.json", json.dumps([BST]))) == [
        (["i bake ."], ["bikes ?"], "no , bread ."),
        (["i bake ."], ["bikes ?", "no , bread .", "rye ?"], "wheat ."),
        (["i mend bikes ."], ["bikes ?", "no , bread ."], "rye ?")]


PARLAI = ("1 your persona: i have two dogs.\n2 partner's persona: i am old.\n3 your persona: so it goes...\n"
          "4 hi !\thello .\t\tno .|hello .|yes .\n5 dogs ?\ttwo .\n"
          "1 __SILENCE__\tanybody ?\t\tx|anybody ?\n2 me .\tand me .\t1\tand me .|q\n")


def test_parlai_text_with_and_without_candidates(tmp_path):
    found = entries_of(tmp_path / "valid_self_original.txt", PARLAI)
    assert found == [
        {"personality": ["i have two dogs .", "so it goes..."], "utterances": [
            {"history": ["hi !"], "candidates": ["no .", "yes .", "hello ."]},
            {"history": ["hi !", "hello .", "dogs ?"], "candidates": ["two ."]}]},
        {"personality": [], "utterances": [{"history": ["anybody ?", "me ."], "candidates": ["q", "and me ."]}]}]


def test_parlai_text_equals_the_published_json():
    text = shared("data/personachat/ConvAI2/valid_self_original.txt")
    published = read_corpus(shared("data/personachat/personachat_self_original.json"))["valid"]
    assert list(read_any(text)[None]) == published


def test_silence_in_the_published_json_is_dropped(tmp_path):
    turns = [{"history": ["__ SILENCE __"], "candidates": ["b", "hi !"]},
             {"history": ["__ SILENCE __", "hi !", "you ?"], "candidates": ["c", "fine ."]}]
    (tmp_path / "personachat_self_original.json").write_text(
        json.dumps({"train": [{"personality": ["p"], "utterances": turns}]}))
    assert list(read_any(tmp_path)["train"]) == [
        {"personality": ["p"], "utterances": [{"history": ["hi !", "you ?"], "candidates": ["c", "fine ."]}]}]


# ------------------------------------------------------------------------------------------- the real files, counted


def beginnings(dialogs: list[list[str]]) -> Counter:
    """Count the beginnings of dialogs that end with any utterance but the first: these are the turns to learn."""
    return Counter(tuple(dialog[:end]) for dialog in dialogs for end in range(2, len(dialog) + 1))


def learnt(found: list[dict]) -> Counter:
    return Counter((*history, gold) for _, history, gold in pairs(found))


def test_dailydialog_is_read_completely():
    folder = shared("data/dailydialog")
    corpus = read_any(folder)
    for split, file in (("train", "train"), ("valid", "validation"), ("test", "test")):
        text = (folder / f"dialogues_{file}.txt").read_text("utf-8")
        dialogs = [[" ".join(said.split()) for said in line.split("__eou__") if said.strip()]
                   for line in text.split("\n")]
        assert learnt(list(corpus[split])) == beginnings(dialogs)


def test_empathetic_dialogues_is_read_completely():
    folder = shared("data/empatheticdialogues")
    corpus = read_any(folder)
    for split in ("train", "valid", "test"):
        dialogs: dict[str, list[str]] = {}
        with open(folder / f"{split}.csv", encoding="utf-8", newline="\n") as file:
            for row in csv.DictReader(file, quoting=csv.QUOTE_NONE):
                said = " ".join(row["utterance"].replace("_comma_", ",").split())
                dialogs.setdefault(row["conv_id"], []).extend([said] if said else [])
        assert learnt(list(corpus[split])) == beginnings(list(dialogs.values()))


def test_the_blended_skill_talk_sample_is_read():
    corpus = {split: list(found) for split, found in read_any(shared("data/blended_skill_talk")).items()}
    assert {split: learnt(found).total() for split, found in corpus.items()} == {"train": 17, "valid": 7, "test": 5}
    check_corpus(corpus)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name, content, complaint", [
    ("train.csv", ED.replace("Or a car?", "Or, a, car?"), "line 4 has 10 fields, not 8"),
    ("train.csv", ED.replace(",speaker_idx", ""), "line 1 is not the header of the release"),
    ("dialogues_train.txt", "a __eou__ b __eou__\n0 1 2\n", "line 2 has no __eou__"),
    ("own.txt", PARLAI + "persona\n", "line 8 does not begin with its number"),
    ("own.jsonl", '{"turns": ["a", "b"]}\n{"turns": ["a", 3]}', "line 2 is not a dialog (turns is not a list"),
    ("own.jsonl", '{"turns": ["a", "b"]}\n{"turn": []}', 'line 2 is not a dialog (no "turns")'),
    ("own.jsonl", '{"turns": ["a"], "speakers": [2]}', "line 1 is not a dialog (speakers is not"),
    ("own.jsonl", '{"turns": ["a"], "personas": ["i am"]}', "line 1 is not a dialog (personas[0] is not"),
    ("own.jsonl", '{"turns": ["a", "b"]}\n{"turns": ["a"', "line 2: not JSON at line 1, column 15"),
    ("own.jsonl", '{"turns": []}' + "[" * 100_000, "line 1: "),
    ("train.json", json.dumps([BST, {**BST, "personas": 1}]), "dialog 1, counted from 0, is not as in the release"),
    ("train.json", json.dumps([BST, {"personas": []}]), "dialog 1, counted from 0, has no 'free_turker_utterance'"),
    ("train.json", json.dumps([3]), "dialog 0, counted from 0, has no layout that can be read"),
    ("own.txt", b"hi\nhe\xffllo\n", "line 2 is not UTF-8 at byte 2"),
    ("own.txt", gzip.compress(b"hi\nhello\n" * 99, mtime=0)[:30], "the gzip data is damaged"),
    ("own.zip", b"PK\3\4....", "is an archive; unpack it"),
    ("own.txt", b"a" * (corpora.LONGEST_LINE + 1), "line 1 is longer than 16 MiB"),
])
def test_wrong_files_are_refused_with_file_line_and_cure(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as refusal:
        for split in read_any(path).values():
            list(split)
    message = str(refusal.value)
    assert message.startswith(f"{path}: {complaint}") and "; " in message and "\n" not in message


def test_dialogs_without_replies_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = entries_of(tmp_path / "own.txt", "hi !\n\nhello ?\nyes .\n\n__SILENCE__\nalone .\n")
    assert pairs(found) == [([], ["hello ?"], "yes .")]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'own.txt'}: 2 dialogs are left out because they have no reply; the first is at line 1"]
    caplog.clear()
    crowd = Dialog("line 7", [Utterance(who, "x") for who in "abc"])
    assert list(make_entries([crowd], "f")) == [] and "more than two speakers; the first is at line 7" in caplog.text


def test_long_dialogs_have_bounded_histories(tmp_path):
    (tmp_path / "own.txt").write_text("word\n" * 3001)
    found = list(read_any(tmp_path / "own.txt")[None])
    lengths = [len(turn["history"]) for entry in found for turn in entry["utterances"]]
    assert len(lengths) == 3000 and max(lengths) <= MOST_HISTORY
    assert sum(length % 2 for length in lengths) == 1500  # half of the turns belong to each side


@given(st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(
    [b"1 ", b"2 your persona: a.", b"\t", b"|", b"\n", b"__SILENCE__", b"x", b"\\n", b"__eou__", b'["a"]}',
     b"conv_id,utterance_idx,context,prompt,speaker_idx,utterance", b",,,,,,,", b"\xff", b"[", b"\x1f\x8b",
     b'{"turns": ', "é\u2028".encode()]), max_size=30).map(b"".join)))
def test_any_file_gives_entries_or_one_error_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(content)
    try:
        corpus = {str(split): list(found) for split, found in read_any(path).items()}
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        check_corpus(corpus)


# ------------------------------------------------------------------------------------- conversion, splits, distractors


def test_converting_own_dialogs(tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(
        json.dumps({"personas": [["i am ä ."], []], "turns": [f"question {n} ?", f"answer {n} .", "bye ."]}) + "\n"
        for n in range(20)))
    said = script("example_entry.py", "--convert", "own.jsonl", "own.json", "--target", "second", cwd=tmp_path)
    assert "train: 17 entries (0 with a persona), 17 turns, 17 candidates per turn" in said
    assert "valid: 3 entries" in said and "own.json: well-formed" in said
    corpus = read_corpus(tmp_path / "own.json")
    for split, found in corpus.items():
        golds = {turn["candidates"][-1] for entry in found for turn in entry["utterances"]}
        for entry in found:
            (turn,) = entry["utterances"]
            assert turn["history"][0].split()[1] == turn["candidates"][-1].split()[1]
            assert len(set(turn["candidates"])) == len(turn["candidates"]) == len(golds) <= 20, split
            assert set(turn["candidates"]) == golds
    assert "would overwrite" in error_line("example_entry.py", "--convert", "own.json", "own.json", cwd=tmp_path)
    again = (tmp_path / "own.json").read_text()
    convert(tmp_path / "own.jsonl", tmp_path / "again.json", "second", "random", None, 0)
    assert (tmp_path / "again.json").read_text() == again
    convert(tmp_path / "own.jsonl", tmp_path / "other.json", "second", "random", None, 1)
    assert (tmp_path / "other.json").read_text() != again


def test_splits_are_kept_unless_train_frac_is_given(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for split, count in (("train", 6), ("valid", 3), ("test", 2)):
        (own / f"{split}.txt").write_text("".join(f"{split} {n}\nyes\nno\n\n" for n in range(count)))

    def openings(**how) -> dict[str, list[str]]:
        how = {"target": "second", "distractors": "none", "train_frac": None, "seed": 0} | how
        convert(own, tmp_path / "out.json.gz", **how)
        return {split: [entry["utterances"][0]["history"][0] for entry in found]
                for split, found in read_corpus(tmp_path / "out.json.gz").items()}

    assert openings() == {split: [f"{split} {n}" for n in range(count)]
                          for split, count in (("train", 6), ("valid", 3), ("test", 2))}
    mixed = openings(train_frac=0.5)
    assert len(mixed["train"]) == 4 and len(mixed["valid"]) == 5 and mixed["test"] == ["test 0", "test 1"]
    assert sorted(mixed["train"] + mixed["valid"]) == sorted(f"train {n}" for n in range(6)) + [
        f"valid {n}" for n in range(3)]
    both = openings(target="both", train_frac=0.5)
    assert not set(both["train"]) & set(both["valid"])  # a dialog's two sides stay together
    (own / "valid.txt").unlink()
    with pytest.raises(InputError, match="own: has no valid split; .*--train_frac"):
        openings()
    with pytest.raises(InputError, match="too few to train on some"):
        divide_dialogs([], 0.5, 0, "own")


def test_random_distractors_follow_reply_frequency():
    texts = ["common", *(f"rare {n}" for n in range(50))]
    replies = np.array([0] * 50 + list(range(1, 51)))
    dialogs = np.arange(100) // 2
    drawn = draw_distractors(replies, dialogs, texts, count=5, seed=3)
    for turn, wrong in enumerate(drawn.tolist()):
        own = {reply for reply, dialog in zip(replies, dialogs, strict=True) if dialog == dialogs[turn]}
        assert len(set(wrong)) == 5 and -1 not in wrong and not own & set(wrong)
    assert (drawn[50:] == 0).any(1).mean() > 0.9  # half of all replies are "common"
    assert (draw_distractors(replies, dialogs, texts, count=5, seed=3) == drawn).all()
    assert (draw_distractors(replies, dialogs, texts, count=5, seed=4) != drawn).any()
    few = draw_distractors(np.array([0, 1, 2]), np.array([0, 0, 1]), texts, count=4)
    assert few.tolist()[:2] == [[2, -1, -1, -1]] * 2 and sorted(few[2].tolist()) == [-1, -1, 0, 1]


@pytest.mark.parametrize("texts, hardest", [
    (["my dog eats a blue plum", "your dog eats it", "a cat sleeps", "a cat eats", "it is the blue plum of my dog"], 4),
    (["我的狗吃苹果", "猫在睡觉", "你喜欢茶吗", "他的狗也吃肉", "今天下雨"], 3),
])
def test_hard_distractors_share_words_with_the_reply(texts, hardest):
    texts = [*texts, *(f"filler {n}" for n in range(40))]
    replies = np.arange(len(texts))
    drawn = draw_distractors(replies, replies, texts, "hard", count=3)
    assert drawn[0, 0] == hardest
    assert all(len(set(row)) == 3 and turn not in row and -1 not in row for turn, row in enumerate(drawn.tolist()))


def test_words_of_scripts_with_and_without_spaces():
    assert words("Isn't it 3 o'clock, Äiti?") == ["isn", "t", "it", "3", "o", "clock", "äiti"]
    assert words("我爱tea。") == ["我", "爱", "tea"]


# -------------------------------------------------------------------------------------- replies that are no distractors


@pytest.mark.parametrize("how", ["random", "hard"])
def test_the_gold_reply_in_another_spelling_is_no_distractor(tmp_path, how):
    """Use spellings that ParlAI's normalisation or a tokenizer does not tell apart."""
    spellings = ["Yes , it's a dog !", "yes, it's the dog", "YES IT S DOG.", "yes it \u2019s dog", "\uff39es it's dog"]
    replies = spellings + [f"no {n} , it is a cow" for n in range(30)]
    (tmp_path / "own.txt").write_text("".join(f"what {n} ?\n{reply}\n\n" for n, reply in enumerate(replies)))
    convert(tmp_path / "own.txt", tmp_path / "out.json", "both", how, 0.9, 0)
    found = [turn["candidates"] for split in read_corpus(tmp_path / "out.json").values() for entry in split
             for turn in entry["utterances"]]
    assert len(found) == len(replies)
    for *wrong, gold in found:
        assert wrong and normalized(gold) not in map(normalized, wrong)
        assert not any(one in spellings for one in wrong) or gold not in spellings
        assert len({text_key(one) for one in wrong}) == len(wrong)


def test_texts_with_equal_tokens_are_no_distractors():
    texts = ["\u4eca\u5929", "\u660e\u5929", "\u4e0b\u96e8\u4e86", "\u5403\u996d\u4e86"]
    unknown = {number: (0,) * len(text) for number, text in enumerate(texts)}
    drawn = draw_distractors(np.arange(4), np.arange(4), texts, tokens=unknown, count=2)
    assert [set(row) - {-1} < {2, 3} for row in drawn.tolist()] == [True, True, False, False]
    assert [len(set(row) - {-1}) for row in drawn.tolist()] == [1, 1, 1, 1]


def test_the_hardest_distractor_stands_next_to_the_reply(tmp_path):
    """Repeat the gold reply a hundred times: the hardest distractor still comes last, where training takes it."""
    said = ["the red boat is at sea"] * 100 + ["the red boat is gone", "a boat", *(f"filler {n}" for n in range(40))]
    (tmp_path / "own.txt").write_text("".join(f"what {n} ?\n{reply}\n\n" for n, reply in enumerate(said)))
    convert(tmp_path / "own.txt", tmp_path / "out.json", "both", "hard", 0.99, 0)
    found = [turn["candidates"] for entry in read_corpus(tmp_path / "out.json")["train"]
             for turn in entry["utterances"]]
    of_boat = [candidates for candidates in found if candidates[-1] == said[0]]
    assert len(of_boat) > 90
    for candidates in of_boat:
        assert candidates[-2] == "the red boat is gone" and candidates.count(said[0]) == 1


# ------------------------------------------------------------------------------------------ equal and different dialogs


def test_dialogs_with_equal_beginnings_are_different(tmp_path):
    greeting = "hello , how can i help you ?\ni have a question .\nwhich ?\n"
    (tmp_path / "own.txt").write_text("".join(f"{greeting}number {n} ?\nit is {n} .\n\n" for n in range(30)))
    convert(tmp_path / "own.txt", tmp_path / "out.json", "both", "none", 0.7, 0)
    corpus = read_corpus(tmp_path / "out.json")
    asked = {split: {text for entry in found for turn in entry["utterances"] for text in (*turn["history"],
                     turn["candidates"][-1]) if text.startswith("number")} for split, found in corpus.items()}
    assert {split: len(found) for split, found in corpus.items()} == {"train": 42, "valid": 18}
    assert len(asked["train"]) == 21 and len(asked["valid"]) == 9 and not set(asked["train"]) & set(asked["valid"])


LETTERS = st.lists(st.sampled_from("abc"), min_size=2, max_size=7)


@given(st.lists(LETTERS, min_size=1, max_size=12), st.randoms(use_true_random=False), st.sampled_from(
    ["both", "second", "first"]))
def test_both_sides_get_the_number_of_their_dialog(dialogs, random, target):
    """Number entries in a reader's order and shuffled; there are as many `representatives` as different dialogs."""
    made = [list(keep_target(make_entries([Dialog("", [Utterance(n % 2, text) for n, text in enumerate(said)])], ""),
                             target)) for said in dialogs]
    numbers = DialogNumbers()
    for sides in made:
        assert len({numbers.number(entry) for entry in sides}) <= 1
    assert len(numbers.longest) == sum(map(bool, made))
    if target == "both":
        assert len(set(numbers.representatives().tolist())) == len(set(map(tuple, dialogs)))
    flat = [entry for sides in made for entry in sides]
    random.shuffle(flat)
    shuffled = DialogNumbers()
    for entry in flat:
        shuffled.number(entry)
    assert len(shuffled.longest) >= len(set(map(tuple, dialogs))) or target != "both"


def test_training_leaves_out_evaluated_dialogs(tmp_path, caplog):
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.txt").write_text("tea ?\nyes , a cup .\nhere .\n\ntea ?\nno .\nwell .\n\n"
                                   "bread ?\nno .\n\nrye ?\nok\n")
    (own / "valid.txt").write_text("Tea?\nYes, a cup.\nHere.\n\ntea ?\nno .\nwell then .\n")
    (own / "test.txt").write_text("bread ?\nno .\n\nTea?\nYes, a cup.\nHere.\n")

    def training(**how) -> list[list[str]]:
        splits = combine_corpora([read_any(own)], "own", **how)
        return [[*entry["utterances"][-1]["history"], entry["utterances"][-1]["candidates"][-1]]
                for entry in splits["train"]]

    with caplog.at_level(logging.INFO):
        assert training() == [["tea ?", "no ."], ["tea ?", "no .", "well ."], ["rye ?", "ok"]]
    assert "own: 2 of 4 training dialogs are left out because they are also in valid or test (--keep_repeated" in \
        caplog.text
    assert len(training(keep_repeated=True)) == 6
    assert training(target="first") == [["tea ?", "no .", "well ."]]
    convert(own, tmp_path / "out.json", "both", "none", None, 0)
    assert len(read_corpus(tmp_path / "out.json")["train"]) == 3
    (own / "train.txt").write_text("bread ?\nno .\n")
    caplog.clear()
    assert training() == [["bread ?", "no ."]] and "own: every training dialog is also in valid or test" in caplog.text


def test_dailydialog_trains_on_no_evaluated_dialog():
    folder = shared("data/dailydialog")
    evaluated = {tuple(text_key(said) for said in line.split("__eou__") if said.strip())
                 for split in ("validation", "test")
                 for line in (folder / f"dialogues_{split}.txt").read_text("utf-8").split("\n") if line}
    splits = combine_corpora([read_any(folder)], "dailydialog")
    trained = list(splits["train"])
    last = [entry["utterances"][-1] for entry in trained]
    known = {tuple(map(text_key, (*turn["history"], turn["candidates"][-1]))) for turn in last}
    assert not evaluated & known and len(trained) > 20_000
    kept = combine_corpora([read_any(folder)], "dailydialog", keep_repeated=True)["train"]
    assert len(list(kept)) > len(trained) + 400
