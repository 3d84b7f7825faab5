"ELA beside its controls on new seeds: made-up records, counted by hand."
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text
from scipy import stats as scipy_stats

from ela_repro import replication
from ela_repro.examples import example_record
from ela_repro.runs import NEW_SEEDS, PROFILES, Store, experiment_specs, reference_spec
from ela_repro.stats import holm

PLANNED = experiment_specs(replication.EXPERIMENT, "reduced")
EARLIER = experiment_specs("matched_control", "reduced")
MADE = [example_record(s) for s in dict.fromkeys(PLANNED + EARLIER)]
ANEW, ONE = "ELA − MatchedRandom, drawn anew", "ELA − MatchedRandom, one order"


def scored(accuracy, records=MADE):
    "Made-up records with `accuracy(spec)` in percent."
    return [replace(r, final={**r.final, "test_accuracy": accuracy(r.spec)/100}) for r in records]


def by_name(records, profile="reduced"): return {p.name: p for p in replication.pairings(records, profile)}


def test_new_seeds_are_new():
    for profile in ("reduced", "paper"):
        first = {s for e in ("matched_control", "cifar_accuracy", "ebqm_ablation") for s in experiment_specs(e, profile)}
        assert not first & set(experiment_specs(replication.EXPERIMENT, profile)) and not set(NEW_SEEDS) & set(PROFILES[profile].seeds)


def test_the_sides_are_what_their_names_say():
    found = by_name(MADE)
    assert list(found) == ["ELA − MRLA-B", ANEW, ONE]
    assert [dict(found[n].theirs.key.policy_args).get("fresh", True) for n in (ANEW, ONE)] == [True, False]
    assert all(p.ours.key.policy == "ebqm" and p.ours.recipe == "stable" and [s.seed for s in p.theirs.specs] == list(NEW_SEEDS) for p in found.values())


def test_gaps_by_hand():
    found = by_name(scored(lambda s: 60 + s.seed + (0.1*s.seed + 0.2)*(s.policy == "ebqm")))
    p = found[ANEW]
    expected = [0.1*seed + 0.2 for seed in NEW_SEEDS]
    np.testing.assert_allclose(list(p.gaps.values()), expected, atol=1e-9)
    theirs = scipy_stats.ttest_1samp(expected, 0)
    np.testing.assert_allclose([p.interval.low, p.interval.high, p.interval.p], [*theirs.confidence_interval(0.95), theirs.pvalue], atol=1e-9)
    np.testing.assert_allclose(list(p.earlier.values()), [0.1*seed + 0.2 for seed in range(6)], atol=1e-9)
    assert found[ONE].earlier == {}


def test_only_seeds_with_both_records_count():
    some = [r for r in MADE if not (r.spec.policy == "ebqm" and r.spec.seed in (6, 7)) and not (r.spec.policy == "matched_random" and r.spec.seed == 15)]
    p = by_name([replace(r, status="diverged") if r.spec.seed == 8 and r.spec.policy == "matched_random" else r for r in some])[ANEW]
    assert list(p.gaps) == list(range(9, 15)) and p.kind == "confirmatory"
    remark = replication.replication_table([p], "reduced").frame["remark"][0]
    assert "ELA: no record of seed 6, 7 yet" in remark and "1 of 9 diverged" in remark and "no record of seed 15 yet" in remark
    assert by_name([r for r in MADE if r.spec.seed < 11])[ANEW].kind == "exploratory"


def test_earlier_seeds_decide_nothing():
    a, b = (by_name(scored(lambda s: 60 + (s.seed < 6)*shift*(s.policy == "ebqm") + 0.01*((7*s.seed + len(s.policy)) % 5))) for shift in (0, 50))
    assert a[ANEW].interval == b[ANEW].interval and a[ANEW].earlier != b[ANEW].earlier


@pytest.mark.parametrize("asked, new, words", [
    (tuple(range(6)), 0, "no new seed was asked for, so nothing is tested: seeds 0–5 belong to the first study; this study takes 6–15"),
    (tuple(range(10)), 4, "seeds 0–5 belong to the first study; this study takes 6–15"),
    ((5, 20, 21), 0, "no new seed was asked for, so nothing is tested: seed 5 belongs to the first study and seeds 20–21 were not fixed beforehand; this study takes 6–15"),
    (NEW_SEEDS[:6], 6, ""), (None, 10, "")], ids=["old", "both", "neither", "new", "all"])
def test_asking_for_a_seed_does_not_make_it_new(asked, new, words):
    every = MADE + [example_record(s) for s in experiment_specs(replication.EXPERIMENT, "reduced", (*range(6), 20, 21)) if s not in {r.spec for r in MADE}]
    found = replication.pairings(every, "reduced", asked)
    assert [(len(p.gaps), sorted(p.earlier), p.aside) for p in found] == [(new, [*range(6)], words)]*3
    assert all(set(p.gaps) <= set(NEW_SEEDS) and p.kind == ("confirmatory" if new >= 6 else "exploratory") for p in found)
    table, caption = replication.replication_table(found, "reduced"), replication.replication_caption(found)
    assert all((r or "") == words for r in table.frame["remark"]) and all(words[1:] in text for text in (table.caption, caption))
    assert ("planned" in table.caption) == ("On the new seeds" in caption) == (new > 0) and all((v is None) == (not new) for v in table.frame["p (Holm)"])
    texts = {t.get_text() for t in replication.replication_figure(found).findobj(Text)}
    assert ("no new seed asked for" in texts) == (not new) and "new seeds not run" not in texts


@pytest.mark.parametrize("profile", ["quick", "reduced", "paper"])
def test_every_profile_has_new_seeds_of_its_own(profile):
    first, new = (replication.planned_seeds(e, profile) for e in ("matched_control", replication.EXPERIMENT))
    assert new and not first & new and replication.new_seeds(profile) == new and replication.new_seeds(profile, tuple(first)) == set()


def test_family_of_three():
    found = replication.pairings(MADE, "reduced")
    assert replication.adjusted(found) == holm([p.interval.p for p in found])
    two = replication.pairings([r for r in MADE if r.spec.attention == "ela"], "reduced")
    assert replication.adjusted(two)[0] is None and replication.adjusted(two)[1:] == holm([p.interval.p for p in two[1:]], 3)


def test_chance_is_called_a_finding_as_often_as_promised():
    found = []
    for study in range(300):
        draws = np.random.default_rng(study)
        common = draws.normal(0, 0.5, 16)
        rows = replication.pairings(scored(lambda s: 60 + common[s.seed] + draws.normal(0, 0.3), MADE), "reduced")
        found.append(any(p < 0.05 for p in replication.adjusted(rows)))
    assert 0.015 <= np.mean(found) <= 0.08  # three differences share ELA's runs: at most 5%, and not much less


def test_a_difference_is_found():
    draws = np.random.default_rng(0)
    rows = by_name(scored(lambda s: 60 + 0.5*(s.policy == "ebqm") + draws.normal(0, 0.2)))
    assert rows[ANEW].interval.low > 0 and max(replication.adjusted(list(rows.values()))) < 0.05
    assert rows[ANEW].reach < 0.5


@pytest.mark.parametrize("records", [MADE, MADE[:3], []], ids=["all", "few", "none"])
def test_figure_and_caption_say_what_is_there(records):
    rows = replication.pairings(records, "reduced")
    texts = {t.get_text() for t in replication.replication_figure(rows).findobj(Text)}
    assert {p.name for p in rows} <= texts and ("new seeds not run" in texts) == (records is not MADE)
    assert replication.replication_caption(rows).count("not run") == (0 if records is MADE else 3)


def test_reasons_come_from_the_store(tmp_path):
    store = Store("reduced", tmp_path)
    store.fail(PLANNED[10], "no room left")
    remarks = replication.replication_table(replication.pairings([], "reduced"), "reduced", store).frame["remark"]
    assert all("ELA: not run" in r and "seed 6 failed: no room left" in r for r in remarks)


def on(gpu, record): return replace(record, provenance={**record.provenance, "device": "cuda", "gpu": gpu})


def test_pairs_of_two_kinds_of_gpu_are_told_and_left_out_beside():
    "Each kind rounds in its own way, so that such a pair is none; by the rule that was fixed it counts, and a second number is without it."
    made = scored(lambda s: 60 + (1.0 + 0.1*(s.seed % 2) + 4*(s.seed < 8))*(s.policy == "ebqm"))
    moved = [on("B" if r.spec.seed < 8 and r.spec.policy == "ebqm" else "A", r) for r in made]
    alike, mixed = (by_name(records)[ANEW] for records in ([on("A", r) for r in made], moved))
    assert (alike.mixed, alike.unmixed) == ([], alike.interval) and mixed.interval == alike.interval
    assert mixed.mixed == [6, 7] and mixed.unmixed.estimate == pytest.approx(1.05) and mixed.interval.estimate == pytest.approx(1.85)
    table = replication.replication_table([mixed], "reduced").frame
    assert table["pairs on one kind of GPU"][0] == 8 and table["these alone, points [95% interval]"][0] == mixed.unmixed and "seeds 6–7: one run on one kind of GPU" in table["remark"][0]
    assert "(+1.05 [+1.01, +1.09], 8 pairs, where both runs are of one kind of GPU)" in replication.answers([mixed]) and "kind of GPU" not in replication.answers([alike])
    texts = [{t.get_text() for t in replication.replication_figure([p]).findobj(Text)} for p in (mixed, alike)]
    assert ["new seeds, two kinds of GPU" in t for t in texts] == [True, False]
    assert "no pair has both runs" in replication.answers([by_name([on(r.spec.policy, r) for r in made])[ANEW]])


# ---- by position

PLACES = [example_record(s) for s in experiment_specs(replication.POSITION, "reduced")]


def test_position_control_has_seeds_sides_and_family_of_its_own():
    assert not {s.spec.seed for s in PLACES} & replication.earlier_seeds("reduced", replication.POSITION)
    shallow, deep = replication.pairings(PLACES + MADE, "reduced", experiment=replication.POSITION)
    assert [p.name for p in (shallow, deep)] == ["ELA − MatchedPosition, shallowest first", "ELA − MatchedPosition, deepest first"]
    assert [dict(p.theirs.key.policy_args).get("first", "shallowest") for p in (shallow, deep)] == ["shallowest", "deepest"]
    assert all(list(p.gaps) == list(range(16, 26)) and p.kind == "confirmatory" and not p.earlier for p in (shallow, deep))
    assert replication.adjusted([shallow, deep]) == holm([p.interval.p for p in (shallow, deep)])
    table = replication.replication_table([shallow, deep], "reduced", experiment=replication.POSITION)
    assert table.name == table.experiment == "position_control" and not any("earlier" in c for c in table.frame) and "earlier studies" in table.caption
    old = replication.pairings(PLACES + MADE, "reduced", (6, 7), replication.POSITION)
    assert all(not p.gaps and "seeds 6–7 belong to an earlier study; this study takes 16–25" in p.aside for p in old)


def test_masks_of_the_controls_are_those_of_their_places():
    for r in PLACES:
        if r.spec.policy == "ebqm": continue
        ela, first = next(o for o in PLACES if o.spec == reference_spec(r.spec)), dict(r.spec.policy_args).get("first", "shallowest")
        for ours, theirs in ((a["mask"][i:i + 6], b["mask"][i:i + 6]) for a, b in zip(ela.updates, r.updates) for i in (0, 6, 12)):
            n = ours.count("1")
            assert theirs == ("0" + "1"*n + "0"*(5 - n) if first == "shallowest" else "0"*(6 - n) + "1"*n)


def test_outcomes_and_answers():
    draws = np.random.default_rng(1)
    rows = replication.pairings(scored(lambda s: 60 + draws.normal(0, 0.1) + 0.5*(s.policy == "ebqm")), "reduced")
    assert replication.outcomes(rows) == "above zero, above zero, above zero" and replication.answers(rows).count("10 pairs, p = ") == 3
    few = replication.pairings(scored(lambda s: 60 + draws.normal(0, 0.1) + 0.5*(s.policy == "ebqm"), [r for r in MADE if r.spec.seed < 9]), "reduced")
    assert replication.outcomes(few) == "too few pairs, too few pairs, too few pairs"
    even = replication.pairings(scored(lambda s: 60 + draws.normal(0, 0.1)), "reduced")
    assert replication.outcomes(even) == "contains zero, contains zero, contains zero"
    below = replication.pairings(scored(lambda s: 60 + draws.normal(0, 0.1) - 0.5*(s.policy == "ebqm"), [r for r in MADE if r.spec.attention == "ela"]), "reduced")
    assert replication.outcomes(below) == "not run, below zero, below zero" and "ELA − MRLA-B: not run" in replication.answers(below)
