// Partial attention merged by log-sum-exp, on a CPU.
//
// Legend: k parts, x rows (sequences, query tokens and heads), w output width.
#include "pages.h"

namespace pikv {
namespace {

struct Call {
  int64_t parts, rows, width, type;
  const void* out;   // [k, x, w]
  const float* lse;  // [k, x]
  float* merged;     // [x, w]
  float* total;      // [x]
};

void merge_row(const Call& call, int64_t row, std::vector<float>& scratch) {
  float* merged = call.merged + row * call.width;
  float top = -INFINITY, sum = 0.0f;
  for (int64_t p = 0; p < call.parts; ++p) top = std::max(top, call.lse[p * call.rows + row]);
  std::fill(merged, merged + call.width, 0.0f);
  for (int64_t p = 0; p < call.parts; ++p) {
    const int64_t place = p * call.rows + row;
    if (call.lse[place] == -INFINITY) continue;  // whatever its output holds
    const float weight = exp_of(call.lse[place] - top);
    const auto first = static_cast<const uint8_t*>(call.out);
    const int64_t offset = place * call.width * size_of(call.type);
    copy_row(call.type, first + offset, call.width, scratch.data());
    for (int64_t j = 0; j < call.width; ++j) merged[j] += weight * scratch[j];
    sum += weight;
  }
  for (int64_t j = 0; sum > 0.0f && j < call.width; ++j) merged[j] /= sum;
  call.total[row] = sum > 0.0f ? top + std::log(sum) : -INFINITY;
}

}  // namespace
}  // namespace pikv

extern "C" void pikv_merge_states(const int64_t* fields, int threads) {
  pikv::Fields f{fields};
  pikv::Call call;
  for (int64_t* x : {&call.parts, &call.rows, &call.width, &call.type}) *x = f.number();
  call.out = f.pointer<const void>(), call.lse = f.pointer<const float>();
  call.merged = f.pointer<float>(), call.total = f.pointer<float>();
  if (call.rows * call.parts * call.width < 1 << 16) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> scratch(call.width);
#pragma omp for
    for (int64_t row = 0; row < call.rows; ++row) pikv::merge_row(call, row, scratch);
  }
}
