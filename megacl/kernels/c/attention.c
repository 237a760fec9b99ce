/* Causal attention inside documents, with rotary position, forward and backward, in fp32 on a CPU.
 *
 * c_attention.py calls this; what the functions compute is reference.rotary_attention. A task is a
 * document and a key/value head; it packs that head's keys and values once and then takes BLOCK queries at a time, whose
 * scores stay in the cache. Where there are fewer of these than threads, each is shared out among several tasks by its
 * blocks. Tasks share no sums, so the result is the same for any number of threads.
 *
 * Sizes: width is a head's, padded to W; length is a document's, padded to L; a packed matrix has zeros there.
 */
#include "vectors.h"

/* A tile of a product is MR rows by NR columns, held in MR x 2 registers. */
#define MR (LANES / 2)
#define NR (2 * LANES)
#define BLOCK 64

/* Rows of a head lie a token's width apart, which is nothing that a processor foresees: they are asked for so many rows
 * before they are needed. */
#define AHEAD 8

/* c[MR][NR] = or += the sum over k of a[r a_row + k a_k] b[k NR + column]. */
static inline __attribute__((always_inline)) void tile(i64 depth, const float *a, i64 a_row, i64 a_k, const float *b,
                                                       float *c, i64 c_row, int add)
{
    vec sum[MR][2];
    for (int r = 0; r < MR; r++)
        for (int j = 0; j < 2; j++)
            sum[r][j] = add ? load(c + r * c_row + j * LANES) : (vec){0};
    for (i64 k = 0; k < depth; k++) {
        vec b0 = load(b + k * NR), b1 = load(b + k * NR + LANES);
        for (int r = 0; r < MR; r++) {
            vec one = all(a[r * a_row + k * a_k]);
            sum[r][0] += one * b0;
            sum[r][1] += one * b1;
        }
    }
    for (int r = 0; r < MR; r++)
        for (int j = 0; j < 2; j++)
            store(c + r * c_row + j * LANES, sum[r][j]);
}

/* A row of a head, to be read soon; one behind the last is asked for in vain. */
static inline void fetch(const float *x, i64 width)
{
    for (i64 e = 0; e < width; e += 16)
        __builtin_prefetch(x + e);
}

static inline void fetch_to_write(const float *x, i64 width)
{
    for (i64 e = 0; e < width; e += 16)
        __builtin_prefetch(x + e, 1);
}

/* Rotary tables, [places][half]: cosine and sine of the angles by which a head's first 2 half elements are turned. */
typedef struct {
    const float *cos, *sin;
    i64 half;
} tables;

/* rows of x, `factor` times, into to[padded_rows][W] with zeros around; where `turn`, each turned by its angles. */
static void gather(const float *restrict x, i64 stride, i64 rows, i64 padded_rows, i64 width, i64 W,
                   const tables *turn, i64 first, float factor, float *restrict to)
{
    i64 half = turn ? turn->half : 0;
    for (i64 t = 0; t < rows; t++, x += stride, to += W) {
        fetch(x + AHEAD * stride, width);
        for (i64 e = 2 * half; e < width; e++)
            to[e] = factor * x[e];
        for (i64 e = width; e < W; e++)
            to[e] = 0;
        if (!half)
            continue;
        const float *restrict cos = turn->cos + (first + t) * half, *restrict sin = turn->sin + (first + t) * half;
        for (i64 r = 0; r < half; r++) {
            to[r] = factor * (x[r] * cos[r] - x[half + r] * sin[r]);
            to[half + r] = factor * (x[half + r] * cos[r] + x[r] * sin[r]);
        }
    }
    memset(to, 0, sizeof(float) * (padded_rows - rows) * W);
}

/* What gather did not pad, `factor` times and turned back: the gradient of what it gathered. */
static void scatter(const float *restrict from, i64 rows, i64 width, i64 W, const tables *turn, i64 first,
                    float factor, float *restrict x, i64 stride)
{
    i64 half = turn ? turn->half : 0;
    for (i64 t = 0; t < rows; t++, x += stride, from += W) {
        fetch_to_write(x + AHEAD * stride, width);
        for (i64 e = 2 * half; e < width; e++)
            x[e] = factor * from[e];
        if (!half)
            continue;
        const float *restrict cos = turn->cos + (first + t) * half, *restrict sin = turn->sin + (first + t) * half;
        for (i64 r = 0; r < half; r++) {
            x[r] = factor * (from[r] * cos[r] + from[half + r] * sin[r]);
            x[half + r] = factor * (from[half + r] * cos[r] - from[r] * sin[r]);
        }
    }
}

/* from[rows][W] into the panels that tile reads as b, to[W / NR][rows][NR]. */
static void pack(const float *restrict from, i64 rows, i64 W, float *restrict to)
{
    for (i64 e = 0; e < W; e += NR)
        for (i64 t = 0; t < rows; t++, to += NR) {
            store(to, load(from + t * W + e));
            store(to + LANES, load(from + t * W + e + LANES));
        }
}

/* The same of the transposed matrix, to[rows / NR][W][NR]. */
static void pack_transposed(const float *restrict from, i64 rows, i64 W, float *restrict to)
{
    for (i64 t = 0; t < rows; t += 4)
        for (i64 e = 0; e < W; e += 4)
            transpose_four(from + t * W + e, W, to + t / NR * NR * W + e * NR + t % NR, NR);
}

static inline i64 up(i64 n, i64 by) { return (n + by - 1) / by * by; }

/* What both functions are told. qkv: [tokens][heads + 2 kv_heads][width], the queries, keys and values of each token;
 * bounds: the first token of each document, and the number of tokens. mixed and log_sum: [tokens][heads][width] and
 * [tokens][heads], the second log2 of the sum of exp(score) over what a query sees. The tables have a row for each place
 * in a document (by_place), or for each token. Where memory is short, nothing is computed and 1 returned. */
typedef struct {
    i64 documents, heads, kv_heads, width;
    const int32_t *bounds;
    float scale;
    const float *qkv, *cos, *sin;
    i64 half;
    int by_place, threads;
} call;

static i64 longest_of(const call *c)
{
    i64 longest = 0;
    for (i64 d = 0; d < c->documents; d++)
        if (c->bounds[d + 1] - c->bounds[d] > longest)
            longest = c->bounds[d + 1] - c->bounds[d];
    return longest;
}

/* Among how many tasks each of so many key/value heads is shared out, so that there are as many as threads, or fewer by
 * less than one a head; 1 where a second one would wait for a thread, or there is no head. */
static i64 shares_of(i64 kv_heads, i64 threads)
{
    return kv_heads > 0 && 2 * kv_heads <= threads ? threads / kv_heads : 1;
}

static i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* The next `floats` of a thread's memory, at a whole line of the cache. */
static float *take(float **room, i64 floats)
{
    float *taken = *room;
    *room += up(floats, 16);
    return taken;
}

/* A row of scores, of which a query sees the first `seen`: its softmax, but for the division by the sum, which is
 * returned, with zeros behind it as far as a tile reads; *top is the highest score. */
static float exponentials(float *row, i64 seen, i64 read, float *top)
{
    vec highest = all(-INFINITY), sum = {0};
    for (i64 j = 0; j < seen; j += LANES) {
        vec x = load(row + j);
        if (j + LANES > seen)
            x = pick(LANE < (int32_t)(seen - j), x, all(-INFINITY));
        highest = pick(x > highest, x, highest);
    }
    *top = max_of(highest);
    for (i64 j = 0; j < read; j += LANES) {
        vec x = keep_some(exp2_of(load(row + j) - *top), seen - j);
        sum += x;
        store(row + j, x);
    }
    return sum_of(sum);
}

int attention_forward(const call *c, float *mixed, float *log_sum)
{
    i64 width = c->width, W = up(width, NR), L = up(longest_of(c), BLOCK), scores = L + LANES;
    i64 group = c->heads / c->kv_heads, token = (c->heads + 2 * c->kv_heads) * width, out = c->heads * width;
    i64 kv_heads = c->documents * c->kv_heads, shares = shares_of(kv_heads, c->threads);
    size_t bytes = sizeof(float) * (3 * L * W + 2 * BLOCK * W + BLOCK * scores);
    int failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
    {
        float *memory = aligned_alloc(64, up(bytes, 64)), *room = memory;
        failed = !memory;
        float *rows = take(&room, L * W), *keys_t = take(&room, L * W), *values = take(&room, L * W);
        float *q = take(&room, BLOCK * W), *y = take(&room, BLOCK * W), *s = take(&room, BLOCK * scores);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < kv_heads * shares; task++) {
            i64 document = task / shares / c->kv_heads, g = task / shares % c->kv_heads;
            i64 begin = c->bounds[document], length = c->bounds[document + 1] - begin, padded = up(length, BLOCK);
            i64 blocks = padded / BLOCK;
            if (failed || task % shares >= group * blocks)
                continue;
            tables turn = {c->cos, c->sin, c->half};
            i64 place = c->by_place ? 0 : begin;
            const float *qkv = c->qkv + begin * token;
            gather(qkv + (c->heads + g) * width, token, length, padded, width, W, &turn, place, 1, rows);
            pack_transposed(rows, padded, W, keys_t);
            gather(qkv + (c->heads + c->kv_heads + g) * width, token, length, padded, width, W, NULL, 0, 1, rows);
            pack(rows, padded, W, values);
            for (i64 item = task % shares; item < group * blocks; item += shares) {
                i64 h = g * group + item / blocks, first = item % blocks * BLOCK, count = least(length - first, BLOCK);
                gather(qkv + first * token + h * width, token, count, BLOCK, width, W, &turn, place + first,
                       c->scale * LOG2_E, q);
                for (i64 n = 0; n < first + count; n += NR) /* those before the keys' own places are not read */
                    for (i64 m = n > first ? (n - first) / MR * MR : 0; m < count; m += MR)
                        tile(W, q + m * W, W, 1, keys_t + n * W, s + m * scores + n, scores, 0);
                float sums[BLOCK];
                for (i64 m = 0; m < count; m++) {
                    float top;
                    fetch(qkv + (first + shares * BLOCK + m) * token + h * width, width); /* the next block's */
                    sums[m] = exponentials(s + m * scores, first + m + 1, first + m / MR * MR + MR, &top);
                    log_sum[(begin + first + m) * c->heads + h] = top + log2f(sums[m]);
                }
                for (i64 n = 0; n < W; n += NR)
                    for (i64 m = 0; m < count; m += MR)
                        tile(first + m + MR, s + m * scores, scores, 1, values + n * padded, y + m * W + n, W, 0);
                for (i64 m = 0; m < count; m++)
                    scatter(y + m * W, 1, width, W, NULL, 0, 1 / sums[m],
                            mixed + (begin + first + m) * out + h * width, out);
            }
        }
        free(memory);
    }
    return failed;
}

/* s and ds: a row of scores and the products of the query's gradient with the values, which become the weights of what
 * is mixed, and the scores' gradient: weight x (product - delta) (Dao et al. 2022, arXiv 2205.14135, appendix B). */
static void differentiate(float *s, float *ds, i64 seen, i64 read, float log_sum, float delta)
{
    for (i64 j = 0; j < read; j += LANES) {
        vec weight = exp2_of(load(s + j) - log_sum), slope = weight * (load(ds + j) - delta);
        if (j + LANES > seen) {
            ivec sees = LANE < (int32_t)(seen - j);
            weight = pick(sees, weight, (vec){0});
            slope = pick(sees, slope, (vec){0});
        }
        store(s + j, weight);
        store(ds + j, slope);
    }
}

static float dot(const float *a, const float *b, i64 n)
{
    vec sum = {0};
    i64 i = 0;
    for (; i + LANES <= n; i += LANES)
        sum += load(a + i) * load(b + i);
    float total = sum_of(sum);
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}

/* dmixed is like mixed; dqkv, like qkv, is written.
 *
 * Gradients of queries are sums over keys, and those of keys and values over queries. A head that is shared out has
 * tasks for the first, which take its blocks of queries in turns, and tasks for the others, which take its blocks of
 * keys: scores and their gradients are computed in both, 7 products in place of 5, and the sums are the same to the
 * bit. */
int attention_backward(const call *c, const float *mixed, const float *log_sum, const float *dmixed, float *dqkv)
{
    i64 width = c->width, W = up(width, NR), L = up(longest_of(c), BLOCK), scores = L + LANES;
    i64 group = c->heads / c->kv_heads, token = (c->heads + 2 * c->kv_heads) * width, out = c->heads * width;
    i64 kv_heads = c->documents * c->kv_heads, shares = shares_of(kv_heads, c->threads);
    int shared = shares > 1;
    size_t bytes = sizeof(float) * (6 * L * W + 5 * BLOCK * W + 2 * BLOCK * scores);
    int failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
    {
        float *memory = aligned_alloc(64, up(bytes, 64)), *room = memory;
        failed = !memory;
        float *rows = take(&room, L * W), *keys = take(&room, L * W), *keys_t = take(&room, L * W);
        float *values_t = take(&room, L * W), *dkeys = take(&room, L * W), *dvalues = take(&room, L * W);
        float *q = take(&room, BLOCK * W), *q_panels = take(&room, BLOCK * W), *dq = take(&room, BLOCK * W);
        float *dy = take(&room, BLOCK * W), *dy_panels = take(&room, BLOCK * W);
        float *s = take(&room, BLOCK * scores), *ds = take(&room, BLOCK * scores);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < kv_heads * shares * (1 + shared); task++) {
            int for_keys = task < kv_heads * shares, for_queries = !shared || !for_keys; /* the longer ones come first */
            i64 share = task % shares, head = task / shares % kv_heads, g = head % c->kv_heads;
            i64 begin = c->bounds[head / c->kv_heads], length = c->bounds[head / c->kv_heads + 1] - begin;
            i64 padded = up(length, BLOCK), blocks = padded / BLOCK;
            if (failed || share >= (for_queries ? group * blocks : blocks))
                continue;
            /* The keys of this task: from `start`, so many in a run, and so far from one run to the next. */
            i64 start = for_queries ? 0 : share * BLOCK, run = for_queries ? length : BLOCK;
            i64 next = for_queries ? length : shares * BLOCK;
            i64 step = for_keys ? 1 : shares; /* from one of its blocks of queries to the next */
            tables turn = {c->cos, c->sin, c->half};
            i64 place = c->by_place ? 0 : begin;
            i64 at_keys = (c->heads + g) * width, at_values = (c->heads + c->kv_heads + g) * width;
            const float *qkv = c->qkv + begin * token;
            for (i64 low = start; low < length; low += next) {
                i64 count = least(run, length - low), to = up(count, BLOCK), at = low * W;
                gather(qkv + low * token + at_keys, token, count, to, width, W, &turn, place + low, 1, rows);
                pack_transposed(rows, to, W, keys_t + at);
                if (for_queries) /* which take all keys at once */
                    pack(rows, padded, W, keys);
                gather(qkv + low * token + at_values, token, count, to, width, W, NULL, 0, 1, rows);
                pack_transposed(rows, to, W, values_t + at);
                if (for_keys) {
                    memset(dkeys + at, 0, sizeof(float) * to * W);
                    memset(dvalues + at, 0, sizeof(float) * to * W);
                }
            }
            for (i64 item = 0; item < group * blocks; item++) {
                i64 h = g * group + item / blocks, first = item % blocks * BLOCK, count = least(length - first, BLOCK);
                i64 end = first + count, tiled = up(count, MR);
                if (for_keys ? start >= end : item % shares != share)
                    continue;
                const float *q_here = qkv + first * token + h * width;
                const float *y_here = mixed + (begin + first) * out + h * width;
                const float *dy_here = dmixed + (begin + first) * out + h * width;
                gather(q_here, token, count, BLOCK, width, W, &turn, place + first, c->scale * LOG2_E, q);
                gather(dy_here, out, count, BLOCK, width, W, NULL, 0, 1, dy);
                if (for_keys) {
                    pack(q, BLOCK, W, q_panels);
                    pack(dy, BLOCK, W, dy_panels);
                }
                for (i64 low = start; low < end; low += next)
                    for (i64 n = low; n < least(low + run, end); n += NR)
                        for (i64 m = n > first ? (n - first) / MR * MR : 0; m < count; m += MR) {
                            tile(W, q + m * W, W, 1, keys_t + n * W, s + m * scores + n, scores, 0);
                            tile(W, dy + m * W, W, 1, values_t + n * W, ds + m * scores + n, scores, 0);
                        }
                for (i64 m = 0; m < tiled; m++) {
                    int real = m < count; /* a tile's other queries see nothing */
                    fetch(q_here + (step * BLOCK + m) * token, width); /* the next block's */
                    fetch(y_here + (step * BLOCK + m) * out, width);
                    fetch(dy_here + (step * BLOCK + m) * out, width);
                    i64 seen = real ? first + m + 1 : 0, read = first + m / MR * MR + MR;
                    float of_all = real ? log_sum[(begin + first + m) * c->heads + h] : 0;
                    float delta = real ? dot(dy + m * W, y_here + m * out, width) : 0;
                    for (i64 low = start; low < end; low += next)
                        differentiate(s + m * scores + low, ds + m * scores + low, seen - low,
                                      (low + run < end ? low + run : read) - low, of_all, delta);
                }
                for (i64 n = 0; n < W; n += NR) {
                    for (i64 m = 0; for_queries && m < count; m += MR)
                        tile(first + m + MR, ds + m * scores, scores, 1, keys + n * padded, dq + m * W + n, W, 0);
                    for (i64 low = start; for_keys && low < end; low += next)
                        for (i64 j = low; j < least(low + run, end); j += MR) {
                            i64 from = j > first ? j - first : 0; /* the first query that sees one of these keys */
                            const float *b = dy_panels + n * BLOCK + from * NR, *d = q_panels + n * BLOCK + from * NR;
                            tile(tiled - from, s + from * scores + j, 1, scores, b, dvalues + j * W + n, W, 1);
                            tile(tiled - from, ds + from * scores + j, 1, scores, d, dkeys + j * W + n, W, 1);
                        }
                }
                if (for_queries)
                    scatter(dq, count, width, W, &turn, place + first, c->scale,
                            dqkv + (begin + first) * token + h * width, token);
            }
            for (i64 low = start; for_keys && low < length; low += next) {
                float *here = dqkv + (begin + low) * token;
                i64 rows = least(run, length - low);
                scatter(dkeys + low * W, rows, width, W, &turn, place + low, 1 / LOG2_E, here + at_keys, token);
                scatter(dvalues + low * W, rows, width, W, NULL, 0, 1, here + at_values, token);
            }
        }
        free(memory);
    }
    return failed;
}
