"""Damaged files of every format, and what may come of reading one: the value that it says, or one sentence.

    python tests/helpers/fuzz.py --mutants 10000          (`make fuzz`; about an hour)
    python tests/helpers/fuzz.py --only score --from 4711 --mutants 1

A mutant is made from a valid file by its number alone, so each can be had again. Wrong is: any exception but
`BadInput`, a sentence that is long or cannot be printed, more than a second of computing, and a value that is taken
though the file does not say it. The last is judged by `Format.judge`, which knows nothing of the readers: it reads
with the plain libraries and compares.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
import yaml

from mergekit_wp.errors import BadInput

SECONDS = 1.0
HUNG = 20  # wall-clock seconds, on a machine that other work keeps busy

# What stands for "something else" in a document: other types, edges of ranges, texts that break lines and paths.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 2**63, 10**30, -(2**64), 0.5, 1.0, -0.0, 1e308,
    float("nan"), float("inf"),
    "", " ", "0", "1", "x", "true", "null", "nan", "../../x", "/dev/zero", "a/b", "a\nb", "a\0b", "\x1b[31m", "\u202e",
    "\ud800", "x" * 5000, "auto", "kl", "wp", "float32", "2026-01-01", [], [1], [[1, 2], [3]], ["x"], [None], {},
    {"x": 1}, {"": ""}, [[[[[[]]]]]],
]  # fmt: skip
TOKENS = [
    b"", b"\0", b"\n", b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"- ", b"&a ", b"*a", b"<<: ", b"!!int ", b"? ",
    b"|",
    b"# ", b"---\n", b"\xff", b"\xc3", b"\xed\xa0\x80", b"0x_", b"1e999", b"NaN", b"9" * 400, b"null", b"true",
    b"\\ud800",
    b"\\u0000", b"[" * 200, b'{"a":' * 100, b"2001-99-99", b"\t", b"\xef\xbb\xbf",
]  # fmt: skip

_UNWRITABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)


@dataclass(frozen=True)
class Format:
    """A kind of file: where it lies, a valid one, how it is read, and who judges what was read.

    judge: (bytes of the mutant, value) -> what is wrong with taking it, or None
    load, dump: for mutants that are documents still; None for mutants of bytes alone
    """

    name: str
    path: Path
    valid: bytes
    read: Callable[[Path], Any]
    judge: Callable[[bytes, Any], str | None]
    load: Callable[[bytes], Any] | None = None
    dump: Callable[[Any], bytes] | None = None


@dataclass(frozen=True)
class Failure:
    """A mutant that came to something else than it may."""

    format: str
    number: int
    what: str


def check(form: Format, number: int) -> tuple[bool, Failure | None]:
    """Whether the mutant was taken, and what was wrong about that."""
    content = mutant(form, number)
    form.path.write_bytes(content)
    begun = time.process_time()
    try:
        with not_longer_than(HUNG):
            value = form.read(form.path)
    except BadInput as error:
        return False, _fail(form, number, _sentence(error.format_message()) or _slow(begun))
    except _HangsError:
        return False, Failure(form.name, number, f"hangs for {HUNG} s")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = ascii(str(error))[:150]
        return False, Failure(form.name, number, f"{type(error).__name__} at {place.filename}:{place.lineno}: {said}")
    return True, _fail(form, number, form.judge(content, value) or _slow(begun))


def mutant(form: Format, number: int) -> bytes:
    """The mutant of this number; number 0 is the valid file."""
    rng = random.Random(f"{form.name}/{number}")
    if number == 0:
        return form.valid
    if form.load is not None and form.dump is not None and rng.random() < 0.7:
        document = copy.deepcopy(form.load(form.valid))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            document = _change(document, rng)
        try:
            return form.dump(document)
        except _UNWRITABLE:  # there is no such document
            pass
    content = bytearray(form.valid)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _damage(content, rng)
    return bytes(content)


def _damage(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 2, 8, 64, 512)))
    how = rng.randrange(6)
    if how == 0:
        content[at:at] = rng.choice(TOKENS)
    elif how == 1:
        content[at:end] = rng.choice(TOKENS)
    elif how == 2 and at < len(content):
        content[at] ^= 1 << rng.randrange(8)
    elif how == 3:
        del content[at:]
    elif how == 4:
        content[at:at] = content[at:end] * rng.choice((1, 1, 30))
    else:
        content[at:end] = rng.randbytes(end - at)


def _change(node: Any, rng: random.Random) -> Any:
    """The document with one of its places changed; places of all depths are equally likely."""
    places = list(_places(node))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        name = rng.choice([f"{key}x", str(key)[:-1], rng.choice(list(holder)), str(rng.choice(ODD))[:700]])
        holder[name] = holder[key]
    elif how == 2:
        other_holder, other = rng.choice(places)
        holder[key] = copy.deepcopy(other_holder[other])
    elif how == 3 and isinstance(holder[key], (int, float)):
        holder[key] = rng.choice(
            (str(holder[key]), holder[key] + 1, -holder[key], holder[key] + 0.5, holder[key] * 1e9)
        )
    elif how == 4 and isinstance(holder[key], str):
        holder[key] = rng.choice(
            (holder[key] + "x", holder[key][:-1], holder[key].upper(), holder[key] * 400, [holder[key]])
        )
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return node


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from _places(value)


def _fail(form: Format, number: int, what: str | None) -> Failure | None:
    return Failure(form.name, number, what) if what else None


def _sentence(message: str) -> str | None:
    """What is wrong with a message to a person."""
    if len(message) > 2200:
        return f"says {len(message)} characters"
    odd = [char for char in message if not char.isprintable()]
    return f"says the character {odd[0]!a}: {message[:200]!a}" if odd else None


def _slow(begun: float) -> str | None:
    took = time.process_time() - begun
    return f"computes for {took:.1f} s" if took > SECONDS else None


class _HangsError(Exception):
    pass


@contextmanager
def not_longer_than(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _HangsError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- documents as the plain libraries read them -----------------------------------------------------------------------


def json_load(content: bytes) -> Any:
    return json.loads(content)


def json_dump(document: Any) -> bytes:
    return json.dumps(document).encode()


def yaml_dump(document: Any) -> bytes:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def header_load(content: bytes) -> Any:
    """A safetensors file as a document: its header (with the JSON of its metadata parsed) and its data."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = {key: json.loads(value) for key, value in header.get("__metadata__", {}).items() if value[:1] == "{"}
    return {"header": header, "metadata": metadata, "data": list(content[8 + length :])}


def header_dump(document: Any) -> bytes:
    header = document["header"]
    if document["metadata"]:
        header["__metadata__"] = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in document["metadata"].items()
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(document["data"])


# --- judges -----------------------------------------------------------------------------------------------------------


def equal_keys(content: bytes) -> str | None:
    """Two equal keys in a YAML, by PyYAML's events: whatever reads it must not choose one in silence."""
    stack: list[list[Any]] = []  # of open collections: [is a mapping, is a key next, keys]
    for event in yaml.parse(content):
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            stack.pop()
        elif isinstance(event, (yaml.NodeEvent,)):
            if stack and stack[-1][0]:
                if stack[-1][1] and isinstance(event, yaml.ScalarEvent):
                    if event.value in stack[-1][2]:
                        return f"takes two keys {event.value!a}"
                    stack[-1][2].append(event.value)
                stack[-1][1] = not stack[-1][1]
            if isinstance(event, yaml.MappingStartEvent):
                stack.append([True, True, []])
            elif isinstance(event, yaml.SequenceStartEvent):
                stack.append([False, False, []])
    return None


def _same(found: Any, said: Any) -> bool:
    """Equal, and of one type: True is not 1, and 1.0 is not 1 unless a number was asked for."""
    if isinstance(found, dict) and isinstance(said, dict):
        return found.keys() == said.keys() and all(_same(found[key], said[key]) for key in found)
    if isinstance(found, (list, tuple)) and isinstance(said, (list, tuple)):
        return len(found) == len(said) and all(map(_same, found, said))
    if isinstance(found, float):
        return type(said) in (int, float) and found == said
    return type(found) is type(said) and found == said


def judge_yaml(fields: Callable[[Any], dict[str, Any]]) -> Callable[[bytes, Any], str | None]:
    """Every field that was read is the one that PyYAML reads, and no key stands twice."""

    def judge(content: bytes, value: Any) -> str | None:
        said = yaml.safe_load(content)
        found = fields(value)
        for name, what in said.items():
            if name not in found:
                return f"takes the unknown field {name!a}"
            if not _same(found[name], what):
                return f"takes {name}: {what!a} as {found[name]!a}"
        return equal_keys(content)

    return judge


def is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096


def is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def is_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_text, value.values()))


def is_model(value: Any) -> bool:
    return (
        set(value) == {"name", "revision", "config", "tensors"}
        and is_text(value["name"])
        and (value["revision"] is None or is_text(value["revision"]))
        and is_hash(value["config"])
        and is_hash(value["tensors"])
    )


def judge_scores(content: bytes, value: Any) -> str | None:
    """The metadata is of the types that scorefile.py says, and what is said over all tasks is their mean."""
    document = header_load(content)
    meta, tensors = json.loads(document["header"]["__metadata__"]["wp"]), safetensors.numpy.load(content)
    rules: dict[str, Callable[[Any], bool]] = {
        "base": is_model,
        "expert": is_model,
        "method": lambda v: v in ("writeback", "attr", "exact", "atp", "ap"),
        "utility": lambda v: v in ("kl", "staged", "staged-projection", "anchor", "projection"),
        "gap": lambda v: v in ("sample", "mean"),
        "split": lambda v: v in (None, "half", "shared"),
        "anchor_layer": lambda v: v is None or (is_count(v) and v < meta["geometry"]["layers"]),
        "seed": is_count,
        "versions": is_versions,
        "device": is_text,
        "dtype": lambda v: v in ("float32", "bfloat16", "float16", "float64"),
        "format": lambda v: v in (1, 2, 3) and type(v) is int,
        "date": is_text,
    }
    for name, fits in rules.items():
        if not fits(meta[name]):
            return f"takes {name}: {meta[name]!a}"
    for task, about in meta["tasks"].items():
        if not is_text(task) or not (is_count(about["extraction"]) and is_count(about["scoring"])):
            return f"takes the task {task!a}: {about!a}"
        for stats in about["utilities"].values():
            if not (is_count(stats["used"]) and is_count(stats["dropped"]) and is_number(stats["mean_gap"])):
                return f"takes the utility {stats!a}"
    for kind in ("heads", "neurons"):
        own = np.stack([tensors[f"tasks/{task}/{kind}"] for task in meta["tasks"]]).astype(np.float64)
        if not np.all(np.abs(tensors[kind] - own.mean(0)) <= 2e-5 * np.abs(own).mean(0)):
            return f"takes {kind} that are not the mean of the tasks"
        if not np.array_equal(getattr(value, kind).numpy(), tensors[kind]):
            return f"reads other {kind} than are in the file"
    return None


def judge_fit(content: bytes, value: Any) -> str | None:
    """Weights within bounds, as in the file; one entry an expert; the step is one of the curve's."""
    meta = json.loads(header_load(content)["header"]["__metadata__"]["wp_fit"])
    K, curve = len(meta["experts"]), meta["curve"]
    if not (K and len(meta["prompts"]) == len(meta["unrecovered"]) == K and all(map(is_model, meta["experts"]))):
        return f"takes {meta!a:.200}"
    if not (
        is_model(meta["base"]) and is_versions(meta["versions"]) and is_text(meta["start"]) and meta["format"] == 1
    ):
        return f"takes {meta!a:.200}"
    losses = [x for point in curve for x in (point["fitted"], point["held_out"] or 0.0)]
    losses += [row[name] for row in meta["unrecovered"] for name in ("base", "start", "end")]
    counts = [meta[name] for name in ("best_step", "seed", "answer_tokens")]
    counts += [row[name] for row in meta["prompts"] for name in ("fitted", "held_out")]
    if not (all(map(is_number, losses)) and all(map(is_count, counts))):
        return f"takes {meta!a:.200}"
    if meta["best_step"] not in [point["step"] for point in curve]:
        return f"takes the step {meta['best_step']}"
    for name, tensor in safetensors.numpy.load(content).items():
        good = (tensor >= 0).all() and (tensor <= 2).all() and len(tensor) == K
        if not (good and np.array_equal(tensor, getattr(value, name).numpy())):
            return f"takes the tensor {name!a}"
    return None


def judge_patch(content: bytes, value: Any) -> str | None:
    meta = json.loads(header_load(content)["header"]["__metadata__"]["wp_patch"])
    chosen = all(is_text(key) and is_text(word) for key, word in meta["chosen"].items())
    models = is_model(meta["recipient"]) and is_model(meta["donor"]) and is_text(meta["date"])
    if not (chosen and models and is_versions(meta["versions"]) and meta["format"] == 1):
        return f"takes {meta!a:.200}"
    for name, tensor in safetensors.numpy.load(content).items():
        kind = name if name in ("heads", "neurons") else ""
        read = value.subset.masks[kind].nonzero() if kind else value.values[name.removeprefix("slices/")]
        if not (np.isfinite(tensor).all() and np.array_equal(tensor, read.numpy())):
            return f"takes the tensor {name!a}"
    return None


def judge_activations(content: bytes, value: Any) -> str | None:
    meta = json.loads(header_load(content)["header"]["__metadata__"]["wp_aim"])
    counts = all(is_count(meta[name], 1) for name in ("documents", "blocks", "tokens"))
    texts = is_text(meta["texts"]) and is_text(meta["device"]) and is_text(meta["date"])
    if not (counts and texts and is_model(meta["base"]) and is_versions(meta["versions"]) and meta["format"] == 1):
        return f"takes {meta!a}"
    for name, tensor in safetensors.numpy.load(content).items():
        if not (
            np.isfinite(tensor).all() and (tensor >= 0).all() and np.array_equal(tensor, value.means[name].numpy())
        ):
            return f"takes the tensor {name!a}"
    return None


def judge_mark(content: bytes, value: Any) -> str | None:
    said = yaml.safe_load(content)
    if not all(map(is_hash, said["files"].values())) or not all(is_hash(s["content"]) for s in said.get("scores", [])):
        return "takes a digest that is none"
    if not (said["format"] == 1 and is_text(said["method"]) and all(map(is_text, said["checked"]))):
        return f"takes {said!a:.200}"
    found = asdict(value)
    return next((f"takes {k}: {v!a:.100}" for k, v in said.items() if not _same(found[k], v)), equal_keys(content))


def judge_results(content: bytes, value: Any) -> str | None:
    said = json.loads(content)
    for row in said["rows"]:
        for column, cell in row["cells"].items():
            if not is_number(cell["value"]) or not (cell["stderr"] is None or is_number(cell["stderr"])):
                return f"takes the cell {column!a}: {cell!a}"
            if not (cell.get("samples") is None or is_count(cell["samples"])):
                return f"takes the cell {column!a}: {cell!a}"
    names = [row["name"] for row in said["rows"]]
    if len(set(names)) < len(names) or [row.model.name for row in value.rows] != names:
        return f"takes the rows {names!a}"
    for row, there in zip(value.rows, said["rows"], strict=True):
        for column, cell in row.cells.items():
            if cell.value != there["cells"][column]["value"]:
                return f"takes another value of {column!a}"
    return None


def judge_pairs(content: bytes, value: Any) -> str | None:
    rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    found = [{k: v for k, v in asdict(pair).items() if v not in (None, False)} for pair in value]
    said = [{k: v for k, v in row.items() if v is not None and v is not False} for row in rows]
    return None if _same(found, said) else "takes other pairs than are in the file"


def judge_answers(content: bytes, value: Any) -> str | None:
    first, *rows = [json.loads(line) for line in content.decode().split("\n") if line]
    meta, known = value
    told = {"files": "", **first}  # which may be left out
    wrong = not _same(json.loads(json.dumps(asdict(meta))), told) or any(len(r) != 4 or not r["answer"] for r in rows)
    said = {tuple(row["prompt"]): row["answer"] for row in rows}
    return "takes other answers than are in the file" if wrong or not _same(known, said) else None


def judge_header(content: bytes, value: Any) -> str | None:
    """What safetensors itself refuses is not taken, and the rest is what it says."""
    try:
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(content)
            file.flush()
            with safetensors.safe_open(file.name, framework="pt") as opened:
                said = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        return f"takes what safetensors refuses ({error!a:.100})"
    return None if {n: h.shape for n, h in value.items()} == said else "takes other shapes than are in the file"


def judge_config(content: bytes, value: Any) -> str | None:
    said = json.loads(content)
    wanted = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "neurons": "intermediate_size"}
    bad = [f for f, name in wanted.items() if not _same(getattr(value, f), said.get(name))]
    return f"takes {bad} otherwise than the file has them" if bad else None


def judge_index(content: bytes, value: Any) -> str | None:
    """Every tensor comes from a file of the folder, and all that are listed are there."""
    said = json.loads(content)["weight_map"]
    if missing := sorted(set(said) - set(value)):
        return f"takes a list with {missing[0]!a}, which is nowhere"
    outside = [name for name in said.values() if not isinstance(name, str) or "/" in name or ".." in name]
    return f"takes the shard {outside[0]!a}" if outside else None


def judge_chats(content: bytes, value: Any) -> str | None:
    """Every prompt is something that a message says, and no other row than is there makes one."""
    rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    said = {text for row in rows for place, _ in _places(row) if isinstance(place, dict) for text in _texts(place)}
    odd = [pair for pair in value.pairs if pair.prompt not in said or pair.contrast or pair.check or not pair.chat]
    if odd or len(value.pairs) > len(rows) or value.rows != len(rows):
        return f"takes {odd[:1]!a} out of {len(rows)} rows, as {value.rows}"
    return None


def _texts(message: dict[str, Any]) -> Iterator[str]:
    yield from (text for text in message.values() if isinstance(text, str))


def judge_ifeval(content: bytes, value: Any) -> str | None:
    """The rows are those of the file; what is more than in the file is null."""
    rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    if len(rows) != len(value):
        return f"takes {len(rows)} rows as {len(value)}"
    for said, found in zip(rows, value, strict=True):
        if any(not _same(found[name], said[name]) for name in ("key", "prompt", "instruction_id_list")):
            return f"takes {said!a} as {found!a}"
        for given, read in zip(said["kwargs"], found["kwargs"], strict=True):
            if any(not _same(read.get(name), given.get(name)) for name in {*given, *read}):
                return f"takes {given!a} as {read!a}"
    return None


def judge_table(content: bytes, value: Any) -> str | None:
    """The rows are those that the csv module reads."""
    text = content.decode("utf-8").removeprefix("\ufeff")
    head, *rows = [cells for cells in csv.reader(io.StringIO(text, newline="")) if cells] or [[]]
    return None if value == [dict(zip(head, cells, strict=True)) for cells in rows] else f"takes {value!a}"


def unjudged(_content: bytes, _value: Any) -> str | None:
    """A memory of ours: whatever is damaged counts as not there."""
    return None


# --- the formats ------------------------------------------------------------------------------------------------------


def formats(root: Path) -> list[Format]:
    """All of them, with valid files made below `root`."""
    import fit_example
    import tiny
    from eval_world import TASKS
    from merge_world import write_random_scores
    from push_world import write_results

    from mergekit_wp.calibrate import read_texts
    from mergekit_wp.checkpoint.folder import Checkpoint
    from mergekit_wp.checkpoint.weights import read_header
    from mergekit_wp.eval.measure import read_cache
    from mergekit_wp.eval.official_data import PUBLISHED
    from mergekit_wp.eval.suite import read_suite
    from mergekit_wp.eval.tables import read_results
    from mergekit_wp.fit_file import read_fit, write_fit
    from mergekit_wp.hashing import FileDigests
    from mergekit_wp.merge.activations import Activations, Calibration, read_activations, write_activations
    from mergekit_wp.merge.certificate import Certificate, CertifiedScores, read_certificate
    from mergekit_wp.merge.patch_file import PatchFile, PatchMeta, read_patch, write_patch
    from mergekit_wp.merge.recipe import read_recipe
    from mergekit_wp.pipeline.spec import read_pipeline
    from mergekit_wp.records import csv_records
    from mergekit_wp.scores import Scores, read_scores, write_scores
    from mergekit_wp.scoring.config import load_job
    from mergekit_wp.scoring.convert import convert
    from mergekit_wp.scoring.pairs import read_pairs
    from mergekit_wp.scoring.resume import Resume
    from mergekit_wp.scoring.whole_answers import read_answers
    from mergekit_wp.subset import Subset

    root.mkdir(parents=True, exist_ok=True)
    small = {"hidden_size": 8, "intermediate_size": 3, "num_hidden_layers": 2, "head_dim": 4, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 5}  # fmt: skip
    base, expert = (tiny.random_model("llama", seed, **small) for seed in (1, 2))
    for name, model in (("base", base), ("expert", expert)):
        model.save_pretrained(root / name, max_shard_size="1KB")
    one = read_scores(write_random_scores(root / "one.safetensors", str(root / "base"), str(root / "expert"), 1))
    two = read_scores(write_random_scores(root / "two.safetensors", str(root / "base"), str(root / "expert"), 2))
    both = {"a": one.tasks["t"], "b": two.tasks["t"]}
    about = replace(one.meta, tasks=dict.fromkeys(both, one.meta.tasks["t"]), versions={"torch": "2"})
    write_scores(Scores.from_tasks(about, both), root / "scores.safetensors")
    write_fit(fit_example.example(), root / "fit.safetensors")
    means = {"model.norm.weight": torch.rand(8), "lm_head.weight": torch.rand(8)}
    calibration = Calibration(one.meta.base, "texts", 3, 2, 8, "float32", "cpu", {"torch": "2"}, "2026-11-21")
    write_activations(Activations(calibration, means), root / "activations.safetensors")
    taken = Subset(torch.tensor([[False, True], [False, False]]), torch.tensor([[True, False, True], [False] * 3]))
    layer = "model.layers.0."
    slices = {f"{layer}self_attn.q_proj.weight": torch.rand(4, 8), f"{layer}self_attn.o_proj.weight": torch.rand(8, 4),
              f"{layer}mlp.up_proj.bias": torch.rand(2)}  # fmt: skip
    cut = PatchMeta(one.meta.base, one.meta.expert, one.meta.geometry, {"top": "2"}, None, {"torch": "2"}, "2026-11-26")
    write_patch(PatchFile(cut, taken, slices), root / "patch.safetensors")
    write_results(root / "results", "f" * 64, root / "expert")
    shares = {"experts": ["x", "y"], "heads": [[0.5, 0.4], [0.5, 0.6]], "neurons": [[0.1, 0.4], [0.9, 0.6]]}
    mark = Certificate("wp", ("all is well",), {"config.json": "a" * 64}, (CertifiedScores("s", "b" * 64),), shares,
                {"torch": "2"}, "2026-11-21T00:00:00+00:00")  # fmt: skip
    job = {"base": "b", "expert": "e", "pairs": "p", "layer": 3, "gap_floor": 0.01, "samples": 4, "top": [2, "s"]}
    suite = {"name": "tiny", "tasks": TASKS, "batch_size": 4, "dtype": "auto", "max_gen_toks": 8,
             "backend_options": {"max_model_len": 64}}  # fmt: skip
    models = [{"model": str(root / name), "parameters": {"scores": f"{name}.s", "weight": 1}} for name in ("expert",)]
    recipe = {"merge_method": "wp", "base_model": str(root / "base"), "models": models, "parameters": {"scale": 1.5},
              "dtype": "float32", "slices": None}  # fmt: skip
    pipeline = {"out": "out", "base": "user/base", "experts": {"a": {"model": "user/a", "scoring": {"pairs": "p"}}},
                "merges": {"linear": {"merge_method": "linear", "expert_parameters": {"weight": 1.0}}, "wp": None},
                "push": {"merge": "wp", "to": "me/x", "private": True, "parents": {"a": "user/a"}},
                "score": {"flags": ["--device", "cpu"]}}  # fmt: skip
    pairs = [{"task": "t", "prompt": "p", "contrast": "c", "check": {"ifeval": "x:y", "kwargs": {"n": 1}}},
             {"task": "u", "prompt": "q"}]  # fmt: skip
    answers = [{"wp_answers": 1, "expert": asdict(one.meta.expert), "max_tokens": 3, "vocabulary": 97, "device": "cpu",
                "dtype": "float32", "versions": {"torch": "2"}, "date": "2026-11-25T00:00:00+00:00",
                "files": "b"},
               {"task": "t", "prompt": [5, 6], "answer": [7, 2], "text": " w3"},
               {"task": "u", "prompt": [8], "answer": [9, 9, 9], "text": " w5 w5 w5"}]  # fmt: skip
    chats = [{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
             {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
             {"messages": [{"role": "user", "content": "r"}]}]  # fmt: skip
    asked = [{"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
             {"key": 2, "prompt": "q", "instruction_id_list": ["keywords:existence", "language:response_language"],
              "kwargs": [{"keywords": ["a", "b"]}, {"language": "kn", "letter": None}]}]  # fmt: skip
    entry = {"results": {"acc,none": 0.5}, "samples": 3, "task": "t"}
    texts, state = [{"text": "a b"}, {"text": "c"}], {"digest": "a" * 64, "date": "2026-01-01"}
    known = {str(root / "base" / "config.json"): ["1 2", "a" * 64]}

    def config(path: Path) -> Any:
        checkpoint = Checkpoint.open(str(path.parent))
        checkpoint.fingerprint  # noqa: B018  (it may refuse, too)
        return checkpoint.geometry

    def recipe_of(path: Path) -> Any:
        found = read_recipe(str(path))
        found.config()
        return found

    def resume(path: Path) -> Any:
        first = Resume(path.parent / "out.safetensors")
        first.begin({}, "2026-01-01")
        assert first.folder is not None
        (first.folder / "run.json").write_bytes(path.read_bytes())
        return Resume(path.parent / "out.safetensors").begin({}, "2026-01-01")

    def indexed(path: Path) -> Any:
        return Checkpoint.open(str(path.parent)).tensors

    def load(path: Path) -> Any:
        return load_job(str(path), {})

    def published(path: Path) -> Any:
        return PUBLISHED["google/IFEval"].load(path.parent, "default")["train"]

    def table(path: Path) -> Any:
        return [row for _, row in csv_records(path)]

    def texts_of(path: Path) -> Any:
        return list(read_texts(str(path)))

    def digests(path: Path) -> Any:
        return FileDigests(path, print, keep=False)([shard])

    def lines(content: bytes) -> Any:
        return [json.loads(line) for line in content.splitlines()]

    def dump_lines(document: Any) -> bytes:
        return b"\n".join(map(json_dump, document if isinstance(document, list) else [document]))

    index = next((root / "base").glob("*.index.json"))
    shard = next((root / "base").glob("model-*.safetensors"))
    header, tensors = (json_load, json_dump), (header_load, header_dump)
    documents = (yaml.safe_load, yaml_dump)
    files = {
        name: (root / name).read_bytes()
        for name in (
            *("scores.safetensors", "fit.safetensors", "activations.safetensors", "patch.safetensors"),
            *("expert/config.json", "results/results.json"),
        )
    }
    return [
        Format("score", root / "s.safetensors", files["scores.safetensors"], read_scores, judge_scores, *tensors),
        Format("fit", root / "f.safetensors", files["fit.safetensors"], read_fit, judge_fit, *tensors),
        Format("activations", root / "a.safetensors", files["activations.safetensors"], read_activations,
               judge_activations, *tensors),
        Format("patch", root / "p.safetensors", files["patch.safetensors"], read_patch, judge_patch, *tensors),
        Format("header", root / "h.safetensors", shard.read_bytes(), read_header, judge_header, *tensors),
        Format("index", index, index.read_bytes(), indexed, judge_index, *header),
        Format("config", root / "expert/config.json", files["expert/config.json"], config, judge_config, *header),
        Format("job", root / "job.yaml", yaml_dump(job), load, judge_yaml(asdict), *documents),
        Format("suite", root / "suite.yaml", yaml_dump(suite), read_suite, judge_yaml(_suite_fields), *documents),
        Format("recipe", root / "recipe.yaml", yaml_dump(recipe), recipe_of, _judge_recipe, *documents),
        Format("pipeline", root / "pipeline.yaml", yaml_dump(pipeline), read_pipeline, _judge_pipeline, *documents),
        Format("mark", root / "mark.yml", mark.text().encode(), read_certificate, judge_mark, *documents),
        Format("results", root / "results.json", files["results/results.json"], read_results, judge_results, *header),
        Format("pairs", root / "pairs.jsonl", dump_lines(pairs), read_pairs, judge_pairs, lines, dump_lines),
        Format("answers", root / "a.jsonl", dump_lines(answers), read_answers, judge_answers, lines, dump_lines),
        Format("chats", root / "chats.jsonl", dump_lines(chats), convert, judge_chats, lines, dump_lines),
        Format("ifeval", root / "ifeval.jsonl", dump_lines(asked), published, judge_ifeval, lines, dump_lines),
        Format("table", root / "table.csv", b'a,b\n"x, ""y""\nz",2\n\n3,4\n', table, judge_table),
        Format("texts", root / "texts.jsonl", dump_lines(texts), texts_of, unjudged, lines, dump_lines),
        Format("cache", root / "cache.json", json_dump({"tasks": {"k": entry}}), read_cache, unjudged, *header),
        Format("digests", root / "digests.json", json_dump(known), digests, unjudged, *header),
        Format("resume", root / "run.json", json_dump(state), resume, unjudged, *header),
    ]  # fmt: skip


def _suite_fields(suite: Any) -> dict[str, Any]:
    found = asdict(suite)
    found["tasks"] = [{k: v for k, v in task.items() if v not in (None, {}, False)} for task in found["tasks"]]
    return found


def _judge_recipe(content: bytes, value: Any) -> str | None:
    said = yaml.safe_load(content)
    missing = [name for name in said if name not in value.content]
    return f"takes {missing!a} out of it" if missing else equal_keys(content)


def _judge_pipeline(content: bytes, value: Any) -> str | None:
    said = yaml.safe_load(content)
    same = list(value.experts) == list(said["experts"]) and list(value.merges) == list(said["merges"])
    return equal_keys(content) if same else "takes other experts or merges than are in the file"


def main() -> None:
    """Print a line a format, then the failures; exit code 1 if there are any."""
    parser = argparse.ArgumentParser(description="Read damaged files of every format.")
    parser.add_argument("--mutants", type=int, default=10_000, help="of each format (default: 10000)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first one (default: 0)")
    parser.add_argument("--only", action="append", help="this format alone")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="wp-fuzz-") as folder:
        for form in formats(Path(folder)):
            if options.only and form.name not in options.only:
                continue
            begun, taken, failures = time.monotonic(), 0, []
            for number in range(options.first, options.first + options.mutants):
                accepted, failure = check(form, number)
                taken += accepted
                failures += [failure] if failure else []
            bad += len(failures)
            seconds = time.monotonic() - begun
            print(
                f"{form.name:12} {options.mutants} mutants, {taken} taken, {len(failures)} wrong, {seconds:.0f} s",
                flush=True,
            )
            for failure in failures[:20]:
                print(f"  {failure.number}: {failure.what}", flush=True)
            form.path.write_bytes(form.valid)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
