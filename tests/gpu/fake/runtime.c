/* A stand-in for the CUDA runtime, cuBLAS and NCCL: a GPU of 80 GB whose kernels do nothing.
 *
 * Memory of the device is memory of the host that is reserved and filled on demand. Copies of small tensors are real;
 * large copies and all kernels do nothing. A few numbers that are read back are 0, and a single
 * byte, which is a truth value, is 1: kernels have not computed them, and with these, code that asks how many elements there
 * are, whether a number is finite or whether a text is complete goes on. Launches, matrix products, copies,
 * collectives and synchronisations are counted. build.sh makes every other function that torch needs a stub
 * that returns 0, which means success.
 *
 * It is loaded before torch by LD_PRELOAD, and torch's own library of that name never runs.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cuda_runtime_api.h"
#undef cudaGetDeviceProperties  /* The header renames it to a versioned symbol that torch does not ask for. */

/* ---- Counts ---- */

enum { LAUNCHES, PRODUCTS, COPIES, COLLECTIVES, SYNCHRONISATIONS, KINDS };
static long counts[KINDS];

static void count(int kind) { __atomic_add_fetch(&counts[kind], 1, __ATOMIC_RELAXED); }

/* Return how often something was called so far. Tests read it by ctypes, and its presence tells that the GPU is fake. */
long fake_count(int kind) { return kind >= 0 && kind < KINDS ? counts[kind] : -1; }

/* The driver's stand-in, which is another library, reports its launches here. */
void fake_launch(void) { count(LAUNCHES); }

/* ---- The device: attributes of an H100 80GB (compute capability 9.0) ---- */

static const size_t MEMORY_BYTES = 85017886720;
static const size_t TAKEN_BYTES = 600000000; /* by the context of a real process */

int fake_attribute(int attribute) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxBlockDimX: return 1024;
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY: return 65535;
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrTotalConstantMemory: return 65536;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxPitch: return 2147483647;
        case cudaDevAttrMaxRegistersPerBlock: return 65536;
        case cudaDevAttrClockRate: return 1980000; /* kHz */
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrMemoryClockRate: return 2619000; /* kHz */
        case cudaDevAttrGlobalMemoryBusWidth: return 5120; /* bits */
        case cudaDevAttrL2CacheSize: return 52428800;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrUnifiedAddressing: return 1;
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrComputeCapabilityMinor: return 0;
        case cudaDevAttrGlobalL1CacheSupported: return 1;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrManagedMemory: return 1;
        case cudaDevAttrConcurrentManagedAccess: return 1;
        case cudaDevAttrCooperativeLaunch: return 1;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
        case cudaDevAttrMemoryPoolsSupported: return 1;
        default: return 0;
    }
}

const char *fake_name(void) { return "NVIDIA H100 80GB HBM3"; }

size_t fake_memory_bytes(void) { return MEMORY_BYTES; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, fake_name());
    properties->totalGlobalMem = MEMORY_BYTES;
    properties->major = 9;
    properties->minor = 0;
    properties->warpSize = 32;
    properties->multiProcessorCount = 132;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 49152;
    properties->sharedMemPerBlockOptin = 232448;
    properties->sharedMemPerMultiprocessor = 233472;
    properties->totalConstMem = 65536;
    properties->l2CacheSize = 52428800;
    properties->memoryBusWidth = 5120;
    properties->textureAlignment = 512;
    properties->asyncEngineCount = 3;
    properties->unifiedAddressing = properties->canMapHostMemory = properties->managedMemory = 1;
    properties->concurrentKernels = properties->cooperativeLaunch = 1;
    for (int i = 0; i < 16; i++) properties->uuid.bytes[i] = i + 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = fake_attribute(attribute);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *devices) { *devices = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:00:04.0");
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorFake" : "cudaSuccess"; }

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the fake GPU";
}

/* ---- Memory. A table of all blocks tells whether an address is on the device, page-locked, or neither. ---- */

struct block { char *start; size_t bytes; enum cudaMemoryType type; };
static struct block blocks[65536];
static int block_count;
static size_t used_bytes;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

static void remember(void *start, size_t bytes, enum cudaMemoryType type) {
    pthread_mutex_lock(&table_lock);
    int i = 0;
    while (i < block_count && blocks[i].start) i++;
    if (i == sizeof blocks / sizeof *blocks) {
        fprintf(stderr, "fake GPU: more than %d blocks of memory\n", i);
        abort();
    }
    if (i == block_count) block_count++;
    blocks[i] = (struct block){start, bytes, type};
    if (type == cudaMemoryTypeDevice) used_bytes += bytes;
    pthread_mutex_unlock(&table_lock);
}

/* Return the size of the block that starts here, which leaves the table; 0 if none does. */
static size_t forget(void *start) {
    size_t bytes = 0;
    pthread_mutex_lock(&table_lock);
    for (int i = 0; i < block_count; i++)
        if (start && blocks[i].start == start) {
            bytes = blocks[i].bytes;
            if (blocks[i].type == cudaMemoryTypeDevice) used_bytes -= bytes;
            blocks[i].start = NULL;
            break;
        }
    pthread_mutex_unlock(&table_lock);
    return bytes;
}

static enum cudaMemoryType type_of(const void *address) {
    enum cudaMemoryType type = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&table_lock);
    for (int i = 0; i < block_count; i++) {
        const char *start = blocks[i].start;
        if (start && (const char *)address >= start && (const char *)address < start + blocks[i].bytes) {
            type = blocks[i].type;
            break;
        }
    }
    pthread_mutex_unlock(&table_lock);
    return type;
}

cudaError_t cudaMalloc(void **address, size_t bytes) {
    const size_t step = 2097151; /* The driver gives memory in pieces of 2 MiB. */
    size_t rounded = (bytes + step) & ~step;
    *address = NULL;
    if (used_bytes + rounded > MEMORY_BYTES - TAKEN_BYTES) return cudaErrorMemoryAllocation;
    void *start = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
    remember(start, rounded, cudaMemoryTypeDevice);
    *address = start;
    return cudaSuccess;
}

cudaError_t cudaFree(void *address) {
    size_t bytes = forget(address);
    if (bytes) munmap(address, bytes);
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) { return cudaMalloc(address, bytes); }
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return cudaFree(address); }

cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    if (posix_memalign(address, 4096, bytes ? bytes : 1)) return cudaErrorMemoryAllocation;
    remember(*address, bytes, cudaMemoryTypeHost);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *address) { forget(address); free(address); return cudaSuccess; }

cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    remember(address, bytes, cudaMemoryTypeHost);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address) { forget(address); return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = MEMORY_BYTES;
    *free_bytes = MEMORY_BYTES - TAKEN_BYTES - used_bytes;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = type_of(address);
    if (attributes->type == cudaMemoryTypeDevice) attributes->devicePointer = (void *)address;
    else attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

/* ---- Copies ---- */

static cudaError_t copy(void *to, const void *from, size_t bytes) {
    const size_t between_devices = 1048576, to_device = 67108864; /* Larger copies would only cost time. */
    const size_t few_numbers = 64;
    enum cudaMemoryType type_of_from = type_of(from), type_of_to = type_of(to);
    count(COPIES);
    if (type_of_to == cudaMemoryTypeDevice && bytes > to_device) return cudaSuccess;
    if (type_of_to == cudaMemoryTypeDevice && type_of_from == cudaMemoryTypeDevice && bytes > between_devices)
        return cudaSuccess;
    if (type_of_to != cudaMemoryTypeDevice && type_of_from == cudaMemoryTypeDevice && bytes <= few_numbers)
        memset(to, bytes == 1, bytes);
    else
        memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    count(SYNCHRONISATIONS); /* This form waits for the device. */
    return copy(to, from, bytes);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int one, const void *from, int other, size_t bytes, cudaStream_t stream) {
    return copy(to, from, bytes);
}

cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
    count(LAUNCHES);
    if (bytes < 65536 && type_of(address) == cudaMemoryTypeDevice) memset(address, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char memory[1 << 20];
    *address = memory;
    return cudaSuccess;
}

/* ---- Streams and events. All work is done at once, so there is nothing to wait for, but waiting is counted. ---- */

cudaError_t cudaDeviceSynchronize(void) { count(SYNCHRONISATIONS); return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { count(SYNCHRONISATIONS); return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { count(SYNCHRONISATIONS); return cudaSuccess; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    static long last = 0x1000;
    *stream = (cudaStream_t)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *number) {
    if (id) *id = 0;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags) {
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof(struct timespec));
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free((void *)event); return cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (event) clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    const struct timespec *a = (struct timespec *)from, *b = (struct timespec *)to;
    *milliseconds = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) * 1e-6f;
    if (*milliseconds < 1e-4f) *milliseconds = 1e-4f; /* Callers divide by it. */
    return cudaSuccess;
}

/* ---- Kernels: compiled code registers them and launches them through these functions. ---- */

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    count(LAUNCHES);
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    count(LAUNCHES);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    count(LAUNCHES);
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return cudaSuccess; }

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
char __cudaInitModule(void **handle) { return 1; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_of_one, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks_of_one = 8;
    return cudaSuccess;
}

/* torch asks the runtime for the driver's functions: they are those of driver.c. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *function = driver ? dlsym(driver, symbol) : NULL;
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { *pool = (void *)1; return cudaSuccess; }

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    memset(value, 0, 8);
    return cudaSuccess;
}

/* ---- cuBLAS. Handles and descriptors only need an address. ---- */

static int make_handle(void **handle) { *handle = malloc(16); return 0; }

int cublasCreate_v2(void **handle) { return make_handle(handle); }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(void **handle, int a, int b) { return make_handle(handle); }
int cublasLtMatrixLayoutCreate(void **handle, int a, uint64_t b, uint64_t c, int64_t d) { return make_handle(handle); }
int cublasLtMatmulPreferenceCreate(void **handle) { return make_handle(handle); }

int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int wanted, void *results,
                                   int *found) {
    memset(results, 0, 96); /* one result, whose state 0 means that it can be used */
    *found = 1;
    return 0;
}

int cublasLtMatmul(void) { count(PRODUCTS); return 0; }
int cublasGemmEx(void) { count(PRODUCTS); return 0; }
int cublasGemmStridedBatchedEx(void) { count(PRODUCTS); return 0; }
int cublasSgemm_v2(void) { count(PRODUCTS); return 0; }
int cublasSgemmStridedBatched(void) { count(PRODUCTS); return 0; }

/* ---- NCCL: a world of one process, whose collectives leave everything as it is. ---- */

int ncclGetVersion(int *version) { *version = 22807; return 0; }
int ncclGetUniqueId(void *id) { memset(id, 1, 128); return 0; }
int ncclCommInitRank(void **communicator, int ranks, ...) { return make_handle(communicator); }
int ncclCommInitRankConfig(void **communicator, int ranks, ...) { return make_handle(communicator); }
int ncclCommInitRankScalable(void **communicator, int ranks, ...) { return make_handle(communicator); }
int ncclCommGetAsyncError(void *communicator, int *error) { *error = 0; return 0; }
int ncclCommCount(void *communicator, int *ranks) { *ranks = 1; return 0; }
int ncclCommUserRank(void *communicator, int *rank) { *rank = 0; return 0; }
const char *ncclGetErrorString(int error) { return "error of the fake NCCL"; }
const char *ncclGetLastError(void *communicator) { return ""; }
int ncclAllReduce(void) { count(COLLECTIVES); return 0; }
int ncclAllGather(void) { count(COLLECTIVES); return 0; }
int ncclReduceScatter(void) { count(COLLECTIVES); return 0; }
int ncclBroadcast(void) { count(COLLECTIVES); return 0; }
int ncclReduce(void) { count(COLLECTIVES); return 0; }
int ncclSend(void) { count(COLLECTIVES); return 0; }
int ncclRecv(void) { count(COLLECTIVES); return 0; }
