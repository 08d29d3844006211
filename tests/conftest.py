"""Shape and dtype annotations of ops and nn are checked while the tests run (jaxtyping with beartype)."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the workers share the cores, as does what their tests start
    _threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(_threads)
    torch.set_num_threads(_threads)
if not torch.cuda.is_available():  # read when triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
install_import_hook(["sidlm.ops", "sidlm.nn"], "beartype.beartype")


@pytest.fixture
def unchecked():
    """The function as users have it, without the checkers that the line above installs."""

    def unwrap(function):
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        return function

    return unwrap
