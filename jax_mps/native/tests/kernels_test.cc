// The kernels against plain loops, both families, every element type and layout, over small random shapes; and the sharing
// of work. No framework, no XLA, no Python, so it also runs with sanitizers and, compiled for another processor, in an
// emulator.
//
//   kernels_test_<instruction set> [problems of each kind, 100 if left out [seed]]
//
// Exit status 0, 1 where something differs, 77 where this processor lacks the instruction set.

#include "pooling/kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "conv/geometry.h"
#include "threads.h"

namespace jax_mps {
namespace {

using JAX_MPS_ISA::Execute;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

int problems = 0, failures = 0;

// ---- Random numbers, the same on every machine.

class Random {
 public:
  // In [low, high].
  int64_t operator()(int64_t low, int64_t high) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return low + static_cast<int64_t>((state_ >> 33) % static_cast<uint64_t>(high - low + 1));
  }
  bool OneIn(int64_t n) { return (*this)(1, n) == 1; }
  void Seed(uint64_t seed) { state_ = seed; }

 private:
  uint64_t state_ = 20240607;
} random_number;

// ---- Memory that runs out.

constexpr int64_t kPlenty = std::numeric_limits<int64_t>::max();
std::atomic<int64_t> allocations{kPlenty};  // that succeed, before all others fail

void* Allocate(size_t bytes, size_t alignment) {
  if (allocations.fetch_sub(1) <= 0) return nullptr;
  const size_t exact = bytes > 0 ? bytes : 1;  // a sanitizer sees the first byte beyond
  if (alignment <= alignof(std::max_align_t)) return std::malloc(exact);
  void* data = nullptr;
  return posix_memalign(&data, alignment, exact) == 0 ? data : nullptr;
}

// Runs a call. Half of the calls run out of memory: they do not crash, and either say so or have the right results.
template <class AnyProblem>
bool Compute(const AnyProblem& problem) {
  if (random_number.OneIn(2)) {
    bool enough = false;
    allocations = random_number(0, 30);
    try {
      enough = Execute(problem);
    } catch (const std::bad_alloc&) {
      enough = false;
    }
    allocations = kPlenty;
    if (enough) return true;
  }
  return Execute(problem);
}

// ---- Element types: everything is computed in double here, and held as `Bytes` for the kernels.

using Numbers = std::vector<double>;
using Bytes = std::vector<unsigned char>;  // exactly as long as the array: a sanitizer sees the first byte beyond

struct Format {
  const char* name;
  int64_t size;
  double epsilon;  // of a rounding to nearest; 0 for integers
  double low, high;
};

Format FormatOf(Type type) {
  switch (type) {
    case Type::kF32:
      return {"f32", 4, 0x1p-24, 0, 0};
    case Type::kF64:
      return {"f64", 8, 0x1p-53, 0, 0};
    case Type::kF16:
      return {"f16", 2, 0x1p-11, 0, 0};
    case Type::kBF16:
      return {"bf16", 2, 0x1p-8, 0, 0};
    case Type::kS8:
      return {"s8", 1, 0, -128, 127};
    case Type::kS16:
      return {"s16", 2, 0, -32768, 32767};
    case Type::kS32:
      return {"s32", 4, 0, -2147483648.0, 2147483647};
    case Type::kU8:
      return {"u8", 1, 0, 0, 255};
    case Type::kU16:
      return {"u16", 2, 0, 0, 65535};
    case Type::kU32:
      return {"u32", 4, 0, 0, 4294967295.0};
    default:
      std::abort();
  }
}

bool IsFloat(Type type) { return FormatOf(type).epsilon > 0; }
Type Accumulator(Type type) { return type == Type::kF64 ? Type::kF64 : Type::kF32; }

// A half of `digits` explicit mantissa bits and exponents from 2^lowest on. Exact: the tests make no other numbers.
uint16_t EncodeHalf(double value, int digits, int lowest) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int top = 0x8000 >> digits;  // the exponent field of infinity, and one
  if (std::isnan(value)) return static_cast<uint16_t>(0x7fff);
  if (std::isinf(value)) return static_cast<uint16_t>(sign | ((top - 1) << digits));
  if (value == 0) return sign;
  int exponent;
  const double mantissa = std::frexp(std::fabs(value), &exponent) * 2 - 1;  // value = (1 + mantissa) * 2^(exponent - 1)
  const int field = exponent - lowest;
  return static_cast<uint16_t>(sign | (field << digits) | static_cast<int>(mantissa * (1 << digits)));
}

double DecodeHalf(uint16_t bits, int digits, int lowest) {
  const int field = (bits & 0x7fff) >> digits, rest = bits & ((1 << digits) - 1);
  double value;
  if (field == (0x7fff >> digits)) {
    value = rest != 0 ? kNaN : kInfinity;
  } else if (field == 0) {
    value = std::ldexp(rest, lowest - digits);
  } else {
    value = std::ldexp(1 + std::ldexp(rest, -digits), field - 1 + lowest);
  }
  return bits & 0x8000 ? -value : value;
}

template <class T>
void Put(double value, unsigned char* to) {
  const T number = static_cast<T>(value);
  std::memcpy(to, &number, sizeof number);
}
template <class T>
double Get(const unsigned char* from) {
  T number;
  std::memcpy(&number, from, sizeof number);
  return static_cast<double>(number);
}

Bytes Encode(Type type, const Numbers& numbers) {
  const int64_t size = FormatOf(type).size;
  Bytes bytes(numbers.size() * size);
  for (size_t i = 0; i < numbers.size(); ++i) {
    unsigned char* to = bytes.data() + i * size;
    switch (type) {
      case Type::kF32:
        Put<float>(numbers[i], to);
        break;
      case Type::kF64:
        Put<double>(numbers[i], to);
        break;
      case Type::kF16:
        Put<uint16_t>(EncodeHalf(numbers[i], 10, -14), to);
        break;
      case Type::kBF16:
        Put<uint16_t>(EncodeHalf(numbers[i], 7, -126), to);
        break;
      case Type::kS8:
        Put<int8_t>(numbers[i], to);
        break;
      case Type::kS16:
        Put<int16_t>(numbers[i], to);
        break;
      case Type::kS32:
        Put<int32_t>(numbers[i], to);
        break;
      case Type::kU8:
        Put<uint8_t>(numbers[i], to);
        break;
      case Type::kU16:
        Put<uint16_t>(numbers[i], to);
        break;
      default:
        Put<uint32_t>(numbers[i], to);
    }
  }
  return bytes;
}

Numbers Decode(Type type, const Bytes& bytes) {
  const int64_t size = FormatOf(type).size;
  Numbers numbers(bytes.size() / size);
  for (size_t i = 0; i < numbers.size(); ++i) {
    const unsigned char* from = bytes.data() + i * size;
    switch (type) {
      case Type::kF32:
        numbers[i] = Get<float>(from);
        break;
      case Type::kF64:
        numbers[i] = Get<double>(from);
        break;
      case Type::kF16:
        numbers[i] = DecodeHalf(static_cast<uint16_t>(Get<uint16_t>(from)), 10, -14);
        break;
      case Type::kBF16:
        numbers[i] = DecodeHalf(static_cast<uint16_t>(Get<uint16_t>(from)), 7, -126);
        break;
      case Type::kS8:
        numbers[i] = Get<int8_t>(from);
        break;
      case Type::kS16:
        numbers[i] = Get<int16_t>(from);
        break;
      case Type::kS32:
        numbers[i] = Get<int32_t>(from);
        break;
      case Type::kU8:
        numbers[i] = Get<uint8_t>(from);
        break;
      case Type::kU16:
        numbers[i] = Get<uint16_t>(from);
        break;
      default:
        numbers[i] = Get<uint32_t>(from);
    }
  }
  return numbers;
}

// Quarters from -4 to 4, exact in every float type; many are equal. `special`: NaN, both infinities and both zeros too.
Numbers RandomFloats(int64_t count, bool special = false) {
  Numbers numbers(count);
  const double specials[] = {kNaN, kInfinity, -kInfinity, 0.0, -0.0};
  for (double& number : numbers) {
    number = special && random_number.OneIn(6) ? specials[random_number(0, 4)] : random_number(-16, 16) / 4.0;
  }
  return numbers;
}

// A few numbers become NaN or infinite.
void Poison(Numbers& numbers) {
  const double specials[] = {kNaN, kInfinity, -kInfinity};
  for (size_t i = 0; i < 1 + numbers.size() / 500; ++i) {
    numbers[random_number(0, static_cast<int64_t>(numbers.size()) - 1)] = specials[random_number(0, 2)];
  }
}

Numbers RandomNumbers(Type type, int64_t count) {
  if (IsFloat(type)) return RandomFloats(count, true);
  const Format format = FormatOf(type);
  Numbers numbers(count);
  for (double& number : numbers) {
    number = random_number.OneIn(8) ? (random_number.OneIn(2) ? format.low : format.high)
                                    : std::fmax(format.low, static_cast<double>(random_number(-9, 9)));
  }
  return numbers;
}

// ---- Comparison.

// A sum as it should be, and the sum of the magnitudes: rounding errors are proportional to that.
struct Sum {
  double value = 0, magnitude = 0;
  void Add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
  Sum Over(double divisor) const { return {value / divisor, magnitude / std::fabs(divisor)}; }
};
using Sums = std::vector<Sum>;

void Fail(const std::string& what, const std::string& problem, size_t at, double found, double wanted) {
  if (++failures <= 20) std::printf("%s: %s [%zu] is %.9g, not %.9g\n", problem.c_str(), what.c_str(), at, found, wanted);
}

void Equal(const std::string& what, const std::string& problem, const Numbers& found, const Numbers& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (found[i] == wanted[i] || (std::isnan(found[i]) && std::isnan(wanted[i]))) continue;
    return Fail(what, problem, i, found[i], wanted[i]);
  }
}

// Summed in the type's accumulator and rounded to `stored` once.
void Close(const std::string& what, const std::string& problem, Type stored, Type type, const Numbers& found,
           const Sums& wanted) {
  const double sums = FormatOf(Accumulator(type)).epsilon, store = FormatOf(stored).epsilon;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double value = wanted[i].value, room = 64 * sums * wanted[i].magnitude + 1.001 * store * std::fabs(value);
    if (found[i] == value || (std::isnan(found[i]) && std::isnan(value)) || std::fabs(found[i] - value) <= room) continue;
    return Fail(what, problem, i, found[i], wanted[i].value);
  }
}

// ---- Threads: a task is handed to one of its own.

class Threads {
 public:
  ~Threads() {
    for (std::thread& thread : threads_) thread.join();
  }
  const Workers workers = [this](std::function<void()> task) {
    std::lock_guard<std::mutex> lock(mutex_);
    threads_.emplace_back(std::move(task));
  };

 private:
  std::mutex mutex_;
  std::vector<std::thread> threads_;
};

// Every unit is worked on once, also by pools that run a task before or after all others.
void TestSharing() {
  constexpr int64_t kUnits = 1000, kBytes = 1 << 20;
  enum Pool { kThreads, kAtOnce, kLate };
  for (Pool pool : {kThreads, kAtOnce, kLate}) {
    ++problems;
    std::vector<int> count(kUnits);
    const auto work = [](const void* data, int64_t begin, int64_t end) {
      int* const count = *static_cast<int* const*>(data);
      for (int64_t i = begin; i < end; ++i) ++count[i];
      return true;
    };
    Threads threads;
    std::vector<std::function<void()>> late;
    Workers workers = threads.workers;
    if (pool == kAtOnce) workers = [](std::function<void()> task) { task(); };
    if (pool == kLate) workers = [&](std::function<void()> task) { late.push_back(std::move(task)); };
    int* const data = count.data();
    bool right = ShareWork(workers, kUnits, kBytes, work, &data);
    for (const auto& task : late) task();
    for (int each : count) right &= each == 1;
    if (!right) std::printf("sharing with pool %d\n", pool), ++failures;
  }
}

// Where a task has no memory, the caller hears of it.
void TestFailure() {
  ++problems;
  const auto fail_once = [](const void*, int64_t begin, int64_t end) { return begin > 500 || end <= 500; };
  Threads threads;
  if (ShareWork(threads.workers, 1000, 1 << 20, fail_once, nullptr)) std::printf("failure of a task\n"), ++failures;
}

// ---- Pooling.

// body(element of the image, element of the pooled array, tap) for all taps of all windows that lie in the image, in
// row-major order of windows and then taps.
template <class Body>
void ForEachTap(const Geometry& g, const Body& body) {
  const Axis& a = g.axis[0];
  const Axis& b = g.axis[1];
  const Axis& c = g.axis[2];
  for (int64_t o = 0; o < g.outer; ++o) {
    for (int64_t i = 0; i < a.windows; ++i) {
      for (int64_t j = 0; j < b.windows; ++j) {
        for (int64_t k = 0; k < c.windows; ++k) {
          for (int64_t tap = 0; tap < a.taps * b.taps * c.taps; ++tap) {
            const int64_t x = i * a.stride - a.low + tap / (b.taps * c.taps) * a.dilation;
            const int64_t y = j * b.stride - b.low + tap / c.taps % b.taps * b.dilation;
            const int64_t z = k * c.stride - c.low + tap % c.taps * c.dilation;
            if (x < 0 || x >= a.size || y < 0 || y >= b.size || z < 0 || z >= c.size) continue;
            for (int64_t n = 0; n < g.inner; ++n) {
              body((((o * a.size + x) * b.size + y) * c.size + z) * g.inner + n,
                   (((o * a.windows + i) * b.windows + j) * c.windows + k) * g.inner + n, tap);
            }
          }
        }
      }
    }
  }
}

int64_t ImageSize(const Geometry& g) { return g.outer * g.axis[0].size * g.axis[1].size * g.axis[2].size * g.inner; }
int64_t PooledSize(const Geometry& g) {
  return g.outer * g.axis[0].windows * g.axis[1].windows * g.axis[2].windows * g.inner;
}

// The divisor of every window: its taps in the image and the counted band of padding.
Numbers Divisors(const Geometry& g) {
  Numbers divisors(PooledSize(g), static_cast<double>(g.divisor));
  if (!g.weighted) return divisors;
  const auto counted = [](const Axis& axis, int64_t window) {
    double taps = 0;
    for (int64_t k = 0; k < axis.taps; ++k) {
      const int64_t pixel = axis.stride * window - axis.low + axis.dilation * k;
      taps += pixel >= -axis.band_low && pixel < axis.size + axis.band_high;
    }
    return taps;
  };
  for (size_t w = 0; w < divisors.size(); ++w) {
    const int64_t position = w / g.inner;
    divisors[w] = counted(g.axis[2], position % g.axis[2].windows) *
                  counted(g.axis[1], position / g.axis[2].windows % g.axis[1].windows) *
                  counted(g.axis[0], position / g.axis[2].windows / g.axis[1].windows % g.axis[0].windows);
  }
  return divisors;
}

Axis RandomAxis(int64_t most_pixels, int64_t most_taps) {
  Axis axis;
  axis.size = random_number(1, most_pixels);
  axis.taps = random_number(1, most_taps);
  axis.stride = random_number(1, 4);
  axis.dilation = random_number.OneIn(3) ? random_number(2, 3) : 1;
  const int64_t extent = axis.dilation * (axis.taps - 1) + 1;
  if (random_number.OneIn(8)) {  // windows that tile
    axis.dilation = 1;
    axis.stride = axis.taps;
    axis.windows = random_number(1, most_pixels / axis.taps + 1);
    axis.size = axis.windows * axis.stride;
    return axis;
  }
  if (random_number.OneIn(8)) {  // one window, which covers all
    axis.taps = axis.size = random_number(1, most_pixels);
    axis.dilation = 1;
    return axis;
  }
  axis.low = random_number.OneIn(2) ? random_number(0, extent - 1) : 0;
  const int64_t high = random_number(0, extent - 1);
  const int64_t room = axis.size + axis.low + high - extent;
  axis.windows = room < 0 ? 1 : room / axis.stride + 1;
  return axis;
}

// One to three axes; channels last (many inner elements) or first (one), few or many.
Geometry RandomGeometry() {
  static const int64_t channels[] = {1, 1, 1, 2, 3, 7, 8, 16, 19, 33, 70};
  Geometry geometry;
  const int64_t rank = random_number(1, 3);
  const int64_t pixels[] = {0, 90, 14, 7}, taps[] = {0, 20, 6, 4};
  for (int64_t a = 3 - rank; a < 3; ++a) geometry.axis[a] = RandomAxis(pixels[rank], taps[rank]);
  const bool many = random_number.OneIn(4);  // planes: enough for several threads, and to be lanes
  geometry.outer = many ? random_number(8, 70) : random_number(1, 3);
  geometry.inner = channels[random_number(0, many ? 6 : 10)];
  if (rank == 1 && random_number.OneIn(20)) {  // more channels than one block
    geometry.outer = 1;
    geometry.inner = 4500;
  }
  return geometry;
}

std::string Describe(const char* op, Type type, const Geometry& g) {
  char text[400];
  int length = std::snprintf(text, sizeof text, "%s %s outer %d inner %d", op, FormatOf(type).name,
                             static_cast<int>(g.outer), static_cast<int>(g.inner));
  for (const Axis& axis : g.axis) {
    length += std::snprintf(text + length, sizeof text - length, " (%d -> %d k%d s%d d%d low%d)",
                            static_cast<int>(axis.size), static_cast<int>(axis.windows), static_cast<int>(axis.taps),
                            static_cast<int>(axis.stride), static_cast<int>(axis.dilation), static_cast<int>(axis.low));
  }
  return text;
}

struct Pooling {
  Op op;
  const char* name;
  Type type, second;
  Geometry geometry;

  std::string Name() const { return Describe(name, type, geometry); }

  // Runs the kernel; results come back as numbers.
  std::vector<Numbers> Run(const std::vector<Bytes>& operands, const std::vector<Type>& types, int64_t size) const {
    ++problems;
    Problem problem = {};
    problem.op = op;
    problem.type = type;
    problem.second = second;
    problem.geometry = geometry;
    // As the calls of XLA do it, now and then not: both have to be right.
    if (op != Op::kMaxUnpool && op != Op::kMaxUnpoolTake && !random_number.OneIn(4)) MergeCoveredAxes(problem.geometry);
    for (size_t i = 0; i < operands.size(); ++i) problem.operand[i] = operands[i].data();
    std::vector<Bytes> results;
    for (Type each : types) results.emplace_back(size * FormatOf(each).size, 0xa5);
    const bool both = op != Op::kMaxPoolTapIndex || results.size() == 2;
    for (size_t i = 0; i < results.size(); ++i) problem.result[both ? i : 1] = results[i].data();
    problem.stream = random_number.OneIn(2);
    {
      Threads threads;
      problem.workers = &threads.workers;
      if (!Compute(problem)) Fail("no memory", Name(), 0, 0, 0);
    }
    std::vector<Numbers> numbers;
    for (size_t i = 0; i < results.size(); ++i) numbers.push_back(Decode(types[i], results[i]));
    return numbers;
  }
};

// Types that can number the taps.
Type RandomTapType(const Geometry& g) {
  const bool narrow = g.axis[0].taps * g.axis[1].taps * g.axis[2].taps <= 128;
  const Type types[] = {Type::kS32, Type::kS16, Type::kS8};
  return types[random_number(0, narrow ? 2 : 1)];
}

void TestMaxPool(Type type) {
  Pooling call = {Op::kMaxPool, "max_pool", type, RandomTapType(RandomGeometry()), RandomGeometry()};
  call.second = RandomTapType(call.geometry);
  const Geometry& g = call.geometry;
  const Numbers x = RandomNumbers(type, ImageSize(g));
  Numbers best(PooledSize(g), IsFloat(type) ? -kInfinity : FormatOf(type).low), winner(PooledSize(g), -1);
  ForEachTap(g, [&](int64_t pixel, int64_t window, int64_t tap) {
    const bool wins = winner[window] < 0 || x[pixel] > best[window] || (std::isnan(x[pixel]) && !std::isnan(best[window]));
    if (!wins) return;
    best[window] = x[pixel];
    winner[window] = static_cast<double>(tap);
  });
  const Bytes bytes = Encode(type, x);
  Equal("maximum", call.Name(), call.Run({bytes}, {type}, PooledSize(g))[0], best);
  call.op = Op::kMaxPoolTapIndex;
  call.name = "max_pool with tap";
  auto both = call.Run({bytes}, {type, call.second}, PooledSize(g));
  auto tap = call.Run({bytes}, {call.second}, PooledSize(g));
  for (size_t w = 0; w < winner.size(); ++w) {
    if (winner[w] < 0) both[1][w] = tap[0][w] = winner[w];  // a window outside the image has no winner
  }
  Equal("maximum", call.Name(), both[0], best);
  Equal("tap", call.Name(), both[1], winner);
  Equal("tap alone", call.Name(), tap[0], winner);
}

void TestMaxPoolTap(Type type) {
  Pooling take = {Op::kMaxPoolTake, "max_pool_take", type, Type::kS32, RandomGeometry()};
  take.second = RandomTapType(take.geometry);
  const Geometry& g = take.geometry;
  const int64_t taps = g.axis[0].taps * g.axis[1].taps * g.axis[2].taps;
  Numbers tap(PooledSize(g));
  for (double& each : tap) each = static_cast<double>(random_number(-1, taps - 1));  // -1 names none
  const Numbers x = RandomFloats(ImageSize(g)), gradient = RandomFloats(PooledSize(g));
  Numbers taken(PooledSize(g));
  Sums put(ImageSize(g));
  ForEachTap(g, [&](int64_t pixel, int64_t window, int64_t k) {
    if (tap[window] != k) return;
    taken[window] = x[pixel];
    put[pixel].Add(gradient[window]);
  });
  const Bytes tap_bytes = Encode(take.second, tap);
  Equal("value", take.Name(), take.Run({Encode(type, x), tap_bytes}, {type}, PooledSize(g))[0], taken);
  Pooling call = take;
  call.op = Op::kMaxPoolPut;
  call.name = "max_pool_put";
  Close("gradient", call.Name(), type, type, call.Run({Encode(type, gradient), tap_bytes}, {type}, ImageSize(g))[0], put);
}

void TestAvgPool(Type type) {
  Pooling call = {Op::kAvgPool, "avg_pool", type, Type::kOther, RandomGeometry()};
  Geometry& g = call.geometry;
  g.divisor = random_number(1, 9);
  if (random_number.OneIn(2)) {
    g.divisor = 1;
    g.weighted = true;
    for (Axis& axis : g.axis) {
      if (axis.taps == 1) continue;
      axis.band_low = random_number(0, axis.low);
      axis.band_high = random_number(0, 2);
    }
  }
  const Numbers x = RandomFloats(ImageSize(g)), gradient = RandomFloats(PooledSize(g)), divisors = Divisors(g);
  Sums sum(PooledSize(g)), spread(ImageSize(g));
  ForEachTap(g, [&](int64_t pixel, int64_t window, int64_t) {
    sum[window].Add(x[pixel]);
    if (divisors[window] != 0) spread[pixel].Add(gradient[window] / divisors[window]);
  });
  for (size_t w = 0; w < sum.size(); ++w) sum[w] = divisors[w] != 0 ? sum[w].Over(divisors[w]) : Sum();
  Close("average", call.Name(), type, type, call.Run({Encode(type, x)}, {type}, PooledSize(g))[0], sum);
  call.op = Op::kAvgPoolGradient;
  call.name = "avg_pool_spread";
  Close("gradient", call.Name(), type, type, call.Run({Encode(type, gradient)}, {type}, ImageSize(g))[0], spread);
}

void TestL2Pool(Type type) {
  const Type wide = Accumulator(type);
  Pooling call = {Op::kL2Pool, "l2_pool", type, random_number.OneIn(2) ? type : wide, RandomGeometry()};
  const Geometry& g = call.geometry;
  Numbers x = RandomFloats(ImageSize(g));
  const Numbers t = RandomFloats(ImageSize(g));
  Numbers gradient = RandomFloats(PooledSize(g));
  if (random_number.OneIn(3)) x.assign(x.size(), 0.0);
  if (type != Type::kF16 &&
      random_number.OneIn(2)) {  // norms and some gradients large or small, so that quotients are more so
    const int norms = random_number(-100, 100), gradients = norms > 0 ? -random_number(20, 110) : random_number(20, 110);
    for (double& number : x) number = std::ldexp(number, norms);
    for (double& number : gradient) number = random_number.OneIn(4) ? std::ldexp(number, gradients) : number;
  }
  Sums squares(PooledSize(g));
  ForEachTap(g, [&](int64_t pixel, int64_t window, int64_t) { squares[window].Add(x[pixel] * x[pixel]); });
  Numbers norm(PooledSize(g));
  Sums roots(PooledSize(g));
  for (size_t w = 0; w < norm.size(); ++w) {
    norm[w] = std::sqrt(squares[w].value);
    roots[w] = {norm[w], norm[w]};
  }
  Close("norm", call.Name(), call.second, wide, call.Run({Encode(type, x)}, {call.second}, PooledSize(g))[0], roots);

  const Bytes norm_bytes = Encode(wide, norm);
  const Numbers rounded = Decode(wide, norm_bytes);
  Sums tangent(PooledSize(g)), back(ImageSize(g));
  ForEachTap(g, [&](int64_t pixel, int64_t window, int64_t) {
    if (rounded[window] == 0) return;
    tangent[window].Add(x[pixel] * t[pixel] / rounded[window]);
    back[pixel].Add(x[pixel] * (gradient[window] / rounded[window]));
  });
  call.op = Op::kL2PoolTangent;
  call.name = "l2_pool_tangent";
  Close("tangent", call.Name(), call.second, wide,
        call.Run({Encode(type, t), Encode(type, x), norm_bytes}, {call.second}, PooledSize(g))[0], tangent);
  call.op = Op::kL2PoolGradient;
  call.name = "l2_pool_gradient";
  Close("gradient", call.Name(), type, wide,
        call.Run({Encode(call.second, gradient), Encode(type, x), norm_bytes}, {type}, ImageSize(g))[0], back);
}

void TestMaxUnpool(Type type) {
  Pooling call = {Op::kMaxUnpool, "max_unpool", type, Type::kOther, RandomGeometry()};
  const Geometry& g = call.geometry;
  const int64_t plane = ImageSize(g) / g.outer / g.inner, entries = PooledSize(g) / g.outer / g.inner;
  Numbers index(PooledSize(g));
  for (double& each : index) each = static_cast<double>(random_number(-1, plane));  // one beyond on either side
  // `special` floats would do for moving, but a NaN's bits are not kept by the round trip through double.
  const Numbers y = IsFloat(type) ? RandomFloats(PooledSize(g)) : RandomNumbers(type, PooledSize(g));
  const Numbers image = IsFloat(type) ? RandomFloats(ImageSize(g)) : RandomNumbers(type, ImageSize(g));
  Numbers unpooled(ImageSize(g)), taken(PooledSize(g)), last(ImageSize(g), -1);
  const auto for_each = [&](const auto& body) {
    for (int64_t o = 0; o < g.outer; ++o) {
      for (int64_t p = 0; p < entries; ++p) {
        for (int64_t n = 0; n < g.inner; ++n) {
          const int64_t entry = (o * entries + p) * g.inner + n;
          if (index[entry] < 0 || index[entry] >= plane) continue;
          body(entry, (o * plane + static_cast<int64_t>(index[entry])) * g.inner + n);
        }
      }
    }
  };
  for_each([&](int64_t entry, int64_t pixel) {
    unpooled[pixel] = y[entry];
    last[pixel] = static_cast<double>(entry);
  });
  for_each([&](int64_t entry, int64_t pixel) {
    if (last[pixel] == entry) taken[entry] = image[pixel];
  });
  const Bytes index_bytes = Encode(Type::kS32, index);
  Equal("image", call.Name(), call.Run({Encode(type, y), index_bytes}, {type}, ImageSize(g))[0], unpooled);
  call.op = Op::kMaxUnpoolTake;
  call.name = "max_unpool_take";
  Equal("values", call.Name(), call.Run({Encode(type, image), index_bytes}, {type}, PooledSize(g))[0], taken);
}

// ---- Transposed convolution.

struct Arrays {
  const ConvProblem& p;
  int64_t windows() const { return p.axis[0].windows * p.axis[1].windows * p.axis[2].windows; }
  int64_t pixels() const { return p.axis[0].size * p.axis[1].size * p.axis[2].size; }
  int64_t taps() const { return p.axis[0].taps * p.axis[1].taps * p.axis[2].taps; }
  int64_t source_size() const { return p.batch * windows() * p.in; }
  int64_t image_size() const { return p.batch * pixels() * p.out; }
  int64_t kernel_size() const { return taps() * (p.in / p.groups) * p.out; }
  int64_t source(int64_t b, int64_t window, int64_t channel) const {
    return p.channels_last ? (b * windows() + window) * p.in + channel : (b * p.in + channel) * windows() + window;
  }
  int64_t image(int64_t b, int64_t pixel, int64_t channel) const {
    return p.channels_last ? (b * pixels() + pixel) * p.out + channel : (b * p.out + channel) * pixels() + pixel;
  }
  // i and o count inside group g. `transpose_kernel` kernels belong to the ordinary convolution; the others are turned by
  // half a turn.
  int64_t kernel(int64_t tap, int64_t g, int64_t i, int64_t o) const {
    const int64_t in = p.in / p.groups, out = p.out / p.groups;
    return p.transpose_kernel ? (tap * out + o) * p.in + g * in + i : ((taps() - 1 - tap) * in + i) * p.out + g * out + o;
  }
};

// body(source, image, kernel element) for all that meet.
template <class Body>
void ForEachProduct(const ConvProblem& p, const Body& body) {
  const Arrays arrays = {p};
  const Axis& a = p.axis[0];
  const Axis& b = p.axis[1];
  const Axis& c = p.axis[2];
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t window = 0; window < arrays.windows(); ++window) {
      const int64_t i = window / (b.windows * c.windows), j = window / c.windows % b.windows, k = window % c.windows;
      for (int64_t tap = 0; tap < arrays.taps(); ++tap) {
        const int64_t x = i * a.stride - a.low + tap / (b.taps * c.taps) * a.dilation;
        const int64_t y = j * b.stride - b.low + tap / c.taps % b.taps * b.dilation;
        const int64_t z = k * c.stride - c.low + tap % c.taps * c.dilation;
        if (x < 0 || x >= a.size || y < 0 || y >= b.size || z < 0 || z >= c.size) continue;
        const int64_t pixel = (x * b.size + y) * c.size + z;
        const int64_t in = p.in / p.groups, out = p.out / p.groups;
        for (int64_t g = 0; g < p.groups; ++g) {
          for (int64_t s = 0; s < in; ++s) {
            for (int64_t t = 0; t < out; ++t) {
              body(arrays.source(n, window, g * in + s), arrays.image(n, pixel, g * out + t), arrays.kernel(tap, g, s, t));
            }
          }
        }
      }
    }
  }
}

ConvProblem RandomConvolution(Type type) {
  ConvProblem p = {};
  p.type = type;
  p.wide = random_number.OneIn(3);
  p.channels_last = random_number.OneIn(2);
  p.transpose_kernel = random_number.OneIn(2);
  p.batch = random_number.OneIn(20) ? 12 : random_number(1, 3);
  switch (random_number(0, 3)) {
    case 0:  // depthwise
      p.groups = random_number(1, 40);
      p.in = p.groups;
      p.out = p.groups * random_number(1, 2);
      break;
    case 1:  // grouped
      p.groups = random_number(2, 4);
      p.in = p.groups * (random_number.OneIn(2) ? random_number(1, 6) : random_number(8, 20));
      p.out = p.groups * random_number(1, 20);
      if (random_number.OneIn(3)) {  // as many to as from each, and whole vectors of them
        p.groups = 4 * random_number(1, 4);
        p.in = p.out = p.groups << random_number(1, 3);
      }
      break;
    default:  // dense, to few or to many channels
      p.groups = 1;
      p.in = random_number(1, 37);
      p.out = random_number.OneIn(2) ? random_number(1, 3) : random_number(4, 40);
  }
  for (Axis& axis : p.axis) axis = Axis();
  const int64_t rank = random_number(1, 3);
  const int64_t windows[] = {0, 60, 7, 4}, taps[] = {0, 9, 4, 3};
  for (int64_t a = 3 - rank; a < 3; ++a) {
    Axis& axis = p.axis[a];
    axis.windows = random_number(1, windows[rank]);
    axis.taps = random_number(1, taps[rank]);
    axis.stride = random_number(1, 4);
    axis.dilation = random_number.OneIn(3) ? random_number(2, 3) : 1;
    axis.low = random_number.OneIn(2) ? random_number(-2, axis.dilation * (axis.taps - 1)) : 0;
    const int64_t whole = (axis.windows - 1) * axis.stride + axis.dilation * (axis.taps - 1) + 1;
    axis.size = std::max<int64_t>(1, whole - axis.low + random_number(-3, 3));
  }
  if (random_number.OneIn(6)) {  // axes that windows do not touch, all of them or some
    const int64_t pixels[] = {0, 300, 20, 8};
    for (int64_t a = 3 - rank; a < 3; ++a) {
      if (random_number.OneIn(5)) continue;
      p.axis[a] = Axis();
      p.axis[a].size = p.axis[a].windows = random_number(1, pixels[rank]);
    }
  }
  if (rank == 1 && p.in * p.out / p.groups < 200 && random_number.OneIn(4)) {  // more windows than one task adds up
    p.axis[2].size += 2000 * p.axis[2].stride;
    p.axis[2].windows += 2000;
  }
  return p;
}

std::string Describe(const char* op, const ConvProblem& p) {
  char text[400];
  int length = std::snprintf(text, sizeof text, "%s %s%s batch %d in %d out %d groups %d%s%s", op, FormatOf(p.type).name,
                             p.wide ? " wide" : "", static_cast<int>(p.batch), static_cast<int>(p.in),
                             static_cast<int>(p.out), static_cast<int>(p.groups), p.channels_last ? " channels last" : "",
                             p.transpose_kernel ? " transpose_kernel" : "");
  for (const Axis& axis : p.axis) {
    length += std::snprintf(text + length, sizeof text - length, " (%d -> %d k%d s%d d%d low%d)",
                            static_cast<int>(axis.windows), static_cast<int>(axis.size), static_cast<int>(axis.taps),
                            static_cast<int>(axis.stride), static_cast<int>(axis.dilation), static_cast<int>(axis.low));
  }
  return text;
}

void TestConvTranspose(Type type) {
  ConvProblem p = RandomConvolution(type);
  const Arrays arrays = {p};
  Numbers x = RandomFloats(arrays.source_size()), kernel = RandomFloats(arrays.kernel_size()),
          gradient = RandomFloats(arrays.image_size());
  if (random_number.OneIn(4)) Poison(random_number.OneIn(3) ? kernel : random_number.OneIn(2) ? gradient : x);
  Sums image(gradient.size()), source(x.size()), weights(kernel.size());
  ForEachProduct(p, [&](int64_t s, int64_t i, int64_t k) {
    image[i].Add(x[s] * kernel[k]);
    source[s].Add(gradient[i] * kernel[k]);
    weights[k].Add(x[s] * gradient[i]);
  });
  const Type stored = p.wide ? Accumulator(type) : type;
  const Bytes x_bytes = Encode(type, x), kernel_bytes = Encode(type, kernel), gradient_bytes = Encode(type, gradient);
  const auto run = [&](ConvOp op, const char* name, const Bytes& first, const Bytes& second, const Sums& wanted) {
    ++problems;
    p.op = op;
    p.operand[0] = first.data();
    p.operand[1] = second.data();
    Bytes result(wanted.size() * FormatOf(stored).size, 0xa5);
    p.result = result.data();
    {
      Threads threads;
      p.workers = &threads.workers;
      if (!Compute(p)) Fail("no memory", Describe(name, p), 0, 0, 0);
    }
    Close("result", Describe(name, p), stored, type, Decode(stored, result), wanted);
  };
  run(ConvOp::kForward, "conv_transpose", x_bytes, kernel_bytes, image);
  run(ConvOp::kDataGradient, "conv_transpose_gradient_data", gradient_bytes, kernel_bytes, source);
  run(ConvOp::kWeightGradient, "conv_transpose_gradient_weights", gradient_bytes, x_bytes, weights);
}

// This file itself is compiled for the baseline.
bool ProcessorHas(const std::string& instruction_set) {
#if defined(__x86_64__)
  if (instruction_set == "x86_64_v4") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (instruction_set == "x86_64_v3") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !instruction_set.empty();
}

#define JAX_MPS_TEXT_OF(name) #name
#define JAX_MPS_TEXT(name) JAX_MPS_TEXT_OF(name)

void* OrThrow(void* data) {
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace
}  // namespace jax_mps

void* operator new(size_t bytes) { return jax_mps::OrThrow(jax_mps::Allocate(bytes, alignof(std::max_align_t))); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return jax_mps::OrThrow(jax_mps::Allocate(bytes, static_cast<size_t>(alignment)));
}
void* operator new(size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return jax_mps::Allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, size_t, std::align_val_t) noexcept { std::free(data); }

int main(int count, char** arguments) {
  using namespace jax_mps;
  const std::string instruction_set = JAX_MPS_TEXT(JAX_MPS_ISA);
  if (!ProcessorHas(instruction_set)) {
    std::printf("this processor lacks %s\n", instruction_set.c_str());
    return 77;
  }
  const int each = count > 1 ? std::atoi(arguments[1]) : 100;
  if (count > 2) random_number.Seed(std::strtoull(arguments[2], nullptr, 10));
  for (Type type : {Type::kF32, Type::kF64, Type::kF16, Type::kBF16}) {
    for (int i = 0; i < each; ++i) {
      TestMaxPoolTap(type);
      TestAvgPool(type);
      TestL2Pool(type);
      TestConvTranspose(type);
    }
  }
  for (Type type : {Type::kF32, Type::kF64, Type::kF16, Type::kBF16, Type::kS8, Type::kS16, Type::kS32, Type::kU8,
                    Type::kU16, Type::kU32}) {
    for (int i = 0; i < each; ++i) {
      TestMaxPool(type);
      TestMaxUnpool(type);
    }
  }
  TestSharing();
  TestFailure();
  std::printf("%s: %d problems, %d differences\n", instruction_set.c_str(), problems, failures);
  return failures == 0 && problems > 0 ? 0 : 1;
}
