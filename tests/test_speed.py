"""The measurement of speed, in miniature on a CPU, and what is made of it."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ela_repro import batch, speed, speeds, timing
from ela_repro.core import CorruptFileError, ElaError, write_json
from ela_repro.examples import example_speed
from ela_repro.resnet import create_model
from ela_repro.runs import CONTESTED, METHODS, Store, experiment_specs, needed_specs
from ela_repro.speed import PARTS, SCALES, ensure_speed, read_speed, speed_path
from ela_repro.speeds import SPEED_FIGURES, SPEED_TABLES, TWO_GPUS, Measured, bottleneck, branch_maps, coco_hours, coco_said, detectors_table, loader_table, memory_said, photographs_table, targets, targets_table, two_gpus_said, two_gpus_table

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
    for make in SPEED_TABLES:
        frame = make(measured[1], "quick").frame
        assert len(frame) and not any("not run" in str(remark) for remark in frame.get("remark", ())), make.__name__
    for make, part, _ in SPEED_FIGURES.values(): assert make(measured[1]).axes
    assert not {row["what"] for row in targets_table(measured[1], "quick").frame.to_dict("records") if row["measured"] is not None} - {t.what for t in targets(["cifar_resnet20"])}


def test_logarithmic_axes_have_dots_and_no_word_lies_on_a_line():
    "The length of a bar means nothing on an axis that starts anywhere; a legend or a label on a line cannot be read."
    for make in (speeds.roofline_figure, speeds.scaling_figure):
        fig = make(example_speed())
        fig.draw_without_rendering()
        for ax in fig.axes:
            assert ax.get_xscale() == "log" and not ax.patches
            words = [t.get_window_extent() for t in (*ax.texts, *ax.get_legend().get_texts()) if t.get_text() == "copy" or t not in ax.texts]
            for line in (line for line in ax.lines if line.get_linestyle() != "None" and line.get_color() != "0.85"):
                x, y = ax.transData.transform(line.get_xydata()).T
                for box in words:
                    along = np.linspace(box.x0, box.x1, 20)
                    along = along[(along >= x.min()) & (along <= x.max())]
                    heights = np.interp(along, x, y)
                    assert not ((heights > box.y0) & (heights < box.y1)).any()


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


# ---- photographs, the loader, two GPUs

ONE_ROUND = speed.replace(MINI, photographs=speed.replace(MINI.photographs, rounds=1))


def test_records_on_photographs_have_their_shape(measured):
    steps, loader, pair = (measured[1][part]["found"] for part in ("photographs", "loader", "two_gpus"))
    sizes = {"pixels": 32, "batch_size": 4, "width": 0.125, "precision": "float32"}
    for part in (steps, loader, pair): assert {k: part[k] for k in sizes} == sizes
    assert [r["label"] for r in steps["rows"]] == [c.label for c in speed.PHOTOGRAPHED + speed.TABLED] and {METHODS[m].attention for m in CONTESTED} == {r["attention"] for r in steps["rows"]}
    assert all(len(r["seconds"]) == r["rounds"] and min(r["seconds"]) > 0 and not r["failed"] for r in steps["rows"]) and {r["rounds"] for r in steps["rows"]} == {1, 2}
    assert loader["trained"]["workers"] in [r["workers"] for r in loader["rates"]] and loader["trained"]["still"] > 0
    assert all(len(r["rates"]) == 2 and min(r["rates"]) > 0 for r in (*loader["rates"], loader["trained"]))
    assert [r["label"] for r in pair["rows"]] == ["plain", "MRLA-B"] and all(len(r["alone"]) == len(r["together"]) == 2 for r in pair["rows"])


def test_a_contender_that_does_not_fit_is_recorded_and_the_others_go_on(monkeypatch):
    build, asked = speed.photograph_run, []

    def little_memory(c, *args):
        asked.append(c.label)
        if c.form == "concat": raise torch.OutOfMemoryError("CUDA out of memory")
        return build(c, *args)
    monkeypatch.setattr(speed, "photograph_run", little_memory)
    found = speed.measure_photographs(MINI, "cpu", lambda text: None)
    failed = [r for r in found["rows"] if r["failed"]]
    assert [(r["label"], r["seconds"], r["failed"]) for r in failed] == [("MRLA-B, concatenating, eager", [], "out of memory")] and asked.count(failed[0]["label"]) == 1
    first = [1]
    row = {"network": "resnet50", "label": "a contender", "rounds": 2, "seconds": [], "peak_bytes": None, "failed": ""}
    def once(): return first.pop() if first else little_memory(speed.FORMS[2])
    speed.in_rounds("a part", [(row, once)], "cpu", lambda text: None)
    assert row["seconds"] == [] and row["failed"] == "out of memory"  # what fitted once does not count
    row = photographs_table({"photographs": {"found": found, "provenance": {"gpu": "g", "torch": "t"}}}, "reduced").frame.to_dict("records")[1]
    assert row["images/s"] is None and row["remark"] == "not run: out of memory"


def test_memory_that_ran_out_while_a_step_was_recorded_is_recognised():
    try:
        try: raise torch.OutOfMemoryError("CUDA out of memory")
        finally: raise RuntimeError("capture failed")
    except RuntimeError as e: assert speed.out_of_memory(e)
    assert all(speed.out_of_memory(RuntimeError(words)) for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")) and speed.out_of_memory(MemoryError()) and not speed.out_of_memory(RuntimeError("shapes differ"))


def test_another_error_is_none_of_memory(monkeypatch):
    def broken(*args): raise RuntimeError("shapes differ")
    monkeypatch.setattr(speed, "photograph_run", broken)
    with pytest.raises(RuntimeError, match="shapes differ"): speed.measure_photographs(ONE_ROUND, "cpu", lambda text: None)


def test_contenders_on_photographs_are_what_they_say():
    runs = {c.label: speed.photograph_run(c, "resnet50", MINI.photographs, "cpu") for c in speed.PHOTOGRAPHED}
    from ela_repro.layer_attention import FORMS
    assert {label: r.model.layer_attention.stages[0][0].combine for label, r in runs.items() if r.lengths} == {
        label: FORMS["concat" if "concat" in label else "fused"] for label in runs if label != "plain"}
    for mode in ("retrieval", "module"):
        attention = runs[f"ELA, {mode}"].model.layer_attention
        assert attention.skip == mode and attention.skip_mask.tolist() == [bool(t % 2) for n in (3, 4, 6, 3) for t in range(n)]
    assert next(iter(runs["plain"].batches.epoch(0)))[0].shape == (4, 3, 32, 32)


def test_files_are_like_photographs(tmp_path):
    from PIL import Image
    sizes = speed.Photographs(files=12)
    mean = speed.write_photographs(tmp_path/"imagenet", sizes)
    files = sorted((tmp_path/"imagenet"/"train").rglob("*.JPEG"))
    assert len(files) == 12 and 5e4 < mean < 2e5 and {Image.open(f).size for f in files} == {(500, 375), (375, 500)}
    assert len(list((tmp_path/"imagenet"/"val").iterdir())) == 10


def test_a_loader_that_fails_is_recorded():
    def fails(): raise ElaError("a loader process ended")
    assert speed._rates(fails, 1, 1, MINI.photographs, "cpu") == {"rates": [], "failed": "a loader process ended"}


def test_a_process_that_fails_says_why():
    with pytest.raises(ElaError, match="nowhere failed in a process of its own, with code 1: KeyError"): speed.elsewhere("nowhere", 1, MINI.photographs, "cpu")


def test_it_measures_where_no_process_may_be_started_by_multiprocessing(tmp_path):
    "As in a batch."
    store = Store("quick", tmp_path)
    assert timing.measure_alone(ensure_speed, dict(store=store, parts=("loader",), device="cpu", scale=ONE_ROUND), lambda text: None) == ""
    assert list(read_speed(store)) == ["loader"]


def test_one_gpu_is_not_two(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(speed, "_gpus", lambda: 1)
    assert speed._trainable(["photographs", "two_gpus"], MINI, "cuda", "", said.append) == ["photographs"] and said == ["two_gpus: not run: needs two GPUs"]
    monkeypatch.setattr(speed, "_gpus", lambda: 2)
    assert "two_gpus" in speed._trainable(["two_gpus"], MINI, "cuda", "", said.append)
    assert two_gpus_table({}, "quick").frame.to_dict("records") == [{"remark": TWO_GPUS}] and two_gpus_said({}) == TWO_GPUS
    assert [t["reached"] for t in targets_table({}, "quick").frame.to_dict("records") if "two GPUs" in t["what"]] == [TWO_GPUS]*2


def test_tables_of_photographs_by_hand():
    parts = example_speed()
    rows = photographs_table(parts, "reduced").frame.to_dict("records")
    assert (rows[0]["images/s"], rows[0]["ratio to plain"], rows[0]["images/s with the loader"], rows[0]["remark"]) == (2500, 1.0, 1870, "")
    assert rows[1]["remark"] == "not run: out of memory" and rows[2]["ratio to plain"] == pytest.approx(0.64) and rows[5]["remark"] == "timed once"
    assert [(r["workers"], r["images/s"]) for r in loader_table(parts, "reduced").frame.to_dict("records")] == [(1, 120), (4, 480), (8, 960), (16, 1920)]
    assert Measured(parts).two_gpus("MRLA-B") == pytest.approx(1.94)
    for make in (photographs_table, loader_table): assert list(make({}, "quick").frame["remark"]) == ["not run: needs an NVIDIA GPU"]


def test_the_bottleneck_is_said():
    parts = example_speed()
    assert "the loader is the bottleneck" in bottleneck(parts) and "98%" not in bottleneck(parts) and "97% of the slower" in bottleneck(parts)
    trained = parts["loader"]["found"]["trained"]
    trained |= {"still": 1000.0, "rates": [990.0]}
    assert "the step is the bottleneck, not the loader" in bottleneck(parts) and "99% of the slower" in bottleneck(parts)
    parts["loader"]["found"]["rates"][3] |= {"rates": [], "failed": "no memory"}
    assert bottleneck(parts).startswith("The loader failed with 16 processes: no memory.")
    trained |= {"rates": [], "failed": "no memory"}
    assert "Training from files failed: no memory." in bottleneck(parts)
    assert memory_said(parts) == "Not enough memory for MRLA-B, concatenating, eager (resnet50). Of what fits, MRLA-B on resnet50 takes most: 31 GB of 143."


def test_hours_of_the_imagenet_table_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "step_seconds", lambda spec, device: 0.0)
    lacking, hours, basis = batch.estimate_hours("paper", str(tmp_path), "cpu")
    assert hours == 0 and "on large images" in basis and "GPU-hours" not in basis
    parts = example_speed()
    write_json(speed_path(Store("paper", tmp_path)), {"format": 1, "parts": parts}, sealed=True)
    images = 100*(1_281_167//256)*256
    rates = {"none": 1920, "mrla_b": 1600, "ela": 1800}  # the loader gives 1920; a network with 101 layers is half as fast here
    deep = {"none": 1250, "mrla_b": 800, "ela": 900}
    attentions = [METHODS[m].attention for m in CONTESTED]
    expected = 3*sum(images/rates.get(a, 1920) + images/deep.get(a, 1000) for a in attentions)/3600
    specs = [s for s in experiment_specs("imagenet_accuracy", "paper")]
    assert len(specs) == 54 and sum(images/speed.rate_on_photographs(parts, s, 224) for s in specs)/3600 == pytest.approx(expected)
    found = batch.estimate_hours("paper", str(tmp_path), "cpu")
    assert found[:2] == (lacking, 0) and f"GPU-hours at the speed measured on made-up GPU: imagenet {expected:,.0f}" in found[2] and "on large images or further" in found[2]
    monkeypatch.setattr(batch, "gpu_name", lambda device: "made-up GPU")
    monkeypatch.setattr("ela_repro.runs.training_devices", lambda device: ["cuda:0", "cuda:1"])
    here = batch.estimate_hours("paper", str(tmp_path), "cuda")
    assert here[1] > expected/2 and "on photographs from steps measured on made-up GPU" in here[2]


def test_nothing_is_estimated_from_other_sizes():
    spec, parts = experiment_specs("imagenet_accuracy", "paper")[0], example_speed()
    assert speed.rate_on_photographs(parts, spec, 224) == 1920 and speed.rate_on_photographs({"photographs": parts["photographs"]}, spec, 224) == 2500
    for other in (speed.replace(spec, batch_size=128), speed.replace(spec, model="resnet101", attention="dia")): assert speed.rate_on_photographs(parts, other, 224) is None
    assert speed.rate_on_photographs(parts, spec, 128) is None and speed.rate_on_photographs({}, spec, 224) is None
    parts["photographs"]["found"]["rows"][0] |= {"seconds": [], "failed": "out of memory"}
    assert speed.rate_on_photographs(parts, spec, 224) is None


# ---- detectors

def test_every_kind_of_detector_is_timed_once():
    for profile, scale in (("quick", MINI), ("paper", SCALES["reduced"])):
        wanted = {(s.detector, s.model, s.attention) for s in needed_specs(speed.DETECTIONS, profile)}
        timed_ones = speed.timed_detectors(scale)
        assert len(timed_ones) == len(wanted) and {(s.detector, s.model, s.attention) for s in timed_ones} == wanted
    assert len(wanted) == 24 and [s.model for s in timed_ones] == ["resnet50"]*12 + ["resnet101"]*12 and [METHODS[s.method].label for s in timed_ones if s.attention == "ela"] == ["ELA"]*4


def test_records_of_detectors_have_their_shape(measured):
    found = measured[1]["detectors"]["found"]
    assert [(r["label"], len(r["seconds"]), r["short_side"], r["batch_size"], r["failed"]) for r in found["rows"]] == [
        (f"{kind}, {method}", 1, 64, 2, "") for kind, methods in (("Faster R-CNN", ("ResNet", "MRLA-L", "ELA")), ("Mask R-CNN", ("ResNet", "ELA"))) for method in methods]
    assert all(seconds > 0 for r in found["rows"] for seconds in r["seconds"]) and "detectors: round 1/1, resnet50, Mask R-CNN, ELA" in measured[2]
    assert list(detectors_table(measured[1], "quick").frame["hours of a run on COCO"]) == [None]*5 and coco_said(measured[1]) == ""  # of such small images follows nothing


def test_detectors_are_those_of_the_table_and_their_images_like_cocos():
    specs = [speed.replace(s, short_side=64, long_side=107, batch_size=16) for s in speed.timed_detectors(SCALES["reduced"]) if s.model == "resnet50" and s.attention in ("mrla_l", "ela")]
    for spec in specs:
        run = speed.detector_run(spec, "cpu")
        if spec.attention == "ela": assert run.detector.backbone.body.skip_mask.tolist() == [bool(t % 2) for n in (3, 4, 6, 3) for t in range(n)]
        assert run.total == 12*(118_287//16) and run.settings.precision == "bf16" and len(run.batches) == 2
        batches = list(run.batches.epoch(0))
        assert all(len(t["boxes"]) == speed.OBJECTS and ("masks" not in t or t["masks"].flatten(1).any(1).all()) for _, targets in batches for t in targets)
    # COCO's batches of 16, by the sizes of 549 of its images: 1.56 million pixels each on average, at a short side of 800
    area = sum(max(i.shape[1] for i in images)*max(i.shape[2] for i in images) for images, _ in batches)/2*(800/64)**2
    assert 1.35e6 < area < 1.75e6 and {len(images) for images, _ in batches} == {16}


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_as_many_regions_lie_on_objects_as_a_step_takes(detector):
    "With random weights they would be the objects themselves."
    from ela_repro.detection import network_input
    spec = speed.replace(next(s for s in speed.timed_detectors(SCALES["reduced"]) if s.detector == detector), short_side=640, long_side=1066, batch_size=1, regions=128, pyramid=32)
    run = speed.detector_run(spec, "cpu")
    images, targets = next(iter(run.batches.epoch(0)))
    with torch.no_grad():
        batch_, boxes = run.detector.transform(network_input(images, "cpu"), targets)
        maps = run.detector.backbone(batch_.tensors)
        heads = run.detector.roi_heads
        labels = heads.select_training_samples(run.detector.rpn(batch_, maps, boxes)[0], boxes)[2]
        assert [int((l > 0).sum()) for l in labels] == [32] and [len(l) for l in labels] == [128]
        del heads.add_gt_proposals  # torchvision's own again
        assert max(int((l > 0).sum()) for l in heads.select_training_samples(run.detector.rpn(batch_, maps, boxes)[0], boxes)[2]) < 24


def test_tables_and_hours_of_detectors_by_hand(tmp_path, monkeypatch):
    parts = example_speed()
    rows = detectors_table(parts, "reduced").frame.to_dict("records")
    steps = 12*(118_287//16)
    assert (rows[0]["images/s"], rows[0]["ratio to plain"], rows[0]["remark"]) == (31.8, 1.0, "") and rows[0]["hours of a run on COCO"] == pytest.approx(steps*0.5025/3600)
    assert rows[1]["ratio to plain"] == pytest.approx(1/1.1) and rows[12]["remark"] == "timed once" and rows[-1]["remark"] == "not run: out of memory" and rows[-1]["images/s"] is None
    # plain and six others (ELA's control is as fast as ELA), 3 seeds of each, two detectors on two networks; one row did not fit, that of ELA and its control
    def seconds(deep): return steps*0.5*(1.5 if deep else 1.005)*(1 + 6*1.1)*3*2
    expected = (seconds(False) + seconds(True) - 6*steps*0.5*1.5*1.1)/3600
    assert coco_hours(parts) == (84, 78, pytest.approx(expected)) and f"about {float(f'{expected:.2g}'):,.0f} GPU-hours, without 6 that were not measured" in coco_said(parts)
    assert coco_hours({}) == (84, 0, 0) and coco_said({}) == "" and list(detectors_table({}, "quick").frame["remark"]) == ["not run: needs an NVIDIA GPU"]
    monkeypatch.setattr(batch, "step_seconds", lambda spec, device: 0.0)
    parts["detectors"]["provenance"] = {**parts["detectors"]["provenance"], "gpu": "another"}
    write_json(speed_path(Store("paper", tmp_path)), {"format": 1, "parts": parts}, sealed=True)
    basis = batch.estimate_hours("paper", str(tmp_path), "cpu")[2]
    assert f"on another: coco {expected:,.0f}" in basis and "on made-up GPU: imagenet " in basis and "without 6 detectors" in basis
    write_json(speed_path(Store("reduced", tmp_path)), {"format": 1, "parts": {"detectors": parts.pop("detectors")}}, sealed=True)
    write_json(speed_path(Store("paper", tmp_path)), {"format": 1, "parts": parts}, sealed=True)
    assert batch.estimate_hours("paper", str(tmp_path), "cpu")[2] == basis  # each part from where it was measured
    monkeypatch.setattr("ela_repro.runs.training_devices", lambda device: ["cuda:0"])
    def hours(gpu):
        monkeypatch.setattr(batch, "gpu_name", lambda device: gpu)
        return batch.estimate_hours("paper", str(tmp_path), "cuda")
    assert hours("another")[1] - hours("a third")[1] == pytest.approx(expected) and all(f"on another: coco {expected:,.0f}" in hours("a third")[2] and "without 6 detectors" in hours(gpu)[2] for gpu in ("another", "a third"))


def test_no_detector_is_estimated_from_other_sizes():
    parts, spec = example_speed(), needed_specs(speed.DETECTIONS, "paper")[0]
    assert speed.seconds_of_detector(parts, spec) == pytest.approx(12*7392*0.5025) and speed.seconds_of_detector({}, spec) is None
    for other in (dict(short_side=400), dict(batch_size=8), dict(regions=256), dict(width=0.5)): assert speed.seconds_of_detector(parts, speed.replace(spec, **other)) is None
    assert [speed.detector_iterations(needed_specs(speed.DETECTIONS, p)[0]) for p in ("quick", "reduced", "paper")] == [8, 1500, 88_704]


def test_a_measurement_of_another_profile_serves_where_its_own_lacks(tmp_path):
    assert batch.measured_speed("paper", str(tmp_path)) == {}
    for name, gpu in (("reduced", "made-up GPU"), ("paper", "another")):
        parts = example_speed()
        parts["photographs"]["provenance"] = {**parts["photographs"]["provenance"], "gpu": gpu}
        write_json(speed_path(Store(name, tmp_path)), {"format": 1, "parts": parts}, sealed=True)
        assert batch.measured_speed("paper", str(tmp_path))["photographs"]["provenance"]["gpu"] == gpu
