/* Reads JSON text where it stands: what is a value, and where each member begins and ends. _json.py does the same in
   Python, and says what is read.

   The text is checked and not changed. Nothing is allocated, and nothing recurses, so a body of brackets alone costs no
   more than one of words. Every function reads within text[at..end). */
#ifndef ELDR_JSON_TEXT_H
#define ELDR_JSON_TEXT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* The levels that a text may have: _types.JSON_DEPTH. A bit each says whether the level is an object. */
#define JSON_DEPTH 65536

/* The members of an object that json_sorted sorts. A message has a handful. */
enum { JSON_SORTED = 32 };

/* The indices of _types.JSON_FAULTS. */
enum {
    JSON_SOUND,
    JSON_NO_VALUE,
    JSON_NO_NAME,
    JSON_NO_COLON,
    JSON_NO_COMMA,
    JSON_OPEN_STRING,
    JSON_CONTROL,
    JSON_ESCAPE,
    JSON_UTF8,
    JSON_EXTRA,
    JSON_TOO_DEEP
};

/* A member of an object, or an element of an array, which has no name: `name` and `name_end` are its quotes.
   next: where the one behind it begins, or where the closing bracket stands if `last`. After a fault: where it is. */
struct json_member {
    ptrdiff_t name, name_end, value, value_end, next;
    int escaped, last;
};

static inline ptrdiff_t json_space(const uint8_t *text, ptrdiff_t at, ptrdiff_t end) {
    while (at < end && (text[at] == ' ' || text[at] == '\n' || text[at] == '\r' || text[at] == '\t')) at++;
    return at;
}

/* Behind the bytes of a string that need no look: ASCII without quotes, backslashes and control characters. */
static inline ptrdiff_t json_plain(const uint8_t *text, ptrdiff_t at, ptrdiff_t end) {
#ifdef __SSE2__
    const __m128i quote = _mm_set1_epi8('"'), backslash = _mm_set1_epi8('\\'), space = _mm_set1_epi8(' ');
    for (; end - at >= 16; at += 16) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(text + at));
        /* Bytes above 127 are below the space as well, since the comparison is signed. */
        const __m128i odd = _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, backslash)),
                                         _mm_cmplt_epi8(bytes, space));
        const int mask = _mm_movemask_epi8(odd);
        if (mask) return at + __builtin_ctz((unsigned)mask);
    }
#endif
    while (at < end && text[at] >= 0x20 && text[at] < 0x80 && text[at] != '"' && text[at] != '\\') at++;
    return at;
}

static inline int json_hex(uint8_t c) { return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'f'); }

static inline int json_tail(uint8_t c) { return (c & 0xC0) == 0x80; }

/* The length of the UTF-8 character that begins with a byte above 127; 0 if there is none. A surrogate may be written in
   three bytes, since CPython's json decodes with "surrogatepass". */
static inline int json_character(const uint8_t *text, ptrdiff_t left) {
    const uint8_t c = text[0];
    if (c < 0xC2 || c > 0xF4) return 0;
    if (c < 0xE0) return left >= 2 && json_tail(text[1]) ? 2 : 0;
    if (c < 0xF0) {
        if (left < 3 || !json_tail(text[1]) || !json_tail(text[2]) || (c == 0xE0 && text[1] < 0xA0)) return 0;
        return 3;
    }
    if (left < 4 || !json_tail(text[1]) || !json_tail(text[2]) || !json_tail(text[3])) return 0;
    return (c == 0xF0 && text[1] < 0x90) || (c == 0xF4 && text[1] > 0x8F) ? 0 : 4;
}

/* From the opening quote to behind the closing one. */
static int json_string(const uint8_t *text, ptrdiff_t *position, ptrdiff_t end, int *escaped) {
    ptrdiff_t at = *position + 1;
    for (;;) {
        *position = at = json_plain(text, at, end);
        if (at >= end) return JSON_OPEN_STRING;
        const uint8_t c = text[at];
        if (c == '"') {
            *position = at + 1;
            return JSON_SOUND;
        }
        if (c < 0x20) return JSON_CONTROL;
        if (c == '\\') {
            *escaped = 1;
            if (at + 1 >= end) return JSON_OPEN_STRING;
            switch (text[at + 1]) {
            case '"': case '\\': case '/': case 'b': case 'f': case 'n': case 'r': case 't':
                at += 2;
                break;
            case 'u':
                if (end - at < 6) return JSON_ESCAPE;
                for (int i = 2; i < 6; i++)
                    if (!json_hex(text[at + i])) return JSON_ESCAPE;
                at += 6;
                break;
            default:
                return JSON_ESCAPE;
            }
            continue;
        }
        do { /* text of another script has many in a row */
            const int length = json_character(text + at, end - at);
            if (!length) {
                *position = at;
                return JSON_UTF8;
            }
            at += length;
        } while (at < end && text[at] >= 0x80);
    }
}

static inline ptrdiff_t json_digits(const uint8_t *text, ptrdiff_t at, ptrdiff_t end) {
    while (at < end && text[at] >= '0' && text[at] <= '9') at++;
    return at;
}

/* Behind the number that begins here, or -1. The longest one is taken, as CPython does: of "1." it is "1". */
static inline ptrdiff_t json_number(const uint8_t *text, ptrdiff_t at, ptrdiff_t end) {
    if (at < end && text[at] == '-') at++;
    if (at >= end || text[at] < '0' || text[at] > '9') return -1;
    at = text[at] == '0' ? at + 1 : json_digits(text, at + 1, end);
    if (end - at >= 2 && text[at] == '.' && text[at + 1] >= '0' && text[at + 1] <= '9')
        at = json_digits(text, at + 2, end);
    if (at < end && (text[at] | 32) == 'e') {
        const ptrdiff_t first = at + 1 < end && (text[at + 1] == '+' || text[at + 1] == '-') ? at + 2 : at + 1;
        const ptrdiff_t behind = json_digits(text, first, end);
        if (behind > first) at = behind;
    }
    return at;
}

static inline int json_word(const uint8_t *text, ptrdiff_t *position, ptrdiff_t end, const char *word, ptrdiff_t size) {
    if (end - *position < size || memcmp(text + *position, word, (size_t)size) != 0) return JSON_NO_VALUE;
    *position += size;
    return JSON_SOUND;
}

/* A value that is no array and no object. NaN and the infinities are none in RFC 8259, but CPython's json reads them. */
static int json_scalar(const uint8_t *text, ptrdiff_t *position, ptrdiff_t end) {
    int escaped;
    switch (text[*position]) {
    case '"': return json_string(text, position, end, &escaped);
    case 't': return json_word(text, position, end, "true", 4);
    case 'f': return json_word(text, position, end, "false", 5);
    case 'n': return json_word(text, position, end, "null", 4);
    case 'N': return json_word(text, position, end, "NaN", 3);
    case 'I': return json_word(text, position, end, "Infinity", 8);
    default: break;
    }
    const ptrdiff_t behind = json_number(text, *position, end);
    if (behind < 0) return json_word(text, position, end, "-Infinity", 9);
    *position = behind;
    return JSON_SOUND;
}

/* A name and its colon, and the spaces behind. */
static int json_name(const uint8_t *text, ptrdiff_t *position, ptrdiff_t end, ptrdiff_t *name_end, int *escaped) {
    if (*position >= end || text[*position] != '"') return JSON_NO_NAME;
    const int fault = json_string(text, position, end, escaped);
    if (fault) return fault;
    *name_end = *position - 1;
    *position = json_space(text, *position, end);
    if (*position >= end || text[*position] != ':') return JSON_NO_COLON;
    *position = json_space(text, *position + 1, end);
    return JSON_SOUND;
}

/* From the first byte of a value to behind it. */
static int json_value(const uint8_t *text, ptrdiff_t *position, ptrdiff_t end) {
    uint64_t object[JSON_DEPTH / 64]; /* a bit is set or cleared before it is read */
    ptrdiff_t depth = 0, name_end;
    int fault, escaped;
    for (;;) {
        if (*position >= end) return JSON_NO_VALUE;
        const uint8_t c = text[*position];
        if (c == '{' || c == '[') {
            if (depth == JSON_DEPTH) return JSON_TOO_DEEP;
            const uint64_t bit = UINT64_C(1) << (depth & 63);
            if (c == '{') object[depth >> 6] |= bit;
            else object[depth >> 6] &= ~bit;
            depth++;
            *position = json_space(text, *position + 1, end);
            if (*position >= end || text[*position] != c + 2) {
                if (c == '{' && (fault = json_name(text, position, end, &name_end, &escaped))) return fault;
                continue;
            }
            ++*position;
            depth--;
        } else if ((fault = json_scalar(text, position, end))) {
            return fault;
        }
        for (;;) { /* behind a value */
            if (!depth) return JSON_SOUND;
            const int named = object[(depth - 1) >> 6] >> ((depth - 1) & 63) & 1;
            *position = json_space(text, *position, end);
            if (*position >= end) return JSON_NO_COMMA;
            const uint8_t mark = text[*position];
            if (mark == ',') {
                *position = json_space(text, *position + 1, end);
                if (named && (fault = json_name(text, position, end, &name_end, &escaped))) return fault;
                break;
            }
            if (mark != (named ? '}' : ']')) return JSON_NO_COMMA;
            ++*position;
            depth--;
        }
    }
}

/* The member of an object (named) or the element of an array that begins at `at`. */
static int json_member_at(const uint8_t *text, ptrdiff_t at, ptrdiff_t end, int named, struct json_member *found) {
    int fault;
    found->next = found->name = at;
    found->escaped = 0;
    if (named && (fault = json_name(text, &found->next, end, &found->name_end, &found->escaped))) return fault;
    found->value = found->next;
    if ((fault = json_value(text, &found->next, end))) return fault;
    found->value_end = found->next;
    found->next = json_space(text, found->next, end);
    if (found->next >= end) return JSON_NO_COMMA;
    found->last = text[found->next] == (named ? '}' : ']');
    if (found->last) return JSON_SOUND;
    if (text[found->next] != ',') return JSON_NO_COMMA;
    found->next = json_space(text, found->next + 1, end);
    return JSON_SOUND;
}

/* The number that four hexadecimal digits write. */
static inline uint32_t json_unit(const uint8_t *digits) {
    uint32_t unit = 0;
    for (int i = 0; i < 4; i++) unit = unit << 4 | ((digits[i] & 15u) + (digits[i] > '9' ? 9u : 0u));
    return unit;
}

/* The character that an escape \uXXXX writes, as UTF-8; as it is if it must be escaped. Sets what was read and written. */
static inline void json_unescape(const uint8_t *text, ptrdiff_t left, uint8_t *out, ptrdiff_t *read, ptrdiff_t *written) {
    uint32_t code = json_unit(text + 2);
    *read = 6;
    if (code < 0x20 || code == '"' || code == '\\') {
        memcpy(out, text, 6);
        *written = 6;
        return;
    }
    if ((code & 0xFC00) == 0xD800 && left >= 12 && text[6] == '\\' && text[7] == 'u') {
        const uint32_t low = json_unit(text + 8);
        if ((low & 0xFC00) == 0xDC00) {
            code = 0x10000 + ((code & 0x3FF) << 10 | (low & 0x3FF));
            *read = 12;
        }
    }
    const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const uint8_t first[] = {0, 0xC0, 0xE0, 0xF0};
    out[0] = (uint8_t)(first[more] | code >> (6 * more));
    for (int i = 1; i <= more; i++) out[i] = (uint8_t)(0x80 | (code >> (6 * (more - i)) & 0x3F));
    *written = more + 1;
}

/* Writes the first `room` bytes of a JSON text, without spaces, and with characters instead of their escapes. Returns how
   many bytes were written. The text has been read before. */
static ptrdiff_t json_compact(const uint8_t *text, ptrdiff_t at, ptrdiff_t end, uint8_t *out, ptrdiff_t room) {
    ptrdiff_t size = 0;
    int quoted = 0;
    while (at < end && size < room) {
        const uint8_t c = text[at];
        if (c == '"') {
            quoted = !quoted;
        } else if (!quoted) {
            at++;
            if (c > ' ') out[size++] = c;
            continue;
        } else if (c == '\\') {
            uint8_t character[6] = {c};
            ptrdiff_t read = 2, written = 2;
            if (end - at < 2) return size;
            if (text[at + 1] == '/') {
                character[0] = '/';
                written = 1;
            } else if (text[at + 1] == 'u' && end - at >= 6) {
                json_unescape(text + at, end - at, character, &read, &written);
            } else {
                character[1] = text[at + 1];
            }
            if (written > room - size) written = room - size;
            memcpy(out + size, character, (size_t)written);
            at += read;
            size += written;
            continue;
        } else {
            ptrdiff_t plain = json_plain(text, at, end) - at;
            if (plain > room - size) plain = room - size;
            if (plain > 0) {
                memcpy(out + size, text + at, (size_t)plain);
                at += plain;
                size += plain;
                continue;
            }
        }
        out[size++] = c;
        at++;
    }
    return size;
}

/* The members of the object that begins at `at`. Returns how many there are; -1 if there are more than `most`, or if it
   is no object. */
static int json_collect(const uint8_t *text, ptrdiff_t at, ptrdiff_t end, struct json_member *found, int most) {
    int count = 0;
    if (at >= end || text[at] != '{') return -1;
    at = json_space(text, at + 1, end);
    if (at < end && text[at] == '}') return 0;
    do {
        if (count == most || json_member_at(text, at, end, 1, found + count)) return -1;
        at = found[count].next;
    } while (!found[count++].last);
    return count;
}

/* Writes the first `room` bytes of an object as json_compact does, its members sorted by name. */
static ptrdiff_t json_sorted(const uint8_t *text, struct json_member *members, int count, uint8_t *out, ptrdiff_t room) {
    ptrdiff_t size = 0;
    for (int i = 1; i < count; i++) {
        const struct json_member one = members[i];
        const ptrdiff_t length = one.name_end - one.name;
        int k = i;
        for (; k > 0; k--) {
            const ptrdiff_t other = members[k - 1].name_end - members[k - 1].name;
            const int order = memcmp(text + members[k - 1].name, text + one.name, (size_t)(other < length ? other : length));
            if (order < 0 || (order == 0 && other <= length)) break;
            members[k] = members[k - 1];
        }
        members[k] = one;
    }
    for (int i = 0; i < count && size < room; i++) {
        out[size++] = i ? ',' : '{';
        size += json_compact(text, members[i].name, members[i].name_end + 1, out + size, room - size);
        if (size == room) break;
        out[size++] = ':';
        size += json_compact(text, members[i].value, members[i].value_end, out + size, room - size);
    }
    return size;
}

#endif
