"""Loading leaves malloc as it was asked to be."""

from types import SimpleNamespace

from hyperion.models import lean_loading


def test_what_the_user_asks_of_malloc_holds_after_loading(monkeypatch) -> None:
    asked: dict[int, int] = {}
    libc = SimpleNamespace(mallopt=asked.__setitem__, malloc_trim=lambda pad: None)
    monkeypatch.setattr(lean_loading, "_glibc", lambda: libc)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    with lean_loading.returning_memory():
        assert asked[-3] < 1 << 20  # M_MMAP_THRESHOLD of mallopt(3)
    assert asked[-3] == 1 << 20
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    with lean_loading.returning_memory():
        pass
    assert asked[-3] == 32 << 20
