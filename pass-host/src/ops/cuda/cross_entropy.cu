// Cross-entropy between centered, sharpened teacher distributions and student distributions: one block a row of K
// logits. Probabilities are formed where they are used and never stored.
#include "prelude.cuh"

// `statistics[row]` = largest scaled logit, normalizer Z, entropy of softmax((t - center) scale).
KERNEL teacher_rows(const Value* t, const float* center, float* statistics, int k, float scale) {
    t += (size_t)blockIdx.x * k;
    float largest = -INFINITY, total = 0.0f, moment = 0.0f;
    for (int i = threadIdx.x; i < k; i += blockDim.x) largest = fmaxf(largest, (wide(t[i]) - center[i]) * scale);
    largest = block_max(largest);
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
        float u = (wide(t[i]) - center[i]) * scale - largest, e = expf(u);
        total += e;
        moment += e * u;
    }
    total = block_sum(total);
    moment = block_sum(moment);
    if (threadIdx.x == 0) {
        float* out = statistics + 3 * (size_t)blockIdx.x;
        out[0] = largest, out[1] = total, out[2] = logf(total) - moment / total;
    }
}

// Losses of every student row against the teachers `entries[starts[row] .. starts[row + 1]]`.
// `statistics[row]` = largest logit, normalizer Z; `sums[row]` = weighted loss, entropies, divergences.
KERNEL student_rows(const Value* s, const Value* t, const float* center, const float* teacher_statistics,
                    const unsigned* starts, const unsigned* entries, const float* weights, float* statistics,
                    double* sums, int k, float scale, float teacher_scale) {
    size_t row = blockIdx.x;
    s += row * k;
    unsigned first = starts[row], end = starts[row + 1];
    float largest = -INFINITY, total = 0.0f;
    for (int i = threadIdx.x; i < k; i += blockDim.x) largest = fmaxf(largest, wide(s[i]));
    largest = block_max(largest);
    for (int i = threadIdx.x; i < k; i += blockDim.x) total += expf((wide(s[i]) - largest) * scale);
    total = block_sum(total);
    double loss = 0.0, entropy = 0.0, divergence = 0.0;
    for (unsigned entry = first; entry < end; entry++) {
        const Value* teacher = t + (size_t)entries[entry] * k;
        const float* known = teacher_statistics + 3 * (size_t)entries[entry];
        float expected = 0.0f;
        for (int i = threadIdx.x; i < k; i += blockDim.x) {
            // shifted by the largest logit: small numbers add up exactly
            expected += expf((wide(teacher[i]) - center[i]) * teacher_scale - known[0]) * (wide(s[i]) - largest);
        }
        double own = (double)logf(total) - (double)(block_sum(expected) / known[1]) * scale;
        loss += weights[entry] * own;
        entropy += known[2];
        divergence += own - known[2];
    }
    if (threadIdx.x == 0) {
        statistics[2 * row] = largest, statistics[2 * row + 1] = total;
        sums[3 * row] = loss, sums[3 * row + 1] = entropy, sums[3 * row + 2] = divergence;
    }
}

// The loss, and the means over `pairs` of entropy and divergence: one block adds the rows in a fixed order.
KERNEL totals(const double* sums, float* loss, double* means, int rows, double pairs) {
    __shared__ double shares[3][256];
    for (int what = 0; what < 3; what++) {
        double sum = 0.0;
        for (int row = threadIdx.x; row < rows; row += blockDim.x) sum += sums[3 * (size_t)row + what];
        shares[what][threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 3) {
        double sum = 0.0;
        for (int i = 0; i < (int)blockDim.x; i++) sum += shares[threadIdx.x][i];
        if (threadIdx.x == 0) *loss = (float)sum;
        else means[threadIdx.x - 1] = sum / pairs;
    }
}

// gradient = upstream scale sum_pairs w (q - p).
KERNEL student_rows_backward(const Value* s, const Value* t, const float* center, const float* teacher_statistics,
                             const unsigned* starts, const unsigned* entries, const float* weights,
                             const float* statistics, const float* upstream, Value* gradient, int k, float scale,
                             float teacher_scale) {
    size_t row = blockIdx.x;
    s += row * k, gradient += row * k;
    unsigned first = starts[row], end = starts[row + 1];
    float largest = statistics[2 * row], factor = *upstream * scale, own = 0.0f;
    for (unsigned entry = first; entry < end; entry++) own += weights[entry];
    own *= factor / statistics[2 * row + 1];
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
        float sum = first < end ? own * expf((wide(s[i]) - largest) * scale) : 0.0f;
        for (unsigned entry = first; entry < end; entry++) {
            const float* known = teacher_statistics + 3 * (size_t)entries[entry];
            float u = (wide(t[(size_t)entries[entry] * k + i]) - center[i]) * teacher_scale - known[0];
            sum -= weights[entry] * factor / known[1] * expf(u);
        }
        put(&gradient[i], sum);
    }
}
