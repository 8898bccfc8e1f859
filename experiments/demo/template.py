"""The frame of the report page: its words of introduction and its HTML skeleton."""

from __future__ import annotations

LEAD = (
    "Three experts were trained from one small base model. Weight Patching scores, for every attention head and "
    "MLP neuron of an expert, how much of its capability that one component carries when it alone is put into "
    "the base. The merge <em>wp</em> takes each component from the experts in proportion to those scores; "
    "<em>linear</em> is their plain average."
)

SCORES = (
    "<p>A score is the share of the distance from base to expert that one component covers when it alone is "
    "taken from the expert: 1 would be all of it. White is nothing; grey is negative, which counts as 0 in a "
    "merge. The bars at the side add up each layer's positive scores.</p>"
)

JUDGED = {  # by the utility of the scores
    "kl": "A component is judged by its effect on the prediction of the next token.",
    "anchor": "A component is judged by its effect on the capability's direction at the anchor, the dashed line.",
    "staged": "Up to the anchor, the dashed line, a component is judged by its effect on the capability's direction in "
    "the residual stream, above it by its effect on the next token.",
    "staged-projection": "Up to the anchor, the dashed line, a component is judged by its effect on the capability's "
    "direction there, above it by its effect on that after the last layer.",
    "projection": "A component is judged by its effect on the capability's direction after the last layer.",
}

RECOVERY = (
    "<p>The anchor layer was chosen by behaviour: the base is steered along the capability's direction after one "
    "layer at a time and answers held-out prompts. Recovery is the share of the distance in right answers from base "
    "to expert that this covers (dotted: in the prediction of the next token). The dashed line is the layer chosen."
    "</p>"
)

SHARES = (
    "<p>A component of the merge is a mixture of the experts' own, in proportion to their scores for it. Shown "
    "is the mean weight over the components of a layer; at the dashed lines it would be a plain average.</p>"
)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Merging by Weight Patching: the miniature world</title>
<style>{style}</style>
</head>
<body>
<header><h1>Merging by Weight Patching</h1><p>{lead}</p></header>
<main>
{body}
</main>
<footer>{foot}</footer>
</body>
</html>
"""
