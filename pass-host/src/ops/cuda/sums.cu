// Sums over the rows of a matrix: shares of parts of rows, then the shares in order. No atomics, so always the same bits.
#include "prelude.cuh"

// Blocks of 32 columns by 8 rows; `shares`: `[parts, columns]`.
KERNEL column_shares(const Value* values, float* shares, int rows, int columns, int part) {
    __shared__ float sums[8][WARP];
    int column = blockIdx.x * WARP + threadIdx.x, end = min(rows, part * (int)(blockIdx.y + 1));
    float sum = 0.0f;
    if (column < columns) {
        for (int row = part * blockIdx.y + threadIdx.y; row < end; row += 8) sum += wide(values[(size_t)row * columns + column]);
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
        float total = 0.0f;
        for (int row = 0; row < 8; row++) total += sums[row][threadIdx.x];
        shares[(size_t)blockIdx.y * columns + column] = total;
    }
}

// The same blocks, one part for all: the shares in order, 8 partial sums a column.
KERNEL add_shares(const float* shares, Value* total, int parts, int columns, float scale) {
    __shared__ float sums[8][WARP];
    int column = blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (column < columns) {
        for (int part = threadIdx.y; part < parts; part += 8) sum += shares[(size_t)part * columns + column];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
        float all = 0.0f;
        for (int row = 0; row < 8; row++) all += sums[row][threadIdx.x];
        put(&total[column], all * scale);
    }
}
