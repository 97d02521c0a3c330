"""Reading the embedded HGNC table takes a second; the tests of this folder share one."""

import functools

import pytest

from tcc_jax.corpus.symbols import SymbolTable


@pytest.fixture(autouse=True, scope="session")
def shared_symbol_tables():
    original = SymbolTable.read

    @functools.cache
    def embedded_table(case_insensitive):
        return original(None, case_insensitive)

    def read(path=None, case_insensitive=False):
        return embedded_table(case_insensitive) if path is None else original(path, case_insensitive)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SymbolTable, "read", read)
        yield
