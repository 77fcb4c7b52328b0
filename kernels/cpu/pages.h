// Stored pages as float32 numbers: see `pikv_megatron.types.KVPages` for the layout.
//
// Legend: ng KV heads, p pages of a pool, S tokens and R stored rows a page, r a stored width.
#pragma once

#include <vector>

#include "numbers.h"

namespace pikv {

// Integers one behind the other, as Python packs them.
struct Fields {
  const int64_t* at;
  int64_t number() { return *at++; }
  template <typename T>
  T* pointer() { return reinterpret_cast<T*>(static_cast<intptr_t>(*at++)); }
};

// A tensor [ng, p], [ng, p, w] or [ng, p, R, w] whose channels lie together.
struct Pool {
  const void* data;
  int64_t group_stride, page_stride, row_stride;

  static Pool read(Fields& f) {
    return {f.pointer<const void>(), f.number(), f.number(), f.number()};
  }
  int64_t place(int64_t group, int64_t page) const {
    return group * group_stride + page * page_stride;
  }
  template <typename T>
  const T* page_of(int64_t group, int64_t page) const {
    return static_cast<const T*>(data) + place(group, page);
  }
};

// One number of BITS bits, `shift` bits up in a byte.
template <int BITS>
inline int code_of(uint8_t byte, int64_t shift) {
  return (byte >> shift) & ((1 << BITS) - 1);
}

// The keys or the values of a pool.
struct Side {
  int64_t type, page_size, width, num_scales;  // scales: groups of tokens, or of channels
  Pool numbers, scale, zero;

  static Side read(Fields& f) {
    Side x;
    x.type = f.number(), x.page_size = f.number(), x.width = f.number();
    x.num_scales = f.number();
    x.numbers = Pool::read(f), x.scale = Pool::read(f), x.zero = Pool::read(f);
    return x;
  }

  // What a page has of each token, to be fetched before it is read.
  Ahead ahead(int64_t group, int64_t page) const {
    const int64_t bits[] = {32, 16, 16, 8, 8, 4, 3, 2};  // by type
    const int64_t size = type == kFloat32 ? 4 : type <= kHalf ? 2 : 1;
    const char* first = static_cast<const char*>(numbers.data) + numbers.place(group, page) * size;
    return {first, bits[type] * width / 8};
  }

  // The first keys [tokens, r_k] of a page, in place or in `scratch`: a scale for each channel.
  const float* read_keys(int64_t group, int64_t page, int64_t tokens,
                         std::vector<float>& scratch) const {
    if (type <= kHalf) return plain(group, page, tokens, scratch);
    scratch.resize((page_size + 2 * num_scales) * width);
    float* out = scratch.data();
    float *scales = out + page_size * width, *zeros = scales + num_scales * width;
    read_scales(scale, group, page, num_scales, width, scales);
    read_scales(zero, group, page, num_scales, width, zeros);
    const int64_t group_tokens = page_size / num_scales;
    by_token(group, page, tokens, [&](int64_t t, auto code) {
      const float *s = scales + t / group_tokens * width, *z = zeros + t / group_tokens * width;
      float* row = out + t * width;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) row[j] = code(j) * s[j] + z[j];
    });
    return out;
  }

  // The first values [tokens, r_v] of a page, in place or in `scratch`: scales for each token.
  const float* read_values(int64_t group, int64_t page, int64_t tokens,
                           std::vector<float>& scratch) const {
    if (type <= kHalf) return plain(group, page, tokens, scratch);
    scratch.resize(page_size * (width + 2 * num_scales));
    float* out = scratch.data();
    float *scales = out + page_size * width, *zeros = scales + page_size * num_scales;
    read_scales(scale, group, page, tokens, num_scales, scales);
    read_scales(zero, group, page, tokens, num_scales, zeros);
    const int64_t channels = width / num_scales;
    by_token(group, page, tokens, [&](int64_t t, auto code) {
      for (int64_t g = 0; g < num_scales; ++g) {
        const float s = scales[t * num_scales + g], z = zeros[t * num_scales + g];
        float* row = out + t * width;
#pragma omp simd
        for (int64_t j = g * channels; j < (g + 1) * channels; ++j) row[j] = code(j) * s + z;
      }
    });
    return out;
  }

 private:
  const float* plain(int64_t group, int64_t page, int64_t tokens,
                     std::vector<float>& scratch) const {
    const int64_t place = numbers.place(group, page);
    scratch.resize(page_size * width);
    float* out = scratch.data();
    if (numbers.row_stride == width) {
      return plain_row(numbers.data, place, type, tokens * width, out);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      copy_row(numbers.data, place + t * numbers.row_stride, type, width, out + t * width);
    }
    return out;
  }

  // Scales or zero points [count, length]; 0 where there are none.
  static void read_scales(const Pool& pool, int64_t group, int64_t page, int64_t count,
                          int64_t length, float* out) {
    if (!pool.data) {
      std::memset(out, 0, count * length * sizeof(float));
      return;
    }
    const uint16_t* x = pool.page_of<uint16_t>(group, page);
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t* row = x + i * pool.row_stride;
      for (int64_t j = 0; j < length; ++j) out[i * length + j] = from_half(row[j]);
    }
  }

  // Calls write(t, code) for each token, where code(j) is the stored number of channel j.
  template <typename Write>
  void by_token(int64_t group, int64_t page, int64_t tokens, Write write) const {
    const uint8_t* bytes = numbers.page_of<uint8_t>(group, page);
    const auto row = [&](int64_t i) { return bytes + i * numbers.row_stride; };
    const int64_t halves = page_size / 2, quarters = page_size / 4, eighths = page_size / 8;
    for (int64_t t = 0; t < tokens; ++t) {
      if (type == kFloat8) {
        write(t, [x = row(t)](int64_t j) { return from_float8(x[j]); });
      } else if (type == kBits8) {
        write(t, [x = row(t)](int64_t j) { return static_cast<float>(x[j]); });
      } else if (type == kBits4) {
        write(t, [x = row(t % halves), shift = t / halves * 4](int64_t j) {
          return static_cast<float>(code_of<4>(x[j], shift));
        });
      } else if (type == kBits2) {
        write(t, [x = row(t % quarters), shift = t / quarters * 2](int64_t j) {
          return static_cast<float>(code_of<2>(x[j], shift));
        });
      } else {  // the two lower bits, and the highest one in further rows
        write(t, [x = row(t % quarters), shift = t / quarters * 2,
                  y = row(quarters + t % eighths), top = t / eighths](int64_t j) {
          return static_cast<float>(code_of<2>(x[j], shift) | code_of<1>(y[j], top) << 2);
        });
      }
    }
  }
};

struct Pages {
  int64_t page_size;
  Side keys, values;
  bool values_in_keys;  // their first columns
  const float* log_multiplicity;

  static Pages read(Fields& f) {
    Pages p;
    p.keys = Side::read(f), p.values = Side::read(f);
    p.values_in_keys = p.values.type < 0;
    p.page_size = p.keys.page_size, p.log_multiplicity = f.pointer<const float>();
    return p;
  }
};

// Turns keys that are stored before RoPE to their positions: see `pikv_megatron.ops.turn_keys`.
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
