"""Test the page in a real browser, as people use it, with one server from the command line and one Chromium."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch
from conftest import ROOT, SAMPLE, TINY_TOKENS, make_checkpoint

import example_entry
from corpora import read_corpus
from feedback.answers import read_answers
from feedback.pairs import read_pairs
from feedback.ratings import read_ratings
from model import PostNormConfig, PostNormDoubleHeadsModel
from weights import save_model

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
QUIETLY = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]
WAIT = 120_000  # ms; only a broken page takes this long
PEOPLE = [entry["personality"] for split in read_corpus(SAMPLE).values() for entry in split]
SENTENCES = {sentence for person in PEOPLE for sentence in person}
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


class Server:
    """A server with random weights whose replies are as long as allowed; it keeps what visitors prefer."""

    def __init__(self, folder):
        self.folder, self.port = folder, 0
        make_checkpoint(folder / "parrot", n_embd=32, n_head=2, vocab_size=TINY_TOKENS + 5, n_positions=1024,
                        initializer_range=0.3)
        torch.manual_seed(5)
        config = PostNormConfig.from_pretrained(folder / "parrot", num_labels=1)
        save_model(PostNormDoubleHeadsModel(config), folder / "parrot")
        self.collected, self.log = folder / "collected", folder / "log"
        self.start()
        self.port = int(self.address.rpartition(":")[2])

    def start(self) -> None:
        with open(self.log, "a") as output:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "demo.py", "--model_checkpoint", self.folder / "parrot",
                 "--dataset_path", SAMPLE, "--port", str(self.port),
                 "--min_length", "100", "--device", "cpu", "--collect", self.collected],
                cwd=self.folder, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"})
        begun, told = time.monotonic(), self.log.read_text().count("Open ")
        while self.log.read_text().count("Open ") == told:
            assert self.process.poll() is None and time.monotonic() - begun < WAIT / 1000, self.log.read_text()
            time.sleep(0.1)
        self.address = re.findall(r"Open (http://\S+) in a browser", self.log.read_text())[-1]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("page"))
    yield server
    server.process.terminate()
    server.process.wait()
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


@pytest.fixture(scope="module")
def address(server):
    return server.address


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIETLY)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Yield a function that opens an address in a fresh browser context; fail on foreign requests and on errors."""
    contexts, complaints = [], []

    def complain(text: str) -> None:
        if "AbortError" not in text and "Connection errored out" not in text:  # from Gradio, when a page is closed
            complaints.append(text)

    def open_page(where: str = address, **settings):
        context = chromium.new_context(**{"viewport": DESKTOP} | settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        playwright.expect.set_options(timeout=WAIT)
        page.on("request", lambda request: request.url.startswith((address, "data:", "blob:"))
                or complaints.append(f"asks {request.url}"))
        page.on("console", lambda message: message.type == "error" and complain(message.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(where)
        playwright.expect(page.locator("#cards textarea").first).not_to_have_value("")
        playwright.expect(page.locator("#cards")).to_be_visible()
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def expect(what):
    return playwright.expect(what)


def box(page):
    return page.locator("#message textarea")


def say(page, text: str) -> None:
    """Write a message, press Enter, and wait for the whole reply."""
    replies = page.locator("#chat .bot-row").count()
    box(page).fill(text)
    box(page).press("Enter")
    ready(page, replies + 1)


def ready(page, replies: int) -> None:
    """Wait until there are this many replies and nothing is in progress."""
    expect(page.locator("#chat .bot-row")).to_have_count(replies)
    expect(page.locator("#message .submit-button")).to_be_visible()
    expect(page.locator("body.busy")).to_have_count(0)


def said(page) -> list[str]:
    """Return the conversation as people see it, without surrounding spaces and an invisible mark."""
    texts = page.locator("#chat .message-content").all_text_contents()
    return [text.replace("\u2060", "").strip() for text in texts]


def cards(page) -> list[str]:
    values = [card.input_value() for card in page.locator("#cards textarea").all()]
    return [line.strip() for value in values for line in value.splitlines() if line.strip()]


def press(page, name: str) -> None:
    page.locator("#chat").get_by_role("button", name=name, exact=True).last.click()


def menu(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


# ------------------------------------------------------------------------------------------------------------- a visit


def test_a_visit(visit, tmp_path):
    page = visit()
    assert cards(page) in PEOPLE and page.locator("#cards textarea").count() == 5
    before = cards(page)
    menu(page, "Shuffle")
    page.wait_for_function("before => JSON.stringify([...document.querySelectorAll('#cards textarea')].map(one => "
                           "one.value).filter(Boolean)) !== before", arg=json.dumps(before, separators=(",", ":")))
    assert set(cards(page)) <= SENTENCES
    for number, text in enumerate(["i keep bees .", "  i like <b>tea</b> .  ", "", "", "one .\n\n two ."]):
        page.locator("#cards textarea").nth(number).fill(text)

    script = "<script>alert(1)</script> &lt; *star* it's"
    say(page, "hello !")
    say(page, script)
    chips = page.locator("#chips button")
    expect(chips.first).to_be_visible()
    suggestions = chips.all_text_contents()
    assert 1 <= len(suggestions) <= 3 and not set(suggestions) & set(said(page))
    chips.first.click()
    expect(box(page)).to_have_value(suggestions[0])
    expect(box(page)).to_be_focused()
    say(page, suggestions[0])
    conversation = said(page)
    assert conversation[::2] == ["hello !", script, suggestions[0]] and all(conversation) and len(conversation) == 6
    assert page.locator("#chat script, #chat .message-content b").count() == 0

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    menu(page, "Share")
    expect(page.locator("#notice")).to_contain_text("address is copied")
    shared = page.evaluate("navigator.clipboard.readText()")
    assert shared == page.url and "#" in shared
    say(page, "one more")
    page.wait_for_function("before => location.href !== before", arg=shared)  # the address follows the conversation
    other = visit(shared)
    expect(other.locator("#chat .bot-row")).to_have_count(3)
    personality = ["i keep bees .", "i like <b>tea</b> .", "one .", "two ."]
    assert said(other) == conversation and cards(other) == personality
    say(other, "and you ?")  # the conversation continues

    with other.expect_download() as download:
        menu(other, "Export")
    download.value.save_as(tmp_path / "conversation.json")
    example_entry.describe(str(tmp_path / "conversation.json"))
    entry = json.loads((tmp_path / "conversation.json").read_text())["valid"][0]
    assert entry["personality"] == personality
    assert entry["utterances"][2] == {"history": conversation[:5], "candidates": [conversation[5]]}
    assert entry["utterances"][3]["history"] == [*conversation, "and you ?"]


def test_a_message_is_taken_back_answered_anew_changed_and_copied(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "one")
    say(page, "two <i>")
    first = said(page)
    last_reply = "document.querySelectorAll('#chat .bot-row')[1]?.innerText"
    before = page.evaluate(last_reply)
    press(page, "Retry")
    page.wait_for_function(f"before => {last_reply} !== before", arg=before)
    ready(page, 2)
    anew = said(page)
    assert anew[:3] == first[:3] and anew[3] != first[3]

    press(page, "Undo")
    expect(page.locator("#chat .bot-row")).to_have_count(1)
    expect(box(page)).to_have_value("two <i>")
    expect(box(page)).to_be_focused()
    assert said(page) == first[:2]
    say(page, "two <i>")

    page.locator("#chat .message-buttons-right").last.get_by_role("button", name="Edit").click()
    page.locator("#chat .edit-textarea").fill("three & more")
    press(page, "Submit")
    page.wait_for_function("document.querySelectorAll('#chat .user-row')[1]?.innerText.includes('three')")
    ready(page, 2)
    assert said(page)[2] == "three & more" and said(page)[:2] == first[:2] and len(said(page)) == 4
    page.locator("#chat .message-buttons-right").last.get_by_role("button", name="Copy message").click()
    page.wait_for_function("async () => await navigator.clipboard.readText() === 'three & more'")

    press(page, "Clear")
    expect(page.locator("#chat .message-row")).to_have_count(0)
    menu(page, "Put it back")
    expect(page.locator("#chat .bot-row")).to_have_count(2)


def test_stop_ends_the_reply_and_enter_is_never_lost(visit):
    page = visit()
    page.get_by_role("button", name="Decoding options").click()
    page.get_by_label("number input for Longest reply").fill("100")
    say(page, "first")
    box(page).fill("second")
    box(page).press("Enter")
    expect(page.locator("#message .submit-button")).to_have_count(0)
    box(page).press_sequentially("third")
    box(page).press("Enter")  # during a reply; it is sent after the reply
    ready(page, 3)
    assert said(page)[::2] == ["first", "second", "third"]
    box(page).press("ArrowUp")
    box(page).press("ArrowUp")
    expect(box(page)).to_have_value("second")
    box(page).press("ArrowDown")
    expect(box(page)).to_have_value("third")
    box(page).press("ArrowDown")
    expect(box(page)).to_have_value("")

    box(page).fill("fourth")
    box(page).press("Enter")
    page.wait_for_function("""() => {  // in the page, because the reply may be over before the driver's click arrives
        const stop = document.querySelector("[data-testid=stop-button]");
        if (!stop || document.querySelectorAll("#chat .bot-row").length !== 4) return false;
        stop.click();
        return true;
    }""")
    ready(page, 4)
    page.wait_for_timeout(200)
    whole = said(page)
    page.wait_for_timeout(300)
    assert said(page) == whole and whole[6] == "fourth"


def test_conversations_are_kept_in_the_browser(visit):
    page = visit()
    box(page).fill("a draft")
    page.reload()
    expect(box(page)).to_have_value("a draft")
    say(page, "the first one")
    before, person = said(page), cards(page)
    page.reload()
    expect(page.locator("#chat .bot-row")).to_have_count(1)
    assert said(page) == before and cards(page) == person
    menu(page, "Random")  # begins another conversation
    expect(page.locator("#chat .message-row")).to_have_count(0)
    expect(page.locator("#notice")).to_contain_text("new conversation")
    say(page, "the second one")
    names = page.locator("#conversations .open")
    expect(names).to_have_text(["the second one", "the first one"])
    names.nth(1).click()
    expect(page.locator("#chat .bot-row")).to_have_count(1)
    page.wait_for_function("text => document.querySelector('#chat').innerText.includes(text)", arg=before[0])
    assert said(page) == before and cards(page) == person
    page.get_by_role("button", name="Rename: the second one").click()
    page.get_by_label("Name of the conversation").fill("<b>other</b>")
    page.keyboard.press("Enter")
    expect(names).to_contain_text(["the first one", "<b>other</b>"])
    page.get_by_role("button", name="Delete: the first one").click()
    expect(names).to_have_text(["<b>other</b>"])
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator("#conversations .open")).to_have_text(["<b>other</b>"])
    expect(other.locator("#chat .message-row")).to_have_count(0)


# --------------------------------------------------------------------------------------------- layout and accessibility


SHIFTS = """() => { window.shifts = []; window.away = 0;
    // "What the model sees" shows another reply each time, and may.
    const inside = node => (node?.closest ? node : node?.parentElement)?.closest("#seen");
    new PerformanceObserver(list => window.shifts.push(...list.getEntries()
        .filter(one => one.value > 1e-4 && !one.sources.every(source => inside(source.node)))
        .map(one => [one.value, one.sources.map(source => source.node?.id || source.node?.className)])))
        .observe({type: "layout-shift", buffered: true});
    const look = () => { const place = document.querySelector("#message textarea").getBoundingClientRect();
        window.away += !(place.top >= 0 && place.bottom <= innerHeight && place.right <= innerWidth);
        requestAnimationFrame(look); };
    look(); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_lies_still_and_is_usable(visit, device, scheme):
    phone = device is PHONE
    page = visit(viewport=device, color_scheme=scheme, has_touch=phone, is_mobile=phone)
    page.evaluate(SHIFTS)
    for text in ("hello", "and you ?", "i see", "do you like tea ?"):
        say(page, text)
        expect(page.locator("#chips button").first).to_be_visible()
    assert page.evaluate("window.shifts") == [] and page.evaluate("window.away") == 0
    width, height = device["width"], device["height"]
    whole = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert whole == [width, height]
    areas = {name: (place := page.locator(name).bounding_box())["width"] * place["height"]
             for name in ("#chat", "#cards", "#chips", "#message", "#top")}
    assert max(areas, key=areas.get) == "#chat" and areas["#chat"] > 0.3 * width * height
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number)")
    assert (sum(shade) < 200) == (scheme == "dark"), shade

    states = [lambda: None, lambda: page.get_by_role("button", name="Menu").click(),
              lambda: (page.keyboard.press("Escape"), page.get_by_role("button", name="Inside").click())]
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for prepare in states if phone else states[:1]:
        prepare()
        if phone:
            small = page.evaluate("""() => [...document.querySelectorAll("button, a, input, textarea, [role=slider]")]
                .filter(one => one.checkVisibility({visibilityProperty: true}) && !one.matches(".token, [type=range]"))
                .map(one => [one.closest("label") ?? one, one]).map(([one, own]) => [one.getBoundingClientRect(), own])
                .filter(([place]) => place.width && (place.width < 43.9 || place.height < 43.9))
                .map(([place, one]) => [place.width, place.height, one.outerHTML.slice(0, 200)])""")
            assert not small, small
        if not phone or prepare is states[-1]:
            expect(page.locator("#seen table tbody tr").first).to_be_visible()
        found = axe.run(page).response["violations"]
        serious = [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found
                   if one["impact"] in ("serious", "critical")]
        assert not serious, serious


def test_the_theme_is_switched_and_kept(visit):
    page = visit(color_scheme="light")
    page.get_by_role("button", name="Dark colours").click()
    page.reload()
    expect(page.get_by_role("button", name="Light colours")).to_be_visible()
    assert page.evaluate("document.body.classList.contains('dark')")


def test_with_the_keyboard_alone(visit):
    page = visit()
    page.locator("#cards textarea").first.focus()
    names = []
    for _ in range(24):
        page.keyboard.press("Tab")
        names.append(page.evaluate("""() => { const one = document.activeElement; return one.closest("#message") ?
            "message" : (one.innerText || one.ariaLabel || "?").trim() }"""))
    wanted = ["Random", "Shuffle", "Your personality", "Decoding options", "New", "Share", "message"]
    places = [next((place for place, name in enumerate(names) if name.startswith(want)), None) for want in wanted]
    assert None not in places and places == sorted(places), names
    page.locator("#chips button").first.focus()
    page.keyboard.press("Enter")
    expect(box(page)).to_be_focused()
    page.keyboard.press("Enter")
    ready(page, 1)
    assert page.get_by_role("log", name="chatbot conversation").get_attribute("aria-live") == "polite"
    assert page.evaluate("document.documentElement.lang") == "en"


# ------------------------------------------------------------------------------------------- comparing, seeing inside


def test_comparing_and_rating_are_said_and_kept_as_feedback_reads_them(visit, server):
    page = visit()
    expect(page.locator("#top")).to_contain_text("kept for research")
    say(page, "hello")
    page.locator("#chat").get_by_role("button", name="Like", exact=True).click()
    expect(page.locator("#notice")).to_contain_text("rating is kept")
    page.get_by_label("Compare two replies").check()
    box(page).fill("which one ?")
    box(page).press("Enter")
    options = page.locator("#chat .option")
    expect(options).to_have_count(4)
    texts = options.all_text_contents()
    box(page).fill("too early")
    box(page).press("Enter")
    expect(page.locator("#notice")).to_contain_text("Choose one")
    expect(box(page)).to_have_value("too early")
    first, second = (options.nth(number).bounding_box() for number in (0, 1))
    assert first["y"] == second["y"] and first["x"] < second["x"]  # side by side
    options.nth(1).click()
    ready(page, 2)
    assert said(page)[3] == texts[1].strip()

    rating = read_ratings(server.collected / "ratings.jsonl")[-1]
    assert (rating.persona, rating.history, rating.reply) == (cards(page), ["hello"], said(page)[1])
    assert list(rating.ratings.values()) == [[1.0]]
    pairs = read_pairs(server.collected / "pairs.jsonl")
    name, pair = list(pairs.items())[-1]
    assert pair["persona"] == cards(page) and pair["history"] == said(page)[:3]
    assert [reply["text"] for reply in pair["replies"]] == texts[:2]
    (_, answered), answer = list(read_answers([server.collected / "answers.jsonl"], pairs).items())[-1]
    assert answered == name and answer["choice"] == 1


def test_what_the_model_sees(visit):
    page = visit()
    for number, text in enumerate(["i like sushi .", "i am old .", "", "", ""]):
        page.locator("#cards textarea").nth(number).fill(text)
    say(page, "hello <eos> !")
    seen = page.locator("#seen .seen")
    expect(seen.locator("tbody tr").first).to_be_visible()
    rows = seen.locator("li").all()
    assert [row.get_attribute("class") for row in rows] == ["persona", "user", "bot"]
    tokens = [[re.sub(r"\d+$", "", token) for token in row.locator(".token").all_inner_texts()] for row in rows]
    assert tokens[0] == ["<bos>", "i", "like", "sushi", ".", "i", "am", "old", "."]
    assert tokens[1][:2] == ["<speaker2>", "hello"] and "<eos>" not in tokens[1] and tokens[1][-1] == "!"
    assert tokens[2][0] == "<speaker1>" and len(tokens[2]) == 21
    positions = [int(number) for number in seen.locator("sub").all_inner_texts()]
    assert positions == list(range(sum(map(len, tokens))))
    assert re.search(r"gives this reply -?[\d.]+ and 9 replies .*: number \d+ of 10", seen.inner_text())
    token = seen.locator("button.token").nth(4)
    token.hover()
    expect(token).to_have_attribute("aria-pressed", "true")
    before, after = ([float(cell.rstrip("%")) for cell in seen.locator(f"td:nth-of-type({column})").all_inner_texts()
                      if cell.endswith("%")] for column in (1, 2))
    assert before[:8] == sorted(before[:8], reverse=True) and len(before) == len(after) >= 8
    assert 0 < sum(before) <= 100.5 and 0 < sum(after) <= 100.5
    expect(seen.locator("tr[aria-current] th")).to_have_text(tokens[2][5])
    shares = page.evaluate("[...document.querySelectorAll('#seen .sentence')].map(one => "
                           "Number(one.style.getPropertyValue('--share')))")
    assert len(shares) == 2 and abs(sum(shares) - 1) < 0.01
    expect(seen.locator(".draws")).to_contain_text("of its attention goes to the personality")


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_mistakes_are_told_and_cost_nothing(visit, address):
    page = visit(f"{address}/#nonsense")
    expect(page.get_by_text("copy it again, whole")).to_be_visible()
    menu(page, "Export")
    expect(page.get_by_text("nothing to export yet")).to_be_visible()
    page.get_by_role("button", name="Decoding options").click()
    page.wait_for_timeout(1500)  # Gradio shows the options when they are opened, and then writes their values again
    page.get_by_label("Seed").fill("99999999999999999999")
    box(page).fill("hello")
    box(page).press("Enter")
    expect(page.get_by_text(re.compile("seed: .* is not a whole number from 0"))).to_be_visible()
    expect(box(page)).to_have_value("hello")
    expect(page.locator("#chat .message-row")).to_have_count(0)
    page.get_by_label("Seed").fill("1")
    say(page, "hello")
    page.get_by_label("Compare two replies").check()
    page.get_by_label("number input for Temperature").fill("0")
    expect(page.get_by_label("range slider for Temperature")).to_have_value("0")  # only then, Gradio will send it
    box(page).fill("which ?")
    box(page).press("Enter")
    expect(page.get_by_text("both replies are the same")).to_be_visible()
    expect(box(page)).to_have_value("which ?")
    visit.complaints.clear()  # the browser logs the refusals


def test_a_shared_address_that_is_damaged_or_a_bomb_is_refused(visit, address):
    import base64
    import zlib

    def packed(conversation: object) -> str:
        text = zlib.compress(json.dumps(conversation).encode(), 9)
        return base64.urlsafe_b64encode(text).decode().rstrip("=")

    whole = packed({"personality": ["i like tea ."], "own": [], "said": ["hello", "hi"]})
    bomb = packed({"personality": [], "own": [], "said": ["a" * 50_000_000]})
    page = visit()
    for fragment in (whole[:-5], whole[5:], "x", "%", "é", "eNoDAAAAAAE", packed([1]), bomb):
        page.goto("about:blank")
        page.goto(f"{address}/#{fragment}")
        expect(page.get_by_text("copy it again, whole")).to_be_visible()
    page.goto("about:blank")
    page.goto(f"{address}/#{whole}")
    expect(page.locator("#chat .bot-row")).to_have_count(1)
    assert said(page) == ["hello", "hi"] and cards(page) == ["i like tea ."]


def test_a_lost_server_is_noticed_and_comes_back(visit, server):
    page = visit()
    say(page, "hello")
    conversation = said(page)
    server.end()
    box(page).fill("are you there ?")
    box(page).press("Enter")
    expect(page.locator("#notice")).to_contain_text("cannot be reached")
    expect(box(page)).to_have_value("are you there ?")
    expect(page.locator("#message .stop-button")).to_be_hidden()
    with socket.socket() as free:  # check that the port is free again
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", server.port))
    server.start()
    expect(page.locator("#notice")).to_contain_text("is back")
    expect(box(page)).to_be_focused()
    box(page).press("Enter")
    ready(page, 2)
    assert said(page)[:3] == [*conversation, "are you there ?"]
    assert httpx.get(f"{server.address}/healthz").json()["status"] == "ok"
    visit.complaints.clear()  # the browser logs the lost connection
