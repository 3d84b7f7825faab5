"""DIA and RLA inside whole networks, against a second implementation that knows only names of weights and the formulas."""
import math

import pytest
import torch
from torch.nn import functional as F

from ela_repro.core import ElaError
from ela_repro.recurrent import DIA, RLA, DIACell
from ela_repro.resnet import create_model

# Name, width, images: both arrangements, maps of even and of odd size, up to 12 blocks in a stage
NETWORKS = [("cifar_resnet20", 0.25, 32), ("cifar_basic_resnet20", 0.5, 13), ("cifar_resnet110", 0.13, 16), ("resnet50", 0.25, 64), ("resnet50", 0.13, 44)]


class Plain:
    "A network computed from the weights in `p` alone: explicit loops, own batch norm, no module of the package."
    def __init__(self, p: dict, attention: str, training: bool):
        self.p, self.attention, self.training = p, attention, training

    def norm(self, x, name):
        p, c = self.p, (1, -1, 1, 1)
        mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) if self.training else (p[name + ".running_mean"], p[name + ".running_var"])
        return (x - mean.view(c)) / (var.view(c) + 1e-5).sqrt() * p[name + ".weight"].view(c) + p[name + ".bias"].view(c)

    def conv(self, x, name, stride=1):
        w = self.p[name + ".weight"]
        return F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)

    def branch(self, x, block, stride):
        "Two or three convolutions; the 3x3 one has the stride, the first of two if there are two."
        last = 3 if f"{block}.conv3.weight" in self.p else 2
        for i in range(1, last + 1):
            x = self.norm(self.conv(x, f"{block}.conv{i}", stride if i == last - 1 else 1), f"{block}.bn{i}")
            if i < last: x = x.clamp(min=0)
        return x

    def shortcut(self, x, block, stride):
        return self.norm(self.conv(x, f"{block}.downsample.0", stride), f"{block}.downsample.1") if f"{block}.downsample.0.weight" in self.p else x

    def two_layers(self, y, name):
        w, b = (lambda i: self.p[f"{name}.{i}.weight"]), (lambda i: self.p[f"{name}.{i}.bias"])
        return (y @ w(0).T + b(0)).clamp(min=0) @ w(2).T + b(2)

    def dia(self, x, y, shortcut, stage, t):
        if t == 0: self.h = self.c = torch.zeros(y.shape[:2], dtype=y.dtype)
        cell = f"layer_attention.cells.{stage}"
        z = self.two_layers(y.sum((2, 3)) / y[0, 0].numel(), cell + ".input") + self.two_layers(self.h, cell + ".recurrent")
        n, sigmoid = y.shape[1], lambda v: 1 / (1 + (-v).exp())
        self.c = sigmoid(z[:, n:2*n]) * self.c + sigmoid(z[:, :n]) * (z[:, 3*n:].exp() - (-z[:, 3*n:]).exp()) / (z[:, 3*n:].exp() + (-z[:, 3*n:]).exp())
        self.h = sigmoid(z[:, 2*n:3*n]) * sigmoid(self.c)
        return (shortcut + self.h[:, :, None, None] * y).clamp(min=0)

    def rla(self, x, y, shortcut, stage, t):
        if y.shape[2] != self.h.shape[2]: self.h = halved(self.h)
        seen = torch.einsum("kc,bcij->bkij", self.p[f"layer_attention.read.{stage}.weight"][:, :, 0, 0], y)
        self.h = self.conv(self.norm(self.h + seen, f"layer_attention.norms.{stage}.{t}").tanh(), f"layer_attention.step.{stage}")
        return (shortcut + y).clamp(min=0)

    def __call__(self, x):
        p, imagenet = self.p, self.p["conv1.weight"].shape[-1] == 7
        x = self.norm(self.conv(x, "conv1", 2 if imagenet else 1), "bn1").clamp(min=0)
        if imagenet: x = F.max_pool2d(x, 3, 2, 1)
        if self.attention == "rla": self.h = torch.zeros(len(x), p["layer_attention.step.0.weight"].shape[0], *x.shape[2:], dtype=x.dtype)
        for stage in range(4 if imagenet else 3):
            t = 0
            while f"layer{stage + 1}.{t}.conv1.weight" in p:
                block, stride = f"layer{stage + 1}.{t}", 2 if stage and not t else 1
                y = self.branch(torch.cat([x, self.h], 1) if self.attention == "rla" else x, block, stride)
                x = getattr(self, self.attention)(x, y, self.shortcut(x, block, stride), stage, t)
                t += 1
        if self.attention == "rla": x = torch.cat([x, self.norm(self.h, "layer_attention.last_norm").clamp(min=0)], 1)
        return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]


def halved(h):
    "Means of 2x2 pixels, of as many as there are at the border of an odd map, pixel by pixel."
    return torch.stack([torch.stack([h[:, :, i:i + 2, j:j + 2].mean((2, 3)) for j in range(0, h.shape[3], 2)], -1) for i in range(0, h.shape[2], 2)], -2)


def network(attention, name="cifar_resnet20", width=0.25, **kw):
    "In float64, with norms, biases and statistics that are not those of a fresh network: nothing may hide behind a zero."
    torch.manual_seed(0)
    model = create_model(name, 5, attention, width=width, **kw).double()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.dim() == 1: p.add_(0.3*torch.randn_like(p))
        for n, b in model.named_buffers():
            if n.endswith("running_mean"): b.normal_(std=0.2)
            if n.endswith("running_var"): b.uniform_(0.7, 1.5)
    return model


def pictures(n=3, size=32, seed=1): return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(model): return {n: v.detach().clone().requires_grad_(n in dict(model.named_parameters())) for n, v in model.state_dict().items()}


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name, width, size", NETWORKS, ids=[f"{n}-{s}px" for n, _, s in NETWORKS])
@pytest.mark.parametrize("attention", ("dia", "rla"))
def test_a_whole_network_is_the_formula(attention, name, width, size, training):
    "Logits, and gradients of the images and of every parameter."
    model = network(attention, name, width).train(training)
    p, ours, theirs = weights(model), pictures(size=size).requires_grad_(), pictures(size=size).requires_grad_()
    out, expected = model(ours), Plain(p, attention, training)(theirs)
    assert out.std(0).min() > 1e-3                                    # the images are told apart
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for logits in (out, expected): logits.sin().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9 * max(1, theirs.grad.abs().max().item()))
    for n, q in model.named_parameters():
        torch.testing.assert_close(q.grad, p[n].grad, rtol=1e-9, atol=1e-9 * max(1, p[n].grad.abs().max().item()), msg=lambda m: f"{n}: {m}")


@pytest.mark.parametrize("attention", ("dia", "rla"))
def test_the_formula_would_notice(attention):
    "Each slip that is easy to make moves the logits by far more than the tolerance."
    model, images = network(attention).eval(), pictures()
    expected = model(images)

    class Slip(Plain):
        def __init__(self, what): self.what = what; super().__init__(weights(model), attention, False)
        def dia(self, x, y, shortcut, stage, t):
            if self.what == "the state is reset at every block": t = 0
            return super().dia(x, y, shortcut, stage, t)
        def rla(self, x, y, shortcut, stage, t):
            if self.what == "the map is read after the addition": y = (shortcut + y).clamp(min=0)
            if self.what == "the map starts anew at a stage" and not t: self.h = torch.zeros_like(self.h)
            return super().rla(x, y, shortcut, stage, t)
    slips = {"dia": ["the state is reset at every block"], "rla": ["the map is read after the addition", "the map starts anew at a stage"]}
    torch.testing.assert_close(Slip("")(images), expected, rtol=1e-9, atol=1e-9)
    for what in slips[attention]: assert (Slip(what)(images) - expected).abs().max() > 1e-6, what


@pytest.mark.parametrize("steps", (1, 2, 12))
def test_a_cell_stands_alone(steps):
    "Float64, up to 12 steps, any leading axes; the state that is handed in stays as it was."
    torch.manual_seed(0)
    cell, ys, state = DIACell(10, reduction=3).double(), torch.randn(steps, 4, 10, dtype=torch.float64), None
    plain = Plain({f"layer_attention.cells.0.{n}": v for n, v in cell.state_dict().items()}, "dia", False)
    for t, y in enumerate(ys):
        kept = None if state is None else [s.clone() for s in state]
        before, state = state, cell(y, state)
        plain.dia(None, y[..., None, None], torch.zeros(1), 0, t)
        torch.testing.assert_close(state, (plain.h, plain.c), rtol=1e-9, atol=1e-9)
        assert kept is None or all(torch.equal(a, b) for a, b in zip(before, kept))
    torch.testing.assert_close(cell(ys)[0][-1], cell(ys[-1])[0])
    assert 0 < state[0].min() and state[0].max() < 1


@pytest.mark.parametrize("attention", ("dia", "rla"))
def test_a_permuted_batch_trains_the_same(attention):
    "In training, too: logits are permuted, and gradients and statistics are what they were."
    order, results = torch.tensor([3, 1, 4, 0, 2]), []
    for images in (pictures(5), pictures(5)[order]):
        model = network(attention).train()
        logits = model(images)
        logits.sin().sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    (logits, grads, buffers), (logits_p, grads_p, buffers_p) = results
    torch.testing.assert_close(logits_p, logits[order], rtol=1e-9, atol=1e-9)
    for a, b in ((grads, grads_p), (buffers, buffers_p)): torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("attention", ("dia", "rla"))
def test_no_state_leaks_between_passes(attention):
    "Other batch and map sizes in between, two graphs alive at once: a pass knows only its own images."
    model, images = network(attention).eval(), pictures(4)
    alone = model(images)
    other, again = model(pictures(2, size=20, seed=5)), model(images)
    assert torch.equal(again, alone)
    other.sum().backward()                       # would fail, or reach the wrong images, if graphs shared a state
    model.zero_grad(); again.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(); alone.sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))


def test_states_start_where_they_should():
    "DIA's state starts anew at every stage, RLA's is handed on."
    dia, rla = DIA([(8, 2), (16, 2)]), RLA([(8, 2), (16, 2)], 3)
    first, hidden = dia.start(), rla.start()
    first.value = hidden.value = "seen"
    assert dia.start(first).value is None and rla.start(hidden).value == "seen" and rla.start().value is None


@pytest.mark.parametrize("size", ((1, 1), (2, 5), (7, 3), (33, 31)))
def test_maps_of_any_size(size):
    for name in ("cifar_resnet20", "resnet50"):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad(): assert torch.isfinite(network("rla", name).eval()(images)).all()


def test_own_convolutions_start_as_the_backbones_do():
    torch.manual_seed(0)
    rla = RLA([(256, 1)], 64)
    for conv, fan_out in ((rla.read[0], 64), (rla.step[0], 64*9)):
        assert conv.bias is None and conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)


def test_errors_say_what_works():
    for reduction in (0, -1, 65, 2.5, "4", True, None):
        with pytest.raises(ElaError, match="an integer from 1 to 64; the cell has 64 channels"): DIACell(64, reduction)
        with pytest.raises(ElaError, match="from 1 to 64"): DIA([(64, 2)], reduction)
    for k in (0, -1, 2.5, "12", True, None):
        with pytest.raises(ElaError, match="hidden_channels is .*integer, at least 1"): RLA([(64, 2)], k)
    for peer in (DIA, RLA):
        for stages in (None, [], [64], [(64, 2.5)], [(0, 2)], [(64, 2, 1)]):
            with pytest.raises(ElaError, match=r"stages is .*\(channels, layers\) pair a stage"): peer(stages)
    with pytest.raises(ElaError, match="did you mean 'reduction'"): create_model("cifar_resnet20", 10, "dia", reductoin=4)
    with pytest.raises(ElaError, match="from 1 to 16"): create_model("cifar_basic_resnet20", 10, "dia", reduction=17)
    with pytest.raises(ElaError, match="hidden_channels is 0"): create_model("cifar_resnet20", 10, "rla", hidden_channels=0)
