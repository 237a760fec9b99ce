/* The cross-entropy of rows of logits, and its gradient over them, in fp32 on a CPU; c_cross_entropy.py calls this. */
#include "vectors.h"

/* Vectors taken at a time: sums that wait for none of the others. */
#define AT_A_TIME 4

static float highest_of(const float *x, i64 width)
{
    vec highest[AT_A_TIME];
    for (int k = 0; k < AT_A_TIME; k++)
        highest[k] = all(-INFINITY);
    i64 i = 0;
    for (; i + AT_A_TIME * LANES <= width; i += AT_A_TIME * LANES)
        for (int k = 0; k < AT_A_TIME; k++) {
            vec here = load(x + i + k * LANES);
            highest[k] = pick(here > highest[k], here, highest[k]);
        }
    for (int k = 1; k < AT_A_TIME; k++)
        highest[0] = pick(highest[k] > highest[0], highest[k], highest[0]);
    float found = max_of(highest[0]);
    for (; i < width; i++)
        found = x[i] > found ? x[i] : found;
    return found;
}

/* The sum of e^(x - highest); its terms go to `to`, which may be x, unless it is NULL. */
static inline __attribute__((always_inline)) float exponentials(const float *x, i64 width, float highest, float *to)
{
    vec sums[AT_A_TIME] = {{0}};
    i64 i = 0;
    for (; i + AT_A_TIME * LANES <= width; i += AT_A_TIME * LANES)
        for (int k = 0; k < AT_A_TIME; k++) {
            vec y = exp2_of((load(x + i + k * LANES) - highest) * LOG2_E);
            sums[k] += y;
            if (to)
                store(to + i + k * LANES, y);
        }
    for (; i < width; i += LANES) {
        vec y = keep_some(exp2_of((load_some(x + i, width - i) - highest) * LOG2_E), width - i);
        sums[0] += y;
        if (to)
            store_some(to + i, y, width - i);
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* logits: [rows][width]; targets: [rows], of which those of `ignored` are. nats and squares, [rows], become
 * -log softmax(logits)[target] and (log Z)^2, or 0 where ignored; where `differentiate`, logits become scale times the
 * gradient of nats + z_loss squares: scale (softmax (1 + 2 z_loss log Z) - one-hot), or 0.
 * Returns whether a target is outside of the row. */
int cross_entropy(i64 rows, i64 width, float *logits, const i64 *targets, i64 ignored, float z_loss, float scale,
                  int differentiate, float *nats, float *squares, int threads)
{
    int outside = 0;
#pragma omp parallel for num_threads(threads) reduction(| : outside)
    for (i64 row = 0; row < rows; row++) {
        float *x = logits + row * width;
        i64 target = targets[row];
        if (target == ignored) {
            nats[row] = squares[row] = 0;
            if (differentiate)
                memset(x, 0, sizeof(float) * width);
            continue;
        }
        if (target < 0 || target >= width) {
            outside = 1;
            continue;
        }
        float highest = highest_of(x, width), below = highest - x[target];
        float sum = differentiate ? exponentials(x, width, highest, x) : exponentials(x, width, highest, NULL);
        float log_z = logf(sum) + highest;
        nats[row] = logf(sum) + below;
        squares[row] = log_z * log_z;
        if (!differentiate)
            continue;
        float times = scale / sum;
        if (z_loss != 0)
            times *= 1 + 2 * z_loss * log_z;
        i64 i = 0;
        for (; i + LANES <= width; i += LANES)
            store(x + i, load(x + i) * times);
        for (; i < width; i++)
            x[i] *= times;
        x[target] -= scale;
    }
    return outside;
}
