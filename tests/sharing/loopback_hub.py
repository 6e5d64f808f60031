"""A small Hub on a loopback socket: what huggingface_hub's client asks of the real one, kept in memory.

Point the client at it with HF_ENDPOINT, in a process that has not imported huggingface_hub yet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors",)
REPO = r"([\w.-]+/[\w.-]+)"


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("0" * 40, "init", {})]})

    def at(self, revision):
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass
class LoopbackHub:
    """State of the hub.

    `fail_uploads`: every upload of a large file is cut off. `refuse_cards`: no card is valid. `broken`: the end of the
    name of files that it answers 500 for. `token`: the one that may write. `asked`: the requests.
    """

    token: str = "hf_test"
    user: str = "me"
    fail_uploads: bool = False
    refuse_cards: bool = False
    broken: str | None = None
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    validated: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def clear(self):
        """Forget everything, as if just begun."""
        self.fail_uploads = self.refuse_cards = False
        self.broken = None
        for held in (self.repositories, self.large_files, self.validated, self.unknown, self.asked):
            held.clear()

    def files(self, repository, revision="main"):
        return self.repositories[repository].at(revision).files

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path, data):
    found = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if path.endswith(LARGE):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def body(self):
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while size := int(self.rfile.readline().strip(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def answer(self, code, data=b"", headers=(), kind="application/json"):
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            headers = {"Content-Type": kind, "Content-Length": str(len(data))} | dict(headers)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refuse(self, code, name):
            self.answer(code, {"error": name}, {"X-Error-Code": name, "X-Error-Message": name})

        @property
        def may_write(self):
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def repository(self, name):
            """The repository, or None after a refusal."""
            found = hub.repositories.get(name)
            if found is None or (found.private and not self.may_write):
                self.refuse(404 if self.may_write else 401, "RepoNotFound")
                return None
            return found

        def route(self):
            path, method = urlsplit(self.path).path, self.command
            hub.asked.append(f"{method} {path}")
            data = self.body() if method in ("POST", "PUT") else b""
            here = f"http://{self.headers['Host']}"
            if path == "/api/whoami-v2":
                return self.answer(200, {"type": "user", "name": hub.user, "orgs": []})
            if path == "/api/validate-yaml":
                hub.validated.append(json.loads(data)["content"])
                if hub.refuse_cards:
                    return self.answer(400, {"errors": [{"message": '"license" must be one of'}], "warnings": []})
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                if not self.may_write:
                    return self.refuse(401, "Unauthorized")
                asked = json.loads(data)
                name = f"{asked.get('organization') or hub.user}/{asked['name']}"
                if name in hub.repositories:
                    return self.answer(409, {"error": "exists", "url": f"{here}/{name}"})
                hub.repositories[name] = Repository(asked.get("private") or asked.get("visibility") == "private")
                return self.answer(200, {"url": f"{here}/{name}", "name": name, "id": name})
            if found := re.fullmatch(r"/large/([0-9a-f]{64})", path):
                if hub.fail_uploads:
                    return self.refuse(400, "BadRequest")  # what a client does not try again
                hub.large_files[found[1]] = data
                return self.answer(200)
            if found := re.fullmatch(rf"/{REPO}\.git/info/lfs/objects/batch", path):
                objects = []
                for asked in json.loads(data)["objects"]:
                    one = {"oid": asked["oid"], "size": asked["size"]}
                    if asked["oid"] not in hub.large_files:
                        one["actions"] = {"upload": {"href": f"{here}/large/{asked['oid']}", "header": {}}}
                    objects.append(one)
                answer = {"transfer": "basic", "objects": objects}
                return self.answer(200, answer, kind="application/vnd.git-lfs+json")
            if found := re.fullmatch(
                rf"/api/models/{REPO}(?:/(preupload|commit|revision|tree|branch)/([^/]+).*)?", path
            ):
                return self.api(found[1], found[2] or "revision", unquote(found[3] or "main"), data, here)
            if found := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
                return self.resolve(found[1], unquote(found[2]), unquote(found[3]))
            if path != "/api/agent-harnesses":  # asked for by the client's telemetry
                hub.unknown.append(f"{method} {self.path}")
            return self.answer(404, {"error": "no such route"})

        def api(self, name, what, revision, data, here):
            repository = self.repository(name)
            if repository is None:
                return None
            if what == "branch":
                if revision in repository.branches:
                    return self.answer(409, {"error": "exists"})
                repository.branches[revision] = [repository.at("main")]
                return self.answer(200, {})
            commit = repository.at(revision)
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            if what == "preupload":
                files = [
                    {
                        "path": asked["path"],
                        "shouldIgnore": False,
                        "uploadMode": "lfs" if asked["path"].endswith(LARGE) else "regular",
                    }
                    for asked in json.loads(data)["files"]
                ]
                return self.answer(200, {"files": files})
            if what == "commit":
                if not self.may_write:
                    return self.refuse(403, "Forbidden")
                return self.commit(repository, name, revision, commit, data, here)
            if what == "tree":
                return self.answer(200, [entry(*item) for item in commit.files.items()])
            return self.answer(
                200,
                {
                    "id": name,
                    "modelId": name,
                    "sha": commit.oid,
                    "private": repository.private,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": path} for path in commit.files],
                },
            )

        def commit(self, repository, name, revision, before, data, here):
            files, message = dict(before.files), ""
            for line in data.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    message = value["summary"]
                elif item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    files[value["path"]] = hub.large_files[value["oid"]]
                elif item["key"] == "deletedFile":
                    files.pop(value["path"], None)
            count = sum(len(commits) for commits in repository.branches.values())
            oid = hashlib.sha1(f"{name} {count} {message}".encode()).hexdigest()
            answer = {"success": True, "commitOid": oid, "commitUrl": f"{here}/{name}/commit/{oid}"}
            if "create_pr=1" in self.path:
                revision = f"refs/pr/{count}"
                repository.branches[revision] = [before]
                answer["pullRequestUrl"] = f"{here}/{name}/discussions/{count}"
            repository.branches[revision].append(Commit(oid, message, files))
            return self.answer(200, answer)

        def resolve(self, name, revision, path):
            repository = self.repository(name)
            if repository is None:
                return None
            commit = repository.at(revision)
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            if hub.broken is not None and path.endswith(hub.broken):
                return self.answer(500)
            data = commit.files.get(path)
            if data is None:
                headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no", "X-Repo-Commit": commit.oid}
                return self.answer(404, b"", headers)
            oid = entry(path, data).get("lfs", {}).get("oid") or git_oid(data)
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                return self.answer(206, data[first : last + 1], headers, "application/octet-stream")
            return self.answer(200, data, headers, "application/octet-stream")

        do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815

    return Handler
