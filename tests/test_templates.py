"""Test models with their own chat template that were never trained with our control tokens."""

import json
import time

import pytest
import torch
import transformers
from conftest import SAMPLE, error_line, script, smollm2

import demo
from cli import InputError
from decoding import Decoding, decoded, fitted_context, generate_replies, load_checkpoint
from pretrained import loading_arguments
from templates import tokens_for_chat
from web.bot import Bot

PERSONA, SAID = ["i have two dogs .", "i like tea ."], ["hello !", "hi , how are you ?", "say <|im_end|> to me"]
NO_SYSTEM = ("{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
             "{% endif %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}[assistant]")


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """Make a small random Llama with the tokenizer and template of a real instruct model, as on the hub."""
    folder = tmp_path_factory.mktemp("hub") / "instruct"
    tokenizer = transformers.AutoTokenizer.from_pretrained(**loading_arguments(smollm2()))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3)).save_pretrained(folder)
    return folder


def messages(texts: list[str]) -> list[dict]:
    roles = ["user", "assistant", "user"]
    return [{"role": "system", "content": "\n".join(PERSONA)},
            *({"role": role, "content": text} for role, text in zip(roles, texts, strict=True))]


def test_prompts_and_replies_equal_transformers(instruct):
    model, tokenizer = load_checkpoint(str(instruct))
    special = tokens_for_chat(tokenizer)
    own = transformers.AutoTokenizer.from_pretrained(instruct)
    expected = own.apply_chat_template(messages([text.replace("<|", "< |") for text in SAID]), tokenize=True,
                                       add_generation_prompt=True, return_dict=True)["input_ids"]
    context = fitted_context(model, tokenizer.encode_persona(PERSONA), [tokenizer.encode(text) for text in SAID],
                             special, 20)
    assert context.ids == expected and expected.count(own.eos_token_id) == 4  # one per message
    plain = transformers.LlamaForCausalLM.from_pretrained(instruct)
    for seed in range(3):
        ids = [[*expected, 5 + seed]]
        begun = generate_replies(model, [context], special, Decoding(no_sample=True, max_length=20), [[5 + seed]])[0]
        theirs = plain.generate(torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids)), do_sample=False,
                                max_new_tokens=20, min_new_tokens=1, eos_token_id=[*special], pad_token_id=0)
        theirs = theirs[0, len(ids[0]):].tolist()
        assert begun == [token for token in theirs if token not in special]
    assert own.eos_token not in decoded(tokenizer, [40, own.eos_token_id, 41])


def test_long_conversations_lose_their_oldest_messages(instruct):
    model, tokenizer = load_checkpoint(str(instruct), max_len=80)
    special = tokens_for_chat(tokenizer)
    said = [tokenizer.encode(text) for text in ("the first thing " * 10, "an answer " * 5, "the last thing")]
    context = fitted_context(model, tokenizer.encode_persona(PERSONA), said, special, 20)
    text = tokenizer.decode(context.ids)
    assert len(context.ids) <= 59 and "the first" not in text and "an answer" not in text
    assert "i like tea ." in text and "the last thing" in text
    assert len(fitted_context(model, [], [tokenizer.encode("word " * 500)], special, 20).ids) == 59


def test_a_template_without_system_messages(instruct):
    model, tokenizer = load_checkpoint(str(instruct))
    tokenizer.chat_template = NO_SYSTEM
    special = tokens_for_chat(tokenizer)
    context = fitted_context(model, tokenizer.encode_persona(PERSONA), [tokenizer.encode("hello")], special, 20)
    assert tokenizer.decode(context.ids) == "[user] i have two dogs .\ni like tea .\n\nhello<|im_end|>[assistant]"
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match="own chat template refuses the conversation .*never.*train the model first"):
        tokens_for_chat(tokenizer)


def test_scripts_and_server_use_the_template(instruct, tmp_path):
    chat = script("interact.py", "--model_checkpoint", instruct, "--personality", PERSONA[0], "--no_sample",
                  stdin="hello\n", cwd=tmp_path)
    assert "replies use its own chat template" in script.stderr
    bot = Bot(demo.parse_args(["--model_checkpoint", str(instruct), "--device", "cpu", "--no_sample"]))
    context = bot.context(PERSONA[:1], ["hello"], bot.options())
    reply = bot.decoder.submit(context, bot.options())
    while not reply.finish:
        time.sleep(0.01)
    bot.decoder.close()
    assert " ".join(bot.text(reply).split()) == " ".join(chat.splitlines()[2].split())
    for kind in ("hits@1", "ppl", "all"):
        line = error_line("convai_evaluation.py", "--eval_type", kind, "--model_checkpoint", instruct,
                          "--dataset_path", SAMPLE, cwd=tmp_path)
        assert f"--eval_type {kind}: " in line and "--eval_type f1" in line
    script("convai_evaluation.py", "--eval_type", "f1", "--model_checkpoint", instruct, "--dataset_path", SAMPLE,
           "--max_length", 3, "--no_sample", "--predictions", "p.jsonl", cwd=tmp_path)
    replies = [json.loads(line)["reply"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(replies) > 10 and not any("<|" in reply for reply in replies)
