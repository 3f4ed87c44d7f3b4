"""Recognise the shapes in which JSON stores chats, instructions and dialogs, and read each of them.

A record holds one dialog: an element of a JSON list, a line of JSON lines, or a row. A reader converts it to a
`Dialog`. This file knows JSON values, but no files.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from cli import InputError
from corpora import JsonReader
from dialogs import Dialog, Utterance
from releases import checked_dialog, split_sentences
from texts import ASSISTANTS, LABELLED, MARKED, USER_ROLES, answering_speaker, labelled_dialog, share_of

LIST_KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "utterances", "turns",
             "chat", "contents", "items", "talk", "script", "log", "chat_messages")
TEXT_KEYS = ("content", "value", "text", "utterance", "message", "body", "parts", "sentence", "msg")
ROLE_KEYS = ("role", "from", "speaker", "author", "sender", "sender_name", "senderName", "user", "agent", "speaker_id",
             "participant", "who", "username", "user_name", "nickname", "character", "is_user", "isUser", "is_bot",
             "isBot", "from_me", "fromMe", "name", "id")
TIME_KEYS = ("timestamp_ms", "timestamp", "created_at", "date", "time", "ts")
SYSTEM_ROLES = {"system", "developer", "context"}
TOOL_ROLES = {"tool", "tools", "function", "function_call", "function-call", "observation", "ipython", "tool_call",
              "tool_calls", "tool_response", "tool_result", "environment"}
PERSONA_KEYS = ("personas", "persona", "personality")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
PROMPT_KEYS = ("instruction", "question", "prompt", "query", "input", "context", "user", "human")
REPLY_KEYS = ("output", "response", "answer", "completion", "reply", "target", "assistant", "bot", "gpt")
FURTHER_KEYS = {"instruction": ("input", "context")}  # Alpaca and Dolly store parts of a prompt under other keys
DEEPEST = 8  # levels of nested lists


class Shape(NamedTuple):
    """A form in which a record holds a dialog."""

    name: str  # for messages
    read: Callable[[str, object], Dialog]  # (place, record) → dialog; raises ``ValueError`` that says what is wrong


# ------------------------------------------------------------------------------------------------- lists of messages


def is_message(value: object) -> bool:
    """Return whether a value is a message: an object with a text or a call of a tool."""
    return isinstance(value, dict) and any(key in value for key in (*TEXT_KEYS, "tool_calls", "function_call"))


def _messages(record: Any) -> list | None:
    """Return the messages of a record as one list, also those of nested lists; None if there is no list."""
    before = []
    if isinstance(record, dict):
        context = record.get("context")
        if isinstance(context, list) and all(is_message(one) and one.get("id") == "context" for one in context):
            before = context  # ParlAI stores the persona there
        record = record.get(_list_key(record))
        exchanges = isinstance(record, list) and [None if is_message(one) else pair_keys(one) for one in record]
        if exchanges and all(exchanges):  # {"user": …, "assistant": …}, perhaps with a system message
            return [{"role": "system" if key in SYSTEM_KEYS else key, "content": one[key]} for one, keys in
                    zip(record, exchanges, strict=True) for key in (*SYSTEM_KEYS, *keys) if one.get(key)]
        if isinstance(record, list) and record and all(isinstance(one, list) for one in record):
            record = list(chain.from_iterable(record))
    return before + _in_time(record) if isinstance(record, list) else None


def _list_key(record: dict) -> str | None:
    """Return the key of a record's list of messages or utterances: a known key, or the only possible one."""
    if known := next((key for key in LIST_KEYS if isinstance(record.get(key), list)), None):
        return known
    others = [key for key, value in record.items() if key != "context" and isinstance(value, list) and value and all(
        is_message(one) and any(role in one for role in ROLE_KEYS[:-2]) for one in value)]
    return others[0] if len(others) == 1 else None


def _in_time(messages: list) -> list:
    """Return messages in order of time, because some messengers write the newest first."""
    for key in TIME_KEYS:
        times = [message.get(key) if isinstance(message, dict) else None for message in messages]
        if all(type(time) in (int, float) for time in times) or all(
                isinstance(time, str) and re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:", time) for time in times):
            falls = all(after <= before for before, after in zip(times, times[1:], strict=False))
            return messages[::-1] if falls and times and times[0] > times[-1] else messages
    return messages


def is_chat(record: Any) -> bool:
    messages = _messages(record)
    return bool(messages) and all(map(is_message, messages))


def read_chat(place: str, record: Any) -> Dialog:
    """Read messages with roles, as OpenAI, ShareGPT, nanochat, ParlAI's conversations and others name them.

    System messages become the persona of the assistant, or of the second speaker if no speaker is called so. Tool
    calls, their results, and parts of a message that are not text are left out and counted in notes.
    """
    messages = _messages(record)
    if messages is None:
        raise ValueError(f"no list of messages, such as \"{LIST_KEYS[0]}\"")
    turns: list[Utterance] = []
    system, persona, others, notes = [], [], [], set()
    for number, message in enumerate(messages):
        if not is_message(message):
            raise ValueError(f"message {number} has no text, such as \"content\"")
        text, whole = _text(next((message[key] for key in TEXT_KEYS if key in message), None), number)
        role = _role(message, number)
        if not whole:
            notes.add("with parts that are not text and are left out")
        if role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
            notes.add("with tool calls that are left out")
        if role in TOOL_ROLES:
            continue
        said = []
        for line in text.split("\n"):  # ParlAI's tasks send personas as lines of a message
            if line.startswith(("your persona:", "partner's persona:")):
                (persona if line.startswith("your") else others).append(line.partition(":")[2])
            else:
                said.append(line)
        turns.append(Utterance(role, "\n".join(said)))
    spoken = [turn.speaker in SYSTEM_ROLES for turn in turns if turn.text.strip()]
    if len({turn.speaker for turn in turns if turn.speaker not in SYSTEM_ROLES}) > 1 or not any(
            after and not before for before, after in zip(spoken, spoken[1:], strict=False)):
        system = [turn for turn in turns if turn.speaker in SYSTEM_ROLES]  # otherwise the system itself answers
        turns = [turn for turn in turns if turn.speaker not in SYSTEM_ROLES]
    persona += [turn.text for turn in system]
    if any(turn.text.strip() for turn in system):
        notes.add("with a system message")
    if len({turn.speaker for turn in turns}) > 2:  # several spellings of two roles
        turns = [turn._replace(speaker=_usual_role(turn.speaker)) for turn in turns]
    return _with_personas(Dialog(place, turns, notes=tuple(sorted(notes))), record, split_sentences("\n".join(persona)),
                          split_sentences("\n".join(others)))


def _usual_role(role: object) -> object:
    """Return "user" or "assistant" for another spelling of it; other roles stay as they are."""
    if role in USER_ROLES:
        return "user"
    return "assistant" if isinstance(role, str) and (role in ASSISTANTS or role.startswith("gpt")) else role


def _role(message: dict, number: int) -> Any:
    """Return the speaker of message ``number``; without a role the two speakers alternate."""
    for key in ROLE_KEYS:
        value = message.get(key)
        if isinstance(value, dict):
            value = value.get("role") or value.get("name")
        if isinstance(value, str) and value.strip():
            return value.strip().casefold()
        if isinstance(value, int):
            return value
    if any(key in message for key in ROLE_KEYS):
        raise ValueError(f"message {number} has an empty role")
    return number % 2


def _text(value: object, number: int, depth: int = 0) -> tuple[str, bool]:
    """Return the text of a message's content, and whether all of the content is text."""
    if depth > DEEPEST:
        raise ValueError(f"message {number} is nested too deeply")
    if value is None:
        return "", True
    if isinstance(value, str):
        return value, True
    if isinstance(value, dict):
        inner = next((value[key] for key in TEXT_KEYS if key in value), None)
        return _text(inner, number, depth + 1) if inner is not None else ("", False)
    if isinstance(value, list):
        parts = [_text(part, number, depth + 1) for part in value]
        return " ".join(text for text, _ in parts if text), all(whole for _, whole in parts)
    raise ValueError(f"message {number} is {'true or false' if isinstance(value, bool) else 'a number'}, not text")


def _with_personas(dialog: Dialog, record: Any, persona: list[str], others: Sequence[str] = (),
                   system: tuple[str, ...] = SYSTEM_KEYS) -> Dialog:
    """Add the personas that a record names to its dialog, besides those found already.

    ``persona``: sentences about the answering speaker; ``others``: about the other one; ``system``: the keys at which
    the record may have a system message.
    """
    personas, notes = {}, set(dialog.notes)
    speakers = list(dict.fromkeys(one.speaker for one in dialog.utterances if one.text.strip()))
    answering = answering_speaker(dialog.utterances)
    if isinstance(record, dict):
        for key in system:
            if isinstance(record.get(key), str) and record[key].strip():
                persona = [*split_sentences(record[key]), *persona]
                notes.add("with a system message")
        named = next((record[key] for key in PERSONA_KEYS if record.get(key)), None)
        if named is not None:
            two = parse_personas(named)
            by_name = {str(name).strip().casefold(): one for name, one in zip(named, two, strict=False)} \
                if isinstance(named, dict) else {}
            notes.add("with a persona")
            if by_name and by_name.keys() <= {str(who) for who in speakers}:
                personas = {who: by_name[str(who)] for who in speakers if by_name.get(str(who))}
            elif len(two) == 1:
                persona = [*two[0], *persona]
            else:
                personas = {speaker: one for speaker, one in zip(speakers, two, strict=False) if one}

    if persona and answering is not None:
        personas[answering] = [*personas.get(answering, []), *persona]
    other = next((speaker for speaker in speakers if speaker != answering), None)
    if others and other is not None:
        personas[other] = [*personas.get(other, []), *others]
    return dialog._replace(personas=personas, notes=tuple(sorted(notes)))


def parse_personas(value: object, depth: int = 0) -> list[list[str]]:
    """Return the one or two personas in a JSON value, each a list of sentences; the opening speaker's is the first.

    ``value``: a string, a list of sentences, or a list or object of two of these. Raises ``ValueError`` otherwise.
    """
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, str):
        return [split_sentences(value)]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return [[sentence for one in value for sentence in split_sentences(one)]]
    if isinstance(value, list) and 1 <= len(value) <= 2 and depth < DEEPEST:
        two = [parse_personas(one, depth + 1) for one in value]
        if all(len(one) == 1 for one in two):
            return [one[0] for one in two]
    raise ValueError("the persona is neither a list of sentences nor two of them")


def read_persona(text: str, name: str) -> list[str]:
    """Return the sentences of a persona that is written as lines or as JSON: a list, an entry, or another record.

    Of a dialog's two personas the second speaker's is taken. Raises `InputError` for other JSON; ``name`` stands for
    the text in messages.
    """
    if not re.match(r'\s*(\[\s*["\[]|\[\s*\]|\{\s*["}])', text):
        return split_sentences(text)
    value = JsonReader(iter([text]), name).only_value()
    if isinstance(value, dict):
        named = next((value[key] for key in (*PERSONA_KEYS, *SYSTEM_KEYS) if key in value), None)
        if named is None and is_chat(value):
            found = read_chat("", value).personas
            named = next(iter(found.values()), [])
        if named is None:
            raise InputError(f"{name}: is {describe_record(value)}, without a persona; write "
                             "{\"personality\": [\"i …\", …]} or one sentence per line")
        value = named
    try:
        return parse_personas(value)[-1]
    except ValueError:
        raise InputError(f"{name}: is not a list of sentences; write [\"i …\", …] or one sentence per line") from None


# ------------------------------------------------------------------------------------------------------ other shapes


def read_own(place: str, record: Any) -> Dialog:
    """Read ``{"personas": [["i …"], ["i …"]], "turns": ["hi !", …]}``, with ``speakers`` if they do not alternate."""
    if not isinstance(record, dict) or "turns" not in record:
        raise ValueError("no \"turns\"")
    dialog = checked_dialog(place, record.get("personas", []), record["turns"], record.get("speakers"))
    if not any(record.get(key) for key in PERSONA_KEYS[1:]):
        return dialog
    two = parse_personas(next(record[key] for key in PERSONA_KEYS[1:] if record.get(key)))
    return dialog._replace(personas={1: two[0]} if len(two) == 1 else dict(enumerate(two)))


def read_strings(place: str, record: Any) -> Dialog:
    """Read a list of utterances, or an object with one and perhaps a ``response``; two speakers alternate."""
    said = record
    if isinstance(record, dict):
        keys = (*LIST_KEYS, "history", "context")
        said = next((record[key] for key in keys if isinstance(record.get(key), list)), None)
        if isinstance(said, list) and said and all(isinstance(one, list) for one in said):  # a list of exchanges
            said = list(chain.from_iterable(said))
    if isinstance(record, dict) and said is None and _is_data(record):
        said = record["data"]
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise ValueError("no list of utterances")
    if isinstance(record, dict) and (reply := _first_text(record, REPLY_KEYS)):
        said = [*said, reply]
    speakers: list = [index % 2 for index in range(len(said))]
    named = record.get("speakers") if isinstance(record, dict) else None
    if isinstance(named, list) and len(named) == len(said) and all(isinstance(who, str | int) for who in named):
        speakers = [str(who).strip().casefold() for who in named]
    return _with_personas(Dialog(place, [Utterance(*turn) for turn in zip(speakers, said, strict=True)]), record, [],
                          system=SYSTEM_KEYS[1:])


def _is_data(record: dict) -> bool:
    """Return whether a record has its utterances under ``data``, as in UltraChat."""
    said = record.get("data")
    return isinstance(said, list) and len(said) > 1 and all(isinstance(one, str) for one in said)


def _first_text(record: dict, keys: Iterable[str]) -> str:
    """Return the record's first non-empty string at one of ``keys``, or ""."""
    return next((record[key] for key in keys if isinstance(record.get(key), str) and record[key].strip()), "")


def read_pair(place: str, record: Any) -> Dialog:
    """Read a prompt and its reply, by whatever names: instruction and output, question and answer, and so on.

    Alpaca's ``input`` and Dolly's ``context`` go with the ``instruction``; earlier exchanges, ``history``, come before.
    Prompt and completion may be lists of messages.
    """
    keys = pair_keys(record) or pair_keys(record, empty=True)
    if not keys:
        raise ValueError("no prompt and reply, such as \"instruction\" and \"output\"")
    prompt, reply = (_plain(record[key]) for key in keys)
    if isinstance(prompt, list) or isinstance(reply, list):
        parts = [part if isinstance(part, list) else [{"role": role, "content": part}]
                 for part, role in ((prompt, "user"), (reply, "assistant"))]
        return read_chat(place, {**record, "messages": [*parts[0], *parts[1]]})
    more = [record[key] for key in FURTHER_KEYS.get(keys[0], ()) if isinstance(record.get(key), str)]
    if isinstance(prompt, str):
        prompt = "\n".join(filter(None, (prompt, *more)))
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(one, list) and len(one) == 2 for one in history):
        raise ValueError("history is not a list of exchanges, two strings each")
    said = [*map(_plain, chain.from_iterable(history)), prompt, reply]
    if not all(isinstance(text, str) for text in said):
        raise ValueError(f"{keys[0]} or {keys[1]} is not text")
    return _with_personas(Dialog(place, [Utterance(index % 2, text) for index, text in enumerate(said)]), record, [])


def pair_keys(record: Any, empty: bool = False) -> tuple[str, str] | None:
    """Return the keys of a record's prompt and reply, or None. ``empty``: both may be numbers or missing values."""
    if not isinstance(record, dict):
        return None
    prompt, reply = (next((key for key in keys if isinstance(record.get(key), (str, list))), None)
                     for keys in (PROMPT_KEYS, REPLY_KEYS))
    if bool(prompt) != bool(reply) or empty:  # one of them may be a number or a missing value
        prompt, reply = (found or next((key for key in keys if key in record and isinstance(_plain(record[key]), str)),
                                       None) for found, keys in ((prompt, PROMPT_KEYS), (reply, REPLY_KEYS)))
    return (prompt, reply) if prompt and reply else None


def _plain(value: object) -> Any:
    """Convert a number to text and a missing value of a table to an empty text; return other values unchanged."""
    if value is None or value != value:
        return ""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# The marks that chat templates write after each utterance and around the dialog.
END_OF_TURN = re.compile(r"<\|(?:im_end|eot_id|end|end_of_text|begin_of_text|endoftext)\|>|<end_of_turn>|</?s>|"
                         r"<[be]os>")


def read_transcript(place: str, record: Any) -> Dialog:
    """Read a dialog that is one string: lines such as ``Anna: hello``, ChatML's marks, or an utterance per line."""
    text = record if isinstance(record, str) else _first_text(record, (*LIST_KEYS, "transcript", "text"))
    text = re.sub(r"(\[INST\]\s*)<<SYS>>(.*?)<</SYS>>", r"<|system|>\2\1", text, flags=re.DOTALL)  # as in Llama 2
    before, *marked = MARKED.split(text)
    step = MARKED.groups + 1
    if len(marked) > step:
        by = {"[INST]": "user", "[/INST]": "assistant"}
        messages = [{"role": by.get(who.upper(), who), "content": END_OF_TURN.sub("", said)} for who, said in (
            (next(filter(None, marked[n:n + step - 1])), marked[n + step - 1]) for n in range(0, len(marked), step))]
        return read_chat(place, messages)._replace(notes=())
    said = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    if share_of(said, LABELLED.fullmatch) >= 0.5:
        return _with_personas(labelled_dialog(place, said), record, [])._replace(notes=())
    return _with_personas(Dialog(place, [Utterance(index % 2, line) for index, line in enumerate(said)]), record, [])


def is_turn(record: Any) -> bool:
    """Return whether a record is one turn of an entry, as in some tables of PERSONA-CHAT."""
    return isinstance(record, dict) and all(isinstance(record.get(key), list) and record[key] and all(
        isinstance(text, str) for text in record[key]) for key in ("history", "candidates"))


def is_entry(record: Any) -> bool:
    """Return whether a record is an entry of the data format."""
    turns = record.get("utterances") if isinstance(record, dict) else None
    return isinstance(turns, list) and any(isinstance(turn, dict) and "candidates" in turn for turn in turns)


def read_entry(place: str, record: Any) -> Dialog:
    """Read an entry of the data format, or one turn of it, as tables made from PERSONA-CHAT have it."""
    turns = record.get("utterances") or [record]
    *_, last = turns
    said = [*last["history"], last["candidates"][-1]]
    distractors = {len(turn["history"]): tuple(turn["candidates"][:-1]) for turn in turns}
    return Dialog(place, [Utterance(index % 2, text, distractors.get(index, ())) for index, text in enumerate(said)],
                  {len(last["history"]) % 2: record.get("personality", [])}, len(last["history"]) % 2)


def _are_strings(value: object) -> bool:
    """Return whether a value is a list of strings, or of lists of strings."""
    return isinstance(value, list) and bool(value) and (all(isinstance(one, str) for one in value) or all(
        isinstance(one, list) and one and all(isinstance(text, str) for text in one) for one in value))


def shape_of(record: Any) -> Shape | None:
    """Return the shape of a record, or None if it has none of the known ones.

    Raises ``ValueError`` if it is data for another purpose.
    """
    if isinstance(record, list):
        if record and all(isinstance(one, str) for one in record):
            return Shape("lists of utterances", read_strings)
        return Shape("lists of messages", read_chat) if is_chat(record) else None
    if not isinstance(record, dict):
        return None
    if "chosen" in record and "rejected" in record:
        raise ValueError("it is a preference between two replies; python -m feedback.reward --pairs reads these")
    if isinstance(record.get("turns"), list) and not any(isinstance(one, (dict, list)) for one in record["turns"]):
        return Shape("own JSON lines", read_own)
    if is_entry(record) or is_turn(record):
        return Shape("entries", read_entry)
    if is_chat(record):
        key = _list_key(record)
        messages = record[key]
        nested = isinstance(messages[0], list)
        name = {"messages": "OpenAI messages", "conversations": "ShareGPT"}.get(key, "messages")
        return Shape("ParlAI conversations" if nested else name, read_chat)
    if _is_data(record) or any(_are_strings(record.get(key)) for key in LIST_KEYS):
        return Shape("lists of utterances", read_strings)
    if _first_text(record, REPLY_KEYS) and any(
            _are_strings(record.get(key)) and isinstance(record[key][0], str) for key in ("history", "context")):
        return Shape("lists of utterances", read_strings)
    if pair_keys(record):
        return Shape("Alpaca" if "instruction" in record else "pairs of prompt and reply", read_pair)
    if text := _first_text(record, (*LIST_KEYS, "transcript")):
        return Shape("transcripts", read_transcript)
    text = _first_text(record, ("text",))
    if len(MARKED.findall(text)) > 1 or "\n" in text.strip() and share_of(
            text.split("\n"), LABELLED.fullmatch) >= 0.5:
        return Shape("transcripts", read_transcript)
    return None


def is_record(value: Any) -> bool:
    """Return whether a value holds one dialog."""
    try:
        return shape_of(value) is not None
    except ValueError:
        return True


PYTHON_STRING = re.compile(r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")\s*(?=.)""", re.DOTALL)
LONGEST_LIST = 1 << 20  # characters


def parse_list(text: str) -> list | None:
    """Parse a list in the notation of JSON, Python or NumPy (without commas); return None for other text."""
    text = text.strip()
    if not text.startswith("[") or len(text) > LONGEST_LIST:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(PYTHON_STRING.sub(lambda one: one[0] + "," * (text[one.end()] in "'\""), text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list) else None


def lower_keys(value: object, depth: int = 0) -> object:
    """Return a record with all keys in lower case."""
    if isinstance(value, dict) and depth < DEEPEST:
        return {key.casefold(): lower_keys(inner, depth + 1) for key, inner in value.items()}
    return [lower_keys(inner, depth + 1) for inner in value] if isinstance(value, list) and depth < DEEPEST else value


def describe_record(record: Any) -> str:
    """Describe a record in a few words."""
    if is_message(record) and any(key in record for key in ROLE_KEYS):
        return "one message, not a list of a dialog's messages"
    if isinstance(record, dict):
        return "an object of " + (", ".join(repr(key[:40]) for key in list(record)[:6]) or "nothing")
    if isinstance(record, list):
        return f"a list of {len(record)}"
    return "a string" if isinstance(record, str) else "a number or nothing"
