"""Tests of what `benchmarks.gpu_trace` reads from a trace in Chrome's format."""

import pytest

from benchmarks import gpu_trace

pytestmark = pytest.mark.benchmarks


def test_kernels_are_summed_by_name_and_kind():
    def kernel(name, start, duration, category="kernel"):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    events = [
        kernel("nvjet_hsh_128x256", 0, 40),
        kernel("elementwise_kernel", 30, 20),
        kernel("nvjet_hsh_128x256", 90, 10),
        kernel("Memcpy DtoD", 60, 10, "gpu_memcpy"),
        kernel("aten::mm", 0, 1000, "cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]
    found = gpu_trace.kernels({"traceEvents": events}, ("kernel", "gpu_memcpy"))
    assert (found["busy"], found["span_seconds"]) == (pytest.approx(0.7), pytest.approx(100e-6))
    assert found["shares"]["matrix products"] == pytest.approx(50 / 80)
    assert found["shares"]["bound by memory"] == pytest.approx(30 / 80)
    first = found["kernels"][0]
    assert (first["name"], first["times"], first["seconds"]) == ("nvjet_hsh_128x256", 2, pytest.approx(50e-6))
    assert "why" in gpu_trace.kernels({"traceEvents": events[-1:]}, ("kernel",))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("triton_red_fused__scaled_dot_product_flash_attention_mul_3", "bound by memory"),
        ("triton_tem_fused_mm_0", "matrix products"),
        ("triton_red_fused_add_amax_arange_copy__eq_exp_expm1_log_lt_neg_sub_where_0", "softmax of the loss"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "bound by memory"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdamMathFunctor<float, 4, ...>>", "bound by memory"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ],
)
def test_kernel_kind_follows_from_its_name(name, kind):
    assert gpu_trace.kind_of(name) == kind


def test_host_time_is_that_of_the_step_without_its_waits():
    def event(name, start, duration, category="cuda_runtime"):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    events = [
        event("cudaLaunchKernel", 90, 5),
        event(gpu_trace.STEP, 100, 100, "user_annotation"),
        event(gpu_trace.STEP, 110, 500, "gpu_user_annotation"),
        event("cudaLaunchKernelExC", 110, 5),
        event("cuLaunchKernelEx", 120, 5, "cuda_driver"),
        event("cudaMemcpyAsync", 130, 10),
        event("cudaStreamSynchronize", 140, 20),
        event("cudaEventSynchronize", 150, 20),
        event("cudaDeviceSynchronize", 190, 50),
        event("cudaDeviceSynchronize", 250, 50),
        event("aten::mm", 110, 80, "cpu_op"),
    ]
    found = gpu_trace.host({"traceEvents": events})
    assert found.pop("host_seconds") == pytest.approx((100 - 30 - 10) / 1e6)
    assert found == {"launches": 2, "copies": 1, "waits": 3}
    assert gpu_trace.host({"traceEvents": events[3:]}) == {}
