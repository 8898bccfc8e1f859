"""Small data sets of our own in the schemas of the six official ones, where lm-eval's official tasks find them.

`datasets.load_dataset("openai/gsm8k", "main")` takes a folder `openai/gsm8k` below the working directory, whose
README.md lists the files of each configuration and split, before it asks the Hub: so official task files run
unchanged. Also the answers of a model that knows everything, of one that knows nothing, and NLTK's punkt_tab.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

SUBJECTS = {
    "algebra": "Algebra",
    "counting_and_probability": "Counting & Probability",
    "geometry": "Geometry",
    "intermediate_algebra": "Intermediate Algebra",
    "number_theory": "Number Theory",
    "prealgebra": "Prealgebra",
    "precalculus": "Precalculus",
}


def mmlu_subjects() -> list[str]:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    return [yaml.safe_load(path.read_text())["dataset_name"] for path in sorted(folder.glob("mmlu_*.yaml"))]


def write_world(folder: Path) -> Path:
    """All six data sets below `folder`."""
    _write(folder / "openai/openai_humaneval", {"openai_humaneval": {"test": HUMANEVAL}})
    unused = {"train": MBPP[:1], "validation": MBPP[:1], "prompt": MBPP[:1]}
    _write(folder / "google-research-datasets/mbpp", {"full": {"test": MBPP, **unused}})
    _write(folder / "openai/gsm8k", {"main": {"train": GSM8K_TRAIN, "test": GSM8K}})
    maths = {name: {"train": MATH[name][:1], "test": MATH[name]} for name in SUBJECTS}
    _write(folder / "EleutherAI/hendrycks_math", maths)
    choices = {name: mmlu(name, number) for number, name in enumerate(mmlu_subjects())}
    _write(folder / "cais/mmlu", choices)
    _write(folder / "google/IFEval", {"default": {"train": IFEVAL}})
    return folder


def write_published(folder: Path) -> Path:
    """The same six as their authors publish them, as `wp-eval --data` takes them; in both ways if there are two."""

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("humaneval.jsonl", HUMANEVAL)
    lines("mbpp.jsonl", [{**MBPP[0], "task_id": 1}, *MBPP, {**MBPP[0], "task_id": 600}, {**MBPP[0], "task_id": 974}])
    lines("gsm8k-train.jsonl", GSM8K_TRAIN)
    lines("gsm8k-test.jsonl", GSM8K)
    given = [
        {name: value for name, value in one.items() if value is not None} for row in IFEVAL for one in row["kwargs"]
    ]
    kwargs = iter(given)
    lines("ifeval.jsonl", [{**row, "kwargs": [next(kwargs) for _ in row["kwargs"]]} for row in IFEVAL])
    for number, subject in enumerate(SUBJECTS):
        for split, rows in {"train": MATH[subject][:1], "test": MATH[subject]}.items():
            if number % 2:
                lines(f"math/{split}/{subject}.jsonl", rows)
            else:
                for place, row in zip((9, 10), rows, strict=False):
                    lines(f"math/{split}/{subject}/{place}.json", [row])
    for number, subject in enumerate(mmlu_subjects()):
        for split, rows in mmlu(subject, number).items():
            cells = [[row["question"], *row["choices"], row["answer"]] for row in rows]
            if number % 2:
                cells = [[*row[:5], "ABCD"[row[5]]] for row in cells]
            else:
                cells = [["question", "choice0", "choice1", "choice2", "choice3", "answer"], *cells]
            (folder / "mmlu" / split).mkdir(parents=True, exist_ok=True)
            with open(folder / "mmlu" / split / f"{subject}_{split}.csv", "w", newline="") as stream:
                csv.writer(stream).writerows(cells)
    return folder


def _write(folder: Path, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    listed = []
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True)
        files = []
        for split, rows in splits.items():
            (folder / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


def _function(number: int, name: str, arguments: str, told: str, body: str, cases: dict[str, str]) -> dict[str, Any]:
    asserts = "".join(f"    assert candidate({given}) == {expected}\n" for given, expected in cases.items())
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'from typing import List\n\n\ndef {name}({arguments}):\n    """ {told}\n    """\n',
        "canonical_solution": "".join(f"    {line}\n" for line in body.split("\n")),
        "test": f"\n\nMETADATA = {{'author': 'us', 'dataset': 'test'}}\n\n\ndef check(candidate):\n{asserts}\n",
        "entry_point": name,
    }


HUMANEVAL = [
    _function(0, "widest_gap", "marks: List[int]", "The largest difference of neighbours, or 0.",
              "return max((abs(a - b) for a, b in zip(marks, marks[1:])), default=0)",
              {"[3, 8, 6]": "5", "[4]": "0", "[]": "0"}),
    _function(1, "last_word", "text: str", "The last word of a text in lower case, or ''.",
              "words = text.split()\nreturn words[-1].lower() if words else ''",
              {"'Up the Hill'": "'hill'", "' '": "''"}),
    _function(2, "steps_to_one", "n: int", "How often n can be halved, rounding down, before it is 1.",
              "steps = 0\nwhile n > 1:\n    n //= 2\n    steps += 1\nreturn steps",
              {"1": "0", "8": "3", "9": "3"}),
    _function(3, "shared", "a: List[int], b: List[int]", "The values in both lists, sorted, each once.",
              "return sorted(set(a) & set(b))", {"[3, 1, 1], [1, 3, 4]": "[1, 3]", "[], [1]": "[]"}),
    _function(4, "is_ladder", "xs: List[int]", "Whether every number is one more than that before it.",
              "return all(b == a + 1 for a, b in zip(xs, xs[1:]))",
              {"[4, 5, 6]": "True", "[4, 6]": "False"}),
]  # fmt: skip


def _mbpp(number: int, text: str, code: str, tests: list[str]) -> dict[str, Any]:
    return {
        "task_id": number, "text": text, "code": code.replace("\n", "\r\n"), "test_list": tests,
        "test_setup_code": "", "challenge_test_list": [],
    }  # fmt: skip


MBPP = [
    _mbpp(11, "Write a function to double every number in a list.",
          "def double_all(xs):\n  return [2 * x for x in xs] ",
          ["assert double_all([1, 2]) == [2, 4]", "assert double_all([]) == []", "assert double_all([-3]) == [-6]"]),
    _mbpp(12, "Write a python function to count the vowels of a word.",
          "import re\ndef vowels(word):\n    return len(re.findall('[aeiou]', word))",
          ["assert vowels('area') == 3", "assert vowels('sky') == 0", "assert vowels('queue') == 4"]),
    _mbpp(13, "Write a function to find the middle value of three.",
          "def middle(a, b, c):\n    return sorted([a, b, c])[1]",
          ["assert middle(3, 1, 2) == 2", "assert middle(5, 5, 1) == 5", "assert middle(-1, 0, 1) == 0"]),
    _mbpp(14, "Write a function to join two dictionaries, the second one winning.",
          "def join(a, b):\n    return {**a, **b}",
          ["assert join({1: 2}, {1: 3}) == {1: 3}", "assert join({}, {}) == {}", "assert join({1: 1}, {}) == {1: 1}"]),
]  # fmt: skip


def _sum(question: str, steps: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": f"{steps}\n#### {answer}"}


GSM8K = [
    _sum("A shelf holds 12 jars. Mia fills 3 shelves and then takes 7 jars away. How many jars are left?",
         "The shelves hold 12*3=<<12*3=36>>36 jars.\nThen 36-7=<<36-7=29>>29 are left.", "29"),
    _sum("A ticket costs $25 and 50 are sold. How many dollars is that?",
         "25*50=<<25*50=1250>>1250 dollars.", "1,250"),
    _sum("Tom walks 2 km to the lake and back on each of 3 days. How many km does he walk?",
         "A day is 2*2=<<2*2=4>>4 km.\nThat is 4*3=<<4*3=12>>12 km.", "12"),
    _sum("Half of 10 pears are ripe. How many pears are ripe?", "10/2=<<10/2=5>>5 pears.", "5"),
]  # fmt: skip
GSM8K_TRAIN = [
    _sum(f"Ann has {n} pens and buys {n + 2} more. How many has she?", f"{n}+{n + 2}=<<{n}+{n + 2}={2 * n + 2}>>"
         f"{2 * n + 2} pens.", str(2 * n + 2)) for n in range(3, 9)
]  # fmt: skip


def _problem(subject: str, problem: str, solution: str) -> dict[str, str]:
    return {"problem": problem, "level": "Level 2", "type": SUBJECTS[subject], "solution": solution}


MATH = {
    "algebra": [
        _problem("algebra", "Solve $3x + 4 = 19$.", "Then $3x = 15$, so $x = \\boxed{5}$."),
        _problem("algebra", "What is $6 \\div 8$ as a common fraction?", "It is $\\boxed{\\frac{3}{4}}$."),
    ],
    "counting_and_probability": [
        _problem("counting_and_probability", "In how many orders can 6 people stand?", "$6! = \\boxed{720}$."),
        _problem("counting_and_probability", "Two coins are tossed. How likely are two heads?",
                 "It is $\\frac12 \\cdot \\frac12 = \\boxed{\\frac{1}{4}}$."),
    ],
    "geometry": [
        _problem("geometry", "A square has side 4. What is its diagonal?", "It is $\\boxed{4\\sqrt{2}}$."),
        _problem("geometry", "How large is each angle of a rectangle?", "Each is $\\boxed{90^\\circ}$."),
    ],
    "intermediate_algebra": [
        _problem("intermediate_algebra", "For which $x$ is $x^2 < 4$?", "For $x$ in $\\boxed{(-2, 2)}$."),
        _problem("intermediate_algebra", "Give the smaller root of $x^2 = 9$.", "It is $\\boxed{-3}$."),
    ],
    "number_theory": [
        _problem("number_theory", "What is the remainder of 29 divided by 6?", "$29 = 24 + 5$: $\\boxed{5}$."),
        _problem("number_theory", "Is 51 prime?", "No: it is $3 \\cdot 17$, so $\\boxed{\\text{composite}}$."),
    ],
    "prealgebra": [
        _problem("prealgebra", "What is 40\\% of 3000?", "It is $0.4 \\cdot 3000 = \\boxed{1,\\!200}$."),
        _problem("prealgebra", "Write $0.5$ as a fraction.", "It is $\\boxed{\\frac{1}{2}}$."),
    ],
    "precalculus": [
        _problem("precalculus", "Give the polar coordinates of $(0, 3)$.",
                 "They are $\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}$."),
        _problem("precalculus", "What is $\\cos 0$?", "It is $\\boxed{1}$."),
    ],
}  # fmt: skip


def mmlu(subject: str, number: int) -> dict[str, list[dict[str, Any]]]:
    """One question a subject, with its shots; from subject to subject the answer is another letter."""

    def ask(n: int) -> dict[str, Any]:
        choices = [str(n + 1 + (place - n) % 4) for place in range(4)]
        return {"question": f" What is {n} + 1?", "subject": subject, "choices": choices, "answer": n % 4}

    return {"test": [ask(number)], "dev": [ask(number + 200 + i) for i in range(5)]}


_NO_KWARGS: dict[str, Any] = dict.fromkeys(
    ["num_highlights", "relation", "num_words", "num_placeholders", "prompt_to_repeat", "num_bullets",
     "section_spliter", "num_sections", "capital_relation", "capital_frequency", "keywords", "num_paragraphs",
     "language", "let_relation", "letter", "let_frequency", "end_phrase", "forbidden_words", "keyword", "frequency",
     "num_sentences", "postscript_marker", "first_word", "nth_paragraph"]
)  # fmt: skip


def _instructions(key: int, prompt: str, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kwargs = [{**_NO_KWARGS, **given} for given in wanted.values()]
    return {"key": key, "prompt": prompt, "instruction_id_list": list(wanted), "kwargs": kwargs}


IFEVAL = [
    _instructions(1001, "Describe rain. Use no commas.", {"punctuation:no_comma": {}}),
    _instructions(1002, "Describe snow in at least 3 sentences.",
                  {"length_constraints:number_sentences": {"relation": "at least", "num_sentences": 3}}),
    _instructions(1003, "Name institutes. Use at least 2 words in capital letters.",
                  {"change_case:capital_word_frequency": {"capital_relation": "at least", "capital_frequency": 2}}),
    _instructions(1004, "Write a title in <<>> and a line with the words river and bridge.",
                  {"detectable_format:title": {}, "keywords:existence": {"keywords": ["river", "bridge"]}}),
    _instructions(1005, "Answer within quotation marks, with fewer than 10 words.",
                  {"startend:quotation": {},
                   "length_constraints:number_words": {"relation": "less than", "num_words": 10}}),
]  # fmt: skip
FOLLOWED = {
    1001: "It falls from clouds and fills the rivers.",
    1002: "Snow is white. It falls in winter. Children like it.",
    1003: "We went to CERN and then to ESO by train.",
    1004: "<<A walk>>\nThe river runs under the bridge.",
    1005: '"That is all there is to say."',
}
IGNORED = {
    1001: "Well, it falls, and falls, and falls.",
    1002: "Snow is white.",
    1003: "We went to two institutes by train.",
    1004: "A hill and a tree.",
    1005: "That is by no means all that there is to say about it here today.",
}


def write_punkt_tab(folder: Path) -> None:
    """A punkt_tab of our own below `folder`, trained and saved by NLTK; it knows little, but is the real thing."""
    import nltk
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    trainer = PunktTrainer()
    trainer.train("The day began. Dr. Lee was late. It rained all day. Nobody minded. " * 20)
    path = folder / "tokenizers" / "punkt_tab"
    path.mkdir(parents=True)
    assert str(folder) in nltk.data.path  # NLTK writes only below its own folders
    save_punkt_params(trainer.get_params(), dir=str(path / "english"))
