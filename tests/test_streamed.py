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

from mergekit_wp.checkpoint import Checkpoint
from mergekit_wp.errors import BadInput
from mergekit_wp.scoring.batches import batches
from mergekit_wp.scoring.job import ScoringJob
from mergekit_wp.scoring.models import _load_model, _lora_merged
from mergekit_wp.scoring.offload import RESERVE, cgroup_free, parameter_bytes, pick_offload
from mergekit_wp.scoring.stack import ResidentStack
from mergekit_wp.scoring.streamed import StreamedStack, open_streamed
from mergekit_wp.scoring.sweep import ascend

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4]]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def streamed(folder, dtype=torch.float32, adapter=None) -> StreamedStack:
    return open_streamed(str(folder), Checkpoint.open(str(folder)), dtype, CPU, adapter=adapter)


def resident(folder, dtype=torch.float32) -> ResidentStack:
    return ResidentStack(_load_model(str(folder), str(folder), dtype, CPU, False), CPU, dtype)


def swept(stack) -> list[torch.Tensor]:
    """The residual stream after every layer for two ragged batches, and the logits."""
    parts = list(batches(PROMPTS, 2, CPU))
    found = []
    for _layer, streams in ascend(stack, [stack.start(part) for part in parts], stack.depth):
        found += [stream.clone() for stream in streams]
    return found + [stack.logits(part.at_anchor(x), 97) for part, x in zip(parts, found[-2:], strict=True)]


def assert_same(stack, whole) -> None:
    """Weights bit for bit; streams and logits to rounding, since products also depend on where memory begins."""
    layers = whole.model.model.layers
    for index, layer in zip(range(stack.depth), stack.layers(range(stack.depth)), strict=True):
        for key, wanted in layers[index].state_dict().items():
            assert torch.equal(layer.state_dict()[key], wanted), key
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[stack.dtype]
    for got, wanted in zip(swept(stack), swept(whole), strict=True):
        torch.testing.assert_close(got, wanted, rtol=close, atol=close)
    for name, wanted in whole.model.named_parameters():
        if not name.startswith("model.layers."):
            assert torch.equal(stack.model.get_parameter(name), wanted), name
    buffers = dict(stack.model.named_buffers())
    for name, wanted in whole.model.named_buffers():
        assert torch.equal(buffers[name], wanted), name


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
                (part,) = batches([prompt], 1, CPU)
                *_below, (_layer, (stream_BTD,)) = ascend(stack, [stack.start(part)], stack.depth)
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
        stack = streamed(tiny.save(tiny.random_model("gemma2"), tmp_path / "m"))
        swept(stack)
        assert stack.model.lm_head.weight.data_ptr() == stack.model.model.embed_tokens.weight.data_ptr()

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
        (part,) = batches(PROMPTS, 3, CPU)
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
        swept(stack)
        assert not stack.model.lm_head.weight.is_meta

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
    script = Path(__file__).with_name("streamed_memory.py")
    # malloc's arenas for threads are address space, not memory, but the limit counts them.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["streamed", "too-large", "loaded"], done.stderr
    assert "memory" in done.stderr


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
        with pytest.raises(BadInput, match=f"{WEIGHT} is stored as I8"):
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

    def test_too_large_for_float16(self, damaged):
        edit(damaged, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT] * 1e9}))
        stack = streamed(damaged, torch.float16)
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
        checkpoint.config["quantization_config"] = {"quant_method": "gptq"}
        with pytest.raises(BadInput, match=r"quantised.*--offload none"):
            open_streamed("m", checkpoint, torch.float32, CPU)


class TestLora:
    PROJECTIONS = ("q_proj", "o_proj", "up_proj", "down_proj")

    def write(self, folder, base, save_embedding_layers=False, **options):
        """A random LoRA over `base`."""
        import peft
        from transformers import AutoModelForCausalLM

        options = {"r": 2, "lora_alpha": 4, "target_modules": list(self.PROJECTIONS), **options}
        model = AutoModelForCausalLM.from_pretrained(base)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter.dtype)
        wrapped.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
        return folder

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_rslora": True},
            {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 16}},
            {"target_modules": "all-linear"},
            {"layers_to_transform": [1, 3]},
            {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
            {"init_lora_weights": "gaussian"},
        ],
        ids=str,
    )
    def test_equals_what_mergekit_merges(self, tmp_path, stored, options):
        base = tiny.save(tiny.random_model("llama-biased"), tmp_path / "base", stored)
        lora = self.write(tmp_path / "lora", base, **options)
        job = ScoringJob(base=str(base), expert=f"{base}+{lora}", pairs="unused")
        for dtype in (torch.float32, torch.bfloat16):
            stack = streamed(base, dtype, adapter=str(lora))
            with _lora_merged(job) as merged:
                whole = resident(merged, dtype)
            assert_same(stack, whole)
            plain = swept(streamed(base, dtype))
            assert not torch.equal(plain[-1], swept(stack)[-1])

    def test_tied_model(self, tmp_path):
        base = tiny.save(tiny.random_model("qwen2"), tmp_path / "base")
        lora = self.write(tmp_path / "lora", base)
        with _lora_merged(ScoringJob(base=str(base), expert=f"{base}+{lora}", pairs="unused")) as merged:
            assert_same(streamed(base, adapter=str(lora)), resident(merged))
        lora = self.write(tmp_path / "tied", base, target_modules=["embed_tokens"])
        with pytest.raises(BadInput, match=r"model\.embed_tokens\.weight.*--offload none"):
            streamed(base, adapter=str(lora))

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"use_dora": True}, "use_dora True"),
            ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
            ({"bias": "all"}, "bias 'all'"),
            ({"trainable_token_indices": [1]}, r"trainable_token_indices \[1\]"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ],
        ids=str,
    )
    def test_more_than_plain_lora_is_refused(self, llama, tmp_path, options, said):
        lora = self.write(tmp_path / "lora", llama, **options)
        with pytest.raises(BadInput, match=f"{said} cannot be streamed; use --offload none"):
            streamed(llama, adapter=str(lora))

    def test_embeddings_in_the_adapter_are_refused(self, llama, tmp_path):
        """peft would put them in place of the base's."""
        lora = self.write(tmp_path / "lora", llama, target_modules=["embed_tokens"], save_embedding_layers=True)
        with pytest.raises(BadInput, match=r"carries weights of the base.*--offload none"):
            streamed(llama, adapter=str(lora))

    def test_other_adapters_are_refused(self, llama, tmp_path):
        import peft
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(llama)
        peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(
            tmp_path / "ia3"
        )
        with pytest.raises(BadInput, match="only LoRA can"):
            streamed(llama, adapter=str(tmp_path / "ia3"))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda key, tensor: None, "lacks its tensors for model.layers.0.mlp.down_proj"),
            (lambda key, tensor: tensor * float("nan"), "down_proj hold a NaN"),
            (lambda key, tensor: torch.ones(7, 7), "could not be merged"),
        ],
        ids=["missing", "nan", "shape"],
    )
    def test_damaged(self, llama, tmp_path, change, said):
        lora = self.write(tmp_path / "lora", llama)
        file = lora / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(key for key in sorted(tensors) if "layers.0.mlp.down_proj.lora_B" in key)
        changed = change(key, tensors.pop(key))
        save_file(tensors if changed is None else {**tensors, key: changed}, file)
        with pytest.raises(BadInput, match=said):
            streamed(llama, adapter=str(lora))

    def test_missing_folder(self, llama):
        with pytest.raises(BadInput, match="could not be merged"):
            streamed(llama, adapter="./nowhere")


class TestOffload:
    def checkpoint(self, folder):
        return Checkpoint.open(str(folder))

    def pick(self, monkeypatch, llama, asked, free):
        monkeypatch.setattr("mergekit_wp.scoring.offload.free_memory", lambda _device: free)
        checkpoint = self.checkpoint(llama)
        return pick_offload(asked, checkpoint, checkpoint, torch.bfloat16, CPU)

    def test_parameter_bytes(self, llama):
        parameters = sum(parameter.numel() for parameter in tiny.random_model("llama").parameters())
        assert parameter_bytes(self.checkpoint(llama), torch.float32) == 4 * parameters
        assert parameter_bytes(self.checkpoint(llama), torch.bfloat16) == 2 * parameters

    def test_auto(self, monkeypatch, llama):
        need = 2 * parameter_bytes(self.checkpoint(llama), torch.bfloat16)
        enough = int(need / (1 - RESERVE)) + 1
        mode, why = self.pick(monkeypatch, llama, "auto", enough)
        assert mode == "none"
        assert "fit into 75%" in why
        mode, why = self.pick(monkeypatch, llama, "auto", enough - 2)
        assert mode == "stream"
        assert "do not fit" in why

    @pytest.mark.parametrize("asked", ["none", "stream"])
    def test_as_asked(self, monkeypatch, llama, asked):
        mode, why = self.pick(monkeypatch, llama, asked, 1)
        assert mode == asked
        assert "as asked" in why

    def test_control_groups(self, tmp_path):
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

    def test_control_groups_version_1(self, tmp_path):
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
