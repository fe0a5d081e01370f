// Work handed out to torch's threads, piece by piece: who is ready takes the next.
#pragma once
#include <stdint.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

// Calls work(next) on as many threads as have something to do. next(i) is true once for each i = 0 .. count - 1, which it puts into i.
template <class Work>
void in_parallel(int64_t count, const Work& work) {
  std::atomic<int64_t> taken{0};
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { work([&](int64_t& i) { return (i = taken++) < count; }); });
}
