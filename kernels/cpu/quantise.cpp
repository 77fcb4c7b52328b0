// Codes of few bits, of groups that share a scale: see `pikv_megatron.ops.packing.quantise`.
//
// Legend: a groups of `length` numbers, `inner` numbers apart; a vector has a group in each lane.
#include <vector>

#include "pages.h"

namespace pikv {
namespace {

constexpr float kHalfMax = 65504.0f, kHalfTiny = 0x1p-24f;
constexpr float kShares[] = {0.85f, 0.7f};
constexpr int64_t kShortGroup = 32;
// Numbers below which threads cost more than they give.
constexpr int64_t kLeastShared = 1 << 15;

Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
Vec larger(Vec a, Vec b) { return a > b ? a : b; }
Vec within(Vec x, float most) { return larger(smaller(x, spread(most)), spread(-most)); }
Vec rounded(Vec x) { return (x + 12582912.0f) - 12582912.0f; }
Vec ratio(Vec above, Vec below) {
  return below > 0.0f ? above / below : Vec{};
}

// The float16 nearest to x, up to kHalfMax.
Vec as_half(Vec x) {
  const Ints bits = (Ints)x, odd = bits >> 13 & 1;
  const Vec normal = (Vec)((bits + 0xfff + odd) & ~0x1fff);
  const Vec size = x < 0.0f ? -x : x;
  return size < 0x1p-14f ? (x + 0.75f) - 0.75f : normal;
}

Vec floor_half(Vec x) {
  x = within(x, kHalfMax);
  const Vec near = as_half(x), size = near < 0.0f ? -near : near;
  const Vec step = larger(size * (0.75f / 1024), spread(kHalfTiny));
  return as_half(near > x ? near - step : near);
}

// Numbers of groups, one of each group a vector.
struct Column {
  std::vector<float> numbers;

  explicit Column(int64_t length) : numbers(length * kLanes) {}
  Vec operator[](int64_t i) const { return load(numbers.data() + i * kLanes); }
  void set(int64_t i, Vec v) { store(numbers.data() + i * kLanes, v); }
};

// Codes on a line, and what they stand for.
struct Line {
  Vec scale, zero;

  Vec code(Vec x, float levels) const {
    const Vec place = (x - zero) / larger(scale, spread(kHalfTiny));
    return rounded(smaller(larger(place, Vec{}), spread(levels)));
  }
  Vec error(const Column& x, const Column& codes, int64_t length) const {
    Vec total = {};
    for (int64_t i = 0; i < length; ++i) {
      const Vec off = codes[i] * scale + zero - x[i];
      total += off * off;
    }
    return total;
  }
};

// Groups of `length` numbers, `x`.
struct Groups {
  int64_t length;
  Column x, about, codes, other, tried;

  explicit Groups(int64_t length)
      : length(length), x(length), about(length), codes(length), other(length), tried(length) {}

  Vec mean(const Column& of) const {
    Vec total = {};
    for (int64_t i = 0; i < length; ++i) total += of[i];
    return total / static_cast<float>(length);
  }
  void encode(const Column& of, const Line& line, float levels, Column& out) {
    for (int64_t i = 0; i < length; ++i) out.set(i, line.code(of[i], levels));
  }

  // `codes` that reach from the lowest to the highest number.
  Line cover(Vec low, Vec high, float levels) {
    Line line;
    line.zero = floor_half(low);
    line.scale = -floor_half(-((high - line.zero) / levels));
    encode(x, line, levels, codes);
    return line;
  }

  // `other`, of least squares, and the scale at which products are kept.
  Line fit(Vec low, Vec high, float levels) {
    const Vec middle = (low + high) / 2.0f;
    for (int64_t i = 0; i < length; ++i) about.set(i, within(x[i], kHalfMax) - middle);
    start(high - low, levels);
    const Vec offset = mean(about);
    for (int64_t i = 0; i < length; ++i) about.set(i, about[i] - offset);
    Vec level = mean(other), product = {}, square = {};
    for (int64_t i = 0; i < length; ++i) {
      const Vec code = other[i] - level;
      product += code * about[i], square += code * code;
    }
    const Vec scale = ratio(product, square);
    encode(about, {scale, -scale * level}, levels, other);
    level = mean(other), product = Vec{}, square = Vec{};
    for (int64_t i = 0; i < length; ++i) {
      product += (other[i] - level) * about[i], square += about[i] * about[i];
    }
    Line line;
    line.scale = as_half(smaller(ratio(square, product), spread(kHalfMax)));
    line.zero = as_half(within(middle + offset - line.scale * level, kHalfMax));
    return line;
  }

  // `other` from the best of the ranges about the middle.
  void start(Vec width, float levels) {
    const auto about_middle = [levels](Vec scale) { return Line{scale, scale * (-levels / 2)}; };
    const Line whole = about_middle(width / levels);
    encode(about, whole, levels, other);
    if (levels != 3.0f || length <= kShortGroup) return;
    Vec best = whole.error(about, other, length);
    for (const float share : kShares) {
      const Line line = about_middle(width * (share / levels));
      encode(about, line, levels, tried);
      const Vec error = line.error(about, tried, length);
      const auto is_better = error < best;
      for (int64_t i = 0; i < length; ++i) other.set(i, is_better ? tried[i] : other[i]);
      best = smaller(error, best);
    }
  }

  // `codes` and their line.
  Line quantise(int bits) {
    const float levels = (1 << bits) - 1;
    Vec low = x[0], high = x[0];
    for (int64_t i = 1; i < length; ++i) low = smaller(x[i], low), high = larger(x[i], high);
    const Line covering = cover(low, high, levels);
    if (bits == 8) return covering;
    const Line line = fit(within(low, kHalfMax), within(high, kHalfMax), levels);
    const Vec most = 2.0f * covering.error(x, codes, length);
    const auto is_good = line.error(x, other, length) <= most;
    for (int64_t i = 0; i < length; ++i) codes.set(i, is_good ? other[i] : codes[i]);
    return {is_good ? line.scale : covering.scale, is_good ? line.zero : covering.zero};
  }
};

struct Call {
  int64_t outer, length, inner, bits;
  const float* x;  // [outer, length, inner]
  uint8_t* codes;  // the same
  float* scale;    // [outer, inner]
  float* zero;

  int64_t place(int64_t group) const { return group / inner * length * inner + group % inner; }
};

// Groups [first, first + count), count up to kLanes.
void quantise(const Call& call, int64_t first, int64_t count, Groups& groups) {
  int64_t place[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    place[lane] = call.place(first + std::min(lane, count - 1));
  }
  for (int64_t i = 0; i < call.length; ++i) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      groups.x.numbers[i * kLanes + lane] = call.x[place[lane] + i * call.inner];
    }
  }
  const Line line = groups.quantise(call.bits);
  for (int64_t i = 0; i < call.length; ++i) {
    const Ints codes = __builtin_convertvector(groups.codes[i], Ints);
    for (int64_t lane = 0; lane < count; ++lane) {
      call.codes[place[lane] + i * call.inner] = codes[lane];
    }
  }
  std::memcpy(call.scale + first, &line.scale, count * sizeof(float));
  std::memcpy(call.zero + first, &line.zero, count * sizeof(float));
}

}  // namespace
}  // namespace pikv

extern "C" void pikv_quantise(const int64_t* fields, int threads) {
  pikv::Fields f{fields};
  pikv::Call call;
  for (int64_t* x : {&call.outer, &call.length, &call.inner, &call.bits}) *x = f.number();
  call.x = f.pointer<const float>(), call.codes = f.pointer<uint8_t>();
  call.scale = f.pointer<float>(), call.zero = f.pointer<float>();
  const int64_t count = call.outer * call.inner;
  const bool is_shared = threads > 1 && count * call.length >= pikv::kLeastShared;
#pragma omp parallel num_threads(threads) if (is_shared)
  {
    pikv::Groups groups(call.length);
#pragma omp for
    for (int64_t first = 0; first < count; first += pikv::kLanes) {
      pikv::quantise(call, first, std::min<int64_t>(pikv::kLanes, count - first), groups);
    }
  }
}
