/* A stand-in for the CUDA driver (libcuda.so.1), as far as torch and Triton call it.
 *
 * Modules load, and launches are counted and do nothing. What the device is stands in runtime.c alone; this file asks
 * there, because it is a library of its own that is loaded by its name. Functions in the second part only say yes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { SUCCESS = 0, NOT_FOUND = 500 };

static void *of_runtime(const char *name) { return dlsym(RTLD_DEFAULT, name); }

int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGetCount(int *devices) { *devices = 1; return SUCCESS; }
int cuDeviceGet(int *device, int index) { *device = 0; return SUCCESS; }

int cuDeviceGetName(char *name, int size, int device) {
    const char *(*fake_name)(void) = of_runtime("fake_name");
    snprintf(name, size, "%s", fake_name ? fake_name() : "");
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    size_t (*fake_memory_bytes)(void) = of_runtime("fake_memory_bytes");
    *bytes = fake_memory_bytes ? fake_memory_bytes() : 0;
    return SUCCESS;
}

/* The driver and the runtime number the attributes of a device alike. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int (*fake_attribute)(int) = of_runtime("fake_attribute");
    *value = fake_attribute ? fake_attribute(attribute) : 0;
    return SUCCESS;
}

/* ---- One context, one module, one function: their addresses are never read. ---- */

static char context, module, function;

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **result, int device) { *result = &context; return SUCCESS; }
int cuCtxGetCurrent(void **result) { *result = &context; return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1048576; return SUCCESS; }
int cuModuleLoad(void **result, const char *file) { *result = &module; return SUCCESS; }
int cuModuleLoadData(void **result, const void *image) { *result = &module; return SUCCESS; }
int cuModuleLoadDataEx(void **result, const void *image) { *result = &module; return SUCCESS; }
int cuModuleGetFunction(void **result, void *of, const char *name) { *result = &function; return SUCCESS; }

int cuFuncGetAttribute(int *value, int attribute, void *of) {
    *value = attribute == 0 ? 1024 /* threads of a block */ : attribute == 4 ? 32 /* registers */ : 0;
    return SUCCESS;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { *blocks = 4; return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *clusters) { *clusters = 66; return SUCCESS; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t address) { *(uint64_t *)value = address; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "error of the fake driver"; return SUCCESS; }
int cuGetErrorName(int error, const char **text) { *text = "CUDA_ERROR_FAKE"; return SUCCESS; }

static int launch(void) {
    static void (*fake_launch)(void);
    if (!fake_launch) fake_launch = of_runtime("fake_launch");
    if (fake_launch) fake_launch();
    return SUCCESS;
}

int cuLaunchKernel(void) { return launch(); }
int cuLaunchKernelEx(void) { return launch(); }
int cuLaunchCooperativeKernel(void) { return launch(); }

int cuGetProcAddress_v2(const char *name, void **result, int version, uint64_t flags, int *status) {
    *result = dlsym(RTLD_DEFAULT, name);
    if (status) *status = *result ? 0 : 1;
    return *result ? SUCCESS : NOT_FOUND;
}

/* ---- Functions that only say yes ---- */

#define YES(name) int name(void) { return SUCCESS; }
YES(cuInit)
YES(cuCtxSetCurrent) YES(cuCtxSynchronize) YES(cuCtxSetLimit)
YES(cuDevicePrimaryCtxRelease) YES(cuDevicePrimaryCtxRelease_v2)
YES(cuModuleUnload) YES(cuFuncSetAttribute) YES(cuFuncSetCacheConfig)
YES(cuLinkCreate_v2) YES(cuLinkAddData_v2) YES(cuLinkComplete) YES(cuTensorMapEncodeTiled)
YES(cuStreamSynchronize) YES(cuStreamWriteValue32_v2) YES(cuEventCreate) YES(cuGetProcAddress)
YES(cuMemCreate) YES(cuMemMap) YES(cuMemUnmap) YES(cuMemRelease) YES(cuMemSetAccess) YES(cuMemAddressReserve)
YES(cuMemAddressFree) YES(cuMemGetAllocationGranularity) YES(cuMemGetHandleForAddressRange)
YES(cuMemExportToShareableHandle) YES(cuMemImportFromShareableHandle) YES(cuIpcGetMemHandle)
YES(cuMulticastCreate) YES(cuMulticastAddDevice) YES(cuMulticastBindMem) YES(cuMulticastUnbind) YES(cuGreenCtxCreate)
