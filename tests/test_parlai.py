"""Compare our figures with the real ParlAI's, turn by turn; `make parlai` installs ParlAI."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, error_line, script, shared

PYTHON = ROOT / ".venv-parlai" / "bin" / "python"
DIALOGS = 28
needs_parlai = pytest.mark.skipif(not PYTHON.exists(), reason="needs the real ParlAI: `make parlai` installs it")


def cut_corpora(folder: Path, dialogs: int) -> tuple[Path, Path]:
    """Write the first dialogs of the validation split in ParlAI's layout and in ours."""
    theirs = shared("data/personachat/ConvAI2")
    ours = shared("data/personachat/personachat_self_original.json")
    (folder / "ConvAI2").mkdir(parents=True)
    shutil.copyfile(theirs / ".built", folder / "ConvAI2" / ".built")  # without it ParlAI would download
    kept, dialog = [], 0
    for line in (theirs / "valid_self_original.txt").read_text().splitlines(keepends=True):
        dialog += line.startswith("1 ")
        kept += [line] * (dialog <= dialogs)
    (folder / "ConvAI2" / "valid_self_original.txt").write_text("".join(kept))
    corpus = json.loads(ours.read_text())
    (folder / "cut.json").write_text(json.dumps({"train": corpus["train"][:5], "valid": corpus["valid"][:dialogs]}))
    return folder, folder / "cut.json"


def in_parlai(*command, cwd: Path, stdin: str = "") -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=600, input=stdin)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def parlai(folder: Path, run: Path, cwd: Path, *more) -> tuple[dict[str, float], list[dict]]:
    """Return ParlAI's report, and the agent's acts in the order of the turns."""
    in_parlai(ROOT / "convai_evaluation.py", "--parlai", "--model_checkpoint", run, "--datapath", folder,
              "--report-filename", "report.json", "--world-logs", "log.jsonl", *more, cwd=cwd)
    report = json.loads((cwd / "report.json").read_text())["report"]
    episodes = [json.loads(line)["dialog"] for line in (cwd / "log.jsonl").read_text().splitlines()]
    order = first_texts(folder)
    episodes.sort(key=lambda dialog: order.index(dialog[0][0]["text"]))
    return report, [reply for dialog in episodes for _, reply in dialog]


def first_texts(folder: Path) -> list[str]:
    """Return the first text of each dialog as ParlAI gives it: the persona's lines and the first utterance."""
    dialogs: list[list[str]] = []
    for line in (folder / "ConvAI2" / "valid_self_original.txt").read_text().splitlines():
        number, text = line.split(" ", 1)
        if number == "1":
            dialogs.append([])
        dialogs[-1].append(text.split("\t")[0])
    return ["\n".join(dialog[:1 + sum(text.startswith("your persona: ") for text in dialog)]) for dialog in dialogs]


def native(kind: str, run: Path, data: Path, cwd: Path, *more) -> list[dict]:
    script("convai_evaluation.py", "--eval_type", kind, "--model_checkpoint", run, "--dataset_path", data,
           "--predictions", "predictions.jsonl", "--report", "report", *more, cwd=cwd)
    return [json.loads(line) for line in (cwd / "predictions.jsonl").read_text().splitlines()]


@needs_parlai
def test_choices_equal_parlais(run_2019, tmp_path):
    folder, data = cut_corpora(tmp_path / "data", DIALOGS)
    report, acts = parlai(folder, run_2019, tmp_path)
    records = native("hits@1", run_2019, data, tmp_path)
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["figures"]
    assert len(acts) == len(records) >= 200
    for name in ("Hits@1", "Hits@5", "Hits@10", "Accuracy", "F1"):
        assert report[name.lower()] == pytest.approx(figures[name], abs=1e-6)
    turns = [turn for entry in json.loads(data.read_text())["valid"] for turn in entry["utterances"]]
    for act, record, turn in zip(acts, records, turns, strict=True):
        ranked = sorted(zip(turn["candidates"], record["scores"], strict=True), key=lambda pair: -pair[1])
        assert act["text_candidates"] == [text for text, _ in ranked]
        assert act["text"] == record["reply"]


@needs_parlai
@pytest.mark.parametrize("dialogs, how", [
    (DIALOGS, ["--no_sample", "--batch_size", 1, "--max_length", 6]),
    (6, ["--num_beams", 3, "--no_repeat_ngram_size", 2, "--max_length", 8]),
], ids=["greedy", "beams"])
def test_replies_equal_parlais(run_2019, tmp_path, dialogs, how):
    folder, data = cut_corpora(tmp_path / "data", dialogs)
    report, acts = parlai(folder, run_2019, tmp_path, "--eval_type", "f1", *how)
    records = native("f1", run_2019, data, tmp_path, *how)
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["figures"]
    assert [act["text"] for act in acts] == [record["reply"] for record in records]
    for name in ("F1", "Accuracy"):
        assert report[name.lower()] == pytest.approx(figures[name], abs=1e-6)


@needs_parlai
def test_chats_under_parlai_equal_ours(run_2019, tmp_path):
    """Chat for two turns, then start a new chat, which has forgotten them."""
    flags = ["--model_checkpoint", run_2019, "--no_sample", "--max_length", 8]
    said = in_parlai("-m", "parlai.scripts.interactive", "-m", "convai_evaluation:TransformerAgent",
                     "--eval_type", "f1", *flags, cwd=tmp_path,
                     stdin="your persona: i like red.\\nhello there\nand you ?\n[DONE]\nhello there\n[EXIT]\n")
    replies = [line.split("]: ", 1)[1] for line in said.splitlines() if "[TransferTransfo]: " in line]
    ours = script("interact.py", *flags, "--personality", "i like red .", cwd=tmp_path,
                  stdin="hello there\nand you ?\n")
    alone = script("interact.py", *flags, "--personality", "", cwd=tmp_path, stdin="hello there\n")
    assert replies == [line.strip() for line in ours.splitlines()[2:4] + alone.splitlines()[2:3]]


def ask_agent(lines: str, run: Path, cwd: Path, **options) -> str:
    """Run Python lines with ``agent``, an agent for this run, and return what they print."""
    (cwd / "ask.py").write_text("import json\nfrom convai_evaluation import TransformerAgent\n"
                                f"agent = TransformerAgent({ {'model_checkpoint': str(run), **options}!r})\n" + lines)
    return in_parlai(cwd / "ask.py", cwd=cwd)


@needs_parlai
def test_turns_that_cannot_be_scored_are_counted(run_2019, tmp_path):
    """Observe candidates without the gold reply, no candidates, and an empty gold reply; each gets an answer."""
    said = ask_agent("""
for labels, candidates in (["hi"], ["no", "nope"]), (["yes"], None), ([" "], ["a", " "]):
    agent.observe({"text": "hello", "eval_labels": labels, "label_candidates": candidates, "episode_done": False})
    print("ANSWER", "text_candidates" in agent.act())
agent.shutdown()
""", run_2019, tmp_path)
    assert said.count("ANSWER True") == 2 and said.count("ANSWER False") == 1
    assert "1 turns whose candidates lack the gold reply" in said
    assert "1 turns without candidates" in said
    assert "1 turns whose gold reply is empty" in said


@needs_parlai
def test_next_word_probability(golden, run_2019, tmp_path):
    """Replay the recorded protocol through the agent; its data file has the recorded word counts."""
    words = [word for word, count in dict(golden["word_freq"]).items() for _ in range(count)]
    sentences = [" ".join(words[start:start + 1000]) for start in range(0, len(words), 1000)]
    turn = {"history": ["x"], "candidates": ["x"]}
    entries = [{"personality": persona, "utterances": [turn]} for persona in (sentences, [])]
    (tmp_path / "words.json").write_text(json.dumps({"train": entries[:1], "valid": entries[1:]}))
    cases = golden["word_probability"][:6]
    said = ask_agent(f"""
for case in json.loads({json.dumps(cases)!r}):
    agent.reset()
    agent.persona = case["persona"]
    for said, answer in zip(case["history"][::2], case["history"][1::2] + [None]):
        agent.observe({{"text": said, **({{"eval_labels": [answer]}} if answer else {{}})}})
    print("ANSWER", json.dumps(agent.next_word_probability(case["so_far"]).get(case["word"])))
""", run_2019, tmp_path, dataset_path=str(tmp_path / "words.json"), dataset_cache=str(tmp_path / "cache"),
                     legacy_gpt2_words=True)
    answers = [json.loads(line.split(" ", 1)[1]) for line in said.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == 6
    for answer, case in zip(answers, cases, strict=True):
        assert (answer is None) == (case["probability"] is None)
        assert answer is None or answer == pytest.approx(case["probability"], rel=0.05)  # the file also counts "x"


def test_missing_parlai_says_how_to_install_it(run_2019, tmp_path):
    assert "make parlai" in error_line("convai_evaluation.py", "--parlai", "--model_checkpoint", run_2019, cwd=tmp_path)
