"""What a method costs is counted right: against formulas and counts by hand, on small and on real networks."""
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ela_repro import resnet
from ela_repro.channel_attention import EfficientChannelAttention
from ela_repro.core import ElaError
from ela_repro.cost import OperatorCounter, SavedForBackward, cost_rows, measurable, measure_cost, skip_modes
from ela_repro.resnet import ATTENTIONS, Backbone, BasicBlock, create_model

# batch 3, 32x32, plain, 100 classes: width 16 in three stages of one basic block
TINY = Backbone(BasicBlock, (1, 1, 1), (16, 32, 64), {a: {"head_width": 16} for a in ("mrla_b", "ela", "mrla_l")}, (32, 16, 8))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(resnet.MODELS, "tiny", TINY)
    return "tiny"


def cost(*args, batch=3, device="cpu", size=32, **kw):
    with torch.device(device): return measure_cost(create_model(*args, **kw), torch.zeros(batch, 3, size, size))


def test_parameters_to_the_unit():
    found = cost_rows(["cifar_resnet20", "cifar_basic_resnet20"], (None, "se", "eca", "mrla_b", "mrla_l", "ela"))
    rows, matched = {(r["network"], r["attention"], r["skip"]): r for r in found if not r["matches"]}, {r["network"]: r for r in found if r["matches"]}
    assert [rows["cifar_resnet20", a, None]["parameters"] for a in (None, "se", "eca", "mrla_b", "mrla_l")] == [243_508, 265_012, 243_534, 253_416, 254_312]
    assert [rows["cifar_basic_resnet20", a, None]["added"] for a in (None, "se", "eca", "mrla_b", "mrla_l")] == [0, 2_016, 27, 3_750, 4_086]
    for mode in ("retrieval", "module", "reuse"): assert rows["cifar_resnet20", "ela", mode]["added"] == 9_908
    assert {n: r["matches"] for n, r in matched.items()} == dict.fromkeys(("cifar_resnet20", "cifar_basic_resnet20"), "dia")
    assert abs(matched["cifar_resnet20"]["parameters"]/(243_508 + 218_848) - 1) < 0.015 and abs(matched["cifar_basic_resnet20"]["parameters"]/(278_324 + 14_392) - 1) < 0.015


def test_macs_by_hand(tiny):
    "3x3 convolutions, 1x1 shortcuts where the width changes, the classifier; batch norm and relu are no MACs."
    maps = {16: 32*32, 32: 16*16, 64: 8*8}
    convolutions = [(3, 16, 9), (16, 16, 9), (16, 16, 9), (16, 32, 9), (32, 32, 9), (16, 32, 1), (32, 64, 9), (64, 64, 9), (32, 64, 1)]
    plain = sum(c_in*c_out*k*maps[c_out] for c_in, c_out, k in convolutions) + 64*100
    assert cost(tiny).macs == plain
    depthwise = sum(9*c*maps[c] for c in maps)
    weights = sum(c + 2*c*k for c, k in ((16, 3), (32, 3), (64, 3)))  # q.k for each head; two 1-D convolutions
    for form in ("list", "concat"): assert cost(tiny, attention="mrla_b", form=form).macs == plain + depthwise + weights  # one value: no sum to weigh


def test_memory_by_hand(tiny):
    "Images; inputs of convolutions and batch norms, each relu once; what the classifier and the loss read."
    a, b, c = 16*32*32, 32*16*16, 64*8*8
    stem = 3*32*32 + a + a                       # images, input of the norm, the relu's output
    first = 4*a                                  # conv1, relu, conv2, relu of the sum; the stem's relu is there already
    second, third = 5*b, 5*c                     # and the shortcut's convolution, read by its norm
    head = 64 + 100                              # pooled features, log-probabilities
    assert cost(tiny).saved_bytes == 4*(stem + first + second + third + head) + 8  # the label is an int64


def test_a_storage_counts_once_and_no_parameter_counts():
    w = nn.Parameter(torch.randn(4, 5))
    x = torch.randn(3, 4, requires_grad=True)
    with SavedForBackward() as saved: x.exp().t().t().matmul(w).sum() + (x * x).sum()  # exp's output twice, once as a view; x twice
    assert saved.image_bytes(3, [w]) == 4*4 + 4*4
    assert saved.image_bytes(3, []) == 4*4 + 4*4, "80 bytes of the weight are no three parts"
    assert saved.image_bytes(5, []) == 4*4


def test_operators_leave_views_out():
    x = torch.randn(2, 3)
    with OperatorCounter() as counter:
        x.t().unsqueeze(0)[0].detach()
        assert counter.operators == 0
        torch.promote_types(x.dtype, torch.float64)
        assert counter.operators == 0
        (x + 1).relu_()
    assert (counter.operators, counter.flops) == (2, 0)


@pytest.mark.parametrize("attention, form", [(a, f) for a, f in product(ATTENTIONS, ("list", "concat")) if a in ("mrla_b", "dla_b", "ela") or f == "list"])
def test_meta_device_batch_and_repetition_change_nothing(attention, form):
    expected = cost("cifar_resnet20", attention=attention, form=form, batch=7)
    if attention != "non_local": assert cost("cifar_resnet20", attention=attention, form=form, batch=7, device="meta") == expected  # its kernel is another one there
    assert cost("cifar_resnet20", attention=attention, form=form, batch=11) == expected
    model, images = create_model("cifar_resnet20", attention=attention, form=form), torch.randn(7, 3, 32, 32)
    assert [measure_cost(model, images) for _ in range(2)] == [expected]*2  # gradients of the first step are gone in the second
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model.eval()(images[:1])
    assert counter.get_total_flops() == 2*expected.macs


def test_a_batch_that_looks_like_channels_is_refused():
    with pytest.raises(ElaError, match="take another batch size"): cost("cifar_resnet20", batch=4)


def test_list_keeps_less_and_dispatches_more():
    forms = {form: cost("cifar_resnet56", attention="mrla_b", form=form) for form in ("list", "concat")}
    assert forms["list"].saved_bytes < 0.75*forms["concat"].saved_bytes
    assert forms["list"].operators > forms["concat"].operators and forms["list"].parameters == forms["concat"].parameters
    values = sum(t*c*s for c, s in ((64, 32**2), (128, 16**2), (256, 8**2)) for t in range(2, 7))
    assert forms["concat"].macs - forms["list"].macs == values, "the weighted sum: |M| products a number, |M| = 2 ... 6"


def test_skipping_costs_less_in_order():
    rows = {(r["attention"], r["skip"]): r for r in cost_rows(["cifar_resnet20"], (None, "mrla_b", "ela"), ())}
    assert list(rows) == [(None, None), ("mrla_b", None), ("ela", None), ("ela", "retrieval"), ("ela", "module"), ("ela", "reuse")]
    whole, retrieval, module, reuse = (rows["ela", m] for m in (None, "retrieval", "module", "reuse"))
    assert {**whole, "attention": "mrla_b"} == rows["mrla_b", None]
    for key in ("saved_bytes", "saved_bytes_concat", "operators", "operators_concat"): assert module[key] < retrieval[key] < reuse[key] < whole[key]
    assert rows[None, None]["macs"] < module["macs"] < retrieval["macs"] == reuse["macs"] < whole["macs"]
    assert rows[None, None]["saved_bytes_concat"] is None


def test_what_is_registered_later_has_rows(tiny, monkeypatch):
    monkeypatch.setitem(resnet.GATES, "newcomer", EfficientChannelAttention)
    monkeypatch.setattr(resnet, "ATTENTIONS", (*ATTENTIONS, "newcomer"))
    row, = cost_rows([tiny], ["newcomer"], ())
    assert (row["attention"], row["added"], skip_modes("newcomer")) == ("newcomer", 9, (None,))


def test_counted_in_several_processes_is_counted_alike():
    asked = (["cifar_resnet20"], (None, "ela"), ("dia",))
    assert cost_rows(*asked, processes=2) == cost_rows(*asked) and cost_rows([]) == []


PUBLISHED = {"cifar_resnet20": (33.76, 36.06, 35.83), "cifar_resnet56": (87.24, 95.76, 93.46), "cifar_resnet110": (167.45, 188.76, 179.90),
             "resnet50": (4089, 4151, 4139), "resnet101": (7801,)}  # millions; plain, MRLA-B, MRLA-L


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_the_published_ones(name):
    for attention, macs in zip((None, "mrla_b", "mrla_l"), PUBLISHED[name]):
        assert measure_cost(*measurable(name, attention)).macs / 1e6 == pytest.approx(macs, rel=1e-3)
