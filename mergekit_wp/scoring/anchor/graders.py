"""Is an answer right? The check that a pair carries, run on what a model generated.

    {"ifeval": "detectable_format:multiple_sections", "kwargs": {"section_spliter": "SECTION", "num_sections": 2}}
    {"number": "97", "prefix": "8 + 9 = 17\\ncarry", "until": ["Request:"]}
    {"python": "double", "kwargs": {"cases": [[2, 4], [-1, -2]]}}

`ifeval` names a type of lm-eval's registry, graded by lm-eval's own code (strict). `number` is the last number of the
answer, as GSM8K's flexible match reads it (separators of thousands and a currency sign do not count). `python` names a
function of one argument that the answer defines: it must return what each case [argument, result] says, and of the
same type; the answer, or its first block between ``` if it has one, as chat models write it, is run for that, in the
sandbox. `kwargs` is what the grader needs. `prefix`: the beginning of
the answer, where the prompt already holds it. `until`: texts at which an answer ends.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_wp.errors import BadInput, reason_of, shown
from mergekit_wp.sandbox import call_function

GRADERS = ("ifeval", "number", "python")
_FIELDS = ("kwargs", "prefix", "until")
_FENCED = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|(?<![\d.])\.\d+)")
# These two IFEval types look words and sentences up in data that NLTK downloads; no other needs them.
_NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


@dataclass(frozen=True)
class Check:
    """How one answer is graded: `grader` is one of `GRADERS`, `name` the type, the number or the function."""

    grader: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    until: tuple[str, ...] = ()

    @property
    def runs_code(self) -> bool:
        """Whether grading executes what the model wrote."""
        return self.grader == "python"

    def passes(self, answer: str) -> bool:
        """Whether `prefix` and `answer`, cut where the answer ends, is right."""
        text = self.prefix + cut(answer, self.until)
        return {"ifeval": _ifeval, "number": _number, "python": _python}[self.grader](self, text)


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the texts `until`."""
    for end in until:
        text = text.partition(end)[0]
    return text


def parse_check(raw: Any, where: str) -> Check:
    """A check from its JSON. Raises `BadInput`, with `where` in front, for anything but the forms above.

    Whether the grader knows the name and takes the arguments is the business of `preflight`: that imports it.
    """
    if not isinstance(raw, Mapping):
        raise BadInput(
            f"{where}: check must be an object such as {{'ifeval': 'punctuation:no_comma'}}, found {shown(raw)}."
        )
    graders = [name for name in GRADERS if name in raw]
    if unknown := set(raw) - {*_FIELDS, *GRADERS}:
        raise BadInput(
            f"{where}: unknown field {shown(sorted(unknown)[0])} in check; expected one of {', '.join(GRADERS)}, and "
            f"{', '.join(_FIELDS)}."
        )
    if len(graders) != 1 or not isinstance(raw[graders[0]], str):
        raise BadInput(
            f"{where}: check must name one grader ({', '.join(GRADERS)}) with a text; found {shown(dict(raw))}."
        )
    kwargs, prefix, until = raw.get("kwargs", {}), raw.get("prefix", ""), raw.get("until", [])
    if not isinstance(kwargs, Mapping):
        raise BadInput(f"{where}: kwargs of check must be an object, found {shown(kwargs)}.")
    if not isinstance(prefix, str):
        raise BadInput(f"{where}: prefix of check must be a text, found {shown(prefix)}.")
    if not isinstance(until, (list, tuple)) or not all(isinstance(end, str) and end for end in until):
        raise BadInput(f"{where}: until of check must be a list of texts, found {shown(until)}.")
    return Check(graders[0], raw[graders[0]], dict(kwargs), prefix, tuple(until))


def preflight(checks: Sequence[Check], task: str) -> None:
    """Make sure that every check can be run, before anything is generated.

    Raises `BadInput` for a name that the grader does not know, arguments it does not take or lacks, and NLTK data
    that a type in use needs and that is not there.
    """
    for check in checks:
        {"ifeval": _preflight_ifeval, "number": _preflight_number, "python": _preflight_python}[check.grader](
            check, f"task {task}"
        )


def _ifeval(check: Check, text: str) -> bool:
    import langdetect

    langdetect.DetectorFactory.seed = 0  # its guesses are drawn at random; a layer must not depend on them
    utils, _registry = _lm_eval()
    asked = utils.InputExample(key=0, instruction_id_list=[check.name], prompt="", kwargs=[check.kwargs])
    return bool(utils.test_instruction_following_strict(asked, text).follow_all_instructions)


@functools.cache
def _lm_eval() -> tuple[Any, dict[str, Any]]:
    """lm-eval's graders of IFEval, and its types by name.

    Their import tries to download NLTK data and says that it has, even offline. Hardly any type needs the data;
    `preflight` asks for them where one does.
    """
    import nltk

    download, nltk.download = nltk.download, lambda *_args, **_options: False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from lm_eval.tasks.ifeval import instructions_registry, utils
    finally:
        nltk.download = download
    return utils, instructions_registry.INSTRUCTION_DICT


def ifeval_trouble(name: str, kwargs: Mapping[str, Any]) -> str | None:
    """Why IFEval's grader cannot grade by this type with these arguments, as a clause; None where it can."""
    _utils, types = _lm_eval()
    if name not in types:
        return f"IFEval has no type {shown(name)}; it has {', '.join(sorted(types))}"
    instruction = types[name](name)
    needed = set(instruction.get_instruction_args_keys())
    # A missing argument would be drawn at random, and the check would grade something that nobody asked for.
    if needed != set(kwargs):
        return f"the check {name} takes the kwargs {sorted(needed)}, found {sorted(kwargs)}"
    if empty := sorted(key for key, value in kwargs.items() if not value):  # lm-eval takes it for missing
        return f"the check {name} takes no empty {empty[0]}, found {shown(kwargs[empty[0]])}"
    try:
        instruction.build_description(**kwargs)
    except Exception as error:  # whatever comes of arguments of other kinds than it expects
        return f"the check {name} does not take the kwargs {shown(dict(kwargs))} ({reason_of(error)})"
    taken = instruction.get_instruction_args() or {}
    if other := [key for key, value in kwargs.items() if key in taken and _plain(taken[key]) != _plain(value)]:
        return f"the check {name} takes no {other[0]} {shown(kwargs[other[0]])}; lm-eval would draw another"
    return None


def _plain(value: Any) -> Any:
    """A value of IFEval's but for what its types change in it: case, space around, order."""
    if isinstance(value, str):
        return value.strip().lower()
    return sorted({str(each) for each in value}) if isinstance(value, list) else value


def _preflight_ifeval(check: Check, where: str) -> None:
    if trouble := ifeval_trouble(check.name, check.kwargs):
        raise BadInput(f"{where}: {trouble}.")
    if check.name in _NEEDS_PUNKT:
        check_punkt(f"{where}: the check {check.name}")


def check_punkt(who: str) -> None:
    """NLTK's English sentence data, which IFEval's graders read. Raises `BadInput`: `who` needs it."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        raise BadInput(
            f"{who} needs NLTK's punkt_tab, which is in none of NLTK's folders; run `python -m nltk.downloader "
            "punkt_tab` where there is network (NLTK_DATA names another folder)."
        ) from None


def _number(check: Check, text: str) -> bool:
    found = _NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == float(check.name.replace(",", ""))


def _preflight_number(check: Check, where: str) -> None:
    if not _NUMBER.fullmatch(check.name) or check.kwargs:
        raise BadInput(
            f"{where}: the check number takes a text such as '97' or '-1.5' and no kwargs, found {shown(check.name)} "
            f"with kwargs {sorted(check.kwargs)}."
        )


def _python(check: Check, text: str) -> bool:
    fenced = _FENCED.search(text)
    return returns_right(fenced.group(1) if fenced else text, check.name, check.kwargs["cases"])


def returns_right(code: str, function: str, cases: Sequence[Sequence[Any]]) -> bool:
    """Whether `function`, as `code` defines it, returns the result, of the same type, in every [argument, result].

    Runs the code in the sandbox. Results stay here and are compared here, so printing a verdict earns nothing.
    """
    results = call_function(code, function, [argument for argument, _expected in cases])
    # JSON text tells 1 from true and 4 from 4.0, which == does not.
    return results is not None and json.dumps(results) == json.dumps([expected for _argument, expected in cases])


def _preflight_python(check: Check, where: str) -> None:
    cases = check.kwargs.get("cases")
    fits = isinstance(cases, list) and cases and all(isinstance(case, list) and len(case) == 2 for case in cases)
    if not check.name.isidentifier() or set(check.kwargs) != {"cases"} or not fits:
        raise BadInput(
            f"{where}: the check python takes the name of a function and kwargs "
            f"{{'cases': [[argument, result], ...]}}, found {shown(check.name)} with "
            f"kwargs {shown(dict(check.kwargs))}."
        )
