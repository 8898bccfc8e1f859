"""wp-score from the command line: YAML and flags, and one clear sentence for every bad input."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from score_commands import refused, run
from where import DEVICE

from mergekit_wp.scores import read_scores
from mergekit_wp.scoring.cli import main
from mergekit_wp.scoring.pairs import BUILTIN, Pair, builtin_words, by_task, load_pairs, split_pairs, warn_of_repeats


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny.save_pair(root, "llama")
    rows = [{"task": "t", "prompt": f"w{i} w{i + 1} w5", "contrast": f"w{i} w{i + 1}"} for i in range(8)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_flags_write_a_valid_file(world):
    result, path = run(world, out="flags.safetensors", layer=1, method="attr", utility="anchor")
    assert result.exit_code == 0, result.output
    scores = read_scores(path)
    assert (scores.meta.method, scores.meta.utility, scores.meta.anchor_layer) == ("attr", "anchor", 1)
    assert (scores.meta.tasks["t"].extraction, scores.meta.tasks["t"].scoring) == (4, 4)
    assert "Leading heads" in result.output


def test_yaml_and_flags_over_it(world):
    job = {"base": str(world / "base"), "expert": str(world / "expert"), "pairs": str(world / "pairs.jsonl"),
           "layer": 2, "samples": 6, "device": DEVICE}  # fmt: skip
    (world / "job.yaml").write_text(yaml.safe_dump(job))
    path = world / "yaml.safetensors"
    flags = ["--layer", "1", "--utility", "staged", "--out", str(path), "--quiet"]
    result = CliRunner().invoke(main, [str(world / "job.yaml"), *flags])
    assert (result.exit_code, result.output) == (0, "")
    scores = read_scores(path)
    assert (scores.meta.anchor_layer, scores.meta.tasks["t"].extraction) == (1, 3)


def test_only_what_was_scored_can_lead(world):
    result, _path = run(world, out="heads.safetensors", components="heads")
    assert "Leading heads" in result.output
    assert "Leading neurons" not in result.output
    result, _path = run(world, out="anchor.safetensors", utility="anchor", layer=0)
    assert re.findall(r"L(\d+)[HN]", result.output) == ["0"] * 9  # four heads, five neurons


def test_same_seed_same_file_other_seed_other_scores(world):
    runs = [run(world, out=f"seed{i}.safetensors", seed=seed, samples=6) for i, seed in enumerate((0, 0, 1))]
    a, b, c = (read_scores(path) for _result, path in runs)
    assert torch.equal(a.heads, b.heads)
    assert not torch.equal(a.heads, c.heads)


def test_built_in_pairs_run(world):
    """Words that the tokenizer does not know become <unk>; lengths are what differs, which is enough to run."""
    result, path = run(world, out="builtin.safetensors", pairs="builtin:maths", samples=4)
    assert result.exit_code == 0, result.output
    assert list(read_scores(path).tasks) == ["maths"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "./nowhere"}, ["./nowhere", "no such model folder"]),
        ({"expert": None}, ["expert", "needs this field"]),
        ({"pairs": "missing.jsonl"}, ["missing.jsonl", "cannot read"]),
        ({"pairs": "builtin:poems"}, ["poems", "instructions"]),
        ({"layer": 4}, ["layer", "layers 0 to 3"]),
        ({"layer": -1}, ["layer", "-1"]),
        ({"samples": 9}, ["8 rows", "9 were asked"]),
        ({"template": "no slot"}, ["template", "{prompt}"]),
        ({"device": "cuda:7"}, ["device", "cuda:7"]),
        ({"dtype": "float16"}, ["float16", "bfloat16"]),
        ({"gap_floor": 99}, ["all 8 scoring prompts were dropped", "99"]),
    ],
    ids=str,
)
def test_bad_flags(world, changes, said):
    refused(*run(world, **changes), *said)


@pytest.mark.parametrize("option", ["method", "utility", "split", "dtype"])
def test_unknown_choice_lists_what_there_is(world, option):
    result, path = run(world, **{option: "nonsense"})
    refused(result, path, "nonsense", option)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "line 2: not valid JSON"),
        ('["list"]', "line 2: expected an object"),
        ('{"task": "t"}', "line 2: the field prompt"),
        ('{"task": "t", "prompt": 5}', "line 2: the field prompt"),
        ('{"task": "t", "prompt": "w1", "contrast": ""}', "line 2: the field contrast"),
        ('{"task": "a/b", "prompt": "w1"}', "line 2: the task name"),
        ('{"task": "t", "prompt": "w1", "tsk": "x"}', "unknown field 'tsk'"),
        ('{"task": "t", "prompt": "w1"}', "mixes rows with and without"),
    ],
)
def test_malformed_pairs_name_the_line(world, line, said):
    pairs = world / "bad.jsonl"
    pairs.write_text('{"task": "t", "prompt": "w1 w2", "contrast": "w1"}\n' + line + "\n")
    refused(*run(world, pairs=pairs), "bad.jsonl", said)


def test_yaml_errors(world):
    for content, said in [("base: [", "not valid YAML"), ("- a", "mapping"), ("bse: x", "unknown field 'bse'")]:
        (world / "bad.yaml").write_text(content)
        refused(*run(world, world / "bad.yaml"), "bad.yaml", said)
    (world / "bad.yaml").write_text("method: exactly")
    refused(*run(world, world / "bad.yaml"), "method", "writeback")
    refused(*run(world, world / "none.yaml"), "none.yaml", "cannot read")


def test_expert_equal_to_base(world):
    refused(*run(world, expert=world / "base"), "equal those of the base")


def test_expert_that_differs_in_one_element_is_not_equal(world, tmp_path):
    """Its fingerprint, which samples the weights, may equal the base's; the comparison must not rest on that."""
    copy = tmp_path / "one"
    shutil.copytree(world / "base", copy)
    name = "model.layers.0.mlp.down_proj.weight"

    def move(tensors):
        if name in tensors:
            tensors[name][3, 7] += 5.0

    _edit_weights(copy, move)
    result, path = run(world, out="one.safetensors", expert=copy, utility="kl", gap_floor=1e-9)
    assert result.exit_code == 0, result.output
    assert read_scores(path).neurons.nonzero().tolist() == [[0, 7]]


def test_expert_of_another_shape(world, tmp_path):
    other = tiny.save(tiny.random_model("llama", num_hidden_layers=3), tmp_path / "other")
    refused(*run(world, expert=other), "layers 3 against 4")


def test_expert_of_another_architecture(world, tmp_path):
    other = tiny.save(tiny.random_model("mistral"), tmp_path / "other")
    refused(*run(world, expert=other), "MistralForCausalLM against LlamaForCausalLM")


def test_unsupported_architecture(world, tmp_path):
    copy = tmp_path / "gpt"
    shutil.copytree(world / "base", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["MixtralForCausalLM"]}))
    refused(*run(world, base=copy), "MixtralForCausalLM", "LlamaForCausalLM", "Gemma2ForCausalLM")


def _edit_weights(folder, change):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def test_nan_weights_are_named(world, tmp_path):
    copy = tmp_path / "nan"
    shutil.copytree(world / "expert", copy)
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensors):
        if name in tensors:
            tensors[name][0, 0] = float("nan")

    _edit_weights(copy, poison)
    refused(*run(world, expert=copy), name, "NaN")


def test_missing_tensor_is_named(world, tmp_path):
    """transformers alone would fill it with random numbers."""
    model = tmp_path / "less"
    tiny.save(tiny.random_model("llama", seed=9), model, max_shard_size="1GB")
    _edit_weights(model, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    refused(*run(world, expert=model), "lacks 1 tensors", "model.layers.1.self_attn.q_proj.weight")


def test_an_output_that_is_called_something_else_is_refused(world):
    refused(*run(world, out="scores.pt"), "--out", "scores.pt", "ends in .safetensors")


def test_output_not_writable(world):
    (world / "file").write_text("in the way")
    result, _ = run(world, out="file/out.safetensors")
    assert result.exit_code == 2
    assert "cannot write" in result.output
    result, _ = run(world, out="base")
    assert result.exit_code == 2
    assert "folder" in result.output


def test_prompt_too_long(world):
    rows = [{"task": "t", "prompt": "w1 " * 200, "contrast": "w1"}] * 2
    (world / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(*run(world, pairs=world / "long.jsonl"), "200 tokens", "128")


class TestBuiltIn:
    def test_enough_material(self):
        assert len(set(builtin_words()["requests"])) >= 60

    @pytest.mark.parametrize("name", sorted(BUILTIN))
    def test_any_number_by_seed_and_no_repeats(self, name):
        small, again, other = (BUILTIN[name](40, seed) for seed in (0, 0, 1))
        assert small == again
        assert small != other
        for rows in by_task(BUILTIN[name](500, 3)).values():
            assert len({row.prompt for row in rows}) == 500

    def test_contrast_is_the_prompt_without_its_instruction(self):
        pairs = BUILTIN["instructions"](50, 0)
        assert len(by_task(pairs)) == 6
        assert all(pair.prompt.startswith(pair.contrast + " ") for pair in pairs)

    def test_more_than_there_is(self):
        with pytest.raises(Exception, match="has 2400 a task"):
            load_pairs("builtin:code", 10**6, 0)


class TestSplit:
    def test_half_is_disjoint_and_complete(self):
        pairs = BUILTIN["instructions"](11, 0)
        for task in split_pairs(pairs, "half", seed=5):
            assert (len(task.extraction), len(task.scoring)) == (5, 6)
            assert not set(task.extraction) & set(task.scoring)

    def test_a_task_does_not_depend_on_the_others(self):
        pairs = BUILTIN["instructions"](10, 0)
        alone = split_pairs([p for p in pairs if p.task == "title"], "half", 0)[0]
        assert alone in split_pairs(pairs, "half", 0)

    def test_a_prompt_is_in_one_half_however_often_it_is_there(self, caplog):
        pairs = [Pair("t", f"p{i % 10}", f"c{i % 5}") for i in range(20)]
        (task,) = split_pairs(pairs, "half", 0)
        halves = [{pair.prompt for pair in half} for half in (task.extraction, task.scoring)]
        assert [len(half) for half in (*halves, task.extraction, task.scoring)] == [5, 5, 10, 10]
        assert not halves[0] & halves[1]
        with pytest.raises(Exception, match="task t has 1 prompt, which cannot be halved"):
            split_pairs([pairs[0]] * 3, "half", 0)
        warn_of_repeats([task])
        assert "task t: 5 of its 10 scoring pairs are distinct" in caplog.text
        caplog.clear()
        warn_of_repeats(split_pairs(pairs[:10], None, 0))
        assert not caplog.text

    def test_one_pair_cannot_be_halved(self):
        with pytest.raises(Exception, match="--split shared"):
            split_pairs(BUILTIN["code"](1, 0), "half", 0)


def test_lora_expert_equals_the_merged_model(world, tmp_path):
    """`base+lora` is scored as the full model that the LoRA makes of the base."""
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(world / "base"), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(tmp_path / "lora")
    merged = tiny.save(model.merge_and_unload(), tmp_path / "merged")

    as_lora = run(world, out="lora.safetensors", expert=f"{world / 'base'}+{tmp_path / 'lora'}")
    assert as_lora[0].exit_code == 0, as_lora[0].output
    scores, full = read_scores(as_lora[1]), read_scores(run(world, out="full.safetensors", expert=merged)[1])
    torch.testing.assert_close(scores.heads, full.heads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.neurons, full.neurons, rtol=1e-4, atol=1e-6)
    assert scores.meta.expert.tensors != full.meta.expert.tensors


def test_missing_lora(world):
    refused(*run(world, expert=f"{world / 'base'}+./nowhere"), "./nowhere", "no such model folder")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("user/model", ("user/model", None)), ("user/model@v1", ("user/model", "v1")), ("a@v1+b", ("a@v1+b", None))],
)
def test_model_names_in_the_score_file(name, wanted):
    from mergekit_wp.checkpoint.folder import Fingerprint
    from mergekit_wp.scores import ModelId

    model = ModelId.of(name, Fingerprint("c", "t"))
    assert (model.name, model.revision) == wanted


def test_a_forgotten_file_of_top_does_not_swallow_the_next_flag():
    done = CliRunner().invoke(main, ["--method", "exact", "--top", "200", "--out", "x.safetensors"])
    assert done.exit_code == 2
    assert "K and FILE are wanted, and --out follows K; name the score file that ranks" in done.output
