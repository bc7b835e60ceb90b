// The most similar candidates of every patch. Sums have the order of `pass_core::math::dot`, so that exact ties fall
// the same way: 16 partial sums, without fused multiply-adds, folded in halves; half a warp forms one of them.
#include "prelude.cuh"

#define HALF 16
#define NO_CANDIDATE 0xffffffffu

static __device__ float half_dot(const Value* a, const Value* b, int dim) {
    int own = threadIdx.x % HALF, whole = dim / HALF * HALF;
    float sum = 0.0f, tail = 0.0f;
    for (int i = own; i < whole; i += HALF) sum = __fadd_rn(sum, __fmul_rn(wide(a[i]), wide(b[i])));
    for (int step = HALF / 2; step > 0; step /= 2) sum = __fadd_rn(sum, __shfl_down_sync(FULL_WARP, sum, step, HALF));
    for (int i = whole; i < dim; i++) tail = __fadd_rn(tail, __fmul_rn(wide(a[i]), wide(b[i])));
    // lane 0 of the half has the sum in the right order
    return __shfl_sync(FULL_WARP, __fadd_rn(sum, tail), 0, HALF);
}

// `1 / max(|x|, eps)` of every row; a warp takes two rows.
KERNEL inverse_norms(const Value* x, float* inverse, int rows, int dim, float eps) {
    int row = 2 * warp_index() + lane() / HALF, last = rows - 1;
    if (2 * warp_index() >= rows) return;
    const Value* values = x + (size_t)min(row, last) * dim;
    float norm = sqrtf(half_dot(values, values, dim));
    if (row < rows && threadIdx.x % HALF == 0) inverse[row] = 1.0f / (norm > eps ? norm : eps);
}

// One warp a patch. `candidates`: `[n, slots]` ascending, padded with `NO_CANDIDATE`; `index`: `[rows, k]`, most similar
// first, equal similarities keep the lower index, what is not a number ranks last; 0 where there is no candidate.
// Shared: `2 k` words a warp.
KERNEL matching(const Value* x, const float* inverse, const unsigned* candidates, unsigned* index, int rows, int n,
                int slots, int k, int dim) {
    DYNAMIC_SHARED(float, shared);
    int row = warp_index();
    if (row >= rows) return;
    float* rank = shared + (threadIdx.x / WARP) * 2 * k;
    unsigned* best = reinterpret_cast<unsigned*>(rank + k);
    const unsigned* own = candidates + (size_t)(row % n) * slots;
    size_t image = (size_t)(row / n) * n;
    int found = 0;
    for (int slot = 0; slot < slots; slot += 2) {
        int mine = min(slot + lane() / HALF, slots - 1);
        unsigned candidate = own[mine], patch = row % n;
        size_t low = image + (candidate < patch ? candidate : patch), high = image + (candidate < patch ? patch : candidate);
        bool real = candidate != NO_CANDIDATE;
        if (!real) low = high = row;
        // the lower patch first: a pair has one similarity, whoever asks
        float cosine = half_dot(x + low * dim, x + high * dim, dim) * inverse[low] * inverse[high];
        for (int half = 0; half < 2; half++) {
            float similarity = __shfl_sync(FULL_WARP, cosine, half * HALF);
            unsigned what = __shfl_sync(FULL_WARP, candidate, half * HALF);
            if (slot + half >= slots || what == NO_CANDIDATE) continue;
            if (isnan(similarity)) similarity = -INFINITY;
            if (lane() == 0) {
                int place = found;
                while (place > 0 && similarity > rank[place - 1]) place--;
                if (place < k) {
                    for (int i = min(found, k - 1); i > place; i--) rank[i] = rank[i - 1], best[i] = best[i - 1];
                    rank[place] = similarity, best[place] = what;
                }
            }
            found = min(found + 1, k);
        }
    }
    __syncwarp();
    for (int i = lane(); i < k; i += WARP) index[(size_t)row * k + i] = i < found ? best[i] : 0;
}
