"""A small server on loopback that speaks as much of the Hub's HTTP API as a push and a download need.

Written against what huggingface_hub 2.4.0 sends and checks. It keeps real state: a commit is refused (412) when its
parent is not the head, an LFS object counts only when bytes of the right SHA-256 and size have arrived, a commit that
names an object which is not there is refused, and downloads give the bytes back.

What it does not cover: xet, which the real Hub offers and hf_xet speaks (tests set HF_HUB_DISABLE_XET=1, so the
client takes its LFS path); rate limits; gated repositories; quota; the Hub's own check of a card beyond its being a
YAML mapping with a well-formed `license` and `base_model`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

PART = 1 << 16  # bytes of one part of a multipart upload


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches `where`, `times` times after the first `skip`.

    kind: `drop` (the connection closes after `after` bytes of the body), `status` (answers with `status`),
    `lost` (the request is carried out, but its answer does not arrive), `hold` (as `drop`, but waits for `release`
    first, and sets `reached`), or a callable that runs before the request is carried out.
    """

    where: str
    kind: Any
    times: int = 1
    skip: int = 0
    after: int = 0
    status: int = 503
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repo:
    private: bool
    commits: list[dict[str, dict[str, Any]]] = field(default_factory=list)  # path -> {size, oid, lfs?, content?}
    oids: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self.commits[-1]

    def commit(self, files: dict[str, dict[str, Any]], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append(files)
        self.oids.append(oid)
        self.messages.append(message)
        return oid


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.url`."""

    def __init__(self) -> None:
        self.tokens: dict[str, dict[str, Any]] = {}
        self.repos: dict[str, Repo] = {}
        self.cards: dict[str, dict[str, Any]] = {}  # of models that only exist as parents
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.sent: list[tuple[str, int]] = []  # (oid, bytes) of every body that went to storage, whole or not
        self.requests: list[str] = []
        self.troubles: list[str] = []  # what a client must never do
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for fault in self.faults:
            fault.release.set()
        self._server.shutdown()
        self._server.server_close()

    def add_user(self, name: str, token: str, role: str = "write") -> None:
        self.tokens[token] = {"name": name, "role": role}

    def add_repo(self, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit({".gitattributes": regular(b"*.safetensors filter=lfs\n")}, "initial commit")
        return repo

    def content(self, repo_id: str, path: str) -> bytes:
        entry = self.repos[repo_id].files[path]
        return self.objects[entry["lfs"]["oid"]] if "lfs" in entry else entry["content"]

    def bytes_sent(self) -> int:
        return sum(size for _, size in self.sent)


def regular(content: bytes) -> dict[str, Any]:
    """A file outside of LFS, as git names it."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"size": len(content), "oid": oid, "content": content}


class _DroppedError(Exception):
    """The connection is to close without an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for the client's acknowledgement of its headers

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_GET

    def _serve(self) -> None:
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        line = f"{self.command} {self.path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = self._fault(line)
        try:
            if fault is not None and fault.kind in ("drop", "hold"):
                self._body(limit=fault.after)
                fault.reached.set()
                if fault.kind == "hold":
                    fault.release.wait(60)
                raise _DroppedError
            body = self._body()
            if fault is not None and fault.kind == "status":
                return self._answer(fault.status, {"error": "try again"})
            if fault is not None and callable(fault.kind):
                fault.kind()
            with self.hub.lock:
                answer = self._route(body)
            if fault is not None and fault.kind == "lost":
                raise _DroppedError
            self._answer(*answer)
        except (_DroppedError, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _fault(self, line: str) -> Fault | None:
        for fault in self.hub.faults:
            if re.search(fault.where, line) and fault.times:
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _body(self, limit: int | None = None) -> bytes:
        """The body, or its first `limit` bytes; what goes to storage is counted."""
        body = b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if limit is not None and len(body) >= limit:
                    break
            else:
                self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length if limit is None else min(limit, length))
        if self.path.startswith("/storage/"):
            with self.hub.lock:
                self.hub.sent.append((self.path.split("/")[2], len(body)))
        return body

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json" if not isinstance(content, bytes) else "text/plain")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------ what there is

    def _route(self, body: bytes) -> tuple[Any, ...]:
        path, command = unquote(self.path), self.command
        if path.startswith("/storage/"):
            return self._storage(path, body)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        user = self._user()
        if isinstance(user, tuple):
            return user
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"displayName": "test", "role": user["role"]}}
            return 200, {"type": "user", "name": user["name"], "orgs": [], "auth": auth}
        if path == "/api/repos/create":
            return self._create(user, json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._model(user, match[1], match[2] or "", body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            return self._writing(user, match[1]) or self._lfs(match[1], match[2], json.loads(body))
        if (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) and command in ("GET", "HEAD"):
            return self._resolve(match[1], match[2], match[3])
        return 404, {"error": f"no such thing: {path}"}

    def _user(self) -> Any:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.hub.tokens:
            return self.hub.tokens[token]
        return _error(401, "Invalid credentials in Authorization header")

    def _writing(self, user: dict[str, Any], repo_id: str) -> tuple[Any, ...] | None:
        if repo_id.split("/")[0] != user["name"] or user["role"] == "read":
            return _error(403, f"You don't have the rights to write to {repo_id}")
        return None

    def _create(self, user: dict[str, Any], asked: dict[str, Any]) -> tuple[Any, ...]:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if refused := self._writing(user, repo_id):
            return refused
        if repo_id in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}
        self.hub.add_repo(repo_id, asked.get("visibility") == "private")
        return 200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "1"}

    def _model(self, user: dict[str, Any], repo_id: str, rest: str, body: bytes) -> tuple[Any, ...]:
        if repo_id in self.hub.cards:
            return 200, {"id": repo_id, "sha": "0" * 40, "private": False, "cardData": self.hub.cards[repo_id],
                         "gated": False, "siblings": []}  # fmt: skip
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.split("/")[0] != user["name"]):
            return _error(404, "Repository not found", "RepoNotFound")
        verb, _, revision = rest.partition("/")
        if self.command == "GET" and verb in ("", "revision"):
            index = self._index(repo, revision or "main")
            siblings = [{"rfilename": path} for path in repo.commits[index]]
            return 200, {"id": repo_id, "sha": repo.oids[index], "private": repo.private, "siblings": siblings}
        if self.command == "GET" and verb == "tree":
            return 200, [_entry(path, file) for path, file in self._at(repo, revision).items()]
        if verb == "paths-info":
            asked = parse_qs(body.decode()).get("paths", []) or json.loads(body).get("paths", [])
            return 200, [_entry(p, f) for p, f in self._at(repo, revision).items() if p in asked]
        if refused := self._writing(user, repo_id):
            return refused
        if verb == "preupload":
            return self._preupload(repo, json.loads(body))
        if verb == "commit":
            return self._commit(repo_id, repo, [json.loads(line) for line in body.splitlines() if line.strip()])
        return 404, {"error": rest}

    def _index(self, repo: Repo, revision: str) -> int:
        return len(repo.commits) - 1 if revision.partition("/")[0] == "main" else repo.oids.index(revision)

    def _at(self, repo: Repo, revision: str) -> dict[str, dict[str, Any]]:
        return repo.commits[self._index(repo, revision.partition("/")[0])]

    def _preupload(self, repo: Repo, asked: dict[str, Any]) -> tuple[Any, ...]:
        ignored = repo.files.get(".gitignore", {}).get("content", b"").decode().split()
        answer = []
        for file in asked["files"]:
            name, known = file["path"], repo.files.get(file["path"])
            large = name.endswith((".safetensors", ".png")) or file["size"] > 10_000_000
            answer.append(
                {
                    "path": name,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": any(name.endswith(pattern.lstrip("*")) for pattern in ignored),
                    "oid": None if known is None else known.get("lfs", known)["oid"],
                }
            )
        return 200, {"files": answer}

    def _commit(self, repo_id: str, repo: Repo, lines: list[dict[str, Any]]) -> tuple[Any, ...]:
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.oids[-1]):
            return _error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                content = self.hub.objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    return _error(400, f"Your push was rejected because an LFS pointer has no file: {value['path']}")
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\n".encode()
                lfs = {"oid": value["oid"], "size": value["size"], "pointerSize": len(pointer)}
                files[value["path"]] = {"size": value["size"], "oid": regular(pointer)["oid"], "lfs": lfs}
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                return _error(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = repo.commit(files, header["summary"])
        return 200, {"success": True, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid}

    # ------------------------------------------------------------------ large files

    def _lfs(self, repo_id: str, verb: str, asked: dict[str, Any]) -> tuple[Any, ...]:
        if verb == "verify":
            known = self.hub.objects.get(asked["oid"])
            right = known is not None and len(known) == asked["size"]
            return (200, {}) if right else _error(404, "Object not found")
        objects = []
        for asked_object in asked["objects"]:
            oid, size = asked_object["oid"], asked_object["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                store = f"{self.hub.url}/storage/{oid}"
                if size <= PART:
                    upload: dict[str, Any] = {"href": f"{store}?X-Amz-Signature=abcdef0123456789"}
                else:
                    count = -(-size // PART)
                    urls = {f"{n:05d}": f"{store}/{n}?X-Amz-Signature=abcdef0123456789" for n in range(1, count + 1)}
                    upload = {"href": f"{store}/complete", "header": {"chunk_size": str(PART), **urls}}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return 200, {"transfer": "multipart", "objects": objects}

    def _storage(self, path: str, body: bytes) -> tuple[Any, ...]:
        if self.headers.get("Authorization"):
            self.hub.troubles.append(f"a token was sent to storage: {self.command} {path}")
        oid, _, part = path.removeprefix("/storage/").partition("/")
        if part == "complete":
            count = len(json.loads(body)["parts"])
            body = b"".join(self.hub.parts.pop((oid, n), b"") for n in range(1, count + 1))
        elif part:
            self.hub.parts[oid, int(part)] = body
            return 200, None, {"ETag": hashlib.md5(body).hexdigest()}
        if hashlib.sha256(body).hexdigest() != oid:
            return _error(400, "the content does not have this SHA-256")
        self.hub.objects[oid] = body
        return 200, {}

    # ------------------------------------------------------------------ the rest

    def _resolve(self, repo_id: str, revision: str, path: str) -> tuple[Any, ...]:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return _error(404, "Repository not found", "RepoNotFound")
        index = self._index(repo, revision)
        entry = repo.commits[index].get(path)
        if entry is None:
            return _error(404, "Entry not found", "EntryNotFound")
        content = self.hub.objects[entry["lfs"]["oid"]] if "lfs" in entry else entry["content"]
        headers = {
            "ETag": f'"{entry.get("lfs", entry)["oid"]}"',
            "X-Repo-Commit": repo.oids[index],
            "Content-Length": str(len(content)),
        }
        return 200, content, headers

    def _validate(self, asked: dict[str, Any]) -> tuple[Any, ...]:
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
        errors = [] if isinstance(data, dict) else ["the metadata is no mapping"]
        for name in (data or {}).get("base_model") or []:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
                errors.append(f'"base_model" holds {name!r}, which is no model id')
        if data and not re.fullmatch(r"[a-z0-9.+-]+", str(data.get("license", "mit"))):
            errors.append('"license" must be one of a list')
        messages = [{"message": message} for message in errors]
        return (400 if errors else 200), {"errors": messages, "warnings": []}


def _entry(path: str, file: dict[str, Any]) -> dict[str, Any]:
    return {"type": "file", "path": path, **{k: v for k, v in file.items() if k != "content"}}


def _error(status: int, message: str, code: str | None = None) -> tuple[Any, ...]:
    return status, {"error": message}, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


if __name__ == "__main__":  # to try a push by hand: python tests/helpers/loopback_hub.py
    with LoopbackHub() as loopback:
        loopback.add_user("alice", "hf_loopback")
        print(f"export HF_ENDPOINT={loopback.url} HF_TOKEN=hf_loopback HF_HUB_DISABLE_XET=1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
