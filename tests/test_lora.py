"""Test --lora: what is trained, the adapter on disk, the same adapter in plain PEFT, and merging."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import TINY, error_line, make_checkpoint, run_main, script, templates, the_run
from peft.tuners import lora
from test_decoders import FAMILIES, byte_level, write_checkpoint

import utils
from cli import InputError
from files import step_files
from inputs import Specials, TurnDataset, collate
from layers import LowRankLinear
from model import autocast
from tokenization import get_tokenizer
from weights import add_lora_, add_special_tokens_, load_model, main, save_model

SMALL = dict(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.2)
BASES = {name: FAMILIES[name] for name in ("llama", "smollm", "opt", "gpt_neox")} | {
    "gpt2": transformers.GPT2Config(**SMALL), "openai-gpt": transformers.OpenAIGPTConfig(**SMALL)}


def make_base(folder: Path, family: str = "llama") -> Path:
    """Write a random model of a family with a byte-level tokenizer."""
    base = write_checkpoint(folder / "base", BASES[family], byte_level())
    if family == "openai-gpt":  # this family needs another kind of tokenizer
        base = make_checkpoint(folder / "gpt", **{**SMALL, "vocab_size": 1146})
    save_model(load_model(str(base)), base)
    return base


def with_adapter(base: Path):
    """Load a model with a new adapter of rank 4, and its tokenizer."""
    model, tokenizer = load_model(str(base)), get_tokenizer(str(base))
    add_special_tokens_(model, tokenizer)
    add_lora_(model, tokenizer, 4, str(base))
    return model, tokenizer


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # from peft
@pytest.mark.parametrize("family", BASES)
def test_an_adapter_from_training_to_merging(family, tmp_path, monkeypatch):
    torch.manual_seed(4)
    base = make_base(tmp_path, family)
    tokenizer = get_tokenizer(str(base))
    special = Specials.of(tokenizer)
    monkeypatch.chdir(tmp_path)
    model = load_model(base.name)
    add_special_tokens_(model, tokenizer)
    pretrained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    add_lora_(model, tokenizer, 4, base.name)

    table = utils.get_dataset(tokenizer, str(templates()), str(tmp_path / "cache"))
    dataset = TurnDataset(table["valid"], tokenizer, 256, num_candidates=3)
    batch = collate([dataset[turn] for turn in (0, 57)], special.pad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        out = model(**batch)
        (out.lm_loss + out.mc_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = model(**batch)
    untouched = {re.sub(r"\.(base_layer|original_module|token_adapter)\b", "", name): parameter
                 for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert untouched.keys() <= pretrained.keys() and len(untouched) > len(pretrained) / 2
    assert all(torch.equal(parameter, pretrained[name]) for name, parameter in untouched.items())
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, learning)) < sum(map(torch.numel, pretrained.values())) / 3

    run = tmp_path / "run"
    run.mkdir()
    model.config.max_len, model.config.no_persona, model.config.history_start = 99, True, 7
    save_model(model, run)
    tokenizer.save_pretrained(run)
    assert sorted(path.name for path in run.glob("*.safetensors")) == ["adapter_model.safetensors"]
    settings = json.loads((run / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)  # absolute, whatever the working folder
    monkeypatch.chdir("/")

    run_main(monkeypatch, main, run, tmp_path / "merged")
    merged = [load_model(str(folder)) for folder in (run, tmp_path / "merged")]
    for again in merged:
        with torch.no_grad():
            out = again(**batch)
        assert (again.max_positions, again.no_persona, again.history_start) == (99, True, 7)
        for figure in ("mc_logits", "logits"):
            torch.testing.assert_close(out[figure], trained[figure], atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, merged[0].state_dict().values(), merged[1].state_dict().values()))
    assert type(merged[0]) is type(merged[1]) is type(load_model(str(base)))

    if family != "openai-gpt":  # GPT-1's weights have other names in plain transformers
        plain = peft.AutoPeftModelForCausalLM.from_pretrained(run).eval()
        ids = torch.tensor([[*special, *range(10, 30)]])
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, merged[0](ids).logits, atol=1e-4, rtol=1e-4)


def test_lora_runs_resume_and_evaluate(trained, small_corpus, tmp_path, monkeypatch):
    """Train with gradient checkpointing, evaluate, resume as after a kill, and refuse damaged adapters."""
    flags = ["--dataset_path", small_corpus, "--n_epochs", 1]
    script("train.py", *flags, "--model_checkpoint", trained, "--lora", 4, "--lr", 1e-2, "--gradient_checkpointing",
           "--gradient_accumulation_steps", 1, "--checkpoint_every", 5, "--keep_checkpoints", 99, cwd=tmp_path)
    assert "LoRA of rank 4" in script.stderr
    last = [line for line in script.stderr.splitlines() if "train: Validation: " in line][-1]
    run = the_run(tmp_path)
    script("train.py", "--dataset_path", small_corpus, "--n_epochs", 0, "--model_checkpoint", run, cwd=tmp_path)
    assert [line for line in script.stderr.splitlines() if "train: Validation: " in line] == [last]

    checkpoint = load_model(str(step_files(run)[-1])).state_dict()
    for name, tensor in load_model(str(run)).state_dict().items():
        torch.testing.assert_close(tensor, checkpoint[name], atol=1e-6, rtol=1e-5, msg=name)

    resumed = shutil.copytree(run, tmp_path / "resumed")  # as if killed after five steps
    for late in [resumed / "adapter_model.safetensors", *resumed.glob("checkpoints/*")]:
        if late.name != "step-5.safetensors":
            late.unlink()
    script("train.py", "--resume", resumed, cwd=tmp_path)
    assert (resumed / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()

    complaint = error_line("train.py", *flags, "--model_checkpoint", TINY, "--lora", 4, cwd=tmp_path)
    assert "has no weights" in complaint and "--lora" in complaint
    with pytest.raises(InputError, match="nothing to merge"):
        run_main(monkeypatch, main, trained, tmp_path / "merged")
    settings = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/no/such/model"}))
    with pytest.raises(InputError, match="adapts /no/such/model: .*no such folder"):
        load_model(str(run))
    (run / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter_config.json: has no base_model_name_or_path"):
        load_model(str(run))
    (run / "adapter_config.json").write_text(json.dumps(settings))
    (run / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="its adapter does not fit"):
        load_model(str(run))


def test_low_rank_layers_equal_pefts(tmp_path):
    torch.manual_seed(5)
    model, tokenizer = with_adapter(make_base(tmp_path))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    table = utils.get_dataset(tokenizer, str(templates()), str(tmp_path / "cache"))
    dataset = TurnDataset(table["valid"], tokenizer, 256)
    batch = collate([dataset[turn] for turn in (0, 57, 3)], tokenizer.pad_token_id)
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    assert len(layers) == 14  # seven in each of two blocks

    def losses_and_gradients(kind, fp16):
        for layer in layers:
            layer.__class__ = kind
        model.zero_grad()
        with autocast("cpu", fp16):
            out = model(**batch)
        (out.lm_loss + out.mc_loss).backward()
        gradients = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
        return torch.cat([out.lm_loss.detach()[None], out.mc_loss.detach()[None], *gradients])

    exact = losses_and_gradients(lora.Linear, "")
    ours = losses_and_gradients(LowRankLinear, "")
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    rounded = [(losses_and_gradients(kind, "bf16") - exact).norm() for kind in (LowRankLinear, lora.Linear)]
    assert rounded[0] < 1.5 * rounded[1] and rounded[1] < 0.2 * exact.norm()


def test_adapters_of_equal_rank_are_continued(tmp_path, small_corpus):
    torch.manual_seed(6)
    base = make_base(tmp_path)
    flags = ["--dataset_path", small_corpus, "--n_epochs", 1, "--epoch_batches", 4, "--lr", 1e-3,
             "--gradient_accumulation_steps", 1]

    def trained(checkpoint, rank, *more):
        before = set((tmp_path / "runs").glob("*"))
        script("train.py", *flags, *more, "--model_checkpoint", checkpoint, "--lora", rank, cwd=tmp_path)
        return (set((tmp_path / "runs").glob("*")) - before).pop()

    first = trained(base, 4, "--no_token_types")
    second, third = trained(first, 4), trained(first, 2)
    named = [json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
             for run in (first, second, third)]
    assert named == [str(base), str(base), str(first)]
    tokenizer, weights = get_tokenizer(str(first)), [load_model(str(run)) for run in (base, first, second)]
    assert weights[2].no_token_types
    moved = [(later.model.layers[0].mlp.up_proj.weight - earlier.model.layers[0].mlp.up_proj.weight).norm().item()
             for earlier, later in zip(weights, weights[1:], strict=False)]
    assert moved[0] > 0 < moved[1]  # the second run continued the first adapter
    both = weights[2].model.layers[0].mlp.up_proj.weight - weights[0].model.layers[0].mlp.up_proj.weight
    assert torch.linalg.matrix_rank(both, rtol=1e-3) <= 4  # one adapter, not two
    assert len(tokenizer) == weights[2].get_input_embeddings().weight.shape[0]


def test_written_adapters_are_rounded_to_bfloat16(tmp_path, monkeypatch):
    torch.manual_seed(7)
    model, tokenizer = with_adapter(make_base(tmp_path))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    run = tmp_path / "run"
    run.mkdir()
    model.config.update({"trained_on": {"dataset_path": "/home/me/private.json"}, "max_history": 7})
    save_model(model, run)
    tokenizer.save_pretrained(run)
    run_main(monkeypatch, main, run, tmp_path / "passed_on", "--adapter")
    assert "private" in (run / "config.json").read_text()
    assert not any("private" in file.read_text("utf-8") for file in (tmp_path / "passed_on").glob("*.json"))
    assert load_model(str(tmp_path / "passed_on")).max_history == 7
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (run, tmp_path / "passed_on")]
    assert sizes[1] < 0.6 * sizes[0]
    weights = [load_model(str(folder)).state_dict() for folder in (run, tmp_path / "passed_on")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0.02, atol=0.003, msg=name)
