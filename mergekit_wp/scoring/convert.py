"""wp-pairs: pairs for wp-score out of what there is: rows of IFEval, columns of a data set, chat logs.

    rows (records) -> each a pair, or a reason why it is none -> tasks of one kind, no prompt twice, a draw -> the
    reader of pairs, which has the last word -> a file

A prompt is a text, or a chat, of which the user's first message is taken. Rows of IFEval name their instructions, which
become tasks, and bring their arguments, by which lm-eval grades: such a pair carries a check. Heavy packages are
imported only where there is something to check or to unpack, so that `wp-pairs --help` answers at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mergekit_wp import __version__
from mergekit_wp.console import GroupedCommand, quiet_option
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import check_writable_parent, write_text
from mergekit_wp.foreign import echo
from mergekit_wp.outputs import claim, refuse_inputs
from mergekit_wp.records import read_records
from mergekit_wp.scoring.pairs import Pair, by_task, fields_of, parse_pair, parse_pairs, read_pairs, shuffled

_IFEVAL = ("prompt", "instruction_id_list", "kwargs")
_WITHOUT = "prompt_without_instruction"
_CHATS = ("messages", "conversations", "conversation")
_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}  # all else speaks for the model

_GROUPS = {
    "Where Pairs Are": ("prompt", "contrast", "task", "chat"),
    "Which Of Them": ("limit", "seed"),
    "Output Settings": ("out", "quiet"),
}
_EPILOG = """\b
Examples:
  wp-pairs ifeval-single-instruction.jsonl --out ifeval.pairs.jsonl
  wp-pairs train.parquet --prompt question --task maths --limit 100 --out maths.jsonl
  wp-pairs edits.csv --prompt with --contrast without --task kind --out edits.jsonl
  wp-pairs sharegpt.json --limit 200 --seed 1 --out chats.jsonl

FILE ends in .jsonl, .json, .csv or .parquet. Rows with instruction_id_list and kwargs are IFEval's; a column named
messages, conversations or conversation holds chats.
"""


@click.command(cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--prompt", metavar="COLUMN", help="Column of texts or chats that ask for it (default: IFEval's, or the chats)."
)
@click.option(
    "--contrast",
    metavar="COLUMN",
    help=f"Column of the same requests without it (default: IFEval's {_WITHOUT}, if any).",
)
@click.option(
    "--task",
    metavar="COLUMN|NAME",
    help="Column of tasks, or one task's name (default: IFEval's types, or FILE's name).",
)
@click.option(
    "--chat/--no-chat", default=None, help="Prompts are messages of a chat (default: those of IFEval and of chats)."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Pairs a task at most, drawn by --seed.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of that draw.")
@click.option("--out", required=True, metavar="FILE.jsonl", help="File of pairs to write.")
@quiet_option()
@click.version_option(__version__)
def main(source: Path, out: str, limit: int | None, seed: int, quiet: bool, **where: Any) -> None:
    """Make pairs for wp-score out of IFEval's rows, a data set's columns or chat logs.

    What cannot be a pair is left out, and said with the reason.
    """
    target = _check_out(out, source)
    claim(target)
    found = convert(source, **where)
    pairs = drawn(found.pairs, limit, seed)
    text = "".join(json.dumps(fields_of(pair), ensure_ascii=False) + "\n" for pair in pairs)
    parse_pairs(text, out)
    write_text(target, text)
    if not quiet:
        for line in (*_counts(pairs, found), f"{found.rows} rows of {source}, {len(pairs)} pairs; written: {out}"):
            echo(line, err=True)


def _check_out(out: str, source: Path) -> Path:
    """The file that may be written: a new one, or one of pairs. Raises `BadInput`."""
    if os.path.isdir(out):
        raise BadInput(f"{out}: this is a folder; name a file, such as {Path(out) / 'pairs.jsonl'}.")
    refuse_inputs(out, [source], holds=False)
    if Path(out).suffix in (".csv", ".tsv", ".parquet"):
        raise BadInput(f"{out}: pairs are JSON lines; name a file such as {Path(out).with_suffix('.jsonl')}.")
    if os.path.lexists(out):
        try:
            read_pairs(out)
        except BadInput:
            raise BadInput(
                f"{out}: there is a file of this name that is no file of pairs; move it away, or name another."
            ) from None
    return check_writable_parent(out)


@dataclass
class Converted:
    """The pairs of a file, and what is to be said of the rest.

    unusable  reason -> how many rows, and where the first of them stands
    notes     what pairs had that a pair does not hold -> how many
    """

    rows: int = 0
    pairs: list[Pair] = field(default_factory=list)
    duplicates: int = 0
    unusable: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def leave_out(self, where: str, reason: str) -> None:
        count, first = self.unusable.get(reason, (0, where))
        self.unusable[reason] = (count + 1, first)

    def note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def reasons(self) -> list[str]:
        return [f"{count} rows left out: {why} ({first})." for why, (count, first) in self.unusable.items()]


@dataclass(frozen=True)
class _Columns:
    """Where a pair stands in a row.

    chats: the prompt's column is taken for one of chats by its name alone
    task: of a column or, with `named`, the one there is; None: IFEval's types
    """

    prompt: str
    chats: bool
    contrast: str | None
    task: str | None
    named: bool
    ifeval: bool
    chat: bool | None


def convert(
    source: Path,
    prompt: str | None = None,
    contrast: str | None = None,
    task: str | None = None,
    chat: bool | None = None,
) -> Converted:
    """The pairs of a file, in its order; the arguments are the command's flags.

    Raises `BadInput` for a file that cannot be read, a column that it lacks, and where no row can be a pair.
    """
    wanted = {prompt, contrast, task, *_IFEVAL, _WITHOUT, *_CHATS}
    names: dict[str, None] = {}
    rows: list[tuple[str, Mapping[str, Any] | None]] = []
    for where, raw in read_records(source):
        row = {_CHATS[0]: raw} if isinstance(raw, list) else raw
        if not isinstance(row, dict):
            rows.append((where, None))
            continue
        names |= dict.fromkeys(row)
        rows.append((where, {name: value for name, value in row.items() if name in wanted}))
    if not rows:
        raise BadInput(f"{source}: there are no rows in this file.")
    columns = _columns(source, names, prompt, contrast, task, chat)
    found = Converted(rows=len(rows))
    pairs = []
    for where, row in rows:
        try:
            pairs.append((where, _pair(row, columns, where, found.note)))
        except ValueError as error:
            found.leave_out(where, str(error))
    found.pairs = _of_one_kind(pairs, found)
    if not found.pairs:
        raise BadInput(f"{source}: none of its rows can be a pair: {' '.join(found.reasons())}")
    return found


def _columns(
    source: Path, names: Iterable[str], prompt: str | None, contrast: str | None, task: str | None, chat: bool | None
) -> _Columns:
    """Where pairs stand in rows of these columns. Raises `BadInput` for a column that is not there."""
    listed = list(names)
    ifeval = set(_IFEVAL) <= {*listed, *([_IFEVAL[0]] if prompt else [])}
    chosen = prompt or (_IFEVAL[0] if ifeval else next((name for name in _CHATS if name in listed), None))
    among = f"the columns are {', '.join(map(shown, listed[:20])) or 'none'}" + (" ..." if len(listed) > 20 else "")
    if chosen is None:
        raise BadInput(f"{source}: these are neither rows of IFEval nor chats; name a column by --prompt ({among}).")
    for flag, name in (("--prompt", prompt), ("--contrast", contrast)):
        if name is not None and name not in listed:
            raise BadInput(f"{source}: there is no column {shown(name)}, which {flag} names; {among}.")
    without = contrast or (_WITHOUT if ifeval and _WITHOUT in listed else None)
    named = task is not None and task not in listed
    if task is None and not ifeval:
        task, named = source.stem, True
    return _Columns(chosen, chosen != prompt and not ifeval, without, task, named, ifeval, chat)


def _pair(row: Mapping[str, Any] | None, columns: _Columns, where: str, note: Callable[[str], None]) -> Pair:
    """The pair in a row. Raises ValueError with the reason why it is none."""
    if row is None:
        raise ValueError("a row must be an object by column, or a chat")
    prompt, is_chat = _request(row.get(columns.prompt), "prompt", note)
    if columns.chats and not is_chat:
        raise ValueError(f"its {columns.prompt} are no list of messages")
    contrast = None
    if columns.contrast is not None and row.get(columns.contrast) not in (None, "", []):
        contrast, _ = _request(row[columns.contrast], "contrast", lambda _: None)
        if contrast == prompt:
            raise ValueError("its contrast is the prompt itself")
    task, check = _asked(row, columns, note) if columns.ifeval else (None, None)
    if columns.task is not None:
        task = columns.task if columns.named else _task(row.get(columns.task))
    chat = is_chat or columns.ifeval if columns.chat is None else columns.chat
    try:
        content = {"task": task, "prompt": prompt, "contrast": contrast, "check": check, "chat": chat}
        return parse_pair(content, where)
    except BadInput as error:
        raise ValueError(error.message.removeprefix(f"{where}: ").rstrip(".")) from error


def _request(value: Any, what: str, note: Callable[[str], None]) -> tuple[str, bool]:
    """A request as text, and whether it comes from a chat. Raises ValueError."""
    if value is None:
        raise ValueError(f"it has no {what}")
    chat = isinstance(value, list)
    text = _first_message(value, note) if chat else value
    if not isinstance(text, str):
        raise ValueError(f"its {what} is no text")
    if not text.strip():
        raise ValueError(f"its {what} is empty")
    return text, chat


def _first_message(messages: list[Any], note: Callable[[str], None]) -> Any:
    """What the user says first: `role` and `content`, or ShareGPT's `from` and `value`. Raises ValueError."""
    said = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("its chat has a message that is no object")
        role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str):
            raise ValueError("its chat has a message without role and content, or from and value")
        said.append((_ROLES.get(role.lower(), "model"), content))
    if any(role == "system" for role, _ in said):
        note("chats have a system prompt, which is left out; wp-score --system puts one before all prompts")
    turns = [(role, content) for role, content in said if role != "system"]
    if not turns or turns[0][0] != "user":
        raise ValueError("its chat does not begin with a message of the user")
    if sum(role == "user" for role, _ in turns) > 1:
        note("chats have further messages of the user, which are left out")
    return turns[0][1]


def _asked(
    row: Mapping[str, Any], columns: _Columns, note: Callable[[str], None]
) -> tuple[str | None, dict[str, Any] | None]:
    """Task and check of a row of IFEval. Raises ValueError."""
    kinds, given = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError("its instruction_id_list is no list of texts")
    if not isinstance(given, list) or len(given) != len(kinds) or not all(isinstance(k, dict | None) for k in given):
        raise ValueError("its kwargs are no list of objects, one for each instruction")
    if len(kinds) != 1:
        if columns.task is None:
            raise ValueError("it has several instructions or none, so no one type names its task; --task takes it")
        note("rows have several instructions or none; their pairs carry no check")
        return None, None
    from mergekit_wp.scoring.anchor.graders import ifeval_trouble

    # The Hub's rows have the arguments of all instructions, null where they are another's.
    kwargs = {name: value for name, value in (given[0] or {}).items() if value is not None}
    if trouble := ifeval_trouble(kinds[0], kwargs):
        note(f"rows make pairs without a check: {trouble}")
        return kinds[0], None
    return kinds[0], {"ifeval": kinds[0], "kwargs": kwargs}


def _task(value: Any) -> str:
    """The task that a column names; a slash, which names of tensors have, becomes a dash. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("its task is no name")
    return value.strip().replace("/", "-")


def _of_one_kind(pairs: Iterable[tuple[str, Pair]], found: Converted) -> list[Pair]:
    """Each prompt once a task, and tasks whose pairs have all a contrast or none."""
    kept: dict[tuple[str, str], tuple[str, Pair]] = {}
    for where, pair in pairs:
        if (pair.task, pair.prompt) in kept:
            found.duplicates += 1
        else:
            kept[pair.task, pair.prompt] = where, pair
    with_contrast = {pair.task for _, pair in kept.values() if pair.contrast is not None}
    usable = []
    for where, pair in kept.values():
        if pair.contrast is None and pair.task in with_contrast:
            found.leave_out(where, "it has no contrast, and others of its task have one")
        else:
            usable.append(pair)
    return usable


def drawn(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    """At most `limit` pairs of each task, drawn with `seed`, in the order they have."""
    if limit is None:
        return pairs
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.task, []).append(place)
    chosen = {place for task, its in places.items() for place in shuffled(its, seed, task)[:limit]}
    return [pair for place, pair in enumerate(pairs) if place in chosen]


def _counts(pairs: list[Pair], found: Converted) -> Iterable[str]:
    """What a person checks: pairs by task, and what was left out."""
    for task, rows in by_task(pairs).items():
        kind = "without contrast" if rows[0].contrast is None else "with contrast"
        checks = sum(pair.check is not None for pair in rows)
        yield f"  {task}: {len(rows)} {kind}" + (f", {checks} with a check" if checks else "")
    if any(pair.contrast is None for pair in pairs):
        yield "Without a contrast, kl (the default) needs none; a direction then contrasts the expert with the base."
    if len(pairs) < len(found.pairs):
        yield f"Drawn out of {len(found.pairs)}."
    if found.duplicates:
        yield f"{found.duplicates} rows left out: their task has the same prompt before."
    yield from found.reasons()
    yield from (f"{count} {what}." for what, count in found.notes.items())


if __name__ == "__main__":
    main()
