// The loop nest of pooling: every target gathers what its taps read.
//
// An operation `Op` says what is done with it:
//   Element, Wide             type of the sources; type of the sums or keys a row of scratch holds
//   kLanes, kVectors          lanes of a full vector; how many vectors' states fit into the registers (16, 8 or 4)
//   kBackward, kSeparable     direction; whether rows may be reduced before columns
//   State<N>                  N targets in registers (Vec<Wide, N> if backward or separable, unless kKeepsPlaces<Op>)
//   Begin(lanes, target, tap) the state before the first tap
//   Tap(lanes, state, source, tap)    one more tap
//   Merge(state, vector)      the same from reduced rows (if separable)
//   kRounds                   whether that loses digits, as sums of float32 do (if separable)
//   Finish(lanes, state, target)      stores the result
//   At(divisor)               the operation for targets with this number of counted taps
//   Stage(plan, piece, row)   reduces the rows of a piece into one of scratch; returns the operation that goes on from there
//                             (if separable)
//   From(scratch)             the operation on another source (if forward, and not separable or of several planes)
// kPlanes<Op> rows of scratch hold what reduced rows leave, if that is more than a number; then FromScratch<Op> is special.
// And, where there is a shortcut for half precision,
//   kGuarded, Right(vectors, state), Careful()   states that may be wrong are replaced by those of Careful()
//   kNarrows, Ordinary(source, count), Narrow()  sources that are Ordinary() are left to Narrow(), which sums in float32
//   Direct(op)                what takes its place where nothing passes through scratch
// Positions are in elements; `lanes` is an Int<N>.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "parallel_for.h"
#include "pooling/geometry.h"
#include "simd.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// The sources of a run: rows (axes 0 and 1), and in each of them `count` offsets.
struct Reads {
  int64_t rows[2], row_step[2], row_tap_step[2];
  const int64_t* offset;
  int64_t count, tap, tap_step;
};

// The same as a list, where it is short: small windows are many, and three nested loops cost more than their taps do.
struct TapList {
  static constexpr int64_t kMost = 64;
  struct Entry {
    int64_t source, tap;
  };

  const Reads& reads;
  bool listed;
  int64_t count = 0;
  Entry list[kMost];

  explicit TapList(const Reads& reads) : reads(reads), listed(reads.rows[0] * reads.rows[1] * reads.count <= kMost) {
    for (int64_t a = 0; listed && a < reads.rows[0]; ++a) {
      for (int64_t b = 0; b < reads.rows[1]; ++b) {
        const int64_t row = a * reads.row_step[0] + b * reads.row_step[1];
        int64_t tap = reads.tap + a * reads.row_tap_step[0] + b * reads.row_tap_step[1];
        for (int64_t c = 0; c < reads.count; ++c, tap += reads.tap_step) list[count++] = {row + reads.offset[c], tap};
      }
    }
  }
};

// Taps that are combined by themselves before they go to the rest.
constexpr int64_t kPartTaps = 16;

// What parts are combined to. Sums know what they lost by rounding: errors do not grow with the number of parts.
template <class Op, class State>
struct Total {
  State whole, lost{};
  void Add(const State& part) {
    if constexpr (Op::kRounds) {
      AddKeeping(whole, lost, part);
    } else {
      Op::Merge(whole, part);
    }
  }
};

template <class Op>
constexpr int kVector = kVectorBytes / sizeof(typename Op::Wide);
// What is shorter than a sum cut in two may still fill a vector.
template <class Op>
constexpr int kFewer = Op::kLanes > kVector<Op> || Op::kLanes != 16 ? Op::kLanes / 2 : 4;

// Whether states of an operation may be wrong: it has to be asked if they are Right(), and replaced by Careful() where they
// are not.
template <class Op>
constexpr bool kGuarded = false;

// The operation that takes its place where nothing is left in scratch.
template <class Op>
inline const Op& Direct(const Op& op) {
  return op;
}

// Whether an operation has a Narrow() one, of a narrower type, that is as good for sources that are Ordinary().
template <class Op>
constexpr bool kNarrows = false;

template <class Op>
constexpr int kPlanes = 1;

// Whether a backward operation begins with what lies at the target, which phases in scratch would not tell.
template <class Op>
constexpr bool kKeepsPlaces = false;

template <class Op>
constexpr bool Rounds() {
  if constexpr (Op::kSeparable) return Op::kRounds;
  return false;
}

// `op` comes by value: no store to the result can change a copy, so its members stay in registers.
template <class Op>
inline void GatherMany(const Op op, const Reads& reads, int64_t source, int64_t target, int64_t n) {
  Sweep<Op::kLanes, Op::kVectors, kFewer<Op>>(n, [&](auto lanes, auto vectors, int64_t i) __attribute__((always_inline)) {
    constexpr int kN = decltype(lanes)::value;
    constexpr int kVectors = decltype(vectors)::value;
    using State = typename Op::template State<kN>;
    State state[kVectors];
    const auto begin = [&]() __attribute__((always_inline)) {
      for (int v = 0; v < kVectors; ++v) state[v] = op.Begin(lanes, target + i + v * kN, reads.tap);
    };
    // Calls `after(n)` after so many taps of a row; there are kPartTaps of them at most.
    const auto take_all = [&](const auto& after) __attribute__((always_inline)) {
      for (int64_t a = 0; a < reads.rows[0]; ++a) {
        for (int64_t b = 0; b < reads.rows[1]; ++b) {
          const int64_t row = source + i + a * reads.row_step[0] + b * reads.row_step[1];
          int64_t tap = reads.tap + a * reads.row_tap_step[0] + b * reads.row_tap_step[1];
          for (int64_t first = 0; first < reads.count; first += kPartTaps) {
            const int64_t last = reads.count - first < kPartTaps ? reads.count : first + kPartTaps;
            for (int64_t c = first; c < last; ++c, tap += reads.tap_step) {
              const int64_t from = row + reads.offset[c];
              for (int v = 0; v < kVectors; ++v) op.Tap(lanes, state[v], from + v * kN, tap);
            }
            after(last - first);
          }
        }
      }
    };
    begin();
    if constexpr (Rounds<Op>()) {
      Total<Op, State> total[kVectors];
      for (int v = 0; v < kVectors; ++v) total[v].whole = state[v];
      const auto add = [&]() __attribute__((always_inline)) {
        for (int v = 0; v < kVectors; ++v) total[v].Add(state[v]);
      };
      int64_t taken = 0;
      take_all([&](int64_t n) __attribute__((always_inline)) {
        taken += n;
        if (taken < kPartTaps) return;
        add();
        begin();
        taken = 0;
      });
      add();
      for (int v = 0; v < kVectors; ++v) state[v] = total[v].whole;
    } else {
      take_all([](int64_t) {});
    }
    if constexpr (kGuarded<Op>) {
      if (!op.Right(vectors, state)) return Gather(op.Careful(), TapList(reads), source + i, target + i, kVectors * kN);
    }
    for (int v = 0; v < kVectors; ++v) op.Finish(lanes, state[v], target + i + v * kN);
  });
}

template <class Op>
inline void Gather(const Op op, const TapList& taps, int64_t source, int64_t target, int64_t n) {
  if constexpr (kGuarded<Op>) {
    if (n < Op::kLanes) return Gather(op.Careful(), taps, source, target, n);
  }
  if (!taps.listed) return GatherMany(op, taps.reads, source, target, n);
  const TapList::Entry* const end = taps.list + taps.count;
  Sweep<Op::kLanes, Op::kVectors, kFewer<Op>>(n, [&](auto lanes, auto vectors, int64_t i) __attribute__((always_inline)) {
    constexpr int kN = decltype(lanes)::value;
    constexpr int kVectors = decltype(vectors)::value;
    typename Op::template State<kN> state[kVectors];
    for (int v = 0; v < kVectors; ++v) state[v] = op.Begin(lanes, target + i + v * kN, taps.reads.tap);
    for (const TapList::Entry* tap = taps.list; tap != end; ++tap) {
      const int64_t from = source + i + tap->source;
      for (int v = 0; v < kVectors; ++v) op.Tap(lanes, state[v], from + v * kN, tap->tap);
    }
    if constexpr (kGuarded<Op>) {
      if (!op.Right(vectors, state)) return Gather(op.Careful(), taps, source + i, target + i, kVectors * kN);
    }
    for (int v = 0; v < kVectors; ++v) op.Finish(lanes, state[v], target + i + v * kN);
  });
}

// An operation that stops at its state, and one that goes on from there.
template <class Op>
struct ToScratch : Op {
  typename Op::Wide* scratch;
  ToScratch(const Op& op, typename Op::Wide* scratch) : Op(op), scratch(scratch) {}
  ToScratch At(int64_t divisor) const { return {Op::At(divisor), scratch}; }
  template <int N, class V>
  void Finish(Int<N>, V state, int64_t target) const {
    StoreRaw<N>(scratch + target, state);
  }
};

template <class Op>
struct FromScratch : Op {
  // Sums that were cut are whole here, in the order of scratch.
  static constexpr int kLanes = kVector<Op>, kVectors = Op::kVectors * (Op::kLanes / kLanes);
  const typename Op::Wide* scratch;
  FromScratch(const Op& op, const typename Op::Wide* scratch, int64_t) : Op(op), scratch(scratch) {}
  FromScratch At(int64_t divisor) const { return {Op::At(divisor), scratch, 0}; }
  template <int N, class V>
  void Tap(Int<N>, V& state, int64_t source, int64_t) const {
    Op::Merge(state, LoadRaw<typename Op::Wide, N>(scratch + source));
  }
};

template <class Op>
constexpr int kPlanes<FromScratch<Op>> = kPlanes<Op>;

// Between a row and its phases, `length` positions apart: phase p holds the positions p, p + stride, ...
// The row's first position is `first`. `to_phases` is a constant.
template <bool to_phases, class Row, class Phases>
inline void MovePhases(Row* row, Phases* phases, int64_t first, int64_t count, int64_t stride, int64_t length,
                       int64_t pitch) {
  const auto move = [](auto& in_row, auto& in_phase) {
    if constexpr (to_phases) {
      in_phase = in_row;
    } else {
      in_row = in_phase;
    }
  };
  if (pitch == 1 && stride == 2) {
    const int64_t odd = first % 2;
    if (odd != 0) move(row[0], phases[length + first / 2]);
    Phases* __restrict even_phase = phases + (first + odd) / 2;
    Phases* __restrict odd_phase = even_phase + length;
    Row* __restrict pairs = row + odd;
    const int64_t n = (count - odd) / 2;
    for (int64_t j = 0; j < n; ++j) {
      move(pairs[2 * j], even_phase[j]);
      move(pairs[2 * j + 1], odd_phase[j]);
    }
    if ((count - odd) % 2 != 0) move(pairs[2 * n], even_phase[n]);
    return;
  }
  for (int64_t start = 0; start < (stride < count ? stride : count); ++start) {
    const int64_t position = first + start;
    Phases* phase = phases + (position % stride * length + position / stride) * pitch;
    for (int64_t j = start; j < count; j += stride, phase += pitch) {
      for (int64_t c = 0; c < pitch; ++c) move(row[j * pitch + c], phase[c]);
    }
  }
}

// A piece of a target row and its sources.
struct Piece {
  const Chunk* chunk;
  const Reach* reach[2];
  int64_t source, target;  // element of the first row read and of the row written, at the last axis' position 0
  int64_t channels;
};

inline Piece PieceAt(const Plan& plan, int64_t unit) {
  Piece piece;
  const int64_t channel = unit % plan.blocks * plan.block;
  unit /= plan.blocks;
  piece.channels = plan.inner - channel < plan.block ? plan.inner - channel : plan.block;
  piece.chunk = plan.chunks + unit % plan.chunk_count;
  unit /= plan.chunk_count;
  const int64_t row = unit % plan.line[1].targets();
  unit /= plan.line[1].targets();
  const int64_t plane = unit % plan.line[0].targets();
  const int64_t outer = unit / plan.line[0].targets();
  piece.reach[0] = plan.reach[0] + plane;
  piece.reach[1] = plan.reach[1] + row;
  const auto element = [&](int64_t planes, int64_t d, int64_t rows, int64_t h, int64_t width) {
    return ((outer * planes + d) * rows + h) * width * plan.inner + channel;
  };
  piece.source = element(plan.line[0].sources(), piece.reach[0]->source, plan.line[1].sources(), piece.reach[1]->source,
                         plan.line[2].sources());
  piece.target = element(plan.line[0].targets(), plane, plan.line[1].targets(), row, plan.line[2].targets());
  return piece;
}

// The rows a piece reads, with one source in each.
inline Reads RowsOf(const Plan& plan, const Piece& piece) {
  static constexpr int64_t kHere = 0;
  Reads reads;
  const int64_t row = plan.line[2].sources() * plan.inner;
  const int64_t taps = plan.line[2].axis.taps;
  const int64_t step[2] = {plan.line[1].sources() * row, row};
  const int64_t tap[2] = {plan.line[1].axis.taps * taps, taps};
  reads.tap = 0;
  for (int a = 0; a < 2; ++a) {
    reads.rows[a] = piece.reach[a]->count;
    reads.row_step[a] = plan.line[a].source_step * step[a];
    reads.row_tap_step[a] = plan.line[a].tap_step * tap[a];
    reads.tap += piece.reach[a]->tap * tap[a];
  }
  reads.offset = &kHere;
  reads.count = 1;
  reads.tap_step = plan.line[2].tap_step;
  return reads;
}

inline int64_t PhaseElements(const Plan& plan) {
  const int64_t stride = plan.line[2].axis.stride;
  const int64_t targets = plan.chunks[0].end - plan.chunks[0].begin;
  const int64_t phases = plan.line[2].backward && targets < stride ? targets : stride;
  return phases * plan.phase_length * plan.block;
}

// Reduces `count` adjacent sources to one target.
template <int N, class Op, class V>
inline void Fold(const Op& op, V state, int64_t source, int64_t count, int64_t target) {
  Total<Op, V> total = {state};
  constexpr int kParts = 4;  // at a time: one alone would wait for every addition
  for (constexpr int64_t kMany = kParts * kPartTaps * N; count >= kMany; source += kMany, count -= kMany) {
    V part[kParts];
    for (int p = 0; p < kParts; ++p) part[p] = op.Begin(Int<N>(), 0, 0);
    for (int64_t i = 0; i < kMany; i += kParts * N) {
      for (int p = 0; p < kParts; ++p) op.Tap(Int<N>(), part[p], source + i + p * N, 0);
    }
    Op::Merge(part[0], part[1]);
    Op::Merge(part[2], part[3]);
    Op::Merge(part[0], part[2]);
    total.Add(part[0]);
  }
  while (count >= N) {
    auto part = op.Begin(Int<N>(), 0, 0);
    for (int64_t i = 0; i < kPartTaps && count >= N; ++i, source += N, count -= N) op.Tap(Int<N>(), part, source, 0);
    total.Add(part);
  }
  state = total.whole;
  if constexpr (N == 1) {
    op.Finish(Int<1>(), state, target);
  } else {
    typename Op::Wide lanes[N];
    StoreRaw<N>(lanes, state);
    auto half = LoadRaw<typename Op::Wide, N / 2>(lanes);
    Op::Merge(half, LoadRaw<typename Op::Wide, N / 2>(lanes + N / 2));
    Fold<N / 2>(op, half, source, count, target);
  }
}

// All the runs of a piece. `source` is the element of source position 0, as the runs count.
template <class Op>
inline void Runs(const Plan& plan, const Piece& piece, const Op& op, const Reads& rows, int64_t source, int64_t target,
                 int64_t target_pitch) {
  const int64_t divisor = piece.reach[0]->divisor * piece.reach[1]->divisor;
  for (const Run* run = piece.chunk->runs; run != piece.chunk->runs + piece.chunk->run_count; ++run) {
    Reads reads = rows;
    reads.offset = plan.offset + run->first;
    reads.count = run->count;
    reads.tap = rows.rows[0] * rows.rows[1] * run->count > 0 ? rows.tap + run->tap : 0;
    const Op here = op.At(divisor * run->divisor);
    int64_t from = source + run->source * plan.pitch;
    int64_t to = target + run->target * target_pitch;
    if constexpr (Op::kSeparable && !Op::kBackward && !kGuarded<Op>) {
      if (plan.folded) {
        const int64_t count = rows.rows[0] * rows.rows[1] * run->count;  // there is one row, or none
        for (int64_t j = 0; j < run->length; ++j) {
          if constexpr (kPlanes<Op> == 1) {
            Fold<kVector<Op>>(here, here.Begin(Int<kVector<Op>>(), 0, 0), from + *reads.offset, count, to + j);
          } else {
            here.FoldRow(here, from + *reads.offset, count, to + j, reads.tap);
          }
          from += plan.source_advance;
        }
        continue;
      }
    }
    const TapList taps(reads);
    const int64_t together = plan.joined ? run->length : 1;
    for (int64_t j = 0; j < run->length; j += together) {
      Gather(here, taps, from, to, together * piece.channels);
      from += plan.source_advance * plan.pitch;
      to += plan.target_advance * target_pitch;
    }
  }
}

// Finishes n targets from their sums.
template <class Op>
inline void FinishSums(const Op op, const typename Op::Wide* sums, int64_t target, int64_t n) {
  Sweep<kVector<Op>>(n, [&](auto lanes, auto vectors, int64_t i) __attribute__((always_inline)) {
    constexpr int kN = decltype(lanes)::value;
    for (int v = 0; v < decltype(vectors)::value; ++v, i += kN) {
      op.Finish(lanes, LoadRaw<typename Op::Wide, kN>(sums + i), target + i);
    }
  });
}

// Runs, from a source that the runs' pitch fits, to the result.
template <class Op>
inline void Columns(const Plan& plan, const Piece& piece, const Op& op, const Reads& rows, int64_t source,
                    typename Op::Wide* scratch) {
  if constexpr (Op::kBackward && !kKeepsPlaces<Op>) {
    if (plan.phased) {
      typename Op::Wide* row = scratch + PhaseElements(plan);
      Runs(plan, piece, ToScratch<Op>(op, scratch), rows, source, 0, plan.block);
      MovePhases<false>(row, scratch, 0, piece.chunk->end - piece.chunk->begin, plan.line[2].axis.stride, plan.phase_length,
                        plan.block);
      const Chunk& chunk = *piece.chunk;
      return FinishSums(op, row, piece.target + chunk.begin * plan.inner, (chunk.end - chunk.begin) * plan.inner);
    }
  }
  Runs(plan, piece, op, rows, source, piece.target, plan.inner);
}

// Reduces the rows a piece reads into one, of adjacent positions. `to` finishes in scratch.
template <class Op>
inline void ReduceRows(const Plan& plan, const Piece& piece, const Op& to) {
  const Reads rows = RowsOf(plan, piece);
  const TapList taps(rows);
  const int64_t begin = piece.chunk->source_begin;
  const int64_t count = piece.chunk->source_end - begin;
  if (plan.blocks == 1) return Gather(to, taps, piece.source + begin * plan.inner, 0, count * plan.inner);
  for (int64_t i = 0; i < count; ++i) {
    Gather(to, taps, piece.source + (begin + i) * plan.inner, i * plan.block, piece.channels);
  }
}

// Whether all that a piece reads is ordinary. `sources` are those of an image: of a small one all are looked at, once,
// whichever piece asks first, as `image` remembers.
struct Looked {
  int64_t image = -1;
  bool ordinary;
};

template <class Op>
inline bool Ordinary(const Plan& plan, const Piece& piece, int64_t image, const Op& op, Looked& looked) {
  constexpr int64_t kSmall = 4096;
  const int64_t sources = plan.line[0].sources() * plan.line[1].sources() * plan.line[2].sources() * plan.inner;
  if (sources <= kSmall) {
    if (looked.image != image) looked = {image, op.Ordinary(image * sources, sources)};
    return looked.ordinary;
  }
  const Reads rows = RowsOf(plan, piece);
  const int64_t count = piece.chunk->source_end - piece.chunk->source_begin;
  const bool whole = plan.blocks == 1;
  for (int64_t a = 0; a < rows.rows[0]; ++a) {
    for (int64_t b = 0; b < rows.rows[1]; ++b) {
      int64_t source = piece.source + a * rows.row_step[0] + b * rows.row_step[1] + piece.chunk->source_begin * plan.inner;
      for (int64_t i = 0; i < (whole ? 1 : count); ++i, source += plan.inner) {
        if (!op.Ordinary(source, whole ? count * plan.inner : piece.channels)) return false;
      }
    }
  }
  return true;
}

// One row at the first tap's place stands for all of them.
inline Reads OneRow(const Reads& rows) {
  Reads one = rows;
  one.rows[0] = one.rows[1] = 1;
  one.tap = 0;
  return one;
}

// Inlined into the loop over pieces: short rows are many.
template <class Op>
JAX_MPS_INLINE void WalkPiece(const Plan& plan, const Piece& piece, const Op& op, typename Op::Wide* scratch) {
  const Axis& axis = plan.line[2].axis;
  const Chunk& chunk = *piece.chunk;
  const int64_t count = chunk.source_end - chunk.source_begin;
  // Where the first source lies, counted from the first tap of the chunk's first window.
  const int64_t first = chunk.source_begin + axis.low - axis.stride * chunk.begin;
  const bool split = plan.phased && !Op::kBackward;
  const Reads rows = RowsOf(plan, piece);
  if constexpr (Op::kSeparable) {
    if (plan.staged) {
      using Wide = typename Op::Wide;
      Wide* row = scratch;
      int64_t plane = plan.span * plan.block;
      scratch += kPlanes<Op> * plane;
      const Op staged = op.Stage(plan, piece, row);
      if (split) {
        const int64_t size = PhaseElements(plan);
        for (int p = 0; p < kPlanes<Op>; ++p) {
          MovePhases<true>(row + p * plane, scratch + p * size, first, count, axis.stride, plan.phase_length, plan.block);
        }
        row = scratch;
        plane = size;
      }
      return Columns(plan, piece, FromScratch<Op>(staged, row, plane), OneRow(rows), 0, scratch);
    }
  }
  if constexpr (!Op::kBackward && (!Op::kSeparable || kPlanes<Op> > 1)) {
    if (split) {
      using Element = typename Op::Element;
      Element* phases = reinterpret_cast<Element*>(scratch);
      const int64_t size = PhaseElements(plan);
      Reads kept = rows;
      kept.row_step[0] = rows.rows[1] * size;
      kept.row_step[1] = size;
      for (int64_t a = 0; a < rows.rows[0]; ++a) {
        for (int64_t b = 0; b < rows.rows[1]; ++b) {
          const Element* row = op.source + piece.source + a * rows.row_step[0] + b * rows.row_step[1];
          MovePhases<true>(row + chunk.source_begin * plan.inner, phases + a * kept.row_step[0] + b * size, first, count,
                           axis.stride, plan.phase_length, plan.block);
        }
      }
      return Columns(plan, piece, op.From(phases), kept, 0, scratch);
    }
  }
  if constexpr (!std::is_same_v<std::decay_t<decltype(Direct(op))>, Op>) {
    if (!plan.folded) return Columns(plan, piece, Direct(op), rows, piece.source, nullptr);
  }
  Columns(plan, piece, op, rows, piece.source, scratch);
}

template <class Op>
size_t ScratchBytes(const Plan& plan) {
  int64_t elements = plan.staged ? kPlanes<Op> * plan.span * plan.block : 0;
  if (plan.phased) {
    elements += PhaseElements(plan) * (Op::kBackward ? 1 : plan.staged ? kPlanes<Op> : plan.rows);
  }
  if (Op::kBackward && plan.phased) elements += (plan.chunks[0].end - plan.chunks[0].begin) * plan.block;
  return elements * sizeof(typename Op::Wide);
}

// Runs the operation over all targets; false if there was no memory for scratch.
template <class Op>
bool Walk(const Geometry& geometry, const Workers& workers, const Op& op) {
  constexpr int kScratch = kPlanes<Op>;
  const int lanes = kKeepsPlaces<Op> ? 1 : kVector<Op>;  // a vector of one has no phases
  const Plan plan(geometry, {Op::kBackward, Op::kSeparable, Op::kSeparable && kScratch == 1, lanes,
                             kScratch * sizeof(typename Op::Wide), kScratch});
  const size_t scratch_bytes = ScratchBytes<Op>(plan);
  const auto body = [&](int64_t begin, int64_t end) {
    using Wide = typename Op::Wide;
    Wide* scratch = nullptr;
    if (scratch_bytes > 0) {
      scratch = static_cast<Wide*>(Scratch(scratch_bytes));
      if (scratch == nullptr) return false;
    }
    Looked looked;
    for (int64_t unit = begin; unit < end; ++unit) {
      const Piece piece = PieceAt(plan, unit);
      if constexpr (kNarrows<Op>) {
        if (Ordinary(plan, piece, unit / (plan.units() / plan.outer), op, looked)) {
          WalkPiece(plan, piece, op.Narrow(), reinterpret_cast<float*>(scratch));
          continue;
        }
      }
      WalkPiece(plan, piece, op, scratch);
    }
    if constexpr (Op::kBackward) StreamFence();
    return true;
  };
  int64_t pixels = 1, windows = 1;
  for (const Axis& axis : geometry.axis) {
    pixels *= axis.size;
    windows *= axis.windows;
  }
  const int64_t bytes = geometry.outer * geometry.inner * (pixels + windows) * sizeof(typename Op::Element);
  return ParallelFor(workers, plan.units(), bytes / plan.units() + 1, body);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
