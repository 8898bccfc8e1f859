"""Base and expert in memory, frozen, checked to be two fine-tunes of one architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mergekit_wp.adapters import merge_lora
from mergekit_wp.checkpoint import Checkpoint, Fingerprint, content_digest, fingerprint_of, local_folder
from mergekit_wp.components import Geometry, auto_class
from mergekit_wp.errors import BadInput, out_of_memory, reason_of
from mergekit_wp.foreign import logger
from mergekit_wp.outputs import scratch
from mergekit_wp.quantised import check_plain, plain_config
from mergekit_wp.references import read_reference
from mergekit_wp.scoring.job import ScoringJob
from mergekit_wp.scoring.offload import RESERVE, free_memory, parameter_bytes, pick_offload
from mergekit_wp.scoring.precision import held_dtype, pick_dtype, stored_dtype
from mergekit_wp.scoring.rotary import Lengths
from mergekit_wp.scoring.stack import ResidentStack, Stack
from mergekit_wp.scoring.streamed import open_streamed
from mergekit_wp.scoring.team import Team
from mergekit_wp.scoring.wording import prompt_ids
from mergekit_wp.token_ids import load_other
from mergekit_wp.vocabulary import head_against_config, head_equals_embeddings

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

    @property
    def vocabulary(self) -> int:
        """V: vocabulary rows that both models have."""
        return min(self.base.geometry.vocabulary, self.expert.geometry.vocabulary)

    @property
    def context_limit(self) -> int:
        """Positions that both models take."""
        return min(Lengths(model.text_config).limit for model in (self.base, self.expert))


@dataclass(frozen=True)
class ModelPair:
    """Both models as stacks of layers, parameters frozen; `geometry` is the base's.

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


def check_pair(job: ScoringJob) -> CheckedPair:
    """Open both models and compare them by their configs and tensor headers.

    Raises `BadInput` for missing or unreadable models, unsupported architectures, different shapes, and equal weights
    (no gap to explain). Other signs of a wrong lineage (another rope_theta, say) are logged as warnings. The number of
    vocabulary rows may differ.
    """
    reference = read_reference(job.expert)
    reference.check()
    base, expert = Checkpoint.open(job.base), Checkpoint.of(reference.model)
    if differences := expert.geometry.differences(base.geometry):
        raise BadInput(
            f"{expert.name}: its shape differs from the base {base.name} ({'; '.join(differences)}); an expert must "
            "be a fine-tune of the base."
        )
    expert_print = fingerprint_of(reference) if reference.lora else expert.fingerprint
    published = local_folder(reference.lora) if reference.lora else expert.folder
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
    return checked


def load_pair(job: ScoringJob, checked: CheckedPair, team: Team | None = None) -> ModelPair:
    """Load both models, or make them ready to be read layer by layer.

    Raises `BadInput` when one does not load, does not fit, or holds a NaN or an infinity.
    """
    device = (team or Team()).local_device(pick_device(job.device))
    stored = [stored_dtype(model.tensors) for model in (checked.base, checked.expert)]
    dtype = pick_dtype(job.dtype, device, stored)
    offload, reason = pick_offload(job.offload, checked.base, checked.expert, dtype, device)
    if offload == "stream":
        remote, lora = job.trust_remote_code, read_reference(job.expert).lora
        adapter = str(local_folder(lora)) if lora else None
        streamed_base = open_streamed(job.base, checked.base, dtype, device, remote)
        streamed_expert = open_streamed(job.expert, checked.expert, dtype, device, remote, adapter)
        return ModelPair(streamed_base, streamed_expert, checked.base.geometry, device, dtype, offload, reason)
    with _lora_merged(job) as merged_folder:
        expert_folder = merged_folder or str(checked.expert.folder)
        expert_model = _load_model(job.expert, expert_folder, dtype, device, job.trust_remote_code)
    base_model = _load_model(job.base, str(checked.base.folder), dtype, device, job.trust_remote_code)
    base, expert = (ResidentStack(model, device, dtype) for model in (base_model, expert_model))
    return ModelPair(base, expert, checked.base.geometry, device, dtype, offload, reason)


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


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises `BadInput` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = reason_of(error)
        raise BadInput(f"device: {name!r} cannot be used here ({reason}); use auto, cpu or cuda:N.") from error
    return device


@contextmanager
def _lora_merged(job: ScoringJob) -> Iterator[str | None]:
    """For an expert `base+lora`, the folder of the merged model (removed afterwards); None for a full model."""
    reference = read_reference(job.expert)
    if reference.lora is None:
        yield None
        return
    with scratch("wp-lora-") as cache:
        yield str(merge_lora(reference, cache, job.trust_remote_code))


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
    for key, parameter in model.named_parameters():
        low, high = torch.aminmax(parameter)
        if not torch.isfinite(low + high):
            raise BadInput(f"{name}: the tensor {key} holds a NaN or an infinity; the checkpoint is damaged.")
    return model


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
