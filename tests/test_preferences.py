"""Test preferences from other software: chosen and rejected replies become pairs, a reward model and a policy."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import make_checkpoint, run_main, shared, templates
from hypothesis import given
from hypothesis import strategies as st

from cli import InputError
from feedback import policy, reward
from feedback.preferences import read_preferences

USER, BOT = "user", "assistant"


def messages(*said: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in said]


def transcript(*said: tuple[str, str]) -> str:
    return "".join(f"\n\n{'Human' if role == USER else 'Assistant'}: {text}" for role, text in said)


def read(folder: Path, *records: object, name: str = "preferences.jsonl") -> list[tuple]:
    """Write a file of these records, and return what is read: persona, history, the worse and the better reply."""
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return told(folder / name)


def told(path: Path) -> list[tuple]:
    return [(pair["persona"], pair["history"], pair["replies"][1 - best]["text"], pair["replies"][best]["text"])
            for pair, best in read_preferences(path, ["no answers"]).better]


TURNS = [(USER, "hi there"), (BOT, "hello"), (USER, "how are you ?")]
GOOD, BAD = (BOT, "fine , and you ?"), (BOT, "go away")
SPELLINGS = {
    "texts": {"prompt": "how are you ?", "chosen": "fine , and you ?", "rejected": "go away"},
    "messages": {"prompt": messages(*TURNS), "chosen": messages(GOOD), "rejected": messages(BAD)},
    "the prompt within both": {"chosen": messages(*TURNS, GOOD), "rejected": messages(*TURNS, BAD)},
    "a prompt besides": {"prompt": "how are you ?", "chosen": messages(*TURNS, GOOD),
                         "rejected": messages(*TURNS, BAD), "score_chosen": 9.0},
    "transcripts": {"chosen": transcript(*TURNS, GOOD), "rejected": transcript(*TURNS, BAD)},
    "a transcript as prompt": {"prompt": transcript(*TURNS) + "\n\nAssistant:", "chosen": " fine , and you ?",
                               "rejected": " go away"},
    "a prompt repeated": {"prompt": "how are you ?", "chosen": "how are you ? fine , and you ?",
                          "rejected": "how are you ? go away"},
    "parts": {"prompt": [{"role": USER, "content": [{"type": "text", "text": "how are you ?"}]}],
              "chosen": messages(GOOD), "rejected": messages(BAD)},
    "other names": {"question": "how are you ?", "chosen": [{"from": "gpt", "value": "fine , and you ?"}],
                    "rejected": [{"from": "gpt", "value": "go away"}]},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_preference(tmp_path, spelling):
    (persona, history, worse, better), = read(tmp_path, SPELLINGS[spelling])
    assert (persona, worse, better) == ([], "go away", "fine , and you ?")
    assert history in (["how are you ?"], ["hi there", "hello", "how are you ?"])
    assert len(history) == (3 if "hi there" in json.dumps(SPELLINGS[spelling]) else 1)


def test_system_text_is_the_persona(tmp_path):
    system = ("system", "i am tall .\n\ni like tea .")
    for record in ({"prompt": messages(system, *TURNS), "chosen": messages(GOOD), "rejected": messages(BAD)},
                   {"prompt": messages(system), "chosen": messages(*TURNS, GOOD), "rejected": messages(*TURNS, BAD)},
                   {"system": system[1], "prompt": "hi", "chosen": "yes", "rejected": "no"}):
        assert [one[0] for one in read(tmp_path, record)] == [["i am tall .", "i like tea ."]]


def test_lists_and_gzipped_files(tmp_path):
    records = [SPELLINGS["texts"], SPELLINGS["messages"]]
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    assert told(tmp_path / "list.json") == told(tmp_path / "lines.jsonl.gz") == read(tmp_path, *records)


WORDS = st.text("abc ?!'", min_size=1).filter(str.strip)


@given(st.lists(WORDS, min_size=1, max_size=6), WORDS, WORDS, st.sampled_from(["messages", "transcripts"]))
def test_preferences_read_what_was_written(tmp_path_factory, texts, worse, better, spelling):
    """Write any dialog that ends with the person, as messages or as a transcript; white space is normalised."""
    folder = tmp_path_factory.mktemp("written")
    turns = [(USER if (len(texts) - place) % 2 else BOT, text) for place, text in enumerate(texts)]
    write = messages if spelling == "messages" else transcript
    record = {"chosen": write(*turns, (BOT, better)), "rejected": write(*turns, (BOT, worse))}

    def plain(text: str) -> str:
        return " ".join(text.split())

    if plain(worse) == plain(better):
        with pytest.raises(InputError, match="none of its preferences can be used"):
            read(folder, record)
    else:
        assert read(folder, record) == [([], list(map(plain, texts)), plain(worse), plain(better))]


def test_unusable_preferences_are_counted(tmp_path, caplog):
    good = SPELLINGS["texts"]
    assert len(read(tmp_path, good, good | {"chosen": " "}, good | {"rejected": good["chosen"]}, good | {"prompt": 7},
                    {"chosen": "a", "rejected": "b"}, {"chosen": transcript(*TURNS, GOOD),
                                                       "rejected": transcript((USER, "bye"), BAD)},
                    good | {"chosen": [{"role": "judge", "content": "a"}]}, [1], good,
                    good | {"prompt": "another"})) == 2
    for problem in ["that do not end with two replies of the bot (line 2)", "with the same reply twice (line 3)",
                    "a prompt or reply that is neither text nor messages (line 4)",
                    "without a message before the reply (line 5)",
                    "whose two dialogs differ before their last replies (line 6)",
                    "a message without text, or with a role other than system, user and assistant (line 7)",
                    "that are no record (line 8)", "that repeat an earlier one (line 9)"]:
        assert problem in caplog.text
    with pytest.raises(InputError, match="none of its preferences can be used"):
        read(tmp_path, good | {"chosen": ""})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "bare", n_layer=1, n_embd=32, n_head=2)


def test_a_reward_model_learns_from_preferences(tmp_path, checkpoint, monkeypatch, capsys):
    """Train from the command line, without collect and annotate: the model learns which kind of reply is better."""
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"do you like number {n} ?", "chosen": f"yes , i like {n} .",
                                        "rejected": "no ."}) + "\n" for n in range(40)))
    run_main(monkeypatch, reward.main, "--model_checkpoint", checkpoint, "--pairs", path, "--reward",
             tmp_path / "reward", "--n_epochs", 4, "--lr", 1e-2, "--held_out", 0.3, "--device", "cpu")
    figures = json.loads((tmp_path / "reward" / "reward.json").read_text())
    assert figures["training_pairs"] + figures["held_out_pairs"] == 40 and figures["accuracy"] > 0.9
    assert "Accuracy on" in capsys.readouterr().out
    model = reward.RewardModel(str(tmp_path / "reward"))
    (yes, no), = model([([], ["do you like number 99 ?"], ["yes , i like 99 .", "no ."])])
    assert yes > no


def test_few_pairs_are_divided(tmp_path, checkpoint, monkeypatch):
    """Divide four dialogs so that some are for training and some for testing, whatever the seed."""
    for seed in range(3):
        run_main(monkeypatch, reward.main, "--model_checkpoint", checkpoint, "--pairs", shared("cases/trl_pairs.jsonl"),
                 "--reward", tmp_path / f"reward{seed}", "--n_epochs", 1, "--device", "cpu", "--seed", seed)
        figures = json.loads((tmp_path / f"reward{seed}" / "reward.json").read_text())
        assert figures["training_pairs"] + figures["held_out_pairs"] == 4
        assert figures["training_pairs"] and figures["held_out_pairs"]


def test_dpo_learns_from_preferences(tmp_path, checkpoint):
    """Train for some steps: the better replies gain likelihood over the worse ones, whoever wrote them."""
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps({
        "prompt": messages((USER, f"do you like number {n} ?")), "chosen": messages((BOT, f"yes , i like {n} .")),
        "rejected": messages((BOT, "no ."))}) + "\n" for n in range(30)))
    args = policy.parse_args(list(map(str, [
        "--algorithm", "dpo", "--model_checkpoint", checkpoint, "--dataset_path", templates(), "--dataset_cache",
        tmp_path / "cache", "--device", "cpu", "--policy", tmp_path / "policy", "--pairs", path, "--steps", 6,
        "--batch_size", 8, "--lr", 1e-2, "--evaluation_contexts", 4])))
    run = policy.train_policy(args)
    margins = []
    for folder in (checkpoint, run):
        args = policy.parse_args(list(map(str, [
            "--algorithm", "dpo", "--model_checkpoint", folder, "--dataset_path", templates(), "--dataset_cache",
            tmp_path / "cache", "--device", "cpu", "--policy", tmp_path / "other", "--pairs", path])))
        (tmp_path / "other").mkdir(exist_ok=True)
        trainer = policy.Trainer(args)
        actions = policy.pack_actions(trainer.pairs, trainer.special, trainer.network.model)
        logprobs = policy.action_logprobs(trainer.network(actions.batch)[0], trainer.special)
        worse, better = policy.chosen_logprobs(logprobs, actions).sum(1).view(-1, 2).mean(0).tolist()
        margins.append(better - worse)
    assert margins[1] > margins[0] + 1
