"""The interpreter's own cache: what was built is read, and what a test has changed is neither read nor kept."""

from types import SimpleNamespace

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from gpurnn.kernels import build, dropout, tiles
from tests import interpreted


def test_ptx_is_kept_for_other_processes_but_not_that_of_changed_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path))
    recipe, built = build.recipe(dropout.advance), []

    def ptx(*given):
        built.append(given)
        return build.ptx(*given)

    def threads():
        """Of a block, as another process reads or builds it."""
        interpreted.program.cache_clear()
        source, module = interpreted.program(recipe)
        assert module.entry == "gpurnn_advance_calls"
        return source.threads

    monkeypatch.setattr(interpreted, "build", SimpleNamespace(**vars(build) | {"ptx": ptx}))
    assert (threads(), threads(), len(built)) == (32, 32, 1)
    with monkeypatch.context() as changed:
        changed.setattr(dropout, "WARP", 64)
        assert (threads(), threads(), len(built)) == (64, 64, 3)
    with monkeypatch.context() as changed:  # of a function in another module, in its place
        changed.setattr(tiles.layout, "__code__", (lambda shape, tile: None).__code__)
        assert (threads(), len(built)) == (32, 4)
    assert (threads(), len(built)) == (32, 4) and len(list(tmp_path.iterdir())) == 1
    interpreted.program.cache_clear()
