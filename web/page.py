"""The page: somebody's personality, the conversation, a suggestion what to say next, and what the model sees.

The conversation lives in the browser, which sends it along with each message. The page loads nothing from elsewhere,
and nothing that a browser sends makes it open a file or an address.
This file knows a `Bot` and a data set's personalities, and Gradio, which has the page; nothing of HTTP.
"""

import asyncio
import base64
import json
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from html import escape, unescape

import gradio as gr

from cli import InputError
from corpora import check_corpus
from tables import TokenTable
from web.batching import Busy, Client, Reply
from web.bot import MAX_TEXT, WIDEST, Bot
from web.events import bounded_

SHOWN = 10  # likeliest next tokens
LINGER = 2  # s between a turn's last update and its end, for an update is lost that another follows at once
MOST_EVENTS, EVENT_SHARE = 200, 50  # replies to pages under way: all of them, those of one address
MAX_SHARED = 256 * 1024  # bytes of a shared conversation, unpacked

THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                          ).set(button_primary_background_fill="*primary_600",
                                button_primary_background_fill_hover="*primary_700",
                                button_primary_background_fill_dark="*primary_600",
                                button_primary_background_fill_hover_dark="*primary_700")
STYLE = """
.gradio-container { max-width: 70rem !important; margin: 0 auto !important }
#suggestion { justify-content: start; text-align: start; white-space: normal; font-weight: normal }
#notice p { border-inline-start: 4px solid #d9822b; padding: .2rem .6rem; margin: 0 }
.seen { --persona: #3fa34d; --user: #3f83e0; --bot: #e08a2e }
.seen ol { list-style: none; padding: 0; margin: 0 }
.seen li { margin: .3rem 0; line-height: 2.2 }
.seen li > b { display: inline-block; min-width: 5.5rem }
.seen .token { background: color-mix(in srgb, var(--colour) 25%, transparent); border-radius: 4px;
               padding: .15rem .3rem; white-space: pre }
.seen sub { opacity: .75; font-size: .7em; margin-inline-start: .2em }
.seen .persona { --colour: var(--persona) } .seen .user { --colour: var(--user) } .seen .bot { --colour: var(--bot) }
.seen table { border-collapse: collapse; margin-top: 1rem; width: 100%; max-width: 40rem }
.seen caption { text-align: start; padding-bottom: .3rem }
.seen table, .seen table th, .seen table td, .seen table tr { border: none !important; text-align: start;
                                                 padding: .1rem .6rem .1rem 0; font-variant-numeric: tabular-nums }
.seen .bar { background: var(--user); height: .4rem; border-radius: 2px; min-width: 1px }
.seen .bar + .bar { background: var(--bot); margin-top: 1px }
"""
# A shared address differs only behind its #, for which browsers do not load a page again.
HEAD = '<script>addEventListener("hashchange", () => location.reload())</script>'
FOCUS = '() => document.querySelector("#message textarea, #message input").focus()'
SILENT = gr.HTML(visible=False)
NO_SUGGESTION = gr.Button("Suggestion: none yet", interactive=False)
# The box is emptied here and nowhere else, so that nothing is lost of what people write while a reply is coming.
TAKE = '(text, busy) => busy || !text.trim() ? [text, "", busy] : ["", text, true]'
DOWNLOAD = """text => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
}"""


class Visit:
    """What the server knows of an open page: whether its current turn is over. Nothing of what was said."""

    def __init__(self):
        self.over: asyncio.Event | None = None  # set when the current turn is over

    def next_turn(self) -> asyncio.Event:
        """End the current turn and begin one. Returns the event that is set when it is over."""
        if self.over:
            self.over.set()
        self.over = asyncio.Event()
        return self.over


def sentences(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def as_chat(said: list[str]) -> list[dict]:
    """Messages as Gradio's Chatbot has them, which takes texts for HTML."""
    return [{"role": ("user", "assistant")[number % 2], "content": escape(text)} for number, text in enumerate(said)]


def said_in(chat: list[dict]) -> list[str]:
    """The texts that `as_chat` was made of."""
    return [unescape("".join(part["text"] for part in message["content"] if part["type"] == "text"))
            for message in chat]


def pack(personality: list[str], own: list[str], said: list[str]) -> str:
    """A conversation as the part of an address behind its #."""
    text = json.dumps({"personality": personality, "own": own, "said": said}, ensure_ascii=False)
    return base64.urlsafe_b64encode(zlib.compress(text.encode(errors="replace"), 9)).decode().rstrip("=")


def unpack(fragment: str) -> tuple[list[str], list[str], list[str]]:
    """`pack`'s arguments. Raises `InputError` when it is damaged."""
    try:
        packed = base64.urlsafe_b64decode(fragment + "=" * (-len(fragment) % 4))
        unpacker = zlib.decompressobj()
        shared = json.loads(unpacker.decompress(packed, MAX_SHARED))
        lists = [shared[part] for part in ("personality", "own", "said")]
        lists_of_texts = all(isinstance(texts, list) and all(isinstance(one, str) for one in texts) for texts in lists)
        if unpacker.eof and lists_of_texts:
            return tuple(lists)
    except (ValueError, zlib.error, KeyError, TypeError, RecursionError):
        pass
    raise InputError("This address holds no conversation, or not all of it; copy it again, whole")


def export(personality: list[str], said: list[str]) -> str:
    """A conversation as a data file, whose splits both have it. Raises `InputError` when the bot has not spoken yet."""
    turns = [{"history": said[:number], "candidates": [said[number]]} for number in range(1, len(said), 2)]
    if not turns:
        raise InputError("Nothing to export yet; talk first")
    entry = {"personality": personality, "utterances": turns}
    check_corpus(corpus := {"train": [entry], "valid": [entry]})
    return json.dumps(corpus, indent=1, ensure_ascii=False) + "\n"


def what_it_saw(bot: Bot, reply: Reply) -> str:
    """A finished reply's sequence and its last step, as HTML."""
    names = {bot.special.speaker1: "bot", bot.special.speaker2: "user"}
    ids = [*reply.context.ids, bot.special.speaker1, *reply.tokens]
    types = [*reply.context.types, *[bot.special.speaker1] * (1 + len(reply.tokens))]
    segments: list[tuple[str, list[str]]] = [("persona", [])]
    for place, (token, role) in enumerate(zip(ids, types, strict=True)):
        if token in names:
            segments.append((names[token], []))
        position = reply.context.start + place
        segments[-1][1].append(
            f"<span class=token title='token {token}, position {position}, type {escape(_word(bot, role))}'>"
            f"{escape(_word(bot, token))}<sub>{position}</sub></span>")
    items = "".join(f"<li class={name}><b>{'reply' if number == len(segments) else name}</b> {' '.join(tokens)}</li>"
                    for number, (name, tokens) in enumerate(segments, 1))
    return f"<div class=seen><ol>{items}</ol>{_last_step(bot, reply)}</div>"


def _last_step(bot: Bot, reply: Reply) -> str:
    if not reply.last_step:
        return "<p>Beam search weighs whole replies; it has no last step to show.</p>"
    before, after = (logits.softmax(-1) for logits in reply.last_step)
    rows = ""
    for token in before.topk(min(SHOWN, len(before))).indices.tolist():
        pair = before[token].item(), after[token].item()
        rows += (f"<tr><th scope=row>{escape(_word(bot, token))}</th>" + "".join(f"<td>{one:.1%}</td>" for one in pair)
                 + "<td>" + "".join(f"<div class=bar style='width:{100 * one:.1f}%'></div>" for one in pair)
                 + "</td></tr>")
    return ("<table><caption>The likeliest tokens of the last step: as the model gave them, and after temperature "
            "and filter</caption><tr><th scope=col>token</th><th scope=col>before</th><th scope=col>after</th>"
            f"<td style='width:50%'></td></tr>{rows}</table>")


def _word(bot: Bot, token: int) -> str:
    return bot.tokenizer.decode([token]) or bot.tokenizer.convert_ids_to_tokens(token)


def build_page(bot: Bot, table: TokenTable) -> gr.Blocks:
    """The page and its events. ``table``: whose personalities Random and Shuffle take."""
    people = [] if bot.model.no_persona else [
        (split, dialog) for split in table.values() for dialog in range(len(split))
        if len(split.strings("persona", dialog))]

    def somebody() -> list[str]:
        split, dialog = random.choice(people)
        return split.texts("persona", dialog)

    # ------------------------------------------------------------------------------------------------ what there is

    with gr.Blocks(title="TransferTransfo", analytics_enabled=False) as page:
        gr.Markdown(f"# TransferTransfo\nTalk to `{bot.name}`, version `{bot.version}`")
        with gr.Row():
            with gr.Column(scale=2):
                persona = gr.Textbox(label="The bot's personality, a sentence per line", lines=5, max_lines=12,
                                     max_length=MAX_TEXT, elem_id="persona")
                with gr.Row():
                    anybody = gr.Button("Random", size="sm", min_width=80, interactive=bool(people))
                    shuffle = gr.Button("Shuffle", size="sm", min_width=80, interactive=bool(people))
                start = gr.Button("Start chatting", variant="primary")
                with gr.Accordion("Your personality, for suggestions", open=False):
                    own = gr.Textbox(label="Who you are, a sentence per line; may be empty", lines=3, max_lines=12,
                                     max_length=MAX_TEXT, elem_id="own")
                with gr.Accordion("Decoding options", open=False):
                    flags = bot.args
                    suggests = gr.Checkbox(True, label="Suggest what to say")
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
            with gr.Column(scale=3):
                chat = gr.Chatbot(label="Conversation", height=420, render_markdown=False, buttons=[], elem_id="chat",
                                  feedback_options=None, placeholder="Say hello.")
                message = gr.Textbox(label="Your message", placeholder="Write, and press Enter", lines=1, max_lines=4,
                                     max_length=MAX_TEXT, elem_id="message")
                notice = gr.HTML(visible=False, elem_id="notice")
                suggestion = gr.Button("Suggestion: none yet", size="sm", interactive=False, elem_id="suggestion")
                with gr.Row():
                    send = gr.Button("Send", variant="primary", size="sm", min_width=80)
                    share = gr.Button("Share", size="sm", min_width=80)
                    save = gr.Button("Export", size="sm", min_width=80)
                address = gr.Textbox(label="The address of this conversation; nothing of it is kept here",
                                     visible=False, buttons=["copy"], max_lines=3, elem_id="address")
        with gr.Accordion("What the model sees", open=False, elem_id="seen"):
            seen = gr.HTML("Nothing yet.")
        visit, pending, busy = gr.State(Visit()), gr.Textbox(visible=False), gr.Checkbox(False, visible=False)
        lost, file, fragment = (gr.Textbox(visible=False) for _ in range(3))

        # ---------------------------------------------------------------------------------------- what happens when

        async def turn(text, chat_now, persona_now, own_now, temperature_now, top_k_now, top_p_now, beams_now,
                       length_now, seed_now, suggests_now, visit_now, request: gr.Request) -> AsyncIterator[dict]:
            """Answer, then suggest.

            A page handles the updates of each event in their order, but those of two events in any: so each tells
            all that may have changed since the last turn, for something of that may yet arrive."""
            nothing = {busy: gr.skip()}  # to end with, because Gradio sends an event's last update again when it ends
            if not text:
                yield nothing
                return
            over = visit_now.next_turn()
            said = [*said_in(chat_now), text]
            now = {chat: as_chat(said), busy: True, suggestion: NO_SUGGESTION, lost: "", notice: SILENT}
            yield now
            try:
                options = bot.options(temperature=temperature_now, top_k=top_k_now, top_p=top_p_now,
                                      num_beams=beams_now, max_length=length_now, seed=seed_now or 0)
                client = Client.at(request.client.host)
                async with aclosing(bot.reply(sentences(persona_now), said, options, client)) as replies:
                    async for reply in replies:
                        if over.is_set():
                            yield nothing
                            return
                        yield now | {chat: as_chat([*said, bot.text(reply)])}
                said.append(bot.text(reply))
                now |= {chat: as_chat(said), busy: False, seen: what_it_saw(bot, reply)}
                yield now
            except (InputError, Busy, RuntimeError) as error:
                yield now | {chat: chat_now, busy: False, lost: text, notice: complaint(error)}
                return
            finally:
                events.keep_open(request.session_hash)
            if suggests_now and (hint := await suggest(own_now, said, options, client, over)):
                yield {suggestion: gr.Button(f"Suggestion: {hint}", interactive=True)}
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), LINGER)
            yield nothing

        async def suggest(own_now, said, options, client, over) -> str:
            """What the user may say next; empty when that fails, which is not worth a complaint, or comes too late."""
            try:
                async with aclosing(bot.reply(sentences(own_now), said, options, client)) as replies:
                    async for reply in replies:  # noqa: B007  the last one is the whole
                        if over.is_set():
                            return ""
            except (InputError, Busy, RuntimeError):
                return ""
            return bot.text(reply)

        def begin(visit_now) -> dict:
            visit_now.next_turn()
            return {chat: [], busy: False, suggestion: NO_SUGGESTION, notice: SILENT, seen: "Nothing yet.",
                    address: gr.Textbox(visible=False)}

        def mixed(text) -> str:
            """As many sentences, each of somebody else."""
            return "\n".join(random.choice(somebody()) for _ in range(len(sentences(text)) or 4))

        def restore(fragment_now) -> dict:
            try:
                if not fragment_now:
                    return {persona: "\n".join(somebody()) if people else ""}
                personality, own_then, said = unpack(fragment_now)
            except InputError as error:
                return restore("") | {notice: complaint(error)}
            return {persona: "\n".join(personality), own: "\n".join(own_then), chat: as_chat(said)}

        def share_it(persona_now, own_now, chat_now, here) -> dict:
            packed = pack(sentences(persona_now), sentences(own_now), said_in(chat_now))
            return {address: gr.Textbox(f"{here}#{packed}", visible=True)}

        def save_it(persona_now, chat_now) -> dict:
            try:
                return {file: export(sentences(persona_now), said_in(chat_now)), notice: SILENT}
            except InputError as error:
                return {file: "", notice: complaint(error)}

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        said_it = gr.on([message.submit, send.click], None, [message, busy], [message, pending, busy], js=TAKE, **quick)
        answered = said_it.then(
            turn, [pending, chat, persona, own, temperature, top_k, top_p, beams, length, seed, suggests, visit],
            [chat, busy, suggestion, seen, lost, notice], show_progress="hidden", trigger_mode="multiple",
            concurrency_limit=None, api_visibility="private",
        )
        answered.then(None, [message, lost], message, js="(text, lost) => text || lost", **quick)
        answered.failure(None, [message, pending], [message, busy], js="(text, lost) => [text || lost, false]", **quick)
        suggestion.click(None, suggestion, message, js="label => label.replace(/^Suggestion: /, '')", **quick
                         ).then(None, js=FOCUS, **quick)
        gr.on([start.click, chat.clear], begin, visit, [chat, busy, suggestion, seen, notice, address], **quick
              ).then(None, js=FOCUS, **quick)
        anybody.click(lambda: "\n".join(somebody()), None, persona, **quick)
        shuffle.click(mixed, persona, persona, **quick)
        share.click(share_it, [persona, own, chat, fragment], address, **quick,
                    js="(...all) => [...all.slice(0, 3), location.origin + location.pathname]")
        save.click(save_it, [persona, chat], [file, notice], **quick).then(None, file, js=DOWNLOAD, **quick)
        page.load(restore, fragment, [persona, own, chat, notice], js="() => location.hash.slice(1)", **quick)

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


def complaint(error: Exception) -> gr.HTML:
    """An error as the page shows it, and screen readers read it at once."""
    return gr.HTML(f"<p role=alert>{escape(str(error))}</p>", visible=True)
