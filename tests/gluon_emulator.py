"""Runs Gluon kernels on a CPU, to test them with no GPU: Triton's interpreter does not know Gluon.

The kernel's own Python source runs, with torch tensors for its tensors: a thread for every partition of a warp-
specialised region, buffers for shared memory (NaN until written), mbarriers with phases and transaction counts, and
asynchronous products that read their operands at a random moment between their issue and their wait. So it finds wrong
masks and indices, reads of memory that was never written, buffers released too early, and deadlocks. Layouts are not
looked at, except that a row-major view is taken where a kernel reinterprets a buffer; the compiler checks the rest.
"""

import inspect
import math
import random
import threading
import time
import types

import torch

PATIENCE = 60.0  # seconds without progress that count as a deadlock


class Deadlock(RuntimeError):
    pass


class Abandoned(RuntimeError):
    """Raised in the other partitions when one has failed."""


class Pointer:
    """A flat tensor and offsets into it; bounds are checked where the mask is true."""

    def __init__(self, base, offset=0):
        self.base, self.offset = base, offset
        self.dtype = types.SimpleNamespace(element_ty=base.dtype)

    def __add__(self, offset):
        return Pointer(self.base, self.offset + offset)

    def at(self, mask):
        offset = torch.as_tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else mask).bool()
        offset, mask = torch.broadcast_tensors(offset, mask)
        inside = (offset >= 0) & (offset < self.base.numel())
        assert bool((inside | ~mask).all()), f"access outside of a tensor of {self.base.numel()} elements"
        return offset.clamp(0, self.base.numel() - 1).long(), mask


class Memory:
    """Shared memory, or a view of it."""

    def __init__(self, data):
        self.data = data
        self.dtype, self.layout, self.shape = data.dtype, None, tuple(data.shape)

    def index(self, i):
        assert 0 <= int(i) < self.shape[0]
        return Memory(self.data[int(i)])

    def slice(self, start, length, dim=0):
        return Memory(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Memory(self.data.permute(order))

    def reshape(self, shape):
        return Memory(self.data.view(shape))

    def _reinterpret(self, dtype, shape, layout):
        return Memory(self.data.view(torch.uint8).view(-1).view(dtype).view([int(x) for x in shape]))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        assert tuple(value.shape) == self.shape and value.dtype == self.dtype, (value.shape, value.dtype, self.shape)
        self.data.copy_(value)


class Machine:
    """What the threads of one program share."""

    def __init__(self, program, grid, seed):
        self.program, self.grid = program, grid
        self.changed = threading.Condition()
        self.failure = None
        self.random = random.Random(seed)

    def wait(self, ready):
        with self.changed:
            while not ready():
                if self.failure is not None:
                    raise Abandoned
                if not self.changed.wait(PATIENCE):
                    self.failure = Deadlock("no partition can go on")
                    raise self.failure

    def change(self, action):
        with self.changed:
            action()
            self.changed.notify_all()


class Barrier:
    def __init__(self):
        self.count = 0
        self.phase = 0
        self.arrivals = self.bytes = 0

    def step(self):
        if self.arrivals == self.count and self.bytes == 0:
            self.phase += 1
            self.arrivals = 0
        assert self.arrivals <= self.count, "more arrivals than the barrier expects"


class Barriers:
    def __init__(self, number):
        self.items = [Barrier() for _ in range(number)]

    def index(self, i):
        return self.items[int(i)]


local = threading.local()
BARRIERS = object()


class mbarrier:
    @staticmethod
    def MBarrierLayout():
        return BARRIERS

    @staticmethod
    def init(bar, count):
        bar.count = count

    @staticmethod
    def wait(bar, phase, pred=True):
        if pred:
            local.machine.wait(lambda: bar.phase % 2 != int(phase))

    @staticmethod
    def expect(bar, size):
        def action():
            bar.bytes += int(size)
            bar.arrivals += 1
            bar.step()

        local.machine.change(action)

    @staticmethod
    def arrive(bar, count=1, pred=True):
        def action():
            bar.arrivals += count
            bar.step()

        if pred:
            local.machine.change(action)
            if local.pending and local.machine.random.random() < 0.5:
                time.sleep(0.003)  # whoever waited for this may now write over what the products still read


class tma:
    @staticmethod
    def async_copy_global_to_shared(desc, coordinates, bar, target):
        coordinates = [int(c) for c in coordinates]
        assert coordinates[-1] * desc.base.element_size() % 16 == 0, "TMA needs the last coordinate at 16 bytes"
        block = torch.zeros(desc.block_shape, dtype=desc.base.dtype)  # zero outside of the tensor
        source, place = [], []
        for start, size, whole in zip(coordinates, desc.block_shape, desc.shape, strict=True):
            low, high = min(max(start, 0), whole), max(min(start + size, whole), 0)
            source.append(slice(low, max(high, low)))
            place.append(slice(low - start, max(high, low) - start))
        block[tuple(place)] = desc.base[tuple(source)]

        def action():
            target.store(block)
            bar.bytes -= block.numel() * block.element_size()
            bar.step()

        local.machine.change(action)


class Descriptor:
    def __init__(self, desc):
        self.base, self.shape, self.block_shape = desc.base, desc.shape, desc.block_shape
        self.dtype, self.layout = desc.base.dtype, None
        size = math.prod(desc.block_shape) * desc.base.element_size()
        self.block_type = types.SimpleNamespace(nbytes=size)


class Token:
    """A product under way."""

    def __init__(self, compute):
        self.compute, self.result = compute, None

    def finish(self):
        if self.compute is not None:
            self.result, self.compute = self.compute(), None
        return self.result


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    def value(x):
        return (x.data if isinstance(x, Memory) else x).float()

    def compute():
        before = acc.finish() if isinstance(acc, Token) else acc
        product = value(a) @ value(b)
        return product + before if use_acc else product

    token = Token(compute)
    local.pending.append(token)
    if local.machine.random.random() < 0.5:
        for t in local.pending:
            t.finish()
    if is_async:
        return token
    return warpgroup_mma_wait(0, deps=[token])


def warpgroup_mma_init(value):
    return value


def warpgroup_mma_wait(outstanding=0, deps=()):
    while len(local.pending) > outstanding:
        local.pending.pop(0).finish()
    done = [d.result if isinstance(d, Token) and d.compute is None else d for d in deps]
    return done[0] if len(done) == 1 else tuple(done)


class Int(int):
    """An integer of the kernel: never changed in place, division towards zero, comparisons are numbers too."""

    def to(self, dtype):
        return self


def _towards_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _integer(name, operation):
    def method(self, other=None):
        return Int(operation(int(self), int(other))) if isinstance(other, int) else NotImplemented

    setattr(Int, name, method)


for _name, _operation in {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "floordiv": _towards_zero,
    "mod": lambda a, b: a - _towards_zero(a, b) * b, "and": lambda a, b: a & b, "xor": lambda a, b: a ^ b,
    "or": lambda a, b: a | b,
}.items():  # fmt: skip
    _integer(f"__{_name}__", _operation)
    _integer(f"__r{_name}__", lambda a, b, operation=_operation: operation(b, a))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _integer(f"__{_name}__", lambda a, b, name=_name: getattr(a, f"__{name}__")(b))
Int.__hash__ = int.__hash__


def _tensor(x, like=None):
    if isinstance(x, torch.Tensor):
        return x
    return torch.tensor(x, dtype=like.dtype if isinstance(like, torch.Tensor) else None)


def _extreme(of_tensors, of_integers):
    def extreme(a, b):
        if isinstance(a, int) and isinstance(b, int):
            return Int(of_integers(int(a), int(b)))
        return of_tensors(*torch.broadcast_tensors(_tensor(a, b), _tensor(b, a)))

    return staticmethod(extreme)


class gl:
    """triton.experimental.gluon.language"""

    constexpr = staticmethod(lambda x: x)
    int32, int64, float32, float16, bfloat16 = torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16
    minimum = _extreme(torch.minimum, min)
    maximum = _extreme(torch.fmax, max)  # the hardware's ignores NaN
    cdiv = staticmethod(lambda a, b: (a + b - 1) // b)
    exp2 = staticmethod(torch.exp2)
    log2 = staticmethod(torch.log2)
    max = staticmethod(lambda x, axis: x.amax(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    static_range = range
    convert_layout = staticmethod(lambda x, layout: x)
    expand_dims = staticmethod(lambda x, axis: x.unsqueeze(axis))
    reshape = staticmethod(lambda x, shape: x.reshape([int(s) for s in shape]))
    zeros_like = staticmethod(torch.zeros_like)
    broadcast = staticmethod(torch.broadcast_tensors)
    permute = staticmethod(lambda x, order: x.permute(*order))
    split = staticmethod(lambda x: x.unbind(-1))

    class NVMMASharedLayout:
        get_default_for = staticmethod(lambda shape, dtype: None)

    BlockedLayout = SliceLayout = DotOperandLayout = SwizzledSharedLayout = NVMMADistributedLayout = staticmethod(
        lambda *args, **kwargs: None
    )
    DistributedLinearLayout = BlockedLayout

    @staticmethod
    def program_id(axis):
        return Int(local.machine.program[axis])

    @staticmethod
    def num_programs(axis):
        return Int(local.machine.grid[axis])

    @staticmethod
    def arange(start, end, layout=None):
        return torch.arange(int(start), int(end))

    @staticmethod
    def zeros(shape, dtype, layout=None):
        return torch.zeros([int(s) for s in shape], dtype=dtype)

    @staticmethod
    def full(shape, value, dtype, layout=None):
        return torch.full([int(s) for s in shape], value, dtype=dtype)

    @staticmethod
    def where(condition, a, b):
        return torch.where(torch.as_tensor(condition).bool(), _tensor(a, b), _tensor(b, a))

    @staticmethod
    def load(pointer, mask=None, other=None):
        offset, mask = pointer.at(mask)
        value = pointer.base[offset]
        if bool(mask.all()):
            return value if value.ndim or value.is_floating_point() else Int(value)
        assert other is not None or not value.is_floating_point(), "a masked load without a value for the rest"
        return torch.where(mask, value, torch.tensor(other, dtype=value.dtype))

    @staticmethod
    def store(pointer, value, mask=None):
        offset, mask = pointer.at(mask)
        offset, value = torch.broadcast_tensors(offset, torch.as_tensor(value))
        assert value.dtype == pointer.base.dtype, f"{value.dtype} stored to {pointer.base.dtype}"
        mask = mask.broadcast_to(offset.shape)
        pointer.base[offset[mask]] = value[mask]

    @staticmethod
    def allocate_shared_memory(dtype, shape, layout):
        if layout is BARRIERS:
            return Barriers(shape[0])
        return Memory(torch.full([int(s) for s in shape], math.nan, dtype=dtype))

    @staticmethod
    def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
        if asm.startswith("shl."):  # bfloat16 to float32
            return args[0].to(dtype)
        if "fma." in asm:  # a b - c d, the second product rounded by itself
            a, b, c, d = args
            return (a.float() * b.float() - (c * d).float()).to(dtype)
        assert asm.startswith("mul."), asm
        return args[0] * args[1]

    @staticmethod
    def warp_specialize(functions_and_args, warps, registers):
        machine = local.machine

        def run(function, args):
            local.machine, local.pending = machine, []
            try:
                function(*args)
            except Abandoned:
                pass
            except BaseException as error:
                with machine.changed:
                    machine.failure = machine.failure or error
                    machine.changed.notify_all()

        threads = [threading.Thread(target=run, args=item) for item in functions_and_args]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if machine.failure is not None:
            raise machine.failure


STAND_INS = {
    "gl": gl, "mbarrier": mbarrier, "tma": tma, "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_init": warpgroup_mma_init, "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": lambda: None, "thread_barrier": lambda: None,
}  # fmt: skip


def _plain(kernel, known):
    """The kernel as a Python function over the stand-ins, and so every kernel it calls."""
    if kernel not in known:
        names = dict(STAND_INS)
        function = kernel.fn
        emulated = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        known[kernel] = emulated
        for name, value in function.__globals__.items():
            if name not in names:
                names[name] = _plain(value, known) if hasattr(value, "fn") and hasattr(value, "arg_names") else value
    return known[kernel]


class Emulated:
    """Takes the place of a Gluon kernel: ``Emulated(kernel)[grid](...)``."""

    def __init__(self, kernel, seed=0):
        self.function, self.seed = _plain(kernel, {}), seed
        self.signature = inspect.signature(kernel.fn)
        self.constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.run(grid, *args, **kwargs)

    def argument(self, name, x):
        if name in self.constants:
            return x
        if name.endswith("_desc"):
            return Descriptor(x)
        if isinstance(x, torch.Tensor):
            assert x.is_contiguous(), name
            return Pointer(x.view(-1))
        return Int(x) if isinstance(x, int) else x

    def run(self, grid, *args, num_warps, **kwargs):
        grid = (*grid, 1, 1)[:3]
        given = self.signature.bind(*args, **kwargs).arguments
        given = {name: self.argument(name, x) for name, x in given.items()}
        for number in range(math.prod(grid)):
            program = (number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1])
            local.machine, local.pending = Machine(program, grid, self.seed + number), []
            self.function(**given)
