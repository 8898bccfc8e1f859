"""What other libraries raise, as a sentence with the right remedy: out of memory and a full disk are not bad input."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mergekit_wp import console as commands
from mergekit_wp.checkpoint import adapters, hub
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.errors import BadInput
from mergekit_wp.eval import backends, datafiles
from mergekit_wp.merge import audit
from mergekit_wp.merge.audit_slices import AuditFailed

FULL = OSError(errno.ENOSPC, "No space left on device")
SHORT = [torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 9 GiB"), MemoryError()]


def raises(error):
    def call(*_args, **_kwargs):
        raise error

    return call


@pytest.mark.parametrize("error", SHORT)
def test_too_little_memory(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(backends, "_hf", raises(error))
    how = {"device": "cuda:0", "dtype": "float32", "batch_size": 1, "trust_remote_code": False}
    with pytest.raises(BadInput, match=r"m: does not fit on cuda:0 .*smaller --dtype"):
        backends.load(backends.Backend("hf"), Path("m"), **how)
    monkeypatch.setattr(audit, "Checkpoint", SimpleNamespace(open=raises(error)))
    with pytest.raises(AuditFailed, match=r"too little memory to load it; free some"):
        audit.check_loads(tmp_path, 1)
    monkeypatch.setattr(commands, "import_module", lambda _name: SimpleNamespace(main=raises(error)))
    with pytest.raises(SystemExit) as end:
        commands.run("any")
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: out of memory (")
    assert said.count("\n") == 1


@pytest.fixture
def reference(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "read_tensors", lambda *_args: {})
    monkeypatch.setattr(adapters, "_made_of", lambda *_args: {})
    (tmp_path / "base").mkdir()
    (tmp_path / "lora").mkdir()
    return read_reference(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        *((error, "too little memory to merge the LoRA into its base") for error in SHORT),
        (FULL, "cannot be written .No space left"),
        (BadInput("base: damaged."), "^base: damaged[.]$"),
        (KeyError("q_proj"), "could not be merged into its base .KeyError: 'q_proj'."),
    ],
)
def test_merging_a_lora(tmp_path, monkeypatch, reference, error, said):
    monkeypatch.setattr(adapters, "_merge", raises(error))
    with pytest.raises(BadInput, match=said):
        adapters.merge_lora(reference, tmp_path, False)


def test_no_room_in_the_hubs_cache(tmp_path, monkeypatch):
    """It is not the Hub that does not give it, be an older copy there or not."""
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_a, **_k: ["config.json", "model.safetensors"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", raises(FULL))
    hub._download.cache_clear()
    source = read_reference("user/model").model
    with pytest.raises(BadInput, match=rf"user/model: cannot be written to the Hub's cache {tmp_path} .No space"):
        hub._download(source, str(tmp_path), "http://localhost:9", False)


def test_a_hub_that_answers_is_not_unreachable(monkeypatch):
    import httpx2 as httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answer = httpx.Response(401, request=httpx.Request("GET", "http://localhost:9/x?sig=secret"))
    refused = HfHubHTTPError("Invalid credentials for http://localhost:9/x?sig=secret", response=answer)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", raises(refused))
    with pytest.raises(BadInput, match=r"the Hub answered 401 .*hf auth login") as told:
        datafiles._check_hub("t", "user/data")
    assert "secret" not in told.value.message
