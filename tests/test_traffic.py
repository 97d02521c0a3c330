"""What a compiled program moves is counted from its text: kernels alike together, a loop's as often as it runs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.traffic import Kernel, kernels

PROGRAM = """HloModule jit_step, is_scheduled=true

%body.1 (state.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %x.1 = f32[4,8]{1,0} get-tuple-element(%state.1), index=1
  %loop_add_fusion.1 = f32[4,8]{1,0} fusion(%x.1), kind=kLoop, calls=%add
  %loop_add_fusion.2 = f32[4,8]{1,0} fusion(%loop_add_fusion.1), kind=kLoop, calls=%add
  ROOT %tuple.1 = (s32[], f32[4,8]{1,0}) tuple(%i, %loop_add_fusion.2)
}

ENTRY %main.9 (a.1: bf16[16,4], b.1: bf16[4,8]) -> (f32[4,8], pred[]) {
  %a.1 = bf16[16,4]{1,0} parameter(0)
  %b.1 = bf16[4,8]{1,0} parameter(1)
  %gemm_fusion.1 = bf16[16,8]{1,0} fusion(%a.1, %b.1), kind=kCustom, calls=%dot
  %while.1 = (s32[], f32[4,8]{1,0}) while(%tuple.3), body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %flash.1 = (f32[4,8]{1,0}, pred[]) custom-call(%b.1), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %copy.1 = pred[] copy(%p.1)
}
"""


def test_each_kernel_counts_what_it_reads_and_writes_as_often_as_it_runs():
    assert kernels(PROGRAM) == [
        Kernel("other", "loop_add_fusion", "f32[4,8]", runs=6, moved=6 * 2 * 128),
        Kernel("products", "gemm_fusion", "bf16[16,8]", runs=1, moved=128 + 64 + 256),
        Kernel("attention", "flash", "(f32[4,8], pred[])", runs=1, moved=64 + 128 + 1),
        Kernel("other", "copy", "pred[]", runs=1, moved=1),
    ]


def test_a_program_that_xla_compiled_is_read():
    def step(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.sin(x) + 1, x)

    text = jax.jit(step).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile().as_text()
    whole = [kernel for kernel in kernels(text) if kernel.result == "f32[1000]" and kernel.runs == 7]
    assert sum(kernel.moved for kernel in whole) >= 7 * 2 * 4000


@pytest.mark.parametrize(
    ("text", "words"),
    [("nothing", "no ENTRY"), (PROGRAM.replace("known_trip_count", "unknown"), "while.1: a loop whose number")],
)
def test_what_cannot_be_counted_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kernels(text)
