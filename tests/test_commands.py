"""Test the scripts as a user runs them: training, evaluation, chat, and their messages about wrong input."""

import json
import math
import shutil
import socket
from argparse import ArgumentParser
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import NO_DROPOUT, SAMPLE, TINY, TINY_TOKENS, error_line, make_checkpoint, script, shared, the_run
from run_folder import evaluate, scalars
from safetensors.torch import load_file
from torch.nn import functional as F

from cli import InputError
from interact import add_decoding_flags, load_checkpoint, sample_sequence
from pretrained import read_config
from tokenization import get_tokenizer
from train import build_input_from_segments


def turns_of(data: Path) -> list[tuple[list[str], list[str], list[str]]]:
    """Return (persona, history, candidates) of each validation turn, as text."""
    return [(entry["personality"], turn["history"], turn["candidates"])
            for entry in json.loads(data.read_text())["valid"] for turn in entry["utterances"]]


# ------------------------------------------------------------------------------------------------------ train.py


def test_a_trained_run_opens_in_plain_transformers(trained, small_corpus):
    assert (trained / "training_args.json").exists() and not list(trained.glob("*.unfinished"))
    own, report = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(trained, output_loading_info=True)
    assert not any(report.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    assert len(tokenizer) == own.config.vocab_size == TINY_TOKENS + 5
    assert tokenizer.convert_ids_to_tokens(list(range(TINY_TOKENS, TINY_TOKENS + 5))) == [
        "<bos>", "<eos>", "<pad>", "<speaker1>", "<speaker2>"]
    start = math.log(TINY_TOKENS + 5)  # nats per token when guessing
    assert scalars(trained)["training/lm_loss"][-1] < 0.85 * start


def test_curves_hold_rates_and_losses(trained):
    curves = scalars(trained)
    iterations = len(curves["training/loss"])
    assert iterations % 2 == 0 and len(curves["validation/ppl"]) == 2
    rates = curves["lr/group_0"]
    expected = [1e-3 * (1 - step / iterations) for step in range(iterations)]
    assert rates == pytest.approx(expected, abs=1e-7)  # linear, to 0 over all iterations
    losses = [curves[f"training/{name}"] for name in ("loss", "lm_loss", "mc_loss")]
    for loss, lm, mc in zip(*losses, strict=True):
        assert loss == pytest.approx(lm + mc, rel=1e-5)


def test_scores_equal_plain_transformers(trained, small_corpus, tmp_path):
    """Compare hits@1 and perplexity with transformers' own model, one padded candidate at a time."""
    hits, scored = evaluate("hits@1", trained, small_corpus, tmp_path)
    ppl, likelihoods = evaluate("ppl", trained, small_corpus, tmp_path)
    own = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(trained).eval()
    tokenizer = get_tokenizer(str(trained))
    nll = tokens = right = 0
    for turn, (persona, history, candidates) in enumerate(turns_of(small_corpus)):
        scores = []
        for reply in candidates:
            built = build_input_from_segments(
                [tokenizer.encode(one) for one in persona], [tokenizer.encode(one) for one in history[-5:]],
                tokenizer.encode(reply), tokenizer, lm_labels=True)
            with torch.no_grad():
                out = own(torch.tensor([[built["input_ids"]]]), mc_token_ids=torch.tensor([[built["mc_token_ids"]]]),
                          token_type_ids=torch.tensor([[built["token_type_ids"]]]))
            scores.append(out.mc_logits.item())
        labels = torch.tensor(built["lm_labels"])
        gold = F.cross_entropy(out.logits[0, 0, :-1], labels[1:], reduction="sum").item()
        assert scored[turn]["scores"] == pytest.approx(scores, abs=1e-5)
        assert likelihoods[turn]["nll"] == pytest.approx(gold, abs=1e-3)
        assert likelihoods[turn]["tokens"] == int((labels != -100).sum())
        nll, tokens = nll + gold, tokens + int((labels != -100).sum())
        right += scores[-1] > max(scores[:-1])
    assert hits == pytest.approx(right / len(scored), rel=1e-3)
    assert ppl == pytest.approx(math.exp(nll / tokens), rel=1e-3)


def test_validation_agrees_with_the_evaluation_script(trained, small_corpus, tmp_path):
    curves = scalars(trained)
    assert evaluate("hits@1", trained, small_corpus, tmp_path)[0] == pytest.approx(
        curves["validation/hits_1"][-1], rel=1e-3)
    assert evaluate("ppl", trained, small_corpus, tmp_path)[0] == pytest.approx(curves["validation/ppl"][-1], rel=1e-3)


def test_zero_epochs_evaluate_and_equal_seeds_train_alike(tmp_path, small_corpus):
    checkpoint = make_checkpoint(tmp_path / "one-layer", n_layer=1, n_embd=32)
    common = ["--dataset_path", small_corpus, "--model_checkpoint", checkpoint, "--lr", 1e-3, "--seed", 7]
    script("train.py", *common, "--n_epochs", 0, cwd=tmp_path)
    assert "Validation: hits@1" in script.stderr and not (tmp_path / "runs").exists()
    for folder, workers in (("a", 0), ("b", 2)):
        (tmp_path / folder).mkdir()
        script("train.py", *common, "--n_epochs", 1, "--gradient_accumulation_steps", 4, "--eval_before_start",
               "--personality_permutations", 2, "--num_workers", workers, cwd=tmp_path / folder)
        assert script.stderr.count("Validation: hits@1") == 2
    one, two = (load_file(the_run(tmp_path / folder) / "model.safetensors") for folder in ("a", "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_accumulation_is_one_step_of_the_mean_gradient(tmp_path):
    """Compare two accumulated batches of one turn with one step along their mean gradient, clipped once."""
    corpus = json.loads(SAMPLE.read_text())
    turns = corpus["train"][0]["utterances"][:2]
    entry = {"personality": corpus["train"][0]["personality"], "utterances": turns}
    (tmp_path / "two.json").write_text(json.dumps({"train": [entry], "valid": [entry]}))
    checkpoint = make_checkpoint(tmp_path / "still", n_layer=1, n_embd=32, **NO_DROPOUT)
    # A run with a learning rate of 0 gives the starting weights of the real run.
    script("train.py", "--dataset_path", "two.json", "--model_checkpoint", checkpoint, "--n_epochs", 1, "--lr", 0,
           cwd=tmp_path)
    start = the_run(tmp_path)
    (tmp_path / "step").mkdir()
    script("train.py", "--dataset_path", "../two.json", "--model_checkpoint", start.resolve(), "--n_epochs", 1,
           "--lr", 0.01, "--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--max_norm", 0.5, "--mc_coef", 3,
           cwd=tmp_path / "step")
    moved = load_file(the_run(tmp_path / "step") / "model.safetensors")

    own = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(start)
    tokenizer = get_tokenizer(str(start))
    for turn in turns:
        rows = [build_input_from_segments(
            [tokenizer.encode(one) for one in entry["personality"]], [tokenizer.encode(one) for one in turn["history"]],
            tokenizer.encode(reply), tokenizer, lm_labels=reply == turn["candidates"][-1])
            for reply in turn["candidates"][-2:]]
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name, fill, rows=rows, width=width):
            return torch.tensor([[row[name] + [fill] * (width - len(row[name])) for row in rows]])

        out = own(padded("input_ids", 0), token_type_ids=padded("token_type_ids", 0),
                  mc_token_ids=torch.tensor([[row["mc_token_ids"] for row in rows]]), mc_labels=torch.tensor([1]),
                  labels=padded("lm_labels", -100))
        ((out.loss + 3 * out.mc_loss) / 2).backward()
    torch.nn.utils.clip_grad_norm_(own.parameters(), 0.5)
    # After the second and last batch the rate is half its start: 0.01 * (1 - 1/2).
    compared = 0
    for name, weight in own.named_parameters():
        # This is the first step of transformers 2.5's AdamW. Tiny gradients are rounding noise, and so are their steps.
        clear = weight.grad.abs() > 1e-4
        root = 0.001 ** 0.5 * weight.grad.abs()
        weight = weight.detach() - 0.005 * 0.001 ** 0.5 * weight.grad / (root + 1e-6)
        torch.testing.assert_close(moved[name][clear], weight[clear], atol=2e-5, rtol=1e-4, msg=name)
        compared += int(clear.sum())
    assert compared > 3000


def test_an_incomplete_group_of_batches_is_averaged(tmp_path, small_corpus):
    """Train on three batches: groups of up to eight must move the weights as groups of exactly three do."""
    checkpoint = make_checkpoint(tmp_path / "still", n_layer=1, n_embd=32, **NO_DROPOUT)
    moved = []
    for every in (3, 8, 2):
        work = tmp_path / f"every-{every}"
        work.mkdir()
        script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", checkpoint, "--n_epochs", 1,
               "--train_batch_size", 20, "--gradient_accumulation_steps", every, "--lr", 0.01, cwd=work)
        moved.append(load_file(the_run(work) / "model.safetensors"))
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])
    assert not all(torch.equal(moved[0][name], moved[2][name]) for name in moved[0])


# ------------------------------------------------------------------------------------- run folders from elsewhere


def test_a_2019_run_evaluates_and_trains(run_2019, small_corpus, tmp_path):
    hits, scored = evaluate("hits@1", run_2019, small_corpus, tmp_path)
    assert 0 <= hits <= 1 and len(scored) == len(turns_of(small_corpus))
    script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", run_2019, "--n_epochs", 1, cwd=tmp_path)
    run = the_run(tmp_path)
    assert "RANDOM" not in script.stderr
    assert json.loads((run / "config.json").read_text())["model_type"] in run_2019.name


def test_a_config_without_model_type_is_recognised(run_2019, small_corpus, tmp_path):
    """Read a configuration of early 2019, which names no family and counts control tokens outside the vocabulary."""
    old = tmp_path / "a-run-of-gpt2-or-openai-gpt"
    shutil.copytree(run_2019, old)
    settings = json.loads((run_2019 / "config.json").read_text())
    del settings["model_type"], settings["architectures"]
    settings |= {"vocab_size": settings["vocab_size"] - 5, "n_special": 5}
    (old / "config.json").chmod(0o644)
    (old / "config.json").write_text(json.dumps(settings))
    assert evaluate("hits@1", old, small_corpus, tmp_path) == evaluate("hits@1", run_2019, small_corpus, tmp_path)


def test_a_pretrained_language_model_keeps_its_weights(family, tmp_path, small_corpus):
    """Train from models like the hub's openai-gpt and gpt2, which have no control tokens and no choice head."""
    folder = tmp_path / "pretrained"
    if family == "openai-gpt":
        make_checkpoint(folder)
        config = transformers.OpenAIGPTConfig(vocab_size=TINY_TOKENS, n_positions=256, n_embd=32, n_layer=1, n_head=2)
        pretrained = transformers.OpenAIGPTLMHeadModel(config)
        table = "transformer.tokens_embed.weight"
    else:
        folder.mkdir()
        for name in ("vocab.json", "merges.txt"):
            (folder / name).write_bytes((shared("tokenizers/gpt2") / name).read_bytes())
        pretrained = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2))
        table = "transformer.wte.weight"
    pretrained.save_pretrained(folder)
    script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", folder, "--n_epochs", 1, "--lr", 0,
           cwd=tmp_path)
    assert "no choice head: starting from a random one" in script.stderr and "RANDOM" not in script.stderr
    run = the_run(tmp_path)
    kept, given = load_file(run / "model.safetensors"), pretrained.state_dict()
    vocabulary = len(given[table])
    assert len(kept[table]) == vocabulary + 5
    kept[table] = kept[table][:vocabulary]
    for name, weight in given.items():
        assert name == "lm_head.weight" or torch.equal(kept[name], weight), name
    assert {name for name in kept if name not in given} == {
        "multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"}
    assert evaluate("ppl", run, small_corpus, tmp_path)[0] > 1


def test_missing_weights_start_at_random_with_a_warning(tmp_path, small_corpus):
    script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", TINY, "--n_epochs", 0, cwd=tmp_path)
    assert "has no weights: starting from RANDOM weights" in script.stderr


def test_the_config_decides_the_family(tmp_path, small_corpus):
    """Open a GPT-2 in a folder called openai-gpt; neither this name nor --model misleads."""
    source, folder = shared("golden/run-2019-gpt2"), tmp_path / "openai-gpt"
    folder.symlink_to(source, target_is_directory=True)
    out = script("interact.py", "--model_checkpoint", folder, "--model", "openai-gpt", "--personality", "i am .",
                 "--no_sample", stdin="hi\n", cwd=tmp_path)
    plain = script("interact.py", "--model_checkpoint", source, "--personality", "i am .", "--no_sample", stdin="hi\n",
                   cwd=tmp_path)
    assert out == plain


# --------------------------------------------------------------------------------------------- convai_evaluation


def test_f1_is_the_mean_over_the_predictions(trained, small_corpus, tmp_path):
    f1, written = evaluate("f1", trained, small_corpus, tmp_path, "--seed", 3)
    again, same = evaluate("f1", trained, small_corpus, tmp_path, "--seed", 3)
    assert (f1, written) == (again, same)

    def bag(text):
        drop = {"a", "an", "the"}
        words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
        return [word for word in words if word not in drop]

    total = 0.0
    for record, (_, history, candidates) in zip(written, turns_of(small_corpus), strict=True):
        assert (record["context"], record["gold"]) == (history, candidates[-1])
        reply, gold = bag(record["reply"]), bag(candidates[-1])
        common, left = 0, list(gold)
        for word in reply:
            if word in left:
                left.remove(word)
                common += 1
        total += 2 * common / (len(reply) + len(gold)) if common else 0
    assert f1 == pytest.approx(total / len(written), rel=1e-3, abs=1e-4)


def test_batched_replies_equal_single_replies(trained, small_corpus, tmp_path):
    _, together = evaluate("f1", trained, small_corpus, tmp_path, "--no_sample", "--batch_size", 16)
    _, alone = evaluate("f1", trained, small_corpus, tmp_path, "--no_sample", "--batch_size", 1)
    assert together == alone


def test_half_precision_changes_figures_little(trained, small_corpus, tmp_path):
    full, exact = evaluate("ppl", trained, small_corpus, tmp_path)
    half, rounded = evaluate("ppl", trained, small_corpus, tmp_path, "--fp16", "bf16")
    assert half == pytest.approx(full, rel=0.02) and rounded != exact


# ------------------------------------------------------------------------------------------------- interact.py


def test_a_chat_through_a_pipe(trained, tmp_path):
    common = ["--model_checkpoint", trained, "--personality", "i have two dogs .\n\n  i am a baker .  "]
    out = script("interact.py", *common, "--seed", 5, stdin="hello !\n\nwhat do you do ?\nAbort!\nnot read\n",
                 cwd=tmp_path).splitlines()
    assert out[:3] == ["Personality:", "  i have two dogs .", "  i am a baker ."]
    assert len(out) == 6 and out[4] == "Please say something: the line is empty."
    assert out[3] and out[5] and ">>>" not in "".join(out)
    again = script("interact.py", *common, "--seed", 5, stdin="hello !\n\nwhat do you do ?\n", cwd=tmp_path)
    assert again.splitlines()[:6] == out
    other = script("interact.py", *common, "--seed", 6, stdin="hello !\n\nwhat do you do ?\n", cwd=tmp_path)
    assert other.splitlines()[3:] != out[3:]


def test_personalities_from_a_file_the_data_or_none(trained, small_corpus, tmp_path):
    (tmp_path / "me.txt").write_text("i fly kites .\ni am nine .\n")
    common = ["interact.py", "--model_checkpoint", trained, "--no_sample"]
    out = script(*common, "--personality", "me.txt", "--end_command", "stop", stdin="hi\nstop\nhi\n", cwd=tmp_path)
    assert out.startswith("Personality:\n  i fly kites .\n  i am nine .\n") and len(out.splitlines()) == 4
    out = script(*common, "--personality", "", stdin="hi\n", cwd=tmp_path)
    assert out.startswith("Personality:\n  (none)\n")
    personas = [entry["personality"] for split in json.loads(small_corpus.read_text()).values() for entry in split]
    chosen = set()
    for seed in (1, 2, 3):
        out = script(*common, "--dataset_path", small_corpus, "--seed", seed, stdin="", cwd=tmp_path)
        sentences = [line.strip() for line in out.splitlines()[1:] if line.strip()]
        assert sentences in personas
        chosen.add(tuple(sentences))
    assert len(chosen) > 1


def test_unreadable_personality_files_are_named(trained, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 is what i drink .")
    for name, complaint in (("me.txt", "no such file"),
                            ("latin.txt", "not UTF-8 at byte 3"),
                            ("./me", "no such file")):
        line = error_line("interact.py", "--model_checkpoint", trained, "--personality", name, cwd=tmp_path)
        assert f"--personality {name}: {complaint}" in line


def test_turns_that_do_not_fit_are_counted(tmp_path, small_corpus):
    short = make_checkpoint(tmp_path / "short", n_layer=1, n_embd=32, n_positions=64)
    script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", short, "--n_epochs", 0, cwd=tmp_path)
    assert script.stderr.count("exceed the model's 64 positions and lose their oldest context") == 2
    counted = [line for line in script.stderr.splitlines() if "valid:" in line and "exceed" in line][0].split()[2]
    script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", short, "--n_epochs", 1, "--lr", 0,
           cwd=tmp_path)
    run = the_run(tmp_path)
    script("convai_evaluation.py", "--dataset_path", small_corpus, "--model_checkpoint", run, cwd=tmp_path)
    assert f"{counted} turns exceed the model's positions" in script.stderr


def test_lengths_bound_the_reply(trained):
    model, tokenizer = load_checkpoint(str(trained))
    persona, history = [tokenizer.encode("i am .")], [tokenizer.encode("hello")]
    parser = ArgumentParser()
    add_decoding_flags(parser)
    torch.manual_seed(1)
    for low, high in ((9, 9), (1, 4), (12, 3)):
        args = parser.parse_args(["--min_length", str(low), "--max_length", str(high)])
        reply = sample_sequence(persona, history, tokenizer, model, args)
        assert min(low, high) <= len(reply) <= high


def test_max_history_bounds_what_a_reply_depends_on(trained, tmp_path):
    """Compare the last reply of a long chat under --max_history 0 with the reply of a new chat."""
    common = ["interact.py", "--model_checkpoint", trained, "--personality", "i am .", "--no_sample"]
    common += ["--max_history", 0]
    long = script(*common, stdin="hi\nhow are you ?\ntell me more\nwhat do you do ?\n", cwd=tmp_path).splitlines()
    short = script(*common, stdin="what do you do ?\n", cwd=tmp_path).splitlines()
    assert long[5] == short[2]


def test_a_run_remembers_its_max_history(trained, small_corpus, tmp_path):
    """Evaluate and chat with a run that saw one utterance; flags override what the run remembers."""
    assert json.loads((trained / "config.json").read_text())["max_history"] == 2
    script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", trained, "--n_epochs", 1, "--lr", 0,
           "--max_history", 0, cwd=tmp_path)
    short = the_run(tmp_path)
    assert load_file(short / "model.safetensors").keys() == load_file(trained / "model.safetensors").keys()
    one = evaluate("hits@1", short, small_corpus, tmp_path)
    five = evaluate("hits@1", short, small_corpus, tmp_path, "--max_history", 2)
    assert one == evaluate("hits@1", trained, small_corpus, tmp_path, "--max_history", 0)
    assert five == evaluate("hits@1", trained, small_corpus, tmp_path) and one[1] != five[1]
    chat = ["interact.py", "--personality", "i am .", "--no_sample", "--model_checkpoint"]
    said = "hi\nhow are you ?\ntell me more\n"
    one, five = (script(*chat, short, *more, stdin=said, cwd=tmp_path) for more in ((), ("--max_history", 2)))
    assert one == script(*chat, trained, "--max_history", 0, stdin=said, cwd=tmp_path)
    assert five == script(*chat, trained, stdin=said, cwd=tmp_path)
    assert load_checkpoint(str(short))[0].max_history == 0
    assert load_checkpoint(str(short), max_history=3)[0].max_history == 3


# ------------------------------------------------------------------------------------------------- wrong input


def damaged(folder: Path, trained: Path, **files: bytes | None) -> Path:
    """Copy a run and replace some files; those given as None are removed."""
    folder.mkdir()
    for file in trained.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return folder


def test_unusable_checkpoints_are_named(trained, tmp_path):
    whole = (trained / "model.safetensors").read_bytes()
    cases = {
        tmp_path / "nothing-here": "no such folder",
        damaged(tmp_path / "a", trained, config__json=None, training_args__json=None): "has no config.json",
        damaged(tmp_path / "b", trained, config__json=b"{"): "config.json cannot be read",
        damaged(tmp_path / "c", trained, config__json=b'{"model_type": "t5"}'): "is a 't5' model",
        damaged(tmp_path / "d", trained, tokenizer__json=None): "has no tokenizer files",
        damaged(tmp_path / "e", trained, tokenizer__json=b"{}"): "its tokenizer cannot be read",
        damaged(tmp_path / "f", trained, model__safetensors=whole[:len(whole) // 2]): "weights cannot be loaded",
        damaged(tmp_path / "g", trained, model__safetensors=b""): "weights cannot be loaded",
    }
    for folder, complaint in cases.items():
        line = error_line("interact.py", "--model_checkpoint", folder, "--personality", "i am .", cwd=tmp_path)
        assert complaint in line and str(folder) in line, line
    foreign = damaged(tmp_path / "i", trained, tokenizer__json=None)
    for name in ("vocab.json", "merges.txt"):
        (foreign / name).write_bytes((shared("tokenizers/gpt2") / name).read_bytes())
    line = error_line("interact.py", "--model_checkpoint", foreign, "--personality", "i am .", cwd=tmp_path)
    assert f"{foreign}: its tokenizer cannot be read" in line
    shape = json.loads((trained / "config.json").read_text())
    wider = damaged(tmp_path / "h", trained, config__json=json.dumps(shape | {"n_embd": 128}).encode())
    line = error_line("interact.py", "--model_checkpoint", wider, "--personality", "", cwd=tmp_path)
    assert "weights cannot be loaded" in line


def test_mistyped_checkpoints_get_a_suggestion(trained, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / trained.name).symlink_to(trained, target_is_directory=True)
    for name, cure in ((f"kept/{trained.name[:-1]}", f"did you mean kept/{trained.name}?"),
                       ("runs/mine", "a run folder"), ("kept/x", "a run folder")):
        line = error_line("interact.py", "--model_checkpoint", name, "--personality", "i am .", cwd=tmp_path)
        assert f"{name}: no such folder; " in line and cure in line
    line = error_line("interact.py", "--model_checkpoint", "persnoa", "--personality", "i am .", cwd=tmp_path)
    assert "nor a model that the hub provides" in line and "did you mean persona?" in line


def test_a_silent_hub_is_asked_once(monkeypatch):
    """Let the hub stay silent: the script gives up after one attempt, whereas the library alone would make five."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(InputError, match="--model_checkpoint nobody/nothing: .*the hub does not answer"):
            read_config("nobody/nothing")
        silent.settimeout(0)
        silent.accept()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_an_unreachable_hub_names_the_flag(tmp_path):
    line = error_line("train.py", "--dataset_path", SAMPLE, "--model_checkpoint", "openai-gpt", cwd=tmp_path)
    assert "--model_checkpoint openai-gpt: is neither a folder here nor a model that the hub provides" in line


@pytest.mark.parametrize("arguments, complaint", [
    (["interact.py", "--temperature", "0"], "--temperature: '0' is not a number from 0.0001 to 5; for the likeliest"),
    (["interact.py", "--max_length", "0"], "--max_length: '0' is not a whole number from 1 to 1,000,000"),
    (["interact.py", "--max_history", "-1"], "--max_history: '-1' is not a whole number from 0 to"),
    (["train.py", "--train_batch_size", "x"], "--train_batch_size: 'x' is not a whole number"),
    (["train.py", "--device", "cuda:77"], "--device: 'cuda:77' cannot be used here"),
    (["train.py", "--device", "toaster"], "--device: 'toaster' cannot be used here"),
    (["train.py", "--fp16", "O7"], "--fp16: invalid choice"),
    (["convai_evaluation.py", "--eval_type", "bleu"], "--eval_type: invalid choice"),
])
def test_wrong_flags_are_refused_by_name(tmp_path, arguments, complaint):
    assert complaint in error_line(*arguments, cwd=tmp_path)


def test_a_reply_longer_than_the_model_is_refused(trained, tmp_path):
    line = error_line("interact.py", "--model_checkpoint", trained, "--personality", "", "--max_length", 300,
                      stdin="hi\n", cwd=tmp_path)
    assert "--max_length 300: the model has 256 positions" in line


def test_a_huge_message_is_answered(trained, tmp_path):
    out = script("interact.py", "--model_checkpoint", trained, "--personality", "i am .", stdin="word " * 20_000 + "\n",
                 cwd=tmp_path)
    assert out.splitlines()[2]


def test_predictions_that_cannot_be_written_are_named(trained, small_corpus, tmp_path):
    line = error_line("convai_evaluation.py", "--model_checkpoint", trained, "--dataset_path", small_corpus,
                      "--predictions", tmp_path / "no" / "where.jsonl", cwd=tmp_path)
    assert "--predictions" in line and "cannot be written" in line


def test_an_unwritable_cache_place_is_named(trained, tmp_path):
    (tmp_path / "file").write_text("")
    line = error_line("convai_evaluation.py", "--model_checkpoint", trained, "--dataset_path", SAMPLE,
                      "--dataset_cache", tmp_path / "file" / "cache", cwd=tmp_path)
    assert "--dataset_cache" in line and "cannot be written" in line
