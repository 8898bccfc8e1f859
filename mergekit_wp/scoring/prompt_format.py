"""How a prompt becomes the tokens that both models see: text template, chat template, special tokens.

The base's tokenizer gives the ids, since they are valid in both models. A chat template is mostly the expert's alone,
so it is the expert's where there is one, written out as text and then tokenised by the base's tokenizer.

What the tokenizer puts before a text of its own (BOS) stands there once, whether the text begins with it already or
not; so does lm-eval (since 0.4.10), and with it wp-eval. What it puts after a text (EOS, SEP) is left out: scores are
read at the prompt's own last token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_wp.checkpoint.folder import Checkpoint, local_folder
from mergekit_wp.checkpoint.in_memory import LiveModel
from mergekit_wp.checkpoint.references import read_reference
from mergekit_wp.checkpoint.vocabulary import tokenizer_in
from mergekit_wp.errors import BadInput, reason_of
from mergekit_wp.foreign import logger
from mergekit_wp.scores import PromptStyle
from mergekit_wp.scoring.config import PLAIN, ScoringJob
from mergekit_wp.scoring.pairs import Pair, TaskPairs

LOG = logger(__name__)
_NO_CHAT = "system: a system prompt is part of a chat; use it with --chat-template on."


@dataclass(frozen=True)
class Chat:
    """A chat template: whose (`owner`), its `tokenizer`, the Jinja text, and the system prompt of every chat."""

    owner: str
    tokenizer: Any
    template: str
    system: str | None = None

    def render(self, message: str) -> str:
        """The text of a chat with this message of the user, up to where the answer begins.

        Raises `BadInput` for a template that fails, or that leaves the message or the system prompt out.
        """
        chat = [{"role": "system", "content": self.system}] if self.system is not None else []
        chat.append({"role": "user", "content": message})
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # Jinja raises what the template's author wrote, and many types of its own
            remedy = "leave out --system, or use" if self.system is not None else "use"
            raise BadInput(
                f"{self.owner}: its chat template fails on such a prompt ({reason_of(error)}); {remedy} "
                "--chat-template off."
            ) from error
        for what, wanted in (("system prompt", self.system), ("prompt", message)):
            if wanted is not None and wanted.strip() not in text:
                raise BadInput(
                    f"{self.owner}: its chat template leaves out the {what} {wanted[:40]!r}; "
                    f"{'leave out --system' if what == 'system prompt' else 'use --chat-template off'}."
                )
        return text


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are put.

    tokenizer  the base's
    template   text around every prompt, {prompt} standing for it
    chat       the chat template, if prompts are put into one
    every      whether all prompts are, or those alone that their pairs call chat
    """

    tokenizer: Any
    template: str = PLAIN
    chat: Chat | None = None
    every: bool = False

    def ids(self, prompt: str, chat: bool = False) -> list[int]:
        """Token ids of a prompt; `chat`: its pair says that it is a message of a chat. Raises as `Chat.render`."""
        return prompt_ids(self.tokenizer, self.text(prompt, chat))

    def text(self, prompt: str, chat: bool = False) -> str:
        """What is tokenised."""
        text = self.template.replace("{prompt}", prompt)
        return self.chat.render(text) if self.chat is not None and (self.every or chat) else text

    @property
    def style(self) -> PromptStyle | None:
        """For the score file; None: prompts as they are."""
        if self.chat is None:
            return None if self.template == PLAIN else PromptStyle(self.template)
        digest = hashlib.sha256(self.chat.template.encode()).hexdigest()
        return PromptStyle(self.template, digest, self.chat.owner, self.chat.system)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with what the tokenizer puts before one once, and without what it puts after one.

    Empty if the text has no token of its own.
    """
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    if not own:
        return []
    if bos is None or own[0] != bos:
        start = next((i for i in range(len(whole) - len(own) + 1) if whole[i : i + len(own)] == own), None)
        if start is None:  # a tokenizer whose special tokens change the others: its word is final
            return whole
        return own if own[:start] == whole[:start] else whole[: start + len(own)]
    while own[1:2] == [bos]:
        own.pop(0)
    return own


def prompt_format_of(
    job: ScoringJob, base: Checkpoint, expert: Checkpoint, tokenizer: Any, tasks: Iterable[TaskPairs]
) -> PromptFormat:
    """The prompt_format that a job asks for; what the user should know of it is logged, a line each.

    `auto` puts the prompts whose pairs say `chat` into the chat template, if a tokenizer has one and the job has no
    text template of its own. Raises `BadInput` for a template or a system prompt that cannot be had.
    """
    pairs = [pair for task in tasks for pair in (*task.extraction, *task.scoring)]
    prompt_format = _choose(job, base, expert, tokenizer, pairs)
    _tell_special_tokens(prompt_format, base.name, pairs)
    return prompt_format


def _choose(
    job: ScoringJob, base: Checkpoint, expert: Checkpoint, tokenizer: Any, pairs: Sequence[Pair]
) -> PromptFormat:
    owners = _owners(job, base, expert, tokenizer) if job.chat_template != "off" else []
    if job.chat_template == "auto":
        said = [pair for pair in pairs if pair.chat]
        if not (owners and said and job.template == PLAIN):
            _plain(job, owners, said)
            return PromptFormat(tokenizer, job.template)
        if len(said) < len(pairs):
            LOG.warning(
                "%d of %d prompts are not marked as chat and stay plain text.", len(pairs) - len(said), len(pairs)
            )
    elif job.chat_template == "off":
        if job.system is not None:
            raise BadInput(_NO_CHAT)
        return PromptFormat(tokenizer, job.template)
    chat = pick_chat(str(job.chat_template), owners, f"{job.expert} and {job.base}", job.system)
    prompt_format = PromptFormat(tokenizer, job.template, chat, every=job.chat_template != "auto")
    LOG.info(
        "Prompts in the chat template of %s%s.", chat.owner, "" if job.system is None else ", with a system prompt"
    )
    _check_special_tokens(chat, tokenizer, base.name, [pair for pair in pairs if prompt_format.every or pair.chat])
    return prompt_format


def alone(name: str, tokenizer: Any, asked: str, system: str | None) -> PromptFormat:
    """That of one model by itself; `asked`: on, off or the name of a template. Raises as `prompt_format_of`."""
    if asked == "off":
        if system is not None:
            raise BadInput(_NO_CHAT)
        return PromptFormat(tokenizer)
    owners = [(name, tokenizer)] if getattr(tokenizer, "chat_template", None) else []
    return PromptFormat(tokenizer, chat=pick_chat(asked, owners, name, system), every=True)


def pick_chat(asked: str, owners: Sequence[tuple[str, Any]], where: str, system: str | None = None) -> Chat:
    """The chat template `asked` (a name; auto and on: the default one) of the first of `owners` (name, tokenizer).

    Raises `BadInput` where nobody has it.
    """
    if not owners:
        raise BadInput(f"chat_template: the tokenizers of {where} have none; use --chat-template off, or --template.")
    name = "default" if asked in ("auto", "on") else asked
    known: list[str] = []
    for owner, tokenizer in owners:
        found = tokenizer.chat_template
        named = found if isinstance(found, dict) else {"default": found}
        if name in named:
            return Chat(owner, tokenizer, named[name], system)
        known += [f"{each} ({owner})" for each in named]
    raise BadInput(f"chat_template: there is no template {name!r}; there are {', '.join(known)}.")


def _plain(job: ScoringJob, owners: Sequence[tuple[str, Any]], said: Sequence[Pair]) -> None:
    if job.system is not None:
        why = "no tokenizer has a chat template" if not owners else "these prompts are put as plain text"
        raise BadInput(f"system: a system prompt is part of a chat, and {why}; use it with --chat-template on.")
    if owners:
        LOG.warning(
            "%s has a chat template, but prompts are scored as plain text; --chat-template on puts them into it, off "
            "says that plain text is meant.",
            owners[0][0],
        )
    elif said:
        LOG.info("No tokenizer has a chat template: prompts are plain text.")


def _owners(job: ScoringJob, base: Checkpoint, expert: Checkpoint, tokenizer: Any) -> list[tuple[str, Any]]:
    """Who has a chat template, (name, tokenizer): the adapter or the expert first, then the base."""
    # A model in memory may be called `base+lora` though its folder is its own.
    lora = None if isinstance(expert, LiveModel) else read_reference(job.expert).lora
    folder = local_folder(lora) if lora else expert.folder
    found = [(job.expert, _own_tokenizer(folder, job.trust_remote_code))]
    found.append((base.name, tokenizer))
    return [(name, each) for name, each in found if getattr(each, "chat_template", None)]


def _own_tokenizer(folder: Path, remote_code: bool) -> Any:
    """The tokenizer of a folder; None where there is none that loads, since the base's gives the ids."""
    try:
        return tokenizer_in(folder, remote_code)
    except BadInput as error:
        LOG.warning("%s Its chat template is not used.", error.message)
        return None


def _tell_special_tokens(prompt_format: PromptFormat, base: str, pairs: Sequence[Pair]) -> None:
    """Say what differs from what the tokenizer makes of a text by itself."""
    tokenizer, text = prompt_format.tokenizer, prompt_format.text(pairs[0].prompt, pairs[0].chat)
    used, whole = prompt_ids(tokenizer, text), list(tokenizer(text)["input_ids"])
    last = tokenizer(text, add_special_tokens=False)["input_ids"][-1:]
    if used != whole and used[-1:] != whole[-1:]:
        LOG.info(
            "The tokenizer of %s ends a text with %s, which is left out: scores are read at the prompt's own last "
            "token.",
            base, tokenizer.convert_ids_to_tokens(whole[-1]),
        )  # fmt: skip
    elif used != whole:
        LOG.info("Prompts begin with %s themselves; a second is not added.", tokenizer.convert_ids_to_tokens(used[0]))
    elif used[-1:] != last:
        LOG.warning(
            "The tokenizer of %s ends every prompt with %s, and cannot be asked not to: scores are read there.",
            base, tokenizer.convert_ids_to_tokens(used[-1]),
        )  # fmt: skip


def _check_special_tokens(chat: Chat, tokenizer: Any, base: str, pairs: Sequence[Pair]) -> None:
    """Warn of special tokens in the template that the base's tokenizer would cut up, or give another id."""
    if chat.tokenizer is tokenizer or not pairs:
        return
    text, ours, theirs = chat.render(pairs[0].prompt), tokenizer.get_vocab(), chat.tokenizer.get_vocab()
    special = sorted(token for token in chat.tokenizer.get_added_vocab() if token in text)
    if odd := [token for token in special if ours.get(token) != theirs[token]]:
        LOG.warning(
            "The chat template of %s writes %s, which the tokenizer of %s does not have as the same token: the prompts "
            "are not those that the expert was trained on.",
            chat.owner, ", ".join(odd), base,
        )  # fmt: skip
