"""Data in COCO format: labels, masks, transforms, what the check finds, batches. Everything on pasted scenes, in memory or written to files."""
import copy
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from ela_repro import coco
from ela_repro.coco import (COCO_CLASSES, COCO_IDS, SPLITS, CocoData, DetectionBatches, annotation_file, binary_mask, check_coco, find_coco, has_mask, image_folder, load_coco, mirrored,
                            pasted_scenes, resized, scaled_size, sift_box, validate)
from ela_repro.core import CorruptFileError, ElaError
from ela_repro.data import data_root

SUBSET = "coco2017_subset"


@pytest.fixture(scope="module")
def scenes(): return pasted_scenes(12, seed=1)


def content_of(data): return copy.deepcopy({"images": data.images, "annotations": [a for found in data.annotations.values() for a in found], "categories": data.categories})


def one_image(*annotations, width=40, height=30):
    "A set of one black image."
    whole = [{"id": n, "image_id": 7, "category_id": 5, "iscrowd": 0, **a} for n, a in enumerate(annotations)]
    return CocoData("x", "train", validate({"images": [{"id": 7, "file_name": "x", "height": height, "width": width}], "annotations": whole, "categories": [{"id": 90, "name": "b"}, {"id": 5, "name": "a"}]}, "x"),
                    pixels=[np.zeros((height, width, 3), np.uint8)])


# ---- labels, masks, boxes

def test_category_ids_with_gaps_become_labels_and_come_back(scenes):
    assert (scenes.category_ids, scenes.num_classes, scenes.classes) == ((5, 9, 17), 4, ("airplane", "ship", "cat"))
    for i, record in enumerate(scenes.images):
        given = [a["category_id"] for a in scenes.annotations[record["id"]]]
        assert [scenes.category_ids[l - 1] for l in scenes.target(i)["labels"].tolist()] == given
    data = one_image({"category_id": 90, "bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9]]})
    assert data.target(0)["labels"].tolist() == [2] and data.classes == ("a", "b")


def test_coco_itself():
    assert len(COCO_CLASSES) == len(COCO_IDS) == 80 and COCO_IDS[-1] == 90 and dict(zip(COCO_IDS, COCO_CLASSES))[18] == "dog" and all(n == n.strip() for n in COCO_CLASSES)


def test_polygons_in_several_parts_are_one_mask():
    data = one_image({"bbox": [2, 3, 30, 10], "segmentation": [[2, 3, 8, 3, 8, 13, 2, 13], [22, 3, 32, 3, 32, 8, 22, 8]], "area": 110})
    target = data.target(0)
    assert target["masks"].sum() == target["area"] == 110 and target["boxes"].tolist() == [[2, 3, 32, 13]]
    assert target["masks"][0, 3:13, 2:8].all() and target["masks"][0, 3:8, 22:32].all()


@pytest.mark.parametrize("form", ("counts", "text"))
def test_crowd_rle(form):
    mask = np.zeros((30, 40), np.uint8)
    mask[4:9, 10:35] = mask[20:25, 3:5] = 1
    packed = rle.encode(np.asfortranarray(mask))
    segmentation = {"size": [30, 40], "counts": coco._runs(mask.astype(bool))} if form == "counts" else {"size": [30, 40], "counts": packed["counts"].decode()}
    data = one_image({"bbox": [3, 4, 32, 21], "segmentation": segmentation, "iscrowd": 1, "area": 135})
    assert torch.equal(data.target(0)["masks"][0], torch.from_numpy(mask)) and data.target(0)["iscrowd"].tolist() == [1] and data.check.crowds == 1
    assert len(data.target(0, crowds=False)["labels"]) == 0 and data.trainable == []   # nothing but a crowd: no training image


def test_run_lengths_are_pycocotools():
    for seed in range(20):
        mask = np.random.RandomState(seed).rand(7, 5) < (0, 0.5, 1)[seed % 3]
        counts = coco._runs(mask)
        assert sum(counts) == mask.size and np.array_equal(binary_mask({"size": [7, 5], "counts": counts}, 5, 7), mask)


def test_mirroring_and_resizing_keep_boxes_on_their_masks(scenes):
    for i in scenes.trainable:
        image, target = scenes[i]
        flipped, changed = mirrored(image, target)
        assert torch.equal(flipped, image.flip(-1)) and torch.equal(changed["masks"], target["masks"].flip(-1))
        for box, mask in zip(changed["boxes"], changed["masks"]):
            y, x = mask.nonzero().unbind(1)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        large, grown = resized(image, target, 200, 320)
        assert large.shape[1:] == scaled_size(*image.shape[1:], 200, 320) == grown["masks"].shape[1:] and large.dtype == torch.uint8
        assert torch.allclose(grown["masks"].sum((1, 2)).float(), grown["area"], rtol=0.05)
    image, target = scenes[11]
    for made in (mirrored(image, target), resized(image, target, 64, 90)): assert made[1]["boxes"].shape == (0, 4) and made[1]["masks"].shape == (0, *made[0].shape[1:])  # the empty scene


def test_resizing_is_torchvisions(scenes):
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    image, target = scenes[1]
    theirs, _ = GeneralizedRCNNTransform(208, 350, [0]*3, [1]*3).resize(image.float())
    ours, _ = resized(image, target, 208, 350)
    assert theirs.shape == ours.shape and (theirs - ours.float()).abs().max() <= 0.501


# ---- the check

def test_damaged_annotations_are_counted():
    polygon = [[1, 1, 20, 1, 20, 20]]
    data = one_image({"bbox": [1, 1, 19, 19], "segmentation": polygon}, {"segmentation": polygon}, {"bbox": [1, 2, float("inf"), 4], "segmentation": polygon}, {"bbox": [30, 20, 20, 20], "segmentation": polygon},
                     {"bbox": [5, 5, 0.5, 9], "segmentation": polygon}, {"bbox": [45, 5, 9, 9], "segmentation": polygon}, {"bbox": [1, 1, 9, 9], "segmentation": [[1, 2]]}, {"bbox": [1, 1, 9, 9]},
                     {"bbox": [1, 1, 9, 9], "segmentation": polygon, "image_id": 99})
    c = data.check
    assert (c.images, c.annotations, c.without_box, c.clipped, c.degenerate, c.without_mask, c.orphans, c.empty, c.untrainable) == (1, 8, 2, 1, 2, 2, 1, 0, 0)
    assert data.target(0)["boxes"].tolist() == [[1, 1, 20, 20], [30, 20, 40, 30]]
    assert len(CocoData("x", "train", {"images": data.images, "annotations": data.annotations[7], "categories": data.categories}, pixels=data.pixels, masks=False).target(0)["labels"]) == 4
    assert "2 annotations without box" in str(c) and "1 annotation orphaned" in str(c) and str(c).startswith("1 image, 8 annotations (0 crowds)")
    assert len(data.ground_truth()["annotations"]) == 6 and data.ground_truth()["annotations"][1]["bbox"] == [30, 20, 20, 20]   # judged as the file has them


@pytest.mark.parametrize("box, verdict", (([0, 0, 40, 30], ""), ([-0.005, 0, 40, 30], ""), ([-1, 0, 41, 30], "clipped"), ([0, 0, 1, 30], "degenerate"), ([39.5, 0, 5, 30], "degenerate"), ({}, "without_box"), ([1, 2, 3, "x"], "without_box")))
def test_verdicts(box, verdict): assert sift_box(box, 40, 30)[1] == verdict


def test_masks_that_are_none():
    for wrong in (None, [], [[]], [[1, 2, 3, 4, 5]], ["abc"], [[1, 2, 3, 4, 5, float("nan")]], {}, {"size": [30, 40]}, {"size": [30, 40], "counts": [1]}, {"size": [40, 30], "counts": "x"}, {"size": [30, 40], "counts": [-1, 1201]}): assert not has_mask(wrong, 40, 30)


@pytest.mark.parametrize("change, said", (
    (lambda c: c.pop("images"), "no list 'images'"), (lambda c: c.update(annotations={}), "no list 'annotations'"), (lambda c: c["images"].append(c["images"][0]), "stands twice in 'images'"),
    (lambda c: c["annotations"].append(c["annotations"][3]), "stands twice in 'annotations'"), (lambda c: c["categories"].append(c["categories"][0]), "stands twice in 'categories'"),
    (lambda c: c["annotations"][2].update(category_id=12), "has category_id 12, which is none of"), (lambda c: c["annotations"][2].pop("image_id"), "no proper 'image_id'"),
    (lambda c: c["images"][2].update(width="640"), "no proper 'width'"), (lambda c: c["images"][2].update(file_name=""), "no proper 'file_name'"), (lambda c: c["images"].append(5), "no proper 'id'")))
def test_contradictions_are_errors(scenes, change, said):
    content = content_of(scenes)
    change(content)
    with pytest.raises(CorruptFileError, match=said): validate(content, "file.json")


def test_no_object_at_all():
    with pytest.raises(CorruptFileError, match="holds list"): validate([], "file.json")
    data = CocoData("x", "val", validate({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "x"), pixels=[])
    assert (len(data), data.trainable) == (0, [])


# ---- files

@pytest.fixture
def root(tmp_path):
    "A folder with both splits of a small set, in files."
    for split in SPLITS:
        data = pasted_scenes(6, seed=2, split=split)
        content = content_of(data)
        content["categories"] = [{"id": c, "name": n} for c, n in zip(COCO_IDS, COCO_CLASSES)]
        annotation_file(tmp_path/SUBSET, split).parent.mkdir(parents=True, exist_ok=True)
        image_folder(tmp_path/SUBSET, split).mkdir()
        for n, (record, pixels) in enumerate(zip(content["images"], data.pixels)):
            record["file_name"] += (".webp", ".jpg")[n % 2]
            image = Image.fromarray(pixels)
            (image.convert("L") if n == 1 else image).save(image_folder(tmp_path/SUBSET, split)/record["file_name"])   # one grey JPEG: COCO has some
        annotation_file(tmp_path/SUBSET, split).write_text(json.dumps(content))
    return tmp_path


def load(root, **kw): return load_coco(SUBSET, root, **{"cache": root/"cache"} | kw)


def test_both_layouts_and_kept_images(root):
    assert find_coco(SUBSET, root).folder == find_coco(SUBSET, root/SUBSET).folder == root/SUBSET
    data, kept = load(root), load(root, keep=True)
    assert len(data) == 6 and all(torch.equal(data.image(i), kept.image(i)) for i in range(6)) and data.image(1).shape[0] == 3
    for path in image_folder(root/SUBSET, "train").iterdir(): path.unlink()
    assert kept.image(2).shape[0] == 3
    with pytest.raises(ElaError, match="cannot read"): data.image(2)


def test_check_is_asked_once_and_anew_when_files_change(root, monkeypatch):
    before = check_coco(SUBSET, root, cache=root/"cache")
    calls, real = [], coco._decode_all
    monkeypatch.setattr(coco, "_decode_all", lambda *a: calls.append(a) or real(*a))
    assert check_coco(SUBSET, root, cache=root/"cache") == before and not calls
    victim = image_folder(root/SUBSET, "train")/"000003.webp"
    victim.write_bytes(b"nonsense")
    found = check_coco(SUBSET, root, cache=root/"cache")
    assert len(calls) == 1 and (found.images, before.images) == (5, 6) and found.unreadable[0].startswith("000003.webp: cannot be decoded")
    for path in (root/"cache").iterdir(): path.write_text("{")     # a damaged cache is no answer
    assert check_coco(SUBSET, root, cache=root/"cache") == found and len(calls) == 2
    Image.new("RGB", (50, 50)).save(victim)
    assert "50×50 pixels" in check_coco(SUBSET, root, cache=root/"cache").unreadable[0]
    with pytest.raises(CorruptFileError, match="1 of 6 images .* cannot be used, 0 may be left out: 000003.webp"): load(root, limit=0)
    victim.unlink()
    with pytest.raises(CorruptFileError, match="lacks 1 of 6 images: 000003.webp"): load(root)


def test_cache_that_cannot_be_written_does_no_harm(root):
    (root/"file").write_text("")
    assert len(load(root, cache=root/"file"/"cache")) == 6


def test_the_full_sets_name_is_for_the_full_set(root):
    with pytest.raises(CorruptFileError, match="6 images, the split 'train' of COCO 2017 has 118,287"): load_coco("coco2017", root/SUBSET, cache=root)
    content = json.loads(annotation_file(root/SUBSET, "val").read_text())
    content["categories"][3]["name"] = "moped"
    annotation_file(root/SUBSET, "val").write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="80 categories"): load(root, split="val")


def test_what_is_amiss_is_found_before_training(root, monkeypatch, capsys):
    from ela_repro.batch import check_data

    monkeypatch.setenv("ELA_RESULTS", str(root/"results"))
    assert check_data({"coco-subset"}, str(root)) == {} and capsys.readouterr().err == ""
    path = annotation_file(root/SUBSET, "train")
    content = json.loads(path.read_text())
    next((image_folder(root/SUBSET, "train")).iterdir()).write_bytes(b"no picture")
    assert check_data({"coco-subset"}, str(root)) == {} and "warning: coco-subset: train: 5 images" in (said := capsys.readouterr().err) and "1 image left out" in said
    path.write_text(json.dumps({**content, "categories": [{"id": 1000, "name": "person"}, *content["categories"][1:]]}))
    with pytest.raises(CorruptFileError, match="1: person, 1000: person are in one of the two lists only"): check_data({"coco-subset"}, str(root))
    path.write_text(json.dumps({**content, "annotations": [{k: v for k, v in a.items() if k != "bbox"} for a in content["annotations"]]}))
    with pytest.raises(ElaError, match="has no image with something to train on .*look for the boxes"): DetectionBatches(load(root, cache=root/"other"), 2, 0, 64, 107)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CorruptFileError, match="not valid JSON"): check_data({"coco-subset"}, str(root))


def test_nowhere_and_incomplete(root, monkeypatch):
    monkeypatch.delenv("ELA_DATA", raising=False)
    with pytest.raises(ElaError, match="no folder was given"): find_coco("coco2017")
    with pytest.raises(ElaError, match="looked for .*pasted_scenes"): find_coco("coco2017", root)
    with pytest.raises(ElaError, match="did you mean"): find_coco("coco", root)
    with pytest.raises(ElaError, match="unknown split"): load(root, split="test")
    monkeypatch.setenv("ELA_DATA", str(root))
    assert find_coco(SUBSET).folder == root/SUBSET
    annotation_file(root/SUBSET, "val").unlink()
    with pytest.raises(CorruptFileError, match="lacks annotations/instances_val2017.json"): find_coco(SUBSET, root)


# ---- batches

def alike(a, b): return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and all(torch.equal(s[k], t[k]) for s, t in zip(a[1], b[1], strict=True) for k in ("boxes", "labels", "masks"))


def test_batches_depend_on_seed_and_epoch_alone(scenes):
    make = lambda seed=3, **kw: DetectionBatches(scenes, 4, seed, 64, 110, **kw)
    torch.manual_seed(0), random.seed(0)
    whole, state = list(make().epoch(2)), torch.get_rng_state()
    torch.manual_seed(1), random.seed(1)
    for other in (make().epoch(2), make(workers=2).epoch(2)): assert all(map(alike, whole, other))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)            # nobody's random numbers are taken
    assert make().order(2) != make().order(3) and make().order(2) != make(seed=4).order(2)
    assert all(i.shape[1] >= 64 and min(i.shape[1:]) == 64 for images, _ in whole for i in images)


@pytest.mark.parametrize("group", (False, True))
def test_processes_share_the_batches(scenes, group):
    make = lambda **kw: DetectionBatches(scenes, 4, 0, 64, 110, group=group, **kw)
    whole, parts = make().plan(1), [make(rank=r, world=4).plan(1) for r in range(4)]
    assert [sorted(sum(share, [])) for share in zip(*parts)] == [sorted(b) for b in whole] and all(len(b) == 1 for p in parts for b in p)
    seen = [i for i, _ in sum(whole, [])]
    assert len(seen) == len(set(seen)) == 8 and 11 not in seen   # scene 11 is empty


def test_half_of_the_images_are_mirrored(scenes):
    mirrors = [flip for e in range(60) for _, flip in DetectionBatches(scenes, 4, short_side=64).order(e)]
    assert 0.4 < np.mean(mirrors) < 0.6 and not any(f for _, f in DetectionBatches(scenes, 4, short_side=64, flip=0).order(0))


@pytest.mark.parametrize("wrong, said", ((dict(batch_size=12), "11 images"), (dict(batch_size=3, world=2), "multiple of 2"), (dict(batch_size=2, rank=1), "rank is 1"), (dict(batch_size=2, flip=2), "flip is 2"),
                                         (dict(batch_size=2, short_side=8), "short_side is 8"), (dict(batch_size=2, long_side=100), "long_side is 100"), (dict(batch_size=2, workers=-1), "workers is -1")))
def test_batches_that_cannot_be(scenes, wrong, said):
    with pytest.raises(ElaError, match=said): DetectionBatches(scenes, **wrong)


def test_scenes_repeat_and_differ(scenes):
    assert pasted_scenes(12, seed=1).annotations == scenes.annotations and pasted_scenes(12, seed=2).annotations != scenes.annotations
    assert (pasted_scenes(2).check.crowds, pasted_scenes(2).check.empty, scenes.check.crowds, scenes.check.empty) == (0, 0, 1, 1)
    many = pasted_scenes(40)
    overlap = [t for t in (many.target(i) for i in many.trainable) if len(t["boxes"]) > 1 and any((min(a[2], b[2]) > max(a[0], b[0])) and (min(a[3], b[3]) > max(a[1], b[1])) for n, a in enumerate(t["boxes"]) for b in t["boxes"][:n])]
    assert overlap and all(1 <= sum(not c for c in t["iscrowd"]) <= 4 for t in overlap) and all(96 <= s <= 160 for i in many.images for s in (i["width"], i["height"]))


def test_real_annotations(tmp_path):
    "Areas and boxes of COCO agree with the masks made of its polygons, but for a few boxes that were drawn apart."
    if data_root() is None or not (data_root()/SUBSET).is_dir(): pytest.skip("set ELA_DATA to a folder with coco2017_subset")
    data, apart, total = load_coco(SUBSET, split="val", cache=tmp_path), 0, 0
    for i in range(0, len(data), 4):
        t = data.target(i)
        for box, mask, area in zip(t["boxes"], t["masks"], t["area"]):
            y, x = mask.nonzero().unbind(1)
            bounds = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            apart, total = apart + bool((bounds - box).abs().max() > 2 or (mask.sum() - area).abs() > max(40, 0.1*area)), total + 1
    assert total > 300 and apart <= 0.03*total
