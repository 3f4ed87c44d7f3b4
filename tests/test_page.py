"""The page in a real browser, as people use it: one server, started from the command line, and one Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import httpx
import pytest
import torch
from conftest import ROOT, SAMPLE, TINY_TOKENS, make_checkpoint

import example_entry
from corpora import read_corpus
from model import PostNormConfig, PostNormDoubleHeadsModel
from weights import save_model

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
QUIETLY = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]
WAIT = 240_000  # ms; only a broken page ever takes as long
PEOPLE = [entry["personality"] for split in read_corpus(SAMPLE).values() for entry in split]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of random weights, whose replies are as long as they may be."""
    work = tmp_path_factory.mktemp("page")
    folder = make_checkpoint(work / "parrot", n_embd=32, n_head=2, vocab_size=TINY_TOKENS + 5, n_positions=1024,
                             initializer_range=0.3)
    torch.manual_seed(5)
    save_model(PostNormDoubleHeadsModel(PostNormConfig.from_pretrained(folder, num_labels=1)), folder)
    log = work / "log"
    with open(log, "w") as output:
        server = subprocess.Popen(
            [sys.executable, ROOT / "demo.py", "--model_checkpoint", folder, "--dataset_path", SAMPLE, "--port", "0",
             "--min_length", "100", "--device", "cpu"], cwd=work, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"})
    try:
        start = time.monotonic()
        while not (found := re.search(r"Open (http://\S+) in a browser", log.read_text())):
            assert server.poll() is None and time.monotonic() - start < WAIT / 1000, log.read_text()
            time.sleep(0.1)
        yield found[1]
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIETLY)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens an address in a fresh browser context, and sees to it that nothing comes from elsewhere or goes wrong."""
    contexts, complaints = [], []

    def open_page(where: str = address, **settings):
        context = chromium.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        playwright.expect.set_options(timeout=WAIT)
        page.on("request", lambda request: request.url.startswith((address, "data:", "blob:"))
                or complaints.append(f"asks {request.url}"))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(where)
        playwright.expect(page.locator("#persona textarea")).not_to_have_value("")
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def say(page, text: str) -> None:
    """Write it, press Enter, and wait for the whole reply and the suggestion after it."""
    turns = page.locator("#chat .bot.message").count()
    box = page.locator("#message textarea")
    box.fill(text)
    box.press("Enter")
    playwright.expect(page.locator("#chat .bot.message")).to_have_count(turns + 1)
    playwright.expect(page.locator("#suggestion")).to_be_enabled()


def open_drawer(page, name: str) -> None:
    """Gradio gives a drawer's fields their first values one or two frames after it has drawn them: before, nobody can
    be as quick as to write there, but we are."""
    page.get_by_role("button", name=name).click()
    page.evaluate("""async () => {
        for (let frame = 0; frame < 6; frame++) await new Promise(requestAnimationFrame)
    }""")


def said(page) -> list[str]:
    """The conversation, as people see it, but for spaces that the page draws as one."""
    return [text.strip() for text in page.locator("#chat .message-content").all_text_contents()]


def test_a_visit(visit, tmp_path):
    page = visit()
    persona, box = page.locator("#persona textarea"), page.locator("#message textarea")
    assert persona.input_value().splitlines() in PEOPLE
    page.get_by_role("button", name="Random", exact=True).click()
    sentences = {sentence for person in PEOPLE for sentence in person}
    before = persona.input_value()
    page.get_by_role("button", name="Shuffle").click()
    playwright.expect(persona).not_to_have_value(before)
    assert set(persona.input_value().splitlines()) <= sentences
    persona.fill("i keep bees .\n\n  i like <b>tea</b> .  ")
    page.get_by_role("button", name="Start chatting").click()
    playwright.expect(box).to_be_focused()

    script = "<script>alert(1)</script> &lt; *star* it's"
    say(page, "hello !")
    say(page, script)
    suggestion = page.locator("#suggestion").text_content().strip().removeprefix("Suggestion: ")
    page.locator("#suggestion").click()
    playwright.expect(box).to_have_value(suggestion)
    playwright.expect(box).to_be_focused()
    say(page, suggestion)
    conversation = said(page)
    assert conversation[::2] == ["hello !", script, suggestion] and all(conversation) and len(conversation) == 6

    page.get_by_role("button", name="Share").click()
    shared = page.locator("#address textarea")
    playwright.expect(shared).to_have_value(re.compile("^http://.*#."))
    other = visit(shared.input_value())
    playwright.expect(other.locator("#persona textarea")).to_have_value("i keep bees .\ni like <b>tea</b> .")
    playwright.expect(other.locator("#chat .bot.message")).to_have_count(3)
    assert said(other) == conversation
    say(other, "and you ?")  # it goes on

    with other.expect_download() as download:
        other.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "conversation.json")
    example_entry.describe(str(tmp_path / "conversation.json"))
    entry = json.loads((tmp_path / "conversation.json").read_text())["valid"][0]
    assert entry["personality"] == ["i keep bees .", "i like <b>tea</b> ."]
    assert entry["utterances"][2] == {"history": conversation[:5], "candidates": [conversation[5]]}
    assert entry["utterances"][3]["history"] == [*conversation, "and you ?"]
    assert len(page.locator("#chat script").all()) == 0


def test_what_is_written_during_a_reply_is_kept_and_old_suggestions_are_not(visit, address):
    page = visit()
    open_drawer(page, "Your personality")
    page.locator("#own textarea").fill("i like rain .")
    open_drawer(page, "Decoding options")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("number input for Longest reply").fill("90")
    box, send = page.locator("#message textarea"), page.get_by_role("button", name="Send")
    box.fill("first")
    box.press("Enter")
    playwright.expect(box).to_have_value("")
    box.press_sequentially("second")
    box.press("Enter")  # stays in the box while the reply is coming; if that was quicker, it is the next message
    playwright.expect(page.locator("#chat .user.message").first).to_be_visible()
    while box.input_value():
        assert box.input_value() == "second"
        send.click()
    playwright.expect(page.locator("#chat .bot.message")).to_have_count(2)
    playwright.expect(page.locator("#suggestion")).to_be_enabled()
    conversation = said(page)
    assert conversation[::2] == ["first", "second"]

    # The suggestion is what the model says to the last reply, as the user, to whom all the others were said.
    roles = ["assistant", "user"] * 2
    asked = {"messages": [{"role": "system", "content": "i like rain ."},
                          *({"role": role, "content": text} for role, text in zip(roles, conversation, strict=True))],
             "seed": 7, "max_tokens": 90}
    reply = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=WAIT).json()
    expected = reply["choices"][0]["message"]["content"]
    playwright.expect(page.locator("#suggestion")).to_have_text(f"Suggestion: {expected}")


def test_while_a_reply_comes_there_is_no_suggestion(visit):
    page = visit()
    say(page, "hello")
    page.evaluate("""() => {
        window.offered = [];
        new MutationObserver(() => {
            const replies = document.querySelectorAll("#chat .bot.message");
            window.offered[replies.length] ??= [];
            window.offered[replies.length].push(
                [!document.querySelector("#suggestion").disabled, replies[replies.length - 1]?.innerText]);
        }).observe(document.querySelector("#chat"), {childList: true, characterData: true, subtree: true});
    }""")
    for turn in range(2, 14):
        say(page, "and you ?")
        offered = page.evaluate(f"window.offered[{turn}]")
        # Before the server's first word there is a message without text; a fast reply may come with its suggestion.
        whole = offered[-1][1]
        assert len(offered) > 1 and whole and all(text in ("", whole) for now, text in offered if now), offered


def test_what_the_model_sees(visit):
    page = visit()
    page.locator("#persona textarea").fill("i like sushi .")
    open_drawer(page, "What the model sees")
    say(page, "hello <eos> !")
    seen = page.locator("#seen .seen")
    rows = seen.locator("li").all()
    assert [row.get_attribute("class") for row in rows] == ["persona", "user", "bot"]
    tokens = [[re.sub(r"\d+$", "", token) for token in row.locator(".token").all_inner_texts()] for row in rows]
    assert tokens[0] == ["<bos>", "i", "like", "sushi", "."]
    assert tokens[1][:2] == ["<speaker2>", "hello"] and "<eos>" not in tokens[1] and tokens[1][-1] == "!"
    assert tokens[2][0] == "<speaker1>" and len(tokens[2]) == 21
    positions = [int(number) for number in seen.locator("sub").all_inner_texts()]
    assert positions == list(range(sum(map(len, tokens))))
    before, after = ([float(cell.rstrip("%")) for cell in seen.locator(f"td:nth-of-type({column})").all_inner_texts()
                      if cell.endswith("%")] for column in (1, 2))
    assert before == sorted(before, reverse=True) and len(before) == len(after) == 10
    assert 0 < sum(before) <= 100.5 and 0 < sum(after) <= 100.5 and before != after


def test_with_the_keyboard_alone(visit):
    page = visit()
    page.locator("#persona textarea").focus()
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("""() => { const one = document.activeElement; return one.closest("#message") ?
            "message" : (one.innerText || one.ariaLabel || "?").trim() }"""))
    wanted = ["Random", "Shuffle", "Start chatting", "Your personality", "Decoding options", "message", "Send", "Share"]
    places = [next((place for place, name in enumerate(names) if name.startswith(want)), None) for want in wanted]
    assert None not in places and places == sorted(places), names
    page.get_by_role("button", name="Start chatting").focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#message textarea")).to_be_focused()
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#suggestion")).to_be_enabled()
    page.keyboard.press("Tab")
    playwright.expect(page.locator("#suggestion")).to_be_focused()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#message textarea")).to_be_focused()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#chat .bot.message")).to_have_count(2)


def test_what_a_screen_reader_finds(visit):
    page = visit()
    say(page, "hello")
    assert page.get_by_role("log", name="chatbot conversation").get_attribute("aria-live") == "polite"
    for name in ("The bot's personality, a sentence per line", "Your message"):
        assert page.get_by_role("textbox", name=name).is_visible()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, a, input, textarea")].filter(one =>
        one.offsetParent && !(one.innerText || one.ariaLabel || one.title || one.labels?.[0]?.innerText ||
        one.closest("label")?.innerText || one.getAttribute("aria-labelledby"))).map(one => one.outerHTML)""")
    assert not nameless
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(visit, scheme):
    page = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True, is_mobile=True)
    open_drawer(page, "What the model sees")
    say(page, "hello")
    page.get_by_role("button", name="Share").click()
    playwright.expect(page.locator("#address textarea")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number)")
    assert (sum(shade) < 200) == (scheme == "dark"), shade


def test_mistakes_are_told_and_cost_nothing(visit, address):
    page = visit(f"{address}/#nonsense")
    playwright.expect(page.get_by_text("copy it again, whole")).to_be_visible()
    page.get_by_role("button", name="Export").click()
    playwright.expect(page.get_by_text("Nothing to export yet")).to_be_visible()
    open_drawer(page, "Decoding options")
    page.get_by_label("Seed").fill("99999999999999999999")
    page.locator("#message textarea").fill("hello")
    page.locator("#message textarea").press("Enter")
    playwright.expect(page.get_by_text(re.compile("seed: .* is not a whole number from 0"))).to_be_visible()
    playwright.expect(page.locator("#message textarea")).to_have_value("hello")
    playwright.expect(page.locator("#chat .message")).to_have_count(0)
    page.get_by_label("Seed").fill("1")
    say(page, "hello")
    visit.complaints.clear()  # what the browser's own log says of the answers
