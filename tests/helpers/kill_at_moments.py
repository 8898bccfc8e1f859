"""A program for test_kills: run one stage 20 times, killed each time at another moment, then once to its end.

A moment is a change of the file system (a file opened for writing, a rename, a removal, a folder made) under the
stage's folder, seen by an audit hook: those of an undisturbed run are counted first, and 20 spread over them are taken.
The process is killed with -9 just before the change. Every run is a fork of this process, which has imported all.
Prints JSON: the moments there were, the kills, wrong outputs found under the final name, and what is left at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SOURCE_DATE_EPOCH": "1700000000"}
KILLS = 20
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


def main() -> None:
    stage, folder = sys.argv[1], Path(sys.argv[2])
    run, out, *grows = STAGES[stage](folder)
    before = {path.name for path in folder.iterdir()}

    def clear() -> None:
        for path in folder.iterdir():
            if path.name not in before:
                remove(path)

    seen, moments = os.pipe()
    assert forked(lambda: (watch(folder, None, moments), run())) == 0, "an undisturbed run failed"
    os.close(moments)
    total = len(os.read(seen, 1 << 20))
    right = content(out)
    assert right, f"{stage} wrote nothing"
    wrong = kills = 0
    for i in range(KILLS):
        if i % 2 == 0:  # every second run finds what a killed one left, and may go on from it
            clear()
        at = i * total // KILLS
        kills += forked(lambda at=at: (watch(folder, at, None), run())) == -signal.SIGKILL  # type: ignore[misc]
        found = content(out)
        wrong += found not in (None, right) and not (grows and grows[0](found, right))
    assert forked(run) == 0, "the last run failed"
    left = sorted({path.name for path in folder.iterdir()} - before - {out.name})
    same = content(out) == right
    print(json.dumps({"moments": total, "kills": kills, "wrong": wrong, "left": left, "same": same}))


def forked(work: Callable[[], object]) -> int:
    """The exit code of `work` in a child, negative for a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            work()
            code = 0
        except SystemExit as leaving:
            code = 0 if leaving.code in (0, None) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watch(folder: Path, kill_at: int | None, tell: int | None) -> None:
    """Count the changes under `folder` from here on: kill this process at one of them, or write a byte for each."""
    count = 0
    inside = str(folder)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in WRITES or not str(arguments[0] if arguments else "").startswith(inside):
            return
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if tell is not None:
            os.write(tell, b".")

    sys.addaudithook(hook)


def content(out: Path) -> str | None:
    """A digest of a file, or of all files of a folder but for notes of time; None where it is not."""
    if not out.exists():
        return None
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(out)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return "\n".join(line for line in lines if not line.startswith((".digests", "wp_audit")))


def remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)


def pairs(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"task": "t", "prompt": f"w{i} w5"}) for i in range(4)))
    return path


def score(folder: Path):
    """Exact over whole answers: finished layers, and answers, are kept beside the output and gone on from."""
    from merge_world import World

    from mergekit_wp.scoring.cli import main as command

    world = World(folder, "llama", experts=1).build()
    out = folder / "s.safetensors"
    arguments = ["--base", world.base, "--expert", world.expert(0), "--pairs", pairs(folder), "--method", "exact"]
    arguments += ["--answer-tokens", 2, "--batch-size", 1, "--device", "cpu", "--out", out, "--quiet"]
    return lambda: command([str(a) for a in arguments]), out


def fit(folder: Path):
    """Answers and finished steps are kept beside the output and gone on from."""
    from merge_world import World

    from mergekit_wp.fit.cli import main as command

    world = World(folder, "llama", experts=2).build(num_hidden_layers=2)
    prompts, out = pairs(folder), folder / "f.safetensors"
    experts = [{"expert": str(world.expert(k)), "pairs": str(prompts)} for k in range(2)]
    (folder / "fit.yaml").write_text(json.dumps({"base": str(world.base), "experts": experts}))
    arguments = [folder / "fit.yaml", "--answer-tokens", 2, "--steps", 3, "--look-every", 2, "--device", "cpu"]
    arguments += ["--out", out, "--quiet"]
    return lambda: command([str(a) for a in arguments]), out


def aim(folder: Path):
    from merge_world import World

    from mergekit_wp.calibrate import main as command

    world = World(folder, "llama", experts=1).build()
    (folder / "texts.txt").write_text("\n\n".join(f"w{i} w5 w7 w9 w1 w2 w3 w4" for i in range(8)))
    out = folder / "a.safetensors"
    arguments = [world.base, "--texts", folder / "texts.txt", "--tokens", 8, "--device", "cpu", "--out", out, "--quiet"]
    return lambda: command([str(a) for a in arguments]), out


def merge(folder: Path):
    import mergekit.merge  # noqa: F401
    from merge_world import World

    from mergekit_wp.merge.cli import main as command

    world = World(folder, "llama").build(num_hidden_layers=2)
    recipe = world.recipe()
    return lambda: command([str(recipe), str(folder / "m"), "--quiet", "--overwrite"]), folder / "m"


def patch(folder: Path):
    """The small file; a folder is made as wp-merge makes it."""
    import mergekit.merge  # noqa: F401
    from merge_world import World

    from mergekit_wp.merge.patch_cli import main as command

    world = World(folder, "llama", experts=1).build(num_hidden_layers=2)
    models, out = [world.base, world.expert(0), world.score(0)], folder / "p.safetensors"
    return lambda: command([*map(str, models), "--top", "30%", "--sparse", "--quiet", "--out", str(out)]), out


def push(folder: Path):
    """What is staged beside the merge; the upload has tests of its own."""
    import push_world

    from mergekit_wp.push.cli import main as command

    push_world.build(folder)

    def some_of_the_files(found: str, right: str) -> bool:
        """The folder is filled file by file, and emptied by the next push; what is in it is whole."""
        final = {line for line in found.splitlines() if ".partial-" not in line}
        return final <= set(right.splitlines())

    run = lambda: command([str(folder / "w/out"), push_world.REPO, "--dry-run"])  # noqa: E731
    return run, folder / "w/out.push", some_of_the_files


def evaluate(folder: Path):
    """The row of a model task by task, with lm-eval's answers given: what is kept is the cache file."""
    from types import SimpleNamespace

    from mergekit_wp.eval.measure import cache_file, read_cache, write_cache

    model = SimpleNamespace(name="m", reference="m", fingerprint="0" * 64)
    path = cache_file(folder / "cache", model, "k" * 64)
    answers = {str(task): {"results": {"acc,none": task / 30}, "samples": 4} for task in range(30)}

    def work() -> None:
        done = read_cache(path)
        for task, entry in answers.items():
            if task not in done:
                done[task] = entry
                write_cache(path, model, done)

    def right_as_far_as_it_goes(_found: str, _right: str) -> bool:
        found = read_cache(path)
        return found != {} and all(answers[task] == entry for task, entry in found.items())

    return work, path, right_as_far_as_it_goes


def steps(folder: Path):
    """Three steps of wp-run, each a small command; the stamps say what is done."""
    from mergekit_wp.execute import Stamps, Step
    from mergekit_wp.pipeline.cli import run_steps

    names = ("one", "two", "three")
    made, before = [folder / f"{name}.txt" for name in names], [folder / "in.txt"]
    before[0].write_text("x")
    chain = []
    for name, out, source in zip(names, made, [*before, *made], strict=False):
        code = f"import os; open({str(out)!r} + '~', 'w').write(open({str(source)!r}).read() + 'y')"
        code += f"; os.replace({str(out)!r} + '~', {str(out)!r})"
        chain.append(Step(name, name, name, ("python", "-c", code), (source,), (out,), ()))
    return lambda: run_steps(chain, Stamps.below(folder / ".steps")), made[-1]


def convert(folder: Path):
    from mergekit_wp.scoring.convert import main as command

    source, out = folder / "rows.csv", folder / "made.jsonl"
    source.write_text("q\n" + "".join(f"question {i}\n" for i in range(50)))
    return lambda: command([str(source), "--prompt", "q", "--limit", "20", "--out", str(out), "--quiet"]), out


def study(folder: Path):
    """The folder of a part of wp-study, written in the place of the one that is there."""
    import safetensors.torch  # noqa: F401  (not once a fork)
    from markupsafe import Markup

    from mergekit_wp.study.parts import Part, PartResult, write_part

    part = Part("p", "P", lambda *_: PartResult({}, {}, {}, Markup("")), (), False, ())
    result = PartResult({"x": 1}, {"t": [["a"], [1.5]]}, {"s": Markup("<svg></svg>")}, Markup("<p></p>"))
    return lambda: write_part(part, folder, {"x": "y"}, result), folder / "p"


STAGES = {
    "pairs": convert,
    "score": score,
    "fit": fit,
    "aim": aim,
    "merge": merge,
    "patch": patch,
    "push": push,
    "evaluate": evaluate,
    "study": study,
    "run": steps,
}
