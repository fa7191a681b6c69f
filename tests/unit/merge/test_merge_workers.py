"""Several processes share one merge: the same bytes, and one end for all of them."""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import merge_toys
import psutil
import pytest
import torch
from merge_toys import TARGETS, make_base, make_quantized, make_secura, quick, raw

from secura_ds.checkpoint_files import open_checkpoint
from secura_ds.errors import UserError
from secura_ds.merge import work, workers
from secura_ds.merge.work import Part, begin_shard, only_merge_into

ROOT = Path(__file__).resolve().parents[3]
merge_module = importlib.import_module("secura_ds.merge.merge")


def spoil(monkeypatch: pytest.MonkeyPatch, edit: Callable[[torch.Tensor], torch.Tensor], *names: str) -> None:
    """Let `edit` take the place of the real edits of some tensors."""
    plan = merge_module.plan_edits
    monkeypatch.setattr(merge_module, "plan_edits", lambda *a: plan(*a) | dict.fromkeys(names, edit))


def noted(partial: Path) -> list[str]:
    """The shards that the merge working in `partial` has noted as finished."""
    state = partial / "merge.state.json"
    done: list[str] = json.loads(state.read_text())["done"] if state.is_file() else []
    return done


@pytest.mark.parametrize("part_bytes", [1, 10_000, work.PART_BYTES])
def test_two_workers_write_the_bytes_of_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(work, "PART_BYTES", part_bytes)
    parts = [len(work.split(file)) for file in open_checkpoint(base).files]
    assert (max(parts) > 1) == (part_bytes < 40_000)
    adapter, _, _ = make_quantized(tmp_path, base)
    alone = quick(base, adapter, tmp_path / "one")
    together = quick(base, adapter, tmp_path / "two", workers=2)
    assert len(open_checkpoint(base).files) > 3
    for file in (tmp_path / "one").iterdir():
        if file.name != "merge.json":
            assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "one", "two"]
    assert (alone.workers, together.workers) == (1, 2)
    assert alone.peak_memory_bytes == alone.peak_memory_sum_bytes
    assert 0 < together.peak_memory_bytes < together.peak_memory_sum_bytes < 3 * 2**30
    assert together.untouched_tensors == alone.untouched_tensors


@pytest.mark.parametrize(
    ("edit", "kind", "text"),
    [
        (merge_toys.break_weight, "refused", "embed_tokens.weight is not finite after merging"),
        (merge_toys.fill_disk, "refused", "is full: free some space and run again"),
        (merge_toys.fail, "failed", "ZeroDivisionError"),
    ],
)
def test_a_worker_tells_what_it_refuses_and_where_it_fails(
    base: Path, tmp_path: Path, edit: Callable[[torch.Tensor], torch.Tensor], kind: str, text: str
) -> None:
    ours, theirs = multiprocessing.Pipe()
    file = open_checkpoint(base).files[0]
    begin_shard(tmp_path, file)
    ours.send({"model.embed_tokens.weight": edit})
    ours.send(Part(file, file.tensors))
    workers._work(theirs, tmp_path, 1)
    while (message := ours.recv())[0] == "wrote":
        pass
    assert message[0] == kind and text in message[1]


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    workers._work(theirs, tmp_path, 1)


def test_a_worker_that_dies_ends_all_and_what_they_finished_is_kept(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    # Shards go out in order: one worker gets the last but one, and would never end by itself.
    *rest, before, last = open_checkpoint(base).files
    with monkeypatch.context() as patch:
        spoil(patch, merge_toys.never_end, *(tensor.name for tensor in before.tensors))
        spoil(patch, merge_toys.die, *(tensor.name for tensor in last.tensors))
        with pytest.raises(UserError, match=r"was killed by SIGKILL, .*: run the same command") as caught:
            quick(base, adapter, out, workers=2)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []
    done = noted(partial)
    written = sorted(file.name for file in partial.iterdir() if file.name != "merge.state.json")
    assert sorted(done) == written == sorted(file.path.name for file in rest)
    assert not out.exists()
    report = quick(base, adapter, out)
    assert report.resumed_bytes == sum((out / name).stat().st_size for name in written)
    quick(base, adapter, tmp_path / "again")
    assert raw(out) == raw(tmp_path / "again")


def test_ctrl_c_ends_the_command_and_its_workers(base: Path, adapter: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    script = (
        "import sys, merge_toys; from launch import merge as command\n"
        "from secura_ds.errors import run_command\n"
        "m = sys.modules['secura_ds.merge.merge']; plan = m.plan_edits\n"
        f"m.plan_edits = lambda *a: plan(*a) | {{'{TARGETS[-1]}.weight': merge_toys.never_end}}\n"
        "raise SystemExit(run_command(command.main))"
    )
    arguments = ["--base", base, "--adapter", adapter, "--out", out, "--no-check", "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(merge_toys.__file__).parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    count = len(open_checkpoint(base).files) - 1
    deadline = time.monotonic() + 120
    while len(noted(partial)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert output == "" and errors.splitlines()[-1] == "interrupted by SIGINT" and "Traceback" not in errors
    while alive_in(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not out.exists()
    missing = open_checkpoint(base).tensors[f"{TARGETS[-1]}.weight"].file.stat().st_size
    assert quick(base, adapter, out).resumed_bytes == open_checkpoint(base).num_bytes - missing


def alive_in(group: int) -> list[psutil.Process]:
    """The processes of a group that are still running."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_fewer_workers_than_asked_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", shard="1GB")
    adapter = make_secura(tmp_path / "adapter", base)
    with caplog.at_level(logging.WARNING):
        assert quick(base, adapter, tmp_path / "out", workers=4).workers == 1
    assert "1 of 4 workers are used: there is no more to share out" in caplog.text
    with pytest.raises(UserError, match="workers is 0: at least 1"):
        quick(base, adapter, tmp_path / "none", workers=0)


def test_two_merges_into_one_folder_exclude_each_other(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        only_merge_into(out),
        pytest.raises(UserError, match=r"another merge into .*out is running \(it holds .*\): wait for it"),
    ):
        quick(base, adapter, out)
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    quick(base, adapter, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]
