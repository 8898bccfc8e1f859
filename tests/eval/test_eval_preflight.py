"""What wp-eval refuses before any weights load, the choice of a backend, and what it hands to lm-eval."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from eval_world import TASKS, make_model, ran, results, wp_eval, write_suite, write_tasks
from tiny import random_model, save
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mergekit_wp.errors import BadInput
from mergekit_wp.eval import backends, preflight
from mergekit_wp.eval.backends import Backend, answer_tokens, choose_backend, resolve_dtype
from mergekit_wp.eval.measure import Settings
from mergekit_wp.eval.models import open_model
from mergekit_wp.eval.options import check_options, split_options
from mergekit_wp.eval.suite import SuiteTask, read_suite
from mergekit_wp.eval.tasks import ready_tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    make_model(root / "model", seed=1)
    write_tasks(root / "tasks", right=root / "model")
    return root


def refused(outcome, sentence: str) -> None:
    assert outcome.exit_code == 2, outcome.output
    said = outcome.output.rstrip("\n").rsplit("Error: ", 1)[1]
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert ran(outcome) == []  # nothing was loaded


def suite_of(world: Path, folder: Path, **changes: object) -> Path:
    return write_suite(folder / "suite.yaml", **{"include_path": str(world / "tasks"), **changes})


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({}, ("--backend", "vllm"), "vLLM is not installed here; pip install"),
        ({"backend": "vllm"}, (), "vLLM is not installed here; pip install"),
        ({}, ("--tensor-parallel", "2"), "--tensor-parallel: this is vLLM's alone, and the backend is hf"),
        ({}, ("--data-parallel", "2"), "--data-parallel: this is vLLM's alone"),
        ({}, ("--max-model-len", "4096"), "its context is 128 tokens, and max_model_len is 4096"),
        ({}, ("--max-model-len", "3"), "may have 3 tokens (`max_gen_toks`)"),
        ({"max_gen_toks": 128}, (), "may have 128 tokens (`max_gen_toks`), which leaves no room"),
        ({"backend_options": {"quantization": "fp8"}}, (), "has no option `quantization`, which changes answers"),
        ({"backend_options": {"max_model_length": 9}}, (), "the unknown option `max_model_length`"),
        ({"backend_options": {"gpu_memory_utilization": 90}}, (), "must be a number above 0 and up to 1"),
        ({"backend": "tgi"}, (), "`backend` must be one of hf, vllm"),
        ({"tasks": [{**TASKS[0], "apply_chat_template": True}]}, (), "its tokenizer has no chat template"),
        ({"tasks": [{**TASKS[0], "fewshot_as_multiturn": True}]}, (), "`apply_chat_template: true`; set both"),
        ({"tasks": [{**TASKS[0], "system_instruction": 3}]}, (), "`system_instruction` must be a string"),
    ],
)
def test_bad_settings_are_refused_before_any_weights_load(world, tmp_path, monkeypatch, changes, flags, sentence):
    monkeypatch.setattr(backends, "vllm_version", lambda: None)
    suite = suite_of(world, tmp_path, **changes)
    refused(wp_eval(suite, world / "model", *flags, "--out", tmp_path / "out"), sentence)


def test_a_model_larger_than_the_free_memory_is_refused(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda _: 20_000)
    suite = suite_of(world, tmp_path)
    outcome = wp_eval(suite, world / "model", "--out", tmp_path / "out")
    refused(outcome, "its weights take 0.00 GB in float32, and 0.00 GB of memory are free on cpu")
    numbers = sum(p.numel() for p in random_model("llama", 1).parameters())
    monkeypatch.setattr(preflight, "free_memory", lambda _: 4 * numbers)
    assert wp_eval(suite, world / "model", "--out", tmp_path / "out").exit_code == 0
    monkeypatch.setattr(preflight, "free_memory", lambda _: 0)  # needs none: all is measured
    assert wp_eval(suite, world / "model", "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("backend", "free", "sentence"),
    [
        (Backend(), 1_000, "its weights take 0.00 GB in float32, and 0.00 GB of memory are free on cuda:0"),
        (Backend("vllm"), 90 * 10**9, "cuda:0 has 90.00 GB free of 100.00 GB, and vLLM takes 92 % of all at once"),
        (Backend("vllm", {"gpu_memory_utilization": 0.5}), 90 * 10**9, None),
        (Backend("hf", {"parallelize": True}), 1_000, None),
        (Backend(), 90 * 10**9, None),
    ],
)
def test_the_memory_of_gpus(world: Path, monkeypatch, backend: Backend, free: int, sentence: str | None) -> None:
    monkeypatch.setattr(preflight.process, "ask", lambda _, first, count: {f"cuda:{first}": [free, 100 * 10**9]})
    settings = Settings(
        device="cuda", dtype="auto", batch_size=1, limit=None, allow_code=False, trust_remote_code=False,
        progress_bars=False, backend=backend,
    )  # fmt: skip
    model = open_model("m", str(world / "model"), False)
    if sentence is None:
        preflight.check_memory(model, settings)
        return
    with pytest.raises(BadInput) as caught:
        preflight.check_memory(model, settings)
    assert sentence in caught.value.message


def test_a_grader_that_reads_punkt_tab_is_refused_without_it(world: Path, tmp_path: Path, monkeypatch) -> None:
    import nltk

    write_tasks(tmp_path / "tasks", right=world / "model")
    (tmp_path / "tasks" / "words.py").write_text(
        "# as lm-eval's ifeval: nltk.data.find('tokenizers/punkt_tab')\n\n"
        "def grade(doc, results):\n    return {'acc': 1}\n"
    )
    text = (tmp_path / "tasks" / "tiny_gen.yaml").read_text().replace("task: tiny_gen", "task: worded")
    text = text[: text.index("metric_list")] + text[text.index("output_type") :]
    (tmp_path / "tasks" / "worded.yaml").write_text(text + "process_results: !function words.grade\n")
    suite = write_suite(
        tmp_path / "suite.yaml", tasks=[{"task": "worded", "column": "W", "metric": "exact_match,none"}]
    )
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    outcome = wp_eval(suite, world / "model", "--out", tmp_path / "out")
    refused(outcome, "run `python -m nltk.downloader punkt_tab`")
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    preflight.check_tasks(ready_tasks(read_suite(suite), tmp_path / "tasks", False))


def test_lm_evals_own_ifeval_is_refused_without_punkt_tab(tmp_path: Path, monkeypatch) -> None:
    import lm_eval.tasks
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_: None)
    official = Path(lm_eval.tasks.__file__).parent / "ifeval" / "ifeval.yaml"
    (tmp_path / "data.json").write_text(
        json.dumps({"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
    )
    (tmp_path / "ifeval.yaml").write_text(
        f"include: {official}\ntask: ifeval\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{train: {tmp_path / 'data.json'}}}}}\n"
    )
    spec = {"task": "ifeval", "column": "IFEval", "metric": "prompt_level_strict_acc,none"}
    suite = read_suite(write_suite(tmp_path / "suite.yaml", tasks=[spec], include_path=str(tmp_path)))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(BadInput, match="task ifeval: its grader needs NLTK's punkt_tab"):
        preflight.check_tasks(ready_tasks(suite, suite.include_path, False))


def test_a_model_must_divide_among_the_gpus(world: Path) -> None:
    settings = Settings(
        device="cuda", dtype="auto", batch_size=1, limit=None, allow_code=False, trust_remote_code=False,
        progress_bars=False, backend=Backend("vllm", {"tensor_parallel_size": 3}),
    )  # fmt: skip
    with pytest.raises(BadInput, match="its 4 attention heads cannot be divided among 3 GPUs"):
        preflight.check_model(open_model("m", str(world / "model"), False), [], settings)


def test_vllm_on_a_cpu_has_no_heads_of_just_any_size(world: Path) -> None:
    settings = Settings(
        device="cpu", dtype="auto", batch_size=1, limit=None, allow_code=False, trust_remote_code=False,
        progress_bars=False, backend=Backend("vllm"),
    )  # fmt: skip
    model = open_model("m", str(world / "model"), False)
    with pytest.raises(BadInput, match="its attention heads have 8 dimensions, and on a CPU vLLM computes 32, 64"):
        preflight.check_model(model, [], settings)
    preflight.check_model(model, [], replace(settings, device="cuda"))
    preflight.check_model(model, [], replace(settings, backend=Backend("hf")))


def test_copies_of_a_model_need_gpus_and_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Backend("vllm", {"data_parallel_size": 2})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="takes 2 GPUs; this machine shows 1"):
        preflight.check_parallel(copies, "cuda")
    with pytest.raises(BadInput, match="CUDA_VISIBLE_DEVICES"):
        preflight.check_parallel(copies, "cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match="pip install ray"):
        preflight.check_parallel(copies, "cuda")
    preflight.check_parallel(Backend("vllm", {"tensor_parallel_size": 2}), "cuda")


@pytest.mark.parametrize(
    ("asked", "found", "device", "name", "why"),
    [
        (None, "0.32.0", "cuda", "vllm", "there is a GPU, and vLLM 0.32.0"),
        (None, None, "cuda:1", "hf", "vLLM is not installed"),
        (None, "0.32.0", "cpu", "hf", "no GPU is used (device cpu)"),
        ("hf", "0.32.0", "cuda", "hf", "as asked"),
        ("vllm", "0.32.0+cpu", "cpu", "vllm", "as asked"),
        (None, "0.32.0+cpu", "cuda", "hf", "(0.32.0+cpu) runs on the CPU alone"),
    ],
)
def test_the_backend_follows_the_machine_unless_asked(monkeypatch, asked, found, device, name, why) -> None:
    monkeypatch.setattr(backends, "vllm_version", lambda: found)
    chosen, said = choose_backend(asked, {"max_model_len": 64, "gpu_memory_utilization": 0.5}, device)
    assert chosen.name == name
    assert chosen.max_model_len == 64
    assert why in said
    assert ("gpu_memory_utilization" in chosen.options) == (name == "vllm")
    assert ("the suite's gpu_memory_utilization is not for it" in said) == (name == "hf")


@pytest.mark.parametrize(("found", "device", "where"), [("0.32.0", "cpu", "GPUs"), ("0.32.0+cpu", "cuda", "the CPU")])
def test_a_build_of_vllm_for_another_device_is_refused(monkeypatch, found, device, where) -> None:
    """It would run where it can, whatever it is told."""
    monkeypatch.setattr(backends, "vllm_version", lambda: found)
    with pytest.raises(BadInput) as error:
        choose_backend("vllm", {}, device)
    said = f"device {device}: the vLLM that is installed ({found}) runs on {where} alone"
    assert error.value.message.startswith(said)


def test_only_options_that_change_answers_are_part_of_the_key(world: Path) -> None:
    model = open_model("m", str(world / "model"), False)

    def key(**changes: object) -> str:
        fixed = {"device": "cpu", "dtype": "auto", "batch_size": 1, "limit": None, "allow_code": False}
        return Settings(**{**fixed, "trust_remote_code": False, "progress_bars": False, **changes}).key(model)

    assert key() == key(device="cuda", batch_size=8, samples=Path("x"), dtype="float32")
    assert key() == key(backend=Backend("hf", {"parallelize": True}))
    others = [
        key(dtype="bfloat16"), key(limit=3), key(backend=Backend("vllm")),
        key(backend=Backend("hf", {"max_model_len": 64})), key(backend=Backend("hf", {"add_bos_token": True})),
    ]  # fmt: skip
    assert len({key(), *others}) == 6


def test_auto_is_the_dtype_of_the_config_or_of_what_is_stored(tmp_path: Path) -> None:
    folder = save(random_model("llama", 1), tmp_path / "m", torch.bfloat16)
    assert resolve_dtype(folder, "auto") == "bfloat16"
    assert resolve_dtype(folder, "float16") == "float16"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    assert resolve_dtype(folder, "auto") == "bfloat16"
    (folder / "config.json").write_text(json.dumps({**config, "dtype": None, "torch_dtype": "float32"}))
    assert resolve_dtype(folder, "auto") == "float32"


def test_texts_are_asked_for_without_special_tokens_under_vllm_alone(world: Path, tmp_path: Path) -> None:
    suite = read_suite(suite_of(world, tmp_path))
    for name in ("hf", "vllm"):
        generated, chosen = (
            next(iter(task.loaded["tasks"].values())) for task in ready_tasks(suite, suite.include_path, False)
        )
        backends.ask_alike([generated, chosen], Backend(name))
        asked = generated.get_config("generation_kwargs")
        assert asked.get("skip_special_tokens") == (True if name == "vllm" else None)
        assert asked["max_gen_toks"] == 3
        assert not (chosen.get_config("generation_kwargs") or {}).get("skip_special_tokens")


def test_what_a_model_says_of_generation_leaves_greedy_answers_as_they_are(world: Path, tmp_path: Path) -> None:
    """vLLM takes nothing else from generation_config.json than where an answer ends."""
    model = make_model(tmp_path / "model", seed=1)
    settings = json.loads((model / "generation_config.json").read_text())
    changed = {**settings, "repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "num_beams": 3, "min_length": 50}
    (model / "generation_config.json").write_text(json.dumps(changed))
    outcome = wp_eval(suite_of(world, tmp_path), f"a={world / 'model'}", f"b={model}", "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    first, second = (row["cells"]["Gen"]["value"] for row in results(tmp_path / "out")["rows"])
    assert first == second == 5 / 8


def test_vllm_is_shown_the_one_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for before, device, after in (
        (None, "cuda:1", "1"), ("4,6", "cuda:1", "6"), ("4,6", "cuda", "4,6"), ("4", "cpu", "4"),
    ):  # fmt: skip
        if before:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        backends._show_only(device)
        assert backends.os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_prompts_that_do_not_fit_are_counted_and_said(world: Path, tmp_path: Path) -> None:
    """Questions of 3 to 5 words, answers of 3: in a context of 7 the longest lose their beginning."""
    suite = suite_of(world, tmp_path)
    outcome = wp_eval(suite, world / "model", "--max-model-len", 7, "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    about = results(tmp_path / "out")["rows"][0]["measured"]
    lengths = [3 + i % 3 for i in range(8)]
    assert about["Gen"]["cut_prompts"] == sum(length > 7 - 3 for length in lengths)
    assert about["Choice"]["cut_prompts"] == 0
    assert about["Gen"]["backend_options"] == {"max_model_len": 7}
    for kind in ("csv", "md", "html"):
        assert "were cut on the left" in (tmp_path / "out" / f"results.{kind}").read_text()
    assert "were cut on the left" in outcome.output


def test_the_names_of_an_answers_length() -> None:
    assert answer_tokens({"max_gen_toks": 5, "max_new_tokens": 9}) == 5
    assert answer_tokens({"max_new_tokens": 9}) == 9
    assert answer_tokens({}) == answer_tokens(None) == 256


def test_options_are_checked_by_kind() -> None:
    check_options(
        {"tensor_parallel_size": 2, "enforce_eager": True, "gpu_memory_utilization": 1, "quantization": "fp8"}
    )
    bad = {"tensor_parallel_size": True, "enforce_eager": 1, "gpu_memory_utilization": 0, "quantization": ""}
    for name, value in bad.items():
        with pytest.raises(BadInput, match=f"`{name}` must be"):
            check_options({name: value})
    assert split_options("vllm", {"parallelize": True, "max_num_seqs": 3}) == ({"max_num_seqs": 3}, ["parallelize"])


@pytest.mark.parametrize(
    ("template", "spec", "sentence"),
    [
        ({"tool_use": "x"}, {}, "chat templates named tool_use and none named default"),
        ("{{ raise_exception('never') }}", {}, "cannot be applied to the messages of task t (TemplateError: never)"),
        ("{% if x %}", {}, "cannot be applied"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}ok",
            {"system_instruction": "Be brief."},
            "takes no system message",
        ),
        (
            "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}ok",
            {"num_fewshot": 2},
            "one turn only",
        ),
        ({"default": "ok", "tool_use": "x"}, {"system_instruction": "Be brief.", "num_fewshot": 2}, None),
    ],
)
def test_a_template_is_tried_with_the_messages_of_the_task(template, spec, sentence):
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)
    leaf = SimpleNamespace(get_config=spec.get)
    task = SimpleNamespace(
        spec=SuiteTask("t", "T", "m", apply_chat_template=True, **spec), loaded={"tasks": {"t": leaf}}
    )
    if sentence is None:
        preflight._check_template(SimpleNamespace(reference="m"), task, tokenizer)
        return
    with pytest.raises(BadInput) as caught:
        preflight._check_template(SimpleNamespace(reference="m"), task, tokenizer)
    assert sentence in caught.value.message
