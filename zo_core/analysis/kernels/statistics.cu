// One read of a tensor [rows, channels] for everything that zo_core/analysis/statistics.py keeps.
// Compiled at run time (NVRTC) with ELEMENT: 0 float32, 1 bfloat16, 2 float16; VECTOR: entries a
// load. No headers. A thread owns VECTOR neighbouring channels and walks down the rows; a block
// keeps its histogram in shared memory.

typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS_X 32
#define THREADS_Y 16
#define THREADS (THREADS_X * THREADS_Y)
#define BINS 32768
#define SHIFT 16
#define INFINITE 0x7F800000u
#define TOP 3

#if ELEMENT == 0
typedef u32 element;
#else
typedef unsigned short element;
#endif

struct __align__(VECTOR * sizeof(element)) pack { element value[VECTOR]; };

__device__ __forceinline__ float widen(element raw) {
#if ELEMENT == 0
    return __uint_as_float(raw);
#elif ELEMENT == 1
    return __uint_as_float(((u32)raw) << 16);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(raw));
    return wide;
#endif
}

// A key orders entries: larger magnitude first, then the earlier place; its last bit is the sign of
// the entry. 0 stands for none.
__device__ __forceinline__ u64 key_of(u32 pattern, u64 place, bool negative) {
    return ((u64)(pattern + 1u) << 32) | ((0x7FFFFFFFu - place) << 1) | negative;
}

__device__ __forceinline__ void rank_key(u64 key, u64 best[TOP]) {
    if (key <= best[TOP - 1]) return;
#pragma unroll
    for (int i = 0; i < TOP; i++) {
        if (key > best[i]) { u64 other = best[i]; best[i] = key; key = other; }
    }
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int step = 16; step; step >>= 1) value += __shfl_down_sync(0xFFFFFFFFu, value, step);
    return value;
}

// start: token of the first row. histogram u64 [BINS]; sums double [5]; candidates u64 [blocks, TOP];
// first_nonfinite: smallest token with a NaN or infinity; channel_max (float bits) and
// channel_tokens: [channels], or null.
extern "C" __global__ void __launch_bounds__(THREADS)
statistics(const element* x, int rows, int channels, int start, u64* histogram, double* sums,
           u64* candidates, long long* first_nonfinite, int* channel_max, u64* channel_tokens) {
    extern __shared__ u32 bins[];
    const int thread = threadIdx.y * THREADS_X + threadIdx.x;
    for (int i = thread; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();

    const int channel = (blockIdx.x * THREADS_X + threadIdx.x) * VECTOR;
    double total = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
    u64 best[TOP] = {0, 0, 0};
    float largest[VECTOR];
    u32 features[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) { largest[i] = 0; features[i] = 0; }
    int bad = 0x7FFFFFFF;

    if (channel < channels) {
        for (int row = blockIdx.y * THREADS_Y + threadIdx.y; row < rows;
             row += gridDim.y * THREADS_Y) {
            const u64 place = (u64)row * channels + channel;
            const pack loaded = *reinterpret_cast<const pack*>(x + place);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                const float value = widen(loaded.value[i]);
                const float magnitude = fabsf(value);
                const u32 pattern = __float_as_uint(magnitude);
                atomicAdd(&bins[pattern >> SHIFT], 1u);
                if (pattern >= INFINITE) { bad = min(bad, row); continue; }
                rank_key(key_of(pattern, place + i, value < 0), best);
                const double wide = value, second = wide * wide;
                total += magnitude;
                s1 += wide;
                s2 += second;
                s3 += second * wide;
                s4 += second * second;
                largest[i] = fmaxf(largest[i], magnitude);
                features[i] += magnitude >= 6.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            if (channel_max) atomicMax(channel_max + channel + i, __float_as_int(largest[i]));
            if (channel_tokens && features[i])
                atomicAdd(channel_tokens + channel + i, (u64)features[i]);
        }
    }
    if (bad != 0x7FFFFFFF) atomicMin(first_nonfinite, (long long)start + bad);

    double parts[5] = {total, s1, s2, s3, s4};
#pragma unroll
    for (int i = 0; i < 5; i++) {
        const double sum = warp_sum(parts[i]);
        if ((thread & 31) == 0) atomicAdd(sums + i, sum);
    }
    __syncthreads();
    for (int i = thread; i < BINS; i += THREADS)
        if (bins[i]) atomicAdd(histogram + i, (u64)bins[i]);
    __syncthreads();

    // The histogram is written: its shared memory now holds every thread's best keys.
    u64* keys = reinterpret_cast<u64*>(bins);
#pragma unroll
    for (int i = 0; i < TOP; i++) keys[thread * TOP + i] = best[i];
    __syncthreads();
    if (thread < 32) {
        for (int other = thread + 32; other < THREADS; other += 32)
            for (int i = 0; i < TOP; i++) rank_key(keys[other * TOP + i], best);
    }
    __syncthreads();
    if (thread < 32)
        for (int i = 0; i < TOP; i++) keys[thread * TOP + i] = best[i];
    __syncthreads();
    if (thread == 0) {
        for (int other = 1; other < 32; other++)
            for (int i = 0; i < TOP; i++) rank_key(keys[other * TOP + i], best);
        for (int i = 0; i < TOP; i++)
            candidates[((u64)blockIdx.y * gridDim.x + blockIdx.x) * TOP + i] = best[i];
    }
}
