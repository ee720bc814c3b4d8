"""Perturbed top-k: exactly k, the right gradient, little memory, noise of the key alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arvideo_ds.engine.peak import Peak
from arvideo_ds.long_video.importance import perturbed_top_k, top_k
from arvideo_ds.models.draws import random_normals

MIB = 2**20


@given(st.integers(1, 40), st.data())
def test_exactly_k_are_kept_also_where_scores_are_equal(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    scores = torch.tensor(
        [data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=n, max_size=n))]
    )
    kept = top_k(scores, k)
    assert kept.sum() == k
    if k < n:
        assert scores[kept].min() >= scores[~kept].max()
    soft = perturbed_top_k(scores, k, torch.tensor([5]), samples=16, sigma=0.1)
    assert soft.sum().item() == pytest.approx(k, rel=1e-5)
    assert soft.min() >= 0 and soft.max() <= 1
    # A mean of masks: every entry counts samples.
    assert torch.equal(soft * 16, (soft * 16).round())


def test_noise_is_the_keys_alone_and_can_be_made_in_parts() -> None:
    keys = torch.tensor([3, 2**62, 3])
    whole = random_normals(keys, 1, (30, 1000))
    assert torch.equal(whole[0], whole[2])
    assert not torch.equal(whole[0], whole[1])
    part = random_normals(keys, 1, (10, 1000), start=20 * 1000)
    torch.testing.assert_close(part, whole[:, 20:], rtol=0, atol=1e-5)
    numbers = whole[:2].flatten().double()
    assert abs(numbers.mean()) < 0.02
    assert numbers.var().item() == pytest.approx(1, abs=0.02)
    assert (numbers**4).mean().item() == pytest.approx(3, abs=0.1)
    assert (numbers[1:] * numbers[:-1]).mean().abs() < 0.02


def test_the_gradient_of_two_items_is_that_of_the_normal_distribution() -> None:
    sigma, gap = 0.3, 0.2
    scores = torch.tensor([[gap, 0.0]], requires_grad=True)
    kept = perturbed_top_k(scores, 1, torch.tensor([1]), samples=100_000, sigma=sigma)
    spread = sigma * math.sqrt(2)
    wanted = 0.5 * (1 + math.erf(gap / spread / math.sqrt(2)))
    assert kept[0, 0].item() == pytest.approx(wanted, abs=0.005)
    kept[0, 0].backward()
    slope = math.exp(-0.5 * (gap / spread) ** 2) / spread / math.sqrt(math.tau)
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([slope, -slope], rel=0.03)


def test_the_gradient_is_the_slope_of_the_expectation() -> None:
    """Against central finite differences of the mean over 100,000 samples, common noise."""
    generator = torch.Generator().manual_seed(0)
    n, k, sigma, step, samples = 10, 4, 0.5, 0.05, 100_000
    scores = torch.randn(1, n, generator=generator)
    weights = torch.randn(1, n, generator=generator)
    keys = torch.tensor([11])

    def value(at: torch.Tensor) -> float:
        kept = perturbed_top_k(at, k, keys, samples=samples, sigma=sigma)
        return float((kept.double() * weights).sum())

    moved = step * torch.eye(n)
    slopes = [(value(scores + by) - value(scores - by)) / (2 * step) for by in moved]
    # Another key: the estimate is right, and not only fits its own noise.
    leaf = scores.clone().requires_grad_()
    kept = perturbed_top_k(leaf, k, torch.tensor([12]), samples=samples, sigma=sigma)
    (kept * weights).sum().backward()
    assert leaf.grad is not None
    wanted = torch.tensor([slopes])
    assert wanted.abs().max() > 0.2
    torch.testing.assert_close(leaf.grad, wanted, rtol=0, atol=0.03 * wanted.abs().max().item())


def test_a_clip_of_1568_tokens_takes_less_than_16_mib() -> None:
    scores = torch.randn(1, 1568, requires_grad=True)
    keys, gradient = torch.tensor([1]), torch.randn(1, 1568)
    with Peak(torch.device("cpu"), known=[scores, keys, gradient]) as peak:
        kept = perturbed_top_k(scores, 768, keys, samples=500, sigma=0.05)
        kept.backward(gradient)
    print(f"peak {peak.bytes / MIB:.1f} MiB")
    assert MIB < peak.bytes <= 16 * MIB


@pytest.mark.gpu
def test_a_gpu_keeps_the_same_tokens_in_as_little_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    there, samples = torch.device("cuda"), 500
    scores, gradient = torch.randn(2, 1568), torch.randn(2, 1568)
    keys = torch.tensor([1, 2**62])
    found = []
    for device in (torch.device("cpu"), there):
        leaf = scores.to(device, copy=True).requires_grad_()
        kept = perturbed_top_k(leaf, 768, keys.to(device), samples=samples, sigma=0.05)
        kept.backward(gradient.to(device))
        assert leaf.grad is not None
        found.append((kept.detach().cpu(), leaf.grad.cpu()))
    (kept, slope), (kept_there, slope_there) = found
    # Noise agrees up to rounding, so a token at the edge may change its side in a sample.
    assert (kept - kept_there).abs().max() <= 2.5 / samples
    assert (slope - slope_there).norm() < 0.05 * slope.norm()
    leaf, keys, gradient = scores.to(there).requires_grad_(), keys.to(there), gradient.to(there)
    before = torch.cuda.memory_allocated()
    with Peak(there) as peak:
        perturbed_top_k(leaf, 768, keys, samples=samples, sigma=0.05).backward(gradient)
    assert peak.bytes - before <= 2 * 16 * MIB
