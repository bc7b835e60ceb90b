// What follows the product of a linear layer: bias, exact GELU, and the way back through it.
#include "prelude.cuh"

// Distribution function of the normal distribution.
static __device__ inline float normal(float u) { return 0.5f * erfcf(-0.70710678f * u); }

static __device__ inline float gelu_slope(float u) { return normal(u) + u * 0.39894228f * expf(-0.5f * u * u); }

// `y += bias`, P values a thread; P divides `columns`.
template <int P> static __device__ void bias_rows(Value* y, const float* bias, word count, int columns) {
    word at = ((word)blockIdx.x * blockDim.x + threadIdx.x) * P;
    if (at >= count) return;
    Pack<Value, P> pack = *reinterpret_cast<Pack<Value, P>*>(y + at);
    int column = at % columns;
    for (int i = 0; i < P; i++) put(&pack.values[i], wide(pack.values[i]) + bias[column + i]);
    *reinterpret_cast<Pack<Value, P>*>(y + at) = pack;
}

KERNEL add_bias(Value* y, const float* bias, word count, int columns, int packed) {
    if (packed) bias_rows<16 / sizeof(Value)>(y, bias, count, columns);
    else bias_rows<1>(y, bias, count, columns);
}

// `u += bias; y = gelu(u)`; `y` may be `u`.
template <int P> static __device__ void bias_gelu_rows(Value* u, const float* bias, Value* y, word count, int columns) {
    word at = ((word)blockIdx.x * blockDim.x + threadIdx.x) * P;
    if (at >= count) return;
    Pack<Value, P> before = *reinterpret_cast<Pack<Value, P>*>(u + at), after;
    int column = at % columns;
    for (int i = 0; i < P; i++) {
        put(&before.values[i], wide(before.values[i]) + bias[column + i]);
        // of the stored value, which is what the backward pass sees
        float value = wide(before.values[i]);
        put(&after.values[i], value * normal(value));
    }
    *reinterpret_cast<Pack<Value, P>*>(u + at) = before;
    *reinterpret_cast<Pack<Value, P>*>(y + at) = after;
}

KERNEL add_bias_gelu(Value* u, const float* bias, Value* y, word count, int columns, int packed) {
    if (packed) bias_gelu_rows<16 / sizeof(Value)>(u, bias, y, count, columns);
    else bias_gelu_rows<1>(u, bias, y, count, columns);
}

template <int P> static __device__ void gelu_rows_backward(const Value* u, const Value* dy, Value* du, word count) {
    word at = ((word)blockIdx.x * blockDim.x + threadIdx.x) * P;
    if (at >= count) return;
    Pack<Value, P> input = *reinterpret_cast<const Pack<Value, P>*>(u + at);
    Pack<Value, P> gradient = *reinterpret_cast<const Pack<Value, P>*>(dy + at);
    for (int i = 0; i < P; i++) put(&gradient.values[i], wide(gradient.values[i]) * gelu_slope(wide(input.values[i])));
    *reinterpret_cast<Pack<Value, P>*>(du + at) = gradient;
}

KERNEL gelu_backward(const Value* u, const Value* dy, Value* du, word count, int packed) {
    if (packed) gelu_rows_backward<16 / sizeof(Value)>(u, dy, du, count);
    else gelu_rows_backward<1>(u, dy, du, count);
}
