"""The fused kernels against the plain formulas, in float64 in Triton's interpreter, or on a GPU: `python -m pytest tests/test_kernels.py`."""
import gc
import os
import subprocess
import sys
import weakref
from itertools import product

import pytest
import torch
from torch import nn

from ela_repro import kernels
from ela_repro.dynamic import DLAB
from ela_repro.ela import ELA, evaluating, probe, rehearse
from ela_repro.engine import EvaluationStep, TrainStep
from ela_repro.layer_attention import MRLAB, LayerAttention, LightLayerAttention, Memory, retrieve_concat
from ela_repro.resnet import create_model

GPU = torch.cuda.is_available()
DEVICE, DTYPE = "cuda" if GPU else "cpu", torch.float64
HERE = kernels.available()
runs_kernels = pytest.mark.skipif(not HERE, reason="needs a GPU, or Triton's interpreter: test_in_the_interpreter starts it")
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.skipif(HERE, reason="the tests below ran here")
@pytest.mark.skipif(kernels.triton is None, reason="this PyTorch comes without Triton")
def test_in_the_interpreter():
    "All other tests of this file, in a process of its own: Triton reads the variable when kernels are defined."
    done = subprocess.run([sys.executable, "-m", "pytest", __file__, "-x", "-p", "no:cacheprovider"], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture(params=[512, 1], ids=["one tile", "rounds"])
def rounds(request, monkeypatch):
    "Small grids: with few programs asked for, a program computes several tiles."
    monkeypatch.setattr(kernels, "PROGRAMS", request.param)


def layers(T, C, d, recipe, form="fused", p=0.0):
    made = [LayerAttention(C, d, recipe, p, form).to(DEVICE, DTYPE) for _ in range(T)]
    for l in made:
        nn.init.normal_(l.norm.weight)
        nn.init.normal_(l.norm.bias)
        nn.init.normal_(l.value.weight)
    return made


def outcome(made, x, skipped=(), between=torch.sin):
    "Output, gradients and running statistics of a stage in which the layers named in `skipped` only remember."
    x, memory = x.clone(memory_format=torch.preserve_format).requires_grad_(), Memory()
    y = x
    for t, layer in enumerate(made):
        layer.zero_grad()
        layer.norm.reset_running_stats()
        y = layer.remember(between(y), memory)[0] if t in skipped else layer(between(y), memory)
    (y*torch.arange(y.numel(), device=y.device).view(y.shape).sin()).sum().backward()
    grads = {f"{t} {n}": p.grad for t, l in enumerate(made) for n, p in l.named_parameters()}
    stats = {f"{t} {n}": b.clone() for t, l in enumerate(made) for n, b in l.named_buffers()}
    return {"output": y.detach(), "x": x.grad, **grads, **stats}


def assert_equal(ours, plain, eps):
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        got = ours[name]
        assert (got is None) == (expected is None), name
        if got is not None: torch.testing.assert_close(got, expected.to(got.dtype), atol=eps*(1 + expected.double().abs().max().item()), rtol=0, msg=lambda m: f"{name}: {m}")


def twins(T, C, d, recipe, p=0.0):
    fused = layers(T, C, d, recipe, p=p)
    plain = layers(T, C, d, recipe, "concat", p)
    for a, b in zip(fused, plain): b.load_state_dict(a.state_dict())
    return fused, plain


@runs_kernels
@pytest.mark.parametrize("recipe, layout", list(product(("stable", "released"), FORMATS)))
@pytest.mark.parametrize("T, C, d, H, W", [(1, 8, 4, 5, 3), (3, 12, 4, 7, 5), (4, 22, 11, 4, 4), (2, 24, 24, 1, 1), (3, 6, 1, 9, 8)])
def test_a_stage_equals_the_plain_formula(recipe, layout, T, C, d, H, W, rounds):
    torch.manual_seed(T)
    fused, plain = twins(T, C, d, recipe)
    x = torch.randn(3, C, H, W, dtype=DTYPE, device=DEVICE).to(memory_format=FORMATS[layout])
    assert_equal(outcome(fused, x), outcome(plain, x), 1e-9)


@runs_kernels
@pytest.mark.parametrize("recipe", ["stable", "released"])
def test_norms_that_keep_their_statistics_in_training(recipe):
    "As in detection: the layer trains, its batch norm is in evaluation mode."
    torch.manual_seed(0)
    fused, plain = twins(3, 8, 4, recipe)
    for layer in (*fused, *plain): layer.norm.eval()
    x = torch.randn(3, 8, 5, 4, dtype=DTYPE, device=DEVICE)
    assert_equal(outcome(fused, x), outcome(plain, x), 1e-9)
    assert all(layer.norm.num_batches_tracked == 0 for layer in fused)


@runs_kernels
@pytest.mark.parametrize("n, heads, width", [(1, 8, 32), (1, 2, 1), (3, 4, 32), (6, 8, 16)])
def test_a_row_of_huge_logits_is_a_row(n, heads, width):
    "Raw queries and keys of an untrained network's evaluation reach 10^6 and more: the largest logit wins, and nothing overflows."
    torch.manual_seed(n)
    pooled, *keys = 1e6*torch.randn(n, 16, heads*width, device=DEVICE)
    kernels_ = [torch.randn(1, 1, 5, device=DEVICE) for _ in range(2)]
    key, query, row = kernels.row_and_key(pooled, *kernels_, keys, heads, normalise=False)
    logits = torch.stack([(query.double()*k.double()).unflatten(1, (heads, -1)).sum(-1) for k in (*keys, key)])
    assert row.isfinite().all() and torch.equal(row.argmax(0), logits.argmax(0))
    torch.testing.assert_close(row.sum(0), torch.ones(16, heads, device=DEVICE))


@runs_kernels
def test_twelve_layers():
    torch.manual_seed(0)
    fused, plain = twins(12, 8, 4, "stable")
    x = torch.randn(2, 8, 3, 3, dtype=DTYPE, device=DEVICE)
    assert_equal(outcome(fused, x), outcome(plain, x), 1e-9)


@runs_kernels
@pytest.mark.parametrize("skipped", [(1,), (1, 3), (2, 3), (0,), (0, 1, 2, 3)])
def test_layers_that_only_remember(skipped):
    torch.manual_seed(1)
    fused, plain = twins(4, 8, 4, "stable")
    x = torch.randn(2, 8, 4, 4, dtype=DTYPE, device=DEVICE)
    assert_equal(outcome(fused, x, skipped), outcome(plain, x, skipped), 1e-9)


@runs_kernels
def test_drop_path_draws_the_same_samples():
    fused, plain = twins(2, 8, 4, "stable", p=0.5)
    x = torch.randn(9, 8, 4, 4, dtype=DTYPE, device=DEVICE)
    found = []
    for made in (fused, plain):
        torch.manual_seed(3)
        found.append(outcome(made, x))
    assert_equal(*found, 1e-9)


@runs_kernels
@pytest.mark.parametrize("recipe, layout, training", list(product(("stable", "released"), FORMATS, (True, False))))
@pytest.mark.parametrize("C, d, H, W", [(8, 4, 5, 3), (22, 11, 4, 4), (6, 1, 9, 8)])
def test_the_light_form_equals_the_plain_formula(recipe, layout, training, C, d, H, W, rounds):
    torch.manual_seed(C)
    made = LightLayerAttention(C, d, recipe, 0.5).to(DEVICE, DTYPE).train(training)
    for p in (made.norm.weight, made.norm.bias, made.value.weight, made.query.weight, made.key.weight): nn.init.normal_(p)
    maps = [torch.randn(4, C, H, W, dtype=DTYPE, device=DEVICE).to(memory_format=FORMATS[layout]).requires_grad_() for _ in range(2)]
    found = []
    for made.fused in (True, False):
        made.zero_grad()
        made.norm.reset_running_stats()
        torch.manual_seed(3)  # of the drop-path
        y = made(torch.sin(maps[0]), torch.cos(maps[1]))
        grads = torch.autograd.grad((y*torch.arange(y.numel(), device=y.device).view(y.shape).sin()).sum(), [*maps, *made.parameters()])
        found.append({"output": y.detach(), "x": grads[0], "shortcut": grads[1], **{n: g for (n, _), g in zip(made.named_parameters(), grads[2:])}, **{n: b.clone() for n, b in made.named_buffers()}})
    assert_equal(*found, 1e-9)


@runs_kernels
@pytest.mark.parametrize("attention", ["mrla_l", "dla_l"])
def test_networks_with_the_light_form_agree(attention):
    torch.manual_seed(0)
    nets = [create_model("cifar_resnet20", 10, attention, width=0.25, drop_path=0.0, form=form).to(DEVICE, DTYPE) for form in ("fused", "concat")]
    assert [{m.fused for m in net.modules() if isinstance(m, LightLayerAttention)} for net in nets] == [{True}, {False}]
    for name, p in nets[0].named_parameters():
        if "norm.weight" in name: nn.init.normal_(p)  # in recipe "stable" it starts small
    nets[1].load_state_dict(nets[0].state_dict())
    x, found = torch.randn(3, 3, 12, 12, dtype=DTYPE, device=DEVICE), []
    for net in nets:
        net(x).square().sum().backward()
        found.append({n: p.grad for n, p in net.named_parameters()} | dict(net.named_buffers()))
    assert_equal(*found, 1e-8)


@runs_kernels
def test_a_map_in_any_strides():
    fused, plain = twins(2, 8, 4, "stable")
    x = torch.randn(2, 8, 6, 5, dtype=DTYPE, device=DEVICE)
    turned = lambda y: torch.sin(y).transpose(2, 3) if y.shape[2] == 6 else torch.sin(y)
    assert not turned(x).is_contiguous() and not turned(x).is_contiguous(memory_format=torch.channels_last)
    assert_equal(outcome(fused, x, between=turned), outcome(plain, x, between=turned), 1e-9)


@runs_kernels
@pytest.mark.parametrize("skip", ["retrieval", "module", "reuse"])
@pytest.mark.parametrize("training", [True, False])
def test_ela_in_every_mode(skip, training):
    "Two stages with a mask, trained and evaluated; the gradients of everything."
    torch.manual_seed(2)
    nets = [ELA([(8, 4), (16, 3)], skip, head_width=4, drop_path=0.0, form=f).to(DEVICE, DTYPE).train(training) for f in ("fused", "concat")]
    for p in nets[0].parameters(): nn.init.normal_(p)
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = torch.randn(2, 8, 5, 5, dtype=DTYPE, device=DEVICE), torch.randn(2, 16, 3, 3, dtype=DTYPE, device=DEVICE)
    found = []
    for net in nets:
        net.set_skip_mask([0, 1, 0, 1, 0, 0, 1])
        for stage, (x, n) in enumerate(((first, 4), (second, 3))):
            memory = net.start()
            for t in range(n): x = net(torch.sin(x), stage, t, memory)
            found.append({"x": x.detach()})
            x.square().sum().backward()
        found.append({n: p.grad for n, p in net.named_parameters()} | {n: b for n, b in net.named_buffers()})
    for ours, plain in zip(found[:3], found[3:]): assert_equal(ours, plain, 1e-9)


class Interacting(nn.Module):
    "As much of a network as `rehearse` asks for."
    def __init__(self, attention):
        super().__init__()
        self.layer_attention = attention


@runs_kernels
@pytest.mark.parametrize("skip", ["retrieval", "module", "reuse"])
def test_a_probe_sees_the_same_rows_and_contributions_in_every_form(skip):
    found = []
    for form in ("fused", "list"):
        torch.manual_seed(0)
        net = create_model("cifar_resnet20", 3, "ela", skip=skip, width=0.25, form=form).to(DEVICE, DTYPE)
        for layer in net.modules():
            if isinstance(layer, LayerAttention): nn.init.normal_(layer.norm.weight)
        net.set_skip_mask([0, 1, 0, 1, 1, 0])
        found.append(probe(net, torch.randn(3, 3, 16, 16, dtype=DTYPE, device=DEVICE), shares=True))
    for ours, plain in ((a.rows + a.shares, b.rows + b.shares) for a, b in [found]):
        for x, y in zip(ours, plain, strict=True): torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert min(s.min().item() for s in found[0].shares) > 0


@runs_kernels
@pytest.mark.parametrize("common", [False, True], ids=["own statistics", "common statistics"])
@pytest.mark.parametrize("name", ["mrla_b", "mrla_l", "dla_b", "dla_l", "ela"])
def test_every_layer_attention_is_rehearsed_and_left_as_it_was(name, common, monkeypatch):
    "Maps hold anything then: no norm may learn from them, SyncBatchNorm neither."
    monkeypatch.setattr(kernels, "_compile", lambda asked: None)
    net, empty = create_model("cifar_resnet20", 3, name, width=0.25).to(DEVICE), torch.empty
    if common: net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: made.fill_(float("nan")) if (made := empty(*a, **kw)).is_floating_point() else made)  # the worst that a map may hold
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert rehearse(net, 2, (8, 4, 2), torch.float32, DEVICE) > 0
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())


@runs_kernels
@pytest.mark.parametrize("name", ["mrla_b", "mrla_l", "dla_b", "dla_l", "ela"])
def test_no_step_in_bf16_asks_for_a_kernel_that_was_not_rehearsed(name, monkeypatch):
    "Under autocast some of what the kernels are handed is narrow, some is not; here they are noted, not run."
    monkeypatch.setattr(kernels, "_compile", lambda asked: None)
    net, images = create_model("cifar_resnet20", 3, name, width=0.25).to(DEVICE).to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8, device=DEVICE)
    with monkeypatch.context() as m:
        rehearsed, real = set(), kernels.variant
        m.setattr(kernels, "variant", lambda *a: rehearsed.add(real(*a)) or real(*a))
        assert rehearse(net, 2, (8, 4, 2), torch.bfloat16, DEVICE) == len(rehearsed) > 0
    needed = set()
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *args, **options: needed.add(kernels.variant(kernel, args, options)))
    step, evaluation = TrainStep(net, torch.optim.SGD(net.parameters(), 0.1), "bf16", DEVICE, graphs=False), EvaluationStep(net, "bf16", DEVICE, graphs=False)
    step(images, torch.tensor([0, 1], device=DEVICE))
    with evaluating(net): evaluation(images, torch.tensor([0, 1], device=DEVICE))
    if name == "ela": probe(net, images)
    assert needed and needed <= rehearsed, needed - rehearsed


@runs_kernels
@pytest.mark.parametrize("skip", ["retrieval", "module", "reuse"])
def test_no_mask_asks_for_a_kernel_that_was_not_rehearsed(skip, monkeypatch):
    torch.manual_seed(0)
    net = Interacting(ELA([(8, 5), (16, 2)], skip, head_width=4, drop_path=0.2).to(DEVICE, DTYPE))
    ela, sizes, launched, needed = net.layer_attention, (4, 2), {}, set()
    ela.set_skip_mask(start := [t % 2 for t in range(7)])
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    monkeypatch.setattr(kernels, "_compile", lambda asked: None)  # what is compiled is seen on a GPU
    with monkeypatch.context() as m:
        real = kernels.variant
        m.setattr(kernels, "variant", lambda *a: launched.setdefault(real(*a)) or real(*a))
        assert rehearse(net, 3, sizes, DTYPE, DEVICE) == len(launched) > 0
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and torch.equal(random, torch.get_rng_state())
    assert ela.skipped == [bool(s) for s in start] and all(p.grad is None for p in net.parameters()) and kernels._asked is None
    launch = kernels.launch
    def noting(kernel, grid, *args, **options):
        needed.add(kernels.variant(kernel, args, options))
        launch(kernel, grid, *args, **options)
    monkeypatch.setattr(kernels, "launch", noting)
    for mask in [[0]*7, [1]*7, start, *torch.randint(0, 2, (2, 7)).tolist()]:
        ela.set_skip_mask(mask)
        for stage, (channels, n) in enumerate(((8, 5), (16, 2))):
            for batch in (3, 1) if mask == [0]*7 else (3,):  # evaluation: of any size
                x, memory = torch.randn(batch, channels, sizes[stage], sizes[stage], dtype=DTYPE, device=DEVICE).to(memory_format=torch.channels_last), ela.start()
                with torch.enable_grad() if batch == 3 else evaluating(ela):
                    for t in range(n): x = ela(torch.sin(x.requires_grad_() if not t and batch == 3 else x), stage, t, memory)
                if batch == 3: x.square().sum().backward()
    assert len(needed) > 20 and needed <= set(launched), needed - set(launched)


@runs_kernels
@pytest.mark.parametrize("recipe", ["stable", "released"])
@pytest.mark.parametrize("second", list(FORMATS))
@pytest.mark.parametrize("skip", [None, "reuse"])
def test_layers_of_one_stage_may_differ_in_layout(second, recipe, skip):
    "The moments of what is retrieved are added up in the tiles of the first value's layout."
    first = next(f for f in FORMATS if f != second)
    torch.manual_seed(0)
    maps = [torch.randn(3, 32, 13, 11, dtype=DTYPE, device=DEVICE).to(memory_format=FORMATS[f]) for f in (first, second, second)]
    found = []
    for form in ("fused", "list"):
        torch.manual_seed(1)
        attention = (ELA([(32, 3)], skip, head_width=8, drop_path=0.0, form=form, recipe=recipe) if skip else MRLAB([(32, 3)], head_width=8, drop_path=0.0, form=form, recipe=recipe)).to(DEVICE, DTYPE)
        for layer in attention.stages[0]: nn.init.normal_(layer.norm.weight)
        if skip: attention.set_skip_mask([0, 1, 1])
        leaves, memory = [m.detach().clone(memory_format=torch.preserve_format).requires_grad_() for m in maps], attention.start()
        outs = [attention(x, 0, t, memory) for t, x in enumerate(leaves)]
        sum((o*o.detach().sin()).sum() for o in outs).backward()
        found.append([*outs, *(x.grad for x in leaves), *(layer.norm.running_var for layer in attention.stages[0])])
    for ours, plain in zip(*found): torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-8)


@runs_kernels
@pytest.mark.parametrize("name", ["mrla_b", "mrla_l", "dla_b", "dla_l", "ela"])
@pytest.mark.parametrize("changed", [dict(momentum=None), dict(affine=False), dict(track_running_stats=False)], ids=str)
def test_other_norms_are_left_to_pytorch(name, changed):
    found = []
    for form in ("fused", "list"):
        torch.manual_seed(0)
        net = create_model("cifar_resnet20", 3, name, width=0.25, form=form, drop_path=0.0).to(DEVICE, DTYPE)
        for layer in net.layer_attention.modules():
            if isinstance(layer, (LayerAttention, LightLayerAttention)):
                nn.init.normal_(layer.norm.weight)
                old, layer.norm = layer.norm, nn.BatchNorm2d(layer.norm.num_features, **changed).to(DEVICE, DTYPE)
                if layer.norm.affine: layer.norm.load_state_dict(old.state_dict(), strict=False)
        found.append(net(torch.randn(3, 3, 8, 8, dtype=DTYPE, device=DEVICE)))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)


@runs_kernels
def test_update_bn_averages_statistics_over_all_batches():
    batches = [torch.randn(2, 3, 8, 8, device=DEVICE) for _ in range(3)]
    net = create_model("cifar_resnet20", 3, "ela", width=0.25).to(DEVICE)
    torch.optim.swa_utils.update_bn(batches, averaged := torch.optim.swa_utils.AveragedModel(net))
    assert all(layer.norm.num_batches_tracked == 3 for layer in averaged.modules() if isinstance(layer, LayerAttention))


@runs_kernels
def test_one_value_a_channel_has_no_variance():
    layer, memory = layers(1, 8, 4, "stable")[0].train(), Memory()
    with pytest.raises(ValueError, match="more than 1 value per channel"): layer(torch.randn(1, 8, 1, 1, dtype=DTYPE, device=DEVICE), memory)


@runs_kernels
@pytest.mark.parametrize("name", ["mrla_b", "mrla_l", "dla_b", "dla_l", "ela"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_networks_all_in_low_precision(name, kind, monkeypatch):
    "Types fit together; what the kernels compute is compared elsewhere, so here they are noted, not run."
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *args, **options: None)
    net, images = create_model("cifar_resnet20", 3, name, width=0.25).to(DEVICE).to(kind), torch.randn(2, 3, 16, 16, device=DEVICE).to(kind)
    net(images).sum().backward()
    with evaluating(net): assert net(images).dtype == kind
    if name in ("mrla_b", "ela"): assert len(probe(net, images, shares=True).rows) == sum(net.layer_attention.lengths)


@runs_kernels
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_is_kept_when_nobody_holds_the_output(backward):
    "No part of the graph refers to itself: memory is free at once, without Python's search for cycles."
    made, x = layers(3, 8, 4, "stable"), torch.randn(2, 8, 4, 4, dtype=DTYPE, device=DEVICE, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        memory, y = Memory(), x
        for layer in made: y = layer(torch.sin(y), memory)
        kept = [weakref.ref(t) for t in (*memory.values, *memory.keys, memory.tape)]
        if backward: y.sum().backward()
        del memory, y
        assert [r() for r in kept] == [None]*len(kept)
    finally: gc.enable()


@runs_kernels
def test_two_backward_passes_and_none_in_between():
    "What a pass noted is gone after it: a second pass, through the same graph or another, starts afresh."
    fused, plain = twins(3, 8, 4, "stable")
    x = torch.randn(2, 8, 4, 4, dtype=DTYPE, device=DEVICE)
    grads = []
    for made in (fused, plain):
        y, memory, outs = x.clone().requires_grad_(), Memory(), []
        start = y
        for l in made:
            y = l(torch.sin(y), memory)
            outs.append(y)
        leaves = [start, *(p for l in made for p in l.parameters())]
        passes = [torch.autograd.grad(o.square().sum(), leaves, retain_graph=True, allow_unused=True) for o in (outs[2], outs[0], outs[2])]
        for a, b in zip(passes[0], passes[2]): torch.testing.assert_close(a, b, atol=0, rtol=0)
        grads.append(passes[1])
        if memory.tape: assert not memory.tape.notes.outputs and not memory.tape.notes.rows
    for a, b in zip(*grads):
        zero = lambda g, other: torch.zeros_like(other) if g is None else g
        if a is not None or b is not None: torch.testing.assert_close(zero(a, b), zero(b, a), atol=1e-9, rtol=0)


@runs_kernels
def test_second_derivatives_are_refused():
    (layer,), memory = layers(1, 8, 4, "stable"), Memory()
    x = torch.randn(2, 8, 4, 4, dtype=DTYPE, device=DEVICE, requires_grad=True)
    grad, = torch.autograd.grad(layer(x, memory).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): grad.sum().backward()


@runs_kernels
@pytest.mark.parametrize("frozen", ["value.weight", "query.weight", "key.weight", "norm.weight"])
def test_frozen_parameters(frozen):
    fused, plain = twins(3, 8, 4, "stable")
    for l in (*fused, *plain): l.get_parameter(frozen).requires_grad_(False)
    x = torch.randn(2, 8, 4, 4, dtype=DTYPE, device=DEVICE)
    assert_equal(outcome(fused, x), outcome(plain, x), 1e-9)


@runs_kernels
def test_checkpointing_of_a_stage():
    from torch.utils.checkpoint import checkpoint
    fused, _ = twins(3, 8, 4, "stable")
    x = torch.randn(2, 8, 4, 4, dtype=DTYPE, device=DEVICE)
    def stage(y):
        memory = Memory()
        for l in fused: y = l(torch.sin(y), memory)
        return y
    found = []
    for run in (stage, lambda y: checkpoint(stage, y, use_reentrant=False)):
        for l in fused: l.zero_grad()
        y = x.clone().requires_grad_()
        run(y).square().sum().backward()
        found.append([y.grad, *(p.grad.clone() for l in fused for p in l.parameters())])
    for a, b in zip(*found): torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@runs_kernels
@pytest.mark.parametrize("n, heads", [(1, 1), (3, 2), (7, 6), (33, 3)])
def test_the_operator(n, heads):
    "Random weights that add up to nothing in particular; maps in mixed layouts."
    w = torch.randn(2, heads, n, dtype=DTYPE, device=DEVICE, requires_grad=True)
    values = [torch.randn(2, 6, 3, 5, dtype=DTYPE, device=DEVICE).to(memory_format=list(FORMATS.values())[s % 2]).requires_grad_() for s in range(n)]
    ours, plain = kernels.weighted_sum(w, values), retrieve_concat(w, values)
    torch.testing.assert_close(ours, plain, atol=1e-9, rtol=0)
    g = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(ours, (w, *values), g), torch.autograd.grad(plain, (w, *values), g)): torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_the_operator_is_sound():
    w, v = torch.rand(2, 2, 2, dtype=DTYPE, device=DEVICE, requires_grad=True), [torch.randn(2, 4, 3, 2, dtype=DTYPE, device=DEVICE, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(kernels.weighted_sum, (w, v), raise_exception=True)
    assert torch.autograd.gradcheck(lambda w, *v: kernels.weighted_sum(w, list(v)), (w, *v))


@pytest.mark.skipif(HERE, reason="about the fallback")
def test_without_a_gpu_the_plain_formulas_are_used():
    layer, memory = LayerAttention(8, 4, drop_path=0.0), Memory()
    layer(torch.randn(2, 8, 4, 4), memory)
    assert memory.tape is None and not kernels.fits(torch.randn(2, 8, 4, 4)) and "PyTorch" in kernels.backend()


GUARD = 4096  # numbers before and behind a tensor: more than a tile


@runs_kernels
@pytest.mark.parametrize("layout", FORMATS)
def test_no_kernel_writes_or_counts_what_lies_beside_its_tensors(layout, monkeypatch):
    "Every tensor that a kernel gets lies between numbers that are none; they stay, and nothing that is computed knows them."
    buffers, launch = [], kernels.launch
    def guarded(t):
        buffer = torch.full((t.untyped_storage().nbytes()//t.element_size() + 2*GUARD,), float("nan"), dtype=t.dtype, device=t.device)
        view = buffer.as_strided(t.shape, t.stride(), GUARD)
        view.copy_(t.data)
        buffers.append((view, buffer, t))
        return view
    def guarding(kernel, grid, *args, **options):
        place = lambda a: tuple(map(place, a)) if isinstance(a, tuple) else guarded(a) if isinstance(a, torch.Tensor) else a
        launch(kernel, grid, *place(args), **options)
        for view, buffer, t in buffers:
            inside = torch.zeros(len(buffer), dtype=torch.bool, device=buffer.device)
            inside.as_strided(t.shape, t.stride(), GUARD).fill_(True)
            assert buffer[~inside].isnan().all(), kernel.__name__
            t.data.copy_(view)  # the next kernel reads what this one wrote
        buffers.clear()
    fused, plain = twins(4, 22, 11, "released")
    x = torch.randn(3, 22, 5, 7, dtype=DTYPE, device=DEVICE).to(memory_format=FORMATS[layout])
    expected = outcome(plain, x, skipped=(2,))
    monkeypatch.setattr(kernels, "launch", guarding)
    assert_equal(outcome(fused, x, skipped=(2,)), expected, 1e-9)


@runs_kernels
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recipe", ["stable", "released"])
def test_dla_b(recipe, training, layout):
    "Gates that depend on the means of values, whose gradients join those that come by notes."
    torch.manual_seed(5)
    nets = [DLAB([(22, 4)], head_width=11, recipe=recipe, reduction=2, drop_path=0.0, form=f).to(DEVICE, DTYPE).train(training) for f in ("fused", "concat")]
    for p in nets[0].parameters(): nn.init.normal_(p, std=0.7)
    nets[1].load_state_dict(nets[0].state_dict())
    start, found = torch.randn(2, 22, 5, 7, dtype=DTYPE, device=DEVICE).to(memory_format=FORMATS[layout]), []
    for net in nets:
        x, memory = start.clone(memory_format=torch.preserve_format).requires_grad_(), net.start()
        y = x
        for t in range(4): y = net(torch.sin(y), 0, t, memory)
        (y*torch.arange(y.numel(), device=DEVICE).view(y.shape).sin()).sum().backward()
        found.append({"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in net.named_parameters()} | dict(net.named_buffers()))
        assert (memory.tape is not None) == (net is nets[0])
    assert_equal(*found, 1e-9)


@runs_kernels
def test_the_means_of_values_alone():
    "No layer reads the value, but its mean counts."
    x, weight = torch.randn(2, 6, 4, 5, dtype=DTYPE, device=DEVICE, requires_grad=True), torch.randn(6, 1, 3, 3, dtype=DTYPE, device=DEVICE, requires_grad=True)
    _, _, _, mean = kernels.remember(x, weight, kernels.Tape(), means=True)
    plain = nn.functional.conv2d(x, weight, padding=1, groups=6).mean((2, 3))
    found = [torch.autograd.grad(m.square().sum(), (x, weight)) for m in (mean, plain)]
    for ours, expected in zip(*found): torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("layout, dtype", list(product(FORMATS, (torch.bfloat16, torch.float16, torch.float32))))
def test_low_precision_is_no_worse_than_the_plain_forms(layout, dtype):
    "Against float64, on the sizes of a real stage and over five draws: the fused form's error is at most that of the list form, with a margin."
    names = ("output", "x", "0 value.weight", "5 value.weight", "3 norm.weight", "5 query.weight", "2 key.weight", "4 norm.running_var")
    draws = [errors(layout, dtype, seed, names) for seed in range(5)]
    for name, (ours, plain) in zip(names, torch.tensor(draws).square().mean(0).sqrt().tolist()): assert ours < 1.5*plain + 1e-6, (name, ours, plain)


def errors(layout, dtype, seed, names):
    "Relative errors of the fused and the list form."
    torch.manual_seed(seed)
    fused, plain = (layers(6, 64, 32, "stable", f) for f in ("fused", "list"))
    exact = layers(6, 64, 32, "stable", "concat")
    for a, b, c in zip(fused, plain, exact):
        b.load_state_dict(a.state_dict())
        c.load_state_dict(a.state_dict())
        a.float(), b.float()
    x = torch.randn(32, 64, 32, 32, device="cuda").to(dtype).to(memory_format=FORMATS[layout])
    truth = outcome(exact, x.double())
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32): found = [outcome(made, x) for made in (fused, plain)]
    return [[((got[n].double() - truth[n]).norm()/truth[n].norm()).item() for got in found] for n in names]


@pytest.mark.gpu
@pytest.mark.parametrize("layout, dtype", list(product(FORMATS, (torch.bfloat16, torch.float16, torch.float32))))
def test_low_precision_of_the_light_form(layout, dtype):
    "Against float64, over five draws of one layer. The kernels keep what is retrieved in the maps' precision, as those of MRLA-B do, where autocast has PyTorch keep float32: sums over it may lose some more."
    def once(made, maps, kind):
        maps = [m.detach().to(kind, copy=True).requires_grad_() for m in maps]
        made.zero_grad()
        with torch.autocast("cuda", dtype, enabled=kind != torch.float64 and dtype != torch.float32): y = made(*maps).to(kind)
        y.backward(pull.to(kind))
        return {n: t.detach().double() for n, t in (("output", y), ("x", maps[0].grad), ("shortcut", maps[1].grad), *((n, p.grad) for n, p in made.named_parameters()))}

    squares = []
    for seed in range(5):
        torch.manual_seed(seed)
        exact = LightLayerAttention(64, 32, "stable", 0.0).to("cuda", torch.float64)
        nn.init.normal_(exact.norm.weight)
        low = LightLayerAttention(64, 32, "stable", 0.0).cuda()
        low.load_state_dict(exact.state_dict())
        *maps, pull = (torch.randn(32, 64, 32, 32, device="cuda").to(dtype).to(memory_format=FORMATS[layout]) for _ in range(3))
        exact.fused = False
        truth, found = once(exact, maps, torch.float64), []
        for low.fused in (True, False): found.append(once(low, maps, dtype))
        squares.append([[((f[n] - t).norm()/t.norm()).item()**2 for n, t in truth.items()] for f in found])
    for name, ours, plain in zip(truth, *torch.tensor(squares).mean(0).sqrt().tolist()):
        assert ours < (1.5 if dtype == torch.float32 or name in ("output", "x", "shortcut") else 5)*plain + 1e-6, (name, ours, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["mrla_b", "mrla_l", "ela", "dla_b", "dla_l"])
def test_data_parallel_training_has_the_gradients_of_one_process(attention, tmp_path):
    "One process: gradients go through the buckets and hooks of DistributedDataParallel all the same."
    torch.manual_seed(0)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model, x = create_model("cifar_resnet20", 10, attention, drop_path=0.0).cuda().to(memory_format=torch.channels_last), torch.randn(16, 3, 32, 32, device="cuda")
        if attention == "ela": model.set_skip_mask([0, 1]*3)
        found = []
        for net in (model, torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=attention == "ela")):
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d): m.reset_running_stats()
            model.zero_grad(set_to_none=True)
            net(x).square().sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    finally: torch.distributed.destroy_process_group()
    assert set(found[0]) <= set(found[1])
    for name, grad in found[0].items(): torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-4*grad.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["mrla_b", "mrla_l", "ela", "dla_b", "dla_l"])
def test_compiled_with_the_operator(attention):
    torch.manual_seed(0)
    model = create_model("cifar_resnet20", 10, attention, drop_path=0.0).cuda()
    for m in model.modules():
        if isinstance(m, (LayerAttention, LightLayerAttention)): nn.init.normal_(m.norm.weight)
    x = torch.randn(8, 3, 32, 32, device="cuda")
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, atol=2e-3, rtol=2e-3)
