// Crops from the pixels of whole images, byte for byte as `data/augment` makes them on the processor: whole numbers
// wherever it uses them, and sums and products of fractions that are never fused.
#include "prelude.cuh"

// The record of a crop, as `data/augment/device_crops.rs` writes it. Places are bytes from the first of all.
struct Crop {
    word source, horizontal, vertical, middle;
    unsigned row, column, channel, columns, rows;
    unsigned vertical_first, flip, gray, solarize;
    unsigned reach, center, edge;
    unsigned jitter[4], factors[4];
};

// Output pixel of an axis: its first input pixel, the place and the number of its weights, which follow all of these.
struct Axis {
    unsigned first, place, count;
};

typedef unsigned char byte;

#define FRACTION_BITS 22
#define SOLARIZE_THRESHOLD 128

static __device__ inline byte weighted(const byte* bytes, word axis, int size, int at, const byte* from, size_t step) {
    const Axis* axes = (const Axis*)(bytes + axis);
    const int* weights = (const int*)(axes + size) + axes[at].place;
    from += axes[at].first * step;
    int sum = 1 << (FRACTION_BITS - 1);
    for (unsigned i = 0; i < axes[at].count; i++) sum += weights[i] * from[i * step];
    sum >>= FRACTION_BITS;
    return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

// Every crop has `parts` blocks: the number of this one's crop, of its thread among those of the crop, and of all these.
struct Share {
    int crop, thread, threads;
};

static __device__ inline Share share(int parts) {
    return {(int)blockIdx.x / parts, (int)(blockIdx.x % parts * blockDim.x + threadIdx.x), (int)(parts * blockDim.x)};
}

// The first pass of the resampling: `[3, size, columns]` if rows are weighed first, else `[3, rows, size]`.
KERNEL resize_first(const byte* bytes, word first, byte* middle, word origin, int size, int parts) {
    Share own = share(parts);
    const Crop& crop = ((const Crop*)bytes)[first + own.crop];
    int height = crop.vertical_first ? size : crop.rows, width = crop.vertical_first ? crop.columns : size;
    middle += crop.middle - origin;
    for (int i = own.thread; i < 3 * height * width; i += own.threads) {
        int x = i % width, y = i / width % height, channel = i / width / height;
        const byte* from = bytes + crop.source + (size_t)channel * crop.channel;
        middle[i] = crop.vertical_first
                        ? weighted(bytes, crop.vertical, size, y, from + (size_t)x * crop.column, crop.row)
                        : weighted(bytes, crop.horizontal, size, x, from + (size_t)y * crop.row, crop.column);
    }
}

// The second pass and the flip: `[crops, 3, size, size]`.
KERNEL resize_second(const byte* bytes, word first, const byte* middle, word origin, byte* planes, int size, int parts) {
    Share own = share(parts);
    const Crop& crop = ((const Crop*)bytes)[first + own.crop];
    int height = crop.vertical_first ? size : crop.rows, width = crop.vertical_first ? crop.columns : size;
    middle += crop.middle - origin, planes += (size_t)own.crop * 3 * size * size;
    for (int i = own.thread; i < 3 * size * size; i += own.threads) {
        int x = i % size, y = i / size % size, channel = i / size / size;
        if (crop.flip) x = size - 1 - x;
        const byte* from = middle + (size_t)channel * height * width;
        planes[i] = crop.vertical_first ? weighted(bytes, crop.horizontal, size, x, from + (size_t)y * width, 1)
                                        : weighted(bytes, crop.vertical, size, y, from + x, width);
    }
}

struct Color {
    byte red, green, blue;
};

static __device__ inline byte luma(Color c) {
    return (c.red * 19595u + c.green * 38470u + c.blue * 7471u + 0x8000u) >> 16;
}

static __device__ inline byte blend(byte from, byte to, float factor) {
    float mixed = __fadd_rn((float)from, __fmul_rn(factor, (float)((int)to - (int)from)));
    return (byte)(int)floorf(fminf(fmaxf(mixed, 0.0f), 255.0f));
}

static __device__ inline Color blend(Color from, Color to, float factor) {
    return {blend(from.red, to.red, factor), blend(from.green, to.green, factor), blend(from.blue, to.blue, factor)};
}

// Through 8-bit HSV; hue, saturation and value are bytes.
static __device__ Color shifted_hue(Color c, byte shift) {
    int red = c.red, green = c.green, blue = c.blue;
    int high = red > green ? red : green, low = red < green ? red : green;
    high = high > blue ? high : blue, low = low < blue ? low : blue;
    int hue = 0, saturation = 0;
    if (high != low) {
        float range = (float)(high - low);
        float from_red = (high - red) / range, from_green = (high - green) / range, from_blue = (high - blue) / range;
        float sector = red == high     ? from_blue - from_green
                       : green == high ? (float)(2.0 + (double)from_red - (double)from_blue)
                                       : (float)(4.0 + (double)from_green - (double)from_red);
        double turn = (double)sector / 6.0 + 1.0;
        float rest = (float)(turn >= 1.0 ? turn - 1.0 : turn);
        hue = (int)floor(__dmul_rn((double)rest, 255.0));
        saturation = (int)floor(__dmul_rn((double)(range / (float)high), 255.0));
    }
    hue = (byte)(hue + shift);
    double position = __dmul_rn((double)hue, 6.0) / 255.0, whole = floor(position);
    float fraction = (float)(position - whole), strength = (float)((double)saturation / 255.0);
    double level = high;
    auto round = [level](double part) { return (byte)(int)floor(__dadd_rn(__dmul_rn(level, part), 0.5)); };
    byte v = high, p = round(1.0 - (double)strength), q = round(1.0 - (double)__fmul_rn(strength, fraction));
    byte t = round(__dadd_rn(1.0, -__dmul_rn((double)strength, 1.0 - (double)fraction)));
    switch ((int)whole) {
        case 1: return {q, v, p};
        case 2: return {p, v, t};
        case 3: return {p, q, v};
        case 4: return {t, p, v};
        case 5: return {v, p, q};
        default: return {v, t, p};
    }
}

// Sum over a one-dimensional block of at most 1024 threads, in every thread.
static __device__ inline word block_total(word value) {
    __shared__ word shares[WARP];
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
    if (lane() == 0) shares[threadIdx.x / WARP] = value;
    __syncthreads();
    word total = 0;
    for (int warp = 0; warp < (int)(blockDim.x / WARP); warp++) total += shares[warp];
    __syncthreads();
    return total;
}

// Color jitter and gray; one block a crop, every thread the same pixels throughout.
KERNEL colors(const byte* bytes, word first, byte* planes, int size) {
    const Crop& crop = ((const Crop*)bytes)[first + blockIdx.x];
    int area = size * size, threads = blockDim.x;
    byte* red = planes + (size_t)blockIdx.x * 3 * area;
    byte *green = red + area, *blue = green + area;
    auto at = [=](int i) { return Color{red[i], green[i], blue[i]}; };
    auto set = [=](int i, Color c) { red[i] = c.red, green[i] = c.green, blue[i] = c.blue; };
    for (int operation = 0; operation < 4; operation++) {
        unsigned bits = crop.factors[operation];
        float factor;
        memcpy(&factor, &bits, sizeof factor);
        switch (crop.jitter[operation]) {
            case 1:
                for (int i = threadIdx.x; i < area; i += threads) set(i, blend(Color{0, 0, 0}, at(i), factor));
                break;
            case 2: {
                word sum = 0;
                for (int i = threadIdx.x; i < area; i += threads) sum += luma(at(i));
                byte mean = (byte)(int)((double)block_total(sum) / (double)area + 0.5);
                for (int i = threadIdx.x; i < area; i += threads) set(i, blend(Color{mean, mean, mean}, at(i), factor));
                break;
            }
            case 3:
                for (int i = threadIdx.x; i < area; i += threads) {
                    byte gray = luma(at(i));
                    set(i, blend(Color{gray, gray, gray}, at(i), factor));
                }
                break;
            case 4:
                for (int i = threadIdx.x; i < area; i += threads) set(i, shifted_hue(at(i), (byte)bits));
                break;
        }
    }
    if (!crop.gray) return;
    for (int i = threadIdx.x; i < area; i += threads) {
        byte gray = luma(at(i));
        set(i, Color{gray, gray, gray});
    }
}

// One box blur along rows or columns, where the crop is blurred at all; the outermost pixels repeat.
KERNEL box_blur(const byte* bytes, word first, const byte* from, byte* to, int size, int along_columns, int parts) {
    Share own = share(parts);
    const Crop& crop = ((const Crop*)bytes)[first + own.crop];
    if (crop.center == 0) return;
    int reach = crop.reach, last = size - 1, step = along_columns ? size : 1;
    from += (size_t)own.crop * 3 * size * size, to += (size_t)own.crop * 3 * size * size;
    for (int i = own.thread; i < 3 * size * size; i += own.threads) {
        int place = along_columns ? i / size % size : i % size;
        const byte* line = from + i - place * step;
        auto at = [=](int place) { return (unsigned)line[(place < 0 ? 0 : place > last ? last : place) * step]; };
        unsigned inner = 0, ends = at(place - reach - 1) + at(place + reach + 1);
        for (int offset = -reach; offset <= reach; offset++) inner += at(place + offset);
        to[i] = (inner * crop.center + ends * crop.edge + (1u << 23)) >> 24;
    }
}

// Solarization and `(x / 255 - mean) / deviation` per channel, to rows `start..` of the result.
KERNEL finish(const byte* bytes, word first, const byte* planes, Value* out, word start, int size, int parts, float mean_red,
              float mean_green, float mean_blue, float deviation_red, float deviation_green, float deviation_blue) {
    Share own = share(parts);
    const Crop& crop = ((const Crop*)bytes)[first + own.crop];
    int area = size * size;
    planes += (size_t)own.crop * 3 * area, out += (start + own.crop) * 3 * area;
    for (int i = own.thread; i < 3 * area; i += own.threads) {
        byte value = planes[i];
        if (crop.solarize && value >= SOLARIZE_THRESHOLD) value = 255 - value;
        float mean = i < area ? mean_red : i < 2 * area ? mean_green : mean_blue;
        float deviation = i < area ? deviation_red : i < 2 * area ? deviation_green : deviation_blue;
        put(&out[i], ((float)value / 255.0f - mean) / deviation);
    }
}
