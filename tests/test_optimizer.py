"""Compare the optimizer with transformers 2.5's AdamW, computed by hand in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from schedule import AdamW, Decay

LR, BETA1, BETA2, EPS = 0.01, 0.9, 0.999, 1e-6
SCALES = np.array([1e-9, 1e-7, 1e-5, 1e-3, 0.1, 10.0])  # sizes of gradients; ε matters most for the smallest


def gradients(steps: int) -> np.ndarray:
    """Draw gradients of shape (steps, scales): each weight has its own scale and random signs."""
    return np.random.default_rng(5).normal(size=(steps, len(SCALES))) * SCALES


def by_definition(start: np.ndarray, gradients: np.ndarray, lr=LR) -> list[np.ndarray]:
    """Return the weights after each step as transformers 2.5 computes them, with ε added before bias correction."""
    weights, m, v, after = start.astype(np.float64), 0.0, 0.0, []
    for t, gradient in enumerate(gradients, 1):
        m = BETA1 * m + (1 - BETA1) * gradient
        v = BETA2 * v + (1 - BETA2) * gradient ** 2
        weights = weights - lr * np.sqrt(1 - BETA2 ** t) / (1 - BETA1 ** t) * m / (np.sqrt(v) + EPS)
        after.append(weights)
    return after


def steps_of(optimizer, weight, gradients) -> list[np.ndarray]:
    after = []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=weight.dtype)
        optimizer.step()
        after.append(weight.detach().double().numpy().copy())
    return after


def test_steps_equal_transformers_2_5():
    start, given = np.zeros(len(SCALES)), gradients(50)
    weight = nn.Parameter(torch.zeros(len(SCALES)))
    np.testing.assert_allclose(steps_of(AdamW([weight], LR), weight, given), by_definition(start, given), rtol=2e-5)
    # torch's own AdamW differs: its first step depends only on the sign of the gradient.
    other = nn.Parameter(torch.zeros(len(SCALES)))
    own = steps_of(torch.optim.AdamW([other], lr=LR, eps=EPS, weight_decay=0.0), other, given)
    assert abs(own[0][1] / by_definition(start, given)[0][1]) > 10


def test_a_schedule_sets_the_rate_of_each_step():
    """Compute each step by hand with the rate that `Decay` gives to its iteration."""
    weight = nn.Parameter(torch.zeros(len(SCALES)))
    optimizer = AdamW([weight], LR)
    decay = Decay(optimizer, 4, LR)
    given, m, v, expected = gradients(4), 0.0, 0.0, np.zeros(len(SCALES))
    for t, gradient in enumerate(given, 1):
        decay(None, "lr")
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        m, v = BETA1 * m + (1 - BETA1) * gradient, BETA2 * v + (1 - BETA2) * gradient ** 2
        rate = LR * (1 - (t - 1) / 4)
        expected = expected - rate * np.sqrt(1 - BETA2 ** t) / (1 - BETA1 ** t) * m / (np.sqrt(v) + EPS)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_continues_alike(dtype):
    given = gradients(9)
    weight = nn.Parameter(torch.ones(len(SCALES), dtype=dtype))
    optimizer = AdamW([weight], LR)
    steps_of(optimizer, weight, given[:4])
    again = nn.Parameter(weight.detach().clone())
    resumed = AdamW([again], LR)
    resumed.state[again].update(copy.deepcopy(optimizer.state[weight]))  # as checkpoints.py does
    assert np.array_equal(steps_of(resumed, again, given[4:]), steps_of(optimizer, weight, given[4:]))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_weights_have_moments_in_float32(half):
    """Compute each step from the rounded weight; the result is the nearest number of the half-precision type."""
    weight = nn.Parameter(torch.zeros(len(SCALES), dtype=half))
    optimizer, given = AdamW([weight], LR), gradients(30)
    given = torch.tensor(given).to(half).double().numpy()
    for t in range(30):
        before = weight.detach().double().numpy().copy()
        steps_of(optimizer, weight, given[t:t + 1])
        moved = by_definition(np.zeros(len(SCALES)), given[:t + 1])
        expected = before + moved[t] - (moved[t - 1] if t else 0)
        ulp = torch.finfo(half).eps * np.abs(expected) + torch.finfo(half).smallest_normal * torch.finfo(half).eps
        assert (np.abs(weight.detach().double().numpy() - expected) <= ulp).all()
    assert all(value.dtype == torch.float32 for value in optimizer.state[weight].values())
    assert optimizer.state[weight]["exp_avg_sq"][2] > 0  # the square of 1e-5 would be 0 in float16
