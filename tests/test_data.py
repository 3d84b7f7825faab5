"""The data sets: every form they come in, every way they can be damaged, and what a training run is fed."""
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from ela_repro import data as D
from ela_repro.core import CorruptFileError, ElaError

FULL = next((p for p in (os.environ.get("ELA_DATA"), Path(__file__).parents[2]/"shared"/"data") if p and Path(p).is_dir()), None)
needs_full = pytest.mark.skipif(FULL is None, reason="needs the full CIFAR sets: set ELA_DATA to a folder that holds them")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch): monkeypatch.delenv("ELA_DATA", raising=False)


@pytest.fixture(scope="module")
def sample(): return D.load_dataset("cifar10-sample")


def hwc(images): return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def same(a, b):
    return all(torch.equal(getattr(a, f"{s}_{p}"), getattr(b, f"{s}_{p}")) for s in ("train", "test") for p in ("images", "labels"))


# ---- the sample ----

def test_sample_is_what_it_says(sample):
    record = json.loads((D.SAMPLE_FOLDER/"cifar10.json").read_text())
    assert "Krizhevsky" in record["attribution"] and "no licence" in record["attribution"]
    assert sample.train_images.shape == (2000, 3, 32, 32) and sample.test_images.shape == (500, 3, 32, 32)
    assert sample.train_labels.bincount().tolist() == [200]*10 and sample.test_labels.bincount().tolist() == [50]*10
    assert all(record[s]["indices"] == sorted(set(record[s]["indices"])) for s in ("train", "test"))
    assert sample.digest["value"] == "+".join(hashlib.sha256(hwc(x)).hexdigest() for x in (sample.train_images, sample.test_images))
    assert sum(f.stat().st_size for f in D.SAMPLE_FOLDER.iterdir()) < 6e6
    assert sorted(f.name for f in D.SAMPLE_FOLDER.iterdir()) == sorted([*D.SAMPLE_FILES, "cifar10_resnet20_ela.json", "cifar10_resnet20_ela.pt"])
    assert (sample.source, sample.num_classes, sample.classes[3]) == ("sample", 10, "cat")


def test_sample_needs_no_torchvision():
    code = "import sys; sys.modules['torchvision'] = None; from ela_repro.data import load_dataset; print(len(load_dataset('cifar10-sample').train_images))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.stdout.strip() == "2000", run.stderr


def copy_sample(folder, monkeypatch):
    folder.mkdir()
    for f in D.SAMPLE_FILES: (folder/f).write_bytes((D.SAMPLE_FOLDER/f).read_bytes())
    monkeypatch.setattr(D, "SAMPLE_FOLDER", folder)


@pytest.mark.parametrize("file", D.SAMPLE_FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_sample(tmp_path, monkeypatch, file, damage):
    copy_sample(tmp_path/"sample", monkeypatch)
    path = tmp_path/"sample"/file
    content = bytearray(path.read_bytes())
    if damage == "missing": path.unlink()
    elif damage == "truncated": path.write_bytes(content[:len(content)//2])
    else:
        content[len(content)//2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"(?is){file}.*install.* again"): D.load_dataset("cifar10-sample")


# ---- mosaics ----

@pytest.fixture
def mosaics(tmp_path, monkeypatch):
    "A small set in the mosaic layout (5,000 + 2,500 flat-coloured images), known to the package as cifar10."
    folder, rng = tmp_path/"cifar10", np.random.default_rng(0)
    folder.mkdir()
    counts, pixels, labels = {"train": 5000, "test": 2500}, {}, {}
    for split, n in counts.items():
        images = np.ascontiguousarray(np.broadcast_to(rng.integers(0, 256, (n, 1, 1, 3), dtype=np.uint8), (n, 32, 32, 3)))
        target = rng.permutation(np.arange(n) % 10).astype(np.uint8)
        for k in range(n//2500):
            picture = images[k*2500:(k + 1)*2500].reshape(50, 50, 32, 32, 3).swapaxes(1, 2).reshape(1600, 1600, 3)
            Image.fromarray(picture).save(folder/f"{split}_{k:02d}.webp", lossless=True, method=0)
        np.save(folder/f"{split}_labels.npy", target)
        pixels[split], labels[split] = hashlib.sha256(images).hexdigest(), hashlib.sha256(target).hexdigest()
    monkeypatch.setitem(D.DATASETS, "cifar10", replace(D.DATASETS["cifar10"], counts=counts, pixels=pixels, labels=labels))
    return folder


def test_mosaics(mosaics):
    data = D.load_dataset("cifar10", mosaics.parent)
    assert data.source == "mosaic" and data.digest["kind"] == "pixels-sha256"
    assert data.digest["value"] == "+".join(hashlib.sha256(hwc(x)).hexdigest() for x in (data.train_images, data.test_images))
    assert np.array_equal(data.train_labels.numpy(), np.load(mosaics/"train_labels.npy"))
    assert D.load_dataset("cifar10", f"{mosaics.parent}/../{mosaics.parent.name}") is data  # one copy a process, however the path is written


def test_root_from_variable(mosaics, monkeypatch):
    monkeypatch.setenv("ELA_DATA", str(mosaics.parent))
    assert D.find_dataset("cifar10") == ("cifar10", "mosaic", mosaics.resolve())


def damage_missing(folder): (folder/"train_01.webp").unlink()
def damage_truncated(folder): (folder/"train_01.webp").write_bytes((folder/"train_01.webp").read_bytes()[:-200])
def damage_empty(folder): (folder/"train_01.webp").write_bytes(b"")
def damage_other_size(folder): Image.new("RGB", (1600, 800)).save(folder/"train_01.webp")
def damage_swapped(folder): (folder/"train_00.webp").write_bytes((folder/"train_01.webp").read_bytes())
def damage_label_type(folder): np.save(folder/"train_labels.npy", np.load(folder/"train_labels.npy").astype(np.int64))
def damage_label_value(folder): np.save(folder/"train_labels.npy", np.roll(np.load(folder/"train_labels.npy"), 1))
def damage_label_count(folder): np.save(folder/"train_labels.npy", np.load(folder/"train_labels.npy")[:-1])
def damage_label_pickle(folder): np.save(folder/"train_labels.npy", np.array([{}], dtype=object), allow_pickle=True)
def damage_label_text(folder): (folder/"train_labels.npy").write_text("6 9 9")


@pytest.mark.parametrize("damage, names", [
    (damage_missing, "train_01.webp"), (damage_truncated, "train_01.webp"), (damage_empty, "train_01.webp"), (damage_other_size, "train_01.webp"),
    (damage_swapped, "train_00.webp to train_01.webp"), (damage_label_type, "train_labels.npy"), (damage_label_value, "train_labels.npy"),
    (damage_label_count, "train_labels.npy"), (damage_label_pickle, "train_labels.npy"), (damage_label_text, "train_labels.npy")])
def test_damaged_mosaics(mosaics, damage, names):
    damage(mosaics)
    with pytest.raises(CorruptFileError, match=f"{names}.*Copy .* again"): D.load_dataset("cifar10", mosaics.parent)


def test_flipped_bits_never_change_a_pixel(mosaics):
    "Some bits of a WebP file carry no pixel (the alpha hint, say); all others must be noticed."
    whole, sha256 = (mosaics/"test_00.webp").read_bytes(), D.DATASETS["cifar10"].pixels["test"]
    sound, noticed = D.read_split([mosaics/"test_00.webp"], 2500, sha256, "again"), 0
    for at in np.linspace(8, len(whole) - 1, 12).astype(int):
        (mosaics/"test_00.webp").write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
        try: assert torch.equal(D.read_split([mosaics/"test_00.webp"], 2500, sha256, "again"), sound)
        except CorruptFileError as e:
            assert "test_00.webp" in str(e)
            noticed += 1
    assert noticed >= 10


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_file(mosaics):
    (mosaics/"test_00.webp").chmod(0)
    with pytest.raises(ElaError, match="cannot read .*test_00.webp"): D.load_dataset("cifar10", mosaics.parent)


# ---- absent ----

def test_absent(tmp_path):
    with pytest.raises(ElaError, match="did you mean 'cifar100'"): D.load_dataset("cifar-100", tmp_path, download=True)
    with pytest.raises(ElaError, match="no folder was given.*--data.*ELA_DATA.*download=True.*cifar10-sample"): D.find_dataset("cifar100")
    with pytest.raises(ElaError, match="looked for .*cifar-10-batches-py.*train_00.webp"): D.find_dataset("cifar10", tmp_path/"nowhere")
    with pytest.raises(ElaError, match="needs a folder"): D.load_dataset("cifar10", download=True)
    assert D.find_dataset("cifar10-sample", tmp_path).source == "sample"


# ---- the official files ----

def write_official(base, data, monkeypatch):
    "Write `data` in the official python format under `base` and make torchvision expect these very files."
    reader = D.official_class(data.name)
    folder, known = base/reader.base_folder, D.DATASETS[data.name]
    folder.mkdir(parents=True)
    key = "labels" if data.name == "cifar10" else "fine_labels"

    def dump(file, content):
        (folder/file).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder/file).read_bytes()).hexdigest()

    for kind, split in (("train_list", "train"), ("test_list", "test")):
        files = [f for f, _ in getattr(reader, kind)]
        parts = zip(files, getattr(data, f"{split}_images").chunk(len(files)), getattr(data, f"{split}_labels").chunk(len(files)))
        monkeypatch.setattr(reader, kind, [[f, dump(f, {"data": x.flatten(1).numpy(), key: y.tolist()})] for f, x, y in parts])
    meta = dict(reader.meta)
    meta["md5"] = dump(meta["filename"], {meta["key"]: list(known.classes)})
    monkeypatch.setattr(reader, "meta", meta)
    return folder


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_official(tmp_path, monkeypatch, sample, below):
    folder = write_official(tmp_path/below, replace(sample, name="cifar10"), monkeypatch)
    data = D.load_dataset("cifar10", tmp_path)
    assert same(data, sample) and data.source == "torchvision" and data.digest["kind"] == "official-md5"
    assert len(data.digest["value"].split("+")) == 6 and data.train_images.is_contiguous() and data.train_labels.dtype == torch.int64
    assert D.find_dataset("cifar10", tmp_path) == ("cifar10", "torchvision", folder.resolve())


def test_official_before_mosaics(mosaics, monkeypatch, sample):
    folder = write_official(mosaics.parent, replace(sample, name="cifar10"), monkeypatch)
    assert D.find_dataset("cifar10", mosaics.parent).source == "torchvision"
    (folder/"test_batch").unlink()
    assert D.find_dataset("cifar10", mosaics.parent).source == "mosaic"  # a whole set is better than a part of a better one


def test_damaged_official(tmp_path, monkeypatch, sample):
    folder = write_official(tmp_path, replace(sample, name="cifar10"), monkeypatch)
    content = bytearray((folder/"data_batch_3").read_bytes())
    content[5000] ^= 1
    (folder/"data_batch_3").write_bytes(content)
    with pytest.raises(CorruptFileError, match="data_batch_3 in .*md5.*download=True"): D.load_dataset("cifar10", tmp_path)
    (folder/"batches.meta").unlink()
    with pytest.raises(CorruptFileError, match="incomplete.*1 of 7 files: batches.meta"): D.load_dataset("cifar10", tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    "The address of a server on this machine that offers the files in `tmp_path`."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as s:
        Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}"
        s.shutdown()


def test_download(tmp_path, monkeypatch, sample, server):
    reader = D.official_class("cifar10")
    folder = write_official(tmp_path/"made", replace(sample, name="cifar10"), monkeypatch)
    with tarfile.open(tmp_path/"archive.tar.gz", "w:gz", compresslevel=1) as t: t.add(folder, folder.name)
    monkeypatch.setattr(reader, "url", f"{server}/archive.tar.gz")
    with pytest.raises(ElaError, match="cannot download 'cifar10'.*cifar10-sample"): D.load_dataset("cifar10", tmp_path/"new", download=True)  # wrong md5
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5((tmp_path/"archive.tar.gz").read_bytes()).hexdigest())
    assert same(D.load_dataset("cifar10", tmp_path/"new", download=True), sample)
    monkeypatch.setattr(reader, "url", f"{server}/absent")
    assert same(D.load_dataset("cifar10", tmp_path/"new", download=True), sample)  # there already: nothing is fetched
    with pytest.raises(ElaError, match="cannot download 'cifar10'.*404"): D.load_dataset("cifar10", tmp_path/"other", download=True)


# ---- the hold-out ----

def test_holdout(sample):
    tune = D.split_holdout(sample, 500)
    assert tune.train_labels.bincount().tolist() == [150]*10 and tune.test_labels.bincount().tolist() == [50]*10
    held = D.holdout_mask(sample.train_labels, 500, 10)
    assert torch.equal(sample.train_images[held], tune.test_images) and torch.equal(sample.train_images[~held], tune.train_images)
    assert hashlib.sha256(held.numpy()).hexdigest()[:16] == "d99e6b7b3652a3b2"  # pinned: the split outlives library versions
    assert tune.digest == sample.digest
    for wrong in (-10, 15, 2000, 5000):
        with pytest.raises(ElaError, match="cannot hold out"): D.split_holdout(sample, wrong)


# ---- what training sees ----

def test_pipeline_equals_torchvision(sample):
    "Whole batches against PIL, ToTensor and Normalize, bit by bit."
    from torchvision.transforms import functional as TF

    loader = D.Batches(sample.train_images, sample.train_labels, sample.mean, sample.std, 64, "cpu", True, seed=1)
    plan, (x, y) = loader.plan(2), next(loader.epoch(2))
    for k, (image, dx, dy, flip) in enumerate(plan[:, :64].T.tolist()):
        picture = TF.crop(TF.pad(TF.to_pil_image(sample.train_images[image]), 4), dy, dx, 32, 32)
        if flip: picture = TF.hflip(picture)
        assert torch.equal(TF.normalize(TF.to_tensor(picture), sample.mean, sample.std), x[k])
        assert y[k] == sample.train_labels[image]


def test_crops_are_uniform(sample):
    loader = D.Batches(sample.train_images, sample.train_labels, sample.mean, sample.std, 64, "cpu", True)
    draws = torch.cat([loader.plan(e)[1:] for e in range(10)], 1)
    for values, n in zip(draws, (9, 9, 2)):
        counts = values.bincount(minlength=n).double()
        assert len(counts) == n and ((counts - 20_000/n)**2/(20_000/n)).sum() < n - 1 + 5*(2*(n - 1))**0.5  # chi-squared within 5 sd


def test_streams_differ(sample):
    def plan(seed, epoch, **kw): return D.Batches(sample.train_images, sample.train_labels, sample.mean, sample.std, 64, "cpu", True, seed=seed, **kw).plan(epoch)
    plans = [plan(s, e) for s in (0, 1) for e in (0, 1)]
    assert all(not torch.equal(a[row], b[row]) for i, a in enumerate(plans) for b in plans[:i] for row in range(4))
    assert hashlib.sha256(plan(0, 0).numpy()).hexdigest()[:16] == "3c02e3d33bd0b2ea"  # moves only with recipe_version


def test_evaluation_keeps_the_last_batch(sample):
    loader = D.Batches(sample.test_images, sample.test_labels, sample.mean, sample.std, 192, "cpu", False)
    assert [len(y) for _, y in loader.epoch()] == [192, 192, 116] and len(loader) == 3
    assert torch.equal(torch.cat([y for _, y in loader.epoch()]), sample.test_labels)
    head = D.Batches(sample.test_images, sample.test_labels, sample.mean, sample.std, 192, "cpu", False, limit=200)
    assert [len(y) for _, y in head.epoch()] == [192, 8]
    large = D.Batches(sample.test_images, sample.test_labels, sample.mean, sample.std, 1000, "cpu", False)
    assert [len(y) for _, y in large.epoch()] == [500]


def test_a_shared_set_is_not_copied(sample):
    loader = D.Batches(sample.train_images, sample.train_labels, sample.mean, sample.std, 64, "cpu", True)
    assert loader.images.data_ptr() == sample.train_images.data_ptr()


@pytest.mark.parametrize("wrong", [dict(batch_size=0), dict(batch_size=2001), dict(batch_size=64, limit=63), dict(batch_size=64, limit=-1), dict(batch_size=64, limit=2001)])
def test_impossible_batches(sample, wrong):
    with pytest.raises(ElaError): D.Batches(sample.train_images, sample.train_labels, sample.mean, sample.std, device="cpu", train=True, **wrong)


@pytest.mark.gpu
@needs_gpu
def test_gpu_sees_the_same(sample):
    "Equal batches, no synchronisation within an epoch, and the augmentation in a CUDA graph."
    cpu, gpu = (D.Batches(sample.train_images, sample.train_labels, sample.mean, sample.std, 128, d, True, seed=1) for d in ("cpu", "cuda"))
    steps = gpu.epoch(3)
    seen = [next(steps)]
    torch.cuda.set_sync_debug_mode("error")
    try: seen += list(steps)
    finally: torch.cuda.set_sync_debug_mode("default")
    for (x, y), (x2, y2) in zip(cpu.epoch(3), seen, strict=True): assert torch.equal(x, x2.cpu()) and torch.equal(y, y2.cpu())

    plan = gpu.plan(3).cuda()
    static = plan[:, :128].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = D.normalise(D.augment(gpu.images[static[0]], *static[1:]), gpu.mean, gpu.std)
    for k in range(2):
        static.copy_(plan[:, k*128:(k + 1)*128])
        graph.replay()
        assert torch.equal(out, seen[k][0])


# ---- the real sets ----

@needs_full
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_full_set(name):
    data = D.load_dataset(name, FULL)
    assert data.train_images.shape == (50_000, 3, 32, 32) and data.test_images.shape == (10_000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [50_000//data.num_classes]*data.num_classes
    assert data.test_labels.bincount().tolist() == [10_000//data.num_classes]*data.num_classes
    tune = D.split_holdout(data, 5000)
    assert tune.test_labels.bincount().tolist() == [5000//data.num_classes]*data.num_classes and len(tune.train_labels) == 45_000


@needs_full
def test_sample_comes_from_the_full_set(sample):
    full, record = D.load_dataset("cifar10", FULL), json.loads((D.SAMPLE_FOLDER/"cifar10.json").read_text())
    for split in ("train", "test"):
        assert torch.equal(getattr(full, f"{split}_images")[record[split]["indices"]], getattr(sample, f"{split}_images"))
        assert torch.equal(getattr(full, f"{split}_labels")[record[split]["indices"]], getattr(sample, f"{split}_labels"))
    altered = Path(FULL)/"cifar10"/"jpeg_indices.json"
    if altered.exists():
        official = set(record["train"]["indices"]) | {50_000 + i for i in record["test"]["indices"]}
        assert official.isdisjoint(json.loads(altered.read_text()))


@needs_full
def test_cifar100_official_format(tmp_path, monkeypatch):
    "The head of CIFAR-100, written as the official python files, gives the same images and labels."
    full = D.load_dataset("cifar100", FULL)
    head = replace(full, **{f: getattr(full, f)[:2000].clone() for f in ("train_images", "train_labels", "test_images", "test_labels")})
    write_official(tmp_path, head, monkeypatch)
    official = D.load_dataset("cifar100", tmp_path)
    assert same(official, head) and official.digest["kind"] == "official-md5" and official.classes == head.classes
