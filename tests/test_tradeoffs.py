"Accuracy against parameters: the contrast, the plain line, and every way in which runs can be missing."
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib.text import Text
from scipy import stats as scipy_stats

from ela_repro.core import ElaError
from ela_repro.examples import example_record, example_records
from ela_repro.figures import save_figure
from ela_repro.runs import DEPTHS, Store, experiment_specs, make_spec
from ela_repro.stats import contrast, difference, pooled_sd
from ela_repro.tables import group_runs
from ela_repro.tradeoffs import accuracy_vs_parameters, crowded, depth_gains, gains, line_weights, parameters_caption, parameters_table

NAME = "accuracy_vs_parameters"
GAIN, THERE = "gain over the plain ResNet at equal parameters, points [95% interval]", "plain ResNet with as many parameters, %"
sample = st.lists(st.floats(-100, 100, allow_nan=False).map(lambda v: round(v, 6)), min_size=2, max_size=8)


def made(method, depth, accuracies, count, **fields):
    "One record a seed, with these accuracies in percent and so many parameters."
    specs = [make_spec("reduced", method, model=f"cifar_resnet{depth}", seed=s, **fields) for s in range(len(accuracies))]
    return [replace(r, final={**r.final, "test_accuracy": a/100, "parameters": count}) for r, a in zip(map(example_record, specs), accuracies)]


def plan(records): return [r.spec for r in records]


def row(table, method, depth):
    "The one row of a method and depth."
    found = table.frame[(table.frame["method"] == method) & (table.frame["network"] == f"cifar_resnet{depth}")]
    assert len(found) == 1
    return found.iloc[0]


# Plain networks with 100 k, 400 k and 1.6 M parameters: 2 steps of a factor of four, so that weights are round numbers
PLAIN = [*made("plain", 20, [59, 61], 100_000), *made("plain", 56, [63, 65], 400_000), *made("plain", 110, [69, 71], 1_600_000)]


# The contrast

@given(sample, sample)
def test_a_difference_is_the_contrast_of_one_and_minus_one(a, b):
    spread = pooled_sd([a, b])
    assert contrast([a, b], [1, -1], *spread) == difference(a, b, *spread)
    assert difference(a, b, *spread).estimate == pytest.approx(np.mean(a) - np.mean(b), abs=1e-9)


@given(sample, sample, sample, st.floats(-1, 2))
def test_the_contrast_is_that_of_least_squares(a, b, c, share):
    "In the linear model with one mean a group, the error of w'm comes from the inverse of X'X and the residual variance."
    groups, w = [a, b, c], np.array([1, share - 1, -share])
    y = np.concatenate(groups)
    X = np.repeat(np.eye(3), [len(g) for g in groups], axis=0)
    means = np.linalg.lstsq(X, y, rcond=None)[0]
    dof = len(y) - 3
    variance = ((y - X@means)**2).sum()/dof
    assume(variance > 1e-8)
    error = math.sqrt(variance*(w@np.linalg.inv(X.T@X)@w))
    found = contrast(groups, w, *pooled_sd(groups))
    assert found.estimate == pytest.approx(w@means, abs=1e-9)
    assert (found.low, found.high) == pytest.approx(scipy_stats.t.interval(0.95, dof, loc=w@means, scale=error), rel=1e-6, abs=1e-6)
    assert found.p == pytest.approx(2*scipy_stats.t.sf(abs(w@means)/error, dof), rel=1e-6, abs=1e-9)


def test_contrast_by_hand():
    "Means 62, 60, 64; spread sqrt 2 with 3 degrees of freedom; error sqrt(2 (1/2 + 0.25/2 + 0.25/2)) = sqrt 1.5; t = 3.18245."
    found = contrast([[61, 63], [59, 61], [63, 65]], [1, -0.5, -0.5], math.sqrt(2), 3)
    assert found.estimate == pytest.approx(0)
    assert found.high == pytest.approx(3.182446*math.sqrt(1.5), abs=1e-5)


def test_contrast_needs_a_weight_a_group_and_values():
    with pytest.raises(ValueError): contrast([[1, 2], [3, 4]], [1.0], 1.0, 2)
    with pytest.raises(ElaError, match="no values"): contrast([[1, 2], []], [1, -1], 1.0, 1)
    assert contrast([[1], [2], [3]], [1, -1, -1], None, 0).low == -math.inf


# The plain line

@given(st.lists(st.integers(1_000, 10**8), min_size=2, max_size=5, unique=True).map(sorted), st.integers(1_000, 10**8))
def test_the_line_is_straight_in_the_logarithm(plain, count):
    weights = line_weights(count, plain)
    assert sum(weights) == pytest.approx(1) and sum(w != 0 for w in weights) <= 2
    assert sum(w*math.log(p) for w, p in zip(weights, plain)) == pytest.approx(math.log(count), abs=1e-6)  # the line reproduces what is straight


def test_every_plain_network_lies_on_its_line():
    plain = [243_508, 614_452, 1_170_868]
    for k, p in enumerate(plain): assert line_weights(p, plain) == pytest.approx([float(i == k) for i in range(3)])


@pytest.mark.parametrize("count, weights, there", [
    (200_000, (0.5, 0.5, 0), 62),        # half way from 60 to 64
    (100_000, (1, 0, 0), 60),
    (400_000, (0, 1, 0), 64),
    (3_200_000, (0, -0.5, 1.5), 73),     # half a step beyond: 70 + (70 - 64)/2
    (50_000, (1.5, -0.5, 0), 58)])       # half a step before: 60 - (64 - 60)/2
def test_gains_by_hand(count, weights, there):
    "Every group has two seeds and spread sqrt 2, so dof = 4 and the error is sqrt(2 (1 + w'w)/2)."
    records = PLAIN + made("ela", 56, [66, 68], count)
    (group, found), = depth_gains(records, plan(records))
    assert found.estimate == pytest.approx(67 - there)
    half = scipy_stats.t.ppf(0.975, 4)*math.sqrt(2*(1/2 + sum(w*w for w in weights)/2))
    assert (found.low, found.high) == pytest.approx((67 - there - half, 67 - there + half))
    shown = row(parameters_table(records, plan(records), "reduced"), "ELA", 56)
    assert shown[THERE] == f"{there:.1f}" and shown["parameters"] == count
    assert shown["remark"] == {3_200_000: "plain line continued beyond cifar_resnet110", 50_000: "plain line continued beyond cifar_resnet20"}.get(count)


def test_the_spread_is_pooled_over_methods_and_depths_of_the_data_set():
    ours = made("ela", 56, [66, 68], 200_000)
    alone, noisy = PLAIN + ours, PLAIN + ours + made("se", 110, [40, 80], 1_700_000)
    elsewhere = PLAIN + ours + made("se", 110, [10, 90], 1_700_000, dataset="cifar10")
    width = lambda records: (lambda i: i.high - i.low)(depth_gains(records, plan(records))[0][1])
    assert width(noisy) > 3*width(alone)
    assert width(elsewhere) == width(alone)


def test_data_sets_have_their_own_lines():
    records = PLAIN + made("ela", 56, [66, 68], 200_000) + made("ela", 56, [90, 92], 200_000, dataset="cifar10")
    assert [(g.key.dataset, i is None) for g, i in depth_gains(records, plan(records))] == [("cifar100", False), ("cifar10", True)]


def test_only_ela_under_stable_is_judged():
    records = PLAIN + [r for recipe in ("released", "stable") for m in ("mrla_b", "ela", "matched_random") for r in made(m, 56, [66, 68], 200_000, recipe=recipe)]
    (group, found), = depth_gains(records, plan(records))
    assert (group.key.method, group.recipe) == ("ela", "stable") and found
    assert all((i is None) == (g.key.method == "plain") for g, i in gains(records, plan(records)))


# Missing, diverged, single

def test_one_plain_depth_draws_no_line():
    records = PLAIN[:2] + made("ela", 56, [66, 68], 200_000)
    assert [i for _, i in depth_gains(records, plan(records))] == [None]
    shown = row(parameters_table(records, plan(records), "reduced"), "ELA", 56)
    assert shown[GAIN] is None and shown[THERE] is None and "fewer than two depths" in shown["remark"]
    assert row(parameters_table(records, plan(records), "reduced"), "ResNet", 20)["remark"] is None


def test_a_missing_plain_depth_is_bridged():
    "Without ResNet-56 the line runs from 100 k to 1.6 M: 200 k is a quarter of the way, 60 + (70 - 60)/4."
    records = PLAIN[:2] + PLAIN[4:] + made("ela", 56, [66, 68], 200_000)
    (_, found), = depth_gains(records, plan(PLAIN + records))
    assert found.estimate == pytest.approx(67 - 62.5)


def test_a_row_tells_of_missing_seeds_and_of_the_missing_line():
    ours = made("ela", 56, [66, 68], 200_000)
    shown = row(parameters_table(ours[:1], plan(PLAIN + ours), "reduced"), "ELA", 56)
    assert "no record of seed 1 yet" in shown["remark"] and "fewer than two depths" in shown["remark"]


def test_diverged_runs_are_told_and_not_averaged():
    ours = made("ela", 56, [66, 68, 67], 200_000)
    ours[2] = example_record(ours[2].spec, "diverged")
    records = PLAIN + ours
    assert depth_gains(records, plan(records))[0][1].estimate == pytest.approx(67 - 62)
    assert "1 of 3 diverged" in row(parameters_table(records, plan(records), "reduced"), "ELA", 56)["remark"]
    gone = PLAIN + [example_record(r.spec, "diverged") for r in ours]
    shown = row(parameters_table(gone, plan(gone), "reduced"), "ELA", 56)
    assert depth_gains(gone, plan(gone))[0][1] is None and shown[GAIN] is None and shown["parameters"] is None and "3 of 3 diverged" in shown["remark"]


def test_single_seeds_have_no_interval():
    specs, records = experiment_specs(NAME, "quick"), example_records(NAME, "quick")
    found = [i for _, i in depth_gains(records, specs)]
    assert len(found) == 2 and all((i.low, i.high, i.p) == (-math.inf, math.inf, None) and math.isfinite(i.estimate) for i in found)
    assert "no interval: no repeated seeds" in parameters_table(records, specs, "quick").to_markdown()
    caption = parameters_caption(group_runs(records, specs), depth_gains(records, specs), specs)
    assert "n = 1" in caption and "standard deviation" not in caption and "at 0 with the whole 95% interval" in caption


@pytest.mark.parametrize("profile", ["quick", "reduced", "paper"])
def test_every_planned_row_is_there(profile, tmp_path):
    specs = experiment_specs(NAME, profile)
    table = parameters_table([], specs, profile, Store(profile, tmp_path))
    assert len(table.frame) == len(group_runs([], specs)) > 0
    assert all(r.startswith("not run: no record of seed 0") for r in table.frame["remark"])
    assert {(g.key.dataset, g.key.model) for g, i in depth_gains([], specs) if i is None} == {(s.dataset, s.model) for s in specs}


def test_the_table_says_what_compares_ela_with_mrla_b():
    specs = experiment_specs(NAME, "reduced", (0,))
    records = example_records(NAME, "reduced", (0,))
    table = parameters_table(records, specs, "reduced")
    assert "accuracy per parameter is plain accuracy" in table.note
    for depth in (20, 56, 110): assert row(table, "ELA", depth)["parameters"] == row(table, "MRLA-B", depth)["parameters"]


@pytest.mark.parametrize("model", DEPTHS)
def test_ela_and_mrla_b_do_have_equally_many_parameters(model):
    from ela_repro.resnet import create_model

    counts = {a: sum(p.numel() for p in create_model(model, num_classes=100, attention=a).parameters()) for a in ("none", "mrla_b", "ela")}
    assert counts["ela"] == counts["mrla_b"] > counts["none"]


# Figure and caption

def test_the_figure_repeats_to_the_byte(tmp_path):
    groups = group_runs(example_records(NAME, "reduced"), experiment_specs(NAME, "reduced"))
    for folder in "ab": save_figure(accuracy_vs_parameters(groups), NAME, tmp_path/folder, "c", "reduced", NAME)
    for suffix in ("svg", "png", "json"): assert (tmp_path/"a/figures"/f"{NAME}.{suffix}").read_bytes() == (tmp_path/"b/figures"/f"{NAME}.{suffix}").read_bytes()


@pytest.mark.parametrize("profile", ["quick", "reduced"])
@pytest.mark.filterwarnings("error")
def test_labels_do_not_overlap(profile):
    fig = accuracy_vs_parameters(group_runs(example_records(NAME, profile), experiment_specs(NAME, profile)))
    fig.draw_without_rendering()
    axis = fig.axes[0].xaxis
    low, high = axis.get_view_interval()
    shown = [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    hidden = [t.label1 for ax in fig.axes for a in (ax.xaxis, ax.yaxis) for t in a.get_major_ticks() if not min(a.get_view_interval()) <= t.get_loc() <= max(a.get_view_interval())]
    assert len(shown) >= 2 and all(t.get_text().endswith((" k", " M")) for t in shown)
    boxes = [(t.get_text(), t.get_window_extent().shrunk(0.8, 0.6)) for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    for i, (t, b) in enumerate(boxes):
        for u, c in boxes[i + 1:]: assert not b.overlaps(c), (t, u)


def drawn(records):
    "The curves of the figure: (style, x, y)."
    ax = accuracy_vs_parameters(group_runs(records, plan(records))).axes[0]
    return [(l.get_linestyle(), np.asarray(l.get_xdata(), float), np.asarray(l.get_ydata(), float)) for l in ax.lines if l.get_linestyle() in ("-", "--", ":")]


def test_the_plain_line_is_continued_as_far_as_it_is_used():
    inside, beyond = PLAIN + made("ela", 56, [66, 68], 200_000), PLAIN + made("ela", 110, [75, 77], 3_200_000)
    assert ":" not in [style for style, _, _ in drawn(inside)]
    (x, y), = [(x, y) for style, x, y in drawn(beyond) if style == ":"]
    assert x.tolist() == [1_600_000, 3_200_000] and y == pytest.approx([70, 73])
    (x, y), = [(x, y) for style, x, y in drawn(inside) if style == "--"]
    assert x.tolist() == [100_000, 400_000, 1_600_000] and y == pytest.approx([60, 64, 70])


def test_no_method_hides_another():
    "Equal parameters and equal accuracy: the points stand side by side, and a colour that comes twice is hollow once. Unequal parameters move nothing."
    same = [r for m in ("mrla_b", "mrla_l", "ela") for r in made(m, 56, [66, 68], 420_000)]
    fig = accuracy_vs_parameters(group_runs(PLAIN + same, plan(PLAIN + same)))
    fig.draw_without_rendering()
    lines = [c.lines[0] for c in fig.axes[0].containers[1:]]
    places = [line.get_transform().transform(line.get_xydata())[0, 0]*72/fig.dpi for line in lines]
    assert np.diff(places) == pytest.approx([5, 5]) and places[1] == pytest.approx(fig.axes[0].transData.transform((420_000, 60))[0]*72/fig.dpi)
    assert len({(line.get_color(), line.get_markerfacecolor()) for line in lines}) == 3
    groups = group_runs(PLAIN + same, plan(PLAIN + same))
    assert "side by side (MRLA-B, MRLA-L, ELA)" in parameters_caption(groups, [], plan(PLAIN + same))
    apart = PLAIN + made("mrla_b", 56, [66, 68], 420_000) + made("ela", 56, [66, 68], 440_000)
    assert crowded(group_runs(apart, plan(apart))) == {"plain": [], "mrla_b": ["mrla_b"], "ela": ["ela"]} and "side by side" not in parameters_caption(group_runs(apart, plan(apart)), [], plan(apart))


def test_one_seed_draws_no_bar():
    "A bar of length zero would say that seeds do not differ."
    def bars(records):
        containers = accuracy_vs_parameters(group_runs(records, plan(records))).axes[0].containers
        caps = [y for c in containers for cap in c.lines[1] for y in np.asarray(cap.get_ydata(), float)]
        return np.isfinite(caps).sum(), sum(len(s) == 2 for c in containers for s in c.lines[2][0].get_segments())

    assert bars(PLAIN) == (6, 3)
    assert bars(PLAIN[::2]) == (0, 0)


def test_without_runs_figure_and_caption_say_so():
    specs = experiment_specs(NAME, "reduced")
    groups = group_runs([], specs)
    assert "no finished run" in [t.get_text() for t in accuracy_vs_parameters(groups).axes[0].texts]
    assert "cannot be compared" in parameters_caption(groups, depth_gains([], specs), specs) and "n = 0" in parameters_caption(groups, depth_gains([], specs), specs)


def test_the_caption_counts_depths():
    "ELA lies 5 points above the line at one depth, half a point at another, and below it at the third."
    records = PLAIN + made("ela", 20, [66, 68], 200_000) + made("ela", 56, [63.5, 65.5], 400_000) + made("ela", 110, [68, 70], 1_600_000)
    caption = parameters_caption(group_runs(records, plan(records)), depth_gains(records, plan(records)), plan(records))
    sure = sum(i.low > 0 for _, i in depth_gains(records, plan(records)))
    assert sure == 1 and "At 2 of 3 depths ELA lies above the line of the plain ResNet, at 1 with the whole 95% interval" in caption
    assert "n = 2" in caption and "24 epochs" in caption
