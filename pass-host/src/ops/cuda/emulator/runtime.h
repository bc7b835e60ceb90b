// Runs kernels on the processor, for tests: blocks one after the other, every thread of a block a context of its own
// that stops at barriers and shuffles. Warps come in random order and run ahead of each other as far as barriers let
// them, their lanes in random order too, and shared memory starts as garbage: a missing barrier gives wrong numbers. A
// barrier that not all threads reach is an error.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#define KERNEL static void
#define __device__
#define __shared__ static thread_local
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::machine->dynamic_shared.data())

using std::isnan;

struct Dimensions {
    unsigned x, y, z;
};

inline thread_local Dimensions threadIdx, blockIdx, blockDim, gridDim;

struct __nv_bfloat16 {
    uint16_t bits;
};

static inline float __bfloat162float(__nv_bfloat16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// To the nearest, ties to even.
static inline __nv_bfloat16 __float2bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {(uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Compiled without contraction, so these are plain.
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }

template <class V> static inline V min(V a, V b) { return b < a ? b : a; }

namespace emulator {

enum class State { Ready, AtBlockBarrier, AtWarpBarrier, Done };

struct Thread {
    // where it starts, then where it goes on: jumps need no system call, contexts do, so one context serves all launches
    ucontext_t start;
    jmp_buf place;
    std::vector<char> stack;
    Dimensions index;
    State state;
    bool started = false;
    unsigned shuffles;
};

constexpr unsigned LANES = 32;
constexpr size_t STACK = 64 << 10;

struct Machine {
    std::vector<Thread> threads;
    std::vector<double> dynamic_shared;
    // two sets, used in turns: a lane may write its next value before another has read the last
    std::vector<uint64_t> slots[2];
};

// a plain pointer: every access to a thread-local with a constructor would ask whether it has run
inline thread_local Machine* machine = nullptr;
inline thread_local unsigned current;
inline thread_local jmp_buf scheduler;

[[gnu::noinline]] inline void wait(State state) {
    Thread& self = machine->threads[current];
    self.state = state;
    if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

// Runs a thread until it waits or ends.
[[gnu::noinline]] inline void resume(unsigned number) {
    Thread& thread = machine->threads[number];
    current = number, threadIdx = thread.index;
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.start);
}

template <class V> V exchange(V value, unsigned source) {
    auto& set = machine->slots[machine->threads[current].shuffles++ % 2];
    memcpy(&set[current], &value, sizeof value);
    unsigned from = current / LANES * LANES + source;
    wait(State::AtWarpBarrier);
    memcpy(&value, &set[from], sizeof value);
    return value;
}

}  // namespace emulator

static inline void __syncthreads() { emulator::wait(emulator::State::AtBlockBarrier); }
static inline void __syncwarp() { emulator::wait(emulator::State::AtWarpBarrier); }

template <class V> static V __shfl_xor_sync(unsigned, V value, int mask) {
    return emulator::exchange(value, emulator::current % emulator::LANES ^ mask);
}

template <class V> static V __shfl_sync(unsigned, V value, int source, int width = emulator::LANES) {
    unsigned lane = emulator::current % emulator::LANES;
    return emulator::exchange(value, lane / width * width + source % width);
}

template <class V> static V __shfl_down_sync(unsigned, V value, int step, int width = emulator::LANES) {
    unsigned lane = emulator::current % emulator::LANES;
    return emulator::exchange(value, (int)(lane % width) + step < width ? lane + step : lane);
}
