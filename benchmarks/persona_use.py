"""Compare measures of how much a reply uses its bot's persona, by their agreement with people.

    PYTHONPATH=. python benchmarks/persona_use.py usr_personachat.jsonl

The file has ratings (`feedback.ratings`) of the quality "Uses Knowledge". A line per measure gives Spearman's and
Pearson's correlation with the mean rating; the last column is the difference in Spearman's correlation from
`embeddings.persona_use`. The 95 % intervals come from 1,000 resamples of the contexts (seed 42). Then follow the mean
per system whose replies were rated, and the correlation with fewer other personas, a mean of 20 draws (seed 42).
"""

import json
import sys
from statistics import fmean

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from embeddings import embed, persona_use
from feedback.judge import Agreement, correlations, raters_and_others
from feedback.ratings import read_ratings
from words import normalized

QUALITY, RESAMPLES, SEED, KEPT = "Uses Knowledge", 1000, 42, "standardised (persona_use)"


def content(text: str) -> set[str]:
    return set(normalized(text)) - ENGLISH_STOP_WORDS


rated = read_ratings(sys.argv[1])
personas = list(dict.fromkeys(tuple(one.persona) for one in rated))
vectors = embed([text for one in rated for text in (one.reply, *one.persona)])
measures: dict[str, list[float]] = {KEPT: [use for use, _ in persona_use([one.reply for one in rated],
                                                                         [one.persona for one in rated])]}
nearness = []  # per reply: to the own persona, then to the others
for one in rated:
    near = np.array([max(vectors[one.reply] @ vectors[sentence] for sentence in persona) for persona in personas])
    own = personas.index(tuple(one.persona))
    others, said = np.delete(near, own), content(one.reply)
    nearness.append((near[own], others))
    shared = [len(said & content(sentence)) / max(1, len(content(sentence))) for sentence in one.persona]
    for name, value in {
            "minus the mean of others": near[own] - others.mean(),
            "share of others less near": (others < near[own]).mean(),
            "nearest sentence": near[own],
            "all sentences, mean": fmean(float(vectors[one.reply] @ vectors[sentence]) for sentence in one.persona),
            "reply's words in persona": len(said & set().union(*map(content, one.persona))) / max(1, len(said)),
            "a sentence's words in reply": max(shared)}.items():
        measures.setdefault(name, []).append(value)

matrix, people = np.array(list(measures.values())), np.array([fmean(one.ratings[QUALITY]) for one in rated])
numbers: dict[tuple, int] = {}
contexts = np.array([numbers.setdefault(one.context, len(numbers)) for one in rated])
found = Agreement(matrix, people, contexts, RESAMPLES, SEED)
draw, places = np.random.default_rng(SEED), [np.flatnonzero(contexts == one) for one in range(len(numbers))]
drawn = []
for _ in range(RESAMPLES):
    chosen = np.concatenate([places[one] for one in draw.integers(len(places), size=len(places))])
    spearman = correlations(matrix[:, chosen], people[chosen])[0]
    drawn.append(spearman - spearman[0])
low, high = np.percentile(drawn, [2.5, 97.5], axis=0)

print(f"{len(rated)} replies to {len(numbers)} contexts, {len(personas)} personas\n"
      f"{'':28}Spearman, 95 % interval   Pearson   Spearman minus that of the first")
for row, name in enumerate(measures):
    print(f"{name:28}{found.value[0, row]:.3f} ({found.low[0, row]:.3f} to {found.high[0, row]:.3f})    "
          f"{found.value[1, row]:.3f}    {found.value[0, row] - found.value[0, 0]:+.3f} ({low[row]:+.3f} to "
          f"{high[row]:+.3f})")
if both := raters_and_others(rated, QUALITY):
    among = Agreement(*both, contexts, RESAMPLES, SEED)
    print(f"{'people':28}" + "{:.3f} ({:.3f} to {:.3f})    {:.3f}".format(
        *(values[0].mean() for values in (among.value, among.low, among.high)), among.value[1].mean()))

systems = np.array([json.loads(line)["system"] for line in open(sys.argv[1], encoding="utf-8")])
print(f"\n{'mean':28}{'people':8}" + "  ".join(measures))
for system in dict.fromkeys(systems.tolist()):
    mine = systems == system
    print(f"{system:28}{people[mine].mean():<8.2f}" + "  ".join(
        f"{column[mine].mean():<{len(name)}.2f}" for name, column in zip(measures, matrix, strict=True)))

for count in (40, 20, 10, 5, 3):
    found_by_draw = []
    for _ in range(20):
        some = [(own, draw.choice(others, count, replace=False)) for own, others in nearness]
        column = np.array([[(own - others.mean()) / others.std() for own, others in some]])
        found_by_draw.append(correlations(column, people)[0, 0])
    print(f"with {count:2} other personas: Spearman {fmean(found_by_draw):.3f}")
