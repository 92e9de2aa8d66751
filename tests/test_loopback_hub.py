# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The loopback Hub as huggingface_hub sees it; what that client would not ask is asked in plain HTTP."""

import hashlib
import json
from http.client import HTTPConnection

import pytest
from loopback_hub import LoopbackHub, run_client


WEIGHTS = bytes(range(251)) * 13007
FOLDER = {
    "README.md": b"---\nlicense: apache-2.0\npipeline_tag: image-classification\n---\n# A model\n",
    "config.json": b"{}",
    "extra/optimizer.bin": b"momentum",
    "extra.txt": b"beside the folder",
    "model.safetensors": WEIGHTS,
}
BATCH = "/tester/model.git/info/lfs/objects/batch"
VERIFY = "/tester/model.git/info/lfs/objects/verify"
COMMIT = "/api/models/tester/model/commit/main"
PRELUDE = """
import json, pathlib, warnings
from huggingface_hub import HfApi

warnings.simplefilter("error", UserWarning)
api = HfApi()
facts = {}

def outcome(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Runs code that fills the dict `facts`, in a process that has `folder` to upload, and returns the dict."""
    folder = tmp_path / "folder"
    for path, content in FOLDER.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)

    def run(code, **env):
        script = f"{PRELUDE}\nfolder = pathlib.Path({str(folder)!r})\n{code}\nprint(json.dumps(facts))"
        return json.loads(run_client(hub, script, tmp_path / "home", **env).stdout)

    return run


def ask(hub, method, path, body=b"", headers=None, token=True):
    """One request in plain HTTP: status, headers and body of the answer."""
    connection = HTTPConnection("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))
    headers = {**({"Authorization": f"Bearer {hub.token}"} if token else {}), **(headers or {})}
    try:
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def count(hub, method, fragment=""):
    return sum(asked == method and fragment in path for asked, path in hub.requests)


def test_folder_goes_up_in_one_commit_and_comes_down_again(hub, client):
    hub.page_size = 2
    facts = client("""
facts["user"] = api.whoami()["name"]
url = api.create_repo("tester/model")
facts["repo"] = [url.repo_id, url.repo_type]
facts["same"] = api.create_repo("tester/model", exist_ok=True) == url
facts["again"] = outcome(api.create_repo, "tester/model")
facts["sha"] = api.upload_folder(repo_id="tester/model", folder_path=folder, commit_message="Publish").oid
facts["files"] = api.list_repo_files("tester/model")
facts["root"] = [entry.path for entry in api.list_repo_tree("tester/model")]
facts["extra"] = [entry.path for entry in api.list_repo_tree("tester/model", "extra")]
facts["exists"] = [api.file_exists("tester/model", name) for name in ("config.json", "vocab.json")]
facts["one"] = pathlib.Path(api.hf_hub_download("tester/model", "extra/optimizer.bin")).read_text()
snapshot = pathlib.Path(api.snapshot_download("tester/model"))
facts["identical"] = [
    (snapshot / path.relative_to(folder)).read_bytes() == path.read_bytes()
    for path in folder.rglob("*") if path.is_file()
]
info = api.model_info("tester/model", files_metadata=True)
facts["info"] = [info.sha, info.author, info.private, info.pipeline_tag, info.card_data.license]
facts["blobs"] = {file.rfilename: file.blob_id for file in info.siblings}
facts["lfs"] = {file.rfilename: [file.lfs.sha256, file.lfs.size] for file in info.siblings if file.lfs}
facts["commits"] = [[commit.title, commit.authors] for commit in api.list_repo_commits("tester/model")]
""")
    repo = hub.repos["tester/model"]
    attributes = {".gitattributes": repo.files()[".gitattributes"]}
    assert repo.files() == attributes | FOLDER
    assert [(commit.title, commit.paths) for commit in repo.log()] == [
        ("Publish", sorted(FOLDER)),
        ("initial commit", [".gitattributes"]),
    ]
    assert facts["user"] == "tester"
    assert facts["repo"] == ["tester/model", "model"]
    assert facts["same"]
    assert facts["again"] == ["HfHubHTTPError", 409]
    assert sorted(facts["files"]) == sorted(attributes | FOLDER)
    assert sorted(facts["root"]) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "extra",
        "extra.txt",
        "model.safetensors",
    ]
    assert facts["extra"] == ["extra/optimizer.bin"]
    assert facts["exists"] == [True, False]
    assert facts["one"] == "momentum"
    assert facts["identical"] == [True] * len(FOLDER)
    assert facts["info"] == [facts["sha"], "tester", False, "image-classification", "apache-2.0"]
    assert facts["blobs"]["config.json"] == "9e26dfeeb6e641a33dae4961196235bdb965b21b", "as git hash-object says"
    assert facts["blobs"]["model.safetensors"] == "399bcc9cd0b33852fae897b1d319b0513f6df290", "its pointer's"
    assert facts["lfs"] == {
        path: [hashlib.sha256(FOLDER[path]).hexdigest(), len(FOLDER[path])]
        for path in ("extra/optimizer.bin", "model.safetensors")
    }
    assert facts["commits"] == [["Publish", ["tester"]], ["initial commit", ["system"]]]
    assert count(hub, "PUT") == 2
    assert count(hub, "POST", "/commit/") == 1


def test_branches_tags_deletions_and_pull_requests(hub, client):
    hub.create("org/model")
    facts = client("""
facts["first"] = api.upload_folder(repo_id="org/model", folder_path=folder).oid
facts["no-op"] = api.upload_folder(repo_id="org/model", folder_path=folder).oid
api.create_branch("org/model", branch="feature/x")
api.create_branch("org/model", branch="feature/x", exist_ok=True)
api.create_tag("org/model", tag="v1", tag_message="First")
facts["taken"] = [
    outcome(api.create_branch, "org/model", branch="main"),
    outcome(api.create_tag, "org/model", tag="v1"),
]
add = dict(path_or_fileobj=b"{'a': 1}", path_in_repo="config.json")
facts["branch"] = api.upload_file(repo_id="org/model", revision="feature/x", **add).oid
facts["deleted"] = api.delete_file("model.safetensors", "org/model", commit_description="Too big").oid
api.delete_folder("extra", "org/model")
pull = api.upload_file(repo_id="org/model", create_pr=True, commit_message="Better", **add)
facts["pull"] = [pull.pr_num, pull.pr_revision, pull.oid]
facts["stale"] = outcome(api.upload_file, repo_id="org/model", parent_commit=facts["first"], **add)
refs = api.list_repo_refs("org/model", include_pull_requests=True)
facts["refs"] = {ref.ref: ref.target_commit for ref in refs.branches + refs.tags + refs.pull_requests}
facts["at tag"] = pathlib.Path(api.hf_hub_download("org/model", "config.json", revision="v1")).read_text()
facts["at pull"] = pathlib.Path(api.hf_hub_download("org/model", "config.json", revision="refs/pr/1")).read_text()
facts["at sha"] = api.model_info("org/model", revision=facts["deleted"][:9]).sha
api.delete_branch("org/model", branch="feature/x")
api.delete_tag("org/model", tag="v1")
facts["gone"] = [outcome(api.model_info, "org/model", revision=name) for name in ("feature/x", "v1")]
facts["main"] = outcome(api.delete_branch, "org/model", branch="main")
""")
    repo = hub.repos["org/model"]
    assert facts["no-op"] == facts["first"]
    assert facts["taken"] == [["HfHubHTTPError", 409]] * 2
    assert facts["refs"] == {
        "refs/heads/main": repo.log()[0].oid,
        "refs/heads/feature/x": facts["branch"],
        "refs/tags/v1": facts["first"],
        "refs/pr/1": facts["pull"][2],
    }
    assert facts["pull"][:2] == [1, "refs/pr/1"]
    assert facts["stale"] == ["HfHubHTTPError", 412]
    assert [(commit.paths, commit.message) for commit in repo.log()[:2]] == [
        (["extra/optimizer.bin"], ""),
        (["model.safetensors"], "Too big"),
    ]
    assert sorted(repo.files()) == [".gitattributes", "README.md", "config.json", "extra.txt"]
    assert repo.files()["config.json"] == b"{}"
    assert repo.files("refs/pr/1")["config.json"] == b"{'a': 1}"
    assert [facts["at tag"], facts["at pull"], facts["at sha"]] == ["{}", "{'a': 1}", facts["deleted"]]
    assert facts["gone"] == [["RevisionNotFoundError", 404]] * 2
    assert facts["main"] == ["HfHubHTTPError", 403]


def test_missing_things_and_missing_rights_raise_the_errors_of_the_hub(hub, client):
    hub.create("tester/model")
    hub.create("stranger/public")
    hub.create("stranger/private", private=True)
    facts = client("""
file = dict(path_or_fileobj=b"1", path_in_repo="a.txt")
api.create_repo("tester/secret", private=True)
api.upload_file(repo_id="tester/secret", **file)
anonymous, impostor = HfApi(token=False), HfApi(token="hf_unknown")
facts["missing"] = [
    outcome(api.model_info, "tester/nowhere"),
    outcome(api.model_info, "nowhere"),
    outcome(api.hf_hub_download, "tester/nowhere", "a.txt"),
    outcome(api.hf_hub_download, "tester/model", "a.txt"),
    outcome(api.hf_hub_download, "tester/model", "config.json", revision="v9"),
    outcome(api.upload_file, repo_id="tester/model", revision="v9", **file),
    outcome(api.delete_file, "a.txt", "tester/model"),
    outcome(lambda: list(api.list_repo_tree("tester/model", "folder"))),
    outcome(api.delete_tag, "tester/model", tag="v9"),
]
facts["anonymous"] = [
    outcome(anonymous.create_repo, "tester/new"),
    outcome(anonymous.upload_file, repo_id="tester/model", **file),
    outcome(anonymous.model_info, "tester/secret"),
    outcome(anonymous.hf_hub_download, "tester/secret", "a.txt"),
    outcome(anonymous.model_info, "tester/model"),
]
facts["impostor"] = [
    outcome(impostor.whoami),
    outcome(impostor.upload_file, repo_id="tester/model", **file),
    outcome(impostor.model_info, "tester/secret"),
]
facts["stranger"] = [
    outcome(api.create_repo, "stranger/new"),
    outcome(api.upload_file, repo_id="stranger/public", **file),
    outcome(api.model_info, "stranger/private"),
    outcome(api.model_info, "stranger/public"),
]
facts["own"] = [api.model_info("tester/secret").private, anonymous.repo_exists("tester/secret")]
api.delete_repo("tester/secret")
facts["deleted"] = outcome(api.delete_repo, "tester/secret")
facts["card"] = outcome(api.upload_file, repo_id="tester/model", path_or_fileobj=b"# Bare", path_in_repo="README.md")
""")
    assert facts["missing"] == [
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
    ]
    assert facts["anonymous"] == [["HfHubHTTPError", 401], *[["RepositoryNotFoundError", 401]] * 3, None]
    assert facts["impostor"] == [["HfHubHTTPError", 401]] * 3
    assert facts["stranger"] == [
        ["HfHubHTTPError", 403],
        ["HfHubHTTPError", 403],
        ["RepositoryNotFoundError", 404],
        None,
    ]
    assert facts["own"] == [True, False]
    assert facts["deleted"] == ["RepositoryNotFoundError", 404]
    assert facts["card"] == ["UserWarning", None], "a card without metadata is warned of, as on the Hub"
    assert set(hub.repos) == {"tester/model", "stranger/public", "stranger/private"}
    assert [commit.title for commit in hub.repos["tester/model"].log()] == ["initial commit"]


@pytest.mark.parametrize(
    ("fault", "repeated"),
    [
        ({"method": "PUT", "after": 1, "status": 403}, 1),
        ({"method": "POST", "fragment": "/commit/"}, 0),
        ({"method": "POST", "fragment": "/commit/", "status": 500}, 0),
    ],
    ids=["second object refused", "commit dropped", "commit failed"],
)
def test_interrupted_upload_leaves_nothing_and_can_be_repeated(hub, client, fault, repeated):
    repo = hub.create("tester/model")
    hub.fail_next(**fault)
    upload = 'facts["failure"] = outcome(api.upload_folder, repo_id="tester/model", folder_path=folder)'

    assert client(upload)["failure"] is not None
    assert [commit.title for commit in repo.log()] == ["initial commit"]
    hub.requests.clear()
    assert client(upload)["failure"] is None
    assert repo.log()[0].paths == sorted(FOLDER)
    assert repo.files()["model.safetensors"] == WEIGHTS
    assert count(hub, "PUT") == repeated, "objects that had arrived are not sent again"


def test_client_repeats_a_dropped_object_by_itself(hub, client):
    hub.create("tester/model")
    hub.fail_next("PUT")
    code = (
        'api.upload_file(repo_id="tester/model", path_or_fileobj=folder / "model.safetensors", path_in_repo="a.bin")'
    )
    client(code)
    assert hub.repos["tester/model"].files()["a.bin"] == WEIGHTS
    assert count(hub, "PUT") == 2


def test_stopped_hub_is_unreachable_and_starts_again_with_what_it_had(hub):
    hub.create("tester/model")
    connection = HTTPConnection("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))
    connection.request("GET", "/api/models/tester/model")
    assert connection.getresponse().read()
    hub.stop()
    with pytest.raises(OSError):
        connection.request("GET", "/api/models/tester/model")
        connection.getresponse()
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        ask(hub, "GET", "/api/models/tester/model")
    hub.start()
    assert ask(hub, "GET", "/api/models/tester/model")[0] == 200


def test_object_is_stored_only_as_announced(hub):
    hub.create("tester/model")
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    announced = {"oid": oid, "size": len(WEIGHTS)}
    lines = [
        {"key": "header", "value": {"summary": "Weights"}},
        {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", **announced}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()

    assert ask(hub, "POST", COMMIT, body)[0] == 400, "never uploaded"
    assert ask(hub, "PUT", f"/lfs/{oid}", WEIGHTS)[0] == 403, "no signature"
    batch = json.loads(ask(hub, "POST", BATCH, {"operation": "upload", "objects": [announced]})[2])
    upload = batch["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.endpoint)
    assert ask(hub, "PUT", upload.replace(oid, "0" * 64), WEIGHTS)[0] == 403, "signed for another object"
    assert ask(hub, "PUT", upload, WEIGHTS[:-1], token=False)[0] == 200
    assert ask(hub, "POST", VERIFY, announced)[0] == 422, "cut short"
    assert ask(hub, "POST", COMMIT, body)[0] == 400, "not verified"
    assert ask(hub, "PUT", upload, WEIGHTS, token=False)[0] == 200
    assert ask(hub, "POST", VERIFY, {**announced, "size": 7})[0] == 422, "another size"
    assert ask(hub, "PUT", upload, WEIGHTS, token=False)[0] == 200
    assert ask(hub, "POST", VERIFY, announced, token=False)[0] == 401
    assert ask(hub, "POST", VERIFY, announced)[0] == 200
    assert ask(hub, "POST", COMMIT, body, token=False)[0] == 401
    assert ask(hub, "POST", COMMIT, body)[0] == 200
    assert hub.repos["tester/model"].files()["model.safetensors"] == WEIGHTS


def test_resolve_tells_commit_identity_and_size_and_serves_ranges(hub):
    commit = hub.create("tester/model", files={"a b.bin": b"0123456789"}).resolve("main")
    path = "/tester/model/resolve/main/a%20b.bin"

    status, headers, body = ask(hub, "HEAD", path)
    etag = f'"{hashlib.sha256(b"0123456789").hexdigest()}"'
    expected = {"X-Repo-Commit": commit.oid, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": "10"}
    assert (status, body, headers["Content-Length"]) == (200, b"", "10")
    assert {name: headers[name] for name in expected} == expected

    ranges = {"bytes=3-5": b"345", "bytes=7-": b"789", "bytes=-2": b"89", "bytes=8-99": b"89"}
    for asked, content in ranges.items():
        status, headers, body = ask(hub, "GET", path, headers={"Range": asked})
        assert (status, body) == (206, content)
    assert headers["Content-Range"] == "bytes 8-9/10"
    status, headers, _ = ask(hub, "GET", path, headers={"Range": "bytes=10-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */10")

    status, headers, _ = ask(hub, "HEAD", "/tester/model/resolve/main/%E6%A8%A1")
    assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", commit.oid)


def test_failure_of_a_client_is_shown_unless_it_is_expected(hub, tmp_path):
    with pytest.raises(AssertionError, match=r"exited with 3\.\nsaid why"):
        run_client(hub, "import sys; print('said why'); sys.exit(3)", tmp_path)
    done = run_client(hub, "import os, sys; sys.exit(os.environ['WHY'])", tmp_path, check=False, WHY="no disk")
    assert (done.returncode, done.stderr) == (1, "no disk\n")
