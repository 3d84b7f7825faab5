"Many records: what lists them stays quick, and being quick lets no altered file pass."
import json
import random
import shutil
from pathlib import Path

import pytest
from scale import LIMITS, PROFILE, RECORDS, fill, full_record, timed
from typer.testing import CliRunner

from ela_repro import core, runs
from ela_repro.batch import app
from ela_repro.core import CorruptFileError, intact_seal, read_json, write_json
from ela_repro.runs import Header, Store, make_spec, read_header

COUNT = 300
SPEC = make_spec("quick", "ela")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "A results folder with COUNT records, and their seeds."
    out = tmp_path_factory.mktemp("many")
    return out, fill(out, COUNT)


@pytest.fixture
def store(tmp_path):
    "A store with one record, that of SPEC."
    store = Store("quick", tmp_path)
    store.save(full_record(SPEC))
    return store


@pytest.mark.slow
@pytest.mark.parametrize("command", LIMITS)
def test_commands_are_quick(command, full):
    seconds, said = timed(command, *full)
    start = 0.5  # s for Python and its libraries, ten times as much where they draw and test
    limit = start*(10 if command == "report" else 1) + LIMITS[command]*COUNT/RECORDS
    assert seconds < 2*limit, said  # twice, for a slower machine, or one whose caches other work uses


def test_status_counts_them_all_and_names_the_damaged_one(full, tmp_path):
    out = tmp_path/"results"
    shutil.copytree(full[0], out)
    path = sorted((out/PROFILE/"runs").glob("*.json"))[7]
    assert "corrupt:" not in timed("status", out, full[1])[1]
    path.write_text(path.read_text().replace('"test_accuracy":0.', '"test_accuracy":0.9', 1))
    said = timed("status", out, full[1])[1]
    assert said.count("corrupt:") == 1 and path.stem in said and "does not match its checksum" in said


def test_headers_are_those_of_the_records(full):
    store = Store(PROFILE, full[0])
    records, headers = store.records(), store.headers()
    assert headers == ([Header(r.id, r.spec, r.status) for r in records[0]], []) and len(headers[0]) == COUNT


def test_a_sound_record_is_listed_without_being_parsed(full, monkeypatch):
    def refuse(*_, **__): pytest.fail("a sound record was read in full")
    monkeypatch.setattr(runs, "read_json", refuse)
    assert len(Store(PROFILE, full[0]).headers()[0]) == COUNT


def test_no_changed_byte_passes(store):
    draw, data = random.Random(0), store.path(SPEC).read_bytes()
    assert intact_seal(data) == json.loads(data)["sha256"]
    for place in [*range(100), *range(len(data) - 1000, len(data)), *draw.sample(range(len(data)), 1000)]:
        altered = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1:]
        assert intact_seal(altered) is None and read_header(altered) is None, place
        shorter = data[:place] + data[place + 1:]
        assert intact_seal(shorter) is None and read_header(shorter) is None, place


def test_what_the_header_passes_a_full_reading_passes(store):
    "And what a full reading refuses, for whatever reason, `headers` refuses in the same words."
    draw, path = random.Random(1), store.path(SPEC)
    data = path.read_bytes()
    for place in draw.sample(range(len(data)), 60):
        path.write_bytes(data[:place] + bytes([draw.randrange(256)]) + data[place + 1:])
        assert ([h.id for h in store.headers()[0]], store.headers()[1]) == ([r.id for r in store.records()[0]], store.records()[1])


SEALED_ANEW = {
    "part missing": lambda o: o.pop("rows"), "part of another kind": lambda o: o.update(epochs="180"), "unknown status": lambda o: o.update(status="excellent"), "another format": lambda o: o.update(format=4),
    "another id": lambda o: o.update(id="0"*16), "garbage for a spec": lambda o: o.update(spec=[]), "spec of another version": lambda o: o["spec"].update(colour="blue"),
}


@pytest.mark.parametrize("change", SEALED_ANEW.values(), ids=SEALED_ANEW)
def test_a_true_seal_on_a_wrong_record_does_not_make_a_header(change, store):
    obj = read_json(store.path(SPEC), sealed=True)
    change(obj)
    path = write_json(store.path(SPEC), obj, sealed=True)
    assert intact_seal(path.read_bytes()) and read_header(path.read_bytes()) is None


def test_a_record_under_another_name_is_refused(store):
    other = make_spec("quick", "ela", seed=5)
    shutil.copy(store.path(SPEC), store.path(other))
    with pytest.raises(CorruptFileError, match=f"holds the record of the run {SPEC.id}"): store.get(other)
    assert store.state(other) == "corrupt" and store.state(SPEC) == "done"
    for records, problems in (store.records(), store.headers()): assert [r.id for r in records] == [SPEC.id] and other.id in problems[0]


def test_a_file_laid_out_anew_is_as_good_and_one_with_nan_is_not(store):
    path, record = store.path(SPEC), store.get(SPEC)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2))
    assert intact_seal(path.read_bytes()) is None and store.get(SPEC) == record and store.headers()[0] == [Header(record.id, SPEC, "done")]
    obj = {**record.to_json(), "peak_memory_bytes": float("nan")}
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    seal = core.hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps({**obj, "sha256": seal}, sort_keys=True, separators=(",", ":")) + "\n")
    assert intact_seal(path.read_bytes()) is None and store.state(SPEC) == "corrupt" and store.headers()[0] == []


def test_a_seal_inside_is_not_the_seal(tmp_path):
    inner = {"sha256": "0"*64, "z": 1}
    path = write_json(tmp_path/"a.json", {"a": inner, "z": inner}, sealed=True)
    assert read_json(path, sealed=True) == {"a": inner, "z": inner}
    assert read_json(write_json(tmp_path/"b.json", {"a": inner}, sealed=True), sealed=True) == {"a": inner}
    assert Path(path).read_text().count("sha256") == 3


def test_records_that_nobody_asked_for_do_not_drown_the_rest(tmp_path):
    store = Store("quick", tmp_path)
    for seed in range(101, 126): store.save(full_record(make_spec("quick", "plain", seed=seed)))
    def said(*seeds): return CliRunner().invoke(app, ["status", "--out", str(tmp_path), *seeds]).output
    assert said().count("extra:") == 20 and "and 5 more records" in said()
    assert said("--seeds", "120-125").count("extra:") == 19 and "more records" not in said("--seeds", "120-125")
    assert "extra:" not in said("--seeds", "101-125")  # the seeds that were asked for are no surplus
