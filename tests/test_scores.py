"""Score files: what is written is read back, and nothing damaged is read."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from score_example import example

from mergekit_wp.errors import BadInput
from mergekit_wp.scores import (
    Scores,
    read_scores,
    write_scores,
)


def damage(path, change):
    """Rewrite a score file through `change(tensors, meta)`."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(file.metadata()["wp"])
    change(tensors, meta)
    save_file(tensors, path, metadata={"wp": json.dumps(meta)})


def test_round_trip(tmp_path):
    written = example()
    write_scores(written, tmp_path / "s.safetensors")
    got = read_scores(tmp_path / "s.safetensors")
    assert got.meta == written.meta
    assert {k: v.tolist() for k, v in got.tensors().items()} == {k: v.tolist() for k, v in written.tensors().items()}
    assert sorted(got.tensors()) == sorted(
        ["heads", "neurons", *(f"tasks/{t}/{p}" for t in "ab" for p in ("heads", "neurons", "anchor"))]
    )


def test_a_file_without_an_anchor_round_trips(tmp_path):
    """As `kl` writes it: no direction, so no tensor, no layer, no split and no alpha."""
    whole = example()
    tasks = {name: replace(task, anchor=None) for name, task in whole.tasks.items()}
    written = Scores.from_tasks(replace(whole.meta, anchor_layer=None, split=None), tasks)
    write_scores(written, tmp_path / "s.safetensors")
    got = read_scores(tmp_path / "s.safetensors")
    assert got.meta == written.meta
    assert got.tasks["a"].anchor is None
    assert not any("anchor" in name for name in got.tensors())
    with pytest.raises(ValueError, match="anchor layer None, and an anchor of a"):
        replace(whole, meta=written.meta)


@pytest.mark.parametrize("number", [1, 2])
def test_files_of_older_formats_are_read(tmp_path, number):
    """They have neither a task's alpha nor a subset."""
    path = tmp_path / "s.safetensors"
    write_scores(example(), path)

    def age(_tensors, meta):
        meta["format"] = number
        if number > 1:
            return
        del meta["subset"]
        for task in meta["tasks"].values():
            del task["alpha"]

    damage(path, age)
    got = read_scores(path)
    assert torch.equal(got.heads, example().heads)
    assert got.meta.tasks["a"].alpha is None
    assert torch.equal(got.tasks["a"].anchor, example().tasks["a"].anchor)
    assert got.complete


def test_parts_and_subset_round_trip(tmp_path):
    whole = example()
    parts = {"q": torch.ones(3, 4), "down": torch.ones(3, 10)}
    tasks = {name: replace(t, parts={k: v.clone() for k, v in parts.items()}) for name, t in whole.tasks.items()}
    mask = {"heads": torch.zeros(3, 4, dtype=torch.bool), "neurons": torch.ones(3, 10, dtype=torch.bool)}
    written = Scores.from_tasks(replace(whole.meta, subset={"components": "neurons"}), tasks, mask)
    write_scores(written, tmp_path / "s.safetensors")
    got = read_scores(tmp_path / "s.safetensors")
    assert not got.complete
    assert got.scored["neurons"].all()
    assert not got.scored["heads"].any()
    assert torch.equal(got.parts["q"], parts["q"])
    assert torch.equal(got.tasks["b"].parts["down"], parts["down"])


def test_overall_scores_are_the_mean_over_tasks():
    scores = example()
    assert torch.equal(scores.heads, (scores.tasks["a"].heads + scores.tasks["b"].heads) / 2)
    assert torch.equal(scores.neurons, (scores.tasks["a"].neurons + scores.tasks["b"].neurons) / 2)


def _set(key, index, value):
    return lambda tensors, _meta: tensors[key].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("heads", (0, 0), float("nan")), "heads holds a NaN"),
        (_set("tasks/a/anchor", 3, float("inf")), "tasks/a/anchor holds a NaN or an infinity"),
        (lambda t, m: t.update(neurons=t["neurons"][:, :9].clone()), r"neurons has shape [3, 9], expected [3, 10]"),
        (lambda t, m: t.update(heads=t["heads"].double()), "heads has dtype torch.float64"),
        (lambda t, m: t.pop("heads"), "has no heads"),
        (lambda t, m: t.pop("tasks/b/neurons"), "has no tasks/b/neurons"),
        (lambda t, m: t.update(more=torch.zeros(1)), "unexpected tensors ['more']"),
        (lambda t, m: m.update(format=6), "format version 6"),
        (lambda t, m: t.update({"parts/q": torch.zeros(3, 10)}), "parts/q has shape [3, 10], expected [3, 4]"),
        (lambda t, m: t.update({"parts/k": torch.zeros(3, 4)}), "unexpected tensors ['parts/k']"),
        (lambda t, m: t.update({"scored/heads": torch.full((3, 4), 0.5)}), "scored/heads holds other values than 0"),
        (lambda t, m: m.pop("anchor_layer"), "anchor_layer"),
        (lambda t, m: m.update(anchor_layer=3), "anchor layer 3 of 3"),
        (lambda t, m: m.update(anchor_layer=None), "unexpected tensors ['tasks/a/anchor'"),
        (lambda t, m: t.pop("tasks/b/anchor"), "has no tasks/b/anchor"),
        (lambda t, m: m.update(surprise=1), "surprise"),
        (lambda t, m: m["geometry"].update(heads=0), "heads"),
        (lambda t, m: m["geometry"].update(architecture="GPT2LMHeadModel"), "GPT2LMHeadModel"),
        (lambda t, m: m.update(tasks={}), "tasks"),
        (lambda t, m: m.update(method="x"), "method: found 'x', expected one of writeback"),
        (lambda t, m: m.update(utility=None), "utility: found None, expected a valid string"),
        (lambda t, m: m.update(gap="ratio"), "gap: found 'ratio', expected one of sample, mean"),
        (lambda t, m: m.update(dtype="int8"), "dtype: found 'int8'"),
        (lambda t, m: m.update(seed="0"), "seed: found '0', expected a valid integer"),
        (lambda t, m: m.update(seed=True), "seed: found True"),
        (lambda t, m: m.update(anchor_layer=1.0), "anchor_layer: found 1.0, expected a valid integer"),
        (lambda t, m: m.update(date=None), "date: found None"),
        (lambda t, m: m.update(date="yesterday"), "date: found 'yesterday', expected an ISO 8601 date"),
        (lambda t, m: m.update(versions=5), "versions: found 5"),
        (lambda t, m: m.update(versions={"torch": 2.1}), "versions.torch: found 2.1"),
        (lambda t, m: m["base"].update(config="C" * 64), "base.config: found 'CCC"),
        (lambda t, m: m["base"].update(more=1), "unknown field base.more"),
        (lambda t, m: m["expert"].pop("tensors"), "the field expert.tensors is missing"),
        (lambda t, m: m["geometry"].update(surprise=1), "unknown field geometry.surprise"),
        (lambda t, m: m["tasks"]["a"].update(scoring=-1), "tasks.a.scoring: found -1, expected greater than or equal"),
        (lambda t, m: m["tasks"]["a"].update(scoring=7), "tasks.a: anchor has 7 prompts used and 1 dropped of 7"),
        (lambda t, m: m["tasks"]["a"]["utilities"].update(x={"used": 1, "dropped": 0, "mean_gap": 1}), "expected one"),
        (lambda t, m: m["tasks"]["a"]["utilities"]["kl"].update(mean_gap="1"), "tasks.a.utilities.kl.mean_gap: found"),
        (_set("heads", (1, 2), 9.0), "heads is not the mean over the tasks"),
        (_set("tasks/b/neurons", (1, 2), 9.0), "neurons is not the mean over the tasks"),
        (
            lambda t, m: t.update({"parts/q": torch.zeros(3, 4), "tasks/a/parts/q": torch.zeros(3, 4)}),
            "b has the parts [], all tasks ['q']",
        ),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, change, said):
    path = tmp_path / "s.safetensors"
    write_scores(example(), path)
    damage(path, change)
    with pytest.raises(BadInput) as caught:
        read_scores(path)
    assert str(path) in caught.value.message
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "cannot be read"), (b"PK\x03\x04zip", "cannot be read"), (b"\xff" * 64, "cannot be read")],
)
def test_not_safetensors(tmp_path, content, said):
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=said):
        read_scores(path)


def test_other_safetensors_and_missing(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="without the `wp` metadata"):
        read_scores(tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="no such score file"):
        read_scores(tmp_path / "y.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "z.safetensors", metadata={"wp": "not json"})
    with pytest.raises(BadInput, match=re.escape("z.safetensors")):
        read_scores(tmp_path / "z.safetensors")


def test_a_scores_object_that_exists_is_valid():
    scores = example()
    with pytest.raises(ValueError, match="NaN"):
        replace(scores, heads=scores.heads * float("nan"))


def test_metadata_is_plain_json(tmp_path):
    write_scores(example(), tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["wp"])
    wanted = json.loads(json.dumps(asdict(example().meta)))
    # Left out, so that programs before those fields read the file.
    left_out = ("prompts", "object", "answer_tokens", "at", "prompt_ids", "shuffles")
    assert [wanted.pop(name) for name in left_out] == [None] * 6
    assert meta == wanted
    assert meta["tasks"]["a"]["utilities"]["anchor"] == {"used": 7, "dropped": 1, "mean_gap": 0.25}


def test_a_file_gets_the_permissions_of_the_umask_which_is_never_changed(tmp_path, monkeypatch):
    """Changed for an instant, it would hold for the files that other threads are making."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda _mask: pytest.fail("the umask was changed"))
            write_scores(example(), tmp_path / "s.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s.safetensors").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    import safetensors.torch

    def broken(_tensors, path, **_options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        write_scores(example(), tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []
