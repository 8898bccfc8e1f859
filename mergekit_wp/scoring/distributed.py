"""Several processes that score together, under `accelerate launch`; one process is a group of one.

accelerate (and torch.distributed under it) does the talking. Every process holds the same job; work that can be
split is dealt out by rank, and sums are added up over the processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mergekit_wp.console import Tick
from mergekit_wp.documents import environment_count
from mergekit_wp.errors import BadInput

T = TypeVar("T")
_MOST_PROCESSES = 1 << 20


@dataclass(frozen=True)
class ProcessGroup:
    """This process's `rank` among `size` processes."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str = "auto") -> ProcessGroup:
        """The processes that `accelerate launch` (or torchrun) started, or a group of one; `device` is the job's.

        Raises `BadInput` for a device that is not there, and where the processes cannot talk to one another.
        """
        started = environment_count("WORLD_SIZE", _MOST_PROCESSES) or 1
        if started < 2:
            return cls()
        from accelerate import PartialState

        from mergekit_wp.memory import pick_device

        # Unless it is told to use the CPU, accelerate makes a group of accelerators only: where there are none, every
        # process would be a group of its own, do the whole job, and write the same file.
        state = PartialState(cpu=pick_device(device).type == "cpu")
        if state.num_processes != started:
            raise BadInput(
                f"accelerate started {started} processes, which cannot share work on {device} here; start one without "
                "accelerate launch, or give --device cpu."
            )
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part of the work: every size-th item, so that parts are alike."""
        return list(work[self.rank :: self.size])

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the processes, the same in every process."""
        if self.size == 1:
            return tensor
        from torch import distributed

        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def tell(self, what: Any) -> Any:
        """What the first process says, in every process."""
        if self.size == 1:
            return what
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([what if self.first else None])[0]

    def ticking(self, tick: Tick) -> Tick:
        """For a `tick` that is told of everyone's work, one to be told of this process's: the others do as much."""
        return lambda done: tick(self.size * done)

    def gather(self, own: Sequence[T]) -> list[T]:
        """What all processes have, by rank, in every process."""
        if self.size == 1:
            return list(own)
        from accelerate.utils import gather_object

        return list(gather_object(list(own)))

    def local_device(self, device: torch.device) -> torch.device:
        """`cuda` becomes this process's own card."""
        if device.type == "cuda" and device.index is None and self.size > 1:
            rank = environment_count("LOCAL_RANK", _MOST_PROCESSES)
            return torch.device("cuda", self.rank if rank is None else rank)
        return device
