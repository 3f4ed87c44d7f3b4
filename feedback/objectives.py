"""What policies are trained by: advantages, losses, and the price of a nat. Numbers in, numbers out."""

import torch
from torch.nn import functional as F


def advantages(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float,
               lam: float) -> torch.Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), all (replies, steps), padded on the right.

    A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t; after a reply's last action there is no value.
    """
    values, result, following = values * mask, torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        following = (delta + gamma * lam * following) * mask[:, step]
        result[:, step], next_value = following, values[:, step]
    return result


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1 over what ``mask`` has, 0 elsewhere."""
    kept = values[mask]
    return (values - kept.mean()) / (kept.std(unbiased=False) + 1e-8) * mask


def ppo_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor,
             clip: float) -> torch.Tensor:
    """Less the clipped surrogate of PPO (Schulman et al. 2017), a mean over actions."""
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -surrogate[mask].mean()


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor,
               clip: float) -> torch.Tensor:
    """Half the squared error of the values, a mean over actions; they gain nothing by moving more than ``clip``."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)[mask].mean()


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Each reply's reward less the mean of the other replies to its context, both (contexts, samples).

    The advantage of RLOO (Kool et al. 2019; Ahmadian et al. 2024).
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def dpo_loss(better: torch.Tensor, worse: torch.Tensor, reference_better: torch.Tensor, reference_worse: torch.Tensor,
             beta: float) -> torch.Tensor:
    """-log σ(β (log-ratio of the better reply - that of the worse)) (Rafailov et al. 2023), a mean over pairs.

    Arguments: log-probabilities of whole replies, (pairs,).
    """
    return -F.logsigmoid(beta * ((better - reference_better) - (worse - reference_worse))).mean()


class AdaptiveKL:
    """The price of a nat, steered so that replies come to be ``target`` nats from the reference's.

    As Ziegler et al. (2019) do it: a batch's relative error, of 20 % at most, changes it in proportion to the batch's
    share of ``horizon`` replies. ``target`` 0: the price stays.
    """

    def __init__(self, price: float, target: float, horizon: int):
        self.price, self.target, self.horizon = price, target, horizon

    def update(self, kl: float, replies: int) -> None:
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.price *= 1 + error * replies / self.horizon
