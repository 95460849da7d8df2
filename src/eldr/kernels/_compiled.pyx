# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The loops of loops.h and the reader of json_text.h as Python functions. `_numpy` and `_json` say what each does.

Types and sizes of arrays are checked against each other here: a wrong call raises ValueError or TypeError, and never
reads or writes outside of an array. Arrays are taken through numpy's C API. A typed memoryview takes 100 ns to make,
and a placement has eight arrays and takes 200 ns in all.
"""

cimport cython
from cpython.long cimport PyLong_AsSsize_t
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.math cimport sqrtf
from libc.stdint cimport UINT32_MAX, int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

cimport numpy as cnp
from numpy cimport NPY_FLOAT32, NPY_FLOAT64, NPY_INT8, NPY_INT64, NPY_UINT8, NPY_UINT16, NPY_UINT32, NPY_UINT64

from json import loads
from math import copysign, inf
from sys import intern

from eldr.kernels._types import NO_OBJECT, TOO_MANY_MEMBERS, FleetState, JsonTextError, PlacementWeights, PrefillTerms
from eldr.kernels._types import JSON_MEMBERS as _MEMBERS

cdef Py_ssize_t MOST_MEMBERS = _MEMBERS

cnp.import_array()


cdef extern from "loops.h" nogil:
    enum:
        NO_MEMORY

    struct Fleet "fleet":
        const double *columns
        const double *unions
        const int64_t *context
        const float *length
        Py_ssize_t workers

    struct Weights "weights":
        double others
        double anchor
        double tail_guard
        double guard_share

    struct Request "request":
        const double *added
        const double *products
        double context_tokens

    struct Candidates "candidates":
        const int64_t *rows
        const int64_t *load
        Py_ssize_t count
        const double *at_random

    struct Prefill "prefill":
        double experts
        double missed
        double chunk_tokens
        double others

    struct Prompt "prompt":
        const int64_t *waiting
        const int64_t *uncached
        double tokens
        double scale

    int unpack_layers(const uint8_t *data, Py_ssize_t length, int low_bits, int high_bits, Py_ssize_t layers,
                      Py_ssize_t experts, uint64_t sum, uint32_t most, uint32_t *out)
    void frequencies(const uint32_t *counts, const float *mean, float prior, float scale, Py_ssize_t size, float *out)
    void probabilities(const float *score, Py_ssize_t layers, Py_ssize_t experts, float least, float most,
                       float target, float *out)
    void signature_codes(const float *signature, Py_ssize_t size, uint8_t *out)
    void exposure_codes(const float *profile, float most, float scale, Py_ssize_t size, uint8_t *out)
    void add(const uint8_t *code, Py_ssize_t size, uint32_t *exposure)
    void subtract(const uint8_t *code, Py_ssize_t size, uint32_t *exposure)
    double survive(const uint32_t *exposure, float unit, Py_ssize_t size, uint16_t *survival)
    float move(float *own, const float *target, float share, Py_ssize_t size)
    bint direction(const float *own, const float *mean, Py_ssize_t layers, Py_ssize_t experts, Py_ssize_t every,
                   float *out)
    void products(const float *row, const float *vector, Py_ssize_t rows, Py_ssize_t size, double *out)
    void fraction_products(const uint16_t *row, const float *vector, Py_ssize_t rows, Py_ssize_t size, double *out)
    Py_ssize_t place(const Fleet *of, const Weights *by, const Request *asked, const Candidates *among, double allowed_s,
                     double *cost, double *limit_s)
    Py_ssize_t add_prompt(const Fleet *of, const Prefill *by, const Prompt *asked, const Candidates *among,
                          double *cost)
    void cache(const uint64_t *active, Py_ssize_t steps, Py_ssize_t words, Py_ssize_t layers, Py_ssize_t experts,
               uint32_t now, uint32_t halve_every, uint64_t *priority, uint8_t *resident, uint64_t *order,
               int64_t *missing)


cdef object unfit(str name, str wanted):
    return ValueError(f"{name} does not fit: it must be {wanted}")


cdef object unfit_array(str name, int dtype, Py_ssize_t size):
    wanted = f"a C-contiguous {cnp.PyArray_DescrFromType(dtype)} array"
    return unfit(name, wanted if size < 0 else f"{wanted} of {size} items")


cdef inline Py_ssize_t size_of(object array) noexcept:
    """Items of an array; -1 for anything else, which no array has."""
    return cnp.PyArray_SIZE(array) if cnp.PyArray_Check(array) else -1


cdef inline void *readable(object array, str name, int dtype, Py_ssize_t size) except? NULL:
    """The data of an array of this type with `size` items."""
    if (
        not cnp.PyArray_Check(array)
        or cnp.PyArray_TYPE(array) != dtype
        or not cnp.PyArray_ISCARRAY_RO(array)
        or cnp.PyArray_SIZE(array) != size
    ):
        raise unfit_array(name, dtype, size)
    return cnp.PyArray_DATA(array)


cdef inline void *writable(object array, str name, int dtype, Py_ssize_t size) except? NULL:
    """The same of an array that may be written to."""
    cdef void *data = readable(array, name, dtype, size)
    if not cnp.PyArray_ISWRITEABLE(array):
        raise unfit(name, "writable")
    return data


cdef bint take_whole_numbers(object found, str name, Py_ssize_t count, int64_t *out) except False:
    """Copy a list of `count` whole numbers. No Python code runs meanwhile, so the list cannot change."""
    cdef Py_ssize_t i
    if not isinstance(found, list) or len(<list> found) != count:
        raise unfit(name, f"a list of {count} whole numbers")
    for i in range(count):
        out[i] = PyLong_AsSsize_t((<list> found)[i])
    return True


def unpack_counts(
    bytes data not None, int low_bits, int high_bits, Py_ssize_t layers, Py_ssize_t experts, uint64_t total,
    uint64_t most, out
):
    if not (0 <= low_bits <= 32 and 0 <= high_bits <= 32 - low_bits):
        raise unfit("low_bits or high_bits", "from 0 to 32, and both together at most 32")
    if not (0 < layers < 1 << 20 and 0 < experts < 1 << 20):
        raise unfit("layers or experts", "from 1 to 2^20 - 1")
    if most > UINT32_MAX:
        raise unfit("most", "below 2^32")
    cdef uint32_t *numbers = <uint32_t *> writable(out, "out", NPY_UINT32, layers * experts)
    cdef int found = unpack_layers(data, len(data), low_bits, high_bits, layers, experts, total, <uint32_t> most, numbers)
    if found == NO_MEMORY:
        raise MemoryError
    return found


def own_frequencies(counts, mean, float prior, float scale, out):
    cdef Py_ssize_t size = size_of(counts)
    frequencies(
        <uint32_t *> readable(counts, "counts", NPY_UINT32, size),
        <float *> readable(mean, "mean", NPY_FLOAT32, size),
        prior,
        scale,
        size,
        <float *> writable(out, "out", NPY_FLOAT32, size),
    )


def to_probabilities(scores, Py_ssize_t layers, float least, float most, float target, out):
    cdef Py_ssize_t size = size_of(scores)
    if layers <= 0 or size <= 0 or size % layers != 0:
        raise unfit("scores", f"{layers} layers of equal size")
    probabilities(
        <float *> readable(scores, "scores", NPY_FLOAT32, size),
        layers,
        size // layers,
        least,
        most,
        target,
        <float *> writable(out, "out", NPY_FLOAT32, size),
    )


def encode_signature(signature, out):
    cdef Py_ssize_t size = size_of(signature)
    signature_codes(
        <float *> readable(signature, "signature", NPY_FLOAT32, size),
        size,
        <uint8_t *> writable(out, "out", NPY_UINT8, size),
    )


def encode_exposure(profile, float most, float scale, out):
    cdef Py_ssize_t size = size_of(profile)
    exposure_codes(
        <float *> readable(profile, "profile", NPY_FLOAT32, size),
        most,
        scale,
        size,
        <uint8_t *> writable(out, "out", NPY_UINT8, size),
    )


def shift_exposure(codes, Py_ssize_t sign, float unit, exposures, survivals, Py_ssize_t row):
    cdef Py_ssize_t size = size_of(codes), all_rows = size_of(exposures)
    if size <= 0 or all_rows % size != 0:
        raise unfit("codes", "as long as a row of exposures")
    if not 0 <= row < all_rows // size:
        raise unfit("row", "one of exposures")
    cdef uint8_t *code = <uint8_t *> readable(codes, "codes", NPY_UINT8, size)
    cdef uint32_t *exposure = <uint32_t *> writable(exposures, "exposures", NPY_UINT32, all_rows) + row * size
    cdef uint16_t *survival = <uint16_t *> writable(survivals, "survivals", NPY_UINT16, all_rows) + row * size
    if sign > 0:
        add(code, size, exposure)
    else:
        subtract(code, size, exposure)
    return <double> size - survive(exposure, unit, size, survival)


def move_towards(own, target, float share):
    cdef Py_ssize_t size = size_of(own)
    cdef float *moved = <float *> writable(own, "own", NPY_FLOAT32, size)
    return <double> sqrtf(move(moved, <float *> readable(target, "target", NPY_FLOAT32, size), share, size))


def unit_direction(own, mean, Py_ssize_t layers, Py_ssize_t every, out):
    cdef Py_ssize_t size = size_of(own)
    if layers <= 0 or size <= 0 or size % layers != 0:
        raise unfit("own", f"{layers} layers of equal size")
    if every <= 0:
        raise unfit("every", "positive")
    cdef Py_ssize_t experts = size // layers
    cdef Py_ssize_t taken = ((layers - 1) // every + 1) * experts
    return direction(
        <float *> readable(own, "own", NPY_FLOAT32, size),
        <float *> readable(mean, "mean", NPY_FLOAT32, size),
        layers,
        experts,
        every,
        <float *> writable(out, "out", NPY_FLOAT32, taken),
    )


def row_products(rows, vector, out):
    cdef Py_ssize_t count = size_of(out), size = size_of(vector)
    if size < 0 or count > 0 and size_of(rows) // count != size:
        raise unfit("vector", "as long as a row of rows")
    cdef float *factors = <float *> readable(vector, "vector", NPY_FLOAT32, size)
    cdef double *found = <double *> writable(out, "out", NPY_FLOAT64, count)
    if cnp.PyArray_Check(rows) and cnp.PyArray_TYPE(rows) == NPY_UINT16:
        fraction_products(<uint16_t *> readable(rows, "rows", NPY_UINT16, count * size), factors, count, size, found)
    else:
        products(<float *> readable(rows, "rows", NPY_FLOAT32, count * size), factors, count, size, found)


def placement_cost(fleet, weights, added, products, at_random, rows, load, double context_tokens, double allowed_s,
                   out):
    if type(fleet) is not FleetState or type(weights) is not PlacementWeights:
        raise TypeError("a placement takes a FleetState and PlacementWeights")
    columns, union, context, length = <tuple> fleet
    others, anchor, tail_guard, guard_share = <tuple> weights
    # Before any data is looked at: what is no float runs Python, which could resize an array.
    cdef Weights by = Weights(others, anchor, tail_guard, guard_share)

    cdef Py_ssize_t of_columns = size_of(columns), workers = of_columns // 4, batches = size_of(at_random)
    cdef Py_ssize_t count = size_of(rows), i
    if count < 1:
        raise unfit("rows", "at least one worker")
    cdef Fleet of
    of.columns = <double *> readable(columns, "columns", NPY_FLOAT64, workers * 4)
    of.unions = <double *> readable(union, "union", NPY_FLOAT64, workers)
    of.length = <float *> readable(length, "length", NPY_FLOAT32, workers)
    of.workers = workers
    cdef Request asked
    asked.added = <double *> readable(added, "added", NPY_FLOAT64, workers)
    asked.products = <double *> readable(products, "products", NPY_FLOAT64, workers)
    asked.context_tokens = context_tokens
    cdef Candidates among
    among.rows = <int64_t *> readable(rows, "rows", NPY_INT64, count)
    among.count = count
    among.at_random = <double *> readable(at_random, "at_random", NPY_FLOAT64, batches)
    cdef double *cost = <double *> writable(out, "out", NPY_FLOAT64, count)
    cdef double limit_s
    cdef Py_ssize_t best

    cdef int64_t *numbers = <int64_t *> PyMem_Malloc((count + workers) * sizeof(int64_t))
    if numbers == NULL:
        raise MemoryError
    try:
        take_whole_numbers(load, "load", count, numbers)
        take_whole_numbers(context, "context", workers, numbers + count)
        for i in range(count):
            if not 0 <= among.rows[i] < workers:
                raise unfit("rows", f"of {workers} workers")
            if not 0 <= numbers[i] < batches - 1:
                raise unfit("load", f"below the {batches - 1} requests of at_random")
        among.load = numbers
        of.context = numbers + count
        best = place(&of, &by, &asked, &among, allowed_s, cost, &limit_s)
        return best, limit_s
    finally:
        PyMem_Free(numbers)


def add_prefill(fleet, terms, rows, load, waiting, uncached, double prompt_tokens, double scale, out):
    if type(fleet) is not FleetState or type(terms) is not PrefillTerms:
        raise TypeError("a prompt's price takes a FleetState and PrefillTerms")
    columns, union, context, _ = <tuple> fleet
    experts, missed, chunk_tokens, others = <tuple> terms
    cdef Prefill by = Prefill(experts, missed, chunk_tokens, others)

    cdef Py_ssize_t workers = size_of(columns) // 4, count = size_of(rows), i
    if count < 1:
        raise unfit("rows", "at least one worker")
    cdef Fleet of
    of.columns = <double *> readable(columns, "columns", NPY_FLOAT64, workers * 4)
    of.unions = <double *> readable(union, "union", NPY_FLOAT64, workers)
    of.workers = workers
    cdef Candidates among
    among.rows = <int64_t *> readable(rows, "rows", NPY_INT64, count)
    among.count = count
    cdef double *cost = <double *> writable(out, "out", NPY_FLOAT64, count)
    cdef Prompt asked
    asked.tokens = prompt_tokens
    asked.scale = scale

    cdef int64_t *numbers = <int64_t *> PyMem_Malloc((3 * count + workers) * sizeof(int64_t))
    if numbers == NULL:
        raise MemoryError
    try:
        take_whole_numbers(load, "load", count, numbers)
        take_whole_numbers(waiting, "waiting", count, numbers + count)
        take_whole_numbers(uncached, "uncached", count, numbers + 2 * count)
        take_whole_numbers(context, "context", workers, numbers + 3 * count)
        for i in range(count):
            if not 0 <= among.rows[i] < workers:
                raise unfit("rows", f"of {workers} workers")
        among.load = numbers
        asked.waiting = numbers + count
        asked.uncached = numbers + 2 * count
        of.context = numbers + 3 * count
        return add_prompt(&of, &by, &asked, &among, cost)
    finally:
        PyMem_Free(numbers)


def cache_experts(active, Py_ssize_t layers, Py_ssize_t experts, uint32_t now, uint32_t halve_every, priority, resident,
                  out):
    if not (0 < layers < 1 << 20 and 0 < experts < 1 << 20):
        raise unfit("layers or experts", "from 1 to 2^20 - 1")
    cdef Py_ssize_t size = layers * experts, words = (size + 63) // 64, steps = size_of(out)
    cdef uint64_t *used = <uint64_t *> readable(active, "active", NPY_UINT64, steps * words)
    cdef uint64_t *first = <uint64_t *> writable(priority, "priority", NPY_UINT64, size)
    cdef uint8_t *held = <uint8_t *> writable(resident, "resident", NPY_UINT8, size)
    cdef int64_t *missing = <int64_t *> writable(out, "out", NPY_INT64, steps)
    cdef uint64_t *order = <uint64_t *> PyMem_Malloc(experts * sizeof(uint64_t))
    if order == NULL:
        raise MemoryError
    cache(used, steps, words, layers, experts, now, halve_every, first, held, order, missing)
    PyMem_Free(order)


cdef extern from "json_text.h" nogil:
    enum:
        JSON_NO_VALUE
        JSON_OPEN_STRING
        JSON_EXTRA
        JSON_SORTED

    struct Member "json_member":
        Py_ssize_t name
        Py_ssize_t name_end
        Py_ssize_t value
        Py_ssize_t value_end
        Py_ssize_t next
        bint escaped
        bint last

    Py_ssize_t json_space(const uint8_t *text, Py_ssize_t at, Py_ssize_t end)
    int json_value(const uint8_t *text, Py_ssize_t *position, Py_ssize_t end)
    int json_string(const uint8_t *text, Py_ssize_t *position, Py_ssize_t end, bint *escaped)
    int json_member_at(const uint8_t *text, Py_ssize_t at, Py_ssize_t end, bint named, Member *found)
    Py_ssize_t json_compact(const uint8_t *text, Py_ssize_t at, Py_ssize_t end, uint8_t *out, Py_ssize_t room)
    int json_collect(const uint8_t *text, Py_ssize_t at, Py_ssize_t end, Member *found, int most)
    Py_ssize_t json_sorted(const uint8_t *text, Member *members, int count, uint8_t *out, Py_ssize_t room)


cdef inline const uint8_t *part_of(bytes text, Py_ssize_t start, Py_ssize_t end) except NULL:
    """The bytes of a text whose part from start to end is there."""
    if not 0 <= start <= end <= len(text):
        raise unfit("start or end", "within the text")
    return text


cdef inline str string_at(bytes text, Py_ssize_t start, Py_ssize_t end, bint escaped):
    """The string whose quotes are text[start] and text[end - 1]."""
    if escaped:
        return loads(text[start:end])
    return PyUnicode_DecodeUTF8(<const char *> text + start + 1, end - start - 2, b"surrogatepass")


cdef Py_ssize_t first_in(const uint8_t *data, Py_ssize_t start, Py_ssize_t end, uint8_t opening) noexcept:
    """Where the first member of a value begins, or the bracket that closes it; -1 if the value is of another kind."""
    cdef Py_ssize_t at = json_space(data, start, end)
    return json_space(data, at + 1, end) if at < end and data[at] == opening else -1


cdef extern from "Python.h":
    PyObject *PyTuple_GET_ITEM(object items, Py_ssize_t at)
    int PyUnicode_CHECK_INTERNED(object text)

cdef enum:
    NAME_BUCKETS = 64
    NOT_WANTED = -1
    PREFIXED = -2
    FEW_MEMBERS = 8

# A name that is wanted, in UTF-8, and the next one of its bucket.
cdef struct WantedName:
    const char *text
    Py_ssize_t size
    int next

# A member that was found: which name it has, and the positions of _json._Found.
cdef struct Found:
    int slot
    Py_ssize_t name
    Py_ssize_t value
    Py_ssize_t value_end
    Py_ssize_t next


cdef inline int bucket(const char *name, Py_ssize_t size) noexcept:
    return (size * 7 + <uint8_t> name[0] * 3 + <uint8_t> name[size - 1]) & (NAME_BUCKETS - 1) if size else 0


@cython.final
cdef class JsonNames:
    cdef readonly frozenset names
    cdef readonly str prefix
    cdef tuple by_slot  # the names as str and in UTF-8
    cdef tuple in_utf8
    cdef dict slots
    cdef bytes prefix_utf8
    cdef WantedName *wanted
    cdef int[NAME_BUCKETS] first

    def __cinit__(self, names, str prefix not None=""):
        cdef Py_ssize_t i
        cdef int at
        self.names = frozenset(names)
        self.prefix = prefix
        self.prefix_utf8 = prefix.encode("utf-8", "surrogatepass")
        self.by_slot = tuple([intern(name) for name in self.names])
        self.in_utf8 = tuple([name.encode("utf-8", "surrogatepass") for name in self.by_slot])
        self.slots = {name: i for i, name in enumerate(self.by_slot)}
        self.wanted = <WantedName *> PyMem_Malloc((len(self.by_slot) + 1) * sizeof(WantedName))
        if self.wanted == NULL:
            raise MemoryError
        for at in range(NAME_BUCKETS):
            self.first[at] = NOT_WANTED
        for i in range(len(self.by_slot)):
            self.wanted[i].text = <bytes> self.in_utf8[i]
            self.wanted[i].size = len(<bytes> self.in_utf8[i])
            at = bucket(self.wanted[i].text, self.wanted[i].size)
            self.wanted[i].next = self.first[at]
            self.first[at] = <int> i

    def __dealloc__(self):
        PyMem_Free(self.wanted)

    cdef int slot_of(self, bytes text, Member *member) except -3:
        """Which wanted name a member has. Only a name with escapes is made a str for that."""
        cdef const char *name = <const char *> text + member.name + 1
        cdef Py_ssize_t size = member.name_end - member.name - 1, prefix_size = len(self.prefix_utf8)
        cdef int slot
        if member.escaped:
            return self.slot_of_str(string_at(text, member.name, member.name_end + 1, True))
        slot = self.first[bucket(name, size)]
        while slot != NOT_WANTED:
            if self.wanted[slot].size == size and memcmp(self.wanted[slot].text, name, size) == 0:
                return slot
            slot = self.wanted[slot].next
        if prefix_size and size >= prefix_size and memcmp(<const char *> self.prefix_utf8, name, prefix_size) == 0:
            return PREFIXED
        return NOT_WANTED

    cdef int slot_of_str(self, str name) except -3:
        slot = self.slots.get(name)
        if slot is not None:
            return slot
        return PREFIXED if self.prefix_utf8 and name.startswith(self.prefix) else NOT_WANTED


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class JsonObject:
    cdef readonly bytes text
    cdef JsonNames names
    cdef Py_ssize_t start, end, close  # of the object with the spaces around it; its closing brace
    cdef Py_ssize_t members_in_all, count, room
    cdef bint has_prefixed
    cdef Found *found
    cdef Found[FEW_MEMBERS] few

    def __cinit__(self, bytes text not None, JsonNames names not None, Py_ssize_t start=0, end=None):
        self.text = text
        self.names = names
        self.start = start
        self.end = len(text) if end is None else end
        self.found = self.few
        self.room = FEW_MEMBERS
        self.read(part_of(text, start, self.end))

    def __dealloc__(self):
        if self.found != self.few:
            PyMem_Free(self.found)

    cdef bint read(self, const uint8_t *data) except False:
        cdef Py_ssize_t end = self.end, at = first_in(data, self.start, end, b"{")
        cdef bint closed
        cdef int fault, slot
        cdef Member member
        if at < 0:
            raise no_object(data, self.start, end)
        closed = at < end and data[at] == b"}"
        while not closed:
            fault = json_member_at(data, at, end, True, &member)
            if fault:
                raise JsonTextError(fault, member.next)
            self.members_in_all += 1
            slot = self.names.slot_of(self.text, &member)
            if slot != NOT_WANTED:
                self.keep(slot, &member)
            at = member.next
            closed = member.last
        self.close = at
        at = json_space(data, at + 1, end)
        if at < end:
            raise JsonTextError(JSON_EXTRA, at)
        return True

    cdef bint keep(self, int slot, Member *member) except False:
        self.has_prefixed |= slot == PREFIXED
        if self.count == self.room or self.count == MOST_MEMBERS:
            self.make_room(member.name)
        self.found[self.count] = Found(slot, member.name, member.value, member.value_end, member.next)
        self.count += 1
        return True

    cdef bint make_room(self, Py_ssize_t at) except False:
        cdef Found *more
        if self.count == MOST_MEMBERS:
            raise JsonTextError(TOO_MANY_MEMBERS, at)
        more = <Found *> PyMem_Malloc(2 * self.room * sizeof(Found))
        if more == NULL:
            raise MemoryError
        memcpy(more, self.found, self.count * sizeof(Found))
        if self.found != self.few:
            PyMem_Free(self.found)
        self.found = more
        self.room *= 2
        return True

    cdef Found *last(self, str name) except? NULL:
        """The last member of this name; NULL if there is none."""
        cdef int slot
        cdef Py_ssize_t i
        # Nearly every name is a constant. Interned strings are equal only if they are the same object.
        if not self.has_prefixed and PyUnicode_CHECK_INTERNED(name):
            for i in range(self.count - 1, -1, -1):
                if PyTuple_GET_ITEM(self.names.by_slot, self.found[i].slot) == <PyObject *> name:
                    return &self.found[i]
            return NULL
        known = self.names.slots.get(name)
        slot = PREFIXED if known is None else known
        for i in range(self.count - 1, -1, -1):
            if self.found[i].slot == slot and (slot != PREFIXED or self.name_of(&self.found[i]) == name):
                return &self.found[i]
        return NULL

    cdef str name_of(self, Found *found):
        cdef Py_ssize_t at = found.name
        cdef bint escaped = False
        if found.slot >= 0:
            return <str> self.names.by_slot[found.slot]
        json_string(self.text, &at, self.end, &escaped)
        return string_at(self.text, found.name, at, escaped)

    @property
    def members(self):
        cdef list members = []
        cdef Py_ssize_t i
        for i in range(self.count):
            members.append((self.name_of(&self.found[i]), self.found[i].value, self.found[i].value_end))
        return members

    def __contains__(self, str name not None):
        return self.last(name) != NULL

    def has_any(self, JsonNames names not None):
        cdef Py_ssize_t i
        for i in range(self.count):
            if names.slot_of_str(self.name_of(&self.found[i])) != NOT_WANTED:
                return True
        return False

    def span(self, str name not None):
        cdef Found *found = self.last(name)
        return None if found == NULL else (found.value, found.value_end)

    def raw(self, str name not None):
        cdef Found *found = self.last(name)
        return None if found == NULL else part(self.text, found.value, found.value_end)

    def get(self, str name not None):
        cdef Found *found = self.last(name)
        return None if found == NULL else value_at(self.text, found.value, found.value_end)

    def inner(self, str name not None, JsonNames names not None):
        cdef Found *found = self.last(name)
        if found == NULL or (<const uint8_t *> self.text)[found.value] != b"{":
            return None
        try:
            return JsonObject(self.text, names, found.value, found.value_end)
        except JsonTextError:
            return None

    def spliced(self, frozenset owned not None, bytes added not None=b""):
        cdef const char *text = self.text
        cdef Py_ssize_t left = self.members_in_all, at = self.start, i, size
        cdef bint ends_in_comma = False
        cdef bytes out
        cdef char *to
        cdef Found *found
        # No byte is written twice: each is kept, added, a comma or the brace.
        out = PyBytes_FromStringAndSize(NULL, self.close - self.start + len(added) + 2)
        to = out
        for i in range(self.count):
            found = &self.found[i]
            if self.name_of(found) in owned:
                memcpy(to, text + at, found.name - at)
                to += found.name - at
                left -= 1
                ends_in_comma = found.next == self.close
                at = found.next
        if at == self.start and not added:
            return part(self.text, self.start, self.end)
        memcpy(to, text + at, self.close - at)
        to += self.close - at
        if added:
            if left and not ends_in_comma:
                to[0] = b","
                to += 1
            memcpy(to, <const char *> added, len(added))
            to += len(added)
        elif ends_in_comma and left:
            while (to - 1)[0] != b",":  # nothing but spaces is behind it
                to -= 1
            to -= 1
        to[0] = b"}"
        size = to + 1 - <char *> out
        return out if size == len(out) else out[:size]


cdef inline bytes part(bytes text, Py_ssize_t start, Py_ssize_t end):
    """text[start:end]"""
    if start == 0 and end == len(text):
        return text
    return PyBytes_FromStringAndSize(<const char *> text + start, end - start)


cdef object value_at(bytes text, Py_ssize_t start, Py_ssize_t end):
    """The value that stands at text[start:end], which is JSON."""
    cdef const uint8_t *data = text
    cdef uint8_t first = data[start]
    cdef Py_ssize_t at = start
    cdef int64_t number = 0
    if first == b'"':
        return string_at(text, start, end, memchr(data + start, b"\\", end - start) != NULL)
    if first == b"{" or first == b"[":
        return part(text, start, end)
    if first == b"t":
        return True
    if first == b"f":
        return False
    if first == b"n":
        return None
    while at < end and at < start + 18 and c"0" <= data[at] <= c"9":
        number = number * 10 + (data[at] - c"0")
        at += 1
    if at == end:
        return number
    while at < end and (data[at] == c"-" or c"0" <= data[at] <= c"9"):
        at += 1
    written = text[start:end]
    try:
        return int(written) if at == end else float(written)
    except ValueError:  # an integer with more digits than Python reads
        return copysign(inf, float(written))


cdef object no_object(const uint8_t *data, Py_ssize_t start, Py_ssize_t end):
    """What is wrong with a text that does not begin as an object does."""
    cdef Py_ssize_t first = json_space(data, start, end), at = first
    cdef int fault = json_value(data, &at, end)
    if fault:
        return JsonTextError(fault, at)
    at = json_space(data, at, end)
    return JsonTextError(NO_OBJECT, first) if at == end else JsonTextError(JSON_EXTRA, at)


def json_elements(bytes text not None, Py_ssize_t start, Py_ssize_t end, Py_ssize_t most):
    cdef const uint8_t *data = part_of(text, start, end)
    cdef Py_ssize_t at = first_in(data, start, end, b"[")
    cdef int fault
    cdef Member member
    cdef list found = []
    if at < 0:
        raise JsonTextError(JSON_NO_VALUE, start)
    if at < end and data[at] == b"]":
        return found
    while len(found) < most:
        fault = json_member_at(data, at, end, False, &member)
        if fault:
            raise JsonTextError(fault, member.next)
        found.append((member.value, member.value_end))
        if member.last:
            break
        at = member.next
    return found


cdef inline bint is_named(bytes text, Member *member, bytes name) except -1:
    """Whether a member has this name, which is ASCII. Names with escapes are rare."""
    cdef Py_ssize_t size = member.name_end - member.name - 1
    if member.escaped:
        return string_at(text, member.name, member.name_end + 1, True) == name.decode()
    return size == len(name) and memcmp(<const char *> text + member.name + 1, <const char *> name, size) == 0


cdef bint last_value(bytes text, Py_ssize_t start, Py_ssize_t end, bytes name, Member *last) except -1:
    """Find the member of an object with this name: of duplicates, the last. Returns whether there is one."""
    cdef const uint8_t *data = text
    cdef Py_ssize_t at = first_in(data, start, end, b"{")
    cdef bint closed = at < 0 or (at < end and data[at] == b"}"), found = False
    cdef int fault
    cdef Member member
    while not closed:
        fault = json_member_at(data, at, end, True, &member)
        if fault:
            raise JsonTextError(fault, member.next)
        if is_named(text, &member, name):
            last[0] = member
            found = True
        at = member.next
        closed = member.last
    return found


cdef bint known_parts(bytes text, Py_ssize_t start, Py_ssize_t end, frozenset known, bint in_content) except -1:
    """json_known_parts for an array of messages, or for their contents, which are arrays of parts."""
    cdef const uint8_t *data = text
    cdef Py_ssize_t at = first_in(data, start, end, b"[")
    cdef bint closed = at < 0 or (at < end and data[at] == b"]"), escaped
    cdef int fault
    cdef Member each, member
    while not closed:
        fault = json_member_at(data, at, end, False, &each)
        if fault:
            raise JsonTextError(fault, each.next)
        if data[each.value] == b"{":
            if not in_content:
                if last_value(text, each.value, each.value_end, b"content", &member):
                    if not known_parts(text, member.value, member.value_end, known, True):
                        return False
            elif not last_value(text, each.value, each.value_end, b"type", &member) or data[member.value] != b'"':
                return False
            else:
                at, escaped = member.value, False
                json_string(data, &at, member.value_end, &escaped)
                if string_at(text, member.value, member.value_end, escaped) not in known:
                    return False
        at = each.next
        closed = each.last
    return True


def json_known_parts(bytes text not None, Py_ssize_t start, Py_ssize_t end, frozenset known not None):
    part_of(text, start, end)
    return known_parts(text, start, end, known, False)


def json_start(bytes text not None, Py_ssize_t start, Py_ssize_t end, Py_ssize_t most):
    cdef const uint8_t *data = part_of(text, start, end)
    most = max(0, min(most, end - start))
    cdef uint8_t *out = <uint8_t *> PyMem_Malloc(most + 1)
    if out == NULL:
        raise MemoryError
    try:
        return PyBytes_FromStringAndSize(<char *> out, json_compact(data, start, end, out, most))
    finally:
        PyMem_Free(out)


def json_chat_start(
    bytes text not None, Py_ssize_t start, Py_ssize_t end, frozenset leading not None, Py_ssize_t most
):
    cdef const uint8_t *data = part_of(text, start, end)
    cdef Py_ssize_t at = first_in(data, start, end, b"["), system = 0, rest = 0, room
    cdef bint in_rest = False, closed
    cdef int fault, count, i
    cdef Member message
    cdef Member[JSON_SORTED] members
    if at < 0:
        raise JsonTextError(JSON_NO_VALUE, start)
    closed = at < end and data[at] == b"]"
    cdef uint8_t *out = <uint8_t *> PyMem_Malloc(end - start)  # no message is written longer than it stands there
    if out == NULL:
        raise MemoryError
    try:
        while not closed and (rest < most or not in_rest):
            fault = json_member_at(data, at, end, False, &message)
            if fault:
                raise JsonTextError(fault, message.next)
            count = json_collect(data, message.value, message.value_end, members, JSON_SORTED)
            if not in_rest:
                in_rest = True
                for i in range(count):
                    if is_named(text, &members[i], b"role") and text[members[i].value:members[i].value_end] in leading:
                        in_rest = False
            room = message.value_end - message.value
            if in_rest:
                room = min(room, most - rest)
            if count < 0:
                room = json_compact(data, message.value, message.value_end, out + system + rest, room)
            else:
                room = json_sorted(data, members, count, out + system + rest, room)
            if in_rest:
                rest += room
            else:
                system += room
            at = message.next
            closed = message.last
        return out[:system], out[system:system + rest]
    finally:
        PyMem_Free(out)


cdef extern from "words.h" nogil:
    enum:
        WORD_BUCKETS
        WORD_PIECES
        WORD_NEAR_BYTES
        MOST_OF_A_WORD

    struct WordCounts "word_counts":
        Py_ssize_t words
        Py_ssize_t end_from
        uint32_t end_times

    void words_of_text(const uint8_t *text, Py_ssize_t size, WordCounts *into)
    void words_of_tokens(const uint8_t *text, Py_ssize_t size, WordCounts *into)
    void words_taken(WordCounts *seen, uint16_t *buckets, uint16_t *counts)
    Py_ssize_t word_unescaped(const uint8_t *text, Py_ssize_t at, Py_ssize_t end, uint8_t *out)
    float words_latent(const uint16_t *buckets, const uint16_t *counts, Py_ssize_t words, const float *weight,
                       const int8_t *table, const float *scale, Py_ssize_t rank, float *out)
    void words_scores(const float *mean, const float *latent, const float *map, Py_ssize_t rank, Py_ssize_t size,
                      float *out)


# One text is counted at a time: nothing here lets another thread run.
cdef WordCounts seen


cdef tuple taken():
    cdef cnp.npy_intp size = seen.words
    buckets = cnp.PyArray_EMPTY(1, &size, NPY_UINT16, 0)
    counts = cnp.PyArray_EMPTY(1, &size, NPY_UINT16, 0)
    words_taken(&seen, <uint16_t *> cnp.PyArray_DATA(buckets), <uint16_t *> cnp.PyArray_DATA(counts))
    return buckets, counts


cdef void weigh_end(Py_ssize_t size, Py_ssize_t end_bytes, Py_ssize_t end_times) except *:
    if end_bytes < 0 or not 1 <= end_times <= MOST_OF_A_WORD:
        raise unfit("end_bytes or end_times", "0 or more, and 1 to 65535")
    seen.end_from = size - end_bytes
    seen.end_times = <uint32_t> end_times


def text_words(bytes text not None, Py_ssize_t end_bytes=0, Py_ssize_t end_times=1):
    weigh_end(len(text), end_bytes, end_times)
    words_of_text(text, len(text), &seen)
    return taken()


def token_words(
    bytes text not None, Py_ssize_t start, Py_ssize_t end, Py_ssize_t end_bytes=0, Py_ssize_t end_times=1
):
    part = part_of(text, start, end)
    weigh_end(end - start, end_bytes, end_times)
    words_of_tokens(part + start, end - start, &seen)
    return taken()


def words_to_latent(object buckets, object counts, object weight, object table, object scale, object latent):
    cdef Py_ssize_t words = size_of(buckets), rank = size_of(latent)
    return words_latent(
        <const uint16_t *> readable(buckets, "buckets", NPY_UINT16, words),
        <const uint16_t *> readable(counts, "counts", NPY_UINT16, words),
        words,
        <const float *> readable(weight, "weight", NPY_FLOAT32, WORD_BUCKETS),
        <const int8_t *> readable(table, "table", NPY_INT8, WORD_BUCKETS * rank),
        <const float *> readable(scale, "scale", NPY_FLOAT32, rank),
        rank,
        <float *> writable(latent, "latent", NPY_FLOAT32, rank),
    )


def latent_to_scores(object mean, object latent, object up, object scores):
    cdef Py_ssize_t size = size_of(mean), rank = size_of(latent)
    words_scores(
        <const float *> readable(mean, "mean", NPY_FLOAT32, size),
        <const float *> readable(latent, "latent", NPY_FLOAT32, rank),
        <const float *> readable(up, "up", NPY_FLOAT32, rank * size),
        rank,
        size,
        <float *> writable(scores, "scores", NPY_FLOAT32, size),
    )


cdef struct Pieces:
    # Where the texts of a prompt stand: a ring of the last ones.
    Py_ssize_t[WORD_PIECES] start
    Py_ssize_t[WORD_PIECES] end
    Py_ssize_t count


cdef void add_piece(Pieces *pieces, Member *string) noexcept:
    cdef Py_ssize_t at = pieces.count % WORD_PIECES
    pieces.start[at] = string.value + 1
    pieces.end[at] = string.value_end - 1
    pieces.count += 1


cdef bint add_texts(bytes text, Member *value, frozenset leading, int level, Pieces *pieces) except -1:
    """Add the texts of a prompt. level: 0 for all of it, 1 for its messages or prompts, 2 for the parts of a message."""
    cdef const uint8_t *data = text
    cdef Py_ssize_t at
    cdef bint in_front = True
    cdef int fault
    cdef Member each, member
    if data[value.value] == b'"':
        add_piece(pieces, value)
        return True
    at = first_in(data, value.value, value.value_end, b"[")
    if at < 0 or at < value.value_end and data[at] == b"]":
        return True
    while True:
        fault = json_member_at(data, at, value.value_end, False, &each)
        if fault:
            raise JsonTextError(fault, each.next)
        if data[each.value] == b'"':
            add_piece(pieces, &each)
        elif data[each.value] == b"{":
            if level == 0:
                in_front = (
                    in_front
                    and last_value(text, each.value, each.value_end, b"role", &member)
                    and text[member.value:member.value_end] in leading
                )
                if not in_front and last_value(text, each.value, each.value_end, b"content", &member):
                    add_texts(text, &member, leading, 1, pieces)
            elif last_value(text, each.value, each.value_end, b"text", &member) and data[member.value] == b'"':
                add_piece(pieces, &member)
        if each.last:
            return True
        at = each.next


def json_texts(bytes text not None, Py_ssize_t start, Py_ssize_t end, frozenset leading not None, Py_ssize_t most):
    cdef const uint8_t *data = part_of(text, start, end)
    cdef Pieces pieces
    cdef Member whole
    cdef Py_ssize_t first, left, at, size = 0
    cdef uint8_t *out
    pieces.count = 0
    whole.value, whole.value_end = json_space(data, start, end), end
    if whole.value == end:
        raise JsonTextError(JSON_NO_VALUE, start)
    if data[whole.value] == b'"':
        while data[whole.value_end - 1] in (b" ", b"\t", b"\n", b"\r"):
            whole.value_end -= 1
        if whole.value_end - whole.value < 2 or data[whole.value_end - 1] != b'"':
            raise JsonTextError(JSON_OPEN_STRING, whole.value)
    add_texts(text, &whole, leading, 0, &pieces)
    first, left = pieces.count, max(0, most)
    while first > 0 and first > pieces.count - WORD_PIECES and left > 0:
        first -= 1
        at = first % WORD_PIECES
        if pieces.end[at] - pieces.start[at] > left:
            pieces.start[at] = behind_cut(data, pieces.end[at] - left, pieces.end[at])
            left = 0
        else:
            left -= pieces.end[at] - pieces.start[at] + 1
    out = <uint8_t *> PyMem_Malloc(max(0, most) + 1)
    if out == NULL:
        raise MemoryError
    try:
        while first < pieces.count:
            at = first % WORD_PIECES
            size += word_unescaped(data, pieces.start[at], pieces.end[at], out + size)
            first += 1
            if first < pieces.count:
                out[size] = b"\n"
                size += 1
        return out[:size]
    finally:
        PyMem_Free(out)


cdef Py_ssize_t behind_cut(const uint8_t *data, Py_ssize_t at, Py_ssize_t end) noexcept:
    """Where a string that is cut before `at` begins again: behind a space that is near, else at a character."""
    cdef Py_ssize_t near = at
    while near < end and near < at + WORD_NEAR_BYTES:
        near += 1
        if data[near - 1] == b" ":
            return near
    while at < end and data[at] & 0xC0 == 0x80:
        at += 1
    return at
