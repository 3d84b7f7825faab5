"""ImageNet in every form it comes in, every way it can be damaged, and batches that no number of processes changes."""
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ela_repro import imagenet as I
from ela_repro.core import CorruptFileError, ElaError

CLASSES, COUNTS = ("n01", "n02", "n03"), {"train": 6, "val": 2}
SPLITS = {"train": "train", "val": "test"}


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch): monkeypatch.delenv("ELA_DATA", raising=False)


@pytest.fixture(autouse=True)
def fresh():
    I.load_listing.cache_clear()


def encoded(seed, kind="JPEG", size=None):
    "A made-up photograph of a size of its own."
    rng = np.random.default_rng(seed)
    size = size or tuple(int(v) for v in rng.integers(40, 70, 2))
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    image.save(file := io.BytesIO(), kind, quality=90)
    return file.getvalue()


@pytest.fixture(scope="session")
def pictures():
    "Per part (train, val): class by class the encoded images."
    return {part: [[encoded(100*c + k + 50*(part == "val")) for k in range(n)] for c in range(3)] for part, n in COUNTS.items()}


def flat(pictures, part): return [(content, c) for c, contents in enumerate(pictures[part]) for content in contents]


def write_folders(pictures, folder):
    for part, by_class in pictures.items():
        for name, contents in zip(CLASSES, by_class):
            (folder/part/name).mkdir(parents=True)
            for k, content in enumerate(contents): (folder/part/name/f"{name}_{k}.JPEG").write_bytes(content)
    return folder


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_tars(pictures, folder, each=7):
    folder.mkdir(parents=True)
    for part, prefix in (("train", "imagenet1k-train"), ("val", "imagenet1k-validation")):
        samples = flat(pictures, part)
        for n in range(0, len(samples), each):
            write_tar(folder/f"{prefix}-{n//each:04d}.tar", [(f"{part}/n{i:04d}.v1/{i:06d}.{ending}", value) for i in range(n, min(n + each, len(samples)))
                                                             for ending, value in (("jpg", samples[i][0]), ("cls", str(samples[i][1]).encode()))])
    return folder


def write_parquets(pictures, folder, each=10):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("val", "validation")):
        samples = flat(pictures, part)
        total = -(-len(samples)//each)
        for n in range(total):
            some = samples[n*each:(n + 1)*each]
            table = pa.table({"image": [{"bytes": c, "path": "a.jpg"} for c, _ in some], "label": [y for _, y in some]})
            table = table.replace_schema_metadata({"huggingface": '{"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}'})
            pq.write_table(table, folder/f"{prefix}-{n:05d}-of-{total:05d}.parquet")
    return folder


def write_nette(folder, counts={"train": 20, "val": 6}, side=24, **change):
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in counts.items():
        contents = [encoded(k + 50*(part == "val"), "WEBP", (side, side)) for k in range(n)]
        arrays = {"blob": np.frombuffer(b"".join(contents), np.uint8), "offsets": np.cumsum([0, *map(len, contents)]), "labels": (np.arange(n) % 2).astype(np.uint8)}
        np.savez(folder/f"{part}.npz", **{**arrays, **change})
    (folder/"classes.txt").write_text("0\tn01\ttench, Tinca tinca\n1\tn02\tchain saw, chainsaw\n")
    return folder


@pytest.fixture
def cache(tmp_path): return tmp_path/"cache"


@pytest.fixture
def folders(pictures, tmp_path): return write_folders(pictures, tmp_path/"data"/"imagenet").parent


def load(root, cache, name="imagenet", **kw): return I.load_images(name, root, **{"pixels": 16, "cache": cache, "progress": False, **kw})


def same(a, b, map_b=lambda x: x): return all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(a, b, strict=True))


def everything(batches, epoch=0): return tuple(torch.cat(part) for part in zip(*batches.epoch(epoch)))


# ---- forms ----

@pytest.mark.parametrize("write, source", [(write_tars, "webdataset"), (write_parquets, "parquet")])
def test_every_form_gives_the_same(pictures, folders, tmp_path, cache, write, source):
    plain = load(folders, cache)
    for place in (tmp_path/"other"/"imagenet"/"data", tmp_path/"flat"):
        write(pictures, place)
        root = tmp_path/"other" if place.name == "data" else place
        other = load(root, cache)
        assert (other.source, other.counts) == (source, plain.counts)
        assert same(plain.train_batches(4, "cpu", 1, workers=0).epoch(2), other.train_batches(4, "cpu", 1, workers=0).epoch(2))
        assert same(plain.test_batches(4, "cpu", workers=0).epoch(), other.test_batches(4, "cpu", workers=0).epoch())
    assert other.classes == (("a", "b", "c") if source == "parquet" else ("0", "1", "2"))
    for path in place.iterdir(): os.utime(path, (1, 1))
    assert load(place, cache).digest == other.digest  # when a file was copied does not matter


def test_folders(pictures, folders, cache):
    data = load(folders, cache)
    assert (data.source, data.classes, data.counts, data.num_classes) == ("folder", CLASSES, {"train": 18, "test": 6}, 3)
    assert data.train.labels.tolist() == [y for _, y in flat(pictures, "train")]
    assert [data.train.store.read(i) for i in range(18)] == [c for c, _ in flat(pictures, "train")]
    assert data.problems["counts"]["train"] == "18 images, a complete set has 1281167" and "unreadable" not in data.problems
    assert data.digest["kind"] == "names-sizes-labels-sha256" and len(data.digest["value"].split("+")) == 2
    (folders/"imagenet"/"meta.bin").touch()
    assert I.find_images("imagenet", folders).source == "torchvision"
    assert load(folders, cache) is not data and load(folders, cache).digest == data.digest


def test_root_from_variable(folders, monkeypatch):
    monkeypatch.setenv("ELA_DATA", str(folders))
    assert I.find_images("imagenet") == ("imagenet", "folder", (folders/"imagenet").resolve())


def test_cache_beside_the_results(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("ELA_RESULTS", str(tmp_path/"results"))
    load(folders, "")
    assert (tmp_path/"results"/"cache"/".gitignore").read_text() == "*\n" and list((tmp_path/"results"/"cache").glob("check-imagenet-*.json"))


def test_one_object_until_something_changes(folders, cache):
    first = load(folders, cache)
    assert load(f"{folders}/../{folders.name}", cache) is first and load(folders, cache, pixels=8) is not first
    (folders/"imagenet/train/n01/n01_0.JPEG").unlink()
    assert load(folders, cache).counts["train"] == 17


def test_tar_index_is_kept(pictures, tmp_path, cache, monkeypatch):
    tars = write_tars(pictures, tmp_path/"tars")
    plain = load(tars, cache).train
    I.load_listing.cache_clear()
    monkeypatch.setattr(I, "index_tar", None)  # must not be called
    again = load(tars, cache).train
    assert again.store.name(9) == plain.store.name(9) and again.store.name(9).endswith("imagenet1k-train-0001.tar: train/n0009.v1/000009")
    for path in cache.glob("index*-train-*.npz"): path.write_bytes(path.read_bytes()[:-40])
    monkeypatch.undo()
    I.load_listing.cache_clear()
    assert np.array_equal(load(tars, cache).train.store.at, plain.store.at)  # a damaged index is made again


def test_processes_that_start_together_share_the_work(pictures, tmp_path, cache):
    tars = write_tars(pictures, tmp_path/"tars")
    code = f"""if 1:
        from ela_repro import imagenet as I
        for work in ("index_tar", "examine"):
            def told(*args, work=work, plain=getattr(I, work)): print(work); return plain(*args)
            setattr(I, work, told)
        print(I.load_images("imagenet", {str(tars)!r}, pixels=16, cache={str(cache)!r}, progress=False).counts)"""
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) for _ in range(2)]
    said = [line for p in started for line in p.communicate(timeout=100)[0].splitlines()]
    assert sorted(said) == sorted(["examine", *["index_tar"]*4, *[str({"train": 18, "test": 6})]*2]) and not any(p.returncode for p in started)


def test_class_names_beside_shards(pictures, tmp_path, cache):
    tars = write_tars(pictures, tmp_path/"tars")
    (tars/"classes.txt").write_text("0\ttench, Tinca tinca\n1\tgoldfish\n2\tshark\n")
    assert load(tars, cache).classes == ("tench", "goldfish", "shark")


def test_parquet_needs_pyarrow(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for f in ("train-00000-of-00001.parquet", "val-00000-of-00001.parquet"): (tmp_path/f).touch()
    with pytest.raises(ElaError, match="pip install pyarrow"): load(tmp_path, cache)


def test_parquet_damage(pictures, tmp_path, cache, monkeypatch):
    files = write_parquets(pictures, tmp_path/"files")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(I.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ElaError, match="GB; .*cache.* has 0.0 GB.*more room"): load(files, cache)
    monkeypatch.undo()
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "a.jpg"}], "label": [0]}), files/"validation-00000-of-00001.parquet")
    with pytest.raises(CorruptFileError, match="validation-00000.*column image must hold bytes"): load(files, cache)
    pq.write_table(pa.table({"picture": [1]}), files/"validation-00000-of-00001.parquet")
    with pytest.raises(CorruptFileError, match="validation-00000.*columns image and label"): load(files, cache)


# ---- what is missing or does not fit ----

def lose_val(data): shutil.rmtree(data/"val")
def lose_train(data): shutil.rmtree(data/"train")
def lose_class(data): shutil.rmtree(data/"val"/"n02")
def flat_val(data):
    shutil.rmtree(data/"val")
    (data/"val").mkdir()
    (data/"val"/"ILSVRC2012_val_00000001.JPEG").touch()
def packed_train(data):
    shutil.rmtree(data/"train")
    (data/"train").mkdir()
    (data/"train"/"n01.tar").touch()
def empty_train(data):
    for path in (data/"train").rglob("*.JPEG"): path.unlink()
def no_class(data):
    shutil.rmtree(data/"train")
    (data/"train").mkdir()


@pytest.mark.parametrize("damage, message", [
    (lose_val, "half unpacked: it has train/ and no val/"), (lose_train, "half unpacked: it has val/ and no train/"), (lose_class, "train/ has a class folder 'n02' that val/ lacks"),
    (flat_val, "val has no class folders but images that lie side by side"), (packed_train, "archives of classes: unpack each"), (empty_train, "no image .*in any of them. Unpack it again"),
    (no_class, "has no class folders but nothing")])
def test_damaged_folders(folders, cache, damage, message):
    damage(folders/"imagenet")
    with pytest.raises(CorruptFileError, match=message): load(folders, cache)


def test_nothing_there(tmp_path, cache):
    with pytest.raises(ElaError, match="no folder was given.*ELA_DATA"): load("", cache)
    with pytest.raises(ElaError, match="absent is no folder"): load(tmp_path/"absent", cache)
    with pytest.raises(ElaError, match="looked in .*train-\\*.tar"): load(tmp_path, cache)
    with pytest.raises(ElaError, match="looked in .*imagenette128.*train.npz"): load(tmp_path, cache, "imagenette")
    with pytest.raises(ElaError, match="did you mean 'imagenette'"): load(tmp_path, cache, "imagenete")


@pytest.mark.parametrize("names, message", [
    (["train-000.tar", "train-002.tar", "val-000.tar"], "like train-000.tar, number 1 is missing"), (["train-2.tar", "val-0.tar"], "number 1"), (["train-1.tar", "train-2.tar", "val-1.tar"], None),
    (["train-0.tar"], "none of the validation images"), (["val-0.tar"], "none of the training images"),
    (["train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "val-00000-of-00001.parquet"], "number 2"),
    (["train-00000-of-00001-0a1b.parquet", "train-00000-of-00001-ffff.parquet", "val-0.parquet"], "two shards of one number")])
def test_shard_names(tmp_path, names, message):
    for name in [*names, "ILSVRC2012_img_train.tar", "notes.txt"]: (tmp_path/name).touch()
    if message is None: assert I.find_images("imagenet", tmp_path).source == "webdataset"
    else:
        with pytest.raises(CorruptFileError, match=message): I.find_images("imagenet", tmp_path)


PICTURE = encoded(0)


@pytest.mark.parametrize("members, message", [
    ([("0.jpg", PICTURE), ("0.cls", b"0"), ("1.jpg", PICTURE)], "train-0.tar: 1 has no label"), ([("0.jpg", PICTURE), ("0.cls", b"0"), ("1.cls", b"0")], "1 has a label, but no image"),
    ([("0.jpg", PICTURE), ("0.png", PICTURE), ("0.cls", b"0")], "holds 0 twice"), ([("0.jpg", PICTURE), ("0.cls", b"tench")], "no number"),
    ([("0.jpg", PICTURE), ("0.cls", b"-1")], "training set has the label -1, outside"), ([("0.jpg", PICTURE), ("0.cls", b"1000")], "label 1000, outside 0..999"), ([("0.txt", b"")], "hold no image")])
def test_damaged_tars(tmp_path, cache, members, message):
    write_tar(tmp_path/"train-0.tar", members)
    write_tar(tmp_path/"val-0.tar", [("0.jpg", PICTURE), ("0.cls", b"0")])
    with pytest.raises(CorruptFileError, match=message): load(tmp_path, cache)


def test_other_archives(tmp_path, cache):
    sample = [("0.jpg", PICTURE), ("0.cls", b"0"), ("0.json", b"{}")]
    write_tar(tmp_path/"train-0.tar", sample)
    write_tar(tmp_path/"val-0.tar", [("0.jpg", PICTURE), ("0.cls", b"1")])
    with pytest.raises(CorruptFileError, match="validation set has the label 1, outside 0..0"): load(tmp_path, cache)
    whole = (tmp_path/"train-0.tar").read_bytes()
    for content in (whole[:600], b"no archive", b""):
        (tmp_path/"val-0.tar").write_bytes(content)
        with pytest.raises(CorruptFileError, match="val-0.tar cannot be read as an uncompressed tar"): load(tmp_path, cache)
    with tarfile.open(tmp_path/"val-0.tar", "w:gz"): pass
    with pytest.raises(CorruptFileError, match="unpack a .tar.gz first"): load(tmp_path, cache)


# ---- Imagenette ----

@pytest.mark.parametrize("change, message", [
    ({"offsets": np.array([0, 9, 5])}, "2 labels need|labels need 21 offsets, found 3"), ({"offsets": np.arange(21)[::-1].copy()}, "offsets must ascend, but number 1 is 19 after 20"),
    ({"offsets": np.arange(21)}, "offsets run from 0 to 20"), ({"offsets": np.arange(21.0)}, "offsets are float64"), ({"labels": np.full(20, 2)}, "label 2, outside 0..1"), ({"labels": np.full(20, -1)}, "label -1"),
    ({"labels": np.zeros((20, 1), int)}, r"labels are int64 of shape \(20, 1\)"), ({"blob": np.zeros(9)}, "blob is float64"), ({"blob": np.array([{}], dtype=object)}, "no .npz file")])
def test_damaged_nette(tmp_path, cache, change, message):
    write_nette(tmp_path/"imagenette")
    whole = dict(np.load(tmp_path/"imagenette/train.npz"))
    np.savez(tmp_path/"imagenette/train.npz", **{**whole, **change})
    with pytest.raises(CorruptFileError, match=message): load(tmp_path, cache, "imagenette")


def test_damaged_nette_files(tmp_path, cache):
    folder = write_nette(tmp_path/"imagenette128")
    for text, message in (("0 n01 tench\n", "must number its classes"), ("1\tn01\ttench\n", "found '1'"), ("", "found 'nothing'")):
        (folder/"classes.txt").write_text(text)
        with pytest.raises(CorruptFileError, match=f"classes.txt.*{message}"): load(tmp_path, cache, "imagenette")
    (folder/"val.npz").write_bytes((folder/"val.npz").read_bytes()[:200])
    write_nette(tmp_path/"whole")
    shutil.copy(tmp_path/"whole/classes.txt", folder)
    with pytest.raises(CorruptFileError, match="val.npz is no .npz file"): load(tmp_path, cache, "imagenette")
    (folder/"val.npz").unlink()
    with pytest.raises(CorruptFileError, match="lacks val.npz"): load(tmp_path, cache, "imagenette")


def test_nette(tmp_path, cache):
    write_nette(tmp_path/"imagenette128")
    data = load(tmp_path, cache, "imagenette", pixels=24)
    assert (data.source, data.classes, data.counts, data.digest["kind"]) == ("imagenette", ("tench", "chain saw"), {"train": 20, "test": 6}, "files-sha256")
    x, y = everything(data.test_batches(4, "cpu"))
    assert torch.equal(y, torch.arange(6) % 2)
    oracle = torch.stack([I.decode(data.test.store.read(i)) for i in range(6)])
    assert (x*torch.tensor(I.STD).view(3, 1, 1) + torch.tensor(I.MEAN).view(3, 1, 1) - oracle/255).abs().max() < 1e-6  # the images as they are
    assert load(tmp_path, cache, "imagenette", pixels=0).pixels == 128
    assert data.problems["counts"]["test"].startswith("6 images")


# ---- check ----

def test_unreadable_images(folders, cache):
    train = folders/"imagenet/train"
    (train/"n02/n02_1.JPEG").write_bytes((train/"n02/n02_1.JPEG").read_bytes()[:-50])
    (train/"n03/n03_0.JPEG").write_text("404")
    (train/"n03/readme.txt").touch()
    (train/"n03/.hidden").touch()
    found = I.find_images("imagenet", folders)
    checked = I.check_images(found, False, cache=cache)
    assert checked.skip == {"train": [7, 12], "test": []}
    assert checked.problems["unreadable"] == 2 and checked.problems["examples"][1] == "train/n03/n03_0.JPEG: it does not start like an image" and checked.problems["stray"] == {"count": 1, "examples": ["train/n03/readme.txt"]}
    data = load(folders, cache)
    assert data.counts == {"train": 16, "test": 6} and data.train.labels.bincount().tolist() == [6, 5, 5] and data.problems["unreadable"] == 2
    assert all(len(y) == 4 for _, y in data.train_batches(4, "cpu", 0, workers=0).epoch())
    with pytest.raises(ElaError, match="2 images .*more than the 1 that may be skipped; the first is .*n02_1.JPEG"): I.check_images(found, False, limit=1, cache=cache)
    with pytest.raises(ElaError, match="limit is -1"): I.check_images(found, False, limit=-1, cache=cache)
    with pytest.raises(CorruptFileError, match="n0._[01].JPEG cannot be decoded .*check_images.*full=True"): list(load(folders, cache, check=False).train_batches(18, "cpu", 0, workers=0).epoch())


def test_what_is_amiss_is_said_before_training_and_kept_in_the_record(folders, tmp_path, monkeypatch, capsys):
    "And a set with fewer images than a probe looks at can be trained on."
    from ela_repro.batch import check_data
    from ela_repro.runs import RunSpec, ensure

    monkeypatch.setenv("ELA_RESULTS", str(tmp_path/"results"))
    (folders/"imagenet"/"train"/"n01"/"n01_0.JPEG").write_bytes(b"")
    (folders/"imagenet"/"train"/"n02"/"notes.txt").write_text("not an image")
    for part in ("train", "val"): (folders/"imagenet"/part/"n04").mkdir()
    assert check_data({"imagenet"}, str(folders)) == {}
    said = capsys.readouterr().err
    for words in ("warning: imagenet: 1 image cannot be read and is left out (train/n01/n01_0.JPEG: ", "train: 18 images, a complete set has 1281167", "classes: 4, a complete set has 1000",
                  "2 class folders without images (train/n04, val/n04)", "1 entry that is no image (train/n02/notes.txt)"): assert words in said, said
    spec = RunSpec(dataset="imagenet", model="resnet50", width=0.125, attention="ela", policy="ebqm", pixels=32, epochs=2, batch_size=4, warmup_epochs=0, precision="float32")
    [record] = ensure([spec], "quick", tmp_path/"results", "cpu", str(folders), progress=lambda event: None)
    assert record.provenance["data_problems"]["unreadable"] == 1 and record.updates and record.status == "done"


def test_check_is_kept(folders, cache, monkeypatch):
    looked, fault = [], I.fault
    monkeypatch.setattr(I, "fault", lambda *args: looked.append(args) or fault(*args))
    found = I.find_images("imagenet", folders)
    check = lambda **kw: I.check_images(found, False, cache=cache, **kw)
    times = lambda f: (looked.clear(), f(), len(looked))[2]
    assert times(check) == 24 and times(check) == 0
    assert times(lambda: check(full=True)) == 24 and times(lambda: check(full=True)) == 0 and times(check) == 0
    path = folders/"imagenet/val/n01/n01_0.JPEG"
    os.utime(path, (1, 1))
    assert times(check) == 24  # touched
    path.write_bytes(path.read_bytes() + b"more")
    assert times(check) == 24 and check().problems.get("unreadable") is None  # bytes after the end do no harm
    for report in cache.glob("check-*.json"): report.write_text("{}")
    assert times(check) == 24


def test_damage_in_the_middle(folders, cache):
    path = folders/"imagenet/train/n01/n01_2.JPEG"
    content = bytearray(encoded(5, "PNG"))
    content[200:260] = bytes(60)
    path.write_bytes(content)
    found = I.find_images("imagenet", folders)
    assert "unreadable" not in I.check_images(found, False, cache=cache).problems
    data = load(folders, cache)
    for workers in (0, 1):
        with pytest.raises(CorruptFileError, match=r"^\S*n01_2.JPEG cannot be decoded"): list(data.train_batches(6, "cpu", 0, workers=workers).epoch())
    assert I.check_images(found, False, full=True, cache=cache).skip["train"] == [2]
    I.load_listing.cache_clear()
    assert load(folders, cache).counts["train"] == 17  # the remedy of the message


def test_long_header_and_other_formats_pass(folders, cache):
    image = Image.open(io.BytesIO(PICTURE))
    first = folders/"imagenet/train/n01"
    image.save(first/"n01_0.JPEG", "JPEG", icc_profile=bytes(60_000), comment=b"x"*9000)
    image.save(first/"n01_1.JPEG", "PNG")
    image.convert("CMYK").save(first/"n01_2.JPEG", "JPEG")
    image.convert("L").save(first/"n01_3.webp", "WEBP")
    image.convert("P").save(first/"n01_4.png", "PNG", transparency=0)
    assert not {"unreadable", "stray"} & load(folders, cache).problems.keys()
    x, _ = everything(load(folders, cache).train_batches(1, "cpu", 0, workers=0))
    assert x.shape == (20, 3, 16, 16)


# ---- batches ----

def test_workers_change_nothing(folders, cache):
    data = load(folders, cache)
    plain = data.train_batches(4, "cpu", 7, workers=0)
    for workers in (1, 2):
        loader, state = data.train_batches(4, "cpu", 7, workers=workers), torch.get_rng_state()
        for epoch in (0, 1): assert same(plain.epoch(epoch), loader.epoch(epoch))
        next(iter(loader.epoch(2)))  # left in the middle
        assert same(plain.epoch(0), loader.epoch(0))
        assert torch.equal(state, torch.get_rng_state())  # the run's own chance is not disturbed
    assert same(data.test_batches(4, "cpu", workers=0).epoch(), data.test_batches(4, "cpu", workers=2).epoch())
    assert not same(plain.epoch(0), plain.epoch(1)) and not same(plain.epoch(0), data.train_batches(4, "cpu", 8, workers=0).epoch(0))
    image = [plain.plan(e)[1] for e in (0, 1)]
    assert all(len(set(i)) == 16 for i in image) and (image[0] != image[1]).any()


@pytest.mark.parametrize("kind", ["imagenet", "imagenette"])
def test_shards_share_the_batches_of_one(folders, tmp_path, cache, kind):
    write_nette(folders/"imagenette")
    data = load(folders, cache, kind)
    assert (data.train.pixels is not None) == (kind == "imagenette")
    whole = data.train_batches(6, "cpu", 3, limit=17, workers=0)
    halves = [data.train_batches(6, "cpu", 3, limit=17, shard=(r, 2), workers=0) for r in range(2)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 2 and {b.count for b in (whole, *halves)} == {17}
    for (x, y), *parts in zip(whole.epoch(1), *(b.epoch(1) for b in halves), strict=True):
        for r, (part, labels) in enumerate(parts): assert torch.equal(x[r::2], part) and torch.equal(y[r::2], labels)
    test = data.test_batches(10, "cpu", workers=0)
    x, y = everything(test)
    for r in range(3):
        own = data.test_batches(1, "cpu", shard=(r, 3), workers=0)
        assert own.count == test.count == 6 and len(own) == 2
        assert torch.equal(everything(own)[0], x[r::3]) and torch.equal(everything(own)[1], y[r::3])
    more = data.test_batches(4, "cpu", shard=(7, 8), workers=0)
    assert len(more) == 0 and list(more.epoch()) == []  # more processes than images


def test_killed_loader_process(folders, cache):
    "PyTorch's signal handler raises wherever this process happens to be, so the test does not kill: it plays what the loop sees."
    def ended(message):
        raise RuntimeError(message)
        yield

    batches = load(folders, cache).train_batches(2, "cpu", 0, workers=0)
    batches.loader = ended("DataLoader worker (pid 1) is killed by signal: Killed. \nMore")
    with pytest.raises(ElaError, match="a loader process ended .*killed by signal: Killed. .*fewer workers.*shm-size"): list(batches.epoch(0))
    for other in ("another error", "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"):  # of a process that lives
        batches.loader = ended(other)
        with pytest.raises(RuntimeError, match=f"^{other}$"): list(batches.epoch(0))


def test_limit_is_the_head_of_the_order(folders, cache):
    data = load(folders, cache)
    few, all_ = (data.train_batches(4, "cpu", 2, limit=n, workers=0) for n in (8, 0))
    assert (len(few), few.count, len(all_), all_.count) == (2, 8, 4, 18)
    assert same(few.epoch(3), list(all_.epoch(3))[:2])


def test_memory_and_files_agree(tmp_path, cache):
    write_nette(tmp_path/"imagenette")
    for pixels in (16, 24, 40):
        memory, files = (load(tmp_path, cache, "imagenette", pixels=pixels, in_memory=m) for m in (None, False))
        (x, y), (x2, y2) = everything(memory.train_batches(5, "cpu", 1), 4), everything(files.train_batches(5, "cpu", 1, workers=0), 4)
        assert torch.equal(y, y2) and (x - x2).abs().max() <= 1.01/255/min(I.STD)
        assert same(memory.test_batches(4, "cpu").epoch(), files.test_batches(4, "cpu", workers=0).epoch())
        assert torch.equal(memory.probe_images(7, "cpu"), files.probe_images(7, "cpu"))
        assert torch.equal(memory.probe_images(7, "cpu")[:3], memory.probe_images(3, "cpu"))
    with pytest.raises(ElaError, match="count of probe images is 21.*has 20"): memory.probe_images(21, "cpu")


def test_memory_budget(folders, tmp_path, cache, monkeypatch):
    write_nette(tmp_path/"imagenette")
    monkeypatch.setattr(I, "MEMORY", 20*3*24*24 - 1)
    data = load(tmp_path, cache, "imagenette")
    assert data.train.pixels is None and data.test.pixels is not None
    assert load(tmp_path, cache, "imagenette", in_memory=True).train.pixels is not None
    with pytest.raises(ElaError, match="differ in size.*in_memory=None"): load(folders, cache, in_memory=True)


@pytest.mark.parametrize("name", ["imagenet", "imagenette"])
def test_hold_out(folders, cache, name):
    write_nette(folders/"imagenette")
    data = load(folders, cache, name)
    held = 2*data.num_classes
    tune = data.hold_out(held)
    assert tune.test.labels.bincount().tolist() == [2]*data.num_classes and tune.counts == {"train": data.counts["train"] - held, "test": held}
    assert sorted([*tune.train.index, *tune.test.index]) == list(range(data.counts["train"]))
    assert data.hold_out(0) is data and np.array_equal(tune.test.index, load(folders, cache, name).hold_out(held).test.index)
    for part in (tune.train, tune.test): assert torch.equal(part.labels, data.train.labels[torch.from_numpy(part.index)])
    x, y = everything(tune.test_batches(4, "cpu", workers=0))
    assert torch.equal(y, tune.test.labels) and torch.equal(x[0], everything(data.hold_out(held).test_batches(1, "cpu", workers=0))[0][0])
    assert tune.digest == data.digest
    with pytest.raises(ElaError, match="cannot hold out 1 of"): data.hold_out(1)


def test_crop_resize_is_torchvisions():
    from torchvision.transforms.v2 import functional as F

    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (40, 3, 37, 53), dtype=np.uint8))
    box = torch.from_numpy(I.boxes(I.draws(0, 0, 0, 40), 37, 53))
    box[:4, :4] = torch.tensor([[0, 0, 37, 53], [36, 52, 1, 1], [0, 0, 1, 53], [5, 7, 20, 20]])
    for pixels in (8, 20, 64):
        for antialias in (True, False):
            plain = [F.resized_crop(x, *b[:4], [pixels, pixels], antialias=antialias) for x, b in zip(images, box.tolist())]
            plain = torch.stack([x.flip(-1) if b[4] else x for x, b in zip(plain, box)])
            ours = I.crop_resize(images, box, pixels, antialias)
            assert (ours.int() - plain.int()).abs().max() <= 1 + (not antialias) and (ours == plain).float().mean() > 0.9  # on white noise; photographs agree better
    w = I.weights(box[:, 1], box[:, 3], box[:, 4], 53, 20, True)
    assert (w.sum(-1) == I.UNIT).all() and (w >= 0).all() and (w == w.round()).all()


def test_draws_are_pinned():
    "No version of anything may move them: a run that is resumed elsewhere would see other crops."
    assert I.boxes(I.draws(1, 2, 3, 2), 100, 120).tolist() == PINNED
    assert np.allclose(I.draws(1, 2, 3)[0, :2], FIRST, atol=1e-15)


PINNED, FIRST = [[12, 21, 86, 75, 0], [34, 29, 59, 57, 0]], [0.49558327162044613, 0.8702374432809391]


def test_bad_arguments(folders, cache):
    for pixels in (7, 2000, 64.0):
        with pytest.raises(ElaError, match=f"pixels is {pixels}.*from 8 to 1024"): load(folders, cache, pixels=pixels)
    for flag in ("check", "in_memory", "progress"):
        with pytest.raises(ElaError, match=f"{flag} is 'no'"): load(folders, cache, **{flag: "no"})
    data = load(folders, cache)
    for args, message in (({"batch_size": 19}, "choose 1 to 18"), ({"batch_size": 9, "shard": (0, 2)}, "9 images cannot be shared by 2 processes"), ({"batch_size": 20, "shard": (0, 2)}, "10 on 2 processes does not fit.*choose 1 to 9"), ({"batch_size": 0}, "batch size 0"),
                          ({"limit": 19}, "the set has 18"), ({"shard": (2, 2)}, "number of this process is 2"), ({"shard": (0, 0)}, "number of processes is 0"), ({"workers": -1}, "workers is -1")):
        with pytest.raises(ElaError, match=message): data.train_batches(**{"batch_size": 2, "device": "cpu", "seed": 0, **args})


def test_sets_can_be_sent_to_processes(folders, cache):
    write_nette(folders/"imagenette")
    for name in ("imagenet", "imagenette"):
        data = load(folders, cache, name)
        assert same(data.train_batches(4, "cpu", 0, workers=0).epoch(), pickle.loads(pickle.dumps(data)).train_batches(4, "cpu", 0, workers=0).epoch())


def test_decode_rate(folders, cache):
    write_nette(folders/"imagenette")
    threads = torch.get_num_threads()
    for name in ("imagenet", "imagenette"): assert I.decode_rate(load(folders, cache, name), 0.05) > 1
    assert torch.get_num_threads() == threads


def test_import_is_cheap():
    code = "import sys, ela_repro.imagenet; sys.exit('torchvision' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


@pytest.mark.gpu
def test_gpu_sees_what_a_cpu_sees(folders, cache):
    write_nette(folders/"imagenette")
    as_on_cpu = lambda a, b: all(torch.equal(x, x2.cpu()) and torch.equal(y, y2.cpu()) for (x, y), (x2, y2) in zip(a, b, strict=True))
    for name in ("imagenet", "imagenette"):
        data = load(folders, cache, name)
        gpu = data.train_batches(4, "cuda", 0, workers=2)
        for epoch in (0, 1): assert as_on_cpu(data.train_batches(4, "cpu", 0, workers=0).epoch(epoch), gpu.epoch(epoch))
        assert as_on_cpu(data.test_batches(4, "cpu", workers=0).epoch(), data.test_batches(4, "cuda", workers=2).epoch())
        assert torch.equal(data.probe_images(4, "cpu"), data.probe_images(4, "cuda").cpu())
    other = data.train_batches(4, "cuda:0", 1)
    assert other.images.data_ptr() == gpu.images.data_ptr()  # one copy


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_crops_are_exact_on_a_gpu(precision):
    "Whatever the precision of matrix products, and without waiting for the device."
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 128, 128), dtype=np.uint8))
    box, before = torch.from_numpy(I.boxes(I.draws(0, 0, 0, 64), 128, 128)), torch.get_float32_matmul_precision()
    there, box_there = images.cuda(), box.cuda()
    try:
        torch.set_float32_matmul_precision(precision)
        I.crop_resize(there, box_there, 64)
        torch.cuda.set_sync_debug_mode("error")
        ours = [I.crop_resize(there, box_there, pixels) for pixels in (64, 128, 160)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(before)
    for pixels, view in zip((64, 128, 160), ours): assert torch.equal(view.cpu(), I.crop_resize(images, box, pixels))
