"""Recognise the columns of a table, or the keys of a flat record, by their names in many languages.

This file knows names and the beginnings of files; it reads no file.
"""

import re

# The uses of columns, and the names by which a column is recognised; earlier names are preferred.
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
HEADLINE = "sep="  # a table from Excel may begin with this and the delimiter

def column_key(name: str) -> str:
    """Return a column's name in lower case, with underscores for spaces and punctuation."""
    return re.sub(r"[\s_./-]+", "_", name.strip().casefold().lstrip("\ufeff")).strip("_")


def find_delimiter(header: str) -> str:
    """Return the delimiter of a table with this first line: comma, tab, semicolon or ``|``."""
    outside = re.sub(r'"[^"]*"', "", header)
    return max(",\t;|", key=outside.count)


def find_columns(header: list[str]) -> dict[str, int]:
    """Return the column of each use in `COLUMN_NAMES` that the header has."""
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
    """Return the columns ``turn 1``, ``turn 2``, … in the order of their numbers; [] if there are fewer than two."""
    stems: dict[str, list[tuple[int, int]]] = {}
    for column, name in enumerate(map(column_key, header)):
        if (numbered := re.fullmatch(r"(\D*?)_?(\d{1,6})", name)) and numbered[1] in NUMBERED_STEMS:
            stems.setdefault(numbered[1], []).append((int(numbered[2]), column))
    best = max(stems.values(), key=len, default=[])
    return [column for _, column in sorted(best)] if len(best) > 1 else []


def further_prompts(header: list[str], prompt: int) -> list[int]:
    """Return the columns before the prompt, ``context/0``, ``context/1``, … (the newest first), in order of time."""
    names = [column_key(name) for name in header]
    found = {int(name.rpartition("_")[2]): column for column, name in enumerate(names)
             if re.fullmatch(rf"{re.escape(names[prompt])}_\d{{1,6}}", name)}
    return [found[number] for number in sorted(found, reverse=True)]


def is_row(record: object) -> bool:
    """Return whether a record is a row of a table: an exchange, a dialog, or one utterance of a named dialog.

    ``record``: a value of JSON.
    """
    if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
        return False
    names = [key for key, value in record.items() if isinstance(value, str | int) and not isinstance(value, bool)]
    columns = find_columns(names)
    return is_utterance(record) or {"prompt", "reply"} <= columns.keys() or len(numbered_columns(names)) > 1


def is_utterance(record: object) -> bool:
    """Return whether a value of JSON is one utterance of a named dialog."""
    if not isinstance(record, dict):
        return False
    names = [key for key, value in record.items() if isinstance(value, str | int)]
    return {"text", "dialog"} <= find_columns(names).keys() and not any(
        isinstance(value, list | dict) and value and key in COLUMN_NAMES["whole"].split()
        for key, value in record.items())


def is_table(lines: list[str], name: str) -> bool:
    """Return whether a file is a table.

    ``lines``: its first lines; ``name``: its name. A table is called .csv, has a header with known columns, or has rows
    of the same number of fields.
    """
    written = [line for line in lines if line.strip()]
    if written and written[0].startswith(HEADLINE):
        del written[0]
    if not written:
        return False
    delimiter = find_delimiter(written[0])
    header = [field.strip().strip('"') for field in written[0].split(delimiter)]
    columns = find_columns(header)
    known = {"prompt", "reply"} <= columns.keys() or {"text", "speaker"} <= columns.keys() or (
        {"text", "dialog"} <= columns.keys())
    fields = [line.split(delimiter) for line in written[1:]]
    again = any(len(row) == len(header) and any(row[at].strip() == header[at] for at in columns.values())
                for row in fields)  # a cell that repeats the column's name: the first line is no header
    if len(header) > 1 and known and not again and all(len(field) < 40 for field in header):
        return True
    return re.search(r"\.csv(\.gz)?$", name, re.IGNORECASE) is not None or (
        len(header) > 1 and delimiter != "\t" and len(written) > 2
        and all(re.fullmatch(r"\w[\w ]{0,30}\w?", field) for field in header) and f"{delimiter} " not in written[0]
        and all(line.count(delimiter) >= len(header) - 1 for line in written))
