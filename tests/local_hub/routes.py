"""What the Hub answers: a method for each address that the client calls, and the table of them."""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable
from urllib.parse import parse_qs, unquote, urlencode

import yaml
from local_hub.handler import Handler
from local_hub.store import Account, File, HubError, Repo, front_matter, is_large

PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


class HubHandler(Handler):
    # Who asks

    def account(self) -> Account | None:
        if self.entry.token is None:
            return None
        if self.entry.token not in self.hub.accounts:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.accounts[self.entry.token]

    def readable(self, kinds: str, repo_id: str) -> Repo:
        account = self.account()
        repo = self.hub.repos.get((kinds.removesuffix("s"), repo_id))
        if repo is not None and (not repo.private or (account is not None and account.name == repo.owner)):
            return repo
        # As the Hub does: without a token it does not tell a private repo from one that is not there. The Hub sends no
        # code then; the client guesses it from the address, which it does for https alone.
        if account is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def check_writes(self, owner: str | None) -> Account:
        """Whoever asks may write to what belongs to `owner`; None for what anybody may write to."""
        account = self.account()
        if account is None:
            raise HubError(401, "Invalid username or password.")
        if account.role != "write":
            raise HubError(403, "You must use a token with write access")
        if owner not in (None, account.name):
            raise HubError(403, f"You don't have the rights to write under the namespace {owner}")
        return account

    def check_downloads(self, repo: Repo) -> None:
        account = self.account()
        if repo.gated and (account is None or account.name not in {repo.owner, *repo.approved}):
            where = f"Access to {repo.kind} {repo.id} is restricted. You must have access to it and be authenticated."
            raise HubError(401 if account is None else 403, where, "GatedRepo")

    # Routes

    def answer(self, quoted_path: str) -> None:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, quoted_path)
            if match and self.command in method.split():
                return action(self, *(part if part is None else unquote(part) for part in match.groups()))
        raise HubError(404, f"Sorry, we can't find the page you are looking for: {self.command} {self.route}")

    def whoami(self) -> None:
        account = self.account()
        if account is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": account.role}}
        self.send_json({"type": "user", "name": account.name, "orgs": [], "auth": auth})

    def validate_yaml(self) -> None:
        try:
            data = front_matter(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            return self.send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return self.send_json({"errors": [], "warnings": warnings})

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        kind = asked.get("type") or "model"
        account = self.check_writes(asked.get("organization"))
        repo_id = f"{account.name}/{asked['name']}"
        url = f"{self.hub.endpoint}/{PREFIXES[kind + 's']}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos[kind, repo_id] = Repo(repo_id, kind, private, asked.get("sdk"))
        self.send_json({"url": url, "name": repo_id, "id": repo_id})

    def delete_repo(self) -> None:
        asked = json.loads(self.body)
        account = self.check_writes(asked.get("organization"))
        repo = self.readable((asked.get("type") or "model") + "s", f"{account.name}/{asked['name']}")
        del self.hub.repos[repo.kind, repo.id]
        self.send_json({})

    def settings(self, kinds: str, repo_id: str) -> None:
        repo, asked = self.readable(kinds, repo_id), json.loads(self.body)
        self.check_writes(repo.owner)
        repo.gated = bool(asked.get("gated", repo.gated))
        repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
        self.send_json({})

    def auth_check(self, kinds: str, repo_id: str) -> None:
        self.check_downloads(self.readable(kinds, repo_id))
        self.send_json({})

    def info(self, kinds: str, repo_id: str, revision: str | None) -> None:
        blobs = "blobs" in self.query or "siblings" in self.query.get("expand", [])
        self.send_json(self.readable(kinds, repo_id).describe(revision or "main", blobs))

    def list_models(self) -> None:
        """Those with all tags asked for, of an author, whose id contains a text; a page at a time."""

        def asked(name: str) -> str:
            return self.query.get(name, [""])[0]

        account, (search, author) = self.account(), (asked("search").lower(), asked("author"))
        repos = [repo for (kind, _), repo in sorted(self.hub.repos.items()) if kind == "model"]
        found = []
        for repo in repos:
            about = repo.describe("main", blobs=False)
            visible = not repo.private or (account is not None and account.name == repo.owner)
            fits = search in repo.id.lower() and author in ("", repo.owner)
            if visible and fits and {*self.query.get("filter", [])} <= {*about["tags"]}:
                hidden = () if asked("full") else ("siblings", "cardData", "sha", "lastModified", "author")
                found.append({key: value for key, value in about.items() if key not in hidden})
        size, start = min(int(asked("limit") or self.hub.page_size), self.hub.page_size), int(asked("cursor") or 0)
        headers = {}
        if start + size < len(found):
            following = urlencode({**self.query, "cursor": [str(start + size)]}, doseq=True)
            headers["Link"] = f'<{self.hub.endpoint}/api/models?{following}>; rel="next"'
        self.send_json(found[start : start + size], **headers)

    def tree(self, kinds: str, repo_id: str, revision: str, folder: str | None) -> None:
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        self.send_json(self.readable(kinds, repo_id).tree(revision, (folder or "").strip("/"), recursive))

    def paths_info(self, kinds: str, repo_id: str, revision: str) -> None:
        paths = parse_qs(self.body.decode()).get("paths", [])
        entries = self.readable(kinds, repo_id).tree(revision, "", recursive=True)
        self.send_json([entry for entry in entries if entry["path"] in paths])

    def refs(self, kinds: str, repo_id: str) -> None:
        found: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        group = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
        for ref, sha in self.readable(kinds, repo_id).refs.items():
            _, where, name = ref.split("/", 2)
            found[group[where]].append({"name": name, "ref": ref, "targetCommit": sha})
        self.send_json(found)

    def commits(self, kinds: str, repo_id: str, revision: str) -> None:
        history = self.readable(kinds, repo_id).history(revision)
        date = "2026-01-01T00:00:00.000Z"
        shown = [(commit, {"title": commit.title, "message": commit.description, "date": date}) for commit in history]
        self.send_json([{"id": c.sha, "authors": [{"user": c.author}], **about} for c, about in shown])

    def new_ref(self, where: str, kinds: str, repo_id: str, name: str, start: str) -> None:
        repo = self.readable(kinds, repo_id)
        self.check_writes(repo.owner)
        ref = f"refs/{where}/{name}"
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(start).sha
        self.send_json({})

    def create_branch(self, kinds: str, repo_id: str, name: str) -> None:
        self.new_ref("heads", kinds, repo_id, name, json.loads(self.body or b"{}").get("startingPoint") or "main")

    def create_tag(self, kinds: str, repo_id: str, revision: str) -> None:
        self.new_ref("tags", kinds, repo_id, json.loads(self.body)["tag"], revision)

    def delete_branch(self, kinds: str, repo_id: str, name: str) -> None:
        repo = self.readable(kinds, repo_id)
        self.check_writes(repo.owner)
        if name == "main":
            raise HubError(403, "Cannot delete branch main")
        if repo.refs.pop(f"refs/heads/{name}", None) is None:
            raise HubError(404, f"Not a branch: {name}", "RevisionNotFound")
        self.send_json({})

    # Uploads

    def preupload(self, kinds: str, repo_id: str, revision: str) -> None:
        repo = self.readable(kinds, repo_id)
        self.check_writes(None if "create_pr" in self.query else repo.owner)
        present = repo.at(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if is_large(path, asked["size"]) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in present:
                answers[-1]["oid"] = present[path].etag
        self.send_json({"files": answers})

    def lfs_batch(self, kinds: str | None, repo_id: str) -> None:
        repo = self.readable((kinds or "models/").rstrip("/"), repo_id)
        self.check_writes(None if "ref" not in json.loads(self.body) else repo.owner)
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answers.append({"oid": asked["oid"], "size": asked["size"]})
            if asked["oid"] not in self.hub.large_files:
                upload = {"href": f"{self.hub.cdn_endpoint}/large/{asked['oid']}", "header": {}}
                verify = {"href": f"{self.hub.endpoint}/lfs-verify", "header": {}}
                answers[-1]["actions"] = {"upload": upload, "verify": verify}
        self.send_json({"transfer": "basic", "objects": answers})

    def put_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadDigest: the content is not what its name says")
        self.hub.large_files[oid] = self.body
        self.send(200, b"", {"ETag": f'"{oid}"'})

    def verify_large(self) -> None:
        asked = json.loads(self.body)
        content = self.hub.large_files.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise HubError(404, f"Object {asked['oid']} was not uploaded")
        self.send_json({})

    def commit(self, kinds: str, repo_id: str, revision: str) -> None:
        repo = self.readable(kinds, repo_id)
        pull_request = self.query.get("create_pr") == ["1"]
        author = self.check_writes(None if pull_request else repo.owner)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        added = {line["value"]["path"]: self.uploaded(line) for line in lines if line["key"] in ("file", "lfsFile")}
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        deleted += [line["value"]["path"].rstrip("/") + "/" for line in lines if line["key"] == "deletedFolder"]
        title, description, parent = header["summary"], header.get("description", ""), header.get("parentCommit")
        made, ref = repo.commit(revision, added, deleted, title, description, author.name, parent, pull_request)
        home = f"{self.hub.endpoint}/{PREFIXES[kinds]}{repo_id}"
        answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{home}/commit/{made.sha}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{home}/discussions/{ref.rsplit('/', 1)[-1]}"
        self.send_json(answer)

    def uploaded(self, line: dict) -> File:
        value = line["value"]
        if line["key"] == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise HubError(400, f"The large file {value['path']} was never uploaded")
            return File(self.hub.large_files[value["oid"]], large=True)
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error as error:
            raise HubError(400, f"{value['path']} is not base64: {error}") from error
        return File(content, large=False)

    # Downloads

    def resolve(self, kinds: str | None, repo_id: str, revision: str, path: str) -> None:
        repo = self.readable((kinds or "models/").rstrip("/"), repo_id)
        self.check_downloads(repo)
        commit, file = repo.file(revision, path)
        headers: dict[str, str | None] = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        if not file.large:
            return self.send_content(file.content, headers)
        headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        if not self.hub.cdn:
            return self.send_content(file.content, headers)
        # The ETag of the redirect itself is another one, as on the Hub.
        location = f"{self.hub.cdn_endpoint}/large/{file.sha256}?filename={path.rsplit('/', 1)[-1]}"
        return self.send(302, b"", {**headers, "ETag": f'"{repo.id}:{file.sha256}"', "Location": location})

    def get_large(self, oid: str) -> None:
        if oid not in self.hub.large_files:
            raise HubError(404, "NoSuchKey")
        self.send_content(self.hub.large_files[oid], {"ETag": f'"{oid[:32]}"'})


_REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
_GIT = r"/(datasets/|spaces/)?([^/]+(?:/[^/]+)?)"
_MISSING = r"/api/(models|datasets|spaces)/([^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("POST", "/api/repos/create", HubHandler.create_repo),
    ("DELETE", "/api/repos/delete", HubHandler.delete_repo),
    ("GET", "/api/models", HubHandler.list_models),
    ("PUT", f"{_REPO}/settings", HubHandler.settings),
    ("GET", f"{_REPO}/auth-check", HubHandler.auth_check),
    ("GET", f"{_REPO}/refs", HubHandler.refs),
    ("GET", f"{_REPO}/commits/([^/]+)", HubHandler.commits),
    ("GET", f"{_REPO}(?:/revision/([^/]+))?", HubHandler.info),
    ("GET", f"{_MISSING}", HubHandler.readable),
    ("GET", f"{_REPO}/tree/([^/]+)(/.+)?", HubHandler.tree),
    ("POST", f"{_REPO}/paths-info/([^/]+)", HubHandler.paths_info),
    ("POST", f"{_REPO}/branch/([^/]+)", HubHandler.create_branch),
    ("DELETE", f"{_REPO}/branch/([^/]+)", HubHandler.delete_branch),
    ("POST", f"{_REPO}/tag/([^/]+)", HubHandler.create_tag),
    ("POST", f"{_REPO}/preupload/([^/]+)", HubHandler.preupload),
    ("POST", f"{_REPO}/commit/([^/]+)", HubHandler.commit),
    ("POST", rf"{_GIT}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("POST", "/lfs-verify", HubHandler.verify_large),
    ("PUT", "/large/([0-9a-f]{64})", HubHandler.put_large),
    ("GET HEAD", "/large/([0-9a-f]{64})", HubHandler.get_large),
    ("GET HEAD", f"{_GIT}/resolve/([^/]+)/(.+)", HubHandler.resolve),
]
