/* The inner loops of expert counts and expected-union. kernels.py says what each computes and has the same in numpy.

   Arrays are numpy's, C-contiguous, and their types and sizes are checked against each other here: what is called
   wrongly raises ValueError or TypeError, it never reads or writes outside of an array. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <math.h>
#include <stdint.h>
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
static void unpack(const uint8_t *stream, int bits, Py_ssize_t size, uint32_t *out) {
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

/* What numbers have above their low bits, to those that `marked` says have it. Reads up to 7 bytes behind `marked`. */
static void put_on_top(const uint32_t *high, const uint8_t *marked, int low_bits, Py_ssize_t size, uint32_t *out) {
    for (Py_ssize_t first = 0; first < size; first += 64) {
        uint64_t word;
        memcpy(&word, marked + (first >> 3), sizeof word);
        if (size - first < 64) word &= (UINT64_C(1) << (size - first)) - 1;
        for (; word; word &= word - 1) out[first + __builtin_ctzll(word)] |= *high++ << low_bits;
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

/* In two steps: each is one instruction. */
static inline float clipped(float value, float least, float most) {
    value = value < least ? least : value;
    return value > most ? most : value;
}

/* Layer by layer. Each half of a layer has a sum of its own: additions of one sum wait for each other. */
FOR_EACH_CPU
static void probabilities(const float *score, Py_ssize_t layers, Py_ssize_t experts, float least, float most,
                          float target, float *out) {
    const Py_ssize_t half = experts / 2;
    for (; layers > 0; layers--, score += experts, out += experts) {
        float first = 0, second = experts % 2 ? clipped(score[experts - 1], least, most) : 0;
#pragma omp simd reduction(+ : first, second)
        for (Py_ssize_t i = 0; i < half; i++) {
            first += clipped(score[i], least, most);
            second += clipped(score[half + i], least, most);
        }
        const float scale = target / (first + second);
        for (Py_ssize_t i = 0; i < experts; i++) out[i] = clipped(clipped(score[i], least, most) * scale, least, most);
    }
}

FOR_EACH_CPU
static void signature_codes(const float *signature, Py_ssize_t size, uint8_t *out) {
    for (Py_ssize_t i = 0; i < size; i++) out[i] = (uint8_t)(int32_t)(sqrtf(signature[i]) * 255.0f + 0.5f);
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
static void exposure_codes(const float *profile, float most, float scale, Py_ssize_t size, uint8_t *out) {
    for (Py_ssize_t i = 0; i < size; i++) {
        const float scaled = bits_of(1.0f - (profile[i] < most ? profile[i] : most)) * scale;
        out[i] = (uint8_t)(int32_t)(sqrtf(scaled > 0.0f ? scaled : 0.0f) + 0.5f);
    }
}

FOR_EACH_CPU
static void add(const uint8_t *code, Py_ssize_t size, uint32_t *exposure) {
    for (Py_ssize_t i = 0; i < size; i++) exposure[i] += (uint32_t)code[i] * code[i];
}

FOR_EACH_CPU
static void subtract(const uint8_t *code, Py_ssize_t size, uint32_t *exposure) {
    for (Py_ssize_t i = 0; i < size; i++) exposure[i] -= (uint32_t)code[i] * code[i];
}

FOR_EACH_CPU
static double survive(const uint32_t *exposure, float unit, Py_ssize_t size, uint16_t *survival) {
    const double limit = 126 / (double)unit; /* 2^-126 is 1.2e-38 */
    const uint32_t most = limit < INT32_MAX ? (uint32_t)limit : INT32_MAX;
    float alive[512]; /* of one type each, the loops are vectorised */
    double sum = 0;
    for (Py_ssize_t first = 0; first < size; first += 512) {
        const Py_ssize_t count = size - first < 512 ? size - first : 512;
        const uint32_t *from = exposure + first;
        for (Py_ssize_t i = 0; i < count; i++)
            alive[i] = half_to_the((float)(int32_t)(from[i] < most ? from[i] : most) * unit);
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
    const double *columns, *unions, *added, *products;
    const Py_ssize_t *context;
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
static Py_ssize_t place(const struct fleet *fleet, const double *at_random, const int64_t *rows, const Py_ssize_t *load,
                        Py_ssize_t count, const struct placement *p, double *cost) {
    const double *base_s = fleet->columns, *expert_s = base_s + fleet->workers, *token_s = expert_s + fleet->workers;
    const double *context_s = token_s + fleet->workers;
    double experts = 0, saved = 0, longer = 0, loads = 0, nearest = -INFINITY;
    for (Py_ssize_t i = 0; i < count; i++) {
        const int64_t w = rows[i];
        const double then = fleet->unions[w] + fleet->added[w];
        const double similarity = similarity_to(fleet, w);
        experts += expert_s[w] * then;
        saved += expert_s[w] * (at_random[load[i] + 1] - then);
        loads += (double)load[i];
        nearest = similarity > nearest ? similarity : nearest;
        cost[i] = base_s[w] + expert_s[w] * then + token_s[w] * (double)(load[i] + 1) +
                  context_s[w] * ((double)fleet->context[w] + p->context_tokens);
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
        const double total = cost[i] + p->others_weight * (double)load[i] * added_s + distance_s * (nearest - similarity);
        cost[i] = cost[i] > limit ? INFINITY : total;
        best = cost[i] < cost[best] ? i : best;
    }
    return best;
}

/* The arguments of a call, taken one by one. What is wrong with any of them is kept until `refused` asks. */
struct arguments {
    PyObject *const *next;
    int wrong;
};

#define READ_ONLY NPY_ARRAY_CARRAY_RO
#define WRITABLE NPY_ARRAY_CARRAY

/* The data of an array of `type` with `size` items; a negative `size` becomes what it has. */
static void *array(struct arguments *from, int type, int flags, npy_intp *size) {
    PyArrayObject *const found = (PyArrayObject *)*from->next++;
    if (!PyArray_Check(found) || PyArray_TYPE(found) != type || !PyArray_CHKFLAGS(found, flags) ||
        !PyArray_ISNOTSWAPPED(found) || (*size >= 0 && PyArray_SIZE(found) != *size)) {
        from->wrong = 1;
        return NULL;
    }
    *size = PyArray_SIZE(found);
    return PyArray_DATA(found);
}

static void *array_of(struct arguments *from, int type, int flags, npy_intp size) {
    return size < 0 ? (from->wrong = 1, from->next++, NULL) : array(from, type, flags, &size);
}

static double number(struct arguments *from) { return PyFloat_AsDouble(*from->next++); }

static Py_ssize_t whole(struct arguments *from) { return PyLong_AsSsize_t(*from->next++); }

/* Whether `list` is one of `count` whole numbers, which are then in `out`. */
static int whole_numbers(PyObject *list, Py_ssize_t count, Py_ssize_t *out) {
    if (!PyList_Check(list) || PyList_GET_SIZE(list) != count) return 0;
    for (Py_ssize_t i = 0; i < count; i++) out[i] = PyLong_AsSsize_t(PyList_GET_ITEM(list, i));
    return !PyErr_Occurred();
}

/* Whether the call cannot be made; an exception then says why. */
static int refused(const struct arguments *from) {
    if (PyErr_Occurred()) return 1;
    if (from->wrong) PyErr_SetString(PyExc_ValueError, "an array's type or size does not fit");
    return from->wrong;
}

/* A function of Python's that takes `count` arguments. */
#define FUNCTION(name, count)                                                                                         \
    static PyObject *name##_of(struct arguments);                                                                     \
    static PyObject *name(PyObject *self, PyObject *const *given, Py_ssize_t found) {                                 \
        (void)self;                                                                                                   \
        if (found != count) return PyErr_Format(PyExc_TypeError, #name " takes %d arguments, not %zd", count, found); \
        return name##_of((struct arguments){given, 0});                                                               \
    }                                                                                                                 \
    static PyObject *name##_of(struct arguments a)

/* L * E, -1 if that is no size. */
static npy_intp product(Py_ssize_t layers, Py_ssize_t experts) {
    const Py_ssize_t most = 1 << 20;
    return layers > 0 && layers < most && experts > 0 && experts < most ? layers * experts : -1;
}

FUNCTION(unpack_counts, 8) {
    PyObject *const bytes = *a.next++;
    const Py_ssize_t low = whole(&a), high = whole(&a), layers = whole(&a), experts = whole(&a);
    const unsigned long long sum = PyLong_AsUnsignedLongLong(*a.next++);
    const unsigned long long most = PyLong_AsUnsignedLongLong(*a.next++);
    const npy_intp size = product(layers, experts);
    uint32_t *const out = array_of(&a, NPY_UINT32, WRITABLE, size);
    a.wrong |= !PyBytes_Check(bytes) || low < 0 || low > 32 || high < 0 || low + high > 32 || most > UINT32_MAX;
    if (refused(&a)) return NULL;
    const uint8_t *const data = (const uint8_t *)PyBytes_AS_STRING(bytes);
    const Py_ssize_t length = PyBytes_GET_SIZE(bytes);
    const Py_ssize_t low_bytes = (size * low + 7) / 8, mark_bytes = high ? (size + 7) / 8 : 0;
    const Py_ssize_t marks = length < low_bytes + mark_bytes ? 0 : ones(data + low_bytes, mark_bytes);
    if (length != low_bytes + mark_bytes + (marks * high + 7) / 8) return PyLong_FromLong(-1);
    uint32_t *const high_parts = PyMem_Malloc((size_t)marks * sizeof *high_parts + (size_t)length + 8);
    if (!high_parts) return PyErr_NoMemory();
    uint8_t *const padded = (uint8_t *)(high_parts + marks), *const marked = padded + low_bytes;
    memcpy(padded, data, (size_t)length);
    memset(padded + length, 0, 8);
    unpack(padded, (int)low, size, out);
    if (high) {
        unpack(marked + mark_bytes, (int)high, marks, high_parts);
        put_on_top(high_parts, marked, (int)low, size, out);
    }
    PyMem_Free(high_parts);
    return PyLong_FromLong(consistent(out, layers, experts, sum, (uint32_t)most));
}

FUNCTION(own_frequencies, 5) {
    npy_intp size = -1;
    const uint32_t *const counts = array(&a, NPY_UINT32, READ_ONLY, &size);
    const float *const mean = array_of(&a, NPY_FLOAT32, READ_ONLY, size);
    const double prior = number(&a), scale = number(&a);
    float *const out = array_of(&a, NPY_FLOAT32, WRITABLE, size);
    if (refused(&a)) return NULL;
    frequencies(counts, mean, (float)prior, (float)scale, size, out);
    Py_RETURN_NONE;
}

FUNCTION(to_probabilities, 6) {
    npy_intp size = -1;
    const float *const scores = array(&a, NPY_FLOAT32, READ_ONLY, &size);
    const Py_ssize_t layers = whole(&a);
    const double least = number(&a), most = number(&a), target = number(&a);
    float *const out = array_of(&a, NPY_FLOAT32, WRITABLE, size);
    a.wrong |= layers <= 0 || size <= 0 || size % layers != 0;
    if (refused(&a)) return NULL;
    probabilities(scores, layers, size / layers, (float)least, (float)most, (float)target, out);
    Py_RETURN_NONE;
}

FUNCTION(encode_signature, 2) {
    npy_intp size = -1;
    const float *const signature = array(&a, NPY_FLOAT32, READ_ONLY, &size);
    uint8_t *const out = array_of(&a, NPY_UINT8, WRITABLE, size);
    if (refused(&a)) return NULL;
    signature_codes(signature, size, out);
    Py_RETURN_NONE;
}

FUNCTION(encode_exposure, 4) {
    npy_intp size = -1;
    const float *const profile = array(&a, NPY_FLOAT32, READ_ONLY, &size);
    const double most = number(&a), scale = number(&a);
    uint8_t *const out = array_of(&a, NPY_UINT8, WRITABLE, size);
    if (refused(&a)) return NULL;
    exposure_codes(profile, (float)most, (float)scale, size, out);
    Py_RETURN_NONE;
}

FUNCTION(shift_exposure, 6) {
    npy_intp size = -1;
    const uint8_t *const code = array(&a, NPY_UINT8, READ_ONLY, &size);
    const Py_ssize_t sign = whole(&a);
    const double unit = number(&a);
    npy_intp all = -1;
    uint32_t *const exposures = array(&a, NPY_UINT32, WRITABLE, &all);
    uint16_t *const survivals = array_of(&a, NPY_UINT16, WRITABLE, all);
    const Py_ssize_t row = whole(&a);
    a.wrong |= size <= 0 || all % size != 0 || row < 0 || row >= all / size;
    if (refused(&a)) return NULL;
    uint32_t *const exposure = exposures + row * size;
    uint16_t *const survival = survivals + row * size;
    (sign > 0 ? add : subtract)(code, size, exposure);
    return PyFloat_FromDouble((double)size - survive(exposure, (float)unit, size, survival));
}

FUNCTION(move_towards, 3) {
    npy_intp size = -1;
    float *const own = array(&a, NPY_FLOAT32, WRITABLE, &size);
    const float *const target = array_of(&a, NPY_FLOAT32, READ_ONLY, size);
    const double share = number(&a);
    if (refused(&a)) return NULL;
    return PyFloat_FromDouble(sqrtf(move(own, target, (float)share, size)));
}

FUNCTION(unit_direction, 5) {
    npy_intp size = -1;
    const float *const own = array(&a, NPY_FLOAT32, READ_ONLY, &size);
    const float *const mean = array_of(&a, NPY_FLOAT32, READ_ONLY, size);
    const Py_ssize_t layers = whole(&a), every = whole(&a);
    const int fits = layers > 0 && every > 0 && size > 0 && size % layers == 0;
    const npy_intp taken = fits ? (layers - 1) / every * (size / layers) + size / layers : -1;
    float *const out = array_of(&a, NPY_FLOAT32, WRITABLE, taken);
    if (refused(&a)) return NULL;
    const float length = sqrtf(difference(own, mean, layers, size / layers, every, out));
    if (length > 0)
        for (npy_intp i = 0; i < taken; i++) out[i] /= length;
    return PyBool_FromLong(length > 0);
}

FUNCTION(row_products, 3) {
    PyObject *const first = *a.next;
    const int type = PyArray_Check(first) ? PyArray_TYPE((PyArrayObject *)first) : NPY_FLOAT32;
    npy_intp all = -1, size = -1, rows = -1;
    const void *const matrix = array(&a, type == NPY_UINT16 ? NPY_UINT16 : NPY_FLOAT32, READ_ONLY, &all);
    const float *const vector = array(&a, NPY_FLOAT32, READ_ONLY, &size);
    double *const out = array(&a, NPY_FLOAT64, WRITABLE, &rows);
    a.wrong |= rows > 0 && (all % rows != 0 || all / rows != size);
    if (refused(&a)) return NULL;
    if (type == NPY_UINT16) {
        fractions_products(matrix, vector, rows, size, out);
        for (npy_intp row = 0; row < rows; row++) out[row] /= 65535;
    } else {
        products(matrix, vector, rows, size, out);
    }
    Py_RETURN_NONE;
}

FUNCTION(placement_cost, 15) {
    npy_intp of_columns = -1, batches = -1, count = -1;
    const double *const columns = array(&a, NPY_FLOAT64, READ_ONLY, &of_columns);
    const npy_intp workers = of_columns / 4;
    const double *const unions = array_of(&a, NPY_FLOAT64, READ_ONLY, workers);
    const double *const added = array_of(&a, NPY_FLOAT64, READ_ONLY, workers);
    PyObject *const contexts = *a.next++;
    const double *const along = array_of(&a, NPY_FLOAT64, READ_ONLY, workers);
    const float *const length = array_of(&a, NPY_FLOAT32, READ_ONLY, workers);
    const double *const at_random = array(&a, NPY_FLOAT64, READ_ONLY, &batches);
    const int64_t *const rows = array(&a, NPY_INT64, READ_ONLY, &count);
    PyObject *const loads = *a.next++;
    struct placement p; /* one by one: an initialiser's order is the compiler's choice */
    p.context_tokens = number(&a);
    p.others_weight = number(&a);
    p.anchor = number(&a);
    p.tail_guard = number(&a);
    p.guard_share = number(&a);
    double *const cost = array_of(&a, NPY_FLOAT64, WRITABLE, count);
    a.wrong |= of_columns % 4 != 0 || count < 1;
    if (refused(&a)) return NULL;
    Py_ssize_t *const numbers = PyMem_Malloc((size_t)(count + workers) * sizeof *numbers);
    if (!numbers) return PyErr_NoMemory();
    Py_ssize_t *const load = numbers, *const held = numbers + count;
    a.wrong = !whole_numbers(loads, count, load) || !whole_numbers(contexts, workers, held);
    for (npy_intp i = 0; !a.wrong && i < count; i++)
        a.wrong = rows[i] < 0 || rows[i] >= workers || load[i] < 0 || load[i] >= batches - 1;
    const struct fleet fleet = {columns, unions, added, along, held, length, workers};
    const Py_ssize_t best = a.wrong ? -1 : place(&fleet, at_random, rows, load, count, &p, cost);
    PyMem_Free(numbers);
    return refused(&a) ? NULL : PyLong_FromSsize_t(best);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {
    METHOD(unpack_counts),   METHOD(own_frequencies), METHOD(to_probabilities), METHOD(encode_signature),
    METHOD(encode_exposure), METHOD(shift_exposure),  METHOD(unit_direction),   METHOD(move_towards),
    METHOD(row_products),    METHOD(placement_cost),  {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) {
    import_array();
    return PyModule_Create(&module);
}
