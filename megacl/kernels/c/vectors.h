/* Vectors of the widest registers that the compiler was told of, by GCC's vector extensions. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

#define LOG2_E 1.4426950408889634f

typedef int64_t i64;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float half_vec __attribute__((vector_size(2 * LANES)));
typedef float quarter_vec __attribute__((vector_size(LANES)));

#if LANES == 16
static const ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
static const ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

static inline vec load(const float *from)
{
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline void store(float *to, vec v) { memcpy(to, &v, sizeof v); }

/* LANES values, or as many as there are and zeros. */
static inline vec load_some(const float *from, i64 count)
{
    if (count >= LANES)
        return load(from);
    vec v = {0};
    memcpy(&v, from, sizeof(float) * count);
    return v;
}

static inline void store_some(float *to, vec v, i64 count)
{
    if (count >= LANES)
        store(to, v);
    else
        memcpy(to, &v, sizeof(float) * count);
}

static inline vec all(float x) { return x - (vec){0}; }

static inline vec pick(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* As many of v's values as there are, and zeros behind them. */
static inline vec keep_some(vec v, i64 count) { return count >= LANES ? v : pick(LANE < (int32_t)count, v, (vec){0}); }

static inline float sum_of(vec v)
{
    half_vec halves[2];
    memcpy(halves, &v, sizeof v);
    halves[0] += halves[1];
    quarter_vec quarters[2];
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    float sum = 0;
    for (int i = 0; i < LANES / 4; i++)
        sum += quarters[0][i];
    return sum;
}

static inline float max_of(vec v)
{
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int by = LANES / 2; by; by /= 2)
        for (int i = 0; i < by; i++)
            lanes[i] = lanes[i] > lanes[i + by] ? lanes[i] : lanes[i + by];
    return lanes[0];
}

/* 2^x for x < 0.5: 2^n by the exponent's bits, times the Taylor series of 2^f for |f| <= 1/2, whose rest is below 1e-8.
 * Below 2^-64 it is 0: nothing in a sum with 1, nothing times a huge z, and never subnormal times a small factor, which
 * takes a processor a hundred times as long. Of x >= 0.5 it is some number; of what is not a number, that. */
static inline vec exp2_of(vec x)
{
    ivec n = __builtin_convertvector(x - 0.5f, ivec); /* cut off towards 0: the nearest whole number where x < 0.5 */
    vec f = x - __builtin_convertvector(n, vec);
    vec y = all(1.5252733804059840e-5f); /* ln(2)^k / k!, k = 7, 6, ... 0 */
    y = y * f + 1.5403530393381609e-4f;
    y = y * f + 1.3333558146428443e-3f;
    y = y * f + 9.6181291076284772e-3f;
    y = y * f + 5.5504108664821580e-2f;
    y = y * f + 2.4022650695910071e-1f;
    y = y * f + 6.9314718055994531e-1f;
    y = y * f + 1.0f;
    return pick(x < -64.0f, (vec){0}, (vec)((ivec)y + (n << 23)));
}

typedef float four __attribute__((vector_size(16)));
typedef int32_t four_places __attribute__((vector_size(16)));

/* Four values of each of four rows, `stride` apart, into the columns of four others. */
static inline void transpose_four(const float *restrict from, i64 stride, float *restrict to, i64 to_stride)
{
    four x[4];
    for (int i = 0; i < 4; i++)
        memcpy(x + i, from + i * stride, sizeof x[i]);
    four low01 = __builtin_shuffle(x[0], x[1], (four_places){0, 4, 1, 5});
    four low23 = __builtin_shuffle(x[2], x[3], (four_places){0, 4, 1, 5});
    four high01 = __builtin_shuffle(x[0], x[1], (four_places){2, 6, 3, 7});
    four high23 = __builtin_shuffle(x[2], x[3], (four_places){2, 6, 3, 7});
    x[0] = __builtin_shuffle(low01, low23, (four_places){0, 1, 4, 5});
    x[1] = __builtin_shuffle(low01, low23, (four_places){2, 3, 6, 7});
    x[2] = __builtin_shuffle(high01, high23, (four_places){0, 1, 4, 5});
    x[3] = __builtin_shuffle(high01, high23, (four_places){2, 3, 6, 7});
    for (int i = 0; i < 4; i++)
        memcpy(to + i * to_stride, x + i, sizeof x[i]);
}
