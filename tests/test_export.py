"""Exported runs in other hands: plain transformers, GGUF readers."""

import json

import gguf
import pytest
import torch
import transformers
from conftest import SAMPLE, error_line, script
from safetensors.torch import load_file
from test_decoders import FAMILIES, byte_level, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoding import Decoding, fitted_context, generate_replies, load_checkpoint
from inputs import Specials, build_reply
from model import load_model, save_model

GPT2 = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=1024, initializer_range=0.2)
# (transformers reads every GPT-2 of a GGUF file as one of 1,024 positions)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request, tmp_path_factory):
    """(run, exported folder, the same as GGUF in float32)."""
    work = tmp_path_factory.mktemp("export")
    torch.manual_seed(8)
    base = write_checkpoint(work / "base", {"gpt2": GPT2, "llama": FAMILIES["llama"]}[request.param], byte_level())
    save_model(load_model(str(base)), base)
    corpus = json.loads(SAMPLE.read_text("utf-8"))
    (work / "data.json").write_text(json.dumps({"train": corpus["train"][:4], "valid": corpus["valid"][:1]}))
    script("train.py", "--model_checkpoint", base, "--dataset_path", "data.json", "--n_epochs", 1, "--lr", 1e-3,
           "--no_token_types", "--max_history", 1, cwd=work)
    run = next((work / "runs").iterdir())
    script("export.py", run, "out", "--gguf", "f32", cwd=work)
    return run, work / "out", work / "out" / "out-f32.gguf"


def conversations() -> list[tuple[list[str], list[str]]]:
    corpus = json.loads(SAMPLE.read_text("utf-8"))["valid"]
    return [(entry["personality"], turn["history"][-3:]) for entry in corpus for turn in entry["utterances"]][:12]


def test_the_template_renders_the_tokens_of_training_and_replies_are_the_same(exported):
    run, folder, _ = exported
    model, tokenizer = load_checkpoint(str(run))
    special = Specials.of(tokenizer)
    plain, theirs = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for persona, said in conversations():
        messages = [{"role": "system", "content": "\n".join(persona)}]
        messages += [{"role": "user" if turns_back % 2 else "assistant", "content": text}
                     for turns_back, text in zip(range(len(said), 0, -1), said, strict=True)]
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                              return_tensors="pt")
        context = fitted_context(model, tokenizer.encode_persona(persona), [tokenizer.encode(text) for text in said],
                                 special, 20)
        assert rendered["input_ids"][0].tolist() == context.ids + build_reply([], special, with_eos=False).ids
        reply = plain.generate(**rendered, do_sample=False, temperature=None, top_p=None, top_k=None)
        written = reply[0, rendered["input_ids"].shape[1]:].tolist()
        ours = generate_replies(model, [context], special, Decoding(no_sample=True))[0]
        assert written[:len(ours)] == ours and len(written) <= len(ours) + 1 <= 21  # what is over ends it


def test_a_gguf_file_written_is_the_gguf_file_read(exported, tmp_path):
    _, folder, file = exported
    weights = load_file(folder / "model.safetensors")
    again = load_model(str(file)).state_dict()
    for name, weight in weights.items():
        assert torch.equal(again[name], weight), name
    fields = gguf.GGUFReader(file).fields
    assert "<speaker2>" in fields["tokenizer.chat_template"].contents()
    tokens = AutoTokenizer.from_pretrained(folder)
    spelt = fields["tokenizer.ggml.tokens"].contents()
    assert all(spelt[number] == token for token, number in tokens.get_vocab().items())
    script("export.py", folder.parent / "runs" / exported[0].name, "half", "--gguf", "f16", cwd=tmp_path)
    for name, weight in load_model(str(tmp_path / "half" / "half-f16.gguf")).state_dict().items():
        if name in weights and weight.ndim > 1 and weight.shape[-1] % 32 == 0 and "head" not in name:
            written = weights[name] if "c_" not in name else weights[name].T
            expected = weights[name].half().float() if written.shape[-1] % 32 == 0 else weights[name]
            assert torch.equal(weight, expected), name


def test_what_servers_lack_is_refused(exported, tmp_path, small_corpus):
    run, _, _ = exported
    config = json.loads((run / "config.json").read_text())
    for change, word in (({"no_token_types": False}, "--no_token_types"), ({"history_start": 9}, "--history_first")):
        (run / "config.json").write_text(json.dumps(config | change))
        try:
            assert word in error_line("export.py", run, tmp_path / "refused", cwd=tmp_path)
        finally:
            (run / "config.json").write_text(json.dumps(config))
    assert not (tmp_path / "refused").exists()
