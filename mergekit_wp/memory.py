"""Which devices this machine has, and how many bytes a process may still take: of a GPU, of the machine, of its control
group."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from mergekit_wp.errors import BadInput, reason_of

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


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


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`.

    CUDA: what the driver calls free, and what PyTorch holds in reserve. Elsewhere: the machine's available memory, or
    what the control group (a container's limit, a batch job's) leaves, whichever is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = psutil.virtual_memory().available
    limit = cgroup_free()
    return available if limit is None else min(available, limit)


def cgroup_free(root: Path = Path("/")) -> int | None:
    """Bytes left under the tightest memory limit among this process's control groups; None without a limit.

    Page cache that can be dropped counts as free. `root` is where /proc and /sys are found.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A limit on any group above holds too. In a container the path may name folders that only the host sees.
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            if (found := _left(group, *names)) is not None:
                left.append(found)
            if group == mount:
                break
    return min(left, default=None)


def _left(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Limit less usage of one control group, page cache not counted; None where it sets no limit."""
    try:
        limit, usage = (group / limit_name).read_text().strip(), int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _UNLIMITED:
        return None
    return max(0, int(limit) - usage + int(stat.get(cache_name, 0)))
