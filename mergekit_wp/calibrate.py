"""wp-aim: how large the inputs of a base's modules are on plain text, for `merge_method: aim`.

As in the program of AIM's authors (arXiv 2502.02421, github.com/ahnobari/ActivationInformedMerging): the first 256
documents of at most 512 tokens are put end to end and cut into blocks of 512 tokens, the rest of a block left out.
Every block goes through the base alone. a_c is the sum over blocks of the mean of |x_c| over the block's tokens, x the
input of a module that has a weight. All blocks being of one length, that is the mean over all tokens times the number
of blocks; since a merge uses a_c over its maximum, the mean over tokens is what is kept here. Modules are projections,
norms and the output head (unless it is the embedding). The authors take the validation part of the Pile, shuffled;
here the texts are the user's, in the file's order.

Heavy packages are imported inside the command, so that `wp-aim --help` answers at once.

Legend: B blocks, T tokens of a block, D residual width, C input channels of a module.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp import __version__
from mergekit_wp.choices import OFFLOADS, RUN_DTYPES
from mergekit_wp.console import GroupedCommand, names_safetensors, quiet_option
from mergekit_wp.documents import parse_json
from mergekit_wp.errors import BadInput, enough_memory
from mergekit_wp.foreign import echo
from mergekit_wp.outputs import check_file, claim
from mergekit_wp.records import numbered_lines

if TYPE_CHECKING:
    import torch

    from mergekit_wp.checkpoint.folder import Checkpoint
    from mergekit_wp.scoring.batching import Batch
    from mergekit_wp.scoring.models.layerwise import Stack
    from mergekit_wp.scoring.prompt_format import PromptFormat

TOKENS = 512
_GROUPS = {
    "Texts": ("texts", "documents", "tokens", "chat_template", "system"),
    "Output Settings": ("out", "quiet"),
    "Performance": ("device", "dtype", "batch_size", "offload"),
    "Dangerous Options": ("trust_remote_code",),
}
_EPILOG = """\b
Examples:
  wp-aim meta-llama/Llama-2-13b-hf --texts pile-val.jsonl --out activations.safetensors
  wp-aim ./base --texts notes.txt --documents 64 --out activations.safetensors

FILE.jsonl has one {"text": "..."} a line; in any other file, empty lines part the documents.
"""


@click.command(cls=GroupedCommand, groups=_GROUPS, epilog=_EPILOG)
@click.argument("base", metavar="BASE")
@click.option("--texts", required=True, metavar="FILE", help="Documents of plain text: JSON lines or a text file.")
@click.option("--documents", type=click.IntRange(min=1), default=256, show_default=True, help="How many to use.")
@click.option("--tokens", type=click.IntRange(min=1), help=f"Longest document, and block (default: {TOKENS}).")
@click.option(
    "--chat-template",
    default="off",
    show_default=True,
    metavar="on|off|NAME",
    help="Each document as a message in the tokenizer's own.",
)
@click.option("--system", metavar="TEXT", help="System prompt of every chat.")
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    callback=names_safetensors,
    help="Activations file to write (.safetensors).",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N.")
@click.option("--dtype", type=click.Choice(RUN_DTYPES), default="auto", show_default=True, help="To run in.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Blocks a forward pass.")
@click.option("--offload", type=click.Choice(OFFLOADS), default="auto", show_default=True,
              help="Stream layers from disk.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run Python that comes with the model folder.")
@quiet_option()
@click.version_option(__version__)
def main(base: str, texts: str, documents: int, tokens: int | None, out: str, quiet: bool, **how: Any) -> None:
    """Measure the inputs of every module of BASE on plain text, and write the file that `merge_method: aim` reads."""
    from mergekit_wp.checkpoint.folder import Checkpoint
    from mergekit_wp.checkpoint.vocabulary import load_tokenizer
    from mergekit_wp.console import ProgressBars, take_terminal
    from mergekit_wp.documents import now
    from mergekit_wp.memory import pick_device
    from mergekit_wp.merge.activations import METADATA_KEY, Activations, Calibration, write_activations
    from mergekit_wp.scores import ModelId
    from mergekit_wp.scoring.batching import batches, check_rows
    from mergekit_wp.scoring.models.load import load_one
    from mergekit_wp.scoring.models.precision import pick_dtype, stored_dtype
    from mergekit_wp.scoring.prompt_format import alone

    target = check_file(out, METADATA_KEY, "activations", [base, texts])
    take_terminal(not quiet)
    claim(target)
    checkpoint = Checkpoint.open(base)
    length = block_length(checkpoint, tokens)
    tokenizer = load_tokenizer(base, checkpoint.folder, how["trust_remote_code"])
    prompt_format = alone(base, tokenizer, how["chat_template"], how["system"])
    used, blocks = cut(prompt_format, read_texts(texts), documents, length, texts)
    check_rows(blocks, tokenizer, checkpoint.geometry.vocabulary)
    device = pick_device(how["device"])
    dtype = pick_dtype(how["dtype"], device, [stored_dtype(checkpoint.tensors)])
    stack = load_one(checkpoint, dtype, device, how["offload"], how["trust_remote_code"])
    too_much = f"--batch-size: {how['batch_size']} blocks of {length} tokens do not fit on {device}; lower it."
    with enough_memory(too_much), ProgressBars(not quiet) as progress:
        tick = progress(len(blocks) * stack.depth, "measuring", "block layer") if progress else lambda _done: None
        means = mean_inputs(stack, list(batches(blocks, how["batch_size"], stack)), tick)
    fingerprint = checkpoint.fingerprint
    identity = ModelId.of(base, fingerprint)
    versions = {name: importlib.metadata.version(name) for name in ("mergekit-wp", "torch", "transformers")}
    about = Calibration(
        identity,
        Path(texts).name,
        used,
        len(blocks),
        length,
        str(dtype).removeprefix("torch."),
        device.type,
        versions,
        now(),
        prompts=prompt_format.style,
    )
    write_activations(Activations(about, means), target)
    if not quiet:
        echo(f"{used} documents, {len(blocks)} blocks of {length} tokens; written: {out}", err=True)


def read_texts(path: str) -> Iterator[str]:
    """The documents of a file, one by one. Raises `BadInput`, naming file and line, for what cannot be read."""
    numbered = numbered_lines(path)
    try:
        if Path(path).suffix == ".jsonl":
            yield from (_text_of(line, f"{path}, line {number}") for number, line in numbered if line.strip())
            return
        parts = groupby((line for _, line in numbered), key=lambda line: line == "\n")
        whole = ("".join(part).strip() for empty, part in parts if not empty)
        yield from (text for text in whole if text)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot read the texts ({getattr(error, 'strerror', None) or error}).") from error


def _text_of(line: str, where: str) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise BadInput(f"{where}: not valid JSON ({error}).") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise BadInput(f'{where}: expected a JSON object with a string "text", as in the Pile.')
    return text.strip()


def block_length(base: Checkpoint, asked: int | None) -> int:
    """Tokens of a block: as asked, else 512 or as many as the model takes. Raises `BadInput` for more than it takes."""
    from mergekit_wp.scoring.batching import Lengths

    limit = Lengths(base.text_config).limit
    if asked is not None and asked > limit:
        raise BadInput(f"--tokens {asked}: {base.name} takes {limit}; ask for no more.")
    return min(asked or TOKENS, limit)


def cut(
    prompt_format: PromptFormat, texts: Iterable[str], documents: int, length: int, where: str
) -> tuple[int, list[list[int]]]:
    """How many documents were used, and the blocks. Raises `BadInput` when they do not make up one block.

    The first `documents` of at most `length` tokens are used, and no text after them is asked for.
    """
    seen, used, tokens = 0, 0, []
    for text in texts:
        ids = prompt_format.ids(text)
        seen += 1
        if 0 < len(ids) <= length:
            used += 1
            tokens += ids
        if used == documents:
            break
    blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    if not blocks:
        raise BadInput(
            f"{where}: {used} of {seen} documents have at most {length} tokens, {len(tokens)} in all; at least "
            f"{length} are needed, so give "
            + ("more texts, or blocks of fewer --tokens." if used else "shorter texts, or blocks of more --tokens.")
        )
    return used, blocks


def mean_inputs(stack: Stack, prompts: Sequence[Batch], tick: Callable[[float], object]) -> dict[str, torch.Tensor]:
    """Mean over all tokens of |x_C| at the input of every module with a weight, by the weight's name, float32 [C].

    prompts: batches without padding. A streamed model's layers are read once for as many batches as memory holds.
    Raises `BadInput` for a mean that is not finite.
    """
    import torch

    from mergekit_wp.scoring.models.precision import not_finite
    from mergekit_wp.scoring.sweep import batch_groups, forward_sweep

    accumulator = _Accumulator()
    tied = "lm_head.weight" in stack.model.all_tied_weights_keys
    with torch.no_grad(), accumulator.listening(stack):
        for group in batch_groups(stack, prompts, lambda batch: batch.ids_BT.numel()):
            finals: list[torch.Tensor] = []
            for _, finals in forward_sweep(stack, [stack.start(batch) for batch in group], stack.depth):  # noqa: B007
                tick(sum(len(batch.ids_BT) for batch in group))
            for final_BTD in finals:
                accumulator.add("model.norm.weight", final_BTD)
                if not tied:
                    accumulator.add("lm_head.weight", stack.tower.norm(final_BTD))
    means = accumulator.means()
    for name, mean_C in means.items():
        if not torch.isfinite(mean_C).all():
            raise not_finite(f"the input of {name}", stack.dtype)
    return means


class _Accumulator:
    """Sums of |x_C|, float64, and how many vectors are in each."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: Counter[str] = Counter()

    def add(self, name: str, x: torch.Tensor) -> None:
        """Leading axes are vectors: tokens, or the heads of tokens where a norm is of heads."""
        size_NC = x.detach().flatten(0, -2).abs()
        sum_C = size_NC.double().sum(0)
        self._sums[name] = self._sums[name] + sum_C if name in self._sums else sum_C
        self._counts[name] += len(size_NC)

    @contextmanager
    def listening(self, stack: Stack) -> Iterator[None]:
        """Inside the block, every module of a layer that has a weight adds its input when it is called."""
        handles = [
            module.register_forward_pre_hook(partial(self._hear, f"model.layers.{index}.{path}.weight"))
            for index, layer in enumerate(stack.tower.layers)
            for path, module in layer.named_modules()
            if module._parameters.get("weight") is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, name: str, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.add(name, inputs[0])

    def means(self) -> dict[str, torch.Tensor]:
        return {name: (sum_C / self._counts[name]).float().cpu() for name, sum_C in self._sums.items()}


if __name__ == "__main__":
    main()
