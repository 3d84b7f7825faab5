"What each retrieval of a trained network is worth: measured by hand, and kept."
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from ela_repro import left_out as L
from ela_repro.core import CorruptFileError, ElaError, seed_everything
from ela_repro.data import ImageData
from ela_repro.engine import evaluate
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
