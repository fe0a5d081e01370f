// Registration of the WKV7 CPU kernels with torch, on its stable ABI.
// Fake tensors and autograd are registered in Python (rwkvlm/ops/wkv7/native.py). No maths here.
#include "../common/torch.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wkv7::Kernels;
using wkv7::Task;
using wkv7::Tensors;

Kernels kernels_for(const Tensor& r) {
  STD_TORCH_CHECK(r.dim() == 4 && r.numel() > 0, "wkv7: r must be [B, T, H, N], none of them 0");
  const bool is_bf16 = r.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_bf16 || r.scalar_type() == ScalarType::Float, "wkv7: expected bfloat16 or float32");
  const int64_t N = r.size(3);
  const Kernels found = OF_ISA_IN_USE(wkv7::kernels, N, is_bf16);
  STD_TORCH_CHECK(found.forward, "wkv7: head size must be 16, 32, 64 or 128, got ", N);
  return found;
}

void* data(const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  bool fits = x.scalar_type() == type && x.is_contiguous() && x.dim() == int64_t(shape.size());
  for (int64_t i = 0; fits && i < x.dim(); i++) fits = x.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, "wkv7: expected contiguous tensors whose dtypes and shapes fit");
  return x.data_ptr();
}

// Where the documents lie: one a row, or those that cu_seqlens packs into the only row.
struct Documents {
  std::vector<int64_t> first, length, slot;
  int64_t slots = 0;

  Documents(const Tensor& r, const std::optional<Tensor>& cu_seqlens) {
    const int64_t B = r.size(0), T = r.size(1);
    if (!cu_seqlens) {
      const int64_t each = (T + wkv7::kCheckpoint - 1) / wkv7::kCheckpoint;
      for (int64_t i = 0; i < B; i++) add(i * T, T, i * each);
      slots = B * each;
      return;
    }
    const bool is_long = cu_seqlens->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(B == 1 && (is_long || cu_seqlens->scalar_type() == ScalarType::Int) && cu_seqlens->is_contiguous(),
                    "wkv7: cu_seqlens must be int32 or int64 and contiguous, with B = 1");
    const int64_t n = cu_seqlens->size(0) - 1;
    const auto at = [&](int64_t i) {
      return is_long ? static_cast<const int64_t*>(cu_seqlens->data_ptr())[i] : static_cast<const int32_t*>(cu_seqlens->data_ptr())[i];
    };
    // The number of slots must follow from shapes alone: a document has those that could begin in it, and one more.
    slots = T / wkv7::kCheckpoint + n;
    int64_t end = 0;
    for (int64_t i = 0; i < n; i++) {
      STD_TORCH_CHECK(at(i) == end && at(i + 1) > end && at(i + 1) <= T, "wkv7: cu_seqlens must rise strictly from 0 to T");
      end = at(i + 1);
      add(at(i), end - at(i), at(i) / wkv7::kCheckpoint + i);
    }
    STD_TORCH_CHECK(end == T, "wkv7: cu_seqlens must end at T");
  }

  void add(int64_t start, int64_t tokens, int64_t first_slot) {
    first.push_back(start), length.push_back(tokens), slot.push_back(first_slot);
  }
  int64_t count() const { return int64_t(first.size()); }
  int64_t checkpoints(int64_t i) const { return (length[i] + wkv7::kCheckpoint - 1) / wkv7::kCheckpoint; }
};

bool fewer_heads_than_threads(const Documents& documents, int64_t heads) {
  return documents.count() * heads < torch::stable::get_num_threads();
}

// Heads of one task: as many as leave each thread two tasks, and a document in even parts.
int64_t group_size(const Documents& documents, int64_t heads) {
  const int64_t most = std::clamp<int64_t>(documents.count() * heads / (2 * torch::stable::get_num_threads()), 1, wkv7::kGroup);
  const int64_t parts = (heads + most - 1) / most;
  return (heads + parts - 1) / parts;
}

// Runs the tasks on torch's own threads. Who runs which does not matter to the result; taking the next one
// when ready keeps documents of different length from leaving threads idle.
void run(const std::vector<Task>& tasks, const Tensors& tensors, wkv7::Kernel kernel, int64_t scratch_bytes,
         const Tensor& like) {
  std::atomic<size_t> next{0};
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), int64_t(tasks.size()));
  const Tensor scratch = torch::stable::new_empty(like, {workers, scratch_bytes}, ScalarType::Byte);  // aligned to 64 by torch
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++)
      for (size_t i; (i = next++) < tasks.size();)
        kernel(tasks[i], tensors, static_cast<char*>(scratch.data_ptr()) + begin * scratch_bytes);
  });
}

float* state_at(const Tensor& states, int64_t slot, int64_t head) {
  return static_cast<float*>(states.data_ptr()) + (slot * states.size(1) + head) * states.size(2) * states.size(3);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b,
                                                   std::optional<Tensor> initial, std::optional<Tensor> cu_seqlens, bool save) {
  const Kernels kernels = kernels_for(r);
  const Documents documents(r, cu_seqlens);
  const int64_t H = r.size(2), N = r.size(3);
  const auto input = [&](const Tensor& x) { return data(x, r.scalar_type(), {r.size(0), r.size(1), H, N}); };
  if (initial) data(*initial, ScalarType::Float, {documents.count(), H, N, N});
  Tensor y = torch::stable::empty_like(r);
  Tensor final = torch::stable::new_empty(r, {documents.count(), H, N, N}, ScalarType::Float);
  Tensor removed = torch::stable::new_empty(r, {save ? r.size(0) : 0, r.size(1), H, N}, ScalarType::Float);
  Tensor checkpoints = torch::stable::new_empty(r, {save ? documents.slots : 0, H, N, N}, ScalarType::Float);
  const Tensors tensors{.r = input(r), .w = input(w), .k = input(k), .v = input(v), .a = input(a), .b = input(b),
                        .y = y.data_ptr(), .removed = save ? static_cast<float*>(removed.data_ptr()) : nullptr};
  if (save)
    for (int64_t i = 0; i < documents.count(); i++) {  // the slots that no document fills
      const int64_t end = i + 1 < documents.count() ? documents.slot[i + 1] : documents.slots;
      for (int64_t unused = documents.slot[i] + documents.checkpoints(i); unused < end; unused++)
        memset(state_at(checkpoints, unused, 0), 0, H * N * N * sizeof(float));
    }
  const int64_t slab = fewer_heads_than_threads(documents, H) ? kernels.slab : N;
  const int64_t group = group_size(documents, H);
  std::vector<Task> tasks;
  for (int64_t i = 0; i < documents.count(); i++)
    for (int64_t h = 0; h < H; h += group)
      for (int64_t value = 0; value < N; value += slab)
        tasks.push_back({.first = documents.first[i], .length = documents.length[i], .head = h, .count = std::min(group, H - h), .heads = H,
                         .initial = initial ? state_at(*initial, i, h) : nullptr, .final = state_at(final, i, h),
                         .checkpoints = save ? state_at(checkpoints, documents.slot[i], 0) : nullptr, .value = value});
  run(tasks, tensors, slab < N ? kernels.forward_slab : kernels.forward, kernels.forward_scratch, r);
  return {y, final, removed, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, std::optional<Tensor> d_final, Tensor r, Tensor w,
                                                                            Tensor k, Tensor v, Tensor a, Tensor b,
                                                                            std::optional<Tensor> cu_seqlens, Tensor removed,
                                                                            Tensor checkpoints, std::optional<Tensor> more_dr,
                                                                            std::optional<Tensor> more_dk, std::optional<Tensor> more_dv) {
  const Kernels kernels = kernels_for(r);
  const Documents documents(r, cu_seqlens);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  const auto input = [&](const Tensor& x) { return data(x, r.scalar_type(), {B, T, H, N}); };
  const auto maybe = [&](const std::optional<Tensor>& x) { return x ? input(*x) : nullptr; };
  if (d_final) data(*d_final, ScalarType::Float, {documents.count(), H, N, N});
  data(checkpoints, ScalarType::Float, {documents.slots, H, N, N});
  Tensor grads[6];
  for (Tensor& grad : grads) grad = torch::stable::empty_like(r);
  Tensor d_initial = torch::stable::new_empty(r, {documents.count(), H, N, N}, ScalarType::Float);
  const Tensors tensors{.r = input(r), .w = input(w), .k = input(k), .v = input(v), .a = input(a), .b = input(b), .y = nullptr,
                        .removed = static_cast<float*>(data(removed, ScalarType::Float, {B, T, H, N})), .dy = input(dy),
                        .dr = grads[0].data_ptr(), .dw = grads[1].data_ptr(), .dk = grads[2].data_ptr(), .dv = grads[3].data_ptr(),
                        .da = grads[4].data_ptr(), .db = grads[5].data_ptr(),
                        .more_dr = maybe(more_dr), .more_dk = maybe(more_dk), .more_dv = maybe(more_dv)};
  const int64_t group = group_size(documents, H);
  std::vector<Task> heads;
  for (int64_t i = 0; i < documents.count(); i++)
    for (int64_t h = 0; h < H; h += group)
      heads.push_back({.first = documents.first[i], .length = documents.length[i], .head = h, .count = std::min(group, H - h), .heads = H,
                       .checkpoints = state_at(checkpoints, documents.slot[i], 0), .begin = 0, .end = documents.length[i],
                       .d_end = d_final ? state_at(*d_final, i, h) : nullptr, .d_begin = state_at(d_initial, i, h)});
  if (!fewer_heads_than_threads(documents, H)) {
    run(heads, tensors, kernels.backward, kernels.backward_scratch, r);
  } else {
    const Tensor d_checkpoints = torch::stable::new_empty(r, {documents.slots, H, N, N}, ScalarType::Float);
    std::vector<Task> slabs, stretches;
    for (size_t i = 0; i < heads.size(); i++) {  // one head each, as there are so few
      Task task = heads[i];
      const int64_t slot = documents.slot[i / H];
      task.d_checkpoints = state_at(d_checkpoints, slot, 0);
      for (task.value = 0; task.value < N; task.value += kernels.slab) slabs.push_back(task);
      task.d_begin = nullptr;
      for (task.begin = 0; task.begin < task.length; task.begin = task.end) {
        task.end = std::min(task.begin + wkv7::kCheckpoint, task.length);
        task.d_end = task.end < task.length ? state_at(d_checkpoints, slot + task.end / wkv7::kCheckpoint, task.head) : heads[i].d_end;
        stretches.push_back(task);
      }
    }
    run(slabs, tensors, kernels.scan, kernels.scan_scratch, r);
    run(stretches, tensors, kernels.backward, kernels.backward_scratch, r);
  }
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], d_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "wkv7_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens, bool save)"
      " -> (Tensor y, Tensor final_state, Tensor removed, Tensor checkpoints)");
  m.def(
      "wkv7_backward(Tensor dy, Tensor? d_final, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? cu_seqlens,"
      " Tensor removed, Tensor checkpoints, Tensor? more_dr=None, Tensor? more_dk=None, Tensor? more_dv=None)"
      " -> (Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor d_initial)");
  m.def("wkv7_limit_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CPU, m) {
  m.impl("wkv7_forward", TORCH_BOX(&forward));
  m.impl("wkv7_backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) { m.impl("wkv7_limit_isa", TORCH_BOX(&isa::limit_level)); }
