"""People's tables of dialogs, CSV or TSV: an exchange, an utterance or a dialog per row, the columns found by name.

A reader yields a file's dialogs as `Dialog`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from cli import InputError, printable
from corpora import JsonReader, read_lines
from dialogs import Dialog, Utterance
from records import is_record, read_transcript, shape_of
from releases import read_rows, split_sentences
from texts import answering_speaker

# What columns are for, and how people call them, in the order in which names are looked for.
COLUMN_NAMES = {
    "prompt": """instruction question prompt query input context human user user_message q source statement request
        post customer message frage eingabe anfrage pregunta consulta entrada domanda richiesta pergunta
        vraag fråga spørgsmål spørsmål kysymys otázka pytanie kérdés soru întrebare вопрос запрос питання 问题
        問題 提问 输入 質問 入力 질문 입력 प्रश्न سؤال السؤال שאלה ερώτηση câu_hỏi pertanyaan""",
    "reply": """output answer response completion reply target assistant bot chatbot bot_response agent a gpt
        antwort ausgabe respuesta salida réponse reponse risposta resposta antwoord svar vastaus odpověď
        odpowiedź válasz cevap yanıt răspuns ответ відповідь 答案 回答 回复 输出 答え 応答 出力 답변 응답 출력
        उत्तर جواب الجواب תשובה απάντηση câu_trả_lời jawaban""",
    "text": """utterance text message content line sentence said words body äußerung nachricht satz texto mensaje
        mensagem texte énoncé messaggio testo bericht tekst viesti teksti реплика сообщение текст 内容 消息 文本
        発話 메시지""",
    "speaker": """speaker role from author sender name who user agent speaker_idx speaker_id participant character
        person sprecher rolle hablante rol locuteur rôle parlante ruolo falante spreker talare puhuja
        говорящий роль автор 说话人 角色 話者 화자""",
    "dialog": """dialog_id dialogue_id conversation_id conv_id session_id thread_id chat_id conversationid dialogueid
        dialogid sessionid threadid chatid dialog dialogue conversation conv session thread chat gespräch_id
        gespräch diálogo диалог 对话 对话id""",
    "persona": "persona personality personas system system_prompt persönlichkeit personalidad personnalité",
    "whole": "dialog dialogue conversation conversations messages transcript chat turns",
}
NUMBERED_STEMS = {"", "turn", "utterance", "utt", "message", "msg", "line", "sentence", "speaker", "person", "round",
                  "text"}

COLUMN_USES = tuple(kind for kind in COLUMN_NAMES if kind != "whole")


def column_key(name: str) -> str:
    """A column's name without what people write it with."""
    return re.sub(r"[\s_./-]+", "_", name.strip().casefold().lstrip("\ufeff")).strip("_")


def find_delimiter(first: str) -> str:
    """What divides the fields of a table whose first line this is."""
    outside = re.sub(r'"[^"]*"', "", first)
    return max(",\t;|", key=outside.count)


def find_columns(header: list[str]) -> dict[str, int]:
    """Which column is for what, of `COLUMN_NAMES`: the one whose name stands first there."""
    names = [column_key(name) for name in header]
    found: dict[str, int] = {}
    for kind, known in COLUMN_NAMES.items():
        taken = {found["prompt"], found["reply"]} if {"prompt", "reply"} <= found.keys() else set()
        for name in known.split():
            if name in names and names.index(name) not in taken:
                found[kind] = names.index(name)
                break
    return found


def numbered_columns(header: list[str]) -> list[int]:
    """Columns ``turn 1``, ``turn 2``, …: two or more of one name with numbers that rise."""
    stems: dict[str, list[tuple[int, int]]] = {}
    for column, name in enumerate(map(column_key, header)):
        if (numbered := re.fullmatch(r"(\D*?)_?(\d{1,6})", name)) and numbered[1] in NUMBERED_STEMS:
            stems.setdefault(numbered[1], []).append((int(numbered[2]), column))
    best = max(stems.values(), key=len, default=[])
    return [column for _, column in sorted(best)] if len(best) > 1 else []


def is_table(found: list[str], name: str) -> bool:
    """Whether a file is a table, by its name or how it begins: a header whose columns are known, or rows alike."""
    written = [line for line in found if line.strip()]
    if not written:
        return False
    divides = find_delimiter(written[0])
    header = [field.strip().strip('"') for field in written[0].split(divides)]
    columns = find_columns(header)
    known = {"prompt", "reply"} <= columns.keys() or {"text", "speaker"} <= columns.keys() or (
        {"text", "dialog"} <= columns.keys())
    if len(header) > 1 and known and all(len(field) < 40 for field in header):
        return True
    return re.search(r"\.csv(\.gz)?$", name, re.IGNORECASE) is not None or (
        len(header) > 1 and divides != "\t" and len(written) > 2
        and all(re.fullmatch(r"\w[\w ]{0,30}\w?", field) for field in header) and f"{divides} " not in written[0]
        and all(line.count(divides) >= len(header) - 1 for line in written))


def read_table(path: str | Path, columns: str = "") -> Iterator[Dialog]:
    """A table with a header: of prompts and replies, of utterances with speakers, or of whole dialogs.

    ``columns``: names or numbers, counted from 1, with commas between: the utterances of a row in order; or what they
    are for, ``prompt=…,reply=…,persona=…,dialog=…`` or ``text=…,speaker=…,dialog=…``. Rows of one ``dialog`` that
    follow each other are one. With numbers alone there is no header. Raises `InputError` when the columns are not
    found, or a row has more fields than the header.
    """
    first = next((line for _, line in read_lines(path) if line.strip()), "")
    rows = read_rows(path, find_delimiter(first))
    number, header = next(rows, (1, []))
    turns, uses = _columns(path, header, columns)
    if columns and all(one.strip().isdecimal() for one in re.sub(r"\w+=", "", columns).split(",")):
        rows = read_rows(path, find_delimiter(first))  # columns by number: the first row is no header
    numbers = (row for row in rows if _check_row(path, *row, header))
    if turns:
        for number, row in numbers:
            yield _make_dialog(f"line {number}", [Utterance(index % 2, _field(row, column))
                                                  for index, column in enumerate(turns)], row, uses)
    elif "whole" in uses:
        for number, row in numbers:
            text = _field(row, uses["whole"])
            value: Any = text
            if text.lstrip()[:1] in ("[", "{"):
                value = JsonReader(iter([text]), f"{path}: line {number}").only_value()
            if not isinstance(value, str) and not is_record(value):
                raise InputError(f"{path}: line {number} holds JSON that is no dialog; write a list of messages or of "
                                 "utterances")
            dialog = read_transcript("", value) if isinstance(value, str) else shape_of(value).read("", value)
            yield _make_dialog(f"line {number}", dialog.utterances, row, uses, dialog.personas)
    else:
        def of_dialog(numbered: tuple[int, list[str]]) -> object:
            if "dialog" in uses:
                return _field(numbered[1], uses["dialog"])
            return numbered[0] if "reply" in uses else 0  # an exchange each; or one dialog, all of them

        for _, group in groupby(numbers, key=of_dialog):
            of_one = list(group)
            yield _make_dialog(f"line {of_one[0][0]}", [turn for row in of_one for turn in _turns(row[1], uses)],
                               of_one[0][1], uses)


def _turns(row: list[str], uses: dict[str, int]) -> Iterator[Utterance]:
    if "reply" in uses:
        yield Utterance("prompt", _field(row, uses["prompt"]))
        yield Utterance("reply", _field(row, uses["reply"]))
    else:
        who = _field(row, uses["speaker"]).strip().casefold() if "speaker" in uses else None
        yield Utterance(who, _field(row, uses["text"]))


def _make_dialog(place: str, turns: list[Utterance], row: list[str], uses: dict[str, int],
                 personas: Mapping | None = None) -> Dialog:
    """A dialog with the persona that its first row names. Without speakers the two take turns."""
    if turns and all(turn.speaker is None for turn in turns):
        turns = [turn._replace(speaker=index % 2) for index, turn in enumerate(turns)]
    system = [turn for turn in turns if turn.speaker in ("system", "developer")]
    turns = [turn for turn in turns if turn not in system]
    persona = [*split_sentences(_field(row, uses["persona"]) if "persona" in uses else ""),
               *(sentence for turn in system for sentence in split_sentences(turn.text))]
    who = answering_speaker(turns)
    personas = {**(personas or {}), **({who: persona} if persona and who is not None else {})}
    return Dialog(place, turns, personas, notes=("with a persona",) if persona else ())


def _field(row: list[str], column: int) -> str:
    return row[column] if column < len(row) else ""


def _check_row(path: str | Path, number: int, row: list[str], header: list[str]) -> bool:
    if len(row) > len(header) and any(map(str.strip, row[len(header):])):
        raise InputError(f"{path}: line {number} has {len(row)} fields, not {len(header)}; put those that hold what "
                         "divides them into quotation marks")
    return True


def _columns(path: str | Path, header: list[str], columns: str) -> tuple[list[int], dict[str, int]]:
    """The columns of a row's utterances in order, or else which column is for what."""
    names = [column_key(name) for name in header]

    def column(wanted: str) -> int:
        if wanted.strip().isdecimal() and 1 <= int(wanted) <= len(header):
            return int(wanted) - 1
        if column_key(wanted) in names:
            return names.index(column_key(wanted))
        raise InputError(f"{path}: has no column {wanted.strip()!r} for --columns, only {_quoted(header)}; name those, "
                         "or their numbers, counted from 1")

    if columns:
        asked = [one.partition("=") for one in columns.split(",")]
        if not any(equals for _, equals, _ in asked):
            if len(asked) < 2:
                raise InputError(f"{path}: --columns {columns} names one column; name two or more, commas between")
            return [column(name) for name, _, _ in asked], {}
        uses = {kind.strip(): column(name) for kind, _, name in asked}
        if unknown := uses.keys() - {*COLUMN_USES, "whole"}:
            raise InputError(f"{path}: --columns {columns}: {sorted(unknown)[0]!r} is no use of a column; known are "
                             f"{', '.join(COLUMN_NAMES)}")
    else:
        uses = find_columns(header)
        if turns := [] if "reply" in uses and "prompt" in uses else numbered_columns(header):
            return turns, uses
    if {"prompt", "reply"} <= uses.keys():
        return [], {kind: at for kind, at in uses.items() if kind in ("prompt", "reply", "persona")
                    or kind == "dialog" and (columns or names[at].endswith(("id", "nummer")))}
    if "text" in uses and {"speaker", "dialog"} & uses.keys():
        return [], {kind: at for kind, at in uses.items() if kind in ("text", "speaker", "dialog", "persona")}
    if "whole" in uses:
        return [], {kind: at for kind, at in uses.items() if kind in ("whole", "persona")}
    raise InputError(f"{path}: its columns {_quoted(header)} are none that are known to hold prompts and replies, or "
                     "utterances and speakers; say which do, such as --columns question,answer")


def _quoted(header: Iterable[str]) -> str:
    return ", ".join(repr(printable(name.strip()[:30])) for name in list(header)[:8]) or "(none)"

