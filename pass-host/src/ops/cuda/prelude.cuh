// What every kernel shares. A file of kernels is compiled once for each type of activations, `-DValue=float` and
// `-DValue=bf16`; sums, statistics and parameters are `float` in both. Without CUDA the same files compile as plain C++
// against `emulator/runtime.h`.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define KERNEL extern "C" __global__ void
#define DYNAMIC_SHARED(type, name)                                                                                     \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];                                                    \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#else
#include "emulator/runtime.h"
#endif

typedef __nv_bfloat16 bf16;
typedef unsigned long long word;

#define FULL_WARP 0xffffffffu
#define WARP 32

static __device__ inline float wide(float value) { return value; }
static __device__ inline float wide(bf16 value) { return __bfloat162float(value); }

static __device__ inline void put(float* place, float value) { *place = value; }
static __device__ inline void put(bf16* place, float value) { *place = __float2bfloat16(value); }

// As many neighboring values as one memory access can carry.
template <class V, int P> struct alignas(P * sizeof(V)) Pack {
    V values[P];
};

static __device__ inline int lane() { return threadIdx.x % WARP; }

// Number of this warp among all warps of a one-dimensional launch.
static __device__ inline int warp_index() { return (blockIdx.x * blockDim.x + threadIdx.x) / WARP; }

// Sum over a warp, the same bits in every lane.
static __device__ inline float warp_sum(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
    return value;
}

static __device__ inline float warp_max(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, step));
    return value;
}

// Sum over a one-dimensional block, in every thread; always in the same order.
static __device__ inline float block_sum(float value) {
    __shared__ float shares[WARP];
    value = warp_sum(value);
    if (lane() == 0) shares[threadIdx.x / WARP] = value;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < (int)(blockDim.x / WARP); warp++) total += shares[warp];
    __syncthreads();
    return total;
}

static __device__ inline float block_max(float value) {
    __shared__ float shares[WARP];
    value = warp_max(value);
    if (lane() == 0) shares[threadIdx.x / WARP] = value;
    __syncthreads();
    float largest = shares[0];
    for (int warp = 1; warp < (int)(blockDim.x / WARP); warp++) largest = fmaxf(largest, shares[warp]);
    __syncthreads();
    return largest;
}
