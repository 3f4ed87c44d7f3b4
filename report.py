"""Report an evaluation as JSON and as a page: figures, calibration, ranks, the worst turns, questions and replies.

This file knows the records of an evaluation and texts, but not the network. `convai_evaluation.py --report DIR` calls
it.
"""

import json
from html import escape as escape_html
from pathlib import Path

import numpy as np

from cli import printable
from consistency import VERDICTS, shares
from metrics import calibration, calibration_error, compare, f1_score, gold_rank_by_words, softmax, turn_values
from tables import Split

WORST = 20
STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fff; --faint: #6b7785; --line: #d9dfe6; --bar: #3b7dd8;
        --gold: #1b8a5a; --tint: #f4f7fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --paper: #151b22; --faint: #95a1af; --line: #323c47;
        --bar: #6aa5f0; --gold: #4cc38a; --tint: #1d252e } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse; width: 100% }
td, th { padding: .2rem .6rem; text-align: left; vertical-align: middle }
th { color: var(--faint); font-weight: normal; border-bottom: 1px solid var(--line) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 1% }
.faint { color: var(--faint) }
.bar { background: var(--bar); height: .9rem; min-width: 1px; border-radius: 2px }
.gold { color: var(--gold); font-weight: 600 }
.metric { margin: 1rem 0 } .metric p { margin: .2rem 0 } .value { font-size: 1.3rem; margin-inline-start: .5rem }
.whole { background: var(--line); border-radius: 2px; margin: .2rem 0 }
summary { cursor: pointer; padding: .5rem 0 }
.texts { table-layout: fixed; overflow-wrap: anywhere } .texts td { vertical-align: top }
.turns th:first-child { width: 3rem } .texts .number { width: 4.5rem }
@media (max-width: 40rem) { td, th { padding: .2rem .3rem }
        th.number { white-space: normal } .figures { display: block; overflow-x: auto }
        td:last-child:has(.bar) { min-width: 5rem }
        dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem } td, dd { overflow-wrap: anywhere }
        .figures td { overflow-wrap: normal } }
section { background: var(--tint); border-radius: 8px; padding: .8rem 1rem; margin: 1rem 0 }
section p { margin: .2rem 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem } dd { margin: 0 }
"""


def escape(text: str) -> str:
    """Escape text for HTML, and remove control characters, such as those that change its direction."""
    return escape_html(printable(text))


def figure(value: float | None) -> str:
    """Format a figure for printing; None means that no turn had several candidates."""
    return "nothing to choose" if value is None else f"{value:.4g}"


def worst_turns(records: list[dict], split: Split, max_history: int) -> list[dict]:
    """Return the turns with the least probable gold candidates, each with all candidates, the best first."""
    chance = [softmax(record["scores"])[-1] for record in records]
    turns = []
    for turn in np.argsort(chance, kind="stable")[:WORST].tolist():
        texts, scores = split.texts("candidates", turn), records[turn]["scores"]
        candidates = [{"text": text, "score": score, "gold": number == len(texts) - 1}
                      for number, (text, score) in enumerate(zip(texts, scores, strict=True))]
        turns.append({
            "turn": turn, "dialog": int(split.turn_dialog[turn]), "rank": gold_rank_by_words(scores, texts),
            "probability": float(chance[turn]), "persona": split.texts("persona", split.turn_dialog[turn]),
            "history": split.texts("history", turn)[-(2 * max_history + 1):],
            "candidates": sorted(candidates, key=lambda one: -one["score"]),
        })
    return turns


def compare_models(records: dict[str, list[dict]], others: dict[str, list[dict]], split: Split, name: str,
                   questions: tuple[list[dict], list[dict]] = ([], [])) -> dict:
    """Compare the records of two evaluations of the same turns, by kind, the second one being that of ``name``.

    ``questions``: both models' records of the same questions. Return ``other``, the name; ``metrics``, the figures of
    `metrics.compare` by metric; ``turns``, by kind of evaluation the turns that differ most, in either direction: with
    the gold reply's probability among the candidates (hits@1), its mean log-likelihood per token (ppl), or the reply
    and its F1 (f1) or use of the persona (consistency); and ``questions``, those with different verdicts.
    """
    values = turn_values(records, split), turn_values(others, split)
    figures = {metric: compare(values[0][metric], values[1][metric], split.turn_dialog, metric.endswith("PPL"))
               for metric in values[0] if metric in values[1] and not metric.endswith("gold replies")}

    def value(kind: str, record: dict, turn: int) -> float:
        if kind == "hits@1":
            return float(softmax(record["scores"])[-1])
        if kind == "ppl":
            return -record["nll"] / record["tokens"]
        if kind == "consistency":
            return record["use_of_persona"] or 0  # unknown for both models
        return f1_score(record["reply"], split.texts("candidates", turn)[-1])

    turns = {}
    for kind in records:
        models = records[kind], others[kind]
        both = np.array([[value(kind, record, turn) for turn, record in enumerate(of_model)] for of_model in models])
        furthest = np.argsort(-np.abs(both[0] - both[1]), kind="stable")[:WORST].tolist()
        turns[kind] = [{
            "turn": turn, "dialog": int(split.turn_dialog[turn]), "history": split.texts("history", turn)[-1:],
            "gold": split.texts("candidates", turn)[-1], "values": both[:, turn].tolist(),
            "replies": [of_model[turn]["reply"] for of_model in models] if kind in REPLYING else None,
        } for turn in furthest if both[0, turn] != both[1, turn]]
    verdicts, differing = compare_questions(*questions)
    return {"other": name, "metrics": verdicts | figures, "turns": turns, "questions": differing}


def compare_questions(asked: list[dict], others: list[dict]) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Compare two models' records of the same questions: the share of each verdict, and the questions that differ.

    Questions about the same persona are not independent, so personas are resampled and exchanged (`metrics.compare`).
    An answer that the other model contradicts is the largest difference.
    """
    numbers: dict[tuple, int] = {}
    persona = [numbers.setdefault(tuple(one["persona"]), len(numbers)) for one in asked]
    figures = {}
    for verdict in VERDICTS if asked else ():
        first, second = (np.array([[one["verdict"] == verdict for one in of_model], np.ones(len(asked))], float)
                         for of_model in (asked, others))
        figures[f"Questions {verdict}"] = compare(first, second, persona)
    differing = [{**one, "verdicts": [one["verdict"], other["verdict"]], "replies": [one["reply"], other["reply"]]}
                 for one, other in zip(asked, others, strict=True) if one["verdict"] != other["verdict"]]
    return figures, sorted(differing, key=lambda one: set(one["verdicts"]) != {"answered", "contradicted"})[:WORST]


def write_report(folder: Path, figures: dict[str, float], settings: dict, split: Split, max_history: int,
                 choices: list[dict] | None, replies: list[dict] | None, comparison: dict | None = None,
                 questions: list[dict] | None = None) -> None:
    """Write ``report.json`` and ``report.html``.

    ``choices`` are records with ``scores``, ``replies`` are records with ``reply``, both in the order of the split's
    turns; None if not evaluated. Turns with a single candidate are skipped. ``comparison`` is what `compare_models`
    returns, or None. ``questions`` are records of questions with ``reply`` and ``verdict``. Raises ``OSError`` if the
    folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report: dict = {"figures": figures, "settings": settings, "turns": split.num_turns}
    if comparison:
        report["comparison"] = comparison
    if several := {turn: record["scores"] for turn, record in enumerate(choices or []) if len(record["scores"]) > 1}:
        ranks = [gold_rank_by_words(scores, split.texts("candidates", turn)) for turn, scores in several.items()]
        bins = calibration(several.values(), [rank == 1 for rank in ranks])
        report |= {"ranks": np.bincount(ranks)[1:].tolist(), "calibration": bins,
                   "calibration_error": calibration_error(bins), "worst": worst_turns(choices, split, max_history)}
    if replies:
        step = max(1, len(replies) // WORST)
        report["replies"] = [{"turn": turn, "history": split.texts("history", turn)[-1:],
                              "gold": split.texts("candidates", turn)[-1], **replies[turn]}
                             for turn in range(0, len(replies), step)][:WORST]
    if questions:
        report["questions"] = {
            "shares": shares([one["verdict"] for one in questions]),
            "kinds": {kind: {verdict: sum(one["kind"] == kind and one["verdict"] == verdict for one in questions)
                             for verdict in VERDICTS} for kind in sorted({one["kind"] for one in questions})},
            "examples": {verdict: [one for one in questions if one["verdict"] == verdict][:WORST]
                         for verdict in VERDICTS[1:]}}
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8", "replace")
    (folder / "report.html").write_text(_page(report), "utf-8")


def _page(report: dict) -> str:
    figures = "".join(_metric(name, value) for name, value in report["figures"].items())
    settings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
                       for name, value in report["settings"].items()
                       if not (value is None or value is False or value == ""))  # but show 0
    parts = [f"<h1>Evaluation of {escape(str(report['settings']['model_checkpoint']))}</h1>"
             f"<p class=faint>{report['turns']:,} validation turns</p>{figures}"]
    if "comparison" in report:
        parts.append(_comparison(report["comparison"]))
    if "ranks" in report:
        parts.append("<h2>Rank of the gold reply</h2>" + bars(
            ["rank", "turns"], [([str(rank), f"{count:,}"], count) for rank, count in enumerate(report["ranks"], 1)]))
        parts.append(
            "<h2>Calibration of the choice head</h2>"
            "<p>How often the likeliest candidate was the gold reply, by predicted probability. "
            f"Expected calibration error: {report['calibration_error']:.3f}.</p>" +
            calibration_table(report["calibration"], "turns", "was gold"))
        parts.append(f"<h2>The {len(report['worst'])} worst turns</h2>" + "".join(map(_turn, report["worst"])))
    if "questions" in report:
        parts.append(_questions(**report["questions"]))
    if "replies" in report:
        rows = [[escape(" ".join(one["history"])), f"<span class=gold>{escape(one['gold'])}</span>",
                 escape(one["reply"]) + _use_of_persona(one)] for one in report["replies"]]
        note = "<p>Below a reply: its use of the persona, and the persona sentence nearest to it.</p>" * (
            any(map(_use_of_persona, report["replies"])))
        parts.append(f"<h2>Replies</h2>{note}" + table("texts", ["to", "gold", "generated"], rows, 0))
    parts.append(f"<h2>Settings</h2><dl>{settings}</dl>")
    return html("Evaluation", parts)


# The beginning of a metric's name → whether the metric is a share of 1, and its meaning.
MEANINGS = {
    "hits@": (True, "How often the gold reply is among the first candidates in the model's ranking. More is better."),
    "Accuracy": (True, "How often the reply says exactly what the gold reply says. More is better."),
    "F1 spread": (True, "By how much F1 differs from seed to seed: the standard deviation."),
    "F1": (True, "How many words the reply shares with the gold reply, from 0 to 1. More is better."),
    "MRR": (True, "The mean of 1 / rank of the gold reply: 1 if it is always first. More is better."),
    "Token PPL": (False, "The number of equally likely tokens among which a choice would be as uncertain as the model "
                         "is about each token of the gold replies. Less is better; it depends on the tokenizer."),
    "Word PPL": (False, "The same per word, to compare models with different tokenizers. Less is better."),
    "distinct-": (True, "The share of distinct words, or word pairs, among all words of the replies. Low means "
                        "monotony."),
    "Words per reply": (False, "The mean length of the replies."),
    "Questions answered": (True, "How often the reply to a question about the persona says what the persona says. More "
                                 "is better."),
    "Questions contradicted": (True, "How often it says something else. Less is better."),
    "Questions evaded": (True, "How often it says neither."),
    "Use of persona, gold": (False, "The same for the gold replies, as a reference."),
    "Use of persona": (False, "How much nearer in meaning a reply is to the bot's persona than to other personas, in "
                              "standard deviations. By chance it is 0."),
    "Copied": (True, "The share of replies that repeat the persona or the history word for word."),
    "Stutters": (True, "The share of replies with a word three times in a row."),
}


def _metric(name: str, value: float | None) -> str:
    """Return a figure and its meaning as HTML, with a bar if the metric is a share of 1."""
    shared, meaning = next((about for start, about in MEANINGS.items() if name.lower().startswith(start.lower())),
                           (False, ""))
    bar = f"<div class=whole><div class=bar style='width:{100 * value:.1f}%'></div></div>" \
        if shared and value is not None and 0 <= value <= 1 else ""
    return (f"<div class=metric><b>{escape(name)}</b> <span class=value>{figure(value)}</span>{bar}"
            f"<p class=faint>{meaning}</p></div>")


DIFFERING = {"hits@1": "Probability of the gold reply among the candidates",
             "ppl": "Log-likelihood of the gold reply, in nats per token", "f1": "F1 of the reply",
             "consistency": "Use of the persona"}
REPLYING = ("f1", "consistency")  # the kinds of evaluation that decode replies


def _use_of_persona(reply: dict) -> str:
    """Return the use of the persona in a reply, with the nearest persona sentence, as HTML; "" if it is unknown."""
    use = reply.get("use_of_persona")
    return "" if use is None else f"<br><span class=faint>{use:.2f}: {escape(reply['nearest_sentence'])}</span>"


def _persona_and_question(question: dict) -> str:
    """Return persona, history and question as HTML."""
    before = "".join(f"– {escape(utterance)}<br>" for utterance in question["history"])
    return (f"<span class=faint>{escape(' '.join(question['persona']))}</span><br>{before}"
            f"<b>{escape(question['question'])}</b>")


def _questions(shares: dict, kinds: dict, examples: dict) -> str:
    """Return the verdicts on replies to questions about personas, in all and by kind, and examples, as HTML."""
    in_all = {verdict: sum(counts[verdict] for counts in kinds.values()) for verdict in VERDICTS}
    rows = [[verdict, f"{in_all[verdict]:,}", f"{share:.3f}", f"{low:.3f} to {high:.3f}"]
            for verdict, (share, low, high) in shares.items()]
    by_kind = [[escape(kind), str(sum(counts.values())), *map(str, counts.values())]
               for kind, counts in kinds.items()]
    parts = ["<h2>Questions about the persona</h2>" +
             table("figures", ["", "questions", "share", "95 % interval"], rows, 3),
             "<details><summary>by kind of question</summary>" +
             table("figures", ["kind", "questions", *VERDICTS], by_kind, 4) + "</details>"]
    for verdict, asked in examples.items():
        if asked:
            some = f", the first {WORST}" * (in_all[verdict] > WORST)
            parts.append(f"<h3>Questions {verdict}{some}</h3>" + table(
                "texts", ["persona and question", "reply"],
                [[_persona_and_question(one), escape(one["reply"])] for one in asked], 0))
    return "".join(parts)


def table(kind: str, names: list[str], rows: list[list[str]], numbers: int) -> str:
    """Return an HTML table of the class ``kind``, whose last ``numbers`` columns are numbers."""
    kinds = ["" if place < len(names) - numbers else " class=number" for place in range(len(names))]
    head, *body = ("".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(row, kinds, strict=True))
                   for tag, row in [("th", names), *(("td", row) for row in rows)])
    return f"<table class='{kind}'><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"


def _comparison(comparison: dict) -> str:
    """Return the differences from another model, their significance, and what differs most, as HTML."""
    rows = [[name, f"{one['first']:.4g}", f"{one['second']:.4g}", f"{one['difference']:+.4g}",
             f"{one['low']:+.4g} to {one['high']:+.4g}", f"{one['p']:.4f}"]
            for name, one in comparison["metrics"].items()]
    parts = [f"<h2>Compared with {escape(comparison['other'])}</h2>"
             "<p>The 95 % intervals come from a paired bootstrap over dialogs, or over the personas of questions. p is "
             "the probability of a difference at least as large between two models that are equally good (permutation "
             "test).</p>",
             table("figures", ["", "this model", "the other", "difference", "95 % interval", "p"], rows, 5)]
    for kind, turns in comparison["turns"].items():
        rows = []
        for one in turns:
            gold = f"{escape(' '.join(one['history']))}<br><span class=gold>{escape(one['gold'])}</span>"
            said = [f"{value:.3f}" + (f"<br>{escape(reply)}" if reply is not None else "") for value, reply in
                    zip(one["values"], one["replies"] or [None] * 2, strict=True)]
            rows.append([str(one["turn"]), gold, *said])
        numbers = 0 if kind in REPLYING else 2
        parts.append(f"<h2>Turns that differ most: {DIFFERING[kind]}</h2>" +
                     table("texts turns", ["turn", "said last, gold reply", "this model", "the other"], rows, numbers))
    if comparison["questions"]:
        rows = [[_persona_and_question(one)] + [
            f"<small class=faint>{verdict}</small><br>{escape(reply)}"
            for verdict, reply in zip(one["verdicts"], one["replies"], strict=True)] for one in comparison["questions"]]
        parts.append("<h2>Questions with different verdicts</h2>" +
                     table("texts", ["persona and question", "this model", "the other"], rows, 0))
    return "".join(parts)


def html(title: str, parts: list[str]) -> str:
    """Return a whole HTML page made of ``parts``."""
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{title}</title><style>{STYLE}</style><body>" + "\n".join(parts) + "</body></html>\n")


def calibration_table(bins: list[dict], unit: str, right: str) -> str:
    """Return the bins of `metrics.calibration` as an HTML table with bars."""
    rows = [([f"{one['from']:.1f} to {one['to']:.1f}", f"{one['confidence']:.2f}", f"{one['turns']:,}",
              f"{one['accuracy']:.2f}"], one["accuracy"]) for one in bins]
    return bars(["given", "on average", unit, right], rows, largest=1.0)


def bars(names: list[str], rows: list[tuple[list[str], float]], largest: float | None = None) -> str:
    """Return an HTML table with a bar at the end of each row."""
    largest = largest or max(value for _, value in rows) or 1
    head = "".join(f"<th class=number>{name}</th>" for name in names) + "<th></th>"
    body = "".join("<tr>" + "".join(f"<td class=number>{cell}</td>" for cell in cells) +
                   f"<td><div class=bar style='width:{100 * value / largest:.1f}%'></div></td></tr>"
                   for cells, value in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _turn(turn: dict) -> str:
    persona = "".join(f"<p class=faint>{escape(sentence)}</p>" for sentence in turn["persona"])
    history = "".join(f"<p>– {escape(utterance)}</p>" for utterance in turn["history"])
    rows = "".join(f"<tr{' class=gold' if one['gold'] else ''}><td class=number>{one['score']:.3f}</td>"
                   f"<td>{escape(one['text'])}</td></tr>" for one in turn["candidates"])
    return (f"<section><p><b>Turn {turn['turn']}</b>, dialog {turn['dialog']}: gold reply at rank {turn['rank']}, "
            f"probability {turn['probability']:.4f}</p>{persona}{history}<details><summary>all candidates</summary>"
            f"<table>{rows}</table></details></section>")
