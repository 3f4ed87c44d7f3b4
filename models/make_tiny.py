"""Write models/tiny: the configuration and tokenizer of a GPT small enough to train in two minutes on a laptop.

The folder has no weights, so training starts at random. The tokenizer is a GPT-1 byte-pair encoding, learnt from the
training split that tiny_corpus.py writes. It contains every printable ASCII character, so that it can spell any English
input.

    python -m models.tiny_corpus --out .demo/tiny_corpus.json
    python models/make_tiny.py .demo/tiny_corpus.json
"""

import argparse
import json
import string
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import OpenAIGPTConfig

HERE = Path(__file__).parent
VOCABULARY = 2000


def sentences_of(corpus: Path) -> list[str]:
    """Return each distinct sentence of the training split."""
    sentences = {}
    for entry in json.loads(corpus.read_text("utf-8"))["train"]:
        sentences |= dict.fromkeys(entry["personality"])
        for turn in entry["utterances"]:
            sentences |= dict.fromkeys(turn["history"] + turn["candidates"])
    return list(sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="the JSON file that tiny_corpus.py wrote")
    args = parser.parse_args()
    letters = [letter for letter in string.printable if not letter.isspace()]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(sentences_of(args.corpus), trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False,
        special_tokens=["<unk>", *(letter + "</w>" for letter in letters), "\n</w>"],
    ))
    folder = HERE / "tiny"
    folder.mkdir(exist_ok=True)
    tokenizer.model.save(str(folder))
    config = OpenAIGPTConfig(vocab_size=tokenizer.get_vocab_size(), n_positions=256, n_embd=128, n_layer=2, n_head=4,
                             initializer_range=0.08)  # 0.02 is for large models: at this size it learns too slowly
    config.to_json_file(folder / "config.json")
    print(f"{folder}: {config.vocab_size} tokens")


if __name__ == "__main__":
    main()
