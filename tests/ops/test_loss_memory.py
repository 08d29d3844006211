"""Peak memory of the loss at Llama 3's vocabulary: no tensor of all tokens and the vocabulary is ever alive."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidlm.ops import linear_cross_entropy
from sidlm.parallel.dry_run import fake_processes
from sidlm.parallel.loss import vocab_parallel_cross_entropy

VOCABULARY, TOKENS, WIDTH = 128256, 1027, 16


class Largest(TorchDispatchMode):
    """The most elements of a storage that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is torch.Tensor:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_loss(dtype):
    hidden, weight, labels = tensors(dtype)
    with Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, labels)
        loss.backward()
    assert loss.isfinite() and hidden.grad is not None and weight.grad is not None
    # the logits of one chunk of at most 512 tokens
    assert largest.elements <= 512 * VOCABULARY < TOKENS * VOCABULARY // 2


def test_the_loss_of_a_split_vocabulary():
    """One of two processes: it holds half of the rows, and of a chunk of tokens the logits of those."""
    hidden, weight, labels = tensors(torch.float32)
    with fake_processes(2):
        mesh = init_device_mesh("cpu", (2,))
        hidden, weight = (
            distribute_tensor(x.detach(), mesh, [placement], src_data_rank=None).requires_grad_()
            for x, placement in ((hidden, Replicate()), (weight, Shard(0)))
        )
        with Largest() as largest:
            vocab_parallel_cross_entropy(hidden, weight, labels).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert largest.elements <= 512 * VOCABULARY // 2


def test_logits_of_all_tokens_would_be_seen():
    hidden, weight, labels = tensors(torch.bfloat16)
    with Largest() as largest:
        (hidden @ weight.T)[0, labels[0]].backward()
    assert largest.elements == TOKENS * VOCABULARY
