/* Products of fp32 rows with packed codes, page by page. The contract is in _cpu.py, the byte order in
 * pages/_fragment.py, the parameters' places in pages/_layout.py. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MAX_COLS 256
#define MAX_ROWS 16
#define TILE 16

struct plane {
    int64_t offset;        /* first byte within the record */
    const int32_t *starts; /* [rows][row bytes / run], offsets within the plane */
    const int32_t *order;  /* [cols], the natural column of each stored one; of the second plane's of a codebook: the
                              first plane's stored one */
    int32_t run, bits;
    float weight;
};

struct strides {
    int64_t lead, page, group, row; /* in floats */
};

struct job {
    const uint8_t *pages; /* [lead][n][record bytes] */
    int64_t lead_bytes, page_bytes;
    int32_t lead, n, groups, m, rows, cols;
    int32_t num_planes;
    struct plane planes[2];
    const float *points; /* what codes stand for, or null */
    const float *x; /* rows of `cols` floats */
    struct strides x_strides;
    int64_t scale, zero;      /* first scale and zero point within the record; zero is -1 if none are stored */
    int32_t step, group_step; /* halves from one column's to the next, from one group's to the next */
    float symmetric;          /* then they are this times the scale */
    float *out;               /* rows of `rows / groups` floats that are added to */
    struct strides out_strides;
};

/* fp16 without a type for it: finite, as parameters are. */
INLINE float half(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    uint32_t wide = (uint32_t)(bits & 0x7fff) << 13;
    float value;
    memcpy(&value, &wide, 4);
    value *= 0x1p112f;
    return bits & 0x8000 ? -value : value;
}

/* Bytes of matrix rows: runs of `run` bytes that start at the offsets of the table. */
INLINE void gather_rows(const uint8_t *plane, const int32_t *starts, int runs, int run, uint8_t *bytes) {
    for (int i = 0; i < runs; i++) memcpy(bytes + i * run, plane + starts[i], run);
}

/* Bytes of TILE rows: wide loads right behind the narrow stores of the same row would stall. */
INLINE void gather_tile(const uint8_t *plane, const int32_t *starts, int run, int bytes, uint8_t *tile) {
    switch (run) {
        case 16: gather_rows(plane, starts, TILE * bytes / 16, 16, tile); break;
        case 8: gather_rows(plane, starts, TILE * bytes / 8, 8, tile); break;
        case 4: gather_rows(plane, starts, TILE * bytes / 4, 4, tile); break;
        case 2: gather_rows(plane, starts, TILE * bytes / 2, 2, tile); break;
        default: gather_rows(plane, starts, TILE * bytes, 1, tile);
    }
}

/* out += the products of some rows of one plane of one page with m moving rows; cols and bits are constants. */
INLINE void plane_product(const uint8_t *plane, const int32_t *starts, int run, const float *moving, int m, int rows,
                          int cols, int bits, float *out, int64_t out_row) {
    const int bytes = cols * bits / 8, fields = 8 / bits;
    const uint32_t mask = (1u << bits) - 1;
    uint8_t tile[TILE * MAX_COLS];
    float codes[MAX_COLS];
    for (int r = 0; r < rows; r += TILE, starts += TILE * bytes / run) {
        gather_tile(plane, starts, run, bytes, tile);
        for (int t = 0; t < TILE; t++) {
            for (int f = 0; f < fields; f++)
                for (int b = 0; b < bytes; b++)
                    codes[f * bytes + b] = (float)(int32_t)(((uint32_t)tile[t * bytes + b] >> (f * bits)) & mask);
            for (int i = 0; i < m; i++) {
                float sum = 0;
                for (int c = 0; c < cols; c++) sum += moving[i * cols + c] * codes[c];
                out[i * out_row + r + t] += sum;
            }
        }
    }
}

#define BITS(COLS, B) \
    case B: plane_product(plane, starts, run, moving, m, rows, COLS, B, out, out_row); break;
#define COLUMNS(COLS)                                                             \
    case COLS:                                                                    \
        switch (bits) { BITS(COLS, 1) BITS(COLS, 2) BITS(COLS, 4) BITS(COLS, 8) } \
        break;

static void any_plane(const uint8_t *plane, const int32_t *starts, int run, const float *moving, int m, int rows,
                      int cols, int bits, float *out, int64_t out_row) {
    switch (cols) { COLUMNS(64) COLUMNS(80) COLUMNS(96) COLUMNS(128) COLUMNS(256) }
}

/* Rows of x times the scales of one group of one page; their products with the zero points start the sums of out. */
static void fold(const struct job *job, const uint8_t *record, int group, const float *x, float *moving, float *out) {
    const int own = job->rows / job->groups;
    const uint8_t *scale = record + job->scale + 2 * (int64_t)group * job->group_step;
    const uint8_t *zero = record + job->zero + 2 * (int64_t)group * job->group_step;
    float scales[MAX_COLS], zeros[MAX_COLS];
    for (int c = 0; c < job->cols; c++) scales[c] = half(scale + 2 * c * job->step);
    for (int c = 0; c < job->cols; c++)
        zeros[c] = job->zero < 0 ? job->symmetric * scales[c] : half(zero + 2 * c * job->step);
    for (int i = 0; i < job->m; i++, x += job->x_strides.row, out += job->out_strides.row) {
        float offset = 0;
        for (int c = 0; c < job->cols; c++) {
            moving[i * job->cols + c] = x[c] * scales[c];
            offset += x[c] * zeros[c];
        }
        for (int r = 0; r < own; r++) out[r] += offset;
    }
}

/* The same for a codebook: codes of all planes are put together in the first plane's order, and looked up. */
INLINE void point_product(const struct job *job, const uint8_t *record, int group, const float *moving, int rows,
                          int cols, float *out) {
    uint8_t tiles[2][TILE * MAX_COLS], codes[MAX_COLS];
    float points[MAX_COLS];
    for (int r = 0; r < rows; r += TILE) {
        for (int i = 0; i < job->num_planes; i++) {
            const struct plane *p = job->planes + i;
            const int bytes = cols * p->bits / 8;
            const int32_t *starts = p->starts + ((int64_t)group * rows + r) * bytes / p->run;
            gather_tile(record + p->offset, starts, p->run, bytes, tiles[i]);
        }
        for (int t = 0; t < TILE; t++) {
            for (int i = 0; i < job->num_planes; i++) {
                const struct plane *p = job->planes + i;
                const int bytes = cols * p->bits / 8, mask = (1 << p->bits) - 1, weight = (int)p->weight;
                for (int f = 0; f < 8 / p->bits; f++)
                    for (int b = 0; b < bytes; b++) {
                        const int code = (tiles[i][t * bytes + b] >> (f * p->bits)) & mask;
                        if (i == 0) codes[f * bytes + b] = code;
                        else codes[p->order[f * bytes + b]] |= code * weight;
                    }
            }
            for (int c = 0; c < cols; c++) points[c] = job->points[codes[c]];
            for (int i = 0; i < job->m; i++) {
                float sum = 0;
                for (int c = 0; c < cols; c++) sum += moving[i * cols + c] * points[c];
                out[i * job->out_strides.row + r + t] += sum;
            }
        }
    }
}

static void points_of_group(const struct job *job, const uint8_t *record, int group, const float *moving, float *out) {
    const int own = job->rows / job->groups, cols = job->cols;
    float stored[MAX_ROWS * MAX_COLS];
    for (int i = 0; i < job->m; i++)
        for (int c = 0; c < cols; c++) stored[i * cols + c] = moving[i * cols + job->planes[0].order[c]];
    switch (cols) {
        case 64: point_product(job, record, group, stored, own, 64, out); break;
        case 128: point_product(job, record, group, stored, own, 128, out); break;
        default: point_product(job, record, group, stored, own, cols, out);
    }
}

static void group_product(const struct job *job, const uint8_t *record, int group, const float *x, float *out) {
    const int own = job->rows / job->groups, cols = job->cols;
    float moving[MAX_ROWS * MAX_COLS], stored[MAX_ROWS * MAX_COLS];
    fold(job, record, group, x, moving, out);
    if (job->points) {
        points_of_group(job, record, group, moving, out);
        return;
    }
    for (const struct plane *p = job->planes; p < job->planes + job->num_planes; p++) {
        const int runs = cols * p->bits / 8 / p->run;
        for (int i = 0; i < job->m; i++)
            for (int c = 0; c < cols; c++) stored[i * cols + c] = moving[i * cols + p->order[c]] * p->weight;
        any_plane(record + p->offset, p->starts + (int64_t)group * own * runs, p->run, stored, job->m, own, cols,
                  p->bits, out, job->out_strides.row);
    }
}

void kvloom_product(const struct job *job) {
    for (int l = 0; l < job->lead; l++)
        for (int n = 0; n < job->n; n++)
            for (int g = 0; g < job->groups; g++) {
                const struct strides *x = &job->x_strides, *out = &job->out_strides;
                group_product(job, job->pages + l * job->lead_bytes + n * job->page_bytes, g,
                              job->x + l * x->lead + n * x->page + g * x->group,
                              job->out + l * out->lead + n * out->page + g * out->group);
            }
}
