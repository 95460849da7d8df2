/* The inner loops of expert counts and expected-union. kernels.py says what each computes and has the same in numpy.

   Arrays come as C-contiguous buffers, and their sizes are checked against each other here: what is called wrongly
   raises ValueError, it never reads or writes outside of a buffer. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>

/* The compiler makes one version of a loop for each of these instruction sets; the processor's best is taken. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3")))
#else
#define FOR_EACH_CPU
#endif

/* e^x for x <= 0, to two units in the last place; 0 below -87. Branch-free, so that it can be vectorised. */
static inline float exp_of_negative(float x) {
    const float clipped = x < -87.0f ? -87.0f : x;
    const float scaled = clipped * 1.44269504f;
    const int32_t whole = (int32_t)(scaled - 0.5f);
    const float rest = clipped - (float)whole * 0.693359375f + (float)whole * 2.12194440e-4f;
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
    return x < -87.0f ? 0.0f : sum * power.value;
}

FOR_EACH_CPU
static void widen(const uint8_t *planes, int used, Py_ssize_t size, uint32_t *out) {
    for (Py_ssize_t i = 0; i < size; i++) out[i] = planes[i];
    for (int plane = 1; plane < used; plane++) {
        const uint8_t *from = planes + plane * size;
        const int shift = 8 * plane;
        for (Py_ssize_t i = 0; i < size; i++) out[i] |= (uint32_t)from[i] << shift;
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
static void add(const int64_t *table, const uint8_t *of, Py_ssize_t size, int64_t *log_survival) {
    for (Py_ssize_t i = 0; i < size; i++) log_survival[i] += table[of[i]];
}

FOR_EACH_CPU
static void subtract(const int64_t *table, const uint8_t *of, Py_ssize_t size, int64_t *log_survival) {
    for (Py_ssize_t i = 0; i < size; i++) log_survival[i] -= table[of[i]];
}

FOR_EACH_CPU
static double survive(const int64_t *log_survival, double unit, Py_ssize_t size, float *survival) {
    double sum = 0;
    for (Py_ssize_t i = 0; i < size; i++) survival[i] = exp_of_negative((float)((double)log_survival[i] * unit));
#pragma omp simd reduction(+ : sum)
    for (Py_ssize_t i = 0; i < size; i++) sum += survival[i];
    return sum;
}

FOR_EACH_CPU
static void move(float *own, const float *target, float share, Py_ssize_t size) {
    for (Py_ssize_t i = 0; i < size; i++) own[i] += (target[i] - own[i]) * share;
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
    int used;
    unsigned long long sum;
    unsigned int most;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*innKIw*", &b[0], &used, &layers, &experts, &sum, &most, &b[1])) return NULL;
    const Py_ssize_t size = layers > 0 && experts > 0 && layers < (1 << 20) && experts < (1 << 20) ? layers * experts : -1;
    if (used < 1 || used > 4 || !holds(&b[1], size, 4) || !holds(&b[0], used * size, 1)) return finish(b, 2, NULL);
    widen(b[0].buf, used, size, b[1].buf);
    return finish(b, 2, PyBool_FromLong(consistent(b[1].buf, layers, experts, sum, most)));
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

static PyObject *shift_survival(PyObject *self, PyObject *args) {
    Py_buffer b[4];
    int sign;
    double unit;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*idw*w*", &b[0], &b[1], &sign, &unit, &b[2], &b[3])) return NULL;
    const Py_ssize_t size = b[1].len;
    if (!holds(&b[0], 256, 8) || !holds(&b[2], size, 8) || !holds(&b[3], size, 4)) return finish(b, 4, NULL);
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
    move(b[0].buf, b[1].buf, share, size);
    return finish(b, 2, Py_NewRef(Py_None));
}

static PyMethodDef methods[] = {
    {"unpack_counts", unpack_counts, METH_VARARGS, NULL},
    {"own_frequencies", own_frequencies, METH_VARARGS, NULL},
    {"scale_to_probabilities", scale_to_probabilities, METH_VARARGS, NULL},
    {"encode_profile", encode_profile, METH_VARARGS, NULL},
    {"shift_survival", shift_survival, METH_VARARGS, NULL},
    {"move_towards", move_towards, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
