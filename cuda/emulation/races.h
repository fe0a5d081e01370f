// The race detector of the emulation: what g++ -fsanitize=thread calls at each load and store, in the place of its own
// runtime (do not link with that flag).
//
// Two accesses of a byte, one of them a store, are a race unless something orders them: __syncthreads between threads
// of a block, __syncwarp between lanes of a warp, the end of a launch. Nothing orders blocks; two atomic accesses are
// no race. Collectives other than __syncwarp order nothing. A cp.async stores at any time until the wait of its thread;
// ldmatrix loads for each of its lanes. It depends on what a thread does, not on the schedule: no race found means that
// there is none in any order of warps, with these sizes and data. The memory of a thread's own stack does not count.
//
// A launch with a race ends with an error that has both places in the library, for `addr2line -Cfe`. emulation_drop
// takes away what one barrier orders.
#pragma once

#include <dlfcn.h>

#include <unordered_map>

namespace emulation {

enum Access { is_load = 0, is_store = 1, is_atomic = 2 };  // the last one is added to one of the others

// What is known of a byte: its last store and its last loads. Times: Watch::now, Watch::warps. Lane or warp -1: several.
struct Byte {
    struct Touch {
        uint32_t time = 0, warp_time = 0, place = 0;
        int16_t warp = 0, lane = 0;
        bool atomic = false;
    } stored, loaded;
    uint32_t loaded_elsewhere = 0, copied = 0;  // the launch in which two blocks load it; the block that has a cp.async on its way to it
};

struct Watch {
    // When they began: the launch, the block, the time between two barriers, that of each warp.
    uint32_t launch = 1, block = 1, now = 1, warps[32] = {}, clock = 1;
    int launches = 0, barriers = 0, warp_barriers[32] = {};  // since emulation_drop; of the block so far
    int drop_launch = -1, drop_barrier = -1, drop_warp = -1, drop_wait = -1;
    bool dropped = false;
    std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
    uintptr_t page = 0;
    Byte* bytes = nullptr;
    // Of the thread whose access was the last: its number, its stack; and where the fibers are.
    int thread = -1;
    const char *stack = nullptr, *fibers = nullptr;
    size_t fibers_bytes = 0;
};
inline Watch watch;
inline const uintptr_t library_begin = [] {
    Dl_info info{};
    dladdr(&watch, &info);
    return uintptr_t(info.dli_fbase);
}();
constexpr uintptr_t watched_page = 4096;

// Not instrumented: the detector's own accesses are most of what it would be called for.
#define EMULATION_PLAIN __attribute__((no_sanitize("thread")))

EMULATION_PLAIN inline Byte& byte_at(uintptr_t address) {
    if (address / watched_page != watch.page || !watch.bytes) {
        auto& found = watch.pages[watch.page = address / watched_page];
        if (!found) found.reset(new Byte[watched_page]);
        watch.bytes = found.get();
    }
    return watch.bytes[address % watched_page];
}

inline std::string place_name(uint32_t place) {
    char text[16];
    std::snprintf(text, sizeof(text), "0x%x", place);
    return text;
}

inline void look_at_thread() {
    const Machine& m = machine;
    watch.thread = m.current, watch.stack = m.fibers[m.current].stack.get();
    watch.fibers = reinterpret_cast<const char*>(m.fibers.data()), watch.fibers_bytes = m.fibers.size() * sizeof(Fiber);
}

// whole_warp: on behalf of all lanes. place: the return address.
EMULATION_PLAIN inline void touch(const void* at, size_t count, int kind, void* place, bool whole_warp = false) {
    Machine& m = machine;
    const auto inside = [&](const void* begin, size_t bytes) EMULATION_PLAIN { return uintptr_t(at) - uintptr_t(begin) < bytes; };
    if (m.current != watch.thread) look_at_thread();
    if (inside(watch.stack, stack_bytes) || inside(&m, sizeof(m)) || inside(watch.fibers, watch.fibers_bytes)) return;
    const uint32_t here = uint32_t(uintptr_t(place) - library_begin) - 1;
    const int16_t warp = int16_t(m.current / 32), lane = whole_warp ? -1 : int16_t(m.current % 32);
    const bool stores = kind & is_store, atomic = kind & is_atomic, shared = inside(m.shared, m.shared_bytes);
    const uint32_t begin = shared ? watch.block : watch.launch;  // what was before is ordered
    const auto unordered = [&](const Byte::Touch& other) EMULATION_PLAIN {
        if (other.time < begin || (other.time >= watch.block && other.time < watch.now) || (atomic && other.atomic)) return false;
        if (other.time < watch.block || other.warp != warp) return true;
        return other.warp_time == watch.warps[warp] && (lane == -1 || other.lane != lane);
    };
    const auto race = [&](uintptr_t address, const char* with, uint32_t other) {
        const std::string where = shared ? " of byte " + std::to_string(address - uintptr_t(m.shared)) + " of shared memory" : "";
        fail("race: a " + std::string(stores ? "store" : "load") + where + " at " + place_name(here) + " and a " + with + " at " +
             place_name(other));
    };
    for (uintptr_t address = uintptr_t(at); address < uintptr_t(at) + count; ++address) {
        Byte& byte = byte_at(address);
        if (byte.copied == watch.block) race(address, "cp.async on its way", byte.stored.place);
        if (unordered(byte.stored)) race(address, "store", byte.stored.place);
        if (stores && (byte.loaded_elsewhere == watch.launch || unordered(byte.loaded))) race(address, "load", byte.loaded.place);
        const Byte::Touch mine{watch.now, watch.warps[warp], here, warp, lane, atomic};
        if (stores) {
            byte.stored = mine;
            continue;
        }
        Byte::Touch& last = byte.loaded;
        if (last.time >= begin && last.time < watch.block) byte.loaded_elsewhere = watch.launch;
        if (last.time != watch.now) {
            last = mine;
        } else {
            const bool others = last.warp != warp, lanes = last.warp_time == watch.warps[warp] && last.lane != lane,
                       plain = !last.atomic || !atomic;
            last = mine, last.atomic = !plain;
            if (others) last.warp = -1;
            if (lanes) last.lane = -1;
        }
    }
}

inline void begin_launch() {
    watch.launch = watch.block = watch.now = ++watch.clock;
    ++watch.launches;
    watch.thread = -1;
}
inline void begin_block() {
    watch.block = watch.now = ++watch.clock;
    watch.barriers = 0;
    for (int i = 0; i < 32; ++i) watch.warps[i] = ++watch.clock, watch.warp_barriers[i] = 0;
    watch.block = watch.now = ++watch.clock;
}
inline bool drops(int which, int count) {
    const bool now = which == count && watch.drop_launch == watch.launches - 1;
    watch.dropped |= now;
    return now;
}
inline void pass_block_barrier() {
    if (drops(watch.drop_barrier, watch.barriers++)) return;
    watch.now = ++watch.clock;
}
inline void pass_warp_barrier(int warp) {
    if (drops(watch.drop_warp, watch.warp_barriers[warp]++)) return;
    watch.warps[warp] = ++watch.clock;
}

inline void watch_copy(const PendingCopy& c, bool landed, void* place) {
    const uint32_t mark = landed ? 0 : watch.block;
    for (int i = 0; landed && i < c.bytes; ++i) byte_at(uintptr_t(c.to) + i).copied = 0;
    touch(c.from, c.valid, is_load, place);
    touch(c.to, c.bytes, is_store, place);
    for (int i = 0; i < c.bytes; ++i) byte_at(uintptr_t(c.to) + i).copied = mark;
}

}  // namespace emulation

#define EMULATION_HOOK extern "C" inline __attribute__((used, noinline)) EMULATION_PLAIN void
#define EMULATION_ACCESS(name, bytes, kind)                                                   \
    EMULATION_HOOK name(void* at) {                                                           \
        if (!emulation::watching) return;                                                     \
        const emulation::Unwatched here;                                                      \
        emulation::touch(at, bytes, emulation::kind, __builtin_return_address(0));            \
    }
#define EMULATION_BOTH(bytes)                                      \
    EMULATION_ACCESS(__tsan_read##bytes, bytes, is_load)           \
    EMULATION_ACCESS(__tsan_write##bytes, bytes, is_store)         \
    EMULATION_ACCESS(__tsan_unaligned_read##bytes, bytes, is_load) \
    EMULATION_ACCESS(__tsan_unaligned_write##bytes, bytes, is_store)
EMULATION_ACCESS(__tsan_read1, 1, is_load)
EMULATION_ACCESS(__tsan_write1, 1, is_store)
EMULATION_BOTH(2)
EMULATION_BOTH(4)
EMULATION_BOTH(8)
EMULATION_BOTH(16)
#define EMULATION_RANGE(name, kind)                                                           \
    EMULATION_HOOK name(void* at, unsigned long bytes) {                                      \
        if (!emulation::watching) return;                                                     \
        const emulation::Unwatched here;                                                      \
        emulation::touch(at, bytes, emulation::kind, __builtin_return_address(0));            \
    }
EMULATION_RANGE(__tsan_read_range, is_load)
EMULATION_RANGE(__tsan_write_range, is_store)
EMULATION_HOOK __tsan_init() {}
EMULATION_HOOK __tsan_func_entry(void*) {}
EMULATION_HOOK __tsan_func_exit(void*) {}
EMULATION_HOOK __tsan_vptr_update(void*, void*) {}
EMULATION_HOOK __tsan_vptr_read(void*) {}

// From now on, launch `launch` (counted from here) has one barrier of each block less: the n-th __syncthreads, the n-th
// __syncwarp of each warp, or the n-th wait for copies of each thread, which then waits for one group less; -1: none.
// emulation_dropped: whether it has come to that; emulation_launches: how many launches so far.
EMULATION_HOOK emulation_drop(int launch, int barrier, int warp_barrier, int wait) {
    emulation::watch.launches = 0, emulation::watch.dropped = false;
    emulation::watch.drop_launch = launch, emulation::watch.drop_barrier = barrier, emulation::watch.drop_warp = warp_barrier,
    emulation::watch.drop_wait = wait;
}
extern "C" inline __attribute__((used)) int emulation_dropped() { return emulation::watch.dropped; }
extern "C" inline __attribute__((used)) int emulation_launches() { return emulation::watch.launches; }
#undef EMULATION_HOOK
#undef EMULATION_ACCESS
#undef EMULATION_BOTH
#undef EMULATION_RANGE
