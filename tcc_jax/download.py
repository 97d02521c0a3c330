"""`python -m tcc_jax.download`: Enrichr libraries and the HGNC table -> a folder for `prepare --gmt` and `--hgnc`."""

from __future__ import annotations

from tcc_jax.corpus import enrichr
from tcc_jax.terminal import UserError, command, parse_arguments, table


@command
def main() -> None:
    """Run the command."""
    options = parse_arguments(enrichr.Options, prog="python -m tcc_jax.download")
    if options.list:
        rows = [(library.name, library.status, library.note) for library in enrichr.read_manifest()]
        print("\n".join("\t".join(row) for row in [("name", "status", "note"), *rows]))
        return
    if options.out is None:
        raise UserError("--out: name the folder to write (or pass --list)")
    libraries = enrichr.choose_libraries(options.library, any_library=options.any_library)
    files = enrichr.download(options.out, libraries, options)
    print(table(("file", "state", "bytes"), [(file.file, file.state, file.bytes) for file in files]))


if __name__ == "__main__":
    main()
