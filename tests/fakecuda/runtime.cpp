// The CUDA runtime, cuBLAS and NCCL of one imaginary GPU whose kernels do nothing.
//
// Preloaded into a Python process (LD_PRELOAD), it lets PyTorch and DeepSpeed take their CUDA paths
// on a machine without a GPU. Device memory is host memory that nothing touches, so placement,
// allocation, launches and waits are real. Computed values and times mean nothing.
//
// Every function that returns a status returns 0, success. A function that only has to succeed is
// in a list below; its arguments are never read, so its signature does not matter.
#include <driver_types.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define SUCCEEDS(name) EXPORT int name() { return 0; }
#define COUNTS(name, what) EXPORT int name() { count(what); return 0; }

namespace {

constexpr size_t kMemory = 141'000'000'000;  // of an H200, which the properties below describe
constexpr size_t kCopied = 1 << 20;          // larger copies move nothing: they would fill RAM
constexpr size_t kPage = 4096;

enum Kind { kUnknown, kDevice, kPinned };
struct Block { size_t size; Kind kind; };

// Never destroyed: PyTorch frees memory after static destructors have run.
struct State {
  std::recursive_mutex mutex;
  std::map<std::string, long> counts;
  std::map<char*, Block> blocks;
  std::unordered_map<const void*, std::string> kernels;
  size_t used = 0;
};
State& state() { static auto* s = new State; return *s; }
using Lock = std::lock_guard<std::recursive_mutex>;

void count(const std::string& what) {
  Lock lock(state().mutex);
  ++state().counts[what];
}

int allocate(void** out, size_t size, Kind kind) {
  Lock lock(state().mutex);
  size = (size + kPage - 1) / kPage * kPage;
  if (kind == kDevice && state().used + size > kMemory) return cudaErrorMemoryAllocation;
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return cudaErrorMemoryAllocation;
  if (kind == kDevice) state().used += size;
  state().blocks[static_cast<char*>(p)] = {size, kind};
  *out = p;
  return 0;
}

int release(void* p) {
  Lock lock(state().mutex);
  auto found = state().blocks.find(static_cast<char*>(p));
  if (found == state().blocks.end()) return 0;
  if (found->second.kind == kDevice) state().used -= found->second.size;
  munmap(p, found->second.size);
  state().blocks.erase(found);
  return 0;
}

Kind kind_of(const void* p) {
  Lock lock(state().mutex);
  auto after = state().blocks.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (after == state().blocks.begin()) return kUnknown;
  auto [start, block] = *std::prev(after);
  return p < start + block.size ? block.kind : kUnknown;
}

int copy(void* to, const void* from, size_t size, const char* how) {
  static const char* names[] = {"pageable", "device", "pinned"};
  count(std::string(how) + " " + names[kind_of(from)] + " to " + names[kind_of(to)]);
  bool on_host = kind_of(to) != kDevice && kind_of(from) != kDevice;
  if (size <= kCopied || on_host) memcpy(to, from, size);
  return 0;
}

int fill(void* p, int value, size_t size) {
  count("memset");
  if (size <= kCopied) memset(p, value, size);
  return 0;
}

int launch(const void* kernel) {
  Lock lock(state().mutex);
  auto found = state().kernels.find(kernel);
  count("kernel:" + (found == state().kernels.end() ? "?" : found->second));
  return 0;
}

int new_handle(void** out) {
  static size_t next = 0x1000;
  Lock lock(state().mutex);
  *out = reinterpret_cast<void*>(next += 16);
  return 0;
}

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrL2CacheSize: return 62914560;
    case cudaDevAttrWarpSize: case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch: case cudaDevAttrManagedMemory: return 1;
    default: return 0;
  }
}

}  // namespace

// ---- what the tests call

EXPORT void fake_reset() {
  Lock lock(state().mutex);
  state().counts.clear();
}
EXPORT void fake_write(const char* path) {  // a line for each kind of event: count, tab, name
  Lock lock(state().mutex);
  FILE* file = fopen(path, "w");
  if (!file) return;
  for (auto& [name, times] : state().counts) fprintf(file, "%ld\t%s\n", times, name.c_str());
  fclose(file);
}
EXPORT void fake_count(const char* what) { count(what); }  // called by the driver too

// ---- device

EXPORT int cudaGetDeviceCount(int* n) { *n = 1; return 0; }
EXPORT int cudaGetDevice(int* device) { *device = 0; return 0; }
EXPORT int cudaDriverGetVersion(int* version) { *version = 13020; return 0; }
EXPORT int cudaRuntimeGetVersion(int* version) { *version = 13020; return 0; }
EXPORT int cudaDeviceGetAttribute(int* value, int which, int) {
  *value = attribute(which);
  return 0;
}
EXPORT int cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Imaginary H200");
  p->totalGlobalMem = kMemory;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  p->warpSize = p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  for (int i = 0; i < 3; ++i) {
    p->maxThreadsDim[i] = attribute(cudaDevAttrMaxBlockDimX + i);
    p->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
  }
  p->major = attribute(cudaDevAttrComputeCapabilityMajor);
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->memoryBusWidth = 6144;
  p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->cooperativeLaunch = 1;
  return 0;
}
EXPORT int cudaDeviceGetPCIBusId(char* id, int size, int) {
  snprintf(id, size, "0000:01:00.0");
  return 0;
}
EXPORT int cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return 0; }
EXPORT int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
SUCCEEDS(cudaSetDevice) SUCCEEDS(cudaDeviceEnablePeerAccess) SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError) SUCCEEDS(cudaProfilerStart) SUCCEEDS(cudaProfilerStop)
COUNTS(cudaDeviceSynchronize, "sync:device")

// ---- memory

EXPORT int cudaMalloc(void** p, size_t size) { return allocate(p, size, kDevice); }
EXPORT int cudaMallocAsync(void** p, size_t size, void*) { return allocate(p, size, kDevice); }
EXPORT int cudaMallocManaged(void** p, size_t size, int) { return allocate(p, size, kDevice); }
EXPORT int cudaHostAlloc(void** p, size_t size, int) { return allocate(p, size, kPinned); }
EXPORT int cudaMallocHost(void** p, size_t size) { return allocate(p, size, kPinned); }
EXPORT int cudaFree(void* p) { return release(p); }
EXPORT int cudaFreeAsync(void* p, void*) { return release(p); }
EXPORT int cudaFreeHost(void* p) { return release(p); }
EXPORT int cudaMemGetInfo(size_t* free, size_t* total) {
  *total = kMemory;
  *free = kMemory - state().used;
  return 0;
}
EXPORT int cudaMemcpy(void* to, const void* from, size_t size, int) {
  return copy(to, from, size, "sync:memcpy");
}
EXPORT int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) {
  return copy(to, from, size, "memcpy");
}
EXPORT int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void*) {
  return copy(to, from, size, "memcpy");
}
EXPORT int cudaMemset(void* p, int value, size_t size) { return fill(p, value, size); }
EXPORT int cudaMemsetAsync(void* p, int value, size_t size, void*) { return fill(p, value, size); }
EXPORT int cudaGetSymbolAddress(void** p, const void*) { return allocate(p, 1 << 16, kDevice); }
EXPORT int cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  Kind kind = kind_of(p);
  a->device = kind == kDevice ? 0 : -1;
  a->type = kind == kDevice ? cudaMemoryTypeDevice
          : kind == kPinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  if (kind != kUnknown) a->devicePointer = const_cast<void*>(p);
  if (kind == kPinned) a->hostPointer = const_cast<void*>(p);
  return 0;
}
SUCCEEDS(cudaHostRegister) SUCCEEDS(cudaHostUnregister) SUCCEEDS(cudaMemcpyToSymbol)

// ---- streams and events: every one has finished

EXPORT int cudaStreamCreate(void** stream) { return new_handle(stream); }
EXPORT int cudaStreamCreateWithFlags(void** stream, int) { return new_handle(stream); }
EXPORT int cudaStreamCreateWithPriority(void** stream, int, int) { return new_handle(stream); }
EXPORT int cudaEventCreate(void** event) { return new_handle(event); }
EXPORT int cudaEventCreateWithFlags(void** event, int) { return new_handle(event); }
EXPORT int cudaEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 1;
  return 0;
}
EXPORT int cudaStreamGetPriority(void*, int* priority) { *priority = 0; return 0; }
EXPORT int cudaStreamIsCapturing(void*, int* status) {
  *status = cudaStreamCaptureStatusNone;
  return 0;
}
EXPORT int cudaStreamGetCaptureInfo(void*, int* status, unsigned long long* id) {
  if (id) *id = 0;
  return cudaStreamIsCapturing(nullptr, status);
}
EXPORT int cudaLaunchHostFunc(void*, void (*function)(void*), void* data) {
  function(data);
  return 0;
}
SUCCEEDS(cudaStreamDestroy) SUCCEEDS(cudaStreamQuery) SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode) SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventRecord) SUCCEEDS(cudaEventRecordWithFlags) SUCCEEDS(cudaEventQuery)
COUNTS(cudaStreamSynchronize, "sync:stream")
COUNTS(cudaEventSynchronize, "sync:event")

// ---- kernels

struct Dim3 { unsigned x, y, z; };
struct Configuration { Dim3 grid, block; size_t shared; void* stream; };
static thread_local std::vector<Configuration> configurations;

EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  auto last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *stream = last.stream;
  return 0;
}
EXPORT void** __cudaRegisterFatBinary(void*) { static void* handle[4]; return handle; }
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name) {
  Lock lock(state().mutex);
  state().kernels[host] = name;
}
EXPORT int __cudaGetKernel(const void** kernel, const void* host) { *kernel = host; return 0; }
EXPORT int __cudaLaunchKernel(const void* kernel) { return launch(kernel); }
EXPORT int cudaLaunchKernel(const void* kernel) { return launch(kernel); }
EXPORT int cudaLaunchKernelExC(const void*, const void* kernel) { return launch(kernel); }
EXPORT int cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  return 0;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks) { *blocks = 2; return 0; }
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks) {
  *blocks = 2;
  return 0;
}
SUCCEEDS(__cudaRegisterFatBinaryEnd) SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(__cudaRegisterVar) SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaKernelSetAttributeForDevice) SUCCEEDS(fake_nothing)

// PyTorch asks here for functions of the driver, driver.c.
EXPORT int cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, int* status) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (!*function) *function = reinterpret_cast<void*>(fake_nothing);
  if (status) *status = cudaDriverEntryPointSuccess;
  return 0;
}

// ---- cuBLAS and cuBLASLt: a matrix product is one kernel

static char handle[4096];  // behind every opaque handle; PyTorch never looks inside
EXPORT int cublasCreate_v2(void** out) { *out = handle; return 0; }
EXPORT int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
EXPORT int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
EXPORT size_t cublasLtGetVersion() { return 130401; }
EXPORT int cublasLtMatrixLayoutCreate(void** out) { *out = handle; return 0; }
EXPORT int cublasLtMatmulDescCreate(void** out) { *out = handle; return 0; }
EXPORT int cublasLtMatmulPreferenceCreate(void** out) { *out = handle; return 0; }
struct Heuristic { unsigned long long algorithm[8]; size_t workspace; int status; float waves;
                   int reserved[4]; };
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                          Heuristic* found, int* how_many) {
  memset(found, 0, sizeof *found);
  *how_many = 1;
  return 0;
}
SUCCEEDS(cublasDestroy_v2) SUCCEEDS(cublasSetStream_v2) SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode) SUCCEEDS(cublasSetPointerMode_v2) SUCCEEDS(cublasSetSmCountTarget)
SUCCEEDS(cublasLtMatrixLayoutDestroy) SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulDescDestroy) SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy) SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
COUNTS(cublasGemmEx, "gemm") COUNTS(cublasGemmStridedBatchedEx, "gemm")
COUNTS(cublasSgemmEx, "gemm") COUNTS(cublasSgemv_v2, "gemm") COUNTS(cublasSdot_v2, "gemm")
COUNTS(cublasLtMatmul, "gemm")

// ---- NCCL: one rank, alone in every group

EXPORT int ncclGetUniqueId(void* id) { memset(id, 1, 128); return 0; }
EXPORT int ncclCommInitRank(void** out) { *out = handle; return 0; }
EXPORT int ncclCommInitRankConfig(void** out) { *out = handle; return 0; }
EXPORT int ncclCommInitRankScalable(void** out) { *out = handle; return 0; }
EXPORT int ncclCommSplit(void*, int, int, void** out) { *out = handle; return 0; }
EXPORT int ncclCommGetAsyncError(void*, int* error) { *error = 0; return 0; }
EXPORT int ncclCommCount(void*, int* n) { *n = 1; return 0; }
EXPORT int ncclCommUserRank(void*, int* rank) { *rank = 0; return 0; }
EXPORT int ncclMemAlloc(void** p, size_t size) { return allocate(p, size, kDevice); }
EXPORT int ncclMemFree(void* p) { return release(p); }
EXPORT int ncclCommRegister(void*, void*, size_t, void** out) { *out = handle; return 0; }
EXPORT const char* ncclGetLastError(void*) { return "none: these are no real GPUs"; }
SUCCEEDS(ncclCommDestroy) SUCCEEDS(ncclCommAbort) SUCCEEDS(ncclCommFinalize)
SUCCEEDS(ncclGroupStart) SUCCEEDS(ncclGroupEnd) SUCCEEDS(ncclRedOpDestroy)
SUCCEEDS(ncclCommDeregister) SUCCEEDS(ncclRedOpCreatePreMulSum)
COUNTS(ncclAllReduce, "nccl:all_reduce") COUNTS(ncclBroadcast, "nccl:broadcast")
COUNTS(ncclBcast, "nccl:broadcast") COUNTS(ncclReduce, "nccl:reduce")
COUNTS(ncclReduceScatter, "nccl:reduce_scatter") COUNTS(ncclSend, "nccl:send")
COUNTS(ncclRecv, "nccl:recv")
// Ranks are compared with it when a group starts, so these values arrive.
EXPORT int ncclAllGather(const void* from, void* to, size_t items, int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  count("nccl:all_gather");
  if (from != to && items * sizes[type] <= kCopied) memcpy(to, from, items * sizes[type]);
  return 0;
}
