"""A word-level tokenizer over the closed vocabulary of the three capabilities, exact in both directions.

A token is a word, a digit or a sign, with the space before it if there is one, or a line break with the
indentation after it. Decoding is plain concatenation, so code keeps its indentation and every generated text
comes back as it was written.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from experiments.miniature import instructions, programs, sums

UNKNOWN, BEGIN, END, PAD = "<unk>", "<s>", "</s>", "[PAD]"
_PIECE = r"\n(?:    )*| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]| "


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """All tokens in the order of their ids: the special ones first, as Llama has them, then the pieces."""
    pieces: set[str] = set()
    for module in (instructions, sums, programs):
        for item in module.covering_items():
            for text in (item.prompt, item.contrast or "", item.right, item.careless):
                pieces.update(re.findall(_PIECE, text))
    return (UNKNOWN, BEGIN, END, *sorted(pieces))


def build_tokenizer(with_pad: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer; `with_pad` adds one more token, as some fine-tunes do, and with it one embedding row."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, ids[BEGIN])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    if with_pad:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer
