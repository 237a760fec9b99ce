/* A matrix transposed and scaled, in fp32 on a CPU; onednn.py calls this. */
#include "vectors.h"

/* A block's side: a line of the cache, so that none is read or written twice, however its rows lie in the cache. A task
 * has so many columns that its reads are runs that a processor foresees, and so few that what it writes stays at hand. */
#define SIDE 16
#define WIDE 256
#define TALL 128

static void block(i64 rows, i64 columns, i64 row, i64 column, const float *from, float factor, float *to)
{
    const float *x = from + row * columns + column;
    float *y = to + column * rows + row, lines[SIDE * SIDE];
    i64 tall = rows - row, wide = columns - column;
    if (tall < SIDE || wide < SIDE) {
        for (i64 j = 0; j < wide && j < SIDE; j++)
            for (i64 i = 0; i < tall && i < SIDE; i++)
                y[j * rows + i] = factor * x[i * columns + j];
        return;
    }
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j += LANES)
            store(lines + i * SIDE + j, load(x + i * columns + j) * factor);
    for (int j = 0; j < SIDE; j += 4)
        for (int i = 0; i < SIDE; i += 4)
            transpose_four(lines + i * SIDE + j, SIDE, y + j * rows + i, rows);
}

/* to[columns][rows] = factor times the transpose of from[rows][columns]. */
void turned(i64 rows, i64 columns, const float *from, float factor, float *to, int threads)
{
#pragma omp parallel for collapse(2) num_threads(threads)
    for (i64 left = 0; left < columns; left += WIDE)
        for (i64 top = 0; top < rows; top += TALL)
            for (i64 row = top; row < rows && row < top + TALL; row += SIDE)
                for (i64 column = left; column < columns && column < left + WIDE; column += SIDE)
                    block(rows, columns, row, column, from, factor, to);
}
