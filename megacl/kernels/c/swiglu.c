/* silu(gate) * up, forward and backward, in fp32 on a CPU; c_swiglu.py calls this.
 *
 * gate_up: [rows][2 * width], the gate first. silu(g) = g s, s the logistic function, and silu' = s + g s (1 - s).
 */
#include "vectors.h"

typedef struct {
    vec value, slope;
} point;

/* Both 1 / (1 + exp(-|g|)) and what is left of 1 are free of cancellation, whichever is s. */
static inline point silu(vec g)
{
    vec low = exp2_of(pick(g < 0.0f, g, -g) * LOG2_E), one = 1.0f / (1.0f + low);
    vec s = pick(g < 0.0f, low * one, one), rest = pick(g < 0.0f, one, low * one);
    return (point){g * s, s + g * s * rest};
}

void swiglu_forward(i64 rows, i64 width, const float *gate_up, float *y, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (i64 row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width;
        for (i64 i = 0; i < width; i += LANES) {
            i64 left = width - i;
            store_some(y + row * width + i, silu(load_some(gate + i, left)).value * load_some(up + i, left), left);
        }
    }
}

/* dgate_up: as gate_up. */
void swiglu_backward(i64 rows, i64 width, const float *dy, const float *gate_up, float *dgate_up, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (i64 row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width;
        float *dgate = dgate_up + row * 2 * width, *dup = dgate + width;
        for (i64 i = 0; i < width; i += LANES) {
            i64 left = width - i;
            point at = silu(load_some(gate + i, left));
            vec d = load_some(dy + row * width + i, left);
            store_some(dgate + i, d * load_some(up + i, left) * at.slope, left);
            store_some(dup + i, d * at.value, left);
        }
    }
}
