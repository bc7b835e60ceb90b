// Launches of emulated kernels by name; included after the kernels, see `build.rs`.
#pragma once
#include "runtime.h"

namespace emulator {

using Call = void (*)(void**);

template <auto Kernel> struct Unpacked;
template <class... A, void (*Kernel)(A...)> struct Unpacked<Kernel> {
    template <size_t... I> static void spread(void** arguments, std::index_sequence<I...>) {
        Kernel(*static_cast<A*>(arguments[I])...);
    }
    static void call(void** arguments) { spread(arguments, std::index_sequence_for<A...>()); }
};

struct Entry {
    const char *module, *name;
    Call call;
};

inline thread_local Call running;
inline thread_local void** arguments;

// A thread: one launch after the other.
inline void body() {
    for (;;) {
        running(arguments);
        wait(State::Done);
    }
}

inline void shuffle(std::vector<unsigned>& order, uint64_t& random) {
    for (unsigned i = order.size() - 1; i > 0; i--) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        std::swap(order[i], order[(random >> 33) % (i + 1)]);
    }
}

// Runs a warp as far as it comes alone: to the end or to a barrier of its block.
inline const char* run_warp(unsigned warp, uint64_t& random) {
    auto& threads = machine->threads;
    std::vector<unsigned> order(LANES);
    for (unsigned lane = 0; lane < LANES; lane++) order[lane] = warp * LANES + lane;
    for (;;) {
        shuffle(order, random);
        unsigned waiting = 0;
        for (unsigned t : order) {
            if (threads[t].state == State::Ready) resume(t);
            waiting += threads[t].state == State::AtWarpBarrier;
        }
        if (waiting == 0) return nullptr;
        if (waiting != LANES) return "some lanes of a warp never reach its barrier or shuffle";
        for (unsigned t : order) threads[t].state = State::Ready;
    }
}

inline const char* run_block(unsigned count, uint64_t& random) {
    auto& threads = machine->threads;
    for (unsigned t = 0; t < count; t++) {
        Thread& thread = threads[t];
        if (!thread.started) {
            thread.stack.resize(STACK);
            getcontext(&thread.start);
            thread.start.uc_stack.ss_sp = thread.stack.data();
            thread.start.uc_stack.ss_size = thread.stack.size();
            thread.start.uc_link = nullptr;
            makecontext(&thread.start, body, 0);
        }
        thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        thread.state = State::Ready;
        thread.shuffles = 0;
    }
    std::vector<unsigned> warps(count / LANES);
    for (unsigned warp = 0; warp < warps.size(); warp++) warps[warp] = warp;
    for (;;) {
        shuffle(warps, random);
        for (unsigned warp : warps) {
            if (const char* problem = run_warp(warp, random)) return problem;
        }
        unsigned waiting = 0, done = 0;
        for (unsigned t = 0; t < count; t++) {
            waiting += threads[t].state == State::AtBlockBarrier;
            done += threads[t].state == State::Done;
        }
        if (done == count) return nullptr;
        if (waiting != count) return "some threads of a block never reach its barrier";
        for (unsigned t = 0; t < count; t++) threads[t].state = State::Ready;
    }
}

inline const char* launch(const Entry* entries, size_t size, const char* module, const char* name, const unsigned* grid,
                          const unsigned* block, unsigned shared, void** with) {
    const Entry* found = nullptr;
    for (size_t i = 0; i < size; i++) {
        if (!strcmp(entries[i].module, module) && !strcmp(entries[i].name, name)) found = &entries[i];
    }
    if (!found) return "there is no such kernel";
    unsigned count = block[0] * block[1] * block[2];
    if (count == 0 || count > 1024 || count % LANES) return "a block has 32 to 1024 threads, whole warps";
    if (shared > 48 << 10) return "more than 48 KiB of shared memory";
    static thread_local Machine own;
    machine = &own;
    if (own.threads.size() < count) own.threads.resize(count);
    for (auto& set : own.slots) set.resize(count);
    running = found->call, arguments = with;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
    uint64_t random = 1;
    for (unsigned z = 0; z < grid[2]; z++) {
        for (unsigned y = 0; y < grid[1]; y++) {
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                own.dynamic_shared.assign((shared + 7) / 8, NAN);
                if (const char* problem = run_block(count, random)) {
                    // its threads stand in the middle of it
                    for (Thread& thread : own.threads) thread.started = false;
                    return problem;
                }
            }
        }
    }
    return nullptr;
}

}  // namespace emulator
