// Attention of a few queries over the pages of several lists, on a CPU.
//
// Flash-Decoding (Dao et al., 2023): the pages of each sequence are dealt to threads by their
// tokens, each with an online softmax over its part; parts are merged by their log-sum-exps. Pages
// are read where they lie: codes become numbers in registers, and scales go to the queries and the
// weights. Keys that are turned, or that are values as well, are unpacked a page at a time.
//
// Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, rows = sq * g of
// a KV head, m pages listed for a sequence, S tokens a page, r_k and r_v stored widths.
#include <algorithm>

#include "turn.h"

namespace pikv {
namespace {

// Shorter parts cost more in merging than they give in parallel work.
constexpr int64_t kMinPartTokens = 256;
// Parts that a thread should find, so that none waits long for the last one.
constexpr int64_t kPartsPerThread = 4;
// Numbers read, below which waking other threads costs more than it gives.
constexpr int64_t kMinParallelNumbers = 1 << 16;

struct List {
  Pages pages;
  const int64_t* table;
  int64_t table_stride;
  const int32_t* lens;
  int64_t lens_stride, columns;
  const uint8_t* shown;  // [n, m, S], or null
  const float* bias;     // [n, sq, np], or null
  float* mass;           // [n, sq, np, m], or null
  Turn turn;

  static List read(Fields& f) {
    List x;
    x.pages = Pages::read(f);
    x.table = f.pointer<const int64_t>(), x.table_stride = f.number();
    x.lens = f.pointer<const int32_t>(), x.lens_stride = f.number();
    x.columns = f.number();
    x.shown = f.pointer<const uint8_t>(), x.bias = f.pointer<const float>();
    x.mass = f.pointer<float>();
    x.turn = Turn::read(f);
    return x;
  }
  int64_t tokens(int64_t row, int64_t column) const { return lens[row * lens_stride + column]; }
};

struct Call {
  int64_t n, queries, heads, groups, key_width, value_width;
  const float* query;
  float* out;
  float* lse;
  float softmax_scale;
  std::vector<List> lists;

  int64_t group() const { return heads / groups; }
  int64_t rows() const { return queries * group(); }
  // Row i of a KV head, of tensors [n, sq, np].
  int64_t place(int64_t sequence, int64_t kv_head, int64_t i) const {
    return (sequence * queries + i / group()) * heads + kv_head * group() + i % group();
  }
};

// Some pages of a sequence: columns counted over all lists, one behind the other.
struct Span {
  int64_t sequence, first, last;
};

// The result for one span and KV head: [rows] twice and [rows, r_v].
struct Part {
  float *top, *total, *sum;
};

struct Scratch {
  std::vector<float> query, logits, page, turned;
};

void attend_page(const Call& call, const List& list, int64_t sequence, int64_t kv_head,
                 int64_t column, bool has_next, Scratch& scratch, Part part) {
  const int64_t tokens = list.tokens(sequence, column), rows = call.rows();
  const Pages& pages = list.pages;
  const int64_t* at = list.table + sequence * list.table_stride + column;
  const int64_t page = at[0];
  const Ahead next_keys = has_next ? pages.keys.ahead(kv_head, at[1]) : Ahead();
  const bool has_values = !pages.values_in_keys;
  const Ahead next_values =
      has_next && has_values ? pages.values.ahead(kv_head, at[1]) : Ahead();
  const uint8_t* shown = nullptr;
  if (list.shown) {
    shown = list.shown + (sequence * list.columns + column) * pages.page_size;
    if (std::none_of(shown, shown + tokens, [](uint8_t x) { return x != 0; })) {
      for (int64_t i = 0; list.mass && i < rows; ++i) {
        list.mass[call.place(sequence, kv_head, i) * list.columns + column] = -INFINITY;
      }
      return;
    }
  }
  scratch.logits.resize(rows * pages.page_size);
  float* logits = scratch.logits.data();
  const float* keys = nullptr;
  if (list.turn.position || !has_values) {
    pages.keys.expand_keys(kv_head, page, tokens, scratch.page);
    keys = scratch.page.data();
    if (list.turn.position) {
      keys = list.turn.apply(keys, sequence, column, tokens, pages.page_size, call.key_width,
                             scratch.turned);
    }
    dot(scratch.query.data(), rows, plain_rows(keys, call.key_width), 0, tokens, call.key_width,
        logits, tokens, next_keys);
  } else {
    pages.keys.dot_keys(scratch.query.data(), rows, kv_head, page, tokens, scratch.page, logits,
                        next_keys);
  }
  const float multiplicity = pages.log_multiplicity ? pages.log_multiplicity[page] : 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    float* x = logits + i * tokens;
    const int64_t place = call.place(sequence, kv_head, i);
    const float shift = multiplicity + (list.bias ? list.bias[place] : 0.0f);
    for (int64_t t = 0; shown && t < tokens; ++t) x[t] = shown[t] ? x[t] : -INFINITY;
    // Here, not in `top`: where both are huge, a rounded difference would leave exp(x) infinite.
    for (int64_t t = 0; shift != 0.0f && t < tokens; ++t) x[t] += shift;
    const float top = std::max(part.top[i], largest(x, tokens));
    if (top > part.top[i]) {
      const float factor = exp_of(part.top[i] - top);
      float* sum = part.sum + i * call.value_width;
      for (int64_t j = 0; j < call.value_width; ++j) sum[j] *= factor;
      part.total[i] *= factor;
      part.top[i] = top;
    }
    const float mass = exp_row(x, tokens, top);
    part.total[i] += mass;
    if (list.mass) list.mass[place * list.columns + column] = top + std::log(mass);
  }
  if (has_values) {
    pages.values.add_values(logits, rows, kv_head, page, shown, tokens, scratch.page, part.sum,
                            next_values);
  } else {
    add_weighted(logits, tokens, rows, plain_rows(keys, call.key_width), shown, tokens,
                 call.value_width, part.sum, call.value_width);
  }
}

void attend_span(const Call& call, Span span, int64_t kv_head, Part part) {
  static thread_local Scratch scratch;
  const int64_t rows = call.rows();
  scratch.query.resize(rows * call.key_width);
  for (int64_t i = 0; i < rows; ++i) {
    const float* q = call.query + call.place(span.sequence, kv_head, i) * call.key_width;
    float* to = scratch.query.data() + i * call.key_width;
    for (int64_t j = 0; j < call.key_width; ++j) to[j] = q[j] * call.softmax_scale;
  }
  std::fill(part.top, part.top + rows, -INFINITY);
  std::fill(part.total, part.total + rows, 0.0f);
  std::fill(part.sum, part.sum + rows * call.value_width, 0.0f);
  int64_t first = 0;
  for (const List& list : call.lists) {
    const int64_t begin = std::max(span.first - first, int64_t{0});
    const int64_t end = std::min(span.last - first, list.columns);
    for (int64_t column = begin; column < end; ++column) {
      if (list.tokens(span.sequence, column) > 0) {
        const int64_t next = column + 1;
        const bool has_next = next < end && list.tokens(span.sequence, next) > 0;
        attend_page(call, list, span.sequence, kv_head, column, has_next, scratch, part);
      }
    }
    first += list.columns;
  }
}

// Every sequence's pages in spans of about as many tokens; each has one at least.
std::vector<Span> deal(const Call& call, int threads) {
  std::vector<int64_t> tokens(call.n, 0);
  int64_t all = 0, last = 0;
  for (const List& list : call.lists) {
    last += list.columns;
    for (int64_t row = 0; row < call.n; ++row) {
      for (int64_t column = 0; column < list.columns; ++column) {
        tokens[row] += list.tokens(row, column);
      }
    }
  }
  for (int64_t count : tokens) all += count;
  const int64_t wanted = all * call.groups / (kPartsPerThread * threads);
  const int64_t most = std::max(kMinPartTokens, wanted);
  std::vector<Span> spans;
  for (int64_t row = 0; row < call.n; ++row) {
    const int64_t count = (tokens[row] + most - 1) / most;
    int64_t first = 0, seen = 0, column = 0, made = 1;
    for (const List& list : call.lists) {
      for (int64_t own = 0; own < list.columns; ++own, ++column) {
        seen += list.tokens(row, own);
        if (made < count && seen * count >= made * tokens[row]) {
          spans.push_back({row, first, column + 1});
          first = column + 1, ++made;
        }
      }
    }
    spans.push_back({row, first, last});
  }
  return spans;
}

// Merge the parts of a sequence and KV head, and turn pages' log-sum-exps into masses.
void merge(const Call& call, int64_t sequence, int64_t kv_head, const Part* parts, int64_t count,
           int64_t stride) {
  for (int64_t i = 0; i < call.rows(); ++i) {
    const int64_t place = call.place(sequence, kv_head, i), width = call.value_width;
    float* out = call.out + place * width;
    float top = -INFINITY, total = 0.0f;
    for (int64_t p = 0; p < count; ++p) top = std::max(top, parts[p * stride].top[i]);
    std::fill(out, out + width, 0.0f);
    for (int64_t p = 0; p < count; ++p) {
      const Part& part = parts[p * stride];
      if (part.top[i] == -INFINITY && part.total[i] == 0.0f) continue;
      const float factor = exp_of(part.top[i] - top);
      total += factor * part.total[i];
      for (int64_t j = 0; j < width; ++j) out[j] += factor * part.sum[i * width + j];
    }
    const bool is_empty = total == 0.0f;
    for (int64_t j = 0; !is_empty && j < width; ++j) out[j] /= total;
    const float lse = is_empty ? -INFINITY : top + std::log(total);
    call.lse[place] = lse;
    for (const List& list : call.lists) {
      float* mass = list.mass ? list.mass + place * list.columns : nullptr;
      for (int64_t column = 0; mass && column < list.columns; ++column) {
        const bool is_read = !is_empty && list.tokens(sequence, column) > 0;
        mass[column] = is_read ? exp_of(mass[column] - lse) : 0.0f;
      }
    }
  }
}

void attend(const Call& call, int threads) {
  int64_t numbers = 0;
  for (const List& list : call.lists) {
    numbers += call.n * list.columns * list.pages.page_size * call.groups * call.key_width;
  }
  if (numbers < kMinParallelNumbers) threads = 1;
  const std::vector<Span> spans = deal(call, threads);
  const int64_t count = spans.size(), groups = call.groups, rows = call.rows();
  const int64_t size = rows * (2 + call.value_width);
  static thread_local std::vector<float> memory;
  memory.resize(count * groups * size);
  std::vector<Part> parts(count * groups);
  for (int64_t i = 0; i < count * groups; ++i) {
    float* own = memory.data() + i * size;
    parts[i] = {own, own + rows, own + 2 * rows};
  }
  std::vector<int64_t> first(call.n + 1, count);
  for (int64_t i = count; i-- > 0;) first[spans[i].sequence] = i;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count * groups; ++i) {
      attend_span(call, spans[i / groups], i % groups, parts[i]);
    }
#pragma omp for
    for (int64_t i = 0; i < call.n * groups; ++i) {
      const int64_t sequence = i / groups, begin = first[sequence];
      merge(call, sequence, i % groups, &parts[begin * groups + i % groups],
            first[sequence + 1] - begin, groups);
    }
  }
}

}  // namespace
}  // namespace pikv

extern "C" void pikv_decode_attention(const int64_t* fields, float softmax_scale, int threads) {
  pikv::Fields f{fields};
  pikv::Call call;
  call.n = f.number(), call.queries = f.number(), call.heads = f.number();
  call.groups = f.number(), call.key_width = f.number(), call.value_width = f.number();
  call.query = f.pointer<const float>(), call.out = f.pointer<float>();
  call.lse = f.pointer<float>(), call.softmax_scale = softmax_scale;
  const int64_t num_lists = f.number();
  for (int64_t i = 0; i < num_lists; ++i) call.lists.push_back(pikv::List::read(f));
  pikv::attend(call, threads);
}
