// The CUDA kernels as operators: which of them runs, looks at the tensors, makes memory, starts the kernel. Fake
// tensors: rwkvlm/ops/wkv7/cuda.py; derivatives: autograd_gpu.cpp. No maths here.
#include "../common/launch.h"
#include "api.cuh"

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>
#include <tuple>

namespace {

using at::Tensor;
using launch::empty_fp32;
using launch::floats;
using launch::Given;
using launch::like;
using launch::Maybe;
using launch::OnDevice;
using Tensors = std::vector<Tensor>;

constexpr int64_t kFewPairs = 64, kManyChunks = 64;  // of (sequence, head), and in a sequence: where the chunked scans run in segments
constexpr int64_t kMostHidden = 32;  // units of the head of test-time training, a bit each

// Where kernels run: a GPU; in tests the emulation on the host. Operators are given its number: the device of the
// tensors does not say which library.
struct Machine : launch::Library {
  ENTRY(wkv7_sequential_saved_bytes);
  ENTRY(wkv7_sequential_forward);
  ENTRY(wkv7_sequential_backward);
  ENTRY(wkv7_chunked_saved_bytes);
  ENTRY(wkv7_chunked_forward_scratch_bytes);
  ENTRY(wkv7_chunked_backward_scratch_bytes);
  ENTRY(wkv7_chunked_forward);
  ENTRY(wkv7_chunked_backward);
  ENTRY(wkv7_ttt_saved_bytes);
  ENTRY(wkv7_ttt_backward_scratch_bytes);
  ENTRY(wkv7_ttt_forward);
  ENTRY(wkv7_ttt_backward);
  c10::Device device;
  bool tensor_cores;
  int64_t multiprocessors;
  Machine(int64_t handle, c10::Device device, bool tensor_cores, int64_t multiprocessors)
      : launch::Library(handle), device(device), tensor_cores(tensor_cores), multiprocessors(multiprocessors) {}
};

std::mutex mutex;
std::deque<Machine> machines;  // references to them last
std::atomic<int64_t> segments_asked_for{-1};

const Machine& machine_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  TORCH_CHECK_VALUE(number >= 0 && number < int64_t(machines.size()), "wkv7: no machine has the number ", number);
  return machines[size_t(number)];
}

int64_t chunk_tokens(int64_t N) { return N == 128 ? 32 : 64; }

// Chunks of a segment of the chunked scans, 0 where the scans walk whole sequences. The rule is argued in
// RWKV-v7/docs/wkv7_chunked.md, "Time on an H200", and measured at two shapes. Sequences of packed documents count as
// if each could have all T tokens, for their lengths lie on the device.
int64_t segment_chunks(int64_t sequences, int64_t T, int64_t H, int64_t N, int64_t multiprocessors) {
  if (segments_asked_for >= 0) return segments_asked_for;
  const int64_t pairs = sequences * H, chunks = (T + chunk_tokens(N) - 1) / chunk_tokens(N);
  if (pairs > kFewPairs || chunks < kManyChunks) return 0;
  const int64_t at_once = (N == 128 ? 1 : 4) * multiprocessors;  // blocks of a scan, where a multiprocessor has 228 KB
  const int64_t segments = std::min(at_once / pairs, chunks / 8);  // no shorter than 8 chunks
  return segments >= 4 ? (chunks + segments - 1) / segments : 0;
}

// One call of the library: where its inputs lie, its shape, its memory.
struct Call {
  const Machine& machine;
  Given given;
  const Tensor& r;
  bool chunked;
  std::vector<int64_t> states;
  Wkv7Shape shape{};
  Wkv7Inputs in{};
  int64_t saved;

  Call(const char* op, int64_t number, const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
       const Maybe& initial_state, const Maybe& cu_seqlens)
      : machine(machine_of(number)), given(op, "r", r), r(r), chunked(!given.fp32() && machine.tensor_cores) {
    TORCH_CHECK_VALUE(r.device() == machine.device, op, ": r must be on ", machine.device, ", got ", r.device());
    TORCH_CHECK_VALUE(r.dim() == 4 && r.numel() > 0, op, ": r must be [B, T, H, N], none of them 0, got ", r.sizes());
    const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3), documents = cu_seqlens ? cu_seqlens->numel() - 1 : 0;
    states = {documents ? documents : B, H, N, N};
    shape = {int32_t(B), int32_t(T), int32_t(H), int32_t(N), int32_t(documents)};
    shape.cu_seqlens = static_cast<int32_t*>(given.at("cu_seqlens", cu_seqlens, {documents + 1}, at::kInt));
    shape.segment_chunks = chunked ? int32_t(segment_chunks(states[0], T, H, N, machine.multiprocessors)) : 0;
    const at::IntArrayRef sizes = r.sizes();
    in.r = given.at("r", r, sizes), in.w = given.at("w", w, sizes), in.k = given.at("k", k, sizes);
    in.v = given.at("v", v, sizes), in.a = given.at("a", a, sizes), in.b = given.at("b", b, sizes);
    in.initial_state = static_cast<float*>(given.at("initial_state", initial_state, states, at::kFloat));
    saved = (chunked ? machine.wkv7_chunked_saved_bytes : machine.wkv7_sequential_saved_bytes).call(&shape);
  }
  Tensor bytes(int64_t count) const { return at::empty({count}, r.options().dtype(at::kByte)); }
  int dtype() const { return given.fp32() ? WKV7_FP32 : WKV7_BF16; }
};

// What a backward reads besides, and writes: six gradients and that of the initial state.
struct Backward {
  const void *saved, *dy;
  const float* d_final_state;
  Tensors results;
  Wkv7Gradients out{};

  Backward(Call& call, const Tensor& given_saved, const Tensor& given_dy, const Maybe& d_final, bool state_gradient, const Maybe& more_dr,
           const Maybe& more_dk, const Maybe& more_dv) {
    TORCH_CHECK(given_saved.numel() == call.saved, "wkv7: the backward needs what a forward with save has left, ", call.saved,
                " bytes, got ", given_saved.numel());
    const at::IntArrayRef sizes = call.r.sizes();
    saved = call.given.at("saved", given_saved, {call.saved}, at::kByte), dy = call.given.at("dy", given_dy, sizes);
    d_final_state = static_cast<float*>(call.given.at("d_final_state", d_final, call.states, at::kFloat));
    out.more_dr = call.given.at("a gradient", more_dr, sizes), out.more_dk = call.given.at("a gradient", more_dk, sizes);
    out.more_dv = call.given.at("a gradient", more_dv, sizes);
    for (void** place : {&out.dr, &out.dw, &out.dk, &out.dv, &out.da, &out.db}) *place = results.emplace_back(like(call.r)).data_ptr();
    results.push_back(empty_fp32(call.r, state_gradient ? at::IntArrayRef(call.states) : at::IntArrayRef({0})));
    out.d_initial_state = state_gradient ? floats(results.back()) : nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                                           const Tensor& b, const Maybe& initial_state, const Maybe& cu_seqlens, bool save,
                                           int64_t machine) {
  Call call("wkv7", machine, r, w, k, v, a, b, initial_state, cu_seqlens);
  const Tensor y = like(r), final_state = empty_fp32(r, call.states), saved = call.bytes(save || call.chunked ? call.saved : 0);
  const OnDevice start(call.machine, r);
  if (call.chunked) {
    const Tensor scratch = call.bytes(call.machine.wkv7_chunked_forward_scratch_bytes.call(&call.shape));
    start(call.machine.wkv7_chunked_forward, &call.shape, &call.in, y.data_ptr(), floats(final_state), saved.data_ptr(),
          scratch.data_ptr());
  } else {
    start(call.machine.wkv7_sequential_forward, &call.shape, call.dtype(), &call.in, y.data_ptr(), floats(final_state),
          save ? saved.data_ptr() : nullptr);
  }
  return {y, final_state, save ? saved : call.bytes(0)};
}

Tensors backward(const Tensor& dy, const Maybe& d_final_state, const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                 const Tensor& a, const Tensor& b, const Maybe& initial_state, const Maybe& cu_seqlens, const Tensor& saved,
                 bool state_gradient, int64_t machine, const Maybe& more_dr, const Maybe& more_dk, const Maybe& more_dv) {
  Call call("wkv7_backward", machine, r, w, k, v, a, b, initial_state, cu_seqlens);
  Backward task(call, saved, dy, d_final_state, state_gradient, more_dr, more_dk, more_dv);
  const OnDevice start(call.machine, r);
  if (call.chunked) {
    const Tensor scratch = call.bytes(call.machine.wkv7_chunked_backward_scratch_bytes.call(&call.shape));
    start(call.machine.wkv7_chunked_backward, &call.shape, &call.in, task.saved, task.dy, task.d_final_state, &task.out,
          scratch.data_ptr());
  } else {
    start(call.machine.wkv7_sequential_backward, &call.shape, call.dtype(), &call.in, task.saved, task.dy, task.d_final_state, &task.out);
  }
  return task.results;
}

// A call with steps of test-time training in it.
struct TttCall : Call {
  Wkv7Steps steps{};

  TttCall(const char* op, int64_t number, const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
          const Tensor& b, const Maybe& initial_state, const Tensor& rate, const Maybe& head, int64_t rows, int64_t segment, bool stored)
      : Call(op, number, r, w, k, v, a, b, initial_state, std::nullopt) {
    TORCH_CHECK_VALUE(chunked, op, ": expected bfloat16 and a GPU with bfloat16 tensor cores, got ", launch::python_name(r.scalar_type()),
                      " on ", r.device());
    const int64_t N = r.size(3), chunk = chunk_tokens(N);
    TORCH_CHECK_VALUE(rows >= 8 && rows <= N && rows % 8 == 0 && segment >= chunk && segment % chunk == 0 && segment <= INT32_MAX, op,
                      ": expected rows from 8 to ", N, " in steps of 8 and segments of a multiple of ", chunk,
                      " tokens, below 2^31, got ", rows, " and ", segment);
    TORCH_CHECK_VALUE(!head || (head->dim() == 3 && head->size(1) >= 1 && head->size(1) <= kMostHidden), op, ": head must be [2, hidden, ",
                      rows, "] with 1 to ", kMostHidden, " hidden units, got ", head ? head->sizes() : at::IntArrayRef());
    shape.segment_chunks = 0;  // between two steps the state is no affine map of an earlier one
    const int64_t hidden = head ? head->size(1) : 0;
    steps = {int32_t(rows), int32_t(hidden), int32_t(segment), int32_t(stored)};
    steps.rate = static_cast<float*>(given.at("rate", rate, {r.size(2)}, at::kFloat));
    steps.head = static_cast<float*>(given.at("head", head, {2, hidden, rows}, at::kFloat));
    saved = machine.wkv7_ttt_saved_bytes.call(&shape, &steps);
  }
};

std::tuple<Tensor, Tensor, Tensor> ttt_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                                               const Tensor& b, const Maybe& initial_state, const Tensor& rate, const Maybe& head,
                                               int64_t rows, int64_t segment, bool stored, bool save, int64_t machine) {
  TttCall call("wkv7_ttt", machine, r, w, k, v, a, b, initial_state, rate, head, rows, segment, stored);
  const Tensor y = like(r), final_state = empty_fp32(r, call.states), saved = call.bytes(call.saved);
  const Tensor scratch = call.bytes(call.machine.wkv7_chunked_forward_scratch_bytes.call(&call.shape));
  OnDevice(call.machine, r)(call.machine.wkv7_ttt_forward, &call.shape, &call.in, &call.steps, y.data_ptr(), floats(final_state),
                            saved.data_ptr(), scratch.data_ptr());
  return {y, final_state, save ? saved : call.bytes(0)};
}

// Those of backward, then of rate and head.
Tensors ttt_backward(const Tensor& dy, const Maybe& d_final_state, const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                     const Tensor& a, const Tensor& b, const Tensor& rate, const Maybe& head, const Tensor& saved, int64_t rows,
                     int64_t segment, bool stored, bool state_gradient, int64_t machine, const Maybe& more_dr, const Maybe& more_dk,
                     const Maybe& more_dv) {
  TttCall call("wkv7_ttt_backward", machine, r, w, k, v, a, b, std::nullopt, rate, head, rows, segment, stored);
  Backward task(call, saved, dy, d_final_state, state_gradient, more_dr, more_dk, more_dv);
  const int64_t steps = (r.size(1) - 1) / segment * r.size(0), of_head = head ? head->numel() : 0;
  Tensor sums = empty_fp32(r, {steps, r.size(2), 1 + of_head});
  const Tensor scratch = call.bytes(call.machine.wkv7_ttt_backward_scratch_bytes.call(&call.shape, &call.steps));
  OnDevice(call.machine, r)(call.machine.wkv7_ttt_backward, &call.shape, &call.in, &call.steps, task.saved, task.dy, task.d_final_state,
                            &task.out, floats(sums), scratch.data_ptr());
  sums = sums.sum(0);
  task.results.push_back(sums.select(1, 0).clone());
  task.results.push_back(head ? sums.slice(1, 1).sum(0).view(head->sizes()) : sums.new_empty({0}));
  return task.results;
}

// The number of a machine, for the operators.
int64_t add_machine(int64_t library, c10::Device device, bool tensor_cores, int64_t multiprocessors) {
  const std::lock_guard<std::mutex> lock(mutex);
  machines.emplace_back(library, device, tensor_cores, multiprocessors);
  return int64_t(machines.size()) - 1;
}

void ask_for_segments(int64_t chunks) { segments_asked_for = chunks; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def("wkv7_machine(int library, Device device, bool tensor_cores, int multiprocessors) -> int", add_machine);
  m.def("wkv7_segment_chunks(int sequences, int T, int H, int N, int multiprocessors) -> int", segment_chunks);
  m.def("wkv7_ask_for_segments(int chunks) -> ()", ask_for_segments);
  m.def(
      "wkv7_cuda_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens,"
      " bool save, int machine) -> (Tensor, Tensor, Tensor)");
  m.def(
      "wkv7_cuda_backward(Tensor dy, Tensor? d_final_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b,"
      " Tensor? initial_state, Tensor? cu_seqlens, Tensor saved, bool state_gradient, int machine, Tensor? more_dr=None,"
      " Tensor? more_dk=None, Tensor? more_dv=None) -> Tensor[]");
  m.def(
      "wkv7_ttt_cuda_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, Tensor rate,"
      " Tensor? head, int rows, int segment, bool stored, bool save, int machine) -> (Tensor, Tensor, Tensor)");
  m.def(
      "wkv7_ttt_cuda_backward(Tensor dy, Tensor? d_final_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor rate,"
      " Tensor? head, Tensor saved, int rows, int segment, bool stored, bool state_gradient, int machine, Tensor? more_dr=None,"
      " Tensor? more_dk=None, Tensor? more_dv=None) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) {
  m.impl("wkv7_cuda_forward", forward);
  m.impl("wkv7_cuda_backward", backward);
  m.impl("wkv7_ttt_cuda_forward", ttt_forward);
  m.impl("wkv7_ttt_cuda_backward", ttt_backward);
}
