// Vectors of float32 numbers, their sums and exponentials.
//
// Written for vectors of the compiler, so that one source serves every processor. A row is not
// aligned, and may have any length.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace pikv {

#ifdef __AVX512F__
constexpr int kLanes = 16, kTileVectors = 4;
#else
constexpr int kLanes = 8, kTileVectors = 2;
#endif
// Query rows that share what was read of a key or value.
constexpr int kTileRows = 4;

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
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

// Lane `i` of the halves, the lower or the upper ones, of blocks of `block` lanes, of two vectors.
constexpr int half_lane(int i, int block, bool is_upper) {
  return i / (block / 2) * block + i % (block / 2) + (is_upper ? block / 2 : 0);
}

// Each block of two vectors folded to half of its lanes: those of `a`, then those of `b`.
template <int BLOCK, size_t... LANE>
inline Vec fold(Vec a, Vec b, std::index_sequence<LANE...>) {
  const Ints lower = {half_lane(LANE, BLOCK, false)...}, upper = {half_lane(LANE, BLOCK, true)...};
  return __builtin_shuffle(a, b, lower) + __builtin_shuffle(a, b, upper);
}

// Of COUNT vectors, in COUNT blocks of lanes, of which block i adds up to the sum of `v[i]`.
template <int COUNT>
inline Vec sums(const Vec* v) {
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    const Vec a = sums<COUNT / 2>(v), b = sums<COUNT / 2>(v + COUNT / 2);
    return fold<2 * kLanes / COUNT>(a, b, std::make_index_sequence<kLanes>());
  }
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline Vec spread(float x) { return x - Vec{}; }

// The first `count` numbers, and `rest` behind them.
inline Vec load_part(const float* x, int64_t count, float rest) {
  Vec v = spread(rest);
  std::memcpy(&v, x, count * sizeof(float));
  return v;
}

// exp(x) for x <= 0, to 2 units in the last place; 0 where float32 has no normal number for it.
inline Vec exp_of(Vec x) {
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // the nearest integer in the last bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec y = p * (Vec)(((Ints)shifted - 0x4B400000 + 127) << 23);
  return x < -87.0f ? Vec{} : y;
}

inline float exp_of(float x) { return exp_of(spread(x))[0]; }

// Replaces x by exp(x - top) and returns the sum.
inline float exp_row(float* x, int64_t length, float top) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    const Vec y = exp_of(load(x + i) - top);
    store(x + i, y);
    total += y;
  }
  if (i < length) {
    const Vec y = exp_of(load_part(x + i, length - i, -INFINITY) - top);
    std::memcpy(x + i, &y, (length - i) * sizeof(float));
    total += y;
  }
  return sum(total);
}

inline float largest(const float* x, int64_t length) {
  Vec top = spread(-INFINITY);
  int64_t i = 0;
  const auto raise = [&top](Vec v) { top = v > top ? v : top; };
  for (; i + kLanes <= length; i += kLanes) raise(load(x + i));
  if (i < length) raise(load_part(x + i, length - i, -INFINITY));
  float best = top[0];
  for (int lane = 1; lane < kLanes; ++lane) best = top[lane] > best ? top[lane] : best;
  return best;
}

}  // namespace pikv
