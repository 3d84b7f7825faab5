"Statistics against SciPy and against their own definitions, on random input."
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from ela_repro.core import ElaError
from ela_repro.stats import VERDICTS, Interval, all_of, bootstrap, difference, holm, pooled_sd, summarize, verdict

number = st.floats(-100, 100, allow_nan=False).map(lambda v: round(v, 6))
sample = st.lists(number, min_size=2, max_size=8)
bounds = st.tuples(number, number).map(sorted)


@given(sample)
def test_summary_is_scipys(values):
    s = summarize(values)
    assert s.n == len(values)
    assert s.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert s.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)


@given(sample, sample)
def test_two_groups_give_students_interval(a, b):
    assume(np.std(a) > 1e-4 and np.std(b) > 1e-4)  # below, SciPy loses precision
    d = difference(a, b, *pooled_sd([a, b]))
    theirs = scipy_stats.ttest_ind(a, b)
    assert (d.low, d.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-6, abs=1e-6)
    assert d.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-9)


@given(sample, sample)
def test_swapping_groups_mirrors_the_interval_and_the_verdict(a, b):
    spread = pooled_sd([a, b])
    d, mirrored = difference(a, b, *spread), difference(b, a, *spread)
    assert (d.low, d.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)
    assert verdict(d, "higher") == verdict(Interval(-d.high, -d.low, -d.estimate), "lower")


@given(st.lists(sample, min_size=1, max_size=5))
def test_pooled_sd_is_the_within_group_mean_square(groups):
    sd, dof = pooled_sd([*groups, [3.0]])  # a group of one adds nothing
    assert dof == sum(len(g) - 1 for g in groups)
    assert sd == pytest.approx(math.sqrt(sum(((np.array(g) - np.mean(g))**2).sum() for g in groups)/dof), abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_the_step_down_procedure_does(p):
    adjusted = holm(p)
    rejected, m = set(), len(p)
    for rank, i in enumerate(sorted(range(m), key=lambda i: p[i])):
        if p[i]*(m - rank) >= 0.05: break
        rejected.add(i)
    assert {i for i, q in enumerate(adjusted) if q < 0.05} == rejected
    assert all(q >= v for q, v in zip(adjusted, p))
    assert all(q <= r for q, r in zip(adjusted, holm(p, family=m + 2)))


@given(bounds, st.floats(0.01, 100), st.booleans())
def test_verdict_rule(ends, size, sized):
    low, high = ends
    found = verdict(Interval(low, high, (low + high)/2), "higher", size if sized else None)
    if high < 0 or (sized and high < size): expected = "not supported"
    elif low > 0: expected = "supported"
    else: expected = "inconclusive"
    assert found == expected


@given(bounds, st.floats(0.01, 100), st.floats(0, 50))
def test_a_range_is_judged_by_its_mild_end(ends, low, more):
    i = Interval(*ends, sum(ends)/2)
    assert verdict(i, "higher", (low, low + more)) == verdict(i, "higher", low)


@given(bounds, st.floats(0.05, 1))
def test_without_significance_after_holm_a_direction_stays_open(ends, p):
    assert verdict(Interval(*ends, 0), "higher", holm_p=p) == "inconclusive"


@given(st.lists(st.sampled_from(VERDICTS), min_size=1))
def test_a_claim_of_several_parts(parts):
    whole = all_of(parts)
    assert whole in parts
    assert (whole == "supported") == (set(parts) == {"supported"})
    assert (whole == "not supported") == ("not supported" in parts)


def test_intervals_cover_as_often_as_they_say():
    draws, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        groups = [draws.normal(mean, 1, 3) for mean in (1, 0, 5, 7)]
        d = difference(groups[0], groups[1], *pooled_sd(groups))
        hits += d.low <= 1 <= d.high
    assert 930 <= hits <= 970


@pytest.mark.parametrize("n", [1, 3, 9])
def test_bootstrap_refuses_few_seeds(n):
    with pytest.raises(ElaError, match="too few"): bootstrap(list(range(n)))
    with pytest.raises(ElaError, match="too few"): bootstrap(list(range(20)), list(range(n)))


def test_bootstrap_agrees_with_scipy():
    x = np.random.default_rng(3).normal(5, 2, 15)
    theirs = scipy_stats.bootstrap((x,), np.mean, n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
    ours = bootstrap(x)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6)
