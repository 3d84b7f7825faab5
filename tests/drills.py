"""Interrupts at random moments: `python tests/drills.py --interrupts 180 --commands 20 --seed 0` prints what happened, and ends with 1 if anything was lost.

Two kinds in this process (a timer, and a random line of the package's own code), and whole commands whose process group gets Ctrl-C. After each: every record on disk is
sound and equal to an undisturbed run's; after the next undisturbed pass no temporary file and no checkpoint is left."""
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ[name] = "1"  # as in conftest.py: numbers must repeat
import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from small_suite import write_notebooks

from ela_repro import runs
from ela_repro.report import build_report
from ela_repro.tables import accuracy_table, save_table

HERE, PACKAGE = Path(__file__).parent, str(Path(runs.__file__).parent)
TINY = dict(dataset="cifar10-sample", model="cifar_basic_resnet20", epochs=2, batch_size=32, lr=0.01, width=0.25, train_images=32, precision="float32", attention="ela")
SPECS = [runs.RunSpec(**TINY, policy="ebqm"), runs.RunSpec(**TINY, policy="matched_random")]


class HerePool:
    "Trains in this process, so that an interrupt can hit any line of it."
    def __init__(self, jobs, devices): self.busy, self.said = [], []

    @property
    def has_room(self): return not self.busy

    def start(self, task):
        self.busy.append(task["spec"])
        member = runs._Member(self.said.append, others=0, device="cpu", **task)
        while member.advance(1): pass

    def events(self):
        spec = self.busy.pop()
        said, self.said = self.said, []
        for event in said: yield spec, event

    def close(self): pass


def small_batch(top: Path) -> None:
    "Train two runs, write a table and the pages: every writer of the package but the notebooks."
    records = runs.ensure(SPECS, "quick", top, "cpu", jobs=1, progress=lambda event: None)
    save_table(accuracy_table(records, SPECS, "quick"), runs.Store("quick", top).folder)
    build_report("quick", top)


def records_of(top: Path) -> tuple[dict, list[str]]:
    "What is compared of each record, and what is wrong with the files that are none."
    found, problems = runs.Store("quick", top).records()
    return {r.id: runs.comparable(r) for r in found}, problems


def strays(top: Path) -> list[str]:
    "Files that no finished batch leaves."
    return [str(p.relative_to(top)) for p in Path(top).rglob("*") if p.is_file() and (p.name.endswith(".part") or p.name == ".writable" or p.parent.name == "checkpoints")]


def lost(top: Path, sound: dict, finished: bool = False) -> list[str]:
    "What is wrong in the folder `top`, compared with the records of an undisturbed batch."
    found, problems = records_of(top)
    wrong = problems + [f"record {id} differs" for id in found if found[id] != sound.get(id)]
    return wrong + ([f"no record {id}" for id in sound if id not in found] + [f"left: {s}" for s in strays(top)] if finished else [])


def by_timer(draw: random.Random, seconds: float):
    "Ctrl-C after a random time."
    def arm():
        def hit(*_): raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, hit)
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, seconds))
    return arm, lambda: signal.setitimer(signal.ITIMER_REAL, 0)


def by_line(draw: random.Random, lines: int):
    "Ctrl-C at a random line of the package: saving is over too soon for a timer to hit it often."
    left = draw.randint(1, lines)

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE): return None
        left -= event == "line"
        if left == 0: raise KeyboardInterrupt
        return trace
    return lambda: sys.settrace(trace), lambda: sys.settrace(None)


def count_lines(action) -> int:
    "How many lines of the package `action` runs through."
    n = 0

    def trace(frame, event, _):
        nonlocal n
        if not frame.f_code.co_filename.startswith(PACKAGE): return None
        n += event == "line"
        return trace
    sys.settrace(trace)
    try: action()
    finally: sys.settrace(None)
    return n


def drill_interrupts(count: int, seed: int) -> tuple[Counter, list[str]]:
    "`count` interrupts in this process, and after each series an undisturbed pass over the same folder."
    draw, seen, wrong = random.Random(seed), Counter(), []
    runs._Pool, pool = HerePool, runs._Pool
    try:
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            small_batch(scratch/"warm")
            start = time.perf_counter()
            small_batch(scratch/"undisturbed")
            seconds, sound = time.perf_counter() - start, records_of(scratch/"undisturbed")[0]
            lines, n = count_lines(lambda: small_batch(scratch/"counted")), 0
            while seen["interrupts"] < count:
                n += 1
                top = scratch/f"disturbed{n}"
                for _ in range(3):  # interrupted, gone on with, interrupted again
                    kind = draw.choice(("timer", "line"))
                    arm, disarm = by_timer(draw, seconds) if kind == "timer" else by_line(draw, lines)
                    try:
                        arm()
                        try: small_batch(top)
                        finally: disarm()
                        seen["passes that ended before the interrupt"] += 1
                    except KeyboardInterrupt:
                        seen["interrupts"] += 1
                        seen[f"by {kind}"] += 1
                    seen["temporary files left at once"] += len([s for s in strays(top) if s.endswith(".part")])
                    wrong += [f"{kind} {n}: {w}" for w in lost(top, sound)]
                small_batch(top)
                wrong += [f"undisturbed pass {n}: {w}" for w in lost(top, sound, finished=True)]
    finally: runs._Pool = pool
    return seen, wrong


def command(nbs: Path, top: Path) -> subprocess.Popen:
    "The tiny suite's batch in a process group of its own, as a shell starts it."
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen([sys.executable, HERE/"small_suite.py", nbs, "reproduce", "--only", "skip_pattern", "--out", top, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment, start_new_session=True)


def loaded(process: subprocess.Popen) -> bool:
    "Wait until Python has started and hears interrupts by the package's own rules."
    caught = lambda: int(next(line for line in Path(f"/proc/{process.pid}/status").read_text().split("\n") if line.startswith("SigCgt")).split()[1], 16)
    while process.poll() is None:
        if caught() >> (signal.SIGTERM - 1) & 1: return True  # `main` has begun
        time.sleep(0.005)
    return False


def drill_commands(count: int, seed: int) -> tuple[Counter, list[str]]:
    "`count` batches that get Ctrl-C at a random moment; every third folder is then finished undisturbed."
    draw, seen, wrong = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        scratch, start = Path(scratch), time.perf_counter()
        nbs = write_notebooks(scratch/"nbs")
        out, err = command(nbs, scratch/"undisturbed").communicate(timeout=300)
        seconds, sound = time.perf_counter() - start, records_of(scratch/"undisturbed")[0]
        if len(sound) != 2: return seen, [f"the undisturbed batch failed: {out}{err}"]
        for n in range(count):
            top = scratch/f"disturbed{n//3}"
            process = command(nbs, top)
            loaded(process)
            time.sleep(draw.uniform(0, seconds))
            if process.poll() is None: os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=300)
            seen[f"exit code {process.returncode}"] += 1
            if process.returncode not in (0, 130) or "Traceback" in out + err: wrong.append(f"command {n}: exit code {process.returncode}: {out}{err}")
            wrong += [f"command {n}: {w}" for w in lost(top, sound)]
            if n % 3 == 2 or n == count - 1:
                process = command(nbs, top)
                out, err = process.communicate(timeout=300)
                wrong += [f"undisturbed pass after command {n}: {w}" for w in lost(top, sound, finished=True) + ([f"exit code {process.returncode}: {out}{err}"] if process.returncode else [])]
                seen["undisturbed passes"] += 1
    return seen, wrong


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("interrupts", 180), ("commands", 20), ("seed", 0)): about.add_argument(f"--{name}", type=int, default=default)
    args, violations = about.parse_args(), []
    for title, drill, count in (("interrupts in this process", drill_interrupts, args.interrupts), ("interrupted commands", drill_commands, args.commands)):
        if not count: continue
        start = time.perf_counter()
        seen, wrong = drill(count, args.seed)
        violations += wrong
        print(f"{title}: {count} asked for, {time.perf_counter() - start:.0f} s", *(f"  {k:<42}{v:>5}" for k, v in seen.items()), f"  {'violations':<42}{len(wrong):>5}", sep="\n", flush=True)
    for w in violations: print("VIOLATION", w)
    return int(bool(violations))


if __name__ == "__main__": sys.exit(main())
