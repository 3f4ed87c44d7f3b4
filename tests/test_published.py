"""Test models in each published layout of 2019: the same weights give what 2019 recorded."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import script, shared
from safetensors.torch import save_file

from inputs import Specials, collate, pack_turn
from tokenization import get_tokenizer
from weights import add_special_tokens_, load_model

ORDER = ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"]  # in the published files; later <pad> came third


def rows_in_order(run: Path) -> dict[str, torch.Tensor]:
    """Return a recorded run's weights with the control tokens' rows in the published order."""
    weights = torch.load(run / "pytorch_model.bin")
    ids = json.loads((run / "added_tokens.json").read_text())
    first = min(ids.values())
    rows = [*range(first), *(ids[token] for token in ORDER)]
    table = ("tokens_embed.weight", "wte.weight", "lm_head.weight")
    return {name: tensor[rows] if name.endswith(table) else tensor for name, tensor in weights.items()}


def write(folder: Path, run: Path, config: dict, weights: dict[str, torch.Tensor], **files) -> Path:
    """Write a published folder with a recorded run's vocabulary; ``files`` become further JSON files."""
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(run / name, folder / name)
    for name, content in (files | {"config": config}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def renamed(weights: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new, 1): tensor for name, tensor in weights.items()}


@pytest.fixture
def sizes(run_2019) -> dict:
    """Return the recorded run's sizes under the names of an early-2019 configuration."""
    config = json.loads((run_2019 / "config.json").read_text())
    kept = ("afn", "attn_pdrop", "embd_pdrop", "initializer_range", "layer_norm_epsilon", "n_ctx", "n_embd", "n_head",
            "n_layer", "n_positions", "resid_pdrop", "vocab_size")
    return {name: config[name] for name in kept if name in config} | {"n_special": 5}


def assert_as_recorded(checkpoint: Path | str, golden: dict, tokenizer=None) -> None:
    """Check the published ids of the control tokens, and the recorded losses and scores of six contexts."""
    tokenizer = tokenizer or get_tokenizer(str(checkpoint))
    model = load_model(str(checkpoint))
    add_special_tokens_(model, tokenizer)
    first = len(tokenizer) - 5
    assert tokenizer.convert_tokens_to_ids(ORDER) == list(range(first, first + 5))
    assert len(model.get_input_embeddings().weight) == len(tokenizer) == model.config.vocab_size
    special = Specials.of(tokenizer)
    for case in golden["forward"]:
        ids = [[tokenizer.encode(text) for text in case[name]] for name in ("persona", "history", "candidates")]
        with torch.no_grad():
            out = model(**collate([pack_turn(*ids, special, max_positions=512)], special.pad))
        assert out.mc_logits[0].tolist() == pytest.approx(case["mc_logits"], abs=1e-4)
        assert out.lm_loss.item() == pytest.approx(case["lm_loss"], abs=1e-4)


ADDED = {"openai-gpt": {token: 40478 + n for n, token in enumerate(ORDER)},
         "gpt2": {token: 50257 + n for n, token in enumerate(ORDER)}}
AS_TEXT = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
           "additional_special_tokens": ["<speaker1>", "<speaker2>"]}
AS_OBJECTS = {name: {"content": value, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
              for name, value in AS_TEXT.items() if isinstance(value, str)}


@pytest.mark.parametrize("files", [{}, {"special_tokens_map": AS_OBJECTS},
                                   {"special_tokens_map": AS_TEXT, "tokenizer_config": {}}], ids=range(3))
def test_the_published_layout(family, run_2019, sizes, golden, tmp_path, files):
    """Count the control tokens in ``vocab_size`` and again in ``n_special``, as the published configuration does."""
    folder = write(tmp_path / "model", run_2019, sizes, rows_in_order(run_2019), added_tokens=ADDED[family], **files)
    assert_as_recorded(folder, golden)


def test_the_published_files(tmp_path):
    """Use the published configuration and control tokens, with fewer and narrower layers, packed as in 2019."""
    published, run = shared("cases/published-2019"), shared("golden/run-2019-openai-gpt")
    config = json.loads((published / "config.json").read_text())
    assert (config["vocab_size"], config["n_special"]) == (40483, 5) and "model_type" not in config
    narrow = config | {"n_embd": 32, "n_layer": 2, "n_head": 2}
    folder = write(tmp_path / "model", run, narrow, rows_in_order(run),
                   added_tokens=json.loads((published / "added_tokens.json").read_text()))
    assert_as_recorded(folder, json.loads(shared("golden/openai-gpt.json").read_text("utf-8")))
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(folder, ".")
    chat = script("interact.py", "--model_checkpoint", "model.tar.gz", "--personality", "i am .", "--no_sample",
                  stdin="hi\nwho are you ?\n", cwd=tmp_path)
    assert len(chat.split("\n")) == 6 and "random" not in script.stderr.lower()


@pytest.mark.parametrize("ending, counted", [("\n", True), ("\r\n", False)])
def test_the_layout_of_early_2019(run_2019, sizes, golden, tmp_path, ending, counted):
    """Read ids from ``special_tokens.txt``, heads under other names, and ``vocab_size`` with and without these ids."""
    weights = renamed(rows_in_order(run_2019), "multiple_choice_head.summary.", "multiple_choice_head.linear.")
    weights = renamed(weights, "lm_head.weight", "lm_head.decoder.weight")
    config = sizes | {"vocab_size": sizes["vocab_size"] - 5 * (not counted)}
    folder = write(tmp_path / "model", run_2019, config, weights)
    (folder / "special_tokens.txt").write_bytes("".join(token + ending for token in ORDER).encode())
    assert_as_recorded(folder, golden)
    tokenizer = get_tokenizer(str(folder))  # a run that continues from this folder keeps the ids
    tokenizer.save_pretrained(tmp_path / "run")
    shutil.copyfile(folder / "config.json", tmp_path / "run" / "config.json")
    again = get_tokenizer(str(tmp_path / "run"))
    assert again.convert_tokens_to_ids(ORDER) == tokenizer.convert_tokens_to_ids(ORDER)


CHANGES = {
    "tied": lambda weights: {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"},
    "without masks": lambda weights: {name: tensor for name, tensor in weights.items() if ".attn.bias" not in name},
    "of DataParallel": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "without a prefix": lambda weights: renamed(weights, "transformer.", ""),
}


def test_names_and_files_of_weights(family, run_2019, sizes, golden, tmp_path):
    """Name the weights as other programs do, and save them as torch did before 2020 and as safetensors."""
    weights = rows_in_order(run_2019)
    folder = write(tmp_path / "model", run_2019, sizes, {}, added_tokens=ADDED[family])
    tokenizer, path = get_tokenizer(str(folder)), folder / "pytorch_model.bin"
    for change in CHANGES.values():
        torch.save(change(weights), path)
        assert_as_recorded(folder, golden, tokenizer)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert_as_recorded(folder, golden, tokenizer)
    path.unlink()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path.with_name("model.safetensors"))
    assert_as_recorded(folder, golden, tokenizer)
