/* The driver (libcuda) of the imaginary GPU in runtime.cpp: PyTorch and Triton load it by name. */
#include <stddef.h>
#include <string.h>

extern void fake_count(const char *what); /* runtime.cpp */

static int nothing(void) { return 0; }

#define SUCCEEDS(name) int name(void) { return 0; }
SUCCEEDS(cuInit) SUCCEEDS(cuCtxSetCurrent) SUCCEEDS(cuCtxGetLimit) SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuDevicePrimaryCtxRelease) SUCCEEDS(cuModuleUnload) SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig) SUCCEEDS(cuStreamIsCapturing) SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuTensorMapEncodeTiled) SUCCEEDS(cuKernelGetAttribute) SUCCEEDS(cuModuleLoad)

int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *device, int which) { *device = which; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, "Imaginary H200", (size_t)size);
    return 0;
}
int cuDeviceGetUuid(char *id, int device) { memset(id, 1, 16); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 141000000000UL; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    switch (which) { /* CUdevice_attribute */
    case 10: *value = 32; break;      /* warp size */
    case 13: *value = 1980000; break; /* clock rate, kHz */
    case 16: *value = 132; break;     /* multiprocessors */
    case 75: *value = 9; break;       /* compute capability, major */
    case 97: *value = 232448; break;  /* shared memory per block, opt-in */
    default: *value = 0;
    }
    return 0;
}
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "imaginary"; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "imaginary"; return 0; }

/* What Triton loads and launches. */
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)1;
    return 0;
}
int cuFuncGetAttribute(int *value, int which, void *function) { *value = 0; return 0; }
int cuOccupancyMaxActiveClusters(int *n) { *n = 1; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 2; return 0; }
int cuLaunchKernel(void) { fake_count("kernel:triton"); return 0; }
int cuLaunchKernelEx(void) { fake_count("kernel:triton"); return 0; }
int cuLaunchCooperativeKernel(void) { fake_count("kernel:triton"); return 0; }

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags,
                        int *status) {
    *function = (void *)nothing;
    if (!strcmp(name, "cuCtxGetCurrent")) *function = (void *)cuCtxGetCurrent;
    if (!strcmp(name, "cuDevicePrimaryCtxGetState")) *function = (void *)cuDevicePrimaryCtxGetState;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
