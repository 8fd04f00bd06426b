"""A small Hugging Face Hub on loopback, with write support: the real client speaks to it, and tests break it on purpose.

Everything is held in memory. Large files are served from a second port, as the real Hub's are from a CDN: the client
follows redirects within one origin, and would there miss the headers of the redirect itself.
"""

import atexit
import base64
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".png")
LARGE_SIZE = 1_000_000  # bytes; the real Hub decides by .gitattributes and by size
DATE = "2026-01-01T00:00:00.000Z"  # of everything, so that nothing depends on when a test runs
ANONYMOUS = "Invalid username or password."  # what the real Hub says where a token is missing
BAD_TOKEN = "Invalid credentials in Authorization header"  # the client knows this one by its words

Files = dict[str, bytes]


def is_large(path: str, size: int) -> bool:
    """Whether git would hold only a pointer to the file."""
    return size > LARGE_SIZE or (path.endswith(LARGE_SUFFIXES) and size > 0)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_oid(data: bytes) -> str:
    """The sha1 that git gives to a file."""
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()


def describe(path: str, data: bytes) -> dict[str, Any]:
    """A file as the tree route lists it."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob_oid(data)}
    if is_large(path, len(data)):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()
        entry["oid"] = blob_oid(pointer)
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer)}
    return entry


def list_tree(files: Files, folder: str = "", recursive: bool = True) -> list[dict[str, Any]]:
    """The folders and files beneath a folder."""
    prefix = folder and folder + "/"
    beneath = {path: data for path, data in files.items() if path.startswith(prefix)}
    folders = {path[:at] for path in beneath for at, sign in enumerate(path) if sign == "/" and at > len(prefix)}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": blob_oid(path.encode())} for path in sorted(folders)]
    entries += [describe(path, data) for path, data in sorted(beneath.items())]
    return [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]


def front_matter(readme: str) -> str | None:
    """A card's metadata, unparsed."""
    match = re.match(r"---[ ]*\n(.*?)^---[ ]*$", readme, re.DOTALL | re.MULTILINE)
    return match and match[1]


def card_data(files: Files) -> dict[str, Any]:
    """The plain values and lists of a card's metadata; nested ones, such as `model-index`, are left out."""
    data = {}
    yaml = front_matter(files.get("README.md", b"").decode(errors="replace")) or ""
    for key, value, rest in re.findall(r"^([\w-]+):[ ]*(.*)\n((?:[ -].*\n)*)", yaml, re.MULTILINE):
        items = [line.strip() for line in rest.splitlines()]
        if value and not items:
            data[key] = value.strip("'\"")
        elif items and all(item.startswith("- ") and ": " not in item for item in items):
            data[key] = [item[2:].strip("'\"") for item in items]
    return data


def read_shards(xet_dir: Path) -> dict[str, str]:
    """sha256 -> Xet hash, of the files that a Xet client has put into its `local://` store."""
    found = {}
    for shard in xet_dir.glob("xet/xorbs/shards/*.mdb"):
        data, at = shard.read_bytes(), 48  # records of 48 bytes: one header, then some for each file, then one of 0xff
        while (name := data[at : at + 32]) != b"\xff" * 32:
            flags, segments = struct.unpack_from("<II", data, at + 32)
            verified, described = flags >> 31 & 1, flags >> 30 & 1
            at += 48 * (1 + segments * (1 + verified) + described)
            found[xet_hex(data[at - 48 : at - 16])] = xet_hex(name)
    return found


def xet_hex(digest: bytes) -> str:
    """Xet writes a digest as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


@dataclass(frozen=True)
class Commit:
    parent: str | None
    message: str
    files: Files

    @functools.cached_property
    def sha(self) -> str:
        """Of the content alone: the same history has the same ids in every run."""
        tree = [(path, blob_oid(data)) for path, data in sorted(self.files.items())]
        return hashlib.sha1(json.dumps([self.parent, self.message, tree]).encode()).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False  # only its owners may read its files
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit; pull requests are branches `refs/pr/N`
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)  # large files by sha256; the hub's own dict

    def commit(
        self,
        files: dict[str, bytes | str],
        message: str = "",
        branch: str = "main",
        parent: str | None = None,
        delete: Collection[str] = (),
    ) -> str:
        """Adds files to those of `parent` (the branch's head, if None), and moves the branch."""
        parent = parent or self.branches.get(branch)
        kept = {path: data for path, data in self.files(parent).items() if path not in delete} if parent else {}
        added = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        self.objects.update({sha256(data): data for path, data in added.items() if is_large(path, len(data))})
        commit = Commit(parent, message, kept | added)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag, or a sha of at least seven digits."""
        by_name = self.branches.get(revision) or self.tags.get(revision)
        shas = (sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision))
        return by_name or next(shas, None)

    def files(self, revision: str = "main") -> Files:
        sha = self.resolve(revision)
        if sha is None:
            raise KeyError(revision)
        return dict(self.commits[sha].files)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path and query, as in `LoopbackHub.requests`, contain the pattern.

    A large file's bytes come from `/lfs-storage/{sha256}?filename={path}`.
    """

    pattern: str  # a regular expression
    method: str | None = None  # any
    status: int | None = None  # answered at once, with `body`; the request itself has no effect
    headers: dict[str, str] = field(default_factory=dict)  # added to the answer
    body: bytes = b""
    truncate: int | None = None  # the whole length is promised, this many bytes are sent; leaves HEAD alone
    corrupt: bool = False  # one byte in the middle is flipped; leaves HEAD alone
    delay: float = 0.0  # seconds before the answer
    times: int | None = None  # all

    def takes(self, method: str, path: str) -> bool:
        damages = self.truncate is not None or self.corrupt
        right_method = method == self.method if self.method else not (damages and method == "HEAD")
        return right_method and self.times != 0 and re.search(self.pattern, path) is not None


class Answer(NamedTuple):
    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = {}


def as_json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})


class RefusalError(Exception):
    """Becomes an answer; the client chooses its exception by the code."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        named = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.answer = as_json({"error": message}, status, {name: value for name, value in named.items() if value})


@dataclass
class Request:
    query: dict[str, list[str]]
    body: bytes
    user: str | None

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = []


def route(method: str, path: str) -> Callable:
    """Registers a method of the hub; what `{name}` matches is passed to it, a repo's id as `repo_id`."""
    path = path.replace("{repo}", r"(?P<repo_id>[^/]+(?:/[^/]+)?)").replace("{path}", "(?P<path>.*)")
    pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))

    def register(function: Callable) -> Callable:
        ROUTES.append((method, pattern, function))
        return function

    return register


class LoopbackHub:
    """The server, what it holds, and the faults that it shows; with `xet_dir`, a Xet client may push into that folder."""

    def __init__(self, xet_dir: str | Path | None = None):
        self.xet_dir = xet_dir and Path(xet_dir)
        self.xet_hashes: dict[str, str] = {}  # of the objects that came through Xet
        self.tokens: dict[str, str] = {}  # token -> user
        self.orgs: dict[str, set[str]] = {}  # user -> the names, beside their own, that they may write under
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256, whether committed or only uploaded
        self.requests: list[tuple[str, str]] = []  # (method, path with query), in order
        self.url = self.storage_url = ""
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._servers: list[_Server] = []

    def start(self) -> "LoopbackHub":
        """Listens, unless it does; after a `stop` on the same ports, since the client knows only one endpoint."""
        if self._servers:
            return self
        ports = [urlsplit(url).port or 0 for url in (self.url, self.storage_url)]
        self._servers = [_Server(self, port) for port in ports]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def stop(self) -> None:
        for server in self._servers:
            server.stop()
        self._servers = []

    def add_user(self, name: str, token: str, *orgs: str) -> None:
        self.tokens[token] = name
        self.orgs.setdefault(name, set()).update(orgs)

    def create(self, repo_id: str, files: dict | None = None, *, private: bool = False, gated: bool = False) -> Repo:
        """A repo with one commit, past all checks: the files may have any path."""
        with self._lock:
            self.repos[repo_id] = repo = Repo(private, gated, objects=self.objects)
            repo.commit(files or {}, "initial commit")
            return repo

    def fail(self, pattern: str, **fault) -> None:
        """From now on breaks the requests that a `Fault` of these fields is meant for."""
        self._faults.append(Fault(pattern, **fault))

    def heal(self) -> None:
        self._faults.clear()

    def reset(self) -> None:
        """Forgets everything but its address."""
        with self._lock:
            for memory in (self.tokens, self.orgs, self.repos, self.objects, self.xet_hashes, self.requests, self._faults):
                memory.clear()

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Notes the request; the first fault that is meant for it."""
        with self._lock:
            self.requests.append((method, path))
            fault = next((fault for fault in self._faults if fault.takes(method, path)), None)
            if fault and fault.times is not None:
                fault.times -= 1
            return fault

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> Answer:
        """The right answer, faults aside."""
        url = urlsplit(path)
        method = "GET" if method == "HEAD" else method
        with self._lock:
            try:
                if token is not None and token not in self.tokens:
                    raise RefusalError(401, BAD_TOKEN)
                request = Request(parse_qs(url.query), body, self.tokens.get(token))
                for verb, pattern, function in ROUTES:
                    if verb == method and (match := pattern.fullmatch(url.path)):
                        return function(self, request, **{name: unquote(value) for name, value in match.groupdict().items()})
                raise RefusalError(404, f"No route for {method} {url.path}")
            except RefusalError as refusal:
                return refusal.answer

    def _owns(self, user: str | None, repo_id: str) -> bool:
        return repo_id.split("/")[0] in {user, *self.orgs.get(user, ())}

    def _repo(self, request: Request, repo_id: str, need: str = "see") -> Repo:
        """The repo, where the user may "see" it, "read" its files, open a "pull" request, or "write"."""
        repo, owns = self.repos.get(repo_id), self._owns(request.user, repo_id)
        if repo is None or (repo.private and not owns):
            raise RefusalError(*((404, "Repository not found") if request.user else (401, ANONYMOUS)), "RepoNotFound")
        if need == "read" and repo.gated and not owns:
            status, remedy = (403, f"ask for access at {self.url}/{repo_id}") if request.user else (401, "log in")
            raise RefusalError(status, f"Access to model {repo_id} is restricted. Please {remedy}.", "GatedRepo")
        if need in ("pull", "write") and request.user is None:
            # With the code that makes the client raise what it raises for the real Hub's https.
            raise RefusalError(401, ANONYMOUS, "RepoNotFound")
        if need == "write" and not owns:
            raise RefusalError(403, "Authorization error.")
        return repo

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        if request.user is None:
            raise RefusalError(401, ANONYMOUS)
        orgs = [{"type": "org", "name": org} for org in sorted(self.orgs.get(request.user, ()))]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return as_json({"type": "user", "id": "1", "name": request.user, "orgs": orgs, "auth": token})

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Answer:
        if request.user is None:
            raise RefusalError(401, ANONYMOUS)
        wanted = request.json()
        repo_id = f"{wanted.get('organization') or request.user}/{wanted['name']}"
        if not self._owns(request.user, repo_id):
            raise RefusalError(403, "You don't have the rights to create a model under this namespace")
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            return as_json({"error": "You already created this model repo", "url": url}, 409)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES)
        self.create(repo_id, {".gitattributes": attributes}, private=wanted.get("visibility") == "private")
        return as_json({"url": url})

    @route("POST", "/api/validate-yaml")
    def _validate(self, request: Request) -> Answer:
        yaml = front_matter(request.json()["content"])
        if yaml is None:
            return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        if not re.search(r"^[\w-]+:(\s|$)", yaml, re.MULTILINE):
            return as_json({"errors": [{"message": "YAML metadata must be a mapping"}], "warnings": []}, 400)
        return as_json({"errors": [], "warnings": []})

    @route("GET", "/api/models")
    def _models(self, request: Request) -> Answer:
        return as_json([])

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def _preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self._repo(request, repo_id, "pull" if "create_pr" in request.query else "write")
        held = repo.files(self._sha(repo, revision))
        files = []
        for file in request.json()["files"]:
            large, data = is_large(file["path"], file["size"]), held.get(file["path"])
            oid = None if data is None else sha256(data) if large else blob_oid(data)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _batch(self, request: Request, repo_id: str) -> Answer:
        self._repo(request, repo_id, "pull")
        objects = request.json()["objects"]
        for item in objects:
            if item["oid"] not in self.objects:
                item["actions"] = {"upload": {"href": f"{self.storage_url}/lfs-storage/{item['oid']}"}}
        return as_json({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs-storage/{oid}")
    def _store(self, request: Request, oid: str) -> Answer:
        if sha256(request.body) != oid:
            raise RefusalError(400, f"the body's sha256 is {sha256(request.body)}")
        self.objects[oid] = request.body
        return Answer()

    @route("GET", "/api/models/{repo}/xet-{access}-token/{revision}")
    def _xet_token(self, request: Request, repo_id: str, access: str, revision: str) -> Answer:
        self._repo(request, repo_id, access)
        if self.xet_dir is None:
            raise RefusalError(404, "This hub has no Xet storage")
        store, end = f"local://{self.xet_dir}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(end)}
        return as_json({"casUrl": store, "accessToken": "xet", "exp": end}, headers=headers)

    def _take_from_xet(self, oid: str, size: int) -> None:
        """Makes an object of what a client has put into the store; nothing else in this file needs the client's library."""
        from hf_xet import XetFileInfo, XetSession

        name = read_shards(self.xet_dir).get(oid)
        if name is None:
            return
        target = self.xet_dir / oid
        with XetSession().new_file_download_group(endpoint=f"local://{self.xet_dir}") as group:
            group.start_download_file(XetFileInfo(name, size), str(target))
        self.objects[oid], self.xet_hashes[oid] = target.read_bytes(), name
        target.unlink()

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def _commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        pull = "create_pr" in request.query
        repo = self._repo(request, repo_id, "pull" if pull else "write")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head, asked = self._sha(repo, revision), header.get("parentCommit")
        if revision not in repo.branches:
            raise RefusalError(400, f"Not a branch: {revision}")
        if asked and not pull and not head.startswith(asked):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        added, deleted = {}, []
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "deletedFile":
                deleted.append(value["path"])
            elif kind == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.objects and self.xet_dir:
                    self._take_from_xet(value["oid"], value["size"])
                if value["oid"] not in self.objects:
                    raise RefusalError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                added[value["path"]] = self.objects[value["oid"]]
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
        branch = f"refs/pr/{number}" if pull else revision
        message = "\n\n".join(filter(None, [header["summary"], header.get("description")]))
        sha = repo.commit(added, message, branch, self._sha(repo, asked) if pull and asked else head, deleted)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"}
        return as_json(answer | ({"pullRequestUrl": f"{self.url}/{repo_id}/discussions/{number}"} if pull else {}))

    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    @route("GET", "/api/models/{repo}/tree/{revision}")
    def _tree(self, request: Request, repo_id: str, revision: str, path: str = "") -> Answer:
        repo = self._repo(request, repo_id)
        sha = self._sha(repo, revision)
        entries = list_tree(repo.files(sha), path.strip("/"), request.query.get("recursive") == ["true"])
        for entry in entries:
            if entry.get("lfs", {}).get("oid") in self.xet_hashes:
                entry["xetHash"] = self.xet_hashes[entry["lfs"]["oid"]]
        if path and not entries:
            raise RefusalError(404, f"{path} does not exist on {revision!r}", "EntryNotFound", sha)
        return as_json(entries)

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def _paths_info(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self._repo(request, repo_id)
        asked = parse_qs(request.body.decode()).get("paths", [])
        return as_json([entry for entry in list_tree(repo.files(self._sha(repo, revision))) if entry["path"] in asked])

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._repo(request, repo_id, "read")
        sha = self._sha(repo, revision)
        data = repo.files(sha).get(path)
        if data is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", sha)
        if not is_large(path, len(data)):
            return Answer(data, headers={"X-Repo-Commit": sha, "ETag": f'"{blob_oid(data)}"'})
        oid = sha256(data)
        headers = {"X-Repo-Commit": sha, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        headers["Location"] = f"{self.storage_url}/lfs-storage/{oid}?filename={quote(path)}"
        if oid in self.xet_hashes:
            token = f"{self.url}/api/models/{repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": self.xet_hashes[oid], "Link": f'<{token}>; rel="xet-auth"'}
        return Answer(b"", 302, headers)

    @route("GET", "/lfs-storage/{oid}")
    def _load(self, request: Request, oid: str) -> Answer:
        if oid not in self.objects:
            raise RefusalError(404, "NoSuchKey")
        return Answer(self.objects[oid], headers={"ETag": f'"{oid}"'})

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, request: Request, repo_id: str) -> Answer:
        repo = self._repo(request, repo_id)
        refs = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, sha in repo.branches.items():
            pull = name.startswith("refs/pr/")
            kind, ref = ("pullRequests", name) if pull else ("branches", f"refs/heads/{name}")
            refs[kind].append({"name": name, "ref": ref, "targetCommit": sha})
        refs["tags"] = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha} for name, sha in repo.tags.items()]
        return as_json(refs)

    @route("POST", "/api/models/{repo}/branch/{name}")
    def _branch(self, request: Request, repo_id: str, name: str) -> Answer:
        return self._add_ref(request, repo_id, "branches", name, request.json().get("startingPoint", "main"))

    @route("POST", "/api/models/{repo}/tag/{revision}")
    def _tag(self, request: Request, repo_id: str, revision: str) -> Answer:
        return self._add_ref(request, repo_id, "tags", request.json()["tag"], revision)

    def _add_ref(self, request: Request, repo_id: str, kind: str, name: str, revision: str) -> Answer:
        repo = self._repo(request, repo_id, "write")
        if name in getattr(repo, kind):
            raise RefusalError(409, f"Reference already exists: {name}")
        getattr(repo, kind)[name] = self._sha(repo, revision)
        return Answer()

    @route("GET", "/api/models/{repo}/revision/{revision}")
    @route("GET", "/api/models/{repo}")  # last: it would take `name/refs` for an id
    def _info(self, request: Request, repo_id: str, revision: str = "main") -> Answer:
        repo = self._repo(request, repo_id)
        sha = self._sha(repo, revision)
        files = repo.files(sha)
        card = card_data(files)
        tags = [*card.get("tags", []), *(card[key] for key in ("library_name", "pipeline_tag") if key in card)]
        siblings = []
        for path, data in sorted(files.items()):
            entry = describe(path, data)
            blob = {"size": entry["size"], "blobId": entry["oid"]} if "blobs" in request.query else {}
            if blob and "lfs" in entry:
                blob["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
            siblings.append({"rfilename": path, **blob})
        info = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": sha, "siblings": siblings}
        info |= {"private": repo.private, "gated": repo.gated and "manual", "disabled": False, "downloads": 0, "likes": 0}
        info |= {"lastModified": DATE, "createdAt": DATE, "cardData": card, "tags": tags}
        return as_json(info | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card})


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement of its headers

    def log_message(self, *_) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = hub.take_fault(self.command, self.path) or Fault("")
        time.sleep(fault.delay)
        if fault.status is not None:
            answer = Answer(fault.body, fault.status)
        else:
            authorization = self.headers.get("Authorization", "")
            token = authorization.removeprefix("Bearer ") if authorization else None
            answer = self._cut(hub.answer(self.command, self.path, token, body))
        self._send(answer, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _cut(self, answer: Answer) -> Answer:
        """The part that the request asks for."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or answer.status != 200:
            return answer
        size = len(answer.body)
        first, last = (int(digits) if digits else None for digits in match.groups())
        start, end = (size - last, size) if first is None else (first, size if last is None else min(last + 1, size))
        if not 0 <= start < end:
            return Answer(b"", 416, {"Content-Range": f"bytes */{size}"})
        return Answer(answer.body[start:end], 206, answer.headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"})

    def _send(self, answer: Answer, fault: Fault) -> None:
        body, status, headers = answer
        if fault.corrupt and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(body)), **headers, **fault.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: fault.truncate])
        self.close_connection |= fault.truncate is not None


class _Server(ThreadingHTTPServer):
    """One port."""

    daemon_threads = True
    request_queue_size = 64  # the client opens eight connections at once

    def __init__(self, hub: LoopbackHub, port: int):
        self.hub = hub
        self.connections: set = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that gave up is no error
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):  # kept alive, they would still be answered
            with suppress(OSError):
                connection.shutdown(2)


@functools.cache
def start_for_session() -> LoopbackHub:
    """The one hub of a test session; huggingface_hub reads the environment as it is first imported."""
    if "huggingface_hub" in sys.modules:
        raise RuntimeError("huggingface_hub is imported already: call start_for_session() before it")
    hub = LoopbackHub().start()
    home = tempfile.mkdtemp(prefix="loopback-hub-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        os.environ.pop(name, None)
    on = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")  # the last asks PyPI
    os.environ.update({"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0", **dict.fromkeys(on, "1")})
    return hub
