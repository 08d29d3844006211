"""What benchmarks/train_speed.py measures, and how it tells the parts of a step."""

import sys
from pathlib import Path

import pytest

from sidlm.models import num_parameters, preset

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _train_speed_profile import kernel_part, product_part
from _train_speed_rows import SIZES, rows


def fields(row):
    size = SIZES[row.size]
    sizes = {"vocab_size": size.vocab, "num_hidden_layers": size.layers, "intermediate_size": size.ffn}
    return sizes | row.overrides


def test_the_rows_compare_models_of_one_size():
    """All arms of a size have the parameters of its Llama but for the two matrices of each 2-simplicial layer."""
    for row in rows(["1b", "8b-width"]):
        config, llama = (preset(SIZES[row.size].preset, arch="llama", **f) for f in (fields(row), fields(row) | {
            "intermediate_size": SIZES[row.size].ffn, "mlp_type": "swiglu", "mlp_sparsity": None,
            "layer_types": ["full_attention"] * SIZES[row.size].layers}))  # fmt: skip
        assert num_parameters(config) / num_parameters(llama) == pytest.approx(1, abs=0.01)
    assert num_parameters(preset("1b", arch="llama")) == 1_235_814_400  # Llama 3.2 1B
    one, *_ = rows(["1b"])
    assert fields(one)["vocab_size"] == 128256 and {r.name for r in rows(["1b"])} >= {
        "bf16",
        "float8",
        "simplicial",
        "2:4",
    }


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ([[2048, 2048], [2048, 128256]], "loss"),
        ([[32768, 2048], [2048, 8192]], "FFN GEMMs"),
        ([[8192, 32768], [32768, 2048]], "FFN GEMMs"),
        ([[32768, 2048], [2048, 12288]], "FFN GEMMs"),
        ([[32768, 2048], [2048, 512]], "attention projections"),
        ([[7, 9], []], "other GEMMs"),
    ],
)
def test_products_are_told_by_their_shapes(shapes, part):
    assert product_part(shapes, SIZES["1b"], 2048) == part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("triton_tem_fused_flex_attention_backward_3", "attention"),
        ("void flash_fwd_kernel<...>", "attention"),
        ("backward_keys_kernel", "2-simplicial"),
        ("forward_kernel", "2-simplicial"),
        ("pack_rows_kernel", "2:4"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and clipping"),
        ("triton_red_fused__log_softmax_exp_gather_0", "loss"),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT", "other GEMMs"),
        ("triton_poi_fused_mul_silu_1", "other"),
    ],
)
def test_kernels_are_told_by_their_names(name, part):
    assert kernel_part(name) == part
