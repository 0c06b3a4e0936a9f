/* Products of fp32 rows with packed codes, page by page. The contract is in _cpu.py, the byte order in pages/_fragment.py. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MAX_COLS 256
#define TILE 16

/* Bytes of matrix rows: runs of `run` bytes that start at the offsets of the table. */
INLINE void gather_rows(const uint8_t *plane, const int32_t *starts, int runs, int run, uint8_t *bytes) {
    for (int i = 0; i < runs; i++) memcpy(bytes + i * run, plane + starts[i], run);
}

/* out += the products of some rows of one plane of one page with m moving rows; everything but m is a constant.
 * Rows are gathered TILE at a time: wide loads right behind the narrow stores of the same row would stall. */
INLINE void plane_product(const uint8_t *plane, const int32_t *starts, int run, const float *moving, int m,
                          int rows, int cols, int bits, float *out) {
    const int bytes = cols * bits / 8, fields = 8 / bits;
    const uint32_t mask = (1u << bits) - 1;
    uint8_t tile[TILE * MAX_COLS];
    float codes[MAX_COLS];
    for (int r = 0; r < rows; r += TILE, starts += TILE * bytes / run) {
        switch (run) {
            case 16: gather_rows(plane, starts, TILE * bytes / 16, 16, tile); break;
            case 8: gather_rows(plane, starts, TILE * bytes / 8, 8, tile); break;
            case 4: gather_rows(plane, starts, TILE * bytes / 4, 4, tile); break;
            case 2: gather_rows(plane, starts, TILE * bytes / 2, 2, tile); break;
            default: gather_rows(plane, starts, TILE * bytes, 1, tile);
        }
        for (int t = 0; t < TILE; t++) {
            for (int f = 0; f < fields; f++)
                for (int b = 0; b < bytes; b++)
                    codes[f * bytes + b] = (float)(int32_t)(((uint32_t)tile[t * bytes + b] >> (f * bits)) & mask);
            for (int i = 0; i < m; i++) {
                float sum = 0;
                for (int c = 0; c < cols; c++) sum += moving[i * cols + c] * codes[c];
                out[i * rows + r + t] += sum;
            }
        }
    }
}

#define BITS(COLS, B) \
    case B: plane_product(plane, starts, run, moving, m, rows, COLS, B, out); break;
#define COLUMNS(COLS)                                                      \
    case COLS:                                                             \
        switch (bits) { BITS(COLS, 1) BITS(COLS, 2) BITS(COLS, 4) BITS(COLS, 8) } \
        break;

static void any_plane(const uint8_t *plane, const int32_t *starts, int run, const float *moving, int m, int rows,
                      int cols, int bits, float *out) {
    switch (cols) { COLUMNS(64) COLUMNS(80) COLUMNS(96) COLUMNS(128) COLUMNS(256) }
}

/* Adds one plane's share to out [pages][groups][m][rows / groups].
 * data: first byte of the plane in the first page; starts [rows][row bytes / run]; order [cols]: the natural column of
 * each stored one; moving [pages][groups][m][cols] in natural order; scratch [m][cols]. */
void kvloom_plane_product(const uint8_t *data, int64_t page_stride, int64_t pages, const int32_t *starts, int run,
                          const int32_t *order, float weight, int bits, int rows, int cols, int groups, int m,
                          const float *moving, float *scratch, float *out) {
    const int own = rows / groups, runs = cols * bits / 8 / run;
    for (int64_t p = 0; p < pages; p++)
        for (int g = 0; g < groups; g++) {
            for (int i = 0; i < m; i++, moving += cols)
                for (int c = 0; c < cols; c++) scratch[i * cols + c] = moving[order[c]] * weight;
            any_plane(data + p * page_stride, starts + (int64_t)g * own * runs, run, scratch, m, own, cols, bits, out);
            out += (int64_t)m * own;
        }
}
