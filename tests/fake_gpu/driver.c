// A CUDA driver without a GPU: loads nothing, launches nothing, and remembers what it was asked to launch, or tells
// somebody. Below runtime.c a kernel belongs to the device that was current when it was loaded.
#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define SAYS(...) { __VA_ARGS__; return CUDA_SUCCESS; }

extern int cudaGetDevice(int *device) __attribute__((weak));

static int current(void)
{
    int device = 0;
    if (cudaGetDevice)
        cudaGetDevice(&device);
    return device;
}

CUresult cuInit(unsigned flags) SAYS()
CUresult cuDriverGetVersion(int *version) SAYS(*version = 12080)
CUresult cuDeviceGetCount(int *count) SAYS(*count = 2)
CUresult cuDeviceGet(CUdevice *device, int ordinal) SAYS(*device = ordinal)
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) SAYS(*context = (CUcontext)1)
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) SAYS(*flags = 0; *active = 1)
CUresult cuCtxGetCurrent(CUcontext *context) SAYS(*context = (CUcontext)1)
CUresult cuCtxSetCurrent(CUcontext context) SAYS()
CUresult cuCtxGetDevice(CUdevice *device) SAYS(*device = current())
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) SAYS(*value = 1 << 20)
CUresult cuCtxSetLimit(CUlimit limit, size_t value) SAYS()
CUresult cuModuleLoadData(CUmodule *module, const void *image) SAYS(*module = (CUmodule)1)
CUresult cuModuleUnload(CUmodule module) SAYS()
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) SAYS()
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) SAYS()
CUresult cuGetErrorString(CUresult error, const char **text)
SAYS(*text = error == CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE ? "too many blocks in cooperative launch" : "stub")

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr p) SAYS(*(CUdeviceptr *)data = p)
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) SAYS(*n = 0)
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) SAYS(*status = 0)

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f)
SAYS(*value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0)

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
SAYS(*value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 232448)

enum { FUNCTIONS = 256, ARGUMENTS = 64, LAUNCHES = 1024, AT_ONCE = 32 };

// A function is a number from 1. The driver learns the sizes of its arguments from a test.
static uintptr_t functions;
static int counts[FUNCTIONS], sizes[FUNCTIONS][ARGUMENTS], devices[1 << 16];

CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name)
SAYS(*f = (CUfunction)(++functions); devices[functions] = current())

void expect(long f, int count, const int *bytes)
{
    counts[f] = count;
    memcpy(sizes[f], bytes, count * sizeof *bytes);
}

struct launch { long function, stream; int grid, threads, shared, cooperative, count; uint64_t values[ARGUMENTS]; };
struct launch launches[LAUNCHES];
int launched, refuses_cooperative;

// Who runs kernels, if anybody does: (function, grid, threads, shared, cooperative, stream, arguments).
CUresult (*runs)(long f, int grid, int threads, int shared, int cooperative, long stream, void **params);

static int is_cooperative(const CUlaunchConfig *config)
{
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
            return config->attrs[i].value.cooperative;
    return 0;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra)
{
    int cooperative = is_cooperative(config);
    if (cooperative && (refuses_cooperative || config->gridDimX > AT_ONCE))
        return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    if (runs && devices[(long)f] != current())
        return CUDA_ERROR_INVALID_CONTEXT;
    if (runs)
        return runs((long)f, config->gridDimX, config->blockDimX, config->sharedMemBytes, cooperative,
                    (long)config->hStream, params);
    struct launch *record = &launches[launched++ % LAUNCHES];
    memset(record, 0, sizeof *record);
    record->function = (long)f;
    record->stream = (long)config->hStream;
    record->grid = config->gridDimX;
    record->threads = config->blockDimX;
    record->shared = config->sharedMemBytes;
    record->cooperative = cooperative;
    record->count = counts[(long)f];
    for (int i = 0; i < record->count; i++)
        memcpy(&record->values[i], params[i], sizes[(long)f][i]);
    return CUDA_SUCCESS;
}
