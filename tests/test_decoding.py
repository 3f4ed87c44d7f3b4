"""Test decoding against exhaustive enumeration, transformers' generate, packed scores, and one reply at a time."""

import itertools
import math
from argparse import ArgumentParser

import pytest
import torch
import transformers
from scipy import stats

from cli import InputError
from decoding import (
    OPTIONS,
    Decoding,
    add_decoding_flags,
    allowed_scores,
    choose_at_once,
    choose_tokens,
    generate_replies,
    repeating,
)
from inputs import Segment, Specials, collate, pack_turn
from model import DoubleHeadsModel, GPT2DoubleHeads, PostNormConfig, PostNormDoubleHeadsModel, decoder_class

SPECIAL = Specials(*range(5))
WORDS = range(5, 10)
MAX_LENGTH = 4


def tiny_model(family: str, seed: int) -> DoubleHeadsModel:
    """Make a model with ten tokens in all, so that every reply can be enumerated, and with large weights."""
    shape = dict(vocab_size=10, n_positions=48, n_embd=16, n_layer=2, n_head=2, initializer_range=0.7, num_labels=1,
                 bos_token_id=0, eos_token_id=1)
    torch.manual_seed(seed)
    if family == "gpt2":
        return GPT2DoubleHeads(transformers.GPT2Config(**shape)).eval()
    return PostNormDoubleHeadsModel(PostNormConfig(**shape)).eval()


def options(**changed) -> Decoding:
    return Decoding(**{"no_sample": True, "max_length": MAX_LENGTH} | changed)


def contexts() -> list[Segment]:
    """Return contexts of different lengths, so that the batch is padded."""
    return [Segment([0, 5, 6, 3, 7], [2, 2, 2, 3, 3]), Segment([0, 3, 9], [2, 3, 3]),
            Segment([0, 8, 8, 8, 3, 5, 6, 2, 9, 3, 7], [2, 2, 2, 2, 3, 3, 3, 2, 2, 3, 3])]


@torch.no_grad()
def log_likelihoods(model: DoubleHeadsModel, context: Segment, endings: list[tuple[int, ...]]) -> torch.Tensor:
    """Return the log-likelihood of each whole reply with its end, computed as a plain row without a cache."""
    totals = []
    for length, group in itertools.groupby(sorted(endings, key=len), key=len):
        replies = torch.tensor(list(group))
        prompt = torch.tensor([context.ids + [SPECIAL.speaker1]]).expand(len(replies), -1)
        types = torch.tensor([context.types + [SPECIAL.speaker1] * (1 + length)]).expand(len(replies), -1)
        logits = model(torch.cat([prompt, replies], 1), token_type_ids=types).logits[:, -length - 1:-1]
        totals.append(logits.log_softmax(-1).gather(-1, replies[..., None]).squeeze(-1).sum(1))
    return torch.cat(totals)


def every_reply() -> list[tuple[int, ...]]:
    """Return all replies: one to three words and a control token, or four words."""
    ended = [(*words, end) for length in range(1, MAX_LENGTH) for words in itertools.product(WORDS, repeat=length)
             for end in SPECIAL]
    return sorted([*ended, *itertools.product(WORDS, repeat=MAX_LENGTH)], key=len)


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


def textbook(model: DoubleHeadsModel, context: Segment, **how) -> list[int]:
    """Return the reply of transformers' own ``generate`` to one context."""
    ids, types = (torch.tensor([values + [SPECIAL.speaker1]]) for values in (context.ids, context.types))
    way = transformers.GenerationConfig(eos_token_id=list(SPECIAL), pad_token_id=SPECIAL.pad, do_sample=False, **how)
    out = model.generate(ids, token_type_ids=types, generation_config=way)[0, ids.shape[1]:].tolist()
    return list(itertools.takewhile(lambda token: token in WORDS, out))


@pytest.mark.parametrize("length_penalty", [0.0, 0.65, -1.0])
def test_beams_are_those_of_transformers_or_greedy(length_penalty):
    """Decode with many models; with some of them a narrow beam alone would lose the greedy reply and score below it."""
    length, better, guarded = 12, 0, 0
    for seed in range(12):
        model = tiny_model("gpt2", seed)
        way = options(max_length=length, min_length=length if length_penalty == 0.0 else 1)
        greedy = generate_replies(model, contexts(), SPECIAL, way)
        beam = generate_replies(model, contexts(), SPECIAL, way.over(num_beams=2, length_penalty=length_penalty))
        for context, *replies in zip(contexts(), beam, greedy, strict=True):
            same = {"max_new_tokens": length, "min_new_tokens": way.min_length}
            assert replies[1] == textbook(model, context, **same)
            replies.append(textbook(model, context, num_beams=2, early_stopping="never", length_penalty=length_penalty,
                                    **same))

            def score(reply, context=context, model=model) -> float:
                ends = [(*reply, end) for end in SPECIAL] if len(reply) < length else [tuple(reply)]
                return log_likelihoods(model, context, ends).max().item() / len(ends[0]) ** length_penalty

            ours, theirs, unguarded = map(score, replies)
            assert ours == pytest.approx(max(theirs, unguarded), abs=1e-5)
            better += ours > theirs + 1e-5
            guarded += ours > unguarded + 1e-5
    assert better > 5 and (guarded or length_penalty)


@pytest.mark.parametrize("how", [{}, {"num_beams": 4}, {"no_repeat_ngram_size": 1}])
def test_a_batch_decodes_like_single_contexts(family, how):
    for seed in range(5):
        model, args = tiny_model(family, seed), options(max_length=8, **how)
        together = generate_replies(model, contexts(), SPECIAL, args)
        assert together == [generate_replies(model, [context], SPECIAL, args)[0] for context in contexts()]


@pytest.mark.parametrize("beginning", [[], [6, 7]])
def test_samples_follow_the_models_distribution(beginning):
    """Compare greedy samples with the single greedy reply, and shares of first tokens with their probabilities."""
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
    expected[0] = expected[:5].sum()  # any control token ends the reply
    for token in [0, *WORDS]:
        deviation = (expected[token] * (1 - expected[token]) / draws).sqrt().item()
        assert counts[token] / draws == pytest.approx(expected[token].item(), abs=5 * deviation + 1e-3)


def test_several_beams_come_best_first():
    model = tiny_model("gpt2", 1)
    best = generate_replies(model, contexts()[:1], SPECIAL, options(num_beams=700, length_penalty=0.0), samples=20)
    replies = every_reply()
    scores = log_likelihoods(model, contexts()[0], replies)
    expected = [[token for token in replies[n] if token in WORDS] for n in scores.argsort(descending=True)[:20]]
    assert best == expected


def test_ngrams_may_repeat_only_those_of_the_context():
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
    """Compare the likelihood by which beams compete with the likelihood that evaluation measures."""
    model = tiny_model("openai-gpt", 2)
    context = contexts()[0]
    row = pack_turn([[5, 6]], [[7]], [(8, 9), (6,)], SPECIAL, 48)
    out = model(**collate([row], SPECIAL.pad))
    assert out.nll.item() == pytest.approx(-log_likelihoods(model, context, [(6, SPECIAL.eos)]).item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------------ options


OUTSIDE = [("temperature", 1e-300), ("temperature", 1e-38), ("temperature", 0.0), ("temperature", 1e30),
           ("temperature", math.nan), ("temperature", math.inf), ("length_penalty", 5000.0),
           ("length_penalty", -math.inf), ("top_p", 3.0), ("top_p", math.nan), ("top_k", 2.5), ("top_k", 10**9),
           ("num_beams", 5000), ("num_beams", 0), ("max_length", 0), ("max_length", 10**7), ("min_length", -1),
           ("no_repeat_ngram_size", -2), ("seed", 2**63), ("seed", -1)]


@pytest.mark.parametrize("name, value", OUTSIDE)
def test_an_option_out_of_range_is_refused_with_its_range(name, value, capsys):
    """Check the dataclass, which the page, /v1, the agent and feedback use, and the parser of the command line."""
    most = f"{OPTIONS[name].metadata['allowed'].most:,}"
    with pytest.raises(InputError) as refusal:
        Decoding(**{name: value})
    assert name in str(refusal.value) and most in str(refusal.value)
    parser = ArgumentParser()
    add_decoding_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--{name}={value}"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--{name}" in line and most in line


@pytest.mark.parametrize("wrong", [{"temperature": "0.7"}, {"top_k": True}, {"no_sample": 1}, {"seed": None}])
def test_an_option_of_another_type_is_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Decoding(**wrong)


def test_flags_and_options_have_the_same_defaults():
    parser = ArgumentParser()
    add_decoding_flags(parser)
    assert Decoding.of(parser.parse_args([])) == Decoding()
    given = Decoding.of(parser.parse_args(["--no_sample", "--top_k", "3", "--temperature", "2", "--seed", str(2**62)]))
    assert given == Decoding(no_sample=True, top_k=3, temperature=2.0, seed=2**62)


def test_options_override_flags():
    flags = Decoding(no_sample=True, top_p=0.5)
    assert flags.over(top_k=None, max_length=7) == Decoding(no_sample=True, top_p=0.5, max_length=7)
    assert flags.over(temperature=0.9) == Decoding(top_p=0.5, temperature=0.9)
    assert Decoding(top_p=0.5).over(temperature=0) == flags
    with pytest.raises(InputError, match="temperature"):
        flags.over(temperature=-1)


# -------------------------------------------------------------------------------------------- the choice of a token


CHOICES = [choose_tokens, choose_at_once]  # on CPUs and on GPUs


@pytest.mark.parametrize("choose", CHOICES)
def test_rows_choose_tokens_independently(choose):
    """Choose tokens with options, bans and seeds of every kind side by side, and for each row alone."""
    torch.manual_seed(0)
    ways = [Decoding(no_sample=True), Decoding(temperature=0.5), Decoding(top_k=2), Decoding(top_p=0.0),
            Decoding(min_length=4), Decoding(no_repeat_ngram_size=1), Decoding(no_sample=True, no_repeat_ngram_size=2)]
    said = [[5, 6, 5]] * len(ways)
    for seed in range(20):
        logits = 2 * torch.randn(len(ways), 10)
        logits[:, 6] += 2

        def chosen(rows: list[int], logits=logits, seed=seed) -> list[int | None]:
            scores = allowed_scores(logits[rows], [ways[row] for row in rows], [said[row] for row in rows], SPECIAL)
            generators = [torch.Generator().manual_seed(seed) for _ in rows]
            return choose(scores, [ways[row] for row in rows], generators)

        together = chosen(list(range(len(ways))))
        assert together == [chosen([row])[0] for row in range(len(ways))]
        assert together[0] == logits[0].argmax() and together[2] in logits[2].topk(2).indices
        assert together[4] not in SPECIAL and together[5] not in (5, 6) and together[6] != 6


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("seeded", [True, False])
def test_tokens_are_drawn_by_their_probabilities(choose, seeded):
    """Draw 3,000 tokens and compare their frequencies with the probabilities by a chi-squared test."""
    torch.manual_seed(0)
    way, count = Decoding(top_k=0, top_p=0.0, temperature=1.0), 3000
    scores = torch.tensor([[1.0, 0.0, -math.inf, 2.0, -1.0]])
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)] if seeded else None
    tokens = choose(scores.expand(count, -1), [way] * count, generators)
    frequencies = torch.bincount(torch.tensor(tokens), minlength=5)
    expected = count * scores[0].double().softmax(-1)
    assert frequencies[2] == 0
    possible = [0, 1, 3, 4]
    assert stats.chisquare(frequencies[possible], expected[possible]).pvalue > 1e-4


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", [Decoding(no_sample=True), Decoding(), Decoding(top_k=3, top_p=0.0)])
def test_a_row_of_nan_does_not_disturb_others(choose, broken, way):
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    alone = choose(allowed_scores(logits[[0, 2]], [way] * 2, [[]] * 2, SPECIAL), [way] * 2,
                          [torch.Generator().manual_seed(7) for _ in range(2)])
    for place in (slice(None), 6) if broken != -math.inf else (slice(None),):
        logits[1] = 0.0
        logits[1, place] = broken
        tokens = choose(allowed_scores(logits, [way] * 3, [[]] * 3, SPECIAL), [way] * 3,
                               [torch.Generator().manual_seed(7) for _ in range(3)])
        assert tokens == [alone[0], None, alone[1]]


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("temperature", [0.0001, 5])
def test_extreme_temperatures_work(choose, temperature):
    logits = torch.tensor([[1e4, -1e4, 3.0, 2.0, 0.0, 9e3]])
    way = Decoding(temperature=temperature, top_p=0.0, min_length=0)
    assert choose(allowed_scores(logits, [way], [[]], SPECIAL), [way]) == [0]


@pytest.mark.parametrize("size", range(5))
def test_repeating_ngrams_by_definition(size):
    numbers = torch.Generator().manual_seed(size)
    for length in range(9):
        said = torch.randint(3, (length,), generator=numbers).tolist()
        for token in range(3):
            grams = [tuple([*said, token][start:start + size]) for start in range(length + 2 - size)] if size else []
            assert (token in repeating(said, size)) == (bool(grams) and grams[-1] in grams[:-1])


def test_given_beginnings_count_as_said():
    """Give a reply its first words: none of them comes again, as if the reply had said them itself."""
    blocked = 0
    for seed in range(20):
        model = tiny_model("gpt2", seed)
        plain, = generate_replies(model, contexts()[:1], SPECIAL, options(max_length=10), [[7, 8, 5]])
        reply, = generate_replies(model, contexts()[:1], SPECIAL, options(max_length=10, no_repeat_ngram_size=1),
                                  [[7, 8, 5]])
        assert not {7, 8, 5} & set(reply) and len(set(reply)) == len(reply)
        blocked += bool({7, 8, 5} & set(plain))
    assert blocked


@pytest.mark.parametrize("config", [
    transformers.GPTJConfig(vocab_size=10, n_positions=48, n_embd=16, n_layer=2, n_head=2, rotary_dim=4,
                            initializer_range=0.7, bos_token_id=0, eos_token_id=1),
    transformers.LlamaConfig(vocab_size=10, max_position_embeddings=48, hidden_size=16, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, attention_bias=True,
                             initializer_range=0.7, bos_token_id=0, eos_token_id=1)], ids=["gptj", "llama"])
def test_gptj_and_llama_decode_as_in_transformers(config):
    """Decode with GPT-J, whose attention cannot be replaced, and Llama, whose layers our own code computes."""
    torch.manual_seed(1)
    model = decoder_class(type(config))(config).eval()
    model.config.speaker_ids = [SPECIAL.speaker1, SPECIAL.speaker2]
    for parameter in model.parameters():  # also norms, biases, token types: their initial values hide mistakes
        parameter.data += 0.2 * torch.randn_like(parameter)
    greedy = generate_replies(model, contexts(), SPECIAL, options(max_length=8))
    assert greedy == [textbook(model, context, max_new_tokens=8, min_new_tokens=1) for context in contexts()]
    only_choice = options(max_length=8, no_sample=False, top_k=1)
    assert generate_replies(model, contexts(), SPECIAL, only_choice, samples=2) == [
        reply for reply in greedy for _ in range(2)]
    replies = every_reply()
    lengths = torch.tensor([len(reply) for reply in replies])
    found = generate_replies(model, contexts(), SPECIAL, options(num_beams=140, length_penalty=1.0))
    for context, reply in zip(contexts(), found, strict=True):
        best = replies[(log_likelihoods(model, context, replies) / lengths).argmax()]
        assert reply == [token for token in best if token in WORDS]


def test_shared_beginnings_change_no_reply():
    """Share beginnings in every way: none, all, one inside another, equal tokens at other positions or types."""
    alike = [Segment([0, 5, 6, 3, 7], [2, 2, 2, 3, 3]), Segment([0, 5, 6, 3, 7], [2, 2, 2, 3, 3]),
             Segment([0, 5, 6], [2, 2, 2]), Segment([0, 5, 6, 3, 7, 2, 8, 3, 9], [2, 2, 2, 3, 3, 2, 2, 3, 3]),
             Segment([0, 5, 6, 3, 7], [2, 2, 2, 3, 3], 4), Segment([0, 5, 6, 3, 7], [2, 3, 2, 3, 3]),
             Segment([0, 5, 9, 9], [2, 2, 2, 2])]
    differ = 0
    for seed in range(10):
        for family in ("gpt2", "openai-gpt"):
            model = tiny_model(family, seed)
            together = generate_replies(model, alike, SPECIAL, options(max_length=8))
            assert together == [textbook(model, context, max_new_tokens=8, min_new_tokens=1)
                                if not context.start else generate_replies(model, [context], SPECIAL,
                                                                           options(max_length=8))[0]
                                for context in alike]
            assert together[0] == together[1]
            differ += len(set(map(tuple, together)))
    assert differ > 60


@pytest.mark.parametrize("way", [options(max_length=3), options(max_length=3, num_beams=2)])
def test_nan_logits_end_one_reply_with_a_warning(way, caplog):
    checked = 0
    for seed in range(10):
        model, good = tiny_model("gpt2", seed), Segment([0, 5, 6, 3, 7], [2, 2, 2, 3, 3])
        model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.clone())
        model.transformer.wte.weight.data[9] = math.nan  # sequences with a 9 get NaN
        alone, = generate_replies(model, [good], SPECIAL, way)
        if caplog.text or not alone:  # the reply contains a 9, or is empty
            caplog.clear()
            continue
        assert generate_replies(model, [Segment([0, 3, 9], [2, 3, 3]), good], SPECIAL, way) == [[], alone]
        assert "1 of 2 replies end early" in caplog.text
        caplog.clear()
        checked += 1
    assert checked
