"""Score files on a page: what stands out, maps of heads and neurons, the strongest by name."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from mergekit_wp.geometry import Kind
from mergekit_wp.page import frame, grid, render, section
from mergekit_wp.pictures import expert_colour, map_svg, scale_of, score_map
from mergekit_wp.ranking import findings
from mergekit_wp.score_tables import (
    Grid,
    comparison,
    of_audits,
    of_components,
    of_floors,
    of_layers,
    of_missed,
    of_tasks,
)
from mergekit_wp.scores import ScoreMeta, Scores

JUDGED = {  # by the utility of the scores
    "kl": "A component is judged by its effect on the prediction of the next token.",
    "anchor": "A component is judged by its effect on the capability's direction at the anchor, the dashed line.",
    "staged": "Up to the anchor, the dashed line, a component is judged by its effect on the capability's direction in "
    "the residual stream, above it by its effect on the next token.",
    "staged-projection": "Up to the anchor, the dashed line, a component is judged by its effect on the capability's "
    "direction there, above it by its effect on that after the last layer.",
    "projection": "A component is judged by its effect on the capability's direction after the last layer.",
}


def score_page(found: Mapping[str, Scores], top: int) -> str:
    """A page of its own about some score files, by name."""
    body = section("Where the score lies", score_articles(found, top))
    if len(found) > 1:
        audited = of_audits(found)
        body += section("How far they agree", grid(comparison(found)) + (grid(audited) if audited else Markup("")))
    return frame("Scores of heads and neurons", "", body)


def _judged(meta: ScoreMeta) -> str:
    text = JUDGED.get(meta.utility, "")
    return text.replace("the next token", "each token of the expert's answers") if meta.answer_tokens else text


def _tables(scores: Scores, top: int) -> list[Grid]:
    every = [of_components(scores, top), of_floors(scores), of_missed(scores), of_tasks(scores), of_layers(scores)]
    return [table for table in every if table]


def score_articles(found: Mapping[str, Scores], top: int = 10) -> Markup:
    """An article a file, with pictures on one scale."""
    scale = {kind: scale_of([score_map(scores, kind) for scores in found.values()]) for kind in Kind}
    return render("scores.html", experts=[
        {
            "name": name,
            "meta": scores.meta,
            "colour": expert_colour(place),
            "used": sum(max(u.used for u in task.utilities.values()) for task in scores.meta.tasks.values()),
            "judged": _judged(scores.meta),
            "findings": findings(scores, name),
            "tables": Markup("").join(grid(table) for table in _tables(scores, top)),
            **{kind: map_svg(scores, kind, scale[kind], expert_colour(place), name) for kind in Kind},
        }
        for place, (name, scores) in enumerate(found.items())
    ])  # fmt: skip
