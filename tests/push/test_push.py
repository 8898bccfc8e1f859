"""wp-push: the gate, the card, the licences, names that stay private, and the command from end to end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from loopback_hub import Fault, LoopbackHub
from merge_world import merge as stock_merge
from push_world import REPO, TOKEN, build, front_matter, licence, merge, wp_push, write_results

from mergekit_wp.errors import BadInput
from mergekit_wp.eval.suite import read_suite
from mergekit_wp.merge.certificate import CERTIFICATE, read_certificate
from mergekit_wp.push.publish import Request, prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build(tmp_path_factory.mktemp("push"))


@pytest.fixture
def world(made, tmp_path):
    """A copy: every test may break something. The recipe is rewritten, since its paths are absolute."""
    root = tmp_path / "w"
    shutil.copytree(made.root, root)
    old, made_here = str(made.root), type(made)(root, made.kind, made.experts)
    for recipe in (root / "recipe.yaml", root / "out" / "mergekit_config.yml"):
        recipe.write_text(recipe.read_text().replace(old, str(root)))
    # The certificate vouches for the recipe too.
    certificate = yaml.safe_load((root / "out" / CERTIFICATE).read_text())
    certificate["files"]["mergekit_config.yml"] = sha(root / "out" / "mergekit_config.yml")
    (root / "out" / CERTIFICATE).write_text(yaml.safe_dump(certificate))
    return made_here


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        hub.add_user("alice", TOKEN)
        yield hub
        assert not hub.troubles


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dry(world, say=lambda line: None, **more):
    return prepare(Request(world.root / "out", REPO, **more), None, say)


def stage(world) -> Path:
    return world.root / "out.push"


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha(path) for path in folder.rglob("*") if path.is_file()}


def fingerprint(world) -> str:
    from mergekit_wp.push.evaluation import model_fingerprint

    return model_fingerprint(world.root / "out")


# ---------------------------------------------------------------------- the certificate and the gate


def test_the_mark_of_wp_merge_knows_every_file_and_no_path(world):
    certificate = read_certificate(world.root / "out" / CERTIFICATE)
    files = {p.name: sha(p) for p in (world.root / "out").iterdir() if p.name not in (CERTIFICATE, "README.md")}
    assert certificate.files == files
    assert [scores.name for scores in certificate.scores] == [world.score(k).name for k in range(2)]
    assert certificate.shares["experts"] == ["e0", "e1"]
    assert any("recomputed" in line for line in certificate.checked)
    assert "/" not in (world.root / "out" / CERTIFICATE).read_text().replace("n/a", "")


def test_shares_of_the_mark_are_those_of_the_score_files(world):
    from mergekit_wp.merge.shares import layer_shares

    certificate = read_certificate(world.root / "out" / CERTIFICATE)
    paths = [str(world.score(k)) for k in range(2)]
    for layer in range(4):
        for kind, alpha_Kn in zip(("heads", "neurons"), layer_shares(paths, layer), strict=True):
            got = [certificate.shares[kind][k][layer] for k in range(2)]
            assert got == pytest.approx(alpha_Kn.mean(-1).tolist(), abs=1e-4)


def test_no_audit_leaves_no_mark_and_the_push_audits(world):
    merge(world, world.recipe(), "plain", "--no-audit")
    out = world.root / "plain"
    assert not (out / CERTIFICATE).exists()
    said = []
    before = tree(out)
    prepare(Request(out, REPO), None, said.append)
    assert any("auditing it now" in line for line in said)
    assert any("recomputed from the inputs" in line for line in said)
    assert tree(out) == before, "the model's folder is left alone"
    said.clear()
    prepare(Request(out, REPO), None, said.append)
    assert not any("auditing" in line for line in said), "audited once, as long as nothing changes"


def test_a_stock_merge_that_does_not_fit_its_recipe_is_refused(world):
    out = stock_merge(world, out="stock")
    (out / "mergekit_config.yml").write_text(world.recipe().read_text())
    from safetensors.torch import load_file, save_file

    shard = next(out.glob("*.safetensors"))
    tensors = {name: tensor + 0.1 for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="did not pass the audit"):
        prepare(Request(out, REPO), None, print)


@pytest.mark.parametrize("what", ["changed", "new", "gone"])
def test_a_folder_that_changed_since_its_audit(world, what):
    out = world.root / "out"
    if what == "changed":
        config = out / "generation_config.json"
        config.write_text(config.read_text() + " ") if config.exists() else (out / "config.json").write_text(
            (out / "config.json").read_text() + " "
        )
    elif what == "new":
        (out / "added_tokens.json").write_text("{}")
    else:
        (out / "tokenizer_config.json").unlink()
    shutil.rmtree(world.expert(1))  # so that it cannot be audited again
    with pytest.raises(BadInput, match=r"not published, since .*json.* it cannot be audited now without .*e1"):
        dry(world, licence="mit")


def test_one_changed_byte_of_a_weight_is_seen_even_with_its_time_set_back(world):
    shard = next((world.root / "out").glob("*.safetensors"))
    dry(world)  # digests are remembered now
    stat = shard.stat()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    shutil.rmtree(world.expert(0))
    with pytest.raises(BadInput, match=f"{shard.name} has changed since it was audited"):
        dry(world, licence="mit")


def test_scores_that_changed_since_the_merge(world):
    from merge_world import write_random_scores

    write_random_scores(world.score(0), str(world.base), str(world.expert(0)), seed=99)
    with pytest.raises(BadInput, match=r"e0.scores.safetensors: the merge was made with other numbers"):
        dry(world)
    world.score(0).unlink()
    with pytest.raises(BadInput, match="the recipe names this file"):
        dry(world)


# ---------------------------------------------------------------------- the card


def test_the_card(world):
    # Measured in another folder than it is pushed from: what counts is the fingerprint.
    results = write_results(world.root / "eval", fingerprint(world), Path("merged/im"), str(world.base))
    given = [f"{world.base}=meta/base-1b", "e0=bob/maths"]
    publication = dry(world, results=[results], parents=given)
    card = publication.card.read_text()
    data = front_matter(card)
    (index,) = data.pop("model-index")
    assert index["name"] == "merge"
    assert [(r["dataset"]["name"], r["dataset"]["type"], r["metrics"][0]["value"]) for r in index["results"]] == [
        ("Maths", "maths", 0.75),
        ("Code", "code", 0.75),
    ]
    assert {r["metrics"][0]["type"] for r in index["results"]} == {"acc"}
    assert index["results"][0]["source"]["url"] == f"https://huggingface.co/{REPO}/blob/main/wp/results/mine.json"
    assert data == {
        "base_model": ["meta/base-1b", "bob/maths"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "weight-patching"],
    }
    assert str(world.root) not in card
    assert "`e1` (not on the Hub)" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["base_model"] == "meta/base-1b"
    assert [m["model"] for m in recipe["models"]] == ["bob/maths", "e1"]
    scores = [m["parameters"]["scores"] for m in recipe["models"]]
    assert all((stage(world) / path).is_file() for path in scores)
    assert "| bob/maths | t (1) | attr | anchor | 1 of 4 |" in card
    assert "![Mean share" in card
    assert (stage(world) / "wp/shares.png").read_bytes().startswith(b"\x89PNG")
    assert "| **75.00**" in card
    assert "(+50.00)" in card
    assert (
        "This model is the row `wp`. How it was done: lm-eval 0.4.13; torch 2.13.0; dtype float32; device cpu" in card
    )
    command = f"wp-eval wp/eval/mine.yaml base=meta/base-1b wp={REPO} --baseline base --out runs/eval"
    assert f"$ {command}\n" in card
    assert json.loads((stage(world) / "wp/results/mine.json").read_text())["command"] == command.split()
    assert [task.column for task in read_suite(stage(world) / "wp/eval/mine.yaml").tasks] == ["Maths", "Code"]
    assert f'from_pretrained("{REPO}"' in card
    assert "licences/meta--base-1b/NOTICE.txt" in card
    paths = {item.path for item in publication.items}
    assert {"wp/results/mine.json", "licences/meta--base-1b/NOTICE.txt", "mergekit_config.yml", CERTIFICATE} <= paths


def test_every_column_of_a_task_has_an_entry_of_its_own(world):
    """huggingface_hub groups by the data set and its config: one entry had the shots of the first."""
    from mergekit_wp.push.card import Card, CardResults
    from mergekit_wp.push.evaluation import Figure
    from mergekit_wp.push.licences import Terms

    tables = {
        "wp/results/a.json": [Figure("GSM8K", "gsm8k", "em", 0.1, 0), Figure("GSM8K 8", "gsm8k", "em", 0.2, 8)],
        "wp/results/b.json": [Figure("GSM8K", "gsm8k", "em", 0.3, 4), Figure("MMLU", "mmlu", "acc", 0.4, 5)],
    }
    results = [CardResults("", "wp", "", "", path, figures) for path, figures in tables.items()]
    certificate = read_certificate(world.root / "out" / CERTIFICATE)
    card = Card(REPO, (), (), Terms("mit"), "", certificate, "float32", results=results)
    (index,) = front_matter(card.text())["model-index"]
    assert [
        (r["dataset"].get("config"), r["dataset"]["args"]["num_few_shot"], [m["value"] for m in r["metrics"]])
        for r in index["results"]
    ] == [
        ("GSM8K (wp/results/a.json)", 0, [0.1]),
        ("GSM8K 8", 8, [0.2]),
        ("GSM8K (wp/results/b.json)", 4, [0.3]),
        (None, 5, [0.4]),
    ]


def test_a_model_with_code_of_its_own_is_known_without_running_it(world, tmp_path):
    from mergekit_wp.eval.models import open_model
    from mergekit_wp.push.evaluation import model_fingerprint

    folder = shutil.copytree(world.base, tmp_path / "own")
    own = open_model("own", str(folder), False).fingerprint
    assert model_fingerprint(folder) == own
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "acme", "auto_map": {"AutoConfig": "configuration_acme.AcmeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_acme.py").write_text("raise SystemExit('it was run')\n")
    assert model_fingerprint(folder) != own


def test_metadata_of_other_programs_stays_with_a_score_file(world):
    """`format: pt`, which many tools write, is no JSON."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = world.score(0)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    note = f"{world.root}/notes/x"
    save_file(load_file(path), path, metadata={**metadata, "format": "pt", "note": note})
    (item,) = [item for item in dry(world).items if item.path.startswith("wp/scores/e0")]
    with safe_open(item.source, framework="pt") as file:
        public = file.metadata()
    assert (public["format"], public["note"]) == ("pt", "x")
    assert json.loads(public["wp"])["expert"]["name"] == "e0"
    save_file(load_file(path), path, metadata={**metadata, "wp": "{"})
    with pytest.raises(
        BadInput, match=r"e0\.scores\.safetensors: its metadata is not the JSON that this package writes"
    ):
        dry(world)


def test_nothing_published_names_a_folder_of_this_machine(made, world, monkeypatch):
    monkeypatch.setenv("HOME", str(world.root))
    results = write_results(world.root / "eval", fingerprint(world), world.root / "out")
    for item in dry(world, results=[results]).items:
        content = item.source.read_bytes()
        for folder in (world.root, made.root):  # the score files know the parents where they were made
            assert str(folder).encode() not in content, item.path
        assert b"/home/bob" not in content, item.path


LOCAL = {
    "name_or_path": "/srv/clients/acme/llama",
    "_name_or_path": "../acme/llama",
    "tokenizer_file": "C:\\Users\\bob\\acme\\tokenizer.json",
    "cache": "/srv/clients/acme/cache dir/x",
    "auto_map": {"AutoConfig": "/srv/clients/acme/llama--configuration_x.XConfig", "AutoModel": "u/m--x.X"},
    "processor": ["file:///home/bob/acme/p.json"],
}


def test_no_json_of_the_model_names_a_folder_of_a_machine(world):
    """Fields of older transformers (PR #21483 took name_or_path out) and of whoever saved the parents."""
    base = world.base / "tokenizer_config.json"
    kept = {
        "bos_token": "/s/x",
        "chat_template": "/a/b/{{ messages }}",
        "x_content": "/usr/lib",
        "url": "https://a.b/c/d",
    }
    base.write_text(json.dumps({**json.loads(base.read_text()), **LOCAL, **kept}))
    out = merge(world, world.recipe(), "local")
    file = out / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), **LOCAL, **kept}
    file.write_text(json.dumps(content))  # whatever mergekit makes of it
    tokenizer, before = out / "tokenizer.json", tree(out)
    said: list[str] = []
    publication = prepare(Request(out, REPO, licence="mit"), None, said.append)
    assert tree(out) == before
    source = {item.path: item.source for item in publication.items}
    published = json.loads(source["tokenizer_config.json"].read_text())
    for word in ("acme", "clients", "bob", "srv"):
        assert word not in json.dumps(published)
    assert {name: published[name] for name in kept} == kept
    assert published["auto_map"] == {"AutoConfig": "configuration_x.XConfig", "AutoModel": "u/m--x.X"}
    assert published["name_or_path"] == "llama"
    assert set(published) == set(content)
    assert source["tokenizer.json"] == tokenizer
    assert any("published without the folders" in line and "tokenizer_config.json" in line for line in said)
    assert read_certificate(source[CERTIFICATE]).files["tokenizer_config.json"] == sha(source["tokenizer_config.json"])
    assert "`tokenizer_config.json` as published" in publication.card.read_text()


def test_a_path_within_a_text_is_pointed_out(world):
    file = world.root / "out" / "generation_config.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, "note": "made from /srv/clients/acme/llama, see https://a.b/c/d"}))
    said: list[str] = []
    dry(world, said.append)
    (note,) = [line for line in said if "generation_config.json names" in line]
    assert "the folder /srv/clients/acme/llama of a machine" in note


@pytest.mark.parametrize("whose", ["model", "parent"])
def test_a_link_that_leaves_its_folder_is_not_published(world, tmp_path, whose):
    secret = tmp_path / "secret.txt"
    secret.write_text("diary")
    folder = world.root / "out" if whose == "model" else world.expert(0)
    (folder / "LICENSE.txt").symlink_to(secret)
    with pytest.raises(BadInput, match=r"LICENSE\.txt: a link to .*secret\.txt, outside of its folder"):
        dry(world)
    assert not any("diary" in path.read_text(errors="replace") for path in stage(world).rglob("*") if path.is_file())
    (folder / "LICENSE.txt").unlink()
    (folder / "LICENSE.txt").hardlink_to(secret)  # a file like any other
    dry(world)
    (folder / "LICENSE.txt").unlink()
    (folder / "terms").mkdir()
    (folder / "terms" / "text").write_text("terms")
    (folder / "LICENSE.txt").symlink_to(folder / "terms" / "text")
    dry(world)


def test_links_of_a_snapshot_in_the_hubs_cache_are_its_own(tmp_path):
    from mergekit_wp.files import inside

    cache = tmp_path / "models--meta--one"
    snapshot, blob = cache / "snapshots" / ("a" * 40), cache / "blobs" / ("b" * 64)
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("terms")
    (snapshot / "LICENSE").symlink_to(f"../../blobs/{blob.name}")
    assert inside(snapshot, snapshot / "LICENSE").read_text() == "terms"
    (snapshot / "NOTICE").symlink_to("../../../other")
    with pytest.raises(BadInput, match="outside of its folder"):
        inside(snapshot, snapshot / "NOTICE")


def test_what_is_sent_is_what_was_checked(world):
    from mergekit_wp.push.upload import _content

    (world.root / "out" / "LICENSE").write_text("as checked")
    (item,) = [item for item in dry(world).items if item.path == "LICENSE"]
    assert _content(item) == b"as checked"
    item.source.write_text("another one")
    with pytest.raises(BadInput, match="LICENSE: changed after it was checked"):
        _content(item)


def test_published_recipe_makes_the_same_merge_again(world, monkeypatch):
    """In a copy of the repository, with the parents under the names of their folders."""
    dry(world)
    copy = world.root / "copy"
    shutil.copytree(stage(world), copy)
    for name in ("base", "e0", "e1"):
        (copy / name).symlink_to(world.root / name)
    monkeypatch.chdir(copy)
    again = merge(world, copy / "mergekit_config.yml", "again")
    for path in (world.root / "out").glob("*.safetensors"):
        assert sha(path) == sha(again / path.name)


def test_the_published_mark_fits_the_published_files(world):
    publication = dry(world)
    source = {item.path: item.source for item in publication.items}
    certificate = read_certificate(source[CERTIFICATE])
    assert "model.safetensors.index.json" in certificate.files or "model.safetensors" in certificate.files
    for name, digest in certificate.files.items():
        assert sha(source[name]) == digest
    from mergekit_wp.merge.certificate import certified_scores

    staged = {certified_scores(path) for name, path in source.items() if name.startswith("wp/scores/")}
    assert staged == set(certificate.scores)


def test_a_push_prepared_twice_is_the_same_to_the_byte(world):
    first = {item.path: item.sha256 for item in dry(world).items}
    assert {item.path: item.sha256 for item in dry(world).items} == first


@pytest.mark.parametrize(
    "name", ["../../../victim/precious", "/etc/x", "a\nb", "x\x1b[2J", "n" * 300, "\0", "..", "CON"]
)
def test_the_name_of_a_suite_is_no_path(world, name):
    results = write_results(world.root / "eval", fingerprint(world), world.root / "out")
    content = json.loads((results / "results.json").read_text())
    content["suite_content"]["name"] = name
    (results / "results.json").write_text(json.dumps(content))
    before = tree(world.root)
    publication = dry(world, results=[results])
    (path,) = [item.path for item in publication.items if item.path.startswith("wp/results/")]
    assert Path(path).parent == Path("wp/results")
    assert (stage(world) / path).is_file()
    assert all(tree(world.root)[path] == digest for path, digest in before.items())
    assert all(path.startswith("out.push/") for path in set(tree(world.root)) - set(before))


def test_every_table_and_licence_is_a_file_of_its_own(world):
    (world.base / "LICENSE").write_text("one")
    (world.base / "license").write_text("two")
    given = [write_results(world.root / f"eval{k}", fingerprint(world), world.root / "out") for k in range(3)]
    for folder, name in zip(given, ("mine-2", "mine", "Mine"), strict=True):
        content = json.loads((folder / "results.json").read_text())
        content["suite_content"]["name"] = name
        (folder / "results.json").write_text(json.dumps(content))
    paths = [item.path for item in dry(world, results=given).items]
    assert [path for path in paths if path.startswith("wp/results/")] == [
        "wp/results/Mine-3.json", "wp/results/mine-2.json", "wp/results/mine.json",
    ]  # fmt: skip
    texts = [stage(world) / path for path in paths if path.lower().startswith("licences/") and "NOTICE" not in path]
    assert {"one", "two"} <= {path.read_text() for path in texts}
    assert len({path.lower() for path in paths}) == len(paths)


def test_results_of_another_model_are_refused(world):
    results = write_results(world.root / "eval", "1" * 64, world.root / "out")
    with pytest.raises(BadInput, match=r"none of its rows \(base, wp\) was measured on"):
        dry(world, results=[results])


def test_a_merge_without_scores(world):
    models = [{"model": str(world.expert(k)), "parameters": {"weight": 1}} for k in range(2)]
    config = {"merge_method": "linear", "models": models, "tokenizer_source": str(world.expert(0))}
    merge(world, world.recipe(config, "linear.yaml"), "linear")
    publication = prepare(Request(world.root / "linear", REPO), None, lambda line: None)
    card = publication.card.read_text()
    assert "weight-patching" not in front_matter(card)["tags"]
    assert "## Scores" not in card
    assert "wp/" not in "".join(item.path for item in publication.items)


def test_the_card_says_what_was_patched_and_how_prompts_were_put(world):
    from mergekit_wp.push.card import Card
    from mergekit_wp.push.licences import Terms
    from mergekit_wp.scores import PromptStyle, read_scores

    meta = read_scores(world.score(0)).meta
    style = PromptStyle("Q: {prompt}", "a" * 64, "u/`x`", "be | good")
    metas = (meta, replace(meta, method="atp", object="activation", prompts=style))
    certificate = read_certificate(world.root / "out" / CERTIFICATE)
    card = Card(
        REPO, (), (), Terms("mit"), "", certificate, "float32", scores=[("wp/scores/a.safetensors", m) for m in metas]
    )
    (section,) = (part for part in card.text().split("\n## ") if part.startswith("Scores\n"))
    *_, plain, patched, _empty, put = section.strip().split("\n")
    assert f"| {meta.method} |" in plain
    assert "| atp, object activation |" in patched
    assert put == (
        f"How prompts were put: `{meta.expert.name}` as `Q: {{prompt}}`, in the chat template of `` u/`x` `` (SHA-256 "
        "aaaaaaaaaaaa), with the system prompt `be | good`."
    )


def test_an_aim_merge_goes_with_its_activations(world):
    from aim_inputs import recipe, write_random_activations

    path = write_random_activations(world)
    merge(world, world.recipe(recipe(world), "aim.yaml"), "aim")
    publication = prepare(Request(world.root / "aim", REPO), None, lambda line: None)
    card = publication.card.read_text()
    assert "activations: wp/scores/activations.safetensors" in card
    assert str(world.root) not in card
    published = next(item for item in publication.items if item.path == "wp/scores/activations.safetensors")
    assert str(world.root).encode() not in published.source.read_bytes()
    write_random_activations(world, seed=1)
    assert path.is_file()
    with pytest.raises(BadInput, match="was made with other numbers"):
        prepare(Request(world.root / "aim", REPO), None, lambda line: None)


def test_a_set_patch_goes_with_its_scores_its_list_or_its_slices(world):
    from click.testing import CliRunner

    from mergekit_wp.merge.patch_cli import main as wp_patch

    base, expert = str(world.base), str(world.expert(0))
    (world.root / "list.txt").write_text("L0H1 L1N3")
    cut = world.root / "cut.safetensors"
    named = ["--components", str(world.root / "list.txt")]
    for words, kept, said in (
        ([base, expert, *named, "--sparse", "--out", str(cut)], "", ""),
        ([base, expert, str(world.score(0)), "--top", "3"], "scores: wp/scores/e0.scores.safetensors", " of `e0`"),
        ([base, expert, *named], "components: wp/components/list.txt", " of `e0`"),
        ([base, "--apply", str(cut)], "patch: wp/patch/cut.safetensors", " of another model, made"),
    ):
        folder = ["--out", str(world.root / "patched"), "--overwrite"] if kept else []
        done = CliRunner().invoke(wp_patch, [*words, *folder, "--quiet"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        if not kept:
            continue
        publication = prepare(Request(world.root / "patched", REPO), None, lambda line: None)
        card = publication.card.read_text()
        assert kept in card
        assert f"with a set of attention heads and MLP neurons{said}" in card
        (item,) = (item for item in publication.items if item.path == kept.partition(" ")[2])
        assert str(world.root).encode() not in item.source.read_bytes()
    cut.write_bytes(cut.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(BadInput, match="was made with other numbers"):
        prepare(Request(world.root / "patched", REPO), None, lambda line: None)


def test_a_merge_by_a_fit_goes_with_it(world):
    """The card has the weights and the losses as numbers; the recipe and the file name no folder of this machine."""
    from mergekit_wp.fit_file import FittedPrompts, Kept, LossAt, read_fit, write_fit
    from mergekit_wp.push.card import fit_section
    from mergekit_wp.scores import PromptStyle

    fit = read_fit(world.write_fit([1, 0]))
    style = PromptStyle("Q: {prompt}", "a" * 64, str(world.expert(0)))
    curve = tuple(LossAt(n, 0.5 - n / 100, None if n % 2 else 0.5 - n / 125) for n in range(30))
    prompts = (FittedPrompts(12, 4), FittedPrompts(9, 3, style))
    base = PromptStyle("{prompt}", "b" * 64, str(world.root / "base"))
    kept = Kept("neutral.jsonl", FittedPrompts(6, 2, base), 0.4, 0.25)
    about = replace(fit.meta, curve=curve, best_step=17, prompts=prompts, keep=kept)
    fit = type(fit)(about, fit.heads, fit.neurons, fit.rest)
    write_fit(fit, world.fit)
    merge(world, world.recipe(world.fitted(scale=0.9), "fit.yaml"), "fit")
    publication = prepare(Request(world.root / "fit", REPO), None, lambda line: None)
    card = publication.card.read_text()
    assert "# The fit file is beside this recipe" in card
    assert "fit: wp/fit/fit.safetensors" in card
    assert "was learnt from the experts' own answers, without labels" in card
    without = "The `scale` of the recipe multiplies these weights; what is not recovered is without it."
    assert without in card
    assert without not in fit_section("wp/fit/fit.safetensors", fit, scaled=False)
    assert "## Scores" not in card
    assert "Mean weight of each expert" in card
    assert str(world.root) not in card
    for k, name, counted in ((0, "e1", "16 (4)"), (1, "e0", "12 (3)")):
        weights = " | ".join(f"{float(t[k].mean()):.3f}" for t in (fit.heads, fit.neurons, fit.rest))
        assert f"| {name} | {weights} | {counted} | 0.5500 | 0.3000 |" in card
    for step in (0, 3, 17, 29):  # every third, the one that was kept and the last
        held_out = "" if step % 2 else f"{0.5 - step / 125:.4f}"
        assert f"| {step} | {0.5 - step / 100:.4f} | {held_out} |" in card
    assert "| 4 | " not in card
    assert "those of step 17" in card
    assert "`e0` as `Q: {prompt}`, in the chat template of `e0`" in card
    assert (
        "The base was one more teacher, on 8 prompts (2 held out) of `neutral.jsonl`, put in the chat template of "
        "`base` (SHA-256 bbbbbbbbbbbb). There the merge is 0.2500 as far from the base as the experts are on average "
        "(0.4000 at the start)."
    ) in card
    published = next(item for item in publication.items if item.path == "wp/fit/fit.safetensors")
    assert str(world.root).encode() not in published.source.read_bytes()
    kept = read_fit(published.source)
    assert [expert.name for expert in kept.meta.experts] == ["e1", "e0"]
    assert all((kept.tensors()[part] == tensor).all() for part, tensor in fit.tensors().items())
    assert {"wp/shares.png", "wp/fit-loss.png"} <= {item.path for item in publication.items}
    assert "![The loss by step, on prompts fitted and held out](wp/fit-loss.png)" in card
    assert not any("wp/scores" in item.path for item in publication.items)
    world.write_fit([1, 0], seed=5)
    with pytest.raises(BadInput, match="was made with other numbers"):
        prepare(Request(world.root / "fit", REPO), None, lambda line: None)


def test_what_is_no_part_of_the_model_stays_here(world):
    out = world.root / "out"
    (out / "training.log").write_text("x")
    (out / "pytorch_model.bin").write_bytes(b"x")
    (out / "checkpoint").mkdir()
    (out / "LICENSE").write_text("text")
    publication = dry(world)
    paths = {item.path for item in publication.items}
    assert "LICENSE" in paths
    assert not {"training.log", "pytorch_model.bin"} & paths
    assert "checkpoint, pytorch_model.bin, training.log" in publication.listing()


def test_chat_templates_beside_the_default_one_are_part_of_the_model(world):
    """A folder in the model's: certified, published, and no other model's after the audit."""
    for name in ("tool_use", "rag"):
        (world.base / "additional_chat_templates").mkdir(exist_ok=True)
        (world.base / "additional_chat_templates" / f"{name}.jinja").write_text(f"{name} {{{{ messages }}}}")
    out = merge(world, world.recipe(), "templates")
    names = [f"additional_chat_templates/{name}.jinja" for name in ("rag", "tool_use")]
    certificate = read_certificate(out / CERTIFICATE)
    assert {name: certificate.files.get(name) for name in names} == {name: sha(out / name) for name in names}
    publication = prepare(Request(out, REPO), None, lambda line: None)
    assert {item.path: item.source for item in publication.items if "/chat" in item.path or "_chat" in item.path} == {
        name: out / name for name in names
    }
    assert not publication.left_out
    assert set(names) <= set(read_certificate(stage(world).parent / "templates.push/published" / CERTIFICATE).files)
    (out / names[0]).write_text("another")
    shutil.rmtree(world.expert(1))
    with pytest.raises(BadInput, match=r"additional_chat_templates/rag\.jinja has changed since it was audited"):
        prepare(Request(out, REPO, licence="mit"), None, print)


# ---------------------------------------------------------------------- licences


@pytest.mark.parametrize(
    ("licences", "merged"),
    [
        (("apache-2.0", "apache-2.0", "apache-2.0"), "apache-2.0"),
        (("mit", "apache-2.0", "mit"), "apache-2.0"),
        (("llama2", "apache-2.0", "mit"), "llama2"),
        (("llama2", "llama2", "llama2"), "llama2"),
        (("apache-2.0", "cc-by-nc-4.0", "apache-2.0"), "cc-by-nc-4.0"),
        (("[mit, apache-2.0]", "[mit]", "MIT"), "apache-2.0"),
    ],
)
def test_licences_that_go_together(world, licences, merged):
    for folder, name in zip((world.base, world.expert(0), world.expert(1)), licences, strict=True):
        licence(folder, name)
    assert front_matter(dry(world).card.read_text())["license"] == merged


@pytest.mark.parametrize(
    ("licences", "sentence"),
    [
        (("llama2", "cc-by-nc-4.0", "mit"), "licences disagree .*base under llama2.*e0 under cc-by-nc-4.0"),
        (("apache-2.0", "cc-by-nc-nd-4.0", "mit"), "e0 under cc-by-nc-nd-4.0, which forbids"),
        (("apache-2.0", "other", "mit"), "e0 under other, of which wp-push knows nothing"),
        (("apache-2.0", "[mit, llama3, llama2]", "mit"), "e0 under mit and llama3 and llama2"),
        (("apache-2.0", "{mit: yes}", "mit"), "e0 without a known licence .its card has a dict"),
        (("apache-2.0", "3", "mit"), "e0 without a known licence .its card has a int"),
        (("apache-2.0", None, "mit"), "e0 without a known licence"),
        (("llama3", "llama3.1", "mit"), "disagree"),
    ],
)
def test_licences_that_stop_a_push(world, licences, sentence):
    for folder, name in zip((world.base, world.expert(0), world.expert(1)), licences, strict=True):
        licence(folder, name)
    with pytest.raises(BadInput, match=sentence + r".*--license ID"):
        dry(world)
    said = []
    assert front_matter(dry(world, said.append, licence="llama2").card.read_text())["license"] == "llama2"
    assert any(line.startswith("you answer for --license llama2") for line in said)


BAD_CARDS = {
    "a tab": "---\nlicense: apache-2.0\ntags:\n\t- merge\n---\n",
    "no mapping": "---\n- license\n---\n",
    "a tag": "---\nlicense: !!python/object/apply:os.system [ls]\n---\n",
    "deep": "---\nlicense: " + "[" * 3000 + "\n---\n",
    "not UTF-8": b"---\nlicense: mit \xff\n---\n",
    "no front matter": "# Model\n",
    "nothing": "",
    "a folder": None,
}


@pytest.mark.parametrize("content", BAD_CARDS.values(), ids=list(BAD_CARDS))
def test_a_card_that_cannot_be_read_is_a_licence_not_known(world, content):
    card = world.expert(0) / "README.md"
    card.unlink()
    if content is None:
        card.mkdir()
    else:
        card.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=r"e0 without a known licence .*--license ID") as caught:
        dry(world)
    assert "\n" not in caught.value.message
    card_text = dry(world, licence="apache-2.0").card.read_text()
    assert front_matter(card_text)["license"] == "apache-2.0"
    assert "- `e0` (not on the Hub): no licence stated" in card_text


def terms(folder: Path, name: str, link: str) -> None:
    text = f"---\nlicense: other\nlicense_name: {name}\nlicense_link: {link}\n---\n"
    (folder / "README.md").write_text(text)


def test_other_terms_keep_their_name_and_link(world):
    for folder in (world.base, world.expert(0)):
        terms(folder, "acme-research", "https://example.com/LICENSE")
    with pytest.raises(BadInput, match=r"base, e0 under other .acme-research, https://example.com/LICENSE."):
        dry(world)
    card = dry(world, licence="other").card.read_text()
    data = front_matter(card)
    assert (data["license"], data["license_name"]) == ("other", "acme-research")
    assert data["license_link"] == "https://example.com/LICENSE"
    given = dry(world, licence="other", licence_name="mine", licence_link="LICENSE").card.read_text()
    assert (front_matter(given)["license_name"], front_matter(given)["license_link"]) == ("mine", "LICENSE")
    # A licence of the list says nothing of other terms; the parents' lines still do.
    listed = dry(world, licence="apache-2.0").card.read_text()
    assert "license_name" not in front_matter(listed)
    assert listed.count("acme-research") == 2
    terms(world.expert(0), "another", "https://example.com/2")
    with pytest.raises(BadInput, match="the parents name acme-research and another; add --license-name"):
        dry(world, licence="other")


def test_a_link_beside_a_parents_card_leads_to_its_repository(world):
    terms(world.base, "qwen-research", "LICENSE")
    link = front_matter(dry(world, parents=[f"{world.base}=Qwen/base"], licence="other").card.read_text())
    assert link["license_link"] == "https://huggingface.co/Qwen/base/blob/main/LICENSE"
    assert "license_link" not in front_matter(dry(world, licence="other").card.read_text())


def test_llama_3_asks_for_its_name(world):
    for folder in (world.base, world.expert(0), world.expert(1)):
        licence(folder, "llama3.1")
    said = []
    dry(world, said.append)
    assert any("begin with Llama" in line for line in said)
    said.clear()
    prepare(Request(world.root / "out", "alice/Llama-merge"), None, said.append)
    assert not any("begin with" in line for line in said)


# ---------------------------------------------------------------------- words for the person


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"parents": ["nothing"]}, "expected FOLDER=USER/NAME"),
        ({"parents": ["e7=bob/x"]}, "the recipe has no such model"),
        ({"licence": "My Licence"}, "no id of the Hub's list"),
        ({"licence": "Apache 2.0"}, "no id of the Hub's list .*; is it apache-2.0"),
        ({"licence": "unknown"}, "no id of the Hub's list"),
        ({"licence": "other"}, "its terms need a name, and no parent has any"),
        ({"licence": "mit", "licence_name": "acme"}, "go with --license other, found --license mit"),
        ({"licence_link": "https://x.y"}, "go with --license other"),
        ({"recipe": Path("no.yaml")}, "no.yaml: cannot read this recipe"),
        ({"results": [Path("nowhere")]}, "nowhere"),
    ],
)
def test_bad_flags(world, more, sentence):
    with pytest.raises(BadInput, match=sentence):
        dry(world, **more)


def test_another_recipe_is_refused_and_a_missing_one_named(world):
    other = world.recipe({**world.config(), "dtype": "bfloat16"}, "other.yaml")
    with pytest.raises(BadInput, match="not the recipe that this merge was made by"):
        dry(world, recipe=other)
    (world.root / "out" / "mergekit_config.yml").unlink()
    with pytest.raises(BadInput, match="name it with --recipe"):
        dry(world)


def test_a_folder_of_somebody_else_beside_the_model_is_left_alone(world):
    stage(world).mkdir()
    (stage(world) / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match="holds something else"):
        dry(world)


def test_names_that_are_published(tmp_path, monkeypatch):
    from mergekit_wp.push.names import Names
    from mergekit_wp.push.parents import find_parents

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/alice")
    for name in ("models/base", "models/lora", "models/old/base"):
        (tmp_path / name).mkdir(parents=True)
    snapshot = tmp_path / "hub" / "models--meta--one" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    recipe = {
        "base_model": "models/base",
        "models": [{"model": "models/base+models/lora"}, {"model": "models/old/base"}, {"model": str(snapshot)}],
        "tokenizer": {"source": "models/old/base"},
        "merge_method": "linear",
    }
    parents = find_parents(recipe, ["models/lora=bob/lora"])
    assert [(p.role, p.shown, p.hub) for p in parents] == [
        ("base", "base", None),
        ("expert", "bob/lora", "bob/lora"),
        ("expert", "base-2", None),
        ("expert", "meta/one", "meta/one"),
    ]
    names = Names(tmp_path / "out", REPO, parents, {})
    assert names.recipe(recipe) == {
        "base_model": "base",
        "models": [{"model": "base+bob/lora"}, {"model": "base-2"}, {"model": f"meta/one@{'a' * 40}"}],
        "tokenizer": {"source": "base-2"},
        "merge_method": "linear",
    }
    assert names.of("meta-llama/Llama-2-13b-hf") == "meta-llama/Llama-2-13b-hf"
    assert names.of("/data/alice/secret/model") == "model"
    assert names.of(str(tmp_path / "out")) == REPO
    assert names.content({"a": ["/home/alice/x.json", "see /home/alice/notes, /home/alice2/x"]}) == {
        "a": ["x.json", "see ~/notes, /home/alice2/x"]
    }


def test_rows_keep_the_names_that_they_were_given(tmp_path, monkeypatch):
    """A row may be called as a parent's folder is; what names a place, or decides no number, is not repeated."""
    from mergekit_wp.push.evaluation import command
    from mergekit_wp.push.names import Names
    from mergekit_wp.push.parents import find_parents

    monkeypatch.chdir(tmp_path)
    for name in ("base", "merged", "code"):
        (tmp_path / name).mkdir()
    parents = find_parents({"base_model": "base", "models": [{"model": "code"}]}, ["base=meta/base-1b"])
    names = Names(Path("merged"), REPO, parents, {"s/code.safetensors": "wp/scores/code.safetensors"})
    words = [
        "wp-eval",
        "s.yaml",
        "base",
        "merged",
        "--baseline",
        "base",
        "--prompts",
        "code.jsonl",
        "--prompts",
        "code",
    ]
    words += ["--trust-remote-code", "--batch-size", "4", "--log-samples", "--out", "runs/eval", "--json"]
    rows = [{"name": name, "model": name} for name in ("base", "merged")]
    content = {"rows": rows, "baseline": "base", "command": words, "columns": [{"task": "code"}]}
    assert command(content, names, "wp/eval/s.yaml") == [
        "wp-eval", "wp/eval/s.yaml", "base=meta/base-1b", f"merged={REPO}", "--baseline", "base",
        "--trust-remote-code", "--batch-size", "4", "--out", "runs/eval",
    ]  # fmt: skip
    public = names.content(content)
    assert public["rows"] == [{"name": "base", "model": "meta/base-1b"}, {"name": "merged", "model": REPO}]
    assert (public["baseline"], public["columns"]) == ("base", [{"task": "code"}])
    assert names.content({"top": [20, "s/code.safetensors"]}) == {"top": [20, "wp/scores/code.safetensors"]}


def test_a_token_of_any_form_is_cleaned_away(monkeypatch):
    from mergekit_wp.push.retry import clean

    monkeypatch.setenv("HF_TOKEN", "oauth.Part-One.part_two")
    text = clean(
        "401 for Bearer oauth.Part-One.part_two and hf_abcdefghijklmnop at https://s3/x?X-Amz-Signature=12 now"
    )
    assert text == "401 for Bearer <token> and <token> at https://s3/x?... now"


# ---------------------------------------------------------------------- the command


def test_a_dry_run_needs_no_network_and_can_be_repeated(world):
    before = tree(world.root / "out")
    text = wp_push(world.root / "out", REPO, "--dry-run", HF_TOKEN="")  # nobody listens at the endpoint
    assert tree(world.root / "out") == before
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in text.splitlines()
             if line[:1] == " " and "bytes in" not in line}  # fmt: skip
    assert sizes["config.json"] == (world.root / "out" / "config.json").stat().st_size
    assert f"{sum(sizes.values()):,}  bytes in {len(sizes)} files" in text
    assert "nothing was sent" in text
    card = (stage(world) / "README.md").read_text()
    again = dry(world)
    assert again.card.read_text() == card
    assert {item.path: item.size for item in again.items} == sizes


def test_from_the_command_line_to_the_hub_and_back(hub, world, tmp_path):
    hub.faults += [Fault(r"PUT /storage/\w+$", "drop", after=100), Fault("GET /api/whoami-v2", "status", status=503)]
    hub.cards["bob/maths"] = {"license": "apache-2.0"}
    results = write_results(world.root / "eval", fingerprint(world), world.root / "out")
    arguments = [world.root / "out", REPO, "--results", results, "--parent", "e0=bob/maths", "--private"]
    text = wp_push(*arguments, url=hub.url)
    assert hub.repos[REPO].private
    commits = len(hub.repos[REPO].commits)
    assert commits == 2
    sent = hub.bytes_sent()
    again = wp_push(*arguments[:-1], url=hub.url)
    assert (len(hub.repos[REPO].commits), hub.bytes_sent()) == (commits, sent)
    # Every file of the model as it is here; config and weights load from what the Hub gives back.
    for path in (world.root / "out").iterdir():
        if path.name not in ("README.md", "mergekit_config.yml", CERTIFICATE):
            assert hub.content(REPO, path.name) == path.read_bytes()
    assert front_matter(hub.content(REPO, "README.md").decode())["base_model"] == ["bob/maths"]
    # The token is nowhere: not in the output (a retry was logged), not in a file here or there.
    for output in (text, again):
        assert TOKEN not in output
        assert "X-Amz-Signature" not in output
    assert "Retrying" in text
    for path in world.root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert not any(TOKEN.encode() in hub.content(REPO, path) for path in hub.repos[REPO].files)


def test_a_wrong_token_is_not_repeated_and_debug_does_not_show_it(hub, world):
    wrong = "hf_AnotherTokenWithoutAnyRight77"
    text = wp_push(world.root / "out", REPO, url=hub.url, code=2, HF_TOKEN=wrong, HF_DEBUG="1")
    assert "the Hub does not know this token" in text
    assert wrong not in text
    assert not hub.repos


def test_a_token_in_a_file_stops_the_push(world, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (world.root / "out" / "LICENSE.txt").write_text(f"export HF_TOKEN={TOKEN}\n")
    with pytest.raises(BadInput, match=r"LICENSE\.txt: holds your Hub token") as caught:
        dry(world)
    assert TOKEN not in caught.value.message


_ANOTHER = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        *((f"a{ending}", f"x={TOKEN}", "your Hub token")
          for ending in (".csv", ".jsonl", ".env", ".cfg", ".toml", ".sh", ".model", ".png", "")),
        ("a.csv", f"x={_ANOTHER}", "what looks like a Hub token"),
        ("a.csv", "secret-of-another-form", "your Hub token"),
        ("a.csv", "y" * 95 + f"={_ANOTHER}", "what looks like a Hub token"),  # across a border of chunks
        ("a.csv", "y" * 95 + f"={TOKEN}", "your Hub token"),
        ("a.csv", "y" * 99 + _ANOTHER, None),  # the border hides what stands before it
        ("a.csv", "hf_hub_download hf_transfer hf_" + "a" * 29, None),
        ("a.py", f"sha_{_ANOTHER}", None),
    ],
)  # fmt: skip
def test_a_token_is_found_wherever_it_lies(tmp_path, monkeypatch, name, content, found):
    from mergekit_wp.push import secrets
    from mergekit_wp.push.upload import UploadFile

    monkeypatch.setattr(secrets, "_CHUNK", 100)
    monkeypatch.setattr(secrets, "_SMALL", 10)
    (tmp_path / name).write_text(content)
    items = [UploadFile(name, tmp_path / name, len(content), "0" * 64)]
    token = "secret-of-another-form" if content.startswith("secret") else TOKEN
    if found is None:
        assert secrets.check_secrets(items, token) == {}
        return
    with pytest.raises(BadInput, match=rf"{name}: holds {found}") as caught:
        secrets.check_secrets(items, token)
    assert token not in caught.value.message
    assert _ANOTHER not in caught.value.message


def test_a_token_in_the_header_of_a_large_file_of_weights(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    from mergekit_wp.push.secrets import check_secrets
    from mergekit_wp.push.upload import UploadFile

    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(4, np.float32)}, path, metadata={"format": "pt", "note": TOKEN})
    with pytest.raises(BadInput, match="holds your Hub token"):
        check_secrets([UploadFile(path.name, path, 10**11, "0" * 64)], TOKEN)


def test_help_names_and_network():
    assert "USER/NAME" in wp_push("--help")
    assert "expected USER/NAME" in wp_push(".", "just-a-name", code=2)
