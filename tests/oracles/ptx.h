// What kernels translated from PTX (ptx.py) are made of, over the emulation.
#pragma once

#include "emulation/cuda_emulation.h"

#include <type_traits>

namespace ptx {

constexpr uint64_t shared_base = 1024;  // the address of dynamic shared memory: not 0, as on a card

inline unsigned bytes_given = 0;  // the size of the parameters with which the kernel was started; 0: it has begun

// What runs a translated kernel, which takes the place of the compiled one.
template <class... Parameters, class... Arguments> auto started(void (*kernel)(Parameters...), Arguments... arguments) {
    struct { alignas(16) char bytes[4096]; unsigned end = 0; } packed;
    static_assert((0 + ... + sizeof(Parameters)) <= sizeof(packed.bytes));
    const auto add = [&](auto value) {
        packed.end = (packed.end + alignof(decltype(value)) - 1) / alignof(decltype(value)) * alignof(decltype(value));
        std::memcpy(packed.bytes + packed.end, &value, sizeof(value));
        packed.end += sizeof(value);
    };
    (add(static_cast<Parameters>(arguments)), ...);
    return [=] {
        bytes_given = packed.end;
        reinterpret_cast<void (*)(const char*)>(kernel)(packed.bytes);
        if (bytes_given) emulation::fail("a kernel that was not translated");
    };
}

inline void begin(unsigned bytes, int most_threads) {
    if (bytes != bytes_given) emulation::fail("a kernel that takes " + std::to_string(bytes) + " bytes got " + std::to_string(bytes_given));
    const int threads = emulation::machine.count;
    if (threads > most_threads)
        emulation::fail("a launch of " + std::to_string(threads) + " threads: __launch_bounds__ has " + std::to_string(most_threads));
    bytes_given = 0;
}

// A register or number read as a type: integers are cut or extended, between integers and floats the bits stay.
template <class T, class V> inline T as(V value) {
    if constexpr (std::is_integral_v<T> && std::is_integral_v<V>)
        return static_cast<T>(value);
    else
        return __builtin_bit_cast(T, value);
}
template <class V, class T> inline void put(V& to, T value) { to = as<V>(value); }
template <class V> inline uint64_t bits(V value) {
    uint64_t all = 0;
    std::memcpy(&all, &value, sizeof(value));
    return all;
}

inline char* in_shared(uint64_t address, unsigned bytes) {
    const int64_t offset = int64_t(uint32_t(address)) - int64_t(shared_base);
    if (offset < 0 || offset + bytes > emulation::machine.shared_bytes) emulation::fail("an access beyond the launch's shared memory");
    return emulation::machine.shared + offset;
}
template <class T, int count> inline T& at_place(char* address) {
    if (reinterpret_cast<uintptr_t>(address) % (sizeof(T) * count))
        emulation::fail("an access of " + std::to_string(sizeof(T) * count) + " bytes at an address that is no multiple of them");
    return *reinterpret_cast<T*>(address);
}

inline float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float fma_rm(float a, float b, float c) {  // rounds down, from a double: the sums of expf, which uses it, fit into one
    const double exact = __builtin_fma(double(a), double(b), double(c));
    const float nearest = float(exact);
    return nearest > exact ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float div_approx(float a, float b) {  // a huge divisor gives 0 (what a subnormal one may give is not told)
    const bool huge = std::fabs(b) > 0x1p126f && std::fabs(b) < INFINITY;
    return huge ? a * std::copysign(0.f, b) : a / b;
}
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
template <bool ftz> inline float ex2(float x) { return ftz ? flushed(std::exp2(flushed(x))) : std::exp2(x); }
template <class T> inline T divisor(T b) {
    if (!b) emulation::fail("division by zero");
    return b;
}
template <class T> inline T div(T a, T b) { return a / divisor(b); }
template <class T> inline T rem(T a, T b) { return a % divisor(b); }
template <class T> inline bool below(T a, T b) {  // -0 is below 0, and a number below a NaN
    if constexpr (std::is_floating_point_v<T>)
        return std::isnan(b) || a < b || (a == b && std::signbit(a));
    else
        return a < b;
}
template <class T> inline T min(T a, T b) { return below(a, b) ? a : b; }
template <class T> inline T max(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
        return std::isnan(b) || (!std::isnan(a) && below(b, a)) ? a : b;
    else
        return a > b ? a : b;
}
template <class T> inline bool unordered(T a, T b) { return std::isnan(a) || std::isnan(b); }
inline uint16_t bf16(float x) { return __float2bfloat16_rn(x).bits; }
inline float saturated(float x) { return x > 0.f ? std::fmin(x, 1.f) : 0.f; }

template <class T> inline T shl(T x, uint32_t by) { return by >= 8 * sizeof(T) ? T(0) : T(x << by); }
template <class T> inline T shr(T x, uint32_t by) { return by >= 8 * sizeof(T) ? T(x < 0 ? -1 : 0) : T(x >> by); }
template <class T> inline T bfi(T from, T into, uint32_t position, uint32_t length) {
    position &= 255, length &= 255;
    const T mask = shl<T>(length >= 8 * sizeof(T) ? T(~T(0)) : T((T(1) << length) - 1), position);
    return (into & ~mask) | (shl<T>(from, position) & mask);
}

inline void at(const char* instruction) {
    struct {} none;
    emulation::collective(instruction, none, [](auto**) {});
}

enum Mode { up, bfly, idx };
template <Mode mode> inline uint32_t shuffle(uint32_t value, uint32_t by, uint32_t within, uint32_t lanes, bool& there) {
    by &= 31;
    const unsigned lane = emulation::own_lane(), segment = within >> 8 & 31, last = (lane & segment) | (within & 31 & ~segment);
    const int from = mode == up ? int(lane - by) : mode == bfly ? int(lane ^ by) : int((lane & segment) | (by & ~segment));
    there = mode == up ? from >= int(last) : from <= int(last);
    constexpr const char* names[] = {"shfl.up", "shfl.bfly", "shfl.idx"};
    return emulation::shuffle(names[mode], lanes, value, there ? from : int(lane));
}

}  // namespace ptx
