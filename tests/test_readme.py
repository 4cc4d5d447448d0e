"""The README is short, and its figures, links and targets are those of the repository."""

import re

import pytest

from tools import ROOT

README = (ROOT / "README.md").read_text()
TABLE = re.compile(r"(?:^\|.*\n)+", re.M)


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_it_is_short():
    assert len(README.split()) <= 900


def test_its_two_tables_are_narrow():
    ops, results = (table.splitlines() for table in TABLE.findall(README))
    assert len(results) == 2 + 5
    assert max(len(cells(line)) for line in (*ops, *results)) <= 6


def test_its_op_table_has_every_op():
    import dblocks.functional

    ops, _ = (table.splitlines() for table in TABLE.findall(README))
    named = [cells(line)[0].strip("`") for line in ops[2:]]
    assert set(named) == {n for n in dblocks.functional.__all__ if n[0].islower()}


def test_its_results_are_in_the_report():
    report = (ROOT / "docs" / "results.md").read_text()
    _, results = (table.splitlines() for table in TABLE.findall(README))
    figures = [
        figure
        for line in results[2:]
        for cell in cells(line)[3:]
        for figure in re.findall(r"\d[\d.]*(?: ± [\d.]+)?(?: %)?", cell)
    ]
    assert len(figures) == 5 * 4
    assert [
        f for f in figures if not re.search(rf"(?<![\d.]){re.escape(f)}(?![\d.])", report)
    ] == []


def between(page, name):
    return page.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]


def test_its_results_are_what_the_records_give():
    """Where this fails, `make study-report` writes what the records give now."""
    from benchmarks.study.__main__ import EXPERIMENTS, STUDIES, comparison
    from benchmarks.study.report.documents import README_BLOCK, blocks
    from benchmarks.study.report.readme import LINES, readme_block

    found = {line.comparison: comparison(line.comparison) for line in LINES}
    assert between(README, README_BLOCK) == readme_block(found)
    report = (ROOT / "docs" / "results.md").read_text()
    experiments, studies = (
        {name: made for name, made in all_of.items() if name in found}
        for all_of in (EXPERIMENTS, STUDIES)
    )
    for name, text in blocks(found, experiments, studies).items():
        assert between(report, name) == text.strip(), name


@pytest.mark.parametrize("page", ["README.md", "DESIGN.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_named_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", (ROOT / page).read_text(), re.M))
    assert named >= ({"demo", "dist"} if page == "README.md" else {"test", "kernels-check"})
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.M)] == []
