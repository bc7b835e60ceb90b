// Residual connection with stochastic depth: one factor a sample; `scale` null stands for 1.
#include "prelude.cuh"

// `y = x + scale branch`; without `x`: `y = scale branch`. P divides `sample`.
template <int P> static __device__ void rows(const Value* x, const Value* branch, const float* scale, Value* y, word count, word sample) {
    word at = ((word)blockIdx.x * blockDim.x + threadIdx.x) * P;
    if (at >= count) return;
    float factor = scale ? scale[at / sample] : 1.0f;
    Pack<Value, P> sum = *reinterpret_cast<const Pack<Value, P>*>(branch + at), base = sum;
    if (x) base = *reinterpret_cast<const Pack<Value, P>*>(x + at);
    for (int i = 0; i < P; i++) {
        float value = factor * wide(sum.values[i]);
        put(&sum.values[i], x ? value + wide(base.values[i]) : value);
    }
    *reinterpret_cast<Pack<Value, P>*>(y + at) = sum;
}

KERNEL add_scaled(const Value* x, const Value* branch, const float* scale, Value* y, word count, word sample, int packed) {
    if (packed) rows<16 / sizeof(Value)>(x, branch, scale, y, count, sample);
    else rows<1>(x, branch, scale, y, count, sample);
}
