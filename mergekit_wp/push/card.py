"""The model card: what the merge is, how it was made, what was measured, and under which licence it comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_wp.foreign import code, fenced, markdown, one_line
from mergekit_wp.merge.certificate import CERTIFICATE, Certificate
from mergekit_wp.merge.plan import PATCH
from mergekit_wp.page import markdown_grid
from mergekit_wp.push.evaluation import Figure
from mergekit_wp.push.licences import NEEDS, NOTICES, Licence, Terms
from mergekit_wp.push.parents import Parent
from mergekit_wp.push.stage import CURVE, PICTURE, RECIPE
from mergekit_wp.scoring.config import PLAIN

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from mergekit_wp.fit_file import Fit, Kept
    from mergekit_wp.scores import PromptStyle, ScoreMeta

_METHODS = {
    "fit": "how much of each expert's change every attention head and MLP neuron takes was learnt from the experts' "
    "own answers, without labels",
    "wp": "each attention head and each MLP neuron comes mostly from the expert that scores best there (Weight "
    "Patching, [arXiv 2604.13694](https://arxiv.org/abs/2604.13694))",
    PATCH: "every row and column that the set's heads and neurons own is the other model's, bit for bit, and all "
    "else is as it was (Weight Patching, [arXiv 2604.13694](https://arxiv.org/abs/2604.13694))",
    "aim": "where the base's inputs are large, the merge goes part of the way back to the base (Activation-Informed "
    "Merging, [arXiv 2502.02421](https://arxiv.org/abs/2502.02421))",
    "widen": "each column of a weight is shared by how far each expert moved it (WIDEN, "
    "[arXiv 2408.03092](https://arxiv.org/abs/2408.03092))",
}


@dataclass(frozen=True)
class CardResults:
    """One table of results: Markdown, the row of this model, how it was measured, command, file in the repository,
    and the figures of that row.
    """

    markdown: str
    row: str
    measured: str
    command: str
    path: str
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Card:
    """Everything that the card says. `licences` go with `parents`; `scores` are (path in the repository, metadata),
    `fit` is (path, the fit) where there are none; `loader` is the class of transformers that loads the model."""

    repo_id: str
    parents: Sequence[Parent]
    licences: Sequence[Licence]
    terms: Terms
    recipe: str
    certificate: Certificate
    dtype: str
    loader: str = "AutoModelForCausalLM"
    scores: Sequence[tuple[str, ScoreMeta]] = ()
    fit: tuple[str, Fit] | None = None
    results: Sequence[CardResults] = ()
    licence_texts: Sequence[str] = ()
    cleaned: Sequence[str] = ()

    def text(self) -> str:
        """The whole README.md."""
        from huggingface_hub import ModelCard, ModelCardData

        on_hub = list(dict.fromkeys(parent.hub for parent in self.parents if parent.hub))
        more: dict[str, Any] = {"base_model_relation": "merge"} if on_hub else {}
        if self.terms.name:
            more |= {"license_name": self.terms.name}
        if self.terms.link:
            more |= {"license_link": self.terms.link}
        if found := self._index():
            more |= {"model_name": self.repo_id.partition("/")[2], "eval_results": found}
        data = ModelCardData(
            base_model=on_hub or None,
            library_name="transformers",
            license=self.terms.id,
            pipeline_tag="text-generation",
            tags=["mergekit", "merge", *(["weight-patching"] if self.certificate.method == "wp" else [])],
            **more,
        )
        sections = [
            self._about(),
            self._use(),
            self._recipe(),
            self._scores(),
            self._picture(),
            self._results(),
            self._checks(),
            self._licences(),
        ]
        body = "\n\n".join(section for section in sections if section)
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))

    def _index(self) -> list[EvalResult]:
        """The figures of this model in the form of the Hub's `model-index`.

        https://github.com/huggingface/hub-docs/blob/main/modelcard.md: a data set has an id there, for which lm-eval's
        name of the task stands.
        """
        from huggingface_hub import EvalResult

        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=_dataset(figure.task),
                dataset_config=self._column(results, figure),
                dataset_name=one_line(figure.column),
                metric_type=one_line(figure.metric.partition(",")[0]),
                metric_name=one_line(figure.metric),
                metric_value=round(figure.value, 6),
                dataset_args=None if figure.shots is None else {"num_few_shot": figure.shots},
                source_name="wp-eval",
                source_url=f"https://huggingface.co/{self.repo_id}/blob/main/{results.path}",
            )
            for results in self.results
            for figure in results.figures
        ]

    def _column(self, results: CardResults, figure: Figure) -> str | None:
        """Which column a figure is from, where several are of one task.

        huggingface_hub would make one entry of them, which had the shots, the name and the table of the first.
        """
        data = _dataset(figure.task)
        columns = [(r.path, f.column) for r in self.results for f in r.figures if _dataset(f.task) == data]
        if len(columns) == 1:
            return None
        alone = [column for _, column in columns].count(figure.column) == 1
        return one_line(figure.column if alone else f"{figure.column} ({results.path})")

    def _about(self) -> str:
        experts = [_link(parent) for parent in self.parents if parent.role != "base"]
        bases = [_link(parent) for parent in self.parents if parent.role == "base"]
        what = f"A merge of {_listed(experts)}" + (f" on their common base {bases[0]}" if bases else "")
        if self.certificate.method == PATCH:
            what = f"{bases[0]} with a set of attention heads and MLP neurons"
            what += f" of {_listed(experts)}" if experts else " of another model"
        method = _METHODS.get("fit" if self.fit else self.certificate.method)
        how = f" with {code(f'merge_method: {self.certificate.method}')}" + (f": {method}." if method else ".")
        return (
            f"# {markdown(self.repo_id.partition('/')[2])}\n\n{what}, made by "
            f"[mergekit](https://github.com/arcee-ai/mergekit){how} Stored in {self.dtype}."
        )

    def _use(self) -> str:
        return f"""## Use

```python
from transformers import {self.loader}, AutoTokenizer

model = {self.loader}.from_pretrained("{self.repo_id}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{self.repo_id}")
inputs = tokenizer("...", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

Prompt it in the format that the experts were trained with."""

    def _recipe(self) -> str:
        tool = "wp-merge" if self.certificate.method in _METHODS else "mergekit-yaml"
        return (
            f"## Recipe\n\n{fenced(self.recipe.strip(), 'yaml')}\n\n"
            f"`{tool} {RECIPE} merged`, in a copy of this repository{self._local()}, makes it again."
        )

    def _local(self) -> str:
        """What else a copy of the repository needs: parents that are not on the Hub."""
        local = [parent.shown for parent in self.parents if parent.hub is None]
        return f", with the folder {_listed([code(name) for name in local])} in it" if local else ""

    def _scores(self) -> str:
        if self.fit:
            return fit_section(*self.fit, scaled=re.search(r"^\s*scale:", self.recipe, re.MULTILINE) is not None)
        return scores_section(self.scores) if self.scores else ""

    def _picture(self) -> str:
        if not self.certificate.shares:
            return ""
        what = "weight" if self.fit else "share"
        return (
            "## Who carries which layer\n\n"
            f"![Mean {what} of each expert in each layer's heads and neurons]({PICTURE})\n\n"
            f"Mean {what} of each expert in the heads and in the neurons of each layer; the dashed lines are where a "
            "plain average would be."
        )

    def _results(self) -> str:
        if not self.results:
            return ""
        parts = ["## Evaluation"]
        for results in self.results:
            measured = f" How it was done: {markdown(results.measured)}." if results.measured else ""
            parts += [
                results.markdown.strip(),
                f"This model is the row {code(results.row)}.{measured} All of it is in "
                f"[{results.path}]({results.path}).",
                f"The command that measures it again, in a copy of this repository{self._local()}:",
                fenced(f"$ {results.command}", "console"),
            ]
        return "\n\n".join(parts)

    def _checks(self) -> str:
        lines = "\n".join(f"- {markdown(line)}" for line in self.certificate.checked)
        versions = ", ".join(f"{name} {number}" for name, number in self.certificate.versions.items())
        cleaned = _listed([code(name) for name in self.cleaned])
        but = f", of {cleaned} as published, without folders of the machine it was made on" if cleaned else ""
        return (
            f"## Checks\n\nBefore it was published, on {markdown(self.certificate.date[:10])}, "
            f"with {markdown(versions)}:"
            f"\n\n{lines}\n\n"
            f"[{CERTIFICATE}]({CERTIFICATE}) has the SHA-256 of every file of the model as it was then{but}."
        )

    def _licences(self) -> str:
        lines = [
            f"- {_link(parent)}: {markdown(licence.text or 'no licence stated')}"
            + "".join(f" ({NEEDS[name]})" for name in licence.ids if name in NEEDS)
            for parent, licence in zip(self.parents, self.licences, strict=True)
        ]
        notices = [NOTICES[i] for i in dict.fromkeys(i for lic in self.licences for i in lic.ids) if i in NOTICES]
        texts = [f"[{path}]({path})" for path in self.licence_texts]
        terms = [markdown(text) for text in (self.terms.name, self.terms.link) if text]
        under = ", ".join([f"`{self.terms.id}`", *terms])
        parts = ["## Licence", f"Published under {under}. The models it was made of:", "\n".join(lines)]
        parts += notices + ([f"Their licence texts: {', '.join(texts)}."] if texts else [])
        return "\n\n".join(parts)


def scores_section(scores: Sequence[tuple[str, ScoreMeta]]) -> str:
    """What each score file (path in the repository, metadata) is of, as a section of a card."""
    lines = [
        "## Scores",
        "",
        "How much of what each expert has and its base lacks a single head or neuron restores, on prompts of each "
        "task. `method` says how it was measured, `utility` what recovery means; the score files hold the rest.",
        "",
    ]
    grid = [["expert", "tasks (prompts)", "method", "utility", "anchor layer", "computed in", "date", "file"]]
    for path, meta in scores:
        tasks = ", ".join(f"{name} ({task.scoring})" for name, task in meta.tasks.items())
        layer = "none" if meta.read_at is None else f"{meta.read_at} of {meta.geometry.layers}"
        name = path.rpartition("/")[2]
        method = meta.method + (f", object {meta.object}" if meta.object else "")
        method += f", at {meta.at.called}" if meta.at else ""
        utility = meta.utility + (f", answers of up to {meta.answer_tokens} tokens" if meta.answer_tokens else "")
        cells = [meta.expert.name, tasks, method, utility, layer, meta.dtype, meta.date[:10]]
        grid.append([*map(markdown, cells), f"[{markdown(name)}]({path})"])
    lines.append(markdown_grid(grid, "llllrlll"))
    put = [f"{code(meta.expert.name)} {_put(meta.prompts)}" for _, meta in scores if meta.prompts]
    return "\n".join([*lines, *(["", f"How prompts were put: {'; '.join(put)}."] if put else [])])


_MOST_STEPS = 12


def fit_section(path: str, fit: Fit, scaled: bool) -> str:
    """What a fit (at this path in the repository) was made of and came to, as a section of a card. scaled: the recipe
    has a scale, with which nothing was measured."""
    meta = fit.meta
    grid = [
        ["expert", "heads", "neurons", "all else", "prompts (held out)", "not recovered at the start", "in the end"]
    ]
    rows = zip(meta.experts, fit.heads, fit.neurons, fit.rest, meta.prompts, meta.unrecovered, strict=True)
    for expert, heads_LH, neurons_LF, rest, prompts, lost in rows:
        weights = [f"{float(x.mean()):.3f}" for x in (heads_LH, neurons_LF, rest)]
        count = f"{prompts.fitted + prompts.held_out} ({prompts.held_out})"
        grid.append([markdown(expert.name), *weights, count, f"{lost.start:.4f}", f"{lost.end:.4f}"])
    curve = meta.curve
    every = -(-len(curve) // _MOST_STEPS)
    kept = [p for n, p in enumerate(curve) if n % every == 0 or p.step in (meta.best_step, curve[-1].step)]
    losses = [["step", "fitted", "held out"]]
    losses += [[str(p.step), f"{p.fitted:.4f}", "" if p.held_out is None else f"{p.held_out:.4f}"] for p in kept]
    read = (
        f"the first {meta.answer_tokens} tokens of each answer" if meta.answer_tokens else "the token after each prompt"
    )
    put = [f"{code(e.name)} {_put(p.style)}" for e, p in zip(meta.experts, meta.prompts, strict=True) if p.style]
    parts = [
        "## Fit",
        "How much of what each expert changed the merge takes: 0 leaves the base as it is, 1 takes the change whole. "
        "The weights were learnt from the experts' own answers to unlabelled prompts. *Not recovered* is the share of "
        "the distance between base and expert, KL divergence on the expert's answers, that the merge leaves (base: "
        f"{', '.join(f'{lost.base:.4f}' for lost in meta.unrecovered)})"
        + (", on prompts that were held out." if all(p.held_out for p in meta.prompts) else "."),
        markdown_grid(grid, "lrrrrrr"),
        f"Weights by {meta.family}, from {markdown(meta.start)}, over {read}, computed in {meta.dtype} on "
        f"{meta.date[:10]}; those of step {meta.best_step}. All weights: [{path.rpartition('/')[2]}]({path})."
        + (
            " The `scale` of the recipe multiplies these weights; what is not recovered is without it."
            if scaled
            else ""
        )
        + (f" How prompts were put: {'; '.join(put)}." if put else ""),
        *([_kept(meta.keep)] if meta.keep else []),
        f"The loss, mean over {'experts and base' if meta.keep else 'experts'} of what is not recovered:",
        f"![The loss by step, on prompts fitted and held out]({CURVE})",
        markdown_grid(losses, "rrr"),
    ]
    return "\n\n".join(parts)


def _kept(kept: Kept) -> str:
    count = kept.prompts.fitted + kept.prompts.held_out
    style = f", put {_put(kept.prompts.style)}" if kept.prompts.style else ""
    return (
        f"The base was one more teacher, on {count} prompts ({kept.prompts.held_out} held out) of "
        f"{code(kept.pairs)}{style}. There the merge is {kept.end:.4f} as far from the base as the experts are on "
        f"average ({kept.start:.4f} at the start)."
    )


def _put(style: PromptStyle) -> str:
    """How the prompts of a score file were put, as Markdown."""
    parts = [f"as {code(style.template)}"] if style.template != PLAIN else []
    if style.chat_template:
        owner = f" of {code(style.chat_owner)}" if style.chat_owner else ""
        parts.append(f"in the chat template{owner} (SHA-256 {style.chat_template[:12]})")
    if style.system is not None:
        parts.append(f"with the system prompt {code(style.system)}")
    return ", ".join(parts)


def _dataset(task: str) -> str:
    """lm-eval's name of a task in the characters that a data set's id may have."""
    return re.sub(r"[^\w.-]", "_", task, flags=re.ASCII)


def _link(parent: Parent) -> str:
    if parent.hub is None:
        return f"{code(parent.shown)} (not on the Hub)"
    return f"[{parent.hub}](https://huggingface.co/{parent.hub})"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
