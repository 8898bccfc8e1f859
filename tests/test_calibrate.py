"""wp-aim against a plain loop over blocks with hooks, as AIM's authors describe it."""

from __future__ import annotations

import hashlib
import json

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors import safe_open
from streamed_world import resident, streamed
from where import DEVICE

from mergekit_wp.calibrate import cut, main, mean_inputs, read_texts
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.merge.activations import Activations, read_activations, write_activations
from mergekit_wp.scoring import sweep
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.prompt_format import PromptFormat

BLOCKS = torch.randint(3, 97, (5, 12), generator=torch.Generator().manual_seed(0)).tolist()


def plain(model, blocks):
    """Sum over blocks of mean |x_c| at every module with a weight but the embedding, by the weight's name."""
    sums = {}

    def hear(name):
        def hook(_module, inputs):
            mean_C = inputs[0].reshape(-1, inputs[0].shape[-1]).abs().mean(0)
            sums[name] = sums.get(name, 0) + mean_C

        return hook

    handles = [
        module.register_forward_pre_hook(hear(f"{name}.weight"))
        for name, module in model.named_modules()
        if hasattr(module, "weight") and "embed" not in name
    ]
    with torch.no_grad():
        for block in blocks:
            model(torch.tensor([block]))
    for handle in handles:
        handle.remove()
    return sums


@pytest.fixture(params=tiny.ARCHITECTURES)
def saved(request, tmp_path):
    model = tiny.random_model(request.param, seed=3)
    tiny.save(model, tmp_path / "base", torch.float32)
    model.set_attn_implementation("eager")  # the only one that knows Gemma's soft-capping
    return model, tmp_path / "base"


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_against_plain_hooks(kind, size, saved, monkeypatch):
    model, folder = saved
    stack = (resident if kind == "resident" else streamed)(folder)
    # So little memory that a streamed model is swept several times.
    monkeypatch.setattr(sweep, "free_memory", lambda _device: 8 * 24 * 4 * 12 * 2)
    done = []
    got = mean_inputs(stack, list(batches(BLOCKS, size, stack)), done.append)
    want = plain(model, BLOCKS)
    if model.config.tie_word_embeddings:
        del want["lm_head.weight"]
    assert set(got) == set(want)
    for name, mean_C in got.items():
        torch.testing.assert_close(mean_C / mean_C.max(), want[name] / want[name].max(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean_C, want[name] / len(BLOCKS), rtol=1e-5, atol=1e-6)
    assert sum(done) == len(BLOCKS) * 4
    assert not any(module._forward_pre_hooks for module in stack.model.modules())


def tokenizer_of(words):
    """Every word is a token, after a 1 as a Llama's tokenizer puts one."""
    return PromptFormat(
        lambda text, add_special_tokens=True: {
            "input_ids": [1] * add_special_tokens + [words[word] for word in text.split()]
        }
    )


def test_documents_are_put_end_to_end():
    tokenizer = tokenizer_of({"a": 5, "b": 6, "c": 7})
    texts = ["a b", "a " * 9, "c c c", "b", "c"]
    # The second is longer than a block, the last one too many, and not looked at.
    assert cut(tokenizer, texts, 3, 4, "f") == (3, [[1, 5, 6, 1], [7, 7, 7, 1]])
    assert cut(tokenizer, texts, 2, 7, "f") == (2, [[1, 5, 6, 1, 7, 7, 7]])
    with pytest.raises(BadInput, match=r"f: 0 of 2 documents .* shorter texts, or blocks of more"):
        cut(tokenizer, ["a b c", "a " * 9], 3, 3, "f")
    with pytest.raises(BadInput, match=r"f: 2 of 3 documents have at most 8 tokens, 7 in all; at least 8 are needed"):
        cut(tokenizer, texts, 2, 8, "f")


def test_texts(tmp_path):
    plain_text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain_text.write_text("one\ntwo\n\n\n three\n")
    lines.write_text('{"text": " x "}\n\n{"text": "y", "meta": {}}\n')
    assert list(read_texts(str(plain_text))) == ["one\ntwo", "three"]
    assert list(read_texts(str(lines))) == ["x", "y"]
    lines.write_text('{"text": "x"}\n{"txt": "y"}\n')
    with pytest.raises(BadInput, match=r"a.jsonl, line 2: expected a JSON object"):
        list(read_texts(str(lines)))
    with pytest.raises(BadInput, match="cannot read the texts"):
        list(read_texts(str(tmp_path / "none")))


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments] + ["--quiet"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(f"w{(7 * i + j) % 90}" for j in range(9))}) + "\n"
                            for i in range(20)))  # fmt: skip
    return path


@pytest.mark.parametrize("offload", ["none", "stream"])
def test_the_command_writes_what_the_loop_finds(saved, texts, offload, tmp_path):
    model, folder = saved
    out = tmp_path / "new" / "activations.safetensors"
    run(folder, "--texts", texts, "--out", out, "--tokens", 48, "--documents", 12, "--offload", offload,
        "--device", DEVICE)  # fmt: skip
    got = read_activations(out)
    base = Checkpoint.open(str(folder))
    assert (got.meta.base.config, got.meta.base.tensors) == (base.fingerprint.config, base.fingerprint.tensors)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    joined = [token for text in list(read_texts(str(texts)))[:12] for token in tokenizer(text)["input_ids"]]
    blocks = [joined[i : i + 48] for i in range(0, len(joined) - 47, 48)]
    assert (got.meta.documents, got.meta.blocks, got.meta.tokens) == (12, len(blocks), 48)
    want = plain(model, blocks)
    for name, mean_C in got.means.items():
        torch.testing.assert_close(mean_C, want[name] / len(blocks), rtol=1e-5, atol=1e-6)
    assert set(got.means) == {n for n in base.tensors if n.endswith("weight") and n != "model.embed_tokens.weight"}


def test_bad_requests(tmp_path, texts):
    model = tiny.random_model("llama", seed=3)
    tiny.save(model, tmp_path / "base", torch.float32)
    base, out = tmp_path / "base", tmp_path / "a.safetensors"
    assert "--tokens 129: " in run(base, "--texts", texts, "--out", out, "--tokens", 129, code=2)
    assert "at least 128 are needed" in run(base, "--texts", texts, "--out", out, "--documents", 2, code=2)
    assert "this is a folder" in run(base, "--texts", texts, "--out", tmp_path, code=2)
    assert "no such model folder" in run(tmp_path / "none", "--texts", texts, "--out", out, code=2)
    assert "give it a name that ends in .safetensors" in run(base, "--texts", texts, "--out", tmp_path / "a.pt", code=2)
    assert not out.exists()


def test_out_of_memory_is_a_sentence(tmp_path, texts, monkeypatch):
    from mergekit_wp import calibrate

    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calibrate, "mean_inputs", full)
    tiny.save(tiny.random_model("llama", seed=3), tmp_path / "base", torch.float32)
    said = run(tmp_path / "base", "--texts", texts, "--out", tmp_path / "a.safetensors", "--tokens", 16, code=2)
    assert "--batch-size: 8 blocks of 16 tokens do not fit on" in said
    assert not (tmp_path / "a.safetensors").exists()


def test_the_file_says_how_documents_were_put(tmp_path, texts):
    tiny.save(tiny.random_model("llama", seed=3), tmp_path / "base", torch.float32)
    template = "w1 {{ messages[-1]['content'] }} w2"
    (tmp_path / "base/chat_template.jinja").write_text(template)
    out, said = tmp_path / "a.safetensors", {}
    for asked in ("off", "on"):
        run(tmp_path / "base", "--texts", texts, "--out", out, "--tokens", 16, "--device", DEVICE,
            "--chat-template", asked)  # fmt: skip
        with safe_open(out, framework="pt") as file:
            said[asked] = json.loads(file.metadata()["wp_aim"])
    assert "prompts" not in said["off"], "a program before this field reads it"
    digest = hashlib.sha256(template.encode()).hexdigest()
    assert said["on"]["prompts"] == {
        "template": "{prompt}", "chat_template": digest, "chat_owner": str(tmp_path / "base"), "system": None,
    }  # fmt: skip
    assert read_activations(out).meta.prompts.chat_template == digest


def test_the_file_is_checked(tmp_path, texts):
    from safetensors.torch import save_file

    tiny.save(tiny.random_model("llama", seed=3), tmp_path / "base", torch.float32)
    out = tmp_path / "a.safetensors"
    run(tmp_path / "base", "--texts", texts, "--out", out, "--tokens", 16, "--device", DEVICE)
    good = read_activations(out)
    write_activations(good, tmp_path / "b.safetensors")
    assert torch.equal(
        read_activations(tmp_path / "b.safetensors").means["lm_head.weight"], good.means["lm_head.weight"]
    )
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="negative number, a NaN"):
            Activations(good.meta, {"x": torch.tensor([1.0, bad])})
    save_file({"x": torch.ones(2)}, out)
    with pytest.raises(BadInput, match="without the `wp_aim` metadata"):
        read_activations(out)
    save_file({"x": torch.ones(2)}, out, metadata={"wp_aim": "{}"})
    with pytest.raises(BadInput, match="format version None"):
        read_activations(out)
    out.write_text("no")
    with pytest.raises(BadInput, match="cannot be read as a safetensors activations file"):
        read_activations(out)
