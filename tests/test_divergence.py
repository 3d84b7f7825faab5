"""The divergence is the Kullback-Leibler divergence it claims to be: against SciPy, against exact sums in log space, against a loop over layers."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.special import logsumexp
from scipy.stats import entropy

from ela_repro.core import ElaError
from ela_repro.divergence import KINDS, LayerDivergences, divergence, layer_divergences, null_divergence

few = settings(max_examples=40, derandomize=True, deadline=None)
EPS = 1e-6  # the documented smoothing of "reverse"


def by_scipy(p, q, kind):
    "One number for two rows of probabilities, by SciPy; `p` is extended by zeros."
    longer = np.concatenate([p, np.zeros(len(q) - len(p))])
    if kind == "forward": return entropy(longer, q)
    if kind == "reverse": return entropy(q, longer + EPS)  # SciPy normalises
    if kind == "renormalised": return entropy(p, q[:len(p)])
    return (entropy(longer, (longer + q) / 2) + entropy(q, (longer + q) / 2)) / 2


@st.composite
def rows(draw, scales=(0.1, 1.0, 10.0, 100.0), dtypes=(torch.float32, torch.float64), least=1):
    "Log-probabilities of two rows [B, heads, n_p] and [B, heads, n_t]."
    batch, heads, n_p, more = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(least, 8)), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    make = lambda n: torch.tensor(rng.uniform(-1, 1, (batch, heads, n)) * draw(st.sampled_from(scales))).to(draw(st.sampled_from(dtypes))).log_softmax(-1)
    return make(n_p), make(n_p + more)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_every_kind_equals_scipy(kind, data):
    prev, cur = data.draw(rows(least=2 if kind == "renormalised" else 1))
    p, q = (r.double().softmax(-1).numpy() for r in (prev, cur))
    expected = [np.mean([by_scipy(p[b, h], q[b, h], kind) for b in range(len(p))]) for h in range(p.shape[1])]
    got = divergence(prev, cur, kind)
    assert got.dtype == torch.float64 and got.shape == (p.shape[1],)
    assert_allclose(got, expected, rtol=1e-8, atol=1e-12)


@few
@given(data=st.data())
def test_a_row_that_is_nearly_one_hot_is_measured_exactly(data):
    "Logits of +-500: probabilities underflow, so the reference is an exact sum of logarithms."
    prev, cur = data.draw(rows(scales=(300.0, 500.0)))
    lp, lq = (r.double().numpy() for r in (prev, cur))
    lp, lq = lp - logsumexp(lp, -1, keepdims=True), lq - logsumexp(lq, -1, keepdims=True)
    one = lambda b, h: math.fsum(math.exp(x) * (x - y) for x, y in zip(lp[b, h], lq[b, h]))
    assert_allclose(divergence(prev, cur), [np.mean([one(b, h) for b in range(len(lp))]) for h in range(lp.shape[1])], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_every_kind_is_finite_and_not_negative(kind, data):
    prev, cur = data.draw(rows(scales=(0.0, 1e-6, 1.0, 500.0), least=2))
    got = divergence(prev, cur, kind)
    assert torch.isfinite(got).all() and (got >= 0).all()
    if kind == "jensen_shannon": assert (got <= math.log(2) + 1e-12).all()
    if prev.shape == cur.shape and kind != "reverse": assert_allclose(divergence(cur, cur, kind), 0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [-744.44, -745.0, -746.0, -1000.0])
def test_probabilities_at_the_edge_of_underflow_give_no_infinity(kind, low):
    "exp(-744.44) is the smallest number above zero; half of it is zero, and its logarithm minus infinity."
    prev = torch.tensor([[0.0, low]], dtype=torch.float64)
    cur = torch.tensor([[0.0, -900.0, -900.0]], dtype=torch.float64)
    assert torch.isfinite(divergence(prev, cur, kind)).all()


@few
@given(rows(least=2))
def test_disagreement_about_the_past_plus_attention_to_what_came_after(pair):
    "KL((a_p, 0) || a_t) = KL(a_p || a_t renormalised on M_p) - log(mass of a_t on M_p)."
    prev, cur = (r.double().log_softmax(-1) for r in pair)
    mass = cur[..., :prev.shape[-1]].logsumexp(-1).mean(0)
    assert_allclose(divergence(prev, cur), divergence(prev, cur, "renormalised") - mass, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_makes_no_divergence_negative(kind):
    "Rows that differ in their last bit: the sum of tiny terms of either sign may come out below zero."
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        prev = torch.randn(1, 1, 6, generator=draw, dtype=torch.float64).log_softmax(-1)
        assert (divergence(prev, prev * (1 + 2e-16 * torch.randint(-1, 2, (6,), generator=draw)), kind) >= 0).all()


@given(n_p=st.integers(1, 30), more=st.integers(0, 30))
@few
def test_uniform_attention_lies_on_the_null_line(n_p, more):
    uniform = lambda n: torch.full((2, 3, n), -math.log(n), dtype=torch.float64)
    assert_allclose(divergence(uniform(n_p), uniform(n_p + more)), math.log((n_p + more) / n_p), atol=1e-14)
    assert_allclose(null_divergence(n_p + more, n_p), math.log((n_p + more) / n_p))


def test_a_case_computed_by_hand():
    "(1/2, 1/2) against (1/4, 1/4, 1/2) and (1/2, 1/4, 1/4)."
    log = lambda *p: torch.tensor([p], dtype=torch.float64).log()
    half = log(0.5, 0.5)
    assert_allclose(divergence(half, log(0.25, 0.25, 0.5)), math.log(2))
    assert_allclose(divergence(half, log(0.5, 0.25, 0.25)), 0.5 * math.log(2))
    assert_allclose(divergence(half, log(0.25, 0.25, 0.5), "renormalised"), 0, atol=1e-15)
    assert_allclose(divergence(half, log(0.5, 0.25, 0.25), "renormalised"), 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3)))
    assert_allclose(divergence(log(1.0), log(0.5, 0.5), "jensen_shannon"), 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2))


def test_the_mean_is_over_the_batch_and_never_over_heads():
    rng = torch.Generator().manual_seed(0)
    prev, cur = (torch.randn(5, 3, n, generator=rng, dtype=torch.float64).log_softmax(-1) for n in (2, 4))
    one_by_one = torch.stack([divergence(p, c) for p, c in zip(prev, cur)])  # without a batch axis
    assert one_by_one.shape == (5, 3)
    assert_allclose(divergence(prev, cur), one_by_one.mean(0))


def test_rows_are_not_altered_and_no_graph_is_kept():
    prev, cur = torch.zeros(2, 1, 2, requires_grad=True), torch.zeros(2, 1, 3)
    a, b = prev.log_softmax(-1), cur.log_softmax(-1)
    before = a.detach().clone(), b.clone()
    assert not divergence(a, b).requires_grad
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


good = torch.zeros(2, 3, 2).log_softmax(-1)


@pytest.mark.parametrize("prev, cur, kind, says", [
    (torch.zeros(2, 3, 4).log_softmax(-1), good, "forward", "do not fit"),       # the past is longer than the present
    (torch.zeros(1, 3, 2).log_softmax(-1), good, "forward", "do not fit"),       # another batch
    (torch.zeros(2, 3, 0), good, "forward", "do not fit"),                       # an empty memory
    (torch.zeros(2).log_softmax(-1), torch.zeros(2).log_softmax(-1), "forward", "do not fit"),
    (torch.zeros(0, 3, 2), torch.zeros(0, 3, 2), "forward", "do not fit"),       # no image: the mean would be NaN
    (good.exp(), good, "forward", "log_softmax"),
    (good, torch.zeros(2, 3, 2), "forward", "log_softmax"),
    (good, good * float("nan"), "forward", "log_softmax"),
    (good[..., :1] * 0, good, "renormalised", "not eligible"),
    (good, good, "forwards", "did you mean 'forward'"),
])
def test_what_is_no_pair_of_rows_is_refused(prev, cur, kind, says):
    with pytest.raises(ElaError, match=says): divergence(prev, cur, kind)


# ---- all layers of a network

@st.composite
def networks(draw):
    "Rows of every layer under a skip mask, as either skip mode would make them."
    stages = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    mask = [draw(st.booleans()) for _ in range(sum(stages))]
    module, heads = draw(st.booleans()), draw(st.integers(1, 3))
    rng, rows, start = np.random.default_rng(draw(st.integers(0, 2**32))), [], 0
    for n in stages:
        for t in range(n):
            memory = 1 + sum(not (module and mask[start + s]) for s in range(t))
            rows.append(torch.tensor(rng.normal(size=(3, heads, memory)) * 3).log_softmax(-1))
        start += n
    return rows, stages, mask


def null_line(n_prev, n_cur, kind):
    "What uniform rows give; `renormalised`, where that is zero, is held against `forward`."
    return by_scipy(np.full(n_prev, 1 / n_prev), np.full(n_cur, 1 / n_cur), "forward" if kind == "renormalised" else kind)


def reference(rows, stages, mask, kind):
    "D_t against the last layer of the stage before t that retrieved, by a loop over images and heads; None where there is none."
    found, start = [], 0
    for n in stages:
        for t in range(n):
            before = [s for s in range(t) if not mask[start + s]]
            p, q = (rows[start + before[-1]].exp().numpy() if before else None), rows[start + t].exp().numpy()
            if p is None or (kind == "renormalised" and p.shape[-1] == 1): found.append(None)
            else: found.append((np.mean([by_scipy(a, b, kind) for a, b in zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]))]), null_line(p.shape[-1], q.shape[-1], kind)))
        start += n
    return found


@pytest.mark.parametrize("kind", KINDS)
@few
@given(network=networks())
def test_each_layer_is_compared_with_the_last_one_that_retrieved(kind, network):
    D, expected = layer_divergences(*network, kind), reference(*network, kind)
    assert D.eligible.tolist() == [e is not None for e in expected]
    for i, e in enumerate(expected):
        if e is None: assert np.isnan(D.value[i]) and np.isnan(D.null[i])
        else: assert_allclose((D.value[i], D.null[i]), e, rtol=1e-9, atol=1e-12)


@few
@given(networks())
def test_the_first_layer_of_a_stage_is_never_eligible(network):
    rows, stages, mask = network
    D = layer_divergences(rows, stages, mask)
    assert not D.eligible[np.cumsum((0, *stages))[:-1]].any()


def test_renormalised_makes_layers_that_share_one_entry_ineligible():
    "Layer 2 shares one entry with layer 1, whatever is in it; layer 3 shares two with layer 2, but one with layer 1 if layer 2 is skipped."
    rows = [torch.zeros(2, 1, t).log_softmax(-1) for t in (1, 2, 3)]
    assert layer_divergences(rows, (3,), [0, 0, 0], "renormalised").eligible.tolist() == [False, False, True]
    assert layer_divergences(rows, (3,), [0, 1, 0], "renormalised").eligible.tolist() == [False, False, False]
    assert layer_divergences(rows, (3,), [0, 1, 0], "forward").eligible.tolist() == [False, True, True]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4))
@few
def test_layers_are_named_from_one_within_their_stage(stages):
    names = [f"layer {t} of stage {s}" for s, n in enumerate(stages, 1) for t in range(1, n + 1)]
    D = LayerDivergences.of(np.ones(sum(stages)), stages)
    assert [D.name(i) for i in range(sum(stages))] == names
    assert D.eligible.tolist() == [not n.startswith("layer 1 ") for n in names]
    assert_allclose(D.null[D.eligible], [math.log(t / (t - 1)) for n in stages for t in range(2, n + 1)])


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ElaError, match="do not fit"): layer_divergences([good], (1,), [0, 0])
    with pytest.raises(ElaError, match="do not fit"): layer_divergences([good], (2,), [0])
    with pytest.raises(ElaError, match="do not fit"): LayerDivergences(np.zeros(2), np.zeros(2), np.zeros(3, bool), (2,))
