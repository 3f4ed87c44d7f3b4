"""Test published corpora as data sets: finding them, mixing them, and what reaches the token table."""

import io
import json
import shutil
import tarfile
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import make_checkpoint, script, the_run
from test_corpora import BST, ED

import downloads
import utils
from cli import InputError
from downloads import unpack
from inputs import LengthBatches, TurnDataset, get_loader, longest_persona
from schedule import Decay, add_schedule_flags
from tables import Split, TokenTable

EOU = "what {0} ? __eou__ a {0} . __eou__ i like a {0} . __eou__\n"


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Write three small corpora in the layouts of their releases: two folders and an archive of archives."""
    folder = tmp_path / "data"
    made = folder / "made"
    made.mkdir(parents=True)
    words = {"train": ["cat", "dog", "cow", "pig"], "validation": ["hen", "ant"], "test": ["bee"]}
    with zipfile.ZipFile(folder / "ijcnlp_dailydialog.zip", "w") as outer:
        for split, animals in words.items():
            with zipfile.ZipFile(made / f"{split}.zip", "w") as inner:
                inner.writestr(f"{split}/dialogues_{split}.txt", "".join(EOU.format(animal) for animal in animals))
                inner.writestr(f"{split}/dialogues_emotion_{split}.txt", "0 0 0\n")
            outer.write(made / f"{split}.zip", f"ijcnlp_dailydialog/{split}.zip")
    shutil.rmtree(made)
    for split in ("train", "valid", "test"):
        (folder / "empatheticdialogues").mkdir(exist_ok=True)
        (folder / "empatheticdialogues" / f"{split}.csv").write_text(ED)
        (folder / "blended_skill_talk").mkdir(exist_ok=True)
        (folder / "blended_skill_talk" / f"{split}.json").write_text(json.dumps([BST]))
    return folder


def golds(split: Split) -> list[str]:
    return [split.texts("candidates", turn)[-1] for turn in range(split.num_turns)]


def test_corpora_are_found_and_mixed_split_by_split(tmp_path, data_dir, tokenizer, monkeypatch):
    def mixed(names: str, **how) -> TokenTable:
        return utils.get_dataset(tokenizer, "", str(tmp_path / "cache"), names, str(data_dir), **how)

    table = mixed("dailydialog,empathetic_dialogues,blended_skill_talk")
    rest = ["Oh, a \"gun\"? Or a car?", "Well done cat", "no , bread .", "wheat .", "rye ?"]
    assert golds(table["valid"]) == ["a hen .", "i like a hen .", "a ant .", "i like a ant .", *rest]
    assert golds(table["test"]) == ["a bee .", "i like a bee .", *rest]
    animals = [said for animal in ("cat", "dog", "cow", "pig") for said in (f"a {animal} .", f"i like a {animal} .")]
    assert golds(table["train"]) == animals  # without the other corpora's dialogs, which valid and test have too
    assert golds(mixed("dailydialog,empathetic_dialogues,blended_skill_talk", keep_repeated=True)["train"]) == [
        *animals, *rest]
    assert table["test"].texts("persona", len(table["test"]) - 1) == ["i mend bikes ."]
    assert golds(mixed("blended_skill_talk", target="first")["valid"]) == ["rye ?"]
    divided = mixed("dailydialog", train_frac=0.5)
    assert divided["train"].num_turns == divided["valid"].num_turns == 6
    assert golds(divided["test"]) == ["a bee .", "i like a bee ."]
    assert len(list(tmp_path.glob("cache*.safetensors"))) == 4  # one table per choice of data

    def unreachable(address: str) -> Path:
        raise InputError(f"{address}: cannot be downloaded (no network); and so on")

    monkeypatch.setattr(utils, "download", unreachable)
    with pytest.raises(InputError, match="--dataset personachat: is not in .*data/personachat, and https://.*--data_dir"):
        mixed("personachat")


def test_a_file_of_dialogs_needs_no_conversion(tmp_path, tokenizer):
    (tmp_path / "own.txt").write_text("".join(f"what {n} ?\nwell {n} .\n\n" for n in range(20)))
    table = utils.get_dataset(tokenizer, str(tmp_path / "own.txt"), str(tmp_path / "cache"))
    assert (table["train"].num_turns, table["valid"].num_turns) == (17, 3)
    assert sorted(golds(table["train"]) + golds(table["valid"])) == sorted(f"well {n} ." for n in range(20))


def test_a_release_is_downloaded_where_it_is_missing(tmp_path, data_dir, tokenizer, monkeypatch):
    with tarfile.open(tmp_path / "blended_skill_talk.tar.gz", "w:gz") as archive:
        archive.add(data_dir / "blended_skill_talk", "blended_skill_talk")
    asked = []

    def download(address: str) -> Path:
        asked.append(address)
        return tmp_path / "blended_skill_talk.tar.gz"

    monkeypatch.setattr(downloads, "download", download)
    table = utils.get_dataset(tokenizer, "", str(tmp_path / "cache"), "blended_skill_talk", str(tmp_path / "empty"))
    assert golds(table["valid"]) == ["no , bread .", "wheat .", "rye ?"]
    assert asked == ["http://parl.ai/downloads/blended_skill_talk/blended_skill_talk.tar.gz"]


@pytest.mark.parametrize("how", ["random", "hard"])
def test_distractors_come_from_other_dialogs(tmp_path, data_dir, tokenizer, how):
    own = [{"history": ["so ?"], "candidates": ["x", "so ."]}]  # has its own distractors
    corpus = json.dumps({"train": [{"utterances": own}], "valid": [{"utterances": own}]})
    (data_dir / "personachat").mkdir()
    (data_dir / "personachat" / "personachat_self_original.json").write_text(corpus)
    split = utils.get_dataset(tokenizer, "", str(tmp_path / "cache"), "dailydialog,personachat", str(data_dir),
                              distractors=how, keep_repeated=True)["train"]
    animals = ["cat", "dog", "cow", "pig"]
    dialogs = [[f"a {animal} .", f"i like a {animal} ."] for animal in animals] + [["so ."]]
    for turn in range(split.num_turns):
        *wrong, gold = split.texts("candidates", turn)
        if gold == "so .":
            assert wrong == ["x"]
            continue
        others = {reply for dialog in dialogs if gold not in dialog for reply in dialog}
        assert len(wrong) == len(set(wrong)) == len(others) and set(wrong) == others
        if how == "hard":  # the most similar reply is the same sentence about another animal
            assert wrong[-1].startswith("i like") == gold.startswith("i like")


def test_no_persona_and_lengths(tmp_path, data_dir, tokenizer):
    table = utils.get_dataset(tokenizer, "", str(tmp_path / "cache"), "blended_skill_talk", str(data_dir))
    split = table["train"]
    assert longest_persona(split) > 1
    for no_persona, stretch in ((False, 1 << 16), (True, 1 << 16), (False, 2)):
        dataset = TurnDataset(split, tokenizer, 256, no_persona=no_persona)
        dataset.CHUNK = stretch
        persona, _ = dataset.context(0)
        assert persona == ([] if no_persona else [tokenizer.encode("i bake .")])
        assert [len(row.input_ids) for row in map(dataset.__getitem__, range(len(dataset)))] == list(
            dataset.lengths()[0])


def test_batches_with_unequal_candidates(tmp_path, tokenizer):
    turns = [{"history": ["hi"], "candidates": ["a"] * number + ["hello"]} for number in (0, 1, 3)]
    corpus = [{"personality": [], "utterances": turns[:1]}, {"utterances": turns}]
    (tmp_path / "own.json").write_text(json.dumps({"train": corpus}))
    split = utils.get_dataset(tokenizer, str(tmp_path / "own.json"), str(tmp_path / "cache"))["train"]
    dataset = TurnDataset(split, tokenizer, 256)
    (batch,) = get_loader(dataset, dataset.lengths()[0], 4)
    assert sorted((batch["mc_token_ids"] >= 0).sum(1).tolist()) == [1, 1, 2, 4]
    assert (batch["mc_labels"] == (batch["mc_token_ids"] >= 0).sum(1) - 1).all()


@pytest.mark.parametrize("decay, power", [("linear", 1), ("polynomial", 2)])
def test_learning_rates_equal_transformers(decay, power):
    parser = ArgumentParser()
    add_schedule_flags(parser.add_argument)
    for ratio, iterations in ((0.0, 7), (0.25, 40)):
        args = parser.parse_args(["--lr", "0.5", "--warmup_ratio", str(ratio), "--lr_decay", decay])
        ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5) for _ in range(2))
        reference = transformers.get_polynomial_decay_schedule_with_warmup(
            theirs, int(ratio * iterations), iterations, lr_end=0.0, power=power)
        schedule = Decay(ours, iterations, args.lr, args.warmup_ratio, args.lr_decay)
        for _ in range(iterations):
            schedule(None)
            assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-9)
            theirs.step()
            reference.step()


def test_the_multi_turn_system_trains_and_chats(tmp_path, data_dir):
    checkpoint = make_checkpoint(tmp_path / "one-layer", n_layer=1, n_embd=32)
    script("train.py", "--dataset", "dailydialog,empathetic_dialogues,blended_skill_talk", "--data_dir", data_dir,
           "--no_persona", "--mc_coef", 0, "--max_turns", 3, "--max_len", 64, "--warmup_ratio", 0.1, "--lr_decay",
           "polynomial", "--lr", 1e-3, "--n_epochs", 1, "--model_checkpoint", checkpoint, cwd=tmp_path)
    assert "distractors" not in script.stderr and "Validation: nll" in script.stderr and "hits" not in script.stderr
    run = the_run(tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert config["no_persona"] and config["max_len"] == 64
    said = script("interact.py", "--model_checkpoint", run, "--max_turns", 5, "--seed", 1, "--end_command", "Enough",
                  cwd=tmp_path, stdin="hi !\nEnough\nnever read\n")
    assert said.splitlines()[:2] == ["Personality:", "  (none)"] and len(said.splitlines()) <= 3
    said = script("convai_evaluation.py", "--eval_type", "all", "--model_checkpoint", run, "--dataset",
                  "blended_skill_talk", "--data_dir", data_dir, cwd=tmp_path)
    assert "Token PPL" in said and "FINAL Hits@1: nothing to choose\n" in said  # a single dialog has no distractors


def test_roles_when_the_bot_opens(tmp_path, data_dir, tokenizer):
    """Learn the first speaker's turns; each follows an even number of utterances, the last by the other person."""
    table = utils.get_dataset(tokenizer, "", str(tmp_path / "cache"), "blended_skill_talk", str(data_dir),
                              target="first")
    dataset = TurnDataset(table["train"], tokenizer, 256, max_history=2)
    row, special = dataset[0], dataset.special
    roles = [token for token in row.input_ids if token in (special.speaker1, special.speaker2)]
    assert roles == [special.speaker1, special.speaker2, special.speaker1]  # bikes ? no , bread . | rye ?
    assert np.array_equal(np.array(row.input_ids)[np.array(row.labels) >= 0],
                          [*tokenizer.encode("rye ?"), special.eos])


def test_epoch_batches_repeat_no_turn_early():
    lengths = np.arange(10)
    for wanted in (2, 4, 11):
        batches = LengthBatches(lengths, 3, seed=5, epoch_batches=wanted)
        drawn = list(batches)
        assert len(drawn) == len(batches) == wanted
        passes = [np.concatenate(drawn[start:start + 4]) for start in range(0, wanted, 4)]
        for turns in passes:
            assert len(set(turns.tolist())) == len(turns)
        assert all(len(turns) == 10 for turns in passes[:wanted // 4])
    assert np.concatenate(list(LengthBatches(lengths, 3, seed=5))).tolist() == np.concatenate(drawn[:4]).tolist()


@pytest.mark.parametrize("flags, complaint", [
    (["--dataset", "dailydialog,dialydailog"], "no corpus is called 'dialydailog'; known are dailydialog, empathetic_"),
    (["--max_turns", "4"], "'4' is even"), (["--max_len", "8"], "'8' leaves no room"),
    (["--train_frac", "1"], "'1' is not a number between 0 and 1"), (["--target", "third"], "choose from"),
])
def test_wrong_flags_name_the_cure(flags, complaint, capsys):
    parser = ArgumentParser()
    utils.add_common_flags(parser, "")
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert complaint in capsys.readouterr().err
    assert parser.parse_args(["--max_turns", "7"]).max_history == 3 and parser.parse_args([]).max_history is None


def test_nested_archives_stay_in_their_folder(tmp_path):
    """Unpack one level of nested archives; names that lead outside end inside, and bombs are refused."""
    def zipped(**members: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name, content)
        return buffer.getvalue()

    inner = zipped(**{"../../../out.txt": b"x", "deeper.zip": zipped(a=b"a")})
    (tmp_path / "good.zip").write_bytes(zipped(**{"inner.zip": inner, "/abs.txt": b"y"}))
    folder = unpack(tmp_path / "good.zip")
    assert {file.name for file in folder.rglob("*") if file.is_file()} == {
        "inner.zip", "abs.txt", "out.txt", "deeper.zip"}
    assert not (tmp_path / "out.txt").exists() and not (tmp_path.parent / "out.txt").exists()
    (tmp_path / "bomb.zip").write_bytes(zipped(zeros=bytes(120 << 20)))
    for name in ("bomb.zip", "cut.zip"):
        if name == "cut.zip":
            (tmp_path / name).write_bytes((tmp_path / "good.zip").read_bytes()[:-30])
        with pytest.raises(InputError, match=f"{name}: not a usable .tar.gz or .zip"):
            unpack(tmp_path / name)
