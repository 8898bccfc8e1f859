"""Data sets of official tasks from a folder, where the Hub cannot be asked (`wp-eval --data DIR`).

lm-eval's task code asks `datasets.load_dataset("openai/gsm8k", "main")`. While tasks are loaded that call is answered
from DIR, so the code, the names, the prompts and the shots are lm-eval's own. DIR has, for each data set, either of

    OWNER/NAME/                  a copy of the Hub's repository, of any data set; `datasets` reads it
    what its authors published   read here, strictly, into the rows, splits and types that the Hub has (`PUBLISHED`)

and may have `nltk_data/`, where IFEval's graders find punkt_tab.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mergekit_wp.errors import BadInput, shown
from mergekit_wp.fields import ValueKind, any_text, whole
from mergekit_wp.files import check_files
from mergekit_wp.hashing import digest
from mergekit_wp.records import Records, csv_lines, json_lines, json_values

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_TEXT, _WHOLE = any_text("text"), whole(0)
_TEXTS = ValueKind(
    "a list of texts", lambda value: isinstance(value, list) and all(isinstance(t, str) for t in value), {}, None
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A data set as its authors published it.

    rows      configuration -> split -> how many rows; the first configuration is that of a task that names none
    file      (configuration, split) -> the file below DIR; a folder of this name without its ending goes too
    read      its rows, raw
    row       a raw row as the Hub has it; raises ValueError with a clause on what is wrong
    features  the Hub's types, as `datasets` builds them
    split_of  a row -> the split that it belongs to, where one file holds several
    """

    rows: Mapping[str, Mapping[str, int]]
    file: Callable[[str, str], str]
    row: Callable[[Any, str], Row]
    features: Callable[[], dict[str, Any]]
    read: Callable[[Path], Records] = json_lines
    split_of: Callable[[Row], str] | None = None

    def configuration(self, name: str | None) -> str:
        return next(iter(self.rows)) if name is None else name

    def found(self, folder: Path, config: str, split: str) -> Path | None:
        """Where the rows of a split are; None where they are not."""
        file = folder / self.file(config, split)
        return next((path for path in (file, file.with_suffix("")) if os.path.exists(path)), None)

    def load(self, folder: Path, config: str) -> dict[str, list[Row]]:
        """The rows of every split that is there. Raises `BadInput`, naming file and place."""
        found: dict[str, list[Row]] = {}
        of_file: dict[Path, list[Row]] = {}  # one may hold several splits
        for split in self.rows[config]:
            if path := self.found(folder, config, split):
                if path not in of_file:
                    of_file[path] = [self._row(raw, config, where) for where, raw in self.read(path)]
                found[split] = [row for row in of_file[path] if self.split_of is None or self.split_of(row) == split]
                if not found[split] and (self.split_of is None or split == "test"):
                    raise BadInput(f"{path}: there are no rows of the split {split}; get the published file.")
        return found

    def _row(self, raw: Any, config: str, where: str) -> Row:
        try:
            return self.row(raw, config)
        except ValueError as error:
            raise BadInput(f"{where}: {error}; the published file has it otherwise.") from error


def _columns(raw: Any, kinds: Mapping[str, ValueKind]) -> Row:
    """These columns of a row, checked; others are left out. Raises ValueError."""
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object with {', '.join(kinds)}, found {shown(raw)}")
    for name, kind in kinds.items():
        if name not in raw:
            raise ValueError(f"there is no column {name}, only {', '.join(map(str, raw)) or 'none'}"[:300])
        if not kind.fits(raw[name]):
            raise ValueError(f"the column {name} must be {kind.expected}, found {shown(raw[name])}")
    return {name: raw[name] for name in kinds}


def _of_texts(*names: str) -> tuple[Callable[[Any, str], Row], Callable[[], dict[str, Any]]]:
    """`row` and `features` of a data set whose columns are all text."""

    def features() -> dict[str, Any]:
        from datasets import Value

        return {name: Value("string") for name in names}

    return lambda raw, _config: _columns(raw, dict.fromkeys(names, _TEXT)), features


# --- MBPP -------------------------------------------------------------------------------------------------------------

_MBPP_LAST = {"prompt": 10, "test": 510, "validation": 600, "train": 974}  # the last task_id of each split


def _mbpp_row(raw: Any, _config: str) -> Row:
    texts = dict.fromkeys(("text", "code", "test_setup_code"), _TEXT)
    lists = dict.fromkeys(("test_list", "challenge_test_list"), _TEXTS)
    row = _columns(raw, {"task_id": whole(1), **texts, **lists})
    if row["task_id"] > _MBPP_LAST["train"]:
        raise ValueError(f"the task_id {row['task_id']}, and MBPP has 1 to {_MBPP_LAST['train']}")
    return row


def _mbpp_split(row: Row) -> str:
    return next(split for split, last in _MBPP_LAST.items() if row["task_id"] <= last)


def _mbpp_features() -> dict[str, Any]:
    from datasets import Value

    text = Value("string")
    return {"task_id": Value("int32"), "text": text, "code": text, "test_setup_code": text, "test_list": [text],
            "challenge_test_list": [text]}  # fmt: skip


# --- IFEval -----------------------------------------------------------------------------------------------------------

# The Hub has every argument of every instruction in each row, empty where it is another's.
_NUMBERS = ("num_highlights", "num_words", "num_placeholders", "num_bullets", "num_sections", "capital_frequency",
            "num_paragraphs", "let_frequency", "frequency", "num_sentences", "nth_paragraph")  # fmt: skip
_LISTS = ("keywords", "forbidden_words")
_WORDS = ("relation", "prompt_to_repeat", "section_spliter", "capital_relation", "language", "let_relation", "letter",
          "end_phrase", "keyword", "postscript_marker", "first_word")  # fmt: skip
_ARGUMENTS = {
    **dict.fromkeys(_NUMBERS, _WHOLE), **dict.fromkeys(_LISTS, _TEXTS), **dict.fromkeys(_WORDS, _TEXT)
}  # fmt: skip
_OBJECTS = ValueKind(
    "a list of objects", lambda value: isinstance(value, list) and all(isinstance(o, dict) for o in value), {}, None
)


def _ifeval_row(raw: Any, _config: str) -> Row:
    row = _columns(raw, {"key": _WHOLE, "prompt": _TEXT, "instruction_id_list": _TEXTS, "kwargs": _OBJECTS})
    if len(row["kwargs"]) != len(row["instruction_id_list"]):
        raise ValueError(f"{len(row['instruction_id_list'])} instructions with {len(row['kwargs'])} kwargs")
    for given in row["kwargs"]:
        for name, value in given.items():
            if name not in _ARGUMENTS:
                raise ValueError(f"kwargs has {shown(name)}, which no instruction of IFEval takes")
            if value is not None and not _ARGUMENTS[name].fits(value):
                raise ValueError(f"{name} of kwargs must be {_ARGUMENTS[name].expected}, found {shown(value)}")
    return {**row, "kwargs": [{name: given.get(name) for name in _ARGUMENTS} for given in row["kwargs"]]}


def _ifeval_features() -> dict[str, Any]:
    from datasets import Value

    text, number = Value("string"), Value("int64")
    kinds = {**dict.fromkeys(_NUMBERS, number), **{name: [text] for name in _LISTS}, **dict.fromkeys(_WORDS, text)}
    return {"key": number, "prompt": text, "instruction_id_list": [text],
            "kwargs": [{name: kinds[name] for name in _ARGUMENTS}]}  # fmt: skip


# --- MMLU -------------------------------------------------------------------------------------------------------------

# How many questions each subject's test has; each has five in dev.
_MMLU = {
    "abstract_algebra": 100, "anatomy": 135, "astronomy": 152, "business_ethics": 100, "clinical_knowledge": 265,
    "college_biology": 144, "college_chemistry": 100, "college_computer_science": 100, "college_mathematics": 100,
    "college_medicine": 173, "college_physics": 102, "computer_security": 100, "conceptual_physics": 235,
    "econometrics": 114, "electrical_engineering": 145, "elementary_mathematics": 378, "formal_logic": 126,
    "global_facts": 100, "high_school_biology": 310, "high_school_chemistry": 203,
    "high_school_computer_science": 100, "high_school_european_history": 165, "high_school_geography": 198,
    "high_school_government_and_politics": 193, "high_school_macroeconomics": 390, "high_school_mathematics": 270,
    "high_school_microeconomics": 238, "high_school_physics": 151, "high_school_psychology": 545,
    "high_school_statistics": 216, "high_school_us_history": 204, "high_school_world_history": 237,
    "human_aging": 223, "human_sexuality": 131, "international_law": 121, "jurisprudence": 108,
    "logical_fallacies": 163, "machine_learning": 112, "management": 103, "marketing": 234, "medical_genetics": 100,
    "miscellaneous": 783, "moral_disputes": 346, "moral_scenarios": 895, "nutrition": 306, "philosophy": 311,
    "prehistory": 324, "professional_accounting": 282, "professional_law": 1534, "professional_medicine": 272,
    "professional_psychology": 612, "public_relations": 110, "security_studies": 245, "sociology": 201,
    "us_foreign_policy": 100, "virology": 166, "world_religions": 171,
}  # fmt: skip
_MMLU_HEAD = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
_MMLU_ANSWERS = {**{str(i): i for i in range(4)}, **{letter: i for i, letter in enumerate("ABCD")}}


def _mmlu_lines(path: Path) -> Records:
    """With a head or, as in the authors' archive, without."""
    for number, (where, cells) in enumerate(csv_lines(path)):
        if number > 0 or cells != _MMLU_HEAD:
            yield where, cells


def _mmlu_row(cells: Any, subject: str) -> Row:
    if len(cells) != len(_MMLU_HEAD):
        raise ValueError(f"{len(cells)} cells, expected {', '.join(_MMLU_HEAD)}")
    if cells[5] not in _MMLU_ANSWERS:
        raise ValueError(f"the answer is {shown(cells[5])}, expected 0 to 3 or A to D")
    return {"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": _MMLU_ANSWERS[cells[5]]}


def _mmlu_features() -> dict[str, Any]:
    from datasets import ClassLabel, Value

    text = Value("string")
    return {"question": text, "subject": text, "choices": [text], "answer": ClassLabel(names=list("ABCD"))}


# --- MATH -------------------------------------------------------------------------------------------------------------

_MATH = {  # subject -> rows of train and of test
    "algebra": (1744, 1187), "counting_and_probability": (771, 474), "geometry": (870, 479),
    "intermediate_algebra": (1295, 903), "number_theory": (869, 540), "prealgebra": (1205, 871),
    "precalculus": (746, 546),
}  # fmt: skip


def _math_problems(path: Path) -> Records:
    """A line a problem; or a file a problem, as in the authors' archive, in the order of their numbers."""
    if os.path.isfile(path):
        yield from json_lines(path)
        return
    files = [file for file in path.glob("*.json") if file.is_file()]
    for file in sorted(files, key=lambda file: (len(file.stem), file.stem)):
        yield from json_values(file)


_MATH_ROW, _MATH_FEATURES = _of_texts("problem", "level", "type", "solution")
_GSM8K_ROW, _GSM8K_FEATURES = _of_texts("question", "answer")
_HUMANEVAL_ROW, _HUMANEVAL_FEATURES = _of_texts("task_id", "prompt", "canonical_solution", "test", "entry_point")

PUBLISHED: Mapping[str, Published] = {
    "openai/gsm8k": Published(
        {"main": {"train": 7473, "test": 1319}},
        lambda _config, split: f"gsm8k-{split}.jsonl",
        _GSM8K_ROW, _GSM8K_FEATURES,
    ),
    "openai/openai_humaneval": Published(
        {"openai_humaneval": {"test": 164}}, lambda _config, _split: "humaneval.jsonl",
        _HUMANEVAL_ROW, _HUMANEVAL_FEATURES,
    ),
    "google-research-datasets/mbpp": Published(
        {"full": {"train": 374, "test": 500, "validation": 90, "prompt": 10}}, lambda _config, _split: "mbpp.jsonl",
        _mbpp_row, _mbpp_features, split_of=_mbpp_split,
    ),
    "google/IFEval": Published(
        {"default": {"train": 541}}, lambda _config, _split: "ifeval.jsonl", _ifeval_row, _ifeval_features
    ),
    "cais/mmlu": Published(
        {subject: {"test": rows, "dev": 5} for subject, rows in _MMLU.items()},
        lambda config, split: f"mmlu/{split}/{config}_{split}.csv",
        _mmlu_row, _mmlu_features, read=_mmlu_lines,
    ),
    "EleutherAI/hendrycks_math": Published(
        {subject: {"train": train, "test": test} for subject, (train, test) in _MATH.items()},
        lambda config, split: f"math/{split}/{config}.jsonl",
        _MATH_ROW, _MATH_FEATURES, read=_math_problems,
    ),
}  # fmt: skip
"""By the name on the Hub."""


def splits_of(config: Mapping[str, Any]) -> list[str]:
    """The splits that a task's configuration names."""
    few = config.get("fewshot_config")
    named = [*(config.get(name) for name in _SPLITS), few.get("split") if isinstance(few, dict) else None]
    return list(dict.fromkeys(split for split in named if isinstance(split, str)))


@dataclass(frozen=True)
class DataFolder:
    """The folder that stands in for the Hub."""

    folder: Path
    _digests: dict[Path, str] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, folder: Path) -> DataFolder:
        """Raises `BadInput` for what is no folder. NLTK finds its `nltk_data` from here on, if there is one."""
        if not os.path.isdir(folder):
            raise BadInput(f"{folder}: --data is not a folder; name the one that holds the data sets.")
        words = str(folder / "nltk_data")
        if os.path.isdir(words):
            import nltk

            if words not in nltk.data.path:
                nltk.data.path.insert(0, words)
        return cls(folder)

    def has(self, dataset: Any) -> bool:
        """Whether a data set of this name is this folder's to give."""
        return isinstance(dataset, str) and (self._copied(dataset) or dataset in PUBLISHED)

    def _copied(self, dataset: str) -> bool:
        return _HUB_NAME.fullmatch(dataset) is not None and os.path.isdir(self.folder / dataset)

    def check(self, task: str, config: Mapping[str, Any]) -> None:
        """Raise `BadInput` unless the files of a task's configuration are here."""
        dataset = str(config["dataset_path"])
        copy = self.folder / dataset
        if self._copied(dataset):
            check_files(copy, "a data set's folder", below=True)
            return
        if dataset not in PUBLISHED:
            raise BadInput(
                f"task {task}: {self.folder} has no data set {dataset}; put a copy of the Hub's repository into {copy} "
                f"(hf download --repo-type dataset {dataset} --local-dir {copy}, where there is network)."
            )
        published, splits = PUBLISHED[dataset], splits_of(config)
        name = published.configuration(config.get("dataset_name"))
        for split in splits:
            if split not in published.rows.get(name, {}):
                raise BadInput(
                    f"task {task}: it reads {split} of {dataset} {name}, which is not among the published files that "
                    f"--data takes; put a copy of the Hub's repository into {copy}."
                )
            if published.found(self.folder, name, split) is None:
                raise BadInput(
                    f"task {task}: there is no {self.folder / published.file(name, split)}, the {split} rows of "
                    f"{dataset}; put the published file there, or a copy of the Hub's repository into {copy}."
                )

    def load(self, dataset: str, name: str | None, original: Callable[..., Any], **options: Any) -> Any:
        """What `datasets.load_dataset` returns for the Hub's data set: its splits by name."""
        if self._copied(dataset):
            return original(str(self.folder / dataset), name, **options)
        from datasets import Dataset, DatasetDict, Features

        published = PUBLISHED[dataset]
        found = published.load(self.folder, published.configuration(name))
        features = Features(published.features())
        return DatasetDict({split: Dataset.from_list(rows, features=features) for split, rows in found.items()})

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While it lasts, `datasets.load_dataset` takes from here what is here."""
        import datasets

        original = datasets.load_dataset

        def load(path: Any, name: Any = None, *more: Any, **options: Any) -> Any:
            if self.has(path):
                return self.load(path, name, original, **options)
            return original(path, name, *more, **options)

        with mock.patch.object(datasets, "load_dataset", load):
            yield

    def record(self, leaves: Iterable[Any]) -> dict[str, Any]:
        """What results say of the data of loaded tasks; empty where none of it is from here.

        files: name below the folder -> SHA-256 (of a folder: of the names and contents of all that is in it). rows,
        published: by split, over all tasks; `published` lacks what is known of no publication.
        """
        files: dict[str, str] = {}
        rows: dict[str, int] = {}
        counts: dict[str, int] = {}
        for leaf in leaves:
            config = vars(leaf.config)
            dataset = config.get("dataset_path")
            if not self.has(dataset):
                continue
            known = PUBLISHED.get(dataset)
            name = known.configuration(config.get("dataset_name")) if known else ""
            for split in splits_of(config):
                rows[split] = rows.get(split, 0) + len(leaf.dataset[split])
                if known and (count := known.rows.get(name, {}).get(split)):
                    counts[split] = counts.get(split, 0) + count
                path = self.folder / dataset
                if known and not self._copied(dataset):
                    path = known.found(self.folder, name, split) or path
                files[path.relative_to(self.folder).as_posix()] = self._digest(path)
        return {"files": dict(sorted(files.items())), "rows": rows, "published": counts} if files else {}

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = digest(path)
        return self._digests[path]


def odd_counts(record: Mapping[str, Any]) -> list[str]:
    """Splits of a record that have not as many rows as were published: `4 rows of test (1,319 are published)`."""
    published = record.get("published", {})
    return [
        f"{rows:,} rows of {split} ({published[split]:,} are published)"
        for split, rows in record.get("rows", {}).items()
        if split in published and rows != published[split]
    ]
