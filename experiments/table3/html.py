"""The table as one HTML page: the summary, a picture with error bars, and every block; nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.table3.formats import GROUPS, MODELS, SUMMARIES, caption, grid_of, models, summary, verdict
from experiments.table3.table import MEAN, RivalTable
from experiments.table3.variants import BASELINE
from mergekit_wp.page import figure, frame, grid, render_text, section
from mergekit_wp.palette import INK
from mergekit_wp.pictures import to_svg

_LEAD = (
    "Three experts were fine-tuned from one small base, on instructions, sums and small Python functions. Each "
    "combination of them is merged by mergekit's own methods, by WIDEN, by Weight Patching and by a fit, and graded on "
    "all three capabilities. Methods with hyper-parameters have a row for their authors' setting, for the one with the "
    "least loss on unlabelled prompts, and for the one that did best on labelled validation items."
)


_LINES = "{% for line in lines %}<p>{{ line }}</p>{% endfor %}"
_BLOCKS = """
{% for title, lines in blocks %}
<article><h3>{{ title }}</h3>{{ grid(lines) }}</article>
{% endfor %}
"""


def to_html(table: RivalTable, notes: Sequence[str] = ()) -> str:
    """The whole page."""
    words = render_text(_LINES, lines=[*verdict(table), *caption(table), *notes])
    drawn = figure("", picture(table))
    sections = [
        *(section(title, grid(summary(table, column))) for column, title in SUMMARIES.items()),
        section("What this says, and what it cannot", words),
        section("With error bars", drawn),
        section(MODELS, grid(models(table))),
    ]
    for combination in table.combinations:
        groups = {group: title for group, title in GROUPS.items() if table.of(combination, group)}
        blocks = [(title, grid_of(table, combination, group)) for group, title in groups.items()]
        sections.append(section(combination, render_text(_BLOCKS, blocks=blocks, grid=grid)))
    return frame(f"Merges on {table.world}", _LEAD, Markup("").join(sections))


def picture(table: RivalTable) -> Markup:
    """A panel a combination: the mean of each method with its standard error over seeds, and each seed as a dot."""
    titles, combinations = list(table.lines), table.combinations
    figure = Figure(figsize=(10, 0.26 * len(titles) + 1.1), layout="constrained")
    panels = figure.subplots(1, len(combinations), sharey=True, squeeze=False)[0]
    for axes, combination in zip(panels, combinations, strict=True):
        for place, by in enumerate(table.lines.values()):
            if (row := by.get(combination)) is None:
                continue
            spread, colour = row.cells[MEAN], "#d55e00" if row.ours else "#0072b2"
            axes.plot(spread.values, [place] * len(spread.values), ".", color=colour, alpha=0.35, ms=5)
            axes.errorbar(spread.mean, place, xerr=spread.error, fmt="o", color=colour, capsize=3, ms=5, lw=1.6)
            if row.title == BASELINE:
                axes.axvline(spread.mean, color=INK, lw=0.9, ls=(0, (4, 2)))
        axes.set_title(combination, fontsize=10)
        axes.set_xlabel("percent right")
        axes.set_yticks(range(len(titles)), titles)
    panels[0].invert_yaxis()
    return to_svg(figure, "Mean over the three capabilities of each method in each combination, with error bars")
