"""Compare DYME's network with a linear model and with the mean, on dialogs that none of them has learnt from.

    PYTHONPATH=. python benchmarks/dyme.py --dataset_path personachat_self_original.json --train 2000 --test 500
    PYTHONPATH=. python benchmarks/dyme.py --dataset dailydialog --data_dir FOLDER --train 1000 --test 300

All of them predict the metrics of a dialog's next utterance (`feedback.dyme`). A line per model gives the squared and
the absolute error in units of each metric's standard deviation in training, as a mean over utterances and metrics, and
the 95 % interval of the difference from the linear model by a bootstrap over dialogs. Of the two speakers' views of a
dialog, one is kept. Dialogs are drawn with a fixed seed.
"""

import argparse
import json

import numpy as np
from sklearn.linear_model import Ridge

from cli import command, positive_number
from feedback.dyme import Dyme, examples
from feedback.policy import draw_dialogs
from metrics import interval
from tables import Split
from tokenization import get_tokenizer
from utils import add_common_flags, open_dataset


def one_view_each(split: Split, count: int) -> list[list[str]]:
    """Draw dialogs of two or more utterances, none of which has three utterances of an earlier one at its beginning."""
    seen, kept = set(), []
    for dialog in draw_dialogs(split, 2 * count):
        beginnings = [json.dumps(dialog[first:first + 3]) for first in range(3)]
        if len(dialog) > 1 and beginnings[1] not in seen:
            seen.update(beginnings)
            kept.append(dialog)
    return kept[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=positive_number, default=2000,
                        help="dialogs to learn from (default: %(default)s)")
    parser.add_argument("--test", type=positive_number, default=500, help="dialogs to predict (default: %(default)s)")
    add_common_flags(parser, model_checkpoint="models/tiny")  # only its tokenizer is used
    args = parser.parse_args()
    table = open_dataset(args, get_tokenizer(args.model_checkpoint), from_run=False)
    learnt, tested = one_view_each(table["train"], args.train), one_view_each(table["valid"], args.test)
    print(f"{len(learnt):,} dialogs with {sum(map(len, learnt)) - len(learnt):,} utterances to learn from, "
          f"{len(tested):,} with {sum(map(len, tested)) - len(tested):,} to predict", flush=True)
    teaching, test = examples(learnt), examples(tested)
    spread = teaching.following.std(0).clip(min=1e-6)
    following, wanted = teaching.following / spread, test.following / spread

    linear = Ridge(alpha=1.0).fit(teaching.metrics, following).predict(test.metrics)
    models = {"mean": np.broadcast_to(following.mean(0), wanted.shape), "linear": linear} | {
        f"network, seed {seed}": Dyme(teaching, seed).predict(test.metrics, test.vectors) for seed in range(3)}
    for name, predicted in models.items():
        print(f"{name:16}", end="")
        for kind, power in (("squared", 2), ("absolute", 1)):
            error, of_linear = ((np.abs(one - wanted) ** power).mean(1) for one in (predicted, linear))
            low, high = interval(error - of_linear, np.ones(len(error)), test.dialog)
            print(f"  {kind} {error.mean():.3f}, minus linear {low:+.4f} to {high:+.4f}", end="")
        print(flush=True)


if __name__ == "__main__":
    command(main)
