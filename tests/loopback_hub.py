# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A Hugging Face Hub on 127.0.0.1, so that push and pull are tested with the unmodified client libraries.

It speaks the part of the protocol that huggingface_hub 2.4 and transformers 5.23 use for repositories: classic LFS
uploads followed by one commit, revisions, pull requests, listings, downloads, and the errors of each. Everything is
kept in memory. Left out: Xet (clients must set `HF_HUB_DISABLE_XET`), multipart uploads, `.gitignore`, discussions,
copies, and listings with `expand`.

Clients read their endpoint when they are imported, so they run in a process of their own:

    with LoopbackHub() as hub:
        run_client(hub, "import huggingface_hub; huggingface_hub.create_repo('tester/model')", home=tmp_path)
        assert list(hub.repos["tester/model"].files()) == [".gitattributes"]
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit


LFS_SUFFIXES = (".bin", ".ckpt", ".h5", ".msgpack", ".npy", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors")
LFS_THRESHOLD = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def run_client(hub, code: str, home, *, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run `code` in a new interpreter that knows only this Hub; unless `check=False`, its failure is the caller's."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **hub.environment(home), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check and done.returncode:
        raise AssertionError(f"The client exited with {done.returncode}.\n{done.stdout}\n{done.stderr}")
    return done


@dataclass(frozen=True)
class File:
    """One version of one file: a git blob or, `is_lfs`, an LFS object that git knows by its pointer."""

    content: bytes = field(repr=False)
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        stored = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        """The id that clients compare a local file with, and name it by in their cache."""
        return self.sha256 if self.is_lfs else self.blob_id

    def lfs_info(self, hash_name: str) -> dict:
        """The `lfs` entry of a listing, if any; tree and model_info spell the name of the hash differently."""
        info = {hash_name: self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return {"lfs": info} if self.is_lfs else {}


@dataclass(frozen=True)
class Commit:
    """`files` is the whole tree after the commit, `paths` what the commit itself added, changed or deleted."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    paths: list[str]
    files: dict[str, File]


@dataclass
class Repo:
    """A repository: commits by oid, refs by their full git name, and the LFS objects before and after `verify`."""

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict, repr=False)
    refs: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict, repr=False)
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[-2]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content at a branch, tag, pull request (`refs/pr/1`) or commit id."""
        return {path: file.content for path, file in self.resolve(revision).files.items()}

    def log(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to the revision, newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def resolve(self, revision: str) -> Commit:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        short = re.compile("[0-9a-f]{7,40}").fullmatch(revision)
        for oid, commit in self.commits.items():
            if short and oid.startswith(revision):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def branch(self, revision: str) -> str:
        """The ref that a commit to `revision` moves; tags and commit ids can only be read."""
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise Refusal(404, f"Not a branch: {revision}", "RevisionNotFound")

    def commit(self, ref: str, changes: dict[str, File | None], title, message="", author="system", parent=None):
        """Move `ref` to a new commit; a change to `None` deletes the file."""
        files = {**(parent.files if parent else {}), **changes}
        files = {path: file for path, file in sorted(files.items()) if file is not None}
        oid, date = secrets.token_hex(20), time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        commit = Commit(oid, parent and parent.oid, title, message, author, date, sorted(changes), files)
        self.commits[oid], self.refs[ref] = commit, oid
        return commit

    def add_ref(self, ref: str, revision: str) -> dict:
        target = self.resolve(revision)
        if ref in self.refs:
            raise Refusal(409, f"{ref} already exists")
        self.refs[ref] = target.oid
        return {}

    def delete_ref(self, ref: str) -> dict:
        if self.refs.pop(ref, None) is None:
            raise Refusal(404, f"{ref} does not exist", "RevisionNotFound")
        return {}


@dataclass
class Request:
    """`path` is as sent, still quoted and without the query; `namespaces` those the sender's token may write to."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    namespaces: tuple[str, ...] = ()

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Reply:
    """What goes back: bytes as they are, anything else as JSON."""

    body: bytes | dict | list
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error answer. Clients choose the class of their exception by `code`, and show `message`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping = {}, **body: str):
        super().__init__(message)
        told = {"X-Error-Message": message.encode("ascii", "replace").decode()}
        told |= {"X-Error-Code": code} if code else {}
        self.reply = Reply({"error": message, **body}, status, {**told, **headers})


@dataclass
class Fault:
    """Requests that are to break, see `LoopbackHub.fail_next`."""

    method: str
    fragment: str
    after: int
    times: int
    status: int | None

    def strikes(self, request: Request) -> bool:
        if request.method != self.method or self.fragment not in request.path:
            return False
        self.after -= 1  # below zero counts those that were broken
        return -self.times <= self.after < 0


class LoopbackHub:
    """The Hub: a context manager that serves while it is open. See the module's docstring.

    `users` maps a token to the namespaces it may write to, the user's own first; `repos` maps `tester/model` or
    `datasets/tester/data` to its `Repo`; `requests` lists the (method, path) of everything asked so far; listings
    are cut into pages of `page_size`.
    """

    def __init__(self, page_size: int = 1000):
        self.token = "loopback-token"
        self.users: dict[str, tuple[str, ...]] = {self.token: ("tester", "org")}
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.page_size = page_size
        self._port = 0
        self._faults: list[Fault] = []
        self._grants: dict[str, tuple[Repo, str]] = {}
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serve. After a stop: on the same port, with everything that was stored."""
        self._server = _Server(self, self._port)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """Become unreachable, for clients that are already connected too."""
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "LoopbackHub":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def environment(self, home: str | os.PathLike) -> dict[str, str]:
        """The variables that point a client process at this Hub and keep its caches under `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": os.path.join(home, "hub"),
            "HF_MODULES_CACHE": os.path.join(home, "modules"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1"),
            **dict.fromkeys(("HF_HUB_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_PROGRESS_BARS"), "1"),
        }

    def fail_next(self, method: str, fragment: str = "", *, after: int = 0, times: int = 1, status: int | None = None):
        """Break the next `times` requests of this method whose path contains `fragment`, once `after` have passed.

        Such a request is read and then ignored: answered with `status` or, by default, by closing the connection.
        The upload of an object is a PUT, which clients repeat on their own (after 1, 2, 4, 8 and 8 seconds) where it
        got no answer or 408, 429, 500, 502, 503 or 504; any other status, like the 403 of an expired upload URL,
        makes them give up at once. The commit, `"POST", "/commit/"`, they never repeat.
        """
        self._faults.append(Fault(method, fragment, after, times, status))

    def create(self, repo_id: str, private: bool = False, files: Mapping[str, bytes] = {}) -> Repo:
        """A new repository, with the first commit that the Hub makes itself, and `files` in it."""
        self.repos[repo_id] = repo = Repo(repo_id, private)
        seeds = {path: File(content, _is_large(path, len(content), content)) for path, content in files.items()}
        repo.commit("refs/heads/main", {".gitattributes": File(GITATTRIBUTES), **seeds}, "initial commit")
        return repo

    def answer(self, request: Request) -> Reply | None:
        """The reply, or None where an injected fault swallows it."""
        with self._lock:
            self.requests.append((request.method, request.path))
            for fault in self._faults:
                if fault.strikes(request):
                    return Refusal(fault.status, "Injected fault").reply if fault.status else None
            try:
                result = self._route(request)
            except Refusal as refusal:
                return refusal.reply
            return result if isinstance(result, Reply) else Reply(result)

    def _route(self, request: Request) -> Reply | bytes | dict | list:
        self._identify(request)
        for method, pattern, handler, access in ROUTES:
            found = pattern.fullmatch(request.path)
            if found and method == request.method.replace("HEAD", "GET"):
                places = {name: unquote(text) for name, text in found.groupdict().items()}
                if "repo" in places:
                    places["repo"] = self._open(request, places["repo"], access)
                elif access == "user" and not request.namespaces:
                    raise Refusal(401, "Invalid username or password.")
                return handler(self, request, **places)
        raise Refusal(404, f"The loopback Hub does not know {request.method} {request.path}")

    def _identify(self, request: Request) -> None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        request.namespaces = self.users.get(token, ())

    def _open(self, request: Request, repo_id: str, access: str) -> Repo:
        """The repository, unless the sender may not know of it (401 or 404) or not write to it (403)."""
        repo = self.repos.get(repo_id)
        is_own = repo is not None and repo.namespace in request.namespaces
        is_anonymous_write = access == "write" and not request.namespaces
        if repo is None or is_anonymous_write or (repo.private and not is_own):
            raise Refusal(404 if request.namespaces else 401, "Repository not found", "RepoNotFound")
        if access == "write" and not is_own:
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")
        return repo

    def _url(self, repo_id: str, *rest: str) -> str:
        return "/".join((self.endpoint, repo_id, *rest))

    def _page(self, request: Request, items: list) -> Reply:
        start = int(request.query.get("cursor", 0))
        stop = start + self.page_size
        following = f"{self.endpoint}{request.path}?{urlencode(request.query | {'cursor': stop})}"
        return Reply(items[start:stop], headers={"Link": f'<{following}>; rel="next"'} if stop < len(items) else {})

    def whoami(self, request):
        user, *organizations = request.namespaces
        token = {"displayName": "loopback", "role": "write"}
        orgs = [{"type": "org", "name": name, "fullname": name} for name in organizations]
        return {"type": "user", "name": user, "fullname": user, "orgs": orgs, "auth": {"accessToken": token}}

    def validate_yaml(self, request):
        """The standard library has no YAML parser: only a missing header is noticed."""
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return {"errors": [], "warnings": [] if request.json["content"].startswith("---\n") else [warning]}

    def create_repo(self, request):
        repo_id, namespace = _asked_id(request)
        if namespace not in request.namespaces:
            raise Refusal(403, f'You don\'t have the rights to create a repo under the namespace "{namespace}"')
        if repo_id in self.repos:
            raise Refusal(409, "You already created this repo", url=self._url(repo_id))
        self.create(repo_id, private=request.json.get("visibility") == "private")
        return {"url": self._url(repo_id), "name": repo_id, "id": repo_id}

    def delete_repo(self, request):
        repo = self._open(request, _asked_id(request)[0], "write")
        del self.repos[repo.id]
        return {}

    def repo_info(self, request, repo, rev="main"):
        commit = repo.resolve(rev)
        card = _card_data(commit.files)
        return {
            "id": repo.id.removeprefix("datasets/").removeprefix("spaces/"),
            "author": repo.namespace,
            "sha": commit.oid,
            "lastModified": commit.date,
            "private": repo.private,
            "tags": [card[name] for name in ("library_name", "pipeline_tag") if name in card],
            "cardData": card,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "siblings": [_sibling(path, file, "blobs" in request.query) for path, file in commit.files.items()],
        }

    def tree(self, request, repo, rev, path=""):
        prefix = f"{path}/" if path else ""
        listing = [entry for name, entry in _listing(repo.resolve(rev)).items() if name.startswith(prefix)]
        if path and not listing:
            raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound")
        if request.query.get("recursive") != "true":
            listing = [entry for entry in listing if "/" not in entry["path"].removeprefix(prefix)]
        return self._page(request, listing)

    def commits(self, request, repo, rev):
        history = [
            {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            for c in repo.log(rev)
        ]
        return self._page(request, history)

    def refs(self, request, repo):
        def under(prefix):
            names = [ref.removeprefix(prefix) for ref in repo.refs if ref.startswith(prefix)]
            return [{"name": name, "ref": prefix + name, "targetCommit": repo.refs[prefix + name]} for name in names]

        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        return {"converts": [], **{kind: under(prefix) for kind, prefix in kinds.items()}}

    def create_branch(self, request, repo, name):
        return repo.add_ref(f"refs/heads/{name}", request.json.get("startingPoint", "main"))

    def create_tag(self, request, repo, rev):
        return repo.add_ref(f"refs/tags/{request.json['tag']}", rev)

    def delete_branch(self, request, repo, name):
        if name == "main":
            raise Refusal(403, "The default branch cannot be deleted")
        return repo.delete_ref(f"refs/heads/{name}")

    def delete_tag(self, request, repo, name):
        return repo.delete_ref(f"refs/tags/{name}")

    def preupload(self, request, repo, rev):
        """How to send each file; the `oid` of what is there already lets the client leave out what did not change."""
        present = repo.resolve(rev).files
        files = []
        for file in request.json["files"]:
            path = file["path"]
            is_large = _is_large(path, file["size"], base64.b64decode(file["sample"]))
            known = {"oid": present[path].etag} if path in present else {}
            files.append(
                {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, **known}
            )
        return {"files": files}

    def lfs_batch(self, request, repo):
        """Where to send each object; one that the repository has already gets no actions.

        The upload carries no token, as on the Hub, where it goes to another host: the signature in its URL stands
        for the permission given here.
        """
        wanted = request.json["objects"]
        for asked in wanted:
            if asked["oid"] not in repo.objects:
                signature = secrets.token_urlsafe(16)
                self._grants[signature] = (repo, asked["oid"])
                upload = f"{self.endpoint}/lfs/{asked['oid']}?signature={signature}"
                verify = self._url(f"{repo.id}.git", "info/lfs/objects/verify")
                asked["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": wanted}

    def lfs_upload(self, request, oid):
        repo, granted = self._grants.get(request.query.get("signature"), (None, None))
        if granted != oid:
            raise Refusal(403, "SignatureDoesNotMatch")
        repo.uploads[oid] = request.body
        return b""

    def lfs_verify(self, request, repo):
        oid, size = request.json["oid"], request.json["size"]
        content = repo.objects.get(oid) or repo.uploads.pop(oid, b"")
        if (hashlib.sha256(content).hexdigest(), len(content)) != (oid, size):
            raise Refusal(422, f"The {len(content)} bytes received are not the {size} bytes of {oid}")
        repo.objects[oid] = content
        return {}

    def commit(self, request, repo, rev):
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        ref, base, answer = repo.branch(rev), repo.resolve(rev), {"success": True}
        if "create_pr" in request.query:
            number = 1 + sum(known.startswith("refs/pr/") for known in repo.refs)
            ref, base = f"refs/pr/{number}", repo.resolve(header.get("parentCommit", rev))
            answer["pullRequestUrl"] = self._url(repo.id, "discussions", str(number))
        elif not base.oid.startswith(header.get("parentCommit", "")):
            raise Refusal(412, f"{rev} is at {base.oid}, not at {header['parentCommit']}")
        changes = {}
        for line in lines:
            changes |= _changes(repo, base, line["key"], line["value"])
        made = repo.commit(ref, changes, header["summary"], header.get("description", ""), request.namespaces[0], base)
        return answer | {"commitOid": made.oid, "commitUrl": self._url(repo.id, "commit", made.oid)}

    def resolve(self, request, repo, rev, path):
        """A file itself, never a redirect: one to the same host would lose X-Repo-Commit on the way."""
        commit = repo.resolve(rev)
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound", headers)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return _ranged(file.content, request, headers)


def _asked_id(request: Request) -> tuple[str, str]:
    """The key in `repos` and the namespace that the body of a create or delete request means."""
    asked = request.json
    namespace = asked.get("organization") or request.namespaces[0]
    prefix = {"dataset": "datasets/", "space": "spaces/"}.get(asked.get("type"), "")
    return f"{prefix}{namespace}/{asked['name']}", namespace


def _card_data(files: Mapping[str, File]) -> dict[str, str]:
    """The one-line entries of the model card's YAML header, enough for `pipeline_tag` and its like."""
    text = files["README.md"].content.decode() if "README.md" in files else ""
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return dict(re.findall(r"^(\w+): *(\S.*)$", header[1], re.MULTILINE)) if header else {}


def _sibling(path: str, file: File, with_blobs: bool) -> dict:
    blob = {"size": len(file.content), "blobId": file.blob_id, **file.lfs_info("sha256")}
    return {"rfilename": path, **(blob if with_blobs else {})}


def _listing(commit: Commit) -> dict[str, dict]:
    """Path to tree entry, for files and for the folders that they imply."""
    entries = {}
    for path, file in commit.files.items():
        entries[path] = {"type": "file", "size": len(file.content), "oid": file.blob_id, **file.lfs_info("oid")}
        for parent in PurePosixPath(path).parents[:-1]:
            entries[str(parent)] = {"type": "directory", "size": 0, "oid": File(f"{parent}".encode()).blob_id}
    return {path: {"path": path, **entries[path]} for path in sorted(entries)}


def _is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether a file goes to LFS: named in .gitattributes, too big for git, or binary."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD or b"\0" in sample[:512])


def _changes(repo: Repo, base: Commit, key: str, value: dict) -> dict[str, File | None]:
    """What one line of a commit's body does to the tree."""
    if key == "header":
        return {}
    path = value["path"]
    if key == "file":
        return {path: File(base64.b64decode(value["content"]))}
    if key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise Refusal(400, f"{path}: its LFS pointer points to an object that was never uploaded")
        return {path: File(repo.objects[value["oid"]], is_lfs=True)}
    folder = path.rstrip("/") + "/"
    doomed = [p for p in base.files if p == path or (key == "deletedFolder" and p.startswith(folder))]
    if not doomed:
        raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    return dict.fromkeys(doomed)


def _ranged(content: bytes, request: Request, headers: dict[str, str]) -> Reply:
    size = len(content)
    asked = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", request.headers.get("Range", ""))
    if not asked or request.method != "GET":
        return Reply(content, 200, headers)
    first, last, suffix = asked.groups()
    start = max(size - int(suffix), 0) if suffix else int(first)
    stop = min(int(last) + 1, size) if last else size
    if start >= stop:
        raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Reply(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def _pattern(template: str) -> re.Pattern:
    """`{repo}` is namespace and name, after the kind unless that is a model; `{path}` the rest; others one segment."""
    places = {"repo": "(?:models/)?(?P<repo>(?:datasets/|spaces/)?[^/]+(?:/[^/]+)?)", "path": "(?P<path>.+)"}
    return re.compile(re.sub(r"{(\w+)}", lambda found: places.get(found[1], f"(?P<{found[1]}>[^/]+)"), template))


# In the order of matching, hence `/api/{repo}` last.
ROUTES = [
    (method, _pattern(template), handler, access)
    for method, template, handler, access in (
        ("GET", "/api/whoami-v2", LoopbackHub.whoami, "user"),
        ("POST", "/api/validate-yaml", LoopbackHub.validate_yaml, "anyone"),
        ("POST", "/api/repos/create", LoopbackHub.create_repo, "user"),
        ("DELETE", "/api/repos/delete", LoopbackHub.delete_repo, "user"),
        ("POST", "/{repo}.git/info/lfs/objects/batch", LoopbackHub.lfs_batch, "write"),
        ("PUT", "/lfs/{oid}", LoopbackHub.lfs_upload, "anyone"),
        ("POST", "/{repo}.git/info/lfs/objects/verify", LoopbackHub.lfs_verify, "write"),
        ("POST", "/api/{repo}/preupload/{rev}", LoopbackHub.preupload, "write"),
        ("POST", "/api/{repo}/commit/{rev}", LoopbackHub.commit, "write"),
        ("POST", "/api/{repo}/branch/{name}", LoopbackHub.create_branch, "write"),
        ("DELETE", "/api/{repo}/branch/{name}", LoopbackHub.delete_branch, "write"),
        ("POST", "/api/{repo}/tag/{rev}", LoopbackHub.create_tag, "write"),
        ("DELETE", "/api/{repo}/tag/{name}", LoopbackHub.delete_tag, "write"),
        ("GET", "/api/{repo}/tree/{rev}", LoopbackHub.tree, "read"),
        ("GET", "/api/{repo}/tree/{rev}/{path}", LoopbackHub.tree, "read"),
        ("GET", "/api/{repo}/commits/{rev}", LoopbackHub.commits, "read"),
        ("GET", "/api/{repo}/refs", LoopbackHub.refs, "read"),
        ("GET", "/api/{repo}/revision/{rev}", LoopbackHub.repo_info, "read"),
        ("GET", "/{repo}/resolve/{rev}/{path}", LoopbackHub.resolve, "read"),
        ("GET", "/api/{repo}", LoopbackHub.repo_info, "read"),
    )
]


class _Server(ThreadingHTTPServer):
    """Remembers its connections: closing the listening socket alone leaves those already open in service."""

    daemon_threads = False

    def __init__(self, hub: LoopbackHub, port: int):
        self.hub, self._connections = hub, set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request, client_address):
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self):
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """A client that went away is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Between HTTP and `Request` or `Reply`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: otherwise each reply waits for a delayed ACK

    def _handle(self):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), self.headers, body)
        reply = self.server.hub.answer(request)
        if reply is None:
            self.close_connection = True
            return
        is_raw = isinstance(reply.body, bytes)
        body = reply.body if is_raw else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/octet-stream" if is_raw else "application/json")
        for name, value in {**reply.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def log_message(self, *_):
        """Quiet: what was asked is in `LoopbackHub.requests`."""
