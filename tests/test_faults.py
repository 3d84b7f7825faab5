"""What happens to a batch that is interrupted, killed, or whose notebooks misbehave: nothing that lasts."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_suite import write_notebooks

from ela_repro import batch, core, runs
from ela_repro.batch import Job

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def start(folder, *args):
    "The tiny suite in a process group of its own, as a shell would start it."
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen([sys.executable, HERE/"small_suite.py", folder, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, start_new_session=True)


def wait_for(process, words):
    "Read what the process prints until a line has `words`."
    for line in process.stdout:
        if words in line: return
    pytest.fail(f"ended without saying {words!r}: {process.stderr.read()}")


def wait_until(true, seconds=30):
    end = time.time() + seconds
    while not true() and time.time() < end: time.sleep(0.1)
    assert true()


def family(process): return psutil.Process(process.pid).children(recursive=True)
def gone(processes): return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def comparable_records(top):
    return {r.id: runs.comparable(r) for r in runs.Store("quick", top).records()[0]}


@pytest.fixture
def nbs(tmp_path): return write_notebooks(tmp_path/"nbs")


def settings(nbs, **values): (nbs/"settings.json").write_text(json.dumps(values))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_an_interrupted_training_ends_in_order(nbs, tmp_path, how):
    settings(nbs, epochs=200)
    process = start(nbs, "reproduce", "--only", "skip_pattern", "--out", tmp_path/"results", "--device", "cpu")
    wait_for(process, "epoch 1/200")
    children = family(process)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)  # a terminal interrupts the whole group
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted: finished runs are recorded" in said and "Traceback" not in said
    assert children
    wait_until(lambda: gone(children), 10)


UNHEARD = """
import os, signal, sys, threading, time
import psutil
from ela_repro import runs, timing

def rest(say): time.sleep(1)

def strike():
    while True:
        for child in psutil.Process().children(): child.send_signal(signal.SIGINT)
        time.sleep(0.005)

if __name__ == "__main__":
    threading.Thread(target=strike, daemon=True).start()
    if sys.argv[1] == "train":
        pool = runs._Pool(1, ["cpu"])
        worker = pool._new_worker("cpu").process
        worker.join(4)  # long enough to load Python and PyTorch's part of the package
        print("lives" if worker.is_alive() else f"died: {worker.exitcode}")
        pool.close()
    else: print(timing.measure_alone(rest, {}) or "lives")
"""


@pytest.mark.parametrize("what", ["train", "measure"])
def test_a_child_never_hears_ctrl_c_not_even_the_first_while_it_starts(tmp_path, what):
    script = core.write_atomic(tmp_path/"unheard.py", UNHEARD)
    said = subprocess.run([sys.executable, script, what], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(core.ROOT)})
    assert (said.stdout.strip(), said.stderr) == ("lives", "")


def hanging_batch(suite):
    "A batch whose runs are there and whose notebook hangs; returns the process and its children, a kernel among them."
    write_notebooks(suite/"nbs", skip_pattern="import time\ntime.sleep(600)")
    process = start(suite/"nbs", "reproduce", "--only", "skip_pattern", "--out", suite/"results", "--device", "cpu")
    wait_for(process, "notebook skip_pattern  …")
    wait_until(lambda: any("ipykernel_launcher" in " ".join(p.cmdline()) for p in family(process)))
    return process, family(process)


def test_an_interrupted_notebook_ends_in_order(suite):
    before = comparable_records(suite/"results")
    process, children = hanging_batch(suite)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said
    wait_until(lambda: gone(children), 10)
    assert comparable_records(suite/"results") == before


def test_the_kernel_of_a_killed_batch_ends(suite):
    process, children = hanging_batch(suite)
    process.kill()
    wait_until(lambda: gone(children), 15)


MATCHED = ("train", "--attention", "ela", "--policy", "matched_random", "--device", "cpu", "--out")  # two runs, the second replays the first


def test_killed_and_restarted_gives_the_records_of_an_undisturbed_batch(nbs, tmp_path):
    settings(nbs, epochs=6)
    process = start(nbs, *MATCHED, tmp_path/"disturbed")
    wait_for(process, "epoch 3/6")
    children = family(process)
    process.kill()
    wait_until(lambda: gone(children), 15)  # nobody goes on training for a batch that is dead
    assert len(comparable_records(tmp_path/"disturbed")) == 0
    both = [start(nbs, *MATCHED, tmp_path/top) for top in ("disturbed", "undisturbed")]
    for process in both:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
    assert len(comparable_records(tmp_path/"disturbed")) == 2
    for id, record in comparable_records(tmp_path/"undisturbed").items(): assert comparable_records(tmp_path/"disturbed")[id] == record
    times = [r.times for r in runs.Store("quick", tmp_path/"disturbed").records()[0]]
    assert any(t.get("resumed_at") for t in times)  # went on from a checkpoint, not from the start


def test_a_batch_beside_a_batch_trains_each_run_once(nbs, tmp_path):
    both = [start(nbs, *MATCHED, tmp_path/"results") for _ in range(2)]
    said = [p.communicate(timeout=600) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sum(out.count("epoch 2/2") for out, _ in said) == 2


# ---- notebooks that misbehave, as single jobs

def job(tmp_path, name, code, **kw):
    folder = write_notebooks(tmp_path/"nbs", **{name: code})
    return Job(name, str(folder/runs.EXPERIMENTS[name].notebook), str(tmp_path/"results"/"quick"), **kw)


@pytest.fixture(autouse=True)
def workers_find_the_package(monkeypatch): monkeypatch.setenv("PYTHONPATH", str(HERE.parent))


def test_a_cell_that_ignores_interrupts_is_stopped(tmp_path):
    [outcome] = batch.run_jobs([job(tmp_path, "skip_pattern", "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)", timeout=2)])
    assert outcome.status == "timeout" and outcome.seconds < 40


def test_a_kernel_that_dies_is_reported(tmp_path):
    [outcome] = batch.run_jobs([job(tmp_path, "skip_pattern", "import os\nos._exit(9)")])
    assert outcome.status == "failed" and "kernel died" in outcome.message


def test_a_worker_that_dies_is_reported(tmp_path):
    hanging = job(tmp_path, "skip_pattern", "import time\ntime.sleep(600)")

    def kill_it(event):
        if isinstance(event, Job): started.append(event)

    started = []
    import threading
    def assassin():
        wait_until(lambda: started and psutil.Process().children())
        time.sleep(1)
        for child in psutil.Process().children():
            if "_worker" in " ".join(child.cmdline()): child.kill()
    threading.Thread(target=assassin).start()
    [outcome] = batch.run_jobs([hanging], progress=kill_it)
    assert outcome.status == "failed" and "code -9" in outcome.message


def test_the_kernel_is_this_python_whatever_jupyter_knows(tmp_path, monkeypatch):
    wrong = tmp_path/"jupyter"/"kernels"/"python3"
    wrong.mkdir(parents=True)
    (wrong/"kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "another Python", "language": "python"}))
    for name in ("JUPYTER_PATH", "JUPYTER_DATA_DIR"): monkeypatch.setenv(name, str(tmp_path/"jupyter"))
    done = job(tmp_path, "skip_pattern", "import sys\nprint(hash(sys.executable) and sys.executable == " + repr(sys.executable) + ")")
    [outcome] = batch.run_jobs([done])
    assert outcome.status == "done", outcome.message
    assert json.loads(done.output.read_text())["cells"][-1]["outputs"][0]["text"] == ["True\n"]


TAKES_A_PORT = """
import json, os, pathlib, socket, sys
counter = pathlib.Path(os.environ["STARTS"])
if "ipykernel_launcher" in sys.orig_argv:
    counter.write_text(counter.read_text() + "x")
    if len(counter.read_text()) <= int(os.environ["TAKEN"]):
        connection = json.loads(pathlib.Path(sys.orig_argv[sys.orig_argv.index("-f") + 1]).read_text())
        taken = sys.taken = socket.socket()
        taken.bind((connection["ip"], connection["shell_port"]))
        taken.listen()
"""


@pytest.mark.parametrize("taken, status, starts", [(1, "done", 2), (2, "done", 3), (9, "failed", 3)])
def test_a_kernel_whose_port_is_taken_is_started_again(tmp_path, monkeypatch, taken, status, starts):
    "Jupyter chooses ports before the kernel takes them: another program may be quicker."
    (tmp_path/"sitecustomize.py").write_text(TAKES_A_PORT)
    (tmp_path/"starts").write_text("")
    for name, value in {"PYTHONPATH": f"{tmp_path}{os.pathsep}{HERE.parent}", "STARTS": tmp_path/"starts", "TAKEN": taken}.items(): monkeypatch.setenv(name, str(value))
    noted = job(tmp_path, "skip_pattern", "print('here')")
    [outcome] = batch.run_jobs([noted])
    assert (outcome.status, len((tmp_path/"starts").read_text())) == (status, starts), outcome.message
    if status == "failed":
        assert outcome.message == "the kernel ended 3 times before it was ready: see logs/skip_pattern.log"
        assert "Address already in use" in noted.log.with_suffix(".log").read_text()


def test_an_unknown_parameter_starts_nothing(tmp_path):
    wrong = job(tmp_path, "skip_pattern", "", parameters={"sedd": 5})
    with pytest.raises(batch.ElaError, match="unknown parameter of skip_pattern 'sedd'.*did you mean 'seeds'"): batch.run_jobs([wrong])
    assert not (tmp_path/"results").exists()
