"""People's own records: JSON of any shape that chats, instructions and dialogs are kept in, tables, Parquet.

A reader yields a file's dialogs as `Dialog`. A record is what stands for one dialog: an element of a JSON list, a line
of JSON lines, a row.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from cli import InputError, short
from corpora import LONGEST_LINE, JsonReader, open_data, read_lines, read_pieces
from dialogs import Dialog, Utterance
from releases import checked_dialog, split_sentences
from texts import ASSISTANTS, LABELLED, answering_speaker, labelled_dialog, read_sample, share_of

LIST_KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "utterances", "turns",
             "chat", "contents", "items", "talk", "script")
TEXT_KEYS = ("content", "value", "text", "utterance", "message", "body", "parts", "sentence", "msg")
ROLE_KEYS = ("role", "from", "speaker", "author", "sender", "user", "agent", "speaker_id", "participant", "who", "name",
             "id")
SYSTEM_ROLES = {"system", "developer", "context"}
TOOL_ROLES = {"tool", "tools", "function", "function_call", "function-call", "observation", "ipython", "tool_call",
              "tool_calls", "tool_response", "tool_result", "environment"}
USER_ROLES = {"user", "human", "prompter", "customer", "client"}
PERSONA_KEYS = ("personas", "persona", "personality")  # in all places where a file says who somebody is
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
PROMPT_KEYS = ("instruction", "question", "prompt", "query", "input", "context", "user", "human")
REPLY_KEYS = ("output", "response", "answer", "completion", "reply", "target", "assistant", "bot", "gpt")
DEEPEST = 8  # lists within lists


class Shape(NamedTuple):
    """What a record looks like."""

    name: str  # for people
    read: Callable[[str, object], Dialog]  # of a place and a record; raises ``ValueError`` saying what is wrong


# ------------------------------------------------------------------------------------------------- lists of messages


def is_message(value: object) -> bool:
    """Whether this says something, or could."""
    return isinstance(value, dict) and any(key in value for key in (*TEXT_KEYS, "tool_calls", "function_call"))


def _messages(record: Any) -> list | None:
    """The list of messages of a record, nested ones end to end; None where there is none."""
    if isinstance(record, dict):
        record = next((record[key] for key in LIST_KEYS if isinstance(record.get(key), list)), None)
        exchanges = isinstance(record, list) and [None if is_message(one) else pair_keys(one) for one in record]
        if exchanges and all(exchanges):  # {"user": …, "assistant": …}
            return [{"role": key, "content": one[key]} for one, keys in zip(record, exchanges, strict=True)
                    for key in keys]
        if isinstance(record, list) and record and all(isinstance(one, list) for one in record):
            return list(chain.from_iterable(record))
    return record if isinstance(record, list) else None


def is_chat(record: Any) -> bool:
    messages = _messages(record)
    return bool(messages) and all(map(is_message, messages))


def read_chat(place: str, record: Any) -> Dialog:
    """Messages with roles, by whatever names: OpenAI's, ShareGPT's, nanochat's, ParlAI's conversations and others.

    What a system says is the persona of the assistant, or else of the second speaker. Of calls of tools and what these
    give back, and of parts of a message that are no text, nothing is read; they are counted.
    """
    messages = _messages(record)
    if messages is None:
        raise ValueError(f"no list of messages, such as \"{LIST_KEYS[0]}\"")
    turns: list[Utterance] = []
    persona, others, notes = [], [], set()
    for number, message in enumerate(messages):
        if not is_message(message):
            raise ValueError(f"message {number} has no text, such as \"content\"")
        text, whole = _text(next((message[key] for key in TEXT_KEYS if key in message), None), number)
        role = _role(message, number)
        if not whole:
            notes.add("with parts that are no text and are left out")
        if role in SYSTEM_ROLES:
            notes |= {"with a system message"} if text.strip() else set()
        if role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
            notes.add("with calls of tools that are left out")
        if role in TOOL_ROLES:
            continue
        said = []
        for line in text.split("\n"):  # as ParlAI's tasks send personas
            if line.startswith(("your persona:", "partner's persona:")):
                (persona if line.startswith("your") else others).append(line.partition(":")[2])
            else:
                said.append(line)
        if role in SYSTEM_ROLES:
            persona += said
        else:
            turns.append(Utterance(role, "\n".join(said)))
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
    """Return the speaker of a message; without a role the two speakers take turns."""
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
    """The text of a message's content, and whether that is all of it."""
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
    """Add the personas that a record names to its dialog: ``persona`` of the speaker who answers, ``others`` else.

    ``system``: under which keys a system message may stand.
    """
    personas, notes, speakers = {}, set(dialog.notes), list(dict.fromkeys(turn.speaker for turn in dialog.utterances
                                                                          if turn.text.strip()))
    answers = answering_speaker(dialog.utterances)
    if isinstance(record, dict):
        for key in system:
            if isinstance(record.get(key), str) and record[key].strip():
                persona = [*split_sentences(record[key]), *persona]
                notes.add("with a system message")
        named = next((record[key] for key in PERSONA_KEYS if record.get(key)), None)
        if named is not None:
            two = parse_personas(named)
            notes.add("with a persona")
            if len(two) == 1:
                persona = [*two[0], *persona]
            else:
                personas = {who: one for who, one in zip(speakers, two, strict=False) if one}
    if persona and answers is not None:
        personas[answers] = [*personas.get(answers, []), *persona]
    opens = next((who for who in speakers if who != answers), None)
    if others and opens is not None:
        personas[opens] = [*personas.get(opens, []), *others]
    return dialog._replace(personas=personas, notes=tuple(sorted(notes)))


def parse_personas(value: object, depth: int = 0) -> list[list[str]]:
    """Return the personas that a record names: one, or the opening speaker's and the answering one's.

    ``value``: a text, a list of sentences, two of either, or an object of two. Raises ``ValueError``.
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
    raise ValueError("the persona is no list of sentences, nor two of them")


def read_persona(text: str, name: str) -> list[str]:
    """The sentences of a persona: a line each; or JSON, a list of them, an entry, or an object that has one.

    Of two personas in a dialog, the second speaker's is taken. Raises `InputError` for other JSON; ``name``: of the
    text, for messages.
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
        raise InputError(f"{name}: is no list of sentences; write [\"i …\", …] or a sentence per line") from None


# ------------------------------------------------------------------------------------------------------ other shapes


def read_own(place: str, record: Any) -> Dialog:
    """``{"personas": [["i …"], ["i …"]], "turns": ["hi !", …]}``, with ``speakers`` if the two do not take turns."""
    if not isinstance(record, dict) or "turns" not in record:
        raise ValueError("no \"turns\"")
    dialog = checked_dialog(place, record.get("personas", []), record["turns"], record.get("speakers"))
    if not any(record.get(key) for key in PERSONA_KEYS[1:]):
        return dialog
    two = parse_personas(next(record[key] for key in PERSONA_KEYS[1:] if record.get(key)))
    return dialog._replace(personas={1: two[0]} if len(two) == 1 else dict(enumerate(two)))


def read_strings(place: str, record: Any) -> Dialog:
    """A list of utterances, or an object that has one; two people take turns. ``response`` and the like come last."""
    said = record
    if isinstance(record, dict):
        keys = (*LIST_KEYS, "history", "context")
        said = next((record[key] for key in keys if isinstance(record.get(key), list)), None)
        if isinstance(said, list) and said and all(isinstance(one, list) for one in said):  # exchanges
            said = list(chain.from_iterable(said))
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise ValueError("no list of utterances")
    if isinstance(record, dict) and (reply := _first_text(record, REPLY_KEYS)):
        said = [*said, reply]
    return _with_personas(Dialog(place, [Utterance(index % 2, text) for index, text in enumerate(said)]), record, [],
                          system=SYSTEM_KEYS[1:])


def _first_text(record: dict, keys: Iterable[str]) -> str:
    return next((record[key] for key in keys if isinstance(record.get(key), str) and record[key].strip()), "")


def read_pair(place: str, record: Any) -> Dialog:
    """An instruction and its output, a question and its answer, a prompt and its completion.

    Alpaca's ``input`` goes with its ``instruction``; earlier exchanges, ``history``, come before. Prompt and completion
    may be lists of messages.
    """
    keys = pair_keys(record)
    if not keys:
        raise ValueError("no prompt and reply, such as \"instruction\" and \"output\"")
    prompt, reply = (record[key] for key in keys)
    if isinstance(prompt, list) or isinstance(reply, list):
        parts = [part if isinstance(part, list) else [{"role": role, "content": part}]
                 for part, role in ((prompt, "user"), (reply, "assistant"))]
        return read_chat(place, {**record, "messages": [*parts[0], *parts[1]]})
    if keys[0] == "instruction" and isinstance(record.get("input"), str):
        prompt = "\n".join(filter(None, (prompt, record["input"])))
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(one, list) and len(one) == 2 for one in history):
        raise ValueError("history is no list of exchanges, two texts each")
    said = [*chain.from_iterable(history), prompt, reply]
    if not all(isinstance(text, str) for text in said):
        raise ValueError(f"{keys[0]} or {keys[1]} is not text")
    return _with_personas(Dialog(place, [Utterance(index % 2, text) for index, text in enumerate(said)]), record, [])


def pair_keys(record: Any) -> tuple[str, str] | None:
    """Under which keys a record has a prompt and a reply."""
    if not isinstance(record, dict):
        return None
    prompt, reply = (next((key for key in keys if isinstance(record.get(key), (str, list))), None)
                     for keys in (PROMPT_KEYS, REPLY_KEYS))
    return (prompt, reply) if prompt and reply else None


def read_transcript(place: str, record: Any) -> Dialog:
    """A whole dialog as one text: ``Anna: hello`` a line, ChatML's, or a line an utterance."""
    text = record if isinstance(record, str) else _first_text(record, (*LIST_KEYS, "transcript", "text"))
    marked = re.split(r"<\|im_start\|>\s*(\w+)\n|<\|(user|assistant|system)\|>\s*\n?|"
                      r"### ?(Human|Assistant|System|User|Instruction|Response): ?", text)
    if len(marked) > 4:
        messages = [{"role": next(filter(None, marked[n:n + 3])), "content": re.sub(r"<\|im_end\|>|</s>", "",
                                                                                  marked[n + 3])}
                    for n in range(1, len(marked), 4)]
        return read_chat(place, messages)._replace(notes=())
    said = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    if share_of(said, LABELLED.fullmatch) >= 0.5:
        return _with_personas(labelled_dialog(place, said), record, [])._replace(notes=())
    return _with_personas(Dialog(place, [Utterance(index % 2, line) for index, line in enumerate(said)]), record, [])


def is_entry(record: Any) -> bool:
    """Whether this is an entry of the data format."""
    turns = record.get("utterances") if isinstance(record, dict) else None
    return isinstance(turns, list) and any(isinstance(turn, dict) and "candidates" in turn for turn in turns)


def read_entry(place: str, record: Any) -> Dialog:
    """An entry of the data format; or one turn of it, as some tables of PERSONA-CHAT have."""
    turns = record.get("utterances") or [record]
    *_, last = turns
    said = [*last["history"], last["candidates"][-1]]
    distractors = {len(turn["history"]): tuple(turn["candidates"][:-1]) for turn in turns}
    return Dialog(place, [Utterance(index % 2, text, distractors.get(index, ())) for index, text in enumerate(said)],
                  {len(last["history"]) % 2: record.get("personality", [])}, len(last["history"]) % 2)


def _are_texts(value: object) -> bool:
    """Whether this is a list of texts, or of pairs of them."""
    return isinstance(value, list) and bool(value) and (all(isinstance(one, str) for one in value) or all(
        isinstance(one, list) and one and all(isinstance(text, str) for text in one) for one in value))


def shape_of(record: Any) -> Shape | None:
    """Which shape a record has; None: none that is known. Raises `ValueError` for what is data of another kind."""
    if isinstance(record, list):
        if record and all(isinstance(one, str) for one in record):
            return Shape("lists of utterances", read_strings)
        return Shape("lists of messages", read_chat) if is_chat(record) else None
    if not isinstance(record, dict):
        return None
    if "chosen" in record and "rejected" in record:
        raise ValueError("it is a preference between two replies, which python -m feedback.reward --pairs reads")
    if isinstance(record.get("turns"), list) and not any(isinstance(one, (dict, list)) for one in record["turns"]):
        return Shape("own JSON lines", read_own)
    if is_entry(record) or isinstance(record.get("history"), list) and isinstance(record.get("candidates"), list):
        return Shape("entries", read_entry)
    if is_chat(record):
        key = next(key for key in LIST_KEYS if isinstance(record.get(key), list))
        messages = record[key]
        nested = isinstance(messages[0], list)
        name = {"messages": "OpenAI messages", "conversations": "ShareGPT"}.get(key, "messages")
        return Shape("ParlAI conversations" if nested else name, read_chat)
    if any(_are_texts(record.get(key)) for key in LIST_KEYS) or _first_text(record, REPLY_KEYS) and any(
            _are_texts(record.get(key)) and isinstance(record[key][0], str) for key in ("history", "context")):
        return Shape("lists of utterances", read_strings)
    if pair_keys(record):
        return Shape("Alpaca" if "instruction" in record else "pairs of prompt and reply", read_pair)
    if text := _first_text(record, (*LIST_KEYS, "transcript")):
        return Shape("transcripts", read_transcript)
    if (text := _first_text(record, ("text",))) and (len(re.findall(
            r"<\|im_start\|>|<\|user\|>|<\|assistant\|>|### ?(?:Human|Assistant|User):", text)) > 1 or
            share_of(text.split("\n"), LABELLED.fullmatch) >= 0.5 and "\n" in text.strip()):
        return Shape("transcripts", read_transcript)
    return None


# ------------------------------------------------------------------------------------------------------ JSON files


WRAPPER_KEYS = ("data", "dialogs", "dialogues", "conversations", "items", "rows", "examples", "records", "chats")
SPLIT_NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid",
               "dev": "valid", "test": "test", "testing": "test"}


def is_record(value: object) -> bool:
    """Whether a value stands for one dialog."""
    try:
        return shape_of(value) is not None
    except ValueError:
        return True


def records(path: str | Path) -> Iterator[tuple[str | None, str, Any]]:
    """Split, place and value of each record of a JSON file: of lines, a list, objects one after the other, or what an
    object wraps, ``{"data": […]}`` or ``{"train": […], "valid": […]}``. The split is None where there is none.

    Raises `InputError` as `corpora.JsonReader`.
    """
    if read_sample(path)[:4] == b"PAR1":
        for number, record in enumerate(parquet_rows(path)):
            yield None, f"dialog {number}", record
        return
    if is_lines(path):
        for number, line in read_lines(path):
            if line.strip():
                yield None, f"line {number}", JsonReader(iter([line]), f"{path}: line {number}").only_value()
        return
    text = JsonReader(read_pieces(path), path)
    number = 0
    while letter := text.next_letter():
        if letter == "[":
            elements = text.elements()
            first = next(elements, None)
            alone = is_message(first) and not is_record(first) and any(key in first for key in ROLE_KEYS[:-1])
            if alone or isinstance(first, str):
                yield None, f"dialog {number}", [first, *elements]
                number += 1
                continue
            for value in chain([first] if first is not None else [], elements):
                yield None, f"dialog {number}", _row(value)
                number += 1
        else:
            value = text.value()
            for split, inner in _unwrapped(value):
                yield split, f"dialog {number}", inner
                number += 1


def parquet_rows(path: str | Path) -> Iterator[dict]:
    """The rows of a Parquet file as objects. Raises `InputError` without pyarrow, or when the file is damaged."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: is a Parquet file, which takes pyarrow to read; pip install pyarrow, or save the "
                         "data as JSON lines") from None
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: is no Parquet file that can be read ({short(str(error))}); write or "
                         "fetch it again") from None


def _row(value: object) -> Any:
    """What the hub's viewer wraps."""
    return value["row"] if isinstance(value, dict) and isinstance(value.get("row"), dict) else value


def _unwrapped(value: object) -> Iterator[tuple[str | None, object]]:
    """The records of a value: itself, the elements of its list, or of its lists by split, or its values by name."""
    if not isinstance(value, dict) or is_record(value) and not any(
            isinstance(value.get(key), list) and value[key] and is_record(value[key][0])
            and not is_message(value[key][0]) for key in WRAPPER_KEYS):
        yield None, value
        return
    found = False
    for key, inner in value.items():
        split = SPLIT_NAMES.get(key)
        if isinstance(inner, list) and (split or key in WRAPPER_KEYS):
            yield from ((split, _row(one)) for one in inner)
        elif is_record(inner):
            yield None, inner
        else:
            continue
        found = True
    if not found:
        yield None, value


def is_lines(path: str | Path) -> bool:
    """Whether each line of the file is a value of its own."""
    with open_data(path) as file:
        first = b"\n"
        while first and not first.strip():
            first = file.readline(LONGEST_LINE)
    try:
        value = JsonReader(iter([first.decode("utf-8-sig", "replace")]), path).only_value()
    except InputError as error:
        return any(what in str(error) for what in ("Extra data", "a number that long")) or (
            "nested too deeply" in str(error) and first[:1] == b"{")
    if isinstance(value, list):  # a dialog, or all of them
        return is_record(value)
    return isinstance(value, dict) and next(_unwrapped(value), (None, None))[1] is value


def peek(path: str | Path) -> tuple[str | None, object]:
    """The first record of a JSON file and its split, without the rest; (None, None) where that cannot be read."""
    try:
        if not is_lines(path):
            text = JsonReader(read_pieces(path), path)
            if text.next_letter() == "{":
                for key in text.members():
                    if text.next_letter() == "[":
                        first = next(text.elements(), None)
                        if key in SPLIT_NAMES:
                            return SPLIT_NAMES[key], _row(first)
                    break
        split, _, record = next(records(path), (None, None, None))
        return split, record
    except InputError:
        return None, None


def read_records(path: str | Path, wanted: str | None = None) -> Iterator[tuple[str | None, str, Dialog]]:
    """Split, name of the shape and dialog of each record. The first says which shape they all have.

    Raises `InputError` naming the first that has another one.
    """
    shape = None
    for split, place, record in records(path):
        counted = f"{place}, counted from 0," if place.startswith("dialog") else place
        try:
            shape = shape or shape_of(record)
            if not shape and isinstance(record, dict) and any(record.get(key) == [] for key in LIST_KEYS):
                yield split, "empty lists", Dialog(place, [])
                continue
            if not shape:
                raise InputError(
                    f"{path}: {counted} has no layout that can be read ({describe_record(record)}); "
                    'write {"personas": [["i …"], ["i …"]], "turns": ["…", "…"]}, or name the layout with --format')

            yield split, shape.name, shape.read(place, record)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"is not a dialog ({error})"
            cure = f"write it like the first of the file, which has the layout of {shape.name}" if shape else \
                'write {"personas": [["i …"], ["i …"]], "turns": ["…", "…"]}'
            raise InputError(f"{path}: {counted} {what}; {cure}") from None


def describe_record(record: Any) -> str:
    """What a record looks like, in a few words."""
    if is_message(record) and any(key in record for key in ROLE_KEYS):
        return "one message, where a list of a dialog's messages should be"
    if isinstance(record, dict):
        return "an object of " + (", ".join(repr(key[:40]) for key in list(record)[:6]) or "nothing")
    if isinstance(record, list):
        return f"a list of {len(record)}"
    return "a text" if isinstance(record, str) else "a number or nothing"
