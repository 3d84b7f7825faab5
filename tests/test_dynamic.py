"""DLA-B and DLA-L are what the formulas say: against a reference of plain loops that rescales its caches, in float64, forward and backward.
And a plain network widened to as many parameters has as many."""
import copy
import math
import pickle
import time

import pytest
import torch
from torch.nn import functional as F

from ela_repro.core import ElaError
from ela_repro.dynamic import DLAB, DLAL, DSU, DynamicMemory
from ela_repro.ela import retrieving
from ela_repro.layer_attention import MRLAB
from ela_repro.resnet import ATTENTIONS, INTERACTIONS, MODELS, create_model, matched_width

DLAS, RECIPES = {"dla_b": DLAB, "dla_l": DLAL}, ("stable", "released")
both = pytest.mark.parametrize("name", DLAS)
recipes = pytest.mark.parametrize("recipe", RECIPES)


# ---- the reference: samples, heads, channels and stored layers in loops; keys and values are overwritten, as the formula says

def sigmoid(x): return 1 / (1 + torch.exp(-x))


def two_layers(maps, v):
    "W2 relu(W1 v + b1) + b2 of one vector [C]."
    first, second = maps[0], maps[2]
    return second.weight @ torch.relu(first.weight @ v + first.bias) + second.bias


def cell_step(cell, y, h, c):
    "One LSTM step without output gate of one vector [C]."
    i, f, g = (two_layers(cell.input, y) + two_layers(cell.recurrent, h)).view(3, -1)
    c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
    return sigmoid(c), c


def many(cell, ys, states): return [cell_step(cell, y, *state) for y, state in zip(ys, states)]


def pooled(x): return x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])


def along_channels(conv, v):
    "A 1-D convolution over zero-padded channels, tap by tap."
    taps = conv.weight.flatten()
    padded = F.pad(v, (len(taps) // 2,) * 2)
    return sum(w * padded[:, j:j + v.shape[1]] for j, w in enumerate(taps))


def cut(v, g, d, recipe):
    "Head `g` of [B, C], layer-normalised under `stable`."
    head = v[:, g * d:(g + 1) * d]
    if recipe == "released": return head
    return (head - head.mean(1, keepdim=True)) / (head.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def batch_norm(x, norm):
    shape = lambda v: v[None, :, None, None]
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) if norm.training else (norm.running_mean, norm.running_var)
    return (x - shape(mean)) / (shape(var) + 1e-5).sqrt() * shape(norm.weight) + shape(norm.bias)


def depthwise(conv, x): return torch.cat([F.conv2d(x[:, c:c + 1], conv.weight[c:c + 1], padding=1) for c in range(x.shape[1])], 1)


def gates(cell, vectors, states, leak):
    "h of the cell on one vector [C] a sample; with the leak, all from the first sample's state."
    return torch.stack([h for h, _ in many(cell, vectors, [states[0]] * len(states) if leak else states)])


class Reference:
    "Runs the layers of one stage with the weights of a `DLAB` or `DLAL`."
    def __init__(self, attention, stage, recipe, leak=False):
        self.light, self.recipe, self.leak = isinstance(attention, DLAL), recipe, leak
        self.cell, self.layers = attention.cells[stage], attention.stages[stage]
        self.around = attention.around[stage] if self.light else None
        self.states, self.keys, self.values = None, [], []

    def __call__(self, x, t, shortcut):
        layer, p = self.layers[t], pooled(x)
        self.states = many(self.cell, p, self.states or [(torch.zeros_like(v), torch.zeros_like(v)) for v in p])
        out = batch_norm((self.of_one if self.light else self.of_all)(layer, x, p, shortcut), layer.norm)
        return x + (torch.relu(out) if self.recipe == "released" and not self.light else out)

    def of_all(self, layer, x, p, shortcut):
        self.keys = [k * gates(self.cell, k, self.states, self.leak) for k in self.keys]
        self.values = [v * gates(self.cell, pooled(v), self.states, self.leak)[:, :, None, None] for v in self.values]
        self.keys.append(along_channels(layer.key, p))
        self.values.append(depthwise(layer.value, x))
        q, d, heads = along_channels(layer.query, p), x.shape[1] // layer.heads, []
        for g in range(layer.heads):
            logits = torch.stack([(cut(q, g, d, self.recipe) * cut(k, g, d, self.recipe)).sum(1) / math.sqrt(d) for k in self.keys])
            alpha = (logits - logits.logsumexp(0)).exp()
            heads.append(sum(a[:, None, None, None] * v[:, g * d:(g + 1) * d] for a, v in zip(alpha, self.values)))
        return torch.cat(heads, 1)

    def of_one(self, layer, x, p, shortcut):
        mixed = shortcut * gates(self.cell, pooled(shortcut), self.states, self.leak)[:, :, None, None] + depthwise(self.around, shortcut)
        q, k, d = along_channels(layer.query, p), along_channels(layer.key, p), x.shape[1] // layer.heads
        a = torch.cat([sigmoid((cut(q, g, d, self.recipe) * cut(k, g, d, self.recipe)).sum(1, keepdim=True) / math.sqrt(d)).expand(-1, d) for g in range(layer.heads)], 1)
        return a[:, :, None, None] * depthwise(layer.value, x) + layer.carry * mixed


# ---- layers alone

def randomised(module, seed=0):
    "Weights without symmetry: the `stable` recipe starts with gamma 0, which would hide every gradient before it."
    generator = torch.Generator().manual_seed(seed)
    for p in module.double().parameters(): p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def run(attention, stages, inputs, recipe=None, leak=False):
    "Outputs of all layers, flat; of the reference where a recipe is given. Each block needs the layer before it, so that an error travels on."
    outs, memory = [], None
    for s, (_, n) in enumerate(stages):
        memory = attention.start(memory) if recipe is None else Reference(attention, s, recipe, leak)
        out = None
        for t in range(n):
            x, shortcut = inputs[s] if out is None else (torch.sin(out + t), torch.cos(out))
            out = attention(x, s, t, memory, shortcut) if recipe is None else memory(x, t, shortcut)
            outs.append(out)
    return outs


def leaves(stages, size, batch):
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(batch, c, *size, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)) for c, _ in stages]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()))


def assert_same_gradients(ours, theirs, parts):
    "Of a loss that weighs every number of every output differently."
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in ours]
    mine, other = (torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights)), parts, allow_unused=True, materialize_grads=True) for outs in (ours, theirs))
    assert_close(mine, other)
    return mine


SHAPES = {
    "one layer": ([(4, 1)], 2, 2, (4, 4)),
    "twelve layers": ([(4, 12)], 2, 1, (3, 2)),
    "two stages, odd maps": ([(6, 4), (10, 3)], 2, 3, (5, 3)),
    "one head": ([(8, 3)], 8, 4, (2, 3)),
    "a head a channel, one pixel": ([(3, 4)], 1, 3, (1, 1)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@recipes
@pytest.mark.parametrize("stages, d, reduction, size", SHAPES.values(), ids=SHAPES)
@both
def test_layers_equal_the_loops(name, stages, d, reduction, size, recipe, training):
    for form in ("list", "concat") if name == "dla_b" else ("",):
        form = {"form": form} if form else {}
        attention = randomised(DLAS[name](stages, d, recipe, 0.0, reduction=reduction, **form)).train(training)
        inputs = leaves(stages, size, batch=5)
        ours, theirs = run(attention, stages, inputs), run(attention, stages, inputs, recipe)
        assert_close(ours, theirs)
        grads = assert_same_gradients(ours, theirs, [*(x for pair in inputs for x in pair), *attention.parameters()])
        if d == 2 and len(ours) > 1: assert sum(bool(g.abs().max() > 0) for g in grads) > 0.8 * len(grads)  # few hide: a ReLU of a cell this small may be dead


@recipes
@both
def test_the_leak_is_the_first_samples_state(name, recipe):
    stages, inputs = [(6, 4), (4, 2)], leaves([(6, 4), (4, 2)], (3, 3), batch=4)
    attention = randomised(DLAS[name](stages, 2, recipe, 0.0, reduction=2, batch_leak=True)).eval()
    ours, theirs = run(attention, stages, inputs), run(attention, stages, inputs, recipe, leak=True)
    assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, [*(x for pair in inputs for x in pair), *attention.parameters()])
    attention.batch_leak = False
    alone = run(attention, stages, inputs)
    assert_close([o[:1] for o in alone], [o[:1] for o in ours])           # the first sample does not notice
    assert not torch.allclose(alone[-1][1:], ours[-1][1:], atol=1e-6)     # the others do


def test_the_cell_alone_equals_the_loop():
    "Also several vectors a sample, and one state for all."
    cell = randomised(DSU(6, 4))
    assert cell.input[0].out_features == 1  # 6 // 4
    ys = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    state = cell(ys[:, 0, 0])
    by_hand = many(cell, ys[:, 0, 0], [(torch.zeros(6, dtype=torch.float64),) * 2] * 3)
    assert_close(state, [torch.stack(v) for v in zip(*by_hand)])
    h, c = cell(ys, tuple(v[:, None, None].expand_as(ys) for v in state))
    one, _ = cell(ys, tuple(v[:1, None, None].expand_as(ys) for v in state))
    for b in range(3):
        for i in range(2):
            for j in range(5):
                assert_close((h[b, i, j], c[b, i, j]), cell_step(cell, ys[b, i, j], *by_hand[b]))
                assert_close([one[b, i, j]], [cell_step(cell, ys[b, i, j], *by_hand[0])[0]])
    assert (h > 0).all() and (h < 1).all()


def test_values_in_memory_are_never_rescaled():
    attention, memory, stored = DLAB([(8, 4)], 4, drop_path=0.0), DynamicMemory(), []
    for t in range(4):
        attention(torch.randn(2, 8, 3, 3), 0, t, memory)
        stored.append((memory.values[-1], memory.values[-1].clone()))
        assert all(v is held and torch.equal(v, then) for v, (held, then) in zip(memory.values, stored))
    assert memory.products.shape == (2, 4, 8) and (memory.products[:, -1] == 1).all()
    assert (memory.products[:, :-1] < memory.products[:, 1:]).all()  # each older value wears one gate more


def test_calls_of_the_cell():
    "2T - 1 in DLA-B, 2T in DLA-L, each for a whole batch."
    for cls, expected in ((DLAB, 2 * 5 - 1), (DLAL, 2 * 5)):
        attention, calls = cls([(8, 5)], 4), []
        attention.cells[0].register_forward_hook(lambda *a: calls.append(a))
        memory = attention.start()
        for t in range(5): attention(torch.randn(2, 8, 3, 3), 0, t, memory, torch.randn(2, 8, 3, 3))
        assert len(calls) == expected


# ---- whole networks

def network(name, attention, width=0.25, classes=10, **kw):
    torch.manual_seed(0)
    model = create_model(name, classes, attention, width=width, **{"drop_path": 0.0} | kw).double()
    if model.layer_attention is None: return model
    generator = torch.Generator().manual_seed(1)
    for p in model.layer_attention.parameters(): p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def photos(n=4, size=32, seed=7): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_the_formula(model, x, recipe):
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for s, blocks in enumerate(model.stages()):
        reference = Reference(model.layer_attention, s, recipe)  # the state restarts at every stage
        for t, block in enumerate(blocks):
            shortcut = block.downsample(x)
            x = reference(F.relu(shortcut + block.residual(x)), t, shortcut)
    return model.fc(x.mean((2, 3)))


@recipes
@pytest.mark.parametrize("net, width, size", [("cifar_resnet20", 0.25, 16), ("cifar_basic_resnet20", 0.25, 16), ("resnet50", 0.0625, 48)])
@both
def test_networks_equal_the_formula(name, net, width, size, recipe):
    model, x = network(net, name, width, recipe=recipe), photos(3, size).requires_grad_()
    if net == "resnet50":  # the released arrangement of ImageNet starts the residual branches at zero: open them
        for blocks in model.stages():
            for block in blocks: torch.nn.init.normal_(block.last_norm.weight)
    parts = [x, *model.parameters()]
    ours, theirs = model(x), by_the_formula(model, x, recipe)
    assert_close([ours], [theirs])
    assert_same_gradients([ours], [theirs], parts)


@both
def test_twelve_layers_deep_equal_the_formula(name):
    model, x = network("cifar_resnet110", name, 0.0625).eval(), photos(2, 8)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_var.uniform_(0.5, 2)
    with torch.no_grad(): assert_close([model(x)], [by_the_formula(model, x, "stable")])


@both
def test_permuting_the_batch_permutes_the_logits(name):
    x, order = photos(6), torch.tensor([4, 2, 0, 5, 1, 3])
    other = torch.cat([photos(1, seed=8), x[1:]])
    for leak in (False, True):
        model = network("cifar_resnet20", name, batch_leak=leak).eval()
        with torch.no_grad(): logits, shuffled, changed = model(x), model(x[order]), model(other)
        gaps = (shuffled - logits[order]).abs().max(), (changed - logits)[1:].abs().max()
        assert all(g > 1e-6 for g in gaps) if leak else all(g < 1e-10 for g in gaps)
        if not leak:
            with torch.no_grad(): assert_close([torch.cat([model(x[i:i + 1]) for i in range(6)])], [logits])


@both
def test_no_state_lasts_beyond_a_forward_pass(name):
    model = network("cifar_resnet20", name).eval()
    keys = set(model.state_dict())
    with torch.no_grad():
        first = model(photos())
        model(photos(7, 16, seed=9))
        assert torch.equal(model(photos()), first)
    assert set(model.state_dict()) == keys and not list(model.layer_attention.cells.buffers())
    for m in model.layer_attention.modules(): assert not any(torch.is_tensor(v) for v in vars(m).values())


@both
def test_altering_a_cell_alters_its_own_stage_only(name):
    stages = [(4, 3), (6, 2)]
    attention, inputs = randomised(DLAS[name](stages, 2, "released", 0.0, reduction=2)).eval(), leaves(stages, (3, 3), 2)
    before = run(attention, stages, inputs)
    attention.cells[0].input[2].bias.data += 1
    changed = [not torch.equal(a, b) for a, b in zip(before, run(attention, stages, inputs))]
    assert changed == ([False, True, True] if name == "dla_b" else [True] * 3) + [False, False]  # alone in memory there is nothing to gate


@both
def test_training_and_evaluation(name):
    model = network("cifar_resnet20", name, drop_path=0.5)
    means = {k: v.clone() for k, v in model.layer_attention.named_buffers() if k.endswith("running_mean")}
    torch.manual_seed(0); first = model(photos())
    assert all(not torch.equal(model.layer_attention.get_buffer(k), v) for k, v in means.items()) and len(means) == 6
    assert not torch.equal(model(photos()), first)   # drop-path is drawn anew
    torch.manual_seed(0); assert_close([model(photos())], [first])
    model.eval(); assert torch.equal(model(photos()), model(photos()))
    F.cross_entropy(model.train()(photos()), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@both
def test_stable_starts_as_the_plain_network(name):
    torch.manual_seed(0); plain = create_model("cifar_resnet20", 10, width=0.25)
    model = create_model("cifar_resnet20", 10, name, width=0.25)
    assert model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    x = photos().float()
    torch.testing.assert_close(model(x), plain(x))
    attention = INTERACTIONS[name]([(512, 1)])
    if name == "dla_l": assert abs(attention.around[0].weight.std().item() / math.sqrt(2 / (9 * 512)) - 1) < 0.05


@both
def test_copies_and_files_compute_the_same(name):
    model = network("cifar_resnet20", name).eval()
    other = network("cifar_resnet20", name); other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other.eval(), model.to(memory_format=torch.channels_last)):
            assert_close([twin(photos())], [by_the_formula(model, photos(), "stable")])


@both
def test_bfloat16_is_finite_and_keeps_its_state_wide(name):
    model, seen = network("cifar_resnet56", name).float(), []
    for cell in model.layer_attention.cells: cell.register_forward_hook(lambda m, args, out: seen.extend(v.dtype for v in out))
    with torch.autocast("cpu", torch.bfloat16): loss = F.cross_entropy(model(photos().float()), torch.arange(4))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters()) and set(seen) == {torch.float32}
    assert model.eval().bfloat16()(photos().bfloat16()).isfinite().all()


@recipes
def test_products_of_gates_are_wide_under_autocast(recipe):
    "In every layer, the newest entry included; they stay near those of a float32 pass."
    attention, memory, wide = DLAB([(8, 12)], 4, recipe, 0.0).eval(), DynamicMemory(), DynamicMemory()
    maps = torch.randn(12, 2, 8, 3, 3)
    for t, x in enumerate(maps):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): attention(x.bfloat16(), 0, t, memory)
        with torch.no_grad(): attention(x.bfloat16().float(), 0, t, wide)
        assert {v.dtype for v in (memory.products, *memory.vectors)} == {torch.float32}
    assert (memory.products / wide.products - 1).abs().max() < 0.05


@both
def test_one_graph_and_export(name):
    model, x = network("cifar_resnet20", name).eval(), photos()
    with torch.no_grad():
        expected = model(x)
        assert_close([torch.compile(model, fullgraph=True, backend="eager")(x)], [expected])
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
        assert_close([program(x), program(x[:3])], [expected, expected[:3]])


@both
def test_the_registry_knows_them(name):
    assert name in ATTENTIONS and INTERACTIONS[name] is DLAS[name] and not issubclass(DLAS[name], MRLAB)
    for net, d, r in (("cifar_resnet56", 32, 4), ("cifar_basic_resnet56", 16, 4), ("resnet101", 16 if name == "dla_b" else 32, 16)):
        with torch.device("meta"): attention = create_model(net, attention=name).layer_attention
        for layers, cell in zip(attention.stages, attention.cells):
            channels = layers[0].norm.num_features
            assert all(layer.heads == channels // d for layer in layers) and cell.input[0].out_features == cell.recurrent[0].out_features == channels // r
    model = create_model("cifar_resnet20", 10, name)
    assert retrieving(model) is None and model.policy is None and not len(model.skip_mask)


@both
def test_errors_name_the_remedy(name):
    for wrong, message in ((dict(reduction=0), "reduction is 0: it must be an integer from 1 to 64"), (dict(reduction=65), "an integer from 1 to 64"), (dict(reduction="4"), "reduction is '4'"),
                           (dict(head_width=48), "head_width must be one of"), (dict(recipe="stabel"), "did you mean 'stable'"), (dict(reductoin=4), "did you mean 'reduction'"), (dict(batch_leak="False"), "batch_leak is 'False': it must be True or False"), (dict(batch_leak=1), "batch_leak is 1"),
                           (dict(policy="ebqm"), "only ELA skips")):
        with pytest.raises(ElaError, match=message): create_model("cifar_resnet20", 10, name, **wrong)
    if name == "dla_b":
        with pytest.raises(ElaError, match="did you mean 'list'"): create_model("cifar_resnet20", 10, name, form="lists")


# ---- as many parameters, without attention

def parameter_count(model): return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("net", MODELS)
def test_matched_networks_have_as_many_parameters(net):
    for attention in ("se", "dla_b", "dla_l"):
        with torch.device("meta"): target, matched = (parameter_count(create_model(net, 10, **kw)) for kw in (dict(attention=attention), dict(width=f"match:{attention}")))
        assert abs(matched / target - 1) < 0.015


def test_every_attention_can_be_matched():
    for attention in ATTENTIONS[1:]:
        with torch.device("meta"): target, matched = (parameter_count(create_model("cifar_resnet20", 10, **kw)) for kw in (dict(attention=attention), dict(width=f"match:{attention}")))
        assert abs(matched / target - 1) < 0.015


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_no_width_matches_better(width):
    with torch.device("meta"):
        target = parameter_count(create_model("cifar_basic_resnet20", 10, "dla_b", width=width))
        best = min(abs(parameter_count(create_model("cifar_basic_resnet20", 10, width=width + n / 300)) - target) for n in range(75))
        found = matched_width("cifar_basic_resnet20", "dla_b", 10, width)
        assert abs(parameter_count(create_model("cifar_basic_resnet20", 10, width=found)) - target) <= best
        assert parameter_count(create_model("cifar_basic_resnet20", 10, width=f"match:dla_b:{width}")) == parameter_count(create_model("cifar_basic_resnet20", 10, width=found))


def test_matching_draws_no_random_numbers_and_is_quick_the_second_time():
    make = lambda: torch.manual_seed(3) and create_model("cifar_resnet20", 7, width="match:dla_l:0.5").fc.weight
    first = make()
    start = time.process_time(); matched_width("cifar_resnet20", "dla_l", 7, 0.5)
    assert time.process_time() - start < 0.05 and torch.equal(first, make())


@pytest.mark.parametrize("text", ["", "wide", "match", "match:dla_b:", "match:dla_b:x", "match:dla_b:-1", "match:dla_b:1:2", "match:dla_b:nan", "match:dla_b:0", " match:dla_b"])
def test_a_wrong_text_for_a_width_is_told_the_form(text):
    with pytest.raises(ElaError, match="match:ATTENTION:WIDTH with a width from 0.05 to 16"): create_model("cifar_resnet20", width=text)


def test_errors_of_matching_name_the_remedy():
    for kw, message in ((dict(width="match:dla"), "did you mean"), (dict(width="match:dla_b\n"), "did you mean 'dla_b'"),
                        (dict(width="match:dla_b:16"), "choose a smaller width"), (dict(width="match:dla_b", attention="ela"), "not one with attention 'ela'"),
                        (dict(width="match:dla_b", num_classes=0), "num_classes is 0")):
        with pytest.raises(ElaError, match=message): create_model("cifar_resnet20", **kw)
