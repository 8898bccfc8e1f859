"""Differences are of the weights as stored, whatever products run in; and 16-bit products lose no gradient."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from streamed_world import CPU, resident, streamed

from mergekit_wp.calibrate import mean_inputs
from mergekit_wp.checkpoint.folder import Checkpoint
from mergekit_wp.checkpoint.weights import TensorHeader
from mergekit_wp.errors import BadInput
from mergekit_wp.eval.measure import _check_finite, _check_stored_weights
from mergekit_wp.eval.models import EvalModel
from mergekit_wp.geometry import PROJECTIONS
from mergekit_wp.scoring.anchor.directions import Directions, extract_all
from mergekit_wp.scoring.batching import TaskTokens, batches
from mergekit_wp.scoring.config import ScoringJob
from mergekit_wp.scoring.first_order import attr_heads, attr_neurons
from mergekit_wp.scoring.hooks import run_layer
from mergekit_wp.scoring.metrics import KLMetric
from mergekit_wp.scoring.models.load import ModelPair
from mergekit_wp.scoring.models.offload import parameter_bytes, pick_offload
from mergekit_wp.scoring.models.precision import held_dtype, loss_scale, not_finite, pick_dtype, stored_dtype
from mergekit_wp.scoring.passes import BatchState, Passes, first_order
from mergekit_wp.scoring.patching import response_difference, weight_difference
from mergekit_wp.scoring.score import task_run
from mergekit_wp.subset import Subset

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
OPEN = {"resident": resident, "streamed": streamed}
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33, 34]]


def small_update(root, stored, size=0.005, kind="llama"):
    """root/base and root/expert, which moved by `size` of the weights, both stored in `stored`."""
    base = tiny.random_model(kind, seed=1)
    expert = tiny.fine_tuned(base, seed=2, size=size)
    return tiny.save(base, root / "base", stored), tiny.save(expert, root / "expert", stored)


def on_disk(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("products", [F32, BF16, F16])
@pytest.mark.parametrize("stored", [F32, BF16, F16])
@pytest.mark.parametrize("how", OPEN)
def test_differences_are_those_of_the_file(tmp_path, how, stored, products):
    """Against the bytes on disk, subtracted in float64."""
    folders = small_update(tmp_path, stored)
    base, expert = map(on_disk, folders)
    stacks = [OPEN[how](folder, products) for folder in folders]
    order = range(stacks[0].depth)
    for index, one, other in zip(order, *(stack.layers(order) for stack in stacks), strict=True):
        for key, path in PROJECTIONS.items():
            name = f"model.layers.{index}.{path}.weight"
            wanted = expert[name].double() - base[name].double()
            got = weight_difference(key, one, other)
            assert got.dtype == F32
            torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)
            assert got.any()


@pytest.mark.parametrize("products", [BF16, F16])
@pytest.mark.parametrize("how", OPEN)
@pytest.mark.parametrize("kind", ["llama-biased", "qwen3", "gemma2"])
def test_a_models_own_products_run_on_weights_as_stored(tmp_path, kind, how, products):
    """Autocast takes every dtype that weights are held in, through embeddings, norms, biases and the head."""
    folders = small_update(tmp_path, F16, kind=kind)
    stack, whole = OPEN[how](folders[0], products), resident(folders[0])
    for part in batches(PROMPTS, 2, stack):
        logits = []
        for each in (stack, whole):
            stream_BTD = each.start(part).stream_BTD
            calls = each.start(part).calls
            for index, layer in zip(range(each.depth), each.layers(range(each.depth)), strict=True):
                with torch.no_grad():
                    stream_BTD = each.call(layer, stream_BTD, calls[index])
                assert stream_BTD.dtype == F32
            logits.append(each.logits(part.at_anchor(stream_BTD), 97))
        torch.testing.assert_close(*logits, rtol=0.1, atol=0.1 if products == BF16 else 0.02)


def scores(folders, products, method):
    """Sums over the prompts above, not divided by gaps, of both kinds: each [L, width]; read off a random direction."""
    base, expert = (resident(folder, products) for folder in folders)
    geometry = Checkpoint.open(str(folders[0])).geometry
    job = ScoringJob("b", "e", "p", method=method, utility="anchor", gap="mean", gap_floor=0.0)
    pair = ModelPair(base, expert, geometry, CPU, products)
    v_LD = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
    run = task_run(job, pair, TaskTokens("t", [], None, PROMPTS), 3, Directions(v_LD, v_LD))
    items = [BatchState(run, batch) for batch in batches(PROMPTS, 2, base, expert)]
    first_order(Passes(pair, method, items, keep_graphs=True), Subset.choose(geometry, "all", None, None))
    return {kind: sum(parts.values()) for kind, parts in run.sums.items()}


@pytest.mark.parametrize(("products", "most"), [(BF16, 0.12), (F16, 0.03)])
@pytest.mark.parametrize("method", ["writeback", "attr"])
def test_small_updates_survive_products_in_16_bits(tmp_path, method, products, most):
    """Of an update of 0.2 %, below what bfloat16 resolves of the weights: every kind's error against float32."""
    folders = small_update(tmp_path, F16, size=0.002)
    exact, got = (scores(folders, dtype, method) for dtype in (F32, products))
    for kind in exact:
        error = (got[kind] - exact[kind]).norm() / exact[kind].norm()
        assert error < most, (kind, float(error))


@pytest.mark.parametrize("size", [1e-9, 1.0])
@pytest.mark.parametrize("products", [BF16, F16])
def test_gradients_of_any_size(tmp_path, size, products):
    """A gradient far below float16's smallest number gives its scores: the scores of another size, times the ratio."""
    folders = small_update(tmp_path, F16)
    found = {}
    for scale in (size, 1e-2):
        base, expert = (resident(folder, products) for folder in folders)
        geometry = Checkpoint.open(str(folders[0])).geometry
        (part,) = batches(PROMPTS, 4, base)
        start, layer = base.start(part), base.model.model.layers[1]
        above_BTD, record = run_layer(base, layer, start.stream_BTD, start.calls[1], gradient=True)
        direction = torch.randn(above_BTD.shape, generator=torch.Generator().manual_seed(0))
        below_BTD = record.backward(above_BTD, scale * direction)
        with base.autocast(), torch.no_grad():
            other = expert.model.model.layers[1]
            parts = attr_heads(layer, other, record, geometry) | attr_neurons(layer, other, record, geometry)
        found[scale] = [below_BTD / scale, *(table / scale for table in parts.values())]
    for got, wanted in zip(found[size], found[1e-2], strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_the_scale_is_a_power_of_two_that_keeps_the_largest_in_range(values):
    gradient = torch.tensor(values, dtype=F32)
    scale = loss_scale(gradient)
    mantissa, _exponent = torch.frexp(scale)
    assert mantissa == 0.5
    largest = float((gradient.double().abs() * scale.double()).max())
    assert largest < 16
    assert largest >= 8 or float(gradient.abs().max()) < 2.0**-100


def test_the_gradient_of_a_tiny_divergence_is_not_lost(tmp_path):
    """dF/dz where probabilities differ by 3e-8, which float16 rounds to 0 or 6e-8: its products against float32."""
    folder = tiny.save(tiny.random_model("llama"), tmp_path / "m")
    generator = torch.Generator().manual_seed(1)
    z_BD, moved_BV = torch.randn(4, 24, generator=generator), 3e-6 * torch.randn(4, 97, generator=generator)
    metric_gradients = []
    for products in (F16, F32):
        base = resident(folder, products)
        with torch.no_grad():
            target_BV = base.logits(z_BD, 97) + moved_BV
        z_B1D, weights_B1 = z_BD[:, None], torch.ones(4, 1, dtype=torch.float64)
        metric_gradients.append(KLMetric("kl", 3, 97).read_with_gradient(base, z_B1D, target_BV, weights_B1)[1])
    assert (metric_gradients[0] - metric_gradients[1]).norm() < 0.12 * metric_gradients[1].norm()  # 0.07; unscaled 0.19


def headers(*dtypes):
    return {str(i): TensorHeader(dtype, (2, 3), None, 0, 0) for i, dtype in enumerate(dtypes)}


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        (("F16",), F16), (("BF16",), BF16), (("F32",), F32), (("F64",), F32), (("F16", "BF16"), F32),
        (("F16", "F32"), F32), (("U8", "F16"), F16), (("U8",), F32), ((), F32),
    ],
    ids=str,
)  # fmt: skip
def test_what_holds_a_checkpoint_without_rounding(dtypes, stored):
    assert stored_dtype(headers(*dtypes)) == stored
    assert held_dtype(headers(*dtypes), BF16) == stored
    assert held_dtype(headers(*dtypes), F32) == F32


@pytest.mark.parametrize(
    ("stored", "products"),
    [
        ((F16, F16), F16), ((BF16, BF16), BF16), ((F32, F32), F32), ((F16, F32), F16), ((F32, BF16), BF16),
        ((F16, BF16), BF16),
    ],
    ids=str,
)  # fmt: skip
def test_auto_follows_what_is_stored_on_an_accelerator(stored, products):
    assert pick_dtype("auto", torch.device("cuda"), stored) == products
    assert pick_dtype("auto", CPU, stored) == F32
    assert pick_dtype("bfloat16", torch.device("cuda"), stored) == BF16


@pytest.mark.parametrize("products", [F32, BF16])
@pytest.mark.parametrize("stored", [F32, F16])
def test_memory_is_counted_as_it_is_held(tmp_path, stored, products, monkeypatch):
    base, expert = map(str, small_update(tmp_path, stored))
    base, expert = Checkpoint.open(base), Checkpoint.open(expert)
    held = sum(
        p.numel() * p.element_size() for f in (base, expert) for p in resident(f.folder, products).model.parameters()
    )
    assert held == sum(parameter_bytes(model, held_dtype(model.tensors, products)) for model in (base, expert))
    for free, wanted in ((int(held / 0.75) + 1, "none"), (int(held / 0.75) - 1, "stream")):
        monkeypatch.setattr("mergekit_wp.scoring.models.offload.free_memory", lambda _device, free=free: free)
        assert pick_offload("auto", [base, expert], products, CPU)[0] == wanted


def test_responses_keep_their_own_precision(tmp_path):
    """What the expert's weights add to a projection's output, in bfloat16 products: relative to itself, not to all."""
    folders = small_update(tmp_path, F16, size=0.001)
    base, expert = (resident(folder, BF16) for folder in folders)
    (part,) = batches(PROMPTS, 4, base)
    start, layer = base.start(part), base.model.model.layers[0]
    with torch.no_grad():
        _above, record = run_layer(base, layer, start.stream_BTD, start.calls[0], gradient=False)
        with base.autocast():
            got = response_difference("q", layer, expert.model.model.layers[0], record).double()
    weights = [on_disk(folder)["model.layers.0.self_attn.q_proj.weight"].double() for folder in folders]
    wanted = record.inputs["q"].double() @ (weights[1] - weights[0]).T
    assert (got - wanted).norm() / wanted.norm() < 0.01


def large(root, size):
    """Two models whose MLPs work with numbers beyond float16: squares of about `size`."""
    base = tiny.random_model("llama", seed=1)
    for layer in base.model.layers:
        layer.mlp.up_proj.weight.data *= size
        layer.mlp.down_proj.weight.data /= size
    return tiny.save(base, root / "base", F32), tiny.save(tiny.fine_tuned(base, seed=2), root / "expert", F32)


def test_what_float16_does_not_hold_is_not_called_damaged(tmp_path):
    folders = large(tmp_path, 1e6)
    task = TaskTokens("t", PROMPTS[:2], None, PROMPTS[2:])
    fine = {}
    for products in (F32, BF16, F16):
        base, expert = (resident(folder, products) for folder in folders)
        pair = ModelPair(base, expert, Checkpoint.open(str(folders[0])).geometry, CPU, products)
        run = task_run(ScoringJob("b", "e", "p", utility="kl"), pair, task, None, None)
        (part,) = batches(task.scoring, 4, base, expert)

        def directions(base=base, expert=expert):
            extract_all(base, expert, [task], 4, 4)

        def gaps(pair=pair, run=run, part=part):
            first_order(
                Passes(pair, run.method, [BatchState(run, part)], keep_graphs=True),
                Subset.choose(pair.geometry, "all", None, None),
            )

        def inputs(base=base, part=part):
            mean_inputs(base, [part], lambda _n: None)

        for what in (directions, gaps, inputs):
            if products == F16:
                with pytest.raises(BadInput, match=r"not finite: float16 ends at 65504.*bfloat16 or float32"):
                    what()
            else:
                what()
                fine[what.__name__] = True
    assert set(fine) == {"directions", "gaps", "inputs"}


@given(st.sampled_from([F32, BF16]))
def test_no_dtype_is_named_that_would_not_help(dtype):
    assert "--dtype" not in not_finite("it", dtype).message


@pytest.mark.parametrize(("size", "said"), [(1e5, "float16 does not, .*--dtype bfloat16"), (torch.inf, "a NaN or")])
def test_evaluation_tells_too_large_from_damaged(tmp_path, size, said):
    model = tiny.random_model("llama", seed=1)
    model.model.norm.weight.data[0] = size
    folder = tiny.save(model, tmp_path / "m", BF16)
    with pytest.raises(BadInput, match=rf"m: the weight model.norm.weight holds .*{said}"):
        _check_stored_weights(EvalModel("m", str(folder), folder, ""), "float16")
    loaded = type(model).from_pretrained(folder, dtype=F16)
    with pytest.raises(BadInput, match=rf"m: the weight model.norm.weight holds .*{said}"):
        _check_finite(EvalModel("m", str(folder), folder, ""), loaded.named_parameters())
