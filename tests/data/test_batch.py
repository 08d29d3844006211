"""What a batch tells about its documents on the host."""

import torch

from sidlm.data.loader import Batch
from sidlm.data.packing import pack
from sidlm.train.train_step import arguments


def batch(*lengths: list[int]) -> Batch:
    segments = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    return Batch(*map(torch.from_numpy, pack(segments.numpy(), segments.numpy())))


def test_offsets_are_where_documents_begin():
    rows = batch([3, 1, 5], [9], [8, 1])  # a row of pack's input has one token more than its output
    assert rows.packed and rows.doc_ids.tolist()[0] == [0, 0, 0, 1, 2, 2, 2, 2]
    offsets, longest = rows.offsets()
    assert offsets.tolist() == [0, 3, 4, 8, 16, 24] and offsets.dtype == torch.int32 and longest == 8
    assert batch([3, 1, 3, 2]).offsets()[1] == 4  # rounded up
    assert batch([5, 1, 3]).offsets()[1] == 8


def test_rows_of_one_document_are_told_by_nothing():
    cpu = torch.device("cpu")
    assert set(arguments(batch([9], [9]), cpu, offsets=True)) == {"input_ids", "shift_labels"}
    told = arguments(batch([9], [2, 7]), cpu, offsets=True)
    assert told["cu_seq_lens_q"].tolist() == [0, 8, 10, 16] and told["max_length_q"] == 8
    assert set(arguments(batch([9], [2, 7]), cpu)) == {"input_ids", "shift_labels", "position_ids", "doc_ids"}
