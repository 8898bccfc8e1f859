"""Whether a checkpoint holds every tensor that transformers' model has: where one is missing, it is made up at random.

transformers warns of that and goes on; vLLM fills what it packs together (q, k and v) in part. Which names count is
each architecture's own matter (renamings, experts stored one by one, tied ends, tensors that may be missing), so
transformers loads the checkpoint here, as shapes on the meta device: no weight is read.
"""

from __future__ import annotations

import torch

from mergekit_wp.checkpoint import Checkpoint
from mergekit_wp.components import SUPPORTED, auto_class, text_name
from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.modelconfig import quiet
from mergekit_wp.quantised import MARKS
from mergekit_wp.scoring.precision import STORED


def check_complete(checkpoint: Checkpoint, remote_code: bool) -> None:
    """Raises `BadInput` for tensors that are missing, or that cannot be put together to those of the model.

    Says nothing of quantised checkpoints, whose tensors the quantiser knows, nor of a model that cannot be built on
    the meta device. Of a multimodal model only the text tower counts.
    """
    if any(checkpoint.config.get(mark) for mark in MARKS):
        return
    if any(header.dtype not in STORED for header in checkpoint.tensors.values()):
        return
    from transformers import AutoConfig

    folder = str(checkpoint.folder)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
            with torch.device("meta"):
                made = auto_class(checkpoint.config).from_config(config, trust_remote_code=remote_code)
        except Exception:  # the author's code may need a device; the backend says what is wrong, if anything is
            return
        shapes = {
            name: torch.empty(header.shape, dtype=STORED[header.dtype], device="meta")
            for name, header in checkpoint.tensors.items()
        }
        try:
            _model, report = type(made).from_pretrained(
                None, config=config, state_dict=shapes, device_map={"": "meta"}, output_loading_info=True
            )
        except RuntimeError as error:
            raise BadInput(
                f"{checkpoint.name}: transformers cannot put the model together of the tensors that are stored; one "
                f"is missing or has another shape ({reason_of(error)}); download or make it again."
            ) from error
    known = (checkpoint.config.get("architectures") or [None])[0] in SUPPORTED
    missing = sorted(name for name in report["missing_keys"] if not known or text_name(name))
    if missing:
        raise BadInput(
            f"{checkpoint.name}: the checkpoint lacks {len(missing)} tensors, such as {missing[0]}, which would be "
            "filled with random numbers; download or make it again."
        )
