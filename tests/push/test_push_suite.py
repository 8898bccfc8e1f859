"""What of a suite goes with a card, and that the card's command measures the same again in a copy of the repository."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from eval_world import TASKS, cells, wp_eval, write_suite, write_tasks
from push_world import REPO, build

from mergekit_wp.errors import BadInput
from mergekit_wp.eval.suite import Suite, SuiteTask, parse_suite, read_suite, suite_text
from mergekit_wp.eval.tasks import task_manager
from mergekit_wp.push.bundle import bundle
from mergekit_wp.push.publish import Request, prepare


def test_the_cards_command_runs_in_a_copy_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build(tmp_path)
    out = world.root / "out"
    tasks = write_tasks(tmp_path / "private", right=out)
    (tasks / "diary.yaml").write_text("task: not_of_the_suite\n")
    suite = write_suite(tmp_path / "suite.yaml", include_path="elsewhere", tasks=[*TASKS, {**TASKS[0], "column": "G"}])
    prompts = write(tmp_path / "pairs.jsonl", json.dumps({"task": "t", "prompt": "w1 w2"}))
    first = wp_eval(
        suite,
        f"wp={out}",
        "--json",
        "--prompts",
        prompts,
        "--include-path",
        tasks,
        "--data",
        tmp_path / "private",
        "--limit",
        6,
        "--out",
        tmp_path / "first",
        "--backend",
        "hf",
        "--quiet",
    )
    assert first.exit_code == 0, first.output
    publication = prepare(Request(out, REPO, results=[tmp_path / "first"]), None, lambda line: None)
    card = publication.card.read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("$ wp-eval")]
    assert line == f"$ wp-eval wp/eval/tiny.yaml wp={REPO} --limit 6 --backend hf --out runs/eval"

    copy = tmp_path / "copy"
    for item in publication.items:
        (copy / item.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item.source, copy / item.path)
        assert str(tmp_path).encode() not in item.source.read_bytes(), item.path
    assert not (copy / "wp/eval/tiny/diary.yaml").exists()
    shutil.move(tasks, tmp_path / "gone")  # nothing may be read from there
    shutil.copytree(out, copy / REPO)
    monkeypatch.chdir(copy)
    again = wp_eval(*shlex.split(line)[2:])
    assert again.exit_code == 0, again.output
    assert cells(copy / "runs/eval", "wp") == cells(tmp_path / "first", "wp")
    assert "model-index" not in card, "only the first items were asked"


def made_by(folder: Path, *names: str):
    suite = Suite("s", tuple(SuiteTask(name, name, "acc,none") for name in names))
    return bundle("s", suite, folder)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_files_of_groups_tags_includes_and_modules(tmp_path: Path) -> None:
    tasks, far = tmp_path / "tasks", tmp_path / "far"
    write(far / "common.yaml", f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {far}/d*.jsonl}}}}\n")
    write(far / "d1.jsonl", "{}")
    write(far / "d2.jsonl", "{}")
    write(far / "unrelated.txt", "x")
    write(tasks / "deep" / "one.yaml", f"include: {far}/common.yaml\ntask: one\ntag: all\ndoc_to_text: !function m.f\n")
    write(tasks / "deep" / "m.py", "from pathlib import Path\ndef f(doc): return Path('data', 'words.txt')\n")
    write(tasks / "deep" / "data" / "words.txt", "w")
    write(tasks / "base.yaml", "dataset_path: json\n")
    write(tasks / "two.yaml", "include: base.yaml\ntask: two\ndoc_to_text: see base.yaml and d*.jsonl\n")
    write(tasks / "group.yaml", "group: both\ntask: [one, {task: two}]\n")
    write(tasks / "other.yaml", "task: other\n")
    write(tasks / ".hidden.yaml", "task: hidden\n")
    here = {f"wp/eval/s/{name}" for name in ("deep/one.yaml", "deep/m.py", "deep/data/words.txt")}
    outside = {f"wp/eval/s/outside/1/{name}" for name in ("common.yaml", "d1.jsonl", "d2.jsonl")}
    group = {f"wp/eval/s/{name}" for name in ("group.yaml", "two.yaml", "base.yaml")}
    for names, files in ((["both"], here | outside | group), (["all"], here | outside), (["mmlu"], set())):
        made = made_by(tasks, *names)
        assert {*made.copies, *made.texts} == {"wp/eval/s.yaml", *files}
    texts = made_by(tasks, "both").texts
    assert "include: ../outside/1/common.yaml" in texts["wp/eval/s/deep/one.yaml"]
    assert "wp/eval/s/outside/1/d*.jsonl" in texts["wp/eval/s/outside/1/common.yaml"]
    assert str(tmp_path) not in "".join(texts.values())
    # The published folder is one that lm-eval reads: same tasks, same includes.
    for made in [made_by(tasks, "both")]:
        for target, source in made.copies.items():
            write(tmp_path / "copy" / target, source.read_text())
        for target, text in made.texts.items():
            write(tmp_path / "copy" / target, text)
    index = task_manager(["both"], tmp_path / "copy/wp/eval/s").task_index
    assert index["one"].cfg["dataset_path"] == "json"
    assert {"one", "two", "both"} <= set(index)
    assert "other" not in index


def test_a_local_data_set_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "x" / "test.csv", "q,a")
    write(
        tmp_path / "tasks" / "one.yaml",
        "task: one\ndataset_path: data\ndataset_name: x\ndoc_to_text: the data of data\n",
    )
    made = made_by(tmp_path / "tasks", "one")
    (copied,) = made.copies
    (path,) = [target for target in made.texts if target.endswith("one.yaml")]
    content = yaml.safe_load(made.texts[path])
    assert copied == f"{content['dataset_path']}/x/test.csv"
    assert (content["doc_to_text"], content["dataset_name"]) == ("the data of data", "x")


def test_a_task_file_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret.txt", "diary")
    write(tmp_path / "tasks" / "one.yaml", "task: one\ndoc_to_text: !function m.f\n")
    write(tmp_path / "tasks" / "m.py", "def f(doc): return open('notes.txt').read()\n")
    (tmp_path / "tasks" / "notes.txt").symlink_to(secret)
    with pytest.raises(BadInput, match=r"notes\.txt: a link to .*outside of its folder"):
        made_by(tmp_path / "tasks", "one")


def test_of_a_working_directory_only_what_a_task_is_made_of_is_published(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.yaml", "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: gen.json}}\n"
          "doc_to_text: !function utils.ask\n")  # fmt: skip
    write(tmp_path / "utils.py", "def ask(doc): return 'q'\n")
    for name in ("gen.json", "prod.env", "notes.txt", ".git/config", "wp/config.json", "wp/model.safetensors"):
        write(tmp_path / name, "{}")
    made = bundle("s", Suite("s", (SuiteTask("mine", "Mine", "acc,none"),)), Path())
    assert {*made.copies, *made.texts} == {
        "wp/eval/s.yaml",
        *(f"wp/eval/s/{n}" for n in ("mine.yaml", "utils.py", "gen.json")),
    }


@pytest.mark.parametrize("name", ["eval/paper.yaml", "eval/lm-eval.yaml"])
def test_a_suite_is_written_as_it_is_read(name: str, tmp_path: Path) -> None:
    from mergekit_wp.files import shipped

    suite = read_suite(shipped(name))
    text = suite_text(suite)
    assert parse_suite(yaml.safe_load(text), Path("/")) == suite or suite.include_path is not None
    assert parse_suite(yaml.safe_load(text), Path("/")).hash == suite.hash
    assert not {"null", "{}"} & set(text.split())
    assert json.loads(json.dumps(yaml.safe_load(text)))["name"] == suite.name
