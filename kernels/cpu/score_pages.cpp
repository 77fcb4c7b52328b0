// How much each listed page matters to a query, from the sketches of the pages, on a CPU.
//
// Legend: n sequences, np query heads, ng KV heads, g = np / ng, m pages listed for a sequence,
// S tokens and R byte rows a page, w width of the sketch (its directions for a low-rank one).
#include <algorithm>

#include "pages.h"

namespace pikv {
namespace {

// Pages that a thread takes at once.
constexpr int64_t kBlock = 64;
// Of a channel's largest magnitude: the rounding of up to 256 channels' products in float32.
constexpr float kRounding = 1.0f / 65536.0f;

enum Kind : int64_t { kMean, kBox, kLowRank };

struct Call {
  int64_t n, heads, groups, width, columns, kind, type;
  bool is_mass, is_bound;
  const float* query;     // [n, np, w]
  const float* residual;  // [n, np], of the queries, or null
  const int64_t* table;
  int64_t table_stride;
  const int32_t* lens;
  int64_t lens_stride;
  Pool first, second;              // means, or low and high ends
  Side codes;                      // of low-rank sketches
  Pool norm;                       // of what their directions leave, [ng, p]
  float* logit;                    // [n, np, m]
  float* score;                    // [n, m]
  int64_t num_chosen;              // k
  int64_t* chosen;                 // [n, k]
  float softmax_scale;

  int64_t group() const { return heads / groups; }
};

struct Scratch {
  std::vector<float> query, rows, logits;
};

// Rows of the sketch [count, w] that a list names, as float32.
void gather(const Call& call, const Pool& pool, int64_t kv_head, const int64_t* pages,
            int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const void* row = pool.row_of(kv_head, pages[i], call.type);
    copy_row(call.type, row, call.width, out + i * call.width);
  }
}

// Mean keys, or the corner of a box that a query's signs choose: logits [g, count].
void whole_page_logits(const Call& call, int64_t kv_head, const int64_t* pages, int64_t count,
                       Scratch& s, float* out) {
  const int64_t g = call.group(), size = g * call.width;
  s.rows.resize(count * call.width);
  const Rows<kFloat32> rows = plain_rows(s.rows.data(), call.width);
  if (call.kind == kMean) {
    gather(call, call.first, kv_head, pages, count, s.rows.data());
    dot(s.query.data(), g, rows, 0, count, call.width, out, count);
    return;
  }
  s.query.resize(2 * size);
  s.logits.resize(g * count);
  float *query = s.query.data(), *part = query + size;
  for (int64_t j = 0; j < size; ++j) part[j] = std::min(query[j], 0.0f);
  gather(call, call.first, kv_head, pages, count, s.rows.data());
  dot(part, g, rows, 0, count, call.width, out, count);
  for (int64_t j = 0; j < size; ++j) part[j] = std::max(query[j], 0.0f);
  gather(call, call.second, kv_head, pages, count, s.rows.data());
  dot(part, g, rows, 0, count, call.width, s.logits.data(), count);
  for (int64_t i = 0; i < g * count; ++i) out[i] += s.logits[i];
}

// By how much a token's logit can be above its sketch's, in units of the scaled query.
float margin(const Call& call, int64_t kv_head, int64_t page, const float* query,
             float query_norm, Scratch& s) {
  s.rows.resize(2 * call.width);
  float *scale = s.rows.data(), *zero = scale + call.width, total = 0.0f;
  call.codes.read_key_scales(kv_head, page, 0, scale, zero);
  for (int64_t j = 0; j < call.width; ++j) {
    const float off = scale[j] * 0.5f + (std::fabs(zero[j]) + scale[j] * 255.0f) * kRounding;
    total += std::fabs(query[j]) * off;
  }
  const float known = query_norm * call.softmax_scale;
  return known > 0.0f ? total + known * *call.norm.page_of<float>(kv_head, page) : total;
}

// Every token's logit from its codes, reduced over the page: [g], `stride` apart.
void token_logits(const Call& call, int64_t kv_head, int64_t page, int64_t tokens,
                  const float* query_norms, Scratch& s, float* out, int64_t stride) {
  const int64_t width = call.width, g = call.group();
  s.logits.resize(g * tokens);
  call.codes.dot_keys(s.query.data(), g, kv_head, page, tokens, s.rows, s.logits.data(), {});
  for (int64_t i = 0; i < g; ++i) {
    float* x = s.logits.data() + i * tokens;
    const float best = largest(x, tokens);
    float logit = call.is_mass ? best + std::log(exp_row(x, tokens, best)) : best;
    if (call.is_bound) {
      logit += margin(call, kv_head, page, s.query.data() + i * width, query_norms[i], s);
    }
    out[i * stride] = logit;
  }
}

// Logits of the columns [first, last) of a sequence and KV head.
void score_block(const Call& call, int64_t sequence, int64_t kv_head, int64_t first,
                 int64_t last) {
  static thread_local Scratch s;
  const int64_t g = call.group(), head = sequence * call.heads + kv_head * g;
  const float* query = call.query + head * call.width;
  s.query.resize(g * call.width);
  for (int64_t j = 0; j < g * call.width; ++j) s.query[j] = query[j] * call.softmax_scale;
  float* logit = call.logit + head * call.columns;
  int64_t pages[kBlock], columns[kBlock], count = 0;
  for (int64_t column = first; column < last; ++column) {
    const int64_t tokens = call.lens[sequence * call.lens_stride + column];
    if (tokens <= 0) {
      for (int64_t i = 0; i < g; ++i) logit[i * call.columns + column] = -INFINITY;
      continue;
    }
    const int64_t page = call.table[sequence * call.table_stride + column];
    if (call.kind == kLowRank) {
      const float* norms = call.residual ? call.residual + head : nullptr;
      token_logits(call, kv_head, page, tokens, norms, s, logit + column, call.columns);
    } else {
      pages[count] = page, columns[count] = column, ++count;
    }
  }
  if (count == 0) return;
  static thread_local std::vector<float> found;
  found.resize(g * count);
  float* out = found.data();
  whole_page_logits(call, kv_head, pages, count, s, out);
  for (int64_t c = 0; c < count; ++c) {
    const int64_t tokens = call.lens[sequence * call.lens_stride + columns[c]];
    const float more = call.is_mass ? std::log(static_cast<float>(tokens)) : 0.0f;
    for (int64_t i = 0; i < g; ++i) {
      logit[i * call.columns + columns[c]] = out[i * count + c] + more;
    }
  }
}

// The mean over heads of the softmax over pages, from the logits.
void mean_shares(const Call& call, int64_t sequence) {
  static thread_local std::vector<float> share;
  share.resize(call.columns);
  float* score = call.score + sequence * call.columns;
  std::fill(score, score + call.columns, 0.0f);
  for (int64_t head = 0; head < call.heads; ++head) {
    const float* logit = call.logit + (sequence * call.heads + head) * call.columns;
    const float top = largest(logit, call.columns);
    if (top == -INFINITY) continue;
    std::copy(logit, logit + call.columns, share.begin());
    const float factor = 1.0f / (exp_row(share.data(), call.columns, top) * call.heads);
    for (int64_t c = 0; c < call.columns; ++c) score[c] += share[c] * factor;
  }
}

// The k listed columns with the best scores, rising, the lower one first among equals; -1 behind.
void choose(const Call& call, int64_t sequence) {
  const float* score = call.score + sequence * call.columns;
  int64_t* chosen = call.chosen + sequence * call.num_chosen;
  std::vector<int64_t> listed;
  for (int64_t c = 0; c < call.columns; ++c) {
    if (call.lens[sequence * call.lens_stride + c] > 0) listed.push_back(c);
  }
  const int64_t k = std::min<int64_t>(call.num_chosen, listed.size());
  std::partial_sort(listed.begin(), listed.begin() + k, listed.end(), [&](int64_t a, int64_t b) {
    return score[a] > score[b] || (score[a] == score[b] && a < b);
  });
  std::sort(listed.begin(), listed.begin() + k);
  std::copy(listed.begin(), listed.begin() + k, chosen);
  std::fill(chosen + k, chosen + call.num_chosen, -1);
}

void score(const Call& call, int threads) {
  const int64_t blocks = (call.columns + kBlock - 1) / kBlock;
  const int64_t count = call.n * call.groups * blocks;
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(count / 2, 1)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = i % blocks * kBlock, kv_head = i / blocks % call.groups;
      score_block(call, i / blocks / call.groups, kv_head, first,
                  std::min(first + kBlock, call.columns));
    }
#pragma omp for
    for (int64_t row = 0; row < call.n; ++row) {
      mean_shares(call, row);
      if (call.num_chosen > 0) choose(call, row);
    }
  }
}

}  // namespace
}  // namespace pikv

extern "C" void pikv_score_pages(const int64_t* fields, float softmax_scale, int threads) {
  pikv::Fields f{fields};
  pikv::Call call;
  for (int64_t* x : {&call.n, &call.heads, &call.groups, &call.width, &call.columns, &call.kind,
                     &call.type}) {
    *x = f.number();
  }
  call.is_mass = f.number(), call.is_bound = f.number();
  call.query = f.pointer<const float>(), call.residual = f.pointer<const float>();
  call.table = f.pointer<const int64_t>(), call.table_stride = f.number();
  call.lens = f.pointer<const int32_t>(), call.lens_stride = f.number();
  call.first = pikv::Pool::read(f), call.second = pikv::Pool::read(f);
  call.codes = pikv::Side::read(f), call.norm = pikv::Pool::read(f);
  call.logit = f.pointer<float>(), call.score = f.pointer<float>();
  call.num_chosen = f.number(), call.chosen = f.pointer<int64_t>();
  call.softmax_scale = softmax_scale;
  pikv::score(call, threads);
}
