// A CUDA runtime without a GPU, for a torch that is built for CUDA: loaded before the real one (LD_PRELOAD, see run.py).
//
// Memory of a "GPU" is the host's, filled with NaN when it is given out (up to 64 MiB). A stream is a queue: its work runs at once or,
// with FAKE_GPU_LAZY=1, as late as synchronisation allows, so that what reads a result too early, or changes an input
// too early, shows. A graph is the list of what its streams were given while they captured. What CUDA forbids while
// somebody captures is an error here too. Kernels of torch's own libraries are not run: operators.cpp.
//
// FAKE_GPUS: how many there are (1); FAKE_GPU_GIB: memory of each (141); FAKE_GPU_NAME.
#include "runtime.h"

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace {

using Work = std::function<void()>;
using Lock = std::lock_guard<std::recursive_mutex>;

struct Graph {
  std::vector<std::shared_ptr<const Work>> works;
};
struct Capture {
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  unsigned long long id = 0;
  bool broken = false;
};
struct Stream {
  int priority = 0;
  std::deque<Work> queue;
  std::shared_ptr<Capture> capture;
};
struct Event {
  uint64_t recorded = 0, done = 0;
  Stream* stream = nullptr;
  std::shared_ptr<Capture> capture;
  timespec time{};
};
enum class Kind { device, pinned };
struct Block {
  size_t bytes;
  Kind kind;
  int device;
};

std::recursive_mutex mutex;
std::map<int, Stream> default_streams;
std::set<Stream*> streams;
std::set<std::shared_ptr<Capture>> captures;
std::map<uintptr_t, Block> blocks;
std::map<int, size_t> used;
unsigned long long captured = 0;
thread_local int device = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

int number(const char* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
int gpus() { return number("FAKE_GPUS", 1); }
size_t memory() { return size_t(number("FAKE_GPU_GIB", 141)) << 30; }
const bool lazy = number("FAKE_GPU_LAZY", 0);

cudaError_t failed(cudaError_t error, const char* why) {
  fprintf(stderr, "fake GPU: %s (%d)\n", why, int(error));
  return last = error;
}

Stream* of(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread) return &default_streams[device];
  return reinterpret_cast<Stream*>(stream);
}
Event* of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }
std::shared_ptr<Graph>* of(void* graph) { return static_cast<std::shared_ptr<Graph>*>(graph); }

void step(Stream* stream) {
  const Work work = std::move(stream->queue.front());
  stream->queue.pop_front();
  work();
}
void finish(Stream* stream) {
  while (!stream->queue.empty()) step(stream);
}
void finish_all() {
  for (auto& [_, stream] : default_streams) finish(&stream);
  for (Stream* stream : streams) finish(stream);
}
void finish(Event* event, uint64_t version) {
  while (event->done < version && event->stream && !event->stream->queue.empty()) step(event->stream);
}

void submit(Stream* stream, Work work) {
  if (stream->capture)
    stream->capture->graph->works.push_back(std::make_shared<const Work>(std::move(work)));
  else if (lazy)
    stream->queue.push_back(std::move(work));
  else
    work();
}

// For a call that CUDA does not allow while somebody captures, unless the thread has said that it knows what it does.
cudaError_t refused_in_capture(const char* what) {
  if (captures.empty() || capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto& capture : captures) capture->broken = true;
  return failed(cudaErrorStreamCaptureUnsupported, what);
}
#define REFUSED_IN_CAPTURE(what) \
  if (const cudaError_t error = refused_in_capture(what " while a stream captures")) return error

const Block* block_of(const void* place) {
  auto next = blocks.upper_bound(uintptr_t(place));
  if (next == blocks.begin()) return nullptr;
  const auto& [begin, block] = *--next;
  return uintptr_t(place) < begin + block.bytes ? &block : nullptr;
}

cudaError_t allocate(void** place, size_t bytes, Kind kind) {
  const Lock lock(mutex);
  *place = nullptr;
  if (kind == Kind::device) {
    REFUSED_IN_CAPTURE("memory taken");
    if (used[device] + bytes > memory()) return last = cudaErrorMemoryAllocation;
    used[device] += bytes;
  }
  *place = aligned_alloc(4096, std::max<size_t>(4096, (bytes + 4095) / 4096 * 4096));
  if (bytes <= 64 << 20) memset(*place, 0xff, bytes);  // more would take time
  blocks[uintptr_t(*place)] = {bytes, kind, device};
  return cudaSuccess;
}

cudaError_t release(void* place) {
  const Lock lock(mutex);
  if (!place) return cudaSuccess;
  REFUSED_IN_CAPTURE("memory freed");
  finish_all();
  const auto found = blocks.find(uintptr_t(place));
  if (found == blocks.end()) return failed(cudaErrorInvalidValue, "memory freed that nobody has");
  if (found->second.kind == Kind::device) used[found->second.device] -= found->second.bytes;
  blocks.erase(found);
  free(place);
  return cudaSuccess;
}

}  // namespace

void fake_gpu_submit(void* stream, const std::function<void()>& work) {
  const Lock lock(mutex);
  submit(of(static_cast<cudaStream_t>(stream)), work);
}

// Kernels of libraries that nvcc has compiled: known to nobody, run by nobody.
API void** __cudaRegisterFatBinary(void*) {
  static void* handle[2];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 1; }
API cudaError_t __cudaGetKernel(void** kernel, const void* function) { return *kernel = const_cast<void*>(function), cudaSuccess; }
API cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  return *grid = *block = dim3(1), *shared = 0, *static_cast<void**>(stream) = nullptr, cudaSuccess;
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return cudaSuccess; }
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->binaryVersion = found->ptxVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  return *n = 2, cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** place, const void* symbol) { return *place = const_cast<void*>(symbol), cudaSuccess; }
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

// The GPUs: an H200's facts.
API cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaGetDeviceCount(int* n) { return *n = gpus(), *n ? cudaSuccess : cudaErrorNoDevice; }
API cudaError_t cudaGetDevice(int* current) { return *current = device, cudaSuccess; }
API cudaError_t cudaSetDevice(int chosen) {
  if (chosen < 0 || chosen >= gpus()) return failed(cudaErrorInvalidDevice, "a GPU that is not there");
  return device = chosen, cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int chosen) {
  *p = {};
  snprintf(p->name, sizeof p->name, "%s", getenv("FAKE_GPU_NAME") ? getenv("FAKE_GPU_NAME") : "NVIDIA H200");
  memset(p->uuid.bytes, chosen + 1, sizeof p->uuid.bytes);
  p->pciBusID = chosen + 1, p->totalGlobalMem = memory(), p->major = 9, p->multiProcessorCount = 132, p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64, p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = INT32_MAX, p->maxGridSize[1] = p->maxGridSize[2] = 65535, p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10, p->sharedMemPerMultiprocessor = 228 << 10,
  p->l2CacheSize = 60 << 20;
  p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = p->managedMemory = p->cooperativeLaunch = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int chosen) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, chosen);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(p.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(p.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(p.sharedMemPerMultiprocessor); break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int chosen) {
  return snprintf(text, size, "0000:%02x:00.0", chosen + 1), cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return *pool = nullptr, cudaSuccess; }
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  return *static_cast<uint64_t*>(value) = 0, cudaSuccess;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(+[] { return 0; });
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
API const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "an error of the fake GPU";
}
API const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the fake GPU";
}
API cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
API cudaError_t cudaPeekAtLastError() { return last; }

// Memory.
API cudaError_t cudaMalloc(void** place, size_t bytes) { return allocate(place, bytes, Kind::device); }
API cudaError_t cudaMallocAsync(void** place, size_t bytes, cudaStream_t) { return allocate(place, bytes, Kind::device); }
API cudaError_t cudaHostAlloc(void** place, size_t bytes, unsigned) { return allocate(place, bytes, Kind::pinned); }
API cudaError_t cudaFree(void* place) { return release(place); }
API cudaError_t cudaFreeAsync(void* place, cudaStream_t) { return release(place); }
API cudaError_t cudaFreeHost(void* place) { return release(place); }
API cudaError_t cudaHostRegister(void* place, size_t bytes, unsigned) {
  const Lock lock(mutex);
  return blocks[uintptr_t(place)] = {bytes, Kind::pinned, device}, cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* place) {
  const Lock lock(mutex);
  return finish_all(), blocks.erase(uintptr_t(place)), cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  const Lock lock(mutex);
  return *total = memory(), *left = *total - used[device], cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* place) {
  const Lock lock(mutex);
  const Block* block = block_of(place);
  *found = {};
  found->type = !block ? cudaMemoryTypeUnregistered : block->kind == Kind::device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  found->device = block ? block->device : -2;
  found->devicePointer = found->hostPointer = const_cast<void*>(place);
  return cudaSuccess;
}
// From pageable memory as it is now, as CUDA does; to it before the call returns.
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const Lock lock(mutex);
  const Block *target = block_of(to), *source = block_of(from);
  const bool to_gpu = target && target->kind == Kind::device, from_gpu = source && source->kind == Kind::device;
  if ((kind == cudaMemcpyHostToDevice && !to_gpu) || (kind == cudaMemcpyDeviceToHost && !from_gpu) ||
      (kind == cudaMemcpyDeviceToDevice && !(to_gpu && from_gpu)))
    return failed(cudaErrorInvalidValue, "a copy whose places are not where it says");
  if (of(stream)->capture && !(target && source)) fprintf(stderr, "fake GPU: a graph copies from or to pageable memory\n");
  if (source || of(stream)->capture) {
    submit(of(stream), [=] { memmove(to, from, bytes); });
  } else {
    const auto now = std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    submit(of(stream), [=] { memcpy(to, now->data(), bytes); });
  }
  if (!target && !of(stream)->capture) finish(of(stream));
  return cudaSuccess;
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  const Lock lock(mutex);
  return submit(of(stream), [=] { memmove(to, from, bytes); }), cudaSuccess;
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows, cudaMemcpyKind,
                                  cudaStream_t stream) {
  const Lock lock(mutex);
  submit(of(stream), [=] {
    for (size_t i = 0; i < rows; i++)
      memmove(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
  });
  return finish(of(stream)), cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const Lock lock(mutex);
  REFUSED_IN_CAPTURE("a copy that waits");
  return finish_all(), memmove(to, from, bytes), cudaSuccess;
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const Lock lock(mutex);
  return finish(of(cudaStream_t{})), memset(to, value, bytes), cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(mutex);
  return submit(of(stream), [=] { memset(to, value, bytes); }), cudaSuccess;
}
API cudaError_t cudaIpcCloseMemHandle(void*) { return cudaErrorNotSupported; }
API cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { return cudaErrorNotSupported; }
API cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return cudaErrorNotSupported; }
API cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return cudaErrorNotSupported; }
API cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return cudaErrorNotSupported; }

// Streams and events.
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  const Lock lock(mutex);
  auto* made = new Stream;
  made->priority = priority;
  streams.insert(made);
  return *stream = reinterpret_cast<cudaStream_t>(made), cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {  // its memory stays: events name it
  const Lock lock(mutex);
  return finish(of(stream)), streams.erase(of(stream)), cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) { return *priority = of(stream)->priority, cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(mutex);
  if (auto& capture = of(stream)->capture)
    return capture->broken = true, failed(cudaErrorStreamCaptureUnsupported, "a wait for a stream that captures");
  REFUSED_IN_CAPTURE("a wait for a stream");
  return finish(of(stream)), cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Lock lock(mutex);
  if (auto& capture = of(stream)->capture)
    return capture->broken = true, failed(cudaErrorStreamCaptureUnsupported, "a question to a stream that captures");
  if (of(stream)->queue.empty()) return cudaSuccess;
  return step(of(stream)), cudaErrorNotReady;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t waiting, cudaEvent_t for_event, unsigned) {
  const Lock lock(mutex);
  Stream* stream = of(waiting);
  Event* event = of(for_event);
  if (event->capture) {
    if (stream->capture && stream->capture != event->capture) return failed(cudaErrorStreamCaptureMerge, "two captures that meet");
    return stream->capture = event->capture, cudaSuccess;
  }
  const uint64_t version = event->recorded;
  if (event->done >= version) return cudaSuccess;
  if (stream->capture)
    return stream->capture->broken = true, failed(cudaErrorStreamCaptureIsolation, "a stream that captures waits for one that does not");
  return submit(stream, [=] { finish(event, version); }), cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  const Lock lock(mutex);
  return submit(of(stream), [=] { call(stream, cudaSuccess, data); }), cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  const Lock lock(mutex);
  return submit(of(stream), [=] { call(data); }), cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  const Lock lock(mutex);
  REFUSED_IN_CAPTURE("a wait for everything");
  return finish_all(), cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // its memory stays: queues name it
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t recorded, cudaStream_t on, unsigned) {
  const Lock lock(mutex);
  Event* event = of(recorded);
  event->stream = of(on), event->capture = of(on)->capture;
  if (event->capture) return cudaSuccess;
  const uint64_t version = ++event->recorded;
  return submit(of(on), [=] { event->done = version, clock_gettime(CLOCK_MONOTONIC, &event->time); }), cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
API cudaError_t cudaEventQuery(cudaEvent_t asked) {
  const Lock lock(mutex);
  Event* event = of(asked);
  if (captures.count(event->capture))
    return event->capture->broken = true, failed(cudaErrorCapturedEvent, "a question to an event that is captured");
  REFUSED_IN_CAPTURE("a question to an event");
  if (event->done < event->recorded) step(event->stream);
  return event->done < event->recorded ? cudaErrorNotReady : cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(mutex);
  REFUSED_IN_CAPTURE("a wait for an event");
  return finish(of(event), of(event)->recorded), cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const timespec a = of(begin)->time, b = of(end)->time;
  return *milliseconds = float(b.tv_sec - a.tv_sec) * 1e3f + float(b.tv_nsec - a.tv_nsec) * 1e-6f, cudaSuccess;
}

// Graphs.
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(mutex);
  if (!stream) return failed(cudaErrorStreamCaptureUnsupported, "a capture of the legacy stream");
  if (of(stream)->capture) return failed(cudaErrorIllegalState, "a stream that captures already");
  auto capture = std::make_shared<Capture>();
  capture->id = ++captured;
  captures.insert(capture);
  return of(stream)->capture = std::move(capture), cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(mutex);
  const auto capture = of(stream)->capture;
  *graph = nullptr;
  if (!capture) return failed(cudaErrorIllegalState, "no capture to end");
  captures.erase(capture);
  for (Stream* joined : streams)
    if (joined->capture == capture) joined->capture = nullptr;
  if (capture->broken) return failed(cudaErrorStreamCaptureInvalidated, "a capture that was broken");
  return *graph = reinterpret_cast<cudaGraph_t>(new auto(capture->graph)), cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const auto& capture = of(stream)->capture;
  *status = !capture ? cudaStreamCaptureStatusNone : capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* n) {
  if (id) *id = of(stream)->capture ? of(stream)->capture->id : 0;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaStreamIsCapturing(stream, status);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) { return std::swap(*mode, capture_mode), cudaSuccess; }
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  return *made = reinterpret_cast<cudaGraphExec_t>(new auto(*of(graph))), cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  const Lock lock(mutex);
  if (of(stream)->capture) return failed(cudaErrorStreamCaptureUnsupported, "a graph launched while its stream captures");
  for (const auto& work : (*of(graph))->works) submit(of(stream), [work] { (*work)(); });
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete of(graph), cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  const Lock lock(mutex);
  return delete of(graph), cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* n) { return *n = (*of(graph))->works.size(), cudaSuccess; }
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* n) {
  return *n = 0, cudaSuccess;
}
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
