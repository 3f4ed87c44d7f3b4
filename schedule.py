"""The learning rate over a run: up while the network warms up, then down to 0."""

from argparse import ArgumentParser, Namespace

import torch
from ignite.handlers import ParamScheduler

from readers import share


class Decay(ParamScheduler):
    """Sets it before each iteration: from 0 to ``--lr`` over ``--warmup_ratio`` of all iterations, then to 0.

    Linearly, as in 2019, or with ``--lr_decay polynomial`` by the square of the share of iterations that is left.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, iterations: int, args: Namespace):
        super().__init__(optimizer, "lr")
        self.iterations, self.warmup = iterations, args.warmup_ratio * iterations
        self.lr, self.power = args.lr, 2 if args.lr_decay == "polynomial" else 1

    def get_param(self) -> float:
        if self.event_index < self.warmup:
            return self.lr * self.event_index / self.warmup
        return self.lr * ((self.iterations - self.event_index) / (self.iterations - self.warmup)) ** self.power


def add_schedule_flags(parser: ArgumentParser) -> None:
    """Flags of `Decay`."""
    add = parser.add_argument
    add("--lr", type=float, default=6.25e-5, help="learning rate, at its highest (default: %(default)s)")
    add("--warmup_ratio", type=share, default=0.0, metavar="R",
        help="share of all iterations over which it rises (default: %(default)s)")
    add("--lr_decay", default="linear", choices=["linear", "polynomial"],
        help="how it then falls to 0; polynomial: by the square of what is left (default: %(default)s)")
