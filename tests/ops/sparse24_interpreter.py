"""What Triton's interpreter gets wrong about e4m3, inline PTX for it, and memory that shows what was not written."""

import re

import numpy as np
import torch

from ops.ptx_numpy import execute
from sidlm.ops.sparse24.quantize import FP8


def use_casts_of_torch(monkeypatch, interpreter) -> None:
    """The interpreter's own cast to e4m3 rounds halves up and loses the carry, the one from it has no NaN."""
    theirs = interpreter._convert_float
    types = {"fp8e4nv": FP8, "fp32": torch.float32, "fp16": torch.float16}

    def convert(x, source, to, mode):
        if "fp8e4nv" not in (source.name, to.name):
            return theirs(x, source, to, mode)
        bits = torch.from_numpy(np.ascontiguousarray(x).reshape(-1).view(np.uint8).copy())
        out = bits.view(types[source.name]).to(types[to.name])
        return out.view(torch.uint8).numpy().view(f"uint{8 * out.element_size()}").reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def run_ptx(monkeypatch, interpreter) -> None:
    """Blocks of PTX with operands of 32 and 64 bits, one element at a time."""

    def create(builder, code, constraints, handles, types, is_pure, pack):
        assert pack == 1 and constraints.count(",") == len(types) + len(handles) - 1
        shape = handles[0].data.shape
        given = []
        for handle in handles:
            data = np.ascontiguousarray(handle.data)
            assert data.shape == shape
            given.append(data.view(f"uint{8 * data.itemsize}").ravel())
        found = execute(code, len(types), given)
        kinds = [re.sub("^fp", "float", str(x.scalar)) for x in types]
        results = [x.view(kind).reshape(shape) for x, kind in zip(found, kinds, strict=True)]
        handles = [interpreter.TensorHandle(x, t.scalar) for x, t in zip(results, types, strict=True)]

        class Call:
            def get_result(self, i):
                return handles[i]

        return Call()

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)


def poison_memory(monkeypatch) -> None:
    """Memory that nobody wrote reads as NaN, and as metadata that names one place twice."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def filled(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 0xFF if x.dtype == torch.uint8 else 99)

        monkeypatch.setattr(owner, name, filled)
