// Rows of stored numbers of every type, read as vectors of float32.
#pragma once

#include <algorithm>

#include "numbers.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace pikv {

enum Type : int64_t { kFloat32, kBfloat16, kHalf, kFloat8, kBits8, kBits4, kBits3, kBits2 };

typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

// kLanes narrow integers as wide ones. Compilers make many small steps of this where they are not
// told of the one instruction.
inline Bits widen(const uint8_t* x) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
#else
  typedef uint8_t Narrow __attribute__((vector_size(kLanes), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(x), Bits);
#endif
}

inline Bits widen(const uint16_t* x) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  typedef uint16_t Narrow __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(x), Bits);
#endif
}

inline Vec as_float(Bits x) { return __builtin_convertvector((Ints)x, Vec); }

// Codes of BITS bits, `shift` bits up, as numbers from -1/2 up to 1/2. About the middle, as sums of
// positive numbers would lose what their zero points take off again.
template <int BITS>
inline Vec centred(Bits x, int shift = 0) {
  constexpr uint32_t kUp = 23 - BITS, kMask = ((1u << BITS) - 1) << kUp;
  return (Vec)((x << (static_cast<int>(kUp) - shift) & kMask) | 0x3f800000u) - 1.5f;
}

inline Vec from_bfloat16(Bits x) { return (Vec)(x << 16); }

inline Vec from_half(const uint16_t* x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__) && defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  const Bits bits = widen(x);
  const Vec size = (Vec)((bits & 0x7fffu) << 13) * from_bits(0x77800000u);  // 2^112
  const Bits infinite = (Bits)(size >= 65536.0f) & 0x7f800000u;
  return (Vec)((Bits)size | infinite | (bits & 0x8000u) << 16);
#endif
}

// Of e4m3fn, whose subnormals are frequent: as subnormals of float32 they would be slow.
inline Vec from_float8(Bits x) {
  const Bits size = x & 0x7fu;
  const Bits normal = (size << 20) + (120u << 23), small = (Bits)(as_float(size) * 0x1p-9f);
  const Bits number = size < 8u ? small : normal;
  return (Vec)((size == 0x7fu ? number | 0x7fc00000u : number) | (x & 0x80u) << 24);
}

// The first kLanes numbers of a row; `shift` is where in its bytes they are, `high` where those of
// three bits have their highest one, and `high_shift` where in these.
template <Type TYPE>
inline Vec load_as_float(const void* row, int shift, const void* high, int high_shift) {
  const auto bytes = static_cast<const uint8_t*>(row);
  const auto words = static_cast<const uint16_t*>(row);
  if constexpr (TYPE == kFloat32) return load(static_cast<const float*>(row));
  if constexpr (TYPE == kBfloat16) return from_bfloat16(widen(words));
  if constexpr (TYPE == kHalf) return from_half(words);
  if constexpr (TYPE == kFloat8) return from_float8(widen(bytes));
  if constexpr (TYPE == kBits8) return centred<8>(widen(bytes));
  if constexpr (TYPE == kBits4) return centred<4>(widen(bytes), shift);
  if constexpr (TYPE == kBits2) return centred<2>(widen(bytes), shift);
  if constexpr (TYPE == kBits3) {
    const Bits top = widen(static_cast<const uint8_t*>(high)) >> high_shift & 1u;
    return centred<3>((widen(bytes) >> shift & 3u) | top << 2);
  }
}

// A step of a code as a number is 1 / levels; of other types, 1.
constexpr float levels_of(int64_t type) {
  return type < kBits8 ? 1.0f : type == kBits8 ? 256.0f : type == kBits4 ? 16.0f
       : type == kBits3 ? 8.0f : 4.0f;
}

constexpr int64_t size_of(int64_t type) {
  return type == kFloat32 ? 4 : type == kBfloat16 || type == kHalf ? 2 : 1;
}

// Rows that lie one behind the other, of tokens from `first` up to `end`.
template <Type TYPE>
struct Run {
  const uint8_t *rows, *high;
  int64_t stride, first, end;  // stride: bytes
  int shift, high_shift;

  // Numbers of a token's channels from `c` on.
  Vec vec(int64_t t, int64_t c) const {
    const int64_t at = (t - first) * stride + c * size_of(TYPE);
    return load_as_float<TYPE>(rows + at, shift, high + at, high_shift);
  }
  // The same, up to `width` channels, and 0 behind them.
  Vec part(int64_t t, int64_t c, int64_t width) const {
    constexpr int64_t kBytes = kLanes * size_of(TYPE);
    uint8_t row[kBytes] = {}, top[kBytes] = {};
    const int64_t at = (t - first) * stride + c * size_of(TYPE);
    const int64_t bytes = (width - c) * size_of(TYPE);
    std::memcpy(row, rows + at, bytes);
    if (TYPE == kBits3) std::memcpy(top, high + at, bytes);
    return load_as_float<TYPE>(row, shift, top, high_shift);
  }
};

// The rows of a page, or of anything: a byte holds 8 / bits tokens of one channel, R rows apart.
template <Type TYPE>
struct Rows {
  const uint8_t* data;
  int64_t stride, tokens;  // stride: bytes; tokens: that a page has room for

  // The run that token `t` is in; it ends behind `t`.
  Run<TYPE> run(int64_t t) const {
    if constexpr (TYPE == kBits4 || TYPE == kBits2) {
      constexpr int kBits = TYPE == kBits4 ? 4 : 2;
      const int64_t rows = tokens * kBits / 8, plane = t / rows;
      return {data, data, stride, plane * rows, (plane + 1) * rows,
              static_cast<int>(plane * kBits), 0};
    }
    if constexpr (TYPE == kBits3) {  // the two lower bits, and the highest one in further rows
      const int64_t rows = tokens / 4, high_rows = tokens / 8, plane = t / high_rows;
      const int64_t first = plane * high_rows;
      return {data + first % rows * stride, data + rows * stride, stride, first,
              first + high_rows, static_cast<int>(first / rows * 2), static_cast<int>(plane)};
    }
    return {data, data, stride, 0, INT64_MAX, 0, 0};
  }
};

// Plain rows of float32 numbers.
inline Rows<kFloat32> plain_rows(const float* x, int64_t width) {
  return {reinterpret_cast<const uint8_t*>(x), width * 4, 0};
}

// Calls `use` with the rows of that type.
template <typename Use>
inline void with_rows(int64_t type, const void* data, int64_t stride, int64_t tokens, Use use) {
  const auto bytes = static_cast<const uint8_t*>(data);
  switch (type) {
    case kFloat32: return use(Rows<kFloat32>{bytes, stride, tokens});
    case kBfloat16: return use(Rows<kBfloat16>{bytes, stride, tokens});
    case kHalf: return use(Rows<kHalf>{bytes, stride, tokens});
    case kFloat8: return use(Rows<kFloat8>{bytes, stride, tokens});
    case kBits8: return use(Rows<kBits8>{bytes, stride, tokens});
    case kBits4: return use(Rows<kBits4>{bytes, stride, tokens});
    case kBits3: return use(Rows<kBits3>{bytes, stride, tokens});
    case kBits2: return use(Rows<kBits2>{bytes, stride, tokens});
  }
}

// Numbers of tokens [first, last) as float32: out [last - first, width].
template <Type TYPE>
inline void expand(const Rows<TYPE>& rows, int64_t first, int64_t last, int64_t width, float* out) {
  for (int64_t t = first; t < last;) {
    const Run<TYPE> run = rows.run(t);
    for (const int64_t end = std::min(run.end, last); t < end; ++t, out += width) {
      int64_t c = 0;
      for (; c + kLanes <= width; c += kLanes) store(out + c, run.vec(t, c));
      if (c == width) continue;
      const Vec rest = run.part(t, c, width);
      std::memcpy(out + c, &rest, (width - c) * sizeof(float));
    }
  }
}

// One row of a plain type as float32.
inline void copy_row(int64_t type, const void* data, int64_t width, float* out) {
  with_rows(type, data, 0, 1, [&](const auto& rows) { expand(rows, 0, 1, width, out); });
}

}  // namespace pikv
