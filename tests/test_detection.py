"""Detectors on our backbones, their training, and how they are judged. Tiny networks at 64 pixels."""
import copy
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torchvision.models import resnet101

from ela_repro.coco import binary_mask, encoded, pasted_scenes
from ela_repro.core import ElaError
from ela_repro.detection import (DetectionSettings, DetectionTraining, coco_metrics, coco_results, detection_grid, detection_rate, evaluate_detections)
from ela_repro.detectors import DETECTORS, create_detector, frozen_parameters, load_body
from ela_repro.resnet import ATTENTIONS, create_model

METHODS = (None, "eca", "mrla_b", "mrla_l", "dla_l", "ela")
SMALL = DetectionSettings(iterations=6, batch_size=2, lr=0.1, warmup_iterations=2, precision="float32", short_side=64, long_side=107)


@pytest.fixture(scope="module")
def train(): return pasted_scenes(9, seed=1)


@pytest.fixture(scope="module")
def val(): return pasted_scenes(4, seed=1, split="val")


def make(kind="faster_rcnn", attention=None, seed=0, **kw):
    torch.manual_seed(seed)
    return create_detector(kind, attention=attention, **{"num_classes": 4, "short_side": 64, "long_side": 107, "width": 0.125, "pyramid": 16, "regions": 16, "head_width": 4 if attention in ("mrla_b", "mrla_l", "dla_l", "ela") else None} | kw)


def begun(train, val, settings=SMALL, kind="faster_rcnn", attention=None, checkpoint=None, **kw): return DetectionTraining(make(kind, attention), train, val, settings, "cpu", checkpoint, **{"say": lambda text: None} | kw)


def run(training):
    while training.advance(): pass
    return training.result


# ---- detectors

@pytest.mark.parametrize("attention", ATTENTIONS)
def test_stage_maps_are_the_features_of_forward(attention):
    torch.manual_seed(0)
    model = create_model("resnet50", 10, attention, width=0.25, drop_path=0).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, features = model.stage_maps(x), model._features(x)
        assert [m.shape[2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        assert torch.equal(maps[-1], features[:, :maps[-1].shape[1]]) and torch.equal(model(x), model.fc(features.mean((2, 3))))


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("attention", METHODS)
def test_what_must_not_learn_does_not(train, val, kind, attention):
    training = begun(train, val, replace(SMALL, iterations=3), kind, attention)
    detector, before = training.run.detector, copy.deepcopy(training.run.detector.state_dict())
    for _ in range(3): training.advance()
    after, frozen = detector.state_dict(), {f"backbone.body.{n}" for n in frozen_parameters(detector.backbone.body, 1)}
    learns = {n for n, p in detector.named_parameters() if p.requires_grad}
    assert learns.isdisjoint(frozen) and any(n.startswith("backbone.body.conv1") for n in frozen) and any(n.startswith("backbone.body.layer2") for n in learns)
    if attention in ("mrla_b", "mrla_l", "dla_l", "ela"): assert "backbone.body.layer_attention.stages.0.0.value.weight" in frozen and "backbone.body.layer_attention.stages.1.0.value.weight" in learns
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed <= learns and "backbone.fpn.inner_blocks.0.0.weight" in changed and "backbone.body.layer3.0.conv1.weight" not in frozen
    assert detector.training and not detector.backbone.body.training and not any(m.training for m in detector.backbone.body.modules())


@pytest.mark.parametrize("attention", ("eca", "rla", "dia", "dla_l", "ela"))
def test_frozen_stages_count_as_said(attention):
    body = create_model("resnet50", 10, attention, width=0.25)
    names = [n for n, _ in body.named_parameters() if not n.startswith("fc.")]
    body.fc = torch.nn.Identity()
    counts = [len(frozen_parameters(body, n)) for n in range(-1, 5)]
    assert counts == sorted(set(counts)) and counts[-1] == len(names) and counts[0] == (4 if attention == "rla" else 0)
    assert not any(n.startswith("layer2") or ".1." in n and n.split(".")[2] == "1" for n in frozen_parameters(body, 1) if n.startswith("layer_attention.stages"))


def test_skipped_retrievals_stay_skipped(train, val):
    source = create_model("resnet50", 7, "ela", width=0.125, head_width=4, skip="module")
    source.set_skip_mask([False, True, True]*5 + [False])
    detector = make("faster_rcnn", "ela", skip="module")
    load_body(detector, source.state_dict())
    training = DetectionTraining(detector, train, val, replace(SMALL, iterations=3))
    result = run(training)
    assert result["skip_mask"] == "0110110110110110" and result["status"] == "done"
    for name, value in source.state_dict().items():
        if name.startswith("layer_attention.stages.1.1."): assert torch.equal(value, detector.backbone.body.state_dict()[name])  # skipped
        if name == "layer3.0.conv1.weight": assert not torch.equal(value, detector.backbone.body.state_dict()[name])


def test_weights_of_classification(tmp_path):
    from ela_repro.engine import load_checkpoint, save_checkpoint

    source = create_model("resnet50", 10, "mrla_b", width=0.125, head_width=4)
    save_checkpoint(tmp_path/"c.pt", {"model": source.state_dict(), "epochs": []})
    detector = make(attention="mrla_b")
    load_body(detector, load_checkpoint(tmp_path/"c.pt"))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in detector.backbone.body.state_dict().items())
    for other, said in ((make(), "query.weight is unknown"), (make(attention="mrla_l"), "carry is missing"), (make(attention="ela"), "skip_mask is missing"),
                        (make(attention="mrla_b", width=0.25), r"conv1.weight has shape \(8, 3, 7, 7\), not \(16, 3, 7, 7\)"), (make(attention="mrla_b", backbone="resnet101"), "layer3.6.*missing.*more")):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ElaError, match=f"these weights are not of a resnet.*{said}"): load_body(other, source.state_dict())
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    for wrong in ({}, {"conv1.weight": 3}, {"model": {}}):
        with pytest.raises(ElaError, match="(conv1.weight|bn1.weight) (is missing|has shape)"): load_body(detector, wrong)
    with pytest.raises(ElaError, match="not list"): load_body(detector, [1])


@pytest.mark.slow
def test_torchvisions_resnet101_loads():
    theirs, detector = resnet101().eval(), create_detector("faster_rcnn", "resnet101", short_side=64, long_side=107)
    load_body(detector, theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert torch.allclose(detector.backbone.body.stage_maps(x)[-1].mean((2, 3)) @ theirs.fc.weight.T + theirs.fc.bias, theirs(x), atol=1e-4)


# ---- training

@pytest.mark.slow
def test_loss_falls(train, val):
    "A quarter-width ResNet-50 at 96 pixels, a few iterations."
    torch.manual_seed(0)
    detector = create_detector("mask_rcnn", attention="ela", num_classes=4, short_side=96, long_side=160, width=0.25, frozen_stages=-1, pyramid=32, regions=32)
    settings = DetectionSettings(iterations=12, batch_size=2, lr=0.3, warmup_iterations=3, precision="float32", short_side=96, long_side=160)
    losses = [e["loss"] for e in run(DetectionTraining(detector, train, val, settings))["epochs"]]
    assert losses[-1] < 0.9*losses[0]


def test_a_long_evaluation_is_announced(train, val, monkeypatch):
    said = []
    monkeypatch.setattr("ela_repro.detection.MANY", len(val))
    run(begun(train, val, replace(SMALL, iterations=3), say=said.append))
    assert [line for line in said if "evaluated" in line] == [f"trained; now {len(val)} images of 'val' are evaluated, which takes a while"]


def test_resumes_exactly_whatever_others_draw(train, val, tmp_path):
    settings, path = replace(SMALL, iterations=7), tmp_path/"run.pt"
    whole = begun(train, val, settings, "faster_rcnn", "ela", evaluate_train=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    while whole.advance(): assert torch.equal(torch.get_rng_state(), state)         # nobody's random numbers are taken
    assert set(whole.result["final"]) == {"val", "train"} and set(whole.result["final"]["train"]) == {"box"}
    cut = begun(train, val, settings, "faster_rcnn", "ela", path, checkpoint_every=3, evaluate_train=True)
    for n in range(4):
        torch.manual_seed(n)                                                           # others draw in between
        cut.advance()
    assert not path.with_suffix(".damaged").exists()
    said = []
    resumed = begun(train, val, settings, "faster_rcnn", "ela", path, checkpoint_every=3, evaluate_train=True, workers=1, say=said.append)
    result = run(resumed)
    assert said == ["goes on from its checkpoint: 3 iterations done"]
    assert result["times"]["resumed_at"] == [3] and resumed.settled and all(result[k] == whole.result[k] for k in ("status", "epochs", "final", "data"))
    assert all(torch.equal(a, b) for a, b in zip(resumed.run.detector.state_dict().values(), whole.run.detector.state_dict().values(), strict=True))
    again = begun(train, val, settings, "faster_rcnn", "ela", path)
    assert run(again)["epochs"] == result["epochs"] and again.run.taken == 0 and result["epochs"][-1]["steps"] == 3   # 8 images: 4 steps an epoch
    with pytest.raises(ElaError, match="seed was 0, is 1"): begun(train, val, replace(settings, seed=1), "faster_rcnn", "ela", path).advance()
    with pytest.raises(ElaError, match="attention was 'ela', is 'mrla_b'"): begun(train, val, settings, "faster_rcnn", "mrla_b", path).advance()


def test_another_seed_another_run(train, val):
    first, second = (run(begun(train, val, replace(SMALL, iterations=3, seed=s)))["epochs"] for s in (0, 1))
    assert first != second


def test_divergence_ends_a_run_and_spares_the_checkpoint(train, val, tmp_path):
    training = begun(train, val, replace(SMALL, iterations=8, warmup_iterations=0), checkpoint=tmp_path/"run.pt")
    for _ in range(4): training.advance()
    training.advance()                                                                 # epoch 1 has begun; the checkpoint is of epoch 0
    kept = (tmp_path/"run.pt").read_bytes()
    with torch.no_grad(): training.run.detector.roi_heads.box_predictor.cls_score.bias.fill_(float("nan"))
    result = run(training)
    assert result["status"] == "diverged" and result["epochs"][1]["loss"] is result["final"]["val"]["box"]["AP"] is None and (tmp_path/"run.pt").read_bytes() == kept


def test_bf16_trains(train, val):
    result = run(begun(train, val, replace(SMALL, iterations=3, precision="bf16"), "mask_rcnn", "ela"))
    assert result["status"] == "done" and all(np.isfinite(v) for e in result["epochs"] for v in e.values())


def test_schedule():
    s = DetectionSettings(warmup_iterations=0)
    rates = [detection_rate(s, n, 120) for n in range(120)]
    assert np.allclose(rates[:80], 0.02) and np.allclose(rates[80:110], 0.002) and np.allclose(rates[110:], 0.0002)
    assert detection_rate(replace(s, batch_size=2, lr=0.04), 0, 120) == pytest.approx(0.005)
    assert detection_rate(DetectionSettings(), 0, 9000) == pytest.approx(2e-5)


@pytest.mark.parametrize("wrong", (dict(epochs=0), dict(iterations=-1), dict(batch_size=0), dict(lr="fast"), dict(momentum=2), dict(weight_decay=-1), dict(warmup_iterations=1.5), dict(warmup_factor=2),
                                   dict(precision="half"), dict(short_side=1), dict(long_side=10), dict(group=1), dict(seed=-1)))
def test_settings_that_cannot_be_meant(wrong):
    with pytest.raises(ElaError, match=next(iter(wrong))): DetectionSettings(**wrong)


def test_what_does_not_fit_is_said_before_work(train, val):
    for kw, said in ((dict(settings=replace(SMALL, warmup_iterations=6)), "warmup_iterations"), (dict(settings=replace(SMALL, short_side=80)), "create it with"), (dict(settings=replace(SMALL, batch_size=9)), "8 images"),
                     (dict(checkpoint_every=0), "checkpoint_every is 0"), (dict(evaluator="coco"), "unknown evaluator"), (dict(evaluate_train=1), "True or False")):
        with pytest.raises(ElaError, match=said): begun(train, val, **kw)
    with pytest.raises(ElaError, match="num_classes=4"): DetectionTraining(make(num_classes=81), train, val, SMALL)
    with pytest.raises(ElaError, match="masks=True"): DetectionTraining(make("mask_rcnn"), train, pasted_scenes(3, masks=False), SMALL)
    for kw, said in ((dict(pyramid=0), "pyramid is 0"), (dict(regions=1), "regions is 1"), (dict(kind="yolo"), "unknown detector"), (dict(backbone="resnet18"), "did you mean"), (dict(frozen_stages=-2), "frozen_stages is -2")):
        with pytest.raises(ElaError, match=said): make(**kw)


TWO = """
import sys, torch
from torch import distributed
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_detection import *
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
torch.manual_seed(rank)   # each with other weights: rank 0's count
training = DetectionTraining(make(attention="ela", seed=rank), pasted_scenes(9, seed=1), pasted_scenes(4, seed=1, split="val"), replace(SMALL, iterations={steps}), "cpu", "{folder}/run.pt" if rank == 0 else "{folder}/other.pt")
result = run(training)
torch.save([result["epochs"], result["final"], result["times"]["resumed_at"], training.run.detector.state_dict()], "{folder}/%d.pt" % rank)
"""


@pytest.mark.slow
def test_two_processes_stay_together(tmp_path):
    for steps in (6, 6):
        code = TWO.format(tests=str(Path(__file__).parent), store=tmp_path/"store", folder=tmp_path, steps=steps)
        (tmp_path/"store").unlink(missing_ok=True)
        children = [subprocess.Popen([sys.executable, "-c", code, str(r)], env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}) for r in (0, 1)]
        assert [c.wait(120) for c in children] == [0, 0]
        (a, b) = (torch.load(tmp_path/f"{r}.pt", weights_only=True) for r in (0, 1))
        assert a[0] == b[0] and a[1] == b[1] and all(torch.equal(v, b[3][k]) for k, v in a[3].items())
        assert not (tmp_path/"other.pt").exists()
    assert a[2] == b[2] == [6]              # the second time all was done: rank 0 read it, rank 1 was told


# ---- metrics

def perfect(data):
    sizes = {i["id"]: (i["width"], i["height"]) for i in data.images}
    return [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0, "segmentation": encoded(a["segmentation"], *sizes[a["image_id"]])}
            for found in data.annotations.values() for a in found if not a["iscrowd"]]


def noisy(data, seed):
    draw, found = np.random.RandomState(seed), []
    sizes = {i["id"]: (i["width"], i["height"]) for i in data.images}
    for r in perfect(data)*3:
        dx, dy = draw.randint(-4, 5, 2).tolist()
        pixels = np.roll(binary_mask(r["segmentation"], *sizes[r["image_id"]]), (dy, dx), (0, 1))
        found.append({**r, "bbox": [r["bbox"][0] + dx, r["bbox"][1] + dy, *r["bbox"][2:]], "score": round(float(draw.rand()), 1), "segmentation": rle.encode(np.asfortranarray(pixels)),   # many scores are equal
                      "category_id": r["category_id"] if draw.rand() < 0.7 else int(draw.choice(data.category_ids))})
    return [r for r in found if draw.rand() < 0.8]


@pytest.mark.parametrize("kind", ("box", "mask"))
def test_perfect_and_empty(val, kind):
    whole, nothing = (coco_metrics(val.ground_truth(), r, kind) for r in (perfect(val), []))
    assert whole["AP"] == whole["AP50"] == 1.0 and nothing["AP"] == nothing["AP50"] == 0.0 and whole["APL"] is nothing["APL"] is None
    assert coco_metrics({**val.ground_truth(), "annotations": []}, perfect(val), kind)["AP"] is None


def test_detections_in_a_crowd_are_no_mistakes():
    data = pasted_scenes(6, seed=1)
    crowd = next(a for found in data.annotations.values() for a in found if a["iscrowd"])
    x, y, w, h = crowd["bbox"]
    inside = {"image_id": crowd["image_id"], "category_id": crowd["category_id"], "bbox": [x + 2, y + 2, 10, 10], "score": 1.0}
    assert coco_metrics(data.ground_truth(), [*perfect(data), inside])["AP"] == 1.0
    assert coco_metrics(data.ground_truth(), [{**inside, "bbox": [0, 90, 5, 5]}, *perfect(data)])["AP"] < 1.0


@pytest.mark.parametrize("kind", ("box", "mask"))
@pytest.mark.parametrize("seed", range(3))
def test_both_evaluators_agree(kind, seed):
    pytest.importorskip("faster_coco_eval")
    data = pasted_scenes(12, seed=seed)
    ours, theirs = (coco_metrics(data.ground_truth(), noisy(data, seed), kind, e) for e in ("pycocotools", "faster_coco_eval"))
    assert ours == theirs and 0 < ours["AP"] < 1


def test_an_evaluator_that_is_not_there(val, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core.coco", None)
    with pytest.raises(ElaError, match="pip install faster-coco-eval"): coco_metrics(val.ground_truth(), [], "box", "faster_coco_eval")


def test_a_detector_that_knows_the_answer(val):
    "Boxes, labels and masks go through the whole evaluation and come back as AP 1."
    class Oracle(torch.nn.Module):
        about = {"kind": "mask_rcnn", "num_classes": 4}

        def forward(self, images):
            assert not self.training
            answers = []
            for image in images:
                t = next(val.target(i, crowds=False) for i in range(len(val)) if image.shape == val.image(i).shape and torch.equal((image*255).round().to(torch.uint8), val.image(i)))
                answers.append({"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"])), "masks": t["masks"][:, None].float()})
            return answers

    oracle = Oracle().train()
    for batch_size, workers in ((1, 0), (3, 1)):
        found = evaluate_detections(oracle, val, batch_size=batch_size, workers=workers)
        assert found["box"]["AP"] == found["mask"]["AP"] == 1.0 and oracle.training


def test_evaluation_leaves_the_detector_as_it_was(val):
    detector = make("mask_rcnn", "ela")
    detector.roi_heads.detections_per_img = 10
    before, modes = copy.deepcopy(detector.state_dict()), {n: m.training for n, m in detector.named_modules()}
    assert set(evaluate_detections(detector, val)) == {"box", "mask"}
    assert {n: m.training for n, m in detector.named_modules()} == modes and all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


def test_results_are_coco(val):
    found = {"boxes": torch.tensor([[1., 2, 11, 22]]), "labels": torch.tensor([3]), "scores": torch.tensor([0.5]), "masks": torch.zeros(1, 1, val.images[0]["height"], val.images[0]["width"])}
    found["masks"][0, 0, 2:22, 1:11] = 0.5
    result, = coco_results(val, 0, found)
    assert (result["bbox"], result["category_id"], result["image_id"], rle.area(result["segmentation"])) == ([1, 2, 10, 20], 17, 1, 200) and isinstance(result["segmentation"]["counts"], str)
    assert coco_results(val, 0, {k: v[:0] for k, v in found.items()}) == []


def test_the_grid_is_drawn(val):
    items = [val[i] for i in range(4)]                # the first has a crowd, the last is empty
    found = [{"boxes": t["boxes"] + 1, "labels": t["labels"], "scores": torch.linspace(0.2, 0.9, len(t["labels"])), "masks": t["masks"][:, None].float()} for _, t in items]
    for columns, classes in ((2, val.classes), (3, ())):
        buffer = io.BytesIO()
        fig = detection_grid([i for i, _ in items], [t for _, t in items], found, 0.5, classes, columns)
        fig.savefig(buffer, format="png")
        titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
        assert len(buffer.getvalue()) > 10_000 and len(titles) == 8 and titles[-1] == "detected: 0"
        texts = " ".join(text.get_text() for ax in fig.axes for text in ax.texts)
        assert "(crowd)" in texts and ("cat" in texts) == bool(classes) and "0.90" in texts and "0.20" not in texts
    boxes_only = [{k: v for k, v in f.items() if k != "masks"} for f in found]
    detection_grid([i for i, _ in items], [t for _, t in items], boxes_only)
    for wrong in (dict(threshold=2), dict(columns=0)):
        with pytest.raises(ElaError, match="is"): detection_grid([items[0][0]], [items[0][1]], found[:1], **wrong)
    with pytest.raises(ElaError, match="1 image, 1 target and 4 predictions"): detection_grid([items[0][0]], [items[0][1]], found)


FUSED = """
import torch
from ela_repro import kernels
from ela_repro.detectors import create_detector
assert kernels.INTERPRETED
outs = []
for form in ("fused", "list"):
    torch.manual_seed(0)
    backbone = create_detector("faster_rcnn", attention="ela", width=0.125, head_width=4, short_side=32, long_side=64, num_classes=3, form=form, pyramid=8).train().backbone
    for m in backbone.body.layer_attention.modules():
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.normal_(m.weight), torch.nn.init.normal_(m.running_mean)
    before = [b.clone() for b in backbone.body.buffers()]
    maps = backbone(torch.randn(1, 3, 33, 48))
    sum(m.sin().sum() for m in maps.values()).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.body.buffers()))
    outs.append([maps["0"].detach(), *(p.grad for p in backbone.parameters() if p.grad is not None)])
assert len(outs[0]) == len(outs[1]) and all((a - b).abs().max() < 1e-5 + 2e-3*b.abs().max() for a, b in zip(*outs))
"""


@pytest.mark.slow
def test_the_fused_kernels_keep_statistics_too():
    "The kernels of the attention branch, run by Triton's interpreter: same maps and gradients as the plain form, no running mean moves."
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    assert subprocess.run([sys.executable, "-c", FUSED], env=environment, timeout=240).returncode == 0
