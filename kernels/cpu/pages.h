// Stored pages as float32 numbers: see `pikv_megatron.types.KVPages` for the layout.
//
// Legend: ng KV heads, p pages of a pool, S tokens and R stored rows a page, r a stored width, G
// scales.
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

// One number of `bits` bits, `shift` bits up in a byte, as float32.
template <int BITS>
inline float code_of(uint8_t byte, int shift) {
  return static_cast<float>((byte >> shift) & ((1 << BITS) - 1));
}

struct Pages {
  int64_t type, page_size, rows, key_width, value_width, key_groups, value_groups;
  Pool keys, values, key_scale, key_zero, value_scale, value_zero;
  const float* log_multiplicity;

  static Pages read(Fields& f) {
    Pages p;
    p.type = f.number(), p.page_size = f.number(), p.rows = f.number();
    p.key_width = f.number(), p.value_width = f.number();
    p.key_groups = f.number(), p.value_groups = f.number();
    for (Pool* pool : {&p.keys, &p.values, &p.key_scale, &p.key_zero, &p.value_scale,
                       &p.value_zero}) {
      *pool = Pool::read(f);
    }
    p.log_multiplicity = f.pointer<const float>();
    return p;
  }

  // The first keys [tokens, r_k] of a page, in place or in `scratch`.
  const float* read_keys(int64_t group, int64_t page, int64_t tokens,
                         std::vector<float>& scratch) const {
    if (type <= kHalf) return plain(keys, key_width, group, page, tokens, scratch);
    scratch.resize((page_size + 2 * key_groups) * key_width);
    float* out = scratch.data();
    float *scale = out + page_size * key_width, *zero = scale + key_groups * key_width;
    halves(key_scale, group, page, key_groups, key_width, scale);
    halves(key_zero, group, page, key_groups, key_width, zero);
    const int64_t group_tokens = page_size / key_groups;
    by_token(keys, key_width, group, page, tokens, [&](int64_t t, auto code) {
      const float* s = scale + t / group_tokens * key_width;
      const float* z = zero + t / group_tokens * key_width;
      float* row = out + t * key_width;
#pragma omp simd
      for (int64_t j = 0; j < key_width; ++j) row[j] = code(j) * s[j] + z[j];
    });
    return out;
  }

  // The first values [tokens, r_v] of a page, in place or in `scratch`.
  const float* read_values(int64_t group, int64_t page, int64_t tokens,
                           std::vector<float>& scratch) const {
    if (type <= kHalf) return plain(values, value_width, group, page, tokens, scratch);
    scratch.resize(page_size * (value_width + 2 * value_groups));
    float* out = scratch.data();
    float *scale = out + page_size * value_width, *zero = scale + page_size * value_groups;
    halves(value_scale, group, page, tokens, value_groups, scale);
    halves(value_zero, group, page, tokens, value_groups, zero);
    const int64_t channels = value_width / value_groups;
    by_token(values, value_width, group, page, tokens, [&](int64_t t, auto code) {
      for (int64_t g = 0; g < value_groups; ++g) {
        const float s = scale[t * value_groups + g], z = zero[t * value_groups + g];
        float* row = out + t * value_width;
#pragma omp simd
        for (int64_t j = g * channels; j < (g + 1) * channels; ++j) row[j] = code(j) * s + z;
      }
    });
    return out;
  }

 private:
  const float* plain(const Pool& pool, int64_t width, int64_t group, int64_t page, int64_t tokens,
                     std::vector<float>& scratch) const {
    const int64_t place = pool.place(group, page);
    scratch.resize(page_size * width);
    float* out = scratch.data();
    if (pool.row_stride == width) return plain_row(pool.data, place, type, tokens * width, out);
    for (int64_t t = 0; t < tokens; ++t) {
      copy_row(pool.data, place + t * pool.row_stride, type, width, out + t * width);
    }
    return out;
  }

  // Scales or zero points [count, length]; 0 where there are none.
  static void halves(const Pool& pool, int64_t group, int64_t page, int64_t count, int64_t length,
                     float* out) {
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
  void by_token(const Pool& pool, int64_t width, int64_t group, int64_t page, int64_t tokens,
                Write write) const {
    const uint8_t* bytes = pool.page_of<uint8_t>(group, page);
    for (int64_t t = 0; t < tokens; ++t) {
      const uint8_t* row = bytes + t % rows * pool.row_stride;
      const int plane = static_cast<int>(t / rows);
      switch (type) {
        case kFloat8: write(t, [&](int64_t j) { return from_float8(row[j]); }); break;
        case kBits8: write(t, [&](int64_t j) { return static_cast<float>(row[j]); }); break;
        case kBits4: write(t, [&](int64_t j) { return code_of<4>(row[j], 4 * plane); }); break;
        default: write(t, [&](int64_t j) { return code_of<2>(row[j], 2 * plane); });
      }
    }
  }
};

}  // namespace pikv
