"""The noise floor of score files, against numbers that are known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from score_example import example
from study_world import inputs_of
from test_scores import damage

from mergekit_wp.console import no_progress
from mergekit_wp.errors import BadInput
from mergekit_wp.floor import floors
from mergekit_wp.geometry import Kind
from mergekit_wp.scores import Scores, read_scores, write_scores
from mergekit_wp.scores_cli import main
from mergekit_wp.study import certainty


def made(shuffles=3, tasks=("a", "b"), size=1.0, seed=0) -> Scores:
    """Scores with those of shuffled updates, `size` of them as large."""
    plain, random = example(tasks), torch.Generator().manual_seed(seed)
    meta = replace(plain.meta, utility="kl", anchor_layer=None, split=None, shuffles=shuffles, format=5)
    own = {
        name: replace(task, anchor=None, shuffled={
            str(kind): size * torch.randn(shuffles, *getattr(task, kind).shape, generator=random) for kind in Kind
        })
        for name, task in plain.tasks.items()
    }  # fmt: skip
    return Scores.from_tasks(meta, own)


def test_above_is_what_a_loop_counts():
    scores = made()
    found = {(x.task, x.kind, x.share): x for x in floors(scores)}
    assert {task for task, _kind, _share in found} == {"a", "b", None}
    for kind in Kind:
        null = sorted(scores.tasks["a"].shuffled[kind].flatten().tolist())
        own = getattr(scores.tasks["a"], kind).flatten().tolist()
        for share in (0.95, 0.99):
            each = found["a", kind, share]
            assert sum(x > each.threshold for x in null) <= (1 - share) * len(null) + 1e-9
            assert sum(x >= each.threshold for x in null) > (1 - share) * len(null) - 1e-9
            assert each.above == sum(x > each.threshold for x in own)
            assert each.components == len(own)
    mean = torch.stack([scores.tasks[task].shuffled["heads"] for task in "ab"]).mean(0).flatten().sort().values
    assert found[None, Kind.HEAD, 0.95].threshold == pytest.approx(float(mean[int(0.95 * len(mean))]))


def test_noise_lies_above_as_often_as_it_should_and_what_is_larger_more_often():
    above, held_out = {1.0: 0, 0.1: 0}, []
    for size in above:
        for seed in range(20):
            scores = made(tasks=("a",), size=size, seed=seed)
            for each in (x for x in floors(scores) if x.kind == Kind.NEURON and x.share == 0.95):
                above[size] += each.above
                held_out.append(each.by_shuffles)
    assert above[1.0] <= 0.15 * 600
    assert above[0.1] >= 0.3 * 600
    assert 0.03 < sum(held_out) / len(held_out) < 0.09  # 5 %, and a little more by the finite others
    assert all(x.by_shuffles is None for x in floors(made(shuffles=1)))


def test_it_is_read_back_shown_and_part_of_a_study(tmp_path):
    scores, path = made(), tmp_path / "s.safetensors"
    write_scores(scores, path)
    again = read_scores(path)
    assert again.meta == scores.meta
    assert list(floors(again)) == list(floors(scores))
    assert list(floors(again["b"])) == [x for x in floors(scores) if x.task == "b"]
    assert "95 % of the shuffled" in CliRunner().invoke(main, [str(path)]).output
    data = json.loads(CliRunner().invoke(main, [str(path), "--json"]).output)
    assert len(data["files"][str(path)]["floors"]) == 3 * 2 * 2
    inputs = inputs_of({"x": scores, "plain": example()})
    part = certainty.work(inputs.study, inputs, no_progress)
    assert len(part.data["floors"]) == 2 * 2 * 2
    assert "score above 95 % of those of the shuffled update" in part.section
    assert not list(floors(example()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, meta: meta.update(shuffles=2), r"has shape \[3, 3, 4\], expected \[2, 3, 4\]"),
        (lambda tensors, meta: meta.pop("shuffles"), "no shuffles, and of a"),
        (lambda tensors, meta: tensors.pop("tasks/b/shuffled/heads"), r"3 shuffles, and of b \['neurons'\]"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, change, said):
    write_scores(made(), tmp_path / "s.safetensors")
    damage(tmp_path / "s.safetensors", change)
    with pytest.raises(BadInput, match=said):
        read_scores(tmp_path / "s.safetensors")
