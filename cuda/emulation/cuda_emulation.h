// Runs CUDA kernels on the host: g++ compiles the very .cu file that nvcc compiles, with this header in the place of the CUDA runtime.
//
// It finds: wrong maths; wrong fragment layouts; barriers that are missing, that part of a block skips or that are not those of one line
// for all; warp collectives that diverge or name a part of a warp; reads of shared memory that nobody wrote (every block starts with NaN
// there); reads of cp.async data before its wait and copies over data still in use (one schedule copies at the wait, the other at once);
// addresses that ldmatrix and cp.async do not take; and, built with -fsanitize=address,undefined, accesses out of bounds and misaligned
// ones. Races between warps or lanes show when the two schedules (emulation_reverse) give different bits; built with -fsanitize=thread,
// whether they do or not: races.h. __shared__ is left undefined: kernels take dynamic shared memory, which it can poison. It cannot find:
// wgmma, TMA and proxy fences (not emulated), bank conflicts, more threads than __launch_bounds__, what fast instructions (ex2.approx,
// __fdividef) lose, register pressure, anything about speed. The mma sums in the order k = 0..15 in fp32, hardware in an order of its own.
//
// How: one fiber per CUDA thread. In one schedule a warp runs until each of its lanes waits at the block barrier or has ended, then the
// next warp does; in the other, which begins with the last warp, they take turns at every collective. At a warp collective a lane parks
// its operands; the last lane to arrive computes the results of all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {} };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {  // round to nearest, ties to even; a NaN becomes the hardware's NaN
    uint32_t u; std::memcpy(&u, &f, 4);
    if (f != f) return {0x7fff};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

namespace emulation {

enum class Wait : uint8_t { none, warp, block, done };

struct PendingCopy { void* to; const void* from; int bytes, valid; };

struct Fiber {
    void* sp = nullptr;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;  // AddressSanitizer's
    uint3 thread{};
    Wait wait = Wait::none;
    int line = 0;  // of the __syncthreads at which it waits
    std::vector<std::vector<PendingCopy>> groups;  // cp.async groups in flight, oldest first; the last one is still open
    int waits = 0;  // for them, so far
};

struct Warp { unsigned arrived = 0; const char* site = nullptr; void* operands[32]; };

constexpr size_t stack_bytes = 1 << 17;

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Fiber scheduler;
    int current = -1, count = 0;
    dim3 block; uint3 block_index{};
    std::function<void()> body;
    std::unique_ptr<char[]> shared_storage;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    bool reverse = false;
    size_t shared_limit = 227 * 1024;
    std::string error;
    const void *scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
};
inline Machine machine;

#if defined(__SANITIZE_THREAD__)
constexpr bool finds_races = true;
#else
constexpr bool finds_races = false;
#endif
inline bool watching = false;  // kernel code runs, whose accesses count

// Within it, what a thread does is the emulation's work.
struct Unwatched {
    bool before;
    __attribute__((no_sanitize("thread"))) Unwatched() : before(watching) { watching = false; }
    __attribute__((no_sanitize("thread"))) ~Unwatched() { watching = before; }
};

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer of one fiber, restores those of another.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*restore*/) {
    asm volatile("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp, (%rdi); movq %rsi, %rsp;"
                 "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

inline void switch_fiber(Fiber& from, Fiber& to, const void* stack, size_t bytes, bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, stack, bytes);
#else
    (void)stack; (void)bytes; (void)last;
#endif
#if defined(__x86_64__)
    switch_stack(&from.sp, to.sp);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void* old; size_t old_bytes;
    __sanitizer_finish_switch_fiber(from.fake_stack, &old, &old_bytes);
#endif
}

inline void to_scheduler(bool last = false) {
    const Unwatched here;
    Machine& m = machine;
    switch_fiber(m.fibers[m.current], m.scheduler, m.scheduler_stack, m.scheduler_stack_bytes, last);
}

__attribute__((no_sanitize("thread"))) inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
    watching = finds_races;
    machine.body();
    watching = false;
    machine.fibers[machine.current].wait = Wait::done;
    to_scheduler(true);
    std::abort();
}

inline void start(Fiber& f) {
    if (!f.stack) f.stack.reset(new char[stack_bytes]);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack.get(), stack_bytes);  // the thread before never left its frames
#endif
#if defined(__x86_64__)
    auto top = (reinterpret_cast<uintptr_t>(f.stack.get()) + stack_bytes) & ~uintptr_t(15);
    void** sp = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, and the alignment that a call leaves
    std::memset(sp, 0, 8 * sizeof(void*));
    sp[6] = reinterpret_cast<void*>(&fiber_main);
    f.sp = sp;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#endif
    f.wait = Wait::none;
    f.groups.assign(1, {});
    f.waits = 0;
}

// Ends the launch: the fibers are abandoned where they stand (they hold nothing that needs destruction).
[[noreturn]] inline void fail(const std::string& what) {
    Machine& m = machine;
    if (m.error.empty())
        m.error = what + " (block " + std::to_string(m.block_index.x) + "," + std::to_string(m.block_index.y) + "," +
                  std::to_string(m.block_index.z) + " thread " + std::to_string(m.current) + ")";
    to_scheduler();
    std::abort();
}

}  // namespace emulation

#if defined(__SANITIZE_THREAD__)
#include "races.h"
#else
namespace emulation {
inline void begin_launch() {}
inline void begin_block() {}
inline void pass_block_barrier() {}
inline void pass_warp_barrier(int) {}
}  // namespace emulation
#endif

namespace emulation {

inline void run(int i) {
    Machine& m = machine;
    m.current = i;
    switch_fiber(m.scheduler, m.fibers[i], m.fibers[i].stack.get(), stack_bytes, false);
}

inline void run_block() {
    Machine& m = machine;
    int n_warps = (m.count + 31) / 32;
    m.warps.assign(n_warps, Warp{});
    begin_block();
    for (int i = 0; i < m.count; ++i) {
        unsigned u = i;
        m.fibers[i].thread = {u % m.block.x, u / m.block.x % m.block.y, u / (m.block.x * m.block.y)};
        start(m.fibers[i]);
    }
    for (;;) {
        for (bool progress = true; progress;) {
            progress = false;
            for (int w = 0; w < n_warps; ++w) {
                int first = (m.reverse ? n_warps - 1 - w : w) * 32, last = std::min(first + 32, m.count);
                for (bool runs = true; runs;) {
                    runs = false;
                    for (int l = 0; l < last - first; ++l) {
                        int i = m.reverse ? last - 1 - l : first + l;
                        if (m.fibers[i].wait != Wait::none) continue;
                        run(i);
                        runs = progress = true;
                        if (!m.error.empty()) return;
                    }
                    if (m.reverse) break;  // the next warp's turn, up to its next collective
                }
            }
        }
        int done = 0, at_barrier = 0;
        for (int i = 0; i < m.count; ++i) {
            done += m.fibers[i].wait == Wait::done;
            at_barrier += m.fibers[i].wait == Wait::block;
        }
        if (done == m.count) return;
        if (at_barrier != m.count) {
            m.error = "deadlock: of " + std::to_string(m.count) + " threads " + std::to_string(at_barrier) + " wait at __syncthreads, " +
                      std::to_string(done) + " have ended, the rest wait in a warp collective";
            return;
        }
        for (int i = 0; i < m.count; ++i) {
            m.fibers[i].wait = Wait::none;
            if (m.fibers[i].line != m.fibers[0].line) {
                m.error = "threads 0 and " + std::to_string(i) + " wait at the __syncthreads of different lines: " +
                          std::to_string(m.fibers[0].line) + ", " + std::to_string(m.fibers[i].line);
                return;
            }
        }
        pass_block_barrier();
    }
}

inline int launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
    Machine& m = machine;
    m.block = block, m.body = std::move(body), m.error.clear();
    m.count = block.x * block.y * block.z;
    if (m.count < 1 || m.count > 1024 || grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
        m.error = "invalid launch configuration";
    if (shared_bytes > m.shared_limit)
        m.error = "a block asks for " + std::to_string(shared_bytes) + " bytes of shared memory of " + std::to_string(m.shared_limit);
    if (!m.error.empty()) return 1;
    begin_launch();
    if (int(m.fibers.size()) < m.count) m.fibers.resize(m.count);
    m.shared_bytes = shared_bytes;
    m.shared_storage.reset(new char[shared_bytes + 128]);
    m.shared = m.shared_storage.get() + shared_bytes + 128;  // the end of the block is the end of the heap object, for AddressSanitizer
    m.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(m.shared) - shared_bytes) & ~uintptr_t(15));
    uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t n = 0; n < blocks; ++n) {
        uint64_t i = m.reverse ? blocks - 1 - n : n;
        m.block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        std::memset(m.shared, 0xff, shared_bytes);  // NaN in fp32 and in bf16
        run_block();
        if (!m.error.empty()) return 1;
    }
    return 0;
}

// Whom a launch is handed to, with its stream (tests/fake_gpu); nobody: it runs at once.
inline void (*submit)(void* stream, const std::function<void()>& work) = nullptr;

inline int on_stream(void* stream, const std::function<int()>& work) {
    if (!submit) return work();
    submit(stream, [=] {
        if (work()) std::fprintf(stderr, "emulated kernel: %s\n", machine.error.c_str()), std::abort();
    });
    return 0;
}

// All 32 lanes meet; the last to come runs compute(operands of lane 0..31) for all.
template <class Operands, class Compute>
inline void collective(const char* site, Operands& mine, Compute compute) {
    const Unwatched here;
    Machine& m = machine;
    int lane = m.current % 32, first = m.current - lane;
    Warp& w = m.warps[m.current / 32];
    if (first + 32 > m.count) fail(std::string(site) + " in a warp of fewer than 32 threads");
    if (w.arrived && w.site != site && std::strcmp(w.site, site) != 0)
        fail(std::string("warp collectives diverge: ") + site + " and " + w.site);
    w.site = site;
    w.operands[lane] = &mine;
    w.arrived |= 1u << lane;
    if (w.arrived != ~0u) {
        m.fibers[m.current].wait = Wait::warp;
        to_scheduler();
        return;
    }
    Operands* all[32];
    for (int i = 0; i < 32; ++i) all[i] = static_cast<Operands*>(w.operands[i]), m.fibers[first + i].wait = Wait::none;
    w.arrived = 0;
    compute(all);
}

inline void copy(const PendingCopy& c) {
    std::memcpy(c.to, c.from, c.valid);
    std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
}

// The copy may land at any time up to the wait: at the last moment in one schedule, at the first in the other.
inline void copy_async(void* to, const void* from, int bytes, int valid) {
    const Unwatched here;
    if (uintptr_t(to) % bytes || (valid && uintptr_t(from) % bytes))
        fail("cp.async of " + std::to_string(bytes) + " bytes from or to an address that is no multiple of them");
    const PendingCopy whole{to, from, bytes, valid};
#if defined(__SANITIZE_THREAD__)
    watch_copy(whole, false, __builtin_return_address(0));
#endif
    if (machine.reverse) copy(whole);
    if (!machine.reverse || finds_races) machine.fibers[machine.current].groups.back().push_back(whole);
}
inline void commit_copies() {
    const Unwatched here;
    machine.fibers[machine.current].groups.emplace_back();
}
inline void finish_copies(int groups_left) {
    const Unwatched here;
    auto& groups = machine.fibers[machine.current].groups;
#if defined(__SANITIZE_THREAD__)
    groups_left += drops(watch.drop_wait, machine.fibers[machine.current].waits++);
#endif
    while (int(groups.size()) - 1 > groups_left) {
        for (const PendingCopy& c : groups.front()) {
#if defined(__SANITIZE_THREAD__)
            watch_copy(c, true, __builtin_return_address(0));
#endif
            copy(c);
        }
        groups.erase(groups.begin());
    }
}

inline float bf16_low(uint32_t u) { return __bfloat162float({uint16_t(u)}); }
inline float bf16_high(uint32_t u) { return __bfloat162float({uint16_t(u >> 16)}); }

typedef float Columns __attribute__((vector_size(16)));  // four sums at once: most of the emulation's time goes here

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 with the register layout of the PTX manual.
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands { float* d; const uint32_t *a, *b; } mine{d, a, b};
    collective("mma.sync", mine, [](Operands** lane) {
        float A[16][16], D[16][8];
        Columns B[16][2];
        for (int l = 0; l < 32; ++l) {
            int g = l / 4, c = l % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                uint32_t u = lane[l]->a[i];
                A[g + i % 2 * 8][c + i / 2 * 8] = bf16_low(u), A[g + i % 2 * 8][c + 1 + i / 2 * 8] = bf16_high(u);
                D[g + i / 2 * 8][c + i % 2] = lane[l]->d[i];
            }
            for (int i = 0; i < 2; ++i)
                B[c + i * 8][g / 4][g % 4] = bf16_low(lane[l]->b[i]), B[c + 1 + i * 8][g / 4][g % 4] = bf16_high(lane[l]->b[i]);
        }
        for (int row = 0; row < 16; ++row)
            for (int half = 0; half < 2; ++half) {
                Columns sum;
                std::memcpy(&sum, &D[row][4 * half], sizeof(sum));
                for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][half];
                std::memcpy(&D[row][4 * half], &sum, sizeof(sum));
            }
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) lane[l]->d[i] = D[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    });
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane 8 i + j gives the address of row j of matrix i.
inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, bool transposed) {
    struct Operands { uint32_t* out; const uint16_t* row; bool transposed; } mine{out, static_cast<const uint16_t*>(row), transposed};
    const Unwatched here;
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an address that is no multiple of 16");
#if defined(__SANITIZE_THREAD__)
    touch(row, 16, is_load, __builtin_return_address(0), true);
#endif
    collective("ldmatrix", mine, [](Operands** lane) {
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                int g = l / 4, c = l % 4 * 2;
                auto at = [&](int y, int x) { return uint32_t(lane[8 * i + y]->row[x]); };
                lane[l]->out[i] = lane[l]->transposed ? at(c, g) | at(c + 1, g) << 16 : at(g, c) | at(g, c + 1) << 16;
            }
    });
}

// On a GPU a lane that a mask leaves out must not be there, and one that it names must.
inline void all_lanes(const char* site, unsigned mask) {
    const Unwatched here;
    if (mask != ~0u) fail(std::string(site) + " of a part of a warp: the emulation knows whole ones");
}

template <class T>
inline T shuffle(const char* site, unsigned lanes, T value, int source) {  // source: whose value this lane receives
    all_lanes(site, lanes);
    struct Operands { T in, out; int source; } mine{value, value, source};
    collective(site, mine, [](Operands** lane) {
        for (int l = 0; l < 32; ++l) lane[l]->out = lane[lane[l]->source]->in;
    });
    return mine.out;
}
inline int own_lane() { return machine.current % 32; }

}  // namespace emulation

#define threadIdx (emulation::machine.fibers[emulation::machine.current].thread)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block)

inline void __syncthreads(int line = __builtin_LINE()) {
    const emulation::Unwatched here;
    emulation::Fiber& mine = emulation::machine.fibers[emulation::machine.current];
    mine.wait = emulation::Wait::block, mine.line = line;
    emulation::to_scheduler();
}
inline void __syncwarp(unsigned mask = ~0u) {
    struct Operands {} none;
    emulation::all_lanes("__syncwarp", mask);
    emulation::collective("__syncwarp", none, [](Operands**) { emulation::pass_warp_barrier(emulation::machine.current / 32); });
}
template <class T> inline T __shfl_xor_sync(unsigned lanes, T value, int mask) {
    return emulation::shuffle("__shfl_xor_sync", lanes, value, emulation::own_lane() ^ mask);
}
template <class T>
inline T __shfl_sync(unsigned lanes, T value, int source) { return emulation::shuffle("__shfl_sync", lanes, value, source); }
template <class T>
inline T __shfl_up_sync(unsigned lanes, T value, int distance) {
    const int lane = emulation::own_lane();
    return emulation::shuffle("__shfl_up_sync", lanes, value, lane < distance ? lane : lane - distance);
}

inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

// Threads take turns only at barriers and collectives.
template <class T, class Change>
inline T change_at_once(T* at, const Change& change, void* where) {
    const emulation::Unwatched here;
#if defined(__SANITIZE_THREAD__)
    emulation::touch(at, sizeof(T), emulation::is_atomic + emulation::is_store, where);
#else
    (void)where;
#endif
    const T before = *at;
    *at = change(before);
    return before;
}
template <class T> inline T atomicMax(T* at, T value) {
    return change_at_once(at, [=](T before) { return value > before ? value : before; }, __builtin_return_address(0));
}
template <class T>
inline T atomicAdd(T* at, T value) { return change_at_once(at, [=](T before) { return T(before + value); }, __builtin_return_address(0)); }

// A relaxed atomic load.
template <class T>
inline T load_relaxed(const T* at) {
    const emulation::Unwatched here;
#if defined(__SANITIZE_THREAD__)
    emulation::touch(at, sizeof(T), emulation::is_atomic, __builtin_return_address(0));
#endif
    return *at;
}

// For the tests: which schedule, how much shared memory a block may have, and what went wrong in the last launch.
extern "C" inline __attribute__((used)) void emulation_reverse(int reverse) { emulation::machine.reverse = reverse != 0; }
extern "C" inline __attribute__((used)) void emulation_shared_limit(size_t bytes) { emulation::machine.shared_limit = bytes; }
extern "C" inline __attribute__((used)) int emulation_threads() { return emulation::machine.count; }  // of a block of the last launch
extern "C" inline __attribute__((used)) void emulation_submit(void (*to)(void*, const std::function<void()>&)) { emulation::submit = to; }
extern "C" inline __attribute__((used)) const char* emulation_error() { return emulation::machine.error.c_str(); }
