"""Compute the objectives of policy training: advantages, losses, and the weight of the KL penalty."""

import torch
from torch.nn import functional as F


def advantages(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float,
               lam: float) -> torch.Tensor:
    """Return generalised advantage estimates (Schulman et al. 2016).

    A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t; the value after a reply's last action is 0. All tensors
    are (replies, steps), padded on the right.
    """
    values, result, following = values * mask, torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        following = (delta + gamma * lam * following) * mask[:, step]
        result[:, step], next_value = following, values[:, step]
    return result


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Normalise the values within ``mask`` to mean 0 and standard deviation 1; the others become 0."""
    kept = values[mask]
    return (values - kept.mean()) / (kept.std(unbiased=False) + 1e-8) * mask


def ppo_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor,
             clip: float) -> torch.Tensor:
    """Return the negative clipped surrogate objective of PPO (Schulman et al. 2017), averaged over actions."""
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -surrogate[mask].mean()


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor,
               clip: float) -> torch.Tensor:
    """Return half the squared error of the values, clipped as in PPO: moving by more than ``clip`` does not help."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)[mask].mean()


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Return the advantages of RLOO (Kool et al. 2019; Ahmadian et al. 2024), (contexts, samples).

    An advantage is the reward of a reply minus the mean reward of the other replies to the same context.
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def dpo_loss(better: torch.Tensor, worse: torch.Tensor, reference_better: torch.Tensor, reference_worse: torch.Tensor,
             beta: float) -> torch.Tensor:
    """Return the DPO loss (Rafailov et al. 2023): -log σ(β (better log-ratio - worse log-ratio)), averaged over pairs.

    The arguments are log-probabilities of whole replies, (pairs,), under the policy and under the reference.
    """
    return -F.logsigmoid(beta * ((better - reference_better) - (worse - reference_worse))).mean()


class AdaptiveKL:
    """The weight of the KL penalty, the price of a nat. It is adapted until the KL of replies is ``target`` nats.

    As in Ziegler et al. (2019), each batch changes the price by its relative error, limited to 20 %, times the batch's
    share of ``horizon`` replies. With ``target`` 0 the price is constant.
    """

    def __init__(self, price: float, target: float, horizon: int):
        self.price, self.target, self.horizon = price, target, horizon

    def update(self, kl: float, replies: int) -> None:
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.price *= 1 + error * replies / self.horizon
