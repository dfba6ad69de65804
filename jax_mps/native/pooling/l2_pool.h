// L2 pooling, its tangent and its gradient. Everything is summed in float64: there the square of a float32 neither overflows
// nor vanishes. The norm of float16 is summed in float32, where its squares do not, and that of bfloat16 where that shows;
// so is the gradient of either where its operands say so.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "parallel_for.h"
#include "pooling/geometry.h"
#include "pooling/kernels.h"
#include "pooling/tiles.h"
#include "pooling/walk.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// ---- y = sqrt(sum of squares).

template <class T, class R>
struct Norm {
  using Element = T;
  using Wide = std::conditional_t<std::is_same_v<T, F16>, float, double>;
  static constexpr int kLanes = kSumLanes<T, Wide>, kVectors = 8 / kSumVectors<T>;
  static constexpr bool kBackward = false, kSeparable = true, kRounds = !std::is_same_v<Wide, double>;
  template <int N>
  using State = Sums<T, Wide, N>;

  const T* source;
  R* target;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return State<N>{};
  }
  template <int N, class V>
  void Tap(Int<N>, V& sum, int64_t from, int64_t) const {
    V value;
    Load<N>(source + from, value);
    sum += value * value;
  }
  template <class V>
  static void Merge(V& sum, V value) {
    sum += value;
  }
  template <int N, class V>
  void Finish(Int<N>, V sum, int64_t to) const {
    Store<N>(target + to, Sqrt<N>(sum));
  }
  const Norm& At(int64_t) const { return *this; }
  Norm Stage(const Plan& plan, const Piece& piece, Wide* row) const {
    ReduceRows(plan, piece, ToScratch<Norm>(*this, row));
    return *this;
  }
};

// In float32 squares of bfloat16 are exact, and take half of the instructions, but may overflow or vanish.
template <class R>
struct QuickNorm {
  using Element = BF16;
  using Wide = float;
  static constexpr int kLanes = kSumLanes<BF16, Wide>, kVectors = 8 / kSumVectors<BF16>;
  static constexpr bool kBackward = false, kSeparable = true, kRounds = true;
  template <int N>
  struct State {
    Sums<BF16, Wide, N> sum;
    Vec<uint16_t, N> bits;  // of all that was squared
    friend void AddKeeping(State& whole, State& lost, const State& part) {
      AddKeeping(whole.sum, lost.sum, part.sum);
      whole.bits |= part.bits;
    }
  };

  const BF16* source;
  R* target;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return State<N>{};
  }
  template <int N>
  void Tap(Int<N>, State<N>& state, int64_t from, int64_t) const {
    Sums<BF16, Wide, N> value;
    Load<N>(source + from, value);
    state.sum += value * value;
    state.bits |= LoadRaw<uint16_t, N>(&source[from].bits);
  }
  // Whether every sum is finite, and zero only of zeros or else so large that no square that vanished counts.
  template <int V>
  static bool Right(Int<V>, const State<kLanes>* state) {
    using Flags = Vec<int32_t, kLanes / 2>;
    const auto fits = [](auto sum, auto digits) {
      return Bits<Flags>(((sum >= 0x1p-80f) & (sum <= 0x1.fffffep127f)) | (digits == 0));
    };
    Flags all = Flags{} - 1;
    for (int v = 0; v < V; ++v) {
      const auto pairs = Bits<Vec<uint32_t, kLanes / 2>>(state[v].bits);
      all &= fits(state[v].sum.first, pairs & 0x7fffu) & fits(state[v].sum.second, pairs & 0x7fff0000u);
    }
    int32_t right = -1;
    for (int lane = 0; lane < kLanes / 2; ++lane) right &= all[lane];
    return right != 0;
  }
  template <int V, int N>
  static bool Right(Int<V>, const State<N>*) {
    return false;  // not a full vector
  }
  Norm<BF16, R> Careful() const { return {source, target}; }
  template <int N>
  void Finish(Int<N>, const State<N>& state, int64_t to) const {
    Store<N>(target + to, Sqrt<N>(state.sum));
  }
  const QuickNorm& At(int64_t) const { return *this; }
};

template <class R>
constexpr bool kGuarded<QuickNorm<R>> = true;

template <class R>
inline QuickNorm<R> Direct(const Norm<BF16, R>& norm) {
  return {norm.source, norm.target};
}

// float64 has no wider type: sums of three scales, of which the one that neither overflowed nor vanished counts.
struct ScaledNorm {
  using Element = double;
  using Wide = double;
  static constexpr int kLanes = kVectorBytes / sizeof(Wide), kVectors = 4;
  static constexpr bool kBackward = false, kSeparable = false;
  static constexpr double kDown = 0x1p-600, kUp = 0x1p600;
  template <int N>
  struct State {
    Vec<double, N> down, sum, up;
  };

  const double* source;
  double* target;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return {Vec<double, N>{}, Vec<double, N>{}, Vec<double, N>{}};
  }
  template <int N>
  void Tap(Int<N>, State<N>& state, int64_t from, int64_t) const {
    const auto value = LoadRaw<double, N>(source + from);
    state.down += (value * kDown) * (value * kDown);
    state.sum += value * value;
    state.up += (value * kUp) * (value * kUp);
  }
  template <int N>
  void Finish(Int<N>, const State<N>& state, int64_t to) const {
    const auto large = Sqrt<N>(state.down) * kUp;
    const auto small = Sqrt<N>(state.up) * kDown;
    const auto norm = state.sum < 1e-280 ? small : Sqrt<N>(state.sum);
    StoreRaw<N>(target + to, state.sum < 1e300 ? norm : large);
  }
  const ScaledNorm& At(int64_t) const { return *this; }
  ScaledNorm From(const double* other) const { return {other, target}; }
};

// ---- The tangent: sum of x * t over the window, divided by y; 0 where y is.

template <class T, class R>
struct NormTangent {
  using Element = T;
  using Wide = double;
  static constexpr int kLanes = kVectorBytes / sizeof(Wide), kVectors = 8;
  static constexpr bool kBackward = false, kSeparable = true, kRounds = false;
  template <int N>
  using State = Vec<Wide, N>;

  const T* tangent;
  const T* source;
  const Acc<T>* norm;
  R* target;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return State<N>{};
  }
  template <int N, class V>
  void Tap(Int<N>, V& sum, int64_t from, int64_t) const {
    sum += Load<Wide, N>(source + from) * Load<Wide, N>(tangent + from);
  }
  template <class V>
  static void Merge(V& sum, V value) {
    sum += value;
  }
  template <int N, class V>
  void Finish(Int<N>, V sum, int64_t to) const {
    const V y = Load<Wide, N>(norm + to);
    Store<N>(target + to, y == 0 ? V{} : sum / y);
  }
  const NormTangent& At(int64_t) const { return *this; }
  NormTangent Stage(const Plan& plan, const Piece& piece, Wide* row) const {
    ReduceRows(plan, piece, ToScratch<NormTangent>(*this, row));
    return *this;
  }
};

// ---- The gradient: x * sum of g / y over the windows that hold the pixel; windows with y = 0 add nothing.

template <class T, class G, class W = double>
struct NormGradient {
  using Element = T;
  using Wide = W;
  static constexpr int kLanes = kVectorBytes / sizeof(Wide), kVectors = 8;
  static constexpr bool kBackward = true, kSeparable = true, kAlike = false;
  static constexpr bool kRounds = !std::is_same_v<Wide, double>;
  template <int N>
  using State = Vec<Wide, N>;

  const G* gradient;
  const T* source;
  const Acc<T>* norm;
  T* target;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return State<N>{};
  }
  template <int N, class V>
  void Tap(Int<N>, V& sum, int64_t from, int64_t) const {
    const V y = Load<Wide, N>(norm + from);
    sum += y == 0 ? V{} : Load<Wide, N>(gradient + from) / y;
  }
  template <class V>
  static void Merge(V& sum, V value) {
    sum += value;
  }
  template <int N, class V>
  void Finish(Int<N>, V sum, int64_t to) const {
    Store<N>(target + to, Load<Wide, N>(source + to) * sum);
  }
  const NormGradient& At(int64_t) const { return *this; }
  template <int N>
  State<N> Share(Int<N> lanes, int64_t from, int64_t) const {
    State<N> value{};
    Tap(lanes, value, from, 0);
    return value;
  }
  bool Weighted() const { return false; }
  const NormGradient& Shared() const { return *this; }
  // Whether all quotients are zero or from 2^-120 to 2^100: no sum of them overflows, none has lost digits.
  bool Ordinary(int64_t from, int64_t count) const {
    bool ordinary = true;
    Sweep<kVectorBytes / 4>(count, [&](auto lanes, auto vectors, int64_t i) __attribute__((always_inline)) {
      constexpr int kN = decltype(lanes)::value;
      using Flags = Vec<int32_t, kN>;
      // Other than zero, and than the powers of two from `least` to `most`.
      const auto strange = [](const auto* number, int least, int most) __attribute__((always_inline)) {
        const auto magnitude = Bits<Vec<uint32_t, kN>>(Load<float, kN>(number)) & 0x7fffffff;
        const uint32_t first = (127 + least) << 23, last = (127 + most) << 23;
        return Bits<Flags>((magnitude - first > last - first) & (magnitude != 0));
      };
      Flags any = {};
      for (int v = 0; v < decltype(vectors)::value; ++v, i += kN) {
        any |= strange(gradient + from + i, -100, 50) | strange(norm + from + i, -50, 20);
      }
      for (int lane = 0; lane < kN; ++lane) ordinary &= any[lane] == 0;
    });
    return ordinary;
  }
  NormGradient<T, G, float> Narrow() const { return {gradient, source, norm, target}; }
  NormGradient Stage(const Plan& plan, const Piece& piece, Wide* row) const {
    ReduceRows(plan, piece, ToScratch<NormGradient>(*this, row));
    return *this;
  }
};

// Sums of half precision are as well in float32, which takes half of the instructions.
template <class T, class G>
constexpr bool kNarrows<NormGradient<T, G, double>> = kHalf<T>;

// float64 has no wider type, and g / y may leave its range where x * g / y does not: x / y, which is at most 1, comes first.
struct RatioGradient {
  using Element = double;
  using Wide = double;
  static constexpr int kLanes = kVectorBytes / sizeof(Wide), kVectors = 4;
  static constexpr bool kBackward = true, kSeparable = false;
  template <int N>
  struct State {
    Vec<double, N> pixel, sum;
  };

  const double* gradient;
  const double* source;
  const double* norm;
  double* target;

  template <int N>
  State<N> Begin(Int<N>, int64_t to, int64_t) const {
    return {LoadRaw<double, N>(source + to), Vec<double, N>{}};
  }
  template <int N>
  void Tap(Int<N>, State<N>& state, int64_t from, int64_t) const {
    const auto y = LoadRaw<double, N>(norm + from);
    state.sum += y == 0 ? Vec<double, N>{} : state.pixel / y * LoadRaw<double, N>(gradient + from);
  }
  template <int N>
  void Finish(Int<N>, const State<N>& state, int64_t to) const {
    StoreRaw<N>(target + to, state.sum);
  }
  const RatioGradient& At(int64_t) const { return *this; }
};

template <>
constexpr bool kKeepsPlaces<RatioGradient> = true;

// Pixels that no window holds get 0, whatever they are: infinity times an empty sum is no number.
template <class T>
bool ClearUnread(const Geometry& geometry, const Workers& workers, T* image) {
  const Unread unread(geometry);
  int64_t inside = geometry.inner, outside = geometry.outer;
  for (const Axis& axis : geometry.axis) outside *= axis.size;
  for (int a = 2; a >= 0; --a) {
    const int64_t size = geometry.axis[a].size;
    outside /= size;
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t r = 0; r < unread.count[a]; ++r) {
          const Range range = unread.ranges[a][r];
          T* first = image + (o * size + range.begin) * inside;
          for (int64_t i = 0; i < (range.end - range.begin) * inside; ++i) first[i] = T{};
        }
      }
      return true;
    };
    if (unread.count[a] > 0 && !ParallelFor(workers, outside, size * inside * sizeof(T), clear)) return false;
    inside *= size;
  }
  return true;
}

template <class T, class R>
bool L2Pool(const Problem& problem) {
  using Op = std::conditional_t<std::is_same_v<T, double>, ScaledNorm, Norm<T, R>>;
  const Op op = {static_cast<const T*>(problem.operand[0]), static_cast<R*>(problem.result[0])};
  return Walk(problem.geometry, *problem.workers, op);
}

template <class T, class R>
bool L2PoolTangent(const Problem& problem) {
  const NormTangent<T, R> op = {static_cast<const T*>(problem.operand[0]), static_cast<const T*>(problem.operand[1]),
                                static_cast<const Acc<T>*>(problem.operand[2]), static_cast<R*>(problem.result[0])};
  return Walk(problem.geometry, *problem.workers, op);
}

template <class T, class G>
bool L2PoolGradient(const Problem& problem) {
  using Op = std::conditional_t<std::is_same_v<T, double>, RatioGradient, NormGradient<T, G>>;
  T* const target = static_cast<T*>(problem.result[0]);
  const Op op = {static_cast<const G*>(problem.operand[0]), static_cast<const T*>(problem.operand[1]),
                 static_cast<const Acc<T>*>(problem.operand[2]), target};
  const Tiles tiles(problem.geometry);
  const auto fill = [&] {
    if constexpr (!std::is_same_v<T, double>) {
      if (tiles.possible) return FillTiles(tiles, *problem.workers, op);
    }
    return Walk(problem.geometry, *problem.workers, op);
  };
  return fill() && ClearUnread(problem.geometry, *problem.workers, target);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
