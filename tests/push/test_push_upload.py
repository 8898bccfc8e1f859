"""Uploads through huggingface_hub's own client to a Hub on this machine, with what goes wrong on the way."""

from __future__ import annotations

import hashlib
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from loopback_hub import PART, Fault, LoopbackHub, regular
from warm import warm

from mergekit_wp.errors import BadInput
from mergekit_wp.push import upload as uploading
from mergekit_wp.push.retry import explain
from mergekit_wp.push.upload import UploadFile

TOKEN = "hf_LoopbackTokenThatIsNoSecret1234"
REPO = "alice/merge"


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants as constants

    # Read from the environment at import; the subprocesses of other tests set the environment instead.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The client waits a second and more between its tries.
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(uploading, "WAITS", (0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr(uploading, "_LARGE", 1000)
    monkeypatch.setattr("mergekit_wp.push.retry.WAITS", (0.01, 0.01, 0.01, 0.01))
    with LoopbackHub() as hub:
        hub.add_user("alice", TOKEN)
        yield hub
        assert not hub.troubles


@pytest.fixture
def api(hub):
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url)


def write(folder: Path, sizes: dict[str, int], seed: int = 0) -> list[UploadFile]:
    draw = random.Random(seed)
    items = []
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"---\nlicense: mit\n---\n" if name == "README.md" else draw.randbytes(size))
        items.append(item_of(folder, name))
    return items


def item_of(folder: Path, name: str) -> UploadFile:
    content = (folder / name).read_bytes()
    return UploadFile(name, folder / name, len(content), hashlib.sha256(content).hexdigest())


SIZES = {
    "README.md": 500,
    "config.json": 300,
    "model-00001-of-00002.safetensors": 3 * PART + 17,  # four parts
    "model-00002-of-00002.safetensors": PART - 5,  # one request
    "model.safetensors.index.json": 900,
    "wp/scores/a.safetensors": 700,
}


@pytest.fixture
def items(tmp_path):
    return write(tmp_path / "model", SIZES)


def push(api, items, private=False, say=lambda line: None):
    return uploading.upload(api, REPO, items, private=private, say=say)


def assert_holds(hub, items):
    repo = hub.repos[REPO]
    assert set(repo.files) == {item.path for item in items} | {".gitattributes"}
    for item in items:
        assert hashlib.sha256(hub.content(REPO, item.path)).hexdigest() == item.sha256, item.path


def large(items):
    return sum(item.size for item in items if item.path.endswith(".safetensors"))


def test_one_commit_holds_every_file_and_a_download_gives_it_back(hub, api, items, tmp_path):
    said = []
    url = push(api, items, say=said.append)
    assert_holds(hub, items)
    assert len(hub.repos[REPO].commits) == 2  # the repository's own first one, and ours
    assert url == f"{hub.url}/{REPO}/commit/{hub.repos[REPO].oids[-1]}"
    assert hub.bytes_sent() - large(items) < 1000  # once each; the rest is the completion request of the parts
    assert [line.split()[0] for line in said[1:]] == ["[1/2]", "[2/2]"]
    for item in items:
        got = api.hf_hub_download(REPO, item.path, cache_dir=tmp_path / "cache")
        assert Path(got).read_bytes() == item.source.read_bytes()


def test_weights_arrive_before_the_commit_that_names_them(hub, api, items):
    push(api, items)
    stored = [i for i, line in enumerate(hub.requests) if "/storage/" in line or line.endswith("/verify")]
    commits = [i for i, line in enumerate(hub.requests) if "/commit/" in line]
    assert len(commits) == 1
    assert max(stored) < commits[0]


def test_again_sends_nothing_and_commits_nothing(hub, api, items):
    first = push(api, items)
    sent, commits = hub.bytes_sent(), len(hub.repos[REPO].commits)
    assert push(api, items) == first
    assert (hub.bytes_sent(), len(hub.repos[REPO].commits)) == (sent, commits)


def test_a_changed_file_is_the_only_one_sent_and_stray_weights_go(hub, api, items, tmp_path):
    push(api, items)
    hub.sent.clear()
    kept = [item for item in items if not item.path.startswith("model-00002")]
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "wp/scores/a.safetensors").write_bytes(b"o" * SIZES["wp/scores/a.safetensors"])
    changed = [item_of(tmp_path / "model", item.path) for item in kept]
    push(api, changed)
    assert_holds(hub, changed)  # the second shard is gone with the commit that does not list it
    assert hub.bytes_sent() == SIZES["wp/scores/a.safetensors"]


def test_what_would_be_loaded_with_the_model_goes_and_what_others_put_there_stays(hub, api, items):
    """Of another model, or another release of this one; no audit saw the mix."""
    repo = hub.add_repo(REPO)
    kept = ("thumbnail.png", "gguf/q4.gguf", "LICENSE.txt", "notes.md", "onnx/config.json")
    stale = (
        "model.safetensors", "pytorch_model.bin", "chat_template.jinja", "added_tokens.json", "generation_config.json",
        "tokenizer.model", "merges.txt", "modeling_acme.py", "adapter_config.json", "quantize_config.json",
        "additional_chat_templates/tool_use.jinja", "wp/scores/old.safetensors",
    )  # fmt: skip
    repo.commit({**repo.files, **{name: regular(b"old") for name in (*kept, *stale)}}, "by hand")
    said = []
    push(api, items, say=said.append)
    assert set(repo.files) == {*kept, ".gitattributes", *(item.path for item in items)}
    (line,) = [line for line in said if "taken out of the repository" in line]
    assert line.partition(": ")[2].split(", ") == sorted(stale)


@pytest.mark.parametrize("private", [False, True])
def test_visibility_of_a_new_repository(hub, api, items, private):
    push(api, items, private)
    assert hub.repos[REPO].private is private


def test_private_never_means_a_public_repository(hub, api, items):
    hub.add_repo(REPO, private=False)
    with pytest.raises(BadInput, match="is public"):
        push(api, items, private=True)
    assert not hub.bytes_sent()
    hub.repos[REPO].private = True
    push(api, items)
    assert hub.repos[REPO].private


@pytest.mark.parametrize("kind", ["drop", "status"])
@pytest.mark.parametrize(
    "where", [r"PUT /storage/\w+/2$", r"PUT /storage/\w+$", r"POST /storage/\w+/complete", r"/objects/verify"]
)
def test_an_upload_survives_what_passes(hub, api, items, kind, where):
    fault = Fault(where, kind, after=1000)
    hub.faults.append(fault)
    push(api, items)
    assert fault.times == 0, "the fault did not happen"
    assert_holds(hub, items)


@pytest.mark.parametrize(
    "where", [r"GET /api/models/alice/merge$", r"POST /api/repos/create", r"GET .*/tree/", r"POST .*/commit/main"]
)
@pytest.mark.parametrize("kind", ["drop", "status"])
def test_calls_that_the_client_does_not_repeat_are_repeated(hub, api, items, kind, where):
    fault = Fault(where, kind, times=2, status=500)
    hub.faults.append(fault)
    push(api, items)
    assert fault.times == 0, "the fault did not happen"
    assert_holds(hub, items)
    assert len(hub.repos[REPO].commits) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, api, items):
    fault = Fault(r"POST .*/commit/main", "lost")
    hub.faults.append(fault)
    push(api, items)
    assert fault.times == 0
    assert_holds(hub, items)
    assert hub.repos[REPO].messages == ["initial commit", "Upload the merge with mergekit-wp"]


def test_a_repository_made_although_its_answer_is_lost(hub, api, items):
    hub.faults.append(Fault("POST /api/repos/create", "lost"))
    push(api, items, private=True)
    assert hub.repos[REPO].private
    assert_holds(hub, items)


def test_a_race_with_another_commit_is_run_again(hub, api, items):
    repo = hub.add_repo(REPO)

    def somebody_commits():
        with hub.lock:
            stray = {"notes.md": regular(b"by hand"), "model.safetensors": regular(b"a stray")}
            repo.commit({**repo.files, **stray}, "a race")

    fault = Fault(r"POST .*/commit/main", somebody_commits)
    hub.faults.append(fault)
    push(api, items)
    assert fault.times == 0
    assert repo.messages == ["initial commit", "a race", "Upload the merge with mergekit-wp"]
    assert hub.content(REPO, "notes.md") == b"by hand"
    assert "model.safetensors" not in repo.files, "the commit was not compared with what it went on top of"
    assert hub.bytes_sent() - large(items) < 1000, "large files were sent again"


def test_a_gitignore_that_leaves_weights_out_does_not_go_unnoticed(hub, api, items):
    repo = hub.add_repo(REPO)
    repo.commit({**repo.files, ".gitignore": regular(b"*.safetensors\n")}, "ignore")
    with pytest.raises(BadInput, match=r"model-00001-of-00002.safetensors.*gitignore"):
        push(api, items)


def test_a_file_that_changes_while_it_is_sent_is_refused(hub, api, items):
    items[2].source.write_bytes(b"x" * items[2].size)  # the digest was taken before
    with pytest.raises(RuntimeError) as caught:
        push(api, items)
    assert "SHA-256" in explain(caught.value, REPO, hub.url).message or "400" in explain(
        caught.value, REPO, hub.url
    ).message  # fmt: skip
    assert len(hub.repos[REPO].commits) == 1


def test_a_disk_that_cannot_be_read(hub, api, items):
    items[3].source.unlink()
    items[3].source.mkdir()
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the point is what is made of it)
        push(api, items)
    assert explain(caught.value, REPO, hub.url).exit_code == 2
    assert len(hub.repos[REPO].commits) == 1


def said_of(call, hub):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    error = caught.value
    return error.message if isinstance(error, BadInput) else explain(error, REPO, hub.url).message


def test_sentences(hub, api, items, monkeypatch):
    from huggingface_hub import HfApi

    assert "alice" in uploading.check_login(api)
    hub.add_user("alice", "hf_read", role="read")
    assert "can only read" in said_of(lambda: uploading.check_login(HfApi(hub.url, token="hf_read")), hub)
    wrong = HfApi(hub.url, token="hf_WrongTokenWrongToken99")
    text = said_of(lambda: uploading.check_login(wrong), hub)
    assert "does not know this token" in text
    assert "hf_Wrong" not in text
    hub.add_user("bob", "hf_bob")
    bob = HfApi(hub.url, token="hf_bob")
    assert "may not write there" in said_of(lambda: push(bob, items), hub)
    hub.add_repo(REPO)
    assert "may not write there" in said_of(lambda: push(bob, items), hub)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    assert "not logged in" in said_of(lambda: uploading.check_login(HfApi(hub.url)), hub)
    nowhere = HfApi("http://127.0.0.1:9", token=TOKEN)
    assert "no connection to" in said_of(lambda: uploading.check_login(nowhere), hub)


def test_licences_of_parents_on_the_hub(hub, api):
    from mergekit_wp.push.parents import find_parents, licence_of

    other = {"license": "other", "license_name": "acme-research", "license_link": "LICENSE"}
    hub.cards |= {
        "meta/base": {"license": "llama2"},
        "bob/maths": {"license": ["mit"]},
        "eve/code": {},
        "acme/x": other,
    }
    names = ["bob/maths", "eve/code", "eve/gone", "acme/x"]
    recipe = {"base_model": "meta/base", "models": [{"model": name} for name in names]}
    base, *experts = find_parents(recipe, [])
    assert base.role == "base"
    assert [licence_of(parent, api).ids for parent in (base, *experts[:2])] == [("llama2",), ("mit",), ()]
    found = licence_of(experts[3], api)
    assert (found.ids, found.name) == (("other",), "acme-research")
    assert found.link == "https://huggingface.co/acme/x/blob/main/LICENSE"
    with pytest.raises(BadInput, match="the Hub has no model eve/gone"):
        licence_of(experts[2], api)
    assert licence_of(base, None).ids == ()


SCRIPT = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from mergekit_wp.push import upload as uploading
from mergekit_wp.push.upload import UploadFile
uploading._LARGE = 1000
rows = [line.split("\\t") for line in sys.argv[2].splitlines()]
items = [UploadFile(a, Path(b), int(c), d) for a, b, c, d in rows]
print(uploading.upload(HfApi(), sys.argv[1], items, private=False, say=print))
"""


def test_killed_half_way_the_rerun_sends_what_is_missing(hub, items):
    """SIGKILL in the second part of the four of the first shard, and then in the middle of the second shard."""
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    lines = "\n".join(f"{item.path}\t{item.source}\t{item.size}\t{item.sha256}" for item in items)
    shards = [item for item in items if item.path.startswith("model-")]

    def run():
        return warm().start(SCRIPT, REPO, lines, **environment)

    for place, arrived in ((rf"PUT /storage/{shards[0].sha256}/2", 0), (rf"PUT /storage/{shards[1].sha256}$", 1)):
        fault = Fault(place, "hold", after=5000)
        hub.faults.append(fault)
        process = run()
        assert fault.reached.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        fault.release.set()
        assert [shard.sha256 in hub.objects for shard in shards] == [n < arrived for n in range(2)]
        assert len(hub.repos[REPO].commits) == 1, "a half-sent model must not look finished"

    before = hub.bytes_sent()
    process = run()
    code, output = process.wait(), process.said()
    assert code == 0, output
    assert_holds(hub, items)
    assert hub.bytes_sent() - before == shards[1].size  # the score file and the first shard were there
    assert TOKEN not in output
