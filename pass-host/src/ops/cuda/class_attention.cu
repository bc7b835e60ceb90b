// A few queries over all tokens of their image: one block an image and head, queries one after the other.
// `q`, `out`: `[B, M, D]`; `k`, `v`: `[B, T, D]`; heads are consecutive parts of D. Shared memory: see each kernel.
#include "prelude.cuh"

// Dot products of `a` (one head of a query) with the same head of all tokens of `b`, into `out[0..tokens]`.
static __device__ void dots(const Value* a, const Value* b, float* out, int tokens, int dim, int width, float scale) {
    int warps = blockDim.x / WARP;
    for (int token = threadIdx.x / WARP; token < tokens; token += warps) {
        float sum = 0.0f;
        for (int i = lane(); i < width; i += WARP) sum += wide(a[i]) * wide(b[(size_t)token * dim + i]);
        sum = warp_sum(sum);
        if (lane() == 0) out[token] = sum * scale;
    }
    __syncthreads();
}

// Softmax in place over shared memory.
static __device__ void softmax(float* p, int tokens) {
    float largest = -INFINITY, total = 0.0f;
    for (int t = threadIdx.x; t < tokens; t += blockDim.x) largest = fmaxf(largest, p[t]);
    largest = block_max(largest);
    for (int t = threadIdx.x; t < tokens; t += blockDim.x) {
        p[t] = expf(p[t] - largest);
        total += p[t];
    }
    float inverse = 1.0f / block_sum(total);
    for (int t = threadIdx.x; t < tokens; t += blockDim.x) p[t] *= inverse;
    __syncthreads();
}

// Shared: `tokens` floats.
KERNEL class_attention(const Value* q, const Value* k, const Value* v, Value* out, int queries, int tokens, int heads,
                       int width, float scale) {
    DYNAMIC_SHARED(float, p);
    int dim = heads * width, image = blockIdx.x / heads, head = blockIdx.x % heads;
    size_t own = (size_t)image * queries * dim + head * width, all = (size_t)image * tokens * dim + head * width;
    for (int query = 0; query < queries; query++) {
        dots(q + own + (size_t)query * dim, k + all, p, tokens, dim, width, scale);
        softmax(p, tokens);
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            float sum = 0.0f;
            for (int t = 0; t < tokens; t++) sum += p[t] * wide(v[all + (size_t)t * dim + i]);
            put(&out[own + (size_t)query * dim + i], sum);
        }
        __syncthreads();
    }
}

// Shared: `2 queries tokens` floats.
KERNEL class_attention_backward(const Value* q, const Value* k, const Value* v, const Value* d_out, Value* dq, Value* dk,
                                Value* dv, int queries, int tokens, int heads, int width, float scale) {
    DYNAMIC_SHARED(float, p);
    float* ds = p + queries * tokens;
    int dim = heads * width, image = blockIdx.x / heads, head = blockIdx.x % heads;
    size_t own = (size_t)image * queries * dim + head * width, all = (size_t)image * tokens * dim + head * width;
    for (int query = 0; query < queries; query++) {
        size_t at = own + (size_t)query * dim;
        float *p_row = p + query * tokens, *ds_row = ds + query * tokens;
        dots(q + at, k + all, p_row, tokens, dim, width, scale);
        softmax(p_row, tokens);
        dots(d_out + at, v + all, ds_row, tokens, dim, width, 1.0f);
        float mean = 0.0f;
        for (int t = threadIdx.x; t < tokens; t += blockDim.x) mean += p_row[t] * ds_row[t];
        mean = block_sum(mean);
        for (int t = threadIdx.x; t < tokens; t += blockDim.x) ds_row[t] = p_row[t] * (ds_row[t] - mean) * scale;
        __syncthreads();
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            float sum = 0.0f;
            for (int t = 0; t < tokens; t++) sum += ds_row[t] * wide(k[all + (size_t)t * dim + i]);
            put(&dq[at + i], sum);
        }
    }
    for (int place = threadIdx.x; place < tokens * width; place += blockDim.x) {
        int t = place / width, i = place % width;
        float key = 0.0f, value = 0.0f;
        for (int query = 0; query < queries; query++) {
            size_t at = own + (size_t)query * dim + i;
            key += ds[query * tokens + t] * wide(q[at]);
            value += p[query * tokens + t] * wide(d_out[at]);
        }
        size_t to = all + (size_t)t * dim + i;
        put(&dk[to], key);
        put(&dv[to], value);
    }
}
