"""Build the page: the bot's personality, the conversation, suggestions for the user, and a view of what the model sees.

The browser holds the conversation (page.js) and sends it along with each message. `turn` answers it; `suggest` and
`inside` then fill the suggestions and the view. Per open page, the server keeps only a `PageState`. The page loads
nothing from other servers, and nothing that a browser sends makes it open a file or an address. This file knows a
`Bot`, the personalities of a data set, and Gradio; it does not know HTTP.
"""

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from html import escape
from pathlib import Path

import gradio as gr

from cli import InputError
from tables import TokenTable
from web.batching import Busy, Reply, apart
from web.bot import MAX_TEXT, WIDEST, Bot
from web.clients import Client
from web.collecting import Collector, Compared, GivenReplies
from web.events import make_safe_
from web.insight import InspectedReply, inspection_html, note_attention_
from web.suggestions import Suggestions

CARDS = 5  # the last card holds all further sentences of a longer personality
TRIES = 4  # replies decoded to find two that differ
OTHERS = 9  # replies of other dialogs with which the choice head compares the bot's reply
CHOICES = (0, 1, "tie", "bad")  # the answers of feedback.annotate, in the order of the buttons
MOST_EVENTS, EVENT_SHARE = 200, 50  # page events under way: in all, and from one address
logger = logging.getLogger(__name__)

THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                          ).set(button_primary_background_fill="*primary_600",
                                button_primary_background_fill_hover="*primary_700",
                                button_primary_background_fill_dark="*primary_600",
                                button_primary_background_fill_hover_dark="*primary_700",
                                body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
                                block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
                                input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400")
# Gradio would rewrite a style sheet passed as css and add it only after the page is drawn, so that the page would jump.
HEAD = "".join(f"<{tag}>{Path(__file__).with_name(name).read_text('utf-8')}</{tag}>"
               for tag, name in (("style", "page.css"), ("script", "page.js")))
TOP = """<header><h1>TransferTransfo</h1><p>Talk to a small language model. Five cards describe who it is.
<span>It makes up what it says.</span>{collecting}</p><nav>
<button class=narrow-only data-drawer=rest aria-expanded=false>Menu</button>
<button class=narrow-only data-drawer=right aria-expanded=false>Inside</button>
<button id=theme data-act=theme aria-label="Other colours" title="Light or dark">◐</button></nav></header>"""
COLLECTING = " <b>Replies that you rate or compare are kept for research, with the messages before them.</b>"
TOOLS = """<button class=small data-act=renew>New</button> <button class=small data-act=share>Share</button>
<button class=small data-act=download>Export</button>"""


class PageState:
    """The server's state of an open page: hashes of the replies given, the last one, and two that wait for a choice."""

    def __init__(self):
        self.turn_over: asyncio.Event | None = None  # set when the current turn is over
        self.given = GivenReplies()
        self.last_reply: InspectedReply | None = None
        self.compared: tuple[int, Compared] | None = None  # number of the turn, two replies

    def next_turn(self) -> asyncio.Event:
        """End the current turn and begin the next. Return the event that is set when the new turn is over."""
        if self.turn_over:
            self.turn_over.set()
        self.turn_over, self.compared = asyncio.Event(), None
        return self.turn_over


def split_sentences(text: str | None) -> list[str]:
    """Return the sentences of a personality from a text with one sentence per line."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def as_chat(said: list[str], options: list[str] | None = None) -> list[dict]:
    """Convert messages for Gradio's Chatbot. ``options``: replies to choose from, shown after the messages.

    The Chatbot reads texts as markup. An invisible character (U+2060) behind ``<`` and ``&`` prevents this; page.js
    removes it again.
    """
    chat: list[dict] = [{"role": ("user", "assistant")[number % 2],
                         "content": text.replace("&", "&\u2060").replace("<", "<\u2060")}
                        for number, text in enumerate(said)]
    if options:
        chat.append({"role": "assistant", "content": "Which reply is better?",
                     "options": [{"value": str(number), "label": text} for number, text in enumerate(options)]})
    return chat


def parse_conversation(text: str, *lists: str) -> dict:
    """Parse the JSON that page.js sends: ``turn`` (a number), ``conversation`` (a name), ``persona``, ``said`` (texts).

    ``lists``: names of further lists of texts. Raises `InputError` for anything else.
    """
    try:
        # Lone surrogates, which no answer can hold, become question marks, as in `events.check`.
        sent = json.loads(json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace"))
        texts = all(isinstance(sent[name], list) and all(isinstance(one, str) for one in sent[name])
                    for name in ("persona", "said", *lists))
        if texts and type(sent["turn"]) is int and isinstance(sent["conversation"], str):
            return sent
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError("The page did not send a conversation; load the page again")


async def until(turn_over: asyncio.Event, replies: AsyncIterator[Reply]) -> AsyncIterator[Reply]:
    """Yield from ``replies`` until ``turn_over`` is set."""
    ended = asyncio.ensure_future(turn_over.wait())
    try:
        while not turn_over.is_set():
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
    """Build the page with its events.

    ``table``: the data set from which Random and Shuffle draw personalities; ``pairing``: a remark about model and
    data, shown on the page.
    """
    people = [] if bot.model.no_persona else [
        (split, dialog) for split in table.values() for dialog in range(len(split))
        if len(split.strings("persona", dialog))]
    note_attention_(bot.model)

    def random_persona(name: str | None = None) -> list[str]:
        """Draw a personality; a conversation's ``name`` as the seed draws the same one each time."""
        if not people:
            return []
        split, dialog = random.Random(name).choice(people)
        return split.texts("persona", dialog)

    suggestions = Suggestions(bot, table, random_persona)

    # ------------------------------------------------------------------------------------------------ the elements

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
                    draw_persona = gr.Button("Random", size="sm", min_width=80, interactive=bool(people))
                    mix_persona = gr.Button("Shuffle", size="sm", min_width=80, interactive=bool(people))
                with gr.Column(elem_id="rest"):
                    gr.HTML("<button class='small drawer-close' data-drawer=rest>Close</button>"
                            f"<div class='tools narrow-only'>{TOOLS}</div>", elem_classes="narrow-only")
                    with gr.Accordion("Your personality, for suggestions", open=False):
                        gr.Textbox(label="Who you are, one sentence per line; if empty, a random personality",
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
                        seed = gr.Number(flags.seed, precision=0, minimum=0, label="Seed",
                                         info="0: a different one each time")
                    gr.HTML(f"<p class=faint>Model <code>{escape(bot.name)}</code>, version <code>{bot.version}</code>."
                            f" {escape(pairing)} Programs reach it at <code>/v1</code>.</p><h2>Conversations</h2>"
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
                seen = gr.HTML("<p class=faint>After the first reply, this shows how the model read the conversation, "
                               "and each token of the reply.</p>", elem_id="seen")
        hidden = {"visible": "hidden"}
        state = gr.State(PageState())
        ask, show, halt, fail, hint, look = (gr.Button(name, elem_id=name, **hidden)
                                             for name in ("ask", "show", "halt", "fail", "hint", "look"))
        question, outcome, new_persona, suggested, rating = (gr.Textbox(**hidden) for _ in range(5))

        # ---------------------------------------------------------------------------------------- the events

        async def turn(question_now, temperature_now, top_k_now, top_p_now, beams_now, length_now, seed_now,
                       compare_now, page_state, request: gr.Request) -> AsyncIterator[dict]:
            """Answer a message. The last update has the turn's number, and either all messages or an error."""
            turn_over = page_state.next_turn()
            number = None
            try:
                sent = parse_conversation(question_now)
                number, personality, said = sent["turn"], sent["persona"], sent["said"]
                options = bot.options(temperature=temperature_now, top_k=top_k_now, top_p=top_p_now,
                                      num_beams=beams_now, max_length=length_now, seed=seed_now or 0)
                client = client_of(request)
                if compare_now:
                    yield await two_replies(sent, options, client, turn_over, page_state)
                    return
                reply = None
                async with aclosing(bot.reply(personality, said, options, client)) as replies:
                    async for reply in until(turn_over, replies):
                        yield {chat: as_chat([*said, bot.text(reply)])}
                text = bot.text(reply) if reply else ""
                if not text and not (reply and reply.finish):
                    yield {outcome: json.dumps({"turn": number, "error": "Stopped before the reply began."})}
                    return
                remember(page_state, personality, [*said, text], reply.tokens, reply.finish == "stop", options)
                yield {chat: as_chat([*said, text]), outcome: json.dumps({"turn": number, "said": [*said, text]})}
            except (InputError, Busy, RuntimeError) as error:
                yield {outcome: json.dumps({"turn": number, "error": advice(error)})}
            finally:
                events.keep_open(request.session_hash)

        async def two_replies(sent, options, client, turn_over, page_state) -> dict:
            """Decode two replies that differ, and return the update that lets the user choose one."""
            personality, said = sent["persona"], sent["said"]
            if options.no_sample or options.num_beams > 1:
                raise InputError("Compare: without sampling both replies are the same; choose a temperature above 0 "
                                 "and 1 beam, or turn Compare off")

            async def decode(number: int) -> Reply | None:
                seeded = replace(options, seed=options.seed + number if options.seed else 0)
                last = None
                async with aclosing(bot.reply(personality, said, seeded, client)) as replies:
                    async for last in until(turn_over, replies):  # noqa: B007
                        pass
                return last if last and last.finish else None

            replies = list(await asyncio.gather(decode(0), decode(1)))
            for number in range(2, TRIES):
                if None not in replies and bot.text(replies[0]) == bot.text(replies[1]):
                    replies = [replies[0], await decode(number)]
            if None in replies:
                return {outcome: json.dumps({"turn": sent["turn"], "error": "Stopped before both replies were done."})}
            texts = [bot.text(reply) for reply in replies]
            if texts[0] == texts[1]:
                remember(page_state, personality, [*said, texts[0]], replies[0].tokens, replies[0].finish == "stop",
                         options)
                return {chat: as_chat([*said, texts[0]]), outcome: json.dumps(
                    {"turn": sent["turn"], "said": [*said, texts[0]],
                     "note": "Both replies say the same, so there is nothing to compare."})}
            page_state.compared = sent["turn"], Compared(
                sent["conversation"], personality, said,
                [(bot.text(reply), reply.tokens, reply.finish == "stop") for reply in replies], options)
            return {chat: as_chat(said, [*texts, "Equally good", "Both bad"]),
                    outcome: json.dumps({"turn": sent["turn"], "choosing": True})}

        def remember(page_state, personality, said, tokens, ended, options) -> None:
            """Keep the reply, the last message of ``said``, for a rating and for `inside`."""
            page_state.given.add(personality, said)
            context = bot.context(personality, said[:-1], options)
            page_state.last_reply = InspectedReply(list(bot.encode_persona(tuple(personality))), context, tokens, ended,
                                                   options)

        def choose(page_state, event: gr.SelectData, request: gr.Request) -> str:
            """Take the user's choice between two replies. Not async, so that Gradio runs it in a thread: it writes."""
            if not page_state.compared or event.index not in range(len(CHOICES)):
                return json.dumps({"turn": None, "error": "The server no longer has these two replies; ask again."})
            number, compared = page_state.compared
            page_state.compared = None
            choice, note = CHOICES[event.index], ""
            if collector:
                note = kept("choice", collector.compare, compared, choice, visitor(request))
            text, tokens, ended = compared.replies[choice if choice in (0, 1) else 0]
            remember(page_state, compared.personality, [*compared.said, text], tokens, ended, compared.options)
            return json.dumps({"turn": number, "said": [*compared.said, text], "note": note})

        def rate(question_now, page_state, event: gr.LikeData, request: gr.Request) -> str:
            """Take a rating, a thumb up or down."""
            try:
                sent = parse_conversation(question_now)
            except InputError:  # another program sent it
                return ""
            place, note = event.index, ""
            known = type(place) is int and 0 < place < len(sent["said"]) and place % 2
            if collector and known and event.liked in (True, False):
                if (sent["persona"], sent["said"][:place + 1]) in page_state.given:
                    note = kept("rating", collector.rate, sent["persona"], sent["said"][:place + 1], event.liked,
                                visitor(request))
                else:
                    note = "Only this browser keeps the rating: the server no longer knows that reply."
            return json.dumps({"place": place if known else -1, "note": note,
                               "liked": event.liked if isinstance(event.liked, bool) else None})

        async def suggest(question_now, temperature_now, top_k_now, top_p_now, length_now, seed_now, page_state,
                          request: gr.Request) -> str:
            """Suggest messages to the user. Errors are not shown, as the user did not ask for suggestions."""
            try:
                sent = parse_conversation(question_now, "own")
                options = bot.options(temperature=temperature_now, top_k=top_k_now, top_p=top_p_now,
                                      max_length=length_now, seed=seed_now or 0, num_beams=1)
                if len(bot.decoder.waiting) or len(bot.decoder.decoding) > bot.decoder.max_batch // 2:
                    return json.dumps({"turn": sent["turn"], "texts": []})  # others wait for replies
                texts = await suggestions.offer(sent["conversation"], sent["own"], sent["said"], options,
                                                client_of(request), page_state.turn_over or asyncio.Event())
                return json.dumps({"turn": sent["turn"], "texts": texts})
            except (InputError, Busy, RuntimeError):
                return ""
            finally:
                events.keep_open(request.session_hash)

        async def inside(page_state):
            """Return the view of what the model saw for the last reply."""
            if not page_state.last_reply:
                return gr.skip()
            splits = [split for split in table.values() if split.num_turns]
            others = [list(split.token_ids("candidates", random.randrange(split.num_turns))[-1])
                      for split in random.choices(splits, k=OTHERS)] if splits else []
            return await apart(inspection_html, bot, page_state.last_reply, others)

        def mixed_persona(question_now) -> str:
            """Draw as many sentences as the current personality has, each from another random personality."""
            try:
                wanted = min(len(parse_conversation(question_now)["persona"]), MAX_TEXT) or 4
            except InputError:  # another program sent it
                wanted = 4
            return json.dumps([random.choice(random_persona()) for _ in range(wanted)] if people else [])

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slow = {"concurrency_limit": None, "trigger_mode": "multiple", "api_visibility": "private"}
        asking = ask.click(None, None, [question, chat, message], js="() => page.ask()", **quick)
        answered = asking.then(turn, [question, temperature, top_k, top_p, beams, length, seed, compare, state],
                               [chat, outcome], show_progress="minimal", **slow)
        answered.success(None, outcome, [chat, message], js="outcome => page.take_reply(outcome)", **quick)
        answered.failure(None, None, [chat, message], js="() => page.failed()", **quick)
        fail.click(None, None, [chat, message], js="() => page.failed()", **quick)
        halt.click(lambda page_state: page_state.next_turn() and None, state, None, **quick)
        show.click(None, None, chat, js="() => page.show()", **quick)
        message.submit(None, None, None, js="() => page.send()", **quick)
        message.stop(None, None, None, js="() => page.stop()", **quick)
        chat.retry(None, None, None, js="() => page.retry()", **quick)
        chat.undo(None, None, None, js="() => page.undo()", **quick)
        chat.edit(None, chat, None, js="chat => page.edit(chat)", **quick)
        chat.clear(None, None, None, js="() => page.clear()", **quick)
        chat.like(rate, [question, state], rating, js="(question, state) => [page.conversation(), state]", **quick
                  ).then(None, rating, chat, js="rating => page.take_rating(rating)", **quick)
        chat.option_select(choose, state, outcome, **quick
                           ).then(None, outcome, [chat, message], js="outcome => page.take_reply(outcome)", **quick)
        hint.click(suggest, [question, temperature, top_k, top_p, length, seed, state], suggested,
                   show_progress="hidden", js="(question, ...rest) => [page.conversation(), ...rest]", **slow
                   ).success(None, suggested, None, js="suggested => page.take_suggestions(suggested)", **quick)
        look.click(inside, state, seen, **quick).then(None, None, None, js="() => page.choose_first_token()", **quick)
        draw_persona.click(lambda: json.dumps(random_persona()), None, new_persona, **quick
                           ).success(None, new_persona, None, js="persona => page.take_persona(persona)", **quick)
        mix_persona.click(mixed_persona, question, new_persona, **quick, js="() => page.conversation()"
                          ).success(None, new_persona, None, js="persona => page.take_persona(persona)", **quick)
        page.load(lambda: json.dumps(random_persona()), None, new_persona, **quick
                  ).then(None, new_persona, None, js="persona => page.take_persona(persona || '[]')", **quick)

        # --------------------------------------------------------------------------------------------- for programs

        async def answer(message: str, history: list[str], personality: list[str], seed: int, request: gr.Request
                         ) -> AsyncIterator[str]:
            """Answer a message with the given personality and the server's decoding options.

            ``history``: the messages before it, the user's first; ``personality``: sentences; ``seed``: 0 for none.
            Yields the reply so far.
            """
            try:
                for name, texts in (("message", [message]), ("history", history), ("personality", personality)):
                    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                        raise InputError(f"{name}: must be {'text' if name == 'message' else 'a list of texts'}")
                replies = bot.reply(personality, [*history, message], bot.options(seed=seed),
                                    client_of(request))
                async with aclosing(replies):
                    async for reply in replies:
                        yield bot.text(reply)
            except (InputError, Busy, RuntimeError) as error:
                raise gr.Error(str(error), print_exception=False) from None

        gr.api(answer, api_name="chat", concurrency_limit=None)
    events = make_safe_(page, MOST_EVENTS, EVENT_SHARE)
    return page


def kept(what: str, save: Callable[..., None], *values: object) -> str:
    """Save a choice or a rating, and return what the page says about it."""
    try:
        save(*values)
    except InputError as problem:  # a full disk, for example, which visitors need not know
        logger.warning("%s", problem)
        return f"Your {what} could not be kept; the conversation goes on."
    return f"Your {what} is kept for research."


def visitor(request: gr.Request) -> str:
    """Return the annotator's name for a visitor. It stays the same until the page is loaded again."""
    return f"page {(request.session_hash or '')[:12]}"


def client_of(request: gr.Request) -> Client:
    """Return the client of an event: the address, and the open page, whose name only its browser knows."""
    return Client.at(request.client.host, f"page {request.session_hash}" if request.session_hash else "")


def advice(error: Exception) -> str:
    """Return an error's text for the page: what is wrong, and what to do."""
    return f"{str(error).rstrip('.')}." if isinstance(error, (InputError, Busy)) else \
        f"{str(error).rstrip('.')}. Your message is back in the box: press Enter to try again."
