// Softmax over rows of attention scores, between batched products: one warp a row.
#include "prelude.cuh"

// Rows are `pitch` values apart; the scores are `f32`, the probabilities activations.
KERNEL softmax(const float* scores, Value* probabilities, int rows, int columns, int pitch) {
    int row = warp_index();
    if (row >= rows) return;
    scores += (size_t)row * pitch, probabilities += (size_t)row * pitch;
    float largest = -INFINITY, total = 0.0f;
    for (int i = lane(); i < columns; i += WARP) largest = fmaxf(largest, scores[i]);
    largest = warp_max(largest);
    for (int i = lane(); i < columns; i += WARP) total += expf(scores[i] - largest);
    float inverse = 1.0f / warp_sum(total);
    for (int i = lane(); i < columns; i += WARP) put(&probabilities[i], expf(scores[i] - largest) * inverse);
}

// ds = p (dp - sum(p dp)).
KERNEL softmax_backward(const Value* p, const float* dp, Value* ds, int rows, int columns, int pitch) {
    int row = warp_index();
    if (row >= rows) return;
    p += (size_t)row * pitch, dp += (size_t)row * pitch, ds += (size_t)row * pitch;
    float mean = 0.0f;
    for (int i = lane(); i < columns; i += WARP) mean += wide(p[i]) * dp[i];
    mean = warp_sum(mean);
    for (int i = lane(); i < columns; i += WARP) put(&ds[i], wide(p[i]) * (dp[i] - mean));
}
