"""A run is its spec, a record is whole or refused, and `ensure` trains what is missing: no more, and whatever else fails."""
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ela_repro import runs
from ela_repro.core import CorruptFileError, ElaError
from ela_repro.runs import ABLATION, EXPERIMENTS, PROFILES, RECIPE_VERSION, RunRecord, RunSpec, Store, comparable, ensure, experiment_specs, load_records, make_spec, print_event, reference_spec, variant_specs, with_references

few = settings(max_examples=60, derandomize=True, deadline=None)
FIELDS = [f.name for f in dataclasses.fields(RunSpec)]
EBQM = dict(attention="ela", policy="ebqm")


# ---- identity

def test_ids_never_change():
    "They are the names of committed records. A new field needs a default that leaves old ids alone, or a new RECIPE_VERSION and records."
    assert RunSpec(recipe_version=1).id == "b7a1b4fbfd6b04fe"
    spec = RunSpec(**EBQM, policy_args={"tau": None, "rho": 0.25}, skip="module", recipe="released", epochs=24, seed=3, recipe_version=1)
    assert spec.id == "b623015ef2c47cca"


def test_the_id_is_the_hash_of_the_spec_as_json():
    spec = RunSpec(**EBQM, policy_args={"rho": 0.25})
    fields = {k: v for k, v in dataclasses.asdict(spec).items() if k not in runs.LATER}  # those are left out at their defaults
    text = json.dumps({**fields, "policy_args": {"rho": 0.25}}, sort_keys=True, separators=(",", ":"))
    assert spec.id == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_every_field_is_part_of_the_identity():
    base = RunSpec(**EBQM)
    other = dict(dataset="cifar10", model="cifar_resnet20", attention="mrla_b", policy="bqm", policy_args={"rho": 0.25}, skip="module", recipe="released", epochs=7, batch_size=64, lr=0.2,
                 momentum=0.8, weight_decay=1e-3, lr_schedule="cosine", warmup_epochs=2, width=0.5, train_images=1000, holdout=50, precision="float32", pixels=64, label_smoothing=0.1, accumulation=2, sync_bn=True, seed=1, recipe_version=RECIPE_VERSION + 1)
    detecting = dict(dataset="coco", model="resnet50", detector="mask_rcnn", backbone={"dataset": "imagenet"}, epochs=12)
    found = RunSpec(**EBQM, **detecting)
    of_detectors = dict(backbone={"dataset": "imagenette"}, iterations=1500, warmup_iterations=200, short_side=400, long_side=1000, pyramid=64, regions=64)
    assert set(other) | set(of_detectors) | {"detector"} == set(FIELDS) and set(of_detectors) == set(runs.DETECTOR_FIELDS)
    variants = [dataclasses.replace(found, **{k: v}) for k, v in {**of_detectors, "detector": "faster_rcnn"}.items()]
    assert len({s.id for s in [found, *variants]}) == len(variants) + 1
    changed = [dataclasses.replace(base, **{k: v, **({"policy": "never"} if k == "attention" else {})}) for k, v in other.items()]
    assert len({s.id for s in [base, *changed]}) == len(other) + 1


@pytest.mark.parametrize("one, same", [
    (dict(attention=None), dict(attention="none")),
    (dict(attention="se", recipe="released", skip="module"), dict(attention="se")),                     # a recipe without layer attention is nothing
    (dict(attention="mrla_b", skip="module"), dict(attention="mrla_b")),                                # a skip mode without skipping neither
    (dict(attention="ela", skip="module"), dict(attention="ela")),                                      # policy `never`: as above
    (dict(lr=1, width=2, momentum=0), dict(lr=1.0, width=2.0, momentum=0.0)),                           # JSON knows one kind of number
    (dict(lr=-0.0), dict(lr=0.0)),
    (dict(**EBQM, policy_args={"rho": 0.2, "ema": 0.1}), dict(**EBQM, policy_args=(("ema", 0.1), ("rho", 0.2)))),
    (dict(**EBQM, policy_args={"rho": 1}), dict(**EBQM, policy_args={"rho": 1.0})),
    (dict(**EBQM, policy_args={"rho": 0.5, "updates": 10}), dict(**EBQM)),                              # the defaults, spelt out
    (dict(**EBQM, policy_args={}), dict(**EBQM)),
    (dict(attention="ela", policy="matched_random", policy_args={"fresh": True}), dict(attention="ela", policy="matched_random")),
    (dict(attention="ela", policy="fixed", policy_args={"mask": "alternate"}), dict(attention="ela", policy="fixed")),
])
def test_two_ways_to_say_the_same_are_one_run(one, same):
    assert RunSpec(**one) == RunSpec(**same) and RunSpec(**one).id == RunSpec(**same).id and hash(RunSpec(**one)) == hash(RunSpec(**same))


def test_two_runs_that_differ_are_not_merged():
    "An argument of the same name may have another default elsewhere."
    assert RunSpec(attention="ela", policy="bqm", policy_args={"warmup": 0.1}) != RunSpec(attention="ela", policy="bqm")
    assert RunSpec(**EBQM, policy_args={"tau": None}) != RunSpec(**EBQM)
    assert RunSpec(**EBQM, policy_args={"updates": None}) != RunSpec(**EBQM)


# ---- validation

numbers = st.integers(-3, 300) | st.integers(-10**40, 10**40) | st.floats() | st.sampled_from([1e400, -0.0, 5e-324])
words = st.text(max_size=8) | st.sampled_from(["ela", "ebqm", "fixed", "random", "matched_random", "module", "stable", "01", "deepest", "cosine", "cifar10"])
plain = st.none() | st.booleans() | numbers | words | st.binary(max_size=3)
garbage = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3) | st.tuples(inner, inner), max_leaves=5)
arguments = st.sampled_from(["mean", "concentration", "scale", "kind", "ema", "hysteresis", "low", "high", "tau", "rho", "warmup", "updates", "freeze", "rate", "mask", "fresh", "of"])
policies = st.sampled_from(sorted(runs.POLICIES))


def sound_or_refused(make):
    "An ElaError, or a spec on which everything works that the store and the tables ask of it."
    try: spec = make()
    except ElaError as e: return str(e)
    assert len(spec.id) == 16 and spec.label and spec.method
    assert spec in {spec}
    assert RunSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec
    assert RunSpec.from_dict(spec.to_dict()).id == spec.id
    if reference := reference_spec(spec): assert reference.policy == "ebqm" and reference_spec(reference) is None


@few
@given(st.dictionaries(st.sampled_from(FIELDS), garbage, max_size=3))
@example(dict(policy=[]))
@example(dict(dataset={}, attention={}))
@example(dict(epochs=True))
def test_a_spec_of_garbage_is_refused(fields): sound_or_refused(lambda: RunSpec(**fields))


@settings(few, max_examples=250)
@given(policy=policies, args=st.dictionaries(arguments, plain | garbage, max_size=2))
@example("ebqm", {"tau": math.inf})
@example("ebqm", {"hysteresis": [1]})
@example("ebqm", {"hysteresis": "no"})
@example("ebqm", {"kind": "forwards"})
@example("fixed", {"rate": math.nan})
@example("fixed", {"rate": "half"})
@example("matched_random", {"fresh": []})
@example("matched_random", {"fresh": 2})
@example("random", {"rate": "x"})
def test_policy_arguments_of_garbage_are_refused(policy, args): sound_or_refused(lambda: RunSpec(attention="ela", policy=policy, policy_args=args))


@few
@given(fields=st.dictionaries(st.sampled_from(FIELDS) | words, garbage, max_size=4), missing=st.sets(st.sampled_from(FIELDS), max_size=1))
def test_a_spec_read_from_garbage_is_refused(fields, missing):
    sound_or_refused(lambda: RunSpec.from_dict({k: v for k, v in ({**RunSpec().to_dict(), **fields}).items() if k not in missing}))


@pytest.mark.parametrize("fields, says", [
    (dict(policy="ebmq", attention="ela"), "did you mean 'ebqm'"), (dict(dataset="cifar-10"), "cifar10"), (dict(policy="ebqm"), "needs attention 'ela'"), (dict(policy_args={"rho": 0.5}), "takes none"),
    (dict(**EBQM, policy_args={"rhoo": 1}), "'rho'"), (dict(**EBQM, policy_args={"kind": "forwards"}), "'forward'"), (dict(epochs=0), "epochs is 0"), (dict(epochs=1.0), "epochs is 1.0"), (dict(lr="0.1"), "lr is '0.1'"),
    (dict(lr=float("nan")), "lr is nan"), (dict(seed=-1), "seed is -1"), (dict(epochs=2, warmup_epochs=2), "leaves nothing"), (dict(width=0), "width is 0"), (dict(train_images=10, batch_size=16), "batch"),
])
def test_what_cannot_be_trained_is_refused_with_its_name(fields, says):
    with pytest.raises(ElaError, match=says): RunSpec(**fields)


def test_specs_of_experiments():
    for name, profile in itertools.product(EXPERIMENTS, PROFILES):
        specs = experiment_specs(name, profile)
        assert len(set(specs)) == len(specs) == len({s.id for s in specs}) and (specs == []) == (name in ("method_cost", "speed", "report") or (name, profile) == ("schedule_choice", "paper"))
        scope = PROFILES[profile].scope(name)
        if not EXPERIMENTS[name].variants: assert {s.method for s in specs} == set(scope.methods or EXPERIMENTS[name].methods)
        assert {s.seed for s in specs} == set(scope.seeds if specs else ())
        for s in specs:
            own = scope.own.get(s.dataset, {})
            assert s.dataset in scope.datasets and s.model in ([own["model"]] if "model" in own else scope.models) and (s.epochs == own.get("epochs", scope.settings["epochs"]) or name == "schedule_choice")
        controls = [s for s in specs if s.method == "matched_random"]
        if not EXPERIMENTS[name].detector: assert not {reference_spec(s) for s in controls} - set(specs)  # what is replayed is trained for the same tables
    assert {s.seed for s in experiment_specs("cifar_accuracy", "reduced", (7,))} == {7}


def test_a_scope_changes_one_experiment_and_nothing_else():
    quick = PROFILES["quick"]
    assert quick.scope("cifar_accuracy") == quick and quick.scope("ebqm_ablation").models == ("cifar_basic_resnet20",)
    assert quick.scope("ebqm_ablation").settings == {**quick.settings, "train_images": 128} and "train_images" in quick.settings
    for p in PROFILES.values(): assert set(p.scopes) <= set(EXPERIMENTS)


@pytest.mark.parametrize("profile", ["quick", "reduced"])
def test_schedules_are_tried_on_images_that_no_final_run_is_judged_by(profile):
    rows, settings = variant_specs("schedule_choice", profile), PROFILES[profile].settings
    lengths = {s.epochs for v, specs in rows if v.group == "length" for s in specs}
    assert sorted(lengths) == [math.ceil(settings["epochs"]*factor) for factor in (0.5, 1, 2, 4)]
    tried = {(s.lr, s.lr_schedule, s.warmup_epochs) for v, specs in rows if v.group != "length" for s in specs}
    assert {(0.1, "step", 0), (0.4, "cosine", min(3, settings["epochs"] - 1))} <= tried and all(warmup < settings["epochs"] for *_, warmup in tried)
    assert {s.attention for v, specs in rows if v.group != "length" for s in specs} == {"none", "mrla_b"}
    assert all(s.holdout > 0 for _, specs in rows for s in specs)
    assert {s.holdout for e in EXPERIMENTS if e != "schedule_choice" for s in experiment_specs(e, profile)} == {0}


@pytest.mark.parametrize("profile", ["quick", "reduced"])
def test_each_way_to_skip_has_a_control_that_skips_as_much(profile):
    specs = experiment_specs("matched_control", profile)
    ways = lambda policy: {(s.recipe, dict(s.policy_args).get("scale", "relative"), s.skip) for s in specs if s.policy == policy}
    assert ways("ebqm") == ways("matched_random") and len(ways("ebqm")) == 4*len({s.recipe for s in specs})


@pytest.mark.parametrize("profile", PROFILES)
def test_every_variant_is_a_run_of_its_own(profile):
    rows = variant_specs("ebqm_ablation", profile)
    assert [v for v, _ in rows] == list(ABLATION) and len({s for _, specs in rows for s in specs}) == sum(len(specs) for _, specs in rows)
    assert [s for _, specs in rows for s in specs] == experiment_specs("ebqm_ablation", profile)
    for variant, specs in rows:
        for s in specs:
            changed = {k: v for k, v in s.to_dict().items() if v != replace(s, attention="ela", policy="ebqm", policy_args=(), skip="retrieval").to_dict()[k]}
            assert changed == {k: v for k, v in variant.fields.items()}, variant.label  # that one thing, and nothing else


def test_a_reference_comes_before_the_run_that_replays_it():
    specs = [make_spec("quick", m, seed=s) for m in ("matched_random", "plain", "ela") for s in (1, 0)]
    ordered = with_references(specs)
    assert len(ordered) == len(set(ordered)) == 6 and set(ordered) == set(specs)
    assert len(with_references(specs[:2])) == 4
    for s in specs[:2]: assert ordered.index(reference_spec(s)) < ordered.index(s)
    fresh = RunSpec(attention="ela", policy="matched_random", policy_args={"fresh": False, "rho": 0.25})
    assert reference_spec(fresh) == RunSpec(**EBQM, policy_args={"rho": 0.25}) and reference_spec(RunSpec(**EBQM)) is None
    place = RunSpec(attention="ela", policy="matched_position", policy_args={"first": "deepest", "rho": 0.25})
    assert reference_spec(place) == reference_spec(fresh) and RunSpec(attention="ela", policy="matched_position", policy_args={"first": "shallowest"}).policy_args == ()
    for wrong in ({"first": "middle"}, {"fresh": False}):
        with pytest.raises(ElaError): RunSpec(attention="ela", policy="matched_position", policy_args=wrong)


# ---- records

FINAL = {"test_accuracy": 0.5, "best_test_accuracy": 0.6, "best_epoch": 0, "test_loss": 1.5, "train_accuracy": 0.4, "skip_rate": 0.0, "parameters": 1000}
TIMES = {"total_s": 1.5, "train_s": [], "eval_s": [], "probe_s": [], "resumed_at": []}
MADE = {**dict.fromkeys(("version", "source_hash", "device", "data_source"), "made up"), "torch": "2", "data_digest": {"kind": "made up", "value": ""}, "started": "now", "finished": "then"}


def record(spec, status="done", **fields):
    epochs = [{"epoch": e, "lr": 0.1, "test_accuracy": 0.5} for e in range(spec.epochs)]
    return RunRecord(**{**dict(spec=spec, status=status, epochs=epochs, final=FINAL, stages=[2], updates=[], skip_mask="01", rows=[], memory=[[0], [0, 1]],
                               divergence={}, times=TIMES, peak_memory_bytes=None, provenance=MADE), **fields})


SPEC = RunSpec(dataset="cifar10-sample", **EBQM, policy_args={"rho": 0.25, "tau": None})


def test_a_record_reads_as_it_was_written(tmp_path):
    store, r = Store("quick", tmp_path), record(SPEC)
    path = store.save(r)
    assert path == tmp_path/"quick"/"runs"/f"{SPEC.id}.json"
    assert store.get(SPEC) == r and store.records() == ([r], []) and load_records("quick", tmp_path) == [r]
    assert json.loads(path.read_text())["id"] == SPEC.id


def test_what_is_compared_leaves_out_what_no_two_runs_share():
    a, b = record(SPEC), record(SPEC, times={**TIMES, "total_s": 9.0}, peak_memory_bytes=5, provenance={**MADE, "started": "x", "finished": "y"})
    assert comparable(a) == comparable(b)
    assert comparable(a) != comparable(record(SPEC, final={**FINAL, "test_accuracy": 0.6})) and comparable(a) != comparable(record(SPEC, provenance={**MADE, "torch": "3"}))


def altered(change):
    "The text of a record with its object changed and sealed anew."
    obj = record(SPEC).to_json()
    change(obj)
    seal = hashlib.sha256(json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**obj, "sha256": seal})


DAMAGE = {
    "cut short": lambda text: text[:len(text) // 2], "empty": lambda text: "", "a number changed": lambda text: text.replace("0.5", "0.9", 1), "no object": lambda text: "[1]", "not text": lambda text: b"\xff\xfe\x00",
    "without seal": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}),
    "another format": lambda text: altered(lambda o: o.update(format=4)), "a part missing": lambda text: altered(lambda o: o.pop("rows")), "another id": lambda text: altered(lambda o: o.update(id="0" * 16)),
    "a field too many": lambda text: altered(lambda o: o["spec"].update(colour="blue")), "a spec of garbage": lambda text: altered(lambda o: o["spec"].update(policy=[])), "no spec": lambda text: altered(lambda o: o.update(spec=5)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_refused_named_and_left_alone(damage, tmp_path):
    store, good = Store("quick", tmp_path), RunSpec(dataset="cifar10-sample")
    path = store.save(record(SPEC))
    store.save(record(good))
    text = damage(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    with pytest.raises(CorruptFileError, match=SPEC.id): store.get(SPEC)
    records, problems = store.records()
    assert [r.spec for r in records] == [good] and len(problems) == 1 and SPEC.id in problems[0]
    assert store.state(SPEC) == "corrupt" and store.state(good) == "done" and load_records("quick", tmp_path) == records
    events = []
    assert ensure([SPEC, good], "quick", tmp_path, "cpu", progress=events.append, raise_failures=False) == records
    assert [e["kind"] for e in events if e["id"] == SPEC.id] == ["failed"]
    assert path.read_bytes() == before  # only --force trains again what somebody may want to look at


def test_states_of_a_run(tmp_path):
    store = Store("quick", tmp_path)
    assert store.state(SPEC) == "missing" and store.get(SPEC) is None and store.failure(SPEC) is None and store.records() == ([], [])
    store.fail(SPEC, "no memory", "trace")
    assert store.state(SPEC) == "failed" and store.failure(SPEC) == "no memory" and store.records() == ([], [])
    store.save(record(SPEC, "diverged"))
    assert store.state(SPEC) == "diverged" and store.failure(SPEC) is None  # a result forgets earlier failures
    store.save(record(SPEC))
    store.fail(SPEC, "a second attempt failed")
    assert store.state(SPEC) == "done"  # the record is still whole
    with pytest.raises(ElaError, match="did you mean 'quick'"): Store("quik", tmp_path)


def test_records_of_an_older_recipe_are_kept_and_not_read(tmp_path, monkeypatch):
    store, old = Store("quick", tmp_path), record(SPEC)
    store.save(old)
    monkeypatch.setattr(runs, "RECIPE_VERSION", RECIPE_VERSION + 1)
    assert load_records("quick", tmp_path) == [] and store.stale(store.records()[0]) == [old]


def test_nan_is_never_written(tmp_path):
    store = Store("quick", tmp_path)
    with pytest.raises(ValueError): store.save(record(SPEC, final={"test_accuracy": float("nan")}))
    assert store.state(SPEC) == "missing" and list(store.runs.glob("*")) == []


# ---- ensure

TINY = dict(dataset="cifar10-sample", model="cifar_basic_resnet20", epochs=2, batch_size=32, lr=0.01, width=0.25, train_images=64, precision="float32")
CONTROL, PLAIN = RunSpec(**TINY, attention="ela", policy="matched_random"), RunSpec(**TINY)
HOPELESS = RunSpec(**{**TINY, "width": 0.3}, attention="mrla_b")  # 19 channels cannot be cut into heads of 5
ABSENT = RunSpec(**{**TINY, "dataset": "cifar100"})
DIVERGING = RunSpec(**{**TINY, "lr": 100.0, "momentum": 1.0, "seed": 1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "One worker process for a control, a plain net, one that cannot be built and one without data: events and records."
    top, events = tmp_path_factory.mktemp("results"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ELA_DATA", raising=False)
        patch.delenv("ELA_TRAIN", raising=False)
        records = ensure([CONTROL, HOPELESS, ABSENT, PLAIN], "quick", top, "cpu", jobs=1, progress=events.append, raise_failures=False)
    return top, events, records


def test_failing_runs_do_not_stop_the_others(trained):
    top, events, records = trained
    store = Store("quick", top)
    assert [r.spec for r in records] == [CONTROL, PLAIN] and all(r.status == "done" for r in records)
    assert [store.state(s) for s in (CONTROL, reference_spec(CONTROL), HOPELESS, ABSENT, PLAIN)] == ["done", "done", "failed", "missing", "done"]
    assert "heads" in store.failure(HOPELESS) and store.failure(ABSENT) is None  # nothing was tried without data
    last = {e["id"]: e for e in events}
    assert last[ABSENT.id]["kind"] == "failed" and "ELA_DATA" in last[ABSENT.id]["message"]
    assert not list((top/"quick"/"checkpoints").glob("*"))


def test_the_reference_is_trained_first_and_matched(trained):
    top, events, (control, _) = trained
    done = [e["id"] for e in events if e["kind"] == "done"]
    assert done.index(reference_spec(CONTROL).id) < done.index(CONTROL.id)
    reference = Store("quick", top).get(reference_spec(CONTROL))
    assert [u["epoch"] for u in control.updates] == [u["epoch"] for u in reference.updates] == [0]
    for ours, theirs in zip(control.updates, reference.updates):
        for a in (0, 3, 6): assert ours["mask"][a:a + 3].count("1") == theirs["mask"][a:a + 3].count("1")


@pytest.fixture
def replaced(trained, tmp_path):
    "A copy of the trained store whose EBQM run was trained anew and skips one layer more: store, the record of the control, that of the EBQM run as it was."
    shutil.copytree(trained[0]/"quick", tmp_path/"quick")
    store = Store("quick", tmp_path)
    control, before = store.get(CONTROL), store.get(reference_spec(CONTROL))
    anew = [{**u, "mask": "1".join(u["mask"].rsplit("0", 1))} for u in before.updates]
    store.save(replace(before, updates=anew))
    return store, control, before


def test_a_control_whose_ela_was_trained_anew_counts_as_missing(replaced, monkeypatch):
    store, control, before = replaced
    assert store.state(CONTROL) == "missing" and store.replaced(CONTROL) and not runs.is_finished(store, CONTROL, False)
    assert control.spec not in {r.spec for r in store.records()[0]} | {r.spec for r in load_records("quick", store.folder.parent)}
    assert store.state(before.spec) == store.state(PLAIN) == "done" and not store.replaced(PLAIN) and not store.replaced(ABSENT)
    monkeypatch.setenv("ELA_TRAIN", "0")
    with pytest.raises(runs.RunFailed, match="no record yet"): ensure([CONTROL], "quick", store.folder.parent, "cpu")
    store.save(before)  # what is there again is as good as ever
    assert store.get(CONTROL) == control and not store.replaced(CONTROL)
    store.path(before.spec).write_text("{")
    assert store.get(CONTROL) == control and control.spec in {r.spec for r in store.records()[0]}  # nothing is known of a damaged one


def test_a_control_whose_ela_was_trained_anew_is_trained_again(replaced, monkeypatch):
    store, control, before = replaced
    monkeypatch.delenv("ELA_TRAIN", raising=False)
    events = []
    [record] = ensure([CONTROL], "quick", store.folder.parent, "cpu", jobs=1, progress=events.append)
    assert any(e["kind"] == "message" and "trained anew" in e["message"] for e in events) and [e["id"] for e in events if e["kind"] == "done"] == [CONTROL.id]
    new = store.get(reference_spec(CONTROL))
    assert runs.replays(record, new) and not runs.replays(record, before) and record.provenance["started"] > control.provenance["finished"]


def test_controls_follow_an_ela_that_had_lost_its_record_and_decides_otherwise(replaced, monkeypatch):
    store, control, before = replaced
    monkeypatch.delenv("ELA_TRAIN", raising=False)
    control = replace(control, updates=[{**u, "mask": u["mask"].replace("1", "0")} for u in control.updates])  # of another machine, say
    store.save(control)
    store.path(before.spec).unlink()
    assert store.state(CONTROL) == "done"
    events = []
    [record] = ensure([CONTROL], "quick", store.folder.parent, "cpu", jobs=1, progress=events.append)
    assert [e["id"] for e in events if e["kind"] == "done"] == [before.id, CONTROL.id] and runs.replays(record, store.get(before.spec))
    assert comparable(record) == comparable(replaced[1])  # trained from the same seeds: what the first pair was


def test_events_tell_each_epoch_once_and_in_order(trained):
    _, events, _ = trained
    assert [(e["kind"], e["metrics"].get("epoch")) for e in events if e["id"] == PLAIN.id] == [("start", None), ("epoch", 0), ("epoch", 1), ("done", None)]
    for e in events: assert {"run", "id", "kind", "epochs", "metrics", "message"} <= set(e)


def test_a_record_says_what_made_it(trained):
    for r in trained[2]:
        assert r.provenance["data_source"] == "sample" and r.provenance["data_digest"] and r.provenance["device"] == "cpu" and r.provenance["source_hash"]
        assert r.final["test_accuracy"] == r.epochs[-1]["test_accuracy"] and len(r.epochs) == 2 and r.peak_memory_bytes is None


def test_what_has_a_record_is_not_trained_again(trained):
    top, _, records = trained
    events = []
    assert ensure([PLAIN, CONTROL, PLAIN], "quick", top, "cpu", progress=events.append) == [records[1], records[0], records[1]]
    assert {e["kind"] for e in events} == {"cached"} and len(events) == 3  # two and the reference


def test_failures_are_raised_together_at_the_end(trained, monkeypatch):
    monkeypatch.delenv("ELA_DATA", raising=False)
    with pytest.raises(runs.RunFailed, match="1 of 2 runs failed.*cifar100.*ELA_DATA"): ensure([ABSENT, PLAIN], "quick", trained[0], "cpu", progress=lambda e: None)


def test_elatrain_0_only_reads(trained, monkeypatch):
    monkeypatch.setenv("ELA_TRAIN", "0")
    monkeypatch.setattr(runs, "_train_all", lambda *args: pytest.fail("it trains"))
    missing = RunSpec(**{**TINY, "seed": 5})
    said = []
    assert ensure([missing, PLAIN, HOPELESS], "quick", trained[0], "cpu", progress=said.append, raise_failures=False) == [trained[2][1]]
    with pytest.raises(runs.RunFailed, match="2 of 3.*no record yet.*heads"): ensure([missing, PLAIN, HOPELESS], "quick", trained[0], "cpu", progress=said.append)
    assert ensure([PLAIN], "quick", trained[0], "cpu", force=True, progress=said.append) == [trained[2][1]]  # what has a record is there, forced or not
    assert Store("quick", trained[0]).state(missing) == "missing"


def test_a_control_is_not_trained_when_its_reference_cannot_be(tmp_path):
    store = Store("quick", tmp_path)
    store.save(record(reference_spec(CONTROL))).write_text("{")
    events = []
    assert ensure([CONTROL], "quick", tmp_path, "cpu", progress=events.append, raise_failures=False) == []
    assert [(e["id"], e["kind"]) for e in events] == [(reference_spec(CONTROL).id, "failed"), (CONTROL.id, "failed")] and "which failed" in events[-1]["message"]


class FakePool:
    "Four workers that finish in the order they started; `bad` fails."
    log, bad, has_room = [], (), True
    def __init__(self, jobs, devices): self.busy = []
    def start(self, task):
        self.log.append(("start", task["spec"]))
        self.busy.append(task["spec"])
        self.store = Store(task["profile"], task["out"])
    def events(self):
        spec = self.busy.pop(0)
        self.log.append(("end", spec))
        if spec not in self.bad: self.store.save(record(spec))
        yield spec, {"kind": "failed" if spec in self.bad else "done", "metrics": {}, "message": "bad luck", "trace": ""}
    def close(self): self.log.append("closed")


def in_turns(tasks, top):
    "Train the tasks as one worker would; the events."
    said = []
    members = [runs._Member(said.append, spec=s, others=0, profile="quick", out=str(top), device="cpu", data="", force=False) for s in tasks]
    while members:
        for m in list(members):
            if not m.advance(len(members)): members.remove(m)
    return said


def test_runs_trained_in_turns_leave_the_records_of_runs_trained_alone(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("ELA_DATA", raising=False)
    reference = reference_spec(CONTROL)
    said = in_turns([PLAIN, DIVERGING, reference, ABSENT, HOPELESS], tmp_path)
    assert {e["id"]: e["kind"] for e in said} == {PLAIN.id: "done", DIVERGING.id: "diverged", reference.id: "done", ABSENT.id: "failed", HOPELESS.id: "failed"}
    store, alone = Store("quick", tmp_path), Store("quick", trained[0])
    for spec in (PLAIN, reference):
        assert comparable(store.get(spec)) == comparable(alone.get(spec))
        assert store.get(spec).times["at_once"] == 5 and store.get(spec).peak_memory_bytes is None
    assert not list(store.folder.glob("checkpoints/*"))


def starved(hidden):
    "A training that finds no memory in its second step; `hidden`: it is told of by the error of the recording that it ended."
    def want():
        try: raise torch.OutOfMemoryError("not enough")
        finally:
            if hidden: raise RuntimeError("capture failed")

    class Starved(runs.SpecTraining):
        def advance(self, at_once=1):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 2: want()
            return super().advance(at_once)
    return Starved


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("hidden", [False, True])
def test_want_of_memory_puts_a_run_off_where_another_has_it_and_fails_it_where_none_has(members, hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SpecTraining", starved(hidden))
    said = in_turns([PLAIN, replace(PLAIN, seed=1)][:members], tmp_path)
    assert [e["kind"] for e in said if e["kind"] in runs.ENDS] == ["postponed", "failed"][2 - members:]  # the second one is alone by then
    assert not list(Store("quick", tmp_path).folder.glob("runs/*"))


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_has_ended_keeps_no_memory(ends, tmp_path, monkeypatch):
    "Neither a whole one nor one that failed, although whoever trained it still holds the member."
    if not ends: monkeypatch.setattr(runs, "SpecTraining", starved(True))
    member, kept = runs._Member([].append, spec=PLAIN, others=0, profile="quick", out=str(tmp_path), device="cpu", data="", force=False), None
    while member.advance(1): kept = kept or weakref.ref(member.training.training.run.model)
    assert kept and kept() is None


def test_a_run_that_was_put_off_is_trained_later(tmp_path, monkeypatch):
    class Fake(FakePool):
        first = True
        def events(self):
            spec = self.busy[0]
            if self.first and spec == PLAIN:
                self.first = False
                yield self.busy.pop(0), {"kind": "postponed", "message": "later"}
            else: yield from super().events()
    monkeypatch.setattr(runs, "_Pool", Fake)
    monkeypatch.setattr(FakePool, "log", log := [])
    events = []
    found = ensure([PLAIN, replace(PLAIN, seed=1)], "quick", tmp_path, "cpu", progress=events.append)
    assert [r.spec for r in found] == [PLAIN, replace(PLAIN, seed=1)] and log.count(("start", PLAIN)) == 2
    assert [(e["kind"], e["message"]) for e in events if e["id"] == PLAIN.id][0] == ("message", "later")


def pool_for(monkeypatch, jobs, devices):
    "A pool whose workers are this test: what each is sent is read from the other end of its pipe; the ends, by device."
    class Process:
        exitcode = -9
        def join(self, seconds): pass
    pool, ends = runs._Pool(jobs, devices), {}
    def new_worker(device):
        ours, ends[device] = multiprocessing.Pipe()
        pool.workers.append(runs._Process(Process(), ours, device, {}, most=-(-jobs//len(devices))))
        return pool.workers[-1]
    monkeypatch.setattr(pool, "_new_worker", new_worker)
    return pool, ends


def test_every_gpu_gets_a_worker_before_one_gets_a_second_run(monkeypatch):
    pool, ends = pool_for(monkeypatch, 5, ["cuda:0", "cuda:1"])
    specs = [replace(PLAIN, seed=i) for i in range(6)]
    for spec in specs[:2]: pool.start({"spec": spec})
    assert [end.recv() for end in ends.values()] == [{"spec": s, "device": d, "others": 0} for s, d in zip(specs, ("cuda:0", "cuda:1"))]
    assert not pool.has_room
    for end in ends.values(): end.send(dict(id=None, kind="room", runs=9))
    while any(w.room == 1 for w in pool.workers): assert list(pool.events()) == []
    for spec in specs[2:5]:
        assert pool.has_room
        pool.start({"spec": spec})
    assert [len(w.runs) for w in pool.workers] == [3, 2] and not pool.has_room  # five in all, shared evenly
    ends["cuda:0"].send(dict(id=specs[0].id, kind="done", metrics={}, message=""))
    assert [s for s, _ in pool.events()] == [specs[0]] and pool.has_room
    ends["cuda:1"].close()
    assert {s: e["kind"] for s, e in pool.events()} == {specs[1]: "failed", specs[3]: "failed"}
    pool.start({"spec": specs[5]})
    assert [w.device for w in pool.workers] == ["cuda:0", "cuda:1"] and pool.workers[1].runs == {specs[5].id: specs[5]}, "a dead worker's GPU is used again"


def test_a_gpu_takes_in_as_many_runs_as_its_worker_has_room_for(monkeypatch):
    pool, ends = pool_for(monkeypatch, 4, ["cuda:0"])
    specs = [replace(PLAIN, seed=i) for i in range(4)]
    waiting = list(specs)
    def start():
        pool.start({"spec": waiting.pop(0)})
        assert ends["cuda:0"].recv() == {"spec": pool.busy[-1], "device": "cuda:0", "others": 0}
    def tell(**event):
        ends["cuda:0"].send(event)
        return list(pool.events())
    start()
    assert not pool.has_room and len(pool.workers) == 1
    assert tell(id=None, kind="room", runs=3) == [] and pool.has_room
    start(), start()
    assert not pool.has_room and pool.busy == specs[:3]
    assert [s for s, _ in tell(id=specs[2].id, kind="postponed", message="")] == [specs[2]] and pool.busy == specs[:2]
    assert tell(id=None, kind="room", runs=8) == [] and not pool.has_room, "what had no memory once is not tried again beside as many"
    assert [s for s, _ in tell(id=specs[0].id, kind="done", metrics={}, message="")] == [specs[0]] and pool.has_room
    start()
    ends["cuda:0"].close()
    assert [(s, e["kind"], "code -9" in e["message"]) for s, e in pool.events()] == [(specs[1], "failed", True), (specs[3], "failed", True)]
    assert pool.workers == [] and pool.has_room


def test_room_is_for_half_of_what_would_fit_and_never_for_the_last_tenth():
    class Gpu:
        settled, device = True, "cuda"
    def asked(*free, total=100, settled=True):
        said, left = [], iter(free)
        room = runs._Room(said.append)
        room._memory = lambda device: (next(left), total)
        room.joined("cuda")
        member = Gpu()
        member.settled = settled
        room.look({"a": member})
        room.look({"a": member})  # it asks once for each run that joined
        return [e["runs"] for e in said]
    assert asked(100, 90) == [1 + 4]    # 80 above the tenth that stays free: 8 would fit
    assert asked(100, 60) == [1 + 1]    # one fits
    assert asked(100, 45) == []         # 35 are left, 55 are needed
    assert asked(100, 90, settled=False) == []
    runs._Room(pytest.fail).look({})


@pytest.mark.parametrize("fails", [False, True])
def test_a_control_waits_for_its_reference_though_workers_are_idle(fails, tmp_path, monkeypatch):
    reference = reference_spec(CONTROL)
    monkeypatch.setattr(runs, "_Pool", FakePool)
    monkeypatch.setattr(FakePool, "log", log := [])
    monkeypatch.setattr(FakePool, "bad", (reference,) if fails else ())
    found = ensure([CONTROL, PLAIN], "quick", tmp_path, "cpu", jobs=4, progress=lambda e: None, raise_failures=False)
    assert log[:3] == [("start", reference), ("start", PLAIN), ("end", reference)] and log[-1] == "closed"
    assert (("start", CONTROL) in log) is not fails and [r.spec for r in found] == ([PLAIN] if fails else [CONTROL, PLAIN])
    if fails: assert "which failed" in Store("quick", tmp_path).failure(CONTROL)


def test_a_run_repeats_and_diverges_in_order(trained, tmp_path, capsys):
    "In this process: the number does not depend on who trains; the default progress can print what is no number."
    again = runs.train(PLAIN)
    assert comparable(again) == comparable(trained[2][1]) and torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
    events = []
    lost = runs.train(DIVERGING, checkpoint=tmp_path/"c.pt", on_epoch=lambda m: events.append({"run": "x", "kind": "epoch", "epochs": 2, "metrics": m, "message": ""}))
    assert lost.status == "diverged" and lost.final["test_accuracy"] is None
    store = Store("quick", tmp_path)
    store.save(lost)
    assert store.get(DIVERGING) == lost and store.state(DIVERGING) == "diverged"
    assert events[-1]["metrics"]["train_loss"] is None
    for e in [*events, {**events[-1], "kind": "diverged"}]: print_event(e)
    assert "x  diverged" in capsys.readouterr().out


def test_every_committed_record_reads():
    "A stricter reading must not throw away what was trained before it."
    from ela_repro.core import ROOT

    for profile in ("reduced", "paper"):
        good, problems = Store(profile, ROOT/"results").records()
        assert problems == [] and len(good) == len(list((ROOT/"results"/profile/"runs").glob("*.json")))


def test_worker_processes_may_have_children():
    "Photographs are loaded by processes of the one that trains."
    pool = runs._Pool(1, ["cpu"])
    try: assert not pool._new_worker("cpu").process.daemon
    finally: pool.close()
    assert not pool.workers[0].process.is_alive()


def test_workers_end_before_their_pipes_are_closed():
    "One that is busy would find nobody to tell, and say so with a traceback."
    told = []
    class Told:
        def __init__(self, name): self.name = name
        def __getattr__(self, what): return lambda *args: told.append(f"{what} {self.name}")
    pool = runs._Pool(2, ["cpu"])
    pool.workers = [runs._Process(Told(f"process {i}"), Told(f"pipe {i}"), "cpu", {}) for i in range(2)]
    pool.close()
    assert told[:2] == ["terminate process 0", "terminate process 1"]
    for i in range(2): assert told.index(f"join process {i}") < told.index(f"close pipe {i}")


@pytest.mark.parametrize("part, field, wrong", [("epochs", "skip_rate_per_stage", [0.5, 2.0]), ("epochs", "skip_rate_per_stage", [0.5]), ("epochs", "skip_rate_per_stage", True), ("updates", "fit", [1.0]), ("updates", "fit", "0"), ("updates", "fit", [1.0, None])])
def test_what_only_some_records_have_is_checked_where_it_is(part, field, wrong):
    from ela_repro.examples import example_record
    made = example_record(replace(SPEC, attention="ela", policy="ebqm", model="cifar_resnet20"))
    sound = {"skip_rate_per_stage": [0.5]*len(made.stages), "fit": [1.0, 2.0]}[field]
    def altered(value): return replace(made, **{part: [{**row, field: value} for row in getattr(made, part)]})
    assert runs.wrong_parts(altered(sound)) == runs.wrong_parts(altered(None)) == [] and runs.wrong_parts(altered(wrong)) == [part]


def test_a_label_tells_arguments():
    fixed = replace(SPEC, attention="ela", policy="fixed", policy_args={"when": "before"})
    assert fixed.label.startswith("ela (fixed, when=before) ") and replace(SPEC, attention="ela", policy="ebqm", policy_args={"scale": "exp"}).label.startswith("ELA (scale=exp) ")


def test_columns_are_the_rows():
    "A file says each name once; the first format, rows of dicts, is still read."
    r = replace(record(SPEC), updates=[{"epoch": 0, "mask": "01", "divergence": [None, d], "null": [None, 0.7], "note": ""} for d in (0.5, 0.6, 0.5)])
    obj = r.to_json()
    assert obj["epochs"]["epoch"] == [e["epoch"] for e in r.epochs] and obj["format"] == 3
    assert RunRecord.from_json(obj) == r == RunRecord.from_json({**obj, "epochs": r.epochs, "updates": r.updates, "format": 1})
    assert obj["updates"]["null"] == [[None, 0.7], 0, 0] and obj["updates"]["divergence"] == [[None, 0.5], [None, 0.6], 0]
    assert RunRecord.from_json({**obj, **{name: {k: runs.with_repeats(c) for k, c in obj[name].items()} for name in ("epochs", "updates")}, "format": 2}) == r
    for odd in ([], [{"a": 1}, {"b": 1}], [{}], [{}, {}], [{"a": 1}, 2], [{"a": [1]}, {"a": 0}], [{"a": (1,)}, {"a": 0}]): assert runs.as_rows(runs.as_columns(odd)) == odd and isinstance(runs.as_columns(odd), list)
    column = [[1.0, None], None, [-0.0], [1.0, None], [0.0], [-0.0]]
    assert runs.without_repeats(column) == [[1.0, None], None, [-0.0], 0, [0.0], 2] and str(runs.with_repeats(runs.without_repeats(column))) == str(column)
    for wrong in ([[1], 1], [[1], -1], [0, [1]], [None, [1], 0]): assert runs.with_repeats(wrong) is None and runs.as_rows({"a": wrong}) == {"a": wrong}
    for broken in ({"epoch": [0, 1], "lr": [1.0]}, {"epoch": 0}, {}):
        with pytest.raises(CorruptFileError, match="epochs"): RunRecord.from_json({**obj, "epochs": broken})
