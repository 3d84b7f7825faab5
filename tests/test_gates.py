"""Every attention within a layer is what its formula says: against plain loops, in float64, forward and backward."""
import contextlib
import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from ela_repro.channel_attention import FREQUENCIES, EfficientChannelAttention, FrequencyChannelAttention, SqueezeExcitation, cosine_basis
from ela_repro.core import ElaError
from ela_repro.dynamic import DLAB, DLAL, DSU
from ela_repro.recurrent import RLA, DIACell
from ela_repro.resnet import create_model
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
    "[B, C, H, W]: of the batch in training, of the running statistics in evaluation."
    mean, var = (x.mean((0, 2, 3)), ((x - x.mean((0, 2, 3), keepdim=True))**2).mean((0, 2, 3))) if norm.training else (norm.running_mean, norm.running_var)
    return (x - mean[:, None, None])/(var + norm.eps).sqrt()[:, None, None]*norm.weight[:, None, None] + norm.bias[:, None, None]


def standardise(v): return (v - v.mean())/(((v - v.mean())**2).mean() + 1e-5).sqrt()


def se(m, x): return torch.stack([s*everywhere(sigmoid(dense(m.excite, dense(m.squeeze, s.mean((1, 2))).relu()))) for s in x])


def eca(m, x):
    w, c = m.conv.weight[0, 0], x.shape[1]
    def gate(p): return torch.stack([sigmoid(sum(w[j]*p[i + j - len(w)//2] for j in range(len(w)) if 0 <= i + j - len(w)//2 < c)) for i in range(c)])
    return torch.stack([s*everywhere(gate(s.mean((1, 2)))) for s in x])


def fca(m, x):
    def project(s):
        cut = lambda i, n: slice(i*n//8, -(-(i + 1)*n//8))  # the places that average i of 8 is over
        s = torch.stack([torch.stack([s[:, cut(i, s.shape[1]), cut(j, s.shape[2])].mean((1, 2)) for j in range(8)], 1) for i in range(8)], 1)
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


each_gate = pytest.mark.parametrize("case", GATES)


def instance(case):
    "The module with weights without symmetry, its formula, and images for it."
    make, formula, shape = GATES[case]
    module = randomised(make())
    for name, b in module.named_buffers():
        if name.endswith(("running_mean", "running_var")): b.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return module, formula, torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


@each_gate
@pytest.mark.parametrize("training", (True, False))
def test_a_gate_is_its_formula(case, training):
    module, formula, x = instance(case)
    assert_same(module, module.train(training), lambda x: formula(module, x), [x])


@each_gate
def test_images_of_a_batch_do_not_mix(case):
    "In training too, permuting them permutes the output: the statistics of a batch know no order. In evaluation, alone is as in company."
    module, _, x = instance(case)
    order = torch.tensor([2, 0, 1])
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(module(x[order]), module(x)[order], **EXACT)
    torch.testing.assert_close(module(x[:1]), module(x)[:1], **EXACT)


@each_gate
def test_memory_format_does_not_matter(case):
    module, _, x = instance(case)
    plain, x_last = copy.deepcopy(module), x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    last = module.to(memory_format=torch.channels_last)
    a, b = plain(x), last(x_last)
    torch.testing.assert_close(a, b, **EXACT)
    for p, q in zip(gradients(a, [x], plain), gradients(b, [x_last], last)): torch.testing.assert_close(p, q, **EXACT)


@each_gate
def test_bfloat16_is_finite_and_near(case):
    "Under autocast, and as a module that is all bfloat16; large features too."
    module, _, x = instance(case)
    exact, low = module(x).detach(), x.detach().bfloat16().requires_grad_()
    for module, context in ((copy.deepcopy(module).float(), torch.autocast("cpu", torch.bfloat16)), (copy.deepcopy(module).bfloat16(), contextlib.nullcontext())):
        with context: out, loud = module(low), module(30*low)
        assert torch.isfinite(loud).all() and all(torch.isfinite(g).all() for g in gradients(out.float(), [low], module))
        assert (out.double() - exact).norm() < 0.1*exact.norm()


@each_gate
def test_copies_graphs_and_programs_compute_the_same(case):
    module, _, x = instance(case)
    module, x = module.eval(), x.detach()
    fresh = GATES[case][0]().eval()
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = module(x)
        others = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh, torch.compile(module, fullgraph=True, backend="aot_eager"), torch.export.export(module, (x,)).module())
        for other in others: torch.testing.assert_close(other(x), expected, **EXACT)
    torch.compiler.reset()


# ---- starts

def test_what_is_added_starts_as_nothing():
    x = torch.randn(2, 32, 5, 5)
    for module in (GlobalContext(32), NonLocal(32), NonLocal(32).eval()): assert torch.equal(module(x), x)


def test_networks_leave_the_start_of_a_gate_alone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, x = create_model("cifar_resnet20", 10, width=0.5), torch.randn(2, 3, 16, 16)
        for attention in ("gc", "non_local"):
            model = create_model("cifar_resnet20", 10, attention, width=0.5)
            model.load_state_dict(plain.state_dict(), strict=False)
            torch.testing.assert_close(model(x), plain(x), **EXACT)
        model = create_model("cifar_resnet20", 10, "cbam", zero_gate=True, width=0.5)
        assert all(block.gate.norm.weight.item() == 0 for blocks in model.stages() for block in blocks)


def test_the_start_of_cbams_spatial_gate():
    "At one; as published, at zero: one half everywhere, and no gradient for the convolution."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        usual, published, x = ConvBlockAttention(32), ConvBlockAttention(32, zero_gate=True), torch.randn(4, 32, 6, 6)
        draws = torch.cat([ConvBlockAttention(16).conv.weight.flatten() for _ in range(50)])
    assert (published.spatial_gate(x) == 0.5).all() and usual.spatial_gate(x).std() > 0.1
    for module in (usual, published): module(x).square().sum().backward()
    assert not published.conv.weight.grad.any() and published.norm.weight.grad.any() and usual.conv.weight.grad.any()
    assert draws.std().item() == pytest.approx(math.sqrt(2/49), rel=0.05)  # fan out: 7 x 7 places, one channel


# ---- what the formulas leave out

def test_group_norm_hides_the_image_from_one_softmax_of_ema():
    module, _, x = instance("ema")
    seen = []
    module.norm.register_forward_hook(lambda m, args, out: seen.append(out.mean((2, 3))))
    module(x)
    torch.testing.assert_close(seen[0], module.norm.bias.expand_as(seen[0]), **EXACT)


@pytest.mark.parametrize("reduction, inner", [(8, 4), (4, 4), (2, 4), (1, 8)])
def test_gc_sees_the_image_however_few_its_channels(reduction, inner):
    "A layer norm of one number would leave nothing of it: the bottleneck has at least four."
    module, x = randomised(GlobalContext(8, reduction)), torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    assert module.transform[0].out_features == inner and (module(x) - x).std(0).max() > 1e-3


@pytest.mark.parametrize("case, bias", [("gc", "look.bias"), ("non-local", "phi.bias"), ("non-local-pooled", "phi.bias")])
def test_a_softmax_ignores_a_bias(case, bias):
    "It shifts all scores of a place alike: what gradient it has is rounding."
    module, _, x = instance(case)
    module(x).sin().sum().backward()
    grads = {n: p.grad.abs().max() for n, p in module.named_parameters()}
    assert grads[bias] < 1e-12 < 1e-6 < grads[bias.replace("bias", "weight")]


# ---- the frequencies of FcaNet

@pytest.mark.parametrize("size", [7, 8, 9, 13, 14, 16, 28, 32, 56])
def test_waves_are_orthonormal_at_every_size(size):
    waves = cosine_basis(size).flatten(1)
    torch.testing.assert_close(waves @ waves.T, torch.eye(16), **EXACT)


def test_waves_stay_exact_and_out_of_checkpoints():
    module = FrequencyChannelAttention(32, 8, 8)
    assert list(module.state_dict()) == list(SqueezeExcitation(32, 8).state_dict()) and not module.basis.requires_grad
    for rounded in (module.half(), copy.deepcopy(module).float(), pickle.loads(pickle.dumps(module))):
        assert not torch.equal(rounded.basis.double(), cosine_basis(8)) and torch.equal(rounded.double().basis, cosine_basis(8))
    with torch.device("meta"): bare = FrequencyChannelAttention(32, 8, 8)
    assert bare.basis.is_meta and torch.equal(bare.to_empty(device="cpu").basis, cosine_basis(8))


@pytest.mark.parametrize("shape", [(16, 16), (5, 13), (1, 1), (9, 8)])
def test_spread_waves_are_pooled_maps(shape):
    module, x = FrequencyChannelAttention(32, 8, 8), torch.randn(2, 32, *shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module.pool(x), module.pool(F.adaptive_avg_pool2d(x, 8)), **EXACT)


# ---- Non-local

@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("subsample", [False, True])
def test_non_local_reaches_a_fused_kernel(memory_format, subsample):
    "Four dimensions and channels side by side, in any memory format: otherwise all weights are stored."
    module, x = NonLocal(16, subsample).float(), torch.randn(2, 16, 8, 8, dtype=torch.float32).contiguous(memory_format=memory_format)
    assert all(part.stride(-1) == 1 for part in module.parts(x))
    with torch.profiler.profile() as profile: module(x)
    names = {e.key for e in profile.key_averages()}
    assert any("flash" in n for n in names) and not any("attention_math" in n or "softmax" in n for n in names)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)])
def test_non_local_pools_maps_of_a_single_row_or_column(shape):
    module = NonLocal(6, subsample=True)
    assert module(torch.randn(2, 6, *shape)).shape == (2, 6, *shape)
    assert module.parts(torch.randn(2, 6, *shape))[1].shape[1] == max(1, shape[0] // 2)*max(1, shape[1] // 2)


@pytest.mark.parametrize("make, works", [(lambda: SqueezeExcitation(4, 8), "from 1 to 4"), (lambda: ConvBlockAttention(4), "from 1 to 4"), (lambda: GlobalContext(4), "from 1 to 4"), (lambda: GlobalContext(3, 1), "at least 4"), (lambda: NonLocal(1), "at least 2"),
                                         (lambda: EfficientChannelAttention(8, 2), "odd"), (lambda: FrequencyChannelAttention(24, 8), "multiple of 16"), (lambda: FrequencyChannelAttention(16, map_size=6), "at least 7"),
                                         (lambda: EfficientMultiScaleAttention(12, 8), "1, 2, 3, 4, 6, 12"),
                                         (lambda: SqueezeExcitation(8, 2.5), "an integer from 1 to 8"), (lambda: ConvBlockAttention(8, "4"), "from 1 to 8"), (lambda: GlobalContext(8, True), "from 1 to 8"), (lambda: EfficientChannelAttention(8, "3"), "odd"),
                                         (lambda: EfficientMultiScaleAttention(4, 2.0), "1, 2, 4"), (lambda: FrequencyChannelAttention(16, map_size=7.5), "map_size=7"), (lambda: DIACell(4, 5), "from 1 to 4"), (lambda: DSU(4, 0), "from 1 to 4"), (lambda: RLA([(4, 1)], 0), "at least 1"),
                                         (lambda: EfficientChannelAttention(0), "channels is 0"), (lambda: SqueezeExcitation("256"), "channels is '256'"), (lambda: EfficientMultiScaleAttention(0), "channels is 0"), (lambda: RLA([(4.0, 1)]), r"stages is .*4\.0.*two integers"),
                                         (lambda: NonLocal(8, "no"), "subsample is 'no': it must be True or False"), (lambda: ConvBlockAttention(16, zero_gate=0), "zero_gate is 0"),
                                         (lambda: DLAB([(12, 1)], 5), "must be one of 1, 2, 3, 4, 6, 12"), (lambda: DLAL([(12, 1)], 4, "stabel"), "did you mean 'stable'")])
def test_impossible_sizes_name_those_that_work(make, works):
    with pytest.raises(ElaError, match=works): make()
