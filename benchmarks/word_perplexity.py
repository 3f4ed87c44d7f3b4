"""Measure word perplexity in turns per second: one packed pass per turn against a pass per word, as in 2019."""

import itertools
import math
from collections import defaultdict

import torch
from textbook import Bench, alternate, close, parse_args, report

from inputs import LengthBatches, build_input_from_segments
from metrics import count_words, split_words
from outputs import SMOOTHING, likelihoods, word_shares


@torch.inference_mode()
def main() -> None:
    args = parse_args(__doc__, turns=16, reference_turns=4)
    bench = Bench(args)
    bench.ours.eval(), bench.own.eval()
    dataset = bench.dataset("valid", 1)
    counts = count_words(bench.table)
    shares = word_shares(counts, bench.tokenizer, False)

    # The reference's dictionary: first piece → {word: share}.
    prefix2words = defaultdict(dict)
    for word, count in counts.items():
        prefix2words[bench.tokenizer.first_piece(word, False)][word] = count + SMOOTHING
    prefix2words.pop(None, None)
    for words in prefix2words.values():
        total = sum(words.values())
        words.update({word: count / total for word, count in words.items()})

    def reference(turn: int) -> tuple[float, int]:
        """Compute a forward pass and the probabilities of all words for each word of the reply, as in 2019."""
        persona, history = dataset.context(turn)
        words, nll, known = split_words(dataset.split.texts("candidates", turn)[-1]), 0.0, 0
        for place, word in enumerate(words):
            if word not in counts:
                continue
            so_far = bench.tokenizer.encode(" ".join(words[:place])) if place else []
            built = build_input_from_segments(persona, history, so_far, bench.tokenizer, with_eos=False)
            logits = bench.own(torch.tensor([[built["input_ids"]]]),
                               token_type_ids=torch.tensor([[built["token_type_ids"]]])).logits[0, 0, -1]
            pieces = logits.softmax(-1)
            probabilities = {}
            for piece, begun in prefix2words.items():
                for candidate, share in begun.items():
                    probabilities[candidate] = pieces[piece].item() * share
            if word in probabilities:
                nll -= math.log(probabilities[word] / sum(probabilities.values()))
                known += 1
        return nll, known

    def ours(turns: list[int], half: str) -> list[dict]:
        return likelihoods(bench.ours, dataset, turns, bench.tokenizer, shares, half)

    checked = [5, len(dataset) // 3]
    for turn, record in zip(checked, ours(checked, ""), strict=True):
        nll, known = reference(turn)
        close(record["word_nll"], nll, 1e-3, "word negative log-likelihood")
        close(record["words"], known, 0, "the number of words")

    lengths, _ = dataset.lengths()
    # Both sides get the same turns: our code computes a batch, and the reference computes some turns of this batch.
    batches = [turns.tolist() for turns in LengthBatches(lengths, args.turns, args.seed)]
    upcoming = {name: itertools.cycle(batches) for name in ("float32", "bfloat16", "reference")}

    def few(turns: list[int]) -> list[int]:
        """Select a few turns of a batch, of all lengths, for the slow reference."""
        return turns[::len(turns) // args.reference_turns][:args.reference_turns]

    seconds = alternate({
        "float32": lambda: ours(next(upcoming["float32"]), ""),
        "bfloat16": lambda: ours(next(upcoming["bfloat16"]), "bf16"),
        "reference": lambda: [reference(turn) for turn in few(next(upcoming["reference"]))],
    }, args.repeats)
    each = seconds["reference"] / args.reference_turns
    report("word_perplexity", args, [
        {"work": f"ConvAI2 whole-word perplexity, {name}", "unit": "turns/s", "ours": args.turns / seconds[name],
         "reference": 1 / each, "ratio": args.turns * each / seconds[name]} for name in ("float32", "bfloat16")])


if __name__ == "__main__":
    main()
