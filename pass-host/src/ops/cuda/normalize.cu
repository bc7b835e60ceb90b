// L2 normalization of rows, and weight normalization: one warp a row.
#include "prelude.cuh"

static __device__ inline float row_dot(const Value* a, const Value* b, int dim) {
    float sum = 0.0f;
    for (int i = lane(); i < dim; i += WARP) sum += wide(a[i]) * wide(b[i]);
    return warp_sum(sum);
}

// `x / max(|x|, eps)`.
KERNEL l2_normalize(const Value* x, Value* y, int rows, int dim, float eps) {
    int row = warp_index();
    if (row >= rows) return;
    x += (size_t)row * dim, y += (size_t)row * dim;
    float norm = sqrtf(row_dot(x, x, dim)), inverse = 1.0f / (norm < eps ? eps : norm);
    for (int i = lane(); i < dim; i += WARP) put(&y[i], wide(x[i]) * inverse);
}

KERNEL l2_normalize_backward(const Value* x, const Value* dy, Value* dx, int rows, int dim, float eps) {
    int row = warp_index();
    if (row >= rows) return;
    x += (size_t)row * dim, dy += (size_t)row * dim, dx += (size_t)row * dim;
    float norm = sqrtf(row_dot(x, x, dim)), dot = row_dot(x, dy, dim);
    bool small = norm < eps;
    float inverse = 1.0f / (small ? eps : norm), along = small ? 0.0f : dot / (norm * norm);
    for (int i = lane(); i < dim; i += WARP) put(&dx[i], (wide(dy[i]) - wide(x[i]) * along) * inverse);
}

// `g v / |v|`, parameters: `float` in, activations out.
KERNEL weight_norm(const float* v, const float* g, Value* w, int rows, int dim) {
    int row = warp_index();
    if (row >= rows) return;
    v += (size_t)row * dim, w += (size_t)row * dim;
    float sum = 0.0f;
    for (int i = lane(); i < dim; i += WARP) sum += v[i] * v[i];
    float factor = g[row] / sqrtf(warp_sum(sum));
    for (int i = lane(); i < dim; i += WARP) put(&w[i], v[i] * factor);
}

KERNEL weight_norm_backward(const float* v, const float* g, const Value* dw, float* dv, float* dg, int rows, int dim) {
    int row = warp_index();
    if (row >= rows) return;
    v += (size_t)row * dim, dw += (size_t)row * dim, dv += (size_t)row * dim;
    float square = 0.0f, dot = 0.0f;
    for (int i = lane(); i < dim; i += WARP) square += v[i] * v[i], dot += v[i] * wide(dw[i]);
    float inverse = 1.0f / sqrtf(warp_sum(square)), along = warp_sum(dot) * inverse;
    for (int i = lane(); i < dim; i += WARP) dv[i] = (wide(dw[i]) - v[i] * along * inverse) * g[row] * inverse;
    if (lane() == 0) dg[row] = along;
}
