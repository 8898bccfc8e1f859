"""A LoRA merged into its base computes what peft computes with the two side by side."""

from __future__ import annotations

import json

import peft
import pytest
import tiny
import torch
from merge_checks import edit_config, rewrite, run
from merge_world import World, merge, tensors_of, write_random_scores
from mergekit.common import ModelReference
from transformers import AutoModelForCausalLM, AutoTokenizer
from where import DEVICE

from mergekit_wp.checkpoint.adapters import adds_to_an_end, check_merged, merged_folder, vocabulary_rows
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.vocabulary import head_is_tied
from mergekit_wp.checkpoint.weights import read_header
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.score import score

IDS = torch.arange(3, 20)[None]
V = tiny.SHAPE["vocab_size"]
ON_ENDS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "both alike": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "own head": {"modules_to_save": ["lm_head"]},
    "own embeddings": {"modules_to_save": ["embed_tokens"]},
    "own both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "own both alike": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "some tokens": {"trainable_token_indices": [5, 6]},
    "neither": {},
}


def adapt(base, folder, rows=V, **options):
    """Save a random LoRA over the model in `base`, resized to `rows`; peft's own model of the two."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows != V:
        model.resize_token_embeddings(rows, mean_resizing=False)
    config = peft.LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj", "up_proj"], **options})
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    model = tiny.random_model("llama", tie_word_embeddings=True, num_hidden_layers=1)
    return tiny.save(model, tmp_path_factory.mktemp("tied") / "base")


@pytest.mark.parametrize("name", ON_ENDS)
def test_on_the_ends_of_a_tied_model(tied, tmp_path, name):
    """What mergekit's own merge gets wrong for the first four: there a sum lands in both ends, or twice."""
    adapted = adapt(tied, tmp_path / "lora", **ON_ENDS[name])
    reference = ModelReference.parse(f"{tied}+{tmp_path / 'lora'}")
    folder = merged_folder(reference, tmp_path / "cache", False)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), logits(adapted))
    assert head_is_tied(Checkpoint.open(str(folder))) == (
        name in ("both alike", "own both alike", "some tokens", "neither")
    )
    assert adds_to_an_end(read_header(tmp_path / "lora" / "adapter_model.safetensors")) == (
        name in ("head", "embeddings", "both", "both alike")
    )
    assert folder == tmp_path / "cache" / f"{reference.model._unique_id()}_{reference.lora._unique_id()}"


def test_a_kept_merge_of_other_files_is_made_anew(tied, tmp_path):
    """mergekit knows it by its two paths, at which a LoRA may have been trained again."""
    lora, cache = tmp_path / "lora", tmp_path / "cache"
    reference = ModelReference.parse(f"{tied}+{lora}")
    adapt(tied, lora)
    folder = merged_folder(reference, cache, False)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert merged_folder(reference, cache, False) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    check_merged(reference, cache, folder)
    adapted = adapt(tied, lora, target_modules=["q_proj"])
    with pytest.raises(BadInput, match="was made before its base or LoRA was last written"):
        check_merged(reference, cache, folder)
    (folder / "wp_made_of.json").unlink()  # mergekit's own has none
    with pytest.raises(BadInput, match="was made before its base or LoRA was last written"):
        check_merged(reference, cache, folder)
    merged_folder(reference, cache, False)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(adapted))
    with pytest.raises(BadInput, match="in another dtype"):
        check_merged(reference, cache, folder, "bfloat16")
    merged_folder(reference, cache, False, "bfloat16")
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {torch.bfloat16}


ADDED = {
    "saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved beside": {},  # peft saves resized embeddings of itself where it finds the base
    "factors": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


@pytest.fixture(params=ADDED)
def world(request, tmp_path):
    """root/base, and root/e0, a LoRA trained with two added tokens over it."""
    world = World(tmp_path / "w", "llama", experts=0).build()
    world.adapted = adapt(world.base, world.expert(0), V + 2, **ADDED[request.param])
    return world


def test_added_tokens(world):
    """Scored on the rows that both have, and merged into the base's rows, as full experts are."""
    name = f"{world.base}+{world.expert(0)}"
    assert vocabulary_rows(read_header(world.expert(0) / "adapter_model.safetensors")) == V + 2
    prompts = [f"w{i} w{i + 1} w5" for i in range(4)]
    pairs = world.root / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"task": "t", "prompt": prompt}) + "\n" for prompt in prompts))
    job = ScoringJob(base=str(world.base), expert=name, pairs=str(pairs), device=DEVICE, dtype="float32")
    gap = score(job).meta.tasks["t"].utilities["kl"].mean_gap
    base, tokenizer, gaps = (
        AutoModelForCausalLM.from_pretrained(world.base),
        AutoTokenizer.from_pretrained(world.base),
        [],
    )
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        theirs, ours = (logits(m, ids)[0, -1, :V].double().log_softmax(-1) for m in (world.adapted, base))
        gaps.append(float((theirs.exp() * (theirs - ours)).sum()))
    assert gap == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    with pytest.raises(BadInput, match="cannot be streamed; use --offload none"):
        score(ScoringJob(base=str(world.base), expert=name, pairs=str(pairs), offload="stream"))

    scores = write_random_scores(world.root / "s.safetensors", str(world.base), name, seed=0)
    models = [{"model": name, "parameters": {"scores": str(scores)}}]
    out = world.root / "out"
    run(world.recipe({"merge_method": "wp", "base_model": str(world.base), "models": models}), out)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.config.vocab_size == V
    torch.testing.assert_close(logits(merged), logits(world.adapted)[..., :V], rtol=1e-4, atol=1e-4)


def test_an_end_of_a_tied_base_is_not_merged_into_both(tmp_path):
    world = World(tmp_path / "w", "qwen2", experts=0).build()
    adapt(world.base, world.expert(0), target_modules=["lm_head", "q_proj"])
    config = {
        "merge_method": "widen",
        "base_model": str(world.base),
        "models": [{"model": f"{world.base}+{world.expert(0)}"}],
    }
    said = "this LoRA adds to the embeddings or the output head"
    assert said in run(world.recipe(config), world.root / "out", code=2)
    assert said in run(world.recipe(config), world.root / "out", "--dry-run", code=2)
    with pytest.raises(BadInput, match=said):
        merge(world, config, lora_merge_cache=str(world.root / "cache"))
    # The way out that it names.
    rewrite(world.base, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    edit_config(world.base, tie_word_embeddings=False)
    run(world.recipe(config), world.root / "out")
    base, out = tensors_of(world.base), tensors_of(world.root / "out")
    assert torch.equal(out["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(out["lm_head.weight"], base["lm_head.weight"])
