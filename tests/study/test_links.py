"""What the links of a study are made into, against plain counts on made-up links; and the part on tiny models."""

from __future__ import annotations

import json
from itertools import product

import pytest
import tiny
import torch
from safetensors.torch import load_file
from study_world import inputs_of, scores, write_study

from mergekit_wp.console import no_progress
from mergekit_wp.geometry import Component, Kind
from mergekit_wp.study import link_tables
from mergekit_wp.study.inputs import read_inputs
from mergekit_wp.study.link_descent import LinkTables
from mergekit_wp.study.link_run import Ranked, TaskLinks, anchor_of, choose, ranking_of
from mergekit_wp.study.links import PART, findings, work
from mergekit_wp.study.parts import write_part
from mergekit_wp.study.study_spec import read_study

LAYERS, COUNT = 3, {Kind.HEAD: 4, Kind.NEURON: 20}
K = 5


@pytest.fixture
def inputs():
    return inputs_of({"ap": scores(method="ap", utility="anchor"), "kl": scores(1), "wp": scores(2, utility="anchor")})


def ranked(seed: int, kind: Kind) -> Ranked:
    table_Ln = torch.randn(LAYERS, COUNT[kind], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Ranked("made up", table_Ln, torch.ones_like(table_Ln, dtype=torch.bool))


@pytest.fixture
def found(inputs) -> TaskLinks:
    """Random links; what is not below a target is 0."""
    ap = {kind: ranked(seed, kind) for seed, kind in enumerate(Kind)}
    chosen = choose(inputs.study, "a", ap)
    random = torch.Generator().manual_seed(7)
    tables = {}
    for kind in Kind:
        table = torch.randn(1 + len(chosen.all), LAYERS, COUNT[kind], generator=random, dtype=torch.float64)
        for row, target in enumerate(chosen.all, start=1):
            table[row, target.layer + (target.kind == Kind.NEURON and kind == Kind.HEAD) :] = 0
        tables[kind] = table
    return TaskLinks(chosen, LinkTables(chosen.all, tables), ap, {kind: ranked(3, kind) for kind in Kind})


def test_targets_and_controls(inputs, found) -> None:
    chosen = found.chosen
    table_LH = found.ap[Kind.HEAD].table_Ln
    best = sorted(product((1, 2), range(4)), key=lambda at: -float(table_LH[at]))
    wanted = [at for at in best[:2] if table_LH[at] > 0]  # a third of the 8 that have something below them
    assert [(t.layer, *t.indices) for t in chosen.heads] == wanted
    for head, other, noise in zip(chosen.heads, chosen.others, chosen.noise, strict=True):
        assert other.layer == head.layer
        assert other not in chosen.heads
        assert (noise.layer, noise.indices) == (head.layer, head.indices)
        assert noise.noise
    assert [t.layer for t in chosen.attention] == [1, 2]
    assert sum(len(t.indices) for t in chosen.neurons) == 8
    assert choose(inputs.study, "a", found.ap) == chosen
    full = {**found.ap, Kind.HEAD: Ranked("x", torch.tensor([[0.0], [1.0]]), torch.ones(2, 1, dtype=torch.bool))}
    assert choose(inputs.study, "a", full).others == [None]


def test_the_file_that_says_most_is_taken(inputs) -> None:
    assert anchor_of(inputs) == 1
    ap = ranking_of(inputs, "a", Kind.HEAD, ("ap", "atp"), 1)
    assert ap.source == "ap"
    assert torch.equal(ap.table_Ln, inputs.scores["ap"].tasks["a"].heads[:2].double())
    assert ranking_of(inputs, "a", Kind.HEAD, ("exact", "writeback", "attr"), 1).source == "wp"
    assert ranking_of(inputs, "a", Kind.HEAD, ("ap", "atp"), 2) is None
    assert ranking_of(inputs, "c", Kind.HEAD, ("ap", "atp"), 1) is None
    executed = link_tables.execution(inputs.study, inputs, "a", 1)
    assert {kind: each["scores"] for kind, each in executed.items()} == {"heads": "kl", "neurons": "kl"}
    table_LF = inputs.scores["kl"].tasks["a"].neurons
    first = Component.parse(executed["neurons"]["components"][0][0])
    assert float(table_LF[first.layer, first.index]) == float(table_LF[2:].max())
    assert first.layer > 1
    assert all(score > 0 for _name, score, _other in executed["neurons"]["components"])


def leaders(table, places, k) -> set:
    return set(sorted(places, key=lambda at: -float(table[at]))[:k])


def test_overlaps_are_counts(found) -> None:
    attr = found.links.attr(Kind.NEURON)
    rows = list(link_tables.overlaps("a", found, K))
    assert {row["k"] for row in rows} == {K}  # 25 times as many are more than there are
    every = list(product(range(LAYERS), range(COUNT[Kind.NEURON])))
    assert sum(row["role"] == "AP heads" for row in rows) == 4 * len(found.chosen.heads)
    targets = {(role, number): target for role, number, target in link_tables.roles(found)}
    for row in rows:
        target = targets[row["role"], row["number"]]
        below = [at for at in every if at[0] < target.layer]
        keyed = torch.abs if row["key"] == "absolute" else torch.clone
        own = leaders(keyed(found.links.link(Kind.NEURON, target)), below, K)
        among = every if row["against"] == "all layers" else below
        top = leaders(keyed(attr), among, K)
        assert row["overlap"] == pytest.approx(len(own & top) / K)
        assert row["by_chance"] == pytest.approx(len(top & set(below)) / len(below))
    for row in link_tables.table_1(rows):
        own = [r["overlap"] for r in rows if all(r[key] == row[key] for key in ("task", "role", "k", "key", "against"))]
        assert (row["most"], row["mean"]) == (max(own), pytest.approx(sum(own) / len(own)))


def test_flow_and_sources_are_sums_and_counts(inputs, found) -> None:
    attr = found.links.attr(Kind.NEURON)
    rows = list(link_tables.flow("a", found, K))
    assert {row["role"] for row in rows} == {"AP heads", "other heads", "random need", "all heads"}
    for row in rows:
        below = product(range(row["layer"]), range(COUNT[Kind.NEURON]))
        top = [at for at in leaders(attr, below, K) if attr[at] > 0]
        assert row["effect"] == pytest.approx(sum(float(attr[at]) for at in top))
        if row["role"] == "all heads":
            link = found.links.link(Kind.NEURON, found.chosen.attention[row["number"]])
            assert row["share"] == pytest.approx(sum(float(link[at]) for at in top) / row["effect"])
    circuit = link_tables.circuit(inputs.study, inputs, "a", found, 1)
    wanted = []
    for target in (*found.chosen.heads, *found.chosen.neurons):
        for kind in Kind:
            link, wp = found.links.link(kind, target), found.wp[kind].table_Ln
            reach = target.layer + (target.kind == Kind.NEURON and kind == Kind.HEAD)
            below = list(product(range(reach), range(COUNT[kind])))
            k = inputs.study.top[kind]
            both = leaders(link, below, k) & leaders(wp, product(range(LAYERS), range(COUNT[kind])), k)
            wanted += [
                (Component(kind, *at).name, link_tables.name_of(target)) for at in both if link[at] > 0 and wp[at] > 0
            ]
    assert sorted((source, target) for source, target, _link in circuit["links"]) == sorted(wanted)
    named = {node["name"] for node in circuit["nodes"]}
    assert {name for source, target, _link in circuit["links"] for name in (source, target)} <= named


def test_controls_are_paired(found) -> None:
    rows = [
        {"task": "a", "role": role, "number": number, "share": share}
        for role, shares in {"AP heads": (3, 2, 5), "random need": (1, 2, 9), "other heads": (2,)}.items()
        for number, share in enumerate(shares)
    ]
    assert link_tables.beats(rows, "share", "random need") == (1, 2)
    assert link_tables.beats(rows, "share", "other heads") == (1, 1)


def test_the_part_finds_a_planted_chain(tmp_path) -> None:
    """Of an expert that moved one neuron of layer 0, every head has that neuron as its source, or none; also where the
    activation side is ranked here."""
    base = tiny.random_model("llama", seed=1)
    expert = tiny.fine_tuned(base, seed=2, size=0.0)
    with torch.no_grad():
        expert.model.layers[0].mlp.down_proj.weight[:, 3] *= 1.5
    tiny.save(base, tmp_path / "base"), tiny.save(expert, tmp_path / "expert")
    pairs = [{"task": "a", "prompt": f"w1 w{n} w5 w6 w2", "contrast": f"w1 w{n} w2"} for n in (10, 12, 14)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prompts = {"pairs": str(tmp_path / "pairs.jsonl"), "device": "cpu"}
    study = read_study(str(write_study(tmp_path, {"kl": {"tasks": ("a",)}}, prompts=prompts)))
    result = work(study, read_inputs(study), no_progress)
    write_part(PART, tmp_path / "out", {}, result)
    circuit = json.loads((tmp_path / "out/links/circuit.json").read_text())["a"]
    assert circuit["rankings"]["aggregation"] == {"heads": "atp", "neurons": "atp"}
    assert {source for source, _target, _link in circuit["links"]} == {"L0N3"}
    assert any(target[2] == "H" for _source, target, _link in circuit["links"])
    gathers = [node["name"] for node in circuit["nodes"] if node["role"] == "aggregation" and node["kind"] == "heads"]
    assert gathers
    tables = load_file(tmp_path / "out/links/links.safetensors")
    assert tables["a/neurons"].shape[0] == len(result.data["targets"]["a"])
    assert {tuple(at) for at in tables["a/neurons"].nonzero()[:, 1:].tolist()} == {(0, 3)}
    assert "pass on" in result.answers["path"].text


def test_nothing_to_say_is_said() -> None:
    (said,) = findings({"flow": [], "overlaps": [], "sources": [], "k": 3})
    assert said.startswith("No head gathers anything here")
