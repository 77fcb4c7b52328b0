// Products of a few rows of float32 numbers with many stored ones, which are read once.
#pragma once

#include "rows.h"

namespace pikv {

// What will be read next, asked for bit by bit while something else is computed: pages lie apart,
// where no hardware foresees the next one, and asking for all of it at once would stop the rest.
struct Ahead {
  const char* first = nullptr;
  int64_t token_bytes = 0;

  void fetch(int64_t token, int64_t count) const {
    if (!first) return;
    const char* at = first + token * token_bytes;
    for (int64_t i = 0; i < count * token_bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  }
};

// kLanes products of ROWS queries and as many keys as that leaves.
template <int ROWS, Type TYPE>
inline void dot_tile(const float* q, const Run<TYPE>& keys, int64_t t, int64_t width, float* out,
                     int64_t out_stride) {
  constexpr int kTokens = kLanes / ROWS;
  Vec total[ROWS][kTokens] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Vec key[kTokens];
    for (int s = 0; s < kTokens; ++s) key[s] = keys.vec(t + s, c);
    for (int i = 0; i < ROWS; ++i) {
      const Vec query = load(q + i * width + c);
      for (int s = 0; s < kTokens; ++s) total[i][s] += query * key[s];
    }
  }
  if (c < width) {
    for (int i = 0; i < ROWS; ++i) {
      const Vec query = load_part(q + i * width + c, width - c, 0.0f);
      for (int s = 0; s < kTokens; ++s) total[i][s] += query * keys.part(t + s, c, width);
    }
  }
  const Vec products = sums<kLanes>(&total[0][0]);
  for (int i = 0; i < ROWS; ++i) {
    std::memcpy(out + i * out_stride, reinterpret_cast<const float*>(&products) + i * kTokens,
                kTokens * sizeof(float));
  }
}

// The product of one query and one key.
template <Type TYPE>
inline float dot_one(const float* q, const Run<TYPE>& keys, int64_t t, int64_t width) {
  Vec total = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) total += load(q + c) * keys.vec(t, c);
  if (c < width) {
    total += load_part(q + c, width - c, 0.0f) * keys.part(t, c, width);
  }
  return sum(total);
}

template <int ROWS, Type TYPE>
inline void dot_rows(const float* q, const Rows<TYPE>& keys, int64_t first, int64_t last,
                     int64_t width, float* out, int64_t out_stride, Ahead ahead) {
  constexpr int kTokens = kLanes / ROWS;
  for (int64_t t = first; t < last;) {
    const Run<TYPE> run = keys.run(t);
    const int64_t end = std::min(run.end, last);
    for (; t + kTokens <= end; t += kTokens) {
      ahead.fetch(t, kTokens);
      dot_tile<ROWS>(q, run, t, width, out + t, out_stride);
    }
    for (; t < end; ++t) {
      for (int i = 0; i < ROWS; ++i) {
        out[i * out_stride + t] = dot_one(q + i * width, run, t, width);
      }
    }
  }
}

// Products of queries [rows, width] and the keys of tokens [first, last): out[i * out_stride + t].
template <Type TYPE>
inline void dot(const float* q, int64_t rows, const Rows<TYPE>& keys, int64_t first, int64_t last,
                int64_t width, float* out, int64_t out_stride, Ahead ahead = {}) {
  int64_t i = 0;
  const auto tile = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (; i + kRows <= rows; i += kRows, ahead = {}) {
      dot_rows<kRows>(q + i * width, keys, first, last, width, out + i * out_stride, out_stride,
                      ahead);
    }
  };
  tile(std::integral_constant<int, kTileRows>());
  tile(std::integral_constant<int, 2>());
  tile(std::integral_constant<int, 1>());
}

template <int ROWS, int VECTORS, Type TYPE>
inline void add_tile(const float* weight, int64_t weight_stride, const Rows<TYPE>& values,
                     int64_t c, const uint8_t* shown, int64_t tokens, float* out,
                     int64_t out_stride, Ahead ahead) {
  Vec total[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) total[i][v] = load(out + i * out_stride + c + v * kLanes);
  }
  for (int64_t t = 0; t < tokens;) {
    const Run<TYPE> run = values.run(t);
    for (const int64_t end = std::min(run.end, tokens); t < end; ++t) {
      ahead.fetch(t, 1);
      if (shown && !shown[t]) continue;
      Vec numbers[VECTORS];
      for (int v = 0; v < VECTORS; ++v) numbers[v] = run.vec(t, c + v * kLanes);
      for (int i = 0; i < ROWS; ++i) {
        const float w = weight[i * weight_stride + t];
        for (int v = 0; v < VECTORS; ++v) total[i][v] += w * numbers[v];
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) store(out + i * out_stride + c + v * kLanes, total[i][v]);
  }
}

// The channels behind the last whole vector.
template <Type TYPE>
inline void add_rest(const float* weight, int64_t weight_stride, int64_t rows,
                     const Rows<TYPE>& values, int64_t c, const uint8_t* shown, int64_t tokens,
                     int64_t width, float* out, int64_t out_stride) {
  for (int64_t t = 0; t < tokens;) {
    const Run<TYPE> run = values.run(t);
    for (const int64_t end = std::min(run.end, tokens); t < end; ++t) {
      if (shown && !shown[t]) continue;
      const Vec numbers = run.part(t, c, width);
      for (int64_t i = 0; i < rows; ++i) {
        const float w = weight[i * weight_stride + t];
        for (int64_t j = c; j < width; ++j) out[i * out_stride + j] += w * numbers[j - c];
      }
    }
  }
}

// out [rows, width] += weights [rows, tokens] times values [tokens, width].
//
// shown: [tokens], 0 for tokens that are left out, whatever they hold; null: none is.
template <Type TYPE>
inline void add_weighted(const float* weight, int64_t weight_stride, int64_t rows,
                         const Rows<TYPE>& values, const uint8_t* shown, int64_t tokens,
                         int64_t width, float* out, int64_t out_stride, Ahead ahead = {}) {
  constexpr int64_t kWide = kTileVectors * kLanes;
  const int64_t whole = width / kLanes * kLanes;
  int64_t i = 0;
  const auto tile = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (; i + kRows <= rows; i += kRows) {
      const float* own = weight + i * weight_stride;
      float* to = out + i * out_stride;
      int64_t c = 0;
      for (; c + kWide <= whole; c += kWide, ahead = {}) {
        add_tile<kRows, kTileVectors>(own, weight_stride, values, c, shown, tokens, to, out_stride,
                                      ahead);
      }
      for (; c < whole; c += kLanes, ahead = {}) {
        add_tile<kRows, 1>(own, weight_stride, values, c, shown, tokens, to, out_stride, ahead);
      }
    }
  };
  tile(std::integral_constant<int, kTileRows>());
  tile(std::integral_constant<int, 1>());
  if (whole < width) {
    add_rest(weight, weight_stride, rows, values, whole, shown, tokens, width, out, out_stride);
  }
}

}  // namespace pikv
