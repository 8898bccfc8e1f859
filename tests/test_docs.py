"""The pages say what the code does: every flag and field is on its page, and nothing else; examples are read by our own
readers; links lead somewhere; README's first commands run, and print what it shows."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import click
import pytest
import tiny
import torch
from click.testing import CliRunner
from markdown_it import MarkdownIt
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mergekit_wp
from mergekit_wp.calibrate import read_texts
from mergekit_wp.console import MODULES
from mergekit_wp.documents import parse_json, parse_yaml
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.options import OPTIONS
from mergekit_wp.eval.results import StoredMeasured, StoredResults, StoredRow
from mergekit_wp.eval.suite import Suite, SuiteTask, read_suite
from mergekit_wp.eval.tables import read_results
from mergekit_wp.fit.job import FitExpert, FitJob, load_fit_job
from mergekit_wp.fit_file import FitMeta, FittedPrompts, LossAt, Unrecovered
from mergekit_wp.geometry import Geometry
from mergekit_wp.merge.activations import Calibration
from mergekit_wp.merge.certificate import Certificate, read_certificate
from mergekit_wp.merge.methods.aim import AimMerge
from mergekit_wp.merge.methods.patch import SetPatchMerge
from mergekit_wp.merge.methods.widen import WidenMerge
from mergekit_wp.merge.methods.wp import WeightPatchingMerge
from mergekit_wp.merge.patch_file import PatchMeta
from mergekit_wp.merge.recipe import read_recipe
from mergekit_wp.pipeline.spec import Evaluate, Expert, Merge, Push, read_pipeline
from mergekit_wp.scores import ModelId, PromptStyle, RecoveryCurve, ScoredAt, ScoreMeta, TaskMeta
from mergekit_wp.scoring.anchor.graders import parse_check
from mergekit_wp.scoring.config import ScoringJob, load_job
from mergekit_wp.scoring.pairs import Pair, read_pairs
from mergekit_wp.scoring.whole_answers import read_answers
from mergekit_wp.study.study_spec import Study, read_study
from mergekit_wp.subset import read_components

ROOT = Path(__file__).resolve()
while not (ROOT / "pyproject.toml").is_file():
    ROOT = ROOT.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
# Of accelerate, hf, lm_eval, mergekit-evolve, pip and the table of experiments.
FOREIGN_FLAGS = {
    "--choose",
    "--only",
    "--num_processes",
    "--multi_gpu",
    "--model",
    "--model_args",
    "--tasks",
    "--no-reshard",
    "--target",
    "--repo-type",
    "--local-dir",
}
_TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.DOTALL | re.MULTILINE)
GEOMETRY = Geometry("LlamaForCausalLM", 40, 40, 40, 128, 13824, 5120, 32000)


@functools.cache
def commands() -> dict[str, click.Command]:
    return {name: import_module(module).main for name, module in MODULES.items()}


def flags_of(command: click.Command) -> set[str]:
    return {flag for p in command.params if isinstance(p, click.Option) for flag in (*p.opts, *p.secondary_opts)}


def sections(page: Path) -> dict[str, str]:
    """Heading -> what stands under it, up to the next heading; lines of code are no headings."""
    found: dict[str, list[str]] = {"": []}
    fenced, heading = False, ""
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if not fenced and re.match(r"#+ ", line):
            heading = line.lstrip("# ")
            found[heading] = []
        else:
            found[heading].append(line)
    return {heading: "\n".join(lines) for heading, lines in found.items()}


def tables(text: str) -> dict[str, list[str]]:
    """First cell of a table's head -> the names in backticks in the first cells of its rows."""
    found: dict[str, list[str]] = {}
    head = None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cell = line.split("|")[1].strip()
        if head is None:
            head = cell
            found[head] = []
        elif not set(cell) <= set("-: "):
            found[head] += re.findall(r"`([^`]+)`", cell)
    return found


def names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def refused(raised: str) -> set[str]:
    """The names that a sentence on an unknown field offers: those after its semicolon."""
    words = raised.partition("; ")[2]
    return set(re.findall(r"\w+", words)) - {"expected", "one", "of", "or", "and", "a", "pipeline", "has"}


def check_fields() -> set[str]:
    with pytest.raises(BadInput) as raised:
        parse_check({"no such field": 1}, "")
    return refused(raised.value.message) - {"in", "check"}


def pipeline_fields(folder: Path) -> set[str]:
    (folder / "p.yaml").write_text("no_such_field: 1")
    with pytest.raises(BadInput) as raised:
        read_pipeline(folder / "p.yaml")
    return refused(raised.value.message)


def parameters(method: type) -> set[str]:
    return {parameter.name for parameter in method.spec.parameters}


FIELDS = {
    ("Pairs", "field"): names(Pair),
    ("Scoring job", "field"): names(ScoringJob),
    ("Score file", "field"): names(ScoreMeta),
    ("Score file", "field of a model"): names(ModelId),
    ("Score file", "field of a task"): names(TaskMeta),
    ("Score file", "field of `prompts`"): names(PromptStyle),
    ("Score file", "field of `at`"): names(ScoredAt),
    ("Score file", "field of `recovery`"): names(RecoveryCurve),
    ("Fit file", "field"): names(FitMeta),
    ("Fit job", "field of a fit job"): names(FitJob),
    ("Fit job", "field of an entry of `experts`"): names(FitExpert),
    ("Fit file", "field of a fit's `prompts`"): names(FittedPrompts),
    ("Fit file", "field of `curve`"): names(LossAt),
    ("Fit file", "field of `unrecovered`"): names(Unrecovered),
    ("Activations file", "field"): names(Calibration),
    ("Recipe", "parameter of `wp`"): parameters(WeightPatchingMerge),
    ("Recipe", "parameter of `widen`"): parameters(WidenMerge),
    ("Recipe", "parameter of `aim`"): parameters(AimMerge),
    ("Recipe", "parameter of `wp_patch`"): parameters(SetPatchMerge),
    ("Patch file", "field of a patch file"): names(PatchMeta),
    ("Suite", "field"): names(Suite),
    ("Suite", "field of a task"): names(SuiteTask),
    ("Suite", "option of a backend"): set(OPTIONS),
    ("results.json", "field of a row"): names(StoredRow),
    ("Study", "field"): names(Study),
    ("Pipeline", "field of an expert"): names(Expert),
    ("Pipeline", "field of a merge"): names(Merge),
    ("Pipeline", "field of `evaluate`"): names(Evaluate) | {"flags"},
    ("Pipeline", "field of `push`"): names(Push) | {"flags"},
    ("wp_audit.yml", "field"): names(Certificate),
}


@pytest.mark.parametrize(("heading", "head"), FIELDS)
def test_every_field_is_on_its_page_and_no_other(heading: str, head: str) -> None:
    listed = tables(sections(DOCS / "formats.md")[heading])[head]
    assert sorted(listed) == sorted(FIELDS[heading, head])


def test_fields_that_a_refusal_lists(tmp_path: Path) -> None:
    pages = sections(DOCS / "formats.md")
    assert set(tables(pages["Check"])["field"]) == check_fields()
    assert set(tables(pages["Pipeline"])["field"]) == pipeline_fields(tmp_path)


def test_fields_of_results() -> None:
    """The page's example is what a run wrote: its keys are those of the tables, and all that is read again is there."""
    text = sections(DOCS / "formats.md")["results.json"]
    example = json.loads(blocks(DOCS / "formats.md")["results.json"])
    assert set(tables(text)["field"]) == set(example) >= names(StoredResults)
    measured = set(next(iter(example["rows"][0]["measured"].values())))
    at_times = {"samples_file", "seen_items", "data", "revisions", "subtasks"}
    assert set(tables(text)["field of `measured`"]) - at_times == measured
    assert measured >= set(StoredMeasured.__annotations__) - at_times


def test_geometry_is_spelled_out() -> None:
    assert all(f"`{name}`" in sections(DOCS / "formats.md")["Score file"] for name in names(Geometry))


@pytest.mark.parametrize("name", MODULES)
def test_every_flag_is_on_its_page_and_no_other(name: str) -> None:
    listed = tables(sections(DOCS / "commands.md")[name])["option"]
    assert sorted(listed) == sorted(flags_of(commands()[name]))


def test_every_command_is_listed() -> None:
    listed = tables(sections(DOCS / "commands.md")["Commands"])["command"]
    assert set(listed) == set(MODULES)
    scripts = re.search(r"\[project.scripts\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert scripts is not None
    assert set(re.findall(r"^([\w-]+) =", scripts[1], re.MULTILINE)) == set(MODULES)
    completed = re.search(r"^for command in (.*); do", (DOCS / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert completed is not None
    assert {f"wp-{name}" for name in completed[1].split()} == set(MODULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_that_are_mentioned_exist(page: Path) -> None:
    known = set.union(*map(flags_of, commands().values()), FOREIGN_FLAGS, {"--help"})
    named = {flag for code in _code(page) for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", code)}
    if page.name == "CONTRIBUTING.md":  # it may speak of programs of the repository
        return
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_shown_can_be_typed(page: Path) -> None:
    for line in typed_lines(page.read_text(encoding="utf-8")):
        name, *arguments = shlex.split(line, comments=True)
        if name in MODULES:
            command = commands()[name]
            command.make_parser(click.Context(command)).parse_args(arguments)  # raises for an unknown option


def typed_lines(text: str) -> Iterator[str]:
    """What stands after a `$` in the consoles of a page, continued lines joined."""
    for block in re.findall(r"```console[^\n]*\n(.*?)```", text, re.DOTALL):
        yield from re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), re.MULTILINE)


def _code(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [*re.findall(r"```.*?```", text, re.DOTALL), *re.findall(r"`[^`\n]+`", text)]


def blocks(page: Path) -> dict[str, str]:
    """Title -> content of the fenced blocks of a page that have one: `title` says which file it is."""
    found = _TITLED.findall(page.read_text(encoding="utf-8"))
    assert len({title for title, _ in found}) == len(found)
    return dict(found)


READERS = {
    "check.json": lambda path: parse_check(parse_json(path.read_bytes()), ""),
    "job.yaml": lambda path: load_job(str(path), {}),
    "fit.yaml": lambda path: load_fit_job(str(path), {}),
    "answers": read_answers,
    "components.txt": lambda path: read_components(str(path), GEOMETRY),
    "score metadata": lambda path: ScoreMeta.from_json(path.read_text()),
    "patch metadata": lambda path: PatchMeta.from_json(path.read_text()),
    "texts.jsonl": lambda path: list(read_texts(str(path))),
    "suite.yaml": read_suite,
    "results.json": read_results,
    "study.yaml": lambda path: read_study(str(path)),
    "pipeline.yaml": read_pipeline,
    "13b.yaml": read_pipeline,
    "wp_audit.yml": read_certificate,
}


def reader(title: str):
    if title in READERS:
        return READERS[title]
    return read_pairs if title.endswith(".jsonl") else {"recipe": lambda path: read_recipe(str(path))}[title[:6]]


@pytest.mark.parametrize("page", [DOCS / "formats.md", DOCS / "tutorial.md", ROOT / "README.md"], ids=lambda p: p.stem)
def test_examples_are_read_by_our_own_readers(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("eval", "scoring"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found
    for title, text in found.items():
        Path(title).write_text(text)
    for title in found:
        reader(title)(Path(title))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_and_json_can_be_parsed(page: Path) -> None:
    for language, text in re.findall(r"^```(yaml|json)\b[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if language == "yaml":
            parse_yaml(text)
        elif text.startswith("{\n"):
            parse_json(text)
        else:
            for line in text.splitlines():
                parse_json(line)


def _tokens(page: Path):
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


@functools.cache  # many links lead to one page
def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as code hosts and mkdocs make them."""
    tokens = _tokens(page)
    heads = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", head.lower())) for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    found = [child for token in _tokens(page) for child in token.children or ()]
    targets = [str(child.attrs[name]) for child in found for name in ("href", "src") if name in child.attrs]
    targets += re.findall(r'<img src="([^"]+)"', page.read_text(encoding="utf-8"))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", DOCS / "security.md"], ids=lambda page: page.stem)
def test_code_that_is_named_is_there(page: Path) -> None:
    """Files (`scoring/score.py`, `tests/sandbox/`) and what is in them (`files.open_file`) are where a page says."""
    text = page.read_text(encoding="utf-8")
    package = Path(mergekit_wp.__file__).parent
    for name in re.findall(r"`([\w*./-]+(?:\.py|/))`", text):
        assert any(any(place.glob(name)) for place in (ROOT, package)) or name in ("EXPERT/wp/", "site/"), (
            name
        )  # made by a run
    for name in re.findall(r"`([a-z_]+/[a-z_/]+[a-z_])[`.]", text):
        places = [package / name, package / f"{name}.py", ROOT / name]
        assert any(place.exists() for place in places) or (ROOT / f"{name}.py").is_file(), name
    for module, attribute in re.findall(r"`([a-z_]+(?:/[a-z_]+)*)\.(?!py`|md`|yaml`|txt`|yml`)([A-Za-z_]+)`", text):
        if module not in sys.stdlib_module_names:
            defined = (package / f"{module}.py").read_text()
            assert re.search(rf"^(def|class) {attribute}\b", defined, re.MULTILINE), f"{module}.{attribute}"


def sentences() -> list[str]:
    """Every text in the package's code, with a mark in the place of each value that is put in."""
    found = []
    for path in Path(mergekit_wp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdr]", "\0", node.value))
    return found


def _in_order(parts: list[str], text: str) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place) + len(part)
        if place < len(part):
            return False
    return True


def test_errors_that_are_explained_are_those_of_the_code() -> None:
    said = [re.sub(r"\s+", " ", text) for text in sentences()]
    quoted = re.findall(r"^\*\*`([^`]+)`\*\*$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) > 25
    for message in quoted:
        parts = [re.sub(r"\s+", " ", part).strip() for part in message.split("…")]
        assert any(_in_order(parts, text) for text in said), message


def _quickstart_world(folder: Path, texts: list[str]) -> None:
    """base, maths and polite: tiny models whose tokenizer knows the words of the prompts."""
    words = sorted({word for text in texts for word in text.split()})
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    base = tiny.random_model("llama", seed=1, vocab_size=len(words) + len(special))
    for seed, name in enumerate(("base", "maths", "polite")):
        model = tiny.fine_tuned(base, seed=seed, size=0.3) if seed else base
        tiny.save(model, folder / name, torch.bfloat16)
        tokenizer.save_pretrained(folder / name)


def _shape(line: str) -> str:
    """A line of output without what differs between machines and moments: numbers, which component leads, and
    where the test runs."""
    line = re.sub(r"wrote \S*/", "wrote .../", line.replace(" GB", " MB"))
    return re.sub(r"L\d+[HN]\d+|-?\d[\d.,]*", "N", line).strip()


def test_the_first_commands_of_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.search(r"<!-- quickstart -->(.*?)<!-- /quickstart -->", readme, re.DOTALL)
    assert text is not None
    files = dict(_TITLED.findall(text[1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for title, content in files.items():
        Path(title).write_text(content)
    _quickstart_world(tmp_path, [pair.prompt for name in files if name.endswith(".jsonl") for pair in read_pairs(name)])
    consoles = re.findall(r"^```console\n(.*?)^```", text[1], re.DOTALL | re.MULTILINE)
    ran = []
    for console in consoles:
        for shown in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
            typed, *lines = shown.rstrip().splitlines()
            name, *arguments = shlex.split(typed, comments=True)
            done = CliRunner().invoke(commands()[name], arguments)
            assert done.exit_code == 0, done.output
            printed = [_shape(line) for line in done.output.splitlines()]
            for line in lines:  # a bar may stand before one
                assert line == "..." or any(found.endswith(_shape(line)) for found in printed), line
            ran.append(name)
    assert ran == ["wp-score", "wp-score", "wp-merge", "wp-fit", "wp-merge"]
    assert all((tmp_path / name / "config.json").is_file() for name in ("merged", "merged-by-fit"))


def test_shell_completion_is_set_up_by_the_lines_that_say_so() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    block = next(code for code in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "_COMPLETE" in code)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", f"{block}\ncomplete -p"], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    set_up = {line.split()[-1] for line in done.stdout.splitlines()}
    assert {f"wp-{name}" for name in ("score", "fit", "merge", "eval", "run")} <= set_up
    assert len(set_up) == 14


def test_versions_are_the_same_everywhere() -> None:
    citation = parse_yaml((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mergekit_wp.__version__
    assert re.search(rf"\n## {mergekit_wp.__version__} \(2\d\d\d-\d\d-\d\d\)\n", (ROOT / "CHANGELOG.md").read_text())
    assert f'\nversion = "{mergekit_wp.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
