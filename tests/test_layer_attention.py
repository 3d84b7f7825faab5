"""Layer attention and ELA are what the formulas say: against a reference of plain loops, in float64, forward and backward."""
import copy
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ela_repro.core import ElaError
from ela_repro.ela import ELA, SkipController, probe
from ela_repro.layer_attention import MRLAB, ChannelConv, LayerAttention, LightLayerAttention, Memory, kernel_size
from ela_repro.policy import EBQM, Fixed, Never
from ela_repro.resnet import create_model

few = settings(max_examples=15, derandomize=True, deadline=None)
EXACT = dict(rtol=1e-10, atol=1e-10)
MODES, RECIPES = ("retrieval", "module", "reuse"), ("stable", "released")


def assert_same(ours, theirs): torch.testing.assert_close(ours, theirs, **EXACT)


# ---- the reference: layers, heads and memory in loops; no skipped retrieval is computed

def head_norm(v):
    "Layer norm without affine parameters, epsilon 1e-5."
    return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def batch_norm(x, norm, training):
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) if training else (norm.running_mean, norm.running_var)
    shape = lambda v: v[None, :, None, None]
    return (x - shape(mean)) / (shape(var) + 1e-5).sqrt() * shape(norm.weight) + shape(norm.bias)


def reference(attention, inputs, recipe, mask=None, mode="retrieval"):
    """Outputs and log rows of all layers, flat. `inputs(stage, layer, previous)` gives the block output.
    A skipped layer leaves its input alone; it contributes k and v in mode "retrieval", and does not exist for others in "module".
    In "reuse" it contributes k and v and adds, through its own batch norm, what the last layer before it retrieved."""
    outs, rows = [], []
    for s, stage in enumerate(attention.stages):
        keys, values, out, retrieved = [], [], None, None  # the memory restarts at every stage
        for t, layer in enumerate(stage):
            x = inputs(s, t, out)
            pooled, k = x.mean((2, 3)), layer.query.weight.shape[-1]
            q_all, k_all = (F.conv1d(pooled[:, None], conv.weight, padding=k // 2)[:, 0] for conv in (layer.query, layer.key))
            d = x.shape[1] // layer.heads
            cut = lambda v, g: head_norm(v[:, g * d:(g + 1) * d]) if recipe == "stable" else v[:, g * d:(g + 1) * d]
            value = F.conv2d(x, layer.value.weight, padding=1, groups=x.shape[1])
            own_keys, own_values = [*keys, k_all], [*values, value]
            heads, logs = [], []
            for g in range(layer.heads):
                logits = torch.stack([(cut(q_all, g) * cut(key, g)).sum(1) / math.sqrt(d) for key in own_keys])
                logs.append(logits - logits.logsumexp(0))
                heads.append(sum(logs[-1][m].exp()[:, None, None, None] * v[:, g * d:(g + 1) * d] for m, v in enumerate(own_values)))
            rows.append(torch.stack(logs).permute(2, 0, 1).detach())
            skipped = mask is not None and bool(mask[len(outs)])
            if not skipped: retrieved = torch.cat(heads, 1)
            if not skipped or mode == "reuse" and retrieved is not None:
                branch = batch_norm(retrieved, layer.norm, attention.training)
                out = x + (branch.relu() if recipe == "released" else branch)
            else: out = x
            if not (skipped and mode == "module"): keys, values = own_keys, own_values
            outs.append(out)
    return outs, rows


def run(attention, inputs):
    outs = []
    for s, stage in enumerate(attention.stages):
        memory, out = attention.start(), None
        for t in range(len(stage)):
            out = attention(inputs(s, t, out), s, t, memory)
            outs.append(out)
    return outs


def randomised(attention, seed=0):
    "Weights without symmetry: the `stable` recipe starts with gamma 0, which would hide every gradient before it."
    generator = torch.Generator().manual_seed(seed)
    attention = attention.double()
    for p in attention.parameters(): p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return attention


def blocks(stages, size, batch=3, seed=0, factor=1.0):
    "Stand-ins for the blocks of a backbone: each needs the layer before it, so that an error or a gradient travels on."
    generator = torch.Generator().manual_seed(seed)
    firsts = [(factor * torch.randn(batch, c, *size, generator=generator, dtype=torch.float64)).requires_grad_() for c, _ in stages]
    return firsts, lambda s, t, previous: firsts[s] if previous is None else factor * torch.sin(previous + t)


def gradients(outs, leaves):
    "Of a loss that weighs every number of every output differently; zero where a leaf has no part in it."
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def assert_equals_reference(attention, stages, size, recipe, mask=None, mode="retrieval", batch=3):
    firsts, inputs = blocks(stages, size, batch)
    leaves = [*firsts, *attention.parameters()]
    ours, (theirs, _) = run(attention, inputs), reference(attention, inputs, recipe, mask, mode)
    assert_same(ours, theirs)
    mine, other = gradients(ours, leaves), gradients(theirs, leaves)
    for a, b in zip(mine, other): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, b.abs().max().item()))


SHAPES = {
    "one layer": ([(4, 1)], 2, (4, 4)),
    "twelve layers": ([(4, 12)], 2, (3, 3)),
    "odd maps, two stages": ([(6, 4), (10, 3)], 2, (5, 7)),
    "one head": ([(8, 3)], 8, (2, 3)),
    "a head a channel": ([(3, 3)], 1, (3, 2)),
    "one pixel": ([(8, 3), (4, 1)], 4, (1, 1)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stages, d, size", SHAPES.values(), ids=SHAPES)
def test_both_forms_equal_the_loops(stages, d, size, recipe, training):
    for form in ("list", "concat"):
        attention = randomised(MRLAB(stages, d, recipe, drop_path=0.0, form=form)).train(training)
        assert_equals_reference(attention, stages, size, recipe, batch=5)


def test_layers_own_their_weights_and_stages_their_memory():
    "Altering one layer's weights alters that layer's output and later ones of its stage, and nothing of another stage."
    stages = [(4, 3), (4, 2)]
    attention = randomised(MRLAB(stages, 2, "released", drop_path=0.0))
    _, inputs = blocks(stages, (3, 3))
    before = run(attention, inputs)
    attention.stages[0][1].key.weight.data += 1
    changed = [not torch.equal(a, b) for a, b in zip(before, run(attention, inputs))]
    assert changed == [False, True, True, False, False]


def test_the_kernel_follows_the_number_of_channels():
    sizes = {16: 3, 32: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}  # peers' table
    assert {c: kernel_size(c) for c in sizes} == sizes
    with pytest.raises(ElaError, match="channels is 0: it must be an integer, at least 1"): kernel_size(0)


def test_kernels_and_heads_of_impossible_sizes_are_refused():
    with pytest.raises(ElaError, match="kernel is 4: it must be odd.*take 3 or 5"): ChannelConv(8, 4)
    with pytest.raises(ElaError, match="kernel is 0"): ChannelConv(8, 0)
    for width in (0, 3, 2.0, True, "4"):
        with pytest.raises(ElaError, match=r"8 channels cannot be cut into heads of .*must be one of 1, 2, 4, 8"): LayerAttention(8, width)
    layer = LayerAttention(128, 32)
    assert layer.query.weight.shape == layer.key.weight.shape == (1, 1, 5) and layer.value.weight.shape == (128, 1, 3, 3)
    assert layer.query.bias is None and layer.key.bias is None and layer.value.bias is None


def test_the_initial_state_of_the_recipes():
    "`stable` starts as the identity; kernels of v follow sqrt(2 / 9C)."
    for recipe, gamma in (("stable", 0.0), ("released", 1.0)):
        layer = LayerAttention(512, 32, recipe)
        assert (layer.norm.weight == gamma).all() and (layer.norm.bias == 0).all()
        assert abs(layer.value.weight.std().item() / math.sqrt(2 / (9 * 512)) - 1) < 0.05 and layer.drop_path.p == 0.2
    x = torch.randn(4, 512, 3, 3)
    assert torch.equal(LayerAttention(512, 32, "stable", drop_path=0.0)(x, Memory()), x)


# ---- drop-path

def test_drop_path_drops_a_samples_retrieval_and_scales_the_others():
    p, n = 0.3, 4000
    torch.manual_seed(0)
    layer = LayerAttention(4, 2, "released", drop_path=p).double()
    x = torch.randn(n, 4, 2, 2, dtype=torch.float64)
    added = layer(x, Memory()) - x
    layer.drop_path.p = 0.0
    branch = layer(x, Memory()) - x
    dropped = (added == 0).flatten(1).all(1)
    assert_same(added[~dropped], branch[~dropped] / (1 - p))   # whole samples, scaled by 1 / keep; x itself is never dropped
    assert abs(dropped.sum().item() - p * n) < 5 * math.sqrt(n * p * (1 - p))
    layer.drop_path.p = p
    again = ((layer(x, Memory()) - x) == 0).flatten(1).all(1)
    assert not torch.equal(again, dropped)                     # drawn anew
    layer.eval()
    assert torch.equal(layer(x, Memory()), layer(x, Memory())) and not ((layer(x, Memory()) - x) == 0).flatten(1).all(1).any()


def test_drop_path_is_drawn_for_each_layer_alone():
    torch.manual_seed(0)
    stages = [(4, 2)]
    attention = MRLAB(stages, 2, "released", drop_path=0.5).double()
    x = torch.randn(64, 4, 2, 2, dtype=torch.float64)
    memory = attention.start()
    first, second = ((attention(x, 0, t, memory) == x).flatten(1).all(1) for t in range(2))
    assert not torch.equal(first, second)


# ---- ELA

@st.composite
def masks(draw, layers): return draw(st.lists(st.booleans(), min_size=layers, max_size=layers))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", RECIPES)
@few
@given(data=st.data())
def test_a_skipped_layer_contributes_what_its_mode_says_and_nothing_else(mode, recipe, data):
    stages = [(4, 5), (6, 3)]
    attention = randomised(ELA(stages, mode, head_width=2, recipe=recipe, drop_path=0.0, form=data.draw(st.sampled_from(["list", "concat"]))))
    mask = data.draw(masks(8))  # the first layers of the stages too: set by hand they may be skipped
    attention.set_skip_mask(mask)
    assert_equals_reference(attention, stages, (3, 2), recipe, mask, mode)


@few
@given(mask=masks(6))
def test_under_module_skipped_layers_do_not_exist(mask):
    "A network of the remaining layers alone, each fed what the full one feeds it."
    full = randomised(ELA([(4, 6)], "module", head_width=2, drop_path=0.0))
    full.set_skip_mask(mask)
    firsts, inputs = blocks([(4, 6)], (3, 3))
    seen, kept = [], [t for t in range(6) if not mask[t]]
    outs = run(full, lambda s, t, previous: seen.append(inputs(s, t, previous)) or seen[-1])
    if not kept: return
    small = MRLAB([(4, len(kept))], 2, drop_path=0.0).double()
    for here, there in enumerate(kept): small.stages[0][here].load_state_dict(full.stages[0][there].state_dict())
    assert_same(run(small, lambda s, t, previous: seen[kept[t]]), [outs[t] for t in kept])


def network(attention, name="cifar_resnet20", width=0.25, seed=0, **kw):
    torch.manual_seed(seed)
    model = create_model(name, 10, attention, width=width, **kw).double()
    if model.layer_attention is not None: randomised(model.layer_attention)
    return model


def loss_gradients(model, x, seed=5):
    "Logits and all gradients of one training step under the same drop-path draws; None for parameters without a part in it."
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    logits = model(x)
    F.cross_entropy(logits, torch.arange(len(x)) % 10).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters()}


def images(n=4, dtype=torch.float64): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(7), dtype=dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_skipped_is_mrla_b(mode, recipe):
    "Whole network in training, drop-path and batch statistics included."
    ela, mrla = network("ela", skip=mode, recipe=recipe), network("mrla_b", recipe=recipe, seed=1)
    assert not mrla.load_state_dict({k: v for k, v in ela.state_dict().items() if k != "layer_attention.skip_mask"}).missing_keys
    (logits, grads), (expected, theirs) = loss_gradients(ela, images()), loss_gradients(mrla, images())
    assert_same(logits, expected)
    assert_same(grads, theirs)
    for name, buffer in mrla.named_buffers(): assert_same(ela.get_buffer(name), buffer)


@pytest.mark.parametrize("name, width", [("cifar_resnet20", 0.25), ("cifar_resnet20", 0.5), ("cifar_basic_resnet20", 0.25)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_skipped_under_module_is_the_plain_resnet(name, width, recipe):
    ela, plain = network("ela", name, width, skip="module", recipe=recipe), network(None, name, width, seed=1)
    plain.load_state_dict({k: v for k, v in ela.state_dict().items() if not k.startswith("layer_attention")})
    ela.set_skip_mask([True] * len(ela.skip_mask))
    before = {k: v.clone() for k, v in ela.layer_attention.state_dict().items()}
    (logits, grads), (expected, theirs) = loss_gradients(ela, images()), loss_gradients(plain, images())
    assert_same(logits, expected)
    assert_same({k: v for k, v in grads.items() if not k.startswith("layer_attention")}, theirs)
    assert all(v is None for k, v in grads.items() if k.startswith("layer_attention"))
    for name, buffer in plain.named_buffers(): assert_same(ela.get_buffer(name), buffer)
    assert_same(ela.layer_attention.state_dict(), before)  # nor do its statistics move
    for model in (ela, plain): model.eval()
    assert_same(ela(images()), plain(images()))


def frozen_names(mode, mask, lengths):
    "Parameters that a step must not touch: all of a skipped layer, or (k and v being read by others) its query and, unless it adds another's retrieval, its norm."
    flat = [(s, t) for s, n in enumerate(lengths) for t in range(n)]
    parts = {"retrieval": ("query", "norm"), "module": ("query", "norm", "key", "value"), "reuse": ("query",)}[mode]
    return {f"layer_attention.stages.{s}.{t}.{part}" for (s, t), m in zip(flat, mask) if m for part in parts}


@pytest.mark.parametrize("mode", MODES)
def test_skipped_parts_have_no_gradient_do_not_decay_and_resume_with_their_old_momentum(mode):
    model = network("ela", "cifar_basic_resnet20", skip=mode, drop_path=0.0)
    lr, momentum, decay = 0.05, 0.9, 0.1
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    def step():
        grads = loss_gradients(model, images())[1]
        before = {n: (p.detach().clone(), optimiser.state[p]["momentum_buffer"].clone() if p in optimiser.state else None) for n, p in model.named_parameters()}
        optimiser.step()
        return grads, before
    step()
    mask = [0, 1, 0, 0, 1, 0, 0, 1, 0]  # the middle layer of each stage: a later one reads its k and v
    frozen = frozen_names(mode, mask, (3, 3, 3))
    is_frozen = lambda name: name.rpartition(".")[0] in frozen
    model.set_skip_mask(mask)
    statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k and is_frozen(k)}
    for _ in range(2):
        grads, before = step()
        for name, p in model.named_parameters():
            old, buffer = before[name]
            assert (grads[name] is None) == is_frozen(name), name
            assert torch.equal(p, old) == is_frozen(name), name
            if is_frozen(name): assert torch.equal(optimiser.state[p]["momentum_buffer"], buffer)
    assert bool(statistics) == (mode != "reuse") and all(torch.equal(model.state_dict()[k], v) for k, v in statistics.items())
    model.set_skip_mask([0] * 9)
    grads, before = step()
    resumed = [n for n, _ in model.named_parameters() if is_frozen(n)]
    assert len(resumed) == 3 * {"retrieval": 3, "module": 5, "reuse": 1}[mode]
    for name in resumed:
        old, buffer = before[name]
        assert_same(model.get_parameter(name).detach(), old - lr * (momentum * buffer + grads[name] + decay * old))


def test_evaluation_uses_the_mask_and_the_mask_travels_with_the_weights():
    x, mask = images(), [0, 1, 0, 1, 0, 1]
    model = network("ela").eval()
    unskipped = model(x)
    model.set_skip_mask(mask)
    skipped = model(x)
    assert not torch.allclose(unskipped, skipped)
    clone = copy.deepcopy(model)
    fresh = network("ela", seed=9).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (clone, fresh): assert other.skip_mask.tolist() == [bool(m) for m in mask] and torch.equal(other(x), skipped)
    clone.set_skip_mask([0] * 6)
    assert torch.equal(clone(x), unskipped) and torch.equal(model(x), skipped)  # a copy is independent
    fresh.load_state_dict(clone.state_dict())
    assert torch.equal(fresh(x), unskipped)                                     # a mask is replaced, not added to


def test_a_network_can_be_pickled():
    "torch.save(model) and every process pool do that."
    import pickle

    model = network("ela").eval()
    model.set_skip_mask([0, 1, 0, 1, 0, 1])
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), model(images()))


def lively():
    "A network whose retrievals add something."
    model = network("ela").eval()
    for layer in model.modules():
        if isinstance(layer, LayerAttention): torch.nn.init.normal_(layer.norm.weight)
    return model


def test_whatever_is_written_into_the_mask_is_followed():
    model, x = lively(), images()
    with torch.no_grad():
        plain = model(x)
        model.layer_attention.skip_mask[1] = True
        skipping = model(x)
        assert not torch.equal(skipping, plain) and model.layer_attention.skipped == [False, True] + 4*[False]
        model.layer_attention.skip_mask.zero_()
        assert torch.equal(model(x), plain)
        model.set_skip_mask([0, 1, 0, 0, 0, 0])
        assert torch.equal(model(x), skipping)
        load_mask(model, 6*[False])
        assert torch.equal(model(x), plain)


def load_mask(model, mask): model.load_state_dict({**model.state_dict(), "layer_attention.skip_mask": torch.tensor(mask)}, assign=True)


def test_a_compiled_network_follows_the_mask_in_one_graph():
    model, x = lively(), images()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        plain, mask = run(x), [False, True] + 4*[False]
        for change in (model.set_skip_mask, lambda mask: load_mask(model, mask)):
            change(mask)
            assert torch.equal(run(x), model(x)) and not torch.equal(run(x), plain)
            change(6*[False])
            assert torch.equal(run(x), plain)


def test_a_network_of_averaged_weights_skips_what_the_trained_one_skips():
    from torch.optim.swa_utils import AveragedModel

    model, x = lively(), images()
    averaged = AveragedModel(model).eval()
    for mask in ([0, 1] * 3, [1, 1, 0] * 2):
        model.set_skip_mask(mask)
        averaged.update_parameters(model)
        assert averaged.module.layer_attention.skipped == [m == 1 for m in mask] and torch.allclose(averaged(x), model(x), atol=1e-6)


def test_a_mask_is_followed_in_inference_mode():
    "Tensors made there count no changes; `set_skip_mask` is enough."
    with torch.inference_mode():
        model, x = lively(), images()
        plain = model(x)
        model.set_skip_mask([0, 1] * 3)
        assert not torch.equal(model(x), plain) and model.layer_attention.skipped == [False, True] * 3


@pytest.mark.parametrize("wrong", [[], [4, 4], [(8, 0)], [(8, 2.0)], None])
def test_stages_that_are_no_pairs_are_refused(wrong):
    with pytest.raises(ElaError, match="pair a stage"): ELA(wrong)


def test_a_drop_path_that_is_no_probability_is_refused():
    with pytest.raises(ElaError, match="drop_path is -0.1"): ELA([(32, 2)], drop_path=-0.1)


class Calling(torch.nn.Module):
    "Calls its layers of attention as often as told."
    def __init__(self, times):
        super().__init__()
        self.layer_attention, self.times = ELA([(8, 2)], head_width=4), times

    def forward(self, x):
        for _ in range(self.times):
            memory = self.layer_attention.start()
            for t in range(2): x = self.layer_attention(x, 0, t, memory)
        return x


def test_a_probe_wants_every_layer_once():
    x = torch.randn(3, 8, 4, 4)
    assert len(probe(Calling(1), x).rows) == 2
    for times in (0, 2):
        with pytest.raises(ElaError, match=f"of 2 layers of attention a forward pass came through {2*times}"): probe(Calling(times), x)
    with pytest.raises(ElaError, match="batch_size is 0"): probe(Calling(1), x, batch_size=0)


@pytest.mark.parametrize("policy, epochs, told", [("ebqm", 8, "policy is 'ebqm'"), (EBQM, 8, "policy is <class"), (EBQM(), 0, "epochs is 0"), (EBQM(), 2.5, "epochs is 2.5")])
def test_a_controller_says_what_it_cannot_use(policy, epochs, told):
    with pytest.raises(ElaError, match=told): SkipController(network("ela"), policy, images(), epochs)


def test_a_mask_nested_by_stage_is_refused():
    with pytest.raises(ElaError, match="is flat"): network("ela").set_skip_mask([[0, 1], [0], [0, 1, 1]])


@pytest.mark.parametrize("mask", [[0] * 5, [0] * 7, [[0] * 6], []])
def test_a_mask_that_does_not_fit_is_refused_and_changes_nothing(mask):
    model = network("ela")
    model.set_skip_mask([0, 1] * 3)
    with pytest.raises(ValueError, match="does not fit 6 layers"): model.set_skip_mask(mask)
    assert model.skip_mask.tolist() == model.layer_attention.skipped == [False, True] * 3
    with pytest.raises(ValueError, match="attention='ela'"): network("mrla_b").set_skip_mask([0] * 6)


# ---- probe

@pytest.mark.parametrize("attention, mode, mask", [("mrla_b", "retrieval", [0] * 9), *(("ela", m, k) for m in MODES for k in ([0] * 9, [0, 1, 0, 0, 1, 1, 1, 1, 0]))])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_probe_sees_the_rows_of_a_forward_pass(attention, mode, mask, recipe):
    model = network(attention, "cifar_basic_resnet20", recipe=recipe, **({"skip": mode} if attention == "ela" else {}))
    if attention == "ela": model.set_skip_mask(mask)
    model(images())  # so that the running statistics are no identity
    model.eval()
    seen = []
    handle = model.layer_attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images())
    handle.remove()
    _, rows = reference(model.layer_attention, lambda s, t, previous: seen[3 * s + t], recipe, mask, mode)
    result = model.probe(images(), batch_size=3)  # in chunks, the last one smaller
    assert_same(result.rows, rows)
    assert result.stages == (3, 3, 3) and list(result.skip_mask) == [bool(m) for m in mask]
    for row, memory in zip(result.rows, result.memory): assert row.shape[-1] == len(memory)
    for got, row in zip(result.mean_rows(), rows): assert_same(got, row.exp().mean(0))


def test_the_memory_of_each_layer_is_named():
    model = network("ela", "cifar_basic_resnet20", skip="module")
    model.set_skip_mask([0, 1, 0, 1, 1, 0, 0, 0, 1])
    assert model.probe(images()).memory == [[0], [0, 1], [0, 2], [0], [1], [2], [0], [0, 1], [0, 1, 2]]


def test_the_probe_leaves_everything_as_it_was():
    model = network("ela")
    model.set_skip_mask([0, 1, 0, 0, 0, 0])
    model.train()
    model.bn1.eval()  # somebody froze a part
    before, modes, state = copy.deepcopy(model.state_dict()), {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    first = model.probe(images())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters()) and not first.rows[0].requires_grad
    assert model.layer_attention.rows is None
    for a, b in zip(first.rows, model.probe(images()).rows): assert torch.equal(a, b)  # no drop-path
    assert {n: m.training for n, m in model.named_modules()} == modes


def test_a_probe_that_fails_leaves_no_trace():
    model = network("ela").train()
    with pytest.raises(RuntimeError): model.probe(torch.zeros(2, 5, 32, 32, dtype=torch.float64))
    assert model.training and model.layer_attention.rows is None
    with pytest.raises(ValueError, match="at least one image"): model.probe(images()[:0])


# ---- the network as a whole

@pytest.mark.parametrize("attention", ["se", "eca", "mrla_b", "mrla_l", "ela"])
def test_images_of_a_batch_do_not_mix(attention):
    "Permuting the images permutes the logits, in evaluation and (batch statistics do not know an order) in training."
    order = torch.tensor([2, 0, 3, 1])
    model = network(attention, **({"drop_path": 0.0} if attention in ("mrla_b", "mrla_l", "ela") else {}))
    for training in (True, False):
        model.train(training)
        assert_same(model(images()[order]), model(images())[order])
    assert_same(model(images()[:1]), model(images())[:1])  # alone as in company


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_autocast_stays_finite(recipe, mode):
    model = network("ela", skip=mode, recipe=recipe).float()
    model.set_skip_mask([0, 1, 0, 0, 0, 1])
    with torch.autocast("cpu", torch.bfloat16): logits = model(images(dtype=torch.float32))
    F.cross_entropy(logits.float(), torch.arange(4)).backward()
    assert torch.isfinite(logits).all() and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(r.dtype == torch.float32 for r in model.probe(images(dtype=torch.float32)).rows)


BACKBONES = dict(cifar_resnet20=243_508, cifar_resnet56=614_452, cifar_resnet110=1_170_868,
                 cifar_basic_resnet20=278_324, cifar_basic_resnet56=861_620, cifar_basic_resnet110=1_736_564)
ADDED = dict(se=(21_504, 64_512, 129_024, 2_016, 6_048, 12_096), eca=(26, 78, 156, 27, 81, 162), mrla_b=(9_908, 29_724, 59_448, 3_750, 11_250, 22_500),
             mrla_l=(10_804, 32_412, 64_824, 4_086, 12_258, 24_516))
ADDED |= {None: (0,) * 6, "ela": ADDED["mrla_b"]}  # a mask is no parameter


@pytest.mark.parametrize("name, attention", [(n, a) for n in BACKBONES for a in ADDED if a != "ela" or n.endswith("20")])
def test_parameters_are_counted_as_published(name, attention):
    "100 classes; the table of the peers' own code."
    with torch.device("cpu" if attention == "ela" else "meta"): model = create_model(name, 100, attention)
    assert sum(p.numel() for p in model.parameters()) == BACKBONES[name] + ADDED[attention][list(BACKBONES).index(name)]


IMAGENET = {"resnet50": {None: 25_557_032, "se": 28_071_976, "mrla_b": 25_723_348, "ela": 25_723_348, "mrla_l": 25_738_452},
            "resnet101": {None: 44_549_160, "se": 49_292_328, "mrla_b": 44_907_134, "ela": 44_907_134, "mrla_l": 44_939_646}}


@pytest.mark.parametrize("name, attention", [(n, a) for n in IMAGENET for a in IMAGENET[n]])
def test_imagenet_parameters_are_counted_as_published(name, attention):
    "1,000 classes, the ordinary 7x7 stem."
    with torch.device("meta"): model = create_model(name, 1000, attention)
    assert sum(p.numel() for p in model.parameters()) == IMAGENET[name][attention]


def test_the_plain_imagenet_network_is_torchvisions():
    "Names, shapes, and numbers, forward and backward, in training: weight files load, and mean the same."
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs, ours = resnet50(num_classes=7).double(), create_model("resnet50", 7).double()
    assert not any(ours.load_state_dict(theirs.state_dict()))
    x = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    for model in (theirs, ours): model(x).sin().sum().backward()
    assert_same({n: p.grad for n, p in ours.named_parameters()}, {n: p.grad for n, p in theirs.named_parameters()})


def test_the_imagenet_network_starts_with_silent_residual_branches():
    model = create_model("resnet50", 10, width=0.25)
    assert all((block.bn3.weight == 0).all() and (block.bn1.weight == 1).all() for stage in model.stages() for block in stage)


def test_layer_attention_on_the_imagenet_network_equals_the_loops():
    "Four stages of 3, 4, 6, 3 layers; the backbone feeds each layer its block's output."
    torch.manual_seed(0)
    model = create_model("resnet50", 10, "ela", width=0.25, drop_path=0.0).double().train()
    assert [len(s) for s in model.layer_attention.stages] == [3, 4, 6, 3] and [s[0].heads for s in model.layer_attention.stages] == [16, 32, 64, 128]
    randomised(model.layer_attention)
    seen, outs = [], []
    model.layer_attention.register_forward_hook(lambda module, args, out: seen.append(args[0]) or outs.append(out))
    model(torch.randn(3, 3, 64, 64, dtype=torch.float64))
    starts = (0, 3, 7, 13)
    assert_same(outs, reference(model.layer_attention, lambda s, t, previous: seen[starts[s] + t], "stable")[0])


# ---- MRLA-L

def light_reference(layer, x, shortcut, recipe, training):
    "x + BN(sigmoid(q.k / sqrt(d)) v + lambda * shortcut), head by head."
    pooled, k = x.mean((2, 3)), layer.query.weight.shape[-1]
    q, key = (F.conv1d(pooled[:, None], conv.weight, padding=k // 2)[:, 0] for conv in (layer.query, layer.key))
    value, d = F.conv2d(x, layer.value.weight, padding=1, groups=x.shape[1]), x.shape[1] // layer.heads
    cut = lambda v, g: head_norm(v[:, g * d:(g + 1) * d]) if recipe == "stable" else v[:, g * d:(g + 1) * d]
    gates = [1 / (1 + (-(cut(q, g) * cut(key, g)).sum(1) / math.sqrt(d)).exp()) for g in range(layer.heads)]
    own = torch.cat([gates[g][:, None, None, None] * value[:, g * d:(g + 1) * d] for g in range(layer.heads)], 1)
    return x + batch_norm(own + layer.carry * shortcut, layer.norm, training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("channels, d, size", [(4, 2, (4, 4)), (6, 6, (5, 7)), (3, 1, (1, 1)), (12, 4, (3, 2))])
def test_the_light_form_equals_its_formula(channels, d, size, recipe, training):
    layer = randomised(LightLayerAttention(channels, d, recipe, drop_path=0.0)).train(training)
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(5, channels, *size, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    ours, theirs = layer(*leaves), light_reference(layer, *leaves, recipe, training)
    assert_same(ours, theirs)
    leaves += list(layer.parameters())
    for a, b in zip(gradients([ours], leaves), gradients([theirs], leaves)): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name, kw", [("cifar_resnet20", dict(width=0.25)), ("cifar_basic_resnet20", {}), ("resnet50", dict(width=0.25))])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_light_form_carries_the_blocks_shortcut(name, kw, recipe):
    "In the whole network: the identity, or its projection where the shape changes, computed here from the block's input."
    torch.manual_seed(0)
    model = create_model(name, 10, "mrla_l", recipe=recipe, drop_path=0.0, **kw).double().eval()
    randomised(model.layer_attention)
    inputs, calls = [], []
    for stage in model.stages():
        for block in stage: block.conv1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.layer_attention.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    model(images())
    flat = [(block, layer) for blocks, layers in zip(model.stages(), model.layer_attention.stages) for block, layer in zip(blocks, layers)]
    assert len(flat) == len(inputs) == len(calls)
    for (block, layer), before, (x, out) in zip(flat, inputs, calls): assert_same(out, light_reference(layer, x, block.downsample(before), recipe, False))


def test_the_light_form_starts_as_described():
    torch.manual_seed(0)
    for recipe, gamma in (("stable", 0.0), ("released", 1.0)):
        layer = LightLayerAttention(2048, 32, recipe)
        assert (layer.norm.weight == gamma).all() and abs(layer.carry.std().item() - 1) < 0.05 and abs(layer.carry.mean().item()) < 0.1 and not layer.relu
    model = create_model("cifar_resnet20", 10, "mrla_l")
    assert len(model.skip_mask) == 0
    with pytest.raises(ValueError, match="no layer attention to probe"): model.probe(images(dtype=torch.float32))
    with pytest.raises(ValueError, match="only ELA"): create_model("cifar_resnet20", 10, "mrla_l", policy="ebqm")


def test_shapes_of_all_networks():
    "Depth 9n + 2 and 6n + 2, three stages; maps of 32, 16, 8 pixels; widths of the peers' code."
    for name, channels, n in (("cifar_resnet56", (64, 128, 256), 6), ("cifar_basic_resnet20", (16, 32, 64), 3)):
        model, seen = create_model(name, 7, "mrla_b"), []
        model.layer_attention.register_forward_pre_hook(lambda module, args: seen.append((args[1], tuple(args[0].shape[1:]))))
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
        assert seen == [(s, (c, 32 >> s, 32 >> s)) for s, c in enumerate(channels) for _ in range(n)]


@pytest.mark.parametrize("heads, name, width", [((2, 4, 8), "cifar_resnet20", 1.0), ((2, 4, 8), "cifar_resnet20", 0.25), ((1, 2, 4), "cifar_basic_resnet20", 1.0)])
def test_heads_of_the_published_width(heads, name, width):
    assert tuple(stage[0].heads for stage in create_model(name, attention="ela", width=width).layer_attention.stages) == heads


def test_arguments_that_do_not_fit_are_refused():
    for kw, says in ((dict(name="cifar_resnet21"), "did you mean"), (dict(attention="elaa"), "'ela'"), (dict(attention="ela", skip="modul"), "'module'"), (dict(attention="ela", recipe="stabel"), "'stable'"),
                     (dict(attention="ela", head_width=24), "must be one of"), (dict(attention="mrla_b", policy="ebqm"), "only ELA"), (dict(attention="ela", policy="ebmq"), "'ebqm'")):
        with pytest.raises(ValueError, match=says): create_model(**{"name": "cifar_resnet20", **kw})


def test_numpy_masks_and_lists_mean_the_same():
    model = network("ela")
    for mask in ([0, 1, 0, 1, 0, 1], np.array([False, True] * 3), torch.tensor([False, True] * 3), [np.bool_(b) for b in (0, 1) * 3]):
        model.set_skip_mask([0] * 6)
        model.set_skip_mask(mask)
        assert model.skip_mask.tolist() == [False, True] * 3


# ---- other evidence: what a layer adds

@pytest.mark.parametrize("recipe", ["stable", "released"])
def test_a_contribution_is_what_the_layer_adds_beside_its_input(recipe):
    "Against the inputs and outputs of the layers of a real network, skipped ones included: those are compared with the network that does not skip them."
    torch.manual_seed(0)
    net, images = create_model("cifar_resnet20", 3, "ela", recipe=recipe, width=0.25).double().eval(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    layers = [l for stage in net.layer_attention.stages for l in stage]
    for l in layers: torch.nn.init.normal_(l.norm.weight)
    seen = {}
    def watch(i): return lambda module, inputs, output: seen.__setitem__(i, (inputs[0], output))
    hooks = [l.register_forward_hook(watch(i)) for i, l in enumerate(layers)]
    with torch.no_grad(): net(images)
    for h in hooks: h.remove()
    by_hand = [((y - x).flatten(1).norm(dim=1)/x.flatten(1).norm(dim=1)) for x, y in (seen[i] for i in range(len(layers)))]
    found = net.probe(images)
    assert found.shares is None
    found = probe(net, images, shares=True)
    for ours, theirs in zip(found.shares, by_hand, strict=True): torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)  # norms are taken in float32
    D = found.contributions()
    assert D.eligible.tolist() == found.divergences().eligible.tolist() and np.isnan(D.value[~D.eligible]).all()
    np.testing.assert_allclose(D.value[D.eligible], [by_hand[i].mean().item() for i in np.flatnonzero(D.eligible)], rtol=1e-5)
    np.testing.assert_allclose(D.null[D.eligible], np.nanmean(D.value), rtol=1e-12)
    last = len(layers) - 1
    net.set_skip_mask([i == last for i in range(len(layers))])  # nothing before the last layer changes
    torch.testing.assert_close(probe(net, images, shares=True).shares[last].double(), by_hand[last], rtol=1e-5, atol=1e-7)


def test_a_policy_can_follow_contributions():
    "It skips the layers that add least; its control skips as many."
    torch.manual_seed(0)
    net, images = create_model("cifar_resnet56", 3, "ela", width=0.25), torch.randn(4, 3, 16, 16)
    layers = [l for stage in net.layer_attention.stages for l in stage]
    for i, l in enumerate(layers): torch.nn.init.constant_(l.norm.weight, 0.01 if i % 3 == 1 else 1.0)
    controller = SkipController(net, EBQM(kind="contribution", tau=None, warmup=0.0), images, 8)
    update = controller.after_epoch(min(controller.when))
    assert {i for i, c in enumerate(update["mask"]) if c == "1"} == {i for i in range(len(layers)) if i % 3 == 1}
    assert all(v is None or v >= 0 for v in update["divergence"]) and len(set(update["null"]) - {None}) == 1


def test_a_memory_belongs_to_one_stage():
    net, x = MRLAB([(8, 2), (8, 2)], head_width=4), torch.randn(2, 8, 4, 4)
    with pytest.raises(ElaError, match="call start.. at the beginning of each stage"): net(x, 0, 0, None)
    memory = net.start()
    for layer in range(2): net(x, 0, layer, memory)
    with pytest.raises(ElaError, match="layer 0 of stage 1 finds 2 values of earlier layers in its memory instead of 0"): net(x, 1, 0, memory)
    with pytest.raises(ElaError, match="layer 1 of stage 0 finds 2 values"): net(x, 0, 1, memory)
    net(x, 1, 0, net.start())
    with pytest.raises(ElaError, match="layer 1 of stage 0 finds 0 values .* instead of 1: call start.. once"): net(x, 0, 1, net.start())  # begun anew at a block: every layer would see itself alone
    for stage, layer in ((2, 0), (0, 2), (-1, 0), (0, -1)):
        with pytest.raises(ElaError, match=f"no layer {layer} of stage {stage}: stages of 2.2 layers"): net(x, stage, layer, net.start())


@pytest.mark.parametrize("changed", [(2, 8, 5, 5), (3, 8, 6, 6), (2, 4, 6, 6)], ids=["size", "batch", "channels"])
@pytest.mark.parametrize("skipped", [False, True])
def test_a_stage_is_of_one_shape(changed, skipped):
    net = ELA([(8, 3)], head_width=4)
    net.set_skip_mask([False, skipped, False])
    memory = net.start()
    net(torch.randn(2, 8, 6, 6), 0, 0, memory)
    wanted = r", the layer before it had \(2, 8, 6, 6\)" if changed[1] == 8 else r": it was made for \[B, 8, H, W\]"
    with pytest.raises(ElaError, match=rf"layer 1 of stage 0 gets maps of shape {re.escape(str(changed))}{wanted}"): net(torch.randn(*changed), 0, 1, memory)
    with pytest.raises(ElaError, match=r"layer 0 .* shape \(8, 6, 6\): it was made for"): net(torch.randn(8, 6, 6), 0, 0, net.start())


def test_a_skipped_module_is_not_missed_in_the_memory():
    net, x = ELA([(8, 4)], skip="module", head_width=4), torch.randn(2, 8, 4, 4)
    net.set_skip_mask([0, 1, 1, 0])
    memory = net.start()
    for layer in range(4): net(x, 0, layer, memory)
    assert len(memory) == 2
    with pytest.raises(ElaError, match="layer 3 of stage 0 finds 2 values .* instead of 1"): net(x, 0, 3, memory)


def test_a_probe_of_a_network_that_computes_nan_says_so():
    model = create_model("cifar_basic_resnet20", 3, "ela")
    torch.nn.init.constant_(model.conv1.weight, math.nan)
    with pytest.raises(ElaError, match="computes NaN on the probe images: training has diverged"): SkipController(model, EBQM(warmup=0.0), torch.randn(4, 3, 32, 32), 8).after_epoch(0)


@pytest.mark.parametrize("mask,what", [([0, 2, 1], "2"), (["0", "2", "1"], "'0'"), ([0, None, 1], "None"), (np.array([0, 1, 7]), "7")], ids=str)
def test_what_a_mask_cannot_hold_is_named(mask, what):
    with pytest.raises(ElaError, match=f"or 1 and 0., not {what}$"): ELA([(32, 3)]).set_skip_mask(mask)


def test_probe_images_must_be_a_batch():
    for images in (None, np.zeros((4, 3, 32, 32)), torch.zeros(3, 32, 32), torch.zeros(0, 3, 32, 32)):
        with pytest.raises(ElaError, match="images is .*give the probe images as a tensor"): SkipController(create_model("cifar_basic_resnet20", 3, "ela"), EBQM(), images, 8)


def test_a_wrapped_network_is_to_be_unwrapped():
    wrapped = torch.nn.DataParallel(create_model("cifar_basic_resnet20", 3, "ela"))
    for call in (lambda: SkipController(wrapped, EBQM(), torch.randn(4, 3, 32, 32), 8), lambda: probe(wrapped, torch.randn(4, 3, 32, 32))):
        with pytest.raises(ElaError, match="give DataParallel's .module"): call()


def test_a_policy_that_is_used_again_begins_anew():
    images, policy = torch.randn(4, 3, 32, 32), EBQM(warmup=0.0)
    def trained(policy):
        torch.manual_seed(0)
        controller = SkipController(create_model("cifar_basic_resnet20", 3, "ela"), policy, images, 8)
        return [controller.after_epoch(e) for e in range(3)]
    once = trained(policy)
    SkipController(create_model("cifar_basic_resnet56", 3, "ela"), policy, images, 8).after_epoch(0)  # of other layers
    assert trained(policy) == once and policy.average is not None


@pytest.mark.parametrize("epoch", [-1, 8, "1", 1.0, True])
def test_epochs_are_counted_from_zero(epoch):
    controller = SkipController(create_model("cifar_basic_resnet20", 3, "ela"), EBQM(), torch.randn(4, 3, 32, 32), 8)
    with pytest.raises(ElaError, match="epoch, counted from 0, is .* from 0 to 7"): controller.after_epoch(epoch)


def test_a_schedule_that_never_decides_is_warned_of(recwarn):
    model, images = create_model("cifar_basic_resnet20", 3, "ela"), torch.randn(4, 3, 32, 32)
    for policy in (Never(updates=0), Fixed(updates=0), EBQM()): SkipController(model, policy, images, 8)
    assert not recwarn.list
    for policy, epochs in ((EBQM(), 1), (EBQM(updates=0), 8), (EBQM(warmup=0.9, freeze=0.9), 100)):
        with pytest.warns(UserWarning, match="EBQM never decides in .* epoch"): SkipController(model, policy, images, epochs)
    for policy in (Fixed(when="before", updates=0), EBQM(initial="all", updates=0)):
        with pytest.warns(UserWarning, match=f"{type(policy).__name__} never decides in 8 epochs, so its first mask stays"): SkipController(model, policy, images, 8)
    with pytest.warns(UserWarning, match="Fixed never decides in 8 epochs, so nothing will be skipped"): SkipController(model, Fixed(when="after", updates=0), images, 8)
