// The CUDA runtime that torch calls, without a GPU: device memory is the host's, streams run at once. Loaded before the
// real one, for torch built for CUDA 13. What torch launches itself fails, and says its name: torch_kernels.py takes
// its place.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef cudaError_t API;
#define DOES(...) { __VA_ARGS__; return cudaSuccess; }

enum { DEVICES = 2, BLOCKS = 1 << 16, KERNELS = 1 << 17 };

static __thread int device;
static __thread API last;

// --- Memory: blocks that are NaN at first.

static struct block { char *start; size_t size; int device, kind; } blocks[BLOCKS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct block *block_of(const void *p)
{
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].start && (char *)p >= blocks[i].start && (char *)p <= blocks[i].start + blocks[i].size)
            return &blocks[i];
    return NULL;
}

static API get(void **p, size_t size, int kind)
{
    if (posix_memalign(p, 2 << 20, size + 1))
        return cudaErrorMemoryAllocation;
    memset(*p, 0xFF, size);
    pthread_mutex_lock(&lock);
    int i = 0;
    while (blocks[i].start)
        i++;
    blocks[i] = (struct block){*p, size, device, kind};
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static API give_back(void *p)
{
    pthread_mutex_lock(&lock);
    struct block *found = p ? block_of(p) : NULL;
    if (found) {
        free(found->start);
        found->start = NULL;
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

API cudaMalloc(void **p, size_t size) { return get(p, size, cudaMemoryTypeDevice); }
API cudaMallocAsync(void **p, size_t size, cudaStream_t s) { return get(p, size, cudaMemoryTypeDevice); }
API cudaMallocHost(void **p, size_t size) { return get(p, size, cudaMemoryTypeHost); }
API cudaHostAlloc(void **p, size_t size, unsigned flags) { return get(p, size, cudaMemoryTypeHost); }
API cudaMallocManaged(void **p, size_t size, unsigned flags) { return get(p, size, cudaMemoryTypeManaged); }
API cudaFree(void *p) { return give_back(p); }
API cudaFreeAsync(void *p, cudaStream_t s) { return give_back(p); }
API cudaFreeHost(void *p) { return give_back(p); }
API cudaHostRegister(void *p, size_t size, unsigned flags) DOES()
API cudaHostUnregister(void *p) DOES()
API cudaMemGetInfo(size_t *left, size_t *all) DOES(*left = 100ull << 30; *all = 141ull << 30)

API cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p)
{
    struct block *found = block_of(p);
    memset(a, 0, sizeof *a);
    a->type = found ? found->kind : cudaMemoryTypeUnregistered;
    a->device = found ? found->device : -2;
    a->devicePointer = found ? (void *)p : NULL;
    a->hostPointer = found && found->kind != cudaMemoryTypeDevice ? (void *)p : NULL;
    return cudaSuccess;
}

typedef enum cudaMemcpyKind Kind;
API cudaMemcpy(void *to, const void *from, size_t size, Kind kind) DOES(memmove(to, from, size))
API cudaMemcpyAsync(void *to, const void *from, size_t size, Kind kind, cudaStream_t s) DOES(memmove(to, from, size))
API cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t s)
DOES(memmove(to, from, size))
API cudaMemcpy2DAsync(void *to, size_t to_row, const void *from, size_t from_row, size_t size, size_t rows, Kind kind,
                      cudaStream_t s)
DOES(for (size_t i = 0; i < rows; i++) memmove((char *)to + i * to_row, (char *)from + i * from_row, size))
API cudaMemset(void *p, int value, size_t size) DOES(memset(p, value, size))
API cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) DOES(memset(p, value, size))
API cudaMemcpyToSymbol(const void *to, const void *from, size_t size, size_t offset, Kind kind) DOES()
API cudaGetSymbolAddress(void **p, const void *symbol) DOES(*p = (void *)symbol)

// --- Devices: two small H200.

API cudaGetDeviceCount(int *count)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = visible && !*visible ? 0 : DEVICES;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}

API cudaGetDevice(int *found) DOES(*found = device)
API cudaSetDevice(int next)
{
    if (next < 0 || next >= DEVICES)
        return cudaErrorInvalidDevice;
    device = next;
    return cudaSuccess;
}

API cudaDeviceSynchronize(void) DOES()
API cudaDeviceGetPCIBusId(char *id, int size, int d) DOES(snprintf(id, size, "0000:0%d:00.0", d))
API cudaDeviceGetStreamPriorityRange(int *least, int *greatest) DOES(*least = 0; *greatest = -5)
API cudaDeviceCanAccessPeer(int *can, int a, int b) DOES(*can = 1)
API cudaDeviceEnablePeerAccess(int peer, unsigned flags) DOES()
API cudaDriverGetVersion(int *version) DOES(*version = 13000)
API cudaRuntimeGetVersion(int *version) DOES(*version = 13000)
API cudaProfilerStart(void) DOES()
API cudaProfilerStop(void) DOES()
API cudaGetLastError(void) { API found = last; last = cudaSuccess; return found; }
API cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(API error) { return "an error without a GPU"; }
const char *cudaGetErrorString(API error)
{
    if (error == cudaErrorStreamCaptureUnsupported)
        return "operation not permitted when stream is capturing";
    if (error == cudaErrorStreamCaptureInvalidated)
        return "operation failed due to a previous error during capture";
    if (error == cudaErrorCapturedEvent)
        return "operation not permitted on an event last recorded in a capturing stream";
    static char text[32];
    snprintf(text, sizeof text, "CUDA error %d", error);
    return text;
}

API cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int d)
DOES(*value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrComputeCapabilityMinor ? 0 :
     attribute == cudaDevAttrWarpSize ? 32 : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448 : 2)

API cudaGetDeviceProperties(struct cudaDeviceProp *p, int d)
{
    memset(p, 0, sizeof *p);
    strcpy(p->name, "a GPU that is not there");
    p->major = 9;
    p->warpSize = 32;
    p->multiProcessorCount = 2;
    p->totalGlobalMem = 141ull << 30;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsPerBlock = 1024;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerMultiprocessor = p->regsPerBlock = 65536;
    p->l2CacheSize = 60 << 20;
    return cudaSuccess;
}

// torch asks for functions of the driver by their names.
API cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                     enum cudaDriverEntryPointQueryResult *result)
{
    *f = dlsym(dlopen("libcuda.so.1", RTLD_LAZY), name);
    if (result)
        *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *f ? cudaSuccess : cudaErrorSymbolNotFound;
}

API cudaGetDriverEntryPoint(const char *name, void **f, unsigned long long flags,
                            enum cudaDriverEntryPointQueryResult *result)
{
    return cudaGetDriverEntryPointByVersion(name, f, 0, flags, result);
}

// --- Streams and events. While a graph is captured, what waits is an error, as on a GPU.

struct stream { int captures; unsigned long long capture; void *graph; };
int capturing;                                   // how many graphs are captured now
int spoilt;                                      // whether somebody waited meanwhile, after which none of them is right
void (*on_capture)(void *graph);                 // NULL where a capture ends
void (*on_replay)(void *graph);

static struct stream *of(cudaStream_t s)
{
    static struct stream legacy;
    return (uintptr_t)s <= 2 ? &legacy : (struct stream *)s;
}

static API wait(void)
{
    spoilt |= capturing > 0;
    return last = capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

#define NEW(type) calloc(1, sizeof(struct type))

API cudaStreamCreate(cudaStream_t *s) DOES(*s = NEW(stream))
API cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) DOES(*s = NEW(stream))
API cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) DOES(*s = NEW(stream))
API cudaStreamDestroy(cudaStream_t s) DOES()
API cudaStreamQuery(cudaStream_t s) { return wait(); }
API cudaStreamSynchronize(cudaStream_t s) { return wait(); }
API cudaStreamGetPriority(cudaStream_t s, int *priority) DOES(*priority = 0)
API cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags) DOES()
API cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned flags)
DOES(f(s, cudaSuccess, data))
API cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) DOES(f(data))

struct event { int answers, captured; };
int late;                                        // how often an event that was recorded is said not to be over

API cudaEventCreate(cudaEvent_t *event) DOES(*event = NEW(event))
API cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) DOES(*event = NEW(event))
API cudaEventDestroy(cudaEvent_t event) DOES(free(event))
API cudaEventRecord(cudaEvent_t event, cudaStream_t s)
DOES(*(struct event *)event = (struct event){late, of(s)->captures})
API cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned flags) { return cudaEventRecord(event, s); }
API cudaEventQuery(cudaEvent_t event)
{
    struct event *it = (struct event *)event;
    if (it->captured)
        return last = cudaErrorCapturedEvent;
    if (wait())
        return last;
    return it->answers-- > 0 ? cudaErrorNotReady : cudaSuccess;
}

API cudaEventSynchronize(cudaEvent_t event)
{
    struct event *it = (struct event *)event;
    it->answers = 0;
    return it->captured ? (last = cudaErrorCapturedEvent) : wait();
}

API cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) DOES(*ms = 1)

API cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status)
DOES(*status = of(s)->captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone)

API cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode)
{
    static unsigned long long captures;
    struct stream *it = of(s);
    if ((uintptr_t)s <= 2)
        return cudaErrorStreamCaptureUnsupported;
    capturing++;
    *it = (struct stream){1, ++captures, malloc(1)};
    if (on_capture)
        on_capture(it->graph);
    return cudaSuccess;
}

API cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph)
{
    capturing -= of(s)->captures;
    of(s)->captures = 0;
    if (on_capture)
        on_capture(NULL);
    API found = spoilt ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    *graph = spoilt ? NULL : of(s)->graph;
    spoilt &= capturing > 0;
    return last = found;
}

API cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                             cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                             size_t *count)
{
    if (id)
        *id = of(s)->capture;
    if (graph)
        *graph = of(s)->graph;
    if (count)
        *count = 0;
    return cudaStreamIsCapturing(s, status);
}

API cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) DOES()
API cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
DOES(*exec = (cudaGraphExec_t)graph)
API cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
DOES(*exec = (cudaGraphExec_t)graph)
API cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) DOES(if (on_replay) on_replay(exec))
API cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) DOES(*count = 1)
API cudaGraphDestroy(cudaGraph_t graph) DOES()
API cudaGraphExecDestroy(cudaGraphExec_t exec) DOES()

// --- Kernels of torch's own.

static struct { const void *f; const char *name; } kernels[KERNELS];
static int count;

static API fails(const void *f)
{
    for (int i = 0; i < count; i++)
        if (kernels[i].f == f)
            fprintf(stderr, "torch launches %s, whose operation has no twin here\n", kernels[i].name);
    return last = cudaErrorLaunchFailure;
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **h, char *v, char *d, const char *n, int e, size_t s, int c, int g) {}
void __cudaRegisterFunction(void **h, const char *f, char *d, const char *name, int t, void *a, void *b, void *c,
                            void *e, int *w)
{
    if (count < KERNELS) {
        kernels[count].f = f;
        kernels[count++].name = name;
    }
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *s) { return 0; }
API __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *s)
DOES(*grid = *block = (dim3){1, 1, 1}; *shared = 0; *(void **)s = NULL)
API __cudaGetKernel(cudaKernel_t *kernel, const void *f) DOES(*kernel = (cudaKernel_t)f)
API __cudaLaunchKernel(cudaKernel_t f, dim3 a, dim3 b, void **args, size_t shared, cudaStream_t s) { return fails(f); }
API cudaLaunchKernel(const void *f, dim3 a, dim3 b, void **args, size_t shared, cudaStream_t s) { return fails(f); }
API cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) { return fails(f); }
API cudaLaunchCooperativeKernel(const void *f, dim3 a, dim3 b, void **args, size_t shared, cudaStream_t s)
{
    return fails(f);
}

API cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute attribute, int value) DOES()
API cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f)
DOES(memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024)
API cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int threads, size_t shared)
DOES(*blocks = 2)
API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int threads, size_t shared,
                                                           unsigned flags)
DOES(*blocks = 2)

void _ZN2at4cuda5sleepEl(int64_t cycles) {}     // at::cuda::sleep
