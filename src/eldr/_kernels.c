/* The inner loops of expert counts and expected-union. kernels.py says what each computes and has the same in numpy.

   Arrays come as C-contiguous buffers, and their sizes are checked against each other here: what is called wrongly
   raises ValueError, it never reads or writes outside of a buffer. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

/* The compiler makes one version of a loop for each of these instruction sets; the processor's best is taken. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

/* e^x for x from -87 to 0, to two units in the last place. Free of branches, so that loops of it are vectorised. */
static inline float exp_of(float x) {
    const int32_t whole = (int32_t)(x * 1.44269504f - 0.5f);
    const float rest = x - (float)whole * 0.693359375f + (float)whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    union {
        int32_t bits;
        float value;
    } power = {.bits = (whole + 127) << 23};
    return sum * power.value;
}

/* The `bits` bits from bit `at` of a stream, lowest first; at most 32 of them. Reads up to 8 bytes from where they begin. */
static inline uint32_t bits_at(const uint8_t *stream, uint64_t at, int bits) {
    uint64_t word;
    memcpy(&word, stream + (at >> 3), sizeof word);
    return (uint32_t)(word >> (at & 7)) & (uint32_t)((UINT64_C(1) << bits) - 1);
}

FOR_EACH_CPU
static void unpack_low(const uint8_t *stream, int bits, Py_ssize_t size, uint32_t *out) {
    Py_ssize_t i = 0;
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
static Py_ssize_t ones(const uint8_t *bytes, Py_ssize_t count) {
    Py_ssize_t sum = 0;
    for (; count >= 8; count -= 8, bytes += 8) {
        uint64_t word;
        memcpy(&word, bytes, sizeof word);
        sum += __builtin_popcountll(word);
    }
    for (; count > 0; count--) sum += __builtin_popcount(*bytes++);
    return sum;
}

/* The bits above the low ones, of the numbers that `marked` says have any. Reads up to 7 bytes behind `marked`. */
static void unpack_high(const uint8_t *stream, int bits, const uint8_t *marked, int low_bits, Py_ssize_t size,
                        uint32_t *out) {
    uint64_t at = 0;
    for (Py_ssize_t first = 0; first < size; first += 64) {
        uint64_t word;
        memcpy(&word, marked + (first >> 3), sizeof word);
        if (size - first < 64) word &= (UINT64_C(1) << (size - first)) - 1;
        for (; word; word &= word - 1, at += (uint64_t)bits)
            out[first + __builtin_ctzll(word)] |= bits_at(stream, at, bits) << low_bits;
    }
}

FOR_EACH_CPU
static int consistent(const uint32_t *counts, Py_ssize_t layers, Py_ssize_t experts, uint64_t sum, uint32_t most) {
    uint32_t largest = 0;
    for (Py_ssize_t layer = 0; layer < layers; layer++, counts += experts) {
        uint64_t of_layer = 0;
        for (Py_ssize_t expert = 0; expert < experts; expert++) {
            of_layer += counts[expert];
            largest = counts[expert] > largest ? counts[expert] : largest;
        }
        if (of_layer != sum) return 0;
    }
    return largest <= most;
}

FOR_EACH_CPU
static void frequencies(const uint32_t *counts, const float *mean, float prior, float scale, Py_ssize_t size,
                        float *out) {
    for (Py_ssize_t i = 0; i < size; i++) out[i] = ((float)(int32_t)counts[i] + prior * mean[i]) * scale;
}

FOR_EACH_CPU
static void probabilities(float *row, Py_ssize_t experts, float least, float most, float target) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Py_ssize_t i = 0; i < experts; i++) {
        const float value = row[i] < least ? least : row[i] > most ? most : row[i];
        row[i] = value;
        sum += value;
    }
    const float scale = target / sum;
    for (Py_ssize_t i = 0; i < experts; i++) {
        const float value = row[i] * scale;
        row[i] = value < least ? least : value > most ? most : value;
    }
}

FOR_EACH_CPU
static void codes(const float *profile, Py_ssize_t size, uint8_t *out) {
    for (Py_ssize_t i = 0; i < size; i++) out[i] = (uint8_t)(int32_t)(sqrtf(profile[i]) * 255.0f + 0.5f);
}

FOR_EACH_CPU
static void add(const uint32_t *table, const uint8_t *of, Py_ssize_t size, uint32_t *exposure) {
    for (Py_ssize_t i = 0; i < size; i++) exposure[i] += table[of[i]];
}

FOR_EACH_CPU
static void subtract(const uint32_t *table, const uint8_t *of, Py_ssize_t size, uint32_t *exposure) {
    for (Py_ssize_t i = 0; i < size; i++) exposure[i] -= table[of[i]];
}

FOR_EACH_CPU
static double survive(const uint32_t *exposure, float unit, Py_ssize_t size, uint16_t *survival) {
    const double limit = 87 / (double)unit; /* e^-87 is 1.6e-38 */
    const uint32_t most = limit < INT32_MAX ? (uint32_t)limit : INT32_MAX;
    float alive[512]; /* of one type each, the loops are vectorised */
    double sum = 0;
    for (Py_ssize_t first = 0; first < size; first += 512) {
        const Py_ssize_t count = size - first < 512 ? size - first : 512;
        const uint32_t *from = exposure + first;
        for (Py_ssize_t i = 0; i < count; i++)
            alive[i] = exp_of((float)(int32_t)(from[i] < most ? from[i] : most) * -unit);
        for (Py_ssize_t i = 0; i < count; i++) survival[first + i] = (uint16_t)(int32_t)(alive[i] * 65535.0f + 0.5f);
        float of_block = 0;
#pragma omp simd reduction(+ : of_block)
        for (Py_ssize_t i = 0; i < count; i++) of_block += alive[i];
        sum += of_block;
    }
    return sum;
}

/* The squared length of what `own` becomes. */
FOR_EACH_CPU
static float move(float *own, const float *target, float share, Py_ssize_t size) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (Py_ssize_t i = 0; i < size; i++) {
        own[i] += (target[i] - own[i]) * share;
        square += own[i] * own[i];
    }
    return square;
}

/* The difference of every `every`-th layer, and its squared length. */
FOR_EACH_CPU
static float difference(const float *own, const float *mean, Py_ssize_t layers, Py_ssize_t experts, Py_ssize_t every,
                        float *out) {
    float square = 0;
    for (Py_ssize_t layer = 0; layer < layers; layer += every, out += experts)
#pragma omp simd reduction(+ : square)
        for (Py_ssize_t i = 0; i < experts; i++) {
            out[i] = own[layer * experts + i] - mean[layer * experts + i];
            square += out[i] * out[i];
        }
    return square;
}

/* Dot products of each row [rows, size] with the vector [size]. Four rows at a time: additions of one sum wait for each
   other. */
#define DEFINE_PRODUCTS(name, type)                                                                              \
    FOR_EACH_CPU                                                                                                  \
    static void name(const type *row, const float *vector, Py_ssize_t rows, Py_ssize_t size, double *out) {      \
        for (; rows >= 4; rows -= 4, row += 4 * size, out += 4) {                                                 \
            const type *second = row + size, *third = second + size, *fourth = third + size;                     \
            float a = 0, b = 0, c = 0, d = 0;                                                                     \
            _Pragma("omp simd reduction(+ : a, b, c, d)") for (Py_ssize_t i = 0; i < size; i++) {                 \
                a += (float)row[i] * vector[i];                                                                   \
                b += (float)second[i] * vector[i];                                                                \
                c += (float)third[i] * vector[i];                                                                 \
                d += (float)fourth[i] * vector[i];                                                                \
            }                                                                                                     \
            out[0] = a, out[1] = b, out[2] = c, out[3] = d;                                                       \
        }                                                                                                         \
        for (; rows > 0; rows--, row += size, out++) {                                                            \
            float sum = 0;                                                                                        \
            _Pragma("omp simd reduction(+ : sum)") for (Py_ssize_t i = 0; i < size; i++)                          \
                sum += (float)row[i] * vector[i];                                                                 \
            *out = sum;                                                                                           \
        }                                                                                                         \
    }
DEFINE_PRODUCTS(products, float)
DEFINE_PRODUCTS(fractions_products, uint16_t)

struct placement {
    double context_tokens, others_weight, anchor, tail_guard, guard_share;
};

/* What a fleet is, by worker. columns: base, per expert, per token and per context token, each [workers]. */
struct fleet {
    const double *columns, *unions, *added, *context, *products;
    const float *length;
    Py_ssize_t workers;
};

/* Cosine of the request's direction and a worker's, 0 for a worker that has none yet. */
static inline double similarity_to(const struct fleet *fleet, int64_t worker) {
    const float length = fleet->length[worker];
    return fleet->products[worker] / (length > 1e-6f ? length : 1e-6f);
}

/* For each of the `count` workers `rows` with the loads `load`; at_random: by the requests of a batch. The least cost's
   place in `rows`. */
static Py_ssize_t place(const struct fleet *fleet, const double *at_random, const int64_t *rows, const double *load,
                        Py_ssize_t count, const struct placement *p, double *cost) {
    const double *base_s = fleet->columns, *expert_s = base_s + fleet->workers, *token_s = expert_s + fleet->workers;
    const double *context_s = token_s + fleet->workers;
    double experts = 0, saved = 0, longer = 0, loads = 0, nearest = -INFINITY;
    for (Py_ssize_t i = 0; i < count; i++) {
        const int64_t w = rows[i];
        const double then = fleet->unions[w] + fleet->added[w];
        const double similarity = similarity_to(fleet, w);
        experts += expert_s[w] * then;
        saved += expert_s[w] * (at_random[(int64_t)load[i] + 1] - then);
        loads += load[i];
        nearest = similarity > nearest ? similarity : nearest;
        cost[i] = base_s[w] + expert_s[w] * then + token_s[w] * (load[i] + 1) +
                  context_s[w] * (fleet->context[w] + p->context_tokens);
        longer += cost[i];
    }
    experts /= (double)count;
    saved = saved > 0 ? saved / (double)count : 0;
    const double limit = longer / (double)count + p->tail_guard * (saved + p->guard_share * experts) + 1e-12;
    const double distance_s = p->anchor * (loads / (double)count + 1) * experts;
    Py_ssize_t best = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        const int64_t w = rows[i];
        const double added_s = expert_s[w] * fleet->added[w] + token_s[w] + context_s[w] * p->context_tokens;
        const double similarity = similarity_to(fleet, w);
        const double total = cost[i] + p->others_weight * load[i] * added_s + distance_s * (nearest - similarity);
        cost[i] = cost[i] > limit ? INFINITY : total;
        best = cost[i] < cost[best] ? i : best;
    }
    return best;
}

/* Whether a buffer holds `size` items of `item` bytes. */
static int holds(const Py_buffer *buffer, Py_ssize_t size, Py_ssize_t item) {
    return size >= 0 && buffer->len == size * item && (uintptr_t)buffer->buf % (uintptr_t)item == 0;
}

static PyObject *finish(Py_buffer *buffers, int count, PyObject *result) {
    for (int i = 0; i < count; i++) PyBuffer_Release(&buffers[i]);
    if (!result && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "array sizes do not fit each other");
    return result;
}

static PyObject *unpack_counts(PyObject *self, PyObject *args) {
    Py_buffer b[2];
    Py_ssize_t layers, experts;
    int low, high;
    unsigned long long sum;
    unsigned int most;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iinnKIw*", &b[0], &low, &high, &layers, &experts, &sum, &most, &b[1])) return NULL;
    const Py_ssize_t size = layers > 0 && experts > 0 && layers < (1 << 20) && experts < (1 << 20) ? layers * experts : -1;
    if (low < 0 || high < 0 || low + high > 32 || !holds(&b[1], size, 4)) return finish(b, 2, NULL);
    const Py_ssize_t low_bytes = (size * low + 7) / 8, mark_bytes = high ? (size + 7) / 8 : 0;
    const uint8_t *data = b[0].buf;
    const Py_ssize_t marks = b[0].len < low_bytes + mark_bytes ? 0 : ones(data + low_bytes, mark_bytes);
    if (b[0].len != low_bytes + mark_bytes + (marks * high + 7) / 8) return finish(b, 2, PyLong_FromLong(-1));
    uint8_t *padded = PyMem_Malloc((size_t)b[0].len + 8);
    if (!padded) return finish(b, 2, PyErr_NoMemory());
    memcpy(padded, data, (size_t)b[0].len);
    memset(padded + b[0].len, 0, 8);
    unpack_low(padded, low, size, b[1].buf);
    if (high) unpack_high(padded + low_bytes + mark_bytes, high, padded + low_bytes, low, size, b[1].buf);
    PyMem_Free(padded);
    return finish(b, 2, PyLong_FromLong(consistent(b[1].buf, layers, experts, sum, most)));
}

static PyObject *own_frequencies(PyObject *self, PyObject *args) {
    Py_buffer b[3];
    float prior, scale;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*ffw*", &b[0], &b[1], &prior, &scale, &b[2])) return NULL;
    const Py_ssize_t size = b[2].len / 4;
    if (!holds(&b[0], size, 4) || !holds(&b[1], size, 4) || !holds(&b[2], size, 4)) return finish(b, 3, NULL);
    frequencies(b[0].buf, b[1].buf, prior, scale, size, b[2].buf);
    return finish(b, 3, Py_NewRef(Py_None));
}

static PyObject *scale_to_probabilities(PyObject *self, PyObject *args) {
    Py_buffer b[1];
    Py_ssize_t layers;
    float least, most, target;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*nfff", &b[0], &layers, &least, &most, &target)) return NULL;
    const Py_ssize_t experts = layers > 0 ? b[0].len / 4 / layers : 0;
    if (experts == 0 || !holds(&b[0], layers * experts, 4)) return finish(b, 1, NULL);
    for (Py_ssize_t layer = 0; layer < layers; layer++)
        probabilities((float *)b[0].buf + layer * experts, experts, least, most, target);
    return finish(b, 1, Py_NewRef(Py_None));
}

static PyObject *encode_profile(PyObject *self, PyObject *args) {
    Py_buffer b[2];
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1])) return NULL;
    if (!holds(&b[0], b[1].len, 4)) return finish(b, 2, NULL);
    codes(b[0].buf, b[1].len, b[1].buf);
    return finish(b, 2, Py_NewRef(Py_None));
}

static PyObject *shift_exposure(PyObject *self, PyObject *args) {
    Py_buffer b[4];
    int sign;
    float unit;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*ifw*w*", &b[0], &b[1], &sign, &unit, &b[2], &b[3])) return NULL;
    const Py_ssize_t size = b[1].len;
    if (!holds(&b[0], 256, 4) || !holds(&b[2], size, 4) || !holds(&b[3], size, 2)) return finish(b, 4, NULL);
    (sign > 0 ? add : subtract)(b[0].buf, b[1].buf, size, b[2].buf);
    return finish(b, 4, PyFloat_FromDouble((double)size - survive(b[2].buf, unit, size, b[3].buf)));
}

static PyObject *move_towards(PyObject *self, PyObject *args) {
    Py_buffer b[2];
    float share;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*f", &b[0], &b[1], &share)) return NULL;
    const Py_ssize_t size = b[0].len / 4;
    if (!holds(&b[0], size, 4) || !holds(&b[1], size, 4)) return finish(b, 2, NULL);
    return finish(b, 2, PyFloat_FromDouble(sqrtf(move(b[0].buf, b[1].buf, share, size))));
}

static PyObject *unit_direction(PyObject *self, PyObject *args) {
    Py_buffer b[3];
    Py_ssize_t layers, every;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*nnw*", &b[0], &b[1], &layers, &every, &b[2])) return NULL;
    const Py_ssize_t experts = layers > 0 ? b[0].len / 4 / layers : 0;
    if (experts == 0 || every < 1 || !holds(&b[0], layers * experts, 4) || !holds(&b[1], layers * experts, 4) ||
        !holds(&b[2], (layers + every - 1) / every * experts, 4))
        return finish(b, 3, NULL);
    const float length = sqrtf(difference(b[0].buf, b[1].buf, layers, experts, every, b[2].buf));
    float *out = b[2].buf;
    if (length > 0)
        for (Py_ssize_t i = 0; i < b[2].len / 4; i++) out[i] /= length;
    return finish(b, 3, PyBool_FromLong(length > 0));
}

static PyObject *row_products(PyObject *self, PyObject *args) {
    Py_buffer b[3];
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*w*", &b[0], &b[1], &b[2])) return NULL;
    const Py_ssize_t size = b[1].len / 4, rows = b[2].len / 8;
    if (!holds(&b[1], size, 4) || !holds(&b[2], rows, 8)) return finish(b, 3, NULL);
    if (holds(&b[0], rows * size, 4)) {
        products(b[0].buf, b[1].buf, rows, size, b[2].buf);
    } else {
        if (!holds(&b[0], rows * size, 2)) return finish(b, 3, NULL);
        fractions_products(b[0].buf, b[1].buf, rows, size, b[2].buf);
        for (Py_ssize_t row = 0; row < rows; row++) ((double *)b[2].buf)[row] /= 65535;
    }
    return finish(b, 3, Py_NewRef(Py_None));
}

static PyObject *placement_cost(PyObject *self, PyObject *args) {
    Py_buffer b[10];
    struct placement p;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*y*y*dddddw*", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7],
                          &b[8], &p.context_tokens, &p.others_weight, &p.anchor, &p.tail_guard, &p.guard_share, &b[9]))
        return NULL;
    const Py_ssize_t workers = b[1].len / 8, batches = b[6].len / 8, count = b[9].len / 8;
    int fits = count > 0 && holds(&b[0], 4 * workers, 8) && holds(&b[5], workers, 4) && holds(&b[6], batches, 8) &&
               holds(&b[7], count, 8) && holds(&b[8], count, 8) && holds(&b[9], count, 8);
    for (int i = 1; i < 5; i++) fits = fits && holds(&b[i], workers, 8);
    const int64_t *rows = b[7].buf;
    const double *load = b[8].buf;
    for (Py_ssize_t i = 0; fits && i < count; i++)
        fits = rows[i] >= 0 && rows[i] < workers && load[i] >= 0 && load[i] < (double)batches - 1;
    if (!fits) return finish(b, 10, NULL);
    const struct fleet fleet = {b[0].buf, b[1].buf, b[2].buf, b[3].buf, b[4].buf, b[5].buf, workers};
    return finish(b, 10, PyLong_FromSsize_t(place(&fleet, b[6].buf, rows, load, count, &p, b[9].buf)));
}

static PyMethodDef methods[] = {
    {"unpack_counts", unpack_counts, METH_VARARGS, NULL},
    {"own_frequencies", own_frequencies, METH_VARARGS, NULL},
    {"scale_to_probabilities", scale_to_probabilities, METH_VARARGS, NULL},
    {"encode_profile", encode_profile, METH_VARARGS, NULL},
    {"shift_exposure", shift_exposure, METH_VARARGS, NULL},
    {"unit_direction", unit_direction, METH_VARARGS, NULL},
    {"move_towards", move_towards, METH_VARARGS, NULL},
    {"row_products", row_products, METH_VARARGS, NULL},
    {"placement_cost", placement_cost, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
