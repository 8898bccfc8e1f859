"""Free memory, and what `--offload auto` makes of it."""

from __future__ import annotations

import pytest
import tiny
import torch

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.memory import cgroup_free
from mergekit_wp.scoring.models.offload import RESERVE, parameter_bytes, pick_offload

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save(tiny.random_model("llama"), tmp_path_factory.mktemp("streamed") / "llama")


def pick(monkeypatch, llama, asked, free):
    monkeypatch.setattr("mergekit_wp.scoring.models.offload.free_memory", lambda _device: free)
    opened = Checkpoint.open(str(llama))
    return pick_offload(asked, [opened, opened], torch.bfloat16, CPU)


def test_parameter_bytes(llama):
    parameters = sum(parameter.numel() for parameter in tiny.random_model("llama").parameters())
    assert parameter_bytes(Checkpoint.open(str(llama)), torch.float32) == 4 * parameters
    assert parameter_bytes(Checkpoint.open(str(llama)), torch.bfloat16) == 2 * parameters


def test_auto(monkeypatch, llama):
    need = 2 * parameter_bytes(Checkpoint.open(str(llama)), torch.float32)  # as stored, products in bfloat16 or not
    enough = int(need / (1 - RESERVE)) + 1
    mode, why = pick(monkeypatch, llama, "auto", enough)
    assert mode == "none"
    assert "fit into 75 %" in why
    mode, why = pick(monkeypatch, llama, "auto", enough - 2)
    assert mode == "stream"
    assert "do not fit" in why


@pytest.mark.parametrize("asked", ["none", "stream"])
def test_as_asked(monkeypatch, llama, asked):
    mode, why = pick(monkeypatch, llama, asked, 1)
    assert mode == asked
    assert "as asked" in why


def test_control_groups(tmp_path):
    """The tightest of nested limits counts, less what is used, page cache not counted as used."""

    def write(path, content):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)

    assert cgroup_free(tmp_path) is None
    write("proc/self/cgroup", "0::/a/b\n")
    assert cgroup_free(tmp_path) is None
    for group, limit in (("a/b", "max"), ("a", "1000")):
        write(f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
        write(f"sys/fs/cgroup/{group}/memory.current", "700\n")
        write(f"sys/fs/cgroup/{group}/memory.stat", "anon 600\ninactive_file 100\n")
    assert cgroup_free(tmp_path) == 400
    write("sys/fs/cgroup/a/b/memory.max", "650")
    assert cgroup_free(tmp_path) == 50


def test_control_groups_version_1(tmp_path):
    def write(path, content):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)

    write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/only/on/the/host\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "700")
    write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 100")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    assert cgroup_free(tmp_path) is None
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000")
    assert cgroup_free(tmp_path) == 400
