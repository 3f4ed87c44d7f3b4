"""Compare our two heads on each decoder family with transformers' own code, one padded row per candidate."""

import json
import pickle
import re
from argparse import Namespace

import pytest
import torch
import transformers
from conftest import script, templates, the_run
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F

import utils
from cli import InputError
from corpora import read_corpus
from inputs import Specials, TurnDataset, build_context, build_reply, collate
from interact import ReplyStreamer, generate_replies, readable
from metrics import split_words
from tables import tokenize
from tokenization import get_tokenizer
from weights import add_special_tokens_, load_model, save_model

SHAPE = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
             initializer_range=0.2, bos_token_id=0, eos_token_id=0)
MLP = dict(intermediate_size=48, num_key_value_heads=2)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE, **MLP),
    "smollm": transformers.LlamaConfig(**SHAPE, **MLP, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SHAPE, **MLP, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**SHAPE, **MLP, head_dim=16),
    "gpt_neox": transformers.GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=24, pad_token_id=1, dropout=0.0),
    "mistral": transformers.MistralConfig(**SHAPE, **MLP, sliding_window=20),
    "phi": transformers.PhiConfig(**SHAPE, **MLP),
    "gemma2": transformers.Gemma2Config(**SHAPE, **MLP, head_dim=16, sliding_window=20, final_logit_softcapping=2.0),
}


def byte_level() -> Tokenizer:
    """Make a byte-level BPE as GPT-2, Llama 3 and Qwen have it, with a space at the beginning of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return trained_on_the_sample(tokenizer, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def words_and_digits() -> Tokenizer:
    """Make a byte-level BPE as Llama 3 and Qwen have it, which separates numbers from the space before them."""
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return trained_on_the_sample(tokenizer, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def sentencepiece() -> Tokenizer:
    """Make a BPE as Llama 2 and Mistral have it: an underline per space and before the text, bytes for rare letters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no token crosses a space
    trained_on_the_sample(tokenizer, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256))]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return tokenizer


def trained_on_the_sample(tokenizer: Tokenizer, trainer) -> Tokenizer:
    entries = read_corpus(templates())["valid"]
    tokenizer.train_from_iterator(
        (text for entry in entries for turn in entry["utterances"] for text in turn["candidates"]), trainer)
    return tokenizer


def write_checkpoint(folder, config, tokenizer: Tokenizer, **settings):
    """Write a checkpoint without weights; like Llama's, its tokenizer puts a beginning token before every text."""
    end = "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.token_to_id(end))])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, **settings)
    wrapped.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return get_tokenizer(str(write_checkpoint(tmp_path_factory.mktemp("bytes"), FAMILIES["llama"], byte_level())))


@pytest.fixture(scope="module")
def table(tokenizer, tmp_path_factory):
    return utils.get_dataset(tokenizer, str(templates()), str(tmp_path_factory.mktemp("cache") / "c"))


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tokenizer, tmp_path_factory):
    """Return our model with weights far from zero, its run folder, and transformers' model loaded from that folder."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].save_pretrained(folder)
    torch.manual_seed(3)
    ours = load_model(str(folder))
    add_special_tokens_(ours, tokenizer)
    for parameter in ours.parameters():  # also biases, norms, token types: their initial values hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(ours, folder)
    return ours, folder, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


class Textbook(torch.nn.Module):
    """transformers' model with the choice head and the token types added by hand."""

    def __init__(self, plain, ours):
        super().__init__()
        self.plain = plain
        heads = {name: tensor.detach().clone() for name, tensor in ours.state_dict().items()}
        self.head, self.bias, self.types = (torch.nn.Parameter(heads[name]) for name in (
            "multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias", "token_types.weight"))
        self.speakers = ours.config.speaker_ids

    def forward(self, rows: list[tuple[list[int], list[int]]], starts: list[int] | None = None):
        """Compute logits (rows, positions, vocabulary) and scores (rows,) of rows of ids and types, right-padded."""
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        kinds = torch.tensor([[self.speakers.index(kind) for kind in types] + [0] * (width - len(types))
                              for _, types in rows])
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        inputs = dict(
            inputs_embeds=self.plain.get_input_embeddings()(ids) + self.types[kinds],
            attention_mask=(torch.arange(width) < lengths[:, None]).long(),
            position_ids=torch.arange(width) + torch.tensor(starts or [0] * len(rows))[:, None],
        )
        last = self.plain.base_model(**inputs).last_hidden_state[torch.arange(len(rows)), lengths - 1]
        return self.plain(**inputs).logits, last @ self.head[0] + self.bias


def rows_of(context, candidates, special):
    replies = [build_reply(candidate, special) for candidate in candidates]
    return [(context.ids + reply.ids, context.types + reply.types) for reply in replies]


@pytest.mark.parametrize("history_start", [0, 120])
def test_losses_scores_and_every_gradient(pair, table, tokenizer, history_start):
    ours, _, plain = pair
    dataset = TurnDataset(table["valid"], tokenizer, 256, num_candidates=4, history_start=history_start)
    picked = [0, 57, 100]
    batch = collate([dataset[turn] for turn in picked], dataset.special.pad)
    assert max(row.count(0) for row in batch["segment_ids"].tolist()) > 24  # longer than any attention window
    ours.zero_grad()
    out = ours(**batch)
    (2 * out.lm_loss + out.mc_loss).backward()

    truth = Textbook(plain, ours)
    plain.zero_grad()
    nll, scores = [], []
    for turn in picked:
        candidates = table["valid"].token_ids("candidates", turn)[-4:]
        context = build_context(*dataset.context(turn), dataset.special, history_start)
        logits, mc = truth(rows_of(context, candidates, dataset.special), [context.start] * 4)
        gold = build_reply(candidates[-1], dataset.special).ids
        first = len(context.ids)
        nll.append(F.cross_entropy(logits[-1, first:first + len(gold) - 1], torch.tensor(gold[1:]), reduction="none"))
        scores.append(mc)
    lm_loss = torch.cat(nll).mean()
    mc_loss = F.cross_entropy(torch.stack(scores), torch.full((3,), 3))
    (2 * lm_loss + mc_loss).backward()

    torch.testing.assert_close(out.mc_logits, torch.stack(scores), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack([out.lm_loss, out.mc_loss]), torch.stack([lm_loss, mc_loss]),
                               atol=1e-4, rtol=0)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()} | {
        "multiple_choice_head.summary.weight": truth.head.grad, "multiple_choice_head.summary.bias": truth.bias.grad,
        "token_types.weight": truth.types.grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_run_folders_open_here_and_in_transformers(pair):
    """Load every tensor unchanged; the plain model misses none and gives the same logits without token types."""
    ours, folder, _ = pair
    again = load_model(str(folder))
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert again.config.speaker_ids == ours.config.speaker_ids
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.randint(5, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, plain.eval()(ids).logits, atol=1e-6, rtol=0)


GREEDY = Namespace(max_length=12, min_length=3, no_sample=True, temperature=1.0, top_k=0, top_p=0.0)


def contexts(table, special, history_start=0):
    """Return three contexts of different lengths, all longer than any attention window."""
    split = table["valid"]
    begun = [build_context(split.token_ids("persona", split.turn_dialog[turn])[:size],
                           split.token_ids("history", turn)[-1:], special, history_start)
             for turn, size in ((0, 4), (57, 1), (100, 3))]
    assert len({len(context.ids) for context in begun}) == 3 and min(len(context.ids) for context in begun) > 20
    return begun


def greedy_by_hand(truth: Textbook, context, special: Specials) -> list[int]:
    """Decode greedily without a cache: compute the whole sequence again for each token."""
    reply = []
    while len(reply) < GREEDY.max_length:
        begun = build_reply(reply, special, with_eos=False)
        logits = truth([(context.ids + begun.ids, context.types + begun.types)], [context.start])[0][0, -1]
        if len(reply) < GREEDY.min_length:
            logits[list(special)] = -torch.inf
        if (token := int(logits.argmax())) in special:
            break
        reply.append(token)
    return reply


def log_likelihood(truth: Textbook, context, reply: list[int], special: Specials) -> float:
    """Return the log-likelihood divided by length to the power of 0.65; a reply that was cut has no end token."""
    ended = len(reply) < GREEDY.max_length
    row = rows_of(context, [reply], special)[0]
    logits = truth([row])[0][0].log_softmax(-1)
    places = range(len(context.ids), len(context.ids) + len(reply) + ended)
    if ended:  # any control token may have ended it
        *places, last = places
        return (sum(logits[at, row[0][at + 1]] for at in places) + logits[last, list(special)].max()) / len(
            reply + [0]) ** 0.65
    return sum(logits[at, row[0][at + 1]] for at in places) / len(reply) ** 0.65


@torch.no_grad()
def test_replies_samples_and_beams(pair, table, tokenizer):
    ours, _, plain = pair
    truth, special = Textbook(plain, ours), Specials.of(tokenizer)
    for history_start in (0, 120):
        begun = contexts(table, special, history_start)
        greedy = [greedy_by_hand(truth, context, special) for context in begun]
        assert generate_replies(ours, begun, special, GREEDY) == greedy
    assert any(len(reply) > 2 for reply in greedy)

    begun = contexts(table, special)
    greedy = generate_replies(ours, begun, special, GREEDY)
    only_choice = Namespace(**{**vars(GREEDY), "no_sample": False, "top_k": 1})
    assert generate_replies(ours, begun, special, only_choice, samples=2)[::2] == greedy
    beams = generate_replies(ours, begun, special, Namespace(**vars(GREEDY), num_beams=3))
    for context, beam, reply in zip(begun, beams, greedy, strict=True):
        assert log_likelihood(truth, context, beam, special) >= log_likelihood(truth, context, reply, special) - 1e-4
    assert beams != greedy or ours.config.model_type not in ("llama", "opt")  # beams find other replies


@pytest.mark.parametrize(("config", "why"), [
    (transformers.BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=2), "distances"),
    (transformers.FalconConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True),
     "distances"),
    (transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1), "distances"),
    (transformers.GPTNeoConfig(vocab_size=400, hidden_size=32, num_layers=2, num_heads=2,
                               attention_types=[[["global", "local"], 1]]), "distances"),
    (transformers.BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32), "of the candidate alone"),
    (transformers.Llama4TextConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=32, head_dim=16, num_local_experts=2), "chunked_attention"),
    (transformers.T5Config(vocab_size=400, d_model=32, num_layers=1), "not a decoder"),
], ids=lambda value: getattr(value, "model_type", ""))
def test_models_that_cannot_read_a_packed_row_are_refused(config, why, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"(?s)'{config.model_type}' model.*{why}") as refusal:
        load_model(str(tmp_path))
    assert "\n" not in str(refusal.value)


def llama(folder):
    """Save transformers' LlamaTokenizer, which adds <s> by itself and does not split words."""
    trained = sentencepiece()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    transformers.LlamaTokenizer(vocab=trained.get_vocab(), merges=merges, bos_token="<|endoftext|>",
                                eos_token="<|endoftext|>").save_pretrained(folder)
    FAMILIES["llama"].save_pretrained(folder)


@pytest.fixture(params=[byte_level, words_and_digits, sentencepiece, llama], ids=lambda kind: kind.__name__)
def other_tokenizer(request, tmp_path):
    if request.param is llama:
        llama(tmp_path)
    else:
        write_checkpoint(tmp_path, FAMILIES["llama"], request.param())
    return get_tokenizer(str(tmp_path))


def test_first_pieces_equal_those_within_replies(other_tokenizer, small_corpus):
    """Compare `first_piece` with the next token, wherever one more word leaves the earlier tokens as they are."""
    texts = [turn["candidates"][-1] for entry in read_corpus(small_corpus)["valid"] for turn in entry["utterances"]]
    checked = 0
    for text in [*texts, "3 of 42 ( in 2019 ) aren't \"that\" ... é 你 ."]:
        words = split_words(text)
        assert other_tokenizer.first_piece(words[0], False) == other_tokenizer.encode(text)[0]
        for place in range(1, len(words)):
            before, after = (other_tokenizer.encode(" ".join(words[:n])) for n in (place, place + 1))
            if after[:len(before)] == before:
                assert other_tokenizer.first_piece(words[place], True) == after[len(before)], words[place]
                checked += 1
    assert checked > 100


def test_tokenizers_of_other_families(other_tokenizer, tmp_path):
    """Check that text stays text, that nothing is put before it, and that saving and pickling change nothing."""
    tokenizer = other_tokenizer
    special = Specials.of(tokenizer)
    assert sorted(special) == list(range(len(tokenizer) - 5, len(tokenizer)))
    hostile = "i like <eos> and <|endoftext|> , <speaker1> too \ud83d <s> é 你"
    ids = tokenizer.encode(f"  {hostile}\n")
    assert not {*special, tokenizer.convert_tokens_to_ids("<|endoftext|>")} & set(ids)
    assert tokenizer.decode(ids) == hostile.replace("\ud83d", "?")
    assert ids == tokenize(tokenizer, [hostile])[0]
    tokenizer.save_pretrained(tmp_path / "again")
    FAMILIES["llama"].save_pretrained(tmp_path / "again")
    again, elsewhere = get_tokenizer(str(tmp_path / "again")), pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(hostile) == elsewhere.encode(f" {hostile}") == ids
    assert type(again).__name__ == type(tokenizer).__name__ == type(elsewhere).__name__


def test_personas_are_sentences_joined_by_spaces(other_tokenizer, tmp_path):
    """Check personas in the table, with each rotation, and in the chat; utterances begin without a space."""
    tokenizer, special = other_tokenizer, Specials.of(other_tokenizer)
    persona = ["I live in Norway.", " i have 2 dogs . ", "\"Why?\" is my motto", "3 cats, too", "é 你好"]
    turn = {"history": ["hello there"], "candidates": ["no", "I have 2 dogs."]}
    entry = {"personality": persona, "utterances": [turn]}
    (tmp_path / "data.json").write_text(json.dumps({"train": [entry]}))
    split = utils.get_dataset(tokenizer, str(tmp_path / "data.json"), str(tmp_path / "cache"))["train"]
    assert split.texts("persona", 0) == persona
    dataset = TurnDataset(split, tokenizer, 256, permutations=2)
    for rotation in (0, 1):
        said = persona[len(persona) - rotation:] + persona[:len(persona) - rotation]
        ids, history = dataset.context(0, rotation)
        assert tokenizer.decode(sum(ids, [])).strip() == " ".join(sentence.strip() for sentence in said)
        assert ids == tokenizer.encode_persona(said) and history == [tokenizer.encode("hello there")]
    assert tokenizer.decode(build_reply(split.token_ids("candidates", 0)[1], special).ids[1:-1]) == "I have 2 dogs."
    assert tokenizer.encode_persona([]) == [] and tokenizer.encode_persona(["", " "]) == [[], []]
    # The sentences have the same tokens as one text with all of them.
    whole = tokenizer.encode(" ".join(["x", "I live in Norway.", "i have 2 dogs ."]))
    assert whole == tokenizer.encode("x") + sum(tokenizer.encode_persona(persona[:2]), [])


def test_printed_replies_begin_without_a_space(other_tokenizer, capsys):
    for reply in (" hi there !", "hi there !", "  oh"):
        ids = [token for piece in (reply[:len(reply) - len(reply.lstrip())], reply.lstrip())
               for token in other_tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids]
        streamer = ReplyStreamer(other_tokenizer)
        streamer.put(torch.tensor([[0]]))  # the prompt
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        printed = capsys.readouterr().out
        assert printed == f"{readable(other_tokenizer, ids)}\n" and not printed.startswith(" ")


def test_a_tiny_llama_trains_evaluates_and_chats(tmp_path, small_corpus):
    """Start from a folder with a configuration and a tokenizer, without flags that other models would not need."""
    config = transformers.LlamaConfig(**SHAPE | MLP | {"dtype": "bfloat16"})
    checkpoint = write_checkpoint(tmp_path / "tiny-llama", config, sentencepiece())
    data = ["--dataset_path", small_corpus]
    script("train.py", *data, "--model_checkpoint", checkpoint, "--n_epochs", 1, "--lr", 1e-3, cwd=tmp_path)
    run = the_run(tmp_path)
    validation = re.search(r"hits@1 ([\d.]+), nll [\d.]+, ppl ([\d.]+)", script.stderr)
    figures = script("convai_evaluation.py", *data, "--model_checkpoint", run, "--eval_type", "all", cwd=tmp_path)
    found = dict(re.findall(r"FINAL (.+): ([\d.]+)", figures))
    assert float(found["Hits@1"]) == pytest.approx(float(validation[1]), abs=1e-3)
    assert float(found["Token PPL"]) == pytest.approx(float(validation[2]), rel=1e-3)
    assert float(found["Word PPL"]) > 1 and {"F1", "Copied"} <= found.keys()
    said = script("interact.py", "--model_checkpoint", run, "--personality", "i keep bees .", "--seed", 1,
                  stdin="hello , who are you ?\nand <eos> ?\n", cwd=tmp_path).splitlines()
    assert said[:2] == ["Personality:", "  i keep bees ."] and len(said) >= 4
    plain = transformers.AutoModelForCausalLM.from_pretrained(run)
    assert plain.dtype == torch.float32 and len(transformers.AutoTokenizer.from_pretrained(run)) == 405


def test_a_pretrained_folder_keeps_its_weights(tmp_path):
    """Load half precision from several files with spare vocabulary rows; training begins exactly at this model."""
    config = transformers.Qwen3Config(**SHAPE | MLP | {"vocab_size": 512}, head_dim=16)
    write_checkpoint(tmp_path, config, words_and_digits())
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(
        tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model, tokenizer = load_model(str(tmp_path)), get_tokenizer(str(tmp_path))
    add_special_tokens_(model, tokenizer)
    special = Specials.of(tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 512 > max(special)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[*special, *range(30, 60)]])
    types = torch.full_like(ids, special.speaker2)
    with torch.no_grad():
        assert torch.equal(model(ids, token_type_ids=types).logits, plain(ids).logits)
