import tracemalloc

import numpy as np
import pytest
from helpers import rng
from hypothesis import given
from hypothesis import strategies as st
from reporting.intervals import Estimate, mean, mean_share, share
from scipy.stats import bootstrap

RIGHT = st.lists(st.booleans(), min_size=1, max_size=60)


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


@given(right=RIGHT)
def test_a_share_lies_in_its_interval_which_shrinks_with_more_of_the_same(right):
    one, more = share(right), share(right * 4)
    assert one.value == more.value == pytest.approx(np.mean(right))
    for estimate in (one, more):
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert width(more) < width(one)
    assert (one.n, more.n) == (len(right), 4 * len(right))


def test_wilsons_interval():
    """Of 98 in 100, worked out by its formula."""
    estimate = share([True] * 98 + [False] * 2)
    assert (estimate.low, estimate.high) == pytest.approx((0.9300, 0.9945), abs=5e-5)


@given(shares=st.lists(RIGHT, min_size=1, max_size=4))
def test_a_mean_of_shares_is_surer_than_the_least_sure_of_them(shares):
    parts = [share(right) for right in shares]
    estimate = mean_share(parts)
    assert estimate.value == pytest.approx(np.mean([part.value for part in parts]))
    assert -1e-12 <= estimate.low <= estimate.value <= estimate.high <= 1 + 1e-12
    assert width(estimate) <= max(map(width, parts)) + 1e-12
    assert estimate.n == sum(part.n for part in parts)


@pytest.mark.parametrize("n", [2, 40, 400])
def test_a_mean_of_values_lies_in_its_interval(n):
    values = rng(n).normal(100, 10, n)
    estimate = mean(values)
    assert estimate.low <= estimate.value <= estimate.high
    assert (estimate.value, estimate.n) == (pytest.approx(values.mean()), n)


def test_the_interval_of_a_mean_is_two_standard_errors_wide_either_way():
    values = rng(0).normal(100, 10, 400)
    estimate, error = mean(values), values.std(ddof=1) / 20
    assert (estimate.value - estimate.low, estimate.high - estimate.value) == pytest.approx((1.96 * error,) * 2, rel=0.05)
    assert estimate == mean(values)  # the same values, the same interval


def test_the_difference_of_two_who_err_alike_is_surer_than_either():
    base = rng(1).normal(100, 10, 200)
    adapter = base + 2 + rng(2).normal(0, 1, 200)
    difference = mean(adapter - base)
    assert difference.low > 0
    assert width(difference) < width(mean(base)) / 5
    assert mean(base - base) == Estimate(0.0, 0.0, 0.0, 200)


def test_the_interval_of_a_large_dataset_takes_no_gigabytes_and_is_the_same():
    few = np.random.default_rng(0).normal(size=50)
    whole = bootstrap((few,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert (mean(few).low, mean(few).high) == (whole.low, whole.high)
    tracemalloc.start()
    mean(np.random.default_rng(0).normal(size=20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * 2**30  # all resamples at once: 3 GB
