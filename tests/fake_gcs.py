"""A server of this process that speaks as much of the JSON API of Google Cloud Storage as gcsfs and TensorStore use.

Source: https://cloud.google.com/storage/docs/json_api/v1. Objects live in memory; `fail` makes requests go wrong.
"""

import base64
import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

# So few in a page that every listing has several.
PAGE = 7


def empty_bucket():
    """Return the server of this process, with one empty bucket named `bucket`; child processes find it too."""
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gs:// paths need the extra gcs")
    fake = _serve()
    fake.buckets, fake.fail, fake.requests = {"bucket": {}}, lambda method, path: None, []
    return fake


@functools.cache
def _serve():
    # One for all tests: TensorStore and gcsfs keep connections, and remember where the store is.
    fake = FakeGcs()
    os.environ |= {
        "STORAGE_EMULATOR_HOST": fake.url,
        "FSSPEC_GCS_TOKEN": "anon",
        "TENSORSTORE_GCS_HTTP_URL": fake.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anybody",
    }
    fsspec.config.set_conf_env(fsspec.config.conf)
    return fake


class FakeGcs:
    """Buckets and their objects.

    Attributes:
        buckets: name -> object name -> (content, generation).
        fail: given the method of a request and its path, where the name of an object is the end, returns the status it
            ends with, or None to serve it.
        requests: (method, path) of all requests so far.
    """

    def __init__(self):
        handler = type("Handler", (_Handler,), {"store": self})
        self.lock, self.generation, self.uploads = threading.RLock(), 1000, []
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def names(self, prefix=""):
        """Return the names of the objects of `bucket` under a prefix."""
        return sorted(name for name in self.buckets["bucket"] if name.startswith(prefix))

    def read(self, name):
        """Return the content of an object of `bucket`."""
        return self.buckets["bucket"][name][0]

    def write(self, name, content, bucket="bucket"):
        """Put an object in its place; return its generation."""
        with self.lock:
            self.generation += 1
            self.buckets[bucket][name] = (bytes(content), self.generation)
            return self.generation

    def put_folder(self, folder, name):
        """Copy a local folder into `bucket` under a name."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments):
        # gcsfs asks twice at once and hangs up on the slower answer.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*arguments)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes: without this each answer waits for an acknowledgement of the first.
    disable_nagle_algorithm = True

    def handle_any(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = urllib.parse.unquote(url.path)
        if path.startswith("/upload"):
            name = self.query.get("name") or json.loads(re.search(rb"{.*}", self.body)[0])["name"]
            path += f"/{name}"
        self.store.requests.append((self.command, path))
        if status := self.store.fail(self.command, path):
            return self.error(status, "made to fail")
        path = re.sub("^/(upload|download)?/?storage/v1/b/", "", url.path)
        bucket, *rest = map(urllib.parse.unquote, path.split("/"))
        if bucket not in self.store.buckets:
            return self.error(404, "The specified bucket does not exist.")
        with self.store.lock:
            if url.path.startswith("/upload"):
                return self.upload(bucket, name)
            if not rest:
                return self.answer({"kind": "storage#bucket", "name": bucket})
            if len(rest) == 1:
                return self.list(bucket)
            return self.object(bucket, *rest[1:])

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def upload(self, bucket, name):
        kind = self.query.get("uploadType")
        if "upload_id" in self.query:
            upload = self.store.uploads[int(self.query["upload_id"])]
            upload["content"] += self.body
            if not self.headers["Content-Range"].endswith(f"/{len(upload['content'])}"):
                return self.send(308, b"", {"Range": f"bytes=0-{len(upload['content']) - 1}"})
            return self.put(bucket, upload["name"], upload["content"])
        if kind == "resumable":
            self.store.uploads.append({"name": name, "content": b""})
            number = len(self.store.uploads) - 1
            return self.send(200, b"", {"Location": f"{self.store.url}{self.path}&upload_id={number}"})
        if kind == "multipart":
            mark = b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            content = self.body.split(mark, 2)[2].split(b"\n\n", 1)[1].rsplit(b"\n" + mark, 1)[0]
            return self.put(bucket, name, content)
        return self.put(bucket, name, self.body)

    def put(self, bucket, name, content):
        if not self.matches(self.store.buckets[bucket].get(name, (b"", 0))[1]):
            return self.error(412, "At least one of the pre-conditions you specified did not hold.")
        self.store.write(name, content, bucket)
        return self.answer(self.describe(bucket, name))

    def object(self, bucket, name, *verb):
        objects = self.store.buckets[bucket]
        if name not in objects:
            return self.error(404, f"No such object: {bucket}/{name}")
        content, generation = objects[name]
        if not self.matches(generation):
            return self.error(304 if "ifGenerationNotMatch" in self.query else 412, "precondition")
        if verb:
            to = verb[-1]
            self.store.write(to, content, verb[2] if verb[0] == "rewriteTo" else bucket)
            if verb[0] == "moveTo":
                del objects[name]
            found = self.describe(bucket, to)
            return self.answer(found if verb[0] == "moveTo" else {"done": True, "resource": found})
        if self.command == "DELETE":
            del objects[name]
            return self.send(204, b"")
        if self.query.get("alt") != "media":
            return self.answer(self.describe(bucket, name))
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(200, content, headers)
        first = int(wanted[1]) if wanted[1] else max(len(content) - int(wanted[2]), 0)
        last = min(int(wanted[2]), len(content) - 1) if wanted[1] and wanted[2] else len(content) - 1
        if first >= len(content):
            return self.error(416, "not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.send(206, content[first : last + 1], headers)

    def list(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        after, end = self.query.get("pageToken", ""), self.query.get("endOffset")
        items, prefixes = [], []
        for name in sorted(self.store.buckets[bucket]):
            if not name.startswith(prefix) or name < self.query.get("startOffset", "") or (end and name >= end):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entry = name if cut < 0 else name[: cut + 1]
            if entry <= after or (prefixes and entry == prefixes[-1]):
                continue
            if len(items) + len(prefixes) == min(PAGE, int(self.query.get("maxResults", 1000))):
                return self.answer(
                    self.listing(bucket, items, prefixes) | {"nextPageToken": max(items[-1:] + prefixes[-1:])}
                )
            (items if cut < 0 else prefixes).append(entry)
        return self.answer(self.listing(bucket, items, prefixes))

    def listing(self, bucket, items, prefixes):
        found = {"kind": "storage#objects", "prefixes": prefixes}
        return found | {"items": [self.describe(bucket, name) for name in items]}

    def describe(self, bucket, name):
        content, generation = self.store.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "updated": "2026-01-01T00:00:00.000000Z",
            "timeCreated": "2026-01-01T00:00:00.000000Z",
        }

    def matches(self, generation):
        wanted, unwanted = self.query.get("ifGenerationMatch"), self.query.get("ifGenerationNotMatch")
        return wanted in (None, str(generation)) and unwanted != str(generation)

    def answer(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    def error(self, status, message):
        body = b"" if status == 304 else json.dumps({"error": {"code": status, "message": message}}).encode()
        self.send(status, body, {"Content-Type": "application/json; charset=UTF-8"})

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
