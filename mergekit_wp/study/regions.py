"""What share of a head's attention goes to which region of a prompt, without matrices of attention.

Attention is linear in the values. So each layer runs once more with indicators of regions in the place of its values,
the same for every group, and what o_proj would read is then the share of each region, by head and query: the
architecture's own code does the rest (grouped queries, windows, soft-capping, norms, position). A second copy of the
prompts goes along with queries of zero, which attend to all that they may see alike: what a region would get by its
number of tokens, whatever masks and windows are.

Regions of a prompt, all tokens of which are in one:

    first        its first token, where attention that has nowhere to go collects
    frame        what all prompts and contrasts of the study begin and end with: a chat template, `Answer:`
    instruction  what the prompt has beyond its contrast
    content      everything else

and `self`, the query's own token, which is taken out of its region. It differs from query to query, so the tokens of
all queries have indicators of their own, as many at a time as a head has room for.

Two queries: the anchor position, the prompt's last token, and `later`, the mean over all positions behind the
instruction (the anchor where there is none).

Legend: B prompts, N prompts of a task, T tokens, A queries of each, L layers, H heads, d_h (d) head width,
K = kv_heads*d_h, R regions, C indicators (R and some queries).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_wp.console import Tick
from mergekit_wp.geometry import Geometry
from mergekit_wp.scoring.batching import TaskTokens, numbered_batches, pick
from mergekit_wp.scoring.hooks import LayerRecord, rerun_attention
from mergekit_wp.scoring.models.layerwise import Stack
from mergekit_wp.scoring.sweep import batch_groups, recorded_sweep

REGIONS = ("first", "frame", "instruction", "content")
SELF = "self"
READINGS = ("anchor", "later")
LEAST = 1e-6  # share of attention that float32 tells from none


@dataclass(frozen=True)
class Spans:
    """One prompt: its tokens, where the instruction is (start, end), how many tokens of frame are at either end."""

    ids: Sequence[int]
    instruction: tuple[int, int]
    frame: tuple[int, int]

    @property
    def regions(self) -> list[int]:
        """The region of each token, as its number in `REGIONS`."""
        found = [3] * len(self.ids)
        start, end = self.frame
        found[:start] = [1] * start
        found[len(found) - end :] = [1] * end
        found[slice(*self.instruction)] = [2] * (self.instruction[1] - self.instruction[0])
        return [0, *found[1:]]

    @property
    def queries(self) -> list[int]:
        """The positions behind the instruction, at least the last one."""
        return list(range(min(self.instruction[1], len(self.ids) - 1), len(self.ids)))


def spans_of(tasks: Sequence[TaskTokens]) -> dict[str, list[Spans]]:
    """Of every task with contrasts, its prompts that have an instruction and content; others are left out."""
    every = [ids for task in tasks for ids in (*task.scoring, *task.scoring_contrasts)]
    frame = _common(every), _common([ids[::-1] for ids in every])
    found: dict[str, list[Spans]] = {}
    for task in tasks:
        pairs = zip(task.scoring, task.scoring_contrasts, strict=True) if task.scoring_contrasts else ()
        spans = [Spans(ids, beyond(ids, contrast), frame) for ids, contrast in pairs]
        found[task.task] = [each for each in spans if {2, 3} <= set(each.regions)]
    return {task: spans for task, spans in found.items() if spans}


def beyond(ids: Sequence[int], contrast: Sequence[int]) -> tuple[int, int]:
    """(start, end) of what a prompt has beyond its contrast: without their common beginning and end."""
    start = _common([ids, contrast])
    end = _common([ids[start:][::-1], contrast[start:][::-1]])
    return start, len(ids) - end


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with."""
    shortest = min(map(len, rows))
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)


@dataclass(frozen=True)
class Attended:
    """Shares of attention of one model on N prompts, by reading: float32 [N, L, H, R + 1], the last one `self`; and
    what each would be if all visible tokens were attended to alike."""

    shares: dict[str, torch.Tensor]
    alike: dict[str, torch.Tensor]

    def part(self, where: slice) -> Attended:
        """Of some of the prompts."""
        return Attended(*({name: t[where] for name, t in each.items()} for each in (self.shares, self.alike)))


def attended(stack: Stack, geometry: Geometry, prompts: Sequence[Spans], batch_size: int, tick: Tick) -> Attended:
    """Of every prompt, layer and head: one sweep."""
    shape = len(prompts), geometry.layers, geometry.heads, len(REGIONS) + 1
    found = Attended(*({reading: torch.zeros(shape) for reading in READINGS} for _ in range(2)))
    items = list(numbered_batches([each.ids for each in prompts], batch_size, stack))
    for group in batch_groups(stack, items, lambda item: item[1].ids_BT.numel()):
        starts = [stack.start(batch) for _chosen, batch in group]
        for layer, place, module, record in recorded_sweep(stack, starts, stack.depth):
            chosen, _batch = group[place]
            layout = Layout.of([prompts[i] for i in chosen], record.stream_BTD.shape[1], stack.device)
            share_2BAHR = shares(stack, geometry, module, record, layout)
            for table, share_BAHR in zip((found.shares, found.alike), share_2BAHR, strict=True):
                for reading, weight_BA in layout.readings.items():
                    mean_BHR = (share_BAHR.double() * weight_BA[..., None, None]).sum(1)
                    table[reading][chosen, layer] = mean_BHR.float().cpu()
            tick(len(chosen) / stack.depth)
    return found


@dataclass(frozen=True)
class Layout:
    """One batch: the region of each token [B, T], -1 behind the prompt; the queries [B, A], the last one repeated where
    a prompt has fewer; how much each counts in each reading [B, A], float64."""

    region_BT: torch.Tensor
    query_BA: torch.Tensor
    readings: dict[str, torch.Tensor]

    @classmethod
    def of(cls, prompts: Sequence[Spans], length: int, device: torch.device) -> Layout:
        most = max(len(each.queries) for each in prompts)
        region_BT = torch.full((len(prompts), length), -1)
        query_BA = torch.zeros(len(prompts), most, dtype=torch.long)
        anchor_BA, later_BA = (torch.zeros(len(prompts), most, dtype=torch.float64) for _ in range(2))
        for row, each in enumerate(prompts):
            region_BT[row, : len(each.ids)] = torch.tensor(each.regions)
            count = len(each.queries)
            query_BA[row] = torch.tensor([*each.queries, *[each.queries[-1]] * (most - count)])
            anchor_BA[row, count - 1] = 1
            later_BA[row, :count] = 1 / count
        readings = dict(zip(READINGS, (anchor_BA.to(device), later_BA.to(device)), strict=True))
        return cls(region_BT.to(device), query_BA.to(device), readings)


@torch.no_grad()
def shares(
    stack: Stack, geometry: Geometry, layer: Any, record: LayerRecord, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, A, H, R + 1] of one layer: each head's shares at the queries; and those of queries of zero."""
    q_BTQ = record.outputs["q"].float()
    both_2BTQ = torch.cat([q_BTQ, torch.zeros_like(q_BTQ)])
    region_BTR = torch.nn.functional.one_hot(layout.region_BT + 1, len(REGIONS) + 1)[..., 1:].float()
    parts = []
    for query_BA in layout.query_BA.split(geometry.head_dim - len(REGIONS), 1):
        own_BTA = torch.nn.functional.one_hot(query_BA, region_BTR.shape[1]).transpose(1, 2).float()
        value_BTC = torch.cat([region_BTR, own_BTA], -1)
        value_BTd = torch.nn.functional.pad(value_BTC, (0, geometry.head_dim - value_BTC.shape[-1]))
        value_BTK = value_BTd.repeat(1, 1, geometry.kv_heads)
        read_2BTQ = rerun_attention(stack, layer.self_attn, record, both_2BTQ, value_BTK)
        read_2BAHd = pick(read_2BTQ, query_BA.repeat(2, 1)).unflatten(-1, (geometry.heads, geometry.head_dim))
        region_2BAHR, own_2BAHA = read_2BAHd[..., : value_BTC.shape[-1]].split([len(REGIONS), query_BA.shape[1]], -1)
        own_2BAH1 = own_2BAHA.diagonal(dim1=1, dim2=3).transpose(1, 2)[..., None]
        its_2BA1R = pick(region_BTR, query_BA).repeat(2, 1, 1)[:, :, None]
        parts.append(torch.cat([region_2BAHR - its_2BA1R * own_2BAH1, own_2BAH1], -1))
    one_BAHR, zero_BAHR = torch.cat(parts, 1).clamp(min=0).chunk(2)
    return one_BAHR, zero_BAHR


def log_ratios(found: Attended, reading: str, content_alone: bool) -> torch.Tensor:
    """log R [N, L, H]: of what a token of the instruction gets over what a token of the content gets (or one of all
    else), each held against queries of zero; NaN where a window lets the query see none of one of the two."""
    share_NLHR, alike_NLHR = found.shares[reading].double(), found.alike[reading].double()
    instruction, content = (REGIONS.index(name) for name in ("instruction", "content"))
    others = [content] if content_alone else [r for r in range(len(REGIONS) + 1) if r != instruction]
    logs = []
    for where in ([instruction], others):
        share_NLH, alike_NLH = share_NLHR[..., where].sum(-1), alike_NLHR[..., where].sum(-1)
        ratio_NLH = share_NLH.clamp(min=LEAST) / alike_NLH
        logs.append(ratio_NLH.log().masked_fill(alike_NLH < LEAST, torch.nan))
    return logs[0] - logs[1]
