// LayerNorm over rows of `dim` values: one warp a row.
#include "prelude.cuh"

struct Moments {
    float mean, inverse;
};

static __device__ Moments moments(const Value* row, int dim, float eps) {
    float sum = 0.0f;
    for (int i = lane(); i < dim; i += WARP) sum += wide(row[i]);
    float mean = warp_sum(sum) / dim, squares = 0.0f;
    for (int i = lane(); i < dim; i += WARP) {
        float centered = wide(row[i]) - mean;
        squares += centered * centered;
    }
    return {mean, 1.0f / sqrtf(warp_sum(squares) / dim + eps)};
}

KERNEL layer_norm(const Value* x, const float* weight, const float* bias, Value* y, int rows, int dim, float eps) {
    int row = warp_index();
    if (row >= rows) return;
    x += (size_t)row * dim, y += (size_t)row * dim;
    Moments m = moments(x, dim, eps);
    for (int i = lane(); i < dim; i += WARP) put(&y[i], (wide(x[i]) - m.mean) * m.inverse * weight[i] + bias[i]);
}

// dx = (g - mean(g) - n mean(g n)) / sigma with g = dy weight, n the normalized row; keeps the moments of every row.
KERNEL layer_norm_backward(const Value* x, const float* weight, const Value* dy, Value* dx, float* kept, int rows,
                           int dim, float eps) {
    int row = warp_index();
    if (row >= rows) return;
    x += (size_t)row * dim, dy += (size_t)row * dim, dx += (size_t)row * dim;
    Moments m = moments(x, dim, eps);
    float sum = 0.0f, along = 0.0f;
    for (int i = lane(); i < dim; i += WARP) {
        float g = wide(dy[i]) * weight[i];
        sum += g;
        along += g * (wide(x[i]) - m.mean) * m.inverse;
    }
    float mean = warp_sum(sum) / dim;
    along = warp_sum(along) / dim;
    for (int i = lane(); i < dim; i += WARP) {
        float normalized = (wide(x[i]) - m.mean) * m.inverse;
        put(&dx[i], (wide(dy[i]) * weight[i] - mean - normalized * along) * m.inverse);
    }
    if (lane() == 0) kept[2 * row] = m.mean, kept[2 * row + 1] = m.inverse;
}

// Shares `[parts, 2 dim]` of the gradients of weight and bias; blocks of 32 columns by 8 rows, a part of rows each.
KERNEL layer_norm_shares(const Value* x, const Value* dy, const float* kept, float* shares, int rows, int dim,
                         int part) {
    __shared__ float sums[2][8][WARP];
    int column = blockIdx.x * WARP + threadIdx.x, end = min(rows, part * (int)(blockIdx.y + 1));
    float d_weight = 0.0f, d_bias = 0.0f;
    if (column < dim) {
        for (int row = part * blockIdx.y + threadIdx.y; row < end; row += 8) {
            size_t at = (size_t)row * dim + column;
            float d = wide(dy[at]);
            d_weight += d * (wide(x[at]) - kept[2 * row]) * kept[2 * row + 1];
            d_bias += d;
        }
    }
    sums[0][threadIdx.y][threadIdx.x] = d_weight;
    sums[1][threadIdx.y][threadIdx.x] = d_bias;
    __syncthreads();
    if (threadIdx.y < 2 && column < dim) {
        float total = 0.0f;
        for (int row = 0; row < 8; row++) total += sums[threadIdx.y][row][threadIdx.x];
        shares[((size_t)blockIdx.y * 2 + threadIdx.y) * dim + column] = total;
    }
}
