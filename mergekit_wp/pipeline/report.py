"""OUT/report.html: what a pipeline has found and how, on one page that needs nothing else.

Of a pipeline without evaluation, scores or a merge by `wp`, the page has the other parts. Nothing is measured for it:
answers are those that `wp-eval --log-samples` kept.

Legend: K experts, L layers.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from mergekit_wp.console import percent, quiet_option
from mergekit_wp.eval.results import AVERAGE
from mergekit_wp.eval.tables import Table, colour_note, read_results, results_html, stands
from mergekit_wp.execute import Step
from mergekit_wp.files import write_text
from mergekit_wp.foreign import echo
from mergekit_wp.geometry import Kind
from mergekit_wp.merge.certificate import CERTIFICATE, MeanShares, read_certificate
from mergekit_wp.page import frame, render
from mergekit_wp.pictures import are_shares, expert_colour, recovery_lines, shares_svg
from mergekit_wp.pipeline.examples import Example, examples_of
from mergekit_wp.pipeline.spec import Pipeline, read_pipeline
from mergekit_wp.pipeline.steps import (
    derived_files,
    merged_folder,
    model_of,
    pipeline_steps,
    report_file,
    results_folder,
    score_files,
)
from mergekit_wp.ranking import findings
from mergekit_wp.score_page import score_articles
from mergekit_wp.scores import Scores, read_scores

TITLE = "Merging by Weight Patching"
LEAD = (
    "Weight Patching scores, for every attention head and MLP neuron of an expert, how much of its capability that one "
    "component carries when it alone is put into the base."
)
_FAINT = 0.01


@dataclass(frozen=True)
class Report:
    """All that the page shows, whatever of it there is. Names are the pipeline's: of experts, and of merges.

    shares: of each merge by `wp`, as its audit found them, with the experts by name
    steps: (title, command, files that it reads: (name, text)) of each step
    """

    table: Table | None
    scores: Mapping[str, Scores]
    merges: Sequence[str]
    shares: Mapping[str, MeanShares]
    examples: Sequence[Example]
    steps: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]

    def html(self, title: str = TITLE, lead: str = LEAD) -> str:
        """The whole page."""
        body = render(
            "report.html",
            findings=self._findings(),
            results=self.table and results_html(self.table, self.merges),
            warnings=self.table.warnings() if self.table else [],
            notes=self._notes(),
            examples=self.examples,
            experts=score_articles(self.scores) if self.scores else None,
            recovery=[
                (name, recovery_lines(scores.meta.recovery, expert_colour(place), name))
                for place, (name, scores) in enumerate(self.scores.items())
                if scores.meta.recovery
            ],
            shares=self._shares(),
            faint=percent(_FAINT),
            steps=self.steps,
        )
        return frame(title, lead, body, self._foot())

    def _findings(self) -> list[str]:
        """The result of the merges, and of each expert where its score lies."""
        found = merge_findings(self.table, self.merges) if self.table else []
        return found + [findings(scores, name)[0] for name, scores in self.scores.items()]

    def _notes(self) -> list[str]:
        if self.table is None:
            return []
        best = ["Bold: the best merge."] if any(row.model.name in self.merges for row in self.table.rows) else []
        return [*self.table.notes("Small"), *colour_note(self.table), *best]

    def _shares(self) -> list[tuple[str, Any]]:
        """(merges, picture) of each kind of shares: merges that differ in scale alone have the same."""
        same: list[tuple[MeanShares, list[str]]] = []
        for merge, shares in self.shares.items():
            found = next((names for other, names in same if other == shares), None)
            found.append(merge) if found is not None else same.append((shares, [merge]))
        pictures = []
        for shares, merges in same:
            tables = {str(kind): np.array(shares[kind.value]) for kind in Kind}
            scored = list(self.scores.values())
            faint = {
                kind: faint_layers(scored if are_shares(table) else (), kind, len(table[0]))
                for kind, table in tables.items()
            }
            name = ", ".join(merges)
            pictures.append((name, shares_svg(tables, shares["experts"], faint, name)))
        return pictures

    def _foot(self) -> str:
        if not self.scores:
            return ""
        meta = next(iter(self.scores.values())).meta
        packages = ", ".join(f"{name} {value}" for name, value in meta.versions.items())
        return f"Scored {meta.date[:10]} in {meta.dtype} with {packages}."


def faint_layers(files: Sequence[Scores], kind: str, layers: int) -> np.ndarray:
    """Layers [L] with under 1 % of the positive scores of a kind, summed over experts; none where shapes differ."""
    tables = [getattr(scores, kind).double().clamp(min=0).sum(1).numpy() for scores in files]
    if not tables or any(len(table) != layers for table in tables):
        return np.zeros(layers, dtype=bool)
    total_L = np.sum(tables, axis=0)
    return total_L < _FAINT * max(total_L.sum(), np.finfo(float).tiny)


def merge_findings(table: Table, merges: Sequence[str]) -> list[str]:
    """Which merge has the highest average, and whether errors explain its distance to the baseline, or (of the baseline
    itself) to the next merge; a sentence."""
    rows = [row for row in table.rows if row.model.name in merges and table.has(row, AVERAGE)]
    if not rows:
        return []
    best, *others = sorted(rows, key=lambda row: -table.value(row, AVERAGE))
    what = f"has the highest average of {len(rows)} merges," if others else "has an average of"
    *equal, last = [row.model.name for row in rows if table.value(row, AVERAGE) == table.value(best, AVERAGE)]
    if equal:
        return [
            f"{', '.join(equal)} and {last} have the same average, the highest of {len(rows)} merges: "
            f"{table.number(best, AVERAGE)} %."
        ]
    text = f"{best.model.name} {what} {table.number(best, AVERAGE)} %"
    rival = table.base_row if table.base_row not in (None, best) else next(iter(others), None)
    if rival is None or not table.has(rival, AVERAGE):
        return [f"{text}."]
    points = 100 * (table.value(best, AVERAGE) - table.value(rival, AVERAGE))
    side = f"{abs(points):.2f} points {'above' if points > 0 else 'below'}" if points else "the same as"
    known = points and table.stderr(best, AVERAGE) is not None and table.stderr(rival, AVERAGE) is not None
    beyond = "more than" if stands(table, best, rival, AVERAGE) else "no more than"
    return [f"{text}, {side} {rival.model.name}" + (f", {beyond} their errors explain." if known else ".")]


def report_of(pipeline: Pipeline, steps: Sequence[Step]) -> Report:
    """What there is of a pipeline; `steps` are those that the page is to show."""
    scores = {name: read_scores(path) for name, path in score_files(pipeline).items()}
    results = results_folder(pipeline) / "results.json"
    table = read_results(results) if pipeline.evaluate is not None else None
    shares = {}
    for merge in pipeline.merges:
        certificate = read_certificate(merged_folder(pipeline, merge) / CERTIFICATE)
        if certificate is not None and certificate.shares is not None:
            shares[merge] = _with_names(certificate.shares, pipeline)
    examples = examples_of(table, results.parent, list(pipeline.experts), list(pipeline.merges)) if table else []
    texts = derived_files(pipeline)
    shown = []
    for step in steps:
        files = [(str(path), texts[path]) for path in step.inputs if path in texts and step.stage != "report"]
        shown.append((step.title, wrapped(step.command), files))
    return Report(table, scores, list(pipeline.merges), shares, examples, shown)


def _with_names(shares: MeanShares, pipeline: Pipeline) -> MeanShares:
    """The same with the pipeline's names of experts, where the last part of a model's name tells which it is."""
    names: dict[str, list[str]] = {}
    for name in pipeline.experts:
        names.setdefault(Path(model_of(pipeline, name)).name, []).append(name)
    known = [names[e][0] if len(names.get(e, [])) == 1 else e for e in shares["experts"]]
    return MeanShares(experts=known, heads=shares["heads"], neurons=shares["neurons"])


def wrapped(words: Sequence[str], width: int = 96) -> str:
    """A shell command over several lines, which can be pasted as it is; a flag stays with its value."""
    parts: list[str] = []
    for word in words:
        value_of_flag = parts and parts[-1].startswith("--") and " " not in parts[-1] and word[:2] != "--"
        if value_of_flag:
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 1 > width:
            lines.append("   ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines)


@click.command()
@click.argument("pipeline_file", metavar="PIPELINE.yaml")
@quiet_option()
def main(pipeline_file: str, quiet: bool) -> None:
    """Write OUT/report.html from what wp-run has made of PIPELINE.yaml."""
    pipeline = read_pipeline(pipeline_file)
    write_text(report_file(pipeline), report_of(pipeline, pipeline_steps(pipeline, allow_code=True)).html())
    if not quiet:
        echo(f"wrote {report_file(pipeline)}")


if __name__ == "__main__":
    main()
