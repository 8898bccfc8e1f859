"""Base and expert in memory, frozen, checked to be two fine-tunes of one architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mergekit_wp.checkpoint.adapters import merge_lora
from mergekit_wp.checkpoint.folder import Checkpoint, Fingerprint, content_digest, fingerprint_of, local_folder
from mergekit_wp.checkpoint.in_memory import LiveModel
from mergekit_wp.checkpoint.quantised import check_plain, plain_config
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.checkpoint.vocabulary import head_against_config, head_equals_embeddings, load_other
from mergekit_wp.errors import BadInput, out_of_memory, reason_of
from mergekit_wp.foreign import logger
from mergekit_wp.geometry import Geometry, auto_class
from mergekit_wp.memory import free_memory, pick_device
from mergekit_wp.merge.weighed import WeighedMerge, read_weighed
from mergekit_wp.outputs import scratch
from mergekit_wp.scoring.batching import Lengths
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.distributed import ProcessGroup
from mergekit_wp.scoring.models.layerwise import ResidentStack, Stack
from mergekit_wp.scoring.models.merged import MergedStack
from mergekit_wp.scoring.models.offload import RESERVE, parameter_bytes, pick_offload
from mergekit_wp.scoring.models.precision import held_dtype, pick_dtype, stored_dtype
from mergekit_wp.scoring.models.streaming import move_buffers, open_streamed, skeleton
from mergekit_wp.scoring.prompt_format import prompt_ids

LOG = logger(__name__)


@dataclass(frozen=True)
class CheckedPair:
    """Base and expert on disk, known to fit each other; nothing loaded yet."""

    base: Checkpoint
    expert: Checkpoint
    base_print: Fingerprint
    expert_print: Fingerprint
    published: Path
    """The expert's own folder; of `base+lora` the LoRA's, while `expert` is the base under it."""
    others: Sequence[Checkpoint] = ()
    """More models that read the same tokens."""
    merge: WeighedMerge | None = None
    """The merge that stands in the base's place; its experts are among `others`."""

    @property
    def vocabulary(self) -> int:
        """V: vocabulary rows that all models have."""
        return min(model.geometry.vocabulary for model in (self.base, self.expert, *self.others))

    @property
    def context_limit(self) -> int:
        """Positions that all models take."""
        return min(Lengths(model.text_config).limit for model in (self.base, self.expert, *self.others))


@dataclass(frozen=True)
class ModelPair:
    """Both models as stacks of layers, parameters frozen; `geometry` is the base's. The base may be a merge into it.

    `offload` is how they are held, none or stream, and `reason` one line that says why.
    """

    base: Stack
    expert: Stack
    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    offload: str = "none"
    reason: str = ""

    @property
    def vocabulary(self) -> int:
        """V: vocabulary rows that both models have."""
        return min(self.base.vocabulary, self.expert.vocabulary)


def check_pair(job: ScoringJob, live: Mapping[str, LiveModel] | None = None) -> CheckedPair:
    """Open both models and compare them by their configs and tensor headers.

    live: the models (`base`, `expert`) that are in memory already.
    Raises `BadInput` for missing or unreadable models, unsupported architectures, different shapes, equal weights (no
    gap to explain), and a merge (`at`) that cannot stand in the base's place. Other signs of a wrong lineage (another
    rope_theta, say) are logged as warnings. The number of vocabulary rows may differ.
    """
    live = live or {}
    base = live.get("base") or Checkpoint.open(job.base)
    expert, expert_print, published = _open_expert(job.expert, live.get("expert"))
    if differences := expert.geometry.differences(base.geometry):
        raise BadInput(
            f"{expert.name}: its shape differs from the base {base.name} ({'; '.join(differences)}); an expert must "
            "be a fine-tune of the base."
        )
    checked = CheckedPair(base, expert, base.fingerprint, expert_print, published)
    # Equal fingerprints only sample the weights: an expert that differs in one head alone is a fair question.
    same = checked.base_print.tensors == checked.expert_print.tensors
    if same and content_digest(base.tensors) == content_digest(expert.tensors):
        raise BadInput(f"{job.expert}: the weights equal those of the base {job.base}; there is no gap to explain.")
    for checkpoint in (base, expert):
        check_plain(checkpoint)
    for difference in expert.lineage_differences(base):
        LOG.warning("%s may not be a fine-tune of %s: %s", expert.name, base.name, difference)
    for checkpoint in (base, expert):
        if trouble := head_against_config(checkpoint):
            LOG.warning(trouble)
    return checked if job.at is None else _at_merge(job, checked)


def _at_merge(job: ScoringJob, checked: CheckedPair) -> CheckedPair:
    """The pair with the merge of the recipe `at` in the base's place. Raises `BadInput`."""
    try:
        merge = read_weighed(str(job.at), checked.base, job.trust_remote_code)
        for expert in merge.experts:
            check_plain(expert)
    except BadInput as error:
        raise BadInput(f"at: {error.message}") from error
    k = merge.whole
    same = k is not None and merge.prints[k] == checked.expert_print
    if k is not None and same and content_digest(merge.experts[k].tensors) == content_digest(checked.expert.tensors):
        raise BadInput(f"at: {job.at}: this merge is the expert {job.expert} itself; there is no gap to explain.")
    return replace(checked, others=merge.experts, merge=merge)


def _open_expert(name: str, live: LiveModel | None) -> tuple[Checkpoint, Fingerprint, Path]:
    """The expert, its fingerprint, and its own folder (a LoRA's, while the expert is the base under it)."""
    if live is not None:
        return live, live.fingerprint, live.folder
    reference = read_reference(name)
    reference.check()
    expert = Checkpoint.of(reference.model)
    if reference.lora is None:
        return expert, expert.fingerprint, expert.folder
    return expert, fingerprint_of(reference), local_folder(reference.lora)


def load_pair(job: ScoringJob, checked: CheckedPair, processes: ProcessGroup | None = None) -> ModelPair:
    """Load both models, or make them ready to be read layer by layer.

    Raises `BadInput` when one does not load, does not fit, or holds a NaN or an infinity.
    """
    live = [model for model in (checked.base, checked.expert) if isinstance(model, LiveModel)]
    processes = processes or ProcessGroup()
    follow = live and job.device == "auto"
    device = live[0].device if follow else processes.local_device(pick_device(job.device))
    models = [checked.base, checked.expert, *checked.others]
    dtype = pick_dtype(job.dtype, device, [stored_dtype(model.tensors) for model in models])
    if live and job.offload == "stream":
        raise BadInput("offload: a model in memory is not streamed; give its folder, or leave offload out.")
    merge, geometry = checked.merge, checked.base.geometry
    own = {} if live else {job.expert: checked.expert}
    taken = {} if merge is None else dict(zip(merge.names, merge.experts, strict=True))
    if live:
        offload, reason = "none", f"scored as they are in memory, on {device}."
    elif merge is None:
        offload, reason = pick_offload(job.offload, [checked.base, checked.expert], dtype, device)
    else:
        models, whole = [checked.base, *(own | taken).values()], parameter_bytes(checked.base, torch.float32)
        offload, reason = pick_offload(job.offload, models, dtype, device, f"{len(models)} models and a merge", whole)

    def load(name: str, checkpoint: Checkpoint) -> Stack:
        return load_stack(name, checkpoint, dtype, device, offload, job.trust_remote_code)

    expert, base = load(job.expert, checked.expert), load(job.base, checked.base)
    if merge is not None:
        # An expert that is scored may be merged, too; differences to it are formed from what is not rounded again.
        others = [expert if name in own else load(name, checkpoint) for name, checkpoint in taken.items()]
        base = MergedStack(base, others, geometry, merge.weights, held=torch.float32, frozen=True)
    return ModelPair(base, expert, geometry, device, dtype, offload, reason)


def load_stack(
    name: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, offload: str, remote_code: bool
) -> Stack:
    """The model that the user calls `name` (perhaps `base+lora`, `checkpoint` being the base), held as `offload` says.

    Raises as `load_pair`.
    """
    if offload != "stream":
        return ResidentStack(_load_module(name, checkpoint, dtype, device, remote_code), device, dtype)
    lora = read_reference(name).lora
    return open_streamed(name, checkpoint, dtype, device, remote_code, str(local_folder(lora)) if lora else None)


def load_models(
    job: ScoringJob, checked: CheckedPair, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """Base and expert as frozen modules of transformers, held for products in `dtype`. Raises as `load_pair`."""
    expert, base = (
        _load_module(name, checkpoint, dtype, device, job.trust_remote_code)
        for name, checkpoint in ((job.expert, checked.expert), (job.base, checked.base))
    )
    return base, expert


def _load_module(
    name: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, remote_code: bool
) -> nn.Module:
    if isinstance(checkpoint, LiveModel):
        return _share_weights(checkpoint, dtype, device)
    with _lora_merged(name, remote_code) as merged:
        return _load_model(name, merged or str(checkpoint.folder), dtype, device, remote_code)


@torch.no_grad()
def _share_weights(checkpoint: LiveModel, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A frozen model of its config around the weights of the one in memory, which stays as it is.

    What is on the device in the dtype held is shared, not copied.
    """
    kept = held_dtype(checkpoint.tensors, dtype)
    model = skeleton(checkpoint.name, checkpoint, kept, remote_code=False)
    own = checkpoint.model.state_dict()
    if missing := sorted(set(model.state_dict()) - set(own)):
        raise BadInput(f"{checkpoint.name}: lacks {len(missing)} tensors, such as {missing[0]}; load it again.")
    model.load_state_dict({name: t.detach().to(device, kept) for name, t in own.items()}, strict=False, assign=True)
    model.generation_config = copy.deepcopy(checkpoint.model.generation_config)
    move_buffers(model, device)
    _check_finite(checkpoint.name, model)
    return model.requires_grad_(False).eval()


def load_one(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, offload: str, remote_code: bool
) -> Stack:
    """One model alone, in memory or ready to be read layer by layer; `offload` as for a pair. Raises as `load_pair`."""
    check_plain(checkpoint)
    head_equals_embeddings(checkpoint)  # refuses a model that lacks one of the two
    held = held_dtype(checkpoint.tensors, dtype)
    fits = parameter_bytes(checkpoint, held) <= (1 - RESERVE) * free_memory(device)
    if offload == "stream" or (offload == "auto" and not fits):
        return open_streamed(checkpoint.name, checkpoint, dtype, device, remote_code)
    model = _load_model(checkpoint.name, str(checkpoint.folder), dtype, device, remote_code)
    return ResidentStack(model, device, dtype)


@contextmanager
def _lora_merged(name: str, remote_code: bool) -> Iterator[str | None]:
    """For `base+lora`, the folder of the merged model (removed afterwards); None for a full model."""
    reference = read_reference(name)
    if reference.lora is None:
        yield None
        return
    with scratch("wp-lora-") as cache:
        yield str(merge_lora(reference, cache, remote_code))


def _load_model(name: str, folder: str, dtype: torch.dtype, device: torch.device, remote_code: bool) -> nn.Module:
    """The frozen model of a folder, its weights as they are held for products in `dtype`."""
    checkpoint = Checkpoint(name, Path(folder))
    held, auto = held_dtype(checkpoint.tensors, dtype), auto_class(checkpoint.config, name)
    try:
        config = plain_config(checkpoint, remote_code)
        # Only the eager attention knows soft-capping; SDPA elsewhere, for its memory.
        attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=held,
            device_map={"": str(device)},
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        if out_of_memory(error):
            raise BadInput(f"{name}: does not fit on {device} beside what is there; use another device.") from error
        raise BadInput(f"{name}: transformers could not load this model ({reason_of(error)}).") from error
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers and go on.
        raise BadInput(f"{name}: the checkpoint lacks {len(missing)} tensors, such as {missing[0]}; download it again.")
    model.requires_grad_(False)
    model.eval()
    _check_finite(name, model)
    return model


def _check_finite(name: str, model: nn.Module) -> None:
    for key, parameter in model.named_parameters():
        low, high = torch.aminmax(parameter)
        if not torch.isfinite(low + high):
            raise BadInput(f"{name}: the tensor {key} holds a NaN or an infinity; the checkpoint is damaged.")


def warn_of_other_ids(checked: CheckedPair, texts: Sequence[str]) -> None:
    """Prompts go to the expert as the base's tokenizer cuts them; say so where its own would cut them otherwise."""
    ours, theirs = load_other(checked.base.folder, checked.published)
    other = [text for text in texts if ours and prompt_ids(ours, text) != prompt_ids(theirs, text)]
    if other:
        LOG.warning(
            "%s: its own tokenizer gives other ids than the base's to %d of %d prompts, such as %r; it is scored on "
            "those of the base's.",
            checked.published,
            len(other),
            len(texts),
            other[0][:60],
        )
