"""The unmodified `huggingface_hub` client against the Hub that the other tests use."""

import json
import os
import socket
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

pytestmark = pytest.mark.slow

REPO = "tester/sae"
WEIGHTS = os.urandom(300_000)


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "deep" / "notes.txt").write_text("hello")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path


@pytest.fixture
def pushed(api: HfApi, folder: Path) -> str:
    """The commit of a repo that holds `folder`."""
    api.create_repo(REPO)
    return api.upload_folder(repo_id=REPO, folder_path=folder).oid


class TestRepos:
    def test_create_twice(self, api: HfApi):
        assert api.create_repo(REPO).repo_id == REPO
        with pytest.raises(HfHubHTTPError, match="already created"):
            api.create_repo(REPO)
        assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
        assert api.list_repo_files(REPO) == [".gitattributes"]

    def test_delete(self, api: HfApi):
        api.create_repo(REPO)
        api.delete_repo(REPO)
        assert not api.repo_exists(REPO)

    @pytest.mark.parametrize("kind", ["space", "dataset"])
    def test_other_kinds_have_names_of_their_own(self, hub, api: HfApi, kind: str):
        sdk = "gradio" if kind == "space" else None
        assert api.create_repo(REPO, repo_type=kind, space_sdk=sdk).repo_type == kind
        api.upload_file(repo_id=REPO, repo_type=kind, path_or_fileobj=b"x = 1", path_in_repo="app.py")
        assert hub.files(REPO, kind=kind)["app.py"] == b"x = 1"
        assert Path(hf_hub_download(REPO, "app.py", repo_type=kind)).read_bytes() == b"x = 1"
        assert api.repo_info(REPO, repo_type=kind).id == REPO
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(REPO)

    def test_card_metadata(self, api: HfApi):
        api.create_repo(REPO)
        card = b"---\ntags: [sae, matryoshka]\nlibrary_name: transformers\n---\nText"
        api.upload_file(repo_id=REPO, path_or_fileobj=card, path_in_repo="README.md")
        info = api.model_info(REPO, files_metadata=True)
        assert (info.tags, info.library_name) == (["transformers", "sae", "matryoshka"], "transformers")
        assert info.card_data.tags == ["sae", "matryoshka"]
        assert {file.rfilename: file.size for file in info.siblings}["README.md"] == len(card)

    def test_a_card_with_broken_metadata_is_refused_before_the_commit(self, hub, api: HfApi):
        api.create_repo(REPO)
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            api.upload_file(repo_id=REPO, path_or_fileobj=b"---\na: [1\n---\n", path_in_repo="README.md")
        assert "README.md" not in hub.files(REPO)


class TestCommits:
    def test_folder(self, hub, api: HfApi, pushed: str):
        assert api.list_repo_files(REPO) == [".gitattributes", "config.json", "deep/notes.txt", "model.safetensors"]
        assert hub.files(REPO)["model.safetensors"] == WEIGHTS
        assert [request.received for request in hub.asked("PUT /large")] == [len(WEIGHTS)]
        assert api.model_info(REPO).sha == pushed

    def test_folder_again_commits_nothing(self, hub, api: HfApi, pushed: str, folder: Path):
        assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == pushed
        assert len(hub.asked("PUT /large")) == 1

    def test_changed_file_leaves_the_old_revision_as_it_was(self, api: HfApi, pushed: str, folder: Path):
        (folder / "config.json").write_text('{"a": 2}')
        new = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Two").oid
        assert new != pushed
        assert Path(hf_hub_download(REPO, "config.json")).read_text(encoding="utf-8") == '{"a": 2}'
        assert Path(hf_hub_download(REPO, "config.json", revision=pushed)).read_text(encoding="utf-8") == '{"a": 1}'
        titles = [commit.title for commit in api.list_repo_commits(REPO)]
        assert titles == ["Two", "Upload folder using huggingface_hub", "initial commit"]

    def test_delete_files_and_folders(self, api: HfApi, pushed: str):
        gone = [CommitOperationDelete("config.json"), CommitOperationDelete("deep/")]
        new = [CommitOperationAdd("new.txt", b"new")]
        api.create_commit(REPO, [*gone, *new], commit_message="Tidy")
        assert api.list_repo_files(REPO) == [".gitattributes", "model.safetensors", "new.txt"]
        with pytest.raises(EntryNotFoundError, match="doesn't exist"):
            api.delete_file("config.json", REPO)

    def test_tree(self, api: HfApi, pushed: str):
        top = {entry.path: entry for entry in api.list_repo_tree(REPO)}
        assert sorted(top) == [".gitattributes", "config.json", "deep", "model.safetensors"]
        assert top["model.safetensors"].lfs.size == top["model.safetensors"].size == len(WEIGHTS)
        assert [entry.path for entry in api.list_repo_tree(REPO, "deep")] == ["deep/notes.txt"]
        assert [entry.path for entry in api.get_paths_info(REPO, ["config.json", "absent"])] == ["config.json"]

    def test_pull_request_leaves_main_alone(self, api: HfApi, pushed: str):
        info = api.upload_file(repo_id=REPO, path_or_fileobj=b"other", path_in_repo="config.json", create_pr=True)
        assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
        assert Path(hf_hub_download(REPO, "config.json", revision="refs/pr/1")).read_bytes() == b"other"
        assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == b'{"a": 1}'
        # A second commit goes onto the same pull request.
        api.upload_file(repo_id=REPO, path_or_fileobj=b"more", path_in_repo="more.txt", revision="refs/pr/1")
        assert "more.txt" in api.list_repo_files(REPO, revision="refs/pr/1")
        assert "more.txt" not in api.list_repo_files(REPO)

    def test_branches_and_tags(self, api: HfApi, pushed: str):
        api.create_branch(REPO, branch="feature/wide")
        api.create_branch(REPO, branch="feature/wide", exist_ok=True)
        api.upload_file(repo_id=REPO, path_or_fileobj=b"w", path_in_repo="w.txt", revision="feature/wide")
        api.create_tag(REPO, tag="v1")
        refs = api.list_repo_refs(REPO)
        assert sorted(ref.name for ref in refs.branches) == ["feature/wide", "main"]
        assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", pushed)]
        assert "w.txt" in api.list_repo_files(REPO, revision="feature/wide")
        assert "w.txt" not in api.list_repo_files(REPO, revision="v1")
        api.delete_branch(REPO, branch="feature/wide")
        with pytest.raises(RevisionNotFoundError):
            api.list_repo_files(REPO, revision="feature/wide")

    def test_a_commit_on_an_outdated_parent_is_refused(self, api: HfApi, pushed: str):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="1.txt", parent_commit=pushed)
        with pytest.raises(HfHubHTTPError, match="412"):
            api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="2.txt", parent_commit=pushed)


class TestLists:
    """`list_models`, as far as it is asked here: by tags, by author, by what the id contains."""

    def put(self, hub, repo_id: str, **card) -> None:
        hub.put(repo_id, {"README.md": f"---\n{json.dumps(card)}\n---\n".encode(), "config.json": b"{}"})

    def test_filters(self, hub, api: HfApi):
        self.put(hub, "tester/a", tags=["sae"], base_model="org/lm", base_model_relation="adapter")
        self.put(hub, "tester/b", tags=["sae"], base_model=["org/lm", "org/other"], library_name="saelens")
        self.put(hub, "org/LM-tuned", base_model="org/lm")

        def ids(**asked) -> list[str]:
            return [model.id for model in api.list_models(**asked)]

        assert ids() == ["org/LM-tuned", "tester/a", "tester/b"]
        assert ids(filter="base_model:org/lm") == ["org/LM-tuned", "tester/a", "tester/b"]
        assert ids(filter=["base_model:org/lm", "sae"]) == ["tester/a", "tester/b"]
        assert ids(filter="base_model:adapter:org/lm") == ["tester/a"]
        assert ids(filter=["base_model:org/other", "saelens"]) == ["tester/b"]
        assert ids(search="lm-TUN", author="org") == ["org/LM-tuned"]
        assert ids(author="tester", limit=1) == ["tester/a"]
        assert ids(filter="absent") == []
        assert next(iter(api.list_models(author="org"))).siblings is None
        (model,) = api.list_models(author="org", full=True)
        assert "config.json" in [sibling.rfilename for sibling in model.siblings]

    def test_pages(self, hub, api: HfApi):
        hub.page_size = 3
        for number in range(8):
            self.put(hub, f"tester/m{number}", tags=["sae", "not all" if number else "first"])
        names = [f"tester/m{number}" for number in range(8)]
        assert [model.id for model in api.list_models(filter="sae")] == names
        assert len(hub.asked("GET /api/models$")) == 3
        assert [model.id for model in api.list_models(filter=["sae", "not all"], search="m", limit=4)] == names[1:5]

    def test_private_models_are_listed_for_their_owner(self, hub, api: HfApi):
        api.create_repo(REPO, private=True)
        assert [model.id for model in api.list_models()] == [REPO]
        for token in (False, hub.stranger_token):
            assert list(api.list_models(token=token)) == []


class TestDownloads:
    def test_cached_then_offline(self, hub, pushed: str):
        first = hf_hub_download(REPO, "model.safetensors")
        assert Path(first).read_bytes() == WEIGHTS
        assert hub.bytes_sent("GET .*/large/|GET .*/resolve/") == len(WEIGHTS)
        assert hf_hub_download(REPO, "model.safetensors") == first
        assert hub.bytes_sent("GET .*/large/|GET .*/resolve/") == len(WEIGHTS)
        hub.stop()
        assert hf_hub_download(REPO, "model.safetensors", local_files_only=True) == first
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(REPO, "config.json", local_files_only=True)

    def test_the_token_never_reaches_the_cdn(self, hub, pushed: str):
        hf_hub_download(REPO, "model.safetensors")
        assert {request.token for request in hub.asked("(GET|HEAD) /large")} == {None}
        assert {request.token for request in hub.asked("HEAD .*/resolve/")} == {hub.token}

    def test_snapshot(self, pushed: str, folder: Path):
        copy = Path(snapshot_download(REPO))
        assert copy.name == pushed
        names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
        assert names == {".gitattributes", "config.json", "deep/notes.txt", "model.safetensors"}
        assert (copy / "model.safetensors").read_bytes() == WEIGHTS

    @pytest.mark.parametrize("cdn", [True, False])
    def test_ranges(self, hub, pushed: str, cdn: bool):
        hub.cdn = cdn
        url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
        for asked, start, stop in [("10-19", 10, 20), ("299990-", 299_990, 300_000), ("-7", 299_993, 300_000)]:
            answer = get_session().get(url, headers={"Range": f"bytes={asked}"})
            assert (answer.status_code, answer.content) == (206, WEIGHTS[start:stop])
            assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/300000"
        beyond = get_session().get(url, headers={"Range": "bytes=300000-"})
        assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, "bytes */300000")
        hub.ranges = False
        whole = get_session().get(url, headers={"Range": "bytes=10-19"})
        assert (whole.status_code, len(whole.content)) == (200, 300_000)

    def test_an_interrupted_download_goes_on_where_it_broke(self, hub):
        content = os.urandom(12 << 20)
        hub.put(REPO, {"model.safetensors": content})
        hub.fail("GET /large", drop_after=11 << 20)
        assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == content
        # The client keeps whole pieces of ten binary megabytes.
        assert [request.range for request in hub.asked("GET /large")] == [None, f"bytes={10 << 20}-"]
        assert hub.bytes_sent("GET /large") == (11 << 20) + (2 << 20)

    def test_busy(self, hub, pushed: str):
        hub.fail("GET /large", status=429, retry_after=0)
        assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
        assert [request.status for request in hub.asked("GET /large")] == [429, 200]


class TestUploads:
    def test_an_interrupted_upload_is_sent_again(self, hub, api: HfApi, folder: Path):
        api.create_repo(REPO)
        hub.fail("PUT /large", drop_after=100_000)
        api.upload_folder(repo_id=REPO, folder_path=folder)
        assert hub.files(REPO)["model.safetensors"] == WEIGHTS
        broken, whole = hub.asked("PUT /large")
        assert 100_000 <= broken.received < whole.received == len(WEIGHTS)

    def test_an_upload_that_fails_for_good_commits_nothing(self, hub, api: HfApi, folder: Path):
        api.create_repo(REPO)
        hub.fail("PUT /large", status=400)
        with pytest.raises(RuntimeError, match=r"model\.safetensors"):
            api.upload_folder(repo_id=REPO, folder_path=folder)
        assert list(hub.files(REPO)) == [".gitattributes"]


class TestRights:
    def test_who_am_i(self, hub, api: HfApi):
        assert api.whoami()["name"] == hub.user
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami(token="hf_wrong")

    @pytest.mark.parametrize("name", [REPO, "tester/absent", "absent"])
    @pytest.mark.parametrize("who", ["nobody", "stranger"])
    def test_a_private_repo_looks_absent(self, hub, api: HfApi, name: str, who: str):
        api.create_repo(REPO, private=True)
        api.upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo="config.json")
        token = False if who == "nobody" else hub.stranger_token
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(name, "config.json", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(name, token=token)
        assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == b"{}"
        assert api.model_info(REPO, token=hub.read_token).private

    def test_missing_revision_and_file(self, api: HfApi, pushed: str):
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(REPO, "config.json", revision="absent")
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(REPO, "absent.json")
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision="absent")

    def test_gated(self, hub, api: HfApi, pushed: str):
        api.update_repo_settings(REPO, gated="manual")
        for token in (False, hub.stranger_token):
            with pytest.raises(GatedRepoError):
                hf_hub_download(REPO, "config.json", token=token)
            assert api.model_info(REPO, token=token).gated == "manual"
        hub.repo(REPO).approved.add("stranger")
        assert Path(hf_hub_download(REPO, "config.json", token=hub.stranger_token)).exists()

    def test_writing(self, hub, api: HfApi, pushed: str):
        add = {"repo_id": REPO, "path_or_fileobj": b"x", "path_in_repo": "x.txt"}
        for token, status in ((False, "401"), (hub.read_token, "403"), (hub.stranger_token, "403")):
            with pytest.raises(HfHubHTTPError, match=status):
                api.upload_file(**add, token=token)
        assert "x.txt" not in hub.files(REPO)
        assert api.upload_file(**add, token=hub.stranger_token, create_pr=True).pr_num == 1
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("somebody/sae")

    def test_an_outage(self, hub, pushed: str):
        cached = hf_hub_download(REPO, "config.json")
        hub.stop()
        assert hf_hub_download(REPO, "config.json") == cached
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))).close()
        hub.start()
        assert Path(hf_hub_download(REPO, "deep/notes.txt")).read_text(encoding="utf-8") == "hello"
