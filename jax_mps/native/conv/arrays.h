// Arrays of any element type and order, tiles of them, and how one is copied to the other.
#pragma once

#include <cstdint>

#include "axis.h"
#include "conv/geometry.h"
#include "conv/panels.h"
#include "isa.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// ---- Transposition of small blocks.

// body(n, row, column) for blocks of n x n numbers, n = 4 or else 1, that cover rows x columns. The last may overlap others.
template <class Body>
inline void ForBlocks(int64_t rows, int64_t columns, const Body& body) {
  if (rows >= 4 && columns >= 4) {
    for (int64_t r = 0; r < rows; r += 4) {
      for (int64_t c = 0; c < columns; c += 4) body(Int<4>(), Least(r, rows - 4), Least(c, columns - 4));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) body(Int<1>(), r, c);
    }
  }
}

// to[r * to_row + c * to_column] = from[r * from_row + c * from_column], through numbers of type T. On both sides one of the
// steps is 1.
template <class T, class From, class To>
inline void CopyMatrix(int64_t rows, int64_t columns, const From* from, int64_t from_row, int64_t from_column, To* to,
                       int64_t to_row, int64_t to_column) {
  if (from_column != 1) return CopyMatrix<T>(columns, rows, from, from_column, from_row, to, to_column, to_row);
  if (to_column == 1) {
    for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
      Sweep<kLanes<T>>(columns, [&](auto n, auto vectors, int64_t c) {
        constexpr int kN = decltype(n)::value;
        for (int v = 0; v < decltype(vectors)::value; ++v, c += kN) Store<kN>(to + c, Load<T, kN>(from + c));
      });
    }
  } else {
    ForBlocks(rows, columns, [&](auto n, int64_t r, int64_t c) {
      constexpr int kN = decltype(n)::value;
      Vec<T, kN> m[kN];
      for (int i = 0; i < kN; ++i) m[i] = Load<T, kN>(from + (r + i) * from_row + c);
      if constexpr (kN == 4) Transpose(m);
      for (int i = 0; i < kN; ++i) Store<kN>(to + r + (c + i) * to_column, m[i]);
    });
  }
}

// ---- Between arrays of any element type and order, and tiles: numbers of type T, channels last.

template <class E>
struct Array {
  E* data;
  int64_t size[3], channels;
  bool last;

  int64_t pixels() const { return size[0] * size[1] * size[2]; }
  int64_t row(int64_t b, int64_t i, int64_t j) const {
    const int64_t line = (i * size[1] + j) * size[2];
    return last ? (b * pixels() + line) * channels : b * pixels() * channels + line;
  }
};

// A box of an array: [begin, end) along the batch and the three axes.
struct Box {
  Range range[4];
  int64_t length(int a) const { return range[a].end - range[a].begin; }
  int64_t rows() const { return length(0) * length(1) * length(2); }
  int64_t size() const { return rows() * length(3); }
};

// Strides of the pixels in a tile or an array; position 0 is pixel `low`.
struct View {
  int64_t low[4], stride[4];
  int64_t at(int a, int64_t i) const { return (i - low[a]) * stride[a]; }
};

inline Box BoxOf(const GatherPlan& plan, int64_t number) {
  Box box;
  for (int a = 3; a >= 0; --a) {
    const int64_t begin = number % plan.boxes[a] * plan.box[a];
    number /= plan.boxes[a];
    box.range[a] = {begin, Least(begin + plan.box[a], plan.targets[a])};
  }
  return box;
}

inline View ViewOf(const Box& box, int64_t pitch) {
  View view;
  for (int a = 3; a >= 0; --a) {
    view.low[a] = box.range[a].begin;
    view.stride[a] = pitch;
    pitch *= box.length(a);
  }
  return view;
}

template <class E>
inline Box Whole(const Array<E>& array, int64_t batch) {
  return {{{0, batch}, {0, array.size[0]}, {0, array.size[1]}, {0, array.size[2]}}};
}

// Picks lane i / narrow * depth + d for lane i of a vector; as 4-byte lanes.
template <class T>
struct PickTable {
  static constexpr int kParts = sizeof(T) / 4;
  int32_t lane[kVectorBytes / 4];

  void Set(int64_t depth, int64_t narrow, int64_t d) {
    for (int64_t i = 0; i < kVectorBytes / 4; ++i) {
      lane[i] = static_cast<int32_t>((i / kParts / narrow * depth + d) * kParts + i % kParts);
    }
  }
};

// The copies of a pixel: lane l of copy d is channel l / narrow * depth + d.
template <class E, class T>
struct Expansion {
  static constexpr int kN = kLanes<T>;
  int64_t groups, depth, narrow, copy;
  int64_t picked = 0, step = 0;  // vectors of a copy that are picked from one of the pixel's; channels from one to the next
  PickTable<T> table[kN];

  Expansion(int64_t channels, int64_t depth, int64_t narrow, int64_t copy)
      : groups(channels / depth), depth(depth), narrow(narrow), copy(copy) {
    if (!kPicks || depth * narrow == 1 || depth > narrow || kN % narrow != 0) return;
    step = kN / narrow * depth;
    picked = channels < kN ? 0 : Least(groups * narrow / kN, (channels - kN) / step + 1);
    for (int64_t d = 0; d < depth; ++d) table[d].Set(depth, narrow, d);
  }

  void operator()(const E* pixel, T* to) const {
    for (int64_t v = 0; v < picked; ++v) {
      const Vec<T, kN> channels = Load<T, kN>(pixel + v * step);
      for (int64_t d = 0; d < depth; ++d) StoreRaw<kN>(to + d * copy + v * kN, Pick(channels, table[d].lane));
    }
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t g = picked * kN / narrow; g < groups; ++g) {
        const T number = Load<T, 1>(pixel + g * depth + d)[0];
        for (int64_t l = g * narrow; l < (g + 1) * narrow; ++l) to[d * copy + l] = number;
      }
    }
  }
};

// Copies a box into a tile of `pitch` elements a pixel. Lane l of copy d is channel l / narrow * depth + d: several copies
// give each lane of a group, in turn, all the channels that it is multiplied with.
template <class E, class T>
inline void Stage(const Array<const E>& from, const Box& box, T* to, int64_t pitch, int64_t depth, int64_t narrow) {
  const int64_t width = box.length(3), plane = from.pixels();
  const int64_t lanes = from.channels / depth * narrow;
  const int64_t copy = pitch / depth;
  const Expansion<E, T> expand(from.channels, depth, narrow, copy);
  for (int64_t b = box.range[0].begin; b < box.range[0].end; ++b) {
    for (int64_t i = box.range[1].begin; i < box.range[1].end; ++i) {
      for (int64_t j = box.range[2].begin; j < box.range[2].end; ++j, to += width * pitch) {
        const E* row = from.data + from.row(b, i, j) + box.range[3].begin * (from.last ? from.channels : 1);
        if (from.last && depth == 1 && narrow == 1 && copy == lanes) {
          Sweep<kLanes<T>>(width * lanes, [&](auto n, auto vectors, int64_t at) {
            constexpr int kN = decltype(n)::value;
            for (int v = 0; v < decltype(vectors)::value; ++v, at += kN) StoreRaw<kN>(to + at, Load<T, kN>(row + at));
          });
        } else if (from.last) {
          for (int64_t w = 0; w < width; ++w) expand(row + w * from.channels, to + w * pitch);
        } else {
          for (int64_t d = 0; d < depth; ++d) {
            ForBlocks(lanes, width, [&](auto n, int64_t l, int64_t w) {
              constexpr int kN = decltype(n)::value;
              Vec<T, kN> m[kN];
              for (int i = 0; i < kN; ++i) m[i] = Load<T, kN>(row + ((l + i) / narrow * depth + d) * plane + w);
              if constexpr (kN == 4) Transpose(m);
              for (int i = 0; i < kN; ++i) StoreRaw<kN>(to + (w + i) * pitch + d * copy + l, m[i]);
            });
          }
        }
      }
    }
  }
}

// Copies channels [begin, end) of a tile, which holds them from `to` on at `pitch`, to an array.
template <class E, class T>
inline void Emit(const T* tile, int64_t pitch, const Array<E>& to, const Box& box, Range channels) {
  const int64_t width = box.length(3), plane = to.pixels(), count = channels.end - channels.begin;
  for (int64_t b = box.range[0].begin; b < box.range[0].end; ++b) {
    for (int64_t i = box.range[1].begin; i < box.range[1].end; ++i) {
      for (int64_t j = box.range[2].begin; j < box.range[2].end; ++j, tile += width * pitch) {
        E* row = to.data + to.row(b, i, j) + box.range[3].begin * (to.last ? to.channels : 1);
        if (to.last) {
          const bool joined = pitch == count && to.channels == count;
          for (int64_t w = 0; w < (joined ? 1 : width); ++w) {
            E* pixel = row + w * to.channels + channels.begin;
            Sweep<kLanes<T>>(joined ? width * count : count, [&](auto n, auto vectors, int64_t at) {
              constexpr int kN = decltype(n)::value;
              for (int v = 0; v < decltype(vectors)::value; ++v, at += kN) {
                Store<kN>(pixel + at, LoadRaw<T, kN>(tile + w * pitch + at));
              }
            });
          }
        } else {
          ForBlocks(count, width, [&](auto n, int64_t c, int64_t w) {
            constexpr int kN = decltype(n)::value;
            Vec<T, kN> m[kN];
            for (int i = 0; i < kN; ++i) m[i] = LoadRaw<T, kN>(tile + (w + i) * pitch + c);
            if constexpr (kN == 4) Transpose(m);
            for (int i = 0; i < kN; ++i) Store<kN>(row + (channels.begin + c + i) * plane + w, m[i]);
          });
        }
      }
    }
  }
}

template <class E>
inline Array<E> Windows(const ConvProblem& p, void* data) {
  return {static_cast<E*>(data), {p.axis[0].windows, p.axis[1].windows, p.axis[2].windows}, p.in, p.channels_last};
}
template <class E>
inline Array<E> Image(const ConvProblem& p, void* data) {
  return {static_cast<E*>(data), {p.axis[0].size, p.axis[1].size, p.axis[2].size}, p.out, p.channels_last};
}

// Whether zeros times these are zeros.
template <class E>
inline bool Finite(const E* numbers, int64_t count) {
  using T = Acc<E>;
  constexpr int kN = kLanes<T>;
  Vec<T, kN> sum[4] = {};
  Sweep<kN>(count, [&](auto lanes, auto vectors, int64_t i) {
    constexpr int kSome = decltype(lanes)::value;
    for (int v = 0; v < decltype(vectors)::value; ++v) {
      const auto number = Load<T, kSome>(numbers + i + v * kSome);
      if constexpr (kSome == kN) {
        sum[v] += number - number;
      } else {
        for (int lane = 0; lane < kSome; ++lane) sum[0][lane] += number[lane] - number[lane];
      }
    }
  });
  bool finite = true;
  for (int lane = 0; lane < kN; ++lane) finite &= sum[0][lane] + sum[1][lane] + sum[2][lane] + sum[3][lane] == 0;
  return finite;
}

inline int64_t TapCount(const ConvProblem& p) { return p.axis[0].taps * p.axis[1].taps * p.axis[2].taps; }

// What tasks are cut by: a problem takes about as long as it takes to move so many bytes.
template <class E>
inline double Effort(const ConvProblem& p) {
  double windows = p.batch, pixels = p.batch;
  for (const Axis& axis : p.axis) windows *= axis.windows, pixels *= axis.size;
  const double products = windows * TapCount(p) * (p.in / p.groups) * p.out;
  return (windows * p.in + pixels * p.out) * sizeof(E) + products / 2;
}

// The kernel array as [group][tap][in][out] with strides.
struct KernelLayout {
  int64_t base, group, tap, in, out;
};

inline KernelLayout LayoutOf(const ConvProblem& p) {
  const int64_t in = p.in / p.groups, out = p.out / p.groups;
  if (p.transpose_kernel) return {0, in, out * p.in, 1, p.in};
  return {(TapCount(p) - 1) * in * p.out, out, -in * p.out, p.out, 1};
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
