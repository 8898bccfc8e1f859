"""How prompts become tokens: special tokens, chat templates, system prompts; and that scores are of these tokens."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_commands import refused, run
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mergekit_wp.calibrate import main as aim
from mergekit_wp.scores import ScoreMeta, read_scores
from mergekit_wp.scoring.prompt_format import PromptFormat, alone, prompt_ids

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}w80 {{ m.content }} w81 "
    "{% else %}w90 {{ m.content }} w91 {% endif %}{% endfor %}{% if add_generation_prompt %}w92{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


def tok(before=("<s>",), after=(), chat_template=None, bos="<s>", extra=()):
    """tiny's words, with special tokens put around a text by the tokenizer itself."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *tiny.WORDS, *extra])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = " ".join([*before, "$A", *after])
    ids = [(token, vocabulary[token]) for token in {*before, *after}]
    core.post_processor = processors.TemplateProcessing(single=around, pair=around + " $B", special_tokens=ids)
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token=bos, eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = chat_template
    return found


@pytest.mark.parametrize(
    ("tokenizer", "text", "wanted"),
    [
        (tok(), "w1 w2", [1, 5, 6]),
        (tok(), "<s> w1 w2", [1, 5, 6]),
        (tok(), "<s> <s> w1", [1, 5]),
        (tok(), "w1 <s> w2", [1, 5, 1, 6]),  # further in, it is the user's own
        (tok(after=["</s>"]), "w1 w2", [1, 5, 6]),
        (tok(after=["</s>"]), "<s> w1 w2", [1, 5, 6]),
        (tok(after=["</s>"]), "w1 </s>", [1, 5, 2]),  # written by the user, not by the tokenizer
        (tok(before=[]), "w1", [5]),
        (tok(before=[]), "<s> w1", [1, 5]),
        (tok(before=[], after=["</s>"]), "w1", [5]),
        (tok(before=["<pad>", "<unk>"], after=["</s>"], bos=None), "w1", [0, 3, 5]),  # [CLS] and the like
        (tok(before=["<pad>", "<unk>"], bos=None), "<pad> <unk> w1", [0, 3, 5]),
        (tok(), "", []),
    ],
    ids=str,
)
def test_special_tokens_before_once_and_none_after(tokenizer, text, wanted):
    assert prompt_ids(tokenizer, text) == wanted


@given(st.lists(st.sampled_from([*tiny.WORDS[:5], "<s>"]), min_size=1, max_size=6), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_one_bos_and_the_own_tokens_in_order(words, bos, eos):
    """Law: all tokens of the text, in order, after one BOS (if there is any), whatever the tokenizer adds."""
    tokenizer = tok(["<s>"] if bos else [], ["</s>"] if eos else [])
    ids = prompt_ids(tokenizer, " ".join(words))
    own = tokenizer.convert_tokens_to_ids(words)
    while own and own[0] == 1:
        own.pop(0)
    begins = bos or words[0] == "<s>"
    assert ids == [1] * begins + own


@pytest.mark.parametrize("text", ["w1 w2", "<s> w1 w2"])
@pytest.mark.parametrize("before", [["<s>"], []])
def test_what_lm_eval_sends_for_the_same_text(tmp_path, text, before):
    from lm_eval.models.huggingface import HFLM

    folder = tiny.save(tiny.random_model("llama"), tmp_path / "m")
    tok(before).save_pretrained(folder)
    lm = HFLM(AutoModelForCausalLM.from_pretrained(folder), tokenizer=tok(before), device="cpu")
    assert prompt_ids(tok(before), text) == lm.tok_encode(text) == lm.tok_batch_encode([text])[0][0].tolist()


def test_chat_is_the_template_written_out():
    tokenizer = tok(chat_template=CHAT)
    wording = alone("m", tokenizer, "on", "w7")
    turns = [{"role": "system", "content": "w7"}, {"role": "user", "content": "w1 w2"}]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert (
        wording.ids("w1 w2")
        == wanted
        == tokenizer.convert_tokens_to_ids(["<s>", "w80", "w7", "w81", "w90", "w1", "w2", "w91", "w92"])
    )
    assert PromptFormat(tokenizer, "w3 {prompt}", wording.chat).ids("w1", chat=False) == [1, 7, 5]
    assert PromptFormat(tokenizer, "w3 {prompt}", wording.chat).text("w1", chat=True).endswith("w90 w3 w1 w91 w92")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair whose expert alone may have a chat template."""
    root = tmp_path_factory.mktemp("pair")
    tiny.save_pair(root, "llama")
    return root


def world(pair, chat=None, base_chat=None, mark=None, extra=()):
    """Write the tokenizers and the pairs; `mark`: what the pairs say of chat."""
    for name, template, added in (("expert", chat, extra), ("base", base_chat, ())):
        (pair / name / "chat_template.jinja").unlink(missing_ok=True)
        shutil.rmtree(pair / name / "additional_chat_templates", ignore_errors=True)
        tok(chat_template=template, extra=added).save_pretrained(pair / name)
    marked = {} if mark is None else {"chat": mark}
    rows = [{"task": "t", "prompt": f"w{i} w{i + 1} w5", "contrast": f"w{i} w{i + 1}", **marked} for i in range(4)]
    (pair / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return pair


@torch.no_grad()
def gap(pair, words):
    """Mean KL(expert || base) of the next token after w{i} w{i+1} w5 put as `words` says, by transformers alone."""
    base, expert = (AutoModelForCausalLM.from_pretrained(pair / name) for name in ("base", "expert"))
    found = []
    for i in range(4):
        text = words.format(f"w{i} w{i + 1} w5").split()
        ids = torch.tensor([tok().convert_tokens_to_ids(text)])
        p, q = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (expert, base))
        found.append(float((p.exp() * (p - q)).sum()))
    return sum(found) / 4


PLAINLY, CHATTING, SYSTEM = "<s> {}", "<s> w90 {} w91 w92", "<s> w80 w7 w81 w90 {} w91 w92"
WARNED = "scored as plain text"
NAMED = {"default": CHAT, "other": CHAT.replace("w92", "w91")}


@pytest.mark.parametrize(
    ("made", "flags", "words", "said"),
    [
        ({}, {}, PLAINLY, None),
        ({"chat": CHAT}, {}, PLAINLY, WARNED),  # pairs that do not say
        ({"chat": CHAT}, {"chat_template": "off"}, PLAINLY, None),
        ({"chat": CHAT}, {"chat_template": "on"}, CHATTING, "template of"),
        ({"chat": CHAT, "mark": True}, {}, CHATTING, "template of"),
        ({"chat": CHAT, "mark": False}, {}, PLAINLY, WARNED),
        ({"base_chat": CHAT, "mark": True}, {}, CHATTING, "template of"),
        ({"chat": CHAT, "base_chat": CHAT.replace("w90", "w91"), "mark": True}, {}, CHATTING, "template of"),
        ({"mark": True}, {}, PLAINLY, "No tokenizer has"),
        ({"chat": CHAT, "mark": True}, {"system": "w7"}, SYSTEM, "system prompt"),
        ({"chat": CHAT, "mark": True}, {"template": "<s> w3 {prompt}"}, "<s> w3 {}", WARNED),
        ({"chat": CHAT}, {"template": "w3 {prompt}", "chat_template": "on"}, "<s> w90 w3 {} w91 w92", "template of"),
        ({"chat": NAMED}, {"chat_template": "other"}, "<s> w90 {} w91 w91", "template of"),
        ({"chat": NAMED}, {"chat_template": "on"}, CHATTING, "template of"),
        ({"chat": CHAT.replace("w90", "w90 <new>"), "extra": ["<new>"]}, {"chat_template": "on"},
         "<s> w90 <unk> {} w91 w92", "template of"),
    ],
    ids=str,
)  # fmt: skip
def test_the_gap_is_that_of_these_tokens(pair, made, flags, words, said):
    result, path = run(world(pair, **made), split="shared", layers="3", **flags)
    assert result.exit_code == 0, result.output
    scores = read_scores(path)
    assert scores.meta.tasks["t"].utilities["kl"].mean_gap == pytest.approx(gap(pair, words), rel=1e-3)
    assert said is None or said in result.output
    assert (WARNED in result.output) == (said == WARNED)
    style = scores.meta.prompts
    assert (style is not None and style.chat_template is not None) == (words not in (PLAINLY, "<s> w3 {}"))
    if style is not None and style.chat_template:
        assert (style.template, style.system) == (flags.get("template", "{prompt}"), flags.get("system"))
        assert style.chat_owner == str(pair / ("expert" if "chat" in made else "base"))
    if style is None:  # a program before chat templates reads this file
        assert "prompts" not in json.loads(scores.meta.to_json())
    assert ScoreMeta.from_json(scores.meta.to_json()) == scores.meta


@pytest.mark.parametrize(
    ("made", "flags", "said"),
    [
        ({}, {"chat_template": "on"}, ["chat_template", "have none", "--chat-template off"]),
        ({"chat": CHAT}, {"chat_template": "rag"}, ["no template 'rag'", "default"]),
        ({"chat": {"rag": CHAT}}, {"chat_template": "on"}, ["no template 'default'", "rag"]),
        ({"chat": NO_SYSTEM}, {"chat_template": "on", "system": "w7"}, ["no system role", "leave out --system"]),
        ({"chat": "{{ bos_token }}{{ messages[-1].content }}"}, {"chat_template": "on", "system": "w7"},
         ["leaves out the system prompt"]),
        ({"chat": "{{ nothing.there }}"}, {"chat_template": "on"}, ["expert", "chat template fails"]),
        ({"chat": "{% if %}"}, {"chat_template": "on"}, ["expert", "chat template fails"]),
        ({"chat": "w1 w2"}, {"chat_template": "on"}, ["leaves out the prompt"]),
        ({"chat": CHAT}, {"system": "w7"}, ["system", "--chat-template on"]),
        ({"chat": CHAT}, {"system": "w7", "chat_template": "off"}, ["system", "--chat-template on"]),
        ({"chat": CHAT}, {"system": " ", "chat_template": "on"}, ["system", "expected text"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_had(pair, made, flags, said):
    refused(*run(world(pair, **made), out="refused.safetensors", **flags), *said)


def test_tokens_that_the_base_lacks_are_named(pair):
    expert = tok(chat_template=CHAT.replace("w90", "<new>"))
    world(pair)
    expert.add_special_tokens({"additional_special_tokens": ["<new>"]})
    expert.save_pretrained(pair / "expert")
    result, _path = run(pair, chat_template="on", split="shared", layers="3")
    assert result.exit_code == 0, result.output
    assert "writes <new>, which the tokenizer of" in result.output


@pytest.mark.parametrize(
    ("tokenizer", "flags", "said"),
    [
        (tok(after=["</s>"]), {}, "ends a text with </s>, which is left out"),
        (tok(), {"template": "<s> {prompt}"}, "begin with <s> themselves"),
    ],
    ids=["eos", "bos"],
)
def test_special_tokens_left_out_are_told(pair, tokenizer, flags, said):
    world(pair)
    tokenizer.save_pretrained(pair / "base")
    result, path = run(pair, split="shared", layers="3", **flags)
    assert said in result.output
    got = read_scores(path).meta.tasks["t"].utilities["kl"].mean_gap
    assert got == pytest.approx(gap(pair, PLAINLY), rel=1e-3)


def test_yaml_on_and_off_are_words(pair):
    world(pair, chat=CHAT)
    (pair / "job.yaml").write_text("chat_template: on\nsplit: shared\nlayers: '3'\n")
    result, path = run(pair, pair / "job.yaml")
    assert result.exit_code == 0, result.output
    assert read_scores(path).meta.prompts.chat_template is not None


def test_built_in_sets_are_messages_and_files_say_so():
    from mergekit_wp.scoring.pairs import load_pairs

    for name in ("instructions", "maths", "code"):
        assert all(each.chat for each in load_pairs(f"builtin:{name}", 2, 0))


def test_a_chat_that_is_no_boolean_is_refused(pair):
    world(pair, mark="yes")
    refused(*run(pair, out="refused.safetensors"), "line 1", "chat", "true or false")


def test_calibration_takes_documents_as_messages(pair):
    """Against the blocks of the same texts written out by hand."""
    from click.testing import CliRunner

    from mergekit_wp.merge.activations import read_activations

    world(pair, base_chat=CHAT)
    (pair / "texts.txt").write_text("w1 w2\n\nw3")
    (pair / "written.txt").write_text("<s> w90 w1 w2 w91 w92\n\n<s> w90 w3 w91 w92")

    def means(texts, out, *more):
        made = ["--texts", str(pair / texts), "--out", str(pair / out), "--tokens", "6", "--device", "cpu", *more]
        result = CliRunner().invoke(aim, [str(pair / "base"), *made])
        assert result.exit_code == 0, result.output
        return read_activations(pair / out).means

    got = means("texts.txt", "a.safetensors", "--chat-template", "on")
    for name, wanted in means("written.txt", "b.safetensors").items():
        torch.testing.assert_close(got[name], wanted)
