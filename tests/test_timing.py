"Step times: sessions that say what was timed, sums that agree with a plain second implementation, and no number where nothing was timed."
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from ela_repro import batch, timing
from ela_repro.core import CorruptFileError, ElaError, write_json
from ela_repro.examples import example_record, example_records, example_session
from ela_repro.runs import COMPARED, Store, experiment_specs, make_spec
from ela_repro.stats import relative_saving
from ela_repro.tables import group_runs
from ela_repro.times import NOT_TIMED, overhead_shares, overhead_table, round_spread, savings, seed_pairs, staleness, timed_on, training_time_table, validation_table, widened
from ela_repro.timing import ENGINES, StepConfig, lacking, masks_in_force, measure, needed_configs, of_round, read_session, session_path, steps_per_epoch, time_by_epoch, training_time

few = settings(max_examples=30, derandomize=True, deadline=None)


@pytest.fixture(scope="module")
def records(): return example_records("training_time", "reduced")


@pytest.fixture(scope="module")
def session(records): return example_session(records)


@pytest.fixture
def tiny(monkeypatch):
    "Timings that last one step."
    monkeypatch.setitem(timing.ROUNDS, "cpu", 2)
    monkeypatch.setitem(timing.AT_LEAST, "cpu", (0.0, 1))


def small(**fields): return make_spec("quick", "ela", **{"model": "cifar_resnet20", "batch_size": 8, **fields})


# ---- what is timed

def test_only_what_decides_a_steps_time_is_part_of_a_configuration():
    spec, key = small(), lambda s, engine="fast", mask="0"*6: StepConfig.of(s, engine, mask).key
    for other in (replace(spec, seed=3), replace(spec, lr=0.3), replace(spec, epochs=9), replace(spec, policy="bqm")): assert key(other) == key(spec)
    for other in (replace(spec, batch_size=4), replace(spec, recipe="released"), replace(spec, skip="module"), replace(spec, width=0.5), replace(spec, precision="bf16")): assert key(other) != key(spec)
    assert len({key(spec), key(spec, "naive"), key(spec, mask="010101")}) == 3
    with pytest.raises(ElaError, match="did you mean 'naive'"): StepConfig.of(spec, "naiv")


@few
@given(epochs=st.integers(1, 12), data=st.data())
def test_masks_in_force_by_a_plain_second_implementation(epochs, data):
    "Epoch by epoch: the last mask decided before it began, else the one that the policy starts with."
    moments = sorted(data.draw(st.sets(st.integers(0, epochs - 1))))
    policy = data.draw(st.sampled_from(["ebqm", "fixed"]))
    updates = [{"epoch": e, "mask": "".join(data.draw(st.lists(st.sampled_from("01"), min_size=6, max_size=6)))} for e in moments]
    record = replace(example_record(small(policy=policy, epochs=epochs)), updates=updates)
    start = "010101" if policy == "fixed" else "000000"
    assert masks_in_force(record) == [([start] + [u["mask"] for u in updates if u["epoch"] < e])[-1] for e in range(epochs)]


@pytest.mark.parametrize("fields", [{"accumulation": 2}, {"pixels": 64}, {"dataset": "stl10"}, {"dataset": "imagenette", "model": "resnet50"}], ids=lambda f: next(iter(f)))
def test_what_would_be_timed_as_something_else_is_refused(fields):
    with pytest.raises(ElaError, match="cannot be timed here"): StepConfig.of(make_spec("reduced", "plain", **fields), "fast")
    assert StepConfig.of(make_spec("reduced", "plain", pixels=32, dataset="svhn"), "fast")


def test_an_incomplete_batch_is_no_step():
    assert [steps_per_epoch(s) for s in (small(), small(train_images=20), make_spec("reduced", "plain"), make_spec("reduced", "plain", holdout=5000))] == [64, 2, 390, 351]


# ---- sessions

def test_a_session_times_everything_that_the_records_need(tiny):
    made = [example_record(replace(small(epochs=4), attention=a, policy=p)) for a, p in (("none", "never"), ("mrla_l", "never"), ("ela", "ebqm"))]
    configs = needed_configs(made)
    found, said = measure(configs, rounds=2, say=(lines := []).append), lines
    assert not lacking(found, configs) and lacking(found, [StepConfig.of(small(width=0.5), "fast")])
    assert all(len(e["step"]) == len(e["setup"]) == 2 and min(e["step"]) > 0 for e in found["steps"].values())
    assert {e["config"]["attention"] for e in found["updates"].values()} == {"ela"}  # nobody else has an update
    assert len(said) == 2*(2 + 2*1) and found["provenance"]["device"] == "cpu"
    for r in made:
        for engine in ENGINES: assert training_time(r, found, engine).total > 0


def test_a_missing_configuration_renews_the_whole_session(tiny, tmp_path, monkeypatch):
    "Times are compared within one session only; what is complete is not measured again, and a reader measures nothing."
    store, calls = Store("quick", tmp_path), []
    monkeypatch.setattr(timing, "measure", lambda configs, *args, **kw: calls.append(configs) or example_session(made))
    made = [example_record(small())]
    monkeypatch.setenv("ELA_TRAIN", "0")
    assert timing.ensure_step_times(made, store, "cpu") is None and not calls
    monkeypatch.delenv("ELA_TRAIN")
    first = timing.ensure_step_times(made, store, "cpu")
    assert timing.ensure_step_times(made, store, "cpu") == first == read_session(store) and len(calls) == 1
    made.append(example_record(small(width=0.5)))
    timing.ensure_step_times(made, store, "cpu")
    assert len(calls) == 2 and set(calls[0]) < set(calls[1])
    timing.ensure_step_times(made, store, "cpu", force=True)
    assert len(calls) == 3


def test_a_damaged_session_is_refused(tmp_path, records):
    store = Store("quick", tmp_path)
    path = write_json(session_path(store), example_session(records[:1]), sealed=True)
    path.write_text(path.read_text().replace('"rounds":3', '"rounds":9'))
    with pytest.raises(CorruptFileError, match="step_times.json"): read_session(store)


def test_a_batch_times_anew_what_is_damaged(tiny, tmp_path, monkeypatch, capsys):
    store, made = Store("quick", tmp_path), example_record(small())
    store.save(made)
    session_path(store).write_text("{")
    monkeypatch.setattr(timing, "measure_alone", lambda work, arguments, say: work(**arguments, say=say) and "")
    monkeypatch.setattr("ela_repro.runs.needed_specs", lambda *args: (made.spec,))
    [outcome] = batch.measure_all(batch.Plan("quick", ("training_time",), (), tmp_path, device="cpu"))
    assert (outcome.status, outcome.message) == ("done", "") and "step_times.json" in capsys.readouterr().err
    assert not lacking(read_session(store), needed_configs([made]))


@pytest.mark.slow
def test_the_process_that_measures_reports_and_fails_in_words(tmp_path):
    store, made = Store("quick", tmp_path), [example_record(small(width=0.25))]
    said = []
    measure = lambda records, device: timing.measure_alone(timing.ensure_step_times, dict(records=records, store=store, device=device), said.append)
    assert measure(made, "cpu") == "" and said and read_session(store)
    assert "no GPU" in measure([example_record(small(width=0.5))], "cuda")


def test_a_gpu_has_a_first_round_that_is_not_kept(records, monkeypatch):
    "On a GPU kernels are loaded and clocks raised first; here the network is not measured, only counted."
    seen, configs = [], needed_configs(records)[:6]
    def measured(session, network, some, device):
        seen.append(session)
        for c in some: session["steps"][c.key]["step"].append(len(seen))
    monkeypatch.setattr(timing, "_measure_network", measured)
    monkeypatch.setattr(timing, "provenance", lambda device: {})
    session, networks = measure(configs, "cuda", rounds=2), {c.unmasked for c in configs}
    assert len(seen) == 3*len(networks) and all(len(e["step"]) == 2 and min(e["step"]) > len(networks) for e in session["steps"].values())
    assert all(len(e["step"]) == 1 for e in seen[0]["steps"].values()), "the first round is somewhere else"


# ---- sums

@few
@given(engine=st.sampled_from(ENGINES), seed=st.integers(0, 20))
def test_the_training_time_is_the_sum_of_its_pieces(engine, seed):
    record = example_record(make_spec("reduced", "ela", seed=seed))
    session = example_session([record])
    total, masks = 0.0, masks_in_force(record)
    for before, mask in zip([None, *masks], masks):
        entry = session["steps"][StepConfig.of(record.spec, engine, mask).key]
        total += 390*statistics.median(entry["step"]) + (statistics.median(entry["setup"]) if mask != before else 0)
    total += len(record.updates)*(0.08 + 0.001)
    assert training_time(record, session, engine).total == pytest.approx(total)
    by_epoch = time_by_epoch(record, session, engine)
    assert by_epoch == sorted(by_epoch) and len(by_epoch) == 24 and by_epoch[-1] == pytest.approx(total)


@pytest.mark.parametrize("policy, counted", [("ebqm", True), ("bqm", True), ("threshold", True), ("highest_first", True), ("random", False), ("fixed", False)])
def test_only_policies_that_need_evidence_pay_for_probes(policy, counted):
    record = example_record(make_spec("reduced", "ela", policy=policy))
    assert (training_time(record, example_session([record]), "fast").probes > 0) == counted


def test_what_was_not_timed_has_no_time(records, session):
    ela = next(r for r in records if r.spec.method == "ela")
    key = StepConfig.of(ela.spec, "fast", masks_in_force(ela)[-1]).key
    holed = {**session, "steps": {k: v for k, v in session["steps"].items() if k != key}}
    assert training_time(ela, holed, "fast") is None and time_by_epoch(ela, holed, "fast") is None and training_time(ela, holed, "naive")
    specs = experiment_specs("training_time", "reduced")
    frame = training_time_table(records, specs, holed, "reduced").frame
    assert frame.set_index("method")["remark"]["ELA"] == NOT_TIMED and frame.set_index("method")["training, s (fast)"]["ELA"] is None
    assert set(overhead_table(records, specs, None, "reduced").frame["remark"]) == {NOT_TIMED}


# ---- tables

def test_the_caption_tells_how_steady_the_clock_was(records, session):
    steps = {k: {**e, "step": [1.0, 1.0, 1.004] if e["config"]["engine"] == "fast" else [0.8, 1.0, 1.1]} for k, e in session["steps"].items()}
    assert "ranges over 0.4% (fast), 30% (naive) of its median" in timed_on({**session, "steps": steps})
    assert "ranges" not in timed_on({**of_round(session, 0)}) and round_spread({"steps": {}}, "fast") is None


def test_a_round_stands_alone_and_rounds_widen_an_interval(records, session):
    once = of_round(session, 1)
    assert once["rounds"] == 1 and all(e["step"] == session["steps"][k]["step"][1:2] for k, e in once["steps"].items()) and session["rounds"] == 3
    seeds = relative_saving([80, 82, 81], [100, 101, 99])
    same = widened(seeds, [1 - seeds.estimate]*5)
    assert (same.low, same.high) == pytest.approx((seeds.low, seeds.high)) and widened(seeds, [0.81]) == seeds
    noisy = widened(seeds, [0.66, 0.82, 0.94, 1.11, 0.96])
    assert noisy.low < 0 < seeds.low and noisy.high > 0.3 > seeds.high and noisy.estimate == pytest.approx(1 - scipy_stats.gmean([0.66, 0.82, 0.94, 1.11, 0.96]))
    exact = relative_saving([80.0]*3, [100.0]*3)  # what seeds do not spread, the timing does
    logs = np.log([0.7, 0.8, 0.9])
    half = scipy_stats.t.ppf(0.975, 2)*logs.std(ddof=1)/3**0.5
    found = widened(exact, [0.7, 0.8, 0.9])
    assert (found.low, found.estimate, found.high) == pytest.approx([1 - np.exp(logs.mean() + side*half) for side in (1, 0, -1)])


def test_savings_are_shares_of_the_other_methods_time(records, session):
    specs = experiment_specs("training_time", "reduced")
    for engine in ENGINES:
        found = {o.key.method: (e, o, i) for e, o, i in savings(records, specs, session, engine)}
        assert set(found) == {*COMPARED} - {"ela"}
        for ela, other, interval in found.values():
            ours, theirs = ([training_time(r, session, engine).total for r in g.records] for g in (ela, other))
            rounds = [np.mean([training_time(r, of_round(session, i), engine).total for r in ela.records])/np.mean([training_time(r, of_round(session, i), engine).total for r in other.records]) for i in range(3)]
            expected = widened(relative_saving(ours, theirs), rounds)
            assert interval.estimate == pytest.approx(100*expected.estimate) and interval.low == pytest.approx(100*expected.low)
    one = [r for r in records if r.spec.seed == 0]
    assert all(i.low == float("-inf") for _, _, i in savings(one, experiment_specs("training_time", "reduced", (0,)), session, "fast"))  # one seed: no interval


def test_missing_and_diverged_runs_stay_rows(records, session):
    specs = experiment_specs("training_time", "reduced")
    kept = [r for r in records if r.spec.method != "mrla_l" and (r.spec.method, r.spec.seed) != ("se", 1)] + [example_record(s, "diverged") for s in specs if (s.method, s.seed) == ("se", 1)]
    frame = training_time_table(kept, specs, session, "reduced").frame.set_index("method")
    assert len(frame) == len(COMPARED) and frame["remark"]["MRLA-L"].startswith("not run") and "1 of 3 diverged" in frame["remark"]["SE"] and frame["training, s (fast)"]["SE"].n == 2


def test_runs_that_shared_the_machine_validate_nothing(records, session):
    specs = experiment_specs("training_time", "reduced")
    def clocked(at_once, gpu, resumed=()): return [replace(r, times={**r.times, "at_once": at_once, "train_s": [99.0] + [1.0]*23, "resumed_at": list(resumed)}, provenance={**r.provenance, "device": "cuda", "gpu": gpu}) for r in records]
    gpu = session["provenance"]["gpu"]
    column = lambda made: list(validation_table(made, specs, session, "reduced").frame.iloc[:, 4])
    for made in (clocked(2, gpu), clocked(1, "another GPU"), clocked(1, gpu, (3,))): assert set(column(made)) == {None}
    plain = next(r for r in records if r.spec.method == "plain")
    assert column(clocked(1, gpu))[0].mean == pytest.approx(100*training_time(plain, session, "fast").steps/24)  # the first epoch does not count


def test_overhead_is_a_share_of_the_whole(records, session):
    [ela] = [g for g in group_runs(records, experiment_specs("training_time", "reduced")) if g.key.method == "ela"]
    for share, r in zip(overhead_shares(ela, session), ela.records):
        t = training_time(r, session, "fast")
        assert share == pytest.approx(100*(t.probes + t.policy + t.changes)/(t.steps + t.start + t.probes + t.policy + t.changes))


def test_staleness_compares_the_same_layer_of_the_same_seed():
    records = example_records("ebqm_overhead", "reduced")
    pairs = seed_pairs(records, "stable")
    assert len(pairs) == 3 and all(replace(e.spec, attention="mrla_b", policy="never") == m.spec for e, m in pairs)
    assert seed_pairs([r for r in records if r.spec.method == "ela"], "stable") == []
    found = staleness(pairs)
    eligible = sum(d is not None for e, m in pairs for u in e.updates[1:] if u["epoch"] in {v["epoch"] for v in m.updates} for d in u["divergence"])
    assert sum(map(len, found.values())) == eligible and 0 in found and all(abs(v) <= 1 for values in found.values() for v in values)


def with_a_helper(say):
    "Something measured that needs a process of its own, as loading photographs or training does."
    import multiprocessing

    helper = multiprocessing.get_context("spawn").Process(target=say_nothing)
    helper.start()
    helper.join()
    say(f"helper ended with {helper.exitcode}")


def say_nothing(): pass


def test_what_is_measured_may_start_processes():
    said = []
    assert timing.measure_alone(with_a_helper, {}, said.append) == "" and said == ["helper ended with 0"]
