// Every patch over its own token and its positives, and the mean of the positives; gradients are gathered by the patch
// that receives them, so nothing is added atomically.
// `index`: `[B, N, k]` patches of the same image, the first `counts[patch]` valid.
#include "prelude.cuh"

// Key and value rows `[k|v]` of token `j` of a patch: 0 is the patch itself.
static __device__ inline const Value* token(const Value* own, const Value* patches, const unsigned* index, int own_shared,
                                            int row, int n, int k, int j, int dim) {
    if (j == 0) return own + (size_t)(own_shared ? 0 : row) * 2 * dim;
    return patches + ((size_t)(row / n) * n + index[(size_t)row * k + j - 1]) * 2 * dim;
}

// Probabilities of one patch and head into `p[0..tokens]`, in shared memory of this warp.
static __device__ void probabilities(const Value* q, const Value* own, const Value* patches, const unsigned* index,
                                     int own_shared, int row, int n, int k, int tokens, int dim, int head, int width,
                                     float scale, float* p) {
    float largest = -INFINITY, total = 0.0f;
    for (int j = 0; j < tokens; j++) {
        const Value* key = token(own, patches, index, own_shared, row, n, k, j, dim) + head * width;
        float sum = 0.0f;
        for (int i = lane(); i < width; i += WARP) sum += wide(q[i]) * wide(key[i]);
        sum = warp_sum(sum) * scale;
        largest = fmaxf(largest, sum);
        if (lane() == 0) p[j] = sum;
    }
    __syncwarp();
    for (int j = 0; j < tokens; j++) total += expf(p[j] - largest);
    __syncwarp();
    for (int j = lane(); j < tokens; j += WARP) p[j] = expf(p[j] - largest) / total;
    __syncwarp();
}

// One warp a patch and head; shared: `1 + k` floats a warp.
KERNEL neighbor_attention(const Value* q, const Value* own, const Value* patches, const unsigned* index,
                          const unsigned* counts, Value* out, int rows, int n, int k, int heads, int width,
                          int q_shared, int own_shared, float scale) {
    DYNAMIC_SHARED(float, shared);
    int warp = warp_index(), row = warp / heads, head = warp % heads, dim = heads * width;
    if (row >= rows) return;
    float* p = shared + (threadIdx.x / WARP) * (1 + k);
    int tokens = 1 + counts[row % n];
    const Value* query = q + (size_t)(q_shared ? 0 : row) * dim + head * width;
    probabilities(query, own, patches, index, own_shared, row, n, k, tokens, dim, head, width, scale, p);
    for (int i = lane(); i < width; i += WARP) {
        float sum = 0.0f;
        for (int j = 0; j < tokens; j++) {
            const Value* value = token(own, patches, index, own_shared, row, n, k, j, dim) + dim + head * width;
            sum += p[j] * wide(value[i]);
        }
        put(&out[(size_t)row * dim + head * width + i], sum);
    }
}

// Gradients of the query and of the own token of every patch; the weights of all tokens, `kept[row][head][0|1][1+k]` =
// probability and gradient of the score, for the second kernel. Shared: `2 (1 + k)` floats a warp.
KERNEL neighbor_attention_backward(const Value* q, const Value* own, const Value* patches, const unsigned* index,
                                   const unsigned* counts, const Value* d_out, Value* dq, Value* d_own, float* kept,
                                   int rows, int n, int k, int heads, int width, int q_shared, int own_shared,
                                   float scale) {
    DYNAMIC_SHARED(float, shared);
    int warp = warp_index(), row = warp / heads, head = warp % heads, dim = heads * width;
    if (row >= rows) return;
    float *p = shared + (threadIdx.x / WARP) * 2 * (1 + k), *ds = p + 1 + k;
    int tokens = 1 + counts[row % n], place = head * width;
    const Value* query = q + (size_t)(q_shared ? 0 : row) * dim + place;
    const Value* d = d_out + (size_t)row * dim + place;
    probabilities(query, own, patches, index, own_shared, row, n, k, tokens, dim, head, width, scale, p);
    float mean = 0.0f;
    for (int j = 0; j < tokens; j++) {
        const Value* value = token(own, patches, index, own_shared, row, n, k, j, dim) + dim + place;
        float sum = 0.0f;
        for (int i = lane(); i < width; i += WARP) sum += wide(d[i]) * wide(value[i]);
        sum = warp_sum(sum);
        mean += p[j] * sum;
        if (lane() == 0) ds[j] = sum;
    }
    __syncwarp();
    for (int j = lane(); j < tokens; j += WARP) ds[j] = p[j] * (ds[j] - mean) * scale;
    __syncwarp();
    for (int i = lane(); i < width; i += WARP) {
        float sum = 0.0f;
        for (int j = 0; j < tokens; j++) {
            const Value* key = token(own, patches, index, own_shared, row, n, k, j, dim) + place;
            sum += ds[j] * wide(key[i]);
        }
        put(&dq[(size_t)row * dim + place + i], sum);
        put(&d_own[(size_t)row * 2 * dim + place + i], ds[0] * wide(query[i]));
        put(&d_own[(size_t)row * 2 * dim + dim + place + i], p[0] * wide(d[i]));
    }
    float* keep = kept + ((size_t)row * heads + head) * 2 * (1 + k);
    for (int j = lane(); j < tokens; j += WARP) keep[j] = p[j], keep[1 + k + j] = ds[j];
}

// One warp a receiving patch: looks through the positives of its image in order. A lane owns the same features of all
// heads throughout.
KERNEL neighbor_attention_gather(const Value* q, const unsigned* index, const unsigned* counts, const Value* d_out,
                                 const float* kept, Value* d_patches, int rows, int n, int k, int heads, int width,
                                 int q_shared) {
    int row = warp_index(), dim = heads * width;
    if (row >= rows) return;
    int first = row / n * n, patch = row % n;
    for (int i = lane(); i < dim; i += WARP) {
        int head = i / width;
        float key = 0.0f, value = 0.0f;
        for (int giver = 0; giver < n; giver++) {
            for (int j = 0; j < (int)counts[giver]; j++) {
                if ((int)index[(size_t)(first + giver) * k + j] != patch) continue;
                size_t from = first + giver;
                const float* weights = kept + (from * heads + head) * 2 * (1 + k) + 1 + j;
                key += weights[1 + k] * wide(q[(q_shared ? 0 : from) * dim + i]);
                value += weights[0] * wide(d_out[from * dim + i]);
            }
        }
        put(&d_patches[(size_t)row * 2 * dim + i], key);
        put(&d_patches[(size_t)row * 2 * dim + dim + i], value);
    }
}

// Mean of the positives, one warp a patch; zero where there are none.
KERNEL gather_mean(const Value* x, const unsigned* index, const unsigned* counts, Value* out, int rows, int n, int k,
                   int dim) {
    int row = warp_index();
    if (row >= rows) return;
    int count = counts[row % n];
    for (int i = lane(); i < dim; i += WARP) {
        float sum = 0.0f;
        for (int j = 0; j < count; j++) sum += wide(x[((size_t)(row / n) * n + index[(size_t)row * k + j]) * dim + i]);
        put(&out[(size_t)row * dim + i], count > 0 ? sum / count : 0.0f);
    }
}

KERNEL gather_mean_backward(const unsigned* index, const unsigned* counts, const Value* d_out, Value* dx, int rows, int n,
                            int k, int dim) {
    int row = warp_index();
    if (row >= rows) return;
    int first = row / n * n, patch = row % n;
    for (int i = lane(); i < dim; i += WARP) {
        float sum = 0.0f;
        for (int giver = 0; giver < n; giver++) {
            int count = counts[giver];
            for (int j = 0; j < count; j++) {
                if ((int)index[(size_t)(first + giver) * k + j] != patch) continue;
                sum += wide(d_out[(size_t)(first + giver) * dim + i]) / count;
            }
        }
        put(&dx[(size_t)row * dim + i], sum);
    }
}
