"From made-up records to tables, figures and pages, with everything that can go wrong on the way."
import csv
import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from ela_repro import figures, report, speed, tables
from ela_repro.core import ROOT, ElaError, write_json
from ela_repro.examples import example_record, save_examples
from ela_repro.replication import POSITION, answers, outcomes, pairings
from ela_repro.runs import EXPERIMENTS, Store, experiment_specs, make_spec
from ela_repro.speed import PARTS
from ela_repro.stats import Interval, summarize
from ela_repro.tables import Table

NASTY = "a_b & 50% <script>alert(1)</script> \"q\" 'p' $x^2$ {#} ~ | \\ [link](x) `c` *b*"
PLAN = experiment_specs("cifar_accuracy", "reduced")


class Balanced(HTMLParser):
    "Checks that tags are balanced, and gathers the text."
    VOID = {"meta", "img", "br", "link", "hr"}

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)


def check_latex(text):
    "No special character is bare, and every brace has its partner."
    bare = re.sub(r"\\[A-Za-z]+|\\[&%$#_{}\\]", "", "\n".join(l for l in text.splitlines() if not l.startswith("%")))
    bare = re.sub(r"\$[^$]*\$", "", bare)
    assert not re.search(r"[#_%^~$<>|\\]", bare), bare
    depth = 0
    for c in bare:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0


@pytest.fixture
def made(tmp_path):
    store = save_examples(tmp_path, "reduced")
    return store, store.records()[0]


# Tables

def test_one_frame_three_files(tmp_path):
    frame = pd.DataFrame({"method": [NASTY, "SE"], "accuracy, %": [summarize([71, 72, 73]), None], "difference": [None, Interval(-1, 2, 0.5, p=0.4)]}, dtype=object)
    tables.save_table(Table("t", frame, NASTY, "quick", "cifar_accuracy", NASTY), tmp_path)
    text = {s: (tmp_path/"tables"/f"t.{s}").read_text() for s in ("csv", "md", "tex")}
    rows = list(csv.DictReader(io.StringIO(text["csv"])))
    assert rows[0]["method"] == NASTY and float(rows[0]["accuracy, %: mean"]) == 72 and float(rows[1]["difference: low"]) == -1
    assert rows[1]["accuracy, %: mean"] == "" and "mean nothing" in rows[0]["caution"]
    lines = [l for l in text["md"].splitlines() if l.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", l)) for l in lines}) == 1 and "72.0 ± 1.0 (n = 3)" in text["md"]
    check_latex(text["tex"])
    assert text["tex"].count(r"\\") == 3
    assert all(tables.disclaimer("quick").split(":")[1] in t for t in text.values())


def test_people_read_a_minus_sign_and_machines_a_hyphen():
    cells = [Interval(-2, -1, -1.5, p=1e-9), summarize([-2.0, -1.0]), summarize([-3.0]), -0.25, -7]
    table = Table("t", pd.DataFrame({f"c{i}": pd.Series([c], dtype=object) for i, c in enumerate(cells)}), "caption", "reduced")
    assert table.cells() == [["−1.50 [−2.00, −1.00]", "−1.5 ± 0.7 (n = 2)", "−3.0 (n = 1)", "−0.25", "−7"]]
    assert all("-0" not in t and "-1" not in t and "−0.25" in t for t in (table.to_markdown(), table.to_html())) and "$-$0.25" in table.to_latex()
    row, = csv.DictReader(io.StringIO(table.to_csv()))
    assert [float(row[k]) for k in ("c0: low", "c1: mean", "c2: mean", "c3", "c4")] == [-2, -1.5, -3, -0.25, -7] and "−" not in table.to_csv()


def test_the_plus_behind_a_commit_is_explained_where_there_is_one(made):
    clean, dirty = made[1][0], replace(made[1][1], provenance={**made[1][1].provenance, "commit": "0123456789ab+"})
    assert "+ behind a commit" not in report.provenance_of([clean])
    found = report.provenance_of([clean, dirty])
    assert "uncommitted changes" in found["+ behind a commit"] and "0123456789ab+ (1 run)" in found["commit"]


@given(st.text(max_size=60))
def test_any_text_can_stand_in_a_table(text):
    table = Table("t", pd.DataFrame({"a": [text]}, dtype=object), text, "reduced")
    Balanced(table._repr_html_())
    assert len([l for l in table.to_markdown().split("\n") if l.startswith("| ")]) == 2
    rows = list(csv.reader(io.StringIO(table.to_csv(), newline="")))
    assert len(rows) == 2 and "".join(rows[1]) == tables.one_line(text)


@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=60))
def test_any_text_can_stand_in_latex(text): check_latex("\\caption{" + tables.escape_latex(text) + "}")


def test_no_planned_row_is_dropped(made):
    store, records = made
    kept = [r for r in records if r.spec.method != "ela"]
    table = tables.accuracy_table(kept, PLAN, "reduced", None)
    assert len(table.frame) == 23
    assert [r for r in table.frame["remark"] if r] == ["not run: no record of seed 0, 1, 2, 3, 4, 5 yet"]*2
    none = tables.difference_table(kept, PLAN, "reduced").frame
    assert len(none) == 32 and none["remark"].str.startswith("not run").all()
    assert len(tables.accuracy_table([], PLAN, "reduced").frame) == 23


def test_reasons_come_from_the_store(made):
    store, records = made
    spec = PLAN[0]
    store.path(spec).write_text("{")
    store.fail(PLAN[1], "boom") or store.path(PLAN[1]).unlink()
    sound, problems = store.records()
    said = tables.accuracy_table(sound, PLAN, "reduced", store).frame["remark"][0]
    assert said == "the record of seed 0 is damaged; seed 1 failed: boom" and len(problems) == 1


def test_diverged_runs_are_counted_not_averaged():
    records = [example_record(s, "diverged" if s.seed == 2 else "done") for s in PLAN if s.method == "plain"]
    row = tables.accuracy_table(records, PLAN, "reduced").frame.iloc[0]
    assert row["accuracy, last epoch, %"].n == 5 and "1 of 6 diverged" in row["remark"]


def test_groups_do_not_mix_settings():
    specs = [make_spec("paper", m, dataset=d, model=b) for d in ("cifar10", "cifar100") for b in ("cifar_resnet20", "cifar_resnet110") for m in ("plain", "ela")]
    comparisons = tables.compare_with_ela([example_record(s) for s in specs], specs)
    assert len(comparisons) == 4 and all(c.ela.setting == c.other.setting for c in comparisons)


def test_holm_counts_what_was_planned(made):
    _, records = made
    everything = tables.compare_with_ela(records, PLAN)
    fewer = tables.compare_with_ela([r for r in records if r.spec.recipe == "stable"], PLAN)
    key = lambda c: (c.ela.recipe, c.other.key.method)
    p = {key(c): c for c in everything if c.kind == "confirmatory"}
    assert len(p) == 6 and all(c.holm_p >= c.interval.p for c in p.values())
    smallest = min((c for c in fewer if c.kind == "confirmatory"), key=lambda c: c.interval.p)
    assert smallest.holm_p == pytest.approx(6*smallest.interval.p)


# Figures

@pytest.mark.parametrize("model", ["cifar_resnet20", "cifar_resnet56", "cifar_resnet110", "cifar_basic_resnet56"])
@pytest.mark.filterwarnings("error")
def test_figures_of_every_depth(model, tmp_path):
    run, twin = (example_record(make_spec("paper", m, model=model)) for m in ("ela", "matched_random"))
    for name, fig in (("a", figures.attention_similarity(run)), ("s", figures.skip_pattern(run, twin))):
        figures.save_figure(fig, name, tmp_path, NASTY, "quick", "skip_pattern")
        svg = (tmp_path/"figures"/f"{name}.svg").read_text()
        words = [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert "stage 1" in words and len(svg) < 400_000
    assert (tmp_path/"figures"/"a.png").stat().st_size < 100_000


def test_a_saved_figure_names_its_files(tmp_path):
    saved = figures.save_figure(figures.attention_similarity(example_record(make_spec("quick", "ela"))), "f", tmp_path, "what is shown", "quick")
    assert repr(saved) == "Figure f: f.svg and .png, with its caption" and "what is shown" in saved._repr_html_()
    assert all((saved.folder/f"f.{suffix}").exists() for suffix in ("svg", "png"))


def test_figures_repeat_to_the_byte(tmp_path):
    run = example_record(make_spec("quick", "ela"))
    for folder in "ab": figures.save_figure(figures.attention_similarity(run), "f", tmp_path/folder, "c", "quick")
    for suffix in ("svg", "png", "json"): assert (tmp_path/"a/figures"/f"f.{suffix}").read_bytes() == (tmp_path/"b/figures"/f"f.{suffix}").read_bytes()


def test_smaller_svg_takes_from_a_use_only_what_its_path_says():
    drawing = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">
      <defs><path id="tick" d="M0 0h3" stroke="#000"/><path id="mark" d="M0 0h3v3z" stroke="#00f"/></defs>
      <use x="1" xlink:href="#tick" stroke="#f00" stroke-width="2" fill="#0f0"/><use x="2" xlink:href="#tick"/>
      <use x="3" xlink:href="#mark" fill="#f0f" transform="scale(2)"/><use x="4" xlink:href="#mark"/></svg>"""
    uses = {e.get("x"): e.attrib for e in ElementTree.fromstring(figures.smaller_svg(drawing.encode())).iter("{http://www.w3.org/2000/svg}use")}
    assert uses["1"]["fill"] == "#0f0" and uses["1"]["stroke-width"] == "2" and "stroke" not in uses["1"]  # a path inherits what it lacks
    assert uses["3"]["fill"] == "#f0f" and uses["3"]["transform"] == "scale(2)"


def test_labels_do_not_overlap():
    "No two texts of a figure cover each other."
    run, twin = (example_record(make_spec("paper", m)) for m in ("ela", "matched_random"))
    for fig in (figures.attention_similarity(run, [run]), figures.skip_pattern(run, twin)):
        fig.draw_without_rendering()
        axes = [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]
        outside = [tick.label1 for axis in axes for tick in axis.get_major_ticks() if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())]
        boxes = [(t.get_text(), t.get_window_extent()) for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in outside]
        boxes = [(t, b.shrunk(0.8, 0.6)) for t, b in boxes if b.width > 0]  # letters fill less than their line
        for i, (t, b) in enumerate(boxes):
            for u, c in boxes[i + 1:]: assert not b.overlaps(c), (t, u)


def test_a_single_divergence_is_a_dash_and_its_cross_stands_at_its_own_panel():
    "A line through one point shows nothing, and wide cells must not push the cross of a skipped layer over to the next stage."
    run, *others = (example_record(make_spec("reduced", "ela", model="cifar_resnet20", seed=s)) for s in range(3))
    run = replace(run, skip_mask="010101")
    fig = figures.attention_similarity(run, others)
    for above, below in zip(fig.axes[:3], fig.axes[3:6]):
        lines = [line for line in below.lines if line.get_linestyle() != "None"]
        assert len(lines) == 4 and all(len(set(line.get_xdata())) == 2 for line in lines)  # two other seeds, this one, the null line
        [cross] = above.lines
        place, end = cross.get_transform().transform(cross.get_xydata())[0, 0], above.get_window_extent().x1
        assert end < place < end + 10*fig.dpi/72


def test_figures_refuse_what_has_no_rows():
    for record in (example_record(make_spec("quick", "se")), example_record(make_spec("quick", "ela"), "diverged")):
        with pytest.raises(ElaError, match="choose a run"): figures.attention_similarity(record)


def test_uniform_attention_lies_on_the_null_line():
    run = example_record(make_spec("quick", "mrla_b"))
    flat = replace(run, divergence={**run.divergence, "value": run.divergence["null"]})
    assert figures.below_null(flat) == (0, 15)


# Report

def full_report(tmp_path, profile, seeds=None):
    store = save_examples(tmp_path, profile, seeds)
    records = store.records()[0]
    specs = experiment_specs("cifar_accuracy", profile, seeds)
    for t in (tables.accuracy_table(records, specs, profile, store), tables.difference_table(records, specs, profile)): tables.save_table(t, store.folder)
    run = next(r for r in records if r.spec.method == "ela")
    figures.save_figure(figures.attention_similarity(run), "attention_similarity", store.folder, figures.attention_caption(run) + NASTY, profile, "attention_similarity")
    return store


@pytest.mark.parametrize("profile", ["quick", "reduced"])
def test_page_is_whole_and_self_contained(tmp_path, profile):
    store = full_report(tmp_path, profile)
    page = Balanced(report.build_report(profile, tmp_path).read_text())
    tags = [t for t, _ in page.tags]
    assert "script" not in tags and "link" not in tags and "iframe" not in tags
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if tag == "img": assert attributes["src"].startswith("figures/") and (store.folder/attributes["src"]).exists() and attributes["alt"]
        if tag == "a":
            to = attributes["href"]
            assert to.startswith("https://arxiv.org/") or to[0] == "#" and to[1:] in ids or (store.folder/to).exists(), to
    text = "".join(page.text)
    assert all(c.id in text for c in report.CLAIMS) and tables.RECONSTRUCTION in text
    assert ("mean nothing" in text) == (profile == "quick")


def test_quick_judges_nothing(tmp_path):
    store = full_report(tmp_path, "quick", (0, 1, 2, 3, 4, 5, 6))
    assert {j.verdict for j in report.judge_all(store.records()[0], "quick", "0-6")} == {"not tested"}
    report.build_report("quick", tmp_path, "0-6")
    claims = (store.folder/"claims.md").read_text()
    assert claims.count("not tested") == len(report.CLAIMS) and " supported" not in claims and "mean nothing" in claims


def test_failures_are_told_and_escaped(tmp_path):
    store = Store("reduced", tmp_path)
    store.fail(PLAN[0], NASTY)
    html = report.build_report("reduced", tmp_path).read_text()
    assert NASTY in "".join(Balanced(html).text) and "<script>" not in html


EVERY = [example_record(s) for s in report.plan_of("reduced")]


def lacking(store, absent, **more):
    "What is said of runs when all records but those of `absent` are there."
    found = report.not_run(store, [r for r in EVERY if not absent(r.spec)], [], **more)
    return {e: [text for text in lines if "notebook" not in text] for e, lines in found.items() if e in EXPERIMENTS and any("notebook" not in text for text in lines)}


def test_missing_runs_are_told_apart_by_their_conditions(tmp_path):
    store = Store("reduced", tmp_path)
    long = [s for s in experiment_specs("schedule_choice", "reduced") if s.epochs == 96 and s.policy == "ebqm"]
    assert lacking(store, lambda s: s in long) == {"schedule_choice": [f"{report.NO_RECORD}: ELA (96 epochs, released; 96 epochs, stable – cifar_resnet56 on cifar100, 5000 held-out images)"]}
    args = [dict(s.policy_args).get("scale") == "exp" and s.skip == "module" and s.recipe == "stable" for s in experiment_specs("matched_control", "reduced")]
    some = {s for s, chosen in zip(experiment_specs("matched_control", "reduced"), args) if chosen}
    assert lacking(store, lambda s: s in some) == {"matched_control": [f"{report.NO_RECORD}: ELA; MatchedRandom (scale exp, skip mode module, stable – cifar_resnet56 on cifar100)"]}


def test_one_reason_stands_once_and_a_shared_run_once(tmp_path):
    store = Store("reduced", tmp_path)
    assert lacking(store, lambda s: False) == {}
    assert lacking(store, lambda s: s in PLAN and s.method in ("se", "eca")) == {"cifar_accuracy": [f"{report.NO_RECORD}: SE; ECA (cifar_resnet56 on cifar100)"]}  # four experiments read them
    last = [s for s in PLAN if s.method == "mrla_b" and s.seed == 5]
    assert lacking(store, lambda s: s in last) == {"cifar_accuracy": ["MRLA-B (released; stable – cifar_resnet56 on cifar100): no record of seed 5 yet"]}
    store.fail(last[0], "no room left")
    said = lacking(store, lambda s: s in last)["cifar_accuracy"]
    assert sorted(said) == [f"MRLA-B ({r} – cifar_resnet56 on cifar100): {why}" for r, why in (("released", "seed 5 failed: no room left"), ("stable", "no record of seed 5 yet"))]


def test_every_missing_run_is_told_with_one_experiment(tmp_path):
    store, told = Store("reduced", tmp_path), set()
    for name in EXPERIMENTS:
        said, new = report.missing_runs(name, store, [], None, told), set(experiment_specs(name, "reduced")) - told
        assert bool(said) == bool(new) and all(text == f"no record of any run yet, of {len(experiment_specs(name, 'reduced'))} planned" for text in said)
        told |= new
    assert told == set(report.plan_of("reduced"))


def test_the_page_folds_what_was_not_run_by_experiment(tmp_path):
    store = full_report(tmp_path, "reduced")
    store.path(next(s for s in PLAN if s.method == "se")).unlink()
    page = Balanced(report.build_report("reduced", tmp_path).read_text())
    text = "".join(page.text)
    part = text[text.index("What was not run, and why", text.index("What was not run, and why") + 1):]
    assert f"cifar_accuracy: {EXPERIMENTS['cifar_accuracy'].title}SE (cifar_resnet56 on cifar100): no record of seed 0 yet" in part and "measurements" in part


def test_a_family_without_comparison_is_told_from_one_that_was_not_run():
    claims = {c.id: c for c in report.CLAIMS}
    said = {i: [p.evidence for p in report.judge(claims[i], report.gather([], "reduced"), "reduced").parts] for i in ("C2a", "C2b", "C2c")}
    assert said["C2a"] == ["channel attention: profile reduced compares none on cifar10", "spatial attention: profile reduced compares none on cifar10",
                           "layer interaction: profile reduced compares none on cifar10 for this claim; the runs of other_datasets there are no part of it"]
    assert all(text.endswith("not run") for text in said["C2b"]) and all("compares none on imagenet" in text for text in said["C2c"])


@pytest.mark.parametrize("records", [EVERY, []], ids=["all", "none"])
def test_what_stands_below_a_table_is_plain_words(tmp_path, records):
    "Marks of Markdown would stand there as they are in HTML, and escaped in Markdown."
    found = report.Found(Store("reduced", tmp_path), None, {r.spec: r for r in records})
    for make in report.TABLES.values():
        for table in make(found): assert "`" not in " ".join([table.caption, *table.remarks]), table.name


def test_published_links_lead_somewhere(tmp_path):
    "Also those of claims that no profile has tested."
    store = Store("reduced", tmp_path)
    for s in PLAN:
        if s.method in ("ela", "mrla_b"): store.save(example_record(s))
    report.publish(tmp_path)
    text = (tmp_path/"claims.md").read_text()
    links = re.findall(r"\]\(([^)]+\.json)\)", text)
    assert links and all((tmp_path/link).exists() for link in links) and "--profile –" not in text and "(profile –)" not in text


def test_every_claim_can_be_tested():
    assert {e for c in report.CLAIMS for e in c.experiments} <= set(EXPERIMENTS)


def test_a_claim_falls_with_one_part():
    records = [example_record(s) for s in PLAN]
    bad = [replace(r, final={**r.final, "test_accuracy": r.final["test_accuracy"] - 0.2}) if r.spec.method == "ela" else r for r in records]
    found = {j.claim.id: j.verdict for j in report.judge_all(bad, "reduced")}
    assert found["C2b"] == "not supported" and found["C1a"] == "not supported" and found["C2a"] == "not tested"


def test_publish_prefers_paper_and_never_quick(tmp_path):
    out, readme = tmp_path/"results", tmp_path/"README.md"
    readme.write_text(f"top\n{report.BEGIN}\n{report.END}\nbottom\n")
    save_examples(out, "quick")
    for profile in ("reduced", "paper"):
        save_examples(out, profile)
        written = report.publish(out)
        assert [p.name for p in written] == ["claims.md", "README.md", "README.md"]
    text = readme.read_text()
    assert "180 epochs" in text and "24 epochs" not in text and "quick" not in text and "results/paper/index.html" in text
    assert "[paper](paper/index.html)" in (out/"README.md").read_text()
    readme.write_text("no markers")
    with pytest.raises(ElaError, match="results:begin"): report.publish(out)
    readme.unlink()
    assert len(report.publish(out)) == 2


def test_published_counts_say_what_they_count(tmp_path):
    "Records that no table reads lie there too, and are counted apart."
    store = Store("reduced", tmp_path)
    for s in PLAN[:3]: store.save(example_record(s))
    store.save(example_record(replace(PLAN[0], seed=77)))
    report.publish(tmp_path)
    text = (tmp_path/"README.md").read_text()
    assert "| 3 of 4 |" in text and "records read, of all in runs/" in text and "`ela-repro status --profile reduced`" in text


def test_what_was_not_measured_is_told_with_its_command(tmp_path):
    store = full_report(tmp_path, "reduced")
    text = lambda: "".join(Balanced(report.build_report("reduced", tmp_path).read_text()).text)
    for name in ("step times (step_times.json)", "costs (costs.json)", "speed (speed.json)", "left_out (left_out.json)"): assert f"{name}: not made; made by ela-repro reproduce --profile reduced --only " in text()
    write_json(store.measured("speed"), {"parts": dict.fromkeys(list(PARTS)[1:], {})}, sealed=True)
    write_json(store.measured("costs"), {"rows": [], "source_hash": "of another"}, sealed=True)
    write_json(store.measured("left_out"), {"runs": {s.id: {} for s in experiment_specs("left_out", "reduced")[1:]}}, sealed=True)
    found = {m.name: (m.state, m.detail) for m in speed.measurements(store)}
    n = len(experiment_specs("left_out", "reduced"))
    assert found == {"step times": ("not made", ""), "costs": ("outdated", "counted with other source"), "speed": ("incomplete", f"it lacks {list(PARTS)[0]}"), "left_out": ("incomplete", f"1 of {n} networks were not measured")}
    store.measured("speed").write_text("{")
    assert {m.name: m.state for m in speed.measurements(store)}["speed"] == "corrupt" and str(tmp_path) not in str(speed.measurements(store))


def test_weights_are_needed_until_what_starts_with_them_is_done(tmp_path):
    store, specs = Store("reduced", tmp_path), experiment_specs("left_out", "reduced")
    def state(): return next((m.state, m.command) for m in speed.kept_weights(store))
    assert state() == ("not made", "ela-repro reproduce --profile reduced --only detection_mask_rcnn detection_faster_rcnn left_out")
    for e in EXPERIMENTS.values():
        if e.detector:
            for s in experiment_specs(e.name, "reduced"): store.save(example_record(s))
    assert state() == ("not made", "ela-repro reproduce --profile reduced --only left_out")
    store.weights(specs[0]).parent.mkdir()
    for s in specs: store.weights(s).write_text("")
    assert state()[0] == "made"
    for s in specs: store.weights(s).unlink()
    write_json(store.measured("left_out"), {"runs": {s.id: {} for s in specs}}, sealed=True)
    assert state()[0] == "not needed"


def test_publish_without_any_records(tmp_path):
    report.publish(tmp_path/"results")
    assert "No profile has published records yet" in (tmp_path/"results"/"README.md").read_text()


def test_reporting_needs_no_torch():
    code = "import sys, ela_repro.report, ela_repro.tables, ela_repro.figures; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(tables.__file__).parent.parent).returncode == 0


def test_a_method_noisier_than_pooling_assumes_is_named():
    "One method whose seeds scatter five times as widely: its comparison carries a caution, the others do not."
    noise = (-5, 5, -5, 5, -5, 5)
    steady = [replace(example_record(s), final={**example_record(s).final, "test_accuracy": 0.6 + 0.001*noise[s.seed]*(5 if s.method == "mrla_b" and s.recipe == "stable" else 1)}) for s in PLAN]
    found = tables.compare_with_ela(steady, PLAN)
    assert {(c.other.key.method, c.ela.recipe) for c in found if c.caution} == {("mrla_b", "stable")}
    frame = tables.difference_table(steady, PLAN, "reduced").frame
    assert frame["remark"].str.contains("spread of MRLA-B exceeds 1.5", na=False).sum() == 1
    assert "interval is too narrow" in report.judge_comparison(next(c for c in found if c.caution)).evidence


def test_a_table_that_does_not_say_what_it_is_is_refused_in_words(made):
    store, _ = made
    tables.save_table(tables.accuracy_table([], PLAN, "reduced"), store.folder)
    path = store.folder/"tables"/"cifar_accuracy.json"
    path.write_text('{"name": "cifar_accuracy"}')
    with pytest.raises(ElaError, match="cifar_accuracy.json lacks caption, profile, experiment: delete it"): report.build_report("reduced", store.folder.parent)


def test_a_paragraph_stands_beside_the_verdict_that_it_was_written_for_and_no_other(tmp_path):
    store = save_examples(tmp_path, "reduced", None, ("cifar_accuracy", "training_time"))
    page_of = lambda: report.build_report("reduced", tmp_path).with_name("claims.md").read_text()
    verdicts = {j.claim.id: j.verdict for j in report.judge_all(store.records()[0], "reduced")}
    said = {id: verdict for id, verdict in verdicts.items() if id in ("C1a", "C2b")}
    (store.folder/"discussion.md").write_text("# Words\n\n" + "\n".join(f"## {id}: {v}\n\nWords on {id}.\n" for id, v in said.items()))
    page = page_of()
    assert all(f"**{v}** (profile reduced)\n\nWords on {id}." in page for id, v in said.items())
    links = re.findall(r"\]\((runs/\w+\.json)\)", page)
    assert links and all((store.folder/link).exists() for link in links), "each piece of evidence leads to its records"
    other = next(v for v in report.VERDICTS if v != said["C2b"])
    (store.folder/"discussion.md").write_text(f"## C2b: {other}\n\nWords on C2b.\n")
    page = page_of()
    assert "Words on C2b." not in page and f"written for the verdict *{other}*" in page
    for heading, says in (("## C9: supported", "C9"), ("## C1a: proven", "proven"), ("## C1a", "verdict of C1a")):
        (store.folder/"discussion.md").write_text(f"{heading}\n\nWords.\n")
        with pytest.raises(ElaError, match=says): page_of()
    report.build_report("quick", tmp_path)
    assert "##" not in (tmp_path/"quick"/"claims.md").read_text().replace("# Claims", ""), "what was not tested has no section"


def test_committed_pages_follow_from_committed_records(tmp_path):
    "Without a GPU, every text table, every verdict and the README's block come out byte for byte; who changes what they say commits them anew."
    out = Path(shutil.copytree(ROOT/"results", tmp_path/"results", ignore=shutil.ignore_patterns("quick", "cache", "checkpoints", "weights", "tables", "claims.md", "index.html")))
    shutil.copy(ROOT/"README.md", tmp_path)
    made = [*report.rebuild_tables("reduced", out), report.build_report("reduced", out), out/"reduced/claims.md", *report.publish(out)]
    changed = [str(name) for p in made if p.read_bytes() != (ROOT/(name := p.relative_to(tmp_path))).read_bytes()]
    assert not changed, "made anew they differ: run ela-repro reproduce --profile reduced with ELA_TRAIN=0, then ela-repro report --profile reduced --publish, and commit"
    assert {p.name for p in (ROOT/"results/reduced/tables").iterdir()} == {p.name for p in made if p.parent.name == "tables"}


def test_what_diverged_is_not_called_not_run():
    plan = experiment_specs("cifar_accuracy", "reduced")
    made = [example_record(s, "diverged" if s.method == "se" else "done") for s in plan if s.method != "eca"]
    remark = {r["difference"]: r["remark"] for r in tables.difference_table(made, plan, "reduced").frame.to_dict("records") if r["recipe"] == "stable"}
    assert remark["ELA − SE"] == "no finished run of SE, 6 diverged" and remark["ELA − ECA"] == "not run: no finished run of ECA"
    told = report._excerpt(tables.accuracy_table(made, plan, "reduced"))
    assert re.search(r"^No finished run: SE \(\d of \d diverged\)\.$", told, re.M) and re.search(r"^Not run yet: ECA\.$", told, re.M)
    evidence = [p.evidence for p in {j.claim.id: j for j in report.judge_all(made, "reduced")}["C2b"].parts]
    assert any("ELA − SE" in e and re.search(r"no finished run, \d runs? diverged", e) for e in evidence) and any("ELA − ECA" in e and "not run" in e for e in evidence)


def test_ids_of_the_committed_page_are_unique():
    "Tables and figures of one name among them."
    ids = re.findall(r'\sid="([^"]+)"', (ROOT/"results/reduced/index.html").read_text())
    assert len(ids) == len(set(ids)) and {"table-ebqm_ablation", "figure-ebqm_ablation"} <= set(ids)


def cells(name: str) -> list[dict]: # Column -> text, a row each
    "A committed table of profile reduced."
    lines = [line for line in (ROOT/"results"/"reduced"/"tables"/f"{name}.md").read_text().replace("\\", "").split("\n") if line.startswith("| ")]
    head, *rows = ([c.strip() for c in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(head, row)) for row in rows]


STABLE, PAIRS, LEFT = {"recipe": "stable"}, "new seeds, points [95% interval]", "ρ of {} and harm [95% interval]"
EARLY, EAGER = "Fixed: every other layer, before the first update", "EBQM, all layers skipped before the first update"
EAGER_CHANCE = "MatchedRandom: the same, as many, drawn anew"
SAID = [ # A number of the discussion, and where it stands
    ("−0.2 [−1.2, +0.7]", "cifar_accuracy_differences", {**STABLE, "difference": "ELA − MRLA-B"}, "points of accuracy"), ("+0.00 [−0.20, +0.20]", "control_replication", {"difference": "ELA − MRLA-B"}, PAIRS),
    *((number, "attention_similarity", {**STABLE, "network": "cifar_resnet56", "method": "MRLA-B"}, column) for number, column in (("3.3 ± 2.2", "all seeds of the suite: median of D / null line"), ("27.9 ± 10.1", "all seeds of the suite: layers with D below the null line"))),
    *((number, "attention_similarity", {**STABLE, "network": network, "method": "MRLA-B"}, "median of D / null line") for number, network in (("10.4", "cifar_resnet110"), ("1.4", "cifar_resnet20"))),
    *((number, "attention_similarity", {"recipe": recipe, "network": f"cifar_resnet{depth}", "method": "MRLA-B"}, "all seeds of the suite: entropy of the rows")
      for recipe, numbers in (("released", ("33.0 ± 16.7", "19.8 ± 4.3", "16.6 ± 3.0")), ("stable", ("66.5 ± 10.5", "59.0 ± 6.1", "49.0 ± 2.5"))) for number, depth in zip(numbers, (20, 56, 110))),
    ("43.4", "attention_similarity", {"recipe": "released", "network": "cifar_resnet110", "method": "MRLA-B"}, "layers with D below the null line"),
    ("29.4 ± 18.0", "matched_control_masks", {**STABLE, "scale": "relative", "skip mode": "retrieval"}, "ELA: skips of layers above the null line"),
    ("−3.91 [−5.38, −2.44]", "matched_control", {"recipe": "released", "scale": "relative", "skip mode": "retrieval"}, "ELA − ResNet"),
    ("+2.21 [+1.74, +2.69]", "matched_control", {**STABLE, "scale": "relative", "skip mode": "retrieval"}, "ELA − ResNet"),
    ("85.5", "training_time", {"method": "MRLA-B"}, "training, s (fast)"), ("55.8", "training_time", {"method": "ResNet"}, "training, s (fast)"), ("83.6", "training_time", {"method": "ELA"}, "training, s (fast)"),
    ("28.1", "ebqm_ablation", {**STABLE, "variant": "EBQM"}, "skipped, mean over training"), ("1.9", "training_time", {"method": "ELA"}, "overhead of the policy"),
    ("+2.06 [−1.53, +5.53]", "training_time", {"method": "MRLA-B"}, "ELA saves, % [95% interval] (fast)"), ("+8.10 [−17.07, +27.85]", "training_time", {"method": "MRLA-B"}, "ELA saves, % [95% interval] (naive)"),
    ("8.99", "speed_steps", {"network": "cifar_resnet56", "group": "skipping", "contender": "MRLA-B"}, "step, ms"), ("7.87", "speed_steps", {"network": "cifar_resnet56", "group": "skipping", "contender": "ELA, retrieval"}, "step, ms"),
    ("106.8", "training_time", {"method": "MRLA-L"}, "training, s (fast)"), ("62.4", "training_time", {"method": "MRLA-L"}, "step, ms (naive)"), ("80.1", "training_time", {"method": "MRLA-B"}, "step, ms (naive)"),
    ("+21.50 [+18.64, +24.26]", "training_time", {"method": "MRLA-L"}, "ELA saves, % [95% interval] (fast)"), ("−15.36 [−41.88, +6.21]", "training_time", {"method": "MRLA-L"}, "ELA saves, % [95% interval] (naive)"),
    *((number, "training_time_savable", row, column) for number, row, column in (
        ("+19.45 [+18.71, +20.18]", {"stage": "all of these layers, from the first step on"}, "saves, % of an unskipped step [95% interval] (fast)"), ("+4.32 [+3.48, +5.15]", {"stage": "these layers, for as long as ELA skips them"}, "saves, % of an unskipped step [95% interval] (fast)"),
        ("355", {"stage": "1", "layer": "6"}, "skipping saves, µs a step [95% interval] (fast)"), ("66", {"stage": "3", "layer": "2"}, "skipping saves, µs a step [95% interval] (fast)"), ("70", {"stage": "3", "layer": "3"}, "skipping saves, µs a step [95% interval] (fast)"))),
    ("10.7", "speed_steps", {"network": "cifar_resnet56", "group": "forms", "contender": "MRLA-B, concatenating, eager"}, "over the first of the group"),
    ("42.2", "ebqm_overhead", {**STABLE, "engine": "fast"}, "probe and divergences"), ("0.077", "ebqm_overhead", {**STABLE, "engine": "naive"}, "all overhead"), ("1.3", "ebqm_overhead", {"recipe": "released", "engine": "fast"}, "all overhead"), ("0.659", "speed_targets", {"what": "probes, decisions and changes of the mask, of 180 epochs"}, "measured"),
    ("35.8", "control_replication", {"difference": "ELA − MRLA-B"}, "ELA: skipped, mean over training"), ("20.5", "position_control", {"difference": "ELA − MatchedPosition, deepest first"}, "ELA: skipped layers in the deepest half"),
    ("0.44", "control_replication", {"difference": "ELA − MatchedRandom, one order"}, PAIRS), ("+0.44 [+0.20, +0.68]", "control_replication", {"difference": "ELA − MatchedRandom, one order"}, PAIRS), ("9 of 10", "control_replication", {"difference": "ELA − MatchedRandom, one order"}, "ELA ahead, new seeds"),
    ("+0.34", "control_replication", {"difference": "ELA − MatchedRandom, drawn anew"}, PAIRS), ("+0.34 [−0.02, +0.69]", "control_replication", {"difference": "ELA − MatchedRandom, drawn anew"}, PAIRS), ("+0.26", "control_replication", {"difference": "ELA − MatchedRandom, drawn anew"}, "earlier seeds, points"),
    ("+0.07 [−0.55, +0.69]", "left_out", {**STABLE, "harm in": "test accuracy, points"}, LEFT.format("D_t")), ("+0.55 [+0.27, +0.84]", "left_out", {**STABLE, "harm in": "test accuracy, points"}, LEFT.format("contribution")),
    ("+0.12 [−0.04, +0.27]", "position_control", {"difference": "ELA − MatchedPosition, shallowest first"}, PAIRS), ("5 of 10", "position_control", {"difference": "ELA − MatchedPosition, shallowest first"}, "ELA ahead"),
    *((number, "position_control", {"difference": "ELA − MatchedPosition, shallowest first"}, column) for number, column in (("0.6 ± 0.3", "overlap of a pair's last masks"), ("0.4 ± 0.1", "at random: overlap of a pair's last masks"))),
    ("+0.28", "ebqm_ablation", {**STABLE, "variant": "Never (MRLA-B)"}, "difference to EBQM"),
    ("0.54", "position_control", {"difference": "ELA − MatchedPosition, deepest first"}, PAIRS), ("< 0.001", "position_control", {"difference": "ELA − MatchedPosition, deepest first"}, "p (Holm)"),
    ("9.02", "speed_start", {"what": "new mask 000000000000000000"}, "step afterwards, ms"), ("6.71", "speed_start", {"what": "new mask 011111011111011111"}, "step afterwards, ms"), ("1.75", "speed_targets", {"what": "sum of timed steps: error against a run's clock"}, "measured"),
    *((number, "ebqm_ablation", {**STABLE, "variant": variant}, "difference to EBQM") for number, variant in (
        ("−1.08", "BQM: a coin, no limits"), ("−0.68", "HighestFirst: the most divergent half"), ("−0.74", "Fixed: every other layer"), ("−0.82", "Fixed: the deepest half"), ("−1.17", "m = 0.2, up to 80%, no limit of evidence"),
        ("−0.91", "contribution: how much the retrieval changes the features"), ("−0.63", "contribution: as many, drawn anew"), ("−0.74", EAGER_CHANCE), ("−0.19 [−0.85, +0.46]", "decided once, at the first update"))),
    *((number, "ebqm_ablation", {"recipe": "released", "variant": variant}, "difference to EBQM") for number, variant in (("+3.83 [+2.33, +5.33]", EAGER), ("−0.01 [−1.51, +1.50]", "HighestFirst: the most divergent half"))),
    ("−0.29 [−0.94, +0.36]", "ebqm_ablation", {**STABLE, "variant": EAGER}, "difference to EBQM"), ("−0.57 [−1.22, +0.08]", "ebqm_ablation", {**STABLE, "variant": EAGER}, "difference to MRLA-B"),
    *((number, "ebqm_ablation", {"recipe": recipe, "variant": variant}, "training loss, mean over the last epoch of the rate's warm-up") for number, recipe, variant in (
        ("3.3", "released", "Never (MRLA-B)"), ("2.4", "released", EAGER), ("2.8", "released", "Fixed: the deepest half"),
        ("2.15", "stable", "Never (MRLA-B)"), ("2.2", "stable", "Fixed: the deepest half"), ("2.25", "stable", EAGER))),
    *((number, "ebqm_ablation", {"recipe": "released", "variant": variant}, "difference to MRLA-B") for number, variant in (
        ("+3.08 [+1.58, +4.58]", "Fixed: every other layer"), ("+1.96 [+0.46, +3.47]", "Fixed: the deepest half"), ("+2.66 [+1.16, +4.17]", EARLY), ("−0.80 [−2.30, +0.71]", "Fixed: every other layer, after the first update"),
        ("+1.74 [+0.24, +3.24]", "Fixed: all layers, before the first update"), ("+3.27 [+1.77, +4.77]", EAGER), ("−0.69 [−2.19, +0.82]", "m = 0.2, up to 80%, no limit of evidence"),
        ("−2.57 [−4.07, −1.06]", "BQM: a coin, no limits"), ("−1.11 [−2.61, +0.39]", "no schedule: every epoch, to the end"))),
    *((number, "ebqm_ablation", {**STABLE, "variant": variant}, "difference to MRLA-B") for number, variant in (
        ("−0.58 [−1.23, +0.07]", EARLY), ("−0.91 [−1.56, −0.26]", "Fixed: every other layer, after the first update"), ("−0.44 [−1.10, +0.21]", "Fixed: all layers, before the first update"))),
    *((number, "ebqm_ablation_controls", {"recipe": recipe, "decides": EAGER}, column) for number, recipe, column in (
        ("69.9 ± 0.5", "released", "control: accuracy"), ("+0.04 [−1.47, +1.54]", "released", "difference, points"), ("2 of 3", "released", "ahead of its control"), ("+0.45 [−0.21, +1.10]", "stable", "difference, points"))),
    *((number, "matched_control", {"recipe": recipe, "scale": scale, "skip mode": skip}, "ELA − MatchedRandom paired by seed") for number, recipe, scale, skip in (
        ("+0.26", "stable", "relative", "retrieval"), ("+0.37", "stable", "exp", "module"), ("+0.51", "released", "exp", "module"), ("+1.27", "released", "relative", "module"))),
    ("−0.62 [−1.09, −0.14]", "matched_control", {**STABLE, "scale": "exp", "skip mode": "module"}, "ELA − MRLA-B"),
    *((number, "left_out", {"recipe": recipe, "harm in": harm}, LEFT.format("entropy of the row")) for number, recipe, harm in (
        ("+0.60", "released", "test loss, nats"), ("+0.64", "released", "test accuracy, points"), ("+0.43", "stable", "test loss, nats"), ("+0.02", "stable", "test accuracy, points"))),
    *((number, "training_time_savable", {"stage": stage}, "saves, % of an unskipped step [95% interval] (naive)") for number, stage in (
        ("+39.94 [+27.25, +52.62]", "all of these layers, from the first step on"), ("+12.93 [+7.44, +18.42]", "these layers, for as long as ELA skips them"))),
    *((number, "ebqm_ablation", {"recipe": "released", "variant": variant}, "skipped, mean over training") for number, variant in (("59.3 ± 9.5", "m = 0.2, up to 80%, no limit of evidence"), ("60.0", "Fixed: every other layer"), ("7.5", EARLY), ("40.4", EAGER), ("30.4", "EBQM"))),
    ("44.0", "ebqm_ablation", {**STABLE, "variant": EAGER}, "skipped, mean over training"),
    *((number, "schedule_lengths", {"recipe": "released", "difference": "MRLA-B − ResNet"}, f"{epochs} epochs, points") for number, epochs in (("−23.42 [−31.23, −15.61]", 24), ("−6.00 [−13.51, +1.51]", 48))),
    ("+0.30 [−0.03, +0.63]", "left_out", {**STABLE, "harm in": "test accuracy, points"}, "ρ of position t and harm"),
    *((number, "ebqm_ablation", {"recipe": recipe, "variant": variant}, "accuracy, last epoch") for number, recipe, variant in (("70.0 ± 0.1", "released", EAGER), ("69.8", "released", "Fixed: every other layer"), ("72.2", "stable", "Never (MRLA-B)"))),
    ("69.5", "cifar_accuracy", {"method": "ResNet"}, "accuracy, last epoch"), ("71.9", "cifar_accuracy", {**STABLE, "method": "MRLA-B"}, "accuracy, last epoch"),
    *((number, "cifar_accuracy_differences", {**STABLE, "difference": f"ELA − {other}"}, "points of accuracy") for number, other in (
        ("+1.3", "RLA"), ("+1.1", "DIA"), ("−1.2", "DLA-B"), ("+1.30 [+0.11, +2.48]", "ResNet as large as DIA"), ("+0.70", "SE"), ("+2.94", "CBAM"), ("+1.10 [−0.08, +2.29]", "DIA"))),
    ("96.7", "training_time", {"method": "DIA"}, "training, s (fast)"), ("+14.31 [+10.59, +17.87]", "training_time", {"method": "DIA"}, "ELA saves, % [95% interval] (fast)"), ("+6.52 [−16.28, +24.85]", "training_time", {"method": "DIA"}, "ELA saves, % [95% interval] (naive)"),
    ("70.6", "cifar_accuracy", {"method": "DIA"}, "accuracy, last epoch"), ("70.4", "cifar_accuracy", {"method": "ResNet as large as DIA"}, "accuracy, last epoch"),
    *((number, "other_datasets", {"data set": "imagenette"}, f"ELA − {other}, points") for number, other in (("+0.86", "ResNet"), ("−0.08 [−0.70, +0.53]", "MRLA-B"), ("−0.05 [−0.66, +0.56]", "MatchedRandom"))),
    *((number, "detection_faster_rcnn", {"method": method}, "box AP on training images") for number, method in (("32.9", "ResNet"), ("39.3", "ELA"))),
    ("−0.65 [−0.75, −0.55]", "left_out", {**STABLE, "harm in": "test loss, nats"}, LEFT.format("contribution"))]


def rounded_like(text: str, cell: str) -> str:
    "The numbers of a cell with as many digits as `text` shows."
    digits = len(re.search(r"\d+\.?(\d*)", text)[1])
    return re.sub(r"(?<![\d.])\d+\.\d+", lambda m: f"{float(m[0]):.{digits}f}", cell)


def test_numbers_of_the_discussion_stand_in_their_cells():
    "No number without a record behind it: each is held against the cell that it speaks of, and none is left over."
    text = (ROOT/"results"/"reduced"/"discussion.md").read_text().replace("\\", "")
    for number, table, row, column in SAID:
        found, = [r for r in cells(table) if all(r[k] == v for k, v in row.items())]
        cell, = [v for k, v in found.items() if k.startswith(column)]
        assert number in text and (number in cell or number in rounded_like(number, cell)), (number, cell)
    for number, *_ in sorted(SAID, key=lambda s: -len(s[0])): text = text.replace(number, "")
    assert re.findall(r"\d+\.\d+", text) == []
    assert "awaits revision" not in (ROOT/"results"/"claims.md").read_text() + (ROOT/"README.md").read_text()


def test_words_become_paragraphs_and_lists():
    said = "*In short.* Of it:\n- **One** \\[+0.1, +0.2\\], p \\< 0.001.\n- `two`\n\nAt length, a - b."
    assert report.words_html([said]) == "<p><em>In short.</em> Of it:</p><ul><li><strong>One</strong> [+0.1, +0.2], p &lt; 0.001.</li><li><code>two</code></li></ul><p>At length, a - b.</p>"


def test_the_words_on_the_replication_stand_beside_its_outcomes(tmp_path):
    store = save_examples(tmp_path/"results", "reduced", None, ("cifar_accuracy", "matched_control", "control_replication"))
    (tmp_path/"README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    block = lambda: (report.publish(tmp_path/"results"), (tmp_path/"README.md").read_text())[1]
    found = pairings(store.records()[0], "reduced")
    told = f"{outcomes(found)}, not run, not run"
    places = lambda: pairings(store.records()[0], "reduced", experiment=POSITION)
    (store.folder/"discussion.md").write_text(f"## replication: {told}\n\nWords on it.\n")
    assert "**Asked again of new seeds**" in block() and answers(found) in block() and "Words on it." in block() and "Or the place in the stage?" not in block()
    page = report.build_report("reduced", tmp_path/"results").read_text()
    assert report.esc(answers(found)) in page and "Against a rule of position" not in page
    (store.folder/"discussion.md").write_text(f"## replication: {told}\n\nIn a word.\n\nAt length.\n")
    assert re.match(f"{report.BEGIN}\\s+In a word\\.\\n", block()) and re.search(rf"<details><summary>[^<]+</summary>\s+At length\.\s+</details>\n\nOf {len(report.CLAIMS)} claims .+\.\n\n\|", block()), "who reads no further has read the sum of it"
    page = report.build_report("reduced", tmp_path/"results").read_text()
    assert page.index("In a word.") < page.index("<details>") < page.index("At length.") < page.index("</details>")
    (store.folder/"discussion.md").write_text("## replication: above zero\n\nWords on it.\n")
    assert "Words on it." not in block() and "written for the verdict *above zero*" in block()
    save_examples(tmp_path/"results", "reduced", None, ("position_control",))
    (store.folder/"discussion.md").write_text(f"## replication: {outcomes(found)}, {outcomes(places())}\n\nWords on both.\n")
    assert answers(places()) in block() and "Words on both." in block(), "each study is a family of its own"
