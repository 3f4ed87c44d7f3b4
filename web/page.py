"""The page: somebody's personality, the conversation, suggestions what to say next, and what the model sees.

The conversation lives in the browser (page.js), which sends it along with each message: `turn` answers it, and what the
page then shows beside it, suggestions and what the model saw, comes from events of their own. The server keeps of an
open page only what `Visit` says. The page loads nothing from elsewhere, and nothing that a browser sends makes it open
a file or an address. This file knows a `Bot` and a data set's personalities, and Gradio, which has the page; nothing of
HTTP.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from html import escape
from pathlib import Path

import gradio as gr

from cli import InputError
from tables import TokenTable
from web.batching import Busy, Client, Reply
from web.bot import MAX_TEXT, WIDEST, Bot
from web.collecting import Collector, Compared, Heard
from web.events import bounded_
from web.insight import Spoken, note_attention_, what_it_saw
from web.suggestions import Suggestions

CARDS = 5  # of a personality; what is longer stands in the last one
TRIES = 4  # to decode two replies that differ
OTHERS = 9  # replies of other dialogs with which the choice head compares the bot's
CHOICES = (0, 1, "tie", "bad")  # of feedback.annotate, in the order of the buttons
MOST_EVENTS, EVENT_SHARE = 200, 50  # replies to pages under way: all of them, those of one address

THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                          ).set(button_primary_background_fill="*primary_600",
                                button_primary_background_fill_hover="*primary_700",
                                button_primary_background_fill_dark="*primary_600",
                                button_primary_background_fill_hover_dark="*primary_700",
                                body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
                                block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
                                input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400")
# Not as Gradio's css, which it rewrites and adds only when the page is there, so that it would jump.
HEAD = "".join(f"<{tag}>{Path(__file__).with_name(name).read_text('utf-8')}</{tag}>"
               for tag, name in (("style", "page.css"), ("script", "page.js")))
TOP = """<header><h1>TransferTransfo</h1><p>Talk to a small language model that is whoever its five cards say.
<span>What it says is made up.</span>{collecting}</p><nav>
<button class=narrow-only data-drawer=rest aria-expanded=false>Menu</button>
<button class=narrow-only data-drawer=right aria-expanded=false>Inside</button>
<button id=theme data-act=theme aria-label="Other colours" title="Light or dark">◐</button></nav></header>"""
COLLECTING = " <b>Replies that you rate or compare are kept for research, with what was said before.</b>"
TOOLS = """<button class=small data-act=renew>New</button> <button class=small data-act=share>Share</button>
<button class=small data-act=download>Export</button>"""


class Visit:
    """What the server knows of an open page: what it was told, as hashes, its last reply, as token ids, and two replies
    that wait for a choice."""

    def __init__(self):
        self.over: asyncio.Event | None = None  # set when the current turn is over
        self.heard = Heard()
        self.spoken: Spoken | None = None
        self.compared: tuple[int, Compared] | None = None  # with the number of its turn

    def next_turn(self) -> asyncio.Event:
        """End the current turn and begin one. Returns the event that is set when it is over."""
        if self.over:
            self.over.set()
        self.over, self.compared = asyncio.Event(), None
        return self.over


def sentences(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def as_chat(said: list[str], options: list[str] | None = None) -> list[dict]:
    """Messages as Gradio's Chatbot has them, which takes texts for markup: a mark that nobody sees (U+2060) makes these
    letters text. page.js takes it out again. ``options``: what may be chosen instead of the last message."""
    chat: list[dict] = [{"role": ("user", "assistant")[number % 2],
                         "content": text.replace("&", "&\u2060").replace("<", "<\u2060")}
                        for number, text in enumerate(said)]
    if options:
        chat.append({"role": "assistant", "content": "Which reply is better?",
                     "options": [{"value": str(number), "label": text} for number, text in enumerate(options)]})
    return chat


def asked(text: str, *lists: str) -> dict:
    """What page.js sends: the number of the ``turn``, the ``conversation``'s name, ``persona``, ``said`` and more lists
    of texts. Raises `InputError` when that is not what it is."""
    try:
        sent = json.loads(text)
        texts = all(isinstance(sent[name], list) and all(isinstance(one, str) for one in sent[name])
                    for name in ("persona", "said", *lists))
        if texts and type(sent["turn"]) is int and isinstance(sent["conversation"], str):
            return sent
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError("The page sent what is no conversation; load it again")


async def until(over: asyncio.Event, replies: AsyncIterator[Reply]) -> AsyncIterator[Reply]:
    """Yield from ``replies`` until ``over`` is set."""
    ended = asyncio.ensure_future(over.wait())
    try:
        while not over.is_set():
            step = asyncio.ensure_future(anext(replies, None))
            await asyncio.wait((step, ended), return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                step.cancel()
                await asyncio.wait((step,))
                return
            if (reply := step.result()) is None:
                return
            yield reply
    finally:
        ended.cancel()


def build_page(bot: Bot, table: TokenTable, collector: Collector | None = None, pairing: str = "") -> gr.Blocks:
    """The page and its events. ``table``: whose personalities Random and Shuffle take; ``pairing``: what is to be said
    of model and data."""
    people = [] if bot.model.no_persona else [
        (split, dialog) for split in table.values() for dialog in range(len(split))
        if len(split.strings("persona", dialog))]
    note_attention_(bot.model)

    def somebody() -> list[str]:
        if not people:
            return []
        split, dialog = random.choice(people)
        return split.texts("persona", dialog)

    def always_somebody(name: str) -> list[str]:
        """The same personality for the same name."""
        if not people:
            return []
        split, dialog = random.Random(name).choice(people)
        return split.texts("persona", dialog)

    suggestions = Suggestions(bot, table, always_somebody)

    # ------------------------------------------------------------------------------------------------ what there is

    with gr.Blocks(title="TransferTransfo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(TOP.format(collecting=COLLECTING if collector else ""), elem_id="top")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="left"):
                gr.HTML("<h2>Who the bot is</h2>", elem_id="who")
                with gr.Column(elem_id="cards"):
                    for number in range(1, CARDS + 1):
                        gr.Textbox(label=f"Sentence {number} of the bot's personality", show_label=False,
                                   container=False, lines=2, max_lines=2, max_length=MAX_TEXT, interactive=True,
                                   placeholder="Another sentence about the bot", elem_classes="card")
                with gr.Row(elem_id="drawing"):
                    anybody = gr.Button("Random", size="sm", min_width=80, interactive=bool(people))
                    shuffle = gr.Button("Shuffle", size="sm", min_width=80, interactive=bool(people))
                with gr.Column(elem_id="rest"):
                    gr.HTML("<button class='small drawer-close' data-drawer=rest>Close</button>"
                            f"<div class='tools narrow-only'>{TOOLS}</div>", elem_classes="narrow-only")
                    with gr.Accordion("Your personality, for suggestions", open=False):
                        gr.Textbox(label="Who you are, a sentence per line; drawn by chance where it is empty",
                                   lines=3, max_lines=12, max_length=MAX_TEXT, elem_id="own", interactive=True)
                    compare = gr.Checkbox(False, label="Compare two replies", elem_id="compare",
                                          info="You see two replies to each message and say which is better.")
                    with gr.Accordion("Decoding options", open=False):
                        flags = bot.args
                        gr.Checkbox(True, label="Suggest what to say", elem_id="suggests", interactive=True)
                        temperature = gr.Slider(0, 5, 0 if flags.no_sample else min(flags.temperature, 5), step=0.05,
                                                label="Temperature", info="0: always the likeliest token")
                        top_k = gr.Slider(0, max(200, flags.top_k), max(flags.top_k, 0), step=1, label="Top k",
                                          info="0: off")
                        top_p = gr.Slider(0, 1, min(max(flags.top_p, 0), 1), step=0.05, label="Top p", info="0: off")
                        beams = gr.Slider(1, WIDEST, flags.num_beams, step=1, label="Beams",
                                          info="more than 1: beam search, no sampling")
                        length = gr.Slider(1, max(100, flags.max_length), flags.max_length, step=1,
                                           label="Longest reply, in tokens")
                        seed = gr.Number(flags.seed, precision=0, minimum=0, label="Seed", info="0: another each time")
                    gr.HTML(f"<p class=faint>Model <code>{escape(bot.name)}</code>, version <code>{bot.version}</code>."
                            f" {escape(pairing)} Programs talk to it at <code>/v1</code>.</p><h2>Conversations</h2>"
                            "<ul id=conversations></ul>")
            with gr.Column(elem_id="middle"):
                gr.HTML(f"<div class=tools><h2>The conversation</h2>{TOOLS}</div>", elem_classes="wide-only")
                gr.HTML("<div role=alert></div>", elem_id="notice")
                chat = gr.Chatbot(label="Conversation", show_label=False, height=None, render_markdown=False,
                                  elem_id="chat", buttons=["copy"], editable="user", group_consecutive_messages=False,
                                  placeholder="Say hello, or take a suggestion.", container=True)
                gr.HTML("<div id=chips role=group aria-label='Suggestions'></div>")
                message = gr.Textbox(label="Your message", show_label=False, container=False, lines=1, max_lines=4,
                                     placeholder="Your message", max_length=MAX_TEXT, elem_id="message",
                                     submit_btn="Send", stop_btn=False, interactive=True)
            with gr.Column(elem_id="right"):
                gr.HTML("<button class='small drawer-close' data-drawer=right>Close</button>"
                        "<h2>What the model sees</h2>")
                seen = gr.HTML("<p class=faint>Nothing yet: it shows how the model read the conversation, and each "
                               "token of the reply.</p>", elem_id="seen")
        hidden = {"visible": "hidden"}
        visit = gr.State(Visit())
        ask, show, halt, fail, hint, look = (gr.Button(name, elem_id=name, **hidden)
                                             for name in ("ask", "show", "halt", "fail", "hint", "look"))
        question, told, drawn, hinted, marked = (gr.Textbox(**hidden) for _ in range(5))

        # ---------------------------------------------------------------------------------------- what happens when

        async def turn(question_now, temperature_now, top_k_now, top_p_now, beams_now, length_now, seed_now,
                       compare_now, visit_now, request: gr.Request) -> AsyncIterator[dict]:
            """Answer. The last update tells the number of the turn and what was said, or what is wrong."""
            over = visit_now.next_turn()
            number = None
            try:
                sent = asked(question_now)
                number, personality, said = sent["turn"], sent["persona"], sent["said"]
                options = bot.options(temperature=temperature_now, top_k=top_k_now, top_p=top_p_now,
                                      num_beams=beams_now, max_length=length_now, seed=seed_now or 0)
                client = Client.at(request.client.host)
                if compare_now:
                    yield await two_replies(sent, options, client, over, visit_now)
                    return
                reply = None
                async with aclosing(bot.reply(personality, said, options, client)) as replies:
                    async for reply in until(over, replies):
                        yield {chat: as_chat([*said, bot.text(reply)])}
                text = bot.text(reply) if reply else ""
                if not text and not (reply and reply.finish):
                    yield {told: json.dumps({"turn": number, "error": "Stopped before the reply began."})}
                    return
                remember(visit_now, personality, [*said, text], reply.tokens, reply.finish == "stop", options)
                yield {chat: as_chat([*said, text]), told: json.dumps({"turn": number, "said": [*said, text]})}
            except (InputError, Busy, RuntimeError) as error:
                yield {told: json.dumps({"turn": number, "error": advice(error)})}
            finally:
                events.keep_open(request.session_hash)

        async def two_replies(sent, options, client, over, visit_now) -> dict:
            """Two replies that differ, for a choice."""
            personality, said = sent["persona"], sent["said"]
            if options.no_sample or options.num_beams > 1:
                raise InputError("Compare: without sampling both replies are the same; choose a temperature above 0 "
                                 "and 1 beam, or turn Compare off")

            async def one(number: int) -> Reply | None:
                its = replace(options, seed=options.seed + number if options.seed else 0)
                last = None
                async with aclosing(bot.reply(personality, said, its, client)) as replies:
                    async for last in until(over, replies):  # noqa: B007
                        pass
                return last if last and last.finish else None

            replies = list(await asyncio.gather(one(0), one(1)))
            for number in range(2, TRIES):
                if None not in replies and bot.text(replies[0]) == bot.text(replies[1]):
                    replies = [replies[0], await one(number)]
            if None in replies:
                return {told: json.dumps({"turn": sent["turn"], "error": "Stopped before both replies were there."})}
            texts = [bot.text(reply) for reply in replies]
            if texts[0] == texts[1]:
                remember(visit_now, personality, [*said, texts[0]], replies[0].tokens, replies[0].finish == "stop",
                         options)
                return {chat: as_chat([*said, texts[0]]), told: json.dumps(
                    {"turn": sent["turn"], "said": [*said, texts[0]],
                     "note": "Both replies say the same, so there is nothing to compare."})}
            visit_now.compared = sent["turn"], Compared(
                sent["conversation"], personality, said,
                [(bot.text(reply), reply.tokens, reply.finish == "stop") for reply in replies], options)
            return {chat: as_chat(said, [*texts, "Equally good", "Both bad"]),
                    told: json.dumps({"turn": sent["turn"], "choosing": True})}

        def remember(visit_now, personality, said, tokens, ended, options) -> None:
            """Keep what may be looked at, or rated, later."""
            visit_now.heard.add(personality, said)
            context = bot.context(personality, said[:-1], options)
            visit_now.spoken = Spoken(list(bot.encode_persona(tuple(personality))), context, tokens, ended, options)

        def choose(visit_now, event: gr.SelectData, request: gr.Request) -> str:
            """Take one of two replies. Runs in a thread of its own: it waits for the disk."""
            if not visit_now.compared or event.index not in range(len(CHOICES)):
                return json.dumps({"turn": None, "error": "The server no longer has these two replies; ask again."})
            number, compared = visit_now.compared
            visit_now.compared = None
            choice, note = CHOICES[event.index], ""
            if collector:
                collector.compare(compared, choice, visitor(request))
                note = "Your choice is kept for research."
            text, tokens, ended = compared.replies[choice if choice in (0, 1) else 0]
            remember(visit_now, compared.personality, [*compared.said, text], tokens, ended, compared.options)
            return json.dumps({"turn": number, "said": [*compared.said, text], "note": note})

        def rate(question_now, visit_now, event: gr.LikeData, request: gr.Request) -> str:
            """Take a thumb, up or down."""
            try:
                sent = asked(question_now)
            except InputError:  # not sent by our page
                return ""
            place, note = event.index, ""
            known = type(place) is int and 0 < place < len(sent["said"]) and place % 2
            if collector and known and event.liked in (True, False):
                if (sent["persona"], sent["said"][:place + 1]) in visit_now.heard:
                    collector.rate(sent["persona"], sent["said"][:place + 1], event.liked, visitor(request))
                    note = "Your rating is kept for research."
                else:
                    note = "Kept in this browser alone: the server no longer knows that reply."
            return json.dumps({"place": place if known else -1, "note": note,
                               "liked": event.liked if isinstance(event.liked, bool) else None})

        async def suggest(question_now, temperature_now, top_k_now, top_p_now, length_now, seed_now, visit_now,
                          request: gr.Request) -> str:
            """What the user may say next. Nothing is said of what goes wrong: nobody asked for it."""
            try:
                sent = asked(question_now, "own")
                options = bot.options(temperature=temperature_now, top_k=top_k_now, top_p=top_p_now,
                                      max_length=length_now, seed=seed_now or 0, num_beams=1)
                if len(bot.decoder.waiting) or len(bot.decoder.decoding) > bot.decoder.max_batch // 2:
                    return json.dumps({"turn": sent["turn"], "texts": []})  # others wait for replies
                texts = await suggestions.offer(sent["conversation"], sent["own"], sent["said"], options,
                                                Client.at(request.client.host), visit_now.over or asyncio.Event())
                return json.dumps({"turn": sent["turn"], "texts": texts})
            except (InputError, Busy, RuntimeError):
                return ""
            finally:
                events.keep_open(request.session_hash)

        async def inside(visit_now):
            """What the model saw, of the page's last reply."""
            if not visit_now.spoken:
                return gr.skip()
            drawn_from = [split for split in table.values() if split.num_turns]
            others = [list(split.token_ids("candidates", random.randrange(split.num_turns))[-1])
                      for split in random.choices(drawn_from, k=OTHERS)] if drawn_from else []
            spoken = visit_now.spoken
            return await asyncio.to_thread(what_it_saw, bot, spoken, others)

        def mixed(question_now) -> str:
            """As many sentences, each of somebody else."""
            try:
                wanted = len(asked(question_now)["persona"]) or 4
            except InputError:  # not sent by our page
                wanted = 4
            return json.dumps([random.choice(somebody()) for _ in range(wanted)] if people else [])

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slow = {"concurrency_limit": None, "trigger_mode": "multiple", "api_visibility": "private"}
        asked_it = ask.click(None, None, [question, chat, message], js="() => page.ask()", **quick)
        answered = asked_it.then(turn, [question, temperature, top_k, top_p, beams, length, seed, compare, visit],
                                 [chat, told], show_progress="minimal", **slow)
        answered.success(None, told, [chat, message], js="told => page.settle(told)", **quick)
        answered.failure(None, None, [chat, message], js="() => page.failed()", **quick)
        fail.click(None, None, [chat, message], js="() => page.failed()", **quick)
        halt.click(lambda visit_now: visit_now.next_turn() and None, visit, None, **quick)
        show.click(None, None, chat, js="() => page.show()", **quick)
        message.submit(None, None, None, js="() => page.send()", **quick)
        message.stop(None, None, None, js="() => page.stop()", **quick)
        chat.retry(None, None, None, js="() => page.retry()", **quick)
        chat.undo(None, None, None, js="() => page.undo()", **quick)
        chat.edit(None, chat, None, js="chat => page.edit(chat)", **quick)
        chat.clear(None, None, None, js="() => page.clear()", **quick)
        chat.like(rate, [question, visit], marked, js="(question, visit) => [page.hinted(), visit]", **quick
                  ).then(None, marked, chat, js="told => page.mark(told)", **quick)
        chat.option_select(choose, visit, told, **quick
                           ).then(None, told, [chat, message], js="told => page.settle(told)", **quick)
        hint.click(suggest, [question, temperature, top_k, top_p, length, seed, visit], hinted, show_progress="hidden",
                   js="(question, ...rest) => [page.hinted(), ...rest]", **slow
                   ).success(None, hinted, None, js="told => page.suggested(told)", **quick)
        look.click(inside, visit, seen, **quick).then(None, None, None, js="() => page.looked()", **quick)
        anybody.click(lambda: json.dumps(somebody()), None, drawn, **quick
                      ).success(None, drawn, None, js="told => page.drawn(told)", **quick)
        shuffle.click(mixed, question, drawn, **quick, js="() => page.hinted()"
                      ).success(None, drawn, None, js="told => page.drawn(told)", **quick)
        page.load(lambda: json.dumps(somebody()), None, drawn, **quick
                  ).then(None, drawn, None, js="told => page.drawn(told || '[]')", **quick)

        # --------------------------------------------------------------------------------------------- for programs

        async def answer(message: str, history: list[str], personality: list[str], seed: int, request: gr.Request
                         ) -> AsyncIterator[str]:
            """Answer a message as somebody, decoded as the server's flags say. ``history``: the messages before it,
            yours first; ``personality``: sentences; ``seed``: 0 for none. Yields the reply so far."""
            try:
                for name, texts in (("message", [message]), ("history", history), ("personality", personality)):
                    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                        raise InputError(f"{name}: not text, or not a list of texts")
                replies = bot.reply(personality, [*history, message], bot.options(seed=seed),
                                    Client.at(request.client.host))
                async with aclosing(replies):
                    async for reply in replies:
                        yield bot.text(reply)
            except (InputError, Busy, RuntimeError) as error:
                raise gr.Error(str(error), print_exception=False) from None

        gr.api(answer, api_name="chat", concurrency_limit=None)
    events = bounded_(page, MOST_EVENTS, EVENT_SHARE)
    return page


def visitor(request: gr.Request) -> str:
    """A name for who visits the page, as an annotator has one; the same until the page is loaded again."""
    return f"page {(request.session_hash or '')[:12]}"


def advice(error: Exception) -> str:
    """An error as the page shows it: what is wrong, and what to do."""
    return f"{str(error).rstrip('.')}." if isinstance(error, (InputError, Busy)) else \
        f"{str(error).rstrip('.')}. Your message is in the box again: press Enter to try once more."
