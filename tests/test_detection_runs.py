"""Detectors as runs: specs, `ensure`, weights, records, tables, claims and notebooks. Tiny networks on pasted scenes."""
import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ela_repro import batch, coco, detection, precision, runs
from ela_repro.core import CorruptFileError, ElaError
from ela_repro.engine import load_checkpoint
from ela_repro.examples import example_record, save_examples
from ela_repro.precision import detection_comparisons, detection_difference_table, detection_table, losses_caption, losses_figure, published_text, reading
from ela_repro.report import build_report, judge_all, plan_of, rebuild_tables
from ela_repro.runs import DETECTORS, PROFILES, RunRecord, RunSpec, Store, backbone_spec, ensure, experiment_specs, prerequisite, reference_spec, with_references
from ela_repro.tables import accuracy_table, compare_with_ela

ROOT = Path(__file__).parent.parent
BEFORE = {"dataset": "cifar10-sample", "pixels": 64, "epochs": 1, "batch_size": 16, "train_images": 32, "lr": 0.005, "precision": "float32"}
TINY = dict(dataset="scenes", model="resnet50", width=0.125, detector="faster_rcnn", backbone=BEFORE, iterations=7, warmup_iterations=2, batch_size=2, lr=0.02, precision="float32",
            short_side=64, long_side=107, pyramid=16, regions=16)
ELA, PLAIN = RunSpec(**TINY, attention="ela", policy="fixed"), RunSpec(**TINY)  # `fixed` skips from the first epoch on


def quiet(event): pass


# ---- specs

@pytest.mark.parametrize("changes, says", [
    (dict(detector="faster-rcnn"), "did you mean 'faster_rcnn'"), (dict(detector=3), "unknown detector"), (dict(detector=""), "name a detector"), (dict(dataset="cifar10"), "no boxes.*coco, coco-subset, scenes"),
    (dict(dataset="coco2017"), "unknown dataset"), (dict(model="cifar_resnet56"), "resnet50 or resnet101"), (dict(width="match:dia"), "give a detector a number"), (dict(backbone={}), "names no data set"),
    (dict(backbone=7), "mapping"), (dict(backbone={"dataset": "imagenette", "epoch": 3}), "did you mean 'epochs'"), (dict(backbone={"dataset": "imagenette", "seed": 3}), "unknown field"),
    (dict(backbone={"dataset": "coco"}), "name a detector"), (dict(backbone={"dataset": "imagenette", "epochs": 0}), "epochs is 0"), (dict(backbone={"dataset": "imagenette", "detector": "mask_rcnn"}), "unknown field"),
    (dict(pixels=64), "pixels 64 means nothing"), (dict(holdout=5), "means nothing"), (dict(lr_schedule="cosine"), "means nothing"), (dict(accumulation=2), "means nothing"), (dict(train_images=64), "means nothing"),
    (dict(iterations=-1), "iterations is -1"), (dict(iterations=2), "leaves nothing"), (dict(short_side=8), "short_side is 8"), (dict(long_side=60), "long_side is 60"), (dict(pyramid=-1), "pyramid is -1"),
    (dict(regions=2), "regions is 2"), (dict(short_side=True), "short_side is True"), (dict(iterations=1.5), "iterations is 1.5"),
])
def test_what_makes_no_sense_is_refused_with_its_name_and_a_remedy(changes, says):
    with pytest.raises(ElaError, match=says): RunSpec(**{**TINY, **changes})


@pytest.mark.parametrize("changes", [dict(iterations=5), dict(warmup_iterations=5), dict(short_side=400), dict(long_side=400), dict(pyramid=64), dict(regions=64), dict(backbone={"dataset": "imagenette"})])
def test_a_classifier_has_nothing_of_a_detector(changes):
    with pytest.raises(ElaError, match="belongs to a detector"): RunSpec(**changes)


@pytest.mark.parametrize("one, same", [
    (dict(short_side=0, long_side=0, pyramid=0, regions=0), dict(short_side=800, long_side=1333, pyramid=256, regions=512)), (dict(epochs=3), dict(epochs=90)),
    (dict(backbone=BEFORE | {"momentum": 0.9}), {}), (dict(backbone=tuple(sorted(BEFORE.items()))), {}), (dict(backbone=BEFORE | {"lr": 5e-3}), {}),
])
def test_two_ways_to_say_the_same_detector_are_one_run(one, same): assert RunSpec(**{**TINY, **one}) == RunSpec(**{**TINY, **same})


def test_a_detectors_spec_reads_as_it_was_written():
    for name, profile in [(f"detection_{kind}", p) for kind in DETECTORS for p in PROFILES]:
        for spec in experiment_specs(name, profile):
            again = RunSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
            assert again == spec and again.id == spec.id and hash(again) == hash(spec) and DETECTORS[spec.detector] in spec.label and spec.length > 1


def test_old_runs_keep_their_identity():
    assert not {"detector", *runs.DETECTOR_FIELDS} & set(RunSpec().to_dict())
    for path in (ROOT/"results").glob("*/runs/*.json"):
        if path.name.endswith(".failed.json"): continue
        record = Store(path.parent.parent.name, ROOT/"results").read(path)
        assert record.id == path.stem and ("detections" in json.loads(path.read_text())) == bool(record.spec.detector and record.detections)


@pytest.mark.parametrize("profile", PROFILES)
def test_backbones_are_the_runs_of_imagenet_accuracy(profile):
    planned = set(experiment_specs("imagenet_accuracy", profile))
    for kind in DETECTORS:
        specs = experiment_specs(f"detection_{kind}", profile)
        assert {backbone_spec(s) for s in specs} <= planned and {s.detector for s in specs} == {kind} and all(s.dataset in runs.DETECTION_SETS for s in specs)
        assert [(s.method, s.seed, s.recipe) for s in specs] == [(backbone_spec(s).method, backbone_spec(s).seed, backbone_spec(s).recipe) for s in specs]


def test_what_a_run_needs_comes_before_it():
    chance = next(s for s in experiment_specs("detection_faster_rcnn", "paper") if s.method == "matched_random")
    ordered = with_references([chance, chance])
    assert [s.label.split(" · ")[0] for s in ordered] == ["ELA stable", "MatchedRandom stable", "Faster R-CNN"]
    assert reference_spec(chance) is None and prerequisite(chance) == ordered[1] and prerequisite(ordered[1]) == ordered[0] and prerequisite(ordered[0]) is None


# ---- training

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Two detectors and their backbones after one `ensure`: the folder, the events, the records."
    out, events = tmp_path_factory.mktemp("trained"), []
    return out, events, ensure([ELA, PLAIN], "quick", out, "cpu", jobs=2, progress=events.append)


def folder_of(trained, tmp_path):
    import shutil
    shutil.copytree(trained[0], tmp_path/"copy")
    return tmp_path/"copy", Store("quick", tmp_path/"copy")


def test_ensure_trains_the_backbone_first(trained):
    out, events, records = trained
    assert [r.spec for r in records] == [ELA, PLAIN] and {r.status for r in records} == {"done"}
    order = [(e["kind"], e["id"]) for e in events]
    for spec in (ELA, PLAIN): assert order.index(("done", backbone_spec(spec).id)) < order.index(("start", spec.id))
    ends = [e for e in events if e["kind"] == "epoch" and e["id"] == ELA.id]
    assert [(e["metrics"]["iteration"], e["epochs"], e["unit"]) for e in ends] == [(5, 7, "iteration"), (7, 7, "iteration")]
    assert not list((out/"quick").rglob("checkpoints/*.pt"))


def test_the_record_of_a_detector(trained):
    store, (ela, plain) = Store("quick", trained[0]), trained[2]
    before = store.get(backbone_spec(ELA))
    assert ela.skip_mask == before.skip_mask and "1" in ela.skip_mask and ela.stages == before.stages == [3, 4, 6, 3] and plain.stages == [] and plain.skip_mask == ""
    assert ela.provenance["backbone"]["id"] == before.id and ela.provenance["backbone"]["test_accuracy"] == before.final["test_accuracy"] and ela.provenance["data_source"] == "made of the sample"
    assert set(ela.final) == {"val", "train", "parameters", "trained_parameters"} and set(ela.final["val"]) == {"box"} and tuple(sorted(ela.final["val"]["box"])) == tuple(sorted(runs.AP_METRICS))
    assert [e["iteration"] for e in ela.epochs] == [5, 7] and all(e["loss"] == pytest.approx(sum(v for k, v in e.items() if k.startswith("loss_")), rel=1e-5) for e in ela.epochs)
    assert len(ela.detections) == 3 and 0 < max(len(d["found"]) for d in ela.detections) <= detection.SHOWN_DETECTIONS
    assert RunRecord.from_json(json.loads(store.path(ELA).read_text())) == ela and store.path(ELA).stat().st_size < 40_000
    assert store.headers()[1] == [] and {h.spec for h in store.headers()[0]} == {ELA, PLAIN, backbone_spec(ELA), backbone_spec(PLAIN)}


def test_what_has_a_record_is_not_trained_again(trained, monkeypatch):
    monkeypatch.setattr(runs, "_train_all", lambda *args: pytest.fail("it trains"))
    seen = []
    ensure([ELA], "quick", trained[0], "cpu", progress=seen.append)
    assert [(e["id"], e["kind"]) for e in seen] == [(backbone_spec(ELA).id, "cached"), (ELA.id, "cached")]


def test_force_means_the_run_that_was_named(trained, tmp_path):
    out, store = folder_of(trained, tmp_path)
    before, seen = store.path(backbone_spec(PLAIN)).read_bytes(), []
    ensure([PLAIN], "quick", out, "cpu", force=True, progress=seen.append)
    assert [(e["id"], e["kind"]) for e in seen if e["kind"] in ("cached", "start", "done")] == [(backbone_spec(PLAIN).id, "cached"), (PLAIN.id, "start"), (PLAIN.id, "done")]
    assert store.path(backbone_spec(PLAIN)).read_bytes() == before


def test_weights_are_narrow_where_that_is_enough(trained):
    store = Store("quick", trained[0])
    kept = load_checkpoint(store.weights(backbone_spec(ELA)))
    types = {k: v.dtype for k, v in kept["model"].items()}
    assert types["conv1.weight"] == types["fc.weight"] == types["layer_attention.stages.0.0.value.weight"] == torch.bfloat16
    assert types["bn1.weight"] == types["bn1.running_mean"] == types["fc.bias"] == torch.float32 and types["layer_attention.skip_mask"] == torch.bool
    assert kept["id"] == backbone_spec(ELA).id and store.weights(backbone_spec(ELA)).stat().st_size < 1_100_000 and not store.weights(ELA).exists()


def test_an_interrupted_detector_ends_as_an_undisturbed_one(trained, tmp_path):
    out, store = folder_of(trained, tmp_path)
    whole = store.get(ELA)
    store.path(ELA).unlink()
    cut = runs.begin(ELA, store, "cpu", "", quiet, quiet)
    for _ in range(6): cut.advance()     # the first epoch has five steps
    assert store.checkpoint(ELA).exists()
    [again] = ensure([ELA], "quick", out, "cpu", progress=quiet)
    assert again.times["resumed_at"] == [5] and not store.checkpoint(ELA).exists()
    for part in ("epochs", "final", "detections", "skip_mask"): assert getattr(again, part) == getattr(whole, part), part


def test_a_killed_batch_goes_on_from_the_checkpoint(trained, tmp_path):
    out, store = folder_of(trained, tmp_path)
    long = replace(PLAIN, iterations=40)
    code = f"from ela_repro.runs import RunSpec, ensure\nif __name__ == '__main__': ensure([RunSpec.from_dict({long.to_dict()!r})], 'quick', {str(out)!r}, 'cpu')"
    script = tmp_path/"kill.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.time() + 90
    while not store.checkpoint(long).exists() and time.time() < deadline: time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert store.checkpoint(long).exists() and store.state(long) == "missing"
    [record] = ensure([long], "quick", out, "cpu", progress=quiet)
    assert record.times["resumed_at"][0] >= 5 and record.epochs[-1]["iteration"] == 40 == sum(e["steps"] for e in record.epochs)


def test_lost_weights_are_trained_again_and_the_record_stays(trained, tmp_path):
    out, store = folder_of(trained, tmp_path)
    before, whole, events = backbone_spec(ELA), store.get(ELA), []
    kept, weights = store.path(before).read_bytes(), load_checkpoint(store.weights(before))["model"]
    store.weights(before).unlink()
    assert [s for s in runs.to_train(store, {s: store.state(s) for s in with_references([ELA])})] == []       # a detector with a record needs none
    store.path(ELA).unlink()
    records = ensure([before, ELA], "quick", out, "cpu", progress=events.append)
    said = [e["message"] for e in events if e["kind"] == "message" and e["id"] == before.id]
    assert len(said) == 1 and "not its weights" in said[0] and "the record stays" in said[0]
    assert store.path(before).read_bytes() == kept and records[1].final == whole.final
    for name, v in load_checkpoint(store.weights(before))["model"].items(): assert torch.equal(v, weights[name]), name


def test_weights_that_cannot_be_trained_again_fail_the_detector_and_nothing_else(trained, tmp_path, monkeypatch):
    out, store = folder_of(trained, tmp_path)
    before = backbone_spec(ELA)
    store.weights(before).unlink(), store.path(ELA).unlink()
    monkeypatch.setattr(runs, "_without_data", lambda specs, data: {s: "no such data" for s in specs if s == before})
    records = ensure([before, ELA, PLAIN], "quick", out, "cpu", progress=quiet, raise_failures=False)
    assert [r.spec for r in records] == [before, PLAIN] and f"weights of {before.label} ({before.id}), which failed" in store.failure(ELA)
    monkeypatch.setenv("ELA_TRAIN", "0")
    assert [r.spec for r in ensure([before, ELA], "quick", out, raise_failures=False, progress=quiet)] == [before]


def test_damaged_weights_are_named_and_not_used(trained, tmp_path):
    out, store = folder_of(trained, tmp_path)
    path = store.weights(backbone_spec(ELA))
    content = bytearray(path.read_bytes())
    content[len(content)//2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="does not match its checksum. Delete it: the run is trained again"): runs.load_weights(path, backbone_spec(ELA))
    store.weights(backbone_spec(PLAIN)).replace(path)
    with pytest.raises(CorruptFileError, match="holds weights of the run"): runs.load_weights(path, backbone_spec(ELA))
    with pytest.raises(ElaError, match="are not there"): runs.train(ELA, weights=tmp_path/"nowhere.pt")
    with pytest.raises(ElaError, match="are not there"): runs.train(ELA)


def test_no_detector_starts_from_a_run_that_diverged(tmp_path):
    store = Store("quick", tmp_path)
    store.save(example_record(backbone_spec(PLAIN), "diverged"))
    assert ensure([PLAIN], "quick", tmp_path, "cpu", progress=quiet, raise_failures=False) == [] and "whose loss stopped being a number" in store.failure(PLAIN)


def test_a_detector_that_diverges_is_recorded_as_such(trained, tmp_path):
    _, store = folder_of(trained, tmp_path)
    record = runs.train(replace(PLAIN, lr=99.0, warmup_iterations=0, iterations=11), weights=store.weights(backbone_spec(PLAIN)), say=quiet)
    assert record.status == "diverged" and record.final["val"]["box"]["AP"] is None and record.detections == []
    store.save(record)
    assert store.get(record.spec) == record and runs.in_words(record.final) == ""


def test_without_the_data_nothing_is_tried_and_nothing_noted(tmp_path, monkeypatch):
    monkeypatch.delenv("ELA_DATA", raising=False)
    specs = experiment_specs("detection_faster_rcnn", "reduced")
    store, events = Store("reduced", tmp_path), []
    for s in specs: store.save(example_record(backbone_spec(s)))
    assert ensure(specs, "reduced", tmp_path, "cpu", progress=events.append, raise_failures=False) == []
    failed = {e["id"]: e["message"] for e in events if e["kind"] == "failed"}
    assert all("no data set 'coco-subset', which is looked for in a folder coco2017_subset" in failed[s.id] for s in specs)


# ---- records that somebody else made

@pytest.mark.parametrize("part, value, wrong", [
    ("final", {}, "final"), ("final", {"val": {"box": {"AP": 2.0}}}, "final"), ("final", {"test_accuracy": 0.5}, "final"), ("epochs", [], "epochs"), ("epochs", [{"epoch": 0}], "epochs"),
    ("epochs", [{"epoch": 0, "steps": 5, "iteration": 5, "lr": 0.1, "loss": 1.0}], "epochs"), ("updates", [{"epoch": 0}], "updates"), ("rows", [[1]], "rows"), ("stages", "3", "stages"),
    ("skip_mask", "0", "skip_mask"), ("detections", [{"image_id": "1", "found": []}], "detections"), ("detections", [{"image_id": 1, "found": [{"bbox": [1, 2]}]}], "detections"), ("times", {}, "times"),
])
def test_a_record_that_no_detector_leaves_is_refused(trained, part, value, wrong):
    record = trained[2][0].to_json() | {part: value}
    with pytest.raises(CorruptFileError, match=f"wrong: .*{wrong}"): RunRecord.from_json(record)


def test_boxes_and_masks_are_both_checked(trained):
    whole = example_record(experiment_specs("detection_mask_rcnn", "quick")[0]).to_json()
    for change in (lambda f: f["val"].pop("mask"), lambda f: f["val"]["mask"].update(AP=None), lambda f: f["train"]["box"].update(AP50=1.5), lambda f: f.pop("parameters")):
        other = copy.deepcopy(whole)
        change(other["final"])
        with pytest.raises(CorruptFileError, match="wrong: final"): RunRecord.from_json(other)
    no = example_record(runs.make_spec("quick", "se")).to_json()
    with pytest.raises(CorruptFileError, match="wrong: detections"): RunRecord.from_json(no | {"detections": [{"image_id": 1, "found": []}]})


def test_a_sealed_record_of_a_detector_that_was_altered_is_refused(trained, tmp_path):
    _, store = folder_of(trained, tmp_path)
    store.path(ELA).write_text(store.path(ELA).read_text().replace('"iteration":[', '"iteration":[1'))
    assert store.state(ELA) == "corrupt" and len(store.records()[1]) == len(store.headers()[1]) == 1


# ---- tables, figures, sentences

@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("profile", PROFILES)
def test_tables_with_and_without_records(kind, profile):
    name = f"detection_{kind}"
    plan = experiment_specs(name, profile)
    for made in ([], [example_record(s) for s in plan], [example_record(s, "diverged") for s in plan[:1]]):
        tables = detection_table(made, plan, profile, None, name), detection_difference_table(made, plan, profile, name)
        for t in tables:
            assert len(t.frame) and "nan" not in (t.to_csv() + t.to_markdown() + t.to_latex()).lower()
        assert len(tables[0].frame) == len({replace(s, seed=0) for s in plan}) and ("mask AP, %" in tables[0].frame) == (kind == "mask_rcnn")
        if not made and profile != "quick": assert all(r.startswith("not run: needs the data") and f"ela-repro reproduce --profile {profile} --only {name}" in r for r in tables[0].frame["remark"])
        assert reading(made, plan, profile) and losses_figure(made, plan) and losses_caption(made, plan)


def test_published_numbers_stand_beside_coco_2017_alone():
    whole, part = (experiment_specs("detection_faster_rcnn", p) for p in ("paper", "reduced"))
    assert {s.method for s in whole if published_text(s, "box")} == {"eca"} and not any(published_text(s, "box") for s in part)
    assert {s.method for s in experiment_specs("detection_mask_rcnn", "paper") if published_text(s, "mask")} == {"eca", "plain"}
    assert all(p.source and all(20 < v < 70 for v in (*p.box, *p.mask)) for p in precision.PUBLISHED.values())
    table = detection_table([], whole, "paper")
    assert all(word in table.note for word in ("AP50", "AP75", "APS, APM, APL", "32 × 32", "96 × 96", "no object of that size"))
    assert any(c.startswith("published") for c in table.frame) and not any(c.startswith("published") for c in detection_table([], part, "reduced").frame)


def test_a_part_of_coco_is_never_called_coco():
    plan = experiment_specs("detection_faster_rcnn", "reduced")
    table = detection_table([example_record(s) for s in plan], plan, "reduced")
    assert set(table.frame["data set"]) == {"coco-subset"} and "It is not COCO 2017" in table.note and "decides nothing" in reading([], plan, "reduced")[-1]


def test_a_backbone_that_was_trained_twice_is_told(tmp_path):
    "The detector started from other weights than those of the committed run."
    plan, store = experiment_specs("detection_faster_rcnn", "reduced"), Store("reduced", tmp_path)
    made = [example_record(s) for s in plan]
    for s in plan: store.save(example_record(backbone_spec(s)))
    accuracies = [store.get(backbone_spec(s)).final["test_accuracy"] for s in plan]
    same = [replace(r, provenance={**r.provenance, "backbone": {**r.provenance["backbone"], "test_accuracy": a}}) for r, a in zip(made, accuracies)]
    assert not any(detection_table(same, plan, "reduced", store).frame["remark"])
    told = detection_table(made, plan, "reduced", store).frame["remark"].tolist()
    assert len(told) == len(plan) and all("reached 80.00%" in t and f"has {100*a:.2f}%" in t for t, a in zip(told, accuracies))
    assert not any(detection_table(made, plan, "reduced").frame["remark"]), "without a store nothing is known"


def test_tables_of_one_kind_do_not_see_the_other():
    plan, large = experiment_specs("detection_faster_rcnn", "reduced"), experiment_specs("imagenet_accuracy", "reduced")
    both = [example_record(s) for s in (*plan, *large)]
    assert accuracy_table(both, large, "reduced").cells() == accuracy_table(both[len(plan):], large, "reduced").cells()
    assert detection_table(both, plan, "reduced").cells() == detection_table(both[:len(plan)], plan, "reduced").cells()
    assert len(compare_with_ela(both, large)) == len(compare_with_ela(both[len(plan):], large)) and len(detection_comparisons(both, plan)) == 2


# ---- claims

def by_claim(records, profile): return {j.claim.id: j for j in judge_all(records, profile)}


def test_a_part_of_coco_decides_nothing():
    found = by_claim([example_record(s) for s in plan_of("reduced")], "reduced")
    told = [p.evidence for p in found["C5"].parts if p.records]
    assert found["C5"].verdict == found["C1b"].verdict == "not tested" and len(told) == 2 + 2 and all("coco-subset is not COCO 2017 and cannot decide" in t for t in told)
    assert {p.verdict for c in ("C5", "C1b") for p in found[c].parts} == {"not tested"}


def test_detection_is_judged_on_coco_2017():
    made = [example_record(s) for s in plan_of("paper") if s.detector]
    good = by_claim(made, "paper")
    bad = by_claim([replace(r, final={**r.final, "val": {k: dict.fromkeys(v, 0.01) for k, v in r.final["val"].items()}}) if r.spec.method == "ela" else r for r in made], "paper")
    assert good["C5"].verdict in ("supported", "inconclusive") and bad["C5"].verdict == "not supported" and by_claim([], "paper")["C5"].verdict == "not tested"
    assert good["C1b"].verdict == bad["C1b"].verdict == "not tested" and "not judged" in good["C1b"].parts[-1].evidence
    assert not any("MatchedRandom" in p.evidence for p in good["C5"].parts)       # a control, not a competitor
    few = by_claim([r for r in made if r.spec.detector == "faster_rcnn"], "paper")
    assert few["C5"].verdict in ("not tested", "not supported")


def test_the_report_has_tables_of_detectors(tmp_path):
    store = save_examples(tmp_path, "quick", None, ("cifar_accuracy", "imagenet_accuracy", *(f"detection_{k}" for k in DETECTORS)))
    names = {p.stem for p in rebuild_tables("quick", tmp_path)}
    assert {f"detection_{k}{end}" for k in DETECTORS for end in ("", "_differences")} <= names
    assert "Faster R-CNN" in build_report("quick", tmp_path).read_text()
    assert "</summary><ul><li>no record of any run yet, of 2 planned</li>" in build_report("reduced", tmp_path).read_text().partition("<strong>detection_mask_rcnn</strong>")[2][:300]
    store = Store("reduced", tmp_path)
    store.save(example_record(experiment_specs("detection_mask_rcnn", "reduced")[0]))
    assert "<li>no record of any seed yet: ELA (resnet50 on coco-subset)</li>" in build_report("reduced", tmp_path).read_text()


# ---- command line

def test_the_command_line_makes_specs_of_detectors():
    for profile in PROFILES:
        planned = experiment_specs("detection_faster_rcnn", profile)
        assert batch.spec_for(profile, {"detector": "faster_rcnn", "attention": "ela"}) in planned and batch.spec_for(profile, {"detector": "faster_rcnn"}) in planned
    other = batch.spec_for("quick", {"detector": "mask_rcnn", "backbone": "dataset=imagenette,epochs=40", "iterations": 9})
    assert backbone_spec(other).epochs == 40 and other.iterations == 9
    with pytest.raises(ElaError, match="fields of the backbone's run 'x' are no list"): batch.spec_for("quick", {"detector": "mask_rcnn", "backbone": "x"})
    assert all(batch.spec_options()[name].annotation.__metadata__[0].help for name in ("detector", *runs.DETECTOR_FIELDS))


def test_what_is_said_while_a_detector_trains(trained, capsys):
    for event in trained[1]: runs.print_event(event)
    said = capsys.readouterr().out
    assert f"{ELA.label}  iteration 5/7  loss " in said and f"{backbone_spec(ELA).label}  epoch 1/1  loss " in said
    assert batch.describe(trained[2][0].final).startswith("box AP ") and batch.describe(trained[2][0].epochs[0]).startswith("loss ")
    with batch.Bars(4) as bars:
        for event in trained[1]: bars(event)
    assert not bars.tasks


def test_estimates_and_facts_know_detectors(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "step_seconds", lambda spec, device: 0.001 if not spec.detector else pytest.fail("no step of a detector is timed"))
    runs_left, hours, basis = batch.estimate_hours("quick", str(tmp_path), "cpu")
    assert runs_left > 40 and hours < 1 and "without 5 detectors" in basis
    assert "made of the sample" in batch.machine_facts(str(tmp_path), "")["scenes"] and "not found" in batch.machine_facts(str(tmp_path), str(tmp_path))["coco"]


def test_a_plan_counts_what_has_lost_its_weights(trained, tmp_path, monkeypatch):
    out, store = folder_of(trained, tmp_path)
    store.weights(backbone_spec(ELA)).unlink(), store.path(ELA).unlink()
    assert runs.to_train(store, {s: store.state(s) for s in with_references([ELA, PLAIN])}) == [backbone_spec(ELA), ELA]


# ---- parts

def test_perfect_detections_have_ap_1_and_none_0():
    data = coco.pasted_scenes(5, split="val")
    sizes = {i["id"]: (i["width"], i["height"]) for i in data.images}
    perfect = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0, "segmentation": coco.encoded(a["segmentation"], *sizes[a["image_id"]])}
               for found in data.annotations.values() for a in found if not a["iscrowd"]]
    for kind in detection.KINDS:
        assert detection.coco_metrics(data.ground_truth(), perfect, kind)["AP"] == 1.0 and detection.coco_metrics(data.ground_truth(), [], kind)["AP"] == 0.0


def test_threads_prepare_the_same_batches_and_pass_errors_on():
    data = coco.pasted_scenes(9)
    plan = [[(i, i % 2 == 0)] for i in range(8)]*3
    one, many = (list(coco.prepared_batches(data, plan, (64, 107), workers)) for workers in (0, 3))
    assert all(torch.equal(a[0][0], b[0][0]) and torch.equal(a[1][0]["boxes"], b[1][0]["boxes"]) for a, b in zip(one, many, strict=True))
    with pytest.raises(IndexError): list(coco.prepared_batches(data, [[(0, False)], [(99, False)], [(1, False)]], None, 2))
    ahead = coco.prepared_batches(data, plan, None, 2)
    next(ahead)
    ahead.close()                                                            # leaves no thread behind
    assert [t for t in __import__("threading").enumerate() if "ThreadPoolExecutor" in t.name] == []


def test_kept_detections_are_drawn_on_their_own_images(trained):
    data = coco.load_detection_set("scenes", split="val", masks=False)
    images, targets, predictions = detection.as_predictions(data, trained[2][0].detections)
    assert [torch.equal(image, data.image(i)) for image, i in zip(images, detection.shown_images(data))] == [True]*3 and all((p["scores"].diff() <= 0).all() for p in predictions)
    assert len(precision.detections_figure(trained[2][0], threshold=0).axes) == 8
    with pytest.raises(ElaError, match="another set"): detection.as_predictions(coco.pasted_scenes(1), trained[2][0].detections)


def test_a_detectors_step_leaves_deterministic_mode_as_it_was():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        with detection.in_any_order(): assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(before)


# ---- notebooks

@pytest.mark.parametrize("kind", DETECTORS)
def test_the_notebooks_show_what_there_is(kind, tmp_path):
    "Made-up records under the quick profile, and none at all under reduced: every cell runs, nothing is trained."
    import papermill

    name = f"detection_{kind}"
    store = save_examples(tmp_path/"results", "quick", None, ("imagenet_accuracy", name))
    source = ROOT/"nbs"/runs.EXPERIMENTS[name].notebook
    with batch.this_python(), pytest.MonkeyPatch.context() as patch:
        for key, value in {"ELA_TRAIN": "0", "ELA_RESULTS": str(tmp_path/"results"), "PYTHONPATH": str(ROOT)}.items(): patch.setenv(key, value)
        text = {p: json.dumps(papermill.execute_notebook(source, tmp_path/f"{p}.ipynb", {"profile": p, "device": "cpu"}, kernel_name="python3", progress_bar=False, cwd=source.parent)) for p in ("quick", "reduced")}
    assert "image/png" in text["quick"] and "mean nothing" in text["quick"]
    assert "not run: needs the data" in text["reduced"] and "no picture: no run of ELA has finished" in text["reduced"] and "nothing was run" in text["reduced"]
    assert (store.folder/"tables"/f"{name}.csv").exists() and (store.folder/"figures"/f"{name}_losses.svg").exists() and not list(store.folder.rglob("checkpoints/*"))


@pytest.mark.slow
def test_two_processes_train_a_detector_together(trained, tmp_path):
    out, store = folder_of(trained, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable, "-c", "from ela_repro.batch import main; main()", "train", "--out", out, "--device", "cpu",
               "--detector", "faster_rcnn", "--iterations", "5", "--backbone", ",".join(f"{k}={v}" for k, v in BEFORE.items())]
    done = subprocess.run([*map(str, command)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    spec = batch.spec_for("quick", {"detector": "faster_rcnn", "iterations": 5, "backbone": ",".join(f"{k}={v}" for k, v in BEFORE.items())})
    assert store.get(spec).provenance["processes"] == 2 and store.get(spec).epochs[-1]["iteration"] == 5


@pytest.mark.gpu
def test_detectors_beside_classifiers_on_a_gpu(tmp_path):
    "They take turns with runs that ask for deterministic kernels and replay recorded steps; a resumed one ends nearly where an undisturbed one does."
    mask = replace(PLAIN, detector="mask_rcnn", precision="bf16")
    beside = replace(backbone_spec(ELA), seed=5)
    records = ensure([beside, ELA, PLAIN, mask], "quick", tmp_path, "cuda", jobs=4, progress=quiet)
    assert [r.status for r in records] == ["done"]*4 and records[1].skip_mask == Store("quick", tmp_path).get(backbone_spec(ELA)).skip_mask and set(records[3].final["val"]) == {"box", "mask"}
    store = Store("quick", tmp_path/"cut")
    store.weights(backbone_spec(ELA)).parent.mkdir(parents=True)
    store.weights(backbone_spec(ELA)).write_bytes(Store("quick", tmp_path).weights(backbone_spec(ELA)).read_bytes())
    cut = runs.begin(ELA, store, "cuda", "", quiet, quiet)
    for _ in range(6): cut.advance()
    again = runs.begin(ELA, store, "cuda", "", quiet, quiet)
    while again.advance(): pass
    assert again.record().times["resumed_at"] == [5] and again.record().epochs[-1]["loss"] == pytest.approx(records[1].epochs[-1]["loss"], rel=0.02)
