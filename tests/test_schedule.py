"The schedule is chosen by its rules, on held-out images, and says so when it cannot be: made-up records whose accuracies are given."
import math
from dataclasses import replace
from functools import cache

import pytest
from matplotlib.text import Text

from ela_repro import examples, schedule
from ela_repro.figures import save_figure
from ela_repro.runs import PROFILES, SCHEDULES, Store, experiment_specs, make_spec
from ela_repro.schedule import PAIRS, Interval, Setting
from ela_repro.stats import contrast, difference, pooled_sd
from ela_repro.tables import save_table

RATES, LENGTHS = ([s for g in schedule.planned_groups(part, [], "reduced") for s in g.specs] for part in ("rate and decay", "length"))
SETTINGS, BEST, OWN = list(dict.fromkeys(map(Setting.of, RATES))), Setting(0.1, "cosine", 1), schedule.own_setting("reduced")
example_record = cache(examples.example_record)


def scored(spec, percent, status="done"):
    "A made-up record with this accuracy, on whatever images its spec evaluates."
    made = example_record(spec, status)
    return made if status == "diverged" else replace(made, final={**made.final, "test_accuracy": percent/100})


def rated(s, better=BEST, by=1.0): return scored(s, 60 + 2*(s.attention == "mrla_b") + 0.2*s.seed + by*(Setting.of(s) == better))


def grown(s, lead): # `lead`: epochs -> points that layer attention is ahead of the plain ResNet
    return scored(s, 50 + 0.3*s.seed + (s.attention != "none")*lead[s.epochs])


def rate_rows(records, profile="reduced", **kw): return schedule.rate_table(records, profile, **kw).frame


def everything(records, profile, folder):
    "All that the page makes; the captions."
    tried, groups, pairs = schedule.settings_tried(records, profile), schedule.planned_groups("length", records, profile), schedule.length_pairs(records, profile)
    tables = [schedule.rate_table(records, profile), schedule.length_table(records, profile), schedule.length_accuracy_table(records, profile)]
    for t in tables: save_table(t, folder)
    captions = [schedule.rates_caption(tried, profile), schedule.schedule_caption(groups, pairs, profile)]
    for name, fig, caption in zip(("schedule_rates", "schedule_choice"), (schedule.rates_figure(tried, profile), schedule.schedule_figure(groups, profile)), captions):
        save_figure(fig, name, folder, caption, profile, "schedule_choice")
    return tables, captions


def words(fig): return [t.get_text() for t in fig.findobj(Text)]


# Rate and decay

def test_the_best_mean_is_chosen():
    for setting in dict.fromkeys(map(Setting.of, RATES)):
        assert schedule.chosen(schedule.settings_tried([rated(s, setting) for s in RATES], "reduced")) == setting


def test_both_networks_count_alike():
    gains = {(0.1, "step"): (0, 4), (0.2, "step"): (6, -3), (0.1, "cosine"): (2.5, 2)}  # means 2, 1.5, 2.25
    records = [scored(s, 60 + gains.get((s.lr, s.lr_schedule), (0, 0))[s.attention == "mrla_b"]*(s.warmup_epochs == 0)) for s in RATES]
    assert schedule.chosen(schedule.settings_tried(records, "reduced")) == Setting(0.1, "cosine", 0)


def test_seeds_are_averaged_before_networks():
    seeds = (0, 1, 2)
    specs = [s for g in schedule.planned_groups("rate and decay", [], "reduced", seeds) for s in g.specs]
    tried = schedule.settings_tried([scored(s, {0: 50, 1: 60, 2: 64}[s.seed] + 10*(s.attention == "mrla_b")) for s in specs], "reduced", seeds)
    assert [t.mean for t in tried] == pytest.approx([63]*len(SETTINGS)) and schedule.chosen(tried) == tried[0].setting  # of equals, the first


def test_runs_on_the_test_set_do_not_count():
    made, on_test = [rated(s) for s in RATES], [scored(replace(s, holdout=0), 99) for s in RATES if s.lr == 0.05]
    assert {s.holdout for s in RATES + LENGTHS} == {5000}
    assert schedule.settings_tried(made + on_test, "reduced") == schedule.settings_tried(made, "reduced")
    assert schedule.chosen(schedule.settings_tried(on_test, "reduced")) is None
    assert all(p.longest is None for p in schedule.length_pairs([scored(replace(s, holdout=0), 99) for s in LENGTHS], "reduced"))


def test_lengths_are_not_read_as_rates():
    once = [s for s in LENGTHS if s.epochs == 24 and s.recipe == "stable" and s.method in ("plain", "mrla_b")]
    assert set(once) <= set(RATES)  # the same runs serve both parts
    assert schedule.settings_tried([scored(s, 99) for s in LENGTHS if s not in once], "reduced") == schedule.settings_tried([], "reduced")


@pytest.mark.parametrize("attention", ["none", "mrla_b"])
def test_a_diverged_run_makes_its_setting_ineligible(attention):
    lost = lambda s: Setting.of(s) == BEST and s.attention == attention and s.seed == 1
    records = [example_record(s, "diverged") if lost(s) else rated(s, by=20) for s in RATES]
    tried = schedule.settings_tried(records, "reduced")
    assert schedule.chosen(tried) == Setting(0.05, "step", 0) and [t.setting for t in tried if not t.eligible] == [BEST]
    row = rate_rows(records).iloc[SETTINGS.index(BEST)]
    assert row["remark"].startswith("diverged: not eligible; ") and "1 of 2 diverged, not in the mean: seed 1" in row["remark"] and row["rule"] is None
    assert row["difference to the best, points [95% interval]"].estimate > 19  # nothing is hidden
    assert "a run diverged: not eligible" in words(schedule.rates_figure(tried, "reduced"))


def test_where_every_setting_diverged_none_is_chosen():
    records = [example_record(s, "diverged") for s in RATES]
    tried = schedule.settings_tried(records, "reduced")
    assert schedule.chosen(tried) is None and "under every setting a run diverged" in schedule.rate_choice(tried, "reduced")
    assert all(r.startswith("diverged: not eligible") for r in rate_rows(records)["remark"])


@pytest.mark.parametrize("missing", [0, 17, 35])
def test_there_is_no_choice_before_the_last_run(missing):
    records = [rated(s) for i, s in enumerate(RATES) if i != missing]
    tried = schedule.settings_tried(records, "reduced")
    assert schedule.chosen(tried) is None and schedule.rate_choice(tried, "reduced") == f"No choice yet: {len(RATES) - 1} of {len(RATES)} planned runs have ended."
    frame = rate_rows(records)
    assert list(frame["rule"]).count("best so far") == 1 and "chosen" not in list(frame["rule"])
    assert [r for r in frame["remark"] if r] == [f"{'MRLA-B' if RATES[missing].attention == 'mrla_b' else 'ResNet'}: no record of seed {RATES[missing].seed} yet"]
    assert "chosen" not in words(schedule.rates_figure(tried, "reduced"))


def test_reasons_come_from_the_store(tmp_path):
    store = Store("reduced", tmp_path)
    store.fail(RATES[0], "out of memory")
    assert "ResNet: not run: no record of seed 1 yet; seed 0 failed: out of memory" in rate_rows([], store=store)["remark"][0]
    store.fail(next(s for s in LENGTHS if s.epochs == 12), "out of memory")
    assert "at 12 epochs not run: no record of seed 1 yet; seed 0 failed: out of memory" in schedule.length_accuracy_table([], "reduced", store=store).frame["remark"][0]


def test_the_table_says_whether_the_profile_trains_with_the_choice(monkeypatch):
    records = [rated(s) for s in RATES]
    table = schedule.rate_table(records, "reduced")
    assert f"Chosen: rate 0.1, cosine, 1 warm-up epoch. Profile reduced trains with {OWN}: this is NOT the setting chosen." in table.caption
    assert [(list(table.frame[c]).index(v)) for c, v in (("rule", "chosen"), ("the profile's", "yes"))] == [SETTINGS.index(BEST), SETTINGS.index(OWN)]
    own = [rated(s, OWN) for s in RATES]
    assert "Profile reduced trains with it." in schedule.rate_table(own, "reduced").caption and "NOT" not in schedule.rate_table(own, "reduced").caption
    profile = PROFILES["reduced"]
    monkeypatch.setitem(PROFILES, "reduced", replace(profile, settings={**profile.settings, "lr": 0.1, "lr_schedule": "cosine", "warmup_epochs": 1}))
    assert schedule.own_setting("reduced") == BEST and "Profile reduced trains with it." in schedule.rate_table(records, "reduced").caption


def test_a_choice_at_the_edge_says_so():
    said = {lr: schedule.rate_choice(schedule.settings_tried([rated(s, Setting(lr, "cosine", 0)) for s in RATES], "reduced"), "reduced") for lr in (0.05, 0.1, 0.2)}
    assert "the lowest that was tried with this decay" in said[0.05] and "tried" not in said[0.1] and "the highest that was tried with this decay" in said[0.2]


def test_distances_are_those_of_stats():
    tried = schedule.settings_tried([example_record(s) for s in RATES], "reduced")
    spread, best = pooled_sd([g.values() for t in tried for g in t.groups]), schedule.best_so_far(tried)
    assert spread.dof == len(RATES) - 2*len(SETTINGS)
    for t, found in zip(tried, schedule.distances(tried)):
        assert found == (None if t is best else contrast([g.values() for x in (t, best) for g in x.groups], [0.5, 0.5, -0.5, -0.5], *spread))


# Length

UP, DOWN, WIDE, NONE = Interval(0.5, 2, 1), Interval(-2, -0.5, -1), Interval(-1, 2, 0.5), Interval(-math.inf, math.inf, 1)


@pytest.mark.parametrize("shorter, longest, said", [
    (UP, UP, "agrees"), (DOWN, DOWN, "agrees"), (UP, DOWN, "reversed"), (DOWN, UP, "reversed"), (WIDE, UP, "undecided (shorter)"), (DOWN, WIDE, "undecided (longest)"), (WIDE, WIDE, "undecided (both)"),
    (NONE, UP, "undecided (shorter)"), (NONE, NONE, "undecided (both)"), (Interval(0, 2, 1), UP, "undecided (shorter)"), (Interval(-2, 0, -1), DOWN, "undecided (shorter)")])
def test_agreement(shorter, longest, said): assert schedule.agreement(shorter, longest) == said


def pair(*intervals):
    "A pair of methods at 12, 24, … epochs with these intervals."
    epochs = [12*2**i for i in range(len(intervals))]
    sides = {e: tuple(schedule.Group(make_spec("reduced", m, epochs=e)) for m in ("ela", "plain")) for e in epochs}
    return schedule.Pair(("cifar100", "cifar_resnet56"), "stable", sides, dict(zip(epochs, intervals)))


WEAK, WRONG = Interval(-1, 2, 0.5), Interval(-2, 1, -0.5) # Contain zero; on the side of UP, and not


@pytest.mark.parametrize("pairs, shortest", [
    ([(UP, UP, UP)], 12), ([(WEAK, UP, UP)], 12), ([(WRONG, UP, UP)], 24), ([(DOWN, UP, UP)], 24), ([(WRONG, DOWN, UP)], None), ([(DOWN, WEAK, UP), (UP, DOWN, WIDE)], 24),
    ([(WEAK, WEAK, DOWN)], None), ([(UP, UP, WIDE)], None), ([(UP, UP, NONE)], None), ([(UP, UP, UP), (None, UP, UP)], 24), ([(UP, UP, UP), (UP, WEAK, None)], 12),
    ([(UP, UP, UP), (None, None, None)], None), ([(UP,)], None), ([], None), ([(UP, UP, UP), (UP, WRONG, UP)], 12)])
def test_shortest_agreeing(pairs, shortest): assert schedule.shortest_agreeing([pair(*p) for p in pairs]) == shortest


def test_a_reversed_pair_never_stands():
    for sequence in ((DOWN, UP), (UP, DOWN)):
        made = pair(*sequence)
        assert made.against_longest(12) == "reversed" and schedule.order_stands([made], 12) is False and schedule.contrary([made], 12) == [made]


def test_the_longest_is_the_longest_that_was_measured():
    made = pair(UP, DOWN, None)
    assert made.longest == 24 and made.against_longest(12) == "reversed" and made.against_longest(24) is made.against_longest(48) is None


@pytest.mark.parametrize("lead, says", [
    ({12: 2, 24: 2, 48: 2, 96: 2}, ["on the same side, by its estimate: 12 epochs", "24 epochs, at which this is so."]),
    ({12: -2, 24: -2, 48: 2, 96: 2}, ["by its estimate: 48 epochs", "at which this is NOT so: MRLA-B − ResNet (stable), ELA − ResNet (stable)"]),
    ({12: -2, 24: -2, 48: -2, 96: 2}, ["No shorter length has every pair"]),
    ({12: 2, 24: 2, 48: -2, 96: 2}, ["by its estimate: 12 epochs", "Yet it is not so at 48 epochs."]),
    ({12: 2, 24: 2, 48: 2, 96: 0.1}, ["The longest schedules decide no pair: there is no order to agree with."])])
def test_the_choice_of_a_length_in_words(lead, says):
    pairs = schedule.length_pairs([grown(s, lead) for s in LENGTHS], "reduced")
    for text in says: assert text in schedule.length_choice(pairs, "reduced")
    assert schedule.length_choice(pairs, "reduced") in schedule.length_table([grown(s, lead) for s in LENGTHS], "reduced").caption


def test_an_early_look_says_so():
    lead = {12: 2, 24: 2, 48: 2, 96: 2}
    early = [grown(s, lead) for s in LENGTHS if s.epochs < 96 or s.seed == 0]
    said = schedule.length_choice(schedule.length_pairs(early, "reduced"), "reduced")
    assert said.startswith("The longest schedules decide no pair: there is no order")  # one seed at 96 epochs bounds nothing
    said = schedule.length_choice(schedule.length_pairs([r for r in early if r.spec.epochs < 96], "reduced"), "reduced")
    assert said.startswith("So far, as 42 of 56 planned runs have ended: Shortest length")
    assert "cannot be told yet" in schedule.length_choice(schedule.length_pairs([r for r in early if r.spec.epochs == 48], "reduced"), "reduced")
    assert "cannot be told yet" in schedule.length_choice(schedule.length_pairs([], "reduced"), "reduced")


def test_pairs_have_both_recipes_and_the_intervals_of_stats():
    pairs = schedule.length_pairs([example_record(s) for s in LENGTHS], "reduced")
    assert [(p.recipe, p.label) for p in pairs[:2]] == [("stable", "MRLA-B − ResNet"), ("stable", "ELA − ResNet")] and len(pairs) == 2*len(PAIRS) and schedule.lengths(pairs) == [12, 24, 48, 96]
    for recipe in ("stable", "released"):
        for epochs in (12, 96):
            by = {m: [100*example_record(s).final["test_accuracy"] for s in LENGTHS if (s.method, s.epochs) == (m, epochs) and (m == "plain" or s.recipe == recipe)] for m in ("plain", "mrla_b", "ela", "matched_random")}
            assert pooled_sd(by.values()).dof == 4
            found = [p.intervals[epochs] for p in pairs if p.recipe == recipe]
            assert found == [difference(by[a], by[b], *pooled_sd(by.values())) for a, b in PAIRS]


def test_missing_and_diverged_runs_are_told():
    lead = {12: 2, 24: 2, 48: 2, 96: 2}
    records = [example_record(s, "diverged") if (s.method, s.recipe, s.epochs, s.seed) == ("mrla_b", "stable", 12, 1) else grown(s, lead) for s in LENGTHS if (s.method, s.epochs) != ("ela", 96)]
    frame = schedule.length_table(records, "reduced").frame.set_index(["recipe", "difference"])
    assert frame.loc[("stable", "MRLA-B − ResNet"), "remark"] == "MRLA-B: finished 1 of 2 at 12 epochs"
    row = frame.loc[("released", "ELA − MRLA-B")]
    assert row["longest, epochs"] == 48 and row["remark"] == "ELA: finished 0 of 2 at 96 epochs" and row["48 epochs against the longest"] is None and row["12 epochs against the longest"] == "undecided (both)"
    accuracy = schedule.length_accuracy_table(records, "reduced").frame.set_index(["method", "recipe"])
    assert accuracy.loc[("MRLA-B", "stable"), "remark"] == "at 12 epochs 1 of 2 diverged, not in the mean: seed 1" and accuracy.loc[("MRLA-B", "stable"), "12 epochs, held-out accuracy, %"].n == 1
    assert accuracy.loc[("ELA", "stable"), "remark"] == "at 96 epochs not run: no record of seed 0, 1 yet"


# Tables and figures, whatever is there

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("profile, share", [("quick", 0.3), ("reduced", 0), ("reduced", 0.3), ("reduced", 1), ("paper", 0)])
def test_every_part_of_the_page_is_made_and_no_planned_row_is_dropped(profile, share, tmp_path):
    specs = experiment_specs("schedule_choice", profile)
    tables, captions = everything([example_record(s) for s in specs[:int(share*len(specs))]], profile, tmp_path)
    recipes = len(PROFILES[profile].scope("schedule_choice").recipes)
    assert [len(t.frame) for t in tables] == ([len({Setting.of(g.key) for g in schedule.planned_groups("rate and decay", [], profile)}), 6*recipes, 1 + 3*recipes] if specs else [1, 1, 1])
    assert len(list(tmp_path.rglob("*.png"))) == 2 and all("inf" not in t.to_csv() and "held-out" in t.to_csv() + t.caption for t in tables)
    if not share or not specs: assert all(r and "not run: " in r for t in tables for r in t.frame["remark"])
    for text in captions if not specs else (): assert f"Not run: profile {profile} plans no runs of this study" in text
    for t in tables: assert "test accuracy" not in t.caption + t.note


def test_one_seed_has_no_interval(tmp_path):
    tables, captions = everything([example_record(s) for s in experiment_specs("schedule_choice", "quick")], "quick", tmp_path)
    assert "The longest schedules decide no pair: no seed is repeated." in tables[1].caption and "The longest schedules decide no pair" in captions[1]
    against = [v for c in tables[1].frame if c.endswith("against the longest") for v in tables[1].frame[c]]
    assert set(against) == {"undecided (both)"} and "Of 18 comparisons with the longest, 0 agree, 0 are reversed, 18 undecided" in tables[1].note
    assert "Chosen: " in tables[0].caption and "mean nothing" in tables[0].caution


def test_every_mark_lies_well_inside_its_axes():
    "The single runs stand to the right of their mean, also beside the last rate and the longest schedule."
    records = [example_record(s) for s in experiment_specs("schedule_choice", "reduced")]
    for fig in (schedule.schedule_figure(schedule.planned_groups("length", records, "reduced"), "reduced"), schedule.rates_figure(schedule.settings_tried(records, "reduced"), "reduced")):
        for ax in fig.axes:
            end, unit = ax.get_window_extent().x1, fig.dpi/72
            marks = [x for line in ax.lines if line.get_marker() not in ("None", "") for x, _ in ax.transData.transform(line.get_xydata())]
            assert max(marks) < end - 4*unit


def test_figures_say_what_is_missing_and_repeat_to_the_byte(tmp_path):
    assert words(schedule.schedule_figure(schedule.planned_groups("length", [], "reduced"), "reduced")).count("no finished run") == 2
    assert words(schedule.rates_figure(schedule.settings_tried([], "reduced"), "reduced")).count("no finished run") == 3
    assert "no runs are planned" in words(schedule.schedule_figure([], "paper")) and "no runs are planned" in words(schedule.rates_figure([], "paper"))
    records = [example_record(s) for s in experiment_specs("schedule_choice", "reduced")]
    for folder in "ab": everything(records, "reduced", tmp_path/folder)
    for name in ("schedule_choice.svg", "schedule_rates.svg", "schedule_choice.png"): assert (tmp_path/"a/figures"/name).read_bytes() == (tmp_path/"b/figures"/name).read_bytes()


def test_lines_and_ticks_are_those_of_the_plan():
    records = [example_record(s) for s in experiment_specs("schedule_choice", "reduced")]
    fig = schedule.schedule_figure(schedule.planned_groups("length", records, "reduced"), "reduced")
    for ax in fig.axes: assert [t.get_text() for t in ax.get_xticklabels()] == ["12", "24", "48", "96"] and sum(len(line.get_xdata()) == 4 for line in ax.lines) == 4
    fig = schedule.rates_figure(schedule.settings_tried(records, "reduced"), "reduced")
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["ResNet", "MRLA-B", "mean of the networks"]
    for ax in fig.axes: assert [t.get_text() for t in ax.get_xticklabels()] == ["0.05", "0.1", "0.2", "0.4", "0.8"] and [sum(len(line.get_xdata()) == n for line in ax.lines) for n in (3, 4)] == [3, 1]


def test_both_parts_cover_the_plan():
    assert {v.group for v in SCHEDULES} == {"rate and decay", "length"} and {*RATES, *LENGTHS} == set(experiment_specs("schedule_choice", "reduced"))
