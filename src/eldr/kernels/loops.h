/* The inner loops of expert counts and expected-union. _numpy.py says what each computes, and does the same in numpy.

   Nothing is checked here: sizes and indices are those that _compiled.pyx has checked. Where a loop reads beyond its data,
   it says so. */
#ifndef ELDR_LOOPS_H
#define ELDR_LOOPS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The compiler makes one version of a loop for each of these instruction sets; the processor's best is taken. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

/* 2^-x for x from 0 to 126, to two units in the last place. Free of branches, as all of these, so that loops of it are
   vectorised. */
static inline float half_to_the(float x) {
    const int32_t whole = (int32_t)x;
    const float rest = (float)whole - x; /* from -1 to 0 */
    float sum = 9.3965921e-4f;
    sum = sum * rest + 9.1937938e-3f;
    sum = sum * rest + 5.5287921e-2f;
    sum = sum * rest + 2.4017723e-1f;
    sum = sum * rest + 6.9314344e-1f;
    sum = sum * rest + 1.0f;
    union {
        int32_t bits;
        float value;
    } power = {.bits = (127 - whole) << 23};
    return sum * power.value;
}

/* The `bits` bits from bit `at` of a stream, lowest first; at most 32 of them. Reads up to 8 bytes from where they begin. */
static inline uint32_t bits_at(const uint8_t *stream, uint64_t at, int bits) {
    uint64_t word;
    memcpy(&word, stream + (at >> 3), sizeof word);
    return (uint32_t)(word >> (at & 7)) & (uint32_t)((UINT64_C(1) << bits) - 1);
}

/* `size` numbers of so many bits each. Reads up to 8 bytes from where the last begins. */
FOR_EACH_CPU
static void unpack(const uint8_t *stream, int bits, ptrdiff_t size, uint32_t *out) {
    ptrdiff_t i = 0;
    if (bits <= 8) { /* eight numbers lie in one word */
        const uint64_t mask = (UINT64_C(1) << bits) - 1;
        for (; i + 8 <= size; i += 8, stream += bits) {
            uint64_t word;
            memcpy(&word, stream, sizeof word);
            for (int k = 0; k < 8; k++) out[i + k] = (uint32_t)((word >> (k * bits)) & mask);
        }
        size -= i;
        out += i;
    }
    for (i = 0; i < size; i++) out[i] = bits_at(stream, (uint64_t)i * (uint64_t)bits, bits);
}

FOR_EACH_CPU
static ptrdiff_t ones(const uint8_t *bytes, ptrdiff_t count) {
    ptrdiff_t sum = 0;
    for (; count >= 8; count -= 8, bytes += 8) {
        uint64_t word;
        memcpy(&word, bytes, sizeof word);
        sum += __builtin_popcountll(word);
    }
    for (; count > 0; count--) sum += __builtin_popcount(*bytes++);
    return sum;
}

/* What numbers have above their low bits, to those that `marked` says have it. Reads up to 7 bytes behind `marked`. */
static void put_on_top(const uint32_t *high, const uint8_t *marked, int low_bits, ptrdiff_t size, uint32_t *out) {
    for (ptrdiff_t first = 0; first < size; first += 64) {
        uint64_t word;
        memcpy(&word, marked + (first >> 3), sizeof word);
        if (size - first < 64) word &= (UINT64_C(1) << (size - first)) - 1;
        for (; word; word &= word - 1) out[first + __builtin_ctzll(word)] |= *high++ << low_bits;
    }
}

FOR_EACH_CPU
static int consistent(const uint32_t *counts, ptrdiff_t layers, ptrdiff_t experts, uint64_t sum, uint32_t most) {
    uint32_t largest = 0;
    for (ptrdiff_t layer = 0; layer < layers; layer++, counts += experts) {
        uint64_t of_layer = 0;
        for (ptrdiff_t expert = 0; expert < experts; expert++) {
            of_layer += counts[expert];
            largest = counts[expert] > largest ? counts[expert] : largest;
        }
        if (of_layer != sum) return 0;
    }
    return largest <= most;
}

enum { OTHER_LENGTH = -1, NO_MEMORY = -2 };

/* `length` bytes of packed counts into `out`, [layers, experts]: 1 if every layer sums to `sum` and no number exceeds
   `most`, 0 if not, OTHER_LENGTH if so many bytes do not hold such numbers. low_bits, high_bits: together at most 32. */
static int unpack_layers(const uint8_t *data, ptrdiff_t length, int low_bits, int high_bits, ptrdiff_t layers,
                         ptrdiff_t experts, uint64_t sum, uint32_t most, uint32_t *out) {
    const ptrdiff_t size = layers * experts;
    const ptrdiff_t low_bytes = (size * low_bits + 7) / 8, mark_bytes = high_bits ? (size + 7) / 8 : 0;
    const ptrdiff_t marks = length < low_bytes + mark_bytes ? 0 : ones(data + low_bytes, mark_bytes);
    if (length != low_bytes + mark_bytes + (marks * high_bits + 7) / 8) return OTHER_LENGTH;
    /* Numbers are read in words of 8 bytes: a copy has room behind the last. */
    uint32_t *const high_parts = malloc((size_t)marks * sizeof *high_parts + (size_t)length + 8);
    if (!high_parts) return NO_MEMORY;
    uint8_t *const padded = (uint8_t *)(high_parts + marks), *const marked = padded + low_bytes;
    memcpy(padded, data, (size_t)length);
    memset(padded + length, 0, 8);
    unpack(padded, low_bits, size, out);
    if (high_bits) {
        unpack(marked + mark_bytes, high_bits, marks, high_parts);
        put_on_top(high_parts, marked, low_bits, size, out);
    }
    free(high_parts);
    return consistent(out, layers, experts, sum, most);
}

FOR_EACH_CPU
static void frequencies(const uint32_t *counts, const float *mean, float prior, float scale, ptrdiff_t size,
                        float *out) {
    for (ptrdiff_t i = 0; i < size; i++) out[i] = ((float)(int32_t)counts[i] + prior * mean[i]) * scale;
}

/* In two steps: each is one instruction. */
static inline float clipped(float value, float least, float most) {
    value = value < least ? least : value;
    return value > most ? most : value;
}

/* Layer by layer. Each half of a layer has a sum of its own: additions of one sum wait for each other. */
FOR_EACH_CPU
static void probabilities(const float *score, ptrdiff_t layers, ptrdiff_t experts, float least, float most,
                          float target, float *out) {
    const ptrdiff_t half = experts / 2;
    for (; layers > 0; layers--, score += experts, out += experts) {
        float first = 0, second = experts % 2 ? clipped(score[experts - 1], least, most) : 0;
#pragma omp simd reduction(+ : first, second)
        for (ptrdiff_t i = 0; i < half; i++) {
            first += clipped(score[i], least, most);
            second += clipped(score[half + i], least, most);
        }
        const float scale = target / (first + second);
        for (ptrdiff_t i = 0; i < experts; i++) out[i] = clipped(clipped(score[i], least, most) * scale, least, most);
    }
}

FOR_EACH_CPU
static void signature_codes(const float *signature, ptrdiff_t size, uint8_t *out) {
    for (ptrdiff_t i = 0; i < size; i++) out[i] = (uint8_t)(int32_t)(sqrtf(signature[i]) * 255.0f + 0.5f);
}

/* -log2(x) for x from 0.01 to 1, to 1e-5 of it. */
static inline float bits_of(float x) {
    union {
        float value;
        int32_t bits;
    } number = {.value = x};
    const int32_t whole = (number.bits - 0x3f3504f3) >> 23; /* what is left is from sqrt(1/2) to sqrt(2) */
    number.bits -= (int32_t)((uint32_t)whole << 23);
    const float rest = number.value - 1.0f;
    float sum = -2.06190830e-1f;
    sum = sum * rest + 3.18199935e-1f;
    sum = sum * rest - 3.66491757e-1f;
    sum = sum * rest + 4.79811855e-1f;
    sum = sum * rest - 7.21206388e-1f;
    sum = sum * rest + 1.44270162f;
    return -((float)whole + rest * sum);
}

FOR_EACH_CPU
static void exposure_codes(const float *profile, float most, float scale, ptrdiff_t size, uint8_t *out) {
    for (ptrdiff_t i = 0; i < size; i++) {
        const float scaled = bits_of(1.0f - (profile[i] < most ? profile[i] : most)) * scale;
        out[i] = (uint8_t)(int32_t)(sqrtf(scaled > 0.0f ? scaled : 0.0f) + 0.5f);
    }
}

FOR_EACH_CPU
static void add(const uint8_t *code, ptrdiff_t size, uint32_t *exposure) {
    for (ptrdiff_t i = 0; i < size; i++) exposure[i] += (uint32_t)code[i] * code[i];
}

FOR_EACH_CPU
static void subtract(const uint8_t *code, ptrdiff_t size, uint32_t *exposure) {
    for (ptrdiff_t i = 0; i < size; i++) exposure[i] -= (uint32_t)code[i] * code[i];
}

FOR_EACH_CPU
static double survive(const uint32_t *exposure, float unit, ptrdiff_t size, uint16_t *survival) {
    const double limit = 126 / (double)unit; /* 2^-126 is 1.2e-38 */
    const uint32_t most = limit < INT32_MAX ? (uint32_t)limit : INT32_MAX;
    float alive[512]; /* of one type each, the loops are vectorised */
    double sum = 0;
    for (ptrdiff_t first = 0; first < size; first += 512) {
        const ptrdiff_t count = size - first < 512 ? size - first : 512;
        const uint32_t *from = exposure + first;
        for (ptrdiff_t i = 0; i < count; i++)
            alive[i] = half_to_the((float)(int32_t)(from[i] < most ? from[i] : most) * unit);
        for (ptrdiff_t i = 0; i < count; i++) survival[first + i] = (uint16_t)(int32_t)(alive[i] * 65535.0f + 0.5f);
        float of_block = 0;
#pragma omp simd reduction(+ : of_block)
        for (ptrdiff_t i = 0; i < count; i++) of_block += alive[i];
        sum += of_block;
    }
    return sum;
}

/* The squared length of what `own` becomes. */
FOR_EACH_CPU
static float move(float *own, const float *target, float share, ptrdiff_t size) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (ptrdiff_t i = 0; i < size; i++) {
        own[i] += (target[i] - own[i]) * share;
        square += own[i] * own[i];
    }
    return square;
}

/* The difference of every `every`-th layer, and its squared length. */
FOR_EACH_CPU
static float difference(const float *own, const float *mean, ptrdiff_t layers, ptrdiff_t experts, ptrdiff_t every,
                        float *out) {
    float square = 0;
    for (ptrdiff_t layer = 0; layer < layers; layer += every, out += experts)
#pragma omp simd reduction(+ : square)
        for (ptrdiff_t i = 0; i < experts; i++) {
            out[i] = own[layer * experts + i] - mean[layer * experts + i];
            square += out[i] * out[i];
        }
    return square;
}

/* The difference of every `every`-th layer as a unit vector into `out`. Whether it has a length. */
static int direction(const float *own, const float *mean, ptrdiff_t layers, ptrdiff_t experts, ptrdiff_t every,
                     float *out) {
    const float length = sqrtf(difference(own, mean, layers, experts, every, out));
    if (!(length > 0)) return 0;
    const ptrdiff_t size = ((layers - 1) / every + 1) * experts;
    for (ptrdiff_t i = 0; i < size; i++) out[i] /= length;
    return 1;
}

/* Dot products of each row [rows, size] with the vector [size]. Four rows at a time: additions of one sum wait for each
   other. */
#define DEFINE_PRODUCTS(name, type)                                                                              \
    FOR_EACH_CPU                                                                                                  \
    static void name(const type *row, const float *vector, ptrdiff_t rows, ptrdiff_t size, double *out) {      \
        for (; rows >= 4; rows -= 4, row += 4 * size, out += 4) {                                                 \
            const type *second = row + size, *third = second + size, *fourth = third + size;                     \
            float a = 0, b = 0, c = 0, d = 0;                                                                     \
            _Pragma("omp simd reduction(+ : a, b, c, d)") for (ptrdiff_t i = 0; i < size; i++) {                 \
                a += (float)row[i] * vector[i];                                                                   \
                b += (float)second[i] * vector[i];                                                                \
                c += (float)third[i] * vector[i];                                                                 \
                d += (float)fourth[i] * vector[i];                                                                \
            }                                                                                                     \
            out[0] = a, out[1] = b, out[2] = c, out[3] = d;                                                       \
        }                                                                                                         \
        for (; rows > 0; rows--, row += size, out++) {                                                            \
            float sum = 0;                                                                                        \
            _Pragma("omp simd reduction(+ : sum)") for (ptrdiff_t i = 0; i < size; i++)                          \
                sum += (float)row[i] * vector[i];                                                                 \
            *out = sum;                                                                                           \
        }                                                                                                         \
    }
DEFINE_PRODUCTS(products, float)
DEFINE_PRODUCTS(products_of_fractions, uint16_t)

/* The same for rows of probabilities, kept as fractions of 65535. */
static void fraction_products(const uint16_t *row, const float *vector, ptrdiff_t rows, ptrdiff_t size, double *out) {
    products_of_fractions(row, vector, rows, size, out);
    for (ptrdiff_t i = 0; i < rows; i++) out[i] /= 65535;
}

/* The workers of a fleet. Columns of a step's cost, seconds: base, per expert, per token and per context token, each
   [workers]. union, context, length: [workers]. */
struct fleet {
    const double *columns, *unions;
    const int64_t *context;
    const float *length;
    ptrdiff_t workers;
};

struct weights {
    double others, anchor, tail_guard, guard_share;
};

/* A request, by worker: experts that it adds, scalar product of its direction with the worker's; each [workers]. */
struct request {
    const double *added, *products;
    double context_tokens;
};

/* The workers to choose from, with their loads, each [count]. at_random: [batch + 1]. */
struct candidates {
    const int64_t *rows, *load;
    ptrdiff_t count;
    const double *at_random;
};

/* Cosine of the request's direction and a worker's, 0 for a worker that has none yet. */
static inline double similarity_to(const struct fleet *fleet, const struct request *request, int64_t worker) {
    const float length = fleet->length[worker];
    return request->products[worker] / (length > 1e-6f ? length : 1e-6f);
}

/* The cost of each candidate into `cost`, infinity behind the tail guard, which lets steps of `allowed_s` pass. Its own
   limit goes to `limit_s`. Returns the place of the least. */
static ptrdiff_t place(const struct fleet *fleet, const struct weights *weights, const struct request *request,
                       const struct candidates *among, double allowed_s, double *cost, double *limit_s) {
    const double *base_s = fleet->columns, *expert_s = base_s + fleet->workers, *token_s = expert_s + fleet->workers;
    const double *context_s = token_s + fleet->workers;
    const ptrdiff_t count = among->count;
    double experts = 0, saved = 0, longer = 0, loads = 0, nearest = -INFINITY;
    for (ptrdiff_t i = 0; i < count; i++) {
        const int64_t w = among->rows[i], load = among->load[i];
        const double then = fleet->unions[w] + request->added[w];
        const double similarity = similarity_to(fleet, request, w);
        experts += expert_s[w] * then;
        saved += expert_s[w] * (among->at_random[load + 1] - then);
        loads += (double)load;
        nearest = similarity > nearest ? similarity : nearest;
        cost[i] = base_s[w] + expert_s[w] * then + token_s[w] * (double)(load + 1) +
                  context_s[w] * ((double)fleet->context[w] + request->context_tokens);
        longer += cost[i];
    }
    experts /= (double)count;
    saved = saved > 0 ? saved / (double)count : 0;
    const double limit =
        longer / (double)count + weights->tail_guard * (saved + weights->guard_share * experts) + 1e-12;
    *limit_s = limit;
    const double most = limit > allowed_s ? limit : allowed_s;
    const double distance_s = weights->anchor * (loads / (double)count + 1) * experts;
    ptrdiff_t best = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        const int64_t w = among->rows[i];
        const double added_s = expert_s[w] * request->added[w] + token_s[w] + context_s[w] * request->context_tokens;
        const double similarity = similarity_to(fleet, request, w);
        const double total =
            cost[i] + weights->others * (double)among->load[i] * added_s + distance_s * (nearest - similarity);
        cost[i] = cost[i] > most ? INFINITY : total;
        best = cost[i] < cost[best] ? i : best;
    }
    return best;
}

#define LAST_USE UINT64_C(0xffffffff)
#define ONE_USE (LAST_USE + 1)
#define IN_USE (UINT64_C(1) << 63)

static inline uint64_t is_active(const uint64_t *active, ptrdiff_t bit) { return active[bit >> 6] >> (bit & 63) & 1; }

/* The place of the least of these numbers, of equals the first. */
FOR_EACH_CPU
static ptrdiff_t least_of(const uint64_t *number, ptrdiff_t count) {
    uint64_t least = UINT64_MAX;
#pragma omp simd reduction(min : least)
    for (ptrdiff_t i = 0; i < count; i++) least = number[i] < least ? number[i] : least;
    ptrdiff_t place = 0;
    while (number[place] != least) place++;
    return place;
}

/* A step in one layer, whose first expert has the number `first` among the bits of `active`. Returns the missing experts.
   priority, resident, order: [experts]; `order` is for this loop alone. */
static ptrdiff_t cache_layer(const uint64_t *active, ptrdiff_t first, ptrdiff_t experts, uint32_t now, int by_frequency,
                             uint64_t *priority, uint8_t *resident, uint64_t *order) {
    ptrdiff_t missed = 0;
    for (ptrdiff_t i = 0; i < experts; i++) {
        if (!is_active(active, first + i)) continue;
        missed += !resident[i];
        resident[i] = 1;
        priority[i] = (by_frequency ? (priority[i] & ~LAST_USE) + ONE_USE : 0) | now;
    }
    if (!missed) return 0;
    for (ptrdiff_t i = 0; i < experts; i++)
        order[i] = resident[i] ? priority[i] | is_active(active, first + i) * IN_USE : UINT64_MAX;
    for (ptrdiff_t dropped = 0; dropped < missed; dropped++) {
        const ptrdiff_t least = least_of(order, experts);
        resident[least] = 0;
        order[least] = UINT64_MAX;
    }
    return missed;
}

/* Steps of a cache of experts, each [words]. priority, resident: [layers * experts]. The missing experts of each step go
   to `missing`. */
static void cache(const uint64_t *active, ptrdiff_t steps, ptrdiff_t words, ptrdiff_t layers, ptrdiff_t experts,
                  uint32_t now, uint32_t halve_every, uint64_t *priority, uint8_t *resident, uint64_t *order,
                  int64_t *missing) {
    const ptrdiff_t size = layers * experts;
    for (ptrdiff_t step = 0; step < steps; step++, now++, active += words) {
        if (halve_every && now % halve_every == 0)
            for (ptrdiff_t i = 0; i < size; i++) priority[i] = (priority[i] & LAST_USE) | (priority[i] >> 33 << 32);
        missing[step] = 0;
        for (ptrdiff_t first = 0; first < size; first += experts)
            missing[step] += cache_layer(active, first, experts, now, halve_every > 0, priority + first,
                                         resident + first, order);
    }
}

/* What the price of a prompt depends on: see PrefillTerms. */
struct prefill {
    double experts, missed, chunk_tokens, others;
};

/* A prompt, by candidate: tokens of other prompts and of this one to be computed there; each [count]. */
struct prompt {
    const int64_t *waiting, *uncached;
    double tokens, scale;
};

/* Steps that compute a chunk of so many tokens, and the time that all chunks add to them, into `added_s`. */
static inline double chunks_of(double tokens, double room, double token_s, double expert_s, double missed,
                               double *added_s) {
    const double chunks = ceil(tokens / room);
    *added_s = token_s * tokens + chunks * expert_s * (1 - pow(missed, tokens < room ? tokens : room));
    return chunks;
}

/* Add the price of the prompt to the cost of each candidate. Returns the place of the least. */
static ptrdiff_t add_prompt(const struct fleet *fleet, const struct prefill *terms, const struct prompt *prompt,
                            const struct candidates *among, double *cost) {
    const double *base_s = fleet->columns, *expert_s = base_s + fleet->workers, *token_s = expert_s + fleet->workers;
    const double *context_s = token_s + fleet->workers;
    ptrdiff_t best = 0;
    for (ptrdiff_t i = 0; i < among->count; i++) {
        const int64_t w = among->rows[i];
        const double load = (double)among->load[i], own = (double)prompt->uncached[i];
        const double unused = terms->experts - fleet->unions[w];
        const double room = terms->chunk_tokens - load > 1 ? terms->chunk_tokens - load : 1;
        const double unused_s = expert_s[w] * (unused > 0 ? unused : 0);
        double own_s, queued_s;
        const double own_chunks = chunks_of(own, room, token_s[w], unused_s, terms->missed, &own_s);
        const double chunks =
            chunks_of((double)prompt->waiting[i] + own, room, token_s[w], unused_s, terms->missed, &queued_s);
        const double read_s = context_s[w] * (prompt->tokens + (own_chunks - 1) * (prompt->tokens - own / 2));
        const double decode_s =
            base_s[w] + expert_s[w] * fleet->unions[w] + token_s[w] * load + context_s[w] * (double)fleet->context[w];
        const double newcomer_s = chunks * decode_s + queued_s + read_s;
        cost[i] += prompt->scale * (newcomer_s + terms->others * load * (own_s + read_s));
        best = cost[i] < cost[best] ? i : best;
    }
    return best;
}

#endif
