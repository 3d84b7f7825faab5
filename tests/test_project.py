"""The package is what the notebooks export, the notebooks are clean, and the files around them say what is true."""
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from conftest import dead_links
from ela_repro.batch import Job, app, notebook_parameters, relink
from ela_repro.core import python_call
from ela_repro.data import DATASETS, fetch_call
from ela_repro.further import FURTHER, download_call
from ela_repro.runs import EXPERIMENTS, METHODS, PROFILES

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"))
NOTEBOOKS = [p for p in NOTEBOOKS if ".ipynb_checkpoints" not in p.parts]
EXPERIMENT_PATHS = [ROOT/"nbs"/e.notebook for e in EXPERIMENTS.values()]


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned there: what the checkout should look like."
    pytest.importorskip("nbdev")
    copy = tmp_path_factory.mktemp("fresh")
    shutil.copy(ROOT/"settings.ini", copy)
    shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for command in ("export", "clean"):
        done = subprocess.run([Path(sys.executable).with_name(f"nbdev_{command}")], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def test_package_is_the_export(fresh):
    theirs, ours = ({p.relative_to(top/"ela_repro").as_posix(): p.read_text() for p in (top/"ela_repro").rglob("*.py")} for top in (fresh, ROOT))
    assert sorted(ours) == sorted(theirs), "a module without a notebook, or a notebook without its module: nbdev_export, and delete what is left over"
    assert [n for n in ours if ours[n] != theirs[n]] == [], "edited modules: carry the change to the notebook, then nbdev_export"


def test_notebooks_are_clean(fresh):
    unclean = [p.name for p in NOTEBOOKS if p.read_text() != (fresh/p.relative_to(ROOT)).read_text()]
    assert unclean == [], "run nbdev_clean"


@pytest.mark.parametrize("path", EXPERIMENT_PATHS, ids=lambda p: p.stem)
def test_experiment_notebooks_take_their_parameters(path):
    defaults = notebook_parameters(path)  # raises unless one cell is tagged
    assert defaults == {"profile": "quick", "seeds": "", "out": "", "data": "", "device": "auto"}
    cell = next(c for c in cells(path) if "parameters" in c["metadata"].get("tags", []))
    for line in filter(None, source(cell).split("\n")): assert re.match(r"\w+: \w+ = .+ # .+|#\|.*", line), f"type, default and comment are missing: {line}"


def test_papermill_reads_the_same_parameters():
    papermill = pytest.importorskip("papermill")
    for path in EXPERIMENT_PATHS: assert list(papermill.inspect_notebook(str(path))) == list(notebook_parameters(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_read_as_pages(path):
    first, ids = cells(path)[0], [c["id"] for c in cells(path)]
    assert first["cell_type"] == "markdown" and re.match(r"# .+\n\n> .+", source(first)), "a title and a one-line subtitle"
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", i) for i in ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_directives_come_first(path):
    "nbdev reads a directive only at the top of a cell; below another line it is silently ignored."
    for cell in cells(path):
        if cell["cell_type"] != "code": continue
        lines = source(cell).split("\n")
        body = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
        assert not any(line.startswith("#|") for line in lines[body:]), f"{path.name}: {cell['id']}"


def test_no_path_of_a_machine_is_committed():
    "Neither notebooks nor results nor prose name a folder below somebody's home."
    texts = [*NOTEBOOKS, *ROOT.glob("*.md"), *(ROOT/"ela_repro").glob("*.py"), *(ROOT/"results").glob("*.md")]
    texts += [p for profile in ("reduced", "paper") for p in (ROOT/"results"/profile).rglob("*") if p.suffix in (".ipynb", ".json", ".md", ".html", ".csv")]
    for path in texts: assert not re.search(r"(?<![\w.~])(/home/\w+|/Users/\w+|/root/|/tmp/\w)", path.read_text(encoding="utf-8")), path


# ---- links

PAGES = [p for p in (ROOT/"README.md", *(ROOT/"results").glob("*.md"), *(ROOT/"results").glob("*/index.html"), *(ROOT/"results").glob("*/claims.md")) if p.parent.name != "quick"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_of_committed_pages_lead_somewhere(path): assert dead_links(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_notebooks_lead_somewhere(path):
    dead, prose = dead_links(path), "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")
    assert dead == [] and "href=" not in prose, "a link is written in Markdown: those of an executed page are made from it"


@pytest.mark.parametrize("e", EXPERIMENTS.values(), ids=lambda e: e.name)
def test_links_of_executed_pages_lead_somewhere(e, tmp_path):
    "In the checkout to an executed page or to the notebook; elsewhere no path is written."
    prose = "\n\n".join(source(c) for c in cells(ROOT/"nbs"/e.notebook) if c["cell_type"] == "markdown")
    asked = re.findall(r"\]\((\w+\.ipynb)\)", prose)
    inside, outside = (Job(e.name, str(ROOT/"nbs"/e.notebook), str(folder)) for folder in (ROOT/"results"/"reduced", tmp_path/"reduced"))
    led = re.findall(r"\]\(([\w./]+\.ipynb)\)", relink(prose, inside))
    assert len(led) == len(asked) and all((inside.output.parent/link).exists() for link in led)
    assert ".ipynb" not in relink(prose, outside) and str(ROOT) not in relink(prose, inside) + relink(prose, outside)


def test_a_link_leads_to_the_executed_page_once_there_is_one(tmp_path):
    job = Job("control_replication", str(ROOT/"nbs"/"64_control_replication.ipynb"), str(tmp_path/"reduced"))
    text = "In [it](24_matched_control.ipynb#rule) and [this](65_left_out.ipynb); $[a](b)$, [up](#x), [out](https://arxiv.org/abs/1)"
    assert relink(text, job) == "In it and this; $[a](b)$, [up](#x), [out](https://arxiv.org/abs/1)"
    job.output.parent.mkdir(parents=True)
    job.output.with_name("matched_control.ipynb").write_text("")
    assert relink(text, job).startswith("In [it](matched_control.ipynb#rule) and this;")


# ---- commands that the package tells people to give

COMMAND = re.compile(r"ela-repro ([a-z]+)((?: --[a-z][a-z-]*(?: (?!--)[\w.,={}-]*[\w}])*)*)")


def told(path):
    "Strings of a module without its docstrings; what is filled in stands as its source in braces."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and n.body and isinstance(n.body[0], ast.Expr)}
    inner = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for n in ast.walk(tree):
        if isinstance(n, ast.JoinedStr): yield "".join(v.value if isinstance(v, ast.Constant) else "{" + re.sub(r"\W", "", ast.unparse(v.value)) + "}" for v in n.values)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in words | inner: yield n.value


def check_command(name, options):
    "Parse it as the program would; the values of --profile and --only must exist."
    import typer

    given = re.sub(r"\{options\w*\}", "", options)
    given = re.sub(r"(--profile) \{\w+\}", r"\1 reduced", given)
    given = re.sub(r"\{experiment\}", "speed", given).split()
    group = typer.main.get_command(app)
    assert name in group.commands, f"ela-repro {name}"
    body = group.commands[name]
    with body.make_context(name, [*given]) as context: values = context.params
    if "profile" in values: assert values["profile"] in PROFILES, given
    for only in (*(values.get("only") or ()), *(values.get("more") or ())): assert only in EXPERIMENTS, given
    return values


@pytest.mark.parametrize("path", sorted((ROOT/"ela_repro").glob("*.py")), ids=lambda p: p.stem)
def test_commands_in_messages_are_commands(path):
    for text in told(path):
        for name, options in COMMAND.findall(text):
            check_command(name, options)
            assert name != "reproduce" or "--profile" in options, f"which profile? {text}"


def test_commands_in_made_tables_and_pages_are_commands(tmp_path):
    "What stands in remarks and captions, with everything filled in, where nothing has been run."
    from ela_repro import report

    seen = set()
    for profile in PROFILES:
        paths = [*report.rebuild_tables(profile, tmp_path), report.build_report(profile, tmp_path), tmp_path/profile/"claims.md"]
        report.publish(tmp_path)
        for path in (*paths, tmp_path/"claims.md", tmp_path/"README.md"):
            if path.suffix not in (".md", ".html"): continue
            for name, options in COMMAND.findall(path.read_text(encoding="utf-8").replace("\\_", "_")):
                if (name, options) not in seen: check_command(name, options)
                seen.add((name, options))
    assert {f" --profile {p} --only {e}" for p in PROFILES for e in ("left_out", "method_cost", "speed")} <= {o for _, o in seen} and len(seen) > 20


def test_lines_of_python_are_python():
    "Each that downloads a data set is a line for the shell, and what it imports is there."
    for root in ("DATA", "/a folder/with 'quotes'", '/with "both" kinds/$HOME'):
        for line in (*(download_call(n, root) for n in FURTHER), *(fetch_call(n, root) for n in DATASETS)):
            python, c, code = shlex.split(line)
            assert (python, c) == ("python", "-c")
            tree = ast.parse(code)
            assert isinstance(tree.body[0], ast.ImportFrom) and hasattr(importlib.import_module(tree.body[0].module), tree.body[0].names[0].name)
            assert root in [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    done = subprocess.run(python_call("print('$HOME', \"it's\")"), shell=True, capture_output=True, text=True)
    assert done.stdout == "$HOME it's\n"


def test_a_message_names_the_folder_and_the_set_as_it_is_known(tmp_path):
    from ela_repro.batch import check_data, spec_for
    from ela_repro.coco import COCO_SETS, RUN_SETS
    from ela_repro.precision import PART, WHOLE

    assert {WHOLE, PART} == set(RUN_SETS) and set(RUN_SETS.values()) == set(COCO_SETS)
    for name, folder in RUN_SETS.items():
        said = check_data({name}, str(tmp_path), download=True)[name]
        assert f"no data set {name!r}" in said and f"a folder {folder}" in said and "--download" not in said
        values = check_command(*COMMAND.search(said).groups())
        assert spec_for("quick", {k: values[k] for k in ("detector", "dataset")}).dataset == "scenes"
    for name in FURTHER: assert "--download" not in check_data({name}, str(tmp_path), download=True)[name]


def test_settings_name_what_exists():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini")
    module, function = config["DEFAULT"]["console_scripts"].split("=")[1].split(":")
    tree = ast.parse((ROOT/(module.replace(".", "/") + ".py")).read_text())
    assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert config["DEFAULT"]["allowed_cell_metadata_keys"] == "tags"  # else nbdev_clean drops papermill's tag


def test_experiments_have_notebooks():
    for e in EXPERIMENTS.values():
        assert (ROOT/"nbs"/e.notebook).is_file() and e.notebook.endswith(f"_{e.name}.ipynb")
        assert set(e.methods) <= set(METHODS)


LIGHT = ["core", "further", "policy", "runs", "timing", "speed", "examples", "stats", "tables", "ablation", "figures", "precision", "trends", "schedule", "control", "replication", "transfer", "left_out", "times", "savable", "speeds", "tradeoffs", "report", "batch"]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_do_not_load_torch(name):
    code = f"import sys, ela_repro.{name}; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_lower_layers_never_import_higher_ones():
    order = ["core", "processes", "divergence", "policy", "kernels", "layer_attention", "recurrent", "dynamic", "ela", "channel_attention", "spatial_attention", "resnet", "detectors", "cost", "further", "data", "coco", "imagenet", "engine", "detection", "runs", "timing", "speed", "examples", "pretrained",
             "stats", "tables", "ablation", "figures", "precision", "trends", "schedule", "control", "replication", "transfer", "left_out", "times", "savable", "speeds", "tradeoffs", "report", "batch"]
    for path in (ROOT/"ela_repro").glob("*.py"):
        if path.stem.startswith("_"): continue
        assert path.stem in order, f"say where {path.stem} stands in the order of the layers"
        imported = {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
        assert [m for m in imported if order.index(m) >= order.index(path.stem)] == [], path.stem


# ---- README

README = (ROOT/"README.md").read_text(encoding="utf-8")


def blocks(language): return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_readme_python_runs(tmp_path):
    code = "\n".join(blocks("python"))
    assert "create_model" in code and "set_skip_mask" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_names_every_command_profile_and_notebook():
    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert {f"ela-repro {c}" for c in commands} <= set(re.findall(r"ela-repro [a-z]+", README))
    for name in [*PROFILES, *(e.notebook for e in EXPERIMENTS.values()), *(p.name for p in NOTEBOOKS)]: assert name.removesuffix(".ipynb") in README, name


def test_readme_profile_table_counts_the_seeds():
    from ela_repro.runs import experiment_specs

    for name in PROFILES:
        cell = re.search(rf"^\| `{name}` \|.*", README, re.M)[0].split(" | ")[3]
        planned = [len({s.seed for s in experiment_specs(e, name)}) for e in ("cifar_accuracy", "other_datasets", "detection_faster_rcnn")]
        assert [int(n) for n in re.findall(r"(?:^|; )(\d+)", cell)] == (planned if len(set(planned)) > 1 else planned[:1]), name
    seeds = {e: len({s.seed for s in experiment_specs(e, "reduced")}) for e in EXPERIMENTS}
    assert [seeds[e] for e in ("ebqm_ablation", "training_time", "ebqm_overhead", "attention_similarity", "accuracy_vs_parameters", "schedule_choice", "left_out", "control_replication", "position_control")] == [3, 3, 3, 3, 6, 2, 4, 10, 10]


def test_readme_hours_follow_from_the_measured_rates():
    from ela_repro.batch import measured_speed
    from ela_repro.runs import experiment_specs
    from ela_repro.speed import rate_on_photographs
    from ela_repro.speeds import coco_hours
    from ela_repro.timing import steps_per_epoch

    specs, speed = experiment_specs("imagenet_accuracy", "paper"), measured_speed("reduced", str(ROOT/"results"))
    hours = sum(s.epochs*steps_per_epoch(s)*s.batch_size/rate_on_photographs(speed, s, 224) for s in specs)/3600
    runs, told = re.search(r"The ImageNet table of `paper`, (\d+) runs, takes about ([\d,]+) GPU-hours", README).groups()
    assert int(runs) == len(specs) and float(told.replace(",", "")) == pytest.approx(hours, rel=0.05)
    if "detectors" in speed:
        runs, told = re.search(r"The tables of COCO, (\d+) runs, take about ([\d,]+) GPU-hours", README).groups()
        assert (int(runs), float(told.replace(",", ""))) == (coco_hours(speed)[0], pytest.approx(coco_hours(speed)[2], rel=0.05)) and "no step has been measured" not in README
    else: assert "For COCO no step has been measured yet" in README
    assert f"Two GPUs trained a ResNet-50 {re.search(r'plain .*?([0-9.]+) [|]$', (ROOT/'results/reduced/tables/speed_two_gpus.md').read_text(), re.M)[1]} times as fast as one" in README


def test_readme_commands_exist():
    "Each `make x` and each option that the README shows is one."
    from typer.testing import CliRunner

    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT/"Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("sh")), re.M)) <= targets
    for line in re.findall(r"ela-repro ([a-z]+)([^\n`|]*)", README):
        shown = CliRunner().invoke(app, [line[0], "--help"], env={"COLUMNS": "300"}).output
        for option in re.findall(r"--[a-z-]+", line[1].split("#")[0]): assert option in shown, line


def test_readme_has_room_for_results():
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1
    assert "reconstruction" in README


def test_lock_is_plain_constraints():
    lines = [x for x in (ROOT/"requirements.lock").read_text().split("\n") if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", x) for x in lines), "no addresses, paths or editable lines"
    assert not [x for x in lines if x.startswith(("nvidia-", "triton", "cuda-", "ela"))]
    names = {x.split("==")[0].lower().replace("_", "-") for x in lines}
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini")
    asked = re.split(r"\s+", config["DEFAULT"]["requirements"] + " " + config["DEFAULT"]["dev_requirements"])
    assert {re.split(r"[<>=]", a)[0].lower().replace("_", "-") for a in asked} <= names | {"setuptools"}
