// Average pooling and its transpose.
#pragma once

#include <cstdint>

#include "isa.h"
#include "pooling/geometry.h"
#include "pooling/kernels.h"
#include "pooling/tiles.h"
#include "pooling/walk.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

template <class T>
struct Average {
  using Element = T;
  using Wide = Acc<T>;
  static constexpr int kLanes = kSumLanes<T, Wide>;
  // The longer what is read of a row, the better it streams.
  static constexpr int kVectors = (kVectorBytes == 64 ? 16 : 8) / kSumVectors<T>;
  static constexpr bool kBackward = false, kSeparable = true, kRounds = !std::is_same_v<Wide, double>;
  template <int N>
  using State = Sums<T, Wide, N>;

  const T* source;
  T* target;
  bool weighted;
  Wide divisor;
  bool stream;  // of no use here: averages are smaller than what was read

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return State<N>{};
  }
  template <int N, class V>
  void Tap(Int<N>, V& sum, int64_t from, int64_t) const {
    V value;
    Load<N>(source + from, value);
    sum += value;
  }
  template <class V>
  static void Merge(V& sum, V value) {
    sum += value;
  }
  template <int N, class V>
  void Finish(Int<N>, V sum, int64_t to) const {
    Store<N>(target + to, divisor != 0 ? sum / divisor : V{});
  }
  Average At(int64_t counted) const {
    return {source, target, weighted, weighted ? static_cast<Wide>(counted) : divisor, stream};
  }
  Average Stage(const Plan& plan, const Piece& piece, Wide* row) const {
    ReduceRows(plan, piece, ToScratch<Average>(*this, row));
    return *this;
  }
};

template <class T>
struct AverageGradient {
  using Element = T;
  using Wide = Acc<T>;
  static constexpr int kLanes = kSumLanes<T, Wide>, kVectors = 8 / kSumVectors<T>;
  static constexpr bool kBackward = true, kSeparable = true, kAlike = true;
  static constexpr bool kRounds = !std::is_same_v<Wide, double>;
  template <int N>
  using State = Sums<T, Wide, N>;

  const T* source;
  T* target;
  bool weighted;  // whether what is summed was divided already
  Wide divisor;
  bool stream;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return State<N>{};
  }
  template <int N, class V>
  void Tap(Int<N>, V& sum, int64_t from, int64_t) const {
    V value;
    Load<N>(source + from, value);
    sum += value;
  }
  template <class V>
  static void Merge(V& sum, V value) {
    sum += value;
  }
  template <int N, class V>
  void Finish(Int<N>, V sum, int64_t to) const {
    const V value = weighted ? sum : sum / divisor;
    if (stream) return Stream<N>(target + to, value);
    Store<N>(target + to, value);
  }
  const AverageGradient& At(int64_t) const { return *this; }

  template <int N>
  State<N> Share(Int<N>, int64_t from, int64_t counted) const {
    State<N> value;
    Load<N>(source + from, value);
    if (!weighted) return value / divisor;
    return counted != 0 ? value / static_cast<Wide>(counted) : State<N>{};
  }
  bool Weighted() const { return weighted; }
  AverageGradient Shared() const { return {source, target, true, divisor, stream}; }

  // Sums of rows, divided.
  struct Quotient : ToScratch<AverageGradient> {
    using ToScratch<AverageGradient>::ToScratch;
    template <int N, class V>
    void Finish(Int<N>, V sum, int64_t to) const {
      StoreRaw<N>(this->scratch + to, sum / this->divisor);
    }
  };

  AverageGradient Stage(const Plan& plan, const Piece& piece, Wide* row) const {
    const AverageGradient divided = Shared();
    if (!weighted && plan.alone) {
      ReduceRows(plan, piece, Quotient(*this, row));
      return divided;
    }
    if (!weighted) {
      ReduceRows(plan, piece, ToScratch<AverageGradient>(*this, row));
      return *this;
    }
    // Each window is divided by its own number of taps before it is added.
    const Reads rows = RowsOf(plan, piece);
    const Reach& planes = *piece.reach[0];
    const Reach& lines = *piece.reach[1];
    const Chunk& chunk = *piece.chunk;
    for (int64_t i = chunk.source_begin; i < chunk.source_end; ++i) {
      Wide* to = row + (i - chunk.source_begin) * plan.block;
      Sweep<kLanes, kVectors>(piece.channels, [&](auto lanes, auto vectors, int64_t c) __attribute__((always_inline)) {
        constexpr int kN = decltype(lanes)::value;
        for (int v = 0; v < decltype(vectors)::value; ++v, c += kN) {
          Total<AverageGradient, State<kN>> total{};
          State<kN> part{};
          int64_t left = kPartTaps;
          for (int64_t a = 0; a < planes.count; ++a) {
            for (int64_t b = 0; b < lines.count; ++b) {
              const int64_t counted = plan.window_divisor[0][planes.source + a * plan.line[0].source_step] *
                                      plan.window_divisor[1][lines.source + b * plan.line[1].source_step] *
                                      plan.window_divisor[2][i];
              const int64_t from = piece.source + a * rows.row_step[0] + b * rows.row_step[1] + i * plan.inner + c;
              if (counted == 0) continue;
              State<kN> value;
              Load<kN>(source + from, value);
              part += value / static_cast<Wide>(counted);
              if (--left > 0) continue;
              total.Add(part);
              part = State<kN>{};
              left = kPartTaps;
            }
          }
          total.Add(part);
          StoreRaw<kN>(to + c, total.whole);
        }
      });
    }
    return divided;
  }
};

template <template <class> class Op, class T>
bool Averaging(const Problem& problem) {
  const Op<T> op = {static_cast<const T*>(problem.operand[0]), static_cast<T*>(problem.result[0]), problem.geometry.weighted,
                    static_cast<Acc<T>>(problem.geometry.divisor), problem.stream};
  if constexpr (Op<T>::kBackward) {
    const Tiles tiles(problem.geometry);
    if (tiles.possible) return FillTiles(tiles, *problem.workers, op);
  }
  return Walk(problem.geometry, *problem.workers, op);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
