"""Settings for all tests: one thread, so that numbers repeat and tests may run beside other work; no folders of the user's."""
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ[name] = "1"  # before NumPy or PyTorch is loaded
os.environ.setdefault("MPLBACKEND", "agg")

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_suite import write_notebooks

HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_results(monkeypatch):
    "A test that writes results names its folder; a user's variable must not redirect it."
    monkeypatch.delenv("ELA_RESULTS", raising=False)


def pytest_collection_modifyitems(items):
    "Tests marked gpu are skipped, not failed, where there is no GPU."
    import torch

    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker("gpu"): item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def small(folder, *args):
    "Run the tiny suite whose notebooks lie in `folder`, in a process of its own."
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "COLUMNS": "200"}
    return subprocess.run([sys.executable, HERE/"small_suite.py", folder, *map(str, args)], capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "The tiny suite after one batch, and what that batch said; tests that change it take `suite`."
    top = tmp_path_factory.mktemp("finished")
    write_notebooks(top/"nbs")
    return top, small(top/"nbs", "reproduce", "--out", top/"results", "--device", "cpu")


@pytest.fixture
def suite(finished, tmp_path):
    "A copy of the finished tiny suite: nbs/ and results/."
    shutil.copytree(finished[0], tmp_path/"suite")
    return tmp_path/"suite"


def dead_links(path: Path) -> list[str]:
    "Relative links of a page (Markdown, HTML, or a notebook's prose and outputs) that lead nowhere."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        parts = json.loads(text)["cells"]
        shown = [o.get("data", {}) for c in parts for o in c.get("outputs", [])]
        text = "\n".join("".join(t) for t in [*(c["source"] for c in parts if c["cell_type"] == "markdown"), *(d[k] for d in shown for k in ("text/markdown", "text/html") if k in d)])
    found = re.findall(r"\]\(([^()\s]+)\)", text) if path.suffix != ".html" else []
    found += re.findall(r"(?:href|src)=[\"']([^\"']+)[\"']", text)
    return [link for link in found if not re.match(r"[a-z]+:|#", link) and not (path.parent/link.partition("#")[0]).exists()]
