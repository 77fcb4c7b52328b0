// Attention over pages as wholes, by estimated logits and mean values, on a CPU.
//
// Legend: n sequences, np query heads, ng KV heads, g = np / ng, m pages listed for a sequence,
// w width of the mean values.
#include <algorithm>

#include "pages.h"

namespace pikv {
namespace {

// Pages whose mean values are gathered at once.
constexpr int64_t kBlock = 64;

struct Call {
  int64_t n, heads, groups, columns, width, type;
  const float* logit;      // [n, np, m]
  const uint8_t* is_tail;  // [n, m]
  const int64_t* table;
  int64_t table_stride;
  Pool mean;
  float* out;  // [n, np, w]
  float* lse;  // [n, np]
};

void attend_row(const Call& call, int64_t sequence, int64_t kv_head) {
  static thread_local std::vector<float> weights, values, gathered;
  const int64_t g = call.heads / call.groups, head = sequence * call.heads + kv_head * g;
  const uint8_t* is_tail = call.is_tail + sequence * call.columns;
  std::vector<int64_t> tail;
  for (int64_t c = 0; c < call.columns; ++c) {
    if (is_tail[c]) tail.push_back(c);
  }
  const int64_t count = tail.size();
  weights.resize(g * count);
  float* out = call.out + head * call.width;
  std::fill(out, out + g * call.width, 0.0f);
  for (int64_t i = 0; i < g; ++i) {
    const float* logit = call.logit + (head + i) * call.columns;
    float* weight = weights.data() + i * count;
    for (int64_t c = 0; c < count; ++c) weight[c] = logit[tail[c]];
    const float top = largest(weight, count), total = exp_row(weight, count, top);
    call.lse[head + i] = count ? top + std::log(total) : -INFINITY;
    for (int64_t c = 0; c < count; ++c) weight[c] /= total;
  }
  values.resize(kBlock * call.width);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = std::min(kBlock, count - first);
    for (int64_t c = 0; c < size; ++c) {
      const int64_t page = call.table[sequence * call.table_stride + tail[first + c]];
      copy_row(call.type, call.mean.row_of(kv_head, page, call.type), call.width,
               values.data() + c * call.width);
    }
    add_weighted(weights.data() + first, count, g, plain_rows(values.data(), call.width), nullptr,
                 size, call.width, out, call.width);
  }
}

}  // namespace
}  // namespace pikv

extern "C" void pikv_attend_means(const int64_t* fields, int threads) {
  pikv::Fields f{fields};
  pikv::Call call;
  for (int64_t* x : {&call.n, &call.heads, &call.groups, &call.columns, &call.width, &call.type}) {
    *x = f.number();
  }
  call.logit = f.pointer<const float>(), call.is_tail = f.pointer<const uint8_t>();
  call.table = f.pointer<const int64_t>(), call.table_stride = f.number();
  call.mean = pikv::Pool::read(f);
  call.out = f.pointer<float>(), call.lse = f.pointer<float>();
  const int64_t count = call.n * call.groups;
#pragma omp parallel for num_threads(threads) if (threads > 1 && count * call.columns > 1024)
  for (int64_t i = 0; i < count; ++i) pikv::attend_row(call, i / call.groups, i % call.groups);
}
