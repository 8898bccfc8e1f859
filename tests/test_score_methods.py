"""What a `Scores` answers in Python: leaders, one task, a table, agreement, a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from score_example import example

from mergekit_wp.errors import BadInput
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.scores import Scores


def by_hand(scores):
    """Every component with its score, highest first, heads and neurons together."""
    found = []
    for kind in ("heads", "neurons"):
        for (layer, index), value in np.ndenumerate(getattr(scores, kind).numpy()):
            found.append((-value, Component(Kind(kind), layer, index)))
    return sorted(found, key=lambda pair: pair[0])


def test_top_is_the_order_by_hand():
    scores = example()
    wanted = by_hand(scores)
    found = scores.top(9)
    assert found == [component for _, component in wanted[:9]]
    assert [c.score for c in found] == [-np.float64(value) for value, _ in wanted[:9]]
    assert scores.top(4, "heads") == [c for _, c in wanted if c.kind == "heads"][:4]
    assert len(scores.top(10**6)) == 3 * 4 + 3 * 10
    assert repr(scores.top(1)[0]).startswith(found[0].name)


def test_one_task_is_a_whole_score_file():
    scores = example()
    alone = scores["b"]
    assert list(scores) == ["a", "b"]
    assert list(alone) == ["b"]
    assert torch.equal(alone.heads, scores.tasks["b"].heads)
    assert torch.equal(alone.tasks["b"].anchor, scores.tasks["b"].anchor)
    assert [c for _, c in by_hand(alone)[:5]] == alone.top(5)
    assert alone.meta.tasks == {"b": scores.meta.tasks["b"]}


def test_a_table_has_every_number_once():
    scores = example()
    table = scores.to_frame()
    assert list(table.columns) == ["kind", "layer", "index", "score", "tasks/a", "tasks/b"]
    assert len(table) == 42
    row = table[(table.kind == "neurons") & (table.layer == 2) & (table["index"] == 7)].iloc[0]
    assert row.score == scores.neurons[2, 7]
    assert row["tasks/b"] == scores.tasks["b"].neurons[2, 7]
    assert len(scores.to_frame("heads")) == 12


def test_what_was_not_scored_leads_nothing_and_is_nan():
    whole = example(("a",))
    mask = torch.zeros(3, 10)
    mask[1, :3] = 1
    part = Scores.from_tasks(whole.meta, whole.tasks, {"heads": torch.zeros(3, 4), "neurons": mask})
    assert {c.name for c in part.top(50)} == {"L1N0", "L1N1", "L1N2"}
    assert int(part.to_frame().score.notna().sum()) == 3
    same = whole.compare(part, k=2)
    assert [(a.kind, a.components) for a in same] == [("heads", 0), ("neurons", 3)]


def test_agreement_by_hand():
    one, other = example(("a",)), example(("b", "a"))
    other = other["a"]
    heads, neurons = one.compare(other, k=5)
    for agreement, kind in ((heads, "heads"), (neurons, "neurons")):
        a, b = (getattr(each, kind).flatten().numpy() for each in (one, other))
        tops = [{i for i in np.argsort(-x)[:5] if x[i] > 0} for x in (a, b)]
        assert agreement.overlap == {5: len(tops[0] & tops[1]) / 5}
        assert agreement.spearman == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert [a.spearman for a in one.compare(one)] == pytest.approx([1, 1])


def test_bad_questions_are_sentences():
    scores = example()
    with pytest.raises(BadInput, match="no scores of a task 'z'; there are those of a, b"):
        scores["z"]
    with pytest.raises(BadInput, match="k: found 0"):
        scores.top(0)
    with pytest.raises(BadInput, match="k: found True"):
        scores.compare(scores, k=True)
    with pytest.raises(BadInput, match="kind: found 'head', expected heads or neurons"):
        scores.top(3, "head")


def test_the_picture_is_a_png_in_a_notebook(tmp_path):
    figure = example().plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "scores.svg")
    assert "rank of the neuron" in (tmp_path / "scores.svg").read_text()


def test_components_are_read_as_they_are_written():
    for name in ("L0H0", "L12N345"):
        assert Component.parse(name).name == name
    with pytest.raises(BadInput, match="found 'L1X2', expected a head"):
        Component.parse("L1X2")
