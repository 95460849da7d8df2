/* The words of a text, hashed and counted, and what a prompt model makes of them. _words.py says what each computes, and
   does the same in Python.

   Nothing is checked here: sizes are those that _compiled_words.pyx has checked. */
#ifndef ELDR_WORDS_H
#define ELDR_WORDS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "json_text.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define WORDS_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WORDS_FOR_EACH_CPU
#endif

/* A word's hash is its top 16 bits. */
#define WORD_BUCKETS 65536
/* Counts stop here. */
#define MOST_OF_A_WORD 65535

/* Of a prompt in more pieces than this, the last ones are looked at. */
#define WORD_PIECES 1024
/* Behind a cut, so many bytes are searched for a space. */
#define WORD_NEAR_BYTES 64

#define WORD_SEED UINT64_C(0xCBF29CE484222325)
#define WORD_PRIME UINT64_C(0x100000001B3)
#define WORD_MIX UINT64_C(0x9E3779B97F4A7C15)

/* How often each word was seen. count: all zero between two texts. touched: the buckets of this text, in their order.
   A word is seen once, but `end_times` from the byte `end_from` on. */
struct word_counts {
    uint16_t count[WORD_BUCKETS];
    uint16_t touched[WORD_BUCKETS];
    ptrdiff_t words;
    ptrdiff_t end_from;
    uint32_t end_times;
};

static inline uint64_t word_byte(uint64_t hash, uint8_t c) { return (hash ^ c) * WORD_PRIME; }

static inline void word_seen(struct word_counts *into, uint64_t hash, ptrdiff_t at) {
    const uint16_t bucket = (uint16_t)(((hash ^ hash >> 32) * WORD_MIX) >> 48);
    const uint32_t before = into->count[bucket], count = before + (at < into->end_from ? 1 : into->end_times);
    if (!before) into->touched[into->words++] = bucket;
    into->count[bucket] = (uint16_t)(count < MOST_OF_A_WORD ? count : MOST_OF_A_WORD);
}

static inline int word_letter(uint8_t c) { return (uint8_t)((c | 32) - 'a') < 26; }

/* The bytes of the character that begins with a byte above 127, by that byte alone. Text may be cut anywhere. */
static inline ptrdiff_t word_character(uint8_t c, ptrdiff_t left) {
    const ptrdiff_t length = c < 0xC0 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    return length < left ? length : left;
}

static void words_of_text(const uint8_t *text, ptrdiff_t size, struct word_counts *into) {
    ptrdiff_t at = 0, before = 0, before_end = 0; /* the last character above 127 */
    while (at < size) {
        const uint8_t c = text[at];
        const ptrdiff_t start = at;
        uint64_t hash = WORD_SEED;
        if (word_letter(c)) {
            do hash = word_byte(hash, text[at++] | 32);
            while (at < size && word_letter(text[at]));
            word_seen(into, hash, start);
        } else if (c < 0x80) {
            at++;
            if (c == ' ' || c == '\t' || c == '\r') continue;
            word_seen(into, word_byte(hash, c), start);
        } else {
            at += word_character(c, size - at);
            for (ptrdiff_t i = start; i < at; i++) hash = word_byte(hash, text[i]);
            word_seen(into, hash, start);
            if (before_end == start && start > before) {
                hash = WORD_SEED;
                for (ptrdiff_t i = before; i < at; i++) hash = word_byte(hash, text[i]);
                word_seen(into, hash, start);
            }
            before = start;
            before_end = at;
        }
    }
}

/* Runs of digits are token ids. They are hashed with a byte in front that no word begins with. */
static void words_of_tokens(const uint8_t *text, ptrdiff_t size, struct word_counts *into) {
    ptrdiff_t at = 0;
    while (at < size) {
        if ((uint8_t)(text[at] - '0') > 9) {
            at++;
            continue;
        }
        const ptrdiff_t start = at;
        uint64_t hash = word_byte(WORD_SEED, 0);
        do hash = word_byte(hash, text[at++]);
        while (at < size && (uint8_t)(text[at] - '0') <= 9);
        word_seen(into, hash, start);
    }
}

/* Writes the counts of the words seen, and forgets them. */
static void words_taken(struct word_counts *from, uint16_t *buckets, uint16_t *counts) {
    for (ptrdiff_t i = 0; i < from->words; i++) {
        const uint16_t bucket = from->touched[i];
        buckets[i] = bucket;
        counts[i] = from->count[bucket];
        from->count[bucket] = 0;
    }
    from->words = 0;
}

/* The characters of a part of a JSON string, which may begin within an escape. Returns how many bytes they take, never
   more than they do in JSON. */
static ptrdiff_t word_unescaped(const uint8_t *text, ptrdiff_t at, ptrdiff_t end, uint8_t *out) {
    static const char named[] = "b\bf\fn\nr\rt\t";
    ptrdiff_t size = 0;
    while (at < end) {
        const ptrdiff_t plain = json_plain(text, at, end) - at;
        memcpy(out + size, text + at, (size_t)plain);
        size += plain;
        at += plain;
        if (at >= end) break;
        if (text[at] != '\\' || at + 1 >= end) {
            out[size++] = text[at++];
            continue;
        }
        const uint8_t c = text[at + 1];
        ptrdiff_t read = 2, written = 1;
        out[size] = c;
        if (c == 'u' && end - at >= 6 && json_hex(text[at + 2]) && json_hex(text[at + 3]) && json_hex(text[at + 4]) &&
            json_hex(text[at + 5])) {
            const uint32_t unit = json_unit(text + at + 2);
            if (unit < 0x80) {
                out[size] = (uint8_t)unit;
                read = 6;
            } else {
                uint8_t character[6];
                json_unescape(text + at, end - at, character, &read, &written);
                memcpy(out + size, character, (size_t)written);
            }
        } else {
            for (int i = 0; named[i]; i += 2)
                if (c == named[i]) out[size] = (uint8_t)named[i + 1];
        }
        size += written;
        at += read;
    }
    return size;
}

/* Sums the rows of the table by the weights of the words, and scales the sum to weights of length one. Returns the length
   of the weights. */
static float words_latent(const uint16_t *buckets, const uint16_t *counts, ptrdiff_t words, const float *weight,
                          const int8_t *table, const float *scale, ptrdiff_t rank, float *out) {
    float squares = 0;
    for (ptrdiff_t r = 0; r < rank; r++) out[r] = 0;
    for (ptrdiff_t i = 0; i < words; i++) {
        const float by = sqrtf(counts[i]) * weight[buckets[i]];
        const int8_t *row = table + (ptrdiff_t)buckets[i] * rank;
        squares += by * by;
        for (ptrdiff_t r = 0; r < rank; r++) out[r] += by * row[r];
    }
    const float length = sqrtf(squares);
    for (ptrdiff_t r = 0; r < rank; r++) out[r] *= length > 0 ? scale[r] / length : 0;
    return length;
}

/* mean + latent @ map */
WORDS_FOR_EACH_CPU
static void words_scores(const float *mean, const float *latent, const float *map, ptrdiff_t rank, ptrdiff_t size,
                         float *out) {
    enum { BLOCK = 1024 }; /* a block of sums stays in the first cache */
    for (ptrdiff_t from = 0; from < size; from += BLOCK) {
        const ptrdiff_t count = size - from < BLOCK ? size - from : BLOCK;
        float *sums = out + from;
        memcpy(sums, mean + from, (size_t)count * sizeof *sums);
        ptrdiff_t r = 0;
        for (; r + 4 <= rank; r += 4) {
            const float *row = map + r * size + from;
            const float a = latent[r], b = latent[r + 1], c = latent[r + 2], d = latent[r + 3];
            for (ptrdiff_t i = 0; i < count; i++)
                sums[i] += a * row[i] + b * row[i + size] + c * row[i + 2 * size] + d * row[i + 3 * size];
        }
        for (; r < rank; r++) {
            const float *row = map + r * size + from;
            for (ptrdiff_t i = 0; i < count; i++) sums[i] += latent[r] * row[i];
        }
    }
}

#endif
