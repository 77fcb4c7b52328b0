// RoPE of keys that are stored before it: see `pikv_megatron.ops.turn_keys`.
#pragma once

#include "pages.h"

namespace pikv {

// Turns keys to their positions.
struct Turn {
  const int32_t* position;  // [q, S], or null: keys are stored behind it
  const int64_t* rows;      // [n, m]
  int64_t rows_stride;
  const float* angles;      // [num_rows, 2 * half]
  int64_t num_rows, half;

  static constexpr int64_t kNear = 64;

  static Turn read(Fields& f) {
    Turn x;
    x.position = f.pointer<const int32_t>(), x.rows = f.pointer<const int64_t>();
    x.rows_stride = f.number(), x.angles = f.pointer<const float>();
    x.num_rows = f.number(), x.half = f.number() / 2;
    return x;
  }

  // The keys [tokens, width] of a listed page, in `scratch`.
  const float* apply(const float* keys, int64_t sequence, int64_t column, int64_t tokens,
                     int64_t page_size, int64_t width, std::vector<float>& scratch) const {
    scratch.resize(page_size * width);
    const int32_t* at = position + rows[sequence * rows_stride + column] * page_size;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* far = angles + at[t] / kNear * 2 * half;
      const float* near = angles + (num_rows - kNear + at[t] % kNear) * 2 * half;
      const float *low = keys + t * width, *high = low + half;
      float *out = scratch.data() + t * width, *out_high = out + half;
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const float cos = far[j] * near[j] - far[half + j] * near[half + j];
        const float sin = far[half + j] * near[j] + far[j] * near[half + j];
        out[j] = low[j] * cos - high[j] * sin;
        out_high[j] = high[j] * cos + low[j] * sin;
      }
      for (int64_t j = 2 * half; j < width; ++j) out[j] = low[j];
    }
    return scratch.data();
  }
};

}  // namespace pikv
