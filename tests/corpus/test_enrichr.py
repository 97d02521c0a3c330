"""Downloads against a small HTTP server on loopback that can be told to fail."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tcc_jax.corpus import enrichr
from tcc_jax.terminal import UserError

GMT = b"Apoptosis\t\tTP53\tBAX\tCASP3\t\nCell cycle\t\tCDK1\tCCNB1\t\n"
HGNC = b"hgnc_id\tsymbol\tstatus\talias_symbol\tprev_symbol\nHGNC:11998\tTP53\tApproved\tp53\t\n"
Answer = Callable[[BaseHTTPRequestHandler], None]


def whole(body: bytes, status: int = 200) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def cut(body: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) + 20))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def chunked(body: bytes, end: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n" + end)

    return answer


def without_length(body: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def silence(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection before a byte of the answer."""


def redirect(url: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


class FaultyServer(ThreadingHTTPServer):
    """Answers each library with its list of answers, one a request, the last one for ever; others with 404."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.answers: dict[str, list[Answer]] = {"HGNC": [whole(HGNC)]}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, FaultyServer)
        url = urlsplit(self.path)
        name = "HGNC" if url.path == "/hgnc" else parse_qs(url.query)["libraryName"][0]
        if name != "HGNC":
            assert url.path == "/Enrichr/geneSetLibrary"
            assert parse_qs(url.query)["mode"] == ["text"]
        server.requests.append(name)
        answers = server.answers.get(name, [whole(b"not found", 404)])
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def get(server: FaultyServer, tmp_path: Path) -> Callable[..., list[enrichr.Download]]:
    def get(*libraries: str, **options: Any) -> list[enrichr.Download]:
        sleep = options.pop("sleep", lambda seconds: None)
        urls = {"enrichr_url": f"{server.url}/Enrichr/", "hgnc_url": f"{server.url}/hgnc"}
        settings = enrichr.Options(**{"hgnc": False, "attempts": 3, "timeout_seconds": 5.0, **urls, **options})
        return enrichr.download(tmp_path / "new" / "out", libraries, settings, sleep)

    return get


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def states(files: list[enrichr.Download]) -> dict[str, str]:
    return {file.file: file.state for file in files}


def test_a_library_and_the_hgnc_table_arrive_byte_for_byte_and_are_recorded(server, get, tmp_path):
    server.answers["A"] = [whole(GMT)]
    assert states(get("A", hgnc=True)) == {"A.gmt": "downloaded", "hgnc_complete_set.tsv": "downloaded"}
    out = tmp_path / "new" / "out"
    assert names(out) == ["A.gmt", "downloads.json", "hgnc_complete_set.tsv"]
    assert (out / "A.gmt").read_bytes() == GMT
    assert (out / "hgnc_complete_set.tsv").read_bytes() == HGNC
    record = json.loads((out / "downloads.json").read_text())
    assert record["format_version"] == 1
    entry = record["files"]["A.gmt"]
    assert entry["sha256"] == hashlib.sha256(GMT).hexdigest()
    assert entry["bytes"] == len(GMT)
    assert entry["url"] == f"{server.url}/Enrichr/geneSetLibrary?mode=text&libraryName=A"
    assert entry["date"].endswith("+00:00")


@pytest.mark.parametrize(
    "fault",
    [
        whole(b"", 500),
        whole(b"", 503),
        whole(b"", 429),
        cut(GMT),
        chunked(GMT, end=b""),
        without_length(GMT[:-5]),
        silence,
    ],
    ids=["500", "503", "429", "cut", "cut-chunk", "cut-without-length", "silence"],
)
def test_a_passing_fault_is_tried_again_with_growing_waits(server, get, tmp_path, fault):
    server.answers["A"] = [fault, fault, whole(GMT)]
    waits: list[float] = []
    get("A", sleep=waits.append, backoff_seconds=2.0)
    assert (tmp_path / "new/out/A.gmt").read_bytes() == GMT
    assert 2.0 <= waits[0] <= 3.0
    assert 4.0 <= waits[1] <= 6.0


@pytest.mark.parametrize("answer", [chunked(GMT, end=b"0\r\n\r\n"), without_length(GMT)], ids=["chunked", "no-length"])
def test_a_whole_answer_without_a_length_is_accepted(server, get, answer):
    server.answers["A"] = [answer]
    assert states(get("A")) == {"A.gmt": "downloaded"}


@pytest.mark.parametrize(
    ("fault", "words", "requests"),
    [
        (whole(b"", 500), r"A: HTTP 500 \(3 attempts\)", 3),
        (cut(GMT), r"A: connection cut after \d+ bytes \(3 attempts\)", 3),
        (chunked(GMT, end=b""), r"A: connection lost: .* \(3 attempts\)", 3),
        (whole(b"", 404), "A: HTTP 404", 1),
        (whole(b"\n<!DOCTYPE html>\n<html>\t\t<p>busy\t\t</p></html>\n"), "A: the answer is not GMT", 1),
        (whole(b'{"error": "no such library"}\n'), "A: the answer is not GMT", 1),
        (whole(b"Apoptosis\tTP53\n"), "A: the answer is not GMT", 1),
        (whole(b""), "A: the answer is empty", 1),
        (redirect("http://example.invalid/A"), "A: sent on to http://example.invalid/A, which is not https", 1),
        (redirect("file:///etc/hostname"), "A: ", 1),
        (redirect("https://[bad/"), "A: sent on to a bad address", 1),
    ],
    ids=["500", "cut", "cut-chunk", "404", "html", "json", "one-column", "empty", "http", "file", "bad-address"],
)
def test_a_lasting_fault_is_an_error_that_leaves_nothing(server, get, tmp_path, fault, words, requests):
    server.answers["A"] = [fault]
    with pytest.raises(UserError, match=words):
        get("A")
    assert server.requests == ["A"] * requests
    assert names(tmp_path) == []


def test_the_others_are_downloaded_when_one_fails_and_failures_are_named_by_reason(server, get, tmp_path):
    server.answers |= {"A": [whole(b"", 500)], "B": [whole(GMT)], "C": [whole(b"", 500)], "HGNC": [whole(GMT)]}
    reasons = r"^4 of 5 files failed: A, C: HTTP 500 \(3 attempts\); D: HTTP 404; hgnc_complete_set: .*'symbol'"
    with pytest.raises(UserError, match=reasons):
        get("A", "B", "C", "D", hgnc=True)
    assert names(tmp_path / "new/out") == ["B.gmt", "downloads.json"]


def test_a_finished_file_is_verified_and_not_fetched_again(server, get):
    server.answers |= {"A": [whole(GMT)], "B": [whole(b"", 500)]}
    with pytest.raises(UserError, match="1 of 2 files failed: B"):
        get("A", "B")
    server.answers["B"] = [whole(GMT)]
    server.requests.clear()
    assert states(get("A", "B")) == {"A.gmt": "kept", "B.gmt": "downloaded"}
    assert server.requests == ["B"]


def test_an_edited_file_is_an_error_until_update(server, get, tmp_path):
    server.answers["A"] = [whole(GMT)]
    get("A")
    file = tmp_path / "new/out/A.gmt"
    file.write_bytes(GMT + b"X\t\tTP53\n")
    with pytest.raises(UserError, match=r"A: edited since its download .*--update"):
        get("A")
    assert states(get("A", update=True)) == {"A.gmt": "unchanged"}
    assert file.read_bytes() == GMT


def test_another_content_at_the_server_is_an_error_until_update(server, get, tmp_path):
    server.answers["A"] = [whole(GMT)]
    get("A")
    file, record = tmp_path / "new/out/A.gmt", tmp_path / "new/out/downloads.json"
    before = record.read_bytes()
    newer = GMT + b"New set\t\tTP53\tMDM2\t\n"
    server.answers["A"] = [whole(newer)]
    file.unlink()
    with pytest.raises(UserError, match=r"A: the server's file differs from the one of 20.*--update"):
        get("A")
    assert record.read_bytes() == before
    assert names(file.parent) == ["downloads.json"]
    assert states(get("A", update=True)) == {"A.gmt": "changed"}
    assert file.read_bytes() == newer
    assert json.loads(record.read_text())["files"]["A.gmt"]["sha256"] == hashlib.sha256(newer).hexdigest()
    assert states(get("A")) == {"A.gmt": "kept"}


def test_a_file_that_was_not_recorded_is_never_overwritten_silently(server, get, tmp_path):
    file = tmp_path / "new/out/A.gmt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine\t\tTP53\n")
    server.answers["A"] = [whole(GMT)]
    with pytest.raises(UserError, match="A: the server's file differs from the file already there"):
        get("A")
    assert file.read_bytes() == b"mine\t\tTP53\n"


def test_an_interrupt_keeps_what_is_finished(server, get, tmp_path):
    server.answers |= {"A": [whole(GMT)], "B": [cut(GMT)]}

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get("A", "B", sleep=interrupt)
    assert names(tmp_path / "new/out") == ["A.gmt", "downloads.json"]
    assert states(get("A")) == {"A.gmt": "kept"}


def test_a_host_that_cannot_be_reached_is_not_waited_for_twice(tmp_path):
    with FaultyServer() as closed:
        url = closed.url
    waits: list[float] = []
    with pytest.raises(UserError, match=r"3 of 3 files failed: A: .* cannot be reached"):
        enrichr.download(
            tmp_path / "out", ["A", "B", "C"], enrichr.Options(hgnc=False, enrichr_url=url, attempts=3), waits.append
        )
    assert len(waits) == 2
    assert names(tmp_path) == []


def test_a_server_that_never_answers_times_out(server, get):
    server.answers["A"] = [lambda handler: time.sleep(0.6)]
    with pytest.raises(UserError, match=r"A: connection lost: timed out \(2 attempts\)"):
        get("A", attempts=2, timeout_seconds=0.1)


def test_a_file_over_the_limit_is_refused(server, get, monkeypatch):
    monkeypatch.setattr(enrichr, "MAX_BYTES", 10)
    server.answers["A"] = [whole(GMT)]
    with pytest.raises(UserError, match="A: larger than 10 bytes"):
        get("A")


def test_a_full_disk_is_one_line_that_names_the_file(server, get, tmp_path):
    server.answers |= {"A": [whole(GMT)], "B": [whole(GMT)]}
    get("A")
    (tmp_path / "new/out/.B.gmt.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"B\.gmt: cannot write: No space left"):
        get("A", "B")
    assert names(tmp_path / "new/out") == ["A.gmt", "downloads.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 99, "files": {}}', '{"format_version": 1, "files": 3}'])
def test_a_record_that_cannot_be_read_is_named(get, tmp_path, text):
    (tmp_path / "new/out").mkdir(parents=True)
    (tmp_path / "new/out/downloads.json").write_text(text)
    with pytest.raises(UserError, match=r"downloads\.json: "):
        get("A")


@pytest.mark.parametrize("name", ["../A", "/etc/passwd", "A/B", "..", ".A", "A&mode=json", "A B", "", "A\n", "A" * 200])
def test_a_name_is_never_a_path(server, get, tmp_path, name):
    with pytest.raises(UserError, match="not a library's name"):
        enrichr.choose_libraries([name], any_library=True)
    with pytest.raises(UserError, match="not a library's name"):
        get(name)
    assert server.requests == []
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    ["http://maayanlab.cloud/Enrichr", "ftp://127.0.0.1/", "file:///etc", "nonsense", "https://[bad", "https://a b/"],
)
def test_only_https_or_loopback_addresses_are_taken(get, tmp_path, url):
    for option in ("enrichr_url", "hgnc_url"):
        with pytest.raises(UserError, match="address"):
            get("A", **{option: url})
    assert names(tmp_path) == []


def test_the_manifest_is_consistent_and_current_libraries_are_the_default():
    manifest = enrichr.read_manifest()
    status = {library.name: library.status for library in manifest}
    assert len(status) == len(manifest) > 200
    assert set(status.values()) == {"current", "outdated"}
    for library in manifest:
        if "newer: " in library.note:
            assert library.status == "outdated"
            newer = library.note.split("newer: ")[1].split("; ")[0]
            assert all(status[name] == "current" for name in newer.split(", ")), library
    chosen = enrichr.choose_libraries()
    assert enrichr.choose_libraries(chosen) == chosen
    assert "Reactome_Pathways_2024" in chosen
    assert "Reactome_2013" not in chosen
    assert enrichr.choose_libraries(["Reactome_2013", "Reactome_2013"]) == ["Reactome_2013"]


def test_an_unknown_library_is_named_with_the_nearest_ones():
    with pytest.raises(UserError, match=r"reactome_2022: not in the manifest .*nearest: Reactome_2022"):
        enrichr.choose_libraries(["reactome_2022"])
    assert enrichr.choose_libraries(["Brand_New_2030"], any_library=True) == ["Brand_New_2030"]


def command(server: FaultyServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    urls = ["--enrichr-url", f"{server.url}/Enrichr", "--hgnc-url", f"{server.url}/hgnc", "--backoff-seconds", "0.01"]
    line = [sys.executable, "-m", "tcc_jax.download", *urls, *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_downloads_and_prints_a_table(server, tmp_path):
    server.answers["KEGG_2026"] = [whole(GMT)]
    result = command(server, "--out", str(tmp_path / "out"), "--library", "KEGG_2026")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert [line.split()[:2] for line in result.stdout.splitlines()[2:]] == [
        ["KEGG_2026.gmt", "downloaded"],
        ["hgnc_complete_set.tsv", "downloaded"],
    ]


def test_the_command_fails_with_one_line(server, tmp_path):
    result = command(server, "--out", str(tmp_path / "out"), "--library", "KEGG_2026", "--no-hgnc")
    assert result.returncode == 2
    assert result.stderr == "error: 1 of 1 files failed: KEGG_2026: HTTP 404\n"
    assert result.stdout == ""
    assert names(tmp_path) == []
