// SwiGLU experts of a few tokens, each expert's weights read once, on a CPU.
//
// Legend: t tokens, k experts of a token, n = t * k, E experts, h hidden size, f width of an expert.
#include "pages.h"

namespace pikv {
namespace {

// Rows of weights that one thread takes at a time.
constexpr int64_t kBlock = 64;
// Numbers of weights below which threads cost more than they give.
constexpr int64_t kLeastShared = 1 << 17;

struct Call {
  int64_t t, k, count, hidden, width, type;
  const int64_t* experts;  // [t, k], those outside of [0, E) are left out
  const float* weights;    // [t, k]
  const void* tokens;      // [t, h]
  const uint8_t* weight1;  // [E, 2f, h], the gates first
  const uint8_t* weight2;  // [E, h, f]
  float* out;              // [t, h]
};

// The choices, those of one expert behind the other's.
struct Order {
  std::vector<int64_t> choice;          // [n], rows of `experts`, flat
  std::vector<int64_t> expert, first;   // experts with choices, where theirs begin, and the end

  explicit Order(const Call& call) {
    std::vector<std::vector<int64_t>> chosen(call.count);
    for (int64_t i = 0; i < call.t * call.k; ++i) {
      const int64_t e = call.experts[i];
      if (e >= 0 && e < call.count) chosen[e].push_back(i);
    }
    for (int64_t e = 0; e < call.count; ++e) {
      if (chosen[e].empty()) continue;
      expert.push_back(e), first.push_back(choice.size());
      choice.insert(choice.end(), chosen[e].begin(), chosen[e].end());
    }
    first.push_back(choice.size());
  }
};

// out [n, rows] = x [n, width] times each choice's own weights [E, rows, width], transposed.
void multiply(const Call& call, const Order& order, const float* x, const uint8_t* weights,
              int64_t rows, int64_t width, float* out, int threads) {
  const int64_t blocks = (rows + kBlock - 1) / kBlock, experts = order.expert.size();
  const int64_t stride = width * size_of(call.type);
  const bool is_shared = threads > 1 && experts * rows * width >= kLeastShared;
#pragma omp parallel for num_threads(threads) if (is_shared)
  for (int64_t i = 0; i < experts * blocks; ++i) {
    const int64_t e = i / blocks, begin = i % blocks * kBlock;
    const int64_t first = order.first[e], count = order.first[e + 1] - first;
    with_rows(call.type, weights + order.expert[e] * rows * stride, stride, 1,
              [&](const auto& own) {
      dot(x + first * width, count, own, begin, std::min(begin + kBlock, rows), width,
          out + first * rows, rows);
    });
  }
}

// y [f] = silu(x[:f]) * x[f:] * weight.
void gate(const float* x, float weight, int64_t width, float* y) {
  const auto gated = [weight](Vec gate, Vec linear) {
    const Vec e = exp_of(gate < 0.0f ? gate : -gate);
    return gate * (gate < 0.0f ? e : spread(1.0f)) / (1.0f + e) * linear * weight;
  };
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    store(y + c, gated(load(x + c), load(x + width + c)));
  }
  if (c < width) {
    const Vec rest = gated(load_part(x + c, width - c, 0.0f),
                           load_part(x + width + c, width - c, 0.0f));
    std::memcpy(y + c, &rest, (width - c) * sizeof(float));
  }
}

void run(const Call& call, int threads) {
  const Order order(call);
  const int64_t n = order.choice.size(), h = call.hidden, f = call.width;
  std::vector<float> x(n * std::max(h, f)), between(n * std::max(2 * f, h));
  const auto tokens = static_cast<const uint8_t*>(call.tokens);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = order.choice[i] / call.k;
    copy_row(call.type, tokens + token * h * size_of(call.type), h, x.data() + i * h);
  }
  multiply(call, order, x.data(), call.weight1, 2 * f, h, between.data(), threads);
  for (int64_t i = 0; i < n; ++i) {
    gate(between.data() + i * 2 * f, call.weights[order.choice[i]], f, x.data() + i * f);
  }
  multiply(call, order, x.data(), call.weight2, h, f, between.data(), threads);
  std::fill(call.out, call.out + call.t * h, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    float* out = call.out + order.choice[i] / call.k * h;
    for (int64_t c = 0; c < h; ++c) out[c] += between[i * h + c];
  }
}

}  // namespace
}  // namespace pikv

extern "C" void pikv_chosen_experts(const int64_t* fields, int threads) {
  pikv::Fields f{fields};
  pikv::Call call;
  for (int64_t* x : {&call.t, &call.k, &call.count, &call.hidden, &call.width, &call.type}) {
    *x = f.number();
  }
  call.experts = f.pointer<const int64_t>(), call.weights = f.pointer<const float>();
  call.tokens = f.pointer<const void>();
  call.weight1 = f.pointer<const uint8_t>(), call.weight2 = f.pointer<const uint8_t>();
  call.out = f.pointer<float>();
  pikv::run(call, threads);
}
