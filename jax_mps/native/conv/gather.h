// Transposed convolution and its two gradients.
//
// All three are sums of products over channels or pixels, so all end in one register tile: kRows rows of one operand, read
// element by element, times a panel of kPanel vectors of the other (`Multiply`). What differs is what a row is:
//   forward         pixels of one phase that read the same taps; the panel holds output channels. Where the outputs are too
//                   few to fill vectors, windows are multiplied with all taps at once and the products overlap-added.
//   data gradient   windows that read the same taps; the panel holds input channels.
//   weight gradient outputs of a tap; the panel holds input channels, and the sum runs over the windows.
// Groups of few channels have their channels in lanes instead, and a row is read in vectors.

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;  // 32 registers
#else
constexpr int kPanel = 2;
#endif

// The rows of a tile: as many sums as there are registers for.
constexpr int RowsOf(int vectors) {
  const int rows = kRows * kPanel / vectors;
  return rows < 12 ? rows : 12;
}

// The same where rows lie anywhere.
constexpr int ScatteredRowsOf(int vectors) {
#if defined(__x86_64__) || defined(_M_X64)
  // The panel's vectors and an element of a row need a register each, too. With one vector each product takes a load, and no
  // load can be spared for the addresses of more rows than there are registers for.
  return vectors == 1 ? 9 : ((kPanel == 4 ? 32 : 16) - 1 - vectors) / vectors;
#else
  return RowsOf(vectors);
#endif
}

constexpr int kPickedRows = kPanel == 4 ? 5 : 4;  // which keep what is picked from, too

constexpr int64_t kCacheBytes = 256 << 10;  // what a task may keep: half a level-2 cache

inline int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// What meets what: an element of the source all lanes of a panel; a lane the same lane; a lane the channels of its group in
// turn; or all taps at once, whose products are then added to the pixels.
enum class Way { kDense, kAcross, kPicked, kOverlap };

// ---- Picking: lane l of copy d is lane l / depth * depth + d, for depths 2, 4 and 8.

template <class T>
struct PickTables {
  static constexpr int kParts = sizeof(T) / 4;
  int32_t of[3][8][kVectorBytes / 4];
  constexpr PickTables() : of() {
    for (int n = 0, depth = 2; n < 3; ++n, depth *= 2) {
      for (int d = 0; d < depth; ++d) {
        for (int i = 0; i < kVectorBytes / 4; ++i) of[n][d][i] = (i / kParts / depth * depth + d) * kParts + i % kParts;
      }
    }
  }
  constexpr const int32_t (*At(int64_t depth) const)[kVectorBytes / 4] { return of[depth == 2 ? 0 : depth == 4 ? 1 : 2]; }
};
template <class T>
constexpr PickTables<T> kPickTables;

// Whether groups are met by picking: as many inputs as outputs, and whole vectors of groups.
template <class T>
inline bool Picks(int64_t depth, int64_t narrow, int64_t lanes) {
  return kPicks && depth == narrow && (depth == 2 || depth == 4 || depth == 8) && depth < kLanes<T> && lanes % kLanes<T> == 0;
}

// ---- The register tile.

struct Row {
  int64_t source, target;  // elements
};

// `length` consecutive elements of a row meet the steps of a panel from `step` on.
struct Tap {
  int64_t source, step, length;
};

// Lanes are cut into panels of adjacent vectors. Where a part of a vector is left, a panel of one vector ends with the last
// lane and overlaps its neighbour, so that no vector is partial unless there is no other.
struct Panel {
  int64_t start, vectors, first;  // lane; vectors before it
};

template <class T>
struct Lanes {
  int64_t count;
  int64_t whole() const { return count / kLanes<T>; }
  int64_t vectors() const { return (count + kLanes<T> - 1) / kLanes<T>; }
  int64_t panels() const { return (whole() + kPanel - 1) / kPanel + vectors() - whole(); }
  int64_t padded() const { return Most(count, kLanes<T>); }
  Panel panel(int64_t p) const {
    const int64_t first = p * kPanel;
    if (first < whole()) return {first * kLanes<T>, Least(kPanel, whole() - first), first};
    return {Most(0, count - kLanes<T>), 1, whole()};
  }
};

// body(0), ..., body(N - 1) written out: GCC would make a loop that zeroes registers one that fills memory.
template <int N, class Body>
__attribute__((always_inline)) inline void Unroll(const Body& body) {
  if constexpr (N > 1) Unroll<N - 1>(body);
  body(N - 1);
}

// target[row][lane] = sum over taps and elements. `weights` is the panel [step][V vectors]. Flattened: a lambda that were called would find
// the sums in memory.
template <Way way, int R, int V, class S, class T>
__attribute__((noinline, flatten)) void MultiplyTile(const S* source, T* target, const Row* rows, const Tap* taps,
                                                     int64_t tap_count, const T* weights) {
  constexpr int kN = kLanes<T>;
  Vec<T, kN> sum[R][V];
  const S* from[R];
  Unroll<R>([&](int r) {
    from[r] = source + rows[r].source;
    Unroll<V>([&](int v) { sum[r][v] = Vec<T, kN>{}; });
  });
  for (const Tap* tap = taps; tap != taps + tap_count; ++tap) {
    const T* panel = weights + tap->step * (V * kN);
    if constexpr (way == Way::kPicked) {
      const auto table = kPickTables<T>.At(tap->length);
      Unroll<V>([&](int v) {
        Vec<T, kN> lanes[R];
        Unroll<R>([&](int r) { lanes[r] = Load<T, kN>(from[r] + tap->source + v * kN); });
        for (int64_t d = 0; d < tap->length; ++d) {
          const auto weight = LoadRaw<T, kN>(panel + (d * V + v) * kN);
          Unroll<R>([&](int r) { sum[r][v] += Pick(lanes[r], table[d]) * weight; });
        }
      });
    } else if constexpr (way == Way::kAcross) {
      Unroll<V>([&](int v) {
        const auto weight = LoadRaw<T, kN>(panel + v * kN);
        Unroll<R>([&](int r) { sum[r][v] += Load<T, kN>(from[r] + tap->source + v * kN) * weight; });
      });
    } else {
      const int64_t end = tap->source + tap->length;
      for (int64_t i = tap->source; i < end; ++i, panel += V * kN) {
        Vec<T, kN> weight[V];
        Unroll<V>([&](int v) { weight[v] = LoadRaw<T, kN>(panel + v * kN); });
        Unroll<R>([&](int r) {
          const auto element = Broadcast<T, kN>(from[r][i]);
          Unroll<V>([&](int v) { sum[r][v] += element * weight[v]; });
        });
      }
    }
  }
  Unroll<R>([&](int r) {
    Unroll<V>([&](int v) {
      StoreRaw<kN>(target + rows[r].target + v * kN, sum[r][v]);
    });
  });
}

template <Way way, int R, int V, class S, class T>
inline void MultiplyRows(int64_t count, const S* source, T* target, const Row* rows, const Tap* taps, int64_t tap_count,
                         const T* weights) {
  if constexpr (R > 1) {
    if (count < R) return MultiplyRows<way, R - 1, V>(count, source, target, rows, taps, tap_count, weights);
  }
  MultiplyTile<way, R, V>(source, target, rows, taps, tap_count, weights);
}

template <Way way, int V, class S, class T>
inline void MultiplyPanel(int64_t vectors, int64_t count, const S* source, T* target, const Row* rows, const Tap* taps,
                          int64_t tap_count, const T* weights) {
  if constexpr (V > 1) {
    if (vectors < V) {
      return MultiplyPanel<way, V - 1>(vectors, count, source, target, rows, taps, tap_count, weights);
    }
  }
  constexpr int kMost = way == Way::kDense ? ScatteredRowsOf(V) : way == Way::kAcross ? kRows : kPickedRows;
  if (count <= kMost) return MultiplyRows<way, kMost, V>(count, source, target, rows, taps, tap_count, weights);
  // Tiles of equal height: 16 rows are 6, 5 and 5.
  const int64_t tiles = (count + kMost - 1) / kMost;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
    MultiplyRows<way, kMost, V>(end - begin, source, target, rows + begin, taps, tap_count, weights);
  }
}

// ---- Transposition of small blocks.

// Four vectors as the columns of what they were the rows of.
template <class V>
inline void Transpose(V (&m)[4]) {
  const V a = Shuffle<0, 4, 1, 5>(m[0], m[1]), b = Shuffle<2, 6, 3, 7>(m[0], m[1]);
  const V c = Shuffle<0, 4, 1, 5>(m[2], m[3]), d = Shuffle<2, 6, 3, 7>(m[2], m[3]);
  m[0] = Shuffle<0, 1, 4, 5>(a, c);
  m[1] = Shuffle<2, 3, 6, 7>(a, c);
  m[2] = Shuffle<0, 1, 4, 5>(b, d);
  m[3] = Shuffle<2, 3, 6, 7>(b, d);
}

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
inline void Rearrange(int64_t rows, int64_t columns, const From* from, int64_t from_row, int64_t from_column, To* to, int64_t to_row,
                      int64_t to_column) {
  if (from_column != 1) return Rearrange<T>(columns, rows, from, from_column, from_row, to, to_column, to_row);
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

// ---- The kernel, packed into panels: [group][panel][tap][depth][vectors].

// Where entry (group, tap, lane, depth) lies. Lanes count `inner` ones of `lane`, then one of `outer`, and so on.
struct KernelStrides {
  int64_t base, group, tap, depth, lane, inner, outer;
};

template <class T>
struct Weights {
  Lanes<T> lanes;
  int64_t groups, steps;  // steps: taps * depth
  const T* data;

  int64_t group_size() const { return lanes.vectors() * kLanes<T> * steps; }
  int64_t panels() const { return groups * lanes.panels(); }
};

template <class E, class T>
bool Pack(const Workers& workers, const E* kernel, const KernelStrides& strides, int64_t taps, int64_t depth,
          const Weights<T>& weights, T* to) {
  struct Context {
    const E* kernel;
    const KernelStrides& strides;
    int64_t taps, depth;
    const Weights<T>& weights;
    T* to;
  };
  const Context context = {kernel, strides, taps, depth, weights, to};
  const auto body = [](const void* data, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(data);
    constexpr int kN = kLanes<T>;
    const KernelStrides& strides = c.strides;
    const Lanes<T>& lanes = c.weights.lanes;
    const int64_t panels = lanes.panels();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tap = unit % c.taps, panel = unit / c.taps % panels, group = unit / c.taps / panels;
      const auto [start, vectors, first] = lanes.panel(panel);
      T* to = c.to + group * c.weights.group_size() + (first * c.weights.steps + tap * c.depth * vectors) * kN;
      const E* from = c.kernel + strides.base + group * strides.group + tap * strides.tap;
      const int64_t count = Least(vectors * kN, lanes.count - start), pitch = vectors * kN;
      for (int64_t d = 0; count < pitch && d < c.depth; ++d) {
        for (int64_t lane = count; lane < pitch; ++lane) to[d * pitch + lane] = 0;
      }
      // Lanes of one run of `inner` ones are equally far apart.
      for (int64_t lane = 0, next; lane < count; lane = next) {
        const int64_t run = (start + lane) / strides.inner, first = (start + lane) % strides.inner;
        next = Least(count, lane + strides.inner - first);
        Rearrange<T>(c.depth, next - lane, from + run * strides.outer + first * strides.lane, strides.depth, strides.lane,
                     to + lane, pitch, 1);
      }
    }
    return true;
  };
  const int64_t units = weights.panels() * taps;
  const int64_t bytes = depth * kPanel * kLanes<T> * static_cast<int64_t>(sizeof(T));
  return units == 0 || depth == 0 || ParallelFor(workers, units, 4 * bytes, body, &context);
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
  Interval range[4];
  int64_t length(int a) const { return range[a].end - range[a].begin; }
  int64_t rows() const { return length(0) * length(1) * length(2); }
  int64_t size() const { return rows() * length(3); }
};

// Strides of the pixels in a tile or an array; position 0 is pixel `low`.
struct View {
  int64_t low[4], stride[4];
  int64_t at(int a, int64_t i) const { return (i - low[a]) * stride[a]; }
};

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

// The copies of a pixel: lane l of copy d is channel l / narrow * depth + d.
template <class E, class T>
struct Expansion {
  static constexpr int kN = kLanes<T>;
  int64_t groups, depth, narrow, copy;
  int64_t picked = 0, step = 0;  // vectors of a copy that are picked from one of the pixel's; channels from one to the next
  int32_t table[kN][kVectorBytes / 4];

  Expansion(int64_t channels, int64_t depth, int64_t narrow, int64_t copy)
      : groups(channels / depth), depth(depth), narrow(narrow), copy(copy) {
    if (!kPicks || depth * narrow == 1 || depth > narrow || kN % narrow != 0) return;
    step = kN / narrow * depth;
    picked = channels < kN ? 0 : Least(groups * narrow / kN, (channels - kN) / step + 1);
    constexpr int kParts = sizeof(T) / 4;
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t i = 0; i < kN * kParts; ++i) {
        table[d][i] = static_cast<int32_t>((i / kParts / narrow * depth + d) * kParts + i % kParts);
      }
    }
  }

  void operator()(const E* pixel, T* to) const {
    for (int64_t v = 0; v < picked; ++v) {
      const Vec<T, kN> channels = Load<T, kN>(pixel + v * step);
      for (int64_t d = 0; d < depth; ++d) StoreRaw<kN>(to + d * copy + v * kN, Pick(channels, table[d]));
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
inline void Emit(const T* tile, int64_t pitch, const Array<E>& to, const Box& box, Interval channels) {
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
  return {static_cast<E*>(data), {p.axis[0].pixels, p.axis[1].pixels, p.axis[2].pixels}, p.out, p.channels_last};
}

inline int64_t Taps(const ConvProblem& p) { return p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel; }

// What tasks are cut by: a problem takes about as long as it takes to move so many bytes.
template <class E>
inline double Effort(const ConvProblem& p) {
  double windows = p.batch, pixels = p.batch;
  for (const ConvAxis& axis : p.axis) windows *= axis.windows, pixels *= axis.pixels;
  const double products = windows * Taps(p) * (p.in / p.groups) * p.out;
  return (windows * p.in + pixels * p.out) * sizeof(E) + products / 2;
}

// The kernel array as [group][tap][in][out] with strides.
struct KernelLayout {
  int64_t base, group, tap, in, out;
};

inline KernelLayout LayoutOf(const ConvProblem& p) {
  const int64_t in = p.in / p.groups, out = p.out / p.groups;
  if (p.transpose_kernel) return {0, in, out * p.in, 1, p.in};
  return {(Taps(p) - 1) * in * p.out, out, -in * p.out, p.out, 1};
}

// ---- Forward and data gradient.

template <class E, class R>
struct Gather {
  using T = Acc<E>;
  static constexpr int kN = kLanes<T>;

  const ConvProblem& problem;
  const GatherPlan& plan;
  Way way;
  Array<const E> source;
  Array<R> target;
  Weights<T> weights;
  int64_t depth, narrow;  // channels of a group of the source, of the target
  bool direct_source = false, direct_target = false;  // arrays that need no tile
  int64_t source_pitch = 0, target_pitch = 0, group_pitch = 0;  // of tiles
  int64_t splits = 1;  // of the panels
  int64_t product_room = 0, source_room = 0, target_room = 0, row_room = 0, tap_room = 0;  // elements of scratch

  bool forward() const { return problem.op == ConvOp::kForward; }

  Box BoxAt(int64_t unit) const {
    Box box;
    for (int a = 3; a >= 0; --a) {
      const int64_t begin = unit % plan.boxes[a] * plan.box[a];
      unit /= plan.boxes[a];
      box.range[a] = {begin, Least(begin + plan.box[a], plan.targets[a])};
    }
    return box;
  }

  Box SourceBox(const Box& box) const {
    Box sources = box;
    for (int a = 0; a < 3; ++a) sources.range[a + 1] = SourcesOf(problem.axis[a], forward(), box.range[a + 1]);
    return sources;
  }

  int64_t steps_of_tap() const { return weights.steps / Taps(problem); }

  // The taps of a combination of segments, as runs of elements; neighbours join.
  int64_t ListTaps(const Segment* const* segment, const View& view, int64_t joined_step, Tap* taps) const {
    int64_t count = 0;
    const int64_t size[2] = {problem.axis[1].kernel * problem.axis[2].kernel, problem.axis[2].kernel};
    const int64_t steps = steps_of_tap();
    for (int64_t a = 0; a < segment[0]->taps; ++a) {
      for (int64_t b = 0; b < segment[1]->taps; ++b) {
        for (int64_t c = 0; c < segment[2]->taps; ++c) {
          const int64_t tap = (segment[0]->tap + a * segment[0]->tap_step) * size[0] +
                              (segment[1]->tap + b * segment[1]->tap_step) * size[1] + segment[2]->tap +
                              c * segment[2]->tap_step;
          const int64_t from = a * segment[0]->tap_source * view.stride[1] + b * segment[1]->tap_source * view.stride[2] +
                               c * segment[2]->tap_source * view.stride[3];
          if (joined_step > 0) {
            // Lanes: every copy of the source is a step by itself.
            for (int64_t d = 0; d < steps; ++d) taps[count++] = {from + d * joined_step, tap * steps + d, 1};
          } else if (count > 0 && taps[count - 1].source + taps[count - 1].length == from &&
                     taps[count - 1].step + taps[count - 1].length == tap * steps) {
            taps[count - 1].length += steps;
          } else {
            taps[count++] = {from, tap * steps, steps};
          }
        }
      }
    }
    return count;
  }

  // The targets [first, last) of a segment inside a box.
  static Interval Inside(const Segment& segment, Interval range) {
    const int64_t begin = segment.target >= range.begin ? 0 : (range.begin - segment.target + segment.step - 1) / segment.step;
    const int64_t end = segment.target >= range.end ? 0 : (range.end - segment.target + segment.step - 1) / segment.step;
    return {Least(begin, segment.count), Least(end, segment.count)};
  }

  template <Way way, class S>
  void Run(const Box& box, const S* from, const View& from_view, T* to, const View& to_view, Interval panels, Row* rows,
           Tap* taps) const {
    const Segment* s[3];
    Interval in[3];
    for (int64_t a = 0; a < plan.segments[0]; ++a) {
      s[0] = plan.segment[0] + a;
      in[0] = Inside(*s[0], box.range[1]);
      if (in[0].begin >= in[0].end) continue;
      for (int64_t b = 0; b < plan.segments[1]; ++b) {
        s[1] = plan.segment[1] + b;
        in[1] = Inside(*s[1], box.range[2]);
        if (in[1].begin >= in[1].end) continue;
        for (int64_t c = 0; c < plan.segments[2]; ++c) {
          s[2] = plan.segment[2] + c;
          in[2] = Inside(*s[2], box.range[3]);
          if (in[2].begin >= in[2].end) continue;
          int64_t count = 0;
          const Row step = {s[2]->source_step * from_view.stride[3], s[2]->step * to_view.stride[3]};
          for (int64_t n = box.range[0].begin; n < box.range[0].end; ++n) {
            const auto at = [&](int axis, int64_t u, const Row& row) {
              return Row{row.source + from_view.at(axis + 1, s[axis]->source + s[axis]->source_step * u),
                         row.target + to_view.at(axis + 1, s[axis]->target + s[axis]->step * u)};
            };
            for (int64_t i = in[0].begin; i < in[0].end; ++i) {
              const Row plane = at(0, i, {from_view.at(0, n), to_view.at(0, n)});
              for (int64_t j = in[1].begin; j < in[1].end; ++j) {
                const Row line = at(1, j, plane);
                Row row = at(2, in[2].begin, line);
                for (int64_t k = in[2].begin; k < in[2].end; ++k, row.source += step.source, row.target += step.target) {
                  rows[count++] = row;
                }
              }
            }
          }
          const int64_t tap_count = ListTaps(s, from_view, way == Way::kAcross ? source_pitch / depth : 0, taps);
          MultiplyAll<way>(count, from, to, group_pitch, rows, taps, tap_count, panels);
        }
      }
    }
  }

  template <Way way, class S>
  void MultiplyAll(int64_t count, const S* from, T* to, int64_t group_pitch, const Row* rows, const Tap* taps,
                   int64_t tap_count, Interval panels) const {
    const Lanes<T>& lanes = weights.lanes;
    const int64_t panels_of_group = lanes.panels(), first = panels.begin / panels_of_group;
    // Across, a row is short work: finish the channels of few rows before the next ones.
    const int64_t some = way == Way::kDense ? count : way == Way::kAcross ? kRows : kPickedRows;
    for (int64_t begin = 0; begin < count; begin += some) {
      int64_t group = first, number = panels.begin - first * panels_of_group;
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        const Panel panel = lanes.panel(number);
        MultiplyPanel<way, kPanel>(panel.vectors, Least(some, count - begin), from + (way == Way::kDense ? group * depth : panel.start),
                                      to + group * group_pitch + panel.start, rows + begin, taps, tap_count,
                                      weights.data + group * weights.group_size() + panel.first * weights.steps * kN);
        if (++number == panels_of_group) number = 0, ++group;
      }
    }
  }

  // All windows that touch the box times all taps, a row at a time; the products are added to the box.
  void Overlap(const Box& box, T* to, const View& to_view, T* stage, T* products, Row* rows) const {
    const Box sources = SourceBox(box);
    const ConvAxis* axis = problem.axis;
    const int64_t width = sources.length(3), group_width = weights.lanes.padded(), pitch = group_width * problem.groups;
    const int64_t narrow = this->narrow;
    for (int64_t b = box.range[0].begin; b < box.range[0].end; ++b) {
      for (int64_t i = box.range[1].begin; i < box.range[1].end; ++i) {
        for (int64_t j = box.range[2].begin; j < box.range[2].end; ++j) {
          T* row = to + to_view.at(0, b) + to_view.at(1, i) + to_view.at(2, j) + to_view.at(3, box.range[3].begin);
          for (int64_t e = 0; e < box.length(3) * to_view.stride[3]; ++e) row[e] = 0;
        }
      }
      if (width == 0) continue;
      for (int64_t i = sources.range[1].begin; i < sources.range[1].end; ++i) {
        for (int64_t j = sources.range[2].begin; j < sources.range[2].end; ++j) {
          const Box line = {{{b, b + 1}, {i, i + 1}, {j, j + 1}, sources.range[3]}};
          const T* from = stage;
          if (direct_source) {
            from = reinterpret_cast<const T*>(source.data + source.row(b, i, j) + line.range[3].begin * source.channels);
          } else {
            Stage<E>(source, line, stage, source_pitch, 1, 1);
          }
          for (int64_t w = 0; w < width; ++w) rows[w] = {w * source.channels, w * pitch};
          const Tap all = {0, 0, depth};
          MultiplyAll<Way::kDense>(width, from, products, group_width, rows, &all, 1, {0, weights.panels()});
          for (int64_t k0 = 0; k0 < axis[0].kernel; ++k0) {
            const int64_t plane = axis[0].stride * i - axis[0].lo + axis[0].dilation * k0;
            if (plane < box.range[1].begin || plane >= box.range[1].end) continue;
            for (int64_t k1 = 0; k1 < axis[1].kernel; ++k1) {
              const int64_t height = axis[1].stride * j - axis[1].lo + axis[1].dilation * k1;
              if (height < box.range[2].begin || height >= box.range[2].end) continue;
              T* row = to + to_view.at(0, b) + to_view.at(1, plane) + to_view.at(2, height);
              const T* taps = products + (k0 * axis[1].kernel + k1) * axis[2].kernel * narrow;
              AddRow(row, taps, line.range[3], pitch, group_width, box.range[3], to_view);
            }
          }
        }
      }
    }
  }

  void AddRow(T* row, const T* products, Interval windows, int64_t pitch, int64_t group_width, Interval pixels,
              const View& view) const {
    const ConvAxis& axis = problem.axis[2];
    // One group and adjacent taps: the products of a window are one run.
    const bool joined = axis.dilation == 1 && problem.groups == 1 && view.stride[3] == narrow;
    const int64_t taps = joined ? 1 : axis.kernel, pixels_of_run = joined ? axis.kernel : 1;
    for (int64_t w = windows.begin; w < windows.end; ++w, products += pitch) {
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t first = axis.stride * w - axis.lo + axis.dilation * k;
        const int64_t begin = Most(first, pixels.begin), end = Least(first + pixels_of_run, pixels.end);
        if (begin >= end) continue;
        for (int64_t g = 0; g < problem.groups; ++g) {
          const T* from = products + g * group_width + (k + begin - first) * narrow;
          T* to = row + view.at(3, begin) + g * group_pitch;
          for (int64_t e = 0; e < (end - begin) * narrow; ++e) to[e] += from[e];
        }
      }
    }
  }

  // A panel that overlaps the one before it stays with it, so that no two tasks write to the same place.
  int64_t FirstPanel(int64_t split) const {
    const int64_t panels = weights.lanes.panels(), first = weights.panels() * split / splits;
    const bool overlaps = weights.lanes.count % kN != 0 && panels > 1 && first % panels == panels - 1;
    return first + (overlaps ? 1 : 0);
  }

  bool Work(int64_t unit) const {
    const Box box = BoxAt(unit / splits);
    const Interval panels = {FirstPanel(unit % splits), FirstPanel(unit % splits + 1)};
    const int64_t numbers = product_room + source_room + target_room;
    T* products = static_cast<T*>(Scratch(numbers * sizeof(T) + row_room * sizeof(Row) + tap_room * sizeof(Tap)));
    if (products == nullptr) return false;
    T* stage = products + product_room;
    T* tile = stage + source_room;
    Row* rows = reinterpret_cast<Row*>(tile + target_room);
    Tap* taps = reinterpret_cast<Tap*>(rows + row_room);

    View to_view;
    T* to = tile;
    if (direct_target) {
      to = reinterpret_cast<T*>(target.data);
      to_view = ViewOf(Whole(target, problem.batch), target.channels);
    } else {
      to_view = ViewOf(box, target_pitch);
    }
    if (way == Way::kOverlap) {
      Overlap(box, to, to_view, stage, products, rows);
    } else {
      const Box sources = SourceBox(box);
      View from_view = ViewOf(sources, source_pitch);
      if (direct_source) {
        from_view = ViewOf(Whole(source, problem.batch), source.channels);
      } else {
        Stage<E>(source, sources, stage, source_pitch, way == Way::kAcross ? depth : 1, way == Way::kAcross ? narrow : 1);
      }
      const auto run = [&](auto from) {
        if constexpr (kPicks) {
          if (way == Way::kPicked) return Run<Way::kPicked>(box, from, from_view, to, to_view, panels, rows, taps);
        }
        Run<Way::kAcross>(box, from, from_view, to, to_view, panels, rows, taps);
      };
      const T* const same = direct_source ? reinterpret_cast<const T*>(source.data) : stage;
      if (way == Way::kDense) {
        Run<Way::kDense>(box, same, from_view, to, to_view, panels, rows, taps);
      } else if (direct_source) {
        run(source.data);
      } else {
        run(same);
      }
    }
    if (!direct_target) EmitPanels(box, tile, panels);
    return true;
  }

  void EmitPanels(const Box& box, const T* tile, Interval panels) const {
    const Lanes<T>& lanes = weights.lanes;
    if (way == Way::kOverlap || splits == 1) {
      const int64_t groups = target_pitch / group_pitch;
      if (group_pitch * groups == target.channels) return Emit(tile, target_pitch, target, box, {0, target.channels});
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t count = target.channels / groups;
        Emit(tile + g * group_pitch, target_pitch, target, box, {g * count, (g + 1) * count});
      }
      return;
    }
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t group = p / lanes.panels();
      const Panel panel = lanes.panel(p % lanes.panels());
      const int64_t begin = panel.start, end = Least(begin + panel.vectors * kN, lanes.count);
      Emit(tile + group * group_pitch + begin, target_pitch, target, box, {group * lanes.count + begin, group * lanes.count + end});
    }
  }
};

template <class E, class R>
bool GatherAll(const ConvProblem& problem) {
  using T = Acc<E>;
  constexpr int kN = kLanes<T>;
  const bool forward = problem.op == ConvOp::kForward;
  const int64_t groups = problem.groups, in = problem.in / groups, out = problem.out / groups;
  const int64_t depth = forward ? in : out, narrow = forward ? out : in;
  const KernelLayout layout = LayoutOf(problem);
  const int64_t taps = Taps(problem);
  void* operands[2] = {const_cast<void*>(problem.operand[0]), const_cast<void*>(problem.operand[1])};
  const Array<const E> source = forward ? Windows<const E>(problem, operands[0]) : Image<const E>(problem, operands[0]);
  const Array<R> target = forward ? Image<R>(problem, problem.result) : Windows<R>(problem, problem.result);

  Way way = Way::kDense;
  if (groups > 1 && depth > 0 && 2 * narrow <= kN && depth <= kN) {
    way = Way::kAcross;
  } else if (depth == 1 && narrow == 1) {
    way = groups > 1 ? Way::kAcross : forward ? Way::kOverlap : Way::kDense;
  } else if (forward && 4 * narrow <= 3 * kN) {
    way = Way::kOverlap;
  }
  const bool across = way == Way::kAcross, overlap = way == Way::kOverlap;
  if (across && Picks<T>(depth, narrow, groups * narrow)) way = Way::kPicked;
  Weights<T> weights = {{across ? groups * narrow : overlap ? taps * narrow : narrow}, across ? 1 : groups,
                        overlap ? depth : taps * depth, nullptr};
  const int64_t lane = forward ? layout.out : layout.in, deep = forward ? layout.in : layout.out;
  KernelStrides strides = {layout.base, layout.group, layout.tap, deep, lane, weights.lanes.count, 0};
  if (across && narrow == 1) strides.lane = layout.group;
  if (across && narrow > 1) strides.inner = narrow, strides.outer = layout.group;
  if (overlap) strides.inner = narrow, strides.outer = layout.tap;
  const Buffer packed(weights.groups * weights.group_size() * static_cast<int64_t>(sizeof(T)));
  if (packed.data() == nullptr) return false;
  T* panels = static_cast<T*>(packed.data());
  weights.data = panels;
  if (!Pack(*problem.workers, static_cast<const E*>(operands[1]), strides, overlap ? 1 : taps, depth, weights, panels)) {
    return false;
  }

  const bool direct_source =
      problem.channels_last && (way == Way::kPicked || (across ? depth == 1 && narrow == 1 && source.channels >= kN : std::is_same_v<E, T>));
  const bool direct_target = problem.channels_last && std::is_same_v<R, T> && (overlap || weights.lanes.count >= kN);
  const int64_t source_pitch = way == Way::kAcross ? depth * weights.lanes.padded() : source.channels;
  const int64_t group_pitch = overlap ? narrow : weights.lanes.padded();
  const int64_t target_pitch = group_pitch * weights.groups;

  // Boxes so large that their two sides stay in the cache.
  double ratio = 1;
  for (const ConvAxis& axis : problem.axis) ratio *= axis.stride;
  const double sources_a_target = overlap ? 0 : forward ? 1 / ratio : ratio;
  const double bytes = (target_pitch + source_pitch * sources_a_target) * sizeof(T);
  const GatherPlan plan(problem, static_cast<int64_t>(kCacheBytes / bytes) + 1, overlap);

  Gather<E, R> gather = {problem, plan, way, source, target, weights, depth, narrow};
  gather.direct_source = direct_source;
  gather.direct_target = direct_target;
  gather.source_pitch = source_pitch;
  gather.target_pitch = target_pitch;
  gather.group_pitch = group_pitch;
  const int64_t boxes = plan.box_count();
  if (!overlap) gather.splits = Most(1, Least(weights.panels(), (32 + boxes - 1) / boxes));
  int64_t sources = overlap ? 1 : plan.box[0], targets = plan.box[0];
  for (int a = 0; a < 3; ++a) {
    // Overlapping works on one row of sources at a time.
    if (!overlap || a == 2) sources *= MostSources(problem.axis[a], forward, plan.box[a + 1]);
    targets *= plan.box[a + 1];
  }
  if (overlap) gather.product_room = RoundUp(sources * weights.lanes.padded() * groups, 16);
  if (!direct_source) gather.source_room = RoundUp(sources * source_pitch, 16);
  if (!direct_target) gather.target_room = RoundUp(targets * target_pitch, 16);
  gather.row_room = overlap ? sources : targets;
  gather.tap_room = overlap ? 0 : taps * (across ? depth : 1);

  const int64_t units = boxes * gather.splits;
  const auto body = [](const void* data, int64_t begin, int64_t end) {
    const auto& gather = *static_cast<const Gather<E, R>*>(data);
    for (int64_t unit = begin; unit < end; ++unit) {
      if (!gather.Work(unit)) return false;
    }
    return true;
  };
  return ParallelFor(*problem.workers, units, static_cast<int64_t>(Effort<E>(problem) / units) + 1, body, &gather);
}

// ---- Weight gradient.

#include "conv/weights.h"

template <class E>
bool ConvTranspose(const ConvProblem& problem) {
  if (problem.op == ConvOp::kWeightGradient) {
    return problem.wide ? WeightGradient<E, Acc<E>>(problem) : WeightGradient<E, E>(problem);
  }
  return problem.wide ? GatherAll<E, Acc<E>>(problem) : GatherAll<E, E>(problem);
}
