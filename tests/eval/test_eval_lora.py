"""wp-eval on a LoRA: the model that scoring holds, merged once; a LoRA alone is told from a model."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from lora_files import write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergekit_wp.errors import BadInput
from mergekit_wp.eval import models
from mergekit_wp.eval.models import open_model, takes_long


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("a+b@1")  # as odd as folders are
    base = tiny.save(tiny.random_model("llama"), root / "base")
    return base, write(root / "lora", base)


def test_it_is_the_lora_over_its_base(pair, tmp_path, monkeypatch):
    """Against peft's own layers, not merged."""
    from peft import PeftModel

    base, lora = pair
    reference = f"{base}+{lora}"
    assert takes_long(reference)
    model = open_model("x", reference, False, tmp_path / "loras")
    ids = torch.tensor([[1, 5, 9, 40, 3]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)(ids).logits
        unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
        torch.testing.assert_close(merged, unmerged(ids).logits, rtol=1e-4, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    assert not torch.allclose(merged, plain, atol=1e-2)
    assert (model.reference, model.name) == (reference, "x")
    monkeypatch.setattr(models, "merge_lora", None)  # the second time nothing is merged
    assert open_model("x", reference, False, tmp_path / "loras") == model
    assert [path.name for path in (tmp_path / "loras").iterdir()] == [model.folder.name]


def test_another_lora_is_another_model_and_brings_its_own_tokenizer(pair, tmp_path):
    base, lora = pair
    other = write(tmp_path / "other", base, r=3)
    tiny.tokenizer().save_pretrained(other)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    one, two = (open_model("x", f"{base}+{each}", False, tmp_path / "loras") for each in (lora, other))
    assert one.fingerprint != two.fingerprint
    assert not (one.folder / "chat_template.jinja").exists()
    assert (two.folder / "chat_template.jinja").read_text() == (other / "chat_template.jinja").read_text()
    a, b = (load_file(next(m.folder.glob("*.safetensors"))) for m in (one, two))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(a[name], b[name])


def test_a_model_is_known_by_what_changes_its_answers(pair, tmp_path):
    base, _ = pair
    folder = tmp_path / "model"
    shutil.copytree(base, folder)

    def known() -> str:
        return open_model("x", str(folder), False).fingerprint

    seen = [known()]
    for name in ("LICENSE.txt", "USE_POLICY.md", "notes.txt", "wp/scores.safetensors", "cache.model/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        assert known() == seen[0], name
    for name in ("spiece.model", "qwen.tiktoken", "merges.txt", "additional_chat_templates/tools.jinja", "code.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
        seen.append(known())
    assert len(set(seen)) == 6


def test_a_lora_alone(pair):
    _, lora = pair
    with pytest.raises(BadInput, match=r"a LoRA, not a model; write BASE\+"):
        open_model("x", str(lora), False)


def test_a_lora_that_does_not_fit(pair, tmp_path):
    _, lora = pair
    other = tiny.save(tiny.random_model("llama", hidden_size=16), tmp_path / "other")
    with pytest.raises(BadInput, match="could not be merged into its base"):
        open_model("x", f"{other}+{lora}", False, tmp_path / "loras")
    assert not list((tmp_path / "loras").iterdir())
