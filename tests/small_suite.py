"""The command line with a tiny suite: `python small_suite.py FOLDER reproduce …` trains toy runs and executes the notebooks in FOLDER."""
import json
import sys
from dataclasses import replace
from pathlib import Path

from ela_repro import batch, runs, timing
from ela_repro.core import write_json

SHOWN = ("cifar_accuracy", "training_time", "attention_similarity", "skip_pattern", "report")  # one of each kind, and one that reads step times
SETTINGS = dict(epochs=2, batch_size=32, train_images=64, width=0.25, precision="float32")
PARAMETERS = "profile: str = 'quick' # p\nseeds: str = '' # s\nout: str = '' # o\ndata: str = '' # d\ndevice: str = 'auto' # v"
TABLE = """
from ela_repro.core import results_root, write_atomic, write_json
from ela_repro.runs import load_records
records = load_records(profile, out)
folder = results_root(out)/profile/"tables"
write_atomic(folder/"{name}.csv", "\\n".join(f"{{r.spec.label}},{{r.status}}" for r in records))
write_json(folder/"{name}.json", {{"experiment": "{name}"}})
print(len(records), "records in", results_root(out))
"""
PAGE = """
from ela_repro.core import results_root, write_atomic
folder = results_root(out)/profile
write_atomic(folder/"index.html", "tables: " + " ".join(p.name for p in sorted((folder/"tables").glob("*"))))
"""


def write_notebooks(folder: Path, **replaced: str) -> Path:
    "A notebook for each experiment: tables that read the records, and a page; `replaced` gives other code by name."
    folder.mkdir(exist_ok=True)
    for e in runs.EXPERIMENTS.values():
        code = replaced.get(e.name, PAGE if e.kind == "report" else TABLE.format(name=e.name))
        cells = [{"cell_type": "code", "id": i, "metadata": {"tags": tags}, "execution_count": None, "outputs": [], "source": text}
                 for i, tags, text in (("p", ["parameters"], PARAMETERS), ("c", [], code))]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        write_json(folder/e.notebook, {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})
    return folder


def shrink(folder: Path, **settings) -> None:
    "Make every profile tiny, and take the notebooks from `folder`."
    for name in set(runs.EXPERIMENTS) - set(SHOWN): del runs.EXPERIMENTS[name]
    timing.ROUNDS["cpu"], timing.AT_LEAST["cpu"] = 1, (0.0, 1)
    timing.measure_alone = lambda work, arguments, say: "" if work(**arguments, say=say) else "nothing was timed"  # here: a process of its own would not be made tiny
    for name, p in runs.PROFILES.items(): runs.PROFILES[name] = replace(p, models=("cifar_resnet20",), recipes=("stable",), settings=SETTINGS | settings, scopes={})
    batch.notebooks_folder = lambda: folder


if __name__ == "__main__":  # the processes that train import this file too
    folder = Path(sys.argv.pop(1))
    settings = folder/"settings.json"
    shrink(folder, **(json.loads(settings.read_text()) if settings.exists() else {}))
    batch.main()
