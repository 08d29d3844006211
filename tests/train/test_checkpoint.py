import errno
import io
import os
import pickle
import shutil
import threading
import time
from collections import namedtuple

import pytest
import torch

from sidlm.errors import SidError
from sidlm.train import checkpoint, saving
from sidlm.train.config import CheckpointConfig
from sidlm.train.processes import Processes
from sidlm.train.saving import Saver


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "model.w": torch.randn(4, 3, generator=g),
        "model.h": torch.randn(5, generator=g).bfloat16(),
        "optimizer.w.step": torch.tensor(3.0),
        "model.n": torch.arange(3),
    }


def zeros():
    return {name: torch.zeros_like(t) for name, t in tensors().items()}


def save(folder, step, keep=3, **state):
    saver = Saver(folder, CheckpointConfig(keep=keep), Processes(), print)
    saver.save(tensors(step), {"step": step, "note": "ü"} | state)
    saver.finish(last=True)
    return folder / f"step-{step:08d}"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_round_trip(tmp_path):
    save(tmp_path, 7)
    found = checkpoint.newest_good(tmp_path)
    assert found.step == 7 and found.state["note"] == "ü"
    into = zeros()
    checkpoint.load(found, into)
    assert all(torch.equal(into[name], t) for name, t in tensors(7).items())


def test_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "missing", "index", "state", "state_bit"])
def test_damaged_newest_falls_back(tmp_path, harm):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    data = next((newest / "tensors").glob("*.distcp"))
    if harm == "flip":
        damage(data)
    elif harm == "truncate":
        os.truncate(data, data.stat().st_size - 1)
    elif harm == "missing":
        data.unlink()
    elif harm == "index":
        damage(newest / "tensors/.metadata")
    elif harm == "state":
        os.truncate(newest / "state.json", 20)
    else:
        state = newest / "state.json"
        state.write_text(state.read_text().replace('"step": 2', '"step": 3'))
    said = []
    assert checkpoint.newest_good(tmp_path, warn=said.append).step == 1
    assert len(said) == 1 and "step-00000002" in said[0]
    # the run goes on and replaces it
    save(tmp_path, 2)
    assert checkpoint.newest_good(tmp_path, warn=said.append).step == 2
    assert len(said) == 1


def test_other_shape_names_the_tensor(tmp_path):
    save(tmp_path, 1)
    into = zeros() | {"model.w": torch.zeros(4, 5)}
    with pytest.raises(SidError, match=r"model\.w is \(4, 3\) float32 in .* and \(4, 5\) float32 in"):
        checkpoint.load(checkpoint.newest_good(tmp_path), into)
    assert not into["model.h"].any()


@pytest.mark.parametrize("change", ["missing", "more"])
def test_other_names(tmp_path, change):
    save(tmp_path, 1)
    into = zeros()
    into["model.x" if change == "more" else "model.n"] = torch.zeros(2)
    if change == "missing":
        del into["model.n"]
    with pytest.raises(SidError, match=r"model\.(x is missing|n is not in this model)"):
        checkpoint.load(checkpoint.newest_good(tmp_path), into)


Usage = namedtuple("Usage", "total used free")


def test_no_space_is_seen_before(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 90, 10))
    with pytest.raises(SidError, match=r"no disk space for step-00000002 in .*: needs 86 bytes, 10 free"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("where", ["tensors", "state", "sync"])
def test_no_space_half_way(tmp_path, monkeypatch, where):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "tensors":  # inside torch's writer, which wraps it in an exception of its own
            patch.setattr(torch, "save", full)
        elif where == "state":
            patch.setattr(saving, "write_json", full)
        else:
            patch.setattr(os, "fsync", full)
        with pytest.raises(SidError, match="no disk space for step-00000002"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.newest_good(tmp_path).step == 1


def test_other_write_errors_can_be_caught(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(SidError, match="Input/output error"):
        save(tmp_path, 2)
    assert names(tmp_path) == []


def test_killed_half_way_leaves_no_trace_after_clean_up(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002-99").mkdir()
    (tmp_path / ".tmp-deleted-step-00000000").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model").rename(tmp_path / ".tmp-old-model")
    checkpoint.clean_up(tmp_path)
    assert names(tmp_path) == ["model", "step-00000001"]


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "payload",
    [
        lambda mark: pickle.dumps(Evil(os.mkdir, str(mark))),
        lambda mark: pickle.dumps(Evil(eval, f"__import__('os').mkdir({str(mark)!r})"), protocol=0),
        lambda mark: b"\x80\x04\x8c\x05torch\x8c\x04load\x93.",
        lambda mark: b"\x80\x04\x8c'torch.distributed.checkpoint.metadata\x8c\x0cos.getcwd_fn\x93.",
        lambda mark: b"\x80\x04\x8c'torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
        lambda mark: pickle.dumps({"a": 1}),
        lambda mark: b"",
    ],
)
def test_the_index_cannot_run_code(tmp_path, payload):
    path = save(tmp_path, 1)
    mark = tmp_path / "ran"
    (path / "tensors/.metadata").write_bytes(payload(mark))
    with pytest.raises(SidError, match="not a checkpoint index"):
        checkpoint.load(checkpoint.Checkpoint(path, {"step": 1}), zeros())
    assert not mark.exists()


def test_the_payload_would_run_when_unpickled(tmp_path):
    """The test above means something."""
    pickle.load(io.BytesIO(pickle.dumps(Evil(os.mkdir, str(tmp_path / "ran")))))
    assert (tmp_path / "ran").exists()


def test_the_index_cannot_name_files_elsewhere(tmp_path):
    path = save(tmp_path, 1)
    index = path / "tensors/.metadata"
    with index.open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere"
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(SidError, match="outside the checkpoint"):
        checkpoint.load(checkpoint.Checkpoint(path, {"step": 1}), zeros())


def test_the_policy_keeps_the_newest_every_third_and_the_best(tmp_path):
    policy = CheckpointConfig(keep=2, keep_every=3, keep_best=1)
    saver = Saver(tmp_path, policy, Processes(), print)
    for step, loss in enumerate([5.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0], start=1):
        saver.save(tensors(step), {"step": step, "valid": {"all": {"loss": loss}}})
    saver.finish(last=True)
    assert [int(name[5:]) for name in names(tmp_path)] == [2, 3, 6, 7, 8]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The copy is that of the moment of the call, and the call does not wait for the disk."""
    may_write, write = threading.Event(), torch.save

    def slow(*args, **kwargs):
        assert may_write.wait(20)
        return write(*args, **kwargs)

    monkeypatch.setattr(torch, "save", slow)
    saver, now = Saver(tmp_path, CheckpointConfig(), Processes(), print), tensors(1)
    saver.save(now, {"step": 1})
    for t in now.values():
        t.zero_()
    assert not any(name.startswith("step") for name in names(tmp_path))
    may_write.set()
    saver.finish(last=True)
    into = zeros()
    checkpoint.load(checkpoint.newest_good(tmp_path), into)
    assert all(torch.equal(into[name], t) for name, t in tensors(1).items())


def test_a_full_disk_is_survived_and_said_until_it_is_too_much(tmp_path, monkeypatch):
    said = []
    saver = Saver(tmp_path, CheckpointConfig(max_failed=1), Processes(), said.append)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(100, 90, 10))
        saver.save(tensors(1), {"step": 1})
        assert len(said) == 1 and "no disk space for step-00000001" in said[0] and "going on" in said[0]
    saver.save(tensors(2), {"step": 2})
    saver.finish()
    assert names(tmp_path) == ["step-00000002"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 90, 10))
    saver.save(tensors(3), {"step": 3})
    with pytest.raises(SidError, match=r"no disk space for step-00000004 .*2 in a row failed, checkpoint.max_failed=1"):
        saver.save(tensors(4), {"step": 4})
    assert checkpoint.newest_good(tmp_path).step == 2


def test_an_error_in_training_waits_for_the_writer(tmp_path, monkeypatch):
    write = torch.save
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (time.sleep(0.3), write(*args, **kwargs))[1])
    with pytest.raises(KeyError), Saver(tmp_path, CheckpointConfig(), Processes(), print) as saver:
        saver.save(tensors(1), {"step": 1})
        raise KeyError
    assert names(tmp_path) == ["step-00000001"]
