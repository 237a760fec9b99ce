/* GELU of x + bias, by erf or by tanh, forward and backward, in fp32 on a CPU; c_gelu.py calls this.
 *
 * x: [rows][width], bias: [width]. By erf: 1 - erf(u) = (a1 t + ... + a5 t^5) exp(-u^2), t = 1 / (1 + p u), u >= 0, within
 * 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26). With u = |z| / sqrt(2) the exponential is that of the normal density, too.
 */
#include "vectors.h"

typedef struct {
    vec value, slope;
} point;

/* The distribution function of the normal distribution times z, and its derivative. */
static inline point by_erf(vec z)
{
    vec size = pick(z < 0.0f, -z, z);
    vec t = 1.0f / (1.0f + size * 0.2316418882f); /* p / sqrt(2) */
    vec tail = all(0.5307027145f); /* a5 / 2, ... a1 / 2 */
    tail = tail * t - 0.7265760135f;
    tail = tail * t + 0.7107068705f;
    tail = tail * t - 0.1422483680f;
    tail = tail * t + 0.1274147960f;
    vec density = exp2_of(z * z * (-0.5f * LOG2_E));
    tail *= t * density;
    vec below = pick(z < 0.0f, tail, 1.0f - tail);
    return (point){z * below, below + z * density * 0.3989422804f}; /* 1 / sqrt(2 pi) */
}

/* z s(2 v), s the logistic function, v = sqrt(2 / pi) (z + 0.044715 z^3); s' = s (1 - s), which is 0 where z is cut. */
static inline point by_tanh(vec z)
{
    vec cut = pick(z > 32.0f, all(32.0f), pick(z < -32.0f, all(-32.0f), z));
    vec v = 0.7978845608f * (cut + 0.044715f * cut * cut * cut);
    vec low = exp2_of(pick(v < 0.0f, v, -v) * (2 * LOG2_E)), one = 1.0f / (1.0f + low);
    vec s = pick(v < 0.0f, low * one, one), rest = pick(v < 0.0f, one, low * one);
    return (point){z * s, s + cut * s * rest * (2 * 0.7978845608f) * (1.0f + 3 * 0.044715f * cut * cut)};
}

static inline __attribute__((always_inline)) point gelu(vec z, int tanh) { return tanh ? by_tanh(z) : by_erf(z); }

static inline __attribute__((always_inline)) void forward(i64 width, const float *x, const float *bias, float *y,
                                                          int tanh)
{
    for (i64 i = 0; i < width; i += LANES)
        store_some(y + i, gelu(load_some(x + i, width - i) + load_some(bias + i, width - i), tanh).value, width - i);
}

void gelu_forward(i64 rows, i64 width, const float *x, const float *bias, float *y, int tanh, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (i64 row = 0; row < rows; row++)
        if (tanh)
            forward(width, x + row * width, bias, y + row * width, 1);
        else
            forward(width, x + row * width, bias, y + row * width, 0);
}

static inline __attribute__((always_inline)) void backward(i64 width, const float *x, const float *bias,
                                                           const float *dy, float *dx, float *sums, int tanh)
{
    for (i64 i = 0; i < width; i += LANES) {
        i64 left = width - i;
        vec d = load_some(dy + i, left) * gelu(load_some(x + i, left) + load_some(bias + i, left), tanh).slope;
        store_some(dx + i, d, left);
        store_some(sums + i, load_some(sums + i, left) + d, left);
    }
}

/* sums: [rows / rows_of_task, rounded up][width], zeros, where each task leaves the sum of its rows of dx. */
void gelu_backward(i64 rows, i64 width, const float *x, const float *bias, const float *dy, float *dx,
                   float *sums, i64 rows_of_task, int tanh, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (i64 task = 0; task < (rows + rows_of_task - 1) / rows_of_task; task++)
        for (i64 row = task * rows_of_task; row < rows && row < (task + 1) * rows_of_task; row++)
            if (tanh)
                backward(width, x + row * width, bias, dy + row * width, dx + row * width, sums + task * width, 1);
            else
                backward(width, x + row * width, bias, dy + row * width, dx + row * width, sums + task * width, 0);
}
