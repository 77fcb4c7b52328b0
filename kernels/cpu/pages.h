// Stored pages, and products with them: see `pikv_megatron.types.KVPages` for the layout.
//
// Legend: ng KV heads, p pages of a pool, S tokens and R stored rows a page, r a stored width.
#pragma once

#include <vector>

#include "products.h"

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
  // The first number of a page, or of a row without pages.
  const void* row_of(int64_t group, int64_t page, int64_t type) const {
    return static_cast<const uint8_t*>(data) + place(group, page) * size_of(type);
  }
  template <typename T>
  const T* page_of(int64_t group, int64_t page) const {
    return static_cast<const T*>(data) + place(group, page);
  }
};

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
    return {static_cast<const char*>(numbers.row_of(group, page, type)), bits[type] * width / 8};
  }

  // Products of queries [rows, r_k] and a page's first keys, which have a scale for each channel:
  // the queries are scaled, and not the keys. out: [rows, tokens].
  void dot_keys(const float* query, int64_t rows, int64_t group, int64_t page, int64_t tokens,
                std::vector<float>& scratch, float* out, Ahead ahead) const {
    with_page(group, page, [&](const auto& keys) {
      if (!scale.data) return dot(query, rows, keys, 0, tokens, width, out, tokens, ahead);
      scratch.resize((rows + 2) * width);
      float *scaled = scratch.data(), *scales = scaled + rows * width, *zeros = scales + width;
      const int64_t group_tokens = page_size / num_scales;
      for (int64_t first = 0; first < tokens; first += group_tokens) {
        const int64_t last = std::min(first + group_tokens, tokens);
        read_key_scales(group, page, first / group_tokens, scales, zeros);
        centre(width, scales, zeros);
        for (int64_t i = 0; i < rows * width; i += width) {
          for (int64_t j = 0; j < width; ++j) scaled[i + j] = query[i + j] * scales[j];
        }
        dot(scaled, rows, keys, first, last, width, out, tokens, ahead);
        for (int64_t i = 0; zero.data && i < rows; ++i) {
          const Run<kFloat32> only = plain_rows(zeros, width).run(0);
          const float shift = dot_one(query + i * width, only, 0, width);
          for (int64_t t = first; t < last; ++t) out[i * tokens + t] += shift;
        }
      }
    });
  }

  // out [rows, r_v] += weights [rows, tokens] times a page's first values, which have scales for
  // each token: the weights are scaled, and not the values. shown: see `add_weighted`.
  void add_values(const float* weight, int64_t rows, int64_t group, int64_t page,
                  const uint8_t* shown, int64_t tokens, std::vector<float>& scratch, float* out,
                  Ahead ahead) const {
    with_page(group, page, [&](auto values) {
      if (!scale.data) {
        return add_weighted(weight, tokens, rows, values, shown, tokens, width, out, width, ahead);
      }
      scratch.resize((rows + 2) * tokens);
      float *scaled = scratch.data(), *scales = scaled + rows * tokens, *zeros = scales + tokens;
      const int64_t channels = width / num_scales;
      for (int64_t g = 0; g < num_scales; ++g, out += channels, ahead = {}) {
        read_column(scale, group, page, g, shown, tokens, scales);
        read_column(zero, group, page, g, shown, tokens, zeros);
        centre(tokens, scales, zeros);
        for (int64_t i = 0; i < rows; ++i) {
          const float* own = weight + i * tokens;
          float shift = 0.0f;
#pragma omp simd reduction(+ : shift)
          for (int64_t t = 0; t < tokens; ++t) {
            scaled[i * tokens + t] = own[t] * scales[t];
            shift += own[t] * zeros[t];
          }
          for (int64_t j = 0; zero.data && j < channels; ++j) out[i * width + j] += shift;
        }
        add_weighted(scaled, tokens, rows, values, shown, tokens, channels, out, width, ahead);
        values.data += channels * size_of(type);
      }
    });
  }

  // The first keys [tokens, r_k] of a page as numbers.
  void expand_keys(int64_t group, int64_t page, int64_t tokens, std::vector<float>& scratch) const {
    scratch.resize((page_size + 2) * width);
    float *out = scratch.data(), *scales = out + page_size * width, *zeros = scales + width;
    with_page(group, page, [&](const auto& keys) { expand(keys, 0, tokens, width, out); });
    const int64_t group_tokens = page_size / num_scales;
    for (int64_t t = 0; scale.data && t < tokens; ++t) {
      if (t % group_tokens == 0) {
        read_key_scales(group, page, t / group_tokens, scales, zeros);
        centre(width, scales, zeros);
      }
      float* row = out + t * width;
      for (int64_t j = 0; j < width; ++j) row[j] = row[j] * scales[j] + zeros[j];
    }
  }

  // Scales and zero points [r_k] of a group of a page's tokens; zeros where there are none.
  void read_key_scales(int64_t group, int64_t page, int64_t index, float* scales,
                       float* zeros) const {
    const auto read = [&](const Pool& pool, float* out) {
      if (!pool.data) return std::fill(out, out + width, 0.0f);
      copy_row(kHalf, pool.page_of<uint16_t>(group, page) + index * pool.row_stride, width, out);
    };
    read(scale, scales), read(zero, zeros);
  }

 private:
  // Scales and zero points of codes to those of the numbers that codes are read as.
  void centre(int64_t count, float* scales, float* zeros) const {
    const float levels = levels_of(type);
    for (int64_t i = 0; levels > 1.0f && i < count; ++i) {
      scales[i] *= levels;
      zeros[i] += 0.5f * scales[i];
    }
  }

  template <typename Use>
  void with_page(int64_t group, int64_t page, Use use) const {
    const int64_t stride = numbers.row_stride * size_of(type);
    with_rows(type, numbers.row_of(group, page, type), stride, page_size, use);
  }

  // Scales or zero points of the tokens that are shown, column `index`; 0 where there are none.
  static void read_column(const Pool& pool, int64_t group, int64_t page, int64_t index,
                          const uint8_t* shown, int64_t tokens, float* out) {
    if (!pool.data) return std::fill(out, out + tokens, 0.0f);
    const uint16_t* x = pool.page_of<uint16_t>(group, page) + index;
    if (pool.row_stride == 1) {
      copy_row(kHalf, x, tokens, out);
    } else {
      for (int64_t t = 0; t < tokens; ++t) copy_row(kHalf, x + t * pool.row_stride, 1, out + t);
    }
    for (int64_t t = 0; shown && t < tokens; ++t) out[t] = shown[t] ? out[t] : 0.0f;
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

}  // namespace pikv
