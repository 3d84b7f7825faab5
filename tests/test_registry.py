"""Every attention in the registry can do what users do with a network: train, evaluate, autocast, compile, export, copy, save, permute a batch."""
import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as F

from ela_repro.core import ElaError
from ela_repro.resnet import ATTENTIONS, GATES, create_model
from ela_repro.runs import LAYER_ATTENTIONS, METHODS

NAMED = [a for a in ATTENTIONS if a]
TINY = dict(name="cifar_resnet20", num_classes=5, width=0.25)


def network(attention, seed=0, **kw):
    "A small network without symmetry: nothing that starts at zero hides what comes before it."
    torch.manual_seed(seed)
    model = create_model(**{**TINY, "attention": attention, "drop_path": 0.0, **kw})
    for p in model.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.5)
    return model


def pictures(n=4, size=32, seed=1): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def trained(attention, **kw):
    "After two steps, so that running statistics are not those of a fresh network."
    model = network(attention, **kw).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for seed in (1, 2):
        optimizer.zero_grad()
        F.cross_entropy(model(pictures(8, seed=seed)), torch.arange(8) % 5).backward()
        optimizer.step()
    return model.eval()


def test_methods_cover_the_registry():
    assert {m.attention for m in METHODS.values()} == {a or "none" for a in ATTENTIONS}


@pytest.mark.parametrize("attention", NAMED)
def test_every_parameter_learns(attention):
    model = network(attention, width=1.0).train()  # SE squeezes 16 channels to one, which can be silent
    model.double()(pictures(size=16).double()).sin().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    scale = max(float(p.grad.abs().max()) for p in model.parameters())
    silent = [n for n, p in model.named_parameters() if p.grad.abs().max() < 1e-9*scale]
    # layer 1 of a stage has one entry to read: its query and key change nothing; a softmax does not see what is added to all its logits, nor a batch norm what is added to a channel
    free = {"gc": ("look.bias",), "non_local": ("phi.bias", "g.bias", "out.bias")}.get(attention, ("query.weight", "key.weight", "norm.bias") if attention in LAYER_ATTENTIONS else ())
    assert [n for n in silent if not n.endswith(free)] == []


@pytest.mark.parametrize("attention", NAMED)
def test_the_loss_falls(attention):
    torch.manual_seed(0)
    model, images, labels = create_model(**TINY, attention=attention), pictures(16, size=16), torch.arange(16) % 5
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6*losses[0]


@pytest.mark.parametrize("name", ("cifar_resnet20", "cifar_basic_resnet20", "resnet50"))
@pytest.mark.parametrize("attention", NAMED)
def test_a_permuted_batch_gives_permuted_logits(attention, name):
    model = network(attention, name=name, width=1.0 if "basic" in name else 0.25).double().eval()
    images, order = pictures(5, 64 if name == "resnet50" else 32).double(), torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(model(images[order]), logits[order], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", NAMED)
def test_train_and_eval_differ_by_statistics_alone(attention):
    "In evaluation nothing is drawn and nothing is counted; a pass in between leaves no trace."
    model = trained(attention)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first = model(pictures())
        model(pictures(3, seed=7))
        assert torch.equal(model(pictures()), first)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("attention", NAMED)
def test_bf16_autocast_stays_near(attention):
    model = trained(attention)
    with torch.no_grad():
        exact = model(pictures())
        with torch.autocast("cpu", torch.bfloat16): rough = model(pictures())
    assert torch.isfinite(rough).all() and (rough.float() - exact).abs().max() < 0.1*max(1, exact.abs().max())
    model.train()
    with torch.autocast("cpu", torch.bfloat16): loss = F.cross_entropy(model(pictures(8)), torch.arange(8) % 5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("attention", NAMED)
def test_channels_last_changes_nothing(attention):
    model = trained(attention).double()
    with torch.no_grad():
        expected = model(pictures().double())
        model = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(pictures().double().contiguous(memory_format=torch.channels_last)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", NAMED)
def test_copies_and_files_compute_the_same(attention):
    model, buffer = trained(attention), io.BytesIO()
    with torch.no_grad():
        expected = model(pictures())
        assert torch.equal(copy.deepcopy(model)(pictures()), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(pictures()), expected)
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        fresh = network(attention, seed=9).eval()
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(fresh(pictures()), expected)


@pytest.mark.parametrize("attention", NAMED)
def test_export(attention):
    model = trained(attention)
    program = torch.export.export(model, (pictures(),), strict=False)
    with torch.no_grad(): torch.testing.assert_close(program.module()(pictures(seed=3)), model(pictures(seed=3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", NAMED)
def test_compiled_without_a_break(attention):
    "Forward and backward of the graph that `torch.compile` makes; the backend that runs it as it stands needs no compiler."
    model = network(attention).double().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = pictures(3, size=16).double()
    results = []
    for network_ in (copy.deepcopy(model), compiled):
        out = network_(images)
        out.sin().sum().backward()
        results.append((out.detach(), [p.grad for p in network_.parameters()]))
    (out, grads), (out_c, grads_c) = results
    torch.testing.assert_close(out_c, out, rtol=1e-9, atol=1e-9)
    for g, c in zip(grads, grads_c): torch.testing.assert_close(c, g, rtol=1e-8, atol=1e-9)
    torch.compiler.reset()


@pytest.mark.parametrize("attention", NAMED)
@pytest.mark.parametrize("name", ("cifar_resnet20", "cifar_basic_resnet20", "resnet50"))
def test_every_network_can_have_every_attention(attention, name):
    with torch.device("meta"):
        plain, model = create_model(name, 10), create_model(name, 10, attention)
        count = lambda m: sum(p.numel() for p in m.parameters())
        assert count(model) > count(plain)
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
        assert {k for k in plain.state_dict() if k not in model.state_dict()} == set()


def test_near_matches_and_foreign_options():
    for wrong, near in (("ca", "eca"), ("dla", "dla_b"), ("nonlocal", "non_local"), ("fcanet", "fca")):
        with pytest.raises(ElaError, match=f"unknown attention '{wrong}'.*{near}"): create_model("cifar_resnet20", attention=wrong)
    for attention in NAMED:
        with pytest.raises(ElaError, match="unknown option of attention"): create_model("cifar_resnet20", attention=attention, reductoin=4)
    with pytest.raises(ElaError, match="unknown option"): create_model("cifar_resnet20", attention="eca", reduction=4)


def test_recipes_are_known_where_they_are_said_to_be():
    "Two recipes give two networks exactly where `runs` says that an attention knows them."
    for attention in NAMED:
        stable, released = (create_model(**TINY, attention=attention, recipe=r) for r in ("stable", "released"))
        parts = [m for m in stable.modules() if hasattr(m, "recipe")]
        assert bool(parts) == (attention in LAYER_ATTENTIONS) and attention in {*GATES, *LAYER_ATTENTIONS, "dia", "rla"}
        assert [p.numel() for p in stable.parameters()] == [p.numel() for p in released.parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", NAMED)
def test_a_captured_step_is_the_eager_step(attention):
    "A training step recorded as a CUDA graph, in bf16 and channels last, computes what the eager step computes."
    model = network(attention, width=0.5).cuda().to(memory_format=torch.channels_last).train()
    images, labels = pictures(16).cuda().contiguous(memory_format=torch.channels_last), (torch.arange(16) % 5).cuda()

    def step(net):
        with torch.autocast("cuda", torch.bfloat16): loss = F.cross_entropy(net(images), labels)
        loss.backward()
        return loss
    twin = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3): step(model)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3): step(twin)
    for m in (model, twin): m.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): loss = step(model)
    graph.replay()
    expected = step(twin)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    for (n, p), q in zip(model.named_parameters(), twin.parameters()):
        if q.grad is not None: torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.02*q.grad.abs().max().item() + 1e-4, msg=lambda m: f"{n}: {m}")
