"""What only a GPU can show: recorded steps compute what eager ones do, and an interrupted run ends as an undisturbed one."""
import threading

import pytest
import torch

from ela_repro.core import seed_everything, set_deterministic
from ela_repro.data import load_dataset
from ela_repro.engine import Recorded, TrainSettings, fit
from ela_repro.resnet import create_model
from ela_repro.runs import RunSpec, comparable, ensure

pytestmark = pytest.mark.gpu
CASES = [("none", "stable", "retrieval"), ("se", "stable", "retrieval"), ("mrla_b", "released", "retrieval"), ("ela", "stable", "retrieval"), ("ela", "released", "module"),
         ("ela", "stable", "reuse"), ("mrla_l", "stable", "retrieval")]
PEERS = [(a, "stable", "retrieval") for a in ("eca", "fca", "cbam", "ema", "gc", "non_local", "dia", "rla", "dla_b", "dla_l")]


class PowerCut(Exception): pass


def train(case, graphs=True, checkpoint=None, stop_after=None):
    "Four epochs of the sample with bf16 and deterministic kernels; the record fields and the weights."
    attention, recipe, skip = case
    set_deterministic(True)
    seed_everything(0)
    model = create_model("cifar_resnet56", 10, attention, recipe=recipe, skip=skip).to("cuda")
    def cut(metrics):
        if metrics["epoch"] == stop_after: raise PowerCut
    settings = TrainSettings(epochs=4, batch_size=128, lr=0.05, precision="bf16")
    result = fit(model, load_dataset("cifar10-sample"), settings, "cuda", checkpoint, cut, graphs=graphs)
    return {k: v for k, v in result.items() if k not in ("times", "peak_memory_bytes")}, [p.detach().clone() for p in model.parameters()]


def assert_identical(a, b):
    assert a[0] == b[0] and a[0]["status"] == "done"
    assert all(torch.equal(p, q) for p, q in zip(a[1], b[1]))


@pytest.mark.parametrize("case", CASES + PEERS, ids="-".join)
def test_a_recorded_step_computes_what_an_eager_one_does(case):
    assert_identical(train(case), train(case, graphs=False))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_an_interrupted_run_ends_as_an_undisturbed_one(case, tmp_path):
    with pytest.raises(PowerCut): train(case, checkpoint=tmp_path/"c.pt", stop_after=1)
    assert_identical(train(case, checkpoint=tmp_path/"c.pt"), train(case))


def test_the_mask_changes_in_the_case_that_should_recapture():
    "Otherwise the comparisons above would prove nothing about a graph recorded anew."
    updates = train(("ela", "stable", "retrieval"))[0]["updates"]
    assert len({u["mask"] for u in updates}) > 1


def test_a_step_is_recorded_beside_a_thread_that_pins_memory():
    "As the thread of a loader does; CUDA's strictest way of recording lets no other thread allocate meanwhile, and fails."
    x, y = torch.randn(256, 256, device="cuda"), torch.randn(256, 256, device="cuda")
    out, over, pinned = torch.zeros(256, 256, device="cuda"), threading.Event(), []
    def compute(a, b):
        out.zero_()
        for _ in range(300): out.add_(a @ b)
    def pin():
        while not over.is_set(): pinned[:] = [torch.empty((len(pinned) % 64 + 1) << 16).pin_memory(), *pinned[:50]]
    recorded, thread = Recorded(compute, torch.device("cuda", 0), True), threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(10):
            recorded.forget()
            for _ in range(5): recorded(x, y)
        torch.cuda.synchronize()
    finally:
        over.set()
        thread.join()
    found = out.clone()
    compute(x, y)
    assert recorded.settled and pinned and torch.equal(found, out)


def test_a_step_recorded_anew_runs_eagerly_once():
    x, y = torch.ones(4, device="cuda"), torch.ones(4, device="cuda")
    out, asked = torch.zeros(4, device="cuda"), []
    def compute(a, b): asked.append(torch.cuda.is_current_stream_capturing()); out.add_(a*b)
    recorded = Recorded(compute, torch.device("cuda", 0), True)
    for times, eager in ((6, 3), (4, 1), (4, 1)):
        asked.clear()
        recorded.forget()
        for _ in range(times): recorded(x, y)
        assert asked == [False]*eager + [True]
    torch.cuda.synchronize()
    assert out.tolist() == [14.0]*4


def test_a_probe_sees_the_same_however_many_images_at_a_time():
    model = create_model("cifar_basic_resnet20", 10, "ela").cuda()
    images = torch.randn(300, 3, 32, 32, device="cuda")
    with torch.backends.cudnn.flags(allow_tf32=False): at_once, apart = model.probe(images).rows, model.probe(images, 128).rows # TF32 rounds by the algorithm that a batch's size chooses
    for a, b in zip(at_once, apart): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_runs_at_once_leave_the_records_of_runs_alone(tmp_path):
    spec = lambda attention="ela", **other: RunSpec(**{**dict(dataset="cifar10-sample", model="cifar_resnet56", attention=attention, epochs=12, precision="bf16", policy="ebqm" if attention == "ela" else "never"), **other})
    specs = [spec(), spec(seed=1), spec("mrla_b"), spec("none", lr=100.0), spec("none")]
    found = {jobs: ensure(specs, "quick", tmp_path/str(jobs), "cuda:0", jobs=jobs, progress=lambda event: None) for jobs in (1, 5)}
    assert [r.times["at_once"] for r in found[1]] == [1]*5 and max(r.times["at_once"] for r in found[5]) >= 3
    assert [comparable(r) for r in found[5]] == [comparable(r) for r in found[1]]
    assert [r.status for r in found[5]] == ["done", "done", "done", "diverged", "done"] and any("1" in u["mask"] for u in found[5][0].updates)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_several_gpus_leave_the_records_of_runs_on_one(tmp_path):
    specs = [RunSpec(dataset="cifar10-sample", attention="ela", policy=policy, epochs=6, seed=seed) for policy in ("ebqm", "matched_random") for seed in range(3)]
    def told(event): seen.append((event["kind"], event["id"]))
    found = {}
    for device in ("cuda:0", "cuda:1", "cuda"):
        seen = []
        found[device] = [comparable(r) for r in ensure(specs, "quick", tmp_path/device.replace(":", ""), device, progress=told)]
    assert found["cuda"] == found["cuda:0"] == found["cuda:1"]
    assert [kind for kind, _ in seen[:2]] == ["start", "start"], "both GPUs take a run at once"


def test_a_detector_is_timed_with_the_kernels_of_real_runs_and_given_up():
    from dataclasses import replace

    from ela_repro import speed

    set_deterministic(True)
    device = f"cuda:{torch.cuda.device_count() - 1}"
    spec = replace(next(s for s in speed.timed_detectors(speed.SCALES["reduced"]) if (s.detector, s.attention) == ("mask_rcnn", "ela")), short_side=256, long_side=426, batch_size=4)
    row, before = {"network": "resnet50", "label": "one", "rounds": 2, "seconds": [], "peak_bytes": None, "failed": ""}, torch.cuda.memory_allocated(device)
    with torch.cuda.device(device): speed.in_rounds("detectors", [(row, lambda: speed.detector_seconds(spec, device))], device, lambda text: None)
    assert len(row["seconds"]) == 2 and 0 < min(row["seconds"]) < 5 and row["peak_bytes"] > 2**28 and not row["failed"]
    assert torch.are_deterministic_algorithms_enabled() and torch.cuda.memory_allocated(device) - before < 2**26
    run = speed.detector_run(spec, device)
    for images, targets in run.batches.epoch(0): run.step(images, targets)
    assert run.read(len(run.batches))["loss"] > 0
