"""The optimizer of 2019, and the learning-rate schedule."""

import math
from collections.abc import Callable

import torch
from ignite.handlers import ParamScheduler
from torch import nn
from torch.optim.adamw import adamw

from cli import learning_rate, share


class AdamW(torch.optim.AdamW):
    """The AdamW of transformers 2.5, with which the script of 2019 trained.

    It adds ε to the root of the second moment before the bias correction, the second form of Kingma and Ba (2015,
    section 2): θ ← θ − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε). torch adds ε after the correction. At step t both
    agree if torch's ε is ε / √(1 − β₂ᵗ). With small gradients this makes the first steps much shorter.

    The moments are float32 even if the weights are float16, in which the squares of most gradients would be 0.
    """

    def __init__(self, weights, lr: float, eps: float = 1e-6):
        super().__init__(weights, lr=lr, eps=eps, weight_decay=0.0, fused=True)
        self.counter: torch.Tensor | None = None  # one of the state's, which counts the steps on the weights' device
        self.taken = 0  # what it says

    @torch.no_grad()
    def step(self, closure=None):
        counter = next((state["step"] for state in self.state.values() if state), None)  # all weights have the same
        if counter is not self.counter:  # a saved state was loaded; reading the number each time would make a GPU wait
            self.counter, self.taken = counter, int(counter)
        for group in self.param_groups:
            group["eps"] = self.defaults["eps"] / math.sqrt(1 - group["betas"][1] ** (self.taken + 1))
            for weight in group["params"]:
                if weight.grad is not None and weight.dtype.itemsize < 4:
                    self._step_from_float32(weight, group)
        self.taken += 1
        return super().step(closure)

    def _step_from_float32(self, weight: nn.Parameter, group: dict) -> None:
        """Update one weight in half precision, and delete its gradient.

        torch's kernel requires weight, gradient and moments of one type, so it gets float32 copies of one weight at a
        time.
        """
        copy, gradient, state = weight.float(), weight.grad.float(), self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(copy), torch.zeros_like(copy)
        beta1, beta2 = group["betas"]
        adamw([copy], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True,
              amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)
        weight.copy_(copy)
        weight.grad = None


class Decay(ParamScheduler):
    """A handler that sets the learning rate before each iteration: it rises from 0 to ``lr``, then falls to 0.

    It rises linearly over the share ``warmup_ratio`` of all ``iterations``. Then it falls linearly, as in 2019, or, if
    ``lr_decay`` is "polynomial", with the square of the remaining share of iterations.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, iterations: int, lr: float, warmup_ratio: float = 0.0,
                 lr_decay: str = "linear"):
        super().__init__(optimizer, "lr")
        self.iterations, self.warmup = iterations, warmup_ratio * iterations
        self.lr, self.power = lr, 2 if lr_decay == "polynomial" else 1

    def get_param(self) -> float:
        if self.event_index < self.warmup:
            return self.lr * self.event_index / self.warmup
        return self.lr * ((self.iterations - self.event_index) / (self.iterations - self.warmup)) ** self.power


def add_schedule_flags(add: Callable) -> None:
    """Add the flags of `Decay`; ``add`` is the ``add_argument`` of a parser or of a group of flags."""
    add("--lr", type=learning_rate, default=6.25e-5, help="highest learning rate (default: %(default)s)")
    add("--warmup_ratio", type=share, default=0.0, metavar="R",
        help="share of all iterations over which the learning rate rises (default: %(default)s)")
    add("--lr_decay", default="linear", choices=["linear", "polynomial"],
        help="how the learning rate then falls to 0; polynomial: with the square of the remaining share of iterations "
             "(default: %(default)s)")
