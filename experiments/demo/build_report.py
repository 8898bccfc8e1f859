"""report.html: one page with everything in it, from a results table, score files and the commands used.

No scripts and no requests to anywhere: style and pictures are in the page itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import click

from experiments.demo.demo_pipeline import EXPERTS, MERGES, demo_steps, write_pipeline
from experiments.demo.pictures import expert_colour, head_map, neuron_map, recovery_lines, share_bars
from experiments.demo.template import JUDGED, LEAD, PAGE, RECOVERY, SCORES, SHARES
from experiments.demo.world_choice import WorldChoice, world_options
from mergekit_wp.eval.tables import Table, read_results
from mergekit_wp.files import write_text
from mergekit_wp.foreign import echo, html, one_line_each
from mergekit_wp.merge.kernel import component_weights
from mergekit_wp.pipeline.steps import results_folder, score_file
from mergekit_wp.report import PAGE_STYLE
from mergekit_wp.scores import Scores, read_scores


@dataclass(frozen=True)
class Command:
    """One step as a person would type it, with a line on what it is for."""

    title: str
    text: str


@dataclass(frozen=True)
class Report:
    """All that the page shows. `scores` maps each expert's name to its score file, in the merge's order."""

    table: Table
    scores: dict[str, Scores]
    merges: Sequence[str]
    commands: Sequence[Command]

    def html(self) -> str:
        sections = [
            _section("Results", _results(self.table, self.merges)),
            _section("Where each capability is written", SCORES + "".join(map(self._expert, self.scores))),
            *self._recovery(),
            _section("Which expert carries which layer of the merge", self._shares()),
            _section("Each step by hand", _commands(self.commands)),
        ]
        return PAGE.format(style=PAGE_STYLE, lead=LEAD, body="\n".join(sections), foot=self._foot())

    def _expert(self, name: str) -> str:
        scores, colour = self.scores[name], expert_colour(list(self.scores).index(name))
        meta = scores.meta
        used = sum(max(u.used for u in task.utilities.values()) for task in meta.tasks.values())
        anchor = "" if meta.read_at is None else f", anchor layer {meta.read_at}"
        about = (
            f"Method <code>{html(meta.method)}</code>, utility <code>{html(meta.utility)}</code>{anchor}, "
            f"{used} prompts of {len(meta.tasks)} {'task' if len(meta.tasks) == 1 else 'tasks'}. "
            f"{JUDGED.get(meta.utility, '')}"
        )
        heads = head_map(scores.heads, meta.read_at, colour)
        neurons = neuron_map(scores.neurons, meta.read_at, colour)
        return (
            f'<article><h3><span class="dot" style="background:{colour}"></span>{html(name)}</h3>'
            f"<p>{about}</p>"
            f'<div class="pair"><figure><figcaption>Heads</figcaption>{heads}</figure>'
            f"<figure><figcaption>Neurons, sorted within each layer</figcaption>{neurons}</figure></div></article>"
        )

    def _recovery(self) -> list[str]:
        """How the anchor layers were chosen; nothing where they were given."""
        figures = []
        for index, (name, scores) in enumerate(self.scores.items()):
            if curve := scores.meta.recovery:
                lines = recovery_lines(curve, expert_colour(index))
                figures.append(f"<figure><figcaption>{html(name)}</figcaption>{lines}</figure>")
        if not figures:
            return []
        return [_section("How each anchor layer was chosen", f'{RECOVERY}<div class="pair">{"".join(figures)}</div>')]

    def _shares(self) -> str:
        names = list(self.scores)
        heads = component_weights([scores.heads for scores in self.scores.values()])
        neurons = component_weights([scores.neurons for scores in self.scores.values()])
        return (
            f'{SHARES}<div class="pair"><figure>{share_bars(heads, names, "heads")}</figure>'
            f"<figure>{share_bars(neurons, names, 'neurons')}</figure></div>"
        )

    def _foot(self) -> str:
        meta = next(iter(self.scores.values())).meta
        packages = ", ".join(f"{html(name)} {html(str(value))}" for name, value in meta.versions.items())
        return f"Scored {html(meta.date[:10])} in {html(meta.dtype)} with {packages}."


def _results(table: Table, merges: Sequence[str]) -> str:
    """The table; the best merge of each column is bold, the other models are there to compare with."""
    merged = [row for row in table.rows if row.model.name in merges]
    best = {column: max((table.value(row, column) for row in merged), default=None) for column in table.columns}
    head = "".join(f"<th>{html(column)}</th>" for column in table.columns)
    lines = []
    for row in table.rows:
        cells = []
        for column in table.columns:
            value, difference = table.value(row, column), table.difference(row, column)
            text = f"{100 * value:.1f}"
            if row in merged and value == best[column]:
                text = f"<strong>{text}</strong>"
            if row in merged and difference is not None:
                kind = "up" if difference > 0 else "down" if difference < 0 else "same"
                text += f'<small class="{kind}">{100 * difference:+.1f}</small>'
            elif table.baseline:
                text += "<small></small>"  # keeps the figures of a column under one another
            cells.append(f"<td>{text}</td>")
        kind = ' class="merge"' if row in merged else ""
        lines.append(f"<tr{kind}><th>{html(table.label(row))}</th>{''.join(cells)}</tr>")
    note = "Percent of test items answered right. Bold: the best merge."
    if table.baseline:
        note += f" Small: points of difference to <em>{html(table.baseline)}</em>, the plain average."
    if items := sorted({cell.samples for row in table.rows for cell in row.cells.values() if cell.samples}):
        errors = [table.stderr(row, c) or 0 for row in merged for c in table.columns[:-1]]
        note += f" {items[0]} items a capability" + (" or more" if len(items) > 1 else "")
        note += f"; a standard error is at most {100 * max(errors, default=0):.1f} points."
    differences = ' class="differences"' if table.baseline else ""
    return (
        f'<div class="scroll"><table{differences}><thead><tr><th>model</th>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{note}</p>'
    )


def _commands(commands: Sequence[Command]) -> str:
    return "".join(
        f"<h3>{html(command.title)}</h3><pre><code>{escape(one_line_each(command.text))}</code></pre>"
        for command in commands
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html(title)}</h2>\n{body}</section>"


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
@click.argument("out", type=Path)
@world_options
def main(out: Path, worlds: Path, seed: int, smoke: bool) -> None:
    """Write OUT/report.html from the demo's results, score files and recipes."""
    pipeline = write_pipeline(out)
    commands = []
    for step in demo_steps(pipeline, WorldChoice(worlds, seed, smoke)):
        files = [path for path in step.inputs if path.parent in (out / "recipes", out / "scoring")]
        shown = [f"# {path}\n{path.read_text(encoding='utf-8')}" for path in files if step.name != "report"]
        commands.append(Command(step.title, "\n".join([*shown, wrapped(step.command)])))
    scores = {expert: read_scores(score_file(pipeline, expert)) for expert in EXPERTS}
    report = Report(read_results(results_folder(pipeline) / "results.json"), scores, MERGES, commands)
    write_text(out / "report.html", report.html())
    echo(f"wrote {out / 'report.html'}")


if __name__ == "__main__":
    main()
