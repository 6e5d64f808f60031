// Attention of one new token a sequence to all before it: softmax(q Kᵀ · scale) V.
#ifndef EGGS_ATTEND_H
#define EGGS_ATTEND_H

#include "nm.h"

enum { NM_MOST_DIM = 256 };

// Sizes are numbers of elements; rows of `dim` elements are contiguous. Query heads [h · heads/kv_heads, ...) share the keys
// and values of head h.
typedef struct {
    int dtype;  // NM_F32 or NM_BF16, of q, k, v and y
    const void *q, *k, *v;
    void *y;                 // (batch, heads, dim), contiguous
    const uint8_t *allowed;  // 1 where a position may be seen, or NULL
    int64_t batch, heads, kv_heads, length, dim;  // dim: a multiple of 16 up to NM_MOST_DIM
    int64_t q_batch, q_head;                      // from one to the next, for q
    int64_t k_batch, k_head, k_position;
    int64_t v_batch, v_head, v_position;
    int64_t allowed_batch, allowed_head, allowed_position;  // 0 where one serves all
    float scale;
    int threads;
} nm_attention;

int nm_attend(const nm_attention *p);  // 0, or -1 if memory ran out

// What the operations of torch are made of, handed over by this name: it changes with what is handed over.
#define NM_KERNELS "optimum_eggs.kernels.2"
typedef struct {
    const nm_isa *isas;
    int (*attend)(const nm_attention *);
} nm_kernels;

#endif
