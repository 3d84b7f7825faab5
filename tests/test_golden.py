"""The numbers of three training steps of every method, in float64, and the defaults that a spec leaves unsaid: they may change only together with RECIPE_VERSION.

`python tests/test_golden.py` writes golden.json anew; it refuses while the version that is there has other numbers."""
import inspect
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ela_repro.divergence import divergence
from ela_repro.ela import SkipController
from ela_repro.engine import PROBE_IMAGES, TrainSettings, TrainStep, learning_rate
from ela_repro.policy import EBQM, POLICIES, REPLAYING, Policy
from ela_repro.resnet import create_model
from ela_repro.runs import LAYER_ATTENTIONS, METHODS, RECIPE_VERSION, RECIPES, SKIP_MODES

GOLDEN = Path(__file__).with_name("golden.json")
FULL = "cifar_basic_resnet20"
MODELS = {"cifar_resnet20": 0.25, "cifar_basic_resnet20": 1.0}  # name -> width: SE cannot squeeze fewer than 16 channels
STEPS = 3
REMEDY = "if this change of numbers is intended, raise RECIPE_VERSION in nbs/09_runs.ipynb and regenerate with `python tests/test_golden.py`; if not, it is a bug"


def cases():
    "Model, method, recipe and skip mode, where a method knows them. The bottleneck net has two layers a stage: its modes and controls are alike."
    for model, method in itertools.product(MODELS, METHODS.values()):
        recipes = RECIPES if method.attention in LAYER_ATTENTIONS else ("stable",)
        modes = SKIP_MODES if method.attention == "ela" and model == FULL else SKIP_MODES[:1]
        if model == FULL or method.policy not in REPLAYING: yield from ((model, method.key, *switches) for switches in itertools.product(recipes, modes))


def build(model, method, recipe, skip, policy):
    "A narrow network in float64; weights of that type from the start, because float32 draws differ between processors."
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    width = f"match:{method.matches}:{MODELS[model]}" if method.matches else MODELS[model]
    try: return create_model(model, 10, method.attention, policy, skip, recipe, width=width, drop_path=0.0)  # the draws of drop-path differ between builds
    finally: torch.set_default_dtype(torch.float32)


def policy_of(case, results):
    "EBQM with its defaults but deciding after every step, or the replay of the run with the same recipe and mode; None for the others."
    model, method, recipe, skip = case
    if method == "ela": return EBQM(warmup=0.0, freeze=0.0, updates=None)
    if method in REPLAYING: return POLICIES[method]([{"epoch": i, "mask": m} for i, m in enumerate(results[name(model, "ela", recipe, skip)]["masks"])])


def name(*case): return "-".join(case)


def train(case, results):
    "Losses of the engine's own steps, computed in float64 from their logits, and the masks in between."
    model = build(case[0], METHODS[case[1]], *case[2:], policy_of(case, results))
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.rand(STEPS, 6, 3, 12, 12, generator=draw, dtype=torch.float64) - 0.5, torch.arange(18).view(STEPS, 6) % 10
    controller = SkipController(model, model.policy, images[0], STEPS + 1) if len(model.skip_mask) else None
    settings = TrainSettings(epochs=STEPS + 1, lr=0.01)  # a gentle step: the engine takes the loss in float32, whose rounding differs between processors
    step = TrainStep(model, torch.optim.SGD(model.parameters(), learning_rate(settings, 0), settings.momentum, weight_decay=settings.weight_decay), "float32", "cpu")
    logits, losses, masks = [], [], []
    handle = model.register_forward_hook(lambda module, args, out: logits.append(out.detach()))
    for i in range(STEPS):
        model.train()
        step(images[i], labels[i])
        losses.append(F.cross_entropy(logits[-1], labels[i]).item())
        if controller: masks.append(controller.after_epoch(i)["mask"])
    handle.remove()
    return {"losses": losses, "masks": masks}


def defaults():
    "What decides a run though its spec does not say it: a spec stores only the policy arguments that differ from these. How the weighted sum is computed (`form`) decides nothing."
    of = lambda f: {p.name: p.default for p in inspect.signature(f).parameters.values() if p.default is not p.empty}
    return {**{n: of(cls) for n, cls in POLICIES.items()}, "Policy": of(Policy), "create_model": {k: v for k, v in of(create_model).items() if k != "form"}, "divergence": of(divergence), "engine": {"PROBE_IMAGES": PROBE_IMAGES}}


def compute():
    results = {}
    for case in cases(): results[name(*case)] = train(case, results)
    return {"cases": results, "defaults": defaults()}


def difference(ours, golden):
    "What became of the golden numbers, in words; empty if all still hold. What is new beside them is no change."
    moved = [f"default {k} of {name}: {v!r} became {ours['defaults'].get(name, {}).get(k, 'nothing')!r}" for name, args in golden["defaults"].items() for k, v in args.items()
             if ours["defaults"].get(name, {}).get(k, "nothing") != v]
    return "\n".join(moved + [f"{k}: {g} became {ours['cases'].get(k)}" for k, g in golden["cases"].items() if not alike(ours["cases"].get(k), g)])


def alike(ours, golden):
    return ours is not None and ours["masks"] == golden["masks"] and all(math.isclose(a, b, rel_tol=1e-7) for a, b in zip(ours["losses"], golden["losses"], strict=True))


def read(): return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    return compute()


def test_no_number_moves_without_a_new_recipe_version(results):
    golden = read().get(str(RECIPE_VERSION))
    if golden is None: pytest.fail(f"golden.json knows no numbers of RECIPE_VERSION {RECIPE_VERSION}: {REMEDY}")
    if moved := difference(results, golden): pytest.fail(f"RECIPE_VERSION is still {RECIPE_VERSION}, but\n{moved}\n{REMEDY}")
    if results["cases"].keys() != golden["cases"].keys(): pytest.fail("there are new cases, no number has changed: `python tests/test_golden.py` adds them")


def test_the_cases_tell_methods_recipes_and_modes_apart(results):
    "Otherwise a mixed-up switch would go unnoticed. All ELA networks start as MRLA-B, so the last loss is what counts."
    last = {k: r["losses"][-1] for k, r in results["cases"].items() if k.startswith(FULL)}
    same = [(a, b) for a, b in itertools.combinations(last, 2) if math.isclose(last[a], last[b], rel_tol=2e-7)]
    assert len(last) == 37 and not same, same


if __name__ == "__main__":
    torch.set_num_threads(1)
    old, new = read().get(str(RECIPE_VERSION)), compute()
    if old is not None and difference(new, old): sys.exit(f"error: {GOLDEN.name} has other numbers for RECIPE_VERSION {RECIPE_VERSION}; raise it first (nbs/09_runs.ipynb)")
    if old is not None: new["cases"] |= old["cases"]  # what stands, stands to the last digit
    GOLDEN.write_text(json.dumps({RECIPE_VERSION: new}, indent=1) + "\n")
    print(f"{len(new['cases'])} cases written to {GOLDEN.name} for RECIPE_VERSION {RECIPE_VERSION}")
