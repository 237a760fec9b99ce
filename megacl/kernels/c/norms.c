/* LayerNorm and RMSNorm of x + residual, forward and backward, in fp32 on a CPU; c_norms.py calls this.
 *
 * A row is normed while it lies in the cache. statistics: [rows][2], 1 / deviation and mean, or [rows][1] of an RMSNorm,
 * whose bias is NULL.
 */
#include "vectors.h"

/* The sum of a row's values, or of their squares about `about`: four sums side by side, since each waits for its last
 * addition. */
static inline __attribute__((always_inline)) float sum_over(i64 width, const float *row, int squared, float about)
{
    vec sums[4] = {0};
    i64 i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            vec v = load(row + i + k * LANES);
            sums[k] += squared ? (v - about) * (v - about) : v;
        }
    for (; i < width; i += LANES) {
        vec v = load_some(row + i, width - i);
        sums[0] += keep_some(squared ? (v - about) * (v - about) : v, width - i);
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* residual: or NULL; then the total is x, and is not written. */
static inline __attribute__((always_inline)) void forward(i64 width, const float *x, const float *residual,
                                                          const float *weight, const float *bias, float eps,
                                                          float *total, float *y, float *statistics, int centred)
{
    const float *from = x;
    if (residual) {
        for (i64 i = 0; i < width; i += LANES)
            store_some(total + i, load_some(x + i, width - i) + load_some(residual + i, width - i), width - i);
        from = total;
    }
    /* The mean comes before the squares: of what is far from 0 little would be left. */
    float mean = centred ? sum_over(width, from, 0, 0) / width : 0;
    float scale = 1 / sqrtf(sum_over(width, from, 1, mean) / width + eps);
    for (i64 i = 0; i < width; i += LANES) {
        vec v = (load_some(from + i, width - i) - mean) * scale * load_some(weight + i, width - i);
        store_some(y + i, centred ? v + load_some(bias + i, width - i) : v, width - i);
    }
    statistics[0] = scale;
    if (centred)
        statistics[1] = mean;
}

void norm_forward(i64 rows, i64 width, const float *x, const float *residual, const float *weight, const float *bias,
                  float eps, float *total, float *y, float *statistics, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (i64 row = 0; row < rows; row++) {
        i64 at = row * width;
        if (bias)
            forward(width, x + at, residual ? residual + at : NULL, weight, bias, eps, total + at, y + at,
                    statistics + 2 * row, 1);
        else
            forward(width, x + at, residual ? residual + at : NULL, weight, NULL, eps, total + at, y + at,
                    statistics + row, 0);
    }
}

/* With n = (total - mean) scale and g = dy weight: dx = (g - mean(g) - n mean(g n)) scale, but for an RMSNorm without
 * mean(g); then dtotal is added, if it is not NULL. sums: [rows / rows_of_task, rounded up][2 or 1][width], zeros, where
 * each task leaves what its rows are of the gradients of weight and bias. */
void norm_backward(i64 rows, i64 width, const float *dy, const float *dtotal, const float *total, const float *weight,
                   const float *statistics, int centred, float *dx, float *sums, i64 rows_of_task, int threads)
{
    i64 kept = centred ? 2 : 1;
#pragma omp parallel for num_threads(threads)
    for (i64 task = 0; task < (rows + rows_of_task - 1) / rows_of_task; task++) {
        float *dweight = sums + task * kept * width, *dbias = dweight + width;
        for (i64 row = task * rows_of_task; row < rows && row < (task + 1) * rows_of_task; row++) {
            const float *from = total + row * width, *coming = dy + row * width;
            float scale = statistics[row * kept], mean = centred ? statistics[row * kept + 1] : 0;
            vec of_g = {0}, of_gn = {0};
            for (i64 i = 0; i < width; i += LANES) {
                i64 left = width - i;
                vec d = load_some(coming + i, left), n = (load_some(from + i, left) - mean) * scale;
                vec g = d * load_some(weight + i, left);
                of_g += g;
                of_gn += g * n; /* g is 0 where nothing is left */
                store_some(dweight + i, load_some(dweight + i, left) + d * n, left);
                if (centred)
                    store_some(dbias + i, load_some(dbias + i, left) + d, left);
            }
            float mean_g = centred ? sum_of(of_g) / width : 0, mean_gn = sum_of(of_gn) / width;
            for (i64 i = 0; i < width; i += LANES) {
                i64 left = width - i;
                vec n = (load_some(from + i, left) - mean) * scale;
                vec d = (load_some(coming + i, left) * load_some(weight + i, left) - mean_g - n * mean_gn) * scale;
                store_some(dx + row * width + i, dtotal ? d + load_some(dtotal + row * width + i, left) : d, left);
            }
        }
    }
}
