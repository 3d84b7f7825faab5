"Masks over time, the ablation and the divergence over training: made-up records, counted by hand."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text

from ela_repro import ablation, figures, stats, trends
from ela_repro.core import ElaError
from ela_repro.examples import example_record
from ela_repro.runs import ABLATION, PROFILES, Store, experiment_specs, initial_mask, make_policy, make_spec, reference_spec, variant_specs

QUICK, REDUCED = (experiment_specs("ebqm_ablation", p) for p in ("quick", "reduced"))
MADE = [example_record(s) for s in REDUCED]
EFFECTS = ablation.ablation_effects(MADE, "reduced")


def masked(masks, epochs, length=8, **fields):
    "A made-up record whose masks are given."
    made = example_record(make_spec("quick", "ela", epochs=length, **fields))
    return replace(made, stages=[len(masks[0])], updates=[{"epoch": e, "mask": m} for e, m in zip(epochs, masks)], skip_mask=masks[-1])


# Made-up records

@pytest.mark.parametrize("profile", ["quick", "reduced"])
def test_every_variant_can_be_made_up(profile):
    for variant, specs in variant_specs("ebqm_ablation", profile):
        record = example_record(specs[0])
        borders, masks = ablation.mask_history(record)
        assert masks[-1] == record.skip_mask and len(set(borders)) == len(borders) and borders[-1] == specs[0].epochs
        for start, end, mask in zip(borders, borders[1:], masks):  # the epochs tell the same story as the masks
            assert {e["skip_rate"] for e in record.epochs[start:end]} == {ablation.skip_rate(mask, record.stages)[0]}, variant.label
        assert not any(m[t] == "1" for m in masks for t in np.cumsum([0, *record.stages[:-1]]))


# Masks

def test_masks_counted_by_hand():
    r = masked(["0110", "0011", "0110", "0000"], (0, 1, 4, 6))
    assert ablation.mask_history(r) == ([0, 1, 2, 5, 7, 8], ["0000", "0110", "0011", "0110", "0000"])
    assert ablation.mask_changes(r) == [(2, 0), (1, 1), (1, 1), (0, 2)]
    assert (ablation.bits_changed(r), ablation.undone_skips(r)) == (8, 4)


def test_fixed_skips_from_the_first_step():
    for args, mask in (({}, "010101"), ({"mask": "deepest"}, "000011"), ({"mask": "1"*18}, "111111")):
        record = example_record(make_spec("reduced", "ela", policy="fixed", policy_args=args))
        assert ablation.mask_history(record)[1] == [mask*3]*(len(record.updates) + 1) and ablation.bits_changed(record) == 0
        assert (figures.stage_rates(record) == figures.stage_rates(record)[:, :1]).all() and (figures.stage_rates(record) > 0).all()


def test_a_run_without_updates_keeps_its_first_mask():
    r = replace(masked(["0101"], (0,), policy="fixed"), updates=[])
    assert ablation.mask_history(r) == ([0, 8], ["0101"]) and ablation.mask_changes(r) == []


def test_initial_mask_of_a_control_is_that_of_the_run_it_replays():
    spec = make_spec("reduced", "matched_random", policy_args={"fresh": False})
    assert initial_mask(spec, [3, 3]) == initial_mask(reference_spec(spec), [3, 3]) == "000000"
    eager = make_spec("reduced", "matched_random", policy_args={"initial": "all", "fresh": False})
    assert dict(reference_spec(eager).policy_args) == {"initial": "all"} and initial_mask(eager, [3, 1, 2]) == initial_mask(reference_spec(eager), [3, 1, 2]) == "011001"
    assert make_policy(eager, SimpleNamespace(updates=[])).initial_mask([3]).tolist() == [False, True, True], "the control of the run itself begins so, too"


def test_training_skip_rate_is_the_mean_over_epochs():
    r = masked(["0111"], (1,))
    r = replace(r, epochs=[{**e, "skip_rate": 1.0 if e["epoch"] >= 2 else 0.0} for e in r.epochs])
    assert ablation.training_skip_rate(r) == 6/8


# The ablation

@pytest.mark.parametrize("profile", list(PROFILES))
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_planned_row_is_dropped(profile, share):
    planned = experiment_specs("ebqm_ablation", profile)
    effects = ablation.ablation_effects([example_record(s) for s in planned[:int(share*len(planned))]], profile)
    table = ablation.ablation_table(effects, profile)
    scope = PROFILES[profile].scope("ebqm_ablation")
    assert len(table.frame) == len(ABLATION)*len(scope.recipes)*len(scope.models)*len(scope.datasets)
    assert {s for e in effects for s in e.group.specs} == set(planned)
    for e, said in zip(effects, table.frame["remark"]): assert e.group.records or said.startswith("not run")
    assert sum(len(d.groups) for d in ablation.deciders(effects)) == sum(e.group.key.policy not in ("fixed", "never") for e in effects)
    ablation.recovery_table(effects, profile)
    controls = [g for e in effects if (g := e.group).key.policy == "matched_random"]
    assert [c.control.group for c in ablation.controlled(effects)] == controls and len(ablation.controls_table(effects, profile).frame) == len(controls)
    for e in trends.ablation_figures(effects).values(): trends.ablation_figure(e)


def test_intervals_are_those_of_stats():
    for recipe in ("stable", "released"):
        rows = [e for e in EFFECTS if e.recipe == recipe]
        spread = stats.pooled_sd([e.group.values() for e in rows])
        assert spread.dof == len(ABLATION)*2
        assert rows[0].interval is None and rows[0].is_reference
        for e in rows[1:]: assert e.interval == stats.difference(e.group.values(), rows[0].group.values(), *spread)


def test_diverged_and_missing_runs_are_told():
    made = [example_record(s, "diverged" if s.policy == "bqm" or (s.policy == "threshold" and s.seed == 1) else "done") for s in REDUCED if s.policy != "random"]
    effects = ablation.ablation_effects(made, "reduced")
    frame = ablation.ablation_table(effects, "reduced").frame.set_index(["recipe", "variant"])
    assert "3 of 3 diverged" in frame.loc[("stable", "BQM: a coin, no limits"), "remark"]
    assert frame.loc[("stable", "Threshold: u < 0.5"), "accuracy, last epoch, %"].n == 2
    assert frame.loc[("stable", "Random: half, drawn anew at every update"), "remark"] == "not run: no record of seed 0, 1, 2 yet"
    words = [t.get_text() for t in trends.ablation_figure(effects).findobj(Text)]
    assert words.count("not run") == words.count("diverged") == 2 and words.count("the reference") == 2
    recovery = ablation.recovery_table(effects, "reduced").frame.set_index(["recipe", "policy"])
    assert "diverged" in recovery.loc[("stable", "BQM"), "remark"] and recovery.loc[("stable", "Threshold"), "remark"] == "no finished run yet of 1 of 3"


def test_a_control_stands_beside_the_run_that_it_replays():
    "Runs without a counterpart count in the means and in no pair."
    made = [r for r in MADE if (r.spec.policy, r.spec.policy_args, r.spec.seed) not in {("ebqm", (("initial", "all"),), 2), ("matched_random", (("kind", "contribution"),), 0)}]
    found = {(c.control.recipe, c.control.variant.label): c for c in ablation.controlled(ablation.ablation_effects(made, "reduced"))}
    accuracy = {r.spec: 100*r.final["test_accuracy"] for r in made}
    for c in found.values():
        both = [(of, s) for s in c.control.group.specs if (of := reference_spec(s)) in accuracy and s in accuracy]
        assert c.gaps == [pytest.approx(accuracy[a] - accuracy[b], abs=1e-9) for a, b in both] and c.paired.estimate == pytest.approx(np.mean(c.gaps), abs=1e-9)
        assert c.interval.estimate == pytest.approx(c.paired.estimate, abs=1e-9), "both are taken over the seeds that the two sides share"
    assert [len(found["stable", v].gaps) for v in ("MatchedRandom: as many as EBQM, drawn anew", "MatchedRandom: the same, as many, drawn anew", "contribution: as many, drawn anew")] == [3, 2, 2]
    told = ablation.controls_table(ablation.ablation_effects(made, "reduced"), "reduced").frame.set_index(["recipe", "control"])["remark"]
    assert told["stable", "MatchedRandom: the same, as many, drawn anew"] == "what decides: no record of seed 2 yet" and told["stable", "contribution: as many, drawn anew"] == "control: no record of seed 0 yet"


def test_reasons_come_from_the_store(tmp_path):
    store = Store("quick", tmp_path)
    store.fail(QUICK[1], "out of memory")
    effects = ablation.ablation_effects([], "quick")
    assert ablation.ablation_table(effects, "quick", store).frame["remark"][1] == "not run: seed 0 failed: out of memory"
    assert ablation.recovery_table(effects, "quick", store).frame["remark"][1] == "not run: seed 0 failed: out of memory"


def test_one_seed_has_no_interval():
    effects = ablation.ablation_effects([r for r in MADE if r.spec.seed == 0], "reduced")
    assert "no interval" in trends.ablation_caption(effects) and effects[1].interval.low == -np.inf
    assert "inf" not in ablation.ablation_table(effects, "reduced").to_csv()


def test_matched_gains_compare_the_same_update_only():
    def run(seed, masks, accuracy):
        r = masked(masks, (0, 2), length=5, seed=seed)
        return replace(r, epochs=[{**e, "test_accuracy": a/100} for e, a in zip(r.epochs, accuracy)])
    runs = [run(0, ["0110", "0100"], [10, 0, 20, 0, 50]), run(1, ["0110", "0110"], [10, 0, 30, 0, 40]), run(2, ["0110", "0111"], [10, 0, 30, 0, 44])]
    group = ablation.Group(runs[0].spec, records=runs)
    assert ablation.matched_gains(group) == [pytest.approx(30 - (10 + 14)/2)]  # the first update undid nothing, the second did in one run
    assert ablation.matched_gains(ablation.Group(runs[0].spec, records=runs[:1])) == []


def test_a_steady_control_and_one_that_is_drawn_anew_have_rows_of_their_own():
    found = [(d.recipe, d.label) for d in ablation.deciders(EFFECTS)]
    assert len(set(found)) == len(found)
    assert {label for _, label in found} == {"EBQM", "BQM", "Threshold", "HighestFirst", "Random", "MatchedRandom: as many as EBQM, drawn anew", "MatchedRandom: as many as EBQM, one order", "EBQM, one thing changed", "contribution: as many, drawn anew", "EBQM, all layers skipped before the first update", "MatchedRandom: the same, as many, drawn anew"}
    assert all(len({g.key.policy for g in d.groups}) == 1 for d in ablation.deciders(EFFECTS))


def test_comparable_rates_follow_the_skip_rate():
    by = {(e.recipe, e.variant.label): ablation.comparable_rates(e) for e in EFFECTS}
    assert by["stable", "MatchedRandom: as many as EBQM, drawn anew"] and by["stable", "EBQM"]
    assert not by["stable", "Never (MRLA-B)"] and not by["stable", "Fixed: every other layer"]


def test_ablation_caption_counts():
    clear = [e for e in EFFECTS if e.interval and (e.interval.low > 0 or e.interval.high < 0)]
    fair = [e for e in clear if abs(np.mean([100*ablation.training_skip_rate(r) for r in e.group.records]) - np.mean([100*ablation.training_skip_rate(r) for r in e.reference.records])) < 5]
    assert f"Of {2*(len(ABLATION) - 1)} intervals {len(clear)} miss zero, {len(fair)} of them at EBQM's skip rate; about {0.1*(len(ABLATION) - 1):.1f} would" in trends.ablation_caption(EFFECTS)


# Divergence over training

def test_moments_by_hand():
    run = example_record(make_spec("reduced", "mrla_b"))
    at = [{"epoch": 3 + 8*i, "mask": "000", "divergence": [None, d, 0.1], "null": [None, e, 0.1]} for i, (d, e) in enumerate([(2.0, 1.0), (0.5, 1.0), (0.3, 0.4)])]
    r = replace(run, stages=[3], skip_mask="000", updates=at, divergence={"value": [None, 0.2, 0.3], "null": [None, 0.4, 0.1]})
    assert [m.epochs for m in trends.moments(r)] == [4, 12, 20, 24]
    assert [trends.ratios(m)[1] for m in trends.moments(r)] == pytest.approx([2, 0.5, 0.75, 0.5])
    assert trends.fallen(r) == (1, 2)  # layer 2 fell from 2 to 0.5, layer 3 rose from 1 to 3
    assert [m.epochs for m in trends.three_moments(r)] == [4, 12, 24]
    assert "fell in 1 of 2 layers of the run shown. 24 epochs" in trends.divergence_caption(r)


def test_uniform_attention_is_neutral_everywhere():
    run = example_record(make_spec("quick", "ela"))
    flat = replace(run, updates=[{**u, "divergence": u["null"]} for u in run.updates], divergence={**run.divergence, "value": run.divergence["null"]})
    for m in trends.moments(flat): assert np.nanmax(abs(trends.unit(m) - 0.5)) == 0 and np.nanmax(abs(trends.ratios(m) - 1)) == 0


def test_divergence_table_keeps_every_planned_row():
    plan = [s for s in experiment_specs("divergence_over_training", "reduced", tuple(range(6))) if s.model == "cifar_resnet56"]
    made = [example_record(s, "diverged" if s.method == "ela" and s.recipe == "released" else "done") for s in plan if s.method == "ela" or s.seed == 0]
    frame = trends.divergence_table(made, plan, "reduced").frame.set_index(["method", "recipe"])
    assert len(frame) == 4 and "6 of 6 diverged" in frame.loc[("ELA", "released"), "remark"]
    cell = frame.loc[("ELA", "stable"), "layers below the null line, %: end"]
    assert cell.mean == pytest.approx(np.mean([100*figures.below_null(r)[0]/15 for r in made if r.spec.recipe == "stable" and r.spec.method == "ela"])) and cell.n == 6
    assert frame.loc[("MRLA-B", "stable"), "layers below the null line, %: end"].n == 1


def test_a_run_without_updates_has_only_an_end():
    run = replace(example_record(make_spec("quick", "mrla_b")), updates=[])
    assert trends.three_moments(run)[:2] == [None, None]
    frame = trends.divergence_table([run], [run.spec], "quick").frame
    assert frame["median of D / null line: first update"][0] is None and frame["median of D / null line: end"][0].n == 1
    assert "no update" in trends.divergence_caption(run)
    trends.divergence_over_training(run)


# Figures

@pytest.mark.parametrize("seeds", [1, 6])
@pytest.mark.filterwarnings("error")
def test_figures_are_drawn_and_repeat_to_the_byte(seeds, tmp_path):
    runs = [example_record(make_spec("reduced", "ela", seed=s)) for s in range(seeds)]
    effects = ablation.ablation_effects([example_record(s) for s in experiment_specs("ebqm_ablation", "reduced", tuple(range(seeds)))], "reduced", tuple(range(seeds)))
    for folder in "ab":
        figures.save_figure(trends.divergence_over_training(runs[0], runs[1:]), "d", tmp_path/folder, "c", "reduced")
        figures.save_figure(trends.ablation_figure(effects), "e", tmp_path/folder, "c", "reduced")
        figures.save_figure(trends.course_figure(effects), "f", tmp_path/folder, trends.course_caption(effects), "reduced")
    for name in ("d.svg", "d.png", "e.svg", "e.png", "f.svg", "f.png"): assert (tmp_path/"a/figures"/name).read_bytes() == (tmp_path/"b/figures"/name).read_bytes()
    text = (tmp_path/"a/figures/e.svg").read_text()
    assert all(v.label.replace("<", "&lt;") in text for v in ABLATION)
    assert (tmp_path/"a/figures/e.svg").stat().st_size < 200_000 and (tmp_path/"a/figures/d.svg").stat().st_size < 400_000


def test_losses_are_held_against_the_unpruned_run_of_the_same_seed():
    def altered(r, by): return replace(r, epochs=[{**e, "train_loss": 1.0 + r.spec.seed + by*e["epoch"]} for e in r.epochs])
    specs = [s for s in experiment_specs("ebqm_ablation", "reduced", (0, 1, 2)) if s.recipe == "stable"]
    marked = lambda spec: spec.policy == "fixed" or ("initial", "all") in spec.policy_args  # in colour: they are about when skipping begins
    made = [altered(example_record(s), 0.5*marked(s)) for s in specs if (s.policy, s.seed) != ("never", 2)]
    effects = [e for e in ablation.ablation_effects(made, "reduced", (0, 1, 2)) if e.recipe == "stable"]
    unpruned = next(e.group for e in effects if e.group.key.policy == "never")
    for e in effects:
        assert np.allclose(trends.loss_gaps(e, unpruned), [[0.5*marked(e.group.key)*k for k in range(24)]]*2), "seed 2 has no counterpart"
        assert (e.unpruned is None) == (e.group is unpruned) and (e.unpruned is None or e.unpruned.estimate == pytest.approx(100*(np.mean([r.final["test_accuracy"] for r in e.group.records if r.spec.seed != 2]) - np.mean([r.final["test_accuracy"] for r in unpruned.records])))), "only seeds that both have"
    assert not len(trends.loss_gaps(effects[0], effects[0].group.with_seeds(set())))
    axes = trends.course_figure(effects).axes
    coloured = [e for e in effects if marked(e.group.key)]
    means = [line for line in axes[0].lines if line.get_lw() in (0.7, 1.2)]
    assert len(axes) == 1 and len(coloured) == len(trends.COURSE_LINES) and len(means) == len(effects) - 1, "all but MRLA-B, which is the line at zero"
    assert [line.get_ydata()[-1] for line in means[-len(coloured):]] == pytest.approx([11.5]*len(coloured)), "coloured lines lie on top"
    assert [line.get_xdata()[0] for line in axes[0].lines if line.get_color() == "0.3"] == [coloured[0].group.records[0].updates[0]["epoch"] + 1, 6]
    assert "n = 2 seeds" in trends.course_caption(effects)
    others = [e for e in effects if e.group.key.policy in ("bqm", "never")]  # which begins earlier than the rest
    assert trends._landmarks(trends._courses(effects))["first update of most variants"][0] == 3 > trends._landmarks(trends._courses(others))["first update of most variants"][0]
    lost = [replace(r, epochs=[{**e, "train_loss": None} for e in r.epochs]) if r.spec.policy == "bqm" else r for r in made]
    assert not len(next(gaps for e, gaps in [(e, trends.loss_gaps(e, unpruned)) for e in ablation.ablation_effects(lost, "reduced", (0, 1, 2)) if e.recipe == "stable"] if e.group.key.policy == "bqm")), "a run without losses has no course"
    assert trends.course_figure([e for e in effects if e.group is not unpruned]) is None


@pytest.mark.parametrize("model", ["cifar_resnet20", "cifar_resnet110"])
def test_labels_do_not_overlap(model):
    runs = [example_record(make_spec("paper", "ela", model=model, seed=s)) for s in range(2)]
    for fig in (trends.divergence_over_training(runs[0], runs[1:]), trends.ablation_figure(EFFECTS)):
        fig.draw_without_rendering()
        outside = [tick.label1 for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_major_ticks() if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())]
        boxes = [(t.get_text(), t.get_window_extent()) for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in outside]
        boxes = [(t, b.shrunk(0.8, 0.6)) for t, b in boxes if b.width > 0]
        for i, (t, b) in enumerate(boxes):
            for u, c in boxes[i + 1:]: assert not b.overlaps(c), (t, u)


def test_saturated_ratios_are_cut_and_the_axis_keeps_its_labels():
    run = example_record(make_spec("reduced", "mrla_b"))
    wild = replace(run, updates=[{**u, "divergence": [d and (0.0 if i % 2 else 900.0) for i, d in enumerate(u["divergence"])]} for u in run.updates])
    fig = trends.divergence_over_training(wild)
    fig.draw_without_rendering()
    assert any("cut at 0.001 and 1000" in t.get_text() for t in fig.findobj(Text))
    axis = fig.axes[len(run.stages)].yaxis  # the first panel of the lower row
    assert len([t for t in axis.get_major_ticks() if t.label1.get_text()]) >= 4


def words(fig): return {t.get_text() for legend in fig.legends for t in legend.get_texts()}


def test_the_legend_tells_what_is_drawn():
    "A ratio of one seed that the seeds' median hides is not cut in the figure; a band stands where a stage has a range."
    runs = [example_record(make_spec("reduced", "mrla_b", seed=s)) for s in range(3)]
    def wild(run): return replace(run, updates=[{**u, "divergence": [d and (0.0 if i == 2 else d) for i, d in enumerate(u["divergence"])]} for u in run.updates])
    cut = "ratios cut at 0.001 and 1000"
    assert cut in words(trends.divergence_over_training(wild(runs[0])))
    assert cut not in words(trends.divergence_over_training(wild(runs[0]), runs[1:]))
    assert cut in words(trends.divergence_over_training(wild(runs[0]), [wild(runs[1]), runs[2]]))
    assert "range over layers, seeds' median" in words(trends.divergence_over_training(runs[0], runs[1:])) and "range over layers" in words(trends.divergence_over_training(runs[0]))
    shallow = [example_record(make_spec("reduced", "mrla_b", model="cifar_resnet20", seed=s)) for s in range(3)]
    assert "median over seeds" in words(trends.divergence_over_training(shallow[0], shallow[1:]))
    for fig in (trends.divergence_over_training(shallow[0], shallow[1:]), trends.divergence_over_training(shallow[0])): assert not any("range" in t for t in words(fig))


def test_redundancy_of_all_seeds_stands_beside_that_of_the_planned():
    plan = [s for s in experiment_specs("attention_similarity", "reduced") if (s.model, s.method, s.recipe) == ("cifar_resnet56", "mrla_b", "stable")]
    made = [example_record(replace(plan[0], seed=seed)) for seed in range(16)]
    row = figures.similarity_table(made + [example_record(replace(plan[0], seed=20), "diverged")], plan, "reduced").frame.iloc[0]
    assert row["median of D / null line"].n == len(plan) == 3 and row["all seeds of the suite: median of D / null line"].n == 16
    ratios = [np.median([d/n for d, n in zip(r.divergence["value"], r.divergence["null"]) if d is not None]) for r in made]
    assert row["all seeds of the suite: median of D / null line"].mean == pytest.approx(np.mean(ratios)) and row["median of D / null line"].mean == pytest.approx(np.mean(ratios[:3]))


def test_figures_refuse_what_has_no_divergence():
    for record in (example_record(make_spec("quick", "se")), example_record(make_spec("quick", "ela"), "diverged")):
        with pytest.raises(ElaError, match="choose a run"): trends.divergence_over_training(record)


def test_several_networks_have_figures_of_their_own():
    both = EFFECTS + [replace(e, group=replace(e.group, key=replace(e.group.key, model="cifar_resnet20"))) for e in EFFECTS]
    assert list(trends.ablation_figures(both)) == ["ebqm_ablation_cifar100_cifar_resnet56", "ebqm_ablation_cifar100_cifar_resnet20"]


def test_a_variant_is_held_against_the_runs_with_its_seeds():
    "A variant of which one seed is there skips what that seed of EBQM skips, and is not called unlike it for lack of the others."
    specs = [s for s in experiment_specs("ebqm_ablation", "reduced") if s.recipe == "stable"]
    made = [example_record(s) for s in specs]
    accuracy = {0: 60.0, 1: 62.0, 2: 64.0}
    made = [replace(r, final={**r.final, "test_accuracy": accuracy[r.spec.seed]/100 + 0.001*(dict(r.spec.policy_args).get("mean") == 0.25)}) for r in made]
    some = [r for r in made if dict(r.spec.policy_args).get("mean") != 0.25 or r.spec.seed == 2]
    effect = next(e for e in ablation.ablation_effects(some, "reduced") if dict(e.group.key.policy_args).get("mean") == 0.25 and e.recipe == "stable")
    assert [r.spec.seed for r in effect.reference.records] == [2] and effect.interval.estimate == pytest.approx(0.1)
    whole = next(e for e in ablation.ablation_effects(made, "reduced") if dict(e.group.key.policy_args).get("mean") == 0.25 and e.recipe == "stable")
    assert len(whole.reference.records) == 3 and whole.interval.estimate == pytest.approx(0.1)
    lone = [r for r in some if r.spec.seed != 2 or r.spec.policy_args]
    remark = next(ablation.effect_remark(e) for e in ablation.ablation_effects(lone, "reduced") if dict(e.group.key.policy_args).get("mean") == 0.25 and e.recipe == "stable")
    assert "no finished run of EBQM and of MRLA-B with these seeds" in remark
