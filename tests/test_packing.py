"""Compare decoding with packed bfloat16 weights, and decoding that continues a conversation, with plain passes."""

import copy
import random

import pytest
import torch
from test_serving import SPECIAL, VOCABULARY, asked, sentence, small_model

from decoding import Decoding, Memory, generate_replies
from inputs import begin_reply, build_context
from packing import PackedLinear, Part, can_pack, join_, prepare_to_decode_
from sequences import StaticSequences, sequences_for

FAMILIES = ["llama", "qwen2", "mistral", "gpt2", "openai-gpt", "gemma2"]


def contexts(rng: random.Random, number: int) -> list:
    return [begin_reply(build_context([sentence(rng)], [sentence(rng) for _ in range(rng.randint(1, 4))], SPECIAL),
                        SPECIAL, []) for _ in range(number)]


@torch.inference_mode()
def logits_of(model, prompts, plain: bool) -> torch.Tensor:
    """Return the logits after each prompt and after each of three further tokens, (4, prompts, vocabulary)."""
    more = [[3, 7, 9][step:step + 1] * len(prompts) for step in range(3)]
    if not plain:
        sequences = sequences_for(model, prompts, 1, 4)
        return torch.stack([sequences.logits, *(sequences.step(tokens, SPECIAL.speaker1) for tokens in more)]).float()
    rows = []
    for count in range(4):
        for prompt in prompts:
            ids = [*prompt.ids, *(tokens[0] for tokens in more[:count])]
            types = [*prompt.types, *[SPECIAL.speaker1] * count]
            rows.append(model(torch.tensor([ids]), token_type_ids=torch.tensor([types]),
                              position_ids=prompt.start + torch.arange(len(ids))[None]).logits[0, -1])
    return torch.stack(rows).view(4, len(prompts), -1).float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 5])
def test_packed_weights_are_as_exact_as_plain_ones(family, number):
    """Compare the error of packed bfloat16 with that of transformers' own layers in bfloat16, both against float32."""
    errors = torch.zeros(2)
    for seed in range(3):
        model, prompts = small_model(family, seed), contexts(random.Random(seed), number)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name or "bias" in name:
                    weight.add_(0.3 * torch.randn_like(weight))
        exact = logits_of(model, prompts, plain=True)
        half = copy.deepcopy(model).to(torch.bfloat16)
        packed = prepare_to_decode_(model, "cpu", "bf16")
        if not can_pack(packed):
            pytest.skip("this CPU does not multiply bfloat16")
        assert any(isinstance(module, PackedLinear) for module in packed.modules())
        errors += torch.stack([(logits - exact).square().mean().sqrt() for logits in (
            logits_of(packed, prompts, plain=False), logits_of(half, prompts, plain=True))])
        torch.testing.assert_close(logits_of(packed, prompts, plain=True), exact, rtol=0.1, atol=1.0)
    assert 0 < errors[0] < 1.3 * errors[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_conversation_computes_only_what_is_new(family, beams):
    """Hold a conversation whose persona and history change: the replies are those of a model without memory."""
    rng, model, memory, counted = random.Random(5), small_model(family, 4), Memory(), []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: counted.append(inputs[0].numel()))
    persona, history, saved = [sentence(rng)], [], 0
    for turn in range(8):
        if turn == 4:
            history = history[2:]  # the window has moved on
        if turn == 6:
            persona = [sentence(rng)]
        history.append(sentence(rng))
        way = asked(max_length=6, min_length=6, num_beams=beams, no_sample=turn % 2 == 0, seed=turn + 1)
        context = build_context(persona, history, SPECIAL)
        replies, sizes = [], []
        for kept in (memory, None):
            counted.clear()
            torch.manual_seed(turn)
            replies.append(generate_replies(model, [context], SPECIAL, way, memory=kept)[0])
            sizes.append(counted[0])
        assert replies[0] == replies[1]
        assert sizes[1] == len(context.ids) + 1 and all(token < VOCABULARY for token in replies[0])
        if turn in (1, 2, 3, 5, 7):  # the context extends the last one, whose reply is computed except for its end
            assert sizes[0] <= len(history[-1]) + 3 + (6 if beams > 1 else 0)
            saved += 1
        history.append(replies[0])
    assert saved == 5


ENDING = {"llama": 1, "qwen2": 2, "mistral": 1, "gpt2": 6, "openai-gpt": 4, "gemma2": 10}  # some replies end early


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", [1, 2])
def test_sequences_for_gpus_give_the_same_replies(family, samples, monkeypatch):
    """Decode as on CPUs, and with the sequences and joined layers of GPUs; on a CPU, their passes are not recorded."""
    model, prompts, lengths = small_model(family, 4), contexts(random.Random(7), 8), set()
    monkeypatch.setattr("packing.can_pack", lambda model: False)
    joined = prepare_to_decode_(copy.deepcopy(model), "cpu")
    join_(joined)
    assert any(isinstance(module, Part) for module in joined.modules()) == (family in FAMILIES[:3])
    for how in ({"no_sample": True}, {"num_beams": 3}, {"num_beams": 2, "no_repeat_ngram_size": 1}):
        way = Decoding(max_length=9, logit_bias=((SPECIAL.eos, ENDING[family]),), **how)
        with monkeypatch.context() as patch:
            expected = generate_replies(model, prompts, SPECIAL, way, samples=samples)
            patch.setattr("decoding.sequences_for", StaticSequences)
            memory = Memory()
            for _ in range(2):  # the second time in the same room, if that has not changed
                assert generate_replies(joined, prompts, SPECIAL, way, samples=samples, memory=memory) == expected
        lengths.update(map(len, expected))
    assert len(lengths) > 1
