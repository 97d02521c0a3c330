"""`python -m tcc_jax.download`: Enrichr libraries and the HGNC table -> a folder for `prepare --gmt` and `--hgnc`."""

from __future__ import annotations

from dataclasses import dataclass

from tcc_jax.corpus import enrichr
from tcc_jax.terminal import UserError, parse_arguments, run_command, table


@dataclass(frozen=True)
class Arguments:
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
    enrichr_url: str = enrichr.ENRICHR_URL
    """Base address of Enrichr: https, or http on a loopback address."""
    hgnc_url: str = enrichr.HGNC_URL
    """Address of HGNC's complete set: https, or http on a loopback address."""
    attempts: int = 5
    """Tries for each file."""
    backoff_seconds: float = 1.0
    """Wait before the second try; it doubles with each further one."""
    timeout_seconds: float = 60.0
    """Longest silence of the server."""


def main() -> None:
    """Run the command."""
    run_command(_main)


def _main() -> None:
    arguments = parse_arguments(Arguments, prog="python -m tcc_jax.download")
    if arguments.list:
        rows = [(library.name, library.status, library.note) for library in enrichr.read_manifest()]
        print("\n".join("\t".join(row) for row in [("name", "status", "note"), *rows]))
        return
    if arguments.out is None:
        raise UserError("--out: name the folder to write (or pass --list)")
    files = enrichr.download(
        arguments.out,
        enrichr.choose_libraries(arguments.library, any_library=arguments.any_library),
        hgnc=arguments.hgnc,
        update=arguments.update,
        enrichr_url=arguments.enrichr_url,
        hgnc_url=arguments.hgnc_url,
        attempts=arguments.attempts,
        backoff_seconds=arguments.backoff_seconds,
        timeout_seconds=arguments.timeout_seconds,
    )
    print(table(("file", "state", "bytes"), [(file.file, file.state, file.bytes) for file in files]))


if __name__ == "__main__":
    main()
