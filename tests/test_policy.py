"""The quantile map is SciPy's, and every policy keeps the rules of the design: against a plain second implementation, and as properties."""
import io
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from ela_repro.core import ElaError
from ela_repro.divergence import LayerDivergences, layer_divergences
from ela_repro.policy import BQM, CLIP, EBQM, POSITIONS, Fixed, HighestFirst, MatchedPosition, MatchedRandom, Never, Random, Threshold, create_policy, fit_beta, keep_scores, skip_rate, unit_scale, update_epochs

few = settings(max_examples=35, derandomize=True, deadline=None)
NO_LIMITS = dict(tau=None, rho=1.0)
units = st.lists(st.floats(0.01, 0.99), min_size=3, max_size=30).filter(lambda u: max(u) - min(u) > 1e-2).map(np.array)
networks = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
rng = lambda seed=0: np.random.default_rng(seed)


@st.composite
def situations(draw, updates=1, spread=(0.3, 1.0, 3.0)):
    "Stages, a mask that a policy may have set, and the divergences seen at each of `updates`."
    stages, random = draw(networks), rng(draw(st.integers(0, 2**32)))
    null = LayerDivergences.of(np.ones(sum(stages)), stages).null
    D = [LayerDivergences.of(np.nan_to_num(null) * random.lognormal(0, draw(st.sampled_from(spread)), sum(stages)), stages) for _ in range(updates)]
    return stages, (random.random(sum(stages)) < 0.5) & D[0].eligible, D


# ---- the map, against SciPy

@few
@given(units)
def test_the_fit_has_the_moments_of_the_sample(u):
    a, b = fit_beta(u)
    fitted = scipy.stats.beta(a, b)
    assert_allclose(fitted.mean(), u.mean(), rtol=1e-9)
    bounded = 1 < a + b < 1e4
    if bounded: assert_allclose(fitted.var(), u.var(), rtol=1e-7)
    x = np.linspace(1e-4, 1 - 1e-4, 20001)  # the moments again, from the density
    if bounded and min(a, b) > 2: assert_allclose(np.trapezoid(fitted.pdf(x) * x, x), u.mean(), rtol=1e-3)


def test_the_fit_is_floored_and_capped():
    assert_allclose(fit_beta([0.001, 0.999, 0.001]), (0.001 * 2 / 3 + 0.999 / 3, 0.999 * 2 / 3 + 0.001 / 3))  # a + b = 1
    assert_allclose(sum(fit_beta([0.5, 0.5, 0.5001])), 1e4)
    for same in ([0.3] * 5, [0.1 + 0.2, 0.3, 0.3]):  # equal but for rounding
        with pytest.raises(ElaError, match="zero variance"): fit_beta(same)


@few
@given(u=units, mean=st.floats(0.1, 0.9), concentration=st.sampled_from([0.5, 1.0, 4.0]))
def test_the_map_is_the_targets_quantile_of_the_fits_rank(u, mean, concentration):
    kappa, (a, b) = keep_scores(u, mean, concentration)
    assert (a, b) == fit_beta(u)
    rank = np.clip(scipy.stats.beta(a, b).cdf(u), 1e-12, 1 - 1e-12)
    assert_allclose(kappa, scipy.stats.beta(mean * concentration, (1 - mean) * concentration).ppf(rank), rtol=1e-7, atol=1e-12)
    assert np.isfinite(kappa).all() and (kappa >= 0).all() and (kappa <= 1).all()
    assert (np.diff(kappa[np.argsort(u)]) >= -1e-12).all()  # a larger divergence never has a lower score


@few
@given(D=st.floats(0, 1e6), t=st.integers(2, 50))
def test_the_unit_scales(D, t):
    null = math.log(t / (t - 1))
    clip = lambda u: min(max(u, 1e-3), 1 - 1e-3)
    assert_allclose(unit_scale([D], [null]), [clip(D / (D + null))])
    assert_allclose(unit_scale([D], [null], "exp"), [clip(1 - math.exp(-D))], rtol=1e-9)
    assert_allclose(unit_scale([null], [null]), [0.5])
    assert CLIP == 1e-3


# ---- a second EBQM, written from the design's sentences

class PlainEBQM:
    def __init__(self, ema, low, high, tau, rho, scale="relative", mean=0.5, concentration=1.0):
        self.__dict__.update(locals())
        self.seen = {}

    def decide(self, D, mask):
        layers = [i for i, e in enumerate(D.eligible) if e]
        for i in layers:
            now = D.value[i], D.null[i]
            self.seen[i] = tuple(self.ema * old + (1 - self.ema) * new for old, new in zip(self.seen[i], now)) if i in self.seen else now
        d = {i: self.seen[i][0] for i in layers}
        u = {i: d[i] / (d[i] + self.seen[i][1]) if self.scale == "relative" else 1 - math.exp(-d[i]) for i in layers}
        u = {i: min(max(v, 0.001), 0.999) for i, v in u.items()}
        if len(layers) < 3: score, skip = d, {i for i in layers if d[i] <= self.tau}
        elif len(set(u.values())) == 1: return [i in d and bool(mask[i]) and d[i] <= self.tau for i in range(len(mask))]
        else:
            m, v = np.mean(list(u.values())), np.var(list(u.values()))
            total = min(max(m * (1 - m) / v - 1, 1), 1e4)
            fitted, target = scipy.stats.beta(m * total, (1 - m) * total), scipy.stats.beta(self.mean * self.concentration, (1 - self.mean) * self.concentration)
            score = {i: target.ppf(fitted.cdf(u[i])) for i in layers}
            skip = {i for i in layers if score[i] < self.low or (mask[i] and not score[i] > self.high)}
        skip = {i for i in skip if d[i] <= self.tau}
        most = math.floor(self.rho * len(layers) + 1e-9)
        chosen = sorted(skip, key=lambda i: (score[i], -i))[:most]
        return [i in chosen for i in range(len(mask))]


ebqm_settings = st.fixed_dictionaries(dict(ema=st.sampled_from([0.0, 0.5, 0.9]), low=st.sampled_from([0.2, 0.4, 0.5]), high=st.sampled_from([0.5, 0.6, 0.9]),
                                           tau=st.sampled_from([0.05, 0.3, 1.0, 100.0]), rho=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
                                           mean=st.sampled_from([0.3, 0.5]), concentration=st.sampled_from([1.0, 3.0])))


@few
@given(situation=situations(updates=5), options=ebqm_settings, scale=st.sampled_from(["relative", "exp"]))
def test_ebqm_decides_as_a_plain_second_implementation(situation, options, scale):
    _, mask, history = situation
    ours, plain, theirs = EBQM(scale=scale, **options), PlainEBQM(scale=scale, **options), mask.tolist()
    for D in history:
        mask, theirs = ours.decide(D, mask, 0, None), plain.decide(D, theirs)
        assert mask.tolist() == theirs


@few
@given(seed=st.integers(0, 2**32), layers=st.integers(5, 12), rho=st.sampled_from([0.1, 0.3, 0.5]))
def test_ties_go_to_the_deeper_layer(seed, layers, rho):
    "Divergences of three sizes only: many layers score alike, and the limit on their number must choose among them."
    D = LayerDivergences.of(rng(seed).choice([0.1, 0.11, 2.0], layers), (layers,))
    options = dict(ema=0.0, low=0.4, high=0.6, tau=10.0, rho=rho, scale="exp")
    if len(set(D.value[1:])) > 1: assert EBQM(**options).decide(D, np.zeros(layers, bool), 0, None).tolist() == PlainEBQM(**options).decide(D, [False] * layers)


def test_a_tie_by_hand():
    D = LayerDivergences.of([0, 0.1, 0.1, 0.1, 0.1, 9, 9, 9, 9], (9,))
    assert np.flatnonzero(EBQM(rho=0.25, scale="exp").decide(D, np.zeros(9, bool), 0, None)).tolist() == [3, 4]


def test_divergence_and_null_line_are_averaged_alike():
    "Under another mask both double: u stays what it was. An average of D alone would move it."
    policy, mask = EBQM(ema=0.5, **NO_LIMITS), np.zeros(6, bool)
    D = LayerDivergences.of([0, 0.2, 0.4, 0.1, 0.3, 0.2], (6,))
    policy.decide(D, mask, 0, None)
    before = policy.last["u"]
    policy.decide(LayerDivergences(2 * D.value, 2 * D.null, D.eligible, D.stages), mask, 1, None)
    assert_allclose(policy.last["u"], before)


# ---- rules

POLICY_FACTORIES = {"never": Never, "random": lambda: Random(0.7), "bqm": BQM, "threshold": Threshold, "highest first": HighestFirst, "ebqm": EBQM, "ebqm, a coin": lambda: EBQM(hysteresis=False), "ebqm, no limits": lambda: EBQM(**NO_LIMITS)}


@pytest.mark.parametrize("make", POLICY_FACTORIES.values(), ids=POLICY_FACTORIES)
@few
@given(situation=situations(updates=3, spread=(0.0, 1.0, 8.0)))
def test_no_policy_skips_the_first_layer_of_a_stage(make, situation):
    stages, mask, history = situation
    policy = make()
    assert not policy.initial_mask(stages).any() and len(policy.initial_mask(stages)) == sum(stages)
    for D in history:
        mask = policy.decide(D, mask, 0, rng())
        assert mask.dtype == bool and mask.shape == (sum(stages),) and not mask[~D.eligible].any()


def test_no_policy_skips_a_layer_without_divergence_even_if_it_was_skipped():
    D = LayerDivergences(np.array([np.nan, np.nan, 0.1, 0.2, 0.3, 0.1]), np.ones(6), np.array([0, 0, 1, 1, 1, 1], bool), (6,))
    alike = LayerDivergences(np.full(6, 0.1), D.null, D.eligible, D.stages)
    for make, seen in itertools.product(POLICY_FACTORIES.values(), (D, alike)): assert not make().decide(seen, np.ones(6, bool), 0, rng())[:2].any()


@pytest.mark.parametrize("hysteresis", [True, False])
@few
@given(situation=situations(updates=3), tau=st.sampled_from([0.1, 0.5, 1.0]), rho=st.floats(0, 1))
def test_nothing_above_tau_is_skipped_and_no_more_than_rho(hysteresis, situation, tau, rho):
    _, mask, history = situation
    policy = EBQM(tau=tau, rho=rho, ema=0.0, hysteresis=hysteresis)
    for D in history:
        mask = policy.decide(D, mask, 0, rng())
        assert not mask[D.eligible][D.value[D.eligible] > tau].any()
        assert mask.sum() <= math.floor(rho * D.eligible.sum() + 1e-9)


def test_a_share_of_rho_that_is_a_whole_number_is_not_lost_to_rounding():
    "0.29 * 100 is 28.999999999999996."
    D = LayerDivergences.of(np.linspace(0.1, 0.5, 101), (101,))
    assert EBQM(rho=0.29, low=1.0, high=1.0).decide(D, np.zeros(101, bool), 0, None).sum() == 29


@pytest.mark.parametrize("scale", ["relative", "exp"])
def test_tau_binds_even_where_all_divergences_are_alike(scale):
    "Above about seven nats u is clipped: the layers look alike and are all far above tau, none may stay skipped."
    D = LayerDivergences.of([0, 800, 810, 820, 830], (5,))
    assert not EBQM(scale=scale).decide(D, np.array([0, 1, 0, 1, 0], bool), 0, None).any()


@few
@given(situations())
def test_inside_the_band_nothing_changes(situation):
    _, mask, [D] = situation
    policy = EBQM(**NO_LIMITS)
    new, kappa = policy.decide(D, mask, 0, None), policy.last["kappa"]
    if kappa is None: return
    inside = (kappa > policy.low) & (kappa < policy.high)
    assert (new[inside] == mask[inside]).all() and new[kappa < policy.low].all() and not new[kappa > policy.high].any()
    assert (EBQM(low=0.0, high=1.0, **NO_LIMITS).decide(D, mask, 0, None) == mask).all()  # all inside


@few
@given(situations(updates=4))
def test_ebqm_asks_for_no_random_number(situation):
    _, mask, history = situation
    masks = []
    for generator in (None, rng(1)):
        policy, m = EBQM(), mask
        for D in history: m = policy.decide(D, m, 0, generator)
        masks.append(m.tolist())
        if generator: assert generator.random() == rng(1).random()
    assert masks[0] == masks[1]


@pytest.mark.parametrize("make", [BQM, lambda: EBQM(hysteresis=False, ema=0.0, **NO_LIMITS)], ids=["bqm", "ebqm, a coin"])
def test_the_coin_falls_with_the_keep_score(make):
    n, random, policy = 1500, rng(3), make()
    D = LayerDivergences.of([0, 0.1, 0.3, 0.35, 0.2, 0.4, 0.9], (7,))
    count = sum(policy.decide(D, np.zeros(7, bool), 0, random) for _ in range(n))[1:]
    skip = 1 - policy.last["kappa"][1:]
    assert (abs(count - n * skip) <= 5 * np.sqrt(n * skip * (1 - skip)) + 1).all()
    assert skip.max() > 0.7 and skip.min() < 0.2  # the case tells the two ends apart


# ---- schedule

def test_the_schedule_for_every_length_up_to_400():
    for epochs in range(1, 401):
        when = EBQM().update_epochs(epochs)
        assert list(when) == sorted(set(when)) and len(when) <= 10
        assert (len(when) > 0) == (epochs > 1)
        for e in when:
            assert e + 1 >= epochs / 10        # warm-up: a tenth is trained before the first decision
            assert 4 * (e + 1) <= 3 * epochs    # frozen: a quarter is trained after the last
            assert e < epochs - 1              # a mask that no epoch is trained with measures nothing
        if epochs >= 30:
            assert len(when) == 10 and max(np.diff(when)) - min(np.diff(when)) <= 1
            assert when[0] == math.ceil(epochs / 10) - 1 and when[-1] == 3 * epochs // 4 - 1


@few
@given(epochs=st.integers(1, 300), warmup=st.floats(0, 1), freeze=st.floats(0, 1), updates=st.none() | st.integers(0, 20))
def test_any_schedule_keeps_its_limits(epochs, warmup, freeze, updates):
    when = update_epochs(epochs, warmup, updates, freeze)
    assert list(when) == sorted(set(when)) and (updates is None or len(when) <= updates)
    assert all(0 <= e < epochs - 1 and e + 1 >= warmup * epochs and e + 1 <= (1 - freeze) * epochs for e in when)
    every = [e for e in range(epochs - 1) if warmup * epochs <= e + 1 <= (1 - freeze) * epochs]
    assert len(when) == (len(every) if updates is None else min(updates, len(every)))


def test_bqm_decides_after_every_epoch_but_the_last(): assert BQM().update_epochs(6) == (0, 1, 2, 3, 4)


# ---- degenerate input

@pytest.mark.parametrize("bad", [float("nan"), -1e-9, -1.0, float("inf")])
@pytest.mark.parametrize("make", [BQM, EBQM, Never, Random, Threshold, HighestFirst])
def test_a_divergence_that_is_none_is_refused_by_name(make, bad):
    "Infinity too: the relative scale would turn it into NaN, and the moving average would keep it for ever."
    values = np.full(9, 0.2)
    values[6] = bad
    with pytest.raises(ValueError, match="layer 3 of stage 2") as e: make().decide(LayerDivergences.of(values, (4, 5)), np.zeros(9, bool), 0, rng())
    assert isinstance(e.value, ElaError)


def test_what_an_ineligible_layer_holds_does_not_matter():
    told = []
    for held in (-5.0, np.nan, 0.0, 1e9):
        policy = EBQM()
        mask = policy.decide(LayerDivergences(np.array([held, 0.1, 0.2, 0.3]), np.array([np.nan, 0.69, 0.4, 0.28]), np.array([0, 1, 1, 1], bool), (4,)), np.zeros(4, bool), 0, None)
        told.append((mask.tolist(), [np.asarray(policy.last[k])[1:].tolist() for k in ("u", "kappa")]))
    assert told[0][0] == [False, *told[0][0][1:]] and any(told[0][0]) and all(t == told[0] for t in told)


@pytest.mark.parametrize("make", [BQM, EBQM])
@pytest.mark.parametrize("values", [[0.2] * 6, [0.0] * 6, [0.1 + 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]])
def test_without_variance_the_mask_stays(make, values):
    D = LayerDivergences.of(values, (6,))
    for mask in ([0, 1, 0, 1, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]):
        policy = make(scale="exp")
        assert policy.decide(D, np.array(mask, bool), 0, rng()).tolist() == [bool(m) for m in mask]
        assert "no evidence" in policy.last["note"] and policy.last["kappa"] is None


def test_without_variance_no_more_than_rho_stays_skipped():
    D, mask = LayerDivergences.of([0.2] * 6, (6,)), np.array([0, 1, 0, 1, 1, 0], bool)
    assert EBQM(scale="exp").decide(D, mask, 0, rng()).tolist() == [bool(m) for m in [0, 0, 0, 1, 1, 0]]  # two of five, the deeper ones
    assert BQM(scale="exp").decide(D, mask, 0, rng()).tolist() == mask.tolist()  # knows no limit


@pytest.mark.parametrize("make", [BQM, EBQM])
def test_with_fewer_than_three_eligible_layers_tau_decides_alone(make):
    for stages, values, expected in (((3,), [0, 0.2, 3.0], [0, 1, 0]), ((2, 2), [0, 1.1, 0, 0.9], [0, 0, 0, 1]), ((2,), [0, 0.5], [0, 1]), ((1, 1), [0, 0], [0, 0])):
        policy = make(**({"rho": 1.0} if make is EBQM else {}))
        assert policy.decide(LayerDivergences.of(values, stages), np.zeros(sum(stages), bool), 0, rng()).tolist() == [bool(e) for e in expected]
        assert "too few" in policy.last["note"] and policy.last["fit"] is None
    D = LayerDivergences.of([0, 0.2, 0.1], (3,))
    assert EBQM(rho=0.5).decide(D, np.zeros(3, bool), 0, None).tolist() == [False, False, True]  # rho binds here too: the lower one
    assert EBQM(tau=0.15, rho=1.0).decide(D, np.zeros(3, bool), 0, None).tolist() == [False, False, True]


@pytest.mark.parametrize("name, options", [
    ("ebqm", dict(ema=1.0)), ("ebqm", dict(low=0.7, high=0.6)), ("ebqm", dict(rho=1.1)), ("ebqm", dict(tau=-1)), ("ebqm", dict(tau=float("nan"))), ("ebqm", dict(mean=1.0)),
    ("ebqm", dict(scale="relativ")), ("ebqm", dict(kind="forwards")), ("bqm", dict(concentration=0)), ("bqm", dict(tau=1)), ("random", dict(rate=-0.1)), ("threshold", dict(threshold=1.1)), ("threshold", dict(threshold="half")), ("threshold", dict(rate=0.5)),
    ("highest_first", dict(rate=2)), ("highest_first", dict(scale="raw")), ("highest_first", dict(kind="forwards")),
    ("fixed", dict(mask="every")), ("fixed", dict(mask="")), ("fixed", dict(rate=7)), ("fixed", dict(rate="half")), ("ebqm", dict(updates=-1)), ("ebqm", dict(hysteresis="no")), ("ebqm", dict(rho=True)), ("matched_random", dict(of=[], fresh="no")), ("ebqm", dict(warmup=2)), ("ebm", {}), ("never", dict(rate=1)), ("matched_random", {}),
])
def test_options_that_make_no_sense_are_refused_before_training(name, options):
    with pytest.raises(ElaError): create_policy(name, **options)


# ---- the middle of a run

def through_a_checkpoint(state):
    "What a checkpoint does to a policy's state."
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


history_of_masks = [{"epoch": e, "mask": "".join("01"[int(b)] for b in LayerDivergences.of(np.ones(12), (5, 7)).eligible & (rng(e).random(12) < 0.5))} for e in range(6)]
STATEFUL = {"ebqm": EBQM, "bqm": BQM, "random": Random, "matched": lambda: MatchedRandom(history_of_masks), "position": lambda: MatchedPosition(history_of_masks), "matched, one order": lambda: MatchedRandom(history_of_masks, fresh=False)}


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
@few
@given(seed=st.integers(0, 2**32), stop=st.integers(0, 5))
def test_a_policy_restored_in_the_middle_goes_on_as_if_nothing_had_happened(make, seed, stop):
    random = rng(seed)
    seen = [LayerDivergences.of(random.lognormal(-1.5, 1, 12), (5, 7)) for _ in range(6)]
    def masks(restart):
        policy, mask, out = make(), np.zeros(12, bool), []
        for e, D in enumerate(seen):
            if e == restart:
                state, policy = through_a_checkpoint(policy.state_dict()), make()
                policy.load_state_dict(state)
            mask = policy.decide(D, mask, e, rng(e))
            out.append(mask.tolist())
        return out
    assert masks(restart=None) == masks(restart=stop)


# ---- controls

@few
@given(data=st.data(), stages=networks, seed=st.integers(0, 2**32), fresh=st.booleans())
def test_matched_random_skips_as_much_of_each_stage_at_every_update(data, stages, seed, fresh):
    random, eligible = rng(seed), LayerDivergences.of(np.ones(sum(stages)), stages).eligible
    updates = [{"epoch": 3 * e, "mask": "".join("1" if m else "0" for m in eligible & (random.random(len(eligible)) < 0.6))} for e in range(4)]
    policy, mask = MatchedRandom(updates, fresh=fresh), np.zeros(len(eligible), bool)
    assert policy.update_epochs(1000) == (0, 3, 6, 9)
    for u in updates:
        mask = policy.decide(LayerDivergences.of(random.random(len(eligible)), stages), mask, u["epoch"], random)
        assert not mask[~eligible].any()
        for start, n in zip(np.cumsum((0, *stages)), stages): assert mask[start:start + n].sum() == u["mask"][start:start + n].count("1")


def test_a_fresh_permutation_differs_between_updates_and_one_order_does_not():
    same = [{"epoch": e, "mask": "0" + "1" * 9 + "0" * 10} for e in range(12)]
    D = LayerDivergences.of(np.ones(20), (20,))
    draw = lambda fresh: (lambda p: [tuple(p.decide(D, np.zeros(20, bool), e, rng(e))) for e in range(12)])(MatchedRandom(same, fresh=fresh))
    assert len(set(draw(True))) == 12 and len(set(draw(False))) == 1
    assert draw(True) == draw(True)  # given the generator, everything repeats
    often = np.mean(draw(True), 0)[1:]
    assert often.min() < 9 / 19 < often.max() and often[9:].sum() > 0  # it is no copy of the original


@few
@given(data=st.data(), stages=networks, seed=st.integers(0, 2**32), first=st.sampled_from(POSITIONS))
def test_matched_position_skips_as_much_of_each_stage_from_one_end(data, stages, seed, first):
    random, eligible = rng(seed), LayerDivergences.of(np.ones(sum(stages)), stages).eligible
    updates = [{"epoch": e, "mask": "".join("1" if m else "0" for m in eligible & (random.random(len(eligible)) < 0.6))} for e in range(4)]
    policy, mask = MatchedPosition(updates, first), np.zeros(len(eligible), bool)
    for u in updates:
        mask = policy.decide(LayerDivergences.of(random.random(len(eligible)), stages), mask, u["epoch"], random)
        for start, n in zip(np.cumsum((0, *stages)), stages):
            layers, count = np.flatnonzero(eligible[start:start + n]), u["mask"][start:start + n].count("1")
            expected = layers[:count] if first == "shallowest" else layers[len(layers) - count:]
            assert np.flatnonzero(mask[start:start + n]).tolist() == expected.tolist()


def test_a_history_that_does_not_fit_is_refused():
    policy = MatchedRandom([{"epoch": 2, "mask": "0101"}])
    with pytest.raises(ElaError, match="no decision after epoch 2"): policy.decide(LayerDivergences.of(np.ones(4), (4,)), np.zeros(4, bool), 1, rng())
    with pytest.raises(ElaError, match="has 4 layers, this network 5"): policy.decide(LayerDivergences.of(np.ones(5), (5,)), np.zeros(5, bool), 2, rng())


@few
@given(stages=networks, rate=st.sampled_from([0.0, 0.25, 0.5, 1.0]), seed=st.integers(0, 2**32))
def test_random_skips_its_rate(stages, rate, seed):
    D = LayerDivergences.of(np.ones(sum(stages)), stages)
    assert Random(rate).decide(D, np.zeros(sum(stages), bool), 0, rng(seed)).sum() == round(rate * D.eligible.sum())


@few
@given(situation=situations(), threshold=st.sampled_from([0.0, 0.3, 0.5, 0.9]), scale=st.sampled_from(["relative", "exp"]))
def test_threshold_skips_exactly_what_lies_below(situation, threshold, scale):
    "Whatever the mask was; at one half of the relative scale: what diverges less than uniform attention."
    stages, mask, [D] = situation
    got = Threshold(threshold, scale).decide(D, mask, 0, None)
    u = lambda d, n: min(max(d / (d + n) if scale == "relative" else 1 - math.exp(-d), CLIP), 1 - CLIP)
    assert got.tolist() == [bool(e) and u(d, n) < threshold for d, n, e in zip(D.value, D.null, D.eligible)]
    if (scale, threshold) == ("relative", 0.5): assert got[D.eligible].tolist() == (D.value < D.null)[D.eligible].tolist()


@few
@given(situation=situations(), rate=st.sampled_from([0.0, 0.25, 0.5, 1.0]), scale=st.sampled_from(["relative", "exp"]))
def test_highest_first_skips_its_rate_and_none_below_one_it_keeps(situation, rate, scale):
    stages, mask, [D] = situation
    policy = HighestFirst(rate, scale)
    got = policy.decide(D, mask, 0, None)
    assert got.sum() == round(rate * D.eligible.sum())
    kept, skipped = (policy.last["u"][D.eligible & m] for m in (~got, got))
    assert not len(kept) or not len(skipped) or kept.max() <= skipped.min()


def test_what_uniform_attention_gives_is_one_half_for_every_kind_but_renormalised():
    "The middle of the relative scale is the null line of the kind that the policy reads."
    rows = [torch.zeros(2, 1, t).log_softmax(-1) for t in range(1, 8)]
    for kind in ("forward", "reverse", "jensen_shannon"):
        D, policy = layer_divergences(rows, (7,), [False] * 7, kind), Threshold(kind=kind)
        policy.decide(D, np.zeros(7, bool), 0, None)
        assert_allclose(policy.last["u"][1:], 0.5, rtol=1e-9)


@pytest.mark.parametrize("make", [EBQM, lambda **kw: MatchedRandom([], **kw), lambda **kw: MatchedPosition([], **kw)], ids=["ebqm", "random", "position"])
def test_all_retrievals_may_wait_for_the_first_update(make):
    assert make(initial="all").initial_mask((3, 1, 2)).tolist() == [False, True, True, False, False, True]
    assert not make().initial_mask((3, 1, 2)).any()
    with pytest.raises(ElaError, match="'some'.*none, all"): make(initial="some")


@few
@given(situation=situations(updates=1))
def test_what_waits_for_the_first_update_is_then_limited_as_ever(situation):
    stages, _, (D,) = situation
    policy = EBQM(initial="all")
    mask = policy.decide(D, policy.initial_mask(stages), 0, rng())
    assert mask.sum() <= policy.rho*D.eligible.sum()
    assert not (mask & ~D.eligible).any() and (D.value[mask] <= policy.tau).all()


def test_random_favours_no_layer():
    D, n = LayerDivergences.of(np.ones(11), (11,)), 2000
    count = sum(Random(0.3).decide(D, np.zeros(11, bool), 0, rng(i)) for i in range(n))[1:]
    assert (abs(count - 0.3 * n) <= 5 * math.sqrt(n * 0.3 * 0.7)).all()


def test_fixed_masks_by_hand():
    text = lambda p, stages: "".join("01"[int(m)] for m in p.initial_mask(stages))
    assert text(Fixed("alternate"), (5, 4)) == "01010" + "0101"
    assert text(Fixed("deepest", rate=0.5), (5, 4)) == "00011" + "0011"  # half of 4 is 2, of 3 (1.5) to the even 2
    assert text(Fixed("deepest", rate=1.0), (5, 1)) == "01111" + "0"
    assert text(Fixed("deepest", rate=0.0), (5, 1)) == "000000"
    assert text(Fixed("110"), (3,)) == "110"  # by hand the first layer may be skipped
    D = LayerDivergences.of(np.ones(9), (5, 4))
    assert Fixed().decide(D, np.ones(9, bool), 0, None).tolist() == Fixed().initial_mask((5, 4)).tolist()  # and it stays so
    with pytest.raises(ElaError, match="has 3 layers, the network 4"): Fixed("110").initial_mask((4,))


@pytest.mark.parametrize("when, first, later", [("always", True, True), ("before", True, False), ("after", False, True)])
def test_a_fixed_mask_may_hold_before_or_after_the_first_update_only(when, first, later):
    policy, D, whole = Fixed(when=when), LayerDivergences.of(np.ones(9), (5, 4)), Fixed().initial_mask((5, 4))
    assert policy.initial_mask((5, 4)).tolist() == (whole & first).tolist() and policy.decide(D, whole, 3, None).tolist() == policy.later_mask((5, 4)).tolist() == (whole & later).tolist()
    with pytest.raises(ElaError, match="always, before, after"): Fixed(when="never")
    with pytest.raises(ElaError, match="has 3 layers, the network 4"): Fixed("110", when=when).initial_mask((4,))


@few
@given(situations())
def test_never_undoes_whatever_was_skipped(situation): assert not Never().decide(situation[2][0], situation[1], 0, None).any()


@pytest.mark.parametrize("mask, whole, stages", [("000000000", 0, (0, 0, 0)), ("011000010", 0.5, (1, 0, 0.5)), ("111111111", 1, (1, 1, 1)), ("100000000", 0, (0, 0, 0)), ("001001001", 0.5, (0.5, 0.5, 0.5))])
def test_skip_rates_are_shares_of_the_layers_that_have_a_predecessor(mask, whole, stages):
    "A first layer, skipped by hand, is no such layer: all skipped is a rate of one, not of 9/6."
    for form in (mask, [c == "1" for c in mask], np.array([c == "1" for c in mask])):
        rate, per_stage = skip_rate(form, (3, 3, 3))
        assert_allclose((rate, *per_stage), (whole, *stages))
    assert skip_rate("01000", (1, 4)) == (round(0 / 3, 7), [0, 0]) and skip_rate("", ()) == (0, [])


@pytest.mark.parametrize("argument", ["mean", "concentration", "ema", "low", "high", "tau", "rho", "warmup", "freeze"])
@pytest.mark.parametrize("value", ["a", -0.1, math.nan, True])
def test_a_number_that_is_none_is_named(argument, value):
    with pytest.raises(ElaError, match=f"{argument}.* is {value!r}".replace("'", ".")): EBQM(**{argument: value})
