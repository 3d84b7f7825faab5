"""Training: the schedule, the step, what a checkpoint must hold, what a skipped part must not feel, and what happens when the loss is no number."""
import contextlib
import copy
import gc
import pickle
import weakref
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn
from torch.nn import functional as F

from ela_repro.core import CorruptFileError, ElaError, canonical_json
from ela_repro.data import Batches, ImageData
from ela_repro.engine import LR_SCHEDULES, Recorded, Training, TrainSettings, TrainStep, begin_momentum, evaluate, fit, learning_rate, load_checkpoint, save_checkpoint
from ela_repro.policy import BQM, EBQM, Fixed, MatchedPosition, MatchedRandom, Never, Random
from ela_repro.resnet import create_model

few = settings(max_examples=25, derandomize=True, deadline=None)
MASKS = [{"epoch": e, "mask": m} for e, m in enumerate(("010011000", "001001010"))]
POLICIES = {"ebqm": lambda: EBQM(tau=None, warmup=0.0, freeze=0.0, updates=None), "bqm": BQM, "random": lambda: Random(0.4, warmup=0.0, freeze=0.0),
            "matched": lambda: MatchedRandom(MASKS), "matched, one order": lambda: MatchedRandom(MASKS, fresh=False), "position": lambda: MatchedPosition(MASKS), "fixed": Fixed}


@pytest.fixture(scope="module")
def data():
    "A few small random images in three classes: whether anything is learnt does not matter here."
    draw = torch.Generator().manual_seed(0)
    make = lambda n: (torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=draw), torch.randint(0, 3, (n,), generator=draw))
    train, test = make(32), make(20)
    return ImageData("random", *train, *test, ("a", "b", "c"), {"kind": "none", "value": ""}, "sample", mean=(0.5,) * 3, std=(0.25,) * 3)


def settings_of(**kw): return TrainSettings(**(dict(epochs=3, batch_size=16, lr=0.02) | kw))


def network(attention="ela", seed=0, name="cifar_basic_resnet20", **kw):
    torch.manual_seed(seed)
    return create_model(name, 3, attention, width=0.25, **kw)


class Interrupted(Exception): pass


def train(data, model, checkpoint=None, stop=None, said=None, **kw):
    "Fit; interrupted after the epoch `stop` if there is one. The result without times, and the final weights."
    def on_epoch(metrics):
        if metrics["epoch"] == stop: raise Interrupted
    result = fit(model, data, settings_of(**kw), checkpoint=checkpoint, on_epoch=on_epoch, say=(said if said is not None else []).append)
    times = result.pop("times")
    return result, {k: v.clone() for k, v in model.state_dict().items()}, times


def assert_same_run(one, other):
    assert canonical_json(one[0]) == canonical_json(other[0])
    assert one[1].keys() == other[1].keys()
    for name in one[1]: assert torch.equal(one[1][name], other[1][name]), name


# ---- learning rate

@few
@given(epochs=st.integers(1, 400) | st.sampled_from([90, 180, 360]), warmup=st.integers(0, 20))
def test_the_step_schedule_falls_at_100_and_150_of_180(epochs, warmup):
    s = TrainSettings(epochs=epochs, lr=0.1, warmup_epochs=warmup)
    for epoch in range(epochs):
        done = Fraction(epoch, epochs)
        falls = (done >= Fraction(100, 180)) + (done >= Fraction(150, 180))
        assert_allclose(learning_rate(s, epoch), 0.1 * min(Fraction(1), Fraction(epoch + 1, warmup + 1)) * 0.1**falls)


def test_the_published_milestones():
    rates = [learning_rate(TrainSettings(epochs=180), e) for e in range(180)]
    assert [e for e in range(1, 180) if rates[e] != rates[e - 1]] == [100, 150]
    assert_allclose([rates[0], rates[100], rates[150]], [0.1, 0.01, 0.001])


def test_the_cosine_falls_from_the_peak_towards_zero():
    rates = [learning_rate(TrainSettings(epochs=20, lr=0.4, lr_schedule="cosine"), e) for e in range(20)]
    assert_allclose((rates[0], rates[10]), (0.4, 0.2))
    assert all(a > b > 0 for a, b in zip(rates, rates[1:]))
    with pytest.raises(ValueError, match="did you mean 'cosine'"): learning_rate(TrainSettings(lr_schedule="cosin"), 0)
    assert set(LR_SCHEDULES) == {"step", "cosine", "step_30"}


@pytest.mark.parametrize("epochs", [10, 40, 90, 100, 120])
def test_the_schedule_of_imagenet_falls_after_30_60_and_90_percent(epochs):
    rates = [learning_rate(TrainSettings(epochs=epochs, lr_schedule="step_30"), e) for e in range(epochs)]
    assert [e for e in range(1, epochs) if rates[e] != rates[e - 1]] == [epochs*k//10 for k in (3, 6, 9)] and rates[-1] == pytest.approx(1e-4)


# ---- one step, one evaluation

def test_a_step_is_sgd_with_momentum_and_decay_on_every_parameter(data):
    torch.manual_seed(0)
    model, lr, momentum, decay = network(None), 0.1, 0.9, 0.05
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay), "float32", "cpu")
    twin, velocity, losses, hits = copy.deepcopy(model), {}, [], 0
    for x, y in Batches(data.train_images, data.train_labels, data.mean, data.std, 16, "cpu", train=False).epoch():
        step(x, y)
        logits = twin(x)
        loss = F.cross_entropy(logits, y)
        losses.append(loss.item())
        hits += (logits.argmax(1) == y).sum().item()
        for (name, p), g in zip(twin.named_parameters(), torch.autograd.grad(loss, list(twin.parameters()))):
            velocity[name] = momentum * velocity.get(name, 0) + g + decay * p.detach()
            p.data -= lr * velocity[name]
    for a, b in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert_allclose(step.read(), (sum(losses), hits), rtol=1e-5)
    assert step.read() == (0.0, 0.0)  # the sums start anew


def test_an_evaluation_counts_every_image_once_and_leaves_the_model_alone(data):
    model = network("mrla_b").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = Batches(data.test_images, data.test_labels, data.mean, data.std, 8, "cpu", train=False)  # 8 + 8 + 4
    loss, accuracy, among_five = evaluate(model, batches)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x, y = (torch.cat(t) for t in zip(*batches.epoch()))
    logits = model.eval()(x)
    assert_allclose((loss, accuracy), (F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()), rtol=1e-5)
    assert among_five == 1.0  # there are three classes


def test_the_first_five_guesses_are_counted(data):
    "A network that answers the same for every image is right among its first five guesses as often as they occur."
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.arange(12.0))
        def forward(self, x): return self.logits.expand(len(x), 12)
    labels = torch.arange(20) % 12
    batches = Batches(data.test_images, labels, data.mean, data.std, 7, "cpu", train=False)
    _, accuracy, among_five = evaluate(Constant(), batches)
    assert accuracy == (labels == 11).double().mean() and among_five == pytest.approx((labels >= 7).double().mean().item())


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts, data):
    "Without batch statistics; with them each part has its own."
    steps = []
    for k in (1, parts):
        torch.manual_seed(0)
        model = network("eca").double()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()
        steps.append(TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "float32", "cpu", smoothing=0.1, parts=k))
        steps[-1].logits = model  # no rounding to float32
        steps[-1](torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)
    for a, b in zip(steps[0].model.parameters(), steps[1].model.parameters()): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert_allclose(steps[0].read(), steps[1].read(), rtol=1e-5)


def test_work_that_changes_runs_eagerly_once_before_it_is_recorded_anew(monkeypatch):
    "With a GPU that only pretends: what is asked of PyTorch, in which order. `test_gpu` has the true one."
    asked = []
    class Graph:
        def replay(self): asked.append("replay")
    @contextlib.contextmanager
    def recording(*args, **kw):
        asked.append("record:")
        yield
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    step = Recorded(lambda x, y: asked.append("compute"), torch.device("cpu"), False)
    step.use_graph = True
    for calls, eager in ((5, 3), (3, 1), (3, 1)):
        step.forget()
        for _ in range(calls): step(torch.zeros(2), torch.zeros(2))
        assert asked == ["compute"]*eager + ["record:", "compute"] + ["replay"]*(calls - eager) and step.settled
        asked.clear()


# ---- interruption

@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_an_interrupted_run_ends_as_an_undisturbed_one_bit_for_bit(make, data, tmp_path):
    undisturbed, path = train(data, network(policy=make())), tmp_path/"run.pt"
    assert [u["epoch"] for u in undisturbed[0]["updates"]] == [0, 1] and undisturbed[0]["final"]["skip_rate"] > 0  # the case is worth the name
    for seed, stop in ((0, 0), (98, 1)):  # interrupted twice; other initial weights the second time: all must come from the checkpoint
        with pytest.raises(Interrupted): train(data, network(policy=make(), seed=seed), path, stop)
    resumed = train(data, network(policy=make(), seed=99), path)
    assert_same_run(resumed, undisturbed)
    assert resumed[2]["resumed_at"] == [1, 2] and undisturbed[2]["resumed_at"] == []


def test_a_finished_run_trains_no_further(data, tmp_path):
    first = train(data, network(), tmp_path/"run.pt")
    seen = []
    again = fit(network(seed=3), data, settings_of(), checkpoint=tmp_path/"run.pt", on_epoch=seen.append)
    assert not seen and again["epochs"] == first[0]["epochs"] and again["final"] == first[0]["final"]


def sealed(path, state):
    save_checkpoint(path, state)
    return path.read_bytes()


class Malicious:
    "Unpickling it would make a file."
    def __init__(self, target): self.target = target
    def __reduce__(self): return open, (str(self.target), "w")


def damaged_checkpoints(tmp_path, whole):
    other = {"model": network("ela", name="cifar_resnet20").state_dict(), "optimiser": {}, "epochs": [], "updates": [], "times": {}, "policy": {}}
    good = load_checkpoint(whole)
    lacking = {k: v for k, v in good.items() if k != "optimiser"}
    other_shape = {**good, "model": {**good["model"], "fc.weight": torch.zeros(7, 16)}}
    content = whole.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    target = tmp_path/"target"
    return {"cut short": content[:len(content) // 2], "empty": b"", "a single byte": b"x", "one bit flipped": bytes(flipped), "text": b"not a checkpoint" * 100,
            "of another network": sealed(target, other), "of another shape": sealed(target, other_shape), "lacking a part": sealed(target, lacking), "of another format": sealed(target, [1, 2]),
            "malicious": sealed(target, Malicious(tmp_path/"made by a pickle"))}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "An undisturbed run of two epochs, and the checkpoints of one that was interrupted after the first."
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(Interrupted): train(data, network(), folder/"whole.pt", 0, epochs=2)
    return train(data, network(), epochs=2), damaged_checkpoints(folder, folder/"whole.pt")


@pytest.mark.parametrize("kind", ["cut short", "empty", "a single byte", "one bit flipped", "text", "of another network", "of another shape", "lacking a part", "of another format", "malicious"])
def test_a_checkpoint_that_is_none_is_set_aside_and_the_run_starts_over(kind, whole, data, tmp_path):
    undisturbed, contents = whole
    path, said = tmp_path/"run.pt", []
    path.write_bytes(contents[kind])
    again = train(data, network(), path, said=said, epochs=2)
    assert_same_run(again, undisturbed)  # over from the start: nothing of the checkpoint is left in the weights
    assert again[2]["resumed_at"] == []
    assert len(said) == 1 and "starts over" in said[0] and "run.damaged" in said[0]
    assert (tmp_path/"run.damaged").read_bytes() == contents[kind] and path.exists()


def test_a_checkpoint_runs_no_code(tmp_path):
    for name, write in (("sealed", save_checkpoint), ("unsealed", lambda p, s: p.write_bytes(pickle.dumps(s)))):
        write(tmp_path/f"{name}.pt", {"model": Malicious(tmp_path/name)})
        with pytest.raises(CorruptFileError): load_checkpoint(tmp_path/f"{name}.pt")
        assert not (tmp_path/name).exists()


@few
@given(place=st.floats(0, 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(place, bit, tmp_path_factory):
    path = tmp_path_factory.mktemp("c")/"c.pt"
    save_checkpoint(path, {"a": torch.arange(5)})
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CorruptFileError): load_checkpoint(path)


# ---- a loss that is no number

def assert_diverged(result, epochs):
    assert result["status"] == "diverged" and len(result["epochs"]) == epochs
    last, final = result["epochs"][-1], result["final"]
    for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"): assert last[key] is None and final[key] is None
    assert result["rows"] == [] and result["divergence"] == {}
    canonical_json(result)  # no NaN in it


@pytest.mark.parametrize("attention", [None, "mrla_b", "ela"])
def test_a_loss_that_is_no_number_ends_the_run_as_diverged(attention, data, tmp_path):
    result, _, _ = train(data, network(attention), tmp_path/"run.pt", lr=1e30)
    assert_diverged(result, 1)
    assert result["final"]["best_test_accuracy"] is None and result["final"]["best_epoch"] is None
    again, _, _ = train(data, network(attention), tmp_path/"run.pt", lr=1e30)  # from its checkpoint: the same end, without training
    assert canonical_json(again) == canonical_json(result)


@pytest.mark.parametrize("attention", [None, "mrla_b", "ela"])
def test_weights_ruined_by_the_last_step_of_an_epoch_end_the_run_as_diverged(attention, data):
    "One step an epoch: its loss is a number, what it leaves behind is not; neither probe nor evaluation may take it for a result."
    result, _, _ = train(data, network(attention), lr=1e38, train_images=16)
    assert_diverged(result, 1)


def test_earlier_epochs_of_a_diverged_run_are_kept(data):
    model, calls = network(), []
    def poison(metrics):
        calls.append(metrics)
        if metrics["epoch"] == 1: model.fc.weight.data.fill_(float("nan"))
    result = fit(model, data, settings_of(), on_epoch=poison)
    assert len(calls) == 3 and calls[1]["test_accuracy"] is not None
    assert_diverged(result, 3)
    good = [e["test_accuracy"] for e in result["epochs"][:2]]
    assert result["final"]["best_test_accuracy"] == max(good) and result["final"]["best_epoch"] == good.index(max(good))


# ---- the mask during training

@pytest.mark.parametrize("mode, parts", [("retrieval", ("query", "norm")), ("module", ("query", "key", "value", "norm"))])
def test_what_a_fixed_mask_skips_is_never_touched_by_training(mode, parts, data):
    model = network(policy=Fixed("010100010"), skip=mode)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, data, settings_of(epochs=2, weight_decay=0.1))
    for name, value in model.layer_attention.state_dict().items():
        if name == "skip_mask" or "num_batches" in name: continue
        _, s, t, part, *_ = name.split(".")
        frozen = "010100010"[3 * int(s) + int(t)] == "1" and part in parts
        assert torch.equal(value, before[f"layer_attention.{name}"]) == frozen, name


@pytest.mark.parametrize("policy", [EBQM(initial="all", tau=None, warmup=0.0), Fixed(when="before", warmup=0.0), Fixed("deepest", rate=1.0, when="before", warmup=0.0)], ids=["ebqm", "some", "all"])
def test_the_fused_step_of_a_gpu_takes_up_a_retrieval_late(policy, data, monkeypatch, tmp_path):
    "Its parameters have their first gradient after the others'; also where training goes on from a checkpoint of before."
    fresh, path = (lambda: network(policy=copy.deepcopy(policy))), tmp_path/"run.pt"
    class Fused(torch.optim.SGD):
        def __init__(self, *args, **kw): super().__init__(*args, **{**kw, "fused": True})
    monkeypatch.setattr(torch.optim, "SGD", Fused)
    whole = train(data, fresh())
    rates = [e["skip_rate"] for e in whole[0]["epochs"]]
    assert rates[0] > rates[1], "the case is worth the name"
    with pytest.raises(Interrupted): train(data, fresh(), path, stop=0)
    state = load_checkpoint(path)
    late = [i for i, s in state["optimiser"]["state"].items() if not s["momentum_buffer"].any()]
    for i in late: del state["optimiser"]["state"][i]
    assert late, "the parameters without a gradient so far, of which an older checkpoint knew nothing"
    save_checkpoint(path, state)
    assert_same_run(train(data, fresh(), path), whole)


def test_momentum_begins_in_sgd_alone():
    with pytest.raises(ElaError, match="not for AdamW: leave it out"): begin_momentum(torch.optim.AdamW([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize("fused", [False, True])
def test_a_momentum_of_zero_changes_no_number(fused):
    def trained(begin, momentum):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(5)) for _ in range(3)]
        optimiser = torch.optim.SGD(parameters, 0.1, momentum, weight_decay=1e-4, fused=fused)
        if begin: begin_momentum(optimiser)
        for _ in range(3):
            for p in parameters: p.grad = torch.randn(5)
            optimiser.step()
        return torch.stack([*parameters])
    for momentum in (0.0, 0.9): assert torch.equal(trained(True, momentum), trained(False, momentum))


def test_a_new_mask_holds_from_the_next_epoch_on(data):
    "The weights of a layer stand still exactly in the epochs in which it is skipped."
    model, query = network(policy=MatchedRandom([{"epoch": 0, "mask": "011011011"}, {"epoch": 1, "mask": "0" * 9}])), []
    look = lambda metrics: query.append(model.layer_attention.stages[0][1].query.weight.detach().clone())
    result = fit(model, data, settings_of(), on_epoch=look)
    assert [e["skip_rate"] for e in result["epochs"]] == [0, 1, 0]
    assert [torch.equal(a, b) for a, b in zip(query, query[1:])] == [True, False]


def test_the_probe_changes_no_number(data):
    "A policy that looks after every epoch and skips nothing, beside one that never looks."
    models = network("mrla_b"), network("mrla_b")
    models[0].policy, models[1].policy = Never(warmup=0.0, freeze=0.0, updates=None), Never(updates=0)
    one, other = (train(data, m) for m in models)
    assert len(one[0]["updates"]) == 2 and other[0]["updates"] == []
    one[0]["updates"] = []
    assert_same_run(one, other)


def test_what_a_run_reports(data):
    result, _, times = train(data, network(policy=POLICIES["ebqm"]()))
    assert result["status"] == "done" and result["stages"] == [3, 3, 3]
    assert [e["epoch"] for e in result["epochs"]] == [0, 1, 2]
    assert result["skip_mask"] == result["updates"][-1]["mask"] and set(result["skip_mask"]) == {"0", "1"}
    assert result["final"]["test_accuracy"] == result["epochs"][-1]["test_accuracy"]
    assert result["final"]["best_test_accuracy"] == max(e["test_accuracy"] for e in result["epochs"])
    assert result["final"]["parameters"] == sum(p.numel() for p in network().parameters())
    for row, memory in zip(result["rows"], result["memory"], strict=True):
        for head in row:
            assert len(head) == len(memory)
            assert_allclose(sum(head), 1, atol=1e-4)
    for update in result["updates"]:
        assert [v is None for v in update["divergence"]] == [True, False, False] * 3 and len(update["fit"]) == 2
    assert len(times["train_s"]) == len(times["eval_s"]) == 3 and len(times["probe_s"]) == 2
    plain, _, _ = train(data, network(None), epochs=1)
    assert plain["stages"] == plain["rows"] == plain["memory"] == plain["updates"] == [] and plain["skip_mask"] == ""
    assert "skip_rate" not in plain["epochs"][0]


def test_every_setting_reaches_the_training(data):
    base = dict(epochs=2, momentum=0.9, weight_decay=1e-4)
    changed = [{}, dict(lr=0.03), dict(momentum=0.5), dict(weight_decay=0.1), dict(batch_size=8), dict(train_images=16), dict(lr_schedule="cosine"), dict(warmup_epochs=1), dict(precision="bf16"), dict(seed=1)]
    losses = [train(data, network("mrla_b"), **(base | c))[0]["final"]["test_loss"] for c in changed]
    assert len(set(losses)) == len(changed)


def test_the_seed_decides_and_nothing_else(data):
    one = train(data, network(), epochs=2)
    torch.rand(17)  # a different past
    assert_same_run(one, train(data, network(), epochs=2))
    other = train(data, network(), epochs=2, seed=1)
    assert other[0]["epochs"] != one[0]["epochs"]


@pytest.mark.parametrize("attention", ["ela", "none"])
def test_a_run_is_free_as_soon_as_nobody_holds_it(data, attention):
    "Without Python's search for cycles: on a GPU a run holds its weights, its momentum and its recorded steps."
    gc.collect()
    gc.disable()
    try:
        model = network(attention, policy=EBQM(warmup=0.0) if attention == "ela" else None)
        training, kept = Training(model, data, settings_of(epochs=2)), weakref.ref(model)
        del model
        while training.advance(): pass
        assert kept() is not None and training.result["status"] == "done"
        del training
        assert kept() is None
    finally: gc.enable()
