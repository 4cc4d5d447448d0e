"""`python -m benchmarks.study demo|results|study|score|report|pack|unpack`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from benchmarks.study import (
    budget,
    causal_lm,
    dit,
    dit_study,
    further,
    layers,
    masked_lm,
    recurrent,
    vit,
    vit_study,
)
from benchmarks.study.archive import Archive
from benchmarks.study.costing import COSTS_PART, run_costs
from benchmarks.study.experiment import REPORT, Experiment
from benchmarks.study.report import speed_of_writing
from benchmarks.study.report.curves import picture_name
from benchmarks.study.report.documents import README, of_experiment, write_documents
from benchmarks.study.report.figures import budget_figure
from benchmarks.study.report.finished import Finished, finished, finished_study, score
from benchmarks.study.report.page import write_page
from benchmarks.study.rows import Study
from benchmarks.study.running import QUICK, run_quick, run_study, status
from benchmarks.study.topics.experiment import EXPERIMENT as TOPICS
from dblocks.recipes.image_grid import save_png

PAGE = Path("build/study.html")
PICTURES = Path("docs/images")
EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        vit.EXPERIMENT,
        vit.FASHION,
        dit.EXPERIMENT,
        causal_lm.EXPERIMENT,
        causal_lm.GCIDE,
        masked_lm.EXPERIMENT,
        recurrent.EXPERIMENT,
        TOPICS,
    )
}
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        vit_study.FASHION,
        vit_study.DIGITS,
        dit_study.FASHION_FINAL,
        dit_study.FASHION_STUDY,
        dit_study.DIGITS_STUDY,
        layers.TEXT,
        budget.STUDY,
        *further.STUDIES,
    )
}


def comparisons() -> list[Finished]:
    """What the report shows."""
    return [comparison(name) for name in {**EXPERIMENTS, **STUDIES}]


def comparison(name: str) -> Finished:
    """What there is of an experiment or a study; where both are on the same data of the study."""
    if name in STUDIES:
        return finished_study(STUDIES[name], EXPERIMENTS.get(name))
    return finished(EXPERIMENTS[name])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("demo", help="minutes: digits, one seed, a third of the steps")
    one.add_argument("--out", type=Path, default=vit.DEMO, help="folder of run.json and the figure")
    full = commands.add_parser("results", help="hours: the whole recipes, resumable")
    _add_names(full, EXPERIMENTS)
    full.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    full.add_argument("--records", type=Path, help="folder of the records of one experiment")
    full.add_argument("--report", type=Path, default=REPORT, help="file with the tables' markers")
    full.add_argument("--figure", type=Path, help="the PNG of one experiment to write")
    study = commands.add_parser("study", help="hours: every method, ablation and budget, resumable")
    _add_names(study, STUDIES)
    study.add_argument(
        "--rows", nargs="*", help="rows of one study, also those that are not planned"
    )
    study.add_argument("--part", help="such as methods, budget or costs; all by default")
    study.add_argument("--all", action="store_true", help="also rows that are not planned")
    study.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    study.add_argument("--records", type=Path, help="folder of the records of one study")
    study.add_argument("--quick", action="store_true", help="minutes: a hundredth of the steps")
    study.add_argument("--list", action="store_true", help="what there is, what is missing")
    for command, text in (
        ("pack", "move records that were added as files into the studies' archives"),
        ("unpack", "write the records of archives as files, to look at or delete some"),
    ):
        moved = commands.add_parser(command, help=text)
        _add_names(moved, {**EXPERIMENTS, **STUDIES})
    scored = commands.add_parser("score", help="judge the samples of the records of text")
    _add_names(scored, EXPERIMENTS, nargs="+")
    report = commands.add_parser(
        "report",
        help="from the records a page, docs/results.md, README's table and the pictures in "
        "docs/images; with --out only a page and the pictures beside it; runs nothing",
    )
    report.add_argument("--out", type=Path, default=PAGE, help="the HTML page to write")
    report.add_argument("--results", type=Path, help=f"the page of all tables, {REPORT}")
    report.add_argument("--readme", type=Path, help=f"the page of five rows, {README}")
    return parser


def _add_names(
    parser: argparse.ArgumentParser, known: Collection[str], nargs: Literal["*", "+"] = "*"
) -> None:
    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {text!r}")
        return text

    every = "; all by default" if nargs == "*" else ""
    parser.add_argument(
        "names", nargs=nargs, type=name, metavar="NAME", help=f"of {', '.join(known)}{every}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """One command; a mistake is one line on stderr and the exit code 2."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (ImportError, ValueError, OSError) as error:
        print(f"dblocks: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.command == "demo":
        vit.demo(args.out)
        return
    if args.command == "study":
        _study(args)
        return
    if args.command == "report":
        _report(args)
        return
    if args.command in ("pack", "unpack"):
        every: dict[str, Experiment | Study] = {**EXPERIMENTS, **STUDIES}
        for name in args.names or every:
            archive = Archive(every[name].records)
            if archive.load():
                getattr(archive, args.command)()
        return
    for name in args.names or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        if args.command == "score":
            score(experiment)
        else:
            experiment.results(args.records, args.figure, args.report, args.workers)


def _report(args: argparse.Namespace) -> None:
    """Writes the page and the documents."""
    found = comparisons()
    pictures = PICTURES if args.out == PAGE else args.out.parent
    write_page(found, args.out)
    by_name = {f.name: f for f in found}
    for name, experiment in EXPERIMENTS.items():
        rows = of_experiment(by_name[name], experiment).rows
        if rows:
            experiment.draw(rows, pictures / experiment.figure.name)
    for one in found:
        if one.curve:
            save_png(budget_figure(one), pictures / picture_name(one))
    if (written := speed_of_writing.stored()) is not None:
        speed_of_writing.draw(written, pictures / speed_of_writing.PICTURE)
    results, readme = (REPORT, README) if args.out == PAGE else (None, None)
    results, readme = args.results or results, args.readme or readme
    write_documents(by_name, EXPERIMENTS, STUDIES, results, readme)
    pages = ", ".join(str(page) for page in (args.out, results, readme) if page is not None)
    print(f"wrote {pages} and the pictures in {pictures}")


def _study(args: argparse.Namespace) -> None:
    """Runs, tries or lists the rows that were asked for."""
    for name in args.names or STUDIES:
        study = STUDIES[name]
        names = args.rows or study.names(args.part, planned=not (args.list or args.all))
        rows = [study.row(row) for row in names]
        folder = args.records or (QUICK / name if args.quick else study.records)
        if args.list:
            print(status(study, rows, folder))
            continue
        if rows:
            (run_quick if args.quick else run_study)(study, rows, folder, workers=args.workers)
        # Costs are of runs that train in the usual way.
        if not args.rows and args.part in (None, COSTS_PART) and study.train is None:
            run_costs(study, folder)


if __name__ == "__main__":
    sys.exit(main())
