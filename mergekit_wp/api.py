"""The Python API beside merges: `score`, `load_pair`, `patch`, `steer` (`from mergekit_wp import score, ...`).

Models are folders, Hub names (`base+lora` for an expert), or modules of transformers that are in memory already. What
`score` returns is what wp-score writes: the same numbers, by the same code. `merge` is in `merge.merging`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from mergekit_wp.checkpoint.adapters import merge_lora
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.in_memory import LiveModel, held, live_geometry, plain_tensors
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.checkpoint.vocabulary import load_tokenizer, tokenizer_in
from mergekit_wp.checkpoint.weights import HeldTensor, TensorHeader
from mergekit_wp.console import ProgressBars
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.geometry import Component, Geometry, text_name
from mergekit_wp.memory import pick_device
from mergekit_wp.outputs import check_file, claimed, scratch
from mergekit_wp.scores import METADATA_KEY, Scores
from mergekit_wp.scoring.anchor.cli import anchor_of
from mergekit_wp.scoring.anchor.steering import Steering, steered
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.models.load import check_pair, load_models
from mergekit_wp.scoring.models.precision import pick_dtype, stored_dtype
from mergekit_wp.scoring.prompts import prompts_of
from mergekit_wp.scoring.resume import Resume
from mergekit_wp.scoring.score import InMemory
from mergekit_wp.scoring.score import score as score_job
from mergekit_wp.scoring.whole_answers import answers_beside

_HELD = "prompts in memory"


def score(
    base: Any,
    expert: Any,
    prompts: Any,
    *,
    tokenizer: Any = None,
    column: str | None = None,
    task: str = "prompts",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **fields: Any,
) -> Scores:
    """Score every head [L, H] and neuron [L, F] of `expert`: the share of the gap to `base` that it restores alone.

    base, expert  folders, Hub names, or causal LMs of transformers in memory, which stay as they are; one that is on a
                  GPU is scored there
    prompts       a set (`builtin:maths`), a pairs file, `hf://datasets/OWNER/NAME`, a `datasets.Dataset`, or a list: of
                  texts, of (prompt, contrast), of dicts with the fields of a pairs file, of several of the former
    tokenizer     of a base in memory; None: the one in the folder that it was loaded from
    column        which column of a data set has the prompts; task: of prompts that name none
    out           a score file to write; beside it a run that is killed keeps its finished layers (`exact`, `ap`)
    progress      whether to show bars
    fields        every other field of a scoring job: method, utility, layer, samples, dtype, ... (`wp-score --help`)

    METHOD.md, 3, has the equations. The same numbers, to the bit, as `wp-score` on the folders that the models came
    from, as long as products run in float32. Raises `BadInput`, one sentence, for whatever you can mend.

    >>> s = score(base, expert, ["w1 w2 w3", "w4 w5"], progress=False, gap_floor=0)
    >>> s.heads.shape, list(s)
    (torch.Size([2, 4]), ['prompts'])
    >>> s.top(1)[0].layer in (0, 1)
    True
    """
    named = isinstance(prompts, str) and not prompts.startswith("hf://")  # wp-score reads these itself
    samples, seed = fields.get("samples"), fields.get("seed", 0)
    with ExitStack() as stack:
        live = _live(stack, base, expert, tokenizer)
        names = {role: live[role].name if role in live else given for role, given in _roles(base, expert)}
        job = ScoringJob.from_mapping({**fields, **names, "pairs": prompts if named else _HELD}, where="")
        reads = _reads(job, live, named)
        target = None if out is None else check_file(os.fspath(out), METADATA_KEY, "score", reads)
        kept = target is not None and job.answer_tokens and job.answers is None
        beside = answers_beside(target, reads) if target is not None and kept else None
        rows = None if named else prompts_of(prompts, task, column, samples, seed)
        if target is not None:
            stack.enter_context(claimed(target))
        bars = stack.enter_context(ProgressBars(progress))
        resume = Resume(target)
        scores = score_job(job, bars, resume=resume, held=InMemory(live, rows), answers=beside)
        if target is not None:
            scores.save(target)
            resume.forget()
    return scores


class LoadedPair(NamedTuple):
    """Base and expert as frozen modules of transformers on one device, and the base's tokenizer."""

    base: Any
    expert: Any
    tokenizer: Any


def load_pair(
    base: str, expert: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LoadedPair:
    """Load base and expert (`base+lora` too) as `score` does, after its checks: to score, patch, steer and generate.

    dtype: as of a scoring job: in which products run; on a CPU float32. Raises `BadInput`.

    >>> pair = load_pair(base_folder, expert_folder)
    >>> type(pair.base).__name__, pair.base.training
    ('LlamaForCausalLM', False)
    """
    job = ScoringJob(base, expert, _HELD, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    checked = check_pair(job)
    place = pick_device(device)
    products = pick_dtype(dtype, place, [stored_dtype(model.tensors) for model in (checked.base, checked.expert)])
    modules = load_models(job, checked, place, products)
    for name, module in zip((base, expert), modules, strict=True):
        _rename(module, name)
    tokenizer = load_tokenizer(checked.base.name, checked.base.folder, trust_remote_code)
    return LoadedPair(*modules, tokenizer)


@contextmanager
def patch(base: Any, expert: Any, components: Iterable[Component | str]) -> Iterator[Any]:
    """Inside the block, the slices that each component owns are the expert's, in the base's live module (Eq. 10).

    base        a causal LM of transformers in memory; the block gives it
    expert      folder, Hub name, `base+lora`, module, or state dict
    components  as `scores.top` gives them, or their names: L5H3 is head 3 of layer 5, L5N97 its neuron 97

    Values are rounded to the base's dtype. On leaving, also by an exception, the base has its own again, bit for bit.
    Raises `BadInput` for a component that the base does not have, and for an expert of another shape.

    >>> before = base.model.layers[1].mlp.up_proj.weight.clone()
    >>> with patch(base, expert, ["L1N7"]) as patched:
    ...     rows = (patched.model.layers[1].mlp.up_proj.weight != before).any(1).nonzero().flatten().tolist()
    >>> rows, torch.equal(base.model.layers[1].mlp.up_proj.weight, before)
    ([7], True)
    """
    with ExitStack() as stack:
        geometry = live_geometry(base, "base")
        chosen = list(dict.fromkeys(Component.parse(each) if isinstance(each, str) else each for each in components))
        for component in chosen:
            component.check(geometry)
        source = _decoder(stack, expert, geometry)
        targets = {plain: tensor.detach() for name, tensor in base.named_parameters() if (plain := text_name(name))}
        slices = [
            (targets[plain][where], source, plain, where)
            for component in chosen
            for plain, where in geometry.owned_slices(component.kind, component.layer, component.index)
            if plain in targets
        ]
        new = [_part(source, plain, where, view) for view, source, plain, where in slices]
        kept = [view.detach().clone() for view, *_ in slices]
        try:
            _write([view for view, *_ in slices], new)
            yield base
        finally:
            _write([view for view, *_ in slices], kept)


@contextmanager
def steer(
    model: Any, scores: Scores, task: str | None = None, *, alpha: float | None = None, positions: str = "prompt"
) -> Iterator[Any]:
    """Inside the block, `model` runs with its stream after the anchor layer held at alpha along the task's direction.

    z <- z + (alpha - <z, v^>) v^ (Eq. 37), v^ being the unit direction that `scores` were read along.
    scores     of a utility with a direction (not kl); of several tasks, `scores["title"]`, or name the `task`
    alpha      None: the expert's mean projection, from the score file
    positions  prompt (default), all, anchor (the prompt's last token), answer. Answers are told from prompts by the
               cache, so generate with one
    Raises `BadInput` for scores without a direction, and for a model of another shape.

    >>> s = score(base, expert, [("w1 w2 w3", "w2 w3"), ("w4 w5", "w5")], utility="anchor", progress=False, gap_floor=0)
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> plain = base(ids).logits
    >>> with steer(base, s):
    ...     moved = base(ids).logits
    >>> torch.equal(base(ids).logits, plain), torch.equal(moved, plain)
    (True, False)
    """
    anchor = anchor_of(scores, task, "scores")
    if different := live_geometry(model, "model").differences(scores.meta.geometry):
        raise BadInput(f"model: of another shape than the models of these scores: {'; '.join(different)}.")
    steering = Steering(anchor.layer, anchor.direction_D, anchor.alpha if alpha is None else alpha, positions)
    with steered(model, steering):
        yield model


def _rename(module: Any, name: str) -> None:
    """What the user calls it, rather than the folder that it was read from."""
    module.name_or_path = module.config._name_or_path = name


def _roles(base: Any, expert: Any) -> list[tuple[str, Any]]:
    """Role and model of both; paths as text."""
    both = (("base", base), ("expert", expert))
    return [(role, os.fspath(model) if isinstance(model, os.PathLike) else model) for role, model in both]


def _live(stack: ExitStack, base: Any, expert: Any, tokenizer: Any) -> dict[str, LiveModel]:
    """Those of the two models that are in memory. Raises `BadInput` where the base has no tokenizer."""
    live = {}
    for role, model in _roles(base, expert):
        if not isinstance(model, str):
            live[role] = stack.enter_context(held(model, role, tokenizer if role == "base" else None))
    if "base" in live and tokenizer_in(live["base"].folder) is None:
        raise BadInput(f"base: no tokenizer lies where {live['base'].name} came from; give one with tokenizer=.")
    if tokenizer is not None and "base" not in live:
        raise BadInput("tokenizer: goes with a base in memory; that of a folder is in the folder.")
    return live


def _reads(job: ScoringJob, live: Mapping[str, LiveModel], named: bool) -> list[str]:
    """What an output must not be written onto."""
    absent = {model.name for model in live.values()} | (set() if named else {_HELD})
    return [name for name in job.reads() if name not in absent]


def _decoder(stack: ExitStack, expert: Any, geometry: Geometry) -> dict[str, tuple[str, TensorHeader]]:
    """The expert's decoder: name in a plain causal LM -> (name, tensor). Raises `BadInput` for another shape."""
    tensors: Mapping[str, TensorHeader]
    if isinstance(expert, (str, os.PathLike)):
        reference = read_reference(os.fspath(expert))
        reference.check()
        checkpoint = Checkpoint.of(reference.model)
        if reference.lora is not None:
            folder = merge_lora(reference, stack.enter_context(scratch("wp-lora-")), remote_code=False)
            checkpoint = Checkpoint(reference.text, folder)
    elif isinstance(expert, Mapping):
        tensors = {name: HeldTensor.of(tensor) for name, tensor in expert.items()}
        return {plain: (name, tensors[name]) for plain, name in plain_tensors(tensors).items()}
    else:
        checkpoint = stack.enter_context(held(expert, "expert"))
    if different := checkpoint.geometry.differences(geometry):
        raise BadInput(f"{checkpoint.name}: not of the base's shape: {'; '.join(different)}.")
    tensors = checkpoint.tensors
    return {plain: (name, tensors[name]) for plain, name in plain_tensors(tensors).items()}


def _part(source: Mapping[str, tuple[str, TensorHeader]], plain: str, where: Any, like: torch.Tensor) -> torch.Tensor:
    """A slice of the expert's as it will be written over `like`; a copy, for the two may share memory."""
    if plain not in source:
        raise BadInput(f"expert: has no tensor {plain}, which the base has; give a fine-tune of the base.")
    name, header = source[plain]
    part = header.part(name, where)
    if not part.is_floating_point() or not like.is_floating_point():
        raise BadInput(f"{name}: is quantised ({shown(header.dtype)}); patch models whose weights are plain numbers.")
    if part.shape != like.shape:
        raise BadInput(f"expert: {name} has the shape {list(header.shape)}, which does not fit the base's.")
    return part.to(like.device, like.dtype, copy=True)


@torch.no_grad()
def _write(views: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    for view, value in zip(views, values, strict=True):
        view.copy_(value)
