"""The output folder: its bytes, its files, interruption, a full disk, memory."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_toys import (
    RANK,
    TARGETS,
    change_adapter,
    make_base,
    make_quantized,
    make_secura,
    quick,
    raw,
)

from secura_ds.checkpoint_files import open_checkpoint
from secura_ds.errors import UserError
from secura_ds.merge import work as work_module


def test_untouched_tensors_and_headers_are_the_bases_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = quick(base, adapter, tmp_path / "out")
    before, after = raw(base), raw(tmp_path / "out")
    touched = {f"{module}.weight" for module in TARGETS}
    assert {name for name in before if before[name] != after[name]} == touched
    assert "lm_head.weight" not in after  # the head stays tied
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 3
    for shard, file in zip(shards, open_checkpoint(tmp_path / "out").files, strict=True):
        assert file.path.name == shard.name and shard.read_bytes().startswith(file.header)
    assert (report.adapted_tensors, report.untouched_tensors) == (4, len(before) - 4)
    assert report.bytes == sum(shard.stat().st_size for shard in shards)


def test_files_beside_the_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer_config.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("the adapter's template")
    quick(base, adapter, tmp_path / "out")
    out = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "LICENSE",
    ):
        assert out[name] == (base / name).read_bytes()
    assert out["chat_template.jinja"] == b"the adapter's template"
    assert not {"README.md", "merge.state.json", "adapter_config.json"} & out.keys()
    assert json.loads(out["merge.json"])["adapted_tensors"] == 4


def test_an_interrupted_merge_is_finished_by_the_next(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    written: list[str] = []
    write_edited = work_module._write_edited

    def interrupted(tensor: Any, *rest: Any) -> None:
        written.append(tensor.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_edited(tensor, *rest)

    monkeypatch.setattr(work_module, "_write_edited", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(base, adapter, out)
    assert not out.exists() and partial.is_dir()
    finished = {shard: shard.stat().st_mtime_ns for shard in partial.glob("*.safetensors")}
    assert len(finished) >= 2
    (partial / ".merge.json.abc.partial").write_text(
        "{"
    )  # as a kill leaves it, which no code cleans up after
    report = quick(base, adapter, out)
    assert len(written) == 3 + 2  # the interrupted tensor and the last one; the first two were kept
    for shard, changed in finished.items():
        assert (out / shard.name).stat().st_mtime_ns == changed
    assert report.resumed_bytes == sum((out / shard.name).stat().st_size for shard in finished)
    assert not partial.exists() and not list(out.glob("*.writing")) and not list(out.glob(".*"))
    quick(base, adapter, tmp_path / "again")
    assert raw(out) == raw(tmp_path / "again")


def test_other_inputs_do_not_resume(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            work_module.WorkFolder, "copy_side_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            quick(base, adapter, tmp_path / "out")
    change_adapter(adapter, **{f"base_model.model.{TARGETS[0]}.secura_U": torch.zeros(RANK, RANK)})
    assert quick(base, adapter, tmp_path / "out").resumed_bytes == 0


def test_a_full_disk_is_one_line(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(UserError, match=r"needs? .* GB more, but the disk"):
            quick(base, adapter, tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(work_module.os, "fsync", full)
        with pytest.raises(UserError, match="is full: free some space"):
            quick(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quick(base, adapter, tmp_path / "out")


def test_out_is_never_overwritten_unasked(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        quick(base, adapter, out)
    with pytest.raises(UserError, match="out is no checkpoint, and --overwrite replaces nothing else"):
        quick(base, adapter, out, overwrite=True)
    assert (out / "keep").read_text() == "mine"
    with pytest.raises(UserError, match="keep is no checkpoint"):
        quick(base, adapter, out / "keep", overwrite=True)
    (out / "keep").unlink()
    quick(base, adapter, out, overwrite=True)
    (out / "config.json").write_text("{}")
    quick(base, adapter, out, overwrite=True)
    assert (out / "config.json").read_text() != "{}"
    with pytest.raises(UserError, match="which is or holds the base"):
        quick(base, adapter, base, overwrite=True)


@pytest.mark.parametrize("quantized", [False, True])
def test_memory_stays_within_a_shard_and_three_tensors(tmp_path: Path, quantized: bool) -> None:
    base = make_base(tmp_path / "base", hidden_size=512, intermediate_size=8192)
    if quantized:
        adapter, _, _ = make_quantized(tmp_path, base)
    else:
        adapter = make_secura(tmp_path / "adapter", base)
    report = quick(base, adapter, tmp_path / "out")
    checkpoint = open_checkpoint(base)
    largest = max(tensor.num_bytes for tensor in checkpoint.tensors.values())
    assert largest == 2 * 512 * 8192
    assert report.peak_memory_bytes <= max(file.size for file in checkpoint.files) + 3 * largest
