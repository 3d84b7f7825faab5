"""Processes that train one network together compute what one process would; here two, on the CPU."""
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import nn

from ela_repro import processes as processes_module
from ela_repro.core import ElaError, seed_everything
from ela_repro.data import Batches, ImageData
from ela_repro.ela import SkipController
from ela_repro.engine import TrainSettings, TrainStep, fit, synchronised
from ela_repro.policy import EBQM
from ela_repro.processes import ALONE, Processes, join, leave, run_together
from ela_repro.resnet import create_model
from ela_repro.runs import RunSpec, Store, _lock_together

HERE = Path(__file__)


def images(n=52, odd=21) -> ImageData:
    draw = torch.Generator().manual_seed(0)
    pictures = lambda n: (torch.randint(0, 256, (n, 3, 32, 32), generator=draw, dtype=torch.uint8), torch.arange(n) % 3)
    return ImageData("random", *pictures(n), *pictures(odd), ("a", "b", "c"), {"kind": "none", "value": ""}, "sample")


def network(attention="ela", **kw):
    seed_everything(0)
    return create_model("cifar_resnet20", 3, attention, width=0.25, **kw)


def one_step(processes: Processes, attention: str, parts: int) -> dict:
    "Gradients of one step in float64, batch norms in evaluation mode, nothing dropped."
    model = network(attention, **({"drop_path": 0.0} if attention in ("ela", "mrla_b", "mrla_l", "dla_l") else {})).double()
    if attention == "ela": model.set_skip_mask([False, True]*3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "float32", "cpu", processes=processes, parts=parts)
    step.logits = model  # no rounding to float32
    data = images()
    x, y = next(iter(data.train_batches(16, "cpu", 0, shard=(processes.rank, processes.count)).epoch(3)))
    step(x.double(), y)
    return {n: p.grad for n, p in model.named_parameters()} | {"read": step.read()}


@pytest.mark.parametrize("attention, parts", [("none", 1), ("ela", 1), ("mrla_b", 2), ("dla_l", 1)])
def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(attention, parts):
    whole, halves = one_step(ALONE, attention, 1), run_together(one_step, 2, attention, parts)
    for half in halves:
        for name, g in whole.items():
            if name == "read": continue
            assert (g is None) == (half[name] is None), name
            if g is not None: torch.testing.assert_close(half[name], g, rtol=0, atol=1e-9)
        assert half["read"] == pytest.approx((2*whole["read"][0], whole["read"][1]))  # a sum over processes of mean losses; hits


def whole_run(processes: Processes, checkpoint=None, attention="ela"):
    "Two epochs with a policy update; what a record says, and the weights."
    model = network(attention, policy=EBQM(warmup=0.0, tau=None) if attention == "ela" else None)
    told = []
    result = fit(model, images(), TrainSettings(epochs=3, batch_size=16, lr=0.02), "cpu", checkpoint, told.append, processes=processes)
    return {k: v for k, v in result.items() if k not in ("times", "peak_memory_bytes")}, len(told), {k: v.clone() for k, v in model.state_dict().items()}


def test_a_whole_run_leaves_the_same_network_in_each_process():
    (first, told, weights), (second, quiet, others) = run_together(whole_run, 2)
    assert first == second and (told, quiet) == (3, 0), "only the leading process speaks"
    assert all(torch.equal(v, others[k]) for k, v in weights.items())
    assert len(first["updates"]) == 2 and "1" in first["updates"][-1]["mask"]
    assert abs(first["epochs"][0]["train_loss"] - whole_run(ALONE)[0]["epochs"][0]["train_loss"]) < 0.3, "batch statistics differ, little else"
    assert all(round(21*e["test_accuracy"]) == pytest.approx(21*e["test_accuracy"]) for e in first["epochs"]), "each test image is counted once"


def decided(processes: Processes):
    model, data = network(), images()
    shown = data.probe_images(16, "cpu")
    controller = SkipController(model, EBQM(warmup=0.0, tau=None), shown[processes.rank::processes.count], 8, 0, processes)
    return controller.after_epoch(min(controller.when)), model.skip_mask.tolist()


def test_the_divergence_is_the_mean_over_processes_and_one_decides():
    (one, mask), (two, other) = run_together(decided, 2)
    alone, whole = decided(ALONE)
    assert one == two and mask == other == whole and any(mask)
    for key in ("divergence", "entropy"): np.testing.assert_allclose(*(np.array(u[key], float) for u in (one, alone)), rtol=1e-4)


def disagreeing(processes: Processes):
    try: processes.same("the skip mask", processes.rank)
    except ElaError as e: return str(e)


def waiting(processes: Processes, folder=""):
    "Both want a run's lock while somebody else holds it for a second and a half; how long that took, and how often they met."
    store, spec, met = Store("quick", folder), RunSpec(), []
    class Counted(Processes):
        def agree(self, value):
            met.append(value)
            return super().agree(value)
    elsewhere = store.lock(spec.id) if processes.leads else None
    if elsewhere: threading.Timer(1.5, elsewhere.close).start()
    processes.agree(None)
    with _lock_together(store, spec, Counted(processes.rank, processes.count)):
        taken = store.lock(spec.id, wait=False) is None
        processes.agree(None)  # neither lets go before the other has looked
    return len(met), taken


def test_processes_that_wait_for_a_lock_go_on_meeting(tmp_path):
    "An exchange that one of them keeps waiting would be given up after a while."
    (first, held), (second, also) = run_together(waiting, 2, str(tmp_path))
    assert first == second >= 2 and held and also


def test_a_disagreement_is_told_by_every_process():
    for said in run_together(disagreeing, 2): assert "disagree on the skip mask: [0, 1]" in said


def test_training_batches_of_two_processes_are_those_of_one():
    data = images()
    for epoch in (0, 1):
        whole = list(data.train_batches(12, "cpu", 5).epoch(epoch))
        halves = [list(data.train_batches(12, "cpu", 5, shard=(r, 2)).epoch(epoch)) for r in range(2)]
        assert len(whole) == len(halves[0]) == len(halves[1]) == 4
        for (x, y), (a, la), (b, lb) in zip(whole, *halves):
            assert torch.equal(x[::2], a) and torch.equal(x[1::2], b) and torch.equal(y[::2], la) and torch.equal(y[1::2], lb)
    shown = [torch.cat([y for _, y in data.test_batches(4, "cpu", shard=(r, 2)).epoch()]) for r in range(2)]
    assert torch.equal(torch.stack([shown[0][:10], shown[1]], 1).flatten(), data.test_labels[:20]) and len(shown[0]) == 11


@pytest.mark.parametrize("count, says", [(3, "cannot be shared by 3 processes"), (32, "cannot be shared")])
def test_a_batch_that_cannot_be_shared_is_refused(count, says):
    with pytest.raises(ElaError, match=says): images().train_batches(16, "cpu", 0, shard=(0, count))
    with pytest.raises(ElaError, match="cannot be cut into 1 parts for each of"): fit(network(), images(), TrainSettings(batch_size=16), processes=Processes(0, count))


def test_more_processes_than_gpus_is_told(monkeypatch):
    for name, value in dict(WORLD_SIZE="4", RANK="3", LOCAL_RANK="3").items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr("ela_repro.processes.resolve_device", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ElaError, match="process 3 of this machine has no GPU, there are 2"): join("cuda")
    with pytest.raises(ElaError, match="names one GPU, but 4 processes"): join("cuda:1")


# ---- one process is killed, and the same command is given again

def main(folder: Path, die: bool) -> None:
    "One of two processes: train, and die in the middle of the second epoch if told so."
    processes, _ = join("cpu")
    epochs = Batches.epoch
    def dying(self, epoch=0):
        for i, batch in enumerate(epochs(self, epoch)):
            if die and processes.rank == 1 and self.train and (epoch, i) == (1, 1): os._exit(9)
            yield batch
    Batches.epoch = dying
    result, _, weights = whole_run(processes, folder/"run.pt", "mrla_b")
    if processes.leads: torch.save({"result": result, "weights": weights}, folder/"end.pt")
    leave()


def launch(folder: Path, die: str) -> list[int]:
    "Exit codes of the two processes."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [subprocess.Popen([sys.executable, str(HERE), str(folder), die], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.DEVNULL) for r in range(2)]
    try: return [p.wait(120) for p in both]
    finally:
        for p in both: p.kill()


@pytest.mark.slow
def test_a_run_whose_process_was_killed_ends_as_an_undisturbed_one(tmp_path):
    ends = []
    for die in ("", "die"):
        folder = tmp_path/f"run{die}"
        folder.mkdir()
        codes = launch(folder, die)
        if die:
            assert codes[1] == 9 and codes[0] not in (0, 9) and not (folder/"end.pt").exists(), "the other process does not wait for the dead one"
            codes = launch(folder, "")
        assert codes == [0, 0]
        ends.append(torch.load(folder/"end.pt", weights_only=False))
    assert ends[0]["result"] == ends[1]["result"]
    assert all(torch.equal(v, ends[1]["weights"][k]) for k, v in ends[0]["weights"].items())


ENDING = """
import atexit, sys
from pathlib import Path
from ela_repro.batch import main

def threads(): return {(t/"comm").read_text().strip() for t in Path("/proc/self/task").glob("*")}

atexit.register(lambda: print("threads left:", threads(), file=sys.stderr))
main()
"""


def test_one_command_trains_with_two_processes_and_goes_on_where_it_was(tmp_path):
    "`torchrun --no-python ela-repro train`: one record, which says that there were two; `reproduce` is refused there."
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", sys.executable, "-c", ENDING]
    options = "--attention ela --model cifar_basic_resnet20 --epochs 2 --train-images 64 --width 0.25 --device cpu --out".split()
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*program, "train", *options, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[:4000]  # what a process says precedes what torchrun says of it
    assert done.stdout.count("epoch 2/2") == done.stdout.count(" done ") == 1, "only the leading process speaks"
    assert "destroy_process_group" not in done.stderr, "PyTorch warns of processes that end without parting"
    assert done.stderr.count("threads left:") == 2 and "gloo" not in done.stderr, "a thread that outlives its group may abort a process as it ends"
    [record] = Store("quick", tmp_path).records()[0]
    assert record.provenance["processes"] == 2 and record.status == "done" and not list(tmp_path.rglob("*.pt"))
    split = subprocess.run([*program[:-2], "-c", "import os; from ela_repro.batch import main; os.environ['ELA_RESULTS'] += os.environ['RANK']; main()", "train", *options[:-1]], timeout=600, capture_output=True, text=True,
                           env={**environment, "ELA_RESULTS": str(tmp_path/"host")})
    assert split.returncode == 0, split.stderr[:4000]  # on several hosts the others do not see the leader's folder
    assert len(Store("quick", tmp_path/"host0").records()[0]) == 1 and not Store("quick", tmp_path/"host1").records()[0]
    refused = subprocess.run([*program, "reproduce", "--out", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600)
    assert refused.returncode and "without torchrun" in refused.stderr


if __name__ == "__main__": main(Path(sys.argv[1]), sys.argv[2] == "die")


def test_what_holds_a_graph_is_dropped_before_processes_part(monkeypatch):
    "NCCL waits without end for a recorded graph that holds an exchange; and a graph that cannot be dropped keeps nobody."
    class Recorded:
        dropped = False
        def forget(self):
            self.dropped = True
            if self.fails: raise RuntimeError("stuck")

    parted, one = [], Recorded()
    monkeypatch.setattr(processes_module, "_recorded", WeakSet())
    monkeypatch.setattr(processes_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes_module.dist, "destroy_process_group", lambda: parted.append(one.dropped))
    processes_module.forget_on_leaving(one)
    one.fails = False
    leave()
    one.fails = True
    with pytest.raises(RuntimeError, match="stuck"): leave()
    assert parted == [True, True]


# ---- batch statistics over all processes

def test_statistics_are_not_synchronised_on_a_cpu():
    with pytest.raises(ElaError, match="sync_bn needs a GPU for each process"): fit(network(), images(), TrainSettings(batch_size=16, sync_bn=True), processes=Processes(0, 2))
    with pytest.raises(ElaError, match="sync_bn needs a GPU"): fit(network("none"), images(), TrainSettings(batch_size=16, sync_bn=True))


def synchronised_step(processes: Processes, attention: str) -> dict:
    "Gradients and running statistics of one training step in float32 on a GPU, nothing dropped."
    device = f"cuda:{processes.rank}"
    model = network(attention, **({"drop_path": 0.0} if attention == "ela" else {}), **({"form": "list"} if attention == "ela" else {})).to(device)
    names = list(model.state_dict())
    model = synchronised(model, device, processes)
    assert list(model.state_dict()) == names
    model.train()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), "float32", device, graphs=False, processes=processes)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # it rounds otherwise for a batch than for its halves
        step(*next(iter(images().train_batches(16, device, 0, shard=(processes.rank, processes.count)).epoch(3))))
    return {n: p.grad.cpu() for n, p in model.named_parameters()} | {n: b.cpu() for n, b in model.named_buffers() if b.is_floating_point()}


def synchronised_run(processes: Processes) -> dict:
    return fit(network("ela", policy=EBQM(warmup=0.0, tau=None)).to(f"cuda:{processes.rank}"), images(), TrainSettings(epochs=3, batch_size=16, lr=0.02, sync_bn=True), f"cuda:{processes.rank}", processes=processes)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("attention", ["none", "ela"])
def test_two_gpus_with_common_statistics_compute_what_one_does_with_twice_the_batch(attention):
    whole, halves = synchronised_step(ALONE, attention), run_together(synchronised_step, 2, attention, device="cuda")
    for half in halves:
        for name, value in whole.items(): torch.testing.assert_close(half[name], value, rtol=1e-3, atol=max(1e-3*value.abs().max().item(), 1e-6), msg=lambda told: f"{name}: {told}")  # some biases meet a norm: their gradient is rounding error


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_with_common_statistics_is_recorded_and_replayed():
    first, second = run_together(synchronised_run, 2, device="cuda")
    assert first["status"] == "done" and first["epochs"] == second["epochs"] and len(first["epochs"]) == 3
