"""Do the commands stay quick when there are many records? `python tests/scale.py --records 2000` makes them up and times `status` and `report`."""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ela_repro import examples
from ela_repro.core import ROOT, write_json
from ela_repro.runs import EXPERIMENTS, RunRecord, RunSpec, Store, experiment_specs, needed_specs
from ela_repro.tables import accuracy_table, difference_table, save_table

LIMITS = {"status": 2.0, "report": 60.0}  # s of processor time, with RECORDS records
RECORDS = 2000
PROFILE = "paper"  # 180 epochs, up to 110 layers


def full_record(spec: RunSpec) -> RunRecord:
    "A made-up record no smaller than a real one: ten policy updates, three times an epoch, every number with all its digits."
    seconds = [17.123456789 + e/1000 for e in range(spec.epochs)]
    return replace(examples.example_record(spec), times={"train_s": seconds, "eval_s": seconds, "probe_s": seconds[:10], "total_s": sum(seconds), "resumed_at": []})


def fill(out: Path, count: int) -> str: # The seeds whose runs they are, as --seeds takes them
    "Write `count` made-up records below `out`, the tables made from them, and an executed copy of every notebook."
    one = len(needed_specs(EXPERIMENTS, PROFILE, "0"))
    seeds = f"0-{(count - 1)//one}"
    store, records = Store(PROFILE, out), [full_record(s) for s in needed_specs(EXPERIMENTS, PROFILE, seeds)[:count]]
    for r in records: store.save(r)
    plan = experiment_specs("cifar_accuracy", PROFILE, sorted({r.spec.seed for r in records}))
    for table in (accuracy_table(records, plan, PROFILE, store), difference_table(records, plan, PROFILE)): save_table(table, store.folder)
    for name in (e.name for e in EXPERIMENTS.values() if (ROOT/"nbs"/e.notebook).exists()):  # their stamp makes `status` look whether they are current
        write_json(store.folder/"notebooks"/f"{name}.ipynb", {"cells": [], "metadata": {"ela_repro": {"parameters": {"profile": PROFILE, "seeds": seeds}, "fingerprint": "made up", "outputs": []}}})
    return seeds


def timed(command: str, out: Path, seeds: str) -> tuple[float, str]: # Seconds of processor time, which other work does not lengthen; what it printed
    "Run `ela-repro COMMAND` in a process of its own."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", "from ela_repro.batch import main; main()", command, "--profile", PROFILE, "--out", out, "--seeds", seeds],
                          capture_output=True, text=True, env=environment)
    if done.returncode: sys.exit(f"{command} ended with code {done.returncode}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main() -> int: # 1 if a command took longer than its limit
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=RECORDS, help="how many to make up")
    count = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        seeds = fill(Path(folder), count)
        size = sum(p.stat().st_size for p in Path(folder).rglob("runs/*.json"))
        print(f"{count} records, {size/1e6:.0f} MB")
        seconds = {command: timed(command, Path(folder), seeds)[0] for command in LIMITS}
    for command, limit in LIMITS.items(): print(f"{command}: {seconds[command]:.2f} s, limit {limit:g} s" + ("" if seconds[command] <= limit else "  TOO SLOW"))
    return int(any(seconds[c] > LIMITS[c] for c in LIMITS))


if __name__ == "__main__": sys.exit(main())
