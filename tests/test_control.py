"ELA beside the same amount of skipping without the divergence: made-up records, counted by hand."
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text
from scipy import stats as scipy_stats

from ela_repro import batch, control
from ela_repro.examples import example_record, save_examples
from ela_repro.figures import save_figure
from ela_repro.runs import PROFILES, Store, experiment_specs, make_spec, reference_spec
from ela_repro.tables import NOISY, save_table
from ela_repro.trends import ablation_figures

QUICK, REDUCED = (experiment_specs("matched_control", p) for p in ("quick", "reduced"))
MADE = [example_record(s) for s in REDUCED]
FOUND = control.controls(MADE, "reduced")
DECISIVE = "ELA − MatchedRandom (decisive), points [95% interval]"
WAYS = [(scale, skip) for scale in ("relative", "exp") for skip in ("retrieval", "module")]


def scale(spec): return dict(spec.policy_args).get("scale", "relative")


def scored(accuracy, specs=REDUCED):
    "Made-up records with `accuracy(spec)` in percent."
    return [replace(r, final={**r.final, "test_accuracy": accuracy(r.spec)/100}) for r in (MADE if specs is REDUCED else map(example_record, specs))]


def noisy(effect, sd=0.3, seed=0):
    "Seeds of spread `sd`; ELA better than all others by `effect` points."
    draws = np.random.default_rng(seed)
    return control.controls(scored(lambda s: 60 + effect*(s.policy == "ebqm") + draws.normal(0, sd)), "reduced")


def ended(mask, stages=(5, 5), **fields):
    "A made-up record of ELA that ended with this mask."
    return replace(example_record(make_spec("quick", "ela", **fields)), stages=list(stages), skip_mask=mask)


# The differences

@pytest.mark.parametrize("recipe", ["stable", "released"])
def test_differences_by_hand(recipe):
    value = {(r.spec.method, r.spec.recipe if r.spec.attention != "none" else recipe, scale(r.spec), r.spec.skip, r.spec.seed): 100*r.final["test_accuracy"] for r in MADE}
    def runs(method, way=("relative", "retrieval")): return np.array([value[method, recipe, *way, s] for s in range(6)], dtype=np.float64)
    within = np.array([runs("plain"), runs("mrla_b"), *(runs(m, w) for w in WAYS for m in ("ela", "matched_random"))])
    half = scipy_stats.t.ppf(0.975, 50)*np.sqrt(within.var(axis=1, ddof=1).mean()*2/6)
    rows = [c for c in FOUND if c.recipe == recipe]
    assert [(c.scale, c.skip) for c in rows] == WAYS
    for c, way in zip(rows, WAYS):
        ela, chance = runs("ela", way), runs("matched_random", way)
        for name, gap in {"ELA − MatchedRandom": ela - chance, "ELA − MRLA-B": ela - runs("mrla_b"), "ELA − ResNet": ela - runs("plain"), "MatchedRandom − MRLA-B": chance - runs("mrla_b")}.items():
            i = c.interval(name)
            np.testing.assert_allclose([i.low, i.estimate, i.high], gap.mean() + half*np.array([-1, 0, 1]), rtol=0, atol=1e-9)
        paired = scipy_stats.ttest_rel(ela, chance)
        np.testing.assert_allclose([c.paired.low, c.paired.high, c.paired.p], [*paired.confidence_interval(0.95), paired.pvalue], rtol=0, atol=1e-9)
        assert c.spread.dof == 50 and c.reach() == control.detectable(*c.spread, 6, 6)


def test_each_control_replays_its_run():
    assert len(FOUND) == 8 and [c.recipe for c in FOUND] == ["stable"]*4 + ["released"]*4
    for c in FOUND:
        assert [reference_spec(s) for s in c.control.specs] == c.group.specs and len(c.pairs) == 6
        assert all(reference_spec(b.spec) == a.spec for a, b in c.pairs)
        assert c.unpruned.key.recipe == c.recipe and c.plain.key.attention == "none"


def test_only_the_default_is_confirmatory():
    assert [(c.recipe, c.scale, c.skip) for c in FOUND if c.kind() == "confirmatory"] == [("stable", "relative", "retrieval")]
    assert [FOUND[0].kind(name) for name in control.CONTRASTS] == ["confirmatory"]*3 + ["exploratory"]
    five = control.controls([r for r in MADE if r.spec.policy != "matched_random" or r.spec.seed < 5], "reduced")
    assert five[0].kind() == "exploratory" and five[0].kind("ELA − MRLA-B") == "confirmatory"


def test_pairs_need_both_seeds():
    some = [r for r in MADE if not (r.spec.policy == "ebqm" and r.spec.seed in (0, 1)) and not (r.spec.policy == "matched_random" and r.spec.seed == 5)]
    c = control.controls(some, "reduced")[0]
    assert [a.spec.seed for a, _ in c.pairs] == [2, 3, 4]
    gaps = [100*(a.final["test_accuracy"] - b.final["test_accuracy"]) for a, b in c.pairs]
    assert c.paired.estimate == pytest.approx(np.mean(gaps)) and c.paired.high - c.paired.estimate == pytest.approx(scipy_stats.t.ppf(0.975, 2)*np.std(gaps, ddof=1)/3**0.5)
    assert (len(c.group.records), len(c.control.records)) == (4, 5)


def test_pairing_helps_when_seeds_are_alike():
    common = np.random.default_rng(0).normal(0, 2, 6)
    c = control.controls(scored(lambda s: 60 + common[s.seed] + 0.5*(s.policy == "ebqm") + 0.01*(s.seed % 2)*(s.policy == "ebqm")), "reduced")[0]
    assert c.interval("ELA − MatchedRandom").low < 0 < 0.4 < c.paired.low


def test_an_effect_is_found_and_none_is_not():
    assert all(c.interval("ELA − MatchedRandom").low > 0 and c.paired.low > 0 for c in noisy(3.0))
    none = [i for seed in range(25) for c in noisy(0.0, seed=seed) if (i := c.interval("ELA − MatchedRandom"))]
    assert len(none) == 200 and 0.90 <= np.mean([i.low <= 0 <= i.high for i in none]) <= 0.99
    assert all(c.interval("ELA − MatchedRandom").high < 0 for c in noisy(-3.0))


# What could have been seen

@pytest.mark.parametrize("groups, n, m", [(10, 6, 6), (10, 6, 3), (4, 3, 3)])
def test_detectable_by_simulation(groups, n, m):
    sizes, draws, studies = [n, m, *[n]*(groups - 2)], np.random.default_rng(1), 20_000
    dof, true = sum(sizes) - groups, control.detectable(0.4, sum(sizes) - groups, n, m)
    made = [draws.normal(true if g == 0 else 0, 0.4, (studies, size)) for g, size in enumerate(sizes)]
    sd = np.sqrt(sum(((x - x.mean(axis=1, keepdims=True))**2).sum(axis=1) for x in made)/dof)
    found = abs(made[0].mean(axis=1) - made[1].mean(axis=1)) > scipy_stats.t.ppf(0.975, dof)*sd*np.sqrt(1/n + 1/m)
    assert found.mean() == pytest.approx(0.8, abs=0.015)


def test_detectable_at_its_ends():
    assert control.detectable(1, 50, 6, 6) == pytest.approx((scipy_stats.t.ppf(0.975, 50) + scipy_stats.t.ppf(0.8, 50))*(1/3)**0.5)
    assert control.detectable(1, 50, 6, 6, power=0.5) == pytest.approx(scipy_stats.t.ppf(0.975, 50)*(1/3)**0.5)  # then it is the half-width
    assert control.detectable(1, 50, 6, 6, power=0.9) > control.detectable(1, 50, 6, 6) > control.detectable(1, 50, 12, 12) > control.detectable(1, 50, 12, 12, level=0.9)
    assert control.detectable(0.0, 50, 6, 6) == 0 and {control.detectable(None, 0, 1, 1), control.detectable(1, 9, 0, 6), control.detectable(1, 9, 6, 0)} == {None}


# The amount

def test_amounts_are_equal_by_construction():
    for c in FOUND:
        assert control.unequal_seeds(c) == []
        for a, b in c.pairs: assert control.training_skip_rate(a) == control.training_skip_rate(b)


@pytest.mark.parametrize("fault", ["other stages", "other times", "one update less", "other epochs"])
def test_unequal_amounts_are_told(fault):
    r = FOUND[0].control.records[4]
    wrong = {"other stages": lambda: replace(r, updates=[{**u, "mask": u["mask"][12:] + u["mask"][:12]} for u in r.updates]),
             "other times": lambda: replace(r, updates=[*r.updates[:-1], {**r.updates[-1], "epoch": r.updates[-1]["epoch"] + 1}]),
             "one update less": lambda: replace(r, updates=r.updates[:-1]),
             "other epochs": lambda: replace(r, epochs=[{**e, "skip_rate": e["skip_rate"] + 0.01} for e in r.epochs])}[fault]()
    found = control.controls([wrong if x.spec == r.spec else x for x in MADE], "reduced")
    assert [control.unequal_seeds(c) for c in found] == [[4]] + [[]]*7
    assert "not comparable: MatchedRandom did not skip as much as ELA with seed 4; train it again" in control.control_table(found, "reduced").frame["remark"][0]


def test_rounding_is_no_difference():
    r = FOUND[0].control.records[0]
    rounded = replace(r, epochs=[{**e, "skip_rate": e["skip_rate"] + 5e-8} for e in r.epochs])
    assert control.skips_as_much(FOUND[0].group.records[0], rounded)


# The masks

def test_depth_by_hand():
    r = ended("00101" + "00010")  # layers 3 and 5, and 4, of stages whose deepest half is layers 4 and 5
    assert control.skip_counts(r) == [2, 1] and control.skipped_layers(r) == {2, 4, 8}
    assert control.deep_share(r) == pytest.approx(2/3) and control.deep_chance(r) == pytest.approx(1/2)
    odd = ended("010001" + "000", (6, 3))  # five layers have a predecessor, the last two are the deepest half
    assert control.deep_share(odd) == 1/2 and control.deep_chance(odd) == pytest.approx(2/5)
    assert control.deep_share(ended("0"*10)) is None is control.deep_chance(ended("0"*10))
    assert control.deep_share(ended("00011"*2)) == 1 and control.deep_share(ended("01100"*2)) == 0
    assert control.deep_chance(ended("0" + "01111", (1, 5))) == 1/2  # a stage of one layer has none to skip


def test_skips_above_the_null_line_by_hand():
    "Of four layers skipped at two updates three had a divergence above that of uniform attention; what has no divergence does not count."
    updates = [{"epoch": 1, "mask": "01100", "divergence": [None, 0.9, 0.1, 0.2, 0.3], "null": [None, 0.7, 0.4, 0.3, 0.2]}, {"epoch": 2, "mask": "01001", "divergence": [None, 0.8, 0.1, 0.2, 0.3], "null": [None, 0.7, 0.4, 0.3, 0.2]}]
    record = replace(ended("01001", stages=(5,)), updates=updates)
    assert control.above_null(record) == 0.75 and control.above_null(replace(record, updates=[])) is None
    assert control.above_null(replace(record, updates=[{**u, "mask": "10000"} for u in updates])) is None


def test_agreement_by_hand():
    a, b, c, nothing = (ended(m) for m in ("00101" + "00010", "01001" + "00010", "01000" + "00000", "0"*10))
    assert control.seed_overlap([a, b]) == 2/4 and control.seed_overlap([b, c]) == 1/3 and control.seed_overlap([a, c]) == 0
    assert control.seed_overlap([a, b, c]) == pytest.approx((2/4 + 0 + 1/3)/3)
    assert control.seed_overlap([a, a, a]) == 1 and control.seed_overlap([a, nothing]) == 0 == control.seed_overlap_chance([a, nothing])
    assert control.seed_overlap([a]) is control.seed_overlap([]) is control.seed_overlap([nothing, nothing]) is control.seed_overlap_chance([nothing]*2) is control.seed_overlap_chance([]) is None


def test_chance_agreement_by_hand():
    one = ended("01000", (5,))  # two draws of one layer of four agree wholly once in four
    assert control.seed_overlap_chance([one, one]) == pytest.approx(1/4)
    two = ended("01100", (5,))  # six pairs: 2 in common once (1), 1 in four of them (1/3), none once
    assert control.seed_overlap_chance([two, two]) == pytest.approx((1 + 4/3 + 0)/6)
    both = ended("010" + "010", (3, 3))  # each stage agrees in half of the draws
    assert control.seed_overlap_chance([both, both]) == pytest.approx(1/4*1 + 1/2*(1/3))
    everything = ended("01111"*2)
    assert control.seed_overlap_chance([everything]*3) == pytest.approx(1)


def test_chance_agrees_with_drawn_masks():
    draws, stages = np.random.default_rng(0), (6, 4)
    def draw(counts): return ended("".join("0" + "".join(draws.permutation(list("1"*k + "0"*(n - 1 - k)))) for n, k in zip(stages, counts)), stages)
    runs = [draw(counts) for counts in [(2, 1), (3, 1), (2, 2)]*14]
    assert control.seed_overlap(runs) == pytest.approx(control.seed_overlap_chance(runs), abs=0.02)
    assert np.mean([control.deep_share(r) for r in runs]) == pytest.approx(np.mean([control.deep_chance(r) for r in runs]), abs=0.1)


def test_a_rule_of_position_shows():
    def rule(r):
        if r.spec.policy != "ebqm": return r
        masks = ["".join("0"*(6 - half.count("1")) + "1"*half.count("1") for half in (u["mask"][i:i + 6] for i in (0, 6, 12))) for u in r.updates]
        return replace(r, updates=[{**u, "mask": m} for u, m in zip(r.updates, masks)], skip_mask=masks[-1])
    row = control.masks_table(control.controls([rule(r) for r in MADE], "reduced"), "reduced").frame.iloc[0]
    deep, seeds = "skipped layers in the deepest half of their stage, %", "overlap of the masks between seeds (Jaccard), 0 to 1"
    assert row[f"ELA: {seeds}"] == 1 and row[f"MatchedRandom: {seeds}"] < 0.5 and row[f"at random: {seeds}"] < 0.5
    assert row[f"ELA: {deep}"].mean > row[f"at random: {deep}"] == pytest.approx(40)
    assert row["ELA: mask bits changed"].mean < row["MatchedRandom: mask bits changed"].mean


# What is missing

@pytest.mark.parametrize("profile", list(PROFILES))
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_no_planned_row_is_dropped(profile, share, tmp_path):
    planned = experiment_specs("matched_control", profile)
    found = control.controls([example_record(s) for s in planned[:int(share*len(planned))]], profile)
    scope = PROFILES[profile].scope("matched_control")
    assert len(found) == 4*len(scope.recipes)*len(scope.models)*len(scope.datasets) and set(control.planned_specs(found)) == set(planned)
    for table in control.control_table(found, profile), control.masks_table(found, profile):
        assert len(table.frame) == len(found)
        for c, said in zip(found, table.frame["remark"]): assert c.group.records and c.control.records or "not run: no record of seed" in said
        save_table(table, tmp_path)
    for name, shown in ablation_figures(found, "matched_control").items(): save_figure(control.control_figure(shown), name, tmp_path, control.control_caption(shown), profile)
    assert share or "no interval" in control.control_caption(found)


def test_one_seed_has_no_interval():
    found = control.controls([example_record(s) for s in QUICK], "quick")
    table = control.control_table(found, "quick")
    assert "inf" not in table.to_csv() and "nan" not in table.to_csv().lower() and "no repeated seeds" in table.to_markdown()
    assert set(table.frame["smallest ELA − MatchedRandom seen with probability 80%, points"]) == {None} and set(table.frame["kind of ELA − MatchedRandom"]) == {"exploratory"}
    assert "no interval" in control.control_caption(found) and "no interval" in table.note
    masks = control.masks_table(found, "quick").frame
    assert set(masks["ELA: overlap of the masks between seeds (Jaccard), 0 to 1"]) == {None}
    words = [t.get_text() for t in control.control_figure(found).findobj(Text)]
    assert "exploratory; one seed has no interval" in words and not [w for w in words if w.startswith("confirmatory")]


def test_diverged_and_missing_runs_are_told(tmp_path):
    store = Store("reduced", tmp_path)
    def status(s): return "diverged" if s.policy == "ebqm" and s.skip == "module" and (s.recipe == "released" or s.seed == 1) else "done"
    made = [example_record(s, status(s)) for s in REDUCED if not (s.attention == "mrla_b" and s.recipe == "stable")]
    store.fail(next(s for s in REDUCED if s.attention == "mrla_b" and s.recipe == "stable"), "out of memory")
    found = control.controls(made, "reduced")
    frame = control.control_table(found, "reduced", store).frame.set_index(["recipe", "scale", "skip mode"])
    assert "MRLA-B: not run: no record of seed 1, 2, 3, 4, 5 yet; seed 0 failed: out of memory" in frame.loc[("stable", "relative", "retrieval"), "remark"]
    assert frame.loc[("stable", "relative", "retrieval"), "ELA − MRLA-B, points [95% interval]"] is None and frame.loc[("stable", "relative", "retrieval"), DECISIVE].high < np.inf
    assert "ELA: 1 of 6 diverged, not in the mean: seed 1" in frame.loc[("stable", "exp", "module"), "remark"] and frame.loc[("stable", "exp", "module"), "ELA: accuracy, last epoch, %"].n == 5
    assert frame.loc[("released", "exp", "module"), DECISIVE] is None and frame.loc[("released", "exp", "module"), "ELA − MatchedRandom paired by seed, points [95% interval]"] is None
    words = [t.get_text() for t in control.control_figure(found).findobj(Text)]
    assert words.count("ELA diverged") == 3*2 and words.count("MRLA-B not run") == 4
    assert "diverged" in control.masks_table(found, "reduced", store).frame["remark"][7]


def test_a_pair_of_two_kinds_of_gpu_is_told():
    other = [replace(r, provenance={**r.provenance, "gpu": "another"}) if r.spec.seed == 3 and r.spec.policy == "ebqm" else r for r in MADE]
    told, quiet = (control.control_table(found, "reduced").frame["remark"] for found in (control.controls(other, "reduced"), FOUND))
    assert all("seed 3: a pair of two kinds of GPU" in r for r in told) and not any("kinds of GPU" in (r or "") for r in quiet)


def test_a_noisy_side_is_told():
    draws = np.random.default_rng(0)
    found = control.controls(scored(lambda s: 60 + draws.normal(0, 3 if s.attention == "mrla_b" and s.recipe == "released" else 0.3)), "reduced")
    said = control.control_table(found, "reduced").frame["remark"]
    assert all(s is None for s in said[:4]) and all(f"the spread of MRLA-B exceeds {NOISY:g} × the pooled one" in s for s in said[4:])


# The figure

def test_panels_have_axes_of_their_own():
    found = control.controls(scored(lambda s: 60 - 35*(s.attention == "mrla_b" and s.recipe == "released") + 0.2*s.seed), "reduced")
    axes = control.control_figure(found).axes
    widths = [ax.get_xlim()[1] - ax.get_xlim()[0] for ax in axes]
    assert len(axes) == 6 and widths[4] > 10*widths[3] and widths[4] > 10*widths[1]
    assert all(ax.get_xlim()[0] < 0 < ax.get_xlim()[1] for ax in axes)


def test_caption_counts():
    words = control.control_caption(noisy(3.0))
    assert "Of 8 intervals of ELA − MatchedRandom 8 lie wholly above zero and 0 wholly below; about 0.4 would" in words and "Under the default (stable, relative, retrieval) it is +" in words
    one = control.controls([example_record(s) for s in QUICK], "quick")
    assert "Under the default" not in control.control_caption(one) and "n = 1 run a side" in control.control_caption(one)


def test_several_settings_keep_apart():
    other = [replace(c, group=replace(c.group, key=replace(c.group.key, model="cifar_resnet20"))) for c in FOUND]
    assert list(ablation_figures(FOUND + other, "matched_control")) == ["matched_control_cifar100_cifar_resnet56", "matched_control_cifar100_cifar_resnet20"]


def test_status_names_the_controls_of_an_ela_that_was_trained_anew(tmp_path, capsys):
    def stale():
        batch.status.__wrapped__("quick", str(tmp_path))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("stale: ")]
    store = save_examples(tmp_path, "quick", experiments=("matched_control",))
    found = next(r for r in store.records()[0] if r.spec.policy == "matched_random")
    assert not stale()
    of = store.get(reference_spec(found.spec))
    store.save(replace(of, updates=[{**u, "mask": u["mask"].replace("1", "0")} for u in of.updates]))
    said = stale()
    assert any(found.id in line and "trained anew" in line for line in said) and all("MatchedRandom" in line for line in said)
