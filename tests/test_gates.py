"""Every attention within a layer is what its formula says: against plain loops, in float64, forward and backward."""
import math

import pytest
import torch
from torch.nn import functional as F

from ela_repro.channel_attention import FREQUENCIES, EfficientChannelAttention, FrequencyChannelAttention, SqueezeExcitation
from ela_repro.core import ElaError
from ela_repro.dynamic import DLAB, DLAL, DSU
from ela_repro.recurrent import DIA, RLA, DIACell
from ela_repro.spatial_attention import ConvBlockAttention, EfficientMultiScaleAttention, GlobalContext, NonLocal

EXACT = dict(rtol=1e-9, atol=1e-9)


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
