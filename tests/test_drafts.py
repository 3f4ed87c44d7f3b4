"""Test guessed tokens: replies are the same with and without them, and passes are fewer."""

from collections import Counter

import pytest
import torch
from conftest import TINY, error_line, script
from safetensors.torch import save_file
from test_decoders import FAMILIES, byte_level, write_checkpoint

import drafts
from cli import InputError
from decoding import Decoding, Memory, fitted_context, generate_replies, load_checkpoint
from drafts import FILE, Ahead, count_ngrams, read_drafts, write_drafts
from inputs import Specials
from web.batching import Decoder

WAYS = {"greedy": Decoding(no_sample=True, max_length=24), "nucleus": Decoding(max_length=24, seed=5),
        "penalties": Decoding(max_length=24, no_repeat_ngram_size=2, frequency_penalty=0.5, min_length=9, seed=6)}


@pytest.fixture(params=["llama", "gpt_neox", "gemma2", "mistral", "openai-gpt"], scope="module")
def world(request, tmp_path_factory):
    """A model, its special tokens, and contexts."""
    folder = TINY if request.param == "openai-gpt" else write_checkpoint(
        tmp_path_factory.mktemp(request.param), FAMILIES[request.param], byte_level())
    model, tokenizer = load_checkpoint(str(folder), fp16="")
    special = Specials.of(tokenizer)
    contexts = [fitted_context(model, [tokenizer.encode("i like to ski .")], [tokenizer.encode(text)], special, 24)
                for text in ("hi", "what do you do ?", "what do you do ? " * 3)]
    return model, special, contexts


def replies(world, way: Decoding, **how) -> list[list[int]]:
    model, special, contexts = world
    found = []
    for context in contexts:
        torch.manual_seed(way.seed)
        found += generate_replies(model, [context], special, way, **how)
    return found


@pytest.fixture
def passes(monkeypatch):
    """Count the passes that `Ahead` starts, by their number of tokens."""
    counted, step = Counter(), Ahead.step

    def counting(self, compute):
        def count(ids):
            counted[len(ids)] += 1
            return compute(ids)
        return step(self, count)

    monkeypatch.setattr(Ahead, "step", counting)
    return counted


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_guesses_change_no_reply(world, way, passes, monkeypatch):
    model = world[0]
    monkeypatch.setattr(drafts, "GUESSES", 0)
    plain = replies(world, way)
    without = passes.total()
    assert set(passes) == {1} and without >= sum(len(reply) - 1 for reply in plain)
    passes.clear()
    monkeypatch.setattr(drafts, "GUESSES", 3)
    monkeypatch.setattr(model, "drafts", count_ngrams([world[1].speaker1, *reply] for reply in plain), raising=False)
    assert replies(world, way) == plain
    assert passes.total() < without and max(passes) == 4


def test_wrong_guesses_change_no_reply(world, monkeypatch):
    model, way = world[0], WAYS["greedy"]
    monkeypatch.setattr(drafts, "GUESSES", 0)
    plain = replies(world, way)
    monkeypatch.setattr(drafts, "GUESSES", 3)
    wrong = {before: (after + 1) % 200 for before, after in count_ngrams(plain).items()}
    monkeypatch.setattr(model, "drafts", wrong, raising=False)
    assert replies(world, way) == plain


def test_a_conversation_that_goes_on_keeps_only_what_was_said(world, monkeypatch):
    model, special, contexts = world
    way, memory = WAYS["greedy"], Memory()
    first = generate_replies(model, contexts[:1], special, way, memory=memory)[0]
    ids, types = contexts[0].ids, contexts[0].types
    longer = type(contexts[0])(ids + [special.speaker1, *first[:9], special.speaker2, 70, 71],
                               types + [special.speaker1] * 10 + [special.speaker2] * 3, contexts[0].start)
    continued = generate_replies(model, [longer], special, way, memory=memory)
    assert continued == generate_replies(model, [longer], special, way)


def test_the_server_guesses_only_for_a_reply_on_its_own(world, passes):
    model, special, contexts = world
    plain = replies(world, WAYS["greedy"])
    decoder = Decoder(model, special)
    try:
        passes.clear()
        alone = finish(decoder, [decoder.submit(contexts[1], WAYS["greedy"])])
        assert alone == plain[1:2] and passes.total() < len(plain[1])
        together = finish(decoder, [decoder.submit(context, WAYS["greedy"]) for context in contexts * 3])
        assert together == plain * 3
    finally:
        decoder.close()


def finish(decoder: Decoder, submitted: list) -> list[list[int]]:
    while not all(reply.finish for reply in submitted):
        with decoder.wake:
            decoder.wake.wait(0.01)
    return [reply.tokens for reply in submitted]


def test_a_guess_that_is_not_a_number_spoils_nothing(world, monkeypatch):
    model, special, contexts = world
    plain = replies(world, WAYS["greedy"])
    bad = next(token for token in range(3, 250) if token not in {*special, *(t for reply in plain for t in reply),
                                                                 *(t for one in contexts for t in one.ids)})
    weights = model.get_input_embeddings().weight
    if model.get_output_embeddings() is not None and getattr(model.get_output_embeddings(), "weight", None) is weights:
        pytest.skip("the output layer shares the embedding, so every reply would be broken")
    before = weights[bad].clone()
    with torch.no_grad():
        weights[bad] = torch.nan
    try:
        monkeypatch.setattr(model, "drafts", {(token,): bad for token in range(len(weights))}, raising=False)
        assert replies(world, WAYS["greedy"]) == plain
    finally:
        with torch.no_grad():
            weights[bad] = before


def test_a_guess_is_what_followed_the_longest_known_text():
    ahead = Ahead({(1, 2): 3, (2,): 4}, [9, 8, 7, 9, 8], 100)
    assert ahead.guess(3) == [7, 9, 8]  # from the conversation itself
    ahead.ids.append(2)
    assert ahead.guess(1) == [4]
    ahead.ids += [1, 2]
    assert ahead.guess(1) == [3]
    ahead.ids += [1, 2, 6, 1, 2]  # after (1, 2) comes 3 in other replies, 1 and 6 here; (2, 1, 2) is new
    assert ahead.guess(1) == [3]
    assert ahead.guess(0) == []
    assert Ahead({}, [5], 10).guess(3) == []


def test_ngrams_are_counted_as_by_hand():
    assert count_ngrams([[1, 2, 3], [1, 2, 4], [5, 2, 4]]) == {
        (1,): 2, (2,): 4, (1, 2): 3, (5,): 2, (5, 2): 4}  # (1, 2) is followed by 3 and by 4; the first wins


def test_ngrams_survive_a_file(tmp_path):
    known = count_ngrams([[1, 2, 3, 4], [0, 2, 3, 5]])
    write_drafts(known, tmp_path)
    assert read_drafts(tmp_path, 6) == known
    assert read_drafts(tmp_path / "elsewhere", 6) == {}
    write_drafts({}, tmp_path)
    assert read_drafts(tmp_path, 6) == {}


@pytest.mark.parametrize("tensor", [
    torch.tensor([[-1, -1, 1, 6]]), torch.tensor([[-1, -1, -1, 2]]), torch.tensor([[-1, -1, 1, -1]]),
    torch.tensor([[-2, -1, 1, 1]]), torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1, 1, 1]]),
    torch.tensor([1, 1, 1, 1]), torch.zeros(1, 4, dtype=torch.bool)])
def test_a_file_of_another_model_is_refused(tmp_path, tensor):
    save_file({"ngrams": tensor}, tmp_path / FILE)
    with pytest.raises(InputError, match=r"drafts\.safetensors: cannot be read .*make it again"):
        read_drafts(tmp_path, 6)


@pytest.mark.parametrize("damage", [b"", b"not a file of tensors", None])
def test_a_damaged_file_is_refused(tmp_path, damage):
    if damage is None:
        save_file({"other": torch.zeros(1)}, tmp_path / FILE)
    else:
        (tmp_path / FILE).write_bytes(damage)
    with pytest.raises(InputError, match=r"drafts\.safetensors: cannot be read"):
        read_drafts(tmp_path, 6)


@pytest.mark.slow
def test_the_recipe_counts_a_models_replies(tmp_path, small_corpus):
    folder = write_checkpoint(tmp_path / "bot", FAMILIES["llama"], byte_level())
    assert "of 8 replies" in script("recipes/drafts.py", folder, small_corpus, "8", cwd=tmp_path)
    model, tokenizer = load_checkpoint(str(folder), fp16="")
    special = Specials.of(tokenizer)
    assert (special.speaker1,) in model.drafts and all(after < len(tokenizer) for after in model.drafts.values())
    for mistyped, complaint in ((["none", small_corpus], "name the folder of a model"),
                                ([folder, small_corpus, "many"], "drafts.py: error: TURNS:")):
        assert complaint in error_line("recipes/drafts.py", *mistyped, cwd=tmp_path)
