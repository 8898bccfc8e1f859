"""Streamed stacks against resident ones: the same numbers, nothing left behind, damage named."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from streamed_world import CPU, PROMPTS, assert_same, resident, streamed, swept

from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.batching import batches
from mergekit_wp.scoring.models.streaming import open_streamed
from mergekit_wp.scoring.sweep import forward_sweep

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def is_empty(layer) -> bool:
    return all(parameter.is_meta for parameter in layer.parameters())


def fail_in_the_first_layer(stack) -> None:
    for _layer in stack.layers(range(4)):
        raise ZeroDivisionError


def edit(folder, change) -> None:
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save(tiny.random_model("llama"), tmp_path_factory.mktemp("streamed") / "llama")


@pytest.fixture
def damaged(tmp_path):
    """A folder with one shard, to be spoilt."""
    return tiny.save(tiny.random_model("llama"), tmp_path / "damaged", max_shard_size="1GB")


class TestNumbers:
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", tiny.VARIANTS)
    def test_equals_the_resident_stack(self, tmp_path, kind, stored):
        """Shards of 8 KB cut through layers; float16 is how WizardLM is stored."""
        folder = tiny.save(tiny.random_model(kind), tmp_path / "m", stored, max_shard_size="8KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
        for dtype in (torch.float32, torch.bfloat16):
            assert_same(streamed(folder, dtype), resident(folder, dtype))

    def test_equals_plain_transformers(self, llama):
        """Not our own forward pass: the logits of the model itself."""
        stack = streamed(llama)
        with torch.no_grad():
            for prompt in PROMPTS:
                (part,) = batches([prompt], 1, stack)
                *_below, (_layer, (stream_BTD,)) = forward_sweep(stack, [stack.start(part)], stack.depth)
                wanted = tiny.random_model("llama")(torch.tensor([prompt])).logits[:, -1]
                torch.testing.assert_close(stack.logits(part.at_anchor(stream_BTD), 97), wanted)

    def test_extra_rows(self, tmp_path):
        folder = tiny.save(tiny.add_rows(tiny.random_model("llama"), 3), tmp_path / "m")
        assert_same(streamed(folder), resident(folder))

    @pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
    def test_head_stored_beside_a_tied_embedding(self, tmp_path, kind):
        """transformers unties what a checkpoint keeps apart."""
        folder = tiny.save(tiny.random_model(kind), tmp_path / "m", max_shard_size="1GB")
        head = torch.randn(tiny.SHAPE["vocab_size"], tiny.SHAPE["hidden_size"])
        edit(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
        stack = streamed(folder)
        assert_same(stack, resident(folder))
        assert torch.equal(stack.model.lm_head.weight, head)

    def test_tied_head_is_the_embedding(self, tmp_path):
        model = tiny.random_model("gemma2")
        stack = streamed(tiny.save(model, tmp_path / "m"))
        swept(stack)
        assert torch.equal(stack.model.lm_head.weight, model.model.embed_tokens.weight)

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
    def test_embeddings_of_any_token(self, tmp_path, stored):
        """Rows are read as prompts ask for them; the padding's is past the end of such a table."""
        model = tiny.random_model("gemma2", pad_token_id=90)
        stack = streamed(tiny.save(tiny.add_rows(model, 3), tmp_path / "m", stored))
        whole = resident(tmp_path / "m")
        for ids in ([[0, 99, 5, 5, 90]], [[2]], [list(range(99, -1, -1))]):
            (part,) = batches(ids, 1, stack)
            assert torch.equal(stack.start(part).stream_BTD, whole.start(part).stream_BTD)
        assert stack.model.model.embed_tokens.weight.is_meta
        (past,) = batches([[100]], 1, stack)
        with pytest.raises(IndexError):
            stack.start(past)

    def test_down_and_nested(self, llama):
        """Layers from the top, with a sweep up through the same layers inside."""
        stack, whole = streamed(llama), resident(llama).model.model.layers
        for index, layer in zip((3, 2, 1, 0), stack.layers((3, 2, 1, 0)), strict=True):
            for above, inner in zip(range(index, 4), stack.layers(range(index, 4)), strict=True):
                assert torch.equal(inner.mlp.up_proj.weight, whole[above].mlp.up_proj.weight)
            assert torch.equal(layer.mlp.up_proj.weight, whole[index].mlp.up_proj.weight)
        assert all(is_empty(layer) for layer in stack.model.model.layers)

    def test_gradient_with_respect_to_the_input(self, llama):
        gradients = []
        (part,) = batches(PROMPTS, 3, resident(llama))
        for stack in (streamed(llama), resident(llama)):
            start = stack.start(part)
            for layer in stack.layers([2]):
                x_BTD = start.stream_BTD.clone().requires_grad_(True)
                stack.call(layer, x_BTD, start.calls[2]).square().sum().backward()
                gradients.append(x_BTD.grad)
                assert all(parameter.grad is None for parameter in layer.parameters())
        assert torch.equal(*gradients)
        assert gradients[0].any()

    def test_old_rotary_tensors_are_ignored(self, damaged):
        edit(damaged, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
        assert_same(streamed(damaged), resident(damaged))


class TestMemory:
    def test_only_the_current_layer_is_there(self, llama):
        stack = streamed(llama)
        layers = stack.model.model.layers
        for layer in stack.layers(range(4)):
            assert [is_empty(other) for other in layers] == [other is not layer for other in layers]
        assert all(is_empty(layer) for layer in layers)

    def test_freed_tensors_are_gone(self, llama):
        """Nobody else holds a layer's weights once the next is there."""
        stack, seen = streamed(llama), []
        for layer in stack.layers(range(4)):
            assert not any(reference() is not None for reference in seen)
            seen.append(weakref.ref(layer.mlp.up_proj.weight))

    def test_head_is_read_when_logits_are(self, llama):
        stack = streamed(llama)
        assert stack.model.lm_head.weight.is_meta
        first = swept(stack)
        assert not stack.model.lm_head.weight.is_meta
        stack.forget_head()
        assert stack.model.lm_head.weight.is_meta
        assert all(map(torch.equal, swept(stack), first))

    @pytest.mark.parametrize("end", ["close", "raise"])
    def test_a_sweep_that_ends_early_leaves_nothing(self, llama, end):
        stack, before = streamed(llama), threading.active_count()
        if end == "close":
            sweep = stack.layers(range(4))
            next(sweep)
            sweep.close()
        else:
            with pytest.raises(ZeroDivisionError):
                fail_in_the_first_layer(stack)
        assert threading.active_count() == before
        assert all(is_empty(layer) for layer in stack.model.model.layers)
        assert_same(stack, resident(llama))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA binds on Linux only")
def test_streaming_lowers_the_peak(tmp_path):
    """Under one memory limit a pair is swept, and cannot be loaded whole; without the limit it can."""
    script = Path(__file__).parents[1] / "helpers" / "streamed_memory.py"
    # malloc's arenas for threads are address space, not memory, but the limit counts them.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["streamed", "too-large", "loaded"], done.stderr
    assert "does not fit on cpu" in done.stderr


class TestDamage:
    def test_missing_tensor(self, damaged):
        edit(damaged, lambda tensors: tensors.pop(WEIGHT))
        with pytest.raises(BadInput, match=f"lacks 1 tensors, such as {WEIGHT}"):
            streamed(damaged)

    def test_missing_head_of_an_untied_model(self, damaged):
        edit(damaged, lambda tensors: tensors.pop("lm_head.weight"))
        with pytest.raises(BadInput, match=r"lm_head\.weight"):
            streamed(damaged)

    def test_wrong_shape(self, damaged):
        edit(damaged, lambda tensors: tensors.update({WEIGHT: torch.ones(20, 23)}))
        with pytest.raises(BadInput, match=rf"{WEIGHT} has the shape \[20, 23\], config.json asks for \[20, 24\]"):
            streamed(damaged)

    def test_integers_for_weights(self, damaged):
        edit(damaged, lambda tensors: tensors.update({WEIGHT: torch.ones(20, 24, dtype=torch.int8)}))
        with pytest.raises(BadInput, match=f"quantised .the tensor {WEIGHT}, stored as I8"):
            streamed(damaged)

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
    def test_nan_and_infinity(self, damaged, value):
        """Found when the layer is reached, in a thread; the sweep raises it."""
        edit(
            damaged,
            lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].index_fill(1, torch.tensor(3), float(value))}),
        )
        stack, before = streamed(damaged), threading.active_count()
        sweep = stack.layers(range(4))
        next(sweep)
        with pytest.raises(BadInput, match=f"{WEIGHT} holds a NaN or an infinity"):
            next(sweep)
        assert threading.active_count() == before
        assert is_empty(stack.model.model.layers[0])

    def test_nan_in_an_embedding(self, damaged):
        """Found when a prompt has the token."""
        name = "model.embed_tokens.weight"
        edit(
            damaged,
            lambda tensors: tensors.update({name: tensors[name].index_fill(0, torch.tensor(3), float("nan"))}),
        )
        stack = streamed(damaged)
        *fine, bad = batches([[5, 6], [3, 4]], 1, stack)
        stack.start(*fine)
        with pytest.raises(BadInput, match=f"{name} holds a NaN or an infinity"):
            stack.start(bad)

    def test_too_large_for_float32(self, damaged):
        edit(damaged, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].double() * 1e60}))
        stack = streamed(damaged, torch.bfloat16)
        with pytest.raises(BadInput, match="NaN or an infinity"):
            list(stack.layers(range(4)))

    def test_shard_cut_before(self, damaged):
        (file,) = damaged.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(BadInput, match="cut short"):
            streamed(damaged)

    @pytest.mark.parametrize("how", ["cut", "removed"])
    def test_shard_lost_while_running(self, damaged, how):
        stack = streamed(damaged)
        (file,) = damaged.glob("*.safetensors")
        if how == "cut":
            file.write_bytes(file.read_bytes()[: stack._shards._tensors[WEIGHT].start + 4])
        else:
            file.unlink()
        with pytest.raises(BadInput, match="cut short" if how == "cut" else "No such file"):
            list(stack.layers(range(4)))

    def test_architecture_that_leaves_a_table_empty(self, llama, monkeypatch):
        """A rotary table that nobody fills must not become whatever lay in memory."""
        monkeypatch.setattr("transformers.PreTrainedModel._init_weights", lambda _model, _module: None)
        with pytest.raises(BadInput, match=r"model\.rotary_emb\.(original_)?inv_freq.*--offload none"):
            streamed(llama)

    def test_quantised(self, llama, tmp_path):
        checkpoint = Checkpoint.open(str(llama))
        checkpoint.config["quantization_config"] = {"quant_method": "bitnet"}
        with pytest.raises(BadInput, match=r"quantised.*'bitnet'"):
            open_streamed("m", checkpoint, torch.float32, CPU)
