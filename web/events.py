"""Make Gradio safe for strangers: check what browsers send, and bound what the server keeps for them.

Gradio trusts its pages: it opens the files that a message names, keeps every answer that no page fetches, and stops for
good if it drops a page's state while it still answers that page. This file knows only Gradio, no model.
"""

import asyncio
import json
import math
import re
from contextlib import suppress
from functools import lru_cache, partial
from urllib.parse import parse_qs

import gradio as gr
from gradio.queueing import Queue
from gradio.server_messages import ProcessCompletedMessage
from gradio.utils import LRUCache
from starlette.datastructures import Address

from web.clients import Client
from web.guard import Refused

PAGES = 500  # open pages whose state Gradio keeps; with another page, the oldest state is lost
UNREAD = 256  # messages that may wait for a page to fetch them; beyond, the page's events end
KEPT = 60  # s for which a page's connection stays open after a turn, and for which messages wait to be fetched
FETCHED = 10  # s within which a page must begin to fetch the messages of an event; otherwise the event ends
DEEPEST = 8  # levels of nested lists
NAME = re.compile(r"[\w-]{1,64}", re.ASCII)
TEXT, NUMBER = (str, type(None)), (int, float, type(None))
KINDS = {gr.Textbox: TEXT, gr.Button: TEXT, gr.HTML: TEXT, gr.Checkbox: (bool, type(None)), gr.Slider: NUMBER,
         gr.Number: NUMBER}


@lru_cache(1000)
def _address(client: Address | None) -> str:
    return Client.at(client.host if client else "").address


class Messages(LRUCache):
    """The messages that wait for each page. Two connections of one page may both end, and both delete its messages."""

    def __delitem__(self, page: str) -> None:
        if page in self:
            super().__delitem__(page)


class Events(Queue):
    """Gradio's queue of the events of all pages, with bounds.

    At most ``most`` events are under way, ``share`` of them from one address. None of them waits here, as the decoder
    has its own queue. A page that leaves `UNREAD` messages unfetched counts as closed.
    """

    def __init__(self, page: gr.Blocks, most: int, share: int):
        super().__init__(True, most, 1, None, page, None)
        self.most, self.share = most, share
        self.pending_messages_per_session = Messages(2000)  # as many as Gradio itself keeps
        self.sleep_when_free = 0.01  # Gradio looks for events a thousand times per second, which slows the decoding
        self.ANALYTICS_MAX_EVENTS = 0

    def compute_analytics_summary(self, records: list) -> dict:
        """Return nothing: after each event, Gradio would evaluate the last 10,000 for a page that is not shown."""
        return {}

    @property
    def under_way(self) -> int:
        return len(self.event_ids_to_events)

    def refuses(self, client: Address | None) -> str | None:
        """Return the reason why another event of the client is refused now, or None."""
        events = list(self.event_ids_to_events.values())
        own = sum(_address(event.request.client) == _address(client) for event in events)
        if len(events) >= self.most or own >= self.share:
            return "Too many people are using this page; try again in a moment."
        return None

    async def push(self, body, request, username):
        if reason := self.refuses(request.client):  # several requests may have passed `Guard` at once
            return False, reason, "queue_full"
        pushed = await super().push(body, request, username)
        loop = asyncio.get_running_loop()
        loop.call_later(KEPT, self._forget_unread, body.session_hash)
        if pushed[0] and (event := self.event_ids_to_events.get(pushed[1])):
            loop.call_later(FETCHED, self._drop_unfetched, event)
        return pushed

    def _drop_unfetched(self, event) -> None:
        """Mark an event as ended if its page fetches nothing; Gradio ends it before the event's next message."""
        messages = self.pending_messages_per_session.get(event.session_hash)
        if not getattr(messages, "fetched", False):
            event.alive = False

    def send_message(self, event, event_message) -> None:
        messages = self.pending_messages_per_session.get(event.session_hash)
        if messages is None or messages.qsize() >= UNREAD:
            event.alive = False  # Gradio ends it before its next message
        else:
            super().send_message(event, event_message)

    def _forget_unread(self, page: str) -> None:
        """Drop a page's messages if no event of the page is under way any more; otherwise try again later."""
        messages = self.pending_messages_per_session.get(page)
        if messages is None or messages.empty():
            return
        if any(event.session_hash == page for event in self.event_ids_to_events.values()):
            asyncio.get_running_loop().call_later(KEPT, self._forget_unread, page)
            return
        self.pending_messages_per_session.pop(page, None)
        self.pending_event_ids_session.pop(page, None)

    def keep_open(self, page: str) -> None:
        """Keep the page's connection open for `KEPT` seconds, even when none of its events is under way.

        Gradio closes the connection after the last event and loses an event that the page sends at that moment, which
        is when people answer. An event that only waits would also keep it open, but would occupy a worker of Gradio's.
        """
        if (events := self.pending_event_ids_session.get(page)) is None:
            return
        mark = f"open{asyncio.get_running_loop().time()}"
        events.add(mark)
        asyncio.get_running_loop().call_later(KEPT, self._let_close, page, mark)

    def _let_close(self, page: str, mark: str) -> None:
        events, messages = self.pending_event_ids_session.get(page), self.pending_messages_per_session.get(page)
        if events is None or messages is None or mark not in events:
            return
        if len(events) > 1:  # another event, or another call of `keep_open`, still needs the connection
            events.discard(mark)
        else:
            messages.put_nowait(ProcessCompletedMessage(output={}, success=True, event_id=mark))


def make_safe_(page: gr.Blocks, most: int, share: int) -> Events:
    """Give the page a bounded queue and cut it off from files, in place. Call this before the page is mounted."""
    page.queue(api_open=False)  # no event may bypass the queue
    page._queue = Events(page, most, share)
    page.state_session_capacity = PAGES
    with suppress(ImportError):  # Gradio asks for the backend at each event; unset, the first loads all of matplotlib
        import matplotlib

        matplotlib.use("agg")
    page.has_launched = page.is_running = True  # Gradio checks files only then, and mounting does not set these

    async def no_file(*_):
        raise gr.Error("Files and addresses are not accepted.", print_exception=False)

    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = no_file
        # Gradio builds the configuration of all blocks anew for each visitor, which keeps all others waiting.
        block.get_config = partial(dict, block.get_config())
        if isinstance(block, (gr.Slider, gr.Number)):
            block.preprocess = lambda value: value  # `Decoding` checks the bounds, with a better message
    return page._queue


def check(page: gr.Blocks, path: str, query: str, body: bytes | None) -> bytes | None:
    """Rebuild the body of a request to Gradio from the parts that the page may send, and return it.

    Raises `Refused` for any other request. ``body``: None in a GET request.
    """
    queue = page._queue
    if body is None:
        if path.endswith("/queue/data"):
            name = parse_qs(query).get("session_hash", [""])[0]
            if (messages := queue.pending_messages_per_session.get(name)) is None:
                raise Refused("session_hash: the server does not know this page; load it again", 404)
            messages.fetched = True
        elif path.startswith("/gradio_api/call/"):
            event = path.rpartition("/")[2]
            page_of = next((name for name, events in queue.pending_event_ids_session.items() if event in events), None)
            if (messages := queue.pending_messages_per_session.get(page_of)) is None:
                raise Refused("There is no such event, or its result was fetched already", 404)
            messages.fetched = True
        return None
    try:
        sent = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused("The body is not JSON, or is nested too deeply") from None
    if not isinstance(sent, dict):
        raise Refused("The body is not a JSON object")
    clean: dict = {}
    for key in ("session_hash", "event_id"):
        if (value := sent.get(key)) is not None:
            if not isinstance(value, str) or not NAME.fullmatch(value):
                raise Refused(f"{key}: not a name of at most 64 letters and digits")
            clean[key] = value
    for key in ("fn_index", "trigger_id"):
        if (value := sent.get(key)) is not None:
            if type(value) is not int or not 0 <= value < 100_000:
                raise Refused(f"{key}: not a number")
            clean[key] = value
    if not path.startswith(("/gradio_api/cancel", "/gradio_api/reset")):
        if path.startswith("/gradio_api/call/"):
            event = next(fn for fn in page.fns.values() if fn.api_name == "chat")
        else:
            event = page.fns.get(clean.get("fn_index"))
        if event is None or event.fn is None:
            raise Refused("fn_index: this page has no such event", 404)
        if event.queue == path.startswith("/gradio_api/run/"):
            raise Refused("fn_index: this event must be sent to another address", 404)
        data = sent.get("data")
        if not isinstance(data, list) or len(data) != len(event.inputs):
            raise Refused(f"data: not a list of {len(event.inputs)} values")
        clean["data"] = [_input(block, value) for block, value in zip(event.inputs, data, strict=True)]
        if event.collects_event_data:
            clean["event_data"] = _event_data(sent.get("event_data"))
    elif None in (clean.get("session_hash"), clean.get("event_id"), clean.get("fn_index")):
        raise Refused("session_hash, event_id and fn_index are needed")
    return json.dumps(clean, ensure_ascii=False).encode(errors="replace")  # UTF-8 cannot encode lone surrogates


def _input(block: gr.components.Component, value: object) -> object:
    """Return the part of a block's value that the page may send. Raises `Refused`."""
    if isinstance(block, gr.State):
        return None  # the server keeps the state itself
    if isinstance(block, gr.Chatbot):
        return [_message(message) for message in _list(value, "a conversation")]
    kind = next((kinds for known, kinds in KINDS.items() if isinstance(block, known)), None)
    if kind and (not isinstance(value, kind) or isinstance(value, bool) and bool not in kind):
        raise Refused(f"data: {block.get_block_name()} does not hold this kind of value")
    return _plain(value)


def _event_data(sent: object) -> dict:
    """Return the number of the rated message with the rating, or the number of a choice. Raises `Refused`."""
    if not isinstance(sent, dict) or type(sent.get("index")) is not int or not isinstance(
            sent.get("liked"), (bool, str, type(None))):
        raise Refused("event_data: not the number of a message and a rating")
    return {"index": sent["index"], "liked": sent.get("liked"), "value": ""}


def _message(message: object) -> dict:
    """Return a message of a conversation with nothing but its text. Raises `Refused`."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        raise Refused("data: each message of a conversation needs the role user or assistant")
    content = message.get("content")
    parts = [content] if isinstance(content, str) else _list(content, "a message's content")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refused("data: a message may contain only text")
    return {"role": message["role"], "content": [{"type": "text", "text": text} for text in texts]}


def _list(value: object, what: str) -> list:
    if not isinstance(value, list):
        raise Refused(f"data: {what} must be a list")
    return value


def _plain(value: object, depth: int = 0) -> object:
    """Return ``value`` if it consists of texts, numbers and lists, not nested too deeply. Raises `Refused`."""
    if isinstance(value, list) and depth < DEEPEST:
        return [_plain(one, depth + 1) for one in value]
    if value is None or isinstance(value, (str, bool)) or isinstance(value, (int, float)) and abs(value) < math.inf:
        return value
    raise Refused("data: only texts, numbers and lists of these are accepted")


def _no_number(text: str) -> None:
    raise ValueError(text)
