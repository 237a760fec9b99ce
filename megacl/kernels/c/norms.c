/* LayerNorm and RMSNorm of x + residual, forward and backward, in fp32 on a CPU; c_norms.py calls this.
 *
 * A row is normed while it lies in the cache. statistics: [rows][2], 1 / deviation and mean, or [rows][1] of an RMSNorm,
 * whose bias is NULL.
 */
#include "vectors.h"

/* Zeros behind the values that are left. */
static inline vec keep_some(vec v, i64 left) { return left >= LANES ? v : pick(LANE < (int32_t)left, v, (vec){0}); }

/* residual: or NULL; then the total is x, and is not written. */
void norm_forward(i64 rows, i64 width, const float *x, const float *residual, const float *weight, const float *bias,
                  float eps, float *total, float *y, float *statistics, int threads)
{
    i64 kept = bias ? 2 : 1;
#pragma omp parallel for num_threads(threads)
    for (i64 row = 0; row < rows; row++) {
        const float *from = x + row * width;
        float *to = y + row * width, mean = 0;
        vec sum = {0}, squares = {0};
        if (residual) {
            float *both = total + row * width;
            for (i64 i = 0; i < width; i += LANES) {
                vec v = load_some(from + i, width - i) + load_some(residual + row * width + i, width - i);
                store_some(both + i, v, width - i);
                sum += v;
                squares += v * v;
            }
            from = both;
        } else
            for (i64 i = 0; i < width; i += LANES) {
                vec v = load_some(from + i, width - i);
                sum += v;
                squares += v * v;
            }
        if (bias) { /* what is far from 0 has little left of its squares */
            mean = sum_of(sum) / width;
            squares = (vec){0};
            for (i64 i = 0; i < width; i += LANES) {
                vec v = keep_some(load_some(from + i, width - i) - mean, width - i);
                squares += v * v;
            }
        }
        float scale = 1 / sqrtf(sum_of(squares) / width + eps);
        for (i64 i = 0; i < width; i += LANES) {
            vec v = (load_some(from + i, width - i) - mean) * scale * load_some(weight + i, width - i);
            store_some(to + i, bias ? v + load_some(bias + i, width - i) : v, width - i);
        }
        statistics[row * kept] = scale;
        if (bias)
            statistics[row * kept + 1] = mean;
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
