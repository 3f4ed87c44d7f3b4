"""Compare the page's view into the model with transformers' own model on the plain sequence."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from inputs import Specials, build_context
from model import GPT2DoubleHeads
from web.insight import note_attention_, read


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return GPT2DoubleHeads(GPT2Config(vocab_size=60, n_embd=32, n_head=4, n_layer=3, n_positions=64,
                                      initializer_range=0.5, num_labels=1)).eval()


def test_readings_equal_the_plain_model(model):
    plain = GPT2LMHeadModel(copy.deepcopy(model.config))
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.set_attn_implementation("eager")
    plain.eval()
    note_attention_(model)
    special = Specials(*range(5))
    context = build_context([[10, 11, 12], [13, 14]], [[20, 21, 22]], special)
    candidates = [[30, 31], [32, 33, 34, 35], [40, 41, 42]]
    readings, weights = read(model, special, context, candidates, attention=True)
    for reply, reading in zip(candidates, readings, strict=True):
        ids = torch.tensor([[*context.ids, special.speaker1, *reply, special.eos]])
        types = torch.tensor([[*context.types, *[special.speaker1] * (len(reply) + 2)]])
        with torch.no_grad():
            out = plain(ids, token_type_ids=types, output_attentions=True, output_hidden_states=True)
            choice = model.multiple_choice_head(out.hidden_states[-1][:, -1:, None])
        length = len(context.ids)
        torch.testing.assert_close(reading.logits, out.logits[0, length:-1], atol=1e-4, rtol=1e-4)
        assert abs(reading.choice - choice.item()) < 1e-4
        expected = out.logits[0, length:-1].log_softmax(-1).gather(-1, ids[0, length + 1:, None]).mean().item()
        assert abs(reading.likelihood - expected) < 1e-4
    mean = torch.stack(out.attentions).mean((0, 2))[0]
    torch.testing.assert_close(weights[:, :length], mean[length:-1, :length], atol=1e-5, rtol=1e-4)
    assert read(model, special, context, candidates)[1] is None
