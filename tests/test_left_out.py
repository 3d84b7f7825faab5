"What each retrieval of a trained network is worth: measured by hand, and kept."
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from scipy import stats as scipy_stats

from ela_repro import left_out as L
from ela_repro.core import CorruptFileError, ElaError, seed_everything
from ela_repro.data import ImageData
from ela_repro.engine import evaluate
from ela_repro.figures import STYLE
from ela_repro.resnet import create_model
from ela_repro.runs import EXPERIMENTS, PROFILES, Store, ensure, experiment_specs, make_spec, with_weights

TINY = make_spec("quick", "mrla_b", model="cifar_basic_resnet20", recipe="stable", width=0.25, train_images=64, epochs=1)


def images(n=60) -> ImageData:
    draw = torch.Generator().manual_seed(0)
    pictures = lambda n: (torch.randint(0, 256, (n, 3, 32, 32), generator=draw, dtype=torch.uint8), torch.arange(n) % 3)
    return ImageData("random", *pictures(n), *pictures(40), ("a", "b", "c"), {"kind": "none", "value": ""}, "sample")


def network():
    seed_everything(0)
    model = create_model("cifar_basic_resnet20", 3, "ela", width=0.25)
    for stage in model.layer_attention.stages:
        for layer in stage: torch.nn.init.normal_(layer.norm.weight)  # a fresh one adds nothing
    return model.eval()


def test_each_number_is_an_evaluation_under_that_mask():
    model, data = network(), images()
    found = L.measure_left_out(model, data)
    assert found["layers"] == [1, 2, 4, 5, 7, 8] and found["stages"] == [3, 3, 3] and not model.skip_mask.any()
    for t, single in zip(found["layers"], found["single"]):
        model.set_skip_mask([u == t for u in range(9)])
        assert [single["loss"], single["accuracy"]] == pytest.approx(evaluate(model, data.test_batches(50, "cpu"))[:2], rel=1e-6)
    order = sorted(found["layers"], key=lambda t: (found["evidence"]["divergence"][t], -t))
    model.set_skip_mask([t in order[:3] for t in range(9)])
    assert found["orders"]["divergence"]["loss"][3] == pytest.approx(evaluate(model, data.test_batches(50, "cpu"))[0], rel=1e-6)
    assert found["orders"]["most divergent"]["loss"][1] == found["single"][found["layers"].index(order[-1])]["loss"]
    assert len({tuple(c["loss"][-1:]) for c in found["orders"].values()}) == 1 and sum(n.startswith("chance") for n in found["orders"]) == L.CHANCES


def test_evidence_is_that_of_a_probe():
    model, data = network(), images()
    evidence, D = L.evidence_of(model, data.probe_images(60, "cpu")), model.probe(data.probe_images(60, "cpu")).divergences()
    known = [e is not None for e in evidence["divergence"]]
    assert known == list(D.eligible) and [e is not None for e in evidence["position"]] == known
    np.testing.assert_allclose([e for e in evidence["relative"] if e is not None], (D.value/(D.value + D.null))[D.eligible], rtol=1e-5)
    assert [evidence["position"][t] for t in (1, 2, 4)] == [2, 3, 2]


def test_rank_correlation_is_spearmans():
    draws = np.random.default_rng(0)
    for n in (3, 4, 9, 15):
        a, b = draws.integers(0, 4, n), draws.normal(size=n)
        if len(set(a)) > 1: assert L.rank_correlation(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic, abs=1e-12)
    assert L.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1) and L.rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_harm_in_accuracy_is_points_lost_and_need_not_follow_the_loss():
    found = made_up(TINY).found
    found = {**found, "single": [{"loss": 2.0 - n, "accuracy": 0.2 - 0.01*n} for n in range(len(found["layers"]))]}
    one = L.LeftOut(TINY, found)
    assert one.harm("accuracy") == pytest.approx([n for n in range(len(found["layers"]))]) and one.harm() == pytest.approx([-n for n in range(len(found["layers"]))])
    assert one.agreement() == pytest.approx(-1) and one.correlation("position", "accuracy") == pytest.approx(-one.correlation("position"))
    loss, accuracy = L.left_out_tables([TINY], {TINY.id: found}, "quick")[0].frame.to_dict("records")
    assert accuracy["harm, mean over layers"].mean == pytest.approx(2.5) and loss["layers without harm (0 or below), %"].mean == 100
    assert loss["ρ of harm in loss and this harm [95% interval]"] is None and accuracy["ρ of harm in loss and this harm [95% interval]"].estimate == pytest.approx(-1)


def test_measured_once_and_again_when_it_must(tmp_path, monkeypatch):
    "The weights of a run that has a record and no weights are made again; what is known is not measured again."
    store, said = Store("quick", tmp_path), []
    record, = ensure([TINY], "quick", tmp_path, "cpu", progress=lambda event: None)
    assert not store.weights(TINY).exists()
    first = L.ensure_left_out([TINY], store, "cpu", say=said.append)
    assert list(first) == [TINY.id] and store.weights(TINY).exists() and store.get(TINY) == record and said
    assert first[TINY.id]["accuracy"] == pytest.approx(record.final["test_accuracy"], abs=0.01)  # weights are kept in bf16
    monkeypatch.setattr(L, "_measured", lambda *_: pytest.fail("measured twice"))
    assert L.ensure_left_out([TINY], store, "cpu") == first
    monkeypatch.undo()
    L.left_out_path(store).write_text("{}")
    with pytest.raises(CorruptFileError): L.ensure_left_out([TINY], store, "cpu")
    again = L.ensure_left_out([TINY], store, "cpu", force=True)
    assert again[TINY.id]["single"] == first[TINY.id]["single"]


def test_a_laptop_reads_and_computes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ELA_TRAIN", "0")
    assert L.ensure_left_out([TINY], Store("quick", tmp_path), "cpu") == {} and not (tmp_path/"quick/runs").exists()


def test_networks_without_retrievals_are_refused(tmp_path):
    with pytest.raises(ElaError, match="attention 'none' has no retrievals"): L.restored(replace(TINY, attention="none"), tmp_path/"w.pt", 10)


def test_weights_are_kept_for_the_study():
    assert EXPERIMENTS["left_out"].weights and all(set(experiment_specs("left_out", p)) <= with_weights(p) for p in PROFILES)


def made_up(spec, layers=3, D=(0.30, 0.45), harm=(-0.001, 0.003)) -> L.LeftOut:
    "A network of three stages, with evidence and harm between two ends; leaving out changes no accuracy, so that all curves coincide."
    draws, total = np.random.default_rng(spec.seed), 3*layers
    eligible = [t for t in range(total) if t % layers]
    def numbers(low, high): return [float(np.exp(draws.uniform(np.log(low), np.log(high)))) if t in eligible else None for t in range(total)]
    values = numbers(*D)
    evidence = {**dict.fromkeys(L.EVIDENCE, values), "relative": [v and v/(v + 0.4) for v in values], "contribution": numbers(0.04, 0.06)}
    single = [{"loss": 2 + float(draws.uniform(*harm)), "accuracy": 0.2} for _ in eligible]
    found = {"loss": 2.0, "accuracy": 0.2, "layers": eligible, "stages": [layers]*3, "evidence": evidence, "single": single}
    return L.LeftOut(spec, {**found, "orders": {n: {"loss": [2.0]*(len(eligible) + 1), "accuracy": [0.2]*(len(eligible) + 1)} for n in L._orders(found)}})


def overlapping(fig) -> list:
    "Labels of the ticks that lie upon the next one."
    with rc_context(STYLE): FigureCanvasAgg(fig).draw()
    renderer = fig.canvas.get_renderer()
    def shown(axis): return [t.label1 for t in axis.get_major_ticks() + axis.get_minor_ticks() if t.label1.get_visible() and t.label1.get_text() and axis.get_view_interval()[0] <= t.get_loc() <= axis.get_view_interval()[1]]
    boxes = [[(l.get_text(), l.get_window_extent(renderer)) for l in shown(axis)] for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]
    return [(a, b) for line in boxes for i, (a, p) in enumerate(line) for b, q in line[i + 1:] if p.overlaps(q)]


@pytest.mark.parametrize("profile", ["quick", "reduced", "paper"])
@pytest.mark.parametrize("D, harm", [((0.30, 0.45), (-0.001, 0.003)), ((0.002, 0.03), (-0.02, 0.4)), ((1e-5, 9.0), (0.0, 2.0)), ((0.05, 0.6), (1e-5, 2e-5))])
def test_labels_do_not_crowd_and_say_what_is_drawn(profile, D, harm):
    specs = [s for s in experiment_specs("left_out", profile) if s.model == experiment_specs("left_out", profile)[-1].model]
    found = [made_up(s, 3 if profile == "quick" else 6, D, harm) for s in specs]
    fig = L.harm_figure(found)
    assert overlapping(fig) == []
    texts = {t.get_text() for t in fig.findobj(Text)}
    assert ("0.01 nats" in texts) == (L.most_harm(found) >= L.FREE) and not any("-" in t for t in texts)
    lines = [line for ax in fig.axes for line in ax.lines if line.get_marker() not in ("", "None")]
    assert sum(len(line.get_xdata()) for line in lines) == 3*len(L.HARMS)*sum(len(m.harm()) for m in found)
    for ax in fig.axes:  # every point lies inside its panel
        for x, y in (xy for line in ax.lines if line.get_marker() not in ("", "None") for xy in zip(*line.get_data())):
            assert ax.get_xlim()[0] < x < ax.get_xlim()[1] and ax.get_ylim()[0] < y < ax.get_ylim()[1]


def test_curves_that_coincide_stay_visible():
    found = [made_up(s) for s in experiment_specs("left_out", "quick")]
    fig = L.curves_figure(found)
    ax, = fig.axes
    widths, dashed = [line.get_linewidth() for line in ax.lines], [line.get_linestyle() != "-" for line in ax.lines]
    assert all(a > b or later for a, b, later in zip(widths, widths[1:], dashed[1:])) and len({to_rgba(line.get_color()) for line in ax.lines}) == len(ax.lines) == len(L.CURVE_LOOKS)
    assert overlapping(fig) == [] and not any("range" in t.get_text() for t in fig.findobj(Text))
    many = L.curves_figure([made_up(s) for s in experiment_specs("left_out", "reduced")])
    assert any("range over networks" in t.get_text() for t in many.findobj(Text))


def test_captions_count_in_words_that_agree():
    one, many = ([made_up(s) for s in experiment_specs("left_out", p)] for p in ("quick", "reduced"))
    for caption in (L.harm_caption, L.curves_caption):
        assert "1 network," in caption(one, [m.spec for m in one]).replace(".", ",") and "8 networks" in caption(many, [m.spec for m in many])
        assert not any(c.isdigit() for c in caption(many, [m.spec for m in many]).split(" -")[1:]), "a hyphen for a minus sign"
