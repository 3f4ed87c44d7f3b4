"""Compare simultaneous conversations with each alone, and test the server over real sockets."""

import asyncio
import copy
import json
import random
import socket
import subprocess
import sys
import time

import gradio_client
import httpx
import openai
import pytest
import torch
import transformers
from conftest import FAMILIES, LONG, ROOT, WAIT
from starlette.responses import PlainTextResponse

import demo
from cli import InputError
from decoding import Decoding, decoded, generate_replies
from inputs import Specials, build_context
from model import DoubleHeadsModel, GPT2DoubleHeads, PostNormConfig, PostNormDoubleHeadsModel, decoder_class
from web import guard
from web.batching import Busy, Decoder
from web.bot import Bot


def until(condition, what: str) -> None:
    """Wait until ``condition()`` holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < WAIT, f"{what} did not happen"
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------------- the decoder


VOCABULARY = 60
SPECIAL = Specials(*range(VOCABULARY - 5, VOCABULARY))


def small_model(family: str, seed: int, history_start: int = 0) -> DoubleHeadsModel:
    """Make a model with random weights, large enough that replies differ and sometimes end early."""
    shape = dict(vocab_size=VOCABULARY, max_position_embeddings=8192, hidden_size=32, num_hidden_layers=2,
                 num_attention_heads=2, initializer_range=0.3, num_labels=1, history_start=history_start)
    torch.manual_seed(seed)
    if family == "gpt2":
        return GPT2DoubleHeads(transformers.GPT2Config(**shape)).eval()
    if family == "openai-gpt":
        return PostNormDoubleHeadsModel(PostNormConfig(**shape)).eval()
    window = {"qwen2": dict(use_sliding_window=True, sliding_window=20, max_window_layers=1),
              "mistral": dict(sliding_window=20),
              "gemma2": dict(sliding_window=20, head_dim=16)}.get(family, {})
    config = transformers.AutoConfig.for_model(
        family, **shape, **window, intermediate_size=48, num_key_value_heads=1, pad_token_id=0,
        speaker_ids=[SPECIAL.speaker1, SPECIAL.speaker2])
    model = decoder_class(type(config))(config)
    torch.nn.init.normal_(model.token_types.weight)
    return model.eval()


def asked(**changed) -> Decoding:
    return Decoding(**{"seed": 1} | changed)


def sentence(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY - 5) for _ in range(rng.randint(1, 15))]


OTHERS = ["llama", "qwen2", "mistral", "opt", "gpt_neox", "stablelm",  # stablelm's layers pass no arguments on
          "gemma2"]  # gemma2 does not use torch's attention


@pytest.mark.parametrize("in_rooms, history_start, family", [
    *((False, start, family) for start in (0, 80) for family in FAMILIES),
    *((False, 0, family) for family in OTHERS), *((True, 0, family) for family in ("openai-gpt", "qwen2", "gemma2"))])
def test_batched_replies_equal_single_replies(family, history_start, in_rooms, monkeypatch):
    """Compare replies of all kinds; ``in_rooms``: computed as on GPUs, but not recorded."""
    if in_rooms:
        monkeypatch.setattr("web.keyvalues.belongs_in_rooms", lambda model: True)
    rng, model = random.Random(7), small_model(family, 3, history_start)
    decoder = Decoder(model, SPECIAL, max_batch=10, max_waiting=100)
    requests, replies = [], []
    for number in range(1, 61):
        context = build_context([sentence(rng) for _ in range(rng.randint(0, 4))],
                                [sentence(rng) for _ in range(rng.randint(1, 5))], SPECIAL, history_start)
        args = asked(seed=number, max_length=rng.randint(1, 25), min_length=rng.choice([1, 6]),
                     no_sample=rng.random() < 0.3, temperature=rng.choice([0.7, 1.5]), top_k=rng.choice([0, 20]),
                     top_p=rng.choice([0.9, 0.0]), num_beams=rng.choice([1, 1, 1, 2, 4]),
                     length_penalty=rng.choice([0.0, 0.65, 1.5]), no_repeat_ngram_size=rng.choice([0, 0, 2]),
                     frequency_penalty=rng.choice([0, 0, 0.5]), presence_penalty=rng.choice([0, 0, -0.5]),
                     logit_bias=rng.choice([(), ((3, -100), (4, 2.5))]))
        requests.append((context, args))
        replies.append(decoder.submit(context, args))
        if rng.random() < 0.5:  # some requests arrive while others are decoded
            until(lambda: decoder.decoding or not decoder.waiting, "a start")
    until(lambda: all(reply.finish for reply in replies), "the end")
    decoder.close()
    for (context, args), reply in zip(requests, replies, strict=True):
        torch.manual_seed(args.seed)
        assert reply.tokens == generate_replies(model, [context], SPECIAL, args)[0], args
        assert reply.finish == ("length" if len(reply.tokens) == args.max_length else "stop")
    assert {reply.finish for reply in replies} == {"stop", "length"}


def test_batched_half_precision(family):
    """Compare a token's bfloat16 logits with float32: a batch must be about as exact as a row alone."""
    rng, model = random.Random(3), small_model(family, 2).to(torch.bfloat16)
    decoder = Decoder(model, SPECIAL)
    contexts = [build_context([sentence(rng)], [sentence(rng) for _ in range(rng.randint(1, 5))], SPECIAL)
                for _ in range(20)]
    replies = [decoder.submit(context, asked(max_length=1, no_sample=True)) for context in contexts]
    until(lambda: all(reply.finish for reply in replies), "the end")
    decoder.close()
    errors = torch.zeros(2)
    for context, reply in zip(contexts, replies, strict=True):
        row = dict(input_ids=torch.tensor([[*context.ids, SPECIAL.speaker1]]),
                   token_type_ids=torch.tensor([[*context.types, SPECIAL.speaker1]]),
                   position_ids=torch.arange(len(context.ids) + 1)[None], logits_to_keep=1)
        with torch.no_grad():
            alone, exact = (one(**row).logits[0, -1].float() for one in (model, copy.deepcopy(model).float()))
        errors += torch.stack([(logits - exact).square().mean().sqrt() for logits in (reply.last_step[0], alone)])
    assert 0 < errors[0] < 1.3 * errors[1]


def test_a_family_without_replaceable_attention_is_refused():
    with pytest.raises(InputError, match="'gptj' .* interact.py"):
        Decoder(small_model("gptj", 1), SPECIAL)


def test_long_replies_do_not_delay_short_ones():
    decoder = Decoder(small_model("gpt2", 1), SPECIAL)
    context = build_context([[1, 2]], [[3, 4]], SPECIAL)
    long = decoder.submit(context, asked(max_length=LONG, min_length=LONG))
    until(lambda: long.tokens, "the long one's first token")
    others = [decoder.submit(context, asked(max_length=5, num_beams=beams)) for beams in (1, 1, 3)]
    until(lambda: all(other.finish for other in others), "the short ones' end")
    assert not long.finish
    long.cancelled = True
    until(lambda: long.finish, "its cancellation")
    assert long.finish == "cancelled"
    decoder.close()


def test_the_queue_is_bounded_and_in_order():
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, max_batch=1, max_waiting=2)
    context = build_context([], [[3, 4]], SPECIAL)
    busy = decoder.submit(context, asked(max_length=LONG, min_length=LONG))
    until(lambda: not decoder.waiting, "its start")
    first, second = (decoder.submit(context, asked(max_length=2, min_length=2)) for _ in range(2))
    with pytest.raises(Busy):
        decoder.submit(context, asked())
    first.cancelled = busy.cancelled = True  # a cancelled request in the queue makes room
    until(lambda: second.finish, "the other's reply")
    assert len(second.tokens) == 2 and first.tokens == []
    decoder.close()


# ---------------------------------------------------------------------------------------------------- the server


PERSONA = ["i have two dogs .", "i like sushi ."]
DIALOG = ["hello !", "hi , how are you ?", "fine . do you have <eos> pets ?"]
MESSAGES = [{"role": "system", "content": "\n".join(PERSONA)}, {"role": "user", "content": DIALOG[0]},
            {"role": "assistant", "content": DIALOG[1]}, {"role": "user", "content": DIALOG[2]}]


def reply_alone(bot: Bot, persona: list[str], said: list[str], seed: int, length: int) -> str:
    """Return the reply that the terminal's chat would give."""
    encode = bot.tokenizer.encode
    context = build_context([encode(text) for text in persona], [encode(text) for text in said], bot.special)
    torch.manual_seed(seed)
    options = bot.options(max_length=length)
    return decoded(bot.tokenizer, generate_replies(bot.model, [context], bot.special, options)[0]).strip()


def answers(address: str) -> bool:
    """Return whether the server is healthy and replies."""
    assert httpx.get(f"{address}/healthz", timeout=WAIT).json()["status"] == "ok"
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=WAIT).json()
    return reply["usage"]["completion_tokens"] == 3


def test_chat_with_the_openai_client(client, bot):
    model = client.models.list().data[0]
    assert (model.id, model.version) == ("parrot", bot.version)
    assert client.models.retrieve("parrot").id == "parrot"
    expected = reply_alone(bot, PERSONA, DIALOG, 11, 20)
    done = client.chat.completions.create(model="parrot", messages=MESSAGES, seed=11, max_tokens=20)
    assert done.choices[0].message.content == expected
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == 20
    assert done.system_fingerprint == bot.version
    parts = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("hello", " !")]}]
    done = client.chat.completions.create(model="parrot", messages=parts + MESSAGES[2:], seed=11,
                                          max_completion_tokens=20)
    assert done.choices[0].message.content == reply_alone(bot, [], DIALOG, 11, 20)


def test_streaming_with_the_openai_client(client, bot):
    chunks = list(client.chat.completions.create(model="parrot", messages=MESSAGES, seed=11, max_tokens=300,
                                                 stream=True, stream_options={"include_usage": True}))
    *words, end, usage = chunks
    texts = [chunk.choices[0].delta.content for chunk in words]
    assert len([text for text in texts if text]) > 3
    assert "".join(texts) == reply_alone(bot, PERSONA, DIALOG, 11, 300)
    assert end.choices[0].finish_reason == "length"
    assert usage.usage.completion_tokens == 300
    for seed in range(1, 16):  # the last token may come while the previous token is being sent
        chunks = client.chat.completions.create(model="parrot", messages=MESSAGES, seed=seed, max_tokens=8, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == reply_alone(bot, PERSONA, DIALOG, seed, 8)


def test_errors_with_the_openai_client(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5' here, only 'parrot'"):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature: .* to 5") as refusal:
        client.chat.completions.create(model="parrot", messages=MESSAGES, temperature=9)
    assert refusal.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's"):
        client.chat.completions.create(model="parrot", messages=MESSAGES[:-1])


def test_options_and_greedy_decoding(client, bot):
    def ask(**options) -> str:
        return client.chat.completions.create(model="parrot", messages=MESSAGES, max_tokens=8, **options
                                              ).choices[0].message.content

    greedy = ask(temperature=0)
    assert greedy == ask(extra_body={"top_k": 1}) == ask(temperature=0, seed=9)
    assert len({ask() for _ in range(5)}) > 1  # replies differ without a seed
    assert ask(extra_body={"num_beams": 3}) == ask(extra_body={"num_beams": 3}, seed=4)


def test_gradios_own_interface(address, bot):
    client = gradio_client.Client(address, verbose=False)
    reply = client.predict(DIALOG[2], DIALOG[:2], PERSONA, 11, api_name="/chat")
    assert reply == reply_alone(bot, PERSONA, DIALOG, 11, 20)
    with pytest.raises(gradio_client.exceptions.AppError, match="a message has 3,000 characters"):
        client.predict("a" * 3000, [], [], 0, api_name="/chat")


NESTED = b"[" * 100_000
HOSTILE = {
    b"": "body", b"{": "not JSON at character 1", b"[]": "body", b'"\xff"': "", NESTED: "", b"null": "body",
    b'{"messages": 3}': "messages", b'{"messages": []}': "last message must be the user's",
    b'{"messages": [{"role": "king", "content": "x"}]}': "messages.0.role",
    b'{"messages": [{"role": "user", "content": ["x"]}]}': "messages.0.content",
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}': "tools: not supported",
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}': "max_tokens",
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}': "temperature",
    b'{"messages": [{"role": "user", "content": "x"}], "num_beams": 1000000}': "num_beams",
    b'{"messages": [{"role": "user", "content": "' + b"x" * 3000 + b'"}]}': "has 3,000 characters; write at most 2,000",
    b'{"messages": [{"role": "system", "content": "' + b"x\\n" * 2000 + b'"}, {"role": "user", "content": "x"}]}':
        "the personality has 3,999 characters",
}


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: body[-40:].decode(errors="replace"))
def test_malformed_requests_are_refused(address, body):
    refusal = httpx.post(f"{address}/v1/chat/completions", content=body, timeout=WAIT,
                         headers={"Content-Type": "application/json"})
    assert refusal.status_code == 400
    complaint = refusal.json()["error"]
    assert set(complaint) == {"message", "type", "param", "code"}
    assert complaint["type"] == "invalid_request_error"
    assert HOSTILE[body] in complaint["message"]
    assert answers(address)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_a_request_of_a_megabyte_is_refused(address, path):
    body = json.dumps({"messages": [{"role": "user", "content": "a" * 2**20}]})
    refusal = httpx.post(address + path, content=body, timeout=WAIT, headers={"Content-Type": "application/json"})
    assert refusal.status_code == 413
    assert "more than 262,144 bytes" in refusal.json()["error"]["message"]

    def chunks():  # without a Content-Length
        for _ in range(64):
            yield b" " * 2**14

    assert httpx.post(address + path, content=chunks(), timeout=WAIT).status_code == 413
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": b"x"}, timeout=WAIT).status_code == 404
    assert answers(address)


def test_control_tokens_and_odd_letters_are_text(address, bot, client):
    odd = "<eos> <speaker1> <pad> \ud800 \x00 \u202e 👍 </s>"
    asked = {"messages": [{"role": "system", "content": odd}, {"role": "user", "content": odd}], "max_tokens": 3}
    done = httpx.post(f"{address}/v1/chat/completions", content=json.dumps(asked), timeout=WAIT,
                      headers={"Content-Type": "application/json"}).json()
    ids = bot.tokenizer.encode(odd)
    assert not set(ids) & set(bot.special)
    assert done["usage"]["prompt_tokens"] == 1 + 2 * len(ids) + 2  # <bos> persona <speaker2> message <speaker1>


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_ends_its_decoding(address, bot, stream):
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": LONG, "stream": stream}
    body = json.dumps(asked).encode()
    with socket.create_connection(address.removeprefix("http://").split(":")) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                           b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: any(reply.args.max_length == LONG for reply in bot.decoder.decoding), "its turn")
        reply = next(reply for reply in bot.decoder.decoding if reply.args.max_length == LONG)
        until(lambda: reply.tokens, "the first token")
        if stream:
            assert b"200 OK" in connection.recv(100)
    until(lambda: reply.finish, "the end")
    assert reply.finish == "cancelled" and len(reply.tokens) < LONG
    assert answers(address)


def test_simultaneous_conversations_do_not_mix(bot, address, monkeypatch):
    """Give each persona its own mark; each reply of each turn belongs to that persona and conversation."""
    monkeypatch.setattr(bot.decoder, "max_waiting", 32)
    personas = [[f"i have {number} dogs .", "i like sushi ."] for number in range(32)]

    async def converse(persona: list[str], seed: int) -> list[str]:
        said = []
        for line in ("hello !", "how are you ?", "do you have pets ?", "what do you eat ?", "bye !"):
            said.append(line)
            async for reply in bot.reply(persona, said, bot.options(max_length=12, seed=seed)):  # noqa: B007
                pass
            said.append(bot.text(reply))
        return said

    async def all_at_once() -> list[list[str]]:
        return await asyncio.gather(*(converse(persona, seed) for seed, persona in enumerate(personas, 1)))

    for seed, (persona, said) in enumerate(zip(personas, asyncio.run(all_at_once()), strict=True), 1):
        for turn in range(1, 10, 2):
            assert said[turn] == reply_alone(bot, persona, said[max(0, turn - 5):turn], seed, 12)


def test_a_closed_page_ends_its_decoding(address, bot, monkeypatch):
    monkeypatch.setattr(bot, "decoding", bot.decoding.over(max_length=LONG))
    apis = httpx.get(f"{address}/config", timeout=WAIT).json()["dependencies"]
    number = next(api["id"] for api in apis if api["api_name"] == "chat")
    event = {"data": ["hello", [], [], 0], "fn_index": number, "session_hash": "somebody"}
    httpx.post(f"{address}/gradio_api/queue/join", json=event, timeout=WAIT).raise_for_status()
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=somebody", timeout=WAIT) as stream:
        next(line for line in stream.iter_lines() if "process_generating" in line)
        reply = next(reply for reply in bot.decoder.decoding if reply.args.max_length == LONG)
    until(lambda: reply.finish, "the end")
    assert reply.finish == "cancelled" and len(reply.tokens) < LONG
    assert answers(address)


def test_a_thousand_requests_at_once(address):
    """Send far more requests than may wait: late ones are refused with a message, and the others are answered."""
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}).encode()
    request = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
               b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def ask(few: asyncio.Semaphore) -> tuple[str, dict]:
        async with few:
            reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
            writer.write(request)
            head, _, answer = (await asyncio.wait_for(reader.read(), WAIT)).partition(b"\r\n\r\n")
            writer.close()
            return head.decode(), json.loads(answer)

    async def ask_all() -> list[tuple[str, dict]]:
        few = asyncio.Semaphore(250)  # sockets are scarce on some machines
        return await asyncio.gather(*(ask(few) for _ in range(1000)))

    responses = asyncio.run(ask_all())
    answered = [answer for head, answer in responses if head.startswith("HTTP/1.1 200")]
    refused = [answer["error"] for head, answer in responses if head.startswith("HTTP/1.1 503")]
    assert len(refused) + len(answered) == 1000
    assert refused and len(answered) >= 12  # at least four were decoded and eight waited
    assert {error["code"] for error in refused} == {"queue_full"}
    assert "try again in a moment" in refused[0]["message"]
    assert all(answer["usage"]["completion_tokens"] == 50 for answer in answered)
    assert answers(address)


def test_many_requests_of_one_address_wait_for_their_turn(monkeypatch):
    """Let an address send two expensive requests and three others per 2,000 s; further ones are refused."""

    async def answer(scope, receive, send) -> None:
        await PlainTextResponse("an answer", 400 if b"bad" in scope["query_string"] else 200)(scope, receive, send)

    monkeypatch.setattr(guard, "EXPENSIVE_PACE", (0.001, 2))
    monkeypatch.setattr(guard, "PACE", (0.001, 3))
    app = guard.Paced(answer, guard.Delays(asyncio.Event()))

    async def statuses(address: str, *paths: str) -> list[int]:
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answers = [await (client.post(path, json={}) if "join" in path else client.get(path)) for path in paths]
            late = [one.json()["error"]["code"] for one in answers if one.status_code == 429]
            assert set(late) <= {"rate_limit_exceeded"}
            return [one.status_code for one in answers]

    async def send_all() -> list[list[int]]:
        join, replies = "/gradio_api/queue/join", "/v1/chat/completions"
        return [await statuses("192.0.2.1", "/", join, join, "/config", "/healthz", "/v1/models", "/no", "/no"),
                await statuses("192.0.2.2", join), await statuses("2001:db8::1", "/", "/"),
                await statuses("2001:db8::2", "/"),  # of the same network
                await statuses("192.0.2.3", *[replies] * 5, *[f"{replies}?bad"] * 4, replies)]

    assert asyncio.run(send_all()) == [[200, 200, 429, 429, 200, 200, 200, 429], [200], [200, 200], [429],
                                       [*[200] * 5, *[400] * 3, 429, 429]]

    monkeypatch.setattr(guard, "LONGEST_WAIT", 2500)
    turns = guard.Turns(0.001, 2)
    assert [turns.wait("somebody") for _ in range(6)] == [
        0, 0, *(pytest.approx(wait, abs=10) for wait in (1000, 2000, 3000, 3000))]


@pytest.mark.parametrize("source, seen", [("127.9.9.9", "203.0.113.5"), ("127.0.0.1", "127.0.0.1")])
def test_only_a_known_proxy_is_believed_about_addresses(address, bot, monkeypatch, source, seen):
    clients, submit = [], bot.decoder.submit

    def note(context, args, client, *rest):
        clients.append(client.address)
        return submit(context, args, client, *rest)

    monkeypatch.setattr(bot.decoder, "submit", note)
    with httpx.Client(base_url=address, transport=httpx.HTTPTransport(local_address=source)) as client:
        client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1},
                    headers={"X-Forwarded-For": "203.0.113.5"}).raise_for_status()
    assert clients == [seen]


def test_missing_gradio_says_how_to_install_it():
    hidden = ("import runpy, sys; sys.modules['gradio'] = None; "
              f"runpy.run_path({str(ROOT / 'demo.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install -r requirements/web.txt" in done.stderr


def test_connections_do_not_hold_small_packets_back():
    """Accept a connection: without TCP_NODELAY, Nagle's algorithm would add 40 ms to nearly every answer."""
    async def accepted() -> int:
        option = asyncio.get_running_loop().create_future()
        with demo.listen("localhost", 0) as listening:
            server = await asyncio.start_server(lambda _, writer: option.set_result(writer.get_extra_info(
                "socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)), sock=listening)
            _, writer = await asyncio.open_connection(*listening.getsockname()[:2])
            async with server:
                try:
                    return await option
                finally:
                    writer.close()

    assert asyncio.run(accepted())


def test_unusable_ports_and_hosts_are_refused():
    with demo.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: another program uses this port; choose another"):
            demo.listen("127.0.0.1", port)
    with pytest.raises(InputError, match="--host 192.0.2.1: the server cannot listen there"):
        demo.listen("192.0.2.1", 0)
    with pytest.raises(SystemExit):
        demo.parse_args(["--port", "70000"])
    with pytest.raises(SystemExit):
        demo.parse_args(["--proxy", "proxy.example.org"])
