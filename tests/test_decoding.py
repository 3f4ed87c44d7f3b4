"""Decoding against definitions: exhaustive enumeration, the model's own packed scores, one reply at a time."""

import itertools
from argparse import Namespace

import pytest
import torch
import transformers

from inputs import Segment, Specials, collate, pack_turn
from interact import generate_replies
from model import DoubleHeadsModel, GPT2DoubleHeads, PostNormConfig, PostNormDoubleHeadsModel

SPECIAL = Specials(*range(5))
WORDS = range(5, 10)
MAX_LENGTH = 4


def tiny_model(family: str, seed: int) -> DoubleHeadsModel:
    """Ten tokens in all, so that every reply can be enumerated; weights wide enough to have opinions."""
    shape = dict(vocab_size=10, n_positions=48, n_embd=16, n_layer=2, n_head=2, initializer_range=0.7, num_labels=1,
                 bos_token_id=0, eos_token_id=1)
    torch.manual_seed(seed)
    if family == "gpt2":
        return GPT2DoubleHeads(transformers.GPT2Config(**shape)).eval()
    return PostNormDoubleHeadsModel(PostNormConfig(**shape)).eval()


def options(**changed) -> Namespace:
    return Namespace(**{"no_sample": True, "max_length": MAX_LENGTH, "min_length": 1, "temperature": 0.7, "top_k": 0,
                        "top_p": 0.9} | changed)


def contexts() -> list[Segment]:
    """Of different lengths, so that the batch is padded."""
    return [Segment([0, 5, 6, 3, 7], [2, 2, 2, 3, 3]), Segment([0, 3, 9], [2, 3, 3]),
            Segment([0, 8, 8, 8, 3, 5, 6, 2, 9, 3, 7], [2, 2, 2, 2, 3, 3, 3, 2, 2, 3, 3])]


@torch.no_grad()
def log_likelihoods(model: DoubleHeadsModel, context: Segment, endings: list[tuple[int, ...]]) -> torch.Tensor:
    """Of whole replies, whatever ends them included, each as a plain row of its own without cache."""
    totals = []
    for length, group in itertools.groupby(sorted(endings, key=len), key=len):
        replies = torch.tensor(list(group))
        prompt = torch.tensor([context.ids + [SPECIAL.speaker1]]).expand(len(replies), -1)
        types = torch.tensor([context.types + [SPECIAL.speaker1] * (1 + length)]).expand(len(replies), -1)
        logits = model(torch.cat([prompt, replies], 1), token_type_ids=types).logits[:, -length - 1:-1]
        totals.append(logits.log_softmax(-1).gather(-1, replies[..., None]).squeeze(-1).sum(1))
    return torch.cat(totals)


def every_reply() -> list[tuple[int, ...]]:
    """One to three words and a control token, or four words."""
    ended = [(*words, end) for length in range(1, MAX_LENGTH) for words in itertools.product(WORDS, repeat=length)
             for end in SPECIAL]
    return sorted([*ended, *itertools.product(WORDS, repeat=MAX_LENGTH)], key=len)


@pytest.mark.parametrize("family", ["openai-gpt", "gpt2"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.65, 1.5])
def test_a_wide_beam_is_an_exhaustive_search(family, length_penalty):
    replies = every_reply()
    lengths = torch.tensor([len(reply) for reply in replies])
    for seed in range(3):
        model = tiny_model(family, seed)
        found = generate_replies(model, contexts(), SPECIAL, options(num_beams=700, length_penalty=length_penalty))
        for context, reply in zip(contexts(), found, strict=True):
            scores = log_likelihoods(model, context, replies) / lengths ** length_penalty
            best = replies[scores.argmax()]
            assert reply == [token for token in best if token in WORDS]


def test_a_beam_is_never_below_greedy(monkeypatch):
    """Over many models, with some of which transformers' own narrow beam loses the greedy reply and ends below it."""
    generate, searched = GPT2DoubleHeads.generate, []

    def spy(self, *args, **kwargs):
        searched.append(generate(self, *args, **kwargs))
        return searched[-1]

    monkeypatch.setattr(GPT2DoubleHeads, "generate", spy)
    length, better, guarded = 12, 0, 0
    width = 1 + max(len(context.ids) for context in contexts())

    long = {"max_length": length, "min_length": length}
    for seed in range(60):
        model = tiny_model("gpt2", seed)
        greedy = generate_replies(model, contexts(), SPECIAL, options(**long))
        searched.clear()
        beam = generate_replies(model, contexts(), SPECIAL, options(num_beams=2, length_penalty=0.0, **long))
        plain = [list(itertools.takewhile(lambda token: token in WORDS, row))
                 for row in searched[0].sequences[:, width:].tolist()]
        for context, *replies in zip(contexts(), beam, greedy, plain, strict=True):
            ours, theirs, unguarded = (log_likelihoods(model, context, [tuple(reply)]).item() for reply in replies)
            assert ours >= max(theirs, unguarded) - 1e-5
            better += ours > theirs + 1e-5
            guarded += ours > unguarded + 1e-5
    assert better > 10 and guarded


@pytest.mark.parametrize("family", ["openai-gpt", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 4}, {"no_repeat_ngram_size": 1}])
def test_a_batch_decodes_as_one_at_a_time(family, how):
    for seed in range(5):
        model, args = tiny_model(family, seed), options(max_length=8, **how)
        together = generate_replies(model, contexts(), SPECIAL, args)
        assert together == [generate_replies(model, [context], SPECIAL, args)[0] for context in contexts()]


@pytest.mark.parametrize("beginning", [[], [6, 7]])
def test_samples_of_one_computed_context_are_those_of_the_model(beginning):
    """Greedy samples all equal the single greedy reply; the distribution of sampled first tokens is the model's."""
    model, start = tiny_model("openai-gpt", 3), [beginning] * 3
    single = generate_replies(model, contexts(), SPECIAL, options(), start)
    several = generate_replies(model, contexts(), SPECIAL, options(), start, samples=4)
    assert several == [reply for reply in single for _ in range(4)]

    torch.manual_seed(0)
    draws = 4000
    free = options(no_sample=False, max_length=1, min_length=0, top_p=0.0, temperature=1.0)
    replies = generate_replies(model, contexts()[2:], SPECIAL, free, [beginning], samples=draws)
    counts = torch.zeros(10)
    for reply in replies:
        counts[reply[0] if reply else 0] += 1
    context = contexts()[2]
    ids = torch.tensor([context.ids + [SPECIAL.speaker1, *beginning]])
    types = torch.tensor([context.types + [SPECIAL.speaker1] * (1 + len(beginning))])
    expected = model(ids, token_type_ids=types).logits[0, -1].softmax(-1)
    expected[0] = expected[:5].sum()  # whatever control token ended the reply
    for token in [0, *WORDS]:
        deviation = (expected[token] * (1 - expected[token]) / draws).sqrt().item()
        assert counts[token] / draws == pytest.approx(expected[token].item(), abs=5 * deviation + 1e-3)


def test_the_best_of_a_beam_in_order():
    model = tiny_model("gpt2", 1)
    best = generate_replies(model, contexts()[:1], SPECIAL, options(num_beams=700, length_penalty=0.0), samples=20)
    replies = every_reply()
    scores = log_likelihoods(model, contexts()[0], replies)
    expected = [[token for token in replies[n] if token in WORDS] for n in scores.argsort(descending=True)[:20]]
    assert best == expected


def test_no_ngram_twice_in_a_reply_but_the_contexts_are_free():
    context = [Segment([0, 3, *[5, 6] * 6], [2, *[3] * 13])]
    blocked = repeated = seen_before = 0
    for seed in range(30):
        model = tiny_model("gpt2", seed)
        plain = generate_replies(model, context, SPECIAL, options(max_length=20))[0]
        reply = generate_replies(model, context, SPECIAL, options(max_length=20, no_repeat_ngram_size=2))[0]
        pairs, plain_pairs = (list(itertools.pairwise(one)) for one in (reply, plain))
        assert len(set(pairs)) == len(pairs)
        repeated += len(set(plain_pairs)) < len(plain_pairs)
        seen_before += (5, 6) in pairs or (6, 5) in pairs
        blocked += reply != plain
    assert repeated and blocked and seen_before


def test_a_packed_row_scores_what_beam_search_reports():
    """The likelihood by which beams compete is the likelihood that evaluation measures."""
    model = tiny_model("openai-gpt", 2)
    context = contexts()[0]
    row = pack_turn([[5, 6]], [[7]], [(8, 9), (6,)], SPECIAL, 48)
    out = model(**collate([row], SPECIAL.pad))
    assert out.nll.item() == pytest.approx(-log_likelihoods(model, context, [(6, SPECIAL.eos)]).item(), abs=1e-5)
