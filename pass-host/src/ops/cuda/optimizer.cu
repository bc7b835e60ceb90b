// All tensors of a network in one launch: a block a part of a tensor. `parts[block]` = tensor, first value.
#include "prelude.cuh"

#define PART 16384

struct Gradient {
    const float* values;
    word length;
};

// `shares[block]` = sum of the squares of its part.
KERNEL squares(const Gradient* gradients, const unsigned* parts, double* shares) {
    __shared__ double sums[256];
    Gradient g = gradients[parts[2 * blockIdx.x]];
    word first = (word)parts[2 * blockIdx.x + 1] * PART, end = first + PART < g.length ? first + PART : g.length;
    double sum = 0.0;
    for (word i = first + threadIdx.x; i < end; i += blockDim.x) sum += (double)g.values[i] * g.values[i];
    sums[threadIdx.x] = sum;
    for (int step = blockDim.x / 2; step > 0; step /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    }
    if (threadIdx.x == 0) shares[blockIdx.x] = sums[0];
}

// Norm of every tensor from the shares of its blocks `starts[tensor] .. starts[tensor + 1]`, in order.
KERNEL norms(const double* shares, const unsigned* starts, double* norms, int tensors) {
    int tensor = blockIdx.x * blockDim.x + threadIdx.x;
    if (tensor >= tensors) return;
    double sum = 0.0;
    for (unsigned part = starts[tensor]; part < starts[tensor + 1]; part++) sum += shares[part];
    norms[tensor] = sqrt(sum);
}

// One tensor of an update; without gradient only the teacher moves.
struct Update {
    float* student;
    const float* gradient;
    float *first, *second, *teacher;
    word length;
    float decay, gradient_scale, first_share, beta2, second_share, step_size, root_correction, eps, momentum, student_share;
};

// AdamW in the order of operations of PyTorch, then the moving average.
KERNEL adamw_ema(const Update* updates, const unsigned* parts) {
    Update u = updates[parts[2 * blockIdx.x]];
    word first = (word)parts[2 * blockIdx.x + 1] * PART, end = first + PART < u.length ? first + PART : u.length;
    for (word i = first + threadIdx.x; i < end; i += blockDim.x) {
        float p = u.student[i];
        if (u.gradient) {
            float g = u.gradient[i] * u.gradient_scale, m = u.first[i], v = u.second[i];
            m += u.first_share * (g - m);
            v = v * u.beta2 + u.second_share * g * g;
            p = p * u.decay - u.step_size * (m / (sqrtf(v) / u.root_correction + u.eps));
            u.first[i] = m, u.second[i] = v, u.student[i] = p;
        }
        if (u.teacher) u.teacher[i] = u.teacher[i] * u.momentum + u.student_share * p;
    }
}
