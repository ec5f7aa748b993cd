#!/usr/bin/env bash
# Build the fake GPU for an environment that has torch's CUDA build.
#
#   Usage   tests/gpu/fake/build.sh PYTHON FOLDER && source FOLDER/env.sh
#
# torch, Inductor, Triton (with its ptxas for sm_90), accelerate and DeepSpeed then run in this shell as on an H100. Kernels do
# nothing, so values are garbage, and times of the device mean nothing. Real are: which code runs, errors about devices
# and dtypes, the peaks of torch's allocator, and the number of launches, products, copies and synchronisations.
set -euo pipefail
python=${1:?expected the Python of an environment with the CUDA build of torch}
folder=${2:?expected a folder for the libraries}
here=$(cd "$(dirname "$0")" && pwd)
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
header=$(find "$site/nvidia" -name cuda_runtime_api.h -print -quit 2>/dev/null) || true
[[ $header ]] || { echo "$python: has no CUDA build of torch: $site/nvidia has no cuda_runtime_api.h" >&2; exit 1; }
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
# The CUDA packages lack crt/host_defines.h, and Triton has it.
compile=(gcc -fPIC -O1 -w -I"$(dirname "$header")" -I"$site/triton/backends/nvidia/include")
"${compile[@]}" -c "$here/runtime.c" -o "$folder/runtime.o"

# What torch takes from the CUDA runtime, cuBLAS and NCCL, and runtime.c does not define, becomes a stub that returns 0.
for library in libtorch_cuda libc10_cuda libtorch_python libtorch_cuda_linalg; do
    [[ ! -f $site/torch/lib/$library.so ]] || nm -D --undefined-only "$site/torch/lib/$library.so"
done | awk '{ print $2 }' | sed 's/@.*//' | grep -E '^(cuda[A-Z]|__cuda|cublas|nccl)' | sort -u >"$folder/wanted"
nm -g --defined-only "$folder/runtime.o" | awk '{ print $3 }' | sort -u >"$folder/defined"
comm -23 "$folder/wanted" "$folder/defined" | sed 's/.*/int &(void) { return 0; }/' >"$folder/stubs.c"
"${compile[@]}" -shared "$folder/runtime.o" "$folder/stubs.c" -o "$folder/libfakegpu.so" -ldl -lpthread
"${compile[@]}" -shared "$here/driver.c" -Wl,-soname,libcuda.so.1 -o "$folder/libcuda.so.1" -ldl
ln -sf libcuda.so.1 "$folder/libcuda.so"
rm "$folder"/{runtime.o,stubs.c,wanted,defined}

# cuDNN asks a real device when it plans attention, and expandable segments map memory by the driver.
cat >"$folder/env.sh" <<END
export LD_PRELOAD='$folder/libfakegpu.so' LD_LIBRARY_PATH='$folder' TRITON_LIBCUDA_PATH='$folder'
export TORCHINDUCTOR_CACHE_DIR='$folder/inductor' TRITON_CACHE_DIR='$folder/triton' TORCHINDUCTOR_COMPILE_THREADS=1
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False
export DS_IGNORE_CUDA_DETECTION=1 CUDA_VISIBLE_DEVICES=0
END
