// Products of many tokens that do not multiply what is pruned: what is the same for all instruction sets.
//
// Vectors hold tokens. A band of rows goes through its columns a span at a time: the span's kept values and the places of
// their columns are put in the order in which they are multiplied, since rows that lie a power of two apart fall into the
// same sets of the cache, and multiplied by all tokens, whose sums stay in the second cache.
#ifndef EGGS_SKIP_H
#define EGGS_SKIP_H

#include "nm.h"

enum {
    SKIP_SIDE = 16,    // rows are filled up with zeros to a multiple of it
    SKIP_SPAN = 256,   // columns
    SKIP_TOKENS = 512, // at a time, at the most: a multiple of every pass
};

// What a thread works in. Rows are those of a band, filled up.
typedef struct {
    float *sums;        // (passes, rows, tokens of a pass)
    void *values;       // of a span, in order
    uint16_t *where;    // their places
    char *table;        // of the kernel's own
    const char *ahead;  // values of the span that comes next, of its first row; NULL if they have been asked for
} nm_skip_memory;

typedef struct {
    int pass;              // tokens that are multiplied together
    int64_t pass_bytes;    // of their activations, packed
    int64_t values_bytes;  // of a row's values in a span, which have half as many bytes of places
    int64_t table_bytes;
    int band;              // rows, about
    void (*start)(const nm_skip_memory *s);  // once for each thread, or NULL
    void (*pack)(const nm_problem *p, int64_t t0, int64_t tokens, char *to);  // called by all threads, to share it out
    // A thread calls these for a band of its own: `count` rows from r0, filled up to `rows`. `multiply` asks for what
    // lies `ahead`: memory then works while the processor does.
    void (*order)(const nm_problem *p, const nm_skip_memory *s, int64_t r0, int64_t count, int64_t rows, int64_t column);
    void (*multiply)(const nm_problem *p, const nm_skip_memory *s, const char *packed, float *sums, int64_t rows,
                     int64_t column, int64_t tokens);
    void (*store)(const nm_problem *p, const float *sums, int64_t r0, int64_t count, int64_t t0, int64_t tokens);
} nm_skipper;

// y by a skipper. Returns -1 if memory ran out.
int nm_skip(const nm_problem *p, const nm_skipper *with);

// Whether the patterns of `p` are those that float32 lanes skip.
int nm_skips_f32(const nm_problem *p);
#endif
