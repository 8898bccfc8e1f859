"""Score files in the experts' own folders, and what mergekit-evolve makes of `merge_method: wp`."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from merge_checks import assert_merged, make_lora, refused, rewrite, run, same_files
from merge_world import World, merge, reference, tensors_of, write_random_scores
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.merge import register
from mergekit_wp.merge.shares import BESIDE


def put_beside(world, k, folder=None):
    """The expert's score file moves into its folder (or another)."""
    target = (folder or world.expert(k)) / BESIDE
    target.parent.mkdir(exist_ok=True)
    shutil.move(world.score(k), target)
    return target


def without_scores(world, **more):
    models = [{"model": str(world.expert(k))} for k in range(world.experts)]
    return {"merge_method": "wp", "base_model": str(world.base), "models": models, **more}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "w", "llama").build()


def test_scores_are_found_in_the_experts_folders(world):
    want = reference(world)
    before = Checkpoint.open(str(world.expert(0))).fingerprint
    for k in range(2):
        put_beside(world, k)
    assert Checkpoint.open(str(world.expert(0))).fingerprint == before
    assert_merged(tensors_of(merge(world, without_scores(world))), want)
    text = run(world.recipe(without_scores(world)), world.root / "audited")
    assert "48 slices of 12 kinds" in text
    assert_merged(tensors_of(world.root / "audited"), want)
    assert "mean share" in run(world.recipe(without_scores(world)), "--dry-run")


def test_a_file_that_the_recipe_names_wins(world):
    want = reference(world)
    other = put_beside(world, 1)
    write_random_scores(world.score(1), str(world.base), str(world.expert(1)), seed=1)
    write_random_scores(other, str(world.base), str(world.expert(1)), seed=7)
    put_beside(world, 0)
    config = without_scores(world)
    config["models"][1]["parameters"] = {"scores": str(world.score(1))}
    assert_merged(tensors_of(merge(world, config)), want)


def test_it_is_checked_as_any_other(world):
    put_beside(world, 0)
    beside = put_beside(world, 1)
    rewrite(world.expert(1), lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    assert refused(world, without_scores(world)).startswith(f"{beside}: these scores were made for the expert ")
    beside.write_text("no")
    assert str(beside) in refused(world, without_scores(world))


def test_neither_names_both_ways(world):
    put_beside(world, 0)
    message = refused(world, without_scores(world))
    assert message.startswith(f"{world.expert(1)}: no scores are given")
    assert "wp/scores.safetensors in the expert's own folder" in message


def test_a_loras_scores_lie_with_the_lora(world):
    lora = world.root / "lora"
    make_lora(world.base, lora, seed=3)
    name = f"{world.base}+{lora}"
    put_beside(world, 0)
    write_random_scores(world.score(1), str(world.base), name, seed=1)
    named = world.config()
    named["models"][1]["model"], named["models"][0] = name, {"model": str(world.expert(0))}
    cache = str(world.root / "loras")
    want = merge(world, named, "named", lora_merge_cache=cache)
    put_beside(world, 1, lora)
    config = without_scores(world)
    config["models"][1]["model"] = name
    assert same_files(merge(world, config, lora_merge_cache=cache), want)
    make_lora(world.base, lora, seed=4)  # trained again, while mergekit would take its merge of the old one
    with pytest.raises(BadInput, match="was made before its base or LoRA was last written"):
        merge(world, config, "stale", lora_merge_cache=cache)


# --- mergekit-evolve -------------------------------------------------------------------------------------------------


@pytest.fixture
def evolved(tmp_path):
    """A world as evolution needs it: scores in the experts' folders, bfloat16, which its recipes read in."""
    register()
    world = World(tmp_path / "w", "llama", experts=3, dtypes=[torch.bfloat16] * 4).build()
    return world


def genome_of(world, **more):
    """As mergekit-evolve reads its YAML."""
    text = yaml.safe_dump(
        {
            "merge_method": "wp",
            "base_model": str(world.base),
            "models": [str(world.expert(k)) for k in range(3)],
            **more,
        }
    )
    return ModelGenome(ModelGenomeDefinition.model_validate(yaml.safe_load(text)))


def put_all_beside(world):
    for k in range(3):
        put_beside(world, k)


def test_the_first_genotype_is_the_papers_rule(evolved):
    want = reference(evolved)
    put_all_beside(evolved)
    genome = genome_of(evolved)
    start = genome.initial_genotype()
    assert start.shape == (1, 3, 1, 2)
    config = genome.genotype_merge_config(start)
    assert_merged(tensors_of(merge(evolved, config)), want, torch.bfloat16)


def test_a_random_genotype_is_the_recipe_written_by_hand(evolved):
    torch.manual_seed(0)
    genome = genome_of(evolved)
    genotype = genome.initial_genotype(random=True)
    genotype[0, 1, 0, 0] *= -1  # evolution is unbounded; mergekit takes weights without their sign
    genotype[0, 2, 0, 1] *= -1  # and scales as they are
    prior, scales = genotype[0, :, 0, 0].abs().tolist(), genotype[0, :, 0, 1].tolist()
    want = reference(evolved, prior=prior, scales=scales)
    own = [{"weight": w, "scale": s} for w, s in zip(prior, scales, strict=True)]
    by_hand = merge(evolved, evolved.config(own, dtype="bfloat16"), "by-hand")
    put_all_beside(evolved)
    config = genome.genotype_merge_config(genotype.view(-1).numpy())
    got = merge(evolved, config, "evolved")
    assert same_files(got, by_hand)
    assert_merged(tensors_of(got), want, torch.bfloat16)
    # What evolution saves at its end can be merged, checked and audited by wp-merge.
    best = evolved.root / "best_config.yaml"
    best.write_text(config.to_yaml())
    assert "48 slices of 12 kinds" in run(best, evolved.root / "best")
    assert same_files(evolved.root / "best", by_hand)


def test_layers_of_their_own(evolved):
    """layer_granularity 2: two slices, each with numbers of its own."""
    torch.manual_seed(1)
    genome = genome_of(evolved, layer_granularity=2)
    genotype = genome.initial_genotype(random=True)
    halves = [reference(evolved, prior=g[:, 0, 0].tolist(), scales=g[:, 0, 1].tolist()) for g in genotype]
    put_all_beside(evolved)
    out = tensors_of(merge(evolved, genome.genotype_merge_config(genotype)))
    want = {
        name: halves[int(name.split(".")[2]) // 2 if ".layers." in name else int(not name.startswith("model.embed"))][
            name
        ]
        for name in halves[0]
    }
    assert_merged(out, want, torch.bfloat16)


def test_smooth_gradients_and_filters(evolved):
    torch.manual_seed(2)
    genome = genome_of(evolved, layer_granularity=2, smooth=True, filters=["self_attn"])
    genotype = genome.initial_genotype(random=True)
    attention, rest = ([[genotype[:, k, f, p].tolist() for p in (0, 1)] for k in range(3)] for f in (0, 1))
    own = [
        {
            name: [{"filter": "self_attn", "value": attention[k][p]}, {"value": rest[k][p]}]
            for p, name in enumerate(("weight", "scale"))
        }
        for k in range(3)
    ]
    by_hand = merge(evolved, evolved.config(own, dtype="bfloat16"), "by-hand")
    put_all_beside(evolved)
    assert same_files(merge(evolved, genome.genotype_merge_config(genotype), "evolved"), by_hand)


def test_resharded_experts_have_no_scores(evolved):
    """mergekit-evolve saves copies by default, which the score files do not follow; the error says what to do."""
    assert "--no-reshard" in refused(evolved, genome_of(evolved).genotype_merge_config(torch.ones(1, 3, 1, 2)))
