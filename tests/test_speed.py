"""The measurement of speed, in miniature on a CPU, and what is made of it."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ela_repro import batch, speed, speeds, timing
from ela_repro.core import CorruptFileError, ElaError
from ela_repro.examples import example_speed
from ela_repro.resnet import create_model
from ela_repro.runs import Store
from ela_repro.speed import PARTS, SCALES, ensure_speed, read_speed, speed_path
from ela_repro.speeds import SPEED_FIGURES, SPEED_TABLES, Measured, branch_maps, targets, targets_table

MINI = SCALES["miniature"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    store, said = Store("quick", tmp_path_factory.mktemp("speed")), []
    return store, ensure_speed(store, device="cpu", say=said.append, scale=MINI), said


def test_every_part_runs_and_is_written(measured):
    store, found, said = measured
    assert list(found) == list(PARTS) and read_speed(store) == json.loads(json.dumps(found)) and len(said) > 20
    for part in found.values(): assert part["provenance"]["device"] == "cpu" and part["provenance"]["started"] <= part["provenance"]["finished"]


def test_every_table_and_figure_of_a_measurement_can_be_made(measured):
    for make in SPEED_TABLES: assert "—" in make(measured[1], "quick").to_markdown() or len(make(measured[1], "quick").frame)
    for make, part, _ in SPEED_FIGURES.values(): assert make(measured[1]).axes
    assert not {row["what"] for row in targets_table(measured[1], "quick").frame.to_dict("records") if row["measured"] is not None} - {t.what for t in targets(["cifar_resnet20"])}


def test_what_was_measured_is_not_measured_again_unless_forced(measured, monkeypatch):
    store, found, _ = measured
    monkeypatch.setitem(PARTS, "packed", lambda *args: pytest.fail("measured again"))
    assert ensure_speed(store, device="cpu", scale=MINI) == read_speed(store)
    monkeypatch.setitem(PARTS, "packed", lambda *args: [{"again": True}])
    assert ensure_speed(store, ["packed"], "cpu", say=lambda text: None, force=True, scale=MINI)["packed"]["found"] == [{"again": True}]
    assert read_speed(store)["clock"] == json.loads(json.dumps(found["clock"]))


def test_a_part_that_fails_loses_none_before_it(tmp_path, monkeypatch):
    store = Store("quick", tmp_path)
    monkeypatch.setitem(PARTS, "steps", lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): ensure_speed(store, ["start", "steps"], "cpu", say=lambda text: None, scale=MINI)
    assert list(read_speed(store)) == ["start"]


def test_without_its_data_a_part_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.delenv("ELA_DATA", raising=False)
    said = []
    found = ensure_speed(Store("quick", tmp_path), ["packed", "clock"], "cpu", say=said.append, scale=speed.replace(MINI, dataset="cifar100"))
    assert list(found) == ["packed"] and any(s.startswith("clock: not run: ") for s in said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_is_refused_in_words(tmp_path):
    with pytest.raises(ElaError, match="NVIDIA GPU"): ensure_speed(Store("quick", tmp_path))
    with pytest.raises(ElaError, match="did you mean 'steps'"): ensure_speed(Store("quick", tmp_path), ["stpes"], "cpu", scale=MINI)
    [outcome] = batch.measure_speed(batch.Plan("quick", ("speed",), (), tmp_path))
    assert (outcome.name, outcome.status) == ("speed", "skipped") and "GPU" in outcome.message and batch.measure_speed(batch.Plan("quick", (), (), tmp_path)) == []


def test_a_damaged_measurement_is_refused_and_measured_anew(tmp_path, monkeypatch, capsys):
    store, asked = Store("quick", tmp_path), []
    speed_path(store).parent.mkdir(parents=True)
    speed_path(store).write_text("{")
    with pytest.raises(CorruptFileError, match="speed.json"): read_speed(store)
    monkeypatch.setattr(timing, "measure_alone", lambda work, arguments, say: asked.append((work, arguments["force"])) or "")
    monkeypatch.setattr(batch, "resolve_device", lambda device: "cuda")
    monkeypatch.setattr(batch, "nvidia_driver", lambda: True)
    assert [o.status for o in batch.measure_speed(batch.Plan("quick", ("speed",), (), tmp_path))] == ["done"]
    assert asked == [(ensure_speed, True)] and "speed.json" in capsys.readouterr().err


def test_the_literal_form_of_dla_is_the_collapsed_one():
    torch.manual_seed(0)
    model, x = create_model("cifar_resnet20", 10, "dla_b", width=0.25, drop_path=0.0).double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = []
    for change in (lambda attention: None, speed.literal_dla):
        change(model.layer_attention)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert type(model.layer_attention).__name__ == "Literal"
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_every_form_retrieves_alike_and_can_be_chosen_later():
    stage = speed.RetrievalStage(4, 2, 8, 3, "cpu", 2)
    for a, b in zip(stage.plain_grad("list"), stage.plain_grad("concat")): torch.testing.assert_close(a, b)
    assert not any(t.requires_grad for t in stage.rows + stage.values)
    model = create_model("cifar_resnet20", 10, "ela", width=0.25)
    speed.use_form(model, "concat")
    from ela_repro.layer_attention import FORMS
    assert all(layer.combine is FORMS["concat"] for stage in model.layer_attention.stages for layer in stage)


def test_contenders_skip_what_they_say():
    run = speed.contender_run(speed.SKIPPING[3], "cifar_resnet20", MINI, "cpu")
    assert run.model.layer_attention.skip == "module" and run.model.skip_mask.tolist() == [False, True]*3


@settings(max_examples=60, deadline=None)
@given(mask=st.lists(st.integers(0, 1), min_size=1, max_size=12))
def test_the_bound_counts_every_map_once(mask):
    "Against a count that walks through the layers as the kernels do."
    for skip in ("retrieval", "module", "reuse"):
        moved, kept, readers = 0, [], {}
        for t, skipped in enumerate(mask):
            if skipped and skip == "module": continue
            kept.append(t)
            moved += 2 + 4                                      # the value made, and gone back through
            if not skipped:
                moved += 2*(len(kept) + 1) if len(kept) > 1 else 1  # the sum, and the gradient of its weights; alone: the statistics
                for s in kept: readers[s] = readers.get(s, 0) + 1
            if not skipped or skip == "reuse": moved += 3 + 5   # the norm and what it is added to
        moved += sum(n + 1 for n in readers.values())           # each value's gradient
        assert branch_maps(mask, skip) == moved


def test_ratios_are_taken_round_by_round():
    assert speeds.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0
    found = Measured(example_speed())
    assert found.step_ratio("cifar_resnet56", "MRLA-B", "plain", "skipping") == pytest.approx(1.6) and found.minutes(180) == pytest.approx((40 + 179*12)/60)
    assert Measured({}).networks == [] and all(t.value(Measured({})) is None for t in targets())
