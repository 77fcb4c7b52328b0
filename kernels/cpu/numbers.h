// Rows of float32 numbers: products, exponentials, and conversions from narrower types.
//
// Written for vectors of the compiler, so that one source serves every processor. A row is not
// aligned, and may have any length.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pikv {

#ifdef __AVX512F__
constexpr int kLanes = 16, kTileTokens = 4, kTileVectors = 4;
#else
constexpr int kLanes = 8, kTileTokens = 2, kTileVectors = 2;
#endif
// Query rows that share what was read of a key or value.
constexpr int kTileRows = 4;

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Quarter __attribute__((vector_size(16)));

inline Vec load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline void store(float* x, Vec v) { *reinterpret_cast<Vec*>(x) = v; }

inline float sum(Vec v) {
  Quarter part[kLanes / 4];
  std::memcpy(part, &v, sizeof v);
  Quarter total = part[0];
  for (int i = 1; i < kLanes / 4; ++i) total += part[i];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// exp(x) for x <= 0, to 2 units in the last place; 0 where float32 has no normal number for it.
inline float exp_of(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // the nearest integer in the last bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float y = p * from_bits((to_bits(shifted) - 0x4B400000u + 127u) << 23);
  return x < -87.0f ? 0.0f : y;
}

// Replaces x by exp(x - top) and returns the sum.
inline float exp_row(float* x, int64_t length, float top) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < length; ++i) {
    x[i] = exp_of(x[i] - top);
    total += x[i];
  }
  return total;
}

inline float largest(const float* x, int64_t length) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < length; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

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

template <int ROWS, int TOKENS>
inline void dot_tile(const float* q, const float* k, int64_t width, float* out,
                     int64_t out_stride) {
  Vec total[ROWS][TOKENS] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Vec key[TOKENS];
    for (int t = 0; t < TOKENS; ++t) key[t] = load(k + t * width + c);
    for (int i = 0; i < ROWS; ++i) {
      const Vec query = load(q + i * width + c);
      for (int t = 0; t < TOKENS; ++t) total[i][t] += query * key[t];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int t = 0; t < TOKENS; ++t) {
      float x = sum(total[i][t]);
      for (int64_t j = c; j < width; ++j) x += q[i * width + j] * k[t * width + j];
      out[i * out_stride + t] = x;
    }
  }
}

template <int ROWS>
inline void dot_rows(const float* q, const float* k, int64_t tokens, int64_t width, float* out,
                     int64_t out_stride, Ahead ahead) {
  int64_t t = 0;
  for (; t + kTileTokens <= tokens; t += kTileTokens) {
    ahead.fetch(t, kTileTokens);
    dot_tile<ROWS, kTileTokens>(q, k + t * width, width, out + t, out_stride);
  }
  for (; t < tokens; ++t) dot_tile<ROWS, 1>(q, k + t * width, width, out + t, out_stride);
}

// Products of queries [rows, width] and keys [tokens, width]: out[i * out_stride + t].
inline void dot(const float* q, int64_t rows, const float* k, int64_t tokens, int64_t width,
                float* out, int64_t out_stride, Ahead ahead = {}) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows, ahead = {}) {
    dot_rows<kTileRows>(q + i * width, k, tokens, width, out + i * out_stride, out_stride, ahead);
  }
  for (; i < rows; ++i, ahead = {}) {
    dot_rows<1>(q + i * width, k, tokens, width, out + i * out_stride, out_stride, ahead);
  }
}

template <int ROWS, int VECTORS>
inline void add_tile(const float* weight, int64_t weight_stride, const float* value,
                     int64_t value_stride, const uint8_t* shown, int64_t tokens, int64_t width,
                     float* out, Ahead ahead) {
  Vec total[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) total[i][v] = load(out + i * width + v * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    ahead.fetch(t, 1);
    if (shown && !shown[t]) continue;
    Vec numbers[VECTORS];
    for (int v = 0; v < VECTORS; ++v) numbers[v] = load(value + t * value_stride + v * kLanes);
    for (int i = 0; i < ROWS; ++i) {
      const float w = weight[i * weight_stride + t];
      for (int v = 0; v < VECTORS; ++v) total[i][v] += w * numbers[v];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) store(out + i * width + v * kLanes, total[i][v]);
  }
}

template <int ROWS>
inline void add_rows(const float* weight, int64_t weight_stride, const float* value,
                     int64_t value_stride, const uint8_t* shown, int64_t tokens, int64_t width,
                     float* out, Ahead ahead) {
  int64_t c = 0;
  for (; c + kTileVectors * kLanes <= width; c += kTileVectors * kLanes, ahead = {}) {
    add_tile<ROWS, kTileVectors>(weight, weight_stride, value + c, value_stride, shown, tokens,
                                 width, out + c, ahead);
  }
  for (; c + kLanes <= width; c += kLanes, ahead = {}) {
    add_tile<ROWS, 1>(weight, weight_stride, value + c, value_stride, shown, tokens, width,
                      out + c, ahead);
  }
  if (c == width) return;
  for (int64_t t = 0; t < tokens; ++t) {
    if (shown && !shown[t]) continue;
    for (int i = 0; i < ROWS; ++i) {
      const float w = weight[i * weight_stride + t];
      for (int64_t j = c; j < width; ++j) out[i * width + j] += w * value[t * value_stride + j];
    }
  }
}

// out [rows, width] += weights [rows, tokens] times values [tokens, width].
//
// value_stride: from one value to the next.
// shown: [tokens], 0 for tokens that are left out, whatever they hold; null: none is.
inline void add_weighted(const float* weight, int64_t weight_stride, int64_t rows,
                         const float* value, int64_t value_stride, const uint8_t* shown,
                         int64_t tokens, int64_t width, float* out, Ahead ahead = {}) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows, ahead = {}) {
    add_rows<kTileRows>(weight + i * weight_stride, weight_stride, value, value_stride, shown,
                        tokens, width, out + i * width, ahead);
  }
  for (; i < rows; ++i, ahead = {}) {
    add_rows<1>(weight + i * weight_stride, weight_stride, value, value_stride, shown, tokens,
                width, out + i * width, ahead);
  }
}

inline float from_bfloat16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

inline float from_half(uint16_t x) {
  const float size = from_bits((x & 0x7fffu) << 13) * from_bits(0x77800000u);  // 2^112
  const uint32_t bits = to_bits(size) | (size >= 65536.0f ? 0x7f800000u : 0u);
  return from_bits(bits | (x & 0x8000u) << 16);
}

inline float from_float8(uint8_t x) {  // e4m3fn
  const float size = from_bits((x & 0x7fu) << 20) * from_bits(0x7b800000u);  // 2^120
  const uint32_t bits = (x & 0x7fu) == 0x7fu ? 0x7fc00000u : to_bits(size);
  return from_bits(bits | (x & 0x80u) << 24);
}

enum Type : int64_t { kFloat32, kBfloat16, kHalf, kFloat8, kBits8, kBits4, kBits3, kBits2 };

// `length` numbers of a plain type, at an offset in elements, as float32; in place if they are.
inline const float* plain_row(const void* data, int64_t offset, int64_t type, int64_t length,
                              float* scratch) {
  if (type == kFloat32) return static_cast<const float*>(data) + offset;
  const uint16_t* x = static_cast<const uint16_t*>(data) + offset;
  if (type == kBfloat16) {
    for (int64_t i = 0; i < length; ++i) scratch[i] = from_bfloat16(x[i]);
  } else {
    for (int64_t i = 0; i < length; ++i) scratch[i] = from_half(x[i]);
  }
  return scratch;
}

inline void copy_row(const void* data, int64_t offset, int64_t type, int64_t length, float* out) {
  const float* row = plain_row(data, offset, type, length, out);
  if (row != out) std::memcpy(out, row, length * sizeof(float));
}

}  // namespace pikv
