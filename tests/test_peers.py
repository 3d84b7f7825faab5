"""Every peer method is what its formula says: against plain loops, in float64, forward and backward, alone and inside CIFAR and ImageNet networks."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ela_repro.channel_attention import FREQUENCIES, EfficientChannelAttention, FrequencyChannelAttention, SqueezeExcitation
from ela_repro.core import ElaError
from ela_repro.dynamic import DLAB, DLAL, DSU
from ela_repro.recurrent import DIA, RLA, DIACell
from ela_repro.resnet import create_model
from ela_repro.spatial_attention import ConvBlockAttention, EfficientMultiScaleAttention, GlobalContext, NonLocal

EXACT = dict(rtol=1e-9, atol=1e-9)
RECIPES = ("stable", "released")


@pytest.fixture(autouse=True)
def double():
    "Everything is made in float64, the fixed basis of FcaNet included."
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomised(module, seed=0):
    "Weights without symmetry: what starts at zero would hide everything before it."
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.copy_(torch.randn(p.shape, generator=draw)*(0.4 if p.dim() < 2 else 1/math.sqrt(p[0].numel())) + (p.dim() == 1)*0.3)
    return module


def gradients(out, inputs, module):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return torch.autograd.grad((out*weights).sum(), [*inputs, *module.parameters()], allow_unused=True)


def assert_same(module, ours, theirs, inputs):
    "Outputs and all gradients of two ways to compute."
    a, b = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(a, b, **EXACT)
    for name, x, y in zip([*(f"input {i}" for i in range(len(inputs))), *(n for n, _ in module.named_parameters())], gradients(a, inputs, module), gradients(b, inputs, module)):
        assert (x is None) == (y is None), name
        if x is not None: torch.testing.assert_close(x, y, **EXACT, msg=lambda m: f"{name}: {m}")


# ---- plain formulas, one sample, one place, one channel at a time

def sigmoid(x): return 1/(1 + torch.exp(-x))
def dense(layer, v): return torch.stack([sum(layer.weight[o, i]*v[i] for i in range(len(v))) + (0 if layer.bias is None else layer.bias[o]) for o in range(len(layer.weight))])
def everywhere(v): return v[:, None, None]


def convolve(weight, bias, x):
    "Cross-correlation of [C, H, W] with [O, C, k, k] or, depthwise, [C, 1, k, k]; zeros outside."
    k, (c, h, w) = weight.shape[-1], x.shape
    padded = F.pad(x, (k // 2,)*4)
    return torch.stack([sum(weight[o, i, a, b]*padded[o if weight.shape[1] == 1 and c > 1 else i, a:a + h, b:b + w] for i in range(weight.shape[1]) for a in range(k) for b in range(k)) + (0 if bias is None else bias[o])
                        for o in range(len(weight))])


def batch_norm(norm, x):
    "Training mode, [B, C, H, W]."
    mean, var = x.mean((0, 2, 3)), ((x - x.mean((0, 2, 3), keepdim=True))**2).mean((0, 2, 3))
    return (x - mean[:, None, None])/(var + norm.eps).sqrt()[:, None, None]*norm.weight[:, None, None] + norm.bias[:, None, None]


def standardise(v): return (v - v.mean())/(((v - v.mean())**2).mean() + 1e-5).sqrt()


def se(m, x): return torch.stack([s*everywhere(sigmoid(dense(m.excite, dense(m.squeeze, s.mean((1, 2))).relu()))) for s in x])


def eca(m, x):
    w, c = m.conv.weight[0, 0], x.shape[1]
    def gate(p): return torch.stack([sigmoid(sum(w[j]*p[i + j - len(w)//2] for j in range(len(w)) if 0 <= i + j - len(w)//2 < c)) for i in range(c)])
    return torch.stack([s*everywhere(gate(s.mean((1, 2)))) for s in x])


def fca(m, x):
    def project(s):
        s = F.adaptive_avg_pool2d(s, 8) if s.shape[1:] != (8, 8) else s
        def basis(u, h): return math.cos(math.pi*u*(h + 0.5)/8)/math.sqrt(8)*(math.sqrt(2) if u else 1)
        per = len(s)//16
        return torch.stack([sum(s[c, h, w]*basis(FREQUENCIES[c//per][0], h)*basis(FREQUENCIES[c//per][1], w) for h in range(8) for w in range(8)) for c in range(len(s))])
    return torch.stack([s*everywhere(sigmoid(dense(m.excite, dense(m.squeeze, project(s)).relu()))) for s in x])


def cbam(m, x):
    mlp = lambda v: dense(m.mlp[2], dense(m.mlp[0], v).relu())
    x = torch.stack([s*everywhere(sigmoid(mlp(s.mean((1, 2))) + mlp(s.amax((1, 2))))) for s in x])
    maps = torch.stack([convolve(m.conv.weight, None, torch.stack([s.amax(0), s.mean(0)])) for s in x])
    return x*sigmoid(batch_norm(m.norm, maps))


def ema(m, x):
    def group(g):
        rows, columns = (torch.stack([dense_conv(m.mix, v[:, i]) for i in range(v.shape[1])], 1) for v in (g.mean(2), g.mean(1)))
        a = g*sigmoid(rows)[:, :, None]*sigmoid(columns)[:, None]
        a = torch.stack([standardise(c)*w + b for c, w, b in zip(a, m.norm.weight, m.norm.bias)])
        b = convolve(m.conv.weight, m.conv.bias, g)
        soft = lambda v: torch.exp(v.mean((1, 2)))/torch.exp(v.mean((1, 2))).sum()
        return g*sigmoid(sum(p*c for p, c in zip(soft(a), b)) + sum(p*c for p, c in zip(soft(b), a)))
    def dense_conv(conv, v): return torch.stack([sum(conv.weight[o, i, 0, 0]*v[i] for i in range(len(v))) + conv.bias[o] for o in range(len(v))])
    return torch.stack([torch.cat([group(g) for g in s.chunk(m.groups)]) for s in x])


def gc(m, x):
    def context(s):
        logits = sum(m.look.weight[0, c, 0, 0]*s[c] for c in range(len(s))) + m.look.bias
        a = torch.exp(logits)/torch.exp(logits).sum()
        v = dense(m.transform[0], torch.stack([(a*c).sum() for c in s]))
        return dense(m.transform[3], (standardise(v)*m.transform[1].weight + m.transform[1].bias).relu())
    return torch.stack([s + everywhere(context(s)) for s in x])


def non_local(m, x):
    def gather(s):
        one = lambda conv: torch.stack([sum(conv.weight[o, i, 0, 0]*s[i] for i in range(len(s))) + conv.bias[o] for o in range(len(conv.weight))])
        q, k, v = one(m.theta), one(m.phi), one(m.g)
        if m.subsample: k, v = F.max_pool2d(k, 2), F.max_pool2d(v, 2)
        q, k, v = q.flatten(1), k.flatten(1), v.flatten(1)
        out = []
        for i in range(q.shape[1]):
            w = torch.exp(torch.stack([(q[:, i]*k[:, j]).sum() for j in range(k.shape[1])]))
            out.append((v*w/w.sum()).sum(1))
        z = torch.stack(out, 1).view(-1, *s.shape[1:])
        return torch.stack([sum(m.out.weight[o, i, 0, 0]*z[i] for i in range(len(z))) + m.out.bias[o] for o in range(len(s))])
    return x + batch_norm(m.norm, torch.stack([gather(s) for s in x]))


GATES = {"se": (lambda: SqueezeExcitation(8, 3), se, (8, 3, 5)), "eca": (lambda: EfficientChannelAttention(8), eca, (8, 3, 5)), "eca-5": (lambda: EfficientChannelAttention(9, 5), eca, (9, 4, 3)),
         "fca": (lambda: FrequencyChannelAttention(32, 8, 8), fca, (32, 8, 8)), "fca-pooled": (lambda: FrequencyChannelAttention(16, 4, 8), fca, (16, 11, 9)),
         "cbam": (lambda: ConvBlockAttention(8, 3), cbam, (8, 5, 4)), "ema": (lambda: EfficientMultiScaleAttention(12, 4), ema, (12, 3, 5)), "ema-1": (lambda: EfficientMultiScaleAttention(4, 1), ema, (4, 4, 3)),
         "gc": (lambda: GlobalContext(8, 2), gc, (8, 5, 3)), "non-local": (lambda: NonLocal(6), non_local, (6, 3, 4)), "non-local-pooled": (lambda: NonLocal(6, subsample=True), non_local, (6, 5, 4))}


@pytest.mark.parametrize("case", GATES)
def test_a_gate_is_its_formula(case):
    make, formula, shape = GATES[case]
    module = randomised(make()).train()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert_same(module, module, lambda x: formula(module, x), [x])
    with torch.no_grad():
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(module.eval()(x[order]), module(x)[order], **EXACT)


@pytest.mark.parametrize("make, works", [(lambda: SqueezeExcitation(4, 8), "from 1 to 4"), (lambda: ConvBlockAttention(4), "from 1 to 4"), (lambda: GlobalContext(4), "from 1 to 4"), (lambda: NonLocal(1), "at least 2"),
                                         (lambda: EfficientChannelAttention(8, 2), "odd"), (lambda: FrequencyChannelAttention(24, 8), "multiple of 16"), (lambda: FrequencyChannelAttention(16, map_size=6), "at least 7"),
                                         (lambda: EfficientMultiScaleAttention(12, 8), "1, 2, 3, 4, 6, 12"), (lambda: DIACell(4, 5), "from 1 to 4"), (lambda: DSU(4, 0), "from 1 to 4"), (lambda: RLA([(4, 1)], 0), "at least 1"),
                                         (lambda: DLAB([(12, 1)], 5), "must be one of 1, 2, 3, 4, 6, 12"), (lambda: DLAL([(12, 1)], 4, "stabel"), "did you mean 'stable'")])
def test_impossible_sizes_name_those_that_work(make, works):
    with pytest.raises(ElaError, match=works): make()


# ---- layer interactions: whole networks, a block at a time

def cell_step(cell, y, h, c):
    "One step of DIA's or DLA's cell for one sample."
    n = len(y)
    z = dense(cell.input[2], dense(cell.input[0], y).relu()) + dense(cell.recurrent[2], dense(cell.recurrent[0], h).relu())
    parts = [z[i*n:(i + 1)*n] for i in range(cell.gates)]
    c = sigmoid(parts[1])*c + sigmoid(parts[0])*torch.tanh(parts[-1])
    return (sigmoid(parts[2])*sigmoid(c) if cell.gates == 4 else sigmoid(c)), c


def cell_batch(cell, y, state):
    pairs = [cell_step(cell, v, *(s if s else (torch.zeros_like(v),)*2)) for v, s in zip(y, state or [None]*len(y))]
    return torch.stack([h for h, _ in pairs]), pairs


def pieces(block, x, entry=None):
    "Shortcut and residual branch of a block, by functional calls. `entry`: what the branch reads instead of x."
    run = lambda conv, norm, v: batch_norm(norm, F.conv2d(v, conv.weight, None, conv.stride, conv.padding))
    shortcut = x if isinstance(block.downsample, nn.Identity) else run(*block.downsample, x)
    y = x if entry is None else entry
    for i in (1, 2, 3):
        if not hasattr(block, f"conv{i}"): break
        y = run(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), y if i == 1 else y.relu())
    return shortcut, y


def stem(model, x):
    x = batch_norm(model.bn1, F.conv2d(x, model.conv1.weight, None, model.conv1.stride, model.conv1.padding)).relu()
    return x if isinstance(model.maxpool, nn.Identity) else F.max_pool2d(x, 3, 2, 1)


def reference_dia(model, x):
    x = stem(model, x)
    for cell, blocks in zip(model.layer_attention.cells, model.stages()):
        state = None
        for block in blocks:
            shortcut, y = pieces(block, x)
            h, state = cell_batch(cell, y.mean((2, 3)), state)
            x = (shortcut + y*h[:, :, None, None]).relu()
    return model.fc(x.mean((2, 3)))


def reference_rla(model, x):
    rla, x = model.layer_attention, stem(model, x)
    h = torch.zeros(len(x), rla.hidden_channels, *x.shape[2:])
    for s, blocks in enumerate(model.stages()):
        for t, block in enumerate(blocks):
            shortcut, y = pieces(block, x, torch.cat([x, h], 1))
            if t == 0 and s > 0: h = (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2])/4
            h = F.conv2d(torch.tanh(batch_norm(rla.norms[s][t], h + F.conv2d(y, rla.read[s].weight))), rla.step[s].weight, padding=1)
            x = (shortcut + y).relu()
    return model.fc(torch.cat([x, batch_norm(rla.last_norm, h).relu()], 1).mean((2, 3)))


def head_norm(layer, v):
    "[B, C], each head on its own, where the recipe asks for it."
    if not layer.recipe.normalise: return v
    return torch.cat([torch.stack([standardise(h) for h in part]) for part in v.chunk(layer.heads, 1)], 1)


def channel_conv(conv, v):
    w, c = conv.weight[0, 0], v.shape[1]
    return torch.stack([sum(w[j]*v[:, i + j - len(w)//2] for j in range(len(w)) if 0 <= i + j - len(w)//2 < c) for i in range(c)], 1)


def attach(layer, x, found):
    branch = batch_norm(layer.norm, found)
    return x + (branch.relu() if layer.relu else branch)


def dla_b_stage(cell, layers, xs, leak=False):
    "`xs(t, previous)` gives the block's output. Keys and value maps are really rescaled, one sample and one entry at a time."
    keys, values, out, state = [], [], None, None
    for t, layer in enumerate(layers):
        x = xs(t, out)
        pooled, heads = x.mean((2, 3)), layer.heads
        _, state = cell_batch(cell, pooled, state)
        ask = lambda v: cell_batch(cell, v, [state[0]]*len(v) if leak else state)[0]
        keys, values = [k*ask(k) for k in keys], [v*ask(v.mean((2, 3)))[:, :, None, None] for v in values]
        keys.append(channel_conv(layer.key, pooled))
        values.append(torch.stack([convolve(layer.value.weight, None, s) for s in x]))
        q, normal, d = head_norm(layer, channel_conv(layer.query, pooled)), [head_norm(layer, k) for k in keys], x.shape[1]//heads
        parts = []
        for g in range(heads):
            logits = torch.stack([(q[:, g*d:(g + 1)*d]*k[:, g*d:(g + 1)*d]).sum(1)/math.sqrt(d) for k in normal])
            alpha = torch.exp(logits)/torch.exp(logits).sum(0)
            parts.append(sum(a[:, None, None, None]*v[:, g*d:(g + 1)*d] for a, v in zip(alpha, values)))
        out = attach(layer, x, torch.cat(parts, 1))
        yield out


def dla_l_stage(cell, layers, around, xs):
    "`xs(t, previous)` gives the block's output and its shortcut."
    out, state = None, None
    for t, layer in enumerate(layers):
        x, s = xs(t, out)
        pooled, d = x.mean((2, 3)), x.shape[1]//layer.heads
        _, state = cell_batch(cell, pooled, state)
        revised = s*cell_batch(cell, s.mean((2, 3)), state)[0][:, :, None, None] + torch.stack([convolve(around.weight, None, m) for m in s])
        q, k = head_norm(layer, channel_conv(layer.query, pooled)), head_norm(layer, channel_conv(layer.key, pooled))
        a = sigmoid(torch.stack([(q[:, g*d:(g + 1)*d]*k[:, g*d:(g + 1)*d]).sum(1)/math.sqrt(d) for g in range(layer.heads)], 1)).repeat_interleave(d, 1)
        value = torch.stack([convolve(layer.value.weight, None, m) for m in x])
        out = attach(layer, x, a[:, :, None, None]*value + layer.carry*revised)
        yield out


def reference_dla(model, x):
    dla, x = model.layer_attention, stem(model, x)
    for s, blocks in enumerate(model.stages()):
        start = x
        def output(t, previous):
            shortcut, y = pieces(blocks[t], start if previous is None else previous)
            return (shortcut + y).relu(), shortcut
        outs = dla_b_stage(dla.cells[s], dla.stages[s], lambda t, p: output(t, p)[0]) if isinstance(dla, DLAB) else dla_l_stage(dla.cells[s], dla.stages[s], dla.around[s], output)
        for x in outs: pass
    return model.fc(x.mean((2, 3)))


REFERENCES = {"dia": reference_dia, "rla": reference_rla, "dla_b": reference_dla, "dla_l": reference_dla}
NETWORKS = {"cifar_resnet20": (0.125, 16, {}), "cifar_basic_resnet20": (0.25, 16, {}), "resnet50": (0.0625, 64, {})}  # width, pixels


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("attention", REFERENCES)
def test_a_network_is_its_formula(attention, name, recipe):
    "Training mode: batch statistics, no drop-path. The ImageNet arrangement has stages of 3, 4, 6, 3 blocks, a 7x7 stem and a max pooling."
    if recipe == "released" and attention in ("dia", "rla"): pytest.skip("knows no recipe")
    width, size, options = NETWORKS[name]
    if attention != "rla": options = {"reduction": 2}
    model = randomised(create_model(name, 4, attention, recipe=recipe, width=width, drop_path=0.0, **options)).train()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.no_grad():  # deep networks with random weights would amplify the last digit of everything
        for p in model.parameters(): p.mul_(0.7 if p.dim() > 1 else 1.0)
    ours, theirs = model(x), REFERENCES[attention](model, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for (n, _), a, b in zip([("input", None), *model.named_parameters()], gradients(ours, [x], model), gradients(theirs, [x], model)):
        assert (a is None) == (b is None), n
        if a is not None: torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9*max(1.0, float(b.abs().max())), msg=lambda m: f"{n}: {m}")


@pytest.mark.parametrize("length", (1, 2, 7, 12))
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ("list", "concat"))
def test_a_long_stage_of_dla_b(length, recipe, form):
    model = randomised(DLAB([(6, length)], 3, recipe, 0.0, form, reduction=2)).train()
    xs = [torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(t)).requires_grad_() for t in range(length)]
    def ours(*xs):
        memory = model.start()
        return torch.stack([model(x, 0, t, memory) for t, x in enumerate(xs)])
    assert_same(model, ours, lambda *xs: torch.stack(list(dla_b_stage(model.cells[0], model.stages[0], lambda t, _: xs[t]))), xs)


@pytest.mark.parametrize("length", (1, 5, 12))
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_long_stage_of_dla_l(length, recipe):
    model = randomised(DLAL([(6, length)], 3, recipe, 0.0, reduction=2)).train()
    xs = [torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(t)).requires_grad_() for t in range(2*length)]
    def ours(*xs):
        state = model.start()
        return torch.stack([model(xs[2*t], 0, t, state, xs[2*t + 1]) for t in range(length)])
    assert_same(model, ours, lambda *xs: torch.stack(list(dla_l_stage(model.cells[0], model.stages[0], model.around[0], lambda t, _: (xs[2*t], xs[2*t + 1])))), xs)


@pytest.mark.parametrize("attention", ("dla_b", "dla_l"))
def test_the_published_defect_is_an_option(attention):
    "With `batch_leak` the first sample judges all, as written out; without it no sample knows of another."
    model = randomised(create_model("cifar_resnet20", 4, attention, width=0.25, drop_path=0.0, batch_leak=True)).eval()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(x)[1:] - model(x[1:])).abs().max() > 1e-6
        torch.testing.assert_close(model(x)[:1], model(x[:1]), **EXACT)  # the first judges itself
        model.layer_attention.batch_leak = False
        torch.testing.assert_close(model(x)[1:], model(x[1:]), **EXACT)


def test_the_leak_written_out():
    model = randomised(DLAB([(6, 5)], 3, "released", 0.0, reduction=2, batch_leak=True)).train()
    xs = [torch.randn(3, 6, 3, 4, generator=torch.Generator().manual_seed(t)).requires_grad_() for t in range(5)]
    def ours(*xs):
        memory = model.start()
        return torch.stack([model(x, 0, t, memory) for t, x in enumerate(xs)])
    assert_same(model, ours, lambda *xs: torch.stack(list(dla_b_stage(model.cells[0], model.stages[0], lambda t, _: xs[t], leak=True))), xs)


@pytest.mark.parametrize("attention", REFERENCES)
def test_no_state_survives_a_forward_pass(attention):
    model = randomised(create_model("cifar_resnet20", 4, attention, width=0.25)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        first = model(x)
        model(torch.randn(5, 3, 20, 20))
        assert torch.equal(model(x), first)


@pytest.mark.parametrize("size", (15, 18, 33))
def test_the_hidden_map_fits_odd_images(size):
    "Where a map shrinks, the hidden map has the size of the branch: half, rounded up."
    model = create_model("cifar_resnet20", 4, "rla", width=0.25)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 4)
    h = torch.arange(15.0).view(1, 1, 3, 5)
    expected = torch.tensor([[(0 + 1 + 5 + 6)/4, (2 + 3 + 7 + 8)/4, (4 + 9)/2], [(10 + 11)/2, (12 + 13)/2, 14]])
    assert torch.equal(F.avg_pool2d(h, 2, ceil_mode=True)[0, 0], expected)
