// cuBLAS and NCCL of the fake GPU. cuBLAS takes what it is given and computes nothing: operators.cpp does. NCCL's
// processes exchange files in /dev/shm.
#include "runtime.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define TAKES(name) \
  API int name() { return 0; }
TAKES(cublasDestroy_v2) TAKES(cublasSetMathMode) TAKES(cublasSetPointerMode_v2) TAKES(cublasSetStream_v2) TAKES(cublasSetWorkspace_v2)
TAKES(cublasGemmEx) TAKES(cublasGemmStridedBatchedEx) TAKES(cublasSgemm_v2) TAKES(cublasDgemm_v2) TAKES(cublasSgemmEx)
TAKES(cublasSgemmStridedBatched) TAKES(cublasDgemmStridedBatched) TAKES(cublasSgemv_v2) TAKES(cublasDgemv_v2) TAKES(cublasSdot_v2)
TAKES(cublasDdot_v2) TAKES(cublasDotEx) TAKES(cublasStrsm_v2) TAKES(cublasDtrsm_v2) TAKES(cublasStrsmBatched) TAKES(cublasDtrsmBatched)
TAKES(cublasLtMatmul) TAKES(cublasLtMatmulDescDestroy) TAKES(cublasLtMatmulDescSetAttribute) TAKES(cublasLtMatmulPreferenceDestroy)
TAKES(cublasLtMatmulPreferenceSetAttribute) TAKES(cublasLtMatrixLayoutDestroy) TAKES(cublasLtMatrixLayoutSetAttribute)
static int handle;  // something that is not null
API int cublasCreate_v2(void** made) { return *made = &handle, 0; }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
API size_t cublasLtGetVersion() { return 130100; }
API int cublasLtMatmulDescCreate(void** made, int, int) { return *made = &handle, 0; }
API int cublasLtMatmulPreferenceCreate(void** made) { return *made = &handle, 0; }
API int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) { return *made = &handle, 0; }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) { return *found = 1, 0; }

namespace {

constexpr int PATIENCE = 300;  // seconds, for another process
struct Id {
  char name[128];
};
struct Group {
  std::string name;
  int rank, size;
  uint64_t calls = 0;
  std::map<int, uint64_t> sent{}, received{};
};
using Bytes = std::vector<char>;

[[noreturn]] void end(const std::string& why) {
  fprintf(stderr, "fake GPU: NCCL: %s\n", why.c_str());
  abort();
}

std::string file_of(const std::string& name, int from, int to, uint64_t call) {
  return "/dev/shm/" + name + "." + std::to_string(from) + "to" + std::to_string(to) + "." + std::to_string(call);
}

void put(const std::string& file, const void* bytes, size_t n) {
  const std::string part = file + ".part";
  const int to = open(part.c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0600);
  for (size_t done = 0; done < n;) {
    const ssize_t now = write(to, static_cast<const char*>(bytes) + done, n - done);
    if (now <= 0) end("cannot write " + part);
    done += now;
  }
  close(to);
  rename(part.c_str(), file.c_str());
}

Bytes take(const std::string& file, size_t n) {
  for (int waited = 0; access(file.c_str(), R_OK); waited++, usleep(1000))
    if (waited > PATIENCE * 1000) end("nobody has sent " + file);
  Bytes bytes(n);
  struct stat found;
  const int from = open(file.c_str(), O_RDONLY);
  if (fstat(from, &found) || size_t(found.st_size) != n)
    end(file + " has " + std::to_string(found.st_size) + " bytes, not " + std::to_string(n) + ": the ranks differ");
  for (size_t done = 0; done < n;) done += read(from, bytes.data() + done, n - done);
  close(from);
  unlink(file.c_str());
  return bytes;
}

// What all have given in this call, by rank.
std::vector<Bytes> exchanged(const Group& group, uint64_t call, const void* mine, size_t n) {
  std::vector<Bytes> all(group.size);
  for (int rank = 0; rank < group.size; rank++)
    if (rank != group.rank) put(file_of(group.name, group.rank, rank, call), mine, n);
  for (int rank = 0; rank < group.size; rank++)
    all[rank] = rank == group.rank ? Bytes(static_cast<const char*>(mine), static_cast<const char*>(mine) + n)
                                   : take(file_of(group.name, rank, group.rank, call), n);
  return all;
}

template <class Then>
int collective(void* communicator, cudaStream_t stream, const void* mine, size_t n, Then then) {
  Group* group = static_cast<Group*>(communicator);
  const uint64_t call = group->calls++;
  fake_gpu_submit(stream, [=] { then(exchanged(*group, call, mine, n)); });
  return 0;
}

struct Bfloat16 {
  uint16_t bits;
  explicit Bfloat16(double x) {
    const float value = float(x);
    uint32_t wide;
    memcpy(&wide, &value, 4);
    bits = value != value ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  operator double() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
};

// op: ncclSum, Prod, Max, Min, Avg. In the order of the ranks.
template <class T>
void reduce(void* to, const std::vector<Bytes>& all, size_t begin, size_t n, int op) {
  for (size_t i = 0; i < n; i++) {
    const auto of = [&](size_t rank) { return double(reinterpret_cast<const T*>(all[rank].data())[begin + i]); };
    double total = of(0);
    for (size_t rank = 1; rank < all.size(); rank++) {
      const double next = of(rank);
      total = op == 1 ? total * next : op == 2 ? std::max(total, next) : op == 3 ? std::min(total, next) : total + next;
    }
    static_cast<T*>(to)[i] = T(op == 4 ? total / double(all.size()) : total);
  }
}
void reduce(void* to, const std::vector<Bytes>& all, size_t begin, size_t n, int dtype, int op) {
  switch (dtype) {
    case 0: return reduce<int8_t>(to, all, begin, n, op);
    case 1: return reduce<uint8_t>(to, all, begin, n, op);
    case 2: return reduce<int32_t>(to, all, begin, n, op);
    case 4: return reduce<int64_t>(to, all, begin, n, op);  // exact up to 2^53
    case 6: return reduce<_Float16>(to, all, begin, n, op);
    case 7: return reduce<float>(to, all, begin, n, op);
    case 8: return reduce<double>(to, all, begin, n, op);
    case 9: return reduce<Bfloat16>(to, all, begin, n, op);
  }
  end("a reduction of type " + std::to_string(dtype));
}
size_t bytes_of(size_t n, int dtype) {
  static const size_t each[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return n * each[dtype];
}
Group* of(void* communicator) { return static_cast<Group*>(communicator); }

}  // namespace

API int ncclGetVersion(int* version) { return *version = 22800, 0; }
API int ncclGetUniqueId(Id* id) {
  static int made = 0;
  *id = {};
  return snprintf(id->name, sizeof id->name, "fake-gpu-%d-%d", getpid(), made++), 0;
}
API int ncclCommInitRank(void** made, int size, Id id, int rank) { return *made = new Group{id.name, rank, size}, 0; }
API int ncclCommInitRankConfig(void** made, int size, Id id, int rank, void*) { return ncclCommInitRank(made, size, id, rank); }
API int ncclCommSplit(void* communicator, int color, int key, void** made, void*) {
  Group* group = of(communicator);
  const uint64_t call = group->calls++;
  const int mine[2] = {color, key};
  std::vector<std::pair<int, int>> members;  // key, rank
  const auto all = exchanged(*group, call, mine, sizeof mine);
  for (int rank = 0; rank < group->size; rank++) {
    int other[2];
    memcpy(other, all[rank].data(), sizeof other);
    if (other[0] == color) members.push_back({other[1], rank});
  }
  std::sort(members.begin(), members.end());
  const int rank = int(std::find(members.begin(), members.end(), std::pair(key, group->rank)) - members.begin());
  *made =
      color < 0 ? nullptr : new Group{group->name + "-" + std::to_string(call) + "-" + std::to_string(color), rank, int(members.size())};
  return 0;
}
API int ncclCommCount(void* group, int* size) { return *size = of(group)->size, 0; }
API int ncclCommUserRank(void* group, int* rank) { return *rank = of(group)->rank, 0; }
API int ncclCommGetAsyncError(void*, int* error) { return *error = 0; }
API const char* ncclGetErrorString(int) { return "an error of the fake GPU"; }
API const char* ncclGetLastError(void*) { return "none"; }
TAKES(ncclCommDestroy) TAKES(ncclCommAbort) TAKES(ncclCommFinalize) TAKES(ncclGroupStart) TAKES(ncclGroupEnd) TAKES(ncclCommDeregister)
API int ncclCommRegister(void*, void*, size_t, void** made) { return *made = &handle, 0; }
API int ncclMemAlloc(void** place, size_t n) { return cudaMalloc(place, n); }
API int ncclMemFree(void* place) { return cudaFree(place); }
API int ncclAllReduce(const void* from, void* to, size_t n, int dtype, int op, void* group, cudaStream_t stream) {
  return collective(group, stream, from, bytes_of(n, dtype), [=](const auto& all) { reduce(to, all, 0, n, dtype, op); });
}
API int ncclReduce(const void* from, void* to, size_t n, int dtype, int op, int root, void* group, cudaStream_t stream) {
  return collective(group, stream, from, bytes_of(n, dtype), [=](const auto& all) {
    if (of(group)->rank == root) reduce(to, all, 0, n, dtype, op);
  });
}
API int ncclReduceScatter(const void* from, void* to, size_t n, int dtype, int op, void* group, cudaStream_t stream) {
  const size_t size = of(group)->size, begin = n * of(group)->rank;
  return collective(group, stream, from, bytes_of(n * size, dtype), [=](const auto& all) { reduce(to, all, begin, n, dtype, op); });
}
API int ncclAllGather(const void* from, void* to, size_t n, int dtype, void* group, cudaStream_t stream) {
  return collective(group, stream, from, bytes_of(n, dtype), [=](const auto& all) {
    for (size_t rank = 0; rank < all.size(); rank++)
      memcpy(static_cast<char*>(to) + rank * all[rank].size(), all[rank].data(), all[rank].size());
  });
}
API int ncclBroadcast(const void* from, void* to, size_t n, int dtype, int root, void* group, cudaStream_t stream) {
  const void* mine = of(group)->rank == root ? from : to;
  return collective(group, stream, mine, bytes_of(n, dtype), [=](const auto& all) { memcpy(to, all[root].data(), all[root].size()); });
}
API int ncclBcast(void* place, size_t n, int dtype, int root, void* group, cudaStream_t stream) {
  return ncclBroadcast(place, place, n, dtype, root, group, stream);
}
API int ncclSend(const void* from, size_t n, int dtype, int peer, void* group, cudaStream_t stream) {
  const std::string file = file_of(of(group)->name + ".peer", of(group)->rank, peer, of(group)->sent[peer]++);
  return fake_gpu_submit(stream, [=] { put(file, from, bytes_of(n, dtype)); }), 0;
}
// One that comes before its own send, in a group, waits for ever.
API int ncclRecv(void* to, size_t n, int dtype, int peer, void* group, cudaStream_t stream) {
  const std::string file = file_of(of(group)->name + ".peer", peer, of(group)->rank, of(group)->received[peer]++);
  return fake_gpu_submit(stream, [=] { memcpy(to, take(file, bytes_of(n, dtype)).data(), bytes_of(n, dtype)); }), 0;
}
