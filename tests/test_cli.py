"""The command line: what it does, what it says about bad input, and how it ends."""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_suite
from conftest import dead_links, small
from small_suite import write_notebooks
from typer.testing import CliRunner

import ela_repro
from ela_repro import batch, examples, runs
from ela_repro.batch import app
from ela_repro.core import how_it_ended

HERE = Path(__file__).parent
NO_GPU = subprocess.run([sys.executable, "-c", "import torch, sys; sys.exit(torch.cuda.is_available())"]).returncode == 0


def call(*args): return CliRunner().invoke(app, [str(a) for a in args])


def environment(): return {**os.environ, "PYTHONPATH": str(HERE.parent), "COLUMNS": "200"}


@pytest.fixture(autouse=True)
def no_data(monkeypatch): monkeypatch.delenv("ELA_DATA", raising=False)


# ---- what is asked for wrongly

BAD = {
    "profile": (["reproduce", "--profile", "qick"], ["unknown profile 'qick'", "'quick'"]),
    "notebook": (["reproduce", "--only", "cifar_acuracy"], ["unknown notebook 'cifar_acuracy'", "'cifar_accuracy'"]),
    "second notebook": (["reproduce", "--only", "cifar_accuracy", "skip_patern"], ["unknown notebook 'skip_patern'", "'skip_pattern'"]),
    "second notebook, with a comma": (["reproduce", "--only", "cifar_accuracy,skip_patern"], ["unknown notebook 'skip_patern'", "'skip_pattern'"]),
    "seeds": (["reproduce", "--seeds", "2-0"], ["seeds '2-0'", "write 0-2"]),
    "device": (["reproduce", "--device", "gpu"], ["unknown device 'gpu'", "cuda"]),
    "no data": (["reproduce", "--profile", "reduced"], ["no data set 'cifar100'", "--data", "ELA_DATA"]),
    "no data, and what needs none": (["reproduce", "--profile", "reduced"], ["no data: ela-repro report --profile reduced", "Nor are these here", "imagenette"]),
    "no data to train": (["train", "--dataset", "cifar10"], ["no data set 'cifar10'", "--data"]),
    "no data folder for doctor": (["doctor", "--data", "nowhere"], ["no data folder", "nowhere"]),
    "no results folder": (["report", "--profile", "reduced"], ["no results folder", "--out", "reduced/runs"]),
    "no data folder": (["reproduce", "--profile", "reduced", "--data", "nowhere"], ["no data folder", "nowhere"]),
    "attention": (["train", "--attention", "mrla-b"], ["unknown attention 'mrla-b'", "'mrla_b'"]),
    "dataset": (["train", "--dataset", "cifar11"], ["unknown dataset 'cifar11'", "'cifar10'"]),
    "model": (["train", "--model", "resnet56"], ["unknown model 'resnet56'", "'cifar_resnet56'"]),
    "policy": (["train", "--attention", "ela", "--policy", "ebmq"], ["unknown policy 'ebmq'", "'ebqm'"]),
    "policy without ela": (["train", "--attention", "se", "--policy", "ebqm"], ["needs attention 'ela'"]),
    "policy argument": (["train", "--attention", "ela", "--policy-args", "roh=0.5"], ["'roh'", "'rho'"]),
    "policy arguments": (["train", "--attention", "ela", "--policy-args", "rho"], ["'rho' are no list"]),
    "epochs": (["train", "--epochs", "0"], ["epochs is 0", "from 1 to"]),
    "status": (["status", "--profile", "papier"], ["unknown profile 'papier'", "'paper'"]),
    "report": (["report", "--profile", "papier"], ["unknown profile 'papier'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(case, tmp_path):
    args, words = BAD[case]
    result = call(*args, "--out", tmp_path/"results")
    assert result.exit_code == 2, result.output
    for word in words: assert word in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "Traceback" not in result.output
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # nothing was begun


@pytest.mark.parametrize("args", [["train", "--sed", "3"], ["reproduce", "--profil", "quick"], ["reproduse"], ["reproduce", "--jobs", "-1"]], ids=lambda a: " ".join(a))
def test_unknown_options_and_commands(args):
    result = call(*args)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "No such" in result.stderr or "Invalid value" in result.stderr


def test_the_version_is_told():
    told = call("--version")
    assert (told.exit_code, told.stdout) == (0, f"ela-repro {ela_repro.__version__}\n")
    assert "--version" in call("--help").stdout and call("version").exit_code == 2


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["reproduce", "train", "doctor"])
def test_cuda_that_is_not_there(command, tmp_path):
    result = call(command, "--device", "cuda", "--out", tmp_path)
    assert result.exit_code == 2 and "sees no GPU" in result.stderr and "--device cpu" in result.stderr


@pytest.mark.parametrize("command", ["reproduce", "train"])
def test_results_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path/"file").write_text("a file is no folder")
    result = call(command, "--out", tmp_path/"file"/"results")
    assert result.exit_code == 2 and "cannot write" in result.stderr and "--out" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_results_folder(tmp_path):
    tmp_path.chmod(0o555)
    result = call("reproduce", "--out", tmp_path/"results")
    assert result.exit_code == 2 and "cannot write" in result.stderr


def test_a_full_disk_is_found_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(batch.shutil, "disk_usage", lambda p: os.statvfs_result and type("U", (), {"free": 5 * 2**20})())
    result = call("reproduce", "--out", tmp_path)
    assert result.exit_code == 2 and "only 5 MiB are free" in result.stderr


def test_damaged_data_are_found_before_work(tmp_path):
    from ela_repro.data import DATASETS, mosaic_files

    folder = tmp_path/"data"/"cifar100"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        for name in [*mosaic_files(DATASETS["cifar100"], split), f"{split}_labels.npy"]: (folder/name).write_bytes(b"no picture")
    result = call("reproduce", "--profile", "reduced", "--data", tmp_path/"data", "--out", tmp_path/"results")
    assert result.exit_code == 2 and str(folder) in result.stderr, result.output
    (folder/"train_00.webp").unlink()
    result = call("reproduce", "--profile", "reduced", "--data", tmp_path/"data", "--out", tmp_path/"results")
    assert result.exit_code == 2 and "incomplete" in result.stderr and "train_00.webp" in result.stderr


def test_a_notebook_without_its_tag_is_found_before_work(tmp_path, monkeypatch):
    folder = write_notebooks(tmp_path/"nbs")
    path = folder/runs.EXPERIMENTS["skip_pattern"].notebook
    path.write_text(path.read_text().replace('"parameters"', '"lost"'))
    monkeypatch.setattr(batch, "notebooks_folder", lambda: folder)
    result = call("reproduce", "--out", tmp_path/"results")
    assert result.exit_code == 2 and "0 cells tagged 'parameters'" in result.stderr


def test_records_are_enough_to_rebuild_the_pages(suite, monkeypatch, capsys):
    "Without its data set a missing run is named, and the rest is done."
    monkeypatch.setattr("ela_repro.data.load_dataset", lambda name, *_: (_ for _ in ()).throw(batch.ElaError(f"no data set {name!r}")))
    assert batch.check_data({"cifar100"}, "") == {"cifar100": "no data set 'cifar100'"}
    small = runs.replace(runs.PROFILES["quick"], datasets=("cifar10-sample", "cifar100"), models=("cifar_resnet20",), recipes=("stable",), settings=small_suite.SETTINGS, scopes={})
    monkeypatch.setitem(runs.PROFILES, "quick", small)
    for name in ("ebqm_ablation", "matched_control", "schedule_choice", "control_replication", "position_control"): monkeypatch.setitem(runs.EXPERIMENTS, name, runs.replace(runs.EXPERIMENTS[name], variants=runs.ABLATION[:1]))
    monkeypatch.setattr(batch, "notebooks_folder", lambda: suite/"nbs")
    plan = batch.make_plan(out=suite/"results")
    half = len(plan.specs)//2
    assert len(plan.todo)*2 == len(plan.specs) and plan.left_out == plan.todo
    assert batch.train_all(plan, jobs=1) == {"cached": half, "without data": half} and batch.summary(plan, batch.train_all(plan, jobs=1), []) == 0
    out, err = capsys.readouterr()
    assert err.count("no data set 'cifar100'") == 1 and f"runs: {half} cached, {half} without data (cifar100)" in out and "no data" not in out
    store = runs.Store("quick", suite/"results")
    reference = next(runs.prerequisite(s) for s in plan.specs if s not in plan.todo and runs.prerequisite(s))
    store.path(reference).unlink()  # what was compared with it keeps its record
    assert batch.train_all(batch.make_plan(out=suite/"results"), jobs=1) == {"cached": half - 1, "without data": half + 1} and store.failure(reference) is None


def test_a_selection_without_data_is_executed_where_there_is_any_record(suite, monkeypatch, capsys):
    "As a batch of which some runs are recorded: its rows say what was not run. Without any record, or with --force, nothing would come of it."
    monkeypatch.setitem(runs.PROFILES, "quick", runs.replace(runs.PROFILES["quick"], datasets=("cifar100",)))
    monkeypatch.setattr(batch, "notebooks_folder", lambda: suite/"nbs")
    done = call("reproduce", "--only", "cifar_accuracy", "--out", suite/"results", "--device", "cpu")
    assert done.exit_code == 0, done.output
    planned = len(runs.experiment_specs("cifar_accuracy", "quick"))
    assert done.stderr.count("no data set 'cifar100'") == 1 and "error" not in done.stderr
    assert f"0 to train, {planned} without data" in done.stdout and f"runs: {planned} without data (cifar100)" in done.stdout and "notebook cifar_accuracy  done" in done.stdout
    for args in (["--force", "--out", suite/"results"], ["--out", suite/"empty"]):
        refused = call("reproduce", "--only", "cifar_accuracy", "--device", "cpu", *args)
        assert refused.exit_code == 2 and refused.stderr.startswith("error: no data set 'cifar100'") and "notebook" not in refused.stdout


def test_a_run_waits_for_the_data_of_the_one_it_starts_from():
    [detector] = runs.experiment_specs("detection_faster_rcnn", "reduced")[:1]
    todo = runs.with_references([detector])
    assert [s.dataset for s in todo] == ["imagenette", "coco-subset"]
    assert batch.without_data(todo, {"imagenette": "no"}) == tuple(todo) and batch.without_data(todo, {"coco-subset": "no"}) == (detector,) and batch.without_data(todo, {}) == ()


def test_ways_to_absent_data_work_as_pasted(tmp_path, monkeypatch):
    import shlex

    from ela_repro import data as D

    fetched = []
    monkeypatch.setattr(D, "download_official", lambda name, root: fetched.append((name, str(root))))
    monkeypatch.chdir(tmp_path)
    (tmp_path/"empty").mkdir()
    for given in ([], ["--data", "empty"]):
        said = call("train", "--dataset", "cifar100", "--out", "results", *given).stderr
        options, line, then = shlex.split(re.search(r"\(add (--[^)]*)\)", said)[1]), re.search(r"(python -c .*?) and then", said)[1], re.search(r"and then ([^.]*)\.", said)[1]
        folder = str(tmp_path/(given or ["", "DATA"])[1])
        call("train", "--dataset", "cifar100", "--out", "results", *given, *options)
        with pytest.raises(batch.ElaError): exec(shlex.split(line)[2], {})  # the stub fetched nothing
        assert fetched == [("cifar100", folder)]*2 and then == ("give the command again" if given else "add --data DATA")
        fetched.clear()
    assert "add --data DATA to --download" in call("train", "--dataset", "cifar100", "--out", "results", "--download").stderr
    assert "ela-repro train --dataset cifar10-sample" in said and "or use 'cifar10-sample'" not in said


def test_report_says_where_it_looked(tmp_path):
    (tmp_path/"empty").mkdir()
    assert batch.check_results("reduced", tmp_path/"empty") is None and not list((tmp_path/"empty").iterdir())
    (tmp_path/"reduced"/"runs").mkdir(parents=True)
    (tmp_path/"reduced"/"runs"/"0.json").write_text("{}")
    for profile in ("reduced", "quick"):
        wrong = call("report", "--profile", profile, "--out", tmp_path/"reduced")
        assert wrong.exit_code == 2 and f"did you mean --profile reduced --out {tmp_path}?" in wrong.stderr and [p.name for p in (tmp_path/"reduced").iterdir()] == ["runs"]


def test_report_warns_where_there_is_no_record(tmp_path):
    said = call("report", "--out", tmp_path)
    assert said.exit_code == 0 and said.stderr == f"warning: no records in {tmp_path/'quick'/'runs'}: whatever rests on a run will be 'not run'. --out names the results folder\n"


def test_nothing_is_published_from_a_folder_without_records(tmp_path):
    "The README beside it would lose its results."
    (tmp_path/"README.md").write_text("<!-- results:begin -->\nwhat was found\n<!-- results:end -->\n")
    (tmp_path/"results"/"quick"/"runs").mkdir(parents=True)
    (tmp_path/"results"/"quick"/"runs"/"0.json").write_text("{}")  # quick is never published
    said = call("report", "--publish", "--out", tmp_path/"results")
    assert said.exit_code == 2 and f"nothing to publish: {tmp_path/'results'} has no record of paper or reduced" in said.stderr
    assert "what was found" in (tmp_path/"README.md").read_text() and [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["README.md", "0.json"]


def test_a_damaged_record_is_said_and_keeps_pages_from_being_published(tmp_path):
    store = runs.Store("reduced", tmp_path/"results")
    good, bad = (store.path(runs.make_spec("reduced", "plain", seed=s)) for s in (0, 1))
    for path, seed in ((good, 0), (bad, 1)): store.save(examples.example_record(runs.make_spec("reduced", "plain", seed=seed)))
    bad.write_text(bad.read_text().replace('"test_accuracy":0.', '"test_accuracy":0.9', 1))
    said = call("report", "--profile", "reduced", "--publish", "--out", tmp_path/"results")
    assert said.exit_code == 2 and "nothing is published while a record is damaged" in said.stderr and str(bad) in said.stderr
    assert not (tmp_path/"results"/"claims.md").exists() and not (tmp_path/"results"/"reduced"/"tables").exists()
    said = call("report", "--profile", "reduced", "--out", tmp_path/"results")
    assert said.exit_code == 0 and said.stderr.startswith(f"warning: {bad}") and said.stderr.count("warning:") == 1
    bad.unlink()
    said = call("report", "--profile", "reduced", "--publish", "--out", tmp_path/"results")
    assert said.exit_code == 0 and said.stdout.count("published from reduced: ") == 2 and f"no README was filled: there is none beside {tmp_path/'results'}" in said.stdout


def test_a_run_that_fails_says_why_once(tmp_path, monkeypatch):
    arguments = "train", "--out", tmp_path, "--epochs", "1", "--device", "cpu"
    monkeypatch.setattr(runs, "_worker", None)  # its process ends at once
    said = call(*arguments)
    assert said.exit_code == 1 and said.stderr.count("the process that trained it ended with code") == 1
    [note] = (tmp_path/"quick"/"runs").iterdir()
    note.with_name(note.name.replace(".failed", "")).write_text("{")  # a damaged record
    said = call(*arguments)
    assert said.exit_code == 1 and said.stderr.count(note.stem.removesuffix(".failed")) == 1
    for path in (tmp_path/"quick"/"runs").iterdir(): path.unlink()
    monkeypatch.setenv("ELA_TRAIN", "0")
    said = call(*arguments)
    assert said.exit_code == 1 and said.stderr.count("has no record yet") == 1


def test_doctor_names_every_obstacle(tmp_path):
    from ela_repro.further import FURTHER

    why, others = batch.cannot_run("reduced", str(tmp_path), "", "cpu")
    assert why == "no cifar100; no GPU (on a CPU only with --device cpu)" and others == sorted(["cifar10", "imagenette", "coco-subset", *FURTHER])
    assert batch.cannot_run("reduced", str(tmp_path), "", "cuda")[0] == "no cifar100" and batch.cannot_run("quick", str(tmp_path), "", "cpu") == ("", [])


# ---- quick answers

@pytest.mark.parametrize("command", ["list", "status", "--help"])
def test_quick_answers(command, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from ela_repro.batch import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, env=environment() | {"ELA_RESULTS": str(tmp_path)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    if command == "list": assert all(name in done.stdout for name in (*runs.EXPERIMENTS, *runs.METHODS, *runs.PROFILES))


@pytest.mark.parametrize("command", [c.callback.__name__.rstrip("_") for c in app.registered_commands])
def test_every_option_has_help(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"})
    assert shown.exit_code == 0
    for line in shown.output.split("\n"):
        if line.strip().startswith("--"): assert len(line.split()) > 2, line


def test_train_offers_every_field_of_a_spec():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "400"}).output
    for name in runs.RunSpec().to_dict(): assert name == "recipe_version" or f"--{name.replace('_', '-')}" in shown
    assert "cifar_resnet110" in shown and "MODELS" not in shown


# ---- the tiny suite, in earnest

def files(top): return {str(p.relative_to(top)): p.read_bytes() for p in sorted((top/"results").rglob("*")) if p.is_file() and "logs" not in p.parts}


def test_a_batch_trains_executes_and_reports(finished):
    top, first = finished
    assert first.returncode == 0, first.stdout + first.stderr
    folder = top/"results"/"quick"
    assert len([p for p in (folder/"runs").glob("*.json")]) == len(runs.MAIN)
    assert {p.stem for p in (folder/"notebooks").iterdir()} == set(small_suite.SHOWN)
    assert "cifar_accuracy.csv" in (folder/"index.html").read_text()  # the report came last
    assert f"{len(runs.MAIN)} done" in first.stdout and f"report: {folder/'index.html'}" in first.stdout
    assert len([x for x in first.stdout.split("\n") if "epoch 2/2" in x]) == len(runs.MAIN)  # one line an epoch
    assert "timing steps  done" in first.stdout and (folder/"step_times.json").exists()
    assert not list((folder/"checkpoints").glob("*")) and not list((folder/"logs").glob("*.ipynb"))


def test_executed_notebooks_say_nothing_of_the_machine(finished):
    top, _ = finished
    for path in (top/"results"/"quick"/"notebooks").iterdir():
        text = path.read_text()
        assert str(top) not in text and str(Path.home()) not in text and sys.prefix not in text
        stamped = json.loads(text)["metadata"]["ela_repro"]
        assert stamped["parameters"] == {"profile": "quick", "seeds": "", "device": "cpu"} and "papermill" not in json.loads(text)["metadata"]
    assert json.loads((top/"results"/"quick"/"notebooks"/"cifar_accuracy.ipynb").read_text())["cells"][-1]["outputs"][0]["text"] == [f"{len(runs.MAIN)} records in results\n"]


def test_a_second_batch_does_nothing(suite):
    before = files(suite)
    # the copy lies elsewhere, but no path is part of a fingerprint
    again = small(suite/"nbs", "reproduce", "--out", suite/"results", "--device", "cpu")
    assert again.returncode == 0 and "0 to train" in again.stdout and again.stdout.count("  cached") >= len(small_suite.SHOWN)
    assert files(suite) == before


def test_only_what_depends_on_a_change_is_done_again(suite):
    path = suite/"nbs"/runs.EXPERIMENTS["skip_pattern"].notebook
    path.write_text(path.read_text().replace("print(", "print('changed', "))
    (suite/"results"/"quick"/"tables"/"attention_similarity.csv").unlink()
    again = small(suite/"nbs", "reproduce", "--out", suite/"results", "--device", "cpu")
    assert "notebook cifar_accuracy  cached" in again.stdout
    for name in ("skip_pattern", "attention_similarity"): assert f"notebook {name}  done" in again.stdout
    assert again.returncode == 0 and (suite/"results"/"quick"/"tables"/"attention_similarity.csv").exists()


def test_status_tells_states_apart(suite):
    folder = suite/"results"/"quick"
    states = small(suite/"nbs", "status", "--out", suite/"results").stdout
    assert states.count("current") == len(small_suite.SHOWN) and "corrupt:" not in states
    assert "measurement step times (step_times.json): made; made by ela-repro reproduce --profile quick --only training_time\n" in states and "weights" not in states
    first, second, third = sorted((folder/"runs").glob("*.json"))[:3]
    first.unlink()
    second.write_text(second.read_text()[:100])
    old = json.loads(third.read_text())
    states = small(suite/"nbs", "status", "--out", suite/"results").stdout
    (folder/"step_times.json").unlink()
    assert "step times (step_times.json): not made; made by" in small(suite/"nbs", "status", "--out", suite/"results").stdout
    assert f"corrupt: {second}" in states and "Delete it" in states and "outdated" in states and old["id"] == third.stem


def test_a_damaged_record_is_named_and_left_alone(suite):
    victim = next(p for p in (suite/"results"/"quick"/"runs").glob("*.json") if '"policy":"ebqm"' in p.read_text())
    victim.write_text(victim.read_text().replace("done", "dome"))
    before = victim.read_bytes()
    result = small(suite/"nbs", "reproduce", "--only", "skip_pattern", "--out", suite/"results", "--device", "cpu")
    assert result.returncode == 1 and "corrupt" in result.stdout and "does not match its checksum" in result.stderr and "Traceback" not in result.stderr
    assert victim.read_bytes() == before


def test_failing_and_hanging_notebooks_do_not_stop_the_others(suite):
    write_notebooks(suite/"nbs", cifar_accuracy="1/0", skip_pattern="import time\ntime.sleep(600)")
    before = (suite/"results"/"quick"/"notebooks"/"cifar_accuracy.ipynb").read_bytes()
    start = time.time()
    result = small(suite/"nbs", "reproduce", "--out", suite/"results", "--device", "cpu", "--cell-timeout", 3)
    assert result.returncode == 1 and time.time() - start < 60
    assert "ZeroDivisionError: division by zero" in result.stdout
    assert "notebook skip_pattern  timeout" in result.stdout and "longer than 3 s" in result.stdout
    assert "notebook report  done" in result.stdout or "notebook report  cached" in result.stdout
    assert (suite/"results"/"quick"/"notebooks"/"cifar_accuracy.ipynb").read_bytes() == before  # the last good copy stays
    assert "ZeroDivisionError" in (suite/"results"/"quick"/"logs"/"cifar_accuracy.ipynb").read_text()
    states = small(suite/"nbs", "status", "--out", suite/"results").stdout
    assert "failed" in states and "timeout" in states


def test_a_failed_run_costs_itself_only(tmp_path):
    nbs = write_notebooks(tmp_path/"nbs")
    (nbs/"settings.json").write_text(json.dumps({"train_images": 5000}))  # more than the sample has: known when the data are loaded
    result = small(nbs, "reproduce", "--only", "skip_pattern", "--out", tmp_path/"results", "--device", "cpu")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "2 failed" in result.stdout and "5000 images an epoch were asked for" in result.stdout


def test_a_diverged_run_is_a_result(tmp_path):
    nbs = write_notebooks(tmp_path/"nbs")
    (nbs/"settings.json").write_text(json.dumps({"lr": 100.0, "momentum": 1.0, "train_images": 256}))
    result = small(nbs, "reproduce", "--only", "skip_pattern", "--out", tmp_path/"results", "--device", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "diverged" in result.stdout


def test_train_writes_a_record_and_says_where(tmp_path):
    args = ["train", "--attention", "ela", "--seed", "7", "--out", tmp_path/"results", "--device", "cpu"]
    nbs = write_notebooks(tmp_path/"nbs")
    done = small(nbs, *args)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().split("\n")
    path = Path(lines[-1].split("  ")[-1])
    assert len(lines) == 3 and "done" in lines[-1] and json.loads(path.read_text())["spec"]["seed"] == 7
    assert json.loads(path.read_text())["spec"]["policy"] == "ebqm"
    before = path.read_bytes()
    again = small(nbs, *args)
    assert again.returncode == 0 and path.read_bytes() == before and "done before (--force trains it again" in again.stdout
    assert "no notebook of this profile asks for it (seed 7); it is kept" in small(nbs, "status", "--out", tmp_path/"results").stdout


def test_bars_in_a_terminal(suite):
    import pty

    next(p for p in (suite/"results"/"quick"/"runs").glob("*.json") if '"attention":"se"' in p.read_text()).unlink()
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, HERE/"small_suite.py", suite/"nbs", "reproduce", "--out", suite/"results", "--device", "cpu"],
                               stdout=theirs, stderr=theirs, stdin=theirs, env=environment() | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try: part = os.read(ours, 65536)
        except OSError: break
        if not part: break
        shown += part
    assert process.wait(60) == 0
    text = shown.decode(errors="replace")
    assert "all runs" in text and "1/1" in text and "epoch 1/2" not in text and "Traceback" not in text


def test_doctor(tmp_path):
    done = small(write_notebooks(tmp_path/"nbs"), "doctor", "--out", tmp_path/"results", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for word in ("Python", "PyTorch", "GPU", "cores", "GiB free", "cifar10-sample", "quick", "from a step timed now"): assert word in done.stdout


# ---- the real notebooks

def test_the_real_notebooks_through_the_batch(tmp_path):
    "Made-up records for every run of the quick profile: nothing is trained, all notebooks are executed, the page is whole."
    from ela_repro.core import write_json
    from ela_repro.examples import example_session, save_examples
    from ela_repro.timing import session_path

    store = save_examples(tmp_path/"results", "quick", None, tuple(runs.EXPERIMENTS))
    write_json(session_path(store), example_session(store.records()[0]), sealed=True)
    command = [sys.executable, "-c", "from ela_repro.batch import main; main()", "reproduce", "--out", str(tmp_path/"results")]
    first = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "0 to train" in first.stdout and len(re.findall(r"^notebook \w+  done", first.stdout, re.M)) == len(runs.EXPERIMENTS)
    folder = tmp_path/"results"/"quick"
    tables, figures = {p.suffix for p in (folder/"tables").iterdir()}, {p.suffix for p in (folder/"figures").iterdir()}
    assert {".csv", ".md", ".tex"} <= tables and {".png", ".svg"} <= figures
    page = (folder/"index.html").read_text()
    assert "<table" in page and re.search(r"<img src=\"figures/\w+\.svg\"", page)
    for path in (folder/"notebooks").iterdir():
        assert "image/png" not in path.read_text() and path.stat().st_size < 200_000
        for place in (str(tmp_path), str(HERE.parent), str(Path.home()), sys.prefix): assert place not in path.read_text(), path.name
        assert dead_links(path) == [], path.name
    assert dead_links(folder/"index.html") == dead_links(folder/"claims.md") == []
    second = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert second.returncode == 0 and "done" not in second.stdout
    texts = lambda: {p.name: p.read_bytes() for p in (*(folder/"tables").iterdir(), folder/"claims.md", folder/"index.html")}
    before = texts()
    shutil.rmtree(folder/"tables")
    assert small_report(tmp_path/"results") == 0 and texts() == before, "the report makes every table again, byte for byte"


def small_report(out) -> int:
    "`ela-repro report`, as on a machine that has executed no notebook."
    return subprocess.run([sys.executable, "-c", "from ela_repro.batch import main; main()", "report", "--out", str(out)], env=environment()).returncode


def test_days_of_training_do_not_start_on_a_cpu_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "check_data", lambda *args: {})
    monkeypatch.setattr(batch, "resolve_device", lambda name: "cpu")
    planned = len({s for e in runs.EXPERIMENTS for s in runs.experiment_specs(e, "reduced")})
    with pytest.raises(batch.ElaError, match=f"{planned} runs to train.*--device cpu"): batch.make_plan("reduced", out=tmp_path)
    assert len(batch.make_plan("reduced", out=tmp_path, device="cpu").todo) == planned


@pytest.mark.parametrize("profile, device, sees, falls", [("reduced", "auto", "cpu", True), ("reduced", "auto", "cuda", False), ("reduced", "cpu", "cpu", False), ("quick", "auto", "cpu", False)])
def test_what_falls_to_a_cpu_is_decided_once(profile, device, sees, falls, tmp_path, monkeypatch):
    "By training, the steps and the networks without a retrieval alike."
    from ela_repro.examples import save_examples

    monkeypatch.setattr(batch, "resolve_device", lambda name: sees)
    monkeypatch.setattr(batch, "_measure", lambda name, *args, **kw: batch.Outcome(name, "done"))
    save_examples(tmp_path, profile, None, ("training_time", "left_out"))
    plan = batch.Plan(profile, ("training_time", "left_out"), (), tmp_path, device=device)
    if profile != "quick":
        [skipped] = batch.measure_networks(plan)
        assert skipped.status == "skipped" and "no cifar100 here" in skipped.message
    monkeypatch.setattr(batch, "missing_sets", lambda names, data: {})
    assert batch.falls_to_cpu(profile, device) == falls
    assert [o.status for o in batch.time_steps(plan) + batch.measure_networks(plan)] == [{True: "skipped", False: "done"}[falls]]*2
    if falls:
        with pytest.raises(batch.ElaError, match=f"ela-repro report --profile {profile}"): batch.check_gpu(profile, device, [1])
    else: batch.check_gpu(profile, device, [1])


def test_a_page_depends_on_what_was_measured(tmp_path):
    def marks(): return {j.name: batch.fingerprint(j) for j in batch.notebook_jobs(batch.Plan("quick", ("method_cost", "training_time", "speed", "left_out", "report"), (), tmp_path))}
    store, before = runs.Store("quick", tmp_path), marks()
    for name, users in (("left_out", {"left_out"}), ("speed", {"speed"}), ("step times", {"training_time"}), ("costs", set())):
        store.measured(name).parent.mkdir(exist_ok=True)
        store.measured(name).write_text("{}")
        after = marks()
        assert {n for n in after if after[n] != before[n]} == users | {"report"}, name
        before = after


@pytest.mark.parametrize("code, says", [(0, "code 0"), (3, "code 3"), (-9, "(SIGKILL: killed, often for want of memory"), (-11, "(SIGSEGV: a library crashed"), (-6, "(SIGABRT: a library crashed"), (-99, "code -99 (an unknown signal")])
def test_how_a_process_ended_is_said_of_its_own_code(code, says):
    assert says in how_it_ended(code) and ("memory" in how_it_ended(code)) == (code == -9)


@pytest.mark.parametrize("dataset, model", [("imagenette", "resnet50"), ("imagenet", "resnet50"), ("cifar100", "cifar_resnet56"), ("cifar10-sample", "cifar_resnet56")])
def test_photographs_are_trained_on_their_network_unless_another_is_named(dataset, model):
    assert batch.spec_for("quick", {"dataset": dataset}).model == model and batch.spec_for("quick", {"dataset": dataset, "model": "cifar_resnet20"}).model == "cifar_resnet20"
