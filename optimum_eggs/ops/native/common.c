// What the kernels share: half precision, memory, padded last rows.
#include "nm.h"

#include <stdlib.h>
#include <string.h>

float nm_from_f16(uint16_t h) {
    union { uint32_t u; float f; } v;
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) v.u = 0x7f800000 | (rest & 0x3ff) << 13;  // infinity, NaN
    else if (rest >= 0x400) v.u = (rest << 13) + 0x38000000;      // normal
    else v.f = (float)rest * 0x1p-24f;                            // subnormal, zero
    v.u |= sign;
    return v.f;
}

uint16_t nm_to_f16(float f) {
    union { float f; uint32_t u; } v = {f};
    uint16_t sign = (uint16_t)(v.u >> 16 & 0x8000);
    v.u &= 0x7fffffff;
    if (v.u > 0x7f800000) return sign | 0x7e00;
    if (v.u >= 0x477ff000) return sign | 0x7c00;  // rounds beyond the largest
    if (v.u < 0x38800000) {                       // subnormal: adding 0.5 leaves the rounded bits at the bottom
        v.f += 0.5f;
        return sign | (uint16_t)(v.u - 0x3f000000);
    }
    return sign | (uint16_t)((v.u - 0x38000000 + 0xfff + (v.u >> 13 & 1)) >> 13);
}

void *nm_alloc(size_t bytes) { return aligned_alloc(64, (size_t)nm_round_up((int64_t)bytes + 1, 64)); }

void nm_free(void *memory) { free(memory); }

int nm_rows_open(nm_rows *rows, const nm_problem *p, int64_t slack) {
    int64_t meta_row = p->meta ? nm_meta_width(p->in) : 0;
    return nm_rows_of(rows, p->values, p->width * nm_size(p->dtype), p->meta, meta_row, p->out, slack);
}

int nm_rows_of(nm_rows *rows, const void *values, int64_t row_bytes, const uint8_t *meta, int64_t meta_row,
               int64_t out, int64_t slack) {
    rows->row_bytes = row_bytes;
    rows->meta_bytes = meta_row;
    int64_t least = meta ? nm_min(row_bytes, meta_row) : row_bytes;
    int64_t copied = nm_min(out, (slack + least - 1) / least);
    int64_t values_bytes = copied * rows->row_bytes, meta_bytes = copied * rows->meta_bytes;
    rows->values = values;
    rows->meta = meta;
    rows->first = out - copied;
    char *memory = rows->memory = nm_alloc((size_t)(values_bytes + meta_bytes + 2 * slack));
    if (!memory) return -1;
    memset(memory, 0, (size_t)(values_bytes + meta_bytes + 2 * slack));
    memcpy(memory, rows->values + rows->first * rows->row_bytes, (size_t)values_bytes);
    if (meta) memcpy(memory + values_bytes + slack, meta + rows->first * meta_row, (size_t)meta_bytes);
    rows->tail_values = memory;
    rows->tail_meta = (const uint8_t *)memory + values_bytes + slack;
    return 0;
}

void nm_rows_close(nm_rows *rows) { nm_free(rows->memory); }
