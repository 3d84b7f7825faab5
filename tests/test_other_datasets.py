"""Data sets that torchvision reads: made-up copies in its layout, every way they can be incomplete, and the study that asks whether ELA carries over."""
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from ela_repro import batch, imagenet as I, report, transfer as T
from ela_repro.core import CorruptFileError, ElaError
from ela_repro.examples import example_record
from ela_repro.further import FURTHER, download_call, read_further
from ela_repro.runs import EXPERIMENTS, PROFILES, RunSpec, Store, experiment_specs, train
from ela_repro.stats import VERDICTS, all_of
from ela_repro.tables import save_table

RNG = np.random.default_rng(0)
ARRAYS, FILES = [n for n, k in FURTHER.items() if k.arrays], [n for n, k in FURTHER.items() if not k.arrays]


def picture(path, width=70, height=60):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, quality=80)


def make_svhn(folder):
    for split, n in (("train", 30), ("test", 20)):
        savemat(folder/f"{split}_32x32.mat", {"X": RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8), "y": (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]})


def make_stl10(folder):
    (folder/"stl10_binary").mkdir()
    for split, n in (("train", 20), ("test", 10)):
        RNG.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8).tofile(folder/f"stl10_binary/{split}_X.bin")
        (np.arange(n) % 10 + 1).astype(np.uint8).tofile(folder/f"stl10_binary/{split}_y.bin")
    (folder/"stl10_binary/class_names.txt").write_text("\n".join("airplane bird car cat deer dog horse monkey ship truck".split()))


def make_eurosat(folder):
    for c in range(10):
        for k in range(5 + c % 2): picture(folder/f"eurosat/2750/Land{c}/Land{c}_{k}.jpg", 64, 64)


def make_flowers102(folder):
    top = folder/"flowers-102"
    for i in range(1, 307): picture(top/f"jpg/image_{i:05d}.jpg", 24 + i % 5, 22)
    savemat(top/"imagelabels.mat", {"labels": np.array([[i % 102 + 1 for i in range(306)]])})
    savemat(top/"setid.mat", {key: np.array([list(range(first, first + 102))]) for key, first in (("trnid", 1), ("valid", 103), ("tstid", 205))})


def make_food101(folder):
    dishes = [f"dish_{k:03d}" for k in range(101)]
    for c in dishes:
        for k in range(3): picture(folder/f"food-101/images/{c}/{k}.jpg", 26, 22 + k)
    (folder/"food-101/meta").mkdir()
    for split, kept in (("train", (0, 2)), ("test", (1,))): (folder/f"food-101/meta/{split}.json").write_text(json.dumps({c: [f"{c}/{k}" for k in kept] for c in dishes}))


COUNTS = {"svhn": (30, 20), "stl10": (20, 10), "eurosat": (45, 10), "flowers102": (204, 102), "food101": (202, 101)}


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    "A made-up copy of each set, in the layout that torchvision writes."
    made = {}
    for name in FURTHER:
        made[name] = tmp_path_factory.mktemp(name)
        globals()[f"make_{name}"](made[name])
    return made


@pytest.fixture
def copy(originals, tmp_path):
    "A copy of a made-up set that may be damaged, as the data folder."
    def copied(name, at="data"): return Path(shutil.copytree(originals[name], tmp_path/at, dirs_exist_ok=True))
    return copied


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "No data folder, results of our own, nothing remembered; made-up files do not have the official md5 sums; and whoever downloads, fails."
    monkeypatch.delenv("ELA_DATA", raising=False)
    monkeypatch.setenv("ELA_RESULTS", str(tmp_path/"results"))
    for loaded in (I.load_listing, I.load_arrays): loaded.cache_clear()
    for module in ("svhn", "stl10", "flowers102"): monkeypatch.setattr(getattr(datasets, module), "check_integrity", lambda path, md5=None: True)
    for module, call in (("svhn", "download_url"), ("stl10", "download_and_extract_archive"), ("eurosat", "download_and_extract_archive"), ("flowers102", "download_url"), ("food101", "download_and_extract_archive")):
        monkeypatch.setattr(getattr(datasets, module), call, lambda *a, **k: pytest.fail("a download was started"))


# ---- what is there

@pytest.mark.parametrize("name", FURTHER)
def test_a_set_is_what_torchvision_says_it_is(name, originals):
    known, root = FURTHER[name], originals[name]
    data = I.load_data(name, root)
    assert data.num_classes == known.classes == len(set(data.classes)) and data.pixels == known.pixels and data.source.startswith("torchvision")
    arrays = name in ARRAYS
    train, test = (data.train_labels, data.test_labels) if arrays else (data.train.labels, data.test.labels)
    assert (len(train), len(test)) == COUNTS[name]
    reader = getattr(datasets, known.reader)
    if name != "eurosat":
        theirs = reader(str(root), split="test")
        assert [theirs[i][1] for i in range(len(theirs))] == test.tolist()
        for i in (0, len(theirs) - 1):
            ours = data.test_images[i] if arrays else data.test.image(i)
            assert torch.equal(ours, torch.from_numpy(np.array(theirs[i][0].convert("RGB"))).permute(2, 0, 1))
    x, y = next(iter(data.test_batches(4, "cpu").epoch()))
    assert x.shape == (4, 3, known.pixels, known.pixels) and torch.isfinite(x).all() and torch.equal(y, test[:4])
    x, y = next(iter(data.train_batches(8, "cpu", 0).epoch()))
    assert x.shape == (8, 3, known.pixels, known.pixels)
    assert I.find_data(name, root.parent) == I.find_data(name, root) if root.name == name else True


@pytest.mark.parametrize("name", FURTHER)
def test_the_digest_belongs_to_the_images_and_not_to_their_place(name, copy):
    first, second = I.load_data(name, copy(name, "one")).digest, I.load_data(name, copy(name, f"two/{name}").parent).digest  # also found in a subfolder of its name
    assert first == second and len(first["value"].split("+")) == 2


def test_a_changed_pixel_or_label_changes_the_digest(copy):
    root = copy("stl10")
    before = I.load_data("stl10", root).digest
    for file in ("train_X.bin", "test_y.bin"):
        path = root/"stl10_binary"/file
        content = bytearray(path.read_bytes())
        content[-1] = content[-1] % 10 + 1
        path.write_bytes(content)
        I.load_arrays.cache_clear()
        after = I.load_data("stl10", root).digest
        assert after != before
        before = after


def test_a_fifth_of_eurosat_is_the_test_set_balanced_and_always_the_same(originals):
    data = I.load_data("eurosat", originals["eurosat"])
    assert data.test.labels.bincount().tolist() == [1]*10 and data.train.labels.bincount().tolist() == [4, 5]*5
    names = [{part.store.name(int(i)) for i in part.index} for part in (data.train, data.test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 55
    I.load_listing.cache_clear()
    assert {p.store.name(int(i)) for p in [I.load_data("eurosat", originals["eurosat"]).test] for i in p.index} == names[1]
    assert FURTHER["eurosat"].counts == {"train": 27_000 - 5_400, "test": 27_000//5}


def test_digits_are_not_mirrored(originals):
    for name, mirrored in (("svhn", False), ("stl10", True)):
        batches = I.load_data(name, originals[name]).train_batches(10, "cpu", 0)
        assert batches.plan(0)[3].any().item() is mirrored
    held = I.load_data("svhn", originals["svhn"], holdout=10)
    assert not held.mirror and (len(held.train_labels), len(held.test_labels)) == (20, 10)
    assert I.load_data("svhn", originals["svhn"], pixels=64).train_images.shape[-1] == 64


@pytest.mark.parametrize("name, model", [("svhn", "cifar_basic_resnet20"), ("eurosat", "resnet50"), ("food101", "resnet50")])
def test_a_run_trains_on_it_and_its_record_says_on_what(name, model, originals):
    spec = RunSpec(dataset=name, model=model, attention="none", epochs=1, batch_size=8, train_images=16, lr=0.01, width=0.125 if model == "resnet50" else 0.25, pixels=0 if name == "svhn" else 32, precision="float32")
    record = train(spec, data=str(originals[name]))
    assert record.status == "done" and record.provenance["data_digest"] == I.load_data(name, originals[name], spec.pixels).digest and record.provenance["data_source"].startswith("torchvision")
    assert train(spec, data=str(originals[name])).final == record.final


# ---- what is not

@pytest.mark.parametrize("name", FURTHER)
def test_a_missing_set_is_not_downloaded_and_the_message_says_how(name, tmp_path):
    (tmp_path/"data").mkdir()
    for call in (I.find_data, I.load_data, I.check_further):
        with pytest.raises(ElaError) as e: call(name, tmp_path/"data")
        assert not isinstance(e.value, CorruptFileError) and download_call(name, tmp_path/"data") in str(e.value) and str(tmp_path/"data"/name/FURTHER[name].files[0]) in str(e.value)
    assert not list((tmp_path/"data").iterdir())
    with pytest.raises(ElaError, match="no folder was given"): I.find_data(name)
    with pytest.raises(ElaError, match="is no folder"): I.find_data(name, tmp_path/"nowhere")
    assert hasattr(datasets, FURTHER[name].reader)


@pytest.mark.parametrize("name", FURTHER)
def test_a_half_unpacked_set_is_told_from_a_missing_one(name, copy):
    for file in FURTHER[name].files:
        root = copy(name)
        if (root/file).is_dir(): shutil.rmtree(root/file)
        else: (root/file).unlink()
        with pytest.raises(CorruptFileError, match=f"half unpacked, it lacks {file}.*{FURTHER[name].reader}"): I.find_data(name, root)
    whole = copy(name, f"data/{name}")
    assert I.find_data(name, root).folder == whole.resolve()  # a whole copy beside it is preferred


@pytest.mark.parametrize("name, image", [("food101", "food-101/images/dish_004/2.jpg"), ("flowers102", "flowers-102/jpg/image_00005.jpg")])
def test_images_that_the_set_names_must_be_there(name, image, copy):
    root = copy(name)
    (root/image).unlink()
    for call in (I.check_further, I.load_data):
        with pytest.raises(CorruptFileError, match=f"half unpacked: 1 of the .* training images .* the first is .*{Path(image).name}"): call(name, root)


def test_class_folders_must_be_those_of_the_set(copy):
    root = copy("eurosat")
    shutil.move(root/"eurosat/2750/Land3", root/"moved")
    with pytest.raises(CorruptFileError, match="have 9 classes, the set has 10"): I.check_further("eurosat", root)
    shutil.move(root/"moved", root/"eurosat/2750/Land3")
    picture(root/"eurosat/2750/notes/0.jpg")
    with pytest.raises(CorruptFileError, match="have 11 classes, the set has 10"): I.check_further("eurosat", root)
    shutil.rmtree(root/"eurosat/2750/notes")
    for path in (root/"eurosat/2750/Land3").iterdir(): path.unlink()
    with pytest.raises(CorruptFileError, match="Land3"): I.check_further("eurosat", root)


def test_tables_of_contents_must_agree(copy):
    root = copy("food101")
    meta = root/"food-101/meta/test.json"
    whole = json.loads(meta.read_text())
    meta.write_text(json.dumps({("zebra" if c == "dish_007" else c): v for c, v in whole.items()}))
    with pytest.raises(CorruptFileError, match="other classes than the training images, the first is 'dish_008'"): I.load_data("food101", root)
    for content in ("{", "[]", json.dumps(dict(list(whole.items())[:50]))):
        meta.write_text(content)
        with pytest.raises(CorruptFileError, match="food101.*fetch it again"): read_further("food101", root)


def test_labels_outside_the_classes_are_refused(copy):
    root = copy("stl10")
    (root/"stl10_binary/train_y.bin").write_bytes(bytes([1, 11]*10))
    with pytest.raises(CorruptFileError, match="10 labels lie outside 0..9"): I.load_data("stl10", root)
    (root/"stl10_binary/train_y.bin").write_bytes(bytes([1]*19))
    with pytest.raises(CorruptFileError, match="20 images and 19 labels"): I.load_data("stl10", root)
    (root/"stl10_binary/train_X.bin").write_bytes(bytes(1000))
    with pytest.raises(CorruptFileError, match="missing, altered or damaged"): I.load_data("stl10", root)


@pytest.mark.parametrize("name", ["svhn", "stl10", "flowers102"])
def test_files_without_the_official_md5_are_refused(name, copy, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(CorruptFileError, match=f"cannot read '{name}' in .*corrupted.*fetch it again") as e: read_further(name, copy(name))
    assert "You can use download=True" not in str(e.value)


def test_images_that_cannot_be_read_are_named_and_left_out(copy):
    root = copy("food101")
    for k, content in enumerate((b"", b"not found", (root/"food-101/images/dish_000/0.jpg").read_bytes()[:-100])): (root/f"food-101/images/dish_{k:03d}/2.jpg").write_bytes(content)
    I.check_further("food101", root)
    data = I.load_data("food101", root)
    assert data.problems["unreadable"] == 3 and data.counts == {"train": 199, "test": 101} and any("dish_001/2.jpg" in e for e in data.problems["examples"])
    for c in range(101): (root/f"food-101/images/dish_{c:03d}/2.jpg").write_bytes(b"")
    with pytest.raises(ElaError, match="101 images of .* cannot be read, more than the 100"): I.check_further("food101", root)


# ---- before work begins

def test_the_batch_looks_at_further_sets_first(copy, tmp_path):
    (tmp_path/"empty").mkdir()
    lacking = batch.check_data(set(FURTHER), str(tmp_path/"empty"))
    assert set(lacking) == set(FURTHER) and all(download_call(n, tmp_path/"empty") in why for n, why in lacking.items())
    root = copy("eurosat")
    copy("svhn")
    assert set(batch.check_data({"svhn", "eurosat"}, str(root))) == set() and I.load_arrays.cache_info().currsize == 0
    shutil.rmtree(root/"eurosat/2750/Land3")
    with pytest.raises(CorruptFileError, match="9 classes"): batch.check_data({"svhn", "eurosat"}, str(root))


def test_sets_that_nobody_has_do_not_fail_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "check_data", lambda names, data, download: {n: f"no {n}" for n in names if n in FURTHER})
    plan = batch.make_plan("reduced", ["other_datasets"], out=str(tmp_path), device="cpu")
    assert {s.dataset for s in plan.left_out} == set(FURTHER) and {s.dataset for s in plan.specs} == {"cifar10", "imagenette", *FURTHER}
    asked = []
    assert set(plan.lacking) == set(FURTHER)
    monkeypatch.setattr("ela_repro.runs.ensure", lambda specs, *a, **k: asked.extend(specs))
    ends = batch.train_all(plan)
    assert {s.dataset for s in asked} == {"cifar10", "imagenette"} and ends["without data"] == len(plan.left_out) == 5*4*3
    assert batch.summary(plan, ends, []) == 0
    monkeypatch.setattr(batch, "check_data", lambda names, data, download: {n: f"no {n}" for n in names})
    with pytest.raises(ElaError, match="no svhn"): batch.make_plan("reduced", ["other_datasets"], out=str(tmp_path), device="cpu")


def test_doctor_says_of_each_set_whether_it_is_there(copy):
    root = copy("eurosat")
    (root/"food-101/images").mkdir(parents=True)
    facts = batch.machine_facts("", str(root))
    assert facts["eurosat"].startswith("torchvision files") and "half unpacked" in facts["food101"] and download_call("svhn") in facts["svhn"]
    assert set(FURTHER) <= set(facts)


# ---- the study

def test_nothing_is_trained_twice():
    others = {p: experiment_specs("other_datasets", p) for p in PROFILES}
    methods = set(EXPERIMENTS["other_datasets"].methods)
    assert set(others["quick"]) <= set(experiment_specs("matched_control", "quick"))
    assert {s for s in others["reduced"] if s.dataset == "imagenette"} == {s for s in experiment_specs("imagenet_accuracy", "reduced") if s.method in methods}
    assert {s for s in others["paper"] if s.dataset == "cifar10"} <= set(experiment_specs("cifar_accuracy", "paper"))
    settings = PROFILES["reduced"].settings
    for s in others["reduced"]:
        if s.dataset == "cifar10": assert s.model == "cifar_resnet56" and all(getattr(s, k) == v for k, v in settings.items())
    for p in ("reduced", "paper"): assert Counter((s.dataset, s.method) for s in others[p]) == {(d, m): 3 for d in ("cifar10", "imagenette", *FURTHER) for m in methods}


def made(datasets_=("cifar10", "imagenette"), **accuracy):
    "Records of the study on some data sets; `accuracy` of a method is the same on all, up to a spread of a tenth of a point."
    def one(s):
        r = example_record(s)
        return replace(r, final={**r.final, "test_accuracy": accuracy[s.method] + 0.001*(s.seed - 1)}) if s.method in accuracy else r
    return [one(s) for s in experiment_specs("other_datasets", "reduced") if s.dataset in datasets_]


BETTER = dict(plain=0.80, mrla_b=0.82, matched_random=0.83, ela=0.85)


def l2(records): return next(j for j in report.judge_all(records, "reduced") if j.claim.id == "L2")


def test_the_claim_is_judged_by_each_difference_on_each_set():
    j = l2(made(**BETTER))
    parts = [p for p in j.parts if p.records]
    assert len(parts) == 6 and {p.verdict for p in parts} == {"supported"} and all("exploratory" in p.evidence for p in parts)
    assert [any(what in p.evidence for p in parts) for what in ("which is not ImageNet-1K", "a data set of the paper itself")] == [True, True]
    assert [p.evidence for p in j.parts if p.verdict == "not tested" and "not run" in p.evidence] and j.verdict == "not tested" == all_of(p.verdict for p in j.parts)  # not by halves
    assert sum(n in p.evidence for p in j.parts for n in FURTHER) == len(FURTHER)
    assert l2(made(**{**BETTER, "ela": 0.82})).verdict == "not supported"  # worse than chance on both
    assert l2([]).verdict == "not tested" and not any(p.records for p in l2([]).parts)
    assert next(j for j in report.judge_all(made(), "quick") if j.claim.id == "L2").verdict == "not tested"


def test_differences_on_many_sets_are_corrected_together():
    "A difference that alone would be clear is not, among all that are asked for."
    one = lambda shift: l2([replace(r, final={**r.final, "test_accuracy": 0.80 + 0.01*(r.spec.seed - 1) + shift*(r.spec.method == "ela")}) for r in made(("cifar10",))])
    def first(shift): return next(p for p in one(shift).parts if p.records)
    found = T.transfers([replace(r, final={**r.final, "test_accuracy": 0.80 + 0.01*(r.spec.seed - 1) - 0.021*(r.spec.method == "ela")}) for r in made(("cifar10",))], experiment_specs("other_datasets", "reduced"))
    alone = next(t for t in found if t.dataset == "cifar10").interval(T.SHOWN[0])
    assert alone.high < 0 and alone.p < 0.05 and first(-0.021).verdict == "inconclusive" and "(Holm)" in first(-0.021).evidence
    assert first(-0.08).verdict == "not supported" and first(0.08).verdict == "supported"


def test_it_can_be_supported_only_when_all_was_run(monkeypatch):
    monkeypatch.setattr(report, "EXPERIMENTS", {**EXPERIMENTS, **{e: EXPERIMENTS["other_datasets"] for e in EXPERIMENTS["other_datasets"].also}})  # as if detection were here
    claim = next(c for c in report.CLAIMS if c.id == "L2")
    everything = T.transfers(made(("cifar10", "imagenette", *FURTHER), **BETTER), experiment_specs("other_datasets", "reduced"))
    assert report.judge(claim, report.Evidence(transfers=everything), "reduced").verdict == "supported"
    same = T.transfers(made(("cifar10", "imagenette", *FURTHER), **{**BETTER, "ela": 0.83}), experiment_specs("other_datasets", "reduced"))
    assert report.judge(claim, report.Evidence(transfers=same), "reduced").verdict == "inconclusive"


@pytest.mark.parametrize("accuracy, where", [(0.85, "above"), (0.83, "around"), (0.80, "below")])
def test_sentences_say_what_the_intervals_say(accuracy, where):
    found = T.transfers(made(**{**BETTER, "ela": accuracy}), experiment_specs("other_datasets", "reduced"))
    assert [T.where(t, T.DECISIVE) for t in found] == [where]*2 + [""]*5
    said = T.sentences(found, "reduced")
    words = {"above": "wholly above zero on cifar10", "below": "wholly below zero on cifar10", "around": "the interval contains zero on cifar10"}
    assert [w for w in words.values() if w in said[0]] == [words[where]] and said[-1].startswith("Nothing is known about svhn, stl10")
    assert T.sentences(found, "quick") == [T.disclaimer("quick")]
    assert T.transfer_figure(found) and all(s in T.transfer_caption(found, "reduced") for s in said)


def test_the_caption_says_why_there_is_no_interval():
    specs = experiment_specs("other_datasets", "reduced")
    def caption(records): return T.transfer_caption(T.transfers(records, specs), "reduced")
    every = made(("cifar10",))
    assert "but nothing was run yet" in caption([]) and "no seed is repeated" not in caption([])
    assert "none of which has both sides yet" in caption([r for r in every if r.spec.attention == "ela" and r.spec.policy == "ebqm"])
    assert "without intervals, since no seed is repeated" in caption([r for r in every if r.spec.seed == 0]) and "95% intervals" in caption(every)


def test_rows_say_what_is_missing_and_why(tmp_path):
    store, specs = Store("reduced", tmp_path), experiment_specs("other_datasets", "reduced")
    records = made(("cifar10",))
    for r in records: store.save(r)
    store.fail(next(s for s in specs if s.dataset == "eurosat"), "the disk was full")
    frame = T.transfer_table(T.transfers(records, specs), "reduced", store).frame.set_index("data set")
    assert frame.loc["cifar10", "remark"] is None or "spread" in frame.loc["cifar10", "remark"]
    assert "no record of seed 0, 1, 2 yet" in frame.loc["imagenette", "remark"] and "the disk was full" in frame.loc["eurosat", "remark"]
    for name in ("svhn", "stl10", "flowers102", "food101"): assert frame.loc[name, "remark"].startswith(f"not run: needs the data. {download_call(name)}; then ela-repro reproduce --profile reduced --only other_datasets")
    tasks = T.tasks_table("reduced", store).frame.set_index("experiment")
    assert tasks.loc["other_datasets", "runs with a record"] == 12
    for e in EXPERIMENTS["other_datasets"].also: assert tasks.loc[e, "remark"] == "not run: no record yet"


def test_the_report_makes_the_tables_that_the_notebook_makes(tmp_path):
    store, specs = Store("reduced", tmp_path), experiment_specs("other_datasets", "reduced")
    for r in made(): store.save(r)
    records = [r for s in specs if (r := store.get(s))]
    paths = [p for table in (T.transfer_table(T.transfers(records, specs), "reduced", store), T.tasks_table("reduced", store)) for p in save_table(table, store.folder)]
    before = {p: p.read_bytes() for p in paths}
    for p in paths: p.unlink()
    found = report.Found(store, None, {r.spec: r for r in store.records()[0]})
    for table in report.TABLES["other_datasets"](found): save_table(table, store.folder)
    assert {p: p.read_bytes() for p in paths} == before
    assert set(VERDICTS) >= {j.verdict for j in report.judge_all(records, "reduced")}


def test_a_page_is_outdated_when_another_tasks_records_change(tmp_path, monkeypatch):
    "Records that the study counts without asking for them are among what its page depends on."
    one = replace(EXPERIMENTS["other_datasets"], also=("schedule_choice",))
    monkeypatch.setitem(EXPERIMENTS, "other_datasets", one)
    [job, _] = batch.notebook_jobs(batch.Plan("quick", ("other_datasets", "report"), (), tmp_path))
    assert set(job.records) == {s.id for e in ("other_datasets", "schedule_choice") for s in experiment_specs(e, "quick")}
