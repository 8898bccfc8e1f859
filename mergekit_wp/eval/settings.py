"""How models are run, and which part of that a result is kept under."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from mergekit_wp.eval.backends import Backend, resolve_dtype
from mergekit_wp.eval.models import EvalModel

_VERSIONS = ("lm-eval", "transformers", "torch")


@dataclass(frozen=True)
class Settings:
    """How models are run. What changes answers enters the cache's key: dtype, limit, versions, backend.

    Device, batch size and the number of GPUs are recorded with each result but not part of the key: they change
    the rounding, which moves an answer now and then, and a cached result should outlive a move to a GPU.
    `samples` is the folder for per-sample logs, or None for none.
    """

    device: str
    dtype: str
    batch_size: int | str
    limit: int | None
    allow_code: bool
    trust_remote_code: bool
    progress_bars: bool
    backend: Backend = field(default_factory=Backend)
    samples: Path | None = None

    def key(self, model: EvalModel) -> str:
        parts = [
            model.fingerprint, self.dtype_of(model), self.limit, self.trust_remote_code, versions(self.backend),
            self.backend.name, self.backend.answering_options(),
        ]  # fmt: skip
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def dtype_of(self, model: EvalModel) -> str:
        """The dtype this model runs in."""
        return resolve_dtype(model.folder, self.dtype)


def versions(backend: Backend) -> dict[str, str]:
    """The packages whose version can change an answer."""
    return {name: version(name) for name in _VERSIONS} | backend.versions()
