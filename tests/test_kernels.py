"""Runs the tests in SUBSET again with older CPU kernels, in one process per level of kernels.

PyTorch, oneDNN and MKL choose kernels by the CPU's features, once per process. Environment variables can restrict them
to older kernels, but no machine can test kernels that are newer than its CPU. ONNX Runtime has no such switch.
"""

import os
import re
import subprocess

import pytest
import torch
from scripts import start

BEST = torch.backends.cpu.get_cpu_capability()
LEVELS = {  # MKL keeps to AVX2 on Intel's CPUs alone, to its oldest kernels everywhere
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}
LOWER = {"AVX512": ["AVX2", "DEFAULT"], "AVX2": ["DEFAULT"]}.get(BEST, [])
SUBSET = """
test_model.py::test_causal_with_masks
test_model.py::test_causal_bit_for_bit_at_lengths_of_several_attention_blocks
test_model.py::test_slow_twin_float32
test_model.py::test_a_row_alone_is_the_row_in_a_padded_batch[trm-left]
test_model.py::test_a_row_alone_is_the_row_in_a_padded_batch[trm-injection=concat-left]
test_model.py::test_a_row_of_padding_is_never_nan
test_cache.py::test_chunks_inside_documents
test_cache.py::test_contexts_of_a_few_tokens
test_cache.py::test_bfloat16_autocast_with_a_cache
test_decode.py::test_bf16_is_the_plain_form_up_to_rounding[recursion=none-norm=pre-n_kv_heads=2]
test_decode.py::test_bf16_is_the_plain_form_up_to_rounding[recursion=trm]
test_decode.py::test_stored_for_decoding_the_model_is_the_same
test_attention.py
test_quantize.py::test_any_width_and_number_of_rows_is_fp32_within_rounding
test_quantize.py::test_a_row_does_not_depend_on_the_rows_beside_it
test_quantize.py::test_greedy_text_with_the_cache_is_that_without
test_quantize.py::test_generate_with_the_widths_of_a_llama2c_model
""".split()
# An export takes as long as all of these: at the lowest level alone.
ONNX = ("test_an_export_gives_the_logits_of_its_model", "test_int8")


@pytest.mark.parametrize("level", LEVELS)
def test_the_numbers_hold_under(level, record_property):
    if level not in LOWER:
        pytest.skip(f"this process runs the {BEST} kernels")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | LEVELS[level]
    exports = [f"onnx/test_onnx_export.py::{name}" for name in ONNX] if level == LOWER[-1] else []
    tests = [f"tests/{name}" for name in SUBSET + exports]
    words = "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *tests
    child = start(*words, env=environment, stderr=subprocess.STDOUT)
    try:
        out, _ = child.communicate(timeout=240)
    finally:
        child.kill()
    assert child.returncode == 0, out
    assert f"kernels: {level}, without bf16 in oneDNN\n" in out  # the variables did what they are for
    record_property("kernels", f"{level} ({re.search('([0-9]+) passed', out)[1]} tests)")
