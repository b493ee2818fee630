"""Writing files: whole or untouched, and on the disk before they have their name."""

import os
from pathlib import Path

import pytest
import torch

from ltrp_timm._text import one_line
from ltrp_timm.weights.files import save_weights, write_atomically, write_text


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        steps.append(f"fsync of {os.fstat(handle).st_size} bytes")
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "a.txt", "text")
    assert steps[:2] == ["fsync of 4 bytes", "rename"]  # then the folder


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(place: Path) -> None:
        place.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = tmp_path / "model.safetensors"
    save_weights(tmp_path, {}, {"weight": torch.zeros(10)})
    good = place.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_weights(tmp_path, {}, {"weight": torch.zeros(9999)}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert one_line(caught.value) == f"{place}: File too large."
    assert place.read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
