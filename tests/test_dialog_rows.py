"""Compare rows of whole dialogs with one row per turn: losses, scores and gradients are equal."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import SAMPLE, TINY, TINY_TOKENS, make_checkpoint

from inputs import DialogDataset, Row, Specials, TurnDataset, collate, pack_dialog, pack_turn
from tokenization import get_tokenizer
from utils import get_dataset
from weights import add_special_tokens_, load_model

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512, "vocab_size": TINY_TOKENS}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write dialogs of the sample; in the last one, the history of a turn is not the dialog so far."""
    dialogs = [{**dialog, "utterances": dialog["utterances"][:3]}
               for dialog in json.loads(SAMPLE.read_text("utf-8"))["train"][:6]]
    dialogs[-1]["utterances"][1]["history"] = ["something else altogether ."]
    candidates = dialogs[0]["utterances"][0]["candidates"]
    candidates[0] = candidates[-1]  # the gold reply is also a distractor
    path = tmp_path_factory.mktemp("dialogs") / "data.json"
    path.write_text(json.dumps({"train": dialogs, "valid": dialogs}))
    return path


@pytest.fixture(scope="module", params=["gpt", "llama"])
def setting(request, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    model = load_model(str(make_checkpoint(folder, **LLAMA) if request.param == "llama" else TINY))
    tokenizer = get_tokenizer(str(TINY))
    add_special_tokens_(model, tokenizer)
    return model, tokenizer, get_dataset(tokenizer, str(corpus), str(folder / "cache"))["train"]


@pytest.mark.parametrize("max_history, history_first", [(20, False), (20, True), (1, False)])
def test_dialog_rows_equal_single_turns(setting, max_history, history_first):
    model, tokenizer, split = setting
    shape = {"max_positions": model.max_positions, "max_history": max_history,
             "history_start": 100 if history_first else 0}
    turns, dialogs = TurnDataset(split, tokenizer, **shape), DialogDataset(split, tokenizer, **shape)
    if max_history == 20:
        assert len(dialogs) < 0.7 * len(turns)
    losses, gradients = {}, {}
    for name, dataset in (("turns", turns), ("dialogs", dialogs)):
        model.zero_grad()
        out = model(**collate([dataset[index] for index in range(len(dataset))], tokenizer.pad_token_id))
        (out.lm_loss + out.mc_loss).backward()
        losses[name] = (out.lm_loss.item(), out.mc_loss.item(), int(out.turns), int(out.tokens.sum()))
        gradients[name] = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        scores = out.mc_logits
        if name == "turns":
            alone, hits = scores, out.gold_rank
    assert losses["dialogs"] == pytest.approx(losses["turns"], rel=1e-5)
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
    assert out.gold_rank.tolist() == hits.tolist()
    torch.testing.assert_close(gradients["dialogs"], gradients["turns"], rtol=1e-3, atol=2e-6)


def test_lengths_equal_those_of_the_rows(setting):
    model, tokenizer, split = setting
    dataset = DialogDataset(split, tokenizer, 512, max_history=20, permutations=2, num_candidates=3)
    lengths, too_long = dataset.lengths()
    rows = np.array([len(dataset[index].input_ids) for index in range(len(dataset))])
    assert too_long == 0 and len(lengths) == len(rows)
    first = slice(0, len(rows) // 2)  # later permutations take other distractors
    assert (rows[first] <= lengths[first]).all() and (rows[first] == lengths[first]).mean() > 0.7
    assert (abs(rows - lengths) < 0.3 * lengths).all()


def test_every_turn_is_in_one_row(setting):
    model, tokenizer, split = setting
    dataset = DialogDataset(split, tokenizer, model.max_positions, max_history=20)
    assert sum(len(dataset[index].mc_token_ids) for index in range(len(dataset))) == split.num_turns
    assert dataset.place(0) == "train[0].utterances[0]"


def test_long_turns_lose_their_oldest_context(setting):
    model, tokenizer, split = setting
    dataset = DialogDataset(split, tokenizer, 48, max_history=20)
    alone = TurnDataset(split, tokenizer, 48, max_history=20)
    assert dataset.lengths()[1] == alone.lengths()[1] > 0
    for index in range(len(dataset)):
        assert max(dataset[index].position_ids) < 48


def test_a_dialog_by_hand():
    special = Specials(bos=90, eos=91, speaker1=92, speaker2=93, pad=94)
    row = pack_dialog([[1]], [[2], [3, 4], [5]], [(1, [[6], [3, 4]]), (3, [[7, 8]])], special, 100)
    #                  0   1   2   3   4   5  6   7   8   9   10  11 | eos  6  eos | eos
    assert row.input_ids == [90, 1, 93, 2, 92, 3, 4, 93, 5, 92, 7, 8, 91, 6, 91, 91]
    assert row.position_ids == [*range(12), 7, 5, 6, 12]
    assert row.segment_ids == [0] * 12 + [1, 2, 2, 3]
    assert row.visible == [12] * 12 + [7, 5, 5, 12]
    assert row.mc_token_ids == [[14, 12], [15]]
    assert [(place, label) for place, label in enumerate(row.labels) if label >= 0] == \
        [(5, 3), (6, 4), (7, 91), (10, 7), (11, 8), (12, 91)]
    assert row.token_type_ids == [92, 92, 93, 93, 92, 92, 92, 93, 93, 92, 92, 92, 92, 92, 92, 92]


def test_a_single_turn_packs_like_pack_turn():
    special = Specials(bos=90, eos=91, speaker1=92, speaker2=93, pad=94)
    alone = pack_turn([[1]], [[2]], [[6], [3, 4]], special, 100)
    together = pack_dialog([[1]], [[2]], [(1, [[6], [3, 4]])], special, 100)
    assert sorted(zip(alone.input_ids, alone.position_ids, strict=True))[-1] == \
        sorted(zip(together.input_ids, together.position_ids, strict=True))[-1]
    assert len(together.input_ids) == len(alone.input_ids) - 1  # candidates share the context's <speaker1>


def test_gold_places_and_padding_change_nothing(setting):
    model, tokenizer, split = setting
    rows = [DialogDataset(split, tokenizer, model.max_positions, max_history=20)[index] for index in range(3)]
    batch, wide = (collate(rows, tokenizer.pad_token_id, multiple) for multiple in (1, 64))
    assert wide["input_ids"].shape[1] % 64 == 0 and len(wide["mc_rows"]) == 64
    results = []
    for one in (batch, wide, {name: tensor for name, tensor in batch.items() if name != "gold_places"}):
        model.zero_grad()
        out = model(**one)
        (out.lm_loss + out.mc_loss).backward()
        results.append([out.nll, out.lm_loss, out.mc_loss, out.turns, out.mc_logits[:len(batch["mc_rows"])],
                        *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    for plain, padded, sought in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, atol=1e-6, rtol=1e-4)
        assert torch.equal(plain, sought)


@pytest.mark.parametrize("length, padded", [(9, 16), (250, 256), (513, 544), (1000, 1024), (1985, 2048)])
def test_long_rows_on_gpus_have_few_lengths(length, padded):
    row = Row([5] * length, [5] * length, [*range(length)], [0] * length, [-100] * length, [[0]], [1] * length)
    assert collate([row], 0, 8)["input_ids"].shape == (1, padded)
    assert collate([row], 0)["input_ids"].shape == (1, length)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_step_never_waits_for_the_gpu(setting):
    model, tokenizer, split = setting
    rows = [DialogDataset(split, tokenizer, model.max_positions, max_history=20)[index] for index in range(3)]
    network = copy.deepcopy(model).to("cuda")
    batch = {name: tensor.pin_memory() for name, tensor in collate(rows, tokenizer.pad_token_id, 8).items()}
    for mode in ("default", "error"):  # the first step allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = network(**{name: tensor.to("cuda", non_blocking=True) for name, tensor in batch.items()})
            (out.lm_loss + out.mc_loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
