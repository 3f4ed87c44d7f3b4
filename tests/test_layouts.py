"""Test people's own files: dialogs come back from every layout, and other files are described in the error."""

import csv
import io
import json
import logging
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import SAMPLE, SHARED, error_line, make_checkpoint, script, shared, the_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli import InputError
from corpora import read_corpus
from readers import read_any
from releases import RELEASES

# Words without a meaning in any layout. Two people take turns, and each says something.
WORDS = st.lists(st.sampled_from([
    "well", "the boat", "isn't", "café", "3 o'clock", "\"so\"", "a , b", "(laughs)", "100 %", "你好", "<3", "a/b",
    "x; y", "end.", "ok !"]), min_size=1, max_size=4).map(" ".join)
SAID = st.lists(WORDS.filter(lambda text: text[0].isalpha()), min_size=2, max_size=6)
DIALOGS = st.lists(SAID, min_size=2, max_size=5)
PERSONAS = st.lists(st.sampled_from(["i own a boat .", "i'm 30 .", "my cat : she sleeps ."]), max_size=3, unique=True)


def messages(said: list[str], persona: list[str], roles=("user", "assistant"), keys=("role", "content"),
             system="system") -> list[dict]:
    first = [{keys[0]: system, keys[1]: "\n".join(persona)}] if persona else []
    return first + [{keys[0]: roles[index % 2], keys[1]: text} for index, text in enumerate(said)]


def sharegpt(said: list[str], persona: list[str]) -> dict:
    return {"id": "x", "conversations": messages(said, persona, ("human", "gpt"), ("from", "value"))}


def table(rows: list[list[str]], delimiter: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


def jsonl(values: list) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def lined(dialogs: list[list[str]], line) -> str:
    return "\n\n".join("\n".join(line(n, text) for n, text in enumerate(said)) for said in dialogs) + "\n"


# Layout → (a function that writes dialogs and the answerer's personas, whether the layout keeps personas).
WRITERS = {
    "openai.jsonl": (lambda d, p: jsonl([{"messages": messages(s, q)} for s, q in zip(d, p, strict=True)]), True),
    "openai.json": (lambda d, p: json.dumps([{"messages": messages(s, q)} for s, q in zip(d, p, strict=True)]), True),
    "openai_pretty.json": (lambda d, p: json.dumps({"data": [{"messages": messages(s, q)} for s, q in
                                                             zip(d, p, strict=True)]}, indent=2), True),
    "parts.jsonl": (lambda d, p: jsonl([{"messages": [
        {**one, "content": [{"type": "text", "text": one["content"]}, {"type": "image_url", "image_url": {}}]}
        for one in messages(s, q, system="developer")]} for s, q in zip(d, p, strict=True)]), True),
    "sharegpt.json": (lambda d, p: json.dumps([sharegpt(s, q) for s, q in zip(d, p, strict=True)], indent=1), True),
    "sharegpt.jsonl": (lambda d, p: jsonl([sharegpt(s, q) for s, q in zip(d, p, strict=True)]), True),
    "sharegpt_system.jsonl": (lambda d, p: jsonl([{**sharegpt(s, []), "system": "\n".join(q)} for s, q in
                                                  zip(d, p, strict=True)]), True),
    "nanochat.jsonl": (lambda d, p: jsonl([messages(s, q) for s, q in zip(d, p, strict=True)]), True),
    "nanochat.json": (lambda d, p: json.dumps([messages(s, q) for s, q in zip(d, p, strict=True)]), True),
    "speakers.jsonl": (lambda d, p: jsonl([
        {"persona": q, "dialogue": messages(s, [], ("Ann", "Bob"), ("speaker", "text"))}
        for s, q in zip(d, p, strict=True)]), True),
    "strings.jsonl": (lambda d, p: jsonl([{"dialog": s, "personality": q} for s, q in zip(d, p, strict=True)]), True),
    "lists.json": (lambda d, p: json.dumps(d, indent=1), False),
    "own.jsonl": (lambda d, p: jsonl([{"turns": s, "persona": q} for s, q in zip(d, p, strict=True)]), True),
    "own.json": (lambda d, p: json.dumps([{"turns": s, "personas": [[], q]} for s, q in zip(d, p, strict=True)]), True),
    "parlai_conversations.jsonl": (lambda d, p: jsonl([{"dialog": [
        messages(s, [], ("partner1", "partner2"), ("id", "text"))[n:n + 2] for n in range(0, len(s), 2)]}
        for s in d]), False),
    "transcript.json": (lambda d, p: json.dumps([{"dialogue": "\r\n".join(
        f"{'Amanda' if n % 2 else 'Tom H.'}: {text}" for n, text in enumerate(s))} for s in d]), False),
    "plain.txt": (lambda d, p: lined(d, lambda n, text: text), False),
    "numbered.txt": (lambda d, p: lined(d, lambda n, text: f"{n + 1} {text}").replace("\n\n", "\n"), False),
    "numbered_points.txt": (lambda d, p: lined(d, lambda n, text: f"{n + 1}. {text}"), False),
    "labels.txt": (lambda d, p: lined(d, lambda n, text: f"{'AB'[n % 2]}: {text}"), False),
    "labels_system.txt": (lambda d, p: "\n\n".join("\n".join([*(f"System: {one}" for one in q), *(
        f"{('User', 'Assistant')[n % 2]}: {text}" for n, text in enumerate(s))]) for s, q in zip(d, p, strict=True)),
        True),
    "wide_colons.txt": (lambda d, p: lined(d, lambda n, text: f"{'甲乙'[n % 2]}：{text}"), False),
    "messenger.txt": (lambda d, p: lined(
        d, lambda n, text: f"[12/31/20, 10:15:0{n}] {('Ann B', 'Tom')[n % 2]}: {text}"), False),
    "tabs.tsv": (lambda d, p: "".join("\t".join(s) + "\n" for s in d), False),
    "numbered_tabs.tsv": (lambda d, p: "".join(f"{n}\t" + "\t".join(s) + "\n" for n, s in enumerate(d, 1)), False),
    "slash_t.txt": (lambda d, p: "".join("</t>".join(s) + "</t>\n" for s in d), False),
    "eos.txt": (lambda d, p: "".join(" EOS ".join(s) + "\n" for s in d), False),
    "columns.csv": (lambda d, p: table([[f"turn {n}" for n in range(1, 7)], *(s + [""] * (6 - len(s)) for s in d)]),
                    False),
    "utterances.csv": (lambda d, p: table([["text", "speaker", "conversation_id"], *(
        [text, "AB"[n % 2], f"c{number}"] for number, s in enumerate(d) for n, text in enumerate(s))]), False),
    "utterances.tsv": (lambda d, p: table([["dialog_id", "role", "message"], *(
        [f"c{number}", "AB"[n % 2], text] for number, s in enumerate(d) for n, text in enumerate(s))], "\t"), False),
    "faces.txt": (lambda d, p: lined(d, lambda n, text: f"{'🤖🙂'[n % 2]}: {text}"), False),
    "persons.txt": (lambda d, p: lined(d, lambda n, text: f"#Person{n % 2 + 1}#: {text}"), False),
    "remarks.txt": (lambda d, p: lined(
        d, lambda n, text: f"{('Customer No. 7 (new)', 'Agent #1 (Ann)')[n % 2]}: {text}"), False),
    "clock.txt": (lambda d, p: lined(d, lambda n, text: f"10:1{n} PM {('Ann B', 'Tom')[n % 2]}: {text}"), False),
    "names_above.txt": (lambda d, p: "---\n".join("".join(
        f"{('You', 'ChatGPT')[n % 2]} said:\n{text}\n" for n, text in enumerate(s)) for s in d), False),
    "names_before_tabs.txt": (lambda d, p: lined(d, lambda n, text: f"{('Ann', 'Bob')[n % 2]}\t{text}"), False),
    "tags.txt": (lambda d, p: "".join("".join(
        f"<speaker{n % 2 + 1}> {text} " for n, text in enumerate(s)) + "\n" for s in d), False),
    "chatml.txt": (lambda d, p: "\n".join("".join(
        f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages(s, q))
        for s, q in zip(d, p, strict=True)), True),
    "llama3.jsonl": (lambda d, p: jsonl([{"text": "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{one['role']}<|end_header_id|>\n\n{one['content']}<|eot_id|>" for one in messages(s, q))}
        for s, q in zip(d, p, strict=True)]), True),
    "gemma.jsonl": (lambda d, p: jsonl([{"text": "<bos>" + "".join(
        f"<start_of_turn>{('user', 'model')[n % 2]}\n{text}<end_of_turn>\n" for n, text in enumerate(s))} for s in d]),
        False),
    "capitals.jsonl": (lambda d, p: jsonl([{"ID": 1, "Messages": messages(s, q, keys=("Role", "Content"))}
                                           for s, q in zip(d, p, strict=True)]), True),
    "by_name.json": (lambda d, p: json.dumps({"dialogs": {f"d{n}": messages(s, q) for n, (s, q) in enumerate(
        zip(d, p, strict=True))}}), True),
    "written.jsonl": (lambda d, p: jsonl([{"messages": json.dumps(messages(s, q))} for s, q in zip(d, p, strict=True)]),
                      True),
    "rows.jsonl": (lambda d, p: jsonl([{"conversationId": number, "speaker": "AB"[n % 2], "text": text}
                                       for number, s in enumerate(d) for n, text in enumerate(s)]), False),
    "rows.json": (lambda d, p: json.dumps([{"speaker": "AB"[n % 2], "text": text, "dialog_id": number}
                                           for number, s in enumerate(d) for n, text in enumerate(s)]), False),
    "apart.csv": (lambda d, p: table([["dialog_id", "speaker", "text"], *([str(number), "AB"[n % 2], s[n]]
                                      for n in range(6) for number, s in enumerate(d) if n < len(s))]), False),
    "python.csv": (lambda d, p: table([["act", "dialog"], *(["[1 2]", repr(s)] for s in d)]), False),
    "numpy.csv": (lambda d, p: table([["dialog"], *(["[" + "\n ".join(map(repr, s)) + "]"] for s in d)]), False),
    "messages.parquet": (lambda d, p: parquet([{"id": 1, "messages": messages(s, q)} for s, q in
                                               zip(d, p, strict=True)]), True),
    "strings.parquet": (lambda d, p: parquet([{"dialog": s, "emotion": [0] * len(s)} for s in d]), False),
    "rows.parquet": (lambda d, p: parquet([{"dialog_id": number, "utterance_idx": n, "utterance": text}
                                           for number, s in enumerate(d) for n, text in enumerate(s)]), False),
    "whole.csv": (lambda d, p: table([["id", "dialogue"], *(
        [str(number), "\n".join(f"{'AB'[n % 2]}: {text}" for n, text in enumerate(s))] for number, s in enumerate(d))]),
        False),
}


def learnt(path: Path) -> list[tuple]:
    """Return each reply that a file teaches, with its persona and the utterances before it."""
    (found,) = read_any(path).values()
    return sorted(((tuple(entry["personality"]), tuple(turn["history"]), turn["candidates"][-1]) for entry in found
                   for turn in entry["utterances"]), key=repr)


def to_learn(dialogs: list[list[str]], personas: list[list[str]]) -> list[tuple]:
    return sorted(((tuple(persona) if place % 2 else (), tuple(said[:place]), said[place])
                   for said, persona in zip(dialogs, personas, strict=True) for place in range(1, len(said))), key=repr)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_layouts_read_what_was_written(tmp_path_factory, name, data):
    write, keeps = WRITERS[name]
    dialogs = data.draw(DIALOGS)
    personas = [data.draw(PERSONAS) if keeps else [] for _ in dialogs]
    path = tmp_path_factory.mktemp("layout") / name
    ends = data.draw(st.sampled_from(["\n", "\r\n"])) if path.suffix == ".txt" else "\n"
    written = write(dialogs, personas)
    if isinstance(written, str):
        written = (data.draw(st.sampled_from(["", "\ufeff"])) + written.replace("\n", ends)).encode()
    path.write_bytes(written)
    assert learnt(path) == to_learn(dialogs, personas)


@settings(max_examples=20)
@given(DIALOGS, PERSONAS, st.sampled_from([
    ("instruction", "output"), ("prompt", "completion"), ("question", "answer"), ("input", "response"),
    ("query", "reply")]), st.sampled_from(["json", "jsonl", "csv", "tsv"]))
def test_prompts_and_replies_under_many_names(tmp_path_factory, dialogs, persona, names, kind):
    pairs = [said[:2] for said in dialogs]
    path = tmp_path_factory.mktemp("pairs") / f"own.{kind}"
    rows = [{names[1]: reply, "persona": "\n".join(persona), names[0]: prompt} for prompt, reply in pairs]
    path.write_text({"json": lambda: json.dumps(rows), "jsonl": lambda: jsonl(rows)}.get(kind, lambda: table(
        [list(rows[0]), *(list(row.values()) for row in rows)], "\t" if kind == "tsv" else ","))())
    assert learnt(path) == to_learn(pairs, [persona] * len(pairs))


@settings(max_examples=20)
@given(DIALOGS, PERSONAS, st.booleans())
def test_parlai_fields(tmp_path_factory, dialogs, persona, blank):
    """Write ParlAI's fields, with the persona in the first text; a field or an empty line ends an episode."""
    dialogs = [said[:len(said) // 2 * 2] for said in dialogs]
    text = ""
    for said in dialogs:
        for n in range(0, len(said), 2):
            who = "".join(f"your persona: {one}\\n" for one in persona) if n == 0 else ""
            done = "\tepisode_done:True" if n + 2 == len(said) and not blank else ""
            text += f"text:{who}{said[n]}\tlabels:{said[n + 1]}\tlabel_candidates:no|{said[n + 1]}|yes{done}\n"
        text += "\n" * blank
    path = tmp_path_factory.mktemp("parlai") / "own.txt"
    path.write_text(text)
    (found,) = read_any(path).values()
    found = list(found)
    assert sorted(((entry["personality"], turn["history"], turn["candidates"]) for entry in found for turn in
                   entry["utterances"]), key=repr) == sorted(
        ((persona, said[:n], ["no", "yes", said[n]]) for said in dialogs for n in range(1, len(said), 2)), key=repr)


# ------------------------------------------------------------------------------------------------------ the variants


CHAT = [{"role": "user", "content": "weather ?"}, {"role": "assistant", "content": "20 ."}]


@pytest.mark.parametrize("name, content, wanted", [
    ("tools.jsonl", jsonl([{"messages": [
        CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "20"}, CHAT[1],
        {"role": "user", "content": ""}]}]), [([], ["weather ?"], "20 .")]),
    ("system.jsonl", jsonl([[*CHAT, {"role": "system", "content": "be kind ."}]]),
     [(["be kind ."], ["weather ?"], "20 .")]),
    ("opens.jsonl", jsonl([{"messages": [{"role": "system", "content": "p"}, {"role": "assistant", "content": "hi ."},
                                         *CHAT]}]),
     [(["p"], ["hi .", "weather ?"], "20 ."), ([], ["hi ."], "weather ?")]),
    ("spellings.jsonl", jsonl([{"conversations": [{"from": "human", "value": "a"}, {"from": "chatgpt", "value": "b"},
                                                  {"from": "user", "value": "c"}, {"from": "gpt", "value": "d"}]}]),
     [([], ["a"], "b"), ([], ["a", "b"], "c"), ([], ["a", "b", "c"], "d")]),
    ("twice.jsonl", jsonl([[CHAT[0], CHAT[0], CHAT[1], CHAT[1]]]), [([], ["weather ? weather ?"], "20 . 20 .")]),
    ("gemini.jsonl", jsonl([{"contents": [{"role": "user", "parts": [{"text": "a"}]},
                                          {"role": "model", "parts": [{"text": "b"}]}]}]), [([], ["a"], "b")]),
    ("alpaca.json", json.dumps([{"instruction": "add", "input": "1 and 2", "output": "3", "history": [["a", "b"]]}]),
     [([], ["a"], "b"), ([], ["a", "b"], "add 1 and 2"), ([], ["a", "b", "add 1 and 2"], "3")]),
    ("prompts.jsonl", jsonl([{"prompt": CHAT[:1], "completion": CHAT[1:]}]), [([], ["weather ?"], "20 .")]),
    ("guanaco.jsonl", jsonl([{"text": "### Human: a### Assistant: b\nc"}]), [([], ["a"], "b c")]),
    ("chatml.jsonl", jsonl([{"text": "<|im_start|>system\np<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
                                     "<|im_start|>assistant\nb<|im_end|>\n"}]), [(["p"], ["a"], "b")]),
    ("empty.jsonl", jsonl([{"conversations": []}, {"conversations": [
        {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]), [([], ["a"], "b")]),
    ("entries.jsonl", jsonl([{"personality": ["p"], "utterances": [{"history": ["a"], "candidates": ["x", "b"]}]}]),
     [(["p"], ["a"], "b")]),
    ("pretty.json", "\n".join(json.dumps({"messages": CHAT}, indent=2) for _ in range(2)),
     [([], ["weather ?"], "20 .")] * 2),
    ("semicolons.csv", "id;Antwort;Frage\n1;ich ;wer ?\n2;\"a;\nb\";c\n",
     [([], ["c"], "a; b"), ([], ["wer ?"], "ich")]),
    ("chinese.csv", "\ufeff问题,答案\r\n你好,\"好,\"\r\n", [([], ["你好"], "好,")]),
    ("double.txt", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n---\nHuman: e\n\nAssistant: f\n",
     [([], ["a"], "b"), ([], ["a", "b"], "c"), ([], ["a", "b", "c"], "d"), ([], ["e"], "f")]),
    ("more.txt", "Ann: a\nand more\nBob: note: b\nAnn: c\n", [([], ["a and more"], "note: b"),
                                                             ([], ["a and more", "note: b"], "c")]),
    ("names_in_numbers.txt", "1 A: a\n2 A: b\n3 B: c\n1 A: d\n2 B: e\n", [([], ["a b"], "c"), ([], ["d"], "e")]),
    ("irc.txt", "<ann> a\n<bob> b\n", [([], ["a"], "b")]),
    ("bold.txt", "**User:** a\n**Bot:** b\n", [([], ["a"], "b")]),
    ("dashes.txt", "- a\n- b\n\n— c\n— d\n", [([], ["a"], "b"), ([], ["c"], "d")]),
    ("ubuntu.txt", "a __eou__ b __eou__ __eot__ c __eou__ __eot__\n", [([], ["a b"], "c")]),
    ("ends.txt", "a EOS b EOS\nc EOS d EOS e\n", [([], ["a"], "b"), ([], ["c"], "d"), ([], ["c", "d"], "e")]),
    ("dialogpt.tsv", "0.0 a EOS 1.0 b\t1.0 c\n", [([], ["a"], "b"), ([], ["a", "b"], "c")]),
    ("people.txt", "1: a\n2: b\n1: c\n2: d\n", [([], ["a"], "b"), ([], ["a", "b"], "c"), ([], ["a", "b", "c"], "d")]),
    ("exchanges.jsonl", jsonl([{"conversation": [["a", "b"], ["c", "d"]]}]),
     [([], ["a"], "b"), ([], ["a", "b"], "c"), ([], ["a", "b", "c"], "d")]),
    ("named.jsonl", jsonl([{"context": ["a", "b", "c"], "response": "d", "system": "GPT-2"}]),
     [([], ["a"], "b"), ([], ["a", "b"], "c"), ([], ["a", "b", "c"], "d")]),
    ("turns.jsonl", jsonl([{"persona": ["p"], "history": history, "candidates": ["x", reply]} for history, reply in (
        (["a"], "b"), (["a", "b", "c"], "d"), (["e"], "f"))]),
     [(["p"], ["a"], "b"), (["p"], ["a", "b", "c"], "d"), (["p"], ["e"], "f")]),
    ("turns.parquet", parquet([{"personality": ["p"], "history": ["a"], "candidates": ["x", "b"]}]),
     [(["p"], ["a"], "b")]),
    ("entries.parquet", parquet([{"personality": ["p"], "utterances": [{"history": ["a"], "candidates": ["x", "b"]}]}]),
     [(["p"], ["a"], "b")]),
    ("pairs.parquet", parquet([{"Frage": "a", "Antwort": "b"}, {"Frage": "c", "Antwort": None}]), [([], ["a"], "b")]),
    ("by_speaker.jsonl", jsonl([{"personas": {"Bob": ["i bob"], "Ann": ["i ann"]}, "dialogue": [
        {"speaker": "Ann", "text": "a"}, {"speaker": "Bob", "text": "b"}, {"speaker": "Ann", "text": "c"}]}]),
     [(["i bob"], ["a"], "b"), (["i ann"], ["a", "b"], "c")]),
    ("speakers.jsonl", jsonl([{"dialogue": ["a", "b", "c"], "speakers": ["X", "X", "Y"]}]), [([], ["a b"], "c")]),
    ("system_answers.json", json.dumps([{"turns": [{"speaker": "USER", "utterance": "a"}, {
        "speaker": "SYSTEM", "utterance": "b"}]}]), [([], ["a"], "b")]),
    ("newest_first.json", json.dumps({"participants": [{"name": "A"}, {"name": "B"}], "messages": [
        {"sender_name": who, "timestamp_ms": time, "content": text}
        for who, time, text in (("B", 3, "c"), ("A", 2, "b"), ("A", 1, "a"))]}), [([], ["a b"], "c")]),
    ("flags.jsonl", jsonl([{"messages": [{"is_user": True, "text": "a"}, {"is_user": False, "text": "b"},
                                         {"is_user": False, "text": "c"}]}]),
     [([], ["a"], "b c")]),
    ("data.jsonl", jsonl([{"id": "0", "data": ["a", "b"]}]), [([], ["a"], "b")]),
    ("chat_messages.json", json.dumps([{"uuid": "1", "my_list": [
        {"text": "a", "sender": "human"}, {"text": "b", "sender": "assistant"}]}]), [([], ["a"], "b")]),
    ("exchanges_system.jsonl", jsonl([{"conversation": [{"system": "p", "input": "a", "output": "b"}]}]),
     [(["p"], ["a"], "b")]),
    ("context.jsonl", jsonl([{"context": [{"id": "context", "text": "your persona: p\nyour persona: q"}], "dialog": [
        [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}]]}]), [(["p", "q"], ["a"], "b")]),
    ("dolly.jsonl", jsonl([{"instruction": "i", "context": "x", "response": "r", "category": "c"}]),
     [([], ["i x"], "r")]),
    ("alpaca.csv", "instruction,input,output\ni,x,o\n", [([], ["i x"], "o")]),
    ("nothing.jsonl",
     '{"question": "a", "answer": 2}\n{"question": "c", "answer": null}\n{"question": 3, "answer": NaN}',
     [([], ["a"], "2")]),
    ("excel.csv", "sep=;\nquestion;answer\na;b\n", [([], ["a"], "b")]),
    ("before.csv", "response,context,context/0,context/1\nd,c,b,a\nh,g,,\n",
     [([], ["a"], "b"), ([], ["a", "b"], "c"), ([], ["a", "b", "c"], "d"), ([], ["g"], "h")]),
    ("llama2.jsonl", jsonl([{
        "text": "<s>[INST] <<SYS>>\np\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>"}]),
     [(["p"], ["a"], "b"), ([], ["a", "b"], "c"), (["p"], ["a", "b", "c"], "d")]),
    ("brackets.txt", "[1] a\n[2] b\n[1] c\n[2] d\n", [([], ["a"], "b"), ([], ["c"], "d")]),
    ("numbered_names.txt", "Q1: a\nA1: b\nQ2: c\nA2: d\n",
     [([], ["a"], "b"), ([], ["a", "b"], "c"), ([], ["a", "b", "c"], "d")]),
    ("colons.txt", "Ann: a\nNote: x\nBob: b\n\nAnn: c\nBob: d\n", [([], ["a Note: x"], "b"), ([], ["c"], "d")]),
    ("messenger.txt", "12/31/20, 10:15 PM - Messages are encrypted.\n12/31/20, 10:15 PM - Ann: a\nand more\n"
                      "12/31/20, 10:16 PM - Ann changed the subject\n12/31/20, 10:16 PM - Bob: b\n",
     [([], ["a and more"], "b")]),
    ("persona_lines.txt", "your persona: p\nyour persona: q\na\nb\n\nc\nd\n",
     [(["p", "q"], ["a"], "b"), ([], ["c"], "d")]),
    ("other_ends.txt", "a <eot> b\nc <EOT> d\n", [([], ["a"], "b"), ([], ["c"], "d")]),
    ("cr.txt", "a\rb\r\rc\rd\r", [([], ["a"], "b"), ([], ["c"], "d")]),
])
def test_variants(tmp_path, name, content, wanted):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert learnt(tmp_path / name) == sorted([(tuple(who), tuple(history), gold) for who, history, gold in wanted],
                                             key=repr)


def test_the_log_names_layout_and_omissions(tmp_path, caplog):
    (tmp_path / "own.jsonl").write_text(jsonl([sharegpt(["a", "b"], ["p"]), sharegpt(["c", "d"], [])] * 60))
    with caplog.at_level(logging.INFO):
        learnt(tmp_path / "own.jsonl")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'own.jsonl'}: ShareGPT, 120 dialogs, 60 with a system message"]
    (tmp_path / "tools.jsonl").write_text(jsonl([[*CHAT, {"role": "tool", "content": "x"}]]))
    with caplog.at_level(logging.INFO):
        learnt(tmp_path / "tools.jsonl")
    assert caplog.messages[-1].endswith("lists of messages, 1 dialog, 1 with tool calls that are left out")


@pytest.mark.parametrize("name, content, complaint", [
    ("own.csv", "foo,bar\na,b\n", r"its columns 'foo', 'bar' have no known names .*--columns question,answer"),
    ("own.csv", "question,answer\na,b,c\n", "line 2 has 3 fields, not 2; put quotation marks"),
    ("own.csv", 'question,answer\n"a,b\n', "line 2 is not a row of a table .*quotation marks"),
    ("own.jsonl", jsonl([{"text": "no dialog"}]),
     r"line 1 has no layout that can be read \(an object of 'text'\); write"),
    ("own.jsonl", jsonl(CHAT), r"line 1 .*\(one message, not a list of a dialog's messages\)"),
    ("own.jsonl", jsonl([{"messages": CHAT}, {"messages": 3}]), "line 2 is not a dialog .*OpenAI messages"),
    ("own.jsonl", jsonl([{"messages": CHAT}, {"messages": [{"role": "user", "content": 3}]}]),
     r"line 2 is not a dialog \(message 0 is a number, not text\)"),
    ("own.jsonl", jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "a preference between two replies.*reward"),
    ("own.txt", "1\n00:00:01,000 --> 00:00:02,000\nhi\n\n2\n00:00:03,000 --> 00:00:04,000\nyou\n",
     "looks like subtitles"),
    ("own.txt", "<html><body>\n<p>hi</p>\n", "is XML or HTML"),
    ("own.txt", "conversations:\n- - hi\n  - hello\n- - a\n", "looks like YAML"),
    ("own.txt", "a\n\nb\n\nc\n\nd\n", "has an empty line after every line"),
    ("own.txt", "text:a\tlabels:b\ntext:c\tlabels:d\nwhat ?\n", "line 3 has no text:"),
    ("own.py", "import os\n\nfor name in names:\n    print(name)\n", "looks like source code"),
    ("own.pdf", "%PDF-1.4\n", "is a PDF; save"), ("own.txt", "hi\nhello\n".encode("utf-16"), "save the file as UTF-8"),
    ("own.txt", "hi\nhello\n".encode("utf-16-le"), "save the file as UTF-8"),
    ("own.txt", "hi\ncafé\n".encode("cp1252"), "line 2 is not UTF-8 .*; save the file as UTF-8"),
    ("own.parquet", b"PAR1....PAR1", "Parquet"), ("own.parquet", parquet([{"x": 1}]), r"dialog 0.*an object of 'x'"),
    ("own.yaml", "- role: user\n  content: a\n- role: assistant\n  content: b\n", "looks like YAML"),
    ("own.rtf", "{\\rtf1\\ansi\n{\\fonttbl}\nhi\\par\n}", "is an RTF document"),
    ("own.zst", b"\x28\xb5\x2f\xfd\x04", "is packed with zstd"),
    ("own.csv", 'dialog,x\n"[1, 2]",3\n', "has JSON that is not a dialog"),
])
def test_unreadable_files_are_described(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as refusal:
        learnt(tmp_path / name)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / name}: ") and re.search(complaint, message) and "\n" not in message


def test_format_and_columns_override_detection(tmp_path):
    (tmp_path / "own.csv").write_text("foo,who,bar\na,x,b\nc,y,d\n")
    (found,) = read_any(tmp_path / "own.csv", columns="bar,foo").values()
    assert [turn["candidates"] for entry in found for turn in entry["utterances"]] == [["a"], ["c"]]
    (found,) = read_any(tmp_path / "own.csv", columns="prompt=foo,reply=bar,persona=who").values()
    assert [entry["personality"] for entry in found] == [["x"], ["y"]]
    (found,) = read_any(tmp_path / "own.csv", columns="1,3").values()  # numbers mean that there is no header
    assert [turn["candidates"] for entry in found for turn in entry["utterances"]] == [["bar"], ["b"], ["d"]]
    with pytest.raises(InputError, match="has no column 'baz' for --columns, only 'foo', 'who', 'bar'"):
        list(read_any(tmp_path / "own.csv", columns="foo,baz")[None])
    for name, content in (("own.jsonl", jsonl([{"foo": 1, "bar": "b"}]).encode()),
                          ("own.parquet", parquet([{"foo": 1, "bar": "b"}]))):
        (tmp_path / name).write_bytes(content)
        (found,) = read_any(tmp_path / name, columns="prompt=foo,reply=bar").values()
        assert [(turn["history"], turn["candidates"]) for entry in found for turn in entry["utterances"]] == [(
            ["1"], ["b"])]
    (tmp_path / "own.txt").write_text("A: a\nB: b\n")
    (found,) = read_any(tmp_path / "own.txt", "plain").values()
    assert [turn["candidates"] for entry in found for turn in entry["utterances"]] == [["B: b"]]
    assert "no layout is called 'docx'; the known ones are json, plain" in error_line(
        "example_entry.py", "--convert", "own.txt", "out.json", "--format", "docx", cwd=tmp_path)


def test_splits_of_files_and_folders_are_kept(tmp_path):
    chat = {"messages": CHAT}
    (tmp_path / "own.json").write_text(json.dumps({"train": [chat] * 2, "validation": [chat]}))
    assert {split: len(list(found)) for split, found in read_any(tmp_path / "own.json").items()} == {
        "train": 2, "valid": 1}
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps([{"messages": CHAT}] * 3))  # BlendedSkillTalk's name, another layout
    (folder / "dev.csv").write_text("question,answer\na,b\n")
    assert {split: len(list(found)) for split, found in read_any(folder).items()} == {"train": 3, "valid": 1}
    (folder / "valid.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="contains dev.csv and valid.txt, both for valid; keep one"):
        read_any(folder)


CASES = {  # file in shared/cases: (number of entries; the first entry's persona, first utterance and first reply)
    "parlai_export.txt": (3, [], "hello , who are you ?", "i am a baker ."), "parlai_format.txt": (
        2, [], "hello , who are you ?", "i am a baker ."), "tab_dialog_a_line.tsv": (
        8, [], "good morning 0", "morning ! did you sleep 0 hours ?"), "dialogpt.tsv": (
        8, [], "hi there 0", "hello , how is day 0 ?"), "t_delimited.txt": (
        3, [], "hey , how are you ?", "good , and you ?"), "qa.csv": (
        3, [], "hi, who is there ?", "it is me, the baker ."), "speaker_labels.txt": (
        4, [], "is the shop open ? i need bread .", "yes , until six ."), "numbered.txt": (
        4, [], "hello , are you well ?", "quite well , what is new ?"), "numbered_blank.txt": (
        4, [], "hello , are you well ?", "quite well , what is new ?"), "openai_messages.jsonl": (
        3, ["i grow tomatoes ."], "what do you grow , first ?", "tomatoes , first ."), "sharegpt.json": (
        3, [], "who are you 0 ?", "a gardener 0 ."), "sharegpt.jsonl": (
        3, [], "who are you 0 ?", "a gardener 0 ."), "nanochat.jsonl": (
        3, [], "who made you , 0 ?", "a small team , 0 ."), "alpaca.json": (3, [], "name colour 0", "blue 0"),
    "own_list.json": (2, ["i swim ."], "hi", "hello"), "parlai_conversations.jsonl": (6, [], "hi 0", "hello 0"),
    "bom_crlf.jsonl": (2, [], "hi", "hello"), "bom_crlf.txt": (3, [], "hi there .", "hello you ."),
    "cr_only.txt": (3, [], "hi there .", "hello you ."), "ours_key_after.jsonl": (2, ["i bake ."], "hi", "hello"),
}


@pytest.mark.parametrize("name", CASES)
def test_shared_cases(name):
    (found,) = read_any(shared(f"cases/{name}")).values()
    first, *rest = found
    turn = first["utterances"][0]
    assert (1 + len(rest), first["personality"], turn["history"][0], turn["candidates"][-1]) == CASES[name]


def test_shared_case_folders():
    shared("cases")
    for name, counts in (("parlai_folder", [2, 1]), ("tab_folder", [6, 4]), ("csv_folder", [2, 1])):
        assert [len(list(found)) for found in read_any(SHARED / "cases" / name).values()] == counts
    *_, last = read_any(SHARED / "cases" / "parlai_export.txt")[None]
    assert last["personality"] == ["i own a boat ."] and last["utterances"][0]["history"] == ["hi ."]


def test_the_check_suggests_converting(tmp_path):
    (tmp_path / "own.jsonl").write_text(jsonl([{"messages": CHAT}]))
    (tmp_path / "own.csv").write_text("question,answer\na,b\n")
    (tmp_path / "own.txt").write_text("hello there\nhi you\n")
    for name, what in (("own.jsonl", "OpenAI messages"), ("own.csv", "a table"), ("own.txt", "plain text")):
        line = error_line("example_entry.py", name, cwd=tmp_path)
        assert f"{name}: is not in the data format but looks like {what}; convert it with --convert {name}" in line
    (tmp_path / "own.json").write_text("hello there\n")
    assert "correct the JSON there" in error_line("example_entry.py", "own.json", cwd=tmp_path)


def test_chats_are_converted(tmp_path):
    (tmp_path / "own.jsonl").write_text(jsonl([{"messages": messages([f"what {n} ?", f"well {n} ."], ["i ski ."])}
                                               for n in range(20)]))
    said = script("example_entry.py", "--convert", "own.jsonl", "own.json", cwd=tmp_path)
    assert "OpenAI messages, 20 dialogs, 20 with a system message" in script.stderr
    assert "train: 17 entries (17 with a persona)" in said and "own.json: well-formed" in said
    assert all(entry["personality"] == ["i ski ."] for found in read_corpus(tmp_path / "own.json").values()
               for entry in found)


# ---------------------------------------------------------------------------------------------------------- releases


def test_synthetic_persona_chat(tmp_path):
    for split, count in (("train", 3), ("valid", 1)):
        (tmp_path / f"Synthetic-Persona-Chat_{split}.csv").write_text(table([
            ["user 1 personas", "user 2 personas", "Best Generated Conversation"],
            *([f"I ski.\nI bake, {n}.", "I swim.", f"User 1: Hi {n}\nUser 2: Hello,\nyou\nUser 1: So?"] for n in
              range(count))]))
    corpus = {split: list(found) for split, found in read_any(tmp_path).items()}
    assert {split: len(found) for split, found in corpus.items()} == {"train": 6, "valid": 2}
    assert corpus["train"][:2] == [
        {"personality": ["I swim."], "utterances": [{"history": ["Hi 0"], "candidates": ["Hello, you"]}]},
        {"personality": ["I ski.", "I bake, 0."], "utterances": [
            {"history": ["Hi 0", "Hello, you"], "candidates": ["So?"]}]}]


def test_topical_chat(tmp_path):
    turns = [{"message": text, "agent": f"agent_{who}", "sentiment": "Happy", "knowledge_source": ["FS1"]}
             for text, who in (("Hi", 1), ("Hello", 2), ("Well", 2), ("Yes", 1))]
    dialog = {"article_url": "https://…", "config": "C", "content": turns, "conversation_rating": {}}
    (tmp_path / "conversations").mkdir()
    for name, count in (("train", 3), ("valid_freq", 1), ("valid_rare", 2), ("test_freq", 1), ("test_rare", 1)):
        (tmp_path / "conversations" / f"{name}.json").write_text(json.dumps({f"t_{n}": dialog for n in range(count)}))
    corpus = {split: list(found) for split, found in read_any(tmp_path).items()}
    assert {split: len(found) for split, found in corpus.items()} == {"train": 6, "valid": 6, "test": 4}
    assert corpus["train"][0]["utterances"] == [{"history": ["Hi"], "candidates": ["Hello Well"]}]
    (found,) = read_any(tmp_path / "conversations" / "train.json").values()
    assert len(list(found)) == 6


def test_multi_session_chat(tmp_path):
    session = {"personas": [["I open."], ["I answer."]],
               "dialog": [{"text": "Hi", "id": "Speaker 1"}, {"text": "Back?"}],
               "previous_dialogs": [{"personas": [[], []], "dialog": [{"text": "old"}]}], "metadata": {}}
    for number, splits in ((2, ("train", "valid")), (5, ("valid",))):
        folder = tmp_path / "msc" / "msc_dialogue" / f"session_{number}"
        folder.mkdir(parents=True)
        for split in splits:
            (folder / f"{split}.txt").write_text(jsonl([session] * number))
    (tmp_path / "msc" / "msc_personasummary" / "session_1").mkdir(parents=True)
    (tmp_path / "msc" / "msc_personasummary" / "session_1" / "train.txt").write_text("{}\n")
    corpus = {split: list(found) for split, found in read_any(tmp_path).items()}
    assert {split: len(found) for split, found in corpus.items()} == {"train": 2, "valid": 7}
    assert corpus["train"][0] == {
        "personality": ["I answer."], "utterances": [{"history": ["Hi"], "candidates": ["Back?"]}]}


def test_corpora_are_listed_with_size_and_licence(tmp_path):
    said = script("train.py", "--dataset", cwd=tmp_path)
    assert len(said.splitlines()) == len(RELEASES) and "CC BY-NC-SA 4.0" in said and "10,784 dialogs" in said
    assert "no corpus is called 'dialydailog'" in error_line("train.py", "--dataset", "dialydailog", cwd=tmp_path)


# -------------------------------------------------------------------------------------- personas, and the data of a run


ENTRY = {"personality": ["i keep two goats .", "i live on a hill ."]}


@pytest.mark.parametrize("content", [
    json.dumps(ENTRY["personality"], indent=1), json.dumps(ENTRY), json.dumps({"persona": ENTRY["personality"]}),
    json.dumps({"personas": [["i swim ."], ENTRY["personality"]], "turns": ["a", "b"]}),
    json.dumps({"personas": ENTRY["personality"]}), json.dumps({"persona": "\n".join(ENTRY["personality"])}),
    json.dumps({"messages": messages(["a", "b"], ENTRY["personality"])}), "\r\n\n".join(ENTRY["personality"])])
def test_personas_in_any_format(tmp_path, trained, content):
    (tmp_path / "who.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
    for personality in ("who.json", content):
        said = script("interact.py", "--model_checkpoint", trained, "--personality", personality, cwd=tmp_path)
        assert said.splitlines()[:3] == ["Personality:", "  i keep two goats .", "  i live on a hill ."]


def test_unreadable_personas_say_why(tmp_path, trained):
    def told(content: bytes) -> str:
        (tmp_path / "who.txt").write_bytes(content)
        return error_line("interact.py", "--model_checkpoint", trained, "--personality", "who.txt", cwd=tmp_path)

    for encoding in ("cp1252", "utf-16", "utf-16-le", "utf-16-be"):
        assert told("i own a café .\n".encode(encoding)).endswith("; save the file as UTF-8"), encoding
    assert "--personality who.txt: is an object of 'train', without a persona; write" in told(b'{"train": []}')
    assert "--personality who.txt: not JSON at line 1, column 2" in told(b'["i ski')


def test_a_run_remembers_its_data(tmp_path):
    (tmp_path / "own.jsonl").write_text(jsonl([{"messages": messages([f"what {n} ?", f"well {n} .", "so ?", "yes ."],
                                                                     [f"i am {n % 2} ."])} for n in range(12)]))
    checkpoint = make_checkpoint(tmp_path / "one-layer", n_layer=1, n_embd=32)
    script("train.py", "--dataset_path", "own.jsonl", "--target", "second", "--train_frac", 0.75, "--model_checkpoint",
           checkpoint, "--n_epochs", 1, cwd=tmp_path)
    run = the_run(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    said = script("convai_evaluation.py", "--model_checkpoint", run, "--predictions", "turns.jsonl", cwd=elsewhere)
    assert "Hits@1" in said and f"what the run was trained on, {tmp_path / 'own.jsonl'}" in script.stderr
    assert len((elsewhere / "turns.jsonl").read_text().splitlines()) == 6  # three dialogs, two turns each
    said = script("interact.py", "--model_checkpoint", run, cwd=elsewhere)
    assert said.splitlines()[1] in ("  i am 0 .", "  i am 1 .")
    said = script("convai_evaluation.py", "--model_checkpoint", run, "--dataset_path", SAMPLE, "--eval_type", "ppl",
                  cwd=elsewhere)  # a flag overrides the remembered data
    assert "was trained on" not in script.stderr
    (tmp_path / "own.jsonl").unlink()
    line = error_line("interact.py", "--model_checkpoint", run, cwd=elsewhere)
    assert "own.jsonl, which is not here; say which data with --dataset_path" in line
    config = json.loads((run / "config.json").read_text())
    for trained_on in ({"dataset_path": 3}, {"other": 1}, ["x"], {"dataset": "nothing"}, {"train_frac": 7.0}):
        (run / "config.json").write_text(json.dumps({**config, "trained_on": trained_on}))
        line = error_line("interact.py", "--model_checkpoint", run, cwd=elsewhere)
        assert "has a trained_on that names no data" in line
