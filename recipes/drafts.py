"""Let a model answer training turns, and count its replies' n-grams, from which the chat guesses tokens (drafts.py).

    python recipes/drafts.py CHECKPOINT DATA [TURNS]

CHECKPOINT: a folder; drafts.safetensors is written into it. DATA: a data file. TURNS: the number of random training
turns to answer (default: 4,096). Guesses make a chat faster; in float32 its replies stay the same.
"""

import random
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from cli import InputError, command, positive_number
from decoding import Decoding, fitted_context, generate_replies, load_checkpoint
from drafts import count_ngrams, write_drafts
from inputs import Specials, TurnDataset
from utils import get_dataset

BATCH = 32  # turns


def main() -> None:
    if not 3 <= len(sys.argv) <= 4 or not Path(sys.argv[1]).is_dir():
        raise InputError("name the folder of a model, a data file and perhaps a number of turns")
    try:
        folder, number = Path(sys.argv[1]), positive_number(sys.argv[3] if len(sys.argv) > 3 else "4096")
    except ArgumentTypeError as error:
        raise InputError(f"TURNS: {error}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_checkpoint(str(folder), device, fp16="bf16")
    split = get_dataset(tokenizer, sys.argv[2], "dataset_cache")["train"]
    dataset, special = TurnDataset.for_model(model, split, tokenizer), Specials.of(tokenizer)
    greedy = Decoding(no_sample=True, max_length=40)
    drawn = random.Random(42).sample(range(len(dataset)), min(number, len(dataset)))
    replies: list[list[int]] = []
    for start in tqdm(range(0, len(drawn), BATCH), desc="Replies", unit=" batches"):
        contexts = [fitted_context(model, *dataset.context(turn), special, greedy.max_length)
                    for turn in sorted(drawn)[start:start + BATCH]]
        replies += generate_replies(model, contexts, special, greedy)
    path = write_drafts(count_ngrams([special.speaker1, *reply, special.eos] for reply in replies), folder)
    print(f"{path}: from {sum(map(len, replies)):,} tokens of {len(replies):,} replies")


if __name__ == "__main__":
    command(main)
