"""A lock on DeepSpeed's collectives that nobody holds any more."""

import os
import threading
import time

import pytest

from pikv_megatron.runtime.extension_lock import EXTENSION, await_extension_lock


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / EXTENSION
    folder.mkdir()
    return folder / "lock"


def test_an_old_lock_is_refused(lock):
    lock.touch()
    hours_ago = time.time() - 7200
    os.utime(lock, (hours_ago, hours_ago))
    with pytest.raises(RuntimeError, match=f"{lock} is 120 minutes old.*remove the file"):
        await_extension_lock()


def test_one_that_nobody_takes_back_is_waited_for_no_longer(lock):
    lock.touch()
    with pytest.raises(RuntimeError, match="remove the file"):
        await_extension_lock(longest_seconds=0.3)


def test_a_process_that_compiles_is_waited_for(lock):
    await_extension_lock()
    lock.touch()
    threading.Timer(0.3, lock.unlink).start()
    await_extension_lock()
    assert not lock.exists()
