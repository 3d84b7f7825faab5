"""Disks that are full, files that are cut short or have flipped bits, clocks that are set back: nothing half, nothing stale, nothing silently wrong."""
import json
import os
import random
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from drills import drill_commands, drill_interrupts, strays
from small_suite import SHOWN, write_notebooks
from test_data import mosaics, sample, same, write_official  # noqa: F401 (fixtures)
from test_faults import start
from test_runs import SPEC, record

from ela_repro import batch, core, runs
from ela_repro import data as D
from ela_repro.core import CorruptFileError, ElaError, sweep, write_atomic
from ela_repro.engine import load_checkpoint, save_checkpoint
from ela_repro.runs import RunSpec, Store
from ela_repro.tables import Table, save_table

PLAIN = RunSpec(dataset="cifar10-sample", model="cifar_basic_resnet20", epochs=2, batch_size=32, lr=0.01, width=0.25, train_images=64, precision="float32")


# ---- a full disk

@pytest.fixture
def disk(tmp_path):
    "A disk of 1 MiB, and a function that fills it."
    folder = tmp_path/"disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode: pytest.skip("mounting is not permitted here")

    def fill():
        with open(folder/"filler", "wb", buffering=0) as f:
            try:
                while f.write(bytes(4096)): pass
            except OSError: pass
    yield folder, fill
    subprocess.run(["umount", "-l", folder], check=True)


def everything(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "filler" and p.parent.name != "locks"}


def table(): return Table("t", pd.DataFrame({"text": ["x"*3000]*20}), "A table", "quick")


WRITERS = {"record": lambda top: Store("quick", top).save(record(SPEC)), "checkpoint": lambda top: save_checkpoint(top/"quick"/"checkpoints"/"c.pt", {"w": torch.zeros(100_000)}),
           "table": lambda top: save_table(table(), top/"quick"), "failure note": lambda top: Store("quick", top).fail(SPEC, "why"*5000)}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_leaves_nothing_half(what, disk):
    top, fill = disk
    for folder in ("runs", "checkpoints", "tables"): (top/"quick"/folder).mkdir(parents=True)
    Store("quick", top).save(record(replace(SPEC, seed=1)))
    fill()
    before = everything(top)
    with pytest.raises(ElaError, match=f"cannot write {top}.*No space left.*Free space.*--out"): WRITERS[what](top)
    assert everything(top) == before and not strays(top)
    assert Store("quick", top).get(replace(SPEC, seed=1)) == record(replace(SPEC, seed=1))
    (top/"filler").unlink()
    WRITERS[what](top)
    assert len(everything(top)) > len(before)


@pytest.mark.slow
def test_a_run_on_a_full_disk_fails_in_words_and_goes_on_later(disk):
    top, fill = disk
    Store("quick", top).save(record(SPEC))
    fill()
    said = []
    assert runs.ensure([PLAIN, SPEC], "quick", top, "cpu", progress=said.append, raise_failures=False) == [record(SPEC)]
    assert [e["kind"] for e in said if e["id"] == PLAIN.id][-1] == "failed" and "No space left" in said[-1]["message"] and str(top) in said[-1]["message"]
    assert not [s for s in strays(top) if s.endswith(".part")]
    (top/"filler").unlink()
    [done] = runs.ensure([PLAIN], "quick", top, "cpu", progress=said.append)
    assert done.status == "done" and not strays(top)


@pytest.mark.slow
def test_a_notebook_on_a_full_disk_fails_in_words_and_goes_on_later(disk, tmp_path, monkeypatch):
    top, fill = disk
    monkeypatch.setenv("PYTHONPATH", str(core.ROOT))
    nbs = write_notebooks(tmp_path/"nbs", skip_pattern="print('x'*50_000)")
    job = batch.Job("skip_pattern", str(nbs/runs.EXPERIMENTS["skip_pattern"].notebook), str(top/"quick"))
    for folder in ("locks", "logs", "notebooks"): (top/"quick"/folder).mkdir(parents=True)
    fill()
    [outcome] = batch.run_jobs([job])
    assert outcome.status == "failed" and "No space left" in outcome.message and "Free space" in outcome.message, outcome
    assert not job.output.exists() and not job.log.exists() and not strays(top)
    (top/"filler").unlink()
    [outcome] = batch.run_jobs([job])
    assert outcome.status == "done" and batch.is_current(job)


# ---- damage

def damaged(content: bytes, flips: int, seed: int = 0, cuts=None):
    "`content` cut to every length in `cuts` (default: all), and with random bits flipped."
    draw = random.Random(seed)
    for n in range(len(content)) if cuts is None else cuts: yield content[:n]
    for _ in range(flips):
        at = draw.randrange(len(content))
        yield content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1:]


def refused_or_equal(path, contents, read, equal) -> int:
    "Write each of `contents` to `path` and read it: an `ElaError`, or what was there before. Returns how many were refused."
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try: assert equal(read())
        except ElaError: refused += 1
    return refused


def test_a_damaged_record_is_never_read_as_another(tmp_path):
    store, whole = Store("quick", tmp_path), record(replace(SPEC, epochs=3))
    path = store.save(whole)
    content = path.read_bytes()
    assert refused_or_equal(path, damaged(content, 400), lambda: store.get(whole.spec), whole.__eq__) >= len(content) + 390


def test_a_damaged_checkpoint_is_never_read(tmp_path):
    path = tmp_path/"c.pt"
    save_checkpoint(path, {"a": torch.arange(5), "epochs": [{"loss": 0.5}]})
    content = path.read_bytes()
    assert refused_or_equal(path, damaged(content, 300), lambda: load_checkpoint(path), lambda _: False) == len(content) + 300


def test_a_sealed_checkpoint_of_garbage_is_refused(tmp_path):
    "The checksum is right, the content is none: random bytes, and a checkpoint damaged before it was sealed."
    import hashlib

    path, draw = tmp_path/"c.pt", random.Random(0)
    save_checkpoint(path, {"a": torch.arange(5), "epochs": [{"loss": 0.5}]})
    payload = path.read_bytes()[32:]
    for garbage in [draw.randbytes(draw.randrange(200)) for _ in range(100)] + list(damaged(payload, 200, cuts=range(0, len(payload), 37))):
        path.write_bytes(hashlib.sha256(garbage).digest() + garbage)
        try: load_checkpoint(path)  # a flipped bit in a number is a number
        except CorruptFileError: pass


def test_a_damaged_mosaic_never_changes_a_pixel(mosaics):
    path, sha256 = mosaics/"test_00.webp", D.DATASETS["cifar10"].pixels["test"]
    read = lambda: D.read_split([path], 2500, sha256, "again")
    content, sound = path.read_bytes(), read()
    cuts = [*range(64), *range(64, len(content), max(1, len(content)//60)), len(content) - 1]
    assert refused_or_equal(path, damaged(content, 60, cuts=cuts), read, lambda found: torch.equal(found, sound)) > 100


def test_damaged_labels_are_never_read_as_others(mosaics):
    path = mosaics/"test_labels.npy"
    read = lambda: D.read_labels(path, 2500, D.DATASETS["cifar10"].labels["test"], "again")
    content, sound = path.read_bytes(), read()
    cuts = [*range(200), *range(200, len(content), 97)]
    header = list(damaged(content[:128], 300, cuts=()))
    assert refused_or_equal(path, [*damaged(content, 200, cuts=cuts), *(h + content[128:] for h in header)], read, lambda found: torch.equal(found, sound)) > 500


def test_damaged_official_files_are_never_read_as_others(tmp_path, monkeypatch, sample):
    few = replace(sample, name="cifar10", **{f"{s}_{p}": getattr(sample, f"{s}_{p}")[:10] for s in ("train", "test") for p in ("images", "labels")})
    folder = write_official(tmp_path, few, monkeypatch)

    def read():
        D.load_found.cache_clear()
        return D.load_dataset("cifar10", tmp_path)
    for name in ("data_batch_3", "test_batch", "batches.meta"):
        path = folder/name
        content = path.read_bytes()
        cuts = [*range(0, 64, 7), *range(64, len(content), max(1, len(content)//10))]
        refused = refused_or_equal(path, damaged(content, 40, cuts=cuts), read, lambda found: same(found, few))
        assert refused == len(cuts) + 40, name  # md5 sees every bit
        path.write_bytes(content)
    assert same(read(), few)


def test_a_renamed_record_is_refused(tmp_path):
    store = Store("quick", tmp_path)
    other = replace(SPEC, seed=1)
    shutil.copy(store.save(record(SPEC)), store.path(other))
    with pytest.raises(CorruptFileError, match=f"holds the record of the run {SPEC.id}"): store.get(other)
    assert store.records()[0] == [record(SPEC)] and store.state(other) == "corrupt"


# ---- what ended processes leave, and what living ones use

def test_leftovers_go_and_what_is_in_use_stays(tmp_path):
    store = Store("quick", tmp_path)
    store.save(record(SPEC))
    other = replace(SPEC, seed=1)
    for spec in (SPEC, other): write_atomic(store.checkpoint(spec), b"x")
    left = write_atomic(store.runs/".r.json.0123.part", "half")
    with store.lock(SPEC.id):  # --force trains it again
        store.tidy()
        assert store.checkpoint(SPEC).exists() and not left.exists()
    store.tidy()
    assert not store.checkpoint(SPEC).exists() and store.checkpoint(other).exists()  # the other goes on from it


def test_sweeping_never_costs_a_writer_its_file(tmp_path):
    end = time.monotonic() + 1

    def write(k):
        for i in range(10**9):
            if time.monotonic() > end: break
            write_atomic(tmp_path/f"{k}.txt", str(i)*100)
            assert (tmp_path/f"{k}.txt").read_text() == str(i)*100
        done.append(i)
    done, writers = [], []
    for k in range(2): writers.append(threading.Thread(target=write, args=(k,)))
    for w in writers: w.start()
    while time.monotonic() < end: sweep(tmp_path)
    for w in writers: w.join()
    assert len(done) == 2 and min(done) > 5 and not strays(tmp_path)


def test_two_batches_may_look_at_a_folder_at_once(tmp_path):
    problems = []

    def look():
        try:
            for _ in range(30): batch.check_writable(tmp_path, 0)
        except Exception as e: problems.append(e)
    both = [threading.Thread(target=look) for _ in range(3)]
    for t in both: t.start()
    for t in both: t.join()
    assert problems == []


@pytest.mark.slow
def test_reproduce_beside_reproduce(tmp_path):
    nbs = write_notebooks(tmp_path/"nbs")
    both = [start(nbs, "reproduce", "--out", tmp_path/"results", "--device", "cpu") for _ in range(2)]
    said = [p.communicate(timeout=600) for p in both]
    for process, words in zip(both, said): print(process.returncode, *words, sep="\n")  # whole, where it is not what it should be
    assert [p.returncode for p in both] == [0, 0]
    folder = tmp_path/"results"/"quick"
    assert sum(out.count("epoch 2/2") for out, _ in said) == len(runs.MAIN)  # each once
    assert len(Store("quick", tmp_path/"results").records()[0]) == len(runs.MAIN) and not strays(tmp_path)
    assert {p.stem for p in (folder/"notebooks").iterdir()} == set(SHOWN)
    for path in (folder/"notebooks").iterdir(): json.loads(path.read_text())
    for path in (folder/"tables").glob("*.csv"): assert path.read_text().count("done") == len(runs.MAIN) or path.stem != "cifar_accuracy"


# ---- a clock that is set back

def test_what_a_notebook_wrote_is_known_without_a_clock(tmp_path):
    folder = tmp_path/"quick"
    old, new, kept = (write_atomic(folder/"tables"/f"{n}.csv", "1") for n in ("old", "new", "kept"))
    for path in (old, kept): os.utime(path, (time.time() + 10**6,)*2)  # from the future
    before = batch.versions(folder)
    for path in (old, new): os.utime(write_atomic(path, "2"), (10**8,)*2)  # the clock has gone back to 1973
    write_atomic(folder/"index.html", "page")
    assert batch.written_by("skip_pattern", folder, before) == ["index.html", "tables/new.csv", "tables/old.csv"]


@pytest.mark.slow
def test_files_from_the_future_make_nothing_current_or_stale(tmp_path, monkeypatch):
    "Only contents decide: with all times a year ahead or back, the same is current, and what changed is not."
    monkeypatch.setenv("PYTHONPATH", str(core.ROOT))
    code = "from ela_repro.core import write_atomic\nwrite_atomic('{}', 'x')".format(tmp_path/"results"/"quick"/"tables"/"t.csv")
    nbs = write_notebooks(tmp_path/"nbs", skip_pattern=code)
    job = batch.Job("skip_pattern", str(nbs/runs.EXPERIMENTS["skip_pattern"].notebook), str(tmp_path/"results"/"quick"), {"seeds": "0"})
    [outcome] = batch.run_jobs([job])
    assert outcome.status == "done" and outcome.seconds >= 0 and batch.stamp(job.output)["outputs"] == ["tables/t.csv"]
    for shift in (3e7, -3e7):
        for path in tmp_path.rglob("*"): os.utime(path, (time.time() + shift,)*2)
        assert batch.is_current(job) and not batch.is_current(replace(job, parameters={"seeds": "1"}))
    (tmp_path/"results"/"quick"/"tables"/"t.csv").unlink()
    assert not batch.is_current(job)


def test_no_run_ends_before_it_starts(monkeypatch, tmp_path):
    moments = iter(["2026-01-01T12:00:00Z", *["2026-01-01T11:00:00Z"]*5])
    monkeypatch.setattr(runs, "utc_now", lambda: next(moments))
    monkeypatch.setattr(time, "time", lambda: 10**8 - time.perf_counter())  # runs backwards
    done = runs.train(PLAIN)
    assert done.provenance["started"] == done.provenance["finished"] == "2026-01-01T12:00:00Z"
    assert done.times["total_s"] > 0 and min(done.times["train_s"] + done.times["eval_s"]) >= 0
    Store("quick", tmp_path).save(done)
    assert Store("quick", tmp_path).get(PLAIN) == done


# ---- interrupts: `python tests/drills.py` is the long version

@pytest.mark.slow
def test_interrupts_in_this_process():
    seen, wrong = drill_interrupts(6, seed=1)
    assert seen["interrupts"] >= 6 and wrong == []


@pytest.mark.slow
def test_interrupted_commands():
    seen, wrong = drill_commands(1, seed=1)
    assert sum(n for k, n in seen.items() if k.startswith("exit code")) == 1 and wrong == []


def test_what_a_notebook_no_longer_makes_is_removed_and_nothing_else(tmp_path):
    folder = tmp_path/"quick"
    for place, name, experiment in (("figures", "gone", "skip_pattern"), ("figures", "kept", "skip_pattern"), ("tables", "other", "ebqm_ablation")):
        for suffix in ("json", "png" if place == "figures" else "csv"): write_atomic(folder/place/f"{name}.{suffix}", f'{{"experiment": "{experiment}"}}')
    write_atomic(folder/"figures"/"unknown.png", "nobody says whose it is")
    removed = batch.remove_left_behind("skip_pattern", folder, ["figures/kept.json", "figures/kept.png"])
    assert sorted(p.name for p in removed) == ["gone.json", "gone.png"]
    assert sorted(p.name for p in batch.result_files(folder)) == ["kept.json", "kept.png", "other.csv", "other.json", "unknown.png"]
