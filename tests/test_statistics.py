"""Reservoirs and histograms: bounded, deterministic, unbiased."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_compile.passes.record import Recorder
from rana_compile.processes import ALONE
from rana_compile.statistics import LogHistogram, Sample
from rana_compile.types import Site


def test_sample_keeps_everything_while_there_is_room() -> None:
    sample = Sample(10, 2, seed=0)
    x = torch.arange(12.0).view(6, 2)
    for part in x.split(2):
        taken, slots = sample.offer(part)
        sample.offer_gradient(0, part * 2, taken, slots)
        sample.offer_gradient(1, part * 3, taken, slots)
    assert sample.rows == 6
    assert torch.equal(sample.x[:6].float(), x)
    assert sample.fresh.all()
    u = sample.gradients()
    assert u is not None
    torch.testing.assert_close(u, torch.stack([x * 2, x * 3], 1), rtol=1 / 8, atol=0)  # two bits of mantissa


def test_sample_pairs_gradients_with_their_rows_and_stays_bounded() -> None:
    sample = Sample(16, 1, seed=0)
    for start in range(0, 400, 40):
        x = torch.arange(start, start + 40.0).view(-1, 1) % 128  # exact in bfloat16
        taken, slots = sample.offer(x)
        sample.offer_gradient(0, -x, taken, slots)
    assert sample.rows == 16
    torch.testing.assert_close(sample.gradients()[:, 0], -sample.x.float(), rtol=1 / 8, atol=0)


def test_sample_is_uniform_and_repeats_for_a_seed() -> None:
    def mean(seed: int) -> float:
        sample = Sample(200, 1, seed)
        for part in torch.arange(5000.0).view(-1, 1).split(500):
            sample.offer(part)
        return float(sample.x.float().mean())

    assert mean(3) == mean(3)
    assert abs(mean(3) - 2500) < 4 * 5000 / 12**0.5 / 200**0.5  # four standard errors


def test_samples_of_one_seed_keep_the_same_rows() -> None:
    one, other, longer = Sample(16, 1, 0), Sample(16, 3, 0), Sample(16, 1, 0)
    for part in torch.arange(120.0).view(-1, 1).split(40):
        one.offer(part)
        other.offer(part + 0.5)
        longer.offer(part)
    longer.offer(torch.zeros(1, 1))
    assert one.same_rows(other) and torch.equal(one.x.float().floor(), other.x.float().floor())
    assert not one.same_rows(longer)


@given(st.floats(0.02, 0.98), st.integers(0, 100))
def test_histogram_level_leaves_the_share(share: float, seed: int) -> None:
    values = torch.rand(4000, generator=torch.Generator().manual_seed(seed)) * 3 + 0.1
    histogram = LogHistogram()
    for part in values.split(1000):
        histogram.add(part)
    kept = float((values >= histogram.level(share)).float().mean())
    assert kept == pytest.approx(share, abs=0.01)


def test_histogram_takes_zero_infinity_and_nan() -> None:
    histogram = LogHistogram()
    histogram.add(torch.tensor([0.0, 0.0, 1.0, 1.0, float("inf"), float("nan")]))
    assert histogram.level(2 / 6) > 1e6
    assert 0.9 < histogram.level(3.9 / 6) < 1.1
    assert histogram.level(1.0) < 1e-6


def test_moments_become_means_without_a_second_copy() -> None:
    recorder = Recorder(lambda: 8, seed=0)
    recorder.basis_rows = True
    site, batches = Site("s", "linear", ("w",), 4, (3,)), torch.randn(2, 5, 4)
    for x in batches:
        recorder(site, x.requires_grad_(), [torch.randn(3, 4)], [None])
    kept = recorder.moments[site][0]
    recorder.gather(ALONE)
    assert recorder.moment(site) is kept
    x = batches.detach().flatten(0, 1)
    torch.testing.assert_close(kept, x.t() @ x / 10)
