"""Input of any kind, made by hypothesis: command lines, specs, records and what reads them. An `ElaError` or an exit code, never a traceback, a hang or half a file.

`ELA_FUZZ=10000 python -m pytest tests/test_fuzz.py` spreads that many inputs over the targets; without the variable there are a few hundred."""
import contextlib
import hashlib
import io
import json
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ela_repro import batch, runs
from ela_repro.batch import app, parse_policy_args
from ela_repro.core import CorruptFileError, ElaError, parse_seeds
from ela_repro.examples import example_record
from ela_repro.figures import similarity_table
from ela_repro.precision import detection_difference_table, detection_table, losses_figure, reading
from ela_repro.report import build_report
from ela_repro.runs import RunRecord, RunSpec, Store, make_spec
from ela_repro.tables import accuracy_table, difference_table, save_table

TOTAL = int(os.environ.get("ELA_FUZZ", 400))
tried = Counter()


def share(part: float):
    "A share of all inputs; a fixed sequence of them unless many are asked for."
    return settings(max_examples=max(1, round(TOTAL*part)), derandomize=TOTAL < 1000, deadline=20_000, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def tally():
    yield
    print("\ninputs tried: " + ", ".join(f"{n} {name}" for name, n in tried.items()))


# ---- what a person or a broken disk may write

odd = st.sampled_from(["", " ", "0", "-1", "-0", "1e400", "nan", "inf", "-inf", "9"*30, "9"*5000, "0-2", "2-0", "0,3,5-7", "٣", "½", "true", "None", "[]", "{}", "["*3000, '{"rho": NaN}', "rho=0.5", "rho=", "=", "=1",
                       "mask=0101", "../x", "/dev/null", "~", "~nobody-here", "x"*300, "a/"*300, "a\0b", "\udcff", "é\u202e\U0001f600", "\n", "\x1b[31m", "--out", "-", "--", "%s", "$HOME", "cuda:99", "cuda:²"])
words = odd | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str) | st.sampled_from([*runs.PROFILES, *runs.EXPERIMENTS, *runs.METHODS, *runs.MODELS, *runs.DATASETS, *runs.ATTENTIONS, *runs.POLICIES, *runs.RECIPES, *runs.SKIP_MODES, "cosine", "step", "bf16", "float32", "cpu", "auto"])
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6) | st.sampled_from(["\ud800", 1e308, 10**400, -1, -0.5, 0, 0.5, 1, 2, 3, "0", "1", "01", "done", "diverged"])
garbage = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)
VALID = {"profile": runs.PROFILES, "dataset": runs.DATASETS, "model": runs.MODELS, "attention": runs.ATTENTIONS, "policy": runs.POLICIES, "skip": runs.SKIP_MODES, "recipe": runs.RECIPES, "lr_schedule": runs.LR_SCHEDULES,
         "precision": runs.PRECISIONS, "only": runs.EXPERIMENTS, "device": ("cpu", "auto"), "seeds": ("0", "0-2", "3,5"), "policy_args": ("rho=0.5", "tau=null", '{"rho": 0.1}'), "data": (".",), "out": ("results", "new"),
         **dict.fromkeys(("lr", "momentum", "weight_decay"), ("0", "0.1", "1e-3")), "cell_timeout": ("0", "10"), "width": ("0.5", "1")}
FLAGS = {"train": ("force",), "reproduce": ("force",), "report": ("publish",)}
COMMON = ("profile", "out")
TAKES = {"list": (), "status": (*COMMON, "seeds"), "report": (*COMMON, "seeds"), "train": (*COMMON, "data", "device", *batch.spec_options()), "reproduce": (*COMMON, "only", "seeds", "device", "data", "jobs", "notebooks", "cell_timeout")}


@st.composite
def command_lines(draw):
    "Mostly a command with its own options, each with a value that fits it as often as not."
    command = draw(st.sampled_from([*TAKES, "train", "train", "reproduce"]))
    args = [command]
    for name in draw(st.lists(st.sampled_from(TAKES[command]), max_size=5)) if TAKES[command] else []:
        args += ["--" + name.replace("_", "-"), draw(st.one_of(*[st.sampled_from(sorted(VALID.get(name, ("1", "2", "16"))))]*3, words))]
    args += ["--" + draw(st.sampled_from(FLAGS[command]))] if command in FLAGS and draw(st.booleans()) else []
    for _ in range(draw(st.sampled_from((0, 0, 0, 0, 0, 1)))): args.insert(draw(st.integers(0, len(args))), draw(words))  # one word too many
    return args


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A working directory of its own: a generated `--out x` is a folder below it. Training, notebooks and data are stubs."
    top = tmp_path_factory.mktemp("fuzz")
    (top/"results").mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(top):
        patch.setenv("HOME", str(top))
        patch.setattr("ela_repro.core.ROOT", top)  # an empty --out must not mean the checkout's results
        for name in ("ELA_DATA", "ELA_RESULTS", "ELA_TRAIN"): patch.delenv(name, raising=False)
        patch.setattr(batch, "check_data", lambda *args: {})
        patch.setattr(batch, "train_all", lambda *args: Counter())
        patch.setattr(batch, "execute_all", lambda *args: [])
        def stub(specs, *args, **kw): return [example_record(s) for s in specs]
        patch.setattr(runs, "ensure", stub)
        yield top


@share(0.3)
@given(command_lines())
def test_command_lines(here, args):
    tried["command lines"] += 1
    args = [a if a == "/dev/null" else a.lstrip("/").replace("..", ".") for a in args]  # nothing outside the scratch folder
    args += [] if "--out" in args or args[0] not in TAKES or args[0] == "list" else ["--out", str(here/"results")]
    result = CliRunner().invoke(app, args)
    tried[f"of them exit code {result.exit_code}"] += 1
    assert result.exit_code in (0, 1, 2), (args, result.exit_code, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), (args, result.exception)
    assert "Traceback" not in result.output
    if result.exit_code == 2: assert result.stderr, args
    assert not [p for p in here.rglob(".*.part")]


@share(0.15)
@given(st.dictionaries(st.sampled_from(sorted(RunSpec().to_dict())) | st.text(max_size=4), garbage | words, max_size=4), st.booleans())
def test_specs(changes, whole):
    tried["specs"] += 1
    try: spec = RunSpec.from_dict({**RunSpec().to_dict(), **changes} if whole else changes)
    except ElaError: return
    assert RunSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec and len(spec.id) == 16


@share(0.05)
@given(garbage)
def test_a_spec_of_anything(value):
    tried["specs of anything"] += 1
    with contextlib.suppress(ElaError): RunSpec.from_dict(value)


@share(0.1)
@given(words | st.text("0123456789,- ", max_size=12))
def test_seeds(text):
    tried["seeds"] += 1
    try: seeds = parse_seeds(text)
    except ElaError as e: assert "seeds" in str(e) and len(str(e)) < 300
    else: assert list(seeds) == sorted(set(seeds)) and 0 < len(seeds) <= 1000


@share(0.1)
@given(words | st.text('{}[]"=,.:rho 0519', max_size=20))
def test_policy_arguments(text):
    tried["policy arguments"] += 1
    try: args = parse_policy_args(text)
    except ElaError: return
    with contextlib.suppress(ElaError): RunSpec(attention="ela", policy="ebqm", policy_args=args)


# ---- records: sealed anew after every change, so that only their content can give them away

SPECS = [make_spec("quick", m, epochs=4) for m in ("ela", "matched_random", "mrla_b", "plain")]
DETECTORS = runs.experiment_specs("detection_mask_rcnn", "quick")
SOUND = [example_record(s) for s in SPECS] + [example_record(SPECS[2], "diverged")] + [example_record(DETECTORS[0]), example_record(DETECTORS[1]), example_record(DETECTORS[0], "diverged")]


def places(obj, at=()):
    "The path of every value in `obj`."
    yield at
    for key, value in obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, list) else (): yield from places(value, (*at, key))


@st.composite
def mutants(draw):
    "A record's JSON with one to three values dropped, replaced, doubled or added."
    obj = json.loads(json.dumps(draw(st.sampled_from(SOUND)).to_json()))
    for _ in range(draw(st.integers(1, 3))):
        depth = draw(st.integers(1, 5))  # first how deep: most values lie in `rows`
        at = draw(st.sampled_from([p for p in places(obj) if 0 < len(p) <= depth]))
        inside = obj
        for key in at[:-1]: inside = inside[key]
        change = draw(st.sampled_from(("drop", "replace", "replace", "add", "double")))
        if change == "drop": del inside[at[-1]]
        elif change == "replace": inside[at[-1]] = draw(garbage)
        elif isinstance(inside, dict): inside[draw(st.text(max_size=5))] = draw(garbage)
        elif change == "double": inside.append(inside[at[-1]])
        else: inside.insert(at[-1], draw(garbage))
        if not isinstance(obj, dict) or not obj: break
    return obj


def sealed(obj) -> bytes:
    seal = hashlib.sha256(json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**obj, "sha256": seal}).encode()


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    "A store with one place for a record, and everything that reads it."
    top = tmp_path_factory.mktemp("records")
    store = Store("quick", top)
    store.runs.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "notebook_states", lambda *args: dict.fromkeys(runs.EXPERIMENTS, "current"))  # about notebooks; the rest of `status` reads records
        def read_all():
            records, problems = store.records()
            if not records: return problems
            plan = [r.spec for r in records]
            if records[0].spec.detector:
                for table in (detection_table(records, plan, "quick", store), detection_difference_table(records, [*plan, *DETECTORS], "quick")): save_table(table, top/"scratch")
                losses_figure(records, plan), reading(records, plan, "quick")
            else:
                save_table(accuracy_table(records, plan, "quick", store), top/"scratch")
                save_table(difference_table(records, [*plan, *SPECS], "quick"), top/"scratch")
            if all(r.rows for r in records if r.status == "done"): save_table(similarity_table([r for r in records if r.rows], [r.spec for r in records if r.rows], "quick"), top/"scratch")
            patch.setattr("ela_repro.report.plan_of", lambda *args: plan)
            build_report("quick", top)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                result = CliRunner().invoke(app, ["status", "--out", str(top)])
            assert result.exit_code == 0, (said.getvalue(), result.output, result.exception)
            batch.describe(records[0].final)
            batch.recorded_seconds("quick", str(top), "cpu")
            return problems
        yield store, read_all


@share(0.25)
@given(mutants())
def test_sealed_records_of_the_wrong_shape(readers, obj):
    tried["sealed records"] += 1
    store, read_all = readers
    for old in store.runs.glob("*.json"): old.unlink()
    id = obj.get("id")
    path = store.runs/(f"{id}.json" if isinstance(id, str) and id.isalnum() and id.isascii() and len(id) < 50 else "some.json")
    path.write_bytes(sealed(obj))
    try: record = store.read(path)
    except CorruptFileError as e:
        assert str(path) in str(e)
        problems = read_all()
        assert len(problems) == 1
        return
    assert read_all() == [] and RunRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    tried["of them accepted and read by everything"] += 1


@share(0.05)
@given(st.sampled_from(SOUND), st.data())
def test_records_with_changed_text(readers, record, data):
    "The bytes of a sealed record with a piece replaced: refused, or the same record."
    tried["changed bytes"] += 1
    store, _ = readers
    for old in store.runs.glob("*.json"): old.unlink()
    path = store.save(record)
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=8)) + content[start + data.draw(st.integers(0, 8)):])
    with contextlib.suppress(CorruptFileError): assert store.read(path) == record


def test_a_policy_argument_is_given_once():
    assert parse_policy_args("rho=0.3, ema=0.4,") == {"rho": 0.3, "ema": 0.4}
    with pytest.raises(ElaError, match="give rho more than once"): parse_policy_args("rho=0.3,rho=0.4")
