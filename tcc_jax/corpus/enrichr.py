"""Download Enrichr libraries by name, and HGNC's complete set, into one folder.

A file is trusted once: its SHA-256 is recorded at its first download, and a later difference, on disk or at the
server, is an error until it is accepted with `update`.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import http.client
import ipaddress
import json
import math
import os
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from tcc_jax import __version__
from tcc_jax.files import embedded, sha256
from tcc_jax.storage import replace_text
from tcc_jax.terminal import UserError, log, progress

ENRICHR_URL = "https://maayanlab.cloud/Enrichr"
HGNC_URL = "https://storage.googleapis.com/public-download-files/hgnc/tsv/tsv/hgnc_complete_set.txt"
# Not .txt as at the source: the folder can then be given to `prepare --gmt`, which reads .gmt and .txt files.
HGNC_FILE = "hgnc_complete_set.tsv"
RECORD_FILE = "downloads.json"
RECORD_VERSION = 1
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Options:
    """Download Enrichr libraries by name, and HGNC's complete set; a second run fetches only what is missing."""

    out: str | None = None
    """Folder to write: NAME.gmt, hgnc_complete_set.tsv, and downloads.json with the SHA-256 of each."""
    library: tuple[str, ...] = ()
    """Libraries to download; all current ones of the manifest if none is named."""
    any_library: bool = False
    """Also accept names that are not in the manifest."""
    hgnc: bool = True
    """Also download HGNC's complete set."""
    update: bool = False
    """Fetch everything again and accept what changed since its first download."""
    list: bool = False
    """Print the manifest of libraries and stop."""
    enrichr_url: str = ENRICHR_URL
    """Base address of Enrichr: https, or http on a loopback address."""
    hgnc_url: str = HGNC_URL
    """Address of HGNC's complete set: https, or http on a loopback address."""
    attempts: int = 5
    """Tries for each file."""
    backoff_seconds: float = 1.0
    """Wait before the second try; it doubles with each further one."""
    timeout_seconds: float = 60.0
    """Longest silence of the server."""


@dataclass(frozen=True)
class Library:
    """A row of the manifest: a library's name, its status (`current` or `outdated`) and a note."""

    name: str
    status: str
    note: str


@dataclass(frozen=True)
class Download:
    """A file in place: its name, size and SHA-256, and `kept`, `downloaded`, `unchanged` or `changed`."""

    file: str
    state: str
    bytes: int
    sha256: str


class _Failed(Exception):
    """Why a file cannot be had, without its name: files that fail alike are reported together."""


class _TryAgain(Exception):
    """A fault that may pass: no answer, a cut connection, HTTP 429 or 5xx."""


def read_manifest() -> list[Library]:
    """Read the embedded manifest of Enrichr libraries."""
    with open(embedded("libraries.tsv"), encoding="utf-8", newline="") as file:
        return [Library(**row) for row in csv.DictReader(file, delimiter="\t")]


def choose_libraries(names: Sequence[str] = (), *, any_library: bool = False) -> list[str]:
    """Return the names of the libraries to download.

    Args:
        names: library names; none chooses every current library of the manifest.
        any_library: allow names that are not in the manifest.

    Raises:
        UserError: a name that is not in the manifest (the nearest ones are given), or that cannot be a library's name.
    """
    manifest = read_manifest()
    if not names:
        return [library.name for library in manifest if library.status == "current"]
    known = {library.name.lower(): library.name for library in manifest}
    for name in names:
        _file_of(name)
        if not any_library and name not in known.values():
            nearest = [known[match] for match in difflib.get_close_matches(name.lower(), known, cutoff=0.5)]
            hint = f"nearest: {', '.join(nearest)}" if nearest else "--list shows them all"
            raise UserError(f"{name}: not in the manifest of Enrichr libraries; {hint}; or pass --any-library")
    return list(dict.fromkeys(names))


def download(
    out: str | Path, libraries: Sequence[str], options: Options, sleep: Callable[[float], None] = time.sleep
) -> list[Download]:
    """Download libraries as `NAME.gmt`, and HGNC's complete set as `hgnc_complete_set.tsv`, byte for byte.

    Files already there are verified against `downloads.json` and not fetched again. Files are fetched one at a time,
    each moved into place when whole; one that fails does not stop the others. Waits grow by up to half as jitter.

    Raises:
        UserError: a name or address that is refused, a record that cannot be read, or files that failed, by reason.
    """
    out = Path(out)
    sources = {
        _file_of(name): f"{options.enrichr_url.rstrip('/')}/geneSetLibrary?mode=text&libraryName={quote(name)}"
        for name in libraries
    }
    if options.hgnc:
        sources[HGNC_FILE] = options.hgnc_url
    for url in (options.enrichr_url, options.hgnc_url):
        _refuse_plain_http(url)
    if options.attempts < 1:
        raise UserError(f"--attempts {options.attempts}: must be at least 1")
    if not 0 <= options.backoff_seconds < math.inf:
        raise UserError(f"--backoff-seconds {options.backoff_seconds}: must be 0 or more")
    if not 0 < options.timeout_seconds < math.inf:
        raise UserError(f"--timeout-seconds {options.timeout_seconds}: must be more than 0")
    folder = _Folder(
        out, options.update, _Client(options.attempts, options.backoff_seconds, options.timeout_seconds, sleep)
    )
    new_folders = [place for place in (out, *out.parents) if not place.exists()]
    done: list[Download] = []
    failed: dict[str, list[str]] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with progress("downloading", total=len(sources)) as advance:
            for file, url in sources.items():
                try:
                    done.append(folder.bring(file, url))
                except _Failed as reason:
                    failed.setdefault(str(reason), []).append(Path(file).stem)
                advance(1)
    finally:
        for place in new_folders:
            with contextlib.suppress(OSError):  # only an empty folder can be removed
                place.rmdir()
    if failed:
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in failed.items())
        raise UserError(f"{len(sources) - len(done)} of {len(sources)} files failed: {reasons}")
    return done


@dataclass
class _Folder:
    out: Path
    update: bool
    client: _Client

    def __post_init__(self) -> None:
        self.record = _read_record(self.out / RECORD_FILE)

    def bring(self, file: str, url: str) -> Download:
        path, part = self.out / file, self.out / f".{file}.part"
        recorded = self.record[file]["sha256"] if file in self.record else None
        present = sha256(path) if path.exists() else None
        if recorded and present and not self.update:
            if present != recorded:
                raise _Failed("edited since its download (SHA-256 differs); pass --update to fetch it again")
            return Download(file, "kept", path.stat().st_size, recorded)
        try:
            self.client.fetch(file, url, part)
            _check_content(part, is_gmt=file != HGNC_FILE)
            digest, before = sha256(part), recorded or present
            if before not in (None, digest) and not self.update:
                since = f"the one of {self.record[file]['date']}" if recorded else "the file already there"
                raise _Failed(f"the server's file differs from {since}; pass --update to accept it")
            size = part.stat().st_size
            os.replace(part, path)
        except OSError as error:  # the disk's: those of the network are `_Failed` by now
            raise UserError(f"{path}: cannot write: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
        if recorded != digest:
            date = datetime.now(UTC).isoformat(timespec="seconds")
            self.record[file] = {"url": url, "sha256": digest, "bytes": size, "date": date}
            _write_record(self.out / RECORD_FILE, self.record)
        state = "downloaded" if before is None else "unchanged" if before == digest else "changed"
        return Download(file, state, size, digest)


@dataclass
class _Client:
    attempts: int
    backoff_seconds: float
    timeout_seconds: float
    sleep: Callable[[float], None]
    unreachable: set[str] = field(default_factory=set)

    def fetch(self, label: str, url: str, path: Path) -> None:
        host = urlsplit(url).netloc
        if host in self.unreachable:  # waiting for it again with every library would take hours
            raise _Failed(f"{host} cannot be reached")
        for attempt in range(1, self.attempts + 1):
            try:
                with open(path, "wb") as file:
                    for chunk in _receive(url, self.timeout_seconds):
                        file.write(chunk)
                return
            except _TryAgain as fault:
                if attempt == self.attempts:
                    if isinstance(fault.__cause__, urllib.error.URLError):
                        self.unreachable.add(host)
                    raise _Failed(f"{fault} ({attempt} attempts)") from None
                wait_seconds = self.backoff_seconds * 2 ** (attempt - 1) * random.uniform(1.0, 1.5)
                log(f"{label}: {fault}; trying again in {wait_seconds:.1f} s")
                self.sleep(wait_seconds)


def _receive(url: str, timeout_seconds: float) -> Iterator[bytes]:
    # A generator, so that what the disk raises in the caller is not taken for a fault of the network.
    handlers: list[urllib.request.BaseHandler] = [_SafeRedirects()]
    if _is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"User-Agent": f"tcc-jax/{__version__}"})
    received, last = 0, b""
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_seconds) as response:
            length, chunked = response.length, response.headers.get("Transfer-Encoding", "").lower() == "chunked"
            while chunk := response.read(1 << 20):
                received, last = received + len(chunk), chunk[-1:]
                if received > MAX_BYTES:
                    raise _Failed(f"larger than {MAX_BYTES:,} bytes")
                yield chunk
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:
            raise _TryAgain(f"HTTP {error.code}") from None
        raise _Failed(f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _Failed(f"{urlsplit(url).netloc} has no valid certificate: {error.reason.verify_message}") from None
        raise _TryAgain(f"{urlsplit(url).netloc} cannot be reached: {error.reason}") from error
    except (http.client.InvalidURL, ValueError) as error:
        raise _Failed(f"sent on to a bad address: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _TryAgain(f"connection lost: {error}") from None
    # http.client reports a cut chunked body; with a length, or with neither, it returns what came.
    if received != length if length is not None else not chunked and last != b"\n":
        raise _TryAgain(f"connection cut after {received:,} bytes")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: Any, fp: Any, code: int, message: str, headers: Any, url: str) -> Any:
        if urlsplit(url).scheme != "https" and not (_is_loopback(request.full_url) and _is_loopback(url)):
            raise _Failed(f"sent on to {url}, which is not https")
        return super().redirect_request(request, fp, code, message, headers, url)


def _file_of(name: str) -> str:
    # A name becomes part of a path and of an address: letters, digits, dot, dash and underscore only.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}", name):
        raise UserError(f"{name!r}: not a library's name (letters, digits, '.', '-' and '_'); --list shows them all")
    return f"{name}.gmt"


def _refuse_plain_http(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port or True) and not re.search(r"[\s\x00-\x1f]", url)
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"{url!r}: not an address; give one such as {ENRICHR_URL}")
    if not (parts.scheme == "https" or _is_loopback(url)):
        raise UserError(f"{url}: give an https address; http is for loopback addresses only")


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return urlsplit(url).scheme == "http" and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    return False


def _check_content(path: Path, *, is_gmt: bool) -> None:
    with open(path, "rb") as file:
        head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")
    line = head.split(b"\n", 1)[0].rstrip(b"\r")
    fields = line.split(b"\t")
    if not line.strip():
        raise _Failed("the answer is empty")
    if is_gmt and (len(fields) < 3 or not any(fields[2:]) or b"\0" in head or line.lstrip().startswith((b"<", b"{"))):
        raise _Failed("the answer is not GMT (name, description, genes)")
    if not is_gmt and not {b"symbol", b"Approved symbol"} & set(fields):
        raise _Failed("the answer is not an HGNC table (no column 'symbol')")


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if content["format_version"] != RECORD_VERSION:
            raise UserError(f"{path}: format version {content['format_version']}; this program reads {RECORD_VERSION}")
        return {file: {**entry, "sha256": str(entry["sha256"])} for file, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a record of downloads; move it away and download again") from None


def _write_record(path: Path, record: dict[str, dict[str, Any]]) -> None:
    content = {"format_version": RECORD_VERSION, "files": dict(sorted(record.items()))}
    replace_text(path, json.dumps(content, indent=1) + "\n", durable=False)
