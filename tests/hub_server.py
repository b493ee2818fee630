"""A small Hugging Face Hub on loopback: the part of its protocol that the client uses for models.

Repositories live in memory as lists of commits. Weights are stored as large files: ``resolve``
answers them with a redirect, as the real one does. Faults are injected by ``Hub.fault``.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pth")


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        before = self.commits.get(self.branches.get(branch, ""), {})
        oid = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()  # noqa: S324
        self.commits[oid] = {**before, **files}
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Fault:
    method: str
    path: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # close the connection half-way through the body


class Hub:
    """A server; ``with Hub() as hub`` runs it. Tokens: "writer" owns me/*, "reader" only reads."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.elsewhere = f"http://localhost:{port}"  # another host: it must not see the token

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> str:
        repository = self.repositories.setdefault(name, Repository(**options))
        return repository.commit(files)

    def fault(self, path: str, method: str = "GET", times: int = 1, **what: Any) -> None:
        self.faults.append(Fault(method, path, times, **what))

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and method == fault.method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, method: str, path: str) -> list[dict[str, str]]:
        """Headers of the requests that came in."""
        return [h for m, p, h in self.log if m == method and re.search(path, p)]


class RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.read_chunks()
        self.hub.log.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        self.fault = self.hub.next_fault(self.command, path)
        try:
            if self.fault is not None and self.fault.status:
                raise RefusedError(self.fault.status, "", "injected")
            for method, pattern, act in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    with self.hub.lock:
                        status, headers, content = act(self, *found.groups())
                    return self.send(status, headers, content)
            raise RefusedError(404, "", f"no route for {self.command} {path}")
        except RefusedError as refusal:
            named = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            more = self.fault.headers if self.fault is not None else {}
            self.send(refusal.status, {**{k: v for k, v in named.items() if v}, **more}, b"")

    def read_chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.cut:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content)

    def user(self) -> str:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in ("", "writer", "reader"):
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return given

    def repository(self, name: str, write: bool = False) -> Repository:
        user, found = self.user(), self.hub.repositories.get(name)
        if found is None or (found.private and not user):
            raise RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        if found.gated and user != "writer":
            raise RefusedError(403, "GatedRepo", f"Access to model {name} is restricted")
        if write and user != "writer":
            raise RefusedError(403, "", "You don't have the rights to write")
        return found

    def at(self, name: str, revision: str) -> tuple[Repository, str]:
        repository = self.repository(name)
        oid = repository.find(revision)
        if oid is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, oid

    def resolve(self, name: str, revision: str, file: str) -> Any:
        repository, oid = self.at(name, revision)
        content = repository.commits[oid].get(file)
        headers = {"X-Repo-Commit": oid}
        if content is None:
            self.fault = Fault("", "", 0, headers=headers)
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        if not file.endswith(LARGE):
            return 200, {**headers, "ETag": f'"{digest(content)[:40]}"', **size(content)}, content
        self.hub.uploads[digest(content)] = content
        return (
            302,
            {
                **headers,
                "X-Linked-Etag": f'"{digest(content)}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.hub.elsewhere}/cdn/{digest(content)}",
            },
            b"",
        )

    def large_file(self, oid: str) -> Any:
        content = self.hub.uploads[oid]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if asked is None:
            return 200, {**headers, **size(content)}, content
        start = int(asked[1])
        part = content[start:]
        where = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return 206, {**headers, "Content-Range": where, **size(part)}, part

    def info(self, name: str, revision: str = "main") -> Any:
        repository, oid = self.at(name, revision)
        files = [{"rfilename": file} for file in repository.commits[oid]]
        return reply({"id": name, "sha": oid, "private": repository.private, "siblings": files})

    def tree(self, name: str, revision: str) -> Any:
        repository, oid = self.at(name, revision)
        return reply(
            [
                {
                    **{"type": "file", "path": file, "size": len(content)},
                    "oid": digest(content)[:40],
                    **({"lfs": large(content)} if file.endswith(LARGE) else {}),
                }
                for file, content in repository.commits[oid].items()
            ]
        )

    def create(self) -> Any:
        asked = json.loads(self.body)
        owner = asked.get("organization") or "me"
        if self.user() != "writer" or owner != "me":
            raise RefusedError(
                403 if self.user() else 401, "", "You don't have the rights to create"
            )
        name = f"{owner}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            private = asked.get("private", asked.get("visibility") == "private")
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].commit({".gitattributes": b""})
        return reply({"url": f"{self.hub.endpoint}/{name}"}, status)

    def branch(self, name: str, branch: str) -> Any:
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            return reply({"error": "exists"}, 409)
        repository.branches[branch] = repository.branches["main"]
        return reply({})

    def preupload(self, name: str, _: str) -> Any:
        self.repository(name, write=True)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        return reply({"files": modes})

    def batch(self, name: str) -> Any:
        self.repository(name, write=True)
        objects = [
            {
                **wanted,
                "actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{wanted['oid']}"}},
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        return reply({"transfer": "basic", "objects": objects})

    def take(self, oid: str) -> Any:
        if digest(self.body) != oid:
            raise RefusedError(400, "", "wrong digest")
        self.hub.uploads[oid] = self.body
        return reply({})

    def commit(self, name: str, branch: str) -> Any:
        repository = self.repository(name, write=True)
        files: dict[str, bytes] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        oid = repository.commit(files, branch)
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        return reply({"success": True, "commitOid": oid, "commitUrl": url})

    def whoami(self) -> Any:
        if not self.user():
            raise RefusedError(401, "", "Invalid username or password.")
        return reply({"type": "user", "name": "me", "orgs": []})

    def validate(self) -> Any:
        return reply({"errors": [], "warnings": []})


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def large(content: bytes) -> dict[str, Any]:
    return {"oid": digest(content), "size": len(content), "pointerSize": 134}


def size(content: bytes) -> dict[str, str]:
    return {"Content-Length": str(len(content))}


def reply(content: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


_ID = r"([\w.-]+/[\w.-]+?)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Any]]] = [
    (("HEAD", "GET"), rf"/{_ID}/resolve/(.+?)/([^/]+)", Handler.resolve),
    (("HEAD", "GET"), r"/cdn/(\w+)", Handler.large_file),
    (("GET",), rf"/api/models/{_ID}/tree/(.+)", Handler.tree),
    (("GET",), rf"/api/models/{_ID}/revision/(.+)", Handler.info),
    (("GET",), rf"/api/models/{_ID}", Handler.info),
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("POST",), rf"/api/models/{_ID}/branch/(.+)", Handler.branch),
    (("POST",), rf"/api/models/{_ID}/preupload/(.+)", Handler.preupload),
    (("POST",), rf"/api/models/{_ID}/commit/(.+)", Handler.commit),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/upload/(\w+)", Handler.take),
]
